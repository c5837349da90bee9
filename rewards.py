"""What an answer is worth, what an episode is worth, and how a benchmark is summed up.

What it teaches: the reward is the only thing that the model learns from. You can work out every
number here by hand: the score of one answer (`score_answer`), the reward of an episode
(`episode_reward`, the paper's reward of single steps carried to whole episodes), and the scores of
many answers with their intervals (`summarize`).

There are two scorers. "official" is the paper's, quirks included, and gives its published numbers
to the last digit: F1 shares *sets* of tokens but divides by the lengths of the lists, so a repeated
word costs. An exact match makes F1 one. Text with a Chinese character is compared character by
character. "repaired" mends what is broken in the golds and in the scorer:
  - A backslash and an n in a gold (15 of MAT-Coding's 200) count as the line break they stand for.
  - F1 counts tokens as often as they occur, and white space is never a Chinese character.
  - A gold that is an article ("A" of a multiple choice) or only punctuation is compared as it is.
  - An empty gold (MAT-Search, id 101) is matched by nothing; "official" pays an empty answer fully.

Read next: grpo.py, which turns rewards into advantages. Left out: a judge model.
"""
import re
import string
from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from data.mat import LITERAL_NEWLINE, Sample

SCORERS = ("official", "repaired")
ASCII_PUNCTUATION = str.maketrans("", "", string.punctuation)
# The full-width twin of an ASCII sign is 0xFEE0 above it; MAT-Coding's scorer drops these as well.
ALL_PUNCTUATION = str.maketrans("", "", string.punctuation + "“”‘’、。｡《》【】" +
                                "".join(chr(ord(c) + 0xFEE0) for c in string.punctuation))
ARTICLES = re.compile(r"\b(a|an|the)\b")
CHINESE = re.compile("[\u4e00-\u9fff]")


# --- one answer -----------------------------------------------------------------------------------


def normalize(text: str, chinese: bool = True) -> str:
    """The text in lower case without punctuation, articles and extra white space (SQuAD's rules).
    Chinese text loses its blanks and keeps its articles, but not with `chinese=False`: the scorer
    of the text-only tasks has no rules for Chinese.

    >>> normalize("The  Night-Watch, (1642)!"), normalize("发票 号码：16 A。")
    ('nightwatch 1642', '发票号码16a')
    """
    text = text.lower().translate(ALL_PUNCTUATION if chinese else ASCII_PUNCTUATION)
    if chinese and CHINESE.search(text):
        return text.replace(" ", "")    # blanks alone: a line break stays, as in the paper's
    return " ".join(ARTICLES.sub(" ", text).split())


def tokens(prediction: str, gold: str, chinese: bool) -> tuple[list[str], list[str]]:
    """The words of two normalized texts; the characters of both if `chinese` is True and at least
    one of the two has a CHINESE character."""
    if chinese and (CHINESE.search(prediction) or CHINESE.search(gold)):
        return list(prediction), list(gold)
    return prediction.split(), gold.split()


def harmonic(common: int, n_prediction: int, n_gold: int) -> float:
    """F1 from counts: the harmonic mean of precision common / n_prediction and recall common /
    n_gold, which is 2 common / (n_prediction + n_gold). It is 0.0 if nothing is common, without a
    division by zero."""
    return 2 * common / (n_prediction + n_gold) if common else 0.0


def f1(prediction: str, gold: str, chinese: bool = True) -> float:
    """The official token F1, in [0, 1]: shared *distinct* tokens over the full lengths.

    Both texts are normalized, then cut into `tokens`. `common` is the number of different tokens
    that are in both; n_prediction and n_gold count every token, repeated ones too.

    >>> round(f1("the selected date is March 14, 2017", "March 14, 2017"), 3)    # 3 of 6 tokens
    0.667
    >>> f1("New York New York", "New York New York")    # the quirk; `score_answer` makes it 1
    0.5
    """
    p, g = tokens(normalize(prediction, chinese), normalize(gold, chinese), chinese)
    return harmonic(len(set(p) & set(g)), len(p), len(g))


def exact_match(prediction: str, gold: str, chinese: bool = True) -> float:
    """1.0 if the two texts are equal after `normalize`, else 0.0.

    >>> exact_match("1 can (473mL).", "1 Can (473ml)"), exact_match("1 can", "1 Can (473ml)")
    (1.0, 0.0)
    """
    return float(normalize(prediction, chinese) == normalize(gold, chinese))


def rule_for(gold: str, chinese: bool):
    """How to normalize a gold and its prediction: the first rule that leaves a part of the gold."""
    rules = (lambda text: normalize(text, chinese),
             lambda text: " ".join(text.lower().translate(ALL_PUNCTUATION).split()),  # articles
             lambda text: " ".join(text.lower().split()))                             # and signs
    return next(rule for rule in rules if rule(gold))


def repaired_scores(prediction: str, gold: str, chinese: bool) -> tuple[float, float]:
    """(f1, em) against one gold, as the docstring of this module describes "repaired"."""
    gold = LITERAL_NEWLINE.sub("\n", gold)
    if not gold.strip():
        return 0.0, 0.0
    rule = rule_for(gold, chinese)
    p, g = tokens(rule(prediction), rule(gold), chinese)
    p, g = [t for t in p if not t.isspace()], [t for t in g if not t.isspace()]
    return harmonic((Counter(p) & Counter(g)).total(), len(p), len(g)), float(p == g)


def score_answer(prediction: str | None, golds, scorer: str = "official",
                 chinese: bool = True) -> tuple[float, float]:
    """(f1, em), each the best over the golds (one text or several); (0, 0) for None, no answer.

    The paper's Tables 1 and 2 are means of these scores. Raises ValueError for an unknown scorer.

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
        pairs = [(f1(prediction, gold, chinese), exact_match(prediction, gold, chinese))
                 for gold in golds]
    best_f1, best_em = map(max, zip(*pairs))
    return (1.0 if best_em else best_f1), best_em


# --- one episode ----------------------------------------------------------------------------------


@dataclass
class Scoring:
    """The options of the reward."""
    answer_metric: Literal["f1", "em"] = "f1"       # score of the answer in the reward; paper: f1
    scorer: Literal["official", "repaired"] = "official"    # rules: the paper's, or repaired ones
    weight: dict[str, float] = field(   # weight of answer, format, problem or query; paper: 1
        default_factory=dict)


@dataclass(frozen=True)
class Reward:
    """What an episode earned."""
    total: float        # the weighted sum: the policy learns from this number and from nothing else
    # Each part is in [0, 1] before its weight: "answer" (F1, or exact match with answer_metric em),
    # "format" (share of turns in the strict format), "problem" (whether the first diagnosis is
    # right) and "query" (similarity of the searches to the gold queries) where the sample has golds
    # for them, "em" (exact match of the answer, only logged); extras/paper.py adds "accuracy".
    parts: dict[str, float]


def problem_reward(stated: tuple[str, ...] | None, gold: tuple[str, ...],
                   rotation_credit: bool = False) -> float:
    """1 if the stated set of problems is the gold set, else 0; 0 if nothing was stated (None).

    With `rotation_credit`, stating only the rotation of a sign with two problems is worth 0.5. The
    authors' code does this; the paper does not mention it.

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


LIST = 0.25     # with no more than this share of its words in the gold, an answer is a list


def answer_reward(answer: str | None, golds, scorer: str = "official",
                  chinese: bool = True) -> tuple[float, float]:
    """(f1, em) that a policy is paid for an answer: `score_answer` without its two loopholes.

    F1 rewards hedging. If the gold is one word and the policy lists k candidates with the right one
    among them, F1 is 2 / (k + 1), while one random guess earns only 1 / k on average. We therefore
    pay nothing for an answer if at most a quarter of its words are in the gold. That makes lists of
    four or more worthless. Lists of two or three still pay 0.67 and 0.5; --answer-metric em closes
    that gap, too. And the official rules normalize some golds to nothing ("A", "?"), so that any
    article or sign would match them. We compare such golds by the repaired rules.

    >>> answers = ("45", "The number is 45", "44 45 46 47", "the")
    >>> [round(answer_reward(answer, ["45"])[0], 2) for answer in answers]
    [1.0, 0.5, 0.0, 0.0]
    """
    best_f1, best_em = 0.0, 0.0
    for gold in golds if answer is not None else ():
        if not gold.strip():
            continue            # MAT-Search, id 101: no answer is right
        gold = LITERAL_NEWLINE.sub("\n", gold) if scorer == "repaired" else gold
        rule = rule_for(gold, chinese)
        p, g = tokens(rule(answer), rule(gold), chinese)
        if p == g or len(set(p) & set(g)) > LIST * len(p):
            rules = scorer if normalize(gold, chinese) else "repaired"
            value, em = score_answer(answer, gold, rules, chinese)
            best_f1, best_em = max(best_f1, value), max(best_em, em)
    return best_f1, best_em


SIMILARITY_THRESHOLD = 0.5      # a query less similar than this to its gold is worth nothing


def lexical_similarity(query: str, gold: str) -> float:
    """Cosine of the two sets of words, in [0, 1]. It stands in for the authors' sentence embedding
    (extras/search.py) with the same scale and threshold, but gives nothing for a synonym.

    >>> lexical_similarity("Milkmaid Vermeer museum", "museum of the Milkmaid by Vermeer")
    0.7745966692414834
    """
    a, b = (set(normalize(text, chinese=False).split()) for text in (query, gold))
    return len(a & b) / (len(a) * len(b)) ** 0.5 if a and b else 0.0    # above: 3 / sqrt(3 * 5)


def query_reward(written: list[str], golds: tuple[str, ...],
                 similarity=lexical_similarity) -> float:
    """The mean similarity of the searches to the gold queries, pair by pair in order. A pair below
    the threshold counts as 0, and so does a search that is missing or one too many.

    >>> query_reward(["ship 47", "Oslo"], ("ship 47", "mayor of Oslo"))     # 1 and 1 / sqrt(1 * 3)
    0.7886751345948129
    >>> query_reward(["ship", "ship 47"], ("ship 47",))     # 1 / sqrt(2), and one search too many
    0.35355339059327373
    """
    values = [similarity(query, gold) for query, gold in zip(written, golds, strict=False)]
    paid = sum(value for value in values if value >= SIMILARITY_THRESHOLD)
    return paid / max(len(written), len(golds), 1)


def episode_reward(episode, scoring: Scoring | None = None, *, rotation_credit: bool = False,
                   similarity=lexical_similarity) -> Reward:
    """The reward of a whole multi-turn episode. scoring: None for the defaults of Scoring.

    The paper rewards single steps: R_format is 1 for a step with valid tags, R_acc is the F1 of an
    answer step, and R_total is their sum. An episode is several steps, so this is our extension:
    R_format becomes the share of turns in the strict format, R_acc the F1 of the last turn's
    answer, and the authors' (unpublished) problem reward judges the first diagnosis only. If the
    sample has gold queries and no problems, `query_reward` takes the problem's place. With weights
    of 1 the total is in [0, 3].

    Repeating pays nothing: a second diagnosis, a contradiction, all labels at once, or the gold
    among many words earn at most what saying the right thing once earns. A turn that was cut off
    (the model did not write its end-of-turn token) earns nothing, and an episode that never answers
    has no answer reward. tests/test_battery.py plays what a policy might try instead.
    """
    scoring = scoring or Scoring()
    sample = episode.sample
    if scoring.answer_metric not in ("f1", "em"):
        raise ValueError(f"unknown answer_metric '{scoring.answer_metric}'; it is f1 or em")
    turns = [turn for turn in episode.turns if turn.finished]
    best_f1, em = answer_reward(episode.answer, sample.golds, scoring.scorer)
    strict = sum(turn.action.strict for turn in turns) / max(1, len(episode.turns))     # Eq. (3)
    accuracy = em if scoring.answer_metric == "em" else best_f1                         # Eq. (4)
    parts = {"answer": accuracy, "format": strict}
    if sample.problems:
        stated = next((turn.action.value for turn in turns if turn.action.kind == "problem"), None)
        parts["problem"] = problem_reward(stated, sample.problems, rotation_credit)
    if sample.queries:
        queries = [turn.action.value for turn in turns if turn.action.kind == "search"]
        parts["query"] = query_reward(queries, sample.queries, similarity)
    total = sum(scoring.weight.get(name, 1.0) * part for name, part in parts.items())   # Eq. (5)
    return Reward(total, parts | {"em": em})


# --- many answers ---------------------------------------------------------------------------------


def mean_ci95(values, seed: int = 0, resamples: int = 10_000) -> list[float]:
    """[low, high]: the 95% bootstrap percentile interval of the mean.

    A resample draws n values with replacement, which only decides how often each *distinct* value
    is drawn, and scores have few distinct values. So one multinomial draw per resample is enough,
    and a benchmark of 12,576 questions needs no table of 12,576 x 10,000.
    """
    distinct, counts = np.unique(np.asarray(values, dtype=float), return_counts=True)
    n = counts.sum()
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(n, counts / n, size=resamples)              # [resamples, distinct]
    return [float(x) for x in np.percentile(drawn @ distinct / n, [2.5, 97.5])]


def describe(scores: np.ndarray) -> dict:
    """n, em, f1 and their intervals from scores [n, 2] of (f1, em), as fractions."""
    return {"n": len(scores), "em": float(scores[:, 1].mean()), "f1": float(scores[:, 0].mean()),
            "em_ci95": mean_ci95(scores[:, 1]), "f1_ci95": mean_ci95(scores[:, 0])}


def describe_splits(scores: np.ndarray, splits: list[str]) -> dict:
    """`describe` of all scores [n, 2], and under "splits" that of the simple and of the hard ones,
    if there are any."""
    parts = {name: scores[[split == name for split in splits]] for name in ("simple", "hard")}
    return {**describe(scores),
            "splits": {name: describe(part) for name, part in parts.items() if len(part)}}


def summarize(predictions: list[str | None], samples: list[Sample], scorer: str = "official",
              chinese: bool = True) -> dict:
    """The scores of one prediction for each sample, in the form of summary.json, as fractions:
    {"n", "em", "f1", "em_ci95", "f1_ci95", "splits": {"simple": {the same five}, "hard": {...}}}.

    A prediction is None where there is no answer. ValueError if the lists are empty or unequal.

    >>> samples = [Sample("1", "?", ("A B",), None, split="simple"),
    ...            Sample("2", "?", ("C",), None, split="hard")]
    >>> summary = summarize(["b", None], samples)       # "A" is an article: "A B" becomes "b"
    >>> round(summary["f1"], 3), summary["em"], summary["splits"]["hard"]["n"]
    (0.5, 0.5, 1)
    """
    if not samples or len(predictions) != len(samples):
        raise ValueError(f"{len(predictions)} predictions for {len(samples)} samples; "
                         "there must be one prediction for each sample")
    scores = np.array([score_answer(prediction, sample.golds, scorer, chinese)
                       for prediction, sample in zip(predictions, samples, strict=True)])   # [n, 2]
    return describe_splits(scores, [sample.split for sample in samples])
