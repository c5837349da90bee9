"""The house: what may stand where, and how much of it. These budgets keep the lesson small.

A lesson file holds what decides what is learned; extras/ holds what makes it safe, fast, resumable,
visible, larger, or a variant. Before you raise a number here, look for something that can go.
"""

import ast
import dataclasses
import re
import subprocess
import sys

import pytest

import leaves
from arft import Config
from conftest import ROOT
from extras import options
from grpo import Settings
from rewards import Scoring
from rollout import Limits

LESSON = ("arft", "policy", "tools", "rollout", "rewards", "grpo")      # in reading order
TOP = {*(f"{name}.py" for name in LESSON), "data", "tests", "extras", "README.md",
       "requirements.txt", "LICENSE"}
LINES, LINES_TOGETHER, COLUMNS, FUNCTION, NESTING, OPTIONS = 400, 1900, 100, 30, 3, 30
README_LINES, README_WORDS, TRAIN = 340, 3000, 20
# What each lesson file may import of the repository: the lesson's files below it, and of extras/
# one narrow name each.
IMPORTS = {"tools": {"extras.worker"}, "policy": set(), "rewards": {"data.mat"},
           "rollout": {"data.mat", "extras.engine", "policy", "tools"},
           "grpo": {"policy", "rollout"},
           "arft": {"data.mat", "extras.options", "extras.record", "grpo", "policy", "rewards",
                    "rollout", "tools"}}
TRACKED = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True,
                         text=True).stdout.split("\n")[:-1]
PYTHON = [name for name in TRACKED if name.endswith(".py")]
needs_git = pytest.mark.skipif(not TRACKED, reason="no checkout of git")


def source(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def tree(name: str) -> ast.Module:
    return ast.parse(source(f"{name}.py"))


def functions(module: ast.Module) -> list:
    return [node for node in ast.walk(module)
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


def function(name: str, called: str) -> ast.FunctionDef:
    return next(node for node in functions(tree(name)) if node.name == called)


def body_lines(node) -> int:
    """Lines from the first statement after the docstring to the end."""
    body = node.body[1:] if ast.get_docstring(node) else node.body
    return node.end_lineno - body[0].lineno + 1 if body else 0


def depth(node, level: int = 0) -> int:
    """How many blocks stand inside one another; `elif` is no block of its own."""
    deepest = level
    for field, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else []:
            if not isinstance(child, ast.AST):
                continue
            block = isinstance(child, (ast.For, ast.While, ast.If, ast.With, ast.Try))
            chained = field == "orelse" and isinstance(node, ast.If) and isinstance(child, ast.If)
            deepest = max(deepest, depth(child, level + (block and not chained)))
    return deepest


# --- what stands where ----------------------------------------------------------------------------


@needs_git
def test_the_top_level_is_the_lesson():
    found = {name.split("/")[0] for name in TRACKED}
    assert {name for name in found if not name.startswith(".")} == TOP


def test_lesson_files_are_short():
    lines = {name: len(source(f"{name}.py").splitlines()) for name in LESSON}
    assert max(lines.values()) <= LINES, lines
    assert sum(lines.values()) <= LINES_TOGETHER, lines


@needs_git
def test_no_line_is_wide():
    """In Markdown, tables, URLs and pictures excepted."""
    wide = []
    for name in TRACKED:
        if not name.endswith((".py", ".md")):
            continue
        for number, line in enumerate(source(name).split("\n"), 1):
            free = name.endswith(".md") and (line.startswith("|") or "](" in line or "://" in line)
            if len(line) > COLUMNS and not free:
                wide.append(f"{name}:{number}: {len(line)} columns")
    assert not wide, "\n".join(wide)


@needs_git
def test_functions_fit_a_screen():
    long = []
    for name in PYTHON:
        if name.startswith("tests/"):
            continue
        for node in functions(ast.parse(source(name))):
            if body_lines(node) > FUNCTION:
                long.append(f"{name}:{node.lineno} {node.name}: {body_lines(node)} lines")
    assert not long, "\n".join(long)


def test_the_lesson_is_flat():
    deep = [f"{name}.py:{node.lineno} {node.name}: {depth(node)}"
            for name in LESSON for node in functions(tree(name)) if depth(node) > NESTING]
    assert not deep, "\n".join(deep)


# --- who knows whom -------------------------------------------------------------------------------


def imported(name: str) -> set[str]:
    """The modules of the repository that a lesson file imports, wherever in the file."""
    found = set()
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module in ("extras", "data"):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
    return {module for module in found
            if module in LESSON or module.split(".")[0] in ("extras", "data", "tests")}


@pytest.mark.parametrize("name", LESSON)
def test_imports_point_down(name):
    assert imported(name) == IMPORTS[name]


def test_read_next_makes_one_line_through_the_lesson():
    """arft -> policy -> tools -> rollout -> rewards -> grpo; the last file names none."""
    for name, after in zip(LESSON, (*LESSON[1:], None)):
        said = re.findall(r"Read next:? (\w+)\.py", ast.get_docstring(tree(name)))
        assert said == ([after] if after else []), f"{name}.py"


def test_the_lesson_knows_no_machine():
    """Many processes, resuming and the memory plan are handed in, never named in the code.

    The rank of an adapter and gradient checkpointing are something else.
    """
    forbidden = {"rank", "world_size", "torchrun", "resume", "plan", "state_dict", "distributed",
                 "torch.save", "torch.load"}
    for name in LESSON:
        found = names_in(tree(name)) & forbidden - ({"rank"} if name == "policy" else set())
        assert not found, f"{name}.py: {found}"


def names_in(module: ast.Module) -> set[str]:
    """Every name that the code reads, defines or imports; of a dotted one its parts, too."""
    names = set()
    for node in ast.walk(module):
        for field in ("id", "attr", "arg", "name", "asname", "module"):
            names.add(getattr(node, field, None))
        if isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        if isinstance(node, ast.Attribute):
            names.add(ast.unparse(node))
    return {part for name in names if name for part in (name, *name.split("."))}


@pytest.mark.parametrize("code, name", [
    ("import torch.distributed as dist", "distributed"), ("from extras import resume", "resume"),
    ("from extras.resume import save", "resume"), ("from torch import load as read", "torch.load"),
    ("def plan(): pass", "plan"), ("class torchrun: pass", "torchrun"),
    ("f(rank=1)", "rank"), ("x.world_size", "world_size"), ("torch.save(x, y)", "torch.save")])
def test_a_name_is_found_wherever_it_stands(code, name):
    assert name in names_in(ast.parse(code))


def test_a_leaf_of_extras_can_be_deleted():
    """One of them, for real; tests/measure/leaves.py deletes each."""
    assert leaves.check("plan") == []


def test_the_lesson_imports_without_any_leaf():
    """Nothing but an option asks for them, and it then says which file is missing."""
    code = ("import sys\nfor name in sys.argv[1:]: sys.modules[f'extras.{name}'] = None\n"
            "import arft\nfrom extras import usage\nfor name in sys.argv[1:]:\n"
            "    try: usage.leaf(name, '--option')\n"
            "    except usage.UsageError as error: print(error)")
    done = subprocess.run([sys.executable, "-c", code, *leaves.LEAVES], cwd=ROOT,
                          capture_output=True, text=True)
    for name in leaves.LEAVES:
        assert f"--option needs extras/{name}.py" in done.stdout, done.stderr


# --- options --------------------------------------------------------------------------------------


def names_of(cls: type) -> set[str]:
    return {field.name for field in dataclasses.fields(cls)}


def test_the_lesson_has_few_options_and_reads_no_other():
    machine = names_of(options.Machine)
    assert len(names_of(Config) - machine) <= OPTIONS
    for name in LESSON:
        for node in ast.walk(tree(name)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and \
                    node.value.id in ("config", "settings", "limits", "scoring"):
                assert node.attr not in machine, f"{name}.py:{node.lineno} reads {node.attr}"


def test_each_file_reads_the_options_of_its_own_part():
    """An update also reads at which temperature it scores, and how long an episode can be."""
    parts = {"rollout": names_of(Limits), "rewards": names_of(Scoring),
             "grpo": names_of(Settings) | {"temperature", "max_sampled"}}
    for name, own in parts.items():
        read = {node.attr for node in ast.walk(tree(name)) if isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Name)
                and node.value.id in ("config", "settings", "limits", "scoring")}
        assert read and read <= own, f"{name}.py reads {read - own}"


# --- the step is visible --------------------------------------------------------------------------


def test_five_arrows_lead_from_main_to_the_loss():
    """main -> start -> train -> update -> accumulate -> policy_loss: each calls the next."""
    way = [("arft", "main"), ("arft", "start"), ("arft", "train"), ("grpo", "update"),
           ("grpo", "accumulate"), ("grpo", "policy_loss")]
    for (name, caller), (_, callee) in zip(way, way[1:]):
        calls = {node.func.id for node in ast.walk(function(name, caller))
                 if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
        assert callee in calls, f"{caller} does not call {callee}"


def test_the_step_is_one_loop():
    train = function("arft", "train")
    loops = [node for node in ast.walk(train) if isinstance(node, ast.For)]
    assert len(loops) == 1 and body_lines(train) <= TRAIN
    said = ast.unparse(loops[0])
    places = [said.index(word) for word in ("samples", "rollout(", "reward_of(",
                                            "group_advantages(", "update(")]
    assert places == sorted(places), "samples, rollout, reward, advantages, update"


def test_the_readme_is_an_evening_at_most():
    text = source("README.md")
    assert len(text.splitlines()) <= README_LINES and len(text.split()) <= README_WORDS
