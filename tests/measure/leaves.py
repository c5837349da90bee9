"""Can you really skip extras/? Deletes each leaf in a copy of the repository and trains two steps.

    python tests/measure/leaves.py              all leaves, one after the other; about two minutes
    python tests/measure/leaves.py plan         this leaf alone

For each leaf: the lesson runs without it, and the option that needs it says that it is missing.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
# The leaf: the options that need it, on top of RUN.
LEAVES = {"many": None, "tree": ["--update", "tree"], "paper": ["--protocol", "paper"],
          "plan": ["--plan"], "report": ["--report", "runs"]}
RUN = ["--task", "mat-coding", "--steps", "2", "--samples-per-step", "2", "--group-size", "2",
       "--max-new-tokens", "48", "--eval-samples", "2", "--eval-sampled", "off"]


def copy_without(leaf: str, folder: Path) -> Path:
    """The repository without one file of extras/, without its tests and runs."""
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(
        ".git", "runs", "tests", "__pycache__", "pictures", ".venv"))
    for file in (folder / "extras").glob(f"{leaf}.*"):
        file.unlink()
    return folder


def call(folder: Path, *arguments: str, several: bool = False) -> tuple[int, str]:
    """(exit code, what was printed) of arft.py in the copy; several: as if torchrun started it."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    if several:
        environment |= {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}
    done = subprocess.run([sys.executable, "arft.py", *arguments], cwd=folder, env=environment,
                          capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def check(leaf: str) -> list[str]:
    """What is wrong without this leaf."""
    with tempfile.TemporaryDirectory(prefix="leaves-") as home:
        folder, wrong = copy_without(leaf, Path(home) / "copy"), []
        code, said = call(folder, *RUN, "--out", "runs/without")
        if code or "2 steps" not in said:
            wrong.append(f"two steps end with exit code {code}: {said[-500:]}")
        options = LEAVES[leaf] or []
        code, said = call(folder, *RUN, *options, "--out", "runs/asked", several=leaf == "many")
        named = f"extras/{leaf}.py, which is missing here" in said
        if code != 2 or not named or (folder / "runs" / "asked").exists():
            wrong.append(f"asked for it, the program ends with {code}: {said[-500:]}")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("leaf", nargs="*", help=f"one of {', '.join(LEAVES)}; default: all")
    wrong = 0
    for leaf in parser.parse_args().leaf or LEAVES:
        found = check(leaf)
        print(f"without extras/{leaf}.py: " + ("; ".join(found) or "two steps, and its option says "
                                               "that it is missing"), flush=True)
        wrong += bool(found)
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main())
