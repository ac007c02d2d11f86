"""Several stochastic steps as one decision, and clips that mean the same whatever is summed."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Independent, Normal, kl_divergence

from rlvla_algos.chain import (
    Draw,
    Sampled,
    Scored,
    chain_entropy,
    chain_kl,
    fixed,
    normal_kl,
    sample_chain,
    score_chain,
    with_noise,
)
from rlvla_algos.clip import clip_power
from rlvla_algos.flow import denoise, flow_sde_schedule, ode_schedule, transition
from rlvla_algos.ppo import ppo_loss

N = 4
SDE = flow_sde_schedule(N, 0.5)


def wavy_velocity(sample: Tensor, tau: Tensor, step: Tensor) -> Tensor:
    """Nonlinear, and different in every row, entry and flow time."""
    entry = torch.arange(sample[0].numel(), dtype=sample.dtype).reshape(sample[0].shape)
    return torch.sin(2 * sample + entry) + tau[:, None, None] * sample - 0.1 * step[:, None, None]


def noise_of(seed: int, rows: int, window: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 3, 2, generator=generator), torch.randn(rows, window, 3, 2, generator=generator)


def sampled(start: list[int], window: int, draw: Draw | None = None, velocity: Any = wavy_velocity) -> Sampled:
    noise, step_noise = noise_of(1, len(start), window)
    chosen = torch.tensor(start)
    return sample_chain(velocity, noise, draw=draw or fixed(SDE), num_steps=N, start=chosen, step_noise=step_noise)


def test_a_window_of_one_step_is_the_default_sampler_to_the_bit() -> None:
    noise, step_noise = noise_of(2, 4, 1)
    start = torch.tensor([0, 1, 2, 3])
    made = sample_chain(wavy_velocity, noise, draw=fixed(SDE), num_steps=N, start=start, step_noise=step_noise)
    known = denoise(wavy_velocity, noise, schedule=SDE, stochastic_step=start, step_noise=step_noise[:, 0])
    assert torch.equal(made.action, known.action)
    assert torch.equal(made.states[:, 0], known.before)
    assert torch.equal(made.states[:, 1], known.after)
    assert torch.equal(made.scored.mean[:, 0], known.mean)
    assert torch.equal(made.scored.log_prob, known.log_prob)


@pytest.mark.parametrize(("start", "window"), [([0, 0], N), ([0, 2], 2), ([1, 0], 3)])
def test_a_chain_has_the_density_of_its_transitions(start: list[int], window: int) -> None:
    made = sampled(start, window)
    noise, step_noise = noise_of(1, len(start), window)
    for row, first in enumerate(start):
        sample, log_prob = noise[[row]], torch.zeros(1, 3, 2)
        for k in range(N):
            step = torch.tensor([k])
            velocity = wavy_velocity(sample, SDE.tau[[k]], step)
            if first <= k < first + window:
                torch.testing.assert_close(made.states[[row], k - first], sample)
                gaussian = transition(sample, velocity, step, SDE)
                sample = gaussian.mean + gaussian.std * step_noise[[row], k - first]
                log_prob = log_prob + Normal(gaussian.mean, gaussian.std).log_prob(sample)
                torch.testing.assert_close(made.states[[row], k - first + 1], sample)
            else:
                sample = transition(sample, velocity, step, ode_schedule(N)).mean
        torch.testing.assert_close(made.action[[row]], sample)
        torch.testing.assert_close(made.scored.log_prob[[row]], log_prob)


@pytest.mark.parametrize("window", [1, 2, N])
def test_the_stored_log_probability_is_the_recomputed_one(window: int) -> None:
    start = [0, N - window, min(1, N - window)]
    made = sampled(start, window)
    again = score_chain(wavy_velocity, made.states, draw=fixed(SDE), num_steps=N, start=torch.tensor(start))
    for one, other in zip(made.scored, again, strict=True):
        torch.testing.assert_close(one, other.expand_as(one), rtol=1e-6, atol=1e-6)


def test_the_gradient_of_a_chains_log_probability_is_that_of_autograd_over_its_steps() -> None:
    made, scale = sampled([0, 0], N), torch.tensor(1.2, requires_grad=True)

    def scaled(sample: Tensor, tau: Tensor, step: Tensor) -> Tensor:
        return scale * wavy_velocity(sample, tau, step)

    scored = score_chain(scaled, made.states, draw=fixed(SDE), num_steps=N, start=torch.zeros(2, dtype=torch.long))
    (found,) = torch.autograd.grad(scored.log_prob.sum(), scale)
    total = torch.zeros(())
    for k in range(N):
        step = torch.full((2,), k)
        gaussian = transition(made.states[:, k], scaled(made.states[:, k], SDE.tau[step], step), step, SDE)
        total = total + Normal(gaussian.mean, gaussian.std).log_prob(made.states[:, k + 1]).sum()
    torch.testing.assert_close(found, torch.autograd.grad(total, scale)[0])


def test_the_summed_kl_is_that_of_the_whole_chain_by_monte_carlo() -> None:
    generator = torch.Generator().manual_seed(3)
    noise, step_noise = (
        torch.randn(40_000, 1, 1, generator=generator),
        torch.randn(40_000, N, 1, 1, generator=generator),
    )
    start = torch.zeros(40_000, dtype=torch.long)
    made = sample_chain(wavy_velocity, noise, draw=fixed(SDE), num_steps=N, start=start, step_noise=step_noise)

    def other(sample: Tensor, tau: Tensor, step: Tensor) -> Tensor:
        return wavy_velocity(sample, tau, step) + 0.2

    new = score_chain(other, made.states, draw=fixed(SDE), num_steps=N, start=start)
    mask = torch.ones(40_000, 1, 1, dtype=torch.bool)
    exact = chain_kl(new, made.scored.mean, made.scored.std, mask).mean()
    sampled_kl = (made.scored.log_prob - new.log_prob).mean()
    # The log-ratio's deviation is about sqrt(2 KL) = 0.6: one standard error is 0.003.
    assert float(exact) > 0.05
    assert float(sampled_kl) == pytest.approx(float(exact), abs=0.015)


def test_the_kl_counts_valid_entries_alone_by_hand() -> None:
    # Two steps, means 0.1 apart at s = 0.5, one valid entry of two: 2 x 0.01 / (2 x 0.25) = 0.04 nats.
    new = Scored(torch.full((1, 2, 1, 2), 0.1), torch.full((1, 2, 1, 1), 0.5), torch.zeros(1, 1, 2))
    kl = chain_kl(new, torch.zeros(1, 2, 1, 2), new.std, torch.tensor([[[True, False]]]))
    assert kl.item() == pytest.approx(0.04)


def test_the_kl_of_gaussians_equals_that_of_torch_distributions_and_is_zero_for_equal_ones() -> None:
    generator = torch.Generator().manual_seed(4)
    mean, old_mean = torch.randn(2, 5, 3, generator=generator)
    std, old_std = torch.rand(2, 5, 3, generator=generator) + 0.1
    expected = kl_divergence(Normal(old_mean, old_std), Normal(mean, std))
    torch.testing.assert_close(normal_kl(mean, std, old_mean, old_std), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(normal_kl(mean, std, mean, std), torch.zeros(5, 3))


def test_learned_noise_is_drawn_around_eulers_step() -> None:
    std = 0.1 + torch.rand(N, 3, 2, generator=torch.Generator().manual_seed(5))
    made = sampled([0, 0], N, draw=with_noise(lambda step: std[step], N))
    _, step_noise = noise_of(1, 2, N)
    for k in range(N):
        before, step = made.states[:, k], torch.full((2,), k)
        mean = before - wavy_velocity(before, SDE.tau[step], step) / N
        torch.testing.assert_close(made.scored.mean[:, k], mean)
        torch.testing.assert_close(made.states[:, k + 1], mean + std[k] * step_noise[:, k])
    log_prob = Normal(made.scored.mean, made.scored.std).log_prob(made.states[:, 1:]).sum(dim=1)
    torch.testing.assert_close(made.scored.log_prob, log_prob)
    entropy = Independent(Normal(torch.zeros(N, 3, 2), std), 3).entropy()
    torch.testing.assert_close(chain_entropy(made.scored.std)[0].sum(), entropy)


def test_a_window_beyond_the_chain_is_refused() -> None:
    with pytest.raises(ValueError, match=r"start must lie in \[0, 1\]: a window of 3 of 4 steps"):
        sampled([0, 2], 3)


# --- clips


def clip_fraction(log_ratio: Tensor, reduction: Any, *, terms: int | None, epsilon: float = 0.2) -> float:
    rows, mask = len(log_ratio), torch.ones_like(log_ratio, dtype=torch.bool)
    zero = torch.zeros(rows)
    loss = ppo_loss(
        log_prob=log_ratio,
        old_log_prob=torch.zeros_like(log_ratio),
        mask=mask,
        advantage=torch.ones(rows),
        value=zero,
        old_value=zero,
        value_target=zero,
        reduction=reduction,
        clip_epsilon=epsilon,
        value_clip=None,
        value_coef=1.0,
        clip_power=None if terms is None else clip_power(mask, reduction, terms),
    )
    return float(loss.clip_fraction)


def test_the_power_of_a_clip_by_hand() -> None:
    # 8 valid entries, each the sum of two steps: sqrt(16), sqrt(2 / 8), sqrt(2), sqrt(2).
    mask = torch.ones(1, 4, 2, dtype=torch.bool)
    found = {name: float(clip_power(mask, name, 2)) for name in ("sum", "mean", "sqrt", "elementwise")}  # type: ignore[arg-type]
    assert found == pytest.approx({"sum": 4.0, "mean": 0.5, "sqrt": math.sqrt(2), "elementwise": math.sqrt(2)})


def test_a_matched_clip_by_hand() -> None:
    # Four entries of log-ratio ln(1.3)/2 each: the sum's ratio is 1.69, and its bounds are 0.8^2 and 1.2^2 = 1.44.
    log_ratio = torch.full((1, 2, 2), math.log(1.3) / 2)
    mask, zero = torch.ones(1, 2, 2, dtype=torch.bool), torch.zeros(1)
    loss = ppo_loss(
        log_prob=log_ratio,
        old_log_prob=torch.zeros_like(log_ratio),
        mask=mask,
        advantage=torch.ones(1),
        value=zero,
        old_value=zero,
        value_target=zero,
        reduction="sum",
        clip_epsilon=0.2,
        value_clip=None,
        value_coef=1.0,
        clip_power=clip_power(mask, "sum", 1),
    )
    assert float(loss.policy) == pytest.approx(-1.44)
    assert float(loss.clip_fraction) == 1
    assert float(loss.ratio_error) == pytest.approx(0.69)


def test_a_matched_clip_cuts_off_the_same_share_under_every_reduction() -> None:
    # 112 entries whose log-ratios scatter by 0.15: outside ln 0.8 .. ln 1.2 lie Phi(-1.49) + Phi(-1.22) = 18%.
    log_ratio = 0.15 * torch.randn(4_000, 16, 7, generator=torch.Generator().manual_seed(6))
    matched = [clip_fraction(log_ratio, name, terms=1) for name in ("elementwise", "sum", "mean", "sqrt")]
    assert matched == pytest.approx([0.18] * 4, abs=0.02)
    assert clip_fraction(log_ratio, "sum", terms=None) > 0.85
    assert clip_fraction(log_ratio, "mean", terms=None) == 0
    # Two steps in each entry: what is summed scatters more, and the share stays.
    both = log_ratio + 0.15 * torch.randn(log_ratio.shape, generator=torch.Generator().manual_seed(7))
    assert clip_fraction(both, "elementwise", terms=2) == pytest.approx(0.18, abs=0.02)
