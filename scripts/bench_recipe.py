"""Seeds of the PPO stage of a recipe -> its page under docs/benchmarks, with the learning curve.

    .venv/bin/python scripts/bench_recipe.py [--recipe push_cube] [--policy NAME] [--seeds 0 1 2] [--no-run]

Runs scripts/make_train.py for each seed that has no result yet (data and SFT checkpoint are shared), so it can be
stopped and started again; --no-run only renders what is there. The last line on stdout is one JSON object.
"""

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from learning_curve import BLOCK, STRETCH, blocks, steps_to_gain
from make_train import label, settings_of

from rlvla.evaluate import Evaluation, compare
from rlvla.report_page import stand_alone
from rlvla.run_folder import RunFolder, read_run
from rlvla.svg import Series, line_chart, percent
from rlvla_algos.statistics import wilson_interval

ROOT = Path(__file__).resolve().parent.parent
PAGES = ROOT / "docs" / "benchmarks"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="push_cube")
    parser.add_argument("--policy", help="a file of configs/policy instead of the recipe's")
    parser.add_argument("--output", type=Path, help="folder of the recipe's runs; runs/RECIPE[-POLICY] if absent")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--no-run", action="store_true", help="render what is there")
    arguments = parser.parse_args()
    name = label(arguments.recipe, arguments.policy)
    output: Path = arguments.output or ROOT / "runs" / name
    if not arguments.no_run:
        for seed in arguments.seeds:
            command = [sys.executable, str(ROOT / "scripts" / "make_train.py"), "--recipe", arguments.recipe]
            command += ["--seed", str(seed), "--output", str(output)]
            command += ["--policy", arguments.policy] if arguments.policy else []
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    folders = {seed: output / f"ppo-seed{seed}" for seed in arguments.seeds}
    runs = {seed: read_run(folder) for seed, folder in folders.items() if (folder / "summary.json").exists()}
    if not runs:
        sys.exit(f"no finished PPO stage under {output}; run without --no-run.")
    page = PAGES / f"{name}.md"
    page.write_text(render(arguments.recipe, arguments.policy, output, runs))
    page.with_suffix(".svg").write_text(curve(runs))
    print(json.dumps({str(seed): run.summary for seed, run in runs.items()}))


def render(recipe: str, policy: str | None, output: Path, runs: dict[int, RunFolder]) -> str:
    first = next(iter(runs.values()))
    minutes = json.loads((output / "minutes.json").read_text())
    v = {
        key: ", ".join(dict.fromkeys(str(run.versions.get(key, "?")) for run in runs.values()))
        for key in ("cpu", "python", "torch", "mani_skill", "git_commit")
    }
    commands = "\n".join(f"rlvla {verb} {shlex.join(words)}" for verb, words in settings_of(recipe, policy).items())
    replaced = f" with policy={policy}" if policy else ""
    comparisons = {seed: run.comparison for seed, run in runs.items()}
    parts = [
        f"# Measured: the recipe {recipe}{replaced}\n\n<!-- Written by scripts/bench_recipe.py. -->\n",
        f"{len(runs)} seed{'s' if len(runs) > 1 else ''} of the PPO stage from one SFT checkpoint, on {v['cpu']},\n"
        f"device={first.setting('device')}, Python {v['python']}, "
        f"torch {v['torch']}, mani-skill {v['mani_skill']}, rlvla {v['git_commit']}.\n"
        "Minutes are wall-clock; other jobs may have shared the cores.\n",
        f"```\nscripts/bench_recipe.py --recipe {recipe}{f' --policy {policy}' if policy else ''} "
        f"--seeds {' '.join(map(str, runs))}\n```\n",
        f"makes it all and writes this page. The verbs and their settings (`configs/recipe/{recipe}.yaml`):\n",
        f"```\n{commands}\n```\n",
        f"Collecting took {minutes.get('collect', 0):.1f} minutes, SFT {minutes.get('sft', 0):.1f}.\n"
        "Before and after are measured on the same held-back initial states with the same noise, at temperature "
        f"{first.setting('eval.temperature'):g};\nintervals are Newcombe's for paired proportions, tests McNemar's "
        'exact one. "Blind" is the success with another\nepisode\'s images, before and after.\n',
        table(
            ("seed", *CHANGE, "blind", "environment steps", "minutes"),
            [
                (
                    str(seed),
                    *change(comparisons[seed]),
                    f"{shuffled(run, 'before')} / {shuffled(run, 'after')}",
                    f"{run.summary['env_steps']:,}",
                    f"{minutes.get(f'train-{seed}', float('nan')):.1f}",
                )
                for seed, run in runs.items()
            ],
        ),
        *by_task(comparisons, "Task by task"),
        *transfer(output, list(runs)),
        *(f"* {note}" for note in notes(first)),
        "Rollout success (stochastic sampler, training states) against environment steps, means over "
        f"{BLOCK} iterations:\n",
        f"![Rollout success against environment steps]({label(recipe, policy)}.svg)\n",
        *efficiency(runs),
        table(
            ("seed", "environment steps: success"),
            [
                (str(seed), ", ".join(f"{x / 1000:.0f}k: {y:.2f}" for x, y in blocks(run.iterations)))
                for seed, run in runs.items()
            ],
        ),
    ]
    return "\n".join(parts)


CHANGE = ("before", "after", "points [95%]", "gained / lost", "p")


def change(comparison: Any) -> tuple[str, ...]:
    low, high = (100 * bound for bound in comparison["interval"])
    return (
        f"{comparison['before']:.3f}",
        f"{comparison['after']:.3f}",
        f"{100 * comparison['difference']:+.1f} [{low:+.1f}, {high:+.1f}]",
        f"{comparison['gained']} / {comparison['lost']} of {comparison['trials']}",
        f"{comparison['p_value']:.2g}",
    )


def by_task(comparisons: dict[int, Any], title: str) -> Iterator[str]:
    """Each task with Wilson's 95% intervals of both rates, and the mean over tasks."""
    rows: list[tuple[str, ...]] = []
    for seed, comparison in comparisons.items():
        tasks = comparison.get("by_task", {})
        for task, one in tasks.items():
            before, after, *rest = change(one)
            rates = (f"{before} {wilson(one, 'before')}", f"{after} {wilson(one, 'after')}")
            rows.append((str(seed), task, *rates, *rest))
        if tasks:
            before, after = (sum(one[key] for one in tasks.values()) / len(tasks) for key in ("before", "after"))
            points = f"{100 * (after - before):+.1f}"
            rows.append((str(seed), "mean over tasks", f"{before:.3f}", f"{after:.3f}", points, "", ""))
    if rows:
        yield f"{title}, with Wilson's 95% interval of each rate:\n"
        yield table(("seed", "task", *CHANGE), rows)


def wilson(comparison: Any, key: str) -> str:
    low, high = wilson_interval(round(comparison[key] * comparison["trials"]), comparison["trials"])
    return f"[{low:.3f}, {high:.3f}]"


def transfer(output: Path, seeds: list[int]) -> Iterator[str]:
    """The recipe's own evaluation, of the SFT checkpoint against each refined policy."""
    comparisons = {}
    for seed in seeds:
        files = [output / name / "evaluations" / "eval.json" for name in ("eval-sft", f"eval-seed{seed}")]
        if all(file.exists() for file in files):
            comparisons[seed] = compare(*(Evaluation.read(file) for file in files))
    if comparisons:
        yield "On the held-out suite of the recipe's `eval`:\n"
        yield table(("seed", *CHANGE), [(str(seed), *change(one)) for seed, one in comparisons.items()])
        yield from by_task(comparisons, "Task by task there")


def efficiency(runs: dict[int, RunFolder]) -> Iterator[str]:
    steps = steps_to_gain([run.iterations for run in runs.values()], 0.2)
    said = ", ".join("never" if one is None else f"{one:,}" for one in steps)
    yield (
        f"Environment steps until {STRETCH} training episodes in a row succeed 20 points more often than the SFT "
        f"weights': {said}.\n"
    )


def notes(run: RunFolder) -> list[str]:
    return [str(note) for note in run.evaluations.get("after", {}).get("notes", [])]


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def shuffled(run: RunFolder, name: str) -> str:
    probe: Any = run.probe.get(name, {})
    return f"{probe['shuffled']:.3f}" if "shuffled" in probe else "-"


def curve(runs: dict[int, RunFolder]) -> str:
    chart = line_chart(
        title="Rollout success against environment steps",
        description="One line a seed, means over some iterations.",
        series=[
            Series(
                name=f"seed {seed}",
                x=[x for x, _ in blocks(run.iterations)],
                y=[y for _, y in blocks(run.iterations)],
                tint=i,
            )
            for i, (seed, run) in enumerate(runs.items())
        ],
        x_label="environment steps",
        y_format=percent,
        y_range=(0.0, 1.0),
    )
    return stand_alone(chart)


if __name__ == "__main__":
    main()
