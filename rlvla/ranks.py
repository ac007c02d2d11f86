"""Learners that work as one: what they must agree on, and how the gradients meet.

A `Group` of one does nothing and creates no process group, so one learner runs the code it would run without this
module, bit for bit. In a larger group numbers, short messages and failures travel over a gloo group of their own on the
CPU, whose waits may be long; gradients travel over the default group (NCCL on GPUs), whose waits are short.
"""

import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rlvla_algos import ppo

WAIT_FOR_ORDERS = timedelta(days=30)
"""The first rank evaluates alone while the others wait for its next order, and nobody knows for how long. A rank that
dies closes its connections, which ends the wait at once."""


class RankLostError(RuntimeError):
    """Another rank went away in the middle of something common; what is left of the group is of no use."""


class Group:
    """One learner: every sum is its own."""

    rank = 0
    size = 1

    @property
    def leads(self) -> bool:
        """Rank 0 writes the run folder, talks to the person and evaluates."""
        return self.rank == 0

    def total(self, *values: float) -> list[float]:
        """Each value summed over the ranks in float64; the same bits on every rank."""
        return list(values)

    def largest(self, *values: float) -> list[float]:
        """The largest of each value over the ranks; NaN where a rank has NaN."""
        return list(values)

    def mean(self, values: Tensor) -> float:
        """Mean over the elements of all ranks; a rank may have none."""
        return float(values.mean())

    def moments(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and (biased) standard deviation over the elements of all ranks."""
        return ppo.moments(values)

    def variance(self, values: Tensor) -> Tensor:
        """(Biased) variance over the elements of all ranks."""
        return ppo.variance(values)

    def gather(self, message: Any) -> list[Any]:
        """Everybody's message, by rank. Messages are what JSON can say."""
        return [message]

    def broadcast(self, message: Any) -> Any:
        """The message of rank 0."""
        return message

    def average_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Replace each gradient by its mean over the ranks, as DDP and FSDP do for the modules they wrap."""

    def equalize(self, parameters: Iterable[Tensor]) -> None:
        """Give every rank the parameters of rank 0."""

    @contextmanager
    def together(self) -> Iterator[None]:
        """What fails inside on one rank is raised on all. There must be nothing inside that waits for other ranks."""
        yield


ALONE = Group()


def share(number: int, group: Group) -> tuple[int, int]:
    """First and count of a rank's contiguous part of ``number`` things; the first ranks have one more."""
    each, more = divmod(number, group.size)
    return group.rank * each + min(group.rank, more), each + (group.rank < more)


class Ranks(Group):
    """Several learners over torch.distributed, which is initialised."""

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._orders = dist.new_group(backend="gloo", timeout=WAIT_FOR_ORDERS)

    def total(self, *values: float) -> list[float]:
        return [float(value) for value in self._collect(values).sum(dim=0)]

    def largest(self, *values: float) -> list[float]:
        return [float(value) for value in self._collect(values).amax(dim=0)]

    def mean(self, values: Tensor) -> float:
        total, count = self.total(float(values.double().sum()), values.numel())
        return total / count if count else float("nan")

    def moments(self, values: Tensor) -> tuple[Tensor, Tensor]:
        mean, variance = self._moments(values)
        return values.new_tensor(mean), values.new_tensor(variance**0.5)

    def variance(self, values: Tensor) -> Tensor:
        return values.new_tensor(self._moments(values)[1])

    def gather(self, message: Any) -> list[Any]:
        content = json.dumps(message).encode()
        sizes = [int(size) for size in self._collect([len(content)])[:, 0]]
        # gloo gathers tensors of one size only.
        mine = torch.zeros(max(sizes), dtype=torch.uint8)
        mine[: len(content)] = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        parts = [torch.empty_like(mine) for _ in sizes]
        with naming_the_lost():
            dist.all_gather(parts, mine, group=self._orders)
        return [json.loads(bytes(part[:size].tolist())) for part, size in zip(parts, sizes, strict=True)]

    def broadcast(self, message: Any) -> Any:
        # Not by gather: only rank 0 knows how long the others will wait.
        content = bytearray(json.dumps(message).encode()) if self.leads else bytearray()
        size = torch.tensor([len(content)])
        with naming_the_lost():
            dist.broadcast(size, src=0, group=self._orders)
            data = (
                torch.frombuffer(content, dtype=torch.uint8)
                if self.leads
                else torch.empty(int(size), dtype=torch.uint8)
            )
            dist.broadcast(data, src=0, group=self._orders)
        return json.loads(bytes(data.tolist()))

    def average_gradients(self, parameters: Iterable[Tensor]) -> None:
        with naming_the_lost():
            for parameter in parameters:
                assert parameter.grad is not None
                dist.all_reduce(parameter.grad)
                parameter.grad /= self.size

    @torch.no_grad()
    def equalize(self, parameters: Iterable[Tensor]) -> None:
        with naming_the_lost():
            for parameter in parameters:
                dist.broadcast(parameter.data, src=0)

    @contextmanager
    def together(self) -> Iterator[None]:
        failure: Exception | None = None
        try:
            yield
        except RankLostError:
            raise
        except Exception as error:
            failure = error
        said = None if failure is None else [type(failure).__module__, type(failure).__qualname__, str(failure)]
        failures = [message for message in self.gather(said) if message is not None]
        if failure is not None and failures[0] == said:
            raise failure
        if failures:
            raise _rebuilt(*failures[0]) from failure

    def _collect(self, values: Iterable[float]) -> Tensor:
        """[rank, value]: gathered and not reduced, so that every rank adds in one order."""
        mine = torch.tensor(list(values), dtype=torch.float64)
        parts = [torch.empty_like(mine) for _ in range(self.size)]
        with naming_the_lost():
            dist.all_gather(parts, mine, group=self._orders)
        return torch.stack(parts)

    def _moments(self, values: Tensor) -> tuple[float, float]:
        # In two passes: E[x^2] - E[x]^2 loses all digits where the mean is large.
        mean = self.mean(values)
        return mean, self.mean((values.double() - mean).square())


def join(address: str, rank: int, size: int, *, backend: str, timeout_s: float) -> Group:
    """Enter the process group of a run.

    Args:
        address: tcp://host:port, free on rank 0's machine.
        backend: of the gradients: gloo or nccl.
        timeout_s: longest that a rank waits for the others' gradients.
    """
    dist.init_process_group(
        backend, init_method=address, rank=rank, world_size=size, timeout=timedelta(seconds=timeout_s)
    )
    return Ranks()


def leave() -> None:
    """Close the process group; nothing where there is none."""
    if dist.is_initialized():
        # A peer that is gone already must not hide why.
        with suppress(RuntimeError):
            dist.destroy_process_group()


@contextmanager
def naming_the_lost() -> Iterator[None]:
    """Turn what a backend says about a vanished or hung peer into `RankLostError`."""
    try:
        yield
    except RankLostError:
        raise
    except RuntimeError as error:
        # gloo raises plain RuntimeErrors that name their source file.
        if isinstance(error, dist.DistError) or "gloo" in str(error).lower():
            raise RankLostError(f"a learner rank was lost: {error}") from error
        raise


def _rebuilt(module: str, name: str, message: str) -> Exception:
    """Another rank's exception, of its own type where that is known here."""
    kind = getattr(sys.modules.get(module), name, None)
    if isinstance(kind, type) and issubclass(kind, Exception):
        with suppress(TypeError):
            return kind(message)
    return RuntimeError(f"{name}: {message}")
