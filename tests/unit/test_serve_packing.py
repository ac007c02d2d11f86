"""msgpack with arrays: what clients send is read, and nothing that they send does harm."""

import pickle
import tracemalloc
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from rlvla.serve_packing import LONGEST_LIST, MOST_ENTRIES, PackingError, pack, unpack
from tests.openpi_client import packb, unpackb

PLAIN = ("|b1", "|u1", "|i1", "<u2", "<i4", "<i8", "<u8", "<f2", "<f4", "<f8", ">f4", ">i2")


def array(**changes: Any) -> bytes:
    """A packed array of two floats, with other entries."""
    whole = {b"__ndarray__": True, b"data": bytes(8), b"dtype": "<f4", b"shape": [2]}
    return bytes(msgpack.packb(whole | {key.encode(): value for key, value in changes.items()}))


def test_a_frame_worked_by_hand() -> None:
    # fixmap of 1 {"a": map of 4 {b"__ndarray__": true, b"data": 2 bytes, b"dtype": "<i2", b"shape": [1]}}
    frame = b"\x81\xa1a\x84\xc4\x0b__ndarray__\xc3\xc4\x04data\xc4\x02\x05\x01\xc4\x05dtype\xa3<i2\xc4\x05shape\x91\x01"
    found = unpack(frame)["a"]
    assert found.dtype == np.int16
    assert found.tolist() == [0x0105]
    assert pack({"a": np.array([0x0105], "<i2")}) == frame


@given(
    st.sampled_from(PLAIN).flatmap(
        lambda dtype: hnp.arrays(np.dtype(dtype), hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4))
    )
)
def test_arrays_travel_both_ways_to_the_bit(sent: np.ndarray) -> None:
    for received in (unpack(packb({"x": sent}))["x"], unpackb(pack({"x": sent}))["x"], unpack(pack({"x": sent}))["x"]):
        assert received.shape == sent.shape
        assert received.dtype.newbyteorder("<") == sent.dtype.newbyteorder("<")
        assert received.astype(sent.dtype).tobytes() == sent.tobytes()


def test_an_array_comes_in_the_order_of_its_axes_whatever_its_memory_is() -> None:
    sent = np.arange(6, dtype=np.float32).reshape(2, 3).T
    assert unpack(pack(sent)).tolist() == [[0, 3], [1, 4], [2, 5]]


def test_numbers_text_and_nesting_travel() -> None:
    sent = {"a": {"b": [1, 2.5, None, True, "ß"]}, "n": np.float32(0.5), "i": np.int64(-7), "t": np.True_}
    assert unpack(packb(sent)) == sent
    assert unpackb(pack(sent)) == sent
    assert type(unpack(packb(sent))["n"]) is np.float32


def test_markers_may_be_text() -> None:
    frame = msgpack.packb({"__ndarray__": True, "data": bytes([7]), "dtype": "|u1", "shape": [1]})
    assert unpack(frame).tolist() == [7]


class Bomb:
    """Unpickled, it creates a file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self._path,)


def test_a_pickle_is_never_opened(tmp_path: Path) -> None:
    target = tmp_path / "created"
    bomb = pickle.dumps(Bomb(target))
    with pytest.raises(PackingError, match="not a msgpack message"):
        unpack(bomb)
    for dtype in ("O", "|O", "|O8", "object", "pickle"):
        with pytest.raises(PackingError, match="objects"):
            unpack(array(data=bomb, dtype=dtype, shape=[1]))
    with pytest.raises(PackingError, match="extension"):
        unpack(msgpack.packb(msgpack.ExtType(42, bomb)))
    assert not target.exists()
    pickle.loads(bomb)
    assert target.exists(), "a bomb that does not go off shows nothing"


@pytest.mark.parametrize(
    "dtype", ["V2000000000", "<U4", "S8", "f4,O", "<M8[s]", "<c8", "f16", "<f3", "", "1f4", 5, None]
)
def test_a_dtype_that_is_not_plain_numbers_is_refused(dtype: object) -> None:
    with pytest.raises(PackingError, match="dtype"):
        unpack(array(dtype=dtype))


@pytest.mark.parametrize(
    "changes",
    [
        {"shape": [3]},
        {"shape": [1]},
        {"shape": [-2]},
        {"shape": [2**40, 2**40]},
        {"shape": [True, 2]},
        {"shape": [2.0]},
        {"shape": 2},
        {"shape": [1] * 8 + [2]},
        {"data": "01234567"},
        {"data": None},
    ],
)
def test_an_array_whose_bytes_and_shape_disagree_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(PackingError, match=r"^an array"):
        unpack(array(**changes))


def test_an_array_that_lacks_a_part_is_refused() -> None:
    with pytest.raises(PackingError, match="lacks 'dtype'"):
        unpack(msgpack.packb({b"__ndarray__": True, b"data": b"", b"shape": [0]}))


@pytest.mark.parametrize(
    ("dtype", "value"), [("|u1", 256), ("|u1", -1), ("<i8", 2**63), ("<i4", 1.5), ("<f4", "1"), ("O", 1)]
)
def test_a_number_that_is_not_of_its_dtype_is_refused(dtype: str, value: object) -> None:
    with pytest.raises(PackingError):
        unpack(msgpack.packb({b"__npgeneric__": True, b"data": value, b"dtype": dtype}))


def test_every_beginning_of_a_frame_is_refused() -> None:
    frame = packb({"image": np.zeros((2, 2, 3), np.uint8), "prompt": "go", "state": np.zeros(3)})
    unpack(frame)
    for length in range(len(frame)):
        with pytest.raises(PackingError):
            unpack(frame[:length])
    with pytest.raises(PackingError):
        unpack(frame + b"\x00")


def test_objects_have_no_form_on_the_wire() -> None:
    with pytest.raises(TypeError, match="object"):
        pack({"a": np.array([object()])})
    with pytest.raises(TypeError, match="set"):
        pack({"a": {1}})


def test_a_header_that_announces_much_takes_no_room() -> None:
    # 1000 nested lists that each say they have 2^24 entries: 5 kB that would take 128 GB.
    nested = b"\xdd\x01\x00\x00\x00" * 1000
    tracemalloc.start()
    try:
        with pytest.raises(PackingError, match="max_array_len"):
            unpack(nested)
        with pytest.raises(PackingError):
            unpack(b"\xdc\x10\x00" * 1000)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2**26


def test_a_message_of_many_empty_lists_is_refused() -> None:
    # Each is a byte on the wire; a longest list of longest lists has 4096^2 of them.
    inner = b"\xdc\x10\x00" + b"\x90" * LONGEST_LIST
    number = MOST_ENTRIES // LONGEST_LIST + 1
    with pytest.raises(PackingError, match="more than"):
        unpack(b"\xdc" + number.to_bytes(2, "big") + inner * number)


def test_any_bytes_are_a_message_or_a_clean_error() -> None:
    seed = packb({"image": np.zeros((2, 2, 3), np.uint8), "prompt": "go", "n": np.float32(1), "list": [1, {"a": 2}]})
    reasons: list[str] = []
    for number in range(3000):
        rng = np.random.default_rng(number)
        data = bytearray(seed)
        for _ in range(rng.integers(1, 4)):
            data[int(rng.integers(len(data)))] = int(rng.integers(256))
        try:
            unpack(bytes(data))
        except PackingError as error:
            reasons.append(str(error))
    assert all(len(reason) < 500 for reason in reasons)
    assert 500 < len(reasons) < 3000
