"""msgpack with numpy arrays, as openpi's and starVLA's clients write it, from a peer that is not trusted.

An array is a map {b"__ndarray__": True, b"data": bytes, b"dtype": "<f4", b"shape": [..]}, a numpy number is
{b"__npgeneric__": True, b"data": number, b"dtype": "<f4"}. The markers may be bytes or text. Nothing is unpickled, and
only plain booleans, integers and floats become arrays.
"""

import math
import re
from typing import Any

import numpy as np

LONGEST_LIST = 4096
"""Elements of one list, and entries of one map. msgpack makes room for as many as a header of five bytes announces, at
every level of nesting; arrays travel as bytes and are not lists."""
MOST_ENTRIES = 100_000
"""Of all lists and maps of a message: an empty list is one byte on the wire and 56 in memory."""
MOST_AXES = 8
PLAIN_DTYPE = re.compile(r"\|?b1|[<>|=]?[iuf][1248]")


class PackingError(ValueError):
    """Bytes that are not a message; the reason can be sent to whoever sent them."""


def pack(value: Any) -> bytes:
    """A tree of maps, lists, text, numbers and numpy arrays as bytes.

    Raises:
        TypeError: an array of objects, or something else that has no form on the wire.
    """
    import msgpack

    packed: bytes = msgpack.packb(value, default=_to_map)
    return packed


def unpack(data: bytes) -> Any:
    """The inverse of `pack`. Arrays are read-only views of ``data`` in the machine's byte order.

    Raises:
        PackingError: not msgpack, not all of it, too many entries, or an array that is not plain numbers.
    """
    import msgpack

    entries = 0

    def count(number: int) -> None:
        nonlocal entries
        entries += number
        if entries > MOST_ENTRIES:
            raise PackingError(f"the message has more than {MOST_ENTRIES} entries in lists and maps.")

    def of_list(found: list[Any]) -> list[Any]:
        count(1 + len(found))
        return found

    def of_map(found: dict[Any, Any]) -> Any:
        count(1 + len(found))
        return _from_map(found)

    try:
        return msgpack.unpackb(
            data,
            object_hook=of_map,
            list_hook=of_list,
            ext_hook=_refuse_extension,
            max_array_len=LONGEST_LIST,
            max_map_len=LONGEST_LIST,
        )
    except PackingError:
        raise
    except (ValueError, OverflowError, RecursionError) as error:
        reason = str(error) or type(error).__name__
        raise PackingError(
            f"{len(data)} bytes that are not a msgpack message ({reason}). Send what msgpack.packb makes of the "
            "observation, with arrays as openpi's and starVLA's clients pack them."
        ) from error


def _to_map(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic) and not PLAIN_DTYPE.fullmatch(value.dtype.str):
        raise TypeError(f"an array of dtype {value.dtype} has no form on the wire; booleans, integers and floats have.")
    if isinstance(value, np.ndarray):
        # Of the transposed or strided array's own order: tobytes is C order, whatever the memory is.
        return {b"__ndarray__": True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": list(value.shape)}
    if isinstance(value, np.generic):
        return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}
    raise TypeError(f"{type(value).__name__} has no form on the wire.")


def _from_map(found: dict[Any, Any]) -> Any:
    if b"__ndarray__" in found or "__ndarray__" in found:
        return _array(_field(found, "data"), _dtype(found), _field(found, "shape"))
    if b"__npgeneric__" in found or "__npgeneric__" in found:
        value = _field(found, "data")
        dtype = _dtype(found)
        if not isinstance(value, bool | int | float) or (isinstance(value, float) and dtype.kind != "f"):
            raise PackingError(f"a numpy number of dtype {dtype} has {type(value).__name__} for its data.")
        try:
            with np.errstate(over="ignore"):
                return dtype.type(value)
        except (OverflowError, ValueError) as error:
            raise PackingError(f"{value} is no number of dtype {dtype}.") from error
    return found


def _array(data: Any, dtype: np.dtype[Any], shape: Any) -> np.ndarray:
    if not isinstance(data, bytes):
        raise PackingError(f"an array has {type(data).__name__} for its data; it must be bytes.")
    sizes = shape if isinstance(shape, list) and len(shape) <= MOST_AXES else None
    if sizes is None or not all(type(size) is int and size >= 0 for size in sizes):
        raise PackingError(f"an array's shape must be a list of at most {MOST_AXES} sizes.")
    if math.prod(sizes) * dtype.itemsize != len(data):
        raise PackingError(
            f"an array of shape {sizes} and dtype {dtype} takes {math.prod(sizes) * dtype.itemsize} bytes; "
            f"{len(data)} were sent."
        )
    array: np.ndarray = np.frombuffer(data, dtype).reshape(sizes)
    return array.astype(dtype.newbyteorder("="), copy=False)


def _dtype(found: dict[Any, Any]) -> np.dtype[Any]:
    name = _field(found, "dtype")
    # Before numpy sees it: "O" would read pointers, and "V2000000000" or a structure would be made as told.
    if not isinstance(name, str) or not PLAIN_DTYPE.fullmatch(name):
        shown = repr(name)[:40]
        raise PackingError(
            f"an array has dtype {shown}. Plain booleans, integers and floats are taken, such as |u1 and <f4; objects, "
            "pickles, structures and text are not."
        )
    try:
        return np.dtype(name)
    except TypeError as error:
        raise PackingError(f"there is no dtype {name}.") from error


def _field(found: dict[Any, Any], name: str) -> Any:
    for key in (name.encode(), name):
        if key in found:
            return found[key]
    raise PackingError(f"an array lacks {name!r}; it must have data, dtype and shape.")


def _refuse_extension(code: int, data: bytes) -> Any:
    raise PackingError(f"msgpack extension type {code} is not taken. Send arrays as maps with data, dtype and shape.")
