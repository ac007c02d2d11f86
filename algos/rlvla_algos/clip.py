"""Clips that mean the same under every reduction of a chunk's log-ratios."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rlvla_algos.ppo import Reduction


def clip_power(mask: Bool[Tensor, "M H K"], reduction: Reduction, terms: int) -> Float[Tensor, " M"]:
    """The power p for which a ratio within [(1 - e)^p, (1 + e)^p] is one whose entries are, on average, within 1 +- e.

    Let each Gaussian's log-ratio scatter with deviation d. A decision has n valid entries, each the sum of W
    independent ones (denoising steps). The log-ratio that is clipped then scatters with p d:

        elementwise  sqrt(W)      sum  sqrt(n W)      mean  sqrt(W / n)      sqrt  sqrt(W)

    So one ``clip_epsilon``, that of a single Gaussian, serves all four. Without it a clip of 0.2 cuts off most ratios
    of a sum and none of a mean.

    Args:
        mask: valid entries; a row without any gets that of one entry.
        terms: W, at least 1.
    """
    num_valid = mask.sum(dim=(1, 2)).clamp(min=1).float()
    if reduction == "sum":
        return (num_valid * terms).sqrt()
    if reduction == "mean":
        return (terms / num_valid).sqrt()
    return torch.full_like(num_valid, float(terms)).sqrt()
