"""How many environment steps a run of `rlvla train` took to an improvement, from the rows of its metrics.jsonl.

    .venv/bin/python scripts/learning_curve.py RUN/metrics.jsonl ... --until 28500

Prints the mean success of the last 512 training episodes before so many environment steps.
"""

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

BLOCK = 4
"""Iterations averaged to one point of a figure's curve: one alone has a standard error of several points."""
STRETCH = 512
"""Training episodes that must succeed on average before a gain counts (standard error: 2 points). In episodes and not
in iterations, or small iterations would have the luckier stretches; and few, because a stretch is itself what a gain
costs at the least."""

Rows = Sequence[Mapping[str, Any]]


def blocks(rows: Rows) -> list[tuple[float, float]]:
    """(environment steps at the end, mean rollout success) of each stretch of iterations."""
    stretches = [rows[i : i + BLOCK] for i in range(0, len(rows), BLOCK)]
    return [(stretch[-1]["env_steps"], _mean(stretch)) for stretch in stretches]


def steps_to(rows: Rows, success: float) -> int | None:
    """Environment steps after which rollouts succeed with at least this rate, in [0, 1].

    Rollouts of `STRETCH` training episodes in a row are averaged, so that no lucky iteration counts. None where a run
    never gets there.
    """
    length = max(1, round(STRETCH / rows[0]["rollout/episodes"]))
    for end in range(length, len(rows) + 1):
        if _mean(rows[end - length : end]) >= success:
            return int(rows[end - 1]["env_steps"])
    return None


def success_at_first(runs: Iterable[Rows]) -> float:
    """How often the rollouts of the weights that these runs began with succeed: of every run's first iteration, since
    one alone would add its own error of several points to what is compared."""
    first = [rows[0] for rows in runs]
    episodes = sum(row["rollout/episodes"] for row in first)
    return float(sum(row["rollout/success"] * row["rollout/episodes"] for row in first) / episodes)


def steps_to_gain(runs: Sequence[Rows], gain: float) -> list[int | None]:
    """For each run from the same weights, what it took to succeed by ``gain`` more often than these do."""
    begin = success_at_first(runs)
    return [steps_to(rows, begin + gain) for rows in runs]


def success_until(rows: Rows, env_steps: int, episodes: int = STRETCH) -> float:
    """Mean rollout success of the last iterations that ended by then and have so many episodes together: of equally
    many, however large an iteration is."""
    ended = [row for row in rows if row["env_steps"] <= env_steps]
    return _mean(ended[-max(1, episodes // int(rows[0]["rollout/episodes"])) :])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("metrics", nargs="+", type=Path)
    parser.add_argument("--until", type=int, required=True, help="environment steps")
    arguments = parser.parse_args()
    for path in arguments.metrics:
        rows = [row for line in path.read_text().splitlines() if (row := json.loads(line))["kind"] == "iteration"]
        print(f"{path}: {success_until(rows, arguments.until):.3f}")


def _mean(rows: Rows) -> float:
    return float(sum(row["rollout/success"] for row in rows) / len(rows))


if __name__ == "__main__":
    main()
