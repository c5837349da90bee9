"""A group as one packed tree: the update computes a prompt once, not once for each of G episodes.

The G episodes of a group begin with the same prompt, and with an image in it the prompt can be most
of what they are. In rows (rollout.RowLayout) the model computes it G times. As a tree, the trunk
is there once, and G branches grow from it:

    ids         p p p  a a a  b b  c c c c  .        prompt, three continuations, padding
    positions   0 1 2  3 4 5  3 4  3 4 5 6           as in each episode's own row
    attention   p sees p; a sees p and a; b sees p and b; ... never what comes later

Nothing else has to change. The tokens of a transformer meet in attention alone, and attention knows
a token's place from its position. So every hidden state is what it is in the episode's own row, and
the gradient, too, up to rounding. The last token of the prompt predicts the first of every
continuation. `--update tree` chooses this layout; tests/test_tree.py compares the two.

A leaf: you may delete this file, and `--update tree` then says that it is missing. Left out: what
episodes share after the prompt (equal first turns), and kernels that skip the part of the mask that
nobody sees: attention among the branches of long episodes costs more in a tree than in rows.

Dimensions: B episodes, R rows of T tokens each, P tokens of a prompt, L tokens of the longest
episode, N sampled tokens.
"""

from dataclasses import dataclass

import torch

from policy import Policy
from rollout import Batch, Episode, RowLayout, cut, padded

MULTIPLE = 8      # of a tree's length: kernels want the rows of a mask to begin at round addresses


@dataclass
class TreeLayout(RowLayout):
    """Groups as trees, in place of `RowLayout`."""

    def minibatches(self, policy: Policy, episodes: list[Episode], count: int,
                    generator: torch.Generator) -> list[list[int]]:
        """Whole groups, in a random order where there are several minibatches.

        A group that is torn apart would compute its prompt in each minibatch again. Fewer groups
        than `count` make fewer minibatches.
        """
        groups = groups_of(policy, episodes)
        order = super().minibatches(policy, groups, count, generator)
        return [[i for group in part for i in groups[group]] for part in order]

    def micro_batches(self, policy: Policy, episodes: list[Episode]) -> list[list[int]]:
        """A group stays whole where its tree keeps to the limit; else each part has the prompt."""
        units = [part for group in groups_of(policy, episodes)
                 for part in branches(policy, episodes, group, self.tokens)]
        lengths = [tree_length(policy, [episodes[i] for i in unit]) for unit in units]
        return [[i for unit in part for i in units[unit]] for part in cut(lengths, self.tokens)]

    def pack(self, policy: Policy, episodes: list[Episode]) -> Batch:
        return tree(policy, episodes)


def prompt_of(policy: Policy, episode: Episode) -> tuple[int, int]:
    """How many tokens and how many images stand before the first sampled token."""
    length = episode.mask.index(1)
    placeholders, count = episode.ids[:length].count(policy.image_pad), 0
    while placeholders > 0:
        placeholders -= policy.image_tokens(episode.images[count])
        count += 1
    return length, count


def groups_of(policy: Policy, episodes: list[Episode]) -> list[list[int]]:
    """Indices of the episodes that have one prompt: the same tokens and the very same images."""
    groups: dict[tuple, list[int]] = {}
    for i, episode in enumerate(episodes):
        length, count = prompt_of(policy, episode)
        groups.setdefault((*episode.ids[:length], *episode.images[:count]), []).append(i)
    return list(groups.values())


def tree_length(policy: Policy, episodes: list[Episode]) -> int:
    """Tokens of the tree of one group's episodes."""
    prompt, _ = prompt_of(policy, episodes[0])
    return prompt + sum(len(e.ids) - prompt for e in episodes)


def branches(policy: Policy, episodes: list[Episode], group: list[int],
             limit: int) -> list[list[int]]:
    """A group in parts, each of which is a tree of at most `limit` tokens (or one episode)."""
    parts = [[]]
    for i in sorted(group, key=lambda i: len(episodes[i].ids)):
        if parts[-1] and tree_length(policy, [episodes[j] for j in (*parts[-1], i)]) > limit:
            parts.append([])
        parts[-1].append(i)
    return parts


def tree(policy: Policy, episodes: list[Episode]) -> Batch:
    """One row for each group: its prompt, then its continuations one behind the other.

    ids [R, T], positions [3, R, T], attention bool [R, 1, T, T], True where T sees T.
    """
    groups = groups_of(policy, episodes)
    lengths = [tree_length(policy, [episodes[i] for i in group]) for group in groups]
    R, T = len(groups), -(-max(lengths) // MULTIPLE) * MULTIPLE
    mask = padded([torch.tensor(e.mask, dtype=torch.float32) for e in episodes])        # [B, L]
    logp_old = padded([torch.tensor(e.logp, dtype=torch.float32) for e in episodes])    # [B, L]
    ids, positions = torch.zeros(R, T, dtype=torch.long), torch.zeros(3, R, T, dtype=torch.long)
    branch = torch.full((R, T), -1)         # 0: prompt; 1, 2, ...: that continuation; -1: padding
    images, states = [], [None] * len(episodes)
    for row, group in enumerate(groups):
        columns = {}
        images += plant(policy, episodes, group, ids[row], positions[:, row], branch[row], columns)
        for i in group:         # the token before a sampled one predicts it
            states[i] = row * T + columns[i][mask[i].nonzero()[:, 0] - 1]
    targets = torch.tensor([token for e in episodes for token, sampled in zip(e.ids, e.mask)
                            if sampled])
    attention = sight(branch.to(policy.device))
    tensors = (ids, positions, attention, mask, logp_old, targets, torch.cat(states))
    return Batch(*(tensor.to(policy.device) for tensor in tensors), images)


def plant(policy: Policy, episodes: list[Episode], group: list[int], ids: torch.Tensor,
          positions: torch.Tensor, branch: torch.Tensor, columns: dict) -> list:
    """Writes one group's tree into its row: ids [T], positions [3, T], branch [T].

    columns gets, for each episode, the columns of its tokens, [its length]. Returns the images.
    """
    first = episodes[group[0]]
    prompt, shown = prompt_of(policy, first)
    ids[:prompt] = torch.tensor(first.ids[:prompt])
    branch[:prompt] = 0
    images, start = list(first.images[:shown]), prompt
    for number, i in enumerate(group, 1):
        episode = episodes[i]
        stop = start + len(episode.ids) - prompt
        ids[start:stop] = torch.tensor(episode.ids[prompt:])
        branch[start:stop] = number
        images += episode.images[shown:]
        columns[i] = torch.cat([torch.arange(prompt), torch.arange(start, stop)])
        positions[:, columns[i]] = policy.positions(episode.ids, episode.images)
        start = stop
    return images


def sight(branch: torch.Tensor) -> torch.Tensor:
    """Who sees whom: a token sees the prompt and its own branch, up to itself.

    [R, T] -> bool [R, 1, T, T].

    >>> sight(torch.tensor([[0, 1, 1, 2]]))[0, 0].int()
    tensor([[1, 0, 0, 0],
            [1, 1, 0, 0],
            [1, 1, 1, 0],
            [1, 0, 0, 1]], dtype=torch.int32)
    """
    seen, sees = branch[:, None, :], branch[:, :, None]
    return ((seen == 0) | (seen == sees)).tril()[:, None]
