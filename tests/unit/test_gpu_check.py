"""scripts/gpu_check.py and gpu_check.sh, on the CPU and at the smallest size: what they will do on a GPU."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
TINY = ["--size", "tiny", "--device", "cpu", "--repeats", "1", "--batches", "1", "2"]


@pytest.fixture(scope="module")
def gpu_check() -> ModuleType:
    # It imports the script beside it by name.
    sys.path.append(str(ROOT / "scripts"))
    spec = importlib.util.spec_from_file_location("gpu_check", ROOT / "scripts/gpu_check.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    torch.set_num_threads(1)
    return module


@pytest.fixture(scope="module")
def checked(gpu_check: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    folder = tmp_path_factory.mktemp("check")
    gpu_check.main([*TINY, "--output", str(folder)])
    return json.loads((folder / "result.json").read_text()), (folder / "result.md").read_text()


def test_every_batch_is_measured_in_every_mode(checked: tuple[dict[str, Any], str]) -> None:
    result, text = checked
    assert [row["rows"] for row in result["deciding"]] == [1, 2]
    assert [(row["mode"], row["rows"]) for row in result["updating"]] == [
        ("frozen_vlm", 1),
        ("frozen_vlm", 2),
        ("lora", 1),
        ("lora", 2),
    ]
    assert all(row["finite"] for row in result["updating"])
    for row in [*result["deciding"], *result["updating"]]:
        assert row["seconds"] > 0
        assert row["planned_bytes"] > 0
        assert row["tflops"] == pytest.approx(row["tflop"] / row["seconds"])
    assert text.count("| 2 | ") == 3
    assert "out of memory" not in text


def test_twice_the_rows_are_twice_the_work(checked: tuple[dict[str, Any], str]) -> None:
    one, two = (row["tflop"] for row in checked[0]["updating"] if row["mode"] == "frozen_vlm")
    # But for the critic, which is nothing.
    assert two == pytest.approx(2 * one, rel=0.01)


def test_flops_are_two_for_each_multiplication_of_a_product(gpu_check: ModuleType) -> None:
    a, b = torch.zeros(3, 5), torch.zeros(5, 7, requires_grad=True)
    # Forward 2 x 3 x 5 x 7 = 210; back, the gradient of b alone, as much again.
    assert gpu_check.count_flops(lambda: a @ b) == 210
    assert gpu_check.count_flops(lambda: (a @ b).sum().backward()) == 420


def test_counted_work_of_the_expert_is_what_its_matrices_say(gpu_check: ModuleType) -> None:
    from synthetic import draw_policy, observe, policy_config

    policy = draw_policy(policy_config("qwen_vla_toy"), 32, "cpu")
    with torch.no_grad():
        context = policy.encode(policy.collate(observe(policy, 2, 0)))
        sample = torch.zeros(2, policy.horizon, policy.channels)
        counted = gpu_check.count_flops(lambda: policy.velocity(context, sample, torch.full((2,), 0.5)))
    config = policy.config.expert
    length, d, ffn = context.tokens.shape[1] + policy.horizon, config.hidden_size, config.ffn_size

    def block(wanted: int) -> int:
        # A token: qkv 3 d^2; where it is wanted, out d^2 and SwiGLU 3 d ffn, and attention 2 L d. A row: 6 d^2.
        return 3 * length * d * d + wanted * (d * d + 3 * d * ffn + 2 * length * d) + 6 * d * d

    blocks = (config.num_blocks - 1) * block(length) + block(policy.horizon)
    assert counted == pytest.approx(2 * 2 * blocks, rel=0.1)


def test_a_batch_that_does_not_fit_is_recorded_and_ends_its_series(
    gpu_check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = gpu_check.observe

    def little_memory(policy: Any, rows: int, seed: int) -> Any:
        if rows >= 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return whole(policy, rows, seed)

    monkeypatch.setattr(gpu_check, "observe", little_memory)
    gpu_check.main([*TINY, "4", "--modes", "frozen_vlm", "--output", str(tmp_path)])
    result = json.loads((tmp_path / "result.json").read_text())
    assert [row["rows"] for row in result["deciding"]] == [1, 2]
    assert result["deciding"][1]["out_of_memory"] == "CUDA out of memory"
    # What came after went on.
    assert len(result["updating"]) == 3
    assert "| 2 | out of memory |" in (tmp_path / "result.md").read_text()


def test_without_a_gpu_the_script_says_what_to_do(gpu_check: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(SystemExit):
        gpu_check.main([])
    assert "--device cpu --size tiny" in capsys.readouterr().err


@pytest.mark.slow
def test_one_command_runs_the_tests_and_the_measurements(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHON": sys.executable, "DEVICE": "cpu", "PYTEST_ADDOPTS": "-k batch_arrives"}
    words = ["--size", "tiny", "--repeats", "1", "--batches", "1", "--modes", "frozen_vlm"]
    done = subprocess.run(
        [ROOT / "scripts/gpu_check.sh", tmp_path, *words], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["deciding"][0]["rows"] == 1
    assert "1 passed" in (tmp_path / "tests.txt").read_text()
    assert json.loads((tmp_path / "result.json").read_text())["policy"] == "qwen_vla_toy"
