"""The report: report.html, and one episode token by token, from the files of a run folder.

What it teaches: what you can look at after such a run. Curves say that something was learned, and
episodes say what. One episode as a table of tokens (`show_episode`) is GRPO itself: which tokens
the policy sampled, how likely each was then and is after the update, and the advantage that moved
it. This needs no model, only the files that extras/record.py wrote.

Two rules hold. First, text that a model wrote is hostile: it reaches the page only through jinja2's
escaping, and characters that would disturb the reader (control characters, reversed writing) are
shown as escapes. Second, the page is one file that needs no network and has at most LIMIT bytes. Of
a long run it shows a part, evenly spread, and says what it leaves out.

The templates are report.html and episode.html. Left out: several runs on one page.
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

from extras.files import summary_rows, unanswered
from extras.metrics import ENDINGS

LIMIT = 10_000_000          # bytes of the page
EVALUATIONS_LIMIT = 4_500_000       # bytes of the held-out samples in it
EPISODES_LIMIT = 9_000_000          # bytes of the held-out samples and the training episodes
IMAGE_SIDE = 320            # pixels of the longer side of an image in the page, at most
TEXT_LIMIT = 20_000         # characters of one text in the page
CURVE_POINTS = 500          # points of one line; the points of a longer run are averaged
ROLES = {"p": "prompt", "m": "model", "t": "tool"}


class ReportError(ValueError):
    """A folder has no report. The message says what is missing and what you can do."""


# --- reading a run folder -------------------------------------------------------------------------


def read_json(path: Path) -> dict:
    """The object in a file. {} if there is no file, or if a killed run left only a part of it."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def lines_with_offsets(path: Path):
    """(offset in bytes, object) of each line of a .jsonl file; nothing if there is no file. A line
    that a killed run left half written is skipped."""
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


def read_line_at(path: Path, offset: int) -> dict:
    """The object in the line that begins at this offset in bytes."""
    with open(path, "rb") as file:
        file.seek(offset)
        return json.loads(file.readline())


def require_run_folder(folder: str | Path) -> Path:
    """The folder as a path. Raises ReportError if no run wrote it."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ReportError(f"{folder} is not a folder; name one that a run wrote (its --out)")
    if not read_json(folder / "config.json"):
        raise ReportError(
            f"{folder} has no readable config.json; name a folder that a run wrote (its --out)")
    return folder


# --- text that is safe to look at -----------------------------------------------------------------

# Control characters (without line break and tab), line and paragraph separators, marks of writing
# direction, and surrogates.
DISTURBING = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")

PYTHON = re.compile(r"""
    (?P<comment>\#[^\n]*)
  | (?P<string>\"{3}[\s\S]*?(?:\"{3}|\Z) | '{3}[\s\S]*?(?:'{3}|\Z)
             | "(?:\\.|[^"\\\n])*"? | '(?:\\.|[^'\\\n])*'?)
  | (?P<number>\b\d[\w.]*)
  | (?P<keyword>\b(?:and|as|assert|break|class|continue|def|del|elif|else|except|finally|for|from|
        global|if|import|in|is|lambda|None|not|or|pass|raise|return|True|False|try|while|with|
        yield)\b)
  | (?P<name>\w+)""", re.VERBOSE)
TAG = re.compile(r"(</?(?:think|problem|code|search|answer)>|<\|im_end\|>)")


def escape_invisible(text: str) -> str:
    """The text with escapes in place of characters that are invisible or disturb their neighbours.

    >>> escape_invisible("a\\x1b[31m\\tb\\u202ec")
    'a\\\\x1b[31m\\tb\\\\u202ec'
    """
    def escape(match) -> str:
        code = ord(match[0])
        return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"
    return DISTURBING.sub(escape, text)


def shortened(text: str | None) -> str | None:
    """The text, or its beginning if it has more than TEXT_LIMIT characters."""
    if text is None or len(text) <= TEXT_LIMIT:
        return text
    more = f" ... ({len(text) - TEXT_LIMIT:,} more characters are in the run folder)"
    return text[:TEXT_LIMIT] + more


def template_environment() -> Environment:
    """The only way into the page. Every text that a template prints goes through
    `escape_invisible` and then through jinja2's escaping."""
    def finalize(value):
        is_plain = isinstance(value, str) and not isinstance(value, Markup)
        return escape_invisible(value) if is_plain else value
    return Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True,
                       finalize=finalize, undefined=StrictUndefined, trim_blocks=True,
                       lstrip_blocks=True)


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
        else:
            pieces += highlight_python(part) if in_code else [("", part)]
    joined = groupby((piece for piece in pieces if piece[1]), key=lambda piece: piece[0])
    return [(kind, "".join(text for _, text in group)) for kind, group in joined]


def highlight_python(code: str) -> list[tuple[str, str]]:
    """A program as (kind, piece)."""
    pieces, end = [], 0
    for match in PYTHON.finditer(code):
        kind = "" if match.lastgroup == "name" else match.lastgroup
        pieces += [("", code[end:match.start()]), (kind, match[0])]
        end = match.end()
    return [*pieces, ("", code[end:])]


def cut_pieces(pieces: list[tuple[str, str]], widths: list[int]) -> list[list[tuple[str, str]]]:
    """Cuts pieces at the ends of tokens: for each width, the pieces of so many characters.

    >>> cut_pieces([("a", "xyz"), ("", "!")], [2, 2])
    [[('a', 'xy')], [('a', 'z'), ('', '!')]]
    """
    tokens, queue = [], pieces[::-1]
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
    """At most `most` round steps: numbers from `low` or below to `high` or above.

    >>> ticks(0, 2.85), ticks(1, 70)
    ([0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0], [0.0, 20.0, 40.0, 60.0, 80.0])
    """
    span = max(high - low, 1e-9)
    power = 10.0 ** math.floor(math.log10(span / most))
    step = next(m * power for m in (1, 2, 5, 10) if span / (m * power) <= most)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(k * step, 10) for k in range(first, max(last, first + 1) + 1)]


def average_points(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most CURVE_POINTS points, each the mean of equally many neighbours."""
    k = math.ceil(len(points) / CURVE_POINTS)
    parts = [points[i:i + k] for i in range(0, len(points), max(k, 1))]
    return [tuple(sum(values) / len(part) for values in zip(*part, strict=True)) for part in parts]


def finite_points(kind: str, points: list) -> list[tuple[float, float]]:
    """The points that can be drawn. Values that are missing or not finite leave a gap."""
    finite = [(x, y) for x, y in points if y is not None and math.isfinite(y)]
    return average_points(finite) if kind == "line" else finite


def draw_chart(title: str, unit: str, series: list[tuple[str, str, list]],
               top: float | None = None) -> dict | None:
    """A drawing for the template, or None if there is nothing to draw.

    series: (name, kind, [(step, value)]); a kind is "line", "points" or "parts" (small points).
    top: the value at the top of the axis; None takes the largest value. Coordinates are those of a
    picture of 480 x 260.
    """
    drawn = [(name, kind, finite_points(kind, points)) for name, kind, points in series]
    drawn = [(name, kind, points) for name, kind, points in drawn if points]
    if not drawn:
        return None
    xs, ys = ([point[axis] for _, _, points in drawn for point in points] for axis in (0, 1))
    x_end, x_ticks = max(1, *xs), ticks(min(0, *xs), max(1, *xs))
    y_ticks = ticks(min(0.0, *ys), top if top is not None else max(1e-3, *ys))

    def place(x: float, y: float) -> tuple[float, float]:
        share_x, share_y = x / x_end, (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return round(46 + 420 * share_x, 1), round(220 - 190 * share_y, 1)
    return {"title": title, "unit": unit,
            "x_ticks": [(place(x, 0)[0], f"{x:g}") for x in x_ticks if x <= x_end],
            "y_ticks": [(place(0, y)[1], f"{y:g}") for y in y_ticks],
            "series": [{"name": name, "kind": kind, "colour": i,
                        "points": [place(*point) for point in points]}
                       for i, (name, kind, points) in enumerate(drawn)]}


def draw_charts(metrics: list[dict], evaluations: list[dict]) -> list[dict]:
    """The reward and its parts, exact match and its splits, KL and entropy, loss and gradient."""
    def of(name: str, factor: float = 1.0) -> list:
        return [(m["step"], None if m.get(name) is None else factor * m[name]) for m in metrics]

    def held_out(value) -> list:
        return [(e["step"], 100 * score) for e in evaluations if (score := value(e)) is not None]
    splits = sorted({split for e in evaluations for split in e.get("splits", {})})
    rewards = [("reward", "line", of("reward_mean")),
               *((name, "line", of(name)) for name in ("answer", "format", "problem", "accuracy"))]
    matches = [("training, sampled", "line", of("em", 100.0)),
               ("held out, greedy", "points", held_out(lambda e: e["em"])),
               ("held out, sampled", "points",
                held_out(lambda e: e.get("sampled", {}).get("em"))),
               *((f"greedy, {split}", "parts",
                  held_out(lambda e, split=split: e.get("splits", {}).get(split, {}).get("em")))
                 for split in splits[:3] if len(splits) > 1)]
    drawn = [
        draw_chart("Reward", "mean of a step's episodes, points", rewards),
        draw_chart("Exact match", "percent", matches, top=100),
        draw_chart("KL and entropy", "nats a token",
                   [("KL to the reference", "line", of("kl")), ("entropy", "line", of("entropy"))]),
        draw_chart("Episodes without an answer", "percent of a step's episodes",
                   ending_lines(metrics), top=100),
        draw_chart("Loss and gradient", "no unit",
                   [("gradient norm", "line", of("grad_norm")), ("loss", "line", of("loss"))])]
    return [chart for chart in drawn if chart]


def ending_lines(metrics: list[dict]) -> list[tuple[str, str, list]]:
    """The share of each ending other than an answer, for those that occur at all."""
    counted = [(m["step"], m["ended"], sum(m["ended"].values())) for m in metrics if "ended" in m]
    return [(words, "line", [(step, 100 * ended[why] / total) for step, ended, total in counted])
            for why, words in ENDINGS.items()
            if words and any(ended[why] for _, ended, _ in counted)]


# --- episodes -------------------------------------------------------------------------------------


def shade(value: float, bounds: tuple[float, ...]) -> str:
    """A class of the style sheet: "u" for a value above zero, "d" for one below, with a number from
    1 (pale) to 4. "" near zero.

    >>> bounds = (0.01, 0.5, 1, 1.5)
    >>> shade(0.3, bounds), shade(-2, bounds), shade(0.0, bounds)
    ('u1', 'd4', '')
    """
    level = sum(abs(value) >= bound for bound in bounds)
    return f"{'u' if value > 0 else 'd'}{level}" if level else ""


ADVANTAGES = (0.01, 0.5, 1.0, 1.5)
LOG_RATIOS = (0.01, 0.05, 0.1823, 0.5)       # the third is log 1.2, where the default clip acts


def turn_tokens(tokens: dict) -> list[list[int]]:
    """For each turn, the indices of its tokens in a line of tokens.jsonl."""
    runs = groupby(range(len(tokens["roles"])), key=lambda t: tokens["roles"][t])
    return [list(run) for role, run in runs if role == "m"]


def shaded_spans(tokens: dict, indices: list[int]) -> list[dict]:
    """A turn's tokens for the template: pieces of highlighted text, the shade of the ratio, and the
    text that the pointer shows."""
    texts = [tokens["tokens"][t] for t in indices]
    pieces = cut_pieces(highlight("".join(texts)), [len(text) for text in texts])
    spans = []
    for t, parts in zip(indices, pieces, strict=True):
        old, new = tokens["logp_old"][t], tokens["logp"][t]
        tip = f"ratio {math.exp(min(new - old, 99)):.3f}, log-prob {old:.3f} -> {new:.3f}"
        # Most tokens are nearly certain; without their tips the page has room for more episodes.
        near_certain = abs(new - old) < LOG_RATIOS[0] and old > -0.01
        spans.append({"shade": shade(new - old, LOG_RATIOS), "tip": None if near_certain else tip,
                      "parts": parts})
    return spans


def turn_view(turn: dict, spans: list[dict] | None, image_in: int | None,
              image_out: int | None) -> dict:
    """One turn of a line of episodes.jsonl for the template. spans: None without a record of its
    tokens. image_in, image_out: numbers of images in the album."""
    text = shortened(turn["text"])
    ran = shortened(turn.get("ran"))
    return {"action": turn["action"], "finished": turn["finished"],
            "image_in": image_in, "image_out": image_out,
            "spans": spans or [{"shade": "", "tip": None, "parts": highlight(text)}],
            "ran": highlight(f"<code>{ran}</code>")[1:-1] if ran else None,
            "observation": shortened(turn["observation"]), "error": shortened(turn.get("error"))}


def episode_view(record: dict, tokens: dict | None, album: "Album") -> dict:
    """One line of episodes.jsonl, with its line of tokens.jsonl, as the template needs it."""
    indices = turn_tokens(tokens) if tokens else []
    image, turns = album.key(record.get("input")), []
    for k, turn in enumerate(record["turns"]):
        out = album.key(turn["image"])
        with_tokens = len(indices) == len(record["turns"]) and len(turn["text"]) <= TEXT_LIMIT
        spans = shaded_spans(tokens, indices[k]) if with_tokens else None
        turns.append(turn_view(turn, spans, image, out))
        image = out or image
    reward, advantage = record["reward"], record.get("advantage")
    # A part that does not apply is absent; run folders of older versions have null there.
    parts = {name: value for name, value in reward.items() if value is not None}
    right = parts["accuracy"] == 1 if "accuracy" in parts else bool(parts.get("em"))
    return {"turns": turns, "input": album.key(record.get("input")), "total": reward["total"],
            "parts": [item for item in parts.items() if item[0] not in ("total", "em")],
            "right": right, "answer": shortened(record["answer"]), "ended": record["ended"],
            "advantage": advantage, "shade": shade(advantage or 0.0, ADVANTAGES),
            "index": record.get("index", 0)}


class Album:
    """The images of the page. Each is embedded once, however often it is shown."""

    def __init__(self, folder: Path):
        self.folder, self.keys, self.images, self.size = folder.resolve(), {}, [], 0

    def key(self, name: str | None) -> int | None:
        """The number of an image file of the run folder, or None if there is no such file or it
        cannot be read."""
        if name is not None and name not in self.keys:
            self.keys[name] = self.add(name)
        return self.keys.get(name)

    def add(self, name: str) -> int | None:
        """Reads an image file and gives it the next number; None as in `key`."""
        path = (self.folder / name).resolve()
        # A run folder from another machine must not embed this machine's files.
        if not path.is_relative_to(self.folder):
            return None
        try:
            with Image.open(path) as image:
                image = image.convert("RGB")
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            return None         # for instance half written when the run was killed
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


def evenly_spread(things: list) -> list:
    """The first, the last, then the others in an order of which every beginning is spread evenly
    (by the golden ratio)."""
    ends = things[:1] + things[:0:-1][:1]
    middle = sorted(range(1, len(things) - 1), key=lambda i: i * 0.6180339887498949 % 1)
    return ends + [things[i] for i in middle]


def index_episodes(folder: Path) -> tuple[dict, dict]:
    """Where episodes.jsonl has the episodes that the page can show, as offsets in bytes: of the
    evaluations {sample's place: {"before": offset, "after": offset}}, and of each step's first
    group {step: [(index, offset), ...]}. If the run was stopped and resumed, two lines may be about
    the same episode; then the later line counts."""
    group = read_json(folder / "config.json").get("group_size", 8)
    held_out, steps, counters = defaultdict(dict), defaultdict(dict), defaultdict(int)
    for offset, record in lines_with_offsets(folder / "episodes.jsonl"):
        when = record.get("when", "")
        index = record.get("index", counters[when])
        counters[when] += 1
        if when in ("before", "after"):
            held_out[index][when] = offset
        elif index < group and when.removeprefix("step-").isdecimal():
            steps[int(when.removeprefix("step-"))][index] = offset
    return dict(sorted(held_out.items())), {step: sorted(steps[step].items())
                                            for step in sorted(steps)}


def held_out_case(folder: Path, offsets: dict, album: Album) -> dict:
    """One held-out sample: its episodes before and after training."""
    records = {when: read_line_at(folder / "episodes.jsonl", offsets[when])
               for when in ("before", "after") if when in offsets}
    views = {when: episode_view(record, None, album) for when, record in records.items()}
    right = [view["right"] for view in views.values()]
    result = ["right" if right[-1] else "wrong"]
    if len(right) == 2 and right[0] != right[1]:
        result.append("became right" if right[1] else "became wrong")
    return make_case(next(iter(records.values())), "held out", result, views)


def step_cases(folder: Path, step: int, offsets: list, tokens: dict, album: Album) -> list[dict]:
    """The first group of a step, one case for each episode. tokens: {(when, index): offset} in
    tokens.jsonl."""
    cases = []
    for index, offset in offsets:
        record = read_line_at(folder / "episodes.jsonl", offset)
        where = tokens.get((f"step-{step}", index))
        with_tokens = None if where is None else read_line_at(folder / "tokens.jsonl", where)
        view = episode_view(record, with_tokens, album)
        cases.append(make_case(record, str(step), ["right" if view["right"] else "wrong"],
                               {f"episode {index + 1}": view}))
    return cases


def make_case(record: dict, step: str, result: list[str], views: dict) -> dict:
    """One entry of the episode browser: a question and the views of its episodes."""
    return {"sample": shortened(str(record["sample"])), "question": shortened(record["question"]),
            "step": step, "result": result,
            "gold": [shortened(str(gold)) for gold in record["gold"]][:20], "views": views,
            "problems": [shortened(problem) for problem in record["problems"]],
            "split": shortened(record["split"] or "")}


def render_within_budget(render_case, makers: list, album: Album,
                         budget: int) -> tuple[list[str], int, list[dict]]:
    """Renders the cases that fit into `budget` bytes, images included.

    makers: (place, function that makes cases). Returns (rendered cases in the order of their
    places, bytes used, the facts that the filters can choose from).
    """
    kept, used, facts = {}, 0, []
    for place, make in evenly_spread(makers):
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
    """Makes report.html of a run folder. The old page stays until the new one is complete. Returns
    the path of the page. Raises ReportError."""
    folder = require_run_folder(folder)
    page = render(folder)
    new = folder / "report.html.new"
    new.write_text(page, encoding="utf-8")
    os.replace(new, folder / "report.html")
    return folder / "report.html"


def render(folder: Path) -> str:
    """The page as text. It leaves out what the run has not written yet."""
    environment = template_environment()
    config, summary = read_json(folder / "config.json"), read_json(folder / "summary.json")
    metrics = [line for _, line in lines_with_offsets(folder / "metrics.jsonl")]
    evaluations = read_evaluations(folder)
    scores = {e["when"]: e for e in evaluations if e["when"] in ("before", "after")} | summary
    options = {name: shortened(str(value))[:2000] for name, value in config.items()}
    return environment.get_template("report.html").render(
        config={"commit": ""} | options, steps=len(metrics),
        state=progress(config, summary, metrics), charts=draw_charts(metrics, evaluations),
        averaged=math.ceil(len(metrics) / CURVE_POINTS), rows=summary_rows(scores)[:60],
        unanswered=unanswered(scores), phases=seconds_by_phase(summary, metrics),
        warnings=warnings_by_name(metrics),
        **episode_browser(folder, environment.get_template("episode.html")))


def read_evaluations(folder: Path) -> list[dict]:
    """The lines of evaluations.jsonl in the order of their steps. If two lines are about one
    evaluation, the later line counts."""
    found = {e.get("when"): e for _, e in lines_with_offsets(folder / "evaluations.jsonl")}
    return sorted(found.values(), key=lambda e: (e["step"], e["when"] == "after"))


def progress(config: dict, summary: dict, metrics: list[dict]) -> str:
    """How far the run is, in one phrase."""
    done = (f"{len(metrics)} of {config.get('steps')} steps" if not config.get("eval_only")
            else "evaluation only")
    if not summary:
        return f"{done}; the run is still going on, or it was stopped before it wrote its summary"
    interrupted = "; interrupted" if summary.get("interrupted") else ""
    return f"{done} in {summary['seconds']:.0f} s{interrupted}"


def seconds_by_phase(summary: dict, metrics: list[dict]) -> list[tuple[str, float, float]]:
    """(phase, seconds, share of the sum), the longest phase first. They are those of the whole run,
    or of its steps so far if there is no summary yet."""
    seconds = defaultdict(float, summary.get("seconds_by_phase", {}))
    if not summary:
        for m in metrics:
            for name, value in m.get("seconds_by_phase", {}).items():
                seconds[name] += value
    total = sum(seconds.values()) or 1.0
    return sorted(((name, value, value / total) for name, value in seconds.items()),
                  key=lambda phase: -phase[1])


def warnings_by_name(metrics: list[dict]) -> list[dict]:
    """Each warning once: its name, how many steps had it, the first and the last of these steps,
    the last message, and the option that helps."""
    found = {}
    for m in metrics:
        for warning in m.get("warnings") or []:
            one = found.setdefault(warning["name"], {"count": 0, "first": m["step"]})
            one |= {name: shortened(str(warning.get(name, "")))
                    for name in ("name", "message", "option")}
            one |= {"count": one["count"] + 1, "last": m["step"]}
    return list(found.values())


def episode_browser(folder: Path, template) -> dict:
    """The part of the page that shows episodes: cases, images, filters, and how much is shown."""
    album = Album(folder)
    held_out, steps = index_episodes(folder)
    tokens = {(record.get("when"), record.get("index")): offset
              for offset, record in lines_with_offsets(folder / "tokens.jsonl")}

    def render_case(case: dict) -> str:
        sizes = [(image["width"], image["height"]) for image in album.images]
        return template.render(case=case, sizes=sizes)
    pairs, used, facts = render_within_budget(
        render_case, album=album, budget=EVALUATIONS_LIMIT,
        makers=[(i, lambda i=i: [held_out_case(folder, held_out[i], album)]) for i in held_out])
    groups, _, more = render_within_budget(
        render_case, album=album, budget=EPISODES_LIMIT - used,
        makers=[(s, lambda s=s: step_cases(folder, s, steps[s], tokens, album)) for s in steps])
    names = ("result", "split", "problems", "step")
    return {"cases": [Markup(case) for case in pairs + groups], "images": album.images,
            "filters": {name: filter_values(facts + more, name) for name in names},
            "shown": {"pairs": len(pairs), "all_pairs": len(held_out),
                      "steps": len({fact["step"] for fact in more}), "all_steps": len(steps)},
            "image_side": IMAGE_SIDE, "limit_mb": LIMIT // 1_000_000, "with_tokens": bool(tokens)}


def filter_values(facts: list[dict], name: str) -> list[str]:
    """The values that a filter offers: words first, then numbers by size."""
    found = {value for fact in facts
             for value in ([fact[name]] if isinstance(fact[name], str) else fact[name])}
    in_order = sorted(found - {""},
                      key=lambda v: (v.isdecimal(), int(v) if v.isdecimal() else 0, v))
    return in_order[:2000]


# --- one episode in the terminal ------------------------------------------------------------------


def show_episode(number: str, folder: str | Path) -> str:
    """The N-th line of tokens.jsonl (from 1) as a table. Raises ReportError, which says which lines
    there are."""
    path = require_run_folder(folder) / "tokens.jsonl"
    found = [(offset, record["when"]) for offset, record in lines_with_offsets(path)]
    if not found:
        raise ReportError(f"{path} holds no episode: the run made no step, or the file was removed")
    if not number.isdecimal() or not 1 <= int(number) <= len(found):
        raise ReportError(f"--show-episode {number}: {path} has episodes 1 to {len(found)}: "
                          f"{episode_ranges(found)}")
    record = read_line_at(path, found[int(number) - 1][0])
    head = [f"episode {number} of {len(found)}: {record['when']}, number {record['index'] + 1} of "
            f"its group, sample {escape_invisible(str(record['sample']))}, advantage "
            f"{record['advantage']:+.3f}"]
    head += [reward_line(episode)
             for _, episode in lines_with_offsets(path.with_name("episodes.jsonl"))
             if (episode["when"], episode.get("index")) == (record["when"], record["index"])]
    titles = (f"{'position':>9}  {'token':24} {'role':6} mask {'logp_old':>9} {'logp':>9} "
              f"{'ratio':>7} {'advantage':>9}")
    return "\n".join([*head, "", titles, *token_lines(record)])


def reward_line(episode: dict) -> str:
    """Gold, answer and reward of a line of episodes.jsonl."""
    parts = ", ".join(f"{name} {value:g}" for name, value in episode["reward"].items()
                      if value is not None)      # null in run folders of older versions
    gold = one_line(" | ".join(map(str, episode["gold"])))
    return f"gold {gold}, answer {one_line(str(episode['answer']))}, reward: {parts}"


def episode_ranges(found: list[tuple[int, str]]) -> str:
    """Which lines belong to which step: "1-8 step-1, 9-16 step-2, ..."."""
    places, start = [], 1
    for when, group in groupby(found, key=lambda pair: pair[1]):
        count = len(list(group))
        places.append(f"{start}-{start + count - 1} {when}")
        start += count
    return ", ".join(places if len(places) <= 6 else [*places[:3], "...", *places[-2:]])


def one_line(text: str, width: int = 60) -> str:
    """The text in at most `width` characters, with line breaks and tabs as escapes."""
    text = escape_invisible(text).replace("\n", "\\n").replace("\t", "\\t")
    return text if len(text) <= width else text[:width - 3] + "..."


def token_lines(record: dict) -> list[str]:
    """One line for each token. A token that was not sampled has no log-prob, ratio or advantage."""
    lines, position = [], 0
    for t, token in enumerate(record["tokens"]):
        count, sampled = record["count"][t], record["mask"][t] == "1"
        where = str(position) if count == 1 else f"{position}-{position + count - 1}"
        text = one_line(token, 24) + (f" x {count}" if count > 1 else "")
        line = f"{where:>9}  {text:24} {ROLES[record['roles'][t]]:6} {record['mask'][t]:>4}"
        if sampled:
            old, new = record["logp_old"][t], record["logp"][t]
            line += (f" {old:9.4f} {new:9.4f} {math.exp(min(new - old, 99)):7.3f} "
                     f"{record['advantage']:+9.3f}")
        lines.append(line)
        position += count
    return lines
