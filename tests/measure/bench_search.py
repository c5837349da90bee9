"""Measures how long a search of a large corpus takes.

    python tests/measure/bench_search.py --passages 1000000 --folder DIR

DIR keeps the corpus and its index. The corpus is generated: passages of 60 words, whose frequencies
fall as in language (Zipf's law, 200,000 words). The words of a query are drawn by the same law,
common and rare as they come; the worst kind of query has common words alone.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[2]))

from extras.search import Corpus

WORDS, LENGTH = 200_000, 60


def generate(path: Path, count: int) -> None:
    """Writes `count` passages as a .jsonl."""
    rng, words = np.random.default_rng(0), np.array([f"w{i}" for i in range(WORDS)])
    chance = np.cumsum(1 / np.arange(1, WORDS + 1))
    with open(path, "w") as file:
        for start in tqdm(range(0, count, 10_000), desc="generating", leave=False):
            drawn = rng.random((min(10_000, count - start), LENGTH))
            for i, row in enumerate(np.searchsorted(chance / chance[-1], drawn)):
                passage = {"id": str(start + i), "title": " ".join(words[row[:2]]),
                           "text": " ".join(words[row])}
                file.write(json.dumps(passage) + "\n")


def measure(corpus: Corpus, queries: list[str]) -> np.ndarray:
    """Milliseconds of each query, at four passages."""
    times = []
    for query in queries:
        start = time.perf_counter()
        corpus.search(query, 4)
        times.append(1000 * (time.perf_counter() - start))
    return np.array(times)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--passages", type=int, default=1_000_000)
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--folder", type=Path, required=True)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    path = options.folder / f"corpus-{options.passages}.jsonl"
    if not path.exists():
        generate(path, options.passages)
    start = time.perf_counter()
    corpus = Corpus(path)
    seconds = time.perf_counter() - start
    print(f"{corpus.size:,} passages; index opened or built in {seconds:.1f} s; "
          f"{corpus.index.stat().st_size / 1e6:.0f} MB for {path.stat().st_size / 1e6:.0f} MB")
    rng = np.random.default_rng(1)
    chance = np.cumsum(1 / np.arange(1, WORDS + 1))

    def draw(count: int, most: int = WORDS) -> str:
        """A query of `count` words from the `most` most frequent ones."""
        places = np.searchsorted(chance[:most] / chance[most - 1], rng.random(count))
        return " ".join(f"w{i}" for i in places)
    kinds = {"1": (1,), "3": (3,), "8": (8,), "8 of the 300 most frequent": (8, 300)}
    print(f"{'words of the query':34}{'median ms':>10}{'95% ms':>8}{'most ms':>9}")
    for name, kind in kinds.items():
        times = measure(corpus, [draw(*kind) for _ in range(options.queries)])
        print(f"{name:34}{np.median(times):10.1f}{np.percentile(times, 95):8.1f}{times.max():9.1f}")


if __name__ == "__main__":
    main()
