"""Where simulators live: in Ray actors, or in this process. Ray is imported here and nowhere else.

Both kinds answer `advance`: restart some slots, run a chunk in others, one round trip. Only plain dictionaries
of contiguous numpy arrays cross the border, so a simulator may live in a foreign interpreter.
"""

import logging
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
from jaxtyping import Float32, Int64

from rlvla.config import WorkerKind, WorkersConfig
from rlvla_envs.base import (
    ChunkResult,
    Demonstration,
    Demonstrator,
    EnvSpec,
    Filmable,
    Grouped,
    Observation,
    SuiteConfig,
    VecEnv,
)
from rlvla_envs.suites import check_memory, check_suite, make_env

Arrays = dict[str, np.ndarray]

OBJECT_STORE_BYTES = 512 * 1024**2
"""Of Ray, in shared memory: replies pass through it, nothing stays."""


@dataclass(frozen=True)
class Round:
    """What one round trip is to do: every slot appears at most once."""

    restart_slots: Int64[np.ndarray, " R"]
    restart_states: Int64[np.ndarray, " R"]
    chunk_slots: Int64[np.ndarray, " B"]
    chunk_actions: Float32[np.ndarray, "B H A"]


class Envs(Protocol):
    """A pool of slots, each one simulator."""

    spec: EnvSpec
    num_slots: int
    group_size: int
    """Slots restart together in groups of so many (`Grouped`); 1 almost everywhere."""

    def advance(self, todo: Round) -> tuple[Observation | None, ChunkResult | None]:
        """First observations of the restarted slots and results of the chunks, both in the order asked."""
        ...

    def demonstrate(self, states: Sequence[int], seeds: Sequence[int]) -> list[Demonstration]:
        """Scripted expert episodes, at most `num_slots` at once."""
        ...

    def film(self, slot: int) -> np.ndarray | None:
        """A frame for people, or None where the suite draws none."""
        ...

    def close(self) -> None: ...


def open_envs(suite: SuiteConfig, workers: WorkersConfig, num_envs: int | None = None) -> Envs:
    """Build the simulators of a run.

    Args:
        num_envs: how many slots are worth having at most.

    Raises:
        ValueError: the suite is misconfigured.
        RuntimeError: the simulator cannot run here.
    """
    check_suite(suite)
    actors = workers.num_actors or os.cpu_count() or 1
    per_actor = workers.envs_per_actor
    if num_envs is not None:
        actors = min(actors, num_envs)
        per_actor = min(per_actor, -(-num_envs // actors))
    if workers.kind is WorkerKind.local:
        check_memory(suite, actors * per_actor, 1)
        return LocalEnvs(suite, actors * per_actor)
    check_memory(suite, per_actor, actors)
    return RayEnvs(suite, num_actors=actors, envs_per_actor=per_actor, timeout_s=workers.timeout_s)


class LocalEnvs:
    """Every slot in this process: for tests, debugging and suites that cost nothing."""

    def __init__(self, suite: SuiteConfig, num_slots: int) -> None:
        self._env = make_env(suite, num_slots)
        self.spec, self.num_slots, self.group_size = self._env.spec, num_slots, _group_size(self._env)

    def advance(self, todo: Round) -> tuple[Observation | None, ChunkResult | None]:
        first = result = None
        if len(todo.restart_slots):
            first = self._env.reset(todo.restart_slots.tolist(), todo.restart_states.tolist())
        if len(todo.chunk_slots):
            result = self._env.step_chunk(todo.chunk_slots.tolist(), todo.chunk_actions)
        return first, result

    def demonstrate(self, states: Sequence[int], seeds: Sequence[int]) -> list[Demonstration]:
        expert = _require_expert(self._env)
        return [expert.demonstrate(state, seed) for state, seed in zip(states, seeds, strict=True)]

    def film(self, slot: int) -> np.ndarray | None:
        return self._env.film(slot) if isinstance(self._env, Filmable) else None

    def close(self) -> None:
        self._env.close()


class RayEnvs:
    """Slots spread over Ray actors; slot s lives in actor s // envs_per_actor.

    Ray never restarts an actor or repeats a call for us: a repeated call would step a fresh simulator and
    return wrong results without an error.
    """

    def __init__(self, suite: SuiteConfig, *, num_actors: int, envs_per_actor: int, timeout_s: float) -> None:
        self._ray = _start_ray(num_actors)
        self._timeout_s, self._per_actor = timeout_s, envs_per_actor
        self._label = f"{suite.name} {suite.task}"
        host = self._ray.remote(num_cpus=0, max_restarts=0, max_task_retries=0)(_SimulatorHost)
        self._actors = [host.remote(suite, envs_per_actor) for _ in range(num_actors)]
        try:
            specs = self._gather([actor.spec.remote() for actor in self._actors], "starting")
        except BaseException:
            self.close()
            raise
        self.group_size = int(specs[0].pop("group_size"))
        self.spec = EnvSpec.from_dict(specs[0])
        self.num_slots = num_actors * envs_per_actor

    def advance(self, todo: Round) -> tuple[Observation | None, ChunkResult | None]:
        calls, restart_rows, chunk_rows = [], [], []
        for index, actor in enumerate(self._actors):
            restart = np.flatnonzero(todo.restart_slots // self._per_actor == index)
            chunk = np.flatnonzero(todo.chunk_slots // self._per_actor == index)
            if not len(restart) and not len(chunk):
                continue
            base = index * self._per_actor
            request = {
                "restart_slots": todo.restart_slots[restart] - base,
                "restart_states": todo.restart_states[restart],
                "chunk_slots": todo.chunk_slots[chunk] - base,
                "chunk_actions": todo.chunk_actions[chunk],
            }
            calls.append(actor.advance.remote(request))
            restart_rows.append(restart)
            chunk_rows.append(chunk)
        first_parts, first_order, result_parts, result_order = [], [], [], []
        for reply, restart, chunk in zip(self._gather(calls, "running a chunk"), restart_rows, chunk_rows, strict=True):
            if len(restart):
                first_parts.append(_unpack_observation(reply, "restart/"))
                first_order.append(restart)
            if len(chunk):
                result_parts.append(_unpack_result(reply, "chunk/"))
                result_order.append(chunk)
        first = result = None
        if first_parts:
            first = Observation.concatenate(first_parts).take(np.argsort(np.concatenate(first_order)))
        if result_parts:
            result = ChunkResult.concatenate(result_parts).take(np.argsort(np.concatenate(result_order)))
        return first, result

    def demonstrate(self, states: Sequence[int], seeds: Sequence[int]) -> list[Demonstration]:
        calls = [
            self._actors[i % len(self._actors)].demonstrate.remote(state, seed)
            for i, (state, seed) in enumerate(zip(states, seeds, strict=True))
        ]
        return [_unpack_demonstration(reply) for reply in self._gather(calls, "demonstrating")]

    def film(self, slot: int) -> np.ndarray | None:
        actor = self._actors[slot // self._per_actor]
        frame: np.ndarray | None = self._gather([actor.film.remote(slot % self._per_actor)], "filming")[0]
        return frame

    def close(self) -> None:
        for actor in self._actors:
            with suppress(Exception):
                self._ray.kill(actor)
        self._actors = []
        self._ray.shutdown()

    def _gather(self, calls: list[Any], doing: str) -> list[Any]:
        """Replies in order, or one error that names the actor and what it was doing."""
        exceptions = self._ray.exceptions
        replies = []
        for index, call in enumerate(calls):
            try:
                replies.append(self._ray.get(call, timeout=self._timeout_s))
            except exceptions.RayTaskError as error:
                cause = error.cause if isinstance(error.cause, Exception) else error
                raise cause from None
            except exceptions.GetTimeoutError as error:
                raise RuntimeError(
                    f"simulator actor {index} ({self._label}) did not answer within {self._timeout_s:g} s while "
                    f"{doing}. If the machine is slow, raise workers.timeout_s; it has {os.cpu_count()} cores "
                    f"for {len(self._actors)} actors."
                ) from error
            except exceptions.RayActorError as error:
                text = str(error)
                # A constructor that failed: Ray wraps the simulator's own words, which have the cure.
                cause = getattr(error, "cause", None) or error.__cause__
                raise RuntimeError(
                    f"simulator actor {index} ({self._label}) died while {doing}: {cause or text.splitlines()[-1]}"
                ) from error
        return replies


class _SimulatorHost:
    """The inside of a Ray actor: one `VecEnv`, spoken to in dictionaries of arrays."""

    def __init__(self, suite: SuiteConfig, num_envs: int) -> None:
        import torch

        # One simulator a core: more threads in each only fight.
        torch.set_num_threads(1)
        self._suite, self._num_envs = suite, num_envs
        self._env: VecEnv | None = None

    def spec(self) -> dict[str, Any]:
        """Builds the simulators: here and not in the constructor, so that an error arrives as itself."""
        self._env = make_env(self._suite, self._num_envs)
        return self._env.spec.to_dict() | {"group_size": _group_size(self._env)}

    def advance(self, request: Arrays) -> Arrays:
        env = self._ready()
        reply: Arrays = {}
        if len(request["restart_slots"]):
            first = env.reset(request["restart_slots"].tolist(), request["restart_states"].tolist())
            reply |= _pack_observation(first, "restart/")
        if len(request["chunk_slots"]):
            result = env.step_chunk(request["chunk_slots"].tolist(), request["chunk_actions"])
            reply |= _pack_observation(result.observation, "chunk/")
            reply |= {f"chunk/{name}": getattr(result, name) for name in RESULT_FIELDS}
            reply |= {f"chunk/metrics/{name}": values for name, values in result.metrics.items()}
        return reply

    def demonstrate(self, state: int, seed: int) -> Arrays:
        demonstration = _require_expert(self._ready()).demonstrate(state, seed)
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


RESULT_FIELDS = ("reward", "terminated", "truncated", "success", "executed_steps")


def _pack_observation(observation: Observation, prefix: str) -> Arrays:
    arrays = {f"{prefix}images/{name}": image for name, image in observation.images.items()}
    arrays[f"{prefix}instruction"] = np.array(observation.instruction)
    if observation.state is not None:
        arrays[f"{prefix}state"] = observation.state
    return arrays


def _unpack_observation(arrays: Arrays, prefix: str) -> Observation:
    images = f"{prefix}images/"
    return Observation(
        images={key.removeprefix(images): value for key, value in arrays.items() if key.startswith(images)},
        instruction=[str(text) for text in arrays[f"{prefix}instruction"]],
        state=arrays.get(f"{prefix}state"),
    )


def _unpack_result(arrays: Arrays, prefix: str) -> ChunkResult:
    reward, terminated, truncated, success, executed = (arrays[f"{prefix}{name}"] for name in RESULT_FIELDS)
    metrics = f"{prefix}metrics/"
    return ChunkResult(
        observation=_unpack_observation(arrays, prefix),
        reward=reward,
        terminated=terminated,
        truncated=truncated,
        success=success,
        executed_steps=executed,
        metrics={key.removeprefix(metrics): value for key, value in arrays.items() if key.startswith(metrics)},
    )


def _unpack_demonstration(arrays: Arrays) -> Demonstration:
    prefix = "images/"
    return Demonstration(
        images={k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)},
        state=arrays.get("state"),
        action=arrays["action"],
        instruction=str(arrays["instruction"]),
        success=bool(arrays["success"]),
    )


def _group_size(env: VecEnv) -> int:
    return env.group_size if isinstance(env, Grouped) else 1


def _require_expert(env: VecEnv) -> Demonstrator:
    if not isinstance(env, Demonstrator):
        raise ValueError(f"suite {env.spec.suite} has no scripted expert. Bring your own demonstrations.")
    return env


class _Echo:
    """The smallest actor, for `check_ray`."""

    def answer(self, word: str) -> str:
        return word


def check_ray(timeout_s: float) -> dict[str, Any]:
    """Start Ray as a run does, ask an actor, stop it. For `rlvla doctor`, in a process of its own.

    Returns:
        ``version`` of Ray, ``token`` (the path of its token file).

    Raises:
        RuntimeError: Ray or the actor did not start or answer.
    """
    ray = _start_ray(1)
    try:
        actor = ray.remote(num_cpus=0, max_restarts=0, max_task_retries=0)(_Echo).remote()
        if ray.get(actor.answer.remote("well"), timeout=timeout_s) != "well":
            raise RuntimeError("an actor of Ray gave a wrong answer.")
        return {"version": ray.__version__, "token": os.environ["RAY_AUTH_TOKEN_PATH"]}
    finally:
        ray.shutdown()


def _start_ray(num_actors: int) -> Any:
    """An embedded Ray for this run alone, authenticated with our own token."""
    # Read when Ray starts: no idle workers, and a token that only we can read.
    os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
    # Ray starts workers at low priority, and any other load on the machine would starve the simulators.
    os.environ.setdefault("RAY_worker_niceness", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_AUTH_TOKEN_PATH", str(_token_file()))
    import ray

    if not ray.is_initialized():
        ray.init(
            num_cpus=max(num_actors, os.cpu_count() or 1),
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            object_store_memory=OBJECT_STORE_BYTES,
        )
    return cast(Any, ray)


def _token_file() -> Path:
    """Ray's own token file is readable by everybody on the machine; this one is not."""
    import secrets

    folder = Path(os.environ.get("XDG_STATE_HOME", Path.home() / ".local" / "state")) / "rlvla"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = folder / "ray_token"
    if not path.exists():
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_hex(32))
    return path
