"""Stop and go on: what a run writes so that it can be killed at any moment, and how it is read
again.

What it teaches: a long run ends early more often than not (a closed lid, a full disk, a queue that
kills), and going on is only worth something if the result is that of the run that never stopped.
Two ideas are enough:

  - A file is either old or new, never half: it is written beside its place, forced to the disk, and
  renamed. A rename
    is one action of the file system; `kill -9` falls before it or after it.
  - What grows line by line (metrics, episodes) is not rewritten every step. A checkpoint says how
  long each of these
    files was; whatever stands behind that, a torn last line included, belongs to steps that will be
    made again.

A checkpoint holds what the steps changed and what decides the next one: the trained weights, the
optimiser, the random states, the place in the data, and the counters of the run. What never changes
is not in it: frozen weights and the reference of the KL term come from `--model` again, and a
fingerprint tells whether it is still the same model.

Read next: record.py, which writes the rest of the run folder. Left out: a checkpoint in parts over
several machines.
"""

import fcntl
import json
import os
import shutil
import signal
import zipfile
import zlib
from contextlib import contextmanager
from pathlib import Path

import torch

KEPT = 2                            # checkpoints: if the newest cannot be read, there is one more
LINE_FILES = (".jsonl", ".csv")     # files of the run folder that only grow
NEW, OLD = ".new", ".old"           # what is being written, what is being replaced


class RunError(ValueError):
    """A run folder that cannot be written, read or resumed; the message says what to do."""


# --- all or nothing -------------------------------------------------------------------------------


def sync(path: Path) -> None:
    """Waits until a file, or a folder's list of names, is on the disk itself."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_file(path: Path, write) -> None:
    """Replaces a file by what `write(file)` writes, whole or not at all."""
    new = path.with_name(path.name + NEW)
    try:
        with open(new, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    except Exception:
        new.unlink(missing_ok=True)
        raise
    sync(path.parent)


def write_text(path: Path, text: str) -> None:
    write_file(path, lambda file: file.write(text.encode()))


def write_folder(path: Path, write) -> None:
    """Replaces a folder by what `write(folder)` writes, whole or not at all;
    `settle` ends what a kill left undone."""
    new, old = (path.with_name(path.name + end) for end in (NEW, OLD))
    shutil.rmtree(new, ignore_errors=True)
    if not path.parent.is_dir():
        # do not make it anew for one part
        raise FileNotFoundError(2, "the run folder is gone", str(path.parent))
    try:
        new.mkdir()
        write(new)
    except Exception as error:      # safetensors has an error of its own for a full disk
        shutil.rmtree(new, ignore_errors=True)
        raise error if isinstance(error, OSError) else OSError(5, str(error), str(path)) from error
    for part in [*new.iterdir(), new]:
        sync(part)
    if path.exists():
        path.rename(old)
    new.rename(path)
    sync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def settle(folder: Path) -> None:
    """After a kill: a folder that was out of its place comes back, and what
    was half written goes."""
    for old in folder.glob("*" + OLD):
        if not old.with_suffix("").exists():
            old.rename(old.with_suffix(""))
    for left in [*folder.glob("*" + NEW), *folder.glob("*" + OLD),
                 *folder.glob(f"checkpoint/*{NEW}")]:
        shutil.rmtree(left) if left.is_dir() else left.unlink()


# --- checkpoints ----------------------------------------------------------------------------------


def checkpoint_name(step: int) -> str:
    return f"step-{step:06d}.pt"


def save(folder: Path, state: dict) -> None:
    """Writes RUN/checkpoint/step-N.pt, N = state["step"], and keeps the last
    KEPT. Raises OSError."""
    home = folder / "checkpoint"
    if state["step"] == 0:
        home.mkdir(exist_ok=True)

    def write(file):
        try:
            torch.save(state, file)
        # torch's own writer on a full disk, which hides the cause
        except RuntimeError as error:
            cause = error.__context__
            raise cause if isinstance(cause, OSError) else OSError(5, str(error).splitlines()[0],
                                                                   file.name) from error
    write_file(home / checkpoint_name(state["step"]), write)
    for old in sorted(home.glob("step-*.pt"))[:-KEPT]:
        old.unlink()


def newest(folder: Path) -> tuple[dict | None, list[str]]:
    """(the newest checkpoint that can be read, what is wrong with newer ones); (None, []) where
    there never was one.

    Every byte is checked (torch's files are zip archives with sums). Raises RunError if none of
    them can be read.
    """
    wrong = []
    for file in sorted((folder / "checkpoint").glob("step-*.pt"), reverse=True):
        try:
            with zipfile.ZipFile(file) as archive:
                damaged = archive.testzip()
            if damaged:
                raise ValueError(f"{damaged} in it is damaged")
            return torch.load(file, map_location="cpu", weights_only=True), wrong
        except Exception as error:          # whatever a damaged file makes the readers raise
            wrong.append(f"{file} cannot be read ({error or type(error).__name__})")
    started = (folder / "metrics.jsonl").exists() and (folder / "metrics.jsonl").stat().st_size
    if wrong or started:
        raise RunError("; ".join(wrong or [f"{folder} has steps but no checkpoint"])
                       + ". Nothing was changed. Start a "
                       "new run with another --out; --model takes model/ or best/ of this one, if "
                       "they are there")
    return None, []


# --- the files that grow --------------------------------------------------------------------------


def line_files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.suffix in LINE_FILES)


def lengths(folder: Path) -> dict[str, int]:
    """Bytes of every file that grows, all of them on the disk."""
    files = line_files(folder)
    for file in files:
        sync(file)
    return {file.name: file.stat().st_size for file in files}


def cut_back(folder: Path, step: int, lengths: dict[str, int]) -> None:
    """Takes the run folder back to the checkpoint of `step`: the files that grow are cut to the
    `lengths` that they had, files and checkpoints that came later go. Raises RunError, and then has
    changed nothing."""
    for name, length in lengths.items():
        if not (folder / name).exists() or (folder / name).stat().st_size < length:
            raise RunError(
                f"{folder / name} is shorter than at the checkpoint: it was changed since. Nothing "
                f"was "
                           f"changed now. Bring the file back, or start a new run with another "
                           f"--out")
    for file in line_files(folder):
        if file.name in lengths:
            os.truncate(file, lengths[file.name])
        else:
            file.unlink()
    for later in [file for file in folder.glob("checkpoint/step-*.pt") if file.name
                  > checkpoint_name(step)]:
        later.unlink()          # it could not be read
    (folder / "summary.json").unlink(missing_ok=True)


def append_lines(path: Path, objects) -> None:
    """Adds one line of JSON for each object. A lone surrogate from a data file
    has no UTF-8; as \\ud800 it is the same JSON."""
    with open(path, "a", encoding="utf-8", errors="backslashreplace") as file:
        file.writelines(json.dumps(o, ensure_ascii=False) + "\n" for o in objects)


def read_lines(path: Path) -> list[dict]:
    """The objects of a .jsonl file. A last line that a kill tore is left out."""
    lines = (path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists()
             else [""])
    # behind the last line break: nothing, or a torn line
    return [json.loads(line) for line in lines[:-1]]


def take_up(path: Path) -> list[dict]:
    """`read_lines` of a file that will be added to: a torn last line is cut
    off it. No file: no lines."""
    if path.exists():
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
    return read_lines(path)


# --- whose run it is ------------------------------------------------------------------------------


@contextmanager
def locked(folder: Path):
    """Two processes never write one run folder. The lock goes with the
    process, however that ends."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(f"{folder} is in use: its run has not ended. Wait, or stop it with "
                           f"Ctrl-C first") from None
        yield
    finally:
        os.close(handle)


def fingerprint(model: torch.nn.Module, prompt: str, samples: list) -> dict[str, int]:
    """Check sums of what a run starts from: the weights before training, the
    words, the samples (without images)."""
    weights = 0
    for name, value in sorted(model.state_dict().items()):
        weights = zlib.crc32(name.encode(), weights)
        weights = zlib.crc32(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy(),
                             weights)
    rows = "\n".join(repr((s.id, s.question, s.golds, s.problems, s.queries)) for s in samples)
    return {"model": weights, "system_prompt": zlib.crc32(prompt.encode()),
            "data": zlib.crc32(rows.encode())}


class Signals:
    """Ctrl-C and SIGTERM (what batch systems send first) end a run cleanly: both raise
    KeyboardInterrupt.

    Not within `hold`, so that no update, record or checkpoint is cut in half: there the first
    signal waits for the end of the block. A second one does not wait.
    """

    def __init__(self):
        self.held = self.came = False

    def __enter__(self) -> "Signals":
        self.before = {number: signal.getsignal(number)
                       for number in (signal.SIGINT, signal.SIGTERM)}
        for number, handler in self.before.items():
            if handler != signal.SIG_IGN:       # a shell's background job is not to hear Ctrl-C
                signal.signal(number, self._come)
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _come(self, number, frame) -> None:
        if not self.held or self.came:
            raise KeyboardInterrupt
        self.came = True

    @contextmanager
    def hold(self):
        self.held = True
        try:
            yield
        finally:
            self.held, came, self.came = False, self.came, False
        if came:
            raise KeyboardInterrupt
