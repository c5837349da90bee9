"""Task 1: tools.parse."""

import tools

from .check import expect


def fields(turn: str):
    action = tools.parse(turn)
    return action.kind, action.value, action.error, action.strict


def test_an_answer():
    turn = "<think>a</think><answer> 42 </answer>"
    expect(lambda: fields(turn), ("answer", "42", None, True), {
        "the value keeps the blanks around it: strip the text of an answer or a search":
            ("answer", " 42 ", None, True),
        "strict is always False: ask is_strict": ("answer", "42", None, False),
        "the kind is that of the first tag; <think> is a tag and no action":
            ("think", "a", None, True),
        "the value is the whole turn: slice it by the action's span": ("answer", turn, None, True),
    }, "a thought and an answer")


def test_the_labels_of_a_problem():
    turn = "<think>a</think><problem> {'dark', 'blur'} </problem>"
    expect(lambda: fields(turn), ("problem", ("dark", "blur"), None, True), {
        "the labels are still one text: read_labels makes a tuple of them":
            ("problem", "{'dark', 'blur'}", None, True),
    }, "two problems")


def test_a_program_comes_out_of_its_fence():
    turn = "<think>a</think><code>\n```python\nx = 1\n```\n</code>"
    expect(lambda: fields(turn), ("code", "x = 1", None, True), {
        "the program still has its code fence: read_program takes it off":
            ("code", "```python\nx = 1\n```", None, True),
    }, "a program in a fence")


def test_a_fault_makes_the_turn_malformed():
    turn = "<search>a</search><answer>b</answer>"
    error = "two actions in one turn: <search> and <answer>"
    expect(lambda: fields(turn), ("malformed", None, error, False), {
        "the error of read_tags is thrown away: a turn with a fault is malformed, whatever else is "
        "in it": ("search", "a", None, False),
        "a malformed turn has no value": ("malformed", "a", error, False),
        "a malformed turn says why: keep the error of read_tags": ("malformed", None, None, False),
    }, "two actions in one turn")


def test_a_turn_without_action():
    expect(lambda: tools.parse("<think>only a thought</think>").kind, "malformed", {
        "parse raises if there is no action; it must never raise": "raised IndexError",
        "a thought is no action: without one of problem, code, search, answer the turn is "
        "malformed": "think",
    }, "a thought alone")
    expect(lambda: bool(tools.parse("").error), True, {
        "a malformed turn must say why: error is empty if there is no action": False,
    }, "an empty turn")


def test_an_empty_action():
    turn = "<think>a</think><answer>  </answer>"
    expect(lambda: fields(turn), ("malformed", None, "the tag <answer> is empty", False), {
        "an action without a value is malformed, here it passes as an empty answer":
            ("answer", "", None, True),
    }, "an empty answer")
    expect(lambda: tools.parse("<problem>{}</problem>").kind, "malformed", {
        "a problem without a label is malformed, here it passes": "problem",
    }, "an empty set of labels")


def test_lenient_action_strict_format():
    expect(lambda: fields("So: <answer>42</answer>"), ("answer", "42", None, False), {
        "strict is always True: the format reward is given for any action; ask is_strict":
            ("answer", "42", None, True),
        "a turn that is not in the strict format still acts: kind and value are read leniently":
            ("malformed", None, None, False),
    }, "an answer without a thought")
