"""A Ray cluster of two nodes on this machine: joining it, being refused, losing a node."""

import os
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlvla.cluster import own_token
from rlvla.compose import compose
from rlvla.config import ClusterConfig, ConfigError, WorkersConfig
from rlvla.hosts import SimulatorHost
from rlvla.ray_envs import RayEnvs
from rlvla.rollout import play
from rlvla.workers import Envs, open_envs

# Ray reads its way of authentication once a process, so a cluster lives in one of its own.
CLUSTER = """
import sys
from ray.cluster_utils import Cluster
options = {"num_cpus": 1, "object_store_memory": 128 * 2**20}
cluster = Cluster(initialize_head=True, head_node_args=options | {"include_dashboard": False})
nodes = {node.node_id: node for node in [cluster.add_node(**options) for _ in range(int(sys.argv[1]))]}
cluster.wait_for_nodes()
print("ready", cluster.address, *nodes, flush=True)
for line in sys.stdin:
    cluster.remove_node(nodes[line.strip()], allow_graceful=False)
    print("gone", flush=True)
cluster.shutdown()
"""


class RunningCluster:
    """A head and some more nodes of one CPU each."""

    def __init__(self, more_nodes: int, *, authenticated: bool = True) -> None:
        mode = "token" if authenticated else "disabled"
        self._process = subprocess.Popen(
            [sys.executable, "-c", CLUSTER, str(more_nodes)],
            env=os.environ | {"RAY_AUTH_MODE": mode, "RAY_AUTH_TOKEN_PATH": str(own_token())},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
        self.address, *self.nodes = self._read("ready")

    def kill(self, node: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{node}\n")
        self._process.stdin.flush()
        self._read("gone")

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)

    def _read(self, word: str) -> list[str]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(word):
                return line.split()[1:]
        raise AssertionError(f"the cluster ended before it was {word}")


Start = Callable[..., RunningCluster]


@pytest.fixture
def start() -> Iterator[Start]:
    running: list[RunningCluster] = []

    def make(more_nodes: int = 0, **settings: Any) -> RunningCluster:
        running.append(RunningCluster(more_nodes, **settings))
        return running[-1]

    yield make
    for cluster in running:
        cluster.close()


class NamedHost(SimulatorHost):
    """Says on which node it is, and its process."""

    def ready(self) -> str:
        import ray

        return f"{ray.get_runtime_context().get_node_id()} {os.getpid()}"


class NamedEnvs(RayEnvs):
    host_class = NamedHost


def outcomes(envs: Envs, disturb: Callable[[int], None] = lambda _: None) -> dict[tuple[int, int], Any]:
    """What was seen at each decision of some episodes."""
    seen: dict[tuple[int, int], Any] = {}

    def decide(observation: Any, episode: np.ndarray, decision: np.ndarray) -> np.ndarray:
        for row, key in enumerate(zip(episode.tolist(), decision.tolist(), strict=True)):
            seen[key] = observation.row(row).state.tobytes()
        shape = (len(episode), envs.spec.chunk_size, envs.spec.action_size)
        rngs = [np.random.default_rng([int(e), int(t)]) for e, t in zip(episode, decision, strict=True)]
        return np.stack([rng.uniform(-1, 1, shape[1:]) for rng in rngs]).astype(np.float32)

    for number, _ in enumerate(play(envs, list(range(100, 108)), decide)):
        disturb(number)
    return seen


def test_a_node_that_dies_costs_no_episode(start: Start) -> None:
    suite = compose("train", ["policy=x", "suite=toy"]).suite
    local = open_envs(suite, compose("train", ["policy=x", "suite=toy", "workers.kind=local"]).workers)
    undisturbed = outcomes(local)
    local.close()

    cluster = start(more_nodes=2)
    workers = WorkersConfig(num_actors=2, envs_per_actor=2, timeout_s=60)
    envs = NamedEnvs(suite, workers, ClusterConfig(address=cluster.address), 2)
    # Three nodes of one CPU each hold two actors: one of them is on a node that can be lost, and one has room.
    said = envs._ray.get([actor.ready.remote() for actor in envs._actors])
    places = {node: int(pid) for node, pid in map(str.split, said)}
    victim = next(node for node in cluster.nodes if node in places)

    def disturb(turn: int) -> None:
        if turn == 1:
            cluster.kill(victim)
            # The toy's episodes are over before a worker notices that its node is gone.
            until = time.monotonic() + 60
            while Path(f"/proc/{places[victim]}").exists() and time.monotonic() < until:
                time.sleep(0.1)

    try:
        assert len(places) == 2
        disturbed = outcomes(envs, disturb)
        incidents = envs.take_incidents()
    finally:
        envs.close()
    assert disturbed == undisturbed
    assert incidents
    assert not any(incident.lost_episodes for incident in incidents)


def test_a_cluster_that_lets_in_strangers_is_refused_unless_asked_for(start: Start) -> None:
    cluster = start(authenticated=False)
    suite = compose("train", ["policy=x", "suite=toy"]).suite
    workers = WorkersConfig(num_actors=1, envs_per_actor=1)
    with pytest.raises(ConfigError, match=r"lets in whoever asks.*cluster\.allow_unauthenticated=true"):
        open_envs(suite, workers, ClusterConfig(address=cluster.address))
    # In a process of its own, for the same reason as the cluster.
    program = (
        "import sys; from rlvla.workers import *; from rlvla.compose import compose; "
        "config = compose('train', ['policy=x', 'suite=toy', 'workers.num_actors=1', 'workers.envs_per_actor=1', "
        "f'cluster.address={sys.argv[1]}', 'cluster.allow_unauthenticated=true']); "
        "envs = open_envs(config.suite, config.workers, config.cluster); print(envs.num_slots); envs.close()"
    )
    joined = subprocess.run(
        [sys.executable, "-c", program, cluster.address], capture_output=True, text=True, timeout=200
    )
    assert joined.stdout.strip() == "1", joined.stderr[-2000:]


def test_more_actors_than_the_cluster_has_room_for_are_refused_at_once(start: Start) -> None:
    cluster = start()
    suite = compose("train", ["policy=x", "suite=toy"]).suite
    with pytest.raises(RuntimeError, match=r"3 simulator actors need a CPU each and the cluster has 1"):
        open_envs(suite, WorkersConfig(num_actors=3), ClusterConfig(address=cluster.address))


def test_an_address_where_nothing_listens_says_so() -> None:
    suite = compose("train", ["policy=x", "suite=toy"]).suite
    with pytest.raises(ConfigError, match=r"nothing answers at cluster\.address=127\.0\.0\.1:1"):
        open_envs(suite, WorkersConfig(num_actors=1), ClusterConfig(address="127.0.0.1:1"))


def test_a_token_that_others_can_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    suite = compose("train", ["policy=x", "suite=toy"]).suite
    token = tmp_path / "token"
    token.write_text("0" * 64)
    token.chmod(0o644)
    with pytest.raises(ConfigError, match=r"mode 0644: others .* chmod 600"):
        open_envs(suite, WorkersConfig(num_actors=1), ClusterConfig(address="x:1", token_file=str(token)))
    with pytest.raises(ConfigError, match="is no file"):
        open_envs(suite, WorkersConfig(num_actors=1), ClusterConfig(address="x:1", token_file=str(tmp_path / "none")))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    made = own_token()
    assert stat.S_IMODE(made.stat().st_mode) == 0o600
    assert len(made.read_text()) == 64
    assert own_token().read_text() == made.read_text()
    assert os.stat(made.parent).st_mode & 0o077 == 0
