"""The policy: a Qwen2.5-VL model as reinforcement learning needs it.

Reinforcement learning needs four things from a model:

    token ids         a conversation with images as one list of integers
    positions         Qwen2.5-VL's three rotary coordinates (time, height, width) of each token
    hidden states     one forward pass, with or without a key-value cache
    log-probs         of chosen tokens, computed in the same way for sampling and for training

This file gets all four out of Qwen2.5-VL. The transformer itself is the library's. Everything
around it is written by hand, because that is where multi-turn training with images goes wrong:
positions restart after a cached image, images do not match their placeholders, or the same text is
tokenised twice with different results. The file also adds LoRA, so that only a few weights need
training. On a first reading the names and docstrings of `Policy` are enough.

Read next: tools.py. Left out: video, other architectures; adapter folders (extras/weights.py).

Dimensions: B rows, T tokens, D hidden size, P image patches, S keys, V vocabulary, r LoRA rank.
"""

import math
import re
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoConfig, AutoTokenizer, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

# Patches in one pass of the vision tower: six images of 720 x 720, 0.7 GB. More is not faster.
PATCHES_AT_ONCE = 2 ** 14
SYSTEM_PROMPT_FILE = "system_prompt.txt"    # a checkpoint's system prompt travels with it
LANGUAGE = "model.language_model."          # how names of the language model's layers begin
LORA_ALPHA = 32.0                           # the adapter's product is multiplied by alpha / rank
LORA_TARGETS = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"    # all of a block's

SYSTEM_PROMPT = """\
You answer a question about an image. The image may be hard to read. Work in steps and take \
exactly one action in each step; every step is your thought inside <think> </think> followed by \
one action.
1. <problem> {'...'} </problem> names what is wrong with the image: one or two of rotation90, \
rotation180, dark, overexposure, blur, noise, crop (the answer is in a small part), or none.
2. <code> holds one Python program in a ```python block that repairs the image: it reads \
'path_to_input_image.jpg' and writes 'path_to_output_image.jpg'. You are shown the result. </code>
3. <answer> gives the final answer, as short as possible. </answer>"""

SEARCH_PROMPT = """\
You answer a question that needs facts which you may not know. Work in steps and take exactly one \
action in each step; every step is your thought inside <think> </think> followed by one action.
1. <search> holds one short query for a web search. You are shown what was found. </search>
2. <answer> gives the final answer, as short as possible. </answer>"""


class PolicyError(ValueError):
    """A model that this program cannot use. The message says which one, why, and what to do."""


class LoRA(torch.nn.Module):
    """A frozen linear layer W plus a trained product of rank r: W x + (alpha / r) B A x.

    From "LoRA" (arXiv 2106.09685). A starts random and B starts at zero, so a new adapter changes
    nothing. A and B stay float32 whatever the type of W is, because at a small learning rate
    bfloat16 would round their updates away. The product is computed in the type of x, as W x is.
    """

    def __init__(self, base: torch.nn.Linear, rank: int, alpha: float):
        super().__init__()
        self.base, self.rank, self.alpha = base.requires_grad_(False), rank, alpha
        self.on = True              # False while `Policy.without_adapters` computes the reference
        new = {"device": base.weight.device, "dtype": torch.float32}
        self.A = torch.nn.Parameter(torch.empty(rank, base.in_features, **new))      # [r, in]
        self.B = torch.nn.Parameter(torch.zeros(base.out_features, rank, **new))     # [out, r]
        torch.nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.base(x)
        if not self.on:
            return y
        return y + (x @ self.A.T.to(x.dtype)) @ (self.alpha / self.rank * self.B).T.to(x.dtype)

    def merged(self) -> torch.nn.Linear:
        """Adds the product to W, in W's type, and returns the plain linear layer."""
        product, weight = self.alpha / self.rank * self.B @ self.A, self.base.weight
        weight.data = (weight.data.float() + product.detach()).to(weight.dtype)
        return self.base


@dataclass(eq=False)        # compared and hashed by identity: one object is one image
class ImageInput:
    """An image in the form that the vision tower takes."""
    patches: torch.Tensor                   # [P, channels * time * patch * patch], normalised
    grid: tuple[int, int, int]              # (1, height, width) in patches; P = height * width
    features: torch.Tensor | None = None    # [image tokens, D], if `Policy.features` stored them


class Policy:
    """Model, tokenizer and image processor, behind the few calls that the lesson needs."""

    keep_features = False       # True: the vision tower is frozen, `features` may store its output

    def __init__(self, model, tokenizer, image_processor, system_prompt: str = SYSTEM_PROMPT,
                 name: str = ""):
        self.model, self.tokenizer, self.image_processor = model, tokenizer, image_processor
        self.system_prompt = system_prompt
        self.name = name                        # folder or hub name; an adapter file refers to it
        self.adapters: dict[str, LoRA] = {}     # by the name of the layer that the adapter wraps
        self.im_start, self.im_end, self.vision_start, self.image_pad, self.vision_end = (
            self._special(token) for token in
            ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|image_pad|>", "<|vision_end|>"))
        self.merge = model.config.vision_config.spatial_merge_size
        # The model must never write the tokens that only the program writes (role markers, image
        # placeholders, ...), nor the rows of the embedding that stand for no token. Sampling and
        # training mask the same ones (law 2). The end of a turn is the model's to write.
        barred = torch.zeros(model.config.text_config.vocab_size, dtype=torch.bool)
        barred[len(tokenizer):] = True
        barred[list(tokenizer.added_tokens_decoder)] = True
        barred[self.im_end] = False
        self.barred = barred.to(self.device)                                            # [V]

    def _special(self, token: str) -> int:
        token_id = self.tokenizer.convert_tokens_to_ids(token)
        if token_id is None or token_id == self.tokenizer.unk_token_id:
            raise PolicyError(f"the tokenizer has no {token}: it is not a Qwen2.5-VL tokenizer")
        return token_id

    @property
    def device(self) -> torch.device:
        return self.model.device

    # --- from text and images to token ids --------------------------------------------------------

    def text_ids(self, text: str) -> list[int]:
        """Token ids of plain text. A "<|im_end|>" in the text stays text, never a control token."""
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids

    def image_input(self, image: Image.Image) -> ImageInput:
        """Resizes, normalises and cuts an RGB image into patches, as Qwen2.5-VL's own code does."""
        width, height = image.size
        if max(width, height) > 200 * min(width, height):      # the processor refuses such strips
            image = image.resize((min(width, 200 * height), min(height, 200 * width)))
        out = self.image_processor(images=[image], return_tensors="pt")
        return ImageInput(out["pixel_values"], tuple(out["image_grid_thw"][0].tolist()))

    def image_tokens(self, image: ImageInput) -> int:
        """How many tokens an image takes: merge x merge patches become one token."""
        return image.grid[1] * image.grid[2] // self.merge ** 2

    def message_ids(self, role: str, text: str, images: list[ImageInput] = ()) -> list[int]:
        """One message in Qwen's chat format, images first, as the chat template writes it."""
        # Qwen's tokenizer makes one token of several line breaks: those at the start of the text
        # and the one behind the role are tokenised together.
        blank = "" if images else re.match(r"(\s*[\r\n])?", text)[0]
        ids = [self.im_start, *self.text_ids(role + "\n" + blank)]
        for image in images:
            placeholders = [self.image_pad] * self.image_tokens(image)
            ids += [self.vision_start, *placeholders, self.vision_end]
        return [*ids, *self.text_ids(text[len(blank):]), self.im_end, *self.text_ids("\n")]

    def prompt_ids(self, question: str, images: list[ImageInput]) -> list[int]:
        """System prompt, question with its images, and the opening of the model's first turn."""
        system = self.message_ids("system", self.system_prompt) if self.system_prompt else []
        return system + self.message_ids("user", question, images) + self.opening_ids()

    def observation_ids(self, text: str, images: list[ImageInput]) -> list[int]:
        """What follows a turn: the environment's message and the opening of the next turn."""
        # the turn ended with the sampled <|im_end|>; the line break after it is written here
        return self.text_ids("\n") + self.message_ids("user", text, images) + self.opening_ids()

    def opening_ids(self) -> list[int]:
        return [self.im_start, *self.text_ids("assistant\n")]

    def decode(self, ids: list[int]) -> str:
        """Text of sampled ids, for parser and people; it is never tokenised again (law 1)."""
        return self.tokenizer.decode([token for token in ids if token != self.im_end],
                                     skip_special_tokens=False)

    # --- positions --------------------------------------------------------------------------------

    def positions(self, ids: list[int], images: list[ImageInput]) -> torch.Tensor:
        """Qwen2.5-VL's rotary positions of a whole conversation, [3, T]: time, height, width.

        Text: all three start at 0 and advance by one for each token. An image that starts at p:
        time stays p, height and width count the image's rows and columns from p on, row by row. The
        text after it starts at p + max(rows, columns).

        In `ids` an image is a run of `self.image_pad`, one for each merge x merge patches of its
        grid (time, height, width): rows = height / self.merge, columns = width / self.merge. Two
        images without text between them form one run; `images` tells where the first one ends.

        Returns contiguous integers; ValueError if there are more or fewer placeholders than images
        need. Callers pass the whole list and slice the result, so that a cached continuation cannot
        restart.
        """
        rows, p, i, pending = [], 0, 0, iter(images)
        while i < len(ids):
            if ids[i] != self.image_pad:
                rows.append((p, p, p))
                p, i = p + 1, i + 1
                continue
            image = next(pending, None)
            if image is None:
                raise ValueError("more image placeholders than images")
            height, width = image.grid[1] // self.merge, image.grid[2] // self.merge
            rows += [(p, p + y, p + x) for y in range(height) for x in range(width)]
            p, i = p + max(height, width), i + height * width
        if next(pending, None) is not None or len(rows) != len(ids):
            raise ValueError("image placeholders and images do not match")
        return torch.tensor(rows, dtype=torch.long).T.contiguous()

    # --- the forward pass -------------------------------------------------------------------------

    def features(self, images: list[ImageInput]) -> list[torch.Tensor]:
        """The vision tower's output for each image, [image tokens, D].

        An image that is given twice is computed once. If `self.keep_features` is True (the tower is
        frozen), rollout, updates and reference share one computation, stored as `image.features`.
        If it is False (the tower is trained), `image.features` is neither read nor written.
        """
        visual = self.model.model.visual
        known = {image: image.features for image in images
                 if self.keep_features and image.features is not None}
        new = [image for image in dict.fromkeys(images) if image not in known]
        for part in vision_batches(new):
            patches = torch.cat([image.patches for image in part]).to(self.device, visual.dtype)
            grid = torch.tensor([image.grid for image in part], device=self.device)
            merged = visual(patches, grid_thw=grid).pooler_output
            sizes = [self.image_tokens(image) for image in part]
            known.update(zip(part, merged.split(sizes), strict=True))
        if self.keep_features:
            for image, computed in known.items():
                image.features = computed
        return [known[image] for image in images]

    def hidden(self, ids, positions, attention, features, cache=None) -> torch.Tensor:
        """One forward pass of the language model. Returns the last hidden states, [B, T, D].

        ids: [B, T]; positions: [3, B, T];
        attention: [B, T], 1 for a token and 0 for padding; or [B, 1, T, S], True where one of the T
            tokens sees one of the S keys; or None: each token sees itself and all before it;
        features: the images' features in reading order of the batch (row by row); or None: all ids
            were sampled, so there is no placeholder (looking for one would make a GPU wait);
        cache: has `update`, which the layers call with their keys and values (extras/engine.py).
        ValueError if placeholders and features differ in number.
        """
        x = self.model.get_input_embeddings()(ids)                                   # [B, T, D]
        if features is not None:
            placeholders = ids == self.image_pad
            found, wanted = sum(map(len, features)), int(placeholders.sum())
            if found != wanted:
                raise ValueError(f"{wanted} image placeholders but {found} image features")
        if features:                # cat: an ordinary tensor, also of those that the rollout made
            x = x.masked_scatter(placeholders[..., None], torch.cat(features).to(x.dtype))
        if attention is not None and attention.dtype == torch.bool:
            scores = torch.zeros_like(attention, dtype=x.dtype)     # once, not again in each layer
            attention = scores.masked_fill(~attention, -torch.inf)
        if attention is None or attention.dim() == 4:
            attention = {"full_attention": attention}   # then transformers makes no mask of its own
        return self.model.model.language_model(
            inputs_embeds=x, position_ids=positions, attention_mask=attention,
            past_key_values=cache, use_cache=cache is not None).last_hidden_state

    def log_probs(self, hidden: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
        """Log-probs of the next token, [..., D] -> [..., V], float32; -inf for masked tokens.

        This is the only place where logits become probabilities. Sampling and training both use it.
        """
        logits = self.model.lm_head(hidden).float().masked_fill(self.barred, -torch.inf)
        return torch.log_softmax(logits / temperature, dim=-1)

    # --- adapters ---------------------------------------------------------------------------------

    def add_lora(self, rank: int, alpha: float = LORA_ALPHA, targets: str = LORA_TARGETS) -> None:
        """Freezes the model and puts an adapter on the language model's layers in `targets`.

        targets: last parts of names of linear layers, separated by commas ("q_proj,v_proj").
        PolicyError for a name that no layer has.
        """
        wanted = {part.strip() for part in targets.split(",")}
        found = set()
        self.model.requires_grad_(False)
        for name, module in list(self.model.named_modules()):
            last = name.split(".")[-1]
            if isinstance(module, torch.nn.Linear) and name.startswith(LANGUAGE) and last in wanted:
                self.wrap(name, rank, alpha)
                found.add(last)
        if wanted - found:
            raise PolicyError("the language model has no linear layer "
                              f"{', '.join(sorted(wanted - found))}; it has {LORA_TARGETS}")

    def wrap(self, name: str, rank: int, alpha: float) -> LoRA:
        """Puts an adapter in the place of the linear layer of this name, and returns it."""
        parent, _, child = name.rpartition(".")
        self.adapters[name] = LoRA(self.model.get_submodule(name), rank, alpha)
        setattr(self.model.get_submodule(parent), child, self.adapters[name])
        return self.adapters[name]

    @contextmanager
    def without_adapters(self):
        """Inside, the model computes as it did before LoRA: a reference that needs no memory."""
        try:
            for adapter in self.adapters.values():
                adapter.on = False
            yield self
        finally:
            for adapter in self.adapters.values():
                adapter.on = True


def vision_batches(images: list[ImageInput]) -> list[list[ImageInput]]:
    """Cuts a list of images into parts of at most PATCHES_AT_ONCE patches, or of one image."""
    parts, patches = [], PATCHES_AT_ONCE
    for image in images:
        if patches + len(image.patches) > PATCHES_AT_ONCE:
            parts.append([])
            patches = 0
        parts[-1].append(image)
        patches += len(image.patches)
    return parts


def load(name: str, device: str = "cpu", dtype: torch.dtype | str = torch.float32) -> Policy:
    """Loads a Qwen2.5-VL checkpoint from a folder, or from the Hugging Face hub by its name.

    dtype "auto" keeps the checkpoint's own. PolicyError for another architecture or a checkpoint
    that lacks tensors; for a folder that they cannot read the libraries raise their own errors.
    """
    config = AutoConfig.from_pretrained(name)
    if config.model_type != "qwen2_5_vl":
        raise PolicyError(
            f"{name} is a {config.model_type} model; this program is written for qwen2_5_vl")
    if "sliding_attention" in config.text_config.layer_types:
        raise PolicyError(f"{name} has sliding-window attention, which is not supported; set "
                          "use_sliding_window to false in its config.json, as published models do")
    model, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        name, dtype=dtype, attn_implementation="sdpa", output_loading_info=True)
    tokenizer = AutoTokenizer.from_pretrained(name)
    image_processor = Qwen2VLImageProcessorPil.from_pretrained(name)
    if missing := sorted(info["missing_keys"]):
        raise PolicyError(f"the model {name} lacks {len(missing)} tensors (first: {missing[0]}); "
                          "the folder is half-written, copy it again")
    return Policy(model.to(device).eval(), tokenizer, image_processor, read_system_prompt(name),
                  name)


def read_system_prompt(name: str) -> str:
    """The system prompt in a checkpoint's folder; SYSTEM_PROMPT if there is none."""
    file = Path(name) / SYSTEM_PROMPT_FILE
    return file.read_text() if file.exists() else SYSTEM_PROMPT
