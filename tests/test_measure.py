"""The programs of tests/measure/ run: each at its smallest setting, or a part of it.

The test of bench_gpu.py stands in test_rollout.py, that of kills.py in test_resume.py. What the
programs measure stands in tests/README.md; no test here looks at a time.
"""

import argparse
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from PIL import Image

import bench_search
import bench_tools
import bench_update
import conftest
import picture_episode
import plot_runs
import soak
from extras.search import Corpus


@pytest.mark.parametrize("own, other, code", [(0, "exit 0", 0), (0, "exit 1", 1), (1, "exit 0", 1),
                                              (0, "kill -9 $$", 1), (2, "kill -9 $$", 2)])
def test_the_suite_fails_where_its_other_process_fails(own, other, code):
    config = SimpleNamespace(elsewhere=subprocess.Popen(["sh", "-c", other]))
    session = SimpleNamespace(config=config, exitstatus=own)
    conftest.pytest_sessionfinish(session, own)
    assert session.exitstatus == code


def test_rows_and_trees_do_the_same_work(capsys):
    parser = argparse.ArgumentParser()
    bench_update.add_options(parser)
    bench_update.bench(parser.parse_args([
        "--device", "cpu", "--shape", "tiny", "--rounds", "1", "--prompt", "60",
        "--continuation", "20", "--group-size", "4"]))
    said = capsys.readouterr().out
    rows, tree = (line.split("gradient ")[1].split()[0] for line in said.split("\n")[1:3])
    assert rows == tree and "rows / tree: update" in said


def test_programs_are_timed_in_three_ways(sandbox, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = bench_tools.PROGRAMS["PIL rotate"]
    seconds, rate = bench_tools.measure(sandbox, code, bench_tools.photograph(), 1)
    assert set(seconds) == {"sandbox", "in-process", "fresh"} and rate > 0
    assert not (tmp_path / bench_tools.jail.OUTPUT).exists(), "each program's image was read"


def test_searches_of_a_generated_corpus_are_timed(tmp_path):
    path = tmp_path / "corpus.jsonl"
    bench_search.generate(path, 300)
    corpus = Corpus(path)
    assert corpus.size == 300
    assert len(bench_search.measure(corpus, ["w0", "w1 w2"])) == 2


def test_curves_are_drawn():
    curve = [{"step": step, "greedy": em, "sampled": em / 2} for step, em in ((0, 0.1), (5, 0.9))]
    drawn = plot_runs.draw([curve, curve])
    assert drawn.count("<polyline") == 6 and "2 seeds" in drawn


def test_an_episode_is_drawn(tmp_path):
    for name in ("input.png", "output.png"):
        Image.new("RGB", (56, 56)).save(tmp_path / name)
    code = {"action": "code", "text": "<code>\n```python\nx = 1\n```\n</code>",
            "image": "output.png"}
    episode = {"when": "after", "problems": ["dark", "blur"], "answer": "4", "gold": ["4"],
               "image": str(tmp_path / "input.png"), "question": "Which number?", "turns": [code]}
    lines = [episode | {"when": "before"}, episode]
    (tmp_path / "episodes.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert picture_episode.draw(tmp_path).height == picture_episode.SIDE + 96


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="needs /proc")
def test_a_process_is_watched(tmp_path):
    """A program that waits until its input is closed, then leaves a directory in place of a run."""
    program = ("import sys; sys.stdin.read(); import pathlib; "
               f"pathlib.Path({str(tmp_path / 'arft-left')!r}).mkdir()")
    process = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE)
    megabytes, files, processes, directories = soak.look(process.pid, tmp_path)
    assert megabytes > 0 and files >= 3 and (processes, directories) == (1, 0)
    start = soak.born(process.pid)
    assert start and soak.born(process.pid) == start
    process.communicate()
    assert soak.look(process.pid, tmp_path) == (0.0, 0, 0, 1) and not soak.born(process.pid)
