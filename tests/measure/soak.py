"""Two hundred steps, watched from outside: does memory grow, is anything left over? By hand, on
Linux (/proc):

    python tests/measure/soak.py --steps 200 -- --samples-per-step 4 --group-size 4 --eval-samples
    20

What stands behind `--` goes to arft.py. Prints resident memory, open files, processes and scratch
directories of the run by step, and at the end what is left of them. Exit code 1 if something is, or
if memory grew by more than 5%.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
# how much the mean of the last quarter of the steps may lie above that of the second quarter
FLAT = 0.05


def family(pid: int) -> list[int]:
    """A process and all below it."""
    try:
        children = [int(c) for task in Path(f"/proc/{pid}/task").iterdir()
                    for c in (task / "children").read_text().split()]
    except OSError:
        return []
    return [pid, *(p for child in children for p in family(child))]


def born(pid: int) -> str:
    """When a process started, in ticks; "" if there is none. Ids are used
    again, ids with this are not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""


def memory(pid: int) -> float:
    """Resident, MB; 0 for a process that has just ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) / 1024
    except (OSError, StopIteration):
        return 0.0


def look(pid: int, scratch: Path) -> tuple[float, int, int, int]:
    """Memory of the trainer, MB; its open files; processes with it and below
    it; scratch directories."""
    files = len(os.listdir(f"/proc/{pid}/fd")) if Path(f"/proc/{pid}").exists() else 0
    # torch has a cache there, too
    return memory(pid), files, len(family(pid)), len(list(scratch.glob("arft-*")))


def watch(process: subprocess.Popen, out: Path, scratch: Path, steps: int) -> list[tuple]:
    """One row for each step: (step, *look)."""
    rows, seen = [], set()
    while process.poll() is None:
        seen.update((p, born(p)) for p in family(process.pid))
        lines = ((out / "metrics.jsonl").read_bytes().count(b"\n")
                 if (out / "metrics.jsonl").exists() else 0)
        if lines > (rows[-1][0] if rows else 0):
            rows.append((lines, *look(process.pid, scratch)))
            if lines == 1 or lines % max(1, steps // 10) == 0:
                print("{:5d}  {:9.1f}  {:5d}  {:9d}  {:7d}".format(*rows[-1]), flush=True)
        time.sleep(0.1)
    time.sleep(1)
    left = [p for p, start in seen if start and born(p) == start]
    names = list(scratch.glob("arft-*"))
    print(f"left over: {len(left)} processes, {len(names)} scratch directories")
    return rows + ([(None,)] if left or names else [])


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("options", nargs="*")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        scratch, out = Path(folder) / "tmp", Path(folder) / "run"
        scratch.mkdir()
        command = [sys.executable, str(ROOT / "arft.py"), "--steps", str(given.steps), "--out",
                   str(out), *given.options]
        print(" step  memory MB  files  processes  scratch")
        process = subprocess.Popen(command, env={**os.environ, "TMPDIR": str(scratch)},
                                   stdout=subprocess.DEVNULL,
                                   stderr=subprocess.DEVNULL)
        rows = watch(process, out, scratch, given.steps)
    if process.returncode or rows[-1][0] is None:
        print(f"exit code {process.returncode}")
        return 1
    quarter = len(rows) // 4
    early, late = (sum(row[1] for row in part) / quarter
                   for part in (rows[quarter:2 * quarter], rows[-quarter:]))
    print(
        f"memory, mean of the second quarter of the steps {early:.0f} MB, of the last {late:.0f} "
        f"MB: {late / early - 1:+.1%}")
    return int(late / early - 1 > FLAT or rows[-1][2] > rows[quarter][2] or rows[-1][3]
               > rows[quarter][3])


if __name__ == "__main__":
    sys.exit(main())
