"""Every architecture on the toy: demonstrations, SFT, PPO, over seeds. A table of what PPO gained.

    .venv/bin/python scripts/bench_policies.py [--seeds 0 1 2] [--policies qwen_vla_toy ...] [--parallel 2]

All learn from the same demonstrations with the same settings; a seed is of SFT and PPO alike. What is finished is kept
in --output, so a call that was stopped goes on, and cells that are missing are filled. The last line on stdout is JSON.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rlvla.compose import group_choices
from rlvla.run import versions
from rlvla_algos.statistics import mcnemar_exact, paired_difference_interval

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "benchmarks" / "policies.md"
LOCAL = ["suite=toy", "workers.kind=local"]
SFT = ["suite=toy", "steps=400", "noise_draws=8", "first_steps_weight=1"]
EPISODES = 60
# pi0.5 reads the state from digits in its prompt. From 60 demonstrations it learns them by heart: .08 after 4000 steps.
OF_ITS_OWN = {"pi05_toy": (1000, ["suite=toy", "steps=3000", "batch_size=64", "noise_draws=4", "first_steps_weight=1"])}
TRAIN = [
    *LOCAL,
    "workers.num_actors=1",
    "workers.envs_per_actor=64",
    "inference_batch=64",
    "episodes_per_iteration=192",
    "iterations=12",
    "eval.trials=200",
    "eval.temperature=1.0",
    "eval.videos=0",
    "algo.bootstrap_time_limit=false",
    "algo.policy_lr=2e-4",
    "algo.target_kl=0.12",
    "algo.final_target_kl=0.03",
    "algo.epochs=5",
    "algo.value_lr=4e-3",
    "algo.value_hidden_sizes=[128,128]",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    toys = [name for name in group_choices("sft")["policy"] if name.endswith("_toy")]
    parser.add_argument("--policies", nargs="+", default=toys, help="files of configs/policy")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--parallel", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "policies")
    parser.add_argument("--no-run", action="store_true", help="write the page from what there is")
    arguments = parser.parse_args()
    output: Path = arguments.output
    if not arguments.no_run:
        for episodes in {demonstrations(policy)[0] for policy in arguments.policies}:
            data = output / f"data-{episodes}"
            if not (data / "meta" / "info.json").exists():
                rlvla(output / f"collect-{episodes}.log", "collect", *LOCAL, f"episodes={episodes}", f"output={data}")
        with ThreadPoolExecutor(arguments.parallel) as pool:
            # Seed after seed, so that a call that is stopped has every architecture once.
            cells = [(policy, seed) for seed in arguments.seeds for policy in arguments.policies]
            list(pool.map(lambda cell: fill(output, *cell), cells))
    found = {policy: seeds_of(output, policy, arguments.seeds) for policy in arguments.policies}
    PAGE.write_text(page({policy: seeds for policy, seeds in found.items() if seeds}, arguments))
    print(
        json.dumps({policy: {seed: one["success_after"] for seed, one in of.items()} for policy, of in found.items()})
    )


def demonstrations(policy: str) -> tuple[int, list[str]]:
    """How many episodes an architecture learns from, and how."""
    return OF_ITS_OWN.get(policy, (EPISODES, SFT))


def fill(output: Path, policy: str, seed: int) -> None:
    """One cell. One that fails leaves its log and does not stop the others."""
    cell = output / f"{policy}-{seed}"
    cell.mkdir(parents=True, exist_ok=True)
    try:
        if not (cell / "sft" / "summary.json").exists():
            episodes, settings = demonstrations(policy)
            arguments = [f"policy={policy}", f"dataset={output / f'data-{episodes}'}", f"output={cell / 'sft'}"]
            rlvla(cell / "sft.log", "sft", *settings, *arguments, f"seed={seed}")
        if not (cell / "ppo" / "report.html").exists():
            arguments = [f"policy={cell / 'sft' / 'policy'}", f"output={cell / 'ppo'}", f"seed={seed}"]
            rlvla(cell / "ppo.log", "train", *TRAIN, *arguments)
    except subprocess.CalledProcessError as error:
        print(f"{policy}, seed {seed}: {error}; see {cell}", file=sys.stderr)


def rlvla(log: Path, verb: str, *words: str) -> None:
    log.parent.mkdir(parents=True, exist_ok=True)
    print(f"rlvla {verb} {' '.join(words)}", file=sys.stderr)
    with log.open("w") as file:
        command = [sys.executable, "-m", "rlvla.cli", verb, *words]
        threads = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(command, check=True, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, env=threads)


def seeds_of(output: Path, policy: str, seeds: list[int]) -> dict[int, dict[str, Any]]:
    found = {}
    for seed in seeds:
        summary = output / f"{policy}-{seed}" / "ppo" / "summary.json"
        if summary.exists():
            found[seed] = json.loads(summary.read_text())
            for name in ("before", "after"):
                evaluation = json.loads((summary.parent / "evaluations" / f"{name}.json").read_text())
                found[seed][name] = evaluation["outcomes"]
    return found


def page(found: dict[str, dict[int, dict[str, Any]]], arguments: argparse.Namespace) -> str:
    rows = []
    for policy, seeds in found.items():
        before = [bool(o) for one in seeds.values() for o in one["before"]]
        after = [bool(o) for one in seeds.values() for o in one["after"]]
        low, high = paired_difference_interval(before, after)
        each = ", ".join(f"{one['success_before']:.2f} -> {one['success_after']:.2f}" for one in seeds.values())
        change = 100 * (sum(after) - sum(before)) / len(after)
        p = mcnemar_exact(before, after)
        rows.append(
            f"| `{policy}` | {len(seeds)} | {each} | {change:+.1f} [{100 * low:.1f}, {100 * high:.1f}] | {p:.0e} |"
        )
    others = "\n".join(
        f"* SFT of `{policy}`, from {episodes} demonstrations: `{' '.join(words)}`: it reads the state "
        "from digits in its prompt."
        for policy, (episodes, words) in OF_ITS_OWN.items()
        if policy in found
    )
    seeds_given = " ".join(map(str, arguments.seeds))
    return f"""# Measured: every architecture on the toy

Each learns from the same {EPISODES} demonstrations and is refined by PPO for 12 iterations of 192 episodes. Success on 200
held-back initial states before and after, at temperature 1.0; the change is over all seeds together with its 95% interval,
p is McNemar's exact one. The settings are those that were found for Qwen-VLA and the same for all, so a row says that an
architecture trains here, not how good it can be. The toy's state says where gap and goal are: nothing here says that a
policy looks at its image ([PushCube](push_cube.md) does).

| policy | seeds | before -> after | points | p |
|---|---|---|---|---|
{chr(10).join(rows)}

{versions()["cpu"]}; `scripts/bench_policies.py --seeds {seeds_given}`.

* SFT: `{" ".join(SFT)}`.
{others}
* PPO: `{" ".join(TRAIN)}`.
"""  # noqa: E501 - lines of the page


if __name__ == "__main__":
    main()
