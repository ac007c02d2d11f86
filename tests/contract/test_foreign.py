"""A world in another interpreter: the same episodes, and no harm from a peer that does not keep to the protocol."""

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rlvla.workers import LocalEnvs
from rlvla_envs.base import FIRST_TRAINING_STATE, Demonstrator, Filmable, Grouped, SuiteConfig, VecEnv
from rlvla_envs.foreign import ForeignEnv
from rlvla_envs.suites import make_env

ENVS = Path(__file__).resolve().parents[2] / "envs"
TOY = SuiteConfig(name="toy", image_size=16, chunk_size=4, max_episode_steps=12)
HERE = replace(TOY, python=sys.executable)

Interpreter = Callable[[str], str]


@pytest.fixture
def opened() -> Iterator[list[ForeignEnv]]:
    """Worlds that the test opened; closed after it."""
    worlds: list[ForeignEnv] = []
    yield worlds
    for world in worlds:
        world.close()


@pytest.fixture
def interpreter(tmp_path: Path) -> Interpreter:
    """A program that is started like a Python and runs this code instead; `descriptor` is its end of the wire.

    What is printed into the file `pids` is a process that must not outlive the world.
    """

    def make(code: str) -> str:
        start = f"""
            import json, os, signal, socket, struct, subprocess, sys, time
            sys.path.insert(0, {str(ENVS)!r})
            descriptor = int(sys.argv[-1])
            pids = open({str(tmp_path / "pids")!r}, "a", buffering=1)
            print(os.getpid(), file=pids)
            """
        (tmp_path / "peer.py").write_text(textwrap.dedent(start) + textwrap.dedent(code))
        program = tmp_path / "python"
        program.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{tmp_path}/peer.py" "$@"\n')
        program.chmod(0o755)
        return str(program)

    return make


def started_by(program: str) -> list[int]:
    return [int(line) for line in (Path(program).parent / "pids").read_text().split()]


def is_gone(pid: int) -> bool:
    """Whether a process ended, or ends within a generous while. A zombie is gone: its parent has only not asked yet."""
    for _ in range(600):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


def assert_equal_episodes(one: VecEnv, other: VecEnv) -> None:
    """Two episodes with random actions beside each other, to the bit."""
    rng = np.random.default_rng(0)
    pairs = [[world.reset([1, 0], [5, FIRST_TRAINING_STATE]) for world in (one, other)]]
    for _ in range(3):
        actions = rng.uniform(-1.5, 1.5, (2, 4, 2)).astype(np.float32)
        results = [world.step_chunk([1, 0], actions) for world in (one, other)]
        pairs.append([result.observation for result in results])
        for name in ("reward", "terminated", "truncated", "success", "executed_steps"):
            a, b = (getattr(result, name) for result in results)
            assert (a.dtype, a.tolist()) == (b.dtype, b.tolist()), name
        assert results[0].metrics == results[1].metrics == {}
        if results[0].done.any():
            break
    for a, b in pairs:
        assert a.images.keys() == b.images.keys()
        assert all(np.array_equal(a.images[name], b.images[name]) for name in a.images)
        assert a.instruction == b.instruction
        assert a.state is not None
        assert b.state is not None
        assert (a.state.dtype, a.state.tobytes()) == (b.state.dtype, b.state.tobytes())


# --- the same world


def test_the_toy_in_another_process_plays_the_same_episodes(opened: list[ForeignEnv]) -> None:
    abroad, here = make_env(HERE, 2), make_env(TOY, 2)
    assert isinstance(abroad, ForeignEnv)
    opened.append(abroad)
    assert abroad.pid != os.getpid()
    assert abroad.spec == here.spec
    assert abroad.num_envs == 2
    assert_equal_episodes(abroad, here)
    assert isinstance(abroad, Demonstrator)
    assert isinstance(here, Demonstrator)
    for one, other in zip(
        abroad.demonstrate(FIRST_TRAINING_STATE, 3), here.demonstrate(FIRST_TRAINING_STATE, 3), strict=True
    ):
        if isinstance(one, dict):
            assert all(np.array_equal(one[name], other[name]) for name in ("top",))
        else:
            assert np.array_equal(one, other)
    assert isinstance(abroad, Filmable)
    assert isinstance(here, Filmable)
    assert np.array_equal(abroad.film(0), here.film(0))


def test_its_versions_come_with_it_wherever_it_lives(opened: list[ForeignEnv]) -> None:
    from importlib.metadata import version

    abroad = make_env(HERE, 1)
    assert isinstance(abroad, ForeignEnv)
    opened.append(abroad)
    said = f"Python {platform.python_version()}, numpy {np.__version__}, "
    assert abroad.versions.startswith(said)
    assert f"torch {version('torch')}" in abroad.versions.split(", ")
    in_process = LocalEnvs(HERE, 1)
    try:
        assert in_process.versions == abroad.versions
    finally:
        in_process.close()
    assert LocalEnvs(TOY, 1).versions == ""


def test_an_interpreter_with_numpy_and_nothing_else_hosts_it(tmp_path: Path, opened: list[ForeignEnv]) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    (site,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    installed = Path(np.__file__).resolve().parent
    for folder in (installed, installed.with_name("numpy.libs")):
        if folder.exists():
            (site / folder.name).symlink_to(folder)
    python = str(tmp_path / "venv/bin/python")
    lacking = subprocess.run([python, "-c", "import jaxtyping"], capture_output=True, check=False)
    assert lacking.returncode, "the environment was to have numpy alone"
    opened.append(ForeignEnv(replace(TOY, python=python), 2))
    assert_equal_episodes(opened[0], make_env(TOY, 2))


def test_another_python_hosts_it(opened: list[ForeignEnv]) -> None:
    """RLVLA_FOREIGN_PYTHON names one; without it, one with numpy is looked for on PATH."""
    names = [f"python3.{minor}" for minor in range(10, 15) if (3, minor) != sys.version_info[:2]]
    candidates = [os.environ.get("RLVLA_FOREIGN_PYTHON"), *map(shutil.which, names)]
    for python in filter(None, candidates):
        if not subprocess.run([python, "-c", "import numpy"], capture_output=True, check=False).returncode:
            break
    else:
        pytest.skip("no other Python from 3.10 that has numpy; set RLVLA_FOREIGN_PYTHON=/path/to/one")
    opened.append(ForeignEnv(replace(TOY, python=python), 2))
    here = make_env(TOY, 2)
    assert opened[0].spec == here.spec
    a, b = (world.reset([0, 1], [3, 4]) for world in (opened[0], here))
    # numpy 1 computes a float32 scalar times a Python number in double precision, numpy 2 does not.
    assert a.state is not None
    assert np.allclose(a.state, b.state, atol=1e-6)
    assert np.mean(a.images["top"] != b.images["top"]) < 0.01


def test_the_simulator_may_print_what_it_likes(interpreter: Interpreter, opened: list[ForeignEnv]) -> None:
    # More than the pipe holds: who is not read blocks.
    python = interpreter("""
        from rlvla_envs import foreign_host, toy
        reset = toy.ToyEnv.reset
        def loud(self, slots, states):
            print("RLW1" * 100_000)
            os.system("echo from a child of the simulator")
            return reset(self, slots, states)
        toy.ToyEnv.reset = loud
        foreign_host.main(descriptor)
        """)
    opened.append(ForeignEnv(replace(TOY, python=python), 2))
    assert_equal_episodes(opened[0], make_env(TOY, 2))


def test_a_world_abroad_has_what_it_has_at_home(interpreter: Interpreter, opened: list[ForeignEnv]) -> None:
    python = interpreter("""
        from rlvla_envs import foreign_host, toy
        del toy.ToyEnv.demonstrate, toy.ToyEnv.film
        toy.ToyEnv.group_size = 2
        foreign_host.main(descriptor)
        """)
    opened.append(ForeignEnv(replace(TOY, python=python), 4))
    assert not isinstance(opened[0], Demonstrator)
    assert not isinstance(opened[0], Filmable)
    assert isinstance(opened[0], Grouped)
    assert opened[0].group_size == 2
    opened.append(ForeignEnv(HERE, 1))
    assert not isinstance(opened[1], Grouped)


def test_the_packages_of_this_interpreter_and_the_working_folder_stay_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, opened: list[ForeignEnv]
) -> None:
    for name in ("ours", "here"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "numpy.py").write_text("raise ImportError('numpy of another interpreter')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "ours"))
    monkeypatch.chdir(tmp_path / "here")
    opened.append(ForeignEnv(HERE, 1))
    assert opened[0].reset([0], [0]).images["top"].shape == (1, 16, 16, 3)


# --- errors of the world


def test_a_refused_configuration_is_the_same_error_as_at_home() -> None:
    for config in (TOY, HERE):
        with pytest.raises(ValueError, match=r"^suite.task is 'gat'; the toy suite has gate.$"):
            make_env(replace(config, task="gat"), 1)


def test_an_error_of_the_world_leaves_it_alive(opened: list[ForeignEnv]) -> None:
    world = ForeignEnv(HERE, 2)
    opened.append(world)
    with pytest.raises(RuntimeError, match=r"^slot 1 of the toy has no running episode; reset it first.$"):
        world.step_chunk([1], np.zeros((1, 4, 2), np.float32))
    # Where nobody chose the words, what was printed helps.
    with pytest.raises(RuntimeError, match=r"(?s)hosted by .*python.* raised IndexError in reset: .*Traceback"):
        world.reset([7], [0])
    with pytest.raises(RuntimeError, match="dtype 'f2'"):
        world.step_chunk([1], np.zeros((1, 4, 2), np.float16))
    assert_equal_episodes(world, make_env(TOY, 2))


def test_an_interpreter_that_is_not_there_is_refused_with_advice(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"suite.python is '/no/python'.*Make a virtual environment"):
        make_env(replace(TOY, python="/no/python"), 1)
    (tmp_path / "bin").mkdir()
    shutil.copy("/bin/sh", tmp_path / "bin/python")
    with pytest.raises(ValueError, match=rf"Did you mean {tmp_path}/bin/python\?"):
        make_env(replace(TOY, python=str(tmp_path)), 1)


def test_an_interpreter_without_numpy_says_so(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    python = str(tmp_path / "venv/bin/python")
    with pytest.raises(RuntimeError, match=rf"(?s)hosted by {python}.*ended with status 1.*No module named 'numpy'"):
        make_env(replace(TOY, python=python), 1)


def test_what_is_no_python_is_a_clean_error(tmp_path: Path) -> None:
    (tmp_path / "python").write_text("neither a script nor a program")
    (tmp_path / "python").chmod(0o755)
    with pytest.raises(RuntimeError, match="could not be started"):
        make_env(replace(TOY, python=str(tmp_path / "python")), 1)
    with pytest.raises(RuntimeError, match=r"hosted by /bin/true, failed in open: .*It ended with status 0"):
        make_env(replace(TOY, python="/bin/true"), 1)


# --- a peer that does not keep to the protocol

HONEST = """
    import numpy as np
    from rlvla_envs import foreign_host, wire
    connection, host = socket.socket(fileno=descriptor), foreign_host.Host()

    def evil(request, answer):
        return answer

    def serve():
        while True:
            request = wire.receive(connection, timeout_s=None)
            answer = host.answer(request)
            answer = answer._replace(fields={**answer.fields, "call": request.fields["call"]})
            answer = evil(request, answer) if request.kind in ("step_chunk", "film", "demonstrate") else answer
            if answer is not None:
                wire.send(connection, wire.encode(answer), timeout_s=None)

    def with_array(answer, name, array):
        return answer._replace(arrays={**answer.arrays, name: array})

    def with_field(answer, name, value):
        return answer._replace(fields={**answer.fields, name: value})
    """
FIRST_WORDS = {
    "garbage": ("os.write(descriptor, b'\\x00\\xff' * 500); time.sleep(1000)", "starts with"),
    "nothing": ("time.sleep(1000)", "no complete message arrived within 3 s"),
    "nothing, and exits": ("sys.exit(3)", "ended with status 3"),
    "half a message": ("os.write(descriptor, b'RLW1' + bytes(4)); time.sleep(1000)", "no complete message"),
    "half a message, and dies": (
        "os.write(descriptor, b'RLW1' + bytes(4)); os.kill(os.getpid(), 9)",
        "killed by signal 9",
    ),
    "a promise of 10 GB": ("os.write(descriptor, struct.pack('<4sIQ', b'RLW1', 2, 10**10)); time.sleep(1000)", "body"),
    "a pickle": (
        """
class Bomb:
    def __reduce__(self):
        return os.mkdir, (os.path.join(os.path.dirname(__file__), "created"),)
import pickle
os.write(descriptor, pickle.dumps(Bomb()))
time.sleep(1000)""",
        "starts with b'\\\\x80",
    ),
    "a spec of another suite": (
        """
from rlvla_envs import foreign_host, toy
init = toy.ToyEnv.__init__
def lying(self, config, n):
    init(self, config, n)
    object.__setattr__(self.spec, "suite", "maniskill")
toy.ToyEnv.__init__ = lying
foreign_host.main(descriptor)""",
        "spec cannot have suite='maniskill'",
    ),
    "a spec of texts": (
        """
from rlvla_envs import foreign_host, toy
init = toy.ToyEnv.__init__
def lying(self, config, n):
    init(self, config, n)
    object.__setattr__(self.spec.cameras[0], "height", "16")
toy.ToyEnv.__init__ = lying
foreign_host.main(descriptor)""",
        "spec has a field of the wrong type",
    ),
}


@pytest.mark.parametrize("name", FIRST_WORDS)
def test_a_peer_that_starts_with_something_else_is_ended(name: str, interpreter: Interpreter, tmp_path: Path) -> None:
    code, complaint = FIRST_WORDS[name]
    # It has started something, which has to go too.
    child = "print(subprocess.Popen(['sleep', '1000']).pid, file=pids)\nprint('my last words')\nsys.stdout.flush()\n"
    python = interpreter(child + code)
    silent = name in ("nothing", "half a message")
    with pytest.raises(RuntimeError, match=f"(?s)hosted by {python}, failed in open: .*{complaint}.*my last words"):
        ForeignEnv(replace(TOY, python=python), 2, start_timeout_s=3.0 if silent else 60.0)
    assert len(started_by(python)) == 2
    assert all(map(is_gone, started_by(python)))
    assert not (tmp_path / "created").exists()


LATER = {
    "too small a picture": ("with_array(answer, 'images/top', np.zeros((2, 8, 8, 3), np.uint8))", "announced is uint8"),
    "too large a picture": ("with_array(answer, 'images/top', np.zeros((2, 99, 99, 3), np.uint8))", "a body of"),
    "a picture in floats": ("with_array(answer, 'images/top', np.zeros((2, 16, 16, 3), 'f4'))", "a body of|float32"),
    "another camera": ("with_array(answer, 'images/wrist', np.zeros((0, 1), np.uint8))", "nobody announced"),
    "no reward": ("answer._replace(arrays={k: v for k, v in answer.arrays.items() if k != 'reward'})", "lacks"),
    "a reward that is no number": ("with_array(answer, 'reward', np.float32([0, np.nan]))", "not finite"),
    "a reward in doubles": ("with_array(answer, 'reward', np.zeros(2))", "'reward' is float64"),
    "an infinite state": ("with_array(answer, 'state', np.full((2, 5), np.inf, 'f4'))", "not finite"),
    "one row too many": ("with_array(answer, 'success', np.zeros(3, np.bool_))", "'success' is bool \\[3\\]"),
    "no step": ("with_array(answer, 'executed_steps', np.array([4, 0]))", "executed_steps are \\[4, 0\\]"),
    "a step too many": ("with_array(answer, 'executed_steps', np.array([5, 4]))", "must lie in \\[1, 4\\]"),
    "two ends": (
        "with_array(with_array(answer, 'terminated', np.ones(2, '?')), 'truncated', np.ones(2, '?'))",
        "terminated and truncated at once",
    ),
    "one instruction": ("with_field(answer, 'instruction', ['go'])", "1 of instruction; it must have 2"),
    "an instruction that is a number": ("with_field(answer, 'instruction', [1, 2])", "must be a text"),
    "a long instruction": ("with_field(answer, 'instruction', ['x' * 5000] * 2)", "must be a text of at most"),
    "another reply": ("answer._replace(kind='reset')", "answered with 'reset'"),
    "the reply to an earlier call": ("with_field(answer, 'call', 0)", "is numbered 0"),
    "an error without words": ("wire.Message('error', {'call': request.fields['call']})", "reply's type is None"),
    "nothing": ("None", "no complete message arrived within 3 s"),
    "half a reply": (
        "connection.sendall(b''.join(wire.encode(answer))[:300]) or os.kill(os.getpid(), signal.SIGKILL)",
        "killed by signal 9",
    ),
}


@pytest.mark.parametrize("name", LATER)
def test_a_peer_that_breaks_its_own_announcement_is_ended(
    name: str, interpreter: Interpreter, opened: list[ForeignEnv]
) -> None:
    reply, complaint = LATER[name]
    python = interpreter(HONEST + f"\n    def evil(request, answer):\n        return {reply}\n    serve()")
    world = ForeignEnv(replace(TOY, python=python), 2, timeout_s=3.0 if name == "nothing" else 60.0)
    opened.append(world)
    world.reset([0, 1], [0, 1])
    actions = np.zeros((2, 4, 2), np.float32)
    with pytest.raises(RuntimeError, match=f"hosted by {python}, failed in step_chunk: .*({complaint})"):
        world.step_chunk([0, 1], actions)
    assert is_gone(world.pid)
    # It stays broken, for the same reason.
    with pytest.raises(RuntimeError, match=f"failed in step_chunk: .*({complaint})"):
        world.reset([0, 1], [0, 1])


@pytest.mark.parametrize(
    ("reply", "complaint"),
    [
        ("with_array(answer, 'action', np.zeros((13, 2), 'f4'))", "(has 13 actions; it must have 1 to 12|a body)"),
        ("with_array(answer, 'action', np.float32(1))", "has 0 actions"),
        ("with_array(answer, 'action', answer.arrays['action'][:, :1])", "'action' is float32"),
        ("with_array(answer, 'images/top', answer.arrays['images/top'][1:])", "'images/top' is uint8"),
        ("with_field(answer, 'success', 1)", "success is 1"),
    ],
)
def test_a_demonstration_is_measured_too(
    reply: str, complaint: str, interpreter: Interpreter, opened: list[ForeignEnv]
) -> None:
    python = interpreter(HONEST + f"\n    def evil(request, answer):\n        return {reply}\n    serve()")
    opened.append(ForeignEnv(replace(TOY, python=python), 2))
    assert isinstance(opened[0], Demonstrator)
    with pytest.raises(RuntimeError, match=f"failed in demonstrate: .*{complaint}"):
        opened[0].demonstrate(FIRST_TRAINING_STATE, 0)
    assert is_gone(opened[0].pid)


@pytest.mark.parametrize("frame", ["np.zeros((4, 4, 4), 'u1')", "np.zeros(3, 'u1')", "np.zeros((4, 4, 3), 'f4')"])
def test_a_film_is_pictures(frame: str, interpreter: Interpreter, opened: list[ForeignEnv]) -> None:
    python = interpreter(
        HONEST + f"\n    def evil(request, answer):\n        return with_array(answer, 'frame', {frame})\n    serve()"
    )
    opened.append(ForeignEnv(replace(TOY, python=python), 2))
    assert isinstance(opened[0], Filmable)
    with pytest.raises(RuntimeError, match="failed in film: .*(frame has shape|'frame' is)"):
        opened[0].film(0)


def test_metrics_come_through_and_keep_their_names(interpreter: Interpreter, opened: list[ForeignEnv]) -> None:
    python = interpreter(
        HONEST
        + """
    def evil(request, answer):
        name = "metrics/near" if request.fields["call"] < 4 else "metrics/far"
        return with_array(answer, name, np.float32([0.5, 1]))
    serve()"""
    )
    opened.append(ForeignEnv(replace(TOY, python=python), 2))
    opened[0].reset([0, 1], [0, 1])
    actions = np.zeros((2, 4, 2), np.float32)
    for _ in range(2):
        assert {k: v.tolist() for k, v in opened[0].step_chunk([0, 1], actions).metrics.items()} == {"near": [0.5, 1]}
    with pytest.raises(RuntimeError, match=r"metrics are \['metrics/far'\] and were \['metrics/near'\]"):
        opened[0].step_chunk([0, 1], actions)


def test_a_terminal_is_not_told_what_to_do(interpreter: Interpreter) -> None:
    python = interpreter(r"""
        from rlvla_envs import foreign_host, toy
        def refuse(self, config, n):
            raise ValueError("\x1b[2J\x07 no")
        toy.ToyEnv.__init__ = refuse
        foreign_host.main(descriptor)
        """)
    with pytest.raises(ValueError, match=r"^\?\[2J\? no$"):
        make_env(replace(TOY, python=python), 1)


# --- nothing is left


def test_a_killed_world_is_noticed_and_named(opened: list[ForeignEnv]) -> None:
    world = ForeignEnv(HERE, 1)
    opened.append(world)
    world.reset([0], [0])
    os.kill(world.pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match=r"hosted by .*, failed in step_chunk: .*killed by signal 9 .*memory"):
        world.step_chunk([0], np.zeros((1, 4, 2), np.float32))


def test_closing_leaves_no_process_and_closes_the_world_first(interpreter: Interpreter, tmp_path: Path) -> None:
    python = interpreter(f"""
        from rlvla_envs import foreign_host, toy
        toy.ToyEnv.close = lambda self: open({str(tmp_path / "closed")!r}, "w").close()
        print(subprocess.Popen(["sleep", "1000"]).pid, file=pids)
        foreign_host.main(descriptor)
        """)
    world = make_env(replace(TOY, python=python), 1)
    world.close()
    assert (tmp_path / "closed").exists()
    assert len(started_by(python)) == 2
    assert all(map(is_gone, started_by(python)))
    world.close()
    with pytest.raises(RuntimeError, match="is closed"):
        world.reset([0], [0])


@pytest.mark.parametrize("busy", [False, True])
def test_a_world_does_not_outlive_a_trainer_that_is_killed(busy: bool, interpreter: Interpreter) -> None:
    python = interpreter("""
        from rlvla_envs import foreign_host, toy
        print(subprocess.Popen(["sleep", "1000"]).pid, file=pids)
        def for_ever(self, slots, actions):
            print("stepping", file=pids)
            time.sleep(1000)
        toy.ToyEnv.step_chunk = for_ever
        foreign_host.main(descriptor)
        """)
    trainer = f"""
import sys, os, threading, numpy as np
from rlvla_envs.base import SuiteConfig
from rlvla_envs.suites import make_env
world = make_env(SuiteConfig(**{json.dumps({"name": "toy", "python": python})}), 1)
world.reset([0], [0])
if {busy}:
    threading.Thread(target=world.step_chunk, args=([0], np.zeros((1, 8, 2), np.float32))).start()
    while "stepping" not in open(os.path.dirname({python!r}) + "/pids").read():
        pass
os.kill(os.getpid(), 9)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run([sys.executable, "-c", trainer], env=environment, capture_output=True, check=False)
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()
    pids = [int(word) for word in (Path(python).parent / "pids").read_text().split() if word.isdigit()]
    assert len(pids) == 2
    assert all(map(is_gone, pids))


def test_an_interrupted_call_does_not_answer_the_next_one(
    opened: list[ForeignEnv], monkeypatch: pytest.MonkeyPatch
) -> None:
    world = ForeignEnv(HERE, 1)
    opened.append(world)

    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGUSR1, interrupt)
    try:
        os.kill(world.pid, signal.SIGSTOP)  # it will not answer
        with (
            subprocess.Popen(["sh", "-c", f"sleep 0.3; kill -USR1 {os.getpid()}"]),
            pytest.raises(KeyboardInterrupt),
        ):
            world.reset([0], [0])
    finally:
        signal.signal(signal.SIGUSR1, previous)
    assert is_gone(world.pid)
    with pytest.raises(RuntimeError, match="is closed"):
        world.reset([0], [1])
