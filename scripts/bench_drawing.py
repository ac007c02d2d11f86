"""Speed of LIBERO and Meta-World: cameras drawn once a chunk, against after every action as the benchmark draws them.

    .venv/bin/python scripts/bench_drawing.py [--suite libero_object] [--task 0] [--chunk 8] [--size 256] [--rounds 4]

One simulation each, in turns in one run, so that whatever else the machine does hits both. Both play the same random
actions from the same state, and every frame that both show is compared to the bit. Writes a page where --page names one
(docs/benchmarks/libero.md). The last line is JSON; ``ratio`` is steps per second of the first loop over the second.
"""

import argparse
import json
import os
import sys
import time
import warnings
from datetime import UTC, datetime
from pathlib import Path

warnings.filterwarnings("ignore")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np  # noqa: E402

from rlvla.compose import compose  # noqa: E402
from rlvla.run import versions  # noqa: E402
from rlvla_envs.base import ChunkResult, SuiteConfig, VecEnv  # noqa: E402
from rlvla_envs.foreign import ForeignEnv  # noqa: E402
from rlvla_envs.suites import make_env, suite_version  # noqa: E402

LOOPS = {"boundary": "once a chunk", "every_step": "every step"}


def cpu_seconds(world: VecEnv) -> float:
    """Of the process that simulates, user and system."""
    pid = world.pid if isinstance(world, ForeignEnv) else os.getpid()
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def same(one: ChunkResult, other: ChunkResult) -> bool:
    states = (one.observation.state, other.observation.state)
    return all(
        np.array_equal(image, other.observation.images[name]) for name, image in one.observation.images.items()
    ) and np.array_equal(*(np.zeros(0) if state is None else state for state in states))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", default="libero_object")
    parser.add_argument("--task", default="0")
    parser.add_argument("--chunk", type=int, default=8, help="H")
    parser.add_argument("--size", type=int, default=256, help="pixels")
    parser.add_argument("--rounds", type=int, default=4, help="of --chunks chunks in each loop, after one to warm up")
    parser.add_argument("--chunks", type=int, default=5)
    parser.add_argument("--page", type=Path, help="a Markdown file to write")
    arguments = parser.parse_args()

    words = [f"suite={arguments.suite}", f"suite.task={arguments.task}", f"suite.chunk_size={arguments.chunk}"]
    words += [f"suite.image_size={arguments.size}", "suite.max_episode_steps=100000"]
    config: SuiteConfig = compose("collect", words).suite
    worlds = {}
    for loop in LOOPS:
        config.options = {"render_every_step": loop == "every_step"}
        worlds[loop] = make_env(config, 1)
        worlds[loop].reset([0], [0])
    wall, cpu = dict.fromkeys(LOOPS, 0.0), dict.fromkeys(LOOPS, 0.0)
    compared = equal = 0
    for repeat in range(-1, arguments.rounds):
        shape = (arguments.chunks, 1, arguments.chunk, worlds["boundary"].spec.action_size)
        actions = np.random.default_rng(repeat + 1).uniform(-0.5, 0.5, shape)
        results: dict[str, list[ChunkResult]] = {}
        for loop, world in worlds.items():
            began, began_cpu = time.perf_counter(), cpu_seconds(world)
            results[loop] = [world.step_chunk([0], chunk.astype(np.float32)) for chunk in actions]
            if repeat >= 0:
                wall[loop] += time.perf_counter() - began
                cpu[loop] += cpu_seconds(world) - began_cpu
        pairs = list(zip(results["boundary"], results["every_step"], strict=True))
        compared += len(pairs)
        equal += sum(same(*pair) for pair in pairs)
    cameras = len(worlds["boundary"].spec.cameras)
    for world in worlds.values():
        world.close()

    steps = arguments.rounds * arguments.chunks * arguments.chunk
    rate = {loop: steps / wall[loop] for loop in LOOPS}
    per_core = {loop: steps / cpu[loop] for loop in LOOPS}
    ratio = rate["boundary"] / rate["every_step"]
    load = os.getloadavg()[0]
    found = {
        "suite": arguments.suite,
        "task": arguments.task,
        "size": arguments.size,
        "chunk": arguments.chunk,
        "steps": steps,
        "load": round(load, 2),
        "ratio": round(ratio, 2),
        "ratio_per_cpu_s": round(per_core["boundary"] / per_core["every_step"], 2),
        "frames_compared": cameras * compared,
        "frames_equal": compared == equal,
        **{f"{loop}_steps_per_s": round(value, 2) for loop, value in rate.items()},
        **{f"{loop}_steps_per_cpu_s": round(value, 2) for loop, value in per_core.items()},
    }
    rows = [f"| {label} | {rate[loop]:.1f} | {per_core[loop]:.1f} |" for loop, label in LOOPS.items()]
    table = "\n".join(["| cameras drawn | steps/s | steps per CPU second |", "| --- | --- | --- |", *rows])
    said = ", ".join(f"{name} {version}" for name, version in suite_version(config).items() if name != "suite")
    summary = (
        f"{table}\n\n{ratio:.2f} times as fast; {found['ratio_per_cpu_s']:.2f} times by CPU time. "
        f"{equal} of {compared} chunk boundaries show the same frames and the same state, to the bit."
    )
    print(summary)
    if arguments.page:
        command = " ".join(["scripts/bench_drawing.py", *sys.argv[1:]])
        arguments.page.write_text(
            f"# Measured: {arguments.suite}, drawn where the policy looks\n\n"
            "<!-- Written by scripts/bench_drawing.py. -->\n\n"
            f"{arguments.suite}, task {arguments.task}, {cameras} cameras of {arguments.size} pixels, chunks of "
            f"{arguments.chunk}, {steps} steps in each loop, in turns in one run of\n\n```\n{command}\n```\n\n"
            f"on {versions()['cpu']}, load {load:.1f} (other jobs shared them), "
            f"{datetime.now(UTC):%Y-%m-%d}; {said}, OSMesa.\n\n{summary}\n\n"
            "Random actions of half the range from evaluation state 0; resets are not counted. "
            "[Why a camera is gated and not switched off](../adr/0033-libero.md).\n"
        )
    print(json.dumps(found))
    if equal < compared:
        sys.exit("frames differ")


if __name__ == "__main__":
    main()
