"""Learner ranks in Ray actors: start them, wait for them, and start them again when one is lost.

All of them are one failure domain: what is left of a group whose rank died is ended, and a new group goes on from the
newest checkpoint as a killed run does. Ray itself restarts and repeats nothing.
"""

import os
import socket
import sys
import tempfile
from collections.abc import Sequence
from contextlib import redirect_stderr, suppress
from pathlib import Path
from typing import Any

from rlvla.cluster import connect, disconnect, node_address
from rlvla.config import ConfigError, LearnerBackend, TrainConfig
from rlvla.ranks import RankLostError, join, leave
from rlvla.run import check_output, pick_device

SECONDS_BETWEEN_LOOKS = 0.3
SECONDS_TO_EXPLAIN = 15.0
"""After a rank says that another was lost: how long that one, or Ray, has to say why."""
SECONDS_TO_START = 300.0


def run_ranks(config: TrainConfig) -> dict[str, Any]:
    """`rlvla train` with several learners.

    Returns:
        The summary of rank 0.

    Raises:
        RuntimeError: more ranks were lost than ``learners.max_restarts``.
        Exception: what a rank raised.
    """
    learners = config.learners
    check_output(config, "train")
    if not Path(config.policy).is_dir():
        raise ConfigError(f"there is no policy folder at {config.policy}. `rlvla sft` writes one to OUTPUT/policy.")
    ray = connect(config.cluster, learners.num)
    losses: list[str] = []
    try:
        num_gpus = _gpus_for_each(config, int(ray.cluster_resources().get("GPU", 0)))
        with tempfile.NamedTemporaryFile(prefix="rlvla-screen-") as screen:
            while True:
                try:
                    return _run_group(ray, config, num_gpus, losses, Path(screen.name))
                except RankLostError as lost:
                    losses.append(str(lost))
                    if len(losses) > learners.max_restarts:
                        raise RuntimeError(
                            f"{lost}. That was loss {len(losses)}; learners.max_restarts is {learners.max_restarts}. "
                            "The same command goes on from the newest checkpoint."
                        ) from lost
                    print(f"{lost}; starting the learners again from the newest checkpoint", file=sys.stderr)
    finally:
        disconnect(ray)


def _gpus_for_each(config: TrainConfig, num_gpus: int) -> int:
    """1 where the ranks run on GPUs, else 0.

    Raises:
        ConfigError: there are fewer GPUs than ranks, or NCCL has none.
    """
    learners = config.learners
    on_gpu = pick_device(config.device) != "cpu"
    if on_gpu and num_gpus < learners.num:
        raise ConfigError(
            f"learners.num is {learners.num} and Ray sees {num_gpus} GPUs; each rank needs one. Use fewer ranks, or "
            "device=cpu."
        )
    if learners.backend is LearnerBackend.nccl and not on_gpu:
        raise ConfigError("learners.backend is nccl, which needs GPUs, and the ranks run on the CPU. Use gloo or auto.")
    return int(on_gpu)


def _run_group(ray: Any, config: TrainConfig, num_gpus: int, losses: Sequence[str], screen: Path) -> dict[str, Any]:
    """One group from start to end, whichever it is; none of its processes is left."""
    # No CPUs are reserved: simulators would otherwise find none.
    host = ray.remote(num_cpus=0, num_gpus=num_gpus, max_restarts=0, max_task_retries=0)(LearnerRank)
    actors = [host.remote(rank, config) for rank in range(config.learners.num)]
    try:
        try:
            address = ray.get(actors[0].address.remote(), timeout=SECONDS_TO_START)
        except ray.exceptions.RayActorError as error:
            raise RankLostError("learner rank 0 died while starting") from error
        told = [actor.work.remote(address, list(losses), str(screen), _terminal()) for actor in actors]
        return _wait(ray, told, screen)
    finally:
        for actor in actors:
            ray.kill(actor)
        # The next group's rank 0 needs the run folder's lock, which goes with the process.
        for actor in actors:
            with suppress(ray.exceptions.RayError):
                ray.get(actor.address.remote(), timeout=SECONDS_TO_EXPLAIN)


def _wait(ray: Any, calls: Sequence[Any], screen: Path) -> dict[str, Any]:
    """What rank 0 returns when all are done; else the most telling of what went wrong."""
    ranks = {call: rank for rank, call in enumerate(calls)}
    summary: dict[str, Any] = {}
    lost: RankLostError | None = None
    left = SECONDS_TO_EXPLAIN
    with screen.open() as shown:
        # An earlier group has been shown.
        shown.seek(0, os.SEEK_END)
        while ranks and left > 0:
            ready, _ = ray.wait(list(ranks), num_returns=1, timeout=SECONDS_BETWEEN_LOOKS)
            sys.stderr.write(shown.read())
            sys.stderr.flush()
            if lost is not None:
                left -= SECONDS_BETWEEN_LOOKS
            for call in ready:
                rank = ranks.pop(call)
                try:
                    result = ray.get(call)
                    summary = result if rank == 0 else summary
                except ray.exceptions.RayActorError as error:
                    raise RankLostError(f"learner rank {rank} died: {str(error).splitlines()[0]}") from error
                except ray.exceptions.RayTaskError as error:
                    cause = error.cause if isinstance(error.cause, Exception) else error
                    if not isinstance(cause, RankLostError):
                        raise cause from None
                    # Whoever was lost has more to say than who noticed.
                    lost = lost or cause
        sys.stderr.write(shown.read())
    if lost is not None:
        raise lost
    return summary


def _terminal() -> dict[str, str]:
    """What rich must know to draw on our terminal from another process."""
    if not sys.stderr.isatty():
        return {}
    width, height = os.get_terminal_size(sys.stderr.fileno())
    return {"FORCE_COLOR": "1", "COLUMNS": str(width), "LINES": str(height)}


class LearnerRank:
    """The inside of a Ray actor: one rank from start to end."""

    def __init__(self, rank: int, config: TrainConfig) -> None:
        self._rank, self._config = rank, config

    def address(self) -> str:
        """Where rank 0 can be met."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return f"tcp://{node_address()}:{probe.getsockname()[1]}"

    def work(self, address: str, losses: list[str], screen: str, terminal: dict[str, str]) -> dict[str, Any]:
        """Take part in the run; the summary on rank 0, nothing elsewhere.

        Args:
            losses: what ended earlier groups.
            screen: file that the driver copies to its own stderr.
        """
        import warnings

        import torch

        from rlvla.train import follow, lead

        config, learners = self._config, self._config.learners
        warnings.simplefilter("ignore")
        # Ray gives an actor one thread; one learner would use all cores.
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // learners.num))
        backend = learners.backend
        if backend is LearnerBackend.auto:
            backend = LearnerBackend.nccl if pick_device(config.device) != "cpu" else LearnerBackend.gloo
        group = join(address, self._rank, learners.num, backend=backend.value, timeout_s=learners.timeout_s)
        summary: dict[str, Any] = {}
        if group.leads:
            os.environ.update(terminal)
            with Path(screen).open("a", buffering=1) as shown, redirect_stderr(shown):
                summary = lead(config, group, losses)
        else:
            follow(config, group)
        # Not after a failure: the driver ends this process, and closing connections first would give the other ranks a
        # second thing to complain of.
        leave()
        return summary
