"""Kills a run with kill -9 at random moments, resumes it each time, and compares it in the end with
a run that was never stopped.

    python tests/measure/kills.py --kills 30

A moment is a number of function calls after the run has taken its folder, so a seed always kills at
about the same places, however fast the machine is. The processes are forks of this one, so that the
libraries are imported once. After each kill every file of the run folder must be readable, and at
most the step in progress may be lost. A finished run is compared bit for bit, and another one
begins until there were enough kills. Exit code 1 at any fault. The tests run two kills.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "measure"), str(ROOT / "tests")]

import arft
from extras import record, resume
from test_resume import assert_same_run

OPTIONS = ["--samples-per-step", "2", "--group-size", "2", "--max-new-tokens", "32",
           "--eval-samples", "1", "--max-turns", "1", "--sandbox-workers", "1"]


def count_calls(last: int | None) -> list[int]:
    """Counts function calls of this process from the moment when the run has taken its folder.

    Kills the process at call number `last`. Returns a list that always holds the count.
    """
    calls, write_config = [0], record.Run.write_config

    def count(frame, event, argument):
        calls[0] += 1
        if calls[0] == last:
            os.kill(os.getpid(), signal.SIGKILL)

    def counted(run, fingerprint):
        write_config(run, fingerprint)
        sys.setprofile(count)
    record.Run.write_config = counted
    return calls


def run_in_fork(options: list[str], last: int | None, note: Path) -> int:
    """Runs arft.py in a process of its own, which dies at call number `last`. Its exit code.

    A run that ends by itself writes the number of its calls into the file `note`.
    """
    sys.stdout.flush()
    process = os.fork()
    if process:
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    code = 1
    try:
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        os.dup2(silence, 2)
        calls = count_calls(last)
        code = arft.main(options)
        sys.setprofile(None)
        note.write_text(str(calls[0]))
    finally:
        os._exit(code)


def readable(out: Path) -> tuple[int, int]:
    """(steps in metrics.jsonl, step of the newest checkpoint). Raises an error if any file of the
    folder cannot be read."""
    for file in [*out.glob("*.json"), *out.glob("best/*.json"), *out.glob("model/*.json")]:
        json.loads(file.read_text())
    recorded = len(resume.read_lines(out / "metrics.jsonl"))
    resume.read_lines(out / "episodes.jsonl")
    state, wrong = resume.newest(out)
    assert not wrong, wrong
    return recorded, state["step"] if state else 0


def kill_once(out: Path, start: list[str], last: int | None) -> bool:
    """Starts or resumes the run and kills it at call number `last`. False: it ended before that."""
    options = ["--resume", str(out)] if out.exists() else [*start, "--out", str(out)]
    code = run_in_fork(options, last, out.with_suffix(".calls"))
    summary = out / "summary.json"
    finished = summary.exists() and "after" in json.loads(summary.read_text())
    # 2: an earlier kill came when the summary had just been written, so there is nothing to resume
    assert code in (0, -signal.SIGKILL) or (code == 2 and finished), f"exit code {code}"
    return code == -signal.SIGKILL


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    start = [*OPTIONS, "--steps", str(given.steps), "--eval-every", str(max(1, given.steps // 3))]
    rng, kills, finished = random.Random(given.seed), 0, 0
    with tempfile.TemporaryDirectory(prefix="kills-") as folder:
        whole = Path(folder) / "whole"
        assert not kill_once(whole, start, None)
        calls = int(whole.with_suffix(".calls").read_text())
        print(f"never stopped: {calls} calls", flush=True)
        while kills < given.kills or (Path(folder) / str(finished)).exists():
            out = Path(folder) / str(finished)
            last = rng.randrange(1, calls // 4) if kills < given.kills else None
            if kill_once(out, start, last):
                kills += 1
                recorded, saved = readable(out)
                print(f"kill {kills}, at call {last}: {recorded} steps recorded, checkpoint of "
                      f"step {saved}", flush=True)
                assert recorded - saved <= 1, "more than the step in progress was lost"
            else:
                assert_same_run(out, whole)
                finished += 1
                print(f"run {finished} is finished, and is the run that was never stopped",
                      flush=True)
    print(f"{kills} kills, {finished} runs compared bit for bit, no fault")
    return 0


if __name__ == "__main__":
    sys.exit(main())
