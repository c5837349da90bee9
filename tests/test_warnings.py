"""record.warnings_of: what goes wrong, seen in the numbers of hand-written steps; and where it is said."""

import dataclasses
import json

import pytest
import torch

import arft
import grpo
from extras import record
from extras import resume
from arft import Config, main, parse_options
from conftest import ROOT
from extras.record import warnings_of

GOOD = {"zero_variance": 0.25, "kl": 0.1, "entropy": 0.16, "tool_calls": 60, "logp_error": 4e-5,
        "skipped_updates": 0}
# a step without an update
NOTHING = dict.fromkeys(("kl", "entropy", "logp_error", "skipped_updates"))


def names(*steps: dict, **options) -> list[str]:
    return [warning["name"] for warning in warnings_of([{**GOOD, **step} for step in steps],
                                                       **options)]


@pytest.mark.parametrize("steps, wanted", [
    ([{}] * 9, []),
    ([{}, {"skipped_updates": 1}], ["grad"]), ([{"skipped_updates": 1}, {}], []),
    ([{"zero_variance": 1.0}] * 3, ["flat"]), ([{"zero_variance": 1.0}] * 2, []),
    ([{"zero_variance": 1.0}] * 3 + [{}], []),
    ([{}, *[{"zero_variance": 1.0, **NOTHING}] * 3], ["flat"]),
    ([{"kl": 0.51}] * 3, ["KL"]), ([{"kl": 3.0}] * 2, []),
    ([{"kl": 3.0}, {"kl": 0.4}, {"kl": 3.0}], []),
    ([{"kl": 0.6}, {"kl": 0.6}, NOTHING, {"kl": 0.6}], ["KL"]), ([*[{"kl": 0.6}] * 3, NOTHING], []),
    ([{}] * 3 + [{"entropy": 0.015}] * 3, ["entropy"]), ([{}] * 3 + [{"entropy": 0.017}] * 3, []),
    ([{"entropy": 0.001}] * 6, []), ([{}] * 3 + [{"entropy": 0.08}] * 30, []),
    ([{}] * 3 + [{"tool_calls": 0}] * 3, ["tools"]), ([{}] * 3 + [{"tool_calls": 0}] * 2, []),
    ([{"tool_calls": 0}] * 9, []), ([{}] * 3 + [{"tool_calls": 4}] * 3, []),
    ([{}] * 4 + [{"tool_calls": 2}] * 3, ["tools"]),
    ([{"logp_error": 0.02}], ["logp"]), ([{"logp_error": 0.009}], []),
    ([{}] * 3 + [{"kl": 1.0, "entropy": 0.0, "tool_calls": 0, "logp_error": 1.0,
                  "skipped_updates": 4, "zero_variance": 1.0}] * 3,
     ["grad", "flat", "KL", "entropy", "tools", "logp"])])
def test_warnings_by_hand(steps, wanted):
    assert names(*steps) == wanted


def test_log_probs_in_bfloat16_may_differ_by_more(tmp_path):
    assert names({"logp_error": 0.2}, logp_limit=record.LOGP_ERROR_BFLOAT16) == []
    assert names({"logp_error": 0.6}, logp_limit=record.LOGP_ERROR_BFLOAT16) == ["logp"]
    assert record.Run(Config(out=str(tmp_path / "a"), device="cpu",
                             dtype="bfloat16")).logp_limit == record.LOGP_ERROR_BFLOAT16
    assert record.Run(Config(out=str(tmp_path / "b"), device="cuda",
                             dtype="float32")).logp_limit == record.LOGP_ERROR_FLOAT32


def test_every_warning_names_an_option_that_there_is():
    steps = [GOOD] * 3 + [{**GOOD, "kl": 1.0, "entropy": 0.0, "tool_calls": 0, "logp_error": 1.0,
                           "skipped_updates": 4,
                           "zero_variance": 1.0}] * 3
    for warning in warnings_of(steps):
        assert warning["option"] in warning["message"]
        assert any("--" + field.name.replace("_", "-") == warning["option"]
                   for field in dataclasses.fields(Config))
    assert len(warnings_of(steps)) == 6 and parse_options([]) == Config()


def run_of(tmp_path, *metrics: dict):
    run = record.Run(Config(out=str(tmp_path / "run")))
    usual = {"step": 1, "reward_mean": 2.5, "em": 0.5, "problem": 0.5, "groups": 8,
             "tool_failures": 3, "seconds": 4.2}
    run.metrics = [{**usual, **GOOD, **m} for m in metrics]
    return run


def test_the_step_s_line_names_them_and_fits(tmp_path):
    worst = {"step": 1400, "kl": 123.456, "entropy": 10.25, "tool_calls": 4000,
             "tool_failures": 3999, "seconds": 1234.5}
    named = [{"name": name, "message": "", "option": ""}
             for name in ("grad", "flat", "KL", "entropy", "tools", "logp")]
    run = run_of(tmp_path, {**worst, "warnings": named}, {"zero_variance": 0.25},
                 {"zero_variance": 0.0},
                 {"warnings": [named[2]]})
    lines = []
    for n in range(4):
        run.metrics, kept = run.metrics[:n + 1], run.metrics
        lines.append(run.step_line())
        run.metrics = kept
    assert lines[0].endswith("! grad flat KL entropy tools logp") and max(map(len, lines)) <= 100
    assert lines[1].endswith("2 flat") and "flat" not in lines[2] and lines[3].endswith("! KL")


def test_a_warning_is_said_in_full_once_and_counted(tmp_path):
    kl = {"warnings": [{"name": "KL", "message": "away. Raise --beta", "option": "--beta"}]}
    run = run_of(tmp_path, {}, kl)
    assert run.news() == ["! KL: away. Raise --beta"]
    run = run_of(tmp_path / "b", {}, kl, kl)
    assert (run.news() == [] and run.warned() == {"KL": 2}
            and "warnings: KL in 2 steps" in run.last_words())


SHORT = ["--steps", "1", "--samples-per-step", "2", "--group-size", "2", "--max-new-tokens", "32",
         "--eval-samples", "1",
         "--max-turns", "1", "--flat-groups", "keep"]


@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_a_loss_or_gradient_that_is_not_finite_changes_nothing_and_is_named(tmp_path, monkeypatch,
        capsys, broken):
    true = grpo.policy_loss

    def infinite(*arguments, **more):
        loss, stats = true(*arguments, **more)
        return (loss + torch.inf if broken == "loss" else (loss - loss.detach()).sqrt()), stats
    monkeypatch.setattr(grpo, "policy_loss", infinite)
    out = tmp_path / "run"
    assert main([*SHORT, "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert ("! grad" in said and "4 updates were left out" in said and "Lower --lr" in said
            and "warnings: grad in 1 steps" in said)
    step, = resume.read_lines(out / "metrics.jsonl")
    assert (step["skipped_updates"] == 4 and step["loss"] is None
            and step["warnings"][0]["name"] == "grad")
    assert json.loads((out / "summary.json").read_text())["warnings"] == {"grad": 1}
    start, end = (arft.load(str(p)).model.state_dict()
                  for p in (ROOT / "data" / "tiny", out / "model"))
    assert all(torch.equal(start[k], end[k]) for k in start)
