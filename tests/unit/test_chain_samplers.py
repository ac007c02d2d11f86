"""Every sampler of a flow: what it stores it can score, what it learns travels with the policy, and what is refused."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torch.distributions import Normal, kl_divergence

from rlvla.acting import Actor, Thought
from rlvla.chain_samplers import ChainSampler, LatentSampler, LearnedChainSampler
from rlvla.config import AlgoConfig, ConfigError, LoraConfig, SamplerConfig, TrainConfig
from rlvla.config.algo import TeacherConfig
from rlvla.config.sampler import NoiseSchedule, Process, SamplerKind
from rlvla.learner import Learner
from rlvla.policies.base import ValueHead, context_is_fixed, trained_groups
from rlvla.policies.exploration import FILE, GROUP, add_explorer, load_explorer
from rlvla.policies.folder import load_policy, load_weights, save_policy
from rlvla.policies.policy import PolicyWithFlow
from rlvla.policies.qwen_vla import QwenVLA
from rlvla.samplers import FlowSampler, evaluation_sampler, training_sampler
from rlvla_algos.flow import flow_sde_schedule
from rlvla_algos.schedules import cps_schedule, sde_schedule
from rlvla_envs.base import Observation, VecEnv

KINDS: dict[str, dict[str, Any]] = {
    "one_step": {},
    "constant": {"schedule": "constant"},
    "window": {"kind": "window"},
    "all_steps": {"kind": "all_steps"},
    "cps": {"process": "cps"},
    "cps_all": {"kind": "all_steps", "process": "cps", "schedule": "cosine"},
    "learned": {"kind": "all_steps", "process": "learned"},
    "latent": {"kind": "latent"},
}


def algo_of(name: str, **changes: Any) -> AlgoConfig:
    enums = {"kind": SamplerKind, "process": Process, "schedule": NoiseSchedule}
    given = {key: enums[key](value) if key in enums else value for key, value in KINDS[name].items()}
    return AlgoConfig(sampler=SamplerConfig(**given), **changes)


@pytest.fixture
def make(make_policy: Callable[..., QwenVLA], make_toy: Callable[..., VecEnv]) -> Callable[..., QwenVLA]:
    def made(algo: AlgoConfig) -> QwenVLA:
        policy = make_policy("qwen_vla_toy", make_toy(1).spec)
        add_explorer(policy, algo)
        if policy.explorer is not None:
            with torch.no_grad():
                # Not what it starts with, which would be the same for every row.
                policy.explorer.layers[-1].weight.normal_(std=0.5)  # type: ignore[operator,union-attr]
        return policy

    return made


@pytest.fixture
def observation(make_toy: Callable[..., VecEnv]) -> Observation:
    return make_toy(5).reset(range(5), range(5))


def decide(policy: QwenVLA, algo: AlgoConfig, observation: Observation, temperature: float = 1.0) -> Thought:
    rngs = [np.random.default_rng(row) for row in range(len(observation))]
    actor = Actor(policy, block=4, device="cpu")
    return actor.decide(observation, rngs, temperature=temperature, sampler=training_sampler(policy, algo))


def stored_of(policy: QwenVLA, thought: Thought) -> TensorDict:
    data = thought.decision.stored.clone()
    data["mask"] = policy.action_mask().expand(len(data), -1, -1).clone()
    data["mask"][0, -1] = False
    return data


def test_the_default_is_the_sampler_it_was(make: Callable[..., QwenVLA]) -> None:
    policy = make(AlgoConfig())
    sampler = training_sampler(policy, AlgoConfig())
    assert type(sampler) is FlowSampler
    assert sampler.schedule is not None
    for one, other in zip(sampler.schedule, flow_sde_schedule(policy.num_denoising_steps, 0.5), strict=True):
        assert torch.equal(one, other)
    assert policy.explorer is None
    assert set(policy.parameter_groups()) == {"vlm", "expert"}


def test_each_kind_has_its_steps_and_its_schedule(make: Callable[..., QwenVLA]) -> None:
    policy = make(AlgoConfig())
    steps = policy.num_denoising_steps
    samplers: dict[str, Any] = {name: training_sampler(policy, algo_of(name)) for name in KINDS}
    assert samplers["window"].window == 2
    assert samplers["window"].starts == tuple(range(steps - 1))
    assert (samplers["all_steps"].window, samplers["all_steps"].starts) == (steps, (0,))
    # The last step of CPS has no noise.
    assert (samplers["cps"].window, samplers["cps"].starts) == (1, tuple(range(steps - 1)))
    assert (samplers["cps_all"].window, samplers["cps_all"].starts) == (steps - 1, (0,))
    assert torch.equal(samplers["cps_all"].schedule.std, cps_schedule(steps, 0.5, "cosine").std)
    assert torch.equal(samplers["constant"].schedule.std, sde_schedule(steps, 0.5, "constant").std)
    kinds = {name: type(sampler) for name, sampler in samplers.items()}
    assert (kinds["learned"], kinds["latent"]) == (LearnedChainSampler, LatentSampler)
    assert all(kinds[name] is ChainSampler for name in ("window", "all_steps", "cps", "cps_all"))


@pytest.mark.parametrize("name", KINDS)
def test_what_was_stored_is_scored_as_it_was_drawn(
    name: str, make: Callable[..., QwenVLA], observation: Observation
) -> None:
    algo = algo_of(name)
    policy, sampler = make(algo), training_sampler(make(algo), algo)
    sampler.check(policy)
    thought = decide(policy, algo, observation)
    data = stored_of(policy, thought)
    new = sampler.score(policy, thought.context, data)
    torch.testing.assert_close(new.log_prob, data["log_prob"], rtol=1e-4, atol=1e-4)
    parameters = {key: value.detach() for key, value in new.parameters.items()}
    assert float((sampler.gap(parameters, data) * data["mask"]).max()) < 1e-4
    assert float(sampler.kl(parameters, data).abs().max()) < 1e-6
    sampler.recentre(data, parameters)
    assert float(sampler.kl(parameters, data).abs().max()) == 0
    # Some weight that is trained reaches the ratio.
    names = trained_groups(policy, False)
    trained = [p for group in names for p in policy.parameter_groups()[group]]
    gradients = torch.autograd.grad((new.log_prob * data["mask"]).sum(), trained, allow_unused=True)
    assert any(gradient is not None and bool(gradient.any()) for gradient in gradients)


@pytest.mark.parametrize("name", ["learned", "latent"])
def test_learned_noise_has_the_log_probability_kl_and_entropy_of_torch_distributions(
    name: str, make: Callable[..., QwenVLA], observation: Observation
) -> None:
    algo = algo_of(name)
    policy = make(algo)
    sampler = training_sampler(policy, algo)
    thought = decide(policy, algo, observation)
    data = stored_of(policy, thought)
    with torch.no_grad():
        for parameter in policy.explorer.parameters():  # type: ignore[union-attr]
            parameter.add_(0.05)
        new = sampler.score(policy, thought.context, data)
    if name == "learned":
        old, now = Normal(data["mean"], data["std"]), Normal(new.parameters["mean"], new.parameters["std"])
        drawn = data["states"][:, 1:]
        expected = now.log_prob(drawn).sum(dim=1), kl_divergence(old, now).sum(dim=1), now.entropy().sum(dim=1)
    else:
        stored = data["parameters"]
        old = Normal(stored["location"], stored["log_std"].exp())
        now = Normal(new.parameters["location"], new.parameters["log_std"].exp())
        expected = now.log_prob(data["sample"]), kl_divergence(old, now), now.entropy()
    torch.testing.assert_close(new.log_prob, expected[0], rtol=1e-4, atol=1e-4)
    kl = (expected[1] * data["mask"]).sum(dim=(1, 2))
    assert bool((kl > 0).all())
    torch.testing.assert_close(sampler.kl(new.parameters, data), kl, rtol=1e-3, atol=1e-5)
    assert new.entropy is not None
    torch.testing.assert_close(new.entropy.expand_as(expected[2]), expected[2], rtol=1e-4, atol=1e-4)


def test_learned_deviations_keep_their_bounds_whatever_the_weights(
    make: Callable[..., QwenVLA], observation: Observation
) -> None:
    algo = algo_of("learned")
    policy = make(AlgoConfig())
    add_explorer(policy, algo)
    start = decide(policy, algo, observation).decision.stored["std"]
    torch.testing.assert_close(start, torch.full_like(start, (0.08 * 0.24) ** 0.5))
    with torch.no_grad():
        policy.explorer.layers[-1].bias.copy_(  # type: ignore[union-attr,operator]
            torch.linspace(-50, 50, policy.horizon * policy.channels)
        )
    std = decide(policy, algo, observation).decision.stored["std"]
    assert float(std.min()) == pytest.approx(0.08, rel=1e-3)
    assert float(std.max()) == pytest.approx(0.24, rel=1e-3)


def test_an_untrained_latent_head_acts_as_the_flow_alone_does(
    make: Callable[..., QwenVLA], observation: Observation
) -> None:
    algo = algo_of("latent")
    policy = make(AlgoConfig())
    rngs = [[np.random.default_rng(row) for row in range(5)] for _ in range(2)]
    actor = Actor(policy, block=4, device="cpu")
    plain = actor.decide(observation, rngs[0], temperature=0.6, sampler=FlowSampler(None))
    add_explorer(policy, algo)
    assert isinstance(evaluation_sampler(policy), LatentSampler)
    headed = actor.decide(observation, rngs[1], temperature=0.6)
    np.testing.assert_allclose(headed.decision.action, plain.decision.action, atol=1e-5)


def test_at_temperature_zero_the_latent_policy_takes_the_heads_mean(
    make: Callable[..., QwenVLA], observation: Observation
) -> None:
    algo = algo_of("latent")
    policy = make(algo)
    one, other = (decide(policy, algo, observation, temperature=0.0).decision for _ in range(2))
    mean = one.stored["parameters", "location"]
    assert bool(mean.any())
    torch.testing.assert_close(one.stored["sample"], mean * policy.noise_mask())
    np.testing.assert_array_equal(one.action, other.action)


def test_evaluations_never_ask_the_noise_network(make: Callable[..., QwenVLA], observation: Observation) -> None:
    policy = make(algo_of("learned"))
    assert evaluation_sampler(policy) == FlowSampler(None)
    policy.explorer.forward = None  # type: ignore[union-attr,assignment]
    policy.explorer.layers = None  # type: ignore[union-attr,assignment]
    rngs = [np.random.default_rng(row) for row in range(5)]
    Actor(policy, block=4, device="cpu").decide(observation, rngs, temperature=0.6)


def learner_of(policy: PolicyWithFlow, algo: AlgoConfig) -> Learner:
    head = ValueHead(policy.value_size)
    return Learner(policy, head, algo, training_sampler(policy, algo), seed=0, total_iterations=1)


def test_a_noise_network_is_a_group_with_its_own_rate(make: Callable[..., QwenVLA]) -> None:
    algo = algo_of("learned", learning_rates={GROUP: 3e-3})
    policy = make(algo)
    assert trained_groups(policy, False) == ["expert", GROUP]
    rates = [group["lr"] for group in learner_of(policy, algo)._policy_optimizer.param_groups]
    assert rates == [algo.policy_lr, 3e-3]
    parameters = [id(p) for group in policy.parameter_groups().values() for p in group]
    assert sorted(parameters) == sorted(id(p) for p in policy.parameters())


def test_a_latent_policy_trains_its_head_alone_and_scores_without_the_expert(
    make: Callable[..., QwenVLA], observation: Observation
) -> None:
    algo = algo_of("latent")
    policy = make(algo)
    learner_of(policy, algo)
    assert trained_groups(policy, False) == [GROUP]
    assert context_is_fixed(policy, False)
    assert {name.split(".")[0] for name, p in policy.named_parameters() if p.requires_grad} == {"explorer"}
    thought = decide(policy, algo, observation)

    def refuse(*_: Any) -> None:
        raise AssertionError("a pass of the expert")

    policy.velocity = refuse  # type: ignore[assignment,method-assign]
    training_sampler(policy, algo).score(policy, thought.context, stored_of(policy, thought))


@pytest.mark.parametrize("name", ["learned", "latent"])
def test_what_was_learned_for_exploring_survives_its_folder(
    name: str, make: Callable[..., QwenVLA], tmp_path: Path
) -> None:
    algo = algo_of(name)
    policy = make(algo)
    save_policy(policy, tmp_path / "policy")
    loaded = load_policy(tmp_path / "policy")
    fresh = make(algo)
    load_weights(fresh, tmp_path / "policy" / "model.safetensors")
    for other in (loaded, fresh):
        found, expected = other.state_dict(), policy.state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)
    # Another run trains on.
    before = loaded.explorer  # type: ignore[attr-defined]
    add_explorer(loaded, algo)
    assert loaded.explorer is before  # type: ignore[attr-defined]


def test_a_damaged_file_of_what_was_learned_is_refused(make: Callable[..., QwenVLA], tmp_path: Path) -> None:
    save_policy(make(algo_of("latent")), tmp_path / "policy")
    file = tmp_path / "policy" / FILE
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(ValueError, match=r"exploration.safetensors is damaged"):
        load_explorer(file)


def test_a_noise_network_is_dropped_by_a_run_that_uses_none_and_a_latent_head_is_not(
    make: Callable[..., QwenVLA],
) -> None:
    policy = make(algo_of("learned"))
    add_explorer(policy, AlgoConfig())
    assert policy.explorer is None
    assert set(policy.parameter_groups()) == {"vlm", "expert"}
    with pytest.raises(ConfigError, match=r"algo.sampler.kind is one_step; it must be latent"):
        add_explorer(make(algo_of("latent")), AlgoConfig())


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"window": 0}, "algo.sampler.window is 0; it must be at least 1"),
        ({"window_start": 1}, "algo.sampler.window_start is 1; it must be null unless"),
        ({"kind": SamplerKind.latent, "process": Process.cps}, "algo.sampler.process is cps; it must be left out"),
        ({"process": Process.learned, "schedule": NoiseSchedule.cosine}, "algo.sampler.schedule is cosine"),
        ({"process": Process.cps, "schedule": NoiseSchedule.flow_grpo}, "constant or cosine with"),
        ({"min_std": 0.1}, "algo.sampler.min_std is 0.1; it must be null where no noise is learned"),
        ({"process": Process.learned, "min_std": 0.3}, r"min_std is 0.3; it must be below .*\(0.24\)"),
        ({"hidden_sizes": (0,)}, "algo.sampler.hidden_sizes"),
    ],
)
def test_a_sampler_that_cannot_be_is_refused_at_the_door(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        SamplerConfig(**given)


def test_what_does_not_go_with_a_sampler_is_refused() -> None:
    latent, cps = SamplerConfig(kind=SamplerKind.latent), SamplerConfig(process=Process.cps)
    for changes, said in (
        ({"sampler": cps, "noise_level": 1.2}, "algo.noise_level is 1.2; it must be at most 1"),
        ({"sampler": latent, "train_vlm": True}, "algo.train_vlm is True; it must be false"),
        (
            {"sampler": latent, "teacher": TeacherConfig(policy="start")},
            "algo.teacher.policy is start; it must be null",
        ),
    ):
        with pytest.raises(ConfigError, match=said):
            AlgoConfig(**changes)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="lora.rank is 2; it must be 0"):
        TrainConfig(algo=AlgoConfig(sampler=latent), lora=LoraConfig(rank=2))


def test_a_window_longer_than_the_chain_is_refused(make: Callable[..., QwenVLA]) -> None:
    policy = make(AlgoConfig())
    steps = policy.num_denoising_steps
    wide = AlgoConfig(sampler=SamplerConfig(kind=SamplerKind.window, window=steps + 1))
    with pytest.raises(ConfigError, match=f"algo.sampler.window is {steps + 1}; it must be at most {steps}"):
        training_sampler(policy, wide)
    late = AlgoConfig(sampler=SamplerConfig(kind=SamplerKind.window, window=2, window_start=steps - 1))
    with pytest.raises(ConfigError, match=f"algo.sampler.window_start is {steps - 1}; it must be at most {steps - 2}"):
        training_sampler(policy, late)


def test_a_policy_with_a_distribution_takes_no_sampler_of_a_flow() -> None:
    policy: Any = SimpleNamespace(distribution=lambda context: None)
    with pytest.raises(ConfigError, match="algo.sampler is not its default; it must be"):
        training_sampler(policy, algo_of("window"))
    training_sampler(policy, AlgoConfig())


def test_an_entropy_bonus_is_for_noise_that_is_learned(make: Callable[..., QwenVLA]) -> None:
    with pytest.raises(ConfigError, match="algo.entropy_coef is 0.01; it must be 0"):
        training_sampler(make(AlgoConfig()), algo_of("all_steps", entropy_coef=0.01))
    for name in ("learned", "latent"):
        training_sampler(make(algo_of(name)), algo_of(name, entropy_coef=0.01))
