"""Questions about images: what is learnt from them, what is answered, and what is lost."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from rlvla import forgetting
from rlvla.config import ForgettingConfig
from rlvla.forgetting import ask, compare, normalized
from rlvla.policies.backbone import with_head
from rlvla.policies.policy import Policy
from rlvla.vision_language import IGNORED, Chat, Reader, answer_log_probs, load_chats, next_token_loss
from rlvla_envs.base import EnvSpec, SuiteConfig
from rlvla_envs.suites import make_env


@pytest.fixture(scope="module")
def spec() -> EnvSpec:
    return make_env(SuiteConfig(name="toy", image_size=32), 1).spec


@pytest.fixture
def policy(make_policy: Callable[..., Policy], spec: EnvSpec) -> Any:
    return make_policy("qwen_vla_toy", spec)


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """A file of lines, beside one red image of 40 x 20 pixels."""
    Image.fromarray(np.full((20, 40, 3), (255, 0, 0), np.uint8)).save(tmp_path / "red.png")

    def make(*lines: Any) -> Path:
        path = tmp_path / "chats.jsonl"
        path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
        return path

    return make


def chat(question: str, answer: str, *, image: str | None = None, **more: Any) -> dict[str, Any]:
    content: list[dict[str, str]] = [{"type": "image", "image": image}] if image else []
    content.append({"type": "text", "text": question})
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}], **more}


def test_only_the_answers_are_learnt_and_each_of_their_tokens(policy: Any, write: Callable[..., Path]) -> None:
    two_turns = chat("colour?", "red", image="red.png")["messages"] + chat("sure?", "yes")["messages"]
    (loaded,) = load_chats(write({"messages": two_turns}))
    batch = Reader(policy).batch([loaded])
    learnt = [int(i) for i in batch["labels"][0] if i != IGNORED]
    assert policy.tokenizer.decode(learnt) == "red<|im_end|>\nyes<|im_end|>\n"
    whole = policy.tokenizer.decode(batch["input_ids"][0])
    assert whole.startswith("<|im_start|>user\n<|vision_start|><|image_pad|>")
    # 40 x 20 pixels are 2.5 x 1.25 merged patches of 16: rounded to 2 x 1.
    assert int(batch["mm_token_type_ids"].sum()) == 2
    assert batch["image_grid_thw"].tolist() == [[1, 2, 4]]


THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{% for part in m.content %}{{ part.text }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "<think>\n{% if enable_thinking is false %}{{ '\n' }}</think>\n\n{% endif %}{% endif %}"
)
"""As Qwen's models that think have it: thoughts before the last answer alone, and by default begun for the model."""


def test_a_model_that_thinks_is_asked_without_thoughts(policy: Any, write: Callable[..., Path]) -> None:
    policy.tokenizer = copy.deepcopy(policy.tokenizer)
    policy.tokenizer.chat_template = THINKING
    (one,) = load_chats(write(chat("what?", "red")))
    reader = Reader(policy)
    asked = policy.tokenizer.decode(reader.question(one)["input_ids"][0])
    assert asked.endswith("assistant\n<think>\n\n</think>\n\n")
    batch = reader.batch([one])
    assert policy.tokenizer.decode([i for i in batch["labels"][0] if i != IGNORED]) == "red<|im_end|>\n"


def test_a_chat_template_that_rewrites_earlier_turns_is_refused(policy: Any, write: Callable[..., Path]) -> None:
    policy.tokenizer = copy.deepcopy(policy.tokenizer)
    policy.tokenizer.chat_template = THINKING
    (two,) = load_chats(write({"messages": chat("what?", "red")["messages"] + chat("sure?", "yes")["messages"]}))
    with pytest.raises(ValueError, match="with answer 2 the tokenizer's chat template .* a conversation of its own"):
        Reader(policy).batch([two])


def test_the_loss_is_the_mean_log_likelihood_of_the_answers_tokens_one_by_one(
    policy: Any, write: Callable[..., Path]
) -> None:
    chats = load_chats(write(chat("what?", "a red wall", image="red.png"), chat("and now, tell me more?", "no")))
    reader = Reader(policy)
    # An oracle in plain loops: each row alone, unpadded, the model's own head.
    model, total, count = with_head(policy.vlm), 0.0, 0
    with torch.no_grad():
        for one in chats:
            batch = reader.batch([one])
            labels = batch.pop("labels")[0]
            logits = model(**batch).logits[0]
            for place, wanted in enumerate(labels.tolist()):
                if wanted != IGNORED:
                    total -= float(torch.log_softmax(logits[place - 1], dim=-1)[wanted])
                    count += 1
        loss = next_token_loss(policy.vlm, reader.batch(chats))
    assert loss.item() == pytest.approx(total / count, rel=1e-4)


def test_the_image_is_seen(policy: Any, write: Callable[..., Path], tmp_path: Path) -> None:
    (one,) = load_chats(write(chat("what?", "red", image="red.png")))
    with torch.no_grad():
        before = next_token_loss(policy.vlm, Reader(policy).batch([one]))
        Image.fromarray(np.zeros((20, 40, 3), np.uint8)).save(tmp_path / "red.png")
        after = next_token_loss(policy.vlm, Reader(policy).batch([one]))
    assert abs(float(before - after)) > 1e-5


def test_what_was_learnt_is_answered_in_free_words_and_by_choice(policy: Any, write: Callable[..., Path]) -> None:
    chats = load_chats(
        write(chat("what is it?", "Red.", image="red.png"), chat("yes or no?", "no", choices=["yes", "no"]))
    )
    reader = Reader(policy)
    optimizer = torch.optim.Adam(policy.vlm.parameters(), lr=3e-3)
    wrong = ask(policy, chats, 8, "cpu")
    for _ in range(60):
        loss = next_token_loss(policy.vlm, reader.batch(chats))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    found = ask(policy, chats, 8, "cpu")
    assert [answer["right"] for answer in found] == [True, True]
    assert found[0]["said"].strip() == "Red."
    assert not wrong[0]["right"]


def test_a_choice_is_the_likeliest_per_token_and_not_the_shortest(policy: Any, write: Callable[..., Path]) -> None:
    (one,) = load_chats(write(chat("which?", "a", choices=["a", "a long and winding answer"])))
    batch = Reader(policy).batch([one] * 2, answers=one.choices)
    with torch.no_grad():
        log_prob, asked = answer_log_probs(policy.vlm, batch)
    means = (log_prob.sum(dim=1) / asked.sum(dim=1)).tolist()
    (found,) = ask(policy, [one], 4, "cpu")
    assert found["said"] == one.choices[int(np.argmax(means))]


def test_delta_by_hand() -> None:
    # 4 of 5 before, 2 of 5 after: Delta = 1 - 0.4 / 0.8 = 0.5; two lost, none gained: p = 2 / 2^2.
    before = [{"right": right} for right in (True, True, True, True, False)]
    after = [{"right": right} for right in (True, True, False, False, False)]
    found = compare(before, after)
    assert found["forgetting"] == pytest.approx(0.5)
    assert found["p_value"] == pytest.approx(0.5)
    assert compare(before, before)["forgetting"] == 0
    assert compare(after, before)["forgetting"] == pytest.approx(-1.0)
    assert compare([{"right": False}], [{"right": True}])["forgetting"] is None


def test_answers_are_compared_without_case_spaces_and_punctuation() -> None:
    assert normalized("  The  Red cube. ") == normalized("the red cube")
    assert normalized("cube-2") != normalized("cube 2")


RED, YES = {"type": "image", "image": "red.png"}, {"type": "text", "text": "yes"}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{not json", "line 2: JSONDecodeError"),
        ({"text": "hello"}, "line 2: KeyError: 'messages'"),
        ({"messages": [{"role": "user", "content": "hello"}]}, "must be the assistant's answer"),
        ({"messages": [{"role": "robot", "content": "hello"}]}, "the role 'robot'"),
        (chat("what?", "red", image="blue.png"), r"the image .*blue.png is not there"),
        (chat("what?", "red", choices=["blue"]), "'red' is none of the choices"),
        (chat("<|image_pad|>?", "red"), "stands for an image"),
        (chat("what?", " "), "must be the assistant's answer"),
        ({"messages": [{"role": "assistant", "content": "red"}]}, "line 2: .*no message is the user's"),
        (
            {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": [RED, YES]}]},
            "line 2: .*an image stands in a turn of assistant",
        ),
        (chat("what?", "red", choices=["red"]), "line 2: .*at least two, and differ"),
        (chat("what?", "red", choices=["red", "red", "blue"]), "line 2: .*at least two, and differ"),
        (chat("what?", "red", image="chats.jsonl"), "line 2: .*chats.jsonl cannot be read"),
    ],
)
def test_a_line_that_is_no_conversation_is_named(write: Callable[..., Path], line: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        load_chats(write(chat("fine?", "yes"), line))


def test_no_file_and_an_empty_file_are_refused(tmp_path: Path, write: Callable[..., Path]) -> None:
    with pytest.raises(ValueError, match="there is no file"):
        load_chats(tmp_path / "nowhere.jsonl")
    with pytest.raises(ValueError, match="holds no conversation"):
        load_chats(write(""))


def test_a_file_in_another_encoding_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "latin.jsonl"
    path.write_bytes(json.dumps(chat("?", "Gr\u00f6\u00dfe"), ensure_ascii=False).encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.jsonl is no text in UTF-8"):
        load_chats(path)


def test_a_line_separator_inside_a_string_is_no_new_line(write: Callable[..., Path]) -> None:
    line = json.dumps(chat("a\u2028b", "yes"), ensure_ascii=False)
    assert load_chats(write(line))[0].texts() == ["a\u2028b", "yes"]


def test_an_answer_of_punctuation_alone_measures_nothing(tmp_path: Path, write: Callable[..., Path]) -> None:
    path = write(chat("fine?", "yes"), chat("what?", "..."))
    config = ForgettingConfig(before="x", after="x", questions=str(path), output=str(tmp_path / "out.json"))
    with pytest.raises(ValueError, match=r"the answer of conversation 2 is '\.\.\.'"):
        forgetting.run(config)


def test_rows_of_different_length_do_not_see_each_other(policy: Any, write: Callable[..., Path]) -> None:
    chats: list[Chat] = load_chats(write(chat("a", "b"), chat("what a long question this is", "b", image="red.png")))
    reader = Reader(policy)
    with torch.no_grad():
        together, _ = answer_log_probs(policy.vlm, reader.batch(chats))
        alone = [answer_log_probs(policy.vlm, reader.batch([one]))[0] for one in chats]
    torch.testing.assert_close(together.sum(dim=1), torch.cat([one.sum(dim=1) for one in alone]), atol=1e-4, rtol=1e-4)
