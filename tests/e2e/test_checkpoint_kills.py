"""SIGKILL while checkpoints are written: whenever it comes, the newest one is whole."""

import random
import subprocess
import sys
import time
from pathlib import Path

from rlvla.checkpoints import Checkpoints, TrainState

WRITER = """
import sys
from pathlib import Path
from rlvla.checkpoints import Checkpoints, TrainState
checkpoints = Checkpoints(Path(sys.argv[1]), keep=2)
found = checkpoints.newest(print)
done = found[1].iterations if found else 0
print("writing", flush=True)
while True:
    done += 1
    def write(folder):
        for part in range(3):
            (folder / f"part{part}").write_bytes(bytes([done % 256]) * 700_000)
    state = TrainState(
        iterations=done, env_steps=0, difficulty={}, unseen_evaluation=None, metrics_bytes=0, success=None
    )
    checkpoints.save(state, write)
"""


def newest(folder: Path) -> tuple[Path, TrainState] | None:
    damaged: list[str] = []
    found = Checkpoints(folder, keep=2).newest(damaged.append)
    assert not damaged
    return found


def test_after_fifty_kills_at_random_moments_the_newest_checkpoint_was_always_whole(tmp_path: Path) -> None:
    chance = random.Random(0)
    iterations, left_stages = 0, 0
    for _ in range(50):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        assert writer.stdout is not None
        assert writer.stdout.readline() == "writing\n"
        time.sleep(chance.uniform(0, 0.05))
        writer.kill()
        writer.communicate()
        left_stages += bool(list(tmp_path.glob(".stage-*")))
        found = newest(tmp_path)
        if found is None:
            continue
        folder, state = found
        assert state.iterations >= iterations
        iterations = state.iterations
        for part in range(3):
            assert set((folder / f"part{part}").read_bytes()) == {iterations % 256}
    # The kills did come in the middle of writing, and in other moments too.
    assert left_stages > 5
    assert iterations > 5
    assert not list(tmp_path.glob(".stage-*"))
