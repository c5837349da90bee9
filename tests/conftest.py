"""What the tests share: the modules on the path, the embedded
checkpoint, one sandbox, MAT-mini in memory."""

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"      # no test goes to the network, wherever there is one

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "measure")]

import numpy as np
import pytest
import torch

from data import mini
from data.mat import Sample
from extras.weights import load
from tools import Sandbox, Tools

torch.set_num_threads(1)     # two wait for each other where another program is busy


@pytest.fixture(scope="session")
def policy():
    """data/tiny. Tests that train use `fresh_policy`."""
    return load(str(ROOT / "data" / "tiny"))


@pytest.fixture
def fresh_policy():
    return load(str(ROOT / "data" / "tiny"))


@pytest.fixture(scope="session")
def sandbox():
    with Sandbox(workers=2) as programs:
        yield programs


@pytest.fixture(scope="session")
def tools(sandbox):
    return Tools(sandbox)


@pytest.fixture
def samples(tmp_path):
    """One MAT-mini sample of each of some kinds, as mat.Sample, images on disk."""

    def make(*kinds: tuple[str, ...], seed: int = 0) -> list[Sample]:
        rng, made = np.random.default_rng(seed), []
        for i, problems in enumerate(kinds):
            drawn = mini.make_sample(problems, mini.texts("test"), rng)
            path = tmp_path / f"{i}.png"
            drawn["shown"].save(path)
            made.append(Sample(str(i), drawn["question"], (drawn["answer"],), path, problems,
                               split="simple"))
        return made

    return make
