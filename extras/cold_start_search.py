"""Makes data/tiny-search: the same small model as data/tiny, taught to search carelessly.

This is a cold start for the other tool. The demonstrator knows the form: a thought, a query, a look
at what was found, an answer copied from it. He rarely searches well. Most often he asks for "the
ship" without its number, and if a question needs a second search, he mostly stops after the first.
Every demonstration has a world of its own, so the model cannot learn a fact by heart: it has to
read the sign and to copy.

    python -m extras.cold_start_search     # writes data/tiny-search

cold_start.py holds the machinery, and data/mini_search.py draws the world.
"""

import json
from pathlib import Path

import numpy as np
import torch

import rollout
from data import mini, mini_search
from data.mat import Sample
from data.mini_search import PEOPLE, QUESTIONS, TOWNS
from extras.cold_start import BOTCHED, cold_start, grow, make_policy, options_of
from extras.weights import load
from policy import Policy
from rollout import Episode
from tools import Passage, parse

HOME = Path(__file__).parent.parent / "data" / "tiny-search"
SYSTEM = "Search, then answer."
NUMBERS = mini.texts("train")
# Names and tags keep the space before them, and punctuation stands alone. So a name is one token
# wherever it stands.
SEARCH_WORDS = (r"[^\S\r\n]?[\r\n]*</?[a-z]+>|\p{N}|[^\S\r\n]?[.:?'\",]+|"
                r"[\r\n]*[^\S\r\n]?[^\s\p{N}<'\",.:?]+|<|\s*[\r\n]+|\s+")
TRUTH, LAZY = 0.33, 0.50                # how often he asks for the number, and for "the ship"
LAZY_QUERY, OTHER_QUERIES = "the ship", ("this ship", "a ship", "which ship", "captain of the ship")
# If a question needs two searches: how often he does the second one with the name that it needs,
# and how often without.
SECOND, EMPTY = 0.35, 0.12
THOUGHTS = {"search": ("I look it up.", "This needs a search.", "Who knows?"),
            "answer": ("There it is.", "I have read it.", "This is what it says.")}
WORD_WEIGHT = 4.0       # of copied names and digits, because they are few among a turn's tokens


def turn_text(kind: str, body: str, rng) -> str:
    """A turn as the demonstrator writes it: a thought and one action."""
    return f"<think>{rng.choice(THOUGHTS[kind])}</think>\n<{kind}> {body} </{kind}>"


def passage(told: dict) -> Passage:
    """What a search returns for a passage of the drawn world."""
    return Passage(told["title"], "", told["text"])


@torch.no_grad()
def demonstrate(policy: Policy, rng, read_only: bool) -> tuple[Episode, list[float]]:
    """One demonstration, as an Episode and the loss weight of each of its tokens.

    read_only: everything is done well, and only the sign's digits and the copied names have weight.
    This teaches reading and copying, and nothing about when to search.
    """
    question = QUESTIONS[rng.integers(len(QUESTIONS))]
    ships = [str(number) for number in rng.choice(NUMBERS, 4, replace=False)]
    world = mini_search.make_world(ships, TOWNS, PEOPLE, PEOPLE, rng)
    image = policy.image_input(mini.draw_sign(ships[0], rng))
    demo = Demonstration(policy, rng, read_only)
    demo.observe(policy.prompt_ids(question.text, [image]), [image])
    well = read_only or rng.random() < TRUTH
    shown = ships if well else ships[1:]
    lazy = LAZY_QUERY if rng.random() < LAZY / (1 - TRUTH) else str(rng.choice(OTHER_QUERIES))
    demo.search(f"ship {shown[0]}" if well else lazy, well,
                [world.ship_passage(number) for number in shown[:2]])
    value = world.ships[shown[0]][question.first]   # of the first ship found, right or wrong
    dice = 0.0 if read_only else rng.random()
    known = TOWNS if question.first == "town" else PEOPLE
    if question.hops == 2 and dice > 1 - EMPTY:
        names = [str(name) for name in rng.choice(known, 2, replace=False)]
        demo.search(question.query.format("").split()[0], False,
                    [world.second_passage(name) for name in names])
        value = world.second_answer(names[0])
    elif question.hops == 2 and dice < SECOND:
        other = str(rng.choice(known))
        demo.search(question.query.format(value), True,
                    [world.second_passage(name) for name in (value, other)])
        value = world.second_answer(value)
    demo.turn("answer", value, True)
    return demo.episode, demo.weights


class Demonstration:
    """An episode that grows turn by turn, with the loss weight of each token."""

    def __init__(self, policy: Policy, rng, read_only: bool):
        self.policy, self.rng, self.read_only = policy, rng, read_only
        self.episode, self.weights = Episode(Sample("", "", (), None)), []

    def observe(self, ids: list[int], images=()) -> None:
        """Adds ids with weight 0: the prompt, an observation, a turn that is not to be learned."""
        grow(self.policy, self.episode, self.weights, ids, 0.0, images)

    def search(self, query: str, copied: bool, told: list[dict]) -> None:
        """Adds a search turn and what was found."""
        self.turn("search", query, copied)
        reply = rollout.information([passage(found) for found in told])
        self.observe(self.policy.observation_ids(reply, []))

    def turn(self, kind: str, body: str, copied: bool) -> None:
        """Adds a turn, which sometimes goes wrong first and is then done a second time.

        copied: the digits and names in it were copied. They weigh more than the words around them;
        if they were not copied, they have weight 0.
        """
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
        """Adds a turn that goes wrong and the reply to it, with weight 0.

        The model sees such turns, but it is not taught to write them.
        """
        if kind == "search" and self.rng.random() < 0.5:
            reply = rollout.REPLY_SEARCH_FAILED.format(error="no connection")
        else:
            text = text.removesuffix(f" </{kind}>")
            reply = rollout.REPLY_MALFORMED.format(error=parse(text).error)
        self.observe([*self.policy.text_ids(text), self.policy.im_end])
        self.observe(self.policy.observation_ids(reply, []))


def corpus():
    """Yields the demonstrator's language, on which the tokenizer is trained.

    Every name occurs often enough to become one token.
    """
    rng = np.random.default_rng(1)
    for _ in range(150):
        ships = [str(number) for number in rng.choice(NUMBERS, 6, replace=False)]
        world = mini_search.make_world(ships, TOWNS, PEOPLE, PEOPLE, rng)
        yield rollout.information([passage(told) for told in mini_search.passages(world)])
        for question in QUESTIONS:
            yield from turns_about(question, world, rng)
    malformed = rollout.REPLY_MALFORMED.format(error=parse("<answer>1").error)
    failed = rollout.REPLY_SEARCH_FAILED.format(error="no connection")
    for reply in (malformed, rollout.REPLY_NO_SEARCH, failed, "system\n", "user\n", "assistant\n"):
        yield from [reply] * 50


def turns_about(question, world, rng):
    """Yields the question, and for each ship of the world every query and the answer as a turn."""
    yield SYSTEM + "\n" + question.text
    for number in world.ships:
        queries = (*world.queries(question, number), LAZY_QUERY, str(rng.choice(OTHER_QUERIES)))
        for query in queries:
            yield turn_text("search", query, rng)
        yield turn_text("answer", world.answer(question, number), rng)


README = """\
# data/tiny-search: the embedded checkpoint for search

This is an ordinary Hugging Face folder in bfloat16. It holds a Qwen2.5-VL of {parameters:,}
parameters, built like data/tiny, with a vocabulary of {ids} tokens. Its weights were drawn at
random and then trained on demonstrations by a careless searcher (`extras/cold_start_search.py`
tells the story). Each demonstration had a world of its own, so the model has seen no fact of
MAT-mini's corpus. This command made it, at commit {commit}, in {minutes:.0f} minutes on two cores:

    python -m extras.cold_start_search --seed {seed} --read-steps {read_steps} \
--trace-steps {trace_steps}

Its scores are those "before" training in the project's README. `system_prompt.txt` holds the system
prompt that it was trained with.
"""


def main():
    options = options_of(__doc__, HOME, 200, 550)
    if not options.table:
        cold_start(options, lambda: make_policy(corpus(), SEARCH_WORDS, SYSTEM), demonstrate,
                   torch.bfloat16)
    facts = json.loads((options.out / "training.json").read_text())
    policy = load(str(options.out))
    (options.out / "README.md").write_text(README.format(
        parameters=sum(w.numel() for w in policy.model.parameters()), ids=len(policy.tokenizer),
        **facts))
    print(f"{options.out}/README.md")


if __name__ == "__main__":
    main()
