"""The options of `rlvla tune`: those of `rlvla train`, and the block `tune`."""

from dataclasses import dataclass, field
from enum import Enum

from rlvla.config.checks import require
from rlvla.config.train import TrainConfig


class Sampler(Enum):
    """What proposes the next trial's settings."""

    tpe = "tpe"
    random = "random"
    grid = "grid"


@dataclass(kw_only=True)
class SearchConfig:
    """How a study looks for settings (docs/how-to/tune.md)."""

    space: str = "ppo"
    """What is searched: the name of a file in configs/space, or the path of a YAML file of the same form."""
    trials: int = 20
    """Settings to try. A finished study goes on when the same command is given with more."""
    sampler: Sampler = Sampler.tpe
    """tpe: near what did well so far. random: anywhere. grid: every combination, each range by its step."""
    seeds: int = 2
    """Training runs of a trial, with seeds `seed`, `seed` + 1 and so on, the same for every trial. Later ones are
    started only while the trial is among the best."""
    parallel: int = 0
    """Runs at once. 0: as many as there are GPUs; without one, as cores and memory allow, but at most a fifth of the
    trials with sampler=tpe, which learns nothing from what has not ended."""
    rungs: int = 2
    """How often a run's first seed is compared with the other trials before its end; 0 stops none early."""
    halving: int = 2
    """A comparison keeps the best 1/halving of the trials that came so far. Each comparison is after halving times as
    many iterations as the one before."""
    confidence: float = 0.95
    """Of the interval of success whose lower end is maximised."""
    own_settings: bool = True
    """The first trial has the settings of the command itself, where they lie in the space: what the others must
    beat."""
    budget: int | None = None
    """Begin no further trial once all runs together have taken so many environment steps; null has no limit. That of
    a single run is max_env_steps."""
    give_up_after: int = 3
    """The study fails when the first so many trials that end have all died."""
    grace_s: float = 30.0
    """How long a run that is stopped may take to end by itself before it is killed."""
    keep_checkpoints: bool = False
    """Keep the checkpoints of trials that have ended. Their policies are kept either way."""

    def __post_init__(self) -> None:
        for name in ("trials", "seeds", "give_up_after"):
            require(getattr(self, name) >= 1, f"tune.{name}", getattr(self, name), "at least 1")
        for name in ("parallel", "rungs"):
            require(getattr(self, name) >= 0, f"tune.{name}", getattr(self, name), "0 or more")
        require(self.halving >= 2, "tune.halving", self.halving, "at least 2")
        require(0 < self.confidence < 1, "tune.confidence", self.confidence, "in (0, 1). Usual: 0.95")
        require(self.budget is None or self.budget > 0, "tune.budget", self.budget, "positive, or null")
        require(self.grace_s > 0, "tune.grace_s", self.grace_s, "positive")


@dataclass(kw_only=True)
class TuneConfig(TrainConfig):
    """`rlvla tune`: look for the settings with which `rlvla train` does best. Takes every option of `rlvla train`."""

    output: str = "runs/tune"
    """Folder of the study; each trial's runs are ordinary run folders under trials/."""
    tune: SearchConfig = field(default_factory=SearchConfig)
