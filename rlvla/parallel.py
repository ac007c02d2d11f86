"""How the ranks of a group hold the policy they train: whole (DDP), or each a part of it (FSDP2).

Whoever acts, saves and loads sees one plain policy, the same object in every case.

* Alone, that policy is trained itself.
* With DDP too; a wrapper averages its gradients.
* With FSDP2 a twin is trained, whose parameters are split over the ranks. The plain policy has weights while it acts
  and is saved, and none during the epochs. So rollouts need no other rank: the ranks play different numbers of rounds,
  and the hooks of a split module would wait for each other at each.
"""

import copy
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Bool, Float
from tensordict import TensorDict
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from rlvla.config import LearnerStrategy
from rlvla.policies.base import ChunkPolicy, Context
from rlvla.policies.policy import Policy
from rlvla.ranks import Group
from rlvla.samplers import Likelihood, Sampler
from rlvla.vision_language import answer_logits


class Scored(NamedTuple):
    """One pass over the rows of a minibatch."""

    likelihood: Likelihood
    features: Float[Tensor, "M V"]
    """For the value head; they carry no gradient."""
    tokens: Float[Tensor, "M S D"]
    """Of the contexts, as `features`."""
    token_mask: Bool[Tensor, "M S"]
    auxiliary: Float[Tensor, " M"]
    """The policy's weighted auxiliary losses, where the minibatch has the next images; else zeros."""


def context_of(policy: ChunkPolicy, batch: TensorDict) -> Context:
    """The stored context is used where the backbone is frozen."""
    return Context.from_tensordict(batch["context"]) if "context" in batch else policy.encode(batch["batch"])


def score(policy: ChunkPolicy, batch: TensorDict, sampler: Sampler) -> Scored:
    """Score stored decisions under the policy as it is now."""
    context = context_of(policy, batch)
    features = policy.value_features(context)
    auxiliary = torch.zeros(len(batch), device=features.device)
    if "batch" in batch and "next" in batch["batch"]:
        trained = cast(Policy, policy)
        for name, loss in trained.auxiliary_losses(context, batch["batch"]).items():
            auxiliary = auxiliary + trained.auxiliary_weights[name] * loss
    likelihood = sampler.score(policy, context, batch)
    return Scored(likelihood, features, context.tokens.detach(), context.mask, auxiliary)


class Scorer(nn.Module):
    """`score`, or `answer_logits` of the backbone, as the one forward of a module: the hooks of DDP and FSDP2 see
    nothing else of a policy."""

    def __init__(self, policy: ChunkPolicy) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, batch: Any, sampler: Sampler | None = None) -> Any:
        """
        Args:
            batch: decisions; without a sampler, conversations as `rlvla.vision_language.Reader` makes them.
        """
        if sampler is None:
            return answer_logits(cast(Any, self.policy).vlm, batch)
        return score(self.policy, batch, sampler)


class Whole:
    """One learner: the policy that acts is the one that is trained."""

    def __init__(self, policy: ChunkPolicy) -> None:
        self.policy = policy

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Of what is trained."""
        return self.policy.parameter_groups()

    def score(self, batch: TensorDict, sampler: Sampler) -> Scored:
        """All ranks call it equally often."""
        return score(self.policy, batch, sampler)

    def answers(self, conversations: Mapping[str, Tensor]) -> Float[Tensor, "N V"]:
        """`answer_logits` of the backbone; all ranks call it equally often."""
        return answer_logits(cast(Any, self.policy).vlm, conversations)

    def lend(self) -> None:
        """Before the epochs: the acting policy need not hold weights until `give_back`."""

    def give_back(self) -> None:
        """After the epochs: the acting policy has the trained weights. All ranks call it."""

    def take(self) -> None:
        """After others were loaded: train on from the acting policy's weights."""

    def optimizer_state(self, optimizer: torch.optim.Optimizer, *, keep: bool) -> dict[str, Any]:
        """Its state with whole tensors, as of one learner. All ranks call it.

        Args:
            keep: this rank wants the tensors.
        """
        return optimizer.state_dict()

    def load_optimizer_state(self, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
        """Take over what `optimizer_state` gave, with whatever number of ranks."""
        optimizer.load_state_dict(dict(state))


class Averaged(Whole):
    """DDP: every rank trains the whole policy, with the mean of all gradients."""

    def __init__(self, policy: ChunkPolicy) -> None:
        super().__init__(policy)
        # Buffers are constants; sending them would make a pass of one rank wait for the others.
        # Not every weight of a backbone takes part in its last hidden states.
        self._module = DistributedDataParallel(Scorer(policy), broadcast_buffers=False, find_unused_parameters=True)

    def score(self, batch: TensorDict, sampler: Sampler) -> Scored:
        return cast(Scored, self._module(batch, sampler))

    def answers(self, conversations: Mapping[str, Tensor]) -> Float[Tensor, "N V"]:
        return cast(Tensor, self._module(conversations))


class Split(Whole):
    """FSDP2: every rank trains its part of each parameter and gathers a block's parameters when it runs."""

    def __init__(self, policy: ChunkPolicy, group: Group) -> None:
        super().__init__(policy)
        acting = cast(nn.Module, policy)
        self._acting = list(acting.parameters())
        twin = copy.deepcopy(acting)
        device = self._acting[0].device.type
        self._mesh = init_device_mesh(device, (group.size,))
        self._twin = cast(ChunkPolicy, twin)
        self._module = Scorer(self._twin)
        for unit in (*self._twin.sharding_units(), self._module):
            fully_shard(unit, mesh=self._mesh)
        for unit, following in neighbours(twin, self._twin.sharding_units()):
            # While one computes, the other's parameters are on their way; without being told, FSDP2 asks for them when
            # the host comes to that block, which is too late where a block's kernels are short.
            cast(FSDPModule, unit).set_modules_to_forward_prefetch([cast(FSDPModule, following)])
            cast(FSDPModule, following).set_modules_to_backward_prefetch([cast(FSDPModule, unit)])
        self._split = [cast(DTensor, parameter) for parameter in twin.parameters()]

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        return self._twin.parameter_groups()

    def score(self, batch: TensorDict, sampler: Sampler) -> Scored:
        return cast(Scored, self._module(batch, sampler))

    def answers(self, conversations: Mapping[str, Tensor]) -> Float[Tensor, "N V"]:
        return cast(Tensor, self._module(conversations))

    def lend(self) -> None:
        for parameter in self._acting:
            parameter.data = parameter.data.new_empty(0)

    @torch.no_grad()
    def give_back(self) -> None:
        for parameter, part in zip(self._acting, self._split, strict=True):
            parameter.data = part.full_tensor().detach()

    @torch.no_grad()
    def take(self) -> None:
        for parameter, part in zip(self._acting, self._split, strict=True):
            part.copy_(self._part(parameter.data, part))

    def optimizer_state(self, optimizer: torch.optim.Optimizer, *, keep: bool) -> dict[str, Any]:
        def whole(value: Any) -> Any:
            if not isinstance(value, DTensor):
                return value
            # One tensor at a time, and to the CPU: all of Adam's moments at once would not fit beside the policy.
            full = value.full_tensor()
            return full.cpu() if keep else None

        content = optimizer.state_dict()
        return content | {
            "state": {
                index: {name: whole(value) for name, value in moments.items()}
                for index, moments in content["state"].items()
            }
        }

    def load_optimizer_state(self, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]

        def part(index: int, value: Any) -> Any:
            parameter = parameters[index]
            # Adam's step count is no part of anything.
            return self._part(value, parameter) if value.shape == parameter.shape else value

        split = {
            index: {name: part(index, value) for name, value in moments.items()}
            for index, moments in state["state"].items()
        }
        optimizer.load_state_dict(dict(state) | {"state": split})

    def _part(self, whole: Tensor, like: Tensor) -> Tensor:
        """What this rank holds of a tensor that every rank has whole."""
        assert isinstance(like, DTensor)
        # Without a source rank nothing is sent.
        return distribute_tensor(
            whole.to(like.device, like.dtype), like.device_mesh, like.placements, src_data_rank=None
        )


def neighbours(model: nn.Module, units: Sequence[nn.Module]) -> list[tuple[nn.Module, nn.Module]]:
    """Which of ``units`` always runs right after which: the next one of the same list of blocks.

    Of two stacks the second may not run at all, as the expert does not where only contexts are wanted. What had been
    gathered for it would be kept, and be old after the next step.
    """
    stack = {module: name.rpartition(".")[0] for name, module in model.named_modules()}
    return [(one, following) for one, following in pairwise(units) if stack[one] == stack[following]]


def hold(policy: ChunkPolicy, group: Group, strategy: LearnerStrategy) -> Whole:
    """The policy as the ranks of a group train it; which parameters need gradients is decided before."""
    if group.size == 1:
        return Whole(policy)
    # Every rank has read the same file; this guards against one that has not.
    group.equalize(cast(nn.Module, policy).parameters())
    return Averaged(policy) if strategy is LearnerStrategy.ddp else Split(policy, group)
