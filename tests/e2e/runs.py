"""What tests need that start `rlvla` in a process, kill it and compare what two runs left."""

import json
import multiprocessing
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from rlvla import cli, collect, sft
from rlvla.compose import compose

# One environment: an evaluation takes long enough to be killed in.
TOY = ["suite=toy", "workers.kind=local", "workers.num_actors=1", "workers.envs_per_actor=1"]
TRAIN = [
    # The default computes sixteen rows for the one that is there.
    "inference_batch=4",
    "episodes_per_iteration=8",
    "algo.critic_only_iterations=1",
    "algo.min_successes=0",
    "algo.epochs=2",
    "eval.trials=12",
    "eval.videos=0",
    "eval.every=2",
]
UNTIMED = ("minutes", "time/", "speed/", "memory/")


def make_policy(root: Path, suite: list[str], *settings: str) -> Path:
    whole = [setting for setting in suite if "max_episode_steps" not in setting]
    collect.run(compose("collect", [*whole, f"output={root / 'data'}", "episodes=4"]))
    chosen = [s for s in suite if s.startswith("suite")]
    sft.run(compose("sft", [*chosen, *settings, f"dataset={root / 'data'}", f"output={root / 'sft'}"]))
    return root / "sft" / "policy"


class Started:
    """`rlvla VERB ...` in a process and a process group of its own.

    It is forked from a process that has imported everything and in which nothing has run: a test that starts six waits
    for torch and transformers once. `test_nothing_left` and others start the program itself.

    Args:
        said: the file for its stderr. Its stdout goes beside it.
        environment: variables to set beside those of the first process that was started so.
    """

    def __init__(self, verb: str, settings: list[str], said: Path, environment: dict[str, str] | None = None) -> None:
        self._said = said
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(
            ["rlvla.train", "rlvla.evaluate", "rlvla.sft", "rlvla.policies.qwen_vla", "transformers.models.qwen3_5"]
        )
        self._process = context.Process(target=_enter, args=([verb, *settings], said, environment or {}))
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def ended(self, timeout: float | None = None) -> int | None:
        """The exit status; None while it runs."""
        self._process.join(timeout)
        return self._process.exitcode

    def kill(self) -> None:
        """SIGKILL the whole process group, and wait for its end."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.join()

    @property
    def said(self) -> str:
        """What it has written to stderr."""
        return self._said.read_text()

    @property
    def printed(self) -> str:
        """What it has written to stdout."""
        return _stdout(self._said).read_text()


def _stdout(said: Path) -> Path:
    return said.with_name(f"{said.name}.stdout")


def _enter(words: list[str], said: Path, environment: dict[str, str]) -> None:
    os.setsid()
    os.environ.update(environment)
    for number, file in ((1, _stdout(said)), (2, said)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    cli.main(words)


def rlvla(*words: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """`rlvla VERB ...` to its end, as `subprocess.run` gives it."""
    with tempfile.TemporaryDirectory() as folder:
        process = Started(words[0], list(words[1:]), Path(folder) / "said", environment)
        try:
            status = process.ended(300)
            assert status is not None, f"{words} has not ended: {process.said}"
            return subprocess.CompletedProcess(words, status, process.printed, process.said)
        finally:
            process.kill()


def start(verb: str, settings: list[str]) -> Started:
    (output,) = [setting.removeprefix("output=") for setting in settings if setting.startswith("output=")]
    return Started(verb, settings, Path(f"{output}.stderr"))


def finish(verb: str, settings: list[str]) -> str:
    """Run to the end; what it said on stderr."""
    process = start(verb, settings)
    status = process.ended(300)
    assert status == 0, process.said
    return process.said


def kill_when(condition: Callable[[], bool], verb: str, settings: list[str]) -> None:
    """SIGKILL the whole process group at the moment the condition holds."""
    process = start(verb, settings)
    try:
        until = time.monotonic() + 300
        while not condition():
            assert process.ended(0) is None, process.said
            assert time.monotonic() < until
            time.sleep(0.01)
    finally:
        process.kill()


def rows(run: Path) -> list[dict[str, Any]]:
    """What was logged, without what a clock says."""
    lines = (run / "metrics.jsonl").read_text().splitlines() if (run / "metrics.jsonl").exists() else []
    return [{k: v for k, v in json.loads(line).items() if not k.startswith(UNTIMED)} for line in lines]


def leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict | list):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from leaves(value, f"{prefix}/{key}")
    else:
        yield prefix, tree


def assert_same_run(one: Path, other: Path) -> None:
    assert rows(one) == rows(other)
    newest = "checkpoints/iteration-0006"
    assert {p.name for p in (one / "checkpoints").iterdir()} == {p.name for p in (other / "checkpoints").iterdir()}
    files = ["policy/model.safetensors", f"{newest}/policy/model.safetensors"]
    files += [str(path.relative_to(one)) for path in one.glob("policy/adapter*")]
    for file in files:
        assert (one / file).read_bytes() == (other / file).read_bytes(), f"{file} differs"
    learners = [dict(leaves(torch.load(run / newest / "learner.pt", weights_only=True))) for run in (one, other)]
    assert learners[0].keys() == learners[1].keys()
    assert len(learners[0]) > 20
    for key, value in learners[0].items():
        same = torch.equal(value, learners[1][key]) if isinstance(value, torch.Tensor) else value == learners[1][key]
        assert same, f"{key} of the learner differs"
    for name in ("before", "after", "after-shuffled"):
        results = [json.loads((run / "evaluations" / f"{name}.json").read_text()) for run in (one, other)]
        assert results[0] == results[1]


def assert_kills_leave_no_trace(
    root: Path,
    common: list[str],
    *,
    moments: tuple[str, ...],
    undisturbed: str = "sync",
    schedule: str = "sync",
    straight: Path | None = None,
) -> None:
    """A run of six iterations, once straight and once killed at each moment and continued: the same bits.

    Args:
        moments: of before, iteration, checkpoint and after.
        undisturbed: schedule of the straight run.
        schedule: that of the one that is killed.
        straight: the straight run, where there is one.
    """
    killed = root / "killed"
    if straight is None:
        straight = root / "straight"
        finish("train", [*common, f"output={straight}", f"schedule={undisturbed}"])
    common = [*common, f"output={killed}", f"schedule={schedule}"]

    def before_is_half_done() -> bool:
        log = killed / "evaluations" / "before.episodes.jsonl"
        return log.exists() and log.read_text().count("\n") >= 2

    def iterations_done(number: int) -> bool:
        return sum(row["kind"] == "iteration" for row in rows_so_far(killed)) >= number

    def learner_is_being_written() -> bool:
        written = any((killed / "checkpoints").glob(".stage-*/policy")) and iterations_done(4)
        # It is over in milliseconds: who misses it kills a little later.
        return written or iterations_done(5)

    at: dict[str, Callable[[], bool]] = {
        "before": before_is_half_done,
        "iteration": lambda: iterations_done(2),
        "checkpoint": learner_is_being_written,
        "after": lambda: (killed / "evaluations" / "after.json").exists(),
    }
    for moment in moments:
        kill_when(at[moment], "train", common)
    said = finish("train", [*common, "workers.envs_per_actor=2"])
    assert "going on after iteration" in said
    assert_same_run(straight, killed)
    assert not any((killed / "checkpoints").glob(".*"))


def rows_so_far(run: Path) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text().splitlines() if (run / "metrics.jsonl").exists() else []
    whole = [line for line in lines if line.endswith("}")]
    return [json.loads(line) for line in whole]
