"""MAT and multi-hop QA files as samples: what an agent is asked, what it is shown, what a right
answer is.

What it teaches: the published MAT stores *single steps* for training (`pre_problem`, `pre_code`,
`pre_answer`, each with the teacher's context), because the authors train one step at a time.
Multi-turn episodes need the whole question back, so `join_steps` puts the steps of one question
together again: image, question, gold problems, gold answer. `load` gives these samples,
`load_steps` the single steps for `--protocol paper`. The rest is care with files written by others:
every message says which file, row and field, and what to do about it.

    MAT/MAT-Benchmark/MAT-Coding.json + MAT-Coding-image/            200 test questions about damaged images
    MAT/MAT-Benchmark/MAT-Search.json + MAT-Search-image/            150 test questions that need a web search
    MAT/MAT-Training/rft_agent_code_1_2k.json + ..._images/          1,200 questions in about 3,500 steps
    MAT/MAT-Training/rft_agent_search_20.json + ..._images/          20 questions in 63 steps
    FlashRAG: 2wikimultihopqa/dev.jsonl, hotpotqa/dev.jsonl, musique/dev.jsonl, bamboogle/test.jsonl   (no images)

Read next: rewards.py, which says what an answer to a sample is worth; data/mini.py, which draws a
MAT of its own. Left out: downloading, which arft.py does.
"""
import json
import re
import warnings
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps
from tqdm import tqdm

PROBLEMS = ("rotation90", "rotation180", "dark", "overexposure", "blur", "noise", "crop", "none")
# the paper splits by position: the first 70 (75) are simple
N_SIMPLE = {"mat-coding": 70, "mat-search": 75}
# photographs have up to 50 million; a "decompression bomb" has more
MAX_PIXELS = 64_000_000
# no others: for some, Pillow starts other programs
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")

FILES = {   # task -> split -> (file below the data folder, folder of its images or None)
    "mat-coding": {"train": ("MAT-Training/rft_agent_code_1_2k.json",
                             "MAT-Training/rft_agent_code_1_2k_images"),
                   "test": ("MAT-Benchmark/MAT-Coding.json", "MAT-Benchmark/MAT-Coding-image")},
    "mat-search": {"train": ("MAT-Training/rft_agent_search_20.json",
                             "MAT-Training/rft_agent_search_20_images"),
                   "test": ("MAT-Benchmark/MAT-Search.json", "MAT-Benchmark/MAT-Search-image")},
    "2wiki": {"train": ("2wikimultihopqa/train.jsonl", None),
              "test": ("2wikimultihopqa/dev.jsonl", None)},
    "hotpotqa": {"train": ("hotpotqa/train.jsonl", None), "test": ("hotpotqa/dev.jsonl", None)},
    "musique": {"train": ("musique/train.jsonl", None), "test": ("musique/dev.jsonl", None)},
    "bamboogle": {"test": ("bamboogle/test.jsonl", None)},
}
# A backslash and an n where a line break belongs (15 of MAT-Coding's golds); LaTeX's \neq, \nu, ...
# are none.
LITERAL_NEWLINE = re.compile(r"\\n(?!(?:abla|eq?|eg|ot(?:in)?|u|ewline)(?![a-z]))")


class DataError(ValueError):
    """What is wrong with a file, in one or two lines: file, row (the first
    is 1), field, cause and cure."""


@dataclass(frozen=True)
class Sample:
    """One question, what belongs to it, and what a right answer looks like."""
    id: str
    question: str                   # without the <query> tags of the files
    golds: tuple[str, ...]          # any of them is right
    image_path: Path | None         # what the model is shown; None for text-only questions
    # gold problem labels in the file's order; () where the data has none
    problems: tuple[str, ...] = ()
    queries: tuple[str, ...] = ()   # gold search queries; () where the data has none
    split: str = ""                 # "simple" | "hard" | "train" | "" (text-only questions)

    def open_image(self) -> Image.Image:
        """The image as upright RGB. Raises DataError, naming the file, if there
        is none to be had."""
        if self.image_path is None:
            raise DataError(f"sample {self.id} has no image: its task is text only")
        return read_image(self.image_path)


@dataclass(frozen=True)
class StepSample(Sample):
    """One training row as the authors train on it: the teacher's turns so far are given, the next
    turn is asked for.

    Of golds, problems and queries only what belongs to `kind` is filled in.
    """
    kind: str = ""                  # of the teacher's turn: problem | code | answer | search
    context: str = ""               # the teacher's turns before it, as stored; "" for a first step
    # the kinds that can earn the format reward: `kind`, for MAT-Search search and answer
    formats: tuple[str, ...] = ()


# --- images ---------------------------------------------------------------------------------------


@contextmanager
def opened(path: Path):
    """A Pillow image whose pixels are not read yet. Whatever is wrong, then
    or while they are read: DataError."""
    try:
        with warnings.catch_warnings():
            # our own limit is stricter
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(path, formats=IMAGE_FORMATS)
        with image:
            if image.width * image.height > MAX_PIXELS:
                raise DataError(
                    f"{path}: {image.width} x {image.height} pixels are more than {MAX_PIXELS:,}; "
                                "store a smaller version")
            yield image
    except FileNotFoundError:
        raise DataError(f"{path}: no such image; put it there, or drop its row") from None
    except DataError:
        raise
    # damaged files make Pillow raise OSError, SyntaxError, IndexError, struct.error, ...
    except Exception as err:
        raise DataError(
            f"{path}: not a readable image ({err}); replace it, or drop its row") from None


def read_image(path: Path) -> Image.Image:
    """Any image file as RGB: turned upright by its EXIF tag, transparency on white, 16 bits scaled
    to 8. The file's ending does not matter (MAT names PNGs .jpg). Raises DataError for what is
    missing, broken or huge."""
    with opened(path) as image:
        image = ImageOps.exif_transpose(image)
        # Pillow would clip: all but the darkest greys would turn white
        if image.mode.startswith("I;16"):
            image = image.convert("I").point(lambda value: value * (1 / 257)).convert("L")
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")


def image_defect(path: Path) -> str | None:
    """What is wrong with an image file, or None. Fast: of a PNG the
    checksums are compared, not the pixels decoded."""
    try:
        with opened(path) as image:
            image.verify() if image.format == "PNG" else image.load()
    except DataError as err:
        return str(err)
    return None


# --- files to rows --------------------------------------------------------------------------------


def read_rows(path: Path) -> list[dict]:
    """The objects of a .json file (one list) or a .jsonl file (one object a
    line). Raises DataError."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; is the path right?") from None
    except (OSError, UnicodeDecodeError) as err:
        raise DataError(
            f"{path}: cannot be read ({err}); it must be a JSON file in UTF-8") from None
    parsed = []
    # Lines end at "\n" only: splitlines() would also split at U+2028, which JSON allows inside a
    # string.
    for number, part in enumerate(text.split("\n") if path.suffix == ".jsonl" else [text]):
        try:
            if part.strip():
                parsed.append(json.loads(part))
        except json.JSONDecodeError as err:
            line = number + err.lineno
            raise DataError(
                f"{path}: line {line}: not JSON ({err.msg}); is the file complete?") from None
    rows = parsed if path.suffix == ".jsonl" else (parsed or [None])[0]
    if not isinstance(rows, list) or not rows:
        raise DataError(
            f"{path}: must hold a list of at least one object, [{{...}}, ...]; is it the right "
            f"file?")
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise DataError(f"{path}: row {number}: must be an object {{...}}, but is {row!r:.60}")
    return rows


JSON_NAMES = {str: "text", int: "a whole number", list: "a list", type(None): "null"}


def field(row: dict, name: str, kinds: tuple[type, ...], where: str):
    """row[name], if it is of one of the types `kinds`; else a DataError that
    begins with `where` ("FILE: row 7")."""
    if name not in row:
        raise DataError(
            f"{where}: field '{name}' is missing (there are: {', '.join(map(str, row)) or 'none'})")
    if type(row[name]) not in kinds:    # not isinstance: True is an int
        wanted = " or ".join(JSON_NAMES[kind] for kind in kinds)
        raise DataError(f"{where}: field '{name}' must be {wanted}, but is {row[name]!r:.60}")
    return row[name]


def text_list(row: dict, name: str, where: str) -> tuple[str, ...]:
    """A field that is a text or a list of at least one text (MAT-Search
    writes one gold without a list), as a tuple."""
    value = field(row, name, (list, str), where)
    values = (value,) if isinstance(value, str) else tuple(value)
    if not values or not all(isinstance(v, str) for v in values):
        raise DataError(
            f"{where}: field '{name}' must be a list of at least one text, but is {value!r:.60}")
    return values


def strip_query(text: str) -> str:
    """The question inside the <query> tags; MAT-Search's steps have the searches so far behind
    them.

    >>> strip_query("<query> Who is this? </query> <search> ... </search>"), strip_query(" Who is this? ")
    ('Who is this?', 'Who is this?')
    """
    return split_query(text)[0]


def split_query(text: str) -> tuple[str, str]:
    """The question, and what stands behind its tags.

    >>> split_query("<query> Who is this? </query> <search> painter </search>")
    ('Who is this?', '<search> painter </search>')
    """
    # the authors' evaluation ends it with <query>, too
    found = re.search(r"<query>(.*?)</?query>", text, re.DOTALL)
    return (found.group(1).strip(), text[found.end():].strip()) if found else (text.strip(), "")


def split_of(task: str, row: dict, index: int) -> str:
    """"simple" or "hard": the row's own word, else by place as in the paper; "" for tasks without
    splits.

    The place is the row's integer id, if it has one (ids count from 1), so that a missing row
    shifts nothing.

    >>> split_of("mat-coding", {"id": 71}, 0), split_of("mat-search", {}, 74), split_of("2wiki", {"id": "dev_0"}, 0)
    ('hard', 'simple', '')
    """
    if task not in N_SIMPLE:
        return ""
    place = row["id"] - 1 if isinstance(row.get("id"), int) else index
    return row.get("split") or ("simple" if place < N_SIMPLE[task] else "hard")


# --- rows to samples ------------------------------------------------------------------------------


def read_sample(task: str, row: dict, index: int, images: Path, where: str) -> Sample:
    """One row of a file whose rows are whole samples: the benchmarks, and every text-only file."""
    id, question = field(row, "id", (int, str),
                         where), strip_query(field(row, "question", (str,), where))
    golds = text_list(row, {"mat-coding": "answers", "mat-search": "answer"}.get(task,
            "golden_answers"), where)
    problems, image = (), None
    if task == "mat-coding":
        problems = text_list(row, "type", where)
        # A crop question is about a region of the whole picture; its "processed" file is that
        # region, cut out.
        image = field(row, "ori_image_path" if problems[0] == "crop" else "processed_image_path",
                      (str,), where)
    elif task == "mat-search":
        image = field(row, "image_path", (str,), where)
    return Sample(str(id), question, golds, images / image if image else None, problems,
                  split=split_of(task, row, index))


@dataclass(frozen=True)
class Step:
    """One training row: a single turn of the teacher."""
    kind: str       # problem | code | answer | search
    image: str      # file name; the steps of one question may differ in _proc and _ori
    question: str
    value: str      # what stands between the tags of the solution
    context: str = ""   # the teacher's turns before this one


def read_step(row: dict, where: str) -> Step:
    """The kind of a step is the tag of its solution (MAT-Coding's rows say
    it in `type`, too; MAT-Search's do not)."""
    solution = field(row, "solution", (str,), where)
    found = re.search(r"<(problem|code|answer|search)>(.*)</\1>", solution, re.DOTALL)
    if not found:
        raise DataError(
            f"{where}: field 'solution' must hold <problem>, <code>, <search> or <answer> and its "
            f"end tag, "
                        f"but is {solution!r:.60}")
    image = field(row, "image_path", (str,), where)
    # MAT-Search has its context in here
    question, played = split_query(field(row, "problem", (str,), where))
    stored = field(row, "context", (str, type(None)), where) if "context" in row else None
    return Step(found.group(1), image, question, found.group(2).strip(), stored or played)


def join_key(step: Step) -> tuple[str, str]:
    """What the steps of one question share: the image's name without _proc, _ori and ending, and
    the question.

    >>> join_key(Step("answer", "dark_7_ori.png", "What  year?", "1999"))
    ('dark_7', 'What year?')
    """
    return re.sub(r"_(proc|ori)$", "", Path(step.image).stem), " ".join(step.question.split())


def labels_of(value: str) -> tuple[str, ...]:
    """The labels of a teacher's problem set.

    >>> labels_of("{'rotation90', 'dark'}")
    ('rotation90', 'dark')
    """
    return tuple(re.findall(r"['\"]([^'\"]+)['\"]", value))


def step_sample(task: str, step: Step, number: int, images: Path) -> StepSample:
    """A step as a sample of its own; `number` is its row in the file, the first is 1."""
    return StepSample(
        id=f"{join_key(step)[0]}-{step.kind}-{number}", question=step.question,
        image_path=images / step.image,
        golds=(step.value,) if step.kind == "answer" else (), split="train", kind=step.kind,
        context=step.context,
        problems=labels_of(step.value) if step.kind == "problem" else (),
        queries=(step.value,) if step.kind == "search" else (),
        formats=("search", "answer") if task == "mat-search" else (step.kind,))


def join_steps(steps: list[Step], images: Path) -> tuple[list[Sample], list[str]]:
    """Whole samples from single steps, in the order of their first step, and one line for each that
    stays incomplete.

    A sample needs an answer, and a problem or a search; code is never needed (`none` has no code).
    """
    groups: dict[tuple[str, str], list[Step]] = {}
    for step in steps:
        groups.setdefault(join_key(step), []).append(step)
    samples, incomplete, count = [], [], Counter()
    for (stem, question), group in groups.items():
        values = {kind: [step.value for step in group if step.kind == kind]
                  for kind in ("problem", "search", "answer")}
        missing = [] if values["answer"] else ["<answer>"]
        missing += [] if values["problem"] or values["search"] else ["<problem> or <search>"]
        if missing:
            incomplete.append(
                f"{stem} ({question!r:.60}): left out, no step has {' and none has '.join(missing)}")
            continue
        problems = labels_of(values["problem"][0]) if values["problem"] else ()
        # As in the benchmark: the damaged picture, but the whole one for a crop; else what the
        # first step says.
        wanted = "_ori" if "crop" in problems else "_proc"
        shown = next((step.image for step in group if Path(step.image).stem.endswith(wanted)),
                     group[0].image)
        count[stem] += 1        # several questions about one image: dark_7, dark_7-2, ...
        samples.append(Sample(id=stem if count[stem] == 1 else f"{stem}-{count[stem]}",
                              question=group[0].question,
                              golds=tuple(dict.fromkeys(values["answer"])),
                              image_path=images / shown,
                              problems=problems, queries=tuple(values["search"]), split="train"))
    return samples, incomplete


# --- what others call -----------------------------------------------------------------------------


def listed(counts: Counter) -> str:
    """Counts in one line, in the order of first sight.

    >>> listed(Counter(["simple", "hard", "hard"]))
    'simple 1, hard 2'
    """
    return ", ".join(f"{name} {n:,}" for name, n in counts.items())


@dataclass
class Reading:
    """All that one file gave."""
    file: Path
    samples: list[Sample]
    steps: list[Step]       # the training steps; empty for a file of whole samples
    wrong: list[str]        # rows that are not as they should be
    incomplete: list[str]   # questions that lack a step, by name

    @property
    def joined(self) -> str:
        kinds = listed(Counter(step.kind for step in self.steps))
        return (f"{len(self.samples):,} samples joined from {len(self.steps):,} steps ({kinds}); "
                f"{len(self.incomplete)} incomplete")


def find_file(task: str, path: Path, split: str) -> tuple[Path, Path | None]:
    """The file with the rows and the folder with their images (None: text
    only). It need not exist."""
    if task not in FILES:
        raise DataError(f"unknown task '{task}'; it is one of {', '.join(FILES)}")
    if split not in FILES[task]:
        raise DataError(f"task {task} has no split '{split}', only {' and '.join(FILES[task])}")
    rows, images = FILES[task][split]
    if images:
        return path / rows, path / images
    if path.suffix == ".jsonl":
        return path, None
    inside = path / Path(rows).name     # `path` may be FlashRAG's folder or the data set's own
    return (inside if inside.exists() else path / rows), None


def read(task: str, path: Path | str, split: str) -> Reading:
    """Everything in the file of a task and split, good or bad. Raises
    DataError if the file as a whole is unusable."""
    file, images = find_file(task, Path(path), split)
    if not file.exists():
        raise DataError(
            f"{file}: no such file. The data folder must be laid out as huggingface.co/datasets/" +
                        ("laolao77/MAT" if images
                         else "RUC-NLPIR/FlashRAG_datasets (or be one .jsonl file)"))
    done, wrong, in_steps = [], [], bool(images) and split == "train"
    for index, row in enumerate(read_rows(file)):
        where = f"{file}: row {index + 1}"
        try:
            done.append(read_step(row, where) if in_steps
                        else read_sample(task, row, index, images, where))
        except DataError as err:
            wrong.append(str(err))
    if not in_steps:
        return Reading(file, done, [], wrong, [])
    samples, incomplete = join_steps(done, images)
    return Reading(file, samples, done, wrong, incomplete)


def sound(reading: Reading) -> Reading:
    """The same reading; raises DataError for the first row that is wrong."""
    if reading.wrong:
        more = (f" (and {len(reading.wrong) - 1} more: --check-data lists them)"
                if len(reading.wrong) > 1 else "")
        raise DataError(reading.wrong[0] + more)
    return reading


def load(task: str, path: Path | str, split: str) -> list[Sample]:
    """The samples of a task (mat-coding | mat-search | 2wiki | hotpotqa | musique | bamboogle),
    split train | test.

    `path` is a MAT folder as on the hub; for text-only tasks a FlashRAG folder or one .jsonl file.
    No image is opened. Raises DataError for the first row that is wrong. Questions that lack a step
    are left out: see `join_report`.
    """
    reading = sound(read(task, path, split))
    if not reading.samples:
        raise DataError(
            f"{reading.file}: no question has all its steps, the first is {reading.incomplete[0]}")
    return reading.samples


def load_steps(task: str, path: Path | str) -> list[StepSample]:
    """The training rows of mat-coding or mat-search one by one, in the order of the file, as the
    authors train on them.

    Raises DataError for the first row that is wrong, and for a task whose data has no steps.
    """
    images = find_file(task, Path(path), "train")[1]
    if images is None:
        raise DataError(
            f"task {task} has no single steps to train on; --protocol episodes trains on its "
            f"questions")
    steps = sound(read(task, path, "train")).steps
    return [step_sample(task, step, number, images) for number, step in enumerate(steps, start=1)]


def join_report(task: str, path: Path | str) -> list[str]:
    """How many training samples were joined from how many steps; then a line
    for each that could not be, by name."""
    reading = read(task, path, "train")
    return [reading.joined, *reading.incomplete]


def defects_of(reading: Reading) -> list[str]:
    """Every defect of a file, one line each: rows, steps, ids, questions, golds, labels, images."""
    found = list(reading.incomplete)
    found += [f"id {name}: occurs {n} times" for name,
              n in Counter(s.id for s in reading.samples).items() if n > 1]
    for sample in reading.samples:
        found += [f"id {sample.id}: empty question"] * (not sample.question)
        found += [f"id {sample.id}: empty gold" for gold in sample.golds if not gold.strip()]
        found += [f"id {sample.id}: literal \\n in gold {g!r}" for g in sample.golds
                  if LITERAL_NEWLINE.search(g)]
        found += [f"id {sample.id}: unknown problem '{name}'" for name in sample.problems
                  if name not in PROBLEMS]
    images = dict.fromkeys(sample.image_path for sample in reading.samples if sample.image_path)
    broken = filter(None, map(image_defect, tqdm(images, desc="checking images", leave=False)))
    return reading.wrong + [f"{reading.file}: {line}" for line in found] + list(broken)


def check(task: str, path: Path | str) -> tuple[list[str], list[str]]:
    """(report, defects), lines to print: what the task's files hold, and everything that is wrong
    with them or their images. Raises DataError if none of the files is there, or one is not usable
    at all."""
    files = {find_file(task, Path(path), split)[0]: split for split in FILES.get(task, ["test"])}
    report, defects = [], []
    # one .jsonl file stands for both splits and is checked once
    for file, split in files.items():
        if not file.exists() and any(other.exists() for other in files):
            report.append(f"{file}: not there ({split})")
            continue
        reading = read(task, path, split)
        report.append(f"{file}: {len(reading.samples):,} samples ({split})")
        report += [f"  {reading.joined}"] if reading.steps else []
        report += [f"  {name}: {listed(counts)}" for name, counts in (
            ("split", Counter(s.split for s in reading.samples if split == "test" and s.split)),
            ("problems", Counter("+".join(s.problems) for s in reading.samples if s.problems)))
                   if counts]
        defects += defects_of(reading)
    return report, defects
