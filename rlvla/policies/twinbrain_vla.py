"""TwinBrainVLA (papers: TwinBrainVLA, sections 4 and E): a frozen generalist VLM beside one that learns to act.

Both are Qwen3-VL. The right brain, `vlm`, reads the left one's keys and values in its layers (`rlvla.policies.asymot`);
a GR00T-style flow head (`rlvla.policies.gr00t_head`) attends to the right's last hidden states and to nothing else.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from tensordict import TensorDict
from torch import nn

from rlvla.policies.action_stats import ActionStats
from rlvla.policies.architectures import check_name
from rlvla.policies.asymot import Reading, hide_left_from_skipped_layers, read_left, read_right
from rlvla.policies.backbone import token_ids
from rlvla.policies.base import Context
from rlvla.policies.brain import BrainConfig, Family, PromptConfig, build_brain, chat_texts
from rlvla.policies.gr00t_head import Gr00tHeadConfig, TwoLayer
from rlvla.policies.prompted import PAD_TO, pool
from rlvla.policies.qwen_gr00t import Gr00tPolicy, check_steps
from rlvla_envs.base import EnvSpec, Observation


def left_prompt() -> PromptConfig:
    """Of appendix E."""
    return PromptConfig(
        system="You are a helpful robot brain that can understand images and texts.",
        user="\nInstruction: {instruction}",
    )


def right_prompt() -> PromptConfig:
    """Of appendix E."""
    return PromptConfig(
        system="You are a helpful robot brain that can understand images, texts, and robot states.\n"
        "You will be provided with observation, an instruction, and the robot state. "
        "Take action to execute the instruction.",
        user="\nInstruction: {instruction}\nRobot Type: {robot_type}\n"
        "Predict the next action for the robot based on the observation, instruction and robot type.",
    )


@dataclass(kw_only=True)
class TwinBrainVLAConfig:
    """A TwinBrainVLA policy."""

    name: str = "twinbrain_vla"
    vlm: BrainConfig = field(default_factory=BrainConfig)
    expert: Gr00tHeadConfig = field(default_factory=Gr00tHeadConfig)
    left_prompt: PromptConfig = field(default_factory=left_prompt)
    right_prompt: PromptConfig = field(default_factory=right_prompt)
    interval: int = 0
    """k: layers of the right brain between two that read the left. 0 is all of them, as in the paper; 8 was worse."""
    num_denoising_steps: int = 4
    """N: Euler steps from noise to action, in SFT evaluation, rollouts and the learner alike. 2 to 10."""
    use_state: bool = True
    """Give the right brain one last token of normalised proprioception. The paper does so on robots only."""
    value_uses_state: bool = True
    """Append that state to the critic's features, which are the mean of the right brain's hidden states."""

    def __post_init__(self) -> None:
        check_name(self.name, "twinbrain_vla")
        check_steps(self.num_denoising_steps)
        if self.vlm.family is not Family.qwen3_vl:
            raise ValueError(
                f"policy.vlm.family is {self.vlm.family.value}; TwinBrainVLA needs qwen3_vl: a layer of gated linear "
                "attention has no keys that another brain could read."
            )
        if not 0 <= self.interval < self.vlm.num_hidden_layers:
            raise ValueError(
                f"policy.interval is {self.interval}; it must be 0 or more and below num_hidden_layers, "
                f"{self.vlm.num_hidden_layers}. The paper's are 0, 1, 2, 4 and 8."
            )

    def tokenizer_texts(self, spec: EnvSpec, instructions: list[str]) -> list[str]:
        """What a tokenizer that is trained for this policy must write briefly."""
        return chat_texts([self.left_prompt, self.right_prompt], spec, instructions)


class TwinBrainVLA(Gr00tPolicy):
    """The policy. See `rlvla.policies.base.FlowPolicy` for what each method promises.

    The left prompt's padded length is the right's less a constant. So it is the same for all rows of a block, and
    padding both by the same number keeps it so.
    """

    context_groups = frozenset({"left", "vlm"})
    frozen_groups = frozenset({"left"})

    def __init__(self, config: TwinBrainVLAConfig, env_spec: EnvSpec, stats: ActionStats, tokenizer: Any) -> None:
        super().__init__(config, env_spec, stats, tokenizer, head_reads_state=False)
        self.left: Any = build_brain(config.vlm, token_ids(tokenizer))
        hide_left_from_skipped_layers(self.vlm, config.interval)
        width, state_size = config.vlm.hidden_size, env_spec.state_size if config.use_state else 0
        self.state_encoder = TwoLayer(state_size, width, width) if state_size else None
        self.eval()

    def initialize(self) -> None:
        """Both brains start as one, as in the paper."""
        super().initialize()
        self.left.load_state_dict(self.vlm.state_dict())

    # --- prompts

    def prompt(self, instruction: str) -> str:
        """The right brain's."""
        return self.chat_text(self.config.right_prompt, instruction)

    def _lengths(self, instruction: str) -> tuple[int, int]:
        """Tokens of the left and of the right prompt, without padding."""
        left = self.layout(self.chat_text(self.config.left_prompt, instruction))
        return len(left.ids), len(self.layout(self.prompt(instruction)).ids)

    @property
    def _shorter(self) -> int:
        """Tokens that a padded left prompt is shorter than the right one, a multiple of PAD_TO."""
        left, right = self._lengths("")
        return max(0, right - left) // PAD_TO * PAD_TO

    def context_length(self, instruction: str) -> int:
        """Of the right prompt, a multiple of PAD_TO; the state's token comes on top.

        Raises:
            ValueError: longer than the head's table of positions.
        """
        left, right = self._lengths(instruction)
        limit = self.context_limit - (self.state_encoder is not None)
        if self.context_limit and right > limit:
            raise ValueError(
                f"the prompt and images take {right} tokens; policy.expert.context_positions allows {limit}. "
                "Shorten the instruction or train with a larger table."
            )
        return -(-max(right, left + self._shorter) // PAD_TO) * PAD_TO

    def collate(self, observation: Observation) -> TensorDict:
        """As `PromptedPolicy.collate`, with the left prompts under ``per_token``; raises as `context_length` does."""
        batch = super().collate(observation)
        texts = [self.chat_text(self.config.left_prompt, text) for text in observation.instruction]
        left = self.pack([self.layout(text) for text in texts], batch["mask"].shape[1] - self._shorter)
        # [B S ...], so that both prompts are padded alike (`rlvla.policies.base.pad_tokens`).
        left["position_ids"] = left["position_ids"].transpose(1, 2)
        del left["token_type"]
        batch["per_token"] = TensorDict({f"left_{name}": tensor for name, tensor in left.items()}, [len(batch)])
        return batch

    # --- the two passes

    def encode(self, batch: TensorDict) -> Context:
        """The right brain's hidden states, those of the state's token last."""
        prompts = batch["per_token"]
        left = Reading(
            prompts["left_input_ids"],
            prompts["left_mask"],
            prompts["left_position_ids"].transpose(1, 2),
            self.image_inputs(self.left, batch),
        )
        memory = read_left(self.left, left, self.config.interval)

        mask, positions, extra = batch["mask"], batch["position_ids"], None
        if self.state_encoder is not None:
            last = (positions * mask[:, None]).amax(dim=(1, 2))
            positions = torch.cat([positions, (last + 1)[:, None, None].expand(-1, 3, 1)], dim=2)
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            extra = self.state_encoder(batch["state"].to(self.state_encoder.layer1.weight.dtype))[:, None]
        right = Reading(batch["input_ids"], mask, positions, self.image_inputs(self.vlm, batch))
        tokens = read_right(self.vlm, right, memory, extra)
        return Context(tokens, mask, positions, pool(tokens, mask), batch["state"])

    # --- parts

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        state = [] if self.state_encoder is None else list(self.state_encoder.parameters())
        return {
            "left": list(self.left.parameters()),
            "vlm": [*self.vlm.parameters(), *state],
            "expert": list(self.expert.parameters()),
            **self.exploration_group(),
        }

    def sharding_units(self) -> list[nn.Module]:
        return [*super().sharding_units(), *self.left.visual.blocks, *self.left.language_model.layers]
