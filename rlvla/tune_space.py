"""What `rlvla tune` may vary: options of `rlvla train`, each with a range or a list, checked before anything starts."""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlvla.compose import config_dir, describe_schema, shown, suggest, with_values
from rlvla.config import ConfigError, TrainConfig

Value = float | int | str
"""A choice is the text one would type: "elementwise", "[128, 128]", "null"."""

NOT_SEARCHED = ("eval", "suite", "policy", "output", "seed", "device", "workers", "cluster", "learners")
"""They decide what is measured or where it runs; results with different ones do not compare."""

MAX_STEPS = 10_000


@dataclass(frozen=True)
class Range:
    """Numbers from low to high, both included; whole ones if ``whole``."""

    low: float
    high: float
    log: bool = False
    step: float | None = None
    whole: bool = False

    def ends(self) -> tuple[Value, ...]:
        return (self.fitting(self.low), self.fitting(self.high))

    def fitting(self, value: float) -> Value:
        """As the run gets it: whole, or with four digits, which nobody can tell from more, where no step asks for
        more."""
        if self.whole:
            return round(value)
        return min(max(float(f"{value:.{10 if self.step else 4}g}"), self.low), self.high)

    def holds(self, value: Any) -> bool:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and self.low <= value <= self.high and self.on_step(value)

    def on_step(self, value: float) -> bool:
        if self.step is None:
            return True
        steps = (value - self.low) / self.step
        return abs(steps - round(steps)) < 1e-6

    def place(self, value: float) -> float:
        """In [0, 1], on the scale it is drawn from."""
        if self.low == self.high:
            return 0.5
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def points(self) -> list[Value]:
        """Every value, of a range with steps or of whole numbers."""
        step = self.step or 1.0
        return [self.fitting(self.low + i * step) for i in range(int((self.high - self.low) / step + 1e-6) + 1)]

    def __str__(self) -> str:
        kind = " by " + f"{self.step:g}" if self.step else " on a log scale" if self.log else ""
        return f"{self.low:g} to {self.high:g}{kind}"


@dataclass(frozen=True)
class Choices:
    """One of several values, each as the text one would type."""

    values: tuple[str, ...]

    def ends(self) -> tuple[Value, ...]:
        return self.values

    def holds(self, value: Any) -> bool:
        return value in self.values

    def place(self, value: str) -> float:
        return self.values.index(value) / max(1, len(self.values) - 1)

    def points(self) -> list[Value]:
        return list(self.values)

    def __str__(self) -> str:
        return f"one of {', '.join(self.values)}"


Space = Mapping[str, Range | Choices]


def read_space(name: str) -> Space:
    """The search space of a file: a name in configs/space, or a path.

    Raises:
        ConfigError: there is no such file, or it is no search space.
    """
    import yaml  # type: ignore[import-untyped, unused-ignore]

    folder = config_dir() / "space"
    path = folder / f"{name}.yaml"
    if not path.is_file():
        path = Path(name)
    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        known = ", ".join(sorted(f.stem for f in folder.glob("*.yaml")))
        raise ConfigError(
            f"tune.space is {name}; it must be {known} (of {folder}) or the path of a YAML file: {error}"
        ) from error
    except yaml.YAMLError as error:
        raise ConfigError(f"the search space {path} is not YAML: {error}") from error
    return parse_space(content, str(path))


def parse_space(content: Any, where: str) -> Space:
    """A search space from ``{option: {low, high, log, step} or {choices}}``.

    Raises:
        ConfigError: an option that `rlvla train` does not have, or an entry that makes no sense.
    """
    if not isinstance(content, dict) or not content:
        raise ConfigError(f"{where} must be a mapping of options to {{low, high}} or {{choices}}; it is {content!r}.")
    defaults = {key: default for key, default, _ in describe_schema(TrainConfig)}
    types = {key: option_type(key) for key in defaults}
    space: dict[str, Range | Choices] = {}
    for key, entry in content.items():
        if key not in defaults:
            raise ConfigError(f"{where}: {key!r} is not an option of `rlvla train`.{suggest(str(key), set(defaults))}")
        if key.split(".")[0] in NOT_SEARCHED:
            raise ConfigError(
                f"{where}: {key} cannot be searched: it decides what is measured or where it runs, so trials with "
                "different ones would not compare. Give it on the command line instead."
            )
        space[key] = _entry(key, entry, types[key], where)
    return space


def option_type(key: str) -> Any:
    """The type of an option of `rlvla train`."""
    schema: Any = TrainConfig
    for part in key.split("."):
        schema = next(f.type for f in dataclasses.fields(schema) if f.name == part)
    return schema


def _entry(key: str, entry: Any, kind: Any, where: str) -> Range | Choices:
    forms = "{low: 0.1, high: 0.3}, with log: true or step: 0.05 if wanted, or {choices: [1, 2]}"
    if not isinstance(entry, dict) or not ({"low", "high"} <= entry.keys() or entry.keys() == {"choices"}):
        raise ConfigError(f"{where}: {key} is {entry!r}; it must be {forms}.")
    if "choices" in entry:
        values = entry["choices"]
        if not isinstance(values, list) or not values:
            raise ConfigError(f"{where}: {key}.choices is {values!r}; it must be a list with at least one value.")
        texts = tuple(shown(value) for value in values)
        if len(set(texts)) < len(texts):
            raise ConfigError(f"{where}: {key}.choices names a value twice: {', '.join(texts)}.")
        return Choices(texts)
    unknown = entry.keys() - {"low", "high", "log", "step"}
    if unknown:
        raise ConfigError(f"{where}: {key} has {', '.join(sorted(map(str, unknown)))}; it must be {forms}.")
    low, high, step, log = entry["low"], entry["high"], entry.get("step"), entry.get("log", False)
    for name, value in (("low", low), ("high", high), ("step", 1 if step is None else step)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            # YAML reads 1e-4 as text, 1.0e-4 as a number.
            hint = " Write 1.0e-4, not 1e-4: YAML takes the latter for text." if isinstance(value, str) else ""
            raise ConfigError(f"{where}: {key}.{name} is {value!r}; it must be a number.{hint}")
    if not isinstance(log, bool):
        raise ConfigError(f"{where}: {key}.log is {log!r}; it must be true or false.")
    whole = kind is int
    if not whole and kind not in (float, float | None):
        raise ConfigError(f"{where}: {key} takes no range; give {{choices: [...]}}.")
    if whole and any(value != int(value) for value in (low, high, step or 1)):
        raise ConfigError(f"{where}: {key} is a whole number; low, high and step must be whole too.")
    if low > high:
        raise ConfigError(f"{where}: {key}.low is {low:g}, above its high of {high:g}.")
    if log and low <= 0:
        raise ConfigError(f"{where}: {key}.low is {low:g}; with log: true it must be positive.")
    if log and step is not None:
        raise ConfigError(f"{where}: {key} has log: true and step; drop one, or list the values as choices.")
    if step is not None and not (step > 0 and Range(low, high, step=step).on_step(high)):
        raise ConfigError(f"{where}: {key}.step is {step:g}; it must be positive and lead from {low:g} to {high:g}.")
    return Range(float(low), float(high), log, None if step is None else float(step), whole)


def check_space(space: Space, config: TrainConfig) -> None:
    """Compose what the space allows at its ends, one option at a time and every two together, with all else as in
    ``config``: a range that contradicts a rule of the configuration is found before anything runs. No rule relates
    more than two options.

    Raises:
        ConfigError: naming the values, and the rule.
    """
    typed: dict[tuple[str, Value], Any] = {}
    for key, entry in space.items():
        for value in entry.ends():
            try:
                composed = with_values(config, {key: value})
            except ValueError as error:
                raise ConfigError(f"the search space allows {key}={shown(value)}, which cannot run: {error}") from error
            typed[key, value] = _get(composed, key)
    for (one, a), (other, b) in itertools.combinations(typed.items(), 2):
        if one[0] == other[0]:
            continue
        try:
            # Their types are known by now: this is a thousand times faster than composing each pair.
            _replaced(config, {one[0]: a, other[0]: b})
        except ValueError as error:
            pair = f"{one[0]}={shown(one[1])} with {other[0]}={shown(other[1])}"
            raise ConfigError(f"the search space allows {pair}, which cannot run: {error}") from error


def _get(config: Any, key: str) -> Any:
    for part in key.split("."):
        config = getattr(config, part)
    return config


def _replaced(config: Any, values: Mapping[str, Any]) -> Any:
    """A copy with other values under dotted keys; every ``__post_init__`` on the way checks it."""
    own = {key: value for key, value in values.items() if "." not in key}
    for block in {key.split(".")[0] for key in values if "." in key}:
        inner = {key.partition(".")[2]: value for key, value in values.items() if key.startswith(f"{block}.")}
        own[block] = _replaced(getattr(config, block), inner)
    return dataclasses.replace(config, **own)


def own_point(space: Space, config: TrainConfig) -> dict[str, Value] | None:
    """The settings of the command itself as a point of the space; None where they lie outside."""
    point: dict[str, Value] = {}
    for key, entry in space.items():
        value = _get(config, key)
        point[key] = shown(value) if isinstance(entry, Choices) else value
        if not entry.holds(point[key]):
            return None
    return point


def grid(space: Space) -> list[dict[str, Value]]:
    """Every combination, the last option varying fastest.

    Raises:
        ConfigError: a range without steps, or far too many combinations.
    """
    for key, entry in space.items():
        if isinstance(entry, Range) and entry.step is None and not (entry.whole and not entry.log):
            raise ConfigError(f"tune.sampler is grid, and {key} is {entry}; give it a step, or a list of choices.")
    size = math.prod(len(entry.points()) for entry in space.values())
    if size > MAX_STEPS:
        raise ConfigError(f"the grid has {size} combinations; use tune.sampler=random, or fewer values.")
    return [
        dict(zip(space, values, strict=True)) for values in itertools.product(*(e.points() for e in space.values()))
    ]


def differences(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """In which options two spaces (as `to_text` writes them) differ."""

    def lines() -> Iterator[str]:
        for key in {**before, **now}:
            if key not in now:
                yield f"{key} is gone"
            elif key not in before:
                yield f"{key} is new"
            elif before[key] != now[key]:
                yield f"{key} was {before[key]} and is {now[key]}"

    return list(lines())


def to_text(space: Space) -> dict[str, str]:
    """What a study remembers of its space, for people and for `differences`."""
    return {key: str(entry) for key, entry in space.items()}


def fitted(space: Space, point: Mapping[str, Any]) -> dict[str, Value]:
    """A sampled point as the run gets it."""
    values: dict[str, Value] = {}
    for key, entry in space.items():
        value = point[key]
        values[key] = value if isinstance(entry, Choices) else entry.fitting(value)
    return values


def words(values: Mapping[str, Value]) -> Sequence[str]:
    """As one would type them."""
    return [f"{key}={shown(value)}" for key, value in values.items()]
