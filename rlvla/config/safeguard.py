"""What stops a run whose policy collapses (docs/algorithms.md#the-safeguard)."""

from dataclasses import dataclass

from rlvla.config.checks import require


@dataclass(kw_only=True)
class SafeguardConfig:
    """Go back to the best weights when rollouts succeed significantly less often than they did."""

    enabled: bool = False
    """Watch `rollout/success`. Off, a run that collapses goes on, with alarms at most."""
    confidence: float = 3.0
    """How many standard errors of the difference success must lie below the best iteration's. 3: one iteration in 700
    without any change, and more often than that because the best of many was also lucky; 2.5 to 4."""
    slowdown: float = 0.5
    """Factor on the learning rates of the policy and on its KL target after each return, for the rest of the run."""
    max_returns: int = 3
    """Returns after which the run goes on as it would without, with an alarm."""

    def __post_init__(self) -> None:
        require(self.confidence > 0, "safeguard.confidence", self.confidence, "positive. Usual: 2.5 to 4")
        require(0 < self.slowdown <= 1, "safeguard.slowdown", self.slowdown, "in (0, 1]. Usual: 0.3 to 0.7")
        require(self.max_returns >= 1, "safeguard.max_returns", self.max_returns, "at least 1; safeguard.enabled=false")
