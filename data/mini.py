"""MAT-mini: MAT-Coding at the scale of a laptop, drawn by a program.

What it teaches: what an agentic benchmark needs so that the tool is necessary. Every sample is a
sign with a two-digit number. It is damaged in one of MAT's ways (rotation90, rotation180, dark,
overexposure, blur, noise), in two of them at once, or not at all (none), or it is one of four signs
in a larger picture (crop). The damage hides the number from the small model of data/tiny. One line
of image-processing code brings the number back; the wrong line does not.

The files have MAT's own names and fields (Visual-ARFT, arXiv 2505.14246, section 3, and the
published laolao77/MAT), so that data/mat.py reads both. Held-out samples use numbers that no
training sample has. extras/cold_start.py made the model that plays here.

Left out: everything that makes real photographs hard. data/mini_search.py draws the search half.

    python -m data.mini FOLDER        # writes the files; arft.py does this by itself
"""

import json
import shutil
import sys
import tempfile
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from tqdm import tqdm

# It is in the folder's name, so that a changed drawing never meets an old cache.
VERSION = 2
SIDE = 112                  # pixels of each side of a sign; the small model sees it at 56 x 56
SINGLES = ("rotation90", "rotation180", "dark", "overexposure", "blur", "noise", "none")
DOUBLES = tuple((turn, other) for turn in ("rotation90", "rotation180")
                for other in ("dark", "overexposure", "blur", "noise"))
QUESTIONS = ("What number is on the sign?", "Which number do you see?", "Read the number.")
BOXES = ((0, 0, 500, 500), (500, 0, 1000, 500), (0, 500, 500, 1000), (500, 500, 1000, 1000))

# --- texts ----------------------------------------------------------------------------------------


def texts(split: str) -> list[str]:
    """The numbers of a split: 75 for "train" and 20 others for "test".

    Numbers that look the same upside down are left out, because turning them proves nothing.

    >>> len(texts("train")), len(texts("test")), set(texts("train")) & set(texts("test"))
    (75, 20, set())
    """
    numbers = [f"{n:02d}" for n in range(100) if f"{n:02d}" not in ("00", "11", "88", "69", "96")]
    order = np.random.default_rng(2505).permutation(len(numbers))
    shuffled = [numbers[i] for i in order]
    return shuffled[20:] if split == "train" else shuffled[:20]


# --- drawing and damaging -------------------------------------------------------------------------


def draw_sign(text: str, rng: np.random.Generator) -> Image.Image:
    """A light sign with `text` in dark ink and a coloured bar below it. SIDE x SIDE, RGB."""
    light = tuple(int(v) for v in rng.integers(200, 246, 3))
    ink = tuple(int(v) for v in rng.integers(0, 60, 3))
    bar = [int(v) for v in rng.integers(30, 110, 3)]
    bar[rng.integers(3)] = 190
    image = Image.new("RGB", (SIDE, SIDE), light)
    pen = ImageDraw.Draw(image)
    font = ImageFont.load_default(66)
    for i, character in enumerate(text):
        x = SIDE * (2 * i + 1) / (2 * len(text)) + rng.integers(-4, 5)
        pen.text((x, SIDE * 0.43 + rng.integers(-4, 5)), character, fill=ink, font=font,
                 anchor="mm")
    y = SIDE - 16 + int(rng.integers(-2, 3))
    pen.rectangle((12, y, SIDE - 12, y + 8), fill=tuple(bar))
    return image


def draw_board(signs: list[Image.Image]) -> Image.Image:
    """Four signs on one board, in the order of BOXES. 2 SIDE x 2 SIDE, RGB."""
    board = Image.new("RGB", (2 * SIDE, 2 * SIDE))
    for (x, y, _, _), sign in zip(BOXES, signs, strict=True):
        board.paste(sign, (x * 2 * SIDE // 1000, y * 2 * SIDE // 1000))
    return board


def noise(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """A new RGB image in which each pixel is white (255 in all three channels) with probability 0.8
    and otherwise as in `image`, which is RGB, too.

    One `rng.random` of [height, width] decides, so that the same generator gives the same picture.
    """
    pixels = np.asarray(image).copy()
    pixels[rng.random(pixels.shape[:2]) < 0.8] = 255
    return Image.fromarray(pixels)


def damage(image: Image.Image, problem: str, rng: np.random.Generator) -> Image.Image:
    """The image with one of MAT's distortions. `rotation90` turns it counter-clockwise, as in MAT.

    dark and overexposure squeeze the values without clipping, and blur is moderate, so that code
    can undo all three. overexposure squeezes more than dark; otherwise sharpening would undo it,
    too. noise turns most pixels white. Raises ValueError for an unknown problem.
    """
    if problem == "rotation90":
        return image.transpose(Image.Transpose.ROTATE_90)
    if problem == "rotation180":
        return image.transpose(Image.Transpose.ROTATE_180)
    if problem == "dark":
        return image.point(lambda v: v // 6)
    if problem == "overexposure":
        return image.point(lambda v: 255 - (255 - v) // 14)
    if problem == "blur":
        return image.filter(ImageFilter.GaussianBlur(7.5))
    if problem == "noise":
        return noise(image, rng)
    if problem == "none":
        return image
    raise ValueError(
        f"unknown problem {problem!r}; one of {', '.join(SINGLES)} (crop is a board, not a damage)")


# --- the programs that repair ---------------------------------------------------------------------

# One line for each variant. Every variant restores what its problem hides; data/tiny/README.md has
# the table of measurements.
REPAIRS = {
    "rotation90": ("image = image.rotate(-90)",
                   "image = image.transpose(Image.Transpose.ROTATE_270)"),
    "rotation180": ("image = image.rotate(180)",
                    "image = image.transpose(Image.Transpose.ROTATE_180)"),
    "dark": ("image = image.point(lambda v: v * 6)",
             "image = ImageEnhance.Brightness(image).enhance(6)"),
    "overexposure": ("image = image.point(lambda v: 255 - (255 - v) * 14)",
                     "image = ImageOps.invert(ImageOps.invert(image).point(lambda v: v * 14))"),
    "blur": ("image = image.filter(ImageFilter.UnsharpMask(8, 500, 0))",
             "image = image.filter(ImageFilter.UnsharpMask(7, 500, 0))"),
    "noise": ("image = image.filter(ImageFilter.MinFilter(5))",
              "image = image.filter(ImageFilter.RankFilter(5, 0))"),
}


def program(problems: tuple[str, ...], box: tuple[int, ...] | None, rng: np.random.Generator,
            repairs: dict = REPAIRS) -> str:
    """A program that repairs `problems`, in one of several wordings.

    box: the region that "crop" cuts out, (x1, y1, x2, y2) in thousandths of the sides; None takes
    a random one of BOXES.

    >>> print(program(("rotation180",), None, np.random.default_rng(0)))
    from PIL import Image
    image = Image.open('path_to_input_image.jpg')
    image = image.transpose(Image.Transpose.ROTATE_180)
    image.save('path_to_output_image.jpg')
    """
    lines = []
    for problem in problems:
        if problem == "crop":
            x1, y1, x2, y2 = box or BOXES[rng.integers(4)]
            lines += ["w, h = image.size",
                      f"image = image.crop(({x1} * w // 1000, {y1} * h // 1000, {x2} * w // 1000, "
                      f"{y2} * h // 1000))"]
        elif problem != "none":
            lines.append(str(rng.choice(repairs[problem])))
    helpers = [name for name in ("ImageEnhance", "ImageFilter", "ImageOps")
               if f"{name}." in "".join(lines)]
    return "\n".join(["from PIL import " + ", ".join(["Image"] + helpers),
                      "image = Image.open('path_to_input_image.jpg')", *lines,
                      "image.save('path_to_output_image.jpg')"])


# --- samples and files ----------------------------------------------------------------------------


def make_sample(problems: tuple[str, ...], text_pool: list[str], rng: np.random.Generator) -> dict:
    """One sample: {"question", "answer", "problems", "box", "shown", "clean"}.

    "shown" is the image that the model gets, "clean" the image that a perfect repair would give;
    both are PIL images, RGB.
    """
    text = str(rng.choice(text_pool))
    sign, box = draw_sign(text, rng), None
    if problems == ("crop",):
        place = int(rng.integers(4))
        signs = [draw_sign(str(rng.choice(text_pool)), rng) for _ in BOXES]
        signs[place], box = sign, BOXES[place]
        shown, question = draw_board(signs), f"Which number is in {list(box)}?"
    else:
        shown, question = sign, str(rng.choice(QUESTIONS))
        for problem in problems:
            shown = damage(shown, problem, rng)
    return {"question": question, "answer": text, "problems": problems, "box": box, "shown": shown,
            "clean": sign}


def _plan(split: str, scale: int) -> list[tuple[str, ...]]:
    """The problems of a split in MAT's order and nearly in MAT's proportions."""
    if split == "test":     # MAT: 7 x 10 singles, 8 x 5 doubles, 90 crops
        singles, n_single, n_double, n_crop = SINGLES, 14, 9, 30
    else:                   # MAT: 100 of each single and of crop, 50 of each double
        singles, n_single, n_double, n_crop = (*SINGLES, "crop"), 50, 25, 0
    return ([(problem,) for problem in singles for _ in range(n_single * scale)]
            + [double for double in DOUBLES for _ in range(n_double * scale)]
            + [("crop",)] * (n_crop * scale))


def _benchmark_row(i: int, name: str, sample: dict) -> dict:
    split = "simple" if len(sample["problems"]) == 1 and sample["problems"] != ("crop",) else "hard"
    return {"id": i, "question": sample["question"], "answers": [sample["answer"]],
            "ori_image_path": f"{name}_ori.png", "processed_image_path": f"{name}_proc.png",
            "type": list(sample["problems"]), "split": split}


def _training_rows(name: str, sample: dict, rng: np.random.Generator) -> list[dict]:
    """The single steps of one sample, as in rft_agent_code_1_2k.json. `none` has no code step."""
    labels = "{" + ", ".join(f"'{p}'" for p in sample["problems"]) + "}"
    steps = [("pre_problem", f"<problem> {labels} </problem>", "The image shows a sign.")]
    if sample["problems"] != ("none",):
        code = program(sample["problems"], sample["box"], rng)
        steps.append(("pre_code", f"<code>\n```python\n{code}\n```\n</code>",
                      "The image needs a repair."))
    steps.append(("pre_answer", f"<answer> {sample['answer']} </answer>",
                  "The number can be read."))
    shown = "_ori.png" if sample["problems"] == ("crop",) else "_proc.png"
    rows, context = [], []
    for kind, solution, thought in steps:
        row = {"type": kind, "image_path": name + ("_ori.png" if kind == "pre_answer" else shown),
               "problem": f"<query> {sample['question']} </query>", "solution": solution,
               "gt": f"<think> {thought} </think>\n{solution}"}
        rows.append(row | ({"context": "\n".join(context)} if context else {}))
        context.append(row["gt"])
    return rows


@contextmanager
def replaced_at_end(folder: Path):
    """A new folder to write in, which takes the place of `folder` at the end. If writing fails,
    `folder` stays as it was."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".mini-") as scratch:
        root = Path(scratch) / "MAT"
        root.mkdir()
        yield root
        if folder.exists():
            shutil.rmtree(folder)
        root.rename(folder)


FILES = (   # split, folder, file of rows, folder of images
    ("test", "MAT-Benchmark", "MAT-Coding.json", "MAT-Coding-image"),
    ("train", "MAT-Training", "rft_agent_code_1_2k.json", "rft_agent_code_1_2k_images"))


def write(folder: Path, seed: int = 0, scale: int = 1) -> Path:
    """Writes MAT-mini in MAT's layout, complete or not at all: 600 training and 200 test samples at
    scale 1. Returns the folder.

    Training and test images come from different random streams and have different numbers.
    """
    folder = Path(folder)
    with replaced_at_end(folder) as root:
        for split, home, file, images in FILES:
            (root / home / images).mkdir(parents=True)
            rows = _write_images(root / home / images, split, seed, scale)
            (root / home / file).write_text(json.dumps(rows, indent=1, ensure_ascii=False))
    return folder


def _write_images(folder: Path, split: str, seed: int, scale: int) -> list[dict]:
    """Draws the images of a split. Returns the rows that go with them."""
    rows, count, pool = [], Counter(), texts(split)
    bar = tqdm(_plan(split, scale), desc=f"drawing MAT-mini ({split})", leave=False)
    for i, problems in enumerate(bar):
        rng = np.random.default_rng([seed, split == "train", i])
        sample = make_sample(problems, pool, rng)
        kind = "+".join(problems)
        name = f"{kind}_{count[kind]}"
        count[kind] += 1
        # MAT has the picture as taken in _ori, and the distorted (or cut out) one in _proc.
        ori, proc = ("shown", "clean") if kind == "crop" else ("clean", "shown")
        sample[ori].save(folder / f"{name}_ori.png", compress_level=1)
        sample[proc].save(folder / f"{name}_proc.png", compress_level=1)
        rows += (_training_rows(name, sample, rng) if split == "train"
                 else [_benchmark_row(i + 1, name, sample)])
    return rows


def ensure(home: Path) -> Path:
    """The folder of MAT-mini below `home`. Draws it if it is missing, which takes some seconds."""
    folder = Path(home) / f"mat-mini-{VERSION}"
    complete = (folder / "MAT-Training" / "rft_agent_code_1_2k.json").exists()
    return folder if complete else write(folder)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m data.mini FOLDER")
    print(write(Path(sys.argv[1])))
