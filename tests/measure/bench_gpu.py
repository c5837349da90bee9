"""Measures the parts of a training step at the published shapes.

    python tests/measure/bench_gpu.py
        3B on the GPU: 16 samples x 8 episodes x 3 turns x 256 tokens
    python tests/measure/bench_gpu.py --shape 7b
    python tests/measure/bench_gpu.py --device cpu --shape small
        the same on any machine, smaller; look at the ratios

The weights are random, and the episodes have a fixed size. Each looks like one of MAT-Coding: a
prompt with a photograph, a turn, a line of text, a turn, an image, a last turn. No row ends a turn
early, so that every way of sampling has the same work. The program prints

    rollout    this repository's way: the prompt is prefilled once for its group, one key-value
               cache lives through all turns, a CUDA graph decodes
    no graph   the same with --cuda-graph off
    generate   transformers' generate for each turn, which prefills the whole conversation again
               for every row
    update     one step of plain AdamW on these episodes, whose images keep their features as in a
               run with a frozen vision tower; then rows against trees as in bench_update.py

The bandwidth limit: a step of decoding must read the language model's weights and every key and
value once. The limit is the time that a plain copy of so many bytes takes on this machine.
"""

import argparse
import sys
import time
from contextlib import nullcontext
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import numpy as np
import torch
from PIL import Image

import grpo
from arft import Config
from bench_shapes import SHAPES, make_policy
from extras.engine import Clock, Rows, encode_images
from extras.tree import TreeLayout
from extras.weights import checkpointing
from rollout import Episode, Limits, decode_turn, fork

MAT_ITEMS = 200


class Meter(Clock):
    """A Clock that also keeps the peak of GPU memory in each phase."""

    def __init__(self, device: str):
        super().__init__()
        self.device, self.peak = device, {}

    def run(self, phase: str, function, *arguments):
        """Calls function(*arguments) and measures it as part of a phase."""
        if self.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        self.start(phase)
        result = function(*arguments)
        self.stop(phase)
        if self.device == "cuda":
            self.peak[phase] = max(self.peak.get(phase, 0.0),
                                   torch.cuda.max_memory_allocated() / 2**30)
        return result

    def lines(self) -> list[str]:
        return [f"  {name:20}{seconds:9.2f} s"
                + (f"{self.peak[name]:9.1f} GiB at its peak" if name in self.peak else "")
                for name, seconds in self.seconds.items()]


def photograph(policy, side: int, seed: int):
    noise = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return policy.image_input(Image.fromarray(noise))


def make_prompts(policy, args) -> list[Episode]:
    """One episode for each sample, which holds its prompt."""
    prompts = []
    for seed in range(args.samples):
        images = [photograph(policy, args.side, seed)]
        prompt = Episode(sample=None)
        prompt.append(policy.prompt_ids("What is written on the sign?", images), 0, images=images,
                      holders=policy.image_tokens(images[0]))
        prompts.append(prompt)
    return prompts


def observations(policy, args) -> list[list]:
    """What each row is shown before each later turn, as (ids, images).

    First it is a line of text, later an image that is the row's own.
    """
    rows = args.samples * args.group
    made = [[(policy.observation_ids("Write the code that repairs it.", []), [])
             for _ in range(rows)]]
    shown = [[photograph(policy, args.side, 1000 + row)] for row in range(rows)]
    made += [[(policy.observation_ids("This is the image now.", images), images)
              for images in shown] for _ in range(args.turns - 2)]
    return made[:args.turns - 1]


@torch.inference_mode()
def sample_ours(policy, prompts, replies, args, meter, graph: str) -> list[Episode]:
    """Does what rollout.rollout does, with turns of a fixed length and prepared replies."""
    limits = Limits(max_new_tokens=args.tokens, max_turns=args.turns)
    generator = torch.Generator(policy.device).manual_seed(0)
    rows = Rows(policy, args.tokens)
    rows.static = graph == "on" and policy.device.type == "cuda"
    policy.keep_features = True     # computed here; `feed` and the update find them
    shown = [image for prompt in prompts for image in prompt.images]
    meter.run("vision", encode_images, policy, shown)
    meter.run("prefill", rows.feed, prompts)
    meter.run("prefill", rows.repeat, args.group)
    episodes = [fork(prompt) for prompt in prompts for _ in range(args.group)]
    for turn in range(args.turns):
        written = meter.run("decode", decode_turn, policy, rows, limits, generator)
        for episode, (ids, logp) in zip(episodes, written, strict=True):
            episode.append(ids, 1, logp)
        if turn < args.turns - 1:
            feed_replies(policy, rows, episodes, replies[turn], meter)
    return episodes


def feed_replies(policy, rows, episodes, replies, meter) -> None:
    """Adds the replies to episodes and cache."""
    for episode, (ids, images) in zip(episodes, replies, strict=True):
        episode.append(ids, 0, images=images, holders=sum(map(policy.image_tokens, images)))
    shown = [image for _, images in replies for image in images]
    meter.run("vision of replies", encode_images, policy, shown)
    meter.run("prefill of replies", rows.keep, list(range(len(episodes))))
    meter.run("prefill of replies", rows.feed, episodes)


@torch.inference_mode()
def sample_by_generate(policy, prompts, replies, args) -> None:
    """Samples turn by turn with `generate`, which is given every row's whole conversation and all
    its images each time."""
    # stands in for every sampled token, because a sampled one might be a placeholder
    word = policy.text_ids("a")[0]
    rows = [(list(prompt.ids), list(prompt.images)) for prompt in prompts
            for _ in range(args.group)]
    for turn in range(args.turns):
        ids = torch.tensor([ids for ids, _ in rows], device=policy.device)     # all of one length
        images = [image for _, shown in rows for image in shown]
        patches = torch.cat([image.patches for image in images])
        policy.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids),
            mm_token_type_ids=(ids == policy.image_pad).int(),
            pixel_values=patches.to(policy.device, policy.model.dtype),
            image_grid_thw=torch.tensor([image.grid for image in images], device=policy.device),
            do_sample=True, top_k=0, min_new_tokens=args.tokens, max_new_tokens=args.tokens,
            pad_token_id=policy.im_end)
        if turn < args.turns - 1:
            rows = [(ids + [word] * args.tokens + more, shown + images)
                    for (ids, shown), (more, images) in zip(rows, replies[turn], strict=True)]


def train(policy, episodes, args) -> None:
    """Takes one optimiser step with the options that are default on a GPU, without a reference."""
    config = Config(group_size=args.group, inner_epochs=1, minibatches=1, beta=0.0,
                    max_new_tokens=args.tokens, max_turns=args.turns)
    policy.model.model.visual.requires_grad_(False)
    advantages = torch.tensor([1.0, -1.0] * (len(episodes) // 2) + [0.0] * (len(episodes) % 2))
    grpo.update(policy, None, episodes, advantages, config,
                optimizer=grpo.Optimizer(policy, 1e-6, config.max_grad_norm),
                layout=TreeLayout(args.micro_batch_tokens,
                                  checkpointing if args.device == "cuda" else nullcontext),
                generator=torch.Generator(policy.device))


def copy_speed(device: str) -> float:
    """Speed of a plain copy in bytes a second; a byte counts when read and when written."""
    source = torch.ones(2**28 if device == "cuda" else 2**25, dtype=torch.float32, device=device)
    target, best = torch.empty_like(source), 0.0
    for _ in range(5):
        meter = Meter(device)
        meter.run("copy", target.copy_, source)
        best = max(best, 2 * source.nbytes / meter.seconds["copy"])
    return best


def decode_limit(policy, args, length: float) -> float:
    """The least seconds that decoding can take: bytes that must be read / speed of a copy.

    length: tokens of a row, on average over the steps.
    """
    text, config = policy.model.model.language_model, policy.model.config.text_config
    weights = sum(weight.nbytes
                  for weight in text.layers.parameters()) + policy.model.lm_head.weight.nbytes
    size = config.hidden_size // config.num_attention_heads * config.num_key_value_heads
    of_a_token = 2 * config.num_hidden_layers * size * policy.model.lm_head.weight.element_size()
    steps = args.turns * args.tokens
    keys_and_values = args.samples * args.group * length * of_a_token
    return steps * (weights + keys_and_values) / copy_speed(args.device)


def report(policy, args) -> None:
    """Measures rollout, generate and update, and prints what they took."""
    sampled = args.samples * args.group * args.turns * args.tokens
    prompts, replies = make_prompts(policy, args), observations(policy, args)
    policy.barred[policy.im_end] = True         # no turn ends early
    # for `generate`: data/tiny's tokenizer in the published shapes
    policy.model.config.image_token_id = policy.image_pad
    ours, plain, theirs, after = (Meter(args.device) for _ in range(4))
    episodes = sample_ours(policy, prompts, replies, args, ours, "on")
    total = sum(ours.seconds.values())
    print(f"rollout: {len(episodes)} episodes of {len(episodes[0].ids)} tokens, {sampled} sampled, "
          f"prompts of {len(prompts[0].ids)}; {total:.2f} s")
    print("\n".join(ours.lines()))
    print_speeds(policy, args, prompts, episodes, ours, sampled)
    if args.device == "cuda":
        sample_ours(policy, prompts, replies, args, plain, "off")
        times = plain.seconds["decode"] / ours.seconds["decode"]
        print(f"no graph: decode {times:.2f} times as long")
    if args.generate == "on":
        theirs.run("generate", sample_by_generate, policy, prompts, replies, args)
        times = theirs.seconds["generate"] / total
        print("\n".join(["generate: the same episodes", *theirs.lines(),
                         f"  {times:.2f} times as long as the rollout"]))
    policy.barred[policy.im_end] = False
    after.run("update", train, policy, episodes, args)
    print("\n".join(["update", *after.lines(),
                     f"whole step: {total + after.seconds['update']:.1f} s"]))
    print_mat_minutes(args, ours, total)


def print_speeds(policy, args, prompts, episodes, ours, sampled) -> None:
    """Prints tokens a second of prefill and decode, and what part of the bandwidth limit it is."""
    fed = sum(len(prompt.ids) for prompt in prompts)
    halfway = (len(prompts[0].ids) + len(episodes[0].ids)) / 2
    percent = 100 * decode_limit(policy, args, halfway) / ours.seconds["decode"]
    print(f"  prefill {fed / ours.seconds['prefill']:.0f} tokens a second, "
          f"decode {sampled / ours.seconds['decode']:.0f} tokens a second, "
          f"{percent:.0f} percent of the bandwidth limit")


def print_mat_minutes(args, ours, total: float) -> None:
    """Prints what a greedy evaluation of MAT-Coding would take, scaled from these seconds."""
    once, rows = ours.seconds["vision"] + ours.seconds["prefill"], args.samples * args.group
    minutes = (once * MAT_ITEMS / args.samples + (total - once) * MAT_ITEMS / rows) / 60
    print(f"MAT-Coding, {MAT_ITEMS} items, greedy: {minutes:.1f} minutes (prompts and turns above, "
          "scaled; without tools)")


def compare_updates(args) -> None:
    """Measures an update with rows against one with trees."""
    try:
        import bench_update
    except ImportError:
        print("rows against tree: tests/measure/bench_update.py is not here")
        return
    parser = argparse.ArgumentParser()
    bench_update.add_options(parser)
    bench_update.bench(parser.parse_args(["--device", args.device, "--shape", args.shape]))


def main() -> None:
    small = "cpu" in sys.argv or not torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cpu" if small else "cuda")
    parser.add_argument("--shape", choices=tuple(SHAPES), default="small" if small else "3b")
    for name, (on_cpu, on_gpu) in {"samples": (2, 16), "group": (8, 8), "turns": (3, 3),
                                   "tokens": (24, 256), "side": (336, 720),
                                   "micro_batch_tokens": (2048, 8192)}.items():
        parser.add_argument("--" + name.replace("_", "-"), type=int,
                            default=on_cpu if small else on_gpu)
    parser.add_argument("--generate", choices=("on", "off"), default="on",
                        help="off: leave out the slowest part")
    parser.add_argument("--updates", choices=("on", "off"), default="on",
                        help="off: leave out rows against tree")
    args = parser.parse_args()
    if args.device == "cpu":
        torch.set_num_threads(1)
    start = time.perf_counter()
    policy = make_policy(args.shape, args.device,
                         torch.bfloat16 if args.device == "cuda" else torch.float32)
    device = torch.cuda.get_device_name() if args.device == "cuda" else "cpu, one thread"
    weights = sum(weight.numel() for weight in policy.model.parameters())
    print(f"{args.shape} on {device}, {weights / 1e6:.0f} M weights, {policy.model.dtype}, "
          f"torch {torch.__version__}, made in {time.perf_counter() - start:.0f} s")
    report(policy, args)
    if args.updates == "on":
        compare_updates(args)


if __name__ == "__main__":
    main()
