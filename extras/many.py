"""Many GPUs: the same step, shared among the processes that torchrun starts.

    torchrun --nproc-per-node 8 arft.py --task mat-coding

What it teaches: how little of reinforcement learning has to know that there are several processes.
Each of them (a rank) samples its own groups and computes the gradient of its own episodes; every
number that the loss divides by is the sum over all ranks, so that the *sum* of the ranks' gradients
is the gradient of one process over all episodes.

    weights     FSDP2 (torch's fully_shard) keeps of every trained weight and of its optimiser state 1/N on each rank, in
                float32, and gathers all of them for rollout, update and evaluation (in bfloat16 if
                the model is)
    gradient    summed over ranks and scattered, once for each optimiser step
    the rest    numbers are summed, episodes are gathered, rank 0 writes

Weights stay gathered between two optimiser steps, because ranks sample for different lengths of
time: a gather inside a forward pass would make all wait for all at every layer, or for ever. So a
GPU holds weights and gradients whole (2 + 2 bytes a weight) and 1/N of the rest (12 bytes a
weight); `shard` and `summed` below are the whole engine.

No reader of the algorithm needs this file: with one process every function here gives back what it
was given. Left out: gathering layer by layer (32B and larger, full fine-tuning), several GPUs for
one episode.
"""

import atexit
import os
import shutil
import sys
import tempfile
import traceback
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

# how long ranks wait for one another: the longest rollout, not the network
PATIENCE = timedelta(minutes=30)


# --- who and how many -----------------------------------------------------------------------------


def start() -> None:
    """Joins the processes of torchrun; without torchrun nothing happens. Only rank 0 prints."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
                            timeout=PATIENCE)
    if rank():
        sys.stdout = open(os.devnull, "w")


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def scratch() -> str:
    """A run folder for the ranks that keep nothing; it goes when the process ends."""
    folder = tempfile.mkdtemp(prefix=f"arft-rank-{rank()}-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return os.path.join(folder, "run")


def own_copy(folder: str) -> str:
    """Where a rank that keeps nothing may read and write in place of the run
    folder that is resumed."""
    copy = scratch()
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("model", "best", "images"),
                    copy_function=lambda a, b: os.symlink(os.path.abspath(a), b)
                    if a.endswith(".pt") else shutil.copy2(a, b))
    return copy


@contextmanager
def together(explained):
    """A rank that fails inside says so and ends at once, and torchrun ends the others: none may
    wait for it in vain.

    explained(error): (exit code, message), or None for an error that needs its stack trace. With
    one process errors go their usual way.
    """
    try:
        yield
    except BaseException as error:
        if size() == 1:
            raise
        code, text = explained(error) or (1, traceback.format_exc())
        print(f"arft.py: rank {rank()} of {size()}: {text}", file=sys.stderr, flush=True)
        os._exit(code)      # no `finally` of the callers: they would wait for the other ranks


# --- numbers and objects --------------------------------------------------------------------------


def share(items: list) -> list:
    """This rank's neighbouring part of what all ranks have alike."""
    return items[len(items) * rank() // size():len(items) * (rank() + 1) // size()]


def gather(items: list) -> list:
    """Every rank's items behind one another, on every rank: the reverse of `share`."""
    if size() == 1:
        return items
    parts = [None] * size()
    dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def total(*numbers: float) -> list[float]:
    """The sums over all ranks."""
    return _reduced(numbers, dist.ReduceOp.SUM)


def largest(*numbers: float) -> list[float]:
    return _reduced(numbers, dist.ReduceOp.MAX)


def _reduced(numbers, operation) -> list[float]:
    if size() == 1:
        return list(numbers)
    tensor = torch.tensor(numbers, dtype=torch.float64)
    dist.all_reduce(tensor, operation)
    return tensor.tolist()


# --- weights and gradients ------------------------------------------------------------------------


@contextmanager
def shard(model: torch.nn.Module):
    """Cuts every trained weight into one part for each rank, in float32. Inside, the parts are the
    model's parameters, for an optimiser to take; afterwards they are gathered for use, in the type
    that the weights had."""
    if size() == 1:
        yield
        return
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    used = {weight.dtype for weight in trained}
    assert len(used) == 1, "FSDP2 gathers the trained weights in one type"
    for weight in trained:
        weight.data = weight.data.float()           # the masters: see grpo.MasterAdamW
    frozen = {weight for weight in model.parameters() if not weight.requires_grad}
    fully_shard(model, ignored_params=frozen, reshard_after_forward=False,
                mp_policy=MixedPrecisionPolicy(param_dtype=used.pop(), reduce_dtype=torch.float32,
                                               cast_forward_inputs=False))
    yield
    model.unshard()


@contextmanager
def summed(model: torch.nn.Module):
    """Inside, the trained weights are this rank's parts and have the gradient of all ranks;
    afterwards they are whole.

    FSDP2 sums at the end of a backward pass through the whole model. The episodes' passes go
    through its parts (vision, language model, lm_head) as often as each rank likes; so one more
    pass, over one id and times zero, ends them all.
    """
    if not isinstance(model, FSDPModule):
        yield
        return
    for weight in model.parameters():
        # FSDP2 takes the mean over ranks; a weight that no episode here went through has none
        if weight.requires_grad:
            weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad.mul_(
                size())
    one = torch.zeros(1, 1, dtype=torch.long, device=next(model.parameters()).device)
    (model(input_ids=one, use_cache=False).logits.sum() * 0).backward()
    yield
    model.unshard()


def norm_of(value: torch.Tensor) -> torch.Tensor:
    """A gradient norm of parts as the number that it is."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


# --- checkpoints ----------------------------------------------------------------------------------

WHOLE = {"full_state_dict": True, "cpu_offload": True, "ignore_frozen_params": True}


@contextmanager
def parts(model: torch.nn.Module):
    """Inside, the model's trained weights are this rank's parts: those that the optimiser has."""
    if isinstance(model, FSDPModule):
        model.reshard()
    yield
    if isinstance(model, FSDPModule):
        model.unshard()


def state(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict:
    """Trained weights and optimiser state by name, whole, on rank 0 ({} on the
    others): any number of ranks can go on."""
    with parts(model):
        weights, moments = get_state_dict(model, optimizer, options=StateDictOptions(**WHOLE))
    return {"weights": weights, "optimizer": moments}


def by_name(saved: dict, names: list[str], group: dict) -> dict:
    """A checkpoint in the form of `state`; one of a single process has its optimiser's state in the
    order of `names`.

    group: the hyperparameters of the optimiser's parameter group.
    """
    if saved["ranks"] > 1:
        return saved
    of = saved["optimizer"]
    if "masters" in of:         # grpo.MasterAdamW
        weights = dict(zip(names, of["masters"]))
        moments = {name: {"step": torch.tensor(float(of["steps"])), "exp_avg": mean,
                          "exp_avg_sq": square}
                   for name, mean, square in zip(names, of["means"], of["squares"])}
    else:
        weights, moments = saved["weights"], {name: of["state"][i] for i,
                                              name in enumerate(names) if i in of["state"]}
    group = {name: value for name,
             value in group.items() if name != "params"} | {"params": list(names)}
    return {"weights": weights, "optimizer": {"state": moments, "param_groups": [group]}}


def as_masters(saved: dict, names: list[str]) -> dict:
    """A checkpoint of several processes as the state of a single one's grpo.MasterAdamW."""
    moments = [saved["optimizer"]["state"][name] for name in names]
    return {"steps": int(moments[0]["step"]), "masters": [saved["weights"][name] for name in names],
            "means": [m["exp_avg"] for m in moments], "squares": [m["exp_avg_sq"] for m in moments]}


def load_state(model: torch.nn.Module, optimizer: torch.optim.Optimizer, saved: dict) -> None:
    """The reverse of `state`: every rank reads the whole and keeps its parts."""
    with parts(model):
        set_state_dict(model, optimizer, model_state_dict=saved["weights"],
                       optim_state_dict=saved["optimizer"],
                       options=StateDictOptions(**WHOLE, strict=False))
