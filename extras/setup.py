"""What a run is made of: data, model, tools, run folder, and the parts that the loop is handed.

arft.start asks for each of these. You find here how an open option is filled in, where models and
data come from, and which file of extras/ stands in for a plain part of the lesson.
"""

import json
import os
import time
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path

import torch
import transformers

import rewards
from data import mat, mini, mini_search
from extras import engine, record, resume, search, weights
from extras.usage import UsageError, flag_of, leaf
from grpo import Optimizer
from policy import SEARCH_PROMPT, SYSTEM_PROMPT, Policy
from rollout import RowLayout, rollout
from tools import Sandbox, Tools

HERE = Path(__file__).parent.parent
TINY, TINY_SEARCH = HERE / "data" / "tiny", HERE / "data" / "tiny-search"
HUB_MODEL, HUB_DATA = "Qwen/Qwen2.5-VL-3B-Instruct", "laolao77/MAT"
HUB_QA = "RUC-NLPIR/FlashRAG_datasets"
HUB_SIMILARITY = "sentence-transformers/all-MiniLM-L6-v2"
REPLAY_MISS = "ask"         # a search that --replay lacks: "ask" the back end, or "skip" it
SERPER_KEY = "SERPER_API_KEY"       # the environment variable; options are written down, keys not
OFF = "off; programs return the image as it is, searches find nothing"

# What an option is where you leave it open: with the small model, with any other.
DEFAULTS = {
    "steps": (70, 1400), "samples_per_step": (8, 16), "max_new_tokens": (96, 256),
    "lr": (2e-4, 1e-6), "lora_rank": (0, 16), "inner_epochs": (2, 1), "minibatches": (2, 1),
    "threads": (1, 0), "passages": (2, 4), "save_every": (1, 0), "checkpointing": ("off", "on"),
    "update": ("rows", "tree"), "micro_batch_tokens": (2048, 8192)}


def processes() -> int:
    """How many processes torchrun has started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


# --- open options ---------------------------------------------------------------------------------


def complete(config) -> list[str]:
    """Fills in what you left open. Returns what was chosen and why, one line each."""
    why = {name: flag_of(name) for name in ("device", "model", "data")}
    if config.device is None:
        cuda = torch.cuda.is_available()
        config.device, why["device"] = ("cuda", "found") if cuda else ("cpu", "no CUDA here")
    if config.dtype is None:
        config.dtype = "float32" if config.device == "cpu" else "bfloat16"
    why |= choose_model(config)
    small = is_small(config.model)
    why |= choose_data(config, small)
    choose_numbers(config, small)
    if config.out is None:
        config.out = str(Path("runs") / f"{config.task}-{time.strftime('%Y%m%d-%H%M%S')}")
    here = f"{Path.cwd()}{os.sep}"
    return [f"{name + ':':8}{getattr(config, name)} ({reason})".replace(here, "")
            for name, reason in why.items()]


def choose_model(config) -> dict[str, str]:
    """Fills in --model, with CUDA and without --data also --data. Returns why, by option."""
    if config.model is not None:
        return {}
    tiny = TINY if config.task == "mat-coding" else TINY_SEARCH
    config.model, why = str(tiny), "the embedded checkpoint; --model DIR or hub name for another"
    if config.data is None and config.device != "cpu" and config.task.startswith("mat-"):
        try:
            config.model, config.data = fetch(HUB_MODEL, "model"), fetch(HUB_DATA, "dataset")
            return {"model": f"{HUB_MODEL} from the hub; --model {tiny} for the small one",
                    "data": HUB_DATA}
        except UsageError as error:
            config.model, why = str(tiny), f"the embedded checkpoint, because: {error}"
    return {"model": why}


def choose_numbers(config, small: bool) -> None:
    """Fills in the options whose default depends on the model."""
    lr_is_open, saving_is_open = config.lr is None, config.save_every is None
    adapter = weights.adapter_config(config.model)
    if config.lora_rank is None and adapter:
        config.lora_rank = adapter["r"]
    if config.lora_rank is None and config.vision == "trained":
        config.lora_rank = 0
    for name, (for_small, for_others) in DEFAULTS.items():
        if getattr(config, name) is None:
            setattr(config, name, for_small if small else for_others)
            if name == "update" and not leaf("tree"):
                config.update = "rows"
    if lr_is_open and config.lora_rank:
        config.lr *= 10         # B starts at zero: LoRA learns at about ten times the rate
    if saving_is_open and config.lora_rank:
        config.save_every = 1   # adapters and their moments are small: lose one step at most
    if config.rollout_batch is None:
        config.rollout_batch = 128 if small else planned_batch(config)
    if config.eval_batch is None:
        config.eval_batch = 100 if small else config.rollout_batch


def planned_batch(config) -> int:
    """How many episodes fit side by side by the plan; 16 where the plan's leaf is missing."""
    plan = leaf("plan")
    return plan.largest_rollout_batch(config) if plan else 16


def choose_data(config, small: bool) -> dict[str, str]:
    """Fills in --data. Returns why, by option; nothing where you gave it."""
    if config.data is not None:
        return {}
    cache = HERE / "data" / "cache"
    if small and config.task == "mat-coding":
        config.data = str(mini.ensure(cache))
        return {"data": "MAT-mini, drawn by data/mini.py; --data DIR for a MAT folder"}
    if small and config.task == "mat-search":
        config.data = str(mini_search.ensure(cache))
        return {"data": "MAT-mini, drawn by data/mini_search.py; --data DIR for a MAT folder"}
    if config.task.startswith("mat-"):
        config.data = fetch(HUB_DATA, "dataset")
        return {"data": f"{HUB_DATA} from the hub"}
    splits = ("test",) if config.eval_only or config.check_data else ("test", "train")
    known = mat.FILES[config.task]
    config.data = fetch(HUB_QA, "dataset", [known[split][0] for split in splits if split in known])
    return {"data": f"{HUB_QA} from the hub"}


def is_small(model: str) -> bool:
    """Whether `model` is data/tiny or made from it: what is right for it is wrong for 3B."""
    adapter = weights.adapter_config(model)
    model = adapter["base_model_name_or_path"] if adapter else model
    try:
        settings = json.loads((Path(model) / "config.json").read_text())
        return settings.get("text_config", settings)["hidden_size"] < 1024
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False            # a hub name, or a folder that `load` will complain about


def fetch(name: str, kind: str, files: list[str] | None = None) -> str:
    """The folder of a hub model or data set, from the cache or the network.

    files: only these. The hub shows its own progress bars. Raises UsageError that says what to
    download and where to put it.
    """
    from huggingface_hub import snapshot_download
    flag = "--data" if kind == "dataset" else "--model"
    try:
        folder = snapshot_download(name, repo_type=kind, allow_patterns=files)
        missing = [file for file in files or () if not (Path(folder) / file).exists()]
        reason = f"{missing[0]} is not among its files" if missing else None
    except Exception as error:  # no network, no disk, no such repository: the cure is the same
        reason = type(error).__name__
    if reason:
        options = f"--repo-type {kind} --local-dir DIR"
        command = " ".join(["hf download", name, *(files or ()), options])
        raise UsageError(f"this needs {flag} DIR: {name} is not in the hub's cache and cannot be "
                         f"fetched ({reason}).\nWhere there is network: {command}; then copy DIR "
                         f"here and name it: {flag} DIR")
    return folder


# --- data, model, tools ---------------------------------------------------------------------------


def load_samples(config) -> tuple[list[mat.Sample], list[mat.Sample]]:
    """The held-out and the training samples; the latter are [] for an evaluation alone."""
    held_out = mat.load(config.task, config.data, "test")
    held_out = held_out[:config.eval_samples or len(held_out)]
    if config.eval_only:
        return held_out, []
    if config.protocol == "paper":
        return held_out, mat.load_steps(config.task, config.data)
    return held_out, mat.load(config.task, config.data, "train")


def load_policy(config) -> Policy:
    """The model, with the system prompt that it is asked with."""
    if is_small(config.model):
        transformers.utils.logging.disable_progress_bar()   # loading takes no time
    policy = weights.load(config.model, config.device, getattr(torch, config.dtype))
    policy.system_prompt = choose_prompt(config, policy)
    if policy.adapters and not config.eval_only:
        rank = next(iter(policy.adapters.values())).rank
        if config.lora_rank != rank:
            raise UsageError(f"--lora-rank {config.lora_rank}: the adapter {config.model} has rank "
                             f"{rank}; give --lora-rank {rank} to train it further, or merge it "
                             "first (--save-merged DIR) and train DIR")
    return policy


def choose_prompt(config, policy: Policy) -> str:
    """Yours; else the one that the checkpoint brought; else ours for the task."""
    if config.system_prompt:
        return read_prompt(config.system_prompt)
    brought = policy.system_prompt != SYSTEM_PROMPT
    return policy.system_prompt if brought or config.task == "mat-coding" else SEARCH_PROMPT


def read_prompt(file: str) -> str:
    """The text of a --system-prompt file."""
    try:
        words = Path(file).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--system-prompt {file}: cannot be read ({error}); name a text file in "
                         "UTF-8") from None
    if not words:
        raise UsageError(f"--system-prompt {file} is empty; write what the model is told before "
                         "every question")
    return words


def choose_search(config):
    """The back end of searches; None for mat-coding unless you name one."""
    there = Path(config.data) / mini_search.CORPUS
    path = config.corpus or (str(there) if there.exists() else None)
    key, backend = os.environ.get(SERPER_KEY), None
    if path:
        backend = search.Corpus(path)
    elif key and config.task != "mat-coding":
        backend = search.Serper(key)
    if config.replay:
        return search.Replay(config.replay, backend, REPLAY_MISS)
    if backend is None and config.task != "mat-coding":
        raise UsageError(
            f"task {config.task} needs something to search: --corpus FILE (passages, offline), the "
            f"environment variable {SERPER_KEY} (Google by Serper, live), or --replay FILE (a "
            "record of earlier searches);\nor --tools off")
    return backend


def choose_similarity(config):
    """(function of two texts, its name): how queries are compared with gold ones."""
    name = config.similarity
    if name == "auto" and config.task == "mat-search" and not (
            config.eval_only or is_small(config.model)):
        try:
            return search.SentenceSimilarity(fetch(HUB_SIMILARITY, "model")), HUB_SIMILARITY
        except UsageError:
            print(f"note:   {HUB_SIMILARITY} is not in the hub's cache and cannot be fetched; hf "
                  f"download {HUB_SIMILARITY} gets it. Queries are compared word by word instead")
    if name in ("auto", "lexical"):
        return rewards.lexical_similarity, "lexical"
    try:
        return search.SentenceSimilarity(name), name
    except (OSError, ValueError) as error:
        raise UsageError(f"--similarity {name}: {str(error).splitlines()[0]}; give an encoder's "
                         "folder, or lexical") from None


@contextmanager
def open_tools(config):
    """The sandbox and the back end of searches; with --tools off neither."""
    if config.tools == "off":
        print(f"tools:  {OFF}")
        yield Tools()
        return
    backend = choose_search(config)
    with Sandbox(workers=config.sandbox_workers, seconds=config.sandbox_seconds,
                 memory_mb=config.sandbox_memory, strict=config.sandbox == "strict") as sandbox:
        print(f"tools:  {sandbox.describe()}")
        if backend:
            print(f"search: {backend.name}, {config.passages} passages")
        yield Tools(sandbox, backend, config.passages)


# --- the run and its parts ------------------------------------------------------------------------


def open_run(config, policy: Policy, held_out: list, training: list) -> record.Run:
    """The run folder, new or resumed, locked for this process."""
    similarity, name = choose_similarity(config)
    origin = resume.fingerprint(policy.model, policy.system_prompt, [*held_out, *training])
    origin["similarity"] = name
    Path(config.out).mkdir(parents=True, exist_ok=bool(config.resume))
    kind = leaf("many", "torchrun").Run if processes() > 1 else record.Run
    with ExitStack() as held:
        held.enter_context(resume.locked(Path(config.out)))
        state = resume.open_checkpoint(config, origin) if config.resume else None
        run = kind(config, policy, origin, state)
        run.held = held.pop_all()
    run.similarity = similarity
    extent = ""
    if not config.eval_only:
        extent = (f", {len(training)} for training, {config.steps} steps of "
                  f"{config.samples_per_step} x {config.group_size} episodes")
    print(f"run:    {config.out}: {len(held_out)} held-out samples{extent}")
    if any(sample.queries for sample in training):
        print(f"reward: queries are compared with gold ones by: {name}")
    return run


def choose_parts(config, policy: Policy, run: record.Run, tools: Tools) -> dict:
    """The fields of arft.Parts: the lesson's plain parts, or what stands in for them."""
    play, reward = rollout, partial(rewards.episode_reward, scoring=config,
                                    similarity=run.similarity)
    if config.protocol == "paper":
        paper = leaf("paper", "--protocol paper")
        play = partial(paper.rollout, crop_box=config.crop_box, code_errors=config.code_errors,
                       step_side=config.step_side)
        reward = partial(paper.reward, scoring=config, similarity=run.similarity)
    layout, optimizer, seed = RowLayout, Optimizer, config.seed
    if config.update == "tree":
        layout = leaf("tree", "--update tree").TreeLayout
    saver = weights.checkpointing if config.checkpointing == "on" else nullcontext
    layout = layout(config.micro_batch_tokens, saver)
    if config.dtype == "bfloat16" and not config.lora_rank:
        optimizer = weights.Optimizer
    if processes() > 1:
        many = leaf("many", "torchrun")
        layout, optimizer = many.equal_minibatches(layout), many.Optimizer
        seed = many.seed_of(config)
    engine.Rows.cuda_graph = config.cuda_graph == "on"
    generator = torch.Generator(policy.device).manual_seed(seed)
    run.layout, run.reward, run.generator, run.search = layout, reward, generator, tools.search
    return {"rollout": engine.in_batches(play, config.rollout_batch), "reward": reward,
            "layout": layout, "optimizer": optimizer, "run": run, "tools": tools,
            "generator": generator}
