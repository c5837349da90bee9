"""The trainer's half of the sandbox: it starts the processes that run programs, and talks to them.

`Sandbox` owns a few workers and is safe to share among threads. A worker is a process of its own,
started from extras/jail.py, which forks a locked child for every program; this file never sees how.
Only open files, numbers and pixels pass between the two, and nothing that comes back is trusted.

What the sandbox covers, on Linux with landlock (5.13 or newer) and seccomp, as root or as an
ordinary user:
- files: a program can write in its scratch directory only (files, no directories or links), and can
  read only Python, its packages, shared libraries and fonts;
- network: a program gets no socket of any kind, not even a loopback or an abstract one;
- processes: a program can start no process and no thread, it can signal or trace no other process,
  and it does not outlive its worker;
- secrets: its environment is made from nothing; it has no open file and no memory of the trainer;
- state: every program starts from the same fork, in an empty directory, with seeded random
  generators;
- limits: wall time, CPU time, memory, open files, file size, disk, printed characters and image
  pixels;
- the result: the image is decoded inside the jail, and only pixels of a checked size come out.

What it does not cover:
- a bug in the kernel itself, reached through the calls that are still allowed (against that you
  need a virtual machine);
- a program can ask whether a path exists and how large the file is (stat), though not what is in
  it; it can also ask for the name and the load of the machine;
- files that are open and already removed escape the disk limit: at most 32 files of 128 MB, until
  the program's time is over;
- other programs become slower: each worker may keep one core busy.

Without landlock the sandbox uses chroot instead; a program can then import only modules that are
already loaded. `Sandbox.describe()` says what else a machine lacks, which the worker has found out
by trying, and with `strict=True` the sandbox then refuses to start. On macOS there are only the
limits, the clean environment and the separate process: files and network are open. Windows is not
supported.
"""

import json
import os
import queue
import re
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec

from PIL import Image

from extras import jail

LAYERS = tuple(jail.LAYERS)     # their names, in the order in which a child applies them
OUTPUT_CHARACTERS = 2000        # kept of what a program printed: its beginning and its end
ERROR_CHARACTERS = 500
# glibc puts large blocks on one heap of huge pages and does not give it back: after a fork every
# page costs a fault when it is first used. Other C libraries ignore this.
ONE_HEAP = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=268435456:"
                              "glibc.malloc.trim_threshold=268435456:glibc.malloc.top_pad=16777216"}


class SandboxError(RuntimeError):
    """The sandbox cannot start, or it is less safe than you asked for."""


@dataclass
class Execution:
    """What came of one program: an image or an error, never both."""
    image: Image.Image | None   # RGB
    stdout: str                 # what it printed (standard error too); a long text loses its middle
    error: str | None           # one line for the model, the same whenever the same program runs
    seconds: float              # wall clock, without the time spent waiting for a free worker


class Sandbox:
    """Workers that run untrusted image programs. A context manager; many threads may share it.

    seconds: wall time of one program. memory_mb: what it may allocate. strict: raise SandboxError
    on a machine where a program could read or write your files or use the network. without: names
    from LAYERS (or "fork") that are left out, for tests and lessons.

    >>> with Sandbox(workers=1) as sandbox:
    ...     sandbox.run("print(6 * 7)", Image.new("RGB", (8, 8))).stdout
    '42\\n'
    """

    def __init__(self, workers: int = 2, seconds: float = 10, memory_mb: int = 1024,
                 strict: bool = False, *, without: tuple[str, ...] = ()):
        self.seconds, self.memory_mb = seconds, memory_mb
        self._closed, self._owner = False, os.getpid()
        self._workers, self._idle = [], queue.SimpleQueue()
        try:
            for _ in range(workers):    # all start before the first is waited for
                self._workers.append(Worker(seconds, memory_mb, without))
                self._workers[-1].launch()
            for worker in self._workers:
                worker.wait_until_ready()
                self._idle.put(worker)
        except (OSError, ValueError) as problem:
            self.close()
            raise SandboxError(f"a sandbox worker did not start ({problem}); "
                               "its own message is above") from problem
        # A layer is in force if every worker has it; a worker's escape is the sandbox's.
        self.layers = tuple(name for name in LAYERS
                            if all(name in worker.layers for worker in self._workers))
        escapes = (escape for worker in self._workers for escape in worker.escapes)
        self.escapes = tuple(dict.fromkeys(escapes))
        if strict and self.escapes:
            self.close()
            raise SandboxError(self.describe() + "; to run anyway, leave out --sandbox strict")

    def describe(self) -> str:
        """One line: the layers in force, and what a program could still do, tried at the start."""
        line = f"sandbox: {len(self._workers)} workers, {self.seconds:g} s, {self.memory_mb} MB"
        line += f"; layers: {', '.join(self.layers)}"
        missing = [name for name in LAYERS if name not in self.layers + ("chroot",)]
        if missing:
            line += f"; not available here: {', '.join(missing)}"
        if self.escapes:
            line += f"; NOT SAFE: programs can {', '.join(self.escapes)}"
        return line

    def run(self, code: str, image: Image.Image) -> Execution:
        """Run one program on one image. Raises RuntimeError only if the sandbox is closed."""
        return self._execute(code, encode(image))

    def map(self, jobs) -> list[Execution]:
        """Run (code, image) pairs in parallel. The results are in the order of the pairs.

        Equal pairs run once and share one Execution.
        """
        jobs = list(jobs)
        images = {id(image): image for _, image in jobs}
        files = {key: encode(image) for key, image in images.items()}
        work = [(code, files[id(image)]) for code, image in jobs]
        unique = list(dict.fromkeys(work))
        with ThreadPoolExecutor(len(self._workers)) as pool:
            done = dict(zip(unique, pool.map(lambda job: self._execute(*job), unique)))
        return [done[job] for job in work]

    def _execute(self, code: str, file: bytes) -> Execution:
        if os.getpid() != self._owner:
            raise RuntimeError("a Sandbox cannot be shared with a forked process: start another")
        worker = self._idle.get()
        problem = None
        try:
            for _ in range(2):      # a worker that died is replaced, and the program tried again
                if self._closed:
                    raise RuntimeError("the sandbox is closed")
                try:
                    return Execution(*worker.execute(code, file))
                except (OSError, ValueError) as failure:
                    problem = failure
                    worker.stop()
        except BaseException:       # Ctrl-C: the next caller must not get the reply to this program
            worker.stop()
            raise
        finally:
            self._idle.put(worker)
        return Execution(None, "", f"the sandbox lost its worker twice ({problem})", 0.0)

    def close(self) -> None:
        """Stop all workers and remove their directories."""
        self._closed = True
        for worker in self._workers:
            worker.stop()

    def __enter__(self) -> "Sandbox":
        return self

    def __exit__(self, *exception) -> None:
        self.close()


class Worker:
    """One zygote process, as the trainer sees it: started, spoken to, replaced.

    The trainer itself is never forked, because it may hold CUDA and threads. The zygote is a fresh
    interpreter. layers, escapes: what it said about itself at its start.
    """

    def __init__(self, seconds: float, memory_mb: int, without: tuple[str, ...]):
        sites, readable = library_directories()
        self._settings = {"parent": os.getpid(), "tmp": tempfile.gettempdir(), "sites": sites,
                          "readable": readable, "seconds": seconds, "memory_mb": memory_mb,
                          "without": list(without)}
        self._process, self._base, self.layers = None, "", None

    def launch(self) -> None:
        """Start the process. `wait_until_ready` must follow."""
        ours, theirs = socket.socketpair()
        # Nothing of the trainer's environment. One thread for BLAS, and the same order of sets and
        # dictionaries in every worker.
        environment = {"PATH": os.defpath, "LANG": "C.UTF-8", "PYTHONUTF8": "1",
                       "PYTHONHASHSEED": "0", "HOME": ".", "OPENBLAS_NUM_THREADS": "1",
                       "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", **ONE_HEAP}
        if "LD_LIBRARY_PATH" in os.environ:     # some installations of Python do not start without
            environment["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-s", "-B", jail.__file__, "zygote", json.dumps(self._settings),
                 str(theirs.fileno())],
                env=environment, pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                start_new_session=True)         # Ctrl-C at the terminal reaches the trainer alone
        self._socket = ours
        self._replies = ours.makefile("rb")

    def wait_until_ready(self) -> None:
        """Wait for the zygote's first message. OSError or ValueError: it did not start."""
        self._socket.settimeout(60)
        hello = self._reply()
        self._base = hello["base"]
        # A busy machine must not cost a layer without anybody noticing.
        if self.layers not in (None, hello["layers"]):
            raise OSError(f"a new worker has other layers than the first: {hello['layers']}")
        self.layers, self.escapes = hello["layers"], hello["escapes"]
        # The zygote should notice first that a program takes too long.
        self._socket.settimeout(self._settings["seconds"] + 30)

    def execute(self, code: str, file: bytes) -> tuple[Image.Image | None, str, str | None, float]:
        """Send one program, wait for its end and read what it left.

        Returns (image, stdout, error, seconds), the fields of `tools.Execution`. OSError or
        ValueError: the worker is lost.
        """
        if self._process is None:
            self.launch()
            self.wait_until_ready()
        start = time.perf_counter()
        source = code.encode(errors="replace")
        with open_buffer() as job, open_buffer() as output, open_buffer() as result:
            job.write(jail.JOB.pack(len(source)) + source)
            job.write(file)
            job.flush()
            socket.send_fds(self._socket, [b"!"],
                            [job.fileno(), output.fileno(), result.fileno()])
            error = self._reply()["error"]
            # The child is gone or will be killed: each byte is read once, and checked.
            result.seek(0)
            image, problem = read_result(result) if not error else (None, error)
            stdout = self._clean(read_text(output.fileno()))
        if problem:
            problem = " ".join(self._clean(problem).split())[:ERROR_CHARACTERS]
            problem = problem or "an error without words"
        return image, stdout, problem, time.perf_counter() - start

    def _reply(self) -> dict:
        line = self._replies.readline()
        if not line:
            raise ConnectionError("the worker process ended")
        return json.loads(line)

    def _clean(self, text: str) -> str:
        """Remove what differs between two runs (paths, addresses) and what a terminal obeys."""
        scratch = os.path.join(self._base, "run")
        text = text.replace(scratch + os.sep, "").replace(scratch, ".")
        text = re.sub(r" at 0x[0-9a-f]{6,16}\b", " at 0x...", text)
        return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "", text)

    def stop(self) -> None:
        """End the process, whatever it is doing. `execute` starts a new one."""
        if self._process is None:
            return
        with suppress(OSError):     # the zygote sees the end, kills its program and cleans up
            self._socket.shutdown(socket.SHUT_RDWR)
        self._replies.close()
        self._socket.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None
        if self._base:
            jail.wipe(self._base)       # a zygote that was killed could not do it


def library_directories() -> tuple[list[str], list[str]]:
    """(where numpy, PIL and cv2 are installed, all directories that a program may read)

    It may read Python, the packages, the shared libraries and the fonts.
    """
    readable = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    readable |= {"/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/usr/share/fonts"}
    readable.add(sysconfig.get_config_var("LIBDIR") or "/lib")      # conda's shared libraries
    sites = []
    for spec in filter(None, map(find_spec, ("numpy", "PIL", "cv2"))):
        package = os.path.dirname(spec.origin)
        site = os.path.dirname(package)
        sites.append(site)
        # A package that is imported from a source tree opens its own directory only, not
        # everything that lies next to it.
        installed = os.path.basename(site) in ("site-packages", "dist-packages")
        readable.add(site if installed else package)
    return sorted(set(sites)), sorted(readable)


def encode(image: Image.Image) -> bytes:
    """The input file as PPM: one line of text, then raw pixels, which is quick to write and read.

    Image readers look at the content of a file and ignore that its name ends in .jpg.
    """
    image = image if image.mode == "RGB" else image.convert("RGB")
    return b"P6\n%d %d\n255\n" % image.size + image.tobytes()


def open_buffer():
    """A file without a name, in memory where possible: a full disk must not stop the trainer."""
    if hasattr(os, "memfd_create"):
        return open(os.memfd_create("arft"), "w+b")
    return tempfile.TemporaryFile()


def read_result(file) -> tuple[Image.Image | None, str | None]:
    """(image, None) or (None, error), read from what the child sent, which is not trusted.

    Reads what is in the file and never waits for more.
    """
    ended = None, "the program ended its own process"
    header = file.read(jail.RESULT.size)
    if len(header) < jail.RESULT.size:
        return ended
    width, height, length = jail.RESULT.unpack(header)
    if length:
        return None, file.read(min(length, jail.ERROR_BYTES)).decode(errors="replace")
    if not 0 < width * height <= jail.PIXELS:
        return ended
    start = b"P6\n%d %d\n255\n" % (width, height)
    if file.read(len(start)) != start:
        return ended
    pixels = file.read(3 * width * height)
    if len(pixels) != 3 * width * height:
        return ended
    return Image.frombytes("RGB", (width, height), pixels), None


def read_text(fd: int) -> str:
    """What was printed, at most OUTPUT_CHARACTERS. A character has up to four bytes."""
    size, half = os.fstat(fd).st_size, OUTPUT_CHARACTERS // 2
    text = os.pread(fd, 8 * half, 0).decode(errors="replace")
    if size <= 8 * half and len(text) <= 2 * half:
        return text
    tail = os.pread(fd, 4 * half, max(0, size - 4 * half)).decode(errors="replace")
    return f"{text[:half]}\n[... {size} bytes in all, the middle is left out ...]\n{tail[-half:]}"
