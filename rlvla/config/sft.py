"""`rlvla collect` and `rlvla sft`."""

import math
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from rlvla.config.algo import LoraConfig
from rlvla.config.checks import MISSING, check_common, check_rates, require
from rlvla.config.machines import ClusterConfig, WorkersConfig
from rlvla_envs.base import SuiteConfig


class FlowTime(Enum):
    beta = "beta"
    sigmoid_normal = "sigmoid_normal"
    uniform = "uniform"


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
        check_common(self)
        require(self.episodes >= 1, "episodes", self.episodes, "at least 1")


@dataclass(kw_only=True)
class VisionLanguageConfig:
    """Questions about images that are learnt beside the actions (Qwen-VLA, equation 3)."""

    dataset: str | None = None
    """File of conversations, one JSON object a line (docs/how-to/keep-the-language-model.md); null has none."""
    weight: float = 0.1
    """Of their next-token loss beside the flow-matching loss. The paper's is 0.1."""
    batch_size: int = 4
    """Conversations per step."""
    teacher: str | None = None
    """Frozen reasoning teacher whose distribution over each answer token is learnt as well (DualVLA): a policy folder
    with a language model of the same tokens, or start: what start= names. null: none."""
    teacher_coef: float = 1.0
    """Weight of the divergence from it; with vision_language.weight=0 it replaces the next-token loss."""

    def __post_init__(self) -> None:
        key = "vision_language"
        require(0 <= self.weight < math.inf, f"{key}.weight", self.weight, "0 or more and finite")
        require(
            self.teacher is None or self.dataset is not None,
            f"{key}.teacher",
            self.teacher,
            f"null without {key}.dataset",
        )
        require(0 < self.teacher_coef < math.inf, f"{key}.teacher_coef", self.teacher_coef, "positive and finite")
        require(self.batch_size >= 1, "vision_language.batch_size", self.batch_size, "at least 1")


@dataclass(kw_only=True)
class MoreData:
    """A dataset that `rlvla sft` learns from beside ``dataset``: of the same robot or of another one."""

    dataset: str = MISSING
    """Dataset folder from `rlvla collect`."""
    weight: float = 1.0
    """See ``weight`` of `rlvla sft`."""
    chunk_size: int | None = None
    """H of this robot; null takes the one that the suite had when the dataset was collected."""

    def __post_init__(self) -> None:
        require(0 < self.weight < math.inf, "more[].weight", self.weight, "positive and finite")
        require(self.chunk_size is None or self.chunk_size >= 1, "more[].chunk_size", self.chunk_size, "at least 1")


@dataclass(kw_only=True)
class SFTConfig:
    """`rlvla sft`: train a policy on a dataset in the LeRobotDataset v3 layout."""

    dataset: str = MISSING
    """Dataset folder: from `rlvla collect`, or anyone's in that layout."""
    weight: float = 1.0
    """With more=: a row of a batch is of this dataset with probability weight / (sum of all weights)."""
    more: list[MoreData] = field(default_factory=list)
    """Further datasets, also of other robots: more=[{dataset: PATH, weight: 0.5, chunk_size: 8}], of which dataset
    must be given (docs/how-to/several-robots.md)."""
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
        check_common(self)
        self.freeze = tuple(self.freeze)
        check_rates(self.learning_rates, "learning_rates")
        require(
            self.start is None or self.tokenizer is None,
            "tokenizer",
            self.tokenizer,
            "null with start=: a policy brings its own",
        )
        require(
            self.start is not None or self.vision_language.teacher != "start",
            "vision_language.teacher",
            "start",
            "a policy folder without start=: a policy that starts anew knows nothing yet",
        )
        require(0 < self.weight < math.inf, "weight", self.weight, "positive and finite")
        require(
            not self.more or self.twin_teacher is None,
            "twin_teacher",
            self.twin_teacher,
            "null with more=: the teacher's prompts are of one robot",
        )
        require(self.sequence_length >= 0, "sequence_length", self.sequence_length, "0 (chunks) or more")
        require(
            self.vision_language.dataset is None or (self.train_vlm and "vlm" not in self.freeze),
            "vision_language.dataset",
            self.vision_language.dataset,
            "null with train_vlm=false or freeze=[vlm]: it trains the backbone",
        )
        require(
            self.start is not None or self.lora.rank == 0,
            "lora.rank",
            self.lora.rank,
            "0 without start=: the matrices beneath the adapters would stay random",
        )
        require(self.steps >= 1, "steps", self.steps, "at least 1")
        require(self.batch_size >= 1, "batch_size", self.batch_size, "at least 1")
        require(self.noise_draws >= 1, "noise_draws", self.noise_draws, "at least 1")
        require(self.lr > 0, "lr", self.lr, "positive. Usual: 1e-3 tiny, 5e-5 large")
        for name in ("warmup_steps", "weight_decay", "state_noise", "first_steps"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        require(self.max_grad_norm > 0, "max_grad_norm", self.max_grad_norm, "positive. Usual: 1.0")
        require(self.first_steps_weight > 0, "first_steps_weight", self.first_steps_weight, "positive")
        require(
            self.ema_decay is None or 0 < self.ema_decay < 1,
            "ema_decay",
            self.ema_decay,
            "in (0, 1), or null",
        )
        require(
            self.twin_teacher is None or (self.train_vlm and self.tokenizer is None),
            "twin_teacher",
            self.twin_teacher,
            "null with train_vlm=false, where no state could be learnt, and with tokenizer=, for it brings its own",
        )
        require(0 <= self.feature_coef < math.inf, "feature_coef", self.feature_coef, "0 or more and finite")
        require(
            min(self.beta_alpha, self.beta_beta) > 0,
            "beta_alpha, beta_beta",
            (self.beta_alpha, self.beta_beta),
            "positive",
        )
