"""What generated stand-ins for a benchmark's assets share: pictures, colours, and the stamp of a folder that is whole.

Needs the standard library alone, so that every suite's interpreter and the trainer's can read it.
"""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path
from typing import NamedTuple

STAMP = "rlvla-stand-ins.json"
"""In a folder of stand-ins, written last."""
FOLDER = Path("stand-ins")
"""In a suite's environment."""


class Assets(NamedTuple):
    """Where a simulator shall look for its assets."""

    folder: Path
    unscored: str
    """See `EnvSpec.unscored`; of stand-ins it says that they are."""


def stamp(folder: Path, version: int, files: int) -> None:
    """Say that ``folder`` is finished."""
    (folder / STAMP).write_text(json.dumps({"version": version, "files": files}))


def is_current(folder: Path, version: int) -> bool:
    """Whether a generator of this version finished there."""
    try:
        return bool(json.loads((folder / STAMP).read_text())["version"] == version)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def picture(seed: int) -> bytes:
    """A PNG of 8 x 8 pixels in one colour that the seed chooses."""
    colour = bytes(96 + (seed >> shift) % 128 for shift in (0, 8, 16))
    rows = b"".join(b"\0" + colour * 8 for _ in range(8))

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def colour_of(name: str) -> str:
    """Red, green, blue and alpha from 0 to 1, of the name alone."""
    seed = zlib.crc32(name.encode())
    return " ".join(f"{0.2 + (seed >> shift) % 100 / 140:.3f}" for shift in (0, 8, 16)) + " 1"
