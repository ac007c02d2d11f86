"""Samplers, reductions, estimators and objectives, from one SFT checkpoint with one budget, over seeds.

    .venv/bin/python scripts/bench_algorithms.py [--seeds 0 1 2 3 4] [--only default grpo ...] [--parallel 2]
    .venv/bin/python scripts/bench_algorithms.py --on push_cube [--seeds 0 1 2]

On the toy all of them; then the default and the three that were best there on PushCube, as `make train` has it, and
the first recipe that worked there. A seed is of PPO; demonstrations and SFT are made alike for all. Every cell of a
table plays as many training episodes. A call that was stopped goes on with what --output holds. A cell that is finished
is written into a file beside the page, algorithms-toy.jsonl or algorithms-push_cube.jsonl, and is not run again where
that file is: hours of cells may be filled on several machines, each seed on one, since its cells begin with one SFT
checkpoint. Writes the page of algorithms under docs/benchmarks and its figures; the last line on stdout is JSON.
"""

import argparse
import json
import os
from functools import partial
from pathlib import Path
from typing import Any

from learning_curve import STRETCH, steps_to, success_at_first
from make_train import Minutes, prepare, settings_of
from records import Records, curve_of, record_of
from toy_cells import EPISODES, ROOT, SFT, TRAIN, collect, columns, fill, gain, sft, train

from rlvla.report_page import stand_alone
from rlvla.run import versions
from rlvla.svg import IntervalRow, interval_chart
from rlvla_algos.statistics import mcnemar_exact, wilson_interval

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
OF_A_CRITIC = ("algo.value_", "algo.gamma=")
FIRST_RECIPE = [
    *("suite=push_cube", "iterations=52", "episodes_per_iteration=128", "algo.gamma=0.9", "algo.target_kl=0.15"),
    *("algo.epochs=6", "algo.value_hidden_sizes=[256,256]", "eval.temperature=1.0"),
]
"""What first worked on PushCube (docs/benchmarks/tuning.md), going on for as many episodes as the others play."""
HALF = "iterations=11"
"""The recipe with fewer than half the environment steps; its KL target falls in as many iterations."""
PUSH_CUBE_ONLY = ["first_recipe", "half"]


SEEDS = {"toy": [0, 1, 2, 3, 4], "push_cube": [0, 1, 2]}
NAMES = {"toy": list(VARIANTS), "push_cube": [*VARIANTS, *PUSH_CUBE_ONLY]}
FIGURES = {"toy": PAGE.with_suffix(".svg"), "push_cube": PAGE.with_name("algorithms-push_cube.svg")}
Found = dict[str, dict[int, dict[str, Any]]]
"""Finished cells by variant and seed."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--on", choices=list(SEEDS), default="toy", help="where to fill cells")
    parser.add_argument("--only", nargs="+", choices=[*VARIANTS, *PUSH_CUBE_ONLY], help="instead of those named above")
    parser.add_argument("--seeds", nargs="+", type=int, help="0 to 4 on the toy, 0 to 2 on PushCube if absent")
    parser.add_argument("--parallel", type=int, default=os.cpu_count() or 1, help="cells at once on the toy")
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "algorithms")
    parser.add_argument("--no-run", action="store_true", help="write the page from what there is")
    arguments = parser.parse_args()
    on: str = arguments.on
    output: Path = arguments.output / on
    seeds: list[int] = arguments.seeds or SEEDS[on]
    recipe = settings_of("push_cube", None)
    words = {"toy": TRAIN, "push_cube": recipe["train"]}
    records = {name: Records(PAGE.with_name(f"algorithms-{name}.jsonl")) for name in SEEDS}
    settings = {name: {one: settings_of_variant(one, words[name]) for one in NAMES[name]} for name in SEEDS}
    found = {name: records[name].of(settings[name]) for name in SEEDS}
    if not arguments.no_run:
        if on == "toy":
            data = collect(output, EPISODES)
            checkpoint = sft(output / "sft", *SFT, "policy=pi0_toy", f"dataset={data}")
        else:
            checkpoint = prepare(recipe, output, Minutes(output / "minutes.json")) / "policy"
        names = arguments.only or (list(VARIANTS) if on == "toy" else ["default", *PUSH_CUBE_ONLY, *best(found["toy"])])
        # On PushCube one after another: a run takes all cores, with its simulators and then with its update.
        threads, parallel = (1, arguments.parallel) if on == "toy" else (os.cpu_count() or 1, 1)
        # Seed after seed, so that a call that is stopped has every algorithm once.
        cells = [
            (output / f"{name}-{seed}", partial(run, name, seed, settings[on][name], checkpoint, threads, records[on]))
            for seed in seeds
            for name in names
            if seed not in found[on].get(name, {})
        ]
        fill(cells, parallel)
        found[on] = records[on].of(settings[on])
    for name, cells_of in found.items():
        if cells_of:
            write_part(name, cells_of)
    print(json.dumps({name: round(gain(runs)[0], 4) for name, runs in found[on].items()}))


def run(name: str, seed: int, words: list[str], checkpoint: Path, threads: int, records: Records, cell: Path) -> None:
    train(cell / "train", *words, f"policy={checkpoint}", f"seed={seed}", threads=threads)
    records.add(record_of(cell / "train", name, seed, words, checkpoint))


def settings_of_variant(name: str, words: list[str]) -> list[str]:
    """``words`` as a variant changes them; what only a critic reads is left out where there is none."""
    if name == "first_recipe":
        return FIRST_RECIPE
    if name == "half":
        return [HALF if word.startswith("iterations=") else word for word in words]
    changed = VARIANTS[name]
    critic = not any(word.startswith("algo.estimator=") for word in changed)
    return [*(word for word in words if critic or not word.startswith(OF_A_CRITIC)), *changed]


def write_part(on: str, found: Found) -> None:
    """Write one suite's part of the page and its figure; the other part stays as it is."""
    begin, end = f"<!-- {on} -->\n", f"<!-- end of {on} -->\n"
    before, _, rest = PAGE.read_text().partition(begin)
    _, _, after = rest.partition(end)
    text = on_toy(found) if on == "toy" else on_push_cube(found)
    PAGE.write_text(f"{before}{begin}{text}{end}{after}")
    FIGURES[on].write_text(figure(found))


def ranked(found: Found) -> list[str]:
    return sorted(found, key=lambda name: -gain(found[name])[0])


def best(toy: Found, count: int = 3) -> list[str]:
    """Of those that every seed has been run for; beside the default."""
    complete = {name: runs for name, runs in toy.items() if len(runs) == len(SEEDS["toy"]) and name != "default"}
    if len(complete) < count:
        raise SystemExit(f"{len(complete)} variants have all seeds on the toy; run those first, or say --only.")
    return ranked(complete)[:count]


def on_toy(toy: Found) -> str:
    rows = []
    for name in ranked(toy):
        runs = toy[name].values()
        steps = sum(one["env_steps"] for one in runs) / len(runs)
        minutes = sum(one["minutes"] for one in runs) / len(runs)
        words = " ".join(VARIANTS[name]) or "-"
        ahead = over_default(toy, name)
        rows.append(
            f"| {name} | `{words}` | {' | '.join(columns(toy[name]))} | {ahead} | {steps:,.0f} | {minutes:.2f} |"
        )
    return f"""
## On the toy

All begin with the same SFT checkpoint ({EPISODES} demonstrations), play 12 iterations of 192 training episodes and are
measured on 200 held-back initial states before and after, at temperature 1.0. The change is over all seeds together with
its 95% interval, p is McNemar's exact one. "Over the default" compares success after training on the same states, seed by
seed; it says that these runs differ, and with five seeds not yet that the next five would. The policy is pi0's architecture, because it is the cheapest here. Nothing was
tuned for any row: the settings are those that were found for the default with Qwen-VLA, which favours the default. Minutes
are wall-clock with other jobs on the machine. Which words do what: [Algorithms](../algorithms.md).
{missing(toy)}
| | changed | seeds | before -> after | points | p | over the default | environment steps | minutes |
|---|---|---|---|---|---|---|---|---|
{chr(10).join(rows)}

{why_the_default(toy)}
![Success after training, with 95% intervals](algorithms.svg)

{versions()["cpu"]}; `scripts/bench_algorithms.py`.

* SFT: `{" ".join(SFT)} policy=pi0_toy`.
* The default: `{" ".join(TRAIN)}`.
"""  # noqa: E501 - lines of the page


def on_push_cube(found: Found) -> str:
    rows = []
    begin = begun_with(found)
    for name in ranked(found):
        reached = [steps_to(curve_of(one), begin[one["checkpoint"]] + 0.2) for one in found[name].values()]
        steps = ", ".join("never" if one is None else f"{one:,}" for one in reached)
        # The least disturbed run.
        minutes = min(one["minutes"] for one in found[name].values())
        played = sum(one["env_steps"] for one in found[name].values()) / len(found[name])
        cells = [name, *columns(found[name]), over_default(found, name), steps, f"{played:,.0f}", f"{minutes:.1f}"]
        rows.append(f"| {' | '.join(cells)} |")
    few = [name for name, runs in found.items() if len(runs) < len(SEEDS["push_cube"])]
    unfinished = f"\n**Unfinished.** Fewer than {len(SEEDS['push_cube'])} seeds: {', '.join(few)}.\n" if few else ""
    return f"""
## On PushCube

The default and those that were best on the toy, with the [recipe](push_cube.md) of `make train`: Qwen-VLA's tiny model,
rendered images, 26 iterations of 256 episodes. `first_recipe` is what first worked here (`{" ".join(FIRST_RECIPE)}`), `half` the default with `{HALF}`.
"Steps to +20" are environment steps until {STRETCH:,} training episodes in a row succeed 20 points more often than those
that the SFT weights played, which are the first iterations of all rows: {", ".join(f"{one:.3f}" for one in begin.values())}. Minutes are the quickest seed's:
most cells shared the machine, some with three others.
{unfinished}
| | seeds | before -> after | points | p | over the default | steps to +20, by seed | environment steps | minutes |
|---|---|---|---|---|---|---|---|---|
{chr(10).join(rows)}

{half_the_steps(found)}
{why_the_default(found)}
![Success after training, with 95% intervals](algorithms-push_cube.svg)

{", ".join(sorted({one["cpu"] for runs in found.values() for one in runs.values()}))}; `scripts/bench_algorithms.py --on push_cube`.
"""  # noqa: E501 - lines of the page


def begun_with(found: Found) -> dict[str, float]:
    """Rollout success of each SFT checkpoint, from all rows that began with it: it is one number for all of them."""
    runs = [one for cells in found.values() for one in cells.values()]
    checkpoints = dict.fromkeys(one["checkpoint"] for one in runs)
    return {key: success_at_first(curve_of(one) for one in runs if one["checkpoint"] == key) for key in checkpoints}


def points_ahead(found: Found, name: str, of: str = "default") -> tuple[float, float] | None:
    """Points of success after training that a row is ahead of another, on equal states and seeds, and McNemar's p."""
    seeds = sorted(set(found.get(of, {})) & set(found.get(name, {})))
    if name == of or not seeds:
        return None
    other, own = ([bool(o) for seed in seeds for o in found[key][seed]["after"]] for key in (of, name))
    return 100 * (sum(own) - sum(other)) / len(own), mcnemar_exact(other, own)


def half_the_steps(found: Found) -> str:
    """What half of the steps gain on held-back states, beside all of those of what first worked, on seeds of both."""
    compared = points_ahead(found, "half", of="first_recipe")
    if compared is None:
        return ""
    seeds = sorted(set(found["half"]) & set(found["first_recipe"]))
    half, first = ({seed: found[name][seed] for seed in seeds} for name in ("half", "first_recipe"))
    played, whole = (sum(one["env_steps"] for one in runs.values()) / len(seeds) for runs in (half, first))
    return (
        f"**Half the steps.** On held-back states `half` gains {100 * gain(half)[0]:+.1f} points in {played:,.0f} "
        f"environment steps, `first_recipe`\n{100 * gain(first)[0]:+.1f} in {whole:,.0f}: "
        f"{played / whole:.2f} of the steps, {compared[0]:+.1f} points (seeds {', '.join(map(str, seeds))} of both; "
        f"p {compared[1]:.0e}).\n"
    )


def over_default(found: Found, name: str) -> str:
    compared = points_ahead(found, name)
    return f"{compared[0]:+.1f}, p {compared[1]:.0e}" if compared else "-"


def why_the_default(found: Found) -> str:
    """What a reader asks where the default is not the best row; empty where it is."""
    first = ranked(found)[0]
    compared = points_ahead(found, first)
    if compared is None:
        return ""
    points, p = compared
    rivals = len(found) - 1
    return (
        f"`{first}` is {points:.1f} points ahead of the default; it was picked from {rivals}, and corrected for that "
        f"(Bonferroni) p is {min(1.0, rivals * p):.2g}.\n"
        "A default changes when both the toy and PushCube show the same over all seeds, with a corrected p below .05.\n"
    )


def missing(found: Found) -> str:
    """What a reader must know of a table that is not complete; empty where it is."""
    without = [name for name in VARIANTS if name not in found]
    fewest, wanted = min((len(runs) for runs in found.values()), default=0), len(SEEDS["toy"])
    said = []
    if fewest < wanted:
        said.append(f"Rows have as few as {fewest} of {wanted} seeds: differences between neighbours mean nothing yet.")
    if without:
        said.append(f"Not run: {', '.join(without)}.")
    return f"\n**Unfinished.** {' '.join(said)}\n" if said else ""


def figure(found: Found) -> str:
    rows = [interval_row(name, found[name]) for name in ranked(found)]
    return stand_alone(
        interval_chart(title="Success after training", description="All seeds together, Wilson's 95%.", rows=rows)
    )


def interval_row(label: str, runs: dict[int, dict[str, Any]]) -> IntervalRow:
    after = [bool(o) for one in runs.values() for o in one["after"]]
    interval = wilson_interval(sum(after), len(after))
    detail = f"{len(runs)} seed{'s' if len(runs) > 1 else ''}"
    return IntervalRow(label=label, value=sum(after) / len(after), interval=interval, detail=detail)


if __name__ == "__main__":
    main()
