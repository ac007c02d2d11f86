"""pi0 and pi0.5: PaliGemma and an action expert that reads its keys and values (openpi, LeRobot).

pi0 gives the state to the expert as a token, and fuses the flow time with each action. pi0.5 writes the state into the
prompt and gives the flow time to the expert's norms.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from rlvla.policies.action_stats import ActionStats
from rlvla.policies.architectures import check_name
from rlvla.policies.prefix import ExpertSizes, PrefixOptions, PrefixPolicy, PrefixSizes
from rlvla.policies.suffix_expert import Norm
from rlvla_envs.base import EnvSpec

STATE_BINS = 256


@dataclass(kw_only=True)
class PaliGemmaSizes(PrefixSizes):
    """Sizes of PaliGemma, in the names of its own configuration."""

    image_size: int = 32
    """Side of the square that images are resized to: 224 in PaliGemma."""

    def __post_init__(self) -> None:
        if self.image_size % self.patch_size:
            raise ValueError(
                f"policy.vlm.image_size is {self.image_size}, which patches of {self.patch_size} do not divide."
            )


@dataclass(kw_only=True)
class Pi0Config(PrefixOptions):
    """A pi0 policy."""

    name: str = "pi0"
    vlm: PaliGemmaSizes = field(default_factory=PaliGemmaSizes)
    expert: ExpertSizes = field(default_factory=ExpertSizes)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_name(self.name, "pi0")


@dataclass(kw_only=True)
class Pi05Config(PrefixOptions):
    """A pi0.5 policy."""

    name: str = "pi05"
    vlm: PaliGemmaSizes = field(default_factory=PaliGemmaSizes)
    expert: ExpertSizes = field(default_factory=ExpertSizes)
    pad_state_text: bool = False
    """Write the state into the prompt with its padding, as LeRobot does; openpi writes it without."""
    state_in_prompt: bool = True
    """False for checkpoints that were trained without (openpi's discrete_state_input=False): the policy then does not
    read the state."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_name(self.name, "pi05")

    def tokenizer_texts(self, spec: EnvSpec, instructions: list[str]) -> list[str]:
        """What a tokenizer that is trained for this policy must write briefly.

        Each number of the state is a text of its own, so that it becomes one token behind one space: a small model
        reads a table of 256 numbers, but not digits that merge with what happens to stand beside them.
        """
        # Oftener than the colon and space of the texts around them: what merges first takes a number's space away.
        numbers = [f" {number}" for number in range(-1, STATE_BINS)] * (2 * len(instructions) + 2)
        return numbers + [f"Task: {text}, State:" for text in instructions] + [";\nAction: "]


class PaliGemmaPolicy(PrefixPolicy):
    """What pi0 and pi0.5 share."""

    causal = False

    def __init__(
        self,
        config: Any,
        env_spec: EnvSpec,
        stats: ActionStats,
        tokenizer: Any,
        norm: Norm,
        projections: dict[str, tuple[int, int]],
    ) -> None:
        from transformers import PaliGemmaModel

        super().__init__(config, env_spec, stats, tokenizer, state_limit=config.expert.state_channels)
        self.vlm = PaliGemmaModel(_paligemma(config.vlm))
        self.expert = self.make_expert(norm, projections, norm_eps=1e-6, activation="gelu_tanh")
        self.eval()

    @property
    def language(self) -> Any:
        return self.vlm.language_model

    @property
    def vision(self) -> Any:
        return self.vlm.vision_tower

    def embed_images(self, pixels: Float[Tensor, "N 3 size size"]) -> Float[Tensor, "N tokens D"]:
        # As they leave the projector. Text embeddings alone are scaled by sqrt(D), in Gemma's own embedding.
        features: Tensor = self.vlm.get_image_features(pixels).pooler_output
        return features

    def embed_text(self, ids: Int[Tensor, "B T"]) -> Float[Tensor, "B T D"]:
        embedded: Tensor = self.language.embed_tokens(ids)
        return embedded


class Pi0(PaliGemmaPolicy):
    """The policy. See `rlvla.policies.base.FlowPolicy` for what each method promises."""

    def __init__(self, config: Pi0Config, env_spec: EnvSpec, stats: ActionStats, tokenizer: Any) -> None:
        d = config.expert.hidden_size
        projections = {
            "state_proj": (config.expert.state_channels, d),
            "action_time_mlp_in": (2 * d, d),
            "action_time_mlp_out": (d, d),
        }
        super().__init__(config, env_spec, stats, tokenizer, Norm.gemma, projections)

    def embed_suffix(
        self, sample: Float[Tensor, "B H K"], state: Float[Tensor, "B P"], time: Float[Tensor, "B d"]
    ) -> tuple[list[Tensor], None]:
        expert: Any = self.expert
        return [expert.state_proj(state)[:, None], self.fuse_time(sample, time)], None


class Pi05(PaliGemmaPolicy):
    """The policy. See `rlvla.policies.base.FlowPolicy` for what each method promises."""

    def __init__(self, config: Pi05Config, env_spec: EnvSpec, stats: ActionStats, tokenizer: Any) -> None:
        d = config.expert.hidden_size
        projections = {"time_mlp_in": (d, d), "time_mlp_out": (d, d)}
        super().__init__(config, env_spec, stats, tokenizer, Norm.adaptive, projections)

    def prompt(self, instruction: str, state: Float[np.ndarray, " P"]) -> str:
        """Instruction, the state in bins of [-1, 1], and the word that the actions follow."""
        if not self.config.state_in_prompt:
            return super().prompt(instruction, state)
        if self.config.pad_state_text:
            state = np.pad(state, (0, self.config.expert.state_channels - len(state)))
        # Below -1 is bin -1: so it is in openpi, and the model has seen it.
        bins = np.digitize(state, np.linspace(-1, 1, STATE_BINS + 1)[:-1]) - 1
        return f"Task: {self.clean(instruction)}, State: {' '.join(map(str, bins))};\nAction: "

    def longest_prompt(self, instruction: str) -> str:
        # Three digits each: how long a prompt gets must not depend on where the robot is.
        return self.prompt(instruction, np.ones(self.env_spec.state_size, np.float32))

    def embed_suffix(
        self, sample: Float[Tensor, "B H K"], state: Float[Tensor, "B P"], time: Float[Tensor, "B d"]
    ) -> tuple[list[Tensor], Tensor]:
        expert: Any = self.expert
        condition = F.silu(expert.time_mlp_out(F.silu(expert.time_mlp_in(time))))
        return [expert.action_in_proj(sample)], condition


def _paligemma(sizes: PaliGemmaSizes) -> Any:
    """The transformers configuration of the backbone."""
    from transformers import PaliGemmaConfig

    text = {"model_type": "gemma", "hidden_act": "gelu_pytorch_tanh", "pad_token_id": 0}
    vision = {"model_type": "siglip_vision_model", "projection_dim": sizes.hidden_size, "vision_use_head": False}
    return PaliGemmaConfig(
        text_config=sizes.text() | text,
        vision_config=sizes.vision() | vision,
        projection_dim=sizes.hidden_size,
        # Images come before the prompt, so no token stands for them.
        image_token_index=sizes.vocab_size,
    )
