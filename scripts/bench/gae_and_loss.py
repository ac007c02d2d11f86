"""GAE over chunks and the PPO loss, against TorchRL's GAE and against the plainest policy gradient.

    .venv/bin/python scripts/bench/gae_and_loss.py [--episodes 256] [--decisions 20] [--rows 256] [--repeats 50]

The last line is JSON. All estimators must agree before anything is timed.
"""

import argparse
from typing import Any

import torch
from measuring import Report, in_turns, over, parser, print_json
from torchrl.objectives.value.functional import generalized_advantage_estimate as torchrl_gae
from torchrl.objectives.value.functional import vec_generalized_advantage_estimate as torchrl_vec_gae

from rlvla.acting import one_thread
from rlvla_algos.gae import generalized_advantage_estimate
from rlvla_algos.ppo import ppo_loss

SMOKE = ["--episodes", "4", "--decisions", "3", "--rows", "4", "--repeats", "2"]
GAMMA, LAMBDA = 0.99, 0.95


def arguments_of() -> argparse.ArgumentParser:
    asked = parser(__doc__ or "")
    asked.add_argument("--episodes", type=int, default=256, help="of a rollout")
    asked.add_argument("--decisions", type=int, default=20, help="of an episode")
    asked.add_argument("--rows", type=int, default=256, help="of a minibatch")
    asked.add_argument("--horizon", type=int, default=16, help="H of the padded action")
    asked.add_argument("--channels", type=int, default=7, help="K of the padded action")
    asked.add_argument("--repeats", type=int, default=50, help="after one that is not counted")
    return asked


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    report = Report(
        "gae_and_loss", "one rollout's advantages and one minibatch's loss, in turns; one thread", arguments
    )
    torch.manual_seed(0)
    shape = (arguments.episodes, arguments.decisions)
    reward, value, next_value = (torch.randn(shape) for _ in range(3))
    terminated = torch.rand(shape) < 0.05
    done = terminated | (torch.rand(shape) < 0.05)

    def ours() -> Any:
        return generalized_advantage_estimate(
            reward=reward,
            value=value,
            next_value=next_value,
            terminated=terminated,
            done=done,
            discount=torch.full(shape, GAMMA),
            gae_lambda=LAMBDA,
        )

    def theirs(estimate: Any) -> Any:
        given = (x[..., None] for x in (value, next_value, reward, done, terminated))
        return [x[..., 0] for x in estimate(GAMMA, LAMBDA, *given)]

    for other in (torchrl_gae, torchrl_vec_gae):
        for one, two in zip(ours(), theirs(other), strict=True):
            torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-4)

    rows = (arguments.rows, arguments.horizon, arguments.channels)
    log_prob, mask = torch.randn(rows, requires_grad=True), torch.rand(rows) < 0.9
    old, advantage = log_prob.detach() + 0.01 * torch.randn(rows), torch.randn(arguments.rows)
    new_value = torch.randn(arguments.rows, requires_grad=True)

    def loss() -> float:
        made = ppo_loss(
            log_prob=log_prob,
            old_log_prob=old,
            mask=mask,
            advantage=advantage,
            value=new_value,
            old_value=new_value.detach(),
            value_target=advantage,
            reduction="elementwise",
            clip_epsilon=0.2,
            value_clip=None,
            value_coef=0.5,
        )
        made.total.backward()
        return 1

    def plain() -> float:
        ratio = ((log_prob - old) * mask).exp()
        surrogate = -(ratio * advantage[:, None, None] * mask).sum() / mask.sum()
        (surrogate + 0.5 * (new_value - advantage).square().mean()).backward()
        return 1

    def once(work: Any) -> Any:
        return lambda: float(len(work()) > 0)

    loops = {
        "gae": once(ours),
        "torchrl": once(lambda: theirs(torchrl_gae)),
        "torchrl_vec": once(lambda: theirs(torchrl_vec_gae)),
        "loss": loss,
        "plain": plain,
    }
    with one_thread():
        turns = in_turns(loops, arguments.repeats)
    for name, label in (
        ("gae", f"GAE of {arguments.episodes} x {arguments.decisions} decisions"),
        ("torchrl", "TorchRL's loop over time"),
        ("torchrl_vec", "TorchRL's vectorised one"),
        ("loss", f"the PPO loss of {' x '.join(map(str, rows))}, forth and back"),
        ("plain", "ratio times advantage and squared error, nothing clipped, nothing measured"),
    ):
        report.row(label, "ms", [1e3 * turn.seconds for turn in turns[name]])
    report.claim("GAE, over TorchRL's loop", over(turns["gae"], turns["torchrl"]))
    report.claim("GAE, over TorchRL's vectorised one", over(turns["gae"], turns["torchrl_vec"]))
    report.claim("the PPO loss, over the plainest one", over(turns["loss"], turns["plain"]))
    return report.finish()


if __name__ == "__main__":
    print_json(measure(arguments_of().parse_args()))
