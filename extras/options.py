"""The command line: the machine's options, what every option may be, and what runs in place of one.

An option is a field of a dataclass, its comment is its text in --help, and its type says what it
takes. The lesson's options stand in the lesson's files, beside the code that they change; here are
the others, in `Machine`: they do not change what is learned, but how the machine is used, what is
kept, and which variant runs.

A new option is a new field below, with a comment. If some of its values make no sense, name them in
LEAST, POSITIVE or `check`. If its default depends on the model, put it into setup.DEFAULTS.
"""

import argparse
import dataclasses
import functools
import inspect
import io
import math
import os
import sys
import tokenize
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

from data import mat
from extras import files, resume, search, setup, weights
from extras.resume import RunError
from extras.setup import choose_parts, load_policy, load_samples, open_run, open_tools
from extras.usage import MEMORY_OPTIONS, UsageError, flag_of, leaf
from policy import PolicyError
from tools import SandboxError

__all__ = ["Machine", "UsageError", "choose_parts", "explains_errors", "instead_of_a_run",
           "load_policy", "load_samples", "open_run", "open_tools", "parse"]

OnOff = Literal["on", "off"]


@dataclass
class Machine:
    """Options that do not change what is learned: the machine, the run folder, the variants."""
    # the machine
    device: str | None = None       # cpu, cuda or cuda:N; default: cuda where there is one
    dtype: Literal["float32", "bfloat16"] | None = None     # precision of the model's weights and
                                    # activations; default: float32 on the CPU, else bfloat16
    threads: int | None = None      # CPU threads; 0 lets torch choose
    rollout_batch: int | None = None        # episodes sampled side by side, in whole groups;
                                    # default: what --plan says that the GPU's memory holds
    eval_batch: int | None = None   # questions evaluated side by side; default: --rollout-batch
    micro_batch_tokens: int | None = None   # tokens in one forward pass of the update, padding
                                    # included; one episode may have more
    checkpointing: OnOff | None = None      # on: backward computes each layer again instead of
                                    # keeping it; a third more arithmetic, less memory
    update: Literal["rows", "tree"] | None = None   # tree: a group's prompt goes through the model
                                    # once (extras/tree.py); rows: each episode by itself
    cuda_graph: OnOff = "off"       # on: record a step of decoding on the GPU and replay it
    # the run folder
    out: str | None = None          # run folder, must not exist; default: runs/<task>-<date>-<time>
    resume: str | None = None       # continue this run folder from its last checkpoint
    save_every: int | None = None   # steps between checkpoints (default with LoRA: 1); 0: as often
                                    # as checkpoints take at most 5% of the time
    eval_every: int = 0             # steps between evaluations; 0: only before and after training
    eval_samples: int = 0           # evaluate on the first N held-out samples; 0: on all
    eval_sampled: OnOff = "on"      # evaluate at temperature 1 as well; off halves the time
    # tools and search
    sandbox: Literal["auto", "strict"] = "auto"     # strict: refuse to start where a program could
                                    # reach files or the network
    sandbox_workers: int = 2        # programs that run side by side
    sandbox_seconds: float = 10.0   # wall-clock limit of one program, seconds
    sandbox_memory: int = 1024      # memory limit of one program, MB
    corpus: str | None = None       # passages to search offline: .jsonl, or the .sqlite index made
                                    # from it; default: MAT-mini's, else Serper (SERPER_API_KEY)
    replay: str | None = None       # record of searches (.sqlite): what it holds is not asked again
    passages: int | None = None     # passages that each search returns; paper: 4
    similarity: str = "auto"        # compares queries with gold ones: lexical, or an encoder's
                                    # folder or hub name; auto: all-MiniLM-L6-v2 where available
    # the model's words, and the paper's protocol
    system_prompt: str | None = None        # file with the system prompt; default: the one that the
                                    # checkpoint was trained with, else our own
    protocol: Literal["episodes", "paper"] = "episodes"     # paper: one growing message, training
                                    # on single steps (extras/paper.py)
    crop_box: Literal["question", "model"] = "question"     # --protocol paper cuts crops at the
                                    # question's box, or at the program's own
    code_errors: Literal["shown", "hidden"] = "shown"       # with --protocol paper: whether the
                                    # model sees why its program failed; paper: hidden
    step_side: int = 720            # --protocol paper stretches the images of training steps to
                                    # this square, pixels; 0: not; paper: 720
    # instead of a run
    plan: bool = False              # print what the run would take of a GPU's memory
    plan_device: str | None = None  # the GPU to plan for; default: the one that is there, else H200
    check_data: bool = False        # print what the data files hold and every defect
    save_merged: str | None = None  # write the adapter folder --model and its base as one model
    score: str | None = None        # print the scores of a predictions file, by both scorers
    compare: list | None = None     # compare two predictions files, item by item
    report: str | None = None       # make report.html of this run folder again
    show_episode: list | None = None        # print the N-th episode of a run, token by token

    @property
    def training_turns(self) -> int:
        """The most turns of an episode in training: the paper trains on single steps."""
        return 1 if self.protocol == "paper" else self.max_turns


LEAST = {"steps": 0, "eval_every": 0, "eval_samples": 0, "eval_batch": 1, "save_every": 0,
         "samples_per_step": 1, "group_size": 2, "rollout_batch": 1, "max_new_tokens": 1,
         "max_turns": 1, "max_length": 16, "sandbox_workers": 1, "sandbox_memory": 64, "warmup": 0,
         "inner_epochs": 1, "minibatches": 1, "micro_batch_tokens": 1, "beta": 0.0, "seed": 0,
         "threads": 0, "step_side": 0, "passages": 1, "lora_rank": 0}
POSITIVE = ("temperature", "sandbox_seconds", "lr", "max_grad_norm")
WEIGHTS = ("answer", "format", "problem", "query")
PAPER_ONLY = ("crop_box", "code_errors", "step_side")
VALUES = {"compare": ("A", "B"), "show_episode": ("N", "RUN"), "weight": "NAME=X"}


# --- the command line -----------------------------------------------------------------------------


def comments_of(cls: type) -> dict[str, tuple[str, str]]:
    """(group, text) of each field that the class itself defines, from its source.

    A field's text is the comment behind it; comments alone on the next lines, further in than the
    fields, continue it. A comment at the fields' own indent names a group.
    """
    found, group, name = {}, cls.__doc__.split("\n")[0].rstrip("."), None
    for token in tokenize.generate_tokens(io.StringIO(inspect.getsource(cls)).readline):
        line = token.line[:token.start[1]].strip()
        if token.type == tokenize.NAME and not line and token.string in cls.__annotations__:
            name = token.string
        elif token.type == tokenize.NAME and not line:
            name = None                 # a method, or a decorator's name
        elif token.type == tokenize.COMMENT and not line and token.start[1] == 4:
            group = token.string.lstrip("# ")
        elif token.type == tokenize.COMMENT and name:
            text = found.get(name, ("", ""))[1]
            found[name] = (group, f"{text} {token.string.lstrip('# ')}".strip())
    return found


def parser_of(config_type: type) -> argparse.ArgumentParser:
    """The command line of all fields, in groups. An unknown flag ends the program with code 2."""
    parser = argparse.ArgumentParser(prog="arft.py", allow_abbrev=False,
                                     usage="python arft.py [--option value ...]",
                                     description="Visual Agentic Reinforcement Fine-Tuning")
    types_of, groups = typing.get_type_hints(config_type), {}
    defaults = {field.name: field.default for field in dataclasses.fields(config_type)}
    for cls in (config_type, *config_type.__bases__):
        for name, (title, text) in comments_of(cls).items():
            if title not in groups:
                groups[title] = parser.add_argument_group(title)
            text += default_text(name, defaults[name])
            groups[title].add_argument(flag_of(name), default=argparse.SUPPRESS,
                                       help=text.replace("%", "%%"),
                                       **arguments_of(name, types_of[name]))
    return parser


def default_text(name: str, default) -> str:
    """What --help says of the default."""
    if name in setup.DEFAULTS:
        small, other = setup.DEFAULTS[name]
        return f" (default: {small} with the embedded model, else {other})"
    return "" if default in (None, False) or name in VALUES else f" (default: {default})"


def arguments_of(name: str, kind) -> dict:
    """What argparse is told about an option of this type."""
    if kind is bool:
        return {"action": "store_true"}
    if name == "weight":
        return {"action": AddWeight, "metavar": VALUES[name]}
    if name in VALUES:
        return {"nargs": len(VALUES[name]), "metavar": VALUES[name]}
    union = isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union
    kinds = typing.get_args(kind) if union else (kind,)
    for one in kinds:
        if typing.get_origin(one) is Literal:
            return {"choices": typing.get_args(one)}
    number = next((one for one in kinds if one in (int, float)), None)
    return {"type": number, "metavar": number.__name__.upper()} if number else {}


class AddWeight(argparse.Action):
    """--weight NAME=X, any number of times, as one dictionary."""

    def __call__(self, parser, namespace, value, option=None):
        name, _, number = value.partition("=")
        try:
            weight = float(number)
        except ValueError:
            parser.error(f"{option} {value}: must be NAME=X with a number X, as in answer=1")
        if name not in WEIGHTS or not math.isfinite(weight):
            parser.error(f"{option} {value}: NAME is one of {', '.join(WEIGHTS)}, X is finite")
        setattr(namespace, self.dest, {**getattr(namespace, self.dest, {}), name: weight})


def parse(config_type: type, arguments: list[str]):
    """The command line as a Config, checked. With --resume the options of that run.

    Raises UsageError or RunError.
    """
    given = vars(parser_of(config_type).parse_args(arguments))
    if "resume" in given:
        if both := [name for name in INSTEAD if name in given]:
            raise UsageError(f"--resume and {flag_of(both[0])} exclude each other; choose one")
        config = resume.resumed(given, config_type)
    else:
        config = config_type(**given)
    explains_errors.config = config
    if setup.processes() > 1:
        many = leaf("many", "torchrun")
        many.join(config)
        many.Run.explain = staticmethod(explanation_of)
    check(config)
    return config


# --- what cannot be -------------------------------------------------------------------------------


def check(config) -> None:
    """Raises UsageError for values that no run can have."""
    for name, low in LEAST.items():
        value = getattr(config, name)
        if value is not None and value < low:
            why = " (an advantage compares the episodes of a group)" if name == "group_size" else ""
            raise UsageError(f"{flag_of(name)} {value}: must be at least {low}{why}")
    for name in POSITIVE:
        value = getattr(config, name)
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise UsageError(f"{flag_of(name)} {value}: must be a positive number")
    instead = [flag_of(name) for name in INSTEAD if getattr(config, name)]
    if len(instead) > 1:
        raise UsageError(f"{instead[0]} and {instead[1]} exclude each other; choose one")
    for name in PAPER_ONLY:
        if config.protocol == "episodes" and getattr(config, name) != getattr(type(config), name):
            raise UsageError(f"{flag_of(name)} belongs to the paper's protocol; add --protocol "
                             "paper")
    if config.vision == "trained" and config.lora_rank:
        raise UsageError("--vision trained needs --lora-rank 0: only the language model gets "
                         "adapters")
    if config.protocol == "paper":
        leaf("paper", "--protocol paper")
    if config.update == "tree":
        leaf("tree", "--update tree")
    check_files(config)
    check_machine(config)


def check_files(config) -> None:
    """Raises UsageError for files that are not there, and for a run folder that is."""
    if config.corpus and not Path(config.corpus).exists():
        raise UsageError(f"--corpus {config.corpus}: no such file; name a .jsonl with one passage "
                         "a line")
    if config.model:
        weights.check_name(config.model)
    if config.system_prompt:
        setup.read_prompt(config.system_prompt)
    if config.out and not config.resume and Path(config.out).exists():
        raise UsageError(f"--out {config.out} exists; nothing was overwritten. Name a new folder "
                         "or remove it")


def check_machine(config) -> None:
    """Raises UsageError for a device or a number of processes that does not fit."""
    count, device = setup.processes(), config.device
    if (config.samples_per_step or 0) % count:
        raise UsageError(f"--samples-per-step {config.samples_per_step}: {count} processes cannot "
                         f"share them; give a multiple of {count}")
    if count > 1 and config.scale == "batch":
        raise UsageError("--scale batch needs the rewards of all processes; use --scale group or "
                         "one process")
    cuda = torch.cuda.is_available()
    if device not in (None, "cpu") and not (device.startswith("cuda") and cuda):
        raise UsageError(f"--device {device} is not available here; use --device cpu")


# --- instead of a run -----------------------------------------------------------------------------


def instead_of_a_run(config) -> int | None:
    """Does what an option asks for in place of a run; else prepares the run and returns None."""
    for name, do in INSTEAD.items():
        if getattr(config, name):
            return do(config)
    prepare(config)
    return None


def prepare(config) -> None:
    """Fills in open options, says what was chosen, and sets up the process."""
    for line in setup.complete(config):
        print(line)
    check(config)       # what was chosen, too
    if setup.processes() > 1:
        own = config.samples_per_step // setup.processes()
        print(f"ranks:  {setup.processes()}; each samples {own} x {config.group_size} episodes a "
              "step")
    if config.protocol == "paper":
        size = f"{config.step_side} pixels square" if config.step_side else "as they are"
        print(f"paper:  one growing message; crops at the {config.crop_box}'s box; errors of "
              f"programs {config.code_errors}; training on single steps, images {size}")
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.set_flush_denormal(True)      # denormal numbers slow a long run on the CPU down twofold
    torch.manual_seed(config.seed)


def print_plan(config) -> int:
    """--plan, for --model or the default on a GPU. Neither data nor weights are read."""
    plan = leaf("plan", "--plan")
    if config.plan_device not in (None, *plan.DEVICES):
        raise UsageError(f"--plan-device {config.plan_device}: one of {', '.join(plan.DEVICES)}")
    config.model, config.data = config.model or setup.HUB_MODEL, config.data or ""
    setup.complete(config)
    print("\n".join(plan.plan_lines(config)))
    return 0


def check_data(config) -> int:
    """--check-data: what the task's files hold, then every defect."""
    small = config.device == "cpu" or not torch.cuda.is_available()
    if config.model:
        small = setup.is_small(config.model)
    setup.choose_data(config, small)
    return files.check_files(config.task, config.data)


def save_merged(config) -> int:
    """--save-merged: an adapter folder as an ordinary Hugging Face folder."""
    weights.save_merged(config.model, config.save_merged)
    return 0


def score(config) -> int:
    """--score: a predictions file under both scorers."""
    return files.score_file(config.task, config.score)


def compare(config) -> int:
    """--compare: predictions file B against A under both scorers."""
    return files.compare_files(config.task, *config.compare)


def write_report(config) -> int:
    """--report: report.html of a run folder, made again."""
    print(leaf("report", "--report").write(config.report))
    return 0


def show_episode(config) -> int:
    """--show-episode: one episode, token by token."""
    print(leaf("report", "--show-episode").show_episode(*config.show_episode))
    return 0


INSTEAD = {"check_data": check_data, "plan": print_plan, "save_merged": save_merged,
           "score": score, "compare": compare, "report": write_report,
           "show_episode": show_episode}


# --- errors ---------------------------------------------------------------------------------------


def explanation_of(error: BaseException) -> tuple[int, str] | None:
    """(exit code, message) of an error that needs no stack trace: bad input, a GPU too small."""
    known = (UsageError, PolicyError, SandboxError, search.SearchRefused, RunError, mat.DataError)
    if report := leaf("report"):
        known += (report.ReportError,)
    if isinstance(error, torch.OutOfMemoryError):
        plan = leaf("plan")
        return 1, (plan.out_of_memory_message(explains_errors.config, error) if plan else
                   f"the GPU's memory is full; lower {MEMORY_OPTIONS}")
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted; the last checkpoint has what was learned until then"
    return (2, str(error)) if isinstance(error, known) else None


def explains_errors(main):
    """A decorator: an error that you can mend ends in one or two lines and an exit code."""
    @functools.wraps(main)
    def call(arguments: list[str]) -> int:
        try:
            return main(arguments)
        except KeyboardInterrupt:       # before the run began, or a second one
            return 130
        except Exception as error:
            known = explanation_of(error)
            if not known:
                raise
            print(f"arft.py: {known[1]}", file=sys.stderr)
            return known[0]
    return call


explains_errors.config = None           # of the run in this process, for `explanation_of`
