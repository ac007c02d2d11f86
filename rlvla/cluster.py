"""Ray: an embedded one for a run alone, or a cluster that is already there. Both are spoken to with a token."""

import logging
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from rlvla.config import ClusterConfig, ConfigError

KNOCK_S = 10
PROBE_S = 60
OBJECT_STORE_BYTES = 512 * 1024**2
"""Of the embedded Ray, in shared memory: replies pass through it, nothing stays."""


def connect(config: ClusterConfig, num_actors: int) -> Any:
    """Start or join Ray, once a process.

    Raises:
        ConfigError: the cluster cannot be reached, or lets in whoever asks.
    """
    # Read when Ray starts: no idle workers, and a token that only we can read.
    os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
    # Ray starts workers at low priority, and any other load on the machine would starve the simulators.
    os.environ.setdefault("RAY_worker_niceness", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    if config.token_file is not None:
        os.environ["RAY_AUTH_TOKEN_PATH"] = str(_private(Path(config.token_file)))
    else:
        os.environ.setdefault("RAY_AUTH_TOKEN_PATH", str(own_token()))
    running = sys.modules.get("ray")
    if running is not None and running.is_initialized():
        return cast(Any, running)
    if config.address is not None:
        # Before Ray is imported, which reads its way of authentication once.
        _require_listener(config.address)
        if answers_without_token(config.address):
            if not config.allow_unauthenticated:
                raise ConfigError(
                    f"the Ray cluster at {config.address} lets in whoever asks, and whoever is in can run code on all "
                    "its machines. Start its nodes with RAY_AUTH_MODE=token and the token of cluster.token_file, or "
                    "accept the risk with cluster.allow_unauthenticated=true."
                )
            # What is started by a token's holder does not run where there are no tokens.
            os.environ["RAY_AUTH_MODE"] = "disabled"
    import ray

    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if config.address is None:
        with _our_own_sigterm():
            started: Any = ray.init(
                # Without it Ray joins whatever cluster it finds on the machine.
                address="local",
                num_cpus=max(num_actors, os.cpu_count() or 1),
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                **quiet,
            )
        _end_with_this_process(started.address_info["session_dir"])
        return cast(Any, ray)
    try:
        with _our_own_sigterm():
            ray.init(address=config.address, **quiet)
    except (ConnectionError, RuntimeError) as error:
        raise ConfigError(
            f"cannot join the Ray cluster at {config.address}: {_first_line(error)}. cluster.address is host:port of "
            f"its head (ray start --head --port=6379), the token is read from {os.environ['RAY_AUTH_TOKEN_PATH']}; "
            "choose another with cluster.token_file."
        ) from error
    return cast(Any, ray)


@contextmanager
def _our_own_sigterm() -> Iterator[None]:
    """Ray puts a handler of its own in ours' place, under which a driver ends with SIGABRT."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


_watchers: list["subprocess.Popen[bytes]"] = []
"""One for each Ray that was started here. Their input is open as long as this process lives."""


def _end_with_this_process(session: str) -> None:
    """See `rlvla.ray_remains`. In a session of its own: neither Ctrl-C nor the end of our process group reaches it."""
    if not sys.platform.startswith("linux"):
        return
    _forget_watchers()
    program = str(Path(__file__).with_name("ray_remains.py"))
    logs = str(Path(session).resolve() / "logs")
    _watchers.append(
        subprocess.Popen(
            [sys.executable, "-I", "-S", program, logs],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    )


def _forget_watchers() -> None:
    """After Ray's orderly end they have nothing to do and are told so."""
    while _watchers:
        watcher = _watchers.pop()
        watcher.kill()
        watcher.communicate()


class _Echo:
    """The smallest actor, for `check_ray`."""

    def answer(self, word: str) -> str:
        return word


def check_ray(timeout_s: float) -> dict[str, Any]:
    """Start Ray as a run does, ask an actor, stop it. For `rlvla doctor`, in a process of its own.

    Returns:
        ``version`` of Ray, ``token`` (the path of its token file).

    Raises:
        RuntimeError: Ray or the actor did not start or answer.
    """
    ray = connect(ClusterConfig(), 1)
    try:
        actor = ray.remote(num_cpus=0, max_restarts=0, max_task_retries=0)(_Echo).remote()
        if ray.get(actor.answer.remote("well"), timeout=timeout_s) != "well":
            raise RuntimeError("an actor of Ray gave a wrong answer.")
        return {"version": ray.__version__, "token": os.environ["RAY_AUTH_TOKEN_PATH"]}
    finally:
        disconnect(ray)


def disconnect(ray: Any) -> None:
    """Leave Ray, and end it where it was started for this run. An actor lives in a Ray that is not its own."""
    if ray.get_runtime_context().get_actor_id() is None:
        ray.shutdown()
        _forget_watchers()


def node_address() -> str:
    """What other machines of the cluster reach this one by; inside an actor."""
    import ray

    return str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]


def own_token() -> Path:
    """Ray's own token file is readable by everybody on the machine; this one is not."""
    folder = Path(os.environ.get("XDG_STATE_HOME", Path.home() / ".local" / "state")) / "rlvla"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = folder / "ray_token"
    if not path.exists():
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_hex(32))
    return path


def answers_without_token(address: str) -> bool:
    """Whether a stranger can join: tried, in a process of its own, for nothing that a cluster says of itself proves
    it."""
    program = "import sys, ray; ray.init(address=sys.argv[1], log_to_driver=False, logging_level='CRITICAL')"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_AUTH")}
    try:
        stranger = subprocess.run(
            [sys.executable, "-c", program, address],
            env=environment | {"RAY_AUTH_MODE": "disabled"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=PROBE_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return False
    return stranger.returncode == 0


def _require_listener(address: str) -> None:
    """Ray itself knocks for minutes at a door that is not there."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ConfigError(f"cluster.address is {address!r}; it must be host:port of the head of a Ray cluster.")
    try:
        socket.create_connection((host, int(port)), timeout=KNOCK_S).close()
    except OSError as error:
        raise ConfigError(
            f"nothing answers at cluster.address={address}: {error}. Is the head running (ray start --head "
            "--port=6379), and is the port open between the two machines?"
        ) from error


def _private(path: Path) -> Path:
    if not path.is_file():
        raise ConfigError(
            f"cluster.token_file is {path}, which is no file. Put the cluster's token there, with mode 0600."
        )
    mode = path.stat().st_mode & 0o777
    if mode & 0o077:
        raise ConfigError(
            f"cluster.token_file {path} has mode {mode:04o}: others on this machine can read the cluster's token. "
            f"Run: chmod 600 {path}"
        )
    return path


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__
