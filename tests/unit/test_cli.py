"""What the command line says when it ends otherwise than well."""

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
