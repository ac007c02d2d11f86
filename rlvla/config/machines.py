"""Where the work runs: simulators, learner processes, a cluster."""

from dataclasses import dataclass
from enum import Enum

from rlvla.config.checks import require


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
        require(
            not self.spare or self.kind is WorkerKind.ray,
            "workers.spare",
            "true",
            "null or false with workers.kind=local: simulators in this process end with it",
        )
        require(self.start_timeout_s > 0, "workers.start_timeout_s", self.start_timeout_s, "positive")
        require(
            self.max_restarts_per_hour >= 0, "workers.max_restarts_per_hour", self.max_restarts_per_hour, "0 or more"
        )
        require(self.quarantine_after >= 1, "workers.quarantine_after", self.quarantine_after, "at least 1")
        require(self.num_actors >= 0, "workers.num_actors", self.num_actors, "0 (one per core) or more")
        require(self.envs_per_actor >= 1, "workers.envs_per_actor", self.envs_per_actor, "at least 1")
        require(self.timeout_s > 0, "workers.timeout_s", self.timeout_s, "positive")


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
        require(self.num >= 1, "learners.num", self.num, "at least 1")
        require(self.timeout_s > 0, "learners.timeout_s", self.timeout_s, "positive")
        require(self.max_restarts >= 0, "learners.max_restarts", self.max_restarts, "0 or more")


@dataclass(kw_only=True)
class ClusterConfig:
    """The Ray that simulators run in."""

    address: str | None = None
    """host:port of the head of a running Ray cluster; null starts one for this run alone."""
    token_file: str | None = None
    """File with the cluster's token, mode 0600; null is rlvla's own, made when it is first needed."""
    allow_unauthenticated: bool = False
    """Join a cluster that lets in whoever asks. Whoever is in can run code on all its machines."""
