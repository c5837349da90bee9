"""Many GPUs: the same step, shared among the processes that torchrun starts.

    torchrun --nproc-per-node 8 arft.py --task mat-coding

What it teaches: how little of reinforcement learning has to know that there are several processes.
Each of them (a rank) samples its own groups, so rewards and advantages are its own. It computes the
gradient of its own episodes' mean loss; `Optimizer.step` weighs that gradient by the share of the
episodes (or tokens) that the rank has of all, and the *sum* of the ranks' gradients is the gradient
of one process over all episodes.

    weights     FSDP2 (torch's fully_shard) keeps 1/N of every trained weight and of its optimiser
                state on each rank, in float32, and gathers all of them for rollout, update and
                evaluation (in bfloat16 if the model is)
    gradient    summed over ranks and scattered, once for each optimiser step
    the rest    numbers are summed, episodes are gathered, rank 0 writes

Weights stay gathered between two optimiser steps, because ranks sample for different lengths of
time: a gather inside a forward pass would make all wait for all at every layer, or for ever. So a
GPU holds weights and gradients whole (2 + 2 bytes a weight) and 1/N of the rest (12 bytes a
weight).

A leaf: with one process nobody imports this file. `--scale batch` needs the rewards of all ranks
and is refused. Left out: gathering layer by layer (32B and larger, full fine-tuning), several GPUs
for one episode.
"""

import atexit
import math
import os
import shutil
import sys
import tempfile
import traceback
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions, get_state_dict, set_state_dict)
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

import grpo
from extras import record, resume

PATIENCE = timedelta(minutes=30)        # how long ranks wait for one another: the longest rollout
WHOLE = {"full_state_dict": True, "cpu_offload": True, "ignore_frozen_params": True}


# --- who and how many -----------------------------------------------------------------------------


def join(config) -> None:
    """Joins the processes of torchrun. Only rank 0 prints and keeps a run folder."""
    if not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=PATIENCE)
    if rank():
        sys.stdout = open(os.devnull, "w")
        config.out = own_copy(config.resume) if config.resume else scratch()
        config.resume = config.resume and config.out
    gather([None])          # nobody starts before all have their copy


def rank() -> int:
    """The number of this process."""
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def scratch() -> str:
    """A run folder for the ranks that keep nothing; it is removed when the process ends."""
    folder = tempfile.mkdtemp(prefix=f"arft-rank-{rank()}-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return os.path.join(folder, "run")


def own_copy(folder: str) -> str:
    """Where a rank that keeps nothing reads and writes in place of the run folder."""
    def copy(a, b):
        return os.symlink(os.path.abspath(a), b) if a.endswith(".pt") else shutil.copy2(a, b)

    target = scratch()
    shutil.copytree(folder, target, copy_function=copy,
                    ignore=shutil.ignore_patterns("model", "best", "images"))
    return target


# --- numbers and objects --------------------------------------------------------------------------


def share(items):
    """This rank's part of what all ranks have alike: neighbours."""
    return items[len(items) * rank() // size():len(items) * (rank() + 1) // size()]


def gather(items: list) -> list:
    """Every rank's items behind one another, on every rank: the reverse of `share`."""
    if size() == 1:
        return items
    parts = [None] * size()
    dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def reduced(numbers, operation=dist.ReduceOp.SUM) -> list[float]:
    """The sums (or maxima) of the numbers over all ranks."""
    if size() == 1:
        return list(numbers)
    tensor = torch.tensor(numbers, dtype=torch.float64)
    dist.all_reduce(tensor, operation)
    return tensor.tolist()


# --- weights and gradients ------------------------------------------------------------------------


@contextmanager
def sharded(model: torch.nn.Module):
    """Cuts every trained weight into one part for each rank, in float32.

    Inside, the parts are the model's parameters, for an optimiser to take. Afterwards they are
    gathered for use, in the type that the weights had.
    """
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    used = {weight.dtype for weight in trained}
    assert len(used) == 1, "FSDP2 gathers the trained weights in one type"
    for weight in trained:
        weight.data = weight.data.float()           # master weights: see extras/weights.py
    frozen = {weight for weight in model.parameters() if not weight.requires_grad}
    precision = MixedPrecisionPolicy(param_dtype=used.pop(), reduce_dtype=torch.float32,
                                     cast_forward_inputs=False)
    fully_shard(model, ignored_params=frozen, reshard_after_forward=False, mp_policy=precision)
    yield
    model.unshard()


@contextmanager
def summed(model: torch.nn.Module):
    """Inside, the trained weights are this rank's parts and have the summed gradient of all ranks.

    Afterwards they are whole. FSDP2 sums at the end of a backward pass through the whole model. The
    episodes' passes go through its parts (vision, language model, lm_head) as often as each rank
    likes, so one more pass, over one token and times zero, ends them all.
    """
    for weight in model.parameters():
        if weight.requires_grad:        # FSDP2 takes the mean over ranks; an idle weight has none
            weight.grad = (torch.zeros_like(weight) if weight.grad is None
                           else weight.grad.mul_(size()))
    one = torch.zeros(1, 1, dtype=torch.long, device=next(model.parameters()).device)
    (model(input_ids=one, use_cache=False).logits.sum() * 0).backward()
    yield
    model.unshard()


class Optimizer(grpo.Optimizer):
    """grpo.Optimizer on several ranks. Its weights may be bfloat16: the parts are float32."""

    def __init__(self, policy, lr: float, max_norm: float):
        self.model = policy.model
        with sharded(policy.model):
            super().__init__(policy, lr, max_norm)

    def step(self, stats: dict[str, float], count: int) -> dict[str, float]:
        """One step on the mean over the episodes (or tokens) of all ranks; the statistics, too."""
        own = (count, stats["tokens"])
        everyone = reduced(own)
        part, of_tokens = (mine / max(total, 1) for mine, total in zip(own, everyone))
        names = [name for name in stats if name not in ("logp_error", "tokens")]
        shares = [stats[name] * (part if name == "loss" else of_tokens) for name in names]
        error, = reduced([stats["logp_error"]], dist.ReduceOp.MAX)
        stats = dict(zip(names, reduced(shares))) | {"logp_error": error, "tokens": everyone[1]}
        for weight in self.model.parameters():
            if weight.grad is not None:
                weight.grad.mul_(part)
        with summed(self.model):
            norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.max_norm)
            norm = (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item()
            if not math.isfinite(norm + stats["loss"]):
                norm = math.nan
            else:
                self.adamw.step()
        return stats | {"grad_norm": norm}


def equal_minibatches(layout):
    """The layout, with as many minibatches on every rank as on the rank that has the most.

    A rank with fewer gets empty ones: it has no gradient of its own, and steps with the others.
    """
    plain = layout.minibatches

    def minibatches(*arguments):
        parts = plain(*arguments)
        most, = reduced([len(parts)], dist.ReduceOp.MAX)
        return parts + [[]] * (int(most) - len(parts))
    layout.minibatches = minibatches
    return layout


# --- the run --------------------------------------------------------------------------------------


class Run(record.Run):
    """record.Run on several ranks: each has its share of the work, rank 0's folder is kept."""

    alone = False
    explain = None              # function of an error: (exit code, message), or None; see options

    def share(self, items):
        return share(items)

    def gather(self, items: list) -> list:
        return gather(items)

    def checkpoint_due(self) -> bool:
        """Rank 0 decides."""
        return gather([super().checkpoint_due()])[0]

    def weights(self) -> dict:
        return state(self.policy.model, self.optimizer.adamw) | {"ranks": size()}

    def save_model(self, folder) -> None:
        """Rank 0 alone."""
        if rank() == 0:
            super().save_model(folder)

    def refresh_report(self) -> None:
        """Rank 0 alone."""
        if rank() == 0:
            super().refresh_report()

    def __exit__(self, kind, error, trace) -> bool:
        """A rank that fails says so and ends at once: torchrun ends the others.

        None of them may wait for it in vain, so no `finally` of a caller runs either.
        """
        if error is not None:
            code, text = self.explain(error) or (1, "".join(traceback.format_exception(error)))
            print(f"arft.py: rank {rank()} of {size()}: {text}", file=sys.stderr, flush=True)
            os._exit(code)
        return super().__exit__(kind, error, trace)


# --- checkpoints ----------------------------------------------------------------------------------


@contextmanager
def parts(model: torch.nn.Module):
    """Inside, the model's trained weights are this rank's parts: those that the optimiser has."""
    if isinstance(model, FSDPModule):
        model.reshard()
    yield
    if isinstance(model, FSDPModule):
        model.unshard()


def state(model: torch.nn.Module, adamw: torch.optim.Optimizer) -> dict:
    """Trained weights and optimiser state by name, whole, on rank 0 ({} on the others).

    Any number of ranks can resume from it.
    """
    with parts(model):
        weights, moments = get_state_dict(model, adamw, options=StateDictOptions(**WHOLE))
    return {"weights": weights, "optimizer": moments}


def restore(run) -> None:
    """`resume.restore` where several processes wrote the checkpoint, or several read it.

    Other ranks than the first, and another number of ranks, draw anew.
    """
    saved, adamw = run.state, run.optimizer.adamw
    weights = resume.trained(run.policy)
    if run.alone:
        resume.check_names(weights, saved["weights"])
    if run.alone and hasattr(adamw, "masters"):
        resume.restore_learned(run.policy, run.optimizer,
                               saved | {"optimizer": as_masters(saved, list(weights))})
    else:
        group = adamw.param_groups[0]
        load_state(run.policy.model, adamw, by_name(saved, list(weights), group))
    if saved["ranks"] == size() and rank() == 0:
        resume.set_random_states(run.generator, saved["random"])
    else:
        run.generator.manual_seed(seed_of(run.config) + saved["step"])


def seed_of(config) -> int:
    """The seed of this rank's generator; rank 0 has that of a single process."""
    return config.seed + 1_000_003 * rank()


def by_name(saved: dict, names: list[str], group: dict) -> dict:
    """A checkpoint in the form of `state`.

    That of a single process has its optimiser's state in the order of `names`. group: the
    hyperparameters of the optimiser's parameter group.
    """
    if saved["ranks"] > 1:
        return saved
    of = saved["optimizer"]
    if "masters" in of:         # extras.weights.MasterAdamW
        weights = dict(zip(names, of["masters"]))
        moments = {name: {"step": torch.tensor(float(of["steps"])), "exp_avg": mean,
                          "exp_avg_sq": square}
                   for name, mean, square in zip(names, of["means"], of["squares"])}
    else:
        weights = saved["weights"]
        moments = {name: of["state"][i] for i, name in enumerate(names) if i in of["state"]}
    group = {name: value for name, value in group.items() if name != "params"}
    group["params"] = list(names)
    return {"weights": weights, "optimizer": {"state": moments, "param_groups": [group]}}


def as_masters(saved: dict, names: list[str]) -> dict:
    """A checkpoint of several processes as the state of a single one's MasterAdamW."""
    moments = [saved["optimizer"]["state"][name] for name in names]
    return {"steps": int(moments[0]["step"]),
            "masters": [saved["weights"][name] for name in names],
            "means": [m["exp_avg"] for m in moments],
            "squares": [m["exp_avg_sq"] for m in moments]}


def load_state(model: torch.nn.Module, adamw: torch.optim.Optimizer, saved: dict) -> None:
    """The reverse of `state`: every rank reads the whole and keeps its parts."""
    with parts(model):
        set_state_dict(model, adamw, model_state_dict=saved["weights"],
                       optim_state_dict=saved["optimizer"],
                       options=StateDictOptions(**WHOLE, strict=False))
