"""Every option of every verb: its name, type, default, meaning and limits. YAML under configs/ holds values only."""

import math
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from rlvla_envs.base import SuiteConfig

MISSING: Any = "???"


class ConfigError(ValueError):
    """The user's configuration is wrong; the message has the cure."""


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


class FlowTime(Enum):
    beta = "beta"
    sigmoid_normal = "sigmoid_normal"
    uniform = "uniform"


class TaskMix(Enum):
    """How many of an iteration's episodes each task of a suite gets."""

    uniform = "uniform"
    difficulty = "difficulty"


class WorkerKind(Enum):
    ray = "ray"
    local = "local"


@dataclass(kw_only=True)
class WorkersConfig:
    """Where simulators live. Both kinds give the same rollouts bit for bit."""

    kind: WorkerKind = WorkerKind.ray
    """ray: actors in their own processes, about one a core. local: in this process, for tests and debugging."""
    num_actors: int = 0
    """Ray actors; 0 means one per CPU core."""
    envs_per_actor: int = 8
    """Environments each actor steps in turn. More fill the inference batch better and cost memory (about 60 MB)."""
    start_timeout_s: float = 300.0
    """Longest an actor may take to find a place and to build its simulators."""
    timeout_s: float = 300.0
    """Longest an actor may take to answer one call; one that takes longer is replaced. Once ten calls have shown the
    pace, twenty times the slowest recent one will do, and never less than 30."""
    max_restarts_per_hour: int = 60
    """Simulators that died or hung are replaced and their episodes replayed, until it happens more often than this."""
    quarantine_after: int = 2
    """An initial state whose episode, replayed alone, killed its simulator so often is left out and named."""
    spare: bool | None = None
    """Keep one more actor, its simulators built, to take the place of one that is lost: a second or two instead of the
    time that a start takes, for the memory of one more process. null: for suites that are slow to start, where memory
    has room. Ray only."""

    def __post_init__(self) -> None:
        _require(
            not self.spare or self.kind is WorkerKind.ray,
            "workers.spare",
            "true",
            "null or false with workers.kind=local: simulators in this process end with it",
        )
        _require(self.start_timeout_s > 0, "workers.start_timeout_s", self.start_timeout_s, "positive")
        _require(
            self.max_restarts_per_hour >= 0, "workers.max_restarts_per_hour", self.max_restarts_per_hour, "0 or more"
        )
        _require(self.quarantine_after >= 1, "workers.quarantine_after", self.quarantine_after, "at least 1")
        _require(self.num_actors >= 0, "workers.num_actors", self.num_actors, "0 (one per core) or more")
        _require(self.envs_per_actor >= 1, "workers.envs_per_actor", self.envs_per_actor, "at least 1")
        _require(self.timeout_s > 0, "workers.timeout_s", self.timeout_s, "positive")


class LearnerStrategy(Enum):
    ddp = "ddp"
    fsdp = "fsdp"


class LearnerBackend(Enum):
    auto = "auto"
    gloo = "gloo"
    nccl = "nccl"


@dataclass(kw_only=True)
class LearnersConfig:
    """How many processes learn. Any number gives the same run but for rounding, and a run may go on with another."""

    num: int = 1
    """Learner ranks, each with its share of an iteration's episodes and simulators, and a GPU where there are any.
    1 is this process itself."""
    strategy: LearnerStrategy = LearnerStrategy.ddp
    """ddp: every rank holds weights, gradients and optimizer. fsdp: each holds a part of them during the update."""
    backend: LearnerBackend = LearnerBackend.auto
    """What gradients travel over. auto: nccl on GPUs, else gloo."""
    timeout_s: float = 1800.0
    """Longest that a rank waits for the others' gradients before the group is started again."""
    max_restarts: int = 3
    """How often the group is started again, from the newest checkpoint, after the loss of a rank."""

    def __post_init__(self) -> None:
        _require(self.num >= 1, "learners.num", self.num, "at least 1")
        _require(self.timeout_s > 0, "learners.timeout_s", self.timeout_s, "positive")
        _require(self.max_restarts >= 0, "learners.max_restarts", self.max_restarts, "0 or more")


@dataclass(kw_only=True)
class ClusterConfig:
    """The Ray that simulators run in."""

    address: str | None = None
    """host:port of the head of a running Ray cluster; null starts one for this run alone."""
    token_file: str | None = None
    """File with the cluster's token, mode 0600; null is rlvla's own, made when it is first needed."""
    allow_unauthenticated: bool = False
    """Join a cluster that lets in whoever asks. Whoever is in can run code on all its machines."""


# Written so because `async` is a keyword: Schedule["async"].
Schedule = Enum("Schedule", {"sync": "sync", "pingpong": "pingpong", "async": "async"})
"""What simulators and learner do at the same time."""


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
        _require(self.rank >= 0, "lora.rank", self.rank, "0 (none) or more. Usual: 8 to 64")
        _require(0 < self.alpha < math.inf, "lora.alpha", self.alpha, "positive and finite. Usual: 1 to 2 times rank")
        for name in ("groups", "targets"):
            given = getattr(self, name)
            _require(self.rank > 0 or not given, f"lora.{name}", list(given), "[] with lora.rank=0, which has none")


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
        _require(0 < self.coef < math.inf, "algo.teacher.coef", self.coef, "positive and finite. Usual: 0.01 to 1")
        _require(
            self.target_kl is None or 0 < self.target_kl < math.inf,
            "algo.teacher.target_kl",
            self.target_kl,
            "positive and finite, or null",
        )
        for name, weight in self.weights.items():
            _require(0 <= weight < math.inf, f"algo.teacher.weights.{name}", weight, "0 or more and finite")
        for key in ("target_kl", "weights"):
            given = getattr(self, key)
            _require(
                self.policy is not None or not given,
                f"algo.teacher.{key}",
                given,
                "left out without algo.teacher.policy",
            )


@dataclass(kw_only=True)
class AlgoConfig:
    """Chunk-level PPO on one Gaussian denoising step (Qwen-VLA, section 4.2; docs/mathematics.md)."""

    noise_level: float = 0.5
    """a of the flow SDE, for flow policies: exploration and step size in one. 0.3 to 0.7; below 0.2 learns slowly at
    any KL."""
    reduction: Reduction = Reduction.elementwise
    """What a ratio is of: every entry of the chunk, or the whole chunk summed (the paper), averaged, scaled."""
    clip_epsilon: float = 0.2
    """Half-width of the trust region on the ratio. Smaller is safer and slower; 0.1 to 0.3 is usual."""
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
    """Over all valid decisions of the iteration."""
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
    critic_only_iterations: int = 1
    """First iterations that train the critic only."""
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
        _check_rates(self.learning_rates, "algo.learning_rates")
        _require(
            0 < self.clip_epsilon < 1,
            "algo.clip_epsilon",
            self.clip_epsilon,
            "in (0, 1). Typical: 0.1 to 0.3",
        )
        _require(self.noise_level > 0, "algo.noise_level", self.noise_level, "positive. Typical: 0.3 to 0.7")
        _require(0 <= self.gamma <= 1, "algo.gamma", self.gamma, "in [0, 1]. Typical: 0.99")
        _require(0 <= self.gae_lambda <= 1, "algo.gae_lambda", self.gae_lambda, "in [0, 1]. Typical: 0.95")
        _require(self.epochs >= 1, "algo.epochs", self.epochs, "at least 1")
        _require(self.minibatch_size >= 2, "algo.minibatch_size", self.minibatch_size, "at least 2")
        _require(self.target_kl > 0, "algo.target_kl", self.target_kl, "positive. Typical: 0.05 to 0.3")
        _require(
            self.final_target_kl is None or 0 < self.final_target_kl <= self.target_kl,
            "algo.final_target_kl",
            self.final_target_kl,
            f"in (0, algo.target_kl] (now {self.target_kl:g}), or null",
        )
        _require(
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
            _require(0 < value < math.inf, f"algo.{name}", value, "positive and finite")
        for name in ("value_coef", "min_successes", "critic_only_iterations", "entropy_coef", "auxiliary_weight"):
            _require(getattr(self, name) >= 0, f"algo.{name}", getattr(self, name), "0 or more")
        _require(
            all(size > 0 for size in self.value_hidden_sizes),
            "algo.value_hidden_sizes",
            list(self.value_hidden_sizes),
            "a list of positive sizes, or [] for a linear head",
        )
        _require(
            self.max_policy_lr >= self.policy_lr,
            "algo.max_policy_lr",
            self.max_policy_lr,
            f"at least algo.policy_lr ({self.policy_lr}), where it starts",
        )


@dataclass(kw_only=True)
class EvalConfig:
    """How success is measured. Everything here is part of the result file."""

    trials: int = 200
    """Episodes of each task, from its enumerated, held-back initial states as far as it has so many. 200 tells 15
    points apart; 25 points need 60."""
    noise_seeds: int = 1
    """A task with fewer states visits all of them again, with other policy noise, until it has `trials` episodes or
    each state was visited this often."""
    temperature: float = 0.6
    """Factor on the initial noise of the ODE sampler. A policy with a distribution multiplies its deviations and
    divides its gripper's logits by it; 0 is the mean and the threshold. It alone moves success by ten points, so before
    and after are always measured at the same one."""
    shuffled_images: bool = True
    """Also measure with every environment shown another one's images: a policy that loses nothing is blind."""
    videos: int = 4
    """Episodes filmed, the same ones each time; 0 films none."""
    every: int = 0
    """Iterations between evaluations during training, on a quarter of the trials; 0 has none."""
    seed: int = 12345
    """Of the evaluation's noise; with noise_seeds=n also the n - 1 seeds after it. Fixed across runs, so that results
    compare."""

    def __post_init__(self) -> None:
        _require(self.trials >= 1, "eval.trials", self.trials, "at least 1; 200 for a claim")
        _require(self.noise_seeds >= 1, "eval.noise_seeds", self.noise_seeds, "at least 1")
        _require(self.temperature >= 0, "eval.temperature", self.temperature, "0 or more. Usual: 0.6 or 1.0")
        _require(self.videos >= 0, "eval.videos", self.videos, "0 or more")
        _require(self.every >= 0, "eval.every", self.every, "0 (never) or more")


@dataclass(kw_only=True)
class TrainConfig:
    """`rlvla train`: refine a policy folder with PPO."""

    policy: str = MISSING
    """Policy folder to start from: what `rlvla sft` wrote."""
    output: str = "runs/train"
    """Run folder. Everything the run writes is under it."""
    seed: int = 0
    device: str = "auto"
    """auto, cpu, cuda or cuda:0."""
    suite: SuiteConfig = field(default_factory=SuiteConfig)
    workers: WorkersConfig = field(default_factory=WorkersConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    learners: LearnersConfig = field(default_factory=LearnersConfig)
    algo: AlgoConfig = field(default_factory=AlgoConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    schedule: Schedule = Schedule.sync
    """sync: simulators and policy take turns. pingpong: while one half of the actors runs its chunks the policy decides
    for the other; the same bits, worth it where the policy has a device of its own. async: while one iteration's data
    is learnt from, the next one's is collected with the weights before; worth it where the two run on different
    devices."""
    max_staleness: int = 1
    """With schedule=async: how many updates old the weights may be that made a decision. Older ones are dropped and
    counted."""
    iterations: int = 40
    """PPO iterations: collect whole episodes, update."""
    max_minutes: float | None = None
    """Begin no further iteration once the run has taken so many minutes, and make the final evaluation; null has no
    limit. What such a run gives depends on the machine's speed."""
    max_env_steps: int | None = None
    """Begin no further iteration once the run has taken so many environment steps, and make the final evaluation; null
    has no limit. Schedules that depend on `iterations` still do."""
    episodes_per_iteration: int = 256
    """Whole episodes collected each iteration. Fewer, more frequent iterations were worse at equal steps."""
    task_mix: TaskMix = TaskMix.uniform
    """uniform: all tasks of a suite alike. difficulty: in proportion to 1 - success of the last evaluation, at least
    0.1, as in the paper."""
    task_weights: dict[str, float] = field(default_factory=dict)
    """Weight of each task by name, instead of task_mix; tasks left out are not trained on."""
    inference_batch: int = 16
    """Rows the policy is run on at once while acting; padded, so that a row's result never depends on how
    many others there are."""
    save_every: int = 1
    """Iterations between checkpoints. A run that was stopped goes on from the newest one, so this is what a crash can
    cost; a large model takes some seconds to write."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints to keep; the best by evaluation is kept beside them."""

    def __post_init__(self) -> None:
        _check_common(self)
        _require(self.iterations >= 0, "iterations", self.iterations, "0 or more")
        _require(
            self.max_staleness >= 1, "max_staleness", self.max_staleness, "at least 1: async data is one update old"
        )
        _require(
            self.schedule is not Schedule["async"] or self.learners.num == 1,
            "schedule",
            "async",
            f"sync or pingpong with learners.num={self.learners.num}",
        )
        _require(
            self.episodes_per_iteration >= 1,
            "episodes_per_iteration",
            self.episodes_per_iteration,
            "at least 1",
        )
        for name in ("max_minutes", "max_env_steps"):
            limit = getattr(self, name)
            _require(limit is None or limit > 0, name, limit, "positive, or null")
        _require(
            self.learners.num <= self.episodes_per_iteration,
            "learners.num",
            self.learners.num,
            f"at most episodes_per_iteration (now {self.episodes_per_iteration}): every rank plays some",
        )
        _require(
            self.learners.num == 1 or ":" not in self.device,
            "device",
            self.device,
            "auto, cpu or cuda where learners.num is above 1: each rank gets a GPU of its own",
        )
        for name in ("save_every", "keep_checkpoints"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name, weight in self.task_weights.items():
            _require(0 <= weight < math.inf, f"task_weights.{name}", weight, "0 or more and finite")


@dataclass(kw_only=True)
class EvaluateConfig:
    """`rlvla eval`: measure a policy folder."""

    policy: str = MISSING
    """Policy folder."""
    output: str = "runs/eval"
    """Folder for the result file, the videos and the report."""
    device: str = "auto"
    suite: SuiteConfig = field(default_factory=SuiteConfig)
    workers: WorkersConfig = field(default_factory=WorkersConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    inference_batch: int = 16
    """See `rlvla train`."""

    def __post_init__(self) -> None:
        _check_common(self)


@dataclass(kw_only=True)
class _AcrossSuites:
    """What `rlvla eval` over several suites and `rlvla compare` have in common."""

    suites: dict[str, SuiteConfig] = field(default_factory=dict)
    """Files of configs/suite: suites=[simpler_env,simpler_env_ood]. suite.KEY=VALUE then sets a value of all of them,
    suites.NAME.KEY=VALUE of one."""
    cache: str = "runs/results"
    """Folder where results and the episodes of unfinished ones are kept, by policy, suite and settings. What it holds
    is not played again."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:0."""
    workers: WorkersConfig = field(default_factory=WorkersConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    eval: EvalConfig = field(default_factory=lambda: EvalConfig(shuffled_images=False))
    inference_batch: int = 16
    """See `rlvla train`."""

    def __post_init__(self) -> None:
        _check_common(self)
        _require(bool(self.cache), "cache", "empty", "a folder")
        _require(
            not self.eval.shuffled_images,
            "eval.shuffled_images",
            "true",
            "false here; the probe belongs to `rlvla eval policy=PATH suite=NAME` and `rlvla train`",
        )


@dataclass(kw_only=True)
class EvaluateSuitesConfig(_AcrossSuites):
    """`rlvla eval POLICY... suites=[...]`: measure policy folders on several suites."""

    policies: tuple[str, ...] = MISSING
    """Policy folders: the words without a key."""
    output: str = "runs/eval_suites"
    """Folder for the tables and the result files. The same command may be given again."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.policies == MISSING:
            return
        self.policies = tuple(self.policies)
        _require(bool(self.policies), "policies", "empty", "at least one policy folder")
        _require(len(set(self.policies)) == len(self.policies), "policies", list(self.policies), "different folders")
        _require(bool(self.suites), "suites", "empty", "a list such as suites=[simpler_env,simpler_env_ood]")


@dataclass(kw_only=True)
class CompareConfig(_AcrossSuites):
    """`rlvla compare BEFORE AFTER suites=[...]`: what became better, worse or stayed, suite by suite."""

    before: str = MISSING
    """The first word without a key: a policy folder, measured where its results are missing; or a result file of
    `rlvla eval`."""
    after: str = MISSING
    """The second one."""
    output: str = "runs/compare"
    """Folder for compare.html, compare.md, compare.csv and compare.json. The same command may be given again."""
    trained_on: tuple[str, ...] = ()
    """Those of the suites that AFTER was trained on; the others are shown as held out. Empty takes the suites whose
    role, as `rlvla suites` shows it, is training."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.trained_on = tuple(self.trained_on)
        unknown = [name for name in self.trained_on if self.suites and name not in self.suites]
        _require(not unknown, "trained_on", unknown, f"some of suites: {', '.join(self.suites)}")


class SuitesAction(Enum):
    list = "list"


@dataclass(kw_only=True)
class SuitesConfig:
    """`rlvla suites`: the suites there are, and what each lacks on this machine."""

    action: SuitesAction = SuitesAction.list
    """list: a table of the suites."""
    names: tuple[str, ...] = ()
    """Files of configs/suite, the words without a key; empty means all."""

    def __post_init__(self) -> None:
        self.names = tuple(self.names)


@dataclass(kw_only=True)
class ForgettingConfig:
    """`rlvla forgetting`: what a policy's language model has lost between two policy folders."""

    before: str = MISSING
    """Policy folder: the backbone as it was."""
    after: str = MISSING
    """Policy folder after fine-tuning."""
    questions: str = MISSING
    """File of conversations, one JSON object a line, each ending with the right answer
    (docs/how-to/keep-the-language-model.md)."""
    output: str = "forgetting.json"
    """Result file: scores, Delta, and every answer."""
    device: str = "auto"
    max_new_tokens: int = 32
    """Longest answer to a question without choices."""

    def __post_init__(self) -> None:
        _check_common(self)
        _require(self.max_new_tokens >= 1, "max_new_tokens", self.max_new_tokens, "at least 1")


@dataclass(kw_only=True)
class CollectConfig:
    """`rlvla collect`: demonstrations of a suite's scripted expert, as a LeRobotDataset v3."""

    output: str = "datasets/demonstrations"
    """Dataset folder to write; must not exist yet."""
    episodes: int = 100
    """Successful episodes to keep. Failures are dropped and counted."""
    seed: int = 0
    suite: SuiteConfig = field(default_factory=SuiteConfig)
    workers: WorkersConfig = field(default_factory=WorkersConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)

    def __post_init__(self) -> None:
        _check_common(self)
        _require(self.episodes >= 1, "episodes", self.episodes, "at least 1")


@dataclass(kw_only=True)
class VisionLanguageConfig:
    """Questions about images that are learnt beside the actions (Qwen-VLA, equation 3)."""

    dataset: str | None = None
    """File of conversations, one JSON object a line (docs/how-to/keep-the-language-model.md); null has none."""
    weight: float = 0.1
    """Of their next-token loss beside the flow-matching loss. The paper's is 0.1."""
    batch_size: int = 4
    """Conversations per step."""

    def __post_init__(self) -> None:
        _require(0 <= self.weight < math.inf, "vision_language.weight", self.weight, "0 or more and finite")
        _require(self.batch_size >= 1, "vision_language.batch_size", self.batch_size, "at least 1")


@dataclass(kw_only=True)
class SFTConfig:
    """`rlvla sft`: train a policy on a dataset in the LeRobotDataset v3 layout."""

    dataset: str = MISSING
    """Dataset folder: from `rlvla collect`, or anyone's in that layout."""
    output: str = "runs/sft"
    """Run folder; the policy is written to its subfolder policy/."""
    seed: int = 0
    device: str = "auto"
    suite: SuiteConfig = field(default_factory=SuiteConfig)
    policy: Any = MISSING
    """Architecture: configs/policy/*.yaml."""
    steps: int = 600
    """Optimizer steps."""
    batch_size: int = 32
    """Frames per step; the VLM runs once on each."""
    noise_draws: int = 4
    """(noise, flow time) draws per encoded frame, of a flow policy. The expert is cheap next to the VLM."""
    lr: float = 1e-3
    """Peak learning rate, after warm-up, before cosine decay."""
    warmup_steps: int = 40
    """Steps of linear warm-up."""
    weight_decay: float = 1e-4
    """Of AdamW."""
    max_grad_norm: float = 1.0
    """Gradient-norm clip over all trained parameters."""
    flow_time: FlowTime = FlowTime.beta
    """Distribution of flow time: the paper uses Beta for SFT and Sigmoid-Normal for text-to-action."""
    beta_alpha: float = 1.5
    """tau ~ Beta(alpha, beta), 1 being noise. openpi's 1.5 and 1."""
    beta_beta: float = 1.0
    """See beta_alpha."""
    first_steps: int = 3
    """Frames at the start of a demonstration that are drawn more often: there the policy must look, later it
    can guess from the arm."""
    first_steps_weight: float = 3.0
    """How many times more often; 1 draws all frames alike."""
    state_noise: float = 0.1
    """Standard deviation added to the normalised state, so that the policy does not lean on it."""
    ema_decay: float | None = None
    """Save an exponential moving average of the weights instead; null has none. Usual: 0.999."""
    train_vlm: bool = True
    """Train the backbone too. False trains the action expert alone, as the paper's first stage does."""
    freeze: tuple[str, ...] = ()
    """Parameter groups that stay as they are, by name: expert, or what else the policy has."""
    learning_rates: dict[str, float] = field(default_factory=dict)
    """Peak rate of a trained group by name, instead of lr."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    tokenizer: str | None = None
    """Folder with tokenizer files of a checkpoint; null trains a small one on the dataset's prompts."""
    start: str | None = None
    """Policy folder to go on from, such as an earlier stage's; null starts anew, or from what policy= says. The
    action statistics become this dataset's."""
    sequence_length: int = 0
    """Above 0, no images are shown and a whole demonstration is predicted from its instruction and first state, up to
    so many actions (stage=t2a). 0 predicts chunks."""
    vision_language: VisionLanguageConfig = field(default_factory=VisionLanguageConfig)
    twin_teacher: str | None = None
    """Folder of a twinbrain_vla policy whose right brain's hidden states the policy learns as well, with the teacher's
    tokenizer (TwinBrainVLA, appendix G); null has none."""
    feature_coef: float = 1.0
    """Weight of the squared distance to these states, summed over the hidden size; the paper's is 1."""

    def __post_init__(self) -> None:
        _check_common(self)
        self.freeze = tuple(self.freeze)
        _check_rates(self.learning_rates, "learning_rates")
        _require(
            self.start is None or self.tokenizer is None,
            "tokenizer",
            self.tokenizer,
            "null with start=: a policy brings its own",
        )
        _require(self.sequence_length >= 0, "sequence_length", self.sequence_length, "0 (chunks) or more")
        _require(
            self.vision_language.dataset is None or (self.train_vlm and "vlm" not in self.freeze),
            "vision_language.dataset",
            self.vision_language.dataset,
            "null with train_vlm=false or freeze=[vlm]: it trains the backbone",
        )
        _require(
            self.start is not None or self.lora.rank == 0,
            "lora.rank",
            self.lora.rank,
            "0 without start=: the matrices beneath the adapters would stay random",
        )
        _require(self.steps >= 1, "steps", self.steps, "at least 1")
        _require(self.batch_size >= 1, "batch_size", self.batch_size, "at least 1")
        _require(self.noise_draws >= 1, "noise_draws", self.noise_draws, "at least 1")
        _require(self.lr > 0, "lr", self.lr, "positive. Usual: 1e-3 tiny, 5e-5 large")
        for name in ("warmup_steps", "weight_decay", "state_noise", "first_steps"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        _require(self.max_grad_norm > 0, "max_grad_norm", self.max_grad_norm, "positive. Usual: 1.0")
        _require(self.first_steps_weight > 0, "first_steps_weight", self.first_steps_weight, "positive")
        _require(
            self.ema_decay is None or 0 < self.ema_decay < 1,
            "ema_decay",
            self.ema_decay,
            "in (0, 1), or null",
        )
        _require(
            self.twin_teacher is None or (self.train_vlm and self.tokenizer is None),
            "twin_teacher",
            self.twin_teacher,
            "null with train_vlm=false, where no state could be learnt, and with tokenizer=, for it brings its own",
        )
        _require(0 <= self.feature_coef < math.inf, "feature_coef", self.feature_coef, "0 or more and finite")
        _require(
            min(self.beta_alpha, self.beta_beta) > 0,
            "beta_alpha, beta_beta",
            (self.beta_alpha, self.beta_beta),
            "positive",
        )


@dataclass(kw_only=True)
class ImportConfig:
    """`rlvla import FORMAT CHECKPOINT`: a checkpoint of another project as a policy folder."""

    format: str = MISSING
    """Whose checkpoint it is: lerobot or openpi. May stand as the first word after the verb."""
    checkpoint: str = MISSING
    """Its folder. May stand as the second word."""
    output: str = MISSING
    """Policy folder to write; must not exist yet."""
    suite: SuiteConfig = field(default_factory=SuiteConfig)
    """The conventions of actions, state and cameras, which a checkpoint does not carry: those of a suite."""
    cameras: dict[str, str] = field(default_factory=dict)
    """Which of the checkpoint's images each of the suite's cameras is, where names differ: cameras.front=base_0_rgb."""
    tokenizer: str | None = None
    """Folder with the VLM's tokenizer files, where the checkpoint has none."""
    statistics: str | None = None
    """Normalisation statistics, where the checkpoint has none: a LeRobot dataset's meta/stats.json or openpi's
    norm_stats.json."""
    horizon: int | None = None
    """Actions in a chunk, where the checkpoint does not say: an openpi checkpoint without config.json."""
    num_denoising_steps: int | None = None
    """Euler steps from noise to action; null takes the checkpoint's own. PPO needs 2."""
    noise_at: float | None = None
    """Flow time at which a sample is noise in the checkpoint, if you know it: 1 or 0. It is compared with the format's
    convention; null trusts that."""

    def __post_init__(self) -> None:
        for name in ("horizon", "num_denoising_steps"):
            value = getattr(self, name)
            _require(value is None or value >= 1, name, value, "at least 1, or null")
        _require(self.noise_at in (None, 0, 1), "noise_at", self.noise_at, "1, 0 or null")


@dataclass(kw_only=True)
class ExportConfig:
    """`rlvla export POLICY`: an imported policy back in the format it came from."""

    policy: str = MISSING
    """Policy folder that `rlvla import` wrote, or `rlvla train` from such a one. May stand as the first word."""
    output: str = MISSING
    """Checkpoint folder to write; must not exist yet."""


@dataclass(kw_only=True)
class DoctorConfig(TrainConfig):
    """`rlvla doctor`: what works here, and what a training run will take. Takes every option of `rlvla train`."""

    policy: str = ""
    """The run's policy, to plan its memory: a folder, or the name of a file in configs/policy for one that is not
    trained yet. Empty checks the machine alone."""
    device_memory_gb: float | None = None
    """GPU memory to plan for, in 10^9 bytes: another machine than this one, such as 80. null takes the GPU that is
    here, and plans for the CPU where there is none."""
    host_memory_gb: float | None = None
    """Main memory to plan for, in 10^9 bytes; null takes what is free here, or judges none if device_memory_gb names
    another machine."""
    deadline_s: float = 120.0
    """Longest a probe may take. A broken driver can hang; the first import of a simulator is slow on a busy machine."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("device_memory_gb", "host_memory_gb"):
            value = getattr(self, name)
            _require(value is None or 0 < value < math.inf, name, value, "positive and finite, or null")
            _require(value is None or bool(self.policy), name, value, "null without policy=: there is no run to plan")
        _require(
            self.device_memory_gb is None or self.device != "cpu",
            "device_memory_gb",
            self.device_memory_gb,
            "null with device=cpu: there is no GPU to plan for",
        )
        _require(0 < self.deadline_s < math.inf, "deadline_s", self.deadline_s, "positive and finite")


def _require(condition: bool, key: str, value: object, must: str) -> None:
    if not condition:
        raise ConfigError(f"{key} is {value}; it must be {must}.")


def _check_rates(rates: dict[str, float], key: str) -> None:
    for name, rate in rates.items():
        _require(0 < rate < math.inf, f"{key}.{name}", rate, "positive and finite; freeze=[...] keeps a group as it is")


def _check_common(config: Any) -> None:
    seed = getattr(config, "seed", 0)
    _require(seed >= 0, "seed", seed, "0 or more")
    device = getattr(config, "device", "auto")
    valid = device in ("auto", "cpu", "cuda") or device.startswith("cuda:")
    _require(valid, "device", device, "auto, cpu, cuda or cuda:N")
    if hasattr(config, "inference_batch"):
        _require(config.inference_batch >= 1, "inference_batch", config.inference_batch, "at least 1")
