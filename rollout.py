"""Rollout: groups of multi-turn episodes with tools, sampled by hand.

What it teaches: how a model and an environment take turns while every sampled id,
its log-probability and every image stay exactly what they were. There is no
`generate`: the loop below is the sampler.

    prompt --prefill once per sample--> cache --repeat G times--> rows
    rows   --decode a turn--> ids, log-probs --parse--> Action
    Action --tools--> observation (text, image) --appended with mask 0, prefilled--> next turn

One key-value cache lives through all turns, in buffers that are written in place.
Rows have different lengths: each row's ids fill its slots from the first on, and
attention ends where the row ends. Only the new piece is computed; nothing is
prefilled twice. During a turn, rows that have ended it wait outside the batch.

On a GPU a step of decoding is many small kernels, and starting them one by one takes
longer than running them; a step whose tensors stay where they are is therefore
recorded once, as a CUDA graph, and replayed. (The step itself runs in the tests; the
recording needs CUDA and has not been run yet.)

Read next: rewards.py, then grpo.py. Left out: continuous batching, speculative decoding; tools that run while other
rows still write (the sandbox takes programs by the batch, and a turn's programs take a tenth of its decoding).

Dimensions: B rows in the batch, T tokens, S slots of the cache, D hidden size, V vocabulary, G episodes of one sample.
"""

import time
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from PIL import Image

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

        One piece is all sampled (mask 1: a turn) or not at all (mask 0: prompt, observation). mask 1 needs one log-prob
        for each id and brings no image; with mask 0 logp is None, and self.logp gets 0.0 for each id, so that
        self.ids, self.mask and self.logp always have one length.
        holders: how many of `ids` are image place holders; there are some exactly if there are images.
        ValueError, with the episode as it was, where one of this is not so. The lists passed in stay as they are.
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
    cuda_graph: bool = True       # with CUDA, steps of decoding are recorded and replayed


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
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()        # what was started in this phase is counted in it
            self.seconds[name] += time.perf_counter() - start


# --- the batch that is being written --------------------------------------------------------------

PREFILL_IDS = 32_768                    # ids in one forward pass of `Rows.feed`, padding included: bounds its memory
ASK_EVERY = {"cpu": 1, "cuda": 8}       # steps between two looks at who is left: asking a GPU makes it wait
NARROW_FROM = 8                         # rows: a smaller batch is not worth making narrower


class Cache:
    """Keys and values: for each layer two buffers [B, heads, S, size of a head] that are written in place.

    What lies behind a row's last id is zero or out of date; the attention mask hides it. Each attention layer of the
    model calls `update`; `aim` says beforehand where.
    """

    def __init__(self, rows: int, slots: int):
        self.rows, self.slots = rows, slots
        self.buffers: list[tuple[torch.Tensor, torch.Tensor]] = []      # keys and values of each layer

    def aim(self, rows: slice, slots: torch.Tensor, seen: int) -> None:
        """The next forward pass is of these rows, writes these slots [b, T] and sees the first `seen` slots."""
        self.at, self.slots_written, self.seen = rows, slots, seen
        self.each = torch.arange(len(slots), device=slots.device)[:, None]                   # [b, 1]

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer: int, *_) -> list[torch.Tensor]:
        """Stores a layer's new keys and values, [b, heads, T, size]. Returns all that may be seen, likewise."""
        if layer == len(self.buffers):
            _, heads, _, size = keys.shape
            self.buffers.append(tuple(new.new_zeros(self.rows, heads, self.slots, size) for new in (keys, values)))
        for buffer, new in zip(self.buffers[layer], (keys, values)):
            buffer[self.at][self.each, :, self.slots_written] = new.transpose(1, 2)          # [b, T, heads, size]
        return [buffer[self.at, :, :self.seen] for buffer in self.buffers[layer]]

    def arrange(self, index: torch.Tensor, slots: int, used: int) -> None:
        """Rows `index`, repeats allowed, in new buffers of `slots` slots; the first `used` are copied. By layer: the
        old buffers of one layer are freed before the next layer's new ones are made."""
        for layer, old in enumerate(self.buffers):
            self.buffers[layer] = tuple(buffer.new_zeros(len(index), buffer.shape[1], slots, buffer.shape[3])
                                        for buffer in old)
            for new, buffer in zip(self.buffers[layer], old):
                new[:, :, :used] = buffer[index, :, :used]
        self.rows, self.slots = len(index), slots


class Rows:
    """B rows with one key-value cache. `feed` a piece to each row, `sample` the next id of each, `step` it in.

    Within a turn, rows that have ended it go to the back (`narrow`) and only the first `width` places are computed;
    `order` says which row lies at each place.
    """

    def __init__(self, policy: Policy, limits: Limits):
        self.policy, self.room = policy, limits.max_new_tokens
        self.static = limits.cuda_graph and policy.device.type == "cuda"    # steps of one shape, recorded
        self.graphs = {}            # by width: replays one step
        self.cache = None
        self.order, self.width = [], 0
        self.batch = None           # [width], order[:width] on the device: the rows that lie in the batch
        self.longest = 0            # no row has more ids in the cache
        self.length = None          # [B], each row's ids in the cache
        self.position = None        # [B], the next text position of each row
        self.last = None            # [B, D], hidden state of each row's newest id
        self.ids = None             # [B], what `step` writes

    def feed(self, pieces: list[list[int]], positions: list[torch.Tensor], features: list[torch.Tensor]) -> None:
        """Adds one piece of ids to each row and computes its keys, values and last hidden state.

        pieces: B lists of ids, each at least one; positions: B tensors [3, len(piece)];
        features: of the images in the pieces, row by row.
        """
        device, length = self.policy.device, max(len(piece) for piece in pieces)
        self._make_room(len(pieces), length)
        pad = self.policy.im_end                    # any id does: what comes next is written over it
        ids = torch.tensor([piece + [pad] * (length - len(piece)) for piece in pieces], device=device)   # [B, T]
        where = torch.stack([torch.nn.functional.pad(p, (0, length - p.shape[1])) for p in positions], dim=1).to(device)
        sizes = torch.tensor([len(piece) for piece in pieces], device=device)                            # [B]
        slots = self.length[:, None] + torch.arange(length, device=device)                               # [B, T]
        features, at_once = iter(features), max(1, PREFILL_IDS // length)
        for start in range(0, len(pieces), at_once):
            rows = slice(start, start + at_once)
            holders = sum(piece.count(self.policy.image_pad) for piece in pieces[rows])
            hidden = self._forward(rows, ids[rows], where[:, rows], slots[rows], self.longest + length,
                                   take(features, holders))                                              # [b, T, D]
            newest = hidden[torch.arange(len(hidden), device=device), sizes[rows] - 1]
            self.last = newest.new_zeros(len(pieces), newest.shape[1]) if self.last is None else self.last
            self.last[rows] = newest
        self.length += sizes
        self.longest += length
        self.position[:] = torch.tensor([int(p.max()) + 1 for p in positions], device=device)

    def _make_room(self, rows: int, length: int) -> None:
        """Slots for a piece of `length` ids and for the turn after it."""
        if self.cache is None:
            self.cache = Cache(rows, aligned(length + self.room))
            self.length, self.position, self.ids = torch.zeros(3, rows, dtype=torch.long, device=self.policy.device)
            self._all(rows)
            return
        self.longest = int(self.length.max())
        slots = aligned(self.longest + length + self.room)
        if slots > self.cache.slots or self.width < rows:
            self._arrange([self.order.index(row) for row in range(rows)], slots)

    def _forward(self, rows: slice, ids, positions, slots, seen: int, features) -> torch.Tensor:
        """ids [b, T] of some rows into their slots [b, T]; an id sees the slots of its row up to its own. [b, T, D]"""
        if seen == ids.shape[1]:
            visible = None              # a first piece: causal attention, which needs no mask
        else:
            visible = (torch.arange(seen, device=ids.device) <= slots[..., None])[:, None]      # [b, 1, T, S]
        self.cache.aim(rows, slots, seen)
        return self.policy.hidden(ids, positions, visible, features, self.cache)

    def step(self, ids: torch.Tensor, active: torch.Tensor) -> None:
        """Adds one sampled text id to each active row in the batch. ids, active: [width].

        The others compute, too, into the slot that their next piece will fill.
        """
        self.ids[:self.width] = ids
        if self.static and self.width not in self.graphs:
            self.graphs[self.width] = record(self._step, self.policy.device)
        (self.graphs[self.width] if self.static else self._step)()
        self.length[:self.width] += active
        self.position[:self.width] += active
        self.longest += 1

    def _step(self) -> None:
        """One step on tensors that stay where they are; asks the device for nothing, so that it can be recorded."""
        rows = slice(0, self.width)
        seen = self.cache.slots if self.static else self.longest + 1
        hidden = self._forward(rows, self.ids[rows, None], self.position[None, rows, None].expand(3, -1, -1),
                               self.length[rows, None], seen, None)                              # [width, 1, D]
        self.last[rows] = hidden[:, 0]

    def narrow(self, active: list[bool]) -> torch.Tensor:
        """The active rows come to the front and the others leave the batch. Returns the places they came from, [width].

        They change places with rows that have ended their turn: at most half of the batch is copied.
        """
        width, places = sum(active), list(range(len(active)))
        leaving = [place for place in range(width) if not active[place]]
        coming = [place for place in range(width, len(active)) if active[place]]
        for a, b in zip(leaving, coming):
            places[a], places[b] = places[b], places[a]
            self.order[a], self.order[b] = self.order[b], self.order[a]
        device = self.policy.device
        here, there = (torch.tensor(moved, dtype=torch.long, device=device)      # long: both may be empty
                       for moved in (leaving + coming, coming + leaving))
        for tensor in (self.length, self.position, self.last):
            tensor[here] = tensor[there]
        for buffer in (buffer for layer in self.cache.buffers for buffer in layer):
            buffer[here, :, :self.longest] = buffer[there, :, :self.longest]
        self.width, self.batch = width, torch.tensor(self.order[:width], device=device)
        return torch.tensor(places[:width], device=device)

    def repeat(self, times: int) -> None:
        """Each row becomes `times` consecutive rows: the prompt is prefilled once for its whole group."""
        self._arrange([place for place in range(len(self.order)) for _ in range(times)], self.cache.slots)

    def keep(self, rows: list[int]) -> None:
        """Drops all other rows: finished episodes leave for good."""
        self._arrange([self.order.index(row) for row in rows], self.cache.slots)

    def _arrange(self, places: list[int], slots: int) -> None:
        index = torch.tensor(places, device=self.policy.device)
        self.cache.arrange(index, slots, self.longest)
        self.length, self.position, self.last, self.ids = (
            tensor[index] for tensor in (self.length, self.position, self.last, self.ids))
        self.graphs = {}            # they know the old buffers
        self._all(len(places))

    def _all(self, rows: int) -> None:
        """Every row is in the batch, in order."""
        self.order, self.width, self.batch = list(range(rows)), rows, torch.arange(rows, device=self.policy.device)

    def sample(self, temperature: float, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """The next id of each row in the batch and its log-prob, [width] and [width]. Temperature 0: the likeliest.

        Nothing but temperature shapes the distribution, so that the recorded log-prob is that of
        the policy itself (law 2). A greedy id is recorded with its log-prob at temperature 1.
        """
        log_probs = self.policy.log_probs(self.last[:self.width], temperature or 1.0)        # [width, V]
        if temperature > 0:     # of independent exponential waiting times with rates p, the first is i with chance p_i
            # drawn for all rows, so that an episode does not depend on when others leave the batch
            waiting = log_probs.new_empty(len(self.order), log_probs.shape[1]).exponential_(generator=generator)
            if self.width < len(self.order):
                waiting = waiting[self.batch]
            ids = (waiting / log_probs.exp()).argmin(dim=-1)                                 # [width]
        else:
            ids = log_probs.argmax(dim=-1)
        return ids, log_probs.gather(1, ids[:, None])[:, 0]


def aligned(slots: int) -> int:
    """The next multiple of 64: attention kernels on a GPU want masks whose length divides by 8."""
    return -(-slots // 64) * 64


def take(features, tokens: int) -> list[torch.Tensor]:
    """The next images' features from an iterator, as many as make `tokens` place holders."""
    taken = []
    while tokens > 0 and (feature := next(features, None)) is not None:     # too few: `hidden` says so
        taken.append(feature)
        tokens -= len(feature)
    return taken


def record(step, device: torch.device):
    """A function that replays `step` as a CUDA graph; on a CPU `step` itself.

    A graph repeats the kernels with the addresses they had: `step` must read and write tensors that stay, and must
    never ask the device for a value. Run once before, on another stream as PyTorch asks for, so that
    libraries have their workspaces; running it twice does no harm, since it writes the same slots again.
    """
    if device.type != "cuda":
        return step
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device):
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            step()
        torch.cuda.current_stream().wait_stream(aside)
        with torch.cuda.graph(graph):
            step()
    return graph.replay


# --- one turn ----------------------------------------------------------------------------------


def decode_turn(rows: Rows, limits: Limits, generator) -> list[tuple[list[int], list[float]]]:
    """Samples until every row has ended its turn. Returns (ids, log-probs) of each row.

    The end-of-turn id is an action: it is in the list, with its log-prob. A row that wrote
    max_new_tokens without it is cut off. The last id of a row is not yet in the cache; it goes
    there together with the observation.
    """
    device = rows.policy.device
    ids = torch.full((len(rows.order), limits.max_new_tokens), -1, device=device)            # [B, T]
    logps = torch.zeros(ids.shape, device=device)                                            # [B, T]
    active = torch.ones(len(ids), dtype=torch.bool, device=device)
    for t in range(limits.max_new_tokens):
        new, logp = rows.sample(limits.temperature, generator)
        ids[rows.batch, t] = torch.where(active, new, -1)
        logps[rows.batch, t] = logp
        active = active & (new != rows.policy.im_end)
        if t + 1 == limits.max_new_tokens:
            break
        if t % ASK_EVERY[device.type] == 0:
            left = int(active.sum())
            if left == 0:
                break
            if left <= rows.width // 2 and rows.width > NARROW_FROM:
                places = rows.narrow(active.tolist())
                new, active = new[places], active[places]
        rows.step(new, active)
    ids, logps = ids.tolist(), logps.tolist()
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
    rows = Rows(policy, limits)
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
