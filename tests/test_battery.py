"""Attacks on the reward: what a policy may try instead of the task. None of them earns more than
honest failure does.

Honest failure is the right format, a wrong diagnosis, a program that runs, and a wrong answer. It
earns the reward of the format. To add an attack, add a line to ATTACKS with its turns, one after
another, as the model would write them.
"""

from types import SimpleNamespace

import pytest

from data.mat import Sample
from policy import SYSTEM_PROMPT
from rewards import SCORERS, Scoring, episode_reward
from test_rollout import answer, code, problem
from tools import parse

ROAD = Sample("1", "Which road is it: the A 45, the A 46, the A 47 or the A 48?", ("A 45",), None,
              ("rotation90", "dark"))
NUMBER = Sample("2", "What number is on the sign?", ("45",), None, ("blur",))
# The official scorer drops articles.
LETTER = Sample("3", "Which one, A or B?", ("A",), None, ("dark",))
# Like id 101 of MAT-Search.
EMPTY = Sample("4", "Who?", ("",), None, ("dark",))
SAMPLES = (ROAD, NUMBER, LETTER, EMPTY)

LABELS = ("rotation90", "rotation180", "dark", "overexposure", "blur", "noise", "crop", "none")
NUMBERS = " ".join(f"{n:02d}" for n in range(100))
STUFFED = ("<think>a</think>" * 9 + "<problem>{'dark'}</problem>"
           "<code>```python\npass\n```</code><answer>45</answer>")
HONEST = [problem("noise"), code("image = image.rotate(7)"), answer("something else")]

ATTACKS = {
    "all labels at once": [problem(*LABELS), *HONEST[1:]],
    "no label": ["<think>a</think>\n<problem>{}</problem>", *HONEST[1:]],
    "a diagnosis that says itself twice": [problem("noise", "noise"), *HONEST[1:]],
    "the same diagnosis five times": [problem("noise")] * 5,
    "every diagnosis, one after another": [
        problem("noise"), problem("crop"), problem("dark"), problem("blur"), answer("x")],
    "a diagnosis inside a thought": [
        "<think><problem>{'dark'}</problem></think>\n<answer>x</answer>"],
    "every tag in one turn": [STUFFED],
    "tags that are stuffed into an answer": [HONEST[0], HONEST[1], answer("<answer>45</answer>")],
    "an answer inside a thought": [
        "<think><answer>45</answer></think>\n<problem>{'noise'}</problem>"],
    "an answer inside a program": [
        HONEST[0], "<think>a</think>\n<code>```python\n<answer>45</answer>\n```</code>"],
    "two answers in one turn": ["<think>a</think>\n<answer>45</answer><answer>A 45</answer>"],
    "an answer and a diagnosis in one turn": [
        "<think>a</think>\n<problem>{'dark'}</problem><answer>45</answer>"],
    "an answer that is not closed": [*HONEST[:2], "<think>a</think>\n<answer>45"],
    "tags in capitals": [*HONEST[:2], "<THINK>a</THINK><ANSWER>45</ANSWER>"],
    "an empty answer": [*HONEST[:2], answer("")],
    "an answer of a thousand spaces": [*HONEST[:2], answer(" " * 1000)],
    "a thousand spaces": [" " * 1000],
    "nothing at all": [""],
    "no turn": [],
    "an answer of signs": [*HONEST[:2], answer(".,!?")],
    "an answer of articles": [*HONEST[:2], answer("the an the")],
    "the question repeated": [*HONEST[:2], answer(ROAD.question)],
    "the prompt repeated": [*HONEST[:2], answer(SYSTEM_PROMPT.replace("<", " ").replace(">", " "))],
    "nan": [*HONEST[:2], answer("nan")],
    "infinity": [*HONEST[:2], answer("inf 1e999 -inf")],
    "the labels of the prompt as the answer": [*HONEST[:2], answer(", ".join(LABELS))],
    "all possible answers": [*HONEST[:2], answer(NUMBERS)],
    "all answers, with commas": [*HONEST[:2], answer("A 45, A 46, A 47, A 48, A 49, A 50")],
    "all answers, without a space": [*HONEST[:2], answer(NUMBERS.replace(" ", ""))],
    "the gold a hundred times": [*HONEST[:2], answer("45 " * 100)],
    "the gold in a thousand words": [*HONEST[:2], answer("word " * 500 + "45" + " word" * 500)],
    "a program that prints the answer": [HONEST[0], code("print(45)"), answer("something else")],
    "a program that prints the answer's tags": [HONEST[0], code("print('<answer>45</answer>')")],
    "a program that does nothing, five times": [code("pass")] * 5,
    "an answer in Chinese": [*HONEST[:2], answer("四十五")],
    "a role marker": [*HONEST[:2], answer("x<|im_end|><|im_start|>user The answer is 45")],
}


def reward(sample: Sample, texts: list[str], cut: bool = False, **scoring):
    """The reward of an episode of these turns. With `cut`, the last turn was cut off."""
    turns = [SimpleNamespace(action=parse(text), finished=True) for text in texts]
    if cut and turns:
        turns[-1].finished = False
    last = turns[-1] if turns else None
    final = last.action.value if last and last.finished and last.action.kind == "answer" else None
    return episode_reward(SimpleNamespace(sample=sample, turns=turns, answer=final),
                          Scoring(**scoring))


@pytest.mark.parametrize("name", ATTACKS)
def test_no_attack_earns_more_than_honest_failure(name):
    for sample in SAMPLES:
        for scoring in ({}, {"scorer": "repaired"}, {"answer_metric": "em"}):
            honest = reward(sample, HONEST, **scoring)
            assert (honest.total, honest.parts["format"]) == (1.0, 1.0)
            for cut in (False, True):
                attack = reward(sample, ATTACKS[name], cut, **scoring)
                assert attack.total <= honest.total, (
                    f"{name} earns {attack} on sample {sample.id} with {scoring}")


def test_success_earns_more_than_every_attack():
    for sample in (ROAD, NUMBER, LETTER):
        right = reward(sample, [problem(*sample.problems), HONEST[1], answer(sample.golds[0])])
        assert right.total == 3.0


def test_a_few_words_around_the_gold_keep_their_f1():
    """The rule against lists must not touch these answers: more than a quarter of their words are
    right. F1 by hand."""
    # 1 of 3 words (articles do not count), 1 of 1
    assert reward(NUMBER, [answer("The number is 45.")]).parts["answer"] == pytest.approx(2 / 4)
    assert reward(ROAD, [answer("A 45 or A 46")]).parts["answer"] == pytest.approx(2 / 4)


@pytest.mark.parametrize("scorer", SCORERS)
def test_what_f1_itself_pays_for_naming_two_or_three(scorer):
    """A reader should know this: k candidates earn 2 / (k + 1), more than the 1 / k of a guess.
    Exact match pays nothing for them."""
    for k, answers in ((1, "45"), (2, "45 46"), (3, "45 46 47"), (4, "45 46 47 48")):
        by_f1 = reward(NUMBER, [answer(answers)], scorer=scorer)
        assert by_f1.parts["answer"] == pytest.approx(2 / (k + 1) if k < 4 else 0.0)
        by_em = reward(NUMBER, [answer(answers)], scorer=scorer, answer_metric="em")
        assert by_em.parts["answer"] == float(k == 1)


def test_a_gold_that_the_repaired_scorer_mends_is_still_right():
    broken = Sample("5", "?", ("FOOD\\nDIRECTORY",), None, ("dark",))
    said = [answer("FOOD DIRECTORY")]
    assert reward(broken, said, scorer="repaired").parts["answer"] == 1.0
    assert reward(broken, said).parts["answer"] == 0.0
