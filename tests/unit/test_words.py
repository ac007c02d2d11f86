"""What a command line with several policies or suites means."""

from typing import Any

import pytest

from rlvla.compose import compose, describe, to_yaml
from rlvla.config import CompareConfig, ConfigError, EvaluateConfig, EvaluateSuitesConfig, SuitesConfig


def test_settings_of_all_suites_are_overruled_by_those_of_one() -> None:
    config: EvaluateSuitesConfig = compose(
        "eval", ["a", "b", "suites.toy.image_size=64", "suites=[toy,simpler_env]", "suite.image_size=40"]
    )
    assert config.policies == ("a", "b")
    assert {name: suite.image_size for name, suite in config.suites.items()} == {"toy": 64, "simpler_env": 40}
    assert config.suites["toy"].max_episode_steps == 32  # from its own file
    assert "image_size: 64" in to_yaml(config)


def test_one_policy_and_one_suite_are_the_evaluation_that_was_always_there() -> None:
    with_key: EvaluateConfig = compose("eval", ["policy=runs/a", "suite=toy"])
    assert compose("eval", ["runs/a", "suite=toy"]) == with_key
    assert isinstance(with_key, EvaluateConfig)
    assert with_key.eval.shuffled_images


def test_a_path_may_hold_what_hydra_would_read_as_grammar() -> None:
    config: CompareConfig = compose("compare", ["runs/a,b [1]", "before=runs/x=1", "after=c", "suites=[toy]"][1:])
    assert (config.before, config.after) == ("runs/x=1", "c")
    config = compose("compare", ["runs/a,b [1]", "~c", "suites=[toy]"])
    assert (config.before, config.after) == ("runs/a,b [1]", "~c")


def test_the_word_list_may_be_left_out() -> None:
    assert compose("suites", ["toy"]) == compose("suites", ["list", "toy"]) == SuitesConfig(names=("toy",))


@pytest.mark.parametrize(
    ("verb", "words", "said"),
    [
        ("eval", ["a", "b", "suite=toy"], r"Give suites=\[toy\]"),
        ("eval", ["suites=[toy]"], r"policies must be given: `rlvla eval POLICY"),
        ("eval", ["a", "a", "suites=[toy]"], "policies is .* different folders"),
        ("eval", ["a", "b"], "suites is empty"),
        ("eval", ["a", "suites=[toy]", "eval.shuffled_images=true"], "the probe belongs to `rlvla eval policy="),
        ("eval", ["a", "suites=[toy]", "suites=[toy]"], "names toy twice"),
        ("compare", ["a", "suites=[toy]"], "Give two"),
        ("compare", ["a", "b", "suites=[toyy]"], "Did you mean 'toy'"),
        ("compare", ["a", "b", "suites=[toy]", "suite.chunk=3"], "Did you mean 'suite.chunk_size'"),
        ("compare", ["a", "b", "suites=[toy]", "suites.push_cube.chunk_size=3"], "which suites does not name"),
        ("compare", ["a", "b", "suites=[toy]", "trained_on=[push_cube]"], "trained_on is"),
        ("suites", ["toyy"], "Did you mean 'toy'"),
        ("train", ["a"], "'a' is not of the form key=value"),
    ],
)
def test_what_means_nothing_is_refused_with_what_would(verb: str, words: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        compose(verb, words)


def test_help_describes_the_form_that_was_typed() -> None:
    keys: Any = {key for key, _, _ in describe("eval", ["suites=[toy]"])}
    assert {"suites", "cache", "policies"} <= keys
    assert "suite.name" in {key for key, _, _ in describe("eval")}
