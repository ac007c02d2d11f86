"""From YAML and command-line words to a verb's validated configuration.

Everything is checked at the door: an unknown key is an error that suggests the right one.
"""

import dataclasses
import difflib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any, cast

from rlvla.config import (
    MISSING,
    CollectConfig,
    CompareConfig,
    ConfigError,
    DoctorConfig,
    EvaluateConfig,
    EvaluateSuitesConfig,
    ExportConfig,
    ForgettingConfig,
    ImportConfig,
    ServeConfig,
    SFTConfig,
    SuitesConfig,
    TrainConfig,
)
from rlvla.config.tune import TuneConfig
from rlvla.words import ACROSS_SUITES, read_words
from rlvla_envs.base import SuiteConfig

SCHEMAS: dict[str, type] = {
    "collect": CollectConfig,
    "sft": SFTConfig,
    "train": TrainConfig,
    "tune": TuneConfig,
    "eval": EvaluateConfig,
    "eval_suites": EvaluateSuitesConfig,
    "compare": CompareConfig,
    "suites": SuitesConfig,
    "import": ImportConfig,
    "export": ExportConfig,
    "serve": ServeConfig,
    "doctor": DoctorConfig,
    "forgetting": ForgettingConfig,
}
"""By verb; `eval_suites` is `rlvla eval` on several suites."""

HOW_GIVEN = {
    "before": "BEFORE AFTER suites=[...]",
    "after": "BEFORE AFTER suites=[...]",
    "policies": "POLICY... suites=[...]",
}
"""What is not given as KEY=PATH."""

OPEN_KEYS = (
    "suite.options.",
    "task_weights.",
    "cameras.",
    "learning_rates.",
    "algo.learning_rates.",
    "algo.teacher.weights.",
    "algo.reasoning_teacher.weights.",
)
"""Mappings whose keys the suite, the checkpoint or the policy checks."""


def compose(verb: str, overrides: Sequence[str]) -> Any:
    """The validated configuration of a verb, as its dataclass.

    Raises:
        ConfigError: an unknown key or group, a wrong type, a missing or an impossible value.
    """
    from omegaconf import OmegaConf

    with _config_errors():
        composed = _merge(verb, overrides)
        absent = sorted(OmegaConf.missing_keys(composed))
        if absent:
            given = " ".join(f"{key}=PATH" for key in absent)
            if "suites" in composed:
                given = HOW_GIVEN.get(absent[0], given)
            raise ConfigError(f"{', '.join(absent)} must be given: `rlvla {verb} {given}`. See --help.")
        return OmegaConf.to_object(composed)


def to_yaml(config: Any) -> str:
    """A resolved configuration as YAML."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.structured(config))


def policy_config_from_dict(data: dict[str, Any]) -> Any:
    """The typed configuration of a policy from a folder's config.yaml.

    Raises:
        ConfigError: unknown keys or wrong types.
    """
    from omegaconf import OmegaConf

    from rlvla.policies.architectures import architecture

    if not isinstance(data, dict) or "name" not in data:
        raise ConfigError("there is no policy.name, which says what architecture this is.")
    schema = architecture(data["name"]).config
    with _config_errors():
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), data))


def describe(verb: str, overrides: Sequence[str] = ()) -> list[tuple[str, str, str]]:
    """(key, value, meaning) of every option of a verb, as YAML and ``overrides`` set it; for --help.

    Raises:
        ConfigError: as `compose`, but for what must be given, whose value is "required".
    """
    from omegaconf import OmegaConf

    overrides = expand(verb, overrides)
    with _config_errors():
        composed = _merge(verb, overrides)
    rows = list(describe_schema(SCHEMAS[read_words(verb, overrides, suite_files()).schema]))
    policy = OmegaConf.get_type(composed, "policy") if "policy" in composed else None
    if dataclasses.is_dataclass(policy):
        rows = [row for row in rows if row[0] != "policy"] + list(describe_schema(cast(type, policy), "policy."))
    absent = OmegaConf.missing_keys(composed)
    return [
        (key, "required" if key in absent else shown(OmegaConf.select(composed, key)), meaning)
        for key, _, meaning in rows
    ]


def describe_schema(schema: type, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """(key, default, meaning) of every field of a configuration dataclass, nested ones with dotted keys."""
    docs = _field_docs(schema)
    for f in dataclasses.fields(schema):
        nested = f.type if isinstance(f.type, type) and dataclasses.is_dataclass(f.type) else None
        if nested is not None:
            yield from describe_schema(cast(type, nested), f"{prefix}{f.name}.")
            continue
        default = f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
        required = default in (MISSING, dataclasses.MISSING)
        yield f"{prefix}{f.name}", "required" if required else shown(default), docs.get(f.name, "")


def group_choices(verb: str) -> dict[str, list[str]]:
    """The YAML files that each configuration group of a verb offers."""
    has_suite = any(field.name == "suite" for field in dataclasses.fields(SCHEMAS[verb]))
    groups = ("suite", "policy", "stage") if verb == "sft" else ("suite",) if has_suite else ()
    return {group: sorted(f.stem for f in (config_dir() / group).glob("*.yaml")) for group in groups}


def suite_files() -> list[str]:
    """Names of the files under configs/suite."""
    return sorted(f.stem for f in (config_dir() / "suite").glob("*.yaml"))


def suite_of(name: str) -> SuiteConfig:
    """A suite as its file under configs/suite has it."""
    found: SuiteConfig = compose("collect", [f"suite={name}"]).suite
    return found


def config_dir() -> Path:
    """configs/ of the checkout, or the copy inside an installed wheel."""
    here = Path(__file__).resolve().parent
    for candidate in (here / "configs", here.parent / "configs"):
        if candidate.is_dir():
            return candidate
    raise ConfigError(f"no configs folder beside {here}; reinstall rlvla.")


def with_values(config: Any, values: Mapping[str, Any]) -> Any:
    """A copy of a configuration with other values under dotted keys, which may be text as one would type it; checked.

    Raises:
        ConfigError: a wrong type or an impossible value.
    """
    import yaml  # type: ignore[import-untyped, unused-ignore]
    from omegaconf import OmegaConf

    with _config_errors():
        tree = OmegaConf.structured(config)
        for key, value in values.items():
            OmegaConf.update(tree, key, yaml.safe_load(value) if isinstance(value, str) else value)
        return OmegaConf.to_object(tree)


def expand(verb: str, words: Sequence[str]) -> list[str]:
    """Put the words of a settings file where ``@FILE`` stands; what comes later on the command line wins.

    The file is YAML, ``verb: [key=value, ...]``, as in configs/recipe. A verb that takes every option of `rlvla train`
    takes the words under ``train`` where there are none of its own.

    Raises:
        ConfigError: there is no such file, or it has nothing for the verb.
    """
    found: list[str] = []
    for word in words:
        found += _settings_file(verb, Path(word[1:])) if word.startswith("@") else [word]
    return found


def _settings_file(verb: str, path: Path) -> list[str]:
    import yaml

    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read the settings file {path}: {error}") from error
    names = [verb, "train"] if issubclass(SCHEMAS[verb], TrainConfig) else [verb]
    lists = [content[name] for name in names if name in content] if isinstance(content, dict) else []
    if not lists or not isinstance(lists[0], list) or not all(isinstance(word, str) for word in lists[0]):
        raise ConfigError(
            f"{path} has no settings for `rlvla {verb}`; it must be YAML of the form {verb}: [key=value]."
        )
    return lists[0]


def _merge(verb: str, overrides: Sequence[str]) -> Any:
    """Dataclasses, YAML and overrides in one OmegaConf tree, not yet checked for what is missing."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    if verb not in SCHEMAS:
        raise ConfigError(f"{verb!r} is not a verb; verbs: {', '.join(SCHEMAS)}.")
    overrides = expand(verb, overrides)
    _register_schemas()
    if verb == "sft":
        _register_policies()
    words = read_words(verb, overrides, suite_files())
    asked, verb, overrides = verb, words.schema, words.settings
    _check_keys(asked, verb, [*overrides, *(word for own in words.suites.values() for word in own)])
    suites = {name: _merge("collect", [f"suite={name}", *own]).suite for name, own in words.suites.items()}
    GlobalHydra.instance().clear()
    # To Hydra `policy=` names a file under configs/policy, which is right for sft alone; the other verbs
    # mean a folder on disk.
    is_folder = [verb != "sft" and o.startswith("policy=") for o in overrides]
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        composed = hydra_compose(
            verb, overrides=[_forced(o) for o, folder in zip(overrides, is_folder, strict=True) if not folder]
        )
    for override, folder in zip(overrides, is_folder, strict=True):
        if folder:
            composed.policy = override.removeprefix("policy=")
    for key, value in words.fixed.items():
        composed[key] = value
    if suites:
        composed.suites = suites
    return composed


def _forced(override: str) -> str:
    """Hydra wants `++` where a mapping gets a key it may or may not have; a user need not know which."""
    key = override.partition("=")[0].lstrip("+")
    is_open = key.startswith(OPEN_KEYS) or f"{key}." in OPEN_KEYS
    return f"++{override.lstrip('+')}" if is_open else override


@contextmanager
def _config_errors() -> Iterator[None]:
    """Hydra's and OmegaConf's errors as ours, without their internals."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_first_lines(error)) from error


@cache
def _register_schemas() -> None:
    """Into Hydra's store, which is the process's: half of what composing takes, so once."""
    from hydra.core.config_store import ConfigStore

    store = ConfigStore.instance()
    for verb, schema in SCHEMAS.items():
        store.store(name=f"{verb}_schema", node=schema)
    store.store(group="suite", name="base_suite", node=SuiteConfig)


@cache
def _register_policies() -> None:
    """The same for the architectures, whose modules import torch and the model libraries. A typo in another verb
    must not wait for them: `rlvla sft` alone chooses among them; the others read a policy's folder."""
    from hydra.core.config_store import ConfigStore

    from rlvla.policies.architectures import ARCHITECTURES, architecture

    store = ConfigStore.instance()
    for name in ARCHITECTURES:
        store.store(group="policy", name=f"base_{name}", node=architecture(name).config)


def _check_keys(asked: str, verb: str, overrides: Sequence[str]) -> None:
    """Refuse what Hydra would accept and ignore (`+new=1`), and suggest the nearest key for what it refuses.

    Args:
        asked: the verb as the user typed it.
    """
    known = {key for key, _, _ in describe_schema(SCHEMAS[verb], "")}
    if verb in ACROSS_SUITES:
        known |= {key for key, _, _ in describe_schema(SuiteConfig, "suite.")}
    if verb == "sft":
        known |= {key for key, _, _ in describe_schema(_policy_schema(overrides), "policy.")}
    choices = group_choices(verb)
    known |= set(choices)
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise ConfigError(f"{override!r} is not of the form key=value. See `rlvla {asked} --help`.")
        key = key.lstrip("+~").split("@")[0]
        if key in choices and value not in choices[key]:
            close = difflib.get_close_matches(value, choices[key], n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ConfigError(f"{key} is {value!r}; choose one of {', '.join(choices[key])}.{hint}")
        if key in known or any(key.startswith(open_) and open_.rstrip(".") in known for open_ in OPEN_KEYS):
            continue
        raise ConfigError(f"{key!r} is not an option of `rlvla {asked}`.{suggest(key, known)}")


def _policy_schema(overrides: Sequence[str]) -> type:
    """The dataclass that ``policy=NAME`` chooses, or the verb's own choice: its file names it among its defaults."""
    from omegaconf import OmegaConf

    from rlvla.policies.architectures import ARCHITECTURES, architecture

    chosen = [o.removeprefix("policy=") for o in overrides if o.startswith("policy=")]
    defaults: Any = OmegaConf.load(config_dir() / "sft.yaml").defaults
    chosen = [entry["policy"] for entry in defaults if not isinstance(entry, str) and "policy" in entry] + chosen
    path = config_dir() / "policy" / f"{chosen[-1]}.yaml"
    bases: list[Any] = list(OmegaConf.load(path).defaults) if path.is_file() else []
    names = [name for name in ARCHITECTURES if f"base_{name}" in bases]
    return architecture(names[0] if names else next(iter(ARCHITECTURES))).config


def suggest(key: str, known: set[str]) -> str:
    """A sentence with the nearest of the known keys."""
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    if not close:
        # "epochs" for "algo.epochs": the last part alone may be right.
        tails = {k.rsplit(".", 1)[-1]: k for k in sorted(known)}
        close = [tails[t] for t in difflib.get_close_matches(key.rsplit(".", 1)[-1], tails, n=1, cutoff=0.75)]
    return f" Did you mean {close[0]!r}?" if close else " See --help for all of them."


def shown(value: Any) -> str:
    """A value as one would type it on the command line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Mapping) and any(isinstance(entry, Mapping) for entry in value.values()):
        return shown(list(value))
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"[{', '.join(map(shown, value))}]"
    return str(value.value if isinstance(value, Enum) else value)


@cache
def _field_docs(schema: type) -> dict[str, str]:
    """The sentence under each field of a dataclass, read from its source."""
    import ast
    import inspect
    import textwrap

    base = schema.__base__
    # A copy: the base's own is kept, and must not learn what its heirs have.
    docs = dict(_field_docs(base)) if base is not None and dataclasses.is_dataclass(base) else {}
    body = ast.parse(textwrap.dedent(inspect.getsource(schema))).body[0]
    assert isinstance(body, ast.ClassDef)
    for statement, following in zip(body.body, body.body[1:], strict=False):
        if (
            isinstance(statement, ast.AnnAssign)
            and isinstance(statement.target, ast.Name)
            and isinstance(following, ast.Expr)
            and isinstance(following.value, ast.Constant)
        ):
            docs[statement.target.id] = " ".join(str(following.value.value).split())
    return docs


def _first_lines(error: Exception) -> str:
    """Hydra wraps OmegaConf's message and goes on with its internals; keep what says what is wrong."""
    wrapped = error.__cause__ or error.__context__
    text = str(error)
    if wrapped is not None and "Error merging" in text:
        text = f"{text.splitlines()[0]}: {wrapped}"
    internals = ("full_key", "object_type", "reference_type")
    message = " ".join(
        line.strip() for line in text.splitlines() if line.strip() and not line.strip().startswith(internals)
    )
    key = getattr(error, "full_key", None)
    return f"{key}: {message}" if key and str(key).rsplit(".", 1)[-1] not in message else message
