"""The report: report.html, and one episode token by token, from the files of a run folder.

What it teaches: what there is to look at in such a run. Curves say that something was learned,
episodes say what; and one episode as a table of tokens (`show_episode`) is GRPO itself: which
ids the policy sampled, how likely each was then and is after the update, and the advantage that
moved it. No model is needed here, only what record.py wrote.

Two rules hold. What a model wrote is hostile text: it reaches the page only through jinja2's
escaping, and what would disturb the reader (control characters, reversed writing) is shown as
an escape. The page is one file without network of at most LIMIT bytes: of a long run it shows
a part, evenly spread, and says what was left out.

Read next: report.html and episode.html, the templates. Left out: several runs in one page.
"""

import base64
import io
import json
import math
import os
import re
from collections import defaultdict
from itertools import groupby
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

SCORERS = ("official", "repaired")
LIMIT = 10_000_000          # bytes of the page
# bytes: held-out samples; these and training episodes together
FOR_EVALUATIONS, FOR_EPISODES = 4_500_000, 9_000_000
IMAGE_SIDE = 320            # pixels, at most, of an image in the page
TEXT_LIMIT = 20_000         # characters of one text in the page
CURVE_POINTS = 500          # of one line; a longer run is averaged
ROLES = {"p": "prompt", "m": "model", "t": "tool"}


class ReportError(ValueError):
    """A folder that cannot be reported on; the message says what is missing and what would do."""


# --- tables of scores -----------------------------------------------------------------------------

HEADER = f"{'':22}{'n':>6}  {'EM %':>6} {'[95%]':>16}  {'F1 %':>6} {'[95%]':>16}"


def score_row(name: str, s: dict) -> str:
    """One line under HEADER, in percent with two digits, as the paper prints them."""
    line = f"{name:22}{s['n']:6d}  {100 * s['em']:6.2f}"
    if "em_ci95" in s:
        low, high, flow, fhigh = (100 * v for v in (*s["em_ci95"], *s["f1_ci95"]))
        line += f" [{low:6.2f}, {high:6.2f}]  {100 * s['f1']:6.2f} [{flow:6.2f}, {fhigh:6.2f}]"
    return line


def score_rows(summary: dict) -> list[tuple[str, dict]]:
    """Before and after, greedy and sampled, by split and by both scorers:
    (name, scores); parts are indented."""
    rows = []
    for when in ("before", "after"):
        if when in summary:
            scores = summary[when]
            rows.append((f"{when}, greedy", scores))
            rows += [(f"  {split}", part) for split, part in scores.get("splits", {}).items()]
            if "damaged" in scores.get("by_problem", {}):
                rows.append(("  damaged images", scores["by_problem"]["damaged"]))
            rows += [(f"  {name} scorer", scores[name]) for name in SCORERS if name in scores]
            rows += [(f"{when}, sampled", scores["sampled"])] if "sampled" in scores else []
    return rows


def table(summary: dict) -> str:
    """`score_rows` for the terminal."""
    return "\n".join([HEADER, *(score_row(name, scores) for name, scores in score_rows(summary))])


# --- reading a run folder -------------------------------------------------------------------------


def read_json(path: Path) -> dict:
    """The object in a file, {} where there is none or a killed run left a part of one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def read_lines(path: Path):
    """(offset in bytes, object) of each line of a .jsonl file; nothing where there is no file.

    A line that a killed run left half-written is passed over.
    """
    if not path.exists():
        return
    offset = 0
    with open(path, "rb") as file:
        for line in file:
            try:
                value = json.loads(line)
            except ValueError:
                value = None
            if isinstance(value, dict):
                yield offset, value
            offset += len(line)


def read_at(path: Path, offset: int) -> dict:
    with open(path, "rb") as file:
        file.seek(offset)
        return json.loads(file.readline())


def open_run(folder: str | Path) -> Path:
    """The folder, if a run wrote it."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ReportError(f"{folder} is not a folder; name one that a run wrote (its --out)")
    if not read_json(folder / "config.json"):
        raise ReportError(
            f"{folder} has no readable config.json; name a folder that a run wrote (its --out)")
    return folder


# --- text that is safe to look at -----------------------------------------------------------------

# Control characters but line break and tab, line and paragraph separators, marks of writing
# direction, surrogates.
DISTURBING = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")

PYTHON = re.compile(r"""
    (?P<comment>\#[^\n]*)
  | (?P<string>\"{3}[\s\S]*?(?:\"{3}|\Z) | '{3}[\s\S]*?(?:'{3}|\Z) | "(?:\\.|[^"\\\n])*"? | '(?:\\.|[^'\\\n])*'?)
  | (?P<number>\b\d[\w.]*)
  | (?P<keyword>\b(?:and|as|assert|break|class|continue|def|del|elif|else|except|finally|for|from|global|if|import|in|is|
        lambda|None|not|or|pass|raise|return|True|False|try|while|with|yield)\b)
  | (?P<name>\w+)""", re.VERBOSE)
TAG = re.compile(r"(</?(?:think|problem|code|search|answer)>|<\|im_end\|>)")


def visible(text: str) -> str:
    """The text with escapes in place of what is invisible or disturbs its neighbours.

    >>> visible("a\\x1b[31m\\tb\\u202ec")
    'a\\\\x1b[31m\\tb\\\\u202ec'
    """
    def escape(match) -> str:
        code = ord(match[0])
        return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"
    return DISTURBING.sub(escape, text)


def shown(text: str | None) -> str | None:
    """The text, if it is not longer than a page can bear; else its beginning."""
    if text is None or len(text) <= TEXT_LIMIT:
        return text
    return text[
        :TEXT_LIMIT] + f" ... ({len(text) - TEXT_LIMIT:,} more characters are in the run folder)"


def templates() -> Environment:
    """The one way into the page: whatever a template prints is first made
    `visible`, then escaped."""
    def finalize(value):
        return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value
    return Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True,
                       finalize=finalize,
                       undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)


def highlight(text: str) -> list[tuple[str, str]]:
    """The text of a turn as (kind, piece): the protocol's tags, and Python between <code> and
    </code>.

    >>> highlight("<code>x = 1 # one</code>")[1:]
    [('', 'x = '), ('number', '1'), ('', ' '), ('comment', '# one'), ('tag', '</code>')]
    """
    pieces, in_code = [], False
    for part in TAG.split(text):
        if TAG.fullmatch(part):
            pieces.append(("tag", part))
            in_code = part == "<code>"
        elif in_code:
            end = 0
            for match in PYTHON.finditer(part):
                kind = "" if match.lastgroup == "name" else match.lastgroup
                pieces += [("", part[end:match.start()]), (kind, match[0])]
                end = match.end()
            pieces.append(("", part[end:]))
        else:
            pieces.append(("", part))
    joined = groupby((piece for piece in pieces if piece[1]), key=lambda piece: piece[0])
    return [(kind, "".join(text for _, text in group)) for kind, group in joined]


def cut(pieces: list[tuple[str, str]], widths: list[int]) -> list[list[tuple[str, str]]]:
    """Cuts pieces at the ends of tokens: for each width, the pieces of so many characters.

    >>> cut([("a", "xyz"), ("", "!")], [2, 2])
    [[('a', 'xy')], [('a', 'z'), ('', '!')]]
    """
    tokens, queue = [], [piece for piece in reversed(pieces)]
    for width in widths:
        token = []
        while width and queue:
            kind, text = queue.pop()
            token.append((kind, text[:width]))
            if len(text) > width:
                queue.append((kind, text[width:]))
            width -= len(token[-1][1])
        tokens.append(token)
    return tokens


# --- curves ---------------------------------------------------------------------------------------


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """At most `most` round numbers from `low` on, which end at or above `high`.

    >>> ticks(0, 2.85), ticks(1, 70)
    ([0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0], [0.0, 20.0, 40.0, 60.0, 80.0])
    """
    span = max(high - low, 1e-9)
    power = 10.0 ** math.floor(math.log10(span / most))
    step = next(m * power for m in (1, 2, 5, 10) if span / (m * power) <= most)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(k * step, 10) for k in range(first, max(last, first + 1) + 1)]


def thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most CURVE_POINTS points, each the mean of as many neighbours."""
    k = math.ceil(len(points) / CURVE_POINTS)
    parts = [points[i:i + k] for i in range(0, len(points), max(k, 1))]
    return [tuple(sum(values) / len(part) for values in zip(*part)) for part in parts]


def chart(title: str, unit: str, series: list[tuple[str, str, list]],
          top: float | None = None) -> dict | None:
    """A drawing for the template; None if there is nothing to draw.

    series: (name, kind, [(step, value)]); the kinds are "line", "points" and "parts" (small
    points). Values that are missing or not finite are gaps. Coordinates are those of a 480 x 260
    picture.
    """
    series = [(name, kind, [(x, y) for x, y in points if y is not None and math.isfinite(y)])
              for name, kind, points in series]
    series = [(name, kind, thinned(points) if kind == "line" else points) for name, kind,
              points in series if points]
    if not series:
        return None
    xs, ys = ([p[axis] for _, _, points in series for p in points] for axis in (0, 1))
    x_ticks = ticks(min(0, *xs), max(1, *xs))
    y_ticks = ticks(min(0.0, *ys), top if top is not None else max(1e-3, *ys))
    x_end = max(1, *xs)

    def place(x: float, y: float) -> tuple[float, float]:
        share_x, share_y = x / x_end, (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return round(46 + 420 * share_x, 1), round(220 - 190 * share_y, 1)
    return {"title": title, "unit": unit,
            "x_ticks": [(place(x, 0)[0], f"{x:g}") for x in x_ticks if x <= x_end],
            "y_ticks": [(place(0, y)[1], f"{y:g}") for y in y_ticks],
            "series": [{"name": name, "kind": kind, "colour": i,
                        "points": [place(*p) for p in points]}
                       for i, (name, kind, points) in enumerate(series)]}


def charts(metrics: list[dict], evaluations: list[dict]) -> list[dict]:
    """Reward and exact match with their parts; KL and entropy; loss and gradient."""
    def of(name: str, factor: float = 1.0) -> list:
        return [(m["step"], None if m.get(name) is None else factor * m[name]) for m in metrics]

    def held_out(value) -> list:
        return [(e["step"], 100 * score) for e in evaluations if (score := value(e)) is not None]
    splits = sorted({split for e in evaluations for split in e.get("splits", {})})
    drawn = [
        chart("Reward", "mean of a step's episodes, points", [
            ("reward", "line", of("reward_mean")),
            *((name, "line", of(name)) for name in ("answer", "format", "problem", "accuracy"))]),
        chart("Exact match", "percent", [
            ("training, sampled", "line", of("em", 100.0)),
            ("held out, greedy", "points", held_out(lambda e: e["em"])),
            ("held out, sampled", "points", held_out(lambda e: e.get("sampled", {}).get("em"))),
            *((f"greedy, {split}", "parts",
               held_out(lambda e, split=split: e.get("splits", {}).get(split, {}).get("em")))
              for split in splits[:3] if len(splits) > 1)], top=100),
        chart("KL and entropy", "nats a token", [("KL to the reference", "line", of("kl")),
                                                 ("entropy", "line", of("entropy"))]),
        chart("Loss and gradient", "no unit",
              [("gradient norm", "line", of("grad_norm")), ("loss", "line", of("loss"))])]
    return [picture for picture in drawn if picture]


# --- episodes -------------------------------------------------------------------------------------


def shade(value: float, bounds: tuple[float, ...]) -> str:
    """A class of the style sheet: "u" above zero, "d" below, with a number from 1 (pale) to 4; ""
    near zero.

    >>> shade(0.3, (0.01, 0.5, 1, 1.5)), shade(-2, (0.01, 0.5, 1, 1.5)), shade(0.0, (0.01, 0.5, 1, 1.5))
    ('u1', 'd4', '')
    """
    level = sum(abs(value) >= bound for bound in bounds)
    return f"{'u' if value > 0 else 'd'}{level}" if level else ""


ADVANTAGES = (0.01, 0.5, 1.0, 1.5)
LOG_RATIOS = (0.01, 0.05, 0.1823, 0.5)       # the third is log 1.2, where the default clip acts


def turn_tokens(tokens: dict) -> list[list[int]]:
    """For each turn, which entries of the record are its tokens."""
    runs = groupby(range(len(tokens["roles"])), key=lambda t: tokens["roles"][t])
    return [list(run) for role, run in runs if role == "m"]


def shaded_text(tokens: dict, entries: list[int]) -> list[dict]:
    """A turn's tokens for the template: pieces of highlighted text, the
    ratio's shade, what the pointer shows."""
    texts = [tokens["tokens"][t] for t in entries]
    pieces, spans = cut(highlight("".join(texts)), [len(text) for text in texts]), []
    for t, parts in zip(entries, pieces):
        old, new = tokens["logp_old"][t], tokens["logp"][t]
        tip = f"ratio {math.exp(min(new - old, 99)):.3f}, log-prob {old:.3f} -> {new:.3f}"
        # most tokens: the page has room for others
        near_certain = abs(new - old) < LOG_RATIOS[0] and old > -0.01
        spans.append({"shade": shade(new - old, LOG_RATIOS), "tip": None if near_certain else tip,
                      "parts": parts})
    return spans


def episode_view(record: dict, tokens: dict | None, album: "Album") -> dict:
    """One line of episodes.jsonl, and its line of tokens.jsonl, as the template needs it."""
    entries = turn_tokens(tokens) if tokens else []
    image, turns = album.key(record.get("input")), []
    for k, turn in enumerate(record["turns"]):
        text = shown(turn["text"])
        out = album.key(turn["image"])
        with_tokens = len(entries) == len(record["turns"]) and len(turn["text"]) <= TEXT_LIMIT
        turns.append({
            "action": turn["action"], "finished": turn["finished"], "image_in": image,
            "image_out": out,
            "spans": shaded_text(tokens, entries[k]) if with_tokens else
                     [{"shade": "", "tip": None, "parts": highlight(text)}],
            "ran": highlight(f"<code>{shown(turn['ran'])}</code>")[1:-1] if turn.get("ran")
            else None,
            "observation": shown(turn["observation"]), "error": shown(turn.get("error"))})
        image = out or image
    reward = record["reward"]
    parts = [(name, value) for name,
             value in reward.items() if name not in ("total", "em") and value is not None]
    advantage = record.get("advantage")
    return {"turns": turns, "input": album.key(record.get("input")), "total": reward["total"],
            "parts": parts,
            "right": bool(reward.get("em") if reward.get("accuracy") is None else reward["accuracy"]
                          == 1),
            "answer": shown(record["answer"]), "ended": record["ended"],
            "advantage": advantage, "shade": shade(advantage or 0.0, ADVANTAGES),
            "index": record.get("index", 0)}


class Album:
    """The images of the page, each embedded once, however often it is shown."""

    def __init__(self, folder: Path):
        self.folder, self.keys, self.images, self.size = folder.resolve(), {}, [], 0

    def key(self, name: str | None) -> int | None:
        """The number of an image file of the run folder; None if there is none
        or it cannot be read."""
        if name is not None and name not in self.keys:
            self.keys[name] = self.add(name)
        return self.keys.get(name)

    def add(self, name: str) -> int | None:
        path = (self.folder / name).resolve()
        # a folder from elsewhere must not embed this machine's files
        if not path.is_relative_to(self.folder):
            return None
        try:
            with Image.open(path) as image:
                image = image.convert("RGB")
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            return None         # half-written when the run was killed
        image.thumbnail((IMAGE_SIDE, IMAGE_SIDE))
        files = {kind: io.BytesIO() for kind in ("png", "jpeg")}
        for kind, file in files.items():
            image.save(file, kind, quality=85)
        kind, data = min(((kind, file.getvalue()) for kind, file in files.items()),
                         key=lambda pair: len(pair[1]))
        self.images.append({"data": f"data:image/{kind};base64,{base64.b64encode(data).decode()}",
                            "width": image.width, "height": image.height})
        self.size += len(self.images[-1]["data"]) + 80
        return len(self.images) - 1

    def shrink(self, length: int) -> None:
        """Forgets all images from number `length` on."""
        self.size -= sum(len(image["data"]) + 80 for image in self.images[length:])
        self.images = self.images[:length]
        self.keys = {name: key for name, key in self.keys.items() if key is None or key < length}


# --- which episodes -------------------------------------------------------------------------------


def spread(things: list) -> list:
    """The first, the last, then the others in an order whose every beginning
    is spread evenly (golden ratio)."""
    ends = things[:1] + things[:0:-1][:1]
    middle = sorted(range(1, len(things) - 1), key=lambda i: i * 0.6180339887498949 % 1)
    return ends + [things[i] for i in middle]


def index_episodes(folder: Path) -> tuple[dict, dict]:
    """Where episodes.jsonl has what the page shows, as offsets in bytes: of the evaluations
    {sample's place: {"before": offset, "after": offset}}, of each step's first group {step:
    [(index, offset), ...]}. Of two lines for one place (a run that was resumed) the later one
    counts."""
    group = read_json(folder / "config.json").get("group_size", 8)
    held_out, steps, counters = defaultdict(dict), defaultdict(dict), defaultdict(int)
    for offset, record in read_lines(folder / "episodes.jsonl"):
        when = record.get("when", "")
        index = record.get("index", counters[when])
        counters[when] += 1
        if when in ("before", "after"):
            held_out[index][when] = offset
        elif index < group and when.removeprefix("step-").isdecimal():
            steps[int(when.removeprefix("step-"))][index] = offset
    return dict(sorted(held_out.items())), {step: sorted(steps[step].items())
                                            for step in sorted(steps)}


def held_out_case(folder: Path, place: int, offsets: dict, album: Album) -> dict:
    """The episodes before and after training of one held-out sample."""
    records = {when: read_at(folder / "episodes.jsonl", offsets[when])
               for when in ("before", "after") if when in offsets}
    views = {when: episode_view(record, None, album) for when, record in records.items()}
    right = [view["right"] for view in views.values()]
    result = ["right" if right[-1] else "wrong"]
    if len(right) == 2 and right[0] != right[1]:
        result.append("became right" if right[1] else "became wrong")
    return case_of(next(iter(records.values())), "held out", result, views)


def step_cases(folder: Path, step: int, offsets: list, tokens: dict, album: Album) -> list[dict]:
    """The first group of a step, an episode each."""
    cases = []
    for index, offset in offsets:
        record = read_at(folder / "episodes.jsonl", offset)
        where = tokens.get((f"step-{step}", index))
        view = episode_view(record,
                            None if where is None else read_at(folder / "tokens.jsonl", where),
                            album)
        cases.append(case_of(record, str(step), ["right" if view["right"] else "wrong"],
                             {f"episode {index + 1}": view}))
    return cases


def case_of(record: dict, step: str, result: list[str], views: dict) -> dict:
    return {"sample": shown(str(record["sample"])), "question": shown(record["question"]),
            "step": step, "result": result,
            "gold": [shown(str(gold)) for gold in record["gold"]][:20], "views": views,
            "problems": [shown(p) for p in record["problems"]],
            "split": shown(record["split"] or "")}


def choose(render_case, makers: list, album: Album, budget: int) -> tuple[list[str], int,
        list[dict]]:
    """Renders what fits into `budget` bytes. makers: (place, function that makes cases). Returns
    (cases in the order of their places, bytes used, what the filters can choose from)."""
    kept, used, facts = {}, 0, []
    for place, make in spread(makers):
        before, images = album.size, len(album.images)
        cases = make()
        pages = [render_case(case) for case in cases]
        cost = sum(len(page.encode()) for page in pages) + album.size - before
        if used + cost > budget:
            album.shrink(images)
            continue
        used += cost
        kept[place] = pages
        facts += [{name: case[name] for name in ("step", "result", "split", "problems")}
                  for case in cases]
    return [page for place in sorted(kept) for page in kept[place]], used, facts


# --- the page -------------------------------------------------------------------------------------


def write(folder: str | Path) -> Path:
    """Makes report.html of a run folder, whole or not at all. Returns its
    path. Raises ReportError."""
    folder = open_run(folder)
    page = render(folder)
    new = folder / "report.html.new"
    new.write_text(page, encoding="utf-8")
    os.replace(new, folder / "report.html")
    return folder / "report.html"


def render(folder: Path) -> str:
    """The page as text. Whatever a run has not written yet is left out of it."""
    environment = templates()
    config, summary = read_json(folder / "config.json"), read_json(folder / "summary.json")
    metrics = [m for _, m in read_lines(folder / "metrics.jsonl")]
    evaluations = read_evaluations(folder)
    scores = {e["when"]: e for e in evaluations if e["when"] in ("before", "after")} | summary
    return environment.get_template("report.html").render(
        config={"commit": ""} | {name: shown(str(value))[:2000] for name, value in config.items()},
        steps=len(metrics),
        state=state(config, summary, metrics), charts=charts(metrics, evaluations),
        averaged=math.ceil(len(metrics) / CURVE_POINTS), rows=score_rows(scores)[:60],
        phases=phases(summary, metrics),
        warnings=warnings(metrics), **episodes_of(folder, environment.get_template("episode.html")))


def read_evaluations(folder: Path) -> list[dict]:
    """The lines of evaluations.jsonl in the order of steps; of two for one
    evaluation the later one."""
    found = {e.get("when"): e for _, e in read_lines(folder / "evaluations.jsonl")}
    return sorted(found.values(), key=lambda e: (e["step"], e["when"] == "after"))


def state(config: dict, summary: dict, metrics: list[dict]) -> str:
    done = (f"{len(metrics)} of {config.get('steps')} steps" if not config.get("eval_only")
            else "evaluation only")
    if not summary:
        return f"{done}; the run is still going on, or was stopped before it could write its summary"
    return f"{done} in {summary['seconds']:.0f} s" + ("; interrupted" if summary.get("interrupted")
                                                      else "")


def phases(summary: dict, metrics: list[dict]) -> list[tuple[str, float, float]]:
    """(phase, seconds, share), the longest first: of the whole run, or of its steps so far."""
    seconds = defaultdict(float, summary.get("seconds_by_phase", {}))
    if not summary:
        for m in metrics:
            for name, value in m.get("seconds_by_phase", {}).items():
                seconds[name] += value
    total = sum(seconds.values()) or 1.0
    return sorted(((name, value, value / total) for name, value in seconds.items()),
                  key=lambda phase: -phase[1])


def warnings(metrics: list[dict]) -> list[dict]:
    """What went wrong, by name: in how many steps, first and last of them,
    the last message and the option to use."""
    found = {}
    for m in metrics:
        for warning in m.get("warnings") or []:
            one = found.setdefault(warning["name"], {"count": 0, "first": m["step"]})
            one |= {name: shown(str(warning.get(name, "")))
                    for name in ("name", "message", "option")}
            one |= {"count": one["count"] + 1, "last": m["step"]}
    return list(found.values())


def episodes_of(folder: Path, template) -> dict:
    """The episode browser's part of the page: cases, images, what to filter
    by, and how much is shown."""
    album = Album(folder)
    held_out, steps = index_episodes(folder)
    tokens = {(record.get("when"), record.get("index")): offset
              for offset, record in read_lines(folder / "tokens.jsonl")}

    def render_case(case: dict) -> str:
        return template.render(case=case,
                               sizes=[(image["width"], image["height"]) for image in album.images])
    pairs, used, facts = choose(
        render_case, album=album, budget=FOR_EVALUATIONS,
        makers=[(i, lambda i=i: [held_out_case(folder, i, held_out[i], album)]) for i in held_out])
    groups, _, more = choose(
        render_case, album=album, budget=FOR_EPISODES - used,
        makers=[(s, lambda s=s: step_cases(folder, s, steps[s], tokens, album)) for s in steps])
    facts += more

    def values(name: str) -> list[str]:
        found = {value for fact in facts
                 for value in ([fact[name]] if isinstance(fact[name], str) else fact[name])}
        in_order = sorted(found - {""},
                          key=lambda v: (v.isdecimal(), int(v) if v.isdecimal() else 0, v))
        return in_order[:2000]
    return {"cases": [Markup(case) for case in pairs + groups], "images": album.images,
            "filters": {name: values(name) for name in ("result", "split", "problems", "step")},
            "shown": {"pairs": len(pairs), "all_pairs": len(held_out),
                      "steps": len({f["step"] for f in more}),
                      "all_steps": len(steps)}, "image_side": IMAGE_SIDE,
            "limit_mb": LIMIT // 1_000_000,
            "with_tokens": bool(tokens)}


# --- one episode in the terminal ------------------------------------------------------------------


def show_episode(number: str, folder: str | Path) -> str:
    """The N-th line of tokens.jsonl (from 1) as a table. Raises ReportError
    that says what there is."""
    path = open_run(folder) / "tokens.jsonl"
    found = [(offset, record["when"]) for offset, record in read_lines(path)]
    if not found:
        raise ReportError(
            f"{path} holds no episode; the run made no step, or was made with --record-tokens off")
    if not number.isdecimal() or not 1 <= int(number) <= len(found):
        raise ReportError(
            f"--show-episode {number}: {path} has episodes 1 to {len(found)}: {available(found)}")
    record = read_at(path, found[int(number) - 1][0])
    head = [f"episode {number} of {len(found)}: {record['when']}, number {record['index'] + 1} of "
            f"its group, "
            f"sample {visible(str(record['sample']))}, advantage {record['advantage']:+.3f}"]
    for _, episode in read_lines(path.with_name("episodes.jsonl")):
        if (episode["when"], episode.get("index")) == (record["when"], record["index"]):
            parts = ", ".join(f"{name} {value:g}" for name,
                              value in episode["reward"].items() if value is not None)
            head.append(f"gold {one_line(' | '.join(map(str, episode['gold'])))}, answer "
                        f"{one_line(str(episode['answer']))}, reward: {parts}")
    return "\n".join([*head, "",
                      f"{'position':>9}  {'token':24} {'role':6} mask {'logp_old':>9} {'logp':>9} "
                      f"{'ratio':>7} {'advantage':>9}", *token_lines(record)])


def available(found: list[tuple[int, str]]) -> str:
    """Which lines are which step: "1-8 step-1, 9-16 step-2, ..."."""
    places, start = [], 1
    for when, group in groupby(found, key=lambda pair: pair[1]):
        count = len(list(group))
        places.append(f"{start}-{start + count - 1} {when}")
        start += count
    return ", ".join(places if len(places) <= 6 else [*places[:3], "...", *places[-2:]])


def one_line(text: str, width: int = 60) -> str:
    text = visible(text).replace("\n", "\\n").replace("\t", "\\t")
    return text if len(text) <= width else text[:width - 3] + "..."


def token_lines(record: dict) -> list[str]:
    """One line a token. What was not sampled has no log-prob that counts, no
    ratio, no advantage."""
    lines, position = [], 0
    for t, token in enumerate(record["tokens"]):
        count, sampled = record["count"][t], record["mask"][t] == "1"
        where = str(position) if count == 1 else f"{position}-{position + count - 1}"
        text = one_line(token, 24) + (f" x {count}" if count > 1 else "")
        line = f"{where:>9}  {text:24} {ROLES[record['roles'][t]]:6} {record['mask'][t]:>4}"
        if sampled:
            old, new = record["logp_old"][t], record["logp"][t]
            line += f" {old:9.4f} {new:9.4f} {math.exp(min(new - old, 99)):7.3f} {record['advantage']:+9.3f}"
        lines.append(line)
        position += count
    return lines
