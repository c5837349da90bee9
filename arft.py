"""Visual Agentic Reinforcement Fine-Tuning: the program, and the training loop as an outline.

    python arft.py --task mat-coding                             train, evaluate before and after
    python arft.py --task mat-coding --eval-only --model DIR     evaluate a checkpoint
    python arft.py --help                                        every option

What it teaches: the whole of agentic reinforcement learning, by the method of Visual-ARFT (arXiv
2505.14246). The loop of `train` below makes these calls:

    samples -> rollout -> rewards -> group advantages -> update

Without a GPU the program trains data/tiny on MAT-mini in a few minutes. To train the paper's model
you name its folder and a folder of MAT.

`Parts` hands the loop what does not decide what is learned: how episodes are cut into tensors, who
steps the weights, who keeps the run folder. Variants stand in extras/, which you can skip.

Read next: policy.py.
"""

import math
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch

from data.mat import Sample
from extras import options
from extras.record import Run
from grpo import Optimizer, Settings, group_advantages, reference_of, update
from policy import Policy
from rewards import Reward, Scoring
from rollout import Episode, Limits, RowLayout
from tools import Tools


@dataclass
class Config(Limits, Settings, Scoring, options.Machine):
    """Every option; the base classes stand in the files whose options they hold.

    Where an option is None, the program chooses by the model (extras/setup.py:DEFAULTS).
    """
    # the run
    task: Literal["mat-coding", "mat-search", "2wiki", "hotpotqa", "musique", "bamboogle"] = (
        "mat-coding")                       # what to train and evaluate on
    model: str | None = None                # checkpoint folder or hub name
    data: str | None = None                 # MAT or FlashRAG folder, or one .jsonl file
    seed: int = 0                           # the same seed gives the same run (one CPU process)
    steps: int | None = None                # training steps; paper: 1400 for its checkpoint
    samples_per_step: int | None = None     # questions in a step; paper: 16
    eval_only: bool = False                 # evaluate and stop
    tools: Literal["on", "off"] = "on"      # off: no program runs, no search is made (a control)
    lora_rank: int | None = None            # rank of LoRA; 0 trains all weights; paper: 0
    vision: Literal["frozen", "trained"] = "frozen"     # whether the vision tower is trained
    lr: float | None = None                 # learning rate; paper: 1e-6, with LoRA ten times that
    warmup: int = 5                         # steps over which the learning rate rises
    lr_schedule: Literal["linear", "constant"] = "linear"   # linear falls to zero; paper: linear

    @property
    def max_sampled(self) -> int:
        """What dr_grpo divides by: the tokens of an episode whose turns are all full."""
        return min(self.training_turns * self.max_new_tokens, self.max_length)


@dataclass
class Parts:
    """What may be exchanged without changing the lesson; the plain part stands first."""
    rollout: Callable[..., list[Episode]]   # rollout.rollout | extras.paper.rollout
    reward: Callable[[Episode], Reward]     # rewards.episode_reward | extras.paper.step_reward
    layout: RowLayout                       # rollout.RowLayout | extras.tree.TreeLayout
    optimizer: type[Optimizer]              # grpo.Optimizer | one of extras.weights, extras.many
    run: Run                                # yields the steps, keeps what came of them
    tools: Tools
    generator: torch.Generator              # of sampling and of the order of minibatches


# --- evaluation -----------------------------------------------------------------------------------


def evaluate(policy: Policy, held_out: list[Sample], config: Config, parts: Parts,
             name: str) -> None:
    """Answers every held-out question once in each mode and records the scores under `name`.

    The modes are greedy (temperature 0) and sampled (temperature 1, the policy that is trained).
    """
    for evaluation in parts.run.evaluations(name, held_out):
        limits = replace(config, temperature=evaluation.temperature)
        for start, samples in evaluation.batches():
            seed = config.seed + 10_000 + start         # not the seed of training
            generator = torch.Generator(policy.device).manual_seed(seed)
            episodes = parts.rollout(policy, samples, limits=limits, tools=parts.tools,
                                     generator=generator)
            evaluation.add(start, episodes)


# --- training -------------------------------------------------------------------------------------


def train(policy: Policy, training: list[Sample], config: Config, parts: Parts) -> None:
    """GRPO. A step: samples -> episodes -> rewards -> advantages -> one update."""
    choose_weights(policy, config)
    reference = reference_of(policy) if config.beta > 0 else None
    optimizer = parts.optimizer(policy, config.lr, config.max_grad_norm)
    for step, samples in parts.run.steps(batches(training, config), optimizer):
        episodes = parts.rollout(policy, samples, group_size=config.group_size, limits=config,
                                 tools=parts.tools, generator=parts.generator)
        rewards = [reward_of(episode, parts.reward) for episode in episodes]
        totals = torch.tensor([reward.total for reward in rewards])                     # [N]
        advantages = group_advantages(totals, config.group_size, config.scale)          # [N]
        with parts.run.uninterrupted():     # Ctrl-C waits for the end of the block
            optimizer.set_lr(learning_rate(config, step))
            stats = update(policy, reference, episodes, advantages, config, optimizer=optimizer,
                           layout=parts.layout, generator=parts.generator)
            parts.run.record(episodes, rewards, advantages, stats)


def choose_weights(policy: Policy, config: Config) -> None:
    """Which weights are trained: adapters or all; the vision tower or not."""
    if config.lora_rank and not policy.adapters:
        policy.add_lora(config.lora_rank)
    if config.vision == "frozen":
        policy.model.model.visual.requires_grad_(False)
        policy.keep_features = True         # its features stay right for as long as an image lives


def batches(samples: list[Sample], config: Config) -> Iterator[list[Sample]]:
    """The samples of each step, endlessly, in a new random order each time round."""
    order = random.Random(config.seed)
    waiting = []
    while True:
        while len(waiting) < config.samples_per_step:
            waiting += order.sample(samples, len(samples))
        yield waiting[:config.samples_per_step]
        waiting = waiting[config.samples_per_step:]


def reward_of(episode: Episode, reward: Callable[[Episode], Reward]) -> Reward:
    """What the episode earned. A reward that is not a finite number stops the run (law 6)."""
    earned = reward(episode)
    if not math.isfinite(earned.total):
        raise options.UsageError(f"sample {episode.sample.id}: its reward is {earned.total}; check "
                                 "your reward function and --weight")
    return earned


def learning_rate(config: Config, step: int) -> float:
    """Rises over the warm-up; "linear" also falls all the while, to lr / steps. step: from 0."""
    warm = min(1.0, (step + 1) / (config.warmup + 1))
    return config.lr * (warm * (1 - step / config.steps if config.lr_schedule == "linear" else 1.0))


# --- the program ----------------------------------------------------------------------------------


def start(config: Config) -> int:
    """One run: evaluate the policy, train it, evaluate it again. Returns the exit code."""
    held_out, training = options.load_samples(config)
    with options.open_tools(config) as tools:
        policy = options.load_policy(config)
        run = options.open_run(config, policy, held_out, training)
        parts = Parts(**options.choose_parts(config, policy, run, tools))
        run.midway = partial(evaluate, policy, held_out, config, parts)     # with --eval-every
        with run:
            evaluate(policy, held_out, config, parts, "before")
            if not config.eval_only:
                train(policy, training, config, parts)
                evaluate(policy, held_out, config, parts, "after")
    return run.say_scores()


@options.explains_errors
def main(arguments: list[str]) -> int:
    """Reads the options, then makes a run, or does what an option asks for in its place."""
    config = options.parse(Config, arguments)
    code = options.instead_of_a_run(config)
    return start(config) if code is None else code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
