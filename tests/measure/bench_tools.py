"""Measures what the sandbox costs: typical programs in it, without it, and in a fresh interpreter.

    python tests/measure/bench_tools.py [--rounds 40]

Every column does the same work on a 640 x 480 picture: write the input file, run the program,
decode the output image. "in-process" is `exec` in this process without any protection, "fresh" is
`python -I -c` that imports numpy and PIL. Each round goes through all columns in turn, so that a
busy machine is busy for all of them; with `chrt -r 5` before the command (root) the measurement
goes first.

A worker prepares its next child while the other one runs. The medians do not show that, the
executions per second do. The medians depend on the machine. What should hold: the last column is at
most 6 ms, and the rotation is at least 12 times faster than in a fresh interpreter.
"""

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2]))
from extras import jail
from extras.worker import encode
from tools import Sandbox

OPEN = f"from PIL import Image\nimage = Image.open('{jail.INPUT}')\n"
SAVE = f"\nimage.save('{jail.OUTPUT}')"
CROP = "image = image.crop((100, 100, 300, 300)).resize((600, 600), Image.LANCZOS)"
BRIGHTEN = """import numpy as np
a = np.asarray(image).astype(np.float32)
image = Image.fromarray(np.clip(a * 1.6, 0, 255).astype(np.uint8))"""
PROGRAMS = {
    "nothing": "pass",
    "PIL rotate": OPEN + "image = image.rotate(90, expand=True)" + SAVE,
    "PIL crop, enlarge": OPEN + CROP + SAVE,
    "numpy brighten": OPEN + BRIGHTEN + SAVE,
    "an exception": OPEN + "image.no_such_method()",
}
if find_spec("cv2"):
    PROGRAMS["cv2 flip, denoise"] = f"""import cv2
image = cv2.imread('{jail.INPUT}')
image = cv2.medianBlur(cv2.flip(image, -1), 3)
cv2.imwrite('{jail.OUTPUT}', image)"""


def photograph() -> Image.Image:
    """Smooth shapes and some grain, through JPEG like the pictures of MAT."""
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    shapes = np.asarray(small.resize((640, 480), Image.BICUBIC))
    grain = rng.normal(0, 6, (480, 640, 3))
    return Image.fromarray(np.clip(shapes + grain, 0, 255).astype(np.uint8))


def read_output() -> None:
    with contextlib.suppress(FileNotFoundError), Image.open(jail.OUTPUT) as image:
        image.convert("RGB")
    with contextlib.suppress(FileNotFoundError):
        os.unlink(jail.OUTPUT)


def in_process(code: str, image: Image.Image) -> None:
    Path(jail.INPUT).write_bytes(encode(image))
    with contextlib.suppress(AttributeError):
        exec(compile(code, "<program>", "exec"), {"__name__": "__main__"})
    read_output()


def fresh(code: str, image: Image.Image) -> None:
    Path(jail.INPUT).write_bytes(encode(image))
    subprocess.run([sys.executable, "-I", "-c", "import numpy, PIL.Image\n" + code],
                   stderr=subprocess.DEVNULL)
    read_output()


def measure(sandbox: Sandbox, code: str, image: Image.Image, rounds: int) -> tuple[dict, float]:
    """Median seconds per way, and programs per second of the sandbox when all workers are busy."""
    ways = {"sandbox": sandbox.run, "in-process": in_process, "fresh": fresh}
    seconds = {way: [] for way in ways}
    for turn in range(rounds):
        for way, run in ways.items():
            if way == "fresh" and turn % 4:
                continue                # it is slow, and a quarter of the rounds shows it
            start = time.perf_counter()
            run(code, image)
            seconds[way].append(time.perf_counter() - start)
    jobs = [(f"{code}\n# {i}", image) for i in range(2 * rounds)]       # equal ones would run once
    start = time.perf_counter()
    sandbox.map(jobs)
    rate = len(jobs) / (time.perf_counter() - start)
    return {way: statistics.median(times) for way, times in seconds.items()}, rate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    rounds = parser.parse_args().rounds
    image = photograph()
    with Sandbox(workers=2) as sandbox, tempfile.TemporaryDirectory() as directory:
        os.chdir(directory)
        print(sandbox.describe())
        print("load average", *(f"{load:.2f}" for load in os.getloadavg()), "on", os.cpu_count(),
              "cores\n")
        print("| program | sandbox ms | per second, 2 workers | in-process ms | fresh ms "
              "| fresh / sandbox | own cost ms |\n|---|---|---|---|---|---|---|")
        for name, code in PROGRAMS.items():
            median, rate = measure(sandbox, code, image, rounds)
            inside, outside, new = (1000 * median[way]
                                    for way in ("sandbox", "in-process", "fresh"))
            print(f"| {name} | {inside:.1f} | {rate:.0f} | {outside:.1f} | {new:.0f} "
                  f"| {new / inside:.0f} | {inside - outside:.1f} |")
        start = time.perf_counter()
        results = sandbox.map([(PROGRAMS["PIL rotate"], image)] * 8)
        print(f"\na group of 8 equal rotations: {1000 * (time.perf_counter() - start):.1f} ms, "
              f"run {len({id(result) for result in results})} time(s)")
        os.chdir("/")


if __name__ == "__main__":
    main()
