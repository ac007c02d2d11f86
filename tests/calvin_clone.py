"""A stand-in for a clone of mees/calvin: its files' names and functions over a drawer that is one number.

Written after the signatures of the benchmark's code, of which nothing is here.
"""

from pathlib import Path

TABLE = '''
import hydra
import numpy as np


class Robot:
    """As the benchmark's, whose reset leaves the last command."""

    def __init__(self):
        self.state, self.gripper_action = np.zeros(15), 1

    def observation(self):
        return np.append(self.state[:14], self.gripper_action)


class PlayTableSimEnv:
    """The drawer moves by what the first action says."""

    def __init__(self, robot_cfg, scene_cfg, cameras, show_gui, use_vr, use_scene_info, use_egl):
        assert not show_gui and not use_vr and not use_egl and use_scene_info
        assert set(cameras) == {"static", "gripper"} and scene_cfg["name"] == "D"
        self.drawer, self.robot, self.drawn = 0.0, Robot(), 0

    def reset(self, robot_obs=None, scene_obs=None):
        self.robot.state, self.drawer = np.array(robot_obs), float(scene_obs[1])
        return self.get_obs()

    def step(self, action):
        self.robot.gripper_action = action[6]
        assert action[6] in (-1, 1)
        # In place, as the benchmark does.
        action[:3] *= 0.02
        self.robot.state[:3] += action[:3]
        self.drawer += action[0]
        return self.get_obs(), 0, False, self.get_info()

    def get_obs(self):
        rgb, depth = self.get_camera_obs()
        return {"rgb_obs": rgb, "depth_obs": depth, "robot_obs": self.robot.observation(), "scene_obs": np.zeros(24)}

    def get_info(self):
        return {"scene_info": {"drawer": self.drawer}, "robot_info": {}}

    def get_camera_obs(self):
        self.drawn += 1
        shade = int(128 + 400 * self.drawer) % 256
        pictures = {"rgb_static": np.full((200, 200, 3), shade, np.uint8)}
        pictures["rgb_gripper"] = np.full((84, 84, 3), 7, np.uint8)
        pictures["rgb_static"][:100] = 0
        return pictures, {}

    def close(self):
        print("disconnecting")
'''
TASKS = """
class Tasks:
    def __init__(self, tasks):
        self.tasks = dict(tasks)

    def get_task_info_for_set(self, start, end, chosen):
        moved = end["scene_info"]["drawer"] - start["scene_info"]["drawer"]
        return {name for name in chosen if moved * self.tasks[name][1] > 0.05}
"""
SEQUENCES = """
from calvin_agent.evaluation.utils import temp_seed

TASKS = ["open_drawer", "close_drawer"]


def get_sequences_for_state2(args):
    state, count, seed = args
    return [[TASKS[(seed + i) % 2] for i in range(5)]] * count


def get_sequences(num_sequences=1000, num_workers=None):
    with temp_seed(0):
        state = {"led": 0, "lightbulb": 0, "slider": "right", "drawer": "closed", "red_block": "table"}
        state |= {"blue_block": "table", "pink_block": "slider_left", "grasped": 0}
        return [(state, tuple(get_sequences_for_state2((state, 1, i))[0])) for i in range(num_sequences)]
"""
CONFIG = """
defaults:
  - cameras: none
  - env: play_table_env
  - scene: other
  - _self_
use_vr: true
data_path: data
robot: {}
"""
ENV = """
_target_: calvin_env.envs.play_table_env.PlayTableSimEnv
_recursive_: false
robot_cfg: ${robot}
scene_cfg: ${scene}
cameras: ${cameras}
use_egl: true
use_vr: ${use_vr}
use_scene_info: false
"""
RULES = "_target_: calvin_env.envs.tasks.Tasks\ntasks:\n  open_drawer: [move, 1]\n  close_drawer: [move, -1]\n"
WORDS = '# sentences\nopen_drawer: ["open the drawer"]\nclose_drawer: ["close the drawer"]\n'


def write(root: Path) -> Path:
    """A clone in this folder."""
    env, models = root / "calvin_env", root / "calvin_models"
    files = {
        env / "calvin_env/__init__.py": "",
        env / "calvin_env/envs/__init__.py": "",
        env / "calvin_env/envs/play_table_env.py": TABLE,
        env / "calvin_env/envs/tasks.py": TASKS,
        env / "conf/config_data_collection.yaml": CONFIG,
        env / "conf/env/play_table_env.yaml": ENV,
        env / "conf/scene/calvin_scene_D_eval.yaml": "name: D\n",
        env / "conf/scene/other.yaml": "name: A\n",
        env / "conf/cameras/none.yaml": "{}\n",
        env / "conf/cameras/static_and_gripper.yaml": "static: {}\ngripper: {}\n",
        env / "data/calvin_table_D/urdf/calvin_table_D.urdf": "",
        models / "calvin_agent/evaluation/multistep_sequences.py": SEQUENCES,
        models / "conf/annotations/new_playtable_validation.yaml": WORDS,
        models / "conf/callbacks/rollout/tasks/new_playtable_tasks.yaml": RULES,
    }
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (root / ".git").mkdir()
    return root
