"""One ManiSkill environment of a WidowX task, with the traps of ManiSkill 3.0.1's own classes out of the way.

`Twin` derives from ManiSkill's `BaseBridgeEnv` and keeps its robot, controller, cameras, lights and objects. What is
ours: which objects lie where, how an episode starts, what counts as solved, and when a picture is taken.
"""

import contextlib
import functools
import logging
from collections.abc import Iterator
from typing import Any

import numpy as np

from rlvla_envs.maniskill_common import renew_physics
from rlvla_envs.simpler_rules import Contacts, Situation
from rlvla_envs.simpler_tasks import Task

CAMERA = "3rd_view_camera"
FILM_SIZE = (320, 240)
OBS_MODE = "rgb+segmentation"

# fx, cx relative to the width and fy, cy relative to the height of the Bridge dataset's Logitech C920 at 640 x 480.
INTRINSICS = ((623.588 / 640, 319.501 / 640), (623.588 / 480, 239.545 / 480))

HOME = {
    "table": ((0.147, 0.028, 0.870), (-0.01840777, 0.0398835, 0.22242722, -0.00460194, 1.36524296, 0.00153398)),
    "sink": ((0.127, 0.060, 0.85), (-0.2600599, -0.12875618, 0.04461369, -0.00652761, 1.7033415, -0.26983038)),
}
"""Where the robot stands, and its joints when an episode starts (measured on the real one)."""

FINGERS_OPEN = 0.037
OUT_OF_THE_WAY = (-10.0, 0.0, 0.87)


def intrinsic(width: int, height: int) -> np.ndarray:
    """The camera matrix of a picture that shows the 640 x 480 field of view, squashed if the shape differs."""
    (fx, cx), (fy, cy) = INTRINSICS
    return np.array([[fx * width, 0, cx * width], [0, fy * height, cy * height], [0, 0, 1]])


def make_twin(
    task: Task, *, width: int, height: int, sim_backend: str = "physx_cpu", render_backend: str = "cpu", num: int = 1
) -> Any:
    """Build a simulated scene of a task (``num`` of them in one scene on a GPU)."""
    # Upstream warns of what it does by itself: poses it sets at reset, a gripper whose fingers mirror each other.
    build = twin_class()
    with _quietly("mani_skill "):  # the blank is upstream's
        return build(
            task,
            num_envs=num,
            obs_mode=OBS_MODE,
            control_mode="arm_pd_ee_target_delta_pose_align2_gripper_pd_joint_pos",
            reward_mode="none",
            sim_backend=sim_backend,
            render_backend=render_backend,
            sensor_configs={"width": width, "height": height, "intrinsic": intrinsic(width, height)},
        )


@contextlib.contextmanager
def _quietly(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@functools.cache
def twin_class() -> type:
    """`Twin`, defined late: ManiSkill is imported when the first simulator is built and not before."""
    import sapien
    import torch
    from mani_skill.envs.tasks.digital_twins.bridge_dataset_eval.base_env import BaseBridgeEnv
    from mani_skill.sensors.camera import CameraConfig
    from mani_skill.utils.geometry.rotation_conversions import quaternion_to_matrix
    from mani_skill.utils.structs.pose import Pose

    class Twin(BaseBridgeEnv):
        """B scenes of one task; B is 1 on a CPU."""

        def __init__(self, task: Task, **settings: Any) -> None:
            self.task = task
            self.scene_setting = "flat_table" if task.scene == "table" else "sink"
            self.MODEL_JSON = task.metadata
            self.objects_excluded_from_greenscreening = list(task.visible)
            # Class attributes upstream: a second environment in the process would inherit the objects of the first
            # and replace its background.
            self._rgb_overlay_images: dict[str, Any] = {}
            self._objects_to_remove_from_greenscreen: list[Any] = []
            self._layouts = np.stack([task.layout(task.configurations[0])] * settings["num_envs"])
            super().__init__(
                obj_names=[task.source, task.target],
                xyz_configs=torch.tensor(task.positions),
                quat_configs=torch.tensor(task.rotations),
                **settings,
            )

        @property
        def _default_human_render_camera_configs(self) -> Any:
            """The policy's camera at a size for people. Takes a picture only when asked."""
            seen = self.agent._sensor_configs[0]
            width, height = FILM_SIZE
            return CameraConfig(
                "film",
                pose=seen.pose,
                width=width,
                height=height,
                intrinsic=intrinsic(width, height),
                near=seen.near,
                far=seen.far,
                mount=self.agent.robot.links_map["base_link"],
            )

        # --- an episode's start

        def start(self, layouts: np.ndarray) -> None:
            """Begin an episode with source and target put at ``layouts`` [B, 2, 7] and left to come to rest."""
            if not self.gpu_sim_enabled:
                renew_physics(self)
            self._layouts = layouts
            self._obs_mode = "none"  # reset would take a picture nobody looks at
            try:
                self.reset(seed=0)
            finally:
                self._obs_mode = OBS_MODE

        def _initialize_episode(self, env_idx: Any, options: dict[str, Any]) -> None:
            with torch.device(self.device):
                # Upstream leaves the arm where the last episode ended, and it pushes what settles under it.
                self.agent.robot.set_pose(sapien.Pose(OUT_OF_THE_WAY))
                # While they settle it would go on to that episode's last target, and its next motion would depend
                # on that by up to 0.002 rad.
                self._rest_arm()
                self._put_objects()
                if self.gpu_sim_enabled:
                    self.scene._gpu_apply_all()
                self._settle_objects()
                position, _ = HOME[self.task.scene]
                self.agent.robot.set_pose(sapien.Pose(position, q=[0, 0, 0, 1]))
                self._rest_arm()
            # Copies: the simulator overwrites its own buffers, and upstream its infos.
            self.source_start, self.target_start = self._position(self.task.source), self._position(self.task.target)
            self.source_half, self.target_half = self._half_box(self.task.source), self._half_box(self.task.target)

        def _rest_arm(self) -> None:
            """The arm at its home, without velocity and with nowhere to go."""
            joints = np.array([*HOME[self.task.scene][1], FINGERS_OPEN, FINGERS_OPEN])
            self.agent.reset(init_qpos=joints)
            robot = self.agent.robot
            targets = torch.tensor(joints, dtype=torch.float32).expand(self.num_envs, -1)
            robot.set_joint_drive_targets(targets, robot.active_joints)

        def _put_objects(self) -> None:
            for i, name in enumerate((self.task.source, self.task.target)):
                actor, pose = self.objs[name], torch.tensor(self._layouts[:, i], dtype=torch.float32)
                actor.set_pose(Pose.create_from_pq(p=pose[:, :3], q=pose[:, 3:]))
                actor.set_linear_velocity(torch.zeros(self.num_envs, 3))
                actor.set_angular_velocity(torch.zeros(self.num_envs, 3))

        def _settle_objects(self) -> None:
            """Upstream's rule: 0.1 s, and 1.2 s more where anything still moves. Many scenes always take both: an
            episode must not depend on which others begin with it."""
            for substeps in (50, 600):
                for _ in range(substeps):
                    self.scene.step()
                if self.gpu_sim_enabled:
                    self.scene._gpu_fetch_all()
                velocities = [
                    (actor.linear_velocity.norm(dim=1), actor.angular_velocity.norm(dim=1))
                    for actor in self.objs.values()
                ]
                linear, angular = (sum(v[i] for v in velocities).max() for i in (0, 1))
                if self.num_envs == 1 and linear <= 1e-3 and angular <= 1e-2:
                    break

        def _half_box(self, name: str) -> np.ndarray:
            """Half of the bounding box in the world frame, [B, 3].

            The signed product is upstream's; upstream computes it for the first environment of a batch only.
            """
            box = self.model_db[name]["bbox"]
            size = torch.tensor(box["max"], device=self.device) - torch.tensor(box["min"], device=self.device)
            turned: np.ndarray = (quaternion_to_matrix(self.objs[name].pose.q) @ size).cpu().numpy()
            return turned / 2

        # --- what happens

        def evaluate(self) -> dict[str, Any]:
            """Asked by ManiSkill's reset. Success is asked of `situation`, once a step: upstream's own evaluate
            counts how often it is called."""
            return {}

        def situation(self) -> Situation:
            source = self.objs[self.task.source]
            return Situation(
                source=self._position(self.task.source),
                target=self._position(self.task.target),
                source_start=self.source_start,
                target_start=self.target_start,
                source_half=self.source_half,
                target_half=self.target_half,
                speed=source.linear_velocity.norm(dim=1).cpu().numpy(),
                contacts=self._contacts_of_batch if self.gpu_sim_enabled else self._contacts,
            )

        def _position(self, name: str) -> np.ndarray:
            return np.array(self.objs[name].pose.p.cpu().numpy())

        def _contacts(self) -> Contacts:
            """One walk through the contacts; a pair counts from the original SimplerEnv's impulse on."""
            source, target = self.objs[self.task.source]._objs[0], self.objs[self.task.target]._objs[0]
            robot = {link._objs[0].entity for link in self.agent.robot.links}
            from_target, by_robot, by_others = np.zeros(3), False, False
            for contact in self.scene.px.get_contacts():
                first, second = (body.entity for body in contact.bodies)
                if source not in (first, second):
                    continue
                other = second if first == source else first
                impulse = np.sum([point.impulse for point in contact.points], axis=0)
                presses = bool(np.linalg.norm(impulse) > 1e-6)
                if other == target:
                    from_target += impulse if first == source else -impulse
                elif other in robot:
                    by_robot |= presses
                else:
                    by_others |= presses
            force = np.linalg.norm(from_target) / self.scene.px.timestep
            return Contacts(np.array([force]), others=np.array([by_others]), robot=np.array([by_robot]))

        def _contacts_of_batch(self) -> Contacts:
            """On a GPU contacts cannot be walked, forces between pairs and the sum on a body can be asked. What presses
            beside target and robot is then the rest of the sum: two others that cancel each other go unseen, which two
            sides of a sink could do and one table cannot."""
            source, target = self.objs[self.task.source], self.objs[self.task.target]
            weakest = 1e-6 / self.scene.px.timestep
            from_target = self.scene.get_pairwise_contact_forces(source, target)
            from_robot = [self.scene.get_pairwise_contact_forces(source, link) for link in self.agent.robot.links]
            rest = source.get_net_contact_forces() - from_target - sum(from_robot)
            pressing = torch.stack([force.norm(dim=1) > weakest for force in from_robot]).any(dim=0)
            # The rest of a difference of single-precision sums is not zero: a thousandth of the sum is.
            floor = weakest + 1e-3 * (from_target.norm(dim=1) + sum(force.norm(dim=1) for force in from_robot))
            return Contacts(
                target_force=from_target.norm(dim=1).cpu().numpy(),
                others=(rest.norm(dim=1) > floor).cpu().numpy(),
                robot=pressing.cpu().numpy(),
            )

        def at_rest(self) -> np.ndarray:
            """Whether the source lies about where it was put, [B]. A jittered eggplant can jump out of the sink."""
            moved = np.abs(self.source_start - self._layouts[:, 0, :3])
            resting: np.ndarray = (moved[:, :2] < 0.04).all(axis=1) & (moved[:, 2] < 0.03)
            return resting

        # --- pictures

        def picture(self) -> np.ndarray:
            """What the policy sees: robot and objects over the photograph of the real scene, [B, h, w, 3].

            It may be the renderer's own buffer, which the next picture overwrites.
            """
            picture: np.ndarray = self._get_obs_sensor_data()[CAMERA]["rgb"].cpu().numpy()
            return picture

        def film(self) -> np.ndarray:
            self.scene.update_render(update_sensors=False, update_human_render_cameras=True)
            camera = self._human_render_cameras["film"]
            camera.capture()
            seen = camera.get_obs(rgb=True, depth=False, position=False, segmentation=True)
            background = self._film_background
            return np.array(self._green_sceen_rgb(seen["rgb"], seen["segmentation"], background).cpu().numpy())

        @functools.cached_property
        def _film_background(self) -> Any:
            import cv2

            read: Any = cv2.imread(self.rgb_overlay_paths[CAMERA])
            photograph = cv2.cvtColor(read, cv2.COLOR_BGR2RGB)
            return torch.tensor(cv2.resize(photograph, FILM_SIZE), device=self.device)

    return Twin
