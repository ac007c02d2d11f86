"""Who may import whom, read from the source: dependencies point downwards, heavy things stay in their place."""

import ast
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
ALGOS = sorted((ROOT / "algos/rlvla_algos").rglob("*.py"))
ENVS = sorted((ROOT / "envs/rlvla_envs").rglob("*.py"))
SYSTEM = sorted((ROOT / "rlvla").rglob("*.py"))
SIMULATORS = {"calvin_env", "habitat", "libero", "mani_skill", "metaworld", "mujoco", "robosuite", "sapien"}
SIMULATORS |= {"pybullet", "robocasa_gr1", "robotwin"}


HOSTED = (
    "__init__",
    "base",
    "common",
    "suites",
    "suite_home",
    "wire",
    "foreign_host",
    "toy",
    "libero",
    "libero_names",
    "libero_tasks",
    "libero_world",
    "libero_experts",
    "metaworld",
    "metaworld_tasks",
    "metaworld_world",
    "metaworld_experts",
    "mujoco_drawing",
    "calvin",
    "calvin_tasks",
    "calvin_world",
    "vln_ce",
    "robocasa_gr1",
    "robocasa_gr1_standins",
    "robocasa_gr1_tasks",
    "robocasa_gr1_world",
    "domino",
    "domino_score",
    "domino_world",
    "robotwin",
    "robotwin_standins",
    "robotwin_tasks",
    "robotwin_world",
    "stand_ins",
    "vulkan_drawing",
    "slots",
)
"""Modules that other interpreters load, where jaxtyping may be absent."""


class Import(NamedTuple):
    file: Path
    line: int
    package: str
    """Top-level name."""
    at_import: bool
    """False inside a function: it runs when the function does."""

    def __str__(self) -> str:
        return f"{self.file}:{self.line} imports {self.package}"


def imports_of(source: str, file: Path) -> Iterator[Import]:
    def walk(node: ast.AST, at_import: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            inside = at_import and not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            names: list[str] = []
            if isinstance(child, ast.Import):
                names = [alias.name for alias in child.names]
            elif isinstance(child, ast.ImportFrom):
                # A relative import stays inside its package.
                names = [child.module] if child.module and not child.level else []
            elif isinstance(child, ast.Call) and ast.unparse(child.func).endswith(("import_module", "__import__")):
                first = child.args[0] if child.args else None
                names = [first.value] if isinstance(first, ast.Constant) and isinstance(first.value, str) else []
            for name in names:
                yield Import(file, getattr(child, "lineno", 0), name.split(".")[0], at_import)
            # Type checkers read this block and Python does not.
            if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
                continue
            yield from walk(child, inside)

    yield from walk(ast.parse(source), at_import=True)


def imports(files: list[Path]) -> list[Import]:
    assert files, "no sources found: has a folder moved?"
    return [i for file in files for i in imports_of(file.read_text(), file.relative_to(ROOT))]


def offences(found: list[Import], allowed: Callable[[Import], bool]) -> list[str]:
    return [str(i) for i in found if not allowed(i)]


def is_standard(package: str) -> bool:
    return package in sys.stdlib_module_names


def test_the_reader_sees_imports_wherever_they_hide() -> None:
    source = """
import numpy.linalg
from torch import nn
from . import sibling
class A:
    import scipy
    def method(self):
        import ray
        return importlib.import_module("hydra.core")
if TYPE_CHECKING:
    import transformers
try:
    import sapien
except ImportError:
    pass
"""
    found = [(i.package, i.at_import) for i in imports_of(source, Path("x.py"))]
    assert found == [
        ("numpy", True),
        ("torch", True),
        ("scipy", True),
        ("ray", False),
        ("hydra", False),
        ("sapien", True),
    ]


def test_the_mathematics_knows_torch_and_nothing_else() -> None:
    allowed = {"torch", "numpy", "jaxtyping", "rlvla_algos"}
    assert not offences(imports(ALGOS), lambda i: i.package in allowed or is_standard(i.package))


def test_the_worlds_know_neither_the_system_nor_its_frameworks() -> None:
    forbidden = {"rlvla", "rlvla_algos", "ray", "hydra", "omegaconf", "transformers", "tensordict", "torchrl"}
    assert not offences(imports(ENVS), lambda i: i.package not in forbidden)


def test_the_worlds_import_simulators_and_torch_inside_functions_only() -> None:
    late = SIMULATORS | {"torch"}
    assert not offences(imports(ENVS), lambda i: i.package not in late or not i.at_import)


def test_a_world_imports_at_its_top_only_what_every_world_has() -> None:
    allowed = {"numpy", "jaxtyping", "gymnasium", "rlvla_envs"}
    assert not offences(imports(ENVS), lambda i: not i.at_import or i.package in allowed or is_standard(i.package))


def test_what_every_simulator_host_loads_needs_numpy_alone() -> None:
    loaded = [ENVS[0].parent / f"{name}.py" for name in HOSTED]
    allowed = {"numpy", "rlvla_envs"}
    found = [i for i in imports(loaded) if i.at_import]
    assert not offences(found, lambda i: i.package in allowed or is_standard(i.package))


def test_ray_lives_in_the_cluster_module_and_nowhere_else() -> None:
    found = [i for i in imports(ALGOS + ENVS + SYSTEM) if i.package == "ray"]
    assert {str(i.file) for i in found} == {"rlvla/cluster.py"}
    # Even there only when actors are wanted: tests and debugging run without.
    assert not any(i.at_import for i in found)


def test_hydra_lives_in_compose_and_nowhere_else() -> None:
    assert {str(i.file) for i in imports(ALGOS + ENVS + SYSTEM) if i.package == "hydra"} == {"rlvla/compose.py"}


def test_optuna_lives_in_the_memory_of_a_study_and_nowhere_else() -> None:
    found = [i for i in imports(ALGOS + ENVS + SYSTEM) if i.package == "optuna" and i.at_import]
    assert not found
    files = {str(i.file) for i in imports(SYSTEM) if i.package == "optuna"}
    assert files == {"rlvla/tune_study.py"}


def test_the_system_never_imports_a_simulator() -> None:
    assert not offences(imports(SYSTEM), lambda i: i.package not in SIMULATORS)


def test_transformers_is_known_to_policies_alone() -> None:
    found = [i for i in imports(SYSTEM) if i.package in ("transformers", "tokenizers")]
    assert not offences(found, lambda i: i.file.parts[:2] == ("rlvla", "policies"))


def test_no_package_imports_scripts_or_tests() -> None:
    assert not offences(imports(ALGOS + ENVS + SYSTEM), lambda i: i.package not in {"scripts", "tests", "conftest"})


def test_the_source_roots_are_not_packages() -> None:
    # `envs` would shadow RoboTwin's own top-level package of that name.
    assert not (ROOT / "algos/__init__.py").exists()
    assert not (ROOT / "envs/__init__.py").exists()
    assert all((package / "py.typed").exists() for package in (ROOT / "rlvla", ALGOS[0].parent, ENVS[0].parent))


@pytest.mark.parametrize("module", ["rlvla.cli", "rlvla_envs.suites", "rlvla_envs.maniskill", "rlvla_envs.simpler_env"])
def test_naming_things_loads_nothing_heavy(module: str, run_python: Callable[[str], str]) -> None:
    heavy = SIMULATORS | {"torch", "ray", "hydra", "transformers", "tensordict", "torchrl", "scipy", "pyarrow"}
    loaded = run_python(f"import sys, {module}; print(*sorted({heavy!r} & set(sys.modules)))")
    assert loaded.split() == []


def test_refusing_a_verb_loads_nothing_heavy(run_python: Callable[[str], str]) -> None:
    code = """
import sys
from rlvla.cli import main
try:
    main(["trian"])
except SystemExit as stop:
    print(stop.code, *sorted({"torch", "ray", "hydra", "transformers"} & set(sys.modules)))
"""
    assert run_python(code).split() == ["2"]
