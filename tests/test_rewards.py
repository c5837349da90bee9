"""rewards.py and the scores of extras/files.py: you can do every number here by hand, or the paper
printed it."""
import json
import math
import random
import re
import string
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from data.mat import PROBLEMS, DataError, Sample
from extras.files import compare, load_predictions, score_predictions
from rewards import (SCORERS, Reward, Scoring, episode_reward, exact_match, f1, mean_ci95,
                     normalize, problem_reward, score_answer, summarize)

PUBLISHED = Path(__file__).parents[2] / "shared" / "predictions"
CODING_7B = PUBLISHED / "7b_mat_coding_grpo_step1400.json"
BAMBOOGLE_7B = PUBLISHED / "7b_step200_bamboogle_web_n4.json"
published = pytest.mark.skipif(not PUBLISHED.exists(),
                               reason="the published predictions are not on this machine")


# --- one answer: by hand --------------------------------------------------------------------------


def test_normalize_is_squads_for_english_and_keeps_only_signs_for_chinese():
    assert normalize("  The Night-Watch,\n(1642)! ") == "nightwatch 1642"
    assert normalize("a cat and an ant") == "cat and ant"
    assert normalize("theatre") == "theatre"                    # an article is a word of its own
    # blanks go, articles stay, full-width signs go
    assert normalize("软 件 The 工程。！") == "软件the工程"
    assert normalize("“Mona Lisa”") == "mona lisa"
    # the scorer of the text-only tasks knows ASCII signs only
    assert normalize("“Mona Lisa”", chinese=False) == "“mona lisa”"


def test_f1_by_hand():
    # prediction: selected date is march 14 2017 (6 tokens); gold: march 14 2017 (3); 3 shared.
    # precision 3/6, recall 3/3, F1 = 2 * 0.5 * 1 / 1.5 = 2/3
    assert f1("The selected date is March 14, 2017.", "March 14, 2017") == pytest.approx(2 / 3)
    assert f1("Rome", "Paris") == 0.0
    assert f1("", "Paris") == f1("Paris", "") == f1("", "") == 0.0      # no division by zero
    assert exact_match("", "") == 1.0                                   # as published


def test_chinese_is_compared_by_characters():
    # 广安枢纽站 and 广安火车站: 5 characters each, 广 安 站 shared: 2 * 3 / 10
    assert f1("广安枢纽站", "广安火车站") == pytest.approx(0.6)
    assert f1("广安枢纽站", "广安火车站", chinese=False) == 0.0     # one word each, and they differ
    # one Chinese side suffices: the English "ab" is two characters as well
    assert f1("ab", "a中") == pytest.approx(0.5)


def test_the_published_f1_counts_distinct_tokens_over_full_lengths():
    # new york new york: 2 distinct shared tokens over 4 and 4, though the two are equal
    assert f1("New York New York", "New York New York") == pytest.approx(0.5)
    # an exact match mends this, and nothing else does
    golds = ["New York New York"]
    assert score_answer("New York New York", golds) == (1.0, 1.0)
    assert score_answer("New York New York City", golds)[0] == pytest.approx(2 * 2 / 9)
    assert score_answer("New York New York City", golds, "repaired")[0] == pytest.approx(2 * 4 / 9)


def test_the_best_gold_counts_and_no_answer_is_zero():
    assert score_answer("NYC", ["New York", "NYC"]) == (1.0, 1.0)
    assert score_answer("NYC", "NYC") == (1.0, 1.0)             # MAT-Search's gold is not in a list
    assert score_answer(None, ["NYC"]) == (0.0, 0.0)
    assert score_answer("nan", ["7"]) == (0.0, 0.0)
    assert score_answer("nan", ["NaN"]) == (1.0, 1.0)           # a text like any other


def test_an_article_as_answer():
    """Official: "A" is stripped to nothing. Nothing equals nothing, so "the" and "!" are as right
    as "A"."""
    right, wrong = (1.0, 1.0), (0.0, 0.0)
    for prediction, official, repaired in (("A", right, right), ("a.", right, right),
                                           ("the", right, wrong), ("!", right, wrong),
                                           ("B", wrong, wrong)):
        assert score_answer(prediction, ["A"]) == official
        assert score_answer(prediction, ["A"], "repaired") == repaired
    # 1 of 3 tokens, 1 of 1
    assert score_answer("A sunny day", ["A"], "repaired") == (pytest.approx(0.5), 0.0)
    assert score_answer("+", ["+"], "repaired") == right
    assert score_answer("-", ["+"], "repaired") == wrong


def test_an_empty_gold_cannot_be_hit_by_saying_nothing():
    assert score_answer("", [""]) == (1.0, 1.0)
    assert score_answer(None, [""]) == (0.0, 0.0)               # no answer is not an empty one
    assert score_answer("", [""], "repaired") == (0.0, 0.0)
    assert score_answer("", ["Paris"], "repaired") == score_answer("", ["Paris"]) == (0.0, 0.0)


def test_a_literal_backslash_n_in_a_gold():
    assert score_answer("SIZE 3", ["SIZE\\n3"]) == (0.0, 0.0)          # size 3 against sizen3
    assert score_answer("SIZE 3", ["SIZE\\n3"], "repaired") == (1.0, 1.0)
    assert score_answer("\\neq", ["\\neq"], "repaired") == (1.0, 1.0)


def test_an_unknown_scorer_is_an_error():
    with pytest.raises(ValueError, match="official, repaired"):
        score_answer("x", ["x"], "fixed")


# --- one answer: against an independent slow version, and properties ------------------------------


def slow_scores(prediction: str, gold: str) -> tuple[float, float]:
    """The official scores again, from their description: sign by sign, token by token."""
    def clean(text):
        kept = ""
        for char in text.lower():
            full_width = (0xFF01 <= ord(char) <= 0xFF5E
                          and chr(ord(char) - 0xFEE0) in string.punctuation)
            chinese = char in "“”‘’、。｡《》【】"
            if char not in string.punctuation and not full_width and not chinese:
                kept += char
        if re.search("[一-鿿]", kept):
            return kept.replace(" ", "")
        return " ".join(word for word in re.sub(r"\b(?:a|an|the)\b", " ", kept).split())

    p, g = clean(prediction), clean(gold)
    if p == g:
        return 1.0, 1.0
    by_character = re.search("[一-鿿]", p + g)
    p, g = (list(p), list(g)) if by_character else (p.split(), g.split())
    shared = sum(1 for token in set(p) if token in g)
    if shared == 0:
        return 0.0, 0.0
    precision, recall = shared / len(p), shared / len(g)
    return 2 * precision * recall / (precision + recall), 0.0


def random_text(rng: random.Random) -> str:
    pieces = ["a", "the ", "b", "C", " ", "\n", ".", "！", "“", "中", "国", "ab ", "7"]
    return "".join(rng.choice(pieces) for _ in range(rng.randrange(9)))


def test_official_scores_equal_the_slow_version():
    rng, different = random.Random(0), set()
    for _ in range(3000):
        prediction, gold = random_text(rng), random_text(rng)
        expected = slow_scores(prediction, gold)
        assert score_answer(prediction, [gold]) == pytest.approx(expected), (prediction, gold)
        different.add(round(expected[0], 3))
    assert len(different) > 20          # the texts were not all equal or all foreign


@pytest.mark.parametrize("scorer", SCORERS)
def test_scores_stay_in_their_range_and_an_exact_match_is_worth_most(scorer):
    rng = random.Random(1)
    for _ in range(2000):
        prediction, golds = random_text(rng), [random_text(rng) for _ in range(rng.randrange(1, 3))]
        best_f1, em = score_answer(prediction, golds, scorer)
        assert 0.0 <= best_f1 <= 1.0 and em in (0.0, 1.0) and (best_f1 == 1.0 or em == 0.0)
        assert score_answer(prediction, golds[::-1], scorer) == (best_f1, em)
        if em == 0.0 and golds[0].strip():          # nothing beats the gold itself
            assert score_answer(golds[0], golds, scorer)[0] == 1.0 >= best_f1


# --- an episode -----------------------------------------------------------------------------------


@dataclass
class Action:
    kind: str
    value: object = None
    strict: bool = True


@dataclass
class Turn:
    action: Action
    finished: bool = True


@dataclass
class Episode:
    """As much of rollout.Episode as the reward looks at."""
    sample: Sample
    turns: list = field(default_factory=list)

    @property
    def answer(self):
        last = self.turns[-1] if self.turns else None
        answered = last and last.finished and last.action.kind == "answer"
        return last.action.value if answered else None


DOUBLE = Sample("1", "What is written?", ("4821 77",), None, problems=("rotation90", "dark"),
                split="train")
RIGHT = Turn(Action("problem", ("dark", "rotation90")))
WRONG = Turn(Action("problem", ("blur",)))
CODE = Turn(Action("code", "..."))
ANSWER, REFUSAL = Turn(Action("answer", "4821 77")), Turn(Action("answer", "none"))


def reward(*turns, sample=DOUBLE, rotation_credit=False, **scoring) -> Reward:
    return episode_reward(Episode(sample, list(turns)), Scoring(**scoring),
                          rotation_credit=rotation_credit)


def test_a_perfect_episode_earns_one_for_each_part():
    perfect = reward(RIGHT, CODE, ANSWER)
    assert perfect == Reward(3.0, {"answer": 1.0, "format": 1.0, "problem": 1.0, "em": 1.0})


def test_the_parts_by_hand():
    sloppy = Turn(Action("answer", "it says 4821"), finished=True)
    sloppy.action.strict = False
    # answer: 1 shared of 3 and 2 tokens: 2 * 1 / 5; format: 2 of 3 turns; problem: wrong
    partial = reward(WRONG, CODE, sloppy)
    assert partial.parts == pytest.approx({"answer": 0.4, "format": 2 / 3, "problem": 0, "em": 0})
    assert partial.total == pytest.approx(0.4 + 2 / 3)


def test_weights_and_the_metric_of_the_answer():
    half = Turn(Action("answer", "4821"))           # F1 2/3, no exact match
    weight = {"answer": 3, "format": 0.5, "problem": 0}
    assert reward(RIGHT, half, weight=weight).total == pytest.approx(2.5)
    assert reward(RIGHT, half, weight={"problem": 0.5}).total == pytest.approx(2 / 3 + 1.5)
    assert reward(RIGHT, half, answer_metric="em").parts["answer"] == 0.0
    assert reward(RIGHT, ANSWER, answer_metric="em").parts["answer"] == 1.0
    with pytest.raises(ValueError, match="f1 or em"):
        reward(RIGHT, half, answer_metric="bleu")


def test_an_episode_without_turns_or_without_an_answer():
    assert reward() == Reward(0.0, {"answer": 0.0, "format": 0.0, "problem": 0.0, "em": 0.0})
    assert reward(RIGHT, CODE).parts["answer"] == 0.0


def test_only_the_first_diagnosis_counts_so_guessing_on_earns_nothing():
    assert reward(RIGHT, WRONG, ANSWER).parts["problem"] == 1.0
    assert reward(WRONG, RIGHT, ANSWER).parts["problem"] == 0.0
    assert reward(*[RIGHT] * 4, ANSWER).total == reward(RIGHT, ANSWER).total
    assert reward(Turn(Action("problem", PROBLEMS)), ANSWER).parts["problem"] == 0.0
    assert reward(Turn(Action("problem", ())), ANSWER).parts["problem"] == 0.0


def test_half_of_a_double_is_wrong_unless_the_authors_half_credit_is_chosen():
    gold = ("rotation90", "dark")
    assert [problem_reward(stated, gold) for stated in (("rotation90",), ("dark",))] == [0.0, 0.0]
    for stated, worth in ((("rotation90",), 0.5), (("dark",), 0.0), (("rotation180",), 0.0),
                          (gold, 1.0)):
        assert problem_reward(stated, gold, rotation_credit=True) == worth
    assert problem_reward(("rotation90", "blur"), gold, rotation_credit=True) == 0.0
    assert problem_reward(("rotation90",), gold + ("blur",), rotation_credit=True) == 0.0
    assert problem_reward(("rotation90",), ("rotation90",), rotation_credit=True) == 1.0
    half_right = Turn(Action("problem", ("rotation90",)))
    assert reward(half_right, ANSWER, rotation_credit=True).total == 2.5


def test_a_sample_without_gold_problems_never_pays_for_a_diagnosis():
    text_only = Sample("1", "Who?", ("Ann",), None)
    paid = reward(RIGHT, Turn(Action("answer", "Ann")), sample=text_only)
    assert paid == Reward(2.0, {"answer": 1.0, "format": 1.0, "em": 1.0})


def test_a_turn_that_was_cut_off_earns_nothing():
    def cut(turn):
        return Turn(turn.action, finished=False)

    # no answer, and 2 of 3 turns
    assert reward(RIGHT, CODE, cut(ANSWER)).total == pytest.approx(1.0 + 2 / 3)
    assert reward(cut(RIGHT)).total == 0.0
    assert reward(RIGHT, CODE, cut(ANSWER)).total < reward(RIGHT, CODE, REFUSAL).total


def test_many_words_around_the_gold_and_many_turns_earn_less_or_nothing():
    padded = Turn(Action("answer", "4821 77 " + "word " * 96))
    assert reward(RIGHT, padded).parts["answer"] == 0.0
    repeated = Turn(Action("answer", "4821 77 " * 50))
    assert reward(RIGHT, repeated).parts["answer"] == 0.0
    thrice = Turn(Action("answer", "4821 77 " * 3))
    assert reward(RIGHT, thrice).parts["answer"] == pytest.approx(2 * 2 / 8)
    assert reward(RIGHT, *[CODE] * 9, ANSWER).total == reward(RIGHT, CODE, ANSWER).total


def test_rewards_are_finite_and_in_range_whatever_was_written():
    rng = random.Random(2)
    values = {"problem": [("dark",), (), ("nan",) * 3],
              "answer": ["", "nan", "inf", "4821 77", "中" * 999],
              "code": [""], "malformed": [None], "search": ["x"]}
    for _ in range(2000):
        turns = []
        for _ in range(rng.randrange(6)):
            kind = rng.choice(list(values))
            turns.append(Turn(Action(kind, rng.choice(values[kind]), rng.random() < 0.5),
                              rng.random() < 0.8))
        result = reward(*turns, scorer=rng.choice(SCORERS), rotation_credit=rng.random() < 0.5)
        assert set(result.parts) == {"answer", "format", "problem", "em"}
        assert all(0.0 <= value <= 1.0 for value in result.parts.values())
        assert math.isfinite(result.total) and 0.0 <= result.total <= 3.0


# --- many answers ---------------------------------------------------------------------------------


@published
def test_the_papers_mat_coding_numbers_to_the_last_digit():
    summary = score_predictions(CODING_7B, "mat-coding")
    simple, hard = summary["splits"]["simple"], summary["splits"]["hard"]

    def percent(part):
        return f"{100 * part['f1']:.2f}/{100 * part['em']:.2f}"

    assert (percent(summary), percent(simple), percent(hard)) == ("50.67/34.50", "60.10/51.43",
                                                                  "45.60/25.38")
    assert [part["n"] for part in (summary, simple, hard)] == [200, 70, 130]


@published
def test_the_papers_bamboogle_numbers_to_the_last_digit():
    summary = score_predictions(BAMBOOGLE_7B, "bamboogle")
    assert (f"{100 * summary['f1']:.2f}", f"{100 * summary['em']:.2f}") == ("60.15", "48.80")
    assert summary["n"] == 125 and summary["splits"] == {}
    # answers that are missing count as zero
    assert sum(row["pred_answer"] is None for row in load_predictions(BAMBOOGLE_7B)) == 6


@published
def test_what_the_chinese_rules_and_the_override_are_worth():
    """Without "an exact match makes F1 one" the same file is known to score 49.07, and 45.78 with
    the rules of the text-only tasks."""
    rows = load_predictions(CODING_7B)
    plain, as_qa = (np.mean([max(f1(row["pred_answer"], gold, chinese) for gold in row["gt"])
                             for row in rows]) for chinese in (True, False))
    assert (f"{100 * plain:.2f}", f"{100 * as_qa:.2f}") == ("49.07", "45.78")


@published
def test_mending_only_the_line_breaks_gives_the_known_numbers_and_repaired_a_little_more(tmp_path):
    rows = load_predictions(CODING_7B)
    for row in rows:
        row["gt"] = [gold.replace("\\n", "\n") for gold in row["gt"]]
    (tmp_path / "mended.json").write_text(json.dumps(rows))
    mended = score_predictions(tmp_path / "mended.json", "mat-coding")
    assert (f"{100 * mended['f1']:.2f}", f"{100 * mended['em']:.2f}") == ("55.68", "41.00")
    repaired = score_predictions(CODING_7B, "mat-coding", "repaired")
    assert (f"{100 * repaired['f1']:.2f}", f"{100 * repaired['em']:.2f}") == ("56.69", "41.00")


def test_summarize_by_hand():
    samples = [Sample(str(i), "?", ("x y",), None, split=split)
               for i, split in enumerate(["simple", "simple", "hard"])]
    summary = summarize(["x y", "x", None], samples)
    assert summary["n"] == 3
    assert summary["em"] == pytest.approx(1 / 3)
    assert summary["f1"] == pytest.approx((1 + 2 / 3) / 3)
    assert set(summary) == {"n", "em", "f1", "em_ci95", "f1_ci95", "splits"}
    assert summary["splits"]["simple"]["f1"] == pytest.approx((1 + 2 / 3) / 2)
    assert summary["splits"]["hard"] == {"n": 1, "em": 0.0, "f1": 0.0, "em_ci95": [0.0, 0.0],
                                         "f1_ci95": [0.0, 0.0]}
    # it is written to summary.json as it is
    assert json.loads(json.dumps(summary)) == summary
    with pytest.raises(ValueError, match="2 predictions for 3 samples"):
        summarize(["x", "y"], samples)


def test_the_interval_is_the_bootstraps():
    """The slow way, which draws items, gives the same percentiles up to the noise of 10,000
    resamples."""
    rng = np.random.default_rng(3)
    values = rng.choice([0.0, 0.4, 2 / 3, 1.0], size=80)
    slow = [values[rng.integers(0, 80, 80)].mean() for _ in range(10_000)]
    assert mean_ci95(values) == pytest.approx(np.percentile(slow, [2.5, 97.5]), abs=0.008)
    assert mean_ci95(values) == mean_ci95(values)               # seeded
    assert mean_ci95(values) != mean_ci95(values, seed=1)


def test_the_interval_has_the_width_that_theory_says():
    # MAT-Coding's 34.5: one standard error is 3.36 points
    low, high = mean_ci95([1.0] * 69 + [0.0] * 131)
    assert high - low == pytest.approx(2 * 1.96 * math.sqrt(0.345 * 0.655 / 200), rel=0.05)
    assert mean_ci95([0.5] * 7) == [0.5, 0.5]


# --- prediction files -----------------------------------------------------------------------------


def write(path: Path, rows) -> Path:
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def test_the_split_is_the_rows_own_field_or_else_its_id_or_else_its_place(tmp_path):
    row = {"gt": ["x"], "pred_answer": "x"}
    rows = [{**row, "split": "hard"}, {**row, "split": "simple"}]
    own = score_predictions(write(tmp_path / "1.json", rows), "mat-coding")
    assert {name: part["n"] for name, part in own["splits"].items()} == {"simple": 1, "hard": 1}
    # 199 rows, the seventh is missing: by place alone, as the authors' notebook counts, item 71
    # would become simple
    rows = [{"id": i, **row} for i in range(1, 201) if i != 7]
    by_id = score_predictions(write(tmp_path / "2.json", rows), "mat-coding")["splits"]
    assert (by_id["simple"]["n"], by_id["hard"]["n"]) == (69, 130)
    rows = [row] * 150
    by_place = score_predictions(write(tmp_path / "3.json", rows), "mat-search")["splits"]
    assert (by_place["simple"]["n"], by_place["hard"]["n"]) == (75, 75)


@pytest.mark.parametrize("row, words", [
    ({"id": 1, "pred_answer": "x"}, "row 2: field 'gt' is missing"),
    ({"gt": ["x"]}, "row 2: field 'pred_answer' is missing"),
    ({"gt": ["x"], "pred_answer": 3}, "row 2: field 'pred_answer' must be text or null"),
    ({"gt": [], "pred_answer": "x"}, "row 2: field 'gt' must be"),
    ({"gt": ["x"], "pred_answer": float("nan")}, "row 2: field 'pred_answer'")])
def test_a_wrong_row_is_named(tmp_path, row, words):
    path = write(tmp_path / "p.json", [{"id": 0, "gt": "x", "pred_answer": None}, row])
    with pytest.raises(DataError, match=f"p.json: {words}"):
        score_predictions(path, "mat-search")


def test_compare_by_hand(tmp_path):
    def rows(*answers):
        return [{"id": i, "gt": ["x y"], "pred_answer": answer} for i, answer in enumerate(answers)]
    a = write(tmp_path / "a.json", rows("x y", "x", None, "z"))
    b = write(tmp_path / "b.json", rows("x", "x y", "q", "z")[::-1])    # the order does not matter
    result = compare(a, b, "mat-search")
    assert (result["n"], result["changed"]) == (4, 3)
    assert result["em"]["a"] == result["em"]["b"] == 0.25
    low, high = result["f1"].pop("ci95")
    assert result["f1"] == pytest.approx({"a": 5 / 12, "b": 5 / 12, "difference": 0.0,
                                          "better": 1, "worse": 1})
    assert low < 0 < high and low == pytest.approx(-high, abs=0.05)


def test_items_without_ids_are_paired_by_their_query_and_repeated_queries_by_their_order(tmp_path):
    rows = [{"query": query, "gt": ["x"], "pred_answer": answer} for query, answer in
            (("who?", "x"), ("where?", "y"), ("who?", "z"))]
    a, b = write(tmp_path / "a.json", rows), write(tmp_path / "b.json", [rows[1], rows[0], rows[2]])
    result = compare(a, b, "bamboogle")
    assert (result["n"], result["changed"]) == (3, 0)


def test_a_paired_interval_is_narrow_where_two_files_agree(tmp_path):
    rows = [{"id": i, "gt": ["x"], "pred_answer": "x" if i % 2 else "y"} for i in range(200)]
    better = [{**row, "pred_answer": "x"} if row["id"] < 10 else row for row in rows]   # 5 more
    result = compare(write(tmp_path / "a.json", rows), write(tmp_path / "b.json", better),
                     "mat-coding")
    low, high = result["em"]["ci95"]
    assert result["changed"] == result["em"]["better"] == 5
    assert result["em"]["difference"] == pytest.approx(0.025)
    # above 0: the gain is real, though each score alone is uncertain by 0.07
    assert 0 < low < 0.025 < high < 0.06


def test_files_of_different_items_cannot_be_compared(tmp_path):
    a = write(tmp_path / "a.json", [{"id": 1, "gt": "x", "pred_answer": "x"}])
    for other in ([{"id": 2, "gt": "x", "pred_answer": "x"}],
                  [{"id": 1, "gt": "y", "pred_answer": "x"}],
                  [{"id": 1, "gt": "x", "pred_answer": "x"},
                   {"id": 7, "gt": "x", "pred_answer": "x"}]):
        with pytest.raises(DataError, match="item '[127]'"):
            compare(a, write(tmp_path / "b.json", other), "mat-coding")


@published
def test_a_published_file_compared_with_itself_changes_nothing():
    result = compare(BAMBOOGLE_7B, BAMBOOGLE_7B, "bamboogle")
    assert result["n"] == 125 and result["changed"] == 0 and result["f1"]["ci95"] == [0.0, 0.0]
