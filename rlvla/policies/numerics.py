"""How a policy's networks are run: in which precision, with what kept in memory, compiled or not (docs/adr/0036).

A policy carries its precision with it, and every method that runs a network enters it. So whoever acts, learns, scores,
evaluates or teaches computes the same numbers, and none of them can forget to.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, wraps
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torch.backends import cuda as kernels
from torch.utils.checkpoint import checkpoint

from rlvla.config import Attention, ComputeConfig, Precision
from rlvla.policies.base import Context
from rlvla_algos.distribution import NormalBernoulli

NETWORKS = (
    "encode",
    "velocity",
    "sequence_velocity",
    "denoising",
    "distribution",
    "imitation_loss",
    "auxiliary_losses",
)
"""Methods of a policy that run its networks."""
MATRICES = (nn.Linear, nn.Conv2d, nn.Conv3d)
"""Layers whose weights autocast rounds before it uses them. A one-dimensional convolution is a few numbers beside
kernels that are particular about its precision."""


def in_own_precision(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of a policy, run in that policy's precision; what it returns is fp32, but for tokens."""

    @wraps(method)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.precision is Precision.fp32:
            return method(self, *args, **kwargs)
        with running(self):
            return _widen(method(self, *args, **kwargs))

    return run


@contextmanager
def running(policy: Any) -> Iterator[None]:
    """A block in which a policy's networks run. Around several passes it saves rounding the weights for each."""
    if getattr(policy, "precision", Precision.fp32) is Precision.fp32:
        yield
        return
    with torch.autocast(next(policy.parameters()).device.type, dtype=torch.bfloat16):
        yield


def _widen(found: Any) -> Any:
    """To fp32 whatever probabilities, values and losses are made of. Tokens are rounded to what the next matrix product
    would round them to: half the memory of a stored context, and the same numbers."""
    if isinstance(found, Tensor):
        return found.float() if found.is_floating_point() else found
    if isinstance(found, Context):
        return Context(
            _rounded(found.tokens),
            found.mask,
            found.position_ids,
            _widen(found.pooled),
            found.state,
            {name: _rounded(tensor) for name, tensor in found.per_token.items()},
            {name: _widen(tensor) for name, tensor in found.per_row.items()},
        )
    if isinstance(found, NormalBernoulli):
        return NormalBernoulli(*map(_widen, found))
    if isinstance(found, dict):
        return {name: _widen(value) for name, value in found.items()}
    return found


def _rounded(tensor: Tensor) -> Tensor:
    return tensor.bfloat16() if tensor.is_floating_point() else tensor


def set_up(policy: Any, config: ComputeConfig, *, narrow: bool = True) -> list[str]:
    """Run a policy as ``config`` says from now on. What is trained has been decided, and its adapters are on.

    Args:
        narrow: keep frozen matrices in bfloat16 where ``config.precision`` is; FSDP2 takes one dtype alone.

    Returns:
        What to tell the user.
    """
    notes = []
    policy.precision = config.precision
    choose_attention(config.attention)
    if config.precision is Precision.bf16 and narrow:
        kept, wide = narrow_frozen(policy)
        if wide:
            notes.append(
                f"{wide} of {kept + wide} frozen matrices stay in fp32: bfloat16 would round their weights. They take "
                "twice the memory; a checkpoint that was stored in bfloat16 has none of these."
            )
    units = blocks_to_run(policy)
    if config.recompute:
        for unit in units:
            kind: Any = type(unit)
            unit.__class__ = _recomputed(kind)
    if config.compile:
        for unit in decoder_blocks(policy):
            # In place: names, parameters and hooks stay. All blocks are one class, so one compilation serves them.
            unit.compile()
    return notes


def blocks_to_run(policy: Any) -> list[nn.Module]:
    """Transformer blocks, each once."""
    return list(dict.fromkeys(policy.sharding_units()))


def decoder_blocks(policy: Any) -> list[nn.Module]:
    """Those outside the vision-language model."""
    backbone = {id(p) for p in policy.parameter_groups()["vlm"]}
    return [unit for unit in blocks_to_run(policy) if not any(id(p) in backbone for p in unit.parameters())]


def narrow_frozen(policy: nn.Module) -> tuple[int, int]:
    """Keep what is not trained, and what autocast would round before each use, in bfloat16 where that loses nothing.
    A module names in ``fp32_layers`` what it runs outside autocast.

    Files do not change: `in_file_precision` undoes it before a policy is saved.

    Returns:
        How many tensors are bfloat16 now, and how many had to stay.
    """
    done, wide = 0, 0
    names: set[str] = set(getattr(policy, "narrowed", ()))
    exact = {
        id(layer)
        for module in policy.modules()
        for name in getattr(module, "fp32_layers", ())
        for layer in getattr(module, name).modules()
    }
    for prefix, layer in policy.named_modules():
        if not isinstance(layer, MATRICES) or id(layer) in exact:
            continue
        for name in ("weight", "bias"):
            tensor = getattr(layer, name)
            if tensor is None or tensor.requires_grad or tensor.dtype is not torch.float32:
                continue
            # Of shapes alone nobody can tell.
            if tensor.is_meta or bool((tensor.bfloat16().float() == tensor).all()):
                tensor.data = tensor.data.bfloat16()
                names.add(f"{prefix}.{name}")
                done += 1
            else:
                wide += 1
    policy.narrowed = frozenset(names)  # type: ignore[assignment]
    return done, wide


def in_file_precision(policy: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of the policy in the precision that its files have, to the bit."""
    names: frozenset[str] = getattr(policy, "narrowed", frozenset())
    return {name: tensor.float() if name in names else tensor for name, tensor in state.items()}


@cache
def _recomputed(kind: type) -> type:
    """A class of the same blocks, which keep nothing but their input for the way back.

    The forward is wrapped and not the call, so that hooks, FSDP2's among them, run once.
    """

    from transformers.cache_utils import Cache

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        # A block that writes its keys into a cache would write them again.
        caches = any(isinstance(value, Cache) for value in (*args, *kwargs.values()))
        if caches or not torch.is_grad_enabled():
            return kind.forward(self, *args, **kwargs)  # type: ignore[attr-defined]
        return checkpoint(
            lambda *inputs: kind.forward(self, *inputs, **kwargs),  # type: ignore[attr-defined]
            *args,
            use_reentrant=False,
            preserve_rng_state=False,  # nothing is drawn in a block
        )

    return type(f"Recomputed{kind.__name__}", (kind,), {"forward": forward})


def choose_attention(attention: Attention) -> None:
    """Let torch's attention use one kernel alone, or all; for the whole process, because a backward pass may run after
    any block that would say so."""
    every = attention is Attention.auto
    kernels.enable_flash_sdp(every or attention is Attention.flash)
    kernels.enable_mem_efficient_sdp(every or attention is Attention.efficient)
    kernels.enable_cudnn_sdp(every or attention is Attention.cudnn)
    kernels.enable_math_sdp(every or attention is Attention.math)


def to_device(batch: TensorDict, device: str) -> TensorDict:
    """A collated batch where the policy is. To a GPU through pinned memory, so that the CPU goes on meanwhile; work on
    the GPU that needs it is queued behind the copy."""
    if torch.device(device).type != "cuda":
        return batch.to(device)
    return batch.pin_memory().to(device, non_blocking=True)
