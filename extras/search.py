"""What answers a search: a corpus on disk, Google by the Serper API, or a record of searches.

`tools.search_all` asks one of the three back ends. `Corpus` searches passages offline by BM25,
`Serper` asks Google as in the paper, and `Replay` stands in front of either of them, so that what
was asked once costs nothing and is the same ever after. `SentenceSimilarity` compares the agent's
queries with the gold ones by sentence embeddings, as in the paper; the lesson's default,
`rewards.lexical_similarity`, needs no model.

A search that fails raises `tools.SearchError`, and the model is shown why. Its text is part of the
episode, so a change of these messages changes what the model sees. `SearchRefused` ends the run.
"""

import itertools
import json
import re
import sqlite3
import threading
import time
import unicodedata
from pathlib import Path

import requests
import torch
from tqdm import tqdm

from tools import Passage, SearchBackend, SearchError


class SearchRefused(ValueError):
    """No search can work: the key is wrong, or the corpus cannot be read. Ends the run.

    The text names the cause and the cure.
    """


# --- A corpus on disk -----------------------------------------------------------------------------

FREQUENT = 500              # the index stores how many passages have a word if more than this do
RANKED_PASSAGES = 5000      # passages that one query may rank: about ten milliseconds


class Corpus:
    """BM25 over passages on disk, offline: SQLite's FTS5 in one file.

    It copes with millions of passages and holds nothing in memory.

    path: a .jsonl file, or the .sqlite index that was made from one. A line of the .jsonl file is
    {"id", "title", "text"} or, as in FlashRAG, {"id", "contents": "title\\ntext"}. The index is
    written to PATH.sqlite, once, with a progress bar; if that is interrupted, the next start
    continues. Words are runs of letters and digits: text without blanks between its words (Chinese)
    is not split. Raises SearchRefused, which names the file and the line, for what cannot be read.
    """
    parallel = 1            # more searches at once would be no faster: the disk is the limit

    def __init__(self, path: str | Path):
        source = Path(path)
        is_index = source.suffix == ".sqlite"
        self.index = source if is_index else source.with_name(source.name + ".sqlite")
        if not source.exists():
            raise SearchRefused(f"corpus {source}: no such file; "
                                "--corpus needs a .jsonl file with one passage per line")
        try:
            self.db = sqlite3.connect(self.index, check_same_thread=False)
            if not is_index:
                build_index(source, self.db)
            found = self.db.execute("SELECT value FROM facts WHERE name = 'passages'").fetchone()
            self.size, = found
        except (sqlite3.Error, OSError, TypeError) as error:
            raise SearchRefused(f"corpus index {self.index}: {error}; "
                                "remove it to build it again from its .jsonl file") from None
        self.name = f"corpus {source.name.removesuffix('.sqlite')} ({self.size} passages)"

    def search(self, query: str, k: int = 4) -> list[Passage]:
        """The k best passages, best first; fewer or none if fewer share a word with the query."""
        found: dict[int, None] = {}
        for match, order in self._plan(query_words(query)):
            rows = self.db.execute(f"SELECT rowid FROM passages WHERE passages MATCH ? {order} "
                                   "LIMIT ?", (match, k))
            found |= dict.fromkeys(rowid for rowid, in rows)
            if len(found) >= k:
                break
        select = "SELECT title, url, text FROM passages WHERE rowid = ?"
        return [Passage(*self.db.execute(select, (rowid,)).fetchone()) for rowid in list(found)[:k]]

    def _plan(self, words: list[str]):
        """FTS5 expressions with their order, to be tried one after the other until k are found.

        Plain BM25 over all words costs some microseconds for each passage that has any of the
        words. If that is too much, the first expression asks for passages that have all words which
        distinguish passages, the second for those with one of the rarest words, the last for any.
        """
        lookup = "SELECT doc FROM frequent WHERE term = ?"
        count = {word: (self.db.execute(lookup, (word,)).fetchone() or (FREQUENT,))[0]
                 for word in words}
        words = sorted(words, key=count.get)
        if not words:
            return
        if sum(count.values()) <= RANKED_PASSAGES or self.size <= RANKED_PASSAGES:
            yield any_of(words), "ORDER BY rank"
            return
        telling = [word for word in words if count[word] <= self.size / 20] or words[:1]
        cheap = sum(count[word] for word in telling) <= 50 * RANKED_PASSAGES
        order = "ORDER BY rank" if cheap and len(telling) > 1 else ""
        yield " AND ".join(f'"{word}"' for word in telling), order
        totals = itertools.accumulate(count[word] for word in words)
        rare = [word for word, total in zip(words, totals) if total <= RANKED_PASSAGES]
        yield any_of(rare or words[:1]), "ORDER BY rank" if rare else ""
        yield any_of(words), ""


def any_of(words: list[str]) -> str:
    """The FTS5 expression for a passage that has at least one of the words."""
    return " OR ".join(f'"{word}"' for word in words)


def query_words(query: str) -> list[str]:
    """The different words of a query, folded as the index folds them: no case and no accents.

    Punctuation only separates words.

    >>> query_words('Who was "Zoë" AND (the café)?')
    ['who', 'was', 'zoe', 'and', 'the', 'cafe']
    """
    letters = unicodedata.normalize("NFKD", query[:1000])
    plain = "".join(letter for letter in letters if not unicodedata.combining(letter))
    return list(dict.fromkeys(re.findall(r"[^\W_]+", plain.lower())))[:32]


def build_index(source: Path, db: sqlite3.Connection, batch: int = 20_000) -> None:
    """Fill the index from where it stands.

    A batch of passages and the place in the file that it reaches are stored in one transaction, so
    an interrupted index never has a passage twice.
    """
    facts = open_index(source, db)
    if "passages" in facts:
        return
    line, size = facts["line"], source.stat().st_size
    with open(source, "rb") as file, tqdm(total=size, initial=facts["place"], unit="B",
                                          unit_scale=True, desc=f"indexing {source.name}",
                                          leave=False) as bar:
        file.seek(facts["place"])
        while lines := list(itertools.islice(file, batch)):
            rows = [read_passage(text, f"{source}: line {line + i}")
                    for i, text in enumerate(lines, 1) if text.strip()]
            line += len(lines)
            with db:
                db.executemany("INSERT INTO passages (title, url, text) VALUES (?, ?, ?)", rows)
                db.execute("UPDATE facts SET value = ? WHERE name = 'place'", (file.tell(),))
                db.execute("UPDATE facts SET value = ? WHERE name = 'line'", (line,))
            bar.update(sum(map(len, lines)))
    finish_index(db)


def open_index(source: Path, db: sqlite3.Connection) -> dict:
    """What the index says about itself; the index of another file is replaced by an empty one.

    place: the byte of the file up to which it is indexed. line: the same in lines. passages: their
    number, once the index is complete.
    """
    with db:
        db.execute("CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value)")
    facts = dict(db.execute("SELECT name, value FROM facts"))
    stamp = f"{source.stat().st_size} {source.stat().st_mtime_ns}"
    if facts.get("source") == stamp:
        return facts
    with db:
        db.executescript("DROP TABLE IF EXISTS passages; DROP TABLE IF EXISTS frequent; "
                         "DELETE FROM facts;")
        db.execute("CREATE VIRTUAL TABLE passages USING fts5(title, text, url UNINDEXED)")
        db.execute("INSERT INTO facts VALUES ('source', ?), ('place', 0), ('line', 0)", (stamp,))
    return {"place": 0, "line": 0}


def finish_index(db: sqlite3.Connection) -> None:
    """Make the index compact, count its frequent words and mark it as complete."""
    with db:
        db.execute("INSERT INTO passages (passages) VALUES ('optimize')")
        db.execute("CREATE VIRTUAL TABLE temp.words USING fts5vocab(main, passages, row)")
        db.execute("CREATE TABLE frequent (term TEXT PRIMARY KEY, doc INTEGER) WITHOUT ROWID")
        db.execute("INSERT INTO frequent SELECT term, doc FROM temp.words WHERE doc > ?",
                   (FREQUENT,))
        db.execute("INSERT INTO facts SELECT 'passages', count(*) FROM passages")


def read_passage(line: bytes, where: str) -> tuple[str, str, str]:
    """(title, url, text) of one line of a corpus. where: the file and line, for the message."""
    try:
        row = json.loads(line)
        if "contents" in row:
            title, _, text = row["contents"].partition("\n")
            return title.strip('"'), row.get("url", ""), text
        return row["title"], row.get("url", ""), row["text"]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise SearchRefused(f'{where}: must be {{"id", "title", "text"}} or {{"id", "contents"}} '
                            f"as JSON, but is {line[:60]!r}") from None


# --- Google, live ---------------------------------------------------------------------------------


class Serper:
    """Google's results by the Serper API, live, as in the paper: the snippets of the first k.

    The key goes into the request's header and nowhere else: no message, record or exception
    contains it.

    seconds: how long one attempt may take. tries: attempts for one search. pause: seconds after the
    first attempt, doubled after each, unless the server says how long to wait.
    """
    parallel = 8            # searches at once: the time goes into waiting for the network
    name = "serper"
    url = "https://google.serper.dev/search"

    def __init__(self, key: str, url: str = url, seconds: float = 10.0, tries: int = 4,
                 pause: float = 1.0):
        if not re.fullmatch(r"[\x21-\x7e]+", key):      # requests would print it in its complaint
            raise SearchRefused("the key in SERPER_API_KEY is empty or contains blanks or "
                                "unprintable characters; copy it again")
        self._key, self.url, self.seconds, self.tries, self.pause = key, url, seconds, tries, pause

    def search(self, query: str, k: int = 4) -> list[Passage]:
        """At most k snippets. Raises SearchError if no attempt succeeds, SearchRefused for the key.

        Only what may pass is tried again: the statuses 429 and 5xx, and a missing connection.
        """
        for attempt in range(self.tries):
            answer, problem = self._ask(query, k)
            status = answer.status_code if answer is not None else None
            if status == 200:
                return self._read(answer, k)
            if status in (401, 403):
                raise SearchRefused(f"Serper refused the key ({problem}): check SERPER_API_KEY "
                                    "and its credit, or search a corpus (--corpus)")
            if status is not None and status != 429 and status < 500:
                break
            if attempt + 1 < self.tries:
                wait = answer.headers.get("Retry-After", "") if answer is not None else ""
                pause = float(wait) if wait.isdigit() else self.pause * 2 ** attempt
                time.sleep(min(pause, 30.0))
        raise SearchError(f"the search engine gave {problem}")

    def _ask(self, query: str, k: int) -> tuple[requests.Response | None, str]:
        """(the answer, its status in words) or (None, what kept it from coming)."""
        try:
            answer = requests.post(self.url, json={"q": query, "num": k},
                                   headers={"X-API-KEY": self._key}, timeout=self.seconds,
                                   allow_redirects=False)       # a redirect would pass the key on
        except requests.RequestException as error:
            return None, type(error).__name__
        return answer, f"status {answer.status_code}"

    @staticmethod
    def _read(answer: requests.Response, k: int) -> list[Passage]:
        try:
            return [Passage(str(row.get("title", "")), str(row.get("link", "")),
                            str(row.get("snippet", "")))
                    for row in answer.json().get("organic", [])[:k]]
        except (ValueError, AttributeError, TypeError):
            raise SearchError(
                "the search engine's answer is not what its interface promises") from None


# --- A record of searches -------------------------------------------------------------------------


class Replay:
    """A record of searches in front of a back end: what was asked once is never asked again.

    path: an SQLite file of (back end, query, k) -> passages, which you can keep and share.
    backend: None if only the record may answer; then the records of all back ends count.
    miss: "ask" the back end what the record lacks, or "skip": then the search fails, as it does
    without a back end. Failures are not recorded.
    """

    def __init__(self, path: str | Path, backend: SearchBackend | None = None, miss: str = "ask"):
        self.backend, self.miss, self.hits, self.misses = backend, miss, 0, 0
        self.name = f"replay of {backend.name}" if backend else "replay"
        self.parallel, self._lock = (backend.parallel if backend else 1), threading.Lock()
        try:
            self.db = sqlite3.connect(path, check_same_thread=False)
            with self.db:
                self.db.execute("CREATE TABLE IF NOT EXISTS searches (backend TEXT, query TEXT, "
                                "k INTEGER, found TEXT, PRIMARY KEY (backend, query, k))")
        except sqlite3.Error as error:
            raise SearchRefused(f"record of searches {path}: {error}; "
                                "name another file (--replay)") from None

    def search(self, query: str, k: int = 4) -> list[Passage]:
        """What the record has for this back end, query and k, else what the back end finds.

        With `backend` None the record of any back end counts. What the back end finds is recorded
        under its name, in a row of the table `searches`: backend, query, k, found (JSON: a list of
        [title, url, text]). `hits` counts the searches that the record answered, `misses` those
        that it could not answer.

        On a miss without a back end, or with miss "skip", nothing is asked and SearchError is
        raised. An error of the back end passes through and leaves no record.

        Threads share `db` and the two counters: use both only while you hold `_lock`, and do not
        hold it while the back end is asked. Write a row inside `with self.db`, which commits it.
        """
        known = (query, k, self.backend.name if self.backend else None)
        with self._lock:
            row = self.db.execute("SELECT found FROM searches WHERE query = ? AND k = ? "
                                  "AND backend = coalesce(?, backend)", known).fetchone()
            self.hits, self.misses = self.hits + (row is not None), self.misses + (row is None)
        if row is not None:
            return [Passage(*passage) for passage in json.loads(row[0])]
        if self.backend is None or self.miss == "skip":
            raise SearchError("this query is not in the record")
        found = self.backend.search(query, k)
        with self._lock, self.db:
            self.db.execute("INSERT OR REPLACE INTO searches VALUES (?, ?, ?, ?)", (
                self.backend.name, query, k, json.dumps([(p.title, p.url, p.text) for p in found])))
        return found


# --- How near a query is to the gold one ----------------------------------------------------------


class SentenceSimilarity:
    """Cosine of two sentence embeddings, each the mean of the last hidden states over its tokens.

    That is how all-MiniLM-L6-v2 makes them. folder: an encoder in transformers' format, such as
    sentence-transformers/all-MiniLM-L6-v2, which the paper uses. It runs on the CPU.
    """

    def __init__(self, folder: str):
        from transformers import AutoModel, AutoTokenizer
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModel.from_pretrained(folder).eval()
        self.known: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def embed(self, text: str) -> torch.Tensor:
        """[D], of length 1. Computed once for each text."""
        if text not in self.known:
            ids = self.tokenizer(text, truncation=True, max_length=256, return_tensors="pt")
            hidden = self.model(**ids).last_hidden_state[0]     # [T, D]; one text, so no padding
            self.known[text] = torch.nn.functional.normalize(hidden.mean(dim=0), dim=0)
        return self.known[text]

    def __call__(self, query: str, gold: str) -> float:
        """In [-1, 1]."""
        return float(self.embed(query) @ self.embed(gold))
