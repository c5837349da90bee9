"""GRPO by hand: group advantages, the clipped and KL-regularised loss, one update.

What it teaches: the whole algorithm. For each question the policy writes a group of G episodes. An
episode is as good as its reward is above its group's mean, and each token that the policy sampled
is made likelier or less likely by that much. Two brakes hold it back: the clip and the KL term.

    advantage   A_i     = (r_i - mean(r)) / (std(r) + 1e-4)         over the group of G
    ratio       rho_t   = exp(logp_t - logp_old_t)                  1 on the first update
    objective   min(rho_t A_i, clip(rho_t, 1 - low, 1 + high) A_i) - beta * KL_t
    KL estimate KL_t    = exp(d) - d - 1,  d = logp_ref_t - logp_t  (k3, never negative)

This is the paper's first equation (Visual-ARFT, arXiv 2505.14246) with PPO's clipped ratio. On the
first update after sampling rho is 1 for every token and a group's advantages sum to zero, so over
whole groups the policy term of the loss is about zero. Its gradient is not: d rho / d logp is 1
there, which leaves A * grad logp, the policy gradient. Watch the reward, not the loss.

Differences from the paper's released trainer: episodes are sampled whole, on-policy, with the tools
in the loop (there: single steps on stored contexts, no tool runs); every advantage belongs to the
text that was sampled (there: one completion of each group has its text replaced by the gold turn
before the reward is computed); ratio and clipping are real (there: one update a batch, so the ratio
is always 1). This is the last file of the lesson. Left out: a learned value function.

Dimensions: B episodes, G of them to a group, T tokens of a row, L tokens of the longest episode (in
rows L = T; extras/tree.py has longer rows), N episodes of a step, K sampled tokens, D hidden size,
V vocabulary.
"""

import copy
import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch.utils.checkpoint import checkpoint

from policy import Policy
from rollout import Batch, Episode, RowLayout, padded

LossType = Literal["grpo", "dapo", "dr_grpo", "gspo", "cispo"]
Scale = Literal["group", "batch", "none"]
LOSS_TYPES, SCALES = get_args(LossType), get_args(Scale)
TOKEN_MEANS = ("dapo", "cispo")          # these average over all tokens of the batch at once
AT_ONCE = 2 ** 25     # probabilities: 128 MiB in float32, 220 tokens over Qwen's vocabulary
PER_TOKEN = ("kl", "ratio", "clip_fraction", "entropy")
STATISTICS = ("loss", *PER_TOKEN, "grad_norm", "logp_error", "updates", "skipped_updates")


@dataclass
class Settings:
    """What an update does with episodes and their rewards."""
    group_size: int = 8             # episodes sampled for each question; paper: 8
    zero_variance: Literal["drop", "keep"] = "drop"     # what to do with groups of equal rewards
    scale: Scale = "group"          # what advantages are divided by; paper: group
    loss_type: LossType = "grpo"    # how the loss weighs tokens; paper: grpo
    clip_low: float = 0.2           # the ratio is clipped below 1 - clip_low
    clip_high: float = 0.2          # the ratio is clipped above 1 + clip_high (cispo: clip_high)
    beta: float = 0.04              # weight of the KL term; 0: no reference model; paper: 0.04
    inner_epochs: int | None = None     # passes over a step's episodes; paper: 1
    minibatches: int | None = None      # optimiser steps in each pass; paper: 1
    max_grad_norm: float = 1.0      # the gradient is scaled down to this norm; paper: 1


# --- advantages -----------------------------------------------------------------------------------


def group_advantages(rewards: torch.Tensor, group_size: int, scale: Scale = "group"):
    """How much better each episode is than the mean of its group. [N] -> [N], N = groups * G.

    The rewards of a group are neighbours: the first G belong to the first question. Each reward
    loses the mean of its own group. scale "group" then divides by the group's own standard
    deviation (the paper), "batch" by that of all rewards, "none" by nothing (Dr. GRPO). Deviations
    are unbiased (divided by n - 1), and 1e-4 is added to them. A group whose rewards are all equal
    gets exact zeros: it teaches nothing. Raises ValueError for rewards that make no groups of two
    or more, for rewards that are not finite, and for another scale.

    >>> group_advantages(torch.tensor([1., 0., 0., 1.,   5., 5., 5., 5.]), 4, "none")
    tensor([ 0.5000, -0.5000, -0.5000,  0.5000,  0.0000,  0.0000,  0.0000,  0.0000])
    """
    if group_size < 2 or len(rewards) % group_size:
        raise ValueError(f"{len(rewards)} rewards do not make groups of {group_size} (at least 2)")
    if scale not in SCALES:
        raise ValueError(f"unknown scale {scale!r}; one of {', '.join(SCALES)}")
    if not torch.isfinite(rewards).all():
        raise ValueError("rewards must be finite numbers")
    groups = rewards.view(-1, group_size)                                           # [N / G, G]
    centred = groups - groups.mean(dim=1, keepdim=True)
    if scale == "group":
        centred = centred / (groups.std(dim=1, keepdim=True) + 1e-4)
    elif scale == "batch":
        centred = centred / (rewards.std() + 1e-4)
    # The mean of equal floats can differ from them in the last bit; here it must not.
    equal = groups.max(dim=1, keepdim=True).values == groups.min(dim=1, keepdim=True).values
    return centred.masked_fill(equal, 0.0).view(-1)


def teaching_rows(advantages: torch.Tensor, settings: Settings) -> list[int]:
    """Indices of the episodes that enter the update: all, or those of groups that teach something.

    An episode may lie on its group's mean, but in a group of unequal rewards not all of them do.
    """
    teaches = advantages.view(-1, settings.group_size).ne(0).any(dim=1)                 # [N / G]
    if settings.zero_variance == "keep":
        teaches = torch.ones_like(teaches)
    return teaches.repeat_interleave(settings.group_size).nonzero()[:, 0].tolist()


# --- the loss -------------------------------------------------------------------------------------


def k3(logp: torch.Tensor, logp_ref: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Estimates KL(policy || reference) from each sampled token alone. Three [B, T] -> [B, T].

    With d = logp_ref - logp the estimate is exp(d) - d - 1 (the third estimator of
    http://joschu.net/blog/kl-approx.html). It is never negative, 0 where the two agree, and on
    average over tokens that the policy samples it is the divergence. Where mask is 0 it is 0, and
    so is its gradient, whatever logp and logp_ref hold there (even inf: fill before the
    exponential; masking the result would leave 0 * inf, which is nan, in the gradient).

    >>> k3(torch.tensor([[-1., -2., -3.]]), torch.tensor([[-1., -1., -4.]]),
    ...    torch.tensor([[1, 1, 0]]))
    tensor([[0.0000, 0.7183, 0.0000]])
    """
    d = (logp_ref - logp).masked_fill(mask == 0, 0.0)
    return d.exp() - d - 1


def clipped_objective(ratio: torch.Tensor, A: torch.Tensor, clip_low: float,
                      clip_high: float) -> tuple[torch.Tensor, torch.Tensor]:
    """PPO's objective of each token, to be maximised, and where the clip holds it.

    ratio: policy now / policy at sampling, [B, T] (or [B, 1]); A: advantages, [B, 1]. Returns two
    tensors of ratio's shape. The objective is the smaller of ratio * A and
    clip(ratio, 1 - clip_low, 1 + clip_high) * A. So a token that has moved far enough the way its
    advantage wants gains nothing more, and one that has moved the wrong way is always pulled back.
    The second tensor is True where the clipped product is the smaller one: there the gradient is 0.

    >>> clipped_objective(torch.tensor([[1.5, 0.5]]), torch.tensor([[2.0]]), 0.2, 0.2)
    (tensor([[2.4000, 1.0000]]), tensor([[ True, False]]))
    """
    unclipped = ratio * A
    bounded = ratio.clamp(1 - clip_low, 1 + clip_high) * A
    return torch.minimum(unclipped, bounded), bounded < unclipped


def policy_loss(logp, logp_old, logp_ref, advantages, mask, *, loss_type: LossType = "grpo",
                clip_low: float = 0.2, clip_high: float = 0.2, beta: float = 0.04,
                max_length: int | None = None) -> tuple[torch.Tensor, dict[str, float]]:
    """The loss to minimise, a scalar, and its statistics.

    logp, logp_old [B, T]; logp_ref [B, T], or None for no KL term; advantages [B]; mask [B, T], 1
    where the policy sampled the token. What stands where mask is 0 counts for nothing.

    loss_type says how tokens are weighed:
      grpo     mean over a sequence's tokens, then over sequences (the paper)
      dapo     mean over all tokens of the batch
      dr_grpo  sum over all tokens / (B * max_length)
      gspo     as grpo, with one ratio for a sequence: exp of its mean log-ratio
      cispo    mean over all tokens of -stopgrad(min(ratio, clip_high)) * A * logp;
               clip_high is an absolute cap there, and no token loses its gradient
    """
    if loss_type not in LOSS_TYPES:
        raise ValueError(f"unknown loss_type {loss_type!r}; one of {', '.join(LOSS_TYPES)}")
    mask = mask.to(logp.dtype)                                                      # [B, T]
    A = advantages[:, None]                                                         # [B, 1]
    log_ratio = (logp - logp_old).masked_fill(mask == 0, 0.0)                       # [B, T]
    if loss_type == "gspo":
        log_ratio = log_ratio.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
    ratio = log_ratio.exp()                                             # [B, T], gspo: [B, 1]

    if loss_type == "cispo":
        gain = ratio.clamp(max=clip_high).detach() * A * logp                       # [B, T]
        clipped = ratio > clip_high
    else:
        gain, clipped = clipped_objective(ratio, A, clip_low, clip_high)
    kl = torch.zeros_like(logp) if logp_ref is None else k3(logp, logp_ref, mask)
    per_token = -(gain - beta * kl)                                                 # Eq. (1)
    loss = _aggregate(per_token, mask, loss_type, max_length)
    ratio, clipped = ratio.expand_as(logp), clipped.expand_as(logp)
    return loss, _token_means(mask, kl=kl, ratio=ratio, clip_fraction=clipped)


def _aggregate(per_token, mask, loss_type: LossType, max_length: int | None) -> torch.Tensor:
    """[B, T] -> scalar, with the weights that loss_type gives to tokens and sequences.

    mask [B, T], as floats. TOKEN_MEANS (dapo, cispo): the sum over all sampled tokens / their
    number. dr_grpo: the sum / (B * max_length); ValueError without max_length. The others: each
    sequence's mean over its own sampled tokens, then the mean over the B sequences. What per_token
    holds where mask is 0 counts for nothing, not even inf; a sequence (or a batch) without any
    sampled token counts as 0, not as 0 / 0.
    """
    per_token = per_token.masked_fill(mask == 0, 0.0)
    if loss_type in TOKEN_MEANS:
        return per_token.sum() / mask.sum().clamp(min=1)
    if loss_type == "dr_grpo":
        if not max_length:
            raise ValueError("dr_grpo needs max_length: the most tokens an episode can sample")
        return per_token.sum() / (len(mask) * max_length)
    return (per_token.sum(1) / mask.sum(1).clamp(min=1)).mean()


def _token_means(mask, **values) -> dict[str, float]:
    """The mean of each value over the sampled tokens alone, for the record, without a gradient.

    mask and values [B, T]. Without any sampled token the means are 0.

    >>> _token_means(torch.tensor([[1., 1., 0.]]), kl=torch.tensor([[2., 4., 9.]]))
    {'kl': 3.0}
    """
    count = mask.sum().clamp(min=1)
    return {name: ((value.detach() * mask).sum() / count).item() for name, value in values.items()}


# --- log-probs of episodes ------------------------------------------------------------------------


def episode_logp(policy: Policy, batch: Batch, temperature: float = 1.0):
    """Log-prob of every sampled token, and the entropy where it was sampled: two [B, L].

    Both are 0 where the mask is 0. Column t belongs to ids[t]; the hidden state of ids[t - 1]
    predicts it, and only such states meet the vocabulary matrix.
    """
    features = policy.features(batch.images)
    hidden = policy.hidden(batch.ids, batch.positions, batch.attention, features)   # [B, T, D]
    states = hidden.flatten(0, 1)[batch.states]                                     # [K, D]
    values = sampled_logp(policy, states, batch.targets, temperature)
    sampled = batch.mask.nonzero(as_tuple=True)
    logp, entropy = (torch.zeros_like(batch.mask).index_put(sampled, value) for value in values)
    return logp, entropy


def sampled_logp(policy: Policy, hidden: torch.Tensor, ids: torch.Tensor,
                 temperature: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-prob of each token, and the entropy (no gradient). [K, D], [K] -> [K], [K].

    A few thousand tokens have gigabytes of probabilities. So a chunk of tokens gets them at a time,
    two numbers of each are kept, and backward makes the chunk again.
    """
    def chunk(hidden, ids):
        log_probs = policy.log_probs(hidden, temperature)                       # [AT_ONCE / V, V]
        logp = log_probs.gather(1, ids[:, None])[:, 0]
        with torch.no_grad():       # last, because backward computes again only up to `logp`
            entropy = -(log_probs.exp() * log_probs.masked_fill(policy.barred, 0.0)).sum(dim=1)
        return logp, entropy

    size = max(1, AT_ONCE // len(policy.barred))
    logp, entropy = zip(*[checkpoint(chunk, *part, use_reentrant=False, preserve_rng_state=False)
                          for part in zip(hidden.split(size), ids.split(size))])
    return torch.cat(logp), torch.cat(entropy)


@torch.no_grad()
def frozen_logp(policy: Policy, episodes: list[Episode], temperature: float,
                layout: RowLayout) -> list[torch.Tensor]:
    """Log-probs of each episode's sampled tokens, [its length], without a gradient."""
    logps = [None] * len(episodes)
    for part in layout.micro_batches(policy, episodes):
        batch = layout.pack(policy, [episodes[i] for i in part])
        logp, _ = episode_logp(policy, batch, temperature)
        for i, row in zip(part, logp):
            logps[i] = row[:len(episodes[i].ids)]
    return logps


# --- one update -----------------------------------------------------------------------------------


class Optimizer:
    """AdamW with the two guards of a step: it clips the gradient, and skips one that is not finite.

    The weights must be float32: in bfloat16 most steps round to nothing (extras/weights.py).
    """

    def __init__(self, policy: Policy, lr: float, max_norm: float):
        self.weights = [w for w in policy.model.parameters() if w.requires_grad]
        self.max_norm = max_norm
        self.adamw = self.make(lr)

    def make(self, lr: float):
        """AdamW (arXiv 1711.05101) without weight decay."""
        return torch.optim.AdamW(self.weights, lr=lr, betas=(0.9, 0.99), weight_decay=0.0)

    def set_lr(self, lr: float) -> None:
        """The learning rate of the steps that follow."""
        self.adamw.param_groups[0]["lr"] = lr

    def step(self, stats: dict[str, float], count: int) -> dict[str, float]:
        """One step on the gradient of a loss that is a mean over `count` episodes or tokens.

        stats: what `accumulate` returned. Returns it with "grad_norm", the norm before clipping;
        nan where norm or loss is not finite, and then no weight has changed. Only extras/many.py
        reads `count` and stats["tokens"], to weigh the gradients of several processes.
        """
        norm = torch.nn.utils.clip_grad_norm_(self.weights, self.max_norm).item()
        if not math.isfinite(norm + stats["loss"]):
            return stats | {"grad_norm": math.nan}
        self.adamw.step()
        return stats | {"grad_norm": norm}


def reference_of(policy: Policy) -> Policy:
    """What the KL term pulls back to: a frozen copy; with LoRA the policy without its adapters."""
    if policy.adapters:
        return policy
    twin = copy.copy(policy)
    twin.model = copy.deepcopy(policy.model).requires_grad_(False)
    return twin


def update(policy: Policy, reference: Policy | None, episodes: list[Episode],
           advantages: torch.Tensor, config, *, optimizer: Optimizer, layout: RowLayout,
           generator: torch.Generator) -> dict[str, float]:
    """Trains on one step's episodes: inner epochs over minibatches, an optimiser step for each.

    advantages [N]; config: `Settings` with `temperature` and `max_sampled` (the most tokens that an
    episode can sample). Returns STATISTICS, means over the optimiser steps; "logp_error" is the
    largest |sampled - scored| log-prob before the first step. All are None if no group teaches.
    """
    rows = teaching_rows(advantages, config)
    episodes, advantages = [episodes[i] for i in rows], advantages[rows]
    logp_ref = None
    if reference is not None:
        with reference.without_adapters():
            logp_ref = frozen_logp(reference, episodes, config.temperature, layout)
    steps = []          # the statistics of each optimiser step
    for _ in range(config.inner_epochs):
        for part in layout.minibatches(policy, episodes, config.minibatches, generator):
            optimizer.adamw.zero_grad(set_to_none=True)
            stats, count = accumulate(policy, [episodes[i] for i in part], advantages[part],
                                      [logp_ref[i] for i in part] if logp_ref else None,
                                      config, layout)
            steps.append(optimizer.step(stats, count))
    optimizer.adamw.zero_grad(set_to_none=True)
    if not steps:
        return dict.fromkeys(STATISTICS)
    taken = [stats for stats in steps if math.isfinite(stats["grad_norm"])]
    means = {name: sum(stats[name] for stats in taken) / len(taken) if taken else None
             for name in ("loss", *PER_TOKEN, "grad_norm")}
    return means | {"logp_error": steps[0]["logp_error"], "updates": len(taken),
                    "skipped_updates": len(steps) - len(taken)}


def accumulate(policy: Policy, episodes: list[Episode], advantages: torch.Tensor,
               logp_ref: list[torch.Tensor] | None, config,
               layout: RowLayout) -> tuple[dict[str, float], int]:
    """Adds the gradient of one minibatch, a micro-batch at a time.

    Returns its statistics, and over how many tokens or episodes its loss is a mean.
    """
    tokens = torch.tensor([sum(episode.mask) for episode in episodes])              # [B]
    stats = dict.fromkeys(("loss", *PER_TOKEN, "logp_error"), 0.0)
    for part in layout.micro_batches(policy, episodes):
        batch = layout.pack(policy, [episodes[i] for i in part])
        ref = padded([logp_ref[i] for i in part]) if logp_ref else None             # [B, L]
        with layout.around(policy):
            logp, entropy = episode_logp(policy, batch, config.temperature)
        loss, values = policy_loss(
            logp, batch.logp_old, ref, advantages[part].to(logp), batch.mask,
            loss_type=config.loss_type, clip_low=config.clip_low, clip_high=config.clip_high,
            beta=config.beta, max_length=config.max_sampled)
        # It counts for its share of what the loss is a mean over, so that cutting changes nothing.
        token_share = tokens[part].sum().item() / tokens.sum().item()
        weight = token_share if config.loss_type in TOKEN_MEANS else len(part) / len(episodes)
        (loss * weight).backward()
        stats["loss"] += loss.item() * weight
        for name, value in (values | _token_means(batch.mask, entropy=entropy)).items():
            stats[name] += value * token_share
        error = ((logp.detach() - batch.logp_old) * batch.mask).abs().max().item()
        stats["logp_error"] = max(stats["logp_error"], error)
    stats["tokens"] = int(tokens.sum())
    return stats, stats["tokens"] if config.loss_type in TOKEN_MEANS else len(episodes)
