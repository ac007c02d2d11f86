"""What a user sees when something is wrong: one message with the cure, no traceback, nothing half-written."""

import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file, save_file

from rlvla.dataset import Episode
from rlvla.dataset_writer import DatasetWriter
from rlvla_envs.base import SuiteConfig
from rlvla_envs.suites import make_env
from tests.e2e.runs import rlvla


def program(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`rlvla ...` as a shell starts it; `tests.e2e.runs.rlvla` is quicker where it would import the model libraries."""
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "rlvla.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=variables, timeout=300, check=False)


def refusal(done: subprocess.CompletedProcess[str], status: int = 2) -> str:
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    return done.stderr


def test_help_that_is_not_read_to_its_end_is_not_an_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "rlvla.cli", "train", "--help"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, env=variables, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


def write_toy_dataset(root: Path, *, action_size: int = 2, convention: str | None = None) -> None:
    env = make_env(SuiteConfig(name="toy", image_size=32, max_episode_steps=32), 1)
    spec = env.spec.to_dict()
    if convention:
        spec["action"][0]["convention"] = convention
    about = {"suite": "toy", "task": "gate", "env_spec": spec} if action_size == 2 else {}
    names = [f"a{i}" for i in range(action_size)]
    with DatasetWriter(
        root, fps=10, robot_type="point", action_names=names, state_names=env.spec.state_names, rlvla=about
    ) as writer:
        rng = np.random.default_rng(0)
        writer.add(
            Episode(
                images={"top": np.zeros((12, 32, 32, 3), np.uint8)},
                state=rng.normal(size=(12, 5)).astype(np.float32),
                action=rng.uniform(-1, 1, (12, action_size)).astype(np.float32),
                instruction="fly",
            )
        )


@pytest.fixture(scope="module")
def policy_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("policy")
    write_toy_dataset(root / "data")
    done = rlvla(
        "sft", "suite=toy", "policy=qwen_vla_toy", f"dataset={root / 'data'}", f"output={root / 'sft'}", "steps=2"
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["steps"] == 2
    return root / "sft" / "policy"


def test_a_misspelt_verb_is_corrected() -> None:
    assert "Did you mean 'train'?" in refusal(program("trian"))


def test_a_misspelt_key_is_corrected() -> None:
    assert "Did you mean 'algo.clip_epsilon'?" in refusal(program("train", "policy=x", "algo.clip_epsilonn=0.1"))


def test_a_key_smuggled_in_with_a_plus_is_refused() -> None:
    assert "'algo.new' is not an option" in refusal(program("train", "policy=x", "+algo.new=1"))


def test_a_missing_policy_folder_is_named(tmp_path: Path) -> None:
    said = refusal(rlvla("train", "suite=toy", f"policy={tmp_path / 'none'}", f"output={tmp_path / 'out'}"))
    assert "there is no policy folder" in said
    assert not (tmp_path / "out").exists()


def test_a_tensor_without_a_home_is_named(policy_folder: Path, tmp_path: Path) -> None:
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(policy_folder, broken)
    weights = load_file(broken / "model.safetensors")
    weights["expert.mystery"] = weights["expert.context_in.bias"].clone()
    save_file(weights, broken / "model.safetensors")
    said = refusal(rlvla("eval", "suite=toy", f"policy={broken}", f"output={tmp_path / 'out'}"))
    assert "without a home: expert.mystery" in said
    assert not (tmp_path / "out").exists()


def test_a_dataset_with_another_number_of_actions_is_shown_beside_the_suite(tmp_path: Path) -> None:
    write_toy_dataset(tmp_path / "data", action_size=3)
    said = refusal(
        rlvla("sft", "suite=toy", "policy=qwen_vla_toy", f"dataset={tmp_path / 'data'}", f"output={tmp_path}/o")
    )
    assert re.search(r"number of action channels +3 +2", said)
    assert not (tmp_path / "o").exists()


def test_a_dataset_with_another_convention_is_shown_beside_the_suite(tmp_path: Path) -> None:
    write_toy_dataset(tmp_path / "data", convention="absolute")
    said = refusal(
        rlvla("sft", "suite=toy", "policy=qwen_vla_toy", f"dataset={tmp_path / 'data'}", f"output={tmp_path}/o")
    )
    assert "action translation: convention" in said
    assert "absolute" in said


def test_a_policy_on_a_suite_with_other_conventions_is_refused_before_a_folder_is_made(
    policy_folder: Path, tmp_path: Path
) -> None:
    done = rlvla("eval", "suite=toy", "suite.chunk_size=4", f"policy={policy_folder}", f"output={tmp_path / 'out'}")
    assert re.search(r"chunk size H +8 +4", refusal(done))
    assert not (tmp_path / "out").exists()


def test_a_suite_that_is_not_set_up_is_refused_with_the_command_that_sets_it_up(
    policy_folder: Path, tmp_path: Path
) -> None:
    # Over Ray, where the refusal is raised in another process.
    words = ["suite=metaworld_mt10", "workers.num_actors=1", "workers.envs_per_actor=1", f"output={tmp_path / 'out'}"]
    done = rlvla("eval", f"policy={policy_folder}", *words, RLVLA_SUITES=str(tmp_path / "suites"))
    said = refusal(done)
    assert "metaworld is not set up" in said
    assert "Run: rlvla suites setup metaworld" in said
    assert "bug in rlvla" not in said


def test_a_run_never_overwrites_another(policy_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep me")
    said = refusal(rlvla("eval", "suite=toy", f"policy={policy_folder}", f"output={tmp_path}"))
    assert "not empty" in said
    assert (tmp_path / "mine.txt").read_text() == "keep me"


def test_a_machine_without_a_vulkan_device_is_told_what_to_install(tmp_path: Path) -> None:
    nowhere = {"VK_ICD_FILENAMES": str(tmp_path / "none.json"), "VK_DRIVER_FILES": str(tmp_path / "none.json")}
    done = rlvla("collect", "suite=push_cube", f"output={tmp_path / 'data'}", "workers.kind=local", **nowhere)
    said = refusal(done, status=1)
    assert "mesa-vulkan-drivers" in said
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("verb", ["sft", "train"])
def test_a_disk_that_takes_no_more_leaves_no_half_written_policy(
    policy_folder: Path, tmp_path: Path, verb: str
) -> None:
    write_toy_dataset(tmp_path / "data")
    what = {
        "sft": ["policy=qwen_vla_toy", f"dataset={tmp_path / 'data'}", "steps=1"],
        "train": [f"policy={policy_folder}", "workers.kind=local", "iterations=1", "episodes_per_iteration=4"],
    }[verb]
    little = [] if verb == "sft" else ["eval.trials=2", "eval.videos=0", "eval.shuffled_images=false"]
    # A file can grow to 100 kB, then the kernel refuses: enough for a configuration, too little for weights.
    command = [sys.executable, "-m", "rlvla.cli", verb, "suite=toy", f"output={tmp_path / 'out'}", *what, *little]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        timeout=300,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
    )
    said = refusal(done, status=1)
    assert "cannot save the policy" in said
    assert "Free some space" in said
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert "metrics.jsonl" in left
    assert not {name for name in left if "policy" in name or "partial" in name}


def test_nan_in_a_dataset_is_located(tmp_path: Path) -> None:
    write_toy_dataset(tmp_path / "data")
    file = next((tmp_path / "data" / "data").rglob("*.parquet"))
    table = pq.read_table(file)
    rows = table["action"].to_pylist()
    rows[5][1] = float("nan")
    column = pa.array(rows, type=table.schema.field("action").type)
    pq.write_table(table.set_column(table.schema.get_field_index("action"), table.schema.field("action"), column), file)
    said = refusal(
        rlvla("sft", "suite=toy", "policy=qwen_vla_toy", f"dataset={tmp_path / 'data'}", f"output={tmp_path}/o")
    )
    assert "action" in said
    assert "frame 5" in said
    assert not (tmp_path / "o").exists()


def test_debug_shows_the_traceback() -> None:
    done = program("train", "policy=/nowhere", "suite=toy", "--debug")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
