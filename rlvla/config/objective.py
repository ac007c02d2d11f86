"""What is maximised and how episodes are judged: objectives, estimators, the critic's input, demonstrations beside RL
(docs/algorithms.md)."""

import math
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any

from rlvla.config.checks import require


class Objective(Enum):
    """What an update makes of a decision and its advantage."""

    ppo = "ppo"
    fpo = "fpo"
    nft = "nft"
    clone = "clone"


class Estimator(Enum):
    """Where a decision's advantage comes from, or whether it is cloned."""

    gae = "gae"
    grpo = "grpo"
    rloo = "rloo"
    reinforce_pp = "reinforce_pp"
    success = "success"
    best_of_n = "best_of_n"


class CriticPool(Enum):
    """How the tokens of a context become one vector."""

    mean = "mean"
    attention = "attention"


GROUPED = (Estimator.grpo, Estimator.rloo, Estimator.best_of_n)
"""Estimators that compare attempts at one initial state."""
SELECTING = (Estimator.success, Estimator.best_of_n)
"""Estimators that choose episodes instead of judging them."""
CRITICS_OWN = (
    *("value_clip", "value_coef", "value_lr", "value_hidden_sizes"),
    *("gae_lambda", "gamma", "discount"),
)
"""Options that only an estimator with a critic reads."""


@dataclass(kw_only=True)
class CriticConfig:
    """What the critic sees, beside the hidden layers of `algo.value_hidden_sizes`."""

    pool: CriticPool = CriticPool.mean
    """mean: the average over valid VLM tokens, as in the paper. attention: a learned query weighs them, which can find
    the few tokens that matter; trained by the value loss alone, the tokens are detached."""
    time_to_limit: bool = False
    """Also give it the share of the time limit that is left. Without it equal images early and late in an episode have
    one value, although late ones succeed less; pairs with bootstrap_time_limit=false."""


@dataclass(kw_only=True)
class ForwardConfig:
    """Objectives on the forward process of a flow: fpo, nft, and clone."""

    draws: int = 8
    """Noise and flow time pairs a decision, each a pass of the expert in every minibatch and once in the rollout. More
    make the estimate less noisy."""
    nft_beta: float = 1.0
    """How far nft's two implicit policies stand from the old one. Smaller moves further."""
    nft_max_advantage: float = 1.0
    """Advantage from which on a decision counts as wholly good, or bad below minus it."""

    def __post_init__(self) -> None:
        require(self.draws >= 1, "algo.forward.draws", self.draws, "at least 1. Usual: 8 to 16")
        for name in ("nft_beta", "nft_max_advantage"):
            value = getattr(self, name)
            require(0 < value < math.inf, f"algo.forward.{name}", value, "positive and finite. Usual: 1")


@dataclass(kw_only=True)
class CoTrainingConfig:
    """The supervised loss on demonstrations, in every minibatch of an update beside the RL loss."""

    dataset: str | None = None
    """Folder of demonstrations, as `rlvla sft` reads them; null trains on none."""
    weight: float = 0.1
    """Of the supervised loss beside the policy loss."""
    batch_size: int = 32
    """Frames drawn for each minibatch."""
    noise_draws: int = 4
    """Noise and flow time pairs a frame, as in `rlvla sft`; a policy with a distribution has none."""

    def __post_init__(self) -> None:
        require(0 < self.weight < math.inf, "algo.demonstrations.weight", self.weight, "positive. Usual: 0.01 to 1")
        for name in ("batch_size", "noise_draws"):
            require(getattr(self, name) >= 1, f"algo.demonstrations.{name}", getattr(self, name), "at least 1")


@dataclass(kw_only=True)
class ObjectiveConfig:
    """The part of `AlgoConfig` that says what is maximised."""

    objective: Objective = Objective.ppo
    """ppo: clipped likelihood ratio of a stored denoising step, or of the chunk. fpo: the same clip on the ratio of
    flow-matching losses. nft: flow matching towards good and away from bad decisions. clone: imitate chosen episodes, a
    baseline."""
    estimator: Estimator = Estimator.gae
    """gae: a critic. grpo, rloo: attempts at one initial state against each other (group_size). reinforce_pp: against
    all episodes of the iteration, or first against the group. success, best_of_n: which episodes objective=clone
    imitates."""
    group_size: int = 1
    """Episodes that begin in the same initial state, with noise of their own. 4 to 16 for grpo, rloo and best_of_n."""
    min_group_success: float = 0.0
    """Groups with a smaller share of successes are left out of the update. 0.1 leaves out those that all failed."""
    max_group_success: float = 1.0
    """Groups with a larger share are left out. 0.9 leaves out those that all succeeded; neither kind has an advantage
    under grpo or rloo."""
    clip_epsilon_high: float | None = None
    """Half-width of the trust region above 1; null takes clip_epsilon. 0.28 beside 0.2 lets what was unlikely and good
    become likely."""
    critic: CriticConfig = field(default_factory=CriticConfig)
    forward: ForwardConfig = field(default_factory=ForwardConfig)
    demonstrations: CoTrainingConfig = field(default_factory=CoTrainingConfig)

    @property
    def has_critic(self) -> bool:
        return self.estimator is Estimator.gae

    @property
    def has_ratio(self) -> bool:
        return self.objective in (Objective.ppo, Objective.fpo)

    @property
    def has_forward_draws(self) -> bool:
        """Whether the objective of a flow reads its forward process."""
        return self.objective is not Objective.ppo

    def check_objective(self) -> None:
        """Refuse what does not fit together; `AlgoConfig` calls it, because it reads its options."""
        estimator, objective, size = self.estimator, self.objective, self.group_size
        options: Any = self
        require(size >= 1, "algo.group_size", size, "at least 1")
        if estimator in GROUPED:
            require(size >= 2, "algo.group_size", size, f"at least 2 with algo.estimator={estimator.value}. Usual: 8")
        require(
            (estimator in SELECTING) == (objective is Objective.clone),
            "algo.estimator",
            f"{estimator.value} with algo.objective={objective.value}",
            "success or best_of_n with objective=clone, and one of gae, grpo, rloo, reinforce_pp with any other",
        )
        low, high = self.min_group_success, self.max_group_success
        bounds = f"{low:g} and algo.max_group_success {high:g}"
        require(0 <= low < high <= 1, "algo.min_group_success", bounds, "increasing and within [0, 1]")
        require(
            (low, high) == (0, 1) or (size >= 2 and not self.has_critic and estimator not in SELECTING),
            "algo.min_group_success",
            bounds,
            "0 and 1 unless algo.estimator is grpo, rloo or reinforce_pp and algo.group_size at least 2",
        )
        above = self.clip_epsilon_high
        require(
            above is None or (0 < above < math.inf and self.has_ratio),
            "algo.clip_epsilon_high",
            above,
            "positive, or null; and null with an objective that has no ratio (nft, clone). Typical: 0.28",
        )
        require(
            objective is Objective.ppo or not options.sampler.learns,
            "algo.objective",
            objective.value,
            "ppo where the noise is learned (algo.sampler.process=learned or algo.sampler.kind=latent): the forward "
            "process has none of it",
        )
        require(
            self.demonstrations.dataset is None or options.sampler.kind.value != "latent",
            "algo.demonstrations.dataset",
            self.demonstrations.dataset,
            "null with algo.sampler.kind=latent, which leaves the flow as it is",
        )
        self._check_unread()

    def _check_unread(self) -> None:
        """Refuse options that somebody set and that nothing would read."""
        options: Any = self
        if not self.has_critic:
            defaults = {f.name: f.default for f in fields(options)}
            defaults["value_hidden_sizes"] = ()
            changed = {name: getattr(options, name) for name in CRITICS_OWN if getattr(options, name) != defaults[name]}
            changed |= {} if self.critic == CriticConfig() else {"critic": self.critic}
            for name, value in changed.items():
                cure = f"left out: algo.estimator={self.estimator.value} has no critic. Take gae for one"
                require(False, f"algo.{name}", value, cure)
            require(
                options.critic_only_iterations <= 1,
                "algo.critic_only_iterations",
                options.critic_only_iterations,
                f"left out: algo.estimator={self.estimator.value} has no critic. Take gae for one",
            )
        if self.estimator is Estimator.reinforce_pp:
            require(
                options.normalize_advantage,
                "algo.normalize_advantage",
                False,
                "true with algo.estimator=reinforce_pp, whose baseline it is",
            )
        if self.objective in (Objective.nft, Objective.clone):
            require(
                options.reduction.value == "elementwise",
                "algo.reduction",
                options.reduction.value,
                f"elementwise with algo.objective={self.objective.value}, which has no ratio to reduce",
            )
            require(
                not options.match_clip,
                "algo.match_clip",
                True,
                f"false with algo.objective={self.objective.value}, which has no ratio to clip",
            )
        if not self.has_forward_draws:
            require(
                self.forward == ForwardConfig(),
                "algo.forward",
                self.forward,
                "left out with algo.objective=ppo, which scores the denoising step itself",
            )
