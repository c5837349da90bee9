"""Stop and resume: what a run writes so that a kill at any moment costs the step in progress alone.

A long run ends early more often than not (a closed lid, a full disk, a queue that kills), and
resuming is only worth something if it gives the run that never stopped. Two ideas are enough:

  - A file is either old or new, never half. It is written under another name, forced to the disk,
    and renamed. A rename is one action of the file system: `kill -9` falls before it or after it.
  - What grows line by line (metrics, episodes) is not rewritten every step. A checkpoint says how
    long each of these files was. Whatever stands behind that, a torn last line included, belongs to
    steps that will be made again.

A checkpoint holds what the steps changed and what decides the next one: the trained weights, the
optimiser, the random states, the place in the data, and the counters of the run. What never changes
is not in it: frozen weights and the reference of the KL term come from `--model` again, and a
fingerprint tells whether it is still the same model. Left out: a checkpoint in parts over several
machines.
"""

import dataclasses
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

from extras.usage import flag_of, leaf

START = {"versions", "commit", "fingerprint", "resumed"}    # in config.json beside the options
KEPT = 2                            # checkpoints: if the newest cannot be read, there is one more
LINE_FILES = (".jsonl", ".csv")     # files of the run folder that only grow
NEW, OLD = ".new", ".old"           # what is being written, what is being replaced
# What may differ when you resume: where things are (a fingerprint tells whether they are the same)
# and how the machine is used. All else would make it another run.
MAY_DIFFER = {"resume", "model", "data", "system_prompt", "similarity", "device", "threads",
              "save_every", "eval_every", "eval_batch", "rollout_batch", "micro_batch_tokens",
              "checkpointing", "sandbox_workers", "sandbox", "cuda_graph"}


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
    """Replaces a file by what `write(file)` writes, as a whole or not at all."""
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
    """Replaces a text file, as a whole or not at all."""
    write_file(path, lambda file: file.write(text.encode()))


def write_folder(path: Path, write) -> None:
    """Replaces a folder by what `write(folder)` writes, as a whole or not at all.

    `repair_folder` ends what a kill left undone.
    """
    new, old = (path.with_name(path.name + end) for end in (NEW, OLD))
    shutil.rmtree(new, ignore_errors=True)
    if not path.parent.is_dir():        # do not make it anew for one part
        raise FileNotFoundError(2, "the run folder is gone", str(path.parent))
    try:
        new.mkdir()
        write(new)
    except Exception as error:          # safetensors has an error of its own for a full disk
        shutil.rmtree(new, ignore_errors=True)
        if isinstance(error, OSError):
            raise
        raise OSError(5, str(error), str(path)) from error
    for part in [*new.iterdir(), new]:
        sync(part)
    if path.exists():
        path.rename(old)
    new.rename(path)
    sync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def repair_folder(folder: Path) -> None:
    """After a kill: moves a replaced folder back into its place, removes what is half written."""
    for old in folder.glob("*" + OLD):
        if not old.with_suffix("").exists():
            old.rename(old.with_suffix(""))
    for pattern in ("*" + NEW, "*" + OLD, f"checkpoint/*{NEW}"):
        for left in folder.glob(pattern):
            shutil.rmtree(left) if left.is_dir() else left.unlink()


# --- checkpoints ----------------------------------------------------------------------------------


def checkpoint_name(step: int) -> str:
    """step-000012.pt"""
    return f"step-{step:06d}.pt"


def save(folder: Path, state: dict) -> None:
    """Writes RUN/checkpoint/step-N.pt, N = state["step"], and keeps the last KEPT. Raises OSError.
    """
    home = folder / "checkpoint"
    if state["step"] == 0:
        home.mkdir(exist_ok=True)

    def write(file):
        try:
            torch.save(state, file)
        except RuntimeError as error:       # torch's own writer on a full disk, hiding the cause
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise OSError(5, str(error).splitlines()[0], file.name) from error
    write_file(home / checkpoint_name(state["step"]), write)
    for old in sorted(home.glob("step-*.pt"))[:-KEPT]:
        old.unlink()


def newest(folder: Path) -> tuple[dict | None, list[str]]:
    """(the newest checkpoint that can be read, what is wrong with newer ones).

    (None, []) where there never was one. Every byte is checked (torch's files are zip archives with
    sums). Raises RunError if none of them can be read.
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
        raise RunError("; ".join(wrong or [f"{folder} has steps but no checkpoint"]) + ". Nothing "
                       "was changed. Start a new run with another --out; --model takes model/ or "
                       "best/ of this one, if they are there")
    return None, []


def open_checkpoint(config, origin: dict) -> dict | None:
    """The checkpoint that --resume starts from; None for the run's beginning.

    Refuses another model, other words or other data than at the run's start, and says what else is
    not as it was.
    """
    folder = Path(config.resume)
    kept = json.loads((folder / "config.json").read_text())
    for name, value in origin.items():
        if kept.get("fingerprint") and kept["fingerprint"].get(name) != value:
            where, flag = getattr(config, name) or config.model, flag_of(name)
            raise RunError(f"--resume {folder}: {where} is not the {name.replace('_', ' ')} that "
                           f"the run began with. Bring that back, or name where it is now: {flag} "
                           "PATH")
    state, wrong = newest(folder)
    for line in wrong:
        print(f"note:   {line}; using the one before it")
    where = f"after step {state['step']} of {config.steps}" if state else (
        "from its beginning, because no step was complete")
    print(f"resume: {folder}, {where}")
    then = kept["versions"]["torch"]
    if then != torch.__version__:
        print(f"note:   torch {torch.__version__} now, {then} then: the numbers may differ in the "
              "last digits")
    return state


# --- what a checkpoint holds ----------------------------------------------------------------------


def trained(policy) -> dict[str, torch.Tensor]:
    """The weights that training changes, by name."""
    return {name: weight for name, weight in policy.model.named_parameters()
            if weight.requires_grad}


def learned(policy, optimizer) -> dict:
    """Trained weights and optimiser state of one process."""
    return {"weights": {name: weight.detach() for name, weight in trained(policy).items()},
            "optimizer": optimizer.adamw.state_dict(), "ranks": 1}


def random_states(generator: torch.Generator) -> dict:
    """The states of the run's own generator and of torch's."""
    on_gpu = generator.device.type == "cuda"
    return {"generator": generator.get_state(), "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if on_gpu else []}


def set_random_states(generator: torch.Generator, states: dict) -> None:
    """The reverse of `random_states`."""
    generator.set_state(states["generator"])
    torch.set_rng_state(states["torch"])
    if states["cuda"]:
        torch.cuda.set_rng_state_all(states["cuda"])


def restore(run) -> None:
    """Gives policy, optimiser and random states what the checkpoint `run.state` holds.

    The place in the data needs no more than the number of steps (`Run.steps`).
    """
    state = run.state
    if run.alone and state["ranks"] == 1:
        restore_learned(run.policy, run.optimizer, state)
        set_random_states(run.generator, state["random"])
    else:                       # written by several processes, or read by several
        leaf("many", "a checkpoint that several processes wrote").restore(run)


def restore_learned(policy, optimizer, state: dict) -> None:
    """Weights and optimiser state of one process."""
    weights = trained(policy)
    check_names(weights, state["weights"])
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(state["weights"][name])        # a master weight is rounded on the way
    optimizer.adamw.load_state_dict(state["optimizer"])


def check_names(weights: dict, saved: dict) -> None:
    """Raises RunError if the checkpoint holds other weights. Tied ones: FSDP names lm_head, too."""
    if (weights.keys() ^ saved.keys()) - {"lm_head.weight"}:
        raise RunError("the checkpoint holds other weights than are trained here; give the --model "
                       "of the run's start")


# --- the files that grow --------------------------------------------------------------------------


def line_files(folder: Path) -> list[Path]:
    """The files of the run folder that only grow."""
    return sorted(file for file in folder.iterdir() if file.suffix in LINE_FILES)


def lengths(folder: Path) -> dict[str, int]:
    """Bytes of every file that grows, after all of them are on the disk."""
    files = line_files(folder)
    for file in files:
        sync(file)
    return {file.name: file.stat().st_size for file in files}


def cut_to_checkpoint(folder: Path, step: int, lengths: dict[str, int]) -> None:
    """Takes the run folder back to the checkpoint of `step`.

    The files that grow are cut to the `lengths` that they had; files and checkpoints that came
    later are removed. Raises RunError, and then has changed nothing.
    """
    for name, length in lengths.items():
        if not (folder / name).exists() or (folder / name).stat().st_size < length:
            raise RunError(f"{folder / name} is shorter than at the checkpoint: somebody has "
                           "changed it. Nothing was changed now. Bring the file back, or start a "
                           "new run with another --out")
    for file in line_files(folder):
        if file.name in lengths:
            os.truncate(file, lengths[file.name])
        else:
            file.unlink()
    for file in folder.glob("checkpoint/step-*.pt"):
        if file.name > checkpoint_name(step):
            file.unlink()       # it could not be read
    (folder / "summary.json").unlink(missing_ok=True)


def append_lines(path: Path, objects) -> None:
    """Adds one line of JSON for each object.

    A lone surrogate from a data file has no UTF-8; written as \\ud800 it is the same JSON.
    """
    with open(path, "a", encoding="utf-8", errors="backslashreplace") as file:
        file.writelines(json.dumps(o, ensure_ascii=False) + "\n" for o in objects)


def read_lines(path: Path) -> list[dict]:
    """The objects of a .jsonl file. A last line that a kill tore is left out."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    return [json.loads(line) for line in text.split("\n")[:-1]]     # the last: nothing, or torn


def reopen_lines(path: Path) -> list[dict]:
    """The objects of a file that will grow on: a torn last line is cut off it. No file: none."""
    if path.exists():
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
    return read_lines(path)


# --- whose run it is ------------------------------------------------------------------------------


def resumed(given: dict, config_type: type):
    """The options of the run that --resume names, with those that you give and that may differ.

    given: the options on the command line, by name. Raises RunError.
    """
    folder = Path(given["resume"])
    names = {field.name for field in dataclasses.fields(config_type)}
    try:
        kept = json.loads((folder / "config.json").read_text())
        config = config_type(**{name: kept[name] for name in names & kept.keys()})
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise RunError(f"--resume {folder}: its config.json cannot be read ({error}); name the "
                       "folder of a run, or start a new one without --resume") from None
    for name in sorted(kept.keys() - names - START):    # or what it chose would be lost in silence
        raise RunError(f"--resume {folder}: its config.json has {name}, an option that this "
                       f"version does not know. Check out the commit of the run "
                       f"({kept.get('commit')}) to resume it")
    config.resume = config.out = str(folder)
    for name, value in given.items():
        if name in MAY_DIFFER:
            setattr(config, name, value)
        elif value != getattr(config, name):
            if name != "steps":
                refuse(name, value, getattr(config, name))
            change_steps(config, value)
    if config.device.partition(":")[0] != kept["device"].partition(":")[0]:
        refuse("device", config.device, kept["device"])     # another precision, another generator
    refuse_finished(config, folder)
    return config


def refuse(name: str, value, kept) -> None:
    """Raises RunError for an option that would make it another run."""
    flag = flag_of(name)
    raise RunError(f"{flag} {value}: the run that you resume has {kept}, and another value would "
                   f"make it another run. Leave {flag} out, or start a new run")


def refuse_finished(config, folder: Path) -> None:
    """Raises RunError for a run that has nothing left to do."""
    if not (folder / "summary.json").exists():
        return
    summary, last = json.loads((folder / "summary.json").read_text()), "after"
    if config.eval_only:
        last = "before"
    if last in summary and summary["steps"] >= config.steps:
        longer = ""
        if config.lr_schedule == "constant":
            longer = f"; or --resume {folder} --steps N for more"
        raise RunError(
            f"--resume {folder}: this run is finished ({summary['steps']} steps). To train on from "
            f"its weights: --model {folder / 'model'} in a new run{longer}")


def change_steps(config, steps: int) -> None:
    """More steps, or fewer: only where the learning rate does not depend on how many there are."""
    if config.lr_schedule != "constant":
        raise RunError(
            f"--steps {steps}: the learning rate of this run falls to zero at step {config.steps}, "
            "so another number of steps would have given it another past. Leave --steps out. To "
            "train on from its weights, start a new run with --model "
            f"{Path(config.out) / 'model'}. (You can prolong runs with --lr-schedule constant)")
    config.steps = steps


@contextmanager
def locked(folder: Path):
    """Two processes never write one run folder. The lock ends with the process, however that ends.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(f"{folder} is in use: its run has not ended. Wait, or stop it with "
                           "Ctrl-C first") from None
        yield
    finally:
        os.close(handle)


def fingerprint(model: torch.nn.Module, prompt: str, samples: list) -> dict[str, int]:
    """Check sums of what a run starts from: weights, system prompt, samples (without images)."""
    weights = 0
    for name, value in sorted(model.state_dict().items()):
        weights = zlib.crc32(name.encode(), weights)
        data = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        weights = zlib.crc32(data, weights)
    rows = "\n".join(repr((s.id, s.question, s.golds, s.problems, s.queries)) for s in samples)
    return {"model": weights, "system_prompt": zlib.crc32(prompt.encode()),
            "data": zlib.crc32(rows.encode())}


class Signals:
    """Ctrl-C and SIGTERM (which batch systems send first) both raise KeyboardInterrupt.

    Within `hold` the first signal waits for the end of the block, so that no update, record or
    checkpoint is cut in half. A second one does not wait.
    """

    def __init__(self):
        self.held = self.came = False

    def __enter__(self) -> "Signals":
        self.before = {number: signal.getsignal(number)
                       for number in (signal.SIGINT, signal.SIGTERM)}
        for number, handler in self.before.items():
            if handler != signal.SIG_IGN:       # a shell's background job must not hear Ctrl-C
                signal.signal(number, self.receive)
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def receive(self, number, frame) -> None:
        """The handler of both signals."""
        if not self.held or self.came:
            raise KeyboardInterrupt
        self.came = True

    @contextmanager
    def hold(self):
        """Inside, the first signal waits for the end."""
        self.held = True
        try:
            yield
        finally:
            self.held, came, self.came = False, self.came, False
        if came:
            raise KeyboardInterrupt
