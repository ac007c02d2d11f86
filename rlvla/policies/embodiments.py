"""The robots that one policy drives, and which of them a world has (Qwen-VLA, sections 2.3 and 2.4).

A policy's tensors are padded to H x K and its state to the widest of its embodiments, so one network serves all of
them. What differs is conventions, statistics, masks and the prompt: an `Embodiment`. At any time a policy is in one of
them (`rlvla.policies.policy.Policy.embody`), and whoever acts, trains or evaluates sees a policy of one robot.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rlvla.policies.action_stats import ActionStats
from rlvla_envs.base import EnvSpec, compare_specs, require_match

FILE = "embodiments.json"
"""In a policy folder: the embodiments after the first, which config.yaml and action_stats.json have."""


@dataclass(frozen=True, eq=False)
class Embodiment:
    """The conventions of one robot's data, and the statistics that normalise it."""

    env_spec: EnvSpec
    stats: ActionStats


def same_embodiment(one: EnvSpec, other: EnvSpec) -> bool:
    """Whether data of both are one embodiment's: equal conventions, and the same words in the prompt."""
    return not compare_specs(one, other) and (one.robot, one.arms) == (other.robot, other.arms)


def names(specs: Sequence[EnvSpec]) -> list[str]:
    """What embodiments are called: by the suite of their data, numbered where two would be called alike.

    Examples:
        >>> from dataclasses import replace
        >>> spec = EnvSpec(
        ...     suite="toy",
        ...     task="t",
        ...     robot="point",
        ...     action=(),
        ...     cameras=(),
        ...     control_hz=5.0,
        ...     chunk_size=4,
        ...     max_episode_steps=60,
        ...     num_evaluation_states=24,
        ... )
        >>> names([spec, replace(spec, chunk_size=8), replace(spec, suite="sim")])
        ['toy', 'toy-2', 'sim']
    """
    found: list[str] = []
    for spec in specs:
        name, number = spec.suite, 2
        while name in found:
            name, number = f"{spec.suite}-{number}", number + 1
        found.append(name)
    return found


def describe(spec: EnvSpec) -> str:
    """One embodiment in a line."""
    action = " + ".join(f"{c.name} {c.size}" for c in spec.action)
    cameras = ", ".join(f"{c.name} {c.height} x {c.width}" for c in spec.cameras)
    return (
        f"{spec.robot}, {action}; {cameras}; {spec.state_size} state channels; {spec.control_hz:g} Hz; "
        f"chunks of {spec.chunk_size}"
    )


def choose(specs: Sequence[EnvSpec], world: EnvSpec, *, right: str = "suite") -> int:
    """Which of a policy's embodiments a world has.

    Args:
        right: what the world is called in messages.

    Raises:
        ValueError: none has its conventions, or several have and the robot's name does not tell which.
    """
    if len(specs) == 1:
        require_match(specs[0], world, right=right)
        return 0
    fitting = [i for i, spec in enumerate(specs) if not compare_specs(spec, world)]
    # Who trains on two robots of equal conventions tells them apart by their prompts.
    own = [i for i in fitting if same_embodiment(specs[i], world)]
    # A policy that knows this robot, but not with these conventions, must not act as another robot that has them.
    known = [i for i, spec in enumerate(specs) if (spec.robot, spec.arms) == (world.robot, world.arms)]
    if own or not known:
        if len(own or fitting) == 1:
            return (own or fitting)[0]
    else:
        fitting = []
    listed = "\n".join(f"  {name}: {describe(spec)}" for name, spec in zip(names(specs), specs, strict=True))
    if fitting:
        raise ValueError(
            f"{len(fitting)} of the policy's embodiments have the conventions of the {right}, and none is its robot, "
            f"{world.robot}. The policy has\n{listed}\nTrain a policy on one of them alone for this {right}."
        )
    nearest = min(known or range(len(specs)), key=lambda i: len(compare_specs(specs[i], world)))
    try:
        require_match(specs[nearest], world, left=names(specs)[nearest], right=right)
    except ValueError as error:
        table = "\n".join(line for line in str(error).splitlines() if line.startswith("  "))
    raise ValueError(
        f"none of the policy's {len(specs)} embodiments has the conventions of the {right}. The policy has\n{listed}\n"
        f"The nearest of them beside the {right}:\n{table}\n"
        f"Choose a {right} with the conventions of one of them, or train a policy on this one's data too "
        "(`rlvla sft more=[{dataset: PATH}]`)."
    )


def named(specs: Sequence[EnvSpec], name: str) -> int:
    """The embodiment that is called so; of a policy with one, "" is enough.

    Raises:
        ValueError: there is none; the message lists those there are.
    """
    known = names(specs)
    if name in known:
        return known.index(name)
    if not name and len(specs) == 1:
        return 0
    listed = "\n".join(f"  {name}: {describe(spec)}" for name, spec in zip(known, specs, strict=True))
    said = f"embodiment is {name!r}" if name else f"the policy has {len(specs)} embodiments"
    raise ValueError(f"{said}; embodiment= must be one of\n{listed}")


def widened(spec: EnvSpec, state_width: int) -> EnvSpec:
    """The conventions with a state of ``state_width`` channels, to build layers for."""
    padding = tuple(f"padding.{i}" for i in range(state_width - spec.state_size))
    return replace(spec, state_names=spec.state_names + padding)


def save_embodiments(embodiments: Sequence[Embodiment], state_width: int, folder: Path) -> None:
    """Write `FILE`, unless the policy is one that needs none."""
    first = embodiments[0].env_spec
    if len(embodiments) == 1 and state_width == first.state_size:
        return
    data = {
        "state_width": state_width,
        "others": [{"env_spec": e.env_spec.to_dict(), "statistics": e.stats.to_dict()} for e in embodiments[1:]],
    }
    (folder / FILE).write_text(json.dumps(data, indent=2) + "\n")


def load_embodiments(first: Embodiment, folder: Path) -> tuple[list[Embodiment], int]:
    """All embodiments of a policy folder, and the width of its state.

    Raises:
        ValueError: a damaged file.
    """
    path = folder / FILE
    if not path.is_file():
        return [first], first.env_spec.state_size
    try:
        data: dict[str, Any] = json.loads(path.read_text())
        others = [
            Embodiment(EnvSpec.from_dict(each["env_spec"]), ActionStats.from_dict(each["statistics"]))
            for each in data["others"]
        ]
        width = int(data["state_width"])
    except Exception as error:
        raise ValueError(
            f"{path} is damaged: {type(error).__name__}: {error}. Copy or write the folder again."
        ) from error
    widest = max(e.env_spec.state_size for e in [first, *others])
    if width < widest:
        raise ValueError(
            f"{path}: state_width is {width}, and an embodiment has {widest} state channels. Copy it again."
        )
    return [first, *others], width
