"""However a run ends, none of its processes outlives it, and the same command goes on with what it left."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

SECONDS_TO_END = 30
SECONDS_TO_WORK = 300
# A spare, and in each actor a child in another interpreter: every kind of process that a run can have.
TOY = ["suite=toy", "workers.num_actors=2", "workers.envs_per_actor=2", "workers.spare=true"]
TRAIN = [
    f"suite.python={sys.executable}",
    "iterations=8",
    "episodes_per_iteration=8",
    "inference_batch=4",
    "algo.min_successes=0",
    "algo.epochs=1",
    "eval.trials=4",
    "eval.videos=0",
    "eval.shuffled_images=false",
]
EXPECTED = ("ray::SimulatorHost", "raylet", "gcs_server", "rlvla_envs")
"""In the command lines of what a run starts."""


class Started:
    """A run and all it started, known by a variable that they inherit and by being its descendants."""

    def __init__(self, *arguments: str) -> None:
        self._mark = f"RLVLA_TEST_RUN={os.getpid()}-{time.monotonic_ns()}"
        name, _, value = self._mark.partition("=")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "rlvla.cli", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env=os.environ | {name: value, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        self._seen: set[tuple[int, str]] = set()

    def look(self) -> dict[int, str]:
        """Living processes of the run and their command lines. One seen once is known, whoever its parent is now."""
        table = {int(path.name): status for path in Path("/proc").glob("[0-9]*") if (status := _status(path))}
        family = {self.process.pid}
        while more := {pid for pid, (parent, _) in table.items() if parent in family} - family:
            family |= more
        marked = {pid for pid in table if self._mark.encode() in _read(pid, "environ").split(b"\0")}
        self._seen |= {(pid, table[pid][1]) for pid in (family | marked) & table.keys()}
        alive = {pid for pid, born in self._seen if pid in table and table[pid][1] == born}
        return {pid: _read(pid, "cmdline").replace(b"\0", b" ").decode(errors="replace") for pid in alive}

    def wait_until_it_works(self, run: Path, iterations: int) -> None:
        until = time.monotonic() + SECONDS_TO_WORK
        while _iterations(run) < iterations:
            assert self.process.poll() is None, self.process.communicate()[1]
            assert time.monotonic() < until
            time.sleep(0.02)
        running = " ".join(self.look().values())
        assert all(name in running for name in EXPECTED), running

    def end(self) -> tuple[int, str]:
        """Its exit status and what it said, after it has ended by itself."""
        _, said = self.process.communicate(timeout=SECONDS_TO_WORK)
        return self.process.returncode, said

    def require_nothing_left(self) -> None:
        until = time.monotonic() + SECONDS_TO_END
        while (left := self.look()) and time.monotonic() < until:
            time.sleep(0.2)
        assert not left

    def clean_up(self) -> None:
        """After a failure: whatever the run should have ended."""
        for pid in self.look():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        for pipe in (self.process.stdout, self.process.stderr):
            if pipe is not None:
                pipe.close()


def _status(path: Path) -> tuple[int, str] | None:
    """(parent, time of birth) of a process; None where there is none or only its number is left."""
    try:
        fields = (path / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else (int(fields[1]), fields[19])


def _read(pid: int, name: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:
        return b""


def _iterations(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_text().count('"kind": "iteration"') if path.exists() else 0


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from rlvla import collect, sft
    from rlvla.compose import compose

    root = tmp_path_factory.mktemp("left")
    local = ["suite=toy", "workers.kind=local", "workers.num_actors=1"]
    collect.run(compose("collect", [*local, f"output={root / 'data'}", "episodes=4"]))
    small = ["suite=toy", "policy=qwen_vla_toy", "steps=3", "batch_size=4"]
    sft.run(compose("sft", [*small, f"dataset={root / 'data'}", f"output={root / 'sft'}"]))
    return root / "sft" / "policy"


def finish(command: list[str], run: Path) -> None:
    """The same command again goes on, ends well and leaves nothing."""
    again = Started(*command)
    try:
        again.wait_until_it_works(run, 8)
        status, said = again.end()
        assert status == 0, said
        assert "going on after iteration" in " ".join(said.split())
        again.require_nothing_left()
    finally:
        again.clean_up()
    assert json.loads((run / "summary.json").read_text())["trials"] == 4


@pytest.mark.slow
@pytest.mark.parametrize("sender", ["driver", "terminal", "scheduler"])
def test_after_ctrl_c_or_a_schedulers_sigterm_nothing_is_left_and_the_run_goes_on_to_an_end_after_which_nothing_is_left(
    policy: Path, tmp_path: Path, sender: str
) -> None:
    run = tmp_path / "run"
    command = ["train", *TOY, *TRAIN, f"policy={policy}", f"output={run}"]
    first = Started(*command)
    try:
        first.wait_until_it_works(run, 2)
        # A terminal interrupts everybody in the group, a script or a scheduler the one process it knows.
        end = os.killpg if sender == "terminal" else os.kill
        end(first.process.pid, signal.SIGTERM if sender == "scheduler" else signal.SIGINT)
        status, said = first.end()
        first.require_nothing_left()
    finally:
        first.clean_up()
    assert status == (143 if sender == "scheduler" else 130), said
    assert "Traceback" not in said
    what = "terminated" if sender == "scheduler" else "interrupted"
    assert said.rstrip().endswith(f"rlvla: {what}. The same command goes on with this run.")
    if sender == "terminal":
        finish(command, run)


@pytest.mark.slow
def test_nothing_outlives_a_driver_that_is_killed_not_even_an_actor_that_hangs(policy: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    first = Started("train", *TOY, *TRAIN, f"policy={policy}", f"output={run}")
    try:
        first.wait_until_it_works(run, 1)
        hung = next(pid for pid, said in first.look().items() if "ray::SimulatorHost" in said)
        os.kill(hung, signal.SIGSTOP)
        first.process.kill()
        first.process.wait()
        first.require_nothing_left()
    finally:
        first.clean_up()
