"""tools.py and jail.py, claim by claim: first the parser, then what an honest program gets, then what a hostile one
does not.

Every attack here is a real one: `test_the_attack_works_where_there_is_no_wall` runs the same lines in a sandbox whose
walls are left out and sees them succeed.  No test asserts a time.
"""

import io
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from importlib.util import find_spec

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

import jail
import tools
from tools import Action, Sandbox, SandboxError, parse

LINUX = sys.platform == "linux"
ALL = tuple(jail.LAYERS)
NO_IMAGE = f"no image was written to {jail.OUTPUT}"


# --- The parser ------------------------------------------------------------------------------------------------------

PAPER_TURNS = {     # as the released models write them
    "problem": ("<think>The picture is turned.</think>\n<problem> {'rotation90', 'dark'} </problem>",
                ("rotation90", "dark")),
    "code": ("<think> First turn it. </think>\n<code>\n```python\nfrom PIL import Image\nx = 1\n```\n</code>",
             "from PIL import Image\nx = 1"),
    "search": ("<think>Who is it?</think>\n<search> architect of the Atomium </search>",
               "architect of the Atomium"),
    "answer": ("<think>\nThe sign says\n\nEXIT.\n</think> <answer> 始发站：广安 </answer>", "始发站：广安"),
}


@pytest.mark.parametrize("kind", PAPER_TURNS)
def test_the_papers_turns_are_strict(kind):
    turn, value = PAPER_TURNS[kind]
    assert parse(turn) == Action(kind, value, None, True)


@pytest.mark.parametrize("kind", PAPER_TURNS)
@pytest.mark.parametrize("change", [
    lambda turn: "Well. " + turn,
    lambda turn: turn + "\nDone.",
    lambda turn: turn + "\n",
    lambda turn: turn.replace("</think>", "</think> so:"),
    lambda turn: turn[turn.index("</think>") + len("</think>"):],
    lambda turn: turn[turn.index("</think>") + len("</think>"):] + "<think>Afterwards.</think>",
])
def test_text_around_the_tags_is_run_but_earns_no_format_reward(kind, change):
    turn, value = PAPER_TURNS[kind]
    assert parse(change(turn)) == Action(kind, value, None, False)


@pytest.mark.parametrize("body, labels, strict", [
    ("{'dark'}", ("dark",), True),
    (" { 'rotation180' ,\n'noise' } ", ("rotation180", "noise"), True),
    ('{"dark", "blur"}', ("dark", "blur"), False),
    ("dark, blur", ("dark", "blur"), False),
    ("['none']", ("none",), False),
    ("(`overexposure`)", ("overexposure",), False),
    ("{‘dark’，‘blur’}", ("dark", "blur"), False),
    ("{'dark', 'dark',}", ("dark", "dark"), False),
    ("{'nan'}", ("nan",), True),
    ("{'dark''}", ("dark",), False),
])
def test_labels_in_any_spelling(body, labels, strict):
    assert parse(f"<think>t</think><problem>{body}</problem>") == Action("problem", labels, None, strict)


@pytest.mark.parametrize("body, program, strict", [
    ("```python\nx = 1\n```", "x = 1", True),
    ("\n```python\r\nx = 1\r\n```\n", "x = 1", True),
    ("```python x = 1```", "x = 1", True),
    ("\n  x = 1\n  if x:\n    y = 1\n", "x = 1\nif x:\n  y = 1", False),
    (" x = 1\ny = 2 ", "x = 1\ny = 2", False),
    ("```python\nif x:\n    y = 1\n```\nThis turns it.", "if x:\n    y = 1", True),
    ("Here:\n```python\n# 旋转\nx = '旋转'\n```", "# 旋转\nx = '旋转'", False),
    ("```\nx = 1\n```", "x = 1", False),
    ("```py\nx = 1\n```", "x = 1", False),
    ("\nx = 1\n", "x = 1", False),
    ("```python\nx = 1\n", "x = 1", False),
    ("```import os```", "import os", False),
])
def test_programs_with_and_without_a_fence(body, program, strict):
    assert parse(f"<think>t</think><code>{body}</code>") == Action("code", program, None, strict)


@pytest.mark.parametrize("turn, words", [
    ("", "no action"),
    ("It is dark.", "no action"),
    ("<think>It is dark.</think>", "no action"),
    ("<think>It is dark.", "<think> is not closed"),
    ("<think>t</think><answer>42", "<answer> is not closed"),
    ("<think>t</think>42</answer>", "</answer> comes without <answer>"),
    ("<think>t <answer>42</answer>", "<answer> begins before <think> is closed"),
    ("<code>x <answer>1</answer></code>", "<answer> begins before <code> is closed"),
    ("<think>t</think><answer>1</answer><answer>2</answer>", "<answer> occurs twice"),
    ("<think>t</think><think>t</think><answer>1</answer>", "<think> occurs twice"),
    ("<think>t</think><answer>1</answer></answer>", "<answer> occurs twice"),
    ("<answer>1<answer></answer>", "<answer> occurs twice"),
    ("<think>t</think><search>a</search><answer>1</answer>", "two actions in one turn: <search> and <answer>"),
    ("<think>t</think><answer> \n </answer>", "<answer> is empty"),
    ("<think>t</think><problem>{ , '' }</problem>", "<problem> is empty"),
    ("<think>t</think><code>\n```python\n```\n</code>", "<code> is empty"),
    ("<ANSWER>42</ANSWER>", "no action"),
])
def test_a_malformed_turn_says_why(turn, words):
    action = parse(turn)
    assert (action.kind, action.value, action.strict) == ("malformed", None, False)
    assert words in action.error and "\n" not in action.error


def test_values_stay_text():
    for word in ("nan", "inf", "1e400", "None", "{'a': 1}"):
        assert parse(f"<answer>{word}</answer>").value == word


@pytest.mark.parametrize("turn", [
    "<think>" * 150_000, "</answer>" * 100_000, "<think>" + "{'a'," * 200_000,
    "<think>t</think><problem>{" + "'a', " * 200_000 + "</problem>",
    "<think>t</think><problem>{" + "'" * 1_000_000 + "</problem>",
    "<think>t</think><problem>" + " " * 1_000_000 + "x</problem>",
    "<think>t</think><code>" + "`" * 1_000_000 + "</code>",
    "<think>t</think><code>```" + "a" * 1_000_000 + "</code>",
    "<think>t</think>" + " " * 1_000_000 + "<answer>1</answer>",
    "<" * 1_000_000, "\udcff\x00<answer>\ud800</answer>",
])
def test_a_megabyte_of_anything_is_parsed(turn):
    """Work that grows with the square of the length would take hours here."""
    assert parse(turn).kind in ("problem", "code", "search", "answer", "malformed")


def test_a_fault_ends_the_reading(monkeypatch):
    """The work is compared and not the time: of 150,000 tags two are looked at."""
    seen = []

    class Counting:
        def finditer(self, text):
            for tag in pattern.finditer(text):
                seen.append(tag)
                yield tag

    pattern = tools.TAG
    monkeypatch.setattr(tools, "TAG", Counting())
    assert parse("<think>" * 150_000).error == "the tag <think> occurs twice"
    assert len(seen) == 2


# --- What an honest program gets -------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def box():
    with Sandbox(workers=2) as sandbox:
        yield sandbox


@pytest.fixture(scope="module")
def picture():
    """Noise: every pixel counts, and a lossy file on the way would show."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8))


def program(*lines: str) -> str:
    """A program that opens the input, does `lines`, and writes PNG content under the paper's .jpg name."""
    return "\n".join(["from PIL import Image", f"image = Image.open('{jail.INPUT}')", *lines,
                      f"image.save('{jail.OUTPUT}', format='PNG')"])


def same(execution, expected: Image.Image) -> bool:
    assert execution.error is None, execution.error
    return execution.image.mode == "RGB" and execution.image.size == expected.size and (
        execution.image.tobytes() == expected.convert("RGB").tobytes())


def healthy(sandbox, picture) -> bool:
    return same(sandbox.run(program("image = image.rotate(90, expand=True)"), picture),
                picture.rotate(90, expand=True))


@pytest.mark.parametrize("lines, expected", [
    (["image = image.rotate(90, expand=True)"], lambda p: p.rotate(90, expand=True)),
    (["image = image.crop((8, 8, 40, 40)).resize((128, 128), Image.BICUBIC)"],
     lambda p: p.crop((8, 8, 40, 40)).resize((128, 128), Image.BICUBIC)),
    (["import numpy as np", "a = np.asarray(image).astype(float)",
      "image = Image.fromarray(np.clip(a * 1.5, 0, 255).astype('uint8'))"],
     lambda p: Image.fromarray(np.clip(np.asarray(p).astype(float) * 1.5, 0, 255).astype("uint8"))),
    (["# 旋转图片，然后变亮", "from PIL import ImageEnhance", "def 变亮(图片, 倍数=2.0):",
      "    return ImageEnhance.Brightness(图片).enhance(倍数)", "image = 变亮(image)"],
     lambda p: ImageEnhance.Brightness(p).enhance(2.0)),
    (["try:", "    image = image.no_such_method()", "except AttributeError:", "    image = image.convert('L')"],
     lambda p: p.convert("L")),
    (["import PIL.ImageOps as ops", "def flip(x): return ops.mirror(turn(x))", "def turn(x): return ops.flip(x)",
      "if __name__ == '__main__':", "    image = flip(image)"], lambda p: ImageOps.mirror(ImageOps.flip(p))),
    (["from dataclasses import dataclass", "@dataclass", "class Box:", "    left: int = 3",
      "image = image.crop((Box().left, 0, 9, 9))"], lambda p: p.crop((3, 0, 9, 9))),
    (["import tempfile, os", "with tempfile.NamedTemporaryFile(suffix='.png') as file:", "    image.save(file.name)",
      "    image = Image.open(file.name); image.load()"], lambda p: p),
    (["image = image.convert('RGBA').convert('P')"], lambda p: p.convert("RGBA").convert("P")),
    (["import sys; sys.exit"], lambda p: p),
], ids=["rotate", "crop and enlarge", "numpy", "Chinese", "try", "functions", "dataclass", "temporary file", "palette",
        "nothing"])
def test_an_ordinary_program_gives_exactly_the_right_pixels(box, picture, lines, expected):
    assert same(box.run(program(*lines), picture), expected(picture))


def test_a_jpeg_is_a_jpeg(box, picture):
    file = io.BytesIO()
    picture.save(file, "JPEG")
    code = f"from PIL import Image\nImage.open('{jail.INPUT}').save('{jail.OUTPUT}')"
    assert same(box.run(code, picture), Image.open(file))


@pytest.mark.parametrize("function", ["copy", "copy2", "copyfile", "move"])
def test_the_input_is_lossless_and_files_can_be_copied(box, picture, function):
    assert same(box.run(f"import shutil\nshutil.{function}('{jail.INPUT}', '{jail.OUTPUT}')", picture), picture)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1"])
def test_an_image_of_any_mode_goes_in_as_rgb(box, picture, mode):
    assert same(box.run(program(), picture.convert(mode)), picture.convert(mode).convert("RGB"))


@pytest.mark.skipif(not find_spec("cv2"), reason="OpenCV is not installed")
def test_opencv(box, picture):
    code = f"import cv2\nimage = cv2.imread('{jail.INPUT}')\nimage = cv2.rotate(image, cv2.ROTATE_180)\n"
    code += "cv2.imwrite('x.png', cv2.GaussianBlur(image, (3, 3), 0))\ncv2.imwrite('y.png', image)\n"
    code += f"import os\nos.replace('y.png', '{jail.OUTPUT}')"
    assert same(box.run(code, picture), picture.rotate(180))


@pytest.mark.skipif(bool(find_spec("cv2")), reason="OpenCV is installed")
def test_without_opencv_the_error_says_so(box, picture):
    assert box.run("x = 1\nimport cv2", picture).error == "ModuleNotFoundError: No module named 'cv2' (line 2)"


@pytest.mark.parametrize("code, error", [
    ("a = 1\nprint(b)", "NameError: name 'b' is not defined (line 2)"),
    ("def f():\n    return 1 / 0\n\nf()", "ZeroDivisionError: division by zero (line 2)"),
    ("x = (", "SyntaxError: '(' was never closed (line 1)"),
    ("x = 1\n  y = 2", "IndentationError: unexpected indent (line 2)"),
    ("\0", "source code string cannot contain null bytes"),
    ("from PIL import Image\nImage.open('nothing.jpg')", "FileNotFoundError: [Errno 2] No such file or directory: "
     "'nothing.jpg' (line 2)"),
    ("assert False", "AssertionError (line 1)"),
    ("raise KeyboardInterrupt", "KeyboardInterrupt (line 1)"),
    ("raise ValueError('two\\nlines\\x1b[2J')", "ValueError: two lines[2J (line 1)"),
    ("input()", "EOFError: EOF when reading a line (line 1)"),
    ("def f(): f()\nf()", "RecursionError: maximum recursion depth exceeded"),
    ("exit('no')", "the program stopped itself: exit('no')"),
    ("exit(0)", NO_IMAGE),
    ("", NO_IMAGE),
    ("x = '\ud800'", NO_IMAGE),
])
def test_an_error_is_one_line_for_the_model(box, picture, code, error):
    execution = box.run(code, picture)
    assert execution.image is None and error in execution.error and "\n" not in execution.error


def test_what_is_printed_comes_back_in_order(box, picture):
    code = "import sys\nprint('第一')\nprint('second', file=sys.stderr)\nprint(object())\nprint('\\x1b[2Jred')\n1 / 0"
    assert box.run(code, picture).stdout == "第一\nsecond\n<object object at 0x...>\n[2Jred\n"


def test_long_output_keeps_its_beginning_and_its_end(box, picture):
    text = box.run("print('first')\nfor i in range(100000): print(i)\nprint('旋' * 10)\nprint('last')", picture).stdout
    assert text.startswith("first\n0\n1\n") and text.endswith("last\n") and "left out" in text
    assert len(text) < tools.OUTPUT_CHARACTERS + 100


def test_the_same_program_gives_the_same_result(picture):
    code = program("import random, numpy as np", "print(random.random(), np.random.rand(), {'a', 'b', 'c', 'dark'})",
                   "import os; print(os.getcwd(), os.path.abspath('x')); open('nothing/x')")
    results = []
    for _ in range(2):
        with Sandbox(workers=1) as sandbox:
            results += [sandbox.run(code, picture), sandbox.run(code, picture)]
    assert len({(result.stdout, result.error) for result in results}) == 1


def test_map_keeps_the_order_and_runs_equal_jobs_once(box, picture):
    """The clock that a program prints is the same only if it ran once."""
    clock = "import time\nprint(time.perf_counter_ns())"
    twin = picture.copy()       # equal pixels, another object
    other = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    jobs = [(clock, picture), (f"print({1})", picture), (clock, twin), (clock, other)] + [(clock, picture)] * 4
    results = box.map(iter(jobs))
    assert [result is results[0] for result in results] == [True, False, True, False] + [True] * 4
    assert results[1].stdout == "1\n" and results[3].stdout != results[0].stdout
    assert box.map([]) == []


def test_a_hundred_at_once(box, picture):
    codes = [f"print({i})\n" + ("1 / 0", "import os; os._exit(1)", "import ctypes; ctypes.string_at(0)", "")[i % 4]
             for i in range(100)]
    assert [result.stdout for result in box.map([(code, picture) for code in codes])] == [f"{i}\n" for i in range(100)]


def test_many_threads_share_a_sandbox(box, picture):
    answers = {}

    def work(number):
        answers[number] = box.run(f"print({number})", picture).stdout

    threads = [threading.Thread(target=work, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {number: f"{number}\n" for number in range(12)}


def test_importing_tools_is_light():
    code = "import sys, tools; print('torch' in sys.modules, 'numpy' in sys.modules)"
    output = subprocess.run([sys.executable, "-c", code], cwd=os.path.dirname(tools.__file__), capture_output=True)
    assert output.stdout == b"False False\n"


# --- What a hostile program does not get -----------------------------------------------------------------------------

SECRET = "the gold answer is 42"
READING, WRITING = "landlock chroot", "landlock chroot"     # walls that stop it alone, all others left out
# name: (the walls that stop it alone, lines); {file}: a file of ours with a secret, {dir}: its directory, {pid}: a
# process of ours that must live, {port}: a server of ours, {unix}: an abstract socket of ours.
ATTACKS = {
    "read a file": (READING, "open({file!r}).read()"),
    "read it through the C library": (READING, "import ctypes; c = ctypes.CDLL(None)\n"
                                      "assert c.open({file!r}.encode(), 0) >= 0"),
    "read it through ..": (READING, "import os; open(os.path.relpath({file!r}, os.getcwd() or '/')).read()"),
    "read it through a link": (READING + " seccomp", "import os; os.symlink({file!r}, 'link'); open('link').read()"),
    "read it by a directory's descriptor": (READING, "import os; d = os.open({dir!r}, os.O_PATH)\n"
                                            "os.open(os.path.basename({file!r}), 0, dir_fd=d)"),
    "make it readable first": (READING, "import os; os.chmod({file!r}, 0o777); open({file!r}).read()"),
    "list a directory": (READING, "import os; assert os.listdir({dir!r})"),
    "read the user list": (READING, "open('/etc/passwd').read()"),
    "read the trainer's environment": (READING, "open('/proc/{pid}/environ').read()"),
    "read the trainer's memory": (READING, "open('/proc/{pid}/mem', 'rb')"),
    "list the trainer's files": (READING, "import os; assert os.listdir('/proc/{pid}/fd')"),
    "read one's own process": (READING, "open('/proc/self/maps').read()"),
    "write a file": (WRITING, "open({dir!r} + '/new', 'w').write('x')"),
    "append to a file": (WRITING, "open({file!r}, 'a').write('x')"),
    "empty a file by opening it": (WRITING, "import os; os.open({file!r}, os.O_WRONLY | os.O_TRUNC)"),
    "empty a file that is opened for reading": (WRITING + " seccomp",
                                                "import os; os.open({file!r}, os.O_RDONLY | os.O_TRUNC)"),
    "empty it with neither reading nor writing": (WRITING + " seccomp", "import os; os.open({file!r}, 3 | os.O_TRUNC)"),
    "truncate a file": (WRITING, "import os; os.truncate({file!r}, 0)"),
    "remove a file": (WRITING, "import os; os.unlink({file!r})"),
    "rename a file": (WRITING, "import os; os.rename({file!r}, {file!r} + '.bak')"),
    "move a file here": (WRITING, "import os; os.rename({file!r}, 'mine')"),
    "link a file here": (WRITING + " seccomp", "import os; os.link({file!r}, 'mine')"),
    "make a directory": (WRITING + " seccomp", "import os; os.mkdir({dir!r} + '/new')"),
    "leave the scratch directory": ("chroot seccomp", "import os; os.chdir({dir!r})"),
    "listen on TCP": ("seccomp", "import socket; socket.create_server(('127.0.0.1', 0))"),
    "connect over TCP": ("seccomp", "import socket; socket.create_connection(('127.0.0.1', {port}), 2)"),
    "send a datagram": ("seccomp", "import socket; socket.socket(type=socket.SOCK_DGRAM)"
                        ".sendto(b'x', ('127.0.0.1', {port}))"),
    "connect to an abstract socket": ("seccomp", "import socket; socket.socket(socket.AF_UNIX).connect({unix!r})"),
    "make a pair of sockets": ("seccomp", "import socket; socket.socketpair()"),
    "fork": ("seccomp", "import os\nif os.fork() == 0: os._exit(0)"),
    "run a command": ("seccomp", "import subprocess; subprocess.run(['true'], check=True)"),
    "become another program": ("seccomp", "import os; os.execv('/bin/true', ['true'])"),
    "start a thread": ("seccomp", "import threading; threading.Thread(target=int).start()"),
    "signal the trainer": ("seccomp", "import os; os.kill({pid}, 0)"),
    "make the kernel signal the trainer": ("seccomp", "import fcntl, os; r, w = os.pipe(); "
                                           "fcntl.fcntl(r, fcntl.F_SETOWN, {pid})"),
    "limit the trainer": ("seccomp", "import resource; resource.prlimit({pid}, resource.RLIMIT_CORE)"),
    "share memory with the next": ("seccomp", "import ctypes; c = ctypes.CDLL(None)\n"
                                   "assert c.shmget(0x41524654, 4096, 0o1666) >= 0"),
    "make memory that is no file": ("seccomp", "import os; os.memfd_create('x')"),
    "fill a file in memory": ("landlock chroot", "open('/dev/shm/arft-test', 'w').write('x')"),
    "trace": ("seccomp", "import ctypes; assert ctypes.CDLL(None).ptrace(0, 0, 0, 0) == 0"),
    "change the mask of a host file": ("seccomp chroot", "import os; os.chmod({file!r}, 0o777)\n"
                                       "assert os.stat({file!r}).st_mode & 0o777 == 0o777"),
    "change the time of a host file": ("seccomp chroot", "import os; os.utime({file!r}, (1, 1))\n"
                                       "assert os.stat({file!r}).st_mtime == 1"),
}


@pytest.fixture
def victim(tmp_path):
    """What an attack may hurt: a file, a process, two servers."""
    file = tmp_path / "gold.json"
    file.write_text(SECRET)
    file.chmod(0o600)
    tcp, unix = socket.create_server(("127.0.0.1", 0)), socket.socket(socket.AF_UNIX)
    unix.bind(f"\0arft-{os.getpid()}")
    unix.listen()
    process = subprocess.Popen(["sleep", "60"])
    yield {"file": str(file), "dir": str(tmp_path), "pid": process.pid, "port": tcp.getsockname()[1],
           "unix": unix.getsockname().decode()}
    process.kill()
    process.wait()
    tcp.close()
    unix.close()


def attack(sandbox, victim, picture, name: str) -> str:
    lines = textwrap.indent(ATTACKS[name][1].format(**victim), "    ")
    stdout = sandbox.run(f"try:\n{lines}\n    print('it worked')\n"
                         "except Exception as problem:\n    print('refused:', repr(problem))", picture).stdout
    assert stdout.startswith(("it worked", "refused: ")), stdout
    return stdout


@pytest.mark.skipif(not LINUX, reason="there are no walls outside Linux, and the docstring says so")
@pytest.mark.parametrize("name", ATTACKS)
def test_the_attack_is_refused(box, victim, picture, name):
    before = os.stat(victim["file"])
    assert attack(box, victim, picture, name).startswith("refused: ")
    assert open(victim["file"]).read() == SECRET and os.listdir(victim["dir"]) == ["gold.json"]
    after = os.stat(victim["file"])
    assert (after.st_mode, after.st_mtime, after.st_nlink) == (before.st_mode, before.st_mtime, before.st_nlink)
    assert healthy(box, picture)


@pytest.fixture(scope="module")
def open_box():
    with Sandbox(workers=1, without=ALL) as sandbox:
        yield sandbox


@pytest.mark.parametrize("name", ATTACKS)
def test_the_attack_works_where_there_is_no_wall(open_box, victim, picture, name):
    stdout = attack(open_box, victim, picture, name)
    assert stdout == "it worked\n", "an attack that never works proves nothing"
    if os.path.exists("/dev/shm/arft-test"):
        os.unlink("/dev/shm/arft-test")


@pytest.mark.skipif(not LINUX, reason="walls of Linux")
@pytest.mark.parametrize("wall", ["landlock", "chroot", "seccomp"])
def test_what_each_wall_stops_alone(victim, picture, wall):
    """The table ATTACKS says which; one layer and the one that it needs are put up, no other."""
    left_out = tuple(name for name in ALL if name not in (wall, "no new privileges"))
    with Sandbox(workers=1, without=left_out) as sandbox:
        if wall not in sandbox.layers:
            pytest.skip(f"this machine has no {wall}")
        stopped = {name for name in ATTACKS if wall in ATTACKS[name][0].split()}
        worked = {name for name in stopped if attack(sandbox, victim, picture, name) == "it worked\n"}
    assert not worked
