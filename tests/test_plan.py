"""--plan: the counts equal the published numbers, the memory equals that of real tensors, counted
one by one, and the targets hold."""

import dataclasses
import json
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

import arft
from arft import Config, main
from conftest import ROOT
from extras import plan, setup, weights
from policy import LoRA

M3, M7 = "Qwen/Qwen2.5-VL-3B-Instruct", "Qwen/Qwen2.5-VL-7B-Instruct"


def completed(**changes) -> Config:
    config = Config(**{"model": M3, "data": ".", "device": "cpu", "plan_device": "H200"} | changes)
    setup.complete(config)
    return config


def planned(config):
    """(shapes, memory by phase) of a configuration."""
    shape = plan.shapes_of(plan.model_config(config.model), config)
    return shape, plan.memory_by_phase(shape, config)


# --- shapes ---------------------------------------------------------------------------------------


# The weights are those of the hub's pages; keys and values are computed by hand.
@pytest.mark.parametrize("name, total, kv", [
    (M3, 3_754_622_976, 2 * 36 * 2 * 128 * 2), (M7, 8_292_166_656, 2 * 28 * 4 * 128 * 2),
    ("Qwen/Qwen2.5-VL-32B-Instruct", 33_452_718_336, 2 * 64 * 8 * 128 * 2),
    ("Qwen/Qwen2.5-VL-72B-Instruct", 73_410_777_344, 2 * 80 * 8 * 128 * 2)])
def test_the_published_models_are_counted_exactly(name, total, kv):
    """kv: keys and values, layers, key-value heads, 128 numbers each, 2 bytes."""
    shape = plan.shapes_of(plan.model_config(name), completed())
    assert (shape.total, shape.kv_bytes) == (total, kv)


def test_adapters_are_counted_as_they_are_made(fresh_policy, monkeypatch):
    fresh_policy.add_lora(8, 8.0, "q_proj,down_proj")
    monkeypatch.setattr(plan, "LORA_TARGETS", "q_proj,down_proj")
    shape = plan.shapes_of(plan.model_config(str(ROOT / "data" / "tiny")), Config(lora_rank=8))
    assert shape.adapters == sum(a.A.numel() + a.B.numel() for a in fresh_policy.adapters.values())
    assert shape.total == sum(w.numel() for w in fresh_policy.model.parameters()) - shape.adapters


def test_the_planned_episode_by_hand():
    """720 / 28 = 25.7, so an image is 26 x 26 = 676 image tokens of 4 patches. Three turns of 256
    tokens; a reply of text alone, and one with an image."""
    episode = plan.lengths_of(plan.shapes_of(plan.model_config(M3), completed()), completed())
    assert (episode.prompt, episode.sampled, episode.observed) == (260 + 676, 3 * 256,
                                                                   24 + 24 + 676)
    assert (episode.images, episode.patches, episode.total) == (2, 2704, 2428)


# --- memory, compared with real tensors -----------------------------------------------------------


class Live(TorchDispatchMode):
    """Counts the bytes of the tensors that are made inside and still alive, and their peak."""

    def __init__(self):
        super().__init__()
        self.known, self.now, self.peak = {}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                old = self.known.get(key)
                if old is None or old() is None:
                    self.known[key] = weakref.ref(storage)
                    self.now += size
                    weakref.finalize(storage, self.gone, size)
                    self.peak = max(self.peak, self.now)
        return out

    def gone(self, size):
        self.now -= size


@pytest.fixture(params=[0, 8], ids=["full", "lora"])
def small(request):
    """A model in the proportions of 3B, small enough to run: (language model, shapes, options)."""
    config = Qwen2_5_VLConfig(
        text_config={"hidden_size": 256, "intermediate_size": 1376, "num_hidden_layers": 2,
                     "num_attention_heads": 2, "num_key_value_heads": 1,
                     "vocab_size": 512, "tie_word_embeddings": True},
        vision_config={"depth": 1, "hidden_size": 64, "intermediate_size": 64, "num_heads": 2,
                       "out_hidden_size": 256},
        tie_word_embeddings=True)
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(config).bfloat16().model.language_model
    if request.param:
        model.requires_grad_(False)
        for block in model.layers:
            for part in (block.self_attn, block.mlp):
                for name, linear in list(part.named_children()):
                    if isinstance(linear, torch.nn.Linear):
                        setattr(part, name, LoRA(linear, request.param, 8.0))
    options = Config(lora_rank=request.param)
    return model, plan.shapes_of(config, options), options


def forward(model, width, tokens, cache=None):
    x = torch.randn(1, tokens, width, dtype=torch.bfloat16, requires_grad=torch.is_grad_enabled())
    return model(inputs_embeds=x, position_ids=torch.arange(tokens).expand(3, 1, -1),
                 past_key_values=cache, use_cache=cache is not None).last_hidden_state


def test_what_backward_keeps_of_a_block_is_what_the_plan_says(small):
    """We count the saved tensors by storage, without weights and their copies. The difference of
    two lengths removes the constant part."""
    model, shape, options = small
    of_weights = {w.untyped_storage()._cdata for w in model.parameters()}

    def saved(tokens):
        kept = {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage._cdata not in of_weights:
                kept[storage._cdata] = storage.nbytes()
            return tensor
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = forward(model, shape.width, tokens)
        return sum(kept.values()), out
    (more, _a), (less, _b) = saved(48), saved(32)
    measured = (more - less) / 16 / shape.layers
    assert plan.saved_bytes(shape, options) == pytest.approx(measured, rel=0.05)


def test_what_a_forward_pass_takes_is_what_the_plan_says(small):
    model, shape, options = small

    def taken(tokens):
        cache = DynamicCache()
        with torch.no_grad(), Live() as live:
            forward(model, shape.width, tokens, cache)
        return live.peak
    measured = (taken(320) - taken(256)) / 64 - shape.kv_bytes
    assert plan.forward_bytes(shape, options) == pytest.approx(measured, rel=0.2)


# --- the targets ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name, changes, limit", [
    (M3, {"lora_rank": 16, "rollout_batch": 16}, 16e9),
    (M7, {"lora_rank": 16, "rollout_batch": 16}, 28e9),
    (M3, {"lora_rank": 0, "rollout_batch": 32}, 80e9)], ids=["LoRA 3B", "LoRA 7B", "full 3B"])
def test_the_targets_hold(name, changes, limit):
    """Groups of 8, three turns, images of 720 x 720, and the defaults for everything else."""
    _, memory = planned(completed(model=name, **changes))
    assert plan.peak_bytes(memory) < limit, "\n".join(plan.table_lines(memory))


def test_full_training_of_3b_by_hand():
    """A weight takes 2 bytes in bfloat16 and 2 in the reference. A trained weight takes 4 more for
    its master, 8 for its moments and 2 for its gradient. The tower is frozen."""
    update = planned(completed(lora_rank=0))[1]["update"]
    trained = 3_754_622_976 - 668_684_288
    assert update["weights"] == update["reference"] == 2 * 3_754_622_976
    assert update["master weights"] == 4 * trained
    assert (update["moments"], update["gradients"]) == (8 * trained, 2 * trained)
    without_kl = planned(completed(lora_rank=0, beta=0.0))[1]["update"]
    assert without_kl["reference"] == 0
    lora = planned(completed(lora_rank=16))[1]["update"]
    assert "reference" not in lora and lora["moments"] == 8 * 29_933_568


def test_the_rollout_batch_is_what_fits():
    assert completed().rollout_batch == completed().eval_batch == 128
    assert completed(plan_device="RTX4090").rollout_batch < 128
    small = completed(model=M7, plan_device="RTX4090")
    assert small.rollout_batch == 8 and completed(eval_batch=3).eval_batch == 3
    _, memory = planned(completed(model=M3, plan_device="RTX4090"))
    assert plan.phase_bytes(memory, "rollout") < 24e9


# --- what is printed ------------------------------------------------------------------------------


def test_plan_prints_the_peak_and_reads_no_weights(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(weights, "load", None)
    monkeypatch.chdir(tmp_path)
    assert main(["--task", "mat-coding", "--model", M7, "--plan", "--plan-device", "RTX4090",
                 "--lora-rank", "0"]) == 0
    said = capsys.readouterr().out
    for word in ("8,292,166,656 weights", "keys and values", "master weights", "activations",
                 "peak:", "RTX4090 has 24 GB", "This does not fit. In the", "--lora-rank 16",
                 "saves"):
        assert word in said, word
    assert list(tmp_path.iterdir()) == []
    assert main(["--plan", "--model", "someone/else"]) == 2
    assert "someone/else" in capsys.readouterr().err


# --- out of memory --------------------------------------------------------------------------------


def test_out_of_memory_ends_with_the_options_to_lower(tmp_path, monkeypatch, capsys):
    """The error is raised in the update of a real run. The savings are differences of two plans."""
    def update(*arguments, **more):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    monkeypatch.setattr(arft, "update", update)
    true = plan.model_config
    # The small model is planned as if it were 3B.
    monkeypatch.setattr(plan, "model_config", lambda name: true(M3))
    code = main(["--steps", "1", "--samples-per-step", "2", "--group-size", "4",
                 "--eval-samples", "1", "--eval-sampled", "off", "--max-turns", "2",
                 "--max-new-tokens", "48", "--micro-batch-tokens", "8192",
                 "--out", str(tmp_path / "run")])
    said = capsys.readouterr().err
    assert code == 1 and "the GPU's memory is full (update)" in said and "Traceback" not in said
    kept = json.loads((tmp_path / "run" / "config.json").read_text())
    names = {field.name for field in dataclasses.fields(Config)}
    config = Config(**{name: value for name, value in kept.items() if name in names})
    less = dataclasses.replace(config, micro_batch_tokens=config.micro_batch_tokens // 2)
    now, then = (plan.phase_bytes(planned(options)[1], "update") for options in (config, less))
    assert f"--micro-batch-tokens {less.micro_batch_tokens}" in said
    assert f"saves {(now - then) / 1e9:.1f} GB" in said


def test_the_savings_belong_to_the_phase():
    config = completed(lora_rank=0)
    shape, _ = planned(config)
    rollout, update = ("\n".join(plan.savings(shape, config, phase))
                       for phase in ("rollout", "update"))
    assert "--rollout-batch 64" in rollout and "--micro-batch-tokens" not in rollout
    assert "--rollout-batch" not in update and "--lora-rank 16" in update and "--beta 0" in update
    saved = [float(line.split()[-2]) for line in update.splitlines()]
    assert saved == sorted(saved, reverse=True) and min(saved) > 0
