"""Simulators in Ray actors, and what is done when one of them dies or hangs."""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from rlvla.cluster import connect, disconnect
from rlvla.config import ClusterConfig, WorkersConfig
from rlvla.hosts import (
    Arrays,
    Pictures,
    SimulatorHost,
    unpack_demonstration,
    unpack_observation,
    unpack_result,
)
from rlvla.recovery import Deadlines, HostGoneError, Incident, Played, Restarts
from rlvla.sheets import Sheet, Sheets, put
from rlvla.workers import Finish, Reply, Round
from rlvla_envs.base import ChunkResult, Demonstration, EnvSpec, Observation, SuiteConfig

NOWHERE = Sheet(-1, {}, np.zeros(0, dtype=np.uint8))
START_ATTEMPTS = 3
SPARE_ANSWERS_S = 5.0
"""Longest that an idle spare may take to say that it lives."""


@dataclass(frozen=True)
class _Share:
    """One worker's part of a round: rows of the round."""

    worker: int
    restart_rows: np.ndarray
    chunk_rows: np.ndarray

    @property
    def work(self) -> int:
        return len(self.restart_rows) + len(self.chunk_rows)


@dataclass(frozen=True)
class _Call:
    reply: Any
    worker: int
    work: int
    doing: str
    started: float
    deadline_s: float


@dataclass
class _Parts:
    """Rows that have come in, in any order. Their pictures are on the sheet, restarts behind chunks."""

    sheet: Sheet
    chunks: int
    """How many the round runs."""
    first: list[tuple[np.ndarray, Observation]] = field(default_factory=list)
    result: list[tuple[np.ndarray, ChunkResult]] = field(default_factory=list)
    lost: dict[int, bool] = field(default_factory=dict)
    seconds: list[np.ndarray] = field(default_factory=list)
    """What each worker said of its `rlvla.hosts.Stopwatch`."""

    def add_first(self, rows: np.ndarray, seen: Observation) -> None:
        self.first.append((rows, self._told(self.chunks + rows, seen)))

    def add_result(self, rows: np.ndarray, result: ChunkResult) -> None:
        self.result.append((rows, replace(result, observation=self._told(rows, result.observation))))

    def move_to(self, sheet: Sheet) -> None:
        """Have all pictures on another sheet."""
        for rows in [*(self.chunks + rows for rows, _ in self.first), *(rows for rows, _ in self.result)]:
            for name, image in sheet.images.items():
                image[rows] = self.sheet.images[name][rows]
        self.sheet = sheet

    def _told(self, rows: np.ndarray, seen: Observation) -> Observation:
        """All but the pictures. Those that were not written where they belong came with the reply."""
        if seen.images:
            put(self.sheet.images, rows, seen)
        return Observation({}, seen.instruction, seen.state)


class RayEnvs:
    """Slots spread over Ray actors; slot s lives in actor s // envs_per_actor.

    Ray never restarts an actor or repeats a call for us: a repeated call would step a fresh simulator and
    return wrong results without an error. A simulator that died or missed its deadline is replaced here and its
    episodes are replayed (`rlvla.recovery`).

    With ``spare`` one more actor builds its simulators while the others work, and then waits to take the place of one
    that is lost; the next spare is built behind it. It reserves no CPU, holds no slot and is nobody's restart.
    """

    host_class: type[SimulatorHost] = SimulatorHost

    def __init__(
        self,
        suite: SuiteConfig,
        workers: WorkersConfig,
        cluster: ClusterConfig,
        num_actors: int,
        *,
        spare: bool = False,
    ) -> None:
        self._suite, self._workers = suite, workers
        self._per_actor = self.slots_per_worker = workers.envs_per_actor
        self._label = f"{suite.name} {suite.task}"
        self._ray = connect(cluster, num_actors)
        # Embedded, the machine is ours and has as many cores as it has; on a cluster Ray is to place them.
        self._cpus = 0 if cluster.address is None else 1
        self._deadlines = Deadlines(workers.timeout_s)
        self._restarts = Restarts(workers.max_restarts_per_hour, workers.quarantine_after)
        self._played: dict[int, Played] = {}
        self._incidents: list[Incident] = []
        self._actors: list[Any] = []
        self._keeps_spare = spare
        self._spare: tuple[Any, _Call] | None = None
        """An actor, and the call that builds its simulators."""
        self._sheets = Sheets((), 0)
        try:
            self._check_room(num_actors)
            specs = self._start_all(num_actors)
        except HostGoneError as why:
            self.close()
            raise RuntimeError(f"a simulator actor ({self._label}) {why}, {START_ATTEMPTS} times in a row.") from None
        except BaseException:
            self.close()
            raise
        self._announced = specs[0]
        self.group_size, self.versions = int(specs[0]["group_size"]), str(specs[0]["versions"])
        self.spec = EnvSpec.from_dict({k: v for k, v in specs[0].items() if k not in ("group_size", "versions")})
        self.num_slots = num_actors * self._per_actor
        self._sheets = Sheets(self.spec.cameras, self.num_slots)
        self._order_spare()

    # --- rounds

    def advance(self, todo: Round) -> Reply:
        return self.begin(todo)()

    def begin(self, todo: Round) -> Finish:
        refused = np.array([self._restarts.quarantined(state) for state in todo.restart_states.tolist()], dtype=bool)
        shares = [share for share in self._shares(todo, refused) if share.work]
        sheet = self._sheets.take(len(todo.chunk_slots) + len(todo.restart_slots))
        calls = [self._advance(todo, share, sheet) for share in shares]

        def finish() -> Reply:
            parts = _Parts(sheet, len(todo.chunk_slots), lost={int(slot): True for slot in todo.restart_slots[refused]})
            gone: list[tuple[_Share, str]] = []
            for share, call in zip(shares, calls, strict=True):
                try:
                    self._take(parts, share, self._answer(call))
                except HostGoneError as why:
                    gone.append((share, str(why)))
            if gone:
                # Whoever did not answer may not be dead yet, and draw once more.
                parts.move_to(self._sheets.take(sheet.rows))
                self._sheets.abandon(sheet)
            # After the others: their work is done and must not wait in the object store behind a death.
            for share, reason in gone:
                self._recover(parts, todo, share, reason)
            self._sheets.settle(parts.sheet)
            return self._reply(parts, todo)

        return finish

    def _shares(self, todo: Round, refused: np.ndarray) -> Iterator[_Share]:
        for worker in range(len(self._actors)):
            restarts = (todo.restart_slots // self._per_actor == worker) & ~refused
            chunks = todo.chunk_slots // self._per_actor == worker
            yield _Share(worker, np.flatnonzero(restarts), np.flatnonzero(chunks))

    def _request(self, todo: Round, share: _Share) -> Arrays:
        base = share.worker * self._per_actor
        return {
            "restart_slots": todo.restart_slots[share.restart_rows] - base,
            "restart_states": todo.restart_states[share.restart_rows],
            "chunk_slots": todo.chunk_slots[share.chunk_rows] - base,
            "chunk_actions": todo.chunk_actions[share.chunk_rows],
        }

    def _advance(self, todo: Round, share: _Share, sheet: Sheet) -> _Call:
        address, restart_rows = self._sheets.address, len(todo.chunk_slots) + share.restart_rows
        pictures = address and Pictures(address, sheet.number, sheet.rows, restart_rows, share.chunk_rows)
        request = self._request(todo, share)
        return self._call(share.worker, "advance", request, pictures, work=share.work, doing="running a chunk")

    @staticmethod
    def _take(parts: _Parts, share: _Share, arrays: Arrays) -> None:
        parts.seconds.append(arrays["seconds"])
        if len(share.restart_rows):
            parts.add_first(share.restart_rows, unpack_observation(arrays, "restart/"))
        if len(share.chunk_rows):
            parts.add_result(share.chunk_rows, unpack_result(arrays, "chunk/"))

    def _reply(self, parts: _Parts, todo: Round) -> Reply:
        """Rows in the order asked; from here on they count as played."""
        first = result = None
        if parts.first:
            rows = np.concatenate([rows for rows, _ in parts.first])
            told = Observation.concatenate([part for _, part in parts.first]).take(np.argsort(rows))
            first = _seen(parts.sheet, parts.chunks + np.sort(rows), told)
        if parts.result:
            rows = np.concatenate([rows for rows, _ in parts.result])
            result = ChunkResult.concatenate([part for _, part in parts.result]).take(np.argsort(rows))
            result = replace(result, observation=_seen(parts.sheet, np.sort(rows), result.observation))
        for slot, state in zip(todo.restart_slots.tolist(), todo.restart_states.tolist(), strict=True):
            self._played[slot] = Played(state)
        kept = [row for row, slot in enumerate(todo.chunk_slots.tolist()) if slot not in parts.lost]
        for place, row in enumerate(kept):
            slot = int(todo.chunk_slots[row])
            assert result is not None
            if result.done[place]:
                del self._played[slot]
            else:
                self._played[slot].chunks.append(todo.chunk_actions[row])
        for slot in parts.lost:
            self._played.pop(slot, None)
        busy, render = np.sum(parts.seconds, axis=0).tolist() if parts.seconds else (0.0, 0.0)
        return Reply(first, result, parts.lost, busy, render)

    # --- recovery

    def _recover(self, parts: _Parts, todo: Round, share: _Share, why: str) -> None:
        """Replace a worker, bring its episodes to where they were and do what it was asked to do."""
        noticed = time.monotonic()
        base = share.worker * self._per_actor
        pending = {int(todo.chunk_slots[row]): row for row in share.chunk_rows}
        begun = {int(todo.restart_slots[row]): row for row in share.restart_rows}
        wanted = {slot: Played(int(todo.restart_states[row])) for slot, row in begun.items()}
        for slot in range(base, base + self._per_actor):
            if slot in self._played and slot not in begun:
                chunks = [*self._played[slot].chunks, *([todo.chunk_actions[pending[slot]]] if slot in pending else [])]
                wanted[slot] = Played(self._played[slot].state, chunks)
        replayable = self.spec.deterministic and self.group_size == 1
        while True:
            self._restarts.count(why)
            lost = {slot: True for slot, played in wanted.items() if self._restarts.quarantined(played.state)}
            if not replayable:
                lost |= {slot: False for slot in wanted if slot not in begun and slot not in lost}
            made = _Parts(parts.sheet, parts.chunks)
            try:
                self._replace(share.worker)
                if replayable:
                    playable = {slot: played for slot, played in wanted.items() if slot not in lost}
                    self._replay(made, share.worker, playable, begun, pending)
                else:
                    self._restart(made, share, todo, lost)
                break
            except HostGoneError as again:
                why = str(again)
        parts.first += made.first
        parts.result += made.result
        parts.lost.update(lost)
        for slot in lost:
            self._played.pop(slot, None)
        self._incidents.append(
            Incident(
                worker=share.worker,
                why=why,
                recovery_s=time.monotonic() - noticed,
                replayed_chunks=sum(len(played.chunks) for slot, played in wanted.items() if slot not in lost),
                lost_episodes=len(lost),
                quarantined=tuple(sorted({wanted[slot].state for slot, blamed in lost.items() if blamed})),
            )
        )
        # Now that nobody waits for the cores.
        self._order_spare()

    def _replay(
        self, made: _Parts, worker: int, wanted: dict[int, Played], begun: dict[int, int], pending: dict[int, int]
    ) -> None:
        """One slot after the other, so that a death has one name. Rows are those of restarts and of pending chunks."""
        for slot, played in wanted.items():
            arguments = (slot - worker * self._per_actor, played.state, played.chunks)
            call = self._call(worker, "replay", *arguments, work=1 + len(played.chunks), doing="replaying an episode")
            try:
                reply = self._answer(call)
            except HostGoneError:
                self._restarts.blame(played.state)
                raise
            if slot in begun:
                made.add_first(np.array([begun[slot]]), unpack_observation(reply, "restart/"))
            elif slot in pending:
                made.add_result(np.array([pending[slot]]), unpack_result(reply, "chunk/"))

    def _restart(self, made: _Parts, share: _Share, todo: Round, lost: dict[int, bool]) -> None:
        """Where episodes cannot be replayed: the restarts alone."""
        rows = np.array([row for row in share.restart_rows if int(todo.restart_slots[row]) not in lost], dtype=np.int64)
        if len(rows):
            alone = _Share(share.worker, rows, np.zeros(0, dtype=np.int64))
            request = self._request(todo, alone)
            call = self._call(share.worker, "advance", request, work=len(rows), doing="restarting episodes")
            try:
                self._take(made, alone, self._answer(call))
            except HostGoneError:
                for state in todo.restart_states[rows].tolist():
                    self._restarts.blame(state)
                raise

    def _replace(self, worker: int) -> None:
        """Another actor in the place of one that is gone: the spare if there is one, else a fresh one."""
        with suppress(Exception):
            self._ray.kill(self._actors[worker])
        announced = self._take_spare(worker) or self._start_another(worker)
        if announced != self._announced:
            raise RuntimeError(
                f"simulator {worker} came back as another one: it announces {announced} and announced "
                f"{self._announced} before. Were files of the suite changed while the run was going?"
            )

    def _start_another(self, worker: int) -> dict[str, Any]:
        """A node's death is noticed late: the first ones that Ray puts there die too, so this goes on until
        ``start_timeout_s``."""
        until = time.monotonic() + self._workers.start_timeout_s
        pause = 0.1
        while True:
            self._actors[worker] = self._create(self._cpus)
            try:
                return self._start([worker])[0]
            except HostGoneError as error:
                with suppress(Exception):
                    self._ray.kill(self._actors[worker])
                if time.monotonic() + pause > until:
                    raise RuntimeError(f"simulator {worker} ({self._label}) cannot be replaced: {error}.") from error
                time.sleep(pause)
                pause *= 2

    # --- the spare

    def _order_spare(self) -> None:
        """Have a spare built, without waiting for it.

        At normal priority: threads that a renderer starts keep the nice value of the thread that started them, and only
        root could take it back when the spare has become one of those that everybody waits for.
        """
        if self._keeps_spare and self._spare is None:
            actor = self._create(cpus=0)
            limit = self._workers.start_timeout_s
            self._spare = (actor, _Call(actor.spec.remote(), -1, 0, "starting", time.monotonic(), limit))

    def _take_spare(self, worker: int) -> dict[str, Any] | None:
        """Put the spare in a worker's place; what it announces, or None where there is no spare that answers."""
        if self._spare is None:
            return None
        (actor, building), self._spare = self._spare, None
        try:
            announced: dict[str, Any] = self._answer(building)
            # It may have died or hung since it was built, and an episode would be blamed for that.
            self._answer(_Call(actor.ready.remote(), worker, 0, "waiting", time.monotonic(), SPARE_ANSWERS_S))
        except Exception:
            # If there is a reason, a fresh one will have it too and is asked in earnest.
            with suppress(Exception):
                self._ray.kill(actor)
            return None
        self._actors[worker] = actor
        return announced

    def wait_for_spare(self, timeout_s: float) -> bool:
        """Whether there is a spare whose simulators are built, at the latest after so long. For measurements."""
        if self._spare is None:
            return False
        built, _ = self._ray.wait([self._spare[1].reply], timeout=timeout_s)
        return bool(built)

    # --- what happened

    def take_incidents(self) -> list[Incident]:
        incidents, self._incidents = self._incidents, []
        return incidents

    # --- other calls

    def demonstrate(self, states: Sequence[int], seeds: Sequence[int]) -> list[Demonstration]:
        asked = list(zip(states, seeds, strict=True))
        # One at a time in each actor, so that a deadline is that of one demonstration.
        found: list[Demonstration] = []
        for start in range(0, len(asked), len(self._actors)):
            wave = asked[start : start + len(self._actors)]
            calls = [self._demonstration(worker, *one) for worker, one in enumerate(wave)]
            for worker, (one, call) in enumerate(zip(wave, calls, strict=True)):
                found.append(unpack_demonstration(self._persist(worker, call, self._demonstration, *one)))
        return found

    def _demonstration(self, worker: int, state: int, seed: int) -> _Call:
        # As long as any call may take: an expert's episode has no size that is known before.
        call = self._call(worker, "demonstrate", state, seed, work=0, doing=f"demonstrating state {state}")
        return _Call(call.reply, worker, 0, call.doing, call.started, self._workers.timeout_s)

    def film(self, slot: int) -> np.ndarray | None:
        worker = slot // self._per_actor

        def ask(worker: int) -> _Call:
            return self._call(worker, "film", slot % self._per_actor, work=1, doing="filming")

        running = slot in self._played
        frame: np.ndarray | None = self._persist(worker, ask(worker), ask)
        return frame if not running or slot in self._played else None

    def _persist(self, worker: int, call: _Call, again: Callable[..., _Call], *arguments: int) -> Any:
        """The answer of a call that changes nothing which its simulator's replacement would not have."""
        nothing = np.zeros(0, dtype=np.int64)
        for _ in range(self._workers.quarantine_after):
            try:
                return self._answer(call)
            except HostGoneError as why:
                todo = Round(nothing, nothing, nothing, np.zeros((0, 1, 1), dtype=np.float32))
                self._recover(_Parts(NOWHERE, 0), todo, _Share(worker, nothing, nothing), str(why))
                call = again(worker, *arguments)
        try:
            return self._answer(call)
        except HostGoneError as why:
            raise RuntimeError(
                f"simulator {worker} ({self._label}) {why}, {self._workers.quarantine_after + 1} times in a row."
            ) from why

    def close(self) -> None:
        for actor in [*self._actors, *([self._spare[0]] if self._spare else [])]:
            with suppress(Exception):
                self._ray.kill(actor)
        self._actors, self._spare = [], None
        self._sheets.close()
        disconnect(self._ray)

    # --- actors and calls

    def _create(self, cpus: int) -> Any:
        options = {"num_cpus": cpus, "max_restarts": 0, "max_task_retries": 0, "scheduling_strategy": "SPREAD"}
        host = self._ray.remote(**options)(self.host_class)
        return host.remote(self._suite, self._per_actor)

    def _check_room(self, num_actors: int) -> None:
        """Ray waits for ever for what a cluster will never have."""
        there = self._ray.cluster_resources().get("CPU", 0)
        if num_actors * self._cpus > there:
            raise RuntimeError(
                f"{num_actors} simulator actors need a CPU each and the cluster has {there:g}. Set "
                f"workers.num_actors={int(there)} or add nodes (ray start --address=...)."
            )

    def _start_all(self, num_actors: int) -> list[dict[str, Any]]:
        """One that dies while starting may have been killed by anybody; one that always does has a reason."""
        for attempt in range(START_ATTEMPTS):
            self._actors = [self._create(self._cpus) for _ in range(num_actors)]
            try:
                return self._start(range(num_actors))
            except HostGoneError as why:
                if attempt + 1 == START_ATTEMPTS:
                    raise
                self._restarts.count(str(why))
                for actor in self._actors:
                    self._ray.kill(actor)
        raise AssertionError("unreachable")

    def _start(self, workers: Sequence[int]) -> list[dict[str, Any]]:
        """Build the simulators of some actors side by side; what each announces."""
        limit = self._workers.start_timeout_s
        started = time.monotonic()
        waiting = [self._actors[worker].ready.remote() for worker in workers]
        placed, _ = self._ray.wait(waiting, num_returns=len(waiting), timeout=limit)
        if len(placed) < len(waiting):
            free, there = (
                {k: v for k, v in have().items() if k in ("CPU", "GPU", "memory")}
                for have in (self._ray.available_resources, self._ray.cluster_resources)
            )
            raise RuntimeError(
                f"{len(waiting) - len(placed)} of {len(waiting)} simulator actors found no place within {limit:g} s. "
                f"Each asks for {self._cpus} CPU; of {there} there is {free} free. Stop other jobs, lower "
                "workers.num_actors or raise workers.start_timeout_s."
            )
        calls = [_Call(self._actors[worker].spec.remote(), worker, 0, "starting", started, limit) for worker in workers]
        return [self._answer(call) for call in calls]

    def _call(self, worker: int, method: str, *arguments: Any, work: int, doing: str) -> _Call:
        reply = getattr(self._actors[worker], method).remote(*arguments)
        return _Call(reply, worker, work, doing, time.monotonic(), self._deadlines.of(work))

    def _answer(self, call: _Call) -> Any:
        """A call's answer.

        Raises:
            HostGoneError: the actor died, or missed the deadline, which counts from when it was asked.
            Exception: the simulator's own, as itself.
        """
        exceptions = self._ray.exceptions
        left = call.deadline_s - (time.monotonic() - call.started)
        try:
            # The answer may have come while the policy was thinking, and still be on its way from another machine.
            answer = self._ray.get(call.reply, timeout=max(1.0, left))
        except exceptions.RayTaskError as error:
            cause = error.cause if isinstance(error.cause, Exception) else error
            raise cause from None
        except exceptions.GetTimeoutError:
            raise HostGoneError(
                f"did not answer within {call.deadline_s:.3g} s while {call.doing} ({os.cpu_count()} cores for "
                f"{len(self._actors)} actors; workers.timeout_s is {self._workers.timeout_s:g})"
            ) from None
        except exceptions.RayActorError as error:
            raise HostGoneError(f"died while {call.doing}: {_cause(error)}") from None
        if call.work:
            self._deadlines.took(time.monotonic() - call.started, call.work)
        return answer


def _seen(sheet: Sheet, rows: np.ndarray, told: Observation) -> Observation:
    """What was told, with its pictures: in the memory they were written to, unless rows between them were lost."""
    together = rows[-1] + 1 - rows[0] == len(rows)
    return Observation(sheet.part(slice(rows[0], rows[-1] + 1) if together else rows), told.instruction, told.state)


def _cause(error: Exception) -> str:
    """Ray says a lot around one useful sentence, and guesses at causes that nobody asked for."""
    text = str(error).partition("Some common causes")[0]
    _, found, detail = text.partition("Worker exit detail:")
    lines = [line.strip() for line in (detail if found else text).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[-1]
