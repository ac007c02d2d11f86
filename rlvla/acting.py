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
from rlvla_envs.base import Observation, Scattered


@dataclass(frozen=True)
class Block:
    """What decisions that were taken at once were made from."""

    seen: Observation
    batch: TensorDict
    context: Context

    def __len__(self) -> int:
        return len(self.batch)


@dataclass(frozen=True)
class Thought:
    """Decisions together with what they were made from."""

    decision: Decision
    blocks: list[Block]
    places: torch.Tensor
    """Where each row is among the rows of the blocks."""

    @property
    def batch(self) -> TensorDict:
        """Of all rows: a copy where there are several blocks."""
        return self._together([block.batch for block in self.blocks])

    @property
    def context(self) -> Context:
        """As `batch`."""
        return Context.from_tensordict(self._together([block.context.to_tensordict() for block in self.blocks]))

    def _together(self, parts: list[TensorDict]) -> TensorDict:
        return parts[0] if len(parts) == 1 else torch.cat(pad_tokens(parts))[self.places]


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
            made = [
                self._decide_block(_taken(observation, block), [rngs[i] for i in block], temperature, sampler)
                for block in blocks
            ]
        places = _places(blocks)
        decisions = [decision for decision, _ in made]
        actions = np.concatenate([decision.action for decision in decisions])[places.numpy()]
        stored = torch.cat([decision.stored for decision in decisions])[places]
        return Thought(Decision(actions, stored), [block for _, block in made], places)

    @torch.no_grad()
    def encode(self, observation: Observation) -> Context:
        """Contexts of any number of rows, for values of final observations."""
        blocks = self._blocks(observation)
        with one_thread():
            batches = [to_device(self.policy.collate(_taken(observation, block)), self.device) for block in blocks]
            contexts = [self.policy.encode(self._filled(batch)).to_tensordict()[: len(batch)] for batch in batches]
        return Context.from_tensordict(torch.cat(pad_tokens(contexts))[_places(blocks)])

    def _blocks(self, observation: Observation) -> list[list[int]]:
        """Rows of one context length, at most `block` at once."""
        by_length: dict[int, list[int]] = {}
        for row, instruction in enumerate(observation.instruction):
            by_length.setdefault(self.policy.context_length(instruction), []).append(row)
        return [rows[i : i + self.block] for rows in by_length.values() for i in range(0, len(rows), self.block)]

    def _filled(self, batch: TensorDict) -> TensorDict:
        """A block of it, by repeating the last row."""
        if len(batch) == self.block:
            return batch
        return batch[torch.arange(self.block, device=self.device).clamp(max=len(batch) - 1)]

    def _decide_block(
        self,
        observation: Observation,
        rngs: list[np.random.Generator],
        temperature: float,
        sampler: Sampler,
    ) -> tuple[Decision, Block]:
        policy, num_rows = self.policy, len(rngs)
        batch = to_device(policy.collate(observation), self.device)
        # What fills the block has no generator: it repeats the last row, and must not advance that one's.
        draws = [sampler.draw(policy, rng) for rng in rngs]
        draws += [draws[-1]] * (self.block - num_rows)
        # After the sampler's, so that a policy that asks for none has the bits it always had.
        noise = {name: np.stack([normal(rng, *size) for rng in rngs]) for name, size in policy.context_noise().items()}
        if noise:
            batch["noise"] = context_noise(noise, num_rows).to(self.device) * temperature
        with running(policy):
            context = policy.encode(self._filled(batch))
            made = sampler.sample(policy, context, draws, temperature)
        keep = slice(num_rows)
        decision = Decision(policy.actions_to_env(made.action)[keep], made.stored[keep])
        return decision, Block(observation, batch, Context.from_tensordict(context.to_tensordict()[keep]))


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
    return observation if len(rows) == len(observation) else Scattered([(observation, row) for row in rows])


def _places(blocks: list[list[int]]) -> torch.Tensor:
    """Where each row of the observation is among the rows of the blocks."""
    return torch.tensor([row for block in blocks for row in block]).argsort()
