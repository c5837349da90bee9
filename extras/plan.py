"""The plan: how much GPU memory a run will take, from its options and the model's shapes alone,
before any weight is loaded.

    python arft.py --task mat-coding --model Qwen/Qwen2.5-VL-7B-Instruct --plan

What it teaches: where the memory of such a run goes. Memory is a sum over parts (weights, what the
optimiser keeps, keys and values, activations, logits) in each phase of a step, and the largest sum
is the peak. The parts are counted tensor by tensor; tests/test_plan.py compares the counts with
tensors that were really made.

`options` is the run's configuration: a dataclass with the fields
    model, task, plan_device
    samples_per_step, group_size, max_turns, max_new_tokens, rollout_batch
    eval_only, eval_every, eval_batch
    vision, lora_rank, beta, update, micro_batch_tokens, checkpointing

You can read the algorithm without this file. Left out: how long a step takes, the memory of CUDA
itself (about 1 GB), fragmentation. All sizes are bytes; GB is 1e9 bytes.
"""

import dataclasses
import functools
import json
from dataclasses import dataclass

import torch
from transformers import AutoConfig, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from extras.engine import PREFILL_TOKENS
from extras.usage import MEMORY_OPTIONS, flag_of
from extras.weights import adapter_config
from grpo import AT_ONCE
from policy import LANGUAGE, LORA_TARGETS, PATCHES_AT_ONCE, PolicyError

# Memory in bytes, from the vendors' data sheets.
DEVICES = {"H200": 141e9, "H100": 80e9, "A100": 80e9, "L40S": 48e9, "RTX4090": 24e9}
CUDA_RESERVE = 1e9          # bytes that CUDA itself takes

# The values in config.json of the published models, for machines without hub and cache: width, MLP
# width, layers, heads, key-value heads, vocabulary, tied embeddings; MLP width of the vision tower.
PUBLISHED = {"Qwen/Qwen2.5-VL-3B-Instruct": (2048, 11008, 36, 16, 2, 151936, True, 3420),
             "Qwen/Qwen2.5-VL-7B-Instruct": (3584, 18944, 28, 28, 4, 152064, False, 3420),
             "Qwen/Qwen2.5-VL-32B-Instruct": (5120, 27648, 64, 40, 8, 152064, False, 3456),
             "Qwen/Qwen2.5-VL-72B-Instruct": (8192, 29568, 80, 64, 8, 152064, False, 3456)}

# We plan for an episode of MAT-Coding as it usually goes (problem, code, answer), with every turn
# as long as it may be.
TURNS, SIDE = 3, 720                # SIDE: pixels of each side of an image
PROMPT_TEXT, REPLY = 260, 24        # tokens of the prompt's text and of a reply
PASSAGES = 600                      # tokens of a search result


# --- shapes ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shapes:
    """The sizes that memory depends on. The first five count weights."""
    text: int            # language model with lm_head, without an embedding matrix of its own
    vision: int          # vision tower
    total: int           # the whole model
    adapters: int        # LoRA adapters
    largest: int         # the largest single weight
    layers: int
    width: int           # hidden size, D
    mlp_width: int
    query_width: int     # all query heads together
    kv_bytes: int        # keys and values of one token in bfloat16, in all layers
    vocabulary: int
    vision_width: int
    vision_mlp_width: int
    merge: int           # patches on each side of an image token
    patch: int           # pixels on each side of a patch


def model_config(name: str) -> Qwen2_5_VLConfig:
    """config.json of a folder or hub model, of an adapter's base model, or the published values.
    Raises PolicyError if it cannot be read or describes another kind of model."""
    adapter = adapter_config(name)
    name = adapter["base_model_name_or_path"] if adapter else name
    if name in PUBLISHED:
        return published_config(*PUBLISHED[name])
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


def published_config(width, mlp_width, layers, heads, kv_heads, vocabulary, tied,
                     vision_mlp_width) -> Qwen2_5_VLConfig:
    """The configuration of a published model from its line in PUBLISHED."""
    text = {"hidden_size": width, "intermediate_size": mlp_width, "num_hidden_layers": layers,
            "num_attention_heads": heads, "num_key_value_heads": kv_heads,
            "vocab_size": vocabulary, "tie_word_embeddings": tied}
    vision = {"depth": 32, "hidden_size": 1280, "intermediate_size": vision_mlp_width,
              "num_heads": 16, "out_hidden_size": width}
    return Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tied)


@functools.lru_cache(maxsize=4)
def meta_model(settings: str) -> Qwen2_5_VLForConditionalGeneration:
    """The model of a configuration (as JSON) on the meta device, where a tensor has a shape but
    takes no memory."""
    with torch.device("meta"):
        return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig.from_dict(json.loads(settings)))


def shapes_of(config: Qwen2_5_VLConfig, options) -> Shapes:
    """Exact counts, taken from the model itself without its memory."""
    model = meta_model(config.to_json_string())
    text, vision = config.text_config, config.vision_config
    sizes = {id(w): w.numel() for w in model.parameters()}      # by identity: a tied matrix once
    total = sum(sizes.values())
    tower = sum(w.numel() for w in model.model.visual.parameters())
    embedding = model.get_input_embeddings().weight
    tied = embedding is model.lm_head.weight
    head_size = text.hidden_size // text.num_attention_heads
    return Shapes(
        text=total - tower - (0 if tied else embedding.numel()), vision=tower, total=total,
        adapters=adapter_weights(model, options.lora_rank), largest=max(sizes.values()),
        layers=text.num_hidden_layers, width=text.hidden_size, mlp_width=text.intermediate_size,
        query_width=text.num_attention_heads * head_size,
        kv_bytes=2 * text.num_hidden_layers * text.num_key_value_heads * head_size * 2,
        vocabulary=text.vocab_size, vision_width=vision.hidden_size,
        vision_mlp_width=vision.intermediate_size, merge=vision.spatial_merge_size,
        patch=vision.patch_size)


def adapter_weights(model: Qwen2_5_VLForConditionalGeneration, rank: int) -> int:
    """How many weights LoRA adapters of this rank have."""
    targets = {part.strip() for part in LORA_TARGETS.split(",")}
    return sum(rank * (module.in_features + module.out_features)
               for name, module in model.named_modules()
               if name.startswith(LANGUAGE) and isinstance(module, torch.nn.Linear)
               and name.split(".")[-1] in targets)


@dataclass(frozen=True)
class Lengths:
    """The planned episode, in tokens."""
    prompt: int
    sampled: int
    observed: int                   # all observations
    longest_observation: int        # the most that is prefilled between two turns
    images: int                     # how many images
    patches: int                    # patches of one image

    @property
    def total(self) -> int:
        return self.prompt + self.sampled + self.observed


def lengths_of(shape: Shapes, options) -> Lengths:
    """The lengths of the episode that we plan for."""
    turns = min(TURNS, options.max_turns)
    sampled = turns * options.max_new_tokens
    if options.task != "mat-coding":
        observed = (turns - 1) * PASSAGES
        return Lengths(PROMPT_TEXT, sampled, observed, min(observed, PASSAGES), 0, 0)
    # The processor rounds each side to whole image tokens.
    image = round(SIDE / (shape.merge * shape.patch)) ** 2
    # The first turn names the problem and the last one answers; those between get an image back.
    returned = max(0, turns - 2)
    return Lengths(PROMPT_TEXT + image, sampled, (turns - 1) * REPLY + returned * image,
                   REPLY + image * bool(returned), 1 + returned, image * shape.merge ** 2)


# --- memory ---------------------------------------------------------------------------------------


def trained_weights(shape: Shapes, options) -> int:
    """How many weights the optimiser changes."""
    if options.lora_rank:
        return shape.adapters
    return shape.total - (shape.vision if options.vision == "frozen" else 0)


def resident_parts(shape: Shapes, options) -> dict[str, float]:
    """The parts that stay in memory in every phase of training."""
    trained = trained_weights(shape, options)
    parts = {"weights": 2 * shape.total}
    if options.lora_rank:
        return parts | {"adapters": 4 * trained, "moments": 8 * trained}
    return parts | {"master weights": 4 * trained, "moments": 8 * trained,
                    "reference": 2 * shape.total if options.beta > 0 else 0}


def forward_bytes(shape: Shapes, options) -> int:
    """Bytes that one token takes inside a block without gradient. The MLP has the widest moment,
    where a LoRA layer adds its own output. Norms are computed in float32."""
    mlps = 4 if options.lora_rank else 3
    return 2 * (mlps * shape.mlp_width + 4 * shape.width) + 8 * shape.width


def saved_bytes(shape: Shapes, options) -> int:
    """Bytes that one token's activations of one block take until backward: attention's query, keys,
    values (repeated for all heads) and output; the inputs of two linear layers and of two norms
    (also in float32); four of the MLP's width."""
    norms = 0 if options.lora_rank else 2       # a norm that is trained keeps what it multiplies
    return (2 * (4 * shape.query_width + (2 + norms) * shape.width + 4 * shape.mlp_width)
            + 8 * shape.width)


def vision_bytes(shape: Shapes, patches: float) -> float:
    """Bytes of the vision tower's work on as many patches as it takes at once."""
    at_once = min(patches, max(PATCHES_AT_ONCE, 1))
    return at_once * (2 * (3 * shape.vision_mlp_width + 8 * shape.vision_width)
                      + 8 * shape.vision_width)


def rollout_parts(shape: Shapes, options, rows: int, prompts: int) -> dict[str, float]:
    """Sampling `rows` episodes at once, from `prompts` prompts that are prefilled at once."""
    episode = lengths_of(shape, options)
    fed = max(min(PREFILL_TOKENS, prompts * episode.prompt),
              min(PREFILL_TOKENS, rows * episode.longest_observation))    # tokens in a forward pass
    # One layer's keys and values are repeated for all query heads.
    repeated = 4 * rows * episode.total * shape.query_width
    pictures = max(prompts, rows if episode.images > 1 else 0)
    return {"keys and values": rows * episode.total * shape.kv_bytes,
            "prefill": fed * forward_bytes(shape, options) + repeated,
            "logits": rows * shape.vocabulary * 4 * 4,      # probabilities and three temporaries
            "vision": vision_bytes(shape, episode.patches * pictures)}


def update_parts(shape: Shapes, options) -> dict[str, float]:
    """Forward and backward of one micro-batch."""
    episode, (tokens, pairs) = lengths_of(shape, options), micro_batch_size(shape, options)
    block = tokens * saved_bytes(shape, options)
    if options.checkpointing == "on":   # the input of each block, and one block with its gradients
        activations = shape.layers * tokens * shape.width * 2 + 2 * block
    else:
        activations = (shape.layers + 1) * block
    patches = tokens / max(1, episode.total) * episode.images * episode.patches
    return {"gradients": trained_weights(shape, options) * (4 if options.lora_rank else 2),
            "activations": activations, "attention mask": 3 * pairs,
            "logits": 5 * logits_bytes(shape, tokens), "vision": vision_bytes(shape, patches)}


def micro_batch_size(shape: Shapes, options) -> tuple[int, int]:
    """(tokens, pairs of tokens in attention masks) of one forward pass in the update. It holds as
    many episodes as --micro-batch-tokens allows."""
    episode, limit = lengths_of(shape, options), options.micro_batch_tokens
    if options.update == "rows":
        rows = min(max(1, limit // episode.total), options.samples_per_step * options.group_size)
        return rows * episode.total, rows * episode.total ** 2
    branches = episodes_per_tree(shape, options)
    tree = episode.prompt + branches * (episode.total - episode.prompt)
    rows = min(max(1, limit // tree), options.samples_per_step)
    return rows * tree, rows * tree ** 2


def episodes_per_tree(shape: Shapes, options) -> int:
    """How many of a group's episodes share one prompt in a forward pass. (extras/tree.py cuts a
    tree that is over the limit.)"""
    episode = lengths_of(shape, options)
    room = options.micro_batch_tokens - episode.prompt
    return min(options.group_size, max(1, room // (episode.total - episode.prompt)))


def logits_bytes(shape: Shapes, tokens: int) -> int:
    """Bytes of the largest [tokens, vocabulary] tensor in the update."""
    return 4 * min(AT_ONCE, tokens * shape.vocabulary)


def image_tokens_of_step(shape: Shapes, options) -> int:
    """Image tokens of one step: each prompt's image once, and one image of each episode for every
    program."""
    episode = lengths_of(shape, options)
    images = (options.samples_per_step * (1 + options.group_size * (episode.images - 1))
              if episode.images else 0)
    return images * episode.patches // shape.merge ** 2


def memory_by_phase(shape: Shapes, options) -> dict[str, dict[str, float]]:
    """{phase: {part: bytes}} for every phase of a run."""
    # Before and after training there is the model alone.
    model = {"weights": 2 * shape.total, "adapters": 4 * shape.adapters}
    evaluation = rollout_parts(shape, options, options.eval_batch, options.eval_batch)
    if options.eval_only:
        return {"evaluation": model | evaluation}
    resident = resident_parts(shape, options)
    if options.vision == "frozen":      # its features are kept with the images for the whole step
        features = image_tokens_of_step(shape, options) * 2 * shape.width
        resident = resident | {"image features": features}
    groups = min(max(1, options.rollout_batch // options.group_size), options.samples_per_step)
    rows = min(options.rollout_batch, options.samples_per_step * options.group_size)
    update = update_parts(shape, options)
    # The optimiser's step has two temporaries of the largest weight.
    temporaries = 0 if options.lora_rank else 8 * shape.largest
    return {"evaluation": (resident if options.eval_every else model) | evaluation,
            "rollout": resident | rollout_parts(shape, options, rows, groups),
            "update": resident | update,
            "optimiser": resident | {"gradients": update["gradients"], "temporaries": temporaries}}


def phase_bytes(memory: dict[str, dict[str, float]], phase: str) -> float:
    return sum(memory[phase].values())


def peak_bytes(memory: dict[str, dict[str, float]]) -> float:
    return max(phase_bytes(memory, phase) for phase in memory)


# --- the device -----------------------------------------------------------------------------------


def device_name(options) -> str:
    """The device to plan for: the one of --plan-device, or the GPU of this machine, or an H200."""
    if options.plan_device:
        return options.plan_device
    here = (torch.cuda.get_device_properties(0).name.replace(" ", "") if torch.cuda.is_available()
            else "")
    return next((name for name in DEVICES if name in here), "H200")


def largest_rollout_batch(options) -> int:
    """The largest of 128, 64, 32, 16 and 8 episodes that fit into the device's memory at once, in
    rollout and in evaluation; 8 if even these do not fit."""
    if torch.cuda.is_available() and not options.plan_device:
        available = torch.cuda.get_device_properties(0).total_memory
    else:
        available = DEVICES[device_name(options)]
    shape = shapes_of(model_config(options.model), options)
    for rows in (128, 64, 32, 16, 8):
        memory = memory_by_phase(shape, dataclasses.replace(
            options, rollout_batch=rows, eval_batch=options.eval_batch or rows))
        needed = max(phase_bytes(memory, phase) for phase in ("rollout", "evaluation")
                     if phase in memory)
        if needed < 0.95 * available - CUDA_RESERVE:
            break
    return rows


# --- what is printed ------------------------------------------------------------------------------


def gb(size: float) -> str:
    return f"{size / 1e9:7.1f} GB"


def table_lines(memory: dict[str, dict[str, float]]) -> list[str]:
    """The parts in rows and the phases in columns."""
    names = list(dict.fromkeys(name for parts in memory.values() for name in parts))
    lines = [" " * 18 + "".join(f"{phase:>13}" for phase in memory)]
    for name in names:
        cells = [parts.get(name, 0) for parts in memory.values()]
        if max(cells) >= 5e7:
            texts = (gb(size) if size >= 5e7 else "-" for size in cells)
            lines.append(f"{name:18}" + "".join(f"{text:>13}" for text in texts))
    sums = "".join(f"{gb(phase_bytes(memory, phase)):>13}" for phase in memory)
    return [*lines, f"{'sum':18}{sums}"]


def plan_lines(options) -> list[str]:
    """--plan: the lines to print. Raises PolicyError as `model_config` does."""
    shape, device = shapes_of(model_config(options.model), options), device_name(options)
    episode, memory = lengths_of(shape, options), memory_by_phase(shape, options)
    trained = (f"LoRA of rank {options.lora_rank}, {shape.adapters / 1e6:.1f} M weights"
               if options.lora_rank else "all weights")
    lines = [
        f"plan:   {options.model}: {shape.total:,} weights ({shape.vision:,} vision)",
        f"        trained: {trained}",
        f"step:   {options.samples_per_step} x {options.group_size} episodes of {episode.prompt} "
        f"prompt tokens, {episode.sampled} sampled and {episode.observed} observed",
        f"        {episode.images} images of {SIDE} x {SIDE}; "
        f"{options.rollout_batch} episodes side by side",
        "", *table_lines(memory), "",
        f"peak:   {peak_bytes(memory) / 1e9:.1f} GB in torch's tensors, and about 1 GB for CUDA; "
        f"{device} has {DEVICES[device] / 1e9:.0f} GB"]
    if peak_bytes(memory) + CUDA_RESERVE > DEVICES[device]:
        phase = max(memory, key=lambda name: phase_bytes(memory, name))
        lines += ["", f"This does not fit. In the {phase}:", *savings(shape, options, phase)]
    return lines


def planned_and_measured(options, measured: float) -> str:
    """The line after the first step on CUDA, which compares the planned peak with the measured one
    (torch.cuda.max_memory_allocated)."""
    memory = memory_by_phase(shapes_of(model_config(options.model), options), options)
    return f"memory: peak {measured / 1e9:.1f} GB; --plan says {peak_bytes(memory) / 1e9:.1f} GB"


# --- out of memory --------------------------------------------------------------------------------


def smaller_settings(shape: Shapes, options) -> list[tuple[str, dict]]:
    """The options that take memory, each at a smaller setting: (the flag as you would type it, the
    changed fields)."""
    def half(name: str) -> tuple[str, dict]:
        value = getattr(options, name) // 2
        return f"{flag_of(name)} {value}", {name: value}
    settings = [half("eval_batch")] if options.eval_batch > 1 else []
    if options.rollout_batch >= 2 * options.group_size:
        settings.append(half("rollout_batch"))
    if micro_batch_size(shape, options)[0] > lengths_of(shape, options).total:
        settings.append(half("micro_batch_tokens"))
    if options.checkpointing == "off":
        settings.append(("--checkpointing on", {"checkpointing": "on"}))
    if not options.lora_rank:
        settings.append(("--lora-rank 16", {"lora_rank": 16}))
        settings += [("--beta 0", {"beta": 0.0})] if options.beta > 0 else []
    return settings + ([half("max_new_tokens")] if options.max_new_tokens > 32 else [])


def savings(shape: Shapes, options, phase: str) -> list[str]:
    """One line for each smaller setting that saves memory in the phase, the largest saving first
    (at least 0.05 GB)."""
    now, found = phase_bytes(memory_by_phase(shape, options), phase), []
    for flag, changes in smaller_settings(shape, options):
        changed, other = dataclasses.replace(options, **changes), shape
        if "lora_rank" in changes:
            other = shapes_of(model_config(options.model), changed)
        saved = now - phase_bytes(memory_by_phase(other, changed), phase)
        if saved >= 5e7:
            found.append((saved, f"  {flag:25} saves {saved / 1e9:.1f} GB"))
    lines = [line for _, line in sorted(found, reverse=True)]
    return lines or ["  no option is left to lower: use a smaller model or a larger GPU"]


# Phases of the run's clock, and the phases of the plan that they belong to.
PLAN_PHASES = {"update": ("update",), "vision": ("rollout", "evaluation"),
               "prefill": ("rollout", "evaluation"), "decode": ("rollout", "evaluation")}


def out_of_memory_message(options, error: Exception) -> str:
    """The message that ends a run that ran out of GPU memory: where it happened, and which options
    save how much. `error.phase` is the clock's phase, if it is known."""
    where = getattr(error, "phase", None)
    try:
        shape = shapes_of(model_config(options.model), options)
    except PolicyError as reason:
        return f"the GPU's memory is full ({reason}); lower {MEMORY_OPTIONS}"
    memory = memory_by_phase(shape, options)
    likely = [phase for phase in PLAN_PHASES.get(where, memory) if phase in memory]
    place = f" ({where})" if where else ""
    lines = [f"the GPU's memory is full{place}. What you can lower, and how much it saves:"]
    for phase in likely:
        lines += [f"{phase}, planned with {gb(phase_bytes(memory, phase)).strip()}:",
                  *savings(shape, options, phase)]
    return "\n".join(lines)
