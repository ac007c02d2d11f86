"""The vision-language model under a policy that may stand on Qwen3-VL or on Qwen3.5: sizes, and prompts in its chat."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from enum import Enum
from typing import Any

from rlvla.policies.backbone import LINEAR_ATTENTION_SIZES, VLMConfig, qwen3_vl_config, vlm_config
from rlvla_envs.base import EnvSpec

PLACEHOLDERS = ("{instruction}", "{robot_type}")


class Family(Enum):
    """Which classes of transformers."""

    qwen3_vl = "qwen3_vl"
    qwen3_5 = "qwen3_5"


QWEN3_5_ONLY = (*LINEAR_ATTENTION_SIZES, "partial_rotary_factor")


@dataclass(kw_only=True)
class BrainConfig(VLMConfig):
    """Sizes of a Qwen3-VL or Qwen3.5 model, in the names of its own configuration. Those of gated linear attention and
    partial rotation are Qwen3.5's alone."""

    family: Family = Family.qwen3_vl
    """qwen3_vl has softmax attention in every layer, qwen3_5 in every n-th."""
    head_dim: int = 32
    deepstack_visual_indexes: tuple[int, ...] = ()
    """Vision layers whose features are added behind the first text layers as well; of Qwen3-VL alone."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.deepstack_visual_indexes = tuple(self.deepstack_visual_indexes)
        if self.family is Family.qwen3_vl:
            defaults = {f.name: f.default for f in fields(self)}
            for name in QWEN3_5_ONLY:
                if getattr(self, name) != defaults[name]:
                    raise ValueError(
                        f"policy.vlm.{name} is {getattr(self, name)}; Qwen3-VL has no such size. "
                        "Leave it out, or set policy.vlm.family=qwen3_5."
                    )
        elif self.deepstack_visual_indexes:
            raise ValueError(
                f"policy.vlm.deepstack_visual_indexes is {list(self.deepstack_visual_indexes)}; Qwen3.5 has none of "
                "these. Leave it out, or set policy.vlm.family=qwen3_vl."
            )
        rotated = self.head_dim * (self.partial_rotary_factor if self.family is Family.qwen3_5 else 1)
        self.check_rotation(rotated)
        deep = self.deepstack_visual_indexes
        if len(deep) > self.num_hidden_layers or not all(0 <= i < self.vision_depth for i in deep):
            raise ValueError(
                f"policy.vlm.deepstack_visual_indexes is {list(deep)}; it must be at most num_hidden_layers "
                f"({self.num_hidden_layers}) numbers below vision_depth ({self.vision_depth})."
            )


def build_brain(config: BrainConfig, ids: dict[str, int]) -> Any:
    """The base model, without a language-model head; each call has a configuration object of its own."""
    from transformers import Qwen3_5Model, Qwen3VLModel

    if config.family is Family.qwen3_5:
        return Qwen3_5Model(vlm_config(config, ids))
    return Qwen3VLModel(qwen3_vl_config(config, ids, config.deepstack_visual_indexes))


@dataclass(kw_only=True)
class PromptConfig:
    """What a brain is told. {instruction} and {robot_type} are filled in; the images come first in the user's turn."""

    system: str = ""
    """System turn; empty has none."""
    user: str = "{instruction}"
    """User turn, behind the images."""

    def __post_init__(self) -> None:
        if "{instruction}" not in self.user:
            raise ValueError(f"a policy's user prompt is {self.user!r}; it must contain {{instruction}}.")
        for text in (self.system, self.user):
            rest = text
            for known in PLACEHOLDERS:
                rest = rest.replace(known, "")
            if "{" in rest or "}" in rest:
                raise ValueError(f"a policy's prompt is {text!r}; it can have {' and '.join(PLACEHOLDERS)} only.")

    def fill(self, spec: EnvSpec, instruction: str) -> tuple[str, str]:
        """The system's and the user's words.

        Examples:
            >>> from rlvla_envs.base import EnvSpec
            >>> spec = EnvSpec(
            ...     suite="s",
            ...     task="t",
            ...     robot="WidowX",
            ...     action=(),
            ...     cameras=(),
            ...     control_hz=5.0,
            ...     chunk_size=4,
            ...     max_episode_steps=60,
            ...     num_evaluation_states=24,
            ... )
            >>> PromptConfig(user="{robot_type}: {instruction}").fill(spec, "lift {it}")
            ('', 'WidowX: lift {it}')
        """
        # The instruction last: it may hold braces of its own.
        system, user = (
            text.replace("{robot_type}", spec.robot).replace("{instruction}", instruction)
            for text in (self.system, self.user)
        )
        return system, user

    def chat(self, spec: EnvSpec, instruction: str) -> list[dict[str, Any]]:
        """The turns that a chat template takes, with one image for each camera."""
        system, user = self.fill(spec, instruction)
        content: list[dict[str, str]] = [{"type": "image"} for _ in spec.cameras]
        content.append({"type": "text", "text": user})
        first: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
        return [*first, {"role": "user", "content": content}]

    def without_images(self, spec: EnvSpec, instruction: str) -> str:
        """The whole chat as text, to train a small tokenizer on."""
        system, user = self.fill(spec, instruction)
        before = f"<|im_start|>system\n{system}<|im_end|>\n" if system else ""
        return f"{before}<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n"


def chat_texts(prompts: Sequence[PromptConfig], spec: EnvSpec, instructions: Sequence[str]) -> list[str]:
    """Every prompt with every instruction, to train a small tokenizer on."""
    return [prompt.without_images(spec, text) for text in instructions for prompt in prompts]
