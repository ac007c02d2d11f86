"""Every architecture on the toy: demonstrations, SFT, PPO, over seeds. A table of what PPO gained.

    .venv/bin/python scripts/bench_policies.py [--seeds 0 1 2] [--policies qwen_vla_toy ...] [--parallel 2]

All learn from the same demonstrations with the same settings; a seed is of SFT and PPO alike. What is finished is kept
in --output, so a call that was stopped goes on, and cells that are missing are filled. The last line on stdout is JSON.
"""

import argparse
import json
import os
from functools import partial
from pathlib import Path
from typing import Any

from toy_cells import EPISODES, ROOT, SFT, TRAIN, collect, columns, fill, finished, sft, train

from rlvla.compose import group_choices
from rlvla.run import versions

PAGE = ROOT / "docs" / "benchmarks" / "policies.md"
# pi0.5 reads the state in its prompt, a table of 256 numbers that it must learn; 60 demonstrations it learns by heart.
OF_ITS_OWN = {
    "pi05_toy": (
        1000,
        ["suite=toy", "steps=5000", "batch_size=64", "noise_draws=4", "first_steps_weight=1"],
        ["iterations=36"],
    )
}


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
        for episodes in {settings_of(policy)[0] for policy in arguments.policies}:
            collect(output, episodes)
        # Seed after seed, so that a call that is stopped has every architecture once.
        cells = [
            (output / f"{policy}-{seed}", partial(run, policy, seed))
            for seed in arguments.seeds
            for policy in arguments.policies
        ]
        fill(cells, arguments.parallel)
    found = {
        policy: finished({seed: output / f"{policy}-{seed}" / "ppo" for seed in arguments.seeds})
        for policy in arguments.policies
    }
    PAGE.write_text(page({policy: seeds for policy, seeds in found.items() if seeds}, arguments))
    print(
        json.dumps({policy: {seed: one["success_after"] for seed, one in of.items()} for policy, of in found.items()})
    )


def settings_of(policy: str) -> tuple[int, list[str], list[str]]:
    """How many demonstrations an architecture learns from, how, and what its PPO has of its own."""
    return OF_ITS_OWN.get(policy, (EPISODES, SFT, []))


def run(policy: str, seed: int, cell: Path) -> None:
    episodes, imitation, own = settings_of(policy)
    data = collect(cell.parent, episodes)
    checkpoint = sft(cell / "sft", *imitation, f"policy={policy}", f"dataset={data}", f"seed={seed}")
    train(cell / "ppo", *TRAIN, *own, f"policy={checkpoint}", f"seed={seed}")


def page(found: dict[str, dict[int, dict[str, Any]]], arguments: argparse.Namespace) -> str:
    rows = [f"| `{policy}` | {' | '.join(columns(seeds))} |" for policy, seeds in found.items()]
    others = "".join(
        f"\n* `{policy}` reads the state in its prompt, and has settings of its own. SFT, from {episodes} "
        f"demonstrations: `{' '.join(imitation)}`; PPO: `{' '.join(own)}`."
        for policy, (episodes, imitation, own) in OF_ITS_OWN.items()
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

* SFT: `{" ".join(SFT)}`.{others}
* PPO: `{" ".join(TRAIN)}`.
"""  # noqa: E501 - lines of the page


if __name__ == "__main__":
    main()
