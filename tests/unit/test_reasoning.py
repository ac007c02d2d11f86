"""A reasoning teacher compares whole distributions over the next token, pulls, and asks the same questions again."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tensordict import TensorDict
from torch.distributions import Categorical, kl_divergence

from rlvla import sft
from rlvla.acting import Actor
from rlvla.compose import compose
from rlvla.config import AlgoConfig, ConfigError, LoraConfig, ReasoningTeacherConfig
from rlvla.learner import Learner
from rlvla.policies.backbone import with_head
from rlvla.policies.base import ValueHead, trained_groups
from rlvla.policies.folder import save_policy
from rlvla.policies.groups import require_gradients
from rlvla.policies.lora import add_lora
from rlvla.ranks import ALONE
from rlvla.reasoning import ReasoningTeacher, load_reasoning_teacher
from rlvla.rollout import collect
from rlvla.samplers import FlowSampler
from rlvla.train import add_advantages
from rlvla.vision_language import IGNORED, Reader, answer_logits, load_chats
from rlvla.workers import LocalEnvs
from rlvla_algos.distill import token_kl
from rlvla_algos.flow import flow_sde_schedule
from rlvla_envs.base import FIRST_TRAINING_STATE, SuiteConfig

SUITE = SuiteConfig(name="toy", image_size=32, max_episode_steps=16)
SAMPLER = FlowSampler(flow_sde_schedule(4, 0.5))
WITH_WORDS = ["qwen_vla_toy", "qwen_gr00t_toy", "twinbrain_vla_toy", "uam_toy", "vlm4vla_toy"]


@pytest.fixture
def policy(make_policy: Callable[..., Any]) -> Any:
    return make_policy("qwen_vla_toy", LocalEnvs(SUITE, 1).spec)


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    """Three conversations of two domains, one with an image."""
    Image.fromarray(np.full((20, 40, 3), (255, 0, 0), np.uint8)).save(tmp_path / "red.png")
    image = [{"type": "image", "image": "red.png"}, {"type": "text", "text": "what colour?"}]

    def line(content: Any, answer: str, **more: str) -> str:
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
        return json.dumps({"messages": messages, **more})

    path = tmp_path / "pictures.jsonl"
    path.write_text("\n".join([line(image, "red"), line("sum?", "four", domain="sums"), line("who?", "it is me")]))
    return path


def changed(policy: Any, part: str = "vlm", scale: float = 0.05) -> Any:
    """A copy with other weights in a parameter group."""
    other = copy.deepcopy(policy)
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in other.parameter_groups()[part]:
            parameter += scale * torch.randn_like(parameter)
    return other


def teacher_of(student: Any, folder: Path, questions: Path, **changes: Any) -> ReasoningTeacher:
    algo = AlgoConfig(train_vlm=True)
    require_gradients(student, trained_groups(student, algo.train_vlm, algo.freeze))
    config = ReasoningTeacherConfig(**{"policy": "start", "datasets": (str(questions),), **changes})
    found = load_reasoning_teacher(config, student, folder, "cpu", seed=0)
    assert found is not None
    return found


def divergence(teacher: ReasoningTeacher, student: Any, key: tuple[int, ...] = (0, 0, 0)) -> torch.Tensor:
    return teacher.divergence(lambda batch: answer_logits(student.vlm, batch), ALONE, key)


def test_the_divergence_of_two_coins_is_what_one_works_out_by_hand() -> None:
    # KL((3/4, 1/4) || (1/2, 1/2)) = 3/4 ln 3/2 + 1/4 ln 1/2 = 0.30410 - 0.17329; the other way round 0.14384.
    student, teacher = torch.zeros(1, 2), torch.tensor([[3.0, 1.0]]).log()
    assert token_kl(student, teacher).item() == pytest.approx(0.13081, abs=1e-5)
    assert token_kl(teacher, student).item() == pytest.approx(0.14384, abs=1e-5)


def test_the_loss_is_the_weighted_mean_over_answer_tokens_one_by_one(
    policy: Any, questions: Path, tmp_path: Path
) -> None:
    other = changed(policy)
    save_policy(other, tmp_path / "other")
    weights = {"sums": 3.0, "pictures": 0.5}
    teacher = teacher_of(policy, tmp_path, questions, policy=str(tmp_path / "other"), weights=weights, batch_size=7)
    with torch.no_grad():
        found = divergence(teacher, policy)
    measured = teacher.report(ALONE)
    # An oracle in plain loops: each conversation alone, unpadded, the models' own heads, torch's own divergence.
    rows = np.random.default_rng([0, 9, 0, 0, 0]).integers(3, size=7)
    chats, reader = load_chats(questions), Reader(policy)
    models = [with_head(one.vlm) for one in (other, policy)]
    kls: dict[str, list[float]] = {"sums": [], "pictures": []}
    for row in rows:
        batch = reader.batch([chats[row]])
        labels = batch.pop("labels")[0]
        with torch.no_grad():
            logits = [model(**batch).logits[0] for model in models]
        for place, wanted in enumerate(labels.tolist()):
            if wanted != IGNORED:
                pair = [Categorical(logits=of_model[place - 1]) for of_model in logits]
                kls[chats[row].domain].append(float(kl_divergence(pair[0], pair[1])))
    weighted = sum(weights[name] * sum(values) for name, values in kls.items())
    assert min(len(values) for values in kls.values()) > 0
    assert found.item() == pytest.approx(weighted / sum(map(len, kls.values())), rel=1e-4)
    assert measured["loss/reasoning"] == pytest.approx(found.item(), rel=1e-5)
    total = sum(weights[name] * len(values) for name, values in kls.items())
    assert measured["ppo/reasoning_kl"] == pytest.approx(weighted / total, rel=1e-4)
    for name, values in kls.items():
        assert measured[f"ppo/reasoning_kl/{name}"] == pytest.approx(np.mean(values), rel=1e-4)


@pytest.mark.parametrize("name", WITH_WORDS)
def test_a_policy_of_any_kind_with_words_is_its_own_teacher_without_a_pull(
    make_policy: Callable[..., Any], name: str, questions: Path, tmp_path: Path
) -> None:
    student = make_policy(name, LocalEnvs(SUITE, 1).spec)
    save_policy(student, tmp_path / "start")
    teacher = teacher_of(student, tmp_path / "start", questions)
    assert abs(float(divergence(teacher, student).detach())) < 1e-6
    assert float(divergence(teacher, changed(student)).detach()) > 1e-4


def test_a_teacher_that_the_run_starts_from_takes_no_memory_beside_adapters(
    policy: Any, questions: Path, tmp_path: Path
) -> None:
    save_policy(policy, tmp_path / "start")
    own = {p.data_ptr() for p in policy.vlm.parameters()}
    add_lora(policy, LoraConfig(rank=2), ("vlm",))
    teacher = teacher_of(policy, tmp_path / "start", questions)
    assert {p.data_ptr() for p in teacher.vlm.parameters()} == own
    assert not any(p.requires_grad for p in teacher.vlm.parameters())


def test_which_questions_are_asked_depends_on_the_key_alone(policy: Any, questions: Path, tmp_path: Path) -> None:
    save_policy(changed(policy), tmp_path / "other")
    one, again = (teacher_of(policy, tmp_path, questions, policy=str(tmp_path / "other"), batch_size=2) for _ in "12")
    with torch.no_grad():
        for epoch in range(3):
            divergence(one, policy, (0, epoch, 0))
        late = divergence(one, policy, (1, 0, 3))
        assert torch.equal(divergence(again, policy, (1, 0, 3)), late)
        assert len({float(divergence(one, policy, (1, 0, number))) for number in range(6)}) > 1


def test_domains_of_weight_0_are_not_asked_about_and_unknown_ones_are_refused(
    policy: Any, questions: Path, tmp_path: Path
) -> None:
    save_policy(policy, tmp_path / "start")
    teacher = teacher_of(policy, tmp_path / "start", questions, weights={"pictures": 0.0})
    assert [chat.answer for chat in teacher._chats] == ["four"]
    with pytest.raises(ConfigError, match=r"weights has tables; the domains of its datasets are pictures, sums\."):
        teacher_of(policy, tmp_path / "start", questions, weights={"tables": 1.0})
    with pytest.raises(ConfigError, match="weights are 0 for every domain"):
        teacher_of(policy, tmp_path / "start", questions, weights={"pictures": 0.0, "sums": 0.0})


def rollout_of(policy: Any, algo: AlgoConfig) -> TensorDict:
    rollout = collect(
        Actor(policy, block=4, device="cpu"),
        ValueHead(policy.value_size),
        LocalEnvs(SUITE, 4),
        [FIRST_TRAINING_STATE + i for i in range(6)],
        sampler=SAMPLER,
        key=(0, 0),
        store_context=False,
    )
    rollout["version"] = torch.zeros(rollout.batch_size, dtype=torch.int64)
    add_advantages(rollout, algo)
    return rollout


def update(student: Any, folder: Path | None, questions: Path, **changes: Any) -> tuple[dict[str, float], Learner]:
    """One update of a copy of the student; its teacher is the policy in ``folder``."""
    student = copy.deepcopy(student)
    torch.manual_seed(0)
    reasoning = ReasoningTeacherConfig()
    if folder is not None:
        reasoning = ReasoningTeacherConfig(policy=str(folder), datasets=(str(questions),), **changes)
    algo = AlgoConfig(
        critic_only_iterations=0,
        min_successes=0,
        kl_stop_factor=1e6,
        epochs=6,
        minibatch_size=8,
        train_vlm=True,
        vlm_lr=1e-3,
        reasoning_teacher=reasoning,
    )
    require_gradients(student, trained_groups(student, True))
    teacher = load_reasoning_teacher(reasoning, student, Path(), "cpu", seed=0)
    head = ValueHead(student.value_size)
    learner = Learner(student, head, algo, SAMPLER, seed=0, total_iterations=1, reasoning=teacher)
    return learner.update(rollout_of(student, algo), 0, consume=True), learner


def test_a_teacher_pulls_answers_towards_its_own(policy: Any, questions: Path, tmp_path: Path) -> None:
    other = changed(policy)
    save_policy(other, tmp_path / "other")

    def left(learner: Learner) -> float:
        with torch.no_grad():
            fresh = teacher_of(policy, tmp_path, questions, policy=str(tmp_path / "other"), batch_size=12)
            return float(divergence(fresh, learner.policy))

    row, pulled = update(policy, tmp_path / "other", questions, coef=10.0)
    assert row["ppo/reasoning_coef"] == 10.0
    assert row["loss/reasoning"] > 0
    ignoring, alone = update(policy, None, questions)
    assert left(pulled) < 0.7 * left(alone)
    assert not [key for key in ignoring if "reasoning" in key]


def test_the_coefficient_is_steered_and_goes_on_where_it_was(policy: Any, questions: Path, tmp_path: Path) -> None:
    save_policy(changed(policy), tmp_path / "other")
    row, learner = update(policy, tmp_path / "other", questions, coef=0.2, target_kl=1e-6)
    assert row["ppo/reasoning_coef"] == 0.2
    state = learner.state_dict()
    assert state["reasoning_coef"] == pytest.approx(0.3)
    assert learner.reasoning is not None
    learner.reasoning.coef = 7.0
    learner.load_state_dict(state)
    assert learner.reasoning.coef == state["reasoning_coef"]


def test_a_teacher_that_nothing_can_be_learnt_from_is_refused(
    make_policy: Callable[..., Any], policy: Any, questions: Path, tmp_path: Path
) -> None:
    config = ReasoningTeacherConfig(policy="start", datasets=(str(questions),))
    save_policy(policy, tmp_path / "start")
    adapted = copy.deepcopy(policy)
    add_lora(adapted, LoraConfig(rank=2), ("expert",))
    require_gradients(adapted, ("expert",))
    with pytest.raises(ConfigError, match="no parameter of the policy's language model is trained"):
        load_reasoning_teacher(config, adapted, tmp_path / "start", "cpu", seed=0)
    wordless = make_policy("pi0_toy", policy.env_spec)
    with pytest.raises(ConfigError, match="language model with its own words; pi0 is none"):
        load_reasoning_teacher(config, wordless, tmp_path / "start", "cpu", seed=0)
    save_policy(make_policy("qwen_vla_toy", policy.env_spec, "policy.vlm.vocab_size=600"), tmp_path / "words")
    with pytest.raises(ConfigError, match="it has 600 tokens, the policy 512"):
        teacher_of(policy, tmp_path / "words", questions)


def test_in_sft_the_teachers_distributions_can_replace_the_answers(
    policy: Any, questions: Path, tmp_path: Path
) -> None:
    save_policy(policy, tmp_path / "start")
    save_policy(changed(policy), tmp_path / "other")
    require_gradients(policy, ["expert", "vlm"])

    def asked(teacher: str, weight: float) -> tuple[float, dict[str, float]]:
        own = [f"dataset={questions}", f"weight={weight}", f"teacher={teacher}", "teacher_coef=3"]
        words = ["dataset=none", f"start={tmp_path / 'start'}", *(f"vision_language.{word}" for word in own)]
        loss, measured = sft.Questions(policy, compose("sft", words), "cpu").loss(0)
        return float(loss.detach()), measured

    assert asked("start", 0)[0] == pytest.approx(0, abs=1e-5)
    loss, measured = asked(str(tmp_path / "other"), 0.5)
    assert measured["loss/reasoning"] > 1e-3
    assert loss == pytest.approx(0.5 * measured["loss/vision_language"] + 3 * measured["loss/reasoning"], rel=1e-5)
    for words, said in (
        (["vision_language.teacher=start", f"vision_language.dataset={questions}"], "a policy folder without start="),
        (["vision_language.teacher=elsewhere"], "null without vision_language.dataset"),
    ):
        with pytest.raises(ConfigError, match=f"vision_language.teacher is .*{said}"):
            compose("sft", ["dataset=none", *words])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["policy=start"], "datasets is .*; it must be one file or more"),
        (["policy=start", "datasets=[q.jsonl]"], "null with algo.train_vlm=false"),
        (["datasets=[q.jsonl]"], "datasets is .*; it must be left out without"),
        (["policy=start", "datasets=[q.jsonl]", "coef=0"], "coef is 0"),
        (["policy=start", "datasets=[q.jsonl]", "weights.sums=-1"], "weights.sums is -1"),
    ],
)
def test_a_teacher_that_means_nothing_is_refused_before_anything_is_read(words: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=f"algo.reasoning_teacher.*{said}"):
        compose("train", ["policy=PATH", *(f"algo.reasoning_teacher.{word}" for word in words)])
