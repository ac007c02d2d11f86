"""The decisions of an update in equal parts: minibatches of all ranks, and passes of what fits into memory."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from tensordict import TensorDict
from torch import Tensor

from rlvla.ranks import Group


@dataclass
class Minibatch:
    """This rank's rows of a minibatch of all ranks."""

    data: TensorDict
    rows: int
    """Decisions of all ranks together."""
    weight: float
    """0 where this rank has no row: it then runs one that counts nothing, because the others wait for its part."""
    index: Tensor
    """Where ``data`` is among this rank's decisions."""
    whole: "Minibatch | None" = None
    """What this is a pass of, where a minibatch takes several; ``rows`` are still those of all."""


def minibatches(data: TensorDict, rng: np.random.Generator, size: int, group: Group) -> Iterator[Minibatch]:
    """A permutation of all ranks' decisions in equal parts of about ``size``, and of each this rank's rows.

    Equal parts, because a small last minibatch would be a noisy step of full size.
    """
    counts = [int(count) for count in group.gather(len(data))]
    first = sum(counts[: group.rank])
    order = rng.permutation(sum(counts))
    for part in np.array_split(order, max(1, round(len(order) / size))):
        mine = part[(part >= first) & (part < first + len(data))] - first
        rows = data[torch.from_numpy(mine).to(data.device)] if len(mine) else nothing(data)
        yield Minibatch(rows, len(part), float(len(mine) > 0), torch.from_numpy(mine))


def passes(part: Minibatch, most: int | None, group: Group) -> Iterator[Minibatch]:
    """A minibatch in equal parts of at most ``most`` rows, as many parts on every rank; None: in one."""
    number = 1 if most is None else int(group.largest(-(-len(part.data) // most))[0])
    if number == 1:
        yield part
        return
    for rows in np.array_split(np.arange(len(part.data)), number):
        held = len(rows) > 0 and part.weight > 0
        piece = part.data[torch.from_numpy(rows).to(part.data.device)] if len(rows) else nothing(part.data)
        index = part.index[torch.from_numpy(rows)] if held else part.index[:0]
        yield Minibatch(piece, part.rows, float(held), index, part)


def nothing(data: TensorDict) -> TensorDict:
    """A row that can be run like any other and counts nothing."""
    row = data[:1].copy()
    row["mask"] = torch.zeros_like(row["mask"])
    return row
