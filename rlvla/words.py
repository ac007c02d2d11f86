"""The words of a command line that are not `key=value` for one setting: policy folders, and a list of suites.

    rlvla eval runs/sft/policy runs/ppo/policy suites=[simpler_env,simpler_env_ood] suite.image_size=160

`read_words` says what such a command means; `rlvla.compose` fills the configuration.
"""

import difflib
from collections.abc import Sequence
from typing import Any, NamedTuple

from rlvla.config import ConfigError, SuitesAction
from rlvla_envs.suites import homes

ACROSS_SUITES = ("eval_suites", "compare")
"""Schemas with ``suites``, a mapping."""


PLACES = {"import": ("format", "checkpoint"), "export": ("policy",), "serve": ("policy",)}
"""Settings that may be words without a key, in this order."""


class Words(NamedTuple):
    """A command line, taken apart."""

    schema: str
    """Key of `rlvla.compose.SCHEMAS`."""
    settings: list[str]
    """key=value, for Hydra."""
    fixed: dict[str, Any]
    """Values that are taken as they stand: a path may hold what Hydra would read as grammar."""
    suites: dict[str, list[str]]
    """suite.key=value of each chosen suite."""


def read_words(verb: str, words: Sequence[str], known_suites: Sequence[str]) -> Words:
    """What the words after a verb mean.

    Args:
        known_suites: files under configs/suite.

    Raises:
        ConfigError: a word without a key where none belongs, or a list of suites that is none.
    """
    bare = [word for word in words if "=" not in word]
    settings = [word for word in words if "=" in word]
    keys = {word.partition("=")[0] for word in settings}
    fixed: dict[str, Any] = {}
    schema = verb
    if verb == "eval" and (len(bare) > 1 or keys & {"suites", "policies"}):
        schema = "eval_suites"
        if "suite" in keys:
            name = next(word for word in settings if word.startswith("suite=")).partition("=")[2]
            raise ConfigError(f"suite={name} is for one policy alone. Give suites=[{name}] for several.")
        if bare:
            fixed["policies"] = bare
    elif verb == "eval" and bare:
        settings.append(f"policy={bare[0]}")
    elif verb == "compare" and bare:
        if len(bare) != 2:
            raise ConfigError(
                f"{', '.join(bare)}: {len(bare)} to compare. Give two, `rlvla compare BEFORE AFTER suites=[...]`."
            )
        fixed["before"], fixed["after"] = bare
    elif verb == "suites" and bare:
        if bare[0] in {action.value for action in SuitesAction}:
            settings.append(f"action={bare.pop(0)}")
        for name in bare:
            _require_suite(name, [*known_suites, *homes()])
        fixed["names"] = bare
    elif verb in PLACES and len(bare) <= len(PLACES[verb]):
        fixed |= dict(zip(PLACES[verb], bare, strict=False))
    elif bare:
        raise ConfigError(f"{bare[0]!r} is not of the form key=value. See `rlvla {verb} --help`.")
    for key in ("before", "after"):
        given = [word for word in settings if schema == "compare" and word.startswith(f"{key}=")]
        if given:
            fixed[key] = given[-1].partition("=")[2]
        settings = [word for word in settings if word not in given]
    if schema not in ACROSS_SUITES:
        return Words(schema, settings, fixed, {})
    return _with_suites(Words(schema, settings, fixed, {}), known_suites)


def _with_suites(words: Words, known_suites: Sequence[str]) -> Words:
    chosen: dict[str, list[str]] = {}
    for word in words.settings:
        if word.startswith("suites="):
            names = [name.strip(" '\"") for name in word.partition("=")[2].strip().strip("[]").split(",")]
            for name in filter(None, names):
                _require_suite(name, known_suites)
                if name in chosen:
                    raise ConfigError(f"suites names {name} twice.")
                chosen[name] = []
    for word in words.settings:
        key, _, value = word.partition("=")
        if key.startswith("suite."):
            for own in chosen.values():
                own.append(word)
    # Later, so that what is said of one suite wins over what is said of all.
    for word in words.settings:
        key, _, value = word.partition("=")
        if key.startswith("suites."):
            name, _, rest = key.removeprefix("suites.").partition(".")
            if name not in chosen:
                raise ConfigError(
                    f"{key} is about {name!r}, which suites does not name: {', '.join(chosen) or 'none'}."
                )
            chosen[name].append(f"suite.{rest}={value}")
    settings = [word for word in words.settings if not word.startswith(("suites=", "suites.", "suite."))]
    return Words(words.schema, settings, words.fixed, chosen)


def _require_suite(name: str, known: Sequence[str]) -> None:
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ConfigError(f"there is no suite {name!r}; choose of {', '.join(known)}.{hint}")
