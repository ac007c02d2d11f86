"""The display follows a run on stderr, in a form that suits the reader, and leaves stdout alone."""

import io
import math
import re
import subprocess
import sys
from typing import Any

import pytest

from rlvla.progress import ROWS_SHOWN, SECONDS_BETWEEN_BAR_LINES, Progress, sparkline


class Terminal(io.StringIO):
    """A stream that claims to be one."""

    def isatty(self) -> bool:
        return True

    def last_frame(self) -> str:
        """What stands on the screen: the text after the last redraw, without escape codes."""
        frames = re.split(r"\x1b\[\d*A|\x1b\[2K", self.getvalue())
        return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]|\r", "", frames[-1])


class Clock:
    """Seconds that pass when told."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def _known_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("LINES", "40")


def row(i: int, **more: Any) -> dict[str, Any]:
    return {
        "iteration": i,
        "env_steps": 10_000 * (i + 1),
        "minutes": 2.0 + 1.5 * i,
        "rollout/success": 0.4 + 0.01 * i,
        "ppo/kl": 0.06,
        "ppo/clip_fraction": 0.18,
        "optim/policy_lr": 2e-5,
        "value/explained_variance": 0.43,
        "speed/env_steps_per_s": 171.0,
        "time/rollout_s": 60.0,
        "time/update_s": 30.0,
    } | more


def test_a_log_file_gets_one_line_per_iteration() -> None:
    stream = io.StringIO()
    progress = Progress(stream)
    progress.start("train PushCube-v1", 40)
    for i in range(3):
        progress.iteration(row(i))
    progress.close()
    lines = stream.getvalue().splitlines()
    assert lines[0] == "train PushCube-v1"
    assert len(lines) == 4
    assert lines[1] == (
        "iter 0  steps 10k  success 40%  KL 0.06  clip 18%  lr 2e-05  expl. 0.43  steps/s 171  min 2  ETA 58 min"
    )


def test_a_log_file_gets_at_most_one_bar_line_every_few_seconds() -> None:
    stream, clock = io.StringIO(), Clock()
    progress = Progress(stream, clock)
    for done in range(0, 601):
        clock.now = 0.05 * done
        progress.bar(f"sft loss {1 / (done + 1):.3f}", done, 600)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 30 / SECONDS_BETWEEN_BAR_LINES
    # 100 of 600 steps in 5 seconds leave 500, or 25 seconds.
    assert lines[0] == "sft loss 0.010 100/600  ETA 25 s"


def test_short_work_needs_no_bar_line() -> None:
    stream, clock = io.StringIO(), Clock()
    progress = Progress(stream, clock)
    for start in (0.0, 100.0, 200.0):
        for done in range(5):
            clock.now = start + done
            progress.bar("episodes", done, 4)
    assert stream.getvalue() == ""


def test_what_is_missing_null_or_nan_is_a_dash() -> None:
    stream = io.StringIO()
    progress = Progress(stream)
    progress.start("train", 3)
    progress.iteration({"iteration": 0})
    progress.iteration(row(1, **{"ppo/kl": math.nan, "rollout/success": None, "minutes": None}))
    assert "success -  KL -" in stream.getvalue().splitlines()[1]
    assert "success -  KL -" in stream.getvalue().splitlines()[2]


def test_remaining_time_follows_the_recent_pace() -> None:
    stream = io.StringIO()
    progress = Progress(stream)
    progress.start("train", 40)
    # A slow start of 100 minutes is forgotten; the last eight iterations took two minutes each.
    for i in range(20):
        progress.iteration(row(i, minutes=100 + 2.0 * i))
    assert stream.getvalue().splitlines()[-1].endswith("ETA 40 min")


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()], ids=["file", "terminal"])
def test_stdout_is_never_touched(stream: io.StringIO, capsys: pytest.CaptureFixture[str]) -> None:
    stdout = sys.stdout
    with Progress(stream) as progress:
        progress.start("train", 2)
        progress.note("a note")
        progress.warn("a warning")
        progress.bar("episodes", 1, 2)
        progress.iteration(row(0))
        assert sys.stdout is stdout
    assert capsys.readouterr().out == ""
    assert "a note" in stream.getvalue()
    assert "warning: a warning" in stream.getvalue()


def test_without_a_stream_it_follows_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress()
    progress.start("train", 1)
    progress.iteration(row(0))
    assert "success 40%" in capsys.readouterr().err


def test_a_terminal_shows_the_last_iterations_and_two_bars() -> None:
    stream = Terminal()
    progress = Progress(stream)
    progress.start("train PushCube-v1", 40)
    for i in range(30):
        progress.iteration(row(i))
    progress.bar("episodes", 64, 256)
    shown = stream.last_frame()
    numbers = [int(m) for m in re.findall(r"^ *(\d+) ", shown, re.M)]
    assert numbers == list(range(30 - ROWS_SHOWN, 30))
    assert "30/40" in shown
    assert "64/256" in shown
    assert "success ▄" in shown
    progress.close()


@pytest.mark.parametrize("width", [40, 60, 76, 80, 200])
def test_numbers_are_never_cut_at_any_width(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    stream = Terminal()
    with Progress(stream) as progress:
        progress.start("train PushCube-v1", 1000)
        for i in range(989, 1000):
            worst = {"ppo/kl": 0.00012, "value/explained_variance": -0.0012, "minutes": 1230.0 + i}
            progress.iteration(row(i, env_steps=123_456_789, **worst))
        assert "…" not in stream.last_frame()
        assert ("steps/s" in stream.last_frame()) == (width >= 76)


def test_square_brackets_are_text_not_markup() -> None:
    stream = Terminal()
    with Progress(stream) as progress:
        progress.start("train", 1)
        progress.note("policy [red]runs/sft[/red]")
        progress.bar("[bold]episodes", 1, 2)
    assert "[red]runs/sft[/red]" in stream.getvalue()
    assert "[bold]episodes" in stream.getvalue()


def test_a_fast_bar_does_not_flood_the_terminal() -> None:
    stream, clock = Terminal(), Clock()
    with Progress(stream, clock) as progress:
        progress.bar("episodes", 0, 100_000)
        for done in range(1, 1000):
            clock.now += 0.001
            progress.bar("episodes", done, 100_000)
        assert stream.getvalue().count("episodes") <= 12


def test_closing_gives_the_cursor_and_stderr_back_and_may_be_repeated() -> None:
    stream, stderr = Terminal(), sys.stderr
    progress = Progress(stream)
    progress.start("train", 1)
    progress.iteration(row(0))
    progress.close()
    progress.close()
    assert stream.getvalue().rindex("\x1b[?25h") > stream.getvalue().rindex("\x1b[?25l")
    assert sys.stderr is stderr


def test_a_dumb_terminal_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    stream = Terminal()
    with Progress(stream) as progress:
        progress.start("train", 1)
        progress.iteration(row(0))
    assert "\x1b" not in stream.getvalue()


def test_the_sparkline_keeps_its_scale_and_its_gaps() -> None:
    assert sparkline([0.0, 0.5, None, math.nan, 1.0]) == "▁▅  █"
    assert sparkline([]) == ""
    assert len(sparkline([0.3] * 1000)) <= 24
    # Averaged in pairs: 0.0 and 1.0 make 0.5.
    assert sparkline([0.0, 1.0] * 24) == "▅" * 24


def test_importing_the_module_does_not_import_rich() -> None:
    code = "import sys, rlvla.progress; sys.exit(any(m.split('.')[0] == 'rich' for m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": ":".join(sys.path)}, check=False)
    assert done.returncode == 0
