"""Makes data/tiny: a Qwen2.5-VL of 1.8 million parameters that knows how to act but not what to do.

What it teaches: the cold start that reinforcement learning needs. The model is drawn
at random, learns to read signs, then imitates a *careless* demonstrator on MAT-mini's
training texts: right tags, runnable and varied programs that do what was stated, and
mostly wrong diagnoses, and now and then a slip in the program. He says "none" most often, states
the truth now and then, and otherwise anything. So the likeliest diagnosis is wrong, yet the right
one is in reach: that is what GRPO amplifies. Demonstrations never teach to read an unreadable
image: where the stated repair does not restore the sign, the answer's digits have no weight.

    python -m extras.cold_start            # a quarter of an hour on two cores; writes data/tiny
    python -m extras.cold_start --table    # only measures the table in data/tiny/README.md

Read next: make_tiny_search.py, the same for search; arft.py, which trains the result. Left out:
everything a large model learns before.
"""

import argparse
import io
import json
import math
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import rollout
from data import mini
from data.mat import Sample
from extras.tree import collate
from extras.weights import load, save
from policy import Policy
from rollout import Episode
from tools import parse

HOME = Path(__file__).parent.parent / "data" / "tiny"
# the model sees every image at about 56 x 56: 16 patches, 4 tokens
VIEW = 56
SYSTEM = "Repair the image, then read it."     # short, because the small model pays for every token
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>",
           "<|object_ref_end|>", "<|box_start|>",
           "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>",
           "<|vision_pad|>",
           "<|image_pad|>", "<|video_pad|>")
# how often the demonstrator states the truth, and "none"
TRUTH, NONE = 0.30, 0.50
# how often his program is one of these, or cuts out another box
CARELESS = 0.2
SLIPS = {"rotation90": ("image = image.rotate(90)",), "rotation180": ("image = image.rotate(90)",),
         "dark": ("image = image.point(lambda v: v * 2)",
                  "image = ImageEnhance.Brightness(image).enhance(2)"),
         "overexposure": ("image = image.point(lambda v: 255 - (255 - v) * 2)",),
         "blur": ("image = image.filter(ImageFilter.UnsharpMask(2, 50, 0))",),
         "noise": ("image = image.filter(ImageFilter.MaxFilter(3))",
                   "image = image.filter(ImageFilter.RankFilter(3, 8))")}
THOUGHTS = {
    "problem": ("Look at it first.", "What is wrong here?", "I check the image.",
                "How does it look?"),
    "code": ("This should help.", "I repair it.", "A short program does it."),
    "answer": ("Now I read it.", "I see the number.", "This is what it says."),
}
PROBLEMS = [(p,) for p in (*mini.SINGLES, "crop")] + list(mini.DOUBLES)
DRAWN = [*PROBLEMS, ("crop",), ("crop",)]      # crops come more often: copying a box takes practice
# demonstrations that stop after the diagnosis, which is what is hard
DIAGNOSIS_ONLY = 0.35
# how often a turn is first botched (weight 0), then done properly
BOTCHED = 0.06
FAILURES = (("image = imge.rotate(90)", "NameError: name 'imge' is not defined (line 3)"),
            ("image = image.turn(180)",
             "AttributeError: 'Image' object has no attribute 'turn' (line 3)"))

CHAT_TEMPLATE = (
    "{%- for message in messages -%}{{ '<|im_start|>' + message.role + '\\n' }}"
    "{%- if message.content is string -%}{{ message.content }}{%- else -%}{%- for part in "
    "message.content -%}"
    "{%- if part.type == 'image' -%}<|vision_start|><|image_pad|><|vision_end|>{%- else -%}{{ "
    "part.text }}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}{{ '<|im_end|>\\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}")


# --- the checkpoint's parts -----------------------------------------------------------------------


# Words keep the space or line break before them and digits stand alone: half as many ids as Qwen's
# own splitting, which halves everything the laptop has to compute.
WORDS = r"[\r\n]*</?[a-z]+>|\p{N}|[\r\n]*[^\S\r\n]?[{}'\",]+|[\r\n]*[^\S\r\n]?[^\s\p{N}<{}'\",]+|<|\s*[\r\n]+|\s+"


def make_tokenizer(texts: Iterable[str], words: str = WORDS) -> PreTrainedTokenizerFast:
    """Byte-level BPE over a demonstrator's language, cut at `words`, with
    Qwen2.5-VL's special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(words), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=900,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                                  special_tokens=[], show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False)
                                  for name in SPECIAL])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>",
                                   pad_token="<|endoftext|>",
                                   additional_special_tokens=list(SPECIAL[3:]),
                                   chat_template=CHAT_TEMPLATE)


def _corpus():
    rng = np.random.default_rng(1)
    for _ in range(300):
        for problems in PROBLEMS:
            sample = mini.make_sample(problems, mini.texts("train"), rng)
            yield SYSTEM + "\n" + sample["question"]
            for kind, body in _turn_bodies(problems, sample, rng, careless=rng.random() < CARELESS):
                yield turn_text(kind, body, rng)
    for reply in (rollout.REPLY_PROBLEM, rollout.REPLY_NONE, rollout.REPLY_IMAGE,
                  rollout.REPLY_FAILED,
                  rollout.REPLY_MALFORMED.format(error=parse("<answer>1").error),
                  *(e for _, e in FAILURES), rollout.REPLY_NO_SEARCH, "system\n", "user\n",
                  "assistant\n"):
        yield from [reply] * 50


def make_model(tokenizer) -> Qwen2_5_VLForConditionalGeneration:
    """1.8 million parameters: 3 vision and 3 language layers, 128 wide, drawn at random."""
    ids = tokenizer.convert_tokens_to_ids
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
    config = Qwen2_5_VLConfig(
        text_config=dict(vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384,
                         num_hidden_layers=3,
                         num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=4096,
                         rope_parameters=rope, tie_word_embeddings=True, bos_token_id=None,
                         eos_token_id=ids("<|im_end|>"), pad_token_id=ids("<|endoftext|>")),
        vision_config=dict(depth=3, hidden_size=128, intermediate_size=384, num_heads=4,
                           out_hidden_size=128,
                           patch_size=14, spatial_merge_size=2, temporal_patch_size=1,
                           window_size=112,
                           fullatt_block_indexes=[0, 1, 2]),
        image_token_id=ids("<|image_pad|>"), video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"), vision_end_token_id=ids("<|vision_end|>"),
        tie_word_embeddings=True)
    model = Qwen2_5_VLForConditionalGeneration(config)
    # transformers' 0.02 is too small for so narrow a model
    for name, weight in model.named_parameters():
        if weight.dim() >= 2:
            fan_in = weight[0].numel()
            torch.nn.init.normal_(weight, std=0.02 if "embed_tokens" in name else fan_in ** -0.5)
    return model


def make_policy(texts: Iterable[str], words: str = WORDS, system: str = SYSTEM) -> Policy:
    """The model that will be taught, drawn at random."""
    processor = Qwen2VLImageProcessorPil(patch_size=14, merge_size=2, temporal_patch_size=1,
                                         min_pixels=VIEW * VIEW, max_pixels=VIEW * VIEW)
    tokenizer = make_tokenizer(texts, words)
    return Policy(make_model(tokenizer), tokenizer, processor, system)


# --- the careless demonstrator --------------------------------------------------------------------


def turn_text(kind: str, body: str, rng) -> str:
    return f"<think>{rng.choice(THOUGHTS[kind])}</think>\n<{kind}>{body}</{kind}>"


def _turn_bodies(stated: tuple[str, ...], sample: dict, rng,
                 careless: bool) -> list[tuple[str, str]]:
    bodies = [("problem", "{" + ", ".join(f"'{p}'" for p in stated) + "}")]
    if stated != ("none",):
        box, repairs = (mini.BOXES[rng.integers(4)], SLIPS) if careless else (sample["box"],
                mini.REPAIRS)
        bodies.append(("code", f"\n```python\n{mini.program(stated, box, rng, repairs)}\n```\n"))
    return bodies + [("answer", sample["answer"])]


def stated_problem(truth: tuple[str, ...], rng) -> tuple[str, ...]:
    """What the demonstrator says is wrong with the image."""
    dice = rng.random()
    if dice < TRUTH:
        return truth
    return ("none",) if dice < TRUTH + NONE else PROBLEMS[rng.integers(len(PROBLEMS))]


def run_trusted(code: str, image: Image.Image) -> Image.Image:
    """Runs one of mini.program's own programs in this process (model-written
    code never comes here)."""
    scope = {"Image": Image, "ImageEnhance": ImageEnhance, "ImageFilter": ImageFilter,
             "ImageOps": ImageOps,
             "image": image}
    exec("\n".join(code.split("\n")[2:-1]), scope)      # without the import, open and save lines
    stored = io.BytesIO()
    scope["image"].save(stored, "JPEG")                 # the sandbox's program saves a .jpg, too
    return Image.open(stored).convert("RGB")


@torch.no_grad()
def demonstrate(policy: Policy, rng, read_only: bool) -> tuple[Episode, list[float]]:
    """One demonstration as an Episode and the loss weight of each id.

    read_only: the image is whole already or was rightly repaired, "none" is stated, and only the
    digits count: this teaches reading and nothing about diagnosis.
    """
    truth = DRAWN[rng.integers(len(DRAWN))]
    sample = mini.make_sample(truth, mini.texts("train"), rng)
    view = sample["shown"]
    if read_only:
        if truth != ("none",):
            view = run_trusted(mini.program(truth, sample["box"], rng), view)
        truth = stated = ("none",)
    else:
        stated = stated_problem(truth, rng)
    image = policy.image_input(view)
    episode, weights = Episode(Sample("", sample["question"], (sample["answer"],), None)), []
    grow(policy, episode, weights, policy.prompt_ids(sample["question"], [image]), 0.0, [image])
    careless = rng.random() < CARELESS and stated != ("none",)
    readable = stated == truth and not careless
    for kind, body in _turn_bodies(stated, sample, rng, careless):
        if rng.random() < BOTCHED and not read_only:
            _botch(policy, episode, weights, kind, body, rng)
        ids = [*policy.text_ids(turn_text(kind, body, rng)), policy.im_end]
        grow(policy, episode, weights, ids, 0.0 if read_only else 1.0)
        if kind == "answer":        # the digits: the ids before "</answer>" and the end of the turn
            for k in range(len(body)):
                weights[-3 - k] = 4.0 if readable else 0.0
        elif kind == "problem":
            if not read_only and rng.random() < DIAGNOSIS_ONLY:
                break
            reply, images = (rollout.REPLY_NONE if stated == ("none",
                             ) else rollout.REPLY_PROBLEM), []
            grow(policy, episode, weights, policy.observation_ids(reply, images), 0.0, images)
        else:
            view = run_trusted(body.split("```")[1].removeprefix("python\n").rstrip("\n"), view)
            images = [policy.image_input(view)]
            grow(policy, episode, weights, policy.observation_ids(rollout.REPLY_IMAGE, images), 0.0,
                 images)
    return episode, weights


def _botch(policy, episode, weights, kind, body, rng) -> None:
    """A turn that goes wrong and what comes back, so that the model has seen
    both; it is not taught to write it."""
    if kind == "code" and rng.random() < 0.5:
        line, error = FAILURES[rng.integers(len(FAILURES))]
        lines = body.split("\n")
        text = turn_text(kind, "\n".join([*lines[:4], line, *lines[-3:]]), rng)
        reply = rollout.REPLY_FAILED.format(error=error)
    else:
        text = turn_text(kind, body, rng).removesuffix(f"</{kind}>")
        reply = rollout.REPLY_MALFORMED.format(error=parse(text).error)
    grow(policy, episode, weights, [*policy.text_ids(text), policy.im_end], 0.0)
    grow(policy, episode, weights, policy.observation_ids(reply, []), 0.0)


def grow(policy, episode, weights, ids, weight, images=()):
    episode.append(ids, mask=0, images=list(images), holders=sum(map(policy.image_tokens, images)))
    weights += [weight] * len(ids)


# --- supervised learning --------------------------------------------------------------------------


class Demonstrations(torch.utils.data.IterableDataset):
    """Endless fresh demonstrations, drawn in a process of their own. demonstrate: as the function
    above.

    Yields `batch` demonstrations as two collated batches, the short ones and the long ones, so that
    little is computed on padding; `mask` of a batch holds the loss weight of each id.
    """

    def __init__(self, policy: Policy, demonstrate, batch: int, seed: int, read_only: bool):
        self.policy, self.demonstrate, self.batch, self.seed, self.read_only = policy, demonstrate, batch, seed, read_only

    def __iter__(self):
        torch.set_num_threads(1)
        rng = np.random.default_rng([self.seed, self.read_only])
        while True:
            demos = [self.demonstrate(self.policy, rng, self.read_only or i % 5 == 0)
                     for i in range(self.batch)]
            demos.sort(key=lambda demo: len(demo[0].ids))
            short = sum(len(episode.ids) < 100 for episode, _ in demos)
            yield [self.collated(part) for part in (demos[:short], demos[short:]) if part]

    def collated(self, demos):
        batch = collate(self.policy, [episode for episode, _ in demos])
        length = batch.ids.shape[1]
        batch.mask = torch.tensor([weights + [0.0] * (length - len(weights)) for _,
                                   weights in demos])
        return batch


def make_optimizers(model, lr: float):
    """Muon for the matrices inside the transformer, AdamW for everything
    else (TINY scale: minutes, not hours)."""
    matrices = [w for n, w in model.named_parameters() if w.dim() == 2 and "embed_tokens" not in n]
    rest = [w for n, w in model.named_parameters() if w.dim() != 2 or "embed_tokens" in n]
    return [torch.optim.Muon(matrices, lr=lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.0)]


def train(policy: Policy, demonstrate, steps: int, read_only: bool, seed: int, lr: float = 2e-3,
          batch: int = 64):
    """Weighted next-id prediction on demonstrations; the rate warms up over
    30 steps and falls to a tenth."""
    optimizers = make_optimizers(policy.model, lr)
    demonstrations = Demonstrations(policy, demonstrate, batch, seed, read_only)
    loader = iter(torch.utils.data.DataLoader(demonstrations, batch_size=None, num_workers=1,
                                              prefetch_factor=4))
    start, ema = time.time(), {}
    for step in range(steps):
        rate = lr * min(1, (step + 1) / 30) * (0.1
                                               + 0.9 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.zero_grad()
        demos = next(loader)
        total = sum(demo.mask.sum() for demo in demos)
        losses, hits = zip(*(accumulate(policy, demo, total) for demo in demos))
        torch.nn.utils.clip_grad_norm_(policy.model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        for name, value in {"loss": sum(losses), "digits": torch.cat(hits).mean().item()}.items():
            ema[name] = 0.95 * ema.get(name, value) + 0.05 * value
        if (step + 1) % 25 == 0:
            print(
                f"{'read ' if read_only else 'trace'} {step + 1:4d}/{steps}  loss "
                f"{ema['loss']:.3f}  "
                  f"digits right {ema['digits']:.3f}  {time.time() - start:.0f} s", flush=True)


def accumulate(policy: Policy, demo, total) -> tuple[float, torch.Tensor]:
    """Adds the gradient of a batch, weighted by loss weights / total.
    Returns its loss and, for each digit, a hit."""
    rows, columns = demo.mask.nonzero(as_tuple=True)
    hidden = policy.hidden(demo.ids, demo.positions, demo.attention, policy.features(demo.images))
    logits = policy.model.lm_head(hidden[rows, columns - 1])
    target, weight = demo.ids[rows, columns], demo.mask[rows, columns]
    loss = (torch.nn.functional.cross_entropy(logits, target,
                                              reduction="none") * weight).sum() / total
    loss.backward()
    return loss.item(), (logits.argmax(-1) == target)[weight == 4.0].float()


# --- the table of the README ----------------------------------------------------------------------


@torch.no_grad()
def read_em(policy: Policy, images: list[Image.Image], answers: list[str]) -> float:
    """Share of images that the model reads rightly when it must answer at
    once ("none" was stated for it)."""
    episodes = []
    for view in images:
        image, episode, weights = policy.image_input(view), Episode(Sample("", "", (), None)), []
        grow(policy, episode, weights, policy.prompt_ids(mini.QUESTIONS[0], [image]), 0.0, [image])
        stated = f"<think>{THOUGHTS['problem'][0]}</think>\n<problem>{{'none'}}</problem>"
        ids = [*policy.text_ids(stated), policy.im_end,
               *policy.observation_ids(rollout.REPLY_NONE, []),
               *policy.text_ids(f"<think>{THOUGHTS['answer'][0]}</think>\n<answer>")]
        grow(policy, episode, weights, ids, 0.0)
        episodes.append(episode)
    written = [""] * len(images)
    for _ in range(2):              # two digits, greedily
        batch = collate(policy, episodes)
        hidden = policy.hidden(batch.ids, batch.positions, batch.attention,
                               policy.features(batch.images))
        last = batch.attention.sum(1) - 1
        for i, new in enumerate(policy.log_probs(hidden[torch.arange(len(last)),
                                                        last]).argmax(-1).tolist()):
            written[i] += policy.decode([new])
            episodes[i].append([new], mask=0)
    return float(np.mean([w == a for w, a in zip(written, answers)]))


def measure(policy: Policy, count: int) -> str:
    """The table raw / rightly repaired / wrongly repaired, on held-out texts, as Markdown."""
    rng = np.random.default_rng(7)
    lines = ["| problem | raw | right repair | best wrong repair | which |",
             "|---|---|---|---|---|"]
    for truth in PROBLEMS:
        samples = [mini.make_sample(truth, mini.texts("test"), rng) for _ in range(count)]
        answers = [s["answer"] for s in samples]
        scores = {}
        for stated in PROBLEMS:
            boxes = [s["box"] or mini.BOXES[0] for s in samples]
            views = [s["shown"] if stated == ("none",) else
                     run_trusted(mini.program(stated, box, rng), s["shown"]) for s,
                     box in zip(samples, boxes)]
            scores["+".join(stated)] = read_em(policy, views, answers)
        name = "+".join(truth)
        # wrong: leaves out a part of the right repair (one that adds a part, such as sharpening, is
        # no mistake here)
        wrong = max((k for k in scores if k != "none" and not set(truth) <= set(k.split("+"))),
                    key=scores.get)
        lines.append(
            f"| {name} | {scores['none']:.2f} | {scores[name]:.2f} | {scores[wrong]:.2f} | {wrong} "
            f"|")
    return "\n".join(lines)


README = """\
# data/tiny: the embedded checkpoint

A Qwen2.5-VL of {parameters:,} parameters (3 vision and 3 language layers, 128 wide; images at about
{view} x {view} pixels, 4 tokens each; {ids} ids), an ordinary Hugging Face folder in float32. It
was drawn at random and cold-started on demonstrations by a careless demonstrator
(`extras/cold_start.py` tells the story); it has seen no other data.

    python -m extras.cold_start --seed {seed} --read-steps {read_steps} --trace-steps {trace_steps}

made it from commit {commit} in {minutes:.0f} minutes on two cores. Its scores on MAT-mini's
held-out samples are those "before" training in the project's README. `system_prompt.txt` holds the
words that it was trained with.

## Does the damage hide the number, and does the repair bring it back?

Exact match on {count} signs of each kind with held-out texts, when the model must read the image at
once (`python -m extras.cold_start --table`): as it is; after the right repair; after the best
repair that leaves out a part of the right one. (For `none` nothing can be left out; a harmless
repair does no harm.)

{table}
"""


def write_readme(folder: Path, count: int = 50) -> None:
    """Measures the table and writes the folder's README from it and from training.json."""
    facts = json.loads((folder / "training.json").read_text())
    policy = load(str(folder))
    (folder / "README.md").write_text(README.format(
        parameters=sum(w.numel() for w in policy.model.parameters()), ids=len(policy.tokenizer),
        view=VIEW,
        count=count, table=measure(policy, count), **facts))


def options_of(doc: str, home: Path, read_steps: int, trace_steps: int) -> argparse.Namespace:
    """The command line of this script and of make_tiny_search.py."""
    parser = argparse.ArgumentParser(description=doc.split("\n")[0])
    parser.add_argument("--table", action="store_true",
                        help="only measure again what the folder's README shows")
    parser.add_argument("--out", type=Path, default=home)
    parser.add_argument("--read-steps", type=int, default=read_steps)
    parser.add_argument("--trace-steps", type=int, default=trace_steps)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def cold_start(options: argparse.Namespace, build, demonstrate,
               stored: torch.dtype = torch.float32) -> None:
    """Builds a policy, teaches it and writes the checkpoint; training.json says how it was made."""
    torch.set_flush_denormal(True)      # denormal numbers slow a long run on the CPU down twofold
    # the other core draws; flushing denormals holds for this thread alone
    torch.set_num_threads(1)
    start = time.time()
    torch.manual_seed(options.seed)
    policy = build()
    train(policy, demonstrate, options.read_steps, read_only=True, seed=options.seed)
    train(policy, demonstrate, options.trace_steps, read_only=False, seed=options.seed)
    policy.model.to(stored)
    save(policy, options.out)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True,
                            cwd=HOME.parent).stdout.strip()
    (options.out / "training.json").write_text(json.dumps({
        "seed": options.seed, "read_steps": options.read_steps, "trace_steps": options.trace_steps,
        "commit": commit or "unknown", "minutes": (time.time() - start) / 60}))


def main():
    options = options_of(__doc__, HOME, 200, 550)
    if not options.table:
        cold_start(options, lambda: make_policy(_corpus()), demonstrate)
    write_readme(options.out)
    print(f"{options.out}/README.md")


if __name__ == "__main__":
    main()
