"""What PPO optimises and how: losses, rates, adapters, teachers."""

import math
from dataclasses import dataclass, field
from enum import Enum

from rlvla.config.checks import check_rates, require
from rlvla.config.objective import ObjectiveConfig
from rlvla.config.sampler import Process, SamplerConfig, SamplerKind


class Reduction(Enum):
    """How the H x K log-ratios of a chunk become what is clipped (`rlvla_algos.ppo.chunk_log_ratio`)."""

    elementwise = "elementwise"
    sum = "sum"
    mean = "mean"
    sqrt = "sqrt"


class Discount(Enum):
    per_chunk = "per_chunk"
    per_step = "per_step"


class Distance(Enum):
    """What a teacher's pull is measured by (`rlvla_algos.distill`)."""

    kl = "kl"
    velocity = "velocity"


class LRSchedule(Enum):
    constant = "constant"
    cosine = "cosine"
    kl = "kl"


@dataclass(kw_only=True)
class LoraConfig:
    """Low-rank adapters instead of whole matrices (docs/how-to/fine-tuning-large-models.md). There is no dropout."""

    rank: int = 0
    """Of every adapter. 0 has none and trains the groups' own parameters; usual: 8 to 64."""
    alpha: float = 32.0
    """An adapter adds alpha / rank times its product to the matrix. The learning rate is the group's; adapters usually
    want ten times that of the whole matrices."""
    groups: tuple[str, ...] = ()
    """Parameter groups that train adapters and nothing else; [] means all that are trained."""
    targets: tuple[str, ...] = ()
    """Linear layers that get one, by the end of their name such as q_proj; [] takes those of all transformer blocks
    outside the vision tower, but for normalisation and the decay and gate of linear attention."""

    def __post_init__(self) -> None:
        self.groups, self.targets = tuple(self.groups), tuple(self.targets)
        require(self.rank >= 0, "lora.rank", self.rank, "0 (none) or more. Usual: 8 to 64")
        require(0 < self.alpha < math.inf, "lora.alpha", self.alpha, "positive and finite. Usual: 1 to 2 times rank")
        for name in ("groups", "targets"):
            given = getattr(self, name)
            require(self.rank > 0 or not given, f"lora.{name}", list(given), "[] with lora.rank=0, which has none")


@dataclass(kw_only=True)
class TeacherConfig:
    """A frozen action teacher that the policy is kept near while it learns (docs/mathematics.md#teachers)."""

    policy: str | None = None
    """Policy folder of the same architecture and statistics, or start: the policy the run begins with. null: none."""
    coef: float = 0.1
    """Weight of the distance beside the policy loss, at the start where target_kl is set."""
    target_kl: float | None = None
    """Divergence from the teacher, in nats per chunk, that the coefficient is steered to after every update; null keeps
    the coefficient. A multiple of algo.target_kl, which bounds one iteration."""
    distance: Distance = Distance.kl
    """kl: of the denoising step's Gaussian, exact. velocity: squared difference of velocities, which weighs all
    denoising steps alike."""
    weights: dict[str, float] = field(default_factory=dict)
    """How much the distance counts in each task, by name; tasks left out count 1, and 0 is no teacher."""

    def __post_init__(self) -> None:
        require(0 < self.coef < math.inf, "algo.teacher.coef", self.coef, "positive and finite. Usual: 0.01 to 1")
        require(
            self.target_kl is None or 0 < self.target_kl < math.inf,
            "algo.teacher.target_kl",
            self.target_kl,
            "positive and finite, or null",
        )
        for name, weight in self.weights.items():
            require(0 <= weight < math.inf, f"algo.teacher.weights.{name}", weight, "0 or more and finite")
        for key in ("target_kl", "weights"):
            given = getattr(self, key)
            require(
                self.policy is not None or not given,
                f"algo.teacher.{key}",
                given,
                "left out without algo.teacher.policy",
            )


@dataclass(kw_only=True)
class ReasoningTeacherConfig:
    """A frozen language model whose answers to questions the policy's is kept near, while PPO trains it
    (docs/mathematics.md#the-reasoning-teacher)."""

    policy: str | None = None
    """Policy folder with a language model of the same tokens, or start: the policy the run begins with. null: none.
    Needs algo.train_vlm=true: a frozen backbone forgets nothing."""
    datasets: tuple[str, ...] = ()
    """Files of conversations, one JSON object a line (docs/how-to/keep-the-language-model.md)."""
    batch_size: int = 4
    """Conversations beside each minibatch, of all learners together. Each costs a pass of the teacher and a pass
    forward and back of the policy."""
    coef: float = 1.0
    """Weight of the divergence beside the policy loss, at the start where target_kl is set."""
    target_kl: float | None = None
    """Divergence from the teacher, in nats per answer token, that the coefficient is steered to after every update;
    null keeps the coefficient."""
    weights: dict[str, float] = field(default_factory=dict)
    """How much the divergence counts in each domain, by name: a conversation's own, or its file's name without .jsonl.
    Domains left out count 1; those of weight 0 are not asked about."""

    def __post_init__(self) -> None:
        self.datasets = tuple(self.datasets)
        key = "algo.reasoning_teacher"
        require(0 < self.coef < math.inf, f"{key}.coef", self.coef, "positive and finite. Usual: 0.1 to 10")
        require(
            self.target_kl is None or 0 < self.target_kl < math.inf,
            f"{key}.target_kl",
            self.target_kl,
            "positive and finite, or null. Usual: 0.01 to 0.1",
        )
        require(self.batch_size >= 1, f"{key}.batch_size", self.batch_size, "at least 1")
        for name, weight in self.weights.items():
            require(0 <= weight < math.inf, f"{key}.weights.{name}", weight, "0 or more and finite")
        if self.policy is not None:
            require(bool(self.datasets), f"{key}.datasets", [], f"one file or more with {key}.policy={self.policy}")
        for name in ("datasets", "target_kl", "weights"):
            given = getattr(self, name)
            require(self.policy is not None or not given, f"{key}.{name}", given, f"left out without {key}.policy")


@dataclass(kw_only=True)
class AlgoConfig(ObjectiveConfig):
    """Chunk-level PPO on one Gaussian denoising step (Qwen-VLA, section 4.2; docs/mathematics.md)."""

    noise_level: float = 0.5
    """a of the flow SDE, for flow policies: exploration and step size in one. 0.3 to 0.7; below 0.2 learns slowly at
    any KL."""
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    reduction: Reduction = Reduction.elementwise
    """What a ratio is of: every entry of the chunk, or the whole chunk summed (the paper), averaged, scaled."""
    clip_epsilon: float = 0.2
    """Half-width of the trust region on the ratio. Smaller is safer and slower; 0.1 to 0.3 is usual."""
    match_clip: bool = False
    """Scale the clip to the reduction, so that clip_epsilon is always that of one entry (docs/mathematics.md). false
    clips every kind of ratio at the same number."""
    value_clip: float | None = 0.2
    """How far a value may move from the rollout's before its gradient stops; null never."""
    value_coef: float = 1.0
    """Weight of the value loss. The critic has its own optimizer group, so this scales little."""
    gamma: float = 0.99
    """Discount of one decision, or of one step with discount=per_step."""
    discount: Discount = Discount.per_chunk
    """per_chunk as in the paper; per_step discounts gamma^executed_steps, comparable across chunk sizes."""
    gae_lambda: float = 0.95
    """0 trusts the critic, 1 the returns."""
    bootstrap_time_limit: bool = True
    """Value what lies past the time limit by the critic: right for a task that would go on, but a policy can then
    gain by outlasting the limit. False ends the return there: right when success counts within the limit only."""
    normalize_advantage: bool = True
    """Over all valid decisions of the iteration; grpo and rloo, whose groups centre them, are left as they are."""
    epochs: int = 8
    """Passes over an iteration's data. 4 to 10; the KL target ends them early."""
    minibatch_size: int = 256
    """Decisions per optimizer step."""
    target_kl: float = 0.1
    """Exact KL per iteration, in nats per chunk, that the learning rate is steered to and that ends the
    epochs at `kl_stop_factor` times itself. 0.05 to 0.3."""
    final_target_kl: float | None = None
    """What target_kl has fallen to, linearly, in the last iteration; null keeps it. Large steps find the way, small
    ones end the wander about the optimum that gradient noise causes."""
    kl_stop_factor: float = 2.0
    """An epoch whose mean KL passes target_kl times this is the last one of its iteration."""
    lr_schedule: LRSchedule = LRSchedule.kl
    """kl: x1.5 or /1.5 towards target_kl, once an iteration. cosine: decay to zero, as in the paper."""
    policy_lr: float = 1e-4
    """Of the action expert, at the start."""
    max_policy_lr: float = 2e-3
    """Ceiling for lr_schedule=kl."""
    vlm_lr: float = 1e-5
    """Of the backbone, when train_vlm."""
    value_lr: float = 1e-3
    """Of the value head."""
    value_hidden_sizes: tuple[int, ...] = ()
    """Hidden layers of the value head; none is linear, as in the paper."""
    max_behaviour_weight: float = 2.0
    """Bound of the importance weight of stale decisions (schedule=async)."""
    max_grad_norm: float = 1.0
    """Gradient-norm clip over all policy parameters."""
    auxiliary_weight: float = 0.0
    """Factor on the losses that an architecture has of its own (uam: visual dynamics, on the next decision's images),
    times their weights in the policy's configuration. 0 has none."""
    train_vlm: bool = False
    """Train the backbone too. False stores each decision's context once and never runs the VLM in an update."""
    freeze: tuple[str, ...] = ()
    """Parameter groups that stay as they are, by name: expert, or what else the policy has. vlm needs train_vlm=false
    only."""
    learning_rates: dict[str, float] = field(default_factory=dict)
    """Rate of a trained group by name, instead of policy_lr and vlm_lr. lr_schedule moves all of them together."""
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    reasoning_teacher: ReasoningTeacherConfig = field(default_factory=ReasoningTeacherConfig)
    critic_only_iterations: int = 1
    """First iterations that train the critic only; an estimator without a critic has none."""
    min_successes: int = 8
    """An iteration with fewer successes (or failures) trains the critic only: its advantages are noise."""
    entropy_coef: float = 0.0
    """Weight of an entropy bonus, per action entry in nats; 0.001 to 0.01 where one is needed. Must stay 0 for a flow
    policy: with a fixed noise schedule its entropy is a constant."""
    mean_tolerance: float = 1e-3
    """Largest |mu_rollout - mu_learner| / s on the first minibatch, fp32."""
    ratio_tolerance: float = 1e-2
    """Largest |ratio - 1| on the first minibatch, fp32."""

    def __post_init__(self) -> None:
        self.value_hidden_sizes = tuple(self.value_hidden_sizes)
        self.freeze = tuple(self.freeze)
        check_rates(self.learning_rates, "algo.learning_rates")
        require(
            self.reasoning_teacher.policy is None or (self.train_vlm and "vlm" not in self.freeze),
            "algo.reasoning_teacher.policy",
            self.reasoning_teacher.policy,
            "null with algo.train_vlm=false or algo.freeze=[vlm]: a backbone that is not trained answers as it did. To "
            "train it, whole or by adapters (lora.rank), set algo.train_vlm=true",
        )
        require(
            0 < self.clip_epsilon < 1,
            "algo.clip_epsilon",
            self.clip_epsilon,
            "in (0, 1). Typical: 0.1 to 0.3",
        )
        require(self.noise_level > 0, "algo.noise_level", self.noise_level, "positive. Typical: 0.3 to 0.7")
        require(
            self.sampler.process is not Process.cps or self.noise_level <= 1,
            "algo.noise_level",
            self.noise_level,
            "at most 1 with algo.sampler.process=cps, where all noise of a step is new. Typical: 0.5",
        )
        require(
            not self.sampler.learns or self.teacher.policy is None,
            "algo.teacher.policy",
            self.teacher.policy,
            "null where the noise is learned (algo.sampler): a teacher has no noise of its own to compare with",
        )
        require(
            self.sampler.kind is not SamplerKind.latent or not self.train_vlm,
            "algo.train_vlm",
            self.train_vlm,
            "false with algo.sampler.kind=latent, which trains its head alone",
        )
        require(0 <= self.gamma <= 1, "algo.gamma", self.gamma, "in [0, 1]. Typical: 0.99")
        require(0 <= self.gae_lambda <= 1, "algo.gae_lambda", self.gae_lambda, "in [0, 1]. Typical: 0.95")
        require(self.epochs >= 1, "algo.epochs", self.epochs, "at least 1")
        require(self.minibatch_size >= 2, "algo.minibatch_size", self.minibatch_size, "at least 2")
        require(self.target_kl > 0, "algo.target_kl", self.target_kl, "positive. Typical: 0.05 to 0.3")
        require(
            self.final_target_kl is None or 0 < self.final_target_kl <= self.target_kl,
            "algo.final_target_kl",
            self.final_target_kl,
            f"in (0, algo.target_kl] (now {self.target_kl:g}), or null",
        )
        require(
            self.value_clip is None or self.value_clip > 0,
            "algo.value_clip",
            self.value_clip,
            "positive, or null",
        )
        positive = (
            "policy_lr",
            "vlm_lr",
            "value_lr",
            "max_policy_lr",
            "max_grad_norm",
            "kl_stop_factor",
            "max_behaviour_weight",
        )
        for name in (*positive, "mean_tolerance", "ratio_tolerance"):
            value = getattr(self, name)
            require(0 < value < math.inf, f"algo.{name}", value, "positive and finite")
        for name in ("value_coef", "min_successes", "critic_only_iterations", "entropy_coef", "auxiliary_weight"):
            require(getattr(self, name) >= 0, f"algo.{name}", getattr(self, name), "0 or more")
        require(
            all(size > 0 for size in self.value_hidden_sizes),
            "algo.value_hidden_sizes",
            list(self.value_hidden_sizes),
            "a list of positive sizes, or [] for a linear head",
        )
        require(
            self.max_policy_lr >= self.policy_lr,
            "algo.max_policy_lr",
            self.max_policy_lr,
            f"at least algo.policy_lr ({self.policy_lr}), where it starts",
        )
        self.check_objective()
