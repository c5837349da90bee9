"""GRPO by hand-computed numbers, by an independent slow version, and by properties."""

import math
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import grpo
from arft import choose_weights
from extras import weights
from extras.tree import TreeLayout
from grpo import (
    LOSS_TYPES, Optimizer, Settings, episode_logp, frozen_logp, group_advantages, policy_loss,
    reference_of, sampled_logp, teaching_rows, update)
from rollout import Limits, RowLayout, collate, rollout

# --- advantages -----------------------------------------------------------------------------------


def test_advantages_by_hand():
    """Rewards 3, 1, 1, 3: mean 2, deviation sqrt(4 / 3) = 1.1547 (divided by
    n - 1), so +-1 / (1.1547 + 1e-4)."""
    got = group_advantages(torch.tensor([3.0, 1.0, 1.0, 3.0], dtype=torch.float64), 4)
    one = 1 / (math.sqrt(4 / 3) + 1e-4)
    torch.testing.assert_close(got, torch.tensor([one, -one, -one, one], dtype=torch.float64))


def test_advantages_belong_to_their_own_group():
    """A group of high rewards must not look better than a group of low ones: each sums to zero."""
    rewards = torch.tensor([0.0, 1.0, 10.0, 11.0], dtype=torch.float64)
    got = group_advantages(rewards, 2)
    assert got.view(2, 2).sum(dim=1).abs().max() < 1e-12, (
        "your advantages are normalised over the batch")
    torch.testing.assert_close(got[:2], got[2:])
    by_batch = group_advantages(rewards, 2, "batch")
    torch.testing.assert_close(by_batch,
                               torch.tensor([-0.5, 0.5, -0.5, 0.5]).double() / (rewards.std()
            + 1e-4))
    torch.testing.assert_close(group_advantages(rewards, 2, "none"),
                               torch.tensor([-0.5, 0.5, -0.5, 0.5]).double())


def test_a_flat_group_teaches_nothing():
    # their float mean is not 0.1
    assert group_advantages(torch.tensor([0.1] * 7), 7).tolist() == [0.0] * 7


@pytest.mark.parametrize("rewards, size, message", [
    ([1.0, 2.0], 1, "groups of 1"), ([1.0, 2.0, 3.0], 2, "3 rewards"),
    ([1.0, math.nan], 2, "finite"),
    ([1.0, math.inf], 2, "finite")])
def test_rewards_that_make_no_groups(rewards, size, message):
    with pytest.raises(ValueError, match=message):
        group_advantages(torch.tensor(rewards), size)


def test_groups_of_equal_rewards_are_dropped_or_kept():
    """An episode that lies on the mean of a group of unequal rewards stays in."""
    advantages = group_advantages(torch.tensor([1.0, 1.0, 1.0, 0.0, 0.5, 1.0]), 3)
    assert advantages[4] == 0
    assert teaching_rows(advantages, Settings(group_size=3)) == [3, 4, 5]
    assert teaching_rows(advantages, Settings(group_size=3, zero_variance="keep")) == [*range(6)]


# --- the loss against plain loops -----------------------------------------------------------------


def slow_loss(logp, old, ref, A, mask, loss_type, low, high, beta, max_length):
    """The same loss, one token at a time, from the definitions; no tensor
    operation is shared with grpo.py."""
    B, T = mask.shape
    per_sequence, all_terms = [], []
    for i in range(B):
        tokens = [t for t in range(T) if mask[i, t] == 1]
        mean_log_ratio = sum(logp[i, t] - old[i, t] for t in tokens) / max(1, len(tokens))
        terms = []
        for t in tokens:
            rho = torch.exp(mean_log_ratio if loss_type == "gspo" else logp[i, t] - old[i, t])
            if loss_type == "cispo":
                term = -(rho.detach() if rho < high
                         else torch.tensor(high, dtype=torch.float64)) * A[i] * logp[i, t]
            else:
                bounded = 1 - low if rho < 1 - low else 1 + high if rho > 1 + high else rho
                one, other = rho * A[i], bounded * A[i]
                term = -(one if one < other else other)
            if ref is not None:
                d = ref[i, t] - logp[i, t]
                term = term + beta * (torch.exp(d) - d - 1)
            terms.append(term)
        all_terms += terms
        per_sequence.append(sum(terms) / max(1, len(terms)))
    if loss_type in ("dapo", "cispo"):
        return sum(all_terms) / max(1, len(all_terms))
    if loss_type == "dr_grpo":
        return sum(all_terms) / (B * max_length)
    return sum(per_sequence) / B


@pytest.mark.parametrize("with_reference", [True, False])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_loss_and_gradient_equal_the_slow_version(loss_type, with_reference):
    """To 1e-12 in float64, with ratios on both sides of the clip range,
    ragged masks and one empty row."""
    g = torch.Generator().manual_seed(3)
    B, T = 5, 7
    logp = (-torch.rand(B, T, generator=g, dtype=torch.float64) * 3).requires_grad_()
    old = logp.detach() + 0.4 * torch.randn(B, T, generator=g, dtype=torch.float64)
    old[0] -= 0.6       # a whole sequence that became likelier, so that gspo clips, too
    ref = logp.detach() + 0.5 * torch.randn(B, T, generator=g,
                                            dtype=torch.float64) if with_reference else None
    A = torch.tensor([0.9, -0.7, 0.2, -1.1, 1.0], dtype=torch.float64)
    mask = (torch.rand(B, T, generator=g) < 0.6).long()
    mask[4] = 0
    high = 1.2 if loss_type == "cispo" else 0.28
    loss, stats = policy_loss(logp, old, ref, A, mask, loss_type=loss_type, clip_low=0.2,
                              clip_high=high, beta=0.04,
                              max_length=11)
    gradient, = torch.autograd.grad(loss, logp)
    expected = slow_loss(logp, old, ref, A, mask, loss_type, 0.2, high, 0.04, 11)
    expected_gradient, = torch.autograd.grad(expected, logp)
    assert abs(loss - expected) < 1e-12
    assert (gradient - expected_gradient).abs().max() < 1e-12
    assert gradient[mask == 0].abs().max() == 0
    assert 0 < stats["clip_fraction"] < 1 and (stats["kl"] > 0) == with_reference


def test_at_the_first_step_the_loss_is_zero_and_its_gradient_is_not():
    """Ratio 1: the group's advantages cancel in the loss, and the gradient
    is REINFORCE's, -A / (B T)."""
    logp = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    A = group_advantages(torch.tensor([1.0, 0.0, 0.0, 1.0], dtype=torch.float64), 4)
    loss, stats = policy_loss(logp, logp.detach(), logp.detach(), A, torch.ones(4, 3))
    loss.backward()
    assert (abs(loss.item()) < 1e-12 and stats["ratio"] == 1 and stats["clip_fraction"] == 0
            and stats["kl"] == 0)
    torch.testing.assert_close(logp.grad, -A[:, None].expand(4, 3) / 12)


@pytest.mark.parametrize("advantage, log_ratio, moves", [
    (+1, +0.5, False),      # already much likelier and good: no further push
    (+1, -0.5, True),       # good but less likely than before: push it back
    (-1, -0.5, False),      # already much less likely and bad: no further push
    (-1, +0.5, True)])      # bad and likelier than before: push it down
def test_clipping_stops_the_gradient_where_it_should(advantage, log_ratio, moves):
    logp = torch.tensor([[-1.0]], requires_grad=True)
    loss, stats = policy_loss(logp, logp.detach() - log_ratio, None,
                              torch.tensor([float(advantage)]), torch.ones(1, 1))
    loss.backward()
    assert (logp.grad.abs().item() > 0) == moves
    assert stats["clip_fraction"] == (0 if moves else 1)


def test_k3_estimates_kl_of_policy_from_reference():
    """Exact enumeration over five tokens: E_policy[k3] = KL(policy ||
    reference), not the other way round."""
    policy = torch.log_softmax(torch.tensor([2.0, 1.0, 0.0, -1.0, 0.5], dtype=torch.float64), 0)
    reference = torch.log_softmax(torch.tensor([0.0, 1.5, 1.0, 0.0, -1.0], dtype=torch.float64), 0)
    exact = (policy.exp() * (policy - reference)).sum()
    reverse = (reference.exp() * (reference - policy)).sum()
    k3 = torch.stack([torch.tensor(policy_loss(
        policy[i].view(1, 1), policy[i].view(1, 1), reference[i].view(1, 1),
        torch.zeros(1).double(),
        torch.ones(1, 1))[1]["kl"]) for i in range(5)]).double()
    assert (k3 >= 0).all()
    assert abs((policy.exp() * k3).sum() - exact) < 1e-6
    assert abs(exact - reverse) > 0.1


def test_what_stands_off_the_mask_never_counts():
    """Not even infinities: observations and padding hold no log-probs at all."""
    logp = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    junk = torch.tensor([[-1.5, torch.inf]])
    loss, _ = policy_loss(logp, junk, junk, torch.ones(1), torch.tensor([[1, 0]]))
    loss.backward()
    assert torch.isfinite(loss) and logp.grad[0, 1] == 0 and torch.isfinite(logp.grad).all()


def test_unknown_names_are_refused():
    one = torch.ones(1, 1)
    with pytest.raises(ValueError, match="loss_type 'ppo'"):
        policy_loss(one, one, None, torch.ones(1), one, loss_type="ppo")
    with pytest.raises(ValueError, match="max_length"):
        policy_loss(one, one, None, torch.ones(1), one, loss_type="dr_grpo")
    with pytest.raises(ValueError, match="scale 'all'"):
        group_advantages(torch.ones(2), 2, "all")


# --- whole updates on the embedded checkpoint -----------------------------------------------------


def options(**changes):
    """What an update reads of the options, and how its episodes become tensors."""
    base = dict(inner_epochs=1, minibatches=1, micro_batch_tokens=10 ** 6, update="rows",
                checkpointing=False, temperature=1.0, loss_type="grpo", clip_low=0.2, clip_high=0.2,
                beta=0.04, max_sampled=480, max_grad_norm=1e9, group_size=1, zero_variance="keep")
    return SimpleNamespace(**base | changes)


def layout_of(config):
    layout = TreeLayout if config.update == "tree" else RowLayout
    around = weights.checkpointing if config.checkpointing else nullcontext
    return layout(config.micro_batch_tokens, around)


def update_with(policy, reference, episodes, advantages, adamw, config, seed=0):
    """grpo.update with any optimiser of torch's."""
    optimizer = Optimizer(policy, 1e-3, config.max_grad_norm)
    optimizer.adamw = adamw
    return update(policy, reference, episodes, advantages, config, optimizer=optimizer,
                  layout=layout_of(config), generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def episodes(fresh_policy, samples, tools):
    return rollout(fresh_policy, samples(("dark",), ("rotation90", "noise")), group_size=4,
                   tools=tools, limits=Limits(max_new_tokens=96),
                   generator=torch.Generator().manual_seed(1))


def gradients_of(policy, reference, episodes, advantages, config):
    """The gradients that the optimiser is given, one for each of its steps
    (it changes nothing), and the statistics."""
    seen = []

    def record():
        seen.append(torch.cat([w.grad.flatten() for w in policy.model.parameters()
                               if w.grad is not None]))
    recorder = SimpleNamespace(zero_grad=lambda set_to_none: policy.model.zero_grad(), step=record)
    return seen, update_with(policy, reference, episodes, advantages, recorder, config)


def gradient_of(policy, reference, episodes, advantages, config):
    return gradients_of(policy, reference, episodes, advantages, config)[0][0]


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_micro_batches_change_nothing(fresh_policy, episodes, loss_type):
    """One episode at a time or all at once: the same gradient, for every way of weighing tokens."""
    reference = reference_of(fresh_policy)
    with torch.no_grad():       # a reference elsewhere, so that the KL term has a gradient
        reference.model.lm_head.weight.mul_(1.1)
    A = group_advantages(torch.arange(8.0), 4)
    config = options(loss_type=loss_type, clip_high=5.0 if loss_type == "cispo" else 0.2)
    whole = gradient_of(fresh_policy, reference, episodes, A, config)
    config.micro_batch_tokens = 3 * max(len(e.ids) for e in episodes)
    parts = gradient_of(fresh_policy, reference, episodes, A, config)
    assert (whole - parts).abs().max() < 1e-4 * whole.abs().max()


@pytest.mark.parametrize("embeddings", ["trained", "frozen"])
@pytest.mark.parametrize("vision", ["trained", "frozen"])
def test_checkpointing_keeps_less_and_changes_nothing(fresh_policy, episodes, vision, embeddings):
    """The same gradient, also where no input of the first layer needs one;
    and the layers are themselves again."""
    model = fresh_policy.model.model
    model.visual.requires_grad_(vision == "trained")
    model.language_model.embed_tokens.requires_grad_(embeddings == "trained")
    A, kept, gradients = group_advantages(torch.arange(8.0), 4), [], []
    for on in (False, True):
        sizes = []

        def keep(t, sizes=sizes):
            sizes.append(t.numel())
            return t
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            gradients.append(gradient_of(fresh_policy, None, episodes, A,
                                         options(checkpointing=on)))
        kept.append(sum(sizes))
    torch.testing.assert_close(*gradients, atol=1e-7, rtol=1e-5)
    assert kept[1] < kept[0] / 3
    assert not any("forward" in vars(layer)
                   for layer in [*model.language_model.layers, *model.visual.blocks])


def test_a_frozen_tower_sees_each_image_once_a_step(fresh_policy, samples, tools, monkeypatch):
    """Rollout, two passes of the update and the reference: one row of the
    tower's grid for each different image."""
    seen, visual = [], type(fresh_policy.model.model.visual)
    forward = visual.forward
    monkeypatch.setattr(visual, "forward", lambda self, patches, grid_thw, **k: (
        seen.append(len(grid_thw)), forward(self, patches, grid_thw=grid_thw, **k))[1])
    generator = torch.Generator().manual_seed(1)
    for vision in ("trained", "frozen"):
        seen.clear()
        choose_weights(fresh_policy, SimpleNamespace(lora_rank=0, vision=vision))
        reference, config = reference_of(fresh_policy), options(inner_epochs=2,
                                                                micro_batch_tokens=400)
        made = rollout(fresh_policy, samples(("dark",), ("rotation90", "noise")), group_size=4,
                       tools=tools, limits=Limits(max_new_tokens=96), generator=generator)
        adamw = torch.optim.AdamW(fresh_policy.model.parameters(), lr=1e-3)
        update_with(fresh_policy, reference, made, group_advantages(torch.arange(8.0), 4), adamw,
                    config)
        frozen_logp(fresh_policy, made[:4], 1.0, layout_of(config))
        images = {image for episode in made for image in episode.images}
        assert {image.features is not None for image in images} == {vision == "frozen"}
        assert len(images) > 2, "no episode has a tool image: this would prove nothing"
        assert sum(seen) == len(images) if vision == "frozen" else sum(seen) > 3 * len(images)


def test_kept_features_change_nothing(fresh_policy, episodes):
    """Not even where they were made in the inference mode of the rollout, or
    by the policy for its reference."""
    fresh_policy.model.model.visual.requires_grad_(False)
    reference = reference_of(fresh_policy)
    with torch.no_grad():
        reference.model.lm_head.weight.mul_(1.1)
    A = group_advantages(torch.arange(8.0), 4)
    plain = gradient_of(fresh_policy, reference, episodes, A, options())
    assert all(image.features is None for episode in episodes for image in episode.images)
    fresh_policy.keep_features = reference.keep_features = True
    with torch.inference_mode():
        fresh_policy.features(episodes[0].images)
    kept = gradient_of(fresh_policy, reference, episodes, A, options())
    torch.testing.assert_close(kept, plain, atol=1e-6, rtol=1e-5)
    assert all(image.features is not None for episode in episodes for image in episode.images)


def test_minibatches_share_the_gradient_of_the_whole(fresh_policy, episodes):
    """Each episode with its own advantage, each gradient from zero: while the policy stands still,
    their mean is the gradient of all episodes at once."""
    A = group_advantages(torch.tensor([3.0, 0, 1, 0, 0, 1, 0, 5]), 4)
    whole = gradient_of(fresh_policy, None, episodes, A, options())
    parts, _ = gradients_of(fresh_policy, None, episodes, A, options(minibatches=2, inner_epochs=2))
    assert len(parts) == 4
    for one, other in (parts[:2], parts[2:]):
        assert (one - other).abs().max() > 0.1 * whole.abs().max()
        assert ((one + other) / 2 - whole).abs().max() < 1e-4 * whole.abs().max()


def test_a_long_gradient_is_scaled_down_and_recorded_as_it_was(fresh_policy, episodes):
    A = group_advantages(torch.arange(8.0), 4)
    (free,), _ = gradients_of(fresh_policy, None, episodes, A, options())
    (short,), stats = gradients_of(fresh_policy, None, episodes, A, options(max_grad_norm=0.01))
    assert stats["grad_norm"] == pytest.approx(free.norm().item(), rel=1e-4) and free.norm() > 0.1
    torch.testing.assert_close(short, free * 0.01 / free.norm(), atol=1e-6, rtol=1e-3)


def test_the_update_scores_at_the_temperature_of_sampling(fresh_policy, samples, tools):
    """At 0.6 as at 1: before the first step every ratio is 1 and the
    reference, the same model, agrees."""
    episodes = rollout(fresh_policy, samples(("dark",), ("noise",)), group_size=4, tools=tools,
                       limits=Limits(temperature=0.6, max_new_tokens=48),
                       generator=torch.Generator().manual_seed(1))
    stats = {t: gradients_of(fresh_policy, reference_of(fresh_policy), episodes,
                             group_advantages(torch.arange(8.0), 4),
                             options(temperature=t))[1] for t in (0.6, 1.0)}
    assert stats[0.6]["logp_error"] < 1e-4 and stats[0.6]["kl"] < 1e-6
    assert stats[1.0]["logp_error"] > 0.1, "this would prove nothing"


def test_inner_epochs_move_ratio_and_clip_and_leave_the_reference_alone(fresh_policy, episodes):
    reference = reference_of(fresh_policy)
    frozen = {k: v.clone() for k, v in reference.model.state_dict().items()}
    A = group_advantages(torch.tensor([1.0, 0, 0, 1, 0, 1, 1, 0]), 4)

    adamw = torch.optim.AdamW(fresh_policy.model.parameters(), lr=1e-3)
    stats = update_with(fresh_policy, reference, episodes, A, adamw,
                        options(inner_epochs=3, minibatches=2))
    assert (stats["updates"] == 6 and stats["clip_fraction"] > 0 and stats["kl"] > 0
            and abs(stats["ratio"] - 1) > 1e-4)
    assert all(torch.equal(frozen[k], v) for k, v in reference.model.state_dict().items())


def test_training_makes_good_episodes_likelier(fresh_policy, episodes):
    """After a step the rewarded episode gained log-probability and the punished one lost it."""
    A = group_advantages(torch.tensor([1.0, 0, 0, 0, 0, 0, 0, 1]), 4)
    batch = collate(fresh_policy, episodes)
    with torch.no_grad():
        before = episode_logp(fresh_policy, batch)[0].sum(1)
    sgd = torch.optim.SGD(fresh_policy.model.parameters(), lr=1e-2)
    update_with(fresh_policy, None, episodes, A, sgd, options(loss_type="dapo"))
    with torch.no_grad():
        gained = episode_logp(fresh_policy, batch)[0].sum(1) - before
    assert (gained * A).sum() > 0


def test_a_gradient_that_is_not_finite_is_skipped_and_counted(fresh_policy, episodes):
    weights = [w.clone() for w in fresh_policy.model.parameters()]
    adamw = torch.optim.AdamW(fresh_policy.model.parameters(), lr=1e-3)
    stats = update_with(fresh_policy, None, episodes, torch.full((8,), torch.nan), adamw, options())
    assert stats["skipped_updates"] == 1 and stats["updates"] == 0
    assert all(torch.equal(a, b) for a, b in zip(weights, fresh_policy.model.parameters()))


def test_entropy_of_a_known_distribution(fresh_policy, episodes, monkeypatch):
    """Uniform over the allowed ids: entropy is log of their number, wherever the policy sampled."""
    uniform = torch.zeros(fresh_policy.barred.shape).masked_fill(fresh_policy.barred, -torch.inf)
    monkeypatch.setattr(fresh_policy, "log_probs", lambda hidden, t: torch.log_softmax(
        uniform.expand(*hidden.shape[:-1], -1), -1) + 0 * hidden.sum(-1, keepdim=True))
    batch = collate(fresh_policy, episodes)
    _, entropy = episode_logp(fresh_policy, batch)
    expected = math.log(int((~fresh_policy.barred).sum()))
    torch.testing.assert_close(entropy[batch.mask == 1],
                               torch.full((int(batch.mask.sum()),), expected))
    assert (entropy[batch.mask == 0] == 0).all()


# --- log-probs in chunks --------------------------------------------------------------------------


def plain_logp(policy, hidden, ids, temperature):
    """All log-probs at once, kept for backward."""
    log_probs = policy.log_probs(hidden, temperature)                                    # [N, V]
    p = log_probs.exp().detach()
    entropy = -torch.where(p > 0, p * log_probs.detach(), 0.0).sum(1)
    return log_probs.gather(1, ids[:, None])[:, 0], entropy


@pytest.fixture
def hidden_and_ids(fresh_policy):
    """37 hidden states and an id after each: 37 = 7 chunks of 5 and one of 2."""
    g = torch.Generator().manual_seed(5)
    hidden = torch.randn(37, fresh_policy.model.config.text_config.hidden_size,
                         generator=g).requires_grad_()
    allowed = (~fresh_policy.barred).nonzero()[:, 0]
    return hidden, allowed[torch.randint(len(allowed), (37,), generator=g)]


def test_log_probs_in_chunks_are_those_at_once(fresh_policy, hidden_and_ids, monkeypatch):
    """Values and gradients, of the hidden states and of the vocabulary matrix."""
    monkeypatch.setattr(grpo, "AT_ONCE", 5 * len(fresh_policy.barred) + 3)
    hidden, ids = hidden_and_ids
    weight, scale = fresh_policy.model.lm_head.weight, torch.linspace(-1, 2, 37)
    results = []
    for function in (plain_logp, sampled_logp):
        logp, entropy = function(fresh_policy, hidden, ids, 0.7)
        assert not entropy.requires_grad
        results.append((logp, entropy,
                        *torch.autograd.grad((logp * scale).sum(), (hidden, weight))))
    for plain, chunked in zip(*results):
        assert plain.shape == chunked.shape
        torch.testing.assert_close(plain, chunked, atol=1e-6, rtol=1e-6)


class Largest(TorchDispatchMode):
    """Remembers the most elements of any tensor made inside that `counts`."""

    def __init__(self, counts):
        super().__init__()
        self.counts, self.elements = counts, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor) and self.counts(tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


def test_the_probabilities_of_all_ids_never_exist_together(fresh_policy, hidden_and_ids,
                                                           monkeypatch):
    """Neither made in forward or backward, nor kept between the two; the
    plain version does both."""
    D, V = fresh_policy.model.lm_head.weight.shape[1], len(fresh_policy.barred)

    def counts(tensor):     # [n, V], and not the vocabulary matrix itself
        return tensor.dim() == 2 and tensor.shape[1] == V and tensor.shape[0] != D
    monkeypatch.setattr(grpo, "AT_ONCE", 5 * V)
    for function, made, kept in ((plain_logp, 37 * V, 37 * V), (sampled_logp, 5 * V, 0)):
        saved = [0]
        with Largest(counts) as largest:
            def keep(t, saved=saved):
                saved.append(t.numel() if counts(t) else 0)
                return t
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
                logp, _ = function(fresh_policy, *hidden_and_ids, 1.0)
            logp.sum().backward()
        assert (largest.elements, max(saved)) == (made, kept)
