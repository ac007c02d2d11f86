"""Every option of every verb: its name, type, default, meaning and limits. YAML under configs/ holds values only."""

from rlvla.config.algo import (
    AlgoConfig,
    Discount,
    Distance,
    LoraConfig,
    LRSchedule,
    ReasoningTeacherConfig,
    Reduction,
    TeacherConfig,
)
from rlvla.config.checks import MISSING, ConfigError, check_common, check_rates, require
from rlvla.config.compute import Attention, ComputeConfig, Precision
from rlvla.config.evaluation import (
    CompareConfig,
    EvaluateConfig,
    EvaluateSuitesConfig,
    ForgettingConfig,
    SuitesAction,
    SuitesConfig,
)
from rlvla.config.formats import ExportConfig, ImportConfig
from rlvla.config.machines import (
    ClusterConfig,
    LearnerBackend,
    LearnersConfig,
    LearnerStrategy,
    WorkerKind,
    WorkersConfig,
)
from rlvla.config.objective import (
    CoTrainingConfig,
    CriticConfig,
    CriticPool,
    Estimator,
    ForwardConfig,
    Objective,
    ObjectiveConfig,
)
from rlvla.config.safeguard import SafeguardConfig
from rlvla.config.sampler import NoiseSchedule, Process, SamplerConfig, SamplerKind
from rlvla.config.serve import ServeConfig
from rlvla.config.sft import CollectConfig, FlowTime, MoreData, SFTConfig, VisionLanguageConfig
from rlvla.config.train import DoctorConfig, EvalConfig, Schedule, TaskMix, TrainConfig

__all__ = [
    "MISSING",
    "AlgoConfig",
    "Attention",
    "ClusterConfig",
    "CoTrainingConfig",
    "CollectConfig",
    "CompareConfig",
    "ComputeConfig",
    "ConfigError",
    "CriticConfig",
    "CriticPool",
    "Discount",
    "Distance",
    "DoctorConfig",
    "Estimator",
    "EvalConfig",
    "EvaluateConfig",
    "EvaluateSuitesConfig",
    "ExportConfig",
    "FlowTime",
    "ForgettingConfig",
    "ForwardConfig",
    "ImportConfig",
    "LRSchedule",
    "LearnerBackend",
    "LearnerStrategy",
    "LearnersConfig",
    "LoraConfig",
    "MoreData",
    "NoiseSchedule",
    "Objective",
    "ObjectiveConfig",
    "Precision",
    "Process",
    "ReasoningTeacherConfig",
    "Reduction",
    "SFTConfig",
    "SafeguardConfig",
    "SamplerConfig",
    "SamplerKind",
    "Schedule",
    "ServeConfig",
    "SuitesAction",
    "SuitesConfig",
    "TaskMix",
    "TeacherConfig",
    "TrainConfig",
    "VisionLanguageConfig",
    "WorkerKind",
    "WorkersConfig",
    "check_common",
    "check_rates",
    "require",
]
