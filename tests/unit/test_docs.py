"""The documentation says what the code does: its links lead somewhere, its commands run, its tables are complete."""

import ast
import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from rlvla.cli import VERBS
from rlvla.compose import compose
from rlvla_envs.base import FIRST_TRAINING_STATE, SuiteConfig, VecEnv

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    [
        *(
            ROOT / name
            for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "algos/README.md", "envs/README.md")
        ),
        *(ROOT / "docs").rglob("*.md"),
    ]
)
SOURCES = [p for d in ("rlvla", "algos", "envs", "configs", "scripts") for p in (ROOT / d).rglob("*.*")]
METRICS = ROOT / "docs/metrics.md"
LOGGING = [
    ROOT / "rlvla" / f"{name}.py"
    for name in (
        "train",
        "iteration_row",
        "clock",
        "learner",
        "judging",
        "reasoning",
        "samplers",
        "sft",
        "run",
        "evaluate",
        "collect",
    )
]

FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[((?:[^\[\]`]|`[^`]*`)*)\]\(([^()\s]+)\)")
METRIC = re.compile(r"(?:rollout|ppo|loss|value|optim|time|speed|memory)/\w+")

STAND_INS = {
    "suite=mysuite": "suite=toy",
    "policy=mypolicy": "policy=qwen_vla_toy",
    "@runs/tune/best.yaml": f"@{ROOT / 'configs/recipe/push_cube.yaml'}",
}
"""Files that the how-to guides tell the reader to write -> ones that exist."""
REQUIRED = {
    "sft": "dataset=PATH",
    "train": "policy=PATH",
    "tune": "policy=PATH",
    "eval": "policy=PATH",
    "import": "format=NAME checkpoint=PATH output=PATH",
    "export": "policy=PATH output=PATH",
    "serve": "policy=PATH",
}
NAMED = {"compare": ["BEFORE", "AFTER"]}
"""Words without a key that have to be given."""


def ids(page: Path) -> str:
    return str(page.relative_to(ROOT))


def prose(page: Path) -> str:
    """The page without its code blocks."""
    return FENCE.sub("", page.read_text())


def anchors(page: Path) -> set[str]:
    """The anchors GitHub gives to a page's headings."""
    found: list[str] = []
    for heading in re.findall(r"^#+ +(.*)$", prose(page), re.MULTILINE):
        text = LINK.sub(r"\1", heading).replace("`", "").strip().lower()
        slug = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
        found.append(f"{slug}-{n}" if (n := found.count(slug)) else slug)
    return set(found)


def commands(page: Path) -> Iterator[tuple[str, list[str]]]:
    """(verb, words after it) of every `rlvla VERB ...` on a page, in a block or in a sentence."""
    text = page.read_text()
    lines = [line for _, block in FENCE.findall(text) for line in re.sub(r"\\\n\s*", " ", block).splitlines()]
    lines += re.findall(r"`([^`\n]+)`", FENCE.sub("", text))
    for line in lines:
        match = re.match(r"(?:\$ )?(?:\S*/)?rlvla ([a-z]+)( .*)?$", line.strip())
        if match and "..." not in line:
            yield match[1], shlex.split(match[2] or "", comments=True)


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def logged_keys() -> set[str]:
    """Every key of metrics.jsonl: names with a group, and the keys of dictionaries that have a "kind"."""
    found: set[str] = set()
    for path in LOGGING:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and METRIC.fullmatch(node.value):
                found.add(node.value.replace("ppo/kl_step_", "ppo/kl_step_k"))
            elif isinstance(node, ast.Dict):
                keys = {k.value for k in node.keys if isinstance(k, ast.Constant)}
                found |= {str(k) for k in keys} if "kind" in keys else set()
    return found


def test_the_configuration_reference_is_what_its_script_writes() -> None:
    writer = script("write_config_reference")
    assert writer.PAGE.read_text() == writer.render(), "run scripts/write_config_reference.py and commit the page"


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_relative_links_lead_to_a_file_and_to_an_anchor_in_it(page: Path) -> None:
    for _, target in LINK.findall(prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), f"{target} leads nowhere"
        if anchor:
            assert anchor in anchors(file), f"{file.name} has no heading for #{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_a_link_named_after_code_leads_to_the_file_that_defines_it(page: Path) -> None:
    for label, target in LINK.findall(prose(page)):
        name = re.fullmatch(r"`(?:\w+\.)?(\w+)`", label)
        if name and target.endswith(".py"):
            source = (page.parent / target).read_text()
            defined = re.search(rf"\b(?:def|class) {name[1]}\b|^{name[1]}\b", source, re.MULTILINE)
            assert defined, f"{target} does not define {label}"


def test_the_pages_that_comments_and_yaml_point_to_exist() -> None:
    for source in SOURCES:
        if source.suffix not in (".py", ".yaml", ".sh"):
            continue
        for name, anchor in re.findall(r"\bdocs/([\w\-/]+(?:\.md)?)(?:#([\w\-]+))?", source.read_text()):
            found = list((ROOT / "docs").glob(f"{name}*"))
            assert found, f"{source.relative_to(ROOT)} points to docs/{name}"
            if anchor:
                assert anchor in anchors(found[0]), f"{source.relative_to(ROOT)} points to docs/{name}#{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_every_command_on_a_page_composes(page: Path) -> None:
    for verb, words in commands(page):
        assert verb in VERBS, f"rlvla {verb} does not exist"
        overrides = [STAND_INS.get(word, word) for word in words if not word.startswith("-")]
        bare = [word for word in overrides if "=" not in word and not word.startswith("@")]
        overrides += [] if bare else NAMED.get(verb, [])
        # Policies may be words without a key.
        for required in "" if bare else REQUIRED.get(verb, "").split():
            if not any(word.startswith(required.partition("=")[0] + "=") for word in overrides):
                overrides.append(required)
        compose(verb, overrides)


def test_the_pages_show_commands_of_every_verb() -> None:
    assert {verb for page in PAGES for verb, _ in commands(page)} == set(VERBS)


def test_the_metrics_page_explains_every_key_that_is_logged_and_no_other() -> None:
    explained = set(re.findall(r"`([^`\s]+)`", METRICS.read_text()))
    missing = logged_keys() - explained
    assert not missing, f"docs/metrics.md does not explain {', '.join(sorted(missing))}"
    stale = {key for key in explained if METRIC.fullmatch(key)} - logged_keys()
    assert not stale, f"docs/metrics.md explains {', '.join(sorted(stale))}, which nothing logs"


def test_every_decision_is_listed_in_the_index() -> None:
    index = (ROOT / "docs/index.md").read_text()
    unlisted = [p.name for p in (ROOT / "docs/adr").glob("[0-9]*.md") if f"adr/{p.name}" not in index]
    assert not unlisted


def test_the_example_suite_of_the_guide_works_and_agrees_with_its_own_spec() -> None:
    guide = (ROOT / "docs/how-to/add-a-suite.md").read_text()
    (example,) = [code for _, code in FENCE.findall(guide) if "class MySuite" in code]
    scope: dict[str, Any] = {"__name__": "mysuite"}
    exec(compile(example, "add-a-suite.md", "exec"), scope)
    config = SuiteConfig(name="mysuite", task="reach", max_episode_steps=12)
    env = scope["MySuite"](config, 2)
    assert isinstance(env, VecEnv)

    first = env.reset([0, 1], [FIRST_TRAINING_STATE, 7])
    camera = env.spec.cameras[0]
    assert first.images[camera.name].shape == (2, camera.height, camera.width, 3)
    assert first.images[camera.name].dtype == np.uint8
    assert first.state is not None
    assert first.state.shape == (2, env.spec.state_size)
    assert first.state.dtype == np.float32

    actions = np.zeros((1, env.spec.chunk_size, env.spec.action_size), dtype=np.float32)
    results = [env.step_chunk([1], actions) for _ in range(env.spec.max_decisions)]
    assert sum(int(r.executed_steps[0]) for r in results) == config.max_episode_steps
    assert [bool(r.truncated[0]) for r in results] == [False] * (env.spec.max_decisions - 1) + [True]
    with pytest.raises(RuntimeError, match="reset"):
        env.step_chunk([1], actions)
    again = env.reset([0], [7])
    assert np.array_equal(again.images[camera.name][0], first.images[camera.name][1])
    env.close()
