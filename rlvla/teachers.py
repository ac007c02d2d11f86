"""A frozen action teacher: a policy folder that PPO stays near (DualVLA's idea, docs/adr/0028).

A stored decision's sample and observation do not change during an update, so what the teacher would have done is
computed once an iteration, not once a minibatch. A teacher of another kind (of text, say) has a part of `AlgoConfig` of
its own and can use `rlvla_algos.distill.steer_coefficient`.
"""

from pathlib import Path
from typing import cast

import numpy as np
import torch
from tensordict import TensorDict
from torch import nn

from rlvla.config import AlgoConfig, ConfigError, TeacherConfig
from rlvla.parallel import context_of
from rlvla.policies.base import ChunkPolicy, context_is_fixed
from rlvla.policies.folder import load_policy
from rlvla.policies.policy import Policy
from rlvla.rounds import recall
from rlvla.samplers import Sampler
from rlvla_envs.base import EnvSpec, require_match

START = "start"
"""Instead of a folder: the policy that the run begins with."""


class ActionTeacher:
    """What a frozen policy would have done where the student decided."""

    def __init__(self, policy: ChunkPolicy, *, reads_contexts: bool) -> None:
        """
        Args:
            reads_contexts: the student's stored contexts are what it would make of the observations itself.
        """
        self.policy, self.reads_contexts = policy, reads_contexts

    @torch.no_grad()
    def answers(self, data: TensorDict, sampler: Sampler, rows: int) -> TensorDict:
        """Parameters of the distributions that the teacher would have drawn stored decisions from.

        Args:
            data: [M] decisions that ``sampler`` can score, with ``context`` or ``batch``.
            rows: how many to compute at once.
        """
        parts = []
        for decisions in data.split(rows):
            part = recall(decisions)
            context = context_of(self.policy, part if self.reads_contexts else part.exclude("context"))
            parts.append(TensorDict(sampler.score(self.policy, context, part).parameters, batch_size=[len(part)]))
        return cast(TensorDict, torch.cat(parts))


def load_teacher(algo: AlgoConfig, student: Policy, start: Path, device: str) -> ActionTeacher | None:
    """The teacher of a run, or None where it has none. Weights that equal frozen ones of the student share their
    memory.

    Args:
        student: with ``requires_grad`` set on what is trained, and on nothing else.
        start: the folder that the student came from.

    Raises:
        ValueError: what it says could not be compared with the student's.
    """
    if algo.teacher.policy is None:
        return None
    folder = start if algo.teacher.policy == START else Path(algo.teacher.policy)
    teacher = load_policy(folder, device)
    teacher.embody_in(student.env_spec, right="policy that it is to teach")
    check_comparable(teacher, student, folder)
    teacher.requires_grad_(False)
    # Or it would differ from the student before the first step.
    teacher.precision = student.precision
    shared = share_frozen(teacher, student)
    readers = {id(p) for group in student.context_groups for p in teacher.parameter_groups()[group]}
    same = all(id(p) in shared for p in teacher.parameters() if id(p) in readers)
    return ActionTeacher(teacher, reads_contexts=same and context_is_fixed(student, algo.train_vlm, algo.freeze))


def check_comparable(teacher: Policy, student: Policy, folder: Path) -> None:
    """Raise ValueError where a distance would mean something else than a difference of behaviour."""
    require_match(teacher.env_spec, student.env_spec, left="teacher", right="policy")
    problems = []
    if teacher.config.name != student.config.name:
        problems.append(f"it is a {teacher.config.name}, the policy a {student.config.name}")
    if (teacher.horizon, teacher.channels) != (student.horizon, student.channels):
        sizes = f"{teacher.horizon} x {teacher.channels}, the policy's {student.horizon} x {student.channels}"
        problems.append(f"its action tensor is {sizes}")
    steps = [getattr(policy, "num_denoising_steps", None) for policy in (teacher, student)]
    if steps[0] != steps[1]:
        problems.append(f"it takes {steps[0]} denoising steps, not {steps[1]}")
    pairs = zip(vars(teacher.stats).values(), vars(student.stats).values(), strict=True)
    if not all(np.array_equal(one, other) for one, other in pairs):
        problems.append("its actions or states are normalised by other statistics")
    if teacher.tokenizer.get_vocab() != student.tokenizer.get_vocab():
        problems.append("its tokenizer is another")
    if problems:
        raise ValueError(
            f"algo.teacher.policy {folder} cannot teach this policy: {'; '.join(problems)}. Use a policy that was "
            "trained from the same one, or algo.teacher.policy=start."
        )


def share_frozen(teacher: nn.Module, student: nn.Module) -> set[int]:
    """Let the teacher's parameters that equal a student's frozen one use its memory; ids of those that do."""
    frozen = {name: p for name, p in student.named_parameters() if not p.requires_grad}
    shared = set()
    for name, parameter in teacher.named_parameters():
        own = frozen.get(name)
        if own is not None and own.shape == parameter.shape and torch.equal(own.to(parameter.dtype), parameter):
            parameter.data = own.data
            shared.add(id(parameter))
    return shared


def check_teacher_weights(config: TeacherConfig, spec: EnvSpec) -> None:
    """Raise ConfigError where ``algo.teacher.weights`` names a task that the suite does not have."""
    names = spec.task_names()
    unknown = sorted(set(config.weights) - set(names))
    if unknown:
        raise ConfigError(
            f"algo.teacher.weights has {', '.join(unknown)}; the tasks of {spec.suite} are {', '.join(names)}."
        )


def add_teacher_weight(rollout: TensorDict, spec: EnvSpec, config: TeacherConfig) -> None:
    """Put ``teacher_weight`` [E, T] into a rollout: how much the teacher counts, by the task of each episode."""
    if config.policy is None:
        return
    of_task = [config.weights.get(name, 1.0) for name in spec.task_names()]
    states = rollout["initial_state"][:, 0].tolist()
    weight = torch.tensor([of_task[spec.task_of(state)] for state in states], device=rollout.device)
    rollout["teacher_weight"] = weight[:, None].expand(rollout.batch_size).clone()
