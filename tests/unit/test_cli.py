"""What the command line says when it ends otherwise than well."""

from collections.abc import Callable
from typing import Any

import pytest

from rlvla import cli


def test_an_error_that_an_interrupt_left_behind_is_an_interrupt(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(verb: str, overrides: list[str]) -> Any:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt as interrupt:
            raise AttributeError("'NoneType' object has no attribute '_invalidate_flags_cache'") from interrupt

    monkeypatch.setattr(cli, "_run", run)
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "policy=x"])
    assert stop.value.code == 130
    assert capsys.readouterr().err == "rlvla: interrupted. The same command goes on with this run.\n"


def test_an_error_of_its_own_stays_one(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def run(verb: str, overrides: list[str]) -> Any:
        raise AttributeError("no such thing")

    monkeypatch.setattr(cli, "_run", run)
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "policy=x"])
    assert stop.value.code == 1
    assert "AttributeError: no such thing" in capsys.readouterr().err


def test_what_needs_no_network_is_said_without_importing_one(run_python: Callable[[str], str]) -> None:
    # Seconds that whoever mistypes an option, asks for --help or watches a study would wait for.
    code = """
import sys
from rlvla import cli
from rlvla.compose import ConfigError, compose
for verb in ("train", "tune", "eval", "doctor", "suites"):
    cli.main([verb, "--help"])
try:
    compose("train", ["policy=x", "iterationss=3"])
except ConfigError:
    import rlvla.tune, rlvla.doctor, rlvla.suites
    print("refused", *sorted({"torch", "transformers", "tensordict", "ray", "scipy"} & set(sys.modules)))
"""
    assert run_python(code).splitlines()[-1].split() == ["refused"]


def test_a_simulator_process_has_one_thread_and_no_torch_that_its_world_does_not_use(
    run_python: Callable[[str], str],
) -> None:
    code = """
import os, sys
os.environ["OMP_NUM_THREADS"] = "2"
from rlvla.hosts import SimulatorHost
from rlvla_envs.base import SuiteConfig
host = SimulatorHost(SuiteConfig(name="toy"), 1)
host.spec()
print("torch" in sys.modules)
import torch
print(torch.get_num_threads())
torch.set_num_threads(2)
SimulatorHost(SuiteConfig(name="toy"), 1)
print(torch.get_num_threads())
"""
    assert run_python(code).split() == ["False", "1", "1"]
