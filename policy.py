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

Read next: rollout.py. Left out: video; other architectures.

Dimensions in this file: B rows, T tokens, D hidden size, P image patches, V vocabulary.
"""

import re
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoTokenizer, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

SYSTEM_PROMPT_FILE = "system_prompt.txt"     # the words a checkpoint was trained with travel with it

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

    def __init__(self, model, tokenizer, image_processor, system_prompt: str = SYSTEM_PROMPT):
        self.model, self.tokenizer, self.image_processor = model, tokenizer, image_processor
        self.system_prompt = system_prompt
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

        Text: all three advance by one. An image that starts at p: time stays p, height and width
        count its rows and columns from p on; the text after it starts at p + max(rows, columns).
        Always computed from the whole list and sliced, so that a cached continuation cannot restart.
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
        known = {} if self.kept is None else self.kept
        new = [image for image in dict.fromkeys(images) if image not in known]
        if new:
            visual = self.model.model.visual
            patches = torch.cat([image.patches for image in new]).to(self.device, visual.dtype)
            grid = torch.tensor([image.grid for image in new], device=self.device)
            merged = visual(patches, grid_thw=grid).pooler_output
            known.update(zip(new, merged.split([self.image_tokens(image) for image in new])))
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

    # --- files ---------------------------------------------------------------------------------------

    def save(self, folder: Path) -> None:
        """Writes an ordinary Hugging Face folder, and the system prompt beside it."""
        folder = Path(folder)
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        self.image_processor.save_pretrained(folder)
        (folder / SYSTEM_PROMPT_FILE).write_text(self.system_prompt)


def check_name(name: str) -> None:
    """Raises PolicyError for a folder that is not there. A hub name (owner/model) is left to `load`."""
    looks_local = name.startswith((".", "/", "~")) or name.count("/") != 1
    if looks_local and not Path(name).is_dir():
        raise PolicyError(f"model folder {name} does not exist; give a folder with config.json and "
                          "model.safetensors, or a hub name such as Qwen/Qwen2.5-VL-3B-Instruct")


def load(name: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Policy:
    """Loads a Qwen2.5-VL checkpoint from a folder or, by name, from the Hugging Face hub.

    Raises PolicyError when the folder is missing or half-written, or the model of another kind.
    """
    check_name(name)
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
    prompt_file = Path(name) / SYSTEM_PROMPT_FILE
    system_prompt = prompt_file.read_text() if prompt_file.exists() else SYSTEM_PROMPT
    return Policy(model.to(device).eval(), tokenizer, image_processor, system_prompt)
