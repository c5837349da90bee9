"""The commands that need no model, the options of the published benchmark, and bad rows on the
command line."""

import dataclasses
import json
from pathlib import Path

import huggingface_hub
import pytest

from arft import Config, main
from conftest import ROOT
from data import mat, mini
from extras import files, metrics, paper, record, setup, weights
from extras.options import UsageError
from policy import SEARCH_PROMPT, SYSTEM_PROMPT
from rewards import episode_reward
from test_mat import CODING, QA, steps, write_mat
from test_protocol import CROP, answer, attempt, evaluated, play, problem

SHARED = ROOT.parent / "shared"
MAT_SAMPLE = SHARED / "mat-sample" / "MAT"
CODING_7B = SHARED / "predictions" / "7b_mat_coding_grpo_step1400.json"
BAMBOOGLE_7B = SHARED / "predictions" / "7b_step200_bamboogle_web_n4.json"
published = pytest.mark.skipif(not CODING_7B.exists(),
                               reason="the published files are not beside this checkout")


@pytest.fixture
def no_model(monkeypatch):
    """The commands without a model must not load one."""
    def load_nothing(*arguments):
        raise AssertionError("a model was loaded")
    monkeypatch.setattr(weights, "load", load_nothing)


def said_by(capsys, *arguments) -> tuple[int, str, str]:
    code = main([str(a) for a in arguments])
    out = capsys.readouterr()
    assert "Traceback" not in out.err
    return code, out.out, out.err


def numbers(text: str, start: str) -> list[float]:
    """The numbers of the one line that begins with `start`."""
    line, = (line for line in text.splitlines() if line.startswith(start))
    rest = line[len(start):]
    for sign in "[],":
        rest = rest.replace(sign, " ")
    return [float(word) for word in rest.split()]


# --- --score --------------------------------------------------------------------------------------


@published
def test_the_published_coding_predictions_score_as_published(no_model, capsys):
    code, out, _ = said_by(capsys, "--score", CODING_7B)
    parts = out.split("repaired ")
    assert code == 0 and len(parts) == 2
    for name, n, em, f1 in (("official", 200, 34.50, 50.67), ("  simple", 70, 51.43, 60.10),
                            ("  hard", 130, 25.38, 45.60)):
        row = numbers(parts[0], name)
        assert (row[0], row[1], row[4]) == (n, em, f1)
        assert row[2] < em < row[3] and row[5] < f1 < row[6]
    repaired = numbers("repaired " + parts[1], "repaired")
    # exact match as in our notes on the golds
    assert (repaired[1], repaired[4]) == (41.0, 56.69)


@published
def test_the_published_bamboogle_predictions_score_as_published(no_model, capsys):
    code, out, _ = said_by(capsys, "--task", "bamboogle", "--score", BAMBOOGLE_7B)
    row = numbers(out, "official")
    assert code == 0 and (row[0], row[1], row[4]) == (125, 48.80, 60.15)
    assert "simple" not in out and "scored as bamboogle" in out


# --- --compare ------------------------------------------------------------------------------------


def predictions(path: Path, *answers) -> Path:
    rows = [{"id": i, "gt": ["yes"], "pred_answer": answer}
            for i, answer in enumerate(answers, start=1)]
    path.write_text(json.dumps(rows))
    return path


def test_compare_prints_the_difference_item_by_item(no_model, capsys, tmp_path):
    a = predictions(tmp_path / "a.json", "yes", "no", "no", "no")
    b = predictions(tmp_path / "b.json", "yes", "yes", "yes", "never")
    code, out, _ = said_by(capsys, "--task", "mat-search", "--compare", a, b)
    assert code == 0 and "4 items as mat-search, 3 with another answer" in out
    for line in ("official, EM", "official, F1", "repaired, EM", "repaired, F1"):
        row = numbers(out, line)
        assert row[:3] == [25.0, 75.0, 50.0] and row[5:] == [2, 0]
        assert 0 <= row[3] < 50 < row[4] <= 100
    _, out, _ = said_by(capsys, "--task", "mat-search", "--compare", b, a)
    assert numbers(out, "official, EM")[2] == -50.0


@published
def test_a_file_does_not_differ_from_itself(no_model, capsys):
    _, out, _ = said_by(capsys, "--compare", CODING_7B, CODING_7B)
    assert "200 items as mat-coding, 0 with another answer" in out
    assert numbers(out, "official, F1") == [50.67, 50.67, 0, 0, 0, 0, 0]


def test_files_of_other_items_are_not_compared(no_model, capsys, tmp_path):
    a, b = predictions(tmp_path / "a.json", "yes", "no"), predictions(tmp_path / "b.json", "yes")
    code, _, err = said_by(capsys, "--compare", a, b)
    assert code == 2 and "item '2' is missing" in err


# --- --check-data ---------------------------------------------------------------------------------


def test_check_data_ends_with_0_without_and_1_with_defects(no_model, capsys, tmp_path):
    write_mat(tmp_path, "mat-coding", "test", [CODING], images=["a_proc.png"])
    code, out, _ = said_by(capsys, "--check-data", "--data", tmp_path)
    assert code == 0 and "MAT-Coding.json: 1 samples (test)" in out and out.endswith("defects: 0\n")
    write_mat(tmp_path, "mat-coding", "test",
              [CODING, {**CODING, "id": 72, "answers": ["A\\nB"]}, {"id": 3}])
    code, out, _ = said_by(capsys, "--check-data", "--data", tmp_path)
    assert code == 1 and out.endswith("defects: 2\n")
    assert "id 72: literal \\n in gold" in out and "row 3: field 'question' is missing" in out


def test_check_data_without_data_checks_what_a_run_would_use(no_model, capsys, tmp_path,
                                                             monkeypatch):
    write_mat(tmp_path, "mat-coding", "test", [CODING], images=["a_proc.png"])
    monkeypatch.setattr(mini, "ensure", lambda cache: tmp_path)
    code, out, _ = said_by(capsys, "--check-data", "--device", "cpu")
    assert code == 0 and str(tmp_path) in out


def test_check_data_without_any_file_is_bad_input(no_model, capsys, tmp_path):
    code, _, err = said_by(capsys, "--check-data", "--data", tmp_path)
    assert code == 2 and "no such file" in err


def test_a_flashrag_file_as_large_as_2wiki_is_checked(no_model, capsys, tmp_path):
    file = tmp_path / "2wikimultihopqa" / "dev.jsonl"
    file.parent.mkdir()
    file.write_text("".join(json.dumps({**QA, "id": f"dev_{i}"}) + "\n" for i in range(12_576)))
    code, out, _ = said_by(capsys, "--task", "2wiki", "--check-data", "--data", tmp_path)
    assert code == 0 and "dev.jsonl: 12,576 samples (test)" in out
    assert "train.jsonl: not there (train)" in out


def test_two_commands_at_once_are_bad_input(capsys, tmp_path):
    file = predictions(tmp_path / "a.json", "yes")
    code, _, err = said_by(capsys, "--score", file, "--check-data")
    assert code == 2 and "--check-data and --score" in err
    with pytest.raises(SystemExit) as stop:
        main(["--compare", str(file)])
    assert stop.value.code == 2 and "expected 2 arguments" in capsys.readouterr().err


# --- bad rows on the command line -----------------------------------------------------------------


@pytest.mark.parametrize("split, rows, options, words", [
    ("test", [CODING, {**CODING, "answers": []}], ["--eval-only"],
     ["MAT-Coding.json", "row 2", "'answers'"]),
    ("train", [*steps(), {**steps()[0], "solution": "dark"}], [],
     ["rft_agent_code_1_2k.json", "row 4", "'solution'"]),
    ("train", [*steps(), {**steps()[0], "context": 3}], ["--protocol", "paper"],
     ["rft_agent_code_1_2k.json", "row 4", "'context'"])])
def test_a_bad_row_of_mat_names_file_row_and_field(capsys, tmp_path, no_model, split, rows, options,
                                                   words):
    write_mat(tmp_path / "MAT", "mat-coding", "test", [CODING], images=["a_proc.png"])
    write_mat(tmp_path / "MAT", "mat-coding", split, rows)
    out = tmp_path / "run"
    code, _, err = said_by(capsys, "--model", ROOT / "data" / "tiny", "--data", tmp_path / "MAT",
                           "--out", out, *options)
    assert code == 2 and all(word in err for word in words) and err.count("\n") <= 2
    assert not out.exists()


def test_a_bad_row_of_flashrag_names_file_row_and_field(capsys, tmp_path, no_model):
    file = tmp_path / "dev.jsonl"
    file.write_text(json.dumps(QA) + "\n" + json.dumps({**QA, "golden_answers": None}) + "\n")
    code, _, err = said_by(capsys, "--task", "musique", "--eval-only", "--model",
                           ROOT / "data" / "tiny", "--data", file)
    assert code == 2 and all(word in err for word in ("dev.jsonl", "row 2", "'golden_answers'"))


@pytest.mark.parametrize("row, field", [
    ({"id": 2, "gt": []}, "'gt'"), ({"id": 2, "gt": "x", "pred_answer": 5}, "'pred_answer'"),
    ({"id": 2, "gt": "x"}, "'pred_answer'")])
@pytest.mark.parametrize("command", ["--score", "--compare"])
def test_a_bad_row_of_predictions_names_file_row_and_field(capsys, tmp_path, no_model, command, row,
                                                           field):
    file = tmp_path / "predictions.json"
    file.write_text(json.dumps([{"id": 1, "gt": "x", "pred_answer": None}, row]))
    code, _, err = said_by(capsys, command, *[file] * (2 if command == "--compare" else 1))
    assert code == 2 and all(word in err for word in ("predictions.json", "row 2", field))


# --- the hub --------------------------------------------------------------------------------------


class Hub:
    """Stands in for huggingface_hub.snapshot_download: makes the files that it is asked for, or
    cannot be reached."""

    def __init__(self, folder: Path, reachable: bool):
        self.folder, self.reachable, self.asked = folder, reachable, []

    def __call__(self, name, repo_type, allow_patterns=None):
        self.asked.append((name, repo_type, allow_patterns))
        if not self.reachable:
            raise OSError("no network")
        for file in allow_patterns or []:
            (self.folder / file).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / file).write_text(json.dumps(QA) + "\n")
        return str(self.folder)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    def make(reachable: bool) -> Hub:
        made = Hub(tmp_path / "cache", reachable)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", made)
        return made
    return make


@pytest.mark.parametrize("task, only_test, files", [
    ("2wiki", True, ["2wikimultihopqa/dev.jsonl"]), ("bamboogle", True, ["bamboogle/test.jsonl"]),
    ("musique", False, ["musique/dev.jsonl", "musique/train.jsonl"]),
    ("bamboogle", False, ["bamboogle/test.jsonl"])])
def test_only_the_files_of_the_task_are_fetched(hub, task, only_test, files):
    asked = hub(reachable=True)
    config = Config(task=task, eval_only=only_test, model=str(ROOT / "data" / "tiny"), device="cpu")
    said = setup.complete(config)
    assert asked.asked == [(setup.HUB_QA, "dataset", files)]
    assert config.data == str(asked.folder) and any(setup.HUB_QA in line for line in said)
    assert len(mat.load(task, config.data, "test")) == 1


def test_check_data_fetches_the_test_file_alone(hub, capsys, no_model):
    asked = hub(reachable=True)
    code, out, _ = said_by(capsys, "--task", "hotpotqa", "--check-data")
    assert code == 0 and "dev.jsonl: 1 samples" in out
    assert asked.asked == [(setup.HUB_QA, "dataset", ["hotpotqa/dev.jsonl"])]


@pytest.mark.parametrize("arguments, command", [
    (["--task", "2wiki", "--eval-only"],
     "hf download RUC-NLPIR/FlashRAG_datasets 2wikimultihopqa/dev.jsonl --repo-type dataset "
     "--local-dir DIR"),
    (["--task", "mat-search", "--eval-only"],
     "hf download laolao77/MAT --repo-type dataset --local-dir DIR")])
def test_without_network_the_message_says_what_to_download_and_where_to_put_it(
        hub, capsys, no_model, monkeypatch, arguments, command):
    hub(reachable=False)
    # for an embedded model, MAT-mini would be drawn
    monkeypatch.setattr(setup, "is_small", lambda model: False)
    code, _, err = said_by(capsys, *arguments, "--model", ROOT / "data" / "tiny")
    assert code == 2 and command in err and "--data DIR" in err and "OSError" in err
    assert err.count("\n") == 2


def test_a_file_that_the_hub_does_not_have_is_named(hub, monkeypatch, tmp_path):
    hub(reachable=True)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: str(tmp_path))
    with pytest.raises(UsageError, match="musique/dev.jsonl is not among its files"):
        setup.fetch(setup.HUB_QA, "dataset", ["musique/dev.jsonl"])


# --- system prompt, scorer, protocols -------------------------------------------------------------


def run(tmp_path, *arguments, name="run"):
    out = tmp_path / name
    code = main(["--model", str(ROOT / "data" / "tiny"), "--out", str(out), *map(str, arguments)])
    return code, out


SHORT = ("--steps", 1, "--samples-per-step", 2, "--group-size", 2, "--eval-samples", 2,
         "--eval-sampled", "off", "--max-turns", 2, "--max-new-tokens", 48)


@pytest.mark.parametrize("protocol", ["episodes", "paper"])
def test_the_users_words_reach_the_model_and_travel_with_it(tmp_path, protocol, monkeypatch):
    words, asked = tmp_path / "words.txt", []
    words.write_text("Read the sign, pleäse.\n", encoding="utf-8")
    module = paper if protocol == "paper" else setup
    true = module.rollout

    def listening(policy, *arguments, **more):
        asked.append(policy.system_prompt)
        return true(policy, *arguments, **more)
    monkeypatch.setattr(module, "rollout", listening)
    code, out = run(tmp_path, *SHORT, "--system-prompt", words, "--protocol", protocol)
    assert code == 0 and set(asked) == {"Read the sign, pleäse."}
    assert weights.load(str(out / "model")).system_prompt == "Read the sign, pleäse."


def test_a_file_of_words_that_cannot_be_used(tmp_path, capsys):
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    for name, words in (("gone.txt", "cannot be read"), ("bytes.txt", "UTF-8"),
                        ("empty.txt", "is empty")):
        code, out = run(tmp_path, *SHORT, "--system-prompt", tmp_path / name)
        err = capsys.readouterr().err
        assert code == 2 and words in err and name in err and not out.exists()


def test_whose_words_are_used(tmp_path, policy):
    words = tmp_path / "words.txt"
    words.write_text("Hello.")
    own = policy.system_prompt
    assert setup.choose_prompt(Config(), policy) == own
    assert setup.choose_prompt(Config(task="mat-search"), policy) == own
    assert setup.choose_prompt(Config(system_prompt=str(words)), policy) == "Hello."
    # a checkpoint that brings none
    plain = type(policy)(policy.model, policy.tokenizer, policy.image_processor)
    assert setup.choose_prompt(Config(), plain) == SYSTEM_PROMPT
    assert setup.choose_prompt(Config(task="mat-search"), plain) == SEARCH_PROMPT


@pytest.mark.parametrize("scorer, other, right", [("official", "repaired", 0.0),
                                                  ("repaired", "official", 1.0)])
def test_the_scorer_is_that_of_reward_and_summary_and_tables_print_both(
        policy, samples, monkeypatch, tmp_path, scorer, other, right):
    sample = dataclasses.replace(*samples(("none",)), golds=("FOOD\\nDIRECTORY",))
    play(monkeypatch, policy, answer("FOOD DIRECTORY"))
    config = Config(out=str(tmp_path / "run"), scorer=scorer, max_new_tokens=96)
    summary, _, earned = evaluated(policy, sample, config)
    assert summary["em"] == right and summary[other]["em"] == 1 - right and scorer not in summary
    assert summary["by_problem"]["none"]["em"] == right
    assert earned.parts["answer"] == right
    text = files.table({"before": summary | {"sampled": summary}})
    assert numbers(text, f"  {other} scorer")[1] == 100 * (1 - right)
    assert numbers(text, "before, greedy")[1] == 100 * right


def test_a_program_that_ran_otherwise_than_written_is_in_the_record(policy, samples, tools,
                                                                    monkeypatch, tmp_path):
    sample = dataclasses.replace(*samples(("none",)),
                                 question="Read the text in [0, 250, 500, 500].")
    play(monkeypatch, policy, problem("crop"), CROP, answer("1"))
    episode, = attempt(policy, [sample], tools)
    kept = record.Run(Config(out=str(tmp_path / "run"))).episode_record(
        "before", 0, episode, episode_reward(episode), None, True)
    first, second = kept["turns"][:2]
    assert "[28:56, 0:56]" in second["ran"] and "[3:9, 2:40]" in second["text"]
    assert first["ran"] is None and (tmp_path / "run" / second["image"]).exists()


def test_what_a_row_does_not_have_is_not_averaged(policy, samples, monkeypatch):
    """Of a problem row and an answer row, every completion names the problem: all problems are
    right, no answer is."""
    sample, = samples(("dark",))
    shared = {"id": "1", "question": "?", "image_path": sample.image_path}
    rows = [mat.StepSample(**shared, golds=(), problems=("dark",), kind="problem",
                           formats=("problem",)),
            mat.StepSample(**shared, golds=("1",), kind="answer", formats=("answer",))]
    play(monkeypatch, policy, problem("dark"))
    episodes = attempt(policy, rows, group_size=2)
    rewards = [paper.reward(episode) for episode in episodes]
    assert [reward.total for reward in rewards] == [2, 2, 0, 0]
    step = metrics.step_metrics(1, episodes, rewards, {}, 1.0, {}, 2)
    names = ("problem", "answer", "em", "accuracy", "format")
    assert [step[name] for name in names] == [1, 0, 0, 0.5, 0.5]


def test_dr_grpo_divides_by_the_turns_that_the_protocol_has():
    assert Config(max_new_tokens=10, max_turns=5).max_sampled == 50
    assert Config(max_new_tokens=10, max_turns=5, protocol="paper").max_sampled == 10


@published
@pytest.mark.parametrize("protocol, training, at_once", [("episodes", 2, 1), ("paper", 5, 3)])
def test_two_steps_on_the_published_rows(tmp_path, capsys, protocol, training, at_once):
    """Every training row is seen at least once."""
    code, out = run(tmp_path, "--task", "mat-coding", "--steps", 2, "--data", MAT_SAMPLE,
                    "--protocol", protocol, "--samples-per-step", at_once, "--group-size", 2,
                    "--max-turns", 3, "--zero-variance", "keep", "--inner-epochs", 1,
                    "--minibatches", 1)
    assert code == 0 and f"4 held-out samples, {training} for training" in capsys.readouterr().out
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert len(steps) == 2 and all(m["logp_error"] < 1e-4 for m in steps)
    assert ("accuracy" in steps[0]) == (protocol == "paper")
    if protocol == "paper":
        assert all(m["turns"] == 1 and m["tool_calls"] == 0 for m in steps)
    for when in ("before", "after"):
        rows = json.loads((out / f"predictions-{when}.json").read_text())
        assert [row["id"] for row in rows] == [12, 22, 63, 119]
    summary = json.loads((out / "summary.json").read_text())
    assert set(summary["before"]) >= {"em", "repaired", "sampled"}
    assert main(["--score", str(out / "predictions-after.json")]) == 0


@published
def test_one_step_on_the_published_search_row(tmp_path):
    code, out = run(tmp_path, "--task", "mat-search", "--steps", 1, "--data", MAT_SAMPLE,
                    "--protocol", "paper", "--samples-per-step", 1, "--group-size", 2,
                    "--zero-variance", "keep", "--tools", "off", "--inner-epochs", 1,
                    "--minibatches", 1)
    assert code == 0
    step = json.loads((out / "metrics.jsonl").read_text())
    assert step["answer"] == step["em"] == step["problem"] == 0.0 and step["updates"] == 1
