"""tools.py, extras/worker.py and extras/jail.py, claim by claim: first the parser, then what an
honest program gets, then what a hostile one does not get.

Every attack here is a real one: `test_the_attack_works_where_there_is_no_layer` runs the same lines
in a sandbox without its layers and sees them succeed. No test asserts a time, and none waits for
one: `wait_for` waits for a state. Programs that sleep do so until a limit ends them.
"""

import io
import os
import re
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

import tools
from extras import jail, worker
from tools import Action, Sandbox, SandboxError, parse

LINUX = sys.platform == "linux"
ALL = tuple(jail.LAYERS)
NO_IMAGE = f"no image was written to {jail.OUTPUT}"


# --- The parser -----------------------------------------------------------------------------------

PAPER_TURNS = {     # as the released models write them
    "problem": ("<think>The picture is turned.</think>\n"
                "<problem> {'rotation90', 'dark'} </problem>",
                ("rotation90", "dark")),
    "code": ("<think> First turn it. </think>\n"
             "<code>\n```python\nfrom PIL import Image\nx = 1\n```\n</code>",
             "from PIL import Image\nx = 1"),
    "search": ("<think>Who is it?</think>\n<search> architect of the Atomium </search>",
               "architect of the Atomium"),
    "answer": ("<think>\nThe sign says\n\nEXIT.\n</think> <answer> 始发站：广安 </answer>",
               "始发站：广安"),
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
    action = parse(f"<think>t</think><problem>{body}</problem>")
    assert action == Action("problem", labels, None, strict)


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
    ("<think>t</think><search>a</search><answer>1</answer>",
     "two actions in one turn: <search> and <answer>"),
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


# --- What an honest program gets ------------------------------------------------------------------

@pytest.fixture(scope="module")
def box():
    with Sandbox(workers=2) as sandbox:
        yield sandbox


@pytest.fixture(scope="module")
def picture():
    """Noise: every pixel counts, and a lossy file on the way would show."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8))


def program(*lines: str) -> str:
    """A program that opens the input, does `lines` and writes a PNG under the paper's .jpg name."""
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
    (["# 旋转图片，然后变亮", "from PIL import ImageEnhance",
      "def 变亮(图片, 倍数=2.0):",
      "    return ImageEnhance.Brightness(图片).enhance(倍数)", "image = 变亮(image)"],
     lambda p: ImageEnhance.Brightness(p).enhance(2.0)),
    (["try:", "    image = image.no_such_method()",
      "except AttributeError:", "    image = image.convert('L')"],
     lambda p: p.convert("L")),
    (["import PIL.ImageOps as ops", "def flip(x): return ops.mirror(turn(x))",
      "def turn(x): return ops.flip(x)", "if __name__ == '__main__':", "    image = flip(image)"],
     lambda p: ImageOps.mirror(ImageOps.flip(p))),
    (["from dataclasses import dataclass", "@dataclass", "class Box:", "    left: int = 3",
      "import pickle", "image = image.crop((pickle.loads(pickle.dumps(Box())).left, 0, 9, 9))"],
     lambda p: p.crop((3, 0, 9, 9))),
    (["import tempfile, os", "with tempfile.NamedTemporaryFile(suffix='.png') as file:",
      "    image.save(file.name)", "    image = Image.open(file.name); image.load()"],
     lambda p: p),
    (["image = image.convert('RGBA').convert('P')"], lambda p: p.convert("RGBA").convert("P")),
    (["import sys; sys.exit"], lambda p: p),
], ids=["rotate", "crop and enlarge", "numpy", "Chinese", "try", "functions", "dataclass",
        "temporary file", "palette", "nothing"])
def test_an_ordinary_program_gives_exactly_the_right_pixels(box, picture, lines, expected):
    assert same(box.run(program(*lines), picture), expected(picture))


def test_a_jpeg_is_a_jpeg(box, picture):
    file = io.BytesIO()
    picture.save(file, "JPEG")
    code = f"from PIL import Image\nImage.open('{jail.INPUT}').save('{jail.OUTPUT}')"
    assert same(box.run(code, picture), Image.open(file))


@pytest.mark.parametrize("function", ["copy", "copy2", "copyfile", "move"])
def test_the_input_is_lossless_and_files_can_be_copied(box, picture, function):
    code = f"import shutil\nshutil.{function}('{jail.INPUT}', '{jail.OUTPUT}')"
    assert same(box.run(code, picture), picture)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1"])
def test_an_image_of_any_mode_goes_in_as_rgb(box, picture, mode):
    assert same(box.run(program(), picture.convert(mode)), picture.convert(mode).convert("RGB"))


@pytest.mark.skipif(not find_spec("cv2"), reason="OpenCV is not installed")
def test_opencv(box, picture):
    code = "\n".join(["import cv2, os", f"image = cv2.imread('{jail.INPUT}')",
                      "image = cv2.rotate(image, cv2.ROTATE_180)",
                      "cv2.imwrite('x.png', cv2.GaussianBlur(image, (3, 3), 0))",
                      "cv2.imwrite('y.png', image)", f"os.replace('y.png', '{jail.OUTPUT}')"])
    assert same(box.run(code, picture), picture.rotate(180))


@pytest.mark.skipif(bool(find_spec("cv2")), reason="OpenCV is installed")
def test_without_opencv_the_error_says_so(box, picture):
    error = box.run("x = 1\nimport cv2", picture).error
    assert error == "ModuleNotFoundError: No module named 'cv2' (line 2)"


@pytest.mark.parametrize("code, error", [
    ("a = 1\nprint(b)", "NameError: name 'b' is not defined (line 2)"),
    ("def f():\n    return 1 / 0\n\nf()", "ZeroDivisionError: division by zero (line 2)"),
    ("x = (", "SyntaxError: '(' was never closed (line 1)"),
    ("x = 1\n  y = 2", "IndentationError: unexpected indent (line 2)"),
    ("\0", "source code string cannot contain null bytes"),
    ("from PIL import Image\nImage.open('nothing.jpg')",
     "FileNotFoundError: [Errno 2] No such file or directory: 'nothing.jpg' (line 2)"),
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
    code = ("import sys\nprint('第一')\nprint('second', file=sys.stderr)\nprint(object())\n"
            "print('\\x1b[2Jred')\n1 / 0")
    assert box.run(code, picture).stdout == "第一\nsecond\n<object object at 0x...>\n[2Jred\n"


def test_long_output_keeps_its_beginning_and_its_end(box, picture):
    code = "print('first')\nfor i in range(100000): print(i)\nprint('旋' * 10)\nprint('last')"
    text = box.run(code, picture).stdout
    assert text.startswith("first\n0\n1\n") and text.endswith("last\n") and "left out" in text
    assert len(text) < worker.OUTPUT_CHARACTERS + 100


def test_the_same_program_gives_the_same_result(picture):
    code = program("import random, numpy as np",
                   "print(random.random(), np.random.rand(), {'a', 'b', 'c', 'dark'})",
                   "import os; print(os.getcwd(), os.path.abspath('x')); open('nothing/x')")
    results = []
    for _ in range(2):
        with Sandbox(workers=1) as sandbox:
            results += [sandbox.run(code, picture), sandbox.run(code, picture)]
    assert len({(result.stdout, result.error) for result in results}) == 1


def test_map_keeps_the_order_and_runs_equal_jobs_once(box, picture, monkeypatch):
    ran, execute = [], worker.Worker.execute
    monkeypatch.setattr(worker.Worker, "execute", lambda *job: ran.append(job) or execute(*job))
    clock = "import time\nprint(time.perf_counter_ns())"
    twin = picture.copy()       # equal pixels, another object
    other = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    jobs = [(clock, picture), ("print(1)", picture), (clock, twin), (clock, other)]
    jobs += [(clock, picture)] * 4
    results = box.map(iter(jobs))
    assert [result is results[0] for result in results] == [True, False, True, False] + [True] * 4
    assert results[1].stdout == "1\n" and results[3].stdout != results[0].stdout
    assert len(ran) == 3 and box.map([]) == []


def test_a_hundred_at_once(box, picture):
    ends = ("1 / 0", "import os; os._exit(1)", "import ctypes; ctypes.string_at(0)", "")
    codes = [f"print({i})\n{ends[i % 4]}" for i in range(100)]
    results = box.map([(code, picture) for code in codes])
    assert [result.stdout for result in results] == [f"{i}\n" for i in range(100)]


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
    output = subprocess.run([sys.executable, "-c", code], cwd=os.path.dirname(tools.__file__),
                            capture_output=True)
    assert output.stdout == b"False False\n"


# --- What a hostile program does not get ----------------------------------------------------------

SECRET = "the gold answer is 42"
FILES = "landlock chroot"       # either of the two alone protects our files
# name: (each layer that stops the attack alone; lines of a program). A number after landlock is the
# version from which on it stops the attack. In the lines, {file} is a file of ours with a secret,
# {dir} its directory, {pid} a process of ours, {port} a server of ours, {unix} an abstract socket.
ATTACKS = {
    "read a file": (FILES, "open({file!r}).read()"),
    "read it through the C library": (
        FILES,
        "import ctypes; c = ctypes.CDLL(None)\n"
        "assert c.open({file!r}.encode(), 0) >= 0"),
    "read it through ..": (
        FILES,
        "import os; open(os.path.relpath({file!r}, os.getcwd() or '/')).read()"),
    "read it through a link": (
        FILES + " seccomp",
        "import os; os.symlink({file!r}, 'link'); open('link').read()"),
    "read it by a directory's descriptor": (
        FILES,
        "import os; d = os.open({dir!r}, os.O_PATH)\n"
        "os.open(os.path.basename({file!r}), 0, dir_fd=d)"),
    "make it readable first": (
        FILES,
        "import os; os.chmod({file!r}, 0o777); open({file!r}).read()"),
    "list a directory": (FILES, "import os; assert os.listdir({dir!r})"),
    "read the user list": (FILES, "open('/etc/passwd').read()"),
    "read the trainer's environment": (FILES, "open('/proc/{pid}/environ').read()"),
    "read the trainer's memory": (FILES, "open('/proc/{pid}/mem', 'rb')"),
    "list the trainer's files": (FILES, "import os; assert os.listdir('/proc/{pid}/fd')"),
    "read one's own process": (FILES, "open('/proc/self/maps').read()"),
    "write a file": (FILES, "open({dir!r} + '/new', 'w').write('x')"),
    "append to a file": (FILES, "open({file!r}, 'a').write('x')"),
    "empty a file by opening it": (FILES, "import os; os.open({file!r}, os.O_WRONLY | os.O_TRUNC)"),
    "empty a file that is opened for reading": (
        FILES + " seccomp",
        "import os; os.open({file!r}, os.O_RDONLY | os.O_TRUNC)"),
    "empty it with neither reading nor writing": (
        "landlock3 chroot seccomp",
        "import os; os.open({file!r}, 3 | os.O_TRUNC)"),
    "truncate a file": ("landlock3 chroot seccomp", "import os; os.truncate({file!r}, 0)"),
    "remove a file": (FILES, "import os; os.unlink({file!r})"),
    "rename a file": (FILES, "import os; os.rename({file!r}, {file!r} + '.bak')"),
    "move a file here": (FILES, "import os; os.rename({file!r}, 'mine')"),
    "link a file here": (FILES + " seccomp", "import os; os.link({file!r}, 'mine')"),
    "make a directory": (FILES + " seccomp", "import os; os.mkdir({dir!r} + '/new')"),
    "leave the scratch directory": ("chroot seccomp", "import os; os.chdir({dir!r})"),
    "listen on TCP": ("landlock4 seccomp", "import socket; socket.create_server(('127.0.0.1', 0))"),
    "connect over TCP": (
        "landlock4 seccomp",
        "import socket; socket.create_connection(('127.0.0.1', {port}), 2)"),
    "send a datagram": (
        "seccomp",
        "import socket; socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', {port}))"),
    "connect to an abstract socket": (
        "landlock6 seccomp",
        "import socket; socket.socket(socket.AF_UNIX).connect({unix!r})"),
    "make a pair of sockets": ("seccomp", "import socket; socket.socketpair()"),
    "fork": (
        "seccomp",
        "import os\n"
        "if os.fork() == 0: os._exit(0)"),
    "run a command": ("seccomp", "import subprocess; subprocess.run(['true'], check=True)"),
    "become another program": (
        "seccomp",
        "import os\n"
        "try: os.execv('/no/such/program', ['x'])\n"
        "except FileNotFoundError: pass"),
    "start a thread": ("seccomp", "import threading; threading.Thread(target=int).start()"),
    "signal the trainer": ("landlock6 seccomp", "import os; os.kill({pid}, 0)"),
    "make the kernel signal the trainer": (
        "seccomp",
        "import fcntl, os; r, w = os.pipe(); fcntl.fcntl(r, fcntl.F_SETOWN, {pid})"),
    "limit the trainer": (
        "seccomp",
        "import resource; resource.prlimit({pid}, resource.RLIMIT_CORE)"),
    "share memory with the next": (
        "seccomp",
        "import ctypes; c = ctypes.CDLL(None)\n"
        "assert c.shmget(0x41524654, 4096, 0o1666) >= 0"),
    "make memory that is no file": ("seccomp", "import os; os.memfd_create('x')"),
    "fill a file in memory": ("landlock chroot", "open('/dev/shm/arft-test', 'w').write('x')"),
    "trace": ("seccomp", "import ctypes; assert ctypes.CDLL(None).ptrace(0, 0, 0, 0) == 0"),
    "change the mask of a host file": (
        "seccomp chroot",
        "import os; os.chmod({file!r}, 0o777)\n"
        "assert os.stat({file!r}).st_mode & 0o777 == 0o777"),
    "change the time of a host file": (
        "seccomp chroot",
        "import os; os.utime({file!r}, (1, 1))\n"
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
    yield {"file": str(file), "dir": str(tmp_path), "pid": process.pid,
           "port": tcp.getsockname()[1], "unix": unix.getsockname().decode()}
    process.kill()
    process.wait()
    tcp.close()
    unix.close()


def attack(sandbox, victim, picture, name: str) -> str:
    lines = textwrap.indent(ATTACKS[name][1].format(**victim), "    ")
    code = (f"try:\n{lines}\n    print('it worked')\n"
            "except Exception as problem:\n    print('refused:', repr(problem))")
    stdout = sandbox.run(code, picture).stdout
    assert stdout.startswith(("it worked", "refused: ")), stdout
    return stdout


@pytest.mark.skipif(not LINUX, reason="outside Linux there are no layers")
@pytest.mark.parametrize("name", ATTACKS)
def test_the_attack_is_refused(box, victim, picture, name):
    before = os.stat(victim["file"])
    assert attack(box, victim, picture, name).startswith("refused: ")
    assert open(victim["file"]).read() == SECRET and os.listdir(victim["dir"]) == ["gold.json"]
    after = os.stat(victim["file"])
    for name in ("st_mode", "st_mtime", "st_nlink"):
        assert getattr(after, name) == getattr(before, name)
    assert healthy(box, picture)


@pytest.fixture(scope="module")
def open_box():
    with Sandbox(workers=1, without=ALL) as sandbox:
        yield sandbox


@pytest.mark.skipif(not LINUX, reason="/proc and abstract sockets are Linux's")
@pytest.mark.parametrize("name", ATTACKS)
def test_the_attack_works_where_there_is_no_layer(open_box, victim, picture, name):
    stdout = attack(open_box, victim, picture, name)
    assert stdout == "it worked\n", "an attack that never works proves nothing"
    if os.path.exists("/dev/shm/arft-test"):
        os.unlink("/dev/shm/arft-test")


@pytest.mark.skipif(not LINUX, reason="layers of Linux")
@pytest.mark.parametrize("layer", ["landlock", "chroot", "seccomp"])
def test_what_each_layer_stops_alone(victim, picture, layer):
    """The table ATTACKS says what; only this layer and the one that it needs are in force."""
    left_out = tuple(name for name in ALL if name not in (layer, "no new privileges"))
    with Sandbox(workers=1, without=left_out) as sandbox:
        if layer not in sandbox.layers:
            pytest.skip(f"this machine has no {layer}")
        names = {layer}
        if layer == "landlock":
            newest = jail.call_libc("syscall", 444, None, 0, 1)
            names |= {f"landlock{version}" for version in range(1, 1 + newest)}
        stopped = {name for name in ATTACKS if names & set(ATTACKS[name][0].split())}
        worked = {name for name in stopped
                  if attack(sandbox, victim, picture, name) == "it worked\n"}
    assert not worked


def test_nothing_of_the_trainer_is_inherited(picture, monkeypatch, tmp_path):
    """Neither its environment nor an open file, whatever its number."""
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    with open(tmp_path / "gold.json", "w+") as file, Sandbox(workers=1) as sandbox:
        file.write(SECRET)
        file.flush()
        os.set_inheritable(file.fileno(), True)
        code = ("import os, sys\nprint(dict(os.environ), sys.argv)\nfor fd in range(3, 1024):\n"
                "    try:\n        print(os.pread(fd, 100, 0))\n    except OSError: pass")
        stdout = sandbox.run(code, picture).stdout
    assert SECRET not in stdout and "API_KEY" not in stdout and "PATH" in stdout


LEAVE = """
import builtins, os, random, sys, tempfile
import numpy
from PIL import Image
numpy.marked = Image.marked = builtins.marked = sys.marked = os.environ['marked'] = 'MARK'
Image.Image.rotate = builtins.len = numpy.asarray = None
open('MARK', 'w').write('MARK')
os.write(1, b'left\\n')
sys.setrecursionlimit(50)
"""


def test_nothing_is_left_for_the_next_program(picture):
    look = """
import builtins, gc, os, sys, numpy
from PIL import Image
print(os.listdir(), os.environ.get('marked'))
print([hasattr(x, 'marked') for x in (numpy, Image, builtins, sys)])
print(sum(type(x) is dict and 'MARK' in map(str, x.values()) for x in gc.get_objects()))
"""
    with Sandbox(workers=1) as sandbox:
        process = sandbox._workers[0]._process
        before = sandbox.run(look, picture).stdout
        assert sandbox.run(LEAVE, picture).stdout == "left\n"
        assert sandbox.run(look, picture).stdout == before
        assert before == f"['{jail.INPUT}'] None\n[False, False, False, False]\n0\n"
        assert healthy(sandbox, picture) and sandbox._workers[0]._process is process


# Limits: each is an observation for the model, and the next program runs.

@pytest.fixture(scope="module")
def hasty():
    with Sandbox(workers=1, seconds=1) as sandbox:
        yield sandbox


@pytest.mark.parametrize("code", [
    "while True: pass",
    "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
    "import signal\nfor s in (signal.SIGALRM, signal.SIGTERM, signal.SIGINT, signal.SIGXCPU):\n"
    "    signal.signal(s, signal.SIG_IGN)\nwhile True: pass",
    "import re\nre.match('(a*)*b', 'a' * 50)",      # in C, where no Python exception arrives
    "import time\ntime.sleep(1000)",
    "import os\nos.read(os.pipe()[0], 1)",
    "class Sticky:\n    def __del__(self):\n        while True: pass\nsticky = Sticky()",
], ids=["loop", "loop that catches all", "loop that ignores signals", "regular expression", "sleep",
        "pipe", "destructor"])
def test_time_is_limited(hasty, picture, code):
    execution = hasty.run("print('started')\n" + code, picture)
    assert (execution.error, execution.stdout) == ("the program ran longer than 1 s", "started\n")
    assert healthy(hasty, picture)


@pytest.mark.parametrize("code, words", [
    ("import numpy as np\nnp.ones(1 << 30)", "MemoryError"),
    ("data = []\nwhile True: data.append(bytes(1 << 20))", "MemoryError"),
    ("import mmap\nmmap.mmap(-1, 2 << 30)", "Cannot allocate memory"),
    ("with open('x', 'wb') as file:\n    file.truncate(1 << 40)", "File too large"),
    ("with open('x', 'wb') as file:\n    while True: file.write(bytes(1 << 20))", "File too large"),
    ("import os\nos.closerange(0, 2)\nfiles = [open('x', 'w') for _ in range(100)]",
     "Too many open files"),
    ("import time\nfor i in range(300):\n    open(f'{i}', 'wb').write(bytes(1 << 20))\n"
     "time.sleep(100)",
     "wrote more than 256 MB or 1000 files"),
    ("import time\nfor i in range(1100): open(f'{i}', 'w').close()\ntime.sleep(100)",
     "wrote more than 256 MB or 1000 files"),
    ("print('x' * (1 << 20) * 100)", ""),
    ("while True: print('x' * 1000)", "File too large"),
    ("exec('x = ' + '(' * 10 ** 6)", ""),
    ("import os\nos.kill(os.getpid(), 9)", ""),
    ("import os\nos.abort()", "killed"),
    ("import os\nos._exit(0)", "ended its own process"),
    ("import sys\nsys.stdout.close()\nimport os\nos.closerange(0, 1024)", ""),
    ("import sys\nsys.modules.clear()\ndel __builtins__", ""),
    ("import os\nos._exit = lambda status: None\nos.unlink = os.open = open = None", ""),
])
def test_a_limit_is_an_observation(box, picture, code, words):
    execution = box.run(code, picture)
    assert execution.image is None and words in execution.error
    assert len(execution.error) <= worker.ERROR_CHARACTERS and len(execution.stdout) < 3000
    assert healthy(box, picture)


def test_memory_that_a_program_still_holds_does_not_cost_its_image(box, picture):
    code = program("image = image.resize((1500, 1500))") + """
import numpy
held = []
try:
    while True: held.append(numpy.empty(1 << 20, 'uint8'))
except MemoryError: print(len(held) > 500)
"""
    execution = box.run(code, picture)
    assert execution.stdout == "True\n" and same(execution, picture.resize((1500, 1500)))


@pytest.mark.skipif(not LINUX, reason="/proc is Linux's")
def test_the_second_lines_of_defence_are_up(picture):
    """No attack above gets as far as these. /proc shows them, in a sandbox that lets it be read."""
    code = """
for line in open('/proc/self/status'):
    if line[:3] in ('Cap', 'NoN', 'Sec'): print(*line.split())
for line in open('/proc/self/limits'):
    print(*line.split())
"""
    with Sandbox(workers=1, without=("landlock", "chroot")) as sandbox:
        text = sandbox.run(code, picture).stdout
    for line in ("CapEff: 0000000000000000", "CapPrm: 0000000000000000", "NoNewPrivs: 1",
                 "Seccomp: 2", "Max cpu time 11 12 seconds", "Max core file size 0 0 bytes",
                 "Max processes 0 0 processes"):
        assert line in text
    # What was asked for, and what the forked interpreter has already.
    memory = re.search(r"Max address space (\d+) ", text)
    assert memory and 1024 << 20 < int(memory[1]) < 4096 << 20


# The way back: the program leaves a hostile file, or answers in the sandbox's place.

def png(width: int, height: int, rows: bytes = b"") -> bytes:
    """A PNG that says what it likes about its size."""
    import struct
    import zlib

    def chunk(name: bytes, body: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(name + body))
        return struct.pack(">I", len(body)) + name + body + checksum

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("content, words", [
    (png(60000, 60000), "60000 x 60000 pixels"),
    (png(4097, 4096), "4097 x 4096 pixels"),
    (png(1, 16385), "1 x 16385 pixels"),
    (png(8, 8), "cannot be read as an image"),
    (png(64, 48)[:40], "cannot be read as an image"),
    (b"", "cannot be read as an image"),
    (b"%PDF-1.4", "cannot be read as an image"),
    (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",     # would start ghostscript
     "cannot be read as an image"),
    (b"GIF89a" + b"\xff" * 100, "cannot be read as an image"),
])
def test_a_hostile_image_is_an_error(box, picture, content, words):
    execution = box.run(f"open({jail.OUTPUT!r}, 'wb').write({content!r})", picture)
    assert execution.image is None and words in execution.error


@pytest.mark.parametrize("make", [f"os.symlink('{{file}}', {jail.OUTPUT!r})",
                                  f"os.symlink({jail.INPUT!r}, {jail.OUTPUT!r})",
                                  f"os.mkfifo({jail.OUTPUT!r})",
                                  f"os.mkdir({jail.OUTPUT!r})",
                                  f"os.link('{{file}}', {jail.OUTPUT!r})"])
@pytest.mark.parametrize("locked", [True, False], ids=["layers", "no layers"])
def test_the_output_must_be_an_ordinary_file(box, open_box, picture, tmp_path, make, locked):
    """With layers no exotic file can be made.

    Without them none is read, except a hard link, which is an ordinary file.
    """
    picture.save(tmp_path / "gold.png")
    code = "import os\n" + make.replace("{file}", str(tmp_path / "gold.png"))
    execution = (box if locked else open_box).run(code, picture)
    if locked:
        assert "Error" in execution.error
    elif "link('/" not in code or "symlink" in code:
        assert execution.error == f"{jail.OUTPUT} is not an ordinary file"


FORGE = """
import os, struct
for fd in range(3, 32):
    try:
        os.lseek(fd, 0, 0)
    except OSError: pass
    try:
        os.write(fd, {reply})
    except OSError: pass
"""


@pytest.mark.parametrize("reply, end", [
    ("b'{\"error\": null}\\n'", "while True: pass"),
    ("b'{\"error\": null}\\n' * 9", "os._exit(0)"),
    ("b'x' * 4000", "os._exit(0)"),
    ("b'x' * 4000", "os.closerange(0, 64)"),
    ("struct.pack('<III', 9, 9, 0) + bytes(10)", "os._exit(0)"),
    ("struct.pack('<III', 9, 9, 0) + bytes(1000)", "os._exit(0)"),
    ("struct.pack('<III', 1 << 31, 1 << 31, 0)", "os._exit(0)"),
    ("struct.pack('<III', 0, 9, 0)", "os._exit(0)"),
    ("struct.pack('<III', 9, 9, 1 << 31) + b'text'", "os._exit(0)"),
    ("struct.pack('<III', 9, 9, 0) + bytes(243)", "os.abort()"),
])
def test_the_reply_cannot_be_forged(hasty, picture, reply, end):
    """The trainer checks what it reads, and the next reply belongs to the next program."""
    process = hasty._workers[0]._process
    execution = hasty.run(FORGE.format(reply=reply) + end, picture)
    assert execution.image is None and execution.error
    assert hasty._workers[0]._process is process, "the reply should be refused, not the worker lost"
    assert hasty.run("print('mine')", picture).stdout == "mine\n"
    assert healthy(hasty, picture)


SAY_DONE = """
import os, struct
picture = {picture}
for fd in range(3, 32):             # the result is a file, the way to the zygote a pipe
    try:
        os.lseek(fd, 0, 0)
        os.write(fd, picture)
    except OSError: pass
print('done')
for fd in range(3, 32):
    try:
        os.write(fd, b'!')
    except OSError: pass
while True: pass
"""


def test_a_program_that_says_itself_that_it_is_done_has_ended_itself(hasty, picture):
    """It is killed at once, and the picture that it forged is one that it could have saved."""
    process = hasty._workers[0]._process

    def forge(forged: str):
        execution = hasty.run(SAY_DONE.format(picture=forged), picture)
        assert execution.stdout == "done\n"
        return execution.image.tobytes() if execution.image else execution.error

    lost = "the program ended its own process"
    assert forge("struct.pack('<III', 9, 9, 0) + b'P6\\n9 9\\n255\\n' + bytes(243)") == bytes(243)
    assert forge("struct.pack('<III', 9, 9, 0) + b'P6\\n9 9\\n255\\n' + bytes(200)") == lost
    assert forge("struct.pack('<III', 9, 9, 0) + b'P5\\n9 9\\n255\\n' + bytes(243)") == lost
    assert forge("struct.pack('<III', 9, 9, 1) + b' '") == "an error without words"
    assert healthy(hasty, picture) and hasty._workers[0]._process is process


def test_a_program_holds_no_socket(box, picture):
    """It may call recvmsg, by which the child gets its job, but has nothing to receive from."""
    code = """
import os, stat
for fd in range(1024):
    try: print(stat.S_ISSOCK(os.fstat(fd).st_mode))
    except OSError: pass
"""
    stdout = box.run(code, picture).stdout
    assert set(stdout.split()) == {"False"}


def test_the_rehearsal_is_a_program_that_works_and_leaves_nothing(box, picture):
    execution = box.run(jail.REHEARSAL, picture)
    assert execution.error is None and execution.image.size == (64, 64)
    look = ("import os, warnings\nfrom PIL import Image\n"
            "print(os.listdir(), Image.MAX_IMAGE_PIXELS, dir())")
    names = ["Image", "__builtins__", "__doc__", "__loader__", "__name__", "__package__",
             "__spec__", "os", "warnings"]
    assert box.run(look, picture).stdout == f"['{jail.INPUT}'] {Image.MAX_IMAGE_PIXELS} {names}\n"


# Life and death.

def test_a_dead_worker_is_replaced(picture):
    with Sandbox(workers=1) as sandbox:
        process = sandbox._workers[0]._process
        process.kill()
        process.wait()
        assert healthy(sandbox, picture)
        assert sandbox._workers[0]._process is not process


def test_a_worker_that_comes_back_with_fewer_layers_is_refused(picture):
    with Sandbox(workers=1) as sandbox:
        sandbox._workers[0]._process.kill()
        sandbox._workers[0]._settings["without"] = list(ALL)
        execution = sandbox.run("print('never')", picture)
        assert execution.stdout == "" and "other layers" in execution.error


def test_a_missing_scratch_directory_is_replaced(picture):
    with Sandbox(workers=1) as sandbox:
        jail.wipe(sandbox._workers[0]._base)
        assert healthy(sandbox, picture)


def test_an_interrupted_call_does_not_answer_the_next_one(picture, monkeypatch):
    with Sandbox(workers=1) as sandbox:
        def interrupt(self):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(worker.Worker, "_reply", interrupt)
            with pytest.raises(KeyboardInterrupt):
                sandbox.run("print('first')", picture)
        assert sandbox.run("print('second')", picture).stdout == "second\n"


def test_ctrl_c_at_the_terminal_does_not_reach_the_workers(box):
    processes = [worker._process.pid for worker in box._workers]
    sessions = [os.getsid(pid) for pid in processes]
    assert sessions == processes and os.getsid(0) not in sessions


def test_a_sandbox_outlives_the_thread_that_made_it(picture):
    made = []
    thread = threading.Thread(target=lambda: made.append(Sandbox(workers=1)))
    thread.start()
    thread.join()
    with made[0] as sandbox:
        assert healthy(sandbox, picture)


def test_a_full_disk_is_an_observation(picture, tmp_path, monkeypatch):
    """The temporary directory is a file system of 512 KB; the input image alone is larger."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=512k", "none", str(tmp_path)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        monkeypatch.setattr(worker.tempfile, "gettempdir", lambda: str(tmp_path))
        with Sandbox(workers=1) as sandbox:
            execution = sandbox.run("print('never')", Image.new("RGB", (1000, 1000)))
            assert execution.stdout == "" and "No space left on device" in execution.error
            assert healthy(sandbox, picture)
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)])


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def wait_for(condition) -> bool:
    """Wait until `condition()` is true. Gives up after half a minute, and a test then fails."""
    for _ in range(600):
        if condition():
            return True
        time.sleep(0.05)
    return False


def runs(sandbox) -> bool:
    """Whether the first worker has a program's input in its scratch directory."""
    return os.path.exists(os.path.join(sandbox._workers[0]._base, "run", jail.INPUT))


def start_endless_program(sandbox, picture, ends: list[str]) -> threading.Thread:
    """Run a program that sleeps, in a thread, and return when it runs. `ends` gets its error."""
    def work():
        try:
            ends.append(sandbox.run("import time\ntime.sleep(1000)", picture).error)
        except RuntimeError as error:
            ends.append(str(error))

    thread = threading.Thread(target=work)
    thread.start()
    assert wait_for(lambda: runs(sandbox))
    return thread


def test_no_process_and_no_file_survives_a_killed_trainer(tmp_path):
    code = textwrap.dedent(f"""
        import sys, tempfile
        sys.path.insert(0, {os.path.dirname(tools.__file__)!r})
        tempfile.tempdir = {str(tmp_path)!r}
        import tools
        from PIL import Image
        sandbox = tools.Sandbox(workers=2, seconds=60)
        print(*[worker._process.pid for worker in sandbox._workers], flush=True)
        sandbox.run("while True: pass", Image.new("RGB", (9, 9)))
    """)
    trainer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    workers = [int(pid) for pid in trainer.stdout.readline().split()]
    assert len(workers) == 2
    assert wait_for(lambda: list(tmp_path.glob("*/run/*")))         # the program runs
    trainer.kill()
    trainer.wait()
    trainer.stdout.close()
    assert wait_for(lambda: not any(map(alive, workers)))
    assert wait_for(lambda: not list(tmp_path.iterdir()))


@pytest.mark.skipif(not LINUX, reason="parent death signals are Linux's")
def test_a_program_does_not_outlive_a_killed_worker(box, picture):
    """The trainer starts another worker and tries the program again; here closing ends that one."""
    ends = []
    with Sandbox(workers=1, seconds=1000) as sandbox:
        process = sandbox._workers[0]._process
        thread = start_endless_program(sandbox, picture, ends)
        child = int(open(f"/proc/{process.pid}/task/{process.pid}/children").read())
        process.kill()
        assert wait_for(lambda: not alive(child))
        restarted = sandbox._workers[0]
        assert wait_for(lambda: restarted._process not in (None, process) and runs(sandbox))
    thread.join()
    assert len(ends) == 1 and ends[0].startswith("the sandbox lost its worker twice")


def test_a_closed_sandbox_leaves_nothing_and_refuses(picture, tmp_path, monkeypatch):
    monkeypatch.setattr(worker.tempfile, "gettempdir", lambda: str(tmp_path))
    with Sandbox(workers=2) as sandbox:
        assert len(os.listdir(tmp_path)) == 2
        assert healthy(sandbox, picture) and healthy(sandbox, picture)
        assert wait_for(lambda: not list(tmp_path.glob("*/run/*")))     # the reply comes first
        assert {path.name for path in tmp_path.glob("*/*")} <= {"run", "outside"}
        workers = [worker._process.pid for worker in sandbox._workers]
    assert os.listdir(tmp_path) == [] and not any(map(alive, workers))
    with pytest.raises(RuntimeError, match="closed"):
        sandbox.run("", picture)
    sandbox.close()


def test_closing_does_not_wait_for_a_program(picture):
    ends = []
    with Sandbox(workers=1, seconds=1000) as sandbox:
        thread = start_endless_program(sandbox, picture, ends)
    thread.join()
    assert ends == ["the sandbox is closed"]


def test_a_forked_trainer_may_not_use_its_parents_sandbox(box, picture, monkeypatch):
    monkeypatch.setattr(os, "getpid", lambda: -1)
    with pytest.raises(RuntimeError, match="forked"):
        box.run("", picture)


# What a machine lacks.

@pytest.mark.parametrize("header, column", [("x86_64-linux-gnu/asm/unistd_64.h", 1),
                                            ("asm-generic/unistd.h", 2)])
def test_the_call_numbers_are_the_kernels(header, column):
    try:
        text = open(f"/usr/include/{header}").read()
    except FileNotFoundError:
        pytest.skip("the kernel's headers are not installed")
    numbers = dict(re.findall(r"#define\s+__NR(?:3264)?_(\w+)\s+(\d+)", text))
    numbers.setdefault("newfstatat", numbers.get("fstatat"))
    tables = [jail.ALLOWED, jail.PRETENDED, jail.ATTRIBUTES]
    tables += [call for call, *_ in jail.INSPECTED]
    for call in " ".join(tables).split():
        name, number = call.split(":")[0], call.split(":")[column]
        assert number == numbers.get(name, "-"), call


@pytest.mark.skipif(not LINUX, reason="landlock or chroot, and seccomp")
def test_a_safe_machine_says_so_in_one_line(picture):
    with Sandbox(workers=1, strict=True) as sandbox:
        assert sandbox.escapes == () and "seccomp" in sandbox.layers
        assert "NOT SAFE" not in sandbox.describe() and "\n" not in sandbox.describe()


@pytest.mark.parametrize("without, escape", [(("landlock", "chroot"), "read files, write files"),
                                             (("seccomp",), "use the network"),
                                             (ALL, "signal processes")])
def test_a_missing_layer_is_named_and_strict_refuses(picture, without, escape):
    with Sandbox(workers=1, without=without) as sandbox:
        line = sandbox.describe()
        assert "NOT SAFE" in line and escape in line and without[0] in line and "\n" not in line
        assert healthy(sandbox, picture)
    with pytest.raises(SandboxError, match=escape):
        Sandbox(workers=1, without=without, strict=True)


@pytest.mark.parametrize("without", [("landlock",), ("fork",), ("fork",) + ALL],
                         ids=["chroot", "fresh", "macOS"])
def test_the_degraded_ways_run_ordinary_programs(picture, without):
    """Chroot in landlock's place; a fresh interpreter for every program; no layers, as on macOS."""
    with Sandbox(workers=1, seconds=3, without=without) as sandbox:
        assert healthy(sandbox, picture)
        code = program("import numpy as np", "image = Image.fromarray(255 - np.asarray(image))",
                       "print('好')")
        execution = sandbox.run(code, picture)
        assert same(execution, ImageOps.invert(picture)) and execution.stdout == "好\n"
        assert sandbox.run("1 / 0", picture).error == "ZeroDivisionError: division by zero (line 1)"
        assert sandbox.run("while True: pass", picture).error == "the program ran longer than 3 s"
        assert healthy(sandbox, picture)


def test_a_worker_that_cannot_start_is_told(monkeypatch):
    monkeypatch.setattr(worker.sys, "executable", "/bin/false")
    with pytest.raises(SandboxError, match="did not start"):
        Sandbox(workers=1)
