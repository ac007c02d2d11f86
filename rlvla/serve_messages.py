"""What clients of openpi and of starVLA send and are sent, and how it maps to a policy's cameras, state and
instruction.

Which of the two a client is, each message shows: starVLA's has a type, a payload or examples. Whatever does not fit is
a `MessageError` whose text goes to the client, and the connection stays open.
"""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from rlvla.config.checks import ConfigError
from rlvla.config.serve import ServeConfig
from rlvla_envs.base import Camera, EnvSpec, Observation

NOISE_KEY = "rlvla/noise_key"
"""Key of an observation, for [episode, decision]: the noise that `rlvla eval` has in this decision of the episode that
starts from the initial state of this number."""
LARGEST_KEY = 2**63 - 1
LONGEST_INSTRUCTION = 2000
"""Characters. Attention costs their square."""
SAMPLING = ("do_sample", "use_ddim", "num_ddim_steps", "cfg_scale")
"""How starVLA's clients ask for a sampler. starVLA's flow heads ignore it, and so do we: the policy has its own."""


class MessageError(ValueError):
    """A message that cannot be answered; the text is for its sender."""


class Row(NamedTuple):
    """One decision that a client asks for."""

    observation: Observation
    """[1]"""
    noise_key: tuple[int, int] | None


@dataclass(frozen=True)
class Request:
    """A message that asks for actions."""

    rows: Sequence[Row]
    starvla: bool
    request_id: Any = None


@dataclass(frozen=True)
class Answered:
    """A message that needs no policy: its reply."""

    reply: dict[str, Any]


@dataclass(frozen=True)
class Layout:
    """Where a policy's inputs are in a client's messages."""

    spec: EnvSpec
    camera_keys: Mapping[str, str]
    """openpi: the key of each camera."""
    image_order: Sequence[str]
    """starVLA: the camera of each image of the list."""
    state_key: str
    prompt_key: str
    instruction: str | None
    statistics: str
    ignore: frozenset[str]
    resize: bool

    @staticmethod
    def of(config: ServeConfig, spec: EnvSpec) -> "Layout":
        """The layout that the options describe.

        Raises:
            ConfigError: they name a camera that the policy has not, or one key twice.
        """
        names = [camera.name for camera in spec.cameras]
        for name in config.cameras:
            if name not in names:
                raise ConfigError(f"cameras.{name} is set; the policy's cameras are {', '.join(names)}.")
        order = list(config.image_order) or names
        if sorted(order) != sorted(names):
            raise ConfigError(f"image_order is {order}; it must name each of the policy's cameras once: {names}.")
        camera_keys = {name: config.cameras.get(name, f"observation/{name}") for name in names}
        state_key = config.state if spec.state_names else ""
        keys = [*camera_keys.values(), *([state_key] if state_key else []), config.prompt, NOISE_KEY]
        twice = sorted({key for key in keys if keys.count(key) > 1})
        if twice:
            raise ConfigError(f"{', '.join(twice)} stands for two things. Give cameras, state and prompt a key each.")
        needed = sorted(set(keys) & set(config.ignore))
        if needed:
            raise ConfigError(f"ignore has {', '.join(needed)}, which the policy reads. Leave it out of ignore.")
        return Layout(
            spec=spec,
            camera_keys=camera_keys,
            image_order=order,
            state_key=state_key,
            prompt_key=config.prompt,
            instruction=config.instruction,
            statistics=config.statistics or spec.suite,
            ignore=frozenset(config.ignore),
            resize=config.resize,
        )

    def observation(self) -> dict[str, str]:
        """What an openpi client has to send: key -> what it must be."""
        found = {
            self.camera_keys[camera.name]: f"uint8 [{camera.height}, {camera.width}, 3]" for camera in self.spec.cameras
        }
        if self.state_key:
            found[self.state_key] = f"numbers [{len(self.spec.state_names)}]: {', '.join(self.spec.state_names)}"
        default = "" if self.instruction is None else f"; {self.instruction!r} where it is not sent"
        found[self.prompt_key] = f"text{default}"
        return found

    def metadata(self) -> dict[str, Any]:
        """The first frame of a connection, with what both kinds of client look for."""
        spec = self.spec
        return {
            "server": "rlvla",
            "suite": spec.suite,
            "task": spec.task,
            "robot": spec.robot,
            "control_hz": spec.control_hz,
            "action_horizon": spec.chunk_size,
            "action_dim": spec.action_size,
            "action_names": spec.action_names(),
            "action": [
                {"name": c.name, "size": c.size, "convention": c.convention, "low": c.low, "high": c.high}
                for c in spec.action
            ],
            "observation": self.observation(),
            "noise_key": NOISE_KEY,
            "env": "rlvla_policy_server",
            "action_chunk_size": spec.chunk_size,
            "available_unnorm_keys": [self.statistics],
            "default_unnorm_key": self.statistics,
            "action_keys": [c.name for c in spec.action],
            "state_keys": list(spec.state_names),
            "image_keys": list(self.image_order),
        }

    def read(self, message: Any) -> Request | Answered:
        """A client's message, checked.

        Raises:
            MessageError: it does not fit the policy; what is, what must be, what to do.
        """
        if not isinstance(message, dict):
            raise MessageError(f"the message is {_kind(message)}; it must be a map. {self._reads()}")
        return self._starvla(message) if is_starvla(message) else Request([self._openpi(message)], starvla=False)

    def _openpi(self, message: dict[Any, Any]) -> Row:
        found = _flat(message)
        known = {*self.observation(), NOISE_KEY}
        needed = [key for key in self.observation() if key != self.prompt_key or self.instruction is None]
        _check_keys(
            "the observation",
            found,
            needed=needed,
            known=known | self.ignore,
            cure=f"{self._reads()} Send these keys, or start the server with the client's: cameras.CAMERA=KEY, "
            "state=KEY, prompt=KEY, and ignore=[KEY] for what is sent in vain.",
        )
        images = {
            camera.name: self._image(found[self.camera_keys[camera.name]], camera, self.camera_keys[camera.name])
            for camera in self.spec.cameras
        }
        state = self._state(found[self.state_key], self.state_key) if self.state_key else None
        text = self._instruction(found.get(self.prompt_key, self.instruction), self.prompt_key)
        return Row(Observation(images, [text], state), _noise_key(found.get(NOISE_KEY)))

    def _starvla(self, message: dict[Any, Any]) -> Request | Answered:
        request_id, kind = message.get("request_id"), message.get("type", "infer")
        if kind == "ping":
            return Answered({"status": "ok", "ok": True, "type": "ping", "request_id": request_id})
        if kind not in ("infer", "predict_action"):
            raise MessageError(f"type is {_kind(kind)}; it must be infer or ping.")
        envelope = {"type", "request_id", "payload"}
        payload = message.get("payload", {key: value for key, value in message.items() if key not in envelope})
        if not isinstance(payload, dict):
            raise MessageError(f"payload is {_kind(payload)}; it must be a map with examples.")
        unknown = [key for key in payload if key not in {"examples", "unnorm_key", *SAMPLING} | self.ignore]
        if unknown:
            raise MessageError(
                f"the request has {_list(unknown)}, which is not understood. Send examples and at most unnorm_key, or "
                "start the server with ignore=[KEY]."
            )
        statistics = payload.get("unnorm_key")
        if statistics not in (None, self.statistics):
            raise MessageError(
                f"unnorm_key is {statistics!r}; this policy has the statistics of {self.statistics!r} alone. Send that "
                "or none, or start the server with statistics=NAME if it is another name for the same."
            )
        examples = payload.get("examples")
        if not isinstance(examples, list) or not examples:
            raise MessageError(f"examples is {_kind(examples)}; it must be a list of at least one map.")
        return Request([self._example(example, i) for i, example in enumerate(examples)], True, request_id)

    def _example(self, example: Any, index: int) -> Row:
        where = f"examples[{index}]"
        if not isinstance(example, dict):
            raise MessageError(f"{where} is {_kind(example)}; it must be a map with image and lang.")
        known = {"image", "lang", NOISE_KEY, *(["state"] if self.state_key else [])}
        needed = ["image", *(["state"] if self.state_key else []), *(["lang"] if self.instruction is None else [])]
        _check_keys(
            where,
            example,
            needed=needed,
            known=known | self.ignore,
            cure=f"It must have {_list(needed)}; start the server with ignore=[KEY] for what is sent in vain.",
        )
        sent = example["image"]
        if not isinstance(sent, list) or len(sent) != len(self.image_order):
            raise MessageError(
                f"{where}: image is {_kind(sent)}; it must be a list of {len(self.image_order)}, of the cameras "
                f"{_list(self.image_order)} in this order."
            )
        cameras = {camera.name: camera for camera in self.spec.cameras}
        images = {
            name: self._image(image, cameras[name], f"{where}: image {name}")
            for name, image in zip(self.image_order, sent, strict=True)
        }
        state = self._state(example["state"], f"{where}: state") if self.state_key else None
        text = self._instruction(example.get("lang", self.instruction), f"{where}: lang")
        ordered = {camera.name: images[camera.name] for camera in self.spec.cameras}
        return Row(Observation(ordered, [text], state), _noise_key(example.get(NOISE_KEY)))

    def _image(self, value: Any, camera: Camera, where: str) -> np.ndarray:
        size = (camera.height, camera.width)
        must = f"uint8 [{camera.height}, {camera.width}, 3]"
        if not isinstance(value, np.ndarray) or value.dtype != np.uint8:
            raise MessageError(f"{where} is {_kind(value)}; it must be {must}, colours red, green, blue from 0 to 255.")
        if value.ndim == 3 and value.shape[0] == 3 and value.shape[2] != 3:
            # openpi's ALOHA clients send channels first; its server takes both as well.
            value = value.transpose(1, 2, 0)
        if value.ndim != 3 or value.shape[2] != 3 or 0 in value.shape:
            raise MessageError(f"{where} is {_kind(value)}; it must be {must}.")
        height, width = value.shape[:2]
        if (height, width) != size:
            same = height * camera.width == width * camera.height
            if not self.resize or not same:
                cure = (
                    "Resize it, or start the server with resize=true."
                    if same
                    else "Its proportions differ: crop or pad it as the policy's training data was."
                )
                raise MessageError(
                    f"{where} is {height} x {width}; this policy's camera is {size[0]} x {size[1]}. {cure}"
                )
            value = _resized(value, size)
        return np.ascontiguousarray(value)[None]

    def _state(self, value: Any, where: str) -> np.ndarray:
        names = self.spec.state_names
        must = f"{len(names)} finite numbers: {', '.join(names)}"
        if isinstance(value, list) and all(type(entry) in (int, float) for entry in value):
            value = np.array(value, dtype=np.float64)
        if not isinstance(value, np.ndarray) or value.dtype.kind not in "iuf":
            raise MessageError(f"{where} is {_kind(value)}; it must be {must}.")
        # starVLA's clients send [1, S].
        row = value[0] if value.ndim == 2 and len(value) == 1 else value
        if row.shape != (len(names),):
            raise MessageError(f"{where} is {_kind(value)}; it must be {must}.")
        with np.errstate(over="ignore"):
            row = row.astype(np.float32)
        if not np.isfinite(row).all():
            raise MessageError(f"{where} has {row[~np.isfinite(row)][0]}; it must be {must}.")
        found: np.ndarray = row[None]
        return found

    def _instruction(self, value: Any, where: str) -> str:
        if not isinstance(value, str) or not value.strip():
            raise MessageError(f"{where} is {_kind(value)}; it must be text: what the robot is to do.")
        if len(value) > LONGEST_INSTRUCTION:
            raise MessageError(f"{where} has {len(value)} characters; at most {LONGEST_INSTRUCTION} are taken.")
        return value

    def _reads(self) -> str:
        return "This policy reads " + "; ".join(f"{key}: {must}" for key, must in self.observation().items()) + "."


def is_starvla(message: Any) -> bool:
    """Whether a message is of starVLA's form; the answer to it, and to what is wrong with it, is too."""
    if not isinstance(message, dict):
        return False
    return "examples" in message or "payload" in message or isinstance(message.get("type"), str)


def answer(request: Request, actions: np.ndarray, *, decided_s: float, waited_s: float) -> dict[str, Any]:
    """The reply with a request's actions.

    Args:
        actions: [B, H, C] in env units, a row for each of the request's.
        decided_s: seconds that the policy took.
        waited_s: seconds since the message had come.
    """
    timing = {"server_timing": {"infer_ms": 1000 * waited_s}, "policy_timing": {"infer_ms": 1000 * decided_s}}
    if not request.starvla:
        return {"actions": actions[0], **timing}
    return {
        "status": "ok",
        "ok": True,
        "type": "inference_result",
        "request_id": request.request_id,
        "data": {"actions": actions},
        **timing,
    }


def refusal(message: Any, reason: str) -> dict[str, Any] | str:
    """The reply to what cannot be answered: a map to a client of starVLA, to any other text, which openpi's raises."""
    if not is_starvla(message):
        return reason
    request_id = message.get("request_id")
    error = {"message": reason}
    return {"status": "error", "ok": False, "type": "inference_result", "request_id": request_id, "error": error}


def _flat(message: dict[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Maps in maps, their keys joined by slashes."""
    found: dict[str, Any] = {}
    for key, value in message.items():
        if not isinstance(key, str):
            raise MessageError(f"the observation has a key that is {_kind(key)}; keys must be text.")
        nested = _flat(value, f"{prefix}{key}/") if isinstance(value, dict) else {f"{prefix}{key}": value}
        for name in nested.keys() & found.keys():
            raise MessageError(f"the observation has {name!r} twice, once in a map of its own. Send it once.")
        found |= nested
    return found


def _noise_key(value: Any) -> tuple[int, int] | None:
    if value is None:
        return None
    entries = value.tolist() if isinstance(value, np.ndarray) else value
    whole = isinstance(entries, list) and len(entries) == 2 and all(type(entry) is int for entry in entries)
    if not whole or not all(0 <= entry <= LARGEST_KEY for entry in entries):
        raise MessageError(
            f"{NOISE_KEY} is {_kind(value)}; it must be [episode, decision], two whole numbers from 0, or left out."
        )
    return entries[0], entries[1]


def _resized(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    from PIL import Image

    height, width = size
    resized: np.ndarray = np.asarray(
        Image.fromarray(np.ascontiguousarray(image)).resize((width, height), Image.Resampling.BICUBIC)
    )
    return resized


def _kind(value: Any) -> str:
    """A value in few words, whatever it is."""
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {list(value.shape)}"
    if value is None:
        return "missing"
    if isinstance(value, list | dict):
        return f"a {'list' if isinstance(value, list) else 'map'} of {len(value)}"
    shown = repr(value)
    return f"{type(value).__name__} {shown if len(shown) <= 40 else shown[:37] + '...'}"


def _check_keys(where: str, found: Mapping[Any, Any], *, needed: Sequence[str], known: Set[str], cure: str) -> None:
    missing = [key for key in needed if key not in found]
    unknown = [key for key in found if key not in known]
    if missing or unknown:
        said = [f"it lacks {_list(missing)}"] if missing else []
        said += [f"it has {_list(unknown)}, which this policy has no use for"] if unknown else []
        raise MessageError(f"{where} does not fit: {' and '.join(said)}. {cure}")


def _list(names: Sequence[Any]) -> str:
    shown = [str(name)[:60] for name in names[:6]]
    return ", ".join(shown) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
