"""Draws an episode of a run as one picture: what was shown, the program, what came back, the
answer.

    python tests/measure/picture_episode.py RUN data/pictures/episode.png

Takes the first right answer after training whose image had two problems.
"""

import json
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

SIDE, GAP, INK, GREY = 224, 24, "#1b1f24", "#59636e"


def chosen(run: Path) -> dict:
    """The episode that is drawn."""
    for line in open(run / "episodes.jsonl"):
        episode = json.loads(line)
        if episode["when"] == "after" and len(episode[
                "problems"]) == 2 and episode["answer"] in episode["gold"]:
            return episode
    raise SystemExit(f"{run}: no such episode; train longer")


def draw(run: Path) -> Image.Image:
    episode = chosen(run)
    code = next(turn for turn in episode["turns"] if turn["action"] == "code")
    lines = code["text"].split("```python\n")[1].split("\n```")[0].split("\n")
    text, small = ImageFont.load_default(15), ImageFont.load_default(13)
    middle = max(int(text.getlength(line)) for line in lines) + 2 * GAP
    picture = Image.new("RGB", (2 * SIDE + middle + 4 * GAP, SIDE + 96), "white")
    pen = ImageDraw.Draw(picture)
    right = SIDE + middle + 3 * GAP
    for x, name in ((GAP, episode["image"]), (right, run / code["image"])):
        picture.paste(Image.open(name).convert("RGB").resize((SIDE, SIDE)), (x, 56))
        pen.rectangle((x - 1, 55, x + SIDE, 56 + SIDE), outline="#d1d9e0")
    pen.text((GAP, 16), f"{episode['question']}", fill=INK, font=text)
    pen.text((GAP, 36), f"diagnosis: {', '.join(episode['problems'])}", fill=GREY, font=small)
    left = SIDE + 2 * GAP
    pen.rectangle((left, 56, left + middle, 56 + SIDE), fill="#f6f8fa")
    pen.text((left, 36), "the program it wrote, run in the sandbox", fill=GREY, font=small)
    for i, line in enumerate(lines):
        pen.text((left + GAP, 56 + GAP + 26 * i), line, fill=INK, font=text)
    pen.text((right, 36), "what it was shown then", fill=GREY, font=small)
    pen.text((right, 56 + SIDE + 10), f"answer: {episode['answer']}", fill=INK, font=text)
    return picture


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    draw(Path(sys.argv[1])).quantize(64).save(sys.argv[2], optimize=True)
