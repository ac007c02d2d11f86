"""The critic's options: what attention weighs by hand, padding, the time, and where the gradient stops."""

import torch

from rlvla.config import AlgoConfig, CriticConfig, CriticPool
from rlvla.critic import Critic, time_left
from rlvla.policies.base import ValueHead


def attending(**changes: object) -> Critic:
    torch.manual_seed(0)
    config = AlgoConfig(critic=CriticConfig(pool=CriticPool.attention, **changes))  # type: ignore[arg-type]
    return Critic(3, config, token_size=2)


def test_attention_by_hand() -> None:
    # Query (log 3, 0): scores log 3 and 0, so the weights are 3/4 and 1/4; the third token is padding.
    critic = attending()
    assert critic.query is not None
    critic.query.weight.data = torch.tensor([[1.0986123, 0.0]])
    tokens = torch.tensor([[[1.0, 4.0], [0.0, 8.0], [9.0, 9.0]]])
    read = critic.read(torch.tensor([[5.0, 6.0, 7.0]]), tokens, torch.tensor([[True, True, False]]))
    torch.testing.assert_close(read, torch.tensor([[5.0, 6.0, 7.0, 0.75, 5.0]]))


def test_a_rollouts_reading_does_not_depend_on_other_rows_or_padding_and_equals_the_learners() -> None:
    critic = attending()
    features, tokens = torch.randn(4, 3), torch.randn(4, 6, 2)
    mask = torch.arange(6) < torch.tensor([6, 2, 4, 1])[:, None]
    whole = critic.read_rows(features, tokens, mask)
    assert torch.equal(critic.read_rows(features[1:2], tokens[1:2, :2], mask[1:2, :2]), whole[1:2])
    torch.testing.assert_close(critic.read(features, tokens, mask), whole)


def test_the_value_loss_trains_the_query_and_not_the_tokens() -> None:
    critic = attending(time_to_limit=True)
    tokens = torch.randn(2, 3, 2, requires_grad=True)
    read = critic.read(torch.randn(2, 3), tokens, torch.ones(2, 3, dtype=torch.bool))
    critic.value(read, torch.rand(2)).sum().backward()  # type: ignore[no-untyped-call]
    assert critic.query is not None
    assert critic.query.weight.grad is not None
    assert bool(critic.query.weight.grad.any())
    assert tokens.grad is None


def test_the_time_that_is_left_by_hand() -> None:
    # Chunks of 4, 4 and 2 steps of a limit of 16: decided at steps 0, 4 and 8.
    assert time_left(torch.tensor([[4, 4, 2]]), 16).tolist() == [[1.0, 0.75, 0.5]]


def test_a_critic_that_knows_the_time_tells_late_from_early() -> None:
    critic = Critic(3, AlgoConfig(critic=CriticConfig(time_to_limit=True)), token_size=0)
    features = torch.randn(1, 3).expand(2, 3)
    early, late = critic.value(features, torch.tensor([1.0, 0.0])).tolist()
    assert early != late


def test_the_plain_head_reads_the_policys_features_and_nothing_else() -> None:
    head, features = ValueHead(3), torch.randn(2, 3)
    tokens, mask = torch.randn(2, 5, 2), torch.ones(2, 5, dtype=torch.bool)
    assert head.read(features, tokens, mask) is head.read_rows(features, tokens, mask) is features
    assert torch.equal(head.value(features, None), head(features))
