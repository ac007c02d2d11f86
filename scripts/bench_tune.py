"""How well `rlvla tune` does from a poor default, on the toy; prints one JSON object on stdout.

    .venv/bin/python scripts/bench_tune.py [--output runs/bench_tune] [--trials 20] [--policy FOLDER]

Makes demonstrations and an SFT checkpoint unless one is given, tunes, then trains with the best settings and with the
poor ones again: other training seeds, other evaluation noise, twice as many initial states. What is finished is kept,
so it can be stopped and started again. `minutes` are the study's alone.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from rlvla_algos.statistics import wilson_interval

ROOT = Path(__file__).resolve().parent.parent
COMMON = [
    *("suite=toy", "workers.kind=local", "workers.num_actors=1", "workers.envs_per_actor=128", "inference_batch=64"),
    *("iterations=12", "episodes_per_iteration=192", "algo.bootstrap_time_limit=false", "eval.temperature=1.0"),
    "algo.value_hidden_sizes=[128,128]",
]
POOR = [
    *("algo.noise_level=0.1", "algo.target_kl=0.003", "algo.policy_lr=1e-5", "algo.epochs=2"),
    *("algo.reduction=mean", "algo.clip_epsilon=0.05"),
]
"""Each is what somebody might take from another paper; together they hardly learn."""
FRESH = ["eval.trials=400", "eval.seed=777", "eval.shuffled_images=false", "eval.videos=0"]
SEEDS = (1000, 1001)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "bench_tune")
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--policy", type=Path, help="SFT checkpoint for the toy; made if absent")
    parser.add_argument("words", nargs="*", help="settings of the study, such as tune.parallel=2 or iterations=4")
    arguments = parser.parse_args()
    output: Path = arguments.output
    policy = arguments.policy or make_policy(output)
    study = output / "study"
    begin = [*COMMON, *POOR, f"policy={policy}", *arguments.words]
    if not (study / "summary.json").exists():
        rlvla("tune", *begin, f"output={study}", f"tune.trials={arguments.trials}")
    tuned = json.loads((study / "summary.json").read_text())

    runs: dict[str, list[dict[str, Any]]] = {"poor": [], "best": []}
    for seed in SEEDS:
        settings = {"poor": [w for w in begin if not w.startswith("tune.")], "best": [f"@{study / 'best.yaml'}"]}
        for name, words in settings.items():
            folder = output / f"{name}-{seed}"
            if not (folder / "report.html").exists():
                rlvla("train", *words, *FRESH, f"seed={seed}", f"output={folder}")
            runs[name].append(json.loads((folder / "evaluations" / "after.json").read_text()))
    rates = {name: pooled(parts) for name, parts in runs.items()}
    print(
        json.dumps(
            {
                "trials": tuned["trials"],
                "minutes": tuned["minutes"],
                "env_steps": tuned["env_steps"],
                "settings": tuned["settings"],
                "success_in_study": tuned["success"],
                "before": json.loads((output / f"best-{SEEDS[0]}" / "summary.json").read_text())["success_before"],
                **rates,
                "gain_points": round(100 * (rates["best"]["success"] - rates["poor"]["success"]), 1),
                "cores": os.cpu_count(),
                "load_average": os.getloadavg(),
            }
        )
    )


def pooled(parts: list[dict[str, Any]]) -> dict[str, Any]:
    successes, trials = sum(part["successes"] for part in parts), sum(part["trials"] for part in parts)
    by_seed = [part["success"] for part in parts]
    return {"success": successes / trials, "interval": wilson_interval(successes, trials), "by_seed": by_seed}


def make_policy(output: Path) -> Path:
    """An SFT checkpoint that solves the toy now and then."""
    data, sft = output / "demonstrations", output / "sft"
    if not (data / "meta" / "info.json").exists():
        rlvla("collect", "suite=toy", "workers.kind=local", "workers.num_actors=1", f"output={data}", "episodes=20")
    if not (sft / "summary.json").exists():
        shape = ["steps=500", "noise_draws=8", "train_vlm=false", "first_steps_weight=1"]
        rlvla("sft", "suite=toy", "policy=pi0_toy", f"dataset={data}", f"output={sft}", *shape)
    return sft / "policy"


def rlvla(verb: str, *words: str) -> None:
    print(f"+ rlvla {verb} {' '.join(words)}", file=sys.stderr)
    subprocess.run([sys.executable, "-m", "rlvla.cli", verb, *words], check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
