"""Several datasets in one SFT (Qwen-VLA, section 2.5: samples are mixed at a fixed ratio in every batch).

Rows of different robots have pictures, prompts and masks of different shapes, so a step runs the policy once for each
dataset it drew rows of, in that dataset's embodiment, and adds up the gradients.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from rlvla.config import ConfigError, SFTConfig
from rlvla.dataset import Demonstrations
from rlvla.dataset_reader import load_dataset
from rlvla.policies.action_stats import ActionStats
from rlvla.policies.embodiments import Embodiment, describe, names, same_embodiment
from rlvla.policies.policy import Policy
from rlvla.sft_examples import Examples, examples_of
from rlvla_envs.base import EnvSpec


class Source(NamedTuple):
    """A dataset under the conventions it was recorded with."""

    env_spec: EnvSpec
    demonstrations: Demonstrations
    weight: float = 1.0


class Part(NamedTuple):
    """What a step learns from one dataset."""

    examples: Examples
    rows: int
    share: float
    """Of the step's rows, in (0, 1]."""


def more_sources(config: SFTConfig) -> list[Source]:
    """The datasets beside ``config.dataset``.

    Raises:
        ConfigError: one does not say what its numbers mean, or its contents are not what it says.
        ValueError: as `load_dataset`.
    """
    found = []
    for number, each in enumerate(config.more):
        key, demonstrations = f"more[{number}].dataset", load_dataset(Path(each.dataset))
        if demonstrations.env_spec is None:
            raise ConfigError(
                f"{key} {each.dataset} was not written by `rlvla collect`, and nothing else says what its actions "
                "mean. Give it as dataset= with the suite= whose conventions it has, and the others as more=."
            )
        spec = EnvSpec.from_dict(demonstrations.env_spec)
        if each.chunk_size is not None:
            spec = EnvSpec.from_dict({**spec.to_dict(), "chunk_size": each.chunk_size})
        _check_contents(spec, demonstrations, f"{key} {each.dataset}")
        found.append(Source(spec, demonstrations, each.weight))
    return found


def _check_contents(spec: EnvSpec, demonstrations: Demonstrations, what: str) -> None:
    state = 0 if demonstrations.state is None else demonstrations.state.shape[1]
    sizes = {name: image.shape[1:3] for name, image in demonstrations.images.items()}
    for name, said, is_there in (
        ("action channels", spec.action_size, demonstrations.action.shape[1]),
        ("state channels", spec.state_size, state),
        ("cameras", {c.name: (c.height, c.width) for c in spec.cameras}, sizes),
    ):
        if said != is_there:
            raise ConfigError(
                f"{what} says in meta/info.json that it has {said} for {name}, and it has {is_there}. Collect it again."
            )


def embodiments_of(sources: Sequence[Source]) -> list[Embodiment]:
    """The embodiments of the datasets, in order. Those of one embodiment share statistics, over all their frames."""
    together: list[list[Source]] = []
    for source in sources:
        place = next((same for same in together if same_embodiment(same[0].env_spec, source.env_spec)), None)
        if place is None:
            together.append([source])
        else:
            place.append(source)
    return [_embodiment(same) for same in together]


def _embodiment(sources: Sequence[Source]) -> Embodiment:
    data = [source.demonstrations for source in sources]
    states = [one.state for one in data if one.state is not None]
    state = np.concatenate(states) if states and sources[0].env_spec.state_size else None
    return Embodiment(sources[0].env_spec, ActionStats.of(np.concatenate([one.action for one in data]), state))


class Mixture:
    """Where the rows of every step come from."""

    def __init__(self, policy: Policy, sources: Sequence[Source], config: SFTConfig) -> None:
        """
        Args:
            policy: holds an embodiment for each of the sources.
        """
        self._policy = policy
        weights = np.array([source.weight for source in sources])
        self.shares = weights / weights.sum()
        """Probability of each source, for every row."""
        self._examples: list[tuple[int, Examples]] = []
        specs = [e.env_spec for e in policy.embodiments]
        for source in sources:
            index = next(i for i, spec in enumerate(specs) if same_embodiment(spec, source.env_spec))
            policy.embody(index)
            self._examples.append((index, examples_of(policy, source.demonstrations, config)))

    def parts(self, rng: np.random.Generator, rows: int) -> Iterator[Part]:
        """A step's rows, dataset by dataset; while one is used the policy is in its embodiment.

        With one dataset nothing is drawn.
        """
        counts = rng.multinomial(rows, self.shares) if len(self.shares) > 1 else [rows]
        for (index, examples), count in zip(self._examples, counts, strict=True):
            if count:
                if self._policy.embodiment != index:
                    self._policy.embody(index)
                yield Part(examples, int(count), int(count) / rows)


def describe_mixture(policy: Policy, sources: Sequence[Source], shares: np.ndarray) -> Iterator[str]:
    """Lines for who watches: what is mixed, and what may go wrong with it."""
    specs = [e.env_spec for e in policy.embodiments]
    for source, share in zip(sources, shares, strict=True):
        data = source.demonstrations
        yield (
            f"{share:.0%} of the rows from {data.num_episodes} demonstrations of {source.env_spec.suite}, "
            f"{data.num_frames} frames: {describe(source.env_spec)}"
        )
    prompts: dict[tuple[object, ...], str] = {}
    for name, spec in zip(names(specs), specs, strict=True):
        # What `embodiment_prompt` says of a robot.
        words = (spec.robot, spec.arms, spec.control_hz, spec.chunk_size)
        if words in prompts:
            yield (
                f"{prompts[words]} and {name} have the same embodiment prompt, so only pictures and state tell the "
                "policy which of them it drives"
            )
        prompts.setdefault(words, name)
