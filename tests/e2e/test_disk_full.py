"""The disk fills up while a checkpoint is written: the one before it stands, and with room again the run goes on."""

import os
import resource
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rlvla import collect, sft
from rlvla.checkpoints import Checkpoints, verify
from rlvla.compose import compose
from tests.e2e import runs

TOY = ["suite=toy", "workers.kind=local", "workers.num_actors=1", "workers.envs_per_actor=2"]
TRAIN = [
    "iterations=6",
    "episodes_per_iteration=8",
    "inference_batch=4",
    "algo.min_successes=0",
    "algo.epochs=1",
    "eval.trials=2",
    "eval.videos=0",
    "eval.shuffled_images=false",
]
DISK_MB = 64
LEFT_BYTES = 64 * 1024
"""Room for a line of metrics.jsonl, too little for weights."""
SECONDS = 300


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("full")
    local = ["suite=toy", "workers.kind=local", "workers.num_actors=1"]
    collect.run(compose("collect", [*local, f"output={root / 'data'}", "episodes=4"]))
    small = ["suite=toy", "policy=qwen_vla_toy", "steps=3", "batch_size=4"]
    sft.run(compose("sft", [*small, f"dataset={root / 'data'}", f"output={root / 'sft'}"]))
    return root / "sft" / "policy"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of our own, which only root may mount."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "tmpfs", str(disk)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"cannot mount a small disk: {error}")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=False)


def settings(policy: Path, run: Path) -> list[str]:
    return [*TOY, *TRAIN, f"policy={policy}", f"output={run}"]


def finish(policy: Path, run: Path) -> bytes:
    """Run to the end; the weights it made."""
    runs.finish("train", settings(policy, run))
    return (run / "policy" / "model.safetensors").read_bytes()


def fail(policy: Path, run: Path, said_to: Path, fill_up: Callable[[int], None]) -> None:
    """Start, fill the disk up (the argument is the process) when there is a checkpoint, and look at what is left."""
    process = runs.Started("train", settings(policy, run), said_to)
    try:
        until = time.monotonic() + SECONDS
        while not (run / "checkpoints" / "iteration-0001").exists():
            assert process.ended(0) is None, process.said
            assert time.monotonic() < until
            time.sleep(0.01)
        # What the run writes meanwhile would fill the disk up further, or be pruned and make room.
        os.kill(process.pid, signal.SIGSTOP)
        fill_up(process.pid)
        os.kill(process.pid, signal.SIGCONT)
        status, said = process.ended(SECONDS), process.said
    finally:
        process.kill()
    assert status == 1, said
    assert "Traceback" not in said
    assert "cannot save a checkpoint" in said
    assert "Free some space" in said
    assert "the same command goes on from the newest" in said
    kept = sorted((run / "checkpoints").iterdir())
    # Nothing half-written, under any name, and all that is there is whole.
    assert all(path.name.startswith("iteration-") for path in kept)
    assert [verify(path) for path in kept] == [""] * len(kept)
    found = Checkpoints(run / "checkpoints", keep=2).newest(pytest.fail)
    assert found is not None
    assert 1 <= found[1].iterations < 6


def test_a_full_disk_leaves_the_checkpoint_before_and_the_run_ends_as_if_it_had_not_been(
    policy: Path, small_disk: Path, tmp_path: Path
) -> None:
    run, filler = small_disk / "run", small_disk / "filler"

    def fill_up(_: int) -> None:
        free = os.statvfs(small_disk)
        filler.write_bytes(bytes(free.f_bavail * free.f_frsize - LEFT_BYTES))

    fail(policy, run, tmp_path / "said", fill_up)
    filler.unlink()
    assert finish(policy, run) == finish(policy, tmp_path / "straight")


def test_a_file_that_may_not_grow_is_a_full_disk(policy: Path, tmp_path: Path) -> None:
    def limit(pid: int) -> None:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (LEFT_BYTES, LEFT_BYTES))

    fail(policy, tmp_path / "run", tmp_path / "said", limit)
