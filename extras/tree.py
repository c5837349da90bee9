"""Episodes as tensors: side by side in rows, or a group as one packed tree.

What it teaches: the G episodes of a group begin with the same prompt, and with an image in it the
prompt is most of what they are. In rows the model computes it G times. As a tree, the trunk is
there once, and G branches grow from it:

    ids         p p p  a a a  b b  c c c c  .        prompt, three continuations, padding
    positions   0 1 2  3 4 5  3 4  3 4 5 6           as in each episode's own row
    attention   p sees p; a sees p and a; b sees p and b; ... never what comes later

Nothing else has to change. Ids of a transformer meet in attention alone, and attention knows an
id's place from its position: so every hidden state is what it is in the episode's own row, and the
gradient, too, up to rounding. The last id of the prompt predicts the first of every continuation.
`--update rows` is the plain way; tests/test_tree.py compares the two.

Also here: which episodes are one group, and how many go through the model at once
(`micro_batches`).

Read next: grpo.py. Left out: what episodes share after the prompt (equal first turns); kernels that
skip the part of the mask that nobody sees: attention among the branches of long episodes costs more
in a tree than in rows.

Dimensions: B episodes, R rows of T ids each, P ids of a prompt, L ids of the longest episode, N
sampled ids.
"""

from dataclasses import dataclass

import torch

from policy import ImageInput, Policy
from rollout import Episode

# of a tree's length: kernels for masked attention want the mask's rows to begin at round addresses
MULTIPLE = 8


@dataclass
class Batch:
    """B episodes as the model takes them, and where their sampled ids are.
    In rows, R = B and T = L."""
    ids: torch.Tensor            # [R, T]
    positions: torch.Tensor      # [3, R, T]
    # rows: [R, T], 1 where there is an id; trees: [R, 1, T, T], True where T sees T
    attention: torch.Tensor
    images: list[ImageInput]     # row by row, in reading order
    mask: torch.Tensor           # [B, L], 1 where the policy sampled the id
    logp_old: torch.Tensor       # [B, L], at sampling; 0 elsewhere
    targets: torch.Tensor        # [N], the sampled ids, episode by episode
    states: torch.Tensor         # [N], row * T + column of the hidden state that predicts each

    def to(self, device: torch.device) -> "Batch":
        return Batch(**{name: value.to(device) if isinstance(value, torch.Tensor) else value
                        for name, value in vars(self).items()})


def pack(policy: Policy, episodes: list[Episode], layout: str) -> Batch:
    """layout: "tree", or "rows"."""
    return tree(policy, episodes) if layout == "tree" else collate(policy, episodes)


# --- rows -----------------------------------------------------------------------------------------


def collate(policy: Policy, episodes: list[Episode]) -> Batch:
    """One row for each episode, padded to one length. Padding is 0 in
    attention; which id it has does not matter."""
    ids, mask, logp_old = (padded([getattr(e, name) for e in episodes], kind) for name, kind in
                           (("ids", torch.long), ("mask", torch.float32), ("logp", torch.float32)))
    attention = padded([[1] * len(e.ids) for e in episodes], torch.long)
    positions = [policy.positions(e.ids, e.images) for e in episodes]
    positions = torch.stack([torch.nn.functional.pad(p, (0, ids.shape[1] - p.shape[1]))
                             for p in positions], dim=1)
    rows, columns = mask.nonzero(as_tuple=True)
    # an id is predicted by the one before it
    states = rows * ids.shape[1] + columns - 1
    return Batch(ids, positions, attention, [image for e in episodes for image in e.images], mask,
                 logp_old,
                 ids[rows, columns], states).to(policy.device)


def padded(rows: list[list], dtype: torch.dtype) -> torch.Tensor:
    """Lists of different lengths as one tensor, zeros behind them."""
    length = max(map(len, rows))
    return torch.tensor([[*row, *[0] * (length - len(row))] for row in rows], dtype=dtype)


# --- trees ----------------------------------------------------------------------------------------


def prompt_of(policy: Policy, episode: Episode) -> tuple[int, int]:
    """How many ids and how many images stand before the first sampled id."""
    length = episode.mask.index(1)
    holders, count = episode.ids[:length].count(policy.image_pad), 0
    while holders > 0:
        holders -= policy.image_tokens(episode.images[count])
        count += 1
    return length, count


def groups_of(policy: Policy, episodes: list[Episode]) -> list[list[int]]:
    """Indices of the episodes that have one prompt: the same ids and the very same images."""
    groups: dict[tuple, list[int]] = {}
    for i, episode in enumerate(episodes):
        length, count = prompt_of(policy, episode)
        groups.setdefault((*episode.ids[:length], *episode.images[:count]), []).append(i)
    return list(groups.values())


def tree_length(policy: Policy, episodes: list[Episode]) -> int:
    """Ids of the tree of one group's episodes."""
    prompt, _ = prompt_of(policy, episodes[0])
    return prompt + sum(len(e.ids) - prompt for e in episodes)


def tree(policy: Policy, episodes: list[Episode]) -> Batch:
    """One row for each group among the episodes: its prompt, and the
    continuations one behind the other."""
    groups = groups_of(policy, episodes)
    R, T = len(groups), max(tree_length(policy, [episodes[i] for i in group]) for group in groups)
    T = -(-T // MULTIPLE) * MULTIPLE
    mask, logp_old = (padded([getattr(e, name) for e in episodes], torch.float32)
                      for name in ("mask", "logp"))
    ids, positions = torch.zeros(R, T, dtype=torch.long), torch.zeros(3, R, T, dtype=torch.long)
    branch = torch.full((R, T), -1)         # 0: prompt; 1, 2, ...: that continuation; -1: padding
    images, states = [], [None] * len(episodes)
    for row, group in enumerate(groups):
        prompt, shown = prompt_of(policy, episodes[group[0]])
        ids[row, :prompt] = torch.tensor(episodes[group[0]].ids[:prompt])
        branch[row, :prompt] = 0
        images += episodes[group[0]].images[:shown]
        start = prompt
        for number, i in enumerate(group, 1):
            episode = episodes[i]
            stop = start + len(episode.ids) - prompt
            ids[row, start:stop] = torch.tensor(episode.ids[prompt:])
            branch[row, start:stop] = number
            images += episode.images[shown:]
            # where its ids are
            columns = torch.cat([torch.arange(prompt), torch.arange(start, stop)])
            positions[:, row, columns] = policy.positions(episode.ids, episode.images)
            states[i] = row * T + columns[mask[i].nonzero()[:, 0] - 1]
            start = stop
    targets = torch.tensor([token for e in episodes for token,
                            sampled in zip(e.ids, e.mask) if sampled])
    return Batch(ids, positions, sight(branch.to(policy.device)), images, mask, logp_old, targets,
                 torch.cat(states)).to(policy.device)


def sight(branch: torch.Tensor) -> torch.Tensor:
    """Who sees whom: an id sees the prompt and its own branch, up to itself. [R, T] -> bool [R, 1,
    T, T].

    >>> sight(torch.tensor([[0, 1, 1, 2]]))[0, 0].int()
    tensor([[1, 0, 0, 0],
            [1, 1, 0, 0],
            [1, 1, 1, 0],
            [1, 0, 0, 1]], dtype=torch.int32)
    """
    seen, sees = branch[:, None, :], branch[:, :, None]
    return ((seen == 0) | (seen == sees)).tril()[:, None]


# --- how much at once -----------------------------------------------------------------------------


def micro_batches(policy: Policy, episodes: list[Episode], limit: int,
                  layout: str) -> list[list[int]]:
    """Indices of the episodes of each forward pass: at most `limit` ids with padding, unless one
    episode has more.

    In rows like lengths go together. As trees, a group stays whole where its tree keeps to the
    limit, and else comes in parts that have the prompt each.
    """
    if layout == "rows":
        units = [[i] for i in range(len(episodes))]
    else:
        units = [part for group in groups_of(policy, episodes)
                 for part in branches(policy, episodes, group, limit)]
    lengths = [tree_length(policy, [episodes[i] for i in unit]) for unit in units]
    return [[i for unit in part for i in units[unit]] for part in cut(lengths, limit)]


def branches(policy: Policy, episodes: list[Episode], group: list[int],
             limit: int) -> list[list[int]]:
    """A group in parts, each of which is a tree of at most `limit` ids (or one episode)."""
    parts = [[]]
    for i in sorted(group, key=lambda i: len(episodes[i].ids)):
        if parts[-1] and tree_length(policy, [episodes[j] for j in (*parts[-1], i)]) > limit:
            parts.append([])
        parts[-1].append(i)
    return parts


def cut(lengths: list[int], limit: int) -> list[list[int]]:
    """Rows of these lengths in parts of at most `limit` ids each, padding to the longest included;
    short ones first.

    >>> cut([50, 30, 40, 90], 100)
    [[1, 2], [0], [3]]
    """
    parts, order = [], sorted(range(len(lengths)), key=lengths.__getitem__)
    for row in order:
        if parts and lengths[row] * (len(parts[-1]) + 1) <= limit:      # the newest is the longest
            parts[-1].append(row)
        else:
            parts.append([row])
    return parts
