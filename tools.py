"""What an agent can do: the parser of its turns, the sandbox for the code it writes, and searches.

In the paper (Visual-ARFT, arXiv 2505.14246) the agent has four actions: `<problem>`, `<code>`,
`<search>` and `<answer>`, each after a `<think>`.

**The parser.** `parse` turns whatever the model wrote into an `Action`. It answers two questions at
once. What should the environment do? That is `kind` and `value`; here the parser is lenient about
quotes, spaces, code fences and text around the tags. Does the turn earn the format reward? That is
`strict`: the paper's format, to the letter. A tag counts wherever it stands, inside a thought or a
program too. A turn that repeats a tag, holds two actions or leaves a tag open is malformed, and
`error` tells the model why. The parser guesses nothing: values stay text.

**The sandbox.** `Sandbox` runs Python that a model wrote, clumsy or hostile, in processes that
share nothing with this one. The program reads `path_to_input_image.jpg` and writes
`path_to_output_image.jpg` in an empty directory of its own. The image that it leaves, what it
printed and what went wrong come back as an `Execution`, never as an exception. The paper's released
evaluation instead calls `exec` in the process that holds the model.

**Searches.** `search_all` asks a `SearchBackend` the queries of many episodes at once. A search
that fails is an observation for the model, like a program that fails.

This file leaves out how a program is locked in (extras/worker.py starts the processes and says what
is covered, extras/jail.py locks them) and the back ends of searches (extras/search.py).

Read next: rollout.py, which plays the turns.
"""

import re
import textwrap
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

from extras.worker import Execution, Sandbox, SandboxError

__all__ = ["Action", "Execution", "Passage", "Sandbox", "SandboxError", "SearchBackend",
           "SearchError", "Tools", "parse", "search_all"]

# --- The parser -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Action:
    """A parsed turn."""
    kind: str                               # problem | code | search | answer | malformed
    value: tuple[str, ...] | str | None     # labels | source | text | text | None
    error: str | None                       # malformed: one sentence that the model may be shown
    strict: bool                            # the turn is a thought and one action, as in the paper


TAG = re.compile(r"<(/?)(think|problem|code|search|answer)>")
FENCE = re.compile(r"```(?:(?:python3?|py)(?=\s)|[\w.+-]*(?=[ \t]*\r?\n))?[ \t]*")
PAPER_CODE = re.compile(r"\s*```python.*?```", re.DOTALL)
PAPER_PROBLEM = re.compile(r"\s*\{\s*'[^']+'\s*(?:,\s*'[^']+'\s*)*\}\s*")


def parse(turn: str) -> Action:
    """What the model wants to do. Never raises, and takes linear time, whatever the text is.

    `read_tags` says where the body of each tag is, and what is wrong. If something is wrong, the
    turn is malformed (value None, strict False) and the sentence of `read_tags` is its error. A
    turn without an action is malformed, too, and so is one whose value is empty; the error of the
    latter is "the tag <answer> is empty". The value of a problem is what `read_labels` makes of the
    body, the value of a program what `read_program` makes of it; for a search or an answer it is
    the body without the blanks around it. `is_strict` gives the last field.

    >>> parse("<think>It is dark.</think>\\n<problem> {'rotation90', 'dark'} </problem>")
    Action(kind='problem', value=('rotation90', 'dark'), error=None, strict=True)
    >>> parse("So: <answer> 42 </answer>")
    Action(kind='answer', value='42', error=None, strict=False)
    >>> parse("<think>Hm.</think><answer>42").error
    'the tag <answer> is not closed'
    """
    spans, error = read_tags(turn)
    actions = [kind for kind in spans if kind != "think"]
    if not error and not actions:
        error = "there is no action: write one of <problem>, <code>, <search> or <answer>"
    if error:
        return Action("malformed", None, error, False)
    kind = actions[0]
    body = turn[slice(*spans[kind])]
    value = {"problem": read_labels, "code": read_program}.get(kind, str.strip)(body)
    if not value:
        return Action("malformed", None, f"the tag <{kind}> is empty", False)
    return Action(kind, value, None, is_strict(turn, spans, kind, body))


def read_tags(turn: str) -> tuple[dict[str, tuple[int, int]], str | None]:
    """Where the body of each tag starts and ends, and what is wrong. Stops at the first fault."""
    spans, opened, start = {}, None, 0
    for tag in TAG.finditer(turn):
        closing, name = tag.groups()
        if name in spans or (name == opened and not closing):
            return spans, f"the tag <{name}> occurs twice"
        if closing and name != opened:
            return spans, f"</{name}> comes without <{name}>"
        if closing:
            spans[name] = (start, tag.start())
            opened = None
            continue
        if opened:
            return spans, f"<{name}> begins before <{opened}> is closed"
        if name != "think" and any(other != "think" for other in spans):
            first = next(other for other in spans if other != "think")
            return spans, f"two actions in one turn: <{first}> and <{name}>"
        opened, start = name, tag.end()
    return spans, f"the tag <{opened}> is not closed" if opened else None


def read_labels(body: str) -> tuple[str, ...]:
    """The set of labels in any of its spellings: {'dark', 'blur'}, ["dark"], dark, blur."""
    labels = re.split("[,，、]", body.strip(" \t\r\n{}[]()"))
    labels = (label.strip(" \t\r\n'\"`‘’“”") for label in labels)
    return tuple(label for label in labels if label)


def read_program(body: str) -> str:
    """The source text, without its code fence if it has one."""
    fence = FENCE.search(body)
    if fence:
        end = body.find("```", fence.end())
        body = body[fence.end():end if end >= 0 else None]
    return textwrap.dedent(body).strip()


def is_strict(turn: str, spans: dict, kind: str, body: str) -> bool:
    """Whether the turn is <think>...</think> and one action, as the paper's format reward asks."""
    if "think" not in spans:
        return False
    (think_start, think_end), (start, end) = spans["think"], spans[kind]
    between = turn[think_end + len("</think>"):start - len(f"<{kind}>")]
    frame = think_start == len("<think>") and end + len(f"</{kind}>") == len(turn)
    shape = {"problem": PAPER_PROBLEM.fullmatch, "code": PAPER_CODE.match}.get(kind, bool)
    return frame and not between.strip() and bool(shape(body))


# --- The sandbox ----------------------------------------------------------------------------------
#
# with Sandbox(workers=2, seconds=10, memory_mb=1024) as sandbox:      # in extras/worker.py
#     sandbox.map([(code, image), ...]) -> [Execution, ...]            # in order, in parallel
#
# An Execution has .image (RGB) or .error (one line for the model), never both, and .stdout.


# --- Searches -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Passage:
    """Something that a search found."""
    title: str
    url: str        # "" where the source has none
    text: str


class SearchError(Exception):
    """One search failed. The model reads why ("Search failed: ..."), and the episode continues."""


class SearchBackend(Protocol):
    """What answers a search: Corpus, Serper or Replay in extras/search.py, or one of your own."""
    name: str
    parallel: int       # how many searches may run at once

    def search(self, query: str, k: int = 4) -> list[Passage]:
        """At most k passages, best first. Raises SearchError if this one search failed."""


def search_all(backend: SearchBackend, queries: list[str],
               k: int) -> list[list[Passage] | SearchError]:
    """What each query found, or why it failed, in order. Equal queries are asked once."""
    def ask(query: str):
        try:
            return backend.search(query, k)
        except SearchError as error:
            return error

    unique = list(dict.fromkeys(queries))
    with ThreadPoolExecutor(backend.parallel) as pool:
        found = dict(zip(unique, pool.map(ask, unique)))
    return [found[query] for query in queries]


@dataclass
class Tools:
    """What an episode can use.

    Without a sandbox a program gives the image back unchanged; without a back end the model is told
    that search is not available.
    """
    sandbox: Sandbox | None = None
    search: SearchBackend | None = None
    passages: int = 4       # how many one search returns
