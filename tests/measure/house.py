"""The house in numbers, to compare with an earlier commit or with another repository.

    python tests/measure/house.py                       this checkout
    python tests/measure/house.py FOLDER FILE ...       another one, these files in reading order

Code lines are lines with a token that is neither docstring nor comment.
"""

import ast
import io
import sys
import tokenize
from pathlib import Path

ROOT = Path(__file__).parents[2]
LESSON = ["arft.py", "policy.py", "tools.py", "rollout.py", "rewards.py", "grpo.py"]
SKIPPED = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
           tokenize.ENDMARKER}


def docstring_lines(tree: ast.Module) -> set[int]:
    lines = set()
    for node in ast.walk(tree):
        holder = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
        if holder and ast.get_docstring(node) is not None:
            lines |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return lines


def measure(file: Path) -> dict:
    """Counts of one file."""
    text = file.read_text(encoding="utf-8")
    tree, code, comments = ast.parse(text), set(), set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            comments.add(token.start[0])
        elif token.type not in SKIPPED:
            code |= set(range(token.start[0], token.end[0] + 1))
    code -= docstring_lines(tree)
    lines = text.split("\n")
    bodies = []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            first = node.body[1:] if ast.get_docstring(node) else node.body
            if first:
                bodies.append(len(code & set(range(first[0].lineno, node.end_lineno + 1))))
    return {"lines": len(text.splitlines()), "code": len(code), "comments": len(comments),
            "characters": sum(len(lines[n - 1].strip()) for n in code),
            "functions": len(bodies), "longest": max(bodies, default=0),
            "classes": sum(isinstance(node, ast.ClassDef) for node in ast.walk(tree)),
            "wide": sum(len(line) > 100 for line in lines)}


def main(folder: Path = ROOT, files: list[str] = LESSON) -> None:
    counts = {name: measure(folder / name) for name in files}
    names = ["lines", "code", "functions", "classes", "longest", "comments", "wide"]
    print(f"{'':14}" + "".join(f"{name:>11}" for name in names))
    for file, count in counts.items():
        print(f"{file:14}" + "".join(f"{count[name]:>11}" for name in names))
    total = {name: sum(count[name] for count in counts.values()) for name in [*names, "characters"]}
    print(f"together: {total['lines']} lines in {len(files)} files, {total['code']} of code; "
          f"{total['functions']} functions, the longest has "
          f"{max(count['longest'] for count in counts.values())} lines of code")
    print(f"comment lines per 100 lines of code: {100 * total['comments'] / total['code']:.0f}; "
          f"characters per line of code: {total['characters'] / total['code']:.0f}")
    readme = (folder / "README.md").read_text(encoding="utf-8")
    before = readme[:readme.find("Eq. (")].count("\n") + 1
    print(f"README: {len(readme.splitlines())} lines, {len(readme.split())} words, the first "
          f"equation in line {before}")


if __name__ == "__main__":
    main(*([Path(sys.argv[1]), sys.argv[2:]] if len(sys.argv) > 2 else []))
