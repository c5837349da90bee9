"""The published checkpoints' format: prompts, pixels, positions and logits equal those of
transformers' own Qwen2.5-VL.

The tests write a folder as the hub has them (flat config.json, `min_pixels` and `max_pixels`, two
temporal patches, windowed vision attention, old tensor names, several weight files, an untied
vocabulary matrix), but small and with random weights. They load it and compare everything with
`Qwen2_5_VLProcessor` and the model's own forward.
"""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor

from conftest import ROOT
from extras.paper import single_message_ids
from extras.weights import load, save
from policy import PolicyError

TINY = ROOT / "data" / "tiny"
SAMPLE = ROOT.parent / "shared" / "mat-sample"

# Qwen2.5-VL's chat format: it writes a system message of its own unless the conversation has one,
# and keeps the parts of a message in their order.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if loop.first and message.role != 'system' -%}
{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}
{%- endif -%}
{{ '<|im_start|>' + message.role + '\n' }}
{%- if message.content is string -%}{{ message.content }}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'image' -%}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}
{%- elif 'text' in part -%}{{ part.text }}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{ '<|im_end|>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"""

# How Qwen's tokenizer cuts text before it merges bytes. The vocabulary is data/tiny's.
SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| "
         r"?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")

CONFIG = {      # the flat layout of the published files, made small
    "architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl",
    "torch_dtype": "float32", "hidden_act": "silu", "hidden_size": 64, "intermediate_size": 96,
    "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2,
    "max_window_layers": 70, "sliding_window": 32768, "use_sliding_window": False,
    "vocab_size": 736, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
    "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
    "tie_word_embeddings": False, "bos_token_id": 705, "eos_token_id": 707,
    "attention_dropout": 0.0, "vision_start_token_id": 714, "vision_end_token_id": 715,
    "vision_token_id": 716, "image_token_id": 717, "video_token_id": 718,
    "max_position_embeddings": 128000, "initializer_range": 0.02,
    "vision_config": {
        "depth": 2, "hidden_act": "silu", "hidden_size": 32, "intermediate_size": 48,
        "num_heads": 2, "in_chans": 3, "out_hidden_size": 64, "patch_size": 14,
        "spatial_merge_size": 2, "spatial_patch_size": 14, "window_size": 112,
        "fullatt_block_indexes": [1], "tokens_per_second": 2, "temporal_patch_size": 2}}

PROCESSOR = {
    "min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14, "temporal_patch_size": 2,
    "merge_size": 2, "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2_5_VLProcessor"}

# (width, height): small, medium, tall, wide, odd, exactly on the grid, fewer pixels than allowed,
# a strip
SIZES = [(112, 112), (640, 480), (720, 1280), (1500, 300), (333, 517), (28, 28), (10, 7),
         (1990, 10)]


def photograph(width, height, seed=0):
    """An image of smooth colours, an edge and some noise. If it is resized in a wrong way, the
    result differs everywhere."""
    rng, y, x = np.random.default_rng(seed), *np.mgrid[0:height, 0:width]
    waves = [np.sin(x / (9 + 5 * c) + seed) + np.cos(y / (23 + 3 * c)) + (x * height > y * width)
             for c in range(3)]
    pixels = np.stack(waves, 2) * 60 + 90 + rng.normal(0, 8, (height, width, 1))
    return Image.fromarray(np.uint8(np.clip(pixels, 0, 255)))


def old_name(name: str) -> str:
    """A tensor's name in the published files, which are older than `language_model`."""
    return name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")


def write_published(folder, tied=False, processor=PROCESSOR):
    """Writes a checkpoint folder as the hub has them. Returns the model that was written."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG | {"tie_word_embeddings": tied}))
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    shutil.copy(TINY / "tokenizer_config.json", folder)
    tokenizer = json.loads((TINY / "tokenizer.json").read_text())
    tokenizer["normalizer"] = {"type": "NFC"}
    tokenizer["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": SPLIT}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    torch.manual_seed(0)
    config = Qwen2_5_VLForConditionalGeneration.config_class.from_pretrained(folder)
    model = Qwen2_5_VLForConditionalGeneration._from_config(config,
                                                            attn_implementation="sdpa").eval()
    # with the usual 0.02 attention would be flat and every error small
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.2)
    weights = {old_name(name): weight.clone() for name, weight in model.state_dict().items()
               if not (tied and name == "lm_head.weight")}
    files = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(weights)}
    for file in set(files.values()):
        save_file({name: weights[name] for name in weights if files[name] == file}, folder / file,
                  metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return model


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Our policy, the model that was written, and transformers' processor, of one such folder."""
    folder = tmp_path_factory.mktemp("hub") / "model"
    model = write_published(folder)
    ours = load(str(folder))
    return ours, model, their_processor(ours)


def their_processor(ours):
    """transformers' own processor without its part for video, which needs torchvision."""
    class Processor(Qwen2_5_VLProcessor):
        def check_argument_for_proper_class(self, name, argument):
            return None
    return Processor(ours.image_processor, ours.tokenizer, chat_template=CHAT_TEMPLATE)


def template_text(ours, turns):
    """What the chat template writes for messages (role, text, number of images)."""
    messages = [{"role": "system", "content": ours.system_prompt}]
    for role, text, images in turns:
        content = [{"type": "image"}] * images + [{"type": "text", "text": text}]
        messages.append({"role": role, "content": content})
    return ours.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def assert_equal_processing(published, photographs):
    """Compares a conversation: the first photograph stands in the prompt, each other one in an
    observation of its own. Returns ids, images and what transformers' processor made."""
    ours, _, processor = published
    turns = [("user", "What is on the sign?", 1)]
    images = [ours.image_input(photo) for photo in photographs]
    ids = ours.prompt_ids("What is on the sign?", images[:1])
    for image in images[1:]:
        ids += [*ours.text_ids("<think>I turn it.</think>"), ours.im_end,
                *ours.observation_ids("The image.", [image])]
        turns += [("assistant", "<think>I turn it.</think>", 0), ("user", "The image.", 1)]
    theirs = processor(text=[template_text(ours, turns)], images=photographs, return_tensors="pt")
    assert ids == theirs["input_ids"][0].tolist()
    assert torch.equal(torch.cat([image.patches for image in images]), theirs["pixel_values"])
    assert [list(image.grid) for image in images] == theirs["image_grid_thw"].tolist()
    positions, _ = ours.model.model.get_rope_index(
        theirs["input_ids"], mm_token_type_ids=theirs["mm_token_type_ids"],
        image_grid_thw=theirs["image_grid_thw"])
    assert torch.equal(ours.positions(ids, images), positions[:, 0])
    return ids, images, theirs


# --- prompts, pixels, positions -------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_one_photograph(published, size):
    _, images, theirs = assert_equal_processing(published, [photograph(*size)])
    assert theirs["pixel_values"].shape[1] == 3 * 2 * 14 * 14, "two temporal patches"
    assert 3136 <= len(images[0].patches) * 14 * 14 <= 12845056


def test_several_photographs_in_one_conversation(published):
    assert_equal_processing(published,
                            [photograph(*size, seed=i) for i, size in enumerate(SIZES[:5])])


def test_limits_on_pixels_come_from_the_folder(published, tmp_path):
    """If you edit preprocessor_config.json, your limits hold: here between 200,704 pixels (256
    tokens) and 1,003,520 pixels (1280 tokens)."""
    size = published[0].image_processor.size
    limits = (size["shortest_edge"], size["longest_edge"])
    assert limits == (3136, 12845056), "published limits were not read"
    write_published(tmp_path / "model",
                    processor=PROCESSOR | {"min_pixels": 200704, "max_pixels": 1003520})
    ours = load(str(tmp_path / "model"))
    for size, least, most in [((56, 84), 256, 300), ((3000, 2000), 1200, 1280),
                              ((800, 600), 600, 620)]:
        _, images, _ = assert_equal_processing((ours, None, their_processor(ours)),
                                               [photograph(*size)])
        assert least <= ours.image_tokens(images[0]) <= most
    again = tmp_path / "again"
    save(ours, again)
    assert torch.equal(load(str(again)).image_input(photograph(56, 84)).patches,
                       ours.image_input(photograph(56, 84)).patches)


@pytest.mark.skipif(not SAMPLE.is_dir(), reason="needs ../shared/mat-sample")
def test_mats_own_photographs(published):
    files = sorted(file for file in SAMPLE.rglob("*") if file.suffix in (".jpg", ".png"))
    assert len(files) >= 4
    for file in files:
        with Image.open(file) as image:
            assert_equal_processing(published, [image.convert("RGB")])


@pytest.mark.parametrize("text", ["Read it.", "\n\nRead it.", " \n Read it.\n", "  two blanks", ""])
def test_one_message_of_any_text_with_and_without_an_image(published, text):
    """The paper's prompt, behind the template's own system message. Line breaks at its beginning
    are tokenised together with the one behind the role."""
    ours, _, processor = published
    photo = photograph(90, 60)
    for photos in ([], [photo]):
        content = [{"type": "image"}] * len(photos) + [{"type": "text", "text": "TEXT"}]
        message = {"role": "user", "content": content}
        rendered = ours.tokenizer.apply_chat_template([message], tokenize=False,
                                                      add_generation_prompt=True)
        assert "You are a helpful assistant." in rendered
        rendered = rendered.replace("TEXT", text)
        theirs = processor(text=[rendered], images=photos or None, return_tensors="pt")
        got = single_message_ids(ours, text, [ours.image_input(photo) for photo in photos])
        assert got == theirs["input_ids"][0].tolist()


# --- the model ------------------------------------------------------------------------------------


def test_logits_of_the_published_layout(published):
    """Two temporal patches, windows in the vision tower, fewer key heads than query heads, an
    untied vocabulary matrix."""
    ours, model, _ = published
    photographs = [photograph(200, 140), photograph(60, 230, seed=1)]
    ids, images, theirs = assert_equal_processing(published, photographs)
    tokens = torch.tensor([ids])
    with torch.no_grad():
        expected = model(**theirs).logits[0]
        hidden = ours.hidden(tokens, ours.positions(ids, images)[:, None], torch.ones_like(tokens),
                             ours.features(images))
        torch.testing.assert_close(ours.model.lm_head(hidden[0]), expected, atol=1e-4, rtol=1e-4)
    assert expected.std() > 0.5, "flat logits would agree whatever was computed"


@pytest.mark.parametrize("tied", [False, True])
def test_a_published_folder_is_read_and_written_without_loss(tmp_path, tied):
    """7B has a vocabulary matrix of its own, 3B uses the embedding's. Both stay what they were when
    they are saved again."""
    model = write_published(tmp_path / "model", tied)
    ours = load(str(tmp_path / "model"))
    save(ours, tmp_path / "again")
    again = load(str(tmp_path / "again"))
    shared = [p.model.lm_head.weight is p.model.get_input_embeddings().weight
              for p in (ours, again)]
    assert shared == [tied, tied]
    for name, weight in model.state_dict().items():
        assert torch.equal(ours.model.state_dict()[name], weight), name
        assert torch.equal(again.model.state_dict()[name], weight), name
    assert again.tokenizer.chat_template == CHAT_TEMPLATE


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen3_vl", "qwen2", "llava"])
def test_another_architecture_is_refused_by_its_name(tmp_path, kind):
    """The refusal comes before any weight is read: this folder has none."""
    config = ({"model_type": kind} if kind in ("qwen3_vl", "llava")
              else CONFIG | {"model_type": kind})
    (tmp_path / "config.json").write_text(json.dumps(config))
    refusal = f"is a {kind} model; this program is written for qwen2_5_vl"
    with pytest.raises(PolicyError, match=refusal):
        load(str(tmp_path))


def test_sliding_windows_are_refused(tmp_path):
    """The published checkpoints name a window and switch it off. A checkpoint that switches it on
    would need other attention masks."""
    changed = CONFIG | {"use_sliding_window": True, "max_window_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps(changed))
    with pytest.raises(PolicyError, match="use_sliding_window"):
        load(str(tmp_path))
