"""`rlvla tune`: try settings of `rlvla train`, stop what does badly early, keep what does best.

A trial is one or more ordinary training runs in child processes; the study is a journal of what was asked and told. A
study that was stopped, however, goes on with the same command: trials that ran go on where their runs were.
"""

import contextlib
import dataclasses
import json
import math
import os
import shutil
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any, Self

from rlvla import tune_space as spaces
from rlvla.config import ConfigError, EvalConfig, TrainConfig, WorkerKind
from rlvla.config.tune import Sampler, TuneConfig
from rlvla.report import write_report
from rlvla.run import Run, check_output, pick_device
from rlvla.svg import number as short
from rlvla.svg import percent
from rlvla.tune_halving import every, goes_on, rung_iterations, step_of
from rlvla.tune_process import TrialProcess, end_all, read_checkups, read_env_steps, read_result
from rlvla.tune_report import StudyView, best_of, write_best, write_study_report
from rlvla.tune_space import Space
from rlvla.tune_study import Study, TrialRecord
from rlvla.tune_words import train_words
from rlvla_algos.statistics import pooled_lower_bound
from rlvla_envs.suites import available_mb, check_suite

POLL_S = 0.3
RUN_MB = 3000
"""What a run may take, with its simulators: the PPO stage of the CPU recipe took 3.1 GB."""


def run(config: TuneConfig) -> dict[str, Any]:
    """Search ``config.tune.space``. Everything it writes is under ``config.output``.

    Returns:
        The summary: best trial, its success and lower bound, the command's own settings' success where they were tried,
        trials by how they ended, environment steps, minutes.

    Raises:
        ConfigError: the space has an option that does not exist or a range that cannot run, or the folder holds
            another study.
        RuntimeError: the first trials all died.
    """
    check_suite(config.suite)
    if not (Path(config.policy) / "config.yaml").is_file():
        raise ConfigError(f"policy is {config.policy}, which is no policy folder. Give what `rlvla sft` wrote.")
    space = spaces.read_space(config.tune.space)
    spaces.check_space(space, config)
    planned = _plan(config, space)
    base = _trial_config(config)
    words, best_words = train_words(base), train_words(_best_config(config))
    parallel = config.tune.parallel or _parallel(config)
    _require_space(Path(config.output), space)
    _reopen(config)
    with _Interrupts() as interrupts, Run.open(config, "tune", total=config.tune.trials) as record:
        if not (record.folder / "space.json").exists():
            record.write_json("space.json", spaces.to_text(space))
        study = Study(
            record.folder / "journal.log",
            space,
            config.tune.sampler,
            seed=config.seed,
            startup=max(4, config.tune.trials // 3),
            liar=parallel > 1,
        )
        return _Search(config, base, space, words, best_words, study, record, parallel, interrupts).run(planned)


@dataclass
class _Active:
    """A trial that is running."""

    number: int
    values: Mapping[str, spaces.Value]
    seed: int
    process: TrialProcess
    slot: int


class _Search:
    def __init__(
        self,
        config: TuneConfig,
        base: TrainConfig,
        space: Space,
        words: list[str],
        best_words: list[str],
        study: Study,
        record: Run,
        parallel: int,
        interrupts: "_Interrupts",
    ) -> None:
        self.config, self.space, self.words, self.best_words = config, space, words, best_words
        self.study, self.record, self.parallel, self.interrupts = study, record, parallel, interrupts
        self.active: list[_Active] = []
        self.z = NormalDist().inv_cdf(0.5 + config.tune.confidence / 2)
        tune = config.tune
        self.rungs = rung_iterations(config.iterations, base.eval.every, rungs=tune.rungs, halving=tune.halving)
        self.failed_at_first: list[TrialRecord] = []
        self.any_lived = False

    def run(self, planned: "_Plan") -> dict[str, Any]:
        if planned.own is not None:
            self.study.plan([planned.own], own=True)
        elif self.config.tune.own_settings:
            self.record.progress.note("the command's own settings lie outside the search space and are not tried")
        self.study.plan(planned.grid)
        waiting = self.study.interrupted()
        if waiting:
            numbers = ", ".join(str(trial.number) for trial in waiting)
            self.record.progress.note(f"going on with trials {numbers}, which were running when the study was stopped")
        self._show()
        try:
            while True:
                self.interrupts.check()
                while len(self.active) < self.parallel and (waiting or self._more()):
                    self._begin(waiting.pop(0) if waiting else self.study.ask())
                if not self.active:
                    break
                for active in list(self.active):
                    self._watch(active)
                self.record.tick()
                time.sleep(POLL_S)
        finally:
            if self.active:
                self.record.progress.note("stopping the runs; the same command goes on with them")
            end_all([active.process for active in self.active], self.config.tune.grace_s)
        return self._summary()

    def _more(self) -> bool:
        trials = self.study.trials()
        budget = self.config.tune.budget
        spent = sum(trial.env_steps for trial in trials)
        return len(trials) < self.config.tune.trials and (budget is None or spent < budget)

    def _folder(self, number: int, seed: int) -> Path:
        return self.record.folder / "trials" / f"{number:04d}" / f"seed-{seed}"

    def _begin(self, trial: TrialRecord) -> None:
        """Start a trial, or go on with one that was interrupted, at whatever moment that was."""
        state = None
        if any(not rung["goes_on"] for rung in trial.rungs.values()):
            state = "stopped"
        elif trial.results:
            state = self._judged(trial.number, len(trial.results) - 1)
        if state is not None:
            self._end(trial.number, state)
        else:
            self._start(trial.number, trial.values, len(trial.results), self._free_slot())

    def _free_slot(self) -> int:
        return min(set(range(self.parallel)) - {active.slot for active in self.active})

    def _start(self, number: int, values: Mapping[str, spaces.Value], index: int, slot: int) -> None:
        """Start the run of a trial's next seed."""
        seed = self.config.seed + index
        words = [*self.words, *spaces.words(values), f"seed={seed}"]
        process = TrialProcess(words, self._folder(number, seed), self._environment(slot))
        self.active.append(_Active(number, values, index, process, slot))

    def _environment(self, slot: int) -> dict[str, str]:
        threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"} if self.parallel > 1 else {}
        gpus = _gpus(self.config.device)
        return threads | ({"CUDA_VISIBLE_DEVICES": gpus[slot % len(gpus)]} if len(gpus) > 1 else {})

    def _watch(self, active: _Active) -> None:
        status = active.process.poll()
        if active.seed == 0:
            for checkup in read_checkups(active.process.folder):
                at = checkup.iteration
                if at in self.rungs and not self._passes(
                    active.number, 0, at, checkup.successes, checkup.trials, f"iteration {at}"
                ):
                    active.process.end(self.config.tune.grace_s)
                    write_report(active.process.folder)
                    self._leave(active, "stopped")
                    return
        if status is None:
            return
        # A run that had ended when its study was killed refuses to begin again; its result is there.
        result = read_result(active.process.folder, self.config.seed + active.seed)
        if result is None or (status != 0 and not (active.process.folder / "report.html").exists()):
            self._leave(active, "failed", active.process.error())
            return
        self._seed_ended(active, result)

    def _seed_ended(self, active: _Active, result: dict[str, Any]) -> None:
        self.study.add_result(active.number, result)
        state = self._judged(active.number, active.seed)
        if state is not None:
            self._leave(active, state)
        else:
            self.active.remove(active)
            self._start(active.number, active.values, active.seed + 1, active.slot)

    def _judged(self, number: int, index: int) -> str | None:
        """What a trial is after the seed of that index has ended: complete, stopped, or None where another follows."""
        results = self._find(number).results
        successes, trials = ([r[key] for r in results] for key in ("successes", "trials"))
        self.study.set_objective(number, pooled_lower_bound(successes, trials, self.z))
        if index + 1 == self.config.tune.seeds:
            return "complete"
        where = f"the end of seed {self.config.seed + index}"
        if self.config.tune.rungs and not self._passes(number, index, None, sum(successes), sum(trials), where):
            return "stopped"
        return None

    def _passes(self, number: int, index: int, iteration: int | None, successes: int, trials: int, where: str) -> bool:
        """Whether the trial goes on from this rung; decided once, and remembered."""
        step = step_of(index, iteration, self.config.iterations)
        known = self._find(number).rungs
        if step in known:
            return bool(known[step]["goes_on"])
        others = [
            trial.rungs[step]["successes"] / trial.rungs[step]["trials"]
            for trial in self.study.trials()
            if step in trial.rungs
        ]
        decided = goes_on(successes / trials, others, self.config.tune.halving)
        self.study.add_rung(number, step, successes, trials, decided, where)
        return decided

    def _find(self, number: int) -> TrialRecord:
        return next(trial for trial in self.study.trials() if trial.number == number)

    def _leave(self, active: _Active, state: str, error: str = "") -> None:
        self.active.remove(active)
        self._end(active.number, state, error)

    def _end(self, number: int, state: str, error: str = "") -> None:
        folders = [self._folder(number, self.config.seed + index) for index in range(self.config.tune.seeds)]
        self.study.end(number, state, sum(map(read_env_steps, folders)), error)
        if not self.config.tune.keep_checkpoints:
            for folder in folders:
                shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        trial = self._find(number)
        self.record.progress.note(_line(trial))
        if state == "failed":
            self.record.alarm(f"trial {number}", f"its run died: {error.splitlines()[-1]}")
        view = self._view()
        write_best(view)
        write_study_report(view)
        self._show()
        self._give_up(trial)

    def _give_up(self, trial: TrialRecord) -> None:
        """Stop a study in which nothing works; one that has worked goes on whatever dies."""
        self.any_lived |= trial.state != "failed"
        if trial.state == "failed":
            self.failed_at_first.append(trial)
        if not self.any_lived and len(self.failed_at_first) >= self.config.tune.give_up_after:
            first = self.failed_at_first[0]
            raise RuntimeError(
                f"the first {len(self.failed_at_first)} trials all died, so the study was stopped. "
                f"Trial {first.number} said, in {self._folder(first.number, self.config.seed)}.log:\n{first.error}\n"
                "Once that is mended the same command goes on with other trials."
            )

    def _view(self) -> StudyView:
        return StudyView(
            folder=self.record.folder,
            config=self.config,
            space=self.space,
            words=self.best_words,
            trials=self.study.trials(),
            minutes=self.record.minutes(),
        )

    def _show(self) -> None:
        ended = sum(trial.state != "running" for trial in self.study.trials())
        self.record.progress.bar("trials", ended, self.config.tune.trials)

    def _summary(self) -> dict[str, Any]:
        view = self._view()
        write_best(view)
        write_study_report(view)
        best = best_of(view.trials)
        own = next((trial for trial in view.trials if trial.own), None)
        states = [trial.state for trial in view.trials]
        summary: dict[str, Any] = {
            "ok": best is not None,
            "best_trial": None if best is None else best.number,
            "success": None if best is None else best.success,
            "lower_bound": None if best is None else best.objective,
            "own_success": None if own is None else own.success,
            "settings": {} if best is None else dict(best.values),
            "trials": {state: states.count(state) for state in ("complete", "stopped", "failed")},
            "env_steps": sum(trial.env_steps for trial in view.trials),
            "minutes": round(self.record.minutes(), 2),
            "best": str(self.record.folder / "best.yaml") if best else None,
            "report": str(self.record.folder / "report.html"),
        }
        self.record.finish(summary)
        return summary


class _Interrupts:
    """Ctrl-C that is not lost: Python drops a KeyboardInterrupt that happens to be raised in a callback, for example of
    an import."""

    def __init__(self) -> None:
        self._came = False

    def __enter__(self) -> Self:
        self._before = signal.getsignal(signal.SIGINT)
        # Only the main thread may; elsewhere, as in a notebook's, there is no Ctrl-C to lose.
        with contextlib.suppress(ValueError):
            signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ValueError):
            signal.signal(signal.SIGINT, self._before)

    def _note(self, number: int, frame: object) -> None:
        self._came = True
        raise KeyboardInterrupt

    def check(self) -> None:
        """Raise what was dropped."""
        if self._came:
            raise KeyboardInterrupt


@dataclass(frozen=True)
class _Plan:
    own: dict[str, spaces.Value] | None
    grid: list[dict[str, spaces.Value]]


def _plan(config: TuneConfig, space: Space) -> _Plan:
    """What is tried whatever the sampler says.

    Raises:
        ConfigError: a grid that does not fit into the number of trials.
    """
    own = spaces.own_point(space, config) if config.tune.own_settings else None
    if config.tune.sampler is not Sampler.grid:
        return _Plan(own, [])
    points = spaces.grid(space)
    wanted = len(points) + (own is not None and own not in points)
    if wanted > config.tune.trials:
        raise ConfigError(
            f"tune.trials is {config.tune.trials}; it must be at least {wanted} for this grid"
            f"{' and the own settings' if wanted > len(points) else ''}. Or use tune.sampler=random."
        )
    return _Plan(own, points)


def _trial_config(config: TuneConfig) -> TrainConfig:
    """What every trial has in common."""
    base = TrainConfig(**{f.name: getattr(config, f.name) for f in dataclasses.fields(TrainConfig)})
    tune = config.tune
    spacing = every(config.iterations, rungs=tune.rungs, halving=tune.halving, wanted=config.eval.every)
    actors = config.workers.num_actors or max(1, (os.cpu_count() or 1) // (tune.parallel or _parallel(config)))
    return dataclasses.replace(
        base,
        output=TrainConfig.output,
        seed=TrainConfig.seed,
        eval=dataclasses.replace(config.eval, every=spacing),
        workers=dataclasses.replace(config.workers, num_actors=actors),
    )


def _best_config(config: TuneConfig) -> TrainConfig:
    """What best.yaml is made of: the command's settings, measured as fully as `rlvla train` does."""
    base = TrainConfig(**{f.name: getattr(config, f.name) for f in dataclasses.fields(TrainConfig)})
    return dataclasses.replace(
        base,
        output=TrainConfig.output,
        seed=TrainConfig.seed,
        keep_checkpoints=TrainConfig.keep_checkpoints,
        eval=dataclasses.replace(config.eval, shuffled_images=EvalConfig.shuffled_images, videos=EvalConfig.videos),
    )


def _parallel(config: TuneConfig) -> int:
    """How many runs this machine bears at once."""
    tune = config.tune
    gpus = len(_gpus(config.device))
    if gpus:
        fits: float = gpus
    else:
        # Simulators of a run in Ray take turns with its learner, so a run keeps about one core busy per actor.
        actors = max(1, config.workers.num_actors) if config.workers.kind is WorkerKind.ray else 1
        memory = available_mb()
        fits = min((os.cpu_count() or 1) // actors, math.inf if memory is None else memory // RUN_MB)
    most = max(1, tune.trials // 5) if tune.sampler is Sampler.tpe else tune.trials
    return int(max(1, min(fits, most)))


def _gpus(device: str) -> list[str]:
    """Names of the GPUs that trials may use; none where they run on the CPU."""
    if not pick_device(device).startswith("cuda"):
        return []
    if ":" in device:
        return [device.partition(":")[2]]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible:
        return visible.split(",")
    import torch

    return [str(i) for i in range(torch.cuda.device_count())]


def _reopen(config: TuneConfig) -> None:
    """Take up a finished study again where the command has more trials than it had.

    Raises:
        ConfigError: it was made with other settings.
    """
    path = Path(config.output) / "summary.json"
    try:
        summary = path.read_text()
        begun = json.loads((path.parent / "run.json").read_text())["verb"]
        count = sum(json.loads(summary)["trials"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return
    if begun == "tune" and count < config.tune.trials:
        path.unlink()
        try:
            check_output(config, "tune")
        except ConfigError:
            path.write_text(summary)
            raise


def _require_space(folder: Path, space: Space) -> None:
    """Compare the space with the one that the folder's study began with, if there is one.

    Raises:
        ConfigError: they differ.
    """
    try:
        before = json.loads((folder / "space.json").read_text())
    except (OSError, ValueError):
        return
    differing = spaces.differences(before, spaces.to_text(space))
    if differing:
        raise ConfigError(
            f"{folder} holds a study of another search space: {'; '.join(differing)}. Give the space it began with to "
            "go on with it, or choose another output=."
        )


def _line(trial: TrialRecord) -> str:
    """A trial that ended, for the terminal."""
    rate = "" if trial.success is None else f" {percent(trial.success)}"
    bound = "" if trial.objective is None else f" (at least {percent(trial.objective)})"
    settings = " ".join(f"{key.rsplit('.', 1)[-1]}={_brief(value)}" for key, value in trial.values.items())
    return f"trial {trial.number} {trial.state}:{rate}{bound} {settings}"


def _brief(value: spaces.Value) -> str:
    return value if isinstance(value, str) else short(value)
