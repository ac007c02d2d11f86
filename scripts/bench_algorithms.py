"""Samplers, reductions, estimators and objectives on the toy, from one SFT checkpoint with one budget, over seeds.

    .venv/bin/python scripts/bench_algorithms.py [--seeds 0 1 2 3 4] [--only default grpo ...] [--parallel 2]

A seed is of PPO; demonstrations and SFT are the same for all. Every cell plays as many training episodes. What is
finished is kept in --output, so a call that was stopped goes on, and cells that are missing are filled. Writes
the page of algorithms under docs/benchmarks and its figure; the last line on stdout is JSON.
"""

import argparse
import json
import os
from functools import partial
from pathlib import Path
from typing import Any

from toy_cells import EPISODES, ROOT, SFT, TRAIN, collect, columns, fill, finished, gain, sft, train

from rlvla.report_page import stand_alone
from rlvla.run import versions
from rlvla.svg import IntervalRow, interval_chart
from rlvla_algos.statistics import wilson_interval

PAGE = ROOT / "docs" / "benchmarks" / "algorithms.md"
GROUPS = ["algo.group_size=8"]
VARIANTS: dict[str, list[str]] = {
    "default": [],
    "window": ["algo.sampler.kind=window", "algo.sampler.window=2"],
    "all_steps": ["algo.sampler.kind=all_steps"],
    "constant_noise": ["algo.sampler.schedule=constant"],
    "cosine_noise": ["algo.sampler.schedule=cosine"],
    "cps": ["algo.sampler.process=cps"],
    "learned_noise": ["algo.sampler.process=learned"],
    "latent": ["algo.sampler.kind=latent"],
    "sum": ["algo.reduction=sum"],
    "mean": ["algo.reduction=mean"],
    "sqrt": ["algo.reduction=sqrt"],
    "sum_matched": ["algo.reduction=sum", "algo.match_clip=true"],
    "mean_matched": ["algo.reduction=mean", "algo.match_clip=true"],
    "clip_higher": ["algo.clip_epsilon_high=0.28"],
    "critic_attention": ["algo.critic.pool=attention"],
    "critic_time": ["algo.critic.time_to_limit=true"],
    "grpo": ["algo.estimator=grpo", *GROUPS],
    "grpo_filtered": ["algo.estimator=grpo", *GROUPS, "algo.min_group_success=0.1", "algo.max_group_success=0.9"],
    "rloo": ["algo.estimator=rloo", *GROUPS],
    "reinforce_pp": ["algo.estimator=reinforce_pp"],
    "fpo": ["algo.objective=fpo"],
    "nft": ["algo.objective=nft"],
    "clone_success": ["algo.objective=clone", "algo.estimator=success"],
    "clone_best_of_8": ["algo.objective=clone", "algo.estimator=best_of_n", *GROUPS],
}
"""What each changes of `TRAIN`."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--parallel", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "algorithms")
    parser.add_argument("--no-run", action="store_true", help="write the page from what there is")
    arguments = parser.parse_args()
    output: Path = arguments.output
    if not arguments.no_run:
        data = collect(output, EPISODES)
        checkpoint = sft(output / "sft", *SFT, "policy=pi0_toy", f"dataset={data}")
        # Seed after seed, so that a call that is stopped has every algorithm once.
        cells = [
            (output / f"{name}-{seed}", partial(run, name, seed, checkpoint))
            for seed in arguments.seeds
            for name in arguments.only
        ]
        fill(cells, arguments.parallel)
    found = {
        name: done
        for name in VARIANTS
        if (done := finished({seed: output / f"{name}-{seed}" / "train" for seed in arguments.seeds}))
    }
    PAGE.write_text(page(found, arguments.seeds))
    PAGE.with_suffix(".svg").write_text(figure(found))
    print(json.dumps({name: round(gain(seeds)[0], 4) for name, seeds in found.items()}))


def run(name: str, seed: int, checkpoint: Path, cell: Path) -> None:
    train(cell / "train", *settings(name), f"policy={checkpoint}", f"seed={seed}")


def settings(name: str) -> list[str]:
    """`TRAIN` as a variant changes it; what only a critic reads is left out where there is none."""
    changed = VARIANTS[name]
    critic = not any(word.startswith("algo.estimator=") for word in changed)
    return [*(word for word in TRAIN if critic or not word.startswith("algo.value_")), *changed]


def page(found: dict[str, dict[int, dict[str, Any]]], seeds: list[int]) -> str:
    ranked = sorted(found, key=lambda name: -gain(found[name])[0])
    rows = []
    for name in ranked:
        runs = found[name].values()
        steps = sum(one["env_steps"] for one in runs) / len(runs)
        minutes = sum(one["minutes"] for one in runs) / len(runs)
        words = " ".join(VARIANTS[name]) or "-"
        rows.append(f"| {name} | `{words}` | {' | '.join(columns(found[name]))} | {steps:,.0f} | {minutes:.2f} |")
    return f"""# Measured: algorithms on the toy

All begin with the same SFT checkpoint ({EPISODES} demonstrations), play 12 iterations of 192 training episodes and are
measured on 200 held-back initial states before and after, at temperature 1.0. The change is over all seeds together with
its 95% interval, p is McNemar's exact one. The policy is pi0's architecture, because it is the cheapest here. Nothing was
tuned for any row: the settings are those that were found for the default with Qwen-VLA, which favours the default. Minutes
are wall-clock with other jobs on the machine. Which words do what: [Algorithms](../algorithms.md).
{missing(found)}
| | changed | seeds | before -> after | points | p | environment steps | minutes |
|---|---|---|---|---|---|---|---|
{chr(10).join(rows)}

![Success after training, with 95% intervals](algorithms.svg)

{versions()["cpu"]}; `scripts/bench_algorithms.py --seeds {" ".join(map(str, seeds))}`.

* SFT: `{" ".join(SFT)} policy=pi0_toy`.
* The default: `{" ".join(TRAIN)}`.
"""  # noqa: E501 - lines of the page


def missing(found: dict[str, dict[int, dict[str, Any]]]) -> str:
    """What a reader must know of a table that is not complete; empty where it is."""
    without = [name for name in VARIANTS if name not in found]
    fewest = min((len(of) for of in found.values()), default=0)
    said = []
    if fewest < 5:
        said.append(f"Rows have as few as {fewest} of 5 seeds: differences between neighbours mean nothing yet.")
    if without:
        said.append(f"Not run: {', '.join(without)}.")
    return f"\n**Unfinished.** {' '.join(said)}\n" if said else ""


def figure(found: dict[str, dict[int, dict[str, Any]]]) -> str:
    rows = []
    for name, seeds in sorted(found.items(), key=lambda item: -gain(item[1])[0]):
        after = [bool(o) for one in seeds.values() for o in one["after"]]
        interval = wilson_interval(sum(after), len(after))
        detail = f"{len(seeds)} seed{'s' if len(seeds) > 1 else ''}"
        rows.append(IntervalRow(label=name, value=sum(after) / len(after), interval=interval, detail=detail))
    return stand_alone(
        interval_chart(title="Success after training", description="All seeds together, Wilson's 95%.", rows=rows)
    )


if __name__ == "__main__":
    main()
