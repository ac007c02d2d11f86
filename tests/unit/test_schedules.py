"""Noise schedules: numbers by hand, what each keeps of the flow, and what is refused."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from rlvla_algos.flow import Schedule, check_flow_sde, flow_sde_schedule, transition
from rlvla_algos.schedules import check_cps, cps_schedule, sde_schedule

MU, SIGMA = 1.5, 0.6
"""Of the one-dimensional action distribution whose exact flow is known."""


def final_moments(schedule: Schedule, mu: float, sigma: float, rows: int) -> tuple[Tensor, Tensor]:
    """Mean and deviation after every step, all steps drawn, under the exact velocity of N(mu, sigma^2)."""
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(rows, 1, 1, generator=generator)
    means, deviations = [], []
    for k in range(schedule.num_steps):
        tau = float(schedule.tau[k])
        variance = (1 - tau) ** 2 * sigma**2 + tau**2
        velocity = -mu + (tau - (1 - tau) * sigma**2) / variance * (sample - (1 - tau) * mu)
        gaussian = transition(sample, velocity, torch.full((rows,), k), schedule)
        sample = gaussian.mean + gaussian.std * torch.randn(sample.shape, generator=generator)
        means.append(sample.mean())
        deviations.append(sample.std())
    return torch.stack(means), torch.stack(deviations)


def test_the_schedule_of_the_default_is_the_one_it_was() -> None:
    pairs = zip(sde_schedule(4, 0.5, "flow_grpo"), flow_sde_schedule(4, 0.5), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_a_constant_sigma_by_hand_for_four_steps() -> None:
    # s = 0.5 sqrt(0.25) = 0.25; w1 = tau' - 0.0625 / (2 tau).
    schedule = sde_schedule(4, 0.5, "constant")
    torch.testing.assert_close(schedule.std, torch.full((4,), 0.25))
    torch.testing.assert_close(schedule.w1, torch.tensor([0.71875, 0.458333, 0.1875, -0.125]), atol=1e-5, rtol=0)


def test_a_cosine_sigma_by_hand_for_four_steps() -> None:
    # s = 0.25 sin(pi tau / 2): 0.25, 0.25 x 0.92388, 0.25 x 0.70711, 0.25 x 0.38268.
    schedule = sde_schedule(4, 0.5, "cosine")
    torch.testing.assert_close(schedule.std, torch.tensor([0.25, 0.23097, 0.17678, 0.09567]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", ["flow_grpo", "constant", "cosine"])
def test_every_sigma_keeps_the_marginals(shape: Any) -> None:
    schedule = sde_schedule(200, 0.5, shape)
    check_flow_sde(schedule, 200)
    means, deviations = final_moments(schedule, MU, SIGMA, 20_000)
    expected = torch.tensor([math.hypot((1 - t) * SIGMA, t) for t in schedule.tau_next.tolist()])
    torch.testing.assert_close(means, (1 - schedule.tau_next) * MU, atol=0.03, rtol=0)
    torch.testing.assert_close(deviations, expected, atol=0.03, rtol=0)


def test_cps_by_hand_for_four_steps() -> None:
    # Half a right angle: cos and sin of 45 degrees times tau' = 0.75, 0.5, 0.25, 0.
    schedule = cps_schedule(4, 0.5)
    torch.testing.assert_close(schedule.std, torch.tensor([0.53033, 0.35355, 0.17678, 0.0]), atol=1e-5, rtol=0)
    torch.testing.assert_close(schedule.w1, schedule.std)
    torch.testing.assert_close(schedule.w0, torch.tensor([0.25, 0.5, 0.75, 1.0]))


@pytest.mark.parametrize("shape", ["constant", "cosine"])
def test_few_steps_of_cps_have_as_much_noise_as_the_flow_and_those_of_the_sde_more(shape: Any) -> None:
    # Towards a single action the noise in Y_tau is tau itself, whatever the number of steps.
    schedule = cps_schedule(4, 0.5, shape)
    check_cps(schedule, 4)
    _, deviations = final_moments(schedule, MU, 0.0, 40_000)
    torch.testing.assert_close(deviations, schedule.tau_next, atol=0.01, rtol=0)
    _, deviations = final_moments(flow_sde_schedule(4, 0.5), MU, 0.0, 40_000)
    # w1^2 + s^2 = 0.625^2 + 0.5^2 = 0.64 instead of 0.5625.
    assert float(deviations[0]) == pytest.approx(0.8, abs=0.01)


def test_a_schedule_that_is_not_cps_is_refused() -> None:
    right = cps_schedule(4, 0.5)
    for wrong, said in (
        (flow_sde_schedule(4, 0.5), "is not tau'"),
        (right._replace(tau=right.tau.roll(1)), "starts its steps"),
        (right._replace(std=torch.zeros(4), w1=right.tau_next), "has no noise"),
    ):
        with pytest.raises(ValueError, match=said):
            check_cps(wrong, 4)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: sde_schedule(1, 0.5, "constant"), "num_steps is 1.*at least 2"),
        (lambda: sde_schedule(4, 0.0, "cosine"), "noise_level is 0.0; it must be positive"),
        (lambda: cps_schedule(4, 1.5), r"noise_level is 1.5; it must be in \(0, 1\]"),
    ],
)
def test_a_schedule_without_a_density_is_refused(make: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()
