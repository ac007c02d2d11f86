"""Whole episodes, one chunk at a time, and the TensorDict the learner gets.

Episodes are numbered; slots take the next one as they come free. Noise is keyed by episode and decision, so
which slot plays an episode, and beside which others, changes nothing.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tensordict import TensorDict

from rlvla.acting import Actor
from rlvla.clock import INFER, PHYSICS, RENDER, SIMULATORS, Clock
from rlvla.critic import time_left
from rlvla.policies.base import ChunkPolicy, Context, ValueHead
from rlvla.rounds import Rounds, alone, refer
from rlvla.samplers import Sampler
from rlvla.seeding import Stream, keyed_rng
from rlvla.workers import Envs, Finish, Round
from rlvla_envs.base import ChunkResult, EnvSpec, Observation, Scattered

Decide = Callable[[Observation, np.ndarray, np.ndarray], np.ndarray]
"""(observation of B rows, episode [B], decision index [B]) -> actions [B, H, C] in env units."""


@dataclass(frozen=True)
class Turn:
    """One round of one group of slots: which decisions were taken and what came of them."""

    asked: tuple[int, int]
    """Episode and decision of the first row that was decided, for whoever kept something about the round."""
    rows: np.ndarray
    """Of those that were decided: the ones that have a result."""
    episode: np.ndarray
    decision: np.ndarray
    result: ChunkResult | None
    """[rows]; None where all were lost."""
    lost: Mapping[int, bool]
    """Episodes that ended with their simulator (`rlvla.workers.Reply.lost`)."""


class _Group:
    """Slots whose rounds go out together."""

    def __init__(self, slots: Sequence[int]) -> None:
        self.slots = slots
        self.waiting: dict[int, tuple[Observation, int]] = {}
        """slot: what it sees, as a row of an observation"""
        self.playing: dict[int, tuple[int, int]] = {}
        """slot: (episode, decision)"""
        self.round: tuple[Finish, list[tuple[int, int, int]], list[int]] | None = None
        """What is under way: its end, restarts (slot, episode, state), slots that run a chunk."""

    def begin(self, envs: Envs, queue: deque[tuple[int, int]], decide: Decide, clock: Clock) -> None:
        """Decide for the waiting slots, give the free ones their next episode, and send both off."""
        restarts: list[tuple[int, int, int]] = []
        size = envs.group_size
        for start in range(0, len(self.slots), size):
            together = self.slots[start : start + size]
            if queue and not any(slot in self.playing for slot in together):
                taken = _take_of_one_task(queue, envs.spec, size)
                restarts += [(slot, *episode) for slot, episode in zip(together, taken, strict=False)]
        slots = sorted(self.waiting)
        if not slots and not restarts:
            self.round = None
            return
        actions = np.zeros((0, 1, 1), dtype=np.float32)
        if slots:
            episodes, decisions = self._keys(slots)
            with clock.span(INFER):
                actions = decide(Scattered([self.waiting[s] for s in slots]), episodes, decisions)
        todo = Round(
            restart_slots=np.array([s for s, _, _ in restarts], dtype=np.int64),
            restart_states=np.array([state for _, _, state in restarts], dtype=np.int64),
            chunk_slots=np.array(slots, dtype=np.int64),
            chunk_actions=actions,
        )
        self.round = (envs.begin(todo), restarts, slots)

    def finish(self, clock: Clock) -> Turn | None:
        """Wait for what was begun; None where no chunk was in it and nothing was lost."""
        assert self.round is not None
        wait, restarts, slots = self.round
        with clock.span(SIMULATORS):
            reply = wait()
        clock.add(PHYSICS, reply.busy_s - reply.render_s)
        clock.add(RENDER, reply.render_s)
        lost = {slot: blamed for slot, blamed in reply.lost.items() if slot in self.playing}
        turn: Turn | None = None
        rows = [row for row, slot in enumerate(slots) if slot not in reply.lost]
        episodes, decisions = self._keys(slots)
        gone = {self.playing[slot][0]: blamed for slot, blamed in lost.items()}
        gone |= {episode: reply.lost[slot] for slot, episode, _ in restarts if slot in reply.lost}
        if slots or gone:
            asked = (int(episodes[0]), int(decisions[0])) if slots else (-1, -1)
            turn = Turn(asked, np.array(rows, dtype=np.int64), episodes[rows], decisions[rows], reply.result, gone)
        self.waiting = {}
        for slot in lost:
            del self.playing[slot]
        for place, row in enumerate(rows):
            slot = slots[row]
            assert reply.result is not None
            if reply.result.done[place]:
                del self.playing[slot]
            else:
                self.playing[slot] = (self.playing[slot][0], self.playing[slot][1] + 1)
                self.waiting[slot] = (reply.result.observation, place)
        for place, (slot, episode, _) in enumerate([one for one in restarts if one[0] not in reply.lost]):
            assert reply.first is not None
            self.playing[slot] = (episode, 0)
            self.waiting[slot] = (reply.first, place)
        return turn

    def _keys(self, slots: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        keys = np.array([self.playing[slot] for slot in slots], dtype=np.int64).reshape(-1, 2)
        return keys[:, 0], keys[:, 1]


def play(
    envs: Envs, initial_states: Sequence[int], decide: Decide, *, num_groups: int = 1, clock: Clock | None = None
) -> Iterator[Turn]:
    """Play one episode from every initial state and yield each round of decisions.

    A slot whose episode ended restarts while the others run their next chunk: a render each, so nobody waits. Where
    slots restart in groups, a group waits for its last episode and then takes the next ones of one task.

    Args:
        num_groups: the workers are dealt to so many groups, which take turns: while the chunks of one run, ``decide``
            works for another. Episodes are the same for any number.
        clock: is told what deciding and simulating take.
    """
    clock = clock or Clock()
    queue = deque(enumerate(initial_states))
    workers = envs.num_slots // envs.slots_per_worker
    if num_groups > workers:
        raise ValueError(
            f"{num_groups} groups of simulators cannot take turns where there are {workers} workers. Set "
            f"workers.num_actors to at least {num_groups}, or schedule=sync."
        )
    slots = np.arange(envs.num_slots).reshape(workers, -1)
    groups = [_Group(slots[first::num_groups].flatten().tolist()) for first in range(num_groups)]
    for group in groups:
        group.begin(envs, queue, decide, clock)
    while any(group.round for group in groups):
        for group in groups:
            if group.round:
                turn = group.finish(clock)
                if turn is not None:
                    yield turn
                group.begin(envs, queue, decide, clock)


def _take_of_one_task(queue: deque[tuple[int, int]], spec: EnvSpec, number: int) -> list[tuple[int, int]]:
    """Remove up to ``number`` (episode, state) pairs of the first one's task, in their order."""
    taken = [queue.popleft()]
    passed: list[tuple[int, int]] = []
    while queue and len(taken) < number:
        pair = queue.popleft()
        (taken if spec.task_of(pair[1]) == spec.task_of(taken[0][1]) else passed).append(pair)
    queue.extendleft(reversed(passed))
    return taken


def collect(
    actor: Actor,
    value_head: ValueHead,
    envs: Envs,
    initial_states: Sequence[int],
    *,
    sampler: Sampler,
    key: tuple[int, int],
    store_context: bool,
    store_inputs: bool = False,
    value_final: bool = True,
    num_groups: int = 1,
    first_episode: int = 0,
    on_episodes: Callable[[int], None] = lambda _: None,
    clock: Clock | None = None,
) -> TensorDict:
    """Play training episodes with a sampler that explores and record what the update needs.

    Args:
        key: (run seed, iteration): the first part of every noise key.
        store_context: keep each decision's context, for a frozen backbone whose contexts stay true; else its
            inputs, to be encoded again.
        store_inputs: keep the inputs in any case, for a teacher that reads them itself.
        value_final: value the final observation of truncated episodes. Without a bootstrap at the time limit nobody
            reads it, and it costs a pass of the VLM.
        num_groups: see `play`.
        first_episode: number of the first episode in the noise keys, where other learners play those before it.
        on_episodes: told how many episodes have ended.
        clock: see `play`.

    Returns:
        A TensorDict [E, T] over episodes and decisions, zero where ``valid`` is False. Episodes that were lost with
        their simulator are not in it:

        * ``row`` of ``rounds``, which have ``context`` or ``batch`` (`rlvla.rounds`)
        * ``log_prob`` [H, K] and what else the sampler stores (`rlvla.samplers`)
        * ``mask`` [H, K]: action entries that are not padding and were executed
        * ``initial_state``, ``state_value``
        * (``next``, ``state_value``, ``reward``, ``terminated``, ``truncated``, ``done``, ``success``,
          ``executed_steps``)
    """
    seed, iteration = key
    policy = actor.policy
    device = actor.device
    sources: list[TensorDict] = []
    pictures: list[Observation] = []
    # A simulator's arrays are kept as they are; a GPU reads its copies of them again.
    in_place = torch.device(device).type == "cpu"
    seen = 0
    pieces: list[TensorDict] = []
    decided: dict[tuple[int, int], TensorDict] = {}
    lost: set[int] = set()
    rows: list[np.ndarray] = []
    finals: list[tuple[int, int, Observation]] = []
    ended = 0

    def decide(observation: Observation, episode: np.ndarray, decision: np.ndarray) -> np.ndarray:
        nonlocal seen
        rngs = [
            keyed_rng(seed, Stream.ROLLOUT, iteration, first_episode + int(e), int(t))
            for e, t in zip(episode, decision, strict=True)
        ]
        thought = actor.decide(observation, rngs, temperature=1.0, sampler=sampler)
        made = thought.decision
        for block in thought.blocks:
            source = {"context": block.context.to_tensordict()} if store_context else {}
            if store_inputs or not store_context:
                source["batch"] = block.batch.exclude("images") if in_place else block.batch
                if in_place:
                    pictures.append(block.seen)
            sources.append(alone(TensorDict(source, batch_size=[len(block)], device=device)))
        features = torch.cat([_read(policy, value_head, block.context) for block in thought.blocks])
        decided[int(episode[0]), int(decision[0])] = TensorDict(
            {**made.stored, "value_features": features[thought.places], "row": seen + thought.places},
            batch_size=[len(made.stored)],
            device=device,
        )
        seen += len(made.stored)
        return made.action

    for turn in play(envs, initial_states, decide, num_groups=num_groups, clock=clock):
        lost |= turn.lost.keys()
        ended += len(turn.lost)
        result = turn.result
        if result is None:
            on_episodes(ended)
            continue
        rows.append(np.stack([turn.episode, turn.decision], axis=1))
        piece = decided.pop(turn.asked)
        # Indexing copies, and nothing is lost on most days.
        pieces.append(piece if len(turn.rows) == len(piece) else piece[torch.from_numpy(turn.rows).to(device)])
        pieces[-1]["next"] = TensorDict(
            {
                "reward": torch.from_numpy(result.reward.copy()),
                "terminated": torch.from_numpy(result.terminated.copy()),
                "truncated": torch.from_numpy(result.truncated.copy()),
                "done": torch.from_numpy(result.done),
                "success": torch.from_numpy(result.success.copy()),
                "executed_steps": torch.from_numpy(result.executed_steps.copy()),
            },
            batch_size=[len(result.reward)],
            device=device,
        )
        # Only what was cut off needs a value of its own; any other next value is the next decision's.
        finals += [
            # A copy: a row alone would keep the images of its whole round.
            (int(turn.episode[i]), int(turn.decision[i]), result.observation.take([int(i)]))
            for i in np.flatnonzero(result.truncated & ~result.terminated & value_final)
        ]
        ended += int(result.done.sum())
        on_episodes(ended)

    if len(lost) == len(initial_states):
        raise RuntimeError(
            f"every one of {len(lost)} episodes was lost with its simulator. Look at the warnings above, and run rlvla "
            "eval on this suite with workers.kind=local to see what the simulator says."
        )
    rollout = _arrange(pieces, np.concatenate(rows), len(initial_states), envs.spec.max_decisions)
    states = torch.tensor(initial_states, device=device)[:, None]
    rollout["initial_state"] = states.expand(rollout.batch_size).clone()
    refer(rollout, Rounds(sources, pictures, policy.camera_order()), rollout["row"])
    if lost:
        kept = [episode for episode in range(len(initial_states)) if episode not in lost]
        rollout = rollout[torch.tensor(kept, device=device)]
        new_place = {episode: place for place, episode in enumerate(kept)}
        finals = [(new_place[e], t, o) for e, t, o in finals if e in new_place]
    # Values of all decisions at once: a value's last bit depends on how many rows the critic is run on, and how many
    # act at a time depends on how many simulators there are.
    with torch.no_grad():
        if value_head.timed:
            rollout["time_left"] = time_left(rollout["next", "executed_steps"], envs.spec.max_episode_steps)
        value = value_head.value(rollout.pop("value_features"), rollout.get("time_left"))
        rollout["state_value"] = value * rollout["valid"]
    _add_next_values(rollout, actor, value_head, finals)
    executed = torch.arange(policy.horizon, device=device) < rollout["next", "executed_steps"][..., None]
    rollout["mask"] = executed[..., None] & policy.action_mask()
    return rollout


@torch.no_grad()
def _read(policy: ChunkPolicy, value_head: ValueHead, context: Context) -> torch.Tensor:
    return value_head.read_rows(policy.value_features(context), context.tokens, context.mask)


def _arrange(pieces: list[TensorDict], rows: np.ndarray, num_episodes: int, max_decisions: int) -> TensorDict:
    """Rounds of decisions, put where their episode and decision index say."""
    first = pieces[0]
    episode, decision = torch.from_numpy(rows).to(first.device).T
    # The longest episode played, not the longest possible: less to store.
    length = min(max_decisions, int(decision.max()) + 1)
    rollout = TensorDict({}, batch_size=[num_episodes, length], device=first.device)
    for name, tensor in first.items(include_nested=True, leaves_only=True):
        rollout[name] = tensor.new_zeros((num_episodes, length, *tensor.shape[1:]))
    rollout["valid"] = torch.zeros((num_episodes, length), dtype=torch.bool, device=first.device)
    rollout["valid"][episode, decision] = True
    starts = np.cumsum([0, *(len(piece) for piece in pieces)])
    for start, piece in zip(starts, pieces, strict=False):
        where = slice(int(start), int(start) + len(piece))
        for name, tensor in piece.items(include_nested=True, leaves_only=True):
            rollout[name][episode[where], decision[where]] = tensor
    return rollout


def _add_next_values(
    rollout: TensorDict, actor: Actor, value_head: ValueHead, finals: list[tuple[int, int, Observation]]
) -> None:
    value = rollout["state_value"]
    following = torch.zeros_like(value)
    following[:, :-1] = value[:, 1:]
    following[rollout["next", "done"]] = 0
    if finals:
        # In the order of episodes, not of arrival, for the same reason as above.
        finals = sorted(finals, key=lambda final: final[:2])
        context: Context = actor.encode(Observation.concatenate([o for _, _, o in finals]))
        with torch.no_grad():
            # Episodes end so at the time limit.
            final_value = value_head.value(
                _read(actor.policy, value_head, context), torch.zeros(len(finals), device=value.device)
            )
        episode = torch.tensor([e for e, _, _ in finals], device=value.device)
        decision = torch.tensor([t for _, t, _ in finals], device=value.device)
        following[episode, decision] = final_value
    rollout["next", "state_value"] = following
