"""docs/benchmarks/scaling.md: assumptions, predictions and validations as tables."""

import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from scaling_measure import CALIBRATION, checks_of
from scaling_model import Costs, Plan, Prediction, Schedule, UpdateDevice, simulate

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "benchmarks" / "scaling.md"
GPUS = (1, 2, 4, 8, 16, 32, 64)
ENVS = (16, 64, 256, 1024, 4096)
PAYS = 1.05
"""Twice the environments pay when they make the iteration this much faster."""


@dataclass(frozen=True)
class Assumption:
    name: str
    value: float
    unit: str
    source: str
    """ASSUMED or MEASURED, and where from."""


FLOPS = 400e12
VALUES = (
    Assumption(
        "environment step",
        1 / 131,
        "s",
        "MEASURED, [SimplerEnv on one core](simpler_env.md), renders included; at H = 8, and H = 16 has half of them",
    ),
    Assumption("reset", 0.088, "s", "MEASURED, SimplerEnv [below](#is-the-model-right), CPU time"),
    Assumption("spread of a chunk's seconds, lognormal sigma", 0.4, "", "ASSUMED; 0.23 and 0.55 below in CPU time"),
    Assumption("request to an actor", 0.003, "s", "MEASURED, Ray 2.60, 2 to 5 MB of images, idle machine"),
    Assumption("storing a decision", 0.0003, "s", "MEASURED below, CPU time, small policies"),
    Assumption("cores per GPU", 16, "", "ASSUMED: two sockets of 64 for 8 GPUs"),
    Assumption("actors per core", 2, "", "ASSUMED: two groups of actors need two for each core"),
    Assumption("episodes an iteration", 2048, "", "`configs/recipe/simpler_env_gpu.yaml`"),
    Assumption("decisions an episode", 4.125, "", "ASSUMED: 2, 3, 4 or 8 of 15 executed steps, mostly 4; H = 16"),
    Assumption("one length of prompt", 1, "", "ASSUMED"),
    Assumption("rows of an inference block", 64, "", "the same recipe, or the slots of a group if they are fewer"),
    Assumption(
        "arithmetic of a GPU",
        FLOPS,
        "FLOP/s",
        "ASSUMED: 40% of the bf16 peak of an 80 GB H100. rlvla runs in fp32 today",
    ),
    Assumption(
        "inference, each row",
        2.08e12 / FLOPS,
        "s",
        "ASSUMED: counted 0.92 TFLOP for VLM and image, 4 denoising steps of 0.29",
    ),
    Assumption("inference, each block", 0.05, "s", "ASSUMED: kernel launches of 32 + 4 x 16 layers"),
    Assumption(
        "training on a decision",
        3 * 0.29e12 / FLOPS,
        "s",
        "ASSUMED: frozen backbone, stored context, the expert alone, three times its forward pass",
    ),
    Assumption("epochs; decisions an optimizer step", 4, "; 256", "the same recipe"),
    Assumption("optimizer step", 0.02, "s", "ASSUMED: Adam reads and writes 18 GB, launches"),
    Assumption("gradient", 1.149e9 * 4, "bytes", "counted: the expert in fp32"),
    Assumption("ring inside a node of 8 GPUs", 300e9, "B/s", "ASSUMED: NVLink, two thirds of the 450 on paper"),
    Assumption(
        "ring between nodes",
        320e9,
        "B/s",
        "ASSUMED: 8 adapters of 400 Gb/s a node, 80% of them; the inside is narrower",
    ),
    Assumption("latency of a ring step", 10e-6, "s", "ASSUMED"),
)
BY_NAME = {assumption.name: assumption.value for assumption in VALUES}

TABLE_COSTS = Costs(
    step_s=BY_NAME["environment step"],
    reset_s=BY_NAME["reset"],
    spread=BY_NAME["spread of a chunk's seconds, lognormal sigma"],
    call_s=BY_NAME["request to an actor"],
    record_s=BY_NAME["storing a decision"],
    inference_base_s=BY_NAME["inference, each block"],
    inference_row_s=BY_NAME["inference, each row"],
    train_s=BY_NAME["training on a decision"],
    score_s=BY_NAME["training on a decision"] / 3,
    optimizer_s=BY_NAME["optimizer step"],
    gradient_bytes=BY_NAME["gradient"],
    local_bandwidth=BY_NAME["ring inside a node of 8 GPUs"],
    network_bandwidth=BY_NAME["ring between nodes"],
    hop_s=BY_NAME["latency of a ring step"],
)
EPISODES, CORES, ACTORS_PER_CORE, BLOCK = 2048, 16, 2, 64
DECISIONS = (2, 3, 4, 4, 4, 4, 4, 8)


@dataclass(frozen=True)
class Setup:
    """A column of the comparison."""

    name: str
    title: str
    schedule: Schedule
    split: bool = False
    """Half of the GPUs act, half learn."""


SETUPS = (
    Setup("sync", "sync", Schedule.sync),
    Setup("pingpong", "pingpong", Schedule.pingpong),
    Setup("async", "async, minibatches and inference taking turns on every GPU", Schedule.one_off),
    Setup("split", "async, half of the GPUs acting and half learning", Schedule.one_off, split=True),
)


def plan_for(
    setup: Setup, gpus: int, envs: int, *, episodes: int = EPISODES, actors_per_core: int = ACTORS_PER_CORE
) -> Plan | None:
    """The plan of a cell, or None where it makes no sense: fewer environments than ranks, one actor in two groups."""
    ranks = gpus // 2 if setup.split else gpus
    if ranks == 0 or envs < ranks:
        return None
    cores = CORES * gpus // ranks
    per_rank = envs // ranks
    actors = min(per_rank, actors_per_core * cores)
    if setup.schedule is Schedule.pingpong and actors < 2:
        return None
    groups = 2 if setup.schedule is Schedule.pingpong else 1
    own = UpdateDevice.own if setup.split else UpdateDevice.interleaved
    return Plan(
        schedule=setup.schedule,
        ranks=ranks,
        learners=gpus - ranks if setup.split else None,
        update_device=own if setup.schedule is Schedule.one_off else UpdateDevice.exclusive,
        actors=actors,
        envs_per_actor=per_rank // actors,
        cores=cores,
        inference_batch=min(BLOCK, per_rank // groups),
        episodes=episodes,
        decisions=DECISIONS,
        chunk_steps=15.0,
        epochs=4.0,
        minibatch=256 * episodes // EPISODES,
    )


@cache
def predict(setup: Setup, gpus: int, envs: int, episodes: int = EPISODES) -> Prediction | None:
    plan = plan_for(setup, gpus, envs, episodes=episodes)
    return None if plan is None else simulate(plan, TABLE_COSTS)


def knee(setup: Setup, gpus: int) -> tuple[int, Prediction]:
    """(environments per GPU, prediction) after which twice as many no longer pay."""
    best: tuple[int, Prediction] | None = None
    for per_gpu in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024):
        found = predict(setup, gpus, per_gpu * gpus)
        if found is None:
            continue
        if best is not None and best[1].iteration_s < PAYS * found.iteration_s:
            break
        best = per_gpu, found
    assert best is not None
    return best


def wrap(text: str, **options: str) -> str:
    return textwrap.fill(text, 118, break_on_hyphens=False, break_long_words=False, **options)  # type: ignore[arg-type]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def validation_table(saved: Mapping[str, Any]) -> str:
    rows = [
        [
            found.label,
            m.schedule,
            f"{m.actors} x {m.envs_per_actor}",
            str(m.iterations),
            f"{m.load:.1f}" if m.load else "not noted",
            f"{m.rollout_s:.1f}",
            f"{m.update_s:.1f}",
            f"{m.steps_per_s:.0f}",
            *("-" if math.isnan(value) else f"{value:.2f}" for value in found.ratios.values()),
        ]
        for found in checks_of(saved)
        for m in [found.measured]
    ]
    head = ["row", "schedule", "actors x envs", "iterations", "load", "rollout s", "update s", "steps/s"]
    return table(
        [*head, *(f"{name} ratio" for name in ("env steps", "rollout", "update", "steps/s", "iteration"))], rows
    )


def validation(saved: Mapping[str, Any]) -> str:
    """The section of one calibration."""
    kind = "CPU time" if saved["cpu_time"] else "wall clock"
    about = f"{saved['episodes']} episodes an iteration; {saved['machine']}, no GPU, rlvla {saved['commit']}."
    parts = [f"### {saved['suite']}, {kind}", about, f"```\n{saved['command']}\n```"]
    return "\n\n".join([*parts, costs_line(saved["calibration"]["costs"]), validation_table(saved)])


def costs_line(costs: Mapping[str, float]) -> str:
    """What a calibration found, in a sentence."""
    names = {
        "step_s": "step with its share of renders",
        "reset_s": "reset",
        "call_s": "request",
        "inference_base_s": "block of inference",
        "record_s": "storing a decision",
        "train_s": "training on a decision",
    }
    found = ", ".join(f"{label} {1000 * costs[name]:.1f}" for name, label in names.items())
    return wrap(f"Costs in milliseconds: {found}; spread {costs['spread']:.2f}.")


def grid(setup: Setup) -> str:
    rows = []
    for envs in ENVS:
        cells = []
        for gpus in GPUS:
            found = predict(setup, gpus, envs)
            cells.append(
                f"{100 * found.device_busy:.0f} / {100 * found.core_busy:.0f} / {found.steps_per_s:.0f}"
                if found
                else "-"
            )
        rows.append([str(envs), *cells])
    return table(["environments", *(f"{gpus} GPU{'s' * (gpus > 1)}" for gpus in GPUS)], rows)


def knees() -> str:
    rows = []
    for gpus in (1, 8, 64):
        for setup in SETUPS:
            if setup.split and gpus == 1:
                continue
            per_gpu, found = knee(setup, gpus)
            base = predict(SETUPS[0], gpus, per_gpu * gpus)
            assert base is not None
            rows.append(
                [
                    str(gpus),
                    setup.name,
                    str(per_gpu),
                    f"{found.iteration_s:.0f}",
                    f"{found.rollout_s:.0f}",
                    f"{found.update_s:.0f}",
                    f"{100 * found.device_busy:.0f}%",
                    f"{base.iteration_s / found.iteration_s:.2f}",
                ]
            )
    head = ["GPUs", "schedule", "envs per GPU", "iteration s", "rollout s", "update s", "GPU busy", "over sync"]
    return table(head, rows)


def weak() -> str:
    """The iteration grows with the machine: 128 environments per GPU, 16 episodes each, as in the recipe."""
    rows = []
    for gpus in GPUS:
        found = [predict(setup, gpus, 128 * gpus, EPISODES * gpus) for setup in SETUPS]
        rows.append(
            [str(gpus), *(f"{f.steps_per_s / gpus:.0f} ({100 * f.device_busy:.0f}%)" if f else "-" for f in found)]
        )
    return table(["GPUs", *(setup.name for setup in SETUPS)], rows)


def what_if() -> Iterator[tuple[str, int, list[float]]]:
    """(change, GPUs, iteration seconds over those of the assumptions for each setup), at 128 environments per GPU on 8
    GPUs and 64 on 64."""
    costs = TABLE_COSTS
    simulator = {"step_s": costs.step_s, "reset_s": costs.reset_s}
    inference = {"inference_base_s": costs.inference_base_s, "inference_row_s": costs.inference_row_s}
    update = {"train_s": costs.train_s, "score_s": costs.score_s}

    def times(factor: float, which: Mapping[str, float]) -> Costs:
        changed: dict[str, Any] = {name: factor * value for name, value in which.items()}
        return replace(costs, **changed)

    changes: list[tuple[str, Costs, dict[str, Any]]] = [
        ("simulator 4 times slower", times(4, simulator), {}),
        ("simulator 4 times faster", times(1 / 4, simulator), {}),
        ("inference 2 times slower", times(2, inference), {}),
        ("update 4 times slower: the backbone trained too", times(4, update), {}),
        ("everything on the GPU 4 times slower: fp32", times(4, inference | update), {}),
        ("chunks twice as uneven", times(2, {"spread": costs.spread}), {}),
        ("one adapter a node: 40 GB/s", replace(costs, network_bandwidth=40e9), {}),
        ("four lengths of prompt", costs, {"prompt_shares": (1.0, 1.0, 1.0, 1.0)}),
        ("inference blocks of at most 16 rows", costs, {"inference_batch": 16}),
        ("one actor per core", costs, {}),
    ]
    for gpus, envs in ((8, 1024), (64, 4096)):
        for name, changed, options in changes:
            ratios = []
            for setup in SETUPS:
                base = plan_for(setup, gpus, envs)
                plan = plan_for(setup, gpus, envs, actors_per_core=1) if name == "one actor per core" else base
                assert base is not None
                assert plan is not None
                now = simulate(replace(plan, **options), changed).iteration_s
                ratios.append(now / simulate(base, costs).iteration_s)
            yield name, gpus, ratios


def sensitivity() -> str:
    rows = [[name, str(gpus), *(f"{ratio:.2f}" for ratio in ratios)] for name, gpus, ratios in what_if()]
    return table(["change", "GPUs", *(setup.name for setup in SETUPS)], rows)


def assumptions() -> str:
    def shown(value: float) -> str:
        return f"{value:.4g}" if value < 1e4 else f"{value:.2e}"

    return table(
        ["what", "value", "where from"], [[v.name, f"{shown(v.value)} {v.unit}".strip(), v.source] for v in VALUES]
    )


def render(saved: Sequence[Mapping[str, Any]]) -> str:
    """The page."""
    grids = "\n\n".join(f"### {setup.title[0].upper()}{setup.title[1:]}\n\n{grid(setup)}" for setup in SETUPS)
    validations = "\n\n".join(validation(v) for v in saved)
    return f"""# Predicted: more GPUs and more environments

<!-- Written by scripts/simulate_scaling.py --page. -->

Nothing on this page was run on a GPU. A discrete-event model ([`simulate`](../../scripts/scaling_model.py)) plays
[rollouts](../adr/0007-whole-episodes-and-fused-rounds.md) round by round and then the update, with costs that are
measured where that was possible and assumed where it was not.

```
scripts/simulate_scaling.py --page      # after the commands under "Is the model right?"
```

## What to conclude

{conclusions(saved)}

## Is the model right?

{VALIDATION}

{validations}

## Assumptions of the tables

A node has 8 GPUs of 80 GB; the policy is the paper's, 4.54 B and an expert of 1.15 B, its backbone frozen. What is
ASSUMED was not measured: see [how much it decides](#what-the-assumptions-decide) before you buy anything.

{assumptions()}

## Tables

Each cell: GPU busy % / core busy % / environment steps per second over rollout and update. An all-reduce counts as
waiting. "-": fewer environments than acting GPUs, or too few for two groups. The iteration stays at {EPISODES}
episodes: more GPUs make the same run faster. Where environments are more than episodes the rest stand idle, and
`pingpong` has nothing left for its second group.

{grids}

## Where environments stop paying

The number of environments per GPU after which twice as many make the iteration less than 5% shorter.

{knees()}

## An iteration that grows with the machine

128 environments per GPU with 16 episodes each, minibatches grown alike. Environment steps per second and GPU, and GPU
busy. A larger iteration is another algorithm: it may need more environment steps to the same success.

{weak()}

## What the assumptions decide

Seconds of an iteration over those under the assumptions above, 1024 environments on 8 GPUs and 4096 on 64.

{sensitivity()}

## What the model leaves out

{LEFT_OUT}
"""


VALIDATION = """Costs are measured on one actor with 4 environments. Every other row is predicted from them and from the
lengths of those episodes alone, and compared with what was really run: on other layouts, other episodes, and by
finished runs of the recipes, in the first four iterations that trained the policy. Later its episodes are shorter.
Ratios are predicted / measured; that of steps/s is over the rollout alone. "load" is the load average of the two
cores after a measurement. The machine was never quiet, which leaves two ways:

* *Wall clock*: rows are run one after another while **other jobs take an unknown, changing part of the two cores**.
  On PushCube the calibration's own layout is run again at the end; how far its ratio is from 1 is how far any ratio
  may be from 1 for that reason alone.
* *CPU time*: the seconds that the process computes, on one thread, which other jobs change less; the update is
  taken to be twice as fast on two cores. It predicts an idle machine and is compared with runs that were recorded
  when the machine was quieter, not idle."""

LEFT_OUT = """* Several learners. Only `sync` on one process is validated so far. `--validate RUN --checks 2x4` with
  `--schedules pingpong async` runs and predicts the other two; the update and the simulators then share the cores.
* Suites whose slots restart in groups (`physx_cuda`), simulation on the GPU, simulators on other hosts than the GPU.
* A pass of the VLM over final observations with `algo.bootstrap_time_limit`, evaluations, checkpoints, GPU memory.
* `async` with two groups, which would combine both gains.
* Overlap of the all-reduce with the backward pass; it would hide part of it.
* Simulators that slow each other down, and failures: cores are alike and independent."""


def conclusions(saved: Sequence[Mapping[str, Any]]) -> str:
    """Sentences whose numbers are the model's."""
    lines = []
    for cpu_time, costs in ((True, "in CPU time"), (False, "by the wall clock of a busy machine")):
        rows = [c for v in saved if v["cpu_time"] is cpu_time for c in checks_of(v)]
        ratios = [c.ratios for c in rows if c.label != CALIBRATION and c.measured.schedule == "sync"]
        if not ratios:
            continue
        ranges = {key: f"{min(r[key] for r in ratios):.2f} to {max(r[key] for r in ratios):.2f}" for key in ratios[0]}
        lines.append(
            f"* Predicted / measured on two cores, from costs {costs}: rollout's steps/s {ranges['steps_per_s']}, its "
            f"seconds {ranges['rollout_s']} (the length of episodes is a part of that), update's seconds "
            f"{ranges['update_s']}; {len(ratios)} rows."
        )
    others = [c for v in saved for c in checks_of(v) if c.measured.schedule != "sync"]
    for schedule in dict.fromkeys(c.measured.schedule for c in others):
        found = [c.ratios["iteration_s"] for c in others if c.measured.schedule == schedule]
        lines.append(
            f"* Of `{schedule}` there: an iteration's seconds {min(found):.2f} to {max(found):.2f}; {len(found)} rows."
        )
    names = " and ".join(f"`{name}`" for name in ("sync", *dict.fromkeys(c.measured.schedule for c in others)))
    lines.append(
        f"* That is {names} on one process without a GPU. **All that follows is a prediction from assumed costs that "
        "nothing has checked**: read it as an order, not as numbers."
    )
    for gpus in (1, 8):
        parts = []
        for setup in SETUPS:
            if setup.split and gpus == 1:
                continue
            per_gpu, found = knee(setup, gpus)
            parts.append(f"{setup.name} at {per_gpu} ({100 * found.device_busy:.0f}% of the GPU busy)")
        lines.append(f"* On {gpus} GPU{'s' * (gpus > 1)} more environments per GPU stop paying: {', '.join(parts)}.")

    def gain(name: str, gpus: int, envs: int) -> float:
        setup = next(s for s in SETUPS if s.name == name)
        sync, found = predict(SETUPS[0], gpus, envs), predict(setup, gpus, envs)
        assert sync is not None
        assert found is not None
        return sync.iteration_s / found.iteration_s

    lines.append(
        f"* At 64 environments per GPU pingpong is {gain('pingpong', 1, 64):.2f} times as fast as sync on 1 GPU and "
        f"{gain('pingpong', 8, 512):.2f} on 8, async in turns {gain('async', 1, 64):.2f} and "
        f"{gain('async', 8, 512):.2f}. pingpong stays on-policy, async does not."
    )
    lines.append(
        f"* Splitting the GPUs into acting and learning ones gives {gain('split', 8, 512):.2f} there, "
        f"{gain('split', 64, 4096):.2f} on 64 GPUs; letting every GPU do both in turns {gain('async', 8, 512):.2f} and "
        f"{gain('async', 64, 4096):.2f}."
    )
    best = {
        gpus: max((p for e in ENVS if (p := predict(SETUPS[0], gpus, e))), key=lambda p: p.steps_per_s) for gpus in GPUS
    }
    lines.append(
        "* The same iteration on more GPUs, sync, best number of environments: "
        + ", ".join(f"{gpus}: {best[gpus].steps_per_s / best[1].steps_per_s:.1f} times" for gpus in GPUS[1:])
        + f" as fast as on one. Of the {best[64].iteration_s:.0f} s that are left on 64, {best[64].update_s:.0f} s are "
        "the update: 128 optimizer steps that no longer have work for all GPUs, and their all-reduce."
    )
    lines.append(
        "* A busy GPU is not a useful one: padding of blocks that are not full counts as busy. rlvla runs in fp32 "
        "today, which is several times slower than what is assumed here."
    )
    return "\n".join(wrap(line, subsequent_indent="  ") for line in lines)
