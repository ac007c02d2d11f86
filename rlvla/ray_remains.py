"""Ends what is left of an embedded Ray when the process that started it was killed. Linux; imports nothing of rlvla.

Almost everything dies with the driver: the raylet is killed by the kernel, actors notice. Not so who talks to Ray's
head just then (its two agents, a worker that is starting): the head is dead too, and they ask it for a minute. Nor an
actor that hangs, nor what it started. By then their parents are gone and their environment is overwritten; what they
still have is their session's logs, open for writing.
"""

import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

SECONDS_TO_END = 5.0
"""An orderly end takes less."""
SECONDS_TO_DIE = 30.0
"""What SIGKILL has not ended by then waits for a device or a disk, and nobody can end it."""


def main(logs: str) -> None:
    """Wait until standard input ends, which is when the driver has; then end who writes to the logs of its Ray."""
    sys.stdin.read()
    ended = time.monotonic()
    while (left := writers(logs)) and (waited := time.monotonic() - ended) < SECONDS_TO_DIE:
        if waited > SECONDS_TO_END:
            for pid in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.2)


def writers(folder: str) -> set[int]:
    """Processes with a file under a folder open for writing. Who only reads there, as ``tail -f`` does, is none."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        # Not ours to look at, or it has ended or closed the file in the meantime.
        with suppress(OSError):
            for number in os.listdir(process / "fd"):
                if os.readlink(process / "fd" / number).startswith(f"{folder}/") and _writes(process, number):
                    found.add(int(process.name))
                    break
    return found


def _writes(process: Path, number: str) -> bool:
    """Of an open file: proc(5), fdinfo's line ``flags:``, in octal."""
    flags = (process / "fdinfo" / number).read_text().partition("flags:")[2].split()[0]
    return int(flags, base=8) & os.O_ACCMODE != os.O_RDONLY


if __name__ == "__main__":
    main(sys.argv[1])
