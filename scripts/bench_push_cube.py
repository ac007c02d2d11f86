"""Three seeds of the PPO stage of the main job -> docs/benchmarks/push_cube.md and its learning curve.

    .venv/bin/python scripts/bench_push_cube.py [--output runs/push_cube] [--seeds 0 1 2] [--no-run]

Runs scripts/make_train.py for each seed that has no result yet (data and SFT checkpoint are shared), so it can be
stopped and started again; --no-run only renders what is there. The last line on stdout is one JSON object.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from rlvla.report_page import PAGE_CSS
from rlvla.run_folder import RunFolder, read_run
from rlvla.svg import Series, line_chart, percent

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "benchmarks" / "push_cube.md"
BLOCK = 4
"""Iterations averaged to one point of the curve: one alone has a standard error of four points."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "push_cube")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--no-run", action="store_true", help="render what is there")
    arguments = parser.parse_args()
    for seed in arguments.seeds:
        if not arguments.no_run:
            command = [sys.executable, str(ROOT / "scripts" / "make_train.py"), "--seed", str(seed)]
            subprocess.run([*command, "--output", str(arguments.output)], check=True, stdout=subprocess.DEVNULL)
    folders = {seed: arguments.output / f"ppo-seed{seed}" for seed in arguments.seeds}
    runs = {seed: read_run(folder) for seed, folder in folders.items() if (folder / "summary.json").exists()}
    if not runs:
        sys.exit(f"no finished PPO stage under {arguments.output}; run without --no-run.")
    minutes = json.loads((arguments.output / "minutes.json").read_text())
    PAGE.write_text(render(runs, minutes))
    PAGE.with_suffix(".svg").write_text(curve(runs))
    print(json.dumps({str(seed): run.summary for seed, run in runs.items()}))


def render(runs: dict[int, RunFolder], minutes: dict[str, float]) -> str:
    first = next(iter(runs.values()))
    recipe = yaml.safe_load((ROOT / "configs" / "recipe" / "push_cube.yaml").read_text())
    v = {key: first.versions.get(key, "?") for key in ("cpu", "python", "torch", "mani_skill", "git_commit")}
    machine = (
        f"{v['cpu']}, no GPU, Python {v['python']}, torch {v['torch']}, mani-skill {v['mani_skill']}, "
        f"rlvla {v['git_commit']}"
    )
    spent = f"Collecting took {minutes.get('collect', 0):.1f} minutes, SFT {minutes.get('sft', 0):.1f}"
    commands = "\n".join(f"rlvla {verb} {' '.join(settings)}" for verb, settings in recipe.items())
    rows = [row(seed, run, minutes.get(f"train-{seed}", float("nan"))) for seed, run in runs.items()]
    points = "\n".join(
        f"| {seed} | " + " | ".join(f"{steps / 1000:.0f}k: {success:.2f}" for steps, success in blocks(run)) + " |"
        for seed, run in runs.items()
    )
    count = max(len(blocks(run)) for run in runs.values())
    return f"""# PushCube from pixels: the main job

<!-- Written by scripts/bench_push_cube.py. -->

{len(runs)} seed{"s" if len(runs) > 1 else ""} of the PPO stage from one SFT checkpoint. {machine}. Minutes are
wall-clock; other jobs may have shared the cores.

```
scripts/bench_push_cube.py
```

makes it all and writes this page: `make train` is its first seed. The verbs and their settings
(`configs/recipe/push_cube.yaml`):

```
{commands}
```

{spent}. Success on {first.comparison["trials"]} held-back
initial states at temperature {first.setting("eval.temperature"):g}, the same states and noise before and after; the
interval is Newcombe's for paired proportions, the test McNemar's exact one. "Blind" is the success with another
episode's images, before and after:

| seed | SFT | after PPO | points [95%] | gained / lost | p | blind | environment steps | minutes |
|---|---|---|---|---|---|---|---|---|
{chr(10).join(rows)}

Rollout success (stochastic sampler, training states) against environment steps, means over {BLOCK} iterations:

![Rollout success against environment steps](push_cube.svg)

| seed |{" |" * count}
|---|{"---|" * count}
{points}
"""


def row(seed: int, run: RunFolder, minutes: float) -> str:
    c = run.comparison
    low, high = (100 * bound for bound in c["interval"])
    return (
        f"| {seed} | {c['before']:.3f} | {c['after']:.3f} | {100 * c['difference']:+.1f} [{low:+.1f}, {high:+.1f}] "
        f"| {c['gained']} / {c['lost']} | {c['p_value']:.1e} | {shuffled(run, 'before')} / {shuffled(run, 'after')} "
        f"| {run.summary['env_steps']:,} | {minutes:.1f} |"
    )


def blocks(run: RunFolder) -> list[tuple[float, float]]:
    """(environment steps at the end, mean rollout success) of each stretch of iterations."""
    iterations = list(run.iterations)
    stretches = [iterations[i : i + BLOCK] for i in range(0, len(iterations), BLOCK)]
    return [(s[-1]["env_steps"], sum(r["rollout/success"] for r in s) / len(s)) for s in stretches]


def shuffled(run: RunFolder, name: str) -> str:
    probe: Any = run.probe.get(name, {})
    return f"{probe['shuffled']:.3f}" if "shuffled" in probe else "-"


def curve(runs: dict[int, RunFolder]) -> str:
    """A stand-alone SVG: the report's chart with the report's style inside."""
    chart = line_chart(
        title="Rollout success against environment steps",
        description="One line a seed, means over some iterations.",
        series=[
            Series(name=f"seed {seed}", x=[x for x, _ in blocks(run)], y=[y for _, y in blocks(run)], tint=i)
            for i, (seed, run) in enumerate(runs.items())
        ],
        x_label="environment steps",
        y_format=percent,
        y_range=(0.0, 1.0),
    )
    return chart.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1).replace(
        "<title>", f"<style>{PAGE_CSS}</style><title>", 1
    )


if __name__ == "__main__":
    main()
