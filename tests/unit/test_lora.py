"""Adapters change nothing until they are trained, train alone, and leave a policy folder that needs none."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from rlvla import collect, sft
from rlvla.compose import compose
from rlvla.config import AlgoConfig, ConfigError, LoraConfig
from rlvla.learner import Learner
from rlvla.policies.base import ValueHead
from rlvla.policies.folder import load_policy, load_weights, save_policy
from rlvla.policies.lora import NEVER, Adapter, LoraLinear, _adapt, adapted, add_lora, merge
from rlvla.policies.policy import PolicyWithFlow as Policy
from rlvla.samplers import training_sampler
from rlvla_envs.base import VecEnv

GROUPS = ("expert", "vlm")


@pytest.fixture
def policy(make_policy: Callable[..., Policy], make_toy: Callable[..., VecEnv]) -> Policy:
    return make_policy("qwen_vla_toy", make_toy(1).spec)


def with_lora(policy: Policy, *, drawn: bool = True, **changes: Any) -> Policy:
    """A copy of the policy with adapters, B drawn as if it had been trained."""
    made = copy.deepcopy(policy)
    torch.manual_seed(1)
    add_lora(made, LoraConfig(**{"rank": 4, "alpha": 8.0, **changes}), GROUPS, "runs/sft/policy")
    for layer in adapted(made).values() if drawn else ():
        nn.init.normal_(layer.lora_B, std=0.1)
    return made


def learner_of(policy: Policy) -> Learner:
    config = AlgoConfig(train_vlm=True)
    sampler = training_sampler(policy, config)
    return Learner(policy, ValueHead(policy.value_size), config, sampler, seed=0, total_iterations=1)


@torch.no_grad()
def outputs(policy: Policy, world: VecEnv) -> tuple[Tensor, Tensor]:
    """Context tokens and velocities of a few observations."""
    context = policy.encode(policy.collate(world.reset(range(3), range(3))))
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(3, policy.horizon, policy.channels, generator=generator)
    return context.tokens, policy.velocity(context, sample, torch.tensor([0.9, 0.5, 0.1]))


def test_an_adapter_by_hand() -> None:
    layer = nn.Linear(2, 2)
    whole = nn.ModuleDict({"layer": layer})
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        layer.bias.copy_(torch.tensor([10.0, 20.0]))
    _adapt(layer, Adapter(rank=1, alpha=0.5, base=""))
    assert isinstance(layer, LoraLinear)
    with torch.no_grad():
        layer.lora_A.copy_(torch.tensor([[1.0, -1.0]]))
        layer.lora_B.copy_(torch.tensor([[2.0], [4.0]]))
    # x = (5, 3): W x + b = (21, 47); A x = 2, B A x = (4, 8), half of it (2, 4).
    assert layer(torch.tensor([5.0, 3.0])).tolist() == [23, 51]
    # W + B A / 2 = [[1 + 1, 2 - 1], [3 + 2, 4 - 2]].
    assert merge(whole, whole.state_dict())["layer.weight"].tolist() == [[2, 1], [5, 2]]


def test_new_adapters_leave_every_output_as_it_was_to_the_bit(policy: Policy, make_toy: Callable[..., VecEnv]) -> None:
    world = make_toy(3)
    fresh = with_lora(policy, drawn=False)
    assert len(adapted(fresh)) > 10
    for one, other in zip(outputs(policy, world), outputs(fresh, world), strict=True):
        assert torch.equal(one, other)
    # And they are no idle ones: with another B every output is another.
    for one, other in zip(outputs(policy, world), outputs(with_lora(policy), world), strict=True):
        assert (one - other).abs().max() > 1e-3


def test_the_default_takes_all_layers_of_the_blocks_but_what_scales_and_normalises(policy: Policy) -> None:
    names = set(adapted(with_lora(policy)))
    kinds = {name.rsplit(".", 1)[-1] for name in names}
    backbone = {"q_proj", "k_proj", "v_proj", "o_proj", "in_proj_qkv", "in_proj_z", "out_proj"}
    assert kinds == backbone | {"gate_proj", "up_proj", "down_proj", "qkv", "out", "ffn_in", "ffn_out"}
    assert not any("visual" in name for name in names)
    # The layers that are passed over are there.
    everything = {name.rsplit(".", 1)[-1] for name, m in policy.named_modules() if type(m) is nn.Linear}
    assert {"in_proj_a", "in_proj_b"} <= everything & NEVER
    per_block = {name for name in names if name.startswith("expert.blocks.0.")}
    assert per_block == {f"expert.blocks.0.{kind}" for kind in ("qkv", "out", "ffn_in", "ffn_out")}


def test_only_adapters_ask_for_gradients_and_all_of_them_get_one(
    policy: Policy, make_toy: Callable[..., VecEnv]
) -> None:
    made = with_lora(policy)
    learner = learner_of(made)
    asking = {name for name, p in made.named_parameters() if p.requires_grad}
    assert asking == {name for name, _ in made.named_parameters() if name.endswith(("lora_A", "lora_B"))}
    assert len(learner._policy_parameters) == len(asking)
    context = made.encode(made.collate(make_toy(3).reset(range(3), range(3))))
    sample = torch.randn(3, policy.horizon, policy.channels)
    made.velocity(context, sample, torch.tensor([0.9, 0.5, 0.1])).square().sum().backward()
    assert {name for name, p in made.named_parameters() if p.grad is not None and p.grad.any()} == asking


def test_a_group_without_adapters_trains_all_of_itself(policy: Policy) -> None:
    made = with_lora(policy, groups=["vlm"])
    learner_of(made)
    asking = {name for name, p in made.named_parameters() if p.requires_grad}
    assert {name for name in asking if name.startswith("expert.")} == {
        name for name, _ in policy.named_parameters() if name.startswith("expert.")
    }
    assert all(name.endswith(("lora_A", "lora_B")) for name in asking if name.startswith("vlm."))


def test_a_saved_policy_has_the_adapters_merged_in_and_needs_none(
    policy: Policy, make_toy: Callable[..., VecEnv], tmp_path: Path
) -> None:
    world, made = make_toy(3), with_lora(policy)
    save_policy(made, tmp_path / "policy")
    loaded = load_policy(tmp_path / "policy")
    assert not adapted(loaded)
    assert loaded.state_dict().keys() == policy.state_dict().keys()
    for one, other in zip(outputs(made, world), outputs(loaded, world), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    # Nothing but the adapted weights is another.
    changed = {
        name for name, tensor in loaded.state_dict().items() if not torch.equal(tensor, policy.state_dict()[name])
    }
    assert changed == {f"{name}.weight" for name in adapted(made)}


def test_a_checkpoint_goes_on_from_the_bits_it_was_written_with(policy: Policy, tmp_path: Path) -> None:
    made = with_lora(policy, groups=["vlm"])
    with torch.no_grad():
        # The expert is trained whole.
        for parameter in made.parameter_groups()["expert"]:
            parameter += 0.01
    save_policy(made, tmp_path / "policy")
    again = with_lora(policy, drawn=False, groups=["vlm"])
    load_weights(again, tmp_path / "policy" / "model.safetensors")
    for name, tensor in made.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


def test_an_average_of_weights_is_saved_with_its_own_adapters(policy: Policy, tmp_path: Path) -> None:
    made = with_lora(policy)
    average = {name: 0.5 * tensor for name, tensor in made.state_dict().items()}
    save_policy(made, tmp_path / "policy", average)
    name = next(iter(adapted(made)))
    found = load_file(tmp_path / "policy" / "model.safetensors")[f"{name}.weight"]
    expected = average[f"{name}.weight"] + 2 * average[f"{name}.lora_B"] @ average[f"{name}.lora_A"]
    torch.testing.assert_close(found, expected)
    stored = load_file(tmp_path / "policy" / "adapter_model.safetensors")
    assert torch.equal(stored[f"base_model.model.{name}.lora_B.weight"], average[f"{name}.lora_B"])


def test_the_adapter_file_says_what_it_belongs_to(policy: Policy, tmp_path: Path) -> None:
    made = with_lora(policy)
    save_policy(made, tmp_path / "policy")
    config = json.loads((tmp_path / "policy" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"], config["peft_type"]) == (4, 8, 0, "LORA")
    assert config["target_modules"] == sorted(adapted(made))
    assert config["base_model_name_or_path"] == "runs/sft/policy"
    save_policy(policy, tmp_path / "policy")
    # Of adapters that were merged before nothing is left beside a policy without.
    assert not list((tmp_path / "policy").glob("adapter*"))


def test_peft_reads_the_adapters_and_gets_the_same_policy(
    policy: Policy, make_toy: Callable[..., VecEnv], tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed; it is among the development dependencies")
    world, made = make_toy(3), with_lora(policy)
    save_policy(made, tmp_path / "policy")
    expected = outputs(made, world)
    theirs = copy.deepcopy(policy)
    peft.PeftModel.from_pretrained(theirs, str(tmp_path / "policy"))
    for one, other in zip(expected, outputs(theirs, world), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    assert (outputs(policy, world)[1] - expected[1]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"targets": ["q_porj"]}, "lora.targets names q_porj, which no linear layer is called; .* q_proj"),
        ({"targets": ["in_proj_a"]}, "in_proj_a, which must not be adapted"),
        ({"targets": ["q_proj"], "groups": ["expert", "vlm"]}, "no layer of expert would get an adapter"),
        ({"groups": ["action"]}, "lora.groups names action; the parameter groups of this policy are expert, vlm"),
    ],
)
def test_adapters_that_cannot_be_put_on_are_refused(policy: Policy, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        with_lora(policy, **changes)


def test_adapters_on_a_group_that_is_not_trained_are_refused(policy: Policy) -> None:
    with pytest.raises(ValueError, match="lora.groups names vlm, which is not trained; trained: expert"):
        add_lora(policy, LoraConfig(rank=4, groups=("vlm",)), ["expert"])


def test_targets_are_the_ends_of_names(policy: Policy) -> None:
    names = adapted(with_lora(policy, groups=["expert"], targets=["qkv", "action_in.2"]))
    blocks = range(policy.config.expert.num_blocks)
    assert set(names) == {f"expert.blocks.{i}.qkv" for i in blocks} | {"expert.action_in.2"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["lora.rank=-1"], "lora.rank is -1"),
        (["lora.alpha=0", "lora.rank=2"], "lora.alpha is 0"),
        (["lora.groups=[vlm]"], "lora.groups is .'vlm'.; it must be .. with lora.rank=0"),
    ],
)
def test_an_adapter_that_means_nothing_is_refused_before_anything_is_read(words: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        compose("train", ["policy=PATH", *words])


def test_sft_refuses_adapters_on_random_weights() -> None:
    with pytest.raises(ConfigError, match="lora.rank is 4; it must be 0 without start="):
        compose("sft", ["dataset=PATH", "lora.rank=4"])


def test_adapters_of_other_layers_and_damaged_ones_are_refused(policy: Policy, tmp_path: Path) -> None:
    save_policy(with_lora(policy, groups=["vlm"]), tmp_path / "policy")
    path = tmp_path / "policy" / "model.safetensors"
    with pytest.raises(ValueError, match="has adapters on .* layers that have none here"):
        load_weights(with_lora(policy, groups=["expert"]), path)
    with pytest.raises(ValueError, match="missing: expert"):
        load_weights(with_lora(policy), path)
    with pytest.raises(ValueError, match=r"lora_A \(4, .* instead of \(2,"):
        load_weights(with_lora(policy, groups=["vlm"], rank=2), path)
    (tmp_path / "policy" / "adapter_model.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match="adapter_model.safetensors cannot be read"):
        load_weights(with_lora(policy, groups=["vlm"]), path)
    (tmp_path / "policy" / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match="adapter_model.safetensors cannot be read"):
        load_weights(with_lora(policy, groups=["vlm"]), path)


def test_a_shared_layer_is_merged_under_all_of_its_names() -> None:
    layer = nn.Linear(3, 3)
    both = nn.ModuleDict({"one": layer, "two": layer})
    _adapt(layer, Adapter(rank=1, alpha=1.0, base=""))
    assert isinstance(layer, LoraLinear)
    nn.init.ones_(layer.lora_B)
    found = merge(both, both.state_dict())
    assert found.keys() == {"one.weight", "one.bias", "two.weight", "two.bias"}
    assert torch.equal(found["one.weight"], found["two.weight"])


def test_adapters_of_a_half_precision_matrix_keep_single_precision() -> None:
    layer = nn.Linear(4, 4).to(torch.bfloat16)
    whole = nn.ModuleDict({"layer": layer})
    _adapt(layer, Adapter(rank=2, alpha=2.0, base=""))
    assert isinstance(layer, LoraLinear)
    assert layer.lora_A.dtype == layer.lora_B.dtype == torch.float32
    assert layer(torch.ones(4, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert merge(whole, whole.state_dict())["layer.weight"].dtype == torch.bfloat16


def test_sft_trains_adapters_on_a_policy_and_writes_one_without(tmp_path: Path) -> None:
    data, toy = tmp_path / "data", ["suite=toy", "suite.image_size=32"]
    collect.run(compose("collect", [*toy, "workers.kind=local", f"output={data}", "episodes=2"]))
    common = [*toy, f"dataset={data}", "batch_size=4", "steps=2"]
    sft.run(compose("sft", [*common, "policy=qwen_vla_toy", f"output={tmp_path / 'base'}"]))
    base = tmp_path / "base" / "policy"
    sft.run(compose("sft", [*common, f"start={base}", "lora.rank=2", f"output={tmp_path / 'tuned'}"]))
    tuned = tmp_path / "tuned" / "policy"
    one, other = load_policy(base).state_dict(), load_policy(tuned).state_dict()
    stored = load_file(tuned / "adapter_model.safetensors")
    layers = {key.removeprefix("base_model.model.").rsplit(".", 2)[0] for key in stored}
    assert {name for name in one if not torch.equal(one[name], other[name])} <= {f"{name}.weight" for name in layers}
    name = "expert.blocks.0.ffn_out"
    low, high = (stored[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
    assert high.any()
    torch.testing.assert_close(other[f"{name}.weight"], one[f"{name}.weight"] + 16 * high @ low)
