"""Checkpoints of starVLA: read into policies that compute what theirs do, and written back exactly."""

import importlib.util
import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from rlvla.config import ExportConfig, ImportConfig
from rlvla.formats import exporting, importing
from rlvla.formats.qwen_folder import resized_side
from rlvla.formats.starvla_norm import closed_and_open, read_normalization
from rlvla.policies.action_stats import ActionStats
from rlvla.policies.folder import load_policy, save_policy
from rlvla.policies.policy import Policy
from rlvla.policies.processor import resize
from rlvla.vision_language import Reader
from rlvla_envs.base import ActionComponent, EnvSpec, Observation, SuiteConfig

TOY = SuiteConfig(name="toy", image_size=32, chunk_size=6)


def _load() -> ModuleType:
    path = Path(__file__).resolve().parents[1] / "starvla_checkpoints.py"
    spec = importlib.util.spec_from_file_location("starvla_checkpoints", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


public = _load()
KINDS: list[str] = list(public.KINDS)
FLOWS = [kind for kind in KINDS if kind != "QwenOFT"]


def import_it(run: Path, output: Path, **changes: Any) -> dict[str, Any]:
    options: dict[str, Any] = {
        "format": "starvla",
        "checkpoint": str(run),
        "output": str(output),
        "suite": TOY,
        "tokenizer": str(run.parent / "vlm"),
        "normalization": ["q99"],
    }
    return importing.run(ImportConfig(**{**options, **changes}))


def refusal(run: Path, **changes: Any) -> str:
    """What the user reads; nothing may have been written."""
    output = run.parent / "refused"
    with pytest.raises(ValueError, match=r".") as caught:
        import_it(run, output, **changes)
    assert not output.exists()
    return str(caught.value)


@pytest.fixture(scope="module")
def vlm(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """The base VLM's folder, and the size of its vocabulary. Tests read it."""
    folder = tmp_path_factory.mktemp("base") / "vlm"
    return folder, public.write_vlm(folder)


@pytest.fixture
def write(vlm: tuple[Path, int], tmp_path: Path) -> Callable[..., tuple[Path, dict[str, Tensor]]]:
    """Write a run, with the VLM's folder beside it: ``write("QwenGR00T", config=...)``."""
    (tmp_path / "vlm").symlink_to(vlm[0])

    def make(kind: str = "QwenGR00T", name: str = "run", **parts: Any) -> tuple[Path, dict[str, Tensor]]:
        return tmp_path / name, public.write_run(tmp_path / name, kind, vlm[1], **parts)

    return make


@pytest.fixture(scope="module", params=KINDS)
def imported(
    request: pytest.FixtureRequest, vlm: tuple[Path, int], tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, Path]:
    """(kind, run, policy folder) of each architecture. Tests read them and write elsewhere."""
    root = tmp_path_factory.mktemp(request.param)
    public.write_run(root / "run", request.param, vlm[1])
    import_it(root / "run", root / "policy", tokenizer=str(vlm[0]))
    return request.param, root / "run", root / "policy"


def observe(policy: Policy, size: int = 32) -> Observation:
    rng = np.random.default_rng(3)
    images = {c.name: rng.integers(0, 256, (2, size, size, 3), dtype=np.uint8) for c in policy.env_spec.cameras}
    state = rng.normal(size=(2, policy.env_spec.state_size)).astype(np.float32)
    return Observation(images, ["reach the green goal", "fly slowly and carefully through the gap"], state)


def hidden_states(tensors: dict[str, Tensor], folder: Path, seen: Observation, row: int, text: str) -> Any:
    """What transformers' own model of the folder's config.json makes of one row: every layer's states, and the ids."""
    from transformers import PreTrainedTokenizerFast, Qwen2VLImageProcessorPil, Qwen3VLConfig
    from transformers import Qwen3VLForConditionalGeneration as Model

    model = Model(Qwen3VLConfig.from_dict(json.loads((folder / "config.json").read_text()))).eval()
    own = {k.removeprefix(public.MODEL): t.float() for k, t in tensors.items() if k.startswith(public.MODEL)}
    model.load_state_dict(own)
    processor = Qwen2VLImageProcessorPil(
        **{k: v for k, v in json.loads((folder / "preprocessor_config.json").read_text()).items() if "type" not in k}
    )
    (images,) = seen.images.values()
    made = processor([images[row]], return_tensors="pt")
    tokens = int(made["image_grid_thw"].prod()) // 4
    turn = f"<|vision_start|>{'<|image_pad|>' * tokens}<|vision_end|>{text}"
    chat = f"<|im_start|>user\n{turn}<|im_end|>\n<|im_start|>assistant\n"
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    ids = torch.tensor([tokenizer(chat, add_special_tokens=False)["input_ids"]])
    image = ids == tokenizer.convert_tokens_to_ids("<|image_pad|>")
    with torch.no_grad():
        out = model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            mm_token_type_ids=image.int(),
            pixel_values=made["pixel_values"],
            image_grid_thw=made["image_grid_thw"],
            output_hidden_states=True,
        )
    return [states[0] for states in out.hidden_states], ids[0]


# --- what the network computes


@pytest.mark.parametrize("kind", FLOWS)
@pytest.mark.parametrize("state", [False, True], ids=["without state", "with state"])
@torch.no_grad()
def test_an_imported_policy_computes_what_the_checkpoints_own_equations_do(
    write: Callable[..., tuple[Path, dict[str, Tensor]]], vlm: tuple[Path, int], tmp_path: Path, kind: str, state: bool
) -> None:
    config = public.configuration(kind, **{"datasets.vla_data.include_state": state})
    run, tensors = write(kind, config=config)
    import_it(run, tmp_path / "policy", state_normalization=["min_max"] if state else [])
    policy: Any = load_policy(tmp_path / "policy")
    seen = observe(policy)
    # Noise everywhere, in steps past the suite's chunk of 6 too: starVLA denoises all 8.
    sample = torch.randn(2, public.HORIZON, public.ACTIONS, generator=torch.Generator().manual_seed(1))
    step = torch.tensor([1, 3])
    context = policy.encode(policy.collate(seen))
    velocity = policy.velocity(context, sample, 1 - step / public.STEPS, step)
    table = public.statistics()["toy_robot"]["state"]
    low, high = torch.tensor(table["min"]), torch.tensor(table["max"])
    for row in range(2):
        text = public.COT.replace("{instruction}", seen.instruction[row])
        layers, _ = hidden_states(tensors, vlm[0], seen, row, text)
        assert seen.state is not None
        given = 2 * (torch.from_numpy(seen.state[row]) - low) / (high - low) - 1 if state else None
        expected = public.VELOCITY[kind](tensors, layers, sample[row], 250.0 * int(step[row]), given)
        assert expected.std() > 0.05
        # Ours points from data to noise.
        torch.testing.assert_close(velocity[row], -expected, atol=1e-3, rtol=2e-3)


@torch.no_grad()
def test_a_qwenpi_from_before_the_canonical_forward_pass_attends_to_the_vlm_in_every_block(
    write: Callable[..., tuple[Path, dict[str, Tensor]]], vlm: tuple[Path, int], tmp_path: Path
) -> None:
    said = "framework.action_model.diffusion_model_cfg."
    run, tensors = write("QwenPI", config=public.configuration("QwenPI", **{f"{said}use_canonical_forward": ...}))
    message = refusal(run)
    assert f"{run}/config.yaml says interleave_self_attention = true and has no use_canonical_forward" in message
    assert "self_attention=false" in message
    import_it(run, tmp_path / "old", self_attention=False)
    import_it(run, tmp_path / "new", self_attention=True)
    configs = {
        "never": public.configuration("QwenPI", **{f"{said}interleave_self_attention": False}),
        "legacy": public.configuration("QwenPI", **{f"{said}use_canonical_forward": False}),
    }
    for name, config in configs.items():
        written, _ = write("QwenPI", f"run_{name}", config=config)
        import_it(written, tmp_path / name)
    sample = torch.randn(2, public.HORIZON, public.ACTIONS, generator=torch.Generator().manual_seed(1))
    step = torch.tensor([1, 3])
    found = {}
    for name in ("old", "new", *configs):
        policy: Any = load_policy(tmp_path / name)
        seen = observe(policy)
        found[name] = policy.velocity(policy.encode(policy.collate(seen)), sample, 1 - step / 4, step)
    text = public.COT.replace("{instruction}", seen.instruction[0])
    layers, _ = hidden_states(tensors, vlm[0], seen, 0, text)
    for name, interleaved in (("old", False), ("new", True), ("never", False), ("legacy", False)):
        expected = public.pi_velocity(tensors, layers, sample[0], 250.0, None, interleaved=interleaved)
        torch.testing.assert_close(found[name][0], -expected, atol=1e-3, rtol=2e-3)
    assert (found["old"] - found["new"]).abs().max() > 0.05


@torch.no_grad()
def test_an_imported_qwenoft_regresses_what_the_checkpoints_own_equations_do(
    imported: tuple[str, Path, Path], vlm: tuple[Path, int]
) -> None:
    kind, run, folder = imported
    if kind != "QwenOFT":
        pytest.skip("has a flow")
    policy, tensors = load_policy(folder), read(run / public.WHERE)
    # An instruction with a query in it: the last ones count.
    seen = replace(observe(policy), instruction=["reach the green goal", f"find {public.QUERY} and turn"])
    distribution = policy.distribution(policy.encode(policy.collate(seen)))  # type: ignore[attr-defined]
    for row in range(2):
        request = f" Please predict the next 8 robot actions: <action>{public.QUERY * 8}<action>."
        text = public.COT.replace("{instruction}", seen.instruction[row] + request)
        layers, ids = hidden_states(tensors, vlm[0], seen, row, text)
        query = policy.tokenizer.convert_tokens_to_ids(public.QUERY)
        places = (ids == query).nonzero()[:, 0]
        assert len(places) == 8 + row
        expected = public.oft_actions(tensors, layers[-1][places[-8:]])
        assert expected.std() > 0.05
        torch.testing.assert_close(distribution.location[row, :6], expected[:6], atol=1e-4, rtol=1e-3)
        # The suite executes six.
        assert not distribution.location[row, 6:].any()
    assert torch.equal(distribution.deterministic(), distribution.location)


def test_a_deviation_that_no_checkpoint_has_is_new_and_not_exported(
    write: Callable[..., tuple[Path, dict[str, Tensor]]], tmp_path: Path
) -> None:
    run, tensors = write("QwenOFT")
    notes = import_it(run, tmp_path / "policy")["notes"]
    assert notes == ["Not in the checkpoint, and not exported: log_std."]
    policy = load_policy(tmp_path / "policy")
    log_std = policy.state_dict()["log_std"]
    assert log_std.tolist() == pytest.approx([-1.6, -1.6])
    with torch.no_grad():
        log_std.fill_(-1)
    save_policy(policy, tmp_path / "refined")
    assert load_policy(tmp_path / "refined").state_dict()["log_std"].tolist() == [-1, -1]
    exporting.run(ExportConfig(policy=str(tmp_path / "refined"), output=str(tmp_path / "back")))
    assert read(tmp_path / "back" / public.WHERE).keys() == tensors.keys()


def test_a_qwenoft_that_reads_the_state_from_the_prompt_is_refused(
    write: Callable[..., tuple[Path, dict[str, Tensor]]],
) -> None:
    run, _ = write("QwenOFT", config=public.configuration("QwenOFT", **{"datasets.vla_data.include_state": True}))
    assert "only QwenOFT without a state is supported" in refusal(run, state_normalization=["q99"])


def test_actions_are_denormalised_as_the_statistics_say(imported: tuple[str, Path, Path]) -> None:
    _, _, folder = imported
    policy = load_policy(folder)
    sample = torch.zeros(1, public.HORIZON, public.ACTIONS)
    sample[0, 0] = torch.tensor([0.5, 3.0])
    # By hand: q01 -.6 and q99 .4 give (.5 + 1) / 2 * 1 - .6 = .15; 3 is cut at 1, which is q99.
    np.testing.assert_allclose(policy.actions_to_env(sample)[0, 0], [0.15, 0.9], atol=1e-6)


@pytest.mark.parametrize("kind", FLOWS)
def test_noise_is_drawn_wherever_starvla_draws_it(
    write: Callable[..., tuple[Path, dict[str, Tensor]]], tmp_path: Path, kind: str
) -> None:
    run, _ = write(kind)
    import_it(run, tmp_path / "policy")
    policy = load_policy(tmp_path / "policy")
    assert int(policy.action_mask().sum()) == 6 * 2
    assert bool(policy.noise_mask().all())


@torch.no_grad()
def test_images_are_resized_as_starvla_and_then_qwens_processor_do(vlm: tuple[Path, int], tmp_path: Path) -> None:
    from PIL import Image
    from transformers import Qwen2VLImageProcessorPil

    public.write_vlm(tmp_path / "vlm", fewest=64 * 64)
    config = public.configuration("QwenGR00T", **{"datasets.vla_data.image_size": [48, 48]})
    public.write_run(tmp_path / "run", "QwenGR00T", vlm[1], config=config)
    import_it(tmp_path / "run", tmp_path / "policy")
    policy: Any = load_policy(tmp_path / "policy")
    # 48 x 48 = 2304 pixels are fewer than 4096.
    assert policy.config.image_sizes == (48, 64)
    seen = observe(policy)
    batch = policy.collate(seen)
    assert int(batch["token_type"][0].sum()) == 4 * 4
    ours = policy.image_inputs(policy.vlm, batch)
    said = json.loads((tmp_path / "vlm/preprocessor_config.json").read_text())
    processor = Qwen2VLImageProcessorPil(**{k: v for k, v in said.items() if "type" not in k})
    (images,) = seen.images.values()
    theirs = processor([Image.fromarray(image).resize((48, 48)) for image in images], return_tensors="pt")
    assert ours["image_grid_thw"].tolist() == theirs["image_grid_thw"].tolist()
    # Roundings of the first are seen by the second.
    assert (ours["pixel_values"] - theirs["pixel_values"]).abs().max() < 4.5 / 127.5
    assert (ours["pixel_values"] - theirs["pixel_values"]).abs().mean() < 0.1 / 127.5


@pytest.mark.parametrize("side", [20, 40])
def test_a_resized_image_is_pils_up_to_roundings(side: int) -> None:
    from PIL import Image

    image = np.random.default_rng(0).integers(0, 256, (30, 30, 3), dtype=np.uint8)
    theirs = np.asarray(Image.fromarray(image).resize((side, side))).astype(int)
    ours = resize(torch.from_numpy(image)[None], side)[0].numpy().astype(int)
    # Noise overshoots everywhere: resized in one pass, values would be another by up to 13.
    assert abs(ours - theirs).max() <= 2
    assert abs(ours - theirs).mean() < 0.1


def test_the_side_behind_the_processor_is_the_one_transformers_computes() -> None:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    assert resized_side(224, 32, 65536, 16777216) == 256
    for unit, fewest, most in ((32, 65536, 16777216), (28, 3136, 12845056), (16, 4096, 9000)):
        for side in range(unit, 700, 13):
            height, _ = smart_resize(side, side, factor=unit, min_pixels=fewest, max_pixels=most)
            assert resized_side(side, unit, fewest, most) == height, (unit, side)


# --- there and back


@pytest.mark.parametrize("where", [public.WHERE, "checkpoints/steps_9_model.safetensors"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_policy_that_was_imported_is_exported_exactly(
    write: Callable[..., tuple[Path, dict[str, Tensor]]], tmp_path: Path, kind: str, where: str
) -> None:
    run, before = write(kind, where=where)
    import_it(run, tmp_path / "policy")
    exporting.run(ExportConfig(policy=str(tmp_path / "policy"), output=str(tmp_path / "back")))
    after = read(tmp_path / "back" / where)
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert after[key].dtype == tensor.dtype, key
        assert torch.equal(after[key], tensor), key
    found = {str(p.relative_to(tmp_path / "back")) for p in (tmp_path / "back").rglob("*") if p.is_file()}
    assert found == {where, "config.yaml", "dataset_statistics.json"}
    for name in found - {where}:
        assert (tmp_path / "back" / name).read_bytes() == (run / name).read_bytes(), name
    # What came back is a checkpoint that can be imported.
    import_it(tmp_path / "back", tmp_path / "again")


def read(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".pt":
        tensors: dict[str, Tensor] = torch.load(path, weights_only=True)
        return tensors
    return load_file(path)


def test_what_training_changed_is_what_an_export_changes(imported: tuple[str, Path, Path], tmp_path: Path) -> None:
    _, run, folder = imported
    policy = load_policy(folder)
    name = sorted(key for key in policy.state_dict() if key.startswith("expert.") and key.endswith(".bias"))[0]
    with torch.no_grad():
        policy.state_dict()[name].add_(0.25)
        policy.state_dict()["vlm.language_model.embed_tokens.weight"].add_(1)
    save_policy(policy, tmp_path / "refined")
    exporting.run(ExportConfig(policy=str(tmp_path / "refined"), output=str(tmp_path / "back")))
    before, after = read(run / public.WHERE), read(tmp_path / "back" / public.WHERE)
    # The language-model head is the embedding under a second name.
    tied = [f"{public.MODEL}lm_head.weight", f"{public.MODEL}model.language_model.embed_tokens.weight"]
    changed = [key for key in sorted(before) if not torch.equal(before[key], after[key])]
    assert changed == sorted([name.replace("expert.", "action_model."), *tied])
    assert torch.equal(after[tied[0]], after[tied[1]])


def test_a_state_encoder_that_no_state_reaches_is_kept_aside(
    write: Callable[..., tuple[Path, dict[str, Tensor]]], tmp_path: Path
) -> None:
    run, _ = write("QwenGR00T")
    kept = import_it(run, tmp_path / "policy")["kept_aside"]
    assert kept == [f"action_model.state_encoder.layer{i}.{p}" for i in (1, 2) for p in ("bias", "weight")]
    config = public.configuration("QwenGR00T", **{"datasets.vla_data.include_state": True})
    run, _ = write("QwenGR00T", "with_state", config=config)
    assert import_it(run, tmp_path / "policy2", state_normalization=["q99"])["kept_aside"] == []


# --- what does not fit


@pytest.mark.parametrize("kind", KINDS)
def test_every_missing_and_every_extra_tensor_is_named_by_the_checkpoints_key(
    write: Callable[..., tuple[Path, dict[str, Tensor]]], vlm: tuple[Path, int], kind: str
) -> None:
    tensors = public.draw(public.vlm_shapes(vlm[1]) | public.head_shapes(kind))
    lost = f"{public.MODEL}model.language_model.norm.weight"
    tensors = {key: t for key, t in tensors.items() if key != lost}
    run, _ = write(kind, tensors=tensors | {"action_model.adapter.weight": torch.zeros(2, 3)})
    said = refusal(run)
    assert str(run / public.WHERE) in said
    assert "without a home: action_model.adapter.weight (2, 3)" in said
    assert f"missing: {lost} ({public.HIDDEN},)" in said


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_of_another_architecture_is_refused(
    write: Callable[..., tuple[Path, dict[str, Tensor]]], vlm: tuple[Path, int], kind: str
) -> None:
    run, _ = write(kind, config=public.configuration("QwenFast"))
    assert f"{run}/config.yaml says framework.name = 'QwenFast'; supported are QwenGR00T" in refusal(run)
    # What the file says and what it holds.
    for other in KINDS:
        if other != kind:
            tensors = public.draw(public.vlm_shapes(vlm[1]) | public.head_shapes(other))
            run, _ = write(kind, f"mixed_{other}", tensors=tensors)
            said = refusal(run)
            assert str(run / public.WHERE) in said
            doubts = (f"Is it a checkpoint of {kind}?", "does not fit the architecture", "of another checkpoint")
            assert any(doubt in said for doubt in doubts)
    bare = {key: t for key, t in public.draw(public.vlm_shapes(vlm[1])).items() if key.startswith(public.MODEL)}
    run, _ = write(kind, "bare", tensors=bare)
    assert "lacks the tensor action_model." in refusal(run)


@pytest.mark.parametrize("kind", KINDS)
def test_the_other_convention_of_flow_time_is_refused(
    write: Callable[..., tuple[Path, dict[str, Tensor]]], tmp_path: Path, kind: str
) -> None:
    run, _ = write(kind)
    assert "noise_at is 1, but in the format 'starvla' a sample is noise at flow time 0" in refusal(run, noise_at=1.0)
    import_it(run, tmp_path / "policy", noise_at=0.0)


def test_missing_statistics_are_named(write: Callable[..., tuple[Path, dict[str, Tensor]]], tmp_path: Path) -> None:
    run, _ = write(stats={})
    assert f"{run}/dataset_statistics.json is missing" in refusal(run)
    given = tmp_path / "stats.json"
    given.write_text(json.dumps(public.statistics()))
    import_it(run, tmp_path / "policy", statistics=str(given))
    table = public.statistics()
    del table["toy_robot"]["action"]["q99"]
    run, _ = write(name="without", stats=table)
    said = refusal(run)
    assert "dataset_statistics.json (toy_robot.action) lacks the statistics q99" in said
    assert "has statistics of its own" in refusal(run, statistics=str(given))


def test_statistics_of_several_robots_and_of_unknown_ones_need_a_word(
    write: Callable[..., tuple[Path, dict[str, Tensor]]], tmp_path: Path
) -> None:
    run, _ = write(stats=public.statistics("one") | public.statistics("two"))
    said = refusal(run)
    assert "has action statistics of one, two" in said
    assert "robot=NAME" in said
    assert "robot is 'three'" in refusal(run, robot="three")
    import_it(run, tmp_path / "policy", robot="two")
    said = refusal(run, robot="two", normalization=[])
    assert "the table knows oxe_bridge, oxe_rt1, libero_franka, and data_mix is 'toy_mix'" in said
    assert "normalization is ['q98']; it must be one of q99, min_max" in refusal(
        run, robot="one", normalization=["q98"]
    )


def test_a_tokenizer_that_lacks_the_image_token_is_refused(
    write: Callable[..., tuple[Path, dict[str, Tensor]]], tmp_path: Path
) -> None:
    run, _ = write()
    public.write_vlm(tmp_path / "text", image=False)
    said = refusal(run, tokenizer=str(tmp_path / "text"))
    assert f"{tmp_path}/text/tokenizer.json has no image token '<|image_pad|>'" in said
    assert "Qwen3-VL-4B-Instruct" in said


def test_a_base_model_that_is_incomplete_or_another_one_is_refused(
    write: Callable[..., tuple[Path, dict[str, Tensor]]], vlm: tuple[Path, int], tmp_path: Path
) -> None:
    run, _ = write()
    said = refusal(run, tokenizer=None)
    assert f"{run} has no tokenizer.json. Give tokenizer=FOLDER" in said
    for file in ("config.json", "preprocessor_config.json"):
        shutil.rmtree(tmp_path / "cut", ignore_errors=True)
        shutil.copytree(vlm[0], tmp_path / "cut")
        (tmp_path / "cut" / file).unlink()
        assert f"{tmp_path}/cut has no {file}. Give tokenizer=FOLDER" in refusal(run, tokenizer=str(tmp_path / "cut"))
    public.write_vlm(tmp_path / "older", model_type="qwen2_5_vl")
    said = refusal(run, tokenizer=str(tmp_path / "older"))
    assert "older/config.json says model_type = 'qwen2_5_vl'; supported are qwen3_vl, qwen3_5" in said
    public.write_vlm(tmp_path / "other", image_token_id=7)
    assert "says image_token_id = 7, and tokenizer.json has" in refusal(run, tokenizer=str(tmp_path / "other"))


def test_which_weights_are_meant_is_asked_where_a_run_has_several(
    write: Callable[..., tuple[Path, dict[str, Tensor]]], tmp_path: Path
) -> None:
    run, _ = write()
    shutil.copy(run / public.WHERE, run / "checkpoints/steps_60000_pytorch_model.pt")
    said = refusal(run)
    assert "steps_50000_pytorch_model.pt, steps_60000_pytorch_model.pt" in said
    summary = import_it(run, tmp_path / "policy", checkpoint=str(run / public.WHERE))
    assert summary["left_out"] == ["checkpoints/steps_60000_pytorch_model.pt"]
    (run / public.WHERE).unlink()
    (run / "checkpoints/steps_60000_pytorch_model.pt").unlink()
    assert "and has none" in refusal(run)


def test_a_pickle_is_never_run(write: Callable[..., tuple[Path, dict[str, Tensor]]], tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "ran",))

    run, _ = write()
    (run / public.WHERE).write_bytes(pickle.dumps(Attack()))
    assert "weights_only=True: other pickles can run code" in refusal(run)
    torch.save({"weight": Attack()}, run / public.WHERE)
    assert "weights_only=True: other pickles can run code" in refusal(run)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"framework.action_model.past_action_window_size": 2}, "past_action_window_size = 2; only 0 is supported"),
        ({"framework.action_model.add_pos_embed": False}, "add_pos_embed = False; only True is supported"),
        ({"framework.action_model.diffusion_model_cfg.norm_type": "layer_norm"}, "norm_type = 'layer_norm'"),
        (
            {"framework.action_model.action_horizon": ..., "framework.action_model.future_action_window_size": ...},
            "future_action_window_size = None; it must be a whole number",
        ),
        ({"framework.action_model.diffusion_model_cfg.attention_head_dim": 7}, "attention_head_dim 7"),
        ({"datasets.vla_data.image_size": [224, 112]}, "image_size [224, 112]; only squares"),
        ({"datasets.vla_data.CoT_prompt": "Do it."}, "CoT_prompt: a policy's user prompt is 'Do it.'"),
        ({"datasets.vla_data": None}, "has no section datasets.vla_data"),
        ({"datasets.vla_data.include_state": True}, "reads the robot's state"),
    ],
)
def test_what_a_configuration_says_and_is_not_supported_is_named(
    write: Callable[..., tuple[Path, dict[str, Tensor]]], changes: dict[str, Any], said: str
) -> None:
    run, _ = write(config=public.configuration("QwenGR00T", **changes))
    message = refusal(run)
    assert said in message


def test_an_older_run_says_its_horizon_as_a_window(
    write: Callable[..., tuple[Path, dict[str, Tensor]]], tmp_path: Path
) -> None:
    run, _ = write(config=public.configuration("QwenGR00T", **{"framework.action_model.action_horizon": ...}))
    import_it(run, tmp_path / "policy")
    assert load_policy(tmp_path / "policy").horizon == 8


def test_a_damaged_configuration_is_named(write: Callable[..., tuple[Path, dict[str, Tensor]]]) -> None:
    run, _ = write()
    (run / "config.yaml").write_text("framework: [")
    assert f"{run}/config.yaml is damaged" in refusal(run)
    (run / "config.yaml").unlink()
    assert "has neither config.yaml nor config.json" in refusal(run)


# --- statistics


def arm(convention: str) -> tuple[ActionComponent, ...]:
    pose = ActionComponent(name="pose", size=6, convention="delta", low=-1.0, high=1.0)
    return pose, ActionComponent(name="gripper", size=1, convention=convention, low=-1.0, high=1.0)


@pytest.mark.parametrize(
    ("robot", "data_mix", "keys"),
    [("oxe_bridge", "bridge_rt_1", ("q01", "q99")), ("franka", "libero_goal", ("min", "max"))],
)
def test_the_table_knows_how_public_robots_are_normalised(
    tmp_path: Path, make_toy: Callable[..., Any], robot: str, data_mix: str, keys: tuple[str, str]
) -> None:
    spec: EnvSpec = replace(make_toy(1).spec, action=arm("absolute, 1 open, -1 closed"))
    action = {name: [10.0 * i + j for j in range(7)] for i, name in enumerate(("min", "q01", "q99", "max"), start=-2)}
    action["mask"] = [True] * 6 + [False]
    (tmp_path / "dataset_statistics.json").write_text(json.dumps({robot: {"action": action}}))
    stats, images = read_normalization(tmp_path, ImportConfig(), spec, data_mix, uses_state=False)
    assert images == (("image_0",) if robot == "oxe_bridge" else ("primary_image", "wrist_image"))
    np.testing.assert_allclose(stats.q01[:6], action[keys[0]][:6])
    np.testing.assert_allclose(stats.q99[:6], action[keys[1]][:6])
    # The gripper: above 0.5 is open, whatever the statistics say.
    unit = np.zeros((3, 7), np.float32)
    unit[:, 6] = [0.51, 0.49, -0.7]
    assert stats.denormalize(unit)[:, 6].tolist() == [1.0, -1.0, -1.0]
    np.testing.assert_allclose(stats.denormalize(unit)[0, 0], (action[keys[0]][0] + action[keys[1]][0]) / 2)
    back = stats.normalize(stats.denormalize(unit))
    assert back[:, 6].tolist() == [1.0, 0.0, 0.0]
    with pytest.raises(ValueError, match=r"mask = false for channel 6.*mode there is 'q99'"):
        read_normalization(tmp_path, ImportConfig(normalization=["q99"]), spec, data_mix, uses_state=False)


def test_a_gripper_that_closes_upwards_is_turned_round(tmp_path: Path) -> None:
    assert closed_and_open(arm("absolute, -1 open, 1 closed")[1]) == (1.0, -1.0)
    stats = ActionStats(
        np.array([1.0], np.float32),
        np.array([-1.0], np.float32),
        np.zeros(0, np.float32),
        np.ones(0, np.float32),
        binary=np.array([True]),
    )
    assert stats.active.tolist() == [True]
    stats.save(tmp_path / "stats.json")
    again = ActionStats.load(tmp_path / "stats.json")
    assert again.denormalize(np.array([[0.9], [0.1]])).tolist() == [[-1.0], [1.0]]
    assert again.normalize(np.array([[-1.0], [1.0]])).tolist() == [[1.0], [0.0]]
    with pytest.raises(ValueError, match=r"convention 'percent'; .* which number is \"open\""):
        closed_and_open(arm("percent")[1])


# --- what looks right and is not


@pytest.mark.parametrize(
    ("kind", "lost", "said"),
    [
        ("QwenGR00T", f"action_model.model.transformer_blocks.{public.BLOCKS - 1}.", "num_layers = 4"),
        (
            "QwenPI",
            f"action_model.model.transformer_blocks.{public.LAYERS - 1}.",
            "one for each of 3 layers of the VLM",
        ),
        ("QwenOFT", "action_model.model.mlp_resnet_blocks.1.", "has 1 residual blocks of the head; QwenOFT's has 2"),
    ],
)
def test_a_last_block_that_is_missing_is_missed(
    write: Callable[..., tuple[Path, dict[str, Tensor]]], vlm: tuple[Path, int], kind: str, lost: str, said: str
) -> None:
    tensors = public.draw(public.vlm_shapes(vlm[1]) | public.head_shapes(kind))
    fewer = {key: tensor for key, tensor in tensors.items() if not key.startswith(lost)}
    assert len(fewer) < len(tensors)
    run, _ = write(kind, tensors=fewer)
    assert said in refusal(run)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("key", ["action_dim", "num_target_vision_tokens"])
def test_a_configuration_that_contradicts_the_tensors_is_refused(
    write: Callable[..., tuple[Path, dict[str, Tensor]]], tmp_path: Path, kind: str, key: str
) -> None:
    run, _ = write(kind, config=public.configuration(kind, **{f"framework.action_model.{key}": 7}))
    if kind == "QwenOFT" and key != "action_dim":
        import_it(run, tmp_path / "policy")
    else:
        said = refusal(run)
        assert f"{run}/config.yaml says {key} = 7, and {run / public.WHERE} has" in said


def test_statistics_that_no_data_have_are_refused(write: Callable[..., tuple[Path, dict[str, Tensor]]]) -> None:
    def table(**action: Any) -> dict[str, Any]:
        found: dict[str, Any] = public.statistics()
        found["toy_robot"]["action"] |= action
        return found

    run, _ = write("QwenOFT", "a", stats=table(q99=[0.4, -0.7]))
    assert "q99 = -0.7 in channel 1; it must be at least q01, -0.5" in refusal(run)
    run, _ = write("QwenOFT", "b", stats=table(mask=[True]))
    assert "mask = [True]; it must have one entry for each of 2 channels" in refusal(run)
    run, _ = write("QwenOFT", "c", stats=table(q99="high"))
    assert "q99, is 'high'; it must be a list of numbers" in refusal(run)


@pytest.mark.parametrize(("mode", "given"), [("q99", 0.7), ("mean_std", 0.7), ("min_max", 0.0)])
def test_a_state_channel_that_never_moved_is_given_as_starvla_gives_it(
    write: Callable[..., tuple[Path, dict[str, Tensor]]], tmp_path: Path, mode: str, given: float
) -> None:
    table = public.statistics()
    state = table["toy_robot"]["state"]
    for low, high in (("q01", "q99"), ("min", "max")):
        state[low][2] = state[high][2] = 0.7
    state["mean"][2], state["std"][2] = 0.7, 0.0
    config = public.configuration("QwenGR00T", **{"datasets.vla_data.include_state": True})
    run, _ = write("QwenGR00T", config=config, stats=table)
    import_it(run, tmp_path / "policy", state_normalization=[mode])
    stats = load_policy(tmp_path / "policy").stats
    assert stats.normalize_state(np.array([[0.0, 0.0, 0.7, 0.0, 0.0]], np.float32))[0, 2] == pytest.approx(given)


def test_a_language_model_with_an_output_layer_of_its_own_is_asked_nothing(
    write: Callable[..., tuple[Path, dict[str, Tensor]]], vlm: tuple[Path, int], tmp_path: Path
) -> None:
    tensors = public.draw(public.vlm_shapes(vlm[1]) | public.head_shapes("QwenGR00T"))
    head = f"{public.MODEL}lm_head.weight"
    tensors[head] = tensors[head] + 1
    run, _ = write("QwenGR00T", tensors=tensors)
    assert head in import_it(run, tmp_path / "policy")["kept_aside"]
    with pytest.raises(ValueError, match=r"output layer of its own \(qwen_vl_interface\.model\.lm_head\.weight\)"):
        Reader(load_policy(tmp_path / "policy"))  # type: ignore[arg-type]
    tied, _ = write("QwenGR00T", "tied")
    import_it(tied, tmp_path / "policy_tied")
    Reader(load_policy(tmp_path / "policy_tied"))  # type: ignore[arg-type]


def test_sizes_of_a_base_model_that_do_not_fit_each_other_name_its_file(
    write: Callable[..., tuple[Path, dict[str, Tensor]]], vlm: tuple[Path, int], tmp_path: Path
) -> None:
    shutil.copytree(vlm[0], tmp_path / "odd")
    path = tmp_path / "odd/config.json"
    data = json.loads(path.read_text())
    data["text_config"]["rope_scaling"]["mrope_section"] = [1, 1, 1]
    path.write_text(json.dumps(data))
    run, _ = write("QwenGR00T")
    assert refusal(run, tokenizer=str(tmp_path / "odd")).startswith(f"{path} has sizes that do not fit each other")
