"""Ends the agents of an embedded Ray when the process that started it was killed. Linux; imports nothing of rlvla.

Everything else dies with the driver: the raylet is killed by the kernel, actors notice. Ray's two agents first want to
report the raylet's death to a server that is dead too, and wait a minute for it. They cannot be recognised by then
(they overwrite their environment and their parent is gone), so they are noted while it lives.
"""

import os
import select
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

SECONDS_TO_NOTE = 60.0
"""Ray starts its agents beside everything else, and a busy machine takes its time."""
SECONDS_TO_END = 5.0
"""An orderly end takes less."""

Process = tuple[int, str]
"""Its number and its time of birth: numbers are used again."""


def main(driver: int) -> None:
    """Wait until standard input ends, which is when the driver has; then end its Ray's agents."""
    agents: set[Process] = set()
    until = time.monotonic() + SECONDS_TO_NOTE
    while True:
        agents |= agents_of(driver)
        if select.select([sys.stdin], [], [], 1.0 if time.monotonic() < until else None)[0]:
            break
    until = time.monotonic() + SECONDS_TO_END
    while (left := alive(agents)) and time.monotonic() < until:
        time.sleep(0.2)
    for pid, _ in left:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def agents_of(driver: int) -> set[Process]:
    """Grandchildren of a driver that call themselves an agent of Ray."""
    table = processes()
    found = set()
    for pid, (parent, born) in table.items():
        if parent in table and table[parent][0] == driver:
            with suppress(OSError):
                name = Path(f"/proc/{pid}/cmdline").read_bytes().partition(b"\0")[0].strip()
                if name.startswith(b"ray::") and name.endswith(b"Agent"):
                    found.add((pid, born))
    return found


def alive(known: set[Process]) -> set[Process]:
    table = processes()
    return {(pid, born) for pid, born in known if pid in table and table[pid][1] == born}


def processes() -> dict[int, tuple[int, str]]:
    """Number -> (parent, time of birth) of all there are."""
    table = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, IndexError):
            # The name, in brackets, may hold anything.
            fields = path.read_text().rpartition(")")[2].split()
            table[int(path.parent.name)] = (int(fields[1]), fields[19])
    return table


if __name__ == "__main__":
    main(int(sys.argv[1]))
