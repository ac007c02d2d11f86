"""Kill, crash and hang a simulator in the middle of a rollout: how long until its chunk is there, and is it the same.

    .venv/bin/python scripts/bench_recovery.py
    .venv/bin/python scripts/bench_recovery.py --no-spare

PushCube in two Ray actors of two environments. The last line on stdout is JSON: seconds from noticing to the result of
the pending chunk, beyond the deadline where a hang has to be noticed first; and what the spare costs: seconds of the
first rollout, beside which it is built, and of one beside which nothing is. Linux only.
"""

import argparse
import hashlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable

import numpy as np
from measure_memory import pss_kb

from rlvla.compose import compose
from rlvla.config import ClusterConfig, WorkersConfig
from rlvla.hosts import SimulatorHost
from rlvla.ray_envs import RayEnvs
from rlvla.rollout import play
from rlvla.run import versions
from rlvla.seeding import training_state
from rlvla_envs.base import Observation

SPARE_S = 300.0


class Host(SimulatorHost):
    """A simulator process that says which one it is."""

    def pid(self) -> int:
        return os.getpid()


class Envs(RayEnvs):
    host_class = Host

    def pid(self, worker: int) -> int:
        return int(self._ray.get(self._actors[worker].pid.remote()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", default="push_cube")
    parser.add_argument("--timeout-s", type=float, default=10.0, help="deadline of a call")
    parser.add_argument("--turn", type=int, default=4, help="round of the rollout in which it happens")
    parser.add_argument("--spare", action=argparse.BooleanOptionalAction, default=True)
    arguments = parser.parse_args()
    suite = compose("train", ["policy=x", f"suite={arguments.suite}"]).suite
    workers = WorkersConfig(num_actors=2, envs_per_actor=2, timeout_s=arguments.timeout_s)
    began = time.monotonic()
    envs = Envs(suite, workers, ClusterConfig(), 2, spare=arguments.spare)
    found: dict[str, object] = {"cpu": versions()["cpu"], "suite": arguments.suite, "spare": arguments.spare}
    found["start_s"] = round(time.monotonic() - began, 2)
    try:
        began = time.monotonic()
        expected = rollout(envs, lambda turn: None)
        found["first_rollout_s"] = round(time.monotonic() - began, 2)
        if arguments.spare:
            assert envs.wait_for_spare(SPARE_S)
            found["spare_built_s"] = round(time.monotonic() - began, 2)
        began = time.monotonic()
        assert expected == rollout(envs, lambda turn: None)
        found["later_rollout_s"] = round(time.monotonic() - began, 2)
        found["process_mb"] = pss_kb(envs.pid(0)) // 1024
        for what in (signal.SIGKILL, signal.SIGSEGV, signal.SIGSTOP):

            def disturb(turn: int, what: signal.Signals = what) -> None:
                if turn == arguments.turn:
                    os.kill(envs.pid(1), what)
                    # A dying process may still answer one call.
                    time.sleep(0.5)

            same = expected == rollout(envs, disturb)
            (incident,) = envs.take_incidents()
            print(f"{what.name}: {incident}", file=sys.stderr)
            found[what.name] = {
                "recovery_s": round(incident.recovery_s, 2),
                "replayed_chunks": incident.replayed_chunks,
                "same_rollout": same,
            }
            if arguments.spare:
                assert envs.wait_for_spare(SPARE_S)
    finally:
        envs.close()
    print(json.dumps(found))


def rollout(envs: RayEnvs, disturb: Callable[[int], None]) -> str:
    """A digest of all that eight episodes of small random actions showed."""
    seen: dict[tuple[int, int], bytes] = {}

    def decide(observation: Observation, episode: np.ndarray, decision: np.ndarray) -> np.ndarray:
        actions = []
        for row, key in enumerate(zip(episode.tolist(), decision.tolist(), strict=True)):
            one = observation.row(row)
            assert one.state is not None
            seen[key] = b"".join(image.tobytes() for image in one.images.values()) + one.state.tobytes()
            shape = (envs.spec.chunk_size, envs.spec.action_size)
            actions.append(np.random.default_rng(key).uniform(-0.5, 0.5, shape).astype(np.float32))
        return np.stack(actions)

    for turn, _ in enumerate(play(envs, [training_state(0, 9, i) for i in range(8)], decide)):
        disturb(turn)
    return hashlib.sha256(b"".join(seen[key] for key in sorted(seen))).hexdigest()


if __name__ == "__main__":
    main()
