"""The flow as a Markov chain: its schedules, what the SDE keeps, its densities, and the sampler above them."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from rlvla_algos.flow import (
    Schedule,
    denoise,
    flow_sde_schedule,
    gaussian_kl,
    ode_schedule,
    time_grid,
    transition,
)
from rlvla_algos.ppo import chunk_log_ratio

MU, SIGMA = 1.5, 0.6
"""Of the one-dimensional action distribution whose exact flow is known."""


def wavy_velocity(sample: Tensor, tau: Tensor, step: Tensor) -> Tensor:
    """Nonlinear, and different in every row, entry and flow time."""
    entry = torch.arange(sample[0].numel(), dtype=sample.dtype).reshape(sample[0].shape)
    return torch.sin(2 * sample + entry) + tau[:, None, None] * sample - 0.1 * step[:, None, None]


def gaussian_velocity(sample: Tensor, tau: float) -> Tensor:
    """E[Y_1 - Y_0 | Y_tau] when Y_0 ~ N(MU, SIGMA^2): the velocity a perfect policy would have.

    Cov(Y_1 - Y_0, Y_tau) = tau - (1 - tau) SIGMA^2, and the regression on Y_tau does the rest.
    """
    mean, variance = marginal(tau)
    return -MU + (tau - (1 - tau) * SIGMA**2) / variance * (sample - mean)


def marginal(tau: float) -> tuple[float, float]:
    """Mean and variance of Y_tau = (1 - tau) Y_0 + tau Y_1."""
    return (1 - tau) * MU, (1 - tau) ** 2 * SIGMA**2 + tau**2


def marginal_errors(schedule: Schedule, num_samples: int) -> tuple[float, float]:
    """Largest error of mean and of variance over the grid when every step is drawn from the schedule."""
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(num_samples, 1, 1, generator=generator)
    worst_mean = worst_variance = 0.0
    for k in range(schedule.num_steps):
        step = torch.full((num_samples,), k)
        gaussian = transition(sample, gaussian_velocity(sample, float(schedule.tau[k])), step, schedule)
        sample = gaussian.mean + gaussian.std * torch.randn(sample.shape, generator=generator)
        mean, variance = marginal(float(schedule.tau_next[k]))
        worst_mean = max(worst_mean, abs(float(sample.mean()) - mean))
        worst_variance = max(worst_variance, abs(float(sample.var()) - variance))
    return worst_mean, worst_variance


def exact_variance_error(schedule: Schedule) -> float:
    """The same for the variance at tau = 0, without sampling: every step is linear in the sample.

    The image of 0 and of 1 gives the slope b of a step's mean, and Var' = b^2 Var + s^2.
    """
    variance = 1.0
    for k in range(schedule.num_steps):
        points = torch.tensor([0.0, 1.0])[:, None, None]
        velocity = gaussian_velocity(points, float(schedule.tau[k]))
        mean = transition(points, velocity, torch.tensor([k, k]), schedule).mean
        variance = float(mean[1] - mean[0]) ** 2 * variance + float(schedule.std[k]) ** 2
    return abs(variance - SIGMA**2)


def in_float64(schedule: Schedule) -> Schedule:
    return Schedule(*(column.double() for column in schedule))


def test_the_time_grid_runs_from_noise_to_action_in_equal_steps() -> None:
    torch.testing.assert_close(time_grid(4), torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0]))
    torch.testing.assert_close(time_grid(1), torch.tensor([1.0, 0.0]))


@given(num_steps=st.integers(1, 50))
def test_every_schedule_uses_the_one_time_grid(num_steps: int) -> None:
    grid = time_grid(num_steps)
    schedules = [ode_schedule(num_steps)]
    if num_steps >= 2:
        schedules.append(flow_sde_schedule(num_steps, 0.5))
    for schedule in schedules:
        assert schedule.num_steps == num_steps
        assert torch.equal(schedule.tau, grid[:-1])
        assert torch.equal(schedule.tau_next, grid[1:])


def test_an_ode_step_is_eulers_step() -> None:
    # Y = 2, v = 3, tau = 0.75, dt = 0.25: Y - dt v = 1.25.
    sample, velocity = torch.full((1, 1, 1), 2.0), torch.full((1, 1, 1), 3.0)
    gaussian = transition(sample, velocity, torch.tensor([1]), ode_schedule(4))
    assert gaussian.mean.item() == pytest.approx(1.25)
    assert gaussian.std.item() == 0


@given(num_steps=st.integers(1, 12), seed=st.integers(0, 100))
def test_the_ode_schedule_is_euler_at_every_step(num_steps: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    sample, velocity = torch.randn(2, num_steps, 3, 2, generator=generator)
    gaussian = transition(sample, velocity, torch.arange(num_steps), ode_schedule(num_steps))
    torch.testing.assert_close(gaussian.mean, sample - velocity / num_steps)


def test_the_flow_sde_by_hand_for_four_steps() -> None:
    schedule = flow_sde_schedule(4, 0.5)
    # sigma^2 = a^2 tau / (1 - tau), at tau = 1 with 1 - 0.75 below the line; dt = 0.25.
    #   tau   sigma^2        s = sqrt(sigma^2 dt)   w1 = tau' - sigma^2 dt / (2 tau)
    #   1.00  0.25/0.25 = 1        0.5              0.75 - 0.25 / 2       =  0.625
    #   0.75  0.1875/0.25 = 0.75   0.4330           0.50 - 0.1875 / 1.5   =  0.375
    #   0.50  0.125/0.5 = 0.25     0.25             0.25 - 0.0625 / 1     =  0.1875
    #   0.25  0.0625/0.75 = 0.0833 0.1443           0.00 - 0.0208 / 0.5   = -0.0417
    torch.testing.assert_close(schedule.std, torch.tensor([0.5, 0.4330, 0.25, 0.1443]), atol=1e-4, rtol=0)
    torch.testing.assert_close(schedule.w1, torch.tensor([0.625, 0.375, 0.1875, -0.0417]), atol=1e-4, rtol=0)
    torch.testing.assert_close(schedule.w0, torch.tensor([0.25, 0.5, 0.75, 1.0]))


@given(num_steps=st.integers(2, 100), noise_level=st.floats(0.01, 2.0))
def test_the_first_sde_step_has_the_noise_level_itself_for_any_number_of_steps(
    num_steps: int, noise_level: float
) -> None:
    std = flow_sde_schedule(num_steps, noise_level).std
    assert std[0].item() == pytest.approx(noise_level, rel=1e-3)
    assert bool((std > 0).all())


def test_the_flow_sde_keeps_the_marginals_at_every_grid_time() -> None:
    # 40 000 samples know a mean of deviation 1 to 0.005 and its variance to 0.007 (one standard error).
    mean_error, variance_error = marginal_errors(flow_sde_schedule(200, 0.5), 40_000)
    assert mean_error < 0.025
    assert variance_error < 0.05


def test_without_the_drift_correction_the_marginals_are_lost() -> None:
    schedule = flow_sde_schedule(200, 0.5)
    _, variance_error = marginal_errors(schedule._replace(w1=schedule.tau_next), 4_000)
    assert variance_error > 0.5


@pytest.mark.parametrize("noise_level", [0.3, 0.5, 0.7])
def test_the_action_has_its_exact_variance_for_any_noise_level(noise_level: float) -> None:
    schedule = flow_sde_schedule(200, noise_level)
    assert exact_variance_error(schedule) < 0.005
    assert exact_variance_error(schedule._replace(w1=schedule.tau_next)) > 0.2


def test_log_prob_by_hand() -> None:
    # s = 0.25 at step 2, one s from the mean: -1/2 - ln 0.25 - ln sqrt(2 pi) = -0.5 + 1.3863 - 0.9189.
    gaussian = transition(torch.zeros(1, 1, 1), torch.zeros(1, 1, 1), torch.tensor([2]), flow_sde_schedule(4, 0.5))
    assert gaussian.log_prob(torch.full((1, 1, 1), 0.25)).item() == pytest.approx(-0.0326, abs=1e-4)


def test_log_prob_equals_that_of_torch_distributions() -> None:
    sample, velocity, following = torch.randn(3, 4, 3, 2, generator=torch.Generator().manual_seed(1))
    gaussian = transition(sample, velocity, torch.tensor([0, 1, 2, 3]), flow_sde_schedule(4, 0.5))
    torch.testing.assert_close(gaussian.log_prob(following), Normal(gaussian.mean, gaussian.std).log_prob(following))


def test_rows_at_different_steps_get_their_own_gaussian() -> None:
    schedule = flow_sde_schedule(5, 0.7)
    sample, velocity = torch.randn(2, 5, 3, 2, generator=torch.Generator().manual_seed(2))
    together = transition(sample, velocity, torch.tensor([3, 0, 4, 1, 3]), schedule)
    for row, k in enumerate([3, 0, 4, 1, 3]):
        alone = transition(sample[[row]], velocity[[row]], torch.tensor([k]), schedule)
        torch.testing.assert_close(together.mean[[row]], alone.mean)
        torch.testing.assert_close(together.std[[row]], alone.std)


@pytest.mark.parametrize("reduction", ["elementwise", "sum", "mean", "sqrt"])
def test_the_gradient_of_the_ratio_agrees_with_finite_differences(reduction: Any) -> None:
    generator = torch.Generator().manual_seed(3)
    sample, velocity, following, old = torch.randn(4, 4, 3, 2, generator=generator, dtype=torch.float64)
    mask = torch.rand(4, 3, 2, generator=generator) < 0.7
    schedule, step = in_float64(flow_sde_schedule(4, 0.5)), torch.tensor([0, 1, 2, 3])
    old_log_prob = transition(sample, old, step, schedule).log_prob(following)

    def log_ratio(v: Tensor) -> Tensor:
        log_prob = transition(sample, v, step, schedule).log_prob(following)
        return chunk_log_ratio(log_prob, old_log_prob, mask, reduction)[0]

    velocity.requires_grad_()
    assert torch.autograd.gradcheck(log_ratio, velocity)
    assert torch.autograd.gradcheck(lambda v: (0.01 * log_ratio(v)).exp(), velocity)


def test_the_kl_of_two_transitions_by_hand() -> None:
    # Means 0.1 apart at s = 0.5 in two entries that count: 2 x 0.01 / (2 x 0.25) = 0.04 nats.
    mask = torch.tensor([[[True, True, False]]])
    kl = gaussian_kl(torch.full((1, 1, 3), 0.1), torch.zeros(1, 1, 3), torch.full((1, 1, 1), 0.5), mask)
    assert kl.item() == pytest.approx(0.04)


def test_the_kl_equals_that_of_torch_distributions_over_valid_entries() -> None:
    generator = torch.Generator().manual_seed(4)
    mean, old = torch.randn(2, 5, 3, 2, generator=generator)
    std = torch.rand(5, 1, 1, generator=generator) + 0.1
    mask = torch.rand(5, 3, 2, generator=generator) < 0.5
    expected = (kl_divergence(Normal(old, std), Normal(mean, std)) * mask).sum(dim=(1, 2))
    torch.testing.assert_close(gaussian_kl(mean, old, std, mask), expected)


def test_denoising_without_a_stochastic_step_is_the_euler_loop() -> None:
    noise = torch.randn(3, 2, 2, generator=torch.Generator().manual_seed(5))
    sample = noise
    for k, tau in enumerate([1.0, 0.75, 0.5, 0.25]):
        sample = sample - 0.25 * wavy_velocity(sample, torch.full((3,), tau), torch.full((3,), k))
    for schedule in (ode_schedule(4), flow_sde_schedule(4, 0.5)):
        denoised = denoise(wavy_velocity, noise, schedule=schedule)
        torch.testing.assert_close(denoised.action, sample)


@pytest.mark.parametrize("num_steps", [1, 2, 7])
def test_a_flow_to_one_point_arrives_there(num_steps: int) -> None:
    target = torch.tensor([[[0.3, -2.0], [5.0, 0.0]]])
    noise = torch.randn(4, 2, 2, generator=torch.Generator().manual_seed(6))
    # Y_tau = (1 - tau) target + tau Y_1 has velocity (Y_tau - target) / tau everywhere.
    denoised = denoise(lambda y, tau, _: (y - target) / tau[:, None, None], noise, schedule=ode_schedule(num_steps))
    torch.testing.assert_close(denoised.action, target.expand(4, 2, 2), atol=1e-5, rtol=0)


def test_only_the_chosen_step_of_each_row_is_stochastic() -> None:
    schedule, chosen = flow_sde_schedule(4, 0.5), torch.tensor([0, 2, 3])
    generator = torch.Generator().manual_seed(7)
    noise, step_noise = torch.randn(2, 3, 2, 2, generator=generator)
    denoised = denoise(wavy_velocity, noise, schedule=schedule, stochastic_step=chosen, step_noise=step_noise)

    for row in range(3):
        sample, std = noise[[row]], schedule.std[chosen[row]]
        for k in range(4):
            velocity = wavy_velocity(sample, schedule.tau[[k]], torch.tensor([k]))
            if k == chosen[row]:
                torch.testing.assert_close(denoised.before[[row]], sample)
                sample = transition(sample, velocity, torch.tensor([k]), schedule).mean + std * step_noise[[row]]
                torch.testing.assert_close(denoised.after[[row]], sample)
            else:
                sample = sample - 0.25 * velocity
        torch.testing.assert_close(denoised.action[[row]], sample)


def test_the_stored_transition_is_reproduced_from_what_was_stored() -> None:
    schedule, chosen = flow_sde_schedule(4, 0.5), torch.tensor([0, 1, 2, 3])
    noise, step_noise = torch.randn(2, 4, 3, 2, generator=torch.Generator().manual_seed(8))
    denoised = denoise(wavy_velocity, noise, schedule=schedule, stochastic_step=chosen, step_noise=step_noise)

    velocity = wavy_velocity(denoised.before, schedule.at(chosen).tau, chosen)
    gaussian = transition(denoised.before, velocity, chosen, schedule)
    assert torch.equal(gaussian.mean, denoised.mean)
    assert torch.equal(gaussian.log_prob(denoised.after), denoised.log_prob)
    torch.testing.assert_close((denoised.after - denoised.mean) / gaussian.std, step_noise)


def test_a_rows_noise_changes_no_other_row() -> None:
    schedule, chosen = flow_sde_schedule(4, 0.5), torch.tensor([1, 1])
    noise, step_noise = torch.randn(2, 2, 3, 2, generator=torch.Generator().manual_seed(9))
    first = denoise(wavy_velocity, noise, schedule=schedule, stochastic_step=chosen, step_noise=step_noise)
    step_noise[0] += 1
    second = denoise(wavy_velocity, noise, schedule=schedule, stochastic_step=chosen, step_noise=step_noise)
    assert not torch.equal(first.action[0], second.action[0])
    for before, after in zip(first, second, strict=True):
        assert torch.equal(before[1], after[1])


def test_the_sampled_step_has_the_schedules_spread() -> None:
    # Where the velocity is 0 the sample moves by the draw alone, so the actions' deviation is s = 0.433.
    noise, step_noise = torch.randn(2, 20_000, 1, 1, generator=torch.Generator().manual_seed(10))
    denoised = denoise(
        lambda y, *_: torch.zeros_like(y),
        torch.zeros_like(noise),
        schedule=flow_sde_schedule(4, 0.5),
        stochastic_step=torch.ones(20_000, dtype=torch.long),
        step_noise=step_noise,
    )
    assert denoised.action.std().item() == pytest.approx(math.sqrt(0.1875), rel=0.03)


@pytest.mark.parametrize("num_steps", [0, -1])
def test_a_flow_without_steps_is_refused(num_steps: int) -> None:
    with pytest.raises(ValueError, match=f"num_steps is {num_steps}.*at least one"):
        time_grid(num_steps)


def test_the_sde_refuses_a_single_step() -> None:
    with pytest.raises(ValueError, match="num_steps is 1; the flow SDE needs at least 2"):
        flow_sde_schedule(1, 0.5)


@pytest.mark.parametrize("noise_level", [0.0, -0.5])
def test_the_sde_refuses_a_noise_level_without_a_density(noise_level: float) -> None:
    with pytest.raises(ValueError, match=f"noise_level is {noise_level}; it must be positive"):
        flow_sde_schedule(4, noise_level)
