"""Limits of a server: sizes, counts and times."""

from dataclasses import dataclass, fields

from maple.errors import ConfigError

MIB = 1024**2


@dataclass(frozen=True)
class Limits:
    """Bounds of one request, and of all requests together.

    Attributes:
        upload_bytes: size of a request body.
        uploads_bytes: size of all bodies held at once; beyond it, requests are refused as `busy`.
        pixels: size of an image, read from its header before it is decoded.
        images: images in a request.
        classes: class names in a request; the list of trained names is always allowed.
        name_chars: length of a class name.
        top: classes in a prediction.
        queue: images waiting or being processed; beyond it, requests are refused as `busy`.
        batch: images that the model processes at once.
        wait: seconds that a batch waits for more images.
        timeout: seconds from the complete request to the response.
        upload_timeout: seconds within which a body must arrive.
        head_timeout: seconds within which the head of a request must arrive on an open connection.
        decoders: threads that decode images.

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
            # Also false for NaN.
            if not least <= value < float("inf"):
                raise ConfigError(f"{field.name} is {value}; it must be a number of at least {least}")
        for small, large in (("upload_bytes", "uploads_bytes"), ("images", "queue")):
            if getattr(self, small) > getattr(self, large):
                raise ConfigError(
                    f"{small} is {getattr(self, small)}, more than {large} ({getattr(self, large)}), so the largest "
                    f"allowed request could never be accepted; raise {large}"
                )
