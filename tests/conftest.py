"""What several test files share: small policies, the toy world, and whether this machine can render."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from rlvla.policies.policy import Policy
    from rlvla.results import Result
    from rlvla_envs.base import EnvSpec, VecEnv

# Mesa reads this when the first Vulkan device is created.
os.environ.setdefault("LP_NUM_THREADS", "1")

# ManiSkill reads this when it is imported, so every test of a session shares one asset folder.
SIMPLER_ASSETS = Path(__file__).resolve().parents[2] / "shared/assets/simpler_env"
if SIMPLER_ASSETS.is_dir():
    os.environ.setdefault("MS_ASSET_DIR", str(SIMPLER_ASSETS))

# A test must not depend on a lucky draw or on a busy machine.
settings.register_profile("rlvla", max_examples=25, derandomize=True, deadline=None, database=None)
settings.load_profile("rlvla")


# A script's background jobs ignore Ctrl-C, and so would every run that a test starts and interrupts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(trylast=True)  # after -m and -k: who deselects them need not wait for a renderer
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a simulator, with the reason, where nothing can render."""
    needing = [item for item in items if item.get_closest_marker("simulator")]
    reason = missing_simulator() if needing else ""
    for item in needing:
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))


def missing_simulator() -> str:
    """Why ManiSkill cannot render here; empty when it can.

    Asked in a process of its own: a broken driver ends the process instead of raising.
    """
    code = "import importlib.util, sapien; assert importlib.util.find_spec('mani_skill'), 'not installed'\n"
    code += "sapien.render.RenderSystem(sapien.Device('cpu'))"
    try:
        subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=120, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        said = (getattr(error, "stderr", None) or b"").decode(errors="replace").strip().splitlines()
        return f"ManiSkill cannot render here: {said[-1] if said else error}"
    return ""


@pytest.fixture(scope="session")
def simpler_assets() -> Path:
    """The asset folder of the WidowX tasks; who asks is skipped, with the reason, where it is not to be had."""
    from rlvla_envs.simpler_assets import check_assets
    from rlvla_envs.simpler_tasks import chosen_tasks

    root = Path(os.environ.get("MS_ASSET_DIR", SIMPLER_ASSETS))
    try:
        check_assets(root, chosen_tasks("simpler_env", "all"))
    except ValueError as error:
        pytest.skip(str(error).splitlines()[0])
    return root


@pytest.fixture(scope="session")
def device() -> str:
    """Where tests of networks run: RLVLA_TEST_DEVICE, else the CPU."""
    return os.environ.get("RLVLA_TEST_DEVICE", "cpu")


@pytest.fixture(scope="session")
def run_python() -> Callable[[str], str]:
    """Run code in a process of its own that finds the same packages; returns what it printed."""

    def run(code: str) -> str:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-c", code]
        return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout

    return run


@pytest.fixture
def make_toy() -> Callable[..., "VecEnv"]:
    """Toy worlds: ``make_toy(num_envs, chunk_size=...)``."""
    from rlvla_envs.base import SuiteConfig
    from rlvla_envs.suites import make_env

    def make(num_envs: int = 4, **changes: Any) -> "VecEnv":
        return make_env(SuiteConfig(**{"name": "toy", "image_size": 32, "max_episode_steps": 32, **changes}), num_envs)

    return make


@pytest.fixture(scope="session")
def make_policy() -> Callable[..., "Policy"]:
    """Untrained policies of configs/policy: ``make_policy("qwen_vla_tiny", spec, "policy.expert.channels=2")``.

    Everything that starts at zero (the last layer, the AdaLN modulations, biases) is drawn instead: a policy
    whose velocity is zero would pass any test.
    """
    import torch

    from rlvla.compose import compose
    from rlvla.policies.action_stats import ActionStats
    from rlvla.policies.architectures import architecture
    from rlvla.policies.processor import train_tokenizer
    from rlvla.policies.prompted import prompts_for_tokenizer

    tokenizers: dict[tuple[str, int], Any] = {}

    def make(name: str, spec: "EnvSpec", *overrides: str, constant_channel: int | None = None) -> "Policy":
        config = compose("sft", ["dataset=none", "suite=toy", f"policy={name}", *overrides]).policy
        rng = np.random.default_rng(0)
        action = rng.uniform(-1, 1, (200, spec.action_size)).astype(np.float32)
        if constant_channel is not None:
            action[:, constant_channel] = 0.25
        state = rng.normal(size=(200, spec.state_size)).astype(np.float32) if spec.state_size else None
        key = (config.name, config.vlm.vocab_size)
        if key not in tokenizers:
            instructions = ["fly through the gap and reach the green goal"]
            tokenizers[key] = train_tokenizer(prompts_for_tokenizer(spec, instructions, config), key[1])
        torch.manual_seed(0)
        policy = architecture(config.name).policy(config, spec, ActionStats.of(action, state), tokenizers[key])
        policy.initialize()
        with torch.no_grad():
            for parameter in policy.parameters():
                if not parameter.any():
                    parameter.normal_(std=0.1)
        return policy

    return make


@pytest.fixture(scope="session")
def make_result() -> Callable[..., "Result"]:
    """Results of an imagined suite: ``make_result("sim", {"carrot": [1, 0], "spoon": [1, 1]}, policy="sft")``."""
    import json
    from dataclasses import asdict

    from rlvla.config import EvalConfig
    from rlvla.evaluate import Evaluation
    from rlvla.results import Result, identify
    from rlvla_algos.statistics import wilson_interval
    from rlvla_envs.base import EnvSpec, SuiteConfig

    def make(
        label: str,
        outcomes: dict[str, list[int]],
        policy: str = "sft",
        visits: int = 1,
        notes: tuple[str, ...] = (),
        **settings: Any,
    ) -> "Result":
        counts = {task: len(of_task) // visits for task, of_task in outcomes.items()}
        spec = EnvSpec(
            suite=label,
            task="all",
            robot="point",
            action=(),
            cameras=(),
            control_hz=5.0,
            chunk_size=1,
            max_episode_steps=4,
            num_evaluation_states=sum(counts.values()),
            tasks=tuple(outcomes),
            evaluation_states_per_task=tuple(counts.values()),
            notes=notes,
        )
        # All states with the first noise, then all with the second: as an evaluation has them.
        states = list(range(spec.num_evaluation_states))
        queues = {task: list(of_task) for task, of_task in outcomes.items()}
        index = [spec.task_of(state) for _ in range(visits) for state in states]
        episodes = [queues[spec.tasks[task]].pop(0) for task in index]
        by_task = {
            task: {
                "trials": len(of_task),
                "successes": sum(of_task),
                "success": sum(of_task) / len(of_task),
                "interval": list(wilson_interval(sum(of_task), len(of_task))),
            }
            for task, of_task in outcomes.items()
        }
        config = EvalConfig(**{"shuffled_images": False, "noise_seeds": visits, **settings})
        described = {"config": asdict(SuiteConfig(name=label)), "version": {"suite": "1"}, "assets": list(notes)}
        evaluation = Evaluation(
            name=label,
            suite=label,
            task="all",
            sampler="ode",
            images="own",
            temperature=config.temperature,
            seed=config.seed,
            max_episode_steps=4,
            trials=len(episodes),
            successes=sum(episodes),
            success=sum(episodes) / len(episodes),
            interval=wilson_interval(sum(episodes), len(episodes)),
            outcomes=episodes,
            initial_states=states * visits,
            executed_steps=[1] * len(episodes),
            noise_seeds=visits,
            task_index=index,
            by_task=by_task,
            chunk_size=1,
            variant="",
            metrics={},
            metrics_by_task={},
            notes=list(notes),
        )
        identity = identify(policy, described, config, 16)
        made = Result(identity, label, spec.to_dict(), f"runs/{policy}/policy", {"torch": "2.9"}, evaluation)
        # As it would come from a file.
        return Result.from_dict(json.loads(json.dumps(made.to_dict())))

    return make


@pytest.fixture(scope="session")
def policy_on_meta() -> Callable[[str], Any]:
    """A policy of configs/policy for a WidowX with one camera of 224 pixels, in shapes alone."""
    import torch

    from rlvla.compose import compose
    from rlvla.policies.action_stats import ActionStats
    from rlvla.policies.architectures import architecture
    from rlvla.policies.processor import train_tokenizer
    from rlvla_envs.base import ActionComponent, Camera, EnvSpec

    spec = EnvSpec(
        suite="simpler_env",
        task="carrot",
        robot="WidowX",
        action=(ActionComponent(name="arm", size=7, convention="delta", low=-1.0, high=1.0),),
        cameras=(Camera(name="front", height=224, width=224),),
        control_hz=5.0,
        chunk_size=4,
        max_episode_steps=60,
        num_evaluation_states=24,
    )

    def make(name: str) -> Any:
        config = compose("sft", ["dataset=none", f"policy={name}", "suite.image_size=224"]).policy
        stats = ActionStats.of(np.linspace(-1, 1, 50, dtype=np.float32)[:, None].repeat(7, axis=1), None)
        with torch.device("meta"):
            return architecture(config.name).policy(config, spec, stats, train_tokenizer(["hello"], 300))

    return make
