"""Task 6: grpo.clipped_objective, grpo._aggregate; and policy_loss, which puts them together."""

import math
from functools import partial

import torch

import grpo

from .check import expect

RATIO = torch.tensor([[1.5, 0.5, 1.1], [1.5, 0.5, 1.1]], dtype=torch.float64)
A = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)     # a good episode and a bad one


def test_the_objective():
    """Clip at 0.8 and 1.3."""
    expect(lambda: grpo.clipped_objective(RATIO, A, 0.2, 0.3)[0],
           [[1.3, 0.5, 1.1], [-1.5, -0.8, -1.1]], {
        "nothing is clipped": [[1.5, 0.5, 1.1], [-1.5, -0.5, -1.1]],
        "the ratio is clipped, but the smaller of the two products is not taken: what moved the "
        "wrong way is not pulled back": [[1.3, 0.8, 1.1], [-1.3, -0.8, -1.1]],
        "the larger of the two products is taken; the objective is the smaller":
            [[1.5, 0.8, 1.1], [-1.3, -0.5, -1.1]],
        "clip_low and clip_high are taken as the bounds themselves; they are 1 - clip_low and 1 + "
        "clip_high": [[0.3, 0.3, 0.3], [-1.5, -0.5, -1.1]],
        "clip_low and clip_high are exchanged": [[1.2, 0.5, 1.1], [-1.5, -0.7, -1.1]],
        "one clip_low serves for both sides; there is clip_high":
            [[1.2, 0.5, 1.1], [-1.5, -0.8, -1.1]],
        "the smaller ratio is taken before it is multiplied; with a negative advantage that is the "
        "larger product": [[1.3, 0.5, 1.1], [-1.3, -0.5, -1.1]],
        "this is the loss; the objective to be maximised has the other sign":
            [[-1.3, -0.5, -1.1], [1.5, 0.8, 1.1]],
        "the advantages are left out": [[1.3, 0.5, 1.1], [1.3, 0.5, 1.1]],
    }, "six tokens")


def test_where_the_clip_holds():
    expect(lambda: grpo.clipped_objective(RATIO, A, 0.2, 0.3)[1],
           [[True, False, False], [False, True, False]], {
        "every ratio outside the range is called clipped; it is only where the clipped product is "
        "the smaller": [[True, True, False], [True, True, False]],
        "the answer is turned round": [[False, True, True], [True, False, True]],
        "tokens within the range are called clipped: smaller, not equal":
            [[True, False, True], [False, True, True]],
    }, "six tokens")


def test_the_gradient_stops_where_the_clip_holds():
    def gradient():
        ratio = RATIO.clone().requires_grad_()
        grpo.clipped_objective(ratio, A, 0.2, 0.3)[0].sum().backward()
        return ratio.grad
    expect(gradient, [[0.0, 1.0, 1.0], [-1.0, 0.0, -1.0]], {
        "no gradient comes through: detach nothing here": "raised RuntimeError",
    }, "the gradient")


TERMS = torch.tensor([[1.0, 3.0, math.inf], [6.0, 100.0, 100.0]], dtype=torch.float64)
MASK = torch.tensor([[1, 1, 0], [1, 0, 0]], dtype=torch.float64)
MEANS = (       # (loss_type, right, mistakes); sampled: 1 and 3 in one sequence, 6 in the other
    ("grpo", 4.0, {
        "grpo is the mean of the sequences' means, here all tokens count the same": 10 / 3,
        "grpo divides by T, padding included; by the sampled tokens of each sequence":
            (4 / 3 + 2) / 2,
        "grpo is the sum of the sequences' means; take their mean": 8.0}),
    ("gspo", 4.0, {"gspo averages as grpo does": 10 / 3}),
    ("dapo", 10 / 3, {
        "dapo is the mean over all sampled tokens, here each sequence counts the same": 4.0,
        "dapo divides by all positions; by the number of sampled tokens": 10 / 6}),
    ("cispo", 10 / 3, {"cispo averages as dapo does": 4.0}),
    ("dr_grpo", 0.5, {
        "dr_grpo divides by the sampled tokens; by B * max_length": 10 / 3,
        "dr_grpo divides by max_length alone; by B * max_length": 1.0,
        "dr_grpo divides by B * T; by B * max_length": 10 / 6}))
OFF_MASK = {"what is off the mask counts (inf * 0 is nan): fill it with 0": math.nan,
            "what is off the mask counts": math.inf}


def test_what_is_averaged():
    for kind, right, wrong in MEANS:
        expect(partial(grpo._aggregate, TERMS, MASK, kind, 10), right, wrong | OFF_MASK,
               f"loss_type {kind}")


def test_edges():
    ones, mask = torch.ones(2, 2), torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    expect(lambda: grpo._aggregate(ones, mask, "grpo", None), 0.5, {
        "a sequence without a sampled token divides by zero; it counts as 0": math.nan,
        "a sequence without a sampled token is left out; it counts as 0": 1.0,
    }, "a sequence without a sampled token")
    expect(lambda: grpo._aggregate(ones, ones, "dr_grpo", None), "raised ValueError", {
        "dr_grpo without max_length must be refused with a ValueError": "raised TypeError",
    }, "dr_grpo without max_length")


def test_at_the_first_step_the_loss_is_zero_and_its_gradient_is_not():
    """The whole loss at ratio 1, without task 5's KL: -mean(A) = 0, and the gradient is
    -A / (B T)."""
    def loss_and_gradient():
        logp = torch.zeros(2, 2, dtype=torch.float64, requires_grad=True)
        gain = grpo.clipped_objective(logp.exp(), A, 0.2, 0.2)[0]
        loss = -grpo._aggregate(gain, torch.ones(2, 2, dtype=torch.float64), "grpo", None)
        loss.backward()
        return loss.item(), logp.grad.tolist()
    expect(loss_and_gradient, (0.0, [[-0.25, -0.25], [0.25, 0.25]]), {},
           "loss and gradient at ratio 1")
