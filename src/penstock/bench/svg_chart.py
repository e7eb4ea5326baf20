"""Line charts as SVG text: no library, no script, colours by the page's style so that they follow light and dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Final

WIDTH: Final = 640
HEIGHT: Final = 280
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 16, 30, 44
_MAX_POINTS: Final = 800


@dataclass(frozen=True)
class Series:
    """x, y: of the same length; points that are not finite are left out. is_stepped: y holds until the next x."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    is_stepped: bool = False
    has_markers: bool = False
    has_line: bool = True


@dataclass(frozen=True)
class Axis:
    label: str
    is_log: bool = False


@dataclass(frozen=True)
class _Scale:
    low: float
    high: float
    start: float
    end: float
    is_log: bool

    def at(self, value: float) -> float:
        low, high = (math.log10(self.low), math.log10(self.high)) if self.is_log else (self.low, self.high)
        place = math.log10(max(value, self.low)) if self.is_log else value
        return self.start + (place - low) / (high - low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        if self.is_log:
            first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            steps = (1, 2, 5) if last - first <= 2 else (1,)
            found = [step * 10.0**power for power in range(first, last + 1) for step in steps]
        else:
            step = nice_step((self.high - self.low) / 6)
            start = math.ceil(self.low / step)
            found = [index * step for index in range(start, math.floor(self.high / step + 1e-9) + 1)]
        slack = 1e-9 * (self.high - self.low)
        return [tick for tick in found if self.low - slack <= tick <= self.high + slack]


def line_chart(title: str, x: Axis, y: Axis, series: Sequence[Series], limits: Sequence[tuple[str, float]] = ()) -> str:
    """limits: (name, y) of horizontal lines. An empty chart says so."""
    drawn = [(one, _points(one, x.is_log, y.is_log)) for one in series]
    drawn = [(one, points) for one, points in drawn if points]
    if not drawn:
        return f'<figure class="chart"><figcaption>{escape(title)}</figcaption><p class="none">No data.</p></figure>'
    xs = [point[0] for _, points in drawn for point in points]
    ys = [point[1] for _, points in drawn for point in points] + [value for _, value in limits]
    across = _scale(xs, _LEFT, WIDTH - _RIGHT, x.is_log, from_zero=False)
    up = _scale(ys, HEIGHT - _BOTTOM, _TOP, y.is_log, from_zero=True)
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">',
        *_grid(across, up, x, y),
    ]
    for number, (one, points) in enumerate(drawn):
        parts.append(_path(one, points, across, up, number % 6))
    for name, value in limits:
        place = up.at(value)
        parts.append(f'<line class="limit" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{place:.1f}" y2="{place:.1f}"/>')
        parts.append(
            f'<text class="limit" x="{WIDTH - _RIGHT}" y="{place - 4:.1f}" text-anchor="end">{escape(name)}</text>'
        )
    parts.append("</svg>")
    keys = "".join(
        f'<span class="key c{number % 6}">{escape(one.name)}</span>' for number, (one, _) in enumerate(drawn)
    )
    caption = f'<figcaption>{escape(title)}<span class="keys">{keys}</span></figcaption>'
    return f'<figure class="chart">{caption}{"".join(parts)}</figure>'


def _points(series: Series, x_is_log: bool, y_is_log: bool) -> list[tuple[float, float]]:
    """What can be drawn, thinned evenly when there is more than the eye can tell apart."""
    found = [
        (x, y)
        for x, y in zip(series.x, series.y, strict=True)
        if math.isfinite(x) and math.isfinite(y) and (x > 0 or not x_is_log) and (y > 0 or not y_is_log)
    ]
    if len(found) <= _MAX_POINTS:
        return found
    step = (len(found) - 1) / (_MAX_POINTS - 1)
    return [found[round(index * step)] for index in range(_MAX_POINTS)]


def _scale(values: Sequence[float], start: float, end: float, is_log: bool, from_zero: bool) -> _Scale:
    low, high = min(values), max(values)
    if is_log:
        low, high = 10.0 ** math.floor(math.log10(low) + 1e-9), high * 1.05
        return _Scale(low, max(high, low * 10), start, end, is_log)
    low = min(low, 0.0) if from_zero else low
    high = high if high > low else low + 1.0
    return _Scale(low, low + (high - low) * (1.06 if from_zero else 1.0), start, end, is_log)


def _grid(across: _Scale, up: _Scale, x: Axis, y: Axis) -> list[str]:
    bottom = HEIGHT - _BOTTOM
    parts = []
    for tick in across.ticks():
        place = across.at(tick)
        parts.append(f'<line class="grid" x1="{place:.1f}" x2="{place:.1f}" y1="{_TOP}" y2="{bottom}"/>')
        parts.append(f'<text x="{place:.1f}" y="{bottom + 16}" text-anchor="middle">{show_number(tick)}</text>')
    for tick in up.ticks():
        place = up.at(tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{place:.1f}" y2="{place:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{place + 4:.1f}" text-anchor="end">{show_number(tick)}</text>')
    middle = (_LEFT + WIDTH - _RIGHT) / 2
    parts.append(f'<text class="axis" x="{middle}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x.label)}</text>')
    parts.append(f'<text class="axis" x="8" y="{_TOP - 12}">{escape(y.label)}</text>')
    return parts


def _path(series: Series, points: list[tuple[float, float]], across: _Scale, up: _Scale, colour: int) -> str:
    places = [(across.at(x), up.at(y)) for x, y in points]
    commands = [f"M{places[0][0]:.1f} {places[0][1]:.1f}"]
    for x, y in places[1:]:
        commands.append(f"H{x:.1f}V{y:.1f}" if series.is_stepped else f"L{x:.1f} {y:.1f}")
    path = f'<path class="line c{colour}" d="{"".join(commands)}"/>'
    if not series.has_markers:
        return path
    path = path if series.has_line else ""
    marks = (
        f'<circle class="mark c{colour}" cx="{x:.1f}" cy="{y:.1f}" r="3.5"><title>{show_number(a)}, {show_number(b)}'
        f"</title></circle>"
        for (x, y), (a, b) in zip(places, points, strict=True)
    )
    return path + "".join(marks)


def nice_step(rough: float) -> float:
    """The next 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= rough * 0.999)


def show_number(value: float) -> str:
    """Short: 0.25, 12, 3.4k, 2M."""
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit * 10 or (abs(value) >= limit and limit > 1e3):
            return f"{value / limit:.3g}{suffix}"
    return f"{value:.4g}"
