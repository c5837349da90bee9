"""Student copies and grades.

    python -m tests.coursework make FOLDER [--task N ...]     the code without the tasks' functions
    python -m tests.coursework grade FOLDER [--task N ...]    a table; exits with 0 if all passed

`make` cuts the bodies out of this very code, at the places that Python's own parser gives, so there
is no second version that could drift. `grade` takes only the tasks' files from a submission. Tests
and everything else are this copy's own. It guards against honest mistakes and tampered tests, not
against a programmer who wants to deceive it: a submission runs as you. Grade strangers' work in a
container.
"""

import argparse
import ast
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path

from .tasks import TASKS, Task

ROOT = Path(__file__).resolve().parents[2]
HERE = Path("tests/coursework")
COPIED = ("*.py", "README.md", "LICENSE", "requirements.txt", ".gitignore", "data", "extras",
          "tests")
# Students do not get the answers, the wrong versions and the list of bugs, which has the right
# lines in it; nor what runs leave behind.
LEFT_OUT = ("tests/coursework/README.md", "tests/coursework/wrong.py", "tests/test_coursework.py",
            "tests/mutants.py", "tests/mutants.md", "tests/test_mutants.py", "data/cache")
SECONDS = 120       # of one task, wall clock and processor time; importing transformers takes ten
MEMORY_MB = 8192    # of data; torch alone reserves some hundred


# --- make -----------------------------------------------------------------------------------------


def find(tree: ast.Module, name: str) -> ast.FunctionDef:
    """The function, or the method "Class.method", of this name at the top of a module.

    Raises KeyError.
    """
    node = tree
    for part in name.split("."):
        named = {child.name: child for child in node.body
                 if isinstance(child, (ast.ClassDef, ast.FunctionDef))}
        node = named[part]
    return node


def strip(source: str, tasks: dict[str, int]) -> str:
    """The source without the bodies of some functions, {name: its task}. Other lines stay as they
    are.

    >>> print(strip('def f(x):\\n    "Twice."\\n    y = 2\\n    return x * y\\n\\nz = 1', {"f": 3}))
    def f(x):
        "Twice."
        raise NotImplementedError("task 3: f is yours to write")
    <BLANKLINE>
    z = 1
    """
    lines, tree = source.splitlines(keepends=True), ast.parse(source)
    for name, number in tasks.items():
        function = find(tree, name)
        if ast.get_docstring(function) is None or len(function.body) < 2:
            raise ValueError(f"{name} needs a docstring, its specification, and a body")
        first, last = function.body[0].end_lineno, function.end_lineno      # docstring's, body's
        stub = f'raise NotImplementedError("task {number}: {name} is yours to write")\n'
        # as many entries as before, so that the line numbers of later functions stay valid
        lines[first:last] = [" " * function.body[0].col_offset + stub] + [""] * (last - first - 1)
    return "".join(lines)


def stubs(tasks: tuple[Task, ...]) -> dict[str, dict[str, int]]:
    """file -> function -> task."""
    files = {}
    for task in tasks:
        for file, name in task.functions:
            files.setdefault(file, {})[name] = task.number
    return files


def make(folder: Path, tasks: tuple[Task, ...]) -> None:
    """Writes the student copy into a new folder."""
    if folder.exists():
        sys.exit(f"{folder} exists; name a folder that does not")
    hidden = {str(ROOT / name) for name in LEFT_OUT}

    def ignore(directory, names):
        return {n for n in names if n in ("__pycache__", ".pytest_cache")
                or os.path.join(directory, n) in hidden}

    folder.mkdir(parents=True)
    for source in sorted(path for pattern in COPIED for path in ROOT.glob(pattern)):
        if source.is_dir():
            shutil.copytree(source, folder / source.name, ignore=ignore)
        else:
            shutil.copy2(source, folder)
    for file, names in stubs(tasks).items():
        (folder / file).write_text(strip((ROOT / file).read_text(), names))
    (folder / "ASSIGNMENTS.md").write_text(assignments(tasks))


def assignments(tasks: tuple[Task, ...]) -> str:
    """What the student reads."""
    text = ["# Assignments\n\nRead README.md first. The docstring of each function says exactly "
            "what it does: its shapes, formulas and edge cases. Test yourself as you go, and see "
            "all results with `python -m tests.coursework grade .`\n\n"
            "The open questions run the whole program: answer them when every function of your "
            "copy is written.\n"]
    for task in tasks:
        where = ", ".join(f"`{file}:{name}`" for file, name in task.functions)
        text.append(f"\n## Task {task.number}: {task.title}\n\n{where} (about {task.minutes} "
                    f"minutes)\n\n{task.write}\n\n"
                    f"    python -m pytest -q {task.test}\n\nOpen question. {task.question}\n")
    return "".join(text)


# --- grade ----------------------------------------------------------------------------------------


@dataclass
class Grade:
    """What came of one task."""
    task: Task
    passed: int
    total: int              # tests in the grader's own file
    mistake: str            # of the first test that failed; "" if none did

    @property
    def ok(self) -> bool:
        """Whether every test ran and passed."""
        return self.total > 0 and self.passed == self.total and not self.mistake


def workplace(submission: Path, scratch: Path, task: Task) -> str:
    """Fills `scratch` with this copy and, in their places, the submission's files of the tasks.

    Returns what the submission lacks for this task, or "".
    """
    for source in ROOT.glob("*.py"):
        shutil.copy(source, scratch)
    for part in ("data", "extras"):
        (scratch / part).mkdir()
        for source in (ROOT / part).glob("*.py"):
            shutil.copy(source, scratch / part)
    shutil.copytree(ROOT / HERE, scratch / HERE, ignore=shutil.ignore_patterns("__pycache__"))
    given = stubs(TASKS)
    for file in sorted({*given, "data/mat.py"}):    # data/mat.py: the open part of the last task
        if (submission / file).is_file():
            shutil.copy(submission / file, scratch / file)
        elif file in stubs((task,)):
            return f"the submission has no {file}"
    return ""


def limits(seconds: int) -> None:
    """Called in the child, before Python starts: the limits that the kernel keeps."""
    # the hard limit leaves room for those of task 8
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 10))
    resource.setrlimit(resource.RLIMIT_FSIZE, (256 << 20, 256 << 20))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_MB << 20, MEMORY_MB << 20))


def run_tests(scratch: Path, test: str, seconds: int) -> str:
    """Runs one test file in its own process group, which does not outlive the limit.

    Returns why the run was stopped, or "".
    """
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider",
               "--rootdir", str(scratch), "--junitxml", str(scratch / "report.xml"), test]
    environment = {"PATH": os.environ.get("PATH", os.defpath), "HOME": str(scratch),
                   "TMPDIR": str(scratch), "LANG": "C.UTF-8", "HF_HUB_OFFLINE": "1",
                   "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1",
                   "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    nothing = {name: subprocess.DEVNULL for name in ("stdin", "stdout", "stderr")}
    process = subprocess.Popen(command, cwd=scratch, env=environment, start_new_session=True,
                               preexec_fn=lambda: limits(seconds), **nothing)
    endless = f"ran longer than {seconds} s: an endless loop?"
    try:
        process.wait(seconds)
        if process.returncode == -signal.SIGXCPU:       # whichever clock is first
            return endless
        if process.returncode < 0:
            return f"stopped by the system ({signal.strsignal(-process.returncode)})"
        return ""
    except subprocess.TimeoutExpired:
        return endless
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)      # also the children that it left behind
        except ProcessLookupError:
            pass
        process.wait()


def read_report(report: Path) -> dict[str, str]:
    """test -> "" if it passed, else the line that it failed with.

    On Linux a skipped test has failed. Elsewhere it has passed: some tests ask for Linux.
    """
    results, faults = {}, {"failure", "error"}
    if sys.platform == "linux":
        faults.add("skipped")
    for case in ElementTree.parse(report).iter("testcase"):
        bad, said = next((child for child in case if child.tag in faults), None), ""
        if bad is not None:
            said = (bad.get("message") or "failed without words").strip().splitlines()[0]
        if said == "collection failure":        # the line that says why the import failed
            said = next((line[2:].strip() for line in reversed(bad.text.splitlines())
                         if line.startswith("E ")), said)
        results[case.get("name")] = said.removeprefix("Failed: ")
    return results


def grade(submission: Path, task: Task, seconds: int = SECONDS) -> Grade:
    """Runs the grader's own tests of one task on a submission."""
    source = (ROOT / task.test).read_text()
    wanted = [node.name for node in ast.parse(source).body
              if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]
    with tempfile.TemporaryDirectory(prefix="grade-") as folder:
        scratch = Path(folder)
        missing = workplace(submission, scratch, task)
        if missing:
            return Grade(task, 0, len(wanted), missing)
        stopped = run_tests(scratch, task.test, seconds)
        try:
            results = read_report(scratch / "report.xml")
        except (OSError, ElementTree.ParseError):
            ended = "the tests did not come to their end: does the code end the process?"
            return Grade(task, 0, len(wanted), stopped or ended)
    passed = sum(results.get(name) == "" for name in wanted)
    if stopped:
        return Grade(task, passed, len(wanted), stopped)
    if not wanted or not passed and not any(results.values()):
        return Grade(task, 0, len(wanted), "no test was collected")
    mistake = next((said for said in results.values() if said), "")
    return Grade(task, passed, len(wanted),
                 mistake or ("" if passed == len(wanted) else "a test did not run"))


def print_table(grades: list[Grade]) -> None:
    """One row for each task."""
    rows = [(str(g.task.number), ", ".join(f"{file}:{name}" for file, name in g.task.functions),
             f"{g.passed} of {g.total}", g.mistake or ("ok" if g.ok else "failed")) for g in grades]
    rows = [("task", "function", "passed", "likely mistake"), *rows]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    for *cells, mistake in rows:
        padded = [cell.ljust(width) for cell, width in zip(cells, widths, strict=True)]
        print("  ".join([*padded, mistake]).rstrip())


def main(arguments: list[str] | None = None) -> int:
    """Carries out `make` or `grade`. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.coursework",
                                     description="Student copies and grades.")
    parser.add_argument("what", choices=("make", "grade"))
    parser.add_argument("folder", type=Path,
                        help="make: the student copy, must not exist; grade: the submission")
    parser.add_argument("--task", type=int, nargs="+", choices=[t.number for t in TASKS],
                        help="only these tasks; default: all")
    parser.add_argument("--seconds", type=int, default=SECONDS,
                        help=f"time limit of one task's tests; default: {SECONDS}")
    options = parser.parse_args(arguments)
    tasks = tuple(t for t in TASKS if options.task is None or t.number in options.task)
    if options.what == "make":
        make(options.folder, tasks)
        numbers = ", ".join(str(t.number) for t in tasks)
        print(f"{options.folder}: student copy, tasks {numbers}; start with ASSIGNMENTS.md")
        return 0
    if not options.folder.is_dir():
        sys.exit(f"{options.folder} is no folder; name the folder of a submission")
    grades = [grade(options.folder, task, options.seconds) for task in tasks]
    print_table(grades)
    return 0 if all(g.ok for g in grades) else 1


if __name__ == "__main__":
    sys.exit(main())
