"""The codec between interpreters: what a message is, to the byte, and that nothing else passes for one."""

import ast
import json
import pickle
import socket
import struct
import threading
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of

from rlvla_envs import wire
from rlvla_envs.wire import DTYPES, MAX_ARRAYS, MAX_HEADER, Message, WireError, encode, receive, send

HEADER = b'{"kind":"reset","fields":{"call":7},"arrays":[["slots","i8",[2]]]}'
"""66 = 0x42 bytes."""
RESET = (
    b"RLW1"
    + b"\x42\x00\x00\x00"  # length of the header
    + b"\x10\x00\x00\x00\x00\x00\x00\x00"  # two int64 are 16 bytes
    + HEADER
    + b"\x01\x00\x00\x00\x00\x00\x00\x00"  # 1
    + b"\x02\x01\x00\x00\x00\x00\x00\x00"  # 258 = 0x0102
)


def read(data: bytes, **limits: Any) -> Message:
    """What a reader makes of these bytes and the end of the connection after them."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        # In a thread, because more than the socket's buffer may have to go through.
        writer = threading.Thread(target=write, args=(theirs, data), daemon=True)
        writer.start()
        try:
            return receive(ours, **{"timeout_s": 60.0, **limits})
        finally:
            ours.close()
            writer.join()


def write(connection: socket.socket, data: bytes) -> None:
    try:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
    except OSError:
        pass  # the reader has had enough


def framed(header: Any, body: bytes = b"", *, body_length: int | None = None) -> bytes:
    """A message with this header, whatever it is."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<4sIQ", b"RLW1", len(raw), len(body) if body_length is None else body_length) + raw + body


def announcing(*arrays: Any) -> dict[str, Any]:
    return {"kind": "x", "fields": {}, "arrays": list(arrays)}


def assert_equal_messages(a: Message, b: Message) -> None:
    assert (a.kind, a.fields, list(a.arrays)) == (b.kind, b.fields, list(b.arrays))
    for name in a.arrays:
        assert a.arrays[name].dtype == b.arrays[name].dtype
        assert a.arrays[name].shape == b.arrays[name].shape
        assert a.arrays[name].tobytes() == b.arrays[name].tobytes()


# --- what a message is


def test_a_message_is_these_bytes() -> None:
    assert len(HEADER) == 0x42
    message = Message("reset", {"call": 7}, {"slots": np.array([1, 258])})
    assert b"".join(encode(message)) == RESET
    assert_equal_messages(read(RESET), message)


def test_the_layout_and_byte_order_in_memory_do_not_show() -> None:
    plain = np.arange(6, dtype=np.float32).reshape(2, 3)
    for same in (np.asfortranarray(plain), plain.astype(">f4"), np.repeat(plain, 2, axis=1)[:, ::2]):
        assert b"".join(encode(Message("x", {}, {"a": same}))) == b"".join(encode(Message("x", {}, {"a": plain})))


def test_what_was_read_belongs_to_the_reader() -> None:
    array = read(RESET).arrays["slots"]
    assert array.flags.writeable
    assert array.flags.aligned
    assert array.dtype.isnative


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False, allow_infinity=False)
    # Half a character is not text; everything else is.
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner)
    ),
    max_leaves=8,
)
arrays = st.sampled_from(sorted(DTYPES)).flatmap(
    lambda name: arrays_of.arrays(
        np.dtype(name), arrays_of.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)
    )
)
messages = st.builds(
    Message,
    st.text(st.characters(exclude_categories=["Cs"])),
    st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), json_values, max_size=4),
    st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), arrays, max_size=4),
)


@given(messages)
def test_what_is_sent_is_what_arrives(message: Message) -> None:
    # NaN, infinities and minus zero travel in arrays to the bit; who reads them decides what they may be.
    assert_equal_messages(read(b"".join(encode(message))), message)


def test_messages_follow_each_other_on_one_connection() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        for i in range(3):
            send(theirs, encode(Message("x", {"i": i}, {"a": np.full((2, i), i)})), timeout_s=60.0)
        for i in range(3):
            message = receive(ours, timeout_s=60.0)
            assert message.fields == {"i": i}
            assert message.arrays["a"].shape == (2, i)


def test_a_picture_larger_than_the_sockets_buffer_arrives() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (8, 512, 512, 3), dtype=np.uint8)
    assert_equal_messages(read(b"".join(encode(Message("x", {}, {"a": picture})))), Message("x", {}, {"a": picture}))


# --- what cannot be sent


@pytest.mark.parametrize(
    ("message", "complaint"),
    [
        (Message("x", {}, {"a": np.array(["text"])}), "dtype 'U4'"),
        (Message("x", {}, {"a": np.array([object()])}), "dtype 'O'"),
        (Message("x", {}, {"a": np.zeros(2, np.float16)}), "dtype 'f2'"),
        (Message("x", {}, {"a": np.zeros(2, [("f", "i4")])}), "dtype 'V4'"),
        (Message("x", {}, {"a": np.zeros((1,) * 5)}), "at most 4 sizes"),
        (Message("x", {}, {str(i): np.zeros(1) for i in range(MAX_ARRAYS + 1)}), "at most 64"),
        (Message("x", {"a": float("nan")}), "no JSON"),
        (Message("x", {"a": {1, 2}}), "no JSON"),
        (Message("x", {"a": "\ud800"}), "no JSON"),
        (Message("x", {"a": "a" * MAX_HEADER}), "is longer than 262144"),
    ],
)
def test_what_a_reader_would_refuse_is_not_sent(message: Message, complaint: str) -> None:
    with pytest.raises(WireError, match=complaint):
        encode(message)


# --- what is refused


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        pytest.param(b"", "closed the connection", id="nothing"),
        pytest.param(RESET[:-1], "closed the connection", id="one byte short"),
        pytest.param(b"HTTP/1.1 400 Bad Request\r\n", "starts with b'HTTP'", id="another protocol"),
        pytest.param(struct.pack("<4sIQ", b"RLW1", MAX_HEADER + 1, 0), "header of 262145 bytes", id="long header"),
        pytest.param(struct.pack("<4sIQ", b"RLW1", 0, 2**40), "body of 1099511627776 bytes", id="long body"),
        pytest.param(framed(b""), "no JSON", id="empty header"),
        pytest.param(framed(b"\xff\xfe"), "no JSON", id="not UTF-8"),
        pytest.param(framed(b"[" * 100_000), "no JSON", id="deep"),
        pytest.param(framed(b'{"a":' * 40_000), "no JSON", id="deep objects"),
        pytest.param(framed([]), "not an object", id="a list"),
        pytest.param(framed({**announcing(), "more": 1}), "not an object with the keys", id="unknown key"),
        pytest.param(framed({"kind": "x", "fields": {}}), "not an object with the keys", id="missing key"),
        pytest.param(framed({**announcing(), "kind": 3}), "kind must be a text", id="kind"),
        pytest.param(framed({**announcing(), "fields": []}), "fields an object", id="fields"),
        pytest.param(framed({**announcing(), "arrays": {}}), "must be a list", id="arrays"),
        pytest.param(framed(b'{"kind":"x","fields":{"a":NaN},"arrays":[]}'), "NaN is not a number", id="NaN"),
        pytest.param(framed(b'{"kind":"x","fields":{"a":-Infinity},"arrays":[]}'), "-Infinity", id="infinity"),
        pytest.param(framed(b'{"kind":"x","fields":{"a":1e999},"arrays":[]}'), "1e999", id="too large a float"),
        pytest.param(framed(b'{"kind":"x","fields":{"a":' + b"9" * 99_999 + b'},"arrays":[]}'), "9999", id="long int"),
        pytest.param(framed(b'{"kind":"x","kind":"y","fields":{},"arrays":[]}'), "a key twice", id="repeated key"),
        pytest.param(framed(b'{"kind":"x","fields":{"a":"\\ud800"},"arrays":[]}'), "no JSON", id="half a character"),
        pytest.param(framed(announcing(["a", "u1"]), b"1"), "not as \\[name, dtype, shape\\]", id="no shape"),
        pytest.param(framed(announcing("abc"), b"1"), "not as \\[name, dtype, shape\\]", id="a text for an array"),
        pytest.param(framed(announcing([1, "u1", [1]]), b"1"), "no name", id="name is a number"),
        pytest.param(framed(announcing(["a", "u1", [1]], ["a", "u1", [1]]), b"12"), "names two", id="same name"),
        pytest.param(framed(announcing(["a", "O", [1]]), b"12345678"), "dtype 'O'", id="objects"),
        pytest.param(framed(announcing(["a", "U1", [1]]), b"1234"), "dtype 'U1'", id="unicode"),
        pytest.param(framed(announcing(["a", "V8", [1]]), b"12345678"), "dtype 'V8'", id="void"),
        pytest.param(framed(announcing(["a", ["u1"], [1]]), b"1"), "dtype", id="dtype is a list"),
        pytest.param(framed(announcing(["a", "u1", [-1]])), "has shape", id="negative"),
        pytest.param(framed(announcing(["a", "u1", [-1, -1]]), b"1"), "has shape", id="twice negative"),
        pytest.param(framed(announcing(["a", "u1", [True]]), b"1"), "has shape", id="bool"),
        pytest.param(framed(announcing(["a", "u1", [1.0]]), b"1"), "has shape", id="float"),
        pytest.param(framed(announcing(["a", "u1", 1]), b"1"), "has shape", id="shape is a number"),
        pytest.param(framed(announcing(["a", "u1", [1] * 5]), b"1"), "at most 4 sizes", id="five axes"),
        # 2^32 x 2^32 is 0 in 64 bits.
        pytest.param(framed(announcing(["a", "u1", [2**32, 2**32]])), "larger than", id="overflow"),
        pytest.param(framed(announcing(["a", "f8", [0, 2**62, 2**62]])), "larger than", id="hidden behind zero"),
        pytest.param(framed(announcing(*[[str(i), "u1", [2**29]] for i in range(3)])), "together", id="sum"),
        pytest.param(framed(announcing(["a", "u1", [2]]), b"123"), "do not fit", id="trailing bytes"),
        pytest.param(framed(announcing(["a", "u1", [2]]), b"1"), "do not fit", id="too few bytes"),
        pytest.param(framed(announcing(["a", "u1", [2]]), b"", body_length=2), "closed", id="bytes that never come"),
        pytest.param(framed(announcing(["a", "b1", [2]]), b"\x01\x02"), "neither 0 nor 1", id="a bool of 2"),
        pytest.param(framed(announcing(*[[str(i), "u1", [0]] for i in range(65)])), "at most 64", id="65 arrays"),
    ],
)
def test_a_malformed_message_is_refused_with_the_reason(data: bytes, complaint: str) -> None:
    with pytest.raises(WireError, match=complaint):
        read(data)


def test_the_reader_sets_how_much_may_come() -> None:
    assert read(RESET, max_body=16).kind == "reset"
    with pytest.raises(WireError, match="body of 16 bytes is announced; at most 15"):
        read(RESET, max_body=15)


def test_an_announcement_reserves_no_memory() -> None:
    huge = 2**29
    tracemalloc.start()
    try:
        for data in (
            framed(announcing(["a", "u1", [huge]]), b"", body_length=huge),
            framed(announcing(["a", "f8", [huge]]), b"", body_length=8 * huge),
            framed(announcing(["a", "u1", [1]]), b"", body_length=huge),
        ):
            with pytest.raises(WireError):
                read(data, max_body=2**20)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2**22


def test_a_trickle_is_cut_off_by_the_deadline_of_the_whole_message() -> None:
    ours, theirs = socket.socketpair()
    stop = threading.Event()

    def trickle() -> None:
        # Never silent for long: 98 bytes take ten seconds.
        for byte in RESET:
            if stop.wait(0.1):
                return
            theirs.sendall(bytes([byte]))

    thread = threading.Thread(target=trickle)
    with ours, theirs:
        thread.start()
        try:
            with pytest.raises(WireError, match=r"no complete message arrived within 0.5 s"):
                receive(ours, timeout_s=0.5)
        finally:
            stop.set()
            thread.join()


def test_a_peer_that_does_not_read_stops_the_sender() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, pytest.raises(WireError, match="could not be sent"):
        send(ours, encode(Message("x", {}, {"a": np.zeros(2**24)})), timeout_s=0.2)


def test_a_peer_that_is_gone_stops_the_sender() -> None:
    ours, theirs = socket.socketpair()
    theirs.close()
    with ours, pytest.raises(WireError, match="could not be sent"):
        send(ours, encode(Message("x")), timeout_s=60.0)


# --- fuzz


SEEDS = [
    RESET,
    b"".join(encode(Message("open", {"spec": {"cameras": [{"name": "top", "height": 2}]}, "low": -1.5, "x": None}))),
    b"".join(
        encode(
            Message(
                "step",
                {"instruction": ["lift the \N{SNOWMAN}", ""], "call": 3},
                {"images/top": np.zeros((2, 2, 2, 3), np.uint8), "done": np.ones(2, np.bool_), "r": np.zeros(2, "f4")},
            )
        )
    ),
]


def mutated(rng: np.random.Generator, data: bytes) -> bytes:
    """Bytes changed, cut out, repeated or put in; half of the time with a prefix that fits what became of it."""
    found = bytearray(data)
    for _ in range(rng.integers(1, 5)):
        at = int(rng.integers(len(found) + 1))
        match int(rng.integers(6)):
            case 0 if at < len(found):
                found[at] ^= 1 << int(rng.integers(8))
            case 1 if at < len(found):
                found[at] = int(rng.integers(256))
            case 2:
                del found[at:]
            case 3:
                del found[at : at + int(rng.integers(1, 9))]
            case 4:
                found[at:at] = found[at : at + int(rng.integers(1, 30))]
            case _:
                tokens = (b"[", b"{", b'"', b",", b"1e999", b"-1", b"NaN", b"null", b"18446744073709551616", b"\\u0000")
                found[at:at] = tokens[int(rng.integers(len(tokens)))]
    if rng.random() < 0.5 and len(found) > 16:
        length = min(len(found) - 16, struct.unpack_from("<I", data, 4)[0] + len(found) - len(data))
        found[:16] = struct.pack("<4sIQ", b"RLW1", max(length, 0), len(found) - 16 - max(length, 0))
    return bytes(found)


def shuffled_header(rng: np.random.Generator) -> bytes:
    """A well-formed frame around a header of random JSON in the places where the reader expects something."""

    def anything(depth: int = 0) -> Any:
        leaves: list[Any] = ["a", "u1", "f8", "b1", "O", "", 0, 1, -1, 2, 2**31, 2**63, 10**19, 0.5, True, None, "call"]
        kind = int(rng.integers(6 if depth < 3 else 4))
        if kind == 4:
            return [anything(depth + 1) for _ in range(rng.integers(4))]
        if kind == 5:
            return {str(anything(3)): anything(depth + 1) for _ in range(rng.integers(3))}
        return leaves[int(rng.integers(len(leaves)))]

    def mostly(value: Any) -> Any:
        return value if rng.random() < 0.8 else anything()

    shape = [mostly(int(rng.integers(4))) for _ in range(rng.integers(4))]
    array = [mostly("a"), mostly("u1"), mostly(shape)]
    header = {"kind": mostly("x"), "fields": mostly({"a": anything()}), "arrays": mostly([mostly(array)])}
    if rng.random() < 0.1:
        header[str(anything(3))] = anything()
    fitting = int(np.prod([size for size in shape if type(size) is int and 0 <= size < 4]))
    return framed(header, rng.bytes(fitting if rng.random() < 0.8 else int(rng.integers(40))))


def some_noise(rng: np.random.Generator) -> bytes:
    noise: bytes = rng.bytes(int(rng.integers(200)))
    return noise if rng.random() < 0.5 else RESET[: int(rng.integers(5, 17))] + noise


@pytest.mark.parametrize("make", [mutated, shuffled_header, some_noise])
def test_any_bytes_are_a_message_or_a_clean_error(make: Callable[..., bytes]) -> None:
    reasons: list[str] = []
    tracemalloc.start()
    try:
        for seed in range(2000):
            rng = np.random.default_rng(seed)
            data = make(rng, SEEDS[seed % len(SEEDS)]) if make is mutated else make(rng)
            try:
                message = read(data, max_body=2**16)
            except WireError as error:
                reasons.append(str(error))
            else:
                # What passes is a message in every respect: it can be sent on.
                assert_equal_messages(read(b"".join(encode(message))), message)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2**23
    assert all(reason.isprintable() and len(reason) < 1000 for reason in reasons)
    # Both happen, or the fuzz tries one door only.
    assert len(reasons) > 500
    assert len(reasons) < 1900 or make is some_noise


# --- no pickle


class Bomb:
    """Unpickled, it creates a file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self._path,)


def test_a_pickle_is_refused_bytes(tmp_path: Path) -> None:
    target = tmp_path / "created"
    bomb = pickle.dumps(Bomb(target))
    for data in (
        bomb,
        framed(bomb),
        framed(announcing(["a", "O", [1]]), bomb),
        framed(announcing(["a", "|O", [len(bomb) // 8]]), bomb),
    ):
        with pytest.raises(WireError):
            read(data)
    # As numbers it may travel: nobody looks into them.
    assert read(framed(announcing(["a", "u1", [len(bomb)]]), bomb)).arrays["a"].tobytes() == bomb
    assert not target.exists()
    pickle.loads(bomb)
    assert target.exists(), "a bomb that does not go off shows nothing"


def test_no_file_on_either_end_of_the_wire_can_unpickle() -> None:
    folder = Path(wire.__file__).parent
    forbidden = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "marshal", "shelve", "multiprocessing", "torch"}
    unsafe = {"load", "loads", "fromfile", "eval", "exec", "allow_pickle", "compile"}
    for name in ("wire.py", "foreign.py", "foreign_host.py"):
        for node in ast.walk(ast.parse((folder / name).read_text())):
            if isinstance(node, ast.Import):
                assert not {alias.name.split(".")[0] for alias in node.names} & forbidden, name
            elif isinstance(node, ast.ImportFrom):
                assert str(node.module).split(".")[0] not in forbidden, name
            elif isinstance(node, ast.Attribute) and ast.unparse(node) != "json.loads":
                assert node.attr not in unsafe or ast.unparse(node).startswith("os."), f"{name}: {ast.unparse(node)}"
            elif isinstance(node, ast.Name | ast.keyword):
                assert (node.id if isinstance(node, ast.Name) else node.arg) not in unsafe, (
                    f"{name}: {ast.unparse(node)}"
                )
