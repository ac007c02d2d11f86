"""Discrete-event model of an iteration of `rlvla train`: rollout on simulators and a device, then the update.

It follows rlvla/rollout.py round by round. What the model leaves out is listed in docs/benchmarks/scaling.md.

Axes: E episodes of a rank, T decisions of the longest one.
"""

import heapq
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import partial
from itertools import count

import numpy as np

Then = Callable[[], None]


class Schedule(Enum):
    sync = "sync"
    """All slots in one group; rollout and update take turns."""
    pingpong = "pingpong"
    """Two fixed groups of actors: while one group's chunk runs, the device infers for the other."""
    one_off = "async"
    """The rollout of iteration k + 1 runs while the update of iteration k does."""


class UpdateDevice(Enum):
    """Where the update runs, as the rollout sees it."""

    exclusive = "exclusive"
    """Where inference runs, and nothing else runs meanwhile: one process doing one thing at a time."""
    interleaved = "interleaved"
    """Where inference runs; minibatches and inference take turns. Differs from `exclusive` under async only."""
    own = "own"
    """On devices of its own."""


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What each thing costs, in seconds, on one core or one device."""

    step_s: float
    """One action in one environment."""
    render_s: float = 0.0
    """The observation at the end of a chunk."""
    reset_s: float = 0.0
    """Starting an episode, its first observation included."""
    spread: float = 0.0
    """Sigma of the lognormal factor, of mean 1, on the seconds of each chunk and each reset."""
    call_s: float = 0.0
    """One request to an actor and its reply."""
    inference_base_s: float
    """A block of inference, whatever its size."""
    inference_row_s: float = 0.0
    """Each row of a block, padding included."""
    record_s: float = 0.0
    """Driver's work per decision: storing and arranging."""
    train_s: float
    """Forward and backward of one decision in one epoch."""
    score_s: float = 0.0
    """Forward of one decision once an iteration: the final KL."""
    optimizer_s: float = 0.0
    """An optimizer step beside its decisions."""
    gradient_bytes: float = 0.0
    """What an all-reduce sums up, per rank."""
    local_bandwidth: float = math.inf
    """Bytes per second that a ring passes on inside a node."""
    network_bandwidth: float = math.inf
    """The same from node to node, all adapters of a node together."""
    gpus_per_node: int = 8
    hop_s: float = 0.0
    """Latency of each of the 2 (N - 1) steps of the ring."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            _require(value >= 0, name, value, "0 or more")
        _require(min(self.local_bandwidth, self.network_bandwidth) > 0, "a bandwidth", 0, "positive")
        _require(self.gpus_per_node >= 1, "gpus_per_node", self.gpus_per_node, "at least 1")

    def allreduce_s(self, ranks: int) -> float:
        """A ring over `ranks` devices: every byte leaves each device 2 (N - 1) / N times."""
        # Between nodes the ring still passes through them: the narrower part decides.
        bandwidth = min(self.local_bandwidth, self.network_bandwidth if ranks > self.gpus_per_node else math.inf)
        steps = 2 * (ranks - 1)
        return steps / ranks * self.gradient_bytes / bandwidth + steps * self.hop_s


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A machine and a configuration. `actors`, `cores` and the two after them are per acting rank."""

    schedule: Schedule = Schedule.sync
    ranks: int = 1
    """Devices that act. Rank r owns 1/N of the environments and the episodes."""
    learners: int | None = None
    """Devices of the update where it has its own; None: those that act."""
    update_device: UpdateDevice = UpdateDevice.exclusive
    inference_on_core: bool = False
    """No GPU: inference takes one of the simulators' cores."""
    update_on_cores: bool = False
    """No GPU: the update takes all of the simulators' cores, minibatch by minibatch, and waits for them as they do."""
    actors: int = 1
    envs_per_actor: int = 1
    cores: int = 1
    inference_batch: int = 16
    episodes: int = 1
    """Per iteration, over all ranks."""
    decisions: Sequence[int] = (1,)
    """Decisions of an episode: it takes one of these at random, each as likely."""
    chunk_steps: float = 8.0
    """Actions executed per decision, on average."""
    prompt_shares: Sequence[float] = (1.0,)
    """Share of the episodes with each length of context: a block holds one length only."""
    epochs: float = 4.0
    minibatch: int = 256
    """Decisions per optimizer step, over all ranks."""

    def __post_init__(self) -> None:
        for name in ("ranks", "actors", "envs_per_actor", "cores", "inference_batch", "episodes", "minibatch"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        _require(self.epochs >= 0, "epochs", self.epochs, "0 or more")
        _require(self.chunk_steps > 0, "chunk_steps", self.chunk_steps, "positive")
        _require(len(self.decisions) > 0 and min(self.decisions) >= 1, "decisions", list(self.decisions), "1 or more")
        _require(
            len(self.prompt_shares) > 0 and min(self.prompt_shares) >= 0 and sum(self.prompt_shares) > 0,
            "prompt_shares",
            list(self.prompt_shares),
            "0 or more, not all 0",
        )
        own = self.update_device is UpdateDevice.own
        _require(
            self.learners is None or (own and self.learners >= 1),
            "learners",
            self.learners,
            "at least 1 with update_device=own, else None",
        )
        _require(not (own and self.inference_on_core), "update_device", "own", "another where inference is on a core")
        _require(
            not self.update_on_cores or self.inference_on_core,
            "update_on_cores",
            True,
            "False where inference has a device: the update has it too",
        )
        _require(
            self.schedule is not Schedule.pingpong or self.actors >= 2,
            "actors",
            self.actors,
            "at least 2 with schedule=pingpong: a group is a set of actors",
        )

    @property
    def num_learners(self) -> int:
        return self.learners or self.ranks

    @property
    def devices(self) -> int:
        return self.ranks + (self.num_learners if self.update_device is UpdateDevice.own else 0)


@dataclass(frozen=True)
class Prediction:
    """Means over the iterations of a steady state."""

    iteration_s: float
    rollout_s: float
    """Until the last rank's last episode."""
    update_s: float
    env_steps: float
    device_busy: float
    """Inference and training, all devices, in [0, 1]. An all-reduce counts as waiting."""
    core_busy: float

    @property
    def steps_per_s(self) -> float:
        """Over rollout and update."""
        return self.env_steps / self.iteration_s


def simulate(plan: Plan, costs: Costs, *, iterations: int = 2, seed: int = 0) -> Prediction:
    """Play ``iterations`` iterations of the steady state.

    Every episode's length and every duration is drawn before its iteration begins, from a key: two plans that play the
    same episodes on as many ranks meet the same ones, whatever their schedule.
    """
    _require(iterations >= 1, "iterations", iterations, "at least 1")
    return _Training(plan, costs, iterations, seed).run()


class _Clock:
    def __init__(self) -> None:
        self.now = 0.0
        self._events: list[tuple[float, int, Then]] = []
        # Events of one moment happen in the order they were made; callables cannot be compared.
        self._order = count()

    def after(self, seconds: float, then: Then) -> None:
        heapq.heappush(self._events, (self.now + seconds, next(self._order), then))

    def run(self) -> None:
        while self._events:
            self.now, _, then = heapq.heappop(self._events)
            then()


class _Servers:
    """Equal servers with one queue: first come, first served, to the end. Cores, or a device."""

    def __init__(self, clock: _Clock, number: int) -> None:
        self.busy_s = 0.0
        self._clock, self._free = clock, number
        self._queue: deque[tuple[float, Then]] = deque()

    def serve(self, seconds: float, then: Then) -> None:
        self._queue.append((seconds, then))
        self._start()

    def _start(self) -> None:
        while self._free and self._queue:
            seconds, then = self._queue.popleft()
            self._free -= 1
            self.busy_s += seconds
            self._clock.after(seconds, partial(self._end, then))

    def _end(self, then: Then) -> None:
        self._free += 1
        self._start()
        then()


@dataclass(frozen=True)
class Episodes:
    """What a rank's rollout will meet."""

    decisions: np.ndarray
    """[E]"""
    prompt: np.ndarray
    """[E] which length of context"""
    reset_s: np.ndarray
    """[E]"""
    chunk_s: np.ndarray
    """[E, T]"""

    @classmethod
    def draw(cls, plan: Plan, costs: Costs, number: int, rng: np.random.Generator) -> "Episodes":
        decisions = rng.choice(np.asarray(plan.decisions, dtype=np.int64), number)
        shares = np.asarray(plan.prompt_shares, dtype=np.float64)
        prompt = rng.choice(len(shares), number, p=shares / shares.sum())
        mean = -(costs.spread**2) / 2
        reset = costs.reset_s * rng.lognormal(mean, costs.spread, number)
        chunk = costs.render_s + plan.chunk_steps * costs.step_s
        factors = rng.lognormal(mean, costs.spread, (number, int(max(plan.decisions))))
        return cls(decisions, prompt, reset, chunk * factors)


class _Rollout:
    """One rank's rollout: the driver's turns over its groups, as in `rlvla.rollout.play`.

    The driver is one thread. It takes the groups in a fixed order and waits for each, so what is batched with what does
    not depend on timing.
    """

    def __init__(
        self, clock: _Clock, plan: Plan, costs: Costs, cores: _Servers, device: _Servers, todo: Episodes, done: Then
    ) -> None:
        self._clock, self._plan, self._costs = clock, plan, costs
        self._cores, self._device, self._todo, self._done = cores, device, todo, done
        self._block_s = costs.inference_base_s + plan.inference_batch * costs.inference_row_s
        self._actor_of = np.repeat(np.arange(plan.actors), plan.envs_per_actor)
        self._episode = np.full(len(self._actor_of), -1)
        """[slots] -1 when free"""
        self._decision = np.zeros(len(self._actor_of), dtype=np.int64)
        self._next = 0
        groups = 2 if plan.schedule is Schedule.pingpong else 1
        self._groups = [np.flatnonzero(self._actor_of * groups // plan.actors == group) for group in range(groups)]
        self._running = [0] * groups
        """Actors that have not replied yet."""
        self._turn = 0
        self._driver_waits = False
        self._take_turn()

    def _take_turn(self) -> None:
        """Infer for the group whose turn it is and send it off; or wait for it; or end."""
        todo, group = self._todo, self._turn
        if self._running[group]:
            self._driver_waits = True
            return
        slots = self._groups[group]
        waiting = slots[self._episode[slots] >= 0]
        free = slots[self._episode[slots] < 0][: len(todo.decisions) - self._next]
        if not len(waiting) and not len(free):
            if not any(self._running) and not (self._episode >= 0).any():
                self._clock.after(int(todo.decisions.sum()) * self._costs.record_s, self._done)
                return
            self._pass_turn()
            return
        episodes = np.arange(self._next, self._next + len(free))
        self._next += len(free)
        prompts = np.bincount(todo.prompt[self._episode[waiting]])
        blocks = int((-(-prompts // self._plan.inference_batch)).sum())
        send = partial(self._send, group, waiting, free, episodes)
        if blocks:
            where = self._cores if self._plan.inference_on_core else self._device
            where.serve(blocks * self._block_s, send)
        else:
            send()

    def _send(self, group: int, waiting: np.ndarray, free: np.ndarray, episodes: np.ndarray) -> None:
        """Restarts and chunks of a round, each actor's one after another."""
        todo = self._todo
        seconds = np.zeros(self._plan.actors)
        np.add.at(seconds, self._actor_of[free], todo.reset_s[episodes])
        playing, at = self._episode[waiting], self._decision[waiting]
        np.add.at(seconds, self._actor_of[waiting], todo.chunk_s[playing, at])
        # Nobody looks at a slot of a group that is running, so it may already be what it will be.
        over = at + 1 == todo.decisions[playing]
        self._decision[waiting] = at + 1
        self._episode[waiting[over]] = -1
        self._episode[free], self._decision[free] = episodes, 0
        actors = np.unique(self._actor_of[np.concatenate([waiting, free])])
        self._running[group] = len(actors)
        for actor in actors:
            self._cores.serve(float(seconds[actor]) + self._costs.call_s, partial(self._reply, group))
        self._pass_turn()

    def _reply(self, group: int) -> None:
        self._running[group] -= 1
        if self._driver_waits and group == self._turn and not self._running[group]:
            self._driver_waits = False
            self._take_turn()

    def _pass_turn(self) -> None:
        self._turn = (self._turn + 1) % len(self._groups)
        self._take_turn()


class _Training:
    """Iterations of all ranks. Rollouts of one iteration end together, and every optimizer step too."""

    def __init__(self, plan: Plan, costs: Costs, iterations: int, seed: int) -> None:
        self._plan, self._costs, self._iterations, self._seed = plan, costs, iterations, seed
        self._clock = clock = _Clock()
        self._cores = [_Servers(clock, plan.cores) for _ in range(plan.ranks)]
        self._devices = [_Servers(clock, 1) for _ in range(plan.ranks)]
        self._learners = self._devices
        if plan.update_device is UpdateDevice.own:
            self._learners = [_Servers(clock, 1) for _ in range(plan.num_learners)]
        self._rollout_s: list[float] = []
        self._update_s: list[float] = []
        self._decisions: list[int] = []
        self._begun_at = 0.0
        self._busy_before = (0.0, 0.0)
        self._under_way = 0

    def run(self) -> Prediction:
        plan, n = self._plan, self._iterations
        if plan.schedule is Schedule.one_off and plan.update_device is not UpdateDevice.exclusive:
            # The first rollout has no update beside it: not a steady state yet. It is also the last one, so that the
            # steady state has the rollouts and the updates that it has under the other schedules.
            self._roll_out(n - 1, partial(self._overlapping, 0))
        else:
            self._alternating(0)
        self._clock.run()
        seconds = self._clock.now - self._begun_at
        device_s, core_s = (now - before for now, before in zip(self._busy(), self._busy_before, strict=True))
        return Prediction(
            iteration_s=seconds / n,
            rollout_s=float(np.mean(self._rollout_s[-n:])),
            update_s=float(np.mean(self._update_s)),
            env_steps=float(np.mean(self._decisions[-n:])) * plan.chunk_steps,
            device_busy=device_s / seconds / plan.devices if seconds else 0.0,
            core_busy=core_s / seconds / (plan.ranks * plan.cores) if seconds else 0.0,
        )

    def _alternating(self, iteration: int) -> None:
        if iteration < self._iterations:
            self._roll_out(
                iteration, lambda: self._update(self._decisions[iteration], partial(self._alternating, iteration + 1))
            )

    def _overlapping(self, iteration: int) -> None:
        """A rollout is over: update on it beside the next one."""
        if iteration == 0:
            self._begun_at, self._busy_before = self._clock.now, self._busy()
        if iteration == self._iterations:
            return
        self._under_way = 2

        def one_of_two() -> None:
            self._under_way -= 1
            if not self._under_way:
                self._overlapping(iteration + 1)

        self._update(self._decisions[iteration], one_of_two)
        self._roll_out(iteration, one_of_two)

    def _roll_out(self, iteration: int, then: Then) -> None:
        plan, begun = self._plan, self._clock.now
        shares = np.diff(np.linspace(0, plan.episodes, plan.ranks + 1).astype(int))
        drawn = [
            Episodes.draw(plan, self._costs, int(share), np.random.default_rng((self._seed, iteration, rank)))
            for rank, share in enumerate(shares)
        ]
        self._decisions.append(sum(int(episodes.decisions.sum()) for episodes in drawn))

        def all_ended() -> None:
            self._rollout_s.append(self._clock.now - begun)
            then()

        ended = _barrier(plan.ranks, all_ended)
        for cores, device, episodes in zip(self._cores, self._devices, drawn, strict=True):
            _Rollout(self._clock, plan, self._costs, cores, device, episodes, ended)

    def _update(self, decisions: int, then: Then) -> None:
        """Epochs of minibatches in equal parts, as `rlvla.learner` makes them, then the KL of everything."""
        plan, costs, begun, learners = self._plan, self._costs, self._clock.now, len(self._learners)
        per_epoch = max(1, round(decisions / plan.minibatch))
        # A measured number of epochs is a mean, and need not be whole.
        steps = max(0, round(plan.epochs * per_epoch))
        # Equal shares, be they less than a decision: more ranks than rows in a minibatch is nothing to plan for.
        work = plan.epochs * decisions / learners * costs.train_s / max(1, steps) + costs.optimizer_s

        def reduced(step: int) -> None:
            if step < steps:
                self._on_every_learner(
                    work, lambda: self._clock.after(costs.allreduce_s(learners), partial(reduced, step + 1))
                )
            else:
                self._on_every_learner(decisions / learners * costs.score_s, ended)

        def ended() -> None:
            self._update_s.append(self._clock.now - begun)
            then()

        reduced(0)

    def _on_every_learner(self, seconds: float, then: Then) -> None:
        # Threads of one minibatch, on every core of every rank.
        workers = self._cores * self._plan.cores if self._plan.update_on_cores else self._learners
        served = _barrier(len(workers), then)
        for worker in workers:
            worker.serve(seconds, served)

    def _busy(self) -> tuple[float, float]:
        """Seconds of all devices and of all cores."""
        devices = self._devices + (self._learners if self._learners is not self._devices else [])
        return sum(d.busy_s for d in devices), sum(c.busy_s for c in self._cores)


def _barrier(number: int, then: Then) -> Then:
    """A callable that calls ``then`` the ``number``-th time."""
    left = number

    def arrive() -> None:
        nonlocal left
        left -= 1
        if not left:
            then()

    return arrive


def _require(condition: bool, key: str, value: object, must: str) -> None:
    if not condition:
        raise ValueError(f"{key} is {value}; it must be {must}.")
