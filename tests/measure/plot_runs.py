"""Draws the README's picture from finished runs: held-out EM, greedy and sampled, over the steps.

    python tests/measure/plot_runs.py OUT.svg RUN [RUN ...]

The runs must have been made with --eval-every. A thin line is one run, a thick line their mean.
"""

import json
import sys
from pathlib import Path

WIDTH, HEIGHT, LEFT, TOP = 720, 320, 56, 24
COLOURS = {"greedy": "#d55e00", "sampled": "#0072b2"}


def polyline(points, last_step, colour, width):
    """One line of an SVG. points: (step, share)."""
    pixels = " ".join(
        f"{LEFT + (WIDTH - 2 * LEFT) * x / last_step:.1f},{TOP + (HEIGHT - 80) * (1 - y):.1f}"
        for x, y in points)
    return (f'<polyline fill="none" stroke="{colour}" stroke-width="{width}" '
            f'stroke-opacity="{1 if width > 1 else 0.45}" points="{pixels}"/>')


def draw(runs: list[list[dict]]) -> str:
    """An SVG from the runs' `curve` in summary.json, [{"step", "greedy", "sampled"}, ...]. All runs
    must have the same steps."""
    steps = [point["step"] for point in runs[0]]
    shapes = []
    for k in range(6):
        y = TOP + (HEIGHT - 80) * (1 - k / 5)
        shapes.append(f'<line x1="{LEFT}" x2="{WIDTH - LEFT}" y1="{y}" y2="{y}" stroke="#ddd"/>'
                      f'<text x="{LEFT - 8}" y="{y + 4}" text-anchor="end">{k / 5:.1f}</text>')
    for step in steps:
        x = LEFT + (WIDTH - 2 * LEFT) * step / steps[-1]
        shapes.append(f'<text x="{x:.1f}" y="{HEIGHT - 36}" text-anchor="middle">{step}</text>')
    for name, colour in COLOURS.items():
        shapes += [polyline([(p["step"], p[name]) for p in run], steps[-1], colour, 1)
                   for run in runs]
        mean = [(s, sum(run[i][name] for run in runs) / len(runs)) for i, s in enumerate(steps)]
        shapes.append(polyline(mean, steps[-1], colour, 3))
    label = f'{len(runs)} seeds' if len(runs) > 1 else '1 seed'
    shapes.append(
        f'<text x="{WIDTH / 2}" y="{HEIGHT - 12}" text-anchor="middle">training steps; exact match '
        f'on 200 held-out samples ({label}; thick: mean): '
        f'<tspan fill="{COLOURS["greedy"]}">greedy</tspan>, '
        f'<tspan fill="{COLOURS["sampled"]}">sampled at temperature 1</tspan></text>')
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
            f'font-family="sans-serif" font-size="12" fill="#333">'
            f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>{"".join(shapes)}</svg>\n')


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    curves = [json.loads((Path(run) / "summary.json").read_text())["curve"] for run in sys.argv[2:]]
    Path(sys.argv[1]).write_text(draw(curves))
