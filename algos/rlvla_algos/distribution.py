"""A distribution over an action chunk with independent entries: Gaussian ones, and binary ones such as a gripper's.

    Gaussian:  Y ~ N(mu, s^2)                   mu = location, s = exp(log_std)
    binary:    Y = +1 with probability p, else -1,    p = sigmoid(location)

Both are drawn from standard normal noise z, and a temperature T scales the noise of both:

    Y = mu + T s z        Y = sign(location + T e),   e = logit(Phi(z)), which has a logistic distribution.

So a binary entry of temperature T is +1 with probability sigmoid(location / T). T = 0 is the mean and the threshold.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

Chunk = Float[Tensor, "B H K"]


class NormalBernoulli(NamedTuple):
    """One distribution a row."""

    location: Chunk
    """Mean of a Gaussian entry, logit of a binary one."""
    log_std: Float[Tensor, "B 1 K"]
    """Of Gaussian entries; of binary ones it means nothing."""
    binary: Bool[Tensor, "B 1 K"]
    """Which channels are binary."""

    def parameters(self) -> dict[str, Tensor]:
        """What `kl` and `gap` need of it later, as copies: log_std may be a view of a weight, which changes with every
        step, and under FSDP2 is freed after a backward pass."""
        return {name: value.clone() for name, value in self._asdict().items()}

    def sample(self, noise: Chunk, temperature: float) -> Chunk:
        """Draw from standard normal noise: at temperature 1 the distribution itself, at 0 `deterministic`."""
        # In double precision: in single, the normal distribution function is 1 from z = 5.4 on, and its logit infinite.
        logistic = torch.special.logit(torch.special.ndtr(noise.double())).to(noise.dtype)
        return torch.where(
            self.binary,
            _sign(self.location + temperature * logistic),
            self.location + temperature * self.log_std.exp() * noise,
        )

    def deterministic(self) -> Chunk:
        """The mean of a Gaussian entry, the likelier value of a binary one."""
        return torch.where(self.binary, _sign(self.location), self.location)

    def log_prob(self, sample: Chunk) -> Chunk:
        """Log-density of Gaussian entries, log-probability of binary ones; of them the sign alone counts."""
        z = (sample - self.location) / self.log_std.exp()
        normal = -0.5 * z.square() - self.log_std - 0.5 * math.log(2 * math.pi)
        return torch.where(self.binary, F.logsigmoid(_sign(sample) * self.location), normal)

    def entropy(self) -> Chunk:
        """In nats. That of a Gaussian entry is unbounded in both directions; of a binary one it is at most log 2."""
        normal = (0.5 + 0.5 * math.log(2 * math.pi) + self.log_std).expand_as(self.location)
        return torch.where(self.binary, -_expected(self.location, self.location), normal)

    def kl(self, old: Mapping[str, Tensor]) -> Chunk:
        """KL(old || this), exact, in nats; ``old`` are another's `parameters`."""
        mean, log_std = old["location"], old["log_std"]
        moved = (2 * log_std).exp() + (mean - self.location).square()
        normal = self.log_std - log_std + 0.5 * moved * (-2 * self.log_std).exp() - 0.5
        binary = _expected(mean, mean) - _expected(mean, self.location)
        return torch.where(self.binary, binary, normal)

    def gap(self, old: Mapping[str, Tensor]) -> Chunk:
        """How far it is from ``old``: of Gaussian entries the larger of the means' distance in standard deviations and
        that of the log_std, of binary ones that of the logits."""
        distance = (self.location - old["location"]).abs()
        normal = torch.maximum(distance * (-self.log_std).exp(), (self.log_std - old["log_std"]).abs())
        return torch.where(self.binary, distance, normal)


def imitation_loss(
    location: Chunk,
    binary: Bool[Tensor, "*B 1 K"],
    action: Chunk,
    mask: Bool[Tensor, "B H K"],
    binary_weight: float,
) -> Float[Tensor, ""]:
    """Huber error of Gaussian entries plus ``binary_weight`` times the cross-entropy of binary ones (VLM4VLA, eq. 1).

    Each is a mean over its entries inside ``mask``; Huber's error turns linear at 1. Only the sign of a binary entry of
    ``action`` counts.
    """
    gaussian = F.huber_loss(location, action, reduction="none")
    # From the logit itself: a probability that rounds to 1 would have no gradient.
    crossed = -F.logsigmoid(_sign(action) * location)
    return _mean(gaussian, mask & ~binary) + binary_weight * _mean(crossed, mask & binary)


def _mean(values: Chunk, where: Bool[Tensor, "B H K"]) -> Float[Tensor, ""]:
    return (values * where).sum() / where.sum().clamp(min=1)


def _sign(values: Tensor) -> Tensor:
    """+1 or -1, never 0."""
    return torch.where(values > 0, 1.0, -1.0).to(values.dtype)


def _expected(logit: Tensor, scored: Tensor) -> Tensor:
    """Expected log-probability that logit ``scored`` gives to draws of logit ``logit``."""
    p = torch.sigmoid(logit)
    return p * F.logsigmoid(scored) + (1 - p) * F.logsigmoid(-scored)
