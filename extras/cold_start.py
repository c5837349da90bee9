"""Makes data/tiny: a Qwen2.5-VL of 1.8 million parameters that knows how to act but not what to do.

Reinforcement learning needs a model that already succeeds now and then: a cold start. Here the
weights are drawn at random. The model first learns to read signs. Then it imitates a *careless*
demonstrator on MAT-mini's training texts. He writes the right tags, and varied programs that run
and do what he stated, now and then with a slip. His diagnoses are mostly wrong: most often he says
"none", now and then the truth, and otherwise anything. So the likeliest diagnosis is wrong but the
right one is within reach, and GRPO amplifies it. No demonstration teaches the model to read an
unreadable image: if the stated repair does not restore the sign, the answer's digits have weight 0.

    python -m extras.cold_start            # a quarter of an hour on two cores; writes data/tiny
    python -m extras.cold_start --table    # only measures the table in data/tiny/README.md

cold_start_search.py does the same for search. Left out: everything that a large model has learned
before.
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
from transformers import (PreTrainedTokenizerFast, Qwen2_5_VLConfig,
                          Qwen2_5_VLForConditionalGeneration)
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
VIEW = 56               # the model sees every image at about 56 x 56 pixels: 16 patches, 4 tokens
SYSTEM = "Repair the image, then read it."      # short: every token costs time on a laptop
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>",
           "<|object_ref_end|>", "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>",
           "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")
TRUTH, NONE = 0.30, 0.50        # how often the demonstrator states the truth, and "none"
CARELESS = 0.2          # how often his program has one of these slips, or cuts out another box
SLIPS = {"rotation90": ("image = image.rotate(90)",),
         "rotation180": ("image = image.rotate(90)",),
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
DRAWN = [*PROBLEMS, ("crop",), ("crop",)]   # crops come more often: copying a box takes practice
DIAGNOSIS_ONLY = 0.35   # share of demonstrations that stop after the diagnosis, the hard part
BOTCHED = 0.06          # how often a turn first goes wrong (weight 0) and is then done properly
FAILURES = (("image = imge.rotate(90)", "NameError: name 'imge' is not defined (line 3)"),
            ("image = image.turn(180)",
             "AttributeError: 'Image' object has no attribute 'turn' (line 3)"))

CHAT_TEMPLATE = (
    "{%- for message in messages -%}{{ '<|im_start|>' + message.role + '\\n' }}"
    "{%- if message.content is string -%}{{ message.content }}{%- else -%}"
    "{%- for part in message.content -%}"
    "{%- if part.type == 'image' -%}<|vision_start|><|image_pad|><|vision_end|>"
    "{%- else -%}{{ part.text }}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}{{ '<|im_end|>\\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}")


# --- the checkpoint's parts -----------------------------------------------------------------------


# A word keeps the space or line break before it, and a digit stands alone. This makes half as many
# tokens as Qwen's own splitting and halves everything that the laptop has to compute.
WORDS = (r"[\r\n]*</?[a-z]+>|\p{N}|[\r\n]*[^\S\r\n]?[{}'\",]+|"
         r"[\r\n]*[^\S\r\n]?[^\s\p{N}<{}'\",]+|<|\s*[\r\n]+|\s+")


def make_tokenizer(texts: Iterable[str], words: str = WORDS) -> PreTrainedTokenizerFast:
    """Trains byte-level BPE on a demonstrator's language and adds Qwen2.5-VL's special tokens.

    words: the regular expression that cuts a text into words.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(words), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=900, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=[],
        show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(
        [AddedToken(name, special=True, normalized=False) for name in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL[3:]), chat_template=CHAT_TEMPLATE)


def corpus():
    """Yields the demonstrator's language, on which the tokenizer is trained."""
    rng = np.random.default_rng(1)
    for _ in range(300):
        for problems in PROBLEMS:
            sample = mini.make_sample(problems, mini.texts("train"), rng)
            yield SYSTEM + "\n" + sample["question"]
            careless = rng.random() < CARELESS
            for kind, body in turn_bodies(problems, sample, rng, careless):
                yield turn_text(kind, body, rng)
    malformed = rollout.REPLY_MALFORMED.format(error=parse("<answer>1").error)
    for reply in (rollout.REPLY_PROBLEM, rollout.REPLY_NONE, rollout.REPLY_IMAGE,
                  rollout.REPLY_FAILED, malformed, *(error for _, error in FAILURES),
                  rollout.REPLY_NO_SEARCH, "system\n", "user\n", "assistant\n"):
        yield from [reply] * 50


def make_model(tokenizer) -> Qwen2_5_VLForConditionalGeneration:
    """A model of 1.8 million random weights: 3 vision and 3 language layers, 128 wide."""
    ids = tokenizer.convert_tokens_to_ids
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
    config = Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=3,
            num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=4096,
            rope_parameters=rope, tie_word_embeddings=True, bos_token_id=None,
            eos_token_id=ids("<|im_end|>"), pad_token_id=ids("<|endoftext|>")),
        vision_config=dict(
            depth=3, hidden_size=128, intermediate_size=384, num_heads=4, out_hidden_size=128,
            patch_size=14, spatial_merge_size=2, temporal_patch_size=1, window_size=112,
            fullatt_block_indexes=[0, 1, 2]),
        image_token_id=ids("<|image_pad|>"), video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"), vision_end_token_id=ids("<|vision_end|>"),
        tie_word_embeddings=True)
    model = Qwen2_5_VLForConditionalGeneration(config)
    # transformers' standard deviation of 0.02 is too small for a model as narrow as this one
    for name, weight in model.named_parameters():
        if weight.dim() >= 2:
            fan_in = weight[0].numel()
            torch.nn.init.normal_(weight, std=0.02 if "embed_tokens" in name else fan_in ** -0.5)
    return model


def make_policy(texts: Iterable[str], words: str = WORDS, system: str = SYSTEM) -> Policy:
    """The policy that will be trained: tokenizer, image processor and random weights."""
    processor = Qwen2VLImageProcessorPil(patch_size=14, merge_size=2, temporal_patch_size=1,
                                         min_pixels=VIEW * VIEW, max_pixels=VIEW * VIEW)
    tokenizer = make_tokenizer(texts, words)
    return Policy(make_model(tokenizer), tokenizer, processor, system)


# --- the careless demonstrator --------------------------------------------------------------------


def turn_text(kind: str, body: str, rng) -> str:
    """A turn as the demonstrator writes it: a thought and one action."""
    return f"<think>{rng.choice(THOUGHTS[kind])}</think>\n<{kind}>{body}</{kind}>"


def turn_bodies(stated: tuple[str, ...], sample: dict, rng,
                careless: bool) -> list[tuple[str, str]]:
    """The actions of a demonstration, as (kind, what stands between the tags).

    stated: the problems that the demonstrator states; careless: his program has a slip.
    """
    bodies = [("problem", "{" + ", ".join(f"'{p}'" for p in stated) + "}")]
    if stated != ("none",):
        box = mini.BOXES[rng.integers(4)] if careless else sample["box"]
        repairs = SLIPS if careless else mini.REPAIRS
        bodies.append(("code", f"\n```python\n{mini.program(stated, box, rng, repairs)}\n```\n"))
    return bodies + [("answer", sample["answer"])]


def stated_problem(truth: tuple[str, ...], rng) -> tuple[str, ...]:
    """The problems that the demonstrator states, given the true ones."""
    dice = rng.random()
    if dice < TRUTH:
        return truth
    return ("none",) if dice < TRUTH + NONE else PROBLEMS[rng.integers(len(PROBLEMS))]


def run_trusted(code: str, image: Image.Image) -> Image.Image:
    """Runs a program of mini.program in this process. Code that a model wrote never comes here."""
    scope = {"Image": Image, "ImageEnhance": ImageEnhance, "ImageFilter": ImageFilter,
             "ImageOps": ImageOps, "image": image}
    exec("\n".join(code.split("\n")[2:-1]), scope)      # without the import, open and save lines
    stored = io.BytesIO()
    scope["image"].save(stored, "JPEG")                 # a program in the sandbox saves a .jpg, too
    return Image.open(stored).convert("RGB")


@torch.no_grad()
def demonstrate(policy: Policy, rng, read_only: bool) -> tuple[Episode, list[float]]:
    """One demonstration, as an Episode and the loss weight of each of its tokens.

    read_only: the image is undamaged or was repaired correctly, the demonstrator states "none", and
    only the digits have weight. This teaches reading, and nothing about diagnosis.
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
    for kind, body in turn_bodies(stated, sample, rng, careless):
        add_turn(policy, episode, weights, kind, body, rng, read_only)
        if kind == "answer":        # the digits stand before "</answer>" and the end of the turn
            for k in range(len(body)):
                weights[-3 - k] = 4.0 if readable else 0.0
        elif kind == "problem" and not read_only and rng.random() < DIAGNOSIS_ONLY:
            break
        else:
            view = add_reply(policy, episode, weights, kind, body, view)
    return episode, weights


def add_turn(policy, episode, weights, kind, body, rng, read_only) -> None:
    """Adds a turn. Sometimes it goes wrong first, and the demonstrator does it a second time."""
    if rng.random() < BOTCHED and not read_only:
        botch(policy, episode, weights, kind, body, rng)
    ids = [*policy.text_ids(turn_text(kind, body, rng)), policy.im_end]
    grow(policy, episode, weights, ids, 0.0 if read_only else 1.0)


def add_reply(policy, episode, weights, kind, body, view) -> Image.Image:
    """Adds what follows a diagnosis or a program. Returns the image as it is then."""
    images = []
    if kind == "code":
        view = run_trusted(body.split("```")[1].removeprefix("python\n").rstrip("\n"), view)
        reply, images = rollout.REPLY_IMAGE, [policy.image_input(view)]
    else:
        reply = rollout.REPLY_NONE if body == "{'none'}" else rollout.REPLY_PROBLEM
    grow(policy, episode, weights, policy.observation_ids(reply, images), 0.0, images)
    return view


def botch(policy, episode, weights, kind, body, rng) -> None:
    """Adds a turn that goes wrong and the reply to it, with weight 0.

    The model sees such turns, but it is not taught to write them.
    """
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


def grow(policy, episode, weights, ids, weight, images=()) -> None:
    """Appends ids to the episode, all with the same loss weight."""
    episode.append(ids, mask=0, images=list(images), holders=sum(map(policy.image_tokens, images)))
    weights += [weight] * len(ids)


# --- supervised learning --------------------------------------------------------------------------


class Demonstrations(torch.utils.data.IterableDataset):
    """Endless new demonstrations, drawn in a process of their own.

    demonstrate: a function like the one above. Each item is `batch` demonstrations, collated as two
    batches, the short ones and the long ones, so that there is little padding to compute. The
    `mask` of a batch holds the loss weight of each token.
    """

    def __init__(self, policy: Policy, demonstrate, batch: int, seed: int, read_only: bool):
        self.policy, self.demonstrate = policy, demonstrate
        self.batch, self.seed, self.read_only = batch, seed, read_only

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
        batch.mask = torch.tensor(
            [weights + [0.0] * (length - len(weights)) for _, weights in demos])
        return batch


def make_optimizers(model, lr: float):
    """Muon for the matrices inside the transformer, AdamW for everything else.

    With them the cold start takes minutes and not hours.
    """
    matrices = [w for n, w in model.named_parameters() if w.dim() == 2 and "embed_tokens" not in n]
    rest = [w for n, w in model.named_parameters() if w.dim() != 2 or "embed_tokens" in n]
    return [torch.optim.Muon(matrices, lr=lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.0)]


def train(policy: Policy, demonstrate, steps: int, read_only: bool, seed: int, lr: float = 2e-3,
          batch: int = 64):
    """Trains weighted next-token prediction on demonstrations.

    The learning rate warms up over 30 steps and then falls to a tenth.
    """
    optimizers = make_optimizers(policy.model, lr)
    demonstrations = Demonstrations(policy, demonstrate, batch, seed, read_only)
    loader = iter(torch.utils.data.DataLoader(demonstrations, batch_size=None, num_workers=1,
                                              prefetch_factor=4))
    start, ema = time.time(), {}
    for step in range(steps):
        decay = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * step / steps))
        rate = lr * min(1, (step + 1) / 30) * decay
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.zero_grad()
        demos = next(loader)
        total = sum(demo.mask.sum() for demo in demos)
        done = [accumulate(policy, demo, total) for demo in demos]
        torch.nn.utils.clip_grad_norm_(policy.model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        values = {"loss": sum(loss for loss, _ in done),
                  "digits": torch.cat([hits for _, hits in done]).mean().item()}
        for name, value in values.items():
            ema[name] = 0.95 * ema.get(name, value) + 0.05 * value
        if (step + 1) % 25 == 0:
            print(f"{'read ' if read_only else 'trace'} {step + 1:4d}/{steps}  "
                  f"loss {ema['loss']:.3f}  digits right {ema['digits']:.3f}  "
                  f"{time.time() - start:.0f} s", flush=True)


def accumulate(policy: Policy, demo, total) -> tuple[float, torch.Tensor]:
    """Adds a batch's gradient, each token with its loss weight / total.

    Returns the batch's loss and, for each digit, 1.0 if the model predicts it, else 0.0.
    """
    rows, columns = demo.mask.nonzero(as_tuple=True)
    hidden = policy.hidden(demo.ids, demo.positions, demo.attention, policy.features(demo.images))
    logits = policy.model.lm_head(hidden[rows, columns - 1])
    target, weight = demo.ids[rows, columns], demo.mask[rows, columns]
    losses = torch.nn.functional.cross_entropy(logits, target, reduction="none")
    loss = (losses * weight).sum() / total
    loss.backward()
    return loss.item(), (logits.argmax(-1) == target)[weight == 4.0].float()


# --- the table of the README ----------------------------------------------------------------------


@torch.no_grad()
def read_em(policy: Policy, images: list[Image.Image], answers: list[str]) -> float:
    """Share of images that the model reads correctly if it must answer at once.

    Its first turn is written for it and states "none".
    """
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
        log_probs = policy.log_probs(hidden[torch.arange(len(last)), last])
        for i, new in enumerate(log_probs.argmax(-1).tolist()):
            written[i] += policy.decode([new])
            episodes[i].append([new], mask=0)
    return float(np.mean([w == a for w, a in zip(written, answers, strict=True)]))


def measure(policy: Policy, count: int) -> str:
    """The README's table on held-out texts, as Markdown: images as they are and as repaired."""
    rng = np.random.default_rng(7)
    lines = ["| problem | raw | right repair | best wrong repair | which |",
             "|---|---|---|---|---|"]
    for truth in PROBLEMS:
        samples = [mini.make_sample(truth, mini.texts("test"), rng) for _ in range(count)]
        answers = [s["answer"] for s in samples]
        scores = {}
        for stated in PROBLEMS:
            views = [repaired(sample, stated, rng) for sample in samples]
            scores["+".join(stated)] = read_em(policy, views, answers)
        name = "+".join(truth)
        # A wrong repair leaves out a part of the right one. Adding one, such as sharpening, is no
        # mistake here.
        wrong = max((k for k in scores if k != "none" and not set(truth) <= set(k.split("+"))),
                    key=scores.get)
        lines.append(f"| {name} | {scores['none']:.2f} | {scores[name]:.2f} "
                     f"| {scores[wrong]:.2f} | {wrong} |")
    return "\n".join(lines)


def repaired(sample: dict, stated: tuple[str, ...], rng) -> Image.Image:
    """The sample's image after the repair of the stated problems."""
    if stated == ("none",):
        return sample["shown"]
    box = sample["box"] or mini.BOXES[0]
    return run_trusted(mini.program(stated, box, rng), sample["shown"])


README = """\
# data/tiny: the embedded checkpoint

This is an ordinary Hugging Face folder in float32. It holds a Qwen2.5-VL of {parameters:,}
parameters: 3 vision and 3 language layers, 128 wide. The model sees an image at about {view} x
{view} pixels, which makes 4 tokens, and its vocabulary has {ids} tokens. Its weights were drawn at
random and then trained on demonstrations by a careless demonstrator (`extras/cold_start.py` tells
the story). It has seen no other data. This command made it, at commit {commit}, in {minutes:.0f}
minutes on two cores:

    python -m extras.cold_start --seed {seed} --read-steps {read_steps} --trace-steps {trace_steps}

Its scores on MAT-mini's held-out samples are those "before" training in the project's README.
`system_prompt.txt` holds the system prompt that it was trained with.

## Does the damage hide the number, and does the repair bring it back?

The table shows exact match on {count} signs of each kind with held-out texts, when the model must
read the image at once: as it is, after the right repair, and after the best repair that leaves out
a part of the right one. For `none` nothing can be left out, and the best needless repair does no
harm. `python -m extras.cold_start --table` measures it.

{table}
"""


def write_readme(folder: Path, count: int = 50) -> None:
    """Measures the table and writes the folder's README from it and from training.json."""
    facts = json.loads((folder / "training.json").read_text())
    policy = load(str(folder))
    (folder / "README.md").write_text(README.format(
        parameters=sum(w.numel() for w in policy.model.parameters()), ids=len(policy.tokenizer),
        view=VIEW, count=count, table=measure(policy, count), **facts))


def options_of(doc: str, home: Path, read_steps: int, trace_steps: int) -> argparse.Namespace:
    """The command line of this program and of cold_start_search.py."""
    parser = argparse.ArgumentParser(description=doc.split("\n")[0])
    parser.add_argument("--table", action="store_true",
                        help="train nothing, only write the folder's README again")
    parser.add_argument("--out", type=Path, default=home)
    parser.add_argument("--read-steps", type=int, default=read_steps)
    parser.add_argument("--trace-steps", type=int, default=trace_steps)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def cold_start(options: argparse.Namespace, build, demonstrate,
               stored: torch.dtype = torch.float32) -> None:
    """Builds a policy, trains it and writes the checkpoint. training.json says how it was made.

    stored: the type of the weights in the file.
    """
    torch.set_flush_denormal(True)      # denormal numbers make a long run on a CPU twice as slow
    # one thread: flushing denormals holds only for this one, and the other core draws
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
        cold_start(options, lambda: make_policy(corpus()), demonstrate)
    write_readme(options.out)
    print(f"{options.out}/README.md")


if __name__ == "__main__":
    main()
