"""Task 3: rewards.tokens, rewards.harmonic, rewards.f1."""

import rewards

from .check import expect

PAIRS = (("the selected date is March 14, 2017", "March 14, 2017"), ("york york", "york city"),
         ("Oslo", "Oslo"))      # (prediction, gold)


def test_f1_by_hand():
    """First 3 words of 6 are right and all 3 are found: 2 * 3 / (6 + 3). Then one word of 2 is
    common: 2 * 1 / (2 + 2). Then the two are equal."""
    expect(lambda: [round(rewards.f1(*pair), 3) for pair in PAIRS], [0.667, 0.5, 1.0], {
        "f1 is the precision alone": [0.5, 0.5, 1.0],
        "f1 is the recall alone": [1.0, 0.5, 1.0],
        "f1 is the plain mean of precision and recall, not the harmonic one": [0.75, 0.5, 1.0],
        "the texts are not normalized: articles, case and punctuation must not count":
            [0.6, 0.5, 1.0],
        "the lengths are those of the sets: a repeated word must cost": [0.667, 0.667, 1.0],
        "a repeated word is found twice: count different tokens in both": [0.667, 1.0, 1.0],
        "2 is missing: the harmonic mean of two equal numbers is that number": [0.333, 0.25, 0.5],
    }, "three pairs")
    expect(lambda: rewards.f1("New York New York", "New York New York"), 0.5, {
        "common counts a repeated word twice; the official F1 shares different words": 1.0,
    }, "the official quirk")


def test_nothing_in_common():
    pairs = (("", "Oslo"), ("", "the"), ("Bern", "Oslo"))
    expect(lambda: [rewards.f1(*pair) for pair in pairs], [0.0, 0.0, 0.0], {
        "two empty texts divide by zero: nothing in common is worth 0.0":
            "raised ZeroDivisionError",
    }, "no common word")


def test_harmonic():
    expect(lambda: (rewards.harmonic(2, 4, 2), rewards.harmonic(0, 0, 0)), (4 / 6, 0.0), {
        "harmonic divides by zero if nothing is common": "raised ZeroDivisionError",
        "harmonic is the plain mean of precision and recall": (0.75, 0.0),
        "harmonic lacks the factor 2": (2 / 6, 0.0),
    }, "harmonic(2, 4, 2) and harmonic(0, 0, 0)")


def test_chinese_is_compared_by_characters():
    expect(lambda: rewards.f1("发票16", "发票 15"), 0.75, {
        "Chinese text is cut into words, but it has none: cut it into characters": 0.0,
    }, "a Chinese pair")
    expect(lambda: rewards.tokens("ab", "发票", True), (["a", "b"], ["发", "票"]), {
        "both texts are cut into characters as soon as one of them is Chinese":
            (["ab"], ["发", "票"]),
        "one Chinese text is enough for characters, it need not be both": (["ab"], ["发票"]),
    }, "one Chinese text")
    expect(lambda: rewards.tokens("发票 a", "b", False), (["发票", "a"], ["b"]), {
        "chinese=False is the scorer that knows no Chinese: cut into words":
            (["发", "票", " ", "a"], ["b"]),
    }, "chinese=False")
