"""Measures a training step's parts at the published shapes, with random weights and episodes of a
fixed size.

    python tests/measure/bench_gpu.py                                  3B on the GPU: 16 samples x 8 episodes x 3 turns x 256 ids
    python tests/measure/bench_gpu.py --shape 7b
    python tests/measure/bench_gpu.py --device cpu --shape small       the same on any machine, smaller; look at the ratios

An episode here is what a MAT-Coding episode is: a prompt with a photograph, a turn, a line of text,
a turn, an image, a last turn. No row ends a turn early, so that every way of sampling has the same
work. It prints

    rollout    this program's way: each prompt prefilled once for its group, one cache through all turns, a CUDA graph
    no graph   the same with --cuda-graph off
    generate   transformers' generate for each turn, which prefills the conversation again for every row
    update     one optimiser step on these episodes; rows against tree as tests/measure/bench_update.py measures it

Percent of the bandwidth limit: a step of decoding must read the language model's weights and every
key and value once; the limit is that many bytes at the speed of a plain copy on this machine.
"""

import argparse
import sys
import time
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import numpy as np
import torch
from PIL import Image

import grpo
from bench_shapes import SHAPES, make_policy
from rollout import Clock, Episode, Limits, Rows, decode_turn

MAT_ITEMS = 200


class Meter(Clock):
    """A Clock that also keeps each phase's peak of a GPU's memory."""

    def __init__(self, device: str):
        super().__init__()
        self.device, self.peak = device, {}

    def run(self, phase: str, function, *arguments):
        """function(*arguments), measured as part of a phase."""
        if self.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        with self.phase(phase):
            result = function(*arguments)
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
    """One episode for each sample that holds its prompt."""
    prompts = []
    for seed in range(args.samples):
        images = [photograph(policy, args.side, seed)]
        prompt = Episode(sample=None)
        prompt.append(policy.prompt_ids("What is written on the sign?", images), 0, images=images,
                      holders=policy.image_tokens(images[0]))
        prompts.append(prompt)
    return prompts


def observations(policy, args) -> list[list]:
    """Before each later turn, for each row: (ids, images). A line of text,
    then images of each row's own."""
    rows = args.samples * args.group
    made = [[(policy.observation_ids("Write the code that repairs it.", []), [])
             for _ in range(rows)]]
    shown = [[photograph(policy, args.side, 1000 + row)] for row in range(rows)]
    made += [[(policy.observation_ids("This is the image now.", images), images)
              for images in shown]
             for _ in range(args.turns - 2)]
    return made[:args.turns - 1]


@torch.inference_mode()
def sample_ours(policy, prompts, replies, args, meter, graph: str) -> list[Episode]:
    """What rollout.rollout does, with turns of a fixed length and replies that wait."""
    limits = Limits(1.0, args.tokens, args.turns, cuda_graph=graph == "on")
    generator = torch.Generator(policy.device).manual_seed(0)
    rows = Rows(policy, limits)
    features = meter.run("vision", policy.features,
                         [image for prompt in prompts for image in prompt.images])
    where = [policy.positions(prompt.ids, prompt.images) for prompt in prompts]
    meter.run("prefill", rows.feed, [prompt.ids for prompt in prompts], where, features)
    meter.run("prefill", rows.repeat, args.group)
    episodes = [Episode(None, list(p.ids), list(p.mask), list(p.logp), list(p.images))
                for p in prompts for _ in range(args.group)]
    for turn in range(args.turns):
        written = meter.run("decode", decode_turn, rows, limits, generator)
        for episode, (ids, logp) in zip(episodes, written):
            episode.append(ids, 1, logp)
        if turn < args.turns - 1:
            feed_replies(policy, rows, episodes, replies[turn], meter)
    return episodes


def feed_replies(policy, rows, episodes, replies, meter) -> None:
    pieces = [[episode.ids[-1], *ids] for episode, (ids, _) in zip(episodes, replies)]
    for episode, (ids, images) in zip(episodes, replies):
        episode.append(ids, 0, images=images, holders=sum(map(policy.image_tokens, images)))
    features = meter.run("vision of replies", policy.features,
                         [image for _, images in replies for image in images])
    where = [policy.positions(e.ids, e.images)[:, -len(piece):] for e,
             piece in zip(episodes, pieces)]
    meter.run("prefill of replies", rows.keep, list(range(len(episodes))))
    meter.run("prefill of replies", rows.feed, pieces, where, features)


@torch.inference_mode()
def sample_by_generate(policy, prompts, replies, args) -> None:
    """Turn by turn with `generate`: every row brings its whole conversation
    and all its images each time."""
    # stands for what was sampled, which might be a place holder
    word = policy.text_ids("a")[0]
    rows = [(list(prompt.ids), list(prompt.images)) for prompt in prompts
            for _ in range(args.group)]
    for turn in range(args.turns):
        # all of one length
        ids = torch.tensor([ids for ids, _ in rows], device=policy.device)
        images = [image for _, shown in rows for image in shown]
        policy.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids),
            mm_token_type_ids=(ids == policy.image_pad).int(),
            pixel_values=torch.cat([image.patches for image in images]).to(policy.device,
                policy.model.dtype),
            image_grid_thw=torch.tensor([image.grid for image in images], device=policy.device),
            do_sample=True, top_k=0, min_new_tokens=args.tokens, max_new_tokens=args.tokens,
            pad_token_id=policy.im_end)
        if turn < args.turns - 1:
            rows = [(ids + [word] * args.tokens + more, shown + images)
                    for (ids, shown), (more, images) in zip(rows, replies[turn])]


def train(policy, episodes, args) -> None:
    """One optimiser step with the program's own options on a GPU, without a reference."""
    config = SimpleNamespace(
        inner_epochs=1, minibatches=1, micro_batch=args.micro_batch,
        micro_batch_tokens=args.micro_batch_tokens, beta=0.0,
        update="tree", checkpointing="on" if args.device == "cuda" else "off", temperature=1.0,
        loss_type="grpo",
        clip_low=0.2, clip_high=0.2, max_sampled=args.turns * args.tokens, max_grad_norm=1.0)
    policy.model.model.visual.requires_grad_(False)
    trained = [weight for weight in policy.model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-6)
    advantages = torch.tensor([1.0, -1.0] * (len(episodes) // 2) + [0.0] * (len(episodes) % 2))
    grpo.update(policy, None, episodes, advantages, optimizer, config,
                torch.Generator(policy.device))


def copy_speed(device: str) -> float:
    """Bytes a second of a plain copy, read and written."""
    source = torch.ones(2**28 if device == "cuda" else 2**25, dtype=torch.float32, device=device)
    target, best = torch.empty_like(source), 0.0
    for _ in range(5):
        meter = Meter(device)
        meter.run("copy", target.copy_, source)
        best = max(best, 2 * source.nbytes / meter.seconds["copy"])
    return best


def decode_limit(policy, args, length: float) -> float:
    """Least seconds that decoding can take: bytes that must be read / speed of
    a copy. length: a row's ids, on average."""
    text, config = policy.model.model.language_model, policy.model.config.text_config
    weights = sum(weight.nbytes
                  for weight in text.layers.parameters()) + policy.model.lm_head.weight.nbytes
    size = config.hidden_size // config.num_attention_heads * config.num_key_value_heads
    of_an_id = 2 * config.num_hidden_layers * size * policy.model.lm_head.weight.element_size()
    steps = args.turns * args.tokens
    return steps * (weights + args.samples * args.group * length * of_an_id) / copy_speed(
        args.device)


def report(policy, args) -> None:
    rows, sampled = args.samples * args.group, args.samples * args.group * args.turns * args.tokens
    prompts, replies = make_prompts(policy, args), observations(policy, args)
    policy.barred[policy.im_end] = True         # no turn ends early
    # for `generate`: data/tiny's tokenizer in the published shapes
    policy.model.config.image_token_id = policy.image_pad
    ours, plain = Meter(args.device), Meter(args.device)
    episodes = sample_ours(policy, prompts, replies, args, ours, "on")
    total = sum(ours.seconds.values())
    print(
        f"rollout: {rows} episodes of {len(episodes[0].ids)} ids, {sampled} sampled, prompts of "
        f"{len(prompts[0].ids)}; "
          f"{total:.2f} s")
    print("\n".join(ours.lines()))
    fed, halfway = sum(len(prompt.ids) for prompt in prompts), (len(prompts[0].ids)
                                                                + len(episodes[0].ids)) / 2
    print(f"  prefill {fed / ours.seconds['prefill']:.0f} ids a second, "
          f"decode {sampled / ours.seconds['decode']:.0f} ids a second, "
          f"{100 * decode_limit(policy, args, halfway) / ours.seconds['decode']:.0f} percent of "
          f"the bandwidth limit")
    if args.device == "cuda":
        sample_ours(policy, prompts, replies, args, plain, "off")
        print(
            f"no graph: decode {plain.seconds['decode'] / ours.seconds['decode']:.2f} times as long")
    theirs = Meter(args.device)
    if args.generate == "on":
        theirs.run("generate", sample_by_generate, policy, prompts, replies, args)
        print("\n".join(["generate: the same episodes", *theirs.lines(),
                         f"  {theirs.seconds['generate'] / total:.2f} times as long as the rollout"]))
    policy.barred[policy.im_end] = False
    after = Meter(args.device)
    after.run("update", train, policy, episodes, args)
    print("\n".join(["update", *after.lines(),
                     f"whole step: {total + after.seconds['update']:.1f} s"]))
    once = ours.seconds["vision"] + ours.seconds["prefill"]
    minutes = (once * MAT_ITEMS / args.samples + (total - once) * MAT_ITEMS / rows) / 60
    print(
        f"MAT-Coding, {MAT_ITEMS} items, greedy: {minutes:.1f} minutes (prompts and turns above, "
        f"scaled; without tools)")


def compare_updates(args) -> None:
    """Rows against tree."""
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
                                   "tokens": (24, 256),
                                   "side": (336, 720), "micro_batch": (4, 2),
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
    print(
        f"{args.shape} on "
        f"{torch.cuda.get_device_name() if args.device == 'cuda' else 'cpu, one thread'}, "
          f"{sum(weight.numel() for weight in policy.model.parameters()) / 1e6:.0f} M weights, "
          f"{policy.model.dtype}, torch {torch.__version__}, made in "
          f"{time.perf_counter() - start:.0f} s")
    report(policy, args)
    if args.updates == "on":
        compare_updates(args)


if __name__ == "__main__":
    main()
