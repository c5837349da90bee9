"""extras/metrics.py: what goes wrong, seen in the numbers of hand-written steps, and a step's line
on the screen; and what a run says of both."""

import dataclasses
import itertools
import json
import re

import pytest
import torch

import grpo
from arft import Config, main
from conftest import ROOT, SHORT_RUN, made_run
from extras import metrics, record, resume
from extras.metrics import step_line, warnings_of
from extras.options import flag_of
from extras.weights import load

GOOD = {"zero_variance": 0.25, "kl": 0.1, "entropy": 0.16, "tool_calls": 60, "logp_error": 4e-5,
        "skipped_updates": 0}
# a step without an update
NOTHING = dict.fromkeys(("kl", "entropy", "logp_error", "skipped_updates"))
ALL_BAD = {"kl": 1.0, "entropy": 0.0, "tool_calls": 0, "logp_error": 1.0, "skipped_updates": 4,
           "zero_variance": 1.0, "ended": {"answer": 2, "cut": 3, "turns": 0, "length": 3}}
ALL_NAMES = ["grad", "zero-variance", "KL", "entropy", "tools", "length", "cut", "logp"]
ALL_ANSWER = {"answer": 100, "cut": 0, "turns": 0, "length": 0}


def names(*steps: dict, **options) -> list[str]:
    return [warning["name"] for warning in warnings_of([{**GOOD, **step} for step in steps],
                                                       **options)]


@pytest.mark.parametrize("steps, wanted", [
    ([{}] * 9, []),
    ([{}, {"skipped_updates": 1}], ["grad"]), ([{"skipped_updates": 1}, {}], []),
    ([{"zero_variance": 1.0}] * 3, ["zero-variance"]), ([{"zero_variance": 1.0}] * 2, []),
    ([{"zero_variance": 1.0}] * 3 + [{}], []),
    ([{}, *[{"zero_variance": 1.0, **NOTHING}] * 3], ["zero-variance"]),
    ([{"kl": 0.51}] * 3, ["KL"]), ([{"kl": 3.0}] * 2, []),
    ([{"kl": 3.0}, {"kl": 0.4}, {"kl": 3.0}], []),
    ([{"kl": 0.6}, {"kl": 0.6}, NOTHING, {"kl": 0.6}], ["KL"]), ([*[{"kl": 0.6}] * 3, NOTHING], []),
    ([{}] * 3 + [{"entropy": 0.015}] * 3, ["entropy"]), ([{}] * 3 + [{"entropy": 0.017}] * 3, []),
    ([{"entropy": 0.001}] * 6, []), ([{}] * 3 + [{"entropy": 0.08}] * 30, []),
    ([{}] * 3 + [{"tool_calls": 0}] * 3, ["tools"]), ([{}] * 3 + [{"tool_calls": 0}] * 2, []),
    ([{"tool_calls": 0}] * 9, []), ([{}] * 3 + [{"tool_calls": 4}] * 3, []),
    ([{}] * 4 + [{"tool_calls": 2}] * 3, ["tools"]),
    ([{"ended": {"answer": 94, "cut": 0, "turns": 0, "length": 6}}], ["length"]),
    ([{"ended": {"answer": 94, "cut": 6, "turns": 0, "length": 0}}], ["cut"]),
    ([{"ended": {"answer": 0, "cut": 5, "turns": 90, "length": 5}}], []),
    ([{"ended": {"answer": 90, "cut": 0, "turns": 0, "length": 10}}] + [{"ended": ALL_ANSWER}],
     []),
    ([{"ended": {"answer": 89, "cut": 0, "turns": 0, "length": 11}}] + [{"ended": ALL_ANSWER}],
     ["length"]),
    ([{"ended": {"answer": 0, "cut": 0, "turns": 0, "length": 9}}] + [{"ended": ALL_ANSWER}] * 3,
     []),
    ([{"logp_error": 0.02}], ["logp"]), ([{"logp_error": 0.009}], []),
    ([{}] * 3 + [ALL_BAD] * 3, ALL_NAMES)])
def test_warnings_by_hand(steps, wanted):
    assert names(*steps) == wanted


def test_log_probs_in_bfloat16_may_differ_by_more(tmp_path):
    in_32, in_16 = metrics.LOGP_ERROR_FLOAT32, metrics.LOGP_ERROR_BFLOAT16
    assert names({"logp_error": 0.2}, logp_limit=in_16) == []
    assert names({"logp_error": 0.6}, logp_limit=in_16) == ["logp"]
    for name, device, dtype, limit in (("a", "cpu", "bfloat16", in_16),
                                       ("b", "cuda", "float32", in_32)):
        run = record.Run(Config(out=str(tmp_path / name), device=device, dtype=dtype))
        assert run.logp_limit == limit


def test_every_warning_names_an_option_that_there_is():
    found = warnings_of([GOOD] * 3 + [GOOD | ALL_BAD] * 3)
    flags = {flag_of(field.name) for field in dataclasses.fields(Config)}
    for warning in found:
        assert warning["option"] in warning["message"] and warning["option"] in flags
    assert [warning["name"] for warning in found] == ALL_NAMES


# --- a step's line --------------------------------------------------------------------------------


USUAL = GOOD | {"step": 1, "reward_mean": 2.5, "em": 0.5, "problem": 0.5, "groups": 8,
                "tool_failures": 0, "seconds": 4.2}
WORST = {"step": 1400, "kl": 123.456, "entropy": 10.25, "tool_calls": 4000, "seconds": 1234.5}


def warned_by(*kinds: str) -> dict:
    return {"warnings": [{"name": name, "message": "", "option": ""} for name in kinds]}


@pytest.mark.parametrize("changes, line", [
    ({}, "problem 0.50  KL 0.100  tools 60  4.2 s"),
    ({"tool_failures": 3}, "problem 0.50  tools 60  failed 3  4.2 s"),
    ({"kl": None, "entropy": None}, "problem 0.50  KL 0.000  tools 60  4.2 s"),
    ({"query": 0.25, "problem": 0.0}, "query 0.25  KL 0.100  tools 60  4.2 s"),
    ({"ended": {"answer": 5, "cut": 2, "turns": 1, "length": 0}},
     "tools 60  cut off 2  out of turns 1  4.2 s"),
    ({"ended": {"answer": 5, "cut": 0, "turns": 0, "length": 1}},
     "problem 0.50  tools 60  too long 1  4.2 s"),
    (warned_by("KL"), "problem 0.50  KL 0.100  tools 60  4.2 s  ! KL"),
    (warned_by("KL", "entropy") | {"tool_failures": 3}, "tools 60  failed 3  4.2 s  ! KL entropy")])
def test_a_step_s_line_by_hand(changes, line):
    assert step_line(USUAL | changes) == "step    1  reward 2.50  EM 0.50  " + line


def test_the_least_important_numbers_of_a_step_s_line_give_way_first():
    entered = {}        # the columns from which on a number is shown
    for columns in range(31, 131):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(metrics, "LINE", columns)
            line = step_line(USUAL)
        assert len(line) <= columns
        for name in ("tools", "s", "problem", "KL", "entropy", "zero-variance"):
            if name in line.split():
                entered.setdefault(name, columns)
    assert sorted(entered, key=entered.get) == ["tools", "s", "problem", "KL", "entropy",
                                                "zero-variance"]


def test_the_step_s_line_names_them_and_fits():
    """80 columns, whatever happens. Step, reward, EM, failed tools, endings other than an answer
    and warnings never give way."""
    endings = ({}, {"answer": 3000}, {"cut": 1000}, {"answer": 1, "cut": 1000, "length": 1000,
                                                     "turns": 1000})
    warned = [combination for n in range(7) for combination in itertools.combinations(ALL_NAMES, n)]
    for most in ({}, WORST):
        for failed, ended, bad in itertools.product((0, 3, 3999), endings, warned):
            line = step_line(USUAL | most | warned_by(*bad) | {"tool_failures": failed,
                                                               "ended": ended})
            first, *more = line.split("\n")
            assert max(map(len, (first, *more))) <= 80
            step = (USUAL | most)["step"]
            assert first.startswith(f"step {step:4d}  reward 2.50  EM 0.50")
            said = [f"failed {failed}"] if failed else []
            said += [f"{metrics.ENDINGS[why]} {n}" for why, n in ended.items() if why != "answer"]
            said += [f"! {' '.join(bad)}"] if bad else []
            where = [line.find(f"  {words}") for words in said]
            assert -1 not in where and where == sorted(where)
            others = ("failed", "cut off", "out of turns", "too long", "!")
            assert sum(word in line for word in others) == len(said)
            assert bool(more) == (31 + sum(len(f"  {words}") for words in said) > 80)


def test_what_never_gives_way_has_further_lines_where_it_needs_more_room():
    full = {"tool_failures": 12, "ended": {"cut": 10, "turns": 2, "length": 3}}
    assert step_line(USUAL | full | warned_by("KL", "entropy")).split("\n") == [
        "step    1  reward 2.50  EM 0.50  failed 12  cut off 10  out of turns 2",
        "         too long 3  ! KL entropy"]
    assert step_line(USUAL | {"tool_failures": 3} | warned_by(*ALL_NAMES)).split("\n") == [
        "step    1  reward 2.50  EM 0.50  failed 3",
        "         ! grad zero-variance KL entropy tools length cut logp"]


# --- what a run says ------------------------------------------------------------------------------


def run_of(folder, *changes: dict):
    """A run after these steps, at the end of the last one."""
    run = record.Run(Config(out=str(folder)))
    run.metrics = [{**USUAL, **step} for step in changes]
    return run


def test_a_run_without_room_says_so_in_its_first_step_and_in_its_scores(tmp_path):
    said = made_run(tmp_path / "run", *SHORT_RUN, "--steps", "1", "--max-length", "70").said
    first, = [line for line in said.split("\n") if line.startswith("step    1")]
    assert re.search(r"  too long [1-9].*! length", first)
    assert "ended without an answer, because the next observation did not fit" in said
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    ended = summary["before"]["sampled"]["ended"]
    assert sum(ended.values()) == 6 and ended["length"] > 0
    missing = 6 - ended["answer"]
    assert f"before, sampled: {missing} of 6 without an answer (" in said
    assert f"too long {ended['length']})" in said


def test_a_warning_is_said_in_full_once_and_counted(tmp_path, capsys):
    kl = {"warnings": [{"name": "KL", "message": "away. Raise --beta", "option": "--beta"}]}
    run_of(tmp_path / "a", {}, kl).say_step()
    line, told = capsys.readouterr().out.splitlines()
    assert line.endswith("  ! KL") and told == "! KL: away. Raise --beta"
    run = run_of(tmp_path / "b", {}, kl, kl)
    run.say_step()
    line, = capsys.readouterr().out.splitlines()
    assert line.endswith("  ! KL") and run.warned() == {"KL": 2}
    run.say_scores()
    assert "warnings: KL in 2 steps" in capsys.readouterr().out


SHORT = ["--steps", "1", "--samples-per-step", "2", "--group-size", "2", "--max-new-tokens", "32",
         "--eval-samples", "1", "--eval-sampled", "off", "--max-turns", "1", "--zero-variance",
         "keep"]


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
    for words in ("! grad", "4 updates were skipped", "Lower --lr", "warnings: grad in 1 steps"):
        assert words in said
    step, = resume.read_lines(out / "metrics.jsonl")
    assert step["skipped_updates"] == 4 and step["loss"] is None
    assert step["warnings"][0]["name"] == "grad"
    assert json.loads((out / "summary.json").read_text())["warnings"] == {"grad": 1}
    start, end = (load(str(folder)).model.state_dict()
                  for folder in (ROOT / "data" / "tiny", out / "model"))
    assert all(torch.equal(start[k], end[k]) for k in start)
