"""What `rlvla doctor` asks of a machine. Each probe looks at one thing and returns findings with the cure.

What a broken driver could crash or hang runs in a process of its own (`ask`), with a deadline.
"""

import contextlib
import ctypes
import importlib
import importlib.metadata
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from rlvla.config import TrainConfig, WorkerKind
from rlvla_envs.base import EnvSpec, SuiteConfig
from rlvla_envs.suites import SUITES, available_mb, check_ready, suite_module

GB, MB = 1e9, 2**20

LITTLE_MEMORY_MB = 4000
"""`make train` holds 3.1 GB."""
LITTLE_DISK_GB = 2.0
"""Packages apart: datasets, checkpoints and videos of the small recipes, with room to spare."""
RAY_DISK_FULL = 0.95
"""Ray refuses new objects on a disk that is fuller."""

_CHILD = """
import importlib, json, os, sys
descriptor, (module, name), arguments = int(sys.argv[1]), sys.argv[2].split(":"), json.loads(sys.argv[3])
try:
    answer = {"answer": getattr(importlib.import_module(module), name)(*arguments)}
except BaseException as error:
    answer = {"error": str(error).strip() or type(error).__name__, "kind": type(error).__name__}
os.write(descriptor, json.dumps(answer).encode())
# Drivers that crash while they are torn down have answered all the same.
os._exit(0)
"""


class Status(Enum):
    ok = "ok"
    missing = "missing"
    warning = "warning"


@dataclass(frozen=True)
class Finding:
    """One line of the page."""

    name: str
    status: Status
    found: str
    fix: str = ""
    """The command that helps."""
    needed: bool = True
    """By the run that was asked about."""


class ProbeError(RuntimeError):
    """A probe's process crashed, hung, or raised; the message says which."""


@dataclass(frozen=True)
class Played:
    """What a suite said when it was started."""

    spec: EnvSpec
    instruction: str
    process_mb: int | None


# --- asking


def ask(function: str, *arguments: Any, deadline_s: float) -> Any:
    """Call ``function`` ("module:name") with JSON arguments in a new process that finds the same packages.

    Raises:
        ProbeError: it raised, crashed, or did not answer in time. Whatever it started is ended.
    """
    # Anonymous memory: works on a full disk, and unlike a pipe it cannot keep us waiting for whoever inherited it.
    with os.fdopen(os.memfd_create("answer"), "r+b") as said, os.fdopen(os.memfd_create("errors"), "r+b") as noise:
        process = subprocess.Popen(
            [sys.executable, "-c", _CHILD, str(said.fileno()), function, json.dumps(arguments)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=noise,
            pass_fds=(said.fileno(),),
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
        )
        try:
            status = process.wait(deadline_s)
        except subprocess.TimeoutExpired:
            raise ProbeError(f"no answer within {deadline_s:g} s") from None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)
        said.seek(0)
        answer = said.read()
        if not answer:
            noise.seek(0)
            last = noise.read().decode(errors="replace").strip().splitlines()[-1:]
            how = f"ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
            raise ProbeError(": ".join([f"its process was {how}", *last]))
    reply = json.loads(answer)
    if "error" in reply:
        known = reply["kind"] in ("RuntimeError", "ValueError", "OSError")
        raise ProbeError(reply["error"] if known else f"{reply['kind']}: {reply['error']}")
    return reply["answer"]


def guarded(
    name: str, probe: Callable[[], Sequence[Finding]], *, deadline_s: float, needed: bool = True
) -> Sequence[Finding]:
    """The probe's findings; one that says so where it failed or did not end in time. Never raises an Exception.

    A file system that hangs cannot be interrupted, so the probe gets a thread that the program does not wait for.
    """
    done: list[Sequence[Finding]] = []
    failed: list[str] = []

    def run() -> None:
        try:
            done.append(probe())
        except Exception as error:
            failed.append(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(deadline_s)
    if done:
        return done[0]
    what = f"could not be probed: {failed[0]}" if failed else f"no answer within {deadline_s:g} s"
    return [Finding(name, Status.missing, what, fix="rlvla doctor deadline_s=600", needed=needed)]


# --- Python


def probe_python() -> list[Finding]:
    version = sys.version.split()[0]
    return [Finding("python", Status.ok, f"{version}, {sys.executable}")]


def probe_packages(wanted_versions: Mapping[str, str] | None = None) -> list[Finding]:
    """Installed, and new enough for what rlvla's own metadata asks (or ``wanted_versions``, package -> specifier)."""
    from rlvla.run import RECORDED_PACKAGES

    wrong = []
    versions = {}
    for name, wanted in (_requirements() if wanted_versions is None else wanted_versions).items():
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append((name, wanted, "absent"))
            continue
        if not _satisfies(versions[name], wanted):
            wrong.append((name, wanted, versions[name]))
    found = ", ".join(f"{name} {versions[name]}" for name in RECORDED_PACKAGES if name in versions)
    if not wrong:
        return [Finding("packages", Status.ok, found)]
    names = " ".join(f'"{name}{wanted}"' for name, wanted, _ in wrong)
    problem = ", ".join(f"{name} is {has}" + (f", needs {wanted}" if wanted else "") for name, wanted, has in wrong)
    return [Finding("packages", Status.missing, problem, fix=f"{sys.executable} -m pip install {names}")]


def _requirements() -> dict[str, str]:
    """Package -> version specifier, as rlvla was installed with; the names alone where it was not installed."""
    from rlvla.run import RECORDED_PACKAGES

    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        lines = importlib.metadata.requires("rlvla") or []
        # "extra ==" marks what only developers need.
        return {
            match[1]: match[2].strip()
            for line in lines
            if "extra" not in line and (match := re.match(r"([\w.-]+)([^;]*)", line))
        }
    return {name: "" for name in RECORDED_PACKAGES if name != "rlvla"}


def _satisfies(version: str, specifier: str) -> bool:
    """PEP 440 without pre-releases: enough for our own requirements."""

    def numbers(text: str) -> list[int]:
        return [int(part) for part in re.findall(r"\d+", text.split("+")[0])]

    for clause in filter(None, specifier.split(",")):
        match = re.match(r"\s*(>=|<=|==|<|>)\s*(\S+)", clause)
        if match is None:
            continue
        have, want = numbers(version), numbers(match[2])
        if not {">=": have >= want, "<=": have <= want, "==": have == want, "<": have < want, ">": have > want}[
            match[1]
        ]:
            return False
    return True


# --- cores and memory


def probe_cores(config: TrainConfig) -> list[Finding]:
    """A container may run on fewer cores than it sees, and a run starts an actor for each it sees."""
    seen = os.cpu_count() or 1
    usable = min(len(os.sched_getaffinity(0)), _cgroup_cores() or seen, seen)
    if usable < seen and not config.workers.num_actors:
        return [
            Finding(
                "cores",
                Status.warning,
                f"{usable:g} of the {seen} that are seen; a run would start {seen} simulator processes",
                fix=f"rlvla train workers.num_actors={max(1, int(usable))} ...",
            )
        ]
    return [Finding("cores", Status.ok, f"{usable:g}")]


def _cgroup_cores() -> float | None:
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return int(quota) / int(period)
    return None


def probe_memory() -> list[Finding]:
    free = available_mb()
    if free is None:
        return [Finding("memory", Status.warning, "the system does not say how much is free", fix="free -m")]
    if free < LITTLE_MEMORY_MB:
        return [
            Finding(
                "memory",
                Status.warning,
                f"{free * MB / GB:.1f} GB free; `make train` holds 3.1",
                fix="rlvla train workers.num_actors=1 ...",
            )
        ]
    return [Finding("memory", Status.ok, f"{free * MB / GB:.1f} GB free")]


# --- disks


def probe_disk(name: str, folder: Path, needed_bytes: float, key: str = "output") -> list[Finding]:
    """Whether a folder's disk takes a file, and has room."""
    place = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
    elsewhere = f"rlvla train {key}=/path/on/another/disk ..."
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(bytes(2**20))
            file.flush()
    except OSError as error:
        return [Finding(name, Status.missing, f"{place} takes no file: {error.strerror or error}", fix=elsewhere)]
    free = shutil.disk_usage(place).free
    if free < needed_bytes:
        said = f"{free / GB:.1f} GB free at {place}, {needed_bytes / GB:.1f} are needed"
        return [Finding(name, Status.missing, said, fix=elsewhere)]
    return [Finding(name, Status.ok, f"{free / GB:.1f} GB free at {place}")]


def probe_ray_disk(needed: bool) -> list[Finding]:
    place = Path(os.environ.get("RAY_TMPDIR", "/tmp"))
    usage = shutil.disk_usage(place)
    if usage.used / usage.total > RAY_DISK_FULL:
        said = f"{place} is {usage.used / usage.total:.0%} full; Ray stops storing at {RAY_DISK_FULL:.0%}"
        return [Finding("ray disk", Status.missing, said, fix="export RAY_TMPDIR=/path/on/another/disk", needed=needed)]
    return [Finding("ray disk", Status.ok, f"{usage.free / GB:.1f} GB free at {place}", needed=needed)]


def probe_shared_memory(needed: bool, folder: Path = Path("/dev/shm")) -> list[Finding]:
    from rlvla.cluster import OBJECT_STORE_BYTES

    free = shutil.disk_usage(folder).free if folder.is_dir() else 0
    said = f"{free / GB:.2f} GB free at {folder}"
    if free < OBJECT_STORE_BYTES:
        said += f"; Ray's object store of {OBJECT_STORE_BYTES / GB:.2f} GB goes to the disk instead, and is slower"
        return [Finding("shm", Status.warning, said, fix="docker run --shm-size=1g ...", needed=needed)]
    return [Finding("shm", Status.ok, said, needed=needed)]


# --- devices


def gpus() -> dict[str, Any]:
    """For `ask`: what torch sees."""
    import torch

    devices = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        free, total = torch.cuda.mem_get_info(index)
        with torch.cuda.device(index):
            bf16 = torch.cuda.is_bf16_supported()
        devices.append({"name": torch.cuda.get_device_name(index), "free": free, "total": total, "bf16": bf16})
    return {"build": torch.version.cuda, "devices": devices}


def probe_gpu(config: TrainConfig, deadline_s: float, seen: list[dict[str, Any]]) -> list[Finding]:
    """``seen`` gets torch's devices."""
    needed = config.device.startswith("cuda")
    try:
        said = ask("rlvla.probes:gpus", deadline_s=deadline_s)
    except ProbeError as error:
        return [Finding("gpu", Status.missing, str(error), fix="nvidia-smi", needed=needed)]
    seen += said["devices"]
    index = int(config.device.partition(":")[2] or 0) if needed else 0
    if index < len(seen):
        return [
            Finding(
                "gpu",
                Status.ok,
                f"cuda:{i} {device['name']}, {device['free'] / GB:.1f} of {device['total'] / GB:.1f} GB free, "
                f"{'bf16' if device['bf16'] else 'no bf16'}",
                needed=needed,
            )
            for i, device in enumerate(seen)
        ]
    if Path("/proc/driver/nvidia/version").exists():
        build = f"built for CUDA {said['build']}" if said["build"] else "built for the CPU"
        cure = f'{sys.executable} -m pip install --force-reinstall "torch>=2.7"'
        found = f"the machine has an NVIDIA driver, but torch is {build} and sees {len(seen)} GPUs"
        return [Finding("gpu", Status.missing if needed else Status.warning, found, fix=cure, needed=needed)]
    if needed:
        found = f"device={config.device}, and torch sees {len(seen)} GPUs"
        return [Finding("gpu", Status.missing, found, fix="rlvla train device=cpu ...")]
    return [Finding("gpu", Status.ok, "none; torch runs on the CPU", needed=False)]


def probe_vulkan(needed: bool, deadline_s: float) -> list[Finding]:
    """A picture of a box by a software driver, and by a GPU's."""
    drawn, failed = [], []
    for device in ("cpu", "cuda"):
        try:
            right = ask("rlvla_envs.trial:draw", device, deadline_s=deadline_s)["right"]
        except ProbeError as error:
            failed.append(f"{device}: {str(error).splitlines()[0]}")
            continue
        if right:
            drawn.append(device)
        else:
            failed.append(f"{device}: the picture is wrong")
    if drawn:
        return [Finding("vulkan", Status.ok, f"draws on {' and '.join(drawn)}", needed=needed)]
    said = f"cannot draw ({'; '.join(failed)}); Mesa 24.3 or newer is needed for lavapipe"
    return [Finding("vulkan", Status.missing, said, fix=_vulkan_fix(), needed=needed)]


def _vulkan_fix() -> str:
    script = _setup_script()
    release = Path("/etc/os-release")
    debian = release.is_file() and re.search(r'^ID="?debian"?$', release.read_text(), re.MULTILINE)
    if script and debian:
        return f"{'' if os.geteuid() == 0 else 'sudo '}{script} --vulkan"
    return "sudo apt-get install libvulkan1 mesa-vulkan-drivers"


def load_library(name: str) -> None:
    """For `ask`: load a shared library; raises OSError."""
    ctypes.CDLL(name)


def probe_mujoco(needed: bool, deadline_s: float) -> list[Finding]:
    """The OpenGL that MuJoCo would draw with: the one MUJOCO_GL names, or OSMesa, which needs no device."""
    chosen = os.environ.get("MUJOCO_GL", "osmesa").lower()
    candidates, package = {
        "egl": (["libEGL.so.1"], "libegl1"),
        "glfw": (["libglfw.so.3"], "libglfw3"),
    }.get(chosen, (["libOSMesa.so.8", "libOSMesa.so.6", "libOSMesa.so"], "libosmesa6"))
    shown = f"MUJOCO_GL={chosen}" if "MUJOCO_GL" in os.environ else "MUJOCO_GL is not set; osmesa"
    last = ""
    for library in candidates:
        try:
            ask("rlvla.probes:load_library", library, deadline_s=deadline_s)
        except ProbeError as error:
            last = last or str(error)
            continue
        return [Finding("mujoco gl", Status.ok, f"{shown}, {library} loads", needed=needed)]
    return [
        Finding("mujoco gl", Status.missing, f"{shown}: {last}", fix=f"sudo apt-get install {package}", needed=needed)
    ]


# --- Ray


def probe_ray(needed: bool, deadline_s: float) -> list[Finding]:
    try:
        said = ask("rlvla.cluster:check_ray", deadline_s, deadline_s=deadline_s)
    except ProbeError as error:
        fix = "unset RAY_ADDRESS" if os.environ.get("RAY_ADDRESS") else "rlvla train workers.kind=local ..."
        return [Finding("ray", Status.missing, f"an actor does not answer: {error}", fix=fix, needed=needed)]
    token = Path(said["token"])
    mode = token.stat().st_mode & 0o777
    if mode & 0o077:
        found = f"{said['version']} works, but others can read its token: mode {mode:04o}"
        return [Finding("ray", Status.warning, found, fix=f"chmod 600 {token}", needed=needed)]
    return [Finding("ray", Status.ok, f"{said['version']}, an actor answers; token file {mode:04o}", needed=needed)]


# --- suites


def renderer(suite: str) -> str:
    """What a suite draws with: "vulkan", "mujoco", or nothing that needs a driver."""
    return str(getattr(suite_module(suite), "RENDERER", ""))


def probe_suite(name: str, chosen: SuiteConfig) -> list[Finding]:
    """Packages and files of a suite; of the chosen one with its options, of another for all its tasks."""
    needed = name == chosen.name
    config = chosen if needed else _default(name)
    try:
        ready = check_ready(config)
    except ImportError as error:
        fix = f"{sys.executable} -m pip install {error.name}" if error.name else _reinstall()
        return [Finding(f"suite {name}", Status.missing, str(error), fix=fix, needed=needed)]
    except ValueError as error:
        fix = getattr(error, "fix", "rlvla collect --help")
        return [Finding(f"suite {name}", Status.missing, str(error).splitlines()[0], fix=fix, needed=needed)]
    if ready.notes:
        said = "; ".join(ready.notes)
        return [Finding(f"suite {name}", Status.warning, said, fix=ready.fix, needed=needed)]
    return [Finding(f"suite {name}", Status.ok, "packages and files are here", needed=needed)]


def _default(name: str) -> SuiteConfig:
    """A suite as its YAML has it."""
    from rlvla.compose import compose, group_choices

    if name not in group_choices("collect")["suite"]:
        return SuiteConfig(name=name)
    config: SuiteConfig = compose("collect", [f"suite={name}"]).suite
    return config


def probe_play(suite: SuiteConfig, deadline_s: float, played: list[Played]) -> list[Finding]:
    """Start the chosen suite, play a chunk of it, look at the picture. ``played`` gets what it said."""
    name = f"play {suite.name}"
    try:
        said = ask("rlvla_envs.trial:play", asdict(suite), deadline_s=deadline_s)
    except ProbeError as error:
        fix = f"rlvla collect suite={suite.name} suite.task={suite.task} episodes=1 --debug"
        return [Finding(name, Status.missing, str(error).splitlines()[0], fix=fix)]
    played.append(Played(EnvSpec.from_dict(said["spec"]), said["instruction"], said["peak_mb"]))
    if said["blank"]:
        found = f"{suite.task} runs, but camera {', '.join(said['blank'])} shows one colour only"
        return [Finding(name, Status.warning, found, fix=_vulkan_fix())]
    memory = f"; its process took {said['peak_mb']} MB" if said["peak_mb"] else ""
    return [Finding(name, Status.ok, f"{suite.task}: one chunk played, a picture seen{memory}")]


# --- cures


def _setup_script() -> Path | None:
    script = Path(__file__).resolve().parent.parent / "scripts" / "setup.sh"
    return script if script.is_file() else None


def _reinstall() -> str:
    """rlvla with its packages: from the checkout, or as a package."""
    script = _setup_script()
    return f"{script} --packages" if script else f"{sys.executable} -m pip install --upgrade rlvla"


def needs_ray(config: TrainConfig) -> bool:
    return config.workers.kind is WorkerKind.ray


def suite_names(chosen: SuiteConfig) -> list[str]:
    """The chosen suite first."""
    return [chosen.name, *(name for name in SUITES if name != chosen.name)]
