"""Objectives on the forward process: numbers by hand, plain numpy, and where their gradients point."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rlvla_algos.flow_matching import flow_matching_loss
from rlvla_algos.forward_process import cloning_loss, nft_loss, nft_weight, surrogate_log_prob, velocity_error
from rlvla_algos.ppo import ppo_loss


def random_batch(seed: int) -> dict[str, Tensor]:
    """Three decisions, two draws, chunks of 4 x 2."""
    generator = torch.Generator().manual_seed(seed)
    velocity, old_velocity, noise = torch.randn(3, 3, 2, 4, 2, generator=generator)
    return {
        "velocity": velocity,
        "old_velocity": old_velocity,
        "noise": noise,
        "action": torch.randn(3, 4, 2, generator=generator),
        "mask": torch.rand(3, 4, 2, generator=generator) < 0.7,
        "weight": torch.rand(3, generator=generator),
    }


def test_the_error_and_the_surrogate_by_hand() -> None:
    # Targets eps - a: 1 - 3 = -2 and 2 - 3 = -1. Velocities 0 and 1: errors 4 and 4. The surrogate is -4.
    velocity, noise = torch.tensor([0.0, 1.0]).view(1, 2, 1, 1), torch.tensor([1.0, 2.0]).view(1, 2, 1, 1)
    action = torch.tensor(3.0).view(1, 1, 1)
    assert velocity_error(velocity, action, noise).flatten().tolist() == [4.0, 4.0]
    assert surrogate_log_prob(velocity, action, noise).item() == -4.0


def test_fpos_clipped_surrogate_equals_numpy() -> None:
    # Its ratio is exp(mean error before - mean error now), of the whole chunk with reduction=sum.
    batch, advantage = random_batch(0), np.array([1.0, -2.0, 0.5])
    everything = torch.ones_like(batch["mask"])
    scaled = {name: 0.2 * batch[name] for name in ("velocity", "old_velocity", "noise")}
    target = scaled["noise"].numpy() - batch["action"][:, None].numpy()
    new, old = (((scaled[name].numpy() - target) ** 2).mean(axis=1).sum(axis=(1, 2)) for name in list(scaled)[:2])
    ratio = np.exp(old - new)
    expected = -np.minimum(ratio * advantage, ratio.clip(0.8, 1.3) * advantage).mean()

    zero = torch.zeros(3)
    loss = ppo_loss(
        log_prob=surrogate_log_prob(scaled["velocity"], batch["action"], scaled["noise"]),
        old_log_prob=surrogate_log_prob(scaled["old_velocity"], batch["action"], scaled["noise"]),
        mask=everything,
        advantage=torch.tensor(advantage, dtype=torch.float32),
        value=zero,
        old_value=zero,
        value_target=zero,
        reduction="sum",
        clip_epsilon=0.2,
        clip_epsilon_high=0.3,
        value_clip=None,
        value_coef=1.0,
    )
    assert not np.allclose(ratio, 1, atol=0.01)
    assert loss.policy.item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("advantage", "share"), [(0.0, 0.5), (1.0, 0.75), (2.0, 1.0), (9.0, 1.0), (-1.0, 0.25), (-9.0, 0.0)]
)
def test_the_share_of_a_good_example_by_hand(advantage: float, share: float) -> None:
    assert nft_weight(torch.tensor([advantage]), 2.0).item() == pytest.approx(share)


def test_nft_by_hand() -> None:
    # Old velocity 1, new 2, beta 1/2: v+ = 1.5, v- = 0.5. Target 0 - (-1) = 1... so both are off by 1/2: 1/4 at any r.
    one = torch.ones(1, 1, 1, 1)
    common: dict[str, Any] = {"noise": 0 * one, "mask": torch.ones(1, 1, 1, dtype=torch.bool), "beta": 0.5}
    for r in (0.0, 0.3, 1.0):
        loss = nft_loss(velocity=2 * one, old_velocity=one, action=-one[0], weight=torch.tensor([r]), **common)
        assert loss.item() == pytest.approx(0.25)
    # Target 2: v+ is off by 1/2 and v- by 3/2, so 0.3 x 0.25 + 0.7 x 2.25 = 1.65.
    loss = nft_loss(velocity=2 * one, old_velocity=one, action=-2 * one[0], weight=torch.tensor([0.3]), **common)
    assert loss.item() == pytest.approx(1.65)


@given(seed=st.integers(0, 1000), beta=st.floats(0.1, 2.0))
def test_nft_equals_plain_loops(seed: int, beta: float) -> None:
    batch = random_batch(seed)
    terms = []
    for m, h, k in np.ndindex(3, 4, 2):
        if not batch["mask"][m, h, k]:
            continue
        r, of_draws = float(batch["weight"][m]), []
        for i in range(2):
            v, old = float(batch["velocity"][m, i, h, k]), float(batch["old_velocity"][m, i, h, k])
            target = float(batch["noise"][m, i, h, k] - batch["action"][m, h, k])
            plus, minus = old + beta * (v - old), old - beta * (v - old)
            of_draws.append(r * (plus - target) ** 2 + (1 - r) * (minus - target) ** 2)
        terms.append(sum(of_draws) / 2)
    expected = sum(terms) / len(terms) if terms else 0.0
    assert nft_loss(**batch, beta=beta).item() == pytest.approx(expected, rel=1e-4, abs=1e-5)  # type: ignore[arg-type]


@pytest.mark.parametrize("r", [0.0, 0.25, 0.5, 1.0])
def test_before_the_first_step_nft_is_flow_matching_times_how_good_a_decision_was(r: float) -> None:
    batch = random_batch(1)
    batch["weight"] = torch.full((3,), r)
    velocity = batch["old_velocity"].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(nft_loss(**{**batch, "velocity": velocity}, beta=0.6), velocity)  # type: ignore[arg-type]
    plain = cloning_loss(surrogate_log_prob(velocity, batch["action"], batch["noise"]), batch["mask"])
    (towards,) = torch.autograd.grad(plain, velocity)
    torch.testing.assert_close(gradient, 0.6 * (2 * r - 1) * towards, rtol=1e-4, atol=1e-6)


def test_cloning_a_flow_is_the_loss_that_sft_minimises() -> None:
    batch = random_batch(2)
    everything = torch.ones_like(batch["mask"])
    cloned = cloning_loss(surrogate_log_prob(batch["velocity"], batch["action"], batch["noise"]), everything)
    repeated, every = batch["action"].repeat_interleave(2, 0), everything.repeat_interleave(2, 0)
    learnt = flow_matching_loss(batch["velocity"].flatten(0, 1), repeated, batch["noise"].flatten(0, 1), every)
    torch.testing.assert_close(cloned, learnt)


@pytest.mark.parametrize("objective", ["nft", "clone"])
def test_the_losses_of_uneven_parts_add_up_and_masked_entries_have_no_gradient(objective: str) -> None:
    batch = random_batch(4)
    batch["velocity"].requires_grad_()
    entries = float(batch["mask"].sum())

    def loss(rows: slice, entries: float | None) -> Tensor:
        part: Any = {name: tensor[rows] for name, tensor in batch.items()}
        if objective == "nft":
            return nft_loss(**part, beta=1.0, entries=entries)
        log_prob = surrogate_log_prob(part["velocity"], part["action"], part["noise"])
        return cloning_loss(log_prob, part["mask"], entries)

    whole = loss(slice(0, 3), None)
    torch.testing.assert_close(loss(slice(0, 1), entries) + loss(slice(1, 3), entries), whole)
    (gradient,) = torch.autograd.grad(whole, batch["velocity"])
    counted = batch["mask"][:, None].expand_as(gradient)
    assert bool((gradient[~counted] == 0).all())
    assert bool((gradient[counted] != 0).any())
