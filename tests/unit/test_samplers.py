"""The one place that knows two kinds of policy: what it refuses, and what it does with stale decisions."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tensordict import TensorDict

from rlvla.config import AlgoConfig, ConfigError
from rlvla.samplers import DistributionSampler, FlowSampler, evaluation_sampler, training_sampler
from rlvla_algos.distribution import NormalBernoulli

FLOW: Any = SimpleNamespace(num_denoising_steps=4)
DISTRIBUTION: Any = SimpleNamespace(distribution=lambda context: None)


def test_each_kind_of_policy_has_its_sampler() -> None:
    assert isinstance(training_sampler(DISTRIBUTION, AlgoConfig()), DistributionSampler)
    assert isinstance(evaluation_sampler(DISTRIBUTION), DistributionSampler)
    assert evaluation_sampler(FLOW) == FlowSampler(None)
    sampler = training_sampler(FLOW, AlgoConfig(noise_level=0.3))
    assert isinstance(sampler, FlowSampler)
    assert sampler.schedule is not None
    assert sampler.schedule.num_steps == 4
    assert float(sampler.schedule.std[0]) == pytest.approx(0.3 * (0.25 / 0.25) ** 0.5)


def test_an_entropy_bonus_is_refused_where_the_entropy_is_a_constant() -> None:
    algo = AlgoConfig(entropy_coef=0.01)
    with pytest.raises(ConfigError, match=r"algo.entropy_coef is 0.01; it must be 0: .*Raise algo.noise_level"):
        training_sampler(FLOW, algo)
    training_sampler(DISTRIBUTION, algo)


def test_what_the_plain_ode_sampled_cannot_be_scored() -> None:
    with pytest.raises(ValueError, match=r"no log-probability; take training_sampler"):
        evaluation_sampler(FLOW).check(FLOW)


def test_the_kl_of_a_chunk_counts_its_valid_entries_alone() -> None:
    binary = torch.zeros(1, 1, 2, dtype=torch.bool)
    old = NormalBernoulli(torch.zeros(1, 2, 2), torch.zeros(1, 1, 2), binary)
    new = old._replace(location=torch.tensor([[[1.0, 5.0], [2.0, 5.0]]]))
    mask = torch.tensor([[[True, False], [True, False]]])
    data = TensorDict({"parameters": old.parameters(), "mask": mask}, batch_size=[1])
    # Half the squares of 1 and 2.
    assert DistributionSampler().kl(new.parameters(), data).tolist() == [2.5]
