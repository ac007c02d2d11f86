"""Precision, recomputing, passes, kernels: each leaves the result as it was. On RLVLA_TEST_DEVICE, else on the CPU.

Needs neither Ray nor Hydra nor a simulator, so that scripts/gpu_check.sh can run it where only the policies do.
"""

import copy
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor

from rlvla.config import Attention, ComputeConfig, ConfigError, LoraConfig, Precision
from rlvla.learner import InvariantError, Learner
from rlvla.policies.base import ValueHead, trained_groups
from rlvla.policies.folder import load_policy, save_policy
from rlvla.policies.groups import require_gradients
from rlvla.policies.lora import add_lora
from rlvla.policies.numerics import (
    blocks_to_run,
    choose_attention,
    decoder_blocks,
    narrow_frozen,
    running,
    set_up,
    to_device,
)
from rlvla.rounds import recall
from rlvla.samplers import training_sampler
from rlvla.trials import weights_digest
from rlvla_algos.flow import time_grid

pytestmark = pytest.mark.device
SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(name, module)
    spec.loader.exec_module(module)
    return module


synthetic = script("synthetic")
EPISODES, DECISIONS, BLOCK = 6, 3, 4
SIZE = 32


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def drawn(device: str) -> Any:
    return synthetic.draw_policy(synthetic.policy_config("qwen_vla_toy"), SIZE, device, std=0.2)


@pytest.fixture
def policy(drawn: Any) -> Any:
    return copy.deepcopy(drawn)


class Case:
    """A learner and a rollout that its policy made."""

    def __init__(self, policy: Any, device: str, compute: ComputeConfig | None = None, **algo: Any) -> None:
        self.config = synthetic.algo_config(**{"minibatch_size": 9, "policy_lr": 1e-3, **algo})
        require_gradients(policy, trained_groups(policy, self.config.train_vlm))
        self.compute = compute or ComputeConfig()
        self.notes = set_up(policy, self.compute)
        torch.manual_seed(1)
        self.policy, self.head = policy, ValueHead(policy.value_size).to(device)
        self.sampler = training_sampler(policy, self.config)
        self.learner = Learner(
            policy, self.head, self.config, self.sampler, seed=0, total_iterations=1, compute=self.compute
        )
        self.device = device

    def play(self) -> TensorDict:
        rollout: TensorDict = synthetic.play(
            self.policy,
            self.head,
            self.sampler,
            episodes=EPISODES,
            decisions=DECISIONS,
            block=BLOCK,
            device=self.device,
            store_context=not self.config.train_vlm,
        )
        return rollout


def gradients(case: Case, rollout: TensorDict) -> list[Tensor]:
    """Of the first minibatch, as `Learner.update` computes them."""
    data = rollout[rollout["valid"]]
    (part, *_) = case.learner._minibatches(data, 0, 0)
    for piece in case.learner._passes(part):
        case.learner._descend(piece, None)
    found = [p.grad for p in case.policy.parameters() if p.grad is not None]
    assert max(float(gradient.abs().max()) for gradient in found) > 1e-4, "no gradient would equal any other"
    return found


def largest(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """Relative to the largest entry of each tensor."""
    assert len(ours) == len(theirs) > 0
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-12)) for a, b in zip(ours, theirs, strict=True))


def weights_after(case: Case, rollout: TensorDict) -> list[Tensor]:
    case.learner.update(rollout, 0)
    return [p.detach().clone() for p in case.policy.parameters() if p.requires_grad]


# --- one loop over the denoising steps


def test_what_denoising_steps_share_is_computed_once_and_the_velocity_is_the_same(policy: Any, device: str) -> None:
    batch = policy.collate(synthetic.observe(policy, 3, 0)).to(device)
    passes: list[int] = []
    hook = policy.expert.blocks[0].modulation.register_forward_hook(lambda *_: passes.append(1))
    with torch.no_grad():
        context = policy.encode(batch)
        velocity = policy.denoising(context)
        sample = torch.randn(3, policy.horizon, policy.channels, device=device)
        for step, tau in enumerate(time_grid(policy.num_denoising_steps)[:-1].to(device)):
            at = torch.full((3,), step, device=device)
            prepared = velocity(sample, tau.expand(3), at)
            assert len(passes) == 1
            torch.testing.assert_close(prepared, policy.velocity(context, sample, tau.expand(3), at), atol=1e-5, rtol=0)
            passes.pop()
    hook.remove()
    assert float(prepared.abs().max()) > 1e-2


# --- recomputing


@pytest.mark.parametrize("train_vlm", [False, True])
def test_recomputing_gives_the_same_gradients_and_keeps_less(drawn: Any, device: str, train_vlm: bool) -> None:
    found, kept = [], []
    for recompute in (False, True):
        case = Case(copy.deepcopy(drawn), device, ComputeConfig(recompute=recompute), train_vlm=train_vlm)
        rollout = case.play()
        held = 0

        def note(tensor: Tensor) -> Tensor:
            nonlocal held
            held += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            case.learner.forward(rollout[rollout["valid"]][:9])
        kept.append(held)
        found.append(gradients(case, rollout))
    # The same operations on the same numbers.
    assert largest(found[1], found[0]) == 0 if device == "cpu" else largest(found[1], found[0]) < 1e-5
    assert kept[1] < 0.5 * kept[0]


def test_a_policy_that_recomputes_is_saved_and_copied_like_any_other(policy: Any, device: str, tmp_path: Path) -> None:
    before = weights_digest(policy)
    set_up(policy, ComputeConfig(recompute=True))
    assert weights_digest(policy) == before
    assert weights_digest(copy.deepcopy(policy)) == before
    save_policy(policy, tmp_path / "policy")
    assert weights_digest(load_policy(tmp_path / "policy")) == before


# --- passes


@pytest.mark.parametrize("rows", [1, 2, 4])
@pytest.mark.parametrize("reduction", ["elementwise", "sum"])
def test_passes_of_few_tokens_add_up_to_the_gradient_of_the_minibatch(
    drawn: Any, device: str, rows: int, reduction: str
) -> None:
    from rlvla.config import Reduction

    whole = Case(copy.deepcopy(drawn), device, reduction=Reduction(reduction))
    rollout = whole.play()
    # Rows that count differently, or any way of averaging would pass.
    rollout["mask"][1, :, 2:] = False
    tokens = rows * (recall(rollout[0])["context", "mask"].shape[-1] + whole.policy.horizon)
    cut = Case(copy.deepcopy(drawn), device, ComputeConfig(pass_tokens=tokens + 1), reduction=Reduction(reduction))
    lengths: list[int] = []
    cut.policy.expert.register_forward_pre_hook(lambda _, args: lengths.append(len(args[0])))
    ours, theirs = gradients(cut, rollout), gradients(whole, rollout)
    assert max(lengths) <= rows
    assert sum(lengths) == 9
    assert largest(ours, theirs) < 1e-4


def test_what_is_logged_of_an_update_in_passes_is_what_is_logged_of_one_in_minibatches(drawn: Any, device: str) -> None:
    rows = []
    for tokens in (None, 200):
        case = Case(copy.deepcopy(drawn), device, ComputeConfig(pass_tokens=tokens), epochs=2)
        rows.append(case.learner.update(case.play(), 0))
    assert rows[0].keys() == rows[1].keys()
    for name, value in rows[0].items():
        assert rows[1][name] == pytest.approx(value, rel=1e-3, abs=1e-5), name


def test_a_pass_smaller_than_a_row_is_a_row(drawn: Any, device: str) -> None:
    case = Case(copy.deepcopy(drawn), device, ComputeConfig(pass_tokens=1))
    part = next(iter(case.learner._minibatches((r := case.play())[r["valid"]], 0, 0)))
    assert [len(piece.data) for piece in case.learner._passes(part)] == [1] * 9


# --- bfloat16

BF16 = ComputeConfig(precision=Precision.bf16)


def test_in_bf16_products_are_rounded_and_probabilities_values_and_weights_are_not(drawn: Any, device: str) -> None:
    case = Case(copy.deepcopy(drawn), device, BF16)
    seen: list[torch.dtype] = []
    case.policy.expert.blocks[0].qkv.register_forward_hook(lambda _, __, out: seen.append(out.dtype))
    rollout = case.play()
    new = case.learner.forward(rollout[rollout["valid"]][:4])
    assert set(seen) == {torch.bfloat16}
    assert recall(rollout[0])["context", "tokens"].dtype is torch.bfloat16
    assert {new.log_prob.dtype, new.value.dtype, rollout["log_prob"].dtype} == {torch.float32}
    assert {p.dtype for p in case.policy.parameters() if p.requires_grad} == {torch.float32}
    case.learner.update(rollout, 0)
    moments = case.learner._policy_optimizer.state_dict()["state"][0]
    assert moments["exp_avg"].dtype is torch.float32


def test_in_bf16_every_ratio_of_the_first_step_is_exactly_one(drawn: Any, device: str) -> None:
    case = Case(copy.deepcopy(drawn), device, BF16, epochs=2)
    data = (r := case.play())[r["valid"]]
    # As from a rollout whose kernels round otherwise: the toy's do not.
    data["log_prob"] = data["log_prob"] + 0.01
    data["mean"] = data["mean"] + 0.01
    case.learner._score_again(data, 0)
    for part in case.learner._minibatches(data, 0, 0):
        for piece in case.learner._passes(part):
            new = case.learner.forward(piece.data)
            kl = case.sampler.kl(new.likelihood.parameters, piece.data).detach()
            ratio = (new.log_prob - piece.data["log_prob"]).exp()
            assert bool((ratio == 1).all())
            assert float(kl.abs().max()) == 0


def test_in_bf16_stale_decisions_are_scored_by_the_passes_that_learn_from_them_too(drawn: Any, device: str) -> None:
    case = Case(copy.deepcopy(drawn), device, BF16, epochs=1)
    rollout = case.play()
    rollout["version"] = torch.zeros(rollout["valid"].shape, dtype=torch.int64, device=device)
    forward, ratios = case.learner._descend, []

    def descend(piece: Any, *rest: Any) -> Any:
        if not ratios:
            ratios.append((case.learner.forward(piece.data).log_prob - piece.data["log_prob"]).exp())
        return forward(piece, *rest)

    case.learner._descend = descend  # type: ignore[method-assign]
    # Scored by the proximal pass it would be what that pass rounds to, in blocks of its own.
    proximal = case.learner._add_proximal
    case.learner._add_proximal = lambda data: (proximal(data), data.set("log_prob", data["log_prob"] + 0.01))  # type: ignore[assignment, method-assign, return-value]
    case.learner.update(rollout, 1)
    assert bool((ratios[0] == 1).all())


def test_gradients_in_bf16_point_where_those_in_fp32_do(drawn: Any, device: str) -> None:
    found = []
    for compute in (ComputeConfig(), BF16):
        case = Case(copy.deepcopy(drawn), device, compute)
        assert not case.notes
        found.append(torch.cat([gradient.flatten() for gradient in gradients(case, case.play())]).double())
    cosine = torch.nn.functional.cosine_similarity(found[0], found[1], dim=0)
    assert 0.98 < float(cosine) < 1 - 1e-9


def test_frozen_matrices_in_bf16_change_no_bit_of_what_is_computed(drawn: Any, device: str) -> None:
    wide, narrow = copy.deepcopy(drawn), copy.deepcopy(drawn)
    for policy in (wide, narrow):
        require_gradients(policy, ["expert"])
        policy.precision = Precision.bf16
    done, left = narrow_frozen(narrow)
    assert done > 0
    assert left == 0
    assert sum(p.nbytes for p in narrow.vlm.parameters()) < 0.8 * sum(p.nbytes for p in wide.vlm.parameters())
    batch = wide.collate(synthetic.observe(wide, 3, 0)).to(device)
    with torch.no_grad():
        ours, theirs = narrow.encode(batch), wide.encode(batch)
    assert torch.equal(ours.tokens, theirs.tokens)
    assert torch.equal(ours.pooled, theirs.pooled)


def test_a_frozen_expert_in_bf16_keeps_the_velocity_to_the_bit(drawn: Any, device: str) -> None:
    wide, narrow = copy.deepcopy(drawn), copy.deepcopy(drawn)
    for policy in (wide, narrow):
        policy.requires_grad_(False)
        policy.precision = Precision.bf16
    narrow_frozen(narrow)
    # Its last layer runs outside autocast: rounded, it would be noise in every log-probability.
    assert {p.dtype for p in narrow.expert.action_out.parameters()} == {torch.float32}
    batch = wide.collate(synthetic.observe(wide, 3, 0)).to(device)
    sample, tau = torch.randn(3, wide.horizon, wide.channels).to(device), torch.full((3,), 0.5).to(device)
    with torch.no_grad():
        ours, theirs = (policy.velocity(policy.encode(batch), sample, tau) for policy in (narrow, wide))
    assert float(theirs.abs().max()) > 0
    assert torch.equal(ours, theirs)


def test_a_kernel_of_half_precision_is_refused_with_fp32() -> None:
    for attention in (Attention.flash, Attention.cudnn):
        with pytest.raises(ConfigError, match="compute.attention"):
            ComputeConfig(attention=attention)
        ComputeConfig(attention=attention, precision=Precision.bf16)


def test_weights_that_bf16_would_round_stay_in_fp32(device: str) -> None:
    policy = synthetic.draw_policy(synthetic.policy_config("qwen_vla_toy"), SIZE, device, exact=False)
    require_gradients(policy, ["expert"])
    before = weights_digest(policy)
    notes = set_up(policy, BF16)
    assert "frozen matrices stay in fp32" in notes[0]
    assert weights_digest(policy) == before


def test_the_files_of_a_policy_in_bf16_are_those_of_one_in_fp32(policy: Any, device: str, tmp_path: Path) -> None:
    require_gradients(policy, ["expert"])
    add_lora(policy, LoraConfig(rank=2, groups=("expert",)), ["expert"])
    require_gradients(policy, ["expert"])
    save_policy(policy, tmp_path / "before")
    set_up(policy, BF16)
    assert policy.narrowed
    save_policy(policy, tmp_path / "after")
    for name in ("model.safetensors", "adapter_model.safetensors"):
        assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "after" / name).read_bytes()


@pytest.mark.parametrize("compute", [BF16, ComputeConfig(precision=Precision.bf16, recompute=True, pass_tokens=300)])
def test_an_update_in_bf16_begins_at_one_whatever_the_rollout_computed(
    drawn: Any, device: str, compute: ComputeConfig
) -> None:
    case = Case(copy.deepcopy(drawn), device, compute, minibatch_size=18)
    rollout = case.play()
    # exp(-0.5) = 0.61: clipped at 0.2, were it taken for an old log-probability.
    rollout["log_prob"] += 0.5
    found = case.learner.update(rollout, 0)
    assert found["ppo/ratio_error"] == pytest.approx(1 - 0.6065, abs=0.05)
    assert found["ppo/clip_fraction"] == 0


def test_a_rollout_of_another_policy_is_refused_in_bf16_too(drawn: Any, device: str) -> None:
    case = Case(copy.deepcopy(drawn), device, BF16)
    rollout = case.play()
    rollout["mean"] += 0.2
    with pytest.raises(InvariantError, match=r"mean_tolerance is 0.001 times 100 for bf16"):
        case.learner.update(rollout, 0)


def test_a_block_that_runs_a_policy_in_fp32_leaves_the_precision_alone(policy: Any, device: str) -> None:
    with running(policy):
        assert not torch.is_autocast_enabled(device.split(":")[0])


# --- kernels


@pytest.fixture
def free_choice() -> Iterator[None]:
    yield
    choose_attention(Attention.auto)


@pytest.mark.usefixtures("free_choice")
def test_the_choice_of_an_attention_kernel_changes_nothing_but_rounding(policy: Any, device: str) -> None:
    batch = policy.collate(synthetic.observe(policy, 3, 0)).to(device)
    found = []
    for kernel in (Attention.auto, Attention.math):
        set_up(policy, ComputeConfig(attention=kernel))
        with torch.no_grad():
            context = policy.encode(batch)
            sample = torch.ones(3, policy.horizon, policy.channels, device=device)
            found.append(policy.velocity(context, sample, torch.full((3,), 0.5, device=device)))
    assert not torch.backends.cuda.flash_sdp_enabled()
    torch.testing.assert_close(found[0], found[1], atol=1e-4, rtol=0)


def test_compiling_covers_the_expert_and_leaves_names_alone(policy: Any) -> None:
    names = list(policy.state_dict())
    assert decoder_blocks(policy) == list(policy.expert.blocks)
    assert len(blocks_to_run(policy)) == len(policy.sharding_units())
    set_up(policy, ComputeConfig(compile=True))
    assert list(policy.state_dict()) == names
    assert all(block._compiled_call_impl is not None for block in policy.expert.blocks)


@pytest.mark.slow
def test_a_compiled_expert_gives_the_same_update(drawn: Any, device: str) -> None:
    found = []
    for compile in (False, True):
        case = Case(copy.deepcopy(drawn), device, ComputeConfig(compile=compile))
        found.append(gradients(case, case.play()))
    assert largest(found[1], found[0]) < 1e-3


def test_a_batch_arrives_as_it_left(policy: Any, device: str) -> None:
    batch = policy.collate(synthetic.observe(policy, 3, 0))
    moved = to_device(batch, device)
    assert moved["images"].device.type == torch.device(device).type
    for name, tensor in batch.items():
        assert torch.equal(moved[name].cpu(), tensor)


# --- configuration


def test_a_budget_without_tokens_is_refused() -> None:
    with pytest.raises(ConfigError, match="compute.pass_tokens is 0"):
        ComputeConfig(pass_tokens=0)
