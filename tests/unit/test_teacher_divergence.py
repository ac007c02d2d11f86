"""The distance to a teacher is the divergence of one Gaussian step, and a coefficient keeps it where it should be."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from rlvla_algos.distill import (
    Distance,
    distillation_loss,
    kl_per_velocity,
    steer_coefficient,
    step_distance,
    velocity_gain,
)
from rlvla_algos.flow import flow_sde_schedule, gaussian_kl, transition
from rlvla_algos.ppo import Reduction, Totals, count_entries

M, H, K = 5, 3, 2


def draws(seed: int = 0, rows: int = M) -> tuple[Tensor, Tensor, Tensor]:
    """A noisy chunk and two velocities."""
    g = torch.Generator().manual_seed(seed)
    sample, velocity, other = (torch.randn(rows, H, K, generator=g, dtype=torch.float64) for _ in range(3))
    return sample, velocity, other


def loss(mean: Tensor, teacher_mean: Tensor, **changes: Any) -> Tensor:
    given = {"step": torch.arange(len(mean)) % 4, "schedule": flow_sde_schedule(4, 0.5), "distance": "kl"}
    distances = step_distance(
        mean=mean, teacher_mean=teacher_mean, **{key: changes.pop(key, value) for key, value in given.items()}
    )
    usual = {
        "mask": torch.ones(mean.shape, dtype=torch.bool),
        "weight": torch.ones(len(mean), dtype=mean.dtype),
        "reduction": "sum",
    }
    return distillation_loss(distances=distances, **{**usual, **changes})


def test_the_factor_by_hand() -> None:
    # N = 2, a = 1, so dt = 1/2. At tau = 1/2: s^2 = 1/2, w0 = 1, w1 = 0 - s^2 = -1/2, g = w1/2 - w0/2 = -3/4,
    # g^2 / (2 s^2) = 9/16. At tau = 1: s = 1, w0 = 1/2, g = -1/2, factor 1/8.
    schedule, step = flow_sde_schedule(2, 1.0), torch.tensor([1, 0])
    torch.testing.assert_close(velocity_gain(schedule, step).flatten(), torch.tensor([-0.75, -0.5]))
    torch.testing.assert_close(kl_per_velocity(schedule, step).flatten(), torch.tensor([9 / 16, 1 / 8]))


@given(a=st.floats(0.1, 1.5), num_steps=st.integers(2, 10), seed=st.integers(0, 10))
def test_the_factor_is_the_closed_form_of_the_flow_sde(a: float, num_steps: int, seed: int) -> None:
    schedule, step = flow_sde_schedule(num_steps, a), torch.arange(num_steps)
    tau, dt = schedule.tau, 1 / num_steps
    inside = dt * (1 + a**2 / 2) ** 2 * (1 - tau) / (2 * a**2 * tau)
    expected = torch.where(tau == 1, dt**2 / (2 * a**2), inside)
    torch.testing.assert_close(kl_per_velocity(schedule, step).flatten(), expected, rtol=1e-4, atol=1e-6)


@given(a=st.floats(0.1, 1.5), seed=st.integers(0, 50))
def test_a_difference_of_velocities_times_the_factor_is_the_divergence_of_the_two_steps(a: float, seed: int) -> None:
    schedule, step = flow_sde_schedule(4, a), torch.arange(M) % 4
    sample, velocity, other = draws(seed)
    one, two = transition(sample, velocity, step, schedule), transition(sample, other, step, schedule)
    oracle = kl_divergence(Normal(one.mean, one.std), Normal(two.mean, two.std))
    torch.testing.assert_close(
        kl_per_velocity(schedule, step) * (velocity - other).square(), oracle, rtol=1e-5, atol=1e-8
    )


@pytest.mark.parametrize("reduction", ["sum", "elementwise"])
def test_the_loss_is_the_mean_divergence(reduction: Reduction) -> None:
    schedule, step = flow_sde_schedule(4, 0.5), torch.arange(M) % 4
    sample, velocity, other = draws()
    one, two = transition(sample, velocity, step, schedule), transition(sample, other, step, schedule)
    mask = torch.rand(M, H, K, generator=torch.Generator().manual_seed(1)) < 0.7
    nats = gaussian_kl(one.mean, two.mean, one.std, mask)
    found = loss(one.mean, two.mean, mask=mask, reduction=reduction)
    torch.testing.assert_close(found, nats.mean() if reduction == "sum" else nats.sum() / mask.sum())


def test_the_velocity_distance_is_that_of_the_velocities_at_every_step() -> None:
    schedule = flow_sde_schedule(4, 0.5)
    sample, velocity, other = draws()
    for k in range(4):
        step = torch.full((M,), k)
        means = [transition(sample, v, step, schedule).mean for v in (velocity, other)]
        found = loss(*means, step=step, distance="velocity", reduction="elementwise")
        torch.testing.assert_close(found, (velocity - other).square().mean(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("distance", ["kl", "velocity"])
def test_what_does_not_count_pulls_at_nothing(distance: Distance) -> None:
    mean = torch.randn(M, H, K, requires_grad=True)
    teacher = torch.randn(M, H, K)
    mask = torch.ones(M, H, K, dtype=torch.bool)
    mask[:, 2] = False
    weight = torch.tensor([1.0, 0, 1, 2, 1])
    loss(mean, teacher, mask=mask, weight=weight, distance=distance).backward()
    assert mean.grad is not None
    assert not mean.grad[:, 2].any()
    assert not mean.grad[1].any()
    assert mean.grad[[0, 2, 3, 4], :2].all()
    # Towards the teacher.
    assert bool(((mean - teacher).detach() * mean.grad >= 0).all())


def test_a_weight_of_two_pulls_twice_as_hard() -> None:
    _, velocity, other = draws(rows=1)
    found = [loss(velocity, other, weight=torch.tensor([w]).double()) for w in (1.0, 2.0)]
    torch.testing.assert_close(found[1], 2 * found[0])
    assert found[0] > 0
    assert not loss(velocity, velocity)


@pytest.mark.parametrize("reduction", ["sum", "elementwise", "mean", "sqrt"])
def test_parts_of_a_minibatch_add_up_to_the_whole(reduction: Reduction) -> None:
    _, mean, teacher = draws()
    mask = torch.rand(M, H, K, generator=torch.Generator().manual_seed(1)) < 0.7
    step = torch.arange(M) % 4
    totals = Totals(count_entries(mask, reduction), M)
    whole = loss(mean, teacher, mask=mask, reduction=reduction)
    parts = [
        loss(mean[p], teacher[p], mask=mask[p], step=step[p], reduction=reduction, totals=totals)
        for p in (slice(0, 2), slice(2, M))
    ]
    torch.testing.assert_close(parts[0] + parts[1], whole)


def test_a_distance_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match="distance is 'cosine'; it must be one of kl, velocity"):
        # Unwrapped: the type checker of the tests would refuse it first.
        getattr(step_distance, "__wrapped__", step_distance)(
            mean=torch.zeros(1, H, K),
            teacher_mean=torch.zeros(1, H, K),
            step=torch.zeros(1, dtype=torch.long),
            schedule=flow_sde_schedule(4, 0.5),
            distance="cosine",
        )


def test_the_coefficient_follows_its_target_and_stays_within_reach() -> None:
    assert steer_coefficient(1.0, kl=0.2, target=0.1, start=1.0) == 1.5
    assert steer_coefficient(1.0, kl=0.05, target=0.1, start=1.0) == pytest.approx(1 / 1.5)
    assert steer_coefficient(1.0, kl=0.12, target=0.1, start=1.0) == 1.0
    low = high = 0.3
    for _ in range(100):
        low, high = (steer_coefficient(c, kl, 0.1, start=0.3) for c, kl in ((low, 0.0), (high, 9.0)))
    assert (low, high) == (pytest.approx(0.003), pytest.approx(30))
