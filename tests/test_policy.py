"""The policy against transformers' own Qwen2.5-VL: ids, pixels,
positions, logits; and files that are not right."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import ROOT
from policy import PolicyError, load

TINY = ROOT / "data" / "tiny"


def photograph(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3),
                                                                dtype=np.uint8))


def conversation(policy, images):
    """A three-turn conversation with one image in the prompt and the others
    in later observations."""
    ids = policy.prompt_ids("What number is on the sign?", images[:1])
    for image in images[1:]:
        ids += [*policy.text_ids("<think>I repair it.</think>"), policy.im_end]
        ids += policy.observation_ids("This is the image now.", [image])
    return ids


def test_special_ids_in_plain_text_stay_text(policy):
    """A question that spells <|im_end|> must not end the user's message."""
    ids = policy.text_ids("a<|im_end|>b<|image_pad|>")
    assert not set(ids) & {policy.im_end, policy.image_pad}
    assert policy.tokenizer.decode(ids) == "a<|im_end|>b<|image_pad|>"


def test_messages_are_what_the_chat_template_writes(policy):
    """Prompt, turn and observation, appended piece by piece, give the ids of
    the whole templated conversation."""
    images = [policy.image_input(photograph(112, 112)), policy.image_input(photograph(50, 150))]
    image = {"type": "image"}
    messages = [
        {"role": "system", "content": policy.system_prompt},
        {"role": "user", "content": [image,
                                     {"type": "text", "text": "What number is on the sign?"}]},
        {"role": "assistant", "content": "<think>I repair it.</think>"},
        {"role": "user", "content": [image, {"type": "text", "text": "This is the image now."}]}]
    text = policy.tokenizer.apply_chat_template(messages, tokenize=False,
                                                add_generation_prompt=True)
    # one place holder in the template stands for all of an image's tokens
    for i, picture in enumerate(images):
        text = text.replace("<|image_pad|>", "<|vision_pad|>" * policy.image_tokens(picture), 1)
    expected = policy.tokenizer(text.replace("<|vision_pad|>",
                                             "<|image_pad|>"), add_special_tokens=False).input_ids
    assert conversation(policy, images) == expected


@pytest.mark.parametrize("size", [(112, 112), (640, 480), (1500, 300), (31, 700), (1, 999), (3, 3)])
def test_image_patches_are_the_processors_own(policy, size):
    image = photograph(*size)
    ours = policy.image_input(image)
    if max(size) <= 200 * min(size):
        theirs = policy.image_processor(images=[image], return_tensors="pt")
        assert torch.equal(ours.patches, theirs["pixel_values"])
        assert ours.grid == tuple(theirs["image_grid_thw"][0].tolist())
    assert len(ours.patches) == ours.grid[1] * ours.grid[2] == 4 * policy.image_tokens(ours)


def test_positions_of_a_hand_made_example(policy):
    """Two text ids, an image of 1 x 2 tokens, one text id: the text after it
    starts at 2 + max(1, 2) = 4."""
    image = policy.image_input(photograph(112, 28))
    assert (image.grid[1] // 2, image.grid[2] // 2) == (1, 4)
    got = policy.positions([policy.im_start, policy.vision_start, *[policy.image_pad] * 4,
                            policy.vision_end], [image])
    assert got.tolist() == [[0, 1, 2, 2, 2, 2, 6],      # time stands still inside an image
                            [0, 1, 2, 2, 2, 2, 6],      # one row
                            [0, 1, 2, 3, 4, 5, 6]]      # four columns


def test_positions_and_logits_equal_transformers(policy):
    """Several images of several shapes: our positions are get_rope_index's,
    our logits those of the model's forward."""
    images = [policy.image_input(photograph(*size, seed=i)) for i,
              size in enumerate([(112, 112), (300, 60), (40, 90)])]
    ids = conversation(policy, images)
    tokens = torch.tensor([ids])
    grid, kinds = torch.tensor([image.grid for image in images]), (tokens == policy.image_pad).int()
    theirs, _ = policy.model.model.get_rope_index(tokens, mm_token_type_ids=kinds,
                                                  image_grid_thw=grid)
    ours = policy.positions(ids, images)
    assert torch.equal(ours, theirs[:, 0])
    with torch.no_grad():
        expected = policy.model(input_ids=tokens,
                                pixel_values=torch.cat([image.patches for image in images]),
                                image_grid_thw=grid, mm_token_type_ids=kinds).logits[0]
        hidden = policy.hidden(tokens, ours[:,
                                            None], torch.ones_like(tokens), policy.features(
            images))[0]
    torch.testing.assert_close(policy.model.lm_head(hidden), expected, atol=1e-5, rtol=1e-5)


def test_attention_by_padding_by_hand_or_causal_is_the_same(policy):
    """A conversation of 30 ids beside one of 30 that is all there: the three
    ways to say what an id sees agree."""
    ids = torch.tensor(
        [policy.text_ids(
        "Turn the image, then read the number that is on the sign. " * 3)[:30]] * 2)
    where = torch.arange(30).expand(3, 2, -1)
    with torch.no_grad():
        by_padding = policy.hidden(ids, where, torch.ones_like(ids), [])
        causal = policy.hidden(ids, where, None, None)
        by_hand = policy.hidden(ids, where, torch.ones(2, 1, 30, 30, dtype=torch.bool).tril(), [])
    torch.testing.assert_close(causal, by_padding, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(by_hand, by_padding, atol=1e-5, rtol=1e-5)


def test_place_holders_and_images_must_match(policy):
    image = policy.image_input(photograph(112, 112))
    ids = policy.prompt_ids("?", [image])
    with pytest.raises(ValueError, match="more image place holders"):
        policy.positions(ids, [])
    with pytest.raises(ValueError, match="do not match"):
        policy.positions(ids, [image, image])
    with pytest.raises(ValueError, match="4 image place holders but 0"):
        policy.hidden(torch.tensor([ids]), policy.positions(ids, [image])[:, None],
                      torch.ones(1, len(ids)), [])


def test_an_image_given_twice_is_computed_once(policy, monkeypatch):
    image, other = policy.image_input(photograph(112, 112)), policy.image_input(photograph(56, 112))
    seen = []
    visual = policy.model.model.visual
    monkeypatch.setattr(visual, "forward", lambda patches, grid_thw, **k: (
        seen.append(len(grid_thw)), type(visual).forward(visual, patches, grid_thw=grid_thw,
                                                         **k))[1])
    with torch.no_grad():
        features = policy.features([image, other, image])
    assert seen == [2]
    assert torch.equal(features[0], features[2])
    assert [len(f) for f in features] == [policy.image_tokens(i) for i in (image, other, image)]


def test_barred_ids_have_no_probability(policy):
    """Role marks and image pads can be neither sampled nor scored; the end of a turn can."""
    with torch.no_grad():
        log_probs = policy.log_probs(torch.randn(3, policy.model.config.text_config.hidden_size))
    for barred in (policy.im_start, policy.image_pad, policy.vision_start, policy.vision_end):
        assert (log_probs[:, barred] == -torch.inf).all()
    assert torch.isfinite(log_probs[:, policy.im_end]).all()
    torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(3))


def test_temperature_divides_the_logits(policy):
    hidden = torch.randn(2, policy.model.config.text_config.hidden_size)
    with torch.no_grad():
        cold, warm = policy.log_probs(hidden, 0.5), policy.log_probs(hidden, 1.0)
    allowed = ~policy.barred
    torch.testing.assert_close(cold[:, allowed], torch.log_softmax(2 * warm[:, allowed], -1))


def test_saved_and_loaded_again_it_is_the_same(policy, tmp_path):
    policy.save(tmp_path / "model")
    again = load(str(tmp_path / "model"))
    assert again.system_prompt == policy.system_prompt
    for name, weight in policy.model.state_dict().items():
        assert torch.equal(weight, again.model.state_dict()[name]), name


@pytest.mark.parametrize("spoil, message", [
    (lambda folder: shutil.rmtree(folder), "does not exist"),
    (lambda folder: (folder / "model.safetensors").unlink(), "cannot load"),
    (lambda folder: (folder / "model.safetensors").write_bytes(
        (TINY / "model.safetensors").read_bytes()[:100_000]), "cannot load"),
    (lambda folder: (folder / "config.json").write_text("{"), "cannot load"),
    (lambda folder: (folder / "tokenizer.json").unlink(), "cannot load|no <"),
    (lambda folder: (folder / "config.json").write_text(json.dumps(
        json.loads((TINY / "config.json").read_text()) | {"model_type": "qwen2_vl"})),
     "written for qwen2_5_vl"),
])
def test_a_model_folder_that_is_not_right(tmp_path, spoil, message):
    folder = tmp_path / "model"
    shutil.copytree(TINY, folder)
    spoil(folder)
    with pytest.raises(PolicyError, match=message):
        load(str(folder))


def test_a_checkpoint_without_some_tensors_is_refused(policy, tmp_path):
    from safetensors.torch import load_file, save_file
    folder = tmp_path / "model"
    shutil.copytree(TINY, folder)
    weights = load_file(folder / "model.safetensors")
    weights.pop(next(name for name in weights if "layers.1" in name))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PolicyError, match="lacks 1 tensors"):
        load(str(folder))
