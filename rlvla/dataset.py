"""Demonstrations on disk: the LeRobotDataset v3.0 layout, images embedded in parquet.

    meta/info.json                            names, shapes, counts, fps; our own key "rlvla"
    meta/stats.json                           min, max, mean, std, count, quantiles of every feature
    meta/tasks.parquet                        instruction (the pandas index) -> task_index
    meta/episodes/chunk-000/file-000.parquet  one row an episode: length, where its frames are, statistics
    data/chunk-000/file-000.parquet           one row a frame: PNG bytes, state, action, indices

LeRobot and Hugging Face `datasets` read what `DatasetWriter` writes; `load_dataset` reads what LeRobot
writes. The key "rlvla" of info.json holds the action convention, which the layout itself cannot express.

Axes: E episodes, L frames of one episode, N frames of all, H actions in a chunk, A and S components of
action and state, h and w pixels.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]
Floats = NDArray[np.float32]
Pixels = NDArray[np.uint8]

CODEBASE_VERSION = "v3.0"
INFO_PATH = "meta/info.json"
STATS_PATH = "meta/stats.json"
TASKS_PATH = "meta/tasks.parquet"
EPISODES_PATH = "meta/episodes/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
FILES_PER_CHUNK = 1000
MIB = 1024**2

STATE = "observation.state"
IMAGE_PREFIX = "observation.images."
INDEX_FEATURES = {  # what LeRobot adds to every frame; the timestamp is in seconds from the episode's start
    "timestamp": "float32",
    "frame_index": "int64",
    "episode_index": "int64",
    "index": "int64",
    "task_index": "int64",
}
TASK_COLUMNS = ("__index_level_0__", "task")  # pandas' name for an index without one; LeRobot's newer name
QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}
IMAGES_PER_EPISODE_IN_STATS = 16

CURE = "Copy the dataset again, or collect it again with `rlvla collect`."


@dataclass(frozen=True, eq=False)
class Episode:
    """One demonstration. Frame t is what was seen before `action[t]` was executed.

    Shapes:
        images: per camera uint8 [L,h,w,3], RGB.
        state: float32 [L,S], or None where the robot reports none.
        action: float32 [L,A], in environment units (not normalised).
    """

    images: Mapping[str, Pixels]
    state: Floats | None
    action: Floats
    instruction: str


@dataclass(frozen=True, eq=False)
class Demonstrations:
    """All frames of a dataset, decoded, ordered by episode and by time within it.

    Shapes:
        images: per camera uint8 [N,h,w,3], RGB.
        state: float32 [N,S], or None if the dataset has none.
        action: float32 [N,A].
        task_index: int64 [N]; the instruction of frame n is `tasks[task_index[n]]`.
        episode_start, episode_end: int64 [E]; episode e is frames
            `episode_start[e] <= n < episode_end[e]`.

    `env_spec`, `suite` and `task` are what `rlvla collect` recorded; None in a dataset from elsewhere.
    """

    images: dict[str, Pixels]
    state: Floats | None
    action: Floats
    tasks: tuple[str, ...]
    task_index: Integers
    episode_start: Integers
    episode_end: Integers
    fps: float
    robot_type: str | None
    action_names: tuple[str, ...]
    state_names: tuple[str, ...] = ()
    env_spec: dict[str, Any] | None = None
    suite: str | None = None
    task: str | None = None

    @property
    def num_frames(self) -> int:
        """N."""
        return len(self.action)

    @property
    def num_episodes(self) -> int:
        """E."""
        return len(self.episode_start)

    @property
    def episode_index(self) -> Integers:
        """The episode of each frame, int64 [N]."""
        return np.repeat(np.arange(self.num_episodes), self.episode_end - self.episode_start)

    @property
    def frames_left(self) -> Integers:
        """Frames to the end of the episode, this one included: int64 [N], 1 on an episode's last frame."""
        return np.repeat(self.episode_end, self.episode_end - self.episode_start) - np.arange(self.num_frames)

    def instruction(self, frame: int) -> str:
        """The instruction of frame `frame`, 0 <= frame < N."""
        return self.tasks[int(self.task_index[frame])]


def action_chunks(demonstrations: Demonstrations, chunk_size: int) -> tuple[Floats, NDArray[np.bool_]]:
    """Cut the chunk of H = `chunk_size` actions that starts at each frame, never across an episode's end.

    Returns:
        Actions float32 [N,H,A], and a mask bool [N,H] that is True where the action was demonstrated. Past
        the end the last action is repeated and masked, so the padding stays in the range of real actions.

    Raises:
        ValueError: chunk_size is less than 1.
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}; it must be at least 1.")
    offset = np.arange(chunk_size)
    is_real = offset < demonstrations.frames_left[:, None]
    last = demonstrations.frames_left[:, None] - 1
    frame = np.arange(demonstrations.num_frames)[:, None] + np.minimum(offset, last)
    return demonstrations.action[frame], is_real


def as_float32(values: NDArray[Any]) -> Floats:
    """Cast to float32; what does not fit becomes Inf, which the callers refuse."""
    with np.errstate(over="ignore"):
        return values.astype(np.float32)
