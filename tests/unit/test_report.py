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
  ratio_tolerance: 0.01
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


def write_probe(run: Path, phase: str, own: np.ndarray, shuffled: np.ndarray) -> dict[str, float]:
    rate = write_evaluation(run, f"{phase}-shuffled", shuffled)
    return {"own": own.mean(), "shuffled": rate, "p_value": mcnemar_exact(own.tolist(), shuffled.tolist())}


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
        "time/infer_s": 12.0,
        "time/simulators_s": 30.0,
        "time/update_s": 18.0,
        "time/save_s": 0.5,
        "speed/env_steps_per_s": rng.normal(171, 4),
    }
    return row | {f"ppo/kl_step_{k}": kl * w for k, w in enumerate((0.06, 0.1, 0.2, 0.64))}


def write_videos(run: Path, states: int = 2, frames: int = 12) -> None:
    import imageio.v2 as imageio

    index = []
    for phase in ("before", "after"):
        for state in range(states):
            solved = phase == "after" or state == 1
            film: list[Any] = []
            for t in range(frames):
                frame = np.full((128, 128, 3), (222, 217, 208), np.uint8)
                frame[20:60, 76:116] = (205, 120, 110)
                x = 20 + int((62 if solved else 25 + 9 * state) * t / frames)
                y = 84 - int((50 if solved else 12) * t / frames)
                frame[y : y + 18, x : x + 18] = (40, 98, 160)
                film.append(frame)
            (run / "videos").mkdir(parents=True, exist_ok=True)
            imageio.mimsave(run / "videos" / f"{phase}-{state}.mp4", film, fps=12, macro_block_size=2)
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
    probe = {"before": write_probe(run, "before", before, before & (rng.random(TRIALS) < 0.3))}
    finished = iterations if done is None else done
    for i in range(finished):
        rows.append(iteration_row(i, iterations, rng))
        if i == 9:
            rate = write_evaluation(run, "iteration-0010", rng.random(50) < 0.58)
            where = {"env_steps": rows[-1]["env_steps"], "minutes": rows[-1]["minutes"]}
            rows.append({"kind": "evaluation", "name": "iteration-0010", **where, "success": rate, "trials": 50})
    if finished > 3:
        rows.append({"kind": "alarm", "where": "iteration 3", "message": "KL 0.43 is over 4x its target of 0.1"})
    if done is None:
        rate = write_evaluation(run, "after", after)
        last = {"env_steps": 10240 * iterations, "minutes": 5.4 + 1.05 * iterations}
        rows.append({"kind": "evaluation", "name": "after", **last, "success": rate, "trials": TRIALS})
        probe["after"] = write_probe(run, "after", after, after & (rng.random(TRIALS) < 0.2))
        write_comparison(run, before, after)
        write_json(run / "summary.json", {"task": "PushCube-v1", **last})
    write_json(run / "probe.json", probe)
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that went well, with videos and a report. Tests only read it."""
    run = make_run(tmp_path_factory.mktemp("runs") / "finished")
    write_videos(run)
    write_report(run)
    return run


def source_of(run: Path) -> str:
    return write_report(run).read_text(encoding="utf-8")


def rewrite_metrics(run: Path, change: Any) -> None:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (run / "metrics.jsonl").write_text("".join(json.dumps(change(row)) + "\n" for row in rows))


def test_the_page_is_well_formed_and_in_the_promised_order(finished: Path) -> None:
    page = Page((finished / "report.html").read_text())
    headings = ["PushCube-v1", "Success", "Learning curve", "State by state", "Videos", "Health", "Alarms", "Restarts"]
    places = [page.text.index(heading) for heading in headings]
    assert places == sorted(places)
    assert "Settings" in page.text
    assert "Full configuration" in page.text


def test_the_page_loads_nothing_and_forbids_loading(finished: Path) -> None:
    page = Page((finished / "report.html").read_text())
    for _, attributes in page.tags:
        for name in ("src", "href", "poster", "action", "xlink:href"):
            assert (attributes.get(name) or "data:").startswith("data:")
    assert page.attributes("link") == []
    policy = next(a["content"] for a in page.attributes("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    assert not re.search(r"https?:", re.sub(r"base64,[A-Za-z0-9+/=]+", "", (finished / "report.html").read_text()))


def test_every_number_of_the_headline_is_in_the_json(finished: Path) -> None:
    source = (finished / "report.html").read_text()
    headline = re.search(r'<p class="verdict better">(.*?)</p>', source, re.S)
    assert headline
    comparison = json.loads((finished / "comparison.json").read_text())
    measured = [*(v for v in comparison.values() if not isinstance(v, list)), *comparison["interval"]]
    shown = re.findall(r'<data value="([^"]+)">', headline[1])
    assert len(shown) == 7
    assert {float(value) for value in shown} <= set(measured)
    # Outside the marked numbers only the level of the interval is a number.
    rest = re.sub(r"<data.*?</data>", "", headline[1])
    assert re.findall(r"\d+", rest) == ["95"]


def test_a_gain_is_told_in_plain_words(finished: Path) -> None:
    page = Page((finished / "report.html").read_text())
    assert "Success rose from 41% to 72% on 200 held-back initial states (paired exact McNemar p =" in page.text
    assert "this run has not finished" not in page.text


def test_a_gain_that_may_be_luck_is_not_called_a_gain(tmp_path: Path) -> None:
    text = Page(source_of(make_run(tmp_path / "run", success=(0.41, 0.44)))).text
    assert "No significant change: success was 41% before and 44% after" in text
    assert "rose" not in text


def test_a_loss_is_told_with_advice(tmp_path: Path) -> None:
    text = Page(source_of(make_run(tmp_path / "run", success=(0.41, 0.22)))).text
    assert "Success fell from 41% to 22%" in text
    assert "keep the policy from before" in text


def test_a_killed_run_says_that_it_has_not_finished(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", done=13)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "iteration", "iterat')
    text = Page(source_of(run)).text
    assert "this run has not finished" in text
    assert "13 of 40 iterations" in text
    assert "No result yet: before training 41% of 200 held-back initial states" in text
    assert "1 line(s) of metrics.jsonl could not be read" in text
    assert "Not measured: after; after, eyes swapped." in text


def test_an_empty_folder_still_gets_a_report(tmp_path: Path) -> None:
    text = Page(source_of(tmp_path)).text
    assert "nothing was evaluated" in text
    assert "config.yaml is missing" in text


def test_a_missing_folder_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        write_report(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["summary.json", "comparison.json", "probe.json", "versions.json", "config.yaml"])
def test_a_damaged_file_is_named_and_the_rest_is_shown(tmp_path: Path, name: str) -> None:
    run = make_run(tmp_path / "run", iterations=4)
    (run / name).write_text("{{ torn")
    text = Page(source_of(run)).text
    assert name in text
    assert "Learning curve" in text


def test_metrics_that_are_nan_or_null_are_gaps(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", iterations=6)

    def spoil(row: dict[str, Any]) -> dict[str, Any]:
        if row.get("iteration") == 2:
            row |= {"rollout/success": None, "ppo/kl": math.nan, "loss/value": math.inf, "minutes": None}
        return row

    rewrite_metrics(run, spoil)
    source = source_of(run)
    page = Page(source)
    assert not re.search(r"\b(nan|inf|None)\b", re.sub(r"<title>.*?</title>", "", page.text), re.I)
    assert not re.search(r'(points|cx|cy|x1|y1)="[^"]*(nan|inf)', source)


def test_metrics_that_were_never_recorded_are_said_to_be_missing(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", iterations=3)
    rewrite_metrics(run, lambda row: {k: v for k, v in row.items() if k != "optim/grad_norm"})
    assert "Not recorded." in Page(source_of(run)).text


def test_what_was_lost_is_counted_with_its_cost_and_what_is_left_out_is_named(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", iterations=5)
    assert "None: no simulator and no learner was lost." in Page(source_of(run)).text
    killed = {"kind": "restart", "why": "died", "replayed_chunks": 4, "lost_episodes": 0, "quarantined": []}
    # Two that look alike are two.
    rows: list[dict[str, Any]] = [killed | {"where": "iteration 1", "worker": 3, "recovery_s": 1.5}] * 2
    rows.append(killed | {"where": "evaluation after", "worker": 1, "recovery_s": 20.0, "lost_episodes": 1})
    rows[-1]["quarantined"] = [1017]
    rows.append({"kind": "alarm", "where": "restart 1", "message": "learner rank 1 died"})
    with (run / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    write_evaluation(run, "iteration-0003", np.ones(2), quarantined=[7])
    said = " ".join(re.sub(r"<[^>]+>", " ", source_of(run)).split())
    # By hand: 2 x 1.5 + 20 seconds, 3 x 4 chunks, one episode.
    assert "simulator 1, 3 3 23 12 1" in said
    assert "all learners, from the newest checkpoint 1 – – –" in said
    assert "left out: 7, 1017 ." in said
    assert "None: no simulator" not in said


def test_a_resumed_run_counts_repeated_iterations_once(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", iterations=5)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join([*lines, *lines[1:4]]) + "\n")
    assert "5 of 5 iterations" in Page(source_of(run)).text


def test_text_from_the_run_is_escaped(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", iterations=2)
    attack = '"><script>alert(1)</script>'
    (run / "videos").mkdir()
    entry = {"file": "before-0.mp4", "phase": attack, "initial_state": attack, "success": True}
    (run / "videos" / "before-0.mp4").write_bytes(b"film")
    write_json(run / "videos" / "index.json", [entry | {"instruction": attack}])
    (run / "config.yaml").write_text(json.dumps({"policy": attack, "iterations": attack, "suite": {"name": attack}}))
    write_json(run / "versions.json", {attack: attack})
    write_json(run / "evaluations" / "after.json", {"task": attack, "success": 0.5, "temperature": attack})
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"kind": "alarm", "where": attack, "message": attack}) + "\n")
    page = Page(source_of(run))
    assert len(page.attributes("script")) == 1
    assert "alert(1)" in page.text


def test_a_video_index_cannot_reach_outside_its_folder(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", iterations=2)
    (tmp_path / "secret.mp4").write_bytes(b"secret")
    entry = {"file": "../../secret.mp4", "phase": "before", "initial_state": 0, "success": True}
    write_json(run / "videos" / "index.json", [entry])
    page = Page(source_of(run))
    assert page.attributes("video") == []
    assert "1 video(s) are absent" in page.text


def test_videos_are_paired_by_initial_state_and_carry_their_outcome(finished: Path) -> None:
    page = Page((finished / "report.html").read_text())
    labels = [video["aria-label"] for video in page.attributes("video")]
    assert labels == [
        "before, initial state 0, not solved",
        "after, initial state 0, solved",
        "before, initial state 1, solved",
        "after, initial state 1, solved",
    ]


def test_a_policy_that_loses_nothing_without_its_eyes_is_called_blind(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", iterations=2)
    write_json(run / "probe.json", {"after": {"own": 0.72, "shuffled": 0.7, "p_value": 0.6}})
    assert "After training the policy may be blind" in Page(source_of(run)).text


def test_an_evaluation_without_training_has_a_report_too(tmp_path: Path) -> None:
    write_evaluation(tmp_path, "eval", np.arange(50) < 20)
    text = Page(source_of(tmp_path)).text
    assert "The policy succeeds on 40% of 50 held-back initial states" in text
    assert "Learning curve" not in text


def test_the_page_is_replaced_whole_and_is_the_same_each_time(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", iterations=2)
    assert source_of(run) == source_of(run)
    assert not list(run.glob("*.partial"))


def test_a_gap_splits_a_line_and_a_lone_point_stays_a_point() -> None:
    x = [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    series = Series(name="kl", x=x, y=[1.0, 2.0, None, 3.0, math.nan, 4.0])
    chart = line_chart(title="t", description="d", series=[series], x_label="x")
    assert chart.count("<polyline") == 1
    assert chart.count("<circle") == 4


def test_zero_on_a_log_axis_sits_on_the_edge_and_keeps_its_value() -> None:
    series = Series(name="error", x=[0.0, 1.0], y=[0.0, 1e-3])
    chart = line_chart(title="t", description="d", series=[series], x_label="iteration", log_y=True)
    assert chart.count("hollow") == 1
    assert "error: 0 at 0 iteration" in chart


@pytest.mark.parametrize("values", [[], [0.0], [5.0, 5.0], [-1.0, 1e9], [1e-9], [None]])
@pytest.mark.parametrize("log_y", [False, True])
def test_any_values_make_a_chart(values: list[float | None], log_y: bool) -> None:
    series = Series(name="s", x=[float(i) for i in range(len(values))], y=values)
    chart = line_chart(title="<t>", description="d & d", series=[series], x_label="x", log_y=log_y)
    Page(chart)
    assert "nan" not in chart


def test_numbers_are_short_and_honest() -> None:
    assert [number(x) for x in (94200, 0.5, -0.25, 2e-5, 999.7, 0, 1_234_567)] == [
        "94.2k",
        "0.5",
        "−0.25",
        "2e−5",
        "1k",
        "0",
        "1.23M",
    ]
    assert [percent(x) for x in (0.41, 0.415, 1.0, -0.031)] == ["41%", "41.5%", "100%", "−3.1%"]


def test_a_mixed_suite_is_shown_task_by_task_with_its_notes(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    for phase, carrots in (("before", 30), ("after", 60)):
        path = run / "evaluations" / f"{phase}.json"
        evaluation = json.loads(path.read_text())
        rate = {"trials": 100, "successes": carrots, "success": carrots / 100, "interval": [0.1, 0.9]}
        evaluation |= {"by_task": {"carrot": rate, "spoon": rate}, "notes": ["stand-in: the <carrot>"]}
        evaluation |= {"metrics": {"gentle": 0.5}, "metrics_by_task": {"carrot": {"gentle": 0.25}, "spoon": {}}}
        write_json(path, evaluation)
    comparison = json.loads((run / "comparison.json").read_text())
    by_task = {"carrot": {"difference": 0.3, "p_value": 2e-5}, "spoon": {"difference": -0.02, "p_value": 0.7}}
    write_json(run / "comparison.json", comparison | {"by_task": by_task})
    text = Page(source_of(run)).text
    assert "Task by task" in text
    assert "30% (10% to 90%), 30/100" in text
    assert "60% (10% to 90%), 60/100" in text
    assert "+30.0" in text
    assert "-2.0" in text
    assert "gentle" in text
    assert "0.250" in text
    assert "stand-in: the <carrot>" in text


def test_a_suite_of_one_task_has_no_such_table(tmp_path: Path) -> None:
    assert "Task by task" not in Page(source_of(make_run(tmp_path / "run"))).text
