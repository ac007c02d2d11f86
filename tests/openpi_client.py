"""A client as openpi's and starVLA's are: the same websocket library, the same frames, packed without rlvla."""

from types import TracebackType
from typing import Any, Self

import msgpack
import numpy as np
from websockets.sync.client import connect


def _packed(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return {b"__ndarray__": True, b"data": value.tobytes("C"), b"dtype": value.dtype.str, b"shape": value.shape}
    if isinstance(value, np.generic):
        return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}
    raise TypeError(type(value))


def _unpacked(found: dict[Any, Any]) -> Any:
    if b"__ndarray__" in found:
        return np.ndarray(tuple(found[b"shape"]), np.dtype(found[b"dtype"]), found[b"data"])
    if b"__npgeneric__" in found:
        return np.dtype(found[b"dtype"]).type(found[b"data"])
    return found


def packb(value: Any) -> bytes:
    packed: bytes = msgpack.packb(value, default=_packed)
    return packed


def unpackb(data: bytes) -> Any:
    return msgpack.unpackb(data, object_hook=_unpacked)


class Client:
    """One connection."""

    def __init__(self, url: str, **options: Any) -> None:
        # The clients call connect and keep what it returns, which websockets 17 wants entered.
        self._opened = connect(url, compression=None, max_size=None, **options)
        self.connection = self._opened.__enter__()
        self.metadata = unpackb(self._received())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._opened.__exit__(kind, error, trace)

    def infer(self, message: Any) -> Any:
        """The reply; RuntimeError for a text frame, as openpi's raises it."""
        return self.exchange(packb(message))

    def exchange(self, frame: bytes | str) -> Any:
        self.connection.send(frame)
        reply = self.connection.recv(timeout=120)
        if isinstance(reply, str):
            raise RuntimeError(reply)
        return unpackb(reply)

    def _received(self) -> bytes:
        first = self.connection.recv(timeout=120)
        assert isinstance(first, bytes)
        return first
