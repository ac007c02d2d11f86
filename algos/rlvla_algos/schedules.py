"""Noise schedules beside `rlvla_algos.flow.flow_sde_schedule`: other sigma(tau), and coefficient-preserving sampling.

Of the SDE any sigma(tau) >= 0 keeps the marginals (`rlvla_algos.flow.flow_sde_schedule`), so sigma is a choice: how
much each denoising step explores. With ``a`` the noise level:

    flow_grpo   sigma = a sqrt(tau / (1 - tau))    s = sqrt(dt) sigma, a at the first step      (arXiv:2505.05470)
    constant    sigma = a                          s = a sqrt(dt) at every step
    cosine      sigma = a sin(pi tau / 2)          falls from a sqrt(dt) towards 0 at the action; our choice

Coefficient-preserving sampling (CPS, arXiv:2509.05952) replaces a part of the predicted noise by fresh noise and keeps
the two together as large as they were, w1^2 + s^2 = tau'^2:

    w0 = 1 - tau',    w1 = tau' cos(pi b / 2),    s = tau' sin(pi b / 2)

b is ``a`` (constant) or a sin(pi tau / 2) (cosine). Its last step ends at tau' = 0 and has no noise, so it can never be
a stochastic one.
"""

import math
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from rlvla_algos.flow import Schedule, flow_sde_schedule, time_grid

SDEShape = Literal["flow_grpo", "constant", "cosine"]
CPSShape = Literal["constant", "cosine"]


def sde_schedule(num_steps: int, noise_level: float, shape: SDEShape) -> Schedule:
    """Euler-Maruyama steps of the SDE with the ODE's marginals and a sigma(tau) of this shape.

    Args:
        num_steps: N, at least 2.
        noise_level: a > 0.

    Raises:
        ValueError: too few steps, no noise, or an unknown shape.
    """
    if shape == "flow_grpo":
        return flow_sde_schedule(num_steps, noise_level)
    _check(num_steps, noise_level, math.inf)
    grid = time_grid(num_steps)
    tau, tau_next = grid[:-1], grid[1:]
    dt = tau - tau_next
    variance = (noise_level * _shape(tau, shape, get_args(SDEShape))).square() * dt
    return Schedule(tau, tau_next, w0=1 - tau_next, w1=tau_next - variance / (2 * tau), std=variance.sqrt())


def cps_schedule(num_steps: int, noise_level: float, shape: CPSShape = "constant") -> Schedule:
    """Steps of coefficient-preserving sampling; s of the last one is 0.

    Args:
        num_steps: N, at least 2: with one step there is none with noise.
        noise_level: a in (0, 1]; at 1 the noise of a step is all new.

    Raises:
        ValueError: too few steps, a noise level out of range, or an unknown shape.
    """
    _check(num_steps, noise_level, 1.0)
    grid = time_grid(num_steps)
    tau, tau_next = grid[:-1], grid[1:]
    angle = 0.5 * math.pi * noise_level * _shape(tau, shape, get_args(CPSShape))
    return Schedule(tau, tau_next, w0=1 - tau_next, w1=tau_next * angle.cos(), std=tau_next * angle.sin())


def check_cps(schedule: Schedule, num_steps: int) -> None:
    """Raise ValueError unless a schedule is on `time_grid` and keeps the coefficients, w1^2 + s^2 = tau'^2."""
    grid = time_grid(num_steps).to(schedule.tau)
    problems = []
    if schedule.num_steps != num_steps or not torch.allclose(schedule.tau, grid[:-1]):
        problems.append(f"it starts its steps at {schedule.tau.tolist()}, the time grid at {grid[:-1].tolist()}")
    elif not torch.allclose(schedule.tau_next, grid[1:], atol=1e-6):
        problems.append(f"it ends its steps at {schedule.tau_next.tolist()}, the time grid at {grid[1:].tolist()}")
    if not torch.allclose(schedule.w0, 1 - schedule.tau_next, atol=1e-5):
        problems.append("w0 is not 1 - tau'")
    if not torch.allclose(schedule.w1.square() + schedule.std.square(), schedule.tau_next.square(), atol=1e-5):
        problems.append("w1^2 + s^2 is not tau'^2, so the noise is not as large as it was")
    if not bool((schedule.std[:-1] > 0).all()):
        problems.append("a step before the last has no noise, so it has no log-probability")
    if problems:
        raise ValueError(f"the CPS schedule is wrong: {'; '.join(problems)}.")


def _shape(tau: Float[Tensor, " N"], shape: str, known: tuple[str, ...]) -> Float[Tensor, " N"]:
    """The factor on the noise level at each step."""
    if shape not in known:
        raise ValueError(f"the noise schedule is {shape!r}; it must be one of {', '.join(known)}.")
    return torch.ones_like(tau) if shape == "constant" else (0.5 * math.pi * tau).sin()


def _check(num_steps: int, noise_level: float, most: float) -> None:
    if num_steps < 2:
        raise ValueError(f"num_steps is {num_steps}; a stochastic flow needs at least 2. Usual: 2 to 10.")
    if not 0 < noise_level <= most:
        limit = "positive" if math.isinf(most) else f"in (0, {most:g}]"
        raise ValueError(f"noise_level is {noise_level}; it must be {limit}. Usual: 0.5.")
