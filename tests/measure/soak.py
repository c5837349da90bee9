"""Watches a run of two hundred steps from outside: does memory grow, is anything left over?

    python tests/measure/soak.py --steps 200 -- --samples-per-step 4 --group-size 4 \
        --eval-samples 20

It needs Linux (/proc). What stands behind `--` goes to arft.py. The program prints resident memory,
open files, processes and scratch directories of the run by step, and at the end what is left of
them. Exit code 1 if something is, or if memory grew by more than 5%.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
# how much the mean memory of the last quarter of the steps may lie above that of the second quarter
FLAT = 0.05
PATIENCE = 30.0     # seconds that the run's processes may take to end after it


def family(pid: int) -> list[int]:
    """A process and all below it."""
    try:
        children = [int(c) for task in Path(f"/proc/{pid}/task").iterdir()
                    for c in (task / "children").read_text().split()]
    except OSError:
        return []
    return [pid, *(p for child in children for p in family(child))]


def born(pid: int) -> str:
    """When a process started, in ticks; "" if there is none.

    The system uses an id again, but never with the same time.
    """
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""


def memory(pid: int) -> float:
    """Resident memory, MB; 0 for a process that has just ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) / 1024
    except (OSError, StopIteration):
        return 0.0


def open_files(pid: int) -> int:
    """How many files a process has open; 0 for one that has just ended."""
    try:
        return len(os.listdir(f"/proc/{pid}/fd"))
    except OSError:
        return 0


def directories(scratch: Path) -> list[Path]:
    """The sandbox's scratch directories; torch has a cache in that folder, too."""
    return list(scratch.glob("arft-*"))


def look(pid: int, scratch: Path) -> tuple[float, int, int, int]:
    """Memory of the trainer in MB, its open files, it and the processes below it, directories."""
    return memory(pid), open_files(pid), len(family(pid)), len(directories(scratch))


def steps_of(out: Path) -> int:
    """How many steps a run has recorded."""
    metrics = out / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


def watch(process: subprocess.Popen, out: Path, scratch: Path, steps: int) -> tuple[list, bool]:
    """([(step, *look) of each step], whether anything was left over when the run had ended)."""
    rows, seen = [], set()
    while process.poll() is None:
        seen.update((pid, born(pid)) for pid in family(process.pid))
        done = steps_of(out)
        if done > (rows[-1][0] if rows else 0):
            rows.append((done, *look(process.pid, scratch)))
            if done == 1 or done % max(1, steps // 10) == 0:
                print("{:5d}  {:9.1f}  {:5d}  {:9d}  {:7d}".format(*rows[-1]), flush=True)
        time.sleep(0.1)

    def left_over() -> tuple[list, list]:
        return [pid for pid, start in seen if start and born(pid) == start], directories(scratch)
    end = time.monotonic() + PATIENCE
    while any(left_over()) and time.monotonic() < end:
        time.sleep(0.1)
    processes, names = left_over()
    print(f"left over: {len(processes)} processes, {len(names)} scratch directories")
    return rows, bool(processes or names)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=200, help="at least 4")
    parser.add_argument("options", nargs="*", help="go to arft.py")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        scratch, out = Path(folder) / "tmp", Path(folder) / "run"
        scratch.mkdir()
        command = [sys.executable, str(ROOT / "arft.py"), "--steps", str(given.steps), "--out",
                   str(out), *given.options]
        print(" step  memory MB  files  processes  scratch")
        process = subprocess.Popen(command, env={**os.environ, "TMPDIR": str(scratch)},
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        rows, left = watch(process, out, scratch, given.steps)
    if process.returncode or left:
        print(f"exit code {process.returncode}")
        return 1
    quarter = len(rows) // 4
    if not quarter:
        print("too few steps were seen to compare memory; give more --steps")
        return 1
    second, last = rows[quarter:2 * quarter], rows[-quarter:]
    early, late = (sum(row[1] for row in part) / quarter for part in (second, last))
    print(f"memory, mean of the second quarter of the steps {early:.0f} MB, of the last {late:.0f} "
          f"MB: {late / early - 1:+.1%}")
    # files and processes: a step may be seen while a file is being written, a quarter is not
    more = any(max(row[column] for row in last) > max(row[column] for row in second)
               for column in (2, 3))
    return int(late / early - 1 > FLAT or more)


if __name__ == "__main__":
    sys.exit(main())
