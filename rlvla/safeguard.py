"""Stop a collapse: when rollouts succeed significantly less often than the best ones did, go back to the weights that
made those, and go on more slowly (docs/algorithms.md#the-safeguard)."""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rlvla.checkpoints import Checkpoints, TrainState, verify
from rlvla.config import SafeguardConfig
from rlvla.run import Run


@dataclass(frozen=True, kw_only=True)
class Watch:
    """What the safeguard remembers; a part of `rlvla.checkpoints.TrainState`, so that a resumed run goes on with it."""

    best: int = -1
    """Iterations that the best weights had seen, which is their checkpoint's number; -1 where there are none yet."""
    successes: float = 0
    """Of the rollouts they made."""
    episodes: int = 0
    returns: int = 0
    """How often the run went back."""
    caution: float = 1.0
    """Factor on learning rates and KL target."""


def significantly_below(successes: float, episodes: int, best: float, best_episodes: int, confidence: float) -> bool:
    """Whether a success rate lies more than ``confidence`` standard errors of the difference below another.

    The error is that of the pooled rate, with one success and one failure added to it: without them the difference
    between none of many and all of many would have no error at all.
    """
    pooled = (successes + best + 1) / (episodes + best_episodes + 2)
    error = math.sqrt(pooled * (1 - pooled) * (1 / episodes + 1 / best_episodes))
    return best / best_episodes - successes / episodes > confidence * error


def look(watch: Watch, config: SafeguardConfig, iteration: int, success: float, episodes: int) -> tuple[Watch, bool]:
    """Take in what the rollouts of an iteration, made with the weights before it, say.

    Returns:
        The new memory, and whether to go back.
    """
    successes = round(success * episodes)
    if watch.episodes and significantly_below(successes, episodes, watch.successes, watch.episodes, config.confidence):
        if watch.returns >= config.max_returns:
            return watch, False
        return replace(watch, returns=watch.returns + 1, caution=watch.caution * config.slowdown), True
    # Of equals the later one: it has seen more.
    if not watch.episodes or successes / episodes >= watch.successes / watch.episodes:
        watch = replace(watch, best=iteration, successes=successes, episodes=episodes)
    return watch, False


def guard(
    config: SafeguardConfig,
    row: Mapping[str, Any],
    state: TrainState,
    checkpoints: Checkpoints,
    record: Run,
    go_back: Callable[[Path, float], None],
) -> dict[str, float] | None:
    """What is remembered after an iteration; None without a safeguard. When it finds a collapse the best weights take
    the place of those that the update has made of the collapsed ones.

    Args:
        row: of the iteration, as metrics.jsonl has it.
        go_back: has all ranks go on from a checkpoint, with a factor on learning rates and KL target.
    """
    if not config.enabled:
        return None
    before = watch_of(state.watch)
    rate, episodes, iteration = row["rollout/success"], row["rollout/episodes"], row["iteration"]
    if not episodes:
        # All were lost with their simulators.
        return asdict(before)
    watch, collapsed = look(before, config, iteration, rate, episodes)
    below = f"rollouts succeed in {rate:.0%}, those of iteration {watch.best} in {watch.successes / watch.episodes:.0%}"
    if collapsed:
        folder = best_checkpoint(checkpoints, watch)
        if folder is None:
            record.alarm(f"iteration {iteration}", f"{below}, and the checkpoint to go back to is gone or damaged")
            return asdict(before)
        go_back(folder, watch.caution)
        record.alarm(
            f"iteration {iteration}",
            f"collapse: {below}. Went back to {folder.name}; learning rates and KL target are {watch.caution:g} times "
            f"what they were (return {watch.returns} of at most {config.max_returns})",
        )
    elif significantly_below(round(rate * episodes), episodes, watch.successes, watch.episodes, config.confidence):
        record.alarm(f"iteration {iteration}", f"{below}, and safeguard.max_returns is used up; the run goes on")
    return asdict(watch)


def best_checkpoint(checkpoints: Checkpoints, watch: Watch) -> Path | None:
    """The folder to go back to; None where it is damaged or gone."""
    folder = checkpoints.folder / checkpoints.name(watch.best)
    return folder if folder.is_dir() and not verify(folder) else None


def watch_of(state: dict[str, Any] | None) -> Watch:
    """From what a checkpoint has kept."""
    return Watch(**(state or {}))
