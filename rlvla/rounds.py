"""What decisions were made from, left where the rounds of a rollout put it.

Images and contexts are most of what a rollout holds. A rollout [E, T] has the number of each decision's row instead,
and a pass over decisions copies the rows it needs. There is no other copy: images stay in the arrays that simulators
handed out.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from tensordict import TensorDict
from torch import Tensor

from rlvla.policies.base import pad_tokens
from rlvla_envs.base import Observation, stack_views

IMAGES = ("batch", "images")


class Rounds:
    """``context``, ``batch`` or both of decisions, in the blocks they were made in, whose rows are numbered through."""

    def __init__(
        self, blocks: Sequence[TensorDict], seen: Sequence[Observation] = (), cameras: Sequence[str] = ()
    ) -> None:
        """
        Args:
            blocks: [n] each, with the same keys; their tokens are padded to the longest.
            seen: [n] each, what has the blocks' images where ``batch`` is without them.
            cameras: of these images, in their order.
        """
        self._pictures = list(Observation.concatenate(seen).rows) if seen else []
        self._cameras = tuple(cameras)
        self._starts = np.cumsum([0, *(len(block) for block in blocks)])
        self._columns: dict[Any, list[Tensor]] = {}
        for key in ("context", "batch"):
            if key not in blocks[0]:
                continue
            for block in pad_tokens([block[key] for block in blocks]):
                for name, tensor in block.items(include_nested=True, leaves_only=True):
                    path = (key, *(name if isinstance(name, tuple) else (name,)))
                    self._columns.setdefault(path, []).append(tensor)

    def take(self, rows: Int[Tensor, " M"], *path: str) -> TensorDict:
        """Rows by their numbers, in one copy; of what is under ``path`` alone, if one is given."""
        numbers = rows.cpu().numpy()
        blocks = np.searchsorted(self._starts, numbers, side="right") - 1
        places = list(zip(blocks.tolist(), (numbers - self._starts[blocks]).tolist(), strict=True))
        found = TensorDict({}, batch_size=[len(places)], device=rows.device)
        for name, column in self._columns.items():
            if name[: len(path)] == path:
                # By views of the rows: to index a tensor of images takes longer on a CPU.
                found[name] = torch.stack([column[block][place] for block, place in places])
        if self._pictures and IMAGES[: len(path)] == path:
            images = stack_views([self._pictures[number] for number in numbers.tolist()], self._cameras)
            found[IMAGES] = torch.from_numpy(images)
        return found

    def without(self, key: str) -> "Rounds":
        """The same rows with nothing under a key."""
        rest = Rounds.__new__(Rounds)
        rest._starts = self._starts
        rest._columns = {name: column for name, column in self._columns.items() if name[0] != key}
        rest._pictures, rest._cameras = ([], ()) if key == IMAGES[0] else (self._pictures, self._cameras)
        return rest

    def __contains__(self, key: str) -> bool:
        return any(name[0] == key for name in self._columns)

    @property
    def nbytes(self) -> int:
        """Of all rows."""
        images = sum(int(seen.images[name][i].nbytes) for seen, i in self._pictures for name in self._cameras)
        return images + sum(tensor.nbytes for column in self._columns.values() for tensor in column)


def refer(rollout: TensorDict, rounds: Rounds, rows: Int[Tensor, "..."]) -> None:
    """Let each decision of a rollout be made from one of the rows."""
    rollout["row"] = rows
    rollout.set_non_tensor("rounds", rounds)


def recall(decisions: TensorDict, *, next_images: bool = False) -> TensorDict:
    """Decisions [M] with what they were made from, for one pass over them.

    Args:
        next_images: with those of the decisions in ``next_row`` as well (`next_rows`).
    """
    rounds: Rounds = decisions["rounds"]
    whole: TensorDict = decisions.exclude("rounds", "row", "next_row").update(rounds.take(decisions["row"]))
    if next_images:
        row = decisions["next_row"]
        following = rounds.take(row.clamp(min=0), "batch", "images")
        whole["batch", "next"] = TensorDict(
            {"images": following["batch", "images"], "valid": row >= 0}, batch_size=[len(row)]
        )
    return whole


def next_rows(row: Int[Tensor, "E T"], valid: Bool[Tensor, "E T"]) -> Int[Tensor, "E T"]:
    """The row of the decision that follows each valid one, -1 where none does."""
    following = torch.full_like(row, -1)
    follows = valid[:, :-1] & valid[:, 1:]
    following[:, :-1][follows] = row[:, 1:][follows]
    return following


def alone(block: TensorDict) -> TensorDict:
    """A block that keeps nothing but itself: parts of something larger, such as rows that filled it up, are copied."""
    whole: TensorDict = block.apply(lambda x: x.clone() if x.untyped_storage().nbytes() > x.nbytes else x)
    return whole
