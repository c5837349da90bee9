"""extras/paper.py: the growing message, single steps and their rewards; and real rows, played in
both protocols."""

import dataclasses
import re
from types import SimpleNamespace

import pytest
import torch

import arft
import rollout as rollout_module
from conftest import ROOT, parts_of
from data import mat
from data.mat import StepSample
from extras import options, paper
from extras.paper import step_reward
from grpo import episode_logp
from rewards import Scoring, lexical_similarity
from rollout import Limits, collate
from test_rollout import answer, code, problem
from tools import Tools, parse

MAT_SAMPLE = ROOT.parent / "shared" / "mat-sample" / "MAT"
real_files = pytest.mark.skipif(not MAT_SAMPLE.exists(),
                                reason="the MAT sample is not beside this checkout")


def play(monkeypatch, policy, *turns):
    """Every row writes the same given turns, one after another. A turn that ends in "..." is cut
    off."""
    left = list(turns)

    def scripted(policy, rows, limits, generator):
        text = left.pop(0)
        end = [] if text.endswith("...") else [policy.im_end]
        ids = policy.text_ids(text.removesuffix("...")) + end
        return [(list(ids), [-1.0] * len(ids)) for _ in range(rows.count)]
    for module in (rollout_module, paper):
        monkeypatch.setattr(module, "decode_turn", scripted)


def attempt(policy, samples, tools=None, limits=None, **more):
    return paper.rollout(policy, samples, limits=limits or Limits(max_new_tokens=32),
                         tools=tools or Tools(), generator=torch.Generator().manual_seed(0), **more)


def evaluated(policy, sample, config, tools=None):
    """One held-out sample, evaluated greedily as a run does it: (summary, episode, reward)."""
    parts = parts_of(dataclasses.replace(config, eval_sampled="off", rollout_batch=1, eval_batch=1),
                     policy, tools)
    true, played = parts.rollout, []

    def rollout(*arguments, **more):
        played.extend(true(*arguments, **more))
        return played
    parts.rollout = rollout
    arft.evaluate(policy, [sample], config, parts, "before")
    episode, = played
    return parts.run.summary["before"], episode, parts.reward(episode)


def search(query):
    return f"<think>I do not know.</think>\n<search>{query}</search>"


# --- the message that grows -----------------------------------------------------------------------


def test_every_turn_is_one_message_with_one_image_the_newest(policy, samples, tools, monkeypatch):
    turns = [problem("rotation180"), code("image = image.rotate(180)"), answer("1")]
    play(monkeypatch, policy, *turns)
    sample, = samples(("rotation180",))
    episode, = attempt(policy, [sample], tools)
    tip = paper.TIPS.format(paper.TIP_REPAIR)
    assert [t.observation for t in episode.turns] == [tip, "", None]
    said = policy.tokenizer.decode([i for i in episode.ids if i != policy.image_pad])
    wanted = "\n".join([policy.system_prompt, f"<query> {sample.question} </query>", turns[0], tip,
                        turns[1]])
    assert said == (f"<|im_start|>user\n<|vision_start|><|vision_end|>{wanted}<|im_end|>\n"
                    f"<|im_start|>assistant\n{turns[2]}<|im_end|>")
    assert len(episode.images) == 1 and episode.ended == "answer" and episode.answer == "1"
    shown = policy.image_input(episode.turns[1].execution.image)
    assert torch.equal(episode.images[0].patches, shown.patches), "the image was not replaced"
    assert sum(episode.mask) == episode.turns[-1].stop - episode.turns[-1].start


def test_the_chat_template_s_own_first_words_stay(policy, monkeypatch):
    template = ("{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% for m in messages %}"
                "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}")
    monkeypatch.setattr(policy.tokenizer, "chat_template", template)
    said = policy.tokenizer.decode(paper.single_message_ids(policy, "Hello", []))
    assert said == ("<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n"
                    "<|im_start|>assistant\n")


@pytest.mark.parametrize("labels, tip", [
    (("crop",), paper.TIP_CROP), (("none",), paper.TIP_NONE),
    (("dark", "blur"), paper.TIP_REPAIR)])
def test_the_tip_depends_on_the_problem(policy, samples, monkeypatch, labels, tip):
    play(monkeypatch, policy, problem(*labels), answer("1"))
    episode, = attempt(policy, samples(("dark",)))
    assert episode.turns[0].observation == f"<tips> {tip} </tips>"


def test_every_way_to_end(policy, samples, monkeypatch):
    sample = samples(("dark",))
    play(monkeypatch, policy, *["no tags"] * 5)
    lost, = attempt(policy, sample)
    # B8: the sample stays, without an answer
    assert lost.ended == "turns" and len(lost.turns) == 5 and lost.answer is None
    play(monkeypatch, policy, answer("1") + "...")
    assert [(e.ended, e.answer) for e in attempt(policy, sample)] == [("cut", None)]
    play(monkeypatch, policy, "word " * 40, "word " * 40)
    text = policy.system_prompt + sample[0].question
    prompt = len(paper.single_message_ids(policy, text, [])) + 4
    full, = attempt(policy, sample, limits=Limits(max_length=prompt + 30))
    assert full.ended == "length" and len(full.turns) == 1 and full.images


def test_an_answer_of_several_lines_is_an_answer(policy, samples, monkeypatch):
    play(monkeypatch, policy, answer("FOOD\nDIRECTORY"))        # B9
    assert attempt(policy, samples(("dark",)))[0].answer == "FOOD\nDIRECTORY"


@pytest.mark.parametrize("code_errors, shown", [("shown", True), ("hidden", False)])
def test_whether_the_model_sees_why_its_program_failed_is_an_option(policy, samples, tools,
                                                                    monkeypatch, code_errors,
                                                                    shown):
    play(monkeypatch, policy, code("raise ValueError('no')"), answer("1"))      # B14
    episode, = attempt(policy, samples(("dark",)), tools, code_errors=code_errors)
    assert ("ValueError" in episode.turns[0].observation) == shown
    assert bool(episode.turns[0].observation) == shown


def test_a_search_without_a_backend_is_answered(policy, samples, monkeypatch):
    play(monkeypatch, policy, search("painter"), answer("1"))       # B17
    episode, = attempt(policy, samples(("dark",)))
    assert episode.turns[0].observation == rollout_module.REPLY_NO_SEARCH


# --- the box of a crop question -------------------------------------------------------------------


CROP = code("import numpy", "image = Image.fromarray(numpy.asarray(image)[3:9, 2:40])")


@pytest.mark.parametrize("crop_box, size", [("question", (56, 28)), ("model", (38, 6))])
def test_where_crops_are_cut_is_an_option(policy, samples, tools, monkeypatch, crop_box, size):
    sample = dataclasses.replace(*samples(("none",)),
                                 question="Read the text in [0, 250, 500, 500].")
    assert sample.open_image().size == (112, 112)
    play(monkeypatch, policy, problem("crop"), CROP, answer("1"))
    episode, = attempt(policy, [sample], tools, crop_box=crop_box)
    assert episode.view.size == size
    assert "[3:9, 2:40]" in episode.turns[1].text, "what the model wrote was changed"
    assert ("[3:9, 2:40]" in episode.turns[1].action.value) == (crop_box == "model")


@pytest.mark.parametrize("first, question", [("no problem named", "Read [0, 250, 500, 500]."),
                                             (problem("dark"), "Read [0, 250, 500, 500]."),
                                             (problem("crop"), "Read the number.")])
def test_without_a_crop_problem_or_a_box_the_program_runs_as_written(policy, samples, tools,
                                                                     monkeypatch, first, question):
    sample = dataclasses.replace(*samples(("none",)), question=question)        # B10
    play(monkeypatch, policy, first, CROP, answer("1"))
    assert attempt(policy, [sample], tools)[0].view.size == (38, 6)


# --- single steps ---------------------------------------------------------------------------------


@real_files
def test_the_published_rows_as_single_steps():
    steps = mat.load_steps("mat-coding", MAT_SAMPLE)
    assert [s.id for s in steps] == [
        "rotation180_1-problem-1", "rotation180_1-code-2", "rotation180_1-answer-3",
        "none_2-problem-4", "none_2-answer-5"]
    assert [(s.problems, s.golds) for s in steps] == [
        (("rotation180",), ()), ((), ()), ((), ("1 Can (473mL)",)),
        (("none",), ()), ((), ("Uncommon Valor",))]
    first, second, third = (s.context for s in steps[:3])
    assert first == "" and second.endswith("<problem> {'rotation180'} </problem>")
    assert third.startswith(second) and third.endswith("</code>")
    assert all(s.formats == (s.kind,) and s.question.endswith("?") and s.split == "train"
               for s in steps)
    query, = mat.load_steps("mat-search", MAT_SAMPLE)
    gold = "Where is the painting The Milkmaid by Vermeer housed?"
    assert (query.kind, query.queries) == ("search", (gold,))
    assert query.formats == ("search", "answer") and query.context == ""
    assert query.image_path.name == "23.jpg"


def test_the_context_of_a_search_row_stands_behind_its_query():
    row = {"image_path": "1.jpg", "problem": "<query> Who? </query> <search> it </search>",
           "solution": "<answer> I </answer>"}
    step = mat.read_step(row, "FILE: row 1")
    assert (step.question, step.context) == ("Who?", "<search> it </search>")


def test_text_only_tasks_have_no_steps(tmp_path):
    with pytest.raises(mat.DataError, match="no single steps"):
        mat.load_steps("hotpotqa", tmp_path)


@real_files
def test_a_step_is_one_turn_on_the_stored_context_and_a_square_image(policy):
    steps = mat.load_steps("mat-coding", MAT_SAMPLE)
    episodes = attempt(policy, steps, group_size=2)
    assert [e.sample for e in episodes] == [s for s in steps for _ in range(2)]
    assert all(len(e.turns) == 1 and e.view.size == (720, 720) and e.turns[0].execution is None
               for e in episodes)
    assert attempt(policy, steps[:1], step_side=0)[0].view.size == (1500, 1500)
    text = paper.message(episodes[4], "SYSTEM")
    question = steps[2].question
    assert text.startswith(f"SYSTEM\n<query> {question} </query>\n<think> The image appears")
    one, other = (e.ids[:e.turns[0].start] for e in episodes[4:6])
    assert one == other
    batch = collate(policy, episodes)
    with torch.no_grad():
        logp, _ = episode_logp(policy, batch)
    assert ((logp - batch.logp_old) * batch.mask).abs().max() < 1e-4, (
        "what was sampled is not what is scored")
    assert episodes[0].ids != episodes[1].ids


# --- the rewards of single steps, by hand ---------------------------------------------------------


def reward(kind, turn, finished=True, formats=None, scorer="official", **golds):
    """(accuracy, format) of a turn for a row of this kind."""
    step = StepSample("1", "?", **{"golds": ()} | golds, image_path=None, kind=kind,
                      formats=formats or (kind,))
    action = parse(turn)
    said = action.value if finished and action.kind == "answer" else None
    last = SimpleNamespace(action=action, finished=finished)
    found = step_reward(SimpleNamespace(sample=step, turns=[last], answer=said),
                        Scoring(scorer=scorer))
    assert found.total == pytest.approx(found.parts["accuracy"] + found.parts["format"])
    return found.parts["accuracy"], found.parts["format"]


@pytest.mark.parametrize("turn, accuracy, form", [
    (problem("rotation90", "dark"), 1, 1), (problem("dark", "rotation90"), 1, 1),
    (problem("rotation90"), 0.5, 1), (problem("dark"), 0, 1), (problem("rotation180"), 0, 1),
    ("<problem>{'dark', 'rotation90'}</problem>", 1, 0),        # no thought
    (answer("dark"), 0, 0), (code(), 0, 0), ("rotation90, dark", 0, 0)])
def test_the_reward_of_a_problem_row(turn, accuracy, form):
    assert reward("problem", turn, problems=("rotation90", "dark")) == (accuracy, form)


def test_half_credit_is_only_for_the_rotation_of_a_double():
    assert reward("problem", problem("rotation180"), problems=("rotation180",)) == (1, 1)
    assert reward("problem", problem("dark"), problems=("dark", "blur")) == (0, 1)


@pytest.mark.parametrize("turn, accuracy, form", [
    (code("image = image.rotate(90)"), 0.9, 1), (code("this is no Python"), 0.9, 1),
    ("<code>print(1)</code>", 0.9, 0), (answer("x"), 0, 0), (problem("dark"), 0, 0),
    ("no tag at all", 0, 0)])
def test_the_reward_of_a_code_row(turn, accuracy, form):
    assert reward("code", turn) == (accuracy, form)


@pytest.mark.parametrize("said, gold, accuracy", [
    ("1 can (473 ml)", "1 can of 473", 2 * 3 / (4 + 4)),        # 3 words shared, 4 words each
    ("The 1 Can (473ml)!", "1 can (473mL)", 1), ("something else", "1 can", 0)])
def test_the_reward_of_an_answer_row(said, gold, accuracy):
    assert reward("answer", answer(said), golds=(gold,)) == (pytest.approx(accuracy), 1)


def test_the_answer_s_f1_is_as_coded_unless_repaired():
    # an article is no word
    assert reward("answer", answer("A"), golds=("A",)) == (0, 1)
    assert reward("answer", answer("A"), golds=("A",), scorer="repaired") == (1, 1)
    assert reward("answer", answer("New York New York"), golds=("New York New York",)) == (0.5, 1)
    # one word each, and not the same
    assert reward("answer", answer("发票 号码"), golds=("发票号码",)) == (0, 1)
    assert reward("answer", answer("b"), golds=("a b", "c")) == (1, 1)
    assert reward("answer", search("b"), golds=("b",)) == (0, 0)
    # there: the whole text counts
    assert reward("answer", "b", golds=("b",)) == (0, 0)


def test_the_reward_of_a_search_row():
    gold, formats = "museum of the Milkmaid by Vermeer", ("search", "answer")
    row = {"queries": (gold,), "formats": formats}
    near = pytest.approx(3 / 15 ** 0.5)
    assert reward("search", search("The Milkmaid Vermeer museum"), **row) == (near, 1)
    # 2 / sqrt(4 * 5) is below 0.5
    assert reward("search", search("a museum of modern art"), **row) == (0, 1)
    assert lexical_similarity("a museum of modern art", gold) == pytest.approx(2 / 20 ** 0.5)
    # in MAT-Search either kind has the right format
    assert reward("search", answer("Vermeer"), **row) == (0, 1)
    assert reward("answer", search("Vermeer"), golds=("Vermeer",), formats=formats) == (0, 1)
    assert lexical_similarity("", gold) == lexical_similarity("the", "a") == 0
    row["queries"] = ("of by at in on for four more",)
    # 2 / sqrt(2 * 8) is not below 0.5: it counts
    assert reward("search", search("four more"), **row) == (0.5, 1)


@pytest.mark.parametrize("kind, turn", [
    ("answer", answer("b")), ("code", code()), ("problem", problem("dark"))])
def test_a_turn_that_was_cut_off_or_says_a_tag_twice_earns_nothing(kind, turn):
    gold = {"golds": ("b",), "problems": ("dark",)}
    assert reward(kind, turn, **gold)[1] == 1
    assert reward(kind, turn, finished=False, **gold) == (0, 0)
    assert reward(kind, turn + turn, **gold) == (0, 0)


def test_parts_that_a_row_does_not_have_are_absent():
    step = StepSample("1", "?", (), None, ("dark",), kind="problem", formats=("problem",))
    turn = SimpleNamespace(action=parse(problem("dark")), finished=True)
    found = step_reward(SimpleNamespace(sample=step, turns=[turn], answer=None))
    assert found.parts == {"accuracy": 1.0, "format": 1.0, "problem": 1.0}
    other = dataclasses.replace(step, golds=("b",), problems=(), kind="answer")
    found = step_reward(SimpleNamespace(sample=other, turns=[turn], answer=None))
    assert found.parts == {"accuracy": 0.0, "format": 1.0, "answer": 0.0, "em": 0.0}
    weighted = step_reward(SimpleNamespace(sample=step, turns=[turn], answer=None),
                           Scoring(weight={"answer": 3, "format": 0.5}))
    assert weighted.total == 3.5


# --- real rows through the whole environment ------------------------------------------------------


@real_files
@pytest.mark.parametrize("protocol, images", [("episodes", 2), ("paper", 1)])
def test_given_turns_on_a_real_row_get_the_expected_answer_image_and_score(
        policy, tools, monkeypatch, tmp_path, protocol, images):
    sample = mat.load("mat-coding", MAT_SAMPLE, "test")[0]
    play(monkeypatch, policy, problem("rotation180"), code("image = image.rotate(180)"),
         answer("1 Can (473mL)."))
    config = arft.Config(out=str(tmp_path / "run"), protocol=protocol, max_new_tokens=96)
    summary, episode, earned = evaluated(policy, sample, config, tools)
    assert (summary["em"], summary["f1"], summary["repaired"]["em"]) == (1.0, 1.0, 1.0)
    assert summary["splits"]["simple"]["n"] == 1
    assert summary["by_problem"]["rotation180"]["em"] == 1.0
    assert episode.answer == "1 Can (473mL)." and len(episode.images) == images
    turned = sample.open_image().rotate(180)
    assert episode.view.size == turned.size == (1500, 1500)
    near, seen = (torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).float()
                  for image in (turned, episode.view))
    assert (near - seen).abs().mean() < 6       # the program wrote a JPEG: nearly the same picture
    assert earned.total == 3.0


@real_files
@pytest.mark.parametrize("protocol, size", [("episodes", (38, 6)), ("paper", None)])
def test_a_real_crop_question_is_cut_at_its_own_box_in_the_papers_way_only(
        policy, tools, monkeypatch, tmp_path, protocol, size):
    sample = mat.load("mat-coding", MAT_SAMPLE, "test")[3]
    width, height = sample.open_image().size
    size = size or (int(.506 * width) - int(.366 * width), int(.851 * height) - int(.723 * height))
    play(monkeypatch, policy, problem("crop"), CROP, answer("SINCE 1994"))
    config = arft.Config(out=str(tmp_path / "run"), protocol=protocol, max_new_tokens=96,
                         max_length=10_000)
    summary, episode, _ = evaluated(policy, sample, config, tools)
    assert summary["em"] == 1.0 and episode.view.size == size and episode.sample.split == "hard"


def test_each_known_defect_is_named_once():
    """B1 to B17, each with "absent" or the option that brings it."""
    listed = paper.__doc__.split("\n    --   ")[0]
    rows = re.findall(r"^    (B\d+) (.*(?:\n         .*)*)", listed, re.MULTILINE)
    assert [name for name, _ in rows] == [f"B{i}" for i in range(1, 18)]
    assert [name for name, text in rows if "absent" not in text] == ["B14"]
    assert "--code-errors hidden" in dict(rows)["B14"]
    config = options.parse(arft.Config, [])
    assert (config.crop_box, config.code_errors, config.step_side) == ("question", "shown", 720)
