"""Task 9: search.Replay.search."""

import json

from extras.search import Replay
from tools import Passage, SearchError

from .check import expect


class Engine:
    """A back end that counts what it is asked, and fails for "fail"."""
    parallel = 1

    def __init__(self, name: str = "engine"):
        self.name, self.asked = name, []

    def search(self, query: str, k: int = 4) -> list[Passage]:
        self.asked.append((query, k))
        if query == "fail":
            raise SearchError("down")
        return [Passage(f"{self.name} {query}", "", str(i)) for i in range(k)]


def test_what_was_asked_once_is_not_asked_again():
    def twice():
        engine = Engine()
        replay = Replay(":memory:", engine)
        first, second = replay.search("Oslo", 2), replay.search("Oslo", 2)
        return len(engine.asked), [p.title for p in first], first == second
    titles = ["engine Oslo"] * 2
    expect(twice, (1, titles, True), {
        "the second search asks the engine again: nothing is recorded, or the record is not looked "
        "at": (2, titles, True),
        "the record gives lists back; it must give Passage objects": (1, titles, False),
    }, "the same search twice")


def test_another_number_of_passages_is_another_search():
    def lengths():
        replay = Replay(":memory:", Engine())
        return [len(replay.search(*asked)) for asked in (("Oslo", 2), ("Oslo", 3), ("Bern", 2))]
    expect(lengths, [2, 3, 2], {
        "k is not part of what is looked up": [2, 2, 2],
    }, "the same query with another k")


def test_each_engine_has_its_own_record(tmp_path):
    def titles():
        replays = [Replay(tmp_path / "r.sqlite", Engine(name)) for name in ("one", "two", "one")]
        for replay in replays:      # another's open transaction is an error at once
            replay.db.execute("PRAGMA busy_timeout = 0")
        return [replay.search("Oslo", 1)[0].title for replay in replays]
    expect(titles, ["one Oslo", "two Oslo", "one Oslo"], {
        "the row is written and never committed: another reader waits for it in vain; write inside "
        "`with self.db`": "raised OperationalError",
        "one engine's passages are given as another's: the back end's name is part of what is "
        "looked up": ["one Oslo"] * 3,
    }, "two engines, one record")


def test_without_an_engine_every_record_counts(tmp_path):
    def title():
        Replay(tmp_path / "r.sqlite", Engine("one")).search("Oslo", 1)
        return Replay(tmp_path / "r.sqlite").search("Oslo", 1)[0].title
    expect(title, "one Oslo", {
        "without a back end the record of any back end counts, here nothing is found":
            "raised SearchError",
        "without a back end there is no name to ask for": "raised AttributeError",
    }, "a record without an engine")


def test_without_an_engine_a_miss_is_an_error():
    replay = Replay(":memory:")
    expect(lambda: replay.search("Oslo"), "raised SearchError", {
        "without a back end a miss is a SearchError, not an empty list": [],
        "without a back end a miss is a SearchError; here the missing back end is asked":
            "raised AttributeError",
    }, "a miss without a back end")


def test_skip_does_not_ask_the_engine():
    replay = Replay(":memory:", Engine(), "skip")
    expect(lambda: replay.search("Oslo"), "raised SearchError", {
        "with miss='skip' a miss is a SearchError, not an empty list": [],
    }, "a miss with miss='skip'")
    expect(lambda: len(replay.backend.asked), 0, {
        "miss='skip' must not ask the engine": 1,
    }, "what miss='skip' asks")


def test_failures_are_not_recorded():
    def twice():
        engine = Engine()
        replay = Replay(":memory:", engine)
        said = []
        for _ in range(2):
            try:
                replay.search("fail", 1)
                said.append("nothing")
            except SearchError:
                said.append("error")
        return said, len(engine.asked)
    expect(twice, (["error", "error"], 2), {
        "a failure is recorded as an empty result: the engine may be up again":
            (["error", "nothing"], 1),
        "the engine's error is swallowed": (["nothing", "nothing"], 2),
        "the engine's error is swallowed and recorded": (["nothing", "nothing"], 1),
    }, "a search that fails, twice")


def test_hits_and_misses():
    def counts():
        replay = Replay(":memory:", Engine())
        for query in ("a", "b", "a", "a"):
            replay.search(query, 1)
        return replay.hits, replay.misses
    expect(counts, (2, 2), {
        "hits and misses are not counted": (0, 0),
        "each is counted twice": (4, 4),
        "only hits are counted": (2, 0),
        "only misses are counted": (0, 2),
        "every search is counted as a miss": (2, 4),
    }, "a b a a")


def test_the_record_can_be_read_by_others(tmp_path):
    def row():
        Replay(tmp_path / "r.sqlite", Engine()).search("Oslo", 1)
        rows = Replay(tmp_path / "r.sqlite").db.execute("SELECT * FROM searches")
        backend, query, k, found = rows.fetchone()
        return backend, query, k, json.loads(found)
    expect(row, ("engine", "Oslo", 1, [["engine Oslo", "", "0"]]), {
        "nothing is in the file: a transaction is finished by `with self.db`": "raised TypeError",
    }, "the row in the file")
