"""Measures what the packed tree saves: one update of the same episodes, as rows and as trees.

    python tests/measure/bench_update.py --device cpu
        the small shape, on any machine
    python tests/measure/bench_update.py --device cuda --shape 3b
        the published shape with random weights in bfloat16

The episodes are groups of equal length with an image in the prompt, random tokens and a model with
random weights (bench_shapes.py). Each round measures both layouts, so that a busy machine is busy
for both, and the median is printed. On a CPU the seconds are processor time. The optimiser is plain
SGD with a learning rate of 0: AdamW would cost the same for both, and the weights do not change.

"tokens/s" counts the tokens of all episodes, with the prompt of each. The arithmetic is that of the
tokens which went through the model, forward and backward (6 operations for each weight and token,
and those of attention), without what gradient checkpointing computes again. If the gradients' norms
are equal, both layouts did the same work.

tests/measure/bench_gpu.py prints the same as its part "update".
"""

import argparse
import statistics
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from PIL import Image

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]
from arft import Config
from bench_shapes import SHAPES, make_policy
from extras import weights
from extras.tree import TreeLayout
from grpo import Optimizer, frozen_logp, group_advantages, update
from policy import Policy
from rollout import Episode, RowLayout

# bf16, dense, published
PEAK = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12}


def make_episodes(policy: Policy, groups: int, group_size: int, prompt: int, continuation: int,
                  side: int):
    """Groups of episodes: a prompt of `prompt` tokens, which holds an image of side x side pixels,
    and a turn of `continuation` tokens."""
    generator = torch.Generator().manual_seed(0)
    allowed = (~policy.barred.cpu()).nonzero()[:, 0]

    def random_ids(count):
        return allowed[torch.randint(len(allowed), (count,), generator=generator)].tolist()

    episodes = []
    for _ in range(groups):
        image = policy.image_input(Image.effect_noise((side, side), 60).convert("RGB"))
        ids = [policy.vision_start, *[policy.image_pad] * policy.image_tokens(image),
               policy.vision_end]
        if len(ids) > prompt:
            raise SystemExit(f"--prompt {prompt}: the image alone takes {len(ids)} tokens; lower "
                             f"--side {side}")
        ids += random_ids(prompt - len(ids))
        for _ in range(group_size):
            episode = Episode(None)
            episode.append(list(ids), mask=0, images=[image], holders=policy.image_tokens(image))
            # a probability of about 1 / 719 for each token
            episode.append(random_ids(continuation), mask=1, logp=[-6.6] * continuation)
            episodes.append(episode)
    return episodes


def operations(policy: Policy, episodes: list[Episode], layout: RowLayout) -> float:
    """Arithmetic operations of one forward and backward pass.

    The matrices count for every token, attention for every pair of tokens in a row, the vocabulary
    matrix for sampled tokens. A frozen weight counts like a trained one.
    """
    text = policy.model.config.text_config
    layers = sum(w.numel() for w in policy.model.model.language_model.layers.parameters())
    total = 0.0
    for part in layout.micro_batches(policy, episodes):
        rows, length = layout.pack(policy, [episodes[i] for i in part]).ids.shape
        total += 6 * layers * rows * length
        total += 12 * text.num_hidden_layers * text.hidden_size * rows * length ** 2
    sampled = sum(sum(episode.mask) for episode in episodes)
    return total + 6 * text.hidden_size * text.vocab_size * sampled


class Meter:
    """Measures what runs inside: `seconds`, and on CUDA `peak`, the most memory in GiB.

    On a CPU the seconds are processor time of all threads, so that other programs do not count.
    """

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self.clock = time.perf_counter if self.cuda else time.process_time

    def __enter__(self):
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        self.start = self.clock()
        return self

    def __exit__(self, *error):
        if self.cuda:
            torch.cuda.synchronize()
        self.seconds = self.clock() - self.start
        self.peak = torch.cuda.max_memory_allocated() / 2 ** 30 if self.cuda else None


class Still(Optimizer):
    """SGD with a learning rate of 0: the gradient is clipped and measured, no weight changes."""

    def make(self, lr: float):
        return torch.optim.SGD(self.weights, lr=0.0)


def measure(policy: Policy, episodes: list[Episode], config: Config, layouts: dict[str, RowLayout],
            rounds: int) -> dict[str, dict]:
    """For each layout: median seconds of an update and of the reference's pass, peak GiB of both
    (None on a CPU), and the gradient's norm, which shows that both layouts did the same work."""
    G = config.group_size
    advantages = group_advantages(torch.arange(float(len(episodes))) % G, G)
    optimizer = Still(policy, 0.0, config.max_grad_norm)
    # the vision tower is frozen: it computes each image once, before the clock starts
    policy.keep_features = True
    with torch.no_grad():
        policy.features([image for episode in episodes for image in episode.images])
    seconds = {name: ([], []) for name in layouts}
    results = {name: {} for name in layouts}
    meter = Meter(policy.device)
    for _ in range(rounds + 1):
        for name, (updates, references) in seconds.items():
            with meter:
                stats = update(policy, None, episodes, advantages, config, optimizer=optimizer,
                               layout=layouts[name], generator=torch.Generator())
            done = {"update_gib": meter.peak, "grad_norm": stats["grad_norm"]}
            updates.append(meter.seconds)
            with meter:
                frozen_logp(policy, episodes, config.temperature, layouts[name])
            references.append(meter.seconds)
            results[name] |= done | {"reference_gib": meter.peak}
    for name, (updates, references) in seconds.items():         # the first round is a warm-up
        results[name] |= {"update": statistics.median(updates[1:]),
                          "reference": statistics.median(references[1:])}
    return results


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shape", choices=SHAPES, default=None,
                        help="default: 3b on CUDA, else small")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--groups", type=int, default=None, help="default: 4 on CUDA, else 1")
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=900, help="tokens, the image's included")
    parser.add_argument("--continuation", type=int, default=120, help="tokens")
    parser.add_argument("--side", type=int, default=720,
                        help="pixels of the square image in the prompt")
    parser.add_argument("--micro-batch-tokens", type=int, default=8192)
    parser.add_argument("--checkpointing", choices=("on", "off"), default=None,
                        help="default: on on CUDA, else off")
    parser.add_argument("--threads", type=int, default=1, help="threads of the CPU")


def bench(options: argparse.Namespace) -> None:
    """Measures both layouts and prints a table."""
    torch.set_num_threads(options.threads)
    cuda = options.device != "cpu"
    shape = options.shape or ("3b" if cuda else "small")
    policy = make_policy(shape, options.device, torch.bfloat16 if cuda else torch.float32)
    policy.model.model.visual.requires_grad_(False)
    G, checkpointing = options.group_size, options.checkpointing or ("on" if cuda else "off")
    episodes = make_episodes(policy, options.groups or (4 if cuda else 1), G, options.prompt,
                             options.continuation, 56 if shape == "tiny" else options.side)
    config = Config(group_size=G, inner_epochs=1, minibatches=1, beta=0.0, max_turns=1,
                    max_new_tokens=options.continuation)
    around = weights.checkpointing if checkpointing == "on" else nullcontext
    layouts = {name: layout(options.micro_batch_tokens, around)
               for name, layout in (("rows", RowLayout), ("tree", TreeLayout))}
    print(f"update, shape {shape} on {options.device}, {len(episodes) // G} groups of {G}, "
          f"{options.prompt} + {options.continuation} tokens, checkpointing {checkpointing}")
    results = measure(policy, episodes, config, layouts, options.rounds)
    device = torch.cuda.get_device_name() if cuda else ""
    peak = next((value for key, value in PEAK.items() if key in device), None)
    tokens = sum(len(episode.ids) for episode in episodes)
    for name, result in results.items():
        done = operations(policy, episodes, layouts[name]) / result["update"]
        print(f"  {name}  update {result['update']:8.3f} s  "
              f"{tokens / result['update']:8.0f} tokens/s  {done / 1e12:7.3f} TFLOP/s"
              + (f" = {100 * done / peak:.0f}% of peak" if peak else "")
              + f"  gradient {result['grad_norm']:.5g}  reference {result['reference']:.3f} s"
              + (f"  peak GiB: update {result['update_gib']:.1f}, "
                 f"reference {result['reference_gib']:.1f}" if cuda else ""))
    rows, trees = results["rows"], results["tree"]
    print(f"  rows / tree: update {rows['update'] / trees['update']:.2f}, "
          f"reference {rows['reference'] / trees['reference']:.2f}")


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__,
                                        formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(arguments)
    bench(arguments.parse_args())
