"""Typical wrong versions of the tasks' functions, and what the tests must say about each.

tests/test_coursework.py puts each in the place of the right one. Most are small changes of the
right code, so that the words are certain to be about that change and nothing else. Student copies
do not have this file.
"""

import inspect
import textwrap

import torch

import data.mini
import grpo
import policy
import rewards
import rollout
import tools
from extras import jail, search

MODULES = {"tools.py": tools, "rollout.py": rollout, "rewards.py": rewards, "grpo.py": grpo,
           "policy.py": policy, "extras/jail.py": jail, "extras/search.py": search,
           "data/mini.py": data.mini}


def holder(file: str, name: str):
    """The module or class that has the function, and the function's name there."""
    *classes, last = name.split(".")
    return (getattr(MODULES[file], classes[0]) if classes else MODULES[file]), last


def changed(file: str, name: str, old: str, new: str):
    """The right function with one piece of its source, below the docstring, replaced."""
    source = textwrap.dedent(inspect.getsource(getattr(*holder(file, name))))
    head, quotes, body = source.rpartition('"""')
    if body.count(old) != 1:
        raise ValueError(f"{file}:{name} has {old!r} {body.count(old)} times, not once: correct "
                         "tests/coursework/wrong.py")
    names = dict(vars(MODULES[file]))
    exec(head + quotes + body.replace(old, new), names)
    return names[name.split(".")[-1]]


# (task, file, function, piece of the right code, what replaces it, what the tests must say)
CHANGES = (
    (1, "tools.py", "parse", "str.strip)(body)", "str)(body)", "keeps the blanks"),
    (1, "tools.py", "parse", '"problem": read_labels, ', "", "labels are still one text"),
    (1, "tools.py", "parse", ', "code": read_program', "", "still has its code fence"),
    (1, "tools.py", "parse", "is_strict(turn, spans, kind, body)", "True", "strict is always True"),
    (1, "tools.py", "parse", "is_strict(turn, spans, kind, body)", "False",
     "strict is always False"),
    (1, "tools.py", "parse",
     "    if not error and not actions:\n        error =", "    if False:\n        error =",
     "must never raise"),
    (1, "tools.py", "parse", "if not value:", "if False:", "passes as an empty answer"),
    (1, "tools.py", "parse",
     'Action("malformed", None, error, False)', 'Action("malformed", None, None, False)',
     "says why"),
    (1, "tools.py", "parse", "turn[slice(*spans[kind])]", "turn", "the value is the whole turn"),
    (2, "rollout.py", "Episode.append", "[mask] * len(ids)", "[1] * len(ids)", "have mask 1"),
    (2, "rollout.py", "Episode.append", "[mask] * len(ids)", "[mask]", "one entry for each piece"),
    (2, "rollout.py", "Episode.append",
     "[mask] * len(ids)", "[mask] * (len(ids) - mask) + [0] * mask", "end of a turn is an action"),
    (2, "rollout.py", "Episode.append", "logp if mask == 1 else [0.0] * len(ids)", "logp or []",
     "all three lists"),
    (2, "rollout.py", "Episode.append", "self.images += images", "pass", "images are not kept"),
    (2, "rollout.py", "Episode.append",
     "self.ids += ids", "self.ids = ids if not self.ids else self.ids.__iadd__(ids)", "own list"),
    (2, "rollout.py", "Episode.append", "len(logp) != len(ids)", "False", "too few log-probs"),
    (2, "rollout.py", "Episode.append", "(holders > 0) != bool(images)", "False",
     "without an image"),
    (2, "rollout.py", "Episode.append",
     "    if mask == 1 and (logp", "    self.ids += ids\n    if mask == 1 and (logp",
     "prompt, turn"),
    (3, "rewards.py", "harmonic", "2 * common / (n_prediction + n_gold)", "common / n_prediction",
     "precision alone"),
    (3, "rewards.py", "harmonic", "2 * common / (n_prediction + n_gold)", "common / n_gold",
     "recall alone"),
    (3, "rewards.py", "harmonic", " if common else 0.0", "", "divide by zero"),
    (3, "rewards.py", "f1",
     "normalize(prediction, chinese), normalize(gold, chinese)", "prediction, gold",
     "not normalized"),
    (3, "rewards.py", "f1", "len(p), len(g)", "len(set(p)), len(set(g))",
     "lengths are those of the sets"),
    (3, "rewards.py", "f1",
     "len(set(p) & set(g))", "sum((Counter(p) & Counter(g)).values())",
     "counts a repeated word twice"),
    (3, "rewards.py", "tokens", " or CHINESE.search(gold)", "", "one Chinese text is enough"),
    (3, "rewards.py", "tokens", "chinese and", "", "knows no Chinese"),
    (4, "grpo.py", "group_advantages",
     "groups - groups.mean(dim=1, keepdim=True)", "groups - groups.mean()", "mean of the batch"),
    (4, "grpo.py", "group_advantages",
     "groups.std(dim=1, keepdim=True)", "groups.std()", "deviation is that of the batch"),
    (4, "grpo.py", "group_advantages",
     "groups.std(dim=1, keepdim=True)", "groups.std(dim=1, keepdim=True, correction=0)", "biased"),
    (4, "grpo.py", "group_advantages",
     "centred = centred / (groups.std(dim=1, keepdim=True) + 1e-4)", "pass", "not divided"),
    (4, "grpo.py", "group_advantages",
     "groups.std(dim=1, keepdim=True) + 1e-4", "groups.std(dim=1, keepdim=True)", "1e-4 is not"),
    (4, "grpo.py", "group_advantages",
     "groups.std(dim=1, keepdim=True) + 1e-4", "groups.std(dim=1, keepdim=True) + 1e-8", "1e-8"),
    (4, "grpo.py", "group_advantages",
     "groups.std(dim=1, keepdim=True)", "groups.var(dim=1, keepdim=True)", "variance"),
    (4, "grpo.py", "group_advantages", "centred.masked_fill(equal, 0.0)", "centred", "exact zeros"),
    (4, "grpo.py", "group_advantages", "group_size < 2 or ", "", "group of one"),
    (5, "grpo.py", "k3", "d.exp() - d - 1", "-d", "this is k1"),
    (5, "grpo.py", "k3", "d.exp() - d - 1", "d ** 2 / 2", "this is k2"),
    (5, "grpo.py", "k3", "(logp_ref - logp)", "(logp - logp_ref)", "turned round"),
    (5, "grpo.py", "k3", ".masked_fill(mask == 0, 0.0)", "", "tokens with mask 0 count"),
    (5, "grpo.py", "k3", "d.exp() - d - 1", "d.exp() - d", "last - 1 is missing"),
    (5, "grpo.py", "k3", "d.exp() - d - 1", "(d.exp() - d - 1).detach()", "has no gradient"),
    (5, "grpo.py", "_token_means",
     "(value.detach() * mask).sum() / count", "value.float().mean()", "over all positions"),
    (5, "grpo.py", "_token_means",
     "(value.detach() * mask).sum() / count", "(value * mask).sum() / mask.numel()",
     "divided by all"),
    (5, "grpo.py", "_token_means", ".clamp(min=1)", "", "divides by zero"),
    (6, "grpo.py", "clipped_objective", "torch.minimum(unclipped, bounded)", "bounded",
     "wrong way is not pulled back"),
    (6, "grpo.py", "clipped_objective", "torch.minimum(unclipped, bounded)", "unclipped",
     "nothing is clipped"),
    (6, "grpo.py", "clipped_objective",
     "torch.minimum(unclipped, bounded)", "torch.maximum(unclipped, bounded)", "the larger"),
    (6, "grpo.py", "clipped_objective", "1 + clip_high", "1 + clip_low", "one clip_low serves"),
    (6, "grpo.py", "clipped_objective", "1 - clip_low, 1 + clip_high", "clip_low, clip_high",
     "bounds themselves"),
    (6, "grpo.py", "clipped_objective", "bounded < unclipped", "bounded != unclipped",
     "every ratio outside"),
    (6, "grpo.py", "_aggregate", ").clamp(min=1)).mean()", ").clamp(min=1)).sum()",
     "take their mean"),
    (6, "grpo.py", "_aggregate",
     "(per_token.sum(1) / mask.sum(1).clamp(min=1)).mean()", "per_token.sum() / mask.sum()",
     "all tokens count"),
    (6, "grpo.py", "_aggregate", "per_token.masked_fill(mask == 0, 0.0)", "per_token * mask",
     "inf * 0 is nan"),
    (6, "grpo.py", "_aggregate", "(len(mask) * max_length)", "max_length",
     "divides by max_length alone"),
    (7, "policy.py", "Policy.positions",
     "p + max(height, width)", "p + height * width", "starts at p + rows * columns"),
    (7, "policy.py", "Policy.positions", "p + max(height, width)", "p + height",
     "starts at p + rows;"),
    (7, "policy.py", "Policy.positions", "(p, p + y, p + x)", "(p, p + x, p + y)", "exchanged"),
    (7, "policy.py", "Policy.positions", "(p, p + y, p + x)", "(p, y, x)", "count from p on"),
    (7, "policy.py", "Policy.positions",
     " // self.merge, image.grid[2] // self.merge", ", image.grid[2]", "grid counts patches"),
    (7, "policy.py", "Policy.positions", ".T.contiguous()", "", "[3, T] is asked"),
    (7, "policy.py", "Policy.positions",
     "next(pending, None) is not None or ", "", "without placeholders must be refused"),
    (8, "extras/jail.py", "limit_resources", '"CPU": cpu, ', "", "no limit of processor time"),
    (8, "extras/jail.py", "limit_resources", 'value + (name == "CPU")', "value", "soft and hard"),
    (8, "extras/jail.py", "limit_resources", "math.ceil(jail.seconds) + 1", "int(jail.seconds) + 1",
     "rounded down"),
    (8, "extras/jail.py", "limit_resources", ', "NPROC": 0', "", "processes could be started"),
    (8, "extras/jail.py", "limit_resources", '"CORE": 0, ', "", "a crash would leave"),
    (8, "extras/jail.py", "limit_resources",
     "used + (jail.memory_mb << 20)", "jail.memory_mb << 20", "interpreter has already"),
    (8, "extras/jail.py", "limit_resources", "jail.memory_mb << 20", "jail.memory_mb",
     "taken as bytes"),
    (9, "extras/search.py", "Replay.search", "if row is not None:", "if False:",
     "asks the engine again"),
    (9, "extras/search.py", "Replay.search", "k = ?", "? > 0", "k is not part"),
    (9, "extras/search.py", "Replay.search",
     "AND backend = coalesce(?, backend)", "AND ? = ?3", "one engine's passages"),
    (9, "extras/search.py", "Replay.search", "backend = coalesce(?, backend)", "backend = ?",
     "record of any back end counts"),
    (9, "extras/search.py", "Replay.search",
     'raise SearchError("this query is not in the record")', "return []", "not an empty list"),
    (9, "extras/search.py", "Replay.search",
     "self.hits + (row is not None), self.misses + (row is None)", "0, 0", "are not counted"),
    (9, "extras/search.py", "Replay.search",
     "[Passage(*passage) for passage in json.loads(row[0])]", "json.loads(row[0])",
     "must give Passage objects"),
    (9, "extras/search.py", "Replay.search", "with self._lock, self.db:", "with self._lock:",
     "never committed"),
    (10, "data/mini.py", "noise", "< 0.8", "< 0.2", "share is turned round"),
    (10, "data/mini.py", "noise", "pixels.shape[:2]", "pixels.shape", "each channel"),
    (10, "data/mini.py", "noise", ".copy()", "", "copy it first"),
    (10, "data/mini.py", "noise", "= 255", "= 0", "turn black"),
    (10, "data/mini.py", "noise", "rng.random", "np.random.default_rng(0).random",
     "every picture has the same noise"),
    (10, "rewards.py", "problem_reward", "set(stated) == set(gold)", "stated == gold",
     "compare sets"),
    (10, "rewards.py", "problem_reward",
     "set(stated) == set(gold)", "set(stated) & set(gold)", "naming one right problem"),
    (10, "rewards.py", "problem_reward", "if not stated:", "if False:", "no diagnosis"),
    (10, "rewards.py", "problem_reward", "rotation_credit and ", "", "half is given"),
    (10, "rewards.py", "problem_reward", "0.5 if rotation_credit", "0.0 if rotation_credit",
     "gives nothing"),
)


# Wrong as a whole, not by one change.

def over_the_batch(rewards, group_size, scale="group"):
    return (rewards - rewards.mean()) / (rewards.std() + 1e-4)


def interleaved(rewards, group_size, scale="group"):
    groups = rewards.view(group_size, -1)
    return ((groups - groups.mean(0)) / (groups.std(0) + 1e-4)).reshape(-1)


def raw_rewards(rewards, group_size, scale="group"):
    groups = rewards.view(-1, group_size)
    return (groups / (groups.std(1, keepdim=True) + 1e-4)).view(-1)


def flat_positions(self, ids, images):
    return torch.arange(len(ids)).expand(3, -1)


def seen_by_set(prediction, gold, chinese=True):
    p, g = rewards.normalize(prediction).split(), rewards.normalize(gold).split()
    common = sum(word in g for word in p)
    return 2 * common / (len(p) + len(g)) if p else 0.0


def nothing(*arguments):
    return None


WHOLE = (
    (4, "grpo.py", "group_advantages", over_the_batch, "over the batch, not over each group of G"),
    (4, "grpo.py", "group_advantages", interleaved, "interleaved"),
    (4, "grpo.py", "group_advantages", raw_rewards, "mean of the group is not taken off"),
    (7, "policy.py", "Policy.positions", flat_positions, "numbered like text"),
    (3, "rewards.py", "f1", seen_by_set, "found twice"),
    (8, "extras/jail.py", "limit_resources", nothing, "no limit of processor time"),
)
