"""The door: every YAML composes, and what a user gets wrong is refused with the value and the cure."""

import dataclasses
import re
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from rlvla.compose import (
    SCHEMAS,
    compose,
    config_dir,
    describe,
    describe_schema,
    group_choices,
    policy_config_from_dict,
    to_yaml,
)
from rlvla.config import (
    AlgoConfig,
    ConfigError,
    EvaluateConfig,
    Reduction,
    SFTConfig,
    TrainConfig,
    WorkerKind,
)
from rlvla.policies.architectures import architecture
from rlvla.policies.qwen_vla import QwenVLAConfig
from rlvla.tune_space import parse_space
from rlvla_envs.base import SuiteConfig
from rlvla_envs.suites import SUITES

REQUIRED = {
    "train": ["policy=p"],
    "tune": ["policy=p"],
    "eval": ["policy=p"],
    "eval_suites": ["p", "suites=[toy]"],
    "compare": ["p", "q", "suites=[toy]"],
    "sft": ["dataset=d"],
    "forgetting": ["before=p", "after=q", "questions=f"],
    "collect": [],
    "suites": [],
    "doctor": [],
    "import": ["format=lerobot", "checkpoint=c", "output=o"],
    "export": ["policy=p", "output=o"],
    "serve": ["policy=p"],
}
"""What each verb cannot do without."""
OBVIOUS = {"seed", "device", "task", "name", "weight_decay", "max_grad_norm", "warmup_steps", "beta_beta"}
OBVIOUS |= {"first_steps_weight"}  # first_steps, the line above it, says what both are for
FILES = sorted(config_dir().rglob("*.yaml"))


def refusal(verb: str, *overrides: str) -> str:
    """What a user reads, given otherwise complete options."""
    with pytest.raises(ValueError, match=r".") as caught:
        compose(verb, [*REQUIRED[verb], *overrides])
    return str(caught.value)


def validate(verb: str, override: str) -> None:
    """What `compose` does with a value, without the YAML: Hydra takes a tenth of a second."""
    config = OmegaConf.structured(SCHEMAS[verb])
    if verb == "sft":
        config.policy = OmegaConf.structured(QwenVLAConfig)
    OmegaConf.to_object(OmegaConf.merge(config, OmegaConf.from_dotlist([*REQUIRED[verb], override])))


# --- what composes


@pytest.mark.parametrize("verb", SCHEMAS)
def test_every_verb_composes_with_its_default_suite(verb: str) -> None:
    config = compose(verb.removesuffix("_suites"), REQUIRED[verb])
    assert type(config) is SCHEMAS[verb]
    data = yaml.safe_load(to_yaml(config))
    assert set(data) == {field.name for field in dataclasses.fields(config)}
    if hasattr(config, "suite"):
        assert config.suite.name in SUITES
        assert data["suite"]["chunk_size"] == config.suite.chunk_size


@pytest.mark.parametrize("suite", group_choices("collect")["suite"])
def test_every_suite_composes(suite: str) -> None:
    config = compose("collect", [f"suite={suite}"])
    assert type(config.suite) is SuiteConfig
    assert config.suite.name in SUITES
    assert config.suite.max_episode_steps >= config.suite.chunk_size


@pytest.mark.parametrize("plus", ["", "+", "++"])
def test_mappings_take_new_entries_with_or_without_hydras_plus(plus: str) -> None:
    overrides = [f"{plus}suite.options.shader=default", f"{plus}task_weights.gate=2", "policy=p"]
    config = compose("train", ["suite=push_cube", *overrides])
    assert config.suite.options["shader"] == "default"
    # What the YAML has stays.
    assert "camera" in config.suite.options
    assert config.task_weights == {"gate": 2.0}
    assert compose("train", ["policy=p", "task_weights={a: 1, b: 2}"]).task_weights == {"a": 1.0, "b": 2.0}


@pytest.mark.parametrize("policy", group_choices("sft")["policy"])
def test_every_policy_composes_for_sft_and_fits_a_chunk_of_eight(policy: str) -> None:
    config = compose("sft", ["dataset=d", f"policy={policy}"])
    assert type(config.policy) is architecture(config.policy.name).config
    horizons = [int(value) for key, value, _ in describe("sft", ["dataset=d", f"policy={policy}"]) if "horizon" in key]
    assert all(horizon >= 8 for horizon in horizons)  # one without has the chunk of its suite


def test_every_verb_has_a_yaml_and_every_group_file_is_offered() -> None:
    top = {file.stem for file in config_dir().glob("*.yaml")}
    assert set(SCHEMAS) <= top
    groups = {group: set(names) for verb in SCHEMAS for group, names in group_choices(verb).items()}
    for group in ("suite", "policy", "stage"):
        assert groups[group] == {file.stem for file in (config_dir() / group).glob("*.yaml")}


def test_overrides_reach_their_field_with_the_fields_type() -> None:
    config = compose(
        "train",
        [
            "policy=runs/my sft/policy",
            "suite=toy",
            "algo.reduction=sum",
            "algo.value_clip=null",
            "algo.value_hidden_sizes=[64,32]",
            "workers.kind=local",
            "suite.chunk_size=4",
        ],
    )
    assert config.policy == "runs/my sft/policy"
    assert config.algo.reduction is Reduction.sum
    assert config.algo.value_clip is None
    assert config.algo.value_hidden_sizes == (64, 32)
    assert config.workers.kind is WorkerKind.local
    assert (config.suite.name, config.suite.chunk_size) == ("toy", 4)


def test_defaults_are_the_dataclasses() -> None:
    assert compose("train", ["policy=p"]).algo == AlgoConfig()
    assert compose("eval", ["policy=p"]).eval == EvaluateConfig(policy="p").eval


def test_composing_twice_gives_the_same_and_shares_nothing() -> None:
    first = compose("train", ["policy=p", "algo.epochs=3"])
    second = compose("train", ["policy=p"])
    assert first.algo.epochs == 3
    assert second.algo.epochs == AlgoConfig().epochs
    assert first.suite is not second.suite


def test_a_policys_configuration_survives_its_folder() -> None:
    config = compose("sft", ["dataset=d", "policy=qwen_vla_toy"]).policy
    data = yaml.safe_load(to_yaml(config))
    assert policy_config_from_dict(data) == config
    data["expert"]["hidden_sizes"] = 3
    with pytest.raises(ConfigError, match="hidden_sizes"):
        policy_config_from_dict(data)


# --- what is refused


def test_composing_checks_the_values() -> None:
    assert (
        refusal("train", "algo.clip_epsilon=3")
        == "algo.clip_epsilon is 3.0; it must be in (0, 1). Typical: 0.1 to 0.3."
    )


@pytest.mark.parametrize(
    ("verb", "override", "said"),
    [
        ("train", "algo.clip_epsilonn=0.3", "'algo.clip_epsilonn' is not an option of `rlvla train`. Did you mean"),
        ("train", "algo.clip_epsilonn=0.3", "'algo.clip_epsilon'"),
        ("train", "epochs=3", "Did you mean 'algo.epochs'?"),
        ("sft", "policy.expert.hiden=97", "Did you mean 'policy.expert.hidden_size'?"),
        ("eval", "eval.trails=9", "Did you mean 'eval.trials'?"),
        ("eval", "task_weights.gate=1", "is not an option of `rlvla eval`"),
        ("eval", "algo.epochs=3", "'algo.epochs' is not an option of `rlvla eval`"),
        ("collect", "qqq=1", "See --help for all of them."),
        ("doctor", "deadline=1", "Did you mean 'deadline_s'?"),
        ("doctor", "algo.clip_epsilonn=0.3", "Did you mean 'algo.clip_epsilon'?"),
    ],
)
def test_an_unknown_key_is_refused_and_the_nearest_suggested(verb: str, override: str, said: str) -> None:
    assert said in refusal(verb, override)


@pytest.mark.parametrize("prefix", ["+", "++"])
def test_a_new_key_cannot_be_smuggled_in(prefix: str) -> None:
    assert "'algo.extra' is not an option" in refusal("train", f"{prefix}algo.extra=1")


@pytest.mark.parametrize("override", ["~algo.epochs", "--epochs", "algo.epochs"])
def test_what_is_not_key_equals_value_is_refused(override: str) -> None:
    assert f"{override!r} is not of the form key=value. See `rlvla train --help`" in refusal("train", override)


def test_an_option_cannot_be_deleted() -> None:
    assert "~algo.epochs=8" in refusal("train", "~algo.epochs=8")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("algo.clip_epsilon=abc", "algo.clip_epsilon=abc: Value 'abc' .* could not be converted to Float"),
        ("algo.epochs=1.5", "algo.epochs=1.5: Value '1.5' .* could not be converted to Integer"),
        ("algo.train_vlm=perhaps", "algo.train_vlm=perhaps: Value 'perhaps' is not a valid bool"),
        ("algo.reduction=median", r"'median', expected one of \[elementwise, sum, mean, sqrt\]"),
        ("workers.kind=slurm", r"'slurm', expected one of \[ray, local\]"),
    ],
)
def test_a_wrong_type_is_refused_with_key_value_and_what_it_must_be(override: str, said: str) -> None:
    assert re.search(said, refusal("train", override))


@pytest.mark.parametrize(
    ("verb", "override", "value", "cure"),
    [
        ("train", "algo.clip_epsilon=3", "3.0", "in (0, 1). Typical: 0.1 to 0.3"),
        ("train", "algo.clip_epsilon=0", "0.0", "in (0, 1)"),
        ("train", "algo.noise_level=0", "0.0", "positive. Typical: 0.3 to 0.7"),
        ("train", "algo.sampler.window=0", "0", "at least 1"),
        ("train", "algo.sampler.max_std=0", "0.0", "positive and finite, or null"),
        ("train", "algo.gamma=1.01", "1.01", "in [0, 1]"),
        ("train", "algo.gamma=nan", "nan", "in [0, 1]"),
        ("train", "algo.gae_lambda=-0.1", "-0.1", "in [0, 1]"),
        ("train", "algo.epochs=0", "0", "at least 1"),
        ("train", "algo.minibatch_size=1", "1", "at least 2"),
        ("train", "algo.target_kl=0", "0.0", "positive. Typical: 0.05 to 0.3"),
        ("train", "algo.final_target_kl=0.2", "0.2", "in (0, algo.target_kl] (now 0.1), or null"),
        ("train", "algo.value_clip=0", "0.0", "positive, or null"),
        ("train", "algo.policy_lr=0", "0.0", "positive"),
        ("train", "algo.value_lr=nan", "nan", "positive"),
        ("train", "algo.max_grad_norm=-1", "-1.0", "positive"),
        ("train", "algo.entropy_coef=-0.01", "-0.01", "0 or more"),
        ("train", "iterations=-1", "-1", "0 or more"),
        ("train", "episodes_per_iteration=0", "0", "at least 1"),
        ("train", "save_every=0", "0", "at least 1"),
        ("train", "keep_checkpoints=0", "0", "at least 1"),
        ("train", "max_minutes=0", "0.0", "positive"),
        ("train", "inference_batch=0", "0", "at least 1"),
        ("train", "device=gpu", "gpu", "auto, cpu, cuda or cuda:N"),
        ("train", "workers.num_actors=-1", "-1", "0 (one per core) or more"),
        ("train", "workers.envs_per_actor=0", "0", "at least 1"),
        ("train", "workers.timeout_s=0", "0.0", "positive"),
        ("train", "workers.start_timeout_s=0", "0.0", "positive"),
        ("train", "workers.max_restarts_per_hour=-1", "-1", "0 or more"),
        ("train", "workers.quarantine_after=0", "0", "at least 1"),
        ("train", "max_staleness=0", "0", "at least 1"),
        ("train", "learners.num=0", "0", "at least 1"),
        ("train", "learners.num=257", "257", "at most episodes_per_iteration (now 256)"),
        ("train", "learners.timeout_s=0", "0.0", "positive"),
        ("train", "learners.max_restarts=-1", "-1", "0 or more"),
        ("eval", "eval.trials=0", "0", "at least 1; 200 for a claim"),
        ("eval", "eval.noise_seeds=0", "0", "at least 1"),
        ("train", "task_weights.gate=-1", "-1.0", "0 or more and finite"),
        ("eval", "eval.temperature=-1", "-1.0", "0 or more"),
        ("eval", "eval.videos=-1", "-1", "0 or more"),
        ("eval", "eval.every=-1", "-1", "0 (never) or more"),
        ("eval", "suite.chunk_size=0", "0", "at least 1. Usual: 8 or 16"),
        ("eval", "suite.max_episode_steps=0", "0", "at least 1"),
        ("eval", "suite.num_evaluation_states=2000000", "2000000", "in [1, 1000000]"),
        ("collect", "episodes=0", "0", "at least 1"),
        ("doctor", "deadline_s=0", "0.0", "positive and finite"),
        ("doctor", "device_memory_gb=80", "80.0", "null without policy=: there is no run to plan"),
        ("doctor", "host_memory_gb=-1", "-1.0", "positive and finite, or null"),
        ("doctor", "episodes_per_iteration=0", "0", "at least 1"),
        ("sft", "steps=0", "0", "at least 1"),
        ("sft", "batch_size=0", "0", "at least 1"),
        ("sft", "noise_draws=0", "0", "at least 1"),
        ("sft", "lr=0", "0.0", "positive. Usual: 1e-3 tiny, 5e-5 large"),
        ("sft", "first_steps_weight=0", "0.0", "positive"),
        ("sft", "ema_decay=1", "1.0", "in (0, 1), or null"),
    ],
)
def test_an_impossible_value_is_refused_with_the_value_and_the_cure(
    verb: str, override: str, value: str, cure: str
) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        validate(verb, override)
    said, key = str(caught.value), override.partition("=")[0]
    assert said.startswith(f"{key} is {value}; it must ")
    assert cure in said


@pytest.mark.parametrize(
    ("verb", "override", "said"),
    [
        ("train", "suite=pushcube", "suite is 'pushcube'; choose one of .* Did you mean 'push_cube'?"),
        ("sft", "policy=llama", "policy is 'llama'; choose one of .*qwen_vla_tiny"),
        ("sft", "policy.name=llama", "policy.name is 'llama'; it must be 'qwen_vla' .*there are: qwen_vla"),
        ("sft", "policy.expert.hidden_size=97", "policy.expert.hidden_size is 97, which 3 heads do not divide"),
        ("sft", "beta_alpha=0", "beta_alpha, beta_beta is .*; it must be positive"),
    ],
)
def test_a_choice_that_does_not_exist_is_refused_with_those_that_do(verb: str, override: str, said: str) -> None:
    assert re.match(said, refusal(verb, override))


@pytest.mark.parametrize(("verb", "key"), [("train", "policy"), ("eval", "policy"), ("sft", "dataset")])
def test_a_missing_mandatory_value_is_named(verb: str, key: str) -> None:
    with pytest.raises(ConfigError, match=rf"{key} must be given: `rlvla {verb} {key}=PATH`"):
        compose(verb, [])


def test_a_policy_folder_is_not_a_group_outside_sft() -> None:
    assert compose("train", ["policy=qwen_vla_tiny"]).policy == "qwen_vla_tiny"


@pytest.mark.parametrize(
    ("verb", "override"),
    [
        ("train", "seed=-1"),
        ("train", "algo.value_coef=-1"),
        ("train", "algo.min_successes=-1"),
        ("train", "algo.critic_only_iterations=-1"),
        ("train", "algo.kl_stop_factor=0"),
        ("train", "algo.mean_tolerance=0"),
        ("train", "algo.ratio_tolerance=0"),
        ("train", "algo.policy_lr=inf"),
        ("train", "algo.max_policy_lr=1e-9"),
        ("train", "algo.value_hidden_sizes=[0]"),
        ("train", "suite.image_size=0"),
        ("train", "compute.attention=flash"),
        ("sft", "policy.num_denoising_steps=0"),
        ("sft", "warmup_steps=-1"),
        ("sft", "weight_decay=-1"),
        ("sft", "max_grad_norm=0"),
        ("sft", "state_noise=-1"),
        ("sft", "first_steps=-1"),
    ],
)
def test_no_other_impossible_value_passes(verb: str, override: str) -> None:
    with pytest.raises(ValueError, match=re.escape(override.partition("=")[0])):
        validate(verb, override)


# --- help


@pytest.mark.parametrize("verb", SCHEMAS)
def test_help_has_every_field_with_a_sentence_or_an_obvious_name(verb: str) -> None:
    described = {key: meaning for key, _, meaning in describe_schema(SCHEMAS[verb])}
    assert set(described) == set(leaf_keys(SCHEMAS[verb]()))
    silent = {key for key, meaning in described.items() if not meaning and key.rsplit(".", 1)[-1] not in OBVIOUS}
    assert not silent


def test_help_shows_what_a_command_would_run_with() -> None:
    shown = {key: value for key, value, _ in describe("train", ["suite=pick_cube", "algo.gamma=0.5"])}
    assert shown["policy"] == "required"
    assert shown["algo.clip_epsilon"] == "0.2"
    assert shown["algo.reduction"] == "elementwise"
    assert shown["workers.kind"] == "ray"
    # From the suite's YAML and from the command line, not from the dataclass.
    assert shown["suite.task"] == "PickCube-v1"
    assert shown["algo.gamma"] == "0.5"


def test_help_of_sft_has_the_options_of_the_chosen_policy() -> None:
    shown = {key: value for key, value, _ in describe("sft", ["policy=qwen_vla_4b"])}
    assert "policy" not in shown
    assert shown["policy.vlm.hidden_size"] == "2560"
    assert shown["dataset"] == "required"


def leaf_keys(config: Any, prefix: str = "") -> list[str]:
    keys: list[str] = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            keys += leaf_keys(value, f"{prefix}{field.name}.")
        else:
            keys.append(f"{prefix}{field.name}")
    return keys


# --- YAML


@pytest.mark.parametrize("file", FILES, ids=[str(f.relative_to(config_dir())) for f in FILES])
def test_a_yaml_holds_only_keys_of_its_schema(file: Path) -> None:
    schemas: dict[str, Any] = {"suite": SuiteConfig, "stage": SFTConfig}
    group = file.parent.name if file.parent != config_dir() else ""
    if group == "recipe":
        for verb, overrides in yaml.safe_load(file.read_text()).items():
            compose(
                verb, [*overrides, *{"sft": ["dataset=x"], "train": ["policy=x"], "eval": ["policy=x"]}.get(verb, [])]
            )
        return
    if group == "space":
        parse_space(yaml.safe_load(file.read_text()), file.stem)
        return
    data = yaml.safe_load(file.read_text()) or {}
    if group == "policy":
        (base,) = [name for name in data["defaults"] if name.startswith("base_")]
        schemas["policy"] = architecture(base.removeprefix("base_")).config
    data.pop("defaults", None)
    assert_keys(data, schemas[group]() if group else SCHEMAS[file.stem](), file.stem)


def assert_keys(data: dict[str, Any], schema: Any, where: str) -> None:
    known = {field.name for field in dataclasses.fields(schema)}
    assert set(data) <= known, f"{where} has {sorted(set(data) - known)}"
    for key, value in data.items():
        inner = getattr(schema, key)
        if dataclasses.is_dataclass(inner):
            assert_keys(value, inner, f"{where}.{key}")


def test_names_and_values_of_enumerations_are_one() -> None:
    # Hydra reads names, the code writes values: two spellings of one choice would both half work.
    for schema in (TrainConfig, SFTConfig):
        for key, _, _ in describe_schema(schema):
            value: Any = schema()
            for part in key.split("."):
                value = getattr(value, part)
            if isinstance(value, Enum):
                assert all(member.name == member.value for member in type(value))


def test_blocks_are_not_compiled_for_a_copy_that_would_run_them_uncompiled() -> None:
    with pytest.raises(ConfigError, match=r"compute.compile.*schedule=async"):
        compose("train", ["policy=x", "schedule=async", "compute.compile=true"])
