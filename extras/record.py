"""The run folder: what a run writes down, when, and how it ends.

`Run` is what arft.train is handed. It decides nothing that is learned: it yields the steps that are
still to be made, keeps what came of them, saves checkpoints, and ends the run cleanly whatever
stops it. When a run is over you can see what happened without having watched: every option, one
line of numbers a step, every episode as it was written and answered, predictions in the published
schema, scores with intervals, a checkpoint, a page.

extras/metrics.py says what the numbers mean, extras/resume.py how a file is written so that a kill
cannot tear it. Left out: accounts, servers.
"""

import csv
import dataclasses
import hashlib
import json
import platform
import subprocess
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import torch
import transformers
from tqdm import tqdm

from extras import files, metrics, resume, weights
from extras.engine import CLOCK, timed
from extras.resume import RunError
from extras.usage import leaf
from grpo import frozen_logp
from rewards import SCORERS, score_answer, summarize
from rollout import Episode
from tools import SearchError

HERE = Path(__file__).parent
INPUT_SIDE = 512            # pixels: the run folder keeps an input image at most this large
CHECKPOINT_SHARE = 0.05     # the most of the time that checkpoints take, if --save-every is 0
REPORT_SHARE = 0.05         # the most of the time that report.html takes during a run
RECORD_TOKENS = True        # keep each step's first group in tokens.jsonl; costs one forward pass
SHOWN = ("before", "after")     # the evaluations whose episodes and predictions are kept


class Run:
    """The folder of one run, and the order in which its parts happen. One process."""

    alone = True                # False in many.Run: other processes share the work

    def __init__(self, config, policy=None, fingerprint: dict | None = None,
                 state: dict | None = None):
        """Makes the folder; with --resume, takes it back to the checkpoint `state`.

        fingerprint: `resume.fingerprint` of what the run starts from. state None: the run begins.
        """
        self.config, self.policy, self.state = config, policy, state
        self.folder, self.started = Path(config.out), time.perf_counter()
        self.metrics, self.curve, self.summary, self.best = [], [], {}, None
        self.seconds = defaultdict(float)       # by phase, of the whole run
        self.inputs = {}                        # image path of a sample: its copy in images/
        self.interrupted, self.torn = False, False      # torn: an update was cut, weights are of
        self.learned = state["step"] if state else 0    # no step; learned: steps in the weights
        self.saved, self.saved_at, self.saving = self.learned, time.perf_counter(), 0.0
        self.shown_at, self.showing = time.perf_counter(), 0.0      # report.html: when, how long
        self.optimizer = self.randomness = self.midway = None
        self.layout = self.reward = self.generator = self.search = None     # options.choose_parts
        self.signals, self.held = resume.Signals(), ExitStack()
        self.logp_limit = (metrics.LOGP_ERROR_BFLOAT16 if config.dtype == "bfloat16"
                           else metrics.LOGP_ERROR_FLOAT32)
        (self.folder / "images").mkdir(parents=True, exist_ok=bool(config.resume))
        if config.resume:
            self.restore(state)
        self.write_config(fingerprint)

    def write_config(self, fingerprint: dict | None) -> None:
        """config.json: every option, the versions, the commit, what the run started from."""
        versions = {"python": platform.python_version(), "torch": torch.__version__,
                    "transformers": transformers.__version__, "numpy": np.__version__}
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=HERE, capture_output=True,
                                text=True).stdout.strip() or None
        start = {"versions": versions, "commit": commit, "fingerprint": fingerprint}
        if self.config.resume:
            kept = json.loads((self.folder / "config.json").read_text())
            again = {"step": self.done, "versions": versions, "commit": commit}
            start = {name: kept.get(name) for name in start}
            start |= {"resumed": [*kept.get("resumed", ()), again]}
        self.write_json("config.json", dataclasses.asdict(self.config) | start)

    @property
    def done(self) -> int:
        """Steps that are recorded in full."""
        return len(self.metrics)

    # --- several processes (many.Run); one process has everything ---------------------------------

    def share(self, items):
        """This process's part of what all processes have alike."""
        return items

    def gather(self, items: list) -> list:
        """The parts of all processes behind one another."""
        return items

    # --- a checkpoint -----------------------------------------------------------------------------

    def counters(self) -> dict:
        """What a checkpoint keeps of the run: counters, and the lengths of the files that grow."""
        return {"seconds": time.perf_counter() - self.started, "summary": self.summary,
                "seconds_by_phase": dict(self.seconds), "curve": self.curve, "best": self.best,
                "lengths": resume.lengths(self.folder)}

    def restore(self, state: dict | None) -> None:
        """Takes the folder and the counters back to a checkpoint; None: to the run's beginning."""
        resume.repair_folder(self.folder)
        kept = state["run"] if state else {}
        resume.cut_to_checkpoint(self.folder, self.learned, kept.get("lengths", {}))
        if state:
            self.metrics = resume.read_lines(self.folder / "metrics.jsonl")
            self.summary, self.curve, self.best = kept["summary"], kept["curve"], kept["best"]
            self.seconds.update(kept["seconds_by_phase"])
            self.started -= kept["seconds"]

    def checkpoint_due(self) -> bool:
        """Every --save-every steps; with 0, so that saving takes at most CHECKPOINT_SHARE."""
        if self.config.save_every:
            return self.done % self.config.save_every == 0
        return CHECKPOINT_SHARE * (time.perf_counter() - self.saved_at) >= self.saving

    def save_checkpoint(self) -> None:
        """Writes checkpoint/step-N.pt: all that the next step depends on."""
        start = time.perf_counter()
        with timed("checkpoint"):       # closed where the disk is full, too
            state = self.weights() | {"step": self.learned, "random": self.randomness}
            resume.save(self.folder, state | {"run": self.counters()})
        self.take_seconds()
        self.saved, self.saved_at = self.learned, time.perf_counter()
        self.saving = self.saved_at - start

    def weights(self) -> dict:
        """Trained weights and optimiser state, for a checkpoint."""
        return resume.learned(self.policy, self.optimizer)

    def take_seconds(self) -> dict[str, float]:
        """Adds the seconds since the last call to the run's, and returns them by phase."""
        taken = CLOCK.take()
        for phase, seconds in taken.items():
            self.seconds[phase] += seconds
        return taken

    # --- training ---------------------------------------------------------------------------------

    def steps(self, batches, optimizer) -> Iterator[tuple[int, list]]:
        """Yields (step, samples) of each step that is still to be made; step counts from 0."""
        self.optimizer, first = optimizer, self.done
        if self.state:
            resume.restore(self)
        self.randomness = resume.random_states(self.generator)
        if not self.state:
            self.save_checkpoint()
        with tqdm(initial=first, total=self.config.steps, desc="training", unit="step") as bar:
            for step, samples in enumerate(batches):
                if step < first:
                    continue                    # a resumed run: the data starts where it stopped
                self.evaluate_midway(step)
                if step >= self.config.steps:
                    break
                self.take_seconds()
                self.step_started = time.perf_counter()
                yield step, self.share(samples)
                bar.update()

    def evaluate_midway(self, step: int) -> None:
        """With --eval-every, where it is due."""
        if step and self.config.eval_every and step % self.config.eval_every == 0:
            self.midway(str(step))

    @contextmanager
    def uninterrupted(self):
        """Around an update and its record: signals wait for the end; then a checkpoint if due."""
        with self.signals.hold():
            self.torn = True
            with timed("update"):       # `record` stops the clock: it is no part of the update
                yield
            if self.checkpoint_due():
                self.save_checkpoint()
        self.say_step()

    def record(self, episodes: list[Episode], rewards: list, advantages: torch.Tensor,
               stats: dict) -> None:
        """Writes down a step: its metrics, every episode, the first group token by token."""
        CLOCK.stop("update")
        lr = self.optimizer.adamw.param_groups[0]["lr"]
        own = episodes[:self.config.group_size] if RECORD_TOKENS else []
        logps = frozen_logp(self.policy, own, self.config.temperature, self.layout)
        tokens = [metrics.token_record(self.policy, episode, logp)
                  for episode, logp in zip(own, logps)]
        self.randomness = resume.random_states(self.generator)
        self.learned, self.torn = self.learned + 1, False
        episodes, rewards = self.gather(forget_features(episodes, self.alone)), self.gather(rewards)
        advantages = metrics.rounded(self.gather(advantages.tolist()))
        seconds = time.perf_counter() - self.step_started
        step = metrics.step_metrics(self.done + 1, episodes, rewards, stats | {"lr": lr}, seconds,
                                    self.take_seconds(), self.config.group_size)
        found = metrics.warnings_of([*self.metrics, step], self.logp_limit)
        step |= {"warnings": found} if found else {}
        self.append("metrics.jsonl", step)
        self.append_row("metrics.csv",
                        metrics.flattened(step | {"warnings": [w["name"] for w in found]}))
        self.append("episodes.jsonl", *(
            self.episode_record(f"step-{step['step']}", i, *earned, i < self.config.group_size)
            for i, earned in enumerate(zip(episodes, rewards, advantages))))
        self.append("tokens.jsonl", *(
            {"when": f"step-{step['step']}", "index": i, "sample": episodes[i].sample.id,
             "advantage": advantages[i], **record} for i, record in enumerate(tokens)))
        self.metrics.append(step)       # last: `done` counts the steps that are recorded in full

    def say_step(self) -> None:
        """What you are told after a step; and the page of the run, if it is due."""
        now, before = self.metrics[-1], self.metrics[-2:-1]
        tqdm.write(metrics.step_line(now))
        known = {w["name"] for m in before for w in m.get("warnings", ())}
        for warning in now.get("warnings", ()):
            if warning["name"] not in known:
                tqdm.write(f"! {warning['name']}: {warning['message']}")
        if self.done == 1 and (why := metrics.zero_loss_note(self.config, now)):
            tqdm.write(why)
        if self.done == 1 and self.policy.device.type == "cuda" and (plan := leaf("plan")):
            tqdm.write(plan.planned_and_measured(self.config, torch.cuda.max_memory_allocated()))
        self.refresh_report()

    # --- evaluation -------------------------------------------------------------------------------

    def evaluations(self, name: str, samples: list) -> Iterator["Evaluation"]:
        """Yields the passes over the samples that are still to be made; then records the scores."""
        if name in self.summary:
            return
        modes = ("greedy", "sampled") if self.config.eval_sampled == "on" else ("greedy",)
        passes = [Evaluation(self, name, mode, samples) for mode in modes]
        yield from passes
        summary = passes[0].scores()
        if len(passes) > 1:
            summary["sampled"] = passes[1].scores()
        with self.signals.hold():
            self.record_evaluation(name, summary, passes[0].rows if name in SHOWN else [])

    def record_evaluation(self, name: str, summary: dict, rows: list[dict]) -> None:
        """Keeps the scores and, of rows (`episode_record`s), every prediction; and best/."""
        self.take_seconds()
        self.summary[name] = metrics.rounded(summary)
        self.curve = [point for point in self.curve if point["step"] < self.done]
        self.curve.append({"step": self.done, "greedy": summary["em"],
                           "sampled": summary.get("sampled", {}).get("em")})
        self.append("evaluations.jsonl", {"step": self.done, "when": name, **self.summary[name]})
        if rows:
            self.write_json(f"predictions-{name}.json", [prediction(row) for row in rows])
            self.append("episodes.jsonl", *rows)
        for part in self.folder.glob("*.part"):
            part.unlink()
        if self.config.eval_every and name != "before":
            self.keep_best()

    def keep_best(self) -> None:
        """best/: the model of the run's highest greedy exact match; of equals, the first."""
        point = self.curve[-1]
        if self.best is None or point["greedy"] > self.best["em"]:
            self.best = {"step": point["step"], "em": point["greedy"]}

            def write(folder):
                weights.save(self.policy, folder)
                resume.write_text(folder / "best.json", json.dumps(self.best))
            resume.write_folder(self.folder / "best", write)

    # --- files ------------------------------------------------------------------------------------

    def write_json(self, name: str, value) -> None:
        """A file of the run folder, replaced as a whole."""
        resume.write_text(self.folder / name, json.dumps(value, indent=1, ensure_ascii=False))

    def append(self, name: str, *objects: dict) -> None:
        """One line of JSON for each object."""
        resume.append_lines(self.folder / name, objects)

    def append_row(self, name: str, row: dict) -> None:
        """One line of a CSV file; the first row ever written decides its columns."""
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
            small = max(image.size) <= INPUT_SIDE       # a photograph is large as PNG
            image.thumbnail((INPUT_SIDE, INPUT_SIDE))
            digest = hashlib.sha1(str(sample.image_path).encode()).hexdigest()[:12]
            name = f"images/input-{digest}{'.png' if small else '.jpg'}"
            image.convert("RGB").save(self.folder / name, quality=90)
            self.inputs[sample.image_path] = name
        return self.inputs[sample.image_path]

    def episode_record(self, when: str, i: int, episode: Episode, reward, advantage: float | None,
                       images: bool) -> dict:
        """What was shown, written and returned; with `images`, the images as files as well.

        "input" is a small copy of the sample's image. "ran" is the program that ran, where it is
        not the text as written (--crop-box question).
        """
        sample, turns = episode.sample, []
        for k, turn in enumerate(episode.turns):
            run, name = turn.execution, None
            if run is not None and run.image is not None and images:
                name = f"images/{when}-{i}-{k}.png"
                run.image.save(self.folder / name)
            ran = run is not None and turn.action.value not in turn.text
            error = str(turn.found) if isinstance(turn.found, SearchError) else None
            turns.append({"text": turn.text, "action": turn.action.kind, "finished": turn.finished,
                          "ran": turn.action.value if ran else None, "image": name,
                          "observation": turn.observation, "error": run.error if run else error})
        return {"when": when, "index": i, "sample": sample.id,
                "image": str(sample.image_path) if sample.image_path else None,
                "input": self.keep_input(sample) if sample.image_path and images else None,
                "question": sample.question, "gold": list(sample.golds),
                "problems": list(sample.problems), "split": sample.split, "turns": turns,
                "answer": episode.answer, "ended": episode.ended, "advantage": advantage,
                "reward": metrics.rounded({"total": reward.total, **reward.parts})}

    def refresh_report(self) -> None:
        """Remakes report.html during the run, so that this takes at most REPORT_SHARE."""
        start = time.perf_counter()
        if REPORT_SHARE * (start - self.shown_at) >= self.showing:
            self.write_report()
            self.shown_at = time.perf_counter()
            self.showing = self.shown_at - start

    def write_report(self) -> None:
        """report.html, where the page's leaf is there."""
        if report := leaf("report"):
            report.write(self.folder)

    # --- the end ----------------------------------------------------------------------------------

    def __enter__(self) -> "Run":
        self.held.enter_context(self.signals)
        return self

    def __exit__(self, kind, error, trace) -> bool:
        """Whatever ended the run, saves what was learned and writes the summary.

        Ctrl-C is no error: returns True. A disk that is full becomes a RunError with its cure.
        """
        self.interrupted = isinstance(error, KeyboardInterrupt)
        if self.interrupted and self.optimizer and self.learned < self.config.steps:
            tqdm.write(f"interrupted after {self.done} complete steps; saving what was learned")
        with self.held:
            try:
                with self.signals.hold():
                    self.finish()
            except OSError as problem:
                error = problem
            if isinstance(error, OSError):
                raise RunError(
                    f"{self.folder} could not be written ({error}); the last checkpoint is of step "
                    f"{self.saved}. Make room on the disk or bring the folder back, then: python "
                    f"arft.py --resume {self.folder}") from error
        return self.interrupted

    def finish(self) -> None:
        """The last checkpoint, model/, summary.json and report.html."""
        try:
            if self.optimizer and not self.torn and self.learned == self.done > self.saved:
                self.save_checkpoint()
        finally:
            if self.done and self.policy and not self.torn:
                resume.write_folder(self.folder / "model", self.save_model)
            summary = {name: self.summary[name] for name in SHOWN if name in self.summary}
            searches = {}
            if hasattr(self.search, "hits"):        # a Replay: how many were in the record
                searches = {"searches": {"hits": self.search.hits, "misses": self.search.misses}}
            self.write_json("summary.json", summary | {     # one with "after" in it is finished
                "steps": self.done, "interrupted": self.interrupted, "warnings": self.warned(),
                "seconds": round(time.perf_counter() - self.started, 1),
                "seconds_by_phase": metrics.rounded(dict(self.seconds)), "curve": self.curve,
                **searches})
            self.write_report()

    def save_model(self, folder: Path) -> None:
        """The model as a Hugging Face folder; with LoRA its adapter."""
        weights.save(self.policy, folder)

    def warned(self) -> dict[str, int]:
        """How many steps had each warning."""
        return dict(Counter(w["name"] for m in self.metrics for w in m.get("warnings", ())))

    def say_scores(self) -> int:
        """Prints the table of scores and where everything is. Returns the exit code."""
        print(files.table(self.summary))
        if warned := self.warned():
            print("warnings: " + ", ".join(f"{name} in {n} steps" for name, n in warned.items()))
        took = self.seconds.get("checkpoint", 0.0)
        print(f"{self.done} steps, {time.perf_counter() - self.started:.0f} s ({took:.1f} s of it "
              f"for checkpoints); everything is in {self.folder}")
        if self.torn:
            print("the last update was cut short, so there is no model/ of it")
        if self.interrupted:
            print(f"to continue after step {self.saved}: python arft.py --resume {self.folder}")
        return 130 if self.interrupted else 0


class Evaluation:
    """One pass over the held-out samples, batch by batch, greedy or sampled.

    What an earlier process did of the evaluation before training is on the disk and is not done
    again.
    """

    def __init__(self, run: Run, name: str, mode: str, samples: list):
        self.run, self.name, self.mode, self.samples = run, name, mode, samples
        self.temperature = 0.0 if mode == "greedy" else 1.0
        self.part = run.folder / f"{name}-{mode}.part" if name == "before" and run.alone else None
        self.rows = resume.reopen_lines(self.part) if self.part else []
        self.kept = []              # episodes that are to be gathered

    def batches(self) -> Iterator[tuple[int, list]]:
        """Yields (place of the first sample, samples) of each batch of this process."""
        own, at_once = self.run.share(range(len(self.samples))), self.run.config.eval_batch
        title = self.name if self.name in SHOWN else f"step {self.name}"
        with tqdm(total=len(own), initial=len(self.rows), desc=f"{title}, {self.mode}",
                  leave=False, unit="sample") as bar:
            for start in own[len(self.rows)::at_once]:
                samples = self.samples[start:min(start + at_once, own.stop)]
                yield start, samples
                bar.update(len(samples))
        gathered = self.run.gather(self.kept)
        self.rows += [self.row(i, episode) for i, episode in enumerate(gathered)]

    def add(self, start: int, episodes: list[Episode]) -> None:
        """Keeps what came of a batch."""
        if not self.run.alone:
            self.kept += forget_features(episodes, False)
            return
        rows = [self.row(start + i, episode) for i, episode in enumerate(episodes)]
        self.rows += rows
        if self.part:
            resume.append_lines(self.part, rows)

    def row(self, i: int, episode: Episode) -> dict:
        """What is kept of the i-th episode: its answer, or all of it."""
        if self.mode == "sampled" or self.name not in SHOWN:
            return {"answer": episode.answer, "ended": episode.ended}
        return self.run.episode_record(self.name, i, episode, self.run.reward(episode), None, True)

    def scores(self) -> dict:
        """The summary by the chosen scorer, the other's under its name, exact match by damage, and
        how many episodes ended why."""
        config, answers = self.run.config, [row["answer"] for row in self.rows]
        both = {scorer: summarize(answers, self.samples, scorer, config.task == "mat-coding")
                for scorer in SCORERS}
        summary = both.pop(config.scorer) | both
        summary["ended"] = {why: sum(row.get("ended") == why for row in self.rows)
                            for why in metrics.ENDINGS}
        if any(sample.problems for sample in self.samples):
            summary["by_problem"] = em_by_problem(answers, self.samples, config.scorer)
        return summary


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


def prediction(row: dict) -> dict:
    """An `episode_record` in the published schema: [{"id", "gt", "pred_answer"}]."""
    name = int(row["sample"]) if row["sample"].isdigit() else row["sample"]
    split = {"split": row["split"]} if row["split"] else {}
    return {"id": name, "gt": row["gold"], "pred_answer": row["answer"], **split}


def forget_features(episodes: list[Episode], keep_images: bool) -> list[Episode]:
    """Frees what the vision tower computed for the step; without keep_images, the images as well.

    Only the process that sampled an episode trains on its images: others do without.
    """
    for episode in episodes:
        for image in episode.images:
            image.features = None
    if keep_images:
        return episodes
    return [dataclasses.replace(episode, images=[], view=None) for episode in episodes]
