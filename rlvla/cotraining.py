"""Demonstrations beside RL: the loss of `rlvla sft` on a few frames in every minibatch of an update."""

from pathlib import Path

from torch import Tensor

from rlvla.acting import context_noise
from rlvla.config import AlgoConfig, ConfigError, SFTConfig
from rlvla.policies.policy import Policy
from rlvla.samplers import Sampler
from rlvla.seeding import Stream, keyed_rng, normal
from rlvla.sft_examples import Chunks
from rlvla_envs.base import EnvSpec, require_match


class CoTraining:
    """Draws frames, keyed by where in the run they are asked for, so that a resumed run sees the same ones."""

    def __init__(self, policy: Policy, algo: AlgoConfig, *, seed: int, device: str) -> None:
        """
        Raises:
            ValueError: there is no such dataset, or its conventions are not the policy's.
        """
        # A learner without demonstrations needs no pyarrow.
        from rlvla.dataset_reader import load_dataset

        options = algo.demonstrations
        if options.dataset is None:
            raise ConfigError("algo.demonstrations.dataset is null; it must name a folder of demonstrations.")
        demonstrations = load_dataset(Path(options.dataset))
        if demonstrations.env_spec is not None:
            spec = EnvSpec.from_dict({**demonstrations.env_spec, "chunk_size": policy.env_spec.chunk_size})
            require_match(spec, policy.env_spec, left="dataset", right="policy")
        size, wanted = demonstrations.action.shape[1], policy.env_spec.action_size
        if size != wanted:
            raise ConfigError(
                f"algo.demonstrations.dataset {options.dataset} has actions of {size} numbers; the policy's have "
                f"{wanted}. Use demonstrations of its suite."
            )
        self._config = SFTConfig(
            dataset=options.dataset, batch_size=options.batch_size, noise_draws=options.noise_draws
        )
        self._examples = Chunks(policy, demonstrations, self._config)
        self._policy, self._seed, self._device = policy, seed, device

    def loss(self, sampler: Sampler, *key: int) -> Tensor:
        """The imitation loss on frames of a key."""
        policy, size = self._policy, self._config.batch_size
        rng = keyed_rng(self._seed, Stream.SFT, *key)
        batch, action, valid, _ = self._examples.draw(rng, size)
        noise = {name: normal(rng, size, *shape) for name, shape in policy.context_noise().items()}
        if noise:
            batch["noise"] = context_noise(noise, size)
        action, valid, batch = (x.to(self._device) for x in (action, valid, batch))
        # Where the backbone is frozen its parameters ask for no gradient.
        context = policy.encode(batch)
        return sampler.imitation_loss(policy, context, action, valid, rng, self._config, self._examples.velocity)


def load_cotraining(policy: Policy, algo: AlgoConfig, *, seed: int, device: str) -> CoTraining | None:
    """None where there are no demonstrations."""
    return None if algo.demonstrations.dataset is None else CoTraining(policy, algo, seed=seed, device=device)
