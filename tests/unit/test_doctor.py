"""The doctor on machines that are broken in one way each, really broken where that can be had."""

import os
import resource
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from rlvla.compose import compose
from rlvla.config import DoctorConfig
from rlvla.doctor import line
from rlvla.probes import (
    Finding,
    Played,
    ProbeError,
    Status,
    ask,
    guarded,
    probe_cores,
    probe_disk,
    probe_gpu,
    probe_mujoco,
    probe_packages,
    probe_play,
    probe_ray,
    probe_shared_memory,
    probe_suite,
    probe_vulkan,
    suite_names,
)
from rlvla_envs.base import SuiteConfig
from rlvla_envs.simpler_assets import check_assets
from rlvla_envs.simpler_tasks import chosen_tasks
from rlvla_envs.suites import SUITES

TOY = SuiteConfig(name="toy", image_size=32, max_episode_steps=32)


def doctor(*overrides: str) -> DoctorConfig:
    config: DoctorConfig = compose("doctor", ["suite=toy", *overrides])
    return config


# --- processes


def test_an_answer_comes_back_through_json() -> None:
    assert ask("math:gcd", 12, 18, deadline_s=60) == 6


def test_a_probe_that_crashes_is_named_with_its_signal() -> None:
    # Reads address 0.
    with pytest.raises(ProbeError, match="SIGSEGV"):
        ask("ctypes:string_at", 0, deadline_s=60)


def test_a_probe_that_hangs_is_ended_with_all_it_started() -> None:
    with pytest.raises(ProbeError, match="no answer within 2 s"):
        ask("os:system", "sleep 7353 & sleep 7353", deadline_s=2)
    # A process that was killed is in the table until the kernel has come to it.
    until = time.monotonic() + 20
    while "sleep 7353" in (left := running()) and time.monotonic() < until:
        time.sleep(0.1)
    assert "sleep 7353" not in left


def running() -> list[str]:
    """Command lines of all processes."""
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    return [text.strip() for text in listed.splitlines()]


def test_a_probe_that_raises_says_what() -> None:
    with pytest.raises(ProbeError, match="nowhere"):
        ask("os:listdir", "/nowhere", deadline_s=60)
    with pytest.raises(ProbeError, match="ModuleNotFoundError: No module named 'no_such_module'"):
        ask("no_such_module:f", deadline_s=60)


@pytest.mark.parametrize("exit_with", ["ctypes.string_at, 0", "time.sleep, 600"])
def test_an_answer_survives_a_crash_or_a_hang_on_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exit_with: str
) -> None:
    (tmp_path / "fragile.py").write_text(
        f"import atexit, ctypes, time\natexit.register({exit_with})\ndef f():\n    print('noise')\n    return 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert ask("fragile:f", deadline_s=10) == 3


def test_a_probe_that_fails_in_this_process_is_a_finding() -> None:
    def broken() -> list[Finding]:
        raise KeyError("surprise")

    (finding,) = guarded("thing", broken, deadline_s=60)
    assert (finding.name, finding.status) == ("thing", Status.missing)
    assert "KeyError: 'surprise'" in finding.found
    assert finding.fix


def test_a_probe_that_never_returns_is_a_finding() -> None:
    forever = threading.Event()

    def stuck() -> list[Finding]:
        forever.wait()
        return []

    (finding,) = guarded("thing", stuck, deadline_s=0.2)
    assert "no answer within 0.2 s" in finding.found
    forever.set()


# --- Vulkan


def test_a_machine_without_a_vulkan_driver_is_told_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("VK_ICD_FILENAMES", "VK_DRIVER_FILES"):
        monkeypatch.setenv(name, str(tmp_path / "none.json"))
    (finding,) = probe_vulkan(True, 120)
    assert finding.status is Status.missing
    assert "24.3" in finding.found
    assert "--vulkan" in finding.fix or "mesa-vulkan-drivers" in finding.fix


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import ctypes; ctypes.string_at(0)", "SIGSEGV"),
        ("import time; time.sleep(600)", "no answer within 2 s"),
        ("raise ImportError('libX11.so.6: cannot open shared object file')", "libX11.so.6"),
        ("import sys; sys.exit(3)", "SystemExit"),
    ],
)
def test_a_driver_that_crashes_hangs_or_does_not_load_is_a_finding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, said: str
) -> None:
    (tmp_path / "sapien.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    (finding,) = probe_vulkan(False, 2 if "sleep" in code else 60)
    assert finding.status is Status.missing
    assert said in finding.found
    assert finding.needed is False


@pytest.mark.simulator
def test_a_machine_that_renders_is_believed() -> None:
    (finding,) = probe_vulkan(True, 120)
    assert finding.status is Status.ok
    assert finding.found.startswith("draws on c")


def test_a_library_that_is_not_there_is_named() -> None:
    with pytest.raises(ProbeError, match="libnowhere"):
        ask("rlvla.probes:load_library", "libnowhere.so", deadline_s=60)


def test_mujoco_is_asked_for_the_library_that_its_variable_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUJOCO_GL", "glfw")
    (finding,) = probe_mujoco(True, 60)
    assert "MUJOCO_GL=glfw" in finding.found
    assert finding.status is Status.ok or "libglfw3" in finding.fix


# --- disks


def test_a_disk_that_takes_no_file_is_missing(run_python: Callable[[str], str], tmp_path: Path) -> None:
    # A file can grow to 100 kB, then the kernel refuses, as on a full disk.
    said = run_python(
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "from pathlib import Path\nfrom rlvla.probes import probe_disk\n"
        f"(f,) = probe_disk('disk', Path({str(tmp_path)!r}) / 'runs' / 'x', 0)\nprint(f.status.value, f.found, f.fix)"
    )
    assert said.startswith(f"missing {tmp_path} takes no file: File too large")
    assert "output=" in said
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 100_000


def test_a_disk_with_too_little_room_is_missing_and_says_how_much_it_takes(tmp_path: Path) -> None:
    (finding,) = probe_disk("disk", tmp_path / "not" / "yet", 1e18)
    assert finding.status is Status.missing
    assert "1000000000.0 are needed" in finding.found
    assert not (tmp_path / "not").exists()
    assert probe_disk("disk", tmp_path, 0)[0].status is Status.ok


def test_little_shared_memory_is_a_warning(tmp_path: Path) -> None:
    (finding,) = probe_shared_memory(True, tmp_path / "none")
    assert finding.status is Status.warning
    assert "--shm-size" in finding.fix


# --- packages, cores, devices


def test_packages_that_are_absent_or_old_are_named_with_one_command() -> None:
    (finding,) = probe_packages({"no-such-package": ">=1.0", "numpy": ">=9999", "torch": ">=2.7"})
    assert finding.status is Status.missing
    assert "no-such-package is absent, needs >=1.0" in finding.found
    assert finding.fix.endswith('-m pip install "no-such-package>=1.0" "numpy>=9999"')
    assert probe_packages({"torch": ">=2.7,<99"})[0].status is Status.ok


def test_a_process_that_may_use_fewer_cores_than_it_sees_is_told_how_many_actors_to_start(
    run_python: Callable[[str], str],
) -> None:
    if (os.cpu_count() or 1) < 2:
        pytest.skip("one core")
    said = run_python(
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "from rlvla.compose import compose; from rlvla.probes import probe_cores\n"
        "print(*[(f.status.value, f.fix) for f in probe_cores(compose('doctor', []))])"
    )
    assert "warning" in said
    assert "workers.num_actors=1" in said
    assert probe_cores(doctor("workers.num_actors=1"))[0].status is Status.ok


def test_a_gpu_that_was_asked_for_and_is_not_there_is_missing() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    (finding,) = probe_gpu(doctor("device=cuda"), 120, [])
    assert (finding.status, finding.needed) == (Status.missing, True)
    assert probe_gpu(doctor(), 120, [])[0].status is not Status.missing


# --- suites


def test_assets_that_are_not_there_are_missing_with_the_download_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MS_ASSET_DIR", str(tmp_path))
    config = compose("doctor", ["suite=simpler_env"]).suite
    (finding,) = probe_suite("simpler_env", config)
    assert finding.status is Status.missing
    assert finding.needed
    assert str(tmp_path) in finding.found
    assert finding.fix == (
        f"MS_ASSET_DIR={tmp_path} python -m mani_skill.utils.download_asset bridge_v2_real2sim widowx250s"
    )
    # Another run does not care.
    assert probe_suite("simpler_env", TOY)[0].needed is False


def test_stand_ins_are_named(simpler_assets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MS_ASSET_DIR", str(simpler_assets))
    notes = check_assets(simpler_assets, chosen_tasks("simpler_env", "all"))
    (finding,) = probe_suite("simpler_env", compose("doctor", ["suite=simpler_env"]).suite)
    assert finding.status is (Status.warning if notes else Status.ok)
    assert all(note in finding.found for note in notes)


def test_a_task_that_a_suite_does_not_have_is_said_before_it_is_started() -> None:
    config = compose("doctor", ["suite=simpler_env", "suite.task=carot_on_plate"]).suite
    (finding,) = probe_suite("simpler_env", config)
    assert finding.status is Status.missing
    assert "Did you mean 'carrot_on_plate'?" in finding.found


@pytest.mark.parametrize("name", SUITES)
def test_every_suite_has_a_finding(name: str) -> None:
    (finding,) = probe_suite(name, TOY)
    assert finding.name == f"suite {name}"
    assert suite_names(TOY)[0] == "toy"
    assert set(suite_names(TOY)) == set(SUITES)


def test_a_suite_that_works_says_what_a_plan_needs() -> None:
    played: list[Played] = []
    (finding,) = probe_play(TOY, 120, played)
    assert finding.status is Status.ok
    assert played[0].spec.action_size == 2
    assert played[0].instruction == "fly through the gap and reach the green goal"


def test_a_suite_that_does_not_start_gives_its_own_words() -> None:
    played: list[Played] = []
    (finding,) = probe_play(SuiteConfig(name="toy", task="gate", options={"nonsense": 1}), 120, played)
    assert finding.status is Status.missing
    assert "nonsense" in finding.found
    assert not played


# --- Ray


@pytest.mark.slow
def test_a_token_that_others_can_read_is_a_warning_with_the_cure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    for name in ("RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    (finding,) = probe_ray(True, 120)
    token = tmp_path / "rlvla" / "ray_token"
    assert finding.status is Status.ok, finding.found
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    token.chmod(0o644)
    (finding,) = probe_ray(True, 120)
    assert finding.status is Status.warning
    assert finding.fix == f"chmod 600 {token}"


def test_ray_that_does_not_start_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ray.py").write_text("raise OSError('no room for a session')")
    monkeypatch.syspath_prepend(tmp_path)
    (finding,) = probe_ray(True, 60)
    assert finding.status is Status.missing
    assert "no room for a session" in finding.found
    assert "workers.kind=local" in finding.fix


# --- the page


def test_a_problem_is_followed_by_the_command_that_cures_it() -> None:
    shown = line(Finding("vulkan", Status.missing, "cannot draw", fix="sudo scripts/setup.sh --vulkan"))
    first, second = shown.splitlines()
    assert first.split() == ["missing", "vulkan", "cannot", "draw"]
    assert second.strip() == "-> sudo scripts/setup.sh --vulkan"
    assert second.startswith(" ")
    assert "\n" not in line(Finding("python", Status.ok, "3.11", fix=sys.executable))
    assert "suite libero_spatial_pro here" in line(Finding("suite libero_spatial_pro", Status.ok, "here"))
    aside = line(Finding("osmesa", Status.missing, "absent", fix="x", needed=False))
    assert "this run does not need it" in aside
