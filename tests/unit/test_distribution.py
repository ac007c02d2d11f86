"""Chunks of Gaussian and binary entries: numbers by hand, an oracle, noise and temperature."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Bernoulli, Normal, kl_divergence
from torch.nn import functional as F

from rlvla_algos.distribution import NormalBernoulli, imitation_loss

BINARY = torch.tensor([[[False, True]]])
"""Channel 1 is a gripper."""


def make(mean: float = 0.0, logit: float = 0.0, log_std: float = 0.0, rows: int = 1) -> NormalBernoulli:
    location = torch.tensor([mean, logit]).expand(rows, 1, 2)
    return NormalBernoulli(location, torch.full((rows, 1, 2), log_std), BINARY.expand(rows, 1, 2))


def random(seed: int, rows: int = 5) -> NormalBernoulli:
    g = torch.Generator().manual_seed(seed)
    location = 2 * torch.randn(rows, 3, 2, generator=g, dtype=torch.float64)
    log_std = torch.randn(1, 1, 2, generator=g, dtype=torch.float64).expand(rows, 1, 2)
    return NormalBernoulli(location, log_std, BINARY.expand(rows, 1, 2))


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_log_probabilities_by_hand() -> None:
    # One deviation from the mean: -1/2 - log 2 - log sqrt(2 pi). Closed at logit log 3: p = 1/4.
    made = make(mean=1.0, logit=math.log(3), log_std=math.log(2))
    found = made.log_prob(torch.tensor([[[3.0, -1.0]]]))[0, 0]
    assert found.tolist() == pytest.approx([-0.5 - math.log(2) - 0.5 * math.log(2 * math.pi), -math.log(4)])


def test_kl_by_hand() -> None:
    # Means one apart, deviations 1 (old) and 2 (new): log 2 + (1 + 1) / 8 - 1/2. A half against 3/4.
    old, new = make(), make(mean=1.0, logit=math.log(3), log_std=math.log(2))
    found = new.kl(old.parameters())[0, 0].tolist()
    half = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    assert found == pytest.approx([math.log(2) + 2 / 8 - 0.5, half])


@given(seed=st.integers(0, 1000))
def test_log_probability_entropy_and_kl_are_those_of_torch(seed: int) -> None:
    old, new = random(seed), random(seed + 1)
    sample = old.sample(noise(5, 3, 2, seed=seed).double(), 1.0)
    normals = [Normal(d.location[..., 0], d.log_std[..., 0].exp()) for d in (old, new)]
    grippers = [Bernoulli(logits=d.location[..., 1]) for d in (old, new)]
    opened = (sample[..., 1] > 0).double()
    for found, normal, gripper in [
        (new.log_prob(sample), normals[1].log_prob(sample[..., 0]), grippers[1].log_prob(opened)),
        (new.entropy(), normals[1].entropy(), grippers[1].entropy()),
        (new.kl(old.parameters()), kl_divergence(*normals), kl_divergence(*grippers)),
    ]:
        torch.testing.assert_close(found[..., 0], normal.expand_as(found[..., 0]))
        torch.testing.assert_close(found[..., 1], gripper)


def test_a_certain_gripper_has_finite_numbers() -> None:
    # As after SFT: in single precision the probability is 1.
    sure, other = make(logit=200.0), make(logit=-200.0)
    wrong = torch.tensor([[[0.0, -1.0]]])
    for value in (sure.log_prob(wrong), sure.entropy(), sure.kl(other.parameters())):
        assert torch.isfinite(value).all()
    assert sure.log_prob(wrong)[0, 0, 1] == -200
    assert sure.kl(other.parameters())[0, 0, 1] == 400 / 2
    assert torch.equal(sure.sample(torch.tensor([[[0.0, -8.0]]]), 1.0)[..., 1], torch.tensor([[1.0]]))


def test_draws_have_the_mean_the_deviation_and_the_probability() -> None:
    rows = 20000
    made = make(mean=0.5, logit=1.0, log_std=math.log(0.3), rows=rows)
    drawn = made.sample(noise(rows, 1, 2), 1.0)[:, 0]
    assert drawn[:, 0].mean() == pytest.approx(0.5, abs=0.01)
    assert drawn[:, 0].std() == pytest.approx(0.3, abs=0.01)
    assert set(drawn[:, 1].tolist()) == {1.0, -1.0}
    assert (drawn[:, 1] > 0).float().mean() == pytest.approx(1 / (1 + math.exp(-1)), abs=0.01)


@pytest.mark.parametrize("temperature", [0.25, 0.6])
def test_a_temperature_scales_the_deviation_and_divides_the_logit(temperature: float) -> None:
    rows = 20000
    made = make(mean=0.5, logit=0.5, log_std=math.log(0.3), rows=rows)
    drawn = made.sample(noise(rows, 1, 2), temperature)[:, 0]
    assert drawn[:, 0].std() == pytest.approx(0.3 * temperature, abs=0.01)
    expected = 1 / (1 + math.exp(-0.5 / temperature))
    assert (drawn[:, 1] > 0).float().mean() == pytest.approx(expected, abs=0.01)


def test_at_temperature_zero_it_is_deterministic() -> None:
    made = random(3)
    expected = torch.where(BINARY, torch.where(made.location > 0, 1.0, -1.0), made.location)
    assert torch.equal(made.deterministic(), expected)
    for seed in range(3):
        assert torch.equal(made.sample(noise(5, 3, 2, seed=seed).double(), 0.0), expected)


def test_the_gap_is_in_standard_deviations_and_sees_every_parameter() -> None:
    old = make(log_std=math.log(0.5))
    assert old.gap(old.parameters()).max() == 0
    assert make(mean=0.1, logit=0.3, log_std=math.log(0.5)).gap(old.parameters())[0, 0].tolist() == pytest.approx(
        [0.2, 0.3]
    )
    assert make(log_std=math.log(0.5) + 0.7).gap(old.parameters())[0, 0].tolist() == pytest.approx([0.7, 0.0])


def test_what_is_stored_does_not_follow_the_weights() -> None:
    weight = torch.zeros(2)
    made = make()._replace(log_std=weight.expand(1, 1, 2))
    stored = made.parameters()
    weight += 1
    assert stored["log_std"].tolist() == [[[0.0, 0.0]]]


def test_the_imitation_loss_by_hand() -> None:
    # Poses 0.5 and 3 off: 0.125 and 2.5 (linear from 1 on). One step was not executed. Gripper: logit 0 costs log 2.
    location = torch.tensor([[[0.5, 0.0], [3.0, 9.0], [7.0, 7.0]]])
    action = torch.tensor([[[0.0, 1.0], [0.0, 1.0], [0.0, -1.0]]])
    mask = torch.tensor([[[True, True], [True, True], [False, False]]])
    found = imitation_loss(location, BINARY, action, mask, binary_weight=0.1)
    cross = (math.log(2) + math.log1p(math.exp(-9))) / 2
    assert float(found) == pytest.approx((0.125 + 2.5) / 2 + 0.1 * cross)


def test_the_imitation_loss_is_torchs_and_ignores_what_is_masked() -> None:
    g = torch.Generator().manual_seed(0)
    location, action = torch.randn(2, 4, 5, 2, generator=g)
    everything = torch.ones(4, 5, 2, dtype=torch.bool)
    expected = F.huber_loss(location[..., 0], action[..., 0]) + 0.01 * F.binary_cross_entropy_with_logits(
        location[..., 1], (action[..., 1] > 0).float()
    )
    torch.testing.assert_close(imitation_loss(location, BINARY, action, everything, 0.01), expected)
    none = torch.zeros_like(everything)
    assert imitation_loss(location, BINARY, action, none, 0.01) == 0
    some = torch.rand(4, 5, 2, generator=g) < 0.5
    garbage = torch.where(some, action, 1e3)
    assert torch.equal(
        imitation_loss(location, BINARY, garbage, some, 0.01), imitation_loss(location, BINARY, action, some, 0.01)
    )
