"""kill -9 at random moments, resumed each time, compared in the end with a run that was never
stopped. By hand:

    python tests/measure/kills.py --kills 30

The processes are forks of this one, so that the libraries are imported once. After each kill every
file of the run folder must be readable and at most the step in progress lost. When a run is
finished it is compared bit for bit, and another one begins until there were enough kills. Exit code
1 at any fault.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "measure"), str(ROOT / "tests")]

from extras import resume
from arft import main as arft
from test_resume import assert_same_run

OPTIONS = ["--steps", "12", "--samples-per-step", "2", "--group-size", "2", "--max-new-tokens",
           "32", "--eval-samples", "1",
           "--max-turns", "1", "--eval-every", "4"]


def start(*options: str) -> int:
    """The id of a process that runs arft.py with these options."""
    sys.stdout.flush()
    process = os.fork()
    if process:
        return process
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    os._exit(arft(list(options)))


def readable(out: Path) -> tuple[int, int]:
    """(steps in metrics.jsonl, step of the newest checkpoint); raises if any
    file of the folder cannot be read."""
    for file in [*out.glob("*.json"), *out.glob("best/*.json"), *out.glob("model/*.json")]:
        json.loads(file.read_text())
    recorded = len(resume.read_lines(out / "metrics.jsonl"))
    resume.read_lines(out / "episodes.jsonl")
    state, wrong = resume.newest(out)
    assert not wrong, wrong
    return recorded, state["step"] if state else 0


def kill_once(out: Path, wait: float) -> bool:
    """Starts or resumes the run and kills it `wait` seconds after it took
    the folder. False: it ended before that."""
    config = out / "config.json"
    before = config.stat().st_mtime_ns if config.exists() else 0
    process = start("--resume", str(out)) if before else start(*OPTIONS, "--out", str(out))
    ended = (0, 0)
    while not ended[0] and not (config.exists() and config.stat().st_mtime_ns > before):
        time.sleep(0.01)
        ended = os.waitpid(process, os.WNOHANG)
    end = time.perf_counter() + wait
    while not ended[0] and time.perf_counter() < end:
        time.sleep(0.002)
        ended = os.waitpid(process, os.WNOHANG)
    if not ended[0]:
        os.kill(process, signal.SIGKILL)
        ended = os.waitpid(process, 0)
    code = os.waitstatus_to_exitcode(ended[1])
    finished = (out / "summary.json").exists() and "after" in json.loads(
        (out / "summary.json").read_text())
    # 2: it was killed at its very end
    assert code in (0, -signal.SIGKILL) or finished, f"exit code {code}"
    return code == -signal.SIGKILL


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    rng, kills, finished = random.Random(given.seed), 0, 0
    with tempfile.TemporaryDirectory(prefix="kills-") as folder:
        whole = Path(folder) / "whole"
        assert not kill_once(whole, 3600)
        seconds = json.loads((whole / "summary.json").read_text())["seconds"]
        print(f"never stopped: {seconds:.0f} s", flush=True)
        while kills < given.kills or (Path(folder) / str(finished)).exists():
            out = Path(folder) / str(finished)
            if kill_once(out, rng.uniform(0, seconds / 4) if kills < given.kills else 3600):
                kills += 1
                recorded, saved = readable(out)
                print(f"kill {kills}: {recorded} steps recorded, checkpoint of step {saved}",
                      flush=True)
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
