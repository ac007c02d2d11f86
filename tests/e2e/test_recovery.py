"""Simulators die, crash and hang, and the rollout has the bits it would have had."""

import dataclasses
import gc
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlvla import collect, evaluate, ray_envs, sft
from rlvla.acting import Actor
from rlvla.cluster import connect, disconnect
from rlvla.compose import compose
from rlvla.config import AlgoConfig, ClusterConfig, WorkerKind, WorkersConfig
from rlvla.hosts import SimulatorHost
from rlvla.policies.base import ValueHead
from rlvla.policies.folder import load_policy
from rlvla.ray_envs import RayEnvs
from rlvla.rollout import collect as collect_rollout
from rlvla.rollout import play
from rlvla.rounds import recall
from rlvla.samplers import training_sampler
from rlvla.seeding import seed_torch, training_state
from rlvla.sheets import Sheet
from rlvla.workers import Envs, open_envs, wants_spare
from rlvla_envs.base import SuiteConfig

WORKERS = WorkersConfig(num_actors=2, envs_per_actor=2, timeout_s=8)
PUSH = ["suite=push_cube", "suite.max_episode_steps=24"]
SPARE_S = 300.0


def fragile(fault: Callable[[int, int], None]) -> type[RayEnvs]:
    """Simulators in which ``fault(state, decision)`` happens before each chunk of an episode."""

    class FragileHost(SimulatorHost):
        episodes: dict[int, list[int]] = {}  # noqa: RUF012  (one process has one host)

        def advance(self, request: Any, pictures: Any = None) -> Any:
            for slot in request["chunk_slots"].tolist():
                self._hurt(slot)
            reply = super().advance(request, pictures)
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


Moment = tuple[int, int]
"""(initial state of an episode, decision)."""


def once(marker: Path, signals: Mapping[Moment, int]) -> Callable[[int, int], None]:
    """Send this process a signal at some moments, each the first time that it comes there."""

    def fault(state: int, decision: int) -> None:
        sent = marker.with_name(f"{marker.name}-{state}-{decision}")
        if (state, decision) in signals and not sent.exists():
            sent.touch()
            os.kill(os.getpid(), signals[state, decision])

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
    # Which round a decision was taken in may differ, what it was made from may not.
    for a, b in ((r.exclude("row") for r in (one, other)), (recall(r[r["valid"]]) for r in (one, other))):
        keys = list(a.keys(include_nested=True, leaves_only=True))
        assert len(keys) > 10
        for key in keys:
            assert torch.equal(a[key], b[key]), f"{key} differs"


@pytest.fixture(scope="module")
def sound(push_policy: Path) -> Iterator[RayEnvs]:
    """Simulators that nothing happens to."""
    envs = open_envs(compose("train", ["policy=x", *PUSH]).suite, dataclasses.replace(WORKERS, spare=False))
    assert isinstance(envs, RayEnvs)
    yield envs
    envs.close()


@pytest.fixture(scope="module")
def undisturbed(push_policy: Path, sound: RayEnvs) -> Any:
    return rollout(push_policy, sound)


def open_fragile(
    suite: SuiteConfig, fault: Callable[[int, int], None], *, spare: bool = False, **changes: Any
) -> RayEnvs:
    workers = dataclasses.replace(WORKERS, **changes)
    envs = fragile(fault)(suite, workers, ClusterConfig(), workers.num_actors, spare=spare)
    assert envs.wait_for_spare(SPARE_S) == spare
    return envs


@dataclasses.dataclass(frozen=True)
class Fault:
    """What happens to the simulator of one episode, and what comes of it."""

    moment: Moment
    signal: signal.Signals
    said: str
    replayed_chunks: int
    """Two slots, each with the chunks it had run and the pending one."""


DIED = "died while running a chunk"
KILLED = Fault((STATES[2], 1), signal.SIGKILL, DIED, 4)
SEGFAULT = Fault((STATES[0], 2), signal.SIGSEGV, DIED, 6)
HUNG = Fault((STATES[6], 1), signal.SIGSTOP, "did not answer within 20 s while running a chunk", 4)


@pytest.mark.simulator
@pytest.mark.slow
@pytest.mark.parametrize(
    ("faults", "spare"),
    [
        pytest.param([KILLED], False, id="killed-no-spare"),
        pytest.param([KILLED, SEGFAULT, HUNG], True, id="killed-segfault-hung"),
    ],
)
def test_a_rollout_whose_simulators_were_lost_has_the_bits_of_one_that_lost_none(
    faults: list[Fault],
    spare: bool,
    push_policy: Path,
    undisturbed: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    suite = compose("train", ["policy=x", *PUSH]).suite
    # Long enough that a busy machine is not mistaken for a hang.
    limit = 20.0 if HUNG in faults else 120.0
    signals = once(tmp_path / "marker", {fault.moment: fault.signal for fault in faults})
    envs = open_fragile(suite, signals, spare=spare, timeout_s=limit)
    try:
        disturbed = rollout(push_policy, envs)
        incidents = envs.take_incidents()
    finally:
        envs.close()
    assert_equal_rollouts(disturbed, undisturbed)
    assert [incident.lost_episodes for incident in incidents] == [0] * len(faults)
    assert [incident.replayed_chunks for incident in incidents] == [fault.replayed_chunks for fault in faults]
    for fault, incident in zip(faults, incidents, strict=True):
        assert fault.said in incident.why
        with capsys.disabled():
            print(f"\n{fault.signal.name}, {'a' if spare else 'no'} spare: {incident}")


def pictures_of(envs: Envs) -> dict[tuple[int, int], bytes]:
    """What was seen at each decision of some episodes of the toy."""
    seen: dict[tuple[int, int], bytes] = {}

    def decide(observation: Any, episode: np.ndarray, decision: np.ndarray) -> np.ndarray:
        for row, key in enumerate(zip(episode.tolist(), decision.tolist(), strict=True)):
            seen[key] = observation.images["top"][row].tobytes()
        # Towards the wall at any speed, so that episodes end at any time and restart beside others that go on.
        speeds = np.array([np.random.default_rng(int(e)).uniform(0.1, 0.4) for e in episode], dtype=np.float32)
        shape = (len(episode), envs.spec.chunk_size, envs.spec.action_size)
        return np.broadcast_to(speeds[:, None, None], shape)

    for _ in play(envs, STATES, decide):
        pass
    return seen


def test_pictures_are_those_of_the_episode_after_a_death_whatever_is_done_to_the_memory_that_the_dead_had(
    tmp_path: Path,
) -> None:
    suite = compose("train", ["policy=x", "suite=toy"]).suite
    local = open_envs(suite, dataclasses.replace(WORKERS, kind=WorkerKind.local))
    expected = pictures_of(local)
    envs = open_fragile(suite, once(tmp_path / "marker", {(STATES[1], 1): signal.SIGKILL}), timeout_s=60)
    taken: list[int] = []
    take, recover = envs._sheets.take, envs._recover

    def noted(rows: int) -> Sheet:
        taken.append((sheet := take(rows)).number)
        return sheet

    def late(*arguments: Any) -> None:
        recover(*arguments)
        # What a simulator may do that was given up too early: it draws into the sheet of its round.
        assert envs._sheets._mapped is not None
        envs._sheets._mapped.sheet(taken[-2], envs.num_slots).memory.fill(255)

    envs._sheets.take, envs._recover = noted, late  # type: ignore[method-assign]
    try:
        assert pictures_of(envs) == expected
        assert len(envs.take_incidents()) == 1
        gc.collect()
        # The sheet of that round. All others are free, and were used many times.
        assert len(set(taken) - set(envs._sheets._free)) == 1
        assert len(set(taken)) < len(taken) / 2
    finally:
        envs.close()


@pytest.mark.simulator
@pytest.mark.slow
def test_two_groups_that_take_turns_give_the_rollout_of_one(
    push_policy: Path, sound: RayEnvs, undisturbed: Any
) -> None:
    assert_equal_rollouts(rollout(push_policy, sound, num_groups=2), undisturbed)


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


@pytest.mark.parametrize("spare", [pytest.param(False, id="no-spare"), pytest.param(True, id="spare")])
def test_an_episode_that_kills_its_simulator_every_time_is_left_out_and_named(toy: SuiteConfig, spare: bool) -> None:
    states = list(range(100, 108))

    def fault(state: int, decision: int) -> None:
        if state == 103 and decision == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    envs = open_fragile(toy, fault, spare=spare)
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
    assert incidents[0].quarantined == (103,)
    assert "left out from now on: initial state 103" in str(incidents[0])
    assert again == {0: True}


MARK = f"RLVLA_TEST_RECOVERY={os.getpid()}-{time.monotonic_ns()}"
"""What our processes inherit, wherever they end up, and those of another test run on this machine do not."""


def running() -> set[int]:
    """The simulator processes of this module's pools."""
    found = set()
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            ours = MARK.encode() in (path / "environ").read_bytes().split(b"\0")
            if ours and (path / "cmdline").read_text().startswith("ray::Fragile"):
                found.add(int(path.name))
    return found


def noting(working: Path, then: Callable[[int, int], None]) -> Callable[[int, int], None]:
    """``then``, and a file for each process that ever ran a chunk."""
    working.mkdir()

    def fault(state: int, decision: int) -> None:
        (working / str(os.getpid())).touch()
        then(state, decision)

    return fault


def idle(working: Path) -> set[int]:
    return running() - {int(path.name) for path in working.iterdir()}


def test_a_spare_takes_the_place_of_a_lost_simulator_and_is_followed_by_another(
    toy: SuiteConfig, tmp_path: Path
) -> None:
    working = tmp_path / "working"
    fault = noting(working, once(tmp_path / "marker", {(102, 1): signal.SIGKILL}))
    # The death itself is the only restart there may be.
    envs = open_fragile(toy, fault, spare=True, max_restarts_per_hour=1)
    try:
        assert len(idle(working)) == WORKERS.num_actors + 1
        # One episode in each simulator.
        assert lost_and_ended(envs, [90, 91, 92, 93]) == ({}, [0, 1, 2, 3])
        (spare,) = idle(working)
        assert lost_and_ended(envs, list(range(100, 108))) == ({}, list(range(8)))
        (incident,) = envs.take_incidents()
        assert envs.wait_for_spare(SPARE_S)
        (next_spare,) = idle(working)
        assert len(running()) == WORKERS.num_actors + 1
    finally:
        envs.close()
    assert (incident.worker, incident.lost_episodes) == (1, 0)
    assert (working / str(spare)).exists()
    assert next_spare != spare


@pytest.mark.parametrize("what", [signal.SIGKILL, signal.SIGSTOP])
def test_a_spare_that_is_itself_dead_or_hung_is_passed_over_and_no_episode_is_blamed(
    toy: SuiteConfig, tmp_path: Path, what: signal.Signals
) -> None:
    working = tmp_path / "working"
    fault = noting(working, once(tmp_path / "marker", {(102, 1): signal.SIGKILL}))
    envs = open_fragile(toy, fault, spare=True, max_restarts_per_hour=1, quarantine_after=1)
    try:
        assert lost_and_ended(envs, [90, 91, 92, 93]) == ({}, [0, 1, 2, 3])
        (spare,) = idle(working)
        os.kill(spare, what)
        assert lost_and_ended(envs, list(range(100, 108))) == ({}, list(range(8)))
        assert len(envs.take_incidents()) == 1
        assert envs.wait_for_spare(SPARE_S)
        # Ray asks a process to end first, and only then ends it: one that hangs takes a while.
        until = time.monotonic() + SPARE_S
        while spare in running() and time.monotonic() < until:
            time.sleep(0.2)
        assert spare not in running()
    finally:
        envs.close()


def test_only_suites_that_start_slowly_have_a_spare_that_nobody_asked_for(toy: SuiteConfig) -> None:
    push = compose("train", ["policy=x", *PUSH]).suite
    ray, local = WorkersConfig(), WorkersConfig(kind=WorkerKind.local)
    assert wants_spare(push, ray)
    assert wants_spare(dataclasses.replace(toy, python="/usr/bin/python3"), ray)
    assert not wants_spare(toy, ray)
    assert not wants_spare(push, local)
    assert not wants_spare(push, WorkersConfig(spare=False))
    assert wants_spare(toy, WorkersConfig(spare=True))
    envs = open_envs(toy, dataclasses.replace(WORKERS, spare=True))
    try:
        assert isinstance(envs, RayEnvs)
        assert envs.wait_for_spare(SPARE_S)
    finally:
        envs.close()


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
    envs = open_fragile(toy, once(tmp_path / "marker", {(102, 1): signal.SIGKILL}))
    envs.spec = dataclasses.replace(envs.spec, deterministic=False)
    try:
        lost, ended = lost_and_ended(envs, list(range(100, 108)))
    finally:
        envs.close()
    # 102 and its neighbour in the same process; neither is to blame.
    assert lost == {2: False, 3: False}
    assert ended == [0, 1, 4, 5, 6, 7]


def test_episodes_that_were_to_begin_when_their_simulator_died_begin_in_another_where_none_can_be_replayed(
    toy: SuiteConfig, tmp_path: Path
) -> None:
    marker = tmp_path / "marker"

    class DiesBeginning(SimulatorHost):
        def advance(self, request: Any, pictures: Any = None) -> Any:
            if len(request["restart_slots"]) and len(request["chunk_slots"]) and not marker.exists():
                marker.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return super().advance(request, pictures)

    class DyingEnvs(RayEnvs):
        host_class = DiesBeginning

    local = open_envs(toy, dataclasses.replace(WORKERS, kind=WorkerKind.local))
    expected = pictures_of(local)
    envs = DyingEnvs(toy, dataclasses.replace(WORKERS, timeout_s=60), ClusterConfig(), 2)
    envs.spec = dataclasses.replace(envs.spec, deterministic=False)
    try:
        seen = pictures_of(envs)
        (incident,) = envs.take_incidents()
    finally:
        envs.close()
    # Of two slots one ran a chunk and one was to begin: one episode is cut off, and all others are whole.
    assert incident.lost_episodes == 1
    assert {episode for episode, _ in seen} == set(range(len(STATES)))
    assert len({episode for episode, _ in set(expected) - set(seen)}) <= 1
    assert seen == {key: expected[key] for key in seen}


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
def one_ray() -> Iterator[None]:
    """The pools of this file share a Ray, whose start and end cost more than most tests. That it ends with a run says
    `test_nothing_left`; without its end, a pool that leaves a simulator behind is seen."""
    name, _, value = MARK.partition("=")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(name, value)
        patch.setattr(ray_envs, "disconnect", lambda ray: None)
        ray = connect(ClusterConfig(), WORKERS.num_actors)
        yield
    disconnect(ray)


@pytest.fixture(autouse=True)
def nothing_is_left_running(one_ray: None) -> Iterator[None]:
    yield
    until = time.monotonic() + 60
    while running() and time.monotonic() < until:
        time.sleep(0.05)
    assert not running()
