"""MAT-mini: signs are drawn, damages hide the number, programs restore it, and the files are laid
out as MAT's are."""

import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image, ImageChops, ImageStat

from data import mat, mini
from extras import files


def distance(a: Image.Image, b: Image.Image) -> float:
    """Mean absolute difference of two equally large images, in grey levels."""
    return sum(ImageStat.Stat(ImageChops.difference(a, b)).mean) / 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return mini.write(tmp_path_factory.mktemp("mini") / "MAT")


def test_held_out_texts_are_never_trained_on(folder):
    train, test = (mat.load("mat-coding", folder, split) for split in ("train", "test"))
    golds = [{gold for sample in part for gold in sample.golds} for part in (train, test)]
    assert golds[0] <= set(mini.texts("train")) and golds[1] <= set(mini.texts("test"))
    assert not golds[0] & golds[1]
    pixels = [{sample.image_path.read_bytes() for sample in part} for part in (train, test)]
    assert not pixels[0] & pixels[1]


def test_counts_and_splits_follow_mat(folder):
    test = mat.load("mat-coding", folder, "test")
    assert Counter(sample.split for sample in test) == {"simple": 98, "hard": 102}
    assert [sample.id for sample in test] == [str(i) for i in range(1, 201)]
    simple = {sample.problems for sample in test if sample.split == "simple"}
    assert simple == {(p,) for p in mini.SINGLES}
    assert {s.problems for s in test if s.split == "hard"} == {("crop",), *mini.DOUBLES}
    crops = [sample for sample in test if sample.problems == ("crop",)]
    assert {crop.open_image().size for crop in crops} == {(224, 224)}, "the whole board is shown"
    assert set(mat.PROBLEMS) == {*mini.SINGLES, "crop"}
    train = mat.load("mat-coding", folder, "train")
    assert Counter(s.problems for s in train) == {**{(p,): 50 for p in (*mini.SINGLES, "crop")},
                                                  **{d: 25 for d in mini.DOUBLES}}


def test_the_checker_of_mat_finds_no_defect(folder):
    _, defects = files.check("mat-coding", folder)
    assert defects == []


def test_training_rows_are_single_steps_with_the_gold_program(folder, sandbox):
    """The gold program of a row runs in the sandbox on the row's image and gives an image of the
    size of one sign."""
    home = folder / "MAT-Training"
    rows = json.loads((home / "rft_agent_code_1_2k.json").read_text())
    assert Counter(row["type"] for row in rows) == {"pre_problem": 600, "pre_code": 550,
                                                    "pre_answer": 600}
    for row in [row for row in rows if row["type"] == "pre_code"][::97]:
        image = mat.read_image(home / "rft_agent_code_1_2k_images" / row["image_path"])
        done = sandbox.run(row["solution"].split("```python\n")[1].split("```")[0], image)
        assert done.error is None and done.image.size == (mini.SIDE, mini.SIDE)


@pytest.mark.parametrize("problems", [
    *((p,) for p in mini.SINGLES if p not in ("none", "blur", "noise")),
    ("rotation90", "dark"), ("rotation180", "overexposure")])
def test_every_wording_of_a_repair_restores_the_picture(problems, sandbox):
    """A program can undo rotations and changes of brightness almost exactly. Repairs of blur and
    noise are judged by whether the model can read the number (data/tiny/README.md)."""
    for seed in range(4):
        rng = np.random.default_rng(seed)
        sample = mini.make_sample(problems, mini.texts("test"), rng)
        done = sandbox.run(mini.program(problems, sample["box"], rng), sample["shown"])
        damaged = distance(sample["shown"], sample["clean"])
        assert distance(done.image, sample["clean"]) < 14 < damaged


def test_a_crop_cuts_out_the_sign_of_the_question(sandbox):
    rng = np.random.default_rng(0)
    sample = mini.make_sample(("crop",), mini.texts("test"), rng)
    assert str(list(sample["box"])) in sample["question"] and sample["shown"].size == (224, 224)
    done = sandbox.run(mini.program(("crop",), sample["box"], rng), sample["shown"])
    assert distance(done.image, sample["clean"]) < 3


def test_rotation90_is_undone_clockwise():
    """As in MAT: the stored image reads bottom to top, and a clockwise turn makes it upright."""
    sign = mini.draw_sign("47", np.random.default_rng(0))
    stored = mini.damage(sign, "rotation90", np.random.default_rng(0))
    assert distance(stored.transpose(Image.Transpose.ROTATE_270), sign) == 0
    assert distance(stored.transpose(Image.Transpose.ROTATE_90), sign) > 5


def test_the_same_seed_draws_the_same_files(folder, tmp_path):
    again, other = mini.write(tmp_path / "again"), mini.write(tmp_path / "other", seed=1)
    name = "MAT-Benchmark/MAT-Coding-image/noise_3_proc.png"
    drawn = (folder / name).read_bytes()
    assert (again / name).read_bytes() == drawn != (other / name).read_bytes()


def test_a_half_drawn_folder_is_never_left(tmp_path, monkeypatch):
    monkeypatch.setattr(mini, "make_sample", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        mini.write(tmp_path / "MAT")
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_problem_is_named():
    with pytest.raises(ValueError, match="unknown problem 'fog'"):
        mini.damage(Image.new("RGB", (4, 4)), "fog", np.random.default_rng(0))
