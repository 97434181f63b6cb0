"""Charts as inline SVG, coloured by the page's CSS variables so that they follow light and dark."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 560, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 76, 16, 14, 42
_SERIES = 7  # colours of the palette, --s0 to --s6


def colour(number: int) -> str:
    return f"var(--s{number % _SERIES})"


def text(x: float, y: float, content: str, anchor: str = "middle", kind: str = "tick", turn: float | None = None) -> str:
    rotate = f' transform="rotate({turn:g} {x:.1f} {y:.1f})"' if turn is not None else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}"{rotate}>{escape(content)}</text>'


def svg(width: float, height: float, body: Sequence[str], label: str, style: str = "") -> str:
    fixed = f' style="{style}"' if style else ""
    head = f'<svg viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{escape(label, quote=True)}"{fixed}>'
    return head + "".join(body) + "</svg>"


@dataclass(frozen=True)
class Axis:
    """Maps values from `low` to `high` to pixels from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, value = (math.log10(max(v, 1e-300)) if self.log else v for v in (self.low, self.high, value))
        return self.start + (value - low) / ((high - low) or 1.0) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round values inside the range: powers of ten with 2 and 5 between them, or steps of 1, 2 or 5."""
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            fine = [m * 10.0**d for d in decades for m in (1, 2, 5)]
            inside = [v for v in fine if self.low <= v <= self.high]
            coarse = [v for v in inside if f"{v:e}".startswith("1.0")]
            return coarse if len(coarse) > 2 else inside
        span = (self.high - self.low) or 1.0
        step = next(m * 10.0**d for d in range(-12, 13) for m in (1, 2, 5) if span / (m * 10.0**d) <= 5)
        first = math.ceil(self.low / step - 1e-9)
        return [step * n for n in range(first, math.floor(self.high / step + 1e-9) + 1)]


def frame(x: Axis, y: Axis, x_title: str, y_title: str, show_x: Callable[[float], str], show_y: Callable[[float], str]) -> list[str]:
    """Grid lines, tick labels and titles."""
    parts = []
    for value in y.ticks():
        at = y(value)
        parts.append(f'<line x1="{x.start:.1f}" y1="{at:.1f}" x2="{x.end:.1f}" y2="{at:.1f}" class="grid"/>')
        parts.append(text(x.start - 6, at + 4, show_y(value), "end"))
    for value in x.ticks():
        parts.append(text(x(value), y.start + 17, show_x(value)))
    parts.append(text((x.start + x.end) / 2, y.start + 35, x_title, kind="axis"))
    parts.append(text(13, (y.start + y.end) / 2, y_title, kind="axis", turn=-90))
    return parts


def plot_area(
    x_range: tuple[float, float], y_range: tuple[float, float], log_x: bool = False, log_y: bool = False, left: int = _LEFT
) -> tuple[Axis, Axis]:
    return (
        Axis(*x_range, left, WIDTH - _RIGHT, log_x),
        Axis(*y_range, HEIGHT - _BOTTOM, _TOP, log_y),
    )


Point = tuple[str, float, float, tuple[float, float] | None]


def scatter(points: Sequence[Point], x_title: str, y_title: str, numbers: Mapping[str, int]) -> str:
    """`(name, x > 0, y, interval of y)` with a logarithmic x and names beside the points; y is a share."""
    lows = [min(y, *(ci or (y,))) for _, _, y, ci in points]
    xs = [x for _, x, _, _ in points]
    x, y = plot_area((min(xs) / 2, max(xs) * 2), (min(0.0, *lows), 1.0), log_x=True)
    parts = frame(x, y, x_title, y_title, megabytes, lambda v: f"{v:.0%}")
    for place, (name, size, share, interval) in enumerate(points):
        number = numbers[name]
        px, py = x(size), y(share)
        if interval:
            ends = f'x1="{px:.1f}" x2="{px:.1f}" y1="{y(interval[0]):.1f}" y2="{y(interval[1]):.1f}"'
            parts.append(f'<line {ends} stroke="{colour(number)}" stroke-width="2"/>')
        title = f"<title>{escape(name)}: {share:.1%} at {megabytes(size)}</title>"
        parts.append(f'<circle cx="{px:.1f}" cy="{py:.1f}" r="6" fill="{colour(number)}">{title}</circle>')
        right = px < (x.start + x.end) / 2
        # Names alternate below and above, so that neighbours do not write over each other; none goes into the axis.
        below = place % 2 == 0 and py < y.start - 30
        parts.append(text(px + (11 if right else -11), py + (17 if below else -7), name, "start" if right else "end", "name"))
    return svg(WIDTH, HEIGHT, parts, f"{y_title} against {x_title}")


def bars(rows: Sequence[tuple[str, float, float, float]], unit: str, label: str, numbers: Mapping[str, int]) -> str:
    """Horizontal bars `(name, median, low, high)` with a whisker from low to high."""
    line, top = 46, 6
    x = Axis(0.0, max(high for _, _, _, high in rows) or 1.0, 4, WIDTH - 110)
    parts = []
    for number, (name, median, low, high) in enumerate(rows):
        y = top + number * line
        parts.append(text(4, y + 12, name, "start", "name"))
        parts.append(f'<rect x="4" y="{y + 18}" width="{max(x(median) - 4, 1):.1f}" height="16" rx="2" fill="{colour(numbers[name])}"/>')
        parts.append(f'<line x1="{x(low):.1f}" x2="{x(high):.1f}" y1="{y + 26}" y2="{y + 26}" class="whisker"/>')
        number_text = f"{median:,.0f}" if median >= 1000 else f"{median:.4g}"
        parts.append(text(x(high) + 8, y + 31, f"{number_text} {unit}", "start", "name"))
    return svg(WIDTH, top + len(rows) * line, parts, label)


def lines(
    series: Sequence[tuple[str, Sequence[tuple[float, float]]]],
    titles: tuple[str, str],
    log_y: bool,
    marks: Mapping[str, float],
    share: bool,
    numbers: Mapping[str, int],
    show_x: Callable[[float], str] | None = None,
) -> str:
    """Curves with a legend below; `marks` are vertical lines at x with a name. y is a share, or logarithmic.

    With `show_x`, which writes its numbers, x is logarithmic and every point is marked, as there are few.
    """
    xs = [x for _, points in series for x, _ in points]
    ys = [y for _, points in series for _, y in points if y > 0 or not log_y]
    low, high = (min(ys), max(ys)) if log_y else (min(0.0, *ys), max(1.0, *ys))
    x, y = plot_area((min(xs), max(xs)), (low * (0.9 if log_y else 1), high), log_x=show_x is not None, log_y=log_y)
    parts = frame(x, y, titles[0], titles[1], show_x or (lambda v: f"{v:g}"), (lambda v: f"{v:.0%}") if share else (lambda v: f"{v:.3g}"))
    for name, at in marks.items():
        if x.low <= at <= x.high:
            parts.append(f'<line x1="{x(at):.1f}" x2="{x(at):.1f}" y1="{y.start}" y2="{y.end}" class="mark"/>')
            side = "start" if x(at) < x.end - 80 else "end"
            parts.append(text(x(at) + (5 if side == "start" else -5), y.end + 12, name, side, "tick"))
    for name, points in series:
        path = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in points if b > 0 or not log_y)
        title = f"<title>{escape(name)}</title>"
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour(numbers[name])}" stroke-width="2">{title}</polyline>')
        if show_x is None:
            continue
        for a, b in points:
            title = f"<title>{escape(name)}: {b:.1%} at {show_x(a)}</title>"
            parts.append(f'<circle cx="{x(a):.1f}" cy="{y(b):.1f}" r="4" fill="{colour(numbers[name])}">{title}</circle>')
    legend = [text(x.start + 18 + 170 * (n % 3), HEIGHT + 14 + 20 * (n // 3), name, "start", "name") for n, (name, _) in enumerate(series)]
    dots = [
        f'<rect x="{x.start + 170 * (n % 3):.1f}" y="{HEIGHT + 5 + 20 * (n // 3)}" width="12" height="10" fill="{colour(numbers[name])}"/>'
        for n, (name, _) in enumerate(series)
    ]
    return svg(WIDTH, HEIGHT + 8 + 20 * math.ceil(len(series) / 3), parts + legend + dots, f"{titles[1]} by {titles[0]}")


def heat_map(cells: Mapping[tuple[str, int], float], rows: Sequence[str], columns: Sequence[int], label: str, full: float = 1.0) -> str:
    """A square for each `(row, column)`: the stronger, the nearer to `full`; negative values in the warning colour."""
    cell, left, top = (20 if len(columns) <= 18 else 13), 64, 4
    middle = cell / 2 + 4
    parts = []
    for r, row in enumerate(rows):
        parts.append(text(left - 6, top + r * cell + middle, row, "end"))
        for c, column in enumerate(columns):
            value = cells.get((row, column))
            if value is None:
                continue
            depth = value / full
            fill, opacity = ("var(--heat)", max(depth, 0.03)) if value >= 0 else ("var(--bad)", 0.25 - depth)
            title = f"<title>{escape(row)}, layer {column}: {value:.{1 if full == 1 else 2}%}</title>"
            place = f'x="{left + c * cell}" y="{top + r * cell}" width="{cell - 2}" height="{cell - 2}" rx="2"'
            parts.append(f'<rect {place} fill="{fill}" fill-opacity="{min(opacity, 1.0):.3f}" class="cell">{title}</rect>')
    every = max(1, math.ceil(len(columns) / 16))
    for c, column in enumerate(columns):
        if c % every == 0:
            parts.append(text(left + c * cell + cell / 2 - 1, top + len(rows) * cell + 13, str(column)))
    width, height = left + len(columns) * cell + 4, top + len(rows) * cell + 18
    # Never stretched: on a narrow screen the map scrolls inside its own box instead of shrinking beyond reading.
    return svg(width, height, parts, label, f"width:{width}px;max-width:none")


def megabytes(count: float) -> str:
    for factor, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= factor:
            return f"{count / factor:.3g} {unit}"
    return f"{count:.0f} B"
