"""Two processes (gloo, CPU) against one: loss, gradient, weights, checkpoints; and a rank that
fails.

The workers are this file, run as a script with torchrun's environment variables.
"""

import copy
import os
import pickle
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np
import pytest
import torch
import torch.distributed as dist

import grpo
from arft import Config
from data import mini
from data.mat import Sample
from extras import many
from extras.weights import load
from policy import LORA_TARGETS, PolicyError
from rollout import Limits, RowLayout, rollout
from tools import Tools

WAYS = ("lora", "full")
ADVANTAGES = torch.tensor([1.0, -0.5, 0.3, -0.8, 0.7, -1.2, 0.9, -0.4])
# how many of the 8 episodes are rank 0's; "idle": rank 1 has none
SPLITS = {"uneven": 3, "idle": 8}


def options(**changes):
    base = dict(inner_epochs=1, minibatches=1, temperature=1.0, loss_type="grpo", clip_low=0.2,
                clip_high=0.2, beta=0.04, max_sampled=480, group_size=1, zero_variance="keep")
    return SimpleNamespace(**base | changes)


def learner(way):
    """data/tiny, its reference and AdamW, as arft.train makes them."""
    policy = load(str(ROOT / "data" / "tiny"))
    torch.manual_seed(3)
    if way == "lora":
        policy.add_lora(4, 8.0, LORA_TARGETS)
        for adapter in policy.adapters.values():
            torch.nn.init.normal_(adapter.B, std=0.02)
    else:
        policy.model.model.visual.requires_grad_(False)
    reference = grpo.reference_of(policy)
    optimizer = many.Optimizer if many.size() > 1 else grpo.Optimizer
    return policy, reference, optimizer(policy, 1e-3, 1.0)


def step(policy, reference, optimizer, episodes, advantages, config):
    """One update. Returns its statistics and the gradient that reached the
    optimiser, whole, by name."""
    seen, true = {}, optimizer.adamw.step

    def record():
        for name, weight in policy.model.named_parameters():
            if weight.grad is not None:
                whole = getattr(weight.grad, "full_tensor", lambda grad=weight.grad: grad)()
                seen[name] = whole.clone()
        true()
    optimizer.adamw.step = record
    layout = RowLayout(700)
    layout = many.equal_minibatches(layout) if many.size() > 1 else layout
    stats = grpo.update(policy, reference, episodes, advantages, config, optimizer=optimizer,
                        layout=layout, generator=torch.Generator().manual_seed(0))
    optimizer.adamw.step = true
    return stats, seen


def weights_of(policy):
    return {name: weight.detach().clone() for name, weight in policy.model.named_parameters()
            if weight.requires_grad}


def experiment(way, episodes, resumed, split=None):
    """One update by each loss and split, then a second one from a checkpoint of one process."""
    cut = slice(None)
    if split is not None:
        cut = slice(0, split) if many.rank() == 0 else slice(split, None)
    policy, reference, optimizer = learner(way)
    out = {"names": sorted(weights_of(policy)),
           "first": step(policy, reference, optimizer, episodes[cut], ADVANTAGES[cut], options()),
           "state": copy.deepcopy(many.state(policy.model, optimizer.adamw)),
           "weights": weights_of(policy)}
    if resumed is not None:
        policy, reference, optimizer = learner(way)
        many.load_state(policy.model, optimizer.adamw, resumed)
    out["second"] = step(policy, reference, optimizer, episodes[cut], ADVANTAGES[cut],
                         options(loss_type="dapo"))
    return out


def work(folder):
    """What each of the two processes does."""
    many.join(SimpleNamespace(resume=None, out="unused"))
    episodes = pickle.loads((folder / "episodes").read_bytes())
    results = {}
    for way in WAYS:
        resumed = torch.load(folder / f"{way}.pt")
        for name, split in SPLITS.items():
            results[way, name] = experiment(way, episodes, resumed, split)
    results["share"] = many.share(list("abcde"))
    results["gather"] = many.gather(results["share"])
    results["total"] = many.reduced([many.rank() + 1, 10])
    results["largest"] = many.reduced([many.rank(), -many.rank()], dist.ReduceOp.MAX)
    torch.save(results, folder / f"rank-{many.rank()}")


def fail():
    """Rank 1 meets bad input while rank 0 waits for it."""
    config = Config(out=tempfile.mkdtemp() + "/run")
    many.join(config)
    many.Run.explain = staticmethod(lambda error: (2, str(error)))
    with many.Run(config):
        if many.rank():
            raise PolicyError("the model folder is gone")
        many.reduced([1])


def launch(*arguments, expect=0):
    """Two processes as torchrun starts them. Returns what they said on stderr."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    processes = [subprocess.Popen(
        [sys.executable, *map(str, arguments)], stderr=subprocess.PIPE, text=True, cwd=ROOT,
        env=os.environ | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
                          "MASTER_ADDR": "127.0.0.1",
                          "MASTER_PORT": port, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"})
                 for rank in range(2)]
    said = [process.communicate(timeout=300)[1] for process in reversed(processes)][::-1]
    assert processes[0].returncode == expect or expect is None, "\n".join(said)
    return [process.returncode for process in processes], said


# --- tests ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """(one process's results, those of rank 0, those of rank 1)."""
    folder, samples = tmp_path_factory.mktemp("many"), []
    for i, problems in enumerate((("dark",), ("rotation90",))):
        drawn = mini.make_sample(problems, mini.texts("test"), np.random.default_rng(i))
        drawn["shown"].save(folder / f"{i}.png")
        samples.append(Sample(str(i), drawn["question"], (drawn["answer"],), folder / f"{i}.png",
                              problems, split="simple"))
    policy = load(str(ROOT / "data" / "tiny"))
    episodes = rollout(policy, samples, group_size=4, tools=Tools(),
                       limits=Limits(max_new_tokens=32, max_turns=2),
                       generator=torch.Generator().manual_seed(1))
    episodes = [SimpleNamespace(ids=e.ids, mask=e.mask, logp=e.logp, images=e.images)
                for e in episodes]
    one = {way: experiment(way, episodes, None) for way in WAYS}
    (folder / "episodes").write_bytes(pickle.dumps(episodes))
    for way in WAYS:
        torch.save(one[way]["state"], folder / f"{way}.pt")
    launch(__file__, folder)
    return one, *(torch.load(folder / f"rank-{rank}", weights_only=False) for rank in range(2))


def assert_close(got, expected, tolerance=1e-5):
    assert got.keys() == expected.keys() and got
    for name, value in expected.items():
        assert (got[name] - value).abs().max() <= tolerance * max(1, value.abs().max()), name


@pytest.mark.parametrize("which", ["first", "second"])
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("way", WAYS)
def test_two_processes_have_the_loss_and_gradient_of_one(both, way, split, which):
    """First: mean over sequences. Second: mean over tokens, after a
    checkpoint of one process was loaded by two."""
    one, *ranks = both
    stats, gradient = one[way][which]
    assert max(g.abs().max() for g in gradient.values()) > 1e-4
    for rank in ranks:
        got, seen = rank[way, split][which]
        assert_close(seen, gradient)
        for name, value in stats.items():
            assert got[name] == pytest.approx(value, abs=1e-5, rel=1e-5), name


@pytest.mark.parametrize("way", WAYS)
def test_weights_after_the_step_are_whole_and_equal(both, way):
    one, *ranks = both
    for rank in ranks:
        assert rank[way, "uneven"]["names"] == one[way]["names"]
        # AdamW's first step is lr * sign(gradient): where that is all but zero, its sign is
        # rounding
        large = {name: gradient.abs() > 1e-6 for name, gradient in one[way]["first"][1].items()}
        for name, weight in one[way]["weights"].items():
            difference = (rank[way, "uneven"]["weights"][name] - weight).abs()[large[name]]
            assert difference.numel() == 0 or difference.max() < 1e-4, name


@pytest.mark.parametrize("way", WAYS)
def test_one_process_goes_on_from_a_checkpoint_of_two(both, way):
    one, rank0, rank1 = both
    saved = rank0[way, "uneven"]["state"]
    assert not rank1[way, "uneven"]["state"]["weights"], "rank 0 writes"
    policy, _, optimizer = learner(way)
    many.load_state(policy.model, optimizer.adamw, saved)
    assert_close(weights_of(policy), rank0[way, "uneven"]["weights"], 0)
    moments = [state["exp_avg"] for state in optimizer.adamw.state_dict()["state"].values()]
    assert len(moments) == len(one[way]["names"]) and sum(m.abs().sum() for m in moments) > 0


def test_what_is_shared_comes_together_again(both):
    _, *ranks = both
    assert [r["share"] for r in ranks] == [["a", "b"], ["c", "d", "e"]]
    for rank in ranks:
        assert (rank["gather"] == list("abcde") and rank["total"] == [3, 20]
                and rank["largest"] == [1, 0])


def test_a_rank_that_fails_ends_with_its_message():
    """torchrun ends the others as soon as one has ended; here rank 0 sees
    that its partner is gone."""
    codes, said = launch(__file__, "fail", expect=None)
    assert codes[1] == 2 and codes[0] != 0
    assert (said[1].strip().endswith("arft.py: rank 1 of 2: the model folder is gone")
            and "Traceback" not in said[1])


if __name__ == "__main__":
    torch.set_num_threads(1)
    fail() if sys.argv[1] == "fail" else work(Path(sys.argv[1]))


def test_a_checkpoint_of_one_process_has_names_for_several(fresh_policy):
    """One AdamW step; its state by names, loaded into a fresh optimiser, is the
    same state. And masters go there and back."""
    def trained(policy):
        optimizer = torch.optim.AdamW(policy.model.lm_head.parameters(), lr=0.1, weight_decay=0.0)
        policy.model.requires_grad_(False)
        policy.model.lm_head.requires_grad_(True)
        return optimizer
    optimizer = trained(fresh_policy)
    weight = fresh_policy.model.lm_head.weight
    name, = (name for name, w in fresh_policy.model.named_parameters() if w is weight)
    weight.grad = torch.randn_like(weight)
    optimizer.step()
    saved = {"ranks": 1, "weights": {name: weight.detach().clone()},
             "optimizer": optimizer.state_dict()}
    named = many.by_name(saved, [name], optimizer.param_groups[0])
    assert (named["optimizer"]["param_groups"][0]["params"] == [name]
            and named["optimizer"]["param_groups"][0]["lr"] == 0.1)
    moments = optimizer.state[weight]
    assert all(torch.equal(named["optimizer"]["state"][name][key], moments[key])
               for key in ("step", "exp_avg", "exp_avg_sq"))
    masters = many.as_masters(named | {"ranks": 2}, [name])
    assert masters["steps"] == 1 and torch.equal(masters["means"][0], moments["exp_avg"])
    back = many.by_name({"ranks": 1, "weights": {}, "optimizer": masters}, [name],
                        optimizer.param_groups[0])
    assert torch.equal(back["weights"][name],
                       weight) and torch.equal(back["optimizer"]["state"][name]["step"],
                                               torch.tensor(1.0))
