"""What PPO in SimplerEnv does to other suites: one small policy for SimplerEnv and LIBERO, before and after.

    RLVLA_SUITES=PATH .venv/bin/python scripts/bench_transfer.py [--list] [--only CELL ...] [--no-run]

Demonstrations of scripted experts -> SFT of one policy on all of them -> PPO in SimplerEnv only -> both policies on
every suite (`rlvla compare`) -> docs/benchmarks/transfer.md. Each stage is a cell with a folder under --output. A cell
that is finished is kept and missing ones are filled, so a call that was stopped goes on: PPO after its newest
checkpoint, a comparison with the episodes it lacks, demonstrations and SFT from their beginning. --list says what is
there. The page is written from the comparisons that are finished. The last line on stdout is JSON.
"""

import argparse
import json
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from make_train import Minutes, rlvla, settings_of

from rlvla.compare_tables import compared_markdown
from rlvla.comparison import compare_results
from rlvla.results import Result
from rlvla.run import versions

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "benchmarks" / "transfer.md"
RECIPE = "simpler_env_cpu"
TRAINED = "simpler_env"
HELD_OUT = "simpler_env_ood"
FOREIGN = ("libero_spatial", "libero_object", "metaworld_mt10")
"""Suites of other robots that --with may name: they have experts."""
ONE_BY_ONE = ["workers.num_actors=2", "workers.envs_per_actor=1"]
"""A slot of LIBERO takes 1.1 GB."""


@dataclass(frozen=True)
class Cell:
    """One command and what shows that it is done."""

    name: str
    verb: str
    words: tuple[str, ...]
    """Without output=."""
    folder: Path
    finished: str
    """A file in the folder, which the command writes last."""
    needs: tuple[str, ...] = ()
    goes_on: bool = True
    """Whether the command continues what it finds in its folder."""

    @property
    def done(self) -> bool:
        return (self.folder / self.finished).exists()

    @property
    def record(self) -> Path:
        """The words that the cell was begun with: a page of today's options must not show yesterday's numbers."""
        return self.folder.with_name(f"{self.name}.json")


def main(given: Sequence[str] | None = None) -> None:
    arguments = parse(given)
    cells = plan(arguments)
    unknown = sorted(set(arguments.only) - {cell.name for cell in cells})
    if unknown:
        sys.exit(f"there is no cell {', '.join(unknown)}; cells: {', '.join(cell.name for cell in cells)}.")
    if arguments.list:
        for cell in cells:
            words = shlex.join([*cell.words, f"output={cell.folder}"])
            print(f"{'done   ' if cell.done else 'missing'} {cell.name}: rlvla {cell.verb} {words}")
        return
    check_words(cells)
    if not arguments.no_run:
        run(cells, arguments.only, arguments.output)
    print(json.dumps(write_page(cells, arguments)))


def parse(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "transfer")
    parser.add_argument(
        "--with", dest="foreign", nargs="*", choices=FOREIGN, default=["libero_spatial", "libero_object"]
    )
    parser.add_argument("--policy", default="qwen_vla_small", help="a file of configs/policy")
    parser.add_argument("--simpler-demonstrations", type=int, default=480)
    parser.add_argument("--foreign-demonstrations", type=int, default=100, help="of each other suite")
    parser.add_argument("--image-size", type=int, default=160, help="pixels, in SimplerEnv")
    parser.add_argument(
        "--foreign-task",
        action="append",
        default=[],
        metavar="SUITE=TASKS",
        help="as suite.task: some of another suite's tasks, to collect and to compare on; all where not given",
    )
    parser.add_argument("--foreign-image-size", type=int, default=96, help="pixels, in the other suites")
    parser.add_argument("--foreign-weight", type=float, default=1.0, help="of each other suite; SimplerEnv has 2")
    parser.add_argument("--sft-steps", type=int, default=5000)
    parser.add_argument("--iterations", type=int, default=16, help="of PPO")
    parser.add_argument("--episodes", type=int, default=256, help="of an iteration of PPO")
    parser.add_argument("--max-minutes", type=float, default=60, help="of PPO")
    parser.add_argument("--trials", type=int, default=96, help="of each task, SimplerEnv and OOD: states and noises")
    parser.add_argument("--foreign-trials", type=int, default=10, help="initial states of each task of another suite")
    parser.add_argument("--seed", type=int, default=0, help="of SFT and PPO")
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--only", nargs="+", default=[], metavar="CELL", help="run these alone")
    parser.add_argument("--list", action="store_true", help="say what is there, and run nothing")
    parser.add_argument("--no-run", action="store_true", help="write the page from what there is")
    parser.add_argument("--word", action="append", default=[], metavar="VERB:KEY=VALUE", help="a further setting")
    return parser.parse_args(given)


def plan(arguments: argparse.Namespace) -> list[Cell]:
    """Every cell, in an order in which each comes after what it needs."""
    root: Path = arguments.output.resolve()
    recipe = settings_of(RECIPE, arguments.policy)
    pixels = {TRAINED: arguments.image_size, HELD_OUT: arguments.image_size}
    pixels |= dict.fromkeys(arguments.foreign, arguments.foreign_image_size)
    tasks = dict(given.split("=", 1) for given in arguments.foreign_task)
    if unknown := sorted(tasks.keys() - set(arguments.foreign)):
        among = ", ".join(arguments.foreign)
        sys.exit(f"--foreign-task names {', '.join(unknown)}; it must be one of --with: {among}.")
    chosen = {suite: [f"suite.task={task}"] for suite, task in tasks.items()}
    more_words: dict[str, list[str]] = {}
    for word in arguments.word:
        verb, _, setting = word.partition(":")
        more_words.setdefault(verb, []).append(setting)

    def cell(name: str, verb: str, words: Sequence[str], finished: str, **more: Any) -> Cell:
        return Cell(name, verb, (*words, *more_words.get(verb, [])), root / name, finished, **more)

    cells = []
    for suite in (TRAINED, *arguments.foreign):
        count = arguments.simpler_demonstrations if suite == TRAINED else arguments.foreign_demonstrations
        words = [f"suite={suite}", f"suite.image_size={pixels[suite]}", f"episodes={count}"]
        words += [] if suite == TRAINED else [*chosen.get(suite, []), *ONE_BY_ONE]
        cells.append(cell(f"data-{suite}", "collect", words, "meta/info.json", goes_on=False))

    more = ", ".join(
        f"{{dataset: {root / f'data-{s}'}, weight: {arguments.foreign_weight:g}}}" for s in arguments.foreign
    )
    words = replaced(
        recipe["sft"],
        suite__image_size=arguments.image_size,
        steps=arguments.sft_steps,
        dataset=root / f"data-{TRAINED}",
        weight=2,
        seed=arguments.seed,
    )
    words += [f"more=[{more}]"] if more else []
    needs = tuple(each.name for each in cells)
    cells.append(cell("sft", "sft", words, "summary.json", needs=needs, goes_on=False))

    words = replaced(
        recipe["train"],
        suite__image_size=arguments.image_size,
        iterations=arguments.iterations,
        episodes_per_iteration=arguments.episodes,
        max_minutes=arguments.max_minutes,
        seed=arguments.seed,
        policy=root / "sft" / "policy",
        # What it was before and after is measured below.
        eval__trials=1,
        eval__noise_seeds=1,
        eval__shuffled_images="false",
        eval__videos=0,
    )
    cells.append(cell("ppo", "train", words, "report.html", needs=("sft",)))

    for suite in (TRAINED, HELD_OUT, *arguments.foreign):
        foreign = suite in arguments.foreign
        trials = arguments.foreign_trials if foreign else arguments.trials
        words = [
            str(root / "sft" / "policy"),
            str(root / "ppo" / "policy"),
            f"suites=[{suite}]",
            f"suite.image_size={pixels[suite]}",
            f"cache={root / 'results'}",
            f"eval.trials={trials}",
            # SimplerEnv has about 24 states a task: they are visited again with other noise.
            f"eval.noise_seeds={1 if foreign else max(1, -(-trials // 20))}",
            "eval.temperature=1.0",
            "eval.videos=0",
            *([f"trained_on=[{TRAINED}]"] if suite == TRAINED else []),
            *chosen.get(suite, []),
            *(ONE_BY_ONE if foreign else ["workers.envs_per_actor=16"]),
        ]
        cells.append(cell(f"compare-{suite}", "compare", words, "compare.json", needs=("sft", "ppo")))
    return cells


def replaced(words: Sequence[str], **values: object) -> list[str]:
    """Settings of a recipe with others for some keys, whose dots are two underscores here."""
    given = {key.replace("__", "."): value for key, value in values.items()}
    kept = [word for word in words if word.partition("=")[0] not in given]
    return [*kept, *(f"{key}={value}" for key, value in given.items())]


def check_words(cells: Sequence[Cell]) -> None:
    """Leave with a message where what is there was made with other options."""
    for cell in cells:
        begun = json.loads(cell.record.read_text()) if cell.record.exists() else None
        if begun is not None and begun != list(cell.words):
            other = sorted(set(begun) ^ set(cell.words))
            sys.exit(
                f"{cell.name} was begun with other settings ({', '.join(other)}). Give the options it was begun with, "
                f"another --output, or remove {cell.folder} and {cell.record}."
            )


def run(cells: Sequence[Cell], only: Sequence[str], output: Path) -> None:
    """Fill what is missing. A cell whose needs are not there is left out, and named."""
    spent = Minutes(output / "minutes.json")
    done = {cell.name for cell in cells if cell.done}
    for cell in cells:
        if cell.name in done or (only and cell.name not in only):
            continue
        missing = [name for name in cell.needs if name not in done]
        if missing:
            print(f"{cell.name} needs {', '.join(missing)} first", file=sys.stderr)
            continue
        if not cell.goes_on:
            shutil.rmtree(cell.folder, ignore_errors=True)
        cell.record.parent.mkdir(parents=True, exist_ok=True)
        cell.record.write_text(json.dumps(cell.words))
        spent.on(cell.name, lambda c=cell: rlvla(c.verb, list(c.words), output=c.folder))  # type: ignore[misc]
        done.add(cell.name)


# --- the page


def write_page(cells: Sequence[Cell], arguments: argparse.Namespace) -> dict[str, Any]:
    """Write the page from the comparisons that are finished; what is shown, suite by suite."""
    finished = [cell for cell in cells if cell.verb == "compare" and cell.done]
    missing = [cell.name for cell in cells if not cell.done]
    if not finished:
        return {"page": None, "missing": missing}
    before, after = [], []
    for cell in finished:
        results = json.loads((cell.folder / "compare.json").read_text())["results"]
        before += [Result.from_dict(one) for one in results["before"]]
        after += [Result.from_dict(one) for one in results["after"]]
    arguments.page.write_text(page(before, after, cells, arguments))
    success = {b.label: [b.evaluation.success, a.evaluation.success] for b, a in zip(before, after, strict=True)}
    return {"page": str(arguments.page), "success": success, "missing": missing}


def asked_for(arguments: argparse.Namespace) -> str:
    """The call that makes this page elsewhere: what it was given, but for places on this machine."""
    plain = vars(parse([]))
    words = ["scripts/bench_transfer.py"]
    for name, value in vars(arguments).items():
        if name in ("output", "page", "only", "list", "no_run") or value == plain[name]:
            continue
        option = "--with" if name == "foreign" else f"--{name.replace('_', '-')}"
        if option in ("--foreign-task", "--word"):
            words += [word for one in value for word in (option, one)]
        else:
            words += [
                option,
                *(value if isinstance(value, list) else [f"{value:g}" if isinstance(value, float) else str(value)]),
            ]
    return shlex.join(words)


def page(before: list[Result], after: list[Result], cells: Sequence[Cell], arguments: argparse.Namespace) -> str:
    table = compared_markdown(compare_results(before, after, [TRAINED]), before, after)
    # One title a page, and no folders of this machine.
    table = table.partition("\n")[2].strip().replace(f"{arguments.output.resolve()}/", "")
    fewer = [one.replace("=", " only tasks ") for one in arguments.foreign_task]
    some = f" Of {' and of '.join(fewer)} are collected and compared." if fewer else ""
    minutes = json.loads((arguments.output / "minutes.json").read_text())
    commands = "\n".join(
        shlex.join(["rlvla", cell.verb, *cell.words]).replace(f"{arguments.output.resolve()}/", "") for cell in cells
    )
    took = ", ".join(f"{name} {spent:.0f}" for name, spent in minutes.items())
    missing = [cell.name for cell in cells if not cell.done]
    unmeasured = f"\n**Not there yet:** {', '.join(missing)}.\n" if missing else ""
    machine = versions()
    return f"""# Measured: PPO in SimplerEnv, and what it does elsewhere

<!-- Written by scripts/bench_transfer.py. -->

One small policy (`{arguments.policy}`) learns from scripted experts in {", ".join([TRAINED, *arguments.foreign])}: {len(arguments.foreign) + 1} datasets of
robots with other action spaces, cameras and frequencies, in one network ([how](../how-to/several-robots.md)). Then PPO refines it in
`{TRAINED}` alone. "Before" is the policy after SFT, "after" the one after PPO. The other suites are held out from PPO; their
demonstrations, but for `{HELD_OUT}`, were in the SFT set.

{arguments.trials} trials at most of each task of SimplerEnv and SimplerEnv-OOD, where initial states are visited again with other noise.
**Of each task of the other suites {arguments.foreign_trials} of 50 initial states**, once each: fewer than their publications use.{some} One seed of SFT and
PPO: the intervals are of the evaluation and say nothing about other seeds.
{unmeasured}
{table}

## How it was made

```
{asked_for(arguments)}
```

on {machine["cpu"]}, commit {machine["git_commit"]}. Minutes of wall-clock, other jobs may have shared the cores: {took}. It ran

```
{commands}
```
"""  # noqa: E501 - lines of the page


if __name__ == "__main__":
    main()
