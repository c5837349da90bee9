"""Attention in fewer calls: the vision tower's windows, all of one size at once.

Most layers of the tower cut an image into windows of at most 8 x 8 patches that attend to
themselves alone. transformers computes each window in a call of its own: 1,376 calls for an image
of 720 x 720. Here the windows of one size make one batch, and so do images of one size in the
layers that look at whole images. Nothing else changes, so the features are the same.

transformers hands all windows over at once, with their bounds, to an implementation of attention
that has "flash" in its name. Ours needs no such library: it is registered under a name of that
kind, and calls PyTorch's own attention.
"""

import functools

import torch
from transformers import AttentionInterface

NAME = "flash_windows_in_batches"


def batch_windows(model) -> None:
    """Lets the vision tower of a Qwen2.5-VL model compute its windows in batches."""
    AttentionInterface.register(NAME, attend)
    model.model.visual.config._attn_implementation_internal = NAME


def attend(module, query, key, value, attention_mask, scaling=None, cu_seq_lens_q=None, **_):
    """Attention of packed sequences, each to itself alone: [1, heads, P, d] -> [1, P, heads, d].

    cu_seq_lens_q: where the sequences begin, and P at the end.
    """
    groups, back = sequences_by_length(tuple(cu_seq_lens_q.tolist()), query.device)
    seen = []
    for rows in groups:                                                 # [sequences, length]
        q, k, v = (x[0, :, rows].transpose(0, 1) for x in (query, key, value))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scaling)
        seen.append(out.transpose(1, 2).flatten(0, 1))                  # [their patches, heads, d]
    return torch.cat(seen)[back][None], None


@functools.lru_cache(maxsize=64)        # every layer asks again
@torch.inference_mode(False)    # they are kept: a rollout makes them, and an update needs them, too
def sequences_by_length(bounds: tuple[int, ...],
                        device: torch.device) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The places of all sequences of one length, [sequences, length], for each length; and [P],
    where each place stands when these are put one behind the other.

    >>> groups, back = sequences_by_length((0, 1, 3, 4), torch.device("cpu"))
    >>> [rows.tolist() for rows in groups], back.tolist()
    ([[[0], [3]], [[1, 2]]], [0, 2, 3, 1])
    """
    found = {}
    for start, stop in zip(bounds, bounds[1:]):
        found.setdefault(stop - start, []).append(range(start, stop))
    groups = [torch.tensor([list(one) for one in rows]) for length, rows in found.items() if length]
    back = torch.cat([rows.flatten() for rows in groups]).argsort()
    return [rows.to(device) for rows in groups], back.to(device)
