"""The report of a run: curves, episodes, hostile text, folders of runs that were killed, and one
episode as a table of tokens."""

import csv
import dataclasses
import json
import math
from html.parser import HTMLParser
from itertools import pairwise

import pytest
import torch
from PIL import Image

import arft
import grpo
from arft import Config, main
from conftest import parts_of
from extras import files, metrics, record, report, weights
from extras.tree import TreeLayout
from rollout import Limits, collate, rollout

HOSTILE = ("<script>alert(1)</script> </pre></i></textarea></svg></style> <img src=x "
           "onerror=alert(1)> &lt; &amp; ]]> <!-- {{ 7 * 7 }} {% raw %} {# "
           "\" onclick=\"alert(1) ' | \u2028 \u202e \x00 \x1b[31m \x08 "
           "\ud800 \\ </details")


# --- a run folder without a run -------------------------------------------------------------------


def episode(when: str, index: int, words: str, em: float = 1.0, **more) -> dict:
    """A line of episodes.jsonl: a malformed turn, a program with an image, and an answer. `words`
    stands wherever a model or a data file can put words."""
    code = f"<code>\n```python\nimport PIL\nx = 'y' # {words}\n```\n</code>"
    turn = {"finished": True, "ran": None, "image": None, "error": None, "observation": words}
    return {"when": when, "index": index, "sample": words, "image": words, "input": "images/in.png",
            "question": words, "gold": [words], "problems": [words], "split": words,
            "answer": words, "ended": "answer",
            "reward": {"total": 2 + em, "answer": em, "format": 1.0, "problem": 1.0, "em": em},
            "advantage": None if when in ("before", "after") else 2 * em - 1,
            "turns": [turn | {"text": words, "action": "malformed", "error": "wrong: " + words},
                      turn | {"text": code, "action": "code", "image": "images/out.png",
                              "ran": "z = 1 # " + words},
                      turn | {"text": words, "action": "answer", "observation": None}]} | more


def tokens(when: str, index: int, words: str) -> dict:
    """The episode's line of tokens.jsonl: a prompt, and three turns of three tokens each with
    observations between them."""
    texts = [words, "<|image_pad|>", words, words, "<|im_end|>", "o", "<code>", "# " + words,
             "<|im_end|>", "o", words, words, "<|im_end|>"]
    return {"when": when, "index": index, "sample": words, "advantage": 1.0, "tokens": texts,
            "count": [1, 4] + [1] * 11, "roles": "ppmmmtmmmtmmm", "mask": "0011101110111",
            "logp_old": [0, 0, -1.0, -1.0, -1.0, 0, -1.0, -1.0, -1.0, 0, -1.0, -1.0, -1.0],
            "logp": [0, 0, -0.9, -1.3, -1.0, 0, -0.9, -1.0, -1.0, 0, -0.4, -1.0, -1.0]}


def scores(em: float) -> dict:
    return {"n": 2, "em": em, "f1": em, "em_ci95": [0.0, 1.0], "f1_ci95": [0.0, 1.0]}


def write_lines(path, lines) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def make_run(folder, words: str = "fine", steps: int = 2, held_out: int = 2, group: int = 2):
    """A folder as extras/record.py writes it."""
    (folder / "images").mkdir(parents=True)
    Image.new("RGB", (8, 6), "red").save(folder / "images" / "in.png")
    Image.new("RGB", (900, 300), "blue").save(folder / "images" / "out.png")
    config = dataclasses.asdict(Config(steps=steps, group_size=group, samples_per_step=1,
                                       model=words)) | {"commit": "abc"}
    (folder / "config.json").write_text(json.dumps(config))
    write_lines(folder / "metrics.jsonl", [
        {"step": s, "reward_mean": s / 2, "em": 0.5, "answer": 0.5, "format": 1.0, "problem": 0.25,
         "kl": None, "entropy": 0.1, "loss": 0.0, "grad_norm": 1.0,
         "seconds_by_phase": {"decode": 2.0, "update": 1.0},
         "warnings": [{"name": words, "message": words, "option": words}]}
        for s in range(1, steps + 1)])
    evaluation = scores(0.0) | {"sampled": scores(0.5),
                                "splits": {words: scores(0.0), "other": scores(1.0)}}
    both = {"before": evaluation, "after": evaluation | scores(1.0)}
    write_lines(folder / "evaluations.jsonl", [{"step": 0, "when": "before", **both["before"]},
                                               {"step": steps, "when": "after", **both["after"]}])
    (folder / "summary.json").write_text(json.dumps(both | {
        "steps": steps, "seconds": 3.0, "seconds_by_phase": {"decode": 3.0, "update": 1.0},
        "interrupted": False}))
    write_lines(folder / "episodes.jsonl", [
        *(episode("before", i, words, em=0.0) for i in range(held_out)),
        *(episode(f"step-{s}", i, words, em=i % 2) for s in range(1, steps + 1)
          for i in range(group + 1)),
        *(episode("after", i, words) for i in range(held_out))])
    write_lines(folder / "tokens.jsonl",
                [tokens(f"step-{s}", i, words) for s in range(1, steps + 1) for i in range(group)])
    return folder


class Elements(HTMLParser):
    """A page as a browser reads it: tags with the names of their attributes, scripts, and text."""

    def __init__(self, page: str):
        super().__init__()
        self.tags, self.text, self.scripts, self.inside = [], [], [], None
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.inside = tag
        self.tags.append((tag, [name for name, _ in attributes]))

    def handle_endtag(self, tag):
        self.inside = None
        self.tags.append(("/" + tag, []))

    def handle_comment(self, data):
        self.tags.append(("comment", []))

    def handle_data(self, data):
        (self.scripts if self.inside in ("script", "style") else self.text).append(data)


def page_of(folder) -> str:
    return report.write(folder).read_text(encoding="utf-8")


# --- hostile text ---------------------------------------------------------------------------------


def test_hostile_text_changes_no_tag_no_attribute_and_no_script(tmp_path):
    harmless, hostile = (Elements(page_of(make_run(tmp_path / name, words)))
                         for name, words in (("a", "fine"), ("b", HOSTILE)))
    assert hostile.tags == harmless.tags
    assert hostile.scripts == harmless.scripts and len(hostile.scripts) == 2
    text, expected = "".join(hostile.text), "".join(harmless.text).count("fine")
    assert text.count(report.escape_invisible(HOSTILE)) == expected > 50, "no text is lost"
    assert not set(text) & {"\x00", "\x1b", "\x08", "\u2028", "\u202e"}
    assert "49 " not in text


@pytest.mark.parametrize("text", [
    "<code>'''" + "''' \"" * 300, "<code>" * 50 + "x = 1", HOSTILE, "<code># \"'\n'</code>'",
    "<code>f(x) + )"])
def test_highlighting_loses_no_character(text):
    assert "".join(piece for _, piece in report.highlight(text)) == text
    widths = [1, 2, 3] * (len(text) // 6 + 1)
    cuts = report.cut_pieces(report.highlight(text), widths)
    assert "".join(piece for token in cuts for _, piece in token) == text
    for i, (token, width) in enumerate(zip(cuts, widths, strict=True)):
        left = max(0, len(text) - sum(widths[:i]))
        assert sum(len(piece) for _, piece in token) == min(width, left)


def test_nothing_outside_the_folder_gets_into_the_page(tmp_path):
    folder = make_run(tmp_path / "run")
    Image.new("RGB", (8, 8)).save(tmp_path / "private.png")
    album = report.Album(folder)
    for name in ("../private.png", str(tmp_path / "private.png"), "images/none.png"):
        assert album.key(name) is None
    assert album.key("images/in.png") == album.key("images/in.png") == 0 and len(album.images) == 1
    page = page_of(folder)
    assert "http" not in page.replace("http://www.w3.org", "") and "src=" not in page


# --- what is shown --------------------------------------------------------------------------------


def test_points_of_a_curve_are_where_the_axes_say():
    points = [(1, 0.0), (2, 50.0), (4, 100.0), (3, math.nan), (3, None)]
    chart = report.draw_chart("EM", "percent", [("em", "line", points),
                                                ("nothing", "line", [(1, None)])], top=100)
    # 420 pixels for 4 steps from x = 46 on, 190 pixels for 100 percent from y = 220 upwards
    drawn, = chart["series"]
    assert drawn["points"] == [(151.0, 220.0), (256.0, 125.0), (466.0, 30.0)]
    assert chart["y_ticks"][0] == (220.0, "0") and chart["y_ticks"][-1] == (30.0, "100")
    assert chart["x_ticks"][-1] == (466.0, "4")
    assert report.draw_chart("none", "", [("kl", "line", [(1, None)])]) is None


def test_a_long_curve_is_averaged():
    points = [(float(x), 2.0 * x) for x in range(1, 2001)]
    thin = report.average_points(points)
    assert len(thin) == 500 and thin[0] == (2.5, 5.0) and thin[-1] == (1998.5, 3997.0)


def test_charts_have_reward_by_part_and_held_out_points():
    metrics = [{"step": 1, "reward_mean": 1.5, "answer": 0.5, "format": 1.0, "problem": 0.0,
                "em": 0.5, "kl": 0.1, "loss": 0.0}]
    evaluation = {"step": 0, "em": 0.2, "sampled": {"em": 0.3},
                  "splits": {"hard": {"em": 0.1}, "simple": {"em": 0.4}}}
    reward, match, *_ = report.draw_charts(metrics, [evaluation])
    assert [one["name"] for one in reward["series"]] == ["reward", "answer", "format", "problem"]
    heights = {one["name"]: round((220 - one["points"][0][1]) / 1.9) for one in match["series"]}
    assert heights == {"training, sampled": 50, "held out, greedy": 20, "held out, sampled": 30,
                       "greedy, hard": 10, "greedy, simple": 40}


def test_endings_without_an_answer_have_a_chart_and_a_line(tmp_path):
    metrics = [{"step": 1, "ended": {"answer": 8, "cut": 0, "turns": 0, "length": 0}},
               {"step": 2, "ended": {"answer": 5, "cut": 2, "turns": 0, "length": 1}}]
    cut, length = report.ending_lines(metrics)
    assert cut == ("cut off", "line", [(1, 0.0), (2, 25.0)])
    assert length == ("too long", "line", [(1, 0.0), (2, 12.5)])
    assert report.ending_lines(metrics[:1]) == []
    scores = {"n": 8, "em": 0.5, "ended": metrics[1]["ended"],
              "sampled": {"n": 8, "em": 0.5, "ended": metrics[0]["ended"]}}
    said = "before, greedy: 3 of 8 without an answer (cut off 2, too long 1)"
    assert files.table({"before": scores}).split("\n")[3:] == [said]
    folder = make_run(tmp_path / "run")
    summary = json.loads((folder / "summary.json").read_text())
    summary["before"] |= {"n": 8, "ended": metrics[1]["ended"]}
    (folder / "summary.json").write_text(json.dumps(summary))
    assert said in page_of(folder)


def test_the_page_pairs_samples_shades_tokens_and_filters(tmp_path):
    page = page_of(make_run(tmp_path / "run"))
    assert page.count('data-result="right|became right"') == 2 and page.count('data-step="2"') == 2
    assert "2 of 2 held-out samples" in page and "first group of 2 of 2 steps" in page
    assert "left out" not in page
    # log-ratios +0.1, -0.3, 0, +0.6: shades 2 up, 3 down, none, 4 up; the two keys have one of each
    for shade, count in (("u2", 8), ("d3", 4), ("u4", 4)):
        assert page.count(f'<i class="{shade}"') == count + 2
    assert 'title="ratio 1.105, log-prob -1.000 -&gt; -0.900"' in page
    assert page.count('<image id="image') == 2 and 'width="320" height="107"' in page
    assert "reward 3.00 (answer 1.00, format 1.00, problem 1.00)" in page
    assert '<span class="keyword">import</span>' in page


def test_parts_that_do_not_apply_may_be_absent_or_null(tmp_path):
    """They are absent today; run folders of older versions have null there."""
    absent, null = (make_run(tmp_path / name, held_out=0, steps=1) for name in ("absent", "null"))
    for folder, more in ((absent, {}), (null, {"problem": None, "query": None, "accuracy": None})):
        reward = {"total": 2.0, "answer": 1.0, "format": 1.0, "em": 1.0} | more
        write_lines(folder / "episodes.jsonl", [episode("step-1", 0, "fine", reward=reward)])
        assert "reward 2.00 (answer 1.00, format 1.00)" in page_of(folder)
        assert ("reward: total 2, answer 1, format 1, em 1"
                in report.show_episode("1", folder).splitlines()[1])
    step = {"total": 1.9, "accuracy": 0.9, "format": 1.0}
    view = report.episode_view(episode("step-1", 0, "fine", reward=step), None,
                               report.Album(absent))
    assert view["parts"] == [("accuracy", 0.9), ("format", 1.0)] and not view["right"]


def test_before_and_after_table_and_phases():
    summary = {"before": scores(0.25)
               | {"sampled": scores(0.5), "by_problem": {"damaged": {"n": 1, "em": 0.0}}}}
    assert files.table(summary).splitlines()[1:] == [
        "before, greedy             2   25.00 [  0.00, 100.00]   25.00 [  0.00, 100.00]",
        "  damaged images           1    0.00",
        "before, sampled            2   50.00 [  0.00, 100.00]   50.00 [  0.00, 100.00]"]
    metrics = [{"seconds_by_phase": {"a": 1.0, "b": 2.0}}, {"seconds_by_phase": {"b": 1.0}}]
    assert report.seconds_by_phase({}, metrics) == [("b", 3.0, 0.75), ("a", 1.0, 0.25)]


# --- any run --------------------------------------------------------------------------------------


def test_a_long_run_fits_into_the_page_and_it_says_what_was_left_out(tmp_path):
    folder = make_run(tmp_path / "run", steps=1, held_out=1)
    long = "word " * 3600
    write_lines(folder / "episodes.jsonl", [
        *(episode(when, i, long) for when in ("before", "after") for i in range(40)),
        *(episode(f"step-{s}", i, long) for s in range(1, 61) for i in range(2))])
    page = page_of(folder)
    assert report.LIMIT / 2 < len(page.encode()) < report.LIMIT
    assert "of 40 held-out samples" in page and "of 60 steps" in page and "left out, evenly" in page
    assert 'data-step="1"' in page and 'data-step="60"' in page, "the first and the last step"


def test_images_of_what_does_not_fit_are_forgotten(tmp_path):
    folder = make_run(tmp_path / "run")
    album = report.Album(folder)

    def case(name):
        return lambda: [{"image": album.key(name), "step": "1", "result": ["right"], "split": "",
                         "problems": []}]
    smaller = min(album_size(folder, f"images/{name}.png") for name in ("in", "out"))
    pages, used, _ = report.render_within_budget(
        lambda one: str(one["image"]), [(1, case("images/out.png")), (2, case("images/in.png"))],
        album, budget=smaller + 10)
    assert len(pages) == len(album.images) == 1 and used == album.size + 1 and len(album.keys) == 1


def album_size(folder, name) -> int:
    album = report.Album(folder)
    album.key(name)
    return album.size


def test_every_beginning_of_the_order_is_spread_evenly():
    order = report.evenly_spread(list(range(100)))
    assert sorted(order) == list(range(100)) and order[:2] == [0, 99]
    for count in (12, 25, 50):
        places = sorted(order[:count])
        assert max(b - a for a, b in pairwise(places)) <= 3 * 100 / count
    for n, expected in enumerate(([], [0], [0, 1], [0, 2, 1])):
        assert report.evenly_spread(list(range(n))) == expected


@pytest.mark.parametrize("missing", [
    ("summary.json",), ("tokens.jsonl",), ("metrics.jsonl", "tokens.jsonl"), ("evaluations.jsonl",),
    ("episodes.jsonl",), ("images/in.png",),
    ("summary.json", "metrics.jsonl", "tokens.jsonl", "episodes.jsonl", "evaluations.jsonl")])
def test_a_run_that_was_stopped_anywhere_has_a_report(tmp_path, missing):
    folder = make_run(tmp_path / "run")
    for name in missing:
        (folder / name).unlink()
    page = page_of(folder)
    assert ("still going on" in page) == ("summary.json" in missing)
    assert "Options" in page
    assert [path.name for path in folder.glob("report*")] == ["report.html"]


@pytest.mark.parametrize("name", ["metrics.jsonl", "episodes.jsonl", "tokens.jsonl",
                                  "evaluations.jsonl", "summary.json", "images/out.png"])
def test_a_file_that_was_cut_off_is_read_as_far_as_it_goes(tmp_path, name):
    folder = make_run(tmp_path / "run")
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[:-20])
    assert "Options" in page_of(folder)
    if name == "metrics.jsonl":
        assert "1 of 2 steps" in page_of(folder)


def test_a_folder_that_no_run_wrote_is_bad_input(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for arguments, words in ((["--report", tmp_path / "gone"], "is not a folder"),
                             (["--report", tmp_path / "empty"], "no readable config.json"),
                             (["--show-episode", 1, tmp_path / "empty"], "no readable config.json"),
                             (["--report", tmp_path, "--score", "x"], "--score and --report")):
        assert main([str(a) for a in arguments]) == 2
        err = capsys.readouterr().err
        assert words in err and err.count("\n") == 1


def test_the_command_remakes_the_page_without_a_model(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(weights, "load", lambda *a: pytest.fail("a model was loaded"))
    folder = make_run(tmp_path / "run")
    assert main(["--report", str(folder)]) == 0
    assert capsys.readouterr().out.strip() == str(folder / "report.html")
    assert (folder / "report.html").exists()


# --- one episode in the terminal ------------------------------------------------------------------


def test_an_episode_as_a_table_has_the_right_numbers(tmp_path):
    folder = make_run(tmp_path / "run")
    line = {"when": "step-2", "index": 1, "sample": "7", "advantage": -0.5,
            "tokens": ["<|im_start|>", "<|image_pad|>", "a\nb", "\x1b[31m", "ok"],
            "count": [1, 4, 1, 1, 1], "roles": "ppmmt", "mask": "00110",
            "logp_old": [0, 0, math.log(0.5), math.log(0.5), 0],
            "logp": [0, 0, math.log(0.6), math.log(0.4), 0]}
    write_lines(folder / "tokens.jsonl", [tokens("step-1", 0, "fine"), line])
    head, gold, _, titles, *rows = report.show_episode("2", folder).splitlines()
    assert "episode 2 of 2: step-2, number 2 of its group, sample 7, advantage -0.500" in head
    assert gold == "gold fine, answer fine, reward: total 3, answer 1, format 1, problem 1, em 1"
    assert titles.split() == ["position", "token", "role", "mask", "logp_old", "logp", "ratio",
                              "advantage"]
    assert [row.split() for row in rows] == [
        ["0", "<|im_start|>", "prompt", "0"], ["1-4", "<|image_pad|>", "x", "4", "prompt", "0"],
        ["5", "a\\nb", "model", "1", "-0.6931", "-0.5108", "1.200", "-0.500"],
        ["6", "\\x1b[31m", "model", "1", "-0.6931", "-0.9163", "0.800", "-0.500"],
        ["7", "ok", "tool", "0"]]
    roles = ("prompt", "prompt", "model", "model", "tool")
    assert {row.index(role) for row, role in zip(rows, roles, strict=True)} == {36}


@pytest.mark.parametrize("number", ["0", "5", "-1", "one", "1.5", "²"])
def test_an_episode_that_does_not_exist(tmp_path, number):
    with pytest.raises(report.ReportError, match="episodes 1 to 4: 1-2 step-1, 3-4 step-2"):
        report.show_episode(number, make_run(tmp_path / "run"))


def test_without_recorded_tokens_there_is_no_table(tmp_path):
    folder = make_run(tmp_path / "run")
    (folder / "tokens.jsonl").unlink()
    with pytest.raises(report.ReportError, match="holds no episode: the run made no step"):
        report.show_episode("1", folder)


# --- what a run records ---------------------------------------------------------------------------


def test_tokens_are_those_of_the_episode_in_their_places(policy, samples, tools):
    made, = rollout(policy, samples(("dark",)), limits=Limits(max_turns=3), tools=tools,
                    generator=torch.Generator().manual_seed(3))
    logp = torch.arange(len(made.ids)) / 8
    kept = metrics.token_record(policy, made, logp)
    assert len({len(column) for column in kept.values()}) == 1
    assert sum(kept["count"]) == len(made.ids)
    position = 0
    for t, count in enumerate(kept["count"]):
        assert {int(kept["mask"][t])} == set(made.mask[position:position + count])
        assert count == 1 or set(made.ids[position:position + count]) == {policy.image_pad}
        if made.mask[position]:
            assert kept["logp"][t] == logp[position]
            assert abs(kept["logp_old"][t] - made.logp[position]) < 1e-5
        position += count
    assert kept["roles"].startswith("p" * kept["roles"].index("m"))
    assert "p" not in kept["roles"].lstrip("p")
    turns = report.turn_tokens(kept)
    assert [len(indices) for indices in turns] == [turn.stop - turn.start for turn in made.turns]
    written = "".join(kept["tokens"][t] for t in turns[0])
    assert written == made.turns[0].text + "<|im_end|>"


def test_bytes_that_are_no_text_are_escapes(policy):
    texts = [metrics.token_text(policy.tokenizer, i) for i in policy.text_ids("é x")]
    assert texts[:2] == ["\\xc3", "\\xa9"] and "".join(texts[2:]) == " x"
    assert metrics.token_text(policy.tokenizer, policy.im_end) == "<|im_end|>"


def test_logp_in_tokens_jsonl_is_that_of_the_updated_policy(fresh_policy, samples, tools,
                                                            tmp_path, monkeypatch):
    """It equals that of a forward pass of each episode alone. We set the advantages, so that there
    is something to learn."""
    monkeypatch.setattr(arft, "group_advantages",
                        lambda totals, *more: torch.linspace(-1, 1, len(totals)))
    config = Config(out=str(tmp_path / "run"), steps=1, samples_per_step=1, group_size=4,
                    rollout_batch=64, lr=1e-3, inner_epochs=1, minibatches=1, save_every=1,
                    micro_batch_tokens=400, update="rows", checkpointing="off", max_new_tokens=40,
                    max_turns=1, warmup=0)
    parts, episodes = parts_of(config, fresh_policy, tools), []
    play = parts.rollout

    def rollout(*arguments, **more):
        episodes.extend(play(*arguments, **more))
        return episodes
    parts.rollout = rollout
    arft.train(fresh_policy, samples(("dark",)), config, parts)
    recorded = [json.loads(line)
                for line in (tmp_path / "run" / "tokens.jsonl").read_text().splitlines()]
    assert len(recorded) == len(episodes) == 4
    for kept, one in zip(recorded, episodes, strict=True):
        with torch.no_grad():
            now, _ = grpo.episode_logp(fresh_policy, collate(fresh_policy, [one]))
        sampled = [t for t, mask in enumerate(one.mask) if mask]
        columns = [t for t, mask in enumerate(kept["mask"]) if mask == "1"]
        new, old = ([kept[name][t] for t in columns] for name in ("logp", "logp_old"))
        assert new == pytest.approx(now[0, sampled].tolist(), abs=1e-4)
        assert old == pytest.approx([one.logp[t] for t in sampled], abs=1e-4)
    assert any(abs(new - old) > 1e-3 for kept in recorded
               for new, old in zip(kept["logp"], kept["logp_old"], strict=True))


def test_a_real_run_has_a_csv_that_equals_its_jsonl_and_a_report(short_run):
    out, said = short_run.folder, short_run.said
    rows = list(csv.reader((out / "metrics.csv").read_text().splitlines()))
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 3 and "seconds_by_phase.decode" in rows[0]
    for row, values in zip(rows[1:], steps, strict=True):
        names = [warning["name"] for warning in values.get("warnings", ())]
        flat = metrics.flattened(values | {"warnings": names})
        assert dict(zip(rows[0], row, strict=True)) == {
            name: "" if value is None else str(value) for name, value in flat.items()}
    told = " ".join(said.split())
    assert told.count("Watch the reward, not the loss") == 1 and "gradient norm" in told
    assert all(len(line) <= 80 for line in said.splitlines()
               if line.startswith(("step", "        ")))
    assert len(list(report.lines_with_offsets(out / "tokens.jsonl"))) == 8
    page = (out / "report.html").read_text()
    assert page.count('class="case"') == 6 + 8 and "2 of 2 steps" in page
    assert 'href="data:image/' in page
    assert "episode 8 of 8: step-2" in report.show_episode("8", out)
    report.write(out)
    assert (out / "report.html").read_text() == page


def test_an_evaluation_alone_has_a_report(evaluation_run):
    page = (evaluation_run.folder / "report.html").read_text()
    assert "evaluation only" in page and "before, sampled" in page
    assert page.count('class="case"') == 3
    assert not (evaluation_run.folder / "metrics.csv").exists()


def test_columns_of_the_csv_are_those_of_the_first_line(tmp_path):
    kept = record.Run(Config(out=str(tmp_path / "run")))
    for row in ({"step": 1, "a": None, "b": 'x,"y'}, {"step": 2, "c": 5, "a": 0.5}):
        kept.append_row("metrics.csv", row)
    assert (tmp_path / "run" / "metrics.csv").read_text() == 'step,a,b\n1,,"x,""y"\n2,0.5,\n'


@pytest.mark.parametrize("options, words", [
    ({}, "the mean of the step's 4 updates"),
    ({"inner_epochs": 1, "minibatches": 1}, "about zero. Its gradient is not"),
    ({"loss_type": "gspo"}, "about zero"), ({"loss_type": "dapo"}, None),
    ({"loss_type": "cispo"}, None), ({"loss_type": "dr_grpo"}, None)])
def test_the_zero_loss_is_explained_where_it_is_zero(options, words):
    config = Config(**{"inner_epochs": 2, "minibatches": 2} | options)
    stats = {"loss": -0.0017, "grad_norm": 0.42, "updates": 4, "zero_variance": 0.5}
    said = metrics.zero_loss_note(config, stats)
    assert said is None if words is None else words in " ".join(said.split()) and "-0.0017" in said
    nothing = {"loss": None, "grad_norm": None, "updates": None, "zero_variance": 1.0}
    only_kl = {"loss": 0.0, "grad_norm": 0.0, "updates": 4, "zero_variance": 1.0}
    assert metrics.zero_loss_note(config, nothing) is None
    assert metrics.zero_loss_note(config, only_kl) is None


def test_the_loss_is_as_zero_as_the_note_says(fresh_policy, samples, tools):
    """In one update on whole groups of unequal lengths the loss is zero for grpo, and the note
    explains it. It is not zero for dapo, and there is no note."""
    episodes = rollout(fresh_policy, samples(("dark",), ("blur",)), group_size=4, tools=tools,
                       limits=Limits(max_new_tokens=40, max_turns=3),
                       generator=torch.Generator().manual_seed(1))
    episodes.sort(key=lambda e: sum(e.mask))
    assert sum(episodes[0].mask) < sum(episodes[-1].mask)
    advantages = grpo.group_advantages(torch.arange(8.0), 8)
    for loss_type, low, high in (("grpo", 0, 1e-5), ("gspo", 0, 1e-5), ("dapo", 1e-2, 9)):
        config = Config(loss_type=loss_type, group_size=8, inner_epochs=1, minibatches=1,
                        max_new_tokens=40)
        stats = grpo.update(fresh_policy, None, episodes, advantages, config,
                            optimizer=grpo.Optimizer(fresh_policy, 1e-12, 1.0),
                            layout=TreeLayout(2048), generator=torch.Generator())
        stats["zero_variance"] = 0.0
        assert low <= abs(stats["loss"]) <= high and stats["grad_norm"] > 1e-2
        assert (metrics.zero_loss_note(config, stats) is None) == (loss_type == "dapo")
