"""`rlvla train`, and `rlvla doctor`, which plans one."""

import math
from dataclasses import dataclass, field
from enum import Enum

from rlvla.config.algo import AlgoConfig, LoraConfig
from rlvla.config.checks import MISSING, check_common, require
from rlvla.config.compute import ComputeConfig, Precision
from rlvla.config.machines import ClusterConfig, LearnersConfig, WorkersConfig
from rlvla.config.objective import Objective
from rlvla.config.safeguard import SafeguardConfig
from rlvla.config.sampler import SamplerKind
from rlvla_envs.base import SuiteConfig


class TaskMix(Enum):
    """How many of an iteration's episodes each task of a suite gets."""

    uniform = "uniform"
    difficulty = "difficulty"


# Written so because `async` is a keyword: Schedule["async"].
Schedule = Enum("Schedule", {"sync": "sync", "pingpong": "pingpong", "async": "async"})


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
        require(self.trials >= 1, "eval.trials", self.trials, "at least 1; 200 for a claim")
        require(self.noise_seeds >= 1, "eval.noise_seeds", self.noise_seeds, "at least 1")
        require(self.temperature >= 0, "eval.temperature", self.temperature, "0 or more. Usual: 0.6 or 1.0")
        require(self.videos >= 0, "eval.videos", self.videos, "0 or more")
        require(self.every >= 0, "eval.every", self.every, "0 (never) or more")


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
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    suite: SuiteConfig = field(default_factory=SuiteConfig)
    workers: WorkersConfig = field(default_factory=WorkersConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    learners: LearnersConfig = field(default_factory=LearnersConfig)
    algo: AlgoConfig = field(default_factory=AlgoConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    safeguard: SafeguardConfig = field(default_factory=SafeguardConfig)
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
    """Rows the policy is run on at once while acting; padded, so that a row's result never depends on how many others
    there are. With 2 or 3 the last bits have been seen to depend on a row's place; 1 and from 4 on they do not."""
    save_every: int = 1
    """Iterations between checkpoints. A run that was stopped goes on from the newest one, so this is what a crash can
    cost; a large model takes some seconds to write."""
    profile: bool = False
    """Write a trace of one iteration, the second that this process makes, to trace.json in the run folder. Perfetto and
    chrome://tracing show it. That iteration is slower."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints to keep; the best by evaluation is kept beside them."""

    def __post_init__(self) -> None:
        check_common(self)
        require(self.iterations >= 0, "iterations", self.iterations, "0 or more")
        require(
            self.max_staleness >= 1, "max_staleness", self.max_staleness, "at least 1: async data is one update old"
        )
        require(
            self.schedule is not Schedule["async"] or self.learners.num == 1,
            "schedule",
            "async",
            f"sync or pingpong with learners.num={self.learners.num}",
        )
        require(
            self.episodes_per_iteration >= 1,
            "episodes_per_iteration",
            self.episodes_per_iteration,
            "at least 1",
        )
        require(
            self.algo.sampler.kind is not SamplerKind.latent or self.lora.rank == 0,
            "lora.rank",
            self.lora.rank,
            "0 with algo.sampler.kind=latent, which trains its head alone",
        )
        require(
            self.episodes_per_iteration % self.algo.group_size == 0,
            "algo.group_size",
            self.algo.group_size,
            f"a divisor of episodes_per_iteration (now {self.episodes_per_iteration}): groups are whole",
        )
        require(
            self.schedule is not Schedule["async"] or self.algo.objective is Objective.ppo,
            "algo.objective",
            self.algo.objective.value,
            "ppo with schedule=async: stale decisions are weighed by a likelihood ratio",
        )
        require(
            self.algo.demonstrations.dataset is None or self.learners.num == 1,
            "algo.demonstrations.dataset",
            self.algo.demonstrations.dataset,
            "null with learners.num above 1: the supervised loss is a second pass that the ranks do not share",
        )
        require(
            self.compute.precision is Precision.fp32 or self.algo.reasoning_teacher.policy is None,
            "compute.precision",
            self.compute.precision.value,
            "fp32 with algo.reasoning_teacher.policy: answers are compared in fp32",
        )
        require(
            not self.compute.compile or self.learners.num == 1,
            "compute.compile",
            "true",
            "false with learners.num above 1: compiled blocks have not been tried under DDP or FSDP2",
        )
        require(
            not self.compute.compile or self.schedule is not Schedule["async"],
            "compute.compile",
            "true",
            "false with schedule=async: the copy that collects would run blocks that are not compiled",
        )
        require(
            not self.safeguard.enabled or (self.save_every == 1 and self.schedule is not Schedule["async"]),
            "safeguard.enabled",
            True,
            "false unless save_every=1 and schedule is sync or pingpong: it goes back to the checkpoint that a rollout "
            "was made with",
        )
        for name in ("max_minutes", "max_env_steps"):
            limit = getattr(self, name)
            require(limit is None or limit > 0, name, limit, "positive, or null")
        require(
            self.learners.num <= self.episodes_per_iteration,
            "learners.num",
            self.learners.num,
            f"at most episodes_per_iteration (now {self.episodes_per_iteration}): every rank plays some",
        )
        require(
            self.learners.num == 1 or ":" not in self.device,
            "device",
            self.device,
            "auto, cpu or cuda where learners.num is above 1: each rank gets a GPU of its own",
        )
        for name in ("save_every", "keep_checkpoints"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name, weight in self.task_weights.items():
            require(0 <= weight < math.inf, f"task_weights.{name}", weight, "0 or more and finite")


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
            require(value is None or 0 < value < math.inf, name, value, "positive and finite, or null")
            require(value is None or bool(self.policy), name, value, "null without policy=: there is no run to plan")
        require(
            self.device_memory_gb is None or self.device != "cpu",
            "device_memory_gb",
            self.device_memory_gb,
            "null with device=cpu: there is no GPU to plan for",
        )
        require(0 < self.deadline_s < math.inf, "deadline_s", self.deadline_s, "positive and finite")
