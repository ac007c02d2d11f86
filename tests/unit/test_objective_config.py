"""Estimators and objectives that do not fit together are refused, with the option to change."""

import pytest

from rlvla.compose import compose
from rlvla.config import AlgoConfig, ConfigError, Estimator

GRPO = ["algo.estimator=grpo", "algo.group_size=8"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["algo.estimator=grpo"], r"algo.group_size is 1; it must be at least 2 with algo.estimator=grpo"),
        ([*GRPO, "algo.gae_lambda=0.9"], r"algo.gae_lambda is 0.9; .* algo.estimator=grpo has no critic. Take gae"),
        ([*GRPO, "algo.gamma=1"], "algo.gamma is 1.* has no critic"),
        ([*GRPO, "algo.value_hidden_sizes=[64]"], r"algo.value_hidden_sizes is \(64,\).* has no critic"),
        ([*GRPO, "algo.critic.pool=attention"], "algo.critic is .* has no critic"),
        ([*GRPO, "algo.critic_only_iterations=3"], "algo.critic_only_iterations is 3.* has no critic"),
        ([*GRPO, "episodes_per_iteration=20"], r"algo.group_size is 8; it must be a divisor of episodes_per_iteration"),
        (["algo.min_group_success=0.1"], "algo.min_group_success is 0.1 .* 0 and 1 unless"),
        ([*GRPO, "algo.min_group_success=0.9", "algo.max_group_success=0.1"], "increasing"),
        (["algo.objective=clone"], "algo.estimator is gae with algo.objective=clone.* success or best_of_n"),
        (["algo.estimator=success"], "algo.estimator is success with algo.objective=ppo"),
        (["algo.objective=nft", "algo.reduction=sum"], "algo.reduction is sum; it must be elementwise"),
        (["algo.objective=nft", "algo.clip_epsilon_high=0.3"], "algo.clip_epsilon_high is 0.3.* no ratio"),
        (["algo.objective=nft", "algo.match_clip=true"], "algo.match_clip is True; it must be false"),
        (["algo.objective=fpo", "algo.sampler.process=learned"], "algo.objective is fpo; it must be ppo where"),
        (["algo.objective=nft", "algo.sampler.kind=latent"], "algo.objective is nft; it must be ppo where the noise"),
        (["algo.sampler.kind=latent", "algo.demonstrations.dataset=d"], "algo.demonstrations.dataset is d"),
        (["algo.forward.draws=4"], "algo.forward is .* left out with algo.objective=ppo"),
        (["algo.estimator=reinforce_pp", "algo.normalize_advantage=false"], "algo.normalize_advantage is False"),
        (["algo.objective=fpo", "schedule=async"], "algo.objective is fpo; it must be ppo with schedule=async"),
        (["algo.demonstrations.dataset=d", "learners.num=2"], "algo.demonstrations.dataset is d; it must be null"),
        (["safeguard.enabled=true", "save_every=2"], "safeguard.enabled is True; it must be false unless save_every=1"),
        (["safeguard.enabled=true", "schedule=async"], "safeguard.enabled is True"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_cure(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compose("train", ["policy=p", *words])


@pytest.mark.parametrize("estimator", list(Estimator))
def test_every_estimator_has_a_setting_that_is_accepted(estimator: Estimator) -> None:
    words = [f"algo.estimator={estimator.value}"]
    words += ["algo.group_size=8"] if estimator in (Estimator.grpo, Estimator.rloo, Estimator.best_of_n) else []
    words += ["algo.objective=clone"] if estimator in (Estimator.success, Estimator.best_of_n) else []
    algo = compose("train", ["policy=p", *words]).algo
    assert algo.has_critic == (estimator is Estimator.gae)


def test_without_an_option_the_objective_is_ppo_with_a_critic() -> None:
    assert (AlgoConfig().objective.value, AlgoConfig().estimator.value, AlgoConfig().group_size) == ("ppo", "gae", 1)
