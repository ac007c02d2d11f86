"""`rlvla doctor`: what works on this machine, the command that cures what does not, and a memory plan for a run."""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlvla.config import DoctorConfig
from rlvla.probes import (
    GB,
    LITTLE_DISK_GB,
    MB,
    Finding,
    Played,
    Status,
    guarded,
    needs_ray,
    probe_cores,
    probe_disk,
    probe_gpu,
    probe_memory,
    probe_mujoco,
    probe_packages,
    probe_play,
    probe_python,
    probe_ray,
    probe_ray_disk,
    probe_shared_memory,
    probe_suite,
    probe_vulkan,
    renderer,
    suite_names,
)
from rlvla_envs.suites import available_mb, check_suite

if TYPE_CHECKING:
    from rlvla.memory import Budget, Plan

Probe = tuple[str, Callable[[], Sequence[Finding]], bool]
"""(name, what to call, whether the run needs it)."""


@dataclass
class Seen:
    """What probes learn for the plan."""

    gpus: list[dict[str, Any]] = field(default_factory=list)
    played: list[Played] = field(default_factory=list)


def run(config: DoctorConfig) -> dict[str, Any]:
    """Probe the machine for the run that ``config`` describes, print the page on stderr.

    Returns:
        ``ok`` (everything the run needs works, and its plan fits), ``problems`` (names of what it needs and does not
        work), ``findings`` and ``plan``.

    Raises:
        ValueError: the suite or the policy does not exist.
    """
    check_suite(config.suite)
    if config.policy:
        from rlvla.memory import check_policy

        check_policy(config.policy)
    _say(f"rlvla doctor: for `rlvla train` on {config.suite.name} {config.suite.task}\n")
    seen = Seen()
    findings: list[Finding] = []
    for name, probe, needed in probes(config, seen, findings):
        # Twice: a probe may ask two processes, each with the deadline of its own.
        for finding in guarded(name, probe, deadline_s=2 * config.deadline_s + 10, needed=needed):
            findings.append(finding)
            _say(line(finding))
    problems = [finding.name for finding in findings if finding.status is Status.missing and finding.needed]

    plan: dict[str, Any] | None = None
    if config.policy:
        made, about = planned(config, seen)
        if made is not None:
            _say("\n" + "\n".join(page(made)))
            plan = made.to_dict()
        _say("")
        for finding in about:
            findings.append(finding)
            _say(line(finding))
        problems += [finding.name for finding in about if finding.status is Status.missing]
    _say("\nready" if not problems else f"\nnot ready: {', '.join(problems)}")
    return {
        "ok": not problems,
        "problems": problems,
        "findings": [
            {"name": f.name, "status": f.status.value, "found": f.found, "fix": f.fix, "needed": f.needed}
            for f in findings
        ],
        "plan": plan,
    }


def probes(config: DoctorConfig, seen: Seen, findings: Sequence[Finding]) -> Iterator[Probe]:
    """Every probe, those that decide about later ones first; ``findings`` has what was found so far."""
    deadline, ray, draws = config.deadline_s, needs_ray(config), renderer(config.suite.name)
    yield "python", probe_python, True
    yield "packages", probe_packages, True
    yield "cores", lambda: probe_cores(config), True
    yield "memory", probe_memory, True
    yield "disk", lambda: probe_disk("disk", Path(config.output), LITTLE_DISK_GB * GB), True
    yield "gpu", lambda: probe_gpu(config, deadline, seen.gpus), config.device.startswith("cuda")
    yield "ray disk", lambda: probe_ray_disk(ray), ray
    yield "shm", lambda: probe_shared_memory(ray), ray
    yield "ray", lambda: probe_ray(ray, deadline), ray
    yield "vulkan", lambda: probe_vulkan(draws == "vulkan", deadline), draws == "vulkan"
    yield "mujoco gl", lambda: probe_mujoco(draws == "mujoco", deadline), draws == "mujoco"
    for name in suite_names(config.suite):
        yield f"suite {name}", partial(probe_suite, name, config.suite), name == config.suite.name
    before = ("vulkan", "mujoco gl", f"suite {config.suite.name}")
    broken = [f for f in findings if f.name in before and f.status is Status.missing and f.needed]
    # It would fail for the same reason, and with a worse message.
    if not broken:
        yield f"play {config.suite.name}", lambda: probe_play(config.suite, deadline, seen.played), True


def planned(config: DoctorConfig, seen: Seen) -> tuple["Plan | None", list[Finding]]:
    """The plan, and what is wrong with the policy or too small for the run."""
    from rlvla.memory import FULL, World, is_folder, plan_run

    played = seen.played[0] if seen.played else None
    world = World(played.spec, played.instruction, played.process_mb) if played else None
    try:
        plan = plan_run(config, machine(config, seen), world)
        if is_folder(config.policy) and played:
            from rlvla.policies.embodiments import choose
            from rlvla.policies.folder import read_specs

            choose(read_specs(Path(config.policy)), played.spec)
    except ValueError as error:
        return None, [Finding("policy", Status.missing, str(error), fix="rlvla sft --help")]
    findings = []
    for budget in plan.budgets:
        if budget.excess:
            enough = f"{_memory_key(budget)}={budget.total / FULL / GB:.0f}"
            changes = " ".join(plan.cheapest.changes) if plan.cheapest else enough
            fix = f"rlvla doctor policy={config.policy} ... {changes}"
            findings.append(Finding(f"plan, {budget.place}", Status.missing, _excess(budget), fix=fix))
    if config.device_memory_gb is None:
        findings += probe_disk("disk for the run", Path(config.output), plan.disk)
    return plan, findings


def machine(config: DoctorConfig, seen: Seen) -> Any:
    """What the plan has to fit into: this machine, or the one that was named."""
    from rlvla.memory import Machine

    index = int(config.device.partition(":")[2] or 0)
    has_gpu = config.device_memory_gb is not None or (config.device != "cpu" and index < len(seen.gpus))
    gpu: int | None = None
    if config.device_memory_gb is not None:
        gpu = int(config.device_memory_gb * GB)
    elif has_gpu:
        gpu = int(seen.gpus[index]["free"])
    host: int | None = None
    if config.host_memory_gb is not None:
        host = int(config.host_memory_gb * GB)
    elif config.device_memory_gb is None and (free := available_mb()) is not None:
        host = free * MB
    return Machine(has_gpu, gpu, host)


# --- the page


def line(finding: Finding) -> str:
    """``status  name  what was found``, and the cure below."""
    aside = "" if finding.needed or finding.status is Status.ok else " (this run does not need it)"
    indent = "\n" + " " * 31
    shown = f"{finding.status.value:9s}{finding.name:21s} {finding.found.replace(chr(10), indent)}{aside}"
    return shown + (f"\n{'':9s}{'':22s}-> {finding.fix}" if finding.status is not Status.ok and finding.fix else "")


def page(plan: "Plan") -> Iterator[str]:
    """The plan for people."""
    yield f"memory plan: {plan.title}"
    for note in plan.notes:
        yield f"  note: {note}"
    for budget in plan.budgets:
        yield f"\n  {budget.place}, while {budget.phase}{'':<{46 - len(budget.place + budget.phase)}}GB"
        for item in budget.items:
            yield f"    {item.what:52s}{item.bytes / GB:9.2f}"
        yield f"    {'total':52s}{budget.total / GB:9.2f}{'':4s}{_verdict(budget)}"
    yield f"\n  disk: {plan.disk / GB:.2f} GB of checkpoints at once"
    if plan.options:
        yield "\n  options, each alone:"
        for option in plan.options:
            verdict = "fits" if option.fits else "does not fit"
            yield f"    {' '.join(option.changes):34s} saves {option.saves / GB:8.2f} GB, {verdict}; {option.cost}"
    if not plan.fits:
        if plan.cheapest is None:
            yield "  no sum of these fits: it takes a larger machine"
        elif len(plan.cheapest.changes) > 1:
            yield f"  together: {' '.join(plan.cheapest.changes)} saves {plan.cheapest.saves / GB:.2f} GB and fits"


def _verdict(budget: "Budget") -> str:
    if budget.available is None:
        return f"not compared; name what there is with {_memory_key(budget)}="
    if budget.excess:
        return _excess(budget)
    return f"fits: {budget.available / GB:.1f} are there"


def _excess(budget: "Budget") -> str:
    return (
        f"this run needs {budget.total / GB:.1f} GB, the {budget.place} has {(budget.available or 0) / GB:.1f}, "
        "of which 5% must stay free"
    )


def _memory_key(budget: "Budget") -> str:
    return "device_memory_gb" if budget.place == "GPU" else "host_memory_gb"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
