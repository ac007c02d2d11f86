"""How the networks of a run are computed: precision, memory and kernels. What is learned stays the same."""

from dataclasses import dataclass
from enum import Enum

from rlvla.config.checks import require


class Precision(Enum):
    fp32 = "fp32"
    bf16 = "bf16"


class Attention(Enum):
    """Which kernel of torch's scaled dot-product attention."""

    auto = "auto"
    flash = "flash"
    efficient = "efficient"
    cudnn = "cudnn"
    math = "math"


@dataclass(kw_only=True)
class ComputeConfig:
    """How the policy's networks are run in rollouts, evaluations and updates alike (docs/how-to/gpu.md)."""

    precision: Precision = Precision.fp32
    """bf16: matrix products and attention in bfloat16 (autocast). Trained weights, gradients, Adam, the critic and
    log-probabilities stay in fp32; matrices that are not trained and that bfloat16 holds exactly are kept in it. For
    GPUs; on a CPU it is slower."""
    recompute: bool = False
    """Keep the input of each transformer block alone and compute the rest again on the way back (activation
    checkpointing): the same gradients for a third more work and a fraction of the activations' memory."""
    pass_tokens: int | None = None
    """Most tokens, of context and chunk, that an update sends forward and back at once. A minibatch of more is cut into
    equal passes whose gradients add up; null: each minibatch is one pass."""
    compile: bool = False
    """Compile the action expert's blocks with torch.compile, for rollouts and updates alike. The first passes take
    minutes. One learner only."""
    attention: Attention = Attention.auto
    """Kernel of all attention; auto lets torch choose. One that cannot run what a model asks for is an error there."""

    def __post_init__(self) -> None:
        half = self.attention in (Attention.flash, Attention.cudnn)
        require(
            not half or self.precision is Precision.bf16,
            "compute.attention",
            self.attention.value,
            "auto, efficient or math with precision=fp32: that kernel computes in half precision alone",
        )
        require(
            self.pass_tokens is None or self.pass_tokens >= 1,
            "compute.pass_tokens",
            self.pass_tokens,
            "at least 1, or null. Usual: 4096 to 32768",
        )
