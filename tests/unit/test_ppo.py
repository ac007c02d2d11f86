"""The clipped objective: what a ratio is of, what counts, where gradients stop."""

import inspect
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rlvla_algos.ppo import (
    PPOLoss,
    Totals,
    chunk_log_ratio,
    count_entries,
    explained_variance,
    normalize_advantage,
    ppo_loss,
)

REDUCTIONS = ["elementwise", "sum", "mean", "sqrt"]


def loss_of(ratio: list[list[list[float]]] | Tensor, advantage: list[float], **changes: Any) -> PPOLoss:
    """The loss of chunks with these ratios [M H K]; values 0 and no value error unless told otherwise."""
    log_prob = torch.as_tensor(ratio).log()
    zero = torch.zeros(len(log_prob))
    arguments: dict[str, Any] = {
        "log_prob": log_prob,
        "old_log_prob": torch.zeros_like(log_prob),
        "mask": torch.ones(log_prob.shape, dtype=torch.bool),
        "advantage": torch.tensor(advantage),
        "value": zero,
        "old_value": zero,
        "value_target": zero,
        "reduction": "elementwise",
        "clip_epsilon": 0.2,
        "value_clip": None,
        "value_coef": 1.0,
    }
    return ppo_loss(**{**arguments, **changes})


def random_batch(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    log_prob, old_log_prob = 0.3 * torch.randn(2, 6, 3, 2, generator=generator)
    advantage, value, old_value, value_target = torch.randn(4, 6, generator=generator)
    return {
        "log_prob": log_prob,
        "old_log_prob": old_log_prob,
        "mask": torch.rand(6, 3, 2, generator=generator) < 0.7,
        "advantage": advantage,
        "value": value,
        "old_value": old_value,
        "value_target": value_target,
    }


def naive_surrogate(batch: dict[str, Tensor], reduction: str, epsilon: float) -> float:
    """PPO-clip in plain loops: every ratio that counts, one by one."""
    terms = []
    for m in range(len(batch["advantage"])):
        a = float(batch["advantage"][m])
        logs = [
            float(batch["log_prob"][m, h, k] - batch["old_log_prob"][m, h, k])
            for h in range(3)
            for k in range(2)
            if batch["mask"][m, h, k]
        ]
        if not logs:
            continue
        n = len(logs)
        ratios = {
            "elementwise": [math.exp(x) for x in logs],
            "sum": [math.exp(sum(logs))],
            "mean": [math.exp(sum(logs) / n)],
            "sqrt": [math.exp(sum(logs) / math.sqrt(n))],
        }[reduction]
        terms += [min(r * a, max(1 - epsilon, min(1 + epsilon, r)) * a) for r in ratios]
    return -sum(terms) / len(terms)


@pytest.mark.parametrize(
    ("reduction", "expected"),
    [
        # Log-ratios 0.1, 0.2, 0.6 and 0.3; the fourth is masked, so n = 3 and the sum is 0.9.
        ("elementwise", [0.1, 0.2, 0.6, 0.0]),
        ("sum", [0.9]),
        ("mean", [0.3]),
        ("sqrt", [0.9 / math.sqrt(3)]),
    ],
)
def test_the_four_reductions_by_hand(reduction: Any, expected: list[float]) -> None:
    new, old = torch.tensor([[[1.1, 1.2], [1.6, 5.3]]]), torch.tensor([[[1.0, 1.0], [1.0, 5.0]]])
    mask = torch.tensor([[[True, True], [True, False]]])
    log_ratio, counts = chunk_log_ratio(new, old, mask, reduction)
    assert log_ratio.flatten().tolist() == pytest.approx(expected, abs=1e-6)
    assert counts.flatten().tolist() == (mask.flatten().tolist() if reduction == "elementwise" else [True])


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_the_ratio_is_one_for_an_unchanged_policy(reduction: Any) -> None:
    batch = random_batch(0)
    batch["old_log_prob"] = batch["log_prob"].clone()
    loss = ppo_loss(**batch, reduction=reduction, clip_epsilon=0.2, value_clip=None, value_coef=0.0)
    assert loss.ratio_error.item() == 0
    assert loss.clip_fraction.item() == 0
    if reduction != "elementwise":
        assert loss.policy.item() == pytest.approx(-batch["advantage"].mean().item(), abs=1e-6)


def test_112_shifted_entries_leave_the_clip_as_the_design_says() -> None:
    # z ~ N(0, 1), every mean 0.05 s away: a log-ratio is 0.05 z - 0.00125, the sum of 112 has deviation
    # 0.05 sqrt(112) = 0.53 about -0.14, and P(0.8 < exp(N(-0.14, 0.53)) < 1.2) = 29%.
    z = torch.randn(4000, 16, 7, generator=torch.Generator().manual_seed(0))
    log_ratio = 0.05 * z - 0.05**2 / 2
    ratio = log_ratio.exp()
    ones = [1.0] * 4000
    assert loss_of(ratio, ones, reduction="sum").clip_fraction.item() == pytest.approx(0.71, abs=0.03)
    assert loss_of(ratio, ones, reduction="mean").clip_fraction.item() == 0


@pytest.mark.parametrize(
    ("ratio", "advantage", "surrogate", "moves"),
    [
        # epsilon 0.2. Outside the region in the direction the advantage asks for: clipped, no gradient.
        (1.5, 2.0, 1.2 * 2.0, False),
        (0.5, -2.0, 0.8 * -2.0, False),
        # Outside in the other direction: not clipped, the gradient leads back.
        (0.5, 2.0, 0.5 * 2.0, True),
        (1.5, -2.0, 1.5 * -2.0, True),
        # Inside.
        (1.1, 2.0, 1.1 * 2.0, True),
    ],
)
def test_the_clipped_surrogate_by_hand(ratio: float, advantage: float, surrogate: float, moves: bool) -> None:
    log_prob = torch.tensor([[[math.log(ratio)]]], requires_grad=True)
    loss = loss_of([[[1.0]]], [advantage], log_prob=log_prob)
    assert loss.policy.item() == pytest.approx(-surrogate)
    (gradient,) = torch.autograd.grad(loss.total, log_prob)
    assert gradient.item() == pytest.approx(-ratio * advantage if moves else 0.0)


def test_clip_fraction_and_ratio_error_by_hand() -> None:
    # |ratio - 1| = 0.1, 0.3, 0.5 and, masked, 9: two of three are outside 0.2, the largest is 0.5.
    mask = torch.tensor([[[True], [True], [True], [False]]])
    loss = loss_of([[[1.1], [0.7], [1.5], [10.0]]], [1.0], mask=mask)
    assert loss.clip_fraction.item() == pytest.approx(2 / 3)
    assert loss.ratio_error.item() == pytest.approx(0.5)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_masked_entries_neither_count_nor_get_a_gradient(reduction: Any) -> None:
    batch = random_batch(1)
    batch["mask"][2] = False  # a row of which nothing was executed
    options: dict[str, Any] = {"reduction": reduction, "clip_epsilon": 0.2, "value_clip": None, "value_coef": 0.0}
    batch["log_prob"].requires_grad_()
    loss = ppo_loss(**batch, **options)
    (gradient,) = torch.autograd.grad(loss.total, batch["log_prob"])
    assert bool((gradient[~batch["mask"]] == 0).all())
    assert bool((gradient[batch["mask"]] != 0).any())

    noisy = {**batch, "log_prob": torch.where(batch["mask"], batch["log_prob"].detach(), 30.0)}
    torch.testing.assert_close(ppo_loss(**noisy, **options)[:], tuple(x.detach() for x in loss))


def test_a_batch_without_a_valid_entry_has_no_policy_loss() -> None:
    loss = loss_of([[[2.0]]], [1.0], mask=torch.tensor([[[False]]]))
    assert loss.policy.item() == 0
    assert loss.ratio_error.item() == 0


@pytest.mark.parametrize("reduction", REDUCTIONS)
@given(seed=st.integers(0, 10_000), epsilon=st.floats(0.05, 0.5))
def test_the_surrogate_equals_plain_loops(reduction: Any, seed: int, epsilon: float) -> None:
    batch = random_batch(seed)
    batch["mask"][0] = False  # a row of which nothing was executed is no decision
    loss = ppo_loss(**batch, reduction=reduction, clip_epsilon=epsilon, value_clip=None, value_coef=1.0)
    assert loss.policy.item() == pytest.approx(naive_surrogate(batch, reduction, epsilon), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_elementwise_equals_torchrls_clipped_loss(seed: int) -> None:
    from tensordict import TensorDict
    from tensordict.nn import ProbabilisticTensorDictModule, ProbabilisticTensorDictSequential, TensorDictModule
    from torch.distributions import Independent, Normal
    from torchrl.objectives import ClipPPOLoss

    # One decision a row, one entry a chunk: TorchRL's ratio of a Normal of known mean is our elementwise one.
    generator = torch.Generator().manual_seed(seed)
    mean, old_mean, action, advantage = torch.randn(4, 20, 1, generator=generator)
    log_prob, old_log_prob = Normal(mean, 1.0).log_prob(action), Normal(old_mean, 1.0).log_prob(action)
    actor = ProbabilisticTensorDictSequential(
        TensorDictModule(lambda x: (x, torch.ones_like(x)), in_keys=["observation"], out_keys=["loc", "scale"]),
        ProbabilisticTensorDictModule(
            in_keys=["loc", "scale"],
            out_keys=["action"],
            distribution_class=lambda loc, scale: Independent(Normal(loc, scale), 1),
        ),
    )
    module = ClipPPOLoss(actor, None, clip_epsilon=0.2, entropy_bonus=False, critic_coeff=None)
    data = {"observation": mean, "action": action, "action_log_prob": old_log_prob[:, 0], "advantage": advantage}
    expected = module(TensorDict(data, batch_size=[20]))["loss_objective"]

    loss = loss_of(
        torch.ones(20, 1, 1),
        advantage[:, 0].tolist(),
        log_prob=log_prob[..., None],
        old_log_prob=old_log_prob[..., None],
    )
    torch.testing.assert_close(loss.policy, expected.detach())


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        # old 0, target 1, clip 0.2. Moving to 0.5 may count as 0.2 only: 1/2 max(0.25, 0.64) = 0.32.
        (0.5, 0.32),
        # Within the clip nothing changes: 1/2 (1 - 0.1)^2 = 0.405.
        (0.1, 0.405),
        # Away from the target the plain error is the larger one: 1/2 (1 + 0.5)^2 = 1.125.
        (-0.5, 1.125),
    ],
)
def test_the_clipped_value_error_by_hand(value: float, expected: float) -> None:
    target = torch.tensor([1.0])
    loss = loss_of([[[1.0]]], [0.0], value=torch.tensor([value]), value_target=target, value_clip=0.2)
    assert loss.value.item() == pytest.approx(expected)
    free = loss_of([[[1.0]]], [0.0], value=torch.tensor([value]), value_target=target)
    assert free.value.item() == pytest.approx(0.5 * (value - 1) ** 2)


def test_a_value_past_its_clip_gets_no_gradient_towards_the_target() -> None:
    value = torch.tensor([0.5, -0.5], requires_grad=True)
    # Both move by more than 0.2 from 0; the second away from its target 1, so its gradient leads back.
    loss = loss_of(
        [[[1.0]], [[1.0]]],
        [0.0, 0.0],
        value=value,
        old_value=torch.zeros(2),
        value_target=torch.ones(2),
        value_clip=0.2,
    )
    (gradient,) = torch.autograd.grad(loss.total, value)
    # d/dv 1/2 mean (v - 1)^2 = (v - 1) / 2 = -0.75 for the second.
    assert gradient.tolist() == pytest.approx([0.0, -0.75])


def test_the_total_is_policy_plus_weighted_value_and_alone_carries_a_gradient() -> None:
    log_prob = torch.zeros(2, 1, 1, requires_grad=True)
    loss = loss_of(
        [[[1.0]], [[1.0]]], [1.0, 3.0], log_prob=log_prob, value_target=torch.tensor([2.0, 0.0]), value_coef=0.25
    )
    # policy -(1 + 3)/2 = -2, value 1/2 (4 + 0)/2 = 1, total -2 + 0.25.
    assert loss.total.item() == pytest.approx(-1.75)
    assert loss.total.requires_grad
    assert not any(part.requires_grad for part in loss[1:])


def test_an_unknown_reduction_is_refused_with_the_choices() -> None:
    unchecked: Any = inspect.unwrap(chunk_log_ratio)  # as in production, without the types checked
    entries = torch.zeros(1, 1, 1)
    with pytest.raises(ValueError, match="reduction is 'median'; it must be one of elementwise, sum, mean, sqrt"):
        unchecked(entries, entries, entries.bool(), "median")


def test_normalisation_by_hand_over_the_valid_decisions_only() -> None:
    # Valid 1, 3, 5: mean 3, deviation sqrt(8/3) = 1.633.
    normalised = normalize_advantage(
        torch.tensor([[1.0, 3.0], [100.0, 5.0]]), torch.tensor([[True, True], [False, True]])
    )
    torch.testing.assert_close(normalised, torch.tensor([[-1.2247, 0.0], [0.0, 1.2247]]), atol=1e-4, rtol=0)


@given(seed=st.integers(0, 1000), garbage=st.floats(-1e6, 1e6))
def test_normalised_valid_advantages_have_mean_zero_and_variance_one(seed: int, garbage: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    valid = torch.rand(5, 7, generator=generator) < 0.6
    advantage = torch.where(valid, 3 + 2 * torch.randn(5, 7, generator=generator), garbage)
    chosen = normalize_advantage(advantage, valid)[valid]
    assert chosen.mean().item() == pytest.approx(0, abs=1e-5)
    assert chosen.var(correction=0).item() == pytest.approx(1, rel=1e-3)


def test_equal_advantages_normalise_to_zero() -> None:
    normalised = normalize_advantage(torch.full((3,), 0.7), torch.ones(3, dtype=torch.bool))
    torch.testing.assert_close(normalised, torch.zeros(3), atol=1e-6, rtol=0)


def test_explained_variance_by_hand() -> None:
    target = torch.tensor([0.0, 1.0, 2.0, 3.0])
    assert explained_variance(target, target) == pytest.approx(1.0)
    assert explained_variance(torch.full((4,), 9.0), target) == pytest.approx(0.0)
    # Residuals 0, 0.5, 1, 1.5: Var = 0.3125 against 1.25.
    assert explained_variance(target / 2, target) == pytest.approx(0.75)
    assert explained_variance(-target, target) == pytest.approx(-3.0)


def test_explained_variance_of_a_constant_target_is_not_a_number() -> None:
    assert math.isnan(explained_variance(torch.tensor([0.0, 1.0]), torch.ones(2)))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_the_losses_of_uneven_parts_add_up_to_that_of_the_whole(reduction: str) -> None:
    batch = random_batch(3)
    batch["mask"][5] = False
    settings: dict[str, Any] = {"reduction": reduction, "clip_epsilon": 0.2, "value_clip": 0.2, "value_coef": 0.7}
    whole = ppo_loss(**batch, **settings)
    totals = Totals(count_entries(batch["mask"], reduction), 6)  # type: ignore[arg-type]
    parts = [
        ppo_loss(**{name: tensor[rows] for name, tensor in batch.items()}, **settings, totals=totals)
        for rows in (slice(0, 1), slice(1, 5), slice(5, 6))
    ]
    for name in ("total", "policy", "value", "clip_fraction"):
        torch.testing.assert_close(sum(getattr(part, name) for part in parts), getattr(whole, name))
