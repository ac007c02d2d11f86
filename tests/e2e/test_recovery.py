"""Simulators die, crash and hang, and the rollout has the bits it would have had."""

import dataclasses
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlvla import collect, evaluate, sft
from rlvla.acting import Actor
from rlvla.compose import compose
from rlvla.config import AlgoConfig, ClusterConfig, WorkersConfig
from rlvla.hosts import SimulatorHost
from rlvla.policies.base import ValueHead
from rlvla.policies.folder import load_policy
from rlvla.ray_envs import RayEnvs
from rlvla.rollout import collect as collect_rollout
from rlvla.rollout import play
from rlvla.samplers import training_sampler
from rlvla.seeding import seed_torch, training_state
from rlvla.workers import Envs, open_envs
from rlvla_envs.base import SuiteConfig

WORKERS = WorkersConfig(num_actors=2, envs_per_actor=2, timeout_s=8)
PUSH = ["suite=push_cube", "suite.max_episode_steps=24"]


def fragile(fault: Callable[[int, int], None]) -> type[RayEnvs]:
    """Simulators in which ``fault(state, decision)`` happens before each chunk of an episode."""

    class FragileHost(SimulatorHost):
        episodes: dict[int, list[int]] = {}  # noqa: RUF012  (one process has one host)

        def advance(self, request: Any) -> Any:
            for slot in request["chunk_slots"].tolist():
                self._hurt(slot)
            reply = super().advance(request)
            for slot, state in zip(request["restart_slots"].tolist(), request["restart_states"].tolist(), strict=True):
                self.episodes[slot] = [state, 0]
            return reply

        def replay(self, slot: int, state: int, chunks: Any) -> Any:
            self.episodes[slot] = [state, 0]
            for _ in chunks:
                self._hurt(slot)
            return super().replay(slot, state, chunks)

        def _hurt(self, slot: int) -> None:
            fault(*self.episodes[slot])
            self.episodes[slot][1] += 1

    class FragileEnvs(RayEnvs):
        host_class = FragileHost

    return FragileEnvs


def once(marker: Path, state: int, decision: int, what: int) -> Callable[[int, int], None]:
    """Send this process the signal ``what`` at one moment of one episode, the first time it comes there."""

    def fault(at_state: int, at_decision: int) -> None:
        if (at_state, at_decision) == (state, decision) and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), what)

    return fault


@pytest.fixture(scope="module")
def push_policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("push")
    local = ["workers.kind=local", "workers.num_actors=1"]
    collect.run(compose("collect", [PUSH[0], *local, f"output={root / 'data'}", "episodes=4"]))
    sft.run(compose("sft", [PUSH[0], f"dataset={root / 'data'}", f"output={root / 'sft'}", "steps=3", "batch_size=4"]))
    return root / "sft" / "policy"


STATES = [training_state(0, 9, i) for i in range(8)]


def rollout(policy_folder: Path, envs: Envs, num_groups: int = 1) -> Any:
    seed_torch(0)
    policy = load_policy(policy_folder)
    return collect_rollout(
        Actor(policy, block=4, device="cpu"),
        ValueHead(policy.value_size),
        envs,
        STATES,
        sampler=training_sampler(policy, AlgoConfig(noise_level=0.5)),
        key=(0, 0),
        store_context=True,
        num_groups=num_groups,
    )


def assert_equal_rollouts(one: Any, other: Any) -> None:
    keys = list(one.keys(include_nested=True, leaves_only=True))
    assert len(keys) > 10
    for key in keys:
        assert torch.equal(one[key], other[key]), f"{key} differs"


@pytest.fixture(scope="module")
def undisturbed(push_policy: Path) -> Any:
    envs = open_envs(compose("train", ["policy=x", *PUSH]).suite, WORKERS)
    try:
        return rollout(push_policy, envs)
    finally:
        envs.close()


def open_fragile(suite: SuiteConfig, fault: Callable[[int, int], None], **changes: Any) -> RayEnvs:
    workers = dataclasses.replace(WORKERS, **changes)
    return fragile(fault)(suite, workers, ClusterConfig(), workers.num_actors)


@pytest.mark.simulator
@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "said"),
    [
        pytest.param(signal.SIGKILL, "died while running a chunk", id="killed"),
        pytest.param(signal.SIGSEGV, "died while running a chunk", id="segfault"),
        pytest.param(signal.SIGSTOP, "did not answer within 8 s while running a chunk", id="hung"),
    ],
)
def test_a_rollout_whose_simulator_was_lost_has_the_bits_of_one_that_was_not(
    what: signal.Signals, said: str, push_policy: Path, undisturbed: Any, tmp_path: Path
) -> None:
    suite = compose("train", ["policy=x", *PUSH]).suite
    envs = open_fragile(suite, once(tmp_path / "marker", STATES[2], 1, what))
    try:
        disturbed = rollout(push_policy, envs)
        incidents = envs.take_incidents()
    finally:
        envs.close()
    assert_equal_rollouts(disturbed, undisturbed)
    assert [incident.lost_episodes for incident in incidents] == [0]
    # Two slots were at their second decision: a chunk that had run and the pending one, each.
    assert incidents[0].replayed_chunks == 4
    assert said in incidents[0].why
    print(f"{what.name}: {incidents[0]}")


@pytest.mark.simulator
@pytest.mark.slow
def test_two_groups_that_take_turns_give_the_rollout_of_one(push_policy: Path, undisturbed: Any) -> None:
    envs = open_envs(compose("train", ["policy=x", *PUSH]).suite, WORKERS)
    try:
        assert_equal_rollouts(rollout(push_policy, envs, num_groups=2), undisturbed)
    finally:
        envs.close()


# --- the toy dies faster


@pytest.fixture
def toy() -> SuiteConfig:
    return compose("train", ["policy=x", "suite=toy"]).suite


def still(envs: Envs) -> Any:
    return lambda observation, *_: np.zeros(
        (len(observation.instruction), envs.spec.chunk_size, envs.spec.action_size), np.float32
    )


def lost_and_ended(envs: Envs, states: list[int]) -> tuple[dict[int, bool], list[int]]:
    lost: dict[int, bool] = {}
    ended: list[int] = []
    for turn in play(envs, states, still(envs)):
        lost |= turn.lost
        if turn.result is not None:
            ended += turn.episode[turn.result.done].tolist()
    return lost, sorted(ended)


def test_an_episode_that_kills_its_simulator_every_time_is_left_out_and_named(toy: SuiteConfig) -> None:
    states = list(range(100, 108))

    def fault(state: int, decision: int) -> None:
        if state == 103 and decision == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    envs = open_fragile(toy, fault)
    try:
        lost, ended = lost_and_ended(envs, states)
        incidents = envs.take_incidents()
        # Asked for again it is not even begun.
        again, _ = lost_and_ended(envs, [103, 104])
        assert envs.take_incidents() == []
    finally:
        envs.close()
    assert lost == {3: True}
    assert ended == [0, 1, 2, 4, 5, 6, 7]
    assert [incident.lost_episodes for incident in incidents] == [1]
    assert again == {0: True}


def test_evaluation_counts_an_episode_that_kills_its_simulator_as_failed_and_says_so(
    toy: SuiteConfig, tmp_path: Path
) -> None:
    local = ["workers.kind=local", "workers.num_actors=1"]
    collect.run(compose("collect", ["suite=toy", *local, f"output={tmp_path / 'data'}", "episodes=4"]))
    small = ["suite=toy", "policy=qwen_vla_toy", "steps=3", "batch_size=4"]
    sft.run(compose("sft", [*small, f"dataset={tmp_path / 'data'}", f"output={tmp_path / 'sft'}"]))
    policy = load_policy(tmp_path / "sft" / "policy")

    def fault(state: int, decision: int) -> None:
        if state == 5:
            os.kill(os.getpid(), signal.SIGKILL)

    config = compose("eval", ["suite=toy", "policy=x", "eval.trials=8"]).eval
    envs = open_fragile(toy, fault)
    try:
        measured, _ = evaluate.evaluate(Actor(policy, block=4, device="cpu"), envs, config, name="x")
    finally:
        envs.close()
    assert measured.quarantined == [5]
    assert measured.trials == 8
    assert measured.outcomes[5] == 0


def test_simulators_that_keep_dying_end_the_run_with_advice(toy: SuiteConfig) -> None:
    def fault(state: int, decision: int) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    envs = open_fragile(toy, fault, max_restarts_per_hour=3, quarantine_after=9)
    try:
        with pytest.raises(RuntimeError, match=r"replaced 4 times within an hour.*max_restarts_per_hour is 3"):
            lost_and_ended(envs, list(range(100, 108)))
    finally:
        envs.close()


def test_where_episodes_cannot_be_replayed_they_are_lost_and_the_rest_goes_on(toy: SuiteConfig, tmp_path: Path) -> None:
    envs = open_fragile(toy, once(tmp_path / "marker", 102, 1, signal.SIGKILL))
    envs.spec = dataclasses.replace(envs.spec, deterministic=False)
    try:
        lost, ended = lost_and_ended(envs, list(range(100, 108)))
    finally:
        envs.close()
    # 102 and its neighbour in the same process; neither is to blame.
    assert lost == {2: False, 3: False}
    assert ended == [0, 1, 4, 5, 6, 7]


def test_one_that_is_killed_while_it_starts_is_started_again_and_one_that_always_dies_is_not(
    toy: SuiteConfig, tmp_path: Path
) -> None:
    def starting(deaths: int) -> type[RayEnvs]:
        class FragileStart(SimulatorHost):
            def spec(self) -> Any:
                marker = tmp_path / f"{deaths}-{len(list(tmp_path.glob(f'{deaths}-*')))}"
                if len(list(tmp_path.glob(f"{deaths}-*"))) < deaths:
                    marker.touch()
                    os.kill(os.getpid(), signal.SIGKILL)
                return super().spec()

        class FragileEnvs(RayEnvs):
            host_class = FragileStart

        return FragileEnvs

    workers = dataclasses.replace(WORKERS, num_actors=1)
    envs = starting(2)(toy, workers, ClusterConfig(), 1)
    try:
        assert lost_and_ended(envs, [100, 101]) == ({}, [0, 1])
    finally:
        envs.close()
    with pytest.raises(RuntimeError, match="died while starting: .*, 3 times in a row"):
        starting(3)(toy, workers, ClusterConfig(), 1)


def test_a_simulators_own_error_is_no_death(toy: SuiteConfig) -> None:
    def fault(state: int, decision: int) -> None:
        raise ValueError("the table has three legs")

    envs = open_fragile(toy, fault)
    try:
        with pytest.raises(ValueError, match="three legs"):
            lost_and_ended(envs, [100, 101])
        assert envs.take_incidents() == []
    finally:
        envs.close()


@pytest.fixture(scope="module", autouse=True)
def nothing_is_left_running() -> Iterator[None]:
    def actors() -> set[int]:
        found = set()
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with suppress(OSError):
                if path.read_text().startswith("ray::Fragile"):
                    found.add(int(path.parent.name))
        return found

    yield
    until = time.monotonic() + 20
    while actors() and time.monotonic() < until:
        time.sleep(0.2)
    assert not actors()
