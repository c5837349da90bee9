"""Task 10: mini.noise, rewards.problem_reward, and every problem of MAT-mini; also your own, once
you have added it."""

from functools import partial

import numpy as np
import pytest
from PIL import Image, ImageChops, ImageEnhance, ImageFilter, ImageOps, ImageStat

import rewards
from data import mini

from .check import expect

SIGN = Image.new("RGB", (100, 80), (10, 20, 30))
NAMES = {"Image": Image, "ImageEnhance": ImageEnhance, "ImageFilter": ImageFilter,
         "ImageOps": ImageOps}


def noisy():
    return mini.noise(SIGN.copy(), np.random.default_rng(0))


def kinds():
    """The rounded shares of white pixels, of unchanged ones and of any others."""
    pixels = np.asarray(noisy()).reshape(-1, 3)
    white, same = (pixels == 255).all(1), (pixels == (10, 20, 30)).all(1)
    return [round(float(share.mean()), 1) for share in (white, same, ~white & ~same)]


def test_noise():
    expect(kinds, [0.8, 0.2, 0.0], {
        "the share is turned round: 0.8 of the pixels become white, 0.2 stay": [0.2, 0.8, 0.0],
        "each channel is drawn on its own; a pixel turns white as a whole": [0.5, 0.0, 0.5],
        "the pixels turn black (or another colour), not white": [0.0, 0.2, 0.8],
        "no pixel has changed": [0.0, 1.0, 0.0],
        "np.asarray of an image can only be read: copy it first": "raised ValueError",
    }, "shares of white, unchanged, other")
    expect(lambda: (noisy().size, noisy().mode), ((100, 80), "RGB"), {
        "width and height are exchanged: arrays are [height, width]": ((80, 100), "RGB"),
        "width and height of the mask are exchanged: arrays are [height, width]":
            "raised IndexError",
    }, "size and mode")


def test_noise_leaves_the_image_and_chance_alone():
    def untouched():
        image = SIGN.copy()
        mini.noise(image, np.random.default_rng(0))
        return image.tobytes() == SIGN.tobytes()
    expect(untouched, True, {
        "the image that was passed in is changed: make a new one": False,
    }, "the image passed in")
    expect(lambda: noisy().tobytes() == noisy().tobytes(), True, {
        "the noise is not drawn from rng: the same seed must draw the same picture": False,
    }, "the same seed twice")
    rng = np.random.default_rng(0)
    expect(lambda: mini.noise(SIGN, rng).tobytes() == mini.noise(SIGN, rng).tobytes(), False, {
        "every picture has the same noise: draw from the rng that was passed in": True,
    }, "two pictures of one generator")


def test_the_reward_of_a_problem():
    gold = ("rotation90", "dark")
    stated = (("dark", "rotation90"), ("rotation90",), ("rotation90", "dark", "blur"), None,
              ("dark", "dark", "rotation90"))
    expect(lambda: [rewards.problem_reward(labels, gold) for labels in stated],
           [1.0, 0.0, 0.0, 0.0, 1.0], {
        "the order of the labels counts: compare sets": [0.0] * 5,
        "the order or number of the labels counts: compare sets": [1.0, 0.0, 0.0, 0.0, 0.0],
        "half is given for one of two problems; nothing without rotation_credit":
            [1.0, 0.5, 0.0, 0.0, 1.0],
        "naming one right problem is enough for the whole reward; the sets must be equal":
            [1.0, 1.0, 1.0, 0.0, 1.0],
        "naming more than there is pays: the sets must be equal": [1.0, 0.0, 1.0, 0.0, 1.0],
        "naming less than there is pays: the sets must be equal": [1.0, 1.0, 0.0, 0.0, 1.0],
        "no diagnosis (None) must give 0": "raised TypeError",
    }, "five diagnoses")
    cases = ((("rotation90",), gold), (("dark",), gold), (("rotation180",), gold),
             (("rotation90",), ("rotation90",)), (("rotation90",), ("dark", "blur")))
    expect(lambda: [rewards.problem_reward(*case, rotation_credit=True) for case in cases],
           [0.5, 0.0, 0.0, 1.0, 0.0], {
        "rotation_credit gives half for either problem; only the rotation earns it":
            [0.5, 0.5, 0.0, 1.0, 0.0],
        "rotation_credit gives nothing": [0.0, 0.0, 0.0, 1.0, 0.0],
        "rotation_credit gives half for any rotation; it must be the right one":
            [0.5, 0.0, 0.5, 1.0, 0.0],
        "rotation_credit gives half if the gold has no rotation": [0.5, 0.0, 0.0, 1.0, 0.5],
    }, "rotation_credit")


def distance(a: Image.Image, b: Image.Image) -> float:
    """Mean absolute difference in grey levels."""
    return sum(ImageStat.Stat(ImageChops.difference(a, b)).mean) / 3


def repaired(line: str, image: Image.Image) -> Image.Image:
    """The image after one line of REPAIRS, run as `mini.program` would run it."""
    names = NAMES | {"image": image}
    exec(line, names)
    return names["image"]


def test_every_problem_hides_and_every_repair_restores():
    """For every problem in SINGLES, the damage changes the picture, and each wording of its repair
    brings it nearer to the clean one.

    blur is an exception: sharpening makes the number readable again but the background uneven
    (data/tiny/README.md has the measurements).
    """
    sign = mini.draw_sign("47", np.random.default_rng(1))
    for problem in [p for p in mini.SINGLES if p not in ("none", "blur")]:
        damaged = mini.damage(sign, problem, np.random.default_rng(2))
        off = distance(damaged, sign)
        if off < 5:
            pytest.fail(f"the damage {problem!r} changes the picture by {off:.1f} grey levels: it "
                        "hides nothing", pytrace=False)
        if not mini.REPAIRS.get(problem):
            pytest.fail(f"REPAIRS has no line for {problem!r}: nobody could show how to undo it",
                        pytrace=False)
        for line in mini.REPAIRS[problem]:
            left = distance(repaired(line, damaged), sign)
            if left >= off:
                pytest.fail(f"the repair {line!r} leaves {left:.1f} grey levels of {off:.1f}: it "
                            f"does not undo {problem!r}", pytrace=False)


def test_a_problem_can_be_named_and_rewarded():
    for problem in mini.SINGLES:
        sample = mini.make_sample((problem,), mini.texts("test"), np.random.default_rng(3))
        paid = partial(rewards.problem_reward, (problem,), sample["problems"])
        expect(paid, 1.0, {
            "the right diagnosis of a drawn sample is worth nothing": 0.0,
        }, problem)
