"""Whole episodes, one chunk at a time, and the TensorDict the learner gets.

Episodes are numbered; slots take the next one as they come free. Noise is keyed by episode and decision, so
which slot plays an episode, and beside which others, changes nothing.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from tensordict import TensorDict

from rlvla.acting import Actor
from rlvla.policies.base import Context, ValueHead, pad_tokens
from rlvla.seeding import Stream, keyed_rng
from rlvla.workers import Envs, Round
from rlvla_algos.flow import Schedule
from rlvla_envs.base import ChunkResult, EnvSpec, Observation

Decide = Callable[[Observation, np.ndarray, np.ndarray], np.ndarray]
"""(observation of B rows, episode [B], decision index [B]) -> actions [B, H, C] in env units."""


@dataclass(frozen=True)
class Turn:
    """One round: which decisions were taken and what came of them."""

    episode: np.ndarray
    decision: np.ndarray
    result: ChunkResult


def play(envs: Envs, initial_states: Sequence[int], decide: Decide) -> Iterator[Turn]:
    """Play one episode from every initial state and yield each round of decisions.

    A slot whose episode ended restarts while the others run their next chunk: a render each, so nobody waits. Where
    slots restart in groups, a group waits for its last episode and then takes the next ones of one task.
    """
    queue = deque(enumerate(initial_states))
    size = envs.group_size
    waiting: dict[int, Observation] = {}
    playing: dict[int, tuple[int, int]] = {}
    while queue or playing:
        restarts: list[tuple[int, int, int]] = []
        for first_slot in range(0, envs.num_slots, size):
            group = range(first_slot, first_slot + size)
            if queue and not any(slot in playing for slot in group):
                taken = _take_of_one_task(queue, envs.spec, size)
                restarts += [(slot, *episode) for slot, episode in zip(group, taken, strict=False)]
        slots = sorted(waiting)
        episodes = np.array([playing[s][0] for s in slots], dtype=np.int64)
        decisions = np.array([playing[s][1] for s in slots], dtype=np.int64)
        actions = np.zeros((0, 1, 1), dtype=np.float32)
        if slots:
            actions = decide(Observation.concatenate([waiting[s] for s in slots]), episodes, decisions)
        first, result = envs.advance(
            Round(
                restart_slots=np.array([s for s, _, _ in restarts], dtype=np.int64),
                restart_states=np.array([state for _, _, state in restarts], dtype=np.int64),
                chunk_slots=np.array(slots, dtype=np.int64),
                chunk_actions=actions,
            )
        )
        waiting = {}
        if result is not None:
            for row, slot in enumerate(slots):
                if result.done[row]:
                    del playing[slot]
                else:
                    playing[slot] = (playing[slot][0], playing[slot][1] + 1)
                    waiting[slot] = result.observation.row(row)
            yield Turn(episodes, decisions, result)
        for row, (slot, episode, _) in enumerate(restarts):
            assert first is not None
            playing[slot] = (episode, 0)
            waiting[slot] = first.row(row)


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
    schedule: Schedule,
    key: tuple[int, int],
    store_context: bool,
    value_final: bool = True,
    first_episode: int = 0,
    on_episodes: Callable[[int], None] = lambda _: None,
) -> TensorDict:
    """Play training episodes with the stochastic sampler and record what the update needs.

    Args:
        key: (run seed, iteration): the first part of every noise key.
        store_context: keep each decision's context, for a frozen backbone whose contexts stay true; else its
            inputs, to be encoded again.
        value_final: value the final observation of truncated episodes. Without a bootstrap at the time limit nobody
            reads it, and it costs a pass of the VLM.
        first_episode: number of the first episode in the noise keys, where other learners play those before it.
        on_episodes: told how many episodes have ended.

    Returns:
        A TensorDict [E, T] over episodes and decisions, zero where ``valid`` is False:

        * ``context`` or ``batch``; ``before``, ``after``, ``mean``, ``log_prob`` [H, K]; ``step``
        * ``mask`` [H, K]: action entries that are not padding and were executed
        * ``state_value``; (``next``, ``state_value``, ``reward``, ``terminated``, ``truncated``, ``done``, ``success``,
          ``executed_steps``)
    """
    seed, iteration = key
    policy = actor.policy
    device = actor.device
    pieces: list[TensorDict] = []
    rows: list[np.ndarray] = []
    finals: list[tuple[int, int, Observation]] = []
    ended = 0

    def decide(observation: Observation, episode: np.ndarray, decision: np.ndarray) -> np.ndarray:
        rngs = [
            keyed_rng(seed, Stream.ROLLOUT, iteration, first_episode + int(e), int(t))
            for e, t in zip(episode, decision, strict=True)
        ]
        thought = actor.decide(observation, rngs, temperature=1.0, schedule=schedule)
        made = thought.decision
        source = {"context": thought.context.to_tensordict()} if store_context else {"batch": thought.batch}
        pieces.append(
            TensorDict(
                {
                    **source,
                    "before": made.before,
                    "after": made.after,
                    "mean": made.mean,
                    "log_prob": made.log_prob,
                    "step": made.step,
                    "value_features": policy.value_features(thought.context),
                },
                batch_size=[len(made.step)],
                device=device,
            )
        )
        return made.action

    for turn in play(envs, initial_states, decide):
        result = turn.result
        rows.append(np.stack([turn.episode, turn.decision], axis=1))
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
            (int(turn.episode[i]), int(turn.decision[i]), result.observation.row(int(i)))
            for i in np.flatnonzero(result.truncated & ~result.terminated & value_final)
        ]
        ended += int(result.done.sum())
        on_episodes(ended)

    rollout = _arrange(pieces, np.concatenate(rows), len(initial_states), envs.spec.max_decisions)
    # Values of all decisions at once: a value's last bit depends on how many rows the critic is run on, and how many
    # act at a time depends on how many simulators there are.
    with torch.no_grad():
        rollout["state_value"] = value_head(rollout.pop("value_features")) * rollout["valid"]
    _add_next_values(rollout, actor, value_head, finals)
    executed = torch.arange(policy.horizon, device=device) < rollout["next", "executed_steps"][..., None]
    rollout["mask"] = executed[..., None] & policy.action_mask()
    return rollout


def _arrange(pieces: list[TensorDict], rows: np.ndarray, num_episodes: int, max_decisions: int) -> TensorDict:
    """Rounds of decisions, put where their episode and decision index say."""
    flat = cast(TensorDict, torch.cat(_one_length(pieces)))
    episode, decision = torch.from_numpy(rows).to(flat.device).T
    # The longest episode played, not the longest possible: less to store.
    length = min(max_decisions, int(decision.max()) + 1)
    rollout = TensorDict({}, batch_size=[num_episodes, length], device=flat.device)
    flat["valid"] = torch.ones(len(flat), dtype=torch.bool, device=flat.device)
    for name, tensor in flat.items(include_nested=True, leaves_only=True):
        full = tensor.new_zeros((num_episodes, length, *tensor.shape[1:]))
        full[episode, decision] = tensor
        rollout[name] = full
    return rollout


def _one_length(pieces: list[TensorDict]) -> list[TensorDict]:
    key = "context" if "context" in pieces[0] else "batch"
    for piece, padded in zip(pieces, pad_tokens([piece[key] for piece in pieces]), strict=True):
        piece[key] = padded
    return pieces


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
            final_value = value_head(actor.policy.value_features(context))
        episode = torch.tensor([e for e, _, _ in finals], device=value.device)
        decision = torch.tensor([t for _, t, _ in finals], device=value.device)
        following[episode, decision] = final_value
    rollout["next", "state_value"] = following
