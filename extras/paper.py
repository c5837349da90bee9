"""The paper's protocol (--protocol paper): one growing user message, training on single steps.

The authors trained their checkpoints and asked them in this way. You need it to ask the checkpoints
as they were asked, and to see how it differs from an episode. rollout.py keeps one conversation:
turns and observations are appended, and every image stays in view. Here every turn starts anew with
*one* user message

    image as it is now, system prompt, <query> question </query>, what the model wrote so far,
    <tips> or <information>

and a program's image replaces the one before. In training there is one turn: the teacher's turns
that are stored with the row stand where the model's own would be (`mat.StepSample`), no tool runs,
and `step_reward` pays the turn. The text of earlier turns is tokenised again with every message.
The tokens of the newest turn are the sampled ones, and training, which has no other turn, keeps all
laws of the README. Nothing is cached between turns, and the ids, mask, log-probs and images of an
Episode are those of its last message and turn.

The defects of the released code, B1 to B17. Each is absent here, or an option that is named:

    B1   a random completion's text becomes the teacher's before its reward
         absent: the sampled text is rewarded
    B2   a missing module, which nothing imports: absent
    B3   a prompt over 2,048 tokens is cut after it was used
         absent: no prompt is cut
    B4   images change places in batches: absent, placeholders are counted
    B5   a number anywhere in the text makes a search right: absent
    B6   sampled at one temperature, trained at another: absent
    B7   a schedule that is never finished, no resuming
         absent: the learning rate falls to zero at --steps
    B8   a sample without an answer vanishes and shifts the splits
         absent: it counts as no answer
    B9   an answer of several lines scores the previous sample's: absent
    B10  the problem of the previous sample decides; an empty one crashes
         absent: the episode's own, or none
    B11  programs run inside the evaluation's process: absent, tools.Sandbox runs them
    B12  all programs share one image file, JPEG in, JPEG out
         absent: each has a directory of its own
    B13  file names are put into the program's text
         absent: the files have the names that the program uses
    B14  the model does not see why its program failed
         --code-errors hidden; by default it sees why
    B15  an opening tag where </query> belongs: absent, the tag is closed
    B16  a test of a constant in the scoring: absent
    B17  a search repeats the last query or ends the sample silently
         absent: the reply says what went wrong
    --   the crop box of the question replaces the model's
         --crop-box question, the default; model leaves the program's own

A leaf: you may delete this file, and --protocol paper then says that it is missing. Left out: the
authors' own system prompt; give it by --system-prompt FILE.
"""

import dataclasses
import re

import torch
from PIL import Image

from data.mat import Sample, StepSample
from extras.engine import Rows
from policy import ImageInput, Policy
from rewards import (
    Reward, Scoring, episode_reward, f1, lexical_similarity, problem_reward, query_reward,
    score_answer)
from rollout import (
    DEFAULT_LIMITS, REPLY_FAILED, Episode, Limits, Turn, add_turn, decode_turn, information,
    observe)
from tools import Action, Tools

TIPS = "<tips> {} </tips>"
TIP_CROP = "Write code that cuts the region named in the question out of the image."
TIP_NONE = "The image needs no repair. Answer the question."
TIP_REPAIR = "Write code that repairs the image."

NUMBER = r"(\d+(?:\.\d+)?)"
BOX = re.compile(r"\[\s*" + r"\s*,\s*".join([NUMBER] * 4) + r"\s*\]")       # [366, 723, 506, 851]
SLICE = re.compile(r"\[[^\[\]:,]*:[^\[\]:,]*,[^\[\]:,]*:[^\[\]:,]*\]")      # [y1:y2, x1:x2]


# --- the message ----------------------------------------------------------------------------------


def message(episode: Episode, system_prompt: str) -> str:
    """The text of the user message: a function of the sample and of what was written so far."""
    sample = episode.sample
    parts = [system_prompt, f"<query> {sample.question} </query>"]
    parts += [sample.context] if isinstance(sample, StepSample) else []
    for turn in episode.turns:
        parts += [turn.text, turn.observation]
    return "\n".join(part for part in parts if part)


def single_message_ids(policy: Policy, text: str, images: list[ImageInput]) -> list[int]:
    """One user message that holds everything, and the opening of the model's turn.

    If the checkpoint's chat template puts a system message of its own first, as Qwen2.5-VL's does,
    so does this function: the authors' prompts therefore had it, too.
    """
    first = []
    if policy.tokenizer.chat_template:
        empty = [{"role": "user", "content": ""}]
        rendered = policy.tokenizer.apply_chat_template(empty, tokenize=False)
        first = re.findall(r"<\|im_start\|>system\n(.*?)<\|im_end\|>", rendered, re.DOTALL)
    system = [token for words in first for token in policy.message_ids("system", words)]
    return [*system, *policy.message_ids("user", text, images), *policy.opening_ids()]


def restart(policy: Policy, episode: Episode, inputs: dict[int, ImageInput],
            limits: Limits) -> bool:
    """Makes the next message the episode's ids. False, and the episode ends, if it does not fit.

    inputs: the processed images by id of the image, so that episodes that look at one image share
    it. All images stay alive meanwhile, so no id is given twice.
    """
    view, images = episode.view, []
    if view is not None:
        if id(view) not in inputs:
            inputs[id(view)] = policy.image_input(view)
        images = [inputs[id(view)]]
    ids = single_message_ids(policy, message(episode, policy.system_prompt), images)
    if episode.turns and len(ids) >= limits.max_length:
        episode.ended = "length"
        return False
    episode.ids, episode.mask, episode.logp, episode.images = [], [], [], []
    episode.append(ids, mask=0, images=images, holders=sum(map(policy.image_tokens, images)))
    return True


# --- the environment ------------------------------------------------------------------------------


def question_box(question: str, size: tuple[int, int]) -> tuple[int, int, int, int] | None:
    """The box in a crop question, (x1, y1, x2, y2) in pixels; None without one.

    size: (width, height) of the image. The question has thousandths of the sides.

    >>> question_box("Read the text within the [366, 723, 506, 851] of the image.", (1000, 500))
    (366, 361, 506, 425)
    """
    found = BOX.search(question)
    if not found:
        return None
    x1, y1, x2, y2 = (float(number) / 1000 for number in found.groups())
    return int(x1 * size[0]), int(y1 * size[1]), int(x2 * size[0]), int(y2 * size[1])


def with_question_box(episode: Episode) -> Action:
    """The episode's last program with the question's box in place of every slice [a:b, c:d].

    That is so if the episode named the problem crop last; otherwise the program stays as written.
    (The released evaluation does so: its crops are never the model's own.)
    """
    action = episode.turns[-1].action
    stated = next((t.action.value for t in reversed(episode.turns)
                   if t.action.kind == "problem"), ())
    box = None
    if episode.view and "crop" in stated:
        box = question_box(episode.sample.question, episode.view.size)
    if box is None:
        return action
    x1, y1, x2, y2 = box
    return dataclasses.replace(action, value=SLICE.sub(f"[{y1}:{y2}, {x1}:{x2}]", action.value))


def respond(turn: Turn, code_errors: str) -> str:
    """What the next message has behind the turn; "" for nothing."""
    action, execution = turn.action, turn.execution
    if action.kind == "problem" and "crop" in action.value:
        return TIPS.format(TIP_CROP)
    if action.kind == "problem":
        return TIPS.format(TIP_NONE if set(action.value) == {"none"} else TIP_REPAIR)
    if action.kind == "code" and execution.image is None and code_errors == "shown":
        return TIPS.format(REPLY_FAILED.format(error=execution.error))
    if action.kind != "search":
        return ""
    found = turn.found
    if isinstance(found, list):         # the authors give a web page's snippet without its title
        found = [dataclasses.replace(p, title="") if p.url else p for p in found]
    return information(found)


def act(episodes: list[Episode], tools: Tools, crop_box: str, code_errors: str) -> None:
    """Carries out the last turns' actions. A program's image replaces the episode's.

    The reply is kept with the turn. With the question's box, `turn.action.value` is the program
    that ran ("ran" in episodes.jsonl), and `turn.text` what was written.
    """
    for episode in episodes:
        if crop_box == "question" and episode.turns[-1].action.kind == "code":
            episode.turns[-1].action = with_question_box(episode)
    for episode, (_, view) in zip(episodes, observe(episodes, tools)):
        episode.turns[-1].observation = respond(episode.turns[-1], code_errors)
        episode.view = view or episode.view


# --- whole episodes -------------------------------------------------------------------------------


def first_view(sample: Sample, step_side: int) -> Image.Image | None:
    """The sample's image. A single step's is stretched to a square, as the authors' trainer does.
    """
    if sample.image_path is None:
        return None
    view = sample.open_image()
    if step_side and isinstance(sample, StepSample):
        view = view.resize((step_side, step_side))
    return view


def has_ended(episode: Episode, limits: Limits) -> bool:
    """After a turn: whether it was the last one; `episode.ended` says why."""
    turns = 1 if isinstance(episode.sample, StepSample) else limits.max_turns
    if not episode.turns[-1].finished:
        episode.ended = "cut"
    elif episode.answer is not None:
        episode.ended = "answer"
    elif len(episode.turns) == turns:
        episode.ended = "turns"
    return bool(episode.ended)


@torch.inference_mode()
def rollout(policy: Policy, samples: list[Sample], *, group_size: int = 1,
            limits: Limits = DEFAULT_LIMITS, tools: Tools, generator: torch.Generator,
            crop_box: str = "question", code_errors: str = "shown",
            step_side: int = 720) -> list[Episode]:
    """`group_size` neighbouring episodes for each sample, as rollout.rollout gives them.

    A StepSample has one turn, another sample at most limits.max_turns. crop_box "question" cuts
    crops at the question's box, "model" where the program says; code_errors "shown" or "hidden";
    step_side: pixels of the square that a step's image is stretched to, 0 for none.
    """
    inputs = {}
    views = [first_view(sample, step_side) for sample in samples]
    episodes = [Episode(sample, view=view) for sample, view in zip(samples, views)
                for _ in range(group_size)]
    live, alike = episodes, group_size      # that many neighbours begin with the same message
    while live := [episode for episode in live if restart(policy, episode, inputs, limits)]:
        rows = Rows(policy, limits.max_new_tokens)
        rows.feed(live[::alike])
        if alike > 1:
            rows.repeat(alike)
        for episode, (ids, logp) in zip(live, decode_turn(policy, rows, limits, generator)):
            add_turn(policy, episode, ids, logp)
        live, alike = [episode for episode in live if not has_ended(episode, limits)], 1
        act(live, tools, crop_box, code_errors)
    return episodes


# --- the reward of one step -----------------------------------------------------------------------

CODE_ACCURACY = 0.9             # for any program, because no program runs in training


def step_accuracy(action, step: StepSample, scorer: str = "official",
                  similarity=lexical_similarity) -> float:
    """The paper's R_acc as the released trainer computes it, in [0, 1]. An action of another kind
    than the teacher's is worth 0.

    answer   official: set F1 with the rules for English and without the evaluation's "exact match
             makes F1 one", so that a right "A" (an article) is worth 0 and a repeated word costs;
             repaired: the F1 of `score_answer`
    code     0.9, whatever the program does
    problem  `problem_reward`, with half credit for the rotation of a double
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


def step_reward(episode, scoring: Scoring | None = None, similarity=lexical_similarity) -> Reward:
    """The reward of an episode of one turn for a StepSample: accuracy plus format, at most 2.

    The accuracy has the weight "answer", the format the weight "format". The parts are "accuracy"
    and "format"; for an answer step also "answer" (the same accuracy) and "em", for a problem step
    also "problem". The format counts if the turn is strictly a thought and an action of the kind
    that the row asks for (MAT-Search: a search or an answer, either passes).

    Three quirks of the released code are absent. A text without any tag earns nothing (there: 0.9
    on a code row, its F1 on an answer row). A turn that says a tag twice or was cut off earns
    nothing. An answer may have several lines. No text is replaced by the teacher's before it is
    judged (B1), and no number is looked for in the whole text (B5).
    """
    scoring, step, turn = scoring or Scoring(), episode.sample, episode.turns[-1]
    accuracy = (step_accuracy(turn.action, step, scoring.scorer, similarity) if turn.finished
                else 0.0)
    strict = float(turn.finished and turn.action.strict and turn.action.kind in step.formats)
    parts = {"accuracy": accuracy, "format": strict}
    if step.kind == "answer":
        em = score_answer(episode.answer, step.golds, scoring.scorer, chinese=False)[1]
        parts |= {"answer": accuracy, "em": em}
    if step.kind == "problem":
        parts["problem"] = accuracy
    weight = scoring.weight
    return Reward(weight.get("answer", 1.0) * accuracy + weight.get("format", 1.0) * strict, parts)


def reward(episode, scoring: Scoring | None = None, similarity=lexical_similarity) -> Reward:
    """`step_reward` of a training step, `episode_reward` of a whole episode, as in evaluation."""
    if isinstance(episode.sample, StepSample):
        return step_reward(episode, scoring, similarity)
    return episode_reward(episode, scoring, similarity=similarity)
