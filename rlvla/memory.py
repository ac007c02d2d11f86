"""What a training run will hold in memory, before any of it is allocated, and what to change when that is too much.

A run goes through phases: it loads the policy, collects, updates, saves. A place (the GPU, the host) must bear the
worst of them. Bytes of weights, gradients, optimizer and stored rollout follow from shapes and dtypes; activations are
what autograd keeps; the rest are constants. docs/how-to/doctor.md has the formulas and how far they were
off. GB are 10^9 bytes.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from rlvla.cluster import OBJECT_STORE_BYTES
from rlvla.config import ConfigError, DoctorConfig, LearnerStrategy, WorkerKind
from rlvla.policies.base import trained_groups
from rlvla.policies.footprint import (
    Footprint,
    build_unallocated,
    check_known,
    footprint,
    guess_tokens,
    load_unallocated,
)
from rlvla.policies.groups import require_gradients
from rlvla.policies.lora import add_lora
from rlvla.policies.qwen_vla import QwenVLA
from rlvla.teachers import START
from rlvla.workers import wants_spare
from rlvla_envs.base import ActionComponent, Camera, EnvSpec, SuiteConfig
from rlvla_envs.suites import memory_estimate_mb

GB, MB = 1e9, 2**20

FULL = 0.95
"""A place is too small when the plan takes more of it than this: an allocator needs room to move."""

LEARNER_MB = 1000
"""The learner's process before it has a policy: Python, torch, transformers, Ray's driver."""
CUDA_HOST_MB, CUDA_DEVICE_MB = 2000, 1000
"""What CUDA and its libraries add on the host, and take on the device before the first tensor. Not measured here."""
RAY_MB = 400
"""Ray's own processes."""
SIMULATOR_MB, ENVIRONMENT_MB = 850, 60
"""One simulator process and each environment in it, of a suite that does not say."""

INSTRUCTION = "put the object on the left into the container on the right"
"""Stands for the suite's own where the suite could not be started."""
ACTIONS, STATES = 7, 32
"""The same for its action and state channels."""


@dataclass(frozen=True)
class Item:
    """One line of a budget."""

    what: str
    bytes: int


@dataclass(frozen=True)
class Budget:
    """What one place holds in one phase."""

    place: str
    """"GPU" or "host"."""
    phase: str
    items: tuple[Item, ...]
    available: int | None
    """Bytes; None where nobody said."""

    @property
    def total(self) -> int:
        return sum(item.bytes for item in self.items)

    @property
    def excess(self) -> int:
        """Bytes too many; 0 where it fits or nobody said what there is."""
        return 0 if self.available is None else max(0, self.total - int(FULL * self.available))


@dataclass(frozen=True)
class Option:
    """Something to change, alone."""

    changes: tuple[str, ...]
    """As on the command line."""
    cost: str
    """What it costs other than memory."""
    saves: int
    """Bytes, in the places that are too small."""
    fits: bool


@dataclass(frozen=True)
class Plan:
    """The worst phase of each place, and the way out where that is too much."""

    title: str
    budgets: tuple[Budget, ...]
    disk: int
    """Bytes of checkpoints and policies that the run keeps at once."""
    notes: tuple[str, ...]
    options: tuple[Option, ...]
    cheapest: Option | None
    """The first of the options, or of their sums in order, that fits; None where it fits already or nothing does."""

    @property
    def fits(self) -> bool:
        return not any(budget.excess for budget in self.budgets)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        places = {
            budget.place: {
                "phase": budget.phase,
                "bytes": budget.total,
                "available": budget.available,
                "items": {item.what: item.bytes for item in budget.items},
            }
            for budget in self.budgets
        }
        return {
            "fits": self.fits,
            "places": places,
            "disk": self.disk,
            "notes": list(self.notes),
            "options": [asdict(option) for option in self.options],
            "cheapest": asdict(self.cheapest) if self.cheapest else None,
        }


@dataclass(frozen=True)
class Machine:
    """What there is to fill. None: nobody said."""

    has_gpu: bool
    gpu_bytes: int | None = None
    host_bytes: int | None = None


@dataclass(frozen=True)
class World:
    """What a suite says once it was started."""

    spec: EnvSpec
    instruction: str
    process_mb: int | None
    """Of a process with one environment, if the system says."""


def plan_run(config: DoctorConfig, machine: Machine, world: World | None = None) -> Plan:
    """Plan the memory of the training run that ``config`` describes.

    Args:
        machine: what there is.
        world: what its suite said; None takes stand-ins, and the plan notes them.

    Raises:
        ValueError: there is no such policy, or it does not fit the suite.
    """
    policy, measured = unallocated_policy(config, world)
    title = (
        f"{config.policy}: VLM {_count(measured.vlm_parameters)}, expert {_count(measured.expert_parameters)} "
        f"parameters, {measured.tokens} tokens of context; {config.suite.name} {config.suite.task}"
    )
    notes = []
    if world is None:
        notes.append(
            "the suite was not started: one camera"
            + ("" if is_folder(config.policy) else f", {ACTIONS} action and {STATES} state channels")
            + " and an instruction of usual length are assumed"
        )
    if not is_folder(config.policy):
        notes.append("the policy has no tokenizer yet: the tokens of its text are an estimate")
    if config.suite.options.get("sim_backend") == "physx_cuda" or config.suite.options.get("render_backend") == "gpu":
        notes.append("simulators on the GPU take memory there that is not counted")

    def budgets(changed: DoctorConfig) -> tuple[Budget, ...]:
        size = measured
        if changed.suite.image_size != config.suite.image_size:
            size = unallocated_policy(changed, world)[1]
        return worst_phases(changed, size, machine, world)

    worst = budgets(config)
    options, cheapest = ways_out(config, policy, worst, budgets)
    return Plan(title, worst, disk_bytes(config, measured), tuple(notes), options, cheapest)


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.2f} B" if parameters >= 1e9 else f"{parameters / 1e6:.2f} M"


# --- the policy


def is_folder(policy: str) -> bool:
    return Path(policy).is_dir()


def unallocated_policy(config: DoctorConfig, world: World | None) -> tuple[QwenVLA, Footprint]:
    """The policy that `policy=` names, a folder or a file of configs/policy, without its weights.

    Raises:
        ValueError: neither of the two, a damaged folder, or a policy that does not fit the suite.
    """
    instruction = config.suite.instruction or (world.instruction if world else INSTRUCTION)
    # As `rlvla.train.prepare` has it: FSDP2 takes one dtype alone.
    narrow = config.learners.num == 1 or config.learners.strategy is not LearnerStrategy.fsdp
    if is_folder(config.policy):
        policy = load_unallocated(Path(config.policy))
        if world and len(policy.embodiments) > 1:
            policy.embody_in(world.spec)
        _add_adapters(policy, config)
        return policy, footprint(policy, policy.context_length(instruction), config.compute, narrow=narrow)
    architecture = check_policy(config.policy)
    spec = world.spec if world else stand_in_spec(config.suite, architecture.expert.channels)
    size = config.suite.image_size
    if world and any(size != camera.height for camera in spec.cameras):
        spec = replace(spec, cameras=tuple(replace(c, height=size, width=size) for c in spec.cameras))
    policy = build_unallocated(architecture, spec)
    _add_adapters(policy, config)
    return policy, footprint(policy, guess_tokens(policy, instruction), config.compute, narrow=narrow)


def _add_adapters(policy: QwenVLA, config: DoctorConfig) -> None:
    trained = trained_groups(policy, config.algo.train_vlm, config.algo.freeze)
    add_lora(policy, config.lora, trained)
    require_gradients(policy, trained)


def check_policy(policy: str) -> Any:
    """The configuration of a policy named by a file of configs/policy; None for a folder.

    Raises:
        ConfigError: it is neither, or of an architecture that cannot be planned.
    """
    import difflib

    from rlvla.compose import compose, group_choices

    if is_folder(policy):
        return None
    names = group_choices("sft")["policy"]
    if policy not in names:
        close = difflib.get_close_matches(policy, names, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ConfigError(f"policy is {policy!r}: neither a folder nor one of {', '.join(names)}.{hint}")
    config = compose("sft", ["dataset=none", f"policy={policy}"]).policy
    check_known(config)
    return config


def stand_in_spec(suite: SuiteConfig, channels: int) -> EnvSpec:
    """The shapes that most suites have, for one that could not be started."""
    return EnvSpec(
        suite=suite.name,
        task=suite.task,
        robot="robot",
        action=(ActionComponent(name="action", size=min(ACTIONS, channels), convention="?", low=-1.0, high=1.0),),
        cameras=(Camera(name="camera", height=suite.image_size, width=suite.image_size),),
        state_names=tuple(f"state.{i}" for i in range(STATES)),
        control_hz=10.0,
        chunk_size=suite.chunk_size,
        max_episode_steps=suite.max_episode_steps,
        num_evaluation_states=suite.num_evaluation_states,
    )


# --- the phases


def max_decisions(config: DoctorConfig) -> int:
    """Decisions of an iteration when every episode runs to its limit."""
    return config.episodes_per_iteration * -(-config.suite.max_episode_steps // config.suite.chunk_size)


def rollout_bytes(config: DoctorConfig, size: Footprint) -> int:
    """One copy of what an iteration stores, every episode at its limit."""
    # A teacher whose backbone is another reads the inputs itself. Whether it is, only its weights could tell.
    teacher_reads = config.algo.teacher.policy not in (None, START) and not trains_vlm(config)
    contexts = 0 if trains_vlm(config) else size.stored_context
    inputs = size.stored_inputs if trains_vlm(config) or teacher_reads else 0
    # In the arrays that simulators hand out is also the picture that an episode ended with (`rlvla.rollout.collect`).
    ends = config.episodes_per_iteration * size.picture if inputs else 0
    return max_decisions(config) * (contexts + inputs) + ends


def value_parameters(config: DoctorConfig, size: Footprint) -> int:
    sizes = [size.value_size, *config.algo.value_hidden_sizes, 1]
    return sum((a + 1) * b for a, b in pairwise(sizes))


def trains_vlm(config: DoctorConfig) -> bool:
    return config.algo.train_vlm and "vlm" not in config.algo.freeze


def trained_bytes(config: DoctorConfig, size: Footprint) -> int:
    """Weights that have gradients, the critic's among them."""
    expert = 0 if "expert" in config.algo.freeze else size.expert_adapters or size.expert_bytes
    vlm = size.vlm_adapters or size.vlm_bytes if trains_vlm(config) else 0
    return expert + vlm + 4 * value_parameters(config, size)


def teacher_bytes(config: DoctorConfig, size: Footprint) -> int:
    """Weights of a frozen teacher that are not the policy's own: what is trained whole where the run starts at its
    teacher, else all of them at most."""
    algo = config.algo
    if algo.teacher.policy is None:
        return 0
    if algo.teacher.policy != START:
        return size.policy_bytes
    expert = 0 if "expert" in algo.freeze or size.expert_adapters else size.expert_bytes
    return expert + (size.vlm_bytes if trains_vlm(config) and not size.vlm_adapters else 0)


def reasoning_bytes(config: DoctorConfig, size: Footprint) -> int:
    """Weights of a frozen reasoning teacher that are not the policy's own: its language model, but that of a run with
    adapters that starts at it."""
    teacher = config.algo.reasoning_teacher.policy
    shares = teacher == START and size.vlm_adapters > 0
    return 0 if teacher is None or shares else size.vlm_bytes - size.vlm_adapters


def activation_bytes(config: DoctorConfig, size: Footprint) -> int:
    """What one minibatch keeps between its forward and its backward pass. The learner cuts equal parts, so that with k
    minibatches one may have 1 / 2k rows more than ``algo.minibatch_size``."""
    rows = min(max_decisions(config), config.algo.minibatch_size)
    if config.compute.pass_tokens is not None:
        rows = min(rows, max(1, config.compute.pass_tokens // (size.tokens + config.suite.chunk_size)))
    return size.rounded_weights + rows * (size.expert_activations + (size.vlm_activations if trains_vlm(config) else 0))


def standing_items(config: DoctorConfig, size: Footprint) -> list[Item]:
    """What the learner holds in every phase but the first."""
    trained, teacher = trained_bytes(config, size), teacher_bytes(config, size)
    items = [
        Item(
            "weights of the VLM" + ("" if trains_vlm(config) and not size.vlm_adapters else ", frozen"), size.vlm_bytes
        ),
        Item("weights of the expert and the critic", size.expert_bytes + 4 * value_parameters(config, size)),
        Item("gradients", trained),
        Item("Adam's two moments", 2 * trained),
        Item(f"rollout: {max_decisions(config):,} decisions at most", rollout_bytes(config, size)),
    ]
    if config.algo.teacher.policy is not None:
        items.append(Item("the frozen teacher, but for what it shares", teacher))
    if config.algo.reasoning_teacher.policy is not None:
        items.append(Item("the frozen reasoning teacher, but for what it shares", reasoning_bytes(config, size)))
    return items


def learner_phases(config: DoctorConfig, size: Footprint) -> Iterator[tuple[str, list[Item]]]:
    """What the learner holds where its tensors are, by phase."""
    always = standing_items(config, size)
    # Contexts and images stay where they are (`rlvla.rounds`). The rest is put together from rounds, and the valid
    # decisions are cut out of it.
    another = Item("another copy of the rollout's samples and outcomes", max_decisions(config) * size.stored_beside)
    forward = config.inference_batch * max(size.vlm_layer, size.expert_layer)
    yield (
        "collecting",
        [
            *always,
            another,
            Item(f"the policy on {config.inference_batch} rows (estimate)", forward + size.rounded_weights),
        ],
    )
    # Adam's step is fused: it keeps nothing beside its moments.
    activations = activation_bytes(config, size)
    if activations < another.bytes:
        yield "updating", [*always, another]
    else:
        what = f"activations of a minibatch of {config.algo.minibatch_size} (estimate)"
        yield "updating", [*always, Item(what, activations)]


def worst_phases(
    config: DoctorConfig, size: Footprint, machine: Machine, world: World | None = None
) -> tuple[Budget, ...]:
    """The worst phase of the GPU, where there is one, and of the host."""
    weights, on_gpu = size.policy_bytes, machine.has_gpu
    base = [Item("the learner's process", (LEARNER_MB + (CUDA_HOST_MB if on_gpu else 0)) * MB)]
    workers = list(simulator_items(config, world))
    saving = Item("weights, copied to be saved", weights)
    host: list[tuple[str, list[Item]]] = [
        ("loading", [*base, Item("weights", weights), Item("weights as read from the file", weights)])
    ]
    found = []
    for teacher in (config.algo.teacher, config.algo.reasoning_teacher):
        if teacher.policy is not None:
            host[0][1].append(Item("a teacher's weights", weights))
    learner = list(learner_phases(config, size))
    if on_gpu:
        cuda = Item("CUDA itself", CUDA_DEVICE_MB * MB)
        phases = [Budget("GPU", phase, (*items, cuda), machine.gpu_bytes) for phase, items in learner]
        found.append(max(phases, key=lambda budget: budget.total))
        host.append(("saving", [*base, saving, *workers]))
    else:
        host += [(phase, [*base, *items, *workers]) for phase, items in learner]
        host.append(("saving", [*base, *standing_items(config, size), saving, *workers]))
    budgets = [Budget("host", phase, tuple(items), machine.host_bytes) for phase, items in host]
    return (*found, max(budgets, key=lambda budget: budget.total))


def simulator_items(config: DoctorConfig, world: World | None) -> Iterator[Item]:
    """The simulators' processes, and Ray's."""
    workers, suite = config.workers, config.suite
    actors = workers.num_actors or os.cpu_count() or 1
    if workers.kind is WorkerKind.local:
        # In the learner's process, whose Python and torch are counted.
        environments = actors * workers.envs_per_actor
        yield Item(f"{environments} environments (estimate)", _simulators_mb(suite, environments, world) * MB)
        return
    each = _simulators_mb(suite, workers.envs_per_actor, world) * MB
    yield Item(f"{actors} simulator processes of {workers.envs_per_actor} environments (estimate)", actors * each)
    if wants_spare(suite, workers):
        # Every learner rank has simulators of its own.
        pools = config.learners.num
        yield Item(f"{pools} spare simulator process{'es' if pools > 1 else ''} (estimate)", pools * each)
    yield Item("Ray and its object store", RAY_MB * MB + OBJECT_STORE_BYTES)


def _simulators_mb(suite: SuiteConfig, environments: int, world: World | None) -> int:
    said = memory_estimate_mb(suite, environments)
    if said is not None:
        return said
    process = (world.process_mb if world else None) or SIMULATOR_MB
    return process + (environments - 1) * ENVIRONMENT_MB


def disk_bytes(config: DoctorConfig, size: Footprint) -> int:
    """The newest checkpoints, the best one, the one being written, and the policy at the end."""
    checkpoint = size.policy_bytes + 2 * trained_bytes(config, size) + 4 * value_parameters(config, size)
    return (config.keep_checkpoints + 2) * checkpoint + size.policy_bytes


# --- what to change


@dataclass(frozen=True)
class _Lever:
    """A setting that trades something for memory: its values, mildest first."""

    key: str
    cost: str
    values: tuple[Any, ...]
    set: Callable[[DoctorConfig, Any], DoctorConfig]


def _levers(config: DoctorConfig, policy: QwenVLA) -> list[_Lever]:
    """In order of what they cost."""
    algo, suite, unit = config.algo, config.suite, 2 * policy.config.vlm.patch_size
    sizes = range(suite.image_size - suite.image_size % unit, unit - 1, -unit)
    spare = wants_spare(suite, config.workers)
    return [
        _Lever(
            "workers.spare",
            "a lost simulator is back in the time of a start",
            (False,) if spare else (),
            lambda c, value: replace(c, workers=replace(c.workers, spare=value)),
        ),
        _Lever(
            "algo.train_vlm",
            "the backbone stays as SFT left it",
            (False,) if algo.train_vlm and "vlm" not in config.lora.groups else (),
            lambda c, value: replace(c, algo=replace(c.algo, train_vlm=value)),
        ),
        _Lever(
            "algo.minibatch_size",
            "more and noisier steps",
            _halved(algo.minibatch_size, 8),
            lambda c, value: replace(c, algo=replace(c.algo, minibatch_size=value)),
        ),
        _Lever(
            "episodes_per_iteration",
            "noisier advantages",
            _halved(config.episodes_per_iteration, 32),
            lambda c, value: replace(c, episodes_per_iteration=value),
        ),
        _Lever(
            "workers.envs_per_actor",
            "fewer episodes at once",
            _halved(config.workers.envs_per_actor, 1),
            lambda c, value: replace(c, workers=replace(c.workers, envs_per_actor=value)),
        ),
        _Lever(
            "suite.image_size",
            "a policy trained at that size",
            # A folder's policy was trained at one size and sees no other.
            () if is_folder(config.policy) else tuple(s for s in sizes if 64 <= s < suite.image_size),
            lambda c, value: replace(c, suite=replace(c.suite, image_size=value)),
        ),
    ]


def _halved(value: int, smallest: int) -> tuple[int, ...]:
    found = []
    while value // 2 >= smallest:
        value //= 2
        found.append(value)
    return tuple(found)


def ways_out(
    config: DoctorConfig, policy: QwenVLA, worst: Sequence[Budget], budgets: Callable[[DoctorConfig], Sequence[Budget]]
) -> tuple[tuple[Option, ...], Option | None]:
    """What each lever does alone, and the cheapest of them, or of their sum in order of cost, that fits."""
    places = {budget.place for budget in worst if budget.excess}
    if not places:
        return (), None

    def total(found: Sequence[Budget]) -> int:
        return sum(budget.total for budget in found if budget.place in places)

    def option(changes: Sequence[tuple[_Lever, Any]], changed: DoctorConfig) -> Option:
        found = budgets(changed)
        shown = tuple(f"{lever.key}={str(value).lower()}" for lever, value in changes)
        cost = "; ".join(lever.cost for lever, _ in changes)
        return Option(shown, cost, total(worst) - total(found), not any(budget.excess for budget in found))

    def pull(lever: _Lever, before: Sequence[tuple[_Lever, Any]], start: DoctorConfig) -> tuple[Any, Option] | None:
        """The mildest value that fits, or else the mildest of those that save most."""
        tried = [(value, option([*before, (lever, value)], lever.set(start, value))) for value in lever.values]
        most = max((made.saves for _, made in tried), default=0)
        return next(((v, made) for v, made in tried if made.fits or made.saves >= most), None)

    alone: list[Option] = []
    together: list[tuple[_Lever, Any]] = []
    changed, saved = config, 0
    chosen: Option | None = None
    for lever in _levers(config, policy):
        found = pull(lever, [], config)
        if found and found[1].saves > 0.005 * total(worst):
            alone.append(found[1])
        if chosen is None:
            found = pull(lever, together, changed)
            if found and found[1].saves > saved + 0.005 * total(worst):
                together.append((lever, found[0]))
                changed, saved = lever.set(changed, found[0]), found[1].saves
                chosen = found[1] if found[1].fits else None
    cheapest = next((made for made in alone if made.fits), None)
    return tuple(alone), cheapest or chosen
