"""The prose: docstring examples run, and what the README names exists."""

import doctest
import importlib
import re

import pytest

from arft import parse_options
from conftest import ROOT

README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("name", ["grpo", "pack", "paper", "policy", "record", "report", "rewards", "rollout", "tools",
                                  "data.mat", "data.mini"])
def test_docstring_examples(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0
    assert result.attempted > 0 or name in ("policy", "rollout"), "these two have no examples: they need a model"


def test_every_function_that_the_readme_names_exists():
    named = re.findall(r"`([\w/]+\.py):(\w+)`", README)
    assert len(named) > 5
    for file, name in named:
        assert re.search(rf"^(def|class) {name}\b", (ROOT / file).read_text(), re.MULTILINE), f"{file}:{name}"


def test_every_file_that_the_readme_names_exists():
    for file in re.findall(r"`((?:data/|tests/)?\w+\.py)`", README):
        assert (ROOT / file).exists(), file


def test_every_command_line_of_the_readme_parses():
    commands = re.findall(r"python arft\.py ([^#\n;&|]*)", README)
    assert len(commands) > 5
    for command in commands:
        parse_options(command.replace("$seed", "0").split())
