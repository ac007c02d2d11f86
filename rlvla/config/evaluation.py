"""`rlvla eval`, `compare`, `suites` and `forgetting`."""

from dataclasses import dataclass, field
from enum import Enum

from rlvla.config.checks import MISSING, check_common, require
from rlvla.config.machines import ClusterConfig, WorkersConfig
from rlvla.config.train import EvalConfig
from rlvla_envs.base import SuiteConfig


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
    smoke_test: bool = False
    """Play the episodes and report no success rate, write no result: the only thing that a suite allows whose assets
    are stand-ins (`rlvla suites setup robocasa_gr1 stand_ins=true`)."""
    inference_batch: int = 16
    """See `rlvla train`."""

    def __post_init__(self) -> None:
        check_common(self)


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
        check_common(self)
        require(bool(self.cache), "cache", "empty", "a folder")
        require(
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
        require(bool(self.policies), "policies", "empty", "at least one policy folder")
        require(len(set(self.policies)) == len(self.policies), "policies", list(self.policies), "different folders")
        require(bool(self.suites), "suites", "empty", "a list such as suites=[simpler_env,simpler_env_ood]")


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
        require(not unknown, "trained_on", unknown, f"some of suites: {', '.join(self.suites)}")


class SuitesAction(Enum):
    list = "list"
    status = "status"
    setup = "setup"


@dataclass(kw_only=True)
class SuitesConfig:
    """`rlvla suites`: the suites there are, what each lacks on this machine, and setting them up."""

    action: SuitesAction = SuitesAction.list
    """list: a table of the suites. status: where those with an interpreter of their own live, and what is installed
    there. setup: make that interpreter."""
    names: tuple[str, ...] = ()
    """Files of configs/suite, or environments such as libero: the words without a key. Empty means all, but for
    setup, which wants names."""
    stand_ins: bool = False
    """With setup: generate assets that the user would have to download, so that the suite runs. No score is reported
    with them."""
    trial: bool = True
    """Play a chunk after setting up."""
    trial_timeout_s: float = 600.0
    """For that chunk: a busy machine is slow."""

    def __post_init__(self) -> None:
        self.names = tuple(self.names)
        setup = self.action is SuitesAction.setup
        require(bool(self.names) or not setup, "names", "empty", "at least one: `rlvla suites setup libero`")
        require(self.trial_timeout_s > 0, "trial_timeout_s", self.trial_timeout_s, "positive")


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
        check_common(self)
        require(self.max_new_tokens >= 1, "max_new_tokens", self.max_new_tokens, "at least 1")
