"""The supervised objective: Qwen-VLA's two levels of averaging, and no gradient from padding."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rlvla_algos.flow_matching import flow_matching_loss, interpolate


def naive_loss(velocity: Tensor, action: Tensor, noise: Tensor, mask: Tensor) -> float:
    """Equations 1 and 2 in plain loops."""
    rows = []
    for b in range(len(mask)):
        channels = []
        for k in range(mask.shape[2]):
            errors = [
                float(velocity[b, h, k] - (noise[b, h, k] - action[b, h, k])) ** 2
                for h in range(mask.shape[1])
                if mask[b, h, k]
            ]
            if errors:
                channels.append(sum(errors) / len(errors))
        rows.append(sum(channels) / len(channels) if channels else 0.0)
    return sum(rows) / len(rows)


def test_the_straight_path_by_hand() -> None:
    # tau = 0.25 between action 2 and noise 6: 0.75 x 2 + 0.25 x 6 = 3.
    action, noise = torch.full((3, 1, 1), 2.0), torch.full((3, 1, 1), 6.0)
    path = interpolate(action, noise, torch.tensor([0.0, 0.25, 1.0]))
    assert path.flatten().tolist() == [2.0, 3.0, 6.0]


def test_equations_1_and_2_with_channels_of_different_length() -> None:
    # Y_1 - Y_0 = 0 everywhere, so the error is the velocity itself.
    #   channel 0, three valid steps: (1 + 4 + 9) / 3 = 14/3
    #   channel 1, one valid step:     16 / 1         = 16
    #   channel 2, none: not in the mean
    # mean over the two active channels: (14/3 + 16) / 2 = 31/3
    velocity = torch.tensor([[[1.0, 4.0, 7.0], [2.0, 7.0, 7.0], [3.0, 7.0, 7.0]]])
    mask = torch.tensor([[[True, True, False], [True, False, False], [True, False, False]]])
    zero = torch.zeros(1, 3, 3)
    assert flow_matching_loss(velocity, zero, zero, mask).item() == pytest.approx(31 / 3)


def test_the_target_is_noise_minus_action() -> None:
    # v = 1, Y_1 - Y_0 = 5 - 2 = 3: (1 - 3)^2 = 4.
    one = torch.ones(1, 1, 1)
    assert flow_matching_loss(one, 2 * one, 5 * one, one.bool()).item() == pytest.approx(4.0)


@given(seed=st.integers(0, 1000), density=st.floats(0.0, 1.0))
def test_the_loss_equals_the_papers_sums_in_plain_loops(seed: int, density: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    velocity, action, noise = torch.randn(3, 3, 4, 2, generator=generator)
    mask = torch.rand(3, 4, 2, generator=generator) < density
    expected = naive_loss(velocity, action, noise, mask)
    assert flow_matching_loss(velocity, action, noise, mask).item() == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_padding_has_no_gradient_and_its_content_no_effect() -> None:
    generator = torch.Generator().manual_seed(0)
    velocity, action, noise = torch.randn(3, 2, 4, 3, generator=generator)
    mask = torch.rand(2, 4, 3, generator=generator) < 0.5
    velocity.requires_grad_()
    loss = flow_matching_loss(velocity, action, noise, mask)
    (gradient,) = torch.autograd.grad(loss, velocity)
    assert bool((gradient[~mask] == 0).all())
    assert bool((gradient[mask] != 0).all())

    garbage = torch.where(mask, velocity.detach(), 1e6)
    torch.testing.assert_close(flow_matching_loss(garbage, action, noise, mask), loss.detach())


def test_a_row_without_a_valid_entry_counts_zero() -> None:
    # Row 0 has error 4, row 1 nothing valid: (4 + 0) / 2.
    velocity = torch.full((2, 1, 1), 2.0)
    mask = torch.tensor([[[True]], [[False]]])
    zero = torch.zeros(2, 1, 1)
    assert flow_matching_loss(velocity, zero, zero, mask).item() == pytest.approx(2.0)
