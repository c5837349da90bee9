"""Task 5: grpo.k3, grpo._token_means."""

import math

import torch

import grpo

from .check import expect

E = math.e


def test_k3_by_hand():
    """d = 0, 1, -1: exp(d) - d - 1 = 0, e - 2, 1 / e. The last token was not sampled."""
    logp = torch.tensor([[-1.0, -2.0, -1.0, -5.0]], dtype=torch.float64)
    ref = torch.tensor([[-1.0, -1.0, -2.0, -1.0]], dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 0]])
    right = [0.0, E - 2, 1 / E]
    no_one = "the last - 1 is missing: it must be 0 where the two agree"
    expect(lambda: grpo.k3(logp, ref, mask), [[*right, 0.0]], {
        "this is k1, logp - logp_ref: right on average, and negative for many tokens":
            [[0.0, -1.0, 1.0, 0.0]],
        "this is k2, half the square: not the paper's": [[0.0, 0.5, 0.5, 0.0]],
        "the divergence is turned round: d is logp_ref - logp": [[0.0, 1 / E, E - 2, 0.0]],
        "tokens with mask 0 count": [[*right, math.exp(4) - 5]],
        no_one: [[1.0, E - 1, 1 / E + 1, 1.0]],
        no_one + "; what is off the mask is 0 already": [[1.0, E - 1, 1 / E + 1, 0.0]],
        "the mean is taken already: one number for each token is asked": sum(right) / 3,
    }, "three tokens")


def test_its_mean_is_the_divergence():
    """Exact, over all five tokens of a small vocabulary: the mean under the policy is
    KL(policy || reference)."""
    policy = torch.log_softmax(torch.tensor([2.0, 1.0, 0.0, -1.0, 0.5], dtype=torch.float64), 0)
    reference = torch.log_softmax(torch.tensor([0.0, 1.5, 1.0, 0.0, -1.0], dtype=torch.float64), 0)
    exact = float((policy.exp() * (policy - reference)).sum())
    reverse = float((reference.exp() * (reference - policy)).sum())

    def mean():
        values = grpo.k3(policy[None], reference[None], torch.ones(1, 5))[0]
        return float((policy.exp() * values).sum())
    expect(mean, exact, {
        "its mean is KL(reference || policy): the divergence is turned round": reverse,
    }, "the mean of k3 under the policy")


def test_its_gradient():
    """By hand: d k3 / d logp = 1 - exp(d); 0 where mask is 0, even if logp_ref is inf there."""
    def gradient():
        logp = torch.tensor([[-2.0, -1.0]], dtype=torch.float64, requires_grad=True)
        ref = torch.tensor([[-1.0, torch.inf]], dtype=torch.float64)
        values = grpo.k3(logp, ref, torch.tensor([[1, 0]]))
        if values.requires_grad:
            values.sum().backward()
        return [0.0, 0.0] if logp.grad is None else logp.grad[0].tolist()
    expect(gradient, [1 - E, 0.0], {
        "k3 has no gradient: the KL term would not pull": [0.0, 0.0],
        "inf * 0 is nan: fill what is off the mask before exp": [1 - E, math.nan],
        "what is off the mask must be filled before exp; here it has a gradient":
            [1 - E, -math.inf],
    }, "the gradient")


def test_means_over_sampled_tokens():
    mask = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    kl = torch.tensor([[1.0, 2.0, 50.0], [6.0, 9.0, 9.0]])
    clipped = torch.tensor([[True, False, True], [False, False, False]])
    expect(lambda: grpo._token_means(mask, kl=kl, clip=clipped), {"kl": 3.0, "clip": 1 / 3}, {
        "the mean is over all positions; only sampled tokens count": {"kl": 77 / 6, "clip": 2 / 6},
        "the sum over sampled tokens is divided by all positions": {"kl": 9 / 6, "clip": 1 / 6},
        "this is the mean of the rows' means; every sampled token counts the same":
            {"kl": 3.75, "clip": 0.25},
        "this is the sum; the mean is asked": {"kl": 9.0, "clip": 1.0},
    }, "two values")
    expect(lambda: grpo._token_means(torch.zeros(1, 2), kl=torch.ones(1, 2)), {"kl": 0.0}, {
        "a batch without a sampled token divides by zero": {"kl": math.nan},
    }, "nothing sampled")
    trained = kl.clone().requires_grad_()
    expect(lambda: type(grpo._token_means(mask, kl=trained)["kl"]).__name__, "float", {
        "the means are tensors and keep the whole graph in memory: .item() makes a number":
            "Tensor",
    }, "the type")
