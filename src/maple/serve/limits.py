"""What a server takes on: sizes, counts and times. Everything it holds at once is bounded by these."""

from dataclasses import dataclass, fields

from maple.errors import ConfigError

MIB = 1024**2


@dataclass(frozen=True)
class Limits:
    """Bounds of one request, and of all of them together.

    Attributes:
        upload_bytes: of the body of a request.
        uploads_bytes: of all bodies that are held at once; above, requests are told to come again.
        pixels: of a picture, told from its header before it is decoded.
        images: of a request.
        classes: names in a request; the trained list is always allowed.
        name_chars: of a class name.
        top: classes in an answer.
        queue: pictures that are waiting or at work; above, requests are told to come again.
        batch: pictures that the model sees at once.
        wait: seconds that a batch waits for more pictures.
        timeout: seconds from the whole request to the answer.
        upload_timeout: seconds in which a body must arrive.
        head_timeout: seconds in which the head of a request must arrive on an open connection.
        decoders: threads that decode pictures.

    Raises:
        ConfigError: a value is out of range, or two contradict each other.
    """

    upload_bytes: int = 32 * MIB
    uploads_bytes: int = 128 * MIB
    pixels: int = 25_000_000
    images: int = 16
    classes: int = 500
    name_chars: int = 200
    top: int = 1000
    queue: int = 128
    batch: int = 32
    wait: float = 0.005
    timeout: float = 30.0
    upload_timeout: float = 30.0
    head_timeout: float = 15.0
    decoders: int = 2

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            least: float = 0 if field.name == "wait" else 0.001 if field.type in (float, "float") else 1
            # False for NaN too.
            if not least <= value < float("inf"):
                raise ConfigError(f"{field.name} is {value}; it must be a number from {least}")
        for small, large in (("upload_bytes", "uploads_bytes"), ("images", "queue")):
            if getattr(self, small) > getattr(self, large):
                raise ConfigError(
                    f"{small} is {getattr(self, small)}, more than {large} ({getattr(self, large)}), so that such a "
                    f"request could never be taken; raise {large}"
                )
