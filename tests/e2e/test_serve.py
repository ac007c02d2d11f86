"""`rlvla serve` in a process of its own, and clients over the wire."""

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from websockets.exceptions import ConnectionClosedError, ConnectionClosedOK, InvalidHandshake
from websockets.sync.client import connect

from rlvla.acting import Actor
from rlvla.policies.folder import load_policy, save_policy
from rlvla.seeding import Stream, keyed_rng
from rlvla_envs.base import Observation, SuiteConfig
from rlvla_envs.suites import make_env
from tests.openpi_client import Client, packb

TOY = SuiteConfig(name="toy", image_size=32, max_episode_steps=24)
OPTIONS = ["cameras.top=observation/image", "temperature=0.6", "seed=3", "max_message_mb=0.25", "max_clients=3"]


class Server:
    """`rlvla serve` with options of a test, on a port of its choice."""

    def __init__(self, policy: Path, *options: str) -> None:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "rlvla.cli", "serve", str(policy), "port=0", "device=cpu", *options]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.process.communicate(timeout=60)[1]
        self.told: dict[str, Any] = json.loads(line)
        self.url: str = self.told["url"]

    def end(self, number: int) -> tuple[int, str, str]:
        """Status, and what it wrote after its first line, once it has ended."""
        self.process.send_signal(number)
        out, error = self.process.communicate(timeout=120)
        return self.process.returncode, out, error

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture(scope="module")
def policy(make_policy: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("serve") / "policy"
    save_policy(make_policy("qwen_vla_toy", make_env(TOY, 1).spec), folder)
    return folder


@pytest.fixture(scope="module")
def server(policy: Path) -> Iterator[Server]:
    started = Server(policy, *OPTIONS)
    yield started
    started.kill()


def sent(observation: Observation, **changes: Any) -> dict[str, Any]:
    """An observation [1] as openpi's clients for LIBERO send theirs."""
    assert observation.state is not None
    return {
        "observation/image": observation.images["top"][0],
        "observation/state": observation.state[0].astype(np.float64),
        "prompt": observation.instruction[0],
        **changes,
    }


def decided(policy: Path, observation: Observation, stream: Stream, *key: int) -> np.ndarray:
    """What an actor in this process does."""
    actor = Actor(load_policy(policy), block=1, device="cpu")
    chosen = actor.decide(observation, [keyed_rng(3, stream, *key)], temperature=0.6).decision.action
    return np.clip(chosen[0], -1, 1)


def episode(client: Any, policy: Path, state: int, key: Callable[[int], dict[str, Any]]) -> list[np.ndarray]:
    """The chunks of an episode of the toy that the client drives."""
    env = make_env(TOY, 1)
    observation, chunks = env.reset([0], [state]), []
    while True:
        reply = client.infer(sent(observation, **key(len(chunks))))
        chunks.append(reply["actions"])
        result = env.step_chunk([0], reply["actions"][None])
        if result.done[0]:
            return chunks
        observation = result.observation


def expected(policy: Path, state: int, stream: Stream, *episode_key: int) -> list[np.ndarray]:
    """The same episode without a wire."""
    env = make_env(TOY, 1)
    observation, chunks = env.reset([0], [state]), []
    while True:
        chunks.append(decided(policy, observation, stream, *episode_key, len(chunks)))
        result = env.step_chunk([0], chunks[-1][None])
        if result.done[0]:
            return chunks
        observation = result.observation


def assert_same(one: list[np.ndarray], other: list[np.ndarray]) -> None:
    assert len(one) == len(other) > 1
    for a, b in zip(one, other, strict=True):
        assert a.dtype == b.dtype == np.float32
        assert a.tobytes() == b.tobytes()


def first_observation() -> Observation:
    return make_env(TOY, 1).reset([0], [11])


@pytest.mark.slow
def test_an_episode_over_the_wire_has_the_bits_of_one_without(server: Server, policy: Path) -> None:
    with Client(server.url) as client:
        assert client.metadata["action_horizon"] == 8
        assert client.metadata["observation"]["observation/image"] == "uint8 [32, 32, 3]"
        chunks = episode(client, policy, 4, lambda t: {"rlvla/noise_key": [4, t]})
    assert_same(chunks, expected(policy, 4, Stream.EVALUATION, 4))


@pytest.mark.slow
def test_openpis_own_client_plays_an_episode_and_reads_an_error(server: Server, policy: Path) -> None:
    own = pytest.importorskip(
        "openpi_client.websocket_client_policy", reason="pip install --no-deps openpi-client==0.1.2"
    )
    client = own.WebsocketClientPolicy(server.url)
    try:
        assert client.get_server_metadata()["action_names"] == ["translation.0", "translation.1"]
        with pytest.raises(RuntimeError, match="lacks observation/image"):
            client.infer({"prompt": "go"})
        chunks = episode(client, policy, 9, lambda t: {"rlvla/noise_key": np.array([9, t])})
    finally:
        client._ws.close()
    assert_same(chunks, expected(policy, 9, Stream.EVALUATION, 9))


@pytest.mark.slow
def test_clients_at_the_same_time_have_their_own_episodes(server: Server, policy: Path) -> None:
    with Client(server.url) as one, Client(server.url) as other, ThreadPoolExecutor(2) as pool:
        plays = [
            pool.submit(episode, client, policy, state, lambda t, state=state: {"rlvla/noise_key": [state, t]})
            for client, state in ((one, 5), (other, 6))
        ]
        for play, state in zip(plays, (5, 6), strict=True):
            assert_same(play.result(), expected(policy, state, Stream.EVALUATION, state))


@pytest.mark.slow
def test_what_does_not_fit_is_explained_and_the_connection_goes_on(server: Server, policy: Path) -> None:
    observation = first_observation()
    good = sent(observation, **{"rlvla/noise_key": [0, 0]})
    wrong: list[tuple[bytes | str, str]] = [
        (b"\xc1\x00garbage", "not a msgpack message"),
        (packb(good)[:-5], "not a msgpack message"),
        ("infer", "text frame"),
        (packb([1, 2]), "must be a map"),
        (packb({"prompt": "go"}), "lacks observation/image, observation/state"),
        (packb({**good, "wrist": good["observation/image"]}), "it has wrist"),
        (packb({**good, "observation/image": np.zeros((64, 64, 3), np.uint8)}), "resize=true"),
        (packb({**good, "observation/state": np.zeros(4)}), "5 finite numbers"),
        (packb(good).replace(b"\xa3|u1", b"\xa3|O8"), "objects"),
    ]
    with Client(server.url) as client:
        for frame, said in wrong:
            with pytest.raises(RuntimeError, match=said) as caught:
                client.exchange(frame)
            assert "Traceback" not in str(caught.value)
            assert "File " not in str(caught.value)
        actions = client.infer(good)["actions"]
    assert actions.tobytes() == decided(policy, observation, Stream.EVALUATION, 0, 0).tobytes()


@pytest.mark.slow
def test_a_client_of_starvla_is_answered_in_its_own_form(server: Server, policy: Path) -> None:
    rows = [make_env(TOY, 1).reset([0], [state]) for state in (7, 8)]
    examples = [
        {"image": [row.images["top"][0]], "lang": row.instruction[0], "state": row.state, "rlvla/noise_key": [i, 0]}
        for i, row in enumerate(rows)
    ]
    with Client(server.url) as client:
        assert client.metadata["action_chunk_size"] == 8
        assert client.metadata["available_unnorm_keys"] == ["toy"]
        assert client.infer({"type": "ping", "request_id": "p"})["ok"] is True
        bad = client.infer({"type": "infer", "request_id": "a", "payload": {"examples": [{"lang": "go"}]}})
        assert (bad["status"], bad["ok"], bad["request_id"]) == ("error", False, "a")
        assert "lacks image, state" in bad["error"]["message"]
        reply = client.infer(
            {"type": "infer", "request_id": "b", "payload": {"examples": examples, "do_sample": False}}
        )
        flat = client.infer({"examples": examples[:1], "unnorm_key": "toy", "use_ddim": True, "num_ddim_steps": 10})
    assert (reply["status"], reply["ok"], reply["request_id"]) == ("ok", True, "b")
    assert reply["data"]["actions"].shape == (2, 8, 2)
    for i, row in enumerate(rows):
        wanted = decided(policy, row, Stream.EVALUATION, i, 0)
        assert reply["data"]["actions"][i].tobytes() == wanted.tobytes()
    assert flat["data"]["actions"][0].tobytes() == reply["data"]["actions"][0].tobytes()


@pytest.mark.slow
def test_a_message_that_is_too_long_ends_its_own_connection_only(server: Server) -> None:
    good = sent(first_observation())
    with Client(server.url) as other:
        with Client(server.url) as client, pytest.raises(ConnectionClosedError) as closed:
            client.infer({**good, "observation/image": np.zeros((300, 300, 3), np.uint8)})
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 1009
        assert other.infer(good)["actions"].shape == (8, 2)


@pytest.mark.slow
def test_one_client_too_many_is_turned_away(server: Server) -> None:
    with Client(server.url), Client(server.url), Client(server.url) as last:
        with pytest.raises(ConnectionClosedError) as closed:
            Client(server.url)
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 1013
        assert last.infer(sent(first_observation()))["actions"].shape == (8, 2)


@pytest.mark.slow
def test_a_page_in_a_browser_is_not_let_in(server: Server) -> None:
    with pytest.raises(InvalidHandshake):
        connect(server.url, origin="https://example.org")


@pytest.mark.slow
def test_health_is_asked_over_http(server: Server) -> None:
    with urllib.request.urlopen(server.url.replace("ws://", "http://") + "/healthz", timeout=60) as reply:
        assert (reply.status, reply.read()) == (200, b"OK\n")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "status", "said"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_ctrl_c_and_sigterm_say_goodbye_to_clients(policy: Path, number: int, status: int, said: str) -> None:
    server = Server(policy, *OPTIONS)
    try:
        with Client(server.url) as client:
            # Two connections' first decisions differ: noise is numbered by connection where a client names none.
            observation = first_observation()
            first = client.infer(sent(observation))["actions"]
            assert first.tobytes() == decided(policy, observation, Stream.SERVED, 0, 0).tobytes()
            with Client(server.url) as second:
                found = second.infer(sent(observation))["actions"]
            assert found.tobytes() == decided(policy, observation, Stream.SERVED, 1, 0).tobytes()
            ended, out, error = server.end(number)
            with pytest.raises(ConnectionClosedOK) as closed:
                client.infer(sent(observation))
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 1001
    finally:
        server.kill()
    assert ended == status, error
    assert out == ""
    assert error.splitlines()[-1] == f"rlvla: {said}."
    assert "Traceback" not in error
    assert "client 0 left after 1 decisions" in error
    # The port is free again at once.
    host, port = server.url.removeprefix("ws://").split(":")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((host, int(port)))


def refused(policy: Path, *options: str) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "rlvla.cli", "serve", str(policy), *options]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    return done.stderr


@pytest.mark.slow
def test_a_port_that_is_taken_is_named_with_the_cure(policy: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = refused(policy, f"port={port}")
    assert f"port is {port}" in said
    assert "port=0" in said
