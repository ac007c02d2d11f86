"""What a person at the terminal sees while a run works, on stderr; stdout belongs to the final JSON line.

On a terminal: a live table of the last iterations with progress bars below. Elsewhere (a log file, CI): one
line per iteration, and for bars at most one line every few seconds.
"""

import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from types import TracebackType
from typing import TYPE_CHECKING, Self, TextIO

from rlvla.svg import number

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.live import Live
    from rich.table import Table

Row = Mapping[str, float]

ROWS_SHOWN = 12
SECONDS_BETWEEN_BAR_LINES = 5.0
SECONDS_BETWEEN_FRAMES = 0.1
SPARKS = "▁▂▃▄▅▆▇█"
RECENT = 8
"""Iterations by which the remaining time is judged; the first ones of a run are slower."""


def _short(value: float) -> str:
    """Two significant digits fit ten columns into 80 characters."""
    return f"{value:.2g}"


def _percent(value: float) -> str:
    return f"{100 * value:.0f}%"


COLUMNS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("iter", "iteration", lambda i: f"{i:.0f}"),
    ("steps", "env_steps", number),
    ("success", "rollout/success", _percent),
    ("KL", "ppo/kl", _short),
    ("clip", "ppo/clip_fraction", _percent),
    ("lr", "optim/policy_lr", _short),
    ("expl.", "value/explained_variance", _short),
    ("steps/s", "speed/env_steps_per_s", number),
    ("min", "minutes", number),
)
"""Heading, metric, format."""

FULL_WIDTH = 76
NARROW = {"iter", "success", "KL", "min"}


def sparkline(values: Sequence[float | None], width: int = 24) -> str:
    """Rates in [0, 1] as block characters on a fixed scale, averaged into at most ``width`` of them.

    None and NaN leave a space.

    Examples:
        >>> sparkline([0.0, 0.5, None, 1.0])
        '▁▅ █'
    """
    size = max(1, math.ceil(len(values) / width))
    line = ""
    for start in range(0, len(values), size):
        known = [v for v in values[start : start + size] if v is not None and math.isfinite(v)]
        line += SPARKS[min(7, max(0, int(8 * sum(known) / len(known))))] if known else " "
    return line


class Progress:
    """The display of one run. It owns the terminal from `start` (or the first bar) to `close`."""

    def __init__(self, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        """Write to ``stream``, or to whatever stderr is at the time. ``clock`` gives seconds."""
        self._stream = stream
        self._clock = clock
        self._title, self._total = "", 0
        self._rows: list[Row] = []
        self._bar: tuple[str, int, int] | None = None
        self._bar_started = self._bar_told = self._drawn = -math.inf
        self._live: Live | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def start(self, title: str, total_iterations: int) -> None:
        """Say what runs. ``total_iterations`` is how often `iteration` will be called in the whole run."""
        self._title, self._total = title, total_iterations
        if self._console is None:
            self._print(title)
        else:
            self._draw(now=True)

    def iteration(self, row: Row) -> None:
        """Show a finished iteration: a row of metrics.jsonl, ``iteration`` counted from 0.

        What is absent, None or NaN is shown as a dash.
        """
        self._rows.append(row)
        self._bar = None
        if self._console is None:
            cells = "  ".join(f"{name} {cell}" for (name, _, _), cell in zip(COLUMNS, _cells(row), strict=True))
            self._print(f"{cells}  ETA {_duration(self._remaining())}")
        else:
            self._draw(now=True)

    def note(self, text: str) -> None:
        """Something worth knowing; stays above the table."""
        self._say(text, "dim")

    def warn(self, text: str) -> None:
        """Something a person should look at; stays above the table."""
        self._say(f"warning: {text}", "yellow")

    def bar(self, label: str, done: int, total: int) -> None:
        """How far the current piece of work is. Cheap enough to call at every step of it."""
        fresh = self._bar is None or done < self._bar[1]
        if fresh:
            self._bar_started = self._clock()
        self._bar = (label, done, total)
        if self._console is not None:
            self._draw(now=fresh or done >= total)
        elif self._clock() - max(self._bar_told, self._bar_started) >= SECONDS_BETWEEN_BAR_LINES:
            # The wait begins with the bar: work that takes less than a few seconds needs no line.
            self._bar_told = self._clock()
            self._print(f"{label} {done}/{total}  ETA {_duration(self._bar_remaining())}")

    def close(self) -> None:
        """Leave the table as it stands and give the terminal back. May be called again."""
        self._bar = None
        if self._live is not None:
            self._draw(now=True)
            self._live.stop()
            self._live = None

    @cached_property
    def _console(self) -> "Console | None":
        """A rich console where a person watches; None where plain lines are better."""
        from rich.console import Console

        # Without a file of its own the console follows sys.stderr, also when that is replaced later.
        console = Console(stderr=True) if self._stream is None else Console(file=self._stream)
        return console if console.is_terminal and not console.is_dumb_terminal else None

    def _print(self, text: str) -> None:
        print(text, file=self._stream or sys.stderr, flush=True)

    def _say(self, text: str, style: str) -> None:
        if self._console is None:
            self._print(text)
        else:
            from rich.text import Text

            self._console.print(Text(text, style=style))

    def _remaining(self) -> float | None:
        """Minutes that the missing iterations will take at the pace of the recent ones."""
        if not self._rows:
            return None
        last = _known(self._rows[-1], "iteration")
        times = [m for row in self._rows[-RECENT - 1 :] if (m := _known(row, "minutes")) is not None]
        if last is None or not times:
            return None
        steps = len(times) - 1
        # After one iteration only its own parts are known; what came before it does not repeat.
        parts = (_known(self._rows[-1], key) or 0.0 for key in ("time/rollout_s", "time/update_s"))
        pace = (times[-1] - times[0]) / steps if steps else sum(parts) / 60
        return max(0.0, pace * (self._total - last - 1))

    def _bar_remaining(self) -> float | None:
        """Minutes, or None while nothing is done."""
        if self._bar is None or self._bar[1] <= 0:
            return None
        _, done, total = self._bar
        return max(0.0, (self._clock() - self._bar_started) / 60 * (total - done) / done)

    def _draw(self, *, now: bool) -> None:
        """Refresh the live display, at most ten times a second unless ``now``."""
        assert self._console is not None
        if not now and self._clock() - self._drawn < SECONDS_BETWEEN_FRAMES:
            return
        self._drawn = self._clock()
        if self._live is None:
            from rich.live import Live

            # No refresh thread: it would compete with the simulators, and we know when something changed.
            # What others print on stderr is moved above the table; stdout is left alone.
            self._live = Live(console=self._console, auto_refresh=False, redirect_stdout=False)
            self._live.start()
        self._live.update(self._frame(self._console.width, self._console.height), refresh=True)

    def _frame(self, width: int, height: int) -> "RenderableType":
        from rich.console import Group
        from rich.text import Text

        head = Text(self._title, style="bold")
        bars: list[tuple[str, int, int, float | None]] = []
        parts: list[RenderableType] = [head] if self._title else []
        if self._rows:
            success = [_known(row, "rollout/success") for row in self._rows]
            head.append(f"   success {sparkline(success)}", style="not bold")
            parts.append(self._table(width, min(ROWS_SHOWN, max(1, height - 6))))
            done = int(_known(self._rows[-1], "iteration") or 0) + 1
            bars.append(("iterations", done, self._total, self._remaining()))
        if self._bar is not None:
            bars.append((*self._bar, self._bar_remaining()))
        return Group(*parts, _bars(bars))

    def _table(self, width: int, num_rows: int) -> "Table":
        """The last iterations. A narrow terminal gets fewer columns rather than cut numbers."""
        from rich import box
        from rich.table import Table

        shown = [i for i, (name, _, _) in enumerate(COLUMNS) if width >= FULL_WIDTH or name in NARROW]
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, header_style="dim")
        for i in shown:
            style = "bold" if COLUMNS[i][0] == "success" else None
            table.add_column(COLUMNS[i][0], justify="right", no_wrap=True, style=style)
        table.add_column("ETA", justify="right", no_wrap=True)
        for row in self._rows[-num_rows:]:
            cells = _cells(row)
            newest = row is self._rows[-1]
            table.add_row(*(cells[i] for i in shown), _duration(self._remaining()) if newest else "")
        return table


def _bars(bars: Sequence[tuple[str, int, int, float | None]]) -> "Table":
    """(label, done, total, minutes left), one below the other."""
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 1))
    for label, done, total, remaining in bars:
        left = f", {_duration(remaining)} left" if remaining else ""
        bar = ProgressBar(total=max(1, total), completed=done, width=28)
        # Text, not markup: a label may hold square brackets.
        table.add_row(Text(label), bar, Text(f"{done}/{total}{left}", style="dim"))
    return table


def _known(row: Row, key: str) -> float | None:
    value = row.get(key)
    return float(value) if value is not None and math.isfinite(value) else None


def _cells(row: Row) -> list[str]:
    found = [(_known(row, key), form) for _, key, form in COLUMNS]
    return [form(value) if value is not None else "-" for value, form in found]


def _duration(minutes: float | None) -> str:
    """40 s, 12 min, 3 h 05."""
    if minutes is None:
        return "-"
    if minutes < 1:
        return f"{60 * minutes:.0f} s"
    if minutes < 100:
        return f"{minutes:.0f} min"
    return f"{minutes // 60:.0f} h {minutes % 60:02.0f}"
