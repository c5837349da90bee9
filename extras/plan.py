"""The plan: what a run will take of a GPU, from options and shapes alone, before any weight is
loaded.

    python arft.py --task mat-coding --model Qwen/Qwen2.5-VL-7B-Instruct --plan

What it teaches: where the memory and the time of such a run go. Memory is a sum over parts
(weights, what the optimiser keeps, keys and values, activations, logits), taken for each phase of a
step; its maximum is the peak. Time is arithmetic over a device's peak rate, or bytes over its
bandwidth, whichever is longer, divided by what such programs reach of it in practice (REACHED).
Memory is counted tensor by tensor; seconds are an estimate.

No reader of the algorithm needs this file. Left out: the memory of CUDA itself (about 1 GB),
fragmentation. All sizes are bytes; GB is 1e9 bytes.
"""

import dataclasses
import functools
import json
import math
from dataclasses import dataclass

import torch
from transformers import AutoConfig, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

import grpo
import rollout
from extras.weights import adapter_config
from policy import LANGUAGE, PATCHES_AT_ONCE, PolicyError

# name: (bf16 operations per second, bytes per second, bytes); vendors' data sheets, dense
DEVICES = {"H200": (989e12, 4.8e12, 141e9), "H100": (989e12, 3.35e12, 80e9),
           "A100": (312e12, 2.04e12, 80e9),
           "L40S": (362e12, 0.86e12, 48e9), "RTX4090": (165e12, 1.01e12, 24e9)}
# shares of the above; plain torch without special kernels
REACHED = {"arithmetic": 0.4, "bandwidth": 0.5}

# What config.json of the published models says, for machines without hub and cache: width, MLP
# width, layers, heads, key-value heads, vocabulary, tied embeddings; MLP width of the vision tower.
PUBLISHED = {"Qwen/Qwen2.5-VL-3B-Instruct": (2048, 11008, 36, 16, 2, 151936, True, 3420),
             "Qwen/Qwen2.5-VL-7B-Instruct": (3584, 18944, 28, 28, 4, 152064, False, 3420),
             "Qwen/Qwen2.5-VL-32B-Instruct": (5120, 27648, 64, 40, 8, 152064, False, 3456),
             "Qwen/Qwen2.5-VL-72B-Instruct": (8192, 29568, 80, 64, 8, 152064, False, 3456)}

# The episode that is planned for: MAT-Coding as it usually goes (problem, code, answer), every turn
# as long as it may be.
# turns; image side in pixels; ids of prompt text and of a reply
TURNS, SIDE, PROMPT_TEXT, REPLY = 3, 720, 260, 24
RESERVE = 1e9                                       # of CUDA itself
PASSAGES = 600                                      # ids of a search result


# --- shapes ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shapes:
    """What memory and time depend on. Counts are numbers of weights."""
    # language model with lm_head, without the embedding where that is a matrix of its own
    text: int
    vision: int
    total: int
    adapters: int        # LoRA's
    largest: int         # the largest single weight
    layers: int
    width: int
    inner: int           # width of the MLP
    heads: int           # width of all query heads together: D
    kv: int              # bytes of one id's keys and values in bfloat16, all layers
    vocabulary: int
    vision_width: int
    vision_inner: int
    merge: int           # patches on each side of an image token
    patch: int           # pixels on each side of a patch


def model_config(name: str) -> Qwen2_5_VLConfig:
    """config.json of a folder or hub model, of an adapter's base, or the published values."""
    adapter = adapter_config(name)
    name = adapter["base_model_name_or_path"] if adapter else name
    if name in PUBLISHED:       # known without the hub
        D, inner, layers, heads, kv_heads, vocabulary, tied, vision_inner = PUBLISHED[name]
        text = {"hidden_size": D, "intermediate_size": inner, "num_hidden_layers": layers,
                "num_attention_heads": heads,
                "num_key_value_heads": kv_heads, "vocab_size": vocabulary,
                "tie_word_embeddings": tied}
        vision = {"depth": 32, "hidden_size": 1280, "intermediate_size": vision_inner,
                  "num_heads": 16, "out_hidden_size": D}
        return Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tied)
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise PolicyError(
            f"cannot read config.json of the model {name}: {str(error).splitlines()[0]}\n"
                          "check that the folder is complete or that the hub can be reached") from error
    if config.model_type != "qwen2_5_vl":
        raise PolicyError(
            f"{name} is a {config.model_type} model; this program is written for qwen2_5_vl")
    return config


@functools.lru_cache(maxsize=4)
def skeleton(settings: str) -> Qwen2_5_VLForConditionalGeneration:
    """The model on the meta device, where a tensor has a shape and no memory."""
    with torch.device("meta"):
        return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig.from_dict(json.loads(settings)))


def shapes_of(config, options) -> Shapes:
    """Exact counts: of the model itself, without memory."""
    model = skeleton(config.to_json_string())
    text, vision = config.text_config, config.vision_config
    # by identity: a tied matrix counts once
    sizes = {id(w): w.numel() for w in model.parameters()}
    tower = sum(w.numel() for w in model.model.visual.parameters())
    embedding = model.get_input_embeddings().weight
    tied = embedding is model.lm_head.weight
    targets = {part.strip() for part in options.lora_targets.split(",")}
    adapters = sum(options.lora_rank * (module.in_features + module.out_features) for name,
                   module in model.named_modules()
                   if name.startswith(LANGUAGE) and isinstance(module, torch.nn.Linear)
                   and name.split(".")[-1] in targets)
    heads = text.num_attention_heads * (text.hidden_size // text.num_attention_heads)
    kv_width = text.num_key_value_heads * (text.hidden_size // text.num_attention_heads)
    return Shapes(
        text=sum(sizes.values()) - tower - (0 if tied else embedding.numel()), vision=tower,
        total=sum(sizes.values()),
        adapters=adapters, largest=max(sizes.values()), layers=text.num_hidden_layers,
        width=text.hidden_size,
        inner=text.intermediate_size, heads=heads, kv=2 * text.num_hidden_layers * kv_width * 2,
        vocabulary=text.vocab_size,
        vision_width=vision.hidden_size, vision_inner=vision.intermediate_size,
        merge=vision.spatial_merge_size,
        patch=vision.patch_size)


@dataclass(frozen=True)
class Lengths:
    """The planned episode in ids."""
    prompt: int
    sampled: int
    observed: int        # all observations
    newest: int          # the longest observation: what is prefilled between two turns
    images: int
    patches: int         # of one image

    @property
    def whole(self) -> int:
        return self.prompt + self.sampled + self.observed


def lengths_of(shape: Shapes, options) -> Lengths:
    turns = min(TURNS, options.max_turns)
    sampled, cell = turns * options.max_new_tokens, shape.merge * shape.patch
    if options.task != "mat-coding":
        observed = (turns - 1) * PASSAGES
        return Lengths(PROMPT_TEXT, sampled, observed, min(observed, PASSAGES), 0, 0)
    # the processor rounds each side to whole image tokens
    tokens = round(SIDE / cell) ** 2
    # turn 1 names the problem, the last one answers
    returned = max(0, turns - 2)
    observed = (turns - 1) * REPLY + returned * tokens
    return Lengths(PROMPT_TEXT + tokens, sampled, observed, REPLY + tokens * bool(returned),
                   1 + returned,
                   tokens * shape.merge ** 2)


# --- memory ---------------------------------------------------------------------------------------


def standing(shape: Shapes, options) -> dict[str, float]:
    """What is in memory in every phase of training."""
    frozen = shape.vision if options.vision == "frozen" else 0
    trained = shape.adapters if options.lora_rank else shape.total - frozen
    parts = {"weights": 2 * shape.total}
    if options.lora_rank:
        parts |= {"adapters": 4 * trained, "moments": 8 * trained}
    else:
        parts |= {"master weights": 4 * trained, "moments": 8 * trained,
                  "reference": 2 * shape.total if options.beta > 0 else 0}
    return parts


def forward_width(shape: Shapes, options) -> int:
    """Bytes that one id takes inside a block without gradient: the widest moment is the MLP's, a
    LoRA layer adds its own output there; norms are computed in float32."""
    return 2 * ((4 if options.lora_rank else 3) * shape.inner + 4 * shape.width) + 8 * shape.width


def saved_width(shape: Shapes, options) -> int:
    """Bytes that one id's activations of one block take until backward: attention's query, keys,
    values (repeated for all heads) and output; the inputs of two linear layers and of two norms (in
    float32, too); four of the MLP's width."""
    norms = 0 if options.lora_rank else 2       # a norm that is trained keeps what it multiplies
    return 2 * (4 * shape.heads + (2 + norms) * shape.width + 4 * shape.inner) + 8 * shape.width


def vision_bytes(shape: Shapes, patches: float) -> float:
    """The vision tower's work on as many patches as it takes at once, and
    the features that it leaves."""
    at_once = min(patches, max(PATCHES_AT_ONCE, 1))
    return at_once * (2 * (3 * shape.vision_inner + 8 * shape.vision_width)
                      + 8 * shape.vision_width)


def rollout_parts(shape: Shapes, options, rows: int, prompts: int) -> dict[str, float]:
    """Sampling `rows` episodes side by side, from `prompts` prompts that are prefilled at once."""
    episode = lengths_of(shape, options)
    at_once = getattr(rollout, "PREFILL_IDS", math.inf)             # ids in one forward pass
    fed = max(min(at_once, prompts * episode.prompt), min(at_once, rows * episode.newest))
    # one layer's keys and values for all query heads
    repeated = 4 * rows * episode.whole * shape.heads
    return {"keys and values": rows * episode.whole * shape.kv,
            "prefill": fed * forward_width(shape, options) + repeated,
            # probabilities and three temporaries
            "logits": rows * shape.vocabulary * 4 * 4,
            "vision": vision_bytes(shape,
                                   episode.patches * max(prompts,
                                                         rows if episode.images > 1 else 0))}


def update_parts(shape: Shapes, options) -> dict[str, float]:
    """Forward and backward of one micro-batch."""
    frozen = shape.vision if options.vision == "frozen" else 0
    trained, width = (shape.adapters, 4) if options.lora_rank else (shape.total - frozen, 2)
    tokens, pairs = micro_batch(shape, options)
    kept = tokens * saved_width(shape, options)
    # the input of each block, and one block in full, with its gradients
    if options.checkpointing == "on":
        activations = shape.layers * tokens * shape.width * 2 + 2 * kept
    else:
        activations = (shape.layers + 1) * kept
    episode = lengths_of(shape, options)
    return {"gradients": trained * width, "activations": activations, "attention mask": 3 * pairs,
            "logits": 5 * logits_at_once(shape, tokens),
            "vision": vision_bytes(shape,
                                   tokens / max(1,
                                                episode.whole) * episode.images * episode.patches)}


def micro_batch(shape: Shapes, options) -> tuple[int, int]:
    """(ids, pairs of ids in attention masks) of one forward pass in the
    update: as many episodes as the limit allows."""
    episode, limit = lengths_of(shape, options), options.micro_batch_tokens
    if options.update == "rows":
        rows = min(max(1, limit // episode.whole), options.samples_per_step * options.group_size)
        return rows * episode.whole, rows * episode.whole ** 2
    tree = episode.prompt + branches(shape, options) * (episode.whole - episode.prompt)
    rows = min(max(1, limit // tree), options.samples_per_step)
    return rows * tree, rows * tree ** 2


def branches(shape: Shapes, options) -> int:
    """How many of a group's episodes share one prompt in a forward pass
    (pack.py cuts a tree that is over the limit)."""
    episode = lengths_of(shape, options)
    return min(options.group_size,
               max(1,
                   (options.micro_batch_tokens - episode.prompt) // (episode.whole - episode.prompt)))


def logits_at_once(shape: Shapes, tokens: int) -> int:
    """Bytes of the largest [ids, vocabulary] tensor of the update."""
    return 4 * min(grpo.AT_ONCE, tokens * shape.vocabulary)


def images_of(shape: Shapes, options) -> int:
    """Image tokens of a step: each prompt's image once, and one of each
    episode for every program."""
    episode = lengths_of(shape, options)
    images = (options.samples_per_step * (1 + options.group_size * (episode.images - 1))
              if episode.images else 0)
    return images * episode.patches // shape.merge ** 2


def phases(shape: Shapes, options) -> dict[str, dict[str, float]]:
    """Every phase of a run with its parts in bytes. The optimiser's step has
    two temporaries of the largest weight."""
    base, groups = standing(shape, options), max(1, options.rollout_batch // options.group_size)
    rows = min(options.rollout_batch, options.samples_per_step * options.group_size)
    step = 0 if options.lora_rank else 8 * shape.largest
    if options.vision == "frozen":      # arft.Trainer keeps them for the whole step
        base = base | {"image features": images_of(shape, options) * 2 * shape.width}
    # before and after training
    alone = {"weights": 2 * shape.total, "adapters": 4 * shape.adapters}
    evaluation = rollout_parts(shape, options, options.eval_batch, options.eval_batch)
    if options.eval_only:
        return {"evaluation": alone | evaluation}
    return {"evaluation": (base if options.eval_every else alone) | evaluation,
            "rollout": base | rollout_parts(shape, options, rows,
                                            min(groups, options.samples_per_step)),
            "update": base | update_parts(shape, options),
            "optimiser": base | {"gradients": update_parts(shape, options)["gradients"],
                                 "temporaries": step}}


def peak(table: dict[str, dict[str, float]]) -> float:
    return max(sum(parts.values()) for parts in table.values())


# --- time -----------------------------------------------------------------------------------------


def seconds(shape: Shapes, options, device: str) -> dict[str, float]:
    """One training step on the device, by phase."""
    operations, bandwidth, _ = DEVICES[device]
    operations, bandwidth = operations * REACHED["arithmetic"], bandwidth * REACHED["bandwidth"]
    episode, episodes = lengths_of(shape, options), options.samples_per_step * options.group_size
    rows = min(options.rollout_batch, episodes)

    def forward(tokens: float, seen: float = episode.whole / 2) -> float:
        """2 operations for each id and weight; 2 x 2 for each id, id that it
        sees, layer and number of the width."""
        return tokens * (2 * shape.text + 4 * shape.layers * shape.width * seen) / operations
    read = 2 * shape.text + rows * (episode.prompt + episode.whole) / 2 * shape.kv
    each = max(read / bandwidth, rows * 2 * shape.text / operations)
    vision = images_of(shape, options) * shape.merge ** 2 * 2 * shape.vision / operations
    ids, pairs = micro_batch(shape, options)
    # a masked pair costs as much as a seen one
    scored = forward(update_tokens(shape, options), pairs / ids)
    # backward: one forward's worth for the activations' gradients, one for the weights'; and one to
    # recompute
    passes = 2 + (not options.lora_rank) + (options.checkpointing == "on")
    states = 0 if options.lora_rank else 28 * (shape.total - shape.vision)
    return {"vision": vision,
            "prefill": forward(options.samples_per_step * episode.prompt
                               + episodes * episode.observed),
            "decode": math.ceil(episodes / rows) * episode.sampled * each,
            "reference": scored * (options.beta > 0),
            "update": options.inner_epochs * scored * passes
            + (options.vision == "trained") * 3 * vision * options.inner_epochs,
            "optimiser": options.inner_epochs * options.minibatches * states / bandwidth}


def update_tokens(shape: Shapes, options) -> int:
    """Ids that one pass over a step's episodes computes."""
    episode, groups = lengths_of(shape, options), options.samples_per_step
    if options.update == "rows":
        return groups * options.group_size * episode.whole
    prompts = math.ceil(options.group_size / branches(shape, options))
    return groups * (prompts * episode.prompt
                     + options.group_size * (episode.whole - episode.prompt))


# --- what is printed ------------------------------------------------------------------------------


def device_name(options) -> str:
    """The device to plan for: the one that is named, the one that is there, else H200."""
    if options.plan_device:
        return options.plan_device
    there = (torch.cuda.get_device_properties(0).name.replace(" ", "") if torch.cuda.is_available()
             else "")
    return next((name for name in DEVICES if name in there), "H200")


def rollout_batch(options) -> int:
    """How many episodes side by side (128, 64, 32, 16 or 8) fit into the
    device's memory, in rollout and evaluation."""
    if torch.cuda.is_available() and not options.plan_device:
        there = torch.cuda.get_device_properties(0).total_memory
    else:
        there = DEVICES[device_name(options)][2]
    shape = shapes_of(model_config(options.model), options)
    for rows in (128, 64, 32, 16, 8):
        changed = dataclasses.replace(options, rollout_batch=rows,
                                      eval_batch=options.eval_batch or rows)
        table = phases(shape, changed)
        if max(sum(table[name].values()) for name in ("rollout", "evaluation")
               if name in table) < 0.95 * there - RESERVE:
            break
    return rows


def gb(size: float) -> str:
    return f"{size / 1e9:7.1f} GB"


def table_of(table: dict[str, dict[str, float]]) -> list[str]:
    """Parts in rows, phases in columns."""
    names = list(dict.fromkeys(name for parts in table.values() for name in parts))
    lines = [" " * 18 + "".join(f"{phase:>13}" for phase in table)]
    for name in names:
        cells = [parts.get(name, 0) for parts in table.values()]
        if max(cells) >= 5e7:
            lines.append(f"{name:18}"
                         + "".join(f"{gb(size) if size >= 5e7 else '-':>13}" for size in cells))
    return [*lines, f"{'sum':18}"
            + "".join(f"{gb(sum(parts.values())):>13}" for parts in table.values())]


def report(options) -> list[str]:
    """--plan: the lines to print."""
    shape, device = shapes_of(model_config(options.model), options), device_name(options)
    episode, table, time = lengths_of(shape, options), phases(shape, options), seconds(shape,
            options, device)
    way = (f"LoRA of rank {options.lora_rank}, {shape.adapters / 1e6:.1f} M weights"
           if options.lora_rank else "all weights")
    lines = [
        f"plan:   {options.model}: {shape.total:,} weights ({shape.vision:,} vision); trained: "
        f"{way}",
        f"step:   {options.samples_per_step} x {options.group_size} episodes of {episode.prompt} "
        f"ids prompt, {episode.sampled} "
        f"sampled, {episode.observed} observed; {episode.images} images of {SIDE} x {SIDE}; "
        f"{options.rollout_batch} side by side",
        "", *table_of(table), "",
        f"peak:   {peak(table) / 1e9:.1f} GB in torch's tensors, and about 1 GB for CUDA; "
        f"{device} has {DEVICES[device][2] / 1e9:.0f} GB",
        f"time:   {sum(time.values()):.0f} s a step on one {device}: "
        + ", ".join(f"{phase} {value:.1f}" for phase, value in time.items() if value >= 0.05),
        f"        (an estimate: {REACHED['arithmetic']:.0%} of peak arithmetic, "
        f"{REACHED['bandwidth']:.0%} of bandwidth; "
        "every turn as long as it may be; without tools)"]
    if peak(table) + RESERVE > DEVICES[device][2]:
        phase = max(table, key=lambda name: sum(table[name].values()))
        lines += ["", f"This does not fit. In the {phase}:", *cures(shape, options, phase)]
    return lines


def beside(options, measured: float) -> str:
    """After the first step on CUDA: what was predicted beside what was
    measured (torch.cuda.max_memory_allocated)."""
    predicted = peak(phases(shapes_of(model_config(options.model), options), options))
    return f"memory: peak {measured / 1e9:.1f} GB; --plan says {predicted / 1e9:.1f} GB"


# --- out of memory --------------------------------------------------------------------------------


def lowered(shape: Shapes, options) -> list[tuple[str, dict]]:
    """Options that take memory, each at a lower setting: (the flag as one
    would type it, the changed fields)."""
    def half(name):
        value = getattr(options, name) // 2
        return f"--{name.replace('_', '-')} {value}", {name: value}
    ways = [half("eval_batch")] if options.eval_batch > 1 else []
    if options.rollout_batch >= 2 * options.group_size:
        ways.append(half("rollout_batch"))
    if micro_batch(shape, options)[0] > lengths_of(shape, options).whole:
        ways.append(half("micro_batch_tokens"))
    if options.checkpointing == "off":
        ways.append(("--checkpointing on", {"checkpointing": "on"}))
    if not options.lora_rank:
        ways.append(("--lora-rank 16", {"lora_rank": 16}))
        ways += [("--beta 0", {"beta": 0.0})] if options.beta > 0 else []
    ways += [half("max_new_tokens")] if options.max_new_tokens > 32 else []
    return ways


def cures(shape: Shapes, options, phase: str) -> list[str]:
    """What to lower and how much the phase would then take less, most first."""
    now, found = sum(phases(shape, options)[phase].values()), []
    for flag, changes in lowered(shape, options):
        changed = dataclasses.replace(options, **changes)
        other = shapes_of(model_config(options.model), changed) if "lora_rank" in changes else shape
        saved = now - sum(phases(other, changed)[phase].values())
        if saved >= 5e7:
            found.append((saved, f"  {flag:25} saves {saved / 1e9:.1f} GB"))
    return [line for _, line in sorted(found,
                                       reverse=True)] or ["  nothing left to lower: take a smaller "
                                                          "model or a larger GPU"]


PHASES = {"update": ("update",), "vision": ("rollout", "evaluation"),
          "prefill": ("rollout", "evaluation"),
          "decode": ("rollout", "evaluation")}          # of rollout.Clock


def out_of_memory(options, error: Exception) -> str:
    """What ends a run that ran out of memory: where, and what to lower.
    `error.phase` is the Clock's phase, if known."""
    where = getattr(error, "phase", None)
    try:
        shape = shapes_of(model_config(options.model), options)
    except PolicyError as reason:
        return (f"the GPU's memory is full ({reason}); lower --rollout-batch, --eval-batch or "
                f"--micro-batch-tokens, or use "
                "--lora-rank 16")
    table = phases(shape, options)
    likely = [name for name in PHASES.get(where, table) if name in table]
    lines = ["the GPU's memory is full" + (f" ({where})" if where else "")
             + ". What to lower, and how much it saves:"]
    for phase in likely:
        lines += [f"{phase}, planned with {gb(sum(table[phase].values())).strip()}:",
                  *cures(shape, options, phase)]
    return "\n".join(lines)
