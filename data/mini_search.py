"""The search half of MAT-mini: questions about ships that only a search can answer, drawn by a
program.

What it teaches: what a search benchmark needs so that the search is necessary. A picture shows the
number of a ship and nothing else. One passage of a small corpus says where the ship sails and who
its captain is (simple questions). A second passage, which names only the town or the captain, says
who the mayor of that town is or where that captain was born (hard questions). A hard question takes
two searches, and nobody can write the second one before the first was answered.

The files have MAT-Search's names and fields (Visual-ARFT, arXiv 2505.14246; the published
laolao77/MAT), and the corpus is in the same folder. Held-out ships, towns and people occur in no
training question; their passages are in the same corpus. extras/search.py searches the corpus, and
extras/cold_start_search.py made the model that asks.

Left out: everything that makes a real web search hard: ambiguity, contradiction, long pages.

    python -m data.mini_search FOLDER       # writes the files; arft.py does this by itself
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data import mini

# It is in the folder's name, so that a changed world never meets an old cache.
VERSION = 1
CORPUS = "corpus.jsonl"
TOWNS = ("Oslo Lima Rome Bonn Kobe Riga Bern Cork Lyon Pisa Nice Bari Baku Doha Kyiv Graz Lodz "
         "Gent Tula Brno Faro Vigo Kiel Hull Bath York Leith Delft Turku Malmo Tampa Quito "
         "Sucre Accra Lagos Dakar Tunis Sofia Minsk Vaduz Linz Metz Brest Izmir Basra Busan "
         "Davao Perth").split()
PEOPLE = ("Ada Bruno Clara Dario Elsa Felix Greta Hugo Irma Jonas Karla Leon Mina Nora Otto "
          "Paula Quin Rosa Sven Tilda Ugo Vera Wanda Xenia Yusuf Zelda Amir Bella Cyril Dora "
          "Emil Fiona Gustav Helga Igor Judith Kemal Lotte Milan Nadia Oskar Petra Ramon Silke "
          "Timo Ursula Viktor Willem").split()


@dataclass(frozen=True)
class Question:
    """One kind of question. Its queries and its answer come from the facts of a world."""
    text: str
    hops: int               # how many searches the answer takes
    first: str              # the fact that the ship's passage gives: town | captain
    query: str = ""         # query of the second search, with {} for that fact


QUESTIONS = (Question("Where does this ship sail?", 1, "town"),
             Question("Who is the captain of this ship?", 1, "captain"),
             Question("Who is the mayor of the town where this ship sails?", 2, "town",
                      "mayor of {}"),
             Question("Where was the captain of this ship born?", 2, "captain", "birth of {}"))


@dataclass(frozen=True)
class World:
    """Who sails where: the facts that the corpus holds."""
    ships: dict[str, dict[str, str]]    # number -> {"town", "captain"}
    mayors: dict[str, str]              # town -> person
    births: dict[str, str]              # person -> town

    def ship_passage(self, number: str) -> dict:
        """The passage about a ship: {"title", "text"}, as every passage here."""
        ship = self.ships[number]
        return {"title": f"Ship {number}",
                "text": f"It sails to {ship['town']} under captain {ship['captain']}."}

    def second_passage(self, name: str) -> dict:
        """The passage about a town or a captain."""
        if name in self.mayors:
            return {"title": f"Town {name}", "text": f"The mayor of {name} is {self.mayors[name]}."}
        return {"title": f"Captain {name}",
                "text": f"The birth of {name} was in {self.births[name]}."}

    def second_answer(self, name: str) -> str:
        """The mayor of a town, or the town where a captain was born."""
        return self.mayors[name] if name in self.mayors else self.births[name]

    def answer(self, question: Question, number: str) -> str:
        first = self.ships[number][question.first]
        return first if question.hops == 1 else self.second_answer(first)

    def queries(self, question: Question, number: str) -> list[str]:
        """The gold queries, in order."""
        first = f"ship {number}"
        if question.hops == 1:
            return [first]
        return [first, question.query.format(self.ships[number][question.first])]


def pool(names: list[str], split: str) -> list[str]:
    """The names of a split: three quarters for training, the others for the test.

    >>> len(pool(TOWNS, "train")), len(pool(PEOPLE, "test"))
    (36, 12)
    >>> set(pool(TOWNS, "train")) & set(pool(TOWNS, "test"))
    set()
    """
    cut = len(names) * 3 // 4
    return names[:cut] if split == "train" else names[cut:]


def make_world(numbers: list[str], towns: list[str], captains: list[str], mayors: list[str],
               rng: np.random.Generator) -> World:
    """Random facts about these ships, towns and people."""
    return World({number: {"town": str(rng.choice(towns)), "captain": str(rng.choice(captains))}
                  for number in numbers},
                 {town: str(rng.choice(mayors)) for town in towns},
                 {name: str(rng.choice(towns)) for name in captains})


def worlds(seed: int = 0) -> dict[str, World]:
    """The training half and the held-out half of MAT-mini's world. They share no ship, town or
    person, and nobody is both captain and mayor."""
    return {split: make_world(mini.texts(split), pool(TOWNS, split), pool(PEOPLE, split)[::2],
                              pool(PEOPLE, split)[1::2],
                              np.random.default_rng([seed, 77, split == "train"]))
            for split in ("train", "test")}


def passages(world: World) -> list[dict]:
    return ([world.ship_passage(number) for number in world.ships]
            + [world.second_passage(name) for name in (*world.mayors, *world.births)])


# --- files ----------------------------------------------------------------------------------------


def _benchmark_rows(world: World, images: Path, rng: np.random.Generator) -> list[dict]:
    """Every question about every held-out ship, in two pictures each; simple questions first."""
    asked = [(question, number) for hops in (1, 2)
             for question in QUESTIONS if question.hops == hops
             for number in world.ships for _ in range(2)]
    rows = []
    for i, (question, number) in enumerate(asked, start=1):
        mini.draw_sign(number, rng).save(images / f"{i}.png", compress_level=1)
        rows.append({"id": i, "question": question.text, "answer": world.answer(question, number),
                     "image_path": f"{i}.png", "split": "simple" if question.hops == 1 else "hard"})
    return rows


def _training_rows(world: World, images: Path, rng: np.random.Generator) -> list[dict]:
    """Every question about every training ship as single steps. The searches so far follow the
    question in the field "problem"."""
    rows = []
    for number in world.ships:
        for k, question in enumerate(QUESTIONS):
            image = f"ship_{number}_{k}.png"
            mini.draw_sign(number, rng).save(images / image, compress_level=1)
            for problem, solution in _steps(world, question, number):
                rows.append({"image_path": image, "problem": problem, "solution": solution})
    return rows


def _steps(world: World, question: Question, number: str) -> list[tuple[str, str]]:
    """(problem, solution) of each step of one question: its searches, then its answer."""
    steps, so_far = [], f"<query> {question.text} </query>"
    found = [world.ship_passage(number), world.second_passage(world.ships[number][question.first])]
    for query, passage in zip(world.queries(question, number), found, strict=False):
        solution = f"<search> {query} </search>"
        steps.append((so_far, solution))
        text = f"{passage['title']}. {passage['text']}"
        so_far += f"\n{solution}\n<information> 1. Content:{text} </information>"
    return [*steps, (so_far, f"<answer> {world.answer(question, number)} </answer>")]


FILES = (   # split, folder, file of rows, folder of images, function that makes the rows
    ("test", "MAT-Benchmark", "MAT-Search.json", "MAT-Search-image", _benchmark_rows),
    ("train", "MAT-Training", "rft_agent_search_20.json", "rft_agent_search_20_images",
     _training_rows))


def write(folder: Path, seed: int = 0) -> Path:
    """Writes the search half in MAT's layout and the corpus, complete or not at all: 300 training
    and 160 test samples. Returns the folder."""
    folder = Path(folder)
    with mini.replaced_at_end(folder) as root:
        halves = worlds(seed)
        for split, home, file, images, rows_of in FILES:
            (root / home / images).mkdir(parents=True)
            rng = np.random.default_rng([seed, 78, split == "train"])
            rows = rows_of(halves[split], root / home / images, rng)
            (root / home / file).write_text(json.dumps(rows, indent=1))
        corpus = [passage for half in halves.values() for passage in passages(half)]
        lines = [json.dumps({"id": str(i)} | passage) for i, passage in enumerate(corpus)]
        (root / CORPUS).write_text("".join(f"{line}\n" for line in lines))
    return folder


def ensure(home: Path) -> Path:
    """The folder of the search half below `home`. Draws it if it is missing, which takes a
    second."""
    folder = Path(home) / f"mat-mini-search-{VERSION}"
    return folder if (folder / CORPUS).exists() else write(folder)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m data.mini_search FOLDER")
    print(write(Path(sys.argv[1])))
