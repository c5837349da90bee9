"""MAT and multi-hop QA files as samples: what an agent is asked, what it is shown, and what a
right answer is.

What it teaches: the published MAT stores *single steps* for training (`pre_problem`, `pre_code`,
`pre_answer`, each with the teacher's context), because the authors train one step at a time.
Multi-turn episodes need the whole question back, so `join_steps` puts the steps of one question
together again: image, question, gold problems, gold answer. `load` gives these samples;
`load_steps` gives the single steps for `--protocol paper`. The rest of this file handles files that
others wrote with care: every message names file, row and field, and says what you can do about it.

    MAT/MAT-Benchmark/MAT-Coding.json + MAT-Coding-image/
        200 test questions about damaged images
    MAT/MAT-Benchmark/MAT-Search.json + MAT-Search-image/
        150 test questions that need a web search
    MAT/MAT-Training/rft_agent_code_1_2k.json + rft_agent_code_1_2k_images/
        1,200 questions in about 3,500 steps
    MAT/MAT-Training/rft_agent_search_20.json + rft_agent_search_20_images/
        20 questions in 63 steps
    FlashRAG, without images
        2wikimultihopqa/dev.jsonl, hotpotqa/dev.jsonl, musique/dev.jsonl, bamboogle/test.jsonl

Left out: downloading, which the program does; the list of every defect in a file, which
extras/files.py prints (--check-data).
"""
import json
import re
import warnings
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps

PROBLEMS = ("rotation90", "rotation180", "dark", "overexposure", "blur", "noise", "crop", "none")
# The paper splits by position: the first 70 (75) are simple.
N_SIMPLE = {"mat-coding": 70, "mat-search": 75}
# Photographs have up to 50 million pixels; a "decompression bomb" has more.
MAX_PIXELS = 64_000_000
# Only these: for some other formats Pillow starts other programs.
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
# A backslash and an n where a line break belongs (15 of MAT-Coding's golds have one). Commands of
# LaTeX such as \neq and \nu do not match.
LITERAL_NEWLINE = re.compile(r"\\n(?!(?:abla|eq?|eg|ot(?:in)?|u|ewline)(?![a-z]))")


class DataError(ValueError):
    """A file is wrong. In one or two lines, the message names the file, the row (the first is 1),
    the field and the cause, and says what you can do."""


@dataclass(frozen=True)
class Sample:
    """One question, its image, and its right answers."""
    id: str
    question: str                   # without the <query> tags of the files
    golds: tuple[str, ...]          # each of them is a right answer
    image_path: Path | None         # the image that the model sees; None for text-only questions
    problems: tuple[str, ...] = ()  # gold problem labels, in the file's order; () if there are none
    queries: tuple[str, ...] = ()   # gold search queries; () if there are none
    split: str = ""                 # "simple" | "hard" | "train" | "" (text-only questions)

    def open_image(self) -> Image.Image:
        """The image as upright RGB. Raises DataError, which names the file, if it is missing or
        cannot be read."""
        if self.image_path is None:
            raise DataError(f"sample {self.id} has no image: its task is text only")
        return read_image(self.image_path)


@dataclass(frozen=True)
class StepSample(Sample):
    """One training row as the authors train on it: given the teacher's turns so far, the model
    writes the next turn.

    golds are filled in for an answer step, problems for a problem step, queries for a search step.
    """
    kind: str = ""                  # kind of the teacher's turn: problem | code | answer | search
    context: str = ""               # the teacher's turns before it, as stored; "" for a first step
    # The kinds of turn that can earn the format reward: `kind`; for MAT-Search search and answer.
    formats: tuple[str, ...] = ()


# --- images ---------------------------------------------------------------------------------------


@contextmanager
def open_image_file(path: Path):
    """A Pillow image whose pixels are not read yet. Raises DataError for whatever is wrong with the
    file, then or while the pixels are read."""
    try:
        with warnings.catch_warnings():
            # Pillow's limit is higher than ours, so its warning adds nothing.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(path, formats=IMAGE_FORMATS)
        with image:
            if image.width * image.height > MAX_PIXELS:
                raise DataError(f"{path}: {image.width} x {image.height} pixels are more than "
                                f"{MAX_PIXELS:,}; store a smaller version")
            yield image
    except FileNotFoundError:
        raise DataError(f"{path}: no such image; put it there, or remove its row") from None
    except DataError:
        raise
    # Damaged files make Pillow raise OSError, SyntaxError, IndexError, struct.error, ...
    except Exception as err:
        raise DataError(
            f"{path}: not a readable image ({err}); replace it, or remove its row") from None


def read_image(path: Path) -> Image.Image:
    """Any image file as RGB: turned upright by its EXIF tag, transparent parts on white, 16 bits
    scaled to 8. The file's ending does not matter (MAT names PNGs .jpg). Raises DataError if the
    file is missing, broken or too large."""
    with open_image_file(path) as image:
        image = ImageOps.exif_transpose(image)
        # Pillow would clip 16 bits, and all but the darkest greys would turn white.
        if image.mode.startswith("I;16"):
            image = image.convert("I").point(lambda value: value * (1 / 257)).convert("L")
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")


# --- files to rows --------------------------------------------------------------------------------


def parse_json(path: Path) -> list:
    """Everything that a .json file (one value) or a .jsonl file (one value a line) holds."""
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
    return parsed


def read_rows(path: Path | str) -> list[dict]:
    """The objects of a .json file (one list) or a .jsonl file (one object a line). Raises
    DataError."""
    path = Path(path)
    parsed = parse_json(path)
    rows = parsed if path.suffix == ".jsonl" else (parsed or [None])[0]
    if not isinstance(rows, list) or not rows:
        raise DataError(f"{path}: must hold a list of at least one object, [{{...}}, ...]; "
                        "is it the right file?")
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise DataError(f"{path}: row {number}: must be an object {{...}}, but is {row!r:.60}")
    return rows


JSON_NAMES = {str: "text", int: "a whole number", list: "a list", type(None): "null"}


def field(row: dict, name: str, kinds: tuple[type, ...], where: str):
    """row[name]. If it is missing or its type is not one of `kinds`, raises a DataError that begins
    with `where` ("FILE: row 7")."""
    if name not in row:
        there = ", ".join(map(str, row)) or "none"
        raise DataError(f"{where}: field '{name}' is missing (the row has: {there})")
    if type(row[name]) not in kinds:    # isinstance would take True for an int
        wanted = " or ".join(JSON_NAMES[kind] for kind in kinds)
        raise DataError(f"{where}: field '{name}' must be {wanted}, but is {row[name]!r:.60}")
    return row[name]


def text_list(row: dict, name: str, where: str) -> tuple[str, ...]:
    """A field that is a text or a list of at least one text, as a tuple. (MAT-Search stores its one
    gold without a list.)"""
    value = field(row, name, (list, str), where)
    values = (value,) if isinstance(value, str) else tuple(value)
    if not values or not all(isinstance(v, str) for v in values):
        raise DataError(
            f"{where}: field '{name}' must be a list of at least one text, but is {value!r:.60}")
    return values


def strip_query(text: str) -> str:
    """The question inside the <query> tags. In MAT-Search's steps the searches so far follow it.

    >>> strip_query("<query> Who is this? </query> <search> ... </search>")
    'Who is this?'
    >>> strip_query(" Who is this? ")
    'Who is this?'
    """
    return split_query(text)[0]


def split_query(text: str) -> tuple[str, str]:
    """The question, and the text after its tags.

    >>> split_query("<query> Who is this? </query> <search> painter </search>")
    ('Who is this?', '<search> painter </search>')
    """
    # The authors' evaluation closes it with <query> as well as with </query>.
    found = re.search(r"<query>(.*?)</?query>", text, re.DOTALL)
    return (found.group(1).strip(), text[found.end():].strip()) if found else (text.strip(), "")


def split_of(task: str, row: dict, index: int) -> str:
    """"simple" or "hard": the row's own field "split", or else its place as in the paper. "" for a
    task without splits.

    The place is the row's integer id, if it has one (ids count from 1), so that a missing row
    shifts nothing. Otherwise it is `index`, which counts from 0.

    >>> split_of("mat-coding", {"id": 71}, 0), split_of("mat-search", {}, 74)
    ('hard', 'simple')
    >>> split_of("2wiki", {"id": "dev_0"}, 0)
    ''
    """
    if task not in N_SIMPLE:
        return ""
    place = row["id"] - 1 if isinstance(row.get("id"), int) else index
    return row.get("split") or ("simple" if place < N_SIMPLE[task] else "hard")


# --- rows to samples ------------------------------------------------------------------------------


def read_sample(task: str, row: dict, index: int, images: Path, where: str) -> Sample:
    """One row of a file whose rows are whole samples: the benchmarks, and every text-only file."""
    name = {"mat-coding": "answers", "mat-search": "answer"}.get(task, "golden_answers")
    id = str(field(row, "id", (int, str), where))
    question = strip_query(field(row, "question", (str,), where))
    golds = text_list(row, name, where)
    problems, image = (), None
    if task == "mat-coding":
        problems = text_list(row, "type", where)
        # A crop question is about a region of the whole picture; its "processed" file is only that
        # region.
        image = field(row, "ori_image_path" if problems[0] == "crop" else "processed_image_path",
                      (str,), where)
    elif task == "mat-search":
        image = field(row, "image_path", (str,), where)
    return Sample(id, question, golds, images / image if image else None, problems,
                  split=split_of(task, row, index))


@dataclass(frozen=True)
class Step:
    """One training row: a single turn of the teacher."""
    kind: str           # problem | code | answer | search
    image: str          # file name; the steps of one question may differ in _proc and _ori
    question: str
    value: str          # the text between the tags of the solution
    context: str = ""   # the teacher's turns before this one


def read_step(row: dict, where: str) -> Step:
    """One training row. The tag of its solution says its kind. (MAT-Coding's rows also have it in
    `type`; MAT-Search's do not.)"""
    solution = field(row, "solution", (str,), where)
    found = re.search(r"<(problem|code|answer|search)>(.*)</\1>", solution, re.DOTALL)
    if not found:
        raise DataError(f"{where}: field 'solution' must hold <problem>, <code>, <search> or "
                        f"<answer> and its end tag, but is {solution!r:.60}")
    image = field(row, "image_path", (str,), where)
    # MAT-Search stores the context in this field, after the question.
    question, played = split_query(field(row, "problem", (str,), where))
    stored = field(row, "context", (str, type(None)), where) if "context" in row else None
    return Step(found.group(1), image, question, found.group(2).strip(), stored or played)


def join_key(step: Step) -> tuple[str, str]:
    """A key that the steps of one question share: the image's name without _proc, _ori and ending,
    and the question.

    >>> join_key(Step("answer", "dark_7_ori.png", "What  year?", "1999"))
    ('dark_7', 'What year?')
    """
    return re.sub(r"_(proc|ori)$", "", Path(step.image).stem), " ".join(step.question.split())


def labels_of(value: str) -> tuple[str, ...]:
    """The labels in a teacher's problem set.

    >>> labels_of("{'rotation90', 'dark'}")
    ('rotation90', 'dark')
    """
    return tuple(re.findall(r"['\"]([^'\"]+)['\"]", value))


def step_sample(task: str, step: Step, number: int, images: Path) -> StepSample:
    """A step as a sample of its own. `number` is its row in the file; the first row is 1."""
    return StepSample(
        id=f"{join_key(step)[0]}-{step.kind}-{number}", question=step.question,
        image_path=images / step.image, split="train", kind=step.kind, context=step.context,
        golds=(step.value,) if step.kind == "answer" else (),
        problems=labels_of(step.value) if step.kind == "problem" else (),
        queries=(step.value,) if step.kind == "search" else (),
        formats=("search", "answer") if task == "mat-search" else (step.kind,))


def shown_image(group: list[Step], problems: tuple[str, ...]) -> str:
    """The file name of the image that a joined sample shows, as in the benchmark: the damaged
    picture, but the whole one for a crop. If no step names it, the first step's image."""
    wanted = "_ori" if "crop" in problems else "_proc"
    return next((step.image for step in group if Path(step.image).stem.endswith(wanted)),
                group[0].image)


def join_steps(steps: list[Step], images: Path) -> tuple[list[Sample], list[str]]:
    """Whole samples from single steps, in the order of their first step, and one line for each
    question that lacks a step.

    A sample needs an answer, and a problem or a search. It needs no code (`none` has no code).
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
            incomplete.append(f"{stem} ({question!r:.60}): left out, no step has "
                              + " and none has ".join(missing))
            continue
        problems = labels_of(values["problem"][0]) if values["problem"] else ()
        count[stem] += 1        # several questions about one image: dark_7, dark_7-2, ...
        samples.append(Sample(id=stem if count[stem] == 1 else f"{stem}-{count[stem]}",
                              question=group[0].question,
                              golds=tuple(dict.fromkeys(values["answer"])),
                              image_path=images / shown_image(group, problems),
                              problems=problems, queries=tuple(values["search"]), split="train"))
    return samples, incomplete


# --- whole files ----------------------------------------------------------------------------------


def counts_line(counts: Counter) -> str:
    """Counts in one line, in the order in which the names first occurred.

    >>> counts_line(Counter(["simple", "hard", "hard"]))
    'simple 1, hard 2'
    """
    return ", ".join(f"{name} {n:,}" for name, n in counts.items())


@dataclass
class ParsedFile:
    """Everything that was found in one file."""
    file: Path
    samples: list[Sample]
    steps: list[Step]       # the training steps; empty for a file of whole samples
    errors: list[str]       # one message for each row that is wrong
    incomplete: list[str]   # one line for each question that lacks a step, with its name

    @property
    def join_summary(self) -> str:
        """How many samples were joined from how many steps."""
        kinds = counts_line(Counter(step.kind for step in self.steps))
        return (f"{len(self.samples):,} samples joined from {len(self.steps):,} steps ({kinds}); "
                f"{len(self.incomplete)} incomplete")


def find_file(task: str, path: Path, split: str) -> tuple[Path, Path | None]:
    """The file with the rows, and the folder with their images (None for text-only tasks). The file
    need not exist. Raises DataError for an unknown task or split."""
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


def parse_file(task: str, path: Path | str, split: str) -> ParsedFile:
    """Everything in the file of a task and split, right or wrong. Raises DataError if the file as a
    whole cannot be used."""
    file, images = find_file(task, Path(path), split)
    if not file.exists():
        layout = ("laolao77/MAT" if images
                  else "RUC-NLPIR/FlashRAG_datasets (or be one .jsonl file)")
        raise DataError(f"{file}: no such file. The data folder must be laid out as "
                        f"huggingface.co/datasets/{layout}")
    done, errors, in_steps = [], [], bool(images) and split == "train"
    for index, row in enumerate(read_rows(file)):
        where = f"{file}: row {index + 1}"
        try:
            done.append(read_step(row, where) if in_steps
                        else read_sample(task, row, index, images, where))
        except DataError as err:
            errors.append(str(err))
    if not in_steps:
        return ParsedFile(file, done, [], errors, [])
    samples, incomplete = join_steps(done, images)
    return ParsedFile(file, samples, done, errors, incomplete)


def parse_valid_file(task: str, path: Path | str, split: str) -> ParsedFile:
    """As `parse_file`, but raises DataError for the first row that is wrong."""
    parsed = parse_file(task, path, split)
    if parsed.errors:
        others = len(parsed.errors) - 1
        more = f" (and {others} more: --check-data lists them)" if others else ""
        raise DataError(parsed.errors[0] + more)
    return parsed


def load(task: str, path: Path | str, split: str) -> list[Sample]:
    """The samples of a task (mat-coding | mat-search | 2wiki | hotpotqa | musique | bamboogle) and
    a split (train | test).

    path: a MAT folder as on the hub; for text-only tasks a FlashRAG folder or one .jsonl file. No
    image is opened. Questions that lack a step are left out; --check-data lists them. Raises
    DataError for the first row that is wrong.
    """
    parsed = parse_valid_file(task, path, split)
    if not parsed.samples:
        raise DataError(f"{parsed.file}: no question has all its steps; the first one is "
                        f"{parsed.incomplete[0]}")
    return parsed.samples


def load_steps(task: str, path: Path | str) -> list[StepSample]:
    """The training rows of mat-coding or mat-search one by one, in the order of the file, as the
    authors train on them.

    Raises DataError for the first row that is wrong, and for a task whose data has no steps.
    """
    images = find_file(task, Path(path), "train")[1]
    if images is None:
        raise DataError(f"task {task} has no single steps to train on; "
                        "--protocol episodes trains on its questions")
    steps = parse_valid_file(task, path, "train").steps
    return [step_sample(task, step, number, images) for number, step in enumerate(steps, start=1)]
