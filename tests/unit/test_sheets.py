"""Pictures cross processes in shared memory: written once, and over only when nobody reads or writes them."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlvla.hosts import Canvas
from rlvla.sheets import PAGE, Address, Sheets, SheetWriter, put, segment_of, writer_at
from rlvla_envs.base import Camera, Observation, Scattered

CAMERAS = (Camera(name="wrist", height=2, width=3), Camera(name="front", height=4, width=4))
linux = pytest.mark.skipif(
    sys.platform != "linux", reason="memory is shared on Linux alone; elsewhere replies carry it"
)


def pictures(rows: int, value: int = 0) -> dict[str, np.ndarray]:
    """Row r is full of value + r, of the second camera of 100 more."""
    numbers = value + np.arange(rows, dtype=np.uint8)[:, None, None, None]
    return {c.name: np.tile(numbers + np.uint8(100 * i), (1, c.height, c.width, 3)) for i, c in enumerate(CAMERAS)}


def seen(rows: int, value: int = 0) -> Observation:
    return Observation(pictures(rows, value), [""] * rows)


def address_of(sheets: Sheets) -> Address:
    assert sheets.address is not None
    return sheets.address


def memory_of(sheets: Sheets) -> int:
    """Bytes that the kernel has given."""
    return os.stat(f"/proc/self/fd/{address_of(sheets).fd}").st_blocks * 512


def test_the_seventeenth_sheet_is_the_first_of_a_segment_of_32() -> None:
    assert [segment_of(number) for number in (0, 15, 16, 47, 48)] == [(0, 0), (0, 0), (1, 16), (1, 16), (2, 48)]


@linux
def test_a_sheet_takes_whole_pages() -> None:
    # 5 rows of (2 * 3 + 4 * 4) pixels of 3 bytes are 330; 400 are 26,400.
    assert address_of(Sheets(CAMERAS, 5)).sheet_bytes == PAGE
    assert address_of(Sheets(CAMERAS, 400)).sheet_bytes == -(-26_400 // PAGE) * PAGE


@linux
def test_what_another_process_writes_is_read_here_where_it_was_asked_to_be() -> None:
    sheets = Sheets(CAMERAS, 3)
    taken = [sheets.take(3) for _ in range(20)]
    program = """
import sys
import numpy as np
from rlvla.sheets import Address, SheetWriter, put
from rlvla_envs.base import Observation

writer = SheetWriter(eval(sys.argv[1], {"Address": Address}))
for number in (0, 19):
    images = {"wrist": np.full((2, 2, 3, 3), number, np.uint8), "front": np.full((2, 4, 4, 3), number + 1, np.uint8)}
    put(writer.images(number, 3), np.array([2, 0]), Observation(images, ["", ""]))
"""
    subprocess.run([sys.executable, "-c", program, repr(sheets.address)], check=True)
    for sheet in taken:
        wrist, front = sheet.images["wrist"], sheet.images["front"]
        assert (wrist.shape, front.shape) == ((3, 2, 3, 3), (3, 4, 4, 3))
        number = sheet.number if sheet.number in (0, 19) else 0
        written = sheet.number in (0, 19)
        assert np.unique(wrist[[0, 2]]).tolist() == [number]
        assert np.unique(front[[0, 2]]).tolist() == [number + written]
        assert not wrist[1].any()


def test_rows_go_where_they_belong_from_where_each_is() -> None:
    sheet = Sheets(CAMERAS, 4).take(4)
    one, other = seen(2, 10), seen(3, 20)
    put(sheet.images, np.array([3, 0, 1]), Scattered([(other, 2), (one, 1), (other, 0)]))
    assert sheet.images["wrist"][[3, 0, 1], 1, 2, 0].tolist() == [22, 11, 20]
    assert sheet.images["front"][[3, 0, 1], 3, 3, 2].tolist() == [122, 111, 120]


@pytest.mark.parametrize(("rows", "given"), [([1, 2], True), ([0, 2], False), ([2, 1], False)])
def test_a_world_is_given_rows_that_lie_together_to_draw_on(rows: list[int], given: bool) -> None:
    class World:
        room: dict[str, np.ndarray] | None = None

    world: Any = World()
    sheet = Sheets(CAMERAS, 3).take(3)
    canvas = Canvas(sheet.images, np.array(rows))
    drawn = seen(2, 5)
    with canvas.under(world):
        assert (world.room is not None) is given
        if world.room is not None:
            for name, image in world.room.items():
                image[:] = drawn.images[name]
            drawn = Observation(world.room, drawn.instruction)
    assert world.room is None
    told = canvas.take(drawn)
    assert (told.images, told.instruction) == ({}, ["", ""])
    assert sheet.images["front"][rows, 0, 0, 0].tolist() == [105, 106]


def test_without_a_canvas_pictures_stay_with_the_reply_and_a_world_draws_on_its_own() -> None:
    class World:
        room: dict[str, np.ndarray] | None = None

    world: Any = World()
    with Canvas().under(world):
        assert world.room is None
    drawn = seen(2)
    assert Canvas().take(drawn) is drawn


@linux
@pytest.mark.parametrize("camera", [0, 1])
def test_a_sheet_is_used_again_when_its_writers_have_answered_and_its_readers_are_gone(camera: int) -> None:
    sheets = Sheets(CAMERAS, 2)
    sheet = sheets.take(2)
    first = sheet.number
    row = torch.from_numpy(sheet.images[CAMERAS[camera].name][1:])[0]
    sheets.settle(sheet)
    del sheet
    assert sheets.take(2).number != first, "a tensor still shows one of its pictures"
    del row
    assert sheets.take(2).number == first


@linux
def test_a_sheet_that_somebody_did_not_answer_for_is_not_used_again_and_leaves_no_memory() -> None:
    sheets = Sheets(CAMERAS, 10_000)
    late, other = sheets.take(10_000), sheets.take(10_000)
    for sheet in (late, other):
        put(sheet.images, np.arange(10_000), seen(10_000))
    number, before = late.number, memory_of(sheets)
    sheets.abandon(late)
    sheets.settle(other)
    assert late.images["front"].any(), "it is held"
    del late, other, sheet
    assert number not in [sheets.take(2).number for _ in range(3)]
    assert memory_of(sheets) <= before / 2


@linux
def test_a_smaller_round_takes_the_memory_of_its_own_pictures() -> None:
    # Else each sheet would come to hold the largest round there was, and a rollout as many of those as it has rounds.
    sheets = Sheets(CAMERAS, 10_000)
    sheet = sheets.take(10_000)
    put(sheet.images, np.arange(10_000), seen(10_000))
    assert memory_of(sheets) > 10_000 * 66
    sheets.settle(sheet)
    del sheet
    small = sheets.take(1000)
    put(small.images, np.arange(1000), seen(1000, 3))
    assert [image.shape[0] for image in small.images.values()] == [1000, 1000]
    assert memory_of(sheets) < 1000 * 66 + 3 * PAGE
    assert small.images["front"][:2, 3, 3, 0].tolist() == [103, 104]


@linux
def test_thousands_of_sheets_cost_a_few_file_descriptors_and_no_memory_before_they_are_written() -> None:
    before = len(os.listdir("/proc/self/fd"))
    sheets = Sheets(CAMERAS, 10_000)
    held = [sheets.take(10_000) for _ in range(3000)]
    assert len(os.listdir("/proc/self/fd")) - before < 12
    assert memory_of(sheets) <= PAGE
    assert len({sheet.number for sheet in held}) == 3000


@linux
@pytest.mark.parametrize("fault", [OSError, PermissionError])
def test_a_system_that_forbids_it_has_replies(fault: type[OSError], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> int:
        raise fault("not here")

    monkeypatch.setattr(os, "memfd_create", refuse)
    sheets = Sheets(CAMERAS, 2)
    assert sheets.address is None
    assert sheets.take(2).images["front"].shape == (2, 4, 4, 3)
    sheets.close()


@linux
def test_arrays_outlive_the_pool_and_its_descriptor_does_not() -> None:
    sheets = Sheets(CAMERAS, 2)
    fd, sheet = address_of(sheets).fd, sheets.take(2)
    put(sheet.images, np.array([0, 1]), seen(2, 7))
    sheets.close()
    sheets.close()
    assert sheet.images["wrist"][:, 0, 0, 0].tolist() == [7, 8]
    assert not Path(f"/proc/self/fd/{fd}").exists()


@linux
def test_memory_that_is_not_within_reach_has_no_writer() -> None:
    address = address_of(sheets := Sheets(CAMERAS, 2))
    assert isinstance(writer_at(address), SheetWriter)
    # No such process: the learner is on another machine.
    assert writer_at(address._replace(pid=2**22 + 1)) is None
    # One of that number is here as well, and has something else open, or the memory of another run.
    with open(os.devnull) as other:
        assert writer_at(address._replace(fd=other.fileno())) is None
    before = len(os.listdir("/proc/self/fd"))
    assert writer_at(address._replace(token=bytes(16))) is None
    assert len(os.listdir("/proc/self/fd")) == before
    sheets.close()


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"front": np.zeros((2, 4, 4, 3), np.float32)}, r"camera 'front' is float32 .*announced uint8 \(2, 4, 4, 3\)"),
        ({"front": np.zeros((2, 4, 5, 3), np.uint8)}, r"is uint8 \(2, 4, 5, 3\)"),
        ({"front": np.zeros((1, 4, 4, 3), np.uint8)}, r"is uint8 \(1, 4, 4, 3\)"),
        ({"front": None}, "camera 'front' is missing"),
    ],
)
def test_pictures_that_are_not_those_announced_are_refused(wrong: dict[str, np.ndarray | None], says: str) -> None:
    given = {name: image for name, image in {**pictures(2), **wrong}.items() if image is not None}
    with pytest.raises(ValueError, match=says):
        put(Sheets(CAMERAS, 2).take(2).images, np.array([0, 1]), Observation(given, ["", ""]))


@pytest.mark.parametrize("cameras", [CAMERAS, ()])
def test_where_memory_cannot_be_shared_a_sheet_is_memory_of_this_process(
    cameras: tuple[Camera, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    if cameras:
        monkeypatch.setattr(sys, "platform", "darwin")
    sheets = Sheets(cameras, 2)
    assert sheets.address is None
    one, other = sheets.take(2), sheets.take(2)
    sheets.settle(one)
    sheets.abandon(other)
    assert [image.shape for image in one.images.values()] == [(2, c.height, c.width, 3) for c in cameras]
    for name in one.images:
        assert not np.shares_memory(one.images[name], other.images[name])
    sheets.close()
