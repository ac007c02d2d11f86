"""Messages to and from a simulator in another interpreter: a JSON header and raw arrays, no pickle.

    prefix   16 bytes   magic "RLW1", length of the header (uint32), length of the body (uint64), little-endian
    header   JSON       {"kind": text, "fields": {...}, "arrays": [[name, dtype, shape], ...]}, UTF-8
    body     raw        the arrays one after the other, C-contiguous, little-endian

Nothing a peer sends is executed, and nothing is allocated before its size was checked. Whatever is wrong with a
message or its delivery is a `WireError`, after which the connection is out of step and must be closed.

Both ends run this file, so it needs the standard library and numpy only. Tested on Python 3.8 with numpy 1.22,
3.10 with 1.24, 3.11 with 2.4 and 3.13 with 2.1.
"""

from __future__ import annotations

import json
import math
import socket
import struct
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

MAGIC = b"RLW1"
PREFIX = struct.Struct("<4sIQ")
MAX_HEADER = 2**18
"""Bytes. Text travels in the header: the instructions of a thousand slots fit."""
MAX_BODY = 2**30
"""Bytes of all arrays of a message. A reader who knows what comes sets less."""
MAX_ARRAYS = 64
MAX_NDIM = 4

DTYPES = {name: np.dtype("<" + name) for name in ("u1", "b1", "i4", "i8", "f4", "f8")}
"""All that may travel. An allow-list: numpy's own parser knows object and void types."""
HEADER_KEYS = {"kind", "fields", "arrays"}


class WireError(RuntimeError):
    """The peer broke the protocol, went away or was too slow; or this side was asked to send what cannot travel."""


class Message(NamedTuple):
    """What travels: a word, small JSON values, and arrays by name."""

    kind: str
    fields: Mapping[str, Any] = {}
    arrays: Mapping[str, np.ndarray] = {}


class _Announced(NamedTuple):
    """An array that the header promises."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    nbytes: int


def encode(message: Message) -> list[bytes | memoryview]:
    """The bytes of a message in order, arrays uncopied where their layout allows it.

    Raises:
        WireError: a dtype, shape or value that cannot travel.
    """
    arrays = {name: np.asarray(array, order="C") for name, array in message.arrays.items()}
    listed = [[name, array.dtype.str[1:], list(array.shape)] for name, array in arrays.items()]
    announced = _announced(listed, MAX_BODY)
    header = _dump({"kind": message.kind, "fields": dict(message.fields), "arrays": listed})
    if len(header) > MAX_HEADER:
        raise WireError(f"a header of {len(header)} bytes is longer than {MAX_HEADER}.")
    body = [arrays[a.name].astype(a.dtype, copy=False).reshape(-1).view(np.uint8).data for a in announced if a.nbytes]
    return [PREFIX.pack(MAGIC, len(header), sum(a.nbytes for a in announced)) + header, *body]


def send(connection: socket.socket, parts: list[bytes | memoryview], *, timeout_s: float | None) -> None:
    """Write what `encode` returned, all of it within ``timeout_s`` (None waits for ever).

    Raises:
        WireError: the peer is gone or does not read.
    """
    remaining = _countdown(timeout_s, "the message was not taken")
    for part in parts:
        connection.settimeout(remaining())
        try:
            connection.sendall(part)
        except OSError as error:
            raise WireError(f"the message could not be sent ({error}).") from error


def receive(connection: socket.socket, *, timeout_s: float | None, max_body: int = MAX_BODY) -> Message:
    """Read one message; its arrays are fresh, writable and in native byte order.

    Args:
        timeout_s: for the whole message, however it trickles in; None waits for ever.
        max_body: bytes of arrays that are accepted, at most `MAX_BODY`.

    Raises:
        WireError: anything else than a well-formed message arrived, or not in time.
    """
    remaining = _countdown(timeout_s, "no complete message arrived")
    magic, header_length, body_length = PREFIX.unpack(_read(connection, bytearray(PREFIX.size), remaining))
    if magic != MAGIC:
        raise WireError(f"a message starts with {magic!r}, not with {MAGIC!r}.")
    if header_length > MAX_HEADER:
        raise WireError(f"a header of {header_length} bytes is announced; at most {MAX_HEADER} are accepted.")
    max_body = min(max_body, MAX_BODY)
    if body_length > max_body:
        raise WireError(f"a body of {body_length} bytes is announced; at most {max_body} are accepted here.")
    header = _parse(bytes(_read(connection, bytearray(header_length), remaining)))
    if not isinstance(header, dict) or set(header) != HEADER_KEYS:
        raise WireError(f"the header is not an object with the keys {', '.join(sorted(HEADER_KEYS))}.")
    if not isinstance(header["kind"], str) or not isinstance(header["fields"], dict):
        raise WireError("the header's kind must be a text and its fields an object.")
    announced = _announced(header["arrays"], max_body)
    if sum(a.nbytes for a in announced) != body_length:
        raise WireError(f"{body_length} bytes of body do not fit the arrays {header['arrays']!r:.300}.")
    arrays = {}
    for a in announced:
        array = np.empty(a.shape, a.dtype)
        raw = array.reshape(-1).view(np.uint8)
        _read(connection, raw.data, remaining)
        # numpy computes nonsense with a bool that is neither 0 nor 1.
        if a.dtype.kind == "b" and raw.size and raw.max() > 1:
            raise WireError(f"array {a.name!r:.100} has bools that are neither 0 nor 1.")
        arrays[a.name] = array.astype(a.dtype.newbyteorder("="), copy=False)
    return Message(header["kind"], header["fields"], arrays)


def _announced(listed: Any, max_body: int) -> list[_Announced]:
    """The header's list of arrays, checked; their sizes are computed in Python's integers, which do not overflow."""
    if not isinstance(listed, list) or len(listed) > MAX_ARRAYS:
        raise WireError(f"the arrays must be a list of at most {MAX_ARRAYS}.")
    found: dict[str, _Announced] = {}
    for entry in listed:
        if not isinstance(entry, list) or len(entry) != 3:
            raise WireError(f"an array is announced as {entry!r:.200}, not as [name, dtype, shape].")
        name, dtype, shape = entry
        if not isinstance(name, str) or name in found:
            raise WireError(f"{name!r:.100} is no name for an array, or names two.")
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise WireError(f"array {name!r:.100} has dtype {dtype!r:.50}; what may travel: {', '.join(DTYPES)}.")
        # A bool is an int in Python, and no size.
        if (
            not isinstance(shape, list)
            or len(shape) > MAX_NDIM
            or not all(type(size) is int and size >= 0 for size in shape)
        ):
            raise WireError(
                f"array {name!r:.100} has shape {shape!r:.200}; at most {MAX_NDIM} sizes from 0 are accepted."
            )
        # An axis of 0 hides how large the others are, and numpy refuses them in its own way.
        if math.prod(max(size, 1) for size in shape) * DTYPES[dtype].itemsize > max_body:
            raise WireError(f"array {name!r:.100} of shape {shape!r:.200} is larger than {max_body} bytes.")
        nbytes = math.prod(shape) * DTYPES[dtype].itemsize
        found[name] = _Announced(name, DTYPES[dtype], tuple(shape), nbytes)
    if sum(a.nbytes for a in found.values()) > max_body:
        raise WireError(f"the arrays are larger than {max_body} bytes together.")
    return list(found.values())


def _dump(header: dict[str, Any]) -> bytes:
    try:
        return json.dumps(header, allow_nan=False, ensure_ascii=False, separators=(",", ":")).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise WireError(f"the message has fields that are no JSON: {error}.") from error


def _parse(data: bytes) -> Any:
    """JSON as the standard has it: Python alone also takes NaN, repeated keys and halves of characters."""
    try:
        header = json.loads(
            data.decode(),
            object_pairs_hook=_object,
            parse_constant=_refuse_number,
            parse_float=_finite_float,
            parse_int=_small_int,
        )
        # "\ud800" is half a character: it parses, and fails wherever it is printed later.
        json.dumps(header, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise WireError(f"the header is no JSON that is accepted: {error}.") from error
    return header


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("an object has a key twice")
    return found


def _refuse_number(text: str) -> Any:
    raise ValueError(f"{text[:40]} is not a number that is accepted")


def _finite_float(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _refuse_number(text)


def _small_int(text: str) -> int:
    # Reading a number takes time quadratic in its digits.
    return int(text) if len(text) <= 20 else _refuse_number(text)


def _countdown(timeout_s: float | None, complaint: str) -> Callable[[], float | None]:
    """Seconds left of one deadline, at every call."""
    if timeout_s is None:
        return lambda: None
    deadline = time.monotonic() + timeout_s

    def remaining() -> float:
        left = deadline - time.monotonic()
        if left <= 0:
            raise WireError(f"{complaint} within {timeout_s:g} s.")
        return left

    return remaining


def _read(
    connection: socket.socket, buffer: bytearray | memoryview, remaining: Callable[[], float | None]
) -> bytearray | memoryview:
    """Fill the buffer."""
    view, filled = memoryview(buffer), 0
    while filled < len(view):
        connection.settimeout(remaining())
        try:
            count = connection.recv_into(view[filled:])
        except socket.timeout:  # noqa: UP041 -- Python 3.8 and 3.9 have no other name for it
            remaining()
            continue
        except OSError as error:
            raise WireError(f"the connection broke: {error}.") from error
        if not count:
            raise WireError("the peer closed the connection.")
        filled += count
    return buffer
