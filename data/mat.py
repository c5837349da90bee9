"""MAT and multi-hop QA files as samples: what an agent is asked, shown and scored against.

What it teaches: the published MAT stores *single steps* for training (`pre_problem`, `pre_code`, `pre_answer`, each
with the teacher's context), because the authors train one step at a time. Multi-turn episodes need the whole question
back, so `join_steps` puts the steps of one question together again: image, question, gold problems, gold answer.
The rest is care with files written by others: every message says which file, which row, which field, and the cure.

    MAT/MAT-Benchmark/MAT-Coding.json + MAT-Coding-image/            200 test questions about damaged images
    MAT/MAT-Benchmark/MAT-Search.json + MAT-Search-image/            150 test questions that need a web search
    MAT/MAT-Training/rft_agent_code_1_2k.json + ..._images/          1,200 questions in about 3,500 steps
    MAT/MAT-Training/rft_agent_search_20.json + ..._images/          20 questions in 63 steps
    FlashRAG: 2wikimultihopqa/dev.jsonl, hotpotqa/dev.jsonl, musique/dev.jsonl, bamboogle/test.jsonl   (no images)

Read next: rewards.py, which says what an answer to a sample is worth; data/mini.py, which draws a MAT of its own.
Left out: downloading, and the stored teacher context of the steps, which multi-turn training has no use for.
"""
import json
import re
import struct
import warnings
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps

PROBLEMS = ("rotation90", "rotation180", "dark", "overexposure", "blur", "noise", "crop", "none")
MAX_PIXELS = 64_000_000         # a photograph has 12 to 50 million; a "decompression bomb" has more

# task -> split -> (file below the data folder, its image folder)
MAT_FILES = {
    "mat-coding": {"test": ("MAT-Benchmark/MAT-Coding.json", "MAT-Benchmark/MAT-Coding-image"),
                   "train": ("MAT-Training/rft_agent_code_1_2k.json", "MAT-Training/rft_agent_code_1_2k_images")},
    "mat-search": {"test": ("MAT-Benchmark/MAT-Search.json", "MAT-Benchmark/MAT-Search-image"),
                   "train": ("MAT-Training/rft_agent_search_20.json", "MAT-Training/rft_agent_search_20_images")},
}
QA_FILES = {    # task -> (FlashRAG's folder name, split -> file)
    "2wiki": ("2wikimultihopqa", {"test": "dev.jsonl", "train": "train.jsonl"}),
    "hotpotqa": ("hotpotqa", {"test": "dev.jsonl", "train": "train.jsonl"}),
    "musique": ("musique", {"test": "dev.jsonl", "train": "train.jsonl"}),
    "bamboogle": ("bamboogle", {"test": "test.jsonl"}),
}
TASKS = (*MAT_FILES, *QA_FILES)
N_SIMPLE = {"mat-coding": 70, "mat-search": 75}     # the paper splits by position: the first 70 (75) are simple


class DataError(ValueError):
    """What is wrong with a file, in one or two lines: file, row (the first is 1), field, cause and cure."""


@dataclass(frozen=True)
class Sample:
    """One question, what belongs to it, and what a right answer looks like."""
    id: str
    question: str                   # without the <query> tags of the files
    golds: tuple[str, ...]          # any of them is right
    image_path: Path | None         # what the model is shown; None for text-only questions
    problems: tuple[str, ...] = ()  # gold problem labels in the file's order; () where the data has none
    queries: tuple[str, ...] = ()   # gold search queries; () where the data has none
    split: str = ""                 # "simple" | "hard" | "train" | "" (text-only questions)

    def open_image(self) -> Image.Image:
        """The image as upright RGB. Raises DataError, naming the file, if there is none to be had."""
        if self.image_path is None:
            raise DataError(f"sample {self.id} has no image: its task is text only")
        return read_image(self.image_path)


def read_image(path: Path) -> Image.Image:
    """Any image file as RGB: turned upright by its EXIF tag, transparency on white. The file's name does not matter
    (MAT names PNGs .jpg). Raises DataError for what is missing, broken or larger than MAX_PIXELS."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)     # our own limit, below, is stricter
            image = Image.open(path)
        with image:
            if image.width * image.height > MAX_PIXELS:
                raise DataError(f"{path}: {image.width} x {image.height} pixels are more than {MAX_PIXELS:,}; "
                                "store a smaller version")
            image = ImageOps.exif_transpose(image)
            if image.has_transparency_data:
                image = image.convert("RGBA")
                return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
            return image.convert("RGB")
    except FileNotFoundError:
        raise DataError(f"{path}: no such image; download it next to the others, or drop its row") from None
    except DataError:
        raise
    # What Pillow raises on damaged files depends on the format and on where the damage is.
    except (OSError, ValueError, SyntaxError, EOFError, struct.error, zlib.error, Image.DecompressionBombError) as err:
        raise DataError(f"{path}: not a readable image ({err}); download it again, or drop its row") from None


# --- files to rows -------------------------------------------------------------------------------------------------


def read_rows(path: Path) -> list[dict]:
    """The objects of a .json file (one list) or a .jsonl file (one object a line). Raises DataError."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        if Path(path).suffix == ".jsonl":
            rows = []
            for number, line in enumerate(text.split("\n"), start=1):   # not splitlines: U+2028 may be in a string
                if line.strip():
                    rows.append(json.loads(line))
        else:
            number, rows = None, json.loads(text)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except json.JSONDecodeError as err:
        place = f"line {number or err.lineno}, column {err.colno}"
        raise DataError(f"{path}: not valid JSON at {place} ({err.msg}); is the download complete?") from None
    except (OSError, UnicodeDecodeError) as err:
        raise DataError(f"{path}: cannot be read ({err})") from None
    if not isinstance(rows, list):
        raise DataError(f"{path}: must hold a list of objects, [{{...}}, ...], but is a {type(rows).__name__}")
    if not rows:
        raise DataError(f"{path}: holds no rows; is the download complete?")
    for i, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise DataError(f"{path}: row {i}: must be an object {{...}}, but is a {type(row).__name__}")
    return rows


def field(row: dict, name: str, kinds, where: str):
    """row[name] if it has one of the types `kinds`; else a DataError that starts with `where` ("file: row 7")."""
    if name not in row:
        raise DataError(f"{where}: field '{name}' is missing (the row has: {', '.join(map(str, row)) or 'nothing'})")
    value, kinds = row[name], kinds if isinstance(kinds, tuple) else (kinds,)
    if not isinstance(value, kinds) or isinstance(value, bool):
        wanted = " or ".join(kind.__name__ for kind in kinds)
        raise DataError(f"{where}: field '{name}' must be {wanted}, but is {type(value).__name__}: {value!r:.60}")
    return value


def text_list(row: dict, name: str, where: str) -> tuple[str, ...]:
    """A field that is one string or a list of strings, at least one, as a tuple."""
    value = field(row, name, (list, str), where)
    values = [value] if isinstance(value, str) else value
    if not values or not all(isinstance(v, str) for v in values):
        raise DataError(f"{where}: field '{name}' must be a list of at least one string, but is {value!r:.60}")
    return tuple(values)


def strip_query(text: str) -> str:
    """The question inside the <query> tags; MAT-Search's steps have the chain played so far behind them.

    >>> strip_query("<query> Who is this? </query> <search> ... </search>")
    'Who is this?'
    >>> strip_query(" Who is this? ")
    'Who is this?'
    """
    found = re.search(r"<query>(.*?)</?query>", text, re.DOTALL)    # the paper's own prompt ends in <query>, unclosed
    return (found.group(1) if found else text).strip()


def split_of(task: str, row: dict, index: int) -> str:
    """"simple" or "hard": the row's own word, else by place as in the paper ("" for tasks without splits).

    The place is the row's integer id if it has one (ids count from 1), so that a missing row shifts nothing.

    >>> split_of("mat-coding", {"id": 71}, 0), split_of("mat-search", {}, 74), split_of("2wiki", {"id": "dev_0"}, 0)
    ('hard', 'simple', '')
    """
    if task not in N_SIMPLE:
        return ""
    if row.get("split"):
        return row["split"]
    place = row["id"] - 1 if isinstance(row.get("id"), int) else index
    return "simple" if place < N_SIMPLE[task] else "hard"


# --- rows to samples -----------------------------------------------------------------------------------------------


def coding_sample(row: dict, index: int, where: str, images: Path) -> Sample:
    problems = text_list(row, "type", where)
    # A crop question is about a region of the whole picture; its "processed" file already is the answer's region.
    shown = "ori_image_path" if problems[0] == "crop" else "processed_image_path"
    return Sample(id=str(field(row, "id", (int, str), where)), question=strip_query(field(row, "question", str, where)),
                  golds=text_list(row, "answers", where), image_path=images / field(row, shown, str, where),
                  problems=problems, split=split_of("mat-coding", row, index))


def search_sample(row: dict, index: int, where: str, images: Path) -> Sample:
    return Sample(id=str(field(row, "id", (int, str), where)), question=strip_query(field(row, "question", str, where)),
                  golds=text_list(row, "answer", where), image_path=images / field(row, "image_path", str, where),
                  split=split_of("mat-search", row, index))


def qa_sample(row: dict, index: int, where: str, images: Path) -> Sample:
    return Sample(id=str(field(row, "id", (int, str), where)), question=field(row, "question", str, where).strip(),
                  golds=text_list(row, "golden_answers", where), image_path=None)


ROW_TO_SAMPLE = {"mat-coding": coding_sample, "mat-search": search_sample, **{task: qa_sample for task in QA_FILES}}


@dataclass(frozen=True)
class Step:
    """One training row: a single turn of the teacher."""
    kind: str       # problem | code | answer | search
    image: str      # file name; the steps of one question may differ in _proc and _ori
    question: str
    value: str      # what stands between the tags of the solution


def read_step(row: dict, where: str) -> Step:
    """The kind of a step is the tag of its solution; MAT-Coding's rows say it in `type` as well."""
    solution = field(row, "solution", str, where)
    found = re.search(r"<(problem|code|answer|search)>(.*)</\1>", solution, re.DOTALL)
    if not found:
        raise DataError(f"{where}: field 'solution' must hold <problem>, <code>, <search> or <answer> and its end tag, "
                        f"but is {solution!r:.60}")
    return Step(found.group(1), field(row, "image_path", str, where),
                strip_query(field(row, "problem", str, where)), found.group(2).strip())


def join_key(step: Step) -> tuple[str, str]:
    """What the steps of one question share: the image's name without _proc, _ori and ending, and the question.

    >>> join_key(Step("answer", "dark_7_ori.png", "What  year?", "1999")) == join_key(
    ...     Step("problem", "dark_7_proc.png", "What year?", "{'dark'}"))
    True
    """
    return re.sub(r"_(proc|ori)$", "", Path(step.image).stem), " ".join(step.question.split())


def join_steps(steps: list[Step], images: Path) -> tuple[list[Sample], list[str]]:
    """Whole samples from single steps, in the order of their first step, and a line for each that stays incomplete.

    A sample needs an answer, and a problem or a search; `none` samples have no code, and code is never needed.
    """
    groups: dict[tuple[str, str], list[Step]] = {}
    for step in steps:
        groups.setdefault(join_key(step), []).append(step)
    samples, incomplete, seen = [], [], Counter()
    for (stem, question), group in groups.items():
        values = {kind: [s.value for s in group if s.kind == kind] for kind in ("problem", "search", "answer")}
        missing = [] if values["answer"] else ["<answer>"]
        missing += [] if values["problem"] or values["search"] else ["<problem> or <search>"]
        if missing:
            incomplete.append(f"{stem} ({question[:50]!r}): no step with {' and none with '.join(missing)}")
            continue
        problems = tuple(re.findall(r"['\"]([^'\"]+)['\"]", "".join(values["problem"][:1])))
        wanted = "_ori" if "crop" in problems else "_proc"
        shown = next((s.image for s in group if Path(s.image).stem.endswith(wanted)), group[0].image)
        seen[stem] += 1     # several questions about one image: dark_7, dark_7-2, ...
        samples.append(Sample(id=stem if seen[stem] == 1 else f"{stem}-{seen[stem]}", question=group[0].question,
                              golds=tuple(dict.fromkeys(values["answer"])), image_path=images / shown,
                              problems=problems, queries=tuple(values["search"]), split="train"))
    return samples, incomplete


# --- the three things others call ----------------------------------------------------------------------------------


def find_files(task: str, path: Path, split: str) -> tuple[Path, Path]:
    """The file with the rows, and the folder with their images. Raises DataError if `task` or `split` is unknown."""
    if task not in TASKS:
        raise DataError(f"unknown task '{task}'; it is one of {', '.join(TASKS)}")
    splits = MAT_FILES[task] if task in MAT_FILES else QA_FILES[task][1]
    if split not in splits:
        raise DataError(f"task {task} has no split '{split}'; it has {', '.join(splits)}")
    path = Path(path)
    if task in MAT_FILES:
        rows, images = splits[split]
        return path / rows, path / images
    folder, name = QA_FILES[task][0], splits[split]
    if path.suffix == ".jsonl":
        return path, path.parent
    return (path / folder / name if (path / folder).is_dir() else path / name), path


def read_samples(task: str, path: Path, split: str) -> tuple[list[Sample], list[str], list[str]]:
    """(samples, rows that are wrong, questions whose steps are incomplete); raises DataError if the file is."""
    file, images = find_files(task, path, split)
    if not file.exists():
        source = "laolao77/MAT" if task in MAT_FILES else "RUC-NLPIR/FlashRAG_datasets"
        raise DataError(f"{file}: no such file. --data takes a folder laid out as huggingface.co/datasets/{source}" +
                        ("" if task in MAT_FILES else ", or a .jsonl file"))
    done, wrong = [], []
    steps = split == "train" and task in MAT_FILES
    for index, row in enumerate(read_rows(file)):
        where = f"{file}: row {index + 1}"
        try:
            done.append(read_step(row, where) if steps else ROW_TO_SAMPLE[task](row, index, where, images))
        except DataError as err:
            wrong.append(str(err))
    samples, incomplete = join_steps(done, images) if steps else (done, [])
    return samples, wrong, incomplete


def load(task: str, path: Path | str, split: str) -> list[Sample]:
    """The samples of a task: mat-coding | mat-search | 2wiki | hotpotqa | musique | bamboogle; split train | test.

    `path` is a MAT folder as on the hub; for text-only tasks a FlashRAG folder or a .jsonl file. No image is opened.
    Raises DataError at the first row that is wrong. Training questions whose steps are incomplete are left out:
    `join_report` names them.
    """
    samples, wrong, incomplete = read_samples(task, Path(path), split)
    if wrong:
        more = f" ({len(wrong) - 1} more such rows: --check-data lists them)" if len(wrong) > 1 else ""
        raise DataError(wrong[0] + more)
    if not samples:
        raise DataError(f"{find_files(task, path, split)[0]}: no question has all its steps; {incomplete[0]}")
    return samples
