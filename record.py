"""The run folder: what a run writes down, and how.

What it teaches: what should be left when a run is over, so that a person can see what happened
without having watched: every option, one line of numbers per step, every episode as it was
written and answered, predictions in the published schema, scores with intervals, a checkpoint.

Read next: arft.py, which decides when each of these is written. Left out: accounts, servers.
"""

import csv
import dataclasses
import hashlib
import json
import platform
import shutil
import subprocess
import textwrap
import time
from pathlib import Path

import numpy as np
import torch
import transformers

import report
from policy import Policy
from rollout import Clock, Episode
from tools import SearchError

HERE = Path(__file__).parent
INPUT_SIDE = 512        # pixels: an input image is kept in the run folder for show, at most this large

# --- numbers ------------------------------------------------------------------------------------------------


def rounded(value, digits: int = 6):
    """Numbers as a person would log them; dictionaries and lists inside, too."""
    if isinstance(value, dict):
        return {k: rounded(v, digits) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(v, digits) for v in value]
    return float(f"{value:.{digits}g}") if isinstance(value, float) else value


def step_metrics(step: int, done: dict, group_size: int) -> dict:
    """One line of metrics.jsonl."""
    episodes, rewards, totals = done["episodes"], done["rewards"], done["totals"]
    groups, turns = totals.view(-1, group_size), [t for e in episodes for t in e.turns]
    runs = [t.execution for t in turns if t.execution is not None]
    found = [t.found for t in turns if t.found is not None]
    sampled, seconds = sum(sum(e.mask) for e in episodes), done["clock"].seconds

    def mean(name: str) -> float:       # a single step has an answer, or a problem, or neither
        known = [value for r in rewards if (value := getattr(r, name)) is not None]
        return float(np.mean(known)) if known else 0.0

    return rounded({
        "step": step, "reward_mean": totals.mean().item(), "reward_std": totals.std().item(),
        "answer": mean("answer"), "format": mean("format"), "problem": mean("problem"), "em": mean("em"),
        **({"query": mean("query")} if any(r.query is not None for r in rewards) else {}),
        **({"accuracy": mean("accuracy")} if rewards[0].accuracy is not None else {}),
        "group_std": groups.std(dim=1).mean().item(),
        "zero_variance": (groups.max(1).values == groups.min(1).values).float().mean().item(),
        **done["stats"],
        "tool_calls": len(runs) + len(found), "searches": len(found),
        "tool_failures": sum(r.image is None for r in runs) + sum(isinstance(f, SearchError) for f in found),
        "turns": len(turns) / len(episodes), "tokens": sampled / len(episodes),
        "tokens_per_second": sampled / max(sum(v for k, v in seconds.items() if k != "update"), 1e-9),
        "seconds": done["seconds"], "seconds_by_phase": dict(seconds)})


def flat(values: dict, prefix: str = "") -> dict:
    """Nested dictionaries as one row of a table; lists as JSON.

    >>> flat({"step": 1, "seconds_by_phase": {"decode": 0.5}, "warnings": []})
    {'step': 1, 'seconds_by_phase.decode': 0.5, 'warnings': '[]'}
    """
    row = {}
    for name, value in values.items():
        if isinstance(value, dict):
            row |= flat(value, f"{prefix}{name}.")
        else:
            row[prefix + name] = json.dumps(value) if isinstance(value, list) else value
    return row


def zero_loss_note(config, stats: dict) -> str | None:
    """Why the first step's loss is about zero and its gradient is not; None where this is not so.

    It is so where every episode weighs the same and enters by its ratio: loss types grpo and gspo. dapo and dr_grpo
    weigh an episode by its length, cispo multiplies the advantage with logp, not with the ratio. And where no group has
    unequal rewards, there is no gradient either. stats: the step's line of metrics.
    """
    if config.loss_type not in ("grpo", "gspo") or not stats["updates"] or stats["zero_variance"] == 1:
        return None
    updates = config.inner_epochs * config.minibatches
    printed = f" (printed: the mean of the step's {updates} updates, in which the ratio moves)" if updates > 1 else ""
    return textwrap.fill(
        f"loss {stats['loss']:.4f}, gradient norm {stats['grad_norm']:.2f}: before the first update every ratio is 1 and a "
        f"group's advantages sum to zero, so the loss of the step's episodes is about zero{printed}, but its gradient is "
        "that of A * logp: watch the reward, not the loss.", 100, initial_indent=" " * 8, subsequent_indent=" " * 8)


# --- tokens, for show -----------------------------------------------------------------------------------------


def byte_table() -> dict[str, int]:
    """The character that stands for each byte in the vocabulary of a byte-level tokenizer (GPT-2's, Qwen's): printable
    bytes stand for themselves, the others for the characters from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


BYTES = byte_table()


def token_text(tokenizer, token_id: int) -> str:
    """One id as text, for show only. Bytes that are no UTF-8 by themselves (a part of a character) become \\x escapes."""
    if token_id in tokenizer.added_tokens_decoder:
        return tokenizer.added_tokens_decoder[token_id].content
    token = tokenizer.convert_ids_to_tokens(token_id)
    return bytes(BYTES[c] for c in token).decode("utf-8", errors="backslashreplace")


def token_record(policy: Policy, episode: Episode, logp: torch.Tensor) -> dict:
    """An episode token by token: equally long lists, and strings of one letter a token.

    tokens: text; count: 1, or how many equal image place holders were folded into one entry; roles: p prompt, m model,
    t tool (everything that the environment wrote after the prompt); mask; logp_old: at sampling; logp [T]: after the
    update. 0 where the mask is 0.
    """
    record = {"tokens": [], "count": [], "roles": "", "mask": "", "logp_old": [], "logp": []}
    first = episode.turns[0].start if episode.turns else len(episode.ids)
    for t, token_id in enumerate(episode.ids):
        if token_id == policy.image_pad == episode.ids[t - 1]:
            record["count"][-1] += 1
            continue
        sampled = episode.mask[t]
        record["tokens"].append(token_text(policy.tokenizer, token_id))
        record["count"].append(1)
        record["roles"] += "m" if sampled else "p" if t < first else "t"
        record["mask"] += str(sampled)
        record["logp_old"].append(round(episode.logp[t], 5) if sampled else 0)
        record["logp"].append(round(logp[t].item(), 5) if sampled else 0)
    return record


class Run:
    """The folder of one run, and what is written there."""

    def __init__(self, config):
        self.folder, self.clock, self.started = Path(config.out), Clock(), time.perf_counter()
        self.metrics, self.curve, self.summary = [], [], {}
        self.inputs = {}        # image path of a sample: its copy in images/
        self.interrupted, self.group_size = False, config.group_size
        self.searches = None        # of a Replay: how many were in the record
        (self.folder / "images").mkdir(parents=True)
        versions = {"python": platform.python_version(), "torch": torch.__version__,
                    "transformers": transformers.__version__, "numpy": np.__version__}
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=HERE, capture_output=True, text=True).stdout.strip()
        self.write_json("config.json", dataclasses.asdict(config) | {"versions": versions, "commit": commit or None})

    @property
    def steps(self) -> int:
        return len(self.metrics)

    def write_json(self, name: str, value) -> None:
        (self.folder / name).write_text(json.dumps(value, indent=1, ensure_ascii=False))

    def append(self, name: str, *objects: dict) -> None:
        # a lone surrogate from a data file has no UTF-8; as \\ud800 it is the same JSON
        with open(self.folder / name, "a", encoding="utf-8", errors="backslashreplace") as file:
            file.writelines(json.dumps(o, ensure_ascii=False) + "\n" for o in objects)

    def record_step(self, step: int, done: dict) -> None:
        self.metrics.append(step_metrics(step, done, self.group_size))
        for phase, seconds in done["clock"].seconds.items():
            self.clock.seconds[phase] += seconds
        self.append("metrics.jsonl", self.metrics[-1])
        self.append_row("metrics.csv", flat(self.metrics[-1]))
        records = [self.episode_record(f"step-{step}", i, episode, reward, float(advantage), i < self.group_size)
                   for i, (episode, reward, advantage)
                   in enumerate(zip(done["episodes"], done["rewards"], done["advantages"]))]
        self.append("episodes.jsonl", *records)
        self.append("tokens.jsonl", *({"when": f"step-{step}", "index": i, "sample": done["episodes"][i].sample.id,
                                       "advantage": rounded(float(done["advantages"][i])), **tokens}
                                      for i, tokens in enumerate(done.get("tokens", ()))))

    def append_row(self, name: str, row: dict) -> None:
        """One line of a CSV file; its first line, the names of the columns, is that of the first row ever written."""
        path = self.folder / name
        columns = next(csv.reader([path.read_text().split("\n", 1)[0]])) if path.exists() else list(row)
        with open(path, "a", newline="") as file:
            writer = csv.DictWriter(file, columns, restval="", extrasaction="ignore", lineterminator="\n")
            if file.tell() == 0:
                writer.writeheader()
            writer.writerow(row)

    def keep_input(self, sample) -> str:
        """A small copy of a sample's image, for the report: its name in the run folder."""
        if sample.image_path not in self.inputs:
            image = sample.open_image()
            small = max(image.size) <= INPUT_SIDE
            image.thumbnail((INPUT_SIDE, INPUT_SIDE))
            name = f"images/input-{hashlib.sha1(str(sample.image_path).encode()).hexdigest()[:12]}"
            self.inputs[sample.image_path] = name + (".png" if small else ".jpg")      # photographs are large as PNG
            image.convert("RGB").save(self.folder / self.inputs[sample.image_path], quality=90)
        return self.inputs[sample.image_path]

    def episode_record(self, when: str, i: int, episode: Episode, reward, advantage: float | None, images: bool) -> dict:
        """What was shown, written and returned; with `images`, the images as files ("input": a small copy of the
        sample's). "ran": the program, where it is not the text as written (--crop-box question)."""
        turns = []
        for k, turn in enumerate(episode.turns):
            run, failed = turn.execution, isinstance(turn.found, SearchError)
            name = None
            if run is not None and run.image is not None and images:
                name = f"images/{when}-{i}-{k}.png"
                run.image.save(self.folder / name)
            ran = turn.action.value if run is not None and turn.action.value not in turn.text else None
            turns.append({"text": turn.text, "action": turn.action.kind, "finished": turn.finished, "ran": ran,
                          "observation": turn.observation, "image": name,
                          "error": run.error if run is not None else str(turn.found) if failed else None})
        sample = episode.sample
        return {"when": when, "index": i, "sample": sample.id,
                "image": str(sample.image_path) if sample.image_path else None,
                "input": self.keep_input(sample) if sample.image_path and images else None,
                "question": sample.question, "gold": list(sample.golds), "problems": list(sample.problems),
                "split": sample.split, "turns": turns, "answer": episode.answer, "ended": episode.ended,
                "reward": rounded(dataclasses.asdict(reward)), "advantage": rounded(advantage)}

    def record_evaluation(self, when: int | str, summary: dict, episodes: list[Episode] = (), rewards: list = ()) -> None:
        """Keeps a summary; with episodes and their rewards (before and after training) also every prediction."""
        self.summary[str(when)] = rounded(summary)
        self.curve = [point for point in self.curve if point["step"] < self.steps]     # "after" may be its last, too
        self.curve.append({"step": self.steps, "greedy": summary["em"], "sampled": summary["sampled"]["em"]})
        self.append("evaluations.jsonl", {"step": self.steps, "when": str(when), **self.summary[str(when)]})
        if not episodes:
            return
        self.write_json(f"predictions-{when}.json", [
            {"id": int(e.sample.id) if e.sample.id.isdigit() else e.sample.id, "gt": list(e.sample.golds),
             "pred_answer": e.answer, **({"split": e.sample.split} if e.sample.split else {})} for e in episodes])
        self.append("episodes.jsonl", *(self.episode_record(str(when), i, e, r, None, True)
                                        for i, (e, r) in enumerate(zip(episodes, rewards))))

    def step_line(self) -> str:
        """The last step in at most 100 columns."""
        m = self.metrics[-1]
        part = "query" if "query" in m else "problem"
        return (f"step {m['step']:4d}  reward {m['reward_mean']:.2f}  EM {m['em']:.2f}  {part} {m[part]:.2f}  "
                f"KL {m['kl'] or 0:.3f}  entropy {m['entropy'] or 0:.2f}  "
                f"tools {m['tool_calls']}, {m['tool_failures']} failed  {m['seconds']:.1f} s")

    def save_checkpoint(self, trainer) -> None:
        """checkpoint/: model and training state after the last complete step; the new one is complete before the old one goes."""
        new, old = self.folder / "checkpoint.new", self.folder / "checkpoint"
        trainer.policy.save(new)
        torch.save(trainer.state(), new / "training_state.pt")
        if old.exists():
            shutil.rmtree(old)
        new.rename(old)
        report.write(self.folder)       # a run that is going on can be watched

    def finish(self, policy: Policy, config) -> None:
        """model/, summary.json and report.html."""
        if self.steps:
            policy.save(self.folder / "model")
        seconds = rounded(dict(self.clock.seconds))
        summary = {name: self.summary[name] for name in ("before", "after") if name in self.summary}
        self.write_json("summary.json", summary | {
            "steps": self.steps, "interrupted": self.interrupted,
            "seconds": round(time.perf_counter() - self.started, 1), "seconds_by_phase": seconds, "curve": self.curve,
            **({"searches": self.searches} if self.searches else {})})
        report.write(self.folder)
