"""From observations to chunks: the one place where a flow policy is sampled."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from tensordict import TensorDict

from rlvla.policies.base import Context, Decision, FlowPolicy, pad_tokens
from rlvla.seeding import normal
from rlvla_algos.flow import Schedule, denoise, ode_schedule
from rlvla_envs.base import Observation


@dataclass(frozen=True)
class Thought:
    """A decision together with what it was made from."""

    decision: Decision
    batch: TensorDict
    context: Context


class Actor:
    """Samples a policy in blocks of fixed size.

    The rows of a batched matrix product depend, in their last bit, on how many rows there are, and not on
    what the others hold, unless those are longer. So every call runs on exactly ``block`` rows of one context
    length, padded by repetition: a result then does not depend on which environments happened to ask (tests hold this
    to the bit).
    """

    def __init__(self, policy: FlowPolicy, *, block: int, device: str) -> None:
        self.policy, self.block, self.device = policy, block, device

    @torch.no_grad()
    def decide(
        self,
        observation: Observation,
        rngs: Sequence[np.random.Generator],
        *,
        temperature: float,
        schedule: Schedule | None = None,
    ) -> Thought:
        """One chunk per row.

        Args:
            observation: [B] rows.
            rngs: the keyed generator of each row's decision.
            temperature: factor on every Gaussian draw.
            schedule: of the stochastic step; the plain ODE when absent.
        """
        blocks = self._blocks(observation)
        with _one_thread():
            thoughts = [
                self._decide_block(observation.take(block), [rngs[i] for i in block[:n]], temperature, schedule)
                for block, n in blocks
            ]
        return _concatenate(thoughts, _places(blocks))

    @torch.no_grad()
    def encode(self, observation: Observation) -> Context:
        """Contexts of any number of rows, for values of final observations."""
        blocks = self._blocks(observation)
        with _one_thread():
            contexts = [
                self.policy.encode(self.policy.collate(observation.take(block)).to(self.device)).to_tensordict()[:n]
                for block, n in blocks
            ]
        return Context.from_tensordict(torch.cat(pad_tokens(contexts))[_places(blocks)])

    def _blocks(self, observation: Observation) -> list[tuple[list[int], int]]:
        """(rows, how many of them are real): rows of one context length, the last one repeated to fill."""
        by_length: dict[int, list[int]] = {}
        for row, instruction in enumerate(observation.instruction):
            by_length.setdefault(self.policy.context_length(instruction), []).append(row)
        blocks = []
        for rows in by_length.values():
            for start in range(0, len(rows), self.block):
                part = rows[start : start + self.block]
                blocks.append((part + [part[-1]] * (self.block - len(part)), len(part)))
        return blocks

    def _decide_block(
        self,
        observation: Observation,
        rngs: list[np.random.Generator],
        temperature: float,
        schedule: Schedule | None,
    ) -> Thought:
        policy, num_rows = self.policy, len(rngs)
        batch = policy.collate(observation).to(self.device)
        context = policy.encode(batch)
        num_steps = policy.num_denoising_steps
        shape = (policy.horizon, policy.channels)
        # Rows without a generator are padding: they repeat the last row, and must not advance its generator.
        draws = [(normal(rng, *shape), int(rng.integers(num_steps)), normal(rng, *shape)) for rng in rngs]
        draws += [draws[-1]] * (self.block - num_rows)
        mask = policy.action_mask()
        noise = torch.from_numpy(np.stack([d[0] for d in draws])).to(self.device) * temperature * mask
        step = torch.tensor([d[1] for d in draws], device=self.device)
        step_noise = torch.from_numpy(np.stack([d[2] for d in draws])).to(self.device) * temperature * mask

        velocity = bind(policy, context)
        if schedule is None:
            sampled = denoise(velocity, noise, schedule=ode_schedule(num_steps).to(self.device))
        else:
            sampled = denoise(
                velocity,
                noise,
                schedule=schedule.to(self.device),
                stochastic_step=step,
                step_noise=step_noise,
            )
        keep = slice(num_rows)
        decision = Decision(
            action=policy.actions_to_env(sampled.action)[keep],
            before=sampled.before[keep],
            after=sampled.after[keep],
            mean=sampled.mean[keep],
            log_prob=sampled.log_prob[keep],
            step=step[keep],
        )
        return Thought(decision, batch[keep], Context.from_tensordict(context.to_tensordict()[keep]))


def bind(policy: FlowPolicy, context: Context) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
    """The velocity with its context bound, as `rlvla_algos.flow` wants it."""
    return lambda sample, tau, step: policy.velocity(context, sample, tau, step)


@contextmanager
def _one_thread() -> Iterator[None]:
    """A block of a small policy gains nothing from a second thread, and beside busy simulators it loses
    sevenfold: the threads wait for each other at every layer. It also fixes the bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _places(blocks: list[tuple[list[int], int]]) -> torch.Tensor:
    """Where each row of the observation is among the rows of the blocks."""
    return torch.tensor([row for block, n in blocks for row in block[:n]]).argsort()


def _concatenate(thoughts: list[Thought], places: torch.Tensor) -> Thought:
    if len(thoughts) == 1:
        return thoughts[0]
    decisions = [t.decision for t in thoughts]
    tensors = {
        name: torch.cat([getattr(d, name) for d in decisions])[places]
        for name in ("before", "after", "mean", "log_prob", "step")
    }
    return Thought(
        Decision(action=np.concatenate([d.action for d in decisions])[places.numpy()], **tensors),
        torch.cat(pad_tokens([t.batch for t in thoughts]))[places],
        Context.from_tensordict(torch.cat(pad_tokens([t.context.to_tensordict() for t in thoughts]))[places]),
    )
