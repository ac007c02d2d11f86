"""Pictures of a round, in memory that the learner shares with the simulators of its machine.

A simulator's process writes each picture where the learner reads it: one copy, no reply that carries pictures, nothing
in Ray's object store. The memory has no name in any file system (`memfd_create`): others reach it through the learner's
entry in /proc, and the kernel takes it back when the last of them is gone, however they died. Where that is not
possible, on another machine or another system than Linux, the reply carries the pictures and the learner writes them.
"""

import mmap
import os
import secrets
import sys
import weakref
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from rlvla_envs.base import Camera, Observation, Scattered

Images = dict[str, UInt8[np.ndarray, "rows h w 3"]]
"""Of each camera by name."""
PAGE = mmap.ALLOCATIONGRANULARITY
FIRST_SEGMENT = 16
"""Sheets in the first segment. Each later one is twice as large as all before, so that a few mappings, each of which
costs a file descriptor, hold any number of rounds. Memory is taken when it is written to."""
TOKEN_BYTES = 16
NAME = "rlvla pictures"
"""What /proc shows of the memory."""


class Address(NamedTuple):
    """Where a process of the same machine finds the memory, and how it is laid out."""

    pid: int
    fd: int
    token: bytes
    """What its first bytes are: a process of that number may be of another run on another machine."""
    rows: int
    """Of a sheet."""
    cameras: tuple[tuple[str, int, int], ...]
    """(name, height, width)"""

    @property
    def sheet_bytes(self) -> int:
        """Whole pages: a mapping can begin nowhere else."""
        pixels = sum(height * width for _, height, width in self.cameras)
        return -(-self.rows * pixels * 3 // PAGE) * PAGE


class _Mapped:
    """Segments that this process has mapped."""

    def __init__(self, fd: int, address: Address) -> None:
        self._fd, self._address = fd, address
        self._segments: dict[int, mmap.mmap] = {}

    def sheet(self, number: int, rows: int) -> "Sheet":
        """The first ``rows`` rows' worth of a sheet's memory."""
        memory, start = self._place(number)
        pixels = sum(height * width for _, height, width in self._address.cameras)
        whole = np.frombuffer(memory, np.uint8, rows * pixels * 3, start)
        images: Images = {}
        at = 0
        for name, height, width in self._address.cameras:
            end = at + rows * height * width * 3
            images[name] = whole[at:end].reshape(rows, height, width, 3)
            at = end
        return Sheet(number, images, whole)

    def give_back(self, number: int, begin: int = 0) -> None:
        """Let the kernel have a sheet's memory from some byte on; it is black when it is read again."""
        memory, start = self._place(number)
        begin = -(-begin // PAGE) * PAGE
        if begin < self._address.sheet_bytes:
            memory.madvise(mmap.MADV_REMOVE, start + begin, self._address.sheet_bytes - begin)

    def _place(self, number: int) -> tuple[mmap.mmap, int]:
        """The mapping that a sheet is in, and where it begins there."""
        size = self._address.sheet_bytes
        segment, first = segment_of(number)
        if segment not in self._segments:
            self._segments[segment] = mmap.mmap(self._fd, _size(segment) * size, offset=PAGE + first * size)
        return self._segments[segment], (number - first) * size


def segment_of(number: int) -> tuple[int, int]:
    """The segment that a sheet is in, and that segment's first sheet."""
    segment = (number // FIRST_SEGMENT + 1).bit_length() - 1
    return segment, FIRST_SEGMENT * (2**segment - 1)


def _size(segment: int) -> int:
    return FIRST_SEGMENT * int(2**segment)


class Sheet(NamedTuple):
    """Room for the pictures of one round."""

    number: int
    images: Images
    memory: np.ndarray
    """What the images are views of, and nothing else is."""

    @property
    def rows(self) -> int:
        return len(next(iter(self.images.values()), ()))

    def part(self, rows: slice | np.ndarray) -> Images:
        """A view where rows are a slice, else a copy."""
        return {name: image[rows] for name, image in self.images.items()}


class Sheets:
    """The learner's side: sheets for rounds, used again when nobody holds their arrays any more.

    One thread takes and settles; arrays may come to their end in any.
    """

    def __init__(self, cameras: Sequence[Camera], rows: int) -> None:
        """
        Args:
            rows: pictures of each camera in a round, at most.
        """
        layout = tuple((camera.name, camera.height, camera.width) for camera in cameras)
        self._address = Address(os.getpid(), -1, secrets.token_bytes(TOKEN_BYTES), rows, layout)
        self._written: list[int] = []
        """Bytes of each sheet that have memory, at most."""
        self._free: list[int] = []
        self._mapped: _Mapped | None = None
        if sys.platform == "linux" and self._address.sheet_bytes:
            # A system that forbids it has replies.
            with suppress(OSError):
                self._address = self._address._replace(fd=os.memfd_create(NAME, os.MFD_CLOEXEC))
                os.write(self._address.fd, self._address.token)
                self._mapped = _Mapped(self._address.fd, self._address)

    @property
    def address(self) -> Address | None:
        """None where this system cannot share memory so."""
        return self._address if self._mapped else None

    def take(self, rows: int) -> Sheet:
        """A sheet that nobody uses, with whatever was on it before.

        Args:
            rows: of it that are needed.
        """
        if self._mapped is None:
            cameras = self._address.cameras
            images = {name: np.empty((rows, h, w, 3), np.uint8) for name, h, w in cameras}
            return Sheet(-1, images, np.zeros(0, np.uint8))
        if self._free:
            number = self._free.pop()
        else:
            number = len(self._written)
            self._written.append(0)
            segment, first = segment_of(number)
            os.ftruncate(self._address.fd, PAGE + (first + _size(segment)) * self._address.sheet_bytes)
        sheet = self._mapped.sheet(number, rows)
        if self._written[number] > sheet.memory.nbytes:
            # Else each sheet would sooner or later have the memory of the largest round.
            self._mapped.give_back(number, sheet.memory.nbytes)
        self._written[number] = sheet.memory.nbytes
        return sheet

    def settle(self, sheet: Sheet) -> None:
        """Say that everybody who was to write has answered: it is used again when its arrays and all views of them are
        gone."""
        if self._mapped is not None:
            weakref.finalize(sheet.memory, self._free.append, sheet.number).atexit = False

    def abandon(self, sheet: Sheet) -> None:
        """Say that somebody did not answer, and might write yet: its memory is given back and it is not used again."""
        if self._mapped is not None:
            weakref.finalize(sheet.memory, self._mapped.give_back, sheet.number).atexit = False

    def close(self) -> None:
        """Arrays that are still held stay what they are."""
        if self._mapped is not None:
            os.close(self._address.fd)
            self._mapped = None


class SheetWriter:
    """A simulator's side."""

    def __init__(self, address: Address) -> None:
        """
        Raises:
            OSError: the memory is not within reach.
        """
        path = f"/proc/{address.pid}/fd/{address.fd}"
        # Before it is opened: on another machine it may be a terminal or a device, to which that does something.
        if not os.readlink(path).startswith(f"/memfd:{NAME}"):
            raise OSError(f"{path} is something else here.")
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            if os.pread(fd, TOKEN_BYTES, 0) != address.token:
                raise OSError(f"{path} is of another run here.")
        except BaseException:
            os.close(fd)
            raise
        self._mapped = _Mapped(fd, address)

    def images(self, number: int, rows: int) -> Images:
        """Of a sheet that was taken for so many rows."""
        return self._mapped.sheet(number, rows).images


def put(sheet: Images, rows: np.ndarray, seen: Observation) -> None:
    """Write what is seen into rows [B] of a sheet, unless it was drawn there.

    Raises:
        ValueError: pictures that are not what the suite announced.
    """
    if isinstance(seen, Scattered):
        # From where each row is: together they would be copied first.
        for place, (one, i) in enumerate(seen.rows):
            put(sheet, rows[place : place + 1], one.row(i))
        return
    for name, room in sheet.items():
        image = seen.images.get(name)
        expected = (len(rows), *room.shape[1:])
        if image is None or image.dtype != np.uint8 or image.shape != expected:
            found = "is missing" if image is None else f"is {image.dtype} {image.shape}"
            raise ValueError(
                f"camera {name!r} {found}; the suite announced uint8 {expected}. Its EnvSpec or its pictures are wrong."
            )
        # A world that was given rows drew in their order: `rlvla.hosts.Canvas.under` gives it no others.
        if not np.may_share_memory(room, image):
            room[rows] = image


def writer_at(address: Address) -> SheetWriter | None:
    """None where the memory is not within reach: on another machine, in another container, or of another user."""
    with suppress(OSError):
        return SheetWriter(address)
    return None
