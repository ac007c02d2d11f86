"""Read any dataset in the LeRobotDataset v3.0 layout, and refuse a damaged one in one sentence."""

import contextlib
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from rlvla.dataset import (
    CODEBASE_VERSION,
    CURE,
    DATA_PATH,
    IMAGE_PREFIX,
    INFO_PATH,
    STATE,
    TASK_COLUMNS,
    TASKS_PATH,
    Demonstrations,
    Floats,
    Integers,
    Pixels,
    as_float32,
)


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
            f" total_frames = {info['total_frames']}. {CURE}"
        )
    index = {
        name: np.concatenate([_integers(table, name, path) for path, table in tables.items()]) for name in index_names
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
            f" not list ({len(tasks)} tasks). {CURE}"
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
        raise ValueError(f"{path} is not valid JSON ({error}). {CURE}") from error
    if not isinstance(info, dict):
        raise ValueError(f"{path} holds a {type(info).__name__}; it must be a JSON object. {CURE}")
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
            raise ValueError(f"{path}: {key} is {info.get(key)!r}; it must be of type {names}. {CURE}")
    for key, feature in info["features"].items():
        if not (isinstance(feature, dict) and "dtype" in feature and isinstance(feature.get("shape"), list)):
            raise ValueError(f"{path}: feature {key!r} is {feature!r}; it must give dtype and shape. {CURE}")
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
        raise ValueError(f"{path} is missing. {CURE}")
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            present = file.schema_arrow.names
            missing = [column for column in columns if column not in present]
            if missing:
                raise ValueError(f"{path} has no column {missing[0]!r}; it has {', '.join(present)}. {CURE}")
            yield file
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path} cannot be read; it is truncated or corrupt ({reason}). {CURE}") from error


def _read_parquet(path: Path, columns: Sequence[str]) -> Any:
    """The columns of a parquet file as a pa.Table."""
    with _opened_parquet(path, columns) as file:
        return file.read(columns=list(columns))


def _read_episodes(root: Path, info: dict[str, Any]) -> tuple[list[Path], Integers]:
    """The data files in order, and the number of frames of each episode, int64 [E], from meta/episodes."""
    paths = sorted((root / "meta/episodes").glob("*/*.parquet"))
    if not paths:
        raise ValueError(f"{root / 'meta/episodes'} holds no parquet file. {CURE}")
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
            f" {info['total_episodes'] - 1} must be there once. {CURE}"
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
                f" {listed.get(episode, 0)} in meta/episodes. {CURE}"
            )
    expected = np.arange(len(frame_index)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    wrong = np.flatnonzero(frame_index != expected)
    if len(wrong):
        n = wrong[0]
        raise ValueError(
            f"episode {episode_index[n]} of {root} has frame_index {frame_index[n]} where {expected[n]} is"
            f" due: a frame is missing or doubled. {CURE}"
        )


def _integers(table: Any, name: str, path: Path) -> Integers:
    """A column as int64 [n]."""
    column = table.column(name)
    if not pa.types.is_integer(column.type) or column.null_count:
        raise ValueError(
            f"column {name!r} of {path} is {column.type} with {column.null_count} empty cells; it must be"
            f" int64 with none. {CURE}"
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
            f" {INFO_PATH} says {size} numbers. {CURE}"
        )
    return as_float32(values.to_numpy(zero_copy_only=False)).reshape(-1, size)


def _read_tasks(root: Path) -> tuple[tuple[str, ...], Integers]:
    """The instructions and their task_index, int64, both in the order of task_index."""
    path = root / TASKS_PATH
    with _opened_parquet(path, ["task_index"]) as file:
        table = file.read()
    name = next((name for name in TASK_COLUMNS if name in table.column_names), None)
    if name is None or table.column(name).null_count:
        raise ValueError(f"{path} must hold the instructions in its index or a column 'task'. {CURE}")
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
                raise ValueError(f"column {key!r} of {path} is {kind}; it must be struct<bytes, path>. {CURE}")
            for batch in file.iter_batches(batch_size=256, columns=[key]):
                yield from batch.column(key).field("bytes").to_pylist()


def _decoded(encoded: bytes | None, height: int, width: int, where: str) -> Pixels:
    """An encoded RGB image as uint8 [h,w,3]. `where` opens the error message."""
    if not encoded:
        raise ValueError(f"{where} has no bytes: the image must be embedded in the parquet file. {CURE}")
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            mode, size = image.mode, image.size
            pixels = np.asarray(image.convert("RGB")) if size == (width, height) else None
    except (OSError, SyntaxError, ValueError) as error:  # PIL's words for a damaged file
        raise ValueError(f"{where} is not a readable image ({error}). {CURE}") from error
    if pixels is None or mode not in ("RGB", "RGBA", "L", "P"):
        raise ValueError(
            f"{where} is a {mode} image, h = {size[1]}, w = {size[0]}; {INFO_PATH} says RGB, h = {height},"
            f" w = {width}. {CURE}"
        )
    return pixels
