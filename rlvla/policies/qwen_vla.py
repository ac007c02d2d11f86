"""Qwen-VLA: a Qwen3.5 vision-language model and a flow-matching action expert (papers: Qwen-VLA, section 2).

Size is configuration: the 4.54 B + 1.15 B model of the paper and the tiny one that trains on two CPU cores are
the same class with different YAML (configs/policy).
"""

from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Bool, Float, Int
from tensordict import TensorDict
from torch import Tensor, nn

from rlvla.policies.action_stats import ActionStats
from rlvla.policies.architectures import check_name
from rlvla.policies.backbone import VLMConfig, token_ids, vlm_config, widen_vision
from rlvla.policies.base import Context
from rlvla.policies.expert import Expert, ExpertConfig, Loop
from rlvla.policies.policy import PolicyWithFlow
from rlvla.policies.prompted import PromptedPolicy, pool
from rlvla_algos.flow import Velocity, time_grid
from rlvla_envs.base import EnvSpec


@dataclass(kw_only=True)
class QwenVLAConfig:
    """A Qwen-VLA policy."""

    name: str = "qwen_vla"
    vlm: VLMConfig = field(default_factory=VLMConfig)
    expert: ExpertConfig = field(default_factory=ExpertConfig)
    num_denoising_steps: int = 4
    """N: Euler steps from noise to action, in SFT evaluation, rollouts and the learner alike. 2 to 10."""
    use_state: bool = True
    """Give the expert one token of normalised proprioception. The paper's model has none."""
    value_uses_state: bool = True
    """Append that state to the critic's features. The paper's critic sees the VLM only."""

    def __post_init__(self) -> None:
        check_name(self.name, "qwen_vla")
        if self.num_denoising_steps < 1:
            raise ValueError(
                f"policy.num_denoising_steps is {self.num_denoising_steps}; it must be at least 1, and 2 for PPO."
            )


class QwenVLA(PromptedPolicy, PolicyWithFlow):
    """The policy. See `rlvla.policies.base.FlowPolicy` for what each method promises."""

    def __init__(self, config: QwenVLAConfig, env_spec: EnvSpec, stats: ActionStats, tokenizer: Any) -> None:
        from transformers import Qwen3_5Model

        horizon, channels = config.expert.horizon, config.expert.channels
        super().__init__(config, env_spec, stats, tokenizer, horizon=horizon, channels=channels)
        self.context_limit = config.expert.context_positions
        self.vlm: Any = Qwen3_5Model(vlm_config(config.vlm, token_ids(tokenizer)))
        state_size = env_spec.state_size if config.use_state else 0
        self.expert = Expert(config.expert, config.vlm.hidden_size, state_size, config.vlm.rope_theta)
        self.value_size = config.vlm.hidden_size + (env_spec.state_size if config.value_uses_state else 0)
        self.eval()

    def initialize(self) -> None:
        widen_vision(self.vlm, self.config.vlm)

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

    def velocity(
        self,
        context: Context,
        sample: Float[Tensor, "B H K"],
        tau: Float[Tensor, " B"],
        step: Int[Tensor, " B"] | None = None,
        loop: Loop | None = None,
    ) -> Float[Tensor, "B H K"]:
        # This expert reads tau itself; policies with bucketed times read the step.
        velocity: Tensor = self.expert(
            context.tokens,
            context.mask,
            context.position_ids,
            context.state,
            sample,
            self._action_mask,
            tau,
            loop,
            step,
        )
        return velocity

    def denoising(self, context: Context) -> Velocity:
        grid = time_grid(self.num_denoising_steps)[:-1]
        loop = self.expert.prepare(
            context.tokens, context.mask, context.position_ids, context.state, self._action_mask, self.horizon, grid
        )
        return lambda sample, tau, step: self.velocity(context, sample, tau, step, loop)

    def sequence_velocity(
        self,
        context: Context,
        sample: Float[Tensor, "B L K"],
        tau: Float[Tensor, " B"],
        mask: Bool[Tensor, "L K"] | Bool[Tensor, "B L K"],
    ) -> Float[Tensor, "B L K"]:
        """`velocity` for any number of actions, such as a whole trajectory's: the expert counts positions and has no
        parameters of its own for them."""
        velocity: Tensor = self.expert(
            context.tokens, context.mask, context.position_ids, context.state, sample, mask, tau
        )
        return velocity

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        groups = {"vlm": list(self.vlm.parameters()), "expert": list(self.expert.parameters())}
        return groups | self.exploration_group()

    def sharding_units(self) -> list[nn.Module]:
        return [*self.vlm.visual.blocks, *self.vlm.language_model.layers, *self.expert.blocks]
