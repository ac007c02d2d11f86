"""Rows of several rounds are found by their numbers, copied once, and keep nothing else alive."""

import numpy as np
import pytest
import torch
from tensordict import TensorDict

from rlvla.rounds import Rounds, alone, recall, refer
from rlvla_envs.base import Observation, Scattered


def block(first: int, rows: int, tokens: int) -> TensorDict:
    """Row r of all has images full of r and r + 1 valid tokens at most."""
    number = torch.arange(first, first + rows)
    images = number[:, None, None, None, None].expand(rows, 1, 2, 2, 3).to(torch.uint8).clone()
    mask = torch.arange(tokens) <= number[:, None]
    batch = TensorDict({"images": images, "mask": mask, "nested": TensorDict({"x": number}, [rows])}, [rows])
    return TensorDict({"batch": batch}, batch_size=[rows])


def test_rows_come_in_the_order_asked_from_whatever_block_they_are_in_padded_to_one_length() -> None:
    rounds = Rounds([block(0, 3, 4), block(3, 1, 6), block(4, 4, 5)])
    found = rounds.take(torch.tensor([7, 0, 3, 3, 4]))
    assert found["batch", "images"].shape == (5, 1, 2, 2, 3)
    assert found["batch", "images"][:, 0, 1, 1, 2].tolist() == [7, 0, 3, 3, 4]
    assert found["batch", "nested", "x"].tolist() == [7, 0, 3, 3, 4]
    # The longest block has 6 tokens; a row has no more valid ones than its own block had.
    assert found["batch", "mask"].sum(dim=1).tolist() == [5, 1, 4, 4, 5]


def test_images_may_stay_in_the_observations_that_the_blocks_were_made_from() -> None:
    def bare(first: int, rows: int) -> TensorDict:
        whole = block(first, rows, 3)
        return TensorDict({"batch": whole["batch"].exclude("images")}, [rows])

    one, other = observation(0, 3, cameras=2), observation(3, 2, cameras=2)
    seen = [other, Scattered([(other, 1), (one, 0), (one, 2)])]
    rounds = Rounds([bare(3, 2), bare(0, 3)], seen, ["camera 1", "camera 0"])
    found = rounds.take(torch.tensor([4, 0, 2, 4]))
    assert found["batch", "images"].shape == (4, 2, 2, 2, 3)
    assert found["batch", "images"][..., 0, 0, 0].tolist() == [[102, 2], [103, 3], [104, 4], [102, 2]]
    assert found["batch", "nested", "x"].tolist() == [2, 3, 0, 2]
    assert set(rounds.take(torch.tensor([1]), "batch", "images")["batch"].keys()) == {"images"}
    assert set(rounds.take(torch.tensor([1]), "context").keys()) == set()
    found["batch", "images"].fill_(9)
    assert rounds.take(torch.tensor([0]))["batch", "images"].max() == 103
    # Of each of 5 rows two pictures of 12 bytes, 3 bytes of mask and 8 of x.
    assert rounds.nbytes == 5 * (24 + 3 + 8)
    assert set(rounds.without("batch").take(torch.tensor([1])).keys()) == set()


def test_what_is_read_is_a_copy() -> None:
    rounds = Rounds([block(0, 2, 3)])
    rounds.take(torch.tensor([0, 1]))["batch", "images"].fill_(9)
    assert rounds.take(torch.tensor([1]))["batch", "images"].unique().tolist() == [1]


def test_a_rollout_finds_what_its_decisions_were_made_from_after_any_cut() -> None:
    rollout = TensorDict({"reward": torch.arange(4.0).reshape(2, 2)}, batch_size=[2, 2])
    refer(rollout, Rounds([block(0, 2, 3), block(2, 2, 3)]), torch.tensor([[0, 2], [1, 3]]))
    data = rollout[torch.tensor([[True, True], [False, True]])]
    read = recall(data[torch.tensor([2, 1])])
    assert read["reward"].tolist() == [3.0, 1.0]
    assert read["batch", "images"][:, 0, 0, 0, 0].tolist() == [3, 2]
    assert "rounds" not in read
    assert "rounds" in data


def test_what_nobody_reads_any_more_can_be_left_out() -> None:
    both = block(0, 2, 3)
    both["context"] = TensorDict({"tokens": torch.ones(2, 3, 4), "mask": torch.ones(2, 3, dtype=torch.bool)}, [2])
    rounds = Rounds([both])
    rest = rounds.without("batch")
    assert ("context" in rest, "batch" in rest, "batch" in rounds) == (True, False, True)
    assert rest.nbytes == 2 * 3 * 4 * 4 + 2 * 3
    assert set(rest.take(torch.tensor([1])).keys()) == {"context"}


def test_a_block_keeps_no_more_than_itself() -> None:
    filled = torch.zeros(16, 5)
    own = torch.zeros(3, 5)
    kept = alone(TensorDict({"part": filled[:3], "own": own}, batch_size=[3]))
    assert kept["part"].untyped_storage().nbytes() == 3 * 5 * 4
    assert kept["own"].data_ptr() == own.data_ptr()


# --- rows that have not met yet


def observation(first: int, rows: int, *, cameras: int = 1, state: bool = True) -> Observation:
    numbers = np.arange(first, first + rows)
    image = np.broadcast_to(numbers[:, None, None, None], (rows, 2, 2, 3)).astype(np.uint8)
    return Observation(
        images={f"camera {i}": image + 100 * i for i in range(cameras)},
        instruction=[f"task {number}" for number in numbers],
        state=numbers[:, None].astype(np.float32) if state else None,
    )


def test_scattered_rows_read_as_one_observation_does() -> None:
    one, other = observation(0, 3), observation(3, 2)
    both = Scattered([(other, 1), (one, 0), (other, 0)])
    assert len(both) == 3
    assert both.instruction == ["task 4", "task 0", "task 3"]
    assert both.images["camera 0"][:, 0, 0, 0].tolist() == [4, 0, 3]
    assert both.state is not None
    assert both.state[:, 0].tolist() == [4, 0, 3]
    # Rows of rows are rows of what these were of.
    again = Scattered([(both, 2), (one, 2)])
    assert [seen for seen, _ in again.rows] == [other, one]
    assert again.images["camera 0"][:, 0, 0, 0].tolist() == [3, 2]
    assert again.take([1]).instruction == ["task 2"]
    assert Scattered([(observation(0, 2, state=False), 1)]).state is None


def test_all_rows_of_one_observation_are_its_own_memory_unless_that_is_not_to_be_written_to() -> None:
    one = observation(0, 3)
    in_order, turned = Scattered([(one, 0), (one, 1), (one, 2)]), Scattered([(one, 1), (one, 0), (one, 2)])
    assert np.shares_memory(in_order.images["camera 0"], one.images["camera 0"])
    assert not np.shares_memory(turned.images["camera 0"], one.images["camera 0"])
    assert not np.shares_memory(Scattered([(one, 0)]).images["camera 0"], one.images["camera 0"])
    # As Ray's memory is.
    one.images["camera 0"].flags.writeable = False
    found = Scattered([(one, 0), (one, 1), (one, 2)]).images["camera 0"]
    assert not np.shares_memory(found, one.images["camera 0"])
    assert found.flags.writeable


@pytest.mark.parametrize("scattered", [False, True])
def test_views_have_the_cameras_in_the_order_asked(scattered: bool) -> None:
    one = observation(0, 2, cameras=2)
    seen = Scattered([(one, 1), (one, 0)]) if scattered else one.take([1, 0])
    views = seen.views(["camera 1", "camera 0"])
    assert views.shape == (2, 2, 2, 2, 3)
    assert views[..., 0, 0, 0].tolist() == [[101, 1], [100, 0]]
