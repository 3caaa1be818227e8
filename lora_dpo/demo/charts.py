"""Small line charts as SVG text: light or dark with the page, sharp at any size, no script."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from math import ceil

WIDTH, HEIGHT = 360, 200
LEFT, RIGHT, TOP, BOTTOM = 44, 12, 14, 26

MOST_POINTS = 300
"""Points of a line: about as many as the chart is wide. A page draws its charts anew every second and a half."""

Points = Sequence[tuple[float, float]]


def line_chart(
    title: str,
    series: Mapping[str, Points],
    *,
    steps: int,
    low: float | None = None,
    high: float | None = None,
    zero: bool = False,
) -> str:
    """One chart as a `<figure>`: a line for each series of `(step, value)` points.

    Args:
        series: by label; one alone has no legend. The n-th has the class `line-n`, which the page colours.
        steps: right end of the step axis.
        low: lower end of the value axis; by default what the points need.
        zero: draw the line at 0.
    """
    series = {label: thinned(points) for label, points in series.items()}
    values = [value for points in series.values() for _, value in points]
    legend = "" if len(series) == 1 else "".join(_key(number, label) for number, label in enumerate(series, start=1))
    head = f'<figcaption><span class="chart-title">{escape(title)}</span>{legend}</figcaption>'
    if not values:
        return f'<figure class="chart">{head}<div class="chart-empty">no step yet</div></figure>'
    bottom, top, ticks = _scale([*values, *([0.0] if zero else [])], low, high)
    across = max(steps, 1)

    def x(step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (step / across)

    def y(value: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (1 - (value - bottom) / (top - bottom))

    parts = [
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>'
        f'<text x="{LEFT - 6}" y="{y(tick) + 3.5:.1f}" text-anchor="end">{tick:g}</text>'
        for tick in ticks
    ]
    if zero:
        parts.append(f'<line class="zero" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(0):.1f}" y2="{y(0):.1f}"/>')
    parts += [
        f'<text x="{x(tick):.1f}" y="{HEIGHT - 8}" text-anchor="middle">{tick:g}</text>' for tick in _step_ticks(across)
    ]
    parts += [_line(number, points, x, y) for number, points in enumerate(series.values(), start=1) if points]
    last = ", ".join(f"{label} {points[-1][1]:.3g}" for label, points in series.items() if points)
    svg = (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)} by step; last {escape(last)}">'
        f"{''.join(parts)}</svg>"
    )
    return f'<figure class="chart">{head}{svg}</figure>'


def thinned(points: Points) -> Points:
    """At most `MOST_POINTS` points: of each stretch the first, the lowest and the highest; and the last of all."""
    if len(points) <= MOST_POINTS:
        return points
    stretch = ceil(3 * len(points) / (MOST_POINTS - 1))
    kept: list[tuple[float, float]] = []
    for start in range(0, len(points), stretch):
        part = points[start : start + stretch]
        extremes = {part[0], min(part, key=lambda point: point[1]), max(part, key=lambda point: point[1])}
        kept += sorted(extremes)
    return kept if kept[-1] == points[-1] else [*kept, points[-1]]


def _key(number: int, label: str) -> str:
    return f'<span class="chart-key key-{number}">{escape(label)}</span>'


def _line(number: int, points: Points, x: Callable[[float], float], y: Callable[[float], float]) -> str:
    path = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in points)
    end = points[-1]
    return (
        f'<polyline class="line-{number}" points="{path}"/>'
        f'<circle class="line-{number}" cx="{x(end[0]):.1f}" cy="{y(end[1]):.1f}" r="2.6"/>'
    )


def _scale(values: Sequence[float], low: float | None, high: float | None) -> tuple[float, float, list[float]]:
    """Ends of the value axis and round ticks between them."""
    from matplotlib.ticker import MaxNLocator

    bottom = min(values) if low is None else low
    top = max(values) if high is None else high
    if top - bottom < 1e-9:
        bottom, top = bottom - 0.5, top + 0.5
    ticks = [float(tick) for tick in MaxNLocator(nbins=4, steps=[1, 2, 2.5, 5, 10]).tick_values(bottom, top)]
    if low is None:
        bottom = ticks[0]
    if high is None:
        top = ticks[-1]
    return bottom, top, [tick for tick in ticks if bottom - 1e-9 <= tick <= top + 1e-9]


def _step_ticks(steps: int) -> list[int]:
    from matplotlib.ticker import MaxNLocator

    found = MaxNLocator(nbins=5, integer=True).tick_values(0, steps)
    return [int(tick) for tick in found if 0 <= tick <= steps]
