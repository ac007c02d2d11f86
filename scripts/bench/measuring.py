"""What the benchmarks share: loops measured in turns, medians and quartiles, the machine, and the JSON they print."""

import argparse
import json
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

# Read by Mesa and OpenMP when they are loaded: more threads of several processes only wait for each other.
os.environ.setdefault("LP_NUM_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
warnings.filterwarnings("ignore")

from rlvla.run import versions  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of some values."""

    median: float
    low: float
    high: float
    n: int

    @staticmethod
    def of(values: Sequence[float]) -> "Spread":
        """
        >>> Spread.of([4.0, 1.0, 2.0, 3.0, 100.0])
        Spread(median=3.0, low=2.0, high=4.0, n=5)
        """
        if len(values) == 1:
            return Spread(values[0], values[0], values[0], 1)
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return Spread(median, low, high, len(values))


@dataclass(frozen=True)
class Turn:
    """One go of a loop."""

    amount: float
    """How much it did, in the unit of its rate."""
    seconds: float


def in_turns(
    loops: Mapping[str, Callable[[], float]],
    repeats: int,
    *,
    warm_up: int = 1,
    before: Callable[[int], None] = lambda _: None,
) -> dict[str, list[Turn]]:
    """Run every loop once, then every loop again: whatever else the machine does hits all of them.

    Args:
        loops: each says how much it did.
        warm_up: rounds that are not counted.
        before: called with the number of each round.
    """
    found: dict[str, list[Turn]] = {name: [] for name in loops}
    for repeat in range(warm_up + repeats):
        before(repeat)
        for name, loop in loops.items():
            began = time.perf_counter()
            amount = loop()
            seconds = time.perf_counter() - began
            if repeat >= warm_up:
                found[name].append(Turn(amount, seconds))
    return found


def rates(turns: Sequence[Turn]) -> list[float]:
    """Amount per second of each turn."""
    return [turn.amount / turn.seconds for turn in turns]


def over(ours: Sequence[Turn], theirs: Sequence[Turn]) -> list[float]:
    """Rate of one loop over that of another, round by round: both saw the same neighbours."""
    return [a / b for a, b in zip(rates(ours), rates(theirs), strict=True)]


def is_met(claim: Mapping[str, Any]) -> bool | None:
    """Whether the median of a claim reaches its target; None where it has none.

    >>> is_met({"median": 5.9, "least": 6.0}), is_met({"median": 1.1, "most": 1.15}), is_met({"median": 3.0})
    (False, True, None)
    """
    median = claim["median"]
    if "least" in claim:
        return bool(median >= claim["least"])
    if "most" in claim:
        return bool(median <= claim["most"])
    return bool(median == claim["exactly"]) if "exactly" in claim else None


class Report:
    """What one benchmark found, as the page reads it."""

    def __init__(self, layer: str, about: str, arguments: argparse.Namespace) -> None:
        self._began, self._load = time.perf_counter(), os.getloadavg()[0]
        self._arguments = {name: value for name, value in vars(arguments).items() if value is not None}
        self._head = {"layer": layer, "about": about}
        self._rows: list[dict[str, Any]] = []
        self._claims: list[dict[str, Any]] = []
        self._notes: list[str] = []

    def row(self, name: str, unit: str, values: Sequence[float]) -> None:
        """One measured quantity."""
        self._rows.append({"name": name, "unit": unit, **_rounded(values)})

    def claim(
        self,
        name: str,
        values: Sequence[float],
        *,
        least: float | None = None,
        most: float | None = None,
        exactly: float | None = None,
    ) -> None:
        """A quantity that is compared with its reference of the same run, or counted; with its target, if any."""
        targets = {"least": least, "most": most, "exactly": exactly}
        self._claims.append(
            {"name": name, **_rounded(values), **{key: value for key, value in targets.items() if value is not None}}
        )

    def note(self, text: str) -> None:
        """What a reader of the numbers has to know."""
        self._notes.append(text)

    def finish(self) -> dict[str, Any]:
        found = versions()
        cpu = found.pop("cpu")
        return {
            **self._head,
            "command": " ".join([f"scripts/bench/{self._head['layer']}.py", *sys.argv[1:]]),
            "settings": {name: _plain(value) for name, value in self._arguments.items()},
            "machine": {
                "cpu": cpu,
                "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
                "load_before": round(self._load, 2),
                "load_after": round(os.getloadavg()[0], 2),
                "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
            },
            "versions": found,
            "seconds": round(time.perf_counter() - self._began, 1),
            "rows": self._rows,
            "claims": self._claims,
            "notes": self._notes,
        }


def _rounded(values: Sequence[float]) -> dict[str, Any]:
    return {name: value if name == "n" else float(f"{value:.4g}") for name, value in asdict(Spread.of(values)).items()}


def _plain(value: Any) -> Any:
    return value if isinstance(value, int | float | list) else str(value)


def parser(about: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)


def print_json(found: Mapping[str, Any]) -> None:
    """A table for people on stderr, the JSON as the last line of stdout."""
    for row in (*found["rows"], *found["claims"]):
        print(f"{row['name']:70s}{row['median']:>12.5g}  {row.get('unit', '')}", file=sys.stderr)
    print(json.dumps(found))
