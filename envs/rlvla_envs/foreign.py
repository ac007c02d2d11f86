"""A world in another interpreter: `ForeignEnv` starts it, speaks `rlvla_envs.wire` and believes nothing it hears.

For suites that pin another numpy or another simulator than ours. Their process has the user's rights and is not
confined; what comes back from it is data of announced dtypes and shapes, and can be nothing else.
"""

import dataclasses
import math
import os
import select
import signal
import socket
import subprocess
import threading
import time
import typing
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import numpy as np

from rlvla_envs.base import FIRST_TRAINING_STATE, ChunkResult, Demonstration, EnvSpec, Observation, SuiteConfig
from rlvla_envs.suites import interpreter_path
from rlvla_envs.wire import MAX_ARRAYS, Message, WireError, encode, receive, send

BOOTSTRAP = """
import sys
if sys.version_info < (3, 10):
    sys.exit("a simulator host needs Python 3.10 or newer; this is " + sys.version)
sys.path[:] = [folder for folder in sys.path if folder]
from importlib import util
spec = util.spec_from_file_location("rlvla_envs", sys.argv[1])
sys.modules["rlvla_envs"] = package = util.module_from_spec(spec)
spec.loader.exec_module(package)
from rlvla_envs.foreign_host import main
main(int(sys.argv[2]))
"""
"""Finds this package and nothing beside it: PYTHONPATH=site-packages would offer our numpy to another Python."""

START_TIMEOUT_S = 600.0
"""Imports, assets, shaders. Long, because a machine may be busy; an interpreter that fails is noticed at once."""
TIMEOUT_S_PER_ENV = 60.0
"""One call, for each environment; at least `START_TIMEOUT_S` in all. The slowest reset that was measured takes 10 s."""
CLOSE_TIMEOUT_S = 10.0
MAX_SIDE = 4096
"""Pixels."""
MAX_TEXT = 4_000
"""Characters of an instruction or an error."""
LAST_WORDS = 2_000
"""Bytes that are quoted of what the process printed."""


class ForeignEnv:
    """A `VecEnv` in the interpreter ``config.python``.

    It is a `Demonstrator`, `Filmable` or `Grouped` if the world over there is one. What that world raises is raised
    here, ValueError as ValueError and anything else as RuntimeError, and it lives on. A violated protocol, a missed
    deadline or a death ends its process group, and raises RuntimeError with the last it printed; so does every later
    call.

    Args:
        start_timeout_s: for the interpreter to start and build the simulators.
        timeout_s: for each call to be taken, and again for its reply; None takes a minute for each environment.

    Raises:
        ValueError: the interpreter does not exist, or the suite refuses the configuration.
        RuntimeError: it cannot be started, or the simulator cannot run there.
    """

    spec: EnvSpec
    num_envs: int
    versions: str
    """Of Python, numpy and what else can change an episode over there."""

    def __init__(
        self,
        config: SuiteConfig,
        num_envs: int,
        *,
        start_timeout_s: float = START_TIMEOUT_S,
        timeout_s: float | None = None,
    ) -> None:
        if config.python is None:
            raise ValueError("suite.python is null; it must name the interpreter that hosts the simulator.")
        self.num_envs = num_envs
        self._label = f"{config.name} {config.task}, hosted by {config.python},"
        self._timeout_s = timeout_s or max(START_TIMEOUT_S, TIMEOUT_S_PER_ENV * num_envs)
        self._calls, self._broken = 0, ""
        self._metrics: set[str] | None = None
        self._process, self._connection = _start(interpreter_path(config.python))
        assert self._process.stdout is not None
        self._output = _LastWords(self._process.stdout)
        suite = {**dataclasses.asdict(config), "python": None}
        try:
            with self._call("open", {"suite": suite, "num_envs": num_envs}, timeout_s=start_timeout_s) as reply:
                self.spec = _spec(reply.field("spec", dict), config)
                self.versions = reply.text("versions")
                has_expert, films = reply.field("demonstrates", bool), reply.field("films", bool)
                group_size = reply.message.fields.get("group_size")
                if group_size is not None and (type(group_size) is not int or not 1 <= group_size <= num_envs):
                    raise WireError(f"group_size is {group_size!r:.50}; it must lie in [1, {num_envs}].")
        except BaseException:
            self._end()
            raise
        # Attributes of the instance, because the Protocols of base.py ask which there are.
        if has_expert:
            self.demonstrate = self._demonstrate
        if films:
            self.film = self._film
        if group_size is not None:
            self.group_size: int = group_size

    @property
    def pid(self) -> int:
        """The foreign process, which leads a process group of its own."""
        return self._process.pid

    def reset(self, slots: Sequence[int], initial_states: Sequence[int]) -> Observation:
        arrays = {"slots": np.asarray(slots, np.int64), "initial_states": np.asarray(initial_states, np.int64)}
        with self._call("reset", {}, arrays, max_body=self._observation_bytes(len(slots))) as reply:
            return self._observation(reply, len(slots))

    def step_chunk(self, slots: Sequence[int], actions: np.ndarray) -> ChunkResult:
        rows, horizon = len(slots), actions.shape[1]
        arrays = {"slots": np.asarray(slots, np.int64), "actions": actions}
        limit = self._observation_bytes(rows) + 8 * rows * MAX_ARRAYS
        with self._call("step_chunk", {}, arrays, max_body=limit) as reply:
            prefix = "metrics/"
            names = {name for name in reply.left if name.startswith(prefix)}
            result = ChunkResult(
                observation=self._observation(reply, rows),
                reward=reply.array("reward", np.float32, rows),
                terminated=reply.array("terminated", np.bool_, rows),
                truncated=reply.array("truncated", np.bool_, rows),
                success=reply.array("success", np.bool_, rows),
                executed_steps=reply.array("executed_steps", np.int64, rows),
                metrics={name[len(prefix) :]: reply.array(name, np.float32, rows) for name in sorted(names)},
            )
            executed = result.executed_steps
            if ((executed < 1) | (executed > horizon)).any():
                raise WireError(f"executed_steps are {executed.tolist()!s:.200}; they must lie in [1, {horizon}].")
            if (result.terminated & result.truncated).any():
                raise WireError("an episode is terminated and truncated at once; it must be one of the two.")
            if self._metrics is not None and names != self._metrics:
                raise WireError(f"the metrics are {sorted(names)!s:.300} and were {sorted(self._metrics)!s:.300}.")
            self._metrics = names
            return result

    def close(self) -> None:
        if not self._broken:
            with suppress(Exception), self._call("close", {}, timeout_s=CLOSE_TIMEOUT_S):
                pass
        self._end()

    def _demonstrate(self, initial_state: int, seed: int) -> Demonstration:
        steps = self.spec.max_episode_steps
        limit = self._observation_bytes(steps) + 4 * steps * self.spec.action_size
        request = {"initial_state": int(initial_state), "seed": int(seed)}
        with self._call("demonstrate", request, max_body=limit) as reply:
            length = (*reply.shape("action"), 0)[0]
            if not 1 <= length <= steps:
                raise WireError(f"a demonstration has {length} actions; it must have 1 to {steps}.")
            return Demonstration(
                images=self._images(reply, length),
                state=self._state(reply, length),
                action=reply.array("action", np.float32, length, self.spec.action_size),
                instruction=reply.text("instruction"),
                success=reply.field("success", bool),
            )

    def _film(self, slot: int) -> np.ndarray:
        with self._call("film", {"slot": int(slot)}, max_body=3 * MAX_SIDE**2) as reply:
            shape = reply.shape("frame")
            if len(shape) != 3 or not all(1 <= side <= MAX_SIDE for side in shape[:2]):
                raise WireError(f"a frame has shape {list(shape)}; it must be [h, w, 3], of 1 to {MAX_SIDE} pixels.")
            return reply.array("frame", np.uint8, *shape[:2], 3)

    def _observation(self, reply: "_Reply", rows: int) -> Observation:
        return Observation(self._images(reply, rows), reply.texts("instruction", rows), self._state(reply, rows))

    def _images(self, reply: "_Reply", rows: int) -> dict[str, np.ndarray]:
        return {
            c.name: reply.array(f"images/{c.name}", np.uint8, rows, c.height, c.width, 3) for c in self.spec.cameras
        }

    def _state(self, reply: "_Reply", rows: int) -> np.ndarray | None:
        return reply.array("state", np.float32, rows, self.spec.state_size) if self.spec.state_size else None

    def _observation_bytes(self, rows: int) -> int:
        return rows * (sum(3 * c.height * c.width for c in self.spec.cameras) + 4 * self.spec.state_size)

    @contextmanager
    def _call(
        self,
        kind: str,
        fields: Mapping[str, Any],
        arrays: Mapping[str, np.ndarray] | None = None,
        *,
        timeout_s: float | None = None,
        max_body: int = 0,
    ) -> Iterator["_Reply"]:
        """One request; the block takes the reply apart, and must use all of it."""
        if self._broken:
            raise RuntimeError(self._broken)
        timeout_s = timeout_s or self._timeout_s
        # Refused before anything was sent: the caller's mistake, and the world lives on.
        parts = encode(Message(kind, {**fields, "call": self._calls}, arrays or {}))
        try:
            send(self._connection, parts, timeout_s=timeout_s)
            message = receive(self._connection, timeout_s=timeout_s, max_body=max_body)
            # Also what an earlier request is answered a second time with.
            if type(message.fields.get("call")) is not int or message.fields["call"] != self._calls:
                raise WireError(f"the reply to call {self._calls} is numbered {message.fields.get('call')!r:.50}.")
            self._calls += 1
            if message.kind not in (kind, "error"):
                raise WireError(f"a request to {kind} is answered with {message.kind!r:.50}.")
            reply, name, text = _Reply(message), "", ""
            if message.kind == "error":
                name, text = reply.text("type"), reply.text("text")
            else:
                yield reply
            if reply.left:
                raise WireError(f"the reply has arrays that nobody announced: {sorted(reply.left)!s:.300}.")
        except WireError as error:
            raise self._failure(kind, error) from error
        except BaseException:
            # Interrupted between a request and its reply, for example by Ctrl-C: the next reply would be this one's.
            self._end()
            raise
        if message.kind == "error":
            raise self._error(kind, name, text)

    def _error(self, kind: str, name: str, text: str) -> Exception:
        """What the world over there raised. It is still alive."""
        if name == "ValueError":
            return ValueError(text)
        if name == "RuntimeError":
            return RuntimeError(text)
        return RuntimeError(f"{self._label} raised {name} in {kind}: {text}{self._output.quoted()}")

    def _failure(self, kind: str, error: WireError) -> RuntimeError:
        """End the process; what is known of the reason."""
        status = _exit_status(self._process.pid, wait_s=1.0 if _hung_up(self._connection) else 0.0)
        self._end()
        self._broken = f"{self._label} failed in {kind}: {_printable(str(error))}{status}{self._output.quoted()}"
        return RuntimeError(self._broken)

    def _end(self) -> None:
        """Leave nothing behind. Before the process is reaped, so that its number cannot be another's."""
        self._broken = self._broken or f"{self._label} is closed."
        if self._process.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self._connection.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(CLOSE_TIMEOUT_S)


class _Reply:
    """A reply, taken apart: every piece is asked for with what it has to be."""

    def __init__(self, message: Message) -> None:
        self.message, self.left = message, dict(message.arrays)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.left[name].shape if name in self.left else ()

    def array(self, name: str, dtype: type[np.generic], *shape: int) -> np.ndarray:
        if name not in self.left:
            raise WireError(f"the reply lacks the array {name!r:.100}.")
        array = self.left.pop(name)
        if array.dtype != dtype or array.shape != shape:
            expected = f"{np.dtype(dtype)} {list(shape)}"
            raise WireError(f"{name!r:.100} is {array.dtype} {list(array.shape)}; announced is {expected}.")
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise WireError(f"{name!r:.100} has numbers that are not finite.")
        return array

    def field(self, name: str, kind: type) -> Any:
        value = self.message.fields.get(name)
        if type(value) is not kind:
            raise WireError(f"the reply's {name} is {value!r:.100}; it must be of type {kind.__name__}.")
        return value

    def text(self, name: str) -> str:
        return _text(self.field(name, str), name)

    def texts(self, name: str, count: int) -> list[str]:
        values = self.field(name, list)
        if len(values) != count:
            raise WireError(f"the reply has {len(values)} of {name}; it must have {count}.")
        return [_text(value, name) for value in values]


class _LastWords:
    """The end of what a process prints. Read all the time: nobody may block because a pipe is full."""

    def __init__(self, pipe: IO[bytes]) -> None:
        self._pipe, self._kept = pipe, b""
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def quoted(self) -> str:
        # After a death there may still be something in the pipe; from a living process there is no end to wait for.
        self._thread.join(0.5)
        text = _printable(self._kept.decode(errors="replace")).strip()
        return "\nThe last it printed:\n" + "\n".join(f"  {line}" for line in text.splitlines()) if text else ""

    def _read(self) -> None:
        with self._pipe:
            while chunk := self._pipe.read(65536):
                self._kept = (self._kept + chunk)[-LAST_WORDS:]


def _start(python: str) -> tuple[subprocess.Popen[bytes], socket.socket]:
    ours, theirs = socket.socketpair()
    # What points this interpreter to its packages would point another one to the wrong ones.
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    package = str(Path(__file__).resolve().parent / "__init__.py")
    try:
        process = subprocess.Popen(
            [python, "-u", "-c", BOOTSTRAP, package, str(theirs.fileno())],
            # Some simulators ask questions when they are imported.
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            bufsize=0,
            env=environment,
            pass_fds=[theirs.fileno()],
            start_new_session=True,
        )
    except OSError as error:
        ours.close()
        raise RuntimeError(f"suite.python={python} could not be started: {error}.") from error
    finally:
        # With our copy open, a child that dies would not be noticed.
        theirs.close()
    return process, ours


def _hung_up(connection: socket.socket) -> bool:
    """Whether the other end is closed: then the process is ending, if it has not ended."""
    poll = select.poll()
    poll.register(connection, 0)
    return bool(poll.poll(0))


def _exit_status(pid: int, wait_s: float) -> str:
    """How a process ended, as the end of a sentence; empty while it lives. Does not reap it."""
    deadline = time.monotonic() + wait_s
    while True:
        try:
            ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:  # somebody reaped it
            return ""
        if ended is not None:
            break
        if time.monotonic() >= deadline:
            return ""
        time.sleep(0.01)
    if ended.si_code == os.CLD_EXITED:
        return f" It ended with status {ended.si_status}."
    hint = " Was memory exhausted?" if ended.si_status == signal.SIGKILL else ""
    return f" It was killed by signal {ended.si_status} ({signal.strsignal(ended.si_status)}).{hint}"


def _spec(data: dict[str, Any], config: SuiteConfig) -> EnvSpec:
    """What the world announces, checked: every later reply is measured with it."""
    try:
        spec = EnvSpec.from_dict(data)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise WireError(f"the spec is none: {type(error).__name__}: {error!s:.300}.") from error
    if not _conforms(spec, EnvSpec):
        raise WireError("the spec has a field of the wrong type.")
    sides = [side for camera in spec.cameras for side in (camera.height, camera.width)]
    sound = {
        "suite": spec.suite == config.name,
        "chunk_size": spec.chunk_size == config.chunk_size,
        "cameras": len({camera.name for camera in spec.cameras}) == len(spec.cameras) >= 1
        and all(1 <= side <= MAX_SIDE for side in sides),
        "action": spec.action_size >= 1 and all(c.size >= 1 and c.low < c.high for c in spec.action),
        "control_hz": spec.control_hz > 0,
        "max_episode_steps": spec.max_episode_steps >= 1,
        "num_evaluation_states": 1 <= spec.num_evaluation_states <= FIRST_TRAINING_STATE,
    }
    for name, holds in sound.items():
        if not holds:
            raise WireError(f"the spec cannot have {name}={getattr(spec, name)!r:.200} under this configuration.")
    return spec


def _conforms(value: Any, kind: Any) -> bool:
    """Whether a value has the type that a dataclass declares for it, all the way down."""
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        return isinstance(value, typing.cast(type, kind)) and all(
            _conforms(getattr(value, f.name), hints[f.name]) for f in dataclasses.fields(kind)
        )
    if typing.get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(_conforms(item, typing.get_args(kind)[0]) for item in value)
    if kind is float:
        return type(value) in (int, float) and math.isfinite(value)
    if kind is str:
        return type(value) is str and value == _printable(value)
    return type(value) is kind


def _text(value: Any, name: str) -> str:
    if type(value) is not str or len(value) > MAX_TEXT:
        raise WireError(f"{name} is {value!r:.100}; it must be a text of at most {MAX_TEXT} characters.")
    return _printable(value)


def _printable(text: str) -> str:
    """Without control characters: a terminal obeys them."""
    return "".join(c if c.isprintable() or c in "\n\t" else "?" for c in text)
