"""Questions about images in chat format: next-token loss on the answers, and what a backbone answers.

One JSON object a line, as Qwen's and other trainers read them:

    {"messages": [{"role": "user", "content": [{"type": "image", "image": "photo.png"},
                                               {"type": "text", "text": "What is red?"}]},
                  {"role": "assistant", "content": "the cube"}],
     "choices": ["the cube", "the plate"], "domain": "tabletop"}

Image paths are relative to the file. ``choices`` is optional and only read where answers are scored; ``domain`` is what
a reasoning teacher's weights name it by, the name of its file where there is none.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from rlvla.policies.processor import patchify
from rlvla.policies.prompted import IMAGE, PromptedPolicy

IGNORED = -100
MAX_SIDE = 512
"""Pixels: larger images are scaled down to it."""


@dataclass(frozen=True)
class Chat:
    """One conversation that ends with an answer."""

    messages: tuple[Mapping[str, Any], ...]
    images: tuple[Path, ...]
    choices: tuple[str, ...] = ()
    domain: str = ""

    @property
    def answer(self) -> str:
        return _text(self.messages[-1])

    def texts(self) -> list[str]:
        return [_text(message) for message in self.messages]


def load_chats(path: Path) -> list[Chat]:
    """Read and check a file of conversations.

    Raises:
        ValueError: no such file, a line that is not as above, or an image that is not there; the message has the line.
    """
    if not path.is_file():
        raise ValueError(f"there is no file {path}. It must hold one JSON object a line, each with messages.")
    chats = []
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8 ({error}). Save it as that, one JSON object a line.") from error
    # Not splitlines(): JSON may hold a line separator of Unicode inside a string.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            chats.append(_chat(json.loads(line), path))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path}, line {number}: {type(error).__name__}: {error}. A line is an object with messages, a list of "
                '{"role": "user" or "assistant", "content": text or a list of texts and images}, that ends with the '
                "assistant's answer."
            ) from error
    if not chats:
        raise ValueError(f"{path} holds no conversation.")
    return chats


def _chat(data: Any, path: Path) -> Chat:
    messages = tuple(data["messages"])
    images = []
    for message in messages:
        if message["role"] not in ("system", "user", "assistant"):
            raise ValueError(f"the role {message['role']!r} is none of system, user, assistant")
        for part in _parts(message):
            if part["type"] == "image":
                if message["role"] != "user":
                    raise ValueError(f"an image stands in a turn of {message['role']}; only the user shows images")
                images.append(path.parent / part["image"])
                _check_image(images[-1])
            elif part["type"] != "text":
                raise ValueError(f"content of type {part['type']!r} is neither text nor image")
            elif IMAGE in part["text"]:
                raise ValueError(f"a text contains {IMAGE}, which stands for an image")
    if not messages or messages[-1]["role"] != "assistant" or not _text(messages[-1]).strip():
        raise ValueError("the last message must be the assistant's answer")
    if all(message["role"] != "user" for message in messages):
        raise ValueError("no message is the user's; a question must come before the answer")
    choices = tuple(str(choice) for choice in data.get("choices", ()))
    if choices and _text(messages[-1]) not in choices:
        raise ValueError(f"the answer {_text(messages[-1])!r} is none of the choices {list(choices)}")
    if choices and (len(choices) < 2 or len(set(choices)) < len(choices)):
        raise ValueError(f"the choices are {list(choices)}; they must be at least two, and differ")
    return Chat(messages, tuple(images), choices, str(data.get("domain", path.stem)))


def _check_image(path: Path) -> None:
    from PIL import Image

    if not path.is_file():
        raise ValueError(f"the image {path} is not there")
    try:
        with Image.open(path) as opened:
            opened.verify()
    except Exception as error:  # each decoder has its own
        raise ValueError(f"the image {path} cannot be read ({type(error).__name__})") from error


def _parts(message: Mapping[str, Any]) -> Sequence[Mapping[str, str]]:
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _text(message: Mapping[str, Any]) -> str:
    return "".join(part["text"] for part in _parts(message) if part["type"] == "text")


def require_tied_head(policy: PromptedPolicy) -> None:
    """Refuse a backbone whose words would be read with the wrong output layer.

    Raises:
        ValueError: it was imported with a head that is not its embedding; a policy has no place for one.
    """
    heads = [key for key in (policy.origin.kept if policy.origin else ()) if key.endswith("lm_head.weight")]
    if heads:
        raise ValueError(
            f"the language model was imported with an output layer of its own ({heads[0]}), which a policy does not "
            "have: acting needs none, and the embedding in its place would say other words. Questions are supported "
            "for sizes whose layers are tied, such as Qwen3-VL-4B and Qwen3.5-4B."
        )


class Reader:
    """Conversations as the tensors of a policy's backbone."""

    def __init__(self, policy: PromptedPolicy) -> None:
        self.policy, self.tokenizer, self.vlm = policy, policy.tokenizer, policy.vlm
        require_tied_head(policy)
        self._unit = 2 * policy.config.vlm.patch_size

    def batch(self, chats: Sequence[Chat], *, answers: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Right-padded inputs of the model, and ``labels`` [B S] that are `IGNORED` where nothing is to be answered.

        Args:
            answers: other last messages than the conversations' own.
        """
        rows = [self._row(chat, None if answers is None else answers[i]) for i, chat in enumerate(chats)]
        return self._stack(rows)

    def question(self, chat: Chat) -> dict[str, Tensor]:
        """One conversation up to where its last answer begins."""
        pieces = self._segments(chat.messages)[:-1]
        return self._stack([self._encode(pieces, chat.images)])

    def _row(self, chat: Chat, answer: str | None) -> tuple[Tensor, Tensor, list[Tensor]]:
        messages = list(chat.messages)
        if answer is not None:
            messages[-1] = {"role": "assistant", "content": answer}
        return self._encode(self._segments(messages), chat.images)

    def _segments(self, messages: Sequence[Mapping[str, Any]]) -> list[tuple[str, bool]]:
        """The chat text in pieces, each with whether it is an answer. Tokenised one by one, so that a question has the
        same tokens while it is learnt from and while it is asked."""
        pieces: list[tuple[str, bool]] = []
        done = ""
        chat = [{"role": m["role"], "content": [dict(part) for part in _parts(m)]} for m in messages]
        for count, message in enumerate(chat):
            if message["role"] != "assistant":
                continue
            before = self._render(chat[:count], add_generation_prompt=True)
            after = self._render(chat[: count + 1])
            if not (before.startswith(done) and after.startswith(before)):
                raise ValueError(
                    f"with answer {len(pieces) // 2 + 1} the tokenizer's chat template writes what is before it "
                    "otherwise than without. Give every question as a conversation of its own: one user turn and the "
                    "answer."
                )
            pieces += [(before[len(done) :], False), (after[len(before) :], True)]
            done = after
        return pieces

    def _render(self, chat: Sequence[Mapping[str, Any]], **how: Any) -> str:
        # Without thoughts: templates that know them would have the model think first, past any limit of tokens.
        text: str = self.tokenizer.apply_chat_template(chat, tokenize=False, enable_thinking=False, **how)
        return text

    def _encode(self, pieces: Sequence[tuple[str, bool]], paths: Sequence[Path]) -> tuple[Tensor, Tensor, list[Tensor]]:
        images = [self._read(path) for path in paths]
        waiting = iter(images)
        ids: list[int] = []
        labels: list[int] = []
        for text, is_answer in pieces:
            first, *others = text.split(IMAGE)
            for part in others:
                image = next(waiting)
                first += IMAGE * ((image.shape[0] // self._unit) * (image.shape[1] // self._unit)) + part
            tokens = self.tokenizer(first, add_special_tokens=False)["input_ids"]
            ids += tokens
            labels += tokens if is_answer else [IGNORED] * len(tokens)
        return torch.tensor(ids), torch.tensor(labels), images

    def _read(self, path: Path) -> Tensor:
        """[h w 3], scaled to whole merged patches."""
        from PIL import Image

        with Image.open(path) as opened:
            try:
                image = opened.convert("RGB")
            except OSError as error:
                raise ValueError(f"the image {path} is damaged: {error}. Copy it again.") from error
            scale = min(1.0, MAX_SIDE / max(image.size))
            width, height = (max(1, round(side * scale / self._unit)) * self._unit for side in image.size)
            return torch.from_numpy(np.asarray(image.resize((width, height), Image.Resampling.BICUBIC)).copy())

    def _stack(self, rows: Sequence[tuple[Tensor, Tensor, list[Tensor]]]) -> dict[str, Tensor]:
        length = max(len(ids) for ids, _, _ in rows)
        ids = torch.full((len(rows), length), self.tokenizer.pad_token_id)
        labels = torch.full((len(rows), length), IGNORED)
        mask = torch.zeros((len(rows), length), dtype=torch.long)
        for row, (own, wanted, _) in enumerate(rows):
            ids[row, : len(own)], labels[row, : len(own)], mask[row, : len(own)] = own, wanted, 1
        # Not by id alone: the padding must not look like an image, whatever the tokenizer pads with.
        image = ((ids == self.vlm.config.image_token_id) & mask.bool()).long()
        images = [image for _, _, of_row in rows for image in of_row]
        patch = self.policy.config.vlm.patch_size
        grid = torch.tensor([[1, i.shape[0] // patch, i.shape[1] // patch] for i in images]) if images else None
        positions, _ = self.vlm.get_rope_index(ids, mm_token_type_ids=image, image_grid_thw=grid, attention_mask=mask)
        batch = {
            "input_ids": ids,
            "attention_mask": mask,
            "mm_token_type_ids": image,
            "position_ids": positions,
            "labels": labels,
        }
        if grid is not None:
            batch["pixel_values"] = torch.cat([patchify(i[None], patch, 2, 2) for i in images]).to(self.vlm.dtype)
            batch["image_grid_thw"] = grid
        return batch


def answer_places(batch: Mapping[str, Tensor]) -> Bool[Tensor, "B S1"]:
    """Where the next token is one of an answer."""
    return batch["labels"][:, 1:] != IGNORED


def answer_logits(vlm: Any, batch: Mapping[str, Tensor]) -> Float[Tensor, "N V"]:
    """What is said of the next token at each of the N `answer_places`.

    The output layer is the embedding: the sizes whose layers are not tied keep theirs in ``lm_head``, which a policy
    does not have.
    """
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    hidden = vlm(**inputs, use_cache=False).last_hidden_state[:, :-1]
    # Of the answers' tokens alone: a vocabulary of 248,320 for every token of an image would be gigabytes.
    return F.linear(hidden[answer_places(batch)], vlm.get_input_embeddings().weight).float()


def answer_log_probs(vlm: Any, batch: Mapping[str, Tensor]) -> tuple[Float[Tensor, "B S1"], Bool[Tensor, "B S1"]]:
    """Log-probability of each token of the answers, 0 elsewhere, and where they are."""
    wanted, asked = batch["labels"][:, 1:], answer_places(batch)
    logits = answer_logits(vlm, batch)
    found = logits.new_zeros(wanted.shape)
    chosen = logits.log_softmax(dim=-1).gather(-1, wanted[asked][:, None])[:, 0]
    return found.masked_scatter(asked, chosen), asked


def answer_loss(logits: Float[Tensor, "N V"], batch: Mapping[str, Tensor]) -> Float[Tensor, ""]:
    """Mean negative log-likelihood of the answers' tokens (Qwen-VLA, equation 3).

    Args:
        logits: by `answer_logits`.
    """
    return F.cross_entropy(logits, batch["labels"][:, 1:][answer_places(batch)])


def next_token_loss(vlm: Any, batch: Mapping[str, Tensor]) -> Float[Tensor, ""]:
    """`answer_loss` of a backbone."""
    return answer_loss(answer_logits(vlm, batch), batch)


def to_device(batch: Mapping[str, Tensor], device: str) -> dict[str, Tensor]:
    return {name: tensor.to(device) for name, tensor in batch.items()}
