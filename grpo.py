"""GRPO by hand: group advantages, the clipped and KL-regularised loss, one update.

What it teaches: the whole algorithm. For each sample the policy writes a group of G
episodes; an episode is as good as its reward is above its group's mean; each id that
the policy sampled is made likelier or less likely by that much, with two brakes.

    advantage   A_i     = (r_i - mean(r)) / (std(r) + 1e-4)         over the group of G
    ratio       rho_t   = exp(logp_t - logp_old_t)                  1 on the first update
    objective   min(rho_t A_i, clip(rho_t, 1 - low, 1 + high) A_i) - beta * KL_t
    KL estimate KL_t    = exp(d) - d - 1,  d = logp_ref_t - logp_t  (k3, never negative)

This is the paper's first equation (Visual-ARFT, arXiv 2505.14246: the expected reward minus
beta times the divergence from the reference) with PPO's clipped ratio for the reward. On the first update after sampling
rho is 1 for every id and the advantages of a group sum to zero, so the policy term of
the loss is about zero. Its gradient is not: d rho / d logp is 1 there, which leaves
A * grad logp, the policy gradient. Watch the reward, not the loss.

Differences from the paper's released trainer: episodes are sampled whole, on-policy,
with the tools in the loop (there: single steps on stored contexts, no tool runs); every
advantage belongs to the text that was sampled (there: one completion of each group has
its text replaced by the gold turn before the reward is computed); ratio and clipping are
real (there: one update per batch, the ratio is identically 1). `--inner-epochs 2` shows
them at work.

Read next: arft.py; pack.py, where episodes become tensors. Left out: a learned value function, importance weights for
another sampler.

Dimensions: B episodes, G of them to a group, T tokens (L where rows of T hold trees: pack.py), V vocabulary.
"""

import copy
import math
from collections import defaultdict

import torch
from torch.utils.checkpoint import checkpoint

from extras import many
from extras.tree import Batch, groups_of, micro_batches, pack
from extras.weights import MasterAdamW
from policy import Policy
from rollout import Episode

LOSS_TYPES = ("grpo", "dapo", "dr_grpo", "gspo", "cispo")
TOKEN_MEANS = ("dapo", "cispo")          # loss types that average over all tokens of the batch at once
SCALES = ("group", "batch", "none")
AT_ONCE = 2 ** 25     # probabilities: 128 MiB in float32, those of 220 ids over Qwen's vocabulary; more is no faster
PER_TOKEN = ("loss", "kl", "ratio", "clip_fraction", "entropy")
STATISTICS = (*PER_TOKEN, "grad_norm", "logp_error", "updates", "skipped_updates")

# --- advantages ------------------------------------------------------------------------------------


def group_advantages(rewards: torch.Tensor, group_size: int, scale: str = "group") -> torch.Tensor:
    """How much better each episode is than the mean of its group. [N] -> [N], N = groups * G.

    The rewards of a group stand side by side: the first G belong to the first sample. The mean of its own group is
    taken from each. scale "group" then divides by the group's own standard deviation (the paper), "batch" by that of
    all rewards, "none" not at all (Dr. GRPO). Deviations are unbiased (divided by n - 1), 1e-4
    is added to them. A group whose rewards are all equal gets exact zeros: it teaches nothing.
    ValueError for rewards that make no groups of two or more, are not finite, or for another scale.

    >>> group_advantages(torch.tensor([1., 0., 0., 1.,   5., 5., 5., 5.]), 4, "none")
    tensor([ 0.5000, -0.5000, -0.5000,  0.5000,  0.0000,  0.0000,  0.0000,  0.0000])
    """
    if group_size < 2 or len(rewards) % group_size:
        raise ValueError(f"{len(rewards)} rewards do not make groups of {group_size} (at least 2)")
    if scale not in SCALES:
        raise ValueError(f"unknown scale {scale!r}; one of {', '.join(SCALES)}")
    if not torch.isfinite(rewards).all():
        raise ValueError("rewards must be finite numbers")
    groups = rewards.view(-1, group_size)                                  # [N / G, G]
    centred = groups - groups.mean(dim=1, keepdim=True)
    if scale == "group":
        centred = centred / (groups.std(dim=1, keepdim=True) + 1e-4)
    elif scale == "batch":
        centred = centred / (rewards.std() + 1e-4)
    # a mean of equal floats can differ from them in the last bit; a flat group is exactly zero
    flat = groups.max(dim=1, keepdim=True).values == groups.min(dim=1, keepdim=True).values
    return centred.masked_fill(flat, 0.0).view(-1)


# --- the loss ----------------------------------------------------------------------------------------


def k3(logp: torch.Tensor, logp_ref: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """An estimate of KL(policy || reference) from each sampled id alone. Three times [B, T] -> [B, T].

    With d = logp_ref - logp it is exp(d) - d - 1 (the third estimator of http://joschu.net/blog/kl-approx.html): never
    negative, 0 where the two agree, and on average over ids that the policy samples it is the divergence. Where
    mask is 0 it is 0, and so is its gradient, whatever logp and logp_ref hold there (even inf: fill before the
    exponential; masking the result would leave 0 * inf, which is nan, in the gradient).

    >>> k3(torch.tensor([[-1., -2., -3.]]), torch.tensor([[-1., -1., -4.]]), torch.tensor([[1, 1, 0]]))
    tensor([[0.0000, 0.7183, 0.0000]])
    """
    d = (logp_ref - logp).masked_fill(mask == 0, 0.0)
    return d.exp() - d - 1


def clipped_objective(ratio: torch.Tensor, A: torch.Tensor, clip_low: float,
                      clip_high: float) -> tuple[torch.Tensor, torch.Tensor]:
    """PPO's objective of each id, to be maximised, and where the clip holds it: two tensors of ratio's shape.

    ratio: policy now / policy at sampling, [B, T] (or [B, 1]); A: advantages, [B, 1]. The objective is the smaller of
    ratio * A and clip(ratio, 1 - clip_low, 1 + clip_high) * A. So an id that has moved far enough the way its
    advantage wants gains nothing more, and one that has moved the wrong way is always pulled back.
    The second is True where the clipped product is the smaller one: there the gradient is 0.

    >>> clipped_objective(torch.tensor([[1.5, 0.5]]), torch.tensor([[2.0]]), 0.2, 0.2)
    (tensor([[2.4000, 1.0000]]), tensor([[ True, False]]))
    """
    unclipped = ratio * A
    bounded = ratio.clamp(1 - clip_low, 1 + clip_high) * A
    return torch.minimum(unclipped, bounded), bounded < unclipped


def policy_loss(logp, logp_old, logp_ref, advantages, mask, *, loss_type: str = "grpo", clip_low: float = 0.2,
                clip_high: float = 0.2, beta: float = 0.04, max_length: int | None = None):
    """The loss to minimise and its statistics: (scalar tensor, dict of floats).

    logp, logp_old [B, T]; logp_ref [B, T], or None for no KL term; advantages [B]; mask [B, T],
    1 where the policy sampled the id. Positions with mask 0 count for nothing, whatever they hold.

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
    mask = mask.to(logp.dtype)                                             # [B, T]
    A = advantages[:, None]                                                # [B, 1]
    log_ratio = (logp - logp_old).masked_fill(mask == 0, 0.0)              # [B, T]
    if loss_type == "gspo":
        log_ratio = log_ratio.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)   # [B, 1]
    ratio = log_ratio.exp()

    if loss_type == "cispo":
        gain = ratio.clamp(max=clip_high).detach() * A * logp              # [B, T]
        clipped = ratio > clip_high
    else:
        gain, clipped = clipped_objective(ratio, A, clip_low, clip_high)   # [B, T], gspo: [B, 1]
    kl = torch.zeros_like(logp) if logp_ref is None else k3(logp, logp_ref, mask)
    per_token = -(gain - beta * kl)                                        # Eq. (1), maximised
    loss = _aggregate(per_token, mask, loss_type, max_length)
    ratio, clipped = ratio.expand_as(logp), clipped.expand_as(logp)
    return loss, _token_means(mask, kl=kl, ratio=ratio, clip_fraction=clipped)


def _aggregate(per_token, mask, loss_type: str, max_length: int | None):
    """[B, T] -> scalar: the weights that loss_type gives to tokens and sequences. mask [B, T], as floats.

    TOKEN_MEANS (dapo, cispo): the sum over all sampled tokens / their number. dr_grpo: the sum / (B * max_length);
    ValueError without max_length. The others: each sequence's mean over its own sampled tokens, then the mean over the
    B sequences. What per_token holds where mask is 0 counts for nothing, not even inf; a sequence (or a batch) without
    any sampled token counts as 0, not as 0 / 0.
    """
    per_token = per_token.masked_fill(mask == 0, 0.0)
    if loss_type in TOKEN_MEANS:
        return per_token.sum() / mask.sum().clamp(min=1)
    if loss_type == "dr_grpo":
        if not max_length:
            raise ValueError("loss_type dr_grpo divides by max_length: give the most tokens an episode can sample")
        return per_token.sum() / (len(mask) * max_length)
    return (per_token.sum(1) / mask.sum(1).clamp(min=1)).mean()


def _token_means(mask, **values) -> dict[str, float]:
    """The mean of each value over the sampled tokens alone, for the record: Python floats, without a gradient.

    mask and values [B, T]. Without any sampled token the means are 0.

    >>> _token_means(torch.tensor([[1., 1., 0.]]), kl=torch.tensor([[2., 4., 9.]]))
    {'kl': 3.0}
    """
    count = mask.sum().clamp(min=1)
    return {name: ((value.detach() * mask).sum() / count).item() for name, value in values.items()}


# --- log-probs of episodes -------------------------------------------------------------------------------


def episode_logp(policy: Policy, batch: Batch, temperature: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-prob of every sampled id, and the entropy where it was sampled. [B, L] and [B, L], 0 off the mask.

    Column t belongs to an episode's ids[t]; the hidden state that predicts it is that of ids[t - 1].
    Only these states meet the vocabulary matrix.
    """
    features = policy.features(batch.images)
    hidden = policy.hidden(batch.ids, batch.positions, batch.attention, features)        # [R, T, D]
    values = sampled_logp(policy, hidden.flatten(0, 1)[batch.states], batch.targets, temperature)
    sampled = batch.mask.nonzero(as_tuple=True)
    logp, entropy = (torch.zeros_like(batch.mask).index_put(sampled, value) for value in values)
    return logp, entropy


def sampled_logp(policy: Policy, hidden: torch.Tensor, ids: torch.Tensor,
                 temperature: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-prob of each id and entropy (without gradient) where it was sampled. [N, D], [N] -> [N], [N].

    One id has V = 152k probabilities, a few thousand ids gigabytes of them. They are made for a chunk of ids at a
    time, two numbers of each row are kept, and backward makes the chunk again.
    """
    def chunk(hidden, ids):
        log_probs = policy.log_probs(hidden, temperature)                                # [AT_ONCE / V, V]
        logp = log_probs.gather(1, ids[:, None])[:, 0]
        with torch.no_grad():       # comes last: recomputing stops when backward has what it needs
            entropy = -(log_probs.exp() * log_probs.masked_fill(policy.barred, 0.0)).sum(dim=1)
        return logp, entropy

    size = max(1, AT_ONCE // len(policy.barred))
    parts = [checkpoint(chunk, *part, use_reentrant=False, preserve_rng_state=False)
             for part in zip(hidden.split(size), ids.split(size))]
    logp, entropy = zip(*parts)
    return torch.cat(logp), torch.cat(entropy)


# --- the optimiser ---------------------------------------------------------------------------------------


def optimizer_of(policy: Policy, lr: float):
    """AdamW on what is trained and on nothing else: torch's for float32 weights (the adapters are), else with masters."""
    trained = [weight for weight in policy.model.parameters() if weight.requires_grad]
    if all(weight.dtype == torch.float32 for weight in trained):
        return torch.optim.AdamW(trained, lr=lr, betas=(0.9, 0.99), weight_decay=0.0)
    return MasterAdamW(trained, lr)


# --- one update ------------------------------------------------------------------------------------------


def reference_of(policy: Policy) -> Policy:
    """The point that the KL term pulls back to: a frozen copy; with LoRA the policy itself, asked without adapters."""
    if policy.adapters:
        return policy
    model = copy.deepcopy(policy.model).requires_grad_(False)
    return Policy(model, policy.tokenizer, policy.image_processor, policy.system_prompt, policy.name)


def update(policy: Policy, reference: Policy | None, episodes: list[Episode], advantages: torch.Tensor,
           optimizer: torch.optim.Optimizer, config, generator: torch.Generator) -> dict[str, float]:
    """Trains on one step's episodes: inner epochs over minibatches, one optimiser step for each.

    `config` has update ("tree" or "rows"), inner_epochs, minibatches, micro_batch_tokens, checkpointing, temperature,
    loss_type, clip_low, clip_high, beta, max_sampled and max_grad_norm. A minibatch whose loss or gradient is not
    finite is skipped and counted.
    Returns STATISTICS, means over the minibatches; `logp_error` is the largest |sampled - scored| log-prob
    before the first optimiser step.
    """
    stats, count, skipped = defaultdict(float), 0, 0
    logp_error = 0.0
    logp_ref = None if reference is None else reference_logp(reference, episodes, config)
    for _ in range(config.inner_epochs):
        for rows in minibatches(policy, episodes, config, generator):
            optimizer.zero_grad(set_to_none=True)
            with policy.checkpointing(config.checkpointing == "on"):
                part, error = _accumulate(policy, [episodes[i] for i in rows], advantages[rows],
                                          logp_ref and [logp_ref[i] for i in rows], config)
            if count + skipped == 0:
                logp_error = error
            with many.summed(policy.model):
                norm = many.norm_of(torch.nn.utils.clip_grad_norm_(policy.model.parameters(), config.max_grad_norm))
                finite = bool(torch.isfinite(norm)) and math.isfinite(part["loss"])
                if finite:
                    optimizer.step()
            if not finite:
                skipped += 1
                continue
            count += 1
            for name, value in (part | {"grad_norm": norm.item()}).items():
                stats[name] += value
    optimizer.zero_grad(set_to_none=True)
    return {name: value / max(count, 1) for name, value in stats.items()} | {
        "logp_error": logp_error, "updates": count, "skipped_updates": skipped}


def minibatches(policy: Policy, episodes: list[Episode], config, generator: torch.Generator) -> list[list[int]]:
    """Indices of the episodes of each optimiser step of a pass, in a new random order where there are several.

    In rows, any episode may be in any minibatch. The tree update draws whole groups: one that is torn apart would
    compute its prompt in each minibatch again. Fewer groups than minibatches make fewer steps.
    """
    units = groups_of(policy, episodes) if config.update == "tree" else [[i] for i in range(len(episodes))]
    order = (torch.randperm(len(units), generator=generator, device=generator.device)
             if config.minibatches > 1 else torch.arange(len(units)))
    parts = [[i for unit in part.tolist() for i in units[unit]] for part in order.chunk(config.minibatches)]
    return parts + [[]] * (int(*many.largest(len(parts))) - len(parts))     # another rank may have more


def reference_logp(reference: Policy, episodes: list[Episode], config) -> list[torch.Tensor]:
    """Log-probs of each episode's sampled ids under the reference: a frozen copy, or the policy without adapters."""
    with reference.without_adapters():
        return frozen_logp(reference, episodes, config)


def frozen_logp(policy: Policy, episodes: list[Episode], config) -> list[torch.Tensor]:
    """Log-probs of each episode's sampled ids, [its length], without a gradient: under the reference once a step, for
    all passes; under the policy after its update, for the record."""
    logps = [None] * len(episodes)
    for part in micro_batches(policy, episodes, config.micro_batch_tokens, config.update):
        batch = pack(policy, [episodes[i] for i in part], config.update)
        with torch.no_grad():
            logp, _ = episode_logp(policy, batch, config.temperature)
        for i, row in zip(part, logp):
            logps[i] = row[:len(episodes[i].ids)]
    return logps


def _accumulate(policy, episodes, advantages, logp_ref, config) -> tuple[dict[str, float], float]:
    """Adds the gradient of one minibatch, a micro-batch at a time. Returns its statistics and logp error."""
    tokens = torch.tensor([sum(e.mask) for e in episodes])                 # sampled ids of each episode
    all_tokens, all_episodes = many.total(tokens.sum().item(), len(episodes))
    stats, error = dict.fromkeys(PER_TOKEN, 0.0), 0.0
    for part in micro_batches(policy, episodes, config.micro_batch_tokens, config.update):
        batch = pack(policy, [episodes[i] for i in part], config.update)
        ref = logp_ref and torch.nn.utils.rnn.pad_sequence([logp_ref[i] for i in part], batch_first=True)  # [B, L]
        logp, entropy = episode_logp(policy, batch, config.temperature)
        loss, values = policy_loss(
            logp, batch.logp_old, ref, advantages[part].to(logp), batch.mask, loss_type=config.loss_type,
            clip_low=config.clip_low, clip_high=config.clip_high, beta=config.beta, max_length=config.max_sampled)
        # A micro-batch counts for its share of what the loss averages over, so that cutting changes nothing.
        by_tokens = tokens[part].sum().item() / all_tokens
        weight = by_tokens if config.loss_type in TOKEN_MEANS else len(batch.mask) / all_episodes
        (loss * weight).backward()
        stats["loss"] += loss.item() * weight
        for name, value in (values | _token_means(batch.mask, entropy=entropy)).items():
            stats[name] += value * by_tokens
        error = max(error, ((logp.detach() - batch.logp_old) * batch.mask).abs().max().item())
    return dict(zip(stats, many.total(*stats.values()))), *many.largest(error)
