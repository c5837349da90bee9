"""Makes data/tiny-search: the same small model as data/tiny, taught to search carelessly.

What it teaches: a cold start for the other tool. The demonstrator knows the form: a thought, a
query, a glance at what was found, an answer copied from it. He rarely searches well. Most often he
asks for "the ship" without its number, and whoever needs a second search mostly stops after the
first. The world is drawn anew for every demonstration, so that no fact can be learned by heart: all
that helps is to read the sign and to copy.

    python -m extras.cold_start_search     # writes data/tiny-search

Read next: make_tiny.py, which holds the machinery; data/mini_search.py, which draws the world.
"""

import json
from pathlib import Path

import numpy as np
import torch

import rollout
from data import mini, mini_search
from extras.cold_start import BOTCHED, cold_start, grow, make_policy, options_of
from data.mat import Sample
from data.mini_search import PEOPLE, QUESTIONS, TOWNS
from extras.weights import load
from policy import Policy
from rollout import Episode
from tools import Passage, parse

HOME = Path(__file__).parent.parent / "data" / "tiny-search"
SYSTEM = "Search, then answer."
NUMBERS = mini.texts("train")
# Names and tags keep the space before them and signs stand alone: a name is one id wherever it
# stands.
SEARCH_WORDS = (r"[^\S\r\n]?[\r\n]*</?[a-z]+>|\p{N}|[^\S\r\n]?[.:?'\",]+|[\r\n]*[^\S\r\n]?[^\s\p{N}<'\",.:?]+|<|\s*[\r\n]+|\s+")
TRUTH, LAZY = 0.33, 0.50                # how often he asks for the number, and for "the ship"
LAZY_QUERY, OTHER_QUERIES = "the ship", ("this ship", "a ship", "which ship", "captain of the ship")
# of two searches: how often he does the second, and does it without a name
GO_ON, EMPTY = 0.35, 0.12
THOUGHTS = {"search": ("I look it up.", "This needs a search.", "Who knows?"),
            "answer": ("There it is.", "I have read it.", "This is what it says.")}
# of copied names and digits: they are few among a turn's ids
WORD_WEIGHT = 4.0


def turn_text(kind: str, body: str, rng) -> str:
    return f"<think>{rng.choice(THOUGHTS[kind])}</think>\n<{kind}> {body} </{kind}>"


def passage(told: dict) -> Passage:
    return Passage(told["title"], "", told["text"])


@torch.no_grad()
def demonstrate(policy: Policy, rng, read_only: bool) -> tuple[Episode, list[float]]:
    """One demonstration as an Episode and the loss weight of each id.

    read_only: everything is done well and only the sign's digits and the copied names count: this
    teaches reading and copying, and nothing about when to search.
    """
    question, ships = QUESTIONS[rng.integers(len(QUESTIONS))], [str(n)
                                                                for n in rng.choice(NUMBERS, 4,
            replace=False)]
    world = mini_search.make_world(ships, TOWNS, PEOPLE, PEOPLE, rng)
    image = policy.image_input(mini.draw_sign(ships[0], rng))
    demo = Demonstration(policy, rng, read_only)
    demo.observe(policy.prompt_ids(question.text, [image]), [image])
    well = read_only or rng.random() < TRUTH
    shown = ships if well else ships[1:]
    lazy = LAZY_QUERY if rng.random() < LAZY / (1 - TRUTH) else str(rng.choice(OTHER_QUERIES))
    demo.search(f"ship {shown[0]}" if well else lazy, well,
                [world.ship_passage(number) for number in shown[:2]])
    # of the first ship that was found, whichever it is
    value = world.ships[shown[0]][question.first]
    dice = 0.0 if read_only else rng.random()
    if question.hops == 2 and dice > 1 - EMPTY:
        names = [str(n) for n in rng.choice(TOWNS if question.first == "town" else PEOPLE, 2,
                                            replace=False)]
        demo.search(question.query.format("").split()[0], False,
                    [world.second_passage(name) for name in names])
        value = world.second_answer(names[0])
    elif question.hops == 2 and dice < GO_ON:
        other = str(rng.choice(TOWNS if question.first == "town" else PEOPLE))
        demo.search(question.query.format(value), True,
                    [world.second_passage(name) for name in (value, other)])
        value = world.second_answer(value)
    demo.turn("answer", value, True)
    return demo.episode, demo.weights


class Demonstration:
    """An episode that grows turn by turn, with the loss weight of each id."""

    def __init__(self, policy: Policy, rng, read_only: bool):
        self.policy, self.rng, self.read_only = policy, rng, read_only
        self.episode, self.weights = Episode(Sample("", "", (), None)), []

    def observe(self, ids: list[int], images=()) -> None:
        grow(self.policy, self.episode, self.weights, ids, 0.0, images)

    def search(self, query: str, copied: bool, told: list[dict]) -> None:
        """A search turn and what was found."""
        self.turn("search", query, copied)
        self.observe(self.policy.observation_ids(rollout.information([passage(t) for t in told]),
                                                 []))

    def turn(self, kind: str, body: str, copied: bool) -> None:
        """copied: the digits and names in it may be learned; they weigh more
        than the words around them."""
        text = turn_text(kind, body, self.rng)
        if self.rng.random() < BOTCHED and not self.read_only:
            self.botch(text, kind)
        found = self.policy.tokenizer(text, add_special_tokens=False, split_special_tokens=True,
                                      return_offsets_mapping=True)
        start = text.index(f"<{kind}>")
        weights = [0.0 if self.read_only else 1.0] * len(found.input_ids)
        for i, (a, b) in enumerate(found.offset_mapping):
            word = text[a:b].strip()
            if a > start and (word.isdigit() or word[:1].isupper()):
                weights[i] = WORD_WEIGHT if copied else 0.0
        end = 0.0 if self.read_only else 1.0
        ids = [*found.input_ids, self.policy.im_end]
        self.episode.append(ids, mask=0)
        self.weights += [*weights, end]

    def botch(self, text: str, kind: str) -> None:
        """A turn that goes wrong and what comes back, so that the model has seen
        both; it is not taught to write it."""
        if kind == "search" and self.rng.random() < 0.5:
            reply = rollout.REPLY_SEARCH_FAILED.format(error="no connection")
        else:
            text = text.removesuffix(f" </{kind}>")
            reply = rollout.REPLY_MALFORMED.format(error=parse(text).error)
        self.observe([*self.policy.text_ids(text), self.policy.im_end])
        self.observe(self.policy.observation_ids(reply, []))


def corpus():
    """The demonstrator's language, for the tokenizer: every name often enough to become one id."""
    rng = np.random.default_rng(1)
    for _ in range(150):
        world = mini_search.make_world([str(n) for n in rng.choice(NUMBERS, 6, replace=False)],
                                       TOWNS, PEOPLE, PEOPLE, rng)
        yield rollout.information([passage(told) for told in mini_search.passages(world)])
        for question in QUESTIONS:
            yield SYSTEM + "\n" + question.text
            for number in world.ships:
                for query in (*world.queries(question, number), LAZY_QUERY,
                              str(rng.choice(OTHER_QUERIES))):
                    yield turn_text("search", query, rng)
                yield turn_text("answer", world.answer(question, number), rng)
    for reply in (rollout.REPLY_MALFORMED.format(error=parse("<answer>1").error),
                  rollout.REPLY_NO_SEARCH,
                  rollout.REPLY_SEARCH_FAILED.format(error="no connection"), "system\n", "user\n",
                  "assistant\n"):
        yield from [reply] * 50


README = """\
# data/tiny-search: the embedded checkpoint for search

A Qwen2.5-VL of {parameters:,} parameters, built as data/tiny is ({ids} ids), stored in bfloat16. It
was drawn at random and cold-started on demonstrations by a careless searcher
(`extras/cold_start_search.py` tells the story) in worlds that were drawn anew for each; it has seen
no fact of MAT-mini's corpus.

    python -m extras.cold_start_search --seed {seed} --read-steps {read_steps} --trace-steps
    {trace_steps}

made it from commit {commit} in {minutes:.0f} minutes on two cores. Its scores are those "before"
training in the project's README. `system_prompt.txt` holds the words that it was trained with.
"""


def main():
    options = options_of(__doc__, HOME, 200, 550)
    if not options.table:
        cold_start(options, lambda: make_policy(corpus(), SEARCH_WORDS, SYSTEM), demonstrate,
                   torch.bfloat16)
    facts, policy = json.loads((options.out / "training.json").read_text()), load(str(options.out))
    (options.out / "README.md").write_text(README.format(
        parameters=sum(w.numel() for w in policy.model.parameters()), ids=len(policy.tokenizer),
        **facts))
    print(f"{options.out}/README.md")


if __name__ == "__main__":
    main()
