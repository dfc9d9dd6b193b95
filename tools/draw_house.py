"""Draw docs/img/house.svg: the package's rooms on their floors, as large as their lines, and an arrow for each import.

Rooms, floors and arrows come from the sources (``house.py``). An arrow that others make up already (a imports b, b
imports c, and a imports c itself) is pale. ``--check`` draws nothing and tells whether the picture that is there shows
today's imports; its lines, which change daily, are those of the day it was drawn.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable
from pathlib import Path

from house import FLOORS, ROOT, edges, lines

PICTURE = ROOT / "docs" / "img" / "house.svg"
INK, PALE, PAPER = "#2b2d42", "#d5d9e1", "#ffffff"
FILLS = ("#dfe7f3", "#d5ebe4", "#e4efd2", "#f3efcf", "#f8e5cd", "#f7d9cf", "#f0d5df", "#e3d8ee")
WIDTH, ROW, GAP, BOX = 1120, 112, 34, 54  # of the picture, between floors, between rooms, height of a room
EMPTY, LINES_PER_UNIT = 64, 18  # width of a room without lines, and how many widen it by one

Edge = tuple[str, str]
Facts = tuple[tuple[tuple[str, ...], ...], set[Edge]]  # floors from the ground up, and who imports whom
Box = tuple[float, float, float]  # left, top, width


def facts() -> Facts:
    """What the sources say."""
    return FLOORS, {(source, goal) for source, goal, _ in edges()}


def facts_of(picture: str) -> Facts:
    """What a picture shows."""
    rooms = re.findall(r'data-room="(\w+)" data-floor="(\d+)"', picture)
    count = max((int(floor) + 1 for _, floor in rooms), default=0)
    floors = tuple(tuple(name for name, floor in rooms if int(floor) == number) for number in range(count))
    return floors, set(re.findall(r'data-from="(\w+)" data-to="(\w+)"', picture))


def implied(arrows: set[Edge]) -> set[Edge]:
    """The arrows that others make up already."""
    below = {name: {goal for source, goal in arrows if source == name} for floor in FLOORS for name in floor}

    def reaches(start: str, goal: str, seen: frozenset[str] = frozenset()) -> bool:
        return any(step == goal or (step not in seen and reaches(step, goal, seen | {step})) for step in below[start])

    return {(a, c) for a, c in arrows if any(b != c and reaches(b, c) for b in below[a])}


def place(sizes: dict[str, int]) -> dict[str, Box]:
    """Where each room stands: floors are rows, the ground at the bottom, each in the middle."""
    boxes = {}
    for number, names in enumerate(FLOORS):
        widths = [EMPTY + sizes[name] / LINES_PER_UNIT for name in names]
        left = (WIDTH - sum(widths) - GAP * (len(names) - 1)) / 2
        for name, width in zip(names, widths, strict=True):
            boxes[name] = (left, 16.0 + ROW * (len(FLOORS) - 1 - number), width)
            left += width + GAP
    return boxes


def draw() -> str:
    """The picture as text."""
    floors, arrows = facts()
    sizes = lines()
    boxes = place(sizes)
    height = 32 + ROW * (len(floors) - 1) + BOX
    pale = implied(arrows)
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        'font-family="Helvetica, Arial, sans-serif" text-anchor="middle">',
        f'<rect width="{WIDTH}" height="{height}" fill="{PAPER}"/>',
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0 0 8 4 0 8z" fill="{INK}"/></marker></defs>',
    ]
    order = [*sorted(pale), *sorted(arrows - pale)]
    out += [_arrow(edge, boxes, arrows, edge in pale) for edge in order]
    for number, names in enumerate(floors):
        out += [_room(name, number, boxes[name], sizes[name]) for name in names]
    return "\n".join([*out, "</svg>", ""])


def _room(name: str, floor: int, box: Box, size: int) -> str:
    left, top, width = box
    middle = left + width / 2
    return (
        f'<g data-room="{name}" data-floor="{floor}"><rect x="{left:.0f}" y="{top:.0f}" width="{width:.0f}" '
        f'height="{BOX}" rx="6" fill="{FILLS[floor % len(FILLS)]}" stroke="{INK}"/>'
        f'<text x="{middle:.0f}" y="{top + 24:.0f}" font-size="16" fill="{INK}">{name}</text>'
        f'<text x="{middle:.0f}" y="{top + 42:.0f}" font-size="11" fill="{INK}">{size / 1000:.1f}k lines</text></g>'
    )


def _arrow(edge: Edge, boxes: dict[str, Box], arrows: set[Edge], pale: bool) -> str:
    """From the lower edge of a room to the upper edge of another; along a floor from side to side, or below it."""
    (left, top, width), (other_left, other_top, other_width) = boxes[edge[0]], boxes[edge[1]]
    x, other_x = left + width / 2, other_left + other_width / 2
    foot = top + BOX
    if top != other_top:
        x = left + width * _share(edge[1], (goal for source, goal in arrows if source == edge[0]), boxes)
        other_x = other_left + other_width * _share(edge[0], (room for room, goal in arrows if goal == edge[1]), boxes)
        bend = (other_top - foot) * 0.45
        path = _curve(x, foot, foot + bend, other_x, other_top, other_top - bend)
    elif abs(x - other_x) > (width + other_width) / 2 + GAP:  # a room stands between
        path = _curve(x, foot, foot + 16, other_x, foot, foot + 16)
    else:
        y = top + BOX / 2
        begin, end = (left + width, other_left) if x < other_x else (left, other_left + other_width)
        path = f"M{begin:.0f} {y:.0f} H{end:.0f}"
    style = f'stroke="{PALE}"' if pale else f'stroke="{INK}" stroke-width="1.3" marker-end="url(#tip)"'
    return (
        f'<path data-from="{edge[0]}" data-to="{edge[1]}" d="{path}" fill="none" {style}>'
        f"<title>{edge[0]} imports {edge[1]}</title></path>"
    )


def _curve(x: float, y: float, pull: float, other_x: float, other_y: float, other_pull: float) -> str:
    """A line that leaves and arrives upright."""
    return f"M{x:.0f} {y:.0f} C{x:.0f} {pull:.0f} {other_x:.0f} {other_pull:.0f} {other_x:.0f} {other_y:.0f}"


def _share(name: str, names: Iterable[str], boxes: dict[str, Box]) -> float:
    """Where on a room's edge the arrow to or from ``name`` is tied, among those of ``names``, from left to right."""
    ordered = sorted(names, key=lambda other: (boxes[other][0] + boxes[other][2] / 2, other))
    return (ordered.index(name) + 1) / (len(ordered) + 1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=PICTURE)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    if not args.check:
        args.output.write_text(draw(), encoding="utf-8")
        return 0
    if facts_of(args.output.read_text("utf-8")) == facts():
        return 0
    print(f"{args.output} is not today's house; draw it again: python tools/draw_house.py", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
