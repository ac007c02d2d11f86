"""QwenPI of starVLA: one Qwen VLM, and a flow head as wide as it whose blocks attend to its layers one by one.

The VLM is `vlm`, the head `expert`: `qwen_vl_interface.model.model.*` and `action_model.*` of a starVLA checkpoint.
What a context keeps of a token are the states of all layers that are read, n times as much as QwenGR00T's.
"""

from dataclasses import dataclass, field
from typing import Any

from tensordict import TensorDict
from torch import Tensor

from rlvla.policies.action_stats import ActionStats
from rlvla.policies.architectures import check_name
from rlvla.policies.base import Context
from rlvla.policies.gr00t_head import FlowHead
from rlvla.policies.layerwise_head import LayerwiseHead, LayerwiseHeadConfig, read_layers
from rlvla.policies.prompted import pool
from rlvla.policies.qwen_gr00t import QwenGr00t, StarVlaFlowConfig
from rlvla_envs.base import EnvSpec


@dataclass(kw_only=True)
class QwenPiConfig(StarVlaFlowConfig):
    """A QwenPI policy."""

    name: str = "qwen_pi"
    expert: LayerwiseHeadConfig = field(default_factory=LayerwiseHeadConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_name(self.name, "qwen_pi")
        self.expert.check_vlm(self.vlm.num_hidden_layers, self.vlm.hidden_size)


class QwenPi(QwenGr00t):
    """The policy. See `rlvla.policies.base.FlowPolicy` for what each method promises."""

    def __init__(self, config: Any, env_spec: EnvSpec, stats: ActionStats, tokenizer: Any) -> None:
        super().__init__(config, env_spec, stats, tokenizer)

    def make_head(self, state_size: int) -> FlowHead:
        return LayerwiseHead(self.config.expert, self.config.vlm.hidden_size, state_size)

    def head_context(self, context: Context) -> Tensor:
        return context.per_token["layers"]

    def encode(self, batch: TensorDict) -> Context:
        made = self.vlm(
            input_ids=batch["input_ids"],
            attention_mask=batch["mask"].long(),
            mm_token_type_ids=batch["token_type"],
            position_ids=batch["position_ids"].transpose(0, 1),
            use_cache=False,
            output_hidden_states=True,
            **self.image_inputs(self.vlm, batch),
        )
        tokens, mask = made.last_hidden_state, batch["mask"]
        return Context(
            tokens,
            mask,
            batch["position_ids"],
            pool(tokens, mask),
            batch["state"],
            per_token={"layers": read_layers(made.hidden_states, self.config.expert)},
        )
