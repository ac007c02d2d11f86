"""After a driver that was killed, who still writes to the logs of its Ray is ended, and nobody else."""

import io
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from rlvla import ray_remains

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc, which Linux has")

Hold = Callable[[Path, str], "subprocess.Popen[bytes]"]


@pytest.fixture
def hold() -> Iterator[Hold]:
    """Starts a process that has a file open and otherwise sleeps."""
    with ExitStack() as stack:

        def start(path: Path, mode: str) -> "subprocess.Popen[bytes]":
            path.parent.mkdir(exist_ok=True)
            path.touch()
            with path.open(mode) as file:
                process = subprocess.Popen(["sleep", "60"], pass_fds=[file.fileno()])
            stack.callback(process.wait)
            stack.callback(process.kill)
            return process

        yield start


def test_a_writer_is_who_has_a_file_of_the_folder_open_for_writing(hold: Hold, tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    writing = [hold(logs / "worker.out", mode) for mode in ("a", "w", "r+")]
    hold(logs / "worker.out", "r")
    hold(tmp_path / "logs_of_another_session" / "worker.out", "a")
    assert ray_remains.writers(str(logs)) == {process.pid for process in writing}


def test_a_writer_stays_one_when_its_file_is_deleted(hold: Hold, tmp_path: Path) -> None:
    path = tmp_path / "logs" / "worker.out"
    writing = hold(path, "a")
    path.unlink()
    assert ray_remains.writers(str(path.parent)) == {writing.pid}


def test_at_the_end_of_the_driver_writers_are_ended_and_readers_are_not(
    hold: Hold, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "logs" / "worker.out"
    writing, reading = hold(path, "a"), hold(path, "r")
    monkeypatch.setattr(ray_remains, "SECONDS_TO_END", 0.0)
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    ray_remains.main(str(path.parent))
    assert writing.wait(10) < 0
    assert reading.poll() is None
