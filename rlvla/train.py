"""`rlvla train`: PPO on a policy. Collect whole episodes, estimate advantages, update, repeat."""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict

from rlvla.acting import Actor
from rlvla.checkpoints import Checkpoints, TrainState
from rlvla.clock import Clock, memory_row, trace_of, traced
from rlvla.config import AlgoConfig, Discount, LearnerStrategy, Schedule, TrainConfig, WorkersConfig
from rlvla.conventions import ask_conventions
from rlvla.cotraining import load_cotraining
from rlvla.critic import make_value_head
from rlvla.evaluate import Evaluation, compare, evaluate, measure
from rlvla.forward_sampler import objective_sampler
from rlvla.iteration_row import describe, describe_incidents, describe_tasks, sde_gap, sound_alarms
from rlvla.judging import judge, repeat_states
from rlvla.learner import Learner
from rlvla.mixing import check_weights, task_weights, training_states
from rlvla.pipeline import Collector, drop_stale, make_collector
from rlvla.policies.base import ValueHead, trained_groups
from rlvla.policies.exploration import add_explorer
from rlvla.policies.folder import load_policy, load_weights, save_policy
from rlvla.policies.groups import require_gradients
from rlvla.policies.lora import adapted, add_lora, describe_lora
from rlvla.policies.numerics import set_up
from rlvla.policies.policy import Policy
from rlvla.ranks import ALONE, Group, share
from rlvla.reasoning import load_reasoning_teacher
from rlvla.recovery import Incident
from rlvla.report import write_report
from rlvla.run import Run, check_output, pick_device
from rlvla.safeguard import Watch, guard
from rlvla.samplers import Sampler, training_sampler
from rlvla.seeding import seed_torch
from rlvla.teachers import add_teacher_weight, check_teacher_weights, load_teacher
from rlvla.trials import weights_digest
from rlvla.workers import Envs, open_envs
from rlvla_algos.gae import generalized_advantage_estimate
from rlvla_algos.ppo import normalize_advantage
from rlvla_envs.base import require_match, require_score


@dataclass(frozen=True)
class Side:
    """What a learner rank has of its own."""

    config: TrainConfig
    group: Group
    policy: Policy
    value_head: ValueHead
    sampler: Sampler
    learner: Learner
    actor: Actor


def run(config: TrainConfig) -> dict[str, Any]:
    """Refine ``config.policy`` on ``config.suite``. Everything it writes is under ``config.output``.

    Returns:
        The summary: task, success before and after on the same held-back states, trials, paired p-value, steps.
    """
    if config.learners.num == 1:
        return lead(config, ALONE)
    from rlvla.rank_actors import run_ranks

    return run_ranks(config)


def prepare(config: TrainConfig, group: Group) -> Side:
    """Load and build what a rank trains with."""
    device = pick_device(config.device)
    seed_torch(config.seed)
    policy = load_policy(Path(config.policy), device)
    if len(policy.embodiments) > 1:
        # Teachers and demonstrations are compared with it before there are simulators.
        policy.embody_in(ask_conventions(config.suite, deadline_s=config.workers.start_timeout_s))
    trained = trained_groups(policy, config.algo.train_vlm, config.algo.freeze)
    add_lora(policy, config.lora, trained, config.policy)
    # After the adapters, which are not for its own small layers.
    add_explorer(policy, config.algo)
    require_gradients(policy, trained_groups(policy, config.algo.train_vlm, config.algo.freeze))
    split = config.learners.num > 1 and config.learners.strategy is LearnerStrategy.fsdp
    for note in set_up(policy, config.compute, narrow=not split):
        if group.leads:
            print(f"note: {note}", file=sys.stderr)
    value_head = make_value_head(policy, config.algo, device)
    sampler = objective_sampler(training_sampler(policy, config.algo), policy, config.algo)
    learner = Learner(
        policy,
        value_head,
        config.algo,
        sampler,
        seed=config.seed,
        total_iterations=config.iterations,
        group=group,
        strategy=config.learners.strategy,
        teacher=load_teacher(config.algo, policy, Path(config.policy), device),
        reasoning=load_reasoning_teacher(
            config.algo.reasoning_teacher, policy, Path(config.policy), device, seed=config.seed
        ),
        cotraining=load_cotraining(policy, config.algo, seed=config.seed, device=device),
        compute=config.compute,
    )
    actor = Actor(policy, block=config.inference_batch, device=device)
    return Side(config, group, policy, value_head, sampler, learner, actor)


def lead(config: TrainConfig, group: Group, losses: Sequence[str] = ()) -> dict[str, Any]:
    """The run, as rank 0 of its learners makes it; the other ranks `follow`.

    Args:
        losses: what ended earlier groups of this run.
    """
    side = prepare(config, group)
    policy, learner, actor = side.policy, side.learner, side.actor

    check_output(config, "train")
    with group.together():
        envs = open_envs(config.suite, workers_of(config.workers, group), config.cluster)
    collector: Collector | None = None
    try:
        require_match(policy.env_spec, envs.spec)
        require_score(envs.spec)
        check_weights(config, envs.spec)
        check_teacher_weights(config.algo.teacher, envs.spec)
        with Run.open(config, "train", total=config.iterations, simulator=envs.versions) as record:
            record.require_policy(weights_digest(policy))
            if layers := adapted(policy):
                record.progress.note(describe_lora(layers))
            checkpoints = Checkpoints(record.folder / "checkpoints", config.keep_checkpoints)

            def show_episodes(ended: int) -> None:
                record.progress.bar("episodes", ended, share(config.episodes_per_iteration, group)[1])
                record.tick()

            collector = collector_of(side, envs, show_episodes)

            def write_checkpoint(folder: Path) -> None:
                save_policy(policy, folder / "policy")
                group.broadcast(["save"])
                torch.save(learner.state_dict(), folder / "learner.pt")
                collector.save(folder)

            def go_back(folder: Path, caution: float) -> None:
                group.broadcast(["return", str(folder), caution])
                return_to(side, folder, caution)

            saving = Clock()

            def save(state: TrainState) -> None:
                with saving.span("save"):
                    checkpoints.save(state, write_checkpoint)

            before = measure(actor, envs, config.eval, record, "before", env_steps=0)
            state = resume(checkpoints, record, side, collector)
            for number, loss in enumerate(losses, start=1):
                record.alarm(f"restart {number}", loss)
            if state is None:
                state = TrainState(
                    iterations=0,
                    env_steps=0,
                    difficulty={name: rate["success"] for name, rate in before.by_task.items()},
                    unseen_evaluation=before.name,
                    metrics_bytes=record.metrics_bytes(),
                    success=before.success,
                    watch=asdict(Watch()) if config.safeguard.enabled else None,
                )
                save(state)

            first = state.iterations
            for iteration in range(state.iterations, config.iterations):
                started = record.minutes()
                limit = limit_reached(config, started, state.env_steps)
                if limit:
                    record.progress.note(f"{limit} are over after {iteration} iterations")
                    record.tick(now=True)
                    if iteration % config.save_every:
                        save(state)
                    break
                difficulty = state.difficulty

                def states_of(iteration: int, difficulty: dict[str, float] = difficulty) -> list[int]:
                    weights = task_weights(config, envs.spec.task_names(), difficulty)
                    size = config.algo.group_size
                    states = training_states(
                        envs.spec, weights, config.episodes_per_iteration // size, seed=config.seed, iteration=iteration
                    )
                    return repeat_states(states, size)

                if group.size > 1:
                    group.broadcast(["iterate", iteration, states_of(iteration)])
                with traced(trace_of(config, record.folder, iteration, first)):
                    rollout = collector.take(iteration, states_of)
                    collected = record.minutes()

                    stale = drop_stale(rollout, iteration, config.max_staleness)
                    judged = add_advantages(rollout, config.algo, group)
                    add_teacher_weight(rollout, envs.spec, config.algo.teacher)
                    updated = learner.update(rollout, iteration, consume=True)
                rollout = of_all_ranks(rollout, group)
                incidents = incidents_of_all_ranks(envs, group)

                env_steps = state.env_steps + int(rollout["next", "executed_steps"].sum())
                row: dict[str, Any] = {
                    "kind": "iteration",
                    "iteration": iteration,
                    "env_steps": env_steps,
                    "minutes": record.minutes(),
                    **describe(rollout),
                    **describe_tasks(rollout, envs.spec),
                    **describe_incidents(incidents),
                    "rollout/stale_decisions": stale,
                    **judged,
                    **updated,
                    **({"optim/caution": learner.caution} if config.safeguard.enabled else {}),
                    "time/rollout_s": 60 * (collected - started),
                    "time/update_s": 60 * (record.minutes() - collected),
                    **collector.clock.row(),
                    "time/save_s": saving.seconds.pop("save", 0.0),
                    **memory_row(actor.device),
                }
                if state.unseen_evaluation is not None and config.schedule is not Schedule["async"]:
                    # The rollout and the last evaluation had the same weights: the samplers alone differ.
                    evaluation = Evaluation.read(record.folder / "evaluations" / f"{state.unseen_evaluation}.json")
                    row["rollout/sde_gap"] = sde_gap(row, evaluation)
                # Or the next one would be collected beside it.
                del rollout
                seconds = row["time/rollout_s"] + row["time/update_s"] * (config.schedule is Schedule["async"])
                row["speed/env_steps_per_s"] = row["rollout/env_steps"] / seconds
                record.log(row)
                record.progress.iteration(row)
                sound_alarms(record, row, config.algo, side.sampler.exploration(config.algo))
                watch = guard(config.safeguard, row, state, checkpoints, record, go_back)
                for incident in incidents:
                    record.restart(f"iteration {iteration}", incident)
                measured: Evaluation | None = None
                if config.eval.every and (iteration + 1) % config.eval.every == 0:
                    collector.drain()
                    quarter = replace(config.eval, trials=-(-config.eval.trials // 4), noise_seeds=1)
                    measured, _ = evaluate(actor, envs, quarter, name=f"iteration-{iteration + 1:04d}")
                    record.evaluation(measured, env_steps)
                state = TrainState(
                    iterations=iteration + 1,
                    env_steps=env_steps,
                    difficulty=(
                        state.difficulty
                        if measured is None
                        else {name: rate["success"] for name, rate in measured.by_task.items()}
                    ),
                    unseen_evaluation=None if measured is None else measured.name,
                    metrics_bytes=record.metrics_bytes(),
                    success=None if measured is None else measured.success,
                    watch=watch,
                )
                # One that was measured may become the best.
                if measured or (iteration + 1) % config.save_every == 0 or iteration + 1 == config.iterations:
                    save(state)

            collector.drain()
            save_policy(policy, record.folder / "policy")
            after = measure(actor, envs, config.eval, record, "after", env_steps=state.env_steps)

            comparison = compare(before, after)
            record.write_json("comparison.json", comparison)
            summary = {
                "task": before.task,
                "success_before": before.success,
                "success_after": after.success,
                "trials": before.trials,
                "p_value": comparison["p_value"],
                **({"by_task": comparison["by_task"]} if "by_task" in comparison else {}),
                **({"notes": before.notes} if before.notes else {}),
                "env_steps": state.env_steps,
                "minutes": round(record.minutes(), 2),
                "report": str(record.folder / "report.html"),
            }
            record.finish(summary)
            write_report(record.folder)
            group.broadcast(["stop"])
            return summary
    finally:
        if collector is not None:
            collector.close()
        envs.close()


def return_to(side: Side, folder: Path, caution: float) -> None:
    """Go back to a checkpoint's weights and optimizers, and on more slowly than it did."""
    load_checkpoint(side, folder)
    side.learner.caution = caution


def limit_reached(config: TrainConfig, minutes: float, env_steps: int) -> str:
    """The limit that ends a run before its iterations do, as one would type it; empty while there is none."""
    if config.max_minutes is not None and minutes >= config.max_minutes:
        return f"max_minutes={config.max_minutes:g}"
    if config.max_env_steps is not None and env_steps >= config.max_env_steps:
        return f"max_env_steps={config.max_env_steps}"
    return ""


def follow(config: TrainConfig, group: Group) -> None:
    """What every rank but the first does: its share of each iteration, when rank 0 says so."""
    side = prepare(config, group)
    with group.together():
        envs = open_envs(config.suite, workers_of(config.workers, group), config.cluster)
    collector = collector_of(side, envs, lambda _: None)
    try:
        while True:
            match group.broadcast(None):
                case ["iterate", int(iteration), states]:
                    rollout = collector.take(iteration, lambda _, states=states: states)  # type: ignore[misc]
                    add_advantages(rollout, config.algo, group)
                    add_teacher_weight(rollout, envs.spec, config.algo.teacher)
                    side.learner.update(rollout, iteration, consume=True)
                    of_all_ranks(rollout, group)
                    incidents_of_all_ranks(envs, group)
                    del rollout
                case ["save"]:
                    side.learner.state_dict()
                case ["load", str(folder)]:
                    load_checkpoint(side, Path(folder))
                case ["return", str(folder), float(caution)]:
                    return_to(side, Path(folder), caution)
                case _:
                    return
    finally:
        envs.close()


def collector_of(side: Side, envs: Envs, on_episodes: Callable[[int], None]) -> Collector:
    """What collects this rank's part of each iteration's episodes, on its own simulators and its own device."""
    teacher = side.learner.teacher
    return make_collector(
        side.config,
        side.group,
        side.policy,
        side.value_head,
        envs,
        side.sampler,
        side.actor,
        on_episodes,
        store_inputs=teacher is not None and not teacher.reads_contexts,
    )


def incidents_of_all_ranks(envs: Envs, group: Group) -> list[Incident]:
    """What has gone wrong with simulators and was mended."""
    parts = group.gather([asdict(incident) for incident in envs.take_incidents()])
    return [Incident(**incident) for part in parts for incident in part]


def workers_of(workers: WorkersConfig, group: Group) -> WorkersConfig:
    """A rank's part of the simulators, at least one actor."""
    if group.size == 1:
        return workers
    return replace(workers, num_actors=max(1, share(workers.num_actors or os.cpu_count() or 1, group)[1]))


def of_all_ranks(rollout: TensorDict, group: Group) -> TensorDict:
    """What came of the episodes of all ranks, in the order of their numbers: ``valid`` and what `describe` and
    `describe_tasks` read."""
    if group.size == 1:
        return rollout
    keys = ("valid", "initial_state", ("next", "success"), ("next", "executed_steps"))
    parts = group.gather([rollout[key].tolist() for key in keys])
    longest = max(len(row) for part in parts for row in part[0])
    num_episodes = sum(len(part[0]) for part in parts)
    whole = TensorDict({}, batch_size=[num_episodes, longest])
    for index, key in enumerate(keys):
        rows = [row + [0] * (longest - len(row)) for part in parts for row in part[index]]
        whole[key] = torch.tensor(rows, dtype=rollout[key].dtype)
    return whole


def load_checkpoint(side: Side, folder: Path) -> None:
    """Go on from a checkpoint's weights and optimizers."""
    with side.group.together():
        load_weights(side.policy, folder / "policy" / "model.safetensors")
        state = torch.load(folder / "learner.pt", weights_only=True, map_location="cpu")
    side.learner.load_state_dict(state)


def resume(checkpoints: Checkpoints, record: Run, side: Side, collector: Collector) -> TrainState | None:
    """Put the newest good checkpoint into the learners of all ranks; None where there is none yet.

    Raises:
        ValueError: as `Checkpoints.newest`.
    """
    damaged: list[str] = []
    found = checkpoints.newest(damaged.append)
    if found is None:
        return None
    folder, state = found
    side.group.broadcast(["load", str(folder)])
    load_checkpoint(side, folder)
    collector.load(folder)
    record.truncate_metrics(state.metrics_bytes)
    for problem in damaged:
        record.alarm(f"iteration {state.iterations}", problem)
    record.progress.note(f"going on after iteration {state.iterations}, from {folder}")
    return state


@torch.no_grad()
def add_advantages(rollout: TensorDict, algo: AlgoConfig, group: Group = ALONE) -> dict[str, float]:
    """GAE over chunks; one advantage per decision, normalised over the whole iteration, of all ranks. Without a critic
    episodes are judged (`rlvla.judging`).

    Returns:
        What there is to log of it.
    """
    if not algo.has_critic:
        return judge(rollout, algo, group)
    steps = rollout["next", "executed_steps"]
    ended = rollout["next", "terminated" if algo.bootstrap_time_limit else "done"]
    per_step = algo.discount is Discount.per_step
    advantage, value_target = generalized_advantage_estimate(
        reward=rollout["next", "reward"],
        value=rollout["state_value"],
        next_value=rollout["next", "state_value"],
        terminated=ended,
        # Past an episode's end the rows are padding: they count as done, so nothing flows back from them.
        done=rollout["next", "done"] | ~rollout["valid"],
        discount=algo.gamma ** (steps if per_step else torch.ones_like(steps)),
        gae_lambda=algo.gae_lambda,
    )
    rollout["value_target"] = value_target
    if algo.normalize_advantage:
        advantage = normalize_advantage(advantage, rollout["valid"], group.moments)
    rollout["advantage"] = advantage
    return {}
