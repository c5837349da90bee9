"""Draws an episode of a run as one picture: the image, the program, the image that came back, and
the answer.

    python tests/measure/picture_episode.py RUN data/pictures/episode.png

The episode is the first one after training whose answer is right and whose image had two problems.
"""

import json
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

SIDE, GAP, INK, GREY = 224, 24, "#1b1f24", "#59636e"


def choose_episode(run: Path) -> dict:
    """The line of episodes.jsonl that is drawn."""
    with open(run / "episodes.jsonl", encoding="utf-8") as lines:
        for line in lines:
            episode = json.loads(line)
            right = episode["answer"] in episode["gold"]
            if episode["when"] == "after" and len(episode["problems"]) == 2 and right:
                return episode
    raise SystemExit(f"{run}: no such episode; train longer")


def draw(run: Path) -> Image.Image:
    episode = choose_episode(run)
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
