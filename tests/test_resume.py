"""extras/resume.py and --resume: whatever stops a run, the resumed one is the run that never
stopped, bit for bit."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import arft
import extras
from arft import Config, main
from conftest import ROOT
from extras import options, record, resume, setup, usage
from extras.engine import CLOCK
from extras.resume import RunError
from extras.usage import UsageError
from test_tools import wait_for

SHORT = ["--steps", "3", "--samples-per-step", "2", "--group-size", "2", "--max-new-tokens", "32",
         "--eval-samples", "1", "--max-turns", "1", "--eval-every", "2", "--inner-epochs", "1",
         "--sandbox-workers", "1"]


class Killed(BaseException):
    """What a test raises where kill -9 would strike."""


@pytest.fixture(scope="module")
def never_stopped(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    assert main([*SHORT, "--out", str(out)]) == 0
    start, end = (load_file(folder / "model.safetensors")
                  for folder in (ROOT / "data" / "tiny", out / "model"))
    changed = [name for name in start if not torch.equal(start[name], end[name])]
    assert changed, "a run that learns nothing shows nothing"
    return out


def unfinished(never_stopped: Path, tmp_path: Path) -> Path:
    """A copy that was killed in the evaluation after training."""
    out = tmp_path / "run"
    shutil.copytree(never_stopped, out)
    (out / "summary.json").unlink()
    return out


def without_times(value):
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items()
                if k not in ("seconds", "seconds_by_phase", "tokens_per_second")}
    return [without_times(v) for v in value] if isinstance(value, list) else value


def assert_same_run(a: Path, b: Path):
    """Everything that two run folders say is equal, but for seconds and the folder's own name."""
    for name in ("metrics.jsonl", "episodes.jsonl"):
        first, second = (without_times(resume.read_lines(run / name)) for run in (a, b))
        assert first == second, name
        assert (a / name).read_bytes().endswith(b"\n")
    for name in ("summary.json", "predictions-before.json", "predictions-after.json",
                 "best/best.json"):
        first, second = (without_times(json.loads((run / name).read_text())) for run in (a, b))
        assert first == second, name
    for name in ("model", "best"):
        first, second = (load_file(run / name / "model.safetensors") for run in (a, b))
        assert all(torch.equal(first[key], second[key]) for key in first | second), name
    first, second = (sorted(str(file.relative_to(run)) for file in run.rglob("*"))
                     for run in (a, b))
    assert first == second


def stop_at_call(monkeypatch, module, name: str, number: int, stop, about: str = ""):
    """Replaces module.name: its call of that number (from 1) runs `stop` before it does its work.

    about: only calls count that have this in an argument which is a text or a path.
    """
    true, calls = getattr(module, name), []

    def counted(*arguments, **more):
        texts = [str(a) for a in arguments if isinstance(a, (str, Path))]
        if not about or any(about in text for text in texts):
            calls.append(1)
            if len(calls) == number:
                stop()
        return true(*arguments, **more)
    monkeypatch.setattr(module, name, counted)


# --- killed ---------------------------------------------------------------------------------------


# A process that runs arft.py and kills itself between the two optimiser steps of step 2.
KILLED_IN_STEP_2 = """
import os, signal, sys
import arft
true, calls = arft.update, []

def update(*arguments, optimizer, **more):
    calls.append(1)
    if len(calls) == 2:
        step = optimizer.step
        optimizer.step = lambda *given: (step(*given), os.kill(os.getpid(), signal.SIGKILL))
    return true(*arguments, optimizer=optimizer, **more)
arft.update = update
sys.exit(arft.main(sys.argv[1:]))
"""


def test_kill_9_in_the_middle_of_a_step(never_stopped, tmp_path, capsys):
    out, scratch = tmp_path / "run", tmp_path / "scratch"
    scratch.mkdir()
    command = [sys.executable, "-c", KILLED_IN_STEP_2, *SHORT, "--out", str(out)]
    killed = subprocess.run(command, cwd=ROOT, env={**os.environ, "TMPDIR": str(scratch)},
                            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert killed.returncode == -signal.SIGKILL
    assert len(resume.read_lines(out / "metrics.jsonl")) == 1
    assert not (out / "summary.json").exists()
    assert main(["--resume", str(out)]) == 0
    assert "after step 1 of 3" in capsys.readouterr().out
    assert_same_run(out, never_stopped)
    assert wait_for(lambda: not list(scratch.iterdir())), "its sandbox left its directories"


def test_kill_9_at_two_random_moments():
    """A cut of tests/measure/kills.py."""
    command = [sys.executable, str(ROOT / "tests/measure/kills.py"), "--kills", "2", "--steps", "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "2 kills, " in done.stdout and "no fault" in done.stdout


@pytest.mark.parametrize("moment, about, number", [
    ("evaluate", "before", 1),              # nothing is complete
    ("append", "episodes.jsonl", 2),        # in step 1: its metrics are written, its episodes not
    ("replace", "step-000001.pt", 1),       # a checkpoint is written and not yet in its place
    ("rename", "best.new", 1),              # so is best/
    ("rename", "model.new", 1),             # so is model/, at the end
])
def test_killed_at_a_bad_moment(never_stopped, tmp_path, monkeypatch, moment, about, number):
    out, dead = tmp_path / "run", []

    def kill():
        dead.append(1)
        raise Killed

    def mortal(true):
        def call(*arguments, **more):       # a killed process does not do its `finally`
            if dead:
                raise Killed
            return true(*arguments, **more)
        return call
    where = {"evaluate": arft, "append": record.Run, "replace": os, "rename": Path}
    with monkeypatch.context() as patch:
        for name, module in [("fsync", os), *where.items()]:
            patch.setattr(module, name, mortal(getattr(module, name)))
        stop_at_call(patch, where[moment], moment, number, kill, about)
        with pytest.raises(Killed):
            main([*SHORT, "--out", str(out)])
    assert main(["--resume", str(out)]) == 0
    assert_same_run(out, never_stopped)


def test_a_torn_last_line_and_a_damaged_checkpoint_cost_a_step_at_most(never_stopped, tmp_path,
                                                                       capsys):
    out = unfinished(never_stopped, tmp_path)
    for name in ("metrics.jsonl", "episodes.jsonl"):
        with open(out / name, "a") as file:
            file.write('{"step": 4, "rew')
    assert len(resume.read_lines(out / "metrics.jsonl")) == 3
    newest = out / "checkpoint" / "step-000003.pt"
    damaged = bytearray(newest.read_bytes())
    damaged[len(damaged) // 2] ^= 1         # one bit
    newest.write_bytes(damaged)
    assert main(["--resume", str(out)]) == 0
    said = capsys.readouterr().out
    assert "step-000003.pt cannot be read" in said and "after step 2 of 3" in said
    assert_same_run(out, never_stopped)


# --- stopped --------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 0])
def test_ctrl_c_while_episodes_are_sampled_costs_that_step_alone(never_stopped, tmp_path,
                                                                 monkeypatch, capsys, steps):
    def interrupt():
        raise KeyboardInterrupt
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        # the first two rollouts are the evaluation's, greedy and sampled
        stop_at_call(patch, setup, "rollout", 2 + steps + 1, interrupt)
        assert main([*SHORT, "--save-every", "2", "--out", str(out)]) == 130
    said = capsys.readouterr().out
    assert f"to continue after step {steps}: python arft.py --resume {out}" in said
    assert json.loads((out / "summary.json").read_text())["interrupted"]
    assert (out / "model").exists() == (steps > 0)
    assert main(["--resume", str(out), "--save-every", "1"]) == 0
    assert_same_run(out, never_stopped)


def test_sigterm_within_an_update_waits_for_its_end(never_stopped, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_at_call(patch, arft, "update", 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert main([*SHORT, "--out", str(out)]) == 130
    steps = len(resume.read_lines(out / "metrics.jsonl"))
    assert steps >= 1 and (out / "checkpoint" / f"step-{steps:06d}.pt").exists()
    assert f"interrupted after {steps} complete steps" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert main(["--resume", str(out)]) == 0
    assert_same_run(out, never_stopped)


def test_an_update_that_was_cut_in_half_is_never_saved(never_stopped, tmp_path, monkeypatch,
                                                       capsys):
    def twice():
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        # after the first of two optimiser steps
        stop_at_call(patch, torch.nn.utils, "clip_grad_norm_", 2, twice)
        assert main([*SHORT, "--out", str(out)]) == 130
    assert "there is no model/ of it" in capsys.readouterr().out and not (out / "model").exists()
    assert main(["--resume", str(out)]) == 0
    assert_same_run(out, never_stopped)


# --- other options, other files -------------------------------------------------------------------


def refused(capsys, *arguments) -> str:
    assert main([str(a) for a in arguments]) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said and said.count("\n") <= 2
    return said


def test_a_finished_run_says_so_and_what_to_do(never_stopped, capsys):
    said = refused(capsys, "--resume", never_stopped)
    assert "finished (3 steps)" in said and f"--model {never_stopped / 'model'}" in said


@pytest.mark.parametrize("arguments, words", [
    (["--lr", "1"], "--lr 1.0: the run that you resume has 0.0002"),
    (["--seed", "3"], "--seed 3"),
    (["--loss-type", "dapo"], "has grpo"),
    (["--task", "2wiki"], "--task 2wiki"),
    (["--out", "x"], "--out x"),
    (["--steps", "9"], "falls to zero at step 3"),
    (["--check-data"], "--resume and --check-data"),
    (["--eval-only"], "--eval-only True")])
def test_options_that_would_make_another_run_are_refused_by_name(never_stopped, capsys, arguments,
                                                                 words):
    before = sorted((str(f), f.stat().st_mtime_ns) for f in never_stopped.rglob("*"))
    assert words in refused(capsys, "--resume", never_stopped, *arguments)
    assert before == sorted((str(f), f.stat().st_mtime_ns) for f in never_stopped.rglob("*"))


def test_options_of_the_machine_may_differ_and_equal_ones_may_be_repeated(never_stopped, tmp_path):
    out = unfinished(never_stopped, tmp_path)
    given = ["--resume", str(out), "--steps", "3", "--threads", "2", "--eval-every", "1",
             "--save-every", "7", "--device", "cpu"]
    config = resume.resumed(vars(options.parser_of(Config).parse_args(given)), Config)
    assert (config.steps, config.threads, config.eval_every, config.save_every) == (3, 2, 1, 7)
    assert (config.samples_per_step, config.max_turns, config.lr) == (2, 1, 2e-4)
    assert config.out == str(out)


def test_a_run_of_constant_rate_can_be_prolonged(tmp_path):
    constant = [*SHORT, "--lr-schedule", "constant"]
    long, short = tmp_path / "long", tmp_path / "short"
    assert main([*constant, "--steps", "2", "--out", str(long)]) == 0
    assert main([*constant, "--steps", "1", "--out", str(short)]) == 0
    assert main(["--resume", str(short), "--steps", "2"]) == 0
    assert_same_run(short, long)


def test_another_model_another_prompt_and_other_data_are_noticed(never_stopped, tmp_path, capsys):
    out, model, data = unfinished(never_stopped, tmp_path), tmp_path / "model", tmp_path / "data"
    shutil.copytree(ROOT / "data" / "tiny", model)
    weights = load_file(model / "model.safetensors")
    name = sorted(weights)[5]
    weights[name].view(-1)[-1] += 1e-3
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    said = refused(capsys, "--resume", out, "--model", model)
    assert f"{model} is not the model that the run began with" in said and "--model PATH" in said
    kept = json.loads((out / "config.json").read_text())
    shutil.copytree(kept["data"], data)
    rows = data / "MAT-Training" / "rft_agent_code_1_2k.json"
    rows.write_text(rows.read_text().replace("Read the number.", "Which number?", 1))
    assert "--data PATH" in refused(capsys, "--resume", out, "--data", data)
    words = tmp_path / "words.txt"
    words.write_text("Read.")
    assert "--system-prompt PATH" in refused(capsys, "--resume", out, "--system-prompt", words)
    assert (out / "checkpoint" / "step-000003.pt").exists()


def test_no_checkpoint_that_can_be_read(never_stopped, tmp_path, capsys):
    out = unfinished(never_stopped, tmp_path)
    for file in (out / "checkpoint").iterdir():
        file.write_bytes(file.read_bytes()[:1000])
    metrics = (out / "metrics.jsonl").read_bytes()
    said = refused(capsys, "--resume", out)
    assert "step-000003.pt" in said and "step-000002.pt" in said and "Nothing was changed" in said
    shutil.rmtree(out / "checkpoint")
    assert "steps but no checkpoint" in refused(capsys, "--resume", out)
    assert (out / "metrics.jsonl").read_bytes() == metrics


def test_folders_that_are_no_run(tmp_path, capsys):
    assert "config.json cannot be read" in refused(capsys, "--resume", tmp_path / "nothing")
    (tmp_path / "config.json").write_text("{")
    assert "config.json cannot be read" in refused(capsys, "--resume", tmp_path)


def test_options_of_another_version_are_not_dropped(never_stopped, tmp_path, capsys):
    out = unfinished(never_stopped, tmp_path)
    kept = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(kept | {"flat_groups": "keep"}))
    said = refused(capsys, "--resume", out)
    assert "has flat_groups, an option that this version does not know" in said
    assert str(kept["commit"]) in said


def test_a_checkpoint_of_several_processes_says_that_its_leaf_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "extras.many", None)
    with pytest.raises(UsageError, match="several processes wrote needs extras/many.py"):
        resume.restore(SimpleNamespace(alone=True, state={"ranks": 2}))


def test_a_leaf_that_lacks_a_package_is_not_missing_itself(tmp_path, monkeypatch):
    (tmp_path / "broken.py").write_text("import no_such_package")
    monkeypatch.setattr(extras, "__path__", [*extras.__path__, str(tmp_path)])
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        usage.leaf("broken")
    assert usage.leaf("no_such_leaf") is None


def test_a_run_that_is_still_running_is_left_alone(never_stopped, tmp_path, capsys):
    out = unfinished(never_stopped, tmp_path)
    with resume.locked(out):
        assert "is in use" in refused(capsys, "--resume", out)


# --- the disk -------------------------------------------------------------------------------------


def test_a_full_disk_stops_the_run_and_costs_no_step(never_stopped, tmp_path, monkeypatch, capsys):
    true, out = torch.save, tmp_path / "run"

    def full(state, file):
        if state["step"] >= 2:
            file.write(b"half of it")
            raise OSError(errno.ENOSPC, "No space left on device", file.name)
        return true(state, file)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        said = refused(capsys, *SHORT, "--out", out)
    assert "No space left" in said and "checkpoint is of step 1" in said
    assert f"--resume {out}" in said and not CLOCK.open, "a later run would book its time there"
    checkpoints = sorted(file.name for file in (out / "checkpoint").iterdir())
    assert checkpoints == ["step-000000.pt", "step-000001.pt"]
    assert main(["--resume", str(out)]) == 0
    assert_same_run(out, never_stopped)


def test_a_folder_that_is_removed_during_a_run(tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    stop_at_call(monkeypatch, arft, "update", 2, lambda: shutil.rmtree(out))
    said = refused(capsys, *SHORT, "--out", out)
    assert str(out) in said and "bring the folder back" in said and not out.exists()


def test_a_file_is_old_or_new_never_half(tmp_path):
    file = tmp_path / "a.json"
    resume.write_text(file, "old")

    def half(handle):
        handle.write(b"ne")
        raise OSError(errno.ENOSPC, "full")
    with pytest.raises(OSError):
        resume.write_file(file, half)
    assert file.read_text() == "old" and list(tmp_path.iterdir()) == [file]


def test_a_folder_is_old_or_new_never_half(tmp_path):
    folder = tmp_path / "best"
    resume.write_folder(folder, lambda new: (new / "a").write_text("1"))
    resume.write_folder(folder, lambda new: (new / "b").write_text("2"))
    assert [f.name for f in folder.iterdir()] == ["b"] and list(tmp_path.iterdir()) == [folder]
    folder.rename(tmp_path / "best.old")        # killed between the two renames
    (tmp_path / "best.new").mkdir()
    resume.repair_folder(tmp_path)
    assert [f.name for f in folder.iterdir()] == ["b"] and list(tmp_path.iterdir()) == [folder]


def test_files_that_grow_are_cut_to_a_checkpoint_and_later_ones_go(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"n": 1}\n')
    lengths = resume.lengths(tmp_path)
    (tmp_path / "a.jsonl").write_text('{"n": 1}\n{"n": 2}\n{"n"')
    (tmp_path / "metrics.csv").write_text("n\n")
    (tmp_path / "keep.txt").write_text("x")
    assert resume.read_lines(tmp_path / "a.jsonl") == [{"n": 1}, {"n": 2}]
    resume.cut_to_checkpoint(tmp_path, 1, lengths)
    assert resume.read_lines(tmp_path / "a.jsonl") == [{"n": 1}]
    assert sorted(f.name for f in tmp_path.iterdir()) == ["a.jsonl", "keep.txt"]
    (tmp_path / "a.jsonl").write_text("")
    with pytest.raises(RunError, match="a.jsonl is shorter"):
        resume.cut_to_checkpoint(tmp_path, 1, lengths)


def test_how_often_a_checkpoint_is_due(tmp_path):
    run = record.Run(Config(out=str(tmp_path / "run"), save_every=3))
    due = {}
    for step in (1, 2, 3, 6):
        run.metrics = [{}] * step
        due[step] = run.checkpoint_due()
    assert due == {1: False, 2: False, 3: True, 6: True}
    run.config.save_every = 0
    # 2 of 30 seconds are more than 5%, 2 of 50 are not
    run.saving, run.saved_at = 2.0, time.perf_counter() - 30
    assert not run.checkpoint_due()
    run.saved_at -= 20
    assert run.checkpoint_due()


# --- best/ ----------------------------------------------------------------------------------------


def test_best_is_the_highest_exact_match_and_of_equals_the_first(tmp_path, monkeypatch):
    def save(policy, folder):
        (folder / "weights").write_text(policy.name)
    monkeypatch.setattr(record.weights, "save", save)
    policy = SimpleNamespace()
    run = record.Run(Config(out=str(tmp_path / "run")), policy)
    for step, em in ((2, 0.25), (4, 0.5), (6, 0.5), (8, 0.125)):
        policy.name = f"step {step}"
        run.curve.append({"step": step, "greedy": em, "sampled": 0.0})
        run.keep_best()
    best = tmp_path / "run" / "best"
    assert (best / "weights").read_text() == "step 4"
    assert json.loads((best / "best.json").read_text()) == {"step": 4, "em": 0.5}


# --- nothing is left over -------------------------------------------------------------------------


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="needs /proc")
def test_a_run_leaves_no_process_file_or_directory_behind(tmp_path, monkeypatch):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))

    def open_files():
        return {os.readlink(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd")
                if os.path.exists(f"/proc/self/fd/{n}")}

    def children():
        return Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    before, family, counts = open_files(), children(), []       # other tests share a sandbox
    true = arft.update

    def counted(*arguments, **more):
        counts.append((len(os.listdir("/proc/self/fd")), len(children()),
                       len(list(scratch.iterdir()))))
        return true(*arguments, **more)
    monkeypatch.setattr(arft, "update", counted)
    assert main([*SHORT, "--steps", "4", "--eval-every", "0", "--max-new-tokens", "96",
                 "--max-turns", "2", "--sandbox-workers", "2", "--out", str(tmp_path / "run")]) == 0
    assert len(counts) == 4
    assert len(set(counts[1:])) == 1, f"files, processes, scratch directories by step: {counts}"
    assert children() == family and not list(scratch.iterdir())
    assert not {name for name in open_files() - before if str(tmp_path) in name}


def test_resume_is_not_mixed_with_what_is_done_instead_of_a_run(capsys):
    for instead in (["--report", "x"], ["--plan"], ["--save-merged", "x"],
                    ["--show-episode", "1", "x"]):
        assert main(["--resume", "x", *instead]) == 2
        assert f"--resume and {instead[0]} exclude each other" in capsys.readouterr().err
