"""Checkpoints of LeRobot and openpi: read into policies that compute what theirs do, and written back exactly."""

import importlib.util
import json
import math
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlvla.cli import main
from rlvla.config import ExportConfig, ImportConfig
from rlvla.formats import exporting, importing
from rlvla.formats.base import FORMATS, affine, find_format, order_cameras
from rlvla.formats.tensors import KeyMap, gather, place, read_weights
from rlvla.policies.folder import load_policy, save_policy
from rlvla.policies.policy import Policy
from rlvla_envs.base import Camera, EnvSpec, Observation, SuiteConfig

KINDS = ["pi0", "pi05", "smolvla", "openpi-pi0", "openpi-pi05"]
TOY = SuiteConfig(name="toy", image_size=32, chunk_size=6)


def _load() -> ModuleType:
    path = Path(__file__).resolve().parents[1] / "public_checkpoints.py"
    spec = importlib.util.spec_from_file_location("public_checkpoints", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


public = _load()


def write(folder: Path, kind: str, **parts: Any) -> dict[str, Tensor]:
    if kind.startswith("openpi"):
        written: dict[str, Tensor] = public.write_openpi(folder, pi05=kind.endswith("05"), **parts)
    else:
        written = public.write_lerobot(folder, kind, **parts)
    return written


def import_it(folder: Path, kind: str, output: Path, **changes: Any) -> dict[str, Any]:
    name = "openpi" if kind.startswith("openpi") else "lerobot"
    options: dict[str, Any] = {"format": name, "checkpoint": str(folder), "output": str(output), "suite": TOY}
    return importing.run(ImportConfig(**{**options, **changes}))


def refusal(folder: Path, kind: str, **changes: Any) -> str:
    """What the user reads; nothing may have been written."""
    output = folder.parent / "refused"
    with pytest.raises(ValueError, match=r".") as caught:
        import_it(folder, kind, output, **changes)
    assert not output.exists()
    return str(caught.value)


@pytest.fixture(scope="module", params=KINDS)
def imported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Path]:
    """(kind, checkpoint, policy folder) of each layout. Tests read them and write elsewhere."""
    root = tmp_path_factory.mktemp(request.param)
    write(root / "theirs", request.param)
    import_it(root / "theirs", request.param, root / "policy")
    return request.param, root / "theirs", root / "policy"


def observe(policy: Policy, rows: int = 3, size: int = 32) -> Observation:
    rng = np.random.default_rng(3)
    names = [camera.name for camera in policy.env_spec.cameras]
    images = {name: rng.integers(0, 256, (rows, size, size, 3), dtype=np.uint8) for name in names}
    instructions = ["reach the green goal", "fly_slowly and carefully through the gap", "turn"][:rows]
    state = rng.normal(size=(rows, policy.env_spec.state_size)).astype(np.float32)
    return Observation(images, instructions, state)


# --- what the network computes


@torch.no_grad()
def test_an_imported_policy_computes_what_the_checkpoints_own_equations_do(imported: tuple[str, Path, Path]) -> None:
    kind, theirs, folder = imported
    policy, tensors = load_policy(folder), load_file(theirs / "model.safetensors")
    seen = observe(policy)
    generator = torch.Generator().manual_seed(1)
    # Noise everywhere: padded channels, and steps past the suite's chunk of 6.
    sample = torch.randn(3, public.HORIZON, public.CHANNELS, generator=generator)
    tau = torch.tensor([1.0, 0.37, 0.1])
    batch = policy.collate(seen)
    velocity = policy.velocity(policy.encode(batch), sample, tau)
    if kind == "smolvla":
        assert torch.equal(velocity[:, 6:], torch.zeros_like(velocity[:, 6:]))

    pixels = torch.from_numpy(np.stack(list(seen.images.values()), axis=1)).permute(0, 1, 4, 2, 3) / 127.5 - 1
    # The prompt, from the published preprocessing.
    texts = list(seen.instruction)
    if kind != "pi0" and kind != "smolvla":
        texts = [text.replace("_", " ") for text in texts]
    assert seen.state is not None
    table = public.statistics()["observation.state"]
    low, high = (table["q01"], table["q99"]) if kind.endswith("pi05") else (table["mean"], table["std"])
    low, high = np.array(low), np.array(high)
    if kind.endswith("pi05"):
        state = 2 * (seen.state - low) / (high - low) - 1
        bins = np.floor((state + 1) * 128).clip(-1, 255).astype(int)
        padding = [128] * (public.STATE - public.STATES) if kind == "pi05" else []
        states = [" ".join(str(b) for b in [*row, *padding]) for row in bins]
        texts = [f"Task: {text}, State: {row};\nAction: " for text, row in zip(texts, states, strict=True)]
    else:
        state = (seen.state - low) / high
        texts = [f"{text}\n" for text in texts]
    tokens = [policy.tokenizer(text)["input_ids"] for text in texts]
    length = max(len(row) for row in tokens) + 5
    ids = torch.tensor([row + [0] * (length - len(row)) for row in tokens])
    valid = torch.arange(length) < torch.tensor([[len(row)] for row in tokens])

    run = public.smolvla_velocity if kind == "smolvla" else public.pi_velocity
    given = None if kind.endswith("pi05") else torch.from_numpy(state).float()
    expected = run(tensors, pixels, ids, valid, given, sample, tau)
    if kind == "smolvla":
        # Six steps instead of ten are the first six: an action reads earlier ones only.
        velocity, expected = velocity[:, :6], expected[:, :6]
    assert expected.std() > 0.1
    torch.testing.assert_close(velocity, expected, atol=2e-4, rtol=2e-3)


@torch.no_grad()
def test_the_cached_prefix_and_a_prefix_read_again_give_the_same_velocity(imported: tuple[str, Path, Path]) -> None:
    policy = load_policy(imported[2])
    batch = policy.collate(observe(policy))
    stored = policy.encode(batch).to_tensordict()
    again = type(policy.encode(batch)).from_tensordict(stored)
    sample = torch.randn(3, public.HORIZON, public.CHANNELS, generator=torch.Generator().manual_seed(0))
    for tau in (1.0, 0.5):
        times = torch.full((3,), tau)
        assert torch.equal(policy.velocity(again, sample, times), policy.velocity(policy.encode(batch), sample, times))


def test_actions_and_state_are_scaled_as_the_checkpoints_statistics_say(imported: tuple[str, Path, Path]) -> None:
    kind, _, folder = imported
    policy, table = load_policy(folder), public.statistics()
    sample = torch.zeros(1, public.HORIZON, public.CHANNELS)
    sample[0, 0, :2] = torch.tensor([0.0, 3.0])  # far outside [-1, 1]: these checkpoints do not clip
    action = policy.actions_to_env(sample)[0, 0]
    entry = {name: np.array(values) for name, values in table["action"].items()}
    if kind.endswith("pi05"):
        middle, half = (entry["q01"] + entry["q99"]) / 2, (entry["q99"] - entry["q01"]) / 2
    else:
        middle, half = entry["mean"], entry["std"]
    np.testing.assert_allclose(action, [middle[0], middle[1] + 3 * half[1]], atol=1e-4)
    np.testing.assert_allclose(policy.actions_from_env(action[None, None])[0, 0, :2], [0.0, 3.0], atol=1e-4)


def test_noise_is_drawn_wherever_the_originals_sampler_draws_it(imported: tuple[str, Path, Path]) -> None:
    kind, _, folder = imported
    policy = load_policy(folder)
    assert int(policy.action_mask().sum()) == 6 * 2
    assert int(policy.noise_mask().sum()) == (6 if kind == "smolvla" else public.HORIZON) * public.CHANNELS


# --- there and back


def test_a_policy_that_was_imported_is_exported_exactly(imported: tuple[str, Path, Path], tmp_path: Path) -> None:
    _, theirs, folder = imported
    summary = exporting.run(ExportConfig(policy=str(folder), output=str(tmp_path / "back")))
    before, after = load_file(theirs / "model.safetensors"), load_file(tmp_path / "back/model.safetensors")
    assert before.keys() == after.keys()
    assert summary["tensors"] == len(before)
    for key, tensor in before.items():
        assert after[key].dtype == tensor.dtype, key
        assert torch.equal(after[key], tensor), key
    headers = [safe_open(path / "model.safetensors", framework="pt").metadata() for path in (theirs, tmp_path / "back")]
    assert headers[0] == headers[1]
    others = {str(p.relative_to(theirs)) for p in theirs.rglob("*") if p.is_file()} - {"model.safetensors"}
    assert "config.json" in others
    found = {str(p.relative_to(tmp_path / "back")) for p in (tmp_path / "back").rglob("*") if p.is_file()}
    assert found == others | {"model.safetensors"}
    for name in others:
        assert (tmp_path / "back" / name).read_bytes() == (theirs / name).read_bytes(), name


def test_what_training_changed_is_what_an_export_changes(imported: tuple[str, Path, Path], tmp_path: Path) -> None:
    kind, theirs, folder = imported
    policy = load_policy(folder)
    weight = policy.state_dict()["expert.action_out_proj.weight"]
    with torch.no_grad():
        weight.add_(0.25)
    # A policy saved by `rlvla train`, twice over.
    save_policy(policy, tmp_path / "refined")
    save_policy(load_policy(tmp_path / "refined"), tmp_path / "again")
    exporting.run(ExportConfig(policy=str(tmp_path / "again"), output=str(tmp_path / "back")))
    before, after = load_file(theirs / "model.safetensors"), load_file(tmp_path / "back/model.safetensors")
    changed = [key for key in before if not torch.equal(before[key], after[key])]
    root = "" if kind.startswith("openpi") else "model."
    assert changed == [f"{root}action_out_proj.weight"]
    assert torch.equal(after[changed[0]], weight.to(before[changed[0]].dtype))


def test_a_tied_embedding_that_was_trained_is_written_under_both_names(tmp_path: Path) -> None:
    write(tmp_path / "theirs", "pi0")
    import_it(tmp_path / "theirs", "pi0", tmp_path / "policy")
    policy = load_policy(tmp_path / "policy")
    with torch.no_grad():
        policy.state_dict()["vlm.language_model.embed_tokens.weight"].add_(1)
    save_policy(policy, tmp_path / "refined")
    exporting.run(ExportConfig(policy=str(tmp_path / "refined"), output=str(tmp_path / "back")))
    back = load_file(tmp_path / "back/model.safetensors")
    root = f"model.{public.PALIGEMMA}"
    assert torch.equal(back[f"{root}lm_head.weight"], back[f"{root}model.language_model.embed_tokens.weight"])
    assert not torch.equal(
        back[f"{root}lm_head.weight"], load_file(tmp_path / "theirs/model.safetensors")[f"{root}lm_head.weight"]
    )


@pytest.mark.parametrize("tower", ["vision_tower.", "vision_tower.vision_model."])
@pytest.mark.parametrize("embedding", ["head", "table", "both"])
@pytest.mark.parametrize("root", ["", "model."])
def test_every_spelling_of_the_same_weights_is_read_alike(
    tmp_path: Path, tower: str, embedding: str, root: str
) -> None:
    shapes = public.pi_shapes(pi05=False, root=root, tower=tower, embedding=embedding)
    known = public.draw(public.pi_shapes(pi05=False))
    head = f"{public.PALIGEMMA}lm_head.weight"

    def plain(key: str) -> str:
        key = key.removeprefix(root) if root else key
        key = head if key.endswith("embed_tokens.weight") else key
        return key.replace("vision_tower.vision_model.", "vision_tower.").replace(
            "vision_tower.", "vision_tower.vision_model."
        )

    tensors = {key: known[plain(key)].clone() for key in shapes}
    write(tmp_path / "theirs", "pi0", tensors=tensors)
    import_it(tmp_path / "theirs", "pi0", tmp_path / "policy")
    state = load_policy(tmp_path / "policy").state_dict()
    assert torch.equal(state["vlm.language_model.embed_tokens.weight"], known[head])
    tower_key = f"{public.PALIGEMMA}model.vision_tower.vision_model.post_layernorm.bias"
    assert torch.equal(state["vlm.vision_tower.post_layernorm.bias"], known[tower_key])
    exporting.run(ExportConfig(policy=str(tmp_path / "policy"), output=str(tmp_path / "back")))
    assert load_file(tmp_path / "back/model.safetensors").keys() == shapes.keys()


def test_a_head_that_is_not_the_embedding_is_kept_as_it_is(tmp_path: Path) -> None:
    tensors = public.draw(public.pi_shapes(pi05=False, root="model.", embedding="both"))
    write(tmp_path / "theirs", "pi0", tensors=tensors)
    summary = import_it(tmp_path / "theirs", "pi0", tmp_path / "policy")
    head = f"model.{public.PALIGEMMA}lm_head.weight"
    assert summary["kept_aside"] == [f"model.{public.EXPERT}lm_head.weight", head]
    exporting.run(ExportConfig(policy=str(tmp_path / "policy"), output=str(tmp_path / "back")))
    assert torch.equal(load_file(tmp_path / "back/model.safetensors")[head], tensors[head])


def test_a_policy_that_was_not_imported_has_no_format_to_go_back_to(
    make_policy: Callable[..., Policy], toy_spec: EnvSpec, tmp_path: Path
) -> None:
    save_policy(make_policy("pi0_toy", toy_spec), tmp_path / "policy")
    with pytest.raises(ValueError, match="was not imported, so there is no format"):
        exporting.run(ExportConfig(policy=str(tmp_path / "policy"), output=str(tmp_path / "back")))


@pytest.fixture
def toy_spec(make_toy: Callable[..., Any]) -> EnvSpec:
    spec: EnvSpec = make_toy(1, chunk_size=6).spec
    return spec


def test_neither_verb_writes_over_anything(imported: tuple[str, Path, Path], tmp_path: Path) -> None:
    kind, theirs, folder = imported
    (tmp_path / "there").mkdir()
    with pytest.raises(ValueError, match="exists already"):
        import_it(theirs, kind, tmp_path / "there")
    with pytest.raises(ValueError, match="exists already"):
        exporting.run(ExportConfig(policy=str(folder), output=str(tmp_path / "there")))


def test_a_damaged_origin_is_named(imported: tuple[str, Path, Path], tmp_path: Path) -> None:
    shutil.copytree(imported[2], tmp_path / "policy")
    path = tmp_path / "policy/origin/origin.json"
    path.write_text(path.read_text()[:-20])
    with pytest.raises(ValueError, match="origin is damaged"):
        load_policy(tmp_path / "policy")


def test_a_weight_that_the_checkpoints_precision_cannot_hold_is_not_written(tmp_path: Path) -> None:
    tensors = {key: t.to(torch.float16) for key, t in public.draw(public.smolvla_shapes()).items()}
    write(tmp_path / "theirs", "smolvla", tensors=tensors)
    import_it(tmp_path / "theirs", "smolvla", tmp_path / "policy")
    policy = load_policy(tmp_path / "policy")
    with torch.no_grad():
        policy.state_dict()["expert.norm.weight"].fill_(1e5)  # float16 ends at 65504
    save_policy(policy, tmp_path / "refined")
    with pytest.raises(RuntimeError, match=r"expert.norm.weight has values that float16"):
        exporting.run(ExportConfig(policy=str(tmp_path / "refined"), output=str(tmp_path / "back")))
    assert not (tmp_path / "back").exists()


def test_both_verbs_take_their_folders_as_plain_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "theirs", "smolvla")
    suite = ["suite=toy", "suite.chunk_size=6"]
    main(["import", "lerobot", str(tmp_path / "theirs"), f"output={tmp_path / 'policy'}", *suite])
    said = json.loads(capsys.readouterr().out)
    assert (said["architecture"], said["format"]) == ("smolvla", "lerobot")
    # The checkpoint ran ten actions a decision, this suite six.
    assert any("10 actions a decision" in note for note in said["notes"])
    main(["export", str(tmp_path / "policy"), f"output={tmp_path / 'back'}"])
    assert json.loads(capsys.readouterr().out)["checkpoint"] == str(tmp_path / "back")
    with pytest.raises(SystemExit) as stopped:
        main(["import", "lerobt", str(tmp_path / "theirs"), f"output={tmp_path / 'other'}", *suite])
    assert stopped.value.code == 2
    assert "Did you mean 'lerobot'?" in capsys.readouterr().err


# --- what does not fit


@pytest.mark.parametrize("kind", KINDS)
def test_every_missing_and_every_extra_tensor_is_named_by_the_checkpoints_key(tmp_path: Path, kind: str) -> None:
    tensors = write(tmp_path / "whole", kind)
    lost, odd = ("action_out_proj.bias", "adapter.lora_A.weight")
    root = "" if kind.startswith("openpi") else "model."
    tensors = {key: t for key, t in tensors.items() if key != root + lost} | {root + odd: torch.zeros(2, 3)}
    write(tmp_path / "theirs", kind, tensors=tensors)
    said = refusal(tmp_path / "theirs", kind)
    assert str(tmp_path / "theirs/model.safetensors") in said
    assert f"without a home: {root}{odd} (2, 3)" in said
    assert f"missing: {root}{lost} ({public.CHANNELS},)" in said


def test_a_tensor_of_another_shape_is_named_with_both(tmp_path: Path) -> None:
    tensors = public.draw(public.smolvla_shapes())
    tensors["model.state_proj.weight"] = torch.zeros(128, 14)
    write(tmp_path / "theirs", "smolvla", tensors=tensors)
    assert "of another shape: model.state_proj.weight (128, 14) instead of (128, 32)" in refusal(
        tmp_path / "theirs", "smolvla"
    )


def test_a_checkpoint_of_another_architecture_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "act", "smolvla", config=public.lerobot_config("smolvla", type="act"))
    assert "config.json says type 'act'; supported are pi0, pi05 and smolvla" in refusal(tmp_path / "act", "smolvla")
    # What the file says and what it holds.
    write(tmp_path / "mixed", "pi0", tensors=public.draw(public.pi_shapes(pi05=True, root="model.")))
    assert "says type 'pi0', and model.safetensors holds the other" in refusal(tmp_path / "mixed", "pi0")
    write(tmp_path / "wrong", "openpi-pi0", tensors=public.draw(public.smolvla_shapes()))
    assert "is no checkpoint of pi0" in refusal(tmp_path / "wrong", "openpi-pi0")


def test_a_pickle_is_never_run(tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "ran",))

    write(tmp_path / "theirs", "smolvla")
    (tmp_path / "theirs/model.safetensors").write_bytes(pickle.dumps(Attack()))
    assert "A pickle under that name is not read" in refusal(tmp_path / "theirs", "smolvla")
    torch.save({"weight": Attack()}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"model.pt holds more than tensors.*weights_only=True"):
        read_weights(tmp_path / "model.pt")
    assert not (tmp_path / "ran").exists()
    # A PyTorch file of plain tensors is read.
    torch.save({"weight": torch.ones(2)}, tmp_path / "plain.pt")
    assert torch.equal(read_weights(tmp_path / "plain.pt").tensors["weight"], torch.ones(2))


def test_missing_statistics_are_asked_for(tmp_path: Path) -> None:
    # As in lerobot/smolvla_base: statistics under the names of datasets, none under "action".
    table = {"so100.buffer.action": public.statistics()["action"]}
    write(tmp_path / "theirs", "smolvla", stats=table)
    said = refusal(tmp_path / "theirs", "smolvla")
    assert "no statistics for the key 'action'" in said
    assert "so100.buffer.action.mean" in said
    assert "Give statistics=FILE" in said
    given = tmp_path / "stats.json"
    given.write_text(json.dumps(public.statistics()))
    import_it(tmp_path / "theirs", "smolvla", tmp_path / "policy", statistics=str(given))
    stats = load_policy(tmp_path / "policy").stats
    np.testing.assert_allclose((stats.q01 + stats.q99) / 2, public.statistics()["action"]["mean"], rtol=1e-5)

    write(tmp_path / "openpi", "openpi-pi05", stats=False)
    assert "there is none. Give statistics=FILE: its norm_stats.json" in refusal(tmp_path / "openpi", "openpi-pi05")


def test_statistics_that_the_normalisation_cannot_use_are_refused(tmp_path: Path) -> None:
    # pi0.5 needs quantiles, which older datasets lack.
    write(tmp_path / "theirs", "pi05", stats=public.statistics(("mean", "std")))
    said = refusal(tmp_path / "theirs", "pi05")
    assert "lacks the statistics q01 and q99, which QUANTILES needs; it has mean, std" in said
    # Two sources would leave open which one the policy was trained with.
    write(tmp_path / "both", "smolvla")
    (tmp_path / "stats.json").write_text(json.dumps(public.statistics()))
    assert "has statistics of its own" in refusal(tmp_path / "both", "smolvla", statistics=str(tmp_path / "stats.json"))
    (tmp_path / "other.json").write_text('{"reward": 1}')
    write(tmp_path / "none", "smolvla", stats={})
    assert "has no statistics of actions; its keys are reward" in refusal(
        tmp_path / "none", "smolvla", statistics=str(tmp_path / "other.json")
    )


def test_the_other_convention_of_flow_time_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "theirs", "pi0")
    said = refusal(tmp_path / "theirs", "pi0", noise_at=0.0)
    assert "noise_at is 0, but in the format 'lerobot' a sample is noise at flow time 1" in said
    import_it(tmp_path / "theirs", "pi0", tmp_path / "policy", noise_at=1.0)


@pytest.mark.parametrize("kind", ["pi0", "smolvla"])
def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path, kind: str) -> None:
    write(tmp_path / "theirs", kind)
    for path in tmp_path.glob("theirs/tokenizer*"):
        path.unlink()
    said = refusal(tmp_path / "theirs", kind)
    assert "has no tokenizer.json. Give tokenizer=FOLDER" in said
    assert ("paligemma" in said) == (kind == "pi0")
    (tmp_path / "text").mkdir()
    public.write_tokenizer(tmp_path / "text", image=False)
    said = refusal(tmp_path / "theirs", kind, tokenizer=str(tmp_path / "text"))
    assert "text/tokenizer.json has no image token '<image>'" in said
    (tmp_path / "right").mkdir()
    public.write_tokenizer(tmp_path / "right", bos=kind == "pi0")
    import_it(tmp_path / "theirs", kind, tmp_path / "policy", tokenizer=str(tmp_path / "right"))


def test_a_tokenizer_that_leaves_out_the_first_token_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "theirs", "pi0")
    public.write_tokenizer(tmp_path / "theirs", bos=False)
    assert "does not begin a text with '<bos>'" in refusal(tmp_path / "theirs", "pi0")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"adapt_to_pi_aloha": True}, "adapt_to_pi_aloha = True; only False is supported"),
        ({"n_obs_steps": 2}, "n_obs_steps = 2; only 1 is supported"),
        ({"add_image_special_tokens": True}, "add_image_special_tokens = True"),
        ({"attention_mode": "self_attn"}, "attention_mode = 'self_attn'"),
        ({"resize_imgs_with_padding": [512, 512]}, "resizes images to [512, 512]; the vision tower's"),
        ({"num_expert_layers": 1}, "num_expert_layers = 1; only as many as the VLM's 3"),
        ({"output_features": {}}, "does not describe its inputs and action"),
        ({"output_features": {"action": {"type": "ACTION", "shape": [7]}}}, "action has 7 channels, the suite has 2"),
    ],
)
def test_what_a_configuration_says_and_is_not_supported_is_named(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    write(tmp_path / "theirs", "smolvla", config=public.lerobot_config("smolvla", **changes))
    assert said in refusal(tmp_path / "theirs", "smolvla")


def test_a_pipeline_step_that_changes_actions_is_refused_unless_it_is_off(tmp_path: Path) -> None:
    write(tmp_path / "theirs", "smolvla")
    path = tmp_path / "theirs/policy_postprocessor.json"
    pipeline = json.loads(path.read_text())
    step = {"registry_name": "absolute_actions_processor", "config": {"enabled": True}}
    path.write_text(json.dumps({**pipeline, "steps": [*pipeline["steps"], step]}))
    assert "has a step 'absolute_actions_processor'" in refusal(tmp_path / "theirs", "smolvla")
    step["config"] = {"enabled": False}
    path.write_text(json.dumps({**pipeline, "steps": [*pipeline["steps"], step]}))
    import_it(tmp_path / "theirs", "smolvla", tmp_path / "policy")


def test_a_state_file_outside_the_checkpoint_is_not_read(tmp_path: Path) -> None:
    write(tmp_path / "theirs", "smolvla")
    path = tmp_path / "theirs/policy_postprocessor.json"
    pipeline = json.loads(path.read_text())
    pipeline["steps"][0]["state_file"] = "../elsewhere.safetensors"
    path.write_text(json.dumps(pipeline))
    assert "lies outside the checkpoint" in refusal(tmp_path / "theirs", "smolvla")


def test_a_chunks_length_that_nothing_tells_is_asked_for(tmp_path: Path) -> None:
    sizes = {"paligemma_variant": "dummy", "action_expert_variant": "dummy"}
    write(tmp_path / "theirs", "openpi-pi0", config=sizes)
    assert "Give horizon=N" in refusal(tmp_path / "theirs", "openpi-pi0")
    import_it(tmp_path / "theirs", "openpi-pi0", tmp_path / "policy", horizon=7)
    assert load_policy(tmp_path / "policy").horizon == 7
    write(tmp_path / "said", "openpi-pi0")
    assert "horizon is 7, and" in refusal(tmp_path / "said", "openpi-pi0", horizon=7)


def test_a_jax_checkpoint_says_how_to_convert_it(tmp_path: Path) -> None:
    (tmp_path / "theirs/params").mkdir(parents=True)
    assert "convert_jax_model_to_pytorch.py" in refusal(tmp_path / "theirs", "openpi-pi0")


def test_a_weight_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    tensors = public.draw(public.smolvla_shapes())
    tensors["model.state_proj.bias"][3] = math.nan
    write(tmp_path / "theirs", "smolvla", tensors=tensors)
    assert "model.state_proj.bias has values that are not finite" in refusal(tmp_path / "theirs", "smolvla")


def test_whatever_is_cut_from_a_checkpoint_the_message_names_the_file(tmp_path: Path) -> None:
    write(tmp_path / "whole", "smolvla")
    names = ["model.safetensors", "config.json", "policy_preprocessor.json", "policy_postprocessor.json"]
    for name in [*names, "tokenizer.json", "policy_postprocessor_step_0_unnormalizer_processor.safetensors"]:
        shutil.rmtree(tmp_path / "cut", ignore_errors=True)
        shutil.copytree(tmp_path / "whole", tmp_path / "cut")
        path = tmp_path / "cut" / name
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        assert name in refusal(tmp_path / "cut", "smolvla")


@pytest.mark.parametrize("kind", ["smolvla", "openpi-pi05"])
def test_whatever_is_written_into_a_configuration_the_import_works_or_says_what_is_wrong(
    tmp_path: Path, kind: str
) -> None:
    write(tmp_path / "whole", kind)
    chance = np.random.default_rng(0)
    files = sorted(path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").rglob("*.json"))
    files = [file for file in files if "tokenizer" not in file.name]
    odd = [None, "x", -1, 3, 2.5, True, [], {}, [1, 2], {"a": 1}]
    refused = []
    for number in range(40):
        shutil.copytree(tmp_path / "whole", tmp_path / str(number))
        path = tmp_path / str(number) / files[number % len(files)]
        data = json.loads(path.read_text())
        place = data
        while isinstance(place, dict | list) and place:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            key = keys[int(chance.integers(len(keys)))]
            if not isinstance(place[key], dict | list) or not place[key] or chance.random() < 0.3:
                place[key] = odd[int(chance.integers(len(odd)))]
                break
            place = place[key]
        path.write_text(json.dumps(data))
        try:
            import_it(tmp_path / str(number), kind, tmp_path / f"policy{number}")
        except ValueError as error:
            refused.append((number, str(error).strip()))
    assert len(refused) > 5
    assert all(message and not (tmp_path / f"policy{number}").exists() for number, message in refused)


def test_a_checkpoint_may_lie_in_a_cache(tmp_path: Path) -> None:
    folder = tmp_path / ".cache/hub/theirs"
    folder.parent.mkdir(parents=True)
    write(folder, "smolvla")
    (folder / ".cache").mkdir()
    (folder / ".cache/lock").write_text("")
    (folder / "optimizer.pt").write_bytes(b"pickle")
    summary = import_it(folder, "smolvla", tmp_path / "policy")
    assert summary["left_out"] == ["optimizer.pt"]
    files = load_policy(tmp_path / "policy").origin.files  # type: ignore[union-attr]
    assert "config.json" in files
    assert ".cache/lock" not in files


def test_statistics_of_a_robot_with_more_joints_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "theirs", "openpi-pi0")
    path = next((tmp_path / "theirs").rglob("norm_stats.json"))
    data = json.loads(path.read_text())
    data["norm_stats"]["state"]["std"][-1] = 0.5
    path.write_text(json.dumps(data))
    said = refusal(tmp_path / "theirs", "openpi-pi0")
    assert "statistics of 7 channels for the state, and the last 2 are no padding: the suite has 5" in said


# --- cameras


def cameras_of(spec: EnvSpec, *names: str) -> EnvSpec:
    from dataclasses import replace

    return replace(spec, cameras=tuple(Camera(name=name, height=32, width=32) for name in names))


def test_cameras_are_matched_by_name_or_as_the_user_says_and_never_by_position(toy_spec: EnvSpec) -> None:
    images = ["observation.images.top", "observation.images.wrist"]
    prefix = "observation.images."
    # By name, in the checkpoint's order.
    assert order_cameras(images, cameras_of(toy_spec, "wrist", "top"), {}, prefix) == (("top", "wrist"), ())
    # One of two: the other image is left out.
    assert order_cameras(images, cameras_of(toy_spec, "wrist"), {}, prefix) == (("wrist",), (images[0],))
    # One and one need no name.
    assert order_cameras(images[:1], cameras_of(toy_spec, "front"), {}, prefix) == (("front",), ())
    told = {"front": "wrist", "side": "observation.images.top"}
    assert order_cameras(images, cameras_of(toy_spec, "front", "side"), told, prefix) == (("side", "front"), ())
    for given in ({}, {"front": "wrist", "side": "wrist"}, {"front": "wrist", "side": "bottom"}, {"nose": "top"}):
        with pytest.raises(ValueError, match=r"images are observation.images.top.*cameras\.front="):
            order_cameras(images, cameras_of(toy_spec, "front", "side"), given, prefix)


@torch.no_grad()
def test_the_prefix_has_the_cameras_in_the_checkpoints_order(
    make_policy: Callable[..., Policy], toy_spec: EnvSpec
) -> None:
    spec = cameras_of(toy_spec, "wrist", "top")
    ordered = make_policy("pi0_toy", spec, "policy.cameras=[top,wrist]")
    plain = make_policy("pi0_toy", spec)
    seen = observe(plain)
    swapped = Observation({"wrist": seen.images["top"], "top": seen.images["wrist"]}, seen.instruction, seen.state)
    assert torch.equal(ordered.collate(seen)["images"], plain.collate(swapped)["images"])
    with pytest.raises(ValueError, match=r"policy.cameras is top, nose; it must name each of the suite's once"):
        make_policy("pi0_toy", spec, "policy.cameras=[top,nose]")


# --- the parts


def test_what_a_normalisation_maps_to_minus_one_and_one_by_hand() -> None:
    stats = {name: np.array([value]) for name, value in (("mean", 2.0), ("std", 0.5), ("q01", 1.0), ("q99", 5.0))}
    assert [float(b[0]) for b in affine("MEAN_STD", stats, 0.0, "x")] == [1.5, 2.5]
    assert [float(b[0]) for b in affine("QUANTILES", stats, 0.0, "x")] == [1.0, 5.0]
    still = {"q01": np.array([3.0]), "q99": np.array([3.0])}
    assert [float(b[0]) for b in affine("QUANTILES", still, 1e-8, "x")] == [3.0, 3.0 + 1e-8]
    with pytest.raises(ValueError, match="normalises by 'ROBUST'"):
        affine("ROBUST", stats, 0.0, "x")


def test_tensors_are_placed_by_the_first_prefix_that_fits_and_gathered_again(tmp_path: Path) -> None:
    rules = KeyMap(version=1, renames=(("net.a.", "0."), ("net.", "1.")), kept=frozenset({"net.head"}))
    tensors = {
        "net.a.weight": torch.ones(2, 3, dtype=torch.bfloat16),
        "net.a.bias": torch.zeros(2),
        "net.weight": torch.full((1, 2), 0.1),
        "net.bias": torch.ones(1),
        "net.head": torch.arange(4.0),
    }
    save_file(tensors, tmp_path / "w.safetensors")
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1))
    with torch.no_grad():
        places, kept = place(read_weights(tmp_path / "w.safetensors"), model, rules)
    assert (places["net.a.weight"].name, places["net.a.weight"].dtype) == ("0.weight", "bfloat16")
    assert list(kept) == ["net.head"]
    back = gather(model, places, kept)
    assert all(torch.equal(back[key], tensor) and back[key].dtype == tensor.dtype for key, tensor in tensors.items())
    assert rules.theirs("0.bias") == "net.a.bias"


def test_every_format_says_where_its_noise_is() -> None:
    assert {name: find_format(name).noise_at for name in FORMATS} == {"lerobot": 1.0, "openpi": 1.0, "starvla": 0.0}
    with pytest.raises(ValueError, match=r"'lerobt' is no checkpoint format. Did you mean 'lerobot'"):
        find_format("lerobt")


# --- what looks right and is not


def edit_json(path: Path, change: Callable[[Any], None]) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"std": [0.5, -0.1]}, r"std = -0.1 in channel 1; it must be 0 or more"),
        ({"std": [0.5]}, r"2 channels of mean and 1 of std"),
    ],
)
def test_statistics_that_no_data_have_are_refused(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    table = public.statistics()
    table["action"] |= change
    write(tmp_path / "theirs", "pi0", stats=table)
    assert re.search(said, refusal(tmp_path / "theirs", "pi0"))


def test_quantiles_the_wrong_way_round_are_refused(tmp_path: Path) -> None:
    table = public.statistics()
    table["observation.state"]["q99"][3] = table["observation.state"]["q01"][3] - 1
    write(tmp_path / "theirs", "pi05", stats=table)
    assert "in channel 3; it must be at least q01" in refusal(tmp_path / "theirs", "pi05")


def test_numbers_that_are_words_are_named_with_their_key(tmp_path: Path) -> None:
    write(tmp_path / "theirs", "openpi-pi05")
    path = tmp_path / "theirs/assets/toy/norm_stats.json"
    edit_json(path, lambda data: data["norm_stats"]["actions"].update(q01=["a", "b"]))
    said = refusal(tmp_path / "theirs", "openpi-pi05")
    assert f"{path} (action.q01) is ['a', 'b']; it must be a list of numbers" in said


def test_a_normalisation_that_nobody_names_is_not_taken_for_none(tmp_path: Path) -> None:
    config = public.lerobot_config("pi0")
    del config["normalization_mapping"]
    write(tmp_path / "theirs", "pi0", config=config)
    for name in ("policy_preprocessor.json", "policy_postprocessor.json"):
        edit_json(
            tmp_path / "theirs" / name,
            lambda data: [step["config"].pop("norm_map", None) for step in data["steps"]],
        )
    assert "does not say how observation.state is normalised" in refusal(tmp_path / "theirs", "pi0")


def test_the_preprocessors_constant_is_that_of_the_state(tmp_path: Path) -> None:
    write(tmp_path / "theirs", "pi0")
    path = tmp_path / "theirs/policy_preprocessor.json"
    edit_json(
        path,
        lambda data: [
            s["config"].update(eps=1.0) for s in data["steps"] if s["registry_name"] == "normalizer_processor"
        ],
    )
    import_it(tmp_path / "theirs", "pi0", tmp_path / "policy")
    stats = load_policy(tmp_path / "policy").stats
    theirs = public.statistics()
    assert stats.state_std == pytest.approx(np.array(theirs["observation.state"]["std"]) + 1, rel=1e-6)
    assert (stats.q99 - stats.q01) / 2 == pytest.approx(np.array(theirs["action"]["std"]), rel=1e-6)


def test_layers_that_the_configuration_counts_and_the_file_lacks_are_missed(tmp_path: Path) -> None:
    tensors = {
        key: tensor
        for key, tensor in public.draw(public.smolvla_shapes()).items()
        if "text_model.layers.2." not in key and "lm_expert.layers.2." not in key
    }
    write(tmp_path / "theirs", "smolvla", tensors=tensors)
    said = refusal(tmp_path / "theirs", "smolvla")
    assert "num_vlm_layers = 3" in said
    assert "has 2 layers of the language model" in said


@pytest.mark.parametrize("width", [1152, 768])
def test_a_published_vision_tower_has_all_its_layers(width: int) -> None:
    from rlvla.formats.lerobot import VISION_DEPTH
    from rlvla.formats.pi_weights import VISION_LAYERS, VISION_WIDTH

    # SigLIP So400m and base, as their publishers write them.
    assert VISION_DEPTH[width] == {1152: 27, 768: 12}[width]
    assert (VISION_WIDTH, VISION_LAYERS) == (1152, 27)


def test_a_vision_tower_of_published_width_that_lacks_its_last_layer_is_refused(tmp_path: Path) -> None:
    tower = "paligemma_with_expert.paligemma.model.vision_tower.vision_model."
    shapes = {key: shape for key, shape in public.pi_shapes(pi05=False).items() if not key.startswith(tower)}
    shapes |= public.vision_shapes(tower, 1152, 8, 26)
    write(tmp_path / "theirs", "openpi-pi0", tensors={key: torch.zeros(shape) for key, shape in shapes.items()})
    said = refusal(tmp_path / "theirs", "openpi-pi0")
    assert "has 26 layers of the vision tower; SigLIP So400m, 1152 wide, has 27" in said


@pytest.mark.parametrize(
    ("kind", "key"),
    [
        ("pi0", "model.paligemma_with_expert.paligemma.lm_head.weight"),
        ("pi0", "model.paligemma_with_expert.gemma_expert.lm_head.weight"),
        ("openpi-pi05", "paligemma_with_expert.gemma_expert.lm_head.weight"),
        ("smolvla", "model.vlm_with_expert.vlm.lm_head.weight"),
    ],
)
def test_a_head_that_is_kept_aside_must_have_the_shape_of_one(tmp_path: Path, kind: str, key: str) -> None:
    tensors = write(tmp_path / "fine", kind)
    assert key in tensors
    write(tmp_path / "theirs", kind, tensors={**tensors, key: torch.zeros(3, 5)})
    said = refusal(tmp_path / "theirs", kind)
    assert "of another shape" in said
    assert f"{key} (3, 5) instead of" in said


def test_weights_of_whole_numbers_are_refused(tmp_path: Path) -> None:
    tensors = write(tmp_path / "fine", "smolvla")
    tensors["model.state_proj.weight"] = tensors["model.state_proj.weight"].to(torch.int8)
    write(tmp_path / "theirs", "smolvla", tensors=tensors)
    assert "of whole numbers: model.state_proj.weight torch.int8" in refusal(tmp_path / "theirs", "smolvla")


def test_a_checkpoint_in_several_files_is_named_as_such(tmp_path: Path) -> None:
    write(tmp_path / "theirs", "pi0")
    (tmp_path / "theirs/model.safetensors").unlink()
    (tmp_path / "theirs/model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00001.safetensors"}}')
    assert "has its weights in several files" in refusal(tmp_path / "theirs", "pi0")


@pytest.mark.parametrize("kind", ["pi0", "pi05"])
def test_a_checkpoint_of_lerobot_is_not_one_of_openpi(tmp_path: Path, kind: str) -> None:
    write(tmp_path / "theirs", kind)
    said = refusal(tmp_path / "theirs", f"openpi-{kind}", horizon=10)
    assert f"says type '{kind}'" in said
    assert "rlvla import lerobot" in said


def test_a_configuration_that_openpi_did_not_write_is_judged_before_the_weights(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/config.json").write_text('{"model_type": "llama", "hidden_size": 4}')
    assert "is not what openpi's converter writes" in refusal(tmp_path / "theirs", "openpi-pi0")


@pytest.mark.parametrize("where", ["option", "config.json"])
def test_a_pi05_that_was_trained_without_the_state_in_its_prompt_has_the_prompt_of_pi0(
    tmp_path: Path, where: str
) -> None:
    write(tmp_path / "theirs", "openpi-pi05")
    options = {"discrete_state_input": False} if where == "option" else {}
    if where == "config.json":
        edit_json(tmp_path / "theirs/config.json", lambda data: data.update(discrete_state_input=False))
    import_it(tmp_path / "theirs", "openpi-pi05", tmp_path / "policy", **options)
    policy: Any = load_policy(tmp_path / "policy")
    assert policy.prompt(" pick_up\nit ", np.zeros(5, np.float32)) == "pick up it\n"
    seen = observe(policy)
    assert seen.state is not None
    moved = Observation(seen.images, seen.instruction, seen.state + 0.5)
    assert torch.equal(policy.collate(seen)["input_ids"], policy.collate(moved)["input_ids"])


def test_what_no_file_of_openpi_says_is_noted_or_said(tmp_path: Path) -> None:
    write(tmp_path / "theirs", "openpi-pi05")
    notes = " ".join(import_it(tmp_path / "theirs", "openpi-pi05", tmp_path / "guessed")["notes"])
    assert "delta_actions=false" in notes
    assert "discrete_state_input=false" in notes
    known = {"delta_actions": False, "discrete_state_input": True}
    assert "state" not in " ".join(import_it(tmp_path / "theirs", "openpi-pi05", tmp_path / "known", **known)["notes"])
    assert "openpi's AbsoluteActions" in refusal(tmp_path / "theirs", "openpi-pi05", delta_actions=True)
    edit_json(tmp_path / "theirs/config.json", lambda data: data.update(discrete_state_input=False))
    assert "Leave discrete_state_input out" in refusal(tmp_path / "theirs", "openpi-pi05", discrete_state_input=True)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda data: data.update(weights="../../PWNED.safetensors"), "not inside a checkpoint"),
        (lambda data: data.update(weights="/tmp/PWNED.safetensors"), "not inside a checkpoint"),
        (lambda data: data["tensors"].popitem(), "it was written with"),
        (lambda data: data["tensors"].update({next(iter(data["tensors"])): ["expert.norm.weight", "load"]}), "'load'"),
        (lambda data: data["tensors"].update({next(iter(data["tensors"])): ["nobody", "float32"]}), "nobody"),
    ],
)
def test_an_export_trusts_no_origin(tmp_path: Path, change: Callable[[Any], None], said: str) -> None:
    write(tmp_path / "theirs", "smolvla")
    import_it(tmp_path / "theirs", "smolvla", tmp_path / "deep/policy")
    edit_json(tmp_path / "deep/policy/origin/origin.json", change)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=re.escape(said)):
        exporting.run(ExportConfig(policy=str(tmp_path / "deep/policy"), output=str(tmp_path / "deep/back")))
    assert sorted(tmp_path.rglob("*")) == before


def test_code_that_a_configuration_names_is_not_run_and_said_to_be_there(tmp_path: Path) -> None:
    write(tmp_path / "theirs", "pi0", config=public.lerobot_config("pi0", auto_map={"AutoModel": "evil.Model"}))
    (tmp_path / "theirs/evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    notes = import_it(tmp_path / "theirs", "pi0", tmp_path / "policy")["notes"]
    assert "config.json names code of its own (auto_map); none was run." in notes
    assert not (tmp_path / "ran").exists()
