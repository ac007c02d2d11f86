"""A stand-in for a clone of H-EmbodVis/DOMINO: its files' names and functions over a block that slides along a line.

Written after the signatures of the benchmark's code, of which nothing is here. cuRobo is an empty package beside it.
"""

from pathlib import Path

from rlvla_envs.robotwin_standins import REQUIRED

BASE = '''
import numpy as np

from .robot.robot import Robot
from .utils.create_actor import UnStableError


class Named:
    def __init__(self, name, x=0.0):
        self.name, self.entity, self.p = name, self, np.array([x, 0.0, 0.8])

    def get_pose(self):
        return self


class Contact:
    def __init__(self, *names):
        self.bodies = [Named(name) for name in names]


class Scene:
    shown = 0

    def update_render(self):
        self.shown += 1

    def get_contacts(self):
        return self.contacts


class Cameras:
    def update_picture(self):
        pass

    def get_rgb(self):
        shade = int(100 + 200 * self.task.block.p[0]) % 256
        names = ("head_camera", "left_camera", "right_camera")
        return {name: {"rgb": np.full((240, 320, 3), shade, np.uint8)} for name in names}


class Base_Task:
    """A block at 0.5 m slides to the right; the left hand's place is the first joint's angle."""

    def setup_demo(self, now_ep_num, seed, is_test, use_dynamic, dynamic_level, dynamic_coefficient, **others):
        assert use_dynamic and is_test and others["eval_mode"] and others["dual_arm_embodied"]
        if seed == 100013:
            raise UnStableError("it fell over")
        self.seed, self.plan_success, self.eval_success, self.eval_fail = seed, seed != 100017, False, False
        self.speed = 0.1 * dynamic_level * dynamic_coefficient
        self.block, self.robot, self.scene, self.cameras = Named("block", 0.5), Robot(), Scene(), Cameras()
        self.cameras.task, self.scene.contacts = self, []
        self._clutter_actor_refs = {"can": None, "mug": None}
        self._dynamic_object_stopped, self.steps = False, 0
        self.get_cluttered_table()

    def get_cluttered_table(self, xlim=[-1, 1], ylim=[-1, 1]):
        xlim[0] += 0.1

    def _update_render(self):
        self.scene.update_render()

    def play_once(self):
        if self.seed == 100018:
            raise IndexError("the expert is lost")
        self._saved_dynamic_motion_info = {"speed": self.speed}
        return {"info": {"{A}": "block"}}

    def check_success(self):
        return True

    def close_env(self, clear_cache=False):
        pass

    def init_dynamic_motion_for_eval(self):
        self.motion = self._saved_dynamic_motion_info["speed"]
        return self.seed != 100019

    def take_action(self, action, action_type):
        assert action_type == "qpos"
        print("step")
        self.steps += 1
        if not self._dynamic_object_stopped:
            self.block.p = self.block.p + [self.motion, 0, 0]
        self.robot.joints = list(action)
        self.scene.contacts = [Contact("left_hand", "can")] if action[3] > 0 else [Contact("can", "mug")]
        self.block.p[2] = 0.8 + action[1]
        # Closed on the block.
        self.eval_success = self.check_gripper_contact_dynamic_object() and action[6] < 0.5

    def check_gripper_contact_dynamic_object(self):
        return abs(self.robot.joints[0] - self.block.p[0]) < 0.02

    def stop_dynamic_object_motion(self):
        self._dynamic_object_stopped = True

    def check_dynamic_object_boundary(self):
        return self.block.p[0] <= 0.61
'''
TASK = """
from ._base_task import Base_Task


class {name}(Base_Task):
    def get_dynamic_motion_config(self):
        return {{"target_actor": self.block{rules}}}
"""
ROBOT = """
class Link:
    name = "left_hand"


class Entity:
    def get_links(self):
        return [Link()]


class Robot:
    left_entity = right_entity = Entity()

    def __init__(self):
        self.joints = [0.0] * 6 + [1.0] + [0.0] * 6 + [1.0]

    def get_left_arm_jointState(self):
        return self.joints[:7]

    def get_right_arm_jointState(self):
        return self.joints[7:]

    def get_left_ee_pose(self):
        return [self.joints[0], 0, 0.8, 1, 0, 0, 0]

    def get_right_ee_pose(self):
        return [-5.0, 0, 0.8, 1, 0, 0, 0]
"""
WORDS = """
import random


def generate_episode_descriptions(task, episodes, count):
    noun = random.choice(["the", "a moving", "this"])
    blank = episodes[0]["{A}"]
    return [{"seen": [f"push {noun} {blank}"], "unseen": [f"catch {noun} {blank}"]}]
"""


def write(root: Path) -> Path:
    """A clone in this folder, with files where RoboTwin's assets would be."""
    files = {
        "envs/__init__.py": "",
        "envs/_base_task.py": BASE,
        "envs/catch_block.py": TASK.format(name="catch_block", rules=""),
        "envs/lift_block.py": TASK.format(name="lift_block", rules=', "check_z_threshold": 0.05'),
        "envs/still_block.py": "class still_block:\n    pass\n",
        "envs/robot/__init__.py": "",
        "envs/robot/robot.py": ROBOT,
        "envs/utils/__init__.py": "",
        "envs/utils/create_actor.py": "class UnStableError(Exception):\n    pass\n",
        "curobo/__init__.py": "",
        "description/utils/generate_episode_instructions.py": WORDS,
        "task_config/demo_clean_dynamic.yml": "use_dynamic: true\ncamera: {head_camera_type: D435}\n",
        "task_config/_camera_config.yml": "D435: {w: 320, h: 240}\n",
        "task_config/_eval_step_limit.yml": "catch_block: 30\nother: 7\n",
    }
    for name in REQUIRED:
        if Path(name).suffix:
            files[name] = "{}"
        else:
            (root / name).mkdir(parents=True)
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root
