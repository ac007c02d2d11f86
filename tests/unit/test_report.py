"""The report tells what happened, shows no number the run did not measure, and loads nothing."""

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlvla.report import write_report
from rlvla.svg import Series, line_chart, number, percent
from rlvla_algos.statistics import mcnemar_exact, paired_difference_interval, wilson_interval

TRIALS = 200
VOID = {"meta", "link", "br", "img", "input", "hr"}
CONFIG = """\
policy: runs/sft/policy
output: runs/train
seed: 3
temperature: 1.0
iterations: {iterations}
episodes_per_iteration: 256
suite:
  name: maniskill
  task: PushCube-v1
  chunk_size: 8
  max_episode_steps: 48
workers:
  kind: ray
  num_actors: 0
  envs_per_actor: 8
algo:
  noise_level: 0.5
  reduction: elementwise
  clip_epsilon: 0.2
  gamma: 0.99
  gae_lambda: 0.95
  epochs: 8
  minibatch_size: 256
  target_kl: 0.1
  lr_schedule: kl
  policy_lr: 0.0001
  max_policy_lr: 0.002
  value_lr: 0.001
  max_grad_norm: 1.0
  train_vlm: false
  mean_tolerance: 0.001
eval:
  trials: 200
  temperature: 0.6
  seed: 12345
"""


class Page(HTMLParser):
    """A parsed page that complains about tags that do not match."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.headline: list[tuple[str, str]] = []
        self.text = ""
        self.feed(source)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"script", "style"} & set(self.open):
            self.text += data

    def attributes(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def write_evaluation(run: Path, name: str, outcomes: np.ndarray, **more: Any) -> float:
    successes, trials = int(outcomes.sum()), len(outcomes)
    content = {
        "name": name,
        "suite": "maniskill",
        "task": "PushCube-v1",
        "temperature": 0.6,
        "sampler": "ode",
        "images": "shuffled" if name.endswith("shuffled") else "own",
        "seed": 12345,
        "trials": trials,
        "successes": successes,
        "success": successes / trials,
        "interval": wilson_interval(successes, trials),
        "outcomes": outcomes.astype(int).tolist(),
        "initial_states": list(range(trials)),
        "executed_steps": [48] * trials,
        "max_episode_steps": 48,
    }
    write_json(run / "evaluations" / f"{name}.json", content | more)
    return successes / trials


def write_comparison(run: Path, before: np.ndarray, after: np.ndarray) -> None:
    a, b = before.tolist(), after.tolist()
    content = {
        "before": before.mean(),
        "after": after.mean(),
        "trials": len(a),
        "gained": int((~before & after).sum()),
        "lost": int((before & ~after).sum()),
        "kept": int((before & after).sum()),
        "p_value": mcnemar_exact(a, b),
        "difference": after.mean() - before.mean(),
        "interval": paired_difference_interval(a, b),
    }
    write_json(run / "comparison.json", content)


def iteration_row(i: int, iterations: int, rng: np.random.Generator) -> dict[str, Any]:
    """Numbers that move as those of a healthy run do."""
    share = i / max(1, iterations - 1)
    success = rng.binomial(256, 0.36 + 0.34 * (1 - math.exp(-3 * share)) / (1 - math.exp(-3))) / 256
    kl = 0.0 if i == 0 else 0.1 * math.exp(rng.normal(-0.4 * math.exp(-i / 3), 0.25))
    row: dict[str, Any] = {
        "kind": "iteration",
        "iteration": i,
        "env_steps": 10240 * (i + 1),
        "minutes": 1.6 + 1.05 * (i + 1) + (0.7 if i >= 10 else 0),
        "rollout/success": success,
        "rollout/episodes": 256,
        "rollout/decisions": 1300,
        "rollout/env_steps": 10240,
        "rollout/mean_executed_steps": 7.9,
        "loss/policy": rng.normal(-0.01, 0.003),
        "loss/value": 0.05 + 0.2 * math.exp(-i / 4) + abs(rng.normal(0, 0.008)),
        "ppo/kl": kl,
        "ppo/clip_fraction": 0.0 if i == 0 else float(rng.normal(0.16, 0.02)),
        "ppo/ratio_error": 4e-6 * math.exp(rng.normal(0, 0.4)),
        "ppo/mean_error": 0.0 if i == 4 else 9e-6 * math.exp(rng.normal(0, 0.4)),
        "ppo/epochs": 8,
        "value/explained_variance": 0.72 - 3.0 * math.exp(-i / 1.5) + rng.normal(0, 0.03),
        "optim/policy_lr": 1e-4 * 1.5 ** min(5, i // 2),
        "optim/grad_norm": abs(rng.normal(0.55, 0.12)),
        "time/rollout_s": 43.0,
        "time/update_s": 18.0,
        "speed/env_steps_per_s": rng.normal(171, 4),
    }
    return row | {f"ppo/kl_step_{k}": kl * w for k, w in enumerate((0.06, 0.1, 0.2, 0.64))}


def write_videos(run: Path, states: int = 2, frames: int = 12) -> None:
    import imageio.v2 as imageio

    index = []
    for phase in ("before", "after"):
        for state in range(states):
            solved = phase == "after" or state == 1
            film = []
            for t in range(frames):
                frame = np.full((128, 128, 3), (222, 217, 208), np.uint8)
                frame[20:60, 76:116] = (205, 120, 110)
                x = 20 + int((62 if solved else 25 + 9 * state) * t / frames)
                y = 84 - int((50 if solved else 12) * t / frames)
                frame[y : y + 18, x : x + 18] = (40, 98, 160)
                film.append(frame)
            (run / "videos").mkdir(parents=True, exist_ok=True)
            with imageio.get_writer(run / "videos" / f"{phase}-{state}.mp4", fps=12, macro_block_size=2) as writer:
                for frame in film:
                    writer.append_data(frame)
            entry = {"initial_state": state, "success": solved, "instruction": "push the cube to the target"}
            index.append({"file": f"{phase}-{state}.mp4", "phase": phase, **entry})
    write_json(run / "videos" / "index.json", index)


def make_run(
    run: Path, *, iterations: int = 40, done: int | None = None, success: tuple[float, float] = (0.41, 0.72)
) -> Path:
    """A realistic run folder without videos; `done` < `iterations` is a run that was killed."""
    rng = np.random.default_rng(7)
    run.mkdir(parents=True, exist_ok=True)
    (run / "config.yaml").write_text(CONFIG.format(iterations=iterations))
    write_json(run / "policy" / "config.yaml", {"policy": {"num_denoising_steps": 4}})
    write_json(run / "versions.json", {"python": "3.11.7", "rlvla": "0.1.0", "git_commit": "0123abc"})
    before = rng.permutation(TRIALS) < round(TRIALS * success[0])
    keeps = before & (rng.random(TRIALS) < 0.93 if success[1] > success[0] else True)
    after = keeps.copy()
    spare = rng.permutation(np.flatnonzero(~before))
    after[spare[: max(0, round(TRIALS * success[1]) - int(after.sum()))]] = True
    surplus = rng.permutation(np.flatnonzero(after))[: max(0, int(after.sum()) - round(TRIALS * success[1]))]
    after[surplus] = False

    rows: list[dict[str, Any]] = [{"kind": "evaluation", "name": "before", "env_steps": 0, "minutes": 1.4}]
    rows[0] |= {"success": write_evaluation(run, "before", before), "trials": TRIALS}
    write_evaluation(run, "before-shuffled", before & (rng.random(TRIALS) < 0.3))
    write_json(run / "probe.json", {"before": {"own": before.mean(), "shuffled": 0.14, "p_value": 3e-10}})
    finished = iterations if done is None else done
    for i in range(finished):
        rows.append(iteration_row(i, iterations, rng))
        if i == 9:
            rate = write_evaluation(run, "iteration-0010", rng.random(50) < 0.58)
            where = {"env_steps": rows[-1]["env_steps"], "minutes": rows[-1]["minutes"]}
            rows.append({"kind": "evaluation", "name": "iteration-0010", **where, "success": rate, "trials": 50})
    if finished > 3:
        rows.append({"kind": "alarm", "iteration": 3, "message": "KL 0.27 passed 2 x algo.target_kl; the epochs ended early."})
    if done is None:
        rate = write_evaluation(run, "after", after)
        last = {"env_steps": 10240 * iterations, "minutes": 5.4 + 1.05 * iterations}
        rows.append({"kind": "evaluation", "name": "after", **last, "success": rate, "trials": TRIALS})
        write_evaluation(run, "after-shuffled", after & (rng.random(TRIALS) < 0.2))
        probe = json.loads((run / "probe.json").read_text())
        write_json(run / "probe.json", probe | {"after": {"own": rate, "shuffled": 0.16, "p_value": 2e-21}})
        write_comparison(run, before, after)
        write_json(run / "summary.json", {"task": "PushCube-v1", **last})
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run
