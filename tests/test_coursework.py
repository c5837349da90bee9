"""The assignments: what a student gets, what the tests say about typical mistakes, and what does
not deceive the grader."""

import ast
import doctest
import importlib
import inspect
import multiprocessing
import os
import re
import select
import subprocess
import sys

import pytest

import arft
from conftest import ROOT
from coursework import __main__ as program
from coursework.tasks import TASKS
from coursework.wrong import CHANGES, WHOLE, changed, holder
from extras import options

NUMBERS = [task.number for task in TASKS]


def run_tests(number: int, folder) -> str:
    """Runs a task's tests here, in order. Returns the words of the first that fails, or ""."""
    module = importlib.import_module(f"coursework.test_task_{number:02d}")
    tests = [f for name, f in vars(module).items() if name.startswith("test_")]
    assert tests
    for i, test in enumerate(tests):
        needs = {}
        if "tmp_path" in inspect.signature(test).parameters:
            needs["tmp_path"] = folder / str(i)
            needs["tmp_path"].mkdir(parents=True)
        try:
            test(**needs)
        except (Exception, pytest.fail.Exception) as error:
            return str(error)
    return ""


@pytest.mark.filterwarnings("ignore:std")       # of one number, as a wrong version has it
@pytest.mark.parametrize("number", NUMBERS)
def test_typical_mistakes_are_named(number, monkeypatch, tmp_path):
    """With each wrong version in the place of the right one, the tests name that mistake."""
    wrong = [(file, name, changed(file, name, old, new), words)
             for task, file, name, old, new, words in CHANGES if task == number]
    wrong += [entry[1:] for entry in WHOLE if entry[0] == number]
    assert len(wrong) >= 5
    for i, (file, name, function, words) in enumerate(wrong):
        with monkeypatch.context() as patch:
            patch.setattr(*holder(file, name), function)
            assert words in run_tests(number, tmp_path / str(i))


@pytest.mark.parametrize("number", NUMBERS)
def test_a_task_needs_no_other_task(number, monkeypatch, tmp_path):
    """A student may take the tasks in any order: all other functions are still stubs."""
    def stub(*arguments, **names):
        raise NotImplementedError("another task")
    for task in TASKS:
        for file, name in task.functions if task.number != number else ():
            monkeypatch.setattr(*holder(file, name), stub)
    assert run_tests(number, tmp_path) == ""


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    folder = tmp_path_factory.mktemp("course") / "student"
    assert program.main(["make", str(folder)]) == 0
    return folder


def run_pytest(folder, *arguments):
    """Runs pytest in a copy of the code. Called in a fork, which has imported torch already."""
    for name, module in list(sys.modules.items()):
        if str(ROOT) in (getattr(module, "__file__", None) or ""):
            del sys.modules[name]
    sys.path[:] = [str(folder), *(path for path in sys.path if str(ROOT) not in path)]
    os.chdir(folder)
    pytest.main(["-q", "-p", "no:cacheprovider", "--tb=line", "--noconftest", *arguments])


def test_the_student_copy_fails_every_test_with_its_task(student):
    """One run over all tests of the copy. The full copy's own tests are part of this suite."""
    pytest_there = multiprocessing.get_context("fork").Process(
        target=run_pytest, args=(student, "--junitxml", "report.xml", "tests/coursework"))
    pytest_there.start()
    pytest_there.join(300)
    cases = list(program.ElementTree.parse(student / "report.xml").iter("testcase"))
    assert {case.get("classname") for case in cases} == {
        f"tests.coursework.test_task_{number:02d}" for number in NUMBERS}
    for case in cases:
        number, failure = int(case.get("classname")[-2:]), case.find("failure")
        assert failure is not None, case.get("name")
        assert f"NotImplementedError: task {number}: " in failure.get("message"), case.get("name")


def test_nothing_but_bodies_is_taken_out(student):
    """What is gone stood inside a task's function, below its docstring; what came is the stub."""
    files, compared = program.stubs(TASKS), 0
    for path in [*ROOT.glob("*.py"), *ROOT.glob("data/*.py"), *ROOT.glob("extras/*.py"),
                 *ROOT.glob("tests/test_*.py")]:
        name = str(path.relative_to(ROOT))
        if name in files:
            ours, theirs = (ast.parse((root / name).read_text()) for root in (ROOT, student))
            for function in files[name]:
                mine, other = program.find(ours, function), program.find(theirs, function)
                assert ast.get_docstring(mine) == ast.get_docstring(other)
                assert ast.dump(mine.args) == ast.dump(other.args) and len(other.body) == 2
                mine.body = other.body = []
            assert ast.dump(ours) == ast.dump(theirs), name
            compared += 1
        elif name not in program.LEFT_OUT:
            assert path.read_text() == (student / name).read_text()
    assert compared == len(files)


def test_answers_stay_with_the_teacher(student):
    for name in program.LEFT_OUT:
        assert not (student / name).exists(), name
    assert not list(student.rglob("__pycache__"))
    assert not (student / ".git").exists() and not (student / "runs").exists()
    told = (student / "ASSIGNMENTS.md").read_text()
    for task in TASKS:
        assert task.test in told and task.question in told and (ROOT / task.test).exists()


def test_the_questions_commands_take_existing_options():
    """Whole commands and single flags, in the questions and in the teacher's page."""
    known = options.parser_of(arft.Config)
    texts = [task.question for task in TASKS]
    commands = re.findall(r"`python arft.py (.*?)`", " ".join(texts))
    assert len(commands) >= 3
    for command in commands:
        known.parse_args(command.split())       # an unknown option ends the program
    page = (ROOT / "tests" / "coursework" / "README.md").read_text()
    flags = set(re.findall(r"(?<!\S)`?(--[a-z][a-z-]+)", " ".join([*texts, page])))
    mine = {"--task", "--seconds"}              # of `python -m tests.coursework`
    assert len(flags) > 8 and flags - mine <= set(known._option_string_actions)


def test_a_folder_that_exists_is_not_written_over(student):
    with pytest.raises(SystemExit, match="exists"):
        program.main(["make", str(student)])


def test_the_size_of_the_tasks():
    """Up to 15 statements for each, as the course promises, and an open question that asks for a
    number."""
    parsed = {file: ast.parse((ROOT / file).read_text()) for file in program.stubs(TASKS)}
    for task in TASKS:
        lines = 0
        for file, name in task.functions:
            function = program.find(parsed[file], name)
            lines += len({statement.lineno for node in function.body[1:]
                          for statement in ast.walk(node) if isinstance(statement, ast.stmt)})
        assert 4 <= lines <= 15, (task.number, lines)
        asks = "how many|which|what|share|smallest|number"
        assert re.search(asks, task.question, re.IGNORECASE) and task.minutes <= 40


def submission(folder, **texts):
    """A submission that holds only these files."""
    folder.mkdir()
    for name, text in texts.items():
        (folder / f"{name}.py").write_text(text)
    return folder


@pytest.fixture(scope="module")
def task_one():
    return (ROOT / "tools.py").read_text()


def test_grades_of_right_and_stub(student, task_one, tmp_path, capsys):
    right = submission(tmp_path / "right", tools=task_one)
    assert program.main(["grade", str(right), "--task", "1"]) == 0
    assert re.search(r"1 +tools.py:parse +7 of 7 +ok", capsys.readouterr().out)
    assert program.main(["grade", str(student), "--task", "1"]) == 1
    assert re.search(r"1 +tools.py:parse +0 of 7 +NotImplementedError: task 1",
                     capsys.readouterr().out)


def test_a_tampered_tests_folder_helps_nobody(student):
    """The grader takes neither tests that always pass nor a conftest that hides failures."""
    (student / "tests" / "coursework" / "test_task_01.py").write_text(
        "def test_an_answer():\n    pass\n")
    (student / "conftest.py").write_text(
        "def pytest_runtest_call(item):\n    item.obj = lambda: None\n")
    grade = program.grade(student, TASKS[0])
    assert not grade.ok and grade.passed == 0 and "task 1" in grade.mistake


@pytest.mark.parametrize("line, words", [
    ("while True: pass", "ran longer than 1 s"),
    ("import os; os._exit(0)", "did not come to their end"),
    ("def (", "SyntaxError"),
    ("import pytest; pytest.skip('no', allow_module_level=True)", "skipped"),
    ("def parse(turn):\n    import pytest\n    pytest.skip('I pass')", "I pass")])
def test_what_ends_or_avoids_the_tests_is_a_failure(line, words, task_one, tmp_path):
    bad = submission(tmp_path / "bad", tools=f"{task_one}\n{line}\n")
    grade = program.grade(bad, TASKS[0], seconds=1 if "while" in line else 60)
    assert not grade.ok and grade.passed == 0 and words in grade.mistake


def test_children_do_not_outlive_the_limit(task_one, tmp_path, monkeypatch):
    """The limit falls once the child is there. A pipe without a writer then says that it is gone.
    """
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    child = f"file = open({str(pipe)!r}, 'wb', 0); file.write(b'x'); input()"
    parent = f"subprocess.run([sys.executable, '-c', {child!r}], stdin=subprocess.PIPE)"
    wait = subprocess.Popen.wait

    def wait_for_the_child(process, seconds=None):
        if seconds is None:
            return wait(process)
        assert select.select([reader], [], [], 60)[0] and os.read(reader, 9) == b"x"
        raise subprocess.TimeoutExpired(process.args, seconds)
    monkeypatch.setattr(subprocess.Popen, "wait", wait_for_the_child)
    code = f"{task_one}\nimport subprocess, sys\n{parent}\n"
    grade = program.grade(submission(tmp_path / "bad", tools=code), TASKS[0], seconds=50)
    assert "longer than 50 s" in grade.mistake
    assert select.select([reader], [], [], 60)[0] and os.read(reader, 9) == b""
    os.close(reader)


def test_no_test_at_all_is_a_failure(task_one, tmp_path, monkeypatch):
    """A grader that collects nothing must not call that a pass."""
    empty = program.Task(1, "nothing", TASKS[0].functions, "", 1, "")
    monkeypatch.setattr(program.Task, "test", "tests/coursework/check.py")
    grade = program.grade(submission(tmp_path / "right", tools=task_one), empty)
    assert not grade.ok and grade.mistake == "no test was collected"


def test_a_missing_file_is_named(tmp_path):
    assert program.grade(submission(tmp_path / "empty"),
                         TASKS[0]).mistake == "the submission has no tools.py"


def test_a_function_without_specification_cannot_be_a_task():
    """And `strip` does what its example says."""
    assert doctest.testmod(program).failed == 0 < doctest.testmod(program).attempted
    with pytest.raises(ValueError, match="docstring"):
        program.strip("def f(x):\n    return x\n", {"f": 1})
