"""`rlvla collect`: demonstrations of a suite's scripted expert, as a LeRobotDataset v3."""

import dataclasses
from pathlib import Path
from typing import Any

from rlvla.config import CollectConfig
from rlvla.dataset import Episode
from rlvla.dataset_writer import DatasetWriter
from rlvla.progress import Progress
from rlvla.seeding import Stream, keyed_rng, training_state
from rlvla.workers import open_envs


def run(config: CollectConfig) -> dict[str, Any]:
    """Keep the first ``config.episodes`` successful expert episodes, in the order of their seeds.

    Raises:
        RuntimeError: the expert keeps failing: fewer than one success in twenty attempts.
    """
    root = Path(config.output)
    progress = Progress()
    kept = tried = frames = 0
    # The expert plays in the first environment of each actor; more would only take memory.
    envs = open_envs(config.suite, dataclasses.replace(config.workers, envs_per_actor=1), config.cluster)
    try:
        spec = envs.spec
        about = {"suite": spec.suite, "task": spec.task, "env_spec": spec.to_dict()}
        with DatasetWriter(
            root,
            fps=spec.control_hz,
            robot_type=spec.robot,
            action_names=spec.action_names(),
            state_names=list(spec.state_names),
            rlvla=about,
        ) as writer:
            while kept < config.episodes:
                # Batches of fixed size: what is kept must not depend on how many actors there are.
                wave = range(tried, tried + 16)
                states = [training_state(config.seed, Stream.DEMONSTRATION, i) for i in wave]
                seeds = [int(keyed_rng(config.seed, Stream.DEMONSTRATION, i).integers(2**31)) for i in wave]
                for demonstration in envs.demonstrate(states, seeds):
                    if kept == config.episodes:
                        break
                    tried += 1
                    if not demonstration.success:
                        continue
                    writer.add(
                        Episode(
                            demonstration.images,
                            demonstration.state,
                            demonstration.action,
                            demonstration.instruction,
                        )
                    )
                    kept += 1
                    frames += len(demonstration.action)
                progress.bar("demonstrations", kept, config.episodes)
                if tried >= 100 and kept < tried / 20:
                    raise RuntimeError(
                        f"the expert of {spec.task} solved {kept} of {tried} episodes. Raise suite.max_episode_steps "
                        f"(now {spec.max_episode_steps}) or bring your own demonstrations."
                    )
    finally:
        envs.close()
        progress.close()
    return {"dataset": str(root), "episodes": kept, "frames": frames, "attempts": tried}
