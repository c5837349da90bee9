"""The sampler's engine: one key-value cache for all rows of a rollout, and a clock for its phases.

You can read rollout.py without this file. It needs to know only what `Rows` promises:

    rows.feed(episodes)     computes what is new in each episode (its prompt, later its observation)
    rows.repeat(G)          makes G rows of each: a group computes its prompt once
    rows.newest             hidden state of each row's last token, from which the next is sampled
    rows.step(ids)          computes the sampled tokens; False once every row has ended its turn
    rows.keep(rows)         drops the rows whose episodes have ended

What makes it fast: the cache is written in place and lives through all turns, so no token is
computed twice. Rows have different lengths: the tokens of a row fill its slots from the first on,
and attention ends where the row ends. Within a turn, rows that have ended it leave the batch.

On a GPU one step of decoding is many small kernels, and starting them takes longer than running
them. `--cuda-graph on` records a step once and replays it. No GPU has run that recording yet: it is
off by default, and the tests run the recorded function on the CPU alone.

Dimensions: B rows, b rows in the batch, T tokens, S slots of the cache, D hidden size.
"""

import functools
import time
from collections import defaultdict
from contextlib import contextmanager
from itertools import islice

import torch

PREFILL_TOKENS = 32_768     # in one forward pass of `Rows.feed`, with padding: bounds its memory
ASK_EVERY = {"cpu": 1, "cuda": 8}   # steps between two looks at who is left; a GPU must wait then
NARROW_FROM = 8             # rows: making a smaller batch narrower does not pay


# --- the clock ------------------------------------------------------------------------------------


class Clock:
    """Seconds by phase. A phase inside another one is counted for itself alone."""

    def __init__(self):
        self.seconds, self.open, self.since = defaultdict(float), [], 0.0

    def switch(self) -> None:
        """Books the time since the last switch on the innermost phase that is open."""
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()        # what a phase has started is counted in it
        now = time.perf_counter()
        if self.open:
            self.seconds[self.open[-1]] += now - self.since
        self.since = now

    def start(self, phase: str) -> None:
        """Opens a phase, inside the one that is open."""
        self.switch()
        self.open.append(phase)

    def stop(self, phase: str) -> None:
        """Closes the phase if it is the innermost one that is open."""
        if self.open[-1:] == [phase]:
            self.switch()
            self.open.pop()

    def take(self) -> dict[str, float]:
        """The seconds since the last call, by phase."""
        taken, self.seconds = dict(self.seconds), defaultdict(float)
        return taken


CLOCK = Clock()


@contextmanager
def timed(phase: str):
    """Books the seconds that a block, or as a decorator a function, takes on `phase` of CLOCK.

    An error that says that the GPU's memory is full gets the phase as `error.phase`.
    """
    CLOCK.start(phase)
    try:
        yield
    except torch.OutOfMemoryError as error:
        error.phase = getattr(error, "phase", phase)
        raise
    finally:
        CLOCK.stop(phase)


# --- the cache ------------------------------------------------------------------------------------


class Cache:
    """Keys and values: two buffers [B, heads, S, size of a head] a layer, written in place.

    What lies behind a row's last token is zero or out of date; the attention mask hides it. Each
    attention layer of the model calls `update`; before a forward pass, `aim` says where it writes.
    """

    def __init__(self, rows: int, slots: int):
        self.rows, self.slots = rows, slots
        self.buffers: list[tuple[torch.Tensor, torch.Tensor]] = []      # keys and values by layer

    def aim(self, rows: slice, slots: torch.Tensor, seen: int) -> None:
        """The next forward pass computes these rows, writes these slots [b, T], sees `seen`."""
        self.at, self.slots_written, self.seen = rows, slots, seen
        self.each = torch.arange(len(slots), device=slots.device)[:, None]          # [b, 1]

    def update(self, keys, values, layer: int, *_) -> list[torch.Tensor]:
        """Stores a layer's new keys and values, [b, heads, T, size]; returns all that is seen."""
        if layer == len(self.buffers):
            _, heads, _, size = keys.shape
            shape = (self.rows, heads, self.slots, size)
            self.buffers.append((keys.new_zeros(shape), values.new_zeros(shape)))
        for buffer, new in zip(self.buffers[layer], (keys, values)):
            # [b, T, heads, size]
            buffer[self.at][self.each, :, self.slots_written] = new.transpose(1, 2)
        return [buffer[self.at, :, :self.seen] for buffer in self.buffers[layer]]

    def arrange(self, index: torch.Tensor, slots: int, used: int) -> None:
        """Puts rows `index`, repeats allowed, into new buffers of `slots` slots; copies `used`.

        It goes layer by layer, so that one layer's old buffers are freed before the next layer's
        new ones are made.
        """
        for layer, old in enumerate(self.buffers):
            self.buffers[layer] = tuple(
                buffer.new_zeros(len(index), buffer.shape[1], slots, buffer.shape[3])
                for buffer in old)
            for new, buffer in zip(self.buffers[layer], old):
                new[:, :, :used] = buffer[index, :, :used]
        self.rows, self.slots = len(index), slots


# --- the rows -------------------------------------------------------------------------------------


class Rows:
    """B rows, one for each episode that is being written, with one key-value cache.

    Rows lie at places of the batch. Within a turn, rows that have ended it move to the back, and
    only the first `width` places are computed; `order` says which row lies at which place.
    """

    cuda_graph = False              # --cuda-graph on sets it: record a step on the GPU, replay it

    def __init__(self, policy, room: int):
        """room: the most tokens of a turn; so many slots are kept free behind each piece."""
        self.policy, self.room = policy, room
        self.static = self.cuda_graph and policy.device.type == "cuda"
        self.graphs = {}            # by width: a function that replays one step
        self.cache = None
        self.order, self.width = [], 0
        self.batch = None           # [b], order[:width] on the device: the rows in the batch
        self.writing = None         # [b], True where the row has not ended its turn
        self.longest = 0            # no row has more tokens in the cache
        self.length = None          # [B], each row's tokens in the cache
        self.position = None        # [B], the next text position of each row
        self.newest_all = None      # [B, D], hidden state of each row's last token
        self.ids = None             # [B], what a step writes

    @property
    def count(self) -> int:
        """B: all rows, those that have left the batch included."""
        return len(self.order)

    @property
    def newest(self) -> torch.Tensor:
        """[b, D]: the hidden state of the last token of each row in the batch."""
        return self.newest_all[:self.width]

    @timed("prefill")
    def feed(self, episodes: list) -> None:
        """Computes keys, values and last hidden state of what is new in each episode.

        episodes: one for each row, in order. The cache holds an episode up to some token; from
        there on it is new, and so are the images whose placeholders stand there.
        """
        policy, known = self.policy, self._lengths(len(episodes))
        pieces = [episode.ids[start:] for episode, start in zip(episodes, known)]
        images = [new_images(policy, episode, piece) for episode, piece in zip(episodes, pieces)]
        features = iter(encode_images(policy, [image for row in images for image in row]))
        positions = [policy.positions(episode.ids, episode.images)[:, start:]
                     for episode, start in zip(episodes, known)]
        length = max(map(len, pieces))
        self._make_room(len(pieces), length)
        ids, where = padded(pieces, positions, policy.im_end, policy.device)    # [B, T], [3, B, T]
        sizes = torch.tensor([len(piece) for piece in pieces], device=policy.device)        # [B]
        slots = self.length[:, None] + torch.arange(length, device=policy.device)           # [B, T]
        at_once = max(1, PREFILL_TOKENS // length)
        for start in range(0, len(pieces), at_once):
            rows = slice(start, start + at_once)
            seen = list(islice(features, sum(map(len, images[rows]))))
            hidden = self._forward(rows, ids[rows], where[:, rows], slots[rows],
                                   self.longest + length, seen)                         # [b, T, D]
            newest = hidden[torch.arange(len(hidden), device=policy.device), sizes[rows] - 1]
            if self.newest_all is None:
                self.newest_all = newest.new_zeros(len(pieces), newest.shape[1])
            self.newest_all[rows] = newest
        self.length += sizes
        self.longest += length
        self.position[:] = torch.tensor([int(p.max()) + 1 for p in positions], device=policy.device)

    def _lengths(self, rows: int) -> list[int]:
        """How many tokens of each row the cache holds, in the order of the rows."""
        if self.cache is None:
            return [0] * rows
        by_row = dict(zip(self.order, self.length.tolist()))
        return [by_row[row] for row in range(rows)]

    def _make_room(self, rows: int, length: int) -> None:
        """Slots for a piece of `length` tokens and for the turn after it."""
        if self.cache is None:
            self.cache = Cache(rows, aligned(length + self.room))
            self.length, self.position, self.ids = torch.zeros(
                3, rows, dtype=torch.long, device=self.policy.device)
            self._use_all(rows)
            return
        self.longest = int(self.length.max())
        slots = aligned(self.longest + length + self.room)
        if slots > self.cache.slots or self.width < rows:
            self._arrange([self.order.index(row) for row in range(rows)], slots)

    def _forward(self, rows: slice, ids, positions, slots, seen: int, features) -> torch.Tensor:
        """Tokens [b, T] of some rows into their slots [b, T]. Hidden states [b, T, D].

        A token sees the slots of its row up to its own.
        """
        if seen == ids.shape[1]:
            visible = None              # a first piece: causal attention, which needs no mask
        else:
            columns = torch.arange(seen, device=ids.device)
            visible = (columns <= slots[..., None])[:, None]                        # [b, 1, T, S]
        self.cache.aim(rows, slots, seen)
        return self.policy.hidden(ids, positions, visible, features, self.cache)

    def begin_turn(self) -> None:
        """Every row writes again."""
        self.writing = torch.ones(self.width, dtype=torch.bool, device=self.policy.device)
        self.steps = 0

    def step(self, ids: torch.Tensor) -> bool:
        """Computes one sampled token of each row in the batch, [b]. False: all turns have ended.

        Rows that have ended their turn compute as well while they are in the batch, into the slot
        that their next piece will fill.
        """
        self.writing = self.writing & (ids != self.policy.im_end)
        if self.steps % ASK_EVERY[ids.device.type] == 0:
            left = int(self.writing.sum())
            if left == 0:
                return False
            if left <= self.width // 2 and self.width > NARROW_FROM:
                ids = ids[self._narrow(self.writing.tolist())]
        self.steps += 1
        self.ids[:self.width] = ids
        if self.static and self.width not in self.graphs:
            self.graphs[self.width] = recorded(self._step, self.policy.device)
        (self.graphs[self.width] if self.static else self._step)()
        self.length[:self.width] += self.writing
        self.position[:self.width] += self.writing
        self.longest += 1
        return True

    def _step(self) -> None:
        """One step on tensors that stay where they are; it asks the device for no value."""
        rows = slice(0, self.width)
        seen = self.cache.slots if self.static else self.longest + 1
        positions = self.position[None, rows, None].expand(3, -1, -1)
        hidden = self._forward(rows, self.ids[rows, None], positions, self.length[rows, None],
                               seen, None)                                          # [b, 1, D]
        self.newest_all[rows] = hidden[:, 0]

    def _narrow(self, active: list[bool]) -> torch.Tensor:
        """Moves the active rows to the front; the others leave the batch.

        They change places with rows that have ended their turn, so at most half of the batch is
        copied. Returns the places that the active rows came from, [b].
        """
        width, places = sum(active), list(range(len(active)))
        leaving = [place for place in range(width) if not active[place]]
        coming = [place for place in range(width, len(active)) if active[place]]
        for a, b in zip(leaving, coming):
            places[a], places[b] = places[b], places[a]
            self.order[a], self.order[b] = self.order[b], self.order[a]
        device = self.policy.device
        here, there = (torch.tensor(moved, dtype=torch.long, device=device)     # both may be empty
                       for moved in (leaving + coming, coming + leaving))
        for tensor in (self.length, self.position, self.newest_all):
            tensor[here] = tensor[there]
        for buffer in (buffer for layer in self.cache.buffers for buffer in layer):
            buffer[here, :, :self.longest] = buffer[there, :, :self.longest]
        self.width, self.batch = width, torch.tensor(self.order[:width], device=device)
        came_from = torch.tensor(places[:width], device=device)
        self.writing = self.writing[came_from]
        return came_from

    @timed("prefill")
    def repeat(self, times: int) -> None:
        """Each row becomes `times` neighbouring rows: a group computes its prompt once."""
        places = [place for place in range(self.count) for _ in range(times)]
        self._arrange(places, self.cache.slots)

    @timed("prefill")
    def keep(self, rows: list[int]) -> None:
        """Drops all other rows: their episodes have ended."""
        self._arrange([self.order.index(row) for row in rows], self.cache.slots)

    def _arrange(self, places: list[int], slots: int) -> None:
        index = torch.tensor(places, device=self.policy.device)
        self.cache.arrange(index, slots, self.longest)
        self.length, self.position, self.newest_all, self.ids = (
            tensor[index] for tensor in (self.length, self.position, self.newest_all, self.ids))
        self.graphs = {}            # they know the old buffers
        self._use_all(len(places))

    def _use_all(self, rows: int) -> None:
        """Every row is in the batch, in order."""
        self.order, self.width = list(range(rows)), rows
        self.batch = torch.arange(rows, device=self.policy.device)


@timed("vision")
def encode_images(policy, images: list) -> list[torch.Tensor]:
    """The features of the images, [image tokens, D] each."""
    return policy.features(images)


def new_images(policy, episode, piece: list[int]) -> list:
    """The episode's last images, as many as have their placeholders in its last tokens `piece`."""
    placeholders, first = piece.count(policy.image_pad), len(episode.images)
    while placeholders > 0:
        first -= 1
        placeholders -= policy.image_tokens(episode.images[first])
    return episode.images[first:]


def padded(pieces: list[list[int]], positions: list[torch.Tensor], pad: int, device):
    """Tokens and positions of different lengths as tensors, [B, T] and [3, B, T].

    Any token does for padding: what comes next is written over it.
    """
    length = max(map(len, pieces))
    ids = torch.tensor([piece + [pad] * (length - len(piece)) for piece in pieces], device=device)
    where = [torch.nn.functional.pad(p, (0, length - p.shape[1])) for p in positions]
    return ids, torch.stack(where, dim=1).to(device)


def aligned(slots: int) -> int:
    """The next multiple of 64: attention kernels want masks whose length divides by 8."""
    return -(-slots // 64) * 64


def recorded(step, device: torch.device):
    """A function that replays `step` as a CUDA graph; on a CPU `step` itself.

    A graph repeats the kernels with the addresses they had: `step` must read and write tensors that
    stay, and must never ask the device for a value. PyTorch wants one run on another stream before
    the recording, so that libraries have their workspaces. Running a step twice does no harm: it
    writes the same slots again.
    """
    if device.type != "cuda":
        return step
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device):
        warm_up = torch.cuda.Stream()
        warm_up.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(warm_up):
            step()
        torch.cuda.current_stream().wait_stream(warm_up)
        with torch.cuda.graph(graph):
            step()
    return graph.replay


def in_batches(rollout, episodes_at_once: int):
    """`rollout`, a few groups at a time: at most so many episodes, and at least one group."""
    @functools.wraps(rollout)
    def call(policy, samples, *, group_size: int = 1, **more):
        groups, episodes = max(1, episodes_at_once // group_size), []
        for first in range(0, len(samples), groups):
            part = samples[first:first + groups]
            episodes += rollout(policy, part, group_size=group_size, **more)
        return episodes
    return call
