"""Twin-to-one distillation (TwinBrainVLA, appendix G): one brain learns the states of a twin's right brain.

    L = L_action + lambda L_feat,    L_feat = 1 / L sum_i || H_student^(i) - sg(H_teacher^(i)) ||^2

over the L valid tokens of the prompt, the squares summed over the hidden size as the equation has it.
"""

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from tensordict import TensorDict
from torch import Tensor

from rlvla.policies.base import Context
from rlvla.policies.folder import load_policy
from rlvla.policies.policy import Policy
from rlvla_envs.base import Observation, require_match


def feature_loss(
    student: Float[Tensor, "B S D"], teacher: Float[Tensor, "B S D"], mask: Bool[Tensor, "B S"]
) -> Float[Tensor, ""]:
    """Equation 9, averaged over rows.

    Examples:
        >>> student = torch.tensor([[[1.0, 2.0], [0.0, 0.0], [9.0, 9.0]]])
        >>> feature_loss(student, torch.zeros(1, 3, 2), torch.tensor([[True, True, False]]))
        tensor(2.5000)
    """
    distance = (student.float() - teacher.detach().float()).square().sum(dim=-1) * mask
    return (distance.sum(dim=1) / mask.sum(dim=1)).mean()


class TwinTeacher:
    """A frozen TwinBrainVLA whose right brain's hidden states are what a student's should be."""

    def __init__(self, folder: Path, student: Policy, device: str) -> None:
        """Read the teacher and compare it with its student.

        Raises:
            ValueError: not a TwinBrainVLA, of another suite, or of another size than the student.
        """
        self.policy = load_policy(folder, device).requires_grad_(False)
        self.folder = folder
        name, own = self.policy.config.name, student.config.name
        if name != "twinbrain_vla":
            raise ValueError(f"twin_teacher={folder} is a {name} policy; it must be a twinbrain_vla policy.")
        if own == name:
            raise ValueError(
                "the student has two brains as well; distillation is for one. Set policy= to a qwen_gr00t policy "
                "of the sizes of the teacher's right brain."
            )
        require_match(self.policy.env_spec, student.env_spec, left="teacher", right="student")
        sizes = [int(p.config.vlm.hidden_size) for p in (self.policy, student)]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"policy.vlm.hidden_size is {sizes[1]}, the teacher's {sizes[0]}; their hidden states cannot be "
                "compared. Give the student the sizes of the teacher's right brain."
            )

    def loss(self, observation: Observation, batch: TensorDict, context: Context) -> Float[Tensor, ""]:
        """L_feat of a batch that the student has encoded.

        Raises:
            ValueError: student and teacher read different tokens.
        """
        theirs = self.policy.collate(observation).to(context.tokens.device)
        # Prompts are right-padded, and the two may be padded to different lengths. Behind the padding the teacher may
        # have a token of the state, which the student has elsewhere.
        length = int(batch["mask"].sum(dim=1).max())
        mask, ids = batch["mask"][:, :length], batch["input_ids"][:, :length]
        same = torch.equal(theirs["mask"].sum(dim=1), mask.sum(dim=1))
        if not same or not torch.equal(theirs["input_ids"][:, :length][mask], ids[mask]):
            raise ValueError(
                "student and teacher read different prompts. Set policy.prompt.system and policy.prompt.user to the "
                f"right_prompt in {self.folder / 'config.yaml'}."
            )
        target = self.policy.encode(theirs).tokens[:, :length]
        return feature_loss(context.tokens[:, :length], target, mask)


def twin_teacher(config: Any, student: Policy, device: str) -> TwinTeacher | None:
    """The teacher that a configuration of `rlvla sft` names, if it names one."""
    return TwinTeacher(Path(config.twin_teacher), student, device) if config.twin_teacher else None
