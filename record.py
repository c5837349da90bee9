"""The run folder: what a run writes down, and how.

What it teaches: what should be left when a run is over, so that a person can see what happened
without having watched: every option, one line of numbers per step, every episode as it was
written and answered, predictions in the published schema, scores with intervals, a checkpoint.

Read next: arft.py, which decides when each of these is written. Left out: accounts, servers.
"""

import dataclasses
import json
import platform
import shutil
import subprocess
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from jinja2 import Environment, FileSystemLoader

from policy import Policy
from rewards import SCORERS
from rollout import Clock, Episode
from tools import SearchError

HERE = Path(__file__).parent

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


class Run:
    """The folder of one run, and what is written there."""

    def __init__(self, config):
        self.folder, self.clock, self.started = Path(config.out), Clock(), time.perf_counter()
        self.metrics, self.curve, self.summary = [], [], {}
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
        with open(self.folder / name, "a") as file:
            file.writelines(json.dumps(o, ensure_ascii=False) + "\n" for o in objects)

    def record_step(self, step: int, done: dict) -> None:
        self.metrics.append(step_metrics(step, done, self.group_size))
        for phase, seconds in done["clock"].seconds.items():
            self.clock.seconds[phase] += seconds
        self.append("metrics.jsonl", self.metrics[-1])
        records = [self.episode_record(f"step-{step}", i, episode, reward, float(advantage), i < self.group_size)
                   for i, (episode, reward, advantage)
                   in enumerate(zip(done["episodes"], done["rewards"], done["advantages"]))]
        self.append("episodes.jsonl", *records)

    def episode_record(self, when: str, i: int, episode: Episode, reward, advantage: float | None, images: bool) -> dict:
        """What was shown, written and returned; with `images`, the returned images as files. "ran": the program, where
        it is not the text as written (--crop-box question)."""
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
        return {"when": when, "sample": sample.id, "image": str(sample.image_path) if sample.image_path else None,
                "question": sample.question, "gold": list(sample.golds), "problems": list(sample.problems),
                "split": sample.split, "turns": turns, "answer": episode.answer, "ended": episode.ended,
                "reward": rounded(dataclasses.asdict(reward)), "advantage": rounded(advantage)}

    def record_evaluation(self, when: int | str, summary: dict, episodes: list[Episode] = (), rewards: list = ()) -> None:
        """Keeps a summary; with episodes and their rewards (before and after training) also every prediction."""
        self.summary[str(when)] = rounded(summary)
        self.curve = [point for point in self.curve if point["step"] < self.steps]     # "after" may be its last, too
        self.curve.append({"step": self.steps, "greedy": summary["em"], "sampled": summary["sampled"]["em"]})
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
        page = Environment(loader=FileSystemLoader(HERE / "data"), autoescape=True).get_template("report.html")
        (self.folder / "report.html").write_text(page.render(
            config=dataclasses.asdict(config), metrics=self.metrics, curve=self.curve, summary=summary, phases=seconds))


HEADER = f"{'':22}{'n':>6}  {'EM %':>6} {'[95%]':>16}  {'F1 %':>6} {'[95%]':>16}"


def score_row(name: str, s: dict) -> str:
    """One line under HEADER, in percent with two digits, as the paper prints them."""
    low, high, flow, fhigh = (100 * v for v in (*s["em_ci95"], *s["f1_ci95"]))
    return (f"{name:22}{s['n']:6d}  {100 * s['em']:6.2f} [{low:6.2f}, {high:6.2f}]  "
            f"{100 * s['f1']:6.2f} [{flow:6.2f}, {fhigh:6.2f}]")


def table(summary: dict) -> str:
    """Before and after, greedy and sampled, by split and by both scorers."""
    lines = [HEADER]
    for when in ("before", "after"):
        if when in summary:
            lines.append(score_row(f"{when}, greedy", summary[when]))
            lines += [score_row(f"  {split}", part) for split, part in summary[when].get("splits", {}).items()]
            if "damaged" in summary[when].get("by_problem", {}):
                damaged = summary[when]["by_problem"]["damaged"]
                lines.append(f"{'  damaged images':22}{damaged['n']:6d}  {100 * damaged['em']:6.2f}")
            lines += [score_row(f"  {name} scorer", summary[when][name]) for name in SCORERS if name in summary[when]]
            lines.append(score_row(f"{when}, sampled", summary[when]["sampled"]))
    return "\n".join(lines)
