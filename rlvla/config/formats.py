"""`rlvla import` and `rlvla export`."""

from dataclasses import dataclass, field

from rlvla.config.checks import MISSING, require
from rlvla_envs.base import SuiteConfig


@dataclass(kw_only=True)
class ImportConfig:
    """`rlvla import FORMAT CHECKPOINT`: a checkpoint of another project as a policy folder."""

    format: str = MISSING
    """Whose checkpoint it is: lerobot, openpi or starvla. May stand as the first word after the verb."""
    checkpoint: str = MISSING
    """Its folder; of starVLA, a run's folder, or the file in its checkpoints/ that is meant. May stand as the second
    word."""
    output: str = MISSING
    """Policy folder to write; must not exist yet."""
    suite: SuiteConfig = field(default_factory=SuiteConfig)
    """The conventions of actions, state and cameras, which a checkpoint does not carry: those of a suite."""
    cameras: dict[str, str] = field(default_factory=dict)
    """Which of the checkpoint's images each of the suite's cameras is, where names differ: cameras.front=base_0_rgb."""
    tokenizer: str | None = None
    """Folder with the VLM's tokenizer files, where the checkpoint has none; for starVLA, the base VLM's folder, with
    config.json and preprocessor_config.json."""
    statistics: str | None = None
    """Normalisation statistics, where the checkpoint has none: a LeRobot dataset's meta/stats.json or openpi's
    norm_stats.json, or starVLA's dataset_statistics.json."""
    robot: str | None = None
    """starVLA: whose entry of dataset_statistics.json, where it has several, for example oxe_bridge."""
    normalization: list[str] = field(default_factory=list)
    """starVLA: how each action channel was normalised, for a robot that rlvla's table does not have: q99, min_max,
    mean_std, binary or none, one for all channels or one for each."""
    state_normalization: list[str] = field(default_factory=list)
    """starVLA: the same for the state, where the checkpoint reads it; not binary."""
    self_attention: bool | None = None
    """starVLA's QwenPI: whether every second block of the head attends to its own sequence (true) or to the VLM like
    the others (false), where config.yaml has no use_canonical_forward and interleave_self_attention is true."""
    horizon: int | None = None
    """Actions in a chunk, where the checkpoint does not say: an openpi checkpoint without config.json."""
    discrete_state_input: bool | None = None
    """openpi's pi0.5: whether the state stands in the prompt, where config.json does not say. null takes openpi's
    default, true; pi05_libero was trained with false."""
    delta_actions: bool | None = None
    """openpi: whether the actions are differences to the state (DeltaActions), which no file of a checkpoint says. true
    is refused; null takes them as they are, and notes it."""
    num_denoising_steps: int | None = None
    """Euler steps from noise to action; null takes the checkpoint's own. PPO needs 2."""
    noise_at: float | None = None
    """Flow time at which a sample is noise in the checkpoint, if you know it: 1 or 0. It is compared with the format's
    convention; null trusts that."""

    def __post_init__(self) -> None:
        for name in ("horizon", "num_denoising_steps"):
            value = getattr(self, name)
            require(value is None or value >= 1, name, value, "at least 1, or null")
        require(self.noise_at in (None, 0, 1), "noise_at", self.noise_at, "1, 0 or null")


@dataclass(kw_only=True)
class ExportConfig:
    """`rlvla export POLICY`: an imported policy back in the format it came from."""

    policy: str = MISSING
    """Policy folder that `rlvla import` wrote, or `rlvla train` from such a one. May stand as the first word."""
    output: str = MISSING
    """Checkpoint folder to write; must not exist yet."""
