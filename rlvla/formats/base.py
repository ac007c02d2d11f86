"""What a format is: a reader that turns a checkpoint folder into the parts of a policy. Export needs no code for it.

Adding one: a module here with a `read` function, and a line in FORMATS.
"""

import difflib
import importlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np

from rlvla.config import ImportConfig
from rlvla.formats.tensors import KeyMap, Weights
from rlvla.policies.action_stats import ActionStats
from rlvla_envs.base import EnvSpec

FORMATS = {
    "lerobot": "rlvla.formats.lerobot",
    "openpi": "rlvla.formats.openpi",
    "starvla": "rlvla.formats.starvla",
}
"""Name -> module with ``read(checkpoint, config, spec) -> Draft`` and ``NOISE_AT``; and with ``root(checkpoint)`` where
a user may name a file in a checkpoint's folder."""

PADDING = 1e-4
"""Range of a channel's statistics below which it never moved."""
LARGEST_FILE = 64 * 2**20
"""Bytes of a file beside the weights that is kept for export."""
LEFT_OUT = {".pt", ".pth", ".bin", ".ckpt", ".pkl", ".npz"}
"""Endings of files that are not kept: other weights, optimizers, pickles."""


class Draft(NamedTuple):
    """The parts of a policy, before one is built."""

    config: Any
    """Of the architecture."""
    stats: ActionStats
    tokenizer: Any
    weights: Weights
    key_map: KeyMap
    notes: tuple[str, ...] = ()
    """What the user should know, one sentence each."""


@dataclass(frozen=True)
class Format:
    """A format by name."""

    name: str
    noise_at: float
    """Flow time at which a sample is noise, in the original's convention."""
    read: Callable[[Path, ImportConfig, EnvSpec], Draft]
    root: Callable[[Path], Path]
    """The checkpoint's folder, of what the user named."""


def find_format(name: str) -> Format:
    """The format of a name.

    Raises:
        ValueError: nobody has it; the message suggests the nearest.
    """
    if name not in FORMATS:
        close = difflib.get_close_matches(str(name), FORMATS, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"{name!r} is no checkpoint format.{hint} Formats: {', '.join(FORMATS)}.")
    module: Any = importlib.import_module(FORMATS[name])
    return Format(name, module.NOISE_AT, module.read, getattr(module, "root", _itself))


def _itself(checkpoint: Path) -> Path:
    return checkpoint


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ValueError: not there, damaged, or something else than an object.
    """
    try:
        data = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{path} is missing.") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error}. Copy the checkpoint again.") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path} holds a {type(data).__name__}; it must hold a JSON object.")
    return cast(dict[str, Any], data)


def check_supported(said: Mapping[str, Any], values: Mapping[str, tuple[Any, ...]], path: Path) -> None:
    """Refuse options that change what a network computes and have no supported value; absent ones have the first."""
    for key, supported in values.items():
        if said.get(key, supported[0]) not in supported:
            raise ValueError(f"{path} says {key} = {said[key]!r}; only {supported[0]!r} is supported.")


def integer(data: Mapping[str, Any], key: str, default: int | None, path: Path) -> int:
    """A whole number of a configuration; without a default it must be there.

    Raises:
        ValueError: it is something else.
    """
    value = data.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{path} says {key} = {value!r}; it must be a whole number.")
    return value


def check_same(said: Mapping[str, Any], key: str, path: Path, there: int, what: str, weights: Path) -> None:
    """Refuse a configuration that says another size than the tensors have; one that says nothing is believed.

    Args:
        path: of the configuration.
        there: the size that the tensors in ``weights`` have.
        what: of which it is the number, for the message.
    """
    if said.get(key) is not None and integer(said, key, None, path) != there:
        raise ValueError(
            f"{path} says {key} = {said[key]!r}, and {weights} has {there} {what}. Is it the configuration of "
            "another checkpoint, or are weights missing?"
        )


def companion_files(checkpoint: Path, weights: Path) -> tuple[dict[str, bytes], list[str]]:
    """A checkpoint's other files for export, and the names of those that are left out."""
    kept, left_out = {}, []
    for path in sorted(checkpoint.rglob("*")):
        name = str(path.relative_to(checkpoint))
        # Downloads leave such folders; the checkpoint itself may lie in one.
        if not path.is_file() or path == weights or name.startswith((".cache/", ".git/")):
            continue
        if path.suffix in LEFT_OUT or path.stat().st_size > LARGEST_FILE:
            left_out.append(name)
        else:
            kept[name] = path.read_bytes()
    return kept, left_out


def load_checkpoint_tokenizer(folder: Path, given: str | None, *, image_token: str, bos: bool, whose: str) -> Any:
    """The tokenizer of a checkpoint, or the one that the user gives for it.

    Args:
        image_token: what the VLM's tokenizer must know; another one lacks it.
        bos: whether encoding must begin with the tokenizer's own first token.
        whose: where such a tokenizer is published.

    Raises:
        ValueError: none is there, it is damaged, or it is another model's.
    """
    from rlvla.policies.processor import load_tokenizer

    source = Path(given) if given else folder
    if not (source / "tokenizer.json").is_file():
        raise ValueError(
            f"{source} has no tokenizer.json. Give tokenizer=FOLDER with the tokenizer files of {whose}, which the "
            "checkpoint was trained with."
        )
    try:
        tokenizer = load_tokenizer(source)
    except Exception as error:  # tokenizers raises plain Exceptions
        raise ValueError(f"{source}/tokenizer.json is damaged: {type(error).__name__}: {error}.") from error
    if image_token not in tokenizer.get_vocab():
        raise ValueError(
            f"{source}/tokenizer.json has no image token {image_token!r}: it is not that of {whose}, and would give "
            "the policy other token ids. Give tokenizer=FOLDER with the right one."
        )
    if bos and tokenizer("a")["input_ids"][0] != tokenizer.bos_token_id:
        raise ValueError(
            f"{source}/tokenizer.json does not begin a text with {tokenizer.bos_token!r} as that of {whose} does, and "
            "the checkpoint was trained with it. Give tokenizer=FOLDER with the right one."
        )
    return tokenizer


def check_size(what: str, theirs: int, ours: int, path: Path) -> None:
    """Refuse a suite whose vectors are not the checkpoint's."""
    if theirs != ours:
        raise ValueError(
            f"{path} says that {what} has {theirs} channels, the suite has {ours}. Choose a suite with the "
            "checkpoint's conventions (suite=NAME)."
        )


def order_cameras(
    theirs: Sequence[str], spec: EnvSpec, given: Mapping[str, str], prefix: str = ""
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The suite's cameras in the order of the checkpoint's images, and the images that no camera fills.

    Args:
        theirs: names of the checkpoint's images, in their order.
        given: suite camera -> image, from the user; needed where names differ and there is more than one of either.
        prefix: what may stand before a name.

    Raises:
        ValueError: a camera without an image, an unknown name, or an image that two cameras claim.
    """
    ours = [camera.name for camera in spec.cameras]
    full = {**{name.removeprefix(prefix): name for name in theirs}, **{name: name for name in theirs}}
    unknown = [name for name in given if name not in ours] + [name for name in given.values() if name not in full]
    chosen = {camera: full[image] for camera, image in given.items() if image in full}
    for camera in ours:
        if camera not in chosen and camera in full:
            chosen[camera] = full[camera]
    if len(ours) == len(theirs) == 1 and not unknown:
        chosen.setdefault(ours[0], theirs[0])
    homeless = [camera for camera in ours if camera not in chosen]
    if unknown or homeless or len(set(chosen.values())) < len(chosen):
        pairs = " ".join(f"cameras.{camera}={chosen.get(camera, 'IMAGE')}" for camera in ours)
        raise ValueError(
            f"the checkpoint's images are {', '.join(theirs)}, the suite's cameras {', '.join(ours)}. Say which camera "
            f"is which image, each once: {pairs}"
        )
    by_image = {image: camera for camera, image in chosen.items()}
    ordered = tuple(by_image[image] for image in theirs if image in by_image)
    return ordered, tuple(image for image in theirs if image not in by_image)


REMEDY = (
    "Give statistics=FILE: the meta/stats.json of the dataset the checkpoint was trained on, or openpi's "
    "norm_stats.json."
)


def affine(
    mode: str, stats: Mapping[str, np.ndarray], eps: float, where: str, remedy: str = REMEDY
) -> tuple[np.ndarray, np.ndarray]:
    """What a normalisation maps to -1 and to +1.

    Args:
        mode: MEAN_STD, MIN_MAX, QUANTILES, QUANTILE10 or IDENTITY.
        eps: what is added to a deviation; in the others, what replaces a range of zero.
        remedy: what to do about statistics that are missing.

    Raises:
        ValueError: an unknown mode, statistics that it needs and are not there, or such as no data have.
    """
    pairs = {
        "MEAN_STD": ("mean", "std"),
        "MIN_MAX": ("min", "max"),
        "QUANTILES": ("q01", "q99"),
        "QUANTILE10": ("q10", "q90"),
    }
    if mode not in pairs:
        raise ValueError(f"{where} normalises by {mode!r}; known are {', '.join(pairs)}.")
    first, second = pairs[mode]
    missing = [key for key in (first, second) if key not in stats]
    if missing:
        raise ValueError(
            f"{where} lacks the statistics {' and '.join(missing)}, which {mode} needs; it has "
            f"{', '.join(sorted(stats)) or 'none'}. {remedy}"
        )
    a, b = (np.asarray(stats[key], np.float64).reshape(-1) for key in (first, second))
    if len(a) != len(b):
        raise ValueError(f"{where} has {len(a)} channels of {first} and {len(b)} of {second}; they must be as many.")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError(f"{where} has statistics that are not finite.")
    # A policy with such a channel would hold it still, and nothing else would say so.
    wrong = np.flatnonzero(b < (0 if mode == "MEAN_STD" else a))
    if len(wrong):
        i = int(wrong[0])
        above = "0 or more" if mode == "MEAN_STD" else f"at least {first}, {a[i]:g}"
        raise ValueError(f"{where} has {second} = {b[i]:g} in channel {i}; it must be {above}. Is the file damaged?")
    if mode == "MEAN_STD":
        return a - (b + eps), a + (b + eps)
    span = np.where(b == a, eps, b - a)
    return a, a + span


def read_statistics(path: Path) -> dict[str, dict[str, np.ndarray]]:
    """Statistics as users have them: "action" and "state", each by name.

    A LeRobot dataset's meta/stats.json, or openpi's norm_stats.json.

    Raises:
        ValueError: another file.
    """
    data = read_json(path)
    data = data.get("norm_stats", data)
    found = {}
    for ours, names in (("action", ("action", "actions")), ("state", ("observation.state", "state"))):
        entry = next((data[name] for name in names if name in data), None)
        if isinstance(entry, dict):
            found[ours] = {
                key: read_numbers(value, f"{path} ({ours}.{key})") for key, value in entry.items() if value is not None
            }
    if "action" not in found:
        raise ValueError(
            f"{path} has no statistics of actions; its keys are {', '.join(sorted(map(str, data))[:8]) or 'none'}. It "
            'must be a LeRobot dataset\'s meta/stats.json ("action", "observation.state") or openpi\'s norm_stats.json.'
        )
    return found


def read_numbers(value: Any, where: str) -> np.ndarray:
    """A list of numbers from somebody's file."""
    try:
        return np.asarray(value, np.float64).reshape(-1)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where} is {value!r}; it must be a list of numbers.") from error


def unclipped_stats(
    action: tuple[np.ndarray, np.ndarray], state: tuple[np.ndarray, np.ndarray] | None, spec: EnvSpec, where: str
) -> ActionStats:
    """Statistics for the suite's channels. These checkpoints clip neither actions nor state.

    Args:
        action: what normalises to -1 and +1, for at least the suite's channels.
        state: the same; None where the suite has no state.

    Raises:
        ValueError: fewer channels than the suite has, or more that are no padding.
    """
    parts = []
    for name, size, bounds in (("actions", spec.action_size, action), ("the state", spec.state_size, state)):
        low, high = bounds if bounds is not None else (np.zeros(0), np.zeros(0))
        if len(low) < size:
            raise ValueError(
                f"{where} has statistics of {len(low)} channels for {name}, the suite has {size}. Choose a suite with "
                "the checkpoint's conventions (suite=NAME), or give statistics=FILE."
            )
        if (high[size:] - low[size:] > PADDING).any():
            raise ValueError(
                f"{where} has statistics of {len(low)} channels for {name}, and the last {len(low) - size} are no "
                f"padding: the suite has {size}. Choose a suite with the checkpoint's conventions (suite=NAME)."
            )
        parts.append((low[:size], high[:size]))
    (low, high), (below, above) = parts
    return ActionStats(
        low.astype(np.float32),
        high.astype(np.float32),
        ((below + above) / 2).astype(np.float32),
        ((above - below) / 2).astype(np.float32),
        action_bound=float("inf"),
        state_bound=float("inf"),
    )
