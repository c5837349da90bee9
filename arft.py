"""Visual Agentic Reinforcement Fine-Tuning: the program.

    python arft.py --task mat-coding                         train, with evaluation before and after
    python arft.py --resume RUN                              go on with a run that was stopped or killed
    python arft.py --task mat-coding --eval-only --model DIR evaluate a checkpoint
    python arft.py --task mat-coding --check-data --data MAT what the files hold, and what is wrong with them
    python arft.py --task mat-coding --score FILE            the scores of a predictions file, without a model
    python arft.py --task mat-coding --compare A B           two of them, item by item
    python arft.py --report RUN                              a run's report.html, made again
    python arft.py --show-episode N RUN                      one episode, token by token

What it teaches: the training loop as an outline. One step is

    samples -> rollout.rollout -> rewards.episode_reward -> grpo.group_advantages -> grpo.update

and everything else in this file is what a person needs around it: options, evaluation,
records, messages. Without a GPU it trains data/tiny on MAT-mini, for real and in minutes;
the same code with another model folder and another data folder is the real thing.

Read next: policy.py, rollout.py, tools.py, rewards.py, pack.py, grpo.py, in this order; paper.py last.
With several GPUs: many.py. Left out: what more than one run at a time would need.
"""

import argparse
import dataclasses
import json
import math
import os
import random
import sys
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if os.environ.get("RANK", "0") != "0":
    os.environ["TQDM_DISABLE"] = "1"        # many GPUs: rank 0 prints

import numpy as np
import torch
import transformers
from tqdm import tqdm

import grpo
from extras import many
from extras import paper
from extras import plan
from extras import report
from extras import resume
from data import mat, mini, mini_search
from extras.plan import DEVICES
from policy import LORA_TARGETS, SEARCH_PROMPT, SYSTEM_PROMPT, Policy, PolicyError, adapter_config, check_name, load
from extras.record import Run, token_record, zero_loss_note
from extras.report import HEADER, ReportError, score_row, show_episode, table
from extras.resume import RunError
from rewards import (SCORERS, compare, episode_reward, lexical_similarity, score_answer,
                     score_predictions, step_reward, summarize)
from rollout import Clock, Episode, Limits, rollout
from extras.search import Corpus, Replay, SearchRefused, SentenceSimilarity, Serper
from tools import Sandbox, SandboxError, Tools

HERE = Path(__file__).parent
TINY, TINY_SEARCH = HERE / "data" / "tiny", HERE / "data" / "tiny-search"
HUB_MODEL, HUB_DATA, HUB_QA = "Qwen/Qwen2.5-VL-3B-Instruct", "laolao77/MAT", "RUC-NLPIR/FlashRAG_datasets"
HUB_SIMILARITY = "sentence-transformers/all-MiniLM-L6-v2"
SERPER_KEY = "SERPER_API_KEY"       # the environment variable; the key is never an option: options are written down


class UsageError(ValueError):
    """An option that cannot be; the message says which and what would do."""


# --- options -------------------------------------------------------------------------------------------


def option(default, help: str, choices: tuple | None = None, values: tuple | None = None):
    """One field of Config. values: the names of several values that the flag takes at once."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices, "values": values})


@dataclass
class Config:
    """Every option; the command line is made from it. None: chosen by `complete` from the model."""
    task: str = option("mat-coding", "what to train and evaluate on", tuple(mat.FILES))
    model: str | None = option(None, "checkpoint folder or hub name; default without CUDA: data/tiny for mat-coding, "
                                     "data/tiny-search for the others; else " + HUB_MODEL)
    data: str | None = option(None, "MAT or FlashRAG folder, or one .jsonl file; default: MAT-mini for the embedded "
                                    f"models and MAT's tasks, else {HUB_DATA} or {HUB_QA} from the hub")
    out: str | None = option(None, "run folder, must not exist; default: runs/<task>-<date>-<time>")
    device: str | None = option(None, "cpu or cuda; default: cuda where there is one")
    dtype: str | None = option(None, "numbers that the model computes in; default: float32 on the CPU, else bfloat16",
                               ("float32", "bfloat16"))
    threads: int | None = option(None, "of the CPU; 0: torch's own choice; default: 1 for data/tiny (steady beside "
                                       "other programs), else 0")
    seed: int = option(0, "of data order and sampling; the same seed gives the same run (CPU)")
    steps: int | None = option(None, "training steps; default: 70 for data/tiny, else 1400 (the paper's checkpoint)")
    system_prompt: str | None = option(None, "file with the words to ask in; default: those that the checkpoint was "
                                             "trained with, else our own")
    protocol: str = option("episodes", "episodes: several turns, tools in the loop; paper: one growing message, training "
                                       "on single steps (paper.py)", ("episodes", "paper"))
    # instead of a run; none of these loads a model but --save-merged
    plan: bool = option(False, "print what the run would take of a GPU: memory by part and phase, seconds a step (plan.py)")
    plan_device: str | None = option(None, "the GPU to plan for; default: the one that is there, else H200", tuple(DEVICES))
    check_data: bool = option(False, "print what the data files hold and every defect; exit code 1 if there is one")
    save_merged: str | None = option(None, "write the adapter folder --model and its base as one ordinary model folder, this one")
    score: str | None = option(None, "print the scores of a predictions file, by both scorers")
    compare: list | None = option(None, "print what predictions file B is better than A by, item by item", values=("A", "B"))
    resume: str | None = option(None, "go on with this run folder from its last checkpoint, with its own options")
    report: str | None = option(None, "make report.html of this run folder again")
    show_episode: list | None = option(None, "print the N-th episode of the run's tokens.jsonl, token by token",
                                       values=("N", "RUN"))
    # evaluation and records
    eval_only: bool = option(False, "evaluate and stop")
    eval_every: int = option(0, "steps between evaluations during training; 0: only before and after")
    eval_sampled: str = option("on", "evaluate at temperature 1, too; off: greedily alone, in half the time", ("on", "off"))
    eval_samples: int = option(0, "evaluate on the first N held-out samples; 0: on all")
    save_every: int | None = option(None, "steps between checkpoints; 0: as often as 5% of the time allow; default: 1 for "
                                          "data/tiny and with LoRA (0.4 GB), else 0 (3B: some 45 GB)")
    record_tokens: str = option("on", "write each step's first group token by token to tokens.jsonl; costs one forward pass "
                                      "of these episodes, without gradient, after the update", ("on", "off"))
    eval_batch: int | None = option(None, "samples evaluated side by side; default: 100 for data/tiny, else --rollout-batch")
    # the episode
    samples_per_step: int | None = option(None, "samples in a step; default: 8 for data/tiny, else 16 (the paper)")
    group_size: int = option(8, "episodes of each sample; paper: 8")
    rollout_batch: int | None = option(None, "episodes sampled side by side, in whole groups; default: the most of 128, 64, "
                                             "32, 16, 8 for which --plan says that the GPU's memory is enough; 128 for data/tiny")
    temperature: float = option(1.0, "of sampling; the scored log-probs use it, too; paper: 1")
    max_new_tokens: int | None = option(None, "ids in one turn; default: 96 for data/tiny, else 256 (the paper)")
    max_turns: int = option(5, "turns in an episode; paper: 5 (in evaluation)")
    max_length: int = option(4096, "ids in an episode; an observation that does not fit ends it")
    cuda_graph: str = option("on", "with CUDA, a step of decoding is recorded once and replayed (rollout.py)", ("on", "off"))
    # the tools
    tools: str = option("on", "off: programs do not run, the image stays as it is, nothing is searched (a control)", ("on", "off"))
    sandbox_workers: int = option(2, "programs that run side by side")
    sandbox_seconds: float = option(10.0, "wall-clock limit of one program, seconds")
    sandbox_memory: int = option(1024, "memory limit of one program, MB")
    corpus: str | None = option(None, "passages to search offline: .jsonl, or the .sqlite index made from it; default: "
                                      f"MAT-mini's for MAT-mini, else Serper, with the key in {SERPER_KEY}")
    replay: str | None = option(None, "record of searches (.sqlite): what it has is not asked again; made if missing")
    replay_miss: str = option("ask", "what is not in the record: ask the corpus or Serper, or skip (the search fails)",
                              ("ask", "skip"))
    passages: int | None = option(None, "that a search returns; default: 2 for the embedded model, else 4 (the paper)")
    sandbox: str = option("auto", "strict: refuse to start where files or network are not kept safe", ("auto", "strict"))
    # the reward
    answer_weight: float = option(1.0, "weight of the answer's score; paper: 1")
    format_weight: float = option(1.0, "weight of the format; paper: 1")
    problem_weight: float = option(1.0, "weight of the stated problem; paper's code: 1")
    query_weight: float = option(1.0, "weight of the searches' similarity to the gold queries; paper: 1")
    similarity: str = option("auto", f"of queries: lexical, or an encoder's folder or hub name; auto: {HUB_SIMILARITY} (the "
                                     "paper) where it is to be had and the model is not an embedded one, else lexical")
    answer_metric: str = option("f1", "what the answer is scored by; paper: f1", ("f1", "em"))
    scorer: str = option("official", "of the reward and the summary: the paper's, or with its defects repaired", SCORERS)
    # the paper's way, with --protocol paper
    crop_box: str = option("question", "where crops are cut: at the question's box (the paper) or the program's own",
                           ("question", "model"))
    code_errors: str = option("shown", "whether the model sees why its program failed; paper: hidden", ("shown", "hidden"))
    step_side: int = option(720, "images of training steps are stretched to this square, pixels; 0: not; paper: 720")
    # the update
    lr: float | None = option(None, "learning rate of AdamW; default: 2e-4 for data/tiny, else 1e-6 (the paper); with LoRA ten "
                                    "times that")
    vision: str = option("frozen", "the vision tower: frozen or trained", ("frozen", "trained"))
    lora_rank: int | None = option(None, "LoRA of this rank on the language model; 0: all its weights; default: 0 for "
                                         "data/tiny, else 16 (3B in 16 GB, where all weights take 80; the rewards of an episode "
                                         "are few bits, small ranks hold them); paper: 0")
    lora_alpha: float = option(32.0, "the adapters' product counts lora_alpha / lora_rank times")
    lora_targets: str = option(LORA_TARGETS, "linear layers that get an adapter")
    warmup: int = option(5, "steps until the full learning rate")
    lr_schedule: str = option("linear", "linear falls to zero at the last step; paper: linear", ("linear", "constant"))
    beta: float = option(0.04, "weight of the KL term; 0: no reference model; paper: 0.04")
    loss_type: str = option("grpo", "how tokens are weighed; paper: grpo", grpo.LOSS_TYPES)
    scale: str = option("group", "what advantages are divided by; paper: group", grpo.SCALES)
    clip_low: float = option(0.2, "the ratio is clipped below 1 - clip_low")
    clip_high: float = option(0.2, "the ratio is clipped above 1 + clip_high (cispo: above clip_high)")
    inner_epochs: int | None = option(None, "passes over a step's episodes; default: 2 for data/tiny, else 1 (the paper: "
                                            "with one pass and one minibatch the ratio is 1)")
    minibatches: int | None = option(None, "optimiser steps in each pass; default: 2 for data/tiny, else 1 (the paper)")
    update: str | None = option(None, "tree: a group's prompt goes through the model once; rows: each episode by itself, "
                                      "the same gradient; default: rows for data/tiny (short prompts), else tree",
                                ("tree", "rows"))
    micro_batch_tokens: int | None = option(None, "ids in one forward pass of the update, with padding; one episode may "
                                                  "have more; default: 2048 for data/tiny, else 8192")
    checkpointing: str | None = option(None, "on: backward computes each layer again instead of keeping it, a third "
                                             "more arithmetic, less memory; default: off for data/tiny, else on",
                                       ("on", "off"))
    max_grad_norm: float = option(1.0, "the gradient is scaled down to this norm; paper: 1")
    flat_groups: str = option("drop", "groups of equal rewards: drop them from the update or keep them (KL only)",
                              ("drop", "keep"))

    @property
    def max_sampled(self) -> int:
        """The most ids that one episode can sample: what dr_grpo divides by."""
        turns = 1 if self.protocol == "paper" else self.max_turns
        return min(turns * self.max_new_tokens, self.max_length)

    @property
    def limits(self) -> Limits:
        return Limits(self.temperature, self.max_new_tokens, self.max_turns, self.max_length, self.cuda_graph == "on")


DEFAULTS = {   # for the embedded checkpoint, for anything else
    "steps": (70, 1400), "samples_per_step": (8, 16), "max_new_tokens": (96, 256), "lr": (2e-4, 1e-6), "lora_rank": (0, 16),
    "inner_epochs": (2, 1), "minibatches": (2, 1), "threads": (1, 0), "passages": (2, 4), "save_every": (1, 0),
    "checkpointing": ("off", "on"), "update": ("rows", "tree"), "micro_batch_tokens": (2048, 8192)}

# Done instead of a run.
INSTEAD = ("check_data", "plan", "save_merged", "score", "compare", "report", "show_episode")
# What may be given beside --resume and differ: where things are (a fingerprint tells whether they are the same) and how
# the machine is used (another batch size may change the draws). All else would make it another run.
MAY_DIFFER = {"resume", "model", "data", "system_prompt", "similarity", "device", "threads", "save_every", "eval_every",
              "eval_batch", "rollout_batch", "micro_batch_tokens", "checkpointing", "sandbox_workers", "sandbox"}


def given_options(arguments: list[str]) -> dict:
    """The options that stand on the command line. An unknown flag ends the program with exit code 2 (argparse)."""
    parser = argparse.ArgumentParser(prog="arft.py", allow_abbrev=False, description=__doc__.split("\n")[0])
    for field in dataclasses.fields(Config):
        flag, help = "--" + field.name.replace("_", "-"), field.metadata["help"].replace("%", "%%")
        if field.type is bool:
            parser.add_argument(flag, action="store_true", default=argparse.SUPPRESS, help=help)
            continue
        kind = next((t for t in (int, float) if t is field.type or t in getattr(field.type, "__args__", ())), str)
        suffix = "" if field.default is None else f" (default: {field.default})"
        several = field.metadata["values"]
        parser.add_argument(flag, type=kind, default=argparse.SUPPRESS, choices=field.metadata["choices"], metavar=several,
                            nargs=several and len(several), help=help + suffix)
    return vars(parser.parse_args(arguments))


def parse_options(arguments: list[str]) -> Config:
    """The command line as a Config."""
    return Config(**given_options(arguments))


def resumed(given: dict) -> Config:
    """The options of the run that --resume names, with those of the command line that may differ. Raises RunError."""
    folder = Path(given["resume"])
    if instead := [name for name in INSTEAD if name in given]:
        raise UsageError(f"--resume and --{instead[0].replace('_', '-')} cannot be had at once; choose one")
    try:
        kept = json.loads((folder / "config.json").read_text())
        config = Config(**{field.name: kept[field.name] for field in dataclasses.fields(Config) if field.name in kept})
    except (OSError, ValueError, TypeError) as error:
        raise RunError(f"--resume {folder}: its config.json cannot be read ({error}); name the folder of a run, or start "
                       "a new one without --resume") from None
    config.resume = config.out = str(folder)
    for name, value in given.items():
        if name in MAY_DIFFER:
            setattr(config, name, value)
        elif value != getattr(config, name):
            change_steps(config, value) if name == "steps" else refuse(name, value, getattr(config, name))
    if config.device.partition(":")[0] != kept["device"].partition(":")[0]:
        refuse("device", config.device, kept["device"])         # another precision, another random generator
    if (folder / "summary.json").exists():
        summary = json.loads((folder / "summary.json").read_text())
        if ("before" if config.eval_only else "after") in summary and summary["steps"] >= config.steps:
            longer = f"; or --resume {folder} --steps N for more" if config.lr_schedule == "constant" else ""
            raise RunError(f"--resume {folder}: this run is finished ({summary['steps']} steps). To train on from its "
                           f"weights: --model {folder / 'model'} in a new run{longer}")
    return config


def refuse(name: str, value, kept) -> None:
    flag = f"--{name.replace('_', '-')}"
    raise RunError(f"{flag} {value}: the run that is resumed has {kept}, and with another value it would be another "
                   f"run. Leave {flag} out, or start a new run")


def change_steps(config: Config, steps: int) -> None:
    """More steps, or fewer: only where the learning rate does not depend on how many there are."""
    if config.lr_schedule != "constant":
        raise RunError(f"--steps {steps}: the learning rate of this run falls to zero at step {config.steps}, so with "
                       "another number of steps its past would be another, too. Leave --steps out; to train on from its "
                       f"weights, start a new run with --model {Path(config.out) / 'model'}. "
                       "(Runs with --lr-schedule constant can be prolonged)")
    config.steps = steps


def check(config: Config) -> None:
    """Raises UsageError for values that no run can have."""
    least = {"steps": 0, "eval_every": 0, "eval_samples": 0, "eval_batch": 1, "save_every": 0, "samples_per_step": 1, "group_size": 2,
             "rollout_batch": 1, "max_new_tokens": 1, "max_turns": 1, "max_length": 16, "sandbox_workers": 1, "sandbox_memory": 64,
             "warmup": 0, "inner_epochs": 1, "minibatches": 1, "micro_batch_tokens": 1, "beta": 0.0, "seed": 0,
             "threads": 0, "step_side": 0, "passages": 1, "lora_rank": 0}
    for name, low in least.items():
        value = getattr(config, name)
        if value is not None and value < low:
            why = " (an advantage compares the episodes of a group)" if name == "group_size" else ""
            raise UsageError(f"--{name.replace('_', '-')} {value}: must be at least {low}{why}")
    for name in ("temperature", "sandbox_seconds", "lr", "max_grad_norm", "lora_alpha"):
        value = getattr(config, name)
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise UsageError(f"--{name.replace('_', '-')} {value}: must be a positive number")
    instead = [name for name in INSTEAD if getattr(config, name)]
    if len(instead) > 1:
        raise UsageError(f"--{instead[0].replace('_', '-')} and --{instead[1].replace('_', '-')} cannot be had at once; choose one")
    for name in ("crop_box", "code_errors", "step_side"):
        if config.protocol == "episodes" and getattr(config, name) != getattr(Config, name):
            raise UsageError(f"--{name.replace('_', '-')} is an option of the paper's way; add --protocol paper")
    if config.corpus and not Path(config.corpus).exists():
        raise UsageError(f"--corpus {config.corpus}: no such file; name a .jsonl with one passage a line")
    if config.vision == "trained" and config.lora_rank:
        raise UsageError("--vision trained needs --lora-rank 0: adapters are put on the language model alone")
    if config.model:
        check_name(config.model)
    if (config.samples_per_step or 0) % many.size():
        raise UsageError(f"--samples-per-step {config.samples_per_step}: {many.size()} processes cannot share them; give a "
                         f"multiple of {many.size()}")
    if config.system_prompt:
        read_prompt(config.system_prompt)
    if config.out and not config.resume and Path(config.out).exists():
        raise UsageError(f"--out {config.out} exists; nothing was overwritten. Name a new folder or remove it")
    if config.device not in (None, "cpu") and not (config.device.startswith("cuda") and torch.cuda.is_available()):
        raise UsageError(f"--device {config.device} is not to be had here; use --device cpu")


def read_prompt(file: str) -> str:
    """The words of a --system-prompt file."""
    try:
        words = Path(file).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--system-prompt {file}: cannot be read ({error}); name a text file in UTF-8") from None
    if not words:
        raise UsageError(f"--system-prompt {file} is empty; write what the model is told before every question")
    return words


def complete(config: Config) -> list[str]:
    """Fills in what was left open. Returns what was chosen and why, one line each."""
    why = {name: f"--{name}" for name in ("device", "model", "data")}
    tiny = TINY if config.task == "mat-coding" else TINY_SEARCH
    if config.device is None:
        config.device, why["device"] = ("cuda", "found") if torch.cuda.is_available() else ("cpu", "no CUDA here")
    if config.dtype is None:
        config.dtype = "float32" if config.device == "cpu" else "bfloat16"
    if config.model is None and config.data is None and config.device != "cpu" and config.task.startswith("mat-"):
        try:
            config.model, config.data = fetch(HUB_MODEL, "model"), fetch(HUB_DATA, "dataset")
            why["model"], why["data"] = f"{HUB_MODEL} from the hub; --model {tiny} for the small one", HUB_DATA
        except UsageError as error:
            config.model, why["model"] = str(tiny), f"the embedded checkpoint, because: {error}"
    if config.model is None:
        config.model, why["model"] = str(tiny), "the embedded checkpoint; --model DIR or hub name for another"
    small = is_small(config.model)
    why["data"] = choose_data(config, small) or why["data"]
    lr_is_open, saving_is_open, adapter = config.lr is None, config.save_every is None, adapter_config(config.model)
    if config.lora_rank is None and adapter:
        config.lora_rank = adapter["r"]
    if config.lora_rank is None and config.vision == "trained":
        config.lora_rank = 0
    for name, (for_small, for_others) in DEFAULTS.items():
        if getattr(config, name) is None:
            setattr(config, name, for_small if small else for_others)
    if lr_is_open and config.lora_rank:
        config.lr *= 10         # B starts at zero and alpha / rank is near 1: LoRA learns at about ten times the rate
    if saving_is_open and config.lora_rank:
        config.save_every = 1   # adapters and their moments alone: no more than the step in progress is ever lost
    if config.rollout_batch is None:
        config.rollout_batch = 128 if small else plan.rollout_batch(config)
    if config.eval_batch is None:
        config.eval_batch = 100 if small else config.rollout_batch
    if config.out is None:
        config.out = str(Path("runs") / f"{config.task}-{time.strftime('%Y%m%d-%H%M%S')}")
    here = f"{Path.cwd()}{os.sep}"
    return [f"{name + ':':8}{getattr(config, name)} ({reason})".replace(here, "") for name, reason in why.items()]


def choose_data(config: Config, small: bool) -> str | None:
    """Fills in --data if it was left open. Returns why, None where it was given."""
    if config.data is not None:
        return None
    if small and config.task == "mat-coding":
        config.data = str(mini.ensure(HERE / "data" / "cache"))
        return "MAT-mini, drawn by data/mini.py; --data DIR for a MAT folder"
    if small and config.task == "mat-search":
        config.data = str(mini_search.ensure(HERE / "data" / "cache"))
        return "MAT-mini, drawn by data/mini_search.py; --data DIR for a MAT folder"
    if config.task.startswith("mat-"):
        config.data = fetch(HUB_DATA, "dataset")
        return f"{HUB_DATA} from the hub"
    splits = ("test",) if config.eval_only or config.check_data else ("test", "train")
    files = [mat.FILES[config.task][split][0] for split in splits if split in mat.FILES[config.task]]
    config.data = fetch(HUB_QA, "dataset", files)
    return f"{HUB_QA} from the hub"


def is_small(model: str) -> bool:
    """Whether `model` is data/tiny or its offspring: the options that are right for it are wrong for 3B."""
    adapter = adapter_config(model)
    model = adapter["base_model_name_or_path"] if adapter else model
    try:
        settings = json.loads((Path(model) / "config.json").read_text())
        return settings.get("text_config", settings)["hidden_size"] < 1024
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False            # a hub name, or a folder that `load` will complain about


def fetch(name: str, kind: str, files: list[str] | None = None) -> str:
    """The folder of a hub model or data set (of `files` alone, if given), from the cache or the network, with the
    hub's own progress bars. Raises UsageError that says what to download and where to put it."""
    from huggingface_hub import snapshot_download
    flag = "--data" if kind == "dataset" else "--model"
    try:
        folder = snapshot_download(name, repo_type=kind, allow_patterns=files)
        missing = [file for file in files or () if not (Path(folder) / file).exists()]
        reason = f"{missing[0]} is not among its files" if missing else None
    except Exception as error:  # no network, no disk, no such repository: the cure is the same
        reason = type(error).__name__
    if reason:
        command = " ".join(["hf download", name, *(files or ()), "--repo-type", kind, "--local-dir DIR"])
        raise UsageError(f"this needs {flag} DIR: {name} is neither in the hub's cache nor to be fetched ({reason}).\n"
                         f"Where there is network: {command}; then copy DIR here and name it: {flag} DIR")
    return folder


def choose_search(config: Config):
    """The back end of searches, None for mat-coding unless one is named. Raises UsageError with the three ways to have one."""
    beside = Path(config.data) / mini_search.CORPUS
    path = config.corpus or (str(beside) if beside.exists() else None)
    key = os.environ.get(SERPER_KEY)
    backend = Corpus(path) if path else Serper(key) if key and config.task != "mat-coding" else None
    if config.replay:
        return Replay(config.replay, backend, config.replay_miss)
    if backend is None and config.task != "mat-coding":
        raise UsageError(f"task {config.task} needs something to search: --corpus FILE (passages, offline), the environment "
                         f"variable {SERPER_KEY} (Google by Serper, live), or --replay FILE (a record of earlier searches);\n"
                         "or --tools off")
    return backend


def choose_similarity(config: Config):
    """(function of two texts, its name): how queries are compared with gold ones."""
    name = config.similarity
    if name == "auto" and not is_small(config.model) and config.task == "mat-search" and not config.eval_only:
        try:
            return SentenceSimilarity(fetch(HUB_SIMILARITY, "model")), HUB_SIMILARITY
        except UsageError:
            print(f"{HUB_SIMILARITY} is neither in the hub's cache nor to be fetched; hf download {HUB_SIMILARITY} gets it")
    if name in ("auto", "lexical"):
        return lexical_similarity, "lexical"
    try:
        return SentenceSimilarity(name), name
    except (OSError, ValueError) as error:
        raise UsageError(f"--similarity {name}: {str(error).splitlines()[0]}; give an encoder's folder, or lexical") from None


# --- evaluation ------------------------------------------------------------------------------------------


def attempt(policy: Policy, samples, config: Config, **more) -> list[Episode]:
    """Episodes of the samples under the run's protocol."""
    if config.protocol == "paper":
        return paper.rollout(policy, samples, crop_box=config.crop_box, code_errors=config.code_errors,
                             step_side=config.step_side, **more)
    return rollout(policy, samples, **more)


def answer_row(i: int, episode: Episode) -> dict:
    return {"answer": episode.answer}


def evaluate(policy: Policy, samples, tools, config: Config, temperature: float, clock: Clock, title: str,
             row=answer_row, part: Path | None = None):
    """One episode per sample; temperature 0 is greedy. Returns (summary, rows).

    row: what is kept of the i-th episode, a dictionary with its "answer"; an episode itself is not kept. part: a file that the rows
    are added to, batch by batch; what is there already is not evaluated again.
    """
    limits, rows = dataclasses.replace(config.limits, temperature=temperature), resume.take_up(part) if part else []
    own, elsewhere = many.share(range(len(samples))), []        # which samples are this rank's; its episodes, if there are others
    with tqdm(total=len(own), initial=len(rows), desc=title, leave=False, unit="sample") as bar:
        for start in own[len(rows)::config.eval_batch]:
            generator = torch.Generator(policy.device).manual_seed(config.seed + 10_000 + start)
            episodes = attempt(policy, samples[start:min(start + config.eval_batch, own.stop)], config, limits=limits,
                               tools=tools, generator=generator, clock=clock)
            new = [row(start + i, episode) for i, episode in enumerate(episodes)] if many.size() == 1 else []
            rows += new
            elsewhere += episodes if many.size() > 1 else []
            if part:
                resume.append_lines(part, new)
            bar.update(len(episodes))
    rows += [row(i, episode) for i, episode in enumerate(gathered(elsewhere))]
    answers = [row["answer"] for row in rows]
    both = {scorer: summarize(answers, samples, scorer, chinese=config.task == "mat-coding") for scorer in SCORERS}
    summary = both.pop(config.scorer) | both        # the other scorer's under its name
    if any(sample.problems for sample in samples):
        summary["by_problem"] = em_by_problem(answers, samples, config.scorer)
    return summary, rows


def gathered(episodes: list[Episode]) -> list[Episode]:
    """The episodes of all ranks (many.py), without the patches of their images, which only their own rank trains on."""
    if many.size() == 1:
        return episodes
    return many.gather([dataclasses.replace(episode, images=[], view=None) for episode in episodes])


def em_by_problem(answers: list[str | None], samples: list, scorer: str) -> dict[str, dict]:
    """n and exact match for each kind of damage, and for all damaged images together."""
    right: dict[str, list[float]] = {"damaged": []}
    for answer, sample in zip(answers, samples):
        name = "+".join(sample.problems)
        _, em = score_answer(answer, sample.golds, scorer)
        right.setdefault(name, []).append(em)
        if name != "none":
            right["damaged"].append(em)
    return {name: {"n": len(ems), "em": float(np.mean(ems))} for name, ems in right.items() if ems}


def evaluate_both(policy, samples, tools, config, clock, title, run: Run | None = None):
    """Greedy evaluation, with the sampled one (temperature 1) under "sampled"; and its rows: with a run, the record of
    each episode. What was done of an evaluation before training is on the disk: a stopped one goes on."""
    def record(i: int, episode: Episode) -> dict:
        return run.episode_record(title, i, episode, score([episode], config)[0], None, True)

    def part(mode: str) -> Path | None:
        return run.folder / f"{title}-{mode}.part" if run and title == "before" and many.size() == 1 else None

    summary, rows = evaluate(policy, samples, tools, config, 0.0, clock, f"{title}, greedy", record if run else answer_row,
                             part("greedy"))
    if config.eval_sampled == "on":
        summary["sampled"], _ = evaluate(policy, samples, tools, config, 1.0, clock, f"{title}, sampled",
                                         part=part("sampled"))
    return summary, rows if run else []


# --- training --------------------------------------------------------------------------------------------


def endless(samples: list, order: random.Random):
    """The samples in a new random order each time round."""
    while True:
        yield from order.sample(samples, len(samples))


def score(episodes: list[Episode], config: Config, similarity=lexical_similarity) -> list:
    """The reward of each episode. A number that is not finite stops the run and names the sample (law 6)."""
    rewards = [step_reward(e, accuracy_weight=config.answer_weight, format_weight=config.format_weight,
                           scorer=config.scorer, similarity=similarity) if isinstance(e.sample, mat.StepSample) else
               episode_reward(e, answer_weight=config.answer_weight, format_weight=config.format_weight,
                              problem_weight=config.problem_weight, query_weight=config.query_weight,
                              answer_metric=config.answer_metric, scorer=config.scorer, similarity=similarity)
               for e in episodes]
    for episode, reward in zip(episodes, rewards):
        if not math.isfinite(reward.total):
            raise UsageError(f"sample {episode.sample.id}: its reward is {reward.total}; check the reward weights")
    return rewards


def teaching_rows(totals: torch.Tensor, config: Config) -> list[int]:
    """The episodes that enter the update: with --flat-groups drop, those of groups whose rewards differ."""
    groups = totals.view(-1, config.group_size)
    differs = groups.max(dim=1).values > groups.min(dim=1).values
    if config.flat_groups == "keep":
        differs = torch.ones_like(differs)
    return differs.repeat_interleave(config.group_size).nonzero()[:, 0].tolist()


class Trainer:
    """Everything that changes from step to step: policy, optimiser, random states, order of the data."""

    def __init__(self, policy: Policy, samples: list, tools: Tools, config: Config, similarity=lexical_similarity):
        self.policy, self.tools, self.config, self.similarity = policy, tools, config, similarity
        if config.lora_rank and not policy.adapters:
            policy.add_lora(config.lora_rank, config.lora_alpha, config.lora_targets)
        if config.vision == "frozen":
            policy.model.model.visual.requires_grad_(False)
        self.reference = grpo.reference_of(policy) if config.beta > 0 else None
        with many.shard(policy.model):
            self.optimizer = grpo.optimizer_of(policy, config.lr)
        self.steps = 0          # complete steps
        self.whole = True       # False within an update: what is in memory then is of no step
        self.generator = torch.Generator(policy.device).manual_seed(config.seed + 1_000_003 * many.rank())
        self.order = endless(samples, random.Random(config.seed))
        self.randomness = self.random_states()      # at the end of the last complete step

    def rate(self) -> float:
        """This step's share of the learning rate: up over the warm-up, then down in a line (or not)."""
        warm = min(1.0, (self.steps + 1) / (self.config.warmup + 1))
        return warm * (1 - self.steps / self.config.steps if self.config.lr_schedule == "linear" else 1.0)

    def keep_features(self, kept: dict | None) -> None:
        """A frozen tower sees each image once a step, for rollout, update and reference; a trained one each time."""
        for policy in (self.policy, self.reference):
            if policy is not None and self.config.vision == "frozen":
                policy.kept = kept

    def sample(self) -> dict:
        """The first half of a step, which changes nothing that is kept: episodes, rewards, advantages, clock."""
        config, clock, start = self.config, Clock(), time.perf_counter()
        self.keep_features({})
        samples = many.share([next(self.order) for _ in range(config.samples_per_step)])
        episodes, groups = [], max(1, config.rollout_batch // config.group_size)       # groups side by side
        for first in range(0, len(samples), groups):
            episodes += attempt(self.policy, samples[first:first + groups], config, group_size=config.group_size,
                                limits=config.limits, tools=self.tools, generator=self.generator, clock=clock)
        rewards = score(episodes, config, self.similarity)
        totals = torch.tensor(many.gather([reward.total for reward in rewards]))           # [N], of all ranks
        advantages = grpo.group_advantages(totals, config.group_size, config.scale)        # [N]
        return {"episodes": episodes, "rewards": rewards, "totals": totals, "advantages": advantages, "clock": clock,
                "start": start}

    def learn(self, done: dict) -> dict:
        """The second half: the update. Returns `done` with its statistics and seconds."""
        config, stats = self.config, dict.fromkeys(grpo.STATISTICS)         # None where nothing is taught
        rows, own = teaching_rows(done["totals"], config), many.share(range(len(done["totals"])))      # own: this rank's
        self.whole = False
        for group in self.optimizer.param_groups:
            group["lr"] = config.lr * self.rate()
        with done["clock"].phase("update"):
            if rows:
                rows = [i for i in rows if i in own]
                stats |= grpo.update(self.policy, self.reference, [done["episodes"][i - own.start] for i in rows],
                                     done["advantages"][rows], self.optimizer, config, self.generator)
        recorded = done["episodes"][:config.group_size] if config.record_tokens == "on" else []
        tokens = [token_record(self.policy, episode, logp) for episode, logp
                  in zip(recorded, grpo.frozen_logp(self.policy, recorded, config))]
        self.keep_features(None)
        stats["lr"] = self.optimizer.param_groups[0]["lr"]
        self.steps, self.randomness, self.whole = self.steps + 1, self.random_states(), True
        return done | {"episodes": gathered(done["episodes"]), "rewards": many.gather(done["rewards"]), "stats": stats,
                       "tokens": tokens, "seconds": time.perf_counter() - done["start"]}

    def trained(self) -> dict[str, torch.Tensor]:
        """The weights that training changes, by name."""
        return {name: weight for name, weight in self.policy.model.named_parameters() if weight.requires_grad}

    def random_states(self) -> dict:
        """Of this trainer's generator and of torch's own."""
        cuda = torch.cuda.get_rng_state_all() if self.policy.device.type == "cuda" else []
        return {"generator": self.generator.get_state(), "torch": torch.get_rng_state(), "cuda": cuda}

    def state(self) -> dict:
        """Everything that decides the next step. The order of the data needs no more than the number of steps."""
        if many.size() > 1:
            learned = many.state(self.policy.model, self.optimizer) | {"ranks": many.size()}
        else:
            learned = {"weights": {name: weight.detach() for name, weight in self.trained().items()},
                       "optimizer": self.optimizer.state_dict(), "ranks": 1}
        return learned | {"step": self.steps, "random": self.randomness}

    def restore(self, state: dict) -> None:
        """Becomes the trainer that wrote `state`; called on a new one, whose reference is the model of step 0."""
        self.restore_learned(state)
        if state["ranks"] == many.size() and many.rank() == 0:     # other ranks, or another number of them, draw anew
            self.generator.set_state(state["random"]["generator"])
            torch.set_rng_state(state["random"]["torch"])
            if state["random"]["cuda"]:
                torch.cuda.set_rng_state_all(state["random"]["cuda"])
        elif state["ranks"] > 1 or many.size() > 1:
            self.generator.manual_seed(self.config.seed + 1_000_003 * many.rank() + state["step"])
        self.steps, self.randomness = state["step"], self.random_states()
        for _ in islice(self.order, self.steps * self.config.samples_per_step):
            pass                # the data goes on where it stopped

    def restore_learned(self, state: dict) -> None:
        """Weights and optimiser. A checkpoint of several ranks, or for several, has them by name (many.py)."""
        weights = self.trained()
        if many.size() == 1 and (weights.keys() ^ state["weights"].keys()) - {"lm_head.weight"}:     # tied: FSDP names it, too
            raise RunError("the checkpoint holds other weights than are trained here; give the --model of the run's start")
        masters = isinstance(self.optimizer, grpo.MasterAdamW)
        if many.size() > 1 or state["ranks"] > 1 and not masters:
            group = self.optimizer.param_groups[0]
            return many.load_state(self.policy.model, self.optimizer, many.by_name(state, list(weights), group))
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(state["weights"][name])        # masters are rounded on the way
        learned = many.as_masters(state, list(weights)) if state["ranks"] > 1 else state["optimizer"]
        self.optimizer.load_state_dict(learned)


def train(trainer: Trainer, run: Run, held_out: list, signals: resume.Signals) -> None:
    """Steps, records, evaluations, checkpoints. Whatever ends it early (Ctrl-C, a bad image), what was learned is
    saved."""
    config = trainer.config
    bar = tqdm(initial=trainer.steps, total=config.steps, desc="training", unit="step")
    try:
        while True:
            with together(config):
                evaluate_midway(trainer, run, held_out, signals)
                if trainer.steps >= config.steps:
                    break
                attempted = trainer.sample()        # a stop in here costs this step alone, for nothing was changed yet;
                with signals.hold():                # in here it waits: no update, record or checkpoint is cut in half
                    run.record_step(trainer.steps + 1, trainer.learn(attempted))
                    if many.gather([run.checkpoint_due(trainer.steps, config.save_every)])[0]:     # rank 0 decides
                        run.save_checkpoint(trainer)
                say(trainer, run)
            bar.update()
    except KeyboardInterrupt:
        tqdm.write(f"interrupted after {run.steps} complete steps; saving what was learned")
        run.interrupted = True
    finally:
        bar.close()
        run.torn = not trainer.whole
        if trainer.whole and run.steps == trainer.steps > run.saved:
            with signals.hold():
                run.save_checkpoint(trainer)


def say(trainer: Trainer, run: Run) -> None:
    """What a person is told after a step; and the page of the run, if it is time."""
    tqdm.write("\n".join([run.step_line(), *run.news()]))
    if trainer.steps == 1 and (why := zero_loss_note(trainer.config, run.metrics[-1])):
        tqdm.write(why)
    if trainer.steps == 1 and trainer.policy.device.type == "cuda":
        tqdm.write(plan.beside(trainer.config, torch.cuda.max_memory_allocated()))
    if many.rank() == 0:
        run.watch()


def evaluate_midway(trainer: Trainer, run: Run, held_out: list, signals: resume.Signals) -> None:
    """With --eval-every, where it is time and was not done before the run was stopped; keeps best/."""
    step, every = trainer.steps, trainer.config.eval_every
    if step == 0 or not every or step % every or str(step) in run.summary:
        return
    summary, *_ = evaluate_both(trainer.policy, held_out, trainer.tools, trainer.config, run.clock, f"step {step}")
    with signals.hold():
        run.record_evaluation(step, summary)
        run.keep_best(trainer.policy)


# --- files, without a model ---------------------------------------------------------------------------------


def check_files(config: Config) -> int:
    """--check-data: what the task's files hold, then every defect. 1 if there is one, else 0."""
    small = is_small(config.model) if config.model else config.device == "cpu" or not torch.cuda.is_available()
    choose_data(config, small)
    report, defects = mat.check(config.task, config.data)
    print("\n".join(report))
    print("\n".join([*defects, f"defects: {len(defects)}"]))
    return 1 if defects else 0


def print_plan(config: Config) -> int:
    """--plan, for --model or the default on a GPU. Neither data nor weights are read."""
    config.model, config.data = config.model or HUB_MODEL, config.data or ""
    complete(config)
    print("\n".join(plan.report(config)))
    return 0


def save_merged(config: Config) -> int:
    """--save-merged: an adapter folder as an ordinary Hugging Face folder, in the precision of its base model."""
    if not config.model or not adapter_config(config.model):
        raise UsageError("--save-merged needs --model DIR with adapter_config.json in DIR, such as a LoRA run's model/")
    if Path(config.save_merged).exists():
        raise UsageError(f"--save-merged {config.save_merged} exists; nothing was overwritten. Name a new folder or remove it")
    policy = load(config.model, dtype="auto")
    policy.merge_lora()
    policy.save(config.save_merged)
    print(f"{config.save_merged}: {config.model} merged into {policy.name}")
    return 0


def score_file(config: Config) -> int:
    """--score: a predictions file under both scorers."""
    print(f"{config.score}, scored as {config.task}\n{HEADER}")
    for scorer in SCORERS:
        scores = score_predictions(config.score, config.task, scorer)
        print(score_row(scorer, scores))
        for split, part in scores["splits"].items():
            print(score_row(f"  {split}", part))
    return 0


def compare_files(config: Config) -> int:
    """--compare: B against A under both scorers. The interval is of the difference, item by item."""
    for scorer in SCORERS:
        result = compare(*config.compare, config.task, scorer)
        if scorer == SCORERS[0]:
            print("A: {}\nB: {}".format(*config.compare))
            print(f"{result['n']} items as {config.task}, {result['changed']} with another answer")
            print(f"{'':22}{'A %':>7} {'B %':>7}  {'B - A':>6} {'[95%]':>16}  {'better':>6} {'worse':>6}")
        for metric in ("em", "f1"):
            r = result[metric]
            low, high = (100 * v for v in r["ci95"])
            print(f"{scorer + ', ' + metric.upper():22}{100 * r['a']:7.2f} {100 * r['b']:7.2f}  "
                  f"{100 * r['difference']:+6.2f} [{low:+6.2f}, {high:+6.2f}]  {r['better']:6d} {r['worse']:6d}")
    return 0


# --- the program --------------------------------------------------------------------------------------------


def main(arguments: list[str]) -> int:
    config = None
    try:
        config = parse_options(arguments)
        if config.resume:
            config = resumed(given_options(arguments))
        many.start()
        if many.rank():
            config.out = many.own_copy(config.resume) if config.resume else many.scratch()
            config.resume = config.resume and config.out
        many.gather([None])         # nobody goes on before all have their copy
        check(config)
        if config.check_data:
            return check_files(config)
        if config.plan:
            return print_plan(config)
        if config.save_merged:
            return save_merged(config)
        if config.score:
            return score_file(config)
        if config.report is not None:
            print(report.write(config.report))
            return 0
        if config.show_episode is not None:
            print(show_episode(*config.show_episode))
            return 0
        return compare_files(config) if config.compare else start(config)
    except KeyboardInterrupt:       # before the run began, or a second one
        return 130
    except Exception as error:
        if not (known := explained(error, config)):
            raise
        print(f"arft.py: {known[1]}", file=sys.stderr)
        return known[0]


def explained(error: BaseException, config: Config) -> tuple[int, str] | None:
    """(exit code, message) of an error that needs no stack trace: bad input, or a GPU that is too small."""
    if isinstance(error, torch.OutOfMemoryError):
        return 1, plan.out_of_memory(config, error)
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted; the last checkpoint has what was learned until then"
    known = (UsageError, PolicyError, SandboxError, SearchRefused, RunError, mat.DataError, ReportError)
    return (2, str(error)) if isinstance(error, known) else None


def together(config: Config):
    """Where one of several ranks may fail: it says why and ends them all (many.py)."""
    return many.together(lambda error: explained(error, config))


def training_samples(config: Config) -> list[mat.Sample]:
    if config.protocol == "paper":
        return mat.load_steps(config.task, config.data)
    return mat.load(config.task, config.data, "train")


def choose_prompt(config: Config, policy: Policy) -> str:
    """The user's words; else those that the checkpoint brought; else ours for the task."""
    if config.system_prompt:
        return read_prompt(config.system_prompt)
    brought = policy.system_prompt != SYSTEM_PROMPT
    return policy.system_prompt if brought or config.task == "mat-coding" else SEARCH_PROMPT


def continue_adapter(config: Config, policy: Policy) -> None:
    """Training that starts from an adapter goes on with it; the KL term's reference is its base model."""
    if not policy.adapters or config.eval_only:
        return
    rank = next(iter(policy.adapters.values())).rank
    if config.lora_rank != rank:
        raise UsageError(f"--lora-rank {config.lora_rank}: the adapter {config.model} has rank {rank}; give --lora-rank {rank} "
                         "to go on with it, or merge it first (--save-merged DIR) and train DIR")


def set_up(config: Config) -> None:
    """Fills in what was left open, says what was chosen, and prepares the process."""
    for line in complete(config):
        print(line)
    check(config)       # what was chosen, too
    if many.size() > 1:
        print(f"ranks:  {many.size()}; each samples {config.samples_per_step // many.size()} x {config.group_size} episodes a step")
    if config.protocol == "paper":
        print(f"paper:  one growing message; crops at the {config.crop_box}'s box; errors of programs {config.code_errors}; "
              f"training on single steps, images {f'{config.step_side} pixels square' if config.step_side else 'as they are'}")
    if config.threads:
        torch.set_num_threads(config.threads)
    if is_small(config.model):
        transformers.utils.logging.disable_progress_bar()   # loading takes no time
    torch.set_flush_denormal(True)          # denormal numbers slow a long run on the CPU down twofold
    torch.manual_seed(config.seed)


def start(config: Config) -> int:
    """One run, from options to summary."""
    set_up(config)
    held_out = mat.load(config.task, config.data, "test")
    held_out = held_out[:config.eval_samples or len(held_out)]
    training = [] if config.eval_only else training_samples(config)
    search = choose_search(config) if config.tools == "on" else None
    similarity, similarity_name = choose_similarity(config)
    policy = load(config.model, config.device, getattr(torch, config.dtype))
    policy.system_prompt = choose_prompt(config, policy)
    continue_adapter(config, policy)
    origin = resume.fingerprint(policy.model, policy.system_prompt, [*held_out, *training])
    origin["similarity"] = similarity_name
    Path(config.out).mkdir(parents=True, exist_ok=bool(config.resume))
    with resume.locked(Path(config.out)), resume.Signals() as signals:
        state = checkpoint_of(config, origin) if config.resume else None
        run = Run(config, origin, state)
        extent = "" if config.eval_only else (f", {len(training)} for training, {config.steps} steps of "
                                              f"{config.samples_per_step} x {config.group_size} episodes")
        print(f"run:    {config.out}: {len(held_out)} held-out samples{extent}")
        with Sandbox(workers=config.sandbox_workers, seconds=config.sandbox_seconds, memory_mb=config.sandbox_memory,
                     strict=config.sandbox == "strict") as sandbox:
            tools = Tools(sandbox, search, config.passages) if config.tools == "on" else Tools()
            off = "off; programs return the image as it is, searches find nothing"
            print(f"tools:  {sandbox.describe() if tools.sandbox else off}")
            if search:
                print(f"search: {search.name}, {config.passages} passages; queries are compared with gold ones by: "
                      f"{similarity_name}")
            try:
                carry_out(run, config, policy, training, held_out, tools, similarity, state, signals)
            except OSError as error:
                raise RunError(f"{config.out} could not be written ({error}); the last checkpoint is of step {run.saved}. "
                               "Make room on the disk or bring the folder back, then: "
                               f"python arft.py --resume {config.out}") from error
    print(table(run.summary))
    print("\n".join(run.last_words()))
    return 130 if run.interrupted else 0


def checkpoint_of(config: Config, origin: dict) -> dict | None:
    """The checkpoint that --resume goes on from, None for the run's beginning. Refuses another model, other words, other
    data than at its start; says what else is not as it was."""
    folder = Path(config.resume)
    kept = json.loads((folder / "config.json").read_text())
    for name, value in origin.items():
        if kept.get("fingerprint") and kept["fingerprint"].get(name) != value:
            where = getattr(config, name) or config.model
            raise RunError(f"--resume {folder}: {where} is not the {name.replace('_', ' ')} that the run began with. Bring "
                           f"that back, or name where it is now: --{name.replace('_', '-')} PATH")
    state, wrong = resume.newest(folder)
    for line in wrong:
        print(f"note:   {line}; going on from the one before it")
    where = f"after step {state['step']} of {config.steps}" if state else "from its beginning; nothing was complete"
    print(f"resume: {folder}, {where}")
    then = kept["versions"]["torch"]
    if then != torch.__version__:
        print(f"note:   torch {torch.__version__} now, {then} then: the numbers may differ in the last digits")
    return state


def carry_out(run: Run, config: Config, policy: Policy, training: list, held_out: list, tools: Tools, similarity,
              state: dict | None, signals: resume.Signals) -> None:
    """Evaluation, training, evaluation: what of these is still to be done."""
    try:
        if "before" not in run.summary:
            with together(config):
                run.record_evaluation("before", *evaluate_both(policy, held_out, tools, config, run.clock, "before", run))
        if not config.eval_only:
            trainer = Trainer(policy, training, tools, config, similarity)
            if state:
                trainer.restore(state)
            else:
                run.save_checkpoint(trainer)
            train(trainer, run, held_out, signals)
            if not run.interrupted:
                with together(config):
                    run.record_evaluation("after", *evaluate_both(policy, held_out, tools, config, run.clock, "after", run))
                    if config.eval_every:
                        run.keep_best(policy)
    except KeyboardInterrupt:
        run.interrupted = True
    finally:            # a bad image in the middle must not cost what was learned before it
        if isinstance(tools.search, Replay):
            run.searches = {"hits": tools.search.hits, "misses": tools.search.misses}
        with signals.hold():
            run.finish(policy, config)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
