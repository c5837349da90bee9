"""How many calls of attention and how many operations the vision tower makes, with its windows one
by one (transformers) and in batches (extras/attention.py).

    python tests/measure/bench_vision.py                        six images of 720 x 720

The counts do not depend on the width of the layers, so they are narrow here; depth, windows and
patches are those of Qwen2.5-VL. On a GPU every operation costs some 5 to 10 microseconds to start,
whatever it computes. On a CPU the time is about the same.
"""

import argparse
import copy
import sys
import time
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VisionTransformerPretrainedModel)

from extras.attention import batch_windows


class Count(TorchDispatchMode):
    """Counts operations, and calls of attention among them."""

    def __init__(self):
        super().__init__()
        self.operations = self.attention = 0

    def __torch_dispatch__(self, function, types, arguments=(), more=None):
        self.operations += 1
        self.attention += "attention" in str(function)
        return function(*arguments, **(more or {}))


def towers(depth: int = 32, whole: tuple[int, ...] = (7, 15, 23, 31)) -> tuple:
    """A narrow vision tower twice: as transformers computes it, and with windows in batches."""
    torch.manual_seed(0)
    config = Qwen2_5_VLVisionConfig(depth=depth, hidden_size=64, num_heads=4, intermediate_size=128,
                                    out_hidden_size=64, fullatt_block_indexes=list(whole))
    plain = Qwen2_5_VisionTransformerPretrainedModel._from_config(
        config, attn_implementation="sdpa")
    batched = copy.deepcopy(plain)
    batch_windows(SimpleNamespace(model=SimpleNamespace(visual=batched)))
    return plain, batched


def inputs(grids: list[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Random patches of images with these grids, and the grids, as the tower takes them."""
    grid = torch.tensor([(1, *sides) for sides in grids])
    return torch.randn(int(grid.prod(1).sum()), 3 * 2 * 14 * 14), grid


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=6)
    parser.add_argument("--side", type=int, default=720, help="pixels")
    args = parser.parse_args()
    torch.set_num_threads(1)
    side, features = 2 * round(args.side / 28), []
    patches, grid = inputs([(side, side)] * args.images)
    for name, tower in zip(("one by one", "in batches"), towers()):
        with Count() as count:
            features.append(tower(patches, grid_thw=grid).pooler_output)
        start = time.perf_counter()
        tower(patches, grid_thw=grid)
        print(f"{name}: {count.attention:,} calls of attention, {count.operations:,} operations, "
              f"{time.perf_counter() - start:.1f} s")
    print(f"largest difference of a feature: {(features[0] - features[1]).abs().max().item():.1g}")


if __name__ == "__main__":
    main()
