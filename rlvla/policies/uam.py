"""UAM: a semantic, a dorsal and an action expert in one mixture of transformers (papers: UAM, section 3, appendix C).

The semantic expert reads prompt and images as a VLM does. The dorsal expert reads latents of the same images beside
noised latents of the next ones; in training it also predicts those (visual dynamics). The action expert reads both at
every layer. Where the paper is silent: docs/policies.md and docs/adr/0023.

Axes as in `rlvla.policies.base` and `rlvla.policies.joint`; N latents of all cameras of one moment, C channels of a
latent.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from tensordict import TensorDict
from torch import Tensor, nn

from rlvla.policies.action_stats import ActionStats
from rlvla.policies.architectures import check_name
from rlvla.policies.backbone import QwenSizes, qwen3_vl_config, token_ids, widen_vision
from rlvla.policies.base import Context
from rlvla.policies.expert import FLOW_TIME_FEATURES, flow_time_features
from rlvla.policies.latents import IMAGE_TOKENIZERS, LatentConfig
from rlvla.policies.policy import PolicyWithFlow
from rlvla.policies.prompted import PromptedPolicy, pool
from rlvla_algos.flow_matching import interpolate
from rlvla_envs.base import EnvSpec

if TYPE_CHECKING:
    from rlvla.policies.joint import KeysValues  # which imports transformers: seconds that a command line can spare


@dataclass(kw_only=True)
class SemanticConfig(QwenSizes):
    """Sizes of the Qwen3-VL model that is the semantic expert, in the names of its own configuration."""

    hidden_size: int = 64
    intermediate_size: int = 128
    num_hidden_layers: int = 2
    head_dim: int = 32
    vision_depth: int = 1
    vision_hidden_size: int = 32
    vision_intermediate_size: int = 64
    deepstack_visual_indexes: tuple[int, ...] = ()
    """Vision layers that also feed the first layers of the language model, as in Qwen3-VL's own checkpoints. The
    paper's VLM has none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.deepstack_visual_indexes = tuple(self.deepstack_visual_indexes)
        self.check_rotation(self.head_dim)
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"policy.vlm.num_attention_heads is {self.num_attention_heads}, which {self.num_key_value_heads} "
                "key-value heads do not divide."
            )


class DorsalInit(Enum):
    """Where the dorsal expert's layers start (table 1)."""

    semantic = "semantic"
    random = "random"
    none = "none"


class DynamicsTime(Enum):
    """Flow time at which the next images are predicted in training."""

    logit_normal = "logit_normal"
    noise = "noise"


@dataclass(kw_only=True)
class DorsalConfig:
    """The dorsal expert, whose layers have the semantic expert's shape."""

    init: DorsalInit = DorsalInit.semantic
    """semantic: a copy of the semantic expert's layers (VLM-init). random. none: no dorsal expert, two experts as in
    pi0. The paper's own, from a generative model (Bagel), is weights in the same key layout; they are not here."""
    frozen: bool = False
    """Never train it. With a frozen VLM too, contexts are stored and every denoising step of an update is one pass of
    the action expert alone."""
    dynamics_weight: float = 0.1
    """Lambda: weight of the visual-dynamics loss in `rlvla sft`, the squared error of the velocity of the next image's
    latents. 0 has none. The paper gives no value."""
    dynamics_time: DynamicsTime = DynamicsTime.logit_normal
    """logit_normal: the loss is at a drawn flow time, in a pass of its own. noise: at pure noise, the one step of
    denoising that the action expert reads."""

    def __post_init__(self) -> None:
        if self.dynamics_weight < 0:
            raise ValueError(f"policy.dorsal.dynamics_weight is {self.dynamics_weight}; it must be 0 or more.")


@dataclass(kw_only=True)
class ActionConfig:
    """The action expert: layers of its own width, with the semantic expert's number of layers and shape of heads."""

    hidden_size: int = 64
    ffn_size: int = 128
    channels: int = 8
    """K: action channels after zero-padding."""
    horizon: int = 8
    """H: longest chunk; a suite's may be shorter."""


@dataclass(kw_only=True)
class UAMConfig:
    """A UAM policy."""

    name: str = "uam"
    vlm: SemanticConfig = field(default_factory=SemanticConfig)
    dorsal: DorsalConfig = field(default_factory=DorsalConfig)
    latents: LatentConfig = field(default_factory=LatentConfig)
    expert: ActionConfig = field(default_factory=ActionConfig)
    num_denoising_steps: int = 4
    """N: Euler steps from noise to action, in SFT evaluation, rollouts and the learner alike. 2 to 10."""
    use_state: bool = True
    """Give the action expert one token of normalised proprioception, as the paper does."""
    value_uses_state: bool = True
    """Append that state to the critic's features."""

    def __post_init__(self) -> None:
        check_name(self.name, "uam")
        if self.num_denoising_steps < 1:
            raise ValueError(
                f"policy.num_denoising_steps is {self.num_denoising_steps}; it must be at least 1, and 2 for PPO."
            )


class DorsalExpert(nn.Module):
    """Latents of images in, hidden states and the velocity of the noised ones out."""

    def __init__(self, layers: nn.ModuleList, hidden_size: int, channels: int) -> None:
        super().__init__()
        self.latent_in = nn.Linear(channels, hidden_size)
        self.time_in = nn.Sequential(
            nn.Linear(FLOW_TIME_FEATURES, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )
        self.layers = layers
        self.norm = nn.RMSNorm(hidden_size, eps=1e-6)
        self.latent_out = nn.Linear(hidden_size, channels)
        nn.init.zeros_(self.latent_out.weight)
        nn.init.zeros_(self.latent_out.bias)

    def embed(
        self, latents: Float[Tensor, "B N C"], tau: Float[Tensor, " B"], grid: Float[Tensor, "N D"]
    ) -> Float[Tensor, "B N D"]:
        """Tokens of latents at flow time tau; images that were observed are at 0."""
        dtype = self.latent_in.weight.dtype
        time = self.time_in(flow_time_features(tau).to(dtype))
        x: Tensor = self.latent_in(latents.to(dtype)) + time[:, None] + grid.to(dtype)
        return x


class ActionExpert(nn.Module):
    """Tokens of state and noisy actions in, their velocity out. Flow time enters with the actions, as in pi0."""

    def __init__(self, layers: nn.ModuleList, hidden_size: int, channels: int, state_size: int) -> None:
        super().__init__()
        self.state_in = nn.Linear(state_size, hidden_size) if state_size else None
        self.action_in = nn.Linear(channels, hidden_size)
        self.time_in = nn.Sequential(
            nn.Linear(hidden_size + FLOW_TIME_FEATURES, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )
        self.layers = layers
        self.norm = nn.RMSNorm(hidden_size, eps=1e-6)
        self.action_out = nn.Linear(hidden_size, channels)
        nn.init.zeros_(self.action_out.weight)
        nn.init.zeros_(self.action_out.bias)

    def embed(
        self, state: Float[Tensor, "B P"], sample: Float[Tensor, "B H K"], tau: Float[Tensor, " B"]
    ) -> Float[Tensor, "B L D"]:
        """One token for the state, where it is read, and one for each action."""
        dtype = self.action_in.weight.dtype
        actions = self.action_in(sample.to(dtype))
        time = flow_time_features(tau).to(dtype)[:, None].expand(-1, sample.shape[1], -1)
        x: Tensor = self.time_in(torch.cat([actions, time], dim=-1))
        if self.state_in is not None:
            x = torch.cat([self.state_in(state.to(dtype))[:, None], x], dim=1)
        return x


class UAM(PromptedPolicy, PolicyWithFlow):
    """The policy. See `rlvla.policies.base.FlowPolicy` for what each method promises."""

    def __init__(self, config: UAMConfig, env_spec: EnvSpec, stats: ActionStats, tokenizer: Any) -> None:
        from rlvla.policies import joint

        horizon, channels = config.expert.horizon, config.expert.channels
        super().__init__(config, env_spec, stats, tokenizer, horizon=horizon, channels=channels)
        self.has_dorsal = config.dorsal.init is not DorsalInit.none
        if self.has_dorsal:
            _check_latents(config.latents, env_spec)
        self.vlm: Any = joint.semantic_expert(
            qwen3_vl_config(config.vlm, token_ids(tokenizer), config.vlm.deepstack_visual_indexes)
        )
        text, width = self.vlm.config.text_config, config.vlm.hidden_size
        self.dorsal: DorsalExpert | None = None
        self.latents = IMAGE_TOKENIZERS[config.latents.name](config.latents)
        if self.has_dorsal:
            layers = joint.expert_layers(text, width, config.vlm.intermediate_size)
            self.dorsal = DorsalExpert(layers, width, self.latents.channels)
            self._add_grid(joint.grid_positions)
        self.expert = ActionExpert(
            joint.expert_layers(text, config.expert.hidden_size, config.expert.ffn_size),
            config.expert.hidden_size,
            channels,
            env_spec.state_size if config.use_state else 0,
        )
        self.context_groups = frozenset(self.parameter_groups()) - {"expert"}
        never = {"latents", "dorsal"} if config.dorsal.frozen else {"latents"}
        self.frozen_groups = self.context_groups & never
        self.value_size = width * (1 + self.has_dorsal) + env_spec.state_size * config.value_uses_state
        self.eval()

    def check_embodiment(self, env_spec: EnvSpec) -> None:
        super().check_embodiment(env_spec)
        if self.has_dorsal:
            _check_latents(self.config.latents, env_spec)

    def embody(self, index: int) -> None:
        from rlvla.policies import joint

        super().embody(index)
        if self.has_dorsal:
            # As many latents as its cameras have.
            self._add_grid(joint.grid_positions)
            device = self._action_mask.device
            self._grid, self._places = self._grid.to(device), self._places.to(device)

    def initialize(self) -> None:
        widen_vision(self.vlm, self.config.vlm)
        self.initialize_dorsal()

    @torch.no_grad()
    def initialize_dorsal(self) -> None:
        """Start the dorsal expert as its configuration says. Whoever loads a VLM calls this afterwards."""
        if self.dorsal is not None and self.config.dorsal.init is DorsalInit.semantic:
            text = self.vlm.language_model
            self.dorsal.layers.load_state_dict(text.layers.state_dict())
            self.dorsal.norm.weight.copy_(text.norm.weight)

    def context_noise(self) -> dict[str, tuple[int, ...]]:
        if self.dorsal is None:
            return {}
        noise: dict[str, tuple[int, ...]] = {"dorsal": (self._num_latents, self.latents.channels)}
        if self.auxiliary_weights and self.config.dorsal.dynamics_time is DynamicsTime.logit_normal:
            noise["dynamics_time"] = (1,)
        return noise

    @property
    def auxiliary_weights(self) -> Mapping[str, float]:
        """Visual dynamics, which is there to teach the dorsal expert: none where that is frozen."""
        weight = self.config.dorsal.dynamics_weight
        teaches = self.dorsal is not None and not self.config.dorsal.frozen
        return {"dynamics": weight} if teaches and weight > 0 else {}

    def encode(self, batch: TensorDict) -> Context:
        """One pass of the semantic expert, and one of the dorsal expert over what is seen and foreseen."""
        from rlvla.policies import joint

        mask = batch["mask"]
        tokens, semantic = joint.read_prompt(self.vlm, batch, self.image_inputs(self.vlm, batch))
        per_row = {}
        if self.dorsal is not None:
            x, dorsal = self._foresee(self.dorsal, batch, semantic)
            # Of what is seen only: the value must not depend on the noise.
            pooled = self.dorsal.norm(x[:, : self._num_latents]).mean(dim=1).detach()
            per_row = joint.stack(dorsal, "dorsal") | {"dorsal_pooled": pooled}
        per_token = joint.stack(semantic, "semantic")
        positions = batch["position_ids"]
        return Context(tokens, mask, positions, pool(tokens, mask), batch["state"], per_token, per_row)

    def _foresee(
        self, expert: DorsalExpert, batch: TensorDict, semantic: "list[KeysValues]"
    ) -> "tuple[Tensor, list[KeysValues]]":
        """The dorsal expert's pass: latents that are seen, then pure noise in the place of those that are foreseen."""
        from rlvla.policies import joint

        mask, num = batch["mask"], self._num_latents
        now = torch.zeros(len(mask), device=mask.device)
        seen = expert.embed(self._latents(batch["images"]), now, self._grid)
        foreseen = expert.embed(self._noise(batch, "dorsal"), now + 1, self._grid)
        x = torch.cat([seen, foreseen], dim=1)
        routes = [joint.Route.semantic] * mask.shape[1] + [joint.Route.seen] * num + [joint.Route.foreseen] * num
        valid = torch.cat([mask, mask.new_ones(len(mask), 2 * num)], dim=1)
        attend = joint.joint_mask(torch.tensor(routes, device=mask.device), valid)[:, :, mask.shape[1] :]
        rotary = self._rotary(x, self._dorsal_positions(batch["position_ids"], mask))
        return joint.run_layers(expert.layers, x, rotary, attend, semantic)

    def value_features(self, context: Context) -> Float[Tensor, "B V"]:
        parts = [context.pooled]
        if self.dorsal is not None:
            parts.append(context.per_row["dorsal_pooled"])
        if self.config.value_uses_state:
            parts.append(context.state.to(context.pooled.dtype))
        return torch.cat(parts, dim=-1).detach()

    def velocity(
        self,
        context: Context,
        sample: Float[Tensor, "B H K"],
        tau: Float[Tensor, " B"],
        step: Int[Tensor, " B"] | None = None,
    ) -> Float[Tensor, "B H K"]:
        """One pass of the action expert over state and actions; everything else is in the context."""
        from rlvla.policies import joint

        del step  # The expert reads tau itself.
        horizon, action_mask = sample.shape[1], self._action_mask
        past = joint.unstack(context.per_token["semantic_keys"], context.per_token["semantic_values"])
        x = self.expert.embed(context.state, sample * action_mask, tau)
        rows, length = x.shape[:2]
        valid = [context.mask]
        if self.dorsal is not None:
            past = joint.join(past, joint.unstack(context.per_row["dorsal_keys"], context.per_row["dorsal_values"]))
            valid.append(context.mask.new_ones(rows, 2 * self._num_latents))
        own = torch.cat([action_mask.new_ones(length - horizon), action_mask.any(dim=-1)])
        valid.append(own.expand(rows, length))
        # All of them see every valid key: their rows of the joint mask.
        attend = torch.cat(valid, dim=1)[:, None, None].expand(-1, -1, length, -1)
        first = _after(context.position_ids, context.mask) + self._span
        positions = first[:, None] + torch.arange(length, device=first.device)
        rotary = self._rotary(x, positions[:, None].expand(-1, 3, -1))
        x, _ = joint.run_layers(self.expert.layers, x, rotary, attend, past)
        velocity: Tensor = self.expert.action_out(self.expert.norm(x[:, -horizon:])).float() * action_mask
        return velocity

    def auxiliary_losses(self, context: Context, batch: TensorDict) -> dict[str, Float[Tensor, " B"]]:
        """Visual dynamics: the mean squared error of the velocity of the next images' latents, from noise that the
        context was made with. 0 where there is no next image."""
        from rlvla.policies import joint

        if self.dorsal is None:
            return {}
        target, noise = self._latents(batch["next", "images"]), self._noise(batch, "dorsal")
        tau = torch.ones(len(noise), device=noise.device)
        if self.config.dorsal.dynamics_time is DynamicsTime.logit_normal:
            tau = self._noise(batch, "dynamics_time")[:, 0].sigmoid()
        num, mask = self._num_latents, context.mask
        seen = slice(num)
        past = joint.join(
            joint.unstack(context.per_token["semantic_keys"], context.per_token["semantic_values"]),
            joint.unstack(context.per_row["dorsal_keys"][:, seen], context.per_row["dorsal_values"][:, seen]),
        )
        x = self.dorsal.embed(interpolate(target, noise, tau), tau, self._grid)
        rotary = self._rotary(x, self._dorsal_positions(context.position_ids, mask)[..., num:])
        valid = torch.cat([mask, mask.new_ones(len(mask), 2 * num)], dim=1)
        x, _ = joint.run_layers(self.dorsal.layers, x, rotary, valid[:, None, None].expand(-1, -1, num, -1), past)
        velocity = self.dorsal.latent_out(self.dorsal.norm(x)).float()
        error = (velocity - (noise - target)).square().mean(dim=(1, 2))
        return {"dynamics": error * batch["next", "valid"]}

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        groups = {"vlm": list(self.vlm.parameters()), "expert": list(self.expert.parameters())}
        if self.dorsal is not None:
            groups["dorsal"] = list(self.dorsal.parameters())
        latents = list(self.latents.parameters())
        return groups | ({"latents": latents} if latents else {}) | self.exploration_group()

    def encoded_tokens(self, data: TensorDict) -> int:
        # Latents that are seen and that are foreseen come after the prompt's.
        return super().encoded_tokens(data) + (2 * self._num_latents if self.has_dorsal else 0)

    def sharding_units(self) -> list[nn.Module]:
        dorsal = [] if self.dorsal is None else list(self.dorsal.layers)
        return [*self.vlm.visual.blocks, *self.vlm.language_model.layers, *dorsal, *self.expert.layers]

    # --- latents

    @property
    def _num_latents(self) -> int:
        return len(self._grid)

    def _latents(self, images: Tensor) -> Float[Tensor, "B N C"]:
        """Of all cameras [B views h w 3], one after another."""
        latents: Tensor = self.latents(images.flatten(0, 1))
        return latents.detach().reshape(len(images), self._num_latents, -1)

    def _noise(self, batch: TensorDict, name: str) -> Tensor:
        """What was drawn for the decision. Zeros where nothing was, as for the value of a final observation."""
        if "noise" in batch:
            noise: Tensor = batch["noise", name]
            return noise
        return torch.zeros(len(batch), *self.context_noise()[name], device=batch["mask"].device)

    def _add_grid(self, table: Any) -> None:
        """Tables of the latents' places: what is added to them, and their m-RoPE positions after the prompt.

        A camera's two images count as two frames of a video do for Qwen: one step of time apart, at the same heights
        and widths. The next camera starts after all of these.
        """
        size, stride = self.config.vlm.hidden_size, self.config.latents.stride
        grids, places, start = [], [], 0
        for camera in self.env_spec.cameras:
            rows, columns = camera.height // stride, camera.width // stride
            grids.append(table(rows, columns, size))
            row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
            places.append(start + torch.stack([torch.zeros_like(row), row, column]).flatten(1))
            start += max(rows, columns, 2)
        seen = torch.cat(places, dim=1)
        foreseen = seen + torch.tensor([1, 0, 0])[:, None]
        self._span = start
        self.register_buffer("_grid", torch.cat(grids), persistent=False)
        self.register_buffer("_places", torch.cat([seen, foreseen], dim=1), persistent=False)

    _grid: Tensor
    _places: Tensor
    _span: int = 0
    """Positions that the latents take after the prompt."""

    def _dorsal_positions(self, position_ids: Tensor, mask: Tensor) -> Int[Tensor, "B 3 2N"]:
        return _after(position_ids, mask)[:, None, None] + self._places

    def _rotary(self, x: Tensor, positions: Int[Tensor, "B 3 L"]) -> tuple[Tensor, Tensor]:
        cos, sin = self.vlm.language_model.rotary_emb(x, positions.transpose(0, 1))
        return cos, sin


def _after(position_ids: Int[Tensor, "B 3 S"], mask: Tensor) -> Int[Tensor, " B"]:
    """The first position after each row's prompt: behind the largest valid one of all three axes."""
    return (position_ids * mask[:, None]).amax(dim=(1, 2)) + 1


def _check_latents(config: LatentConfig, env_spec: EnvSpec) -> None:
    problems = [
        f"camera {c.name} is {c.height} x {c.width}, which policy.latents.stride {config.stride} does not divide"
        for c in env_spec.cameras
        if c.height % config.stride or c.width % config.stride
    ]
    if problems:
        raise ValueError(
            f"the policy does not fit the suite: {'; '.join(problems)}. Change policy.latents.stride or "
            "suite.image_size."
        )
