"""Two versions of the program, number by number: does a change of the code change what is learned?

    python tests/measure/same_numbers.py record OLD --program PATH/arft.py      before the change
    python tests/measure/same_numbers.py record NEW                             after it
    python tests/measure/same_numbers.py compare OLD NEW

`record` trains ten steps of both tasks in six ways (rows, trees, LoRA in rows and in trees, the
paper's protocol, two gloo processes). `compare` wants every number of metrics.jsonl but seconds
to be the same: with one process in every recorded digit, with two to 1e-3 in step 1, because there
the order of sums may change. The gradient of step 1 is compared to 1e-5: AdamW's first moment
after one update is a tenth of it. Some five minutes on two cores for each `record`.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
TASKS = ("mat-coding", "mat-search")
WAYS = {
    "rows": ["--update", "rows"],
    "trees": ["--update", "tree"],
    "lora": ["--lora-rank", "8", "--update", "rows"],
    "lora-trees": ["--lora-rank", "8", "--update", "tree"],
    "paper": ["--protocol", "paper"],
    "two": [],
    "two-gradient": ["--steps", "1", "--inner-epochs", "1", "--minibatches", "1"],
}
COMMON = ["--seed", "0", "--steps", "10", "--eval-samples", "4", "--eval-sampled", "off"]
TIMES = ("seconds", "seconds_by_phase", "tokens_per_second")


def record(folder: Path, program: Path, steps: int, only: str) -> None:
    """Runs every way of both tasks into FOLDER/<task>-<way>, two at a time."""
    jobs = [(task, way) for task in TASKS for way in WAYS if only in f"{task}-{way}"]

    def run(job):
        task, way = job
        out = (folder / f"{task}-{way}").resolve()
        launch = [sys.executable]
        if way.startswith("two"):
            launch += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        # of an option that is given twice the last counts
        options = [*COMMON, "--steps", str(steps), *WAYS[way]]
        command = [*launch, str(program), "--task", task, *options, "--out", str(out)]
        environment = os.environ | {"HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        print(f"{out.name}: exit code {done.returncode}", flush=True)
        if done.returncode:
            print(done.stderr[-2000:], flush=True)
        return done.returncode

    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(2) as pool:
        codes = list(pool.map(run, jobs))
    sys.exit(max(codes, default=0))


def metrics(folder: Path) -> list[dict]:
    """The numbers of each step, without seconds and without the words of warnings."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in (*TIMES, "warnings")} for line in lines]


def gradient(folder: Path) -> dict[str, torch.Tensor]:
    """The clipped gradient of a run of one update, times (1 - beta1): AdamW's first moments."""
    state = torch.load(folder / "checkpoint" / "step-000001.pt", weights_only=True)["optimizer"]
    return {str(name): moments["exp_avg"] for name, moments in state["state"].items()}


def differences(old: list[dict], new: list[dict], tolerance: float) -> list[str]:
    """One line for each number that differs by more than `tolerance`, relative to it or to 1."""
    found = [] if len(old) == len(new) else [f"{len(old)} steps against {len(new)}"]
    for a, b in zip(old, new, strict=False):
        for name in sorted(a):            # a number that is new is no difference
            x, y = a[name], b.get(name)
            near = x == y
            if isinstance(x, (int, float)) and isinstance(y, (int, float)):
                near = abs(x - y) <= tolerance * max(1.0, abs(x))
            if not near:
                found.append(f"step {a['step']}: {name} {x} against {y}")
    return found


def compare(old: Path, new: Path) -> int:
    """Prints a line for each run. Returns how many are not the same."""
    wrong, folders = 0, sorted(path for path in old.iterdir() if path.is_dir())
    if not folders:
        print(f"{old} holds no run: nothing was compared")
        return 1
    for folder in folders:
        other = new / folder.name
        if not (other / "metrics.jsonl").exists():
            found, note = ["there is no such run in the other folder"], ""
        elif folder.name.endswith("two-gradient"):
            a, b = gradient(folder), gradient(other)
            largest = max(value.abs().max().item() for value in a.values())
            off = max((a[name] - b[name]).abs().max().item() for name in a) / largest
            found = [] if a.keys() == b.keys() and off <= 1e-5 else ["the gradient differs"]
            note = f"largest difference of a gradient's entry / largest entry: {off:.1e}"
        elif folder.name.endswith("two"):
            a, b = metrics(folder), metrics(other)
            found = differences(a[:1], b[:1], 1e-3)
            later = next((x["step"] for x, y in zip(a, b, strict=False)
                          if x["tokens"] != y["tokens"]), None)
            note = "same tokens in every step"
            if later:
                note = f"sampled tokens differ from step {later} on"
        else:
            a = metrics(folder)
            found, note = differences(a, metrics(other), 0.0), f"{len(a)} steps"
        print(f"{folder.name:24} {'SAME' if not found else 'DIFFERS'}  {note}")
        print("".join(f"    {line}\n" for line in found[:8]), end="")
        wrong += bool(found)
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("record")
    one.add_argument("folder", type=Path)
    one.add_argument("--program", type=Path, default=ROOT / "arft.py")
    one.add_argument("--steps", type=int, default=10)
    one.add_argument("--only", default="", help="runs with this in their name")
    two = commands.add_parser("compare")
    two.add_argument("old", type=Path)
    two.add_argument("new", type=Path)
    options = parser.parse_args()
    if options.command == "record":
        record(options.folder, options.program, options.steps, options.only)
    sys.exit(min(1, compare(options.old, options.new)))


if __name__ == "__main__":
    main()
