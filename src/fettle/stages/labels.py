"""Names beside the points of a picture, laid out so that none covers another."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

SIZE = 8  # points
NEAR = 10  # points: a name farther from its dot has a line to it
# Offsets in points, the nearest first.
PLACES = [
    (side * across, up)
    for across, ups in ((7, (0, 7, -7)), (10, (13, -13)), (16, (20, -20, 28, -28)), (22, (38, -38, 48, -48, 60, -60)))
    for up in ups
    for side in (1, -1)
]
Box = tuple[float, float, float, float]  # left, low, right, high


def label(axis: Any, points: Sequence[tuple[float, float, str]]) -> None:
    """Write each name near its (x, y), the first place that is free; a name that stands farther away has a line to its point.

    The axis has its scales and limits by now: what is drawn later may cover the names.
    """
    figure = axis.figure
    figure.draw_without_rendering()  # places are known after the layout,
    figure.set_layout_engine("none")  # which names that stand out must not change again
    dot = figure.dpi / 72
    scales = (axis.get_xscale(), axis.get_yscale())
    points = [p for p in points if all(scale != "log" or v > 0 for scale, v in zip(scales, p[:2], strict=True))]
    at = [tuple(axis.transData.transform((x, y))) for x, y, _ in points]
    edge = axis.get_window_extent()
    taken: list[Box] = [(x - 4 * dot, y - 4 * dot, x + 4 * dot, y + 4 * dot) for x, y in at]
    beside = (edge.x0, figure.bbox.x1)  # left of the axis its own names stand, right of the picture nothing can
    taken += [(-math.inf, -math.inf, beside[0], math.inf), (beside[1], -math.inf, math.inf, math.inf)]
    for (x, y, name), (px, py) in sorted(zip(points, at, strict=True), key=lambda pair: (-pair[1][1], pair[1][0])):
        width, height = 0.56 * SIZE * len(name) * dot, 1.3 * SIZE * dot
        boxes = {place: _box(px + place[0] * dot, py + place[1] * dot, width, height, place[0] < 0) for place in PLACES}
        best = next((p for p in PLACES if not any(_meet(boxes[p], other) for other in taken)), PLACES[-2])
        taken.append(boxes[best])
        far = max(map(abs, best)) > NEAR
        axis.annotate(
            name, (x, y), xytext=best, textcoords="offset points", fontsize=SIZE, va="center", ha="right" if best[0] < 0 else "left",
            arrowprops={"arrowstyle": "-", "lw": 0.5, "color": "#8a8f98", "shrinkB": 2} if far else None, annotation_clip=False,
        )  # fmt: skip


def _box(x: float, y: float, width: float, height: float, leftwards: bool) -> Box:
    left = x - width if leftwards else x
    return left, y - height / 2, left + width, y + height / 2


def _meet(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
