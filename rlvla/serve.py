"""`rlvla serve`: a policy for clients that speak openpi's or starVLA's websocket protocol.

The first frame of a connection is ours, msgpack with what the policy is; then every message of the client is answered
by one of ours. A message that does not fit is answered by what is wrong with it.
"""

import asyncio
import contextlib
import errno
import itertools
import json
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

from rlvla.config.checks import ConfigError
from rlvla.config.serve import ServeConfig, is_loopback
from rlvla.seeding import Stream
from rlvla.serve_decisions import Decider, Key
from rlvla.serve_messages import Answered, Layout, Row, answer, refusal
from rlvla.serve_packing import pack, unpack

CLOSE_TIMEOUT_S = 2.0
HEALTH = "/healthz"


def run(config: ServeConfig) -> dict[str, Any]:
    """Serve ``config.policy`` until Ctrl-C or SIGTERM; one line of JSON on stdout says that it listens, and where.

    Raises:
        ConfigError: the port is taken, the policy does not fit the options, or a library is missing.
        KeyboardInterrupt: the orderly end.
    """
    _require_libraries()
    from rlvla.policies.embodiments import named
    from rlvla.policies.folder import load_policy, read_specs
    from rlvla.run import pick_device

    folder = Path(config.policy)
    specs = read_specs(folder)
    chosen = named(specs, config.embodiment)
    layout = Layout.of(config, specs[chosen])
    device = pick_device(config.device)
    # Before the weights: they may take minutes, after which nobody wants to hear that the port is taken.
    with _bound(config) as bound:
        from rlvla.acting import Actor

        policy = load_policy(folder, device)
        policy.embody(chosen)
        actor = Actor(policy, block=config.inference_batch, device=device)
        if not is_loopback(config.host):
            _say(
                f"WARNING: {config.host} can be reached from other machines, and there is neither a password nor "
                "encryption: everyone who reaches the port can use this policy. An SSH tunnel to 127.0.0.1 is safer."
            )
        number = asyncio.run(_serve(config, layout, actor, bound))
    _say("closed the connections")
    # The handlers of the command line are back in their places: this is Ctrl-C or SIGTERM to them.
    signal.raise_signal(number)
    return {}


async def _serve(config: ServeConfig, layout: Layout, actor: Any, bound: socket.socket) -> int:
    """The number of the signal that ended it."""
    from websockets.asyncio.server import ServerConnection, serve
    from websockets.exceptions import ConnectionClosed
    from websockets.frames import CloseCode

    decider = Decider(actor, seed=config.seed, temperature=config.temperature)
    numbers = itertools.count()
    connected = 0

    async def handle(connection: ServerConnection) -> None:
        nonlocal connected
        if connected >= config.max_clients:
            # Counted here: between the handshake and this line others may have come.
            await connection.close(CloseCode.TRY_AGAIN_LATER, f"{connected} clients are connected: max_clients")
            return
        number = next(numbers)
        connected += 1
        _say(f"client {number} connected from {_address(connection.remote_address)}")
        session = _Session(number, layout, decider)
        try:
            await connection.send(pack(layout.metadata()))
            async for data in connection:
                await connection.send(await session.reply(data))
        except ConnectionClosed:
            pass
        finally:
            connected -= 1
            _say(f"client {number} left after {session.decisions} decisions and {session.refusals} refused messages")

    def answer_health(connection: ServerConnection, request: Any) -> Any:
        return connection.respond(200, "OK\n") if request.path == HEALTH else None

    async with _policy_at_work(decider):
        with _caught_signals() as stopped:
            try:
                server = await serve(
                    handle,
                    sock=bound,
                    process_request=answer_health,
                    # A page in a browser may connect to this machine's ports, and says so; a robot has no origin.
                    origins=[None],
                    # As both clients ask for. It also keeps a small frame from becoming a large message.
                    compression=None,
                    max_size=int(config.max_message_mb * 2**20),
                    # A simulator may keep its process busy for a minute: pings, but no deadline for their answers.
                    ping_timeout=None,
                    close_timeout=CLOSE_TIMEOUT_S,
                )
            except OSError as error:
                raise _taken(config, error) from error
            url = f"ws://{_address(bound.getsockname())}"
            _announce(config, layout, url)
            print(json.dumps({"url": url, "policy": config.policy, **layout.metadata()}), flush=True)
            number = await stopped
            server.close()
            await server.wait_closed()
    return number


class _Session:
    """One connection: it numbers its decisions."""

    def __init__(self, number: int, layout: Layout, decider: Decider) -> None:
        self._number, self._layout, self._decider = number, layout, decider
        self._keyed = 0
        self.decisions = 0
        self.refusals = 0

    async def reply(self, data: bytes | str) -> bytes | str:
        """The answer to one frame; never raises for what a client or the policy did."""
        came = time.monotonic()
        message: Any = None
        try:
            if isinstance(data, str):
                raise ValueError("a text frame came; messages are binary frames of msgpack.")
            message = unpack(data)
            request = self._layout.read(message)
            if isinstance(request, Answered):
                return pack(request.reply)
            keys = [self._key(row) for row in request.rows]
            decided = await self._decider.decide(
                [(row.observation, key) for row, key in zip(request.rows, keys, strict=True)]
            )
            self.decisions += len(decided)
            actions = np.stack([one.actions for one in decided])
            seconds = max(one.seconds for one in decided)
            return pack(answer(request, actions, decided_s=seconds, waited_s=time.monotonic() - came))
        except (ValueError, RuntimeError) as error:
            self.refusals += 1
            said = refusal(message, str(error) or type(error).__name__)
            return said if isinstance(said, str) else pack(said)

    def _key(self, row: Row) -> Key:
        if row.noise_key is not None:
            return Key(Stream.EVALUATION, *row.noise_key)
        key = Key(Stream.SERVED, self._number, self._keyed)
        self._keyed += 1
        return key


@contextlib.asynccontextmanager
async def _policy_at_work(decider: Decider) -> AsyncIterator[None]:
    work = asyncio.create_task(decider.run())
    try:
        yield
    finally:
        work.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await work
        decider.close()


@contextlib.contextmanager
def _caught_signals() -> Iterator["asyncio.Future[int]"]:
    """The first SIGINT or SIGTERM as a future: an exception in the middle of the loop would leave connections open."""
    loop = asyncio.get_running_loop()
    stopped: asyncio.Future[int] = loop.create_future()

    def stop(number: int, _: FrameType | None) -> None:
        loop.call_soon_threadsafe(lambda: None if stopped.done() else stopped.set_result(number))

    # A script's background jobs ignore Ctrl-C, and so shall the server.
    heard = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, stop) for number in heard}
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _bound(config: ServeConfig) -> Iterator[socket.socket]:
    """A socket that has the port and does not listen yet, so that clients go on waiting."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise ConfigError(
            f"host is {config.host!r}, which is no address here ({error}). Try host=127.0.0.1."
        ) from error
    with socket.socket(family, kind, protocol) as bound:
        # A port that a server left a minute ago is free again.
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            bound.bind(address)
        except OSError as error:
            raise _taken(config, error) from error
        yield bound


def _taken(config: ServeConfig, error: OSError) -> ConfigError:
    if error.errno == errno.EADDRINUSE:
        return ConfigError(
            f"port is {config.port}, on which another program listens at {config.host}. Stop that one, choose another "
            "with port=N, or let port=0 find a free one."
        )
    return ConfigError(
        f"cannot listen on {config.host}, port {config.port}: {error.strerror or error}. Choose another host or port; "
        "port=0 finds a free one."
    )


def _require_libraries() -> None:
    missing = []
    for name in ("msgpack", "websockets"):
        try:
            __import__(name)
        except ImportError:
            missing.append(name)
    if missing:
        raise ConfigError(
            f"rlvla serve needs {' and '.join(missing)}, which this Python lacks. Install what it needs: "
            "pip install 'rlvla[serve]'."
        )


def _announce(config: ServeConfig, layout: Layout, url: str) -> None:
    _say(f"serving {config.policy} at {url}; Ctrl-C ends it")
    _say("an observation has")
    for key, must in layout.observation().items():
        _say(f"  {key}: {must}")
    _say(f"starVLA's examples have image: a list of {', '.join(layout.image_order)}; lang; {_has_state(layout)}")
    spec = layout.spec
    _say(f"an answer has {spec.chunk_size} actions of {', '.join(spec.action_names())}, at {spec.control_hz:g} Hz")


def _has_state(layout: Layout) -> str:
    return "state" if layout.state_key else "no state"


def _address(address: Any) -> str:
    host, port = address[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
