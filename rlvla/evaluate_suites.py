"""`rlvla eval POLICY... suites=[...]`: every policy on every suite, through the cache of results.

Everything that can be refused is refused before the first episode. What was measured once is read; an evaluation that
was stopped goes on at its episodes. `rlvla compare` measures with the same functions.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

from rlvla.acting import Actor
from rlvla.compare_tables import csv_text, measured_markdown, measured_rows, policy_names
from rlvla.config import CompareConfig, EvaluateSuitesConfig
from rlvla.evaluate import evaluate, film, filmed_states
from rlvla.policies.embodiments import choose
from rlvla.policies.folder import load_policy, read_specs
from rlvla.probes import ProbeError, ask
from rlvla.results import LOG, Result, ResultStore, describe_suite, identify, policy_digest, spec_of, write_json
from rlvla.run import Run, check_output, lock_folder, pick_device, versions
from rlvla.trials import TrialLog, plan_trials
from rlvla.workers import Envs, open_envs
from rlvla_envs.base import EnvSpec, require_score
from rlvla_envs.suites import NotReadyError

Key = tuple[str, str]
"""(digest of a policy, name of a suite)."""


class Policy(NamedTuple):
    """A policy folder that was looked at and not loaded."""

    folder: Path
    sha256: str
    specs: Sequence[EnvSpec]
    """The conventions of its embodiments."""


@dataclass
class Plan:
    """What is to be measured, and what is there."""

    policies: Sequence[Policy]
    identities: Mapping[Key, Mapping[str, Any]]
    found: dict[Key, Result]
    notes: Sequence[str] = ()
    """Of results that cannot be used."""
    played: int = 0
    """Episodes that this process played."""
    cached: int = 0
    """Results that were there before."""

    def missing(self, suite: str) -> list[Policy]:
        return [p for p in self.policies if (p.sha256, suite) not in self.found]


def read_policy(folder: Path) -> Policy:
    """Raises ValueError where it is no complete policy folder."""
    specs = read_specs(folder)
    return Policy(folder, policy_digest(folder), specs)


def make_plan(config: EvaluateSuitesConfig | CompareConfig, policies: Sequence[Policy]) -> Plan:
    """Look up what is there, and check whatever can be checked of the rest, before anything is played.

    Raises:
        ValueError: suites that cannot run here, or policies whose conventions are not theirs; all of them, each with
            its cure.
        RuntimeError: a suite that does not start.
    """
    pick_device(config.device)
    store = ResultStore(Path(config.cache))
    described, problems = {}, []
    # Two result files need no suite.
    for name, suite in config.suites.items() if policies else ():
        try:
            described[name] = describe_suite(suite)
        except (ValueError, ImportError) as error:
            cure = f"\n  {error.fix}" if isinstance(error, NotReadyError) else ""
            problems.append(f"suite {name} cannot run here: {error}{cure}")
    if problems:
        raise ValueError("\n".join([*problems, "`rlvla suites` lists what every suite lacks."]))
    identities = {
        (policy.sha256, name): identify(policy.sha256, description, config.eval, config.inference_batch)
        for policy in policies
        for name, description in described.items()
    }
    looked_up = {key: store.find(identity) for key, identity in identities.items()}
    found = {key: dataclasses.replace(result, label=key[1]) for key, (result, _) in looked_up.items() if result}
    notes = [note for _, note in looked_up.values() if note]
    plan = Plan(policies, identities, found, notes, cached=len(found))
    _check_conventions(config, plan)
    return plan


def _check_conventions(config: EvaluateSuitesConfig | CompareConfig, plan: Plan) -> None:
    """Ask the suites that will be played, each in a process of its own."""
    problems: list[str] = []
    cures: dict[str, None] = {}
    for name, suite in config.suites.items():
        missing = plan.missing(name)
        if not missing:
            continue
        try:
            said = ask("rlvla_envs.trial:conventions", asdict(suite), deadline_s=config.workers.start_timeout_s)
        except ProbeError as error:
            raise RuntimeError(
                f"suite {name} does not start: {error}\n`rlvla doctor suite={name}` says what it lacks."
            ) from error
        world = EnvSpec.from_dict(said)
        try:
            require_score(world)
        except ValueError as error:
            problems.append(str(error))
            continue
        refused: dict[str, list[str]] = {}
        for policy in missing:
            try:
                choose(policy.specs, world)
            except ValueError as error:
                refused.setdefault(str(error), []).append(str(policy.folder))
                if len(policy.specs) == 1:
                    cures |= dict.fromkeys(_cures(name, policy.specs[0], world))
        problems += [f"{' and '.join(folders)} on {name}: {error}" for error, folders in refused.items()]
    if problems:
        if cures:
            problems.append(f"Of this, settings can cure: {' '.join(cures)}")
        raise ValueError("\n".join([*problems, "Nothing was played. Leave out the suites that do not fit."]))


def _cures(name: str, policy: EnvSpec, world: EnvSpec) -> Iterator[str]:
    """Settings of a suite that a policy's conventions ask for."""
    if policy.chunk_size != world.chunk_size:
        yield f"suites.{name}.chunk_size={policy.chunk_size}"
    sides = {side for camera in policy.cameras for side in (camera.height, camera.width)}
    if len(sides) == 1 and not sides & {camera.height for camera in world.cameras}:
        yield f"suites.{name}.image_size={sides.pop()}"


def measure_missing(
    config: EvaluateSuitesConfig | CompareConfig,
    plan: Plan,
    record: Run,
    more_films: Callable[[str], Sequence[int]] = lambda _: (),
) -> None:
    """Play what the plan lacks, suite by suite, and film what has not been filmed.

    Args:
        more_films: states to film of a suite, beside the first ones of its tasks; asked once its results are there.
    """
    device = pick_device(config.device)
    for note in plan.notes:
        record.progress.warn(note)
    for name, suite in config.suites.items():
        missing = plan.missing(name)
        for policy in plan.policies:
            if policy not in missing:
                record.progress.note(_line(plan.found[policy.sha256, name], "known"))
        if not missing and not any(_unfilmed(config, plan, p, name, more_films) for p in plan.policies):
            continue
        envs = open_envs(suite, config.workers, config.cluster)
        load = lru_cache(maxsize=1)(partial(_load, world=envs.spec, device=device, block=config.inference_batch))
        try:
            for policy in missing:
                key = (policy.sha256, name)
                if key not in plan.found:
                    plan.found[key] = _measure(config, plan, key, policy, load(policy.folder), envs, record)
                    record.progress.note(_line(plan.found[key], "measured"))
            # Backwards: the last one is loaded.
            for policy in reversed(plan.policies):
                states = _unfilmed(config, plan, policy, name, more_films)
                if states:
                    _film(config, plan, (policy.sha256, name), states, load(policy.folder), envs)
        finally:
            envs.close()


def _load(folder: Path, *, world: EnvSpec, device: str, block: int) -> Actor:
    policy = load_policy(folder, device)
    policy.embody_in(world)
    return Actor(policy, block=block, device=device)


def _measure(
    config: EvaluateSuitesConfig | CompareConfig,
    plan: Plan,
    key: Key,
    policy: Policy,
    actor: Actor,
    envs: Envs,
    record: Run,
) -> Result:
    identity, name = plan.identities[key], key[1]
    store = ResultStore(Path(config.cache))
    folder = store.folder(identity)
    folder.mkdir(parents=True, exist_ok=True)
    total = len(plan_trials(envs.spec, config.eval))
    with lock_folder(folder, "give another cache="):
        # Whoever held the lock may have measured it.
        known, _ = store.find(identity)
        if known:
            return known

        def show(done: int) -> None:
            plan.played += 1
            record.progress.bar(f"{name} {policy.folder}", done, total)
            record.tick()

        with TrialLog(folder / LOG, {"identity": identity, "spec": envs.spec.to_dict()}) as log:
            if log.outcomes:
                record.progress.note(f"{name}: {len(log.outcomes)} of {total} episodes were played before")
            measured, _ = evaluate(actor, envs, config.eval, name=name, log=log, on_episodes=show, keep_frames=False)
        result = Result(
            identity=identity,
            label=name,
            spec=envs.spec.to_dict(),
            policy=str(policy.folder),
            versions=versions() | {"device": actor.device},
            evaluation=dataclasses.replace(measured, policy_sha256=policy.sha256),
        )
        store.save(result)
        log.path.unlink()
    for incident in envs.take_incidents():
        record.alarm(f"evaluation {name}", str(incident))
    if measured.quarantined:
        record.alarm(
            f"evaluation {name}",
            f"initial states {measured.quarantined} killed their simulator again and again; counted as failures",
        )
    return result


def _unfilmed(
    config: EvaluateSuitesConfig | CompareConfig,
    plan: Plan,
    policy: Policy,
    name: str,
    more_films: Callable[[str], Sequence[int]],
) -> list[int]:
    result = plan.found[policy.sha256, name]
    known = {film["state"] for film in result.films}
    wanted = [*filmed_states(spec_of(result), config.eval), *(more_films(name) if config.eval.videos else ())]
    return [state for state in dict.fromkeys(wanted) if state not in known]


def _film(
    config: EvaluateSuitesConfig | CompareConfig, plan: Plan, key: Key, states: Sequence[int], actor: Actor, envs: Envs
) -> None:
    store, identity = ResultStore(Path(config.cache)), plan.identities[key]
    for state in states:
        filmed = film(actor, envs, config.eval, store.folder(identity), "film", [state])
        # A suite that draws nothing for people is not asked again.
        entry = filmed[0] if filmed else {"file": None, "success": None, "instruction": ""}
        shown = {name: entry[name] for name in ("file", "success", "instruction")}
        store.add_film(identity, {"state": state, **shown})
    plan.found[key] = dataclasses.replace(plan.found[key], films=store.films(identity))


def _line(result: Result, how: str) -> str:
    measured = result.evaluation
    low, high = measured.interval
    return (
        f"{result.label}, {result.policy}: {measured.successes} of {measured.trials}, {measured.success:.3f} "
        f"[{low:.3f}, {high:.3f}], {how}" + "".join(f"\n  note: {note}" for note in measured.notes)
    )


def run(config: EvaluateSuitesConfig) -> dict[str, Any]:
    """Measure every policy on every suite. ``config.output`` gets tables and one result file for each policy."""
    policies = [read_policy(Path(folder)) for folder in config.policies]
    check_output(config, "eval_suites")
    plan = make_plan(config, policies)
    names = policy_names([policy.folder for policy in policies])
    with Run.open(config, "eval_suites", total=len(plan.identities)) as record:
        record.require_policy(" ".join(policy.sha256 for policy in policies))
        measure_missing(config, plan, record)
        by_policy = {
            name: [plan.found[policy.sha256, suite] for suite in config.suites]
            for name, policy in zip(names, policies, strict=True)
        }
        for name, results in by_policy.items():
            write_json(record.folder / f"results-{name}.json", {"results": [r.to_dict() for r in results]})
        (record.folder / "eval.md").write_text(measured_markdown(by_policy))
        (record.folder / "eval.csv").write_text(csv_text(measured_rows(by_policy)))
        summary = {
            "success": {
                name: {result.label: result.evaluation.success for result in results}
                for name, results in by_policy.items()
            },
            "notes": sorted({note for results in by_policy.values() for r in results for note in r.evaluation.notes}),
            "episodes_played": plan.played,
            "results_known": plan.cached,
            "table": str(record.folder / "eval.md"),
        }
        record.finish(summary)
        return summary
