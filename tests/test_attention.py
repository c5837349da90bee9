"""extras/attention.py: fewer calls of attention, and the same features and gradients."""

import copy
import json

import torch

from bench_vision import Count, inputs, towers
from extras import attention
from extras.weights import load, save

# Images of one size, one of another, a strip that makes a narrow window, and one that is a window.
GRIDS = [(52, 52), (52, 52), (30, 46), (2, 100), (4, 4)]


def test_windows_in_batches_give_the_same_features_and_gradients():
    plain, batched = towers(depth=2, whole=(1,))
    patches, grid = inputs(GRIDS)
    features = [tower(patches, grid_thw=grid).pooler_output for tower in (plain, batched)]
    assert torch.equal(*features)
    for one in features:
        one.square().sum().backward()
    for a, b in zip(plain.parameters(), batched.parameters()):
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=1e-6 * a.grad.abs().max().item())


def test_a_window_sees_itself_alone():
    q, k, v = torch.randn(3, 1, 2, 7, 4).unbind()
    bounds = torch.tensor([0, 3, 3, 5, 7])      # three sequences and an empty one
    seen, _ = attention.attend(None, q, k, v, None, scaling=0.3, cu_seq_lens_q=bounds)
    for start, stop in ((0, 3), (3, 5), (5, 7)):
        weights = (0.3 * q[0, :, start:stop] @ k[0, :, start:stop].mT).softmax(-1)
        by_hand = (weights @ v[0, :, start:stop]).transpose(0, 1)
        torch.testing.assert_close(seen[0, start:stop], by_hand)


def test_what_a_rollout_has_computed_serves_an_update():
    attention.sequences_by_length.cache_clear()
    _, batched = towers(depth=2, whole=(1,))
    patches, grid = inputs([(10, 14)])
    with torch.inference_mode():
        batched(patches, grid_thw=grid)
    batched(patches, grid_thw=grid).pooler_output.sum().backward()


def test_windows_of_one_size_share_a_call():
    counts = []
    for tower in towers(depth=4, whole=(1, 3)):
        with torch.no_grad(), Count() as count:
            tower(inputs([(52, 52)])[0], grid_thw=inputs([(52, 52)])[1])
        counts.append(count.attention)
    # 7 x 7 windows: the last of each row and column is 4 patches wide, so there are three sizes
    assert counts == [2 * 49 + 2, 2 * 3 + 2]


def test_a_loaded_model_computes_in_batches_and_is_saved_as_any_other(policy, tmp_path):
    assert policy.model.model.visual.config._attn_implementation == attention.NAME
    assert copy.deepcopy(policy.model).model.visual.config._attn_implementation == attention.NAME
    save(policy, tmp_path / "model")
    saved = (tmp_path / "model" / "config.json").read_text()
    assert attention.NAME not in saved and "vision_config" in json.loads(saved)
    again = load(str(tmp_path / "model")).model.model.visual.config
    assert again._attn_implementation == attention.NAME
