"""What `scaling_model` needs, measured: rlvla's own rollout and learner with a stop-watch at their two borders."""

import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scaling_model import Costs, Plan, Prediction, UpdateDevice, simulate
from scaling_model import Schedule as ModelSchedule
from scipy.optimize import nnls

from rlvla.acting import Actor, Thought
from rlvla.config import Schedule, TrainConfig, WorkerKind
from rlvla.learner import Learner
from rlvla.mixing import task_weights, training_states
from rlvla.pipeline import make_collector
from rlvla.policies.base import ValueHead
from rlvla.policies.folder import load_policy
from rlvla.policies.qwen_vla import QwenVLA
from rlvla.ranks import ALONE
from rlvla.recovery import Incident
from rlvla.rollout import collect
from rlvla.run import pick_device
from rlvla.run_folder import read_run
from rlvla.samplers import Sampler, training_sampler
from rlvla.seeding import seed_torch
from rlvla.train import add_advantages
from rlvla.workers import Envs, Finish, Reply, Round, open_envs
from rlvla_envs.base import Demonstration, Observation

DRAWS = 16
"""Iterations of the model behind a predicted row: the episodes of one alone differ by some per cent."""
CALL_S = 0.003
"""MEASURED on an idle machine, Ray 2.60: a request with a chunk and its reply with some megabytes of images."""
EARLY = 4
"""A policy that learns ends its episodes sooner, and the calibration knows only those of the policy it started from."""
CALIBRATION = "calibration itself"
"""Label of the row that predicts what its costs were measured on."""
FORWARD_SHARE = 1 / 3
"""ASSUMED: a forward pass costs a third of a forward and a backward one."""


@dataclass(frozen=True)
class Measured:
    """Iterations that were really run, on one layout."""

    actors: int
    envs_per_actor: int
    iterations: int
    rollout_s: float
    """Mean over the iterations, as the four below; with async only what the learner waited for it."""
    update_s: float
    decisions: float
    env_steps: float
    epochs: float
    load: float
    """Load average when they ended, these included; 0 where nobody noted it."""
    schedule: str = "sync"

    @property
    def overlaps(self) -> bool:
        return self.schedule == ModelSchedule.one_off.value

    @property
    def iteration_s(self) -> float:
        return self.rollout_s + self.update_s

    @property
    def steps_per_s(self) -> float:
        """`speed/env_steps_per_s`: over the rollout alone, or with async over the iteration."""
        return self.env_steps / (self.iteration_s if self.overlaps else self.rollout_s)


@dataclass(frozen=True)
class Calibration:
    """Costs, and the episodes they were measured on."""

    costs: Costs
    decisions: list[int]
    chunk_steps: float
    prompt_shares: list[float]
    inference_batch: int
    measured: Measured

    def plan(self, layout: Measured, *, episodes: int, minibatch: int) -> Plan:
        """One process on this machine, as `rlvla train` runs here."""
        return Plan(
            schedule=ModelSchedule(layout.schedule),
            update_device=UpdateDevice.interleaved if layout.overlaps else UpdateDevice.exclusive,
            actors=layout.actors,
            envs_per_actor=layout.envs_per_actor,
            cores=os.cpu_count() or 1,
            inference_on_core=True,
            update_on_cores=True,
            inference_batch=self.inference_batch,
            episodes=episodes,
            decisions=self.decisions,
            chunk_steps=self.chunk_steps,
            prompt_shares=self.prompt_shares,
            epochs=layout.epochs,
            minibatch=minibatch,
        )

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Calibration":
        data = json.loads(text)
        return cls(**{**data, "costs": Costs(**data["costs"]), "measured": Measured(**data["measured"])})


@dataclass
class _Watch:
    """What the stop-watch saw: (requests, restarts, executed steps, chunks) of each round, its seconds, inference."""

    clock: Callable[[], float] = time.perf_counter
    rounds: list[tuple[float, ...]] = field(default_factory=list)
    round_s: list[float] = field(default_factory=list)
    blocks: int = 0
    inference_s: float = 0.0
    prompts: dict[int, int] = field(default_factory=dict)


class _TimedActor(Actor):
    watch: _Watch

    def decide(self, observation: Observation, rngs: Sequence[np.random.Generator], **options: Any) -> Thought:
        lengths = [self.policy.context_length(text) for text in observation.instruction]
        for length in lengths:
            self.watch.prompts[length] = self.watch.prompts.get(length, 0) + 1
        self.watch.blocks += sum(-(-lengths.count(length) // self.block) for length in set(lengths))
        started = self.watch.clock()
        thought = super().decide(observation, rngs, **options)
        self.watch.inference_s += self.watch.clock() - started
        return thought


class _TimedEnvs:
    """`Envs` around `Envs`."""

    def __init__(self, envs: Envs, watch: _Watch) -> None:
        self._envs, self._watch = envs, watch
        self.spec, self.num_slots, self.group_size = envs.spec, envs.num_slots, envs.group_size
        self.slots_per_worker, self.versions = envs.slots_per_worker, envs.versions

    def begin(self, todo: Round) -> Finish:
        return lambda: self.advance(todo)

    def advance(self, todo: Round) -> Reply:
        started = self._watch.clock()
        reply = self._envs.advance(todo)
        self._watch.round_s.append(self._watch.clock() - started)
        steps = 0 if reply.result is None else int(reply.result.executed_steps.sum())
        self._watch.rounds.append((1.0, len(todo.restart_slots), steps, len(todo.chunk_slots)))
        return reply

    def take_incidents(self) -> list[Incident]:
        return self._envs.take_incidents()

    def demonstrate(self, states: Sequence[int], seeds: Sequence[int]) -> list[Demonstration]:
        return self._envs.demonstrate(states, seeds)

    def film(self, slot: int) -> np.ndarray | None:
        return self._envs.film(slot)

    def close(self) -> None:
        self._envs.close()


def read_config(run: Path) -> TrainConfig:
    """The configuration of a run folder.

    Raises:
        ValueError: there is none, or its options are no longer those of `rlvla train`.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    path = run / "config.yaml"
    if not path.is_file():
        raise ValueError(f"there is no {path}. Give the output folder of an `rlvla train`.")
    try:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(TrainConfig), OmegaConf.load(path)))
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path} is not of today's `rlvla train`: {reason}. Give a newer run.") from error
    assert isinstance(config, TrainConfig)
    return config


def read_measured(run: Path) -> Measured:
    """What a finished run noted of its first `EARLY` iterations that trained the policy.

    Raises:
        ValueError: it has none.
    """
    # Not through `TrainConfig`: an old run may have options that are no more, and these four stay.
    folder = read_run(run)
    rows = [row for row in folder.iterations if not row.get("ppo/critic_only")][:EARLY]
    if not rows:
        raise ValueError(f"{run}/metrics.jsonl has no iteration that trained the policy. Give a run with some.")

    def mean(key: str) -> float:
        return float(np.mean([row[key] for row in rows]))

    return Measured(
        actors=folder.setting("workers.num_actors") or os.cpu_count() or 1,
        envs_per_actor=int(folder.setting("workers.envs_per_actor")),
        iterations=len(rows),
        rollout_s=mean("time/rollout_s"),
        update_s=mean("time/update_s"),
        decisions=mean("rollout/decisions"),
        env_steps=mean("rollout/env_steps"),
        epochs=mean("ppo/epochs"),
        load=0.0,
        schedule=str(folder.setting("schedule") or "sync"),
    )


@dataclass(frozen=True)
class _Trainer:
    """What trains in a measurement. The update changes no weight, so that every iteration plays the same policy."""

    config: TrainConfig
    device: str
    policy: QwenVLA
    value_head: ValueHead
    sampler: Sampler
    learner: Learner

    @classmethod
    def of(cls, config: TrainConfig, iterations: int) -> "_Trainer":
        device = pick_device(config.device)
        seed_torch(config.seed)
        algo = replace(
            config.algo, critic_only_iterations=0, min_successes=0, policy_lr=1e-12, vlm_lr=1e-12, value_lr=1e-12
        )
        config = replace(config, algo=algo, iterations=iterations)
        policy = load_policy(Path(config.policy), device)
        value_head = ValueHead(policy.value_size, algo.value_hidden_sizes).to(device)
        sampler = training_sampler(policy, algo)
        learner = Learner(policy, value_head, algo, sampler, seed=config.seed, total_iterations=iterations)
        return cls(config, device, policy, value_head, sampler, learner)

    def states(self, envs: Envs, number: int, iteration: int) -> list[int]:
        weights = task_weights(self.config, envs.spec.task_names(), dict.fromkeys(envs.spec.task_names(), 0.0))
        return training_states(envs.spec, weights, number, seed=self.config.seed, iteration=iteration)


def measure_schedule(
    config: TrainConfig,
    schedule: Schedule,
    *,
    actors: int,
    envs_per_actor: int,
    episodes: int,
    iterations: int,
    first: int,
) -> Measured:
    """Seconds of iterations under a schedule, by the collectors that `rlvla train` uses, after one that warms up.

    With async a counted iteration goes from one rollout's arrival to the next one's: an update of the one beside the
    rollout of the next, and no first rollout that has nothing beside it.
    """
    last = first + iterations
    trainer = _Trainer.of(replace(config, schedule=schedule), last + 1)
    envs = open_envs(config.suite, replace(config.workers, num_actors=actors, envs_per_actor=envs_per_actor))
    actor = Actor(trainer.policy, block=config.inference_batch, device=trainer.device)
    overlaps = schedule is Schedule["async"]
    rollout_s, update_s, epochs = [], [], []
    decisions = env_steps = 0
    collector = make_collector(
        trainer.config, ALONE, trainer.policy, trainer.value_head, envs, trainer.sampler, actor, lambda _: None
    )

    def states(iteration: int) -> list[int]:
        return trainer.states(envs, episodes if iteration >= first else actors * envs_per_actor, iteration)

    try:
        for iteration in range(first - 1, last + overlaps):
            started = time.perf_counter()
            rollout = collector.take(iteration, states)
            collected = time.perf_counter()
            # The first counted rollout of async is what the warm-up's update ran beside: the next one's wait counts.
            if iteration >= first + overlaps:
                rollout_s.append(collected - started)
            if iteration == last:
                break
            add_advantages(rollout, trainer.config.algo)
            updated = trainer.learner.update(rollout, iteration)
            if iteration >= first:
                update_s.append(time.perf_counter() - collected)
                epochs.append(updated["ppo/epochs"])
                decisions += int(rollout["valid"].sum())
                env_steps += int(rollout["next", "executed_steps"].sum())
    finally:
        collector.close()
        envs.close()
    return Measured(
        actors=actors,
        envs_per_actor=envs_per_actor,
        iterations=iterations,
        rollout_s=float(np.mean(rollout_s)),
        update_s=float(np.mean(update_s)),
        decisions=decisions / iterations,
        env_steps=env_steps / iterations,
        epochs=float(np.mean(epochs)),
        load=os.getloadavg()[0],
        schedule=schedule.value,
    )


def measure(
    config: TrainConfig,
    *,
    actors: int,
    envs_per_actor: int,
    episodes: int,
    iterations: int,
    first: int,
    cpu_time: bool = False,
) -> Calibration:
    """What things cost: run iterations of ``config`` on a layout under `sync`, after one that warms up.

    Args:
        first: number of the first counted iteration. Calibrate and check with different ones: the same number has the
            same episodes.
        cpu_time: count the seconds that this process computes, simulators in it and on one thread, instead of those
            that pass. What other jobs take does not count, so it tells the costs of an idle machine on a busy one; the
            update is taken to be as many times faster as there are cores.
    """
    trainer = _Trainer.of(config, first + iterations)
    algo = trainer.config.algo
    actor = _TimedActor(trainer.policy, block=config.inference_batch, device=trainer.device)
    workers = replace(config.workers, num_actors=actors, envs_per_actor=envs_per_actor)
    watch = _Watch()
    threads, cores = torch.get_num_threads(), os.cpu_count() or 1
    if cpu_time:
        workers = replace(workers, kind=WorkerKind.local)
        watch = _Watch(clock=time.process_time)
        torch.set_num_threads(1)
    rollout_s: list[float] = []
    update_s: list[float] = []
    epochs: list[float] = []
    lengths: list[int] = []
    env_steps = 0
    envs = open_envs(config.suite, workers)
    try:
        for iteration in range(first - 1, first + iterations):
            warm = iteration >= first
            actor.watch = watch if warm else _Watch()
            states = trainer.states(envs, episodes if warm else actors * envs_per_actor, iteration)
            started = watch.clock()
            rollout = collect(
                actor,
                trainer.value_head,
                _TimedEnvs(envs, actor.watch),
                states,
                sampler=trainer.sampler,
                key=(config.seed, iteration),
                store_context=not algo.train_vlm,
                value_final=algo.bootstrap_time_limit,
            )
            collected = watch.clock()
            add_advantages(rollout, algo)
            updated = trainer.learner.update(rollout, iteration)
            ended = watch.clock()
            if warm:
                rollout_s.append(collected - started)
                update_s.append((ended - collected) / (cores if cpu_time else 1))
                epochs.append(updated["ppo/epochs"])
                lengths += rollout["valid"].sum(dim=1).tolist()
                env_steps += int(rollout["next", "executed_steps"].sum())
    finally:
        envs.close()
        torch.set_num_threads(threads)
    decisions = sum(lengths)
    measured = Measured(
        actors=actors,
        envs_per_actor=envs_per_actor,
        iterations=iterations,
        rollout_s=float(np.mean(rollout_s)),
        update_s=float(np.mean(update_s)),
        decisions=decisions / iterations,
        env_steps=env_steps / iterations,
        epochs=float(np.mean(epochs)),
        load=os.getloadavg()[0],
    )
    shares = [watch.prompts[length] / decisions for length in sorted(watch.prompts)]
    costs = _fit(watch, measured, sum(rollout_s), decisions)
    return Calibration(
        costs=replace(costs, call_s=costs.call_s + CALL_S) if cpu_time else costs,
        decisions=[int(length) for length in lengths],
        chunk_steps=env_steps / decisions,
        prompt_shares=shares,
        inference_batch=config.inference_batch,
        measured=measured,
    )


def _fit(watch: _Watch, measured: Measured, rollout_s: float, decisions: int) -> Costs:
    """Costs from the stop-watch. Right for one actor: rounds of several end with the slowest."""
    rounds: NDArray[np.float64] = np.array(watch.rounds)
    seconds: NDArray[np.float64] = np.array(watch.round_s)
    # A chunk's render goes with its steps: nearly all chunks are full, so the two cannot be told apart, and at the
    # same chunk size they need not be.
    (call_s, reset_s, step_s), _ = nnls(rounds[:, :3], seconds)
    residual = seconds - rounds[:, :3] @ [call_s, reset_s, step_s]
    chunk_s = step_s * rounds[:, 2].sum() / rounds[:, 3].sum()
    variance = (residual**2).sum() / (rounds[:, 3].sum() * chunk_s**2)
    per_decision = decisions * (measured.epochs + FORWARD_SHARE) / measured.iterations
    train_s = measured.update_s / per_decision
    return Costs(
        call_s=float(call_s),
        reset_s=float(reset_s),
        step_s=float(step_s),
        spread=float(np.sqrt(np.log1p(variance))),
        # A block is padded to its full size, so what a row costs cannot be seen and need not be.
        inference_base_s=watch.inference_s / watch.blocks,
        record_s=float(max(0.0, rollout_s - seconds.sum() - watch.inference_s)) / decisions,
        train_s=train_s,
        score_s=train_s * FORWARD_SHARE,
    )


@dataclass(frozen=True)
class Check:
    label: str
    measured: Measured
    predicted: Prediction

    @property
    def ratios(self) -> dict[str, float]:
        """Predicted / measured. Of a rollout that overlaps with the update nobody measured the seconds: NaN."""
        measured, predicted = self.measured, self.predicted
        seconds = predicted.iteration_s if measured.overlaps else predicted.rollout_s
        return {
            "env_steps": predicted.env_steps / measured.env_steps,
            "rollout_s": math.nan if measured.overlaps else predicted.rollout_s / measured.rollout_s,
            "update_s": predicted.update_s / measured.update_s,
            "steps_per_s": predicted.env_steps / seconds / measured.steps_per_s,
            "iteration_s": predicted.iteration_s / measured.iteration_s,
        }


def check(label: str, calibration: Calibration, measured: Measured, episodes: int, minibatch: int) -> Check:
    """Predict what was measured, from costs and episodes of the calibration alone."""
    plan = calibration.plan(measured, episodes=episodes, minibatch=minibatch)
    return Check(label, measured, simulate(plan, calibration.costs, iterations=DRAWS))


def checks_of(saved: Mapping[str, Any]) -> list[Check]:
    """Predictions are made anew from what was measured, so that the page shows today's model."""
    calibration = Calibration.from_json(json.dumps(saved["calibration"]))
    settings = (saved["episodes"], saved["minibatch"])
    rows = [check(CALIBRATION, calibration, calibration.measured, *settings)]
    rows += [check("predicted", calibration, Measured(**found), *settings) for found in saved["checks"]]
    for found in saved["recorded"]:
        label = f"recorded, {found['episodes']} episodes"
        rows.append(check(label, calibration, Measured(**found["measured"]), found["episodes"], found["minibatch"]))
    return rows
