"""The scaling model: by hand where a hand suffices, against rlvla's own rollout loop, and over random costs."""

import json
import math
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlvla.compose import compose, to_yaml
from rlvla.policies.folder import save_policy
from rlvla.rollout import play
from rlvla.workers import Finish, Reply, Round
from rlvla_envs.base import ActionComponent, Camera, ChunkResult, EnvSpec, Observation

ROOT = Path(__file__).resolve().parents[2]
# Scripts import each other by their bare names, as Python lets them when one is run.
sys.path.append(str(ROOT / "scripts"))

import scaling_measure  # noqa: E402
import scaling_page  # noqa: E402
import simulate_scaling  # noqa: E402
from scaling_model import Costs, Episodes, Plan, Schedule, UpdateDevice, simulate  # noqa: E402

FREE = Costs(step_s=0.0, inference_base_s=0.0, train_s=0.0)
SYNC, PINGPONG, ASYNC = Schedule.sync, Schedule.pingpong, Schedule.one_off
OWN, INTERLEAVED, EXCLUSIVE = UpdateDevice.own, UpdateDevice.interleaved, UpdateDevice.exclusive

seconds = st.floats(0, 2)
random_costs = st.builds(
    Costs,
    step_s=st.floats(0.001, 0.1),
    render_s=seconds,
    reset_s=seconds,
    spread=st.floats(0, 0.8),
    call_s=st.floats(0, 0.01),
    inference_base_s=seconds,
    inference_row_s=st.floats(0, 0.1),
    record_s=st.floats(0, 0.01),
    train_s=seconds,
    score_s=seconds,
    optimizer_s=seconds,
    hop_s=st.floats(0, 0.1),
)
random_plans = st.builds(
    Plan,
    ranks=st.integers(1, 3),
    actors=st.integers(2, 5),
    envs_per_actor=st.integers(1, 3),
    cores=st.integers(1, 4),
    inference_batch=st.integers(1, 8),
    episodes=st.integers(3, 25),
    decisions=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    prompt_shares=st.sampled_from([(1.0,), (0.3, 0.7)]),
    epochs=st.integers(1, 3),
    minibatch=st.integers(4, 40),
)


def with_schedule(plan: Plan, schedule: Schedule, device: UpdateDevice = EXCLUSIVE) -> Plan:
    return replace(plan, schedule=schedule, update_device=device)


def test_one_environment_and_one_chunk_cost_what_they_cost_one_after_another() -> None:
    costs = Costs(
        step_s=0.01,
        render_s=0.02,
        reset_s=0.05,
        call_s=0.001,
        inference_base_s=0.2,
        inference_row_s=0.01,
        record_s=0.003,
        train_s=0.1,
        score_s=0.03,
        optimizer_s=0.004,
    )
    found = simulate(Plan(inference_batch=4, chunk_steps=8, epochs=4), costs)
    # Restart and its call, a block of 4 rows, 8 steps and a render and their call, storing.
    rollout = 0.051 + 0.24 + 0.101 + 0.003
    # 4 epochs of one minibatch of one decision, then the KL.
    update = 4 * (0.1 + 0.004) + 0.03
    assert found.rollout_s == pytest.approx(rollout)
    assert found.update_s == pytest.approx(update)
    assert found.iteration_s == pytest.approx(rollout + update)
    assert found.steps_per_s == pytest.approx(8 / (rollout + update))
    assert found.device_busy == pytest.approx((0.24 + update) / (rollout + update))
    assert found.core_busy == pytest.approx((0.051 + 0.101) / (rollout + update))


def test_without_inference_and_update_sync_is_pure_simulation() -> None:
    costs = replace(FREE, step_s=0.1, reset_s=0.5)
    plan = Plan(episodes=6, decisions=(2,), chunk_steps=10)
    # In one environment everything is serial; three on cores of their own play two episodes each.
    assert simulate(plan, costs).iteration_s == pytest.approx(6 * (0.5 + 2 * 1.0))
    assert simulate(replace(plan, actors=3, cores=3), costs).iteration_s == pytest.approx(2 * (0.5 + 2 * 1.0))
    # An actor's environments step one after another, so three in one actor gain nothing.
    assert simulate(replace(plan, envs_per_actor=3, cores=3), costs).iteration_s == pytest.approx(15.0)


def test_a_block_costs_the_same_when_it_is_not_full_and_holds_one_length_of_prompt() -> None:
    costs = replace(FREE, inference_base_s=1.0, inference_row_s=0.5)
    plan = Plan(envs_per_actor=17, episodes=17, inference_batch=16)
    # 17 rows: a full block and one with a single row.
    assert simulate(plan, costs).rollout_s == pytest.approx(2 * (1 + 16 * 0.5))
    assert simulate(replace(plan, inference_batch=32), costs).rollout_s == pytest.approx(1 + 32 * 0.5)
    # Both lengths occur among 17 episodes of these draws.
    two = replace(plan, inference_batch=32, prompt_shares=(0.5, 0.5))
    assert simulate(two, costs).rollout_s == pytest.approx(2 * (1 + 32 * 0.5))


@pytest.mark.parametrize(("inference", "chunk"), [(1.0, 1.0), (2.0, 0.5), (0.5, 2.0)])
def test_two_groups_hide_the_shorter_of_inference_and_simulation(inference: float, chunk: float) -> None:
    T = 7
    plan = Plan(actors=2, cores=2, episodes=2, decisions=(T,), inference_batch=1, chunk_steps=1)
    costs = replace(FREE, inference_base_s=inference, step_s=chunk)
    # Each group is one row, one block. In sync nobody steps while both are inferred for.
    assert simulate(plan, costs).rollout_s == pytest.approx(T * (2 * inference + chunk))
    pingpong = simulate(with_schedule(plan, PINGPONG), costs)
    if inference >= chunk:
        # The device never waits: all blocks, and the last chunk after them.
        assert pingpong.rollout_s == pytest.approx(2 * T * inference + chunk)
    else:
        # A group never waits, but for the other's first block.
        assert pingpong.rollout_s == pytest.approx(T * (inference + chunk) + inference)


def test_pingpong_on_one_core_with_inference_on_it_hides_nothing() -> None:
    plan = Plan(actors=2, episodes=2, decisions=(5,), inference_batch=2, chunk_steps=1, inference_on_core=True)
    costs = replace(FREE, inference_base_s=1.0, step_s=0.3)
    assert simulate(plan, costs).rollout_s == pytest.approx(5 * (1 + 2 * 0.3))
    # Each group needs a padded block of its own.
    assert simulate(with_schedule(plan, PINGPONG), costs).rollout_s == pytest.approx(5 * (2 + 2 * 0.3))


@pytest.mark.parametrize("train", [0.1, 5.0])
def test_async_with_a_device_for_the_update_takes_the_longer_of_the_two(train: float) -> None:
    costs = replace(FREE, step_s=0.1, inference_base_s=0.5, train_s=train)
    plan = Plan(envs_per_actor=2, episodes=4, decisions=(3,))
    alone = simulate(plan, costs)
    found = simulate(with_schedule(plan, ASYNC, OWN), costs)
    assert found.iteration_s == pytest.approx(max(alone.rollout_s, alone.update_s))


def test_async_in_turns_on_one_device_hides_simulation_behind_training() -> None:
    # Rollout: restart for nothing, block of 1 s, chunk of 3 s. Update: 4 minibatches of 1 s.
    costs = replace(FREE, step_s=3.0, inference_base_s=1.0, train_s=1.0)
    plan = Plan(chunk_steps=1, epochs=4)
    assert simulate(plan, costs).iteration_s == pytest.approx(4 + 4)
    # The first minibatch is asked for first; the block comes second and its chunk runs beside the other three.
    found = simulate(with_schedule(plan, ASYNC, INTERLEAVED), costs)
    assert found.rollout_s == pytest.approx(1 + 1 + 3)
    assert found.update_s == pytest.approx(4 + 1)
    assert found.iteration_s == pytest.approx(5)
    assert found.device_busy == pytest.approx(1.0)


def test_without_a_gpu_async_gains_at_most_what_a_rollout_leaves_idle() -> None:
    # One environment and four chunks of 8 x 0.1 s, then two minibatches of a second each: 3.2 + 2 s in turns.
    costs = replace(FREE, step_s=0.1, train_s=0.5)
    plan = Plan(decisions=(4,), epochs=1, minibatch=2, inference_on_core=True, update_on_cores=True)
    assert simulate(plan, costs).iteration_s == pytest.approx(5.2)
    # A core that is never idle has nothing to gain.
    assert simulate(with_schedule(plan, ASYNC, INTERLEAVED), costs).iteration_s == pytest.approx(5.2)
    # Two cores: a rollout of one environment wants one of them, a minibatch both. Nobody computes more than before, so
    # that 3.2 + 2 x 2 core seconds take at least 3.6; and minibatches come first, so that the rollout waits for both.
    two = replace(plan, cores=2)
    assert simulate(two, costs).iteration_s == pytest.approx(5.2)
    assert simulate(with_schedule(two, ASYNC, INTERLEAVED), costs).iteration_s == pytest.approx(5.2)
    # With more to do at once some of the idle time is used, and never more than all of it.
    many = replace(two, actors=2, envs_per_actor=2, episodes=6, decisions=(1, 3), minibatch=2)
    turns, beside = (simulate(with_schedule(many, s, d), costs) for s, d in ((SYNC, EXCLUSIVE), (ASYNC, INTERLEAVED)))
    idle = (1 - turns.core_busy) * turns.iteration_s
    assert turns.iteration_s - idle - 1e-9 <= beside.iteration_s < turns.iteration_s


def test_an_update_on_cores_where_inference_has_a_device_is_refused() -> None:
    with pytest.raises(ValueError, match="update_on_cores is True; it must be False where inference has a device"):
        Plan(update_on_cores=True)


def test_a_ring_sends_every_byte_almost_twice() -> None:
    costs = replace(FREE, gradient_bytes=8e9, local_bandwidth=2e9, network_bandwidth=1e9, gpus_per_node=4, hop_s=0.01)
    assert costs.allreduce_s(1) == 0
    # 2 x 3/4 x 8 GB at 2 GB/s, 6 hops; over two nodes 2 x 7/8 x 8 GB at 1 GB/s, 14 hops.
    assert costs.allreduce_s(4) == pytest.approx(6 + 0.06)
    assert costs.allreduce_s(8) == pytest.approx(14 + 0.14)
    # A wide network does not make the inside of a node wider.
    assert replace(costs, network_bandwidth=1e12).allreduce_s(8) == pytest.approx(7 + 0.14)


def test_ranks_share_episodes_and_minibatches_and_wait_for_each_other() -> None:
    costs = replace(FREE, step_s=0.1, inference_base_s=0.5, train_s=0.1, gradient_bytes=1e9, local_bandwidth=1e9)
    plan = Plan(episodes=8, decisions=(2,), chunk_steps=10, epochs=3, minibatch=8)
    one, two = simulate(plan, costs), simulate(replace(plan, ranks=2), costs)
    assert one.rollout_s == pytest.approx(8 * 2 * 1.5)
    assert two.rollout_s == pytest.approx(one.rollout_s / 2)
    # 3 epochs of 2 minibatches: half the decisions each, and an all-reduce of 2 x 1/2 GB at 1 GB/s.
    assert two.update_s == pytest.approx(one.update_s / 2 + 6 * 1.0)
    # Five episodes: one rank plays three of them, and the other waits.
    assert simulate(replace(plan, ranks=2, episodes=5), costs).rollout_s == pytest.approx(3 * 2 * 1.5)


class VirtualEnvs:
    """`Envs` that stand still while a clock runs as if they stepped: what `rlvla.rollout.play` is timed with."""

    group_size = 1
    spec = EnvSpec(
        suite="virtual",
        task="none",
        robot="none",
        action=(ActionComponent(name="x", size=1, convention="none", low=-1.0, high=1.0),),
        cameras=(Camera(name="c", height=1, width=1),),
        state_names=(),
        control_hz=1.0,
        chunk_size=1,
        max_episode_steps=100,
        num_evaluation_states=1,
    )

    versions = ""

    def __init__(self, plan: Plan, costs: Costs, todo: Episodes) -> None:
        self.plan, self.costs, self.todo = plan, costs, todo
        self.num_slots = plan.actors * plan.envs_per_actor
        self.slots_per_worker = plan.envs_per_actor
        self.playing = np.zeros((self.num_slots, 2), dtype=int)
        self.now = 0.0

    def begin(self, todo: Round) -> Finish:
        return lambda: self.advance(todo)

    def advance(self, todo: Round) -> Reply:
        per_actor: dict[int, float] = {}
        for slot, episode in zip(todo.restart_slots, todo.restart_states, strict=True):
            self.playing[slot] = episode, 0
            actor = int(slot) // self.plan.envs_per_actor
            per_actor[actor] = per_actor.get(actor, self.costs.call_s) + self.todo.reset_s[episode]
        done = []
        for slot in todo.chunk_slots:
            episode, decision = self.playing[slot]
            self.playing[slot, 1] += 1
            done.append(decision + 1 == self.todo.decisions[episode])
            actor = int(slot) // self.plan.envs_per_actor
            per_actor[actor] = per_actor.get(actor, self.costs.call_s) + self.todo.chunk_s[episode, decision]
        # Each actor takes the core that is free first, in their order.
        free_at = [0.0] * self.plan.cores
        for actor in sorted(per_actor):
            core = int(np.argmin(free_at))
            free_at[core] += per_actor[actor]
        self.now += max(free_at)
        return Reply(self.observe(len(todo.restart_slots)), self.result(done))

    def observe(self, rows: int) -> Observation | None:
        images = {"c": np.zeros((rows, 1, 1, 3), np.uint8)}
        return Observation(images=images, instruction=[""] * rows, state=None) if rows else None

    def result(self, done: list[bool]) -> ChunkResult | None:
        observation = self.observe(len(done))
        if observation is None:
            return None
        zeros = np.zeros(len(done))
        return ChunkResult(
            observation=observation,
            reward=zeros.astype(np.float32),
            terminated=np.array(done),
            truncated=np.zeros(len(done), dtype=bool),
            success=np.array(done),
            executed_steps=np.ones(len(done), dtype=np.int64),
            metrics={},
        )


@given(plan=random_plans, costs=random_costs)
def test_a_sync_rollout_takes_as_long_as_the_loop_of_rlvla_on_a_clock_that_counts(plan: Plan, costs: Costs) -> None:
    plan = replace(plan, ranks=1)
    todo = Episodes.draw(plan, costs, plan.episodes, np.random.default_rng((0, 0, 0)))
    envs = VirtualEnvs(plan, costs, todo)

    def decide(observation: Observation, episode: np.ndarray, decision: np.ndarray) -> np.ndarray:
        for length in set(todo.prompt[episode]):
            blocks = math.ceil(int((todo.prompt[episode] == length).sum()) / plan.inference_batch)
            envs.now += blocks * (costs.inference_base_s + plan.inference_batch * costs.inference_row_s)
        return np.zeros((len(episode), 1, 1), dtype=np.float32)

    for _ in play(envs, range(plan.episodes), decide):  # type: ignore[arg-type]
        pass
    stored = costs.record_s * todo.decisions.sum()
    assert simulate(plan, costs, iterations=1).rollout_s == pytest.approx(envs.now + stored)


@given(plan=random_plans, costs=random_costs)
def test_every_schedule_plays_the_same_episodes_and_nothing_is_busier_than_always(plan: Plan, costs: Costs) -> None:
    plans = [
        plan,
        with_schedule(plan, PINGPONG),
        replace(plan, inference_on_core=True),
        *(with_schedule(plan, ASYNC, device) for device in UpdateDevice),
    ]
    found = [simulate(each, costs) for each in plans]
    assert {f.env_steps for f in found} == {found[0].env_steps}
    for prediction in found:
        assert 0 <= prediction.device_busy <= 1 + 1e-9
        assert 0 < prediction.core_busy <= 1 + 1e-9
        assert prediction.iteration_s <= (prediction.rollout_s + prediction.update_s) * (1 + 1e-9)


@given(plan=random_plans, costs=random_costs, schedule=st.sampled_from([SYNC, PINGPONG]))
def test_more_cores_are_never_slower(plan: Plan, costs: Costs, schedule: Schedule) -> None:
    plan = with_schedule(plan, schedule)
    times = [simulate(replace(plan, cores=cores), costs).iteration_s for cores in (1, 2, 3, 8)]
    assert all(more <= fewer * (1 + 1e-9) for fewer, more in pairwise(times))


@given(plan=random_plans, costs=random_costs)
def test_async_is_never_slower_than_sync_and_equal_where_one_thing_runs_at_a_time(plan: Plan, costs: Costs) -> None:
    sync = simulate(plan, costs)
    assert simulate(with_schedule(plan, ASYNC, EXCLUSIVE), costs) == sync
    for device in (OWN, INTERLEAVED):
        assert simulate(with_schedule(plan, ASYNC, device), costs).iteration_s <= sync.iteration_s * (1 + 1e-9)


def test_the_same_seed_predicts_the_same_and_another_one_does_not() -> None:
    costs = replace(FREE, step_s=0.1, spread=0.5)
    plan = Plan(actors=3, cores=2, episodes=9, decisions=(1, 2, 5))
    assert simulate(plan, costs, seed=1) == simulate(plan, costs, seed=1)
    assert simulate(plan, costs, seed=1) != simulate(plan, costs, seed=2)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"schedule": PINGPONG}, "actors is 1; it must be at least 2"),
        ({"learners": 2}, "update_device=own"),
        ({"decisions": ()}, "decisions is"),
        ({"prompt_shares": (0.0,)}, "prompt_shares is"),
        ({"cores": 0}, "cores is 0"),
        ({"update_device": OWN, "inference_on_core": True}, "update_device is own"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Plan(**settings)


def test_negative_costs_are_refused() -> None:
    with pytest.raises(ValueError, match="reset_s is -1"):
        replace(FREE, reset_s=-1)


def test_the_stop_watch_finds_the_costs_that_made_its_times() -> None:
    rng = np.random.default_rng(0)
    rounds = [(1.0, float(rng.integers(0, 4)), float(8 * n), float(n)) for n in rng.integers(0, 5, 40)]
    watch = scaling_measure._Watch(
        rounds=rounds,
        round_s=[0.002 + 0.05 * restarts + 0.007 * steps for _, restarts, steps, _ in rounds],
        blocks=20,
        inference_s=3.0,
    )
    measured = scaling_measure.Measured(
        actors=1,
        envs_per_actor=4,
        iterations=2,
        rollout_s=0.0,
        update_s=11.0,
        decisions=50,
        env_steps=0,
        epochs=5,
        load=0,
    )
    total = sum(watch.round_s) + watch.inference_s + 0.4
    costs = scaling_measure._fit(watch, measured, total, decisions=100)
    assert (costs.call_s, costs.reset_s, costs.step_s) == pytest.approx((0.002, 0.05, 0.007))
    assert costs.inference_base_s == pytest.approx(0.15)
    assert costs.record_s == pytest.approx(0.004)
    assert costs.spread == pytest.approx(0, abs=1e-6)
    # 50 decisions, 5 epochs and a forward pass at a third: 11 s.
    assert costs.train_s * 50 * (5 + 1 / 3) == pytest.approx(11)


@pytest.fixture
def toy_run(tmp_path: Path, make_toy: Callable[..., Any], make_policy: Callable[..., Any]) -> Path:
    """The folder of a run on the toy: a configuration, a policy, and two noted iterations."""
    save_policy(make_policy("qwen_vla_toy", make_toy(1).spec), tmp_path / "policy")
    words = [f"policy={tmp_path / 'policy'}", f"output={tmp_path}", "suite=toy", "workers.kind=local"]
    config = compose("train", [*words, "algo.epochs=2", "algo.minibatch_size=8"])
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    row = {"kind": "iteration", "ppo/critic_only": 0.0, "ppo/epochs": 2.0, "rollout/decisions": 10}
    noted = [
        row
        | {
            "iteration": 0,
            "ppo/critic_only": 1.0,
            "rollout/env_steps": 99,
            "time/rollout_s": 9.0,
            "time/update_s": 9.0,
        },
        row | {"iteration": 1, "rollout/env_steps": 60, "time/rollout_s": 2.0, "time/update_s": 1.0},
        row | {"iteration": 2, "rollout/env_steps": 80, "time/rollout_s": 4.0, "time/update_s": 3.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, noted)))
    return tmp_path


def test_a_recorded_run_is_the_mean_of_its_iterations_that_trained_the_policy(toy_run: Path) -> None:
    found = scaling_measure.read_measured(toy_run)
    assert (found.iterations, found.rollout_s, found.update_s, found.env_steps) == (2, 3.0, 2.0, 70.0)
    assert found.steps_per_s == pytest.approx(70 / 3)
    with pytest.raises(ValueError, match="no iteration that trained the policy"):
        scaling_measure.read_measured(toy_run / "policy")


def test_a_folder_that_is_no_run_of_today_is_refused(toy_run: Path) -> None:
    with pytest.raises(ValueError, match="Give the output folder of an `rlvla train`"):
        scaling_measure.read_config(toy_run / "nowhere")
    with (toy_run / "config.yaml").open("a") as file:
        file.write("temperature: 1.0\n")
    with pytest.raises(ValueError, match="temperature"):
        scaling_measure.read_config(toy_run)


@pytest.mark.parametrize("cpu_time", [False, True])
def test_a_measurement_plays_real_episodes_and_counts_all_of_them(toy_run: Path, cpu_time: bool) -> None:
    config = scaling_measure.read_config(toy_run)
    layout = {"actors": 1, "envs_per_actor": 3, "episodes": 5, "iterations": 2}
    found = scaling_measure.measure(config, first=1, cpu_time=cpu_time, **layout)
    measured = found.measured
    assert len(found.decisions) == 10
    assert sum(found.decisions) == 2 * measured.decisions
    assert found.chunk_steps == pytest.approx(measured.env_steps / measured.decisions)
    assert found.prompt_shares == [1.0]
    assert measured.epochs == 2
    assert found.costs.inference_base_s > 0
    assert scaling_measure.Calibration.from_json(found.to_json()) == found


@pytest.mark.parametrize("schedule", ["sync", "pingpong", "async"])
def test_iterations_under_a_schedule_are_those_of_training(toy_run: Path, schedule: str) -> None:
    config = scaling_measure.read_config(toy_run)
    layout = {"actors": 2, "envs_per_actor": 2, "episodes": 5, "iterations": 2}
    found = scaling_measure.measure_schedule(config, scaling_measure.Schedule(schedule), first=100, **layout)
    sync = scaling_measure.measure_schedule(config, scaling_measure.Schedule.sync, first=100, **layout)
    # The weights stay as they are, so that every schedule plays the same episodes.
    assert (found.decisions, found.env_steps) == (sync.decisions, sync.env_steps)
    assert (found.iterations, found.epochs, found.schedule) == (2, 2, schedule)
    assert found.steps_per_s == pytest.approx(
        found.env_steps / (found.iteration_s if schedule == "async" else found.rollout_s)
    )
    calibration = scaling_measure.measure(config, first=1, **layout | {"actors": 1})
    checked = scaling_measure.check("predicted", calibration, found, episodes=5, minibatch=8)
    # What the ratios are, the machine decides, and a busy one may fit costs that are none.
    assert {"iteration_s", "rollout_s", "update_s", "steps_per_s"} <= set(checked.ratios)
    assert f"| {schedule} |" in scaling_page.validation_table(
        {
            "calibration": json.loads(calibration.to_json()),
            "checks": [asdict(found)],
            "recorded": [],
            "episodes": 5,
            "minibatch": 8,
        }
    )


def test_a_cell_that_makes_no_sense_is_empty_and_the_others_hold_every_environment() -> None:
    for setup in scaling_page.SETUPS:
        for gpus in scaling_page.GPUS:
            for envs in scaling_page.ENVS:
                plan = scaling_page.plan_for(setup, gpus, envs)
                if plan is None:
                    assert envs <= gpus or gpus == 1
                    continue
                assert plan.ranks * plan.actors * plan.envs_per_actor == envs
                assert plan.ranks * plan.cores == gpus * scaling_page.CORES
                assert plan.devices == gpus


def test_the_page_shows_the_assumptions_and_what_the_model_predicts_today() -> None:
    page = scaling_page.PAGE.read_text()
    assert scaling_page.assumptions() in page
    for setup in scaling_page.SETUPS:
        found = scaling_page.predict(setup, 8, 64)
        assert f"{100 * found.device_busy:.0f} / {100 * found.core_busy:.0f} / {found.steps_per_s:.0f}" in page


@pytest.mark.parametrize("text", ["8", "0x4", "2x", "ax2", "2x-1"])
def test_a_layout_is_actors_times_environments(text: str) -> None:
    assert simulate_scaling.layout("2x8") == (2, 8)
    with pytest.raises(Exception, match="ACTORSxENVIRONMENTS"):
        simulate_scaling.layout(text)


def test_costs_survive_json() -> None:
    assert Costs(**json.loads(json.dumps(asdict(scaling_page.TABLE_COSTS)))) == scaling_page.TABLE_COSTS
