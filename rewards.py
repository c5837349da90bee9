"""What an answer is worth, what an episode is worth, and what a file of predictions is worth.

What it teaches: the reward is the only thing the model learns from, so each number here is plain arithmetic that can be
done by hand. Scoring an answer comes first (`normalize`, `f1`, `exact_match`, `score_answer`), then an episode
(`episode_reward`) or a single step of the paper's way (`step_reward`), then a benchmark (`summarize`,
`score_predictions`, `compare`).

Two scorers. "official" is the paper's, quirks included, and gives its published numbers to the last digit: F1 shares
*sets* of tokens but divides by the lengths of the lists (a repeated word costs), exact match makes F1 one, text with a
Chinese character is compared character by character. "repaired" mends what is broken in golds and scorer:
  - a gold with a backslash and an n where a line break belongs (15 of MAT-Coding's 200) can be matched;
  - F1 counts tokens as often as they occur, and white space never counts as a Chinese character;
  - an answer that is an article ("A" of a multiple choice) or only punctuation is compared as it stands;
  - an empty gold (MAT-Search, id 101) is matched by nothing, where "official" gives an empty answer full marks.

Read next: rollout.py, which makes the episodes; grpo.py, which turns rewards into advantages.
Left out: a judge model.
"""
import re
import string
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.mat import LITERAL_NEWLINE, DataError, Sample, StepSample, field, read_rows, split_of, text_list

SCORERS = ("official", "repaired")
ASCII_PUNCTUATION = str.maketrans("", "", string.punctuation)
# The full-width twin of an ASCII sign lies 0xFEE0 further on. MAT-Coding's scorer drops these as well.
ALL_PUNCTUATION = str.maketrans("", "", string.punctuation + "“”‘’、。｡《》【】" +
                                "".join(chr(ord(c) + 0xFEE0) for c in string.punctuation))
ARTICLES = re.compile(r"\b(a|an|the)\b")
CHINESE = re.compile("[\u4e00-\u9fff]")


# --- one answer ----------------------------------------------------------------------------------------------------


def normalize(text: str, chinese: bool = True) -> str:
    """Lower case without punctuation, articles and extra white space (SQuAD's rules); Chinese text loses its blanks
    and keeps its articles. `chinese=False` is the text-only tasks' scorer, which knows no Chinese.

    >>> normalize("The  Night-Watch, (1642)!"), normalize("发票 号码：16 A。")
    ('nightwatch 1642', '发票号码16a')
    """
    text = text.lower().translate(ALL_PUNCTUATION if chinese else ASCII_PUNCTUATION)
    if chinese and CHINESE.search(text):
        return text.replace(" ", "")    # blanks only: a line break stays, as in the published scorer
    return " ".join(ARTICLES.sub(" ", text).split())


def tokens(prediction: str, gold: str, chinese: bool) -> tuple[list[str], list[str]]:
    """Words of two normalized texts; characters of both as soon as one of the two has a CHINESE one and chinese is True."""
    if chinese and (CHINESE.search(prediction) or CHINESE.search(gold)):
        return list(prediction), list(gold)
    return prediction.split(), gold.split()


def harmonic(common: int, n_prediction: int, n_gold: int) -> float:
    """F1 from counts: the harmonic mean of precision common / n_prediction and recall common / n_gold, that is
    2 common / (n_prediction + n_gold); 0.0 where nothing is common, without a division by zero."""
    return 2 * common / (n_prediction + n_gold) if common else 0.0


def f1(prediction: str, gold: str, chinese: bool = True) -> float:
    """The official token F1, in [0, 1]: shared *distinct* tokens over the full lengths.

    Both texts are normalized, then cut into `tokens`; `common` is the number of different tokens that are in both,
    n_prediction and n_gold count every token, repeated ones too.

    >>> round(f1("the selected date is March 14, 2017", "March 14, 2017"), 3)       # 3 of 6 tokens, all 3 found
    0.667
    >>> f1("New York New York", "New York New York")        # the quirk; `score_answer` lifts it, as an exact match is 1
    0.5
    """
    p, g = tokens(normalize(prediction, chinese), normalize(gold, chinese), chinese)
    return harmonic(len(set(p) & set(g)), len(p), len(g))


def exact_match(prediction: str, gold: str, chinese: bool = True) -> float:
    """1.0 if the two are equal once normalized, else 0.0.

    >>> exact_match("1 can (473mL).", "1 Can (473ml)"), exact_match("1 can", "1 Can (473ml)")
    (1.0, 0.0)
    """
    return float(normalize(prediction, chinese) == normalize(gold, chinese))


def rule_for(gold: str, chinese: bool):
    """How a gold and what is compared with it are normalized: the first rule that leaves something of the gold."""
    rules = (lambda text: normalize(text, chinese),                                     # the usual one,
             lambda text: " ".join(text.lower().translate(ALL_PUNCTUATION).split()),    # with articles,
             lambda text: " ".join(text.lower().split()))                               # with punctuation
    return next(rule for rule in rules if rule(gold))


def repaired_scores(prediction: str, gold: str, chinese: bool) -> tuple[float, float]:
    """(f1, em) of one gold as the module's docstring describes for "repaired"."""
    gold = LITERAL_NEWLINE.sub("\n", gold)
    if not gold.strip():
        return 0.0, 0.0
    rule = rule_for(gold, chinese)
    p, g = tokens(rule(prediction), rule(gold), chinese)
    p, g = [t for t in p if not t.isspace()], [t for t in g if not t.isspace()]
    return harmonic((Counter(p) & Counter(g)).total(), len(p), len(g)), float(p == g)


def score_answer(prediction: str | None, golds, scorer: str = "official", chinese: bool = True) -> tuple[float, float]:
    """(f1, em), each the best over the golds; no answer (None) is (0, 0). The paper's Tables 1 and 2 are means of it.

    >>> score_answer("New York New York", ["NYC", "new york new york!"])
    (1.0, 1.0)
    >>> [score_answer("FOOD DIRECTORY", ["FOOD\\\\nDIRECTORY"], scorer) for scorer in SCORERS]
    [(0.0, 0.0), (1.0, 1.0)]
    """
    if scorer not in SCORERS:
        raise ValueError(f"unknown scorer '{scorer}'; it is one of {', '.join(SCORERS)}")
    if prediction is None:
        return 0.0, 0.0
    golds = [golds] if isinstance(golds, str) else golds
    if scorer == "repaired":
        pairs = [repaired_scores(prediction, gold, chinese) for gold in golds]
    else:
        pairs = [(f1(prediction, gold, chinese), exact_match(prediction, gold, chinese)) for gold in golds]
    best_f1, best_em = max(pair[0] for pair in pairs), max(pair[1] for pair in pairs)
    return (1.0 if best_em else best_f1), best_em


# --- one episode ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reward:
    """What an episode earned. Every part is in [0, 1] before its weight."""
    total: float        # the weighted sum: this, and nothing else, is what the policy learns from
    answer: float | None    # F1 (or exact match) of the answer; this and the next two: None for a step of another kind
    format: float           # share of turns in the strict format
    problem: float | None   # was the first diagnosis right; None where the data has no problems
    em: float | None        # exact match of the answer; only logged, unless chosen as the answer's metric
    query: float | None = None      # similarity of the searches to the gold queries; None where the data has none
    accuracy: float | None = None   # of a single step, whatever its kind; None for an episode


def problem_reward(stated: tuple[str, ...] | None, gold: tuple[str, ...], rotation_credit: bool = False) -> float:
    """1 if the stated set of problems is the gold set, else 0; 0 for none stated (None). With `rotation_credit`, 0.5 for only the rotation of a double,
    as the authors' code has it (it is not in the paper).

    >>> gold = ("rotation90", "dark")
    >>> problem_reward(("dark", "rotation90"), gold), problem_reward(("rotation90",), gold)
    (1.0, 0.0)
    >>> problem_reward(("rotation90",), gold, rotation_credit=True)
    0.5
    """
    if not stated:
        return 0.0
    if set(stated) == set(gold):
        return 1.0
    rotation = set(gold) & {"rotation90", "rotation180"}
    return 0.5 if rotation_credit and len(gold) == 2 and set(stated) == rotation else 0.0


LIST = 0.25     # an answer of which no more than this share are the gold's words is a list, not an answer


def answer_reward(answer: str | None, golds, scorer: str = "official", chinese: bool = True) -> tuple[float, float]:
    """(f1, em) of an answer that a policy is paid for: `score_answer` without what invites it to guess.

    F1 pays for lists: who names k candidates of one word gets 2 / (k + 1), who names one at random 1 / k on average. So
    an answer is worth nothing when only a quarter of its words, or less, are the gold's; this ends lists from four
    candidates on (two and three still pay; --answer-metric em ends these, too). And a gold that the official rules
    normalize to nothing ("A", "?") is compared by the repaired ones: else any article or sign would be right.

    >>> [round(answer_reward(said, ["45"])[0], 2) for said in ("45", "The number is 45", "44 45 46 47", "the")]
    [1.0, 0.5, 0.0, 0.0]
    """
    best_f1, best_em = 0.0, 0.0
    for gold in golds if answer is not None else ():
        if not gold.strip():
            continue            # MAT-Search, id 101: nothing is right
        gold = LITERAL_NEWLINE.sub("\n", gold) if scorer == "repaired" else gold
        rule = rule_for(gold, chinese)
        p, g = tokens(rule(answer), rule(gold), chinese)
        if p == g or len(set(p) & set(g)) > LIST * len(p):
            value, em = score_answer(answer, gold, scorer if normalize(gold, chinese) else "repaired", chinese)
            best_f1, best_em = max(best_f1, value), max(best_em, em)
    return best_f1, best_em


SIMILARITY_THRESHOLD = 0.5      # a query less similar than this to the gold one is worth nothing


def lexical_similarity(query: str, gold: str) -> float:
    """Cosine of the two sets of words, in [0, 1]. It stands in for the authors' sentence embedding (all-MiniLM-L6-v2):
    the same scale and threshold, but a synonym counts for nothing.

    >>> lexical_similarity("The Milkmaid Vermeer museum", "museum of the Milkmaid by Vermeer")     # 3 / sqrt(3 * 5)
    0.7745966692414834
    """
    a, b = (set(normalize(text, chinese=False).split()) for text in (query, gold))
    return len(a & b) / (len(a) * len(b)) ** 0.5 if a and b else 0.0


def query_reward(written: list[str], golds: tuple[str, ...], similarity=lexical_similarity) -> float:
    """How near the searches are to the gold ones, in order: the mean similarity of the pairs, each 0 below the threshold;
    a search too few or too many counts as 0.

    >>> query_reward(["ship 47", "Oslo"], ("ship 47", "mayor of Oslo"))     # 1 and 1 / sqrt(1 * 3)
    0.7886751345948129
    >>> query_reward(["ship", "ship 47"], ("ship 47",))                     # 1 / sqrt(2), and one too many
    0.35355339059327373
    """
    values = [similarity(query, gold) for query, gold in zip(written, golds)]
    return sum(value for value in values if value >= SIMILARITY_THRESHOLD) / max(len(written), len(golds), 1)


def episode_reward(episode, *, answer_weight: float = 1.0, format_weight: float = 1.0, problem_weight: float = 1.0,
                   query_weight: float = 1.0, answer_metric: str = "f1", scorer: str = "official",
                   rotation_credit: bool = False, similarity=lexical_similarity) -> Reward:
    """The reward of a whole multi-turn episode.

    The paper rewards single steps: R_format is 1 for a step with valid tags, R_acc is the F1 of an answer step, R_total
    their sum. For an episode, which is several steps, this is our own extension: R_format becomes the share of turns in
    the strict format, R_acc is the F1 of the last turn's answer, and the authors' (unpublished) problem
    reward judges the first diagnosis only. So nothing is earned by repeating: a second diagnosis, a contradiction, all
    labels at once, or the gold among many words are worth less than, or as much as, saying the right thing once. What
    stands in a turn that was cut off (the model did not write its end-of-turn token) is worth nothing, and an episode
    that never answers has no answer reward; a list of candidates is no answer (`answer_reward`). Where the sample has
    gold queries, the searches' similarity to them takes the problem's place (`query_reward`). With weights of 1 the
    total is in [0, 3]. tests/test_battery.py plays what a policy might try instead.
    """
    if answer_metric not in ("f1", "em"):
        raise ValueError(f"unknown answer_metric '{answer_metric}'; it is f1 or em")
    turns = [turn for turn in episode.turns if turn.finished]
    stated = next((turn.action.value for turn in turns if turn.action.kind == "problem"), None)
    best_f1, em = answer_reward(episode.answer, episode.sample.golds, scorer)
    strict = sum(turn.action.strict for turn in turns) / max(1, len(episode.turns))         # Eq. (3)
    accuracy = em if answer_metric == "em" else best_f1                                     # Eq. (4)
    problem = problem_reward(stated, episode.sample.problems, rotation_credit) if episode.sample.problems else None
    queries = [turn.action.value for turn in turns if turn.action.kind == "search"]
    query = query_reward(queries, episode.sample.queries, similarity) if episode.sample.queries else None
    total = (answer_weight * accuracy + format_weight * strict                              # Eq. (5), and ours
             + problem_weight * (problem or 0.0) + query_weight * (query or 0.0))
    return Reward(total=total, answer=accuracy, format=strict, problem=problem, em=em, query=query)


# --- one step, the paper's way --------------------------------------------------------------------------------------

CODE_ACCURACY = 0.9             # for any program; nothing is run in training


def step_accuracy(action, step: StepSample, scorer: str = "official", similarity=lexical_similarity) -> float:
    """The paper's R_acc as the released trainer computes it, in [0, 1]; an action of another kind than the teacher's is worth 0.

    answer   official: set F1, English rules, without the evaluation's "exact match makes F1 one": a right "A" (an
             article) is worth 0 and a repeated word costs. repaired: `score_answer`'s
    code     0.9, whatever the program does
    problem  `problem_reward`, half credit for the rotation of a double included
    search   similarity to the teacher's query, 0 below the threshold
    """
    if action.kind != step.kind:
        return 0.0
    if step.kind == "code":
        return CODE_ACCURACY
    if step.kind == "problem":
        return problem_reward(action.value, step.problems, rotation_credit=True)
    if step.kind == "search":
        return query_reward([action.value], step.queries, similarity)
    if scorer == "official":
        return max(f1(action.value, gold, chinese=False) for gold in step.golds)
    return score_answer(action.value, step.golds, scorer)[0]


def step_reward(episode, *, accuracy_weight: float = 1.0, format_weight: float = 1.0,
                scorer: str = "official", similarity=lexical_similarity) -> Reward:
    """The reward of an episode of one turn for a StepSample: accuracy plus format, at most 2.

    The format counts if the turn is strictly a thought and an action of the kind that the row asks for (MAT-Search: a
    search or an answer, either passes). Three quirks of the released code are absent: a text without any tag earns
    nothing (there: 0.9 on a code row, its F1 on an answer row), nor does a turn that says a tag twice or was cut off,
    and an answer may have several lines. No text is replaced by the teacher's before it is judged (B1), and no number
    is looked for in the whole text (B5).
    """
    step, turn = episode.sample, episode.turns[-1]
    accuracy = step_accuracy(turn.action, step, scorer, similarity) if turn.finished else 0.0
    strict = float(turn.finished and turn.action.strict and turn.action.kind in step.formats)
    answer = episode.answer if step.kind == "answer" else None
    em = score_answer(answer, step.golds, scorer, chinese=False)[1] if step.kind == "answer" else None
    return Reward(total=accuracy_weight * accuracy + format_weight * strict,
                  answer=accuracy if step.kind == "answer" else None, format=strict,
                  problem=accuracy if step.kind == "problem" else None, em=em, accuracy=accuracy)


# --- many answers --------------------------------------------------------------------------------------------------


def mean_ci95(values, seed: int = 0, resamples: int = 10_000) -> list[float]:
    """[low, high]: the 95% bootstrap percentile interval of the mean.

    Drawing n values with replacement only decides how often each *distinct* value is drawn, and scores have few: so one
    multinomial draw per resample does, and a benchmark of 12,576 questions needs no 12,576 x 10,000 table.
    """
    distinct, counts = np.unique(np.asarray(values, dtype=float), return_counts=True)
    n = counts.sum()
    drawn = np.random.default_rng(seed).multinomial(n, counts / n, size=resamples)      # [resamples, distinct]
    return [float(x) for x in np.percentile(drawn @ distinct / n, [2.5, 97.5])]


def describe(scores: np.ndarray) -> dict:
    """n, em, f1 and their intervals from scores [n, 2] of (f1, em), as fractions."""
    return {"n": len(scores), "em": float(scores[:, 1].mean()), "f1": float(scores[:, 0].mean()),
            "em_ci95": mean_ci95(scores[:, 1]), "f1_ci95": mean_ci95(scores[:, 0])}


def describe_splits(scores: np.ndarray, splits: list[str]) -> dict:
    """`describe` of all scores, and under "splits" of the simple and the hard ones, if there are any."""
    parts = {name: scores[[split == name for split in splits]] for name in ("simple", "hard")}
    return {**describe(scores), "splits": {name: describe(part) for name, part in parts.items() if len(part)}}


def summarize(predictions: list[str | None], samples: list[Sample], scorer: str = "official",
              chinese: bool = True) -> dict:
    """The scores of one prediction per sample (None: no answer), in the form of summary.json, as fractions:
    {"n", "em", "f1", "em_ci95", "f1_ci95", "splits": {"simple": {the same five}, "hard": {the same five}}}.

    >>> samples = [Sample("1", "?", ("A B",), None, split="simple"), Sample("2", "?", ("C",), None, split="hard")]
    >>> summary = summarize(["b", None], samples)
    >>> round(summary["f1"], 3), summary["em"], summary["splits"]["hard"]["n"]       # "A" is an article: "a b" is "b"
    (0.5, 0.5, 1)
    """
    if not samples or len(predictions) != len(samples):
        raise ValueError(f"{len(predictions)} predictions for {len(samples)} samples; there must be one for each")
    scores = np.array([score_answer(p, s.golds, scorer, chinese) for p, s in zip(predictions, samples)])    # [n, 2]
    return describe_splits(scores, [sample.split for sample in samples])


def load_predictions(path: Path | str) -> list[dict]:
    """The rows of a predictions file in the published schema, [{"id", "gt", "pred_answer"}, ...]: "gt" is a text or a
    list of texts, "pred_answer" a text or null; Bamboogle's has "query" in place of "id". Raises DataError."""
    rows = read_rows(path)
    for number, row in enumerate(rows, start=1):
        text_list(row, "gt", f"{path}: row {number}")
        field(row, "pred_answer", (str, type(None)), f"{path}: row {number}")
    return rows


def score_rows(rows: list[dict], task: str, scorer: str) -> np.ndarray:
    """(f1, em) of each row of a predictions file, [n, 2]. Of the paper's scorers only MAT-Coding's knows Chinese."""
    return np.array([score_answer(row["pred_answer"], row["gt"], scorer, task == "mat-coding") for row in rows])


def score_predictions(path: Path | str, task: str, scorer: str = "official") -> dict:
    """The scores of a predictions file, in `summarize`'s form. A row's split is its own "split" field, else its place:
    the first 70 of mat-coding, the first 75 of mat-search are simple. Raises DataError."""
    rows = load_predictions(path)
    return describe_splits(score_rows(rows, task, scorer), [split_of(task, row, i) for i, row in enumerate(rows)])


def items(path: Path | str) -> dict:
    """The rows of a predictions file by what tells them apart: the id, else the query; a second one is (query, 1)."""
    rows, seen = {}, Counter()
    for row in load_predictions(path):
        name = str(row.get("id", row.get("query", "")))
        rows[name, seen[name]] = row
        seen[name] += 1
    return rows


def compare(path_a: Path | str, path_b: Path | str, task: str, scorer: str = "official") -> dict:
    """Two predictions files on the same items, paired: what b is better than a by, with its interval.

    {"n", "changed": items with another answer, "f1" and "em": {"a", "b", "difference", "ci95", "better", "worse"}}, the
    last two in items. Pairing matters: two files that agree on most items have a far narrower interval than either
    score alone. Raises DataError if the files do not hold the same items with the same golds.
    """
    a, b = items(path_a), items(path_b)
    for name in [*a, *b]:
        if name not in a or name not in b or a[name]["gt"] != b[name]["gt"]:
            raise DataError(f"{path_a} and {path_b}: cannot be compared, item '{name[0]}' is missing from one of them "
                            "or has other golds there; give two files of the same benchmark")
    rows_a, rows_b = list(a.values()), [b[name] for name in a]
    scores_a, scores_b = score_rows(rows_a, task, scorer), score_rows(rows_b, task, scorer)     # [n, 2]
    result = {"n": len(a), "changed": sum(x["pred_answer"] != y["pred_answer"] for x, y in zip(rows_a, rows_b))}
    for column, metric in enumerate(("f1", "em")):
        change = scores_b[:, column] - scores_a[:, column]
        result[metric] = {"a": float(scores_a[:, column].mean()), "b": float(scores_b[:, column].mean()),
                          "difference": float(change.mean()), "ci95": mean_ci95(change),
                          "better": int((change > 0).sum()), "worse": int((change < 0).sum())}
    return result
