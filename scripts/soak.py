"""Train for a long time while simulators and the whole run are killed at random, and compare with a run left in peace.

    .venv/bin/python scripts/soak.py --iterations 200

On the toy, with simulators and a spare in Ray actors. Every ``--every`` seconds a random one of them is killed or
stopped, and every tenth time the whole run, which is then started again. The weights must be those of the run left in
peace, the driver must not grow, and nothing may be left running. The last line on stdout is JSON; the exit status is 1
if a promise was broken. Linux only.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from measure_memory import descendants, inheriting, name_of

from rlvla.run import CLOCK, versions

HOST = "ray::SimulatorHost"
WORKERS = [
    "workers.num_actors=2",
    "workers.envs_per_actor=4",
    "workers.timeout_s=10",
    "workers.max_restarts_per_hour=9999",
    "workers.spare=true",
]
TRAIN = ["algo.min_successes=0", "algo.epochs=2", "eval.trials=16", "eval.videos=0", "eval.shuffled_images=false"]
MAX_GROWTH_MB, MAX_NEW_FILES = 40, 16
MIN_QUARTER = 20
SETTLED = 3
"""Iterations of a life after which the driver has allocated what it needs."""
MARK = f"RLVLA_SOAK={os.getpid()}"
"""Other runs on this machine are none of ours."""


@dataclass
class Watched:
    """What was seen of the driver in one life, and what was done to the run."""

    begun_at: int = 0
    """Iterations that were done before."""
    memory_mb: list[float] = field(default_factory=list)
    files: list[int] = field(default_factory=list)
    hosts: list[int] = field(default_factory=list)
    kills: int = 0
    stops: int = 0
    runs: int = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=200)
    parser.add_argument("--every", type=float, default=12.0, help="seconds between two disturbances")
    parser.add_argument("--minutes", type=float, default=60.0, help="give up after so long")
    parser.add_argument("--seed", type=int, default=0, help="of what is killed")
    parser.add_argument("--output", type=Path, default=Path("runs/soak"))
    arguments = parser.parse_args()
    shutil.rmtree(arguments.output, ignore_errors=True)
    policy = make_policy(arguments.output)
    settings = ["suite=toy", f"policy={policy}", f"iterations={arguments.iterations}", "episodes_per_iteration=16"]
    peace, war = arguments.output / "peace", arguments.output / "war"
    until = time.monotonic() + 60 * arguments.minutes
    local = ["workers.kind=local", "workers.num_actors=1", "workers.envs_per_actor=8"]
    rlvla("train", *settings, *TRAIN, *local, f"output={peace}")
    lives = disturb([*settings, *TRAIN, *WORKERS], war, arguments.every, arguments.seed, until)
    time.sleep(5)
    left = [name_of(pid) for pid in inheriting(MARK)]
    rows = [json.loads(line) for line in (war / "metrics.jsonl").read_text().splitlines()]
    iterations = [row for row in rows if row["kind"] == "iteration"]
    found = {
        "cpu": versions()["cpu"],
        "iterations": len(iterations),
        "simulators_killed": sum(life.kills for life in lives),
        "simulators_stopped": sum(life.stops for life in lives),
        "runs_killed": len(lives) - 1,
        "simulators_replaced": sum(row["env/restarts"] for row in iterations),
        "median_recovery_s": median(
            [row["time/recovery_s"] / row["env/restarts"] for row in iterations if row["env/restarts"]]
        ),
        "same_weights": digest(peace) == digest(war),
        "driver_growth_mb": max(growth(life.memory_mb) for life in lives),
        "driver_new_files": max(growth(life.files) for life in lives),
        "most_simulators": max((max(life.hosts, default=0) for life in lives), default=0),
        "left_running": left,
    }
    found["kept_its_promises"] = bool(
        found["same_weights"]
        and found["iterations"] == arguments.iterations
        and found["driver_growth_mb"] <= MAX_GROWTH_MB
        and found["driver_new_files"] <= MAX_NEW_FILES
        and not found["left_running"]
    )
    print(json.dumps(found))
    sys.exit(not found["kept_its_promises"])


def make_policy(root: Path) -> Path:
    """An untrained policy for the toy."""
    local = ["suite=toy", "workers.kind=local", "workers.num_actors=1"]
    rlvla("collect", *local, "episodes=4", f"output={root / 'data'}")
    rlvla(
        "sft",
        "suite=toy",
        "policy=qwen_vla_toy",
        "steps=20",
        "batch_size=8",
        f"dataset={root / 'data'}",
        f"output={root / 'sft'}",
    )
    return root / "sft" / "policy"


def rlvla(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "rlvla.cli", *arguments], check=True, stdout=subprocess.DEVNULL)


def disturb(settings: list[str], run: Path, every: float, seed: int, until: float) -> list[Watched]:
    """Run to the end, with trouble; the lives of the run, the last one undisturbed to its end."""
    chance, lives = random.Random(seed), [Watched()]
    settings = [*settings, f"output={run}"]
    began, process = time.time(), start(settings)
    count, next_time = 0, time.monotonic() + every
    while process.poll() is None:
        time.sleep(0.5)
        if time.monotonic() > until:
            os.killpg(process.pid, signal.SIGKILL)
            sys.exit("the soak took longer than --minutes")
        hosts = look(process.pid, lives[-1], settled=done(run) >= lives[-1].begun_at + SETTLED)
        if not works(run, began):
            # Whoever kills simulators faster than they start gets a run that gives up, and that is right.
            next_time = time.monotonic() + every
        if time.monotonic() < next_time or not hosts:
            continue
        next_time = time.monotonic() + every
        count += 1
        if count % 10 == 0:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            lives.append(Watched(begun_at=done(run)))
            began, process = time.time(), start(settings)
            continue
        with suppress(ProcessLookupError):
            stop = chance.random() < 0.25
            os.kill(chance.choice(hosts), signal.SIGSTOP if stop else signal.SIGKILL)
            lives[-1].stops += stop
            lives[-1].kills += not stop
    if process.returncode:
        sys.exit(f"the disturbed run ended with status {process.returncode}")
    return lives


def start(settings: list[str]) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "rlvla.cli", "train", *settings]
    name, _, value = MARK.partition("=")
    environment = os.environ | {name: value}
    return subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, env=environment)


def works(run: Path, since: float) -> bool:
    """Whether a run has played episodes since then: it writes its clock down."""
    with suppress(OSError):
        return (run / CLOCK).stat().st_mtime > since
    return False


def done(run: Path) -> int:
    """Iterations that are logged."""
    path = run / "metrics.jsonl"
    return path.read_text().count('"kind": "iteration"') if path.exists() else 0


def look(driver: int, life: Watched, *, settled: bool) -> list[int]:
    """Note what the driver holds, once it has all it needs; the simulators it has."""
    hosts = [pid for pid in descendants(driver) if name_of(pid).startswith(HOST)]
    with suppress(OSError, StopIteration):
        life.hosts.append(len(hosts))
        if not settled:
            return hosts
        status = Path(f"/proc/{driver}/status").read_text().splitlines()
        life.memory_mb.append(int(next(line for line in status if line.startswith("VmRSS")).split()[1]) / 1024)
        life.files.append(len(list(Path(f"/proc/{driver}/fd").iterdir())))
    return hosts


def growth(seen: list[float] | list[int]) -> float:
    """From the first quarter of a settled life to the last; 0 for a life too short to tell."""
    quarter = len(seen) // 4
    if quarter < MIN_QUARTER:
        return 0.0
    return statistics.median(seen[-quarter:]) - statistics.median(seen[:quarter])


def median(values: list[float]) -> float | None:
    return round(statistics.median(values), 2) if values else None


def digest(run: Path) -> str:
    return hashlib.sha256((run / "policy" / "model.safetensors").read_bytes()).hexdigest()


if __name__ == "__main__":
    main()
