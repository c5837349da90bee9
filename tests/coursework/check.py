"""How the assignments' tests fail: with the likely mistake in words, not with a difference of
arrays."""

import math

import pytest


def outcome(call):
    """What a call returns as plain lists, tuples and numbers, or "raised ValueError" and the like.
    """
    try:
        return plain(call())
    except NotImplementedError:
        raise                       # the stub's own message says which task it is
    except Exception as error:
        return f"raised {type(error).__name__}"


def plain(value):
    """Tensors and arrays as lists, inside lists, tuples and dictionaries, too."""
    if hasattr(value, "tolist"):        # asks without importing torch, which takes seconds
        return value.tolist()
    if type(value) in (list, tuple):
        return type(value)(plain(v) for v in value)
    return {k: plain(v) for k, v in value.items()} if isinstance(value, dict) else value


def same(a, b, tolerance: float = 1e-5) -> bool:
    """Whether two outcomes are equal, floats nearly. nan equals nan."""
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        pairs = zip(a, b, strict=False)
        return type(a) is type(b) and len(a) == len(b) and all(
            same(x, y, tolerance) for x, y in pairs)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k], tolerance) for k in a)
    numbers = isinstance(a, (int, float)) and isinstance(b, (int, float))
    if numbers and isinstance(a, bool) == isinstance(b, bool):
        return a == b or abs(a - b) <= tolerance or (math.isnan(a) and math.isnan(b))
    return a == b


def expect(call, expected, mistakes: dict, asked: str) -> None:
    """Passes if `call()` gives `expected`. Otherwise fails with the mistake that gives this result.

    mistakes: a mistake in words -> what it gives here; asked: the case in words, for a mistake that
    nobody has foreseen.
    """
    got = outcome(call)
    if same(got, expected):
        return
    for words, result in mistakes.items():
        if same(got, result):
            pytest.fail(words, pytrace=False)
    pytest.fail(f"{asked}: expected {short(expected)}, got {short(got)}", pytrace=False)


def short(value) -> str:
    """The value in at most 160 characters."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 160 else text[:157] + "..."
