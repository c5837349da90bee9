"""Rollout: groups of multi-turn episodes with tools, sampled by hand.

What it teaches: how a model and an environment take turns while every sampled token, its
log-probability and every image stay exactly what they were. There is no `generate`: the loop in
`rollout` below is the sampler.

    prompt  --computed once per question, then repeated G times--> rows
    rows    --decode a turn--> tokens, log-probs --parse--> Action
    Action  --tools--> observation (text, image) --appended with mask 0--> next turn

An `Episode` is a list of token ids. You never turn it into text and back: text is decoded for the
parser alone, an observation is encoded alone and appended. So what the trainer scores later is what
was sampled here (laws 1 and 2 of the README). The last section makes the trainer's tensors.

The paper (Visual-ARFT, arXiv 2505.14246) describes such episodes; its released trainer samples
single turns on stored contexts instead. Left out: tools that run while other rows still write.

Read next: rewards.py, which says what an episode is worth.

Dimensions: B rows, b rows still in the batch, T tokens, V vocabulary, G episodes of one question;
for the update B episodes, L tokens of the longest, K sampled tokens.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from PIL import Image

from data.mat import Sample
from extras.engine import Rows, timed
from policy import ImageInput, Policy
from tools import Action, Execution, Passage, SearchError, Tools, parse, search_all

# What the environment says. Three of these also tell the model what it may do next.
REPLY_PROBLEM = "Write the code that repairs it."
REPLY_NONE = "Answer the question."
REPLY_IMAGE = "This is the image now."
REPLY_FAILED = "The code failed: {error}"
REPLY_MALFORMED = "Not understood: {error} Write one thought and one action."
REPLY_FOUND = "<information> {passages} </information>"
REPLY_SEARCH_FAILED = "Search failed: {error}"
REPLY_NO_SEARCH = "Search is not available here."
PASSAGE_CHARACTERS = 1000       # of each passage; those of an encyclopedia have some 600


@dataclass
class Limits:
    """How an episode is sampled, and when it ends."""
    temperature: float = 1.0        # divides the logits, here and in training; paper: 1
    max_new_tokens: int = 256       # tokens that the model may write in one turn; paper: 256
    max_turns: int = 5              # turns in an episode; paper: 5, in evaluation
    max_length: int = 4096          # tokens in an episode; an observation that does not fit ends it


DEFAULT_LIMITS = Limits()


@dataclass
class Turn:
    """What the model wrote up to its end-of-turn token, and what came back."""
    text: str                            # decoded for the parser, without the end-of-turn token
    action: Action
    finished: bool                       # False: max_new_tokens cut it off
    start: int                           # its tokens are episode.ids[start:stop]
    stop: int
    observation: str | None = None       # None after the last turn
    execution: Execution | None = None   # what a program did
    found: list[Passage] | SearchError | None = None    # what a search found; None: it did not run


@dataclass
class Episode:
    """One attempt at a sample, as token ids. `append` is the only way it grows (law 1)."""
    sample: Sample
    ids: list[int] = field(default_factory=list)
    mask: list[int] = field(default_factory=list)           # 1: the model sampled it; 0: it did not
    logp: list[float] = field(default_factory=list)         # at sampling; 0.0 where mask is 0
    images: list[ImageInput] = field(default_factory=list)  # in the order of their placeholders
    turns: list[Turn] = field(default_factory=list)
    view: Image.Image | None = None                         # the image a program would get now
    ended: str = ""                                         # why: answer | cut | turns | length

    def append(self, ids: list[int], mask: int, logp: list[float] | None = None,
               images: list[ImageInput] = (), holders: int = 0) -> None:
        """Adds ids with their mask, log-probs and images: all together or, on a mismatch, nothing.

        A piece is sampled as a whole (mask 1: a turn) or not at all (mask 0: prompt, observation).
        With mask 1, `logp` has one log-prob for each id, and the piece brings no image. With mask 0
        logp is None, and self.logp gets 0.0 for each id, so that self.ids, self.mask and self.logp
        always have one length. holders: how many of `ids` are image placeholders; there are some
        exactly if there are images. The lists that you pass in stay as they are.
        Raises ValueError, and leaves the episode as it was, if any of this does not hold.
        """
        if mask == 1 and (logp is None or len(logp) != len(ids) or images):
            raise ValueError("sampled ids need exactly one log-prob each and bring no image")
        if mask == 0 and logp is not None:
            raise ValueError("ids that were not sampled have no log-prob")
        if (holders > 0) != bool(images):
            raise ValueError(f"{len(images)} images for {holders} placeholders")
        self.ids += ids
        self.mask += [mask] * len(ids)
        self.logp += logp if mask == 1 else [0.0] * len(ids)
        self.images += images

    @property
    def answer(self) -> str | None:
        """The final answer; None if the episode ended without one."""
        last = self.turns[-1] if self.turns else None
        answered = last and last.finished and last.action.kind == "answer"
        return last.action.value if answered else None


# --- one turn -------------------------------------------------------------------------------------
#
# `Rows` (extras/engine.py) holds one row for each episode, and the key-value cache of all:
#   rows.feed(episodes)   computes what is new in each: its prompt, later its observation
#   rows.newest [b, D]    the last hidden state of each row in the batch; rows.batch [b] names them
#   rows.step(ids)        computes the sampled tokens; False once every row has ended its turn
#   rows.writing [b]      True where a row has not ended its turn; such rows stay in the batch


def sample_tokens(policy: Policy, rows: Rows, temperature: float,
                  generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """The next token of each row in the batch and its log-prob, [b] and [b].

    Nothing but the temperature shapes the distribution, so the recorded log-prob is that of the
    policy itself (law 2). Temperature 0 takes the likeliest token and records its log-prob at
    temperature 1.
    """
    log_probs = policy.log_probs(rows.newest, temperature or 1.0)                       # [b, V]
    if temperature == 0:
        ids = log_probs.argmax(dim=-1)                                                  # [b]
    else:
        # Of independent exponential waiting times with rates p_i, the first is i with chance p_i.
        # They are drawn for all B rows, so that an episode does not depend on when others end.
        waiting = log_probs.new_empty(rows.count, log_probs.shape[1])
        waiting = waiting.exponential_(generator=generator)[rows.batch]                 # [b, V]
        ids = (waiting / log_probs.exp()).argmin(dim=-1)                                # [b]
    return ids, log_probs.gather(1, ids[:, None])[:, 0]


@timed("decode")
def decode_turn(policy: Policy, rows: Rows, limits: Limits,
                generator: torch.Generator) -> list[tuple[list[int], list[float]]]:
    """Samples until every row has ended its turn. Returns (ids, log-probs) of each row.

    The end-of-turn token is an action: it is in the list, with its log-prob. A row that wrote
    max_new_tokens without it is cut off. A row's last token is not in the cache yet; it goes there
    together with the observation.
    """
    ids = torch.full((rows.count, limits.max_new_tokens), -1, device=policy.device)     # [B, T]
    logps = torch.zeros(ids.shape, device=policy.device)                                # [B, T]
    rows.begin_turn()
    for t in range(limits.max_new_tokens):
        new, logp = sample_tokens(policy, rows, limits.temperature, generator)
        ids[rows.batch, t] = torch.where(rows.writing, new, -1)
        logps[rows.batch, t] = logp
        if t + 1 == limits.max_new_tokens or not rows.step(new):
            break
    return [([i for i in row if i >= 0], [p for i, p in zip(row, logp) if i >= 0])
            for row, logp in zip(ids.tolist(), logps.tolist())]


def add_turn(policy: Policy, episode: Episode, ids: list[int], logp: list[float]) -> None:
    """Appends a sampled turn and parses its text."""
    start = len(episode.ids)
    episode.append(ids, mask=1, logp=logp)
    text = policy.decode(ids)
    finished = ids[-1] == policy.im_end
    episode.turns.append(Turn(text, parse(text), finished, start, len(episode.ids)))


# --- what the environment says --------------------------------------------------------------------


@timed("tools")
def observe(episodes: list[Episode], tools: Tools) -> list[tuple[str, Image.Image | None] | None]:
    """Carries out the actions of the episodes' last turns.

    Returns an observation (text, image) for each episode, None after an answer. A tool that is None
    is switched off: programs "return" the unchanged image, and a search is told that there is none.
    This is the control experiment that shows whether the tool did it.
    """
    coders = [e.turns[-1] for e in episodes if e.turns[-1].action.kind == "code"]
    views = [e.view for e in episodes if e.turns[-1].action.kind == "code"]
    if tools.sandbox:
        runs = tools.sandbox.map([(turn.action.value, view) for turn, view in zip(coders, views)])
    else:
        runs = [Execution(view, "", None, 0.0) for view in views]
    for turn, execution in zip(coders, runs):
        turn.execution = execution
    searchers = [e.turns[-1] for e in episodes if e.turns[-1].action.kind == "search"]
    if tools.search and searchers:
        queries = [turn.action.value for turn in searchers]
        for turn, found in zip(searchers, search_all(tools.search, queries, tools.passages)):
            turn.found = found
    return [reply(episode.turns[-1]) for episode in episodes]


def reply(turn: Turn) -> tuple[str, Image.Image | None] | None:
    """The environment's answer to one turn: (text, image or None); None after an answer."""
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


def information(found: list[Passage] | SearchError | None) -> str:
    """What a search found, in the paper's form. None: search is switched off.

    >>> information([Passage("Oslo", "", "The mayor is Vera."), Passage("Bern", "", "A town.")])
    '<information> 1. Content:Oslo. The mayor is Vera. 2. Content:Bern. A town. </information>'
    """
    if found is None:
        return REPLY_NO_SEARCH
    if isinstance(found, SearchError):
        return REPLY_SEARCH_FAILED.format(error=found)
    texts = [f"{p.title}. {p.text}" if p.title else p.text for p in found]
    told = [f"{i}. Content:{text[:PASSAGE_CHARACTERS]}" for i, text in enumerate(texts, start=1)]
    return REPLY_FOUND.format(passages=" ".join(told) or "Nothing was found.")


@timed("vision")
def add_observations(policy: Policy, episodes: list[Episode], observations: list,
                     limits: Limits) -> None:
    """Appends each observation to its episode, or ends the episode and says why in `ended`."""
    inputs: dict[int, ImageInput] = {}      # equal programs share one image: process it once
    for episode, observation in zip(episodes, observations):
        turn = episode.turns[-1]
        if observation is None or not turn.finished or len(episode.turns) == limits.max_turns:
            episode.ended = "cut" if not turn.finished else "turns" if observation else "answer"
            continue
        text, view = observation
        if view is not None and id(view) not in inputs:
            inputs[id(view)] = policy.image_input(view)
        images = [] if view is None else [inputs[id(view)]]
        ids = policy.observation_ids(text, images)
        if len(episode.ids) + len(ids) >= limits.max_length:
            episode.ended = "length"        # nothing is truncated, least of all inside an image
            continue
        turn.observation = text
        episode.view = view or episode.view
        episode.append(ids, mask=0, images=images,
                       holders=sum(map(policy.image_tokens, images)))


# --- whole episodes -------------------------------------------------------------------------------


@timed("vision")
def begin(policy: Policy, samples: list[Sample]) -> list[Episode]:
    """One episode for each sample that holds the prompt alone."""
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
def rollout(policy: Policy, samples: list[Sample], *, group_size: int = 1,
            limits: Limits = DEFAULT_LIMITS, tools: Tools,
            generator: torch.Generator) -> list[Episode]:
    """Samples `group_size` neighbouring episodes for each sample: all turns, tools in the loop."""
    prompts = begin(policy, samples)
    rows = Rows(policy, limits.max_new_tokens)
    rows.feed(prompts)              # computes each prompt once ...
    rows.repeat(group_size)         # ... for its whole group
    episodes = live = [fork(prompt) for prompt in prompts for _ in range(group_size)]
    while live:
        for episode, (ids, logp) in zip(live, decode_turn(policy, rows, limits, generator)):
            add_turn(policy, episode, ids, logp)
        add_observations(policy, live, observe(live, tools), limits)
        going = [row for row, episode in enumerate(live) if not episode.ended]
        live = [live[row] for row in going]
        if live:
            rows.keep(going)
            rows.feed(live)         # each row's last sampled token and the observation
    return episodes


# --- episodes as tensors --------------------------------------------------------------------------


@dataclass
class Batch:
    """B episodes as the model takes them, and where their sampled tokens are."""
    ids: torch.Tensor            # [B, T]
    positions: torch.Tensor      # [3, B, T]
    attention: torch.Tensor      # [B, T], 1 where there is a token
    mask: torch.Tensor           # [B, L], 1 where the policy sampled the token
    logp_old: torch.Tensor       # [B, L], at sampling; 0 elsewhere
    targets: torch.Tensor        # [K], the sampled tokens, episode by episode
    states: torch.Tensor         # [K], row * T + column of the hidden state that predicts each
    images: list[ImageInput]     # row by row, in reading order


def collate(policy: Policy, episodes: list[Episode]) -> Batch:
    """One row for each episode, padded to one length. Padding has attention 0."""
    ids = padded([torch.tensor(e.ids) for e in episodes])                           # [B, T]
    mask = padded([torch.tensor(e.mask, dtype=torch.float32) for e in episodes])
    logp_old = padded([torch.tensor(e.logp, dtype=torch.float32) for e in episodes])
    attention = padded([torch.ones(len(e.ids), dtype=torch.long) for e in episodes])
    positions = padded([policy.positions(e.ids, e.images).T for e in episodes])     # [B, T, 3]
    rows, columns = mask.nonzero(as_tuple=True)                                     # [K], [K]
    states = rows * ids.shape[1] + columns - 1      # a token is predicted by the one before it
    tensors = (ids, positions.permute(2, 0, 1), attention, mask, logp_old, ids[rows, columns],
               states)
    images = [image for e in episodes for image in e.images]
    return Batch(*(tensor.to(policy.device) for tensor in tensors), images)


def padded(rows: list[torch.Tensor]) -> torch.Tensor:
    """Tensors of different lengths as one, with zeros behind them: [length, ...] -> [B, T, ...]."""
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


@dataclass
class RowLayout:
    """How an update cuts episodes into tensors: each episode is a row of its own.

    In extras/tree.py a group shares its prompt, which gives the same gradient.
    """
    tokens: int = 2048              # in one forward pass, with padding; one episode may have more
    around: Callable = nullcontext  # context of a forward pass: extras/weights.py:checkpointing

    def minibatches(self, policy: Policy, episodes: list[Episode], count: int,
                    generator: torch.Generator) -> list[list[int]]:
        """Indices of the episodes of each optimiser step; shuffled if there are several steps."""
        order = torch.arange(len(episodes))
        if count > 1:
            order = torch.randperm(len(episodes), generator=generator, device=generator.device)
        return [part.tolist() for part in order.chunk(count) if len(part)]

    def micro_batches(self, policy: Policy, episodes: list[Episode]) -> list[list[int]]:
        """Indices of the episodes of each forward pass. Episodes of similar length share one."""
        return cut([len(episode.ids) for episode in episodes], self.tokens)

    def pack(self, policy: Policy, episodes: list[Episode]) -> Batch:
        """The tensors of one forward pass."""
        return collate(policy, episodes)


def cut(lengths: list[int], limit: int) -> list[list[int]]:
    """Parts of at most `limit` tokens, padding to the longest row included; short rows first.

    >>> cut([50, 30, 40, 90], 100)
    [[1, 2], [0], [3]]
    """
    parts = []
    for row in sorted(range(len(lengths)), key=lengths.__getitem__):
        if not parts or lengths[row] * (len(parts[-1]) + 1) > limit:    # the newest is the longest
            parts.append([])
        parts[-1].append(row)
    return parts
