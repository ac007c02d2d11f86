"""A recipe, demonstrations -> SFT checkpoint -> PPO -> report. `make train` runs the embedded one.

    .venv/bin/python scripts/make_train.py [--recipe push_cube] [--policy NAME] [--output runs/RECIPE] [--seed 0]

The verbs with the settings of configs/recipe/RECIPE.yaml; where that has an `eval` part, the SFT checkpoint and the
refined policy are measured with it too. Stages that are finished are kept, so a run that was stopped goes on with the
stage it was in: PPO after its newest checkpoint, an evaluation with the episodes it lacks, the others from their
beginning. The last line on stdout is one JSON object.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
RECIPES = ROOT / "configs" / "recipe"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", choices=sorted(f.stem for f in RECIPES.glob("*.yaml")), default="push_cube")
    parser.add_argument("--policy", help="a file of configs/policy instead of the recipe's")
    parser.add_argument("--output", type=Path, help="runs/RECIPE, or runs/RECIPE-POLICY with --policy")
    parser.add_argument("--seed", type=int, default=0, help="of the PPO stage; the SFT checkpoint stays the same")
    arguments = parser.parse_args()
    recipe = settings_of(arguments.recipe, arguments.policy)
    output: Path = arguments.output or ROOT / "runs" / label(arguments.recipe, arguments.policy)
    ppo = output / f"ppo-seed{arguments.seed}"

    spent = Minutes(output / "minutes.json")
    sft = prepare(recipe, output, spent)
    if not (ppo / "report.html").exists():
        spent.on(
            f"train-{arguments.seed}",
            lambda: rlvla("train", recipe["train"], policy=sft / "policy", output=ppo, seed=arguments.seed),
        )

    for policy, folder in ((sft, output / "eval-sft"), (ppo, output / f"eval-seed{arguments.seed}")):
        if "eval" in recipe and not (folder / "report.html").exists():
            spent.on(
                folder.name, lambda p=policy, f=folder: rlvla("eval", recipe["eval"], policy=p / "policy", output=f)
            )

    summary = json.loads((ppo / "summary.json").read_text())
    summary["minutes"] = round(spent.total("collect", "sft", f"train-{arguments.seed}"), 2)
    print(f"report: {summary['report']}", file=sys.stderr)
    print(json.dumps(summary))


def settings_of(recipe: str, policy: str | None) -> dict[str, list[str]]:
    """What a recipe gives to each verb, with another architecture where one is named."""
    settings: dict[str, list[str]] = yaml.safe_load((RECIPES / f"{recipe}.yaml").read_text())
    if policy:
        settings["sft"] = [f"policy={policy}" if s.startswith("policy=") else s for s in settings["sft"]]
    return settings


def label(recipe: str, policy: str | None) -> str:
    return f"{recipe}-{policy}" if policy else recipe


class Minutes:
    """Wall-clock minutes of each stage, kept beside the results so that a resumed recipe adds up."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.stages: dict[str, float] = json.loads(path.read_text()) if path.exists() else {}

    def on(self, stage: str, work: object) -> None:
        started = time.monotonic()
        assert callable(work)
        try:
            work()
        finally:
            # A stage that is stopped and continued has cost both times.
            self.stages[stage] = self.stages.get(stage, 0.0) + (time.monotonic() - started) / 60
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps(self.stages, indent=1) + "\n")

    def total(self, *stages: str) -> float:
        return sum(self.stages.get(stage, 0.0) for stage in stages)


def prepare(recipe: dict[str, list[str]], output: Path, spent: Minutes) -> Path:
    """The folder of the SFT stage, made with its demonstrations unless it is there."""
    dataset, sft = output / "demonstrations", output / "sft"
    if not (dataset / "meta" / "info.json").exists():
        spent.on("collect", lambda: rlvla("collect", recipe["collect"], output=dataset))
    if not (sft / "summary.json").exists():
        shutil.rmtree(sft, ignore_errors=True)
        spent.on("sft", lambda: rlvla("sft", recipe["sft"], dataset=dataset, output=sft))
    return sft


def rlvla(verb: str, settings: list[str], **paths: object) -> None:
    """Run a verb of this environment's rlvla; its stdout line is its own business, ours comes last."""
    overrides = [*settings, *(f"{key}={value}" for key, value in paths.items())]
    print(f"\n$ rlvla {verb} {' '.join(overrides)}", file=sys.stderr, flush=True)
    done = subprocess.run(
        [sys.executable, "-m", "rlvla.cli", verb, *overrides],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        check=False,
    )
    if done.returncode:
        sys.exit(done.returncode)


if __name__ == "__main__":
    main()
