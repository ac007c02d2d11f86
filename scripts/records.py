"""Finished cells of an experiment that takes longer than a day's machine, kept beside the page that shows them.

One JSON object a line, some kilobytes each: who fills the cells that are missing needs no run folder of those that are
there. What a cell was made with is in its line, and a line that was made with something else is never shown beside
others.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlvla.run import versions
from rlvla.run_folder import read_run

Record = dict[str, Any]


def record_of(run: Path, name: str, seed: int, words: Sequence[str], checkpoint: Path) -> Record:
    """What a page says of a finished run of `rlvla train`.

    Args:
        words: the settings, without paths and seed.
        checkpoint: the policy folder that it began with.
    """
    found = read_run(run)
    machine = versions()
    return {
        "name": name,
        "seed": seed,
        "words": list(words),
        "checkpoint": _weights(checkpoint),
        "commit": machine["git_commit"],
        "cpu": machine["cpu"],
        "minutes": found.summary["minutes"],
        "env_steps": found.summary["env_steps"],
        "success_before": found.summary["success_before"],
        "success_after": found.summary["success_after"],
        "before": _bits(found.evaluations["before"]["outcomes"]),
        "after": _bits(found.evaluations["after"]["outcomes"]),
        "curve": [[row["env_steps"], round(row["rollout/success"], 4)] for row in found.iterations],
    }


def curve_of(record: Mapping[str, Any]) -> list[dict[str, float]]:
    """The rows that `learning_curve` reads.

    Raises:
        ValueError: the words do not say how many episodes an iteration has.
    """
    key = "episodes_per_iteration="
    given = [int(word.removeprefix(key)) for word in record["words"] if word.startswith(key)]
    if not given:
        raise ValueError(
            f"{record['name']}, seed {record['seed']}: the words must have {key}; they are {record['words']}"
        )
    return [
        {"env_steps": steps, "rollout/success": success, "rollout/episodes": given[-1]}
        for steps, success in record["curve"]
    ]


class Records:
    """A file of records.

    Cells of a seed are compared with each other, so they begin with the same checkpoint. Another seed may have begun
    with another one: the same words make other bits on another kind of processor.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, record: Record) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")

    def of(self, words: Mapping[str, Sequence[str]]) -> dict[str, dict[int, Record]]:
        """By name and seed, the records that were made with these words.

        Args:
            words: today's settings of each name.

        Raises:
            SystemExit: a seed has two checkpoints, or a record other words: what to do about it.
        """
        found: dict[str, dict[int, Record]] = {}
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        began: dict[int, tuple[int, str]] = {}
        for number, line in enumerate(lines, 1):
            record = json.loads(line)
            where = f"{self.path}, line {number} ({record['name']}, seed {record['seed']})"
            if record["name"] not in words or record["words"] != list(words[record["name"]]):
                raise SystemExit(f"{where} was made with other settings than today's. Remove the line to run it again.")
            line_before, checkpoint = began.setdefault(record["seed"], (number, record["checkpoint"]))
            if record["checkpoint"] != checkpoint:
                raise SystemExit(
                    f"{where} began with another SFT checkpoint ({record['checkpoint']}) than line {line_before} of "
                    f"that seed ({checkpoint}): they cannot be compared. Remove one, and fill a seed on one machine."
                )
            record["before"], record["after"] = ([bit == "1" for bit in record[key]] for key in ("before", "after"))
            found.setdefault(record["name"], {})[record["seed"]] = record
        # Cells are finished in any order, by several machines; a page names seeds by their order.
        return {name: dict(sorted(seeds.items())) for name, seeds in found.items()}


def _weights(folder: Path) -> str:
    """SHA-256 of a policy folder's weights alone: its configuration names paths of the machine that made it."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _bits(outcomes: Sequence[bool]) -> str:
    return "".join("01"[bool(outcome)] for outcome in outcomes)
