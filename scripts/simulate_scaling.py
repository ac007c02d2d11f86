"""How fast would rlvla be on more GPUs and environments? A discrete-event model, checked against real iterations here.

    .venv/bin/python scripts/simulate_scaling.py --table
    .venv/bin/python scripts/simulate_scaling.py --measure RUN [--layout 1x4]
    .venv/bin/python scripts/simulate_scaling.py --validate RUN --checks 1x8 2x4 [--recorded RUN ...]
    .venv/bin/python scripts/simulate_scaling.py --validate RUN --checks 2x4 --schedules sync pingpong async
    .venv/bin/python scripts/simulate_scaling.py --page

RUN is the output folder of an `rlvla train`: it names suite, policy and algorithm. --measure runs a few short
iterations on one layout (ACTORSxENVIRONMENTS) and prints what each thing costs. --validate does so, predicts other
layouts from it, runs those too, under each of --schedules, and prints predicted / measured. --recorded predicts what
finished runs noted in metrics.jsonl; on a busy machine add --cpu-time. --page writes docs/benchmarks/scaling.md from
the saved validations and the tables. The last line on stdout is JSON.
"""

import argparse
import json
import math
import os
import sys
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore")

from scaling_measure import (  # noqa: E402
    Check,
    checks_of,
    measure,
    measure_schedule,
    read_config,
    read_measured,
)
from scaling_page import PAGE, ROOT, SETUPS, grid, knee, knees, render, validation_table  # noqa: E402

from rlvla.config import Schedule  # noqa: E402
from rlvla.run import versions  # noqa: E402
from rlvla.run_folder import read_run  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--measure", type=Path, metavar="RUN")
    action.add_argument("--validate", type=Path, metavar="RUN")
    action.add_argument("--table", action="store_true", help="print the predictions")
    action.add_argument("--page", action="store_true", help="write docs/benchmarks/scaling.md")
    parser.add_argument("--layout", type=layout, default=(1, 4), help="where costs are measured; one actor is best")
    parser.add_argument("--checks", type=layout, nargs="*", default=[(1, 8), (2, 4), (2, 8)], help="layouts to predict")
    parser.add_argument(
        "--recorded",
        type=Path,
        nargs="*",
        default=[],
        metavar="RUN",
        help="also predict what these runs noted",
    )
    parser.add_argument(
        "--schedules", nargs="+", default=["sync"], choices=[s.value for s in Schedule], help="of --checks"
    )
    parser.add_argument("--cpu-time", action="store_true", help="cost of an idle machine, on a busy one; no --checks")
    parser.add_argument("--episodes", type=int, default=48, help="per measured iteration")
    parser.add_argument("--iterations", type=int, default=2, help="measured on each layout")
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "scaling", help="where validations are kept")
    arguments = parser.parse_args()
    if arguments.cpu_time:
        # Other layouts could be run on the busy machine only, which is not what is predicted.
        arguments.checks = []
    if Schedule.pingpong.value in arguments.schedules and any(actors < 2 for actors, _ in arguments.checks):
        parser.error("pingpong needs two actors, which take turns; choose --checks of at least 2xENVIRONMENTS")
    if arguments.measure or arguments.validate:
        result = run_validation(arguments)
        if arguments.measure:
            print(json.dumps({name: v for name, v in result["calibration"]["costs"].items() if math.isfinite(v)}))
            return
        arguments.output.mkdir(parents=True, exist_ok=True)
        name = result["suite"].replace(" ", "_").replace("/", "_")
        name += "-cpu-time" if arguments.cpu_time else ""
        name += "" if arguments.schedules == ["sync"] else "-schedules"
        (arguments.output / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
        print(f"{result['machine']}; load {os.getloadavg()[0]:.1f}\n{validation_table(result)}")
        print(
            json.dumps(
                {
                    label_of(found): {k: v for k, v in found.ratios.items() if not math.isnan(v)}
                    for found in checks_of(result)
                }
            )
        )
        return
    for setup in SETUPS:
        print(f"{setup.title}: GPU busy % / core busy % / environment steps per second\n{grid(setup)}\n")
    print(knees())
    if arguments.page:
        saved = [json.loads(path.read_text()) for path in sorted(arguments.output.glob("*.json"))]
        if not saved:
            sys.exit(f"no validation under {arguments.output}; run --validate first, or the page would lose its own.")
        PAGE.write_text(render(saved))
    print(
        json.dumps(
            {
                setup.name: {str(gpus): knee(setup, gpus)[0] for gpus in (1, 8, 64) if gpus > 1 or not setup.split}
                for setup in SETUPS
            }
        )
    )


def label_of(found: Check) -> str:
    layout = f"{found.measured.actors}x{found.measured.envs_per_actor}"
    return f"{found.label} {found.measured.schedule} {layout}"


def run_validation(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure, and note everything that the page needs."""
    run: Path = arguments.validate or arguments.measure
    config = read_config(run)
    noted = [recorded(folder) for folder in arguments.recorded]
    actors, envs = arguments.layout
    settings = {"episodes": arguments.episodes, "iterations": arguments.iterations}
    calibration = measure(config, actors=actors, envs_per_actor=envs, first=1, cpu_time=arguments.cpu_time, **settings)
    print(json.dumps(asdict(calibration.costs)), file=sys.stderr)
    checks = []
    for number, (actors, envs) in enumerate(arguments.checks if arguments.validate else ()):
        for schedule in arguments.schedules:
            # Other episodes than those of the calibration, which a prediction may not know; the same for all schedules.
            layout = {"actors": actors, "envs_per_actor": envs, "first": 100 * (number + 1)}
            checks.append(measure_schedule(config, Schedule(schedule), **layout, **settings))
            print(checks[-1], file=sys.stderr)
    return {
        "suite": f"{config.suite.name} {config.suite.task}",
        "command": shown_command(arguments),
        "machine": versions()["cpu"],
        "commit": versions()["git_commit"],
        "episodes": arguments.episodes,
        "minibatch": config.algo.minibatch_size,
        "calibration": json.loads(calibration.to_json()),
        "checks": [asdict(found) for found in checks],
        "cpu_time": arguments.cpu_time,
        "recorded": noted,
    }


def shown_command(arguments: argparse.Namespace) -> str:
    """As it was typed, with names for folders that only this machine has."""
    words = [word for word in sys.argv[1:] if not word.startswith("/")]
    place = words.index("--validate") + 1 if arguments.validate else len(words)
    words.insert(place, "RUN")
    if arguments.recorded:
        words.insert(words.index("--recorded") + 1, "RUN..." if len(arguments.recorded) > 1 else "RUN")
    return " ".join(["scripts/simulate_scaling.py", *words])


def recorded(folder: Path) -> dict[str, Any]:
    """What a finished run noted, and the two settings that a prediction of it needs."""
    found, run = read_measured(folder), read_run(folder)
    settings = {"episodes": run.setting("episodes_per_iteration"), "minibatch": run.setting("algo.minibatch_size")}
    return settings | {"measured": asdict(found)}


def layout(text: str) -> tuple[int, int]:
    """ "2x8" -> (2, 8): actors, environments in each."""
    actors, _, envs = text.partition("x")
    if not (actors.isdigit() and envs.isdigit() and int(actors) and int(envs)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a layout; it must be ACTORSxENVIRONMENTS, for example 2x8.")
    return int(actors), int(envs)


if __name__ == "__main__":
    main()
