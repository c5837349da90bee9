"""The numbers of a step: its line of metrics.jsonl, its line on the screen, what goes wrong in it.

You read here what each number means. `warnings_of` looks at the numbers of all steps and names what
goes wrong, with the option that helps; `step_line` is what you see while a run trains;
`token_record` is one episode token by token, for the report and for --show-episode.
"""

import json
import textwrap

import numpy as np
import torch

from policy import Policy
from rollout import Episode
from tools import SearchError

LINE = 80               # columns of a step's line on the screen
# What Episode.ended may be, and what a step's line says of it.
ENDINGS = {"answer": "", "cut": "cut off", "turns": "out of turns", "length": "too long"}


def rounded(value, digits: int = 6):
    """Numbers with six significant digits, inside dictionaries and lists as well."""
    if isinstance(value, dict):
        return {k: rounded(v, digits) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(v, digits) for v in value]
    return float(f"{value:.{digits}g}") if isinstance(value, float) else value


def flattened(values: dict, prefix: str = "") -> dict:
    """Nested dictionaries as one row of a table; lists become JSON.

    >>> flattened({"step": 1, "seconds_by_phase": {"decode": 0.5}, "warnings": []})
    {'step': 1, 'seconds_by_phase.decode': 0.5, 'warnings': '[]'}
    """
    row = {}
    for name, value in values.items():
        if isinstance(value, dict):
            row |= flattened(value, f"{prefix}{name}.")
        else:
            row[prefix + name] = json.dumps(value) if isinstance(value, list) else value
    return row


# --- a step ---------------------------------------------------------------------------------------


def step_metrics(step: int, episodes: list[Episode], rewards: list, stats: dict,
                 seconds: float, phases: dict[str, float], group_size: int) -> dict:
    """One line of metrics.jsonl. stats: what grpo.update returned; phases: seconds by phase."""
    totals = torch.tensor([reward.total for reward in rewards])                     # [N]
    groups = totals.view(-1, group_size)                                            # [N / G, G]
    sampled = sum(sum(e.mask) for e in episodes)
    sampling = sum(v for k, v in phases.items() if k != "update")
    return rounded({
        "step": step, "reward_mean": totals.mean().item(), "reward_std": totals.std().item(),
        **reward_parts(rewards), "groups": len(groups), "group_std": groups.std(1).mean().item(),
        "zero_variance": (groups.max(1).values == groups.min(1).values).float().mean().item(),
        **stats, **tool_counts(episodes),
        "ended": {why: sum(e.ended == why for e in episodes) for why in ENDINGS},
        "turns": sum(len(e.turns) for e in episodes) / len(episodes),
        "tokens": sampled / len(episodes), "tokens_per_second": sampled / max(sampling, 1e-9),
        "seconds": seconds, "seconds_by_phase": phases})


def reward_parts(rewards: list) -> dict[str, float]:
    """The mean of each part of the reward over the episodes that have it.

    answer, format, problem and em are always there (0 where no episode has them), others where one
    episode has them.
    """
    names = dict.fromkeys(("answer", "format", "problem", "em"))
    names |= dict.fromkeys(name for reward in rewards for name in reward.parts)
    known = {name: [r.parts[name] for r in rewards if name in r.parts] for name in names}
    return {name: float(np.mean(values)) if values else 0.0 for name, values in known.items()}


def tool_counts(episodes: list[Episode]) -> dict[str, int]:
    """How many programs and searches there were, and how many of them failed."""
    turns = [turn for episode in episodes for turn in episode.turns]
    runs = [turn.execution for turn in turns if turn.execution is not None]
    found = [turn.found for turn in turns if turn.found is not None]
    failed = sum(run.image is None for run in runs)
    failed += sum(isinstance(result, SearchError) for result in found)
    return {"tool_calls": len(runs) + len(found), "searches": len(found), "tool_failures": failed}


def step_line(m: dict) -> str:
    """A step's line on the screen, in at most LINE columns.

    The least important numbers give way first. Step, reward, EM, failed tools, endings other than
    an answer and warnings never do; those that do not fit begin another line.
    """
    always = 9
    part = "query" if "query" in m else "problem"
    ended = [f"  {ENDINGS[why]} {n}" for why, n in m.get("ended", {}).items()
             if n and why != "answer"]
    equal = round(m["zero_variance"] * m["groups"])
    warned = [w["name"] for w in m.get("warnings", ())]
    parts = [(always, f"step {m['step']:4d}  reward {m['reward_mean']:.2f}  EM {m['em']:.2f}"),
             (4, f"  {part} {m[part]:.2f}"), (3, f"  KL {m['kl'] or 0:.3f}"),
             (2, f"  entropy {m['entropy'] or 0:.2f}"), (6, f"  tools {m['tool_calls']}"),
             (always, f"  failed {m['tool_failures']}" if m["tool_failures"] else ""),
             *((always, text) for text in ended),
             (1, f"  zero-variance {equal}" if equal else ""), (5, f"  {m['seconds']:.1f} s"),
             (always, f"  ! {' '.join(warned)}" if warned else "")]
    while sum(len(text) for _, text in parts) > LINE and min(parts)[0] < always:
        parts.remove(min(parts))
    lines = [""]
    for _, text in parts:
        if len(lines[-1] + text) > LINE:
            lines.append(" " * 7)
        lines[-1] += text
    return "\n".join(lines)


def zero_loss_note(config, m: dict) -> str | None:
    """Why the first step's loss is about zero and its gradient is not; None where it is not so.

    It is so where every episode weighs the same and enters by its ratio: loss types grpo and gspo.
    dapo and dr_grpo weigh an episode by its length; cispo multiplies the advantage with logp, not
    with the ratio. Where no group has unequal rewards, there is no gradient either. m: the step's
    line of metrics.
    """
    if config.loss_type not in ("grpo", "gspo") or not m["updates"] or m["zero_variance"] == 1:
        return None
    updates, printed = config.inner_epochs * config.minibatches, ""
    if updates > 1:
        printed = f" (you see the mean of the step's {updates} updates, in which the ratio moves)"
    return textwrap.fill(
        f"loss {m['loss']:.4f}, gradient norm {m['grad_norm']:.2f}: before the first update every "
        "ratio is 1 and a group's advantages sum to zero, so the loss of the step's episodes is "
        f"about zero{printed}. Its gradient is not: it is that of A * logp. Watch the reward, not "
        "the loss.", LINE, initial_indent=" " * 8, subsequent_indent=" " * 8)


# --- what goes wrong ------------------------------------------------------------------------------

WINDOW = 3                  # steps: one odd step is noise, three in a row are not
KL_HIGH = 0.5               # nats a token: five times the README's good runs, half of its bad run
ENTROPY_LEFT = 0.1          # share of the first steps' entropy; good runs halve it
TOOLS_LEFT = 0.05           # share of the most tool calls that there were
ENDED_BADLY = 0.05          # share of the last steps' episodes; those of a good run find room
LOGP_ERROR_FLOAT32 = 1e-2   # a hundred times what law 2 allows
LOGP_ERROR_BFLOAT16 = 0.5   # rounds a logit of 16 to 32 by up to 0.06, in many layers, twice


def warnings_of(metrics: list[dict], logp_limit: float = LOGP_ERROR_FLOAT32) -> list[dict]:
    """What goes wrong in the last of these steps (lines of metrics.jsonl).

    Returns [{"name", "message", "option"}]. A reward that is not a finite number is not among them:
    it stops the run and names the sample (arft.reward_of).

    >>> equal = {"zero_variance": 1.0, "kl": None, "entropy": None, "tool_calls": 5}
    >>> [[w["name"] for w in warnings_of([equal] * n)] for n in (1, 2, 3)]
    [[], [], ['zero-variance']]
    """
    found = [*update_warnings(metrics), *drift_warnings(metrics), *ending_warnings(metrics)]
    error = metrics[-1].get("logp_error") or 0
    if error > logp_limit:
        found.append(("logp", "--device", (
            f"the trainer scores other tokens than were sampled (log-probs differ by {error:.2g})."
            " If --device cpu does it as well, it is a bug and not a setting: run the tests")))
    return [dict(zip(("name", "option", "message"), warning)) for warning in found]


def update_warnings(metrics: list[dict]):
    """Updates that were skipped, and steps that teach nothing: (name, option, message)."""
    skipped = metrics[-1].get("skipped_updates")
    if skipped:
        yield "grad", "--lr", (f"{skipped} updates were skipped because loss or gradient is not a "
                               "finite number. Lower --lr")
    if len(metrics) >= WINDOW and all(m["zero_variance"] == 1 for m in metrics[-WINDOW:]):
        yield "zero-variance", "--samples-per-step", (
            f"for {WINDOW} steps every group has equal rewards, so nothing is learned. Raise "
            "--samples-per-step, --group-size or --temperature")


def drift_warnings(metrics: list[dict]):
    """A policy that runs away, loses its entropy or its tools: (name, option, message)."""
    def series(key: str) -> list[float]:        # without None: those steps had no update
        return [m[key] for m in metrics if m.get(key) is not None]

    now, kl, entropy, calls = metrics[-1], series("kl"), series("entropy"), series("tool_calls")
    if now.get("kl") is not None and len(kl) >= WINDOW and min(kl[-WINDOW:]) > KL_HIGH:
        yield "KL", "--beta", (f"the policy runs away from where it began (KL over {KL_HIGH} for "
                               f"{WINDOW} steps). Lower --lr or raise --beta")
    enough = len(entropy) > WINDOW and now["entropy"] is not None
    if enough and mean(entropy[-WINDOW:]) < ENTROPY_LEFT * mean(entropy[:WINDOW]):
        yield "entropy", "--clip-high", (
            f"the entropy is under {ENTROPY_LEFT:.0%} of the first steps': all episodes become "
            "alike. Raise --clip-high or --beta, or lower --lr")
    most = max((mean(calls[i:i + WINDOW]) for i in range(len(calls) - WINDOW)), default=0)
    if mean(calls[-WINDOW:]) < TOOLS_LEFT * most:
        yield "tools", "--beta", (f"the policy makes under {TOOLS_LEFT:.0%} of the tool calls that "
                                  "it made before. Raise --beta or lower --lr")


def ending_warnings(metrics: list[dict]):
    """Episodes that had no room to answer in the last WINDOW steps: (name, option, message)."""
    last = [m["ended"] for m in metrics[-WINDOW:] if "ended" in m]
    total = sum(sum(ended.values()) for ended in last)
    reasons = {"length": ("--max-length", "the next observation did not fit"),
               "cut": ("--max-new-tokens", "a turn was cut off before the model had ended it")}
    for why, (option, reason) in reasons.items():
        share = sum(ended[why] for ended in last) / max(total, 1)
        if share > ENDED_BADLY:
            yield why, option, (f"{share:.0%} of the last steps' episodes ended without an answer, "
                                f"because {reason}. Raise {option}")


def mean(values: list[float]) -> float:
    """The arithmetic mean."""
    return sum(values) / len(values)


# --- an episode, token by token -------------------------------------------------------------------


def byte_table() -> dict[str, int]:
    """The character that stands for each byte in a byte-level vocabulary (GPT-2's, Qwen's).

    Printable bytes stand for themselves, the others for the characters from 256 on.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


BYTES = byte_table()


def token_text(tokenizer, token_id: int) -> str:
    """One token as text, for people only. Bytes that are no UTF-8 by themselves become \\x.."""
    if token_id in tokenizer.added_tokens_decoder:
        return tokenizer.added_tokens_decoder[token_id].content
    token = tokenizer.convert_ids_to_tokens(token_id)
    return bytes(BYTES[c] for c in token).decode("utf-8", errors="backslashreplace")


def token_record(policy: Policy, episode: Episode, logp: torch.Tensor) -> dict:
    """An episode token by token: equally long lists, and strings of one letter a token.

    tokens: text; count: 1, or how many equal image placeholders one entry stands for; roles: p
    prompt, m model, t tool (all that the environment wrote after the prompt); mask; logp_old: at
    sampling; logp [T]: after the update. Both are 0 where the mask is 0.
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
