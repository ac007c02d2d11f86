"""The memory of a study: which settings were tried, how far they came. Optuna lives here and nowhere else.

It is a journal that is only ever appended to, so a study that is killed has all that it knew.
"""

import contextlib
import json
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rlvla.config import ConfigError
from rlvla.config.tune import Sampler
from rlvla.tune_space import Choices, Space, Value, fitted

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.samplers import BaseSampler
    from optuna.trial import FrozenTrial

NAME = "rlvla"


@dataclass(frozen=True)
class TrialRecord:
    """One setting and what is known of it."""

    number: int
    state: str
    """running, complete, stopped (by the others' success), failed, or torn: killed before it had its settings."""
    values: Mapping[str, Value]
    objective: float | None
    """Lower confidence bound; of a trial that was stopped, of the seeds it finished, if any."""
    results: Sequence[Mapping[str, Any]] = ()
    """Of each seed that ended: successes, trials, env_steps, minutes."""
    rungs: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    """By `tune_halving.step_of`: successes, trials, goes_on, where."""
    env_steps: int = 0
    """Of all its runs, unfinished ones too."""
    error: str = ""
    own: bool = False
    """It has the settings of the command itself."""

    @property
    def success(self) -> float | None:
        """Over the seeds that ended, or at the last comparison."""
        parts = self.results or [self.rungs[step] for step in sorted(self.rungs)[-1:]]
        total = sum(part["trials"] for part in parts)
        return sum(part["successes"] for part in parts) / total if total else None


class Study:
    """Settings asked for, results told."""

    def __init__(self, path: Path, space: Space, sampler: Sampler, *, seed: int, startup: int, liar: bool) -> None:
        """Open the journal, or begin one.

        Args:
            startup: trials drawn at random before tpe has something to go by.
            liar: with tpe, take what is still running for bad, so that trials at the same time differ.

        Raises:
            ConfigError: the journal is damaged.
        """
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

        class Unlocked(JournalFileOpenLock):
            """The study's folder is locked already; Optuna's own lock would outlive a kill."""

            def acquire(self) -> bool:
                return True

            def release(self) -> None:
                pass

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        _mend(path)
        self._space, self._sampler, self._seed = space, sampler, seed
        self._startup, self._liar = startup, liar
        self._distributions = {key: _distribution(entry) for key, entry in space.items()}
        try:
            storage = JournalStorage(JournalFileBackend(str(path), lock_obj=Unlocked(str(path))))
            self._study = optuna.create_study(
                study_name=NAME, storage=storage, direction="maximize", load_if_exists=True, sampler=self._reseeded()
            )
        except (ValueError, KeyError, AssertionError) as error:
            raise ConfigError(
                f"the study's journal {path} is damaged ({type(error).__name__}: {error}). Take it out of the way, or "
                "choose another output=; the runs under trials/ stand."
            ) from error

    def trials(self) -> list[TrialRecord]:
        """All of them, in order."""
        return [
            self._record(trial)
            for trial in self._study.get_trials(deepcopy=False)
            if trial.state.name != "WAITING" and not trial.user_attrs.get("torn")
        ]

    def interrupted(self) -> list[TrialRecord]:
        """Trials that ran when the study ended. Such as have all their settings go on; the others are given up, and
        what was planned for them is planned again."""
        import optuna

        for trial in self._study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)):
            if trial.params.keys() != self._space.keys():
                self._attach(trial.number).set_user_attr("torn", True)
                self._study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
                planned = trial.system_attrs.get("fixed_params")
                if planned:
                    self._study.enqueue_trial(planned, user_attrs={"own": bool(trial.user_attrs.get("own"))})
        return [record for record in self.trials() if record.state == "running"]

    def plan(self, points: Sequence[Mapping[str, Value]], *, own: bool = False) -> None:
        """Settings to be tried before any are sampled, in this order. Points that are planned or tried are left out."""
        known = [
            trial.system_attrs.get("fixed_params", trial.params) for trial in self._study.get_trials(deepcopy=False)
        ]
        for point in points:
            if dict(point) not in known:
                self._study.enqueue_trial(dict(point), user_attrs={"own": own})

    def ask(self) -> TrialRecord:
        """Begin the next trial."""
        # Drawn by the number of trials so far, not from a stream that a new process would begin anew: it would propose
        # what was tried already.
        self._study.sampler = self._reseeded()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trial = self._study.ask(fixed_distributions=self._distributions)
        return self._find(trial.number)

    def add_rung(self, number: int, step: int, successes: int, trials: int, goes_on: bool, where: str) -> None:
        """What a trial showed when it was compared with the others, and what was decided."""
        trial = self._attach(number)
        trial.report(successes / trials, step)
        rungs = dict(trial.user_attrs.get("rungs", {}))
        rungs[str(step)] = {"successes": successes, "trials": trials, "goes_on": goes_on, "where": where}
        trial.set_user_attr("rungs", rungs)

    def add_result(self, number: int, result: Mapping[str, Any]) -> None:
        """What a seed of the trial came to in the end."""
        trial = self._attach(number)
        trial.set_user_attr("results", [*trial.user_attrs.get("results", []), dict(result)])

    def set_objective(self, number: int, objective: float) -> None:
        """So far: a trial that is stopped later keeps it for the report."""
        self._attach(number).set_user_attr("objective", objective)

    def end(self, number: int, state: str, env_steps: int, error: str = "") -> None:
        """Close a trial as complete, stopped or failed."""
        from optuna.trial import TrialState

        trial = self._attach(number)
        trial.set_user_attr("env_steps", env_steps)
        if error:
            trial.set_user_attr("error", error)
        states = {"complete": TrialState.COMPLETE, "stopped": TrialState.PRUNED, "failed": TrialState.FAIL}
        value = trial.user_attrs["objective"] if state == "complete" else None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._study.tell(number, value, state=states[state])

    def _find(self, number: int) -> TrialRecord:
        return self._record(self._study.get_trials(deepcopy=False)[number])

    def _attach(self, number: int) -> Any:
        import optuna

        return optuna.trial.Trial(self._study, self._study.get_trials(deepcopy=False)[number]._trial_id)

    def _record(self, trial: "FrozenTrial") -> TrialRecord:
        names = {"COMPLETE": "complete", "PRUNED": "stopped", "FAIL": "failed", "RUNNING": "running"}
        said = trial.user_attrs
        whole = trial.params.keys() == self._space.keys()
        own = bool(said.get("own"))
        values = {key: trial.params[key] for key in self._space} if own and whole else {}
        return TrialRecord(
            number=trial.number,
            state=names[trial.state.name],
            values=values or (fitted(self._space, trial.params) if whole else {}),
            objective=said.get("objective"),
            results=said.get("results", []),
            rungs={int(step): rung for step, rung in said.get("rungs", {}).items()},
            env_steps=int(said.get("env_steps", 0)),
            error=said.get("error", ""),
            own=own,
        )

    def _reseeded(self) -> "BaseSampler":
        import optuna

        number = len(self._study.get_trials(deepcopy=False)) if hasattr(self, "_study") else 0
        seed = int(np.random.SeedSequence([self._seed, number]).generate_state(1)[0])
        if self._sampler is Sampler.tpe:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return optuna.samplers.TPESampler(
                    n_startup_trials=self._startup, multivariate=True, constant_liar=self._liar, seed=seed
                )
        return optuna.samplers.RandomSampler(seed=seed)


def _distribution(entry: Any) -> "BaseDistribution":
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(entry, Choices):
        return CategoricalDistribution(entry.values)
    if entry.whole:
        return IntDistribution(int(entry.low), int(entry.high), log=entry.log, step=int(entry.step or 1))
    return FloatDistribution(entry.low, entry.high, log=entry.log, step=entry.step)


def _mend(path: Path) -> None:
    """Drop a last line that a crash cut short; what Optuna would append to it could never be read.

    Raises:
        ConfigError: a line before it is damaged.
    """
    if not path.exists():
        return
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    for number, line in enumerate(content[:whole].splitlines(), start=1):
        try:
            json.loads(line)
        except ValueError as error:
            raise ConfigError(
                f"line {number} of the study's journal {path} is damaged: {error}. Restore the file, or choose another "
                "output=; the runs under trials/ stand."
            ) from error
    if whole < len(content):
        with contextlib.suppress(OSError):
            os.truncate(path, whole)


def importances(space: Space, points: Sequence[tuple[Mapping[str, Value], float]]) -> dict[str, float]:
    """How much each option had to do with being in the best quarter (PED-ANOVA, arXiv 2304.10255), as shares of 1.

    Args:
        points: (settings, success), measured after the same number of iterations.

    Returns:
        The share of each option, the largest first; empty where fewer than eight points or no differences tell
        nothing.
    """
    if len(points) < 8 or len({value for _, value in points}) < 3:
        return {}
    import optuna
    from optuna.importance import PedAnovaImportanceEvaluator
    from optuna.trial import create_trial

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    distributions = {key: _distribution(entry) for key, entry in space.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        study = optuna.create_study(direction="maximize")
        for values, value in points:
            study.add_trial(create_trial(params=dict(values), distributions=distributions, value=value))
        found = PedAnovaImportanceEvaluator(target_quantile=0.25).evaluate(study)
    total = sum(found.values())
    if not total > 0:
        return {}
    return dict(sorted(((key, value / total) for key, value in found.items()), key=lambda item: -item[1]))
