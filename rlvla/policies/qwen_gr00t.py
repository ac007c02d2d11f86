"""QwenGR00T of starVLA: one Qwen VLM whose last hidden states a GR00T-style flow head attends to.

The VLM is `vlm`, the head `expert`: `qwen_vl_interface.model.model.*` and `action_model.*` of a starVLA checkpoint. It
is also the "Vanilla VLA" of the TwinBrainVLA paper, and the student of its twin-to-one distillation.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from tensordict import TensorDict
from torch import Tensor, nn

from rlvla.policies.action_stats import ActionStats
from rlvla.policies.architectures import check_name
from rlvla.policies.backbone import token_ids, widen_vision
from rlvla.policies.base import Context
from rlvla.policies.brain import BrainConfig, PromptConfig, build_brain, chat_texts
from rlvla.policies.gr00t_head import FlowHead, Gr00tHead, Gr00tHeadConfig, step_buckets, time_buckets
from rlvla.policies.policy import PolicyWithFlow
from rlvla.policies.prompted import PromptedPolicy, pool
from rlvla_envs.base import EnvSpec


@dataclass(kw_only=True)
class StarVlaFlowConfig:
    """What starVLA's policies with a flow head share."""

    vlm: BrainConfig = field(default_factory=BrainConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    num_denoising_steps: int = 4
    """N: Euler steps from noise to action, in SFT evaluation, rollouts and the learner alike. 2 to 10."""
    use_state: bool = True
    """Give the head one token of normalised proprioception."""
    value_uses_state: bool = True
    """Append that state to the critic's features, which are the mean of the VLM's hidden states."""
    image_sizes: tuple[int, ...] = ()
    """Sides of the squares that images are resized to, one after the other; empty takes the suite's images as they are.
    starVLA resizes to 224, Qwen3-VL's processor then to 256."""
    cameras: tuple[str, ...] = ()
    """Order of the suite's cameras in the prompt; empty is the suite's own."""
    denoise_padding: bool = False
    """Draw and denoise noise in all H x K entries, as starVLA does, and not in executed ones alone. For checkpoints
    that were trained so; PPO scores executed entries either way."""

    def __post_init__(self) -> None:
        check_steps(self.num_denoising_steps)
        self.image_sizes, self.cameras = tuple(self.image_sizes), tuple(self.cameras)

    def tokenizer_texts(self, spec: EnvSpec, instructions: list[str]) -> list[str]:
        """What a tokenizer that is trained for this policy must write briefly."""
        return chat_texts([self.prompt], spec, instructions)


@dataclass(kw_only=True)
class QwenGr00tConfig(StarVlaFlowConfig):
    """A QwenGR00T policy."""

    name: str = "qwen_gr00t"
    expert: Gr00tHeadConfig = field(default_factory=Gr00tHeadConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_name(self.name, "qwen_gr00t")


def check_steps(num_denoising_steps: int) -> None:
    if num_denoising_steps < 1:
        raise ValueError(f"policy.num_denoising_steps is {num_denoising_steps}; it must be at least 1, and 2 for PPO.")


class Gr00tPolicy(PromptedPolicy, PolicyWithFlow):
    """A brain and a GR00T-style head: what QwenGR00T and TwinBrainVLA share."""

    def __init__(
        self, config: Any, env_spec: EnvSpec, stats: ActionStats, tokenizer: Any, *, head_reads_state: bool
    ) -> None:
        horizon, channels = config.expert.horizon, config.expert.channels
        super().__init__(config, env_spec, stats, tokenizer, horizon=horizon, channels=channels)
        self.context_limit = config.expert.context_positions
        self.vlm: Any = build_brain(config.vlm, token_ids(tokenizer))
        self.expert = self.make_head(env_spec.state_size if head_reads_state else 0)
        self.value_size = config.vlm.hidden_size + (env_spec.state_size if config.value_uses_state else 0)

    def make_head(self, state_size: int) -> FlowHead:
        return Gr00tHead(self.config.expert, self.config.vlm.hidden_size, state_size)

    def head_context(self, context: Context) -> Tensor:
        """What the head attends to, token by token."""
        return context.tokens

    def initialize(self) -> None:
        widen_vision(self.vlm, self.config.vlm)

    def chat_text(self, prompt: PromptConfig, instruction: str) -> str:
        """A prompt of this policy in the tokenizer's chat template."""
        text: str = self.tokenizer.apply_chat_template(
            prompt.chat(self.env_spec, instruction), tokenize=False, add_generation_prompt=True
        )
        return text

    def velocity(
        self,
        context: Context,
        sample: Float[Tensor, "B H K"],
        tau: Float[Tensor, " B"],
        step: Int[Tensor, " B"] | None = None,
    ) -> Float[Tensor, "B H K"]:
        """With ``step`` the time comes from it alone (`step_buckets`), without from ``tau`` (`time_buckets`)."""
        buckets = self.config.expert.num_time_buckets
        if step is None:
            bucket = time_buckets(tau, buckets)
        else:
            bucket = step_buckets(step, self.num_denoising_steps, buckets)
        velocity: Tensor = self.expert(
            self.head_context(context), context.mask, context.state, sample, self.noise_mask(), bucket
        )
        return velocity

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        groups = {"vlm": list(self.vlm.parameters()), "expert": list(self.expert.parameters())}
        return groups | self.exploration_group()

    def sharding_units(self) -> list[nn.Module]:
        return [
            *self.vlm.visual.blocks,
            *self.vlm.language_model.layers,
            *self.expert.model.transformer_blocks,
        ]


class QwenGr00t(Gr00tPolicy):
    """The policy. See `rlvla.policies.base.FlowPolicy` for what each method promises."""

    def __init__(self, config: QwenGr00tConfig, env_spec: EnvSpec, stats: ActionStats, tokenizer: Any) -> None:
        super().__init__(config, env_spec, stats, tokenizer, head_reads_state=config.use_state)
        self.eval()

    def prompt(self, instruction: str) -> str:
        return self.chat_text(self.config.prompt, instruction)

    def noise_mask(self) -> Bool[Tensor, "H K"]:
        return torch.ones_like(self._action_mask) if self.config.denoise_padding else self._action_mask

    def encode(self, batch: TensorDict) -> Context:
        tokens = self.vlm(
            input_ids=batch["input_ids"],
            attention_mask=batch["mask"].long(),
            mm_token_type_ids=batch["token_type"],
            position_ids=batch["position_ids"].transpose(0, 1),
            use_cache=False,
            **self.image_inputs(self.vlm, batch),
        ).last_hidden_state
        mask = batch["mask"]
        return Context(tokens, mask, batch["position_ids"], pool(tokens, mask), batch["state"])
