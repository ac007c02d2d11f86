"""What is written of an iteration: its row of metrics.jsonl, and what a person should be told at once."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tensordict import TensorDict

from rlvla.config import AlgoConfig
from rlvla.evaluate import Evaluation
from rlvla.recovery import Incident
from rlvla.run import Run
from rlvla_envs.base import EnvSpec

MAX_SDE_GAP = 0.25
"""Success of rollouts minus success of an evaluation of the same weights."""
MAX_CLIP_FRACTION = 0.5


def describe(rollout: TensorDict) -> dict[str, float]:
    """What happened in the simulators."""
    steps = rollout["next", "executed_steps"]
    success = rollout["next", "success"].any(dim=1)
    return {
        "rollout/success": float(success.float().mean()),
        "rollout/episodes": len(rollout),
        "rollout/decisions": int(rollout["valid"].sum()),
        "rollout/env_steps": int(steps.sum()),
        "rollout/mean_executed_steps": float(steps[rollout["valid"]].float().mean()),
    }


def describe_incidents(incidents: Sequence[Incident]) -> dict[str, float]:
    """Simulators that were replaced."""
    return {
        "env/restarts": len(incidents),
        "env/replayed_chunks": sum(incident.replayed_chunks for incident in incidents),
        "env/lost_episodes": sum(incident.lost_episodes for incident in incidents),
        "time/recovery_s": sum(incident.recovery_s for incident in incidents),
    }


def describe_tasks(rollout: TensorDict, spec: EnvSpec) -> dict[str, float]:
    """Success and episodes of each task, where a suite mixes several."""
    if len(spec.task_names()) == 1:
        return {}
    success = rollout["next", "success"].any(dim=1).cpu()
    task = torch.tensor([spec.task_of(int(state)) for state in rollout["initial_state"][:, 0]])
    row: dict[str, float] = {}
    for i, name in enumerate(spec.task_names()):
        row[f"rollout/episodes/{name}"] = int((task == i).sum())
        if bool((task == i).any()):
            row[f"rollout/success/{name}"] = float(success[task == i].float().mean())
    return row


def sde_gap(row: Mapping[str, Any], evaluation: Evaluation) -> float:
    """Success of the rollout minus that of the evaluation, averaged over the tasks that both have."""
    gaps = [
        row.get(f"rollout/success/{name}", row["rollout/success"]) - rate["success"]
        for name, rate in evaluation.by_task.items()
        if len(evaluation.by_task) == 1 or f"rollout/success/{name}" in row
    ]
    return float(sum(gaps) / len(gaps))


def sound_alarms(record: Run, row: dict[str, Any], algo: AlgoConfig, exploration: str) -> None:
    """Say what a person would want to know before the run is over. Thresholds: docs/metrics.md."""
    iteration = row["iteration"]

    def alarm(message: str) -> None:
        record.alarm(f"iteration {iteration}", message)

    gap = row.get("rollout/sde_gap", 0.0)
    if abs(gap) > MAX_SDE_GAP:
        alarm(
            f"with the rollout's noise the same weights succeed {100 * gap:+.0f} points from their evaluation; "
            f"what PPO improves is not what is measured. Change {exploration}"
        )
    if row["ppo/critic_only"]:
        if not algo.has_critic:
            alarm("too few successes or failures, or no group that has both; the policy was left alone")
        elif iteration >= algo.critic_only_iterations:
            alarm("too few successes or failures; trained the critic only")
        return
    if row["ppo/kl"] > 4 * row["ppo/target_kl"]:
        alarm(f"KL {row['ppo/kl']:.3g} is over 4x its target of {row['ppo/target_kl']:.3g}")
    if row.get("ppo/clip_fraction", 0.0) > MAX_CLIP_FRACTION:
        alarm(f"{row['ppo/clip_fraction']:.0%} of the ratios are clipped; most of the update is cut off")
    if row.get("value/explained_variance", 0.0) < 0 and iteration >= 5:
        alarm("explained variance is negative; the critic misleads")
