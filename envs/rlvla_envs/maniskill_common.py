"""What the suites on ManiSkill share: what they need installed, an episode's fresh physics."""

from typing import Any

from rlvla_envs.suites import require_packages


def require_maniskill() -> None:
    """Raise NotReadyError where ManiSkill is not installed."""
    require_packages("mani_skill", "sapien", fix='python -m pip install "mani-skill>=3.0.1"')


def renew_physics(env: Any) -> None:
    """Move everything of an environment on `physx_cpu` into a new physics world, 0.6 ms. To be called before a reset.

    A world with a past gives other bits: after the same placement SimplerEnv's eggplant came to rest elsewhere in 22 of
    33 episodes, up to 9 mm away. PhysX keeps free lists and contact caches, which only a new world forgets, and a body
    keeps the counter after which it falls asleep, which only waking it up resets. Adding the robot again changes its
    motion by up to 0.0014 rad in six steps; so every episode does it, the first included.
    """
    import sapien

    old = env.scene.sub_scenes[0]
    # A new world takes its settings from a global that the last environment built in this process has set.
    sapien.physx.set_scene_config(env.scene.px.config)
    physics = sapien.physx.PhysxCpuSystem()
    physics.timestep = env.scene.px.timestep
    new = sapien.Scene([physics, old.render_system])
    entities = list(old.entities)
    # All out before the first goes in: the links of a robot cannot be in two worlds.
    for entity in entities:
        old.remove_entity(entity)
    for entity in entities:
        new.add_entity(entity)
    for body in physics.rigid_dynamic_components:
        if not body.kinematic:
            body.wake_up()
    env.scene.sub_scenes[0], env.scene.px = new, physics
