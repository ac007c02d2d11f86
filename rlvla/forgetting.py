"""`rlvla forgetting`: what a policy's language model has lost of its answers (UAM, section 3.1)."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlvla.config import ForgettingConfig
from rlvla.policies.backbone import with_head
from rlvla.policies.folder import load_policy
from rlvla.policies.policy import Policy
from rlvla.policies.prompted import PromptedPolicy
from rlvla.run import pick_device, write_json
from rlvla.vision_language import Chat, Reader, answer_log_probs, load_chats, to_device
from rlvla_algos.statistics import mcnemar_exact, paired_difference_interval, wilson_interval


def run(config: ForgettingConfig) -> dict[str, Any]:
    """Ask both policies every question and write ``output``: which were answered right, and Delta.

    Raises:
        ValueError: no questions, or policies that have no language model to ask.
    """
    chats = load_chats(Path(config.questions))
    for number, chat in enumerate(chats, start=1):
        if not chat.choices and not normalized(chat.answer):
            raise ValueError(
                f"{config.questions}: the answer of conversation {number} is {chat.answer!r}, of which nothing is left "
                "to compare without case and punctuation. Give it choices, or leave it out."
            )
    device = pick_device(config.device)
    before, after = (
        ask(_language_policy(Path(folder), device), chats, config.max_new_tokens, device)
        for folder in (config.before, config.after)
    )
    summary = compare(before, after)
    rows = [
        {"question": chat.texts()[:-1], "answer": chat.answer, "before": b, "after": a}
        for chat, b, a in zip(chats, before, after, strict=True)
    ]
    about = {"before": config.before, "after": config.after, "questions": config.questions}
    write_json(Path(config.output), {**about, **summary, "answers": rows})
    return {**summary, "output": config.output}


def compare(before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Scores, and Delta = 1 - S(after) / S(before): 0 where nothing is lost, 1 where all is, below 0 for a gain.

    Delta is null where the score before is 0: there was nothing to lose.
    """
    right_before, right_after = ([bool(answer["right"]) for answer in answers] for answers in (before, after))
    n = len(right_before)
    score_before, score_after = sum(right_before) / n, sum(right_after) / n
    return {
        "num_questions": n,
        "score_before": score_before,
        "score_before_interval": wilson_interval(sum(right_before), n),
        "score_after": score_after,
        "score_after_interval": wilson_interval(sum(right_after), n),
        "forgetting": 1 - score_after / score_before if score_before else None,
        "difference_interval": paired_difference_interval(right_before, right_after),
        "p_value": mcnemar_exact(right_before, right_after),
    }


@torch.no_grad()
def ask(policy: PromptedPolicy, chats: Sequence[Chat], max_new_tokens: int, device: str) -> list[dict[str, Any]]:
    """The answer to each question, and whether it is right.

    With choices the answer is the one whose tokens are the likeliest on average; else it is what greedy decoding says,
    and must equal the reference but for case, spaces and punctuation.
    """
    reader = Reader(policy)
    model = with_head(policy.vlm)
    found = []
    for chat in chats:
        if chat.choices:
            batch = to_device(reader.batch([chat] * len(chat.choices), answers=chat.choices), device)
            log_prob, asked = answer_log_probs(policy.vlm, batch)
            said = chat.choices[int((log_prob.sum(dim=1) / asked.sum(dim=1)).argmax())]
            right = said == chat.answer
        else:
            said = _generate(policy, model, to_device(reader.question(chat), device), max_new_tokens)
            right = normalized(said) == normalized(chat.answer)
        found.append({"said": said, "right": right})
    return found


def normalized(text: str) -> str:
    """Lower case, one space between words, no punctuation at either end of a word."""
    return " ".join(word for raw in text.lower().split() if (word := re.sub(r"^\W+|\W+$", "", raw)))


def _generate(policy: PromptedPolicy, model: Any, batch: dict[str, Tensor], max_new_tokens: int) -> str:
    ids = batch["input_ids"]
    inputs = {name: tensor for name, tensor in batch.items() if name not in ("labels", "position_ids")}
    end = policy.tokenizer.eos_token_id
    made = model.generate(
        **inputs, max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=end, pad_token_id=end, use_cache=True
    )
    text: str = policy.tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
    return text


def _language_policy(folder: Path, device: str) -> PromptedPolicy:
    policy: Policy = load_policy(folder, device)
    if not isinstance(policy, PromptedPolicy):
        raise ValueError(f"{folder} holds a {policy.config.name}, whose backbone answers no questions in words.")
    return policy
