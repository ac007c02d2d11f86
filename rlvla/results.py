"""Results of evaluations, kept by what decides them: the policy's files, the suite and its version, the settings.

A result that is there is not measured again. Whatever changes one of those is another result.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rlvla.config import ConfigError, EvalConfig
from rlvla.evaluate import Evaluation
from rlvla_envs.base import EnvSpec, SuiteConfig
from rlvla_envs.suites import check_ready, suite_version

FORMAT = 1
"""Raised when the way of measuring changes, so that older results are measured again."""

POLICY_SUFFIXES = (".yaml", ".json", ".safetensors", ".txt", ".jinja", ".model")
"""Of the files that can decide what a policy does: configuration, weights, statistics, tokenizer."""

RESULT, LOG, FILMS = "result.json", "evaluation.episodes.jsonl", "films.json"


@dataclass(frozen=True)
class Result:
    """One policy on one suite."""

    identity: Mapping[str, Any]
    """What decides the numbers, as `identify` gives it."""
    label: str
    """The suite's file under configs/suite when it was measured."""
    spec: Mapping[str, Any]
    """`EnvSpec.to_dict` of the suite."""
    policy: str
    """Folder it was read from."""
    versions: Mapping[str, str]
    """Software and machine. They are told, not compared: they change rounding alone."""
    evaluation: Evaluation
    films: Sequence[Mapping[str, Any]] = ()
    """state, file (a path), success, instruction of each filmed episode."""

    @property
    def policy_sha256(self) -> str:
        return str(self.identity["policy"])

    @property
    def conditions(self) -> dict[str, Any]:
        """What two results must share to be compared: everything but the policy, and what the suite itself said."""
        measured = self.evaluation
        episodes = json.dumps([measured.initial_states, measured.task_index]).encode()
        said = {
            "variant": measured.variant,
            "notes": measured.notes,
            "max_episode_steps": measured.max_episode_steps,
            "tasks": {task: rate["trials"] for task, rate in measured.by_task.items()},
            "episodes": hashlib.sha256(episodes).hexdigest()[:12],
        }
        return {key: value for key, value in self.identity.items() if key != "policy"} | {"measured": said}

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON; `read_results` takes it back."""
        return {
            **{f.name: getattr(self, f.name) for f in dataclasses.fields(self)},
            "evaluation": asdict(self.evaluation),
        }

    @staticmethod
    def from_dict(content: Mapping[str, Any]) -> "Result":
        """Raises ValueError, TypeError or KeyError where something is missing or does not fit together."""
        if content["identity"]["format"] != FORMAT:
            raise ValueError(f"its format is {content['identity']['format']}; this rlvla reads {FORMAT}")
        measured = content["evaluation"]
        evaluation = Evaluation(**measured | {"interval": tuple(measured["interval"])})
        episodes = {len(evaluation.outcomes), len(evaluation.initial_states), len(evaluation.task_index)}
        if episodes != {evaluation.trials} or set(evaluation.outcomes) - {0, 1}:
            raise ValueError("its episodes and its number of trials disagree")
        return Result(**{**content, "evaluation": evaluation})


def policy_digest(folder: Path) -> str:
    """SHA-256 over the names and contents of a policy folder's files: weights, configuration, statistics, tokenizer."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.iterdir() if p.suffix in POLICY_SUFFIXES and p.is_file()):
        with path.open("rb") as file:
            digest.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def describe_suite(suite: SuiteConfig) -> dict[str, Any]:
    """The suite's part of an identity: its configuration, its version here, and the stand-ins among its assets.

    Raises:
        ValueError: the suite cannot run here; a NotReadyError has the command that helps.
    """
    # Another interpreter's packages and files are its own to check; its versions are asked.
    assets = check_ready(suite).notes if suite.python is None else ()
    # Where the interpreter lies decides nothing; what is installed there does.
    config = {key: value for key, value in asdict(suite).items() if key != "python"}
    return {"config": config, "version": suite_version(suite), "assets": list(assets)}


def identify(
    policy_sha256: str, suite: Mapping[str, Any], settings: EvalConfig, inference_batch: int
) -> dict[str, Any]:
    """What decides a result. Devices and numbers of simulators are not in it: they change rounding at most.

    Args:
        suite: from `describe_suite`.
    """
    chosen = {name: getattr(settings, name) for name in ("trials", "noise_seeds", "temperature", "seed")}
    found: dict[str, Any] = {
        "format": FORMAT,
        "policy": policy_sha256,
        "suite": dict(suite),
        "settings": {**chosen, "sampler": "ode", "inference_batch": inference_batch},
    }
    # As it will be read again: a tuple among a suite's options is a list then.
    as_read: dict[str, Any] = json.loads(json.dumps(found))
    return as_read


class ResultStore:
    """A folder of results, each in a folder of its own."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def folder(self, identity: Mapping[str, Any]) -> Path:
        text = json.dumps(identity, sort_keys=True)
        return self.root / f"{identity['suite']['config']['name']}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"

    def find(self, identity: Mapping[str, Any]) -> tuple[Result | None, str]:
        """The result, and what is wrong with one that is there and cannot be used."""
        path = self.folder(identity) / RESULT
        if not path.exists():
            return None, ""
        try:
            found = Result.from_dict(json.loads(path.read_text()))
            if json.dumps(found.identity, sort_keys=True) != json.dumps(identity, sort_keys=True):
                raise ValueError("it is of another policy, suite or setting")
        except (OSError, ValueError, TypeError, KeyError) as error:
            return None, f"{path} is damaged ({error}) and is measured again"
        return dataclasses.replace(found, films=self.films(identity)), ""

    def save(self, result: Result) -> None:
        """Write a result whole, or not at all."""
        write_json(self.folder(result.identity) / RESULT, {**result.to_dict(), "films": []})

    def films(self, identity: Mapping[str, Any]) -> list[dict[str, Any]]:
        """What was filmed of a result so far, with ``file`` None for a state of which the suite gives no film."""
        folder = self.folder(identity)
        try:
            entries = json.loads((folder / FILMS).read_text())
            shown = [e | {"file": str(folder / e["file"]) if e["file"] else None} for e in entries]
            return [e for e in shown if e["file"] is None or Path(e["file"]).is_file()]
        except (OSError, ValueError, TypeError, KeyError):
            # Films are drawn again.
            return []

    def add_film(self, identity: Mapping[str, Any], entry: Mapping[str, Any]) -> None:
        """Args: entry: state, file (its name inside the result's folder, or None), success, instruction."""
        folder = self.folder(identity)
        known = [e | {"file": e["file"] and Path(e["file"]).name} for e in self.films(identity)]
        write_json(folder / FILMS, [*(e for e in known if e["state"] != entry["state"]), dict(entry)])


def read_results(path: Path) -> list[Result]:
    """Results of one policy from a file: what `rlvla eval POLICY... suites=[...]` wrote, or an entry of the cache.

    Raises:
        ConfigError: no such file, a damaged one, or one of several policies.
    """
    try:
        content = json.loads(path.read_text())
        found = [Result.from_dict(entry) for entry in content.get("results", [content])]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            f"{path} is no result file that can be read: {type(error).__name__}: {error}. Give what `rlvla eval POLICY "
            "suites=[...]` wrote, or the policy's folder, which is measured where results are missing."
        ) from error
    if len({result.policy_sha256 for result in found}) != 1:
        raise ConfigError(
            f"{path} has results of {len({r.policy_sha256 for r in found})} policies; give a file of one."
        )
    return found


def spec_of(result: Result) -> EnvSpec:
    return EnvSpec.from_dict(dict(result.spec))


def differences(one: Any, other: Any, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """(dotted key, one side, other side) wherever two JSON trees differ."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        for key in {**one, **other}:
            yield from differences(one.get(key), other.get(key), f"{prefix}{key}.")
    elif one != other:
        yield prefix[:-1], json.dumps(one), json.dumps(other)


def write_json(path: Path, content: Any) -> None:
    """Whole and on the disk, or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    stage = path.with_suffix(f".partial-{os.getpid()}")
    with stage.open("w") as file:
        file.write(json.dumps(content, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(stage, path)
