"""What an agent can do: the parser of its turns, and the sandbox that runs the code it writes.

Read this after the README's first episode and before `rollout.py`, which plays the turns; the walls of the sandbox
are in `jail.py`, to be read next.  The paper (Visual-ARFT, arXiv 2505.14246) has four actions: `<problem>`, `<code>`,
`<search>` and `<answer>`, each after a `<think>`.

**The parser.**  `parse` turns whatever a model wrote into an `Action`.  It answers two questions at once: what the
environment should do (`kind`, `value`: lenient about quotes, spaces, fences and text around the tags) and whether the
format reward is earned (`strict`: the paper's format, to the letter).  A tag is a tag wherever it stands, inside a
thought or a program too; whoever writes one twice, opens two actions or leaves one open has made a malformed turn, and
`error` tells the model why.  Nothing is guessed: values stay text.

**The sandbox.**  `Sandbox` runs Python written by a model, clumsy or hostile, in processes that share nothing with
this one.  The program reads `path_to_input_image.jpg` and writes `path_to_output_image.jpg` in an empty directory of
its own; the image that it leaves, what it printed and what went wrong come back as an `Execution`, never as an
exception.  The released evaluation of the paper calls `exec` in the process that holds the model instead.

Covered, on Linux with landlock (5.13 or newer) and seccomp, as root or as an ordinary user:
- files: only the scratch directory can be written (files in it, no directories or links), only Python, its packages,
  shared libraries and fonts can be read;
- network: no socket of any kind, loopback and abstract ones included;
- processes: none can be started, no thread either; none can be signalled, traced or outlived;
- secrets: an environment made from nothing, no open file and no memory of the trainer;
- state: every program starts from the same fork, in an empty directory; random generators are seeded;
- limits: wall and CPU time, memory, open files, file size, disk, printed characters, image pixels;
- the result: the image is decoded inside the jail, and only pixels of a checked size come out.

Not covered:
- a fault of the kernel itself, reached through the calls that are left (a virtual machine is the answer to that);
- whether a path exists and how large it is can be asked (stat), its content not; so can the machine's name and load;
- files that are open and already removed escape the disk limit: at most 32 of 128 MB until the time is over;
- other programs slow down: each worker may keep one core busy;
- without landlock a chroot stands in (then only preloaded modules can be imported); what a machine lacks beyond that
  is said by `Sandbox.describe()`, measured by trying, and `strict=True` refuses to start.  On macOS nothing but
  the limits, the clean environment and the separate process is there: files and network are
  open.  Windows is not supported.
"""

import io
import itertools
import json
import os
import queue
import re
import socket
import sqlite3
import subprocess
import sys
import sysconfig
import tempfile
import textwrap
import threading
import time
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import requests
from PIL import Image
from tqdm import tqdm

from extras import jail

OUTPUT_CHARACTERS = 2000        # of what a program printed, its beginning and its end
ERROR_CHARACTERS = 500
# Large blocks on one heap of huge pages that is not given back: after a fork every page costs a fault at its first use
# (glibc only, ignored elsewhere).
ONE_HEAP = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=268435456:"
                              "glibc.malloc.trim_threshold=268435456:glibc.malloc.top_pad=16777216"}


@dataclass(frozen=True)
class Passage:
    """Something that a search found."""
    title: str
    url: str        # "" where the source has none
    text: str


# --- The parser ------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Action:
    """A parsed turn."""
    kind: str                               # problem | code | search | answer | malformed
    value: tuple[str, ...] | str | None     # problem: labels; code: source; search, answer: text; malformed: None
    error: str | None                       # malformed: one sentence that the model may be shown
    strict: bool                            # the whole turn is a thought and one action in the paper's format


TAG = re.compile(r"<(/?)(think|problem|code|search|answer)>")
FENCE = re.compile(r"```(?:(?:python3?|py)(?=\s)|[\w.+-]*(?=[ \t]*\r?\n))?[ \t]*")
PAPER_CODE = re.compile(r"\s*```python.*?```", re.DOTALL)
PAPER_PROBLEM = re.compile(r"\s*\{\s*'[^']+'\s*(?:,\s*'[^']+'\s*)*\}\s*")


def parse(turn: str) -> Action:
    """What the model wants to do.  Never raises; one pass over the text, whatever it is.

    `read_tags` says where the body of each tag is, and what is wrong.  A fault makes the turn malformed (value None,
    strict False) with that sentence as its error; so does a turn without an action, and one whose value is empty: "the
    tag <answer> is empty".  The value of a problem is what `read_labels` makes of the body, of a program
    `read_program`, of the other two the body without the blanks around it.  `is_strict` tells the last field.

    >>> parse("<think>It is dark.</think>\\n<problem> {'rotation90', 'dark'} </problem>")
    Action(kind='problem', value=('rotation90', 'dark'), error=None, strict=True)
    >>> parse("So: <answer> 42 </answer>")
    Action(kind='answer', value='42', error=None, strict=False)
    >>> parse("<think>Hm.</think><answer>42").error
    'the tag <answer> is not closed'
    """
    spans, error = read_tags(turn)
    actions = [kind for kind in spans if kind != "think"]
    if not error and not actions:
        error = "there is no action: write one of <problem>, <code>, <search> or <answer>"
    if error:
        return Action("malformed", None, error, False)
    kind = actions[0]
    body = turn[slice(*spans[kind])]
    value = {"problem": read_labels, "code": read_program}.get(kind, str.strip)(body)
    if not value:
        return Action("malformed", None, f"the tag <{kind}> is empty", False)
    return Action(kind, value, None, is_strict(turn, spans, kind, body))


def read_tags(turn: str) -> tuple[dict[str, tuple[int, int]], str | None]:
    """Where the body of each tag starts and ends, and what is wrong.  Stops at the first fault."""
    spans, opened, start = {}, None, 0
    for tag in TAG.finditer(turn):
        closing, name = tag.groups()
        if closing and name != opened:
            return spans, f"the tag <{name}> occurs twice" if name in spans else f"</{name}> comes without <{name}>"
        if closing:
            spans[name], opened = (start, tag.start()), None
            continue
        if name in spans or name == opened:
            return spans, f"the tag <{name}> occurs twice"
        if opened:
            return spans, f"<{name}> begins before <{opened}> is closed"
        if name != "think" and any(other != "think" for other in spans):
            return spans, f"two actions in one turn: <{next(o for o in spans if o != 'think')}> and <{name}>"
        opened, start = name, tag.end()
    return spans, f"the tag <{opened}> is not closed" if opened else None


def read_labels(body: str) -> tuple[str, ...]:
    """The label set in any of its spellings: {'dark', 'blur'}, ["dark"], dark, blur."""
    labels = (label.strip(" \t\r\n'\"`‘’“”") for label in re.split("[,，、]", body.strip(" \t\r\n{}[]()")))
    return tuple(label for label in labels if label)


def read_program(body: str) -> str:
    """The source text, out of its code fence if it has one."""
    fence = FENCE.search(body)
    if fence:
        end = body.find("```", fence.end())
        body = body[fence.end():end if end >= 0 else None]
    return textwrap.dedent(body).strip()


def is_strict(turn: str, spans: dict, kind: str, body: str) -> bool:
    """Whether the turn is <think>...</think> and one action, to the letter of the paper's format reward."""
    if "think" not in spans:
        return False
    (think_start, think_end), (start, end) = spans["think"], spans[kind]
    between = turn[think_end + len("</think>"):start - len(f"<{kind}>")]
    frame = think_start == len("<think>") and end + len(f"</{kind}>") == len(turn)
    shape = {"problem": PAPER_PROBLEM.fullmatch, "code": PAPER_CODE.match}.get(kind, bool)
    return frame and not between.strip() and bool(shape(body))


# --- The sandbox -----------------------------------------------------------------------------------------------------

class SandboxError(RuntimeError):
    """The sandbox cannot start, or not as safely as was asked."""


@dataclass
class Execution:
    """What came of one program: an image or an error, never both."""
    image: Image.Image | None   # RGB
    stdout: str                 # what it printed (standard error too), the middle left out if it is long
    error: str | None           # one line for the model, the same for the same program
    seconds: float              # wall clock, waiting for a free worker not included


class Sandbox:
    """Workers that run untrusted image programs; a context manager, safe to use from many threads.

    seconds: wall time of one program; memory_mb: what it may allocate; strict: raise SandboxError on a machine where
    a program could read or write your files or use the network; without: layers of `jail.LAYERS` (or "fork") to leave
    out, for tests and lessons.

    >>> with Sandbox(workers=1) as sandbox:
    ...     sandbox.run("print(6 * 7)", Image.new("RGB", (8, 8))).stdout
    '42\\n'
    """

    def __init__(self, workers: int = 2, seconds: float = 10, memory_mb: int = 1024, strict: bool = False, *,
                 without: tuple[str, ...] = ()):
        self.seconds, self.memory_mb, self._closed, self._owner = seconds, memory_mb, False, os.getpid()
        self._workers, self._idle = [], queue.SimpleQueue()
        try:
            for _ in range(workers):    # all are started before the first is waited for
                self._workers.append(Worker(seconds, memory_mb, without))
                self._workers[-1].launch()
            for worker in self._workers:
                worker.greet()
                self._idle.put(worker)
        except (OSError, ValueError) as problem:
            self.close()
            raise SandboxError(f"a sandbox worker did not start ({problem}); its own message is above") from problem
        self.layers = tuple(name for name in jail.LAYERS if all(name in worker.layers for worker in self._workers))
        self.escapes = tuple(dict.fromkeys(escape for worker in self._workers for escape in worker.escapes))
        if strict and self.escapes:
            self.close()
            raise SandboxError(self.describe() + "; leave out --sandbox strict to run all the same")

    def describe(self) -> str:
        """One line: the layers in force and what a program could still do, as tried at the start."""
        line = f"sandbox: {len(self._workers)} workers, {self.seconds:g} s, {self.memory_mb} MB"
        line += f"; layers: {', '.join(self.layers)}"
        missing = [name for name in jail.LAYERS if name not in self.layers + ("chroot",)]
        if missing:
            line += f"; missing here: {', '.join(missing)}"
        if self.escapes:
            line += f"; NOT SAFE: programs can {', '.join(self.escapes)}"
        return line

    def run(self, code: str, image: Image.Image) -> Execution:
        """Run one program on one image.  Only a closed sandbox raises."""
        return self._execute(code, encode(image))

    def map(self, jobs) -> list[Execution]:
        """Run (code, image) pairs in parallel, results in order.  Equal pairs run once and share one Execution."""
        jobs = list(jobs)
        files = {id(image): image for _, image in jobs}
        files = {key: encode(image) for key, image in files.items()}
        work = [(code, files[id(image)]) for code, image in jobs]
        unique = list(dict.fromkeys(work))
        with ThreadPoolExecutor(len(self._workers)) as pool:
            done = dict(zip(unique, pool.map(lambda job: self._execute(*job), unique)))
        return [done[job] for job in work]

    def _execute(self, code: str, picture: bytes) -> Execution:
        if os.getpid() != self._owner:
            raise RuntimeError("a Sandbox cannot be shared with a forked process: start another")
        worker = self._idle.get()
        problem = None
        try:
            for _ in range(2):          # a worker that died is replaced, and the program gets a second chance
                if self._closed:
                    raise RuntimeError("the sandbox is closed")
                try:
                    return worker.execute(code, picture)
                except (OSError, ValueError) as failure:
                    problem = failure
                    worker.stop()
        except BaseException:           # Ctrl-C: the reply that is still to come must not reach the next caller
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
    """One zygote process, seen from the trainer: started, spoken to, replaced.

    The trainer itself is never forked (it may hold CUDA and threads): the zygote is a fresh interpreter.
    """

    def __init__(self, seconds: float, memory_mb: int, without: tuple[str, ...]):
        sites, readable = library_directories()
        self._settings = {"parent": os.getpid(), "tmp": tempfile.gettempdir(), "sites": sites, "readable": readable,
                          "seconds": seconds, "memory_mb": memory_mb, "without": list(without)}
        self._process, self._base, self.layers = None, "", None

    def launch(self) -> None:
        ours, theirs = socket.socketpair()
        # Nothing of the trainer's environment; one thread for BLAS; the same order of sets and dicts in every worker.
        environment = {"PATH": os.defpath, "LANG": "C.UTF-8", "PYTHONUTF8": "1", "PYTHONHASHSEED": "0", "HOME": ".",
                       "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", **ONE_HEAP}
        if "LD_LIBRARY_PATH" in os.environ:         # without it some installations of Python do not start
            environment["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-s", "-B", jail.__file__, "zygote", json.dumps(self._settings), str(theirs.fileno())],
                env=environment, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                start_new_session=True)         # so that Ctrl-C at the terminal is the trainer's alone
        self._socket = ours
        self._replies = ours.makefile("rb")

    def greet(self) -> None:
        self._socket.settimeout(60)
        hello = self._reply()
        self._base = hello["base"]
        if self.layers not in (None, hello["layers"]):      # a busy machine must not cost a wall unnoticed
            raise OSError(f"a new worker has other layers than the first: {hello['layers']}")
        self.layers, self.escapes = hello["layers"], hello["escapes"]
        self._socket.settimeout(self._settings["seconds"] + 30)     # the zygote is to notice first

    def execute(self, code: str, picture: bytes) -> Execution:
        """Send one program, wait for its end, read what it left.  OSError or ValueError: the worker is lost."""
        if self._process is None:
            self.launch()
            self.greet()
        start = time.perf_counter()
        source = code.encode(errors="replace")
        with open_buffer() as job, open_buffer() as output, open_buffer() as result:
            job.write(jail.JOB.pack(len(source)) + source)
            job.write(picture)
            job.flush()
            socket.send_fds(self._socket, [b"!"], [job.fileno(), output.fileno(), result.fileno()])
            error = self._reply()["error"]
            result.seek(0)          # the child is killed, if not yet gone: each byte is read once, and checked
            image, problem = read_result(result) if not error else (None, error)
            stdout = self._tidy(read_text(output.fileno()))
        if problem:
            problem = " ".join(self._tidy(problem).split())[:ERROR_CHARACTERS] or "an error without words"
        return Execution(image, stdout, problem, time.perf_counter() - start)

    def _reply(self) -> dict:
        line = self._replies.readline()
        if not line:
            raise ConnectionError("the worker process ended")
        return json.loads(line)

    def _tidy(self, text: str) -> str:
        """Remove what differs between two runs (paths, addresses) and what a terminal would obey."""
        scratch = os.path.join(self._base, "run")
        text = text.replace(scratch + os.sep, "").replace(scratch, ".")
        text = re.sub(r" at 0x[0-9a-f]{6,16}\b", " at 0x...", text)
        return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "", text)

    def stop(self) -> None:
        """End the process, whatever it is doing; harmless if there is none.  `execute` starts a new one."""
        if self._process is None:
            return
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)     # the zygote sees the end, kills its program and cleans up
        self._replies.close()
        self._socket.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None
        if self._base:
            jail.wipe(self._base)       # for a zygote that was killed


def library_directories() -> tuple[list[str], list[str]]:
    """(where numpy, PIL and cv2 are installed, what a program may read: Python, packages, shared libraries, fonts)."""
    readable = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    readable |= {"/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/usr/share/fonts"}
    readable.add(sysconfig.get_config_var("LIBDIR") or "/lib")      # conda's shared libraries
    sites = []
    for spec in filter(None, map(find_spec, ("numpy", "PIL", "cv2"))):
        package = os.path.dirname(spec.origin)
        site = os.path.dirname(package)
        sites.append(site)
        # A package that is imported from a source tree opens its own directory only, not all that lies beside it.
        readable.add(site if os.path.basename(site) in ("site-packages", "dist-packages") else package)
    return sorted(set(sites)), sorted(readable)


def encode(image: Image.Image) -> bytes:
    """The input file: PPM is a line of text and raw pixels, quick to write and to read; readers ignore the name."""
    image = image if image.mode == "RGB" else image.convert("RGB")
    return b"P6\n%d %d\n255\n" % image.size + image.tobytes()


def open_buffer():
    """A file without a name, in memory where the system can: a full disk must not stop the trainer."""
    return open(os.memfd_create("arft"), "w+b") if hasattr(os, "memfd_create") else tempfile.TemporaryFile()


def read_result(file) -> tuple[Image.Image | None, str | None]:
    """(image, None) or (None, error) from what the child sent; it is not trusted.  Never waits for more than that."""
    header = file.read(jail.RESULT.size)
    if len(header) == jail.RESULT.size:
        width, height, length = jail.RESULT.unpack(header)
        if length:
            return None, file.read(min(length, jail.ERROR_BYTES)).decode(errors="replace")
        if 0 < width * height <= jail.PIXELS:
            start = b"P6\n%d %d\n255\n" % (width, height)
            if file.read(len(start)) == start:
                pixels = file.read(3 * width * height)
                if len(pixels) == 3 * width * height:
                    return Image.frombytes("RGB", (width, height), pixels), None
    return None, "the program ended its own process"


def read_text(fd: int) -> str:
    """What was printed, at most OUTPUT_CHARACTERS; a character has up to four bytes."""
    size, half = os.fstat(fd).st_size, OUTPUT_CHARACTERS // 2
    text = os.pread(fd, 8 * half, 0).decode(errors="replace")
    if size <= 8 * half and len(text) <= 2 * half:
        return text
    tail = os.pread(fd, 4 * half, max(0, size - 4 * half)).decode(errors="replace")
    return f"{text[:half]}\n[... {size} bytes in all, the middle is left out ...]\n{tail[-half:]}"


# --- Search ----------------------------------------------------------------------------------------------------------

class SearchError(Exception):
    """One search that failed; the text is shown to the model ("Search failed: ..."), the episode goes on."""


class SearchRefused(ValueError):
    """No search can work (a wrong key, a corpus that cannot be read): ends the run; the text names cause and cure."""


class Corpus:
    """BM25 over passages on disk, offline: SQLite's FTS5 in one file, millions of passages, nothing held in memory.

    path: a .jsonl file with {"id", "title", "text"} or FlashRAG's {"id", "contents": "title\\ntext"} in each line; the
    index is built beside it as PATH.sqlite, once, with a progress bar, and goes on where it was interrupted. Or that .sqlite file
    itself. Words are runs of letters and digits: text without blanks between its words (Chinese) is not cut.
    Raises SearchRefused, naming file and line, for what cannot be read.
    """
    parallel = 1            # searches at once: the disk is the limit

    def __init__(self, path: str | Path):
        source = Path(path)
        self.index = source if source.suffix == ".sqlite" else source.with_name(source.name + ".sqlite")
        if not source.exists():
            raise SearchRefused(f"corpus {source}: no such file; name a .jsonl with one passage a line (--corpus)")
        try:
            self.db = sqlite3.connect(self.index, check_same_thread=False)
            if source != self.index:
                build_index(source, self.db)
            self.size, = self.db.execute("SELECT value FROM facts WHERE name = 'passages'").fetchone()
        except (sqlite3.Error, OSError, TypeError) as error:
            raise SearchRefused(f"corpus index {self.index}: {error}; remove it, and it is built again") from None
        self.name = f"corpus {source.name.removesuffix('.sqlite')} ({self.size} passages)"

    def search(self, query: str, k: int = 4) -> list[Passage]:
        """The k best passages, best first; fewer, or none, if no more share a word with the query."""
        found: dict[int, None] = {}
        for match, order in self._plan(query_words(query)):
            rows = self.db.execute(f"SELECT rowid FROM passages WHERE passages MATCH ? {order} LIMIT ?", (match, k))
            found |= dict.fromkeys(rowid for rowid, in rows)
            if len(found) >= k:
                break
        rows = (self.db.execute("SELECT title, url, text FROM passages WHERE rowid = ?", (i,)) for i in list(found)[:k])
        return [Passage(*row.fetchone()) for row in rows]

    def _plan(self, words: list[str]):
        """FTS5 expressions to be tried one after the other, and their order.

        Plain BM25 over all words costs some microseconds for each passage that has any of them. Where that would be
        too many, first come the passages that have all words which tell something, then those with the rarest, then any.
        """
        lookup = "SELECT doc FROM frequent WHERE term = ?"
        count = {word: (self.db.execute(lookup, (word,)).fetchone() or (FREQUENT,))[0] for word in words}
        words = sorted(words, key=count.get)
        if not words:
            return
        if sum(count.values()) <= RANKED_PASSAGES or self.size <= RANKED_PASSAGES:
            yield " OR ".join(f'"{word}"' for word in words), "ORDER BY rank"
            return
        telling = [word for word in words if count[word] <= self.size / 20] or words[:1]
        cheap = sum(count[word] for word in telling) <= 50 * RANKED_PASSAGES
        yield " AND ".join(f'"{word}"' for word in telling), "ORDER BY rank" if cheap and len(telling) > 1 else ""
        rare = [word for i, word in enumerate(words) if sum(count[w] for w in words[:i + 1]) <= RANKED_PASSAGES]
        yield " OR ".join(f'"{word}"' for word in rare or words[:1]), "ORDER BY rank" if rare else ""
        yield " OR ".join(f'"{word}"' for word in words), ""


FREQUENT = 500              # passages: how many have a word is stored for words that more have
RANKED_PASSAGES = 5000      # that one query may rank: some ten milliseconds


def query_words(query: str) -> list[str]:
    """The different words of a query, as the index folds them: no case, no accents; signs only part words.

    >>> query_words('Who was "Zoë" AND (the café)?')
    ['who', 'was', 'zoe', 'and', 'the', 'cafe']
    """
    plain = "".join(c for c in unicodedata.normalize("NFKD", query[:1000]) if not unicodedata.combining(c))
    return list(dict.fromkeys(re.findall(r"[^\W_]+", plain.lower())))[:32]


def build_index(source: Path, db: sqlite3.Connection, batch: int = 20_000) -> None:
    """Fills the index from where it stands. Each batch and the place in the file that it reaches are stored as one."""
    with db:
        db.execute("CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value)")
    facts = dict(db.execute("SELECT name, value FROM facts"))
    stamp = f"{source.stat().st_size} {source.stat().st_mtime_ns}"
    if facts.get("source") != stamp:        # another file: from the start
        with db:
            db.executescript("DROP TABLE IF EXISTS passages; DROP TABLE IF EXISTS frequent; DELETE FROM facts;")
            db.execute("CREATE VIRTUAL TABLE passages USING fts5(title, text, url UNINDEXED)")
            db.execute("INSERT INTO facts VALUES ('source', ?), ('place', 0), ('line', 0)", (stamp,))
        facts = {"place": 0, "line": 0}
    if "passages" in facts:
        return
    with open(source, "rb") as file, tqdm(total=source.stat().st_size, initial=facts["place"], unit="B", unit_scale=True,
                                          desc=f"indexing {source.name}", leave=False) as bar:
        file.seek(facts["place"])
        line = facts["line"]
        while lines := list(itertools.islice(file, batch)):
            rows = [read_passage(text, f"{source}: line {line + i}") for i, text in enumerate(lines, 1) if text.strip()]
            line += len(lines)
            with db:
                db.executemany("INSERT INTO passages (title, url, text) VALUES (?, ?, ?)", rows)
                db.execute("UPDATE facts SET value = ? WHERE name = 'place'", (file.tell(),))
                db.execute("UPDATE facts SET value = ? WHERE name = 'line'", (line,))
            bar.update(sum(map(len, lines)))
    with db:
        db.execute("INSERT INTO passages (passages) VALUES ('optimize')")
        db.execute("CREATE VIRTUAL TABLE temp.words USING fts5vocab(main, passages, row)")
        db.execute("CREATE TABLE frequent (term TEXT PRIMARY KEY, doc INTEGER) WITHOUT ROWID")
        db.execute("INSERT INTO frequent SELECT term, doc FROM temp.words WHERE doc > ?", (FREQUENT,))
        db.execute("INSERT INTO facts SELECT 'passages', count(*) FROM passages")


def read_passage(line: bytes, where: str) -> tuple[str, str, str]:
    """(title, url, text) of one line of a corpus."""
    try:
        row = json.loads(line)
        if "contents" in row:
            title, _, text = row["contents"].partition("\n")
            return title.strip('"'), row.get("url", ""), text
        return row["title"], row.get("url", ""), row["text"]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise SearchRefused(f'{where}: must be {{"id", "title", "text"}} or {{"id", "contents"}} as JSON, '
                            f"but is {line[:60]!r}") from None


class Serper:
    """Google's results by the Serper API, live, as in the paper: the snippets of the first k results.

    The key goes into the request's header and nowhere else: no message, record or exception has it.
    """
    parallel = 8            # searches at once: the network is what is waited for
    name = "serper"
    url = "https://google.serper.dev/search"

    def __init__(self, key: str, url: str = url, seconds: float = 10.0, tries: int = 4, pause: float = 1.0):
        if not re.fullmatch(r"[\x21-\x7e]+", key):      # requests would print it in its complaint
            raise SearchRefused("the key in SERPER_API_KEY is empty or has blanks or unprintable signs; copy it again")
        self._key, self.url, self.seconds, self.tries, self.pause = key, url, seconds, tries, pause

    def search(self, query: str, k: int = 4) -> list[Passage]:
        """Raises SearchError after `tries` attempts (429, 5xx, no connection), SearchRefused where the key is refused."""
        for attempt in range(self.tries):
            try:
                answer = requests.post(self.url, json={"q": query, "num": k}, headers={"X-API-KEY": self._key},
                                       timeout=self.seconds, allow_redirects=False)    # a redirect would pass the key on
                problem, wait = f"status {answer.status_code}", answer.headers.get("Retry-After", "")
            except requests.RequestException as error:
                answer, problem, wait = None, type(error).__name__, ""
            if answer is not None and answer.status_code in (401, 403):
                raise SearchRefused(f"Serper refused the key ({problem}): check SERPER_API_KEY and its credit, or search a "
                                    "corpus (--corpus)")
            if answer is not None and answer.status_code == 200:
                return self._read(answer, k)
            if answer is not None and answer.status_code != 429 and answer.status_code < 500:
                break
            if attempt + 1 < self.tries:
                time.sleep(min(float(wait) if wait.isdigit() else self.pause * 2 ** attempt, 30.0))
        raise SearchError(f"the search engine gave {problem}")

    @staticmethod
    def _read(answer, k: int) -> list[Passage]:
        try:
            return [Passage(str(row.get("title", "")), str(row.get("link", "")), str(row.get("snippet", "")))
                    for row in answer.json().get("organic", [])[:k]]
        except (ValueError, AttributeError, TypeError):
            raise SearchError("the search engine's answer is not what its interface promises") from None


class Replay:
    """A record of searches in front of a back end: what was asked once costs nothing, and is the same, ever after.

    path: an SQLite file of (back end, query, k) -> passages, to be kept and shared. backend None, or miss="skip": what
    is not in the record is a failed search. Without a back end every back end's record counts. Failures are not recorded.
    """

    def __init__(self, path: str | Path, backend: Corpus | Serper | None = None, miss: str = "ask"):
        self.backend, self.miss, self.hits, self.misses = backend, miss, 0, 0
        self.name = f"replay of {backend.name}" if backend else "replay"
        self.parallel, self._lock = (backend.parallel if backend else 1), threading.Lock()
        try:
            self.db = sqlite3.connect(path, check_same_thread=False)
            with self.db:
                self.db.execute("CREATE TABLE IF NOT EXISTS searches (backend TEXT, query TEXT, k INTEGER, found TEXT, "
                                "PRIMARY KEY (backend, query, k))")
        except sqlite3.Error as error:
            raise SearchRefused(f"record of searches {path}: {error}; name another file (--replay)") from None

    def search(self, query: str, k: int = 4) -> list[Passage]:
        """What the record has for this back end, query and k (with backend None: any back end's), else what the back
        end finds, which is then recorded under its name.

        Table `searches`: backend, query, k, found (JSON: a list of [title, url, text]). `hits` and `misses` count what the
        record had and had not. SearchError, and nothing is asked, where a miss is to be skipped or there is no back end;
        an error of the back end's own passes through and leaves no record. Threads share `db` and the counters: both only
        under `_lock`, which is not held while the back end is asked. A row is written inside `with self.db`, which commits it.
        """
        known = (query, k, self.backend.name if self.backend else None)
        with self._lock:
            row = self.db.execute("SELECT found FROM searches WHERE query = ? AND k = ? AND backend = coalesce(?, backend)",
                                  known).fetchone()
            self.hits, self.misses = self.hits + (row is not None), self.misses + (row is None)
        if row is not None:
            return [Passage(*passage) for passage in json.loads(row[0])]
        if self.backend is None or self.miss == "skip":
            raise SearchError("this query is not in the record")
        found = self.backend.search(query, k)
        with self._lock, self.db:
            self.db.execute("INSERT OR REPLACE INTO searches VALUES (?, ?, ?, ?)", (
                self.backend.name, query, k, json.dumps([(p.title, p.url, p.text) for p in found])))
        return found


def search_all(backend, queries: list[str], k: int) -> list[list[Passage] | SearchError]:
    """What each query finds, or why it failed, in order; equal queries are asked once."""
    def ask(query: str):
        try:
            return backend.search(query, k)
        except SearchError as error:
            return error

    different = list(dict.fromkeys(queries))
    with ThreadPoolExecutor(backend.parallel) as pool:
        found = dict(zip(different, pool.map(ask, different)))
    return [found[query] for query in queries]


@dataclass
class Tools:
    """What an episode can use. None: switched off (programs return the unchanged image, searches find nothing)."""
    sandbox: Sandbox | None = None
    search: Corpus | Serper | Replay | None = None
    passages: int = 4       # that one search returns
