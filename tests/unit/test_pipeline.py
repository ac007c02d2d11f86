"""What happens to data that is older than the weights that learn from it."""

import math

import pytest
import torch
from tensordict import TensorDict

from rlvla.pipeline import drop_stale
from rlvla_algos.ppo import behaviour_weight, ppo_loss


def rollout(version: list[list[int]]) -> TensorDict:
    of = torch.tensor(version)
    mask = torch.ones(*of.shape, 2, 3, dtype=torch.bool)
    return TensorDict({"version": of, "valid": torch.ones_like(of, dtype=torch.bool), "mask": mask}, of.shape)


def test_decisions_beyond_the_bound_are_dropped_and_counted() -> None:
    data = rollout([[3, 4], [5, 4]])
    data["valid"][0, 0] = False
    assert drop_stale(data, iteration=5, max_staleness=1) == 0
    data["valid"][0, 0] = True
    assert drop_stale(data, iteration=5, max_staleness=1) == 1
    assert data["valid"].tolist() == [[False, True], [True, True]]
    assert not data["mask"][0, 0].any()
    assert data["mask"][0, 1].all()


def test_a_stale_decision_weighs_what_the_present_policy_would_have_made_of_it() -> None:
    # One entry three times, two times, and half as likely now as when it was decided; the bound is 2.
    now = torch.tensor([3.0, 2.0, 0.5]).log().reshape(3, 1, 1)
    weight = behaviour_weight(now, torch.zeros(3, 1, 1), torch.ones(3, 1, 1, dtype=torch.bool), "elementwise", 2.0)
    assert weight.flatten().tolist() == pytest.approx([2.0, 2.0, 0.5])


def test_summed_over_a_chunk_the_weight_is_the_chunks() -> None:
    now = torch.tensor([[[math.log(1.5), math.log(0.5), 7.0]]])
    mask = torch.tensor([[[True, True, False]]])
    assert behaviour_weight(now, torch.zeros(1, 1, 3), mask, "sum", 2.0).tolist() == pytest.approx([0.75])


@pytest.mark.parametrize("reduction", ["elementwise", "sum", "mean", "sqrt"])
def test_before_the_first_step_the_gradient_is_the_importance_weighted_policy_gradient(reduction: str) -> None:
    # An oracle without clipping: at ratio 1 the surrogate's gradient is -w A grad(log-ratio).
    torch.manual_seed(0)
    behaviour, mask = torch.randn(5, 2, 3), torch.rand(5, 2, 3) > 0.3
    mask[:, 0, 0] = True
    proximal = behaviour + 0.1 * torch.randn(5, 2, 3)
    advantage = torch.randn(5)
    weight = behaviour_weight(proximal, behaviour, mask, reduction, 2.0)  # type: ignore[arg-type]
    log_prob = proximal.clone().requires_grad_()
    value = torch.zeros(5)
    loss = ppo_loss(
        log_prob=log_prob,
        old_log_prob=proximal,
        mask=mask,
        advantage=advantage,
        value=value,
        old_value=value,
        value_target=value,
        reduction=reduction,  # type: ignore[arg-type]
        clip_epsilon=0.2,
        value_clip=None,
        value_coef=1.0,
        behaviour_weight=weight,
    )
    (gradient,) = torch.autograd.grad(loss.total, log_prob)
    rows = (
        (-weight * advantage.reshape(-1, *[1] * (weight.ndim - 1))).reshape(5, *[1] * 2)
        if weight.ndim == 1
        else (-weight * advantage[:, None, None])
    )
    valid = mask.sum(dim=(1, 2)).float()
    share = {"elementwise": mask.sum(), "sum": 5, "mean": 5 * valid, "sqrt": 5 * valid.sqrt()}[reduction]
    expected = rows * mask / (share.reshape(-1, 1, 1) if isinstance(share, torch.Tensor) and share.ndim else share)
    assert torch.allclose(gradient, expected, atol=1e-6)
