"""A frozen reasoning teacher: a language model whose answers to questions a policy's is kept near (DualVLA's idea,
docs/adr/0030).

It sees text and images that are no part of a rollout, so it has data, passes and a coefficient of its own beside the
action teacher (`rlvla.teachers`). Which conversations stand beside a minibatch follows from the seed, the iteration,
the epoch and the minibatch's number, so that a run that goes on asks what it would have asked.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rlvla.config import ConfigError, ReasoningTeacherConfig
from rlvla.policies.folder import load_policy
from rlvla.policies.policy import Policy
from rlvla.policies.prompted import PromptedPolicy
from rlvla.ranks import Group, share
from rlvla.seeding import Stream, keyed_rng
from rlvla.teachers import START, share_frozen
from rlvla.vision_language import Chat, Reader, answer_logits, answer_places, load_chats, to_device
from rlvla_algos.distill import steer_coefficient, token_kl

Answers = Callable[[Mapping[str, Tensor]], Float[Tensor, "N V"]]
"""`rlvla.vision_language.answer_logits` of a student, however its ranks hold it."""


class ReasoningTeacher:
    """How far a student's answers are from a frozen model's, and what that counts."""

    def __init__(
        self,
        vlm: nn.Module,
        reader: Reader,
        chats: Sequence[Chat],
        config: ReasoningTeacherConfig,
        *,
        seed: int,
        device: str,
    ) -> None:
        """
        Args:
            vlm: the teacher; it reads what ``reader`` makes for the student.
            chats: of all domains.

        Raises:
            ValueError: ``config.weights`` names a domain without a conversation, or leaves none to ask about.
        """
        self.vlm, self._reader, self._config, self._seed, self._device = vlm, reader, config, seed, device
        self.coef = config.coef
        domains = sorted({chat.domain for chat in chats})
        unknown = sorted(set(config.weights) - set(domains))
        if unknown:
            raise ConfigError(
                f"algo.reasoning_teacher.weights has {', '.join(unknown)}; the domains of its datasets are "
                f"{', '.join(domains)}."
            )
        self._chats = [chat for chat in chats if config.weights.get(chat.domain, 1.0) > 0]
        if not self._chats:
            raise ConfigError(
                "algo.reasoning_teacher.weights are 0 for every domain; one at least must count, or set "
                "algo.reasoning_teacher.policy=null."
            )
        self._domains = sorted({chat.domain for chat in self._chats})
        self._begin()

    def divergence(self, answers: Answers, group: Group, key: Sequence[int]) -> Float[Tensor, ""]:
        """This rank's part of the mean over answer tokens of the weighted KL(teacher || student), on conversations that
        ``key`` chooses. All ranks call it equally often.

        Args:
            answers: of the student, with gradients.
        """
        rng = keyed_rng(self._seed, Stream.REASONING, *key)
        chosen = rng.integers(len(self._chats), size=self._config.batch_size).tolist()
        first, count = share(len(chosen), group)
        # A rank without a conversation runs one that counts nothing, because the others wait for its part.
        chats = [self._chats[row] for row in (chosen[first : first + count] or chosen[:1])]
        batch = to_device(self._reader.batch(chats), self._device)
        with torch.no_grad():
            wanted = answer_logits(self.vlm, batch)
        kl = token_kl(answers(batch), wanted)
        weight = torch.zeros_like(kl)
        if count:
            domain = torch.tensor([self._domains.index(chat.domain) for chat in chats])
            of_token = domain[answer_places(batch).nonzero()[:, 0].cpu()]
            weight = self._weights()[of_token].to(kl)
            self._sums.index_add_(0, of_token, kl.detach().double().cpu())
            self._counts += torch.bincount(of_token, minlength=len(self._domains))
        total: Tensor = (weight * kl).sum() / group.total(count and len(kl))[0]
        return total

    def report(self, group: Group) -> dict[str, float]:
        """What the update measured, over all ranks; steers the next one's coefficient."""
        sums, counts = (group.total(*values.tolist()) for values in (self._sums, self._counts))
        weights = self._weights().tolist()
        weighted = sum(w * s for w, s in zip(weights, sums, strict=True))
        kl = weighted / sum(w * n for w, n in zip(weights, counts, strict=True))
        measured = {
            "loss/reasoning": weighted / sum(counts),
            "ppo/reasoning_kl": kl,
            "ppo/reasoning_coef": self.coef,
        }
        if len(self._domains) > 1:
            rows = zip(self._domains, sums, counts, strict=True)
            measured |= {f"ppo/reasoning_kl/{name}": total / count for name, total, count in rows if count}
        config = self._config
        if config.target_kl is not None:
            self.coef = steer_coefficient(self.coef, kl, config.target_kl, config.coef)
        self._begin()
        return measured

    def _begin(self) -> None:
        """An update's sums of KL and counts of tokens, by domain."""
        self._sums, self._counts = (torch.zeros(len(self._domains), dtype=torch.float64) for _ in range(2))

    def _weights(self) -> Tensor:
        return torch.tensor([self._config.weights.get(name, 1.0) for name in self._domains], dtype=torch.float64)


def load_reasoning_teacher(
    config: ReasoningTeacherConfig, student: Policy, start: Path, device: str, *, seed: int
) -> ReasoningTeacher | None:
    """The reasoning teacher of a run, or None where it has none. Weights that equal frozen ones of the student share
    their memory.

    Args:
        student: with ``requires_grad`` set on what is trained, and on nothing else.
        start: the folder that the student came from.

    Raises:
        ValueError: a student or a teacher without words, nothing of the student's language model is trained, other
            tokens than the student's, or no conversations.
    """
    if config.policy is None:
        return None
    folder = start if config.policy == START else Path(config.policy)
    vlm = frozen_vlm(folder, student, device, key="algo.reasoning_teacher.policy")
    assert isinstance(student, PromptedPolicy)
    chats = [chat for path in config.datasets for chat in load_chats(Path(path))]
    return ReasoningTeacher(vlm, Reader(student), chats, config, seed=seed, device=device)


def frozen_vlm(folder: Path, student: Policy, device: str, *, key: str) -> Any:
    """The language model in a policy folder, to be compared with a student's; errors as `load_reasoning_teacher`.

    Args:
        key: of the configuration, for messages.
    """
    if not isinstance(student, PromptedPolicy):
        raise ConfigError(
            f"{key} is for policies that read prompts by a language model with its own words; {student.config.name} is "
            "none. Leave it out."
        )
    if not any(parameter.requires_grad for parameter in student.vlm.parameters()):
        raise ConfigError(
            f"{key} is {folder}, but no parameter of the policy's language model is trained, so it answers as it did. "
            "Train it, whole or by adapters (train_vlm, lora.groups), or leave the teacher out."
        )
    policy = load_policy(folder, device)
    if not isinstance(policy, PromptedPolicy):
        raise ConfigError(
            f"{key} {folder} holds a {policy.config.name}, whose backbone answers no questions in words. Use a policy "
            "that was trained from the same one."
        )
    problems = []
    if policy.tokenizer.get_vocab() != student.tokenizer.get_vocab():
        problems.append("its tokenizer is another")
    sizes = [vlm.get_input_embeddings().weight.shape[0] for vlm in (policy.vlm, student.vlm)]
    if sizes[0] != sizes[1]:
        problems.append(f"it has {sizes[0]} tokens, the policy {sizes[1]}")
    if policy.config.vlm.patch_size != student.config.vlm.patch_size:
        problems.append("its image patches have another size")
    if problems:
        raise ConfigError(
            f"{key} {folder} cannot teach this policy: {'; '.join(problems)}. Use a policy that was trained from the "
            "same one."
        )
    policy.requires_grad_(False)
    share_frozen(policy.vlm, student.vlm)
    # The rest of the policy is not kept.
    return policy.vlm
