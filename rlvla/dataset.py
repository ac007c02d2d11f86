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

import contextlib
import errno
import io
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

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

_CURE = "Copy the dataset again, or collect it again with `rlvla collect`."


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


class DatasetWriter:
    """Write demonstrations as a LeRobotDataset v3.0 that appears complete or not at all.

    Episodes go to a staging folder beside the target, `.<name>.partial-<pid>`. Leaving the `with` block
    renames it; an exception, Ctrl-C or a full disk removes it; a killed process leaves the stage behind
    and nothing under the target's name.

        with DatasetWriter("demos/push_cube", fps=20, robot_type="panda", ...) as writer:
            writer.add(episode)

    Args:
        root: the dataset's folder; it must not exist, or be empty.
        fps: control frequency, actions a second.
        action_names, state_names: one name a component. Without state names the episodes have no state.
        rlvla: plain JSON kept in info.json: {"suite": ..., "task": ..., "env_spec": {...}}.
        data_file_size_mb: a new data file starts when the next episode would pass this size, in MiB.

    Raises:
        FileExistsError: the target exists and is not an empty folder.
        ValueError: an argument is unusable, or the block ended before an episode was added.
        OSError: the disk failed; `errno` is kept.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        fps: float,
        robot_type: str,
        action_names: Sequence[str],
        state_names: Sequence[str] | None,
        rlvla: dict[str, Any],
        data_file_size_mb: int = 100,
    ) -> None:
        # Resolved now: a later change of the working directory must not move the target.
        self._root = Path(root).expanduser().resolve()
        self._stage = self._root.with_name(f".{self._root.name}.partial-{os.getpid()}")
        if not 0 < fps < np.inf:
            raise ValueError(f"fps is {fps}; it must be positive, in actions a second.")
        if not action_names:
            raise ValueError("action_names is empty; give one name for each action component.")
        try:
            self._rlvla = json.loads(json.dumps(rlvla, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise ValueError(f"rlvla goes into info.json, so it must be plain JSON: {error}.") from error
        _refuse_existing(self._root)
        self._names = {STATE: list(state_names or ()), "action": list(action_names)}
        self._fps, self._robot_type = fps, robot_type
        self._data_file_size_mb = data_file_size_mb
        self._features: dict[str, dict[str, Any]] = {}  # as in info.json; the first episode decides
        self._tasks: dict[str, int] = {}
        self._episodes: list[dict[str, Any]] = []  # the rows of meta/episodes
        self._columns: dict[str, list[NDArray[Any]]] = {}  # all but the images, for the statistics
        self._histograms: dict[str, Integers] = {}  # image key -> pixels per channel and level, [3,256]
        self._num_frames = self._num_sampled = self._num_bytes = 0
        self._file: Any = None  # the open pq.ParquetWriter
        self._file_number, self._file_bytes = -1, 0
        self._is_open = False

    def __enter__(self) -> Self:
        with self._explained_disk_errors():
            shutil.rmtree(self._stage, ignore_errors=True)  # of a killed process that had our pid
            self._stage.mkdir(parents=True)
        self._is_open = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._require_open()
                with self._explained_disk_errors():
                    self._commit()
        finally:
            self._discard()

    def add(self, episode: Episode) -> None:
        """Append one episode. After a refusal (ValueError) the writer is as it was before the call.

        Raises:
            ValueError: a column has the wrong shape or dtype, or holds NaN or Inf; cameras or image sizes
                differ from the first episode's; the instruction is empty.
            OSError: the disk is full or failed; the writer is closed and its stage removed.
        """
        self._require_open()
        features, vectors = self._checked(episode)
        length, index = len(episode.action), len(self._episodes)
        frame_index = np.arange(length)
        self._features = self._features or features  # also the order of the columns
        columns: dict[str, NDArray[Any]] = {
            **vectors,
            "timestamp": (frame_index / self._fps).astype(np.float32),
            "frame_index": frame_index,
            "episode_index": np.full(length, index),
            "index": self._num_frames + frame_index,
            "task_index": np.full(length, self._tasks.setdefault(episode.instruction, len(self._tasks))),
        }
        images = {IMAGE_PREFIX + camera: frames for camera, frames in episode.images.items()}
        pngs = {key: [_png(frame) for frame in frames] for key, frames in images.items()}
        with self._explained_disk_errors():
            place = self._write_rows(columns, pngs)
        sample = np.unique(np.linspace(0, length - 1, IMAGES_PER_EPISODE_IN_STATS).astype(int))
        histograms = {key: _histogram(frames[sample]) for key, frames in images.items()}
        stats = {key: _image_stats(counts, len(sample)) for key, counts in histograms.items()}
        stats |= {key: _stats(values) for key, values in columns.items()}
        self._episodes.append(
            {
                "episode_index": index,
                "tasks": [episode.instruction],
                "length": length,
                "data/chunk_index": place["chunk_index"],
                "data/file_index": place["file_index"],
                "dataset_from_index": self._num_frames,
                "dataset_to_index": self._num_frames + length,
                "meta/episodes/chunk_index": 0,
                "meta/episodes/file_index": 0,
                **{f"stats/{key}/{name}": v for key in stats for name, v in stats[key].items()},
            }
        )
        for key, values in columns.items():
            self._columns.setdefault(key, []).append(values)
        for key, counts in histograms.items():
            self._histograms[key] = counts + self._histograms.get(key, 0)
        self._num_frames += length
        self._num_sampled += len(sample)

    def _checked(self, episode: Episode) -> tuple[dict[str, dict[str, Any]], dict[str, Floats]]:
        """The features of info.json and float columns of an episode, or a ValueError naming the column."""
        if not episode.instruction.strip():
            raise self._refusal(f"instruction is {episode.instruction!r}; it must be a sentence")
        length = len(episode.action)
        features: dict[str, dict[str, Any]] = {}
        vectors: dict[str, Floats] = {}
        for camera, frames in episode.images.items():
            if not camera or "/" in camera:
                raise self._refusal(f"a camera is named {camera!r}; a name has no '/' and is not empty")
            is_rgb = frames.dtype == np.uint8 and frames.ndim == 4 and frames.shape[3] == 3
            if not is_rgb or len(frames) != length or frames.size == 0:
                raise self._refusal(
                    f"images of camera {camera!r} are {frames.dtype} {list(frames.shape)}; they must be uint8"
                    f" [L,h,w,3], none of them 0, with L = {length} as in action"
                )
            features[IMAGE_PREFIX + camera] = {
                "dtype": "image",
                "shape": list(frames.shape[1:]),
                "names": ["height", "width", "channels"],
            }
        for key, values in ((STATE, episode.state), ("action", episode.action)):
            names = self._names[key]
            if values is None and not names:
                continue
            array = np.asarray(values)
            if array.dtype.kind != "f" or array.shape != (length, len(names)) or length == 0:
                found = "missing" if values is None else f"{array.dtype} {list(array.shape)}"
                raise self._refusal(
                    f"{key} is {found}; it must be float32 [{length},{len(names)}] (at least one action, a"
                    f" component for each of the names {names})"
                )
            vectors[key] = _float32(array)
            features[key] = {"dtype": "float32", "shape": [len(names)], "names": names}
            bad = np.argwhere(~np.isfinite(vectors[key]))
            if len(bad):
                frame, component = bad[0]
                value = vectors[key][frame, component]
                raise self._refusal(f"{key} is {value} at frame {frame}, component {names[component]!r}")
        for key, dtype in INDEX_FEATURES.items():
            features[key] = {"dtype": dtype, "shape": [1], "names": None}
        if self._features and features != self._features:
            shapes, first = (
                {key: feature["shape"] for key, feature in each.items() if feature["dtype"] == "image"}
                for each in (features, self._features)
            )
            raise self._refusal(f"its images are {shapes}; they must be {first} as in the first episode")
        return features, vectors

    def _refusal(self, reason: str) -> ValueError:
        return ValueError(f"episode {len(self._episodes)} is refused: {reason}.")

    def _write_rows(self, columns: dict[str, NDArray[Any]], pngs: dict[str, list[bytes]]) -> dict[str, int]:
        """Append a row group to the data file, or to a new one when it is full; return the file's indices."""
        num_bytes = sum(values.nbytes for values in columns.values())
        num_bytes += sum(len(png) for column in pngs.values() for png in column)
        schema = _data_schema(self._features)
        is_full = self._file_bytes + num_bytes > self._data_file_size_mb * MIB
        if self._file is None or is_full:
            self._close_file()
            self._file_number, self._file_bytes = self._file_number + 1, 0
        chunk_index, file_index = divmod(self._file_number, FILES_PER_CHUNK)
        place = {"chunk_index": chunk_index, "file_index": file_index}
        if self._file is None:
            path = self._stage / DATA_PATH.format(**place)
            path.parent.mkdir(parents=True, exist_ok=True)
            # No two images are equal: a dictionary would cost time and save nothing.
            self._file = pq.ParquetWriter(path, schema, use_dictionary=False, write_page_checksum=True)
        arrays = []
        for field in schema:
            if field.name in pngs:
                names = [f"frame-{frame:06d}.png" for frame in range(len(pngs[field.name]))]
                cells = [pa.array(pngs[field.name], pa.binary()), pa.array(names, pa.string())]
                arrays.append(pa.StructArray.from_arrays(cells, fields=list(field.type)))
            elif pa.types.is_fixed_size_list(field.type):
                flat = pa.array(columns[field.name].ravel())
                arrays.append(pa.FixedSizeListArray.from_arrays(flat, type=field.type))
            else:
                arrays.append(pa.array(columns[field.name].ravel()))
        self._file.write_table(pa.Table.from_arrays(arrays, schema=schema))
        self._file_bytes += num_bytes
        self._num_bytes += num_bytes
        return place

    def _commit(self) -> None:
        """Write meta/, push all files to the disk, and give the folder its name."""
        if not self._episodes:
            raise ValueError(f"no episode was added, so there is no dataset to write to {self._root}.")
        self._close_file()
        episodes = self._stage / EPISODES_PATH.format(chunk_index=0, file_index=0)
        episodes.parent.mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(self._episodes), episodes, write_page_checksum=True)
        pq.write_table(_tasks_table(self._tasks), self._stage / TASKS_PATH, write_page_checksum=True)
        stats = {key: _image_stats(counts, self._num_sampled) for key, counts in self._histograms.items()}
        stats |= {key: _stats(np.concatenate(values)) for key, values in self._columns.items()}
        _write_json(self._stage / STATS_PATH, stats)
        info = {
            "codebase_version": CODEBASE_VERSION,
            "robot_type": self._robot_type,
            "total_episodes": len(self._episodes),
            "total_frames": self._num_frames,
            "total_tasks": len(self._tasks),
            "chunks_size": FILES_PER_CHUNK,
            "data_files_size_in_mb": self._data_file_size_mb,
            "video_files_size_in_mb": 200,
            "fps": int(self._fps) if self._fps == int(self._fps) else self._fps,  # LeRobot expects an int
            "splits": {"train": f"0:{len(self._episodes)}"},
            "data_path": DATA_PATH,
            "video_path": None,
            "features": self._features,
            "rlvla": self._rlvla,
        }
        _write_json(self._stage / INFO_PATH, info)
        for path in self._stage.rglob("*.*"):
            _fsync(path)  # also where some file systems first say that they are full
        _refuse_existing(self._root)
        self._stage.rename(self._root)

    def _close_file(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            file.close()

    def _discard(self) -> None:
        """Close the writer and remove the stage, unless it has become the dataset."""
        self._is_open = False
        with contextlib.suppress(OSError):  # closing writes a footer, for which a full disk has no room
            self._close_file()
        shutil.rmtree(self._stage, ignore_errors=True)

    def _require_open(self) -> None:
        if not self._is_open:
            raise RuntimeError(
                f"the writer of {self._root} is closed. Add episodes inside `with DatasetWriter(...) as"
                " writer:`, and none after a disk error."
            )

    @contextlib.contextmanager
    def _explained_disk_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._discard()
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            written = f"{len(self._episodes)} episodes ({self._num_bytes / MIB:.1f} MiB)"
            raise OSError(
                error.errno,
                f"no space left on the disk of {self._root} after {written}; they were removed again. Free"
                " some space or choose a folder on another disk, then run the same command",
            ) from error


def _refuse_existing(root: Path) -> None:
    if root.is_dir() and not any(root.iterdir()):
        return
    if root.exists():
        raise FileExistsError(
            f"{root} already exists and is not an empty folder; a dataset is written whole, never added to."
            " Choose another folder, or remove this one."
        )


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=4, ensure_ascii=False, allow_nan=False), encoding="utf-8")


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _float32(values: NDArray[Any]) -> Floats:
    """Cast to float32; what does not fit becomes Inf, which the callers refuse."""
    with np.errstate(over="ignore"):
        return values.astype(np.float32)


def _png(image: Pixels) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def _data_schema(features: dict[str, dict[str, Any]]) -> pa.Schema:
    """The columns of a data file, with the metadata by which Hugging Face `datasets` decodes them."""
    fields: list[Any] = []
    hugging_face: dict[str, dict[str, Any]] = {}
    for key, feature in features.items():
        dtype, size = feature["dtype"], feature["shape"][0]
        if dtype == "image":
            fields.append(pa.field(key, pa.struct([("bytes", pa.binary()), ("path", pa.string())])))
            hugging_face[key] = {"_type": "Image"}
            continue
        value, column = {"dtype": dtype, "_type": "Value"}, pa.type_for_alias(dtype)
        # LeRobot stores a single component as a plain number, not as a list of one.
        fields.append(pa.field(key, column if size == 1 else pa.list_(column, size)))
        hugging_face[key] = value if size == 1 else {"feature": value, "length": size, "_type": "Sequence"}
    return pa.schema(fields, metadata={"huggingface": json.dumps({"info": {"features": hugging_face}})})


def _tasks_table(tasks: dict[str, int]) -> pa.Table:
    """The table whose `to_pandas()` has the instructions as its index."""
    index = TASK_COLUMNS[0]
    columns = [("task_index", "task_index", "int64", "int64"), (None, index, "unicode", "object")]
    keys = ("name", "field_name", "pandas_type", "numpy_type")
    pandas = {
        "index_columns": [index],
        "column_indexes": [],
        "columns": [{**dict(zip(keys, column, strict=True)), "metadata": None} for column in columns],
        "pandas_version": "2.0.0",
    }
    arrays = [pa.array(tasks.values(), pa.int64()), pa.array(tasks, pa.string())]
    table = pa.Table.from_arrays(arrays, names=["task_index", index])
    return table.replace_schema_metadata({"pandas": json.dumps(pandas)})


def _stats(values: NDArray[Any]) -> dict[str, list[Any]]:
    """LeRobot's statistics of a column [n] or [n,D], each a list of D numbers; count is [n]."""
    columns = values.reshape(len(values), -1)
    numbers = columns.astype(np.float64)
    # min and max keep the column's type: LeRobot cannot merge a list of floats with one of integers.
    arrays = {"min": columns.min(0), "max": columns.max(0), "mean": numbers.mean(0), "std": numbers.std(0)}
    arrays |= zip(QUANTILES, np.quantile(numbers, list(QUANTILES.values()), axis=0), strict=True)
    return {**{name: array.tolist() for name, array in arrays.items()}, "count": [len(values)]}


def _histogram(images: Pixels) -> Integers:
    """How many pixels of images [n,h,w,3] have each level: int64 [3,256]."""
    return np.stack([np.bincount(images[..., channel].ravel(), minlength=256) for channel in range(3)])


def _image_stats(histogram: Integers, num_images: int) -> dict[str, list[Any]]:
    """Statistics per channel of pixels scaled to [0,1], each [3][1][1] as LeRobot shapes them."""
    level = np.arange(256) / 255
    weight = histogram / histogram.sum(axis=1, keepdims=True)
    mean = weight @ level
    arrays = {
        "min": level[(histogram > 0).argmax(axis=1)],
        "max": level[255 - (histogram[:, ::-1] > 0).argmax(axis=1)],
        "mean": mean,
        "std": np.sqrt((weight * (level - mean[:, None]) ** 2).sum(axis=1)),
    }
    for name, quantile in QUANTILES.items():
        arrays[name] = level[(weight.cumsum(axis=1) >= quantile).argmax(axis=1)]
    stats = {name: array.reshape(3, 1, 1).tolist() for name, array in arrays.items()}
    return {**stats, "count": [num_images]}


def load_dataset(root: str | Path) -> Demonstrations:
    """Read a LeRobotDataset v3.0 folder, ours or LeRobot's, and check it against its own metadata.

    Reads the RGB images ("observation.images.<camera>", or "observation.image" as camera "image"),
    "observation.state" if there is one, "action" and the instruction; other columns are left alone.
    Everything is decoded into memory, N*h*w*3 bytes for each camera.

    Args:
        root: the folder that holds meta/ and data/.

    Raises:
        ValueError: not such a dataset, another version, images in videos, or contents that are damaged,
            incomplete, inconsistent or not finite. The message names the file, column or episode.
    """
    root = Path(root).expanduser()
    info = _read_info(root)
    features = info["features"]
    image_keys = _image_keys(root, features)
    vector_keys = ["action", STATE] if STATE in features else ["action"]
    sizes = {key: _vector_size(root, features, key) for key in vector_keys}
    files, lengths = _read_episodes(root, info)

    index_names = ("episode_index", "frame_index", "task_index")
    tables = {path: _read_parquet(path, [*sizes, *index_names]) for path in files}
    num_frames = sum(len(table) for table in tables.values())
    if num_frames != info["total_frames"]:
        raise ValueError(
            f"the {len(files)} data files of {root} hold {num_frames} frames, but {INFO_PATH} says"
            f" total_frames = {info['total_frames']}. {_CURE}"
        )
    index = {
        name: np.concatenate([_integers(table, name, path) for path, table in tables.items()])
        for name in index_names
    }
    order = np.lexsort((index["frame_index"], index["episode_index"]))
    episode_index, frame_index, task_index = (index[name][order] for name in index_names)
    episode_end = np.cumsum(lengths)
    _check_order(root, episode_index, frame_index, lengths)

    vectors = {}
    for key, size in sizes.items():
        values = [_vectors(table, key, size, path) for path, table in tables.items()]
        vectors[key] = np.concatenate(values)[order]
        bad = np.flatnonzero(~np.isfinite(vectors[key]).all(axis=1))
        if len(bad):
            n = bad[0]
            raise ValueError(
                f"{key} of {root} is {vectors[key][n].tolist()} at episode {episode_index[n]}, frame"
                f" {frame_index[n]} ({len(bad)} such frames); every value must be finite. Remove the episode,"
                " or collect the dataset again."
            )
    tasks, task_ids = _read_tasks(root)
    unlisted = np.flatnonzero(~np.isin(task_index, task_ids))
    if len(unlisted):
        n = unlisted[0]
        raise ValueError(
            f"episode {episode_index[n]} of {root} has task_index {task_index[n]}, which {TASKS_PATH} does"
            f" not list ({len(tasks)} tasks). {_CURE}"
        )
    rank = np.empty_like(order)
    rank[order] = np.arange(num_frames)
    images = {}
    for camera, key in image_keys.items():
        height, width = _image_size(root, features, key)
        images[camera] = np.empty((num_frames, height, width, 3), dtype=np.uint8)
        for row, encoded in enumerate(_encoded_images(files, key)):
            n = rank[row]
            where = f"{key} of {root}, episode {episode_index[n]}, frame {frame_index[n]},"
            images[camera][n] = _decoded(encoded, height, width, where)
    return Demonstrations(
        images=images,
        state=vectors.get(STATE),
        action=vectors["action"],
        tasks=tasks,
        task_index=np.searchsorted(task_ids, task_index),
        episode_start=episode_end - lengths,
        episode_end=episode_end,
        fps=float(info["fps"]),
        robot_type=info.get("robot_type"),
        action_names=_component_names(features, "action"),
        state_names=_component_names(features, STATE) if STATE in features else (),
        env_spec=info["rlvla"].get("env_spec"),
        suite=info["rlvla"].get("suite"),
        task=info["rlvla"].get("task"),
    )


def _read_info(root: Path) -> dict[str, Any]:
    """meta/info.json, with the keys that are needed checked; "rlvla" is {} where others wrote it."""
    path = root / INFO_PATH
    if not path.is_file():
        raise ValueError(
            f"{root} is not a LeRobot dataset: {path} does not exist. Give the folder that holds meta/ and"
            " data/ (download a dataset from the Hub first), or make one with `rlvla collect`."
        )
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}). {_CURE}") from error
    if not isinstance(info, dict):
        raise ValueError(f"{path} holds a {type(info).__name__}; it must be a JSON object. {_CURE}")
    version = str(info.get("codebase_version"))
    if not version.startswith("v3."):
        advice = f"This version of rlvla reads {CODEBASE_VERSION} only."
        if version.startswith(("v1.", "v2.")):
            advice = "Convert it with LeRobot's own v2.1 to v3.0 converter, convert_dataset_v21_to_v30."
        raise ValueError(f"{path}: codebase_version is {version}; it must be {CODEBASE_VERSION}. {advice}")
    info.setdefault("rlvla", {})
    kinds: dict[str, tuple[type, ...]] = {
        "features": (dict,),
        "total_frames": (int,),
        "total_episodes": (int,),
        "fps": (int, float),
        "data_path": (str,),
        "rlvla": (dict,),
    }
    for key, kind in kinds.items():
        if not isinstance(info.get(key), kind):
            names = " or ".join(each.__name__ for each in kind)
            raise ValueError(f"{path}: {key} is {info.get(key)!r}; it must be of type {names}. {_CURE}")
    for key, feature in info["features"].items():
        if not (isinstance(feature, dict) and "dtype" in feature and isinstance(feature.get("shape"), list)):
            raise ValueError(f"{path}: feature {key!r} is {feature!r}; it must give dtype and shape. {_CURE}")
    if info["total_frames"] < 1 or info["total_episodes"] < 1:
        raise ValueError(
            f"{root} is empty: {INFO_PATH} says total_frames = {info['total_frames']} and total_episodes ="
            f" {info['total_episodes']}. Collect at least one episode with `rlvla collect`."
        )
    return info


def _image_keys(root: Path, features: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Camera name -> feature key, of RGB images; depth maps and masks (one channel) are no cameras."""
    videos = [key for key, feature in features.items() if feature["dtype"] == "video"]
    if videos:
        raise ValueError(
            f"{root} stores {', '.join(videos)} as video; images must be embedded in parquet (dtype 'image'),"
            " the only form this version reads. Record with LeRobot's use_videos=False, or copy the frames"
            " into a dataset made with LeRobotDataset.create(..., use_videos=False)."
        )
    keys: dict[str, str] = {}
    for key, feature in features.items():
        if feature["dtype"] == "image" and key.startswith("observation.") and 3 in feature["shape"]:
            camera = key.removeprefix(IMAGE_PREFIX).removeprefix("observation.")
            if camera in keys:
                raise ValueError(f"{root}: {keys[camera]} and {key} are both camera {camera!r}. Rename one.")
            keys[camera] = key
    return keys


def _image_size(root: Path, features: dict[str, dict[str, Any]], key: str) -> tuple[int, int]:
    """(h, w) of a feature whose shape is listed as [h,w,3] or, by older LeRobot code, as [3,h,w]."""
    shape = features[key]["shape"]
    if len(shape) != 3 or 3 not in (shape[0], shape[2]):
        raise ValueError(f"{root / INFO_PATH}: the shape of {key} is {shape}; it must be [h,w,3] or [3,h,w].")
    height, width = shape[:2] if shape[2] == 3 else shape[1:]
    return height, width


def _vector_size(root: Path, features: dict[str, dict[str, Any]], key: str) -> int:
    """The number of components of a feature."""
    if key not in features:
        raise ValueError(f"{root / INFO_PATH} has no feature {key!r}; it has {', '.join(features)}.")
    shape = features[key]["shape"]
    if len(shape) != 1 or shape[0] < 1:
        raise ValueError(f"{root / INFO_PATH}: the shape of {key} is {shape}; it must be [components].")
    return int(shape[0])


def _component_names(features: dict[str, dict[str, Any]], key: str) -> tuple[str, ...]:
    """One name a component; `action_0`, ... where the dataset has none (LeRobot's names are free-form)."""
    names, size = features[key].get("names"), features[key]["shape"][0]
    if isinstance(names, dict) and len(names) == 1:  # {"motors": [...]}
        (names,) = names.values()
    if isinstance(names, list) and len(names) == size:
        return tuple(str(name) for name in names)
    return tuple(f"{key.rpartition('.')[2]}_{component}" for component in range(size))


@contextlib.contextmanager
def _opened_parquet(path: Path, columns: Sequence[str]) -> Iterator[Any]:
    """A pq.ParquetFile that has the columns; damage found while it is open becomes a ValueError."""
    if not path.is_file():
        raise ValueError(f"{path} is missing. {_CURE}")
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            present = file.schema_arrow.names
            missing = [column for column in columns if column not in present]
            if missing:
                raise ValueError(f"{path} has no column {missing[0]!r}; it has {', '.join(present)}. {_CURE}")
            yield file
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path} cannot be read; it is truncated or corrupt ({reason}). {_CURE}") from error


def _read_parquet(path: Path, columns: Sequence[str]) -> Any:
    """The columns of a parquet file as a pa.Table."""
    with _opened_parquet(path, columns) as file:
        return file.read(columns=list(columns))


def _read_episodes(root: Path, info: dict[str, Any]) -> tuple[list[Path], Integers]:
    """The data files in order, and the number of frames of each episode, int64 [E], from meta/episodes."""
    paths = sorted((root / "meta/episodes").glob("*/*.parquet"))
    if not paths:
        raise ValueError(f"{root / 'meta/episodes'} holds no parquet file. {_CURE}")
    names = ("episode_index", "length", "data/chunk_index", "data/file_index")
    tables = {path: _read_parquet(path, names) for path in paths}
    rows = np.concatenate(
        [np.stack([_integers(table, name, path) for name in names], axis=1) for path, table in tables.items()]
    )
    rows = rows[np.argsort(rows[:, 0])]
    if not np.array_equal(rows[:, 0], np.arange(info["total_episodes"])):
        raise ValueError(
            f"meta/episodes of {root} lists {len(rows)} episodes (episode_index {rows[0, 0]} to"
            f" {rows[-1, 0]}); {INFO_PATH} says total_episodes = {info['total_episodes']}, so each of 0 to"
            f" {info['total_episodes'] - 1} must be there once. {_CURE}"
        )
    try:
        files = [
            root / info["data_path"].format(chunk_index=int(chunk), file_index=int(file))
            for chunk, file in np.unique(rows[:, 2:], axis=0)
        ]
    except (KeyError, IndexError, ValueError) as error:
        raise ValueError(
            f"{root / INFO_PATH}: data_path is {info['data_path']!r}; it must look like {DATA_PATH!r}."
        ) from error
    return files, rows[:, 1]


def _check_order(root: Path, episode_index: Integers, frame_index: Integers, lengths: Integers) -> None:
    """Refuse sorted rows that are not frames 0 to length - 1 of each episode that meta/episodes lists."""
    episodes, counts = np.unique(episode_index, return_counts=True)
    found = dict(zip(episodes.tolist(), counts.tolist(), strict=True))
    listed = dict(enumerate(lengths.tolist()))
    for episode in sorted(found.keys() | listed.keys()):
        if found.get(episode) != listed.get(episode):
            raise ValueError(
                f"episode {episode} of {root} has {found.get(episode, 0)} frames in the data files, but"
                f" {listed.get(episode, 0)} in meta/episodes. {_CURE}"
            )
    expected = np.arange(len(frame_index)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    wrong = np.flatnonzero(frame_index != expected)
    if len(wrong):
        n = wrong[0]
        raise ValueError(
            f"episode {episode_index[n]} of {root} has frame_index {frame_index[n]} where {expected[n]} is"
            f" due: a frame is missing or doubled. {_CURE}"
        )


def _integers(table: Any, name: str, path: Path) -> Integers:
    """A column as int64 [n]."""
    column = table.column(name)
    if not pa.types.is_integer(column.type) or column.null_count:
        raise ValueError(
            f"column {name!r} of {path} is {column.type} with {column.null_count} empty cells; it must be"
            f" int64 with none. {_CURE}"
        )
    return np.asarray(column.to_numpy(), dtype=np.int64)


_LIST_KINDS = (pa.types.is_list, pa.types.is_fixed_size_list, pa.types.is_large_list)


def _vectors(table: Any, name: str, size: int, path: Path) -> Floats:
    """A column of lists, or of plain numbers if size is 1, as float32 [n,size]; an empty number is NaN."""
    values = table.column(name).combine_chunks()
    lengths = [1]
    if any(is_kind(values.type) for is_kind in _LIST_KINDS):
        lengths = pc.unique(pc.list_value_length(values)).to_pylist()
        values = values.flatten()
    is_number = pa.types.is_floating(values.type) or pa.types.is_integer(values.type)
    if lengths != [size] or not is_number:
        raise ValueError(
            f"column {name!r} of {path} holds {' or '.join(map(str, lengths))} {values.type} a frame;"
            f" {INFO_PATH} says {size} numbers. {_CURE}"
        )
    return _float32(values.to_numpy(zero_copy_only=False)).reshape(-1, size)


def _read_tasks(root: Path) -> tuple[tuple[str, ...], Integers]:
    """The instructions and their task_index, int64, both in the order of task_index."""
    path = root / TASKS_PATH
    with _opened_parquet(path, ["task_index"]) as file:
        table = file.read()
    name = next((name for name in TASK_COLUMNS if name in table.column_names), None)
    if name is None or table.column(name).null_count:
        raise ValueError(f"{path} must hold the instructions in its index or a column 'task'. {_CURE}")
    ids = _integers(table, "task_index", path)
    order = np.argsort(ids)
    tasks = table.column(name).to_pylist()
    return tuple(str(tasks[row]) for row in order), ids[order]


def _encoded_images(files: Sequence[Path], key: str) -> Iterator[bytes | None]:
    """The encoded image of every row, in the order of the files; None where a cell is empty."""
    for path in files:
        with _opened_parquet(path, [key]) as file:
            kind = file.schema_arrow.field(key).type
            if not pa.types.is_struct(kind) or kind.get_field_index("bytes") < 0:
                raise ValueError(
                    f"column {key!r} of {path} is {kind}; it must be struct<bytes, path>. {_CURE}"
                )
            for batch in file.iter_batches(batch_size=256, columns=[key]):
                yield from batch.column(key).field("bytes").to_pylist()


def _decoded(encoded: bytes | None, height: int, width: int, where: str) -> Pixels:
    """An encoded RGB image as uint8 [h,w,3]. `where` opens the error message."""
    if not encoded:
        raise ValueError(f"{where} has no bytes: the image must be embedded in the parquet file. {_CURE}")
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            mode, size = image.mode, image.size
            pixels = np.asarray(image.convert("RGB")) if size == (width, height) else None
    except (OSError, SyntaxError, ValueError) as error:  # PIL's words for a damaged file
        raise ValueError(f"{where} is not a readable image ({error}). {_CURE}") from error
    if pixels is None or mode not in ("RGB", "RGBA", "L", "P"):
        raise ValueError(
            f"{where} is a {mode} image, h = {size[1]}, w = {size[0]}; {INFO_PATH} says RGB, h = {height},"
            f" w = {width}. {_CURE}"
        )
    return pixels
