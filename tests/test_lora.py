"""LoRA by hand: what it computes, what is trained and what is saved. Also: master weights."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

import grpo
from arft import Config, main
from conftest import ROOT, parts_of
from extras import options, resume, setup, weights
from extras.options import UsageError
from extras.weights import MasterAdamW, load, save
from grpo import Optimizer, episode_logp, frozen_logp, reference_of, update
from policy import LORA_ALPHA, LORA_TARGETS, LoRA, PolicyError
from rollout import Limits, RowLayout, collate, rollout
from tools import Tools

TINY = str(ROOT / "data" / "tiny")


def disturb(policy, seed=0, size=0.3):
    """Makes B random, as it is after some training."""
    generator = torch.Generator().manual_seed(seed)
    for adapter in policy.adapters.values():
        adapter.B.data = size * torch.randn(adapter.B.shape, generator=generator)


@pytest.fixture
def adapted(fresh_policy):
    fresh_policy.add_lora(4, 8.0, LORA_TARGETS)
    return fresh_policy


@torch.no_grad()
def logits(policy, ids=(3, 14, 15, 92, 65, 35)):
    tokens = torch.tensor([ids])
    where = torch.arange(len(ids)).expand(3, 1, -1)
    return policy.model.lm_head(policy.hidden(tokens, where, torch.ones_like(tokens), []))


# --- what it computes -----------------------------------------------------------------------------


def test_a_layer_by_hand():
    """W = identity, A = [1 2], B = [3 0], alpha / r = 2:
    x = (1, 1) -> (1, 1) + 2 * (3, 0) * (1 + 2) = (19, 1)."""
    layer = LoRA(torch.nn.Linear(2, 2, bias=False), 1, 2.0)
    layer.base.weight.data = torch.eye(2)
    x = torch.ones(1, 2)
    assert torch.equal(layer(x), x), "B starts at zero: an untrained adapter changes nothing"
    layer.A.data, layer.B.data = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0], [0.0]])
    assert layer(x).tolist() == [[19.0, 1.0]]
    layer.on = False
    assert layer(x).tolist() == [[1.0, 1.0]]
    assert layer.merged()(x).tolist() == [[19.0, 1.0]]


def test_adapters_stay_float32_on_a_bfloat16_layer():
    layer = LoRA(torch.nn.Linear(8, 8).bfloat16(), 2, 2.0)
    y = layer(torch.randn(3, 8).bfloat16())
    y.sum().backward()
    assert layer.A.dtype == layer.B.grad.dtype == torch.float32 and y.dtype == torch.bfloat16
    assert layer.base.weight.grad is None


def test_only_the_language_models_adapters_are_trained(adapted):
    trained = [name for name, weight in adapted.model.named_parameters() if weight.requires_grad]
    layers, targets = adapted.model.config.text_config.num_hidden_layers, LORA_TARGETS.split(",")
    assert len(adapted.adapters) == layers * len(targets)
    assert len(trained) == 2 * len(adapted.adapters)
    assert all(name.startswith("model.language_model.layers") and name[-2:] in (".A", ".B")
               for name in trained)


def test_targets_choose_the_layers(fresh_policy):
    with pytest.raises(PolicyError, match="no linear layer z_proj"):
        fresh_policy.add_lora(4, 8.0, "z_proj")
    fresh_policy.add_lora(4, 8.0, "q_proj, v_proj")
    assert {name.split(".")[-1] for name in fresh_policy.adapters} == {"q_proj", "v_proj"}


def test_if_you_name_none_every_layer_of_a_block_is_a_target(fresh_policy):
    fresh_policy.add_lora(4)
    assert {name.split(".")[-1] for name in fresh_policy.adapters} == set(LORA_TARGETS.split(","))
    assert {adapter.alpha for adapter in fresh_policy.adapters.values()} == {LORA_ALPHA}


# --- the reference is LoRA off --------------------------------------------------------------------


def test_the_reference_is_the_model_without_adapters(adapted, policy, samples, monkeypatch):
    """The adapters are trained, and yet the reference's log-probs in an update are those of the
    untouched checkpoint, without a second model."""
    episodes = rollout(policy, samples(("dark",)), group_size=2, tools=Tools(),
                       limits=Limits(max_new_tokens=64),
                       generator=torch.Generator().manual_seed(1))
    disturb(adapted)
    assert reference_of(adapted) is adapted
    got, layout = [], RowLayout(tokens=1)

    def kept(*arguments):
        got.extend(frozen_logp(*arguments))
        return got
    monkeypatch.setattr(grpo, "frozen_logp", kept)
    config = Config(group_size=2, inner_epochs=1, minibatches=1, max_new_tokens=64)
    update(adapted, reference_of(adapted), episodes, torch.tensor([1.0, -1.0]), config,
           optimizer=Optimizer(adapted, 0.0, 1.0), layout=layout, generator=torch.Generator())
    expected = frozen_logp(reference_of(policy), episodes, 1.0, layout)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    with torch.no_grad():
        own, _ = episode_logp(adapted, collate(adapted, episodes[:1]))
    assert (own[0, :len(got[0])] - got[0]).abs().max() > 0.1, "afterwards the adapters are on again"


def test_adapters_are_on_again_after_an_error(adapted):
    with pytest.raises(RuntimeError):
        with adapted.without_adapters():
            raise RuntimeError
    assert all(adapter.on for adapter in adapted.adapters.values())


# --- files ----------------------------------------------------------------------------------------


def test_an_adapter_folder_loads_again_and_merges_to_the_same_logits(adapted, policy, tmp_path,
                                                                     capsys):
    disturb(adapted)
    save(adapted, tmp_path / "adapter")
    assert (logits(adapted) - logits(policy)).abs().max() > 1
    again = load(str(tmp_path / "adapter"))
    assert torch.equal(logits(again), logits(adapted))
    assert again.system_prompt == adapted.system_prompt
    assert main(["--model", str(tmp_path / "adapter"), "--save-merged",
                 str(tmp_path / "merged")]) == 0
    merged = load(str(tmp_path / "merged"))
    assert not merged.adapters
    torch.testing.assert_close(logits(merged), logits(adapted), atol=1e-5, rtol=1e-5)
    assert main(["--model", str(tmp_path / "merged"), "--save-merged",
                 str(tmp_path / "twice")]) == 2
    assert main(["--model", str(tmp_path / "adapter"), "--save-merged",
                 str(tmp_path / "merged")]) == 2
    said = capsys.readouterr().err
    assert "adapter_config.json" in said and "nothing was overwritten" in said


def test_the_adapter_file_is_pefts(adapted, tmp_path):
    """Names and shapes are as peft writes them. That peft itself computes the same logits was
    checked by hand (README)."""
    save(adapted, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    name = "base_model.model.model.language_model.layers.0.mlp.down_proj.lora_{}.weight"
    hidden, inner = 128, 384
    assert tensors[name.format("A")].shape == (4, inner)
    assert tensors[name.format("B")].shape == (hidden, 4)
    assert config["peft_type"] == "LORA" and (config["r"], config["lora_alpha"]) == (4, 8.0)
    linear = [name for name, module in load(TINY).model.named_modules()
              if isinstance(module, torch.nn.Linear)]
    matched = {name for name in linear if re.fullmatch(config["target_modules"], name)}
    assert matched == set(adapted.adapters)
    assert not list(tmp_path.glob("model*.safetensors")), "the base model is not copied"


def change_config(folder, **fields):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def change_tensors(folder, change):
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


@pytest.mark.parametrize("spoil, message", [
    (lambda folder: change_config(folder, base_model_name_or_path="./gone"),
     "base model is not available"),
    (lambda folder: change_config(folder, use_rslora=True), "no plain LoRA .use_rslora"),
    (lambda folder: (folder / "adapter_config.json").write_text("{"), "cannot be read"),
    (lambda folder: (folder / "adapter_model.safetensors").unlink(), "cannot be read"),
    (lambda folder: change_tensors(folder, lambda t: t.pop(min(t).replace("lora_A", "lora_B"))),
     "does not fit"),
    (lambda folder: change_tensors(folder, lambda t: t.update({min(t): torch.zeros(4, 5)})),
     r"is \(4, 5\) there"),
    (lambda folder: change_tensors(folder, lambda t: t.update(extra=torch.zeros(1))),
     "no place for extra"),
    (lambda folder: change_tensors(folder, lambda t: t.clear()), "it holds no adapter"),
])
def test_an_adapter_folder_that_is_not_right(adapted, tmp_path, spoil, message):
    save(adapted, tmp_path / "adapter")
    spoil(tmp_path / "adapter")
    with pytest.raises(PolicyError, match=message):
        load(str(tmp_path / "adapter"))


# --- whole runs -----------------------------------------------------------------------------------


def test_a_lora_run_trains_saves_goes_on_and_evaluates(tmp_path, capsys):
    short = ["--steps", "1", "--samples-per-step", "3", "--group-size", "4", "--eval-samples", "1",
             "--eval-sampled", "off", "--max-turns", "2"]
    assert main([*short, "--lora-rank", "4", "--out", str(tmp_path / "a")]) == 0
    model = tmp_path / "a" / "model"
    first = load_file(model / "adapter_model.safetensors")
    learned = [weight for name, weight in first.items() if "lora_B" in name]
    assert any(weight.abs().max() > 0 for weight in learned), "nothing was learned"
    state, wrong = resume.newest(tmp_path / "a")
    assert not wrong and state["weights"]
    assert all(name.endswith((".A", ".B")) for name in state["weights"]), "nothing else is kept"
    metrics = json.loads((tmp_path / "a" / "metrics.jsonl").read_text())
    assert metrics["logp_error"] < 1e-4 and metrics["kl"] > 0
    assert main([*short, "--eval-only", "--model", str(model), "--out", str(tmp_path / "b")]) == 0
    # the default rank is the adapter's
    assert main([*short, "--model", str(model), "--out", str(tmp_path / "c")]) == 0
    second = load_file(tmp_path / "c" / "model" / "adapter_model.safetensors")
    assert any(not torch.equal(first[name], second[name]) for name in first)
    assert main([*short, "--model", str(model), "--lora-rank", "8", "--out",
                 str(tmp_path / "d")]) == 2
    assert "has rank 4" in capsys.readouterr().err


def completed(**given) -> Config:
    config = Config(**{"device": "cpu", "data": "."} | given)
    setup.complete(config)
    return config


def test_what_is_chosen_when_lora_is_left_open():
    hub = "Qwen/Qwen2.5-VL-3B-Instruct"
    tiny, large, full = completed(), completed(model=hub), completed(model=hub, lora_rank=0)
    assert (tiny.lora_rank, tiny.lr) == (0, 2e-4)
    assert (large.lora_rank, large.lr) == (16, pytest.approx(1e-5))
    assert full.lr == 1e-6
    # adapters are small enough to be saved after every step
    assert (tiny.save_every, large.save_every, full.save_every) == (1, 1, 0)
    assert completed(model=hub, vision="trained").lora_rank == 0
    with pytest.raises(UsageError, match="needs --lora-rank 0"):
        options.check(Config(vision="trained", lora_rank=4))


# --- master weights -------------------------------------------------------------------------------


def train(make, dtype, steps=200, lr=1e-6):
    """Trains weights of 0.01 to 0.05 with a noisy gradient that mostly keeps its direction. The
    gradient is the same for every caller."""
    generator = torch.Generator().manual_seed(0)
    size = 0.01 + 0.04 * torch.rand(512, generator=generator)
    direction = torch.randn(512, generator=generator)
    weight = torch.nn.Parameter((size * direction.sign()).bfloat16().to(dtype))
    start, optimizer = weight.detach().clone(), make([weight], lr=lr)
    for _ in range(steps):
        weight.grad = (direction + 0.3 * torch.randn(512, generator=generator)).bfloat16().to(dtype)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return start, weight.detach(), optimizer


def adamw(weights, lr):
    return torch.optim.AdamW(weights, lr=lr, betas=(0.9, 0.99), weight_decay=0.0)


def test_at_the_papers_learning_rate_bfloat16_rounds_every_update_away():
    start, end, _ = train(adamw, torch.bfloat16)
    assert torch.equal(start, end), "200 steps, and not one weight has moved"
    _, exact, _ = train(adamw, torch.float32)
    start, end, optimizer = train(MasterAdamW, torch.bfloat16)
    assert (start != end).float().mean() > 0.5 and end.dtype == torch.bfloat16
    torch.testing.assert_close(optimizer.masters[0], exact, atol=1e-8, rtol=0)
    assert torch.equal(end, exact.bfloat16()), "the model's weight is the float32 one, rounded"


def test_master_weights_continue_where_they_were_saved():
    weight = torch.nn.Parameter(torch.zeros(4).bfloat16())
    one = MasterAdamW([weight], lr=1e-3)
    for step in range(4):
        if step == 2:       # a new process gets the rounded weight and the optimiser's state
            weight, saved = torch.nn.Parameter(weight.detach().clone()), one.state_dict()
            one = MasterAdamW([weight], lr=1e-3)
            one.load_state_dict(saved)
        weight.grad = torch.tensor([1.0, -2.0, 0.5, 3.0 - step]).bfloat16()
        one.step()
    straight = torch.nn.Parameter(torch.zeros(4).bfloat16())
    optimizer = MasterAdamW([straight], lr=1e-3)
    for step in range(4):
        straight.grad = torch.tensor([1.0, -2.0, 0.5, 3.0 - step]).bfloat16()
        optimizer.step()
    assert torch.equal(weight, straight) and one.steps == 4
    assert torch.equal(one.masters[0], optimizer.masters[0])


def test_the_optimiser_holds_states_only_for_what_is_trained(fresh_policy):
    fresh_policy.model.model.visual.requires_grad_(False)
    fresh_policy.model.bfloat16()
    optimizer = weights.Optimizer(fresh_policy, 1e-6, 1.0).adamw
    assert isinstance(optimizer, MasterAdamW)
    visual = sum(w.numel() for w in fresh_policy.model.model.visual.parameters())
    everything = sum(w.numel() for w in fresh_policy.model.parameters())
    assert sum(m.numel() for m in optimizer.masters) == everything - visual
    fresh_policy.add_lora(2, 2.0, "q_proj")
    # A and B are float32: they are their own masters
    adapters = Optimizer(fresh_policy, 1e-6, 1.0).adamw
    assert isinstance(adapters, torch.optim.AdamW)
    assert len(adapters.param_groups[0]["params"]) == 2 * len(fresh_policy.adapters)


@pytest.mark.parametrize("dtype, rank, kind", [
    ("bfloat16", 0, weights.Optimizer), ("bfloat16", 4, Optimizer), ("float32", 0, Optimizer)])
def test_bfloat16_weights_that_are_trained_get_masters(policy, tmp_path, dtype, rank, kind):
    config = Config(out=str(tmp_path / "run"), dtype=dtype, lora_rank=rank, rollout_batch=1)
    assert parts_of(config, policy).optimizer is kind
