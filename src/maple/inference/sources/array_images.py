"""Images and labels of a Python program, in any of their usual forms."""

import os
import threading
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from maple.data import EvalTransform
from maple.data.images.prefetch import map_in_order, overlaps
from maple.data.images.reading import read_image, to_rgb
from maple.errors import ClassNamesError, DataError, ImageError, shortened_list
from maple.files import on_disk, sha256_of
from maple.inference.sources.image_sources import ImageSource, download_image, find_images, is_address, is_collection
from maple.inference.sources.python_data import InputError as InputError
from maple.inference.sources.python_data import Lazy, is_frame, open_data
from maple.names import nfc

Array = np.ndarray[Any, Any]

_FORMS = (
    "one image or a list of them: paths, addresses, bytes, binary files, PIL images, arrays [H, W, 3] or tensors "
    "[3, H, W]; an array [n, H, W, 3]; or a tensor [n, 3, H, W]; values are bytes 0 to 255, or floats 0 to 1"
)

_CHANNELS_FIRST = "; it looks like channels first: give a torch tensor, or move the axis"
_LISTED = "OUST"
"""The kinds of NumPy's arrays that are lists of paths, bytes or other objects."""

_ENCODED = (bytes, bytearray, memoryview)

# Two threads that decode one PIL image, or read one file, disturb each other, and a list may hold an image twice.
_DECODING = [threading.Lock() for _ in range(16)]


class LabelNamesError(ClassNamesError, ValueError):
    """Labels without class names; a ValueError too."""


def to_images(images: Any) -> Sequence[ImageSource] | Iterator[ImageSource]:
    """Return images as image sources, which are read and converted one by one, when their turn comes.

    Args:
        images: one image: a path, an http(s) address, encoded bytes, a binary file that can be read from its beginning,
            a PIL image, an array [H, W, 3], [H, W, 1] or [H, W, 4] (transparency becomes white), or a tensor [3, H, W]
            or [1, H, W]. Or n of them: in any sequence, where an array may also be [H, W]; in an iterator, which is
            read as images are needed; or as one array or tensor with a leading n. Values are uint8, 0 to 255, or
            floats, 0 to 1, not normalised. Or the path of a folder, whose folders are included, a pattern ("*.jpg"), an
            archive, a table or another source of `find_images`; or a data set of another library (`open_data`).

    Raises:
        InputError: neither an image nor images. An error in a single image is raised, with its number, when it is read.
        DataError: a data set with several columns that may be meant.

    Example:
        >>> [image.name for image in to_images([np.zeros((8, 8, 3), np.uint8), "cat.jpg"])]
        ['image 0', 'image 1']
    """
    if isinstance(images, str | os.PathLike):
        path = os.fsdecode(images)
        if not is_address(path) and is_collection(path):
            return find_images([path], recursive=True)
        images = [images]
    elif _is_one_image(images):
        images = [images]
    elif (data := open_data(images)) is not None:
        images = data.images
    if isinstance(images, torch.Tensor):
        if images.ndim != 4:
            raise InputError(f"the tensor of images has shape {list(images.shape)}; give {_FORMS}")
    elif isinstance(images, np.ndarray):
        is_listed = images.dtype.kind in _LISTED
        if is_listed and images.ndim == 2 and images.shape[1] == 1:
            images = images[:, 0]  # a column of a table
        if images.ndim not in ((1,) if is_listed else (3, 4)):
            raise InputError(f"the array of images has shape {list(images.shape)}; give {_FORMS}")
        if images.ndim == 3 and images.shape[0] == 3:
            raise InputError(
                f"the array of images has shape {list(images.shape)}{_CHANNELS_FIRST}; give three grey images as a list"
            )
    elif isinstance(images, Iterator):
        return (_source(image, f"image {number}") for number, image in enumerate(images))
    elif not isinstance(images, Sequence):
        # A column of pandas, say, converts itself to an array.
        if not hasattr(images, "__array__"):
            raise InputError(f"images are {type(images).__name__}; give {_FORMS}")
        return to_images(np.asarray(images))
    sequence = images
    return Lazy(len(sequence), lambda number: _source(sequence[number], f"image {number}"))


def _is_one_image(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.ndim == 3 and value.shape[0] in (1, 3)
    if isinstance(value, np.ndarray):
        return value.dtype.kind not in _LISTED and value.ndim == 3 and value.shape[2] in (1, 3, 4)
    return isinstance(value, (*_ENCODED, Image.Image)) or _is_stream(value)


def _is_stream(value: Any) -> bool:
    """Whether a value is a file; a data set or a frame may have something called `read`, too, but is indexed."""
    return hasattr(value, "read") and hasattr(value, "seek") and not hasattr(value, "__getitem__")


def _source(image: Any, name: str) -> ImageSource:
    if isinstance(image, ImageSource):
        return image
    return ImageSource(name, partial(_read, image, name), partial(_content_id, image, name))


def to_inputs(images: Any) -> Sequence[ImageSource] | Iterator[ImageSource] | torch.Tensor:
    """Return images as `to_images` does; or, of a two-dimensional array or tensor of floats, features [n, D] float32.

    Raises:
        InputError: as `to_images`, or a feature is not finite.

    Example:
        >>> to_inputs(np.zeros((40, 512))).shape
        torch.Size([40, 512])
    """
    if is_frame(images):
        return to_images(images)
    is_table = hasattr(images, "__array__") and getattr(images, "ndim", 0) == 2  # of NumPy, PyTorch or pandas
    if not is_table:
        return to_images(images)
    values = images if isinstance(images, torch.Tensor) else np.asarray(images)
    is_float = values.is_floating_point() if isinstance(values, torch.Tensor) else values.dtype.kind == "f"
    if not is_float:
        return to_images(images)
    features = torch.as_tensor(values).detach().to("cpu", torch.float32)
    if not bool(torch.isfinite(features).all()):
        row = int((~torch.isfinite(features)).any(dim=1).nonzero()[0])
        raise InputError(f"row {row} of the features has a value that is not finite; compute it again")
    return features


def read_inputs(
    inputs: Iterable[ImageSource] | torch.Tensor, transform: EvalTransform, *, batch_size: int, device: str
) -> Generator[torch.Tensor, None, None]:
    """Iterate over transformed images, which two threads read, or over rows of features.

    `device` is the type of that which encodes them, `batch_size` at once (see `overlaps`).
    """
    if isinstance(inputs, torch.Tensor):
        yield from inputs
        return

    def read(image: ImageSource) -> torch.Tensor:
        return transform(image.read())

    with closing(map_in_order(read, inputs, 2, batch_size, overlap=overlaps(device, 2))) as images:
        yield from images


def number_labels(labels: Any, count: int) -> "tuple[Array, np.ndarray[Any, np.dtype[np.intp]]]":
    """Return the sorted distinct labels [C], and the index among them of each of `count` labels.

    Raises:
        InputError: not one label for each image, a single class, or labels that are neither strings nor integers.
    """
    labels = _column(labels)
    values = np.asarray(labels)
    if values.dtype.kind == "T":
        values = values.astype(object)
    elif values.dtype.kind == "U" and values.ndim == 1 and not isinstance(labels, np.ndarray):
        # NumPy turns everything in a list with strings into strings: check what was given.
        _check_kinds(list(labels), (str,))
        values = np.asarray([str.__str__(label) for label in labels])
    if values.shape != (count,):
        raise InputError(f"{count} images have labels of shape {list(values.shape)}; give one label for each")
    if not count:
        raise InputError("there are no images; give some of each class")
    if values.dtype.kind not in "UObiu":
        raise InputError(f"the labels are {values.dtype}; give strings, integers or booleans")
    if values.dtype.kind == "O":
        _check_kinds(values.tolist(), (str, bool, int, np.integer, np.bool_))
    if values.dtype.kind in "UO":
        values = np.asarray(_composed(values.tolist()), dtype=None if values.dtype.kind == "U" else object)
    try:
        classes, indices = np.unique(values, return_inverse=True)
    except TypeError as error:
        raise InputError(f"the labels are of kinds that cannot be sorted ({error}); give labels of one kind") from error
    if len(classes) < 2:
        label = classes.tolist()[0]
        raise InputError(f"all images have the label {label!r}; a classifier needs images of at least two classes")
    return classes, indices


def _column(labels: Any) -> Any:
    """Labels [n] of a column [n, 1], such as a frame of one column, with scikit-learn's warning; others as they are."""
    shape = np.asarray(labels, object).shape
    if len(shape) != 2 or shape[1] != 1:
        return labels
    from sklearn.utils import column_or_1d

    return column_or_1d(labels, warn=True)


def _composed(labels: list[Any]) -> list[Any]:
    """Labels with accents as parts of their letters: in names of files on a Mac they are characters of their own."""
    return [nfc(label) if isinstance(label, str) else label for label in labels]


def labels_of_names(labels: Any, classes: Array, class_names: Sequence[str]) -> Any:
    """Return labels as they are; where none is one of the classes [C], but all are class names, the classes of these.

    A classifier that learned numbers is then scored on a data set that has names.

    Raises:
        InputError: none is a class or a class name.
    """
    labels = _column(labels)
    values = np.asarray(labels, object)
    if values.ndim == 1 and any(isinstance(label, str) for label in values):
        labels = _composed(values.tolist())
    given, known = set(np.asarray(labels, object).ravel().tolist()), set(classes.tolist())
    if not given or given & known:
        return labels
    by_name = dict(zip(class_names, classes.tolist(), strict=True))
    if not given <= by_name.keys():
        raise InputError(
            f"none of the labels ({shortened_list(map(repr, given))}) is a class of this classifier "
            f"({shortened_list(map(repr, classes.tolist()))}); give labels of the same kind"
        )
    return np.asarray([by_name[label] for label in labels], classes.dtype)


def weighted_accuracy(predicted: Array, labels: Any, sample_weight: Any) -> float:
    """Return the part of `predicted` [n] that equals the labels [n], weighted if weights [n] are given.

    Raises:
        InputError: not one label or not one weight for each image, or nothing to average.
    """
    count, labels = len(predicted), np.asarray(labels)
    if labels.shape != predicted.shape:
        raise InputError(f"{count} images have labels of shape {list(labels.shape)}; give one label for each")
    weights = np.ones(count) if sample_weight is None else np.asarray(sample_weight)
    if weights.shape != predicted.shape:
        raise InputError(f"{count} images have weights of shape {list(weights.shape)}; give one for each")
    if not weights.sum():
        raise InputError(f"{count} images of weight 0 have no score; give some images")
    return float(np.average(predicted == labels, weights=weights))


def class_names_of_labels(classes: Array, class_names: Mapping[Any, str] | Sequence[str] | None) -> tuple[str, ...]:
    """Return the class names that CLIP reads for sorted labels [C]: the labels themselves, or those in `class_names`.

    Raises:
        LabelNamesError: labels that are not strings without `class_names`, or a label that it does not name.
    """
    labels = classes.tolist()
    if class_names is None:
        if not all(isinstance(label, str) for label in labels):
            raise LabelNamesError(
                f"the labels are {classes.dtype}, not strings, but CLIP reads the names of the classes: give "
                'class_names={0: "cat", 1: "dog"}, or labels that are strings. Tools that number the labels before '
                "they fit (scikit-learn's voting, stacking, bagging) number them in sorted order: give "
                "class_names=sorted(labels)"
            )
        return tuple(labels)
    if isinstance(class_names, Mapping):
        if absent := [label for label in labels if label not in class_names]:
            raise LabelNamesError(f"class_names has no name for the labels {absent[:10]}; name every one")
        return tuple(class_names[label] for label in labels)
    if isinstance(class_names, str) or not hasattr(class_names, "__getitem__") or not hasattr(class_names, "__len__"):
        form = "{label: name}, or a list of names in the order of the sorted labels"
        raise LabelNamesError(f"class_names is {type(class_names).__name__}; give {form}")
    if len(class_names) != len(labels):
        raise LabelNamesError(f"{len(class_names)} class_names are given for {len(labels)} labels: {labels[:10]}")
    return tuple(class_names)


def _check_kinds(labels: Sequence[Any], kinds: tuple[type, ...]) -> None:
    for number, label in enumerate(labels):
        if not isinstance(label, kinds):
            problem = f"label {number} is {label!r:.80}, {type(label).__name__}"
            raise InputError(f"{problem}; give labels of one kind: strings, integers or booleans")


def _read(image: Any, name: str) -> Image.Image:
    """Read or convert one image to RGB."""
    if isinstance(image, Mapping) and image.keys() <= {"bytes", "path"}:  # as Hugging Face stores an image
        image = image.get("bytes") if image.get("bytes") is not None else image.get("path")
    if isinstance(image, str) and is_address(image):
        image = download_image(image)
    if isinstance(image, str | os.PathLike):
        return read_image(os.path.expanduser(os.fsdecode(image)))
    if _is_stream(image):
        image = _read_stream(image, name)
    if isinstance(image, _ENCODED):
        return read_image(bytes(image), name=name)
    if isinstance(image, Image.Image):
        with _lock_of(image):
            return to_rgb(image, name)
    if isinstance(image, torch.Tensor):
        if image.ndim != 3 or image.shape[0] not in (1, 3):
            raise ImageError(f"{name}: a tensor of shape {list(image.shape)}; it must be [3, H, W] or [1, H, W]")
        if image.is_meta or image.is_quantized:
            problem = "has no values, it is on the device meta" if image.is_meta else "is quantised"
            raise ImageError(f"{name}: the tensor {problem}; give {_FORMS}")
        values = image.detach().to_dense().cpu().permute(1, 2, 0)
        if values.is_floating_point() and values.dtype not in (torch.float16, torch.float32, torch.float64):
            values = values.float()  # NumPy lacks bfloat16
        return to_rgb(Image.fromarray(_to_bytes(values.numpy(), name)), name)
    if isinstance(image, np.ndarray):
        if image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] not in (1, 3, 4)):
            channels_first = image.ndim == 3 and image.shape[0] in (1, 3)
            hint = _CHANNELS_FIRST if channels_first else ""
            raise ImageError(f"{name}: an array of shape {list(image.shape)}; it must be [H, W, 3]{hint}")
        return to_rgb(Image.fromarray(_to_bytes(image, name)), name)
    raise ImageError(f"{name}: is {type(image).__name__}, not an image; give {_FORMS}")


def _lock_of(image: Any) -> threading.Lock:
    return _DECODING[id(image) // 16 % len(_DECODING)]


def _read_stream(stream: Any, name: str) -> bytes:
    """The content of a binary file, from its beginning: an image may be read more than once."""
    try:
        with _lock_of(stream):
            stream.seek(0)
            return memoryview(stream.read()).tobytes()
    except (OSError, ValueError, TypeError, AttributeError) as error:
        advice = "give its bytes, its path, or a file that was opened with mode 'rb'"
        raise ImageError(f"{name}: the file cannot be read ({error}); {advice}") from error


def _content_id(image: Any, name: str) -> str | None:
    """The hash of an image file, or of the pixels of an image in memory; None if it cannot be read."""
    try:
        if isinstance(image, str) and is_address(image):
            return None
        if isinstance(image, _ENCODED):
            return f"file:{sha256(image).hexdigest()}"
        if isinstance(image, str | os.PathLike):
            return f"file:{sha256_of(on_disk(Path(os.path.expanduser(os.fsdecode(image)))))}"
        rgb = _read(image, name)
    except (OSError, ValueError, DataError):
        return None
    return f"pixels:{rgb.width}x{rgb.height}:{sha256(rgb.tobytes()).hexdigest()}"


def _to_bytes(values: Array, name: str) -> "np.ndarray[Any, np.dtype[np.uint8]]":
    """Bytes [H, W] or [H, W, 3] of values 0 to 255 (uint8) or 0 to 1 (float)."""
    if not values.size:
        raise ImageError(f"{name}: has no pixels, its shape is {list(values.shape)}")
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[:, :, 0]
    if values.dtype == np.uint8:
        return np.ascontiguousarray(values)
    if values.dtype.kind != "f":
        raise ImageError(f"{name}: holds {values.dtype}; give uint8, 0 to 255, or floats, 0 to 1")
    low, high = float(values.min()), float(values.max())
    if not (low >= 0 and high <= 1):  # true for NaN too
        problem = f"holds floats from {low:g} to {high:g}"
        raise ImageError(f"{name}: {problem}; they must be within 0 and 1, before any normalisation")
    pixels: np.ndarray[Any, np.dtype[np.uint8]] = np.rint(values * 255).astype(np.uint8)
    return pixels
