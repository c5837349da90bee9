"""The run folder: what a run writes down, and how.

What it teaches: what should be left when a run is over, so that a person can see what happened
without having watched: every option, one line of numbers per step, every episode as it was
written and answered, predictions in the published schema, scores with intervals, a checkpoint. And
what should be said while it runs: `warnings_of` is told the numbers of all steps and names what
goes wrong.

Read next: arft.py, which decides when each of these is written; resume.py, which keeps it readable
after a kill. Left out: accounts, servers.
"""

import csv
import dataclasses
import hashlib
import json
import platform
import subprocess
import textwrap
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import transformers

from extras import many
from extras import report
from extras import resume
from extras import weights
from policy import Policy
from rollout import Clock, Episode
from tools import SearchError

HERE = Path(__file__).parent
# pixels: an input image is kept in the run folder for show, at most this large
INPUT_SIDE = 512

# --- numbers --------------------------------------------------------------------------------------


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

    def average(name: str) -> float:    # a single step has an answer, or a problem, or neither
        known = [value for r in rewards if (value := getattr(r, name)) is not None]
        return float(np.mean(known)) if known else 0.0

    return rounded({
        "step": step, "reward_mean": totals.mean().item(), "reward_std": totals.std().item(),
        "answer": average("answer"), "format": average("format"), "problem": average("problem"),
        "em": average("em"),
        **({"query": average("query")} if any(r.query is not None for r in rewards) else {}),
        **({"accuracy": average("accuracy")} if rewards[0].accuracy is not None else {}),
        "groups": len(groups), "group_std": groups.std(dim=1).mean().item(),
        "zero_variance": (groups.max(1).values == groups.min(1).values).float().mean().item(),
        **done["stats"],
        "tool_calls": len(runs) + len(found), "searches": len(found),
        "tool_failures": sum(r.image is None for r in runs)
        + sum(isinstance(f, SearchError) for f in found),
        "turns": len(turns) / len(episodes), "tokens": sampled / len(episodes),
        "tokens_per_second": sampled / max(sum(v for k, v in seconds.items() if k != "update"),
                                           1e-9),
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

    It is so where every episode weighs the same and enters by its ratio: loss types grpo and gspo.
    dapo and dr_grpo weigh an episode by its length, cispo multiplies the advantage with logp, not
    with the ratio. And where no group has unequal rewards, there is no gradient either. stats: the
    step's line of metrics.
    """
    if config.loss_type not in ("grpo",
                                "gspo") or not stats["updates"] or stats["zero_variance"] == 1:
        return None
    updates = config.inner_epochs * config.minibatches
    printed = (f" (printed: the mean of the step's {updates} updates, in which the ratio moves)"
               if updates > 1 else "")
    return textwrap.fill(
        f"loss {stats['loss']:.4f}, gradient norm {stats['grad_norm']:.2f}: before the first "
        f"update every ratio is 1 and a "
        f"group's advantages sum to zero, so the loss of the step's episodes is about "
        f"zero{printed}, but its gradient is "
        "that of A * logp: watch the reward, not the loss.", 100, initial_indent=" " * 8,
        subsequent_indent=" " * 8)


# --- tokens, for show -----------------------------------------------------------------------------


def byte_table() -> dict[str, int]:
    """The character that stands for each byte in the vocabulary of a byte-level tokenizer (GPT-2's,
    Qwen's): printable bytes stand for themselves, the others for the characters from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


BYTES = byte_table()


def token_text(tokenizer, token_id: int) -> str:
    """One id as text, for show only. Bytes that are no UTF-8 by themselves (a
    part of a character) become \\x escapes."""
    if token_id in tokenizer.added_tokens_decoder:
        return tokenizer.added_tokens_decoder[token_id].content
    token = tokenizer.convert_ids_to_tokens(token_id)
    return bytes(BYTES[c] for c in token).decode("utf-8", errors="backslashreplace")


def token_record(policy: Policy, episode: Episode, logp: torch.Tensor) -> dict:
    """An episode token by token: equally long lists, and strings of one letter a token.

    tokens: text; count: 1, or how many equal image place holders were folded into one entry; roles:
    p prompt, m model, t tool (everything that the environment wrote after the prompt); mask;
    logp_old: at sampling; logp [T]: after the update. 0 where the mask is 0.
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
# --- what goes wrong ------------------------------------------------------------------------------

WINDOW = 3                  # steps: one odd step is noise; three in a row are not
# nats for each id: five times what the README's good runs reach, half of its bad run's
KL_HIGH = 0.5
# share of the first steps' entropy. Good runs halve it; below a tenth nothing new is tried
ENTROPY_LEFT = 0.1
TOOLS_LEFT = 0.05           # share of the most calls that there were
LOGP_ERROR_FLOAT32 = 1e-2   # a hundred times what law 2 allows
# a logit of 16 to 32 is rounded by up to 0.06; both passes do so, in many layers
LOGP_ERROR_BFLOAT16 = 0.5


def warnings_of(metrics: list[dict], logp_limit: float = LOGP_ERROR_FLOAT32) -> list[dict]:
    """What goes wrong in the last of these steps (lines of metrics.jsonl): [{"name", "message",
    "option"}].

    A reward that is not a finite number is not among them: it stops the run with the sample's name
    (arft.score).

    >>> flat = {"zero_variance": 1.0, "kl": None, "entropy": None, "tool_calls": 5}
    >>> [[w["name"] for w in warnings_of([flat] * n)] for n in (1, 2, 3)]
    [[], [], ['flat']]
    """
    now, found = metrics[-1], []

    def warn(name: str, option: str, message: str) -> None:
        found.append({"name": name, "message": message, "option": option})

    def series(key: str) -> list[float]:
        # None: a step without an update
        return [m[key] for m in metrics if m.get(key) is not None]

    if now.get("skipped_updates"):
        warn("grad", "--lr",
             f"{now['skipped_updates']} updates were left out: loss or gradient is not a finite "
             f"number. "
             "Lower --lr")
    if len(metrics) >= WINDOW and all(m["zero_variance"] == 1 for m in metrics[-WINDOW:]):
        warn("flat", "--samples-per-step",
             f"all groups are of equal rewards, for {WINDOW} steps: nothing is learned. "
             "Raise --samples-per-step, --group-size or --temperature")
    kl = series("kl")
    if now.get("kl") is not None and len(kl) >= WINDOW and min(kl[-WINDOW:]) > KL_HIGH:
        warn("KL", "--beta",
             f"the policy runs away from where it began (KL over {KL_HIGH} for {WINDOW} steps). "
             f"Lower "
             "--lr or raise --beta")
    entropy = series("entropy")
    fallen = len(entropy) > WINDOW and mean(entropy[-WINDOW:]) < ENTROPY_LEFT * mean(
        entropy[:WINDOW])
    if fallen and now["entropy"] is not None:
        warn("entropy", "--clip-high",
             f"under {ENTROPY_LEFT:.0%} of the first steps' entropy: all episodes become "
             "alike. Raise --clip-high or --beta, or lower --lr")
    calls = series("tool_calls")
    most = max((mean(calls[i:i + WINDOW]) for i in range(len(calls) - WINDOW)), default=0)
    if mean(calls[-WINDOW:]) < TOOLS_LEFT * most:
        warn("tools", "--beta",
             f"under {TOOLS_LEFT:.0%} of the tool calls that there were: the tool is no longer "
             f"used. "
             "Raise --beta, lower --lr")
    if (now.get("logp_error") or 0) > logp_limit:
        warn("logp", "--device", "what is scored is not what was sampled (log-probs differ by "
             f"{now['logp_error']:.2g}). If --device cpu does it, too, it is a bug, not a setting: "
             f"run the tests")
    return found


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


# of the time may go into checkpoints, where --save-every does not say how often
CHECKPOINT_SHARE = 0.05
REPORT_SHARE = 0.05         # and into the page of a run that is going on

# --- the run --------------------------------------------------------------------------------------


class Run:
    """The folder of one run, and what is written there."""

    def __init__(self, config, fingerprint: dict | None = None, state: dict | None = None):
        """A new folder; or, with --resume, the one that is there, taken back to the checkpoint's
        `state` (None: to its beginning). fingerprint: `resume.fingerprint` of what the run starts
        from."""
        self.folder, self.clock, self.started = Path(config.out), Clock(), time.perf_counter()
        self.metrics, self.curve, self.summary, self.best = [], [], {}, None
        self.inputs = {}        # image path of a sample: its copy in images/
        self.interrupted, self.group_size = False, config.group_size
        self.searches = None        # of a Replay: how many were in the record
        self.logp_limit = LOGP_ERROR_BFLOAT16 if config.dtype == "bfloat16" else LOGP_ERROR_FLOAT32
        self.saved, self.saved_at, self.saving = (state["step"] if state
                                                  else 0, time.perf_counter(), 0.0)
        # when report.html was made, and how long it took
        self.watched_at, self.watching = time.perf_counter(), 0.0
        self.torn = False       # whether the weights in memory are of no step: an update was cut
        versions = {"python": platform.python_version(), "torch": torch.__version__,
                    "transformers": transformers.__version__, "numpy": np.__version__}
        commit = subprocess.run(["git", "rev-parse",
                                 "HEAD"], cwd=HERE, capture_output=True, text=True).stdout.strip()
        (self.folder / "images").mkdir(parents=True, exist_ok=bool(config.resume))
        if config.resume:
            self.restore(state)
        start = {"versions": versions, "commit": commit or None, "fingerprint": fingerprint}
        if config.resume:
            kept = json.loads((self.folder / "config.json").read_text())
            again = {"step": self.steps, "versions": versions, "commit": commit or None}
            start = {name: kept.get(name)
                     for name in start} | {"resumed": [*kept.get("resumed", ()), again]}
        self.write_json("config.json", dataclasses.asdict(config) | start)

    @property
    def steps(self) -> int:
        return len(self.metrics)

    def state(self) -> dict:
        """What a checkpoint keeps of the run: counters, and how long the files
        are that only grow."""
        return {"seconds": time.perf_counter() - self.started,
                "seconds_by_phase": dict(self.clock.seconds),
                "summary": self.summary, "curve": self.curve, "best": self.best,
                "lengths": resume.lengths(self.folder)}

    def restore(self, state: dict | None) -> None:
        """Takes the folder and the counters back to a checkpoint."""
        resume.settle(self.folder)
        kept = state["run"] if state else {}
        resume.cut_back(self.folder, state["step"] if state else 0, kept.get("lengths", {}))
        if state:
            self.metrics = resume.read_lines(self.folder / "metrics.jsonl")
            self.summary, self.curve, self.best = kept["summary"], kept["curve"], kept["best"]
            self.clock.seconds.update(kept["seconds_by_phase"])
            self.started -= kept["seconds"]

    def write_json(self, name: str, value) -> None:
        resume.write_text(self.folder / name, json.dumps(value, indent=1, ensure_ascii=False))

    def append(self, name: str, *objects: dict) -> None:
        resume.append_lines(self.folder / name, objects)

    def record_step(self, step: int, done: dict) -> None:
        metrics = step_metrics(step, done, self.group_size)
        found = warnings_of([*self.metrics, metrics], self.logp_limit)
        metrics |= {"warnings": found} if found else {}
        self.append("metrics.jsonl", metrics)
        self.append_row("metrics.csv", flat(metrics | {"warnings": [w["name"] for w in found]}))
        records = [self.episode_record(f"step-{step}", i, episode, reward, float(advantage),
                                       i < self.group_size)
                   for i, (episode, reward, advantage)
                   in enumerate(zip(done["episodes"], done["rewards"], done["advantages"]))]
        self.append("episodes.jsonl", *records)
        self.append("tokens.jsonl",
                    *({"when": f"step-{step}", "index": i, "sample": done["episodes"][i].sample.id,
                                       "advantage": rounded(float(done["advantages"][i])), **tokens}
                                      for i, tokens in enumerate(done.get("tokens", ()))))
        for phase, seconds in done["clock"].seconds.items():
            self.clock.seconds[phase] += seconds
        self.metrics.append(metrics)        # last: `steps` counts those that are recorded in full

    def append_row(self, name: str, row: dict) -> None:
        """One line of a CSV file; its first line, the names of the columns, is
        that of the first row ever written."""
        with open(self.folder / name, "a+", newline="") as file:
            file.seek(0)
            columns = next(csv.reader([file.readline()]), None)
            writer = csv.DictWriter(file, columns or list(row), restval="", extrasaction="ignore",
                                    lineterminator="\n")
            if not columns:
                writer.writeheader()
            writer.writerow(row)

    def keep_input(self, sample) -> str:
        """A small copy of a sample's image, for the report: its name in the run folder."""
        if sample.image_path not in self.inputs:
            image = sample.open_image()
            small = max(image.size) <= INPUT_SIDE
            image.thumbnail((INPUT_SIDE, INPUT_SIDE))
            name = f"images/input-{hashlib.sha1(str(sample.image_path).encode()).hexdigest()[:12]}"
            # photographs are large as PNG
            self.inputs[sample.image_path] = name + (".png" if small else ".jpg")
            image.convert("RGB").save(self.folder / self.inputs[sample.image_path], quality=90)
        return self.inputs[sample.image_path]

    def episode_record(self, when: str, i: int, episode: Episode, reward, advantage: float | None,
                       images: bool) -> dict:
        """What was shown, written and returned; with `images`, the images as files ("input": a
        small copy of the sample's). "ran": the program, where it is not the text as written
        (--crop-box question)."""
        turns = []
        for k, turn in enumerate(episode.turns):
            run, failed = turn.execution, isinstance(turn.found, SearchError)
            name = None
            if run is not None and run.image is not None and images:
                name = f"images/{when}-{i}-{k}.png"
                run.image.save(self.folder / name)
            ran = (turn.action.value if run is not None and turn.action.value not in turn.text
                   else None)
            turns.append({"text": turn.text, "action": turn.action.kind, "finished": turn.finished,
                          "ran": ran,
                          "observation": turn.observation, "image": name,
                          "error": run.error if run is not None else str(turn.found) if failed
                          else None})
        sample = episode.sample
        return {"when": when, "index": i, "sample": sample.id,
                "image": str(sample.image_path) if sample.image_path else None,
                "input": self.keep_input(sample) if sample.image_path and images else None,
                "question": sample.question, "gold": list(sample.golds),
                "problems": list(sample.problems),
                "split": sample.split, "turns": turns, "answer": episode.answer,
                "ended": episode.ended,
                "reward": rounded(dataclasses.asdict(reward)), "advantage": rounded(advantage)}

    def record_evaluation(self, when: int | str, summary: dict, rows: list[dict] = ()) -> None:
        """Keeps a summary; with its rows, `episode_record`s (before and after
        training), also every prediction."""
        self.summary[str(when)] = rounded(summary)
        # "after" may be its last, too
        self.curve = [point for point in self.curve if point["step"] < self.steps]
        self.curve.append({"step": self.steps, "greedy": summary["em"],
                           "sampled": summary.get("sampled", {}).get("em")})
        self.append("evaluations.jsonl",
                    {"step": self.steps, "when": str(when), **self.summary[str(when)]})
        if rows:
            self.write_json(f"predictions-{when}.json", [
                {"id": int(row["sample"]) if row["sample"].isdigit() else row["sample"],
                 "gt": row["gold"],
                 "pred_answer": row["answer"], **({"split": row["split"]} if row["split"] else {})}
                for row in rows])
            self.append("episodes.jsonl", *rows)
        for part in self.folder.glob("*.part"):
            part.unlink()

    def step_line(self) -> str:
        """The last step in at most 100 columns; behind "!" what goes wrong. What
        does not fit is left out."""
        m = self.metrics[-1]
        part = "query" if "query" in m else "problem"
        flat, found = round(m["zero_variance"] * m["groups"]), [w["name"]
                                                                for w in m.get("warnings", ())]
        parts = [f"step {m['step']:4d}  reward {m['reward_mean']:.2f}  EM {m['em']:.2f}",
                 f"  {part} {m[part]:.2f}", f"  KL {m['kl'] or 0:.3f}",
                 f"  entropy {m['entropy'] or 0:.2f}",
                 f"  tools {m['tool_calls']}", f", {m['tool_failures']} failed",
                 f"  {m['seconds']:.1f} s", f"  {flat} flat" * (flat > 0),
                 f"  ! {' '.join(found)}" * bool(found)]
        for dropped in (5, 1, 7, 3):
            if len("".join(parts)) > 100:
                parts[dropped] = ""
        return "".join(parts)

    def news(self) -> list[str]:
        """In full, the last step's warnings that the step before it did not have."""
        before = {w["name"] for m in self.metrics[-2:-1] for w in m.get("warnings", ())}
        now = self.metrics[-1].get("warnings", ())
        return [f"! {w['name']}: {w['message']}" for w in now if w["name"] not in before]

    def warned(self) -> dict[str, int]:
        """How many steps had each warning."""
        return dict(Counter(w["name"] for m in self.metrics for w in m.get("warnings", ())))

    def checkpoint_due(self, step: int, every: int) -> bool:
        """Whether it is time: every so many steps, or (0) as often as
        CHECKPOINT_SHARE of the time allows."""
        if every:
            return step % every == 0
        return CHECKPOINT_SHARE * (time.perf_counter() - self.saved_at) >= self.saving

    def save_checkpoint(self, trainer) -> None:
        """checkpoint/: all that the next step depends on."""
        start = time.perf_counter()
        with self.clock.phase("checkpoint"):
            resume.save(self.folder, trainer.state() | {"run": self.state()})
        self.saved, self.saved_at = trainer.steps, time.perf_counter()
        self.saving = self.saved_at - start

    def watch(self) -> None:
        """Remakes report.html, so that a run that is going on can be watched; as
        often as REPORT_SHARE of the time allows."""
        start = time.perf_counter()
        if REPORT_SHARE * (start - self.watched_at) >= self.watching:
            report.write(self.folder)
            self.watched_at = time.perf_counter()
            self.watching = self.watched_at - start

    def keep_best(self, policy: Policy) -> None:
        """best/: a model folder of the highest greedy exact match in the run's
        evaluations; of equals, the first."""
        point = self.curve[-1]
        if self.best is None or point["greedy"] > self.best["em"]:
            self.best = {"step": point["step"], "em": point["greedy"]}

            def write(folder):
                weights.save(policy, folder, write=not many.rank())
                resume.write_text(folder / "best.json", json.dumps(self.best))
            resume.write_folder(self.folder / "best", write)

    def finish(self, policy: Policy | None, config) -> None:
        """model/ (not without a policy), summary.json and report.html."""
        if self.steps and policy and not self.torn:
            resume.write_folder(self.folder / "model", lambda folder: weights.save(
                policy, folder, write=not many.rank()))
        seconds = rounded(dict(self.clock.seconds))
        summary = {name: self.summary[name] for name in ("before", "after") if name in self.summary}
        # last: a run with "after" in it is finished
        self.write_json("summary.json", summary | {
            "steps": self.steps, "interrupted": self.interrupted, "warnings": self.warned(),
            "seconds": round(time.perf_counter() - self.started, 1), "seconds_by_phase": seconds,
            "curve": self.curve,
            **({"searches": self.searches} if self.searches else {})})
        report.write(self.folder)

    def last_words(self) -> list[str]:
        """What a person is told at the end."""
        clock, took = f"{time.perf_counter() - self.started:.0f} s", self.clock.seconds.get(
            "checkpoint", 0.0)
        lines = [f"{self.steps} steps, {clock} ({took:.1f} s of it for checkpoints); everything is "
                 f"in {self.folder}"]
        if warned := self.warned():
            lines.insert(0, "warnings: "
                         + ", ".join(f"{name} in {n} steps" for name, n in warned.items()))
        if self.torn:
            lines.append("the last update was cut short, so there is no model/ of it")
        if self.interrupted:
            lines.append(f"to go on from step {self.saved}: python arft.py --resume {self.folder}")
        return lines
