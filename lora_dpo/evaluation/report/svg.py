"""Small plots as SVG text: lines, histograms, intervals. Colours are classes, so that the page's style decides them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape

WIDTH, HEIGHT = 460, 220
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 8, 30
POINTS = WIDTH
"""Points of a line at most: a page may draw its plots anew every second."""
COLOURS = 8
"""Series have the classes c0 to c7; further ones begin again."""


@dataclass(frozen=True)
class Series:
    """One line: a name and its points. A y that is not finite breaks the line."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float]


def lines(
    series: Sequence[Series],
    *,
    title: str,
    unit: str = "step",
    level: float | None = None,
    until: float | None = None,
    within: tuple[float, float] | None = None,
    empty: str = "",
) -> str:
    """A line plot with a legend if there are several series.

    Args:
        unit: what the x axis counts.
        level: a y that gets a line of its own, such as 0 or chance.
        until: where the x axis ends, which then begins at 0: a run that goes on has a place for what is to come.
        within: ends of the y axis; by default what the points need.
        empty: what stands in the place of a plot without points; without it nothing is drawn.
    """
    points = [(x, y) for one in series for x, y in zip(one.xs, one.ys, strict=True) if math.isfinite(y)]
    if not points:
        return _figure(title, "", [one.name for one in series], empty=empty) if empty else ""
    ys = [y for _, y in points] + ([level] if level is not None else [])
    frame = _Frame.around([x for x, _ in points], ys)
    if until is not None:
        frame = replace(frame, low=0.0, high=max(until, 1.0))
    if within is not None:
        frame = replace(frame, bottom=within[0], top=within[1])
    body = [_axes(frame, unit)]
    if level is not None:
        y = frame.y(level)
        body.append(f'<line class="level" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
    for number, one in enumerate(series):
        for piece in _pieces(one):
            path = " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in piece)
            if len(piece) > 1:
                body.append(f'<polyline class="c{number % COLOURS}" points="{path}"/>')
            cx, _, cy = path.rpartition(" ")[2].partition(",")
            body.append(f'<circle class="f{number % COLOURS}" cx="{cx}" cy="{cy}" r="2.5"/>')
    last = [(one.name, [y for y in one.ys if math.isfinite(y)]) for one in series]
    label = ", ".join(f"{name} {ys[-1]:.3g}" for name, ys in last if ys)
    return _figure(title, "".join(body), [one.name for one in series], label=f"{title} by {unit}; last {label}")


def histogram(groups: Sequence[tuple[str, Sequence[float]]], *, title: str, unit: str, bins: int = 24) -> str:
    """Histograms of one or more groups over common bins, drawn through each other."""
    values = [value for _, group in groups for value in group if math.isfinite(value)]
    if not values:
        return ""
    low, high = min(values), max(values)
    if low == high:
        low, high = low - 0.5, high + 0.5
    counts = [_counts(group, low, high, bins) for _, group in groups]
    frame = _Frame(low, high, 0.0, max(1.0, max(max(column) for column in counts)))
    body = [_axes(frame, unit)]
    width = (high - low) / bins
    for number, column in enumerate(counts):
        for index, count in enumerate(column):
            if count:
                left, right = frame.x(low + index * width), frame.x(low + (index + 1) * width)
                top = frame.y(count)
                body.append(
                    f'<rect class="f{number % COLOURS}" x="{left:.1f}" y="{top:.1f}" '
                    f'width="{max(1.0, right - left - 1):.1f}" height="{frame.y(0) - top:.1f}"/>'
                )
    if low < 0 < high:
        x = frame.x(0)
        body.append(f'<line class="level" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
    return _figure(title, "".join(body), [name for name, _ in groups])


def intervals(rows: Sequence[tuple[str, float, float, float]], *, title: str, level: float | None = None) -> str:
    """Estimates with their intervals, one a line: `(name, value, low, high)`."""
    rows = [row for row in rows if all(map(math.isfinite, row[1:]))]
    if not rows:
        return ""
    left, step = 150, 24
    height = step * len(rows) + BOTTOM + TOP
    edges = [value for row in rows for value in row[2:]] + ([level] if level is not None else [])
    frame = _Frame.around(edges, [0.0, 1.0], left=left, height=height)
    body = []
    for tick in _ticks(frame.low, frame.high):
        x = frame.x(tick)
        body.append(f'<line class="gl" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{height - BOTTOM}"/>')
        body.append(f'<text class="tick" x="{x:.1f}" y="{height - BOTTOM + 14}" text-anchor="middle">{tick:g}</text>')
    if level is not None:
        x = frame.x(level)
        body.append(f'<line class="level" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{height - BOTTOM}"/>')
    for number, (name, value, low, high) in enumerate(rows):
        y = TOP + step * (number + 0.5)
        body.append(f'<text class="name" x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{escape(name)}</text>')
        body.append(f'<line class="c0" x1="{frame.x(low):.1f}" x2="{frame.x(high):.1f}" y1="{y:.1f}" y2="{y:.1f}"/>')
        body.append(f'<circle class="f0" cx="{frame.x(value):.1f}" cy="{y:.1f}" r="4"/>')
    return _figure(title, "".join(body), [], height=height)


@dataclass(frozen=True)
class Dot:
    """A point of a plane, with an interval of its y."""

    name: str
    x: float
    y: float
    low: float
    high: float
    kind: int = 0
    """Which of the plane's kinds it is: its colour."""


def plane(
    dots: Sequence[Dot],
    *,
    title: str,
    unit: str,
    kinds: Sequence[str] = (),
    frontier: Sequence[tuple[float, float]] = (),
) -> str:
    """Points with their intervals, named, and a line through those that no other beats.

    Args:
        unit: what the x axis is.
        kinds: names of the kinds, for the legend.
        frontier: places that the line goes through.
    """
    dots = [dot for dot in dots if all(map(math.isfinite, (dot.x, dot.y, dot.low, dot.high)))]
    if not dots:
        return ""
    frame = _Frame.around([0.0, *(dot.x for dot in dots)], [edge for dot in dots for edge in (dot.low, dot.high)])
    body = [_axes(frame, unit)]
    if len(frontier) > 1:
        path = " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in frontier)
        body.append(f'<polyline class="level" points="{path}"/>')
    names: list[tuple[float, float]] = []
    for dot in dots:
        x, y, colour = frame.x(dot.x), frame.y(dot.y), dot.kind % COLOURS
        ends = f'y1="{frame.y(dot.low):.1f}" y2="{frame.y(dot.high):.1f}"'
        body.append(f'<line class="c{colour}" opacity=".45" x1="{x:.1f}" x2="{x:.1f}" {ends}/>')
        body.append(f'<circle class="f{colour}" cx="{x:.1f}" cy="{y:.1f}" r="4"/>')
        dx, dy = _corner(x, y, names)
        names.append((x + 2 * dx, y + dy))
        anchor = ' text-anchor="end"' if dx < 0 else ""
        body.append(f'<text class="tick" x="{x + dx:.1f}" y="{y + dy:.1f}"{anchor}>{escape(dot.name)}</text>')
    return _figure(title, "".join(body), list(kinds))


def _corner(x: float, y: float, names: Sequence[tuple[float, float]]) -> tuple[int, int]:
    """Where a dot's name goes, from the dot: right of it and above, or the first corner that is near no other name.

    Args:
        names: the middles of those that are there.
    """
    corners = [(dx, dy) for dy in (-5, 14) for dx in (6, -6) if dx < 0 or x <= WIDTH - 40]
    for dx, dy in corners:
        if all(abs(x + 2 * dx - other) > 14 or abs(y + dy - below) > 11 for other, below in names):
            return dx, dy
    return corners[0]


@dataclass(frozen=True)
class _Frame:
    """From values to places in the drawing."""

    low: float
    high: float
    bottom: float
    top: float
    left: int = LEFT
    height: int = HEIGHT

    @classmethod
    def around(cls, xs: Sequence[float], ys: Sequence[float], *, left: int = LEFT, height: int = HEIGHT) -> _Frame:
        low, high = min(xs), max(xs)
        bottom, top = min(ys), max(ys)
        margin = (top - bottom) * 0.06 or max(abs(top) * 0.1, 0.05)
        side = 0.0 if high > low else max(abs(high) * 0.1, 0.5)
        return cls(low - side, high + side, bottom - margin, top + margin, left, height)

    def x(self, value: float) -> float:
        return self.left + (value - self.low) / (self.high - self.low) * (WIDTH - self.left - RIGHT)

    def y(self, value: float) -> float:
        room = self.height - TOP - BOTTOM
        return TOP + (self.top - value) / (self.top - self.bottom) * room


def _axes(frame: _Frame, unit: str) -> str:
    body = []
    for tick in _ticks(frame.bottom, frame.top):
        y = frame.y(tick)
        body.append(f'<line class="gl" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        body.append(f'<text class="tick" x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for tick in _ticks(frame.low, frame.high):
        x = frame.x(tick)
        body.append(f'<text class="tick" x="{x:.1f}" y="{HEIGHT - 16}" text-anchor="middle">{tick:g}</text>')
    body.append(f'<text class="tick" x="{WIDTH - RIGHT}" y="{HEIGHT - 3}" text-anchor="end">{escape(unit)}</text>')
    return "".join(body)


def _ticks(low: float, high: float) -> list[float]:
    """About five round values between two bounds."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(number * step, 12) + 0.0 for number in range(first, last + 1)]


def _pieces(one: Series) -> list[list[tuple[float, float]]]:
    found: list[list[tuple[float, float]]] = [[]]
    for x, y in zip(one.xs, one.ys, strict=True):
        if math.isfinite(y):
            found[-1].append((x, y))
        elif found[-1]:
            found.append([])
    return [_thinned(piece) for piece in found if piece]


def _thinned(piece: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most `POINTS` points: of each stretch the first, the lowest and the highest; and the last of all."""
    if len(piece) <= POINTS:
        return piece
    width = math.ceil(3 * len(piece) / (POINTS - 1))
    kept: list[tuple[float, float]] = []
    for start in range(0, len(piece), width):
        stretch = piece[start : start + width]
        ends = (min(stretch, key=lambda point: point[1]), max(stretch, key=lambda point: point[1]))
        kept += sorted({stretch[0], *ends})
    return kept if kept[-1] == piece[-1] else [*kept, piece[-1]]


def _counts(values: Sequence[float], low: float, high: float, bins: int) -> list[int]:
    counts = [0] * bins
    for value in values:
        if math.isfinite(value):
            counts[min(bins - 1, int((value - low) / (high - low) * bins))] += 1
    return counts


def _figure(
    title: str, body: str, names: Sequence[str], *, height: int = HEIGHT, label: str = "", empty: str = ""
) -> str:
    legend = ""
    if len(names) > 1:
        keys = "".join(
            f'<span><i class="k{number % COLOURS}"></i>{escape(name)}</span>' for number, name in enumerate(names)
        )
        legend = f'<p class="legend">{keys}</p>'
    if empty:
        drawn = f'<div class="empty">{escape(empty)}</div>'
    else:
        drawn = f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(label or title)}">{body}</svg>'
    return f"<figure><figcaption>{escape(title)}</figcaption>{drawn}{legend}</figure>"
