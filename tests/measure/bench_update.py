"""What the packed tree is worth: one update of the same episodes, row by row and as trees, in the
same minute.

    python tests/measure/bench_update.py --device cpu                         the small shape, anywhere
    python tests/measure/bench_update.py --device cuda --shape 3b             random weights of the published shape, bfloat16

Groups of equally long episodes with an image in the prompt, random ids, random weights
(bench_shapes.py). Rounds go through the layouts in turn, so that a busy machine is busy for both;
the median is printed; on a CPU the seconds are those of the processor. The optimiser is plain SGD
with rate 0: what AdamW costs is the same for both, and the weights stay as they are. "ids/s" counts
the ids of the episodes as they are, prompts again and again; arithmetic is that of the ids which
went through the model, forward and backward (6 operations for each weight and id, and attention's),
not what checkpointing computes again. Equal gradients (their norms) say that both did the same
work.

tests/measure/bench_gpu.py prints the same as its part "update".
"""

import argparse
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from PIL import Image

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]
from bench_shapes import SHAPES, make_policy
from grpo import frozen_logp, group_advantages, update
from extras.tree import micro_batches, pack
from policy import Policy
from rollout import Episode

# bf16, dense, published
PEAK = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12}


def make_episodes(policy: Policy, groups: int, group_size: int, prompt: int, continuation: int,
                  side: int):
    """Groups of episodes with `prompt` ids, an image of side x side pixels
    among them, and a turn of `continuation`."""
    generator = torch.Generator().manual_seed(0)
    allowed = (~policy.barred.cpu()).nonzero()[:, 0]

    def words(count):
        return allowed[torch.randint(len(allowed), (count,), generator=generator)].tolist()

    episodes = []
    for _ in range(groups):
        image = policy.image_input(Image.effect_noise((side, side), 60).convert("RGB"))
        ids = [policy.vision_start, *[policy.image_pad] * policy.image_tokens(image),
               policy.vision_end]
        if len(ids) > prompt:
            raise SystemExit(
                f"--prompt {prompt}: the image alone takes {len(ids)} ids; lower --side {side}")
        ids += words(prompt - len(ids))
        for _ in range(group_size):
            episode = Episode(None)
            episode.append(list(ids), mask=0, images=[image], holders=policy.image_tokens(image))
            # about 1 / 719 each
            episode.append(words(continuation), mask=1, logp=[-6.6] * continuation)
            episodes.append(episode)
    return episodes


def operations(policy: Policy, episodes: list[Episode], layout: str, limit: int) -> float:
    """Arithmetic of one forward and backward pass: matrices for every id, attention for every pair
    that meets in a row, the vocabulary matrix for sampled ids. A frozen or an unfrozen weight
    counts the same."""
    text = policy.model.config.text_config
    layers = sum(w.numel() for w in policy.model.model.language_model.layers.parameters())
    total = 0.0
    for part in micro_batches(policy, episodes, limit, layout):
        rows, length = pack(policy, [episodes[i] for i in part], layout).ids.shape
        total += 6 * layers * rows * length + 12 * text.num_hidden_layers * text.hidden_size * rows * length ** 2
    sampled = sum(sum(episode.mask) for episode in episodes)
    return total + 6 * text.hidden_size * text.vocab_size * sampled


class Meter:
    """Of what ran inside last: `seconds`, and on CUDA `peak`, the most memory in GiB. On a CPU the
    seconds are those of the processor in all threads, so that other programs do not count."""

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


def measure(policy: Policy, episodes: list[Episode], group_size: int, config,
            rounds: int) -> dict[str, dict]:
    """For each layout: median seconds of an update and of the reference's pass, peak GiB of both
    (None on a CPU), and the gradient's norm, by which a reader sees that both did the same work."""
    advantages = group_advantages(torch.arange(float(len(episodes))) % group_size, group_size)
    optimizer = torch.optim.SGD([w for w in policy.model.parameters() if w.requires_grad], lr=0.0)
    # the tower is frozen: each image once, before the clock
    policy.keep_features = True
    with torch.no_grad():
        policy.features([image for episode in episodes for image in episode.images])
    seconds = {layout: ([], []) for layout in ("rows", "tree")}
    results = {layout: {} for layout in seconds}
    meter = Meter(policy.device)
    for turn in range(rounds + 1):
        for layout, (updates, references) in seconds.items():
            config.update = layout
            with meter:
                stats = update(policy, None, episodes, advantages, optimizer, config,
                               torch.Generator())
            done = {"update_gib": meter.peak, "grad_norm": stats["grad_norm"]}
            updates.append(meter.seconds)
            with meter:
                frozen_logp(policy, episodes, config)
            references.append(meter.seconds)
            results[layout] |= done | {"reference_gib": meter.peak}
    for layout, (updates, references) in seconds.items():       # the first round warms up
        results[layout] |= {"update": statistics.median(updates[1:]),
                            "reference": statistics.median(references[1:])}
    return results


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shape", choices=SHAPES, default=None,
                        help="default: 3b on CUDA, else small")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--groups", type=int, default=None, help="default: 4 on CUDA, else 1")
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=900, help="ids, the image's included")
    parser.add_argument("--continuation", type=int, default=120, help="ids")
    parser.add_argument("--side", type=int, default=720,
                        help="pixels of the square image in the prompt")
    parser.add_argument("--micro-batch-tokens", type=int, default=8192)
    parser.add_argument("--checkpointing", choices=("on", "off"), default=None,
                        help="default: on on CUDA, else off")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")


def bench(options: argparse.Namespace) -> None:
    """Prints one table."""
    torch.set_num_threads(options.threads)
    cuda = options.device != "cpu"
    shape = options.shape or ("3b" if cuda else "small")
    policy = make_policy(shape, options.device, torch.bfloat16 if cuda else torch.float32)
    policy.model.model.visual.requires_grad_(False)
    G = options.group_size
    episodes = make_episodes(policy, options.groups or (4 if cuda else 1), G, options.prompt,
                             options.continuation,
                             56 if shape == "tiny" else options.side)
    config = SimpleNamespace(
        inner_epochs=1, minibatches=1, micro_batch_tokens=options.micro_batch_tokens,
        temperature=1.0, loss_type="grpo",
        checkpointing=options.checkpointing or ("on" if cuda else "off"), clip_low=0.2,
        clip_high=0.2, beta=0.0,
        max_sampled=options.continuation, max_grad_norm=1.0)
    print(
        f"update, shape {shape} on {options.device}, {len(episodes) // G} groups of {G}, "
        f"{options.prompt} + "
          f"{options.continuation} ids, checkpointing {config.checkpointing}")
    results = measure(policy, episodes, G, config, options.rounds)
    name = torch.cuda.get_device_name() if cuda else ""
    peak = next((value for key, value in PEAK.items() if key in name), None)
    ids = sum(len(episode.ids) for episode in episodes)
    for layout, result in results.items():
        done = operations(policy, episodes, layout, config.micro_batch_tokens) / result["update"]
        print(f"  {layout}  update {result['update']:8.3f} s  {ids / result['update']:8.0f} ids/s  "
              f"{done / 1e12:7.3f} TFLOP/s"
              + (f" = {100 * done / peak:.0f}% of peak" if peak else "")
              + f"  gradient {result['grad_norm']:.5g}  reference {result['reference']:.3f} s"
              + (f"  peak GiB: update {result['update_gib']:.1f}, reference "
                 f"{result['reference_gib']:.1f}"
                 if cuda else ""))
    rows, trees = results["rows"], results["tree"]
    print(f"  rows / tree: update {rows['update'] / trees['update']:.2f}, "
          f"reference {rows['reference'] / trees['reference']:.2f}")


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__,
                                        formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(arguments)
    bench(arguments.parse_args())
