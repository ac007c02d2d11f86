"""How rollouts of a flow policy explore, and so what PPO scores (docs/algorithms.md#samplers)."""

import math
from dataclasses import dataclass
from enum import Enum

from rlvla.config.checks import require


class SamplerKind(Enum):
    """What of a flow is drawn, beside its initial noise."""

    one_step = "one_step"
    window = "window"
    all_steps = "all_steps"
    latent = "latent"


class Process(Enum):
    """What a stochastic denoising step is (`rlvla_algos.schedules`)."""

    sde = "sde"
    cps = "cps"
    learned = "learned"


class NoiseSchedule(Enum):
    flow_grpo = "flow_grpo"
    constant = "constant"
    cosine = "cosine"


@dataclass(kw_only=True)
class SamplerConfig:
    """What rollouts of a flow policy draw and PPO scores. A policy with a distribution has its own and needs none."""

    kind: SamplerKind = SamplerKind.one_step
    """one_step: one denoising step, another for each decision (the paper). window: `window` steps in a row.
    all_steps: all of them. latent: the initial noise, from a small head, while the flow stays as it is."""
    process: Process = Process.sde
    """Of a stochastic step. sde keeps the flow's marginals, cps the size of its noise (and leaves out the last step),
    learned draws around Euler's step with a deviation that a small network decides."""
    schedule: NoiseSchedule | None = None
    """How algo.noise_level is spread over the steps; null is flow_grpo for sde and constant for cps."""
    window: int = 2
    """Stochastic steps of kind=window. Their passes of the expert are what an update costs."""
    window_start: int | None = None
    """The window's first step, counted from 0 at the noise; null draws it for each decision."""
    min_std: float | None = None
    """Least deviation of what is learned; null: 0.08 of process=learned, 0.5 of kind=latent."""
    max_std: float | None = None
    """Largest; null: 0.24 and 2. Learned deviations start at the geometric mean of the two."""
    hidden_sizes: tuple[int, ...] = (64,)
    """Hidden layers of the noise network, or of the head of kind=latent."""

    def __post_init__(self) -> None:
        self.hidden_sizes = tuple(self.hidden_sizes)
        latent, learned = self.kind is SamplerKind.latent, self.process is Process.learned
        one_window = self.kind is SamplerKind.window
        require(self.window >= 1, "algo.sampler.window", self.window, "at least 1")
        require(
            self.window_start is None or (one_window and self.window_start >= 0),
            "algo.sampler.window_start",
            self.window_start,
            "0 or more, or null" if one_window else "null unless algo.sampler.kind=window",
        )
        require(
            not latent or self.process is Process.sde,
            "algo.sampler.process",
            self.process.value,
            "left out with algo.sampler.kind=latent, whose denoising steps have no noise",
        )
        require(
            self.schedule is None or not (latent or learned),
            "algo.sampler.schedule",
            getattr(self.schedule, "value", None),
            "null where the noise is learned (algo.sampler.process=learned or algo.sampler.kind=latent)",
        )
        require(
            self.process is not Process.cps or self.schedule is not NoiseSchedule.flow_grpo,
            "algo.sampler.schedule",
            "flow_grpo",
            "constant or cosine with algo.sampler.process=cps: its noise is an angle, not a sigma",
        )
        for name in ("min_std", "max_std"):
            value = getattr(self, name)
            require(
                value is None or 0 < value < math.inf, f"algo.sampler.{name}", value, "positive and finite, or null"
            )
            require(
                value is None or latent or learned,
                f"algo.sampler.{name}",
                value,
                "null where no noise is learned (algo.sampler.process=learned or algo.sampler.kind=latent)",
            )
        low, high = self.std_range
        require(low < high, "algo.sampler.min_std", low, f"below algo.sampler.max_std ({high:g})")
        require(
            all(size > 0 for size in self.hidden_sizes),
            "algo.sampler.hidden_sizes",
            list(self.hidden_sizes),
            "a list of positive sizes, or [] for a linear map",
        )

    @property
    def learns(self) -> bool:
        """Whether the sampler has parameters of its own: the group ``noise``."""
        return self.kind is SamplerKind.latent or self.process is Process.learned

    @property
    def std_range(self) -> tuple[float, float]:
        """Least and largest deviation of what is learned."""
        low, high = (0.5, 2.0) if self.kind is SamplerKind.latent else (0.08, 0.24)
        return (
            low if self.min_std is None else self.min_std,
            high if self.max_std is None else self.max_std,
        )
