"""Files, without a model: what is wrong with the data (--check-data), what a file of predictions
scores (--score), and how two of them differ (--compare).

What it teaches: look at the files before you trust a score. `check` lists every defect of a task's
data at once: rows, ids, golds, images. `score_predictions` gives the paper's numbers from its
published predictions. `compare` judges two files item by item, because the interval of a paired
difference is far narrower than that of either score where the files agree on most items.

The file predictions-after.json that a run writes has the published schema, so that you can score
and compare it in the same way. No lesson file needs this one.
"""
from collections import Counter
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data.mat import (FILES, LITERAL_NEWLINE, PROBLEMS, DataError, ParsedFile, counts_line, field,
                      find_file, open_image_file, parse_file, read_rows, split_of, text_list)
from extras.metrics import ENDINGS
from rewards import SCORERS, describe_splits, mean_ci95, score_answer

# --- tables of scores -----------------------------------------------------------------------------

HEADER = f"{'':22}{'n':>6}  {'EM %':>6} {'[95%]':>16}  {'F1 %':>6} {'[95%]':>16}"


def score_row(name: str, scores: dict) -> str:
    """One line under HEADER, in percent with two digits, as the paper prints scores."""
    line = f"{name:22}{scores['n']:6d}  {100 * scores['em']:6.2f}"
    if "em_ci95" in scores:
        em_low, em_high = (100 * value for value in scores["em_ci95"])
        f1_low, f1_high = (100 * value for value in scores["f1_ci95"])
        line += (f" [{em_low:6.2f}, {em_high:6.2f}]  {100 * scores['f1']:6.2f} "
                 f"[{f1_low:6.2f}, {f1_high:6.2f}]")
    return line


def summary_rows(summary: dict) -> list[tuple[str, dict]]:
    """The rows of a run's table, (name, scores): before and after training, greedy and sampled, by
    split and by both scorers. The name of a part is indented."""
    rows = []
    for when in ("before", "after"):
        if when in summary:
            scores = summary[when]
            rows.append((f"{when}, greedy", scores))
            rows += [(f"  {split}", part) for split, part in scores.get("splits", {}).items()]
            if "damaged" in scores.get("by_problem", {}):
                rows.append(("  damaged images", scores["by_problem"]["damaged"]))
            rows += [(f"  {name} scorer", scores[name]) for name in SCORERS if name in scores]
            rows += [(f"{when}, sampled", scores["sampled"])] if "sampled" in scores else []
    return rows


def unanswered(summary: dict) -> list[str]:
    """For each evaluation that has them, how many answers are missing, and why."""
    lines = []
    for name, scores in summary_rows(summary):
        why = [f"{words} {scores['ended'][ending]}" for ending, words in ENDINGS.items()
               if words and scores.get("ended", {}).get(ending)]
        if why:
            missing = scores["n"] - scores["ended"]["answer"]
            lines.append(f"{name}: {missing} of {scores['n']} without an answer ({', '.join(why)})")
    return lines


def table(summary: dict) -> str:
    """The table of a run's summary.json for the terminal."""
    rows = [score_row(name, scores) for name, scores in summary_rows(summary)]
    return "\n".join([HEADER, *rows, *unanswered(summary)])


# --- the data of a task ---------------------------------------------------------------------------


def image_defect(path: Path) -> str | None:
    """A message if something is wrong with an image file, or None. To be fast, it compares the
    checksums of a PNG instead of decoding its pixels."""
    try:
        with open_image_file(path) as image:
            image.verify() if image.format == "PNG" else image.load()
    except DataError as err:
        return str(err)
    return None


def join_report(task: str, path: Path | str) -> list[str]:
    """How many training samples were joined from how many steps, and then one line for each
    question that could not be joined, with its name."""
    parsed = parse_file(task, path, "train")
    return [parsed.join_summary, *parsed.incomplete]


def defects_of(parsed: ParsedFile) -> list[str]:
    """Every defect of a file, one line each: rows, steps, ids, questions, golds, labels, images."""
    counts = Counter(sample.id for sample in parsed.samples)
    found = parsed.incomplete + [f"id {id}: occurs {n} times" for id, n in counts.items() if n > 1]
    for sample in parsed.samples:
        found += [f"id {sample.id}: empty question"] * (not sample.question)
        found += [f"id {sample.id}: empty gold" for gold in sample.golds if not gold.strip()]
        found += [f"id {sample.id}: literal \\n in gold {gold!r}" for gold in sample.golds
                  if LITERAL_NEWLINE.search(gold)]
        found += [f"id {sample.id}: unknown problem '{name}'" for name in sample.problems
                  if name not in PROBLEMS]
    images = dict.fromkeys(sample.image_path for sample in parsed.samples if sample.image_path)
    broken = filter(None, map(image_defect, tqdm(images, desc="checking images", leave=False)))
    return parsed.errors + [f"{parsed.file}: {line}" for line in found] + list(broken)


def describe_file(parsed: ParsedFile, split: str) -> list[str]:
    """What a file holds, in lines to print."""
    splits = Counter(s.split for s in parsed.samples if split == "test" and s.split)
    problems = Counter("+".join(s.problems) for s in parsed.samples if s.problems)
    lines = [f"{parsed.file}: {len(parsed.samples):,} samples ({split})"]
    lines += [f"  {parsed.join_summary}"] if parsed.steps else []
    lines += [f"  {name}: {counts_line(counts)}"
              for name, counts in (("split", splits), ("problems", problems)) if counts]
    return lines


def check(task: str, path: Path | str) -> tuple[list[str], list[str]]:
    """(report, defects), lines to print: what the task's files hold, and everything that is wrong
    with them or with their images. Raises DataError if none of the files exists, or if one of them
    cannot be used at all."""
    # One .jsonl file stands for both splits; we check it once.
    files = {find_file(task, Path(path), split)[0]: split for split in FILES.get(task, ["test"])}
    report, defects = [], []
    for file, split in files.items():
        if not file.exists() and any(other.exists() for other in files):
            report.append(f"{file}: not there ({split})")
            continue
        parsed = parse_file(task, path, split)
        report += describe_file(parsed, split)
        defects += defects_of(parsed)
    return report, defects


def check_files(task: str, data: Path | str) -> int:
    """--check-data: prints what the task's files hold and then every defect. Returns the exit code:
    1 if there is a defect, else 0. Raises DataError as `check` does."""
    report, defects = check(task, data)
    print("\n".join([*report, *defects, f"defects: {len(defects)}"]))
    return 1 if defects else 0


# --- files of predictions -------------------------------------------------------------------------


def load_predictions(path: Path | str) -> list[dict]:
    """The rows of a file of predictions in the published schema, a list of
    {"id", "gt", "pred_answer"}.

    "gt" is a text or a list of texts; "pred_answer" is a text or null. Bamboogle's file has "query"
    in place of "id". Raises DataError.
    """
    rows = read_rows(path)
    for number, row in enumerate(rows, start=1):
        text_list(row, "gt", f"{path}: row {number}")
        field(row, "pred_answer", (str, type(None)), f"{path}: row {number}")
    return rows


def score_rows(rows: list[dict], task: str, scorer: str) -> np.ndarray:
    """(f1, em) of each row of a file of predictions, [n, 2]. Among the paper's scorers only
    MAT-Coding's has rules for Chinese."""
    return np.array([score_answer(row["pred_answer"], row["gt"], scorer, task == "mat-coding")
                     for row in rows])


def score_predictions(path: Path | str, task: str, scorer: str = "official") -> dict:
    """The scores of a file of predictions, in the form of `rewards.summarize`.

    A row's own field "split" says its split. Without it the row's place does: the first 70 of
    mat-coding and the first 75 of mat-search are simple. Raises DataError.
    """
    rows = load_predictions(path)
    splits = [split_of(task, row, i) for i, row in enumerate(rows)]
    return describe_splits(score_rows(rows, task, scorer), splits)


def rows_by_item(path: Path | str) -> dict:
    """The rows of a file of predictions by a key that tells them apart: (name, how often the name
    occurred before). The name is the row's id, or its query if it has no id."""
    rows, seen = {}, Counter()
    for row in load_predictions(path):
        name = str(row.get("id", row.get("query", "")))
        rows[name, seen[name]] = row
        seen[name] += 1
    return rows


def compare(path_a: Path | str, path_b: Path | str, task: str, scorer: str = "official") -> dict:
    """Two files of predictions on the same items, paired: how much better b is than a, and the
    interval of that difference.

    {"n", "changed": items with another answer, "f1" and "em": {"a", "b", "difference", "ci95",
    "better", "worse"}}; "better" and "worse" count items. Pairing matters: two files that agree on
    most items have a far narrower interval than either score alone. Raises DataError if the files
    do not hold the same items with the same golds.
    """
    a, b = rows_by_item(path_a), rows_by_item(path_b)
    for name in [*a, *b]:
        if name not in a or name not in b or a[name]["gt"] != b[name]["gt"]:
            raise DataError(
                f"{path_a} and {path_b} cannot be compared: item '{name[0]}' is missing from one "
                "of them or has other golds there; give two files of the same benchmark")
    rows_a, rows_b = list(a.values()), [b[name] for name in a]
    changed = sum(row_a["pred_answer"] != row_b["pred_answer"]
                  for row_a, row_b in zip(rows_a, rows_b, strict=True))
    scores_a, scores_b = (score_rows(rows, task, scorer) for rows in (rows_a, rows_b))  # [n, 2]
    result = {"n": len(a), "changed": changed}
    for column, metric in enumerate(("f1", "em")):
        change = scores_b[:, column] - scores_a[:, column]
        result[metric] = {"a": float(scores_a[:, column].mean()),
                          "b": float(scores_b[:, column].mean()),
                          "difference": float(change.mean()), "ci95": mean_ci95(change),
                          "better": int((change > 0).sum()), "worse": int((change < 0).sum())}
    return result


def score_file(task: str, path: Path | str) -> int:
    """--score: prints the scores of a file of predictions by both scorers. Returns the exit code,
    0. Raises DataError."""
    print(f"{path}, scored as {task}\n{HEADER}")
    for scorer in SCORERS:
        scores = score_predictions(path, task, scorer)
        print(score_row(scorer, scores))
        for split, part in scores["splits"].items():
            print(score_row(f"  {split}", part))
    return 0


def compare_files(task: str, path_a: Path | str, path_b: Path | str) -> int:
    """--compare: prints how file B differs from file A by both scorers, with the interval of the
    difference item by item. Returns the exit code, 0. Raises DataError."""
    for scorer in SCORERS:
        result = compare(path_a, path_b, task, scorer)
        if scorer == SCORERS[0]:
            print(f"A: {path_a}\nB: {path_b}")
            print(f"{result['n']} items as {task}, {result['changed']} with another answer")
            print(f"{'':22}{'A %':>7} {'B %':>7}  {'B - A':>6} {'[95%]':>16}  "
                  f"{'better':>6} {'worse':>6}")
        for metric in ("em", "f1"):
            r = result[metric]
            low, high = (100 * v for v in r["ci95"])
            print(f"{scorer + ', ' + metric.upper():22}{100 * r['a']:7.2f} {100 * r['b']:7.2f}  "
                  f"{100 * r['difference']:+6.2f} [{low:+6.2f}, {high:+6.2f}]  "
                  f"{r['better']:6d} {r['worse']:6d}")
    return 0
