"""`rlvla doctor` as a user meets it: a page, a line of JSON, an exit status, and never a traceback."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


def doctor(*overrides: str, **environment: str) -> tuple[int, dict[str, Any], str]:
    """(exit status, the line of JSON, the page)."""
    done = subprocess.run(
        [sys.executable, "-m", "rlvla.cli", "doctor", *overrides],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment},
        timeout=600,
        check=False,
    )
    assert "Traceback" not in done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) <= 1
    return done.returncode, json.loads(lines[0]) if lines else {}, done.stderr


@pytest.mark.slow
def test_a_machine_that_can_run_the_toy_is_ready_and_a_run_that_fits_is_planned(tmp_path: Path) -> None:
    status, said, page = doctor(
        "suite=toy", "policy=qwen_vla_toy", f"output={tmp_path / 'out'}", "workers.num_actors=1", "device_memory_gb=80"
    )
    assert status == 0, page
    assert said["ok"]
    assert said["problems"] == []
    assert said["plan"]["fits"]
    assert said["plan"]["places"]["GPU"]["available"] == 80_000_000_000
    assert page.rstrip().endswith("ready")
    names = [finding["name"] for finding in said["findings"]]
    assert {"python", "memory", "disk", "gpu", "shm", "ray", "vulkan", "suite toy", "play toy"} <= set(names)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_machine_without_vulkan_is_not_ready_for_maniskill(tmp_path: Path) -> None:
    none = str(tmp_path / "none.json")
    status, said, page = doctor("suite=push_cube", VK_ICD_FILENAMES=none, VK_DRIVER_FILES=none)
    assert status == 1
    assert said["problems"] == ["vulkan"]
    assert "not ready: vulkan" in page
    # Everything else was looked at all the same, but a simulator that cannot draw was not started.
    assert {f["name"]: f["status"] for f in said["findings"]}["python"] == "ok"
    assert not [f for f in said["findings"] if f["name"].startswith("play")]


@pytest.mark.slow
def test_a_run_that_is_too_large_is_told_the_options() -> None:
    status, said, page = doctor("suite=toy", "policy=qwen_vla_4b", "device_memory_gb=80", "suite.image_size=64")
    assert status == 1
    assert said["problems"] == ["plan, GPU"]
    assert not said["plan"]["fits"]
    assert said["plan"]["cheapest"]["fits"]
    assert "the GPU has 80.0" in page
    assert "algo.minibatch_size=" in page


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["deadline=3"], "Did you mean 'deadline_s'?"),
        (["policy=qwen_vla_tinny"], "Did you mean 'qwen_vla_tiny'?"),
        (["device_memory_gb=80"], "device_memory_gb is 80.0; it must be null without policy="),
        (["policy=qwen_vla_tiny", "device=cpu", "device_memory_gb=80"], "null with device=cpu"),
        (["suite.name=nosuch"], "suite.name is 'nosuch', which does not exist"),
    ],
)
def test_what_a_user_can_correct_ends_with_status_2_before_anything_is_probed(overrides: list[str], said: str) -> None:
    status, summary, page = doctor(*overrides)
    assert status == 2
    assert summary == {}
    assert said in page
    assert "python" not in page.replace("rlvla", "").split()
