"""The prose is executed: examples run, commands parse, and what a page names exists."""

import ast
import dataclasses
import doctest
import importlib
import re

import pytest

from arft import Config, main
from conftest import ROOT
from coursework.__main__ import LEFT_OUT
from extras import options, plan, setup
from extras.metrics import ENDINGS, LINE

READMES = ["README.md", "extras/README.md", "tests/README.md"]
TEACHERS = ["tests/mutants.md", "tests/coursework/README.md"]
# `tests.coursework make` leaves the teachers' pages, and what they tell of, out of a student copy.
STUDENT_COPY = (ROOT / "ASSIGNMENTS.md").exists()
PAGES = READMES if STUDENT_COPY else [*READMES, *TEACHERS, ".github/CONTRIBUTING.md"]
TEXT = {page: (ROOT / page).read_text() for page in PAGES}
README = TEXT["README.md"]
SOURCES = sorted(file for folder in (".", "data", "extras")
                 for file in (ROOT / folder).glob("*.py"))
EXAMPLES = [".".join(file.relative_to(ROOT).with_suffix("").parts)
            for file in SOURCES if ">>> " in file.read_text()]
# made by `tests.coursework make`, and by whoever adds a task
MADE_LATER = {"ASSIGNMENTS.md", "test_task_NN.py"}
# options of hf and torchrun
OTHERS = {"--repo-type", "--local-dir", "--nproc-per-node"}


# --- examples -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXAMPLES)
def test_docstring_examples(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0 and result.attempted > 0


def test_most_modules_have_examples():
    assert len(EXAMPLES) >= 10 and {"tools", "rewards", "grpo"} <= set(EXAMPLES)


@pytest.mark.parametrize("page", READMES)
def test_the_examples_of_a_page(page):
    result = doctest.testfile(str(ROOT / page), module_relative=False, encoding="utf-8")
    assert result.failed == 0
    assert result.attempted > 15 or page != "README.md"


# --- equations and laws ---------------------------------------------------------------------------


def test_every_equation_of_the_readme_stands_once_in_the_code_on_its_line():
    """As a comment behind the line that computes it, in a lesson file, and nowhere else."""
    code = [line for file in ROOT.glob("*.py") for line in file.read_text().split("\n")]
    tags = set(re.findall(r"Eq\. \(\d\)", README))
    assert len(tags) == 4
    for tag in tags:
        lines = [line for line in code if tag in line]
        assert len(lines) == 1 and re.search(r"\w.*  # " + re.escape(tag), lines[0]), (tag, lines)


def laws() -> dict[int, str]:
    """The numbered list of the README's section on laws: number -> text."""
    section = README.split("# Nine laws\n")[1].split("\n# ")[0]
    found = re.findall(r"^(\d)\. (.*(?:\n   .*)*)", section, re.MULTILINE)
    return {int(number): text for number, text in found}


def test_each_law_names_the_test_that_keeps_it():
    """That these tests exist is checked below, with all other names."""
    assert list(laws()) == list(range(1, 10))
    for number, text in laws().items():
        assert text.startswith("**") and re.search(r"`tests/test_\w+\.py:test_\w+`", text), number


def test_every_law_that_the_code_cites_is_stated():
    files = [*SOURCES, *(ROOT / "tests").rglob("*.py")]
    cited = {int(n) for file in files for n in re.findall(r"\blaw (\d+)", file.read_text())}
    assert cited and cited <= set(laws())


# --- names ----------------------------------------------------------------------------------------


def defined(file: str) -> set[str]:
    """The functions and classes of a file, and its methods as Class.method."""
    names = set()
    for node in ast.parse((ROOT / file).read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{part.name}" for part in node.body
                      if isinstance(part, ast.FunctionDef)}
    return names


@pytest.mark.parametrize("page", PAGES)
def test_every_function_and_test_that_a_page_names_exists(page):
    named = re.findall(r"`([\w/]+\.py):([\w.]+)`", TEXT[page])
    assert len(named) > 20 or page != "README.md"
    missing = [f"{file}:{name}" for file, name in named
               if not (ROOT / file).exists() or name not in defined(file)]
    assert not missing


@pytest.mark.parametrize("page", PAGES)
def test_every_file_that_a_page_names_exists(page):
    named = re.findall(r"`((?:[\w.]+/)*\w+\.(?:py|md|txt))`", TEXT[page])
    named += re.findall(r"`((?:data|tests|extras)/[\w/-]+/?)`", TEXT[page])
    named += re.findall(r"\bpython ((?:tests|extras|data)/[\w/]+\.py)", TEXT[page])
    named += [name.replace(".", "/") + ".py"
              for name in re.findall(r"\bpython -m (extras\.\w+)", TEXT[page])]
    # a page may name its neighbours, and conftest.py, without their folder
    near = (ROOT, (ROOT / page).parent, ROOT / "tests")
    missing = {name for name in named if not any((folder / name).exists() for folder in near)}
    missing -= MADE_LATER
    assert not missing - set(LEFT_OUT if STUDENT_COPY else ())


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page):
    """Of links to the network only those to sections and files of the repository are followed."""
    for target in re.findall(r"\]\(([^)\s]+)\)", TEXT[page]):
        if target.startswith("https://"):
            continue
        path, _, section = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), target
        if section:
            assert section in sections(file.read_text()), target


def sections(text: str) -> set[str]:
    """The anchors that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.*)", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


# --- what the program prints ----------------------------------------------------------------------

STEP_LINE = re.compile(
    r"step +\d+  reward \d\.\d\d  EM \d\.\d\d(?P<part>  (problem|query) \d\.\d\d)?"
    r"(?P<kl>  KL \d+\.\d{3})?(?P<entropy>  entropy \d\.\d\d)?(?P<tools>  tools \d+)?"
    r"(  failed \d+)?" + "".join(f"(  {said} \\d+)?" for said in ENDINGS.values() if said)
    + r"(  zero-variance \d+)?(?P<seconds>  \d+\.\d s)?(  !( [\w-]+)+)?")
MOST_IMPORTANT_FIRST = ("tools", "seconds", "part", "kl", "entropy")


def could_be_printed(line: str) -> bool:
    """Whether metrics.step_line can print it: what gives way first is gone before the rest."""
    match = STEP_LINE.fullmatch(line)
    there = [match[name] is not None for name in MOST_IMPORTANT_FIRST] if match else [False, True]
    return there == sorted(there, reverse=True) and len(line) <= LINE


def test_step_lines_are_told_from_others(short_run):
    printed = [line for line in short_run.said.split("\n") if line.startswith("step ")]
    assert len(printed) == 2 and all(map(could_be_printed, printed))
    assert not could_be_printed(printed[0].replace("  tools", "  calls"))
    assert not could_be_printed(re.sub(r"  tools \d+", "", printed[0]))


@pytest.mark.parametrize("page", READMES)
def test_the_step_lines_of_a_page_are_lines_that_the_program_prints(page):
    lines = [line for line in TEXT[page].split("\n") if re.match(r"step +\d+  reward", line)]
    assert len(lines) > 5 or page != "README.md"
    assert not [line for line in lines if not could_be_printed(line)]


def test_the_plan_of_the_manual_is_what_the_program_prints(capsys):
    block, = re.findall(r"^\$ python arft\.py (--plan .*)\n((?:.*\n)*?)```",
                        TEXT["extras/README.md"], re.MULTILINE)
    assert main(block[0].split()) == 0 and capsys.readouterr().out == block[1]


def test_the_memory_message_of_the_manual_is_what_the_program_prints():
    config = options.parse(Config, ["--model", setup.HUB_MODEL, "--lora-rank", "0", "--data", "x"])
    setup.complete(config)
    error = RuntimeError("out of memory")
    error.phase = "update"
    said = f"arft.py: {plan.out_of_memory_message(config, error)}\n"
    assert f"```\n{said}```" in TEXT["extras/README.md"]


# --- commands -------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES)
def test_every_flag_that_a_page_names_exists(page):
    ours = {"--" + field.name.replace("_", "-") for field in dataclasses.fields(Config)}
    scripts = "".join(file.read_text() for folder in ("tests", "data", "extras")
                      for file in (ROOT / folder).rglob("*.py") if file.name != "test_readme.py")
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", TEXT[page]))
    assert not {flag for flag in named - ours - OTHERS if f'"{flag}"' not in scripts}


def test_every_command_line_of_the_pages_parses():
    joined = "\n".join(TEXT.values()).replace("\\\n", " ")
    commands = re.findall(r"\barft\.py((?: +[^\s#;&|`]+)+)", joined)
    commands = [command for command in commands if command.lstrip().startswith("--")]
    assert len(commands) > 25
    parser = options.parser_of(Config)
    assert not [line for line in commands if not parses(parser, line.replace("$seed", "0"))]


def parses(parser, command: str) -> bool:
    try:
        return Config(**vars(parser.parse_args(command.split()))) is not None
    except SystemExit as end:       # 0: --help; else argparse has said why
        return end.code == 0
