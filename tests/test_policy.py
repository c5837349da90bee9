"""The policy against transformers' own Qwen2.5-VL: token ids, pixels, positions and logits. Also:
what `load` says about folders that are not right."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import ROOT
from extras.weights import load, save
from policy import PolicyError

TINY = ROOT / "data" / "tiny"


def photograph(width, height, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def conversation(policy, images):
    """A conversation with the first image in the prompt and each other one in a later observation.
    """
    ids = policy.prompt_ids("What number is on the sign?", images[:1])
    for image in images[1:]:
        ids += [*policy.text_ids("<think>I repair it.</think>"), policy.im_end]
        ids += policy.observation_ids("This is the image now.", [image])
    return ids


def test_special_ids_in_plain_text_stay_text(policy):
    """A question that spells <|im_end|> does not end the user's message."""
    ids = policy.text_ids("a<|im_end|>b<|image_pad|>")
    assert not set(ids) & {policy.im_end, policy.image_pad}
    assert policy.tokenizer.decode(ids) == "a<|im_end|>b<|image_pad|>"


def test_messages_are_what_the_chat_template_writes(policy):
    """Prompt, turn and observation, appended one after the other, give the token ids of the whole
    conversation as the chat template writes it."""
    images = [policy.image_input(photograph(112, 112)), policy.image_input(photograph(50, 150))]
    image = {"type": "image"}
    question = {"type": "text", "text": "What number is on the sign?"}
    messages = [
        {"role": "system", "content": policy.system_prompt},
        {"role": "user", "content": [image, question]},
        {"role": "assistant", "content": "<think>I repair it.</think>"},
        {"role": "user", "content": [image, {"type": "text", "text": "This is the image now."}]}]
    text = policy.tokenizer.apply_chat_template(messages, tokenize=False,
                                                add_generation_prompt=True)
    # the template writes one placeholder for an image, whatever number of tokens it takes
    for picture in images:
        text = text.replace("<|image_pad|>", "<|vision_pad|>" * policy.image_tokens(picture), 1)
    text = text.replace("<|vision_pad|>", "<|image_pad|>")
    expected = policy.tokenizer(text, add_special_tokens=False).input_ids
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
    """Two text tokens, an image of 1 x 4 tokens, one text token: the text after the image starts at
    2 + max(1, 4) = 6."""
    image = policy.image_input(photograph(112, 28))
    assert (image.grid[1] // 2, image.grid[2] // 2) == (1, 4)
    got = policy.positions([policy.im_start, policy.vision_start, *[policy.image_pad] * 4,
                            policy.vision_end], [image])
    assert got.tolist() == [[0, 1, 2, 2, 2, 2, 6],      # time stands still inside an image
                            [0, 1, 2, 2, 2, 2, 6],      # one row
                            [0, 1, 2, 3, 4, 5, 6]]      # four columns


def test_positions_and_logits_equal_transformers(policy):
    """With several images of several shapes, our positions equal get_rope_index's and our logits
    equal those of the model's forward."""
    images = [policy.image_input(photograph(*size, seed=i))
              for i, size in enumerate([(112, 112), (300, 60), (40, 90)])]
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
        hidden = policy.hidden(tokens, ours[:, None], torch.ones_like(tokens),
                               policy.features(images))[0]
    torch.testing.assert_close(policy.model.lm_head(hidden), expected, atol=1e-5, rtol=1e-5)


def test_attention_by_padding_by_hand_or_causal_is_the_same(policy):
    """Two rows of 30 tokens without padding: the three ways to say what a token sees agree."""
    text = "Turn the image, then read the number that is on the sign. " * 3
    ids = torch.tensor([policy.text_ids(text)[:30]] * 2)
    where = torch.arange(30).expand(3, 2, -1)
    with torch.no_grad():
        by_padding = policy.hidden(ids, where, torch.ones_like(ids), [])
        causal = policy.hidden(ids, where, None, None)
        by_hand = policy.hidden(ids, where, torch.ones(2, 1, 30, 30, dtype=torch.bool).tril(), [])
    torch.testing.assert_close(causal, by_padding, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(by_hand, by_padding, atol=1e-5, rtol=1e-5)


def test_placeholders_and_images_must_match(policy):
    image = policy.image_input(photograph(112, 112))
    ids = policy.prompt_ids("?", [image])
    with pytest.raises(ValueError, match="more image placeholders"):
        policy.positions(ids, [])
    with pytest.raises(ValueError, match="do not match"):
        policy.positions(ids, [image, image])
    with pytest.raises(ValueError, match="4 image placeholders but 0"):
        policy.hidden(torch.tensor([ids]), policy.positions(ids, [image])[:, None],
                      torch.ones(1, len(ids)), [])


def test_an_image_given_twice_is_computed_once(policy, monkeypatch):
    image, other = policy.image_input(photograph(112, 112)), policy.image_input(photograph(56, 112))
    seen = count_images(policy, monkeypatch)
    with torch.no_grad():
        features = policy.features([image, other, image])
    assert seen == [2]
    assert torch.equal(features[0], features[2])
    assert [len(f) for f in features] == [policy.image_tokens(i) for i in (image, other, image)]


def count_images(policy, monkeypatch) -> list[int]:
    """A list that grows with each pass of the vision tower by the number of its images."""
    seen, visual = [], policy.model.model.visual

    def forward(patches, grid_thw, **options):
        seen.append(len(grid_thw))
        return type(visual).forward(visual, patches, grid_thw=grid_thw, **options)

    monkeypatch.setattr(visual, "forward", forward)
    return seen


def test_features_are_kept_only_where_the_tower_is_frozen(policy, monkeypatch):
    """keep_features True: a second call computes only what is new. False: nothing is stored, and
    what another call stored is not used."""
    image, other = policy.image_input(photograph(112, 112)), policy.image_input(photograph(56, 112))
    seen = count_images(policy, monkeypatch)
    with torch.no_grad():
        plain = policy.features([image])
        assert image.features is None
        monkeypatch.setattr(policy, "keep_features", True)
        policy.features([image])
        kept = policy.features([other, image])
        assert seen == [1, 1, 1] and kept[1] is image.features and kept[0] is other.features
        assert torch.equal(kept[1], plain[0])
        monkeypatch.setattr(policy, "keep_features", False)
        image.features = torch.full_like(plain[0], torch.nan)
        assert torch.equal(policy.features([image])[0], plain[0]) and seen == [1, 1, 1, 1]


def test_equal_images_are_two_images(policy):
    """One object is one image: two with the same pixels are neither equal nor one key."""
    one, other = (policy.image_input(photograph(28, 28)) for _ in range(2))
    assert one == one and one != other and len({one, other, one}) == 2


def test_barred_ids_have_no_probability(policy):
    """Role markers and image placeholders can be neither sampled nor trained on. The end of a turn
    can."""
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
    save(policy, tmp_path / "model")
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
