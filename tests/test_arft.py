"""The program: options, whole runs, what a run leaves behind, and input that is not right."""

import dataclasses
import json
import os
import signal
import subprocess
import sys

import pytest
import torch

import arft
import rewards
from arft import Config, main
from conftest import ROOT, SHORT_RUN, made_run, parts_of
from data.mat import DataError
from extras import options, record, resume, setup
from extras.options import UsageError
from extras.weights import load
from rollout import Episode

MAT_SAMPLE = ROOT.parent / "shared" / "mat-sample" / "MAT"
SHORT = ["--steps", "2", "--samples-per-step", "2", "--group-size", "4", "--eval-samples", "3",
         "--eval-sampled", "off", "--max-turns", "3"]


def run(tmp_path, *arguments, name="run"):
    out = tmp_path / name
    return main(["--task", "mat-coding", "--out", str(out), *arguments]), out


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def weights_of(folder):
    return load(str(folder)).model.state_dict()


def same_weights(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


# --- options --------------------------------------------------------------------------------------


def test_every_field_is_an_option_with_a_help_text(capsys):
    with pytest.raises(SystemExit):
        options.parse(Config, ["--help"])
    said = "".join(capsys.readouterr().out.split())     # argparse breaks lines at hyphens, too
    texts = {}
    for cls in (Config, *Config.__bases__):
        texts |= options.comments_of(cls)
    for field in dataclasses.fields(Config):
        group, text = texts[field.name]
        assert len(text) > 10
        assert all("".join(part.split()) in said
                   for part in (options.flag_of(field.name), text, f"{group}:"))


def test_values_reach_the_config_with_their_type():
    config = options.parse(Config, ["--lr", "3e-4", "--steps", "7", "--eval-only", "--loss-type",
                                    "dapo", "--weight", "query=2", "--weight", "problem=0"])
    assert (config.lr, config.steps, config.eval_only, config.loss_type) == (3e-4, 7, True, "dapo")
    assert config.weight == {"query": 2.0, "problem": 0.0}
    assert options.parse(Config, []) == Config()


@pytest.mark.parametrize("arguments, message", [
    (["--task", "mat-cooking"], "mat-cooking"), (["--learning-rate", "1"], "--learning-rate"),
    (["--warm", "1"], "--warm"), (["--lr", "fast"], "fast"),
    (["--weight", "answer"], "--weight answer: must be NAME=X"),
    (["--weight", "luck=1"], "NAME is one of answer, format, problem, query"),
    (["--weight", "answer=nan"], "X is finite")])
def test_unknown_flags_and_values_end_with_code_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("arguments, message", [
    (["--steps", "-1"], "--steps -1: must be at least 0"),
    (["--group-size", "1"], "compares the episodes of a group"),
    (["--temperature", "0"], "--temperature 0.0: must be a positive number"),
    (["--lr", "nan"], "must be a positive number"),
    (["--device", "cuda:7"], "--device cpu"),
    (["--crop-box", "model"], "add --protocol paper"),
    (["--model", "no/such/folder"], "does not exist"),
    (["--data", "{tmp}/nothing"], "nothing"),
    (["--out", "{tmp}"], "exists; nothing was overwritten"),
    (["--task", "hotpotqa"], "needs --data"),
])
def test_bad_input_is_one_or_two_lines_and_code_2(arguments, message, tmp_path, capsys):
    arguments = [a.format(tmp=tmp_path) for a in arguments]
    arguments += [] if "--out" in arguments else ["--out", str(tmp_path / "new")]
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") <= 2 and "Traceback" not in said
    assert list(tmp_path.iterdir()) == []


def test_bad_rows_and_images_name_file_and_field(tmp_path, capsys):
    folder = tmp_path / "MAT" / "MAT-Benchmark"
    (folder / "MAT-Coding-image").mkdir(parents=True)
    row = {"id": 1, "question": "?", "answers": ["1"], "ori_image_path": "a.png",
           "processed_image_path": "a.png", "type": ["dark"], "split": "simple"}
    (folder / "MAT-Coding-image" / "a.png").write_bytes(b"no image")
    for rows, message in (([{k: v for k, v in row.items() if k != "question"}], "question"),
                          ([row], "a.png")):
        (folder / "MAT-Coding.json").write_text(json.dumps(rows))
        code, out = run(tmp_path, "--eval-only", "--data", str(tmp_path / "MAT"))
        assert code == 2 and message in capsys.readouterr().err
        if out.exists():
            out.rename(tmp_path / "old")


# --- whole runs -----------------------------------------------------------------------------------


def test_a_run_writes_what_the_readme_says(short_run):
    out = short_run.folder
    assert short_run.code == 0
    assert {p.name for p in out.iterdir()} == {
        "config.json", "metrics.jsonl", "metrics.csv", "episodes.jsonl", "tokens.jsonl",
        "evaluations.jsonl", "predictions-before.json", "predictions-after.json", "summary.json",
        "report.html", "checkpoint", "model", "best", "images"}
    metrics = lines(out / "metrics.jsonl")
    assert [m["step"] for m in metrics] == [1, 2]
    assert set(metrics[0]) >= {
        "reward_mean", "reward_std", "answer", "format", "problem", "em", "group_std",
        "zero_variance", "kl", "ratio", "clip_fraction", "entropy", "grad_norm", "tool_calls",
        "tool_failures", "turns", "tokens", "logp_error", "seconds_by_phase", "tokens_per_second",
        "lr"}
    assert set(metrics[0]["seconds_by_phase"]) == {"vision", "prefill", "decode", "tools", "update"}
    assert all(m["logp_error"] < 1e-4 for m in metrics), "what was sampled is not what is scored"
    summary = json.loads((out / "summary.json").read_text())
    assert set(summary) >= {"before", "after", "steps", "seconds", "seconds_by_phase"}
    assert summary["steps"] == 2
    assert set(summary["before"]) >= {"n", "em", "f1", "em_ci95", "f1_ci95", "splits", "sampled"}
    predictions = json.loads((out / "predictions-after.json").read_text())
    assert len(predictions) == 6 and set(predictions[0]) >= {"id", "gt", "pred_answer"}
    episodes = lines(out / "episodes.jsonl")
    assert len(episodes) == 6 + 8 + 8 + 6
    named = [t["image"] for e in episodes for t in e["turns"] if t["image"]]
    assert named and all((out / name).exists() for name in named)
    assert load(str(out / "model")).system_prompt == load(str(ROOT / "data" / "tiny")).system_prompt


def test_what_a_run_says(short_run):
    said = short_run.said.splitlines()
    assert "no CUDA here" in short_run.said or torch.cuda.is_available()
    steps = [line for line in said if line.startswith("step")]
    assert len(steps) == 2 and all("reward" in line and "EM" in line for line in steps)
    assert max(map(len, steps)) <= 80


def test_the_same_command_gives_the_same_run(short_run, tmp_path):
    """The one evaluates between its steps, the other does not: an evaluation draws nothing that
    training draws."""
    again = made_run(tmp_path / "again", *SHORT_RUN)
    drop = ("seconds", "seconds_by_phase", "tokens_per_second")
    first, second = ([{k: v for k, v in m.items() if k not in drop}
                      for m in lines(one.folder / "metrics.jsonl")] for one in (short_run, again))
    assert first == second
    assert same_weights(*(weights_of(one.folder / "model") for one in (short_run, again)))
    for name in ("predictions-before.json", "predictions-after.json"):
        assert (short_run.folder / name).read_text() == (again.folder / name).read_text()


def test_training_changes_the_weights_and_evaluation_does_not(short_run, evaluation_run):
    out = evaluation_run.folder
    assert not (out / "model").exists() and not (out / "metrics.jsonl").exists()
    start, end = weights_of(ROOT / "data" / "tiny"), weights_of(short_run.folder / "model")
    assert not same_weights(start, end)
    rates = [m["lr"] for m in lines(short_run.folder / "metrics.jsonl")]
    assert rates == [pytest.approx(1e-3 / 6, rel=1e-4)] * 2


def test_the_learning_rate_by_hand():
    """Four steps of warm-up of a run of ten; step s of the line down has 1 - s / 10 left."""
    def rates(schedule):
        config = Config(lr=1.0, steps=10, warmup=4, lr_schedule=schedule)
        return [round(arft.learning_rate(config, step), 6) for step in range(10)]
    assert rates("linear") == [0.2, 0.36, 0.48, 0.56, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]
    assert rates("constant") == [0.2, 0.4, 0.6, 0.8] + [1.0] * 6


def test_evaluation_is_greedy_and_sampled_at_temperature_one(tmp_path, monkeypatch, samples,
                                                             policy):
    """Whatever the temperature of training is."""
    asked = []

    def rollout(policy, samples, *, limits, **more):
        asked.append(limits.temperature)
        return [Episode(sample) for sample in samples]
    monkeypatch.setattr(setup, "rollout", rollout)
    config = Config(out=str(tmp_path / "run"), temperature=0.7, rollout_batch=8, eval_batch=8)
    parts = parts_of(config, policy)
    arft.evaluate(policy, samples(("dark",)), config, parts, "before")
    assert asked == [0.0, 1.0]


def test_a_bad_image_in_the_middle_costs_nothing_that_was_learned(tmp_path, monkeypatch, capsys):
    true, calls = setup.rollout, []

    def rollout(*arguments, **more):
        calls.append(1)
        if len(calls) > 3:          # the evaluation and two steps
            raise DataError("17.png: not a readable image; download it again")
        return true(*arguments, **more)
    monkeypatch.setattr(setup, "rollout", rollout)
    code, out = run(tmp_path, *SHORT, "--steps", "9")
    assert code == 2 and "17.png" in capsys.readouterr().err
    assert json.loads((out / "summary.json").read_text())["steps"] == 2
    assert load(str(out / "model")) and (out / "checkpoint" / "step-000002.pt").exists()


def always_earns(monkeypatch, total):
    """Every episode has this reward, whatever it did."""
    true = rewards.episode_reward
    monkeypatch.setattr(rewards, "episode_reward", lambda *a, **k: dataclasses.replace(
        true(*a, **k), total=total))


def test_rewards_that_are_not_finite_stop_the_step_with_the_sample_s_name(tmp_path, monkeypatch,
                                                                         capsys):
    always_earns(monkeypatch, float("nan"))
    code, out = run(tmp_path, *SHORT)
    said = capsys.readouterr().err
    assert code == 2 and "sample " in said and "its reward is nan" in said
    assert not (out / "metrics.jsonl").exists()


def test_model_text_in_the_report_is_escaped(tmp_path):
    config = Config(out=str(tmp_path / "run"), model="<script>alert(1)</script>", steps=0)
    record.Run(config).finish()
    page = (tmp_path / "run" / "report.html").read_text()
    assert "<script>alert" not in page and "&lt;script&gt;" in page


def test_a_step_that_teaches_nothing_has_no_statistics_and_changes_nothing(tmp_path, monkeypatch):
    always_earns(monkeypatch, 1.0)
    code, out = run(tmp_path, *SHORT)
    assert code == 0
    assert all(m["zero_variance"] == 1 and m["kl"] is None and m["updates"] is None
               for m in lines(out / "metrics.jsonl"))
    assert same_weights(weights_of(ROOT / "data" / "tiny"), weights_of(out / "model"))


def test_ctrl_c_saves_what_was_learned(tmp_path):
    """As a terminal sends it: to the program and to every process that it has started."""
    out = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-u", str(ROOT / "arft.py"), *SHORT, "--steps", "1000", "--out", str(out)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    for line in process.stdout:
        if line.startswith("step"):
            break
    os.killpg(process.pid, signal.SIGINT)
    said, errors = process.communicate(timeout=120)
    assert process.returncode == 130 and "Traceback" not in errors, errors
    assert f"python arft.py --resume {out}" in said
    summary = json.loads((out / "summary.json").read_text())
    assert summary["interrupted"] and summary["steps"] == len(lines(out / "metrics.jsonl")) >= 1
    load(str(out / "model"))
    assert resume.newest(out)[0]["step"] == summary["steps"]


@pytest.mark.skipif(not MAT_SAMPLE.exists(), reason="the MAT sample is not beside this checkout")
def test_published_rows_and_photographs_run_to_the_end(tmp_path):
    code, out = run(tmp_path, "--eval-only", "--model", str(ROOT / "data" / "tiny"), "--data",
                    str(MAT_SAMPLE), "--eval-sampled", "off")
    assert code == 0
    predictions = json.loads((out / "predictions-before.json").read_text())
    assert [p["id"] for p in predictions] == [12, 22, 63, 119]
    assert predictions[0]["gt"] == ["1 Can (473ml)"]


def test_an_option_that_cannot_be_is_a_usage_error():
    with pytest.raises(UsageError, match="--group-size 1"):
        options.check(Config(group_size=1))
