"""Per-dataset quantile normalisation of actions, and mean and deviation of the state."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

CONSTANT = 1e-6
"""A channel whose quantiles are closer than this never moved in the data."""


@dataclass(frozen=True)
class ActionStats:
    """Statistics of one dataset. Actions map to [-1, 1] by their 1% and 99% quantiles (Qwen-VLA, eq. 5).

    A channel that is constant in the data has no scale. It is inactive: held at its constant when acting, and
    outside the mask of the loss and of the log-probability, where its noise would only dilute the signal.
    """

    q01: Float[np.ndarray, " C"]
    q99: Float[np.ndarray, " C"]
    state_mean: Float[np.ndarray, " P"]
    state_std: Float[np.ndarray, " P"]
    action_bound: float = 1.0
    """Normalised actions are clipped to +- this; infinite for a checkpoint that was trained without clipping. One that
    standardises actions has mean - deviation for q01 and mean + deviation for q99, which is the same map."""
    state_bound: float = 4.0
    """The same for the normalised state."""
    binary: Bool[np.ndarray, " C"] | None = None
    """Channels of two values, such as starVLA's grippers: 0 stands for q01 and 1 for q99, and what is sampled in
    between is cut at 0.5. Here alone q01 may be the larger. None has no such channel."""

    @staticmethod
    def of(action: Float[np.ndarray, "N C"], state: Float[np.ndarray, "N P"] | None) -> "ActionStats":
        """Statistics over all frames of a dataset.

        The deviation of a state channel is kept above 0.02: a few demonstrations leave some channels almost
        still, and dividing by that would turn any new pose into an outlier.
        """
        q01, q99 = np.quantile(action, [0.01, 0.99], axis=0).astype(np.float32)
        if state is None:
            state = np.zeros((1, 0), dtype=np.float32)
        return ActionStats(
            q01, q99, state.mean(0).astype(np.float32), np.maximum(state.std(0), 0.02).astype(np.float32)
        )

    @property
    def active(self) -> Bool[np.ndarray, " C"]:
        active: np.ndarray = np.where(self.is_binary, np.abs(self.q99 - self.q01), self.q99 - self.q01) > CONSTANT
        return active

    @property
    def is_binary(self) -> Bool[np.ndarray, " C"]:
        return np.zeros(len(self.q01), np.bool_) if self.binary is None else self.binary

    def normalize(self, action: Float[np.ndarray, "*B C"]) -> Float[np.ndarray, "*B C"]:
        """To [-1, 1], clipped as in the paper; binary channels to 0 or 1; inactive channels become 0."""
        scale = np.where(self.active, self.q99 - self.q01, 1.0)
        centred = 2 * (action - self.q01) / scale - 1
        unit = np.clip(centred, -self.action_bound, self.action_bound)
        unit = np.where(self.is_binary, centred > 0, unit)
        return np.where(self.active, unit, 0.0).astype(np.float32)

    def denormalize(self, unit: Float[np.ndarray, "*B C"]) -> Float[np.ndarray, "*B C"]:
        """Inverse of `normalize` inside the quantiles; not clipped, the simulator does that."""
        span = np.where(self.active, self.q99 - self.q01, 0.0)
        share = np.where(self.is_binary, unit > 0.5, (unit + 1) / 2)
        action: np.ndarray = (self.q01 + share * span).astype(np.float32)
        return action

    def normalize_state(self, state: Float[np.ndarray, "*B P"]) -> Float[np.ndarray, "*B P"]:
        """Standardised and clipped, by default to +-4: an outlier pose must not own the expert's input."""
        unit: np.ndarray = (state - self.state_mean) / self.state_std
        clipped: np.ndarray = np.clip(unit, -self.state_bound, self.state_bound).astype(np.float32)
        return clipped

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(self.to_dict(), indent=2) + "\n")

    @staticmethod
    def load(path: Path) -> "ActionStats":
        return ActionStats.from_dict(json.loads(path.read_text()))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        data: dict[str, dict[str, Any]] = {
            "action": {"q01": self.q01.tolist(), "q99": self.q99.tolist(), "bound": _finite(self.action_bound)},
            "state": {
                "mean": self.state_mean.tolist(),
                "std": self.state_std.tolist(),
                "bound": _finite(self.state_bound),
            },
        }
        if self.binary is not None:
            data["action"]["binary"] = self.binary.tolist()
        return data

    @staticmethod
    def from_dict(data: dict[str, Any]) -> "ActionStats":
        action, state = data["action"], data["state"]
        # Folders from before bounds were stored have the defaults.
        return ActionStats(
            q01=np.array(action["q01"], dtype=np.float32),
            q99=np.array(action["q99"], dtype=np.float32),
            state_mean=np.array(state["mean"], dtype=np.float32),
            state_std=np.array(state["std"], dtype=np.float32),
            action_bound=_bound(action.get("bound", 1.0)),
            state_bound=_bound(state.get("bound", 4.0)),
            binary=np.array(action["binary"], dtype=np.bool_) if "binary" in action else None,
        )


def _finite(bound: float) -> float | None:
    """JSON has no infinity."""
    return bound if math.isfinite(bound) else None


def _bound(stored: float | None) -> float:
    bound = math.inf if stored is None else float(stored)
    if not bound > 0:
        raise ValueError(f"a bound is {bound}; it must be positive, or null for none")
    return bound
