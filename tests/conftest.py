"""What the tests share: the modules on the path, the embedded checkpoint, one sandbox, MAT-mini in
memory, one whole run."""

import contextlib
import io
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"      # no test goes to the network, wherever there is one

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "measure")]

import numpy as np
import pytest
import torch

import arft
from data import mini
from data.mat import Sample
from extras import record, setup
from extras.weights import load
from rewards import lexical_similarity
from tools import Sandbox, Tools

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # A shell's background job ignores Ctrl-C, and some tests send it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
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


# --- whole runs, and their parts ------------------------------------------------------------------


def parts_of(config: arft.Config, policy, tools: Tools | None = None) -> arft.Parts:
    """What arft.start hands to the loop; the run folder is config.out."""
    run = record.Run(config, policy)
    run.similarity = lexical_similarity
    return arft.Parts(**setup.choose_parts(config, policy, run, tools or Tools()))


SHORT_RUN = ["--task", "mat-coding", "--steps", "2", "--samples-per-step", "2", "--group-size", "4",
             "--eval-samples", "6", "--max-turns", "3", "--seed", "5", "--lr", "1e-3"]


def made_run(folder: Path, *arguments: str) -> SimpleNamespace:
    """A whole run of the program: its folder, exit code and standard output."""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        code = arft.main([*arguments, "--out", str(folder)])
    return SimpleNamespace(folder=folder, code=code, said=said.getvalue())


@pytest.fixture(scope="session")
def short_run(tmp_path_factory):
    """Two steps, evaluated before, between and after. Tests only read it."""
    return made_run(tmp_path_factory.mktemp("runs") / "short", *SHORT_RUN, "--eval-every", "1")


@pytest.fixture(scope="session")
def evaluation_run(tmp_path_factory):
    """An evaluation alone. Tests only read it."""
    return made_run(tmp_path_factory.mktemp("runs") / "evaluation", "--task", "mat-coding",
                    "--eval-only", "--eval-samples", "3")
