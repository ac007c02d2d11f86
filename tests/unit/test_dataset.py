"""What a demonstrations folder keeps, what it refuses, and that it appears whole or not at all."""

import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import rlvla.dataset_writer
from rlvla.dataset import Demonstrations, Episode, action_chunks
from rlvla.dataset_reader import load_dataset
from rlvla.dataset_writer import DatasetWriter

ACTION_NAMES = ["x", "y", "gripper"]
STATE_NAMES = ["q0", "q1"]
RLVLA = {"suite": "maniskill", "task": "PushCube-v1", "env_spec": {"control_hz": 20, "range": [-1.0, 1.0]}}
DATA = "data/chunk-000/file-000.parquet"
EPISODES = "meta/episodes/chunk-000/file-000.parquet"


def make_episode(length: int, seed: int = 0, **changes: Any) -> Episode:
    rng = np.random.default_rng(seed)
    fields = {
        "images": {
            "front": rng.integers(0, 256, (length, 6, 8, 3), dtype=np.uint8),
            "wrist": rng.integers(0, 256, (length, 4, 4, 3), dtype=np.uint8),
        },
        "state": rng.normal(size=(length, 2)).astype(np.float32),
        "action": rng.normal(size=(length, 3)).astype(np.float32),
        "instruction": "push the cube",
    }
    return Episode(**{**fields, **changes})


def make_writer(root: Path, **changes: Any) -> DatasetWriter:
    arguments = {
        "fps": 20,
        "robot_type": "panda",
        "action_names": ACTION_NAMES,
        "state_names": STATE_NAMES,
        "rlvla": RLVLA,
    }
    return DatasetWriter(root, **{**arguments, **changes})


def write(root: Path, episodes: list[Episode], **changes: Any) -> Path:
    with make_writer(root, **changes) as writer:
        for episode in episodes:
            writer.add(episode)
    return root


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three episodes of 3, 1 and 4 frames under two instructions."""
    episodes = [make_episode(3, 0), make_episode(1, 1, instruction="stack it"), make_episode(4, 2)]
    return write(tmp_path_factory.mktemp("written") / "demos", episodes)


@pytest.fixture
def root(written: Path, tmp_path: Path) -> Path:
    """A copy of `written` to damage."""
    return shutil.copytree(written, tmp_path / "demos")


def edit_info(root: Path, **changes: Any) -> None:
    path = root / "meta/info.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_feature(root: Path, key: str, **changes: Any) -> None:
    features = json.loads((root / "meta/info.json").read_text())["features"]
    edit_info(root, features={**features, key: {**features.get(key, {}), **changes}})


def edit_table(path: Path, edit: Callable[[pa.Table], pa.Table]) -> None:
    pq.write_table(edit(pq.read_table(path)), path)


def edit_column(path: Path, name: str, edit: Callable[[list[Any]], list[Any]]) -> None:
    def replace(table: pa.Table) -> pa.Table:
        values = edit(table.column(name).to_pylist())
        return table.set_column(table.column_names.index(name), name, pa.array(values))

    edit_table(path, replace)


def refusal(root: Path) -> str:
    """The error of `load_dataset`, which is one line."""
    with pytest.raises(ValueError, match=r"\A.+\Z") as caught:
        load_dataset(root)
    return str(caught.value)


# Writing and reading back


def test_what_is_written_is_read_back_exactly(tmp_path: Path) -> None:
    episodes = [make_episode(3, 0), make_episode(1, 1, instruction="stack it"), make_episode(4, 2)]
    demonstrations = load_dataset(write(tmp_path / "a" / "demos", episodes))

    for camera in ("front", "wrist"):
        expected = np.concatenate([episode.images[camera] for episode in episodes])
        np.testing.assert_array_equal(demonstrations.images[camera], expected)
        assert demonstrations.images[camera].dtype == np.uint8
    assert demonstrations.state is not None
    np.testing.assert_array_equal(demonstrations.state, np.concatenate([e.state for e in episodes]))
    np.testing.assert_array_equal(demonstrations.action, np.concatenate([e.action for e in episodes]))
    assert demonstrations.state.dtype == demonstrations.action.dtype == np.float32
    assert demonstrations.tasks == ("push the cube", "stack it")
    assert demonstrations.task_index.tolist() == [0, 0, 0, 1, 0, 0, 0, 0]
    assert demonstrations.instruction(3) == "stack it"
    assert demonstrations.episode_start.tolist() == [0, 3, 4]
    assert demonstrations.episode_end.tolist() == [3, 4, 8]
    assert (demonstrations.num_frames, demonstrations.num_episodes) == (8, 3)
    assert demonstrations.episode_index.tolist() == [0, 0, 0, 1, 2, 2, 2, 2]
    assert demonstrations.frames_left.tolist() == [3, 2, 1, 1, 4, 3, 2, 1]
    assert (demonstrations.fps, demonstrations.robot_type) == (20.0, "panda")
    assert (demonstrations.action_names, demonstrations.state_names) == (("x", "y", "gripper"), ("q0", "q1"))
    assert demonstrations.env_spec == RLVLA["env_spec"]
    assert (demonstrations.suite, demonstrations.task) == ("maniskill", "PushCube-v1")


def test_state_is_optional_and_a_single_component_keeps_its_shape(tmp_path: Path) -> None:
    episode = make_episode(2, state=None, action=np.array([[0.5], [1.5]], np.float32))
    demonstrations = load_dataset(write(tmp_path / "demos", [episode], action_names=["v"], state_names=None))
    assert demonstrations.state is None
    assert demonstrations.state_names == ()
    np.testing.assert_array_equal(demonstrations.action, episode.action)


def test_views_such_as_flipped_images_are_stored_as_they_look(tmp_path: Path) -> None:
    flipped = make_episode(2).images["front"][:, ::-1, ::-1]
    demonstrations = load_dataset(write(tmp_path / "demos", [make_episode(2, images={"front": flipped})]))
    np.testing.assert_array_equal(demonstrations.images["front"], flipped)


def test_cameras_may_come_in_any_order(tmp_path: Path) -> None:
    first = make_episode(2)
    second = make_episode(2, images={camera: first.images[camera] for camera in ("wrist", "front")})
    demonstrations = load_dataset(write(tmp_path / "demos", [first, second]))
    for frames in demonstrations.images.values():
        np.testing.assert_array_equal(frames[:2], frames[2:])


def test_episodes_roll_over_to_new_files_and_chunks_and_never_straddle_two(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rlvla.dataset_writer, "FILES_PER_CHUNK", 2)
    monkeypatch.setattr(rlvla.dataset_writer, "MIB", 1500)  # two frames of about 500 bytes fit
    episodes = [make_episode(length, seed) for seed, length in enumerate((1, 1, 5, 2, 2, 1, 1))]
    root = write(tmp_path / "demos", episodes, data_file_size_mb=1)

    files = sorted(str(path.relative_to(root)) for path in root.glob("data/*/*"))
    assert files[:3] == [
        "data/chunk-000/file-000.parquet",
        "data/chunk-000/file-001.parquet",
        "data/chunk-001/file-000.parquet",
    ]
    assert len(files) < len(episodes)  # small episodes share a file
    in_files = [set(pq.read_table(root / file)["episode_index"].to_pylist()) for file in files]
    assert sum(map(len, in_files)) == len(episodes)
    expected = np.concatenate([episode.images["wrist"] for episode in episodes])
    np.testing.assert_array_equal(load_dataset(root).images["wrist"], expected)


def test_info_describes_the_lerobot_v3_layout(root: Path) -> None:
    info = json.loads((root / "meta/info.json").read_text())
    features = info.pop("features")
    assert info == {
        "codebase_version": "v3.0",
        "robot_type": "panda",
        "total_episodes": 3,
        "total_frames": 8,
        "total_tasks": 2,
        "chunks_size": 1000,
        "data_files_size_in_mb": 100,
        "video_files_size_in_mb": 200,
        "fps": 20,
        "splits": {"train": "0:3"},
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "video_path": None,
        "rlvla": RLVLA,
    }
    assert features["observation.images.front"] == {
        "dtype": "image",
        "shape": [6, 8, 3],
        "names": ["height", "width", "channels"],
    }
    assert features["action"] == {"dtype": "float32", "shape": [3], "names": ACTION_NAMES}
    assert features["observation.state"] == {"dtype": "float32", "shape": [2], "names": STATE_NAMES}
    assert features["timestamp"] == {"dtype": "float32", "shape": [1], "names": None}
    assert features["index"] == {"dtype": "int64", "shape": [1], "names": None}


def test_data_files_tell_hugging_face_how_to_decode_them(root: Path) -> None:
    table = pq.read_table(root / DATA)
    hugging_face = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
    assert hugging_face["observation.images.front"] == {"_type": "Image"}
    value = {"dtype": "float32", "_type": "Value"}
    assert hugging_face["action"] == {"feature": value, "length": 3, "_type": "Sequence"}
    assert hugging_face["episode_index"] == {"dtype": "int64", "_type": "Value"}
    assert list(hugging_face) == table.column_names
    assert table.schema.field("action").type == pa.list_(pa.float32(), 3)
    cell = table["observation.images.front"][0].as_py()
    assert cell["path"] == "frame-000000.png"
    assert Image.open(io.BytesIO(cell["bytes"])).format == "PNG"
    np.testing.assert_allclose(table["timestamp"].to_pylist()[:3], [0, 0.05, 0.1], rtol=1e-6)
    assert table["frame_index"].to_pylist() == [0, 1, 2, 0, 0, 1, 2, 3]
    assert table["index"].to_pylist() == list(range(8))


def test_pandas_finds_the_instructions_in_the_index_of_the_tasks(root: Path) -> None:
    pandas = pytest.importorskip("pandas")
    tasks = pandas.read_parquet(root / "meta/tasks.parquet")
    assert tasks.index.tolist() == ["push the cube", "stack it"]
    assert tasks.columns.tolist() == ["task_index"]
    assert tasks.loc["stack it"].task_index == 1


def test_tasks_that_pandas_wrote_are_read(root: Path) -> None:
    pandas = pytest.importorskip("pandas")
    for name in (None, "task"):
        frame = pandas.DataFrame({"task_index": [1, 0]}, index=pandas.Index(["stack", "push"], name=name))
        frame.to_parquet(root / "meta/tasks.parquet")
        assert load_dataset(root).tasks == ("push", "stack")


def test_episode_rows_say_where_the_frames_are(root: Path) -> None:
    rows = pq.read_table(root / EPISODES).to_pylist()
    assert [row["length"] for row in rows] == [3, 1, 4]
    assert [row["tasks"] for row in rows] == [["push the cube"], ["stack it"], ["push the cube"]]
    assert [(row["dataset_from_index"], row["dataset_to_index"]) for row in rows] == [(0, 3), (3, 4), (4, 8)]
    places = ("data/chunk_index", "data/file_index", "meta/episodes/chunk_index", "meta/episodes/file_index")
    assert all(row[place] == 0 for row in rows for place in places)
    np.testing.assert_array_equal(rows[1]["stats/action/mean"], make_episode(1, 1).action[0])
    assert rows[2]["stats/observation.state/count"] == [4]


def test_statistics_equal_numpys_over_the_whole_dataset(root: Path) -> None:
    stats = json.loads((root / "meta/stats.json").read_text())
    demonstrations = load_dataset(root)
    action = demonstrations.action.astype(np.float64)
    for name in ("min", "max", "mean", "std"):
        np.testing.assert_allclose(stats["action"][name], getattr(action, name)(axis=0))
    for name, quantile in (("q01", 0.01), ("q10", 0.1), ("q50", 0.5), ("q90", 0.9), ("q99", 0.99)):
        np.testing.assert_allclose(stats["action"][name], np.quantile(action, quantile, axis=0))
    assert stats["action"]["count"] == [8]
    assert (stats["index"]["min"], stats["index"]["max"]) == ([0], [7])

    pixels = demonstrations.images["front"] / 255  # every frame is in the sample: each episode is short
    for name in ("min", "max", "mean", "std"):
        expected = getattr(pixels, name)(axis=(0, 1, 2)).reshape(3, 1, 1)
        np.testing.assert_allclose(stats["observation.images.front"][name], expected)
    assert stats["observation.images.front"]["count"] == [8]


# Whole or not at all


def test_an_existing_dataset_is_never_overwritten(root: Path) -> None:
    before = (root / DATA).read_bytes()
    with pytest.raises(FileExistsError, match=r"already exists and is not an empty folder.*remove this one"):
        make_writer(root)
    assert (root / DATA).read_bytes() == before


def test_an_empty_folder_is_a_valid_target(tmp_path: Path) -> None:
    (tmp_path / "demos").mkdir()
    assert load_dataset(write(tmp_path / "demos", [make_episode(1)])).num_frames == 1


def test_an_exception_leaves_nothing_behind(tmp_path: Path) -> None:
    def collect() -> None:
        with make_writer(tmp_path / "demos") as writer:
            writer.add(make_episode(2))
            assert list(tmp_path.iterdir()) == [tmp_path / f".demos.partial-{os.getpid()}"]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect()
    assert list(tmp_path.iterdir()) == []


def test_a_killed_process_leaves_nothing_under_the_final_name(tmp_path: Path) -> None:
    script = f"""
import os, signal, sys
sys.path[:0] = {[str(Path(rlvla.dataset_writer.__file__).parents[1]), str(Path(__file__).parent)]!r}
from pathlib import Path
from test_dataset import make_episode, make_writer
with make_writer(Path({str(tmp_path)!r}) / "demos") as writer:
    writer.add(make_episode(2))
    os.kill(os.getpid(), signal.SIGKILL)
"""
    finished = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True)
    assert finished.returncode == -signal.SIGKILL, finished.stderr.decode()
    assert not (tmp_path / "demos").exists()
    assert [path.name.startswith(".demos.partial-") for path in tmp_path.iterdir()] == [True]
    assert load_dataset(write(tmp_path / "demos", [make_episode(2)])).num_frames == 2


def fail_with_full_disk(*args: Any, **kwargs: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("function", ["pq.ParquetWriter.write_table", "_write_json", "_fsync"])
def test_a_full_disk_is_explained_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    monkeypatch.setattr(f"rlvla.dataset_writer.{function}", fail_with_full_disk)
    with pytest.raises(OSError, match=r"no space left on the disk of .*demos.*another disk") as caught:
        write(tmp_path / "demos", [make_episode(2)])
    assert caught.value.errno == errno.ENOSPC
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_writer_is_of_no_use_after_a_disk_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def collect() -> None:
        with make_writer(tmp_path / "demos") as writer:
            with monkeypatch.context() as patch:
                patch.setattr("rlvla.dataset_writer.pq.ParquetWriter.write_table", fail_with_full_disk)
                with pytest.raises(OSError, match="no space left"):
                    writer.add(make_episode(2))
            writer.add(make_episode(2))

    with pytest.raises(RuntimeError, match="none after a disk error"):
        collect()
    assert list(tmp_path.iterdir()) == []


def test_a_writer_is_used_in_a_with_block(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="inside `with DatasetWriter"):
        make_writer(tmp_path / "demos").add(make_episode(1))


def test_no_episode_is_no_dataset(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no episode was added"):
        write(tmp_path / "demos", [])
    assert list(tmp_path.iterdir()) == []


# Episodes that are refused


def with_value(values: np.ndarray[Any, Any], value: float) -> np.ndarray[Any, Any]:
    values = values.copy()
    values[1, 1] = value
    return values


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"action": with_value(make_episode(3).action, np.nan)}, "action is nan at frame 1, component 'y'"),
        ({"state": with_value(make_episode(3).state, np.inf)}, "observation.state is inf at frame 1"),  # type: ignore[arg-type]
        ({"action": with_value(np.zeros((3, 3)), 1e300)}, "action is inf at frame 1"),
        ({"action": np.zeros((3, 2), np.float32)}, r"action is float32 \[3, 2\]; it must be float32 \[3,3\]"),
        ({"action": np.zeros((3, 3), np.int64)}, r"action is int64 \[3, 3\]"),
        ({"state": np.zeros((2, 2), np.float32)}, r"observation.state is float32 \[2, 2\]"),
        ({"state": None}, "observation.state is missing"),
        ({"images": {"front": np.zeros((3, 6, 8, 3), np.float32)}}, "'front' are float32"),
        ({"images": {"front": np.zeros((2, 6, 8, 3), np.uint8)}}, r"\[2, 6, 8, 3\].* L = 3"),
        ({"images": {"front": np.zeros((3, 3, 6, 8), np.uint8)}}, r"\[L,h,w,3\]"),
        (
            {"images": {"front": make_episode(3).images["front"]}},
            r"images are .*must be .*wrist.*first episode",
        ),
        ({"images": {"a/b": make_episode(3).images["front"]}}, "named 'a/b'"),
        ({"instruction": " "}, "instruction is ' '"),
    ],
)
def test_a_bad_episode_is_refused_by_number_and_column(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with make_writer(tmp_path / "demos") as writer:
        writer.add(make_episode(3))
        with pytest.raises(ValueError, match=f"^episode 1 is refused: .*{message}"):
            writer.add(make_episode(3, **changes))
        writer.add(make_episode(2))
    assert load_dataset(tmp_path / "demos").episode_end.tolist() == [3, 5]


def test_an_episode_without_frames_is_refused(tmp_path: Path) -> None:
    empty = make_episode(0, images={})
    with pytest.raises(ValueError, match="at least one action"):
        write(tmp_path / "demos", [empty])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fps": 0}, "fps is 0"),
        ({"action_names": []}, "action_names is empty"),
        ({"rlvla": {"env_spec": {"low": np.zeros(3)}}}, "must be plain JSON: .*ndarray"),
        ({"rlvla": {"env_spec": {"low": float("-inf")}}}, "must be plain JSON"),
    ],
)
def test_unusable_arguments_are_refused_before_anything_is_collected(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_writer(tmp_path / "demos", **changes)


# Datasets from elsewhere


def png(image: np.ndarray[Any, Any]) -> dict[str, Any]:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def test_a_dataset_in_lerobots_own_manner_is_read(tmp_path: Path) -> None:
    """Several files and chunks, episodes and frames in no order, free-form names, columns we do not know."""
    features = {
        "observation.image": {"dtype": "image", "shape": [3, 4, 5], "names": ["channels", "height", "width"]},
        "observation.depth": {"dtype": "image", "shape": [4, 5, 1], "names": None},
        "observation.state": {"dtype": "float32", "shape": [1], "names": ["position"]},
        "action": {"dtype": "float32", "shape": [2], "names": {"motors": ["left", "right"]}},
        "next.reward": {"dtype": "float32", "shape": [1], "names": None},
    }
    info = {
        "codebase_version": "v3.0",
        "robot_type": None,
        "fps": 10,
        "total_frames": 5,
        "total_episodes": 2,
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "features": features,
    }
    images = np.random.default_rng(0).integers(0, 256, (5, 4, 5, 3), dtype=np.uint8)
    # frame -> (episode, frame_index): episode 1 is in the first file, backwards; action = its frame number
    files = {
        "chunk-000/file-000": [(4, 1, 2), (3, 1, 1), (2, 1, 0)],
        "chunk-001/file-000": [(0, 0, 0), (1, 0, 1)],
    }
    for name, rows in files.items():
        table = pa.table(
            {
                "observation.image": [png(images[n]) for n, _, _ in rows],
                "observation.state": pa.array([float(n) for n, _, _ in rows], pa.float64()),
                "action": pa.array([[float(n), -1.0] for n, _, _ in rows], pa.list_(pa.float64())),
                "next.reward": [0.0 for _ in rows],
                "episode_index": [episode for _, episode, _ in rows],
                "frame_index": [frame for _, _, frame in rows],
                "task_index": [7 if episode else 3 for _, episode, _ in rows],
            }
        )
        path = tmp_path / f"data/{name}.parquet"
        path.parent.mkdir(parents=True)
        pq.write_table(table, path)
    for number, (episode, length, chunk) in enumerate([(1, 3, 0), (0, 2, 1)]):
        row = {"episode_index": episode, "length": length, "data/chunk_index": chunk, "data/file_index": 0}
        path = tmp_path / f"meta/episodes/chunk-000/file-{number:03d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist([row]), path)
    pq.write_table(pa.table({"task": ["wipe", "fold"], "task_index": [7, 3]}), tmp_path / "meta/tasks.parquet")
    (tmp_path / "meta/info.json").write_text(json.dumps(info))

    demonstrations = load_dataset(tmp_path)

    assert list(demonstrations.images) == ["image"]
    np.testing.assert_array_equal(demonstrations.images["image"], images)
    assert demonstrations.state is not None
    assert demonstrations.state.tolist() == [[0], [1], [2], [3], [4]]
    assert demonstrations.action[:, 0].tolist() == [0, 1, 2, 3, 4]
    assert demonstrations.episode_end.tolist() == [2, 5]
    assert [demonstrations.instruction(n) for n in range(5)] == ["fold", "fold", "wipe", "wipe", "wipe"]
    assert demonstrations.action_names == ("left", "right")
    assert (demonstrations.fps, demonstrations.robot_type, demonstrations.env_spec) == (10.0, None, None)


def test_names_that_do_not_fit_the_components_are_numbered(root: Path) -> None:
    edit_feature(root, "action", names=["actions"])
    assert load_dataset(root).action_names == ("action_0", "action_1", "action_2")


# Datasets that are refused


def test_a_folder_without_info_is_not_a_dataset(tmp_path: Path) -> None:
    assert "is not a LeRobot dataset" in refusal(tmp_path / "nowhere")
    assert "rlvla collect" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("version", "advice"),
    [("v2.1", "convert_dataset_v21_to_v30"), ("v4.0", "reads v3.0 only"), (None, "must be v3.0")],
)
def test_another_version_of_the_layout_is_refused(root: Path, version: str | None, advice: str) -> None:
    edit_info(root, codebase_version=version)
    message = refusal(root)
    assert f"codebase_version is {version}" in message
    assert advice in message


def test_videos_are_refused_with_the_way_to_embed_images(root: Path) -> None:
    edit_feature(root, "observation.images.top", dtype="video", shape=[6, 8, 3])
    message = refusal(root)
    assert "observation.images.top as video" in message
    assert "use_videos=False" in message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"total_frames": 0}, "is empty"),
        ({"total_episodes": 0}, "is empty"),
        ({"total_frames": 9}, "hold 8 frames, but meta/info.json says total_frames = 9"),
        ({"total_episodes": 4}, "lists 3 episodes .* says total_episodes = 4"),
        ({"fps": "fast"}, "fps is 'fast'"),
        ({"features": {}}, "no feature 'action'"),
        ({"features": {"action": 7}}, "feature 'action' is 7"),
        ({"data_path": "data/{nothing}"}, "data_path is"),
    ],
)
def test_an_info_file_that_contradicts_the_data_is_refused(root: Path, changes: dict[str, Any], message: str) -> None:
    edit_info(root, **changes)
    with pytest.raises(ValueError, match=message):
        load_dataset(root)


def test_an_info_file_that_is_cut_off_is_refused(root: Path) -> None:
    path = root / "meta/info.json"
    path.write_text(path.read_text()[:50])
    assert "is not valid JSON" in refusal(root)


@pytest.mark.parametrize("name", [DATA, EPISODES, "meta/tasks.parquet"])
def test_a_missing_or_truncated_file_is_named(root: Path, name: str) -> None:
    content = (root / name).read_bytes()
    (root / name).write_bytes(content[: len(content) // 2])
    message = refusal(root)
    assert name in message
    assert "truncated or corrupt" in message
    (root / name).unlink()
    message = refusal(root)
    assert str(Path(name).parts[1 if name == EPISODES else 0]) in message
    assert "Copy the dataset again" in message


def test_a_single_flipped_bit_in_the_actions_is_noticed(root: Path) -> None:
    table = pq.read_table(root / DATA)
    content = bytearray((root / DATA).read_bytes())
    at = content.find(np.asarray(table["action"][5].as_py(), np.float32).tobytes())
    assert at > 0, "the page is compressed; choose other values"
    content[at] ^= 1
    (root / DATA).write_bytes(content)
    assert DATA in refusal(root)


def test_a_missing_column_is_named(root: Path) -> None:
    edit_table(root / DATA, lambda table: table.drop_columns(["action"]))
    assert "has no column 'action'" in refusal(root)


def test_a_missing_image_column_is_named(root: Path) -> None:
    edit_table(root / DATA, lambda table: table.drop_columns(["observation.images.wrist"]))
    assert "has no column 'observation.images.wrist'" in refusal(root)


def test_an_action_of_another_size_than_the_features_say_is_refused(root: Path) -> None:
    edit_feature(root, "action", shape=[4])
    assert "'action'" in (message := refusal(root))
    assert "holds 3 float a frame" in message
    assert "says 4 numbers" in message


def test_an_action_that_is_text_is_refused(root: Path) -> None:
    edit_column(root / DATA, "action", lambda values: [str(value) for value in values])
    assert "'action'" in refusal(root)


@pytest.mark.parametrize(("column", "value"), [("action", np.nan), ("observation.state", -np.inf), ("action", None)])
def test_a_value_that_is_not_finite_is_located(root: Path, column: str, value: float | None) -> None:
    def spoil(rows: list[Any]) -> list[Any]:
        rows[6][1] = value  # episode 2 starts at frame 4
        return rows

    edit_column(root / DATA, column, spoil)
    message = refusal(root)
    assert message.startswith(column)
    assert "at episode 2, frame 2 (1 such frames)" in message


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("episode_index", [0, 0, 0, 0, 2, 2, 2, 2], "episode 0 of .* has 4 frames in the data files, but 3"),
        ("episode_index", [0, 0, 0, 5, 2, 2, 2, 2], "episode 1 of .* has 0 frames in the data files, but 1"),
        ("frame_index", [0, 1, 3, 0, 0, 1, 2, 3], "episode 0 of .* has frame_index 3 where 2 is due"),
        ("frame_index", [0, 1, 2, 0, 0, 1, 1, 2], "episode 2 of .* has frame_index 1 where 2 is due"),
        (
            "task_index",
            [0, 0, 0, 9, 0, 0, 0, 0],
            "episode 1 of .* has task_index 9, which meta/tasks.parquet",
        ),
        ("task_index", [0, 0, 0, None, 0, 0, 0, 0], "'task_index' of .* with 1 empty cells"),
    ],
)
def test_inconsistent_indices_are_refused(root: Path, column: str, values: list[Any], message: str) -> None:
    edit_column(root / DATA, column, lambda _: values)
    with pytest.raises(ValueError, match=message):
        load_dataset(root)


def test_episodes_listed_twice_are_refused(root: Path) -> None:
    edit_table(root / EPISODES, lambda table: pa.concat_tables([table, table.slice(0, 1)]))
    assert "lists 4 episodes" in refusal(root)


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ({"bytes": None, "path": "images/frame.png"}, "has no bytes: the image must be embedded"),
        ({"bytes": b"not a picture", "path": None}, "is not a readable image"),
        (
            {"bytes": png(np.zeros((6, 8, 3), np.uint8))["bytes"][:45], "path": None},
            "is not a readable image",
        ),
        (png(np.zeros((8, 6, 3), np.uint8)), "is a RGB image, h = 8, w = 6; .* says RGB, h = 6, w = 8"),
        (png(np.zeros((6, 8), np.uint16)), "is a I;16 image"),
    ],
)
def test_a_bad_image_is_located(root: Path, cell: dict[str, Any], message: str) -> None:
    edit_column(root / DATA, "observation.images.front", lambda cells: [*cells[:6], cell, *cells[7:]])
    where = "observation.images.front of .*demos, episode 2, frame 2, "
    with pytest.raises(ValueError, match=where + message):
        load_dataset(root)


def test_a_tasks_file_without_instructions_is_refused(root: Path) -> None:
    edit_table(root / "meta/tasks.parquet", lambda table: table.select(["task_index"]))
    assert "meta/tasks.parquet must hold the instructions" in refusal(root)


def test_two_cameras_of_one_name_are_refused(root: Path) -> None:
    edit_feature(root, "observation.front", dtype="image", shape=[6, 8, 3])
    assert "are both camera 'front'" in refusal(root)


# Action chunks


def chunk_demonstrations() -> Demonstrations:
    """Episodes of 3 and 2 frames whose action is the frame's number."""
    return Demonstrations(
        images={},
        state=None,
        action=np.arange(5, dtype=np.float32)[:, None],
        tasks=("push",),
        task_index=np.zeros(5, np.int64),
        episode_start=np.array([0, 3]),
        episode_end=np.array([3, 5]),
        fps=10.0,
        robot_type=None,
        action_names=("a",),
    )


def test_chunks_stop_at_the_end_of_the_episode_and_repeat_its_last_action() -> None:
    chunks, is_real = action_chunks(chunk_demonstrations(), 3)
    assert chunks.dtype == np.float32
    assert chunks[..., 0].tolist() == [[0, 1, 2], [1, 2, 2], [2, 2, 2], [3, 4, 4], [4, 4, 4]]
    assert is_real.astype(int).tolist() == [[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 0], [1, 0, 0]]


def test_a_chunk_of_one_is_the_action_itself() -> None:
    demonstrations = chunk_demonstrations()
    chunks, is_real = action_chunks(demonstrations, 1)
    np.testing.assert_array_equal(chunks[:, 0], demonstrations.action)
    assert is_real.all()


def test_a_chunk_has_at_least_one_action() -> None:
    with pytest.raises(ValueError, match="chunk_size is 0"):
        action_chunks(chunk_demonstrations(), 0)
