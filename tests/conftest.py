"""What the tests share: the modules on the path, the embedded checkpoint, one sandbox, MAT-mini in
memory, one whole run."""

import contextlib
import io
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"      # no test goes to the network, wherever there is one

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "measure")]

import numpy as np
import pytest
import torch

import arft
from data import mini, mini_search
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


# --- the second core ------------------------------------------------------------------------------

# The files that another process of pytest takes when the whole suite runs: about half of the time.
ELSEWHERE = ("test_resume.py", "test_many.py", "test_arft.py", "test_house.py", "test_search.py",
             "test_coursework.py")


def whole_suite(config) -> bool:
    """Whether `python -m pytest` was called without choosing tests, on two cores or more."""
    chosen = config.invocation_params.args or "PYTEST_ELSEWHERE" in os.environ
    return not chosen and (os.cpu_count() or 1) > 1


def pytest_configure(config):
    """Starts the tests of ELSEWHERE; this process leaves them out."""
    if not whole_suite(config):
        return
    for folder in (mini, mini_search):      # both processes need them: draw them once
        folder.ensure(ROOT / "data" / "cache")
    config.option.ignore = [str(ROOT / "tests" / name) for name in ELSEWHERE]
    config.elsewhere_says = tempfile.TemporaryFile("w+")
    files = [f"tests/{name}" for name in ELSEWHERE if (ROOT / "tests" / name).exists()]
    config.elsewhere = subprocess.Popen(        # a student's copy lacks some of the files
        [sys.executable, "-m", "pytest", "-q", *files], cwd=ROOT, stderr=subprocess.STDOUT,
        env=os.environ | {"PYTEST_ELSEWHERE": "1"}, stdout=config.elsewhere_says)


def pytest_sessionfinish(session, exitstatus):
    """The suite fails where the other process failed."""
    if hasattr(session.config, "elsewhere"):
        code = session.config.elsewhere.wait()      # below 0 where a signal ended it
        session.exitstatus = exitstatus or (code if code >= 0 else 1)


def pytest_terminal_summary(terminalreporter, config):
    """What the other process said."""
    if hasattr(config, "elsewhere"):
        config.elsewhere_says.seek(0)
        terminalreporter.section("in another process: " + " ".join(ELSEWHERE))
        terminalreporter.write(config.elsewhere_says.read())
        terminalreporter.write_line(f"the other process ended with code {config.elsewhere.wait()}")
