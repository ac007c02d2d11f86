"""A contact sheet of the ten WidowX tasks: what the policy sees when an episode starts and when it is solved.

    .venv/bin/python scripts/simpler_frames.py [docs/images/simpler_env.png]

Top: the first enumerated configuration. Bottom: the last frame before the expert has solved a training state.
"""

import sys
import warnings
from pathlib import Path

warnings.filterwarnings("ignore")

import numpy as np  # noqa: E402
from PIL import Image, ImageDraw  # noqa: E402

from rlvla_envs.base import FIRST_TRAINING_STATE, Demonstrator, SuiteConfig  # noqa: E402
from rlvla_envs.simpler_tasks import SUITE_TASKS  # noqa: E402
from rlvla_envs.suites import make_env  # noqa: E402

SIZE, GAP, CAPTION, COLUMNS = 160, 4, 14, 5


def pictures(suite: str, task: str) -> tuple[np.ndarray, np.ndarray]:
    world = make_env(SuiteConfig(name=suite, task=task, image_size=224, max_episode_steps=120), 1)
    assert isinstance(world, Demonstrator)
    camera = world.spec.cameras[0].name
    first = world.reset([0], [0]).images[camera][0]
    for state in range(FIRST_TRAINING_STATE, FIRST_TRAINING_STATE + 5):
        episode = world.demonstrate(state, seed=state)
        if episode.success:
            break
    world.close()
    return first, episode.images[camera][-1]


def main() -> None:
    path = Path(sys.argv[1] if len(sys.argv) > 1 else "docs/images/simpler_env.png")
    tasks = [(suite, task) for suite, known in SUITE_TASKS.items() for task in known]
    rows = -(-len(tasks) // COLUMNS)
    height = CAPTION + 2 * (SIZE + GAP)
    sheet = Image.new("RGB", (COLUMNS * (SIZE + GAP) - GAP, rows * height), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (suite, task) in enumerate(tasks):
        x, y = (i % COLUMNS) * (SIZE + GAP), (i // COLUMNS) * height
        draw.text((x, y + 1), task, fill="black")
        for j, picture in enumerate(pictures(suite, task)):
            small = Image.fromarray(picture).resize((SIZE, SIZE), Image.Resampling.LANCZOS)
            sheet.paste(small, (x, y + CAPTION + j * (SIZE + GAP)))
    path.parent.mkdir(parents=True, exist_ok=True)
    # A palette keeps the repository small; a median cut would drop the few saturated pixels that matter.
    sheet.quantize(256, method=Image.Quantize.FASTOCTREE).save(path, optimize=True)
    print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
