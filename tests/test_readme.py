"""The prose: docstring examples run, the README's examples run, and what it names exists."""

import dataclasses
import doctest
import importlib
import re

import pytest

from arft import Config, parse_options
from conftest import ROOT

README = (ROOT / "README.md").read_text()


MODULES = ["grpo", "policy", "rewards", "rollout", "tools", "data.mat", "data.mini",
           "data.mini_search", "extras.paper", "extras.record", "extras.report", "extras.tree"]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0
    assert result.attempted > 0 or name in ("policy", "rollout"), "these two need a model"


def test_the_readmes_examples():
    result = doctest.testfile(str(ROOT / "README.md"), module_relative=False, encoding="utf-8")
    assert result.failed == 0 and result.attempted > 15


def test_every_equation_of_the_readme_stands_once_in_the_code_on_its_line():
    """As a comment behind the line that computes it, and nowhere else."""
    code = [line for file in ROOT.glob("*.py") for line in file.read_text().split("\n")]
    tags = set(re.findall(r"Eq\. \(\d\)", README))
    assert len(tags) == 4
    for tag in tags:
        lines = [line for line in code if tag in line]
        assert len(lines) == 1 and re.search(r"\w.*  # " + re.escape(tag), lines[0]), (tag, lines)


def test_every_function_that_the_readme_names_exists():
    named = re.findall(r"`([\w/]+\.py):(\w+)`", README)
    assert len(named) > 5
    for file, name in named:
        assert re.search(rf"^(def|class) {name}\b", (ROOT / file).read_text(),
                         re.MULTILINE), f"{file}:{name}"


def test_every_file_that_the_readme_names_exists():
    for file in re.findall(r"`((?:data/|tests/|extras/)?\w+\.py)`", README):
        assert (ROOT / file).exists(), file


def test_every_flag_that_the_readme_names_exists():
    ours = {"--" + field.name.replace("_", "-") for field in dataclasses.fields(Config)}
    scripts = "".join(file.read_text() for folder in ("tests", "data", "extras")
                      for file in (ROOT / folder).rglob("*.py"))
    others = {"--repo-type", "--local-dir", "--nproc-per-node"}         # hf, torchrun
    for flag in set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README)) - ours - others:
        assert f'"{flag}"' in scripts, flag


def test_every_command_line_of_the_readme_parses():
    commands = re.findall(r"python arft\.py ([^#\n;&|`]*)", README)
    assert len(commands) > 5
    for command in commands:
        parse_options(command.replace("$seed", "0").split())
