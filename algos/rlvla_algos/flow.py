"""Flow matching as a Markov chain with Gaussian steps, so that PPO has a log-probability.

Flow time tau runs from 1 (noise) to 0 (action), as in Qwen-VLA, openpi and LeRobot:

    Y_tau = (1 - tau) Y_0 + tau Y_1,    Y_1 ~ N(0, I),    velocity v = Y_1 - Y_0.

Write ``Y0hat = Y_tau - tau v`` for the predicted action and ``Y1hat = Y_tau + (1 - tau) v`` for the
predicted noise. Every sampler is a schedule of triples (w0, w1, s), one a denoising step:

    Y_tau' ~ N(w0 Y0hat + w1 Y1hat, s^2 I),    tau' = tau - dt.

Log-probability, KL divergence and the checks are written once, above the schedule.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Chunk = Float[Tensor, "B H K"]
Velocity = Callable[[Tensor, Tensor, Tensor], Tensor]
"""The flow's velocity with the observation already bound: (Y [B H K], tau [B], step [B]) -> [B H K].

The integer step travels beside tau because some checkpoints bucket the time, and bucketing a float lands
in the wrong bucket on some grids.
"""


class Schedule(NamedTuple):
    """One sampler of N denoising steps: where each step starts and ends, and its Gaussian."""

    tau: Float[Tensor, " N"]
    """Flow time at which the velocity is evaluated, 1 first."""
    tau_next: Float[Tensor, " N"]
    w0: Float[Tensor, " N"]
    w1: Float[Tensor, " N"]
    std: Float[Tensor, " N"]
    """Standard deviation s of each step; 0 for a deterministic one."""

    @property
    def num_steps(self) -> int:
        return len(self.tau)

    def at(self, step: Int[Tensor, " B"]) -> "Schedule":
        """The triples of one step per row, shaped [B]."""
        return Schedule(*(column[step] for column in self))

    def to(self, device: torch.device | str) -> "Schedule":
        return Schedule(*(column.to(device) for column in self))


class GaussianStep(NamedTuple):
    """p(Y_tau' | Y_tau) of one denoising step, for rows that may be at different steps."""

    mean: Chunk
    std: Float[Tensor, "B #H #K"]
    """One a row, or one an entry."""

    def log_prob(self, sample: Chunk) -> Chunk:
        """Log-density of every entry of the chunk; the entries are independent."""
        z = (sample - self.mean) / self.std
        return -0.5 * z.square() - self.std.log() - 0.5 * math.log(2 * math.pi)


def time_grid(num_steps: int) -> Float[Tensor, " N_plus_1"]:
    """The N + 1 flow times of N Euler steps, from 1 down to 0.

    SFT evaluation, rollouts and the learner all call this function. A policy whose learner uses another
    grid than its rollouts has a ratio that is never 1, and nothing else tells.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}; a flow needs at least one denoising step. Usual: 2 to 10.")
    return torch.linspace(1.0, 0.0, num_steps + 1)


def ode_schedule(num_steps: int) -> Schedule:
    """Euler steps of the probability-flow ODE: w0 = 1 - tau', w1 = tau', s = 0, that is Y - dt v."""
    grid = time_grid(num_steps)
    tau, tau_next = grid[:-1], grid[1:]
    return Schedule(tau, tau_next, w0=1 - tau_next, w1=tau_next.clone(), std=torch.zeros(num_steps))


def flow_sde_schedule(num_steps: int, noise_level: float) -> Schedule:
    """Euler-Maruyama steps of the SDE whose marginals are the ODE's.

    Run backwards from tau = 1, any sigma(tau) >= 0 leaves the marginals alone when the drift is corrected
    by the score, -Y1hat / tau:

        w0 = 1 - tau',    w1 = tau' - sigma^2 dt / (2 tau),    s = sigma sqrt(dt).

    Here sigma = a sqrt(tau / (1 - tau)) as in Flow-GRPO (arXiv:2505.05470), which is infinite at tau = 1:
    the first step takes the next grid time in the denominator, so its s is ``a`` itself for any N.

    Args:
        num_steps: N, at least 2: with one step there is no next grid time inside (0, 1).
        noise_level: a > 0. Usual: 0.3 to 0.7.

    Raises:
        ValueError: too few steps, or no noise.
    """
    if num_steps < 2:
        raise ValueError(f"num_steps is {num_steps}; the flow SDE needs at least 2. Usual: 2 to 10.")
    if noise_level <= 0:
        raise ValueError(f"noise_level is {noise_level}; it must be positive, 0 has no log-probability. Usual: 0.5.")
    grid = time_grid(num_steps)
    tau, tau_next = grid[:-1], grid[1:]
    dt = tau - tau_next
    safe = torch.where(tau == 1, tau_next, tau)
    sigma_squared = noise_level**2 * tau / (1 - safe)
    w1 = tau_next - sigma_squared * dt / (2 * tau)
    return Schedule(tau, tau_next, w0=1 - tau_next, w1=w1, std=(sigma_squared * dt).sqrt())


def check_flow_sde(schedule: Schedule, num_steps: int) -> None:
    """Raise ValueError unless a schedule is on `time_grid` and has the drift correction that belongs to its noise.

    Whatever sigma is, marginals survive only with w0 = 1 - tau' and w1 = tau' - s^2 / (2 tau). Runs check
    themselves with this at start-up: a schedule that fails it still has ratios of 1.
    """
    grid = time_grid(num_steps).to(schedule.tau)
    problems = []
    if schedule.num_steps != num_steps or not torch.allclose(schedule.tau, grid[:-1]):
        problems.append(f"it starts its steps at {schedule.tau.tolist()}, the time grid at {grid[:-1].tolist()}")
    elif not torch.allclose(schedule.tau_next, grid[1:], atol=1e-6):
        problems.append(f"it ends its steps at {schedule.tau_next.tolist()}, the time grid at {grid[1:].tolist()}")
    corrected = schedule.tau_next - schedule.std.square() / (2 * schedule.tau)
    if not torch.allclose(schedule.w0, 1 - schedule.tau_next, atol=1e-5):
        problems.append("w0 is not 1 - tau'")
    if not torch.allclose(schedule.w1, corrected, atol=1e-5):
        problems.append("w1 lacks the drift correction -s^2 / (2 tau), so the marginals change")
    if not bool((schedule.std > 0).all()):
        problems.append("a step has no noise, so it has no log-probability")
    if problems:
        raise ValueError(f"the flow SDE schedule is wrong: {'; '.join(problems)}.")


def transition(sample: Chunk, velocity: Chunk, step: Int[Tensor, " B"], schedule: Schedule) -> GaussianStep:
    """The Gaussian of each row's denoising step, given the velocity at its sample."""
    at = schedule.at(step)
    tau, w0, w1, std = (column[:, None, None] for column in (at.tau, at.w0, at.w1, at.std))
    predicted_action = sample - tau * velocity
    predicted_noise = sample + (1 - tau) * velocity
    return GaussianStep(w0 * predicted_action + w1 * predicted_noise, std)


class Denoised(NamedTuple):
    """A sampled chunk, and the one stochastic transition that PPO will score again."""

    action: Chunk
    """Y_0, not clipped: clipping belongs to the copy that the simulator gets."""
    before: Chunk
    after: Chunk
    """Y_k and Y_{k+1} around the row's stochastic step k."""
    mean: Chunk
    """Mean of that transition under the sampling policy: comparing it finds what ratios hide."""
    log_prob: Chunk


def denoise(
    velocity: Velocity,
    noise: Chunk,
    *,
    schedule: Schedule,
    stochastic_step: Int[Tensor, " B"] | None = None,
    step_noise: Chunk | None = None,
) -> Denoised:
    """Integrate from noise to an action chunk.

    Without ``stochastic_step`` every step is Euler's and the result depends on ``noise`` alone. With it,
    row b draws step ``stochastic_step[b]`` from the schedule's Gaussian and takes Euler's for the others:
    conditioned on Y_k and Y_{k+1} the rest of the chain is a constant, so one Gaussian carries the whole
    policy gradient (Qwen-VLA, section 4.2).

    Args:
        velocity: see `Velocity`.
        noise: Y_1, already multiplied by the temperature.
        schedule: a stochastic schedule, or the ODE's.
        stochastic_step: in [0, N).
        step_noise: standard normal draws for that step, already multiplied by the temperature.

    Raises:
        ValueError: one of ``stochastic_step`` and ``step_noise`` without the other, or a step out of range.
    """
    if (stochastic_step is None) != (step_noise is None):
        raise ValueError("stochastic_step and step_noise come together: which step is drawn, and its draw.")
    if stochastic_step is not None and not bool(
        ((stochastic_step >= 0) & (stochastic_step < schedule.num_steps)).all()
    ):
        raise ValueError(f"stochastic_step must lie in [0, {schedule.num_steps}), the schedule's steps.")
    euler = ode_schedule(schedule.num_steps).to(noise.device)
    sample = noise
    before = after = mean = torch.zeros_like(noise)
    log_prob = torch.zeros_like(noise)
    for k in range(schedule.num_steps):
        step = torch.full((len(noise),), k, device=noise.device)
        tau = schedule.tau[k].expand(len(noise))
        v = velocity(sample, tau, step)
        following = transition(sample, v, step, euler).mean
        if stochastic_step is not None and step_noise is not None:
            chosen = (stochastic_step == k)[:, None, None]
            gaussian = transition(sample, v, step, schedule)
            drawn = gaussian.mean + gaussian.std * step_noise
            before = torch.where(chosen, sample, before)
            after = torch.where(chosen, drawn, after)
            mean = torch.where(chosen, gaussian.mean, mean)
            log_prob = torch.where(chosen, gaussian.log_prob(drawn), log_prob)
            following = torch.where(chosen, drawn, following)
        sample = following
    return Denoised(sample, before, after, mean, log_prob)


def gaussian_kl(
    mean: Chunk, old_mean: Chunk, std: Float[Tensor, "B 1 1"], mask: Bool[Tensor, "B H K"]
) -> Float[Tensor, " B"]:
    """KL divergence between two transitions of equal s, in nats per chunk: sum (dmu)^2 / (2 s^2).

    Exact and symmetric; padded and unexecuted entries do not count.
    """
    return (((mean - old_mean) / std).square() * mask).sum(dim=(1, 2)) / 2
