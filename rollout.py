"""Rollout: groups of multi-turn episodes with tools, sampled by hand.

What it teaches: how a model and an environment take turns while every sampled id,
its log-probability and every image stay exactly what they were. There is no
`generate`: the loop below is the sampler.

    prompt --prefill once per sample--> cache --repeat G times--> rows
    rows   --decode a turn--> ids, log-probs --parse--> Action
    Action --tools--> observation (text, image) --appended with mask 0, prefilled--> next turn

One key-value cache lives through all turns. Rows have different lengths: each
piece is padded on the right, and what is padding is a hole in the attention mask
for ever after. Only the new piece is computed; nothing is prefilled twice.

Read next: rewards.py, then grpo.py. Left out: continuous batching, speculative decoding.

Dimensions: B rows in the batch, T tokens, D hidden size, G episodes of one sample.
"""

import time
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from PIL import Image
from transformers import DynamicCache

from data.mat import Sample
from policy import ImageInput, Policy
from tools import Action, Execution, Passage, SearchError, Tools, parse, search_all

# What the environment says. The first and the last two also tell the model what it may do next.
REPLY_PROBLEM = "Write the code that repairs it."
REPLY_NONE = "Answer the question."
REPLY_IMAGE = "This is the image now."
REPLY_FAILED = "The code failed: {error}"
REPLY_MALFORMED = "Not understood: {error} Write one thought and one action."
REPLY_FOUND = "<information> {passages} </information>"
REPLY_SEARCH_FAILED = "Search failed: {error}"
REPLY_NO_SEARCH = "Search is not available here."
PASSAGE_CHARACTERS = 1000       # of each passage; an encyclopedia's have some 600


@dataclass
class Turn:
    """What the model wrote until its end-of-turn id, and what came back."""
    text: str                            # decoded for the parser, without the end-of-turn id
    action: Action
    finished: bool                       # False: cut off by max_new_tokens
    start: int                           # its ids are episode.ids[start:stop]
    stop: int
    observation: str | None = None       # None after the last turn
    execution: Execution | None = None   # after a code turn
    found: list[Passage] | SearchError | None = None    # after a search turn; None: search is switched off


@dataclass
class Episode:
    """One attempt at a sample, as token ids. `append` is the only way it grows (law 1)."""
    sample: Sample
    ids: list[int] = field(default_factory=list)
    mask: list[int] = field(default_factory=list)           # 1: sampled by the model; 0: prompt, observation
    logp: list[float] = field(default_factory=list)         # log-prob at sampling; 0.0 where mask is 0
    images: list[ImageInput] = field(default_factory=list)  # in the order of their place holders in ids
    turns: list[Turn] = field(default_factory=list)
    view: Image.Image | None = None                         # the image that a program would get now
    ended: str = ""                                         # why: answer | cut | turns | length

    def append(self, ids: list[int], mask: int, logp: list[float] | None = None,
               images: list[ImageInput] = (), holders: int = 0) -> None:
        """Adds ids with their mask, log-probs and images; all together or, on a mismatch, not at all.

        mask 1 needs one log-prob for each id and brings no image; mask 0 has no log-probs.
        holders: how many of `ids` are image place holders, which `images` must fill exactly.
        """
        if mask == 1 and (logp is None or len(logp) != len(ids) or images):
            raise ValueError("sampled ids need exactly one log-prob each and bring no image")
        if mask == 0 and logp is not None:
            raise ValueError("ids that were not sampled have no log-prob")
        if (holders > 0) != bool(images):
            raise ValueError(f"{len(images)} images for {holders} place holders")
        self.ids += ids
        self.mask += [mask] * len(ids)
        self.logp += logp if mask == 1 else [0.0] * len(ids)
        self.images += images

    @property
    def answer(self) -> str | None:
        """The final answer, None if the episode ended without one."""
        last = self.turns[-1] if self.turns else None
        return last.action.value if last and last.finished and last.action.kind == "answer" else None


@dataclass(frozen=True)
class Limits:
    """How an episode is sampled and when it ends."""
    temperature: float = 1.0      # 0 is greedy
    max_new_tokens: int = 256     # ids in one turn
    max_turns: int = 5
    max_length: int = 4096        # ids in the whole episode; an observation that does not fit ends it


class Clock:
    """Seconds by phase, for the step's summary."""

    def __init__(self):
        self.seconds = defaultdict(float)

    @contextmanager
    def phase(self, name: str):
        start = time.perf_counter()
        try:
            yield
        except torch.OutOfMemoryError as error:
            error.phase = name      # plan.out_of_memory says what to lower there
            raise
        finally:
            self.seconds[name] += time.perf_counter() - start


# --- the batch that is being written --------------------------------------------------------------


class Rows:
    """B rows with one key-value cache. `feed` a piece to each row, `sample` the next id of each."""

    def __init__(self, policy: Policy):
        self.policy = policy
        self.cache = DynamicCache(config=policy.model.config.text_config)
        self.attention = None       # [B, cached], 1 where the row has an id, 0 in its holes
        self.position = None        # [B], the next text position of each row
        self.last = None            # [B, D], hidden state of each row's newest id

    def feed(self, pieces: list[list[int]], positions: list[torch.Tensor], features: list[torch.Tensor]) -> None:
        """Adds one piece of ids to each row and computes its keys, values and last hidden state.

        pieces: B lists of ids, each at least one; positions: B tensors [3, len(piece)];
        features: of the images in the pieces, row by row.
        """
        device, length = self.policy.device, max(len(piece) for piece in pieces)
        pad = self.policy.im_end                    # any id does: attention hides it
        ids = torch.tensor([piece + [pad] * (length - len(piece)) for piece in pieces], device=device)   # [B, T]
        where = torch.stack([torch.nn.functional.pad(p, (0, length - p.shape[1])) for p in positions], dim=1)
        sizes = torch.tensor([len(piece) for piece in pieces], device=device)                            # [B]
        self._forward(ids, where.to(device), (torch.arange(length, device=device) < sizes[:, None]).long(),
                      features, sizes - 1)
        self.position = torch.tensor([int(p.max()) + 1 for p in positions], device=device)

    def step(self, ids: torch.Tensor, active: torch.Tensor) -> None:
        """Adds one sampled text id to each active row; the others get a hole. ids, active: [B]."""
        where = self.position[None, :, None].expand(3, -1, 1)
        self._forward(ids[:, None], where, active.long()[:, None], [], torch.zeros_like(ids))
        self.position = self.position + active.long()

    def _forward(self, ids, positions, new_attention, features, newest):
        self.attention = (new_attention if self.attention is None
                          else torch.cat([self.attention, new_attention], dim=1))
        hidden = self.policy.hidden(ids, positions, self.attention, features, self.cache)    # [B, T, D]
        self.last = hidden[torch.arange(len(ids), device=ids.device), newest]                # [B, D]

    def repeat(self, times: int) -> None:
        """Each row becomes `times` consecutive rows: the prompt is prefilled once for its whole group."""
        self.cache.batch_repeat_interleave(times)
        self.attention = self.attention.repeat_interleave(times, dim=0)
        self.position = self.position.repeat_interleave(times)
        self.last = self.last.repeat_interleave(times, dim=0)

    def keep(self, rows: list[int]) -> None:
        """Drops all other rows: finished episodes leave the batch."""
        index = torch.tensor(rows, device=self.policy.device)
        self.cache.batch_select_indices(index)
        self.attention, self.position, self.last = self.attention[index], self.position[index], self.last[index]

    def sample(self, temperature: float, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """The next id of each row and its log-prob, [B] and [B]. Temperature 0 takes the likeliest id.

        Nothing but temperature shapes the distribution, so that the recorded log-prob is that of
        the policy itself (law 2). A greedy id is recorded with its log-prob at temperature 1.
        """
        log_probs = self.policy.log_probs(self.last, temperature or 1.0)                     # [B, V]
        if temperature > 0:     # of independent exponential waiting times with rates p, the first is i with chance p_i
            waiting = torch.empty_like(log_probs).exponential_(generator=generator) / log_probs.exp()
            ids = waiting.argmin(dim=-1)                                                     # [B]
        else:
            ids = log_probs.argmax(dim=-1)
        return ids, log_probs.gather(1, ids[:, None])[:, 0]


# --- one turn ----------------------------------------------------------------------------------


def decode_turn(rows: Rows, limits: Limits, generator) -> list[tuple[list[int], list[float]]]:
    """Samples until every row has ended its turn. Returns (ids, log-probs) of each row.

    The end-of-turn id is an action: it is in the list, with its log-prob. A row that wrote
    max_new_tokens without it is cut off. The last id of a row is not yet in the cache; it goes
    there together with the observation.
    """
    ids, logps, active = [], [], None
    for _ in range(limits.max_new_tokens):
        new, logp = rows.sample(limits.temperature, generator)
        active = torch.ones_like(new, dtype=torch.bool) if active is None else active
        ids.append(torch.where(active, new, -1))
        logps.append(logp)
        active = active & (new != rows.policy.im_end)
        if len(ids) == limits.max_new_tokens or not active.any():
            break
        rows.step(new, active)
    ids, logps = torch.stack(ids, 1).tolist(), torch.stack(logps, 1).tolist()                # [B, T]
    return [([i for i in row if i >= 0], [p for i, p in zip(row, logp) if i >= 0]) for row, logp in zip(ids, logps)]


def observe(episodes: list[Episode], tools: Tools | None) -> list[tuple[str, Image.Image | None] | None]:
    """Runs the actions of the episodes' last turns. An observation (text, image) for each, None after an answer.

    A tool that is None is switched off: every program "returns" the unchanged image, no search finds anything (the
    control experiment that shows whether the tool did it).
    """
    tools, turns = tools or Tools(), [episode.turns[-1] for episode in episodes]
    coders = [e for e in episodes if e.turns[-1].action.kind == "code"]
    jobs = [(e.turns[-1].action.value, e.view) for e in coders]
    runs = tools.sandbox.map(jobs) if tools.sandbox else [Execution(image, "", None, 0.0) for _, image in jobs]
    for episode, execution in zip(coders, runs):
        episode.turns[-1].execution = execution
    searchers = [turn for turn in turns if turn.action.kind == "search"]
    if tools.search and searchers:
        found = search_all(tools.search, [turn.action.value for turn in searchers], tools.passages)
        for turn, passages in zip(searchers, found):
            turn.found = passages
    return [_reply(turn) for turn in turns]


def _reply(turn: Turn) -> tuple[str, Image.Image | None] | None:
    action, execution = turn.action, turn.execution
    if action.kind == "answer":
        return None
    if action.kind == "problem":
        return (REPLY_NONE if set(action.value) == {"none"} else REPLY_PROBLEM), None
    if action.kind == "search":
        return information(turn.found), None
    if action.kind == "malformed":
        return REPLY_MALFORMED.format(error=action.error), None
    printed = f"It printed: {execution.stdout}\n" if execution.stdout else ""
    if execution.image is None:
        return printed + REPLY_FAILED.format(error=execution.error), None
    return printed + REPLY_IMAGE, execution.image


def information(found: list[Passage] | SearchError | None, bare_snippets: bool = False) -> str:
    """What a search found, in the paper's form, here with titles; bare_snippets: those of web pages without, as there.

    >>> information([Passage("Oslo", "", "The mayor is Vera."), Passage("Bern", "", "A town.")])
    '<information> 1. Content:Oslo. The mayor is Vera. 2. Content:Bern. A town. </information>'
    """
    if found is None:
        return REPLY_NO_SEARCH
    if isinstance(found, SearchError):
        return REPLY_SEARCH_FAILED.format(error=found)
    texts = [p.text if bare_snippets and p.url else f"{p.title}. {p.text}" for p in found]
    told = [f"{i}. Content:{text[:PASSAGE_CHARACTERS]}" for i, text in enumerate(texts, start=1)]
    return REPLY_FOUND.format(passages=" ".join(told) or "Nothing was found.")


# --- whole episodes -----------------------------------------------------------------------------


def begin(policy: Policy, samples: list[Sample]) -> list[Episode]:
    """One episode per sample that holds the prompt alone."""
    episodes = []
    for sample in samples:
        view = sample.open_image() if sample.image_path else None
        images = [policy.image_input(view)] if view else []
        episode = Episode(sample, view=view)
        episode.append(policy.prompt_ids(sample.question, images), mask=0, images=images,
                       holders=sum(map(policy.image_tokens, images)))
        episodes.append(episode)
    return episodes


def fork(episode: Episode) -> Episode:
    """A copy that grows on its own and shares the prompt's image."""
    return Episode(episode.sample, list(episode.ids), list(episode.mask), list(episode.logp),
                   list(episode.images), list(episode.turns), episode.view, episode.ended)


@torch.inference_mode()
def rollout(policy: Policy, samples: list[Sample], *, group_size: int = 1, limits: Limits = Limits(),
            tools: Tools | None, generator: torch.Generator, clock: Clock | None = None) -> list[Episode]:
    """Samples `group_size` consecutive episodes for each sample, all turns, tools in the loop."""
    clock = clock or Clock()
    with clock.phase("vision"):
        prompts = begin(policy, samples)
        features = policy.features([image for episode in prompts for image in episode.images])
    rows = Rows(policy)
    with clock.phase("prefill"):
        rows.feed([e.ids for e in prompts], [policy.positions(e.ids, e.images) for e in prompts], features)
        rows.repeat(group_size)
    episodes = [fork(prompt) for prompt in prompts for _ in range(group_size)]
    live = list(episodes)
    while live:
        with clock.phase("decode"):
            written = decode_turn(rows, limits, generator)
        for episode, (ids, logp) in zip(live, written):
            add_turn(policy, episode, ids, logp)
        with clock.phase("tools"):
            observations = observe(live, tools)
        with clock.phase("vision"):
            pieces = add_observations(policy, live, observations, limits)
            kept = [i for i, piece in enumerate(pieces) if piece is not None]
            features = policy.features([image for i in kept for image in pieces[i][1]])
        if not kept:
            break
        with clock.phase("prefill"):
            rows.keep(kept)
            live = [live[i] for i in kept]
            where = [policy.positions(e.ids, e.images)[:, -len(pieces[i][0]):] for i, e in zip(kept, live)]
            rows.feed([pieces[i][0] for i in kept], where, features)
    return episodes


def add_turn(policy: Policy, episode: Episode, ids: list[int], logp: list[float]) -> None:
    """Appends a sampled turn and parses its text."""
    start = len(episode.ids)
    episode.append(ids, mask=1, logp=logp)
    text = policy.decode(ids)
    episode.turns.append(Turn(text, parse(text), ids[-1] == policy.im_end, start, len(episode.ids)))


def add_observations(policy: Policy, episodes: list[Episode], observations, limits: Limits) -> list:
    """Appends each observation, or ends the episode. Returns what each row feeds next:
    (its last sampled id and the observation's ids, the observation's images), None where it ended.
    """
    inputs: dict[int, ImageInput] = {}      # equal programs share one image object: encode it once
    pieces = []
    for episode, observation in zip(episodes, observations):
        turn = episode.turns[-1]
        if observation is None or not turn.finished or len(episode.turns) == limits.max_turns:
            episode.ended = "cut" if not turn.finished else "turns" if observation else "answer"
            pieces.append(None)
            continue
        text, view = observation
        if view is not None and id(view) not in inputs:
            inputs[id(view)] = policy.image_input(view)
        images = [] if view is None else [inputs[id(view)]]
        ids = policy.observation_ids(text, images)
        if len(episode.ids) + len(ids) >= limits.max_length:      # never truncated: through an image least of all
            episode.ended = "length"
            pieces.append(None)
            continue
        turn.observation, episode.view = text, view or episode.view
        pieces.append(([episode.ids[-1], *ids], images))
        episode.append(ids, mask=0, images=images, holders=sum(map(policy.image_tokens, images)))
    return pieces
