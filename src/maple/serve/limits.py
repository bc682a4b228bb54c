"""Limits of a server: sizes, counts and times."""

from dataclasses import dataclass, fields

from maple.errors import ConfigError

MIB = 1024**2


@dataclass(frozen=True)
class Limits:
    """Bounds of one request, and of all requests together.

    Raises ConfigError if a value is out of range, or two contradict each other.
    """

    upload_bytes: int = 32 * MIB  # of a request body
    uploads_bytes: int = 128 * MIB  # of all bodies held at once; beyond it, requests are refused as `busy`
    pixels: int = 25_000_000  # of an image, read from its header before it is decoded
    images: int = 16  # in a request
    classes: int = 500  # class names in a request; the list of trained names is always allowed
    name_chars: int = 200  # length of a class name
    top: int = 1000  # classes in a prediction
    queue: int = 128  # images waiting or being processed; beyond it, requests are refused as `busy`
    batch: int = 32  # images that the model processes at once
    wait: float = 0.005  # seconds that a batch waits for more images
    timeout: float = 30.0  # seconds from the complete request to the response
    upload_timeout: float = 30.0  # seconds within which a body must arrive
    head_timeout: float = 15.0  # seconds within which the head of a request must arrive on an open connection
    read_timeout: float = 60.0  # seconds within which a client must read what is sent to it
    head_bytes: int = 32 * 1024  # of the head of a request
    headers: int = 100  # in the head of a request
    url_bytes: int = 8 * 1024  # of an address, query included
    connections: int = 512  # open at once; beyond it, the one whose client has been silent longest is closed
    decoders: int = 2  # processes that decode images
    decode_timeout: float = 10.0  # seconds that decoding an image may take, after which its process is ended

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            least: float = 0 if field.name == "wait" else 0.001 if field.type in (float, "float") else 1
            # Also false for NaN.
            if not least <= value < float("inf"):
                raise ConfigError(f"{field.name} is {value}; it must be a number of at least {least}")
        for small, large in (("upload_bytes", "uploads_bytes"), ("images", "queue")):
            if getattr(self, small) > getattr(self, large):
                raise ConfigError(
                    f"{small} is {getattr(self, small)}, more than {large} ({getattr(self, large)}), so the largest "
                    f"allowed request could never be accepted; raise {large}"
                )
