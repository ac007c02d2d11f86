"""The inside of a simulator process: one `VecEnv`, spoken to in dictionaries of contiguous numpy arrays."""

import os
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from rlvla.sheets import Address, Images, SheetWriter, put, writer_at
from rlvla_envs.base import (
    ChunkResult,
    Demonstration,
    Demonstrator,
    DrawsInto,
    Filmable,
    Grouped,
    Observation,
    SuiteConfig,
    Timed,
    VecEnv,
)
from rlvla_envs.suites import make_env

Arrays = dict[str, np.ndarray]


class Pictures(NamedTuple):
    """Where a round's pictures go: rows of a sheet of the learner's memory (`rlvla.sheets`)."""

    address: Address
    sheet: int
    rows: int
    """Of the sheet, in this round."""
    restart_rows: np.ndarray
    """[R] of the request's restarts"""
    chunk_rows: np.ndarray
    """[B] of its chunks"""


@dataclass(frozen=True)
class Canvas:
    """Rows of a sheet for the pictures of one call; none where they travel with the reply."""

    sheet: Images | None = None
    rows: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))

    @contextmanager
    def under(self, env: VecEnv) -> Iterator[None]:
        """Lets a world draw on it that can; it cannot be given rows that are not one after the other."""
        if self.sheet is None or not isinstance(env, DrawsInto) or (np.diff(self.rows) != 1).any():
            yield
            return
        env.room = {name: image[self.rows[0] : self.rows[-1] + 1] for name, image in self.sheet.items()}
        try:
            yield
        finally:
            env.room = None

    def take(self, seen: Observation) -> Observation:
        """Puts pictures on it; what is left for the reply."""
        if self.sheet is None:
            return seen
        put(self.sheet, self.rows, seen)
        return Observation({}, seen.instruction, seen.state)


class SimulatorHost:
    """What a simulator process does for its driver."""

    def __init__(self, suite: SuiteConfig, num_envs: int) -> None:
        _keep_to_one_thread()
        self._suite, self._num_envs = suite, num_envs
        self._env: VecEnv | None = None
        self._writer: SheetWriter | None = None
        self._sought = False
        """Whether the learner's memory was looked for; where it is not within reach it will not be later."""

    def spec(self) -> dict[str, Any]:
        """Builds the simulators: here and not in the constructor, so that an error arrives as itself."""
        self._env = make_env(self._suite, self._num_envs)
        return self._env.spec.to_dict() | {"group_size": group_size(self._env), "versions": versions_abroad(self._env)}

    def ready(self) -> str:
        """Answers as soon as the process runs, long before it has a simulator: the name of its machine."""
        return platform.node()

    def advance(self, request: Arrays, pictures: Pictures | None = None) -> Arrays:
        """
        Args:
            pictures: where they go. The reply then has none, unless that is out of reach.
        """
        env = self._ready()
        restarts, chunks = self._canvases(pictures)
        spent = Stopwatch(env)
        reply: Arrays = {}
        if len(request["restart_slots"]):
            with restarts.under(env):
                first = env.reset(request["restart_slots"].tolist(), request["restart_states"].tolist())
            reply |= pack_observation(restarts.take(first), "restart/")
        if len(request["chunk_slots"]):
            with chunks.under(env):
                result = env.step_chunk(request["chunk_slots"].tolist(), request["chunk_actions"])
            reply |= pack_result(replace(result, observation=chunks.take(result.observation)), "chunk/")
        return reply | {"seconds": spent.read()}

    def _canvases(self, pictures: Pictures | None) -> tuple[Canvas, Canvas]:
        """For restarts and for chunks."""
        if pictures is None:
            return Canvas(), Canvas()
        if not self._sought:
            self._writer, self._sought = writer_at(pictures.address), True
        sheet = None if self._writer is None else self._writer.images(pictures.sheet, pictures.rows)
        return Canvas(sheet, pictures.restart_rows), Canvas(sheet, pictures.chunk_rows)

    def replay(self, slot: int, state: int, chunks: Sequence[np.ndarray]) -> Arrays:
        """Bring one slot where another simulator had it: the episode from ``state`` with ``chunks`` [n][H C] played.
        The reply is that of the last chunk, or of the restart where there is none."""
        env = self._ready()
        reply = pack_observation(env.reset([slot], [state]), "restart/")
        for chunk in chunks:
            reply = pack_result(env.step_chunk([slot], chunk[None]), "chunk/")
        return reply

    def demonstrate(self, state: int, seed: int) -> Arrays:
        demonstration = require_expert(self._ready()).demonstrate(state, seed)
        reply = {f"images/{name}": image for name, image in demonstration.images.items()}
        reply |= {
            "action": demonstration.action,
            "instruction": np.array(demonstration.instruction),
            "success": np.array(demonstration.success),
        }
        if demonstration.state is not None:
            reply["state"] = demonstration.state
        return reply

    def film(self, slot: int) -> np.ndarray | None:
        env = self._ready()
        return env.film(slot) if isinstance(env, Filmable) else None

    def _ready(self) -> VecEnv:
        assert self._env is not None, "spec() builds the simulators and comes first"
        return self._env


def _keep_to_one_thread() -> None:
    """One simulator a core: more threads in each only fight. Torch is told if it is here and will read it if it comes:
    to import it takes long and much memory, and half of the worlds never do."""
    if (torch := sys.modules.get("torch")) is not None:
        torch.set_num_threads(1)
    else:
        os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")


class Stopwatch:
    """What a round costs its simulators."""

    def __init__(self, env: VecEnv) -> None:
        self._env = env
        self._began, self._rendered = time.perf_counter(), rendering_s(env)

    def read(self) -> np.ndarray:
        """Seconds since it was made: [in all, of these rendering]. Rendering is 0 where the world does not say."""
        return np.array([time.perf_counter() - self._began, rendering_s(self._env) - self._rendered])


def rendering_s(env: VecEnv) -> float:
    return env.render_s if isinstance(env, Timed) else 0.0


RESULT_FIELDS = ("reward", "terminated", "truncated", "success", "executed_steps")


def pack_observation(observation: Observation, prefix: str) -> Arrays:
    arrays = {f"{prefix}images/{name}": image for name, image in observation.images.items()}
    arrays[f"{prefix}instruction"] = np.array(observation.instruction)
    if observation.state is not None:
        arrays[f"{prefix}state"] = observation.state
    return arrays


def unpack_observation(arrays: Arrays, prefix: str) -> Observation:
    images = f"{prefix}images/"
    return Observation(
        images={key.removeprefix(images): value for key, value in arrays.items() if key.startswith(images)},
        instruction=[str(text) for text in arrays[f"{prefix}instruction"]],
        state=arrays.get(f"{prefix}state"),
    )


def pack_result(result: ChunkResult, prefix: str) -> Arrays:
    arrays = pack_observation(result.observation, prefix)
    arrays |= {f"{prefix}{name}": getattr(result, name) for name in RESULT_FIELDS}
    return arrays | {f"{prefix}metrics/{name}": values for name, values in result.metrics.items()}


def unpack_result(arrays: Arrays, prefix: str) -> ChunkResult:
    reward, terminated, truncated, success, executed = (arrays[f"{prefix}{name}"] for name in RESULT_FIELDS)
    metrics = f"{prefix}metrics/"
    return ChunkResult(
        observation=unpack_observation(arrays, prefix),
        reward=reward,
        terminated=terminated,
        truncated=truncated,
        success=success,
        executed_steps=executed,
        metrics={key.removeprefix(metrics): value for key, value in arrays.items() if key.startswith(metrics)},
    )


def unpack_demonstration(arrays: Arrays) -> Demonstration:
    prefix = "images/"
    return Demonstration(
        images={k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)},
        state=arrays.get("state"),
        action=arrays["action"],
        instruction=str(arrays["instruction"]),
        success=bool(arrays["success"]),
    )


def group_size(env: VecEnv) -> int:
    return env.group_size if isinstance(env, Grouped) else 1


def versions_abroad(env: VecEnv) -> str:
    """Of the interpreter that hosts the simulator (`rlvla_envs.foreign`); empty where it is this one."""
    return str(getattr(env, "versions", ""))


def require_expert(env: VecEnv) -> Demonstrator:
    if not isinstance(env, Demonstrator):
        raise ValueError(f"suite {env.spec.suite} has no scripted expert. Bring your own demonstrations.")
    return env
