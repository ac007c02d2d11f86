"""From observations to chunks: the one place where a policy is run to act."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from tensordict import TensorDict

from rlvla.policies.base import ChunkPolicy, Context, Decision, pad_tokens
from rlvla.policies.numerics import running, to_device
from rlvla.samplers import Sampler, evaluation_sampler
from rlvla.seeding import normal
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

    def __init__(self, policy: ChunkPolicy, *, block: int, device: str) -> None:
        self.policy, self.block, self.device = policy, block, device

    @torch.no_grad()
    def decide(
        self,
        observation: Observation,
        rngs: Sequence[np.random.Generator],
        *,
        temperature: float,
        sampler: Sampler | None = None,
    ) -> Thought:
        """One chunk per row.

        Args:
            observation: [B] rows.
            rngs: the keyed generator of each row's decision.
            temperature: factor on all noise.
            sampler: of rollouts, whose decisions can be scored; that of evaluations when absent.
        """
        sampler = sampler or evaluation_sampler(self.policy)
        blocks = self._blocks(observation)
        with one_thread():
            thoughts = [
                self._decide_block(_taken(observation, block), [rngs[i] for i in block[:n]], temperature, sampler)
                for block, n in blocks
            ]
        return _concatenate(thoughts, _places(blocks))

    @torch.no_grad()
    def encode(self, observation: Observation) -> Context:
        """Contexts of any number of rows, for values of final observations."""
        blocks = self._blocks(observation)
        with one_thread():
            batches = [to_device(self.policy.collate(_taken(observation, block)), self.device) for block, _ in blocks]
            contexts = [
                self.policy.encode(batch).to_tensordict()[:n] for batch, (_, n) in zip(batches, blocks, strict=True)
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
        sampler: Sampler,
    ) -> Thought:
        policy, num_rows = self.policy, len(rngs)
        batch = to_device(policy.collate(observation), self.device)
        # Rows without a generator are padding: they repeat the last row, and must not advance its generator.
        draws = [sampler.draw(policy, rng) for rng in rngs]
        draws += [draws[-1]] * (self.block - num_rows)
        # After the sampler's, so that a policy that asks for none has the bits it always had.
        noise = {name: np.stack([normal(rng, *size) for rng in rngs]) for name, size in policy.context_noise().items()}
        if noise:
            batch["noise"] = context_noise(noise, self.block).to(self.device) * temperature
        with running(policy):
            context = policy.encode(batch)
            made = sampler.sample(policy, context, draws, temperature)
        keep = slice(num_rows)
        decision = Decision(policy.actions_to_env(made.action)[keep], made.stored[keep])
        return Thought(decision, batch[keep], Context.from_tensordict(context.to_tensordict()[keep]))


def context_noise(draws: Mapping[str, np.ndarray], num_rows: int) -> TensorDict:
    """What `ChunkPolicy.context_noise` asks for, as a batch holds it; the last draw repeated to ``num_rows``."""
    rows = np.minimum(np.arange(num_rows), len(next(iter(draws.values()))) - 1)
    return TensorDict({name: torch.from_numpy(drawn[rows]) for name, drawn in draws.items()}, batch_size=[num_rows])


@contextmanager
def one_thread() -> Iterator[None]:
    """A block of a small policy gains nothing from a second thread, and beside busy simulators it loses
    sevenfold: the threads wait for each other at every layer. It also fixes the bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _taken(observation: Observation, rows: list[int]) -> Observation:
    """Copied only where it is not the observation itself."""
    return observation if rows == list(range(len(observation))) else observation.take(rows)


def _places(blocks: list[tuple[list[int], int]]) -> torch.Tensor:
    """Where each row of the observation is among the rows of the blocks."""
    return torch.tensor([row for block, n in blocks for row in block[:n]]).argsort()


def _concatenate(thoughts: list[Thought], places: torch.Tensor) -> Thought:
    if len(thoughts) == 1:
        return thoughts[0]
    actions = np.concatenate([t.decision.action for t in thoughts])
    return Thought(
        Decision(actions[places.numpy()], torch.cat([t.decision.stored for t in thoughts])[places]),
        torch.cat(pad_tokens([t.batch for t in thoughts]))[places],
        Context.from_tensordict(torch.cat(pad_tokens([t.context.to_tensordict() for t in thoughts]))[places]),
    )
