"""Inline-SVG charts for the report: lines with bands, intervals on a common scale, a grid of outcomes.

Every function returns one `<svg>` element as text: a title and a description for screen readers, a tooltip
on every mark, colours as CSS classes (`CHART_CSS`) so that the page's light and dark mode apply. None and NaN
are gaps. What lies outside a fixed range, or is not positive on a log axis, sits on the edge as a hollow mark
and keeps its true value in the tooltip.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal, NamedTuple

Format = Callable[[float], str]
Interval = tuple[float, float]

CHART_CSS = """
.chart{display:block;width:100%;height:auto;font:11px var(--sans);overflow:visible}
.chart text{fill:var(--muted)} .chart text.strong{fill:var(--ink);font-size:12.5px}
.chart .end{text-anchor:end} .chart .middle{text-anchor:middle}
.chart .grid{stroke:var(--hair)} .chart .axis{stroke:var(--faint)}
.chart .reference{stroke:var(--muted);stroke-dasharray:2 3} .chart text.label{font-style:italic}
.chart .line{fill:none;stroke:var(--tint);stroke-width:1.7;stroke-linejoin:round;stroke-linecap:round}
.chart .band{fill:var(--tint);opacity:.16} .chart .whisker{stroke:var(--tint);stroke-width:1.5}
.chart .dot{fill:var(--tint);stroke:transparent;stroke-width:10;paint-order:stroke}
.chart .quiet{opacity:0} .chart .dot:hover{opacity:1;stroke:var(--tint);stroke-width:3}
.chart .hollow{fill:var(--paper);stroke:var(--tint);stroke-width:1.5}
.chart .cell{fill:var(--tint)} .chart .open{fill:none;stroke:var(--tint)}
.chart .strand{fill:none;stroke:var(--tint);stroke-width:1.6;stroke-linejoin:round}
.chart text.tick{paint-order:stroke;stroke:var(--paper);stroke-width:3;stroke-linejoin:round}
.chart .strand.bold{stroke-width:3.2} .chart .strand:hover{stroke-width:4;opacity:1}
.tint-0{--tint:var(--after)} .tint-1{--tint:var(--before)} .tint-2{--tint:var(--warm)}
.tint-3{--tint:var(--faint)} .tint-4{--tint:var(--violet)} .tint-5{--tint:var(--green)}
"""
"""Needs --sans, --ink, --muted, --faint, --hair, --paper, --after, --before, --warm, --violet, --green."""

NUM_TINTS = 6


@dataclass(frozen=True, kw_only=True)
class Series:
    """One variable against x. `interval` (low, high) becomes a band around a line, a whisker at a point."""

    name: str
    x: Sequence[float]
    y: Sequence[float | None]
    interval: Sequence[Interval | None] = ()
    mark: Literal["line", "point"] = "line"
    tint: int = 0


@dataclass(frozen=True, kw_only=True)
class Reference:
    """A horizontal line, named in the legend: a target, a limit, a starting value."""

    y: float
    label: str


@dataclass(frozen=True, kw_only=True)
class IntervalRow:
    """An estimate with its interval; `detail` is printed after the numbers, for example "144 of 200"."""

    label: str
    value: float
    interval: Interval | None
    detail: str = ""
    tint: int = 0


def number(value: float) -> str:
    """Three significant digits, short: 94200 -> "94.2k", -0.5 -> "−0.5", 0.00002 -> "2e−5"."""
    size = abs(value)
    if size >= 999.5:
        for scale, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
            if size >= 0.9995 * scale:
                return f"{value / scale:.3g}{unit}".replace("-", "−")
    if 0 < size < 0.001:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}".replace("-", "−")
    return f"{value:.3g}".replace("-", "−")


def percent(value: float) -> str:
    """A proportion in [0, 1] as per cent, with a decimal only where it says something: 0.415 -> "41.5%"."""
    return f"{100 * value:.1f}".removesuffix(".0").replace("-", "−") + "%"


class _Point(NamedTuple):
    x: float
    y: float
    interval: Interval | None


@dataclass(frozen=True)
class _Axis:
    """Maps values in [low, high] to pixels; what is outside lands on the edge."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high = self._position(self.low), self._position(self.high)
        place = low if self.log and value <= 0 else min(max(self._position(value), low), high)
        return round(self.start + (place - low) / (high - low) * (self.end - self.start), 1)

    def _position(self, value: float) -> float:
        return math.log10(value) if self.log else value

    def holds(self, value: float) -> bool:
        slack = 0.0 if self.log else 1e-9 * (self.high - self.low)
        return self.low - slack <= value <= self.high + slack

    def ticks(self, wanted: int, *, whole: bool = False) -> list[float]:
        """Round values in range, about as many as wanted; only integers when what they count is whole."""
        if self.log:
            first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            stride = max(1, math.ceil((last - first) / wanted))
            digits = (1, 2, 5) if last - first <= 1 else (1,)
            candidates = [d * 10.0**e for e in range(first, last + 1, stride) for d in digits]
        else:
            step = _nice_step(self.high - self.low, wanted, whole=whole)
            first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
            candidates = [i * step for i in range(first, last + 1)]
        return [tick for tick in candidates if self.holds(tick)]


def _nice_step(span: float, wanted: int, *, whole: bool = False) -> float:
    size: float = 10.0 ** math.floor(math.log10(span / wanted))
    factors = (1.0, 2.0, 5.0, 10.0) if whole else (1.0, 2.0, 2.5, 5.0, 10.0)
    step = next(size * factor for factor in factors if size * factor * wanted >= span * 0.999)
    return max(1.0, step) if whole else step


def _range(values: list[float], fixed: Interval | None, log: bool) -> Interval:
    """Limits at round numbers. Zero is in view when nothing is negative: a small wiggle should look small."""
    if fixed is not None:
        return fixed
    if log:
        positive = [value for value in values if value > 0] or [1.0]
        bottom: float = 10.0 ** math.floor(math.log10(min(positive)))
        return bottom, 10.0 ** (math.floor(math.log10(max(positive))) + 1)
    low, high = min([0.0, *values]), max([0.0, *values])
    if low == high:
        return 0.0, 1.0
    step = _nice_step(high - low, 4)
    return step * math.floor(low / step + 1e-9), step * math.ceil(high / step - 1e-9)


def _svg(width: float, height: float, title: str, description: str, body: Iterable[str]) -> str:
    return (
        f'<svg class="chart" viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(title)}">'
        f"<title>{escape(title)}</title><desc>{escape(description)}</desc>{''.join(body)}</svg>"
    )


def _line(x1: float, y1: float, x2: float, y2: float, css: str) -> str:
    return f'<line class="{css}" x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}"/>'


def _text(x: float, y: float, text: str, css: str = "") -> str:
    return f'<text class="{css}" x="{x:g}" y="{y:g}">{escape(text)}</text>'


def _dot(x: float, y: float, radius: float, tip: str, css: str = "dot") -> str:
    return f'<circle class="{css}" cx="{x:g}" cy="{y:g}" r="{radius:g}"><title>{escape(tip)}</title></circle>'


def _tinted(tint: int, body: Iterable[str]) -> str:
    return f'<g class="tint-{tint % NUM_TINTS}">{"".join(body)}</g>'


def _points(points: Iterable[tuple[float, float]]) -> str:
    return " ".join(f"{x:g},{y:g}" for x, y in points)


def _text_width(text: str) -> float:
    """Pixels at 11 px, roughly; only spacing depends on it."""
    return 6.5 * len(text)


def _legend(series: Sequence[Series], references: Sequence[Reference], width: float) -> tuple[list[str], float]:
    """Names beside a sample of their mark, wrapped to the width. Returns the marks and the height."""
    lines = [(s.name, "point" if s.mark == "point" else "line", s.tint) for s in series if len(series) > 1]
    marks, x, y = [], 0.0, 9.0
    for name, kind, tint in [*lines, *((r.label, "reference", 0) for r in references)]:
        room = 28 + _text_width(name)
        if x > 0 and x + room > width:
            x, y = 0.0, y + 16
        line = _line(x, y - 4, x + 14, y - 4, kind)
        marks.append(_tinted(tint, [_dot(x + 7, y - 4, 3.5, name) if kind == "point" else line]))
        marks.append(_text(x + 19, y, name))
        x += room
    return marks, y + 10 if marks else 8.0


def line_chart(
    *,
    title: str,
    description: str,
    series: Sequence[Series],
    x_label: str,
    x_format: Format = number,
    y_format: Format = number,
    y_range: Interval | None = None,
    references: Sequence[Reference] = (),
    log_y: bool = False,
    width: int = 420,
    height: int = 220,
) -> str:
    """Variables against x, from x = 0 on. Width and height in px at scale 1."""
    seen = [y for s in series for y in s.y if y is not None and math.isfinite(y)]
    seen += [bound for s in series for interval in s.interval if interval for bound in interval]
    limits = _range(seen + [reference.y for reference in references], y_range, log_y)
    legend, top = _legend(series, references, width)
    bottom = height - 34.0
    y_axis = _Axis(*limits, bottom, top, log_y)
    y_ticks = y_axis.ticks(4)
    left = max(_text_width(y_format(tick)) for tick in y_ticks) + 8
    positions = [0.0, *(x for s in series for x in s.x)]
    first, last = min(positions), max(positions)
    x_axis = _Axis(first, last if last > first else first + 1, left + 4, width - 10.0)

    def body() -> Iterator[str]:
        yield from legend
        for tick in y_ticks:
            yield _line(left, y_axis(tick), width, y_axis(tick), "grid")
            yield _text(left - 6, y_axis(tick) + 4, y_format(tick), "end")
        for tick in x_axis.ticks(5, whole=all(x == int(x) for x in positions)):
            yield _line(x_axis(tick), bottom, x_axis(tick), bottom + 4, "axis")
            yield _text(x_axis(tick), bottom + 16, x_format(tick), "middle")
        yield _line(left, bottom, width, bottom, "axis")
        yield _text(width, height - 3, x_label, "end label")
        for reference in references:
            yield _line(left, y_axis(reference.y), width, y_axis(reference.y), "reference")
        for s in series:
            yield _tinted(s.tint, _series(s, x_axis, y_axis, lambda x: f"{x_format(x)} {x_label}", y_format))

    return _svg(width, height, title, description, body())


def _series(s: Series, x_axis: _Axis, y_axis: _Axis, at: Format, y_format: Format) -> Iterator[str]:
    """The unbroken stretches of a line first, then every point on top of them."""
    stretches: list[list[_Point]] = [[]]
    for x, y, interval in zip(s.x, s.y, s.interval or [None] * len(s.x), strict=True):
        if y is None or not math.isfinite(y):
            stretches.append([])
        else:
            stretches[-1].append(_Point(x, y, interval))
    if s.mark == "line":
        for stretch in stretches:
            yield from _stretch(stretch, x_axis, y_axis)
    points = [point for stretch in stretches for point in stretch]
    # Past some sixty points the dots hide the line; they stay as targets for the pointer.
    usual = "dot quiet" if s.mark == "line" and len(points) > 60 else "dot"
    for x, y, interval in points:
        if s.mark == "point" and interval:
            yield _line(x_axis(x), y_axis(interval[0]), x_axis(x), y_axis(interval[1]), "whisker")
        spread = f" ({y_format(interval[0])} to {y_format(interval[1])})" if interval else ""
        tip = f"{s.name}: {y_format(y)}{spread} at {at(x)}"
        css = usual if y_axis.holds(y) else "dot hollow"
        yield _dot(x_axis(x), y_axis(y), 3.5 if s.mark == "point" else 2.0, tip, css)


def _stretch(points: list[_Point], x_axis: _Axis, y_axis: _Axis) -> Iterator[str]:
    """A piece of line, with its band where every point has an interval. A lone point needs neither."""
    if len(points) < 2:
        return
    low = [(x_axis(p.x), y_axis(p.interval[0])) for p in points if p.interval]
    high = [(x_axis(p.x), y_axis(p.interval[1])) for p in points if p.interval]
    if len(low) == len(points):
        yield f'<polygon class="band" points="{_points(high + low[::-1])}"/>'
    yield f'<polyline class="line" points="{_points((x_axis(p.x), y_axis(p.y)) for p in points)}"/>'


def interval_chart(*, title: str, description: str, rows: Sequence[IntervalRow], width: int = 380) -> str:
    """Proportions in [0, 1] with their intervals, one below the other on a common scale."""
    height = 38 * len(rows) + 30
    axis = _Axis(0.0, 1.0, 8.0, width - 8.0)

    def body() -> Iterator[str]:
        ticks = (0.0, 0.25, 0.5, 0.75, 1.0)
        yield from (_text(axis(tick), height - 5, percent(tick), "middle") for tick in ticks)
        for i, row in enumerate(rows):
            y = 38 * i + 29
            spread = f" ({percent(row.interval[0])} to {percent(row.interval[1])})" if row.interval else ""
            yield _text(axis(0), y - 15, row.label, "strong")
            yield _text(axis(1), y - 15, f"{percent(row.value)}{spread} {row.detail}".strip(), "end")
            tip = f"{row.label}: {percent(row.value)}{spread} {row.detail}".strip()
            yield from (_line(axis(tick), y - 6, axis(tick), y + 6, "grid") for tick in ticks)
            yield _line(axis(0), y, axis(1), y, "grid")
            mark = [_dot(axis(row.value), y, 4.5, tip)]
            if row.interval:
                low, high = (axis(bound) for bound in row.interval)
                shape = f'x="{low:g}" y="{y - 5}" width="{high - low:g}" height="10" rx="2"'
                band = f'<rect class="band" {shape}/>'
                mark[:0] = [band, _line(low, y, high, y, "whisker")]
            yield _tinted(row.tint, mark)

    return _svg(width, height, title, description, body())


Cell = tuple[int, bool, str]
"""Tint, whether it is filled, tooltip."""


def outcome_grid(*, title: str, description: str, cells: Sequence[Cell], columns: int = 40) -> str:
    """One square per trial. Areas compare at a glance, single trials by pointer."""
    pitch, side = 10.5, 8

    def body() -> Iterator[str]:
        for i, (tint, filled, tip) in enumerate(cells):
            x, y = (i % columns) * pitch + 0.5, (i // columns) * pitch + 0.5
            square = f'x="{x:g}" y="{y:g}" width="{side}" height="{side}" rx="1.5"'
            css = "cell" if filled else "open"
            yield _tinted(tint, [f'<rect class="{css}" {square}><title>{escape(tip)}</title></rect>'])

    return _svg(columns * pitch, pitch * max(1, -(-len(cells) // columns)), title, description, body())


class Dimension(NamedTuple):
    """A vertical axis of `parallel_coordinates`: its name, and (place in [0, 1], text) of its ticks."""

    label: str
    ticks: Sequence[tuple[float, str]]


@dataclass(frozen=True, kw_only=True)
class Strand:
    """One line through all axes, at a place in [0, 1] on each; a gap where it is None."""

    at: Sequence[float | None]
    tip: str
    tint: int = 0
    strength: float = 1.0
    """Opacity in [0, 1]."""
    bold: bool = False


def parallel_coordinates(
    *, title: str, description: str, dimensions: Sequence[Dimension], strands: Sequence[Strand], width: int = 960
) -> str:
    """Many settings of many options at once: an axis each, a line for each setting. Later strands lie on top."""
    top, bottom, height = 44.0, 262.0, 276
    gap = (width - 120.0) / max(1, len(dimensions) - 1)

    def place(axis: int, at: float) -> tuple[float, float]:
        return round(50.0 + axis * gap, 1), round(bottom - at * (bottom - top), 1)

    def body() -> Iterator[str]:
        for strand in strands:
            css = "strand bold" if strand.bold else "strand"
            shape = f'class="{css}" opacity="{strand.strength:.2f}"'
            for stretch in _unbroken([None if at is None else place(i, at) for i, at in enumerate(strand.at)]):
                tip = f"<title>{escape(strand.tip)}</title>"
                yield _tinted(strand.tint, [f'<polyline {shape} points="{_points(stretch)}">{tip}</polyline>'])
        for i, dimension in enumerate(dimensions):
            x, _ = place(i, 0.0)
            yield _line(x, top, x, bottom, "axis")
            # Names are longer than the gap; every other one is a line higher.
            yield _text(x, top - (30 if i % 2 else 14), dimension.label, "strong middle")
            for at, text in dimension.ticks:
                _, y = place(i, at)
                yield _line(x - 3, y, x + 3, y, "axis")
                yield _text(x + 6, y + 4, text, "tick")

    return _svg(width, height, title, description, body())


def _unbroken(points: Sequence[tuple[float, float] | None]) -> list[list[tuple[float, float]]]:
    stretches: list[list[tuple[float, float]]] = [[]]
    for point in points:
        if point is None:
            stretches.append([])
        else:
            stretches[-1].append(point)
    return [stretch for stretch in stretches if len(stretch) > 1]
