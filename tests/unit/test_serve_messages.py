"""What clients send, mapped to a policy's inputs; and what they are told when it does not fit."""

import sys
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rlvla import serve
from rlvla.config import ConfigError, ServeConfig
from rlvla.serve_messages import (
    LONGEST_INSTRUCTION,
    NOISE_KEY,
    Answered,
    Layout,
    MessageError,
    Request,
    answer,
    refusal,
)
from rlvla_envs.base import ActionComponent, Camera, EnvSpec

SPEC = EnvSpec(
    suite="kitchen",
    task="pour",
    robot="WidowX",
    action=(
        ActionComponent(name="arm", size=2, convention="delta", low=-1.0, high=1.0),
        ActionComponent(name="gripper", size=1, convention="open at 1", low=0.0, high=1.0),
    ),
    cameras=(Camera(name="front", height=4, width=6), Camera(name="wrist", height=2, width=2)),
    state_names=("x", "y"),
    control_hz=5.0,
    chunk_size=3,
    max_episode_steps=9,
    num_evaluation_states=1,
)
FRONT = np.arange(72, dtype=np.uint8).reshape(4, 6, 3)
WRIST = np.full((2, 2, 3), 9, np.uint8)


def layout(spec: EnvSpec = SPEC, **options: Any) -> Layout:
    return Layout.of(ServeConfig(policy="p", **options), spec)


def seen(**changes: Any) -> dict[str, Any]:
    """What an openpi client sends; a key that is None is left out."""
    whole = {
        "observation/front": FRONT,
        "observation/wrist": WRIST,
        "observation/state": np.array([0.5, -2.0]),
        "prompt": "pour the tea",
    }
    renamed = {key.replace("__", "/"): value for key, value in changes.items()}
    return {key: value for key, value in (whole | renamed).items() if value is not None}


def example(**changes: Any) -> dict[str, Any]:
    whole = {"image": [FRONT, WRIST], "lang": "pour the tea", "state": np.array([0.5, -2.0])}
    return {key: value for key, value in (whole | changes).items() if value is not None}


def read(message: Any, spec: EnvSpec = SPEC, **options: Any) -> Request:
    found = layout(spec, **options).read(message)
    assert isinstance(found, Request)
    return found


def why_not(message: Any, **options: Any) -> str:
    with pytest.raises(MessageError) as caught:
        layout(**options).read(message)
    said = str(caught.value)
    assert len(said) < 1000
    return said


def test_an_observation_of_openpi_becomes_a_row() -> None:
    (row,) = read(seen()).rows
    assert row.observation.instruction == ["pour the tea"]
    assert list(row.observation.images) == ["front", "wrist"]
    assert np.array_equal(row.observation.images["front"], FRONT[None])
    assert row.observation.state is not None
    assert row.observation.state.dtype == np.float32
    assert row.observation.state.tolist() == [[0.5, -2.0]]
    assert row.noise_key is None


def test_keys_are_the_clients_where_options_say_so() -> None:
    options = {"cameras": {"front": "images/cam_high", "wrist": "images/low"}, "state": "state", "prompt": "task"}
    sent = {"images": {"cam_high": FRONT, "low": WRIST}, "state": [1, 2.5], "task": "go"}
    (row,) = read(sent, **options).rows
    assert np.array_equal(row.observation.images["wrist"], WRIST[None])
    assert row.observation.instruction == ["go"]
    assert row.observation.state is not None
    assert row.observation.state.tolist() == [[1.0, 2.5]]


def test_a_missing_and_an_unknown_key_are_both_named_with_the_cure() -> None:
    said = why_not(seen(observation__front=None, camera=FRONT))
    assert "lacks observation/front and it has camera" in said
    assert "observation/front: uint8 [4, 6, 3]" in said
    assert "cameras.CAMERA=KEY" in said
    assert "ignore=[KEY]" in said
    # Both cures work.
    read(seen(observation__front=None, camera=FRONT), cameras={"front": "camera"})
    read(seen(depth=FRONT), ignore=("depth",))


def test_a_policy_without_a_state_refuses_one_until_told_to_ignore_it() -> None:
    spec = EnvSpec(**{**vars(SPEC), "state_names": ()})
    with pytest.raises(MessageError, match="observation/state, which this policy has no use for"):
        layout(spec).read(seen())
    (row,) = read(seen(), spec, ignore=("observation/state",)).rows
    assert row.observation.state is None


def test_an_image_may_have_its_channels_first() -> None:
    (row,) = read(seen(observation__front=FRONT.transpose(2, 0, 1))).rows
    assert np.array_equal(row.observation.images["front"], FRONT[None])


@pytest.mark.parametrize(
    ("image", "said"),
    [
        (FRONT.astype(np.float32) / 255, "float32 [4, 6, 3]; it must be uint8 [4, 6, 3]"),
        (FRONT[..., 0], "uint8 [4, 6]"),
        (FRONT[None], "uint8 [1, 4, 6, 3]"),
        (FRONT[..., [0, 1, 2, 2]], "uint8 [4, 6, 4]"),
        (np.zeros((0, 6, 3), np.uint8), "uint8 [0, 6, 3]"),
        (FRONT.tolist(), "a list of 4"),
        ("front.png", "str 'front.png'"),
    ],
)
def test_what_is_not_an_image_is_refused(image: object, said: str) -> None:
    assert f"observation/front is {said}" in why_not(seen(observation__front=image))


def test_an_image_of_another_size_is_refused_unless_it_is_to_be_resized() -> None:
    large = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    said = why_not(seen(observation__front=large))
    assert "is 8 x 12; this policy's camera is 4 x 6. Resize it, or start the server with resize=true" in said
    (row,) = read(seen(observation__front=large), resize=True).rows
    expected = np.asarray(Image.fromarray(large).resize((6, 4), Image.Resampling.BICUBIC))
    assert np.array_equal(row.observation.images["front"][0], expected)


def test_an_image_of_other_proportions_is_never_stretched() -> None:
    assert "proportions differ" in why_not(seen(observation__front=np.zeros((8, 8, 3), np.uint8)), resize=True)


@pytest.mark.parametrize(
    ("state", "said"),
    [
        (np.zeros(3), "is float64 [3]; it must be 2 finite numbers: x, y"),
        (np.zeros((2, 2)), "is float64 [2, 2]"),
        (np.array([0, np.nan]), "has nan"),
        (np.array([0, 1e300]), "has inf"),
        ([1, "2"], "is a list of 2"),
        (np.array([True, False]), "is bool [2]"),
        (0.5, "is float 0.5"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(state: object, said: str) -> None:
    assert f"observation/state {said}" in why_not(seen(observation__state=state))


def test_the_instruction_must_be_text_of_some_length() -> None:
    assert "prompt is int 3" in why_not(seen(prompt=3))
    assert "what the robot is to do" in why_not(seen(prompt="  "))
    assert "characters" in why_not(seen(prompt="a" * (LONGEST_INSTRUCTION + 1)))
    assert "lacks prompt" in why_not(seen(prompt=None))
    (row,) = read(seen(prompt=None), instruction="wipe").rows
    assert row.observation.instruction == ["wipe"]


def test_the_noise_of_a_decision_can_be_named() -> None:
    assert read(seen(**{NOISE_KEY: [7, 2]})).rows[0].noise_key == (7, 2)
    assert read(seen(**{NOISE_KEY: np.array([7, 2])})).rows[0].noise_key == (7, 2)
    for wrong in ([7], [7, -1], [7, 0.5], [True, 1], "7", [2**70, 1]):
        assert "[episode, decision]" in why_not(seen(**{NOISE_KEY: wrong}))


@pytest.mark.parametrize("message", [None, [1], 7, "observation", b"x"])
def test_a_message_that_is_no_map_is_refused(message: object) -> None:
    assert "it must be a map" in why_not(message)


def test_keys_that_are_no_text_and_keys_sent_twice_are_refused() -> None:
    assert "keys must be text" in why_not({b"prompt": 1})
    assert "twice" in why_not(seen(observation={"state": [1, 2]}))


def test_requests_of_starvla_have_rows_and_an_id() -> None:
    whole = {"type": "infer", "request_id": "r7", "payload": {"examples": [example(), example(lang="stir")]}}
    flat = {"examples": [example(), example(lang="stir")], "do_sample": False, "use_ddim": True, "num_ddim_steps": 10}
    for message in (whole, flat):
        request = read(message)
        assert request.starvla
        assert [row.observation.instruction for row in request.rows] == [["pour the tea"], ["stir"]]
        assert np.array_equal(request.rows[1].observation.images["wrist"], WRIST[None])
    assert read(whole).request_id == "r7"


def test_the_images_of_starvla_are_in_the_order_that_was_set() -> None:
    (row,) = read({"examples": [example(image=[WRIST, FRONT])]}, image_order=("wrist", "front")).rows
    assert list(row.observation.images) == ["front", "wrist"]
    assert np.array_equal(row.observation.images["front"], FRONT[None])
    assert "front, wrist in this order" in why_not({"examples": [example(image=[FRONT])]})
    assert "examples[0]: image front is 2 x 2" in why_not({"examples": [example(image=[WRIST, FRONT])]})


def test_a_state_of_starvla_may_have_a_row_axis() -> None:
    (row,) = read({"examples": [example(state=np.array([[1.0, 2.0]]))]}).rows
    assert row.observation.state is not None
    assert row.observation.state.tolist() == [[1.0, 2.0]]


def test_statistics_of_another_robot_are_refused() -> None:
    named = {"examples": [example()], "unnorm_key": "oxe_bridge"}
    assert "the statistics of 'kitchen' alone" in why_not(named)
    read(named, statistics="oxe_bridge")
    read({**named, "unnorm_key": "kitchen"})
    read({**named, "unnorm_key": None})


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ({"type": "train"}, "type is str 'train'"),
        ({"payload": 3}, "payload is int 3"),
        ({"examples": []}, "examples is a list of 0"),
        ({"type": "infer"}, "examples is missing"),
        ({"examples": [3]}, "examples[0] is int 3"),
        ({"examples": [example(lang=None)]}, "examples[0] does not fit: it lacks lang"),
        ({"examples": [example(), example(depth=1)]}, "examples[1] does not fit: it has depth"),
        ({"examples": [example()], "seed": 3}, "the request has seed"),
    ],
)
def test_a_request_of_starvla_that_does_not_fit_is_refused(message: dict[str, Any], said: str) -> None:
    assert said in why_not(message)
    reply = refusal(message, "because")
    assert isinstance(reply, dict)
    assert (reply["status"], reply["ok"], reply["error"]) == ("error", False, {"message": "because"})


def test_a_refusal_is_text_for_whoever_is_not_of_starvla() -> None:
    assert refusal(seen(), "because") == "because"
    assert refusal(None, "because") == "because"


def test_a_ping_is_answered() -> None:
    found = layout().read({"type": "ping", "request_id": 4})
    assert isinstance(found, Answered)
    assert found.reply == {"status": "ok", "ok": True, "type": "ping", "request_id": 4}


def test_replies_have_the_form_of_who_asked() -> None:
    actions = np.arange(18, dtype=np.float32).reshape(2, 3, 3)
    to_openpi = answer(read(seen()), actions[:1], decided_s=0.25, waited_s=0.5)
    assert np.array_equal(to_openpi["actions"], actions[0])
    assert to_openpi["server_timing"] == {"infer_ms": 500.0}
    assert to_openpi["policy_timing"] == {"infer_ms": 250.0}
    to_starvla = answer(Request(read(seen()).rows, True, "r7"), actions, decided_s=0.25, waited_s=0.5)
    assert np.array_equal(to_starvla["data"]["actions"], actions)
    assert (to_starvla["status"], to_starvla["ok"], to_starvla["request_id"]) == ("ok", True, "r7")


def test_the_first_frame_says_what_both_clients_look_for() -> None:
    told = layout(statistics="oxe_bridge").metadata()
    assert (told["action_horizon"], told["action_chunk_size"], told["action_dim"]) == (3, 3, 3)
    assert told["action_names"] == ["arm.0", "arm.1", "gripper"]
    assert told["available_unnorm_keys"] == ["oxe_bridge"]
    assert told["observation"]["observation/wrist"] == "uint8 [2, 2, 3]"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"cameras": {"top": "x"}}, "the policy's cameras are front, wrist"),
        ({"image_order": ("front",)}, "each of the policy's cameras once"),
        ({"image_order": ("front", "front")}, "each of the policy's cameras once"),
        ({"cameras": {"front": "prompt"}}, "prompt stands for two things"),
        ({"ignore": ("prompt",)}, "which the policy reads"),
    ],
)
def test_options_that_do_not_fit_the_policy_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        layout(**options)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.7", "robot.example", "127.0.0.1.example"])
def test_other_machines_are_let_in_only_on_request(host: str) -> None:
    with pytest.raises(ConfigError, match="allow_remote=true"):
        ServeConfig(policy="p", host=host)
    ServeConfig(policy="p", host=host, allow_remote=True)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.3.2.1", "::1", "localhost"])
def test_this_machine_is_let_in(host: str) -> None:
    ServeConfig(policy="p", host=host)


@pytest.mark.parametrize("name", ["websockets", "msgpack"])
def test_a_missing_library_is_named_with_the_cure(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=rf"needs {name}, .* pip install 'rlvla\[serve\]'"):
        serve.run(ServeConfig(policy="nowhere"))
