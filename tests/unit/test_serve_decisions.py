"""Clients that ask at the same moment share a pass; nobody's answer depends on who else asked."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import numpy as np
import pytest

from rlvla.acting import Actor
from rlvla.rollout import Observation
from rlvla.seeding import Stream, keyed_rng
from rlvla.serve_decisions import Decided, Decider, Key

SEED = 5
TEMPERATURE = 0.6


@pytest.fixture(scope="module")
def policy(make_policy: Callable[..., Any]) -> Any:
    from rlvla_envs.base import SuiteConfig
    from rlvla_envs.suites import make_env

    return make_policy("qwen_vla_toy", make_env(SuiteConfig(name="toy", image_size=32), 1).spec)


@pytest.fixture
def seen(make_toy: Callable[..., Any]) -> Observation:
    """Five rows that differ."""
    first: Observation = make_toy(5).reset(range(5), range(5))
    return first


class Counting(Actor):
    """Notes the rows of each pass."""

    def decide(self, observation: Observation, *arguments: Any, **named: Any) -> Any:
        self.__dict__.setdefault("passes", []).append(len(observation))
        if "boom" in observation.instruction:
            raise ValueError("cannot read boom")
        if "bug" in observation.instruction:
            raise TypeError("a secret of the house")
        return super().decide(observation, *arguments, **named)


def answered(actor: Actor, ask: Callable[[Decider], Coroutine[Any, Any, Any]]) -> Any:
    async def main() -> Any:
        decider = Decider(actor, seed=SEED, temperature=TEMPERATURE)
        asked = asyncio.create_task(ask(decider))
        # Everybody has asked before the first pass begins.
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        work = asyncio.create_task(decider.run())
        try:
            return await asyncio.wait_for(asked, 120)
        finally:
            work.cancel()
            decider.close()

    return asyncio.run(main())


def worded(observation: Observation, instruction: str) -> Observation:
    return Observation(observation.images, [instruction] * len(observation), observation.state)


def test_those_who_wait_share_a_pass_and_have_the_bits_of_an_actor_of_this_block(
    policy: Any, seen: Observation
) -> None:
    actor = Counting(policy, block=4, device="cpu")

    async def ask(decider: Decider) -> list[list[Decided]]:
        rows = [(seen.row(i), Key(Stream.EVALUATION, i, 2)) for i in range(5)]
        return await asyncio.gather(*(decider.decide([row]) for row in rows))

    found = answered(actor, ask)
    assert actor.__dict__["passes"] == [4, 1]
    for i, (decided,) in enumerate(found):
        alone = Actor(policy, block=4, device="cpu").decide(
            seen.row(i), [keyed_rng(SEED, Stream.EVALUATION, i, 2)], temperature=TEMPERATURE
        )
        assert np.array_equal(decided.actions, np.clip(alone.decision.action[0], -1, 1))


def test_the_noise_is_that_of_the_key(policy: Any, seen: Observation) -> None:
    keys = [Key(Stream.SERVED, 0, 0), Key(Stream.SERVED, 0, 1), Key(Stream.SERVED, 1, 0), Key(Stream.EVALUATION, 0, 0)]

    async def ask(decider: Decider) -> list[Decided]:
        return await decider.decide([(seen.row(0), key) for key in [*keys, keys[0]]])

    *different, again = answered(Actor(policy, block=1, device="cpu"), ask)
    assert len({one.actions.tobytes() for one in different}) == len(keys)
    assert again.actions.tobytes() == different[0].actions.tobytes()


def test_actions_are_clipped_to_the_declared_range(policy: Any, seen: Observation) -> None:
    wide = policy.stats
    policy.stats = type(wide)(wide.q01 * 3, wide.q99 * 3, wide.state_mean, wide.state_std)
    try:

        async def ask(decider: Decider) -> list[Decided]:
            return await decider.decide([(seen.row(i), Key(Stream.SERVED, i, 0)) for i in range(5)])

        actions = np.stack([one.actions for one in answered(Actor(policy, block=1, device="cpu"), ask)])
    finally:
        policy.stats = wide
    assert np.abs(actions).max() == 1.0


def test_an_observation_that_cannot_be_read_spoils_no_others_answer(policy: Any, seen: Observation) -> None:
    actor = Counting(policy, block=4, device="cpu")

    async def ask(decider: Decider) -> list[Any]:
        rows = [worded(seen.row(i), text) for i, text in enumerate(["go", "boom", "go"])]
        asked = (decider.decide([(row, Key(Stream.SERVED, i, 0))]) for i, row in enumerate(rows))
        return await asyncio.gather(*asked, return_exceptions=True)

    good, bad, other = answered(actor, ask)
    assert isinstance(bad, ValueError)
    assert str(bad) == "cannot read boom"
    assert actor.__dict__["passes"] == [3, 1, 1, 1]
    for i, (decided,) in ((0, good), (2, other)):
        alone = Actor(policy, block=4, device="cpu").decide(
            worded(seen.row(i), "go"), [keyed_rng(SEED, Stream.SERVED, i, 0)], temperature=TEMPERATURE
        )
        assert np.array_equal(decided.actions, np.clip(alone.decision.action[0], -1, 1))


def test_a_bug_is_named_to_the_client_and_shown_to_who_runs_the_server(
    policy: Any, seen: Observation, capsys: pytest.CaptureFixture[str]
) -> None:
    async def ask(decider: Decider) -> list[Any]:
        row = (worded(seen.row(0), "bug"), Key(Stream.SERVED, 0, 0))
        return await asyncio.gather(decider.decide([row]), return_exceptions=True)

    (error,) = answered(Counting(policy, block=2, device="cpu"), ask)
    assert isinstance(error, RuntimeError)
    assert "TypeError in the policy" in str(error)
    assert "secret" not in str(error)
    assert "a secret of the house" in capsys.readouterr().err


def test_who_left_is_not_decided_for(policy: Any, seen: Observation) -> None:
    actor = Counting(policy, block=4, device="cpu")

    async def ask(decider: Decider) -> list[Decided]:
        left = asyncio.create_task(decider.decide([(seen.row(0), Key(Stream.SERVED, 0, 0))]))
        await asyncio.sleep(0)
        left.cancel()
        return await decider.decide([(seen.row(1), Key(Stream.SERVED, 1, 0))])

    assert len(answered(actor, ask)) == 1
    assert actor.__dict__["passes"] == [1]
