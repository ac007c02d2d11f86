"""Write demonstrations in the LeRobotDataset v3.0 layout, all of it or nothing."""

import contextlib
import errno
import io
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from rlvla.dataset import (
    CODEBASE_VERSION,
    DATA_PATH,
    EPISODES_PATH,
    FILES_PER_CHUNK,
    IMAGE_PREFIX,
    IMAGES_PER_EPISODE_IN_STATS,
    INDEX_FEATURES,
    INFO_PATH,
    MIB,
    QUANTILES,
    STATE,
    STATS_PATH,
    TASK_COLUMNS,
    TASKS_PATH,
    Episode,
    Floats,
    Integers,
    Pixels,
    as_float32,
)


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
            vectors[key] = as_float32(array)
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
