"""The policy: a Qwen2.5-VL model as the algorithm sees it.

What it teaches: what stands between "a vision-language model" and the four
things that reinforcement learning asks of it:

    ids       a conversation with images as one list of token ids
    positions Qwen2.5-VL's three rotary coordinates (time, height, width) of each id
    hidden    one forward pass, with or without a key-value cache
    logp      log-probabilities of chosen ids, the same for sampling and for training

The transformer itself is transformers' own; the arrangement around it is written
by hand, because it is where multi-turn training with images goes wrong: positions
that restart after a cached image, images that do not match their place holders,
text that is tokenised twice and differently.

and how few of its weights need training: LoRA, by hand.

Read next: rollout.py. Left out: video; other architectures.

Dimensions in this file: B rows, T tokens, D hidden size, P image patches, V vocabulary, r rank.
"""

import json
import math
import re
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch.utils.checkpoint import checkpoint
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoTokenizer, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from extras import many

PATCHES_AT_ONCE = 2 ** 14           # of the vision tower: six images of 720 x 720, 0.7 GB at work; more is no faster
SYSTEM_PROMPT_FILE = "system_prompt.txt"     # the words a checkpoint was trained with travel with it

LANGUAGE = "model.language_model."           # where the language model's layers are; the rest is the vision tower
LORA_TARGETS = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"      # every linear layer of a block
ADAPTER_CONFIG, ADAPTER_WEIGHTS, ADAPTER_PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."

SYSTEM_PROMPT = """\
You answer a question about an image. The image may be hard to read. Work in steps and take exactly one action in \
each step; every step is your thought inside <think> </think> followed by one action.
1. <problem> {'...'} </problem> names what is wrong with the image: one or two of rotation90, rotation180, dark, \
overexposure, blur, noise, crop (the answer is in a small part), or none.
2. <code> holds one Python program in a ```python block that repairs the image: it reads \
'path_to_input_image.jpg' and writes 'path_to_output_image.jpg'. You are shown the result. </code>
3. <answer> gives the final answer, as short as possible. </answer>"""

SEARCH_PROMPT = """\
You answer a question that needs facts which you may not know. Work in steps and take exactly one action in each step; \
every step is your thought inside <think> </think> followed by one action.
1. <search> holds one short query for a web search. You are shown what was found. </search>
2. <answer> gives the final answer, as short as possible. </answer>"""


class PolicyError(ValueError):
    """A model that cannot be used here; the message names the folder, the cause and the cure."""


# --- LoRA -------------------------------------------------------------------------------------------


class LoRA(torch.nn.Module):
    """A frozen linear layer W and a trained product of rank r beside it: W x + (alpha / r) B A x (arXiv 2106.09685).

    A is random and B zero: at the start nothing is changed. A and B stay float32 whatever W is (at a small learning
    rate bfloat16 would round their updates away); the product is computed in the type of x, as W x is.
    """

    def __init__(self, base: torch.nn.Linear, rank: int, alpha: float):
        super().__init__()
        self.base, self.rank, self.alpha, self.on = base.requires_grad_(False), rank, alpha, True
        new = {"device": base.weight.device, "dtype": torch.float32}
        self.A = torch.nn.Parameter(torch.empty(rank, base.in_features, **new))              # [r, in]
        self.B = torch.nn.Parameter(torch.zeros(base.out_features, rank, **new))             # [out, r]
        torch.nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.base(x)
        if not self.on:
            return y
        return y + (x @ self.A.T.to(x.dtype)) @ (self.alpha / self.rank * self.B).T.to(x.dtype)

    def merged(self) -> torch.nn.Linear:
        """The linear layer that computes the same: W + (alpha / r) B A, in W's type."""
        product = self.alpha / self.rank * self.B @ self.A
        self.base.weight.data = (self.base.weight.data.float() + product.detach()).to(self.base.weight.dtype)
        return self.base


@dataclass(frozen=True)
class ImageInput:
    """An image as the vision tower takes it. Compared and hashed by identity: one object is one image."""
    patches: torch.Tensor            # [P, channels * time * patch * patch], normalised
    grid: tuple[int, int, int]       # (1, height, width) in patches; P = height * width

    def __eq__(self, other):
        return self is other

    def __hash__(self):
        return id(self)


class Policy:
    """Model, tokenizer and image processor behind the few calls that rollout and training need."""

    def __init__(self, model, tokenizer, image_processor, system_prompt: str = SYSTEM_PROMPT, name: str = ""):
        self.model, self.tokenizer, self.image_processor = model, tokenizer, image_processor
        self.system_prompt, self.name = system_prompt, name     # name: what `load` was given, for the adapter's file
        self.adapters: dict[str, LoRA] = {}                     # by the name of the layer that each wraps
        self.im_start, self.im_end, self.vision_start, self.image_pad, self.vision_end = (
            self._special(name) for name in
            ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|image_pad|>", "<|vision_end|>"))
        self.merge = model.config.vision_config.spatial_merge_size
        self.kept = None        # dict: `features` keeps there what it computed, for as long as the tower stays as it is
        # Ids that only the program writes (role marks, image pads, ...) and rows of the embedding
        # that are no token at all. Barred in the sampler and in the scored log-prob alike (law 2).
        barred = torch.zeros(model.config.text_config.vocab_size, dtype=torch.bool)
        barred[len(tokenizer):] = True
        barred[list(tokenizer.added_tokens_decoder)] = True
        barred[self.im_end] = False
        self.barred = barred.to(self.device)                                            # [V]

    def _special(self, name: str) -> int:
        token_id = self.tokenizer.convert_tokens_to_ids(name)
        if token_id is None or token_id == self.tokenizer.unk_token_id:
            raise PolicyError(f"the tokenizer has no {name}: this is no Qwen2.5-VL tokenizer")
        return token_id

    @property
    def device(self) -> torch.device:
        return self.model.device

    # --- from text and images to ids ---------------------------------------------------------------

    def text_ids(self, text: str) -> list[int]:
        """Ids of plain text. `<|im_end|>` and its like inside `text` stay text, never control ids."""
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids

    def image_input(self, image: Image.Image) -> ImageInput:
        """Resizes, normalises and cuts an RGB image into patches, as Qwen2.5-VL's own processor does."""
        width, height = image.size
        if max(width, height) > 200 * min(width, height):      # the processor refuses such strips
            image = image.resize((min(width, 200 * height), min(height, 200 * width)))
        out = self.image_processor(images=[image], return_tensors="pt")
        return ImageInput(out["pixel_values"], tuple(out["image_grid_thw"][0].tolist()))

    def image_tokens(self, image: ImageInput) -> int:
        """Place holders that one image takes: merge x merge patches are one token."""
        return image.grid[1] * image.grid[2] // self.merge ** 2

    def message_ids(self, role: str, text: str, images: list[ImageInput] = ()) -> list[int]:
        """One message in Qwen's chat format, images first, as the checkpoint's chat template would write it."""
        blank = "" if images else re.match(r"(\s*[\r\n])?", text)[0]     # line breaks in a row are one token of Qwen's
        ids = [self.im_start, *self.text_ids(role + "\n" + blank)]
        for image in images:
            ids += [self.vision_start, *[self.image_pad] * self.image_tokens(image), self.vision_end]
        return [*ids, *self.text_ids(text[len(blank):]), self.im_end, *self.text_ids("\n")]

    def prompt_ids(self, question: str, images: list[ImageInput]) -> list[int]:
        """System prompt, question with its images, and the opening of the model's first turn."""
        system = self.message_ids("system", self.system_prompt) if self.system_prompt else []
        return system + self.message_ids("user", question, images) + self._opening()

    def observation_ids(self, text: str, images: list[ImageInput]) -> list[int]:
        """What follows a finished turn: the environment's message and the opening of the next turn.

        The turn already ended with the sampled <|im_end|>; the line break after it is written here.
        """
        return self.text_ids("\n") + self.message_ids("user", text, images) + self._opening()

    def single_message_ids(self, text: str, images: list[ImageInput]) -> list[int]:
        """One user message that holds everything, and the opening of the turn (paper.py).

        Before it stands what the checkpoint's chat template puts first by itself: Qwen2.5-VL's has a short
        system message of its own, which the authors' prompts therefore had, too.
        """
        first = []
        if self.tokenizer.chat_template:
            rendered = self.tokenizer.apply_chat_template([{"role": "user", "content": ""}], tokenize=False)
            first = re.findall(r"<\|im_start\|>system\n(.*?)<\|im_end\|>", rendered, re.DOTALL)
        return [*(i for words in first for i in self.message_ids("system", words)),
                *self.message_ids("user", text, images), *self._opening()]

    def _opening(self) -> list[int]:
        return [self.im_start, *self.text_ids("assistant\n")]

    def decode(self, ids: list[int]) -> str:
        """Text of sampled ids, for the parser and for people; never tokenised again (law 1)."""
        return self.tokenizer.decode([i for i in ids if i != self.im_end], skip_special_tokens=False)

    # --- positions -----------------------------------------------------------------------------------

    def positions(self, ids: list[int], images: list[ImageInput]) -> torch.Tensor:
        """Qwen2.5-VL's rotary positions of a whole conversation. [3, T]: time, height, width.

        Text: all three advance by one, from 0. An image that starts at p: time stays p, height and width
        count its rows and columns from p on, row by row; the text after it starts at p + max(rows, columns).
        In ids an image is a run of `self.image_pad`, one for each merge x merge patches of its grid (time, height, width): rows =
        height / self.merge, columns = width / self.merge. Two images without text between them are one run; `images` tells where the first ends.
        ValueError where the place holders are more or fewer than the images need. Integers, contiguous.
        Callers pass the whole list and slice the result, so that a cached continuation cannot restart.
        """
        rows, p, i, pending = [], 0, 0, iter(images)
        while i < len(ids):
            if ids[i] != self.image_pad:
                rows.append((p, p, p))
                p, i = p + 1, i + 1
                continue
            image = next(pending, None)
            if image is None:
                raise ValueError("more image place holders than images")
            height, width = image.grid[1] // self.merge, image.grid[2] // self.merge
            rows += [(p, p + y, p + x) for y in range(height) for x in range(width)]
            p, i = p + max(height, width), i + height * width
        if next(pending, None) is not None or len(rows) != len(ids):
            raise ValueError("image place holders and images do not match")
        return torch.tensor(rows, dtype=torch.long).T.contiguous()

    # --- the forward pass ------------------------------------------------------------------------------

    def features(self, images: list[ImageInput]) -> list[torch.Tensor]:
        """The vision tower's output of each image, [image tokens, D].

        An image given twice is computed once; where `self.kept` is a dict, not even twice in two calls. That is
        right as long as the tower does not change: a step with a frozen tower, rollout, update and reference.
        """
        known, visual = {} if self.kept is None else self.kept, self.model.model.visual
        for part in few_patches([image for image in dict.fromkeys(images) if image not in known]):
            patches = torch.cat([image.patches for image in part]).to(self.device, visual.dtype)
            grid = torch.tensor([image.grid for image in part], device=self.device)
            merged = visual(patches, grid_thw=grid).pooler_output
            known.update(zip(part, merged.split([self.image_tokens(image) for image in part])))
        return [known[image] for image in images]

    def hidden(self, ids, positions, attention, features, cache=None) -> torch.Tensor:
        """One forward pass of the language model. Returns the last hidden states [B, T, D].

        ids [B, T]; positions [3, B, T];
        attention: [B, T], 1 where there is an id, 0 on padding; or [B, 1, T, S], true where one of the T ids sees one
        of the S keys; or None: every id sees itself and all before it;
        features: the images' features in reading order of the batch (row by row); None: the ids were sampled, so that
        no place holder is among them (a GPU is not asked, which would make it wait);
        cache: has `update`, which the layers call with their keys and values (rollout.Cache).
        """
        x = self.model.get_input_embeddings()(ids)                                       # [B, T, D]
        if features is not None:
            holders = ids == self.image_pad
            found, wanted = sum(len(f) for f in features), int(holders.sum())
            if found != wanted:
                raise ValueError(f"{wanted} image place holders but {found} image features")
        if features:
            x = x.masked_scatter(holders[..., None], torch.cat(features).to(x.dtype))
        if attention is not None and attention.dtype == torch.bool:     # as numbers to add, once and not in each layer
            attention = torch.zeros_like(attention, dtype=x.dtype).masked_fill(~attention, -torch.inf)
        if attention is None or attention.dim() == 4:       # made by hand: transformers makes none of its own
            attention = {"full_attention": attention}
        return self.model.model.language_model(
            inputs_embeds=x, position_ids=positions, attention_mask=attention,
            past_key_values=cache, use_cache=cache is not None).last_hidden_state

    def log_probs(self, hidden: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
        """Log-probabilities of the next id, [..., D] -> [..., V], float32; barred ids have none (-inf).

        The one place where logits become probabilities: sampling and training both come here.
        """
        logits = self.model.lm_head(hidden).float().masked_fill(self.barred, -torch.inf)
        return torch.log_softmax(logits / temperature, dim=-1)

    @contextmanager
    def checkpointing(self, on: bool = True):
        """Inside, backward has the input of each transformer layer alone and computes the rest of it again.

        A third more arithmetic (forward, forward again, backward = two forwards) for a fraction of the memory. By hand,
        because transformers' own switch does nothing in eval mode, where this model is, and has changed its name.
        """
        layers = [*self.model.model.language_model.layers, *self.model.model.visual.blocks] if on else []
        for layer in layers:        # an attribute of the layer itself, found before its class's method
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
        try:
            yield
        finally:
            for layer in layers:
                del layer.forward

    # --- LoRA ----------------------------------------------------------------------------------------

    def add_lora(self, rank: int, alpha: float, targets: str) -> None:
        """Freezes the model and puts an adapter on each linear layer of the language model that `targets` names.

        targets: last parts of names, joined by commas ("q_proj,v_proj"). Raises PolicyError for one that is nowhere.
        """
        wanted, found = {part.strip() for part in targets.split(",")}, set()
        self.model.requires_grad_(False)
        for name, module in list(self.model.named_modules()):
            if name.startswith(LANGUAGE) and isinstance(module, torch.nn.Linear) and name.split(".")[-1] in wanted:
                self.wrap(name, rank, alpha)
                found.add(name.split(".")[-1])
        if wanted - found:
            raise PolicyError(f"--lora-targets: the language model has no linear layer {', '.join(sorted(wanted - found))}; "
                              f"it has {LORA_TARGETS}")

    def wrap(self, name: str, rank: int, alpha: float) -> LoRA:
        """Puts an adapter on the linear layer of this name."""
        parent, _, child = name.rpartition(".")
        self.adapters[name] = LoRA(self.model.get_submodule(name), rank, alpha)
        setattr(self.model.get_submodule(parent), child, self.adapters[name])
        return self.adapters[name]

    def merge_lora(self) -> None:
        """Adds every adapter to its layer; the model is an ordinary one again and computes the same."""
        for name, adapter in self.adapters.items():
            parent, _, child = name.rpartition(".")
            setattr(self.model.get_submodule(parent), child, adapter.merged())
        self.adapters = {}

    @contextmanager
    def without_adapters(self):
        """The model as it was before LoRA: the reference that needs no memory. Without adapters nothing changes."""
        try:
            for adapter in self.adapters.values():
                adapter.on = False
            yield self
        finally:
            for adapter in self.adapters.values():
                adapter.on = True

    # --- files ---------------------------------------------------------------------------------------

    def save(self, folder: Path) -> None:
        """Writes an ordinary Hugging Face folder, with LoRA an adapter in PEFT's format; the system prompt beside it."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if many.rank():
            return
        if self.adapters:
            save_adapter(self, folder)
        else:       # the weights as they are in use: with many GPUs state_dict() would be parts of them
            self.model.save_pretrained(folder, state_dict=dict(self.model.named_parameters()))
        self.tokenizer.save_pretrained(folder)
        self.image_processor.save_pretrained(folder)
        (folder / SYSTEM_PROMPT_FILE).write_text(self.system_prompt)


def few_patches(images: list[ImageInput]) -> list[list[ImageInput]]:
    """The images in parts of at most PATCHES_AT_ONCE patches, at least one image each."""
    parts, patches = [], PATCHES_AT_ONCE
    for image in images:
        if patches + len(image.patches) > PATCHES_AT_ONCE:
            parts.append([])
            patches = 0
        parts[-1].append(image)
        patches += len(image.patches)
    return parts


def save_adapter(policy: Policy, folder: Path) -> None:
    """adapter_config.json and adapter_model.safetensors, as peft.PeftModel.from_pretrained reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    one = next(iter(policy.adapters.values()))
    targets = sorted({name.split(".")[-1] for name in policy.adapters})
    base = str(Path(policy.name).resolve()) if Path(policy.name).is_dir() else policy.name
    (folder / ADAPTER_CONFIG).write_text(json.dumps({
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": one.rank,
        "lora_alpha": one.alpha, "lora_dropout": 0.0, "bias": "none", "inference_mode": True,
        # a pattern, because the vision tower has layers of the same names
        "target_modules": rf".*\.language_model\..*\.({'|'.join(targets)})"}, indent=1))
    tensors = {f"{ADAPTER_PREFIX}{name}.lora_{letter}.weight": getattr(adapter, letter).detach().cpu().contiguous()
               for name, adapter in policy.adapters.items() for letter in "AB"}
    save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})


def adapter_config(name: str) -> dict | None:
    """adapter_config.json of an adapter folder; None for any other folder or a hub name."""
    file = Path(name) / ADAPTER_CONFIG
    if not file.is_file():
        return None
    try:
        config = json.loads(file.read_text())
        return config | {"base_model_name_or_path": str(config["base_model_name_or_path"]), "r": int(config["r"]),
                         "lora_alpha": float(config["lora_alpha"])}
    except (ValueError, KeyError, TypeError) as error:
        raise PolicyError(f"{file} cannot be read ({type(error).__name__}: {error}); copy the folder again") from None


def read_adapter(policy: Policy, folder: Path) -> None:
    """Puts a saved adapter (ours or PEFT's own, plain LoRA) on the policy. Raises PolicyError if it does not fit."""
    config = adapter_config(str(folder))
    try:
        tensors = load_file(folder / ADAPTER_WEIGHTS)
    except Exception as error:      # a missing file, half a file: the cure is the same
        raise PolicyError(f"{folder / ADAPTER_WEIGHTS} cannot be read ({error}); copy the folder again") from error
    strange = [key for key in ("use_dora", "use_rslora", "modules_to_save", "rank_pattern", "alpha_pattern")
               if config.get(key)]
    if strange or config.get("peft_type") != "LORA":
        raise PolicyError(f"the adapter {folder} is no plain LoRA ({', '.join(strange) or config.get('peft_type')}); "
                          "merge it into its model with peft's merge_and_unload and load that folder")
    policy.model.requires_grad_(False)
    pairs = {key[:-len(".lora_A.weight")] for key in tensors if key.endswith(".lora_A.weight")}
    try:
        for key in sorted(pairs):
            adapter = policy.wrap(key.removeprefix(ADAPTER_PREFIX), config["r"], config["lora_alpha"])
            for letter in "AB":
                weight = tensors.pop(f"{key}.lora_{letter}.weight")
                if weight.shape != getattr(adapter, letter).shape:
                    raise ValueError(f"{key}.lora_{letter} is {tuple(weight.shape)} there, "
                                     f"{tuple(getattr(adapter, letter).shape)} here")
                getattr(adapter, letter).data.copy_(weight)
        if tensors or not pairs:
            raise ValueError(f"no place for {min(tensors)}" if tensors else "it holds no adapter")
    except (ValueError, KeyError, AttributeError) as error:
        raise PolicyError(f"the adapter {folder} does not fit its base model {policy.name}: {error}; name the right "
                          f"one as base_model_name_or_path in {folder / ADAPTER_CONFIG}") from error


def check_name(name: str) -> None:
    """Raises PolicyError for a folder that is not there. A hub name (owner/model) is left to `load`."""
    looks_local = name.startswith((".", "/", "~")) or name.count("/") != 1
    if looks_local and not Path(name).is_dir():
        raise PolicyError(f"model folder {name} does not exist; give a folder with config.json and "
                          "model.safetensors, or a hub name such as Qwen/Qwen2.5-VL-3B-Instruct")


def load(name: str, device: str = "cpu", dtype: torch.dtype | str = torch.float32) -> Policy:
    """Loads a Qwen2.5-VL checkpoint from a folder or, by name, from the Hugging Face hub; or the base model of an
    adapter folder and the adapter on it. dtype "auto": as the checkpoint is.

    Raises PolicyError when the folder is missing or half-written, or the model of another kind.
    """
    check_name(name)
    if adapter := adapter_config(name):
        try:
            policy = load(adapter["base_model_name_or_path"], device, dtype)
        except PolicyError as error:
            raise PolicyError(f"{name} is an adapter, and its base model is not to be had: {error}\nif the model was moved, "
                              f"correct base_model_name_or_path in {Path(name) / ADAPTER_CONFIG}") from error
        read_adapter(policy, Path(name))
        policy.system_prompt = read_system_prompt(name)
        return policy
    try:
        config = AutoConfig.from_pretrained(name)
        if config.model_type != "qwen2_5_vl":
            raise PolicyError(f"{name} is a {config.model_type} model; this program is written for qwen2_5_vl")
        if "sliding_attention" in config.text_config.layer_types:
            raise PolicyError(f"{name} has layers with sliding-window attention, which this program has not; "
                              "set use_sliding_window to false in its config.json, as the published ones have it")
        model, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            name, dtype=dtype, attn_implementation="sdpa", output_loading_info=True)
        tokenizer = AutoTokenizer.from_pretrained(name)
        image_processor = Qwen2VLImageProcessorPil.from_pretrained(name)
    except PolicyError:
        raise
    except Exception as error:      # each library below has its own kinds; all mean "this folder cannot be read"
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise PolicyError(f"cannot load the model {name}: {reason}\n"
                          "check that the folder is complete (config.json, *.safetensors, tokenizer.json, "
                          "preprocessor_config.json) or that the hub can be reached") from error
    if info["missing_keys"]:
        raise PolicyError(f"the model {name} lacks {len(info['missing_keys'])} tensors "
                          f"(first: {sorted(info['missing_keys'])[0]}); the folder is half-written, copy it again")
    return Policy(model.to(device).eval(), tokenizer, image_processor, read_system_prompt(name), name)


def read_system_prompt(name: str) -> str:
    """The words that a checkpoint folder brings, else our own."""
    file = Path(name) / SYSTEM_PROMPT_FILE
    return file.read_text() if file.exists() else SYSTEM_PROMPT
