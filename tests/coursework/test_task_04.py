"""Task 4: grpo.group_advantages."""

import math
from functools import partial

import torch

import grpo

from .check import expect

# two groups of four: means 1.5 and 11, deviations sqrt(3) and sqrt(2)
REWARDS = torch.tensor([0.0, 1, 1, 4, 10, 11, 13, 10], dtype=torch.float64)


def rounded(*arguments):
    return [round(v, 3) for v in grpo.group_advantages(*arguments).tolist()]


def test_each_group_has_its_own_mean_and_deviation():
    right = [-0.866, -0.289, -0.289, 1.443, -0.707, 0.0, 1.414, -0.707]
    expect(lambda: rounded(REWARDS, 4), right, {
        "your advantages are normalised over the batch, not over each group of G":
            [-1.183, -0.993, -0.993, -0.426, 0.71, 0.899, 1.277, 0.71],
        "each reward is compared with the mean of the batch; its own group's mean is meant":
            [-3.608, -3.031, -3.031, -1.299, 2.651, 3.359, 4.773, 2.651],
        "the deviation is that of the batch, although scale is 'group'":
            [-0.284, -0.095, -0.095, 0.473, -0.189, 0.0, 0.378, -0.189],
        "your standard deviation is biased (divided by n); the unbiased one divides by n - 1":
            [-1.0, -0.333, -0.333, 1.667, -0.816, 0.0, 1.633, -0.816],
        "your advantages are not divided by the standard deviation":
            [-1.5, -0.5, -0.5, 2.5, -1.0, 0.0, 2.0, -1.0],
        "your groups are interleaved, every (N / G)-th episode; the G episodes of a sample stand "
        "side by side": [-0.926, -1.147, -0.772, -0.521, 0.617, 0.938, 1.08, 0.73],
        "you divide by the variance, not by the standard deviation":
            [-0.5, -0.167, -0.167, 0.833, -0.5, 0.0, 1.0, -0.5],
        "the mean of the group is not taken off: a bad episode would be made likelier, too":
            [0.0, 0.577, 0.577, 2.309, 7.071, 7.778, 9.192, 7.071],
        "the sign is turned round: a better episode has a larger advantage": [-v for v in right],
    }, "two groups of four")


def test_the_epsilon():
    few = torch.tensor([0.0, 2e-4], dtype=torch.float64)
    expect(lambda: grpo.group_advantages(few, 2).tolist(), [-0.4142135, 0.4142135], {
        "1e-4 is not added to the standard deviation": [-0.7071068, 0.7071068],
        "1e-8 is added to the standard deviation, the paper's code adds 1e-4":
            [-0.7070568, 0.7070568],
    }, "a small difference")


def test_the_other_scales():
    few = torch.tensor([0.0, 1, 10, 11], dtype=torch.float64)
    by_group = [-0.707007, 0.707007] * 2
    by_batch = [v / (5.802298 + 1e-4) for v in (-0.5, 0.5, -0.5, 0.5)]
    wrong_mean = ("the mean is that of the batch; the group's own is taken off for every scale")
    expect(lambda: grpo.group_advantages(few, 2, "none").tolist(), [-0.5, 0.5, -0.5, 0.5], {
        "scale 'none' does not divide at all": by_group,
        wrong_mean: [-5.5, -4.5, 4.5, 5.5],
    }, "scale none")
    expect(lambda: grpo.group_advantages(few, 2, "batch").tolist(), by_batch, {
        "scale 'batch' divides by the deviation of all rewards, here each group's own is used":
            by_group,
        wrong_mean: [v / (5.802298 + 1e-4) for v in (-5.5, -4.5, 4.5, 5.5)],
    }, "scale batch")


def test_a_zero_variance_group_is_exactly_zero():
    """The float mean of seven times 0.1 is not 0.1."""
    sevens = torch.tensor([0.1] * 7)
    expect(lambda: bool(grpo.group_advantages(sevens, 7).ne(0).any()), False, {
        "a group of equal rewards must give exact zeros; here rounding errors are divided by 1e-4":
            True,
    }, "seven equal rewards")
    expect(lambda: grpo.group_advantages(torch.ones(4), 2).tolist(), [0.0] * 4, {
        "a group of equal rewards gives nan (0 / 0)": [math.nan] * 4,
    }, "equal rewards")


def refuses(rewards: list[float], size: int, scale: str) -> bool:
    try:
        grpo.group_advantages(torch.tensor(rewards), size, scale)
    except ValueError:
        return True
    return False


def test_what_makes_no_groups_is_refused():
    for rewards, size, scale, words in (
            ([1.0, 2.0, 3.0], 2, "group", "three rewards do not make groups of two: ValueError"),
            ([1.0, 2.0], 1, "group", "a group of one has nothing to compare with: ValueError"),
            ([1.0, math.nan], 2, "group",
             "a reward that is no finite number must be refused: ValueError"),
            ([1.0, 2.0], 2, "all", "an unknown scale must be refused: ValueError")):
        expect(partial(refuses, rewards, size, scale), True, {
            words: False,
            words + ", and with words of your own": "raised RuntimeError",
        }, words)
