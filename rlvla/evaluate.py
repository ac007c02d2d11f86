"""`rlvla eval`: success on enumerated, held-back initial states, each visited once."""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rlvla.acting import Actor
from rlvla.config import EvalConfig, EvaluateConfig
from rlvla.policies.folder import load_policy
from rlvla.report import write_report
from rlvla.rollout import play
from rlvla.run import Run, pick_device, require_fresh
from rlvla.seeding import Stream, keyed_rng
from rlvla.workers import Envs, Round, open_envs
from rlvla_algos.statistics import mcnemar_exact, paired_difference_interval, wilson_interval
from rlvla_envs.base import EnvSpec, Observation, require_match

Frames = dict[tuple[int, int], Observation]
"""What each episode saw at each decision, by (row of the evaluation, decision)."""


@dataclass(frozen=True)
class Evaluation:
    """One measurement, with everything it depends on."""

    name: str
    suite: str
    task: str
    sampler: str
    images: str
    """own, or shuffled: every episode shown another one's images."""
    temperature: float
    seed: int
    max_episode_steps: int
    trials: int
    successes: int
    success: float
    interval: tuple[float, float]
    """Wilson, 95%."""
    outcomes: list[int]
    """1 where the episode from the initial state of the same index succeeded."""
    initial_states: list[int]
    """Every state once for each noise seed: all of them with the first, then all with the second."""
    executed_steps: list[int]
    noise_seeds: int
    task_index: list[int]
    """Of each episode, into the keys of ``by_task``."""
    by_task: dict[str, dict[str, Any]]
    """trials, successes, success and interval of each task; one entry where the suite has one task."""
    chunk_size: int
    variant: str
    """`EnvSpec.variant`."""
    metrics: dict[str, float]
    """Means over episodes of what else the suite measured, at each episode's end: for example success by another
    rule."""
    metrics_by_task: dict[str, dict[str, float]]
    notes: list[str]
    """What a reader of the numbers has to know, from the suite: for example that an asset is a stand-in."""

    def first_noise_seed(self) -> "Evaluation":
        """The part of the measurement that used the first noise seed."""
        trials = self.trials // self.noise_seeds
        total = sum(self.outcomes[:trials])
        return dataclasses.replace(
            self,
            noise_seeds=1,
            trials=trials,
            successes=total,
            success=total / trials,
            interval=wilson_interval(total, trials),
            outcomes=self.outcomes[:trials],
            initial_states=self.initial_states[:trials],
            executed_steps=self.executed_steps[:trials],
            task_index=self.task_index[:trials],
            by_task=_by_task(tuple(self.by_task), self.task_index[:trials], self.outcomes[:trials]),
            # They are means over all seeds; those of one are not kept.
            metrics={},
            metrics_by_task={},
        )


def evaluate(
    actor: Actor,
    envs: Envs,
    config: EvalConfig,
    *,
    name: str,
    shown: Frames | None = None,
    on_episodes: Callable[[int], None] = lambda _: None,
) -> tuple[Evaluation, Frames]:
    """Integrate the ODE from keyed noise on the held-back states of each task.

    The result depends on weights, states and settings alone: not on the number of environments or actors.

    Args:
        shown: the frames of an earlier evaluation on the same states. When given, every episode sees what its
            donor (`image_donors`) saw at the same decision: the shuffled-image probe.

    Returns:
        The measurement, and the frames every episode saw with the first noise seed.
    """
    spec = envs.spec
    enumerated = evaluation_states(spec, config.trials)
    states = enumerated * config.noise_seeds
    tasks = [spec.task_of(state) for state in states]
    donors = image_donors(tasks)
    success = np.zeros(len(states), dtype=np.int64)
    steps = np.zeros(len(states), dtype=np.int64)
    beside: dict[str, np.ndarray] = {}
    seen: Frames = {}
    ended = 0

    def decide(observation: Observation, episode: np.ndarray, decision: np.ndarray) -> np.ndarray:
        for i, (e, t) in enumerate(zip(episode, decision, strict=True)):
            if e < len(enumerated):
                seen[int(e), int(t)] = observation.row(i)
        if shown is not None:
            observation = _swap_images(observation, shown, donors, episode, decision)
        rngs = [
            keyed_rng(config.seed + e // len(enumerated), Stream.EVALUATION, states[e], int(t))
            for e, t in zip(episode.tolist(), decision, strict=True)
        ]
        return actor.decide(observation, rngs, temperature=config.temperature).decision.action

    for turn in play(envs, states, decide):
        success[turn.episode] |= turn.result.success
        steps[turn.episode] += turn.result.executed_steps
        for metric, values in turn.result.metrics.items():
            # Of an episode's decisions the last one stays.
            beside.setdefault(metric, np.zeros(len(states)))[turn.episode] = values
        ended += int(turn.result.done.sum())
        on_episodes(ended)
    total = int(success.sum())
    measured = Evaluation(
        name=name,
        suite=spec.suite,
        task=spec.task,
        sampler="ode",
        images="own" if shown is None else "shuffled",
        temperature=config.temperature,
        seed=config.seed,
        max_episode_steps=spec.max_episode_steps,
        trials=len(states),
        successes=total,
        success=total / len(states),
        interval=wilson_interval(total, len(states)),
        outcomes=success.tolist(),
        initial_states=states,
        executed_steps=steps.tolist(),
        noise_seeds=config.noise_seeds,
        task_index=tasks,
        by_task=_by_task(spec.task_names(), tasks, success.tolist()),
        chunk_size=spec.chunk_size,
        variant=spec.variant,
        metrics={metric: float(values.mean()) for metric, values in beside.items()},
        metrics_by_task={
            task: {metric: float(values[np.array(tasks) == i].mean()) for metric, values in beside.items()}
            for i, task in enumerate(spec.task_names())
        },
        notes=list(spec.notes),
    )
    return measured, seen


def evaluation_states(spec: EnvSpec, trials: int) -> list[int]:
    """``trials`` enumerated states of each task, or all it has.

    Where a suite enumerates tasks the choice is spread evenly over each one's list, whose neighbours are alike;
    elsewhere states are independent draws and the first ones will do.
    """
    if not spec.tasks:
        return list(range(min(trials, spec.num_evaluation_states)))
    counts = spec.evaluation_states_per_task
    starts = np.cumsum([0, *counts[:-1]]).tolist()
    return [
        start + i * count // min(trials, count)
        for start, count in zip(starts, counts, strict=True)
        for i in range(min(trials, count))
    ]


def _by_task(names: tuple[str, ...], task_index: list[int], outcomes: list[int]) -> dict[str, dict[str, Any]]:
    table: dict[str, dict[str, Any]] = {}
    for task, name in enumerate(names):
        of_task = [outcome for index, outcome in zip(task_index, outcomes, strict=True) if index == task]
        total, trials = sum(of_task), len(of_task)
        rate = {"trials": trials, "successes": total, "success": total / trials}
        table[name] = {**rate, "interval": list(wilson_interval(total, trials))}
    return table


def measure(actor: Actor, envs: Envs, config: EvalConfig, record: Run, name: str, *, env_steps: int = 0) -> Evaluation:
    """Success on all held-back states, the shuffled-image probe and the filmed episodes, all written to the run."""
    states = len(evaluation_states(envs.spec, config.trials))
    once = dataclasses.replace(config, noise_seeds=1)
    total, done = states * (config.noise_seeds + config.shuffled_images), 0

    def show(n: int) -> None:
        record.progress.bar(f"evaluation {name}", done + n, total)

    own, frames = evaluate(actor, envs, config, name=name, on_episodes=show)
    record.evaluation(own, env_steps)
    if config.shuffled_images:
        done = states * config.noise_seeds
        blind, _ = evaluate(actor, envs, once, name=f"{name}-shuffled", shown=frames, on_episodes=show)
        record.evaluation(blind, env_steps)
        sighted = own.first_noise_seed()
        difference = compare(blind, sighted)
        record.update_json(
            "probe.json",
            {name: {"own": sighted.success, "shuffled": blind.success, "p_value": difference["p_value"]}},
        )
        if difference["p_value"] > 0.05 or sighted.success <= blind.success:
            record.alarm(
                f"evaluation {name}",
                f"the policy may be blind: success {sighted.success:.2f} with its own images, "
                f"{blind.success:.2f} with another environment's (p = {difference['p_value']:.2g})",
            )
    videos = film(actor, envs, config, record.folder / "videos", name)
    if videos:
        record.update_json("videos/index.json", videos)
    return own


PAIRED = (
    *("suite", "task", "variant", "chunk_size", "max_episode_steps", "initial_states", "task_index"),
    *("temperature", "sampler", "seed", "noise_seeds", "notes"),
)
"""What two measurements must share to be compared pair by pair."""


def compare(before: Evaluation, after: Evaluation) -> dict[str, Any]:
    """Paired comparison on common initial states at the same settings.

    Raises:
        ValueError: the two were not measured alike.
    """
    for setting in PAIRED:
        a, b = getattr(before, setting), getattr(after, setting)
        if a != b:
            raise ValueError(f"cannot compare {before.name} and {after.name}: {setting} is {a} and {b}.")
    whole = _compare(before.outcomes, after.outcomes)
    if len(before.by_task) == 1:
        return whole
    by_task = {}
    for task, name in enumerate(before.by_task):
        mine = [i for i, index in enumerate(before.task_index) if index == task]
        by_task[name] = _compare([before.outcomes[i] for i in mine], [after.outcomes[i] for i in mine])
    return whole | {"by_task": by_task}


def _compare(before: list[int], after: list[int]) -> dict[str, Any]:
    first, second = [bool(x) for x in before], [bool(x) for x in after]
    share = [sum(outcomes) / len(outcomes) for outcomes in (first, second)]
    return {
        "before": share[0],
        "after": share[1],
        "trials": len(first),
        "gained": sum(b and not a for a, b in zip(first, second, strict=True)),
        "lost": sum(a and not b for a, b in zip(first, second, strict=True)),
        "kept": sum(a and b for a, b in zip(first, second, strict=True)),
        "p_value": mcnemar_exact(first, second),
        "difference": share[1] - share[0],
        "interval": list(paired_difference_interval(first, second)),
    }


def filmed_states(spec: EnvSpec, config: EvalConfig) -> list[int]:
    """The first state of every task, then the second of every task, until there are `videos`."""
    of_task: dict[int, list[int]] = {}
    for state in evaluation_states(spec, config.trials):
        of_task.setdefault(spec.task_of(state), []).append(state)
    turns = itertools.chain.from_iterable(itertools.zip_longest(*of_task.values()))
    return [state for state in turns if state is not None][: config.videos]


def film(actor: Actor, envs: Envs, config: EvalConfig, folder: Path, phase: str) -> list[dict[str, Any]]:
    """Play some held-back states once more, each task's first ones, filming every step; returns the index entries."""
    entries: list[dict[str, Any]] = []
    for state in filmed_states(envs.spec, config):
        frames, success, instruction = _film_episode(actor, envs, config, state)
        if not frames:
            return []
        folder.mkdir(parents=True, exist_ok=True)
        file = f"{phase}-{state}.mp4"
        _write_video(folder / file, frames, envs.spec.control_hz)
        entries.append(
            {
                "file": file,
                "phase": phase,
                "initial_state": state,
                "success": success,
                "instruction": instruction,
            }
        )
    return entries


def _film_episode(actor: Actor, envs: Envs, config: EvalConfig, state: int) -> tuple[list[np.ndarray], bool, str]:
    empty = np.zeros(0, dtype=np.int64)
    nothing = np.zeros((0, 1, 1), dtype=np.float32)
    slot = np.zeros(1, dtype=np.int64)
    observation, _ = envs.advance(Round(slot, np.array([state], dtype=np.int64), empty, nothing))
    assert observation is not None
    first = envs.film(0)
    if first is None:
        return [], False, ""
    frames, decision = [first], 0
    while True:
        rng = keyed_rng(config.seed, Stream.EVALUATION, state, decision)
        chunk = actor.decide(observation, [rng], temperature=config.temperature).decision.action
        for h in range(chunk.shape[1]):
            _, result = envs.advance(Round(empty, empty, slot, chunk[:, h : h + 1]))
            assert result is not None
            frame = envs.film(0)
            assert frame is not None
            frames.append(frame)
            if result.done[0]:
                # Hold the last frame for a moment: the eye wants to see how it ended.
                return frames + [frame] * 10, bool(result.success[0]), observation.instruction[0]
            observation = result.observation
        decision += 1


def _write_video(path: Path, frames: Sequence[np.ndarray], fps: float) -> None:
    import imageio.v2 as imageio

    # yuv420p plays in every browser; it needs even sides, which our frames have.
    writer: Any
    with imageio.get_writer(path, fps=fps, codec="libx264", macro_block_size=2, quality=7) as writer:
        for frame in frames:
            writer.append_data(frame)


def _swap_images(
    observation: Observation, shown: Frames, donors: Sequence[int], episode: np.ndarray, decision: np.ndarray
) -> Observation:
    """Images of the donor's episode at the same decision, or its last one; instruction and state stay."""
    frames = []
    for e, t in zip(episode, decision, strict=True):
        donor, last = donors[int(e)], int(t)
        while (donor, last) not in shown:
            last -= 1
        frames.append(shown[donor, last])
    return Observation(Observation.concatenate(frames).images, observation.instruction, observation.state)


def image_donors(tasks: Sequence[int]) -> list[int]:
    """Whose images each episode is shown in the probe: those of the same task, half its list away.

    Enumerated suites put layouts that share an object's place beside each other; a neighbour's image would show almost
    the truth.
    """
    donors = [0] * len(tasks)
    for task in set(tasks):
        mine = [i for i, t in enumerate(tasks) if t == task]
        for i, episode in enumerate(mine):
            donors[episode] = mine[(i + max(1, len(mine) // 2)) % len(mine)]
    return donors


def run(config: EvaluateConfig) -> dict[str, Any]:
    """Measure ``config.policy`` on ``config.suite``; the result is under ``config.output``."""
    device = pick_device(config.device)
    policy = load_policy(Path(config.policy), device)
    require_fresh(config.output)
    actor = Actor(policy, block=config.inference_batch, device=device)
    envs = open_envs(config.suite, config.workers)
    try:
        require_match(policy.env_spec, envs.spec)
        with Run.open(config, "eval", total=config.eval.trials) as record:
            own = measure(actor, envs, config.eval, record, "eval")
            write_report(record.folder)
    finally:
        envs.close()
    return {
        "task": own.task,
        "success": own.success,
        "interval": list(own.interval),
        "trials": own.trials,
        "temperature": own.temperature,
        **({"by_task": own.by_task} if len(own.by_task) > 1 else {}),
        **({"metrics": own.metrics} if own.metrics else {}),
        **({"notes": own.notes} if own.notes else {}),
        "policy": config.policy,
        "report": str(Path(config.output) / "report.html"),
    }
