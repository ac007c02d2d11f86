"""`rlvla serve`."""

import ipaddress
from dataclasses import dataclass, field

from rlvla.config.checks import MISSING, check_common, require


@dataclass(kw_only=True)
class ServeConfig:
    """`rlvla serve POLICY`: a policy for the websocket clients of openpi and starVLA."""

    policy: str = MISSING
    """Policy folder. May stand as the first word."""
    embodiment: str = ""
    """Of a policy with several embodiments: which of them the clients' robot is, by the name of its suite."""
    host: str = "127.0.0.1"
    """Address to listen on. Other than this machine's own needs allow_remote."""
    port: int = 8000
    """openpi's clients expect 8000, starVLA's 10093. 0 takes a free one and says which."""
    allow_remote: bool = False
    """Listen where other machines can connect. There is neither a password nor encryption: whoever reaches the port can
    use the policy. Prefer an SSH tunnel to 127.0.0.1."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:0."""
    temperature: float = 0.6
    """Factor on the initial noise, as eval.temperature. 0 gives equal answers to equal observations."""
    seed: int = 0
    """Of the noise."""
    inference_batch: int = 1
    """Rows of one pass of the policy, filled up by repetition where fewer clients wait: 1, or the number of clients
    that ask at once and at least 4. What `rlvla eval` was given (16) makes its bits."""
    cameras: dict[str, str] = field(default_factory=dict)
    """Under which key of an observation a client sends each of the policy's cameras, where it is not
    observation/CAMERA: cameras.agentview=observation/image. Maps in maps are joined by slashes: images/cam_high."""
    state: str = "observation/state"
    """Key of the robot's state."""
    prompt: str = "prompt"
    """Key of the instruction."""
    instruction: str | None = None
    """Taken where a client sends none. null: it must."""
    image_order: tuple[str, ...] = ()
    """starVLA: the policy's cameras in the order in which a client lists its images. Empty: the policy's own order."""
    statistics: str | None = None
    """starVLA: the name by which a client asks for the statistics of its actions (unnorm_key), for example oxe_bridge.
    null: the suite's name. Any other name is refused."""
    ignore: tuple[str, ...] = ()
    """Keys that clients send and the policy has no use for. Any other unknown key is an error."""
    resize: bool = False
    """Resize images of another size and the same proportions to the camera's, as PIL does (bicubic). false refuses
    them."""
    max_message_mb: float = 16.0
    """Longest message, in 2^20 bytes. A longer one ends its connection."""
    max_clients: int = 16
    """Connections at a time; further ones are turned away."""

    def __post_init__(self) -> None:
        check_common(self)
        self.image_order, self.ignore = tuple(self.image_order), tuple(self.ignore)
        require(bool(self.host), "host", "empty", "an address, such as 127.0.0.1")
        require(
            self.allow_remote or is_loopback(self.host),
            "host",
            f"{self.host}, where other machines may connect, without a password and without encryption",
            "127.0.0.1, ::1 or localhost, which an SSH tunnel brings to another machine; or set allow_remote=true, if "
            "everyone who reaches this port may use the policy",
        )
        require(0 <= self.port <= 65535, "port", self.port, "in [0, 65535]")
        require(self.temperature >= 0, "temperature", self.temperature, "0 or more. Usual: 0.6 or 1.0")
        require(0 < self.max_message_mb <= 1024, "max_message_mb", self.max_message_mb, "in (0, 1024]")
        require(self.max_clients >= 1, "max_clients", self.max_clients, "at least 1")
        for name in ("state", "prompt"):
            require(bool(getattr(self, name)), name, "empty", "the name of a key")


def is_loopback(host: str) -> bool:
    """Whether only this machine can connect to an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
