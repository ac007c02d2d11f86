"""`rlvla eval`: success on enumerated, held-back initial states, each visited once."""

import dataclasses
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
from torch import nn

from rlvla.acting import Actor
from rlvla.clock import Clock
from rlvla.config import EvalConfig, EvaluateConfig
from rlvla.policies.folder import load_policy
from rlvla.report import write_report
from rlvla.rollout import play
from rlvla.run import Run, check_output, pick_device
from rlvla.samplers import evaluation_sampler
from rlvla.seeding import Stream, keyed_rng
from rlvla.trials import Outcome, Trial, TrialLog, evaluation_states, plan_trials, weights_digest
from rlvla.workers import Envs, Round, open_envs
from rlvla_algos.statistics import mcnemar_exact, paired_difference_interval, wilson_interval
from rlvla_envs.base import EnvSpec, Observation, require_score

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
    """All states with the first noise seed, then those that are visited again with the second, and so on."""
    executed_steps: list[int]
    noise_seeds: int
    """`EvalConfig.noise_seeds`: how many at most."""
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
    policy_sha256: str = ""
    """`weights_digest` of what was measured."""
    quarantined: list[int] = field(default_factory=list)
    """Initial states whose episodes killed their simulator again and again; they count as failures."""

    @classmethod
    def read(cls, path: Path) -> "Evaluation":
        """What `Run.evaluation` wrote."""
        content = json.loads(path.read_text())
        return cls(**content | {"interval": tuple(content["interval"])})

    def first_noise_seed(self) -> "Evaluation":
        """The part of the measurement that used the first noise seed."""
        trials = len(set(self.initial_states))
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
    log: TrialLog | None = None,
    on_episodes: Callable[[int], None] = lambda _: None,
    keep_frames: bool = True,
    clock: Clock | None = None,
) -> tuple[Evaluation, Frames]:
    """Integrate the ODE from keyed noise on the held-back states of each task.

    The result depends on weights, states and settings alone: not on the number of environments or actors, nor on how
    often it was stopped.

    Args:
        shown: the frames of an earlier evaluation on the same states. When given, every episode sees what its
            donor (`image_donors`) saw at the same decision: the shuffled-image probe.
        log: episodes it holds are not played again; every other one is added as it ends.
        keep_frames: False returns none; a suite of many tasks sees gigabytes of them.
        clock: see `rlvla.rollout.play`.

    Returns:
        The measurement, and the frames that the episodes played now saw with the first noise seed.

    Raises:
        ValueError: the suite has assets with which no result counts (`EnvSpec.unscored`).
    """
    spec = envs.spec
    require_score(spec)
    trials = plan_trials(spec, config)
    tasks = [trial.task for trial in trials]
    outcomes = dict(log.outcomes) if log else {}
    missing = [episode for episode in range(len(trials)) if episode not in outcomes]
    seen: Frames = {}

    def keep(episode: int, outcome: Outcome) -> None:
        outcomes[episode] = outcome
        if log:
            log.add(episode, outcome)
        on_episodes(len(outcomes))

    donors = None if shown is None else image_donors(tasks)
    kept = seen if keep_frames else None
    play_trials(actor, envs, config, trials, missing, keep, seen=kept, shown=shown, donors=donors, clock=clock)

    ended = [outcomes[episode] for episode in range(len(trials))]
    success = [outcome.success for outcome in ended]
    total = sum(success)
    measured = Evaluation(
        name=name,
        suite=spec.suite,
        task=spec.task,
        sampler=evaluation_sampler(actor.policy).name,
        images="own" if shown is None else "shuffled",
        temperature=config.temperature,
        seed=config.seed,
        max_episode_steps=spec.max_episode_steps,
        trials=len(trials),
        successes=total,
        success=total / len(trials),
        interval=wilson_interval(total, len(trials)),
        outcomes=success,
        initial_states=[trial.state for trial in trials],
        executed_steps=[outcome.steps for outcome in ended],
        noise_seeds=config.noise_seeds,
        task_index=tasks,
        by_task=_by_task(spec.task_names(), tasks, success),
        chunk_size=spec.chunk_size,
        variant=spec.variant,
        metrics=_means([outcome.metrics for outcome in ended]),
        metrics_by_task={
            task: _means([outcome.metrics for i, outcome in zip(tasks, ended, strict=True) if i == index])
            for index, task in enumerate(spec.task_names())
        },
        notes=list(spec.notes),
        quarantined=[trial.state for trial, outcome in zip(trials, ended, strict=True) if outcome.killed_simulator],
    )
    return measured, seen


def play_trials(
    actor: Actor,
    envs: Envs,
    config: EvalConfig,
    trials: Sequence[Trial],
    chosen: Sequence[int],
    ended: Callable[[int, Outcome], None],
    *,
    seen: Frames | None,
    shown: Frames | None = None,
    donors: Sequence[int] | None = None,
    clock: Clock | None = None,
) -> None:
    """Play the ``chosen`` ones of ``trials`` and tell ``ended`` of each; ``seen`` takes the frames of the first noise
    seed."""
    steps = np.zeros(len(trials), dtype=np.int64)
    success = np.zeros(len(trials), dtype=np.int64)
    number = np.asarray(chosen, dtype=np.int64)

    def decide(observation: Observation, row: np.ndarray, decision: np.ndarray) -> np.ndarray:
        episodes = number[row].tolist()
        for i, (e, t) in enumerate(zip(episodes, decision, strict=True)):
            if seen is not None and trials[e].noise_seed == 0:
                seen[e, int(t)] = observation.row(i)
        if shown is not None and donors is not None:
            observation = _swap_images(observation, shown, donors, number[row], decision)
        rngs = [
            keyed_rng(config.seed + trials[e].noise_seed, Stream.EVALUATION, trials[e].state, int(t))
            for e, t in zip(episodes, decision, strict=True)
        ]
        return actor.decide(observation, rngs, temperature=config.temperature).decision.action

    lost: list[int] = []
    for turn in play(envs, [trials[e].state for e in chosen], decide, clock=clock):
        for row, blamed in turn.lost.items():
            e = int(number[row])
            if blamed:
                # Left out it would leave its pair; a policy that breaks the simulator has not solved the task.
                ended(e, Outcome(0, int(steps[e]), {}, killed_simulator=True))
            else:
                lost.append(e)
            success[e] = steps[e] = 0
        if turn.result is None:
            continue
        episodes = number[turn.episode]
        success[episodes] |= turn.result.success
        steps[episodes] += turn.result.executed_steps
        for i in np.flatnonzero(turn.result.done):
            e = int(episodes[i])
            # Of what the decisions of an episode measured the last one stays.
            metrics = {name: float(values[i]) for name, values in turn.result.metrics.items()}
            ended(e, Outcome(int(success[e]), int(steps[e]), metrics))
    if lost:
        play_trials(actor, envs, config, trials, lost, ended, seen=seen, shown=shown, donors=donors)


def _means(metrics: Sequence[Mapping[str, float]]) -> dict[str, float]:
    names = dict.fromkeys(name for row in metrics for name in row)
    return {name: float(np.mean([row.get(name, 0.0) for row in metrics])) for name in names}


def _by_task(names: tuple[str, ...], task_index: list[int], outcomes: list[int]) -> dict[str, dict[str, Any]]:
    table: dict[str, dict[str, Any]] = {}
    for task, name in enumerate(names):
        of_task = [outcome for index, outcome in zip(task_index, outcomes, strict=True) if index == task]
        total, trials = sum(of_task), len(of_task)
        rate = {"trials": trials, "successes": total, "success": total / trials}
        table[name] = {**rate, "interval": list(wilson_interval(total, trials))}
    return table


def measure(actor: Actor, envs: Envs, config: EvalConfig, record: Run, name: str, *, env_steps: int = 0) -> Evaluation:
    """Success on all held-back states, the shuffled-image probe and the filmed episodes, all written to the run.

    What an earlier process finished is read, not measured again.
    """
    trials = plan_trials(envs.spec, config)
    once = dataclasses.replace(config, noise_seeds=1)
    firsts = [episode for episode, trial in enumerate(trials) if trial.noise_seed == 0]
    digest = weights_digest(cast(nn.Module, actor.policy))
    total, done = len(trials) + len(firsts) * config.shuffled_images, 0

    def show(n: int) -> None:
        record.progress.bar(f"evaluation {name}", done + n, total)
        record.tick()

    def take(part: str, settings: EvalConfig, frames: Frames | None = None) -> tuple[Evaluation, Frames]:
        path = record.folder / "evaluations" / f"{part}.json"
        known = _finished(path, digest)
        if known is not None:
            record.evaluation(known, env_steps)
            return known, {}
        setting = {"settings": dataclasses.asdict(settings), "spec": envs.spec.to_dict(), "policy": digest}
        with TrialLog(path.with_suffix(".episodes.jsonl"), setting) as log:
            if log.outcomes:
                record.progress.note(f"evaluation {part}: {len(log.outcomes)} episodes were played before")
            found, seen = evaluate(actor, envs, settings, name=part, shown=frames, log=log, on_episodes=show)
        found = dataclasses.replace(found, policy_sha256=digest)
        record.evaluation(found, env_steps)
        for incident in envs.take_incidents():
            record.restart(f"evaluation {part}", incident)
        if found.quarantined:
            record.alarm(
                f"evaluation {part}",
                f"initial states {found.quarantined} killed their simulator again and again; counted as failures",
            )
        log.path.unlink()
        return found, seen

    own, frames = take(name, config)
    if config.shuffled_images:
        done = len(trials)
        unseen = [episode for episode in firsts if (episode, 0) not in frames]
        if unseen and _finished(record.folder / "evaluations" / f"{name}-shuffled.json", digest) is None:
            # Frames are not kept on disk; those of episodes that an earlier process played are drawn again.
            play_trials(actor, envs, config, trials, unseen, lambda *_: None, seen=frames)
        blind, _ = take(f"{name}-shuffled", once, frames)
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
    filmed = record.folder / "videos" / "index.json"
    entries = json.loads(filmed.read_text()) if filmed.exists() else []
    if {"phase": name, "policy_sha256": digest}.items() not in [
        {key: entry.get(key) for key in ("phase", "policy_sha256")}.items() for entry in entries
    ]:
        others = [entry for entry in entries if entry["phase"] != name]
        new = film(actor, envs, config, record.folder / "videos", name)
        if new or others != entries:
            record.write_json("videos/index.json", others + [entry | {"policy_sha256": digest} for entry in new])
    return own


def _finished(path: Path, digest: str) -> Evaluation | None:
    """What an earlier process measured of these very weights; None where that is not to be had whole."""
    try:
        found = Evaluation.read(path)
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return found if found.policy_sha256 == digest else None


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


def film(
    actor: Actor, envs: Envs, config: EvalConfig, folder: Path, phase: str, states: Sequence[int] | None = None
) -> list[dict[str, Any]]:
    """Play ``states`` once more, `filmed_states` if none are given, filming every step; returns the index entries."""
    entries: list[dict[str, Any]] = []
    for state in filmed_states(envs.spec, config) if states is None else states:
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
    observation = envs.advance(Round(slot, np.array([state], dtype=np.int64), empty, nothing)).first
    first = None if observation is None else envs.film(0)
    if first is None or observation is None:
        return [], False, ""
    frames, decision = [first], 0
    while True:
        rng = keyed_rng(config.seed, Stream.EVALUATION, state, decision)
        chunk = actor.decide(observation, [rng], temperature=config.temperature).decision.action
        for h in range(chunk.shape[1]):
            result = envs.advance(Round(empty, empty, slot, chunk[:, h : h + 1])).result
            frame = None if result is None else envs.film(0)
            if result is None or frame is None:
                # Its simulator died and the episode could not be played again; the measurement has it all the same.
                return frames, False, observation.instruction[0]
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


def smoke_test(actor: Actor, envs: Envs, config: EvalConfig) -> dict[str, Any]:
    """Play the trials and keep nothing of how they ended: whether policy and suite work together, and no more."""
    trials, steps = plan_trials(envs.spec, config), 0

    def ended(_: int, outcome: Outcome) -> None:
        nonlocal steps
        steps += outcome.steps

    play_trials(actor, envs, config, trials, range(len(trials)), ended, seen=None)
    return {
        "smoke_test": True,
        "suite": envs.spec.suite,
        "episodes": len(trials),
        "env_steps": steps,
        "success": None,
        **({"unscored": envs.spec.unscored} if envs.spec.unscored else {}),
    }


def run(config: EvaluateConfig) -> dict[str, Any]:
    """Measure ``config.policy`` on ``config.suite``; the result is under ``config.output``.

    Raises:
        ValueError: conventions that differ, or a suite whose results would not count.
    """
    device = pick_device(config.device)
    policy = load_policy(Path(config.policy), device)
    check_output(config, "eval")
    actor = Actor(policy, block=config.inference_batch, device=device)
    envs = open_envs(config.suite, config.workers, config.cluster)
    try:
        policy.embody_in(envs.spec)
        if config.smoke_test:
            return smoke_test(actor, envs, config.eval)
        require_score(envs.spec)
        with Run.open(config, "eval", total=config.eval.trials, simulator=envs.versions) as record:
            record.require_policy(weights_digest(policy))
            own = measure(actor, envs, config.eval, record, "eval")
            summary = {
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
            record.finish(summary)
            write_report(record.folder)
            return summary
    finally:
        envs.close()
