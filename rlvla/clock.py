"""Where the time of an iteration goes: seconds by name, and a trace for those who look closer."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.profiler import record_function

from rlvla.config import TrainConfig

INFER, SIMULATORS, PHYSICS, RENDER = "infer", "simulators", "physics", "render"
"""The driver deciding; the driver waiting for simulators; and what those did meanwhile, added up over them."""


@dataclass
class Clock:
    """Seconds by name. Each of its spans is also one of the trace, where there is one."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Add what the block takes. Spans of one clock must not overlap."""
        started = time.perf_counter()
        try:
            with record_function(f"rlvla/{name}"):
                yield
        finally:
            self.add(name, time.perf_counter() - started)

    def add(self, name: str, seconds: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    def row(self) -> dict[str, float]:
        """What a rollout's time went into, as metrics.jsonl has it."""
        spent = {name: self.seconds.get(name, 0.0) for name in (INFER, SIMULATORS, PHYSICS, RENDER)}
        return {
            "time/infer_s": spent[INFER],
            "time/simulators_s": spent[SIMULATORS],
            "time/physics_s": spent[PHYSICS],
            "time/render_s": spent[RENDER],
        }


@contextmanager
def traced(path: Path | None) -> Iterator[None]:
    """Write what runs in the block as a Chrome trace (perfetto, chrome://tracing); None writes nothing.

    Ray's actors are other processes, and are in it as time that is waited for.
    """
    if path is None:
        yield
        return
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        yield
    part = path.with_name(f".{path.name}")
    profiler.export_chrome_trace(str(part))
    part.rename(path)


def trace_of(config: TrainConfig, folder: Path, iteration: int, first: int) -> Path | None:
    """Where the trace of this iteration goes: of the second one that this process makes, which has nothing left to warm
    up, or the only one."""
    chosen = min(first + 1, config.iterations - 1)
    return folder / "trace.json" if config.profile and iteration == chosen else None


def memory_row(device: str) -> dict[str, float]:
    """The most memory that this process has had so far, in MB of 1e6 bytes."""
    import resource

    # Linux counts in units of 1024 bytes.
    row = {"memory/driver_mb": 1.024e-3 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}
    if device.startswith("cuda"):
        row["memory/gpu_mb"] = 1e-6 * torch.cuda.max_memory_allocated(device)
    return row
