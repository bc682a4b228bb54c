"""Images of a Python program, whatever holds them, as RGB pictures."""

import threading
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from maple.data import read_image
from maple.data.images.reading import to_rgb
from maple.errors import ClassNamesError, DataError, ImageError
from maple.inference.fetch import is_address
from maple.inference.images import ImageSource

_FORMS = (
    "a list of paths, PIL images, arrays [H, W, 3] or tensors [3, H, W]; an array [n, H, W, 3]; or a tensor "
    "[n, 3, H, W]; values are bytes 0 to 255, or floats 0 to 1"
)

# Two threads that decode one PIL image disturb each other, and a list may hold an image twice.
_DECODING = [threading.Lock() for _ in range(16)]


class InputError(DataError, ValueError):
    """Images or labels of another form than asked for; a ValueError too, as numerical programs expect."""


class LabelNamesError(ClassNamesError, ValueError):
    """Labels for which there are no words; a ValueError too."""


def to_images(images: Any) -> list[ImageSource]:
    """Return n images as pictures, which are read and converted one by one, when their turn comes.

    Args:
        images: paths, PIL images, arrays [H, W], [H, W, 1], [H, W, 3] or [H, W, 4] (transparency goes on white) or
            tensors [1, H, W] or [3, H, W], in any sequence; or one array or tensor with a leading n. Values are uint8,
            0 to 255, or floats, 0 to 1, not normalised.

    Raises:
        InputError: not a sequence of images, or an array that is one image. What is wrong with a single one is said,
            with its number, when it is read.
    """
    if isinstance(images, torch.Tensor):
        if images.ndim != 4:
            raise InputError(f"the tensor of images has shape {list(images.shape)}; give {_FORMS}")
    elif isinstance(images, np.ndarray):
        if images.dtype.kind not in "OU" and images.ndim not in (3, 4):
            raise InputError(f"the array of images has shape {list(images.shape)}; give {_FORMS}")
        if images.dtype.kind not in "OU" and images.ndim == 3 and images.shape[2] in (1, 3, 4):
            raise InputError(
                f"the array of images has shape {list(images.shape)}, which is one image [H, W, {images.shape[2]}]; "
                f"give a list of it, or {_FORMS}"
            )
    elif isinstance(images, str | bytes | Path | Image.Image) or not isinstance(images, Sequence):
        # Tables of paths (a column of pandas, say) know how to become arrays.
        if not hasattr(images, "__array__") or isinstance(images, Image.Image):
            raise InputError(f"images are {type(images).__name__}; give {_FORMS} (one image: a list of it)")
        return to_images(np.asarray(images))
    return [
        ImageSource(f"image {number}", partial(_read_one, images[number], f"image {number}"))
        for number in range(len(images))
    ]


def numbered(labels: Any, count: int) -> "tuple[np.ndarray[Any, Any], np.ndarray[Any, np.dtype[np.intp]]]":
    """The sorted distinct labels [C], and the number among them of each of `count` labels.

    Raises:
        InputError: not one label for each image, a single class, or labels that are neither words nor whole numbers.
    """
    values = _label_array(labels)
    if values.shape != (count,):
        raise InputError(f"{count} images have labels of shape {list(values.shape)}; give one label for each")
    if not count:
        raise InputError("there are no images; give some of each class")
    if values.dtype.kind not in "UObiu":
        raise InputError(f"the labels are {values.dtype}; give words, whole numbers or booleans")
    if values.dtype.kind == "O":
        _check_kinds(values.tolist(), (str, bool, int, np.integer, np.bool_))
    try:
        classes, numbers = np.unique(values, return_inverse=True)
    except TypeError as error:
        raise InputError(f"the labels are of kinds that cannot be sorted ({error}); give labels of one kind") from error
    if len(classes) < 2:
        raise InputError(
            f"all images have the label {classes.tolist()[0]!r}; a classifier needs images of at least two classes"
        )
    return classes, numbers


def words_for(
    classes: "np.ndarray[Any, Any]", class_names: Mapping[Any, str] | Sequence[str] | None
) -> tuple[str, ...]:
    """The words that CLIP reads for sorted labels [C]: the labels themselves, or what `class_names` says.

    Raises:
        LabelNamesError: labels that are no strings without `class_names`, or one of them without words.
    """
    labels = classes.tolist()
    if class_names is None:
        if not all(isinstance(label, str) for label in labels):
            raise LabelNamesError(
                f"the labels are {classes.dtype} and no words, but CLIP reads the names of the classes: give "
                'class_names={0: "cat", 1: "dog"}, or labels that are words. Tools that number words before they fit '
                "(scikit-learn's voting, stacking, bagging) number them in sorted order: give class_names=sorted(words)"
            )
        return tuple(labels)
    if isinstance(class_names, Mapping):
        if absent := [label for label in labels if label not in class_names]:
            raise LabelNamesError(f"class_names has no words for the labels {absent[:10]}; name every one")
        return tuple(class_names[label] for label in labels)
    if isinstance(class_names, str) or not hasattr(class_names, "__getitem__") or not hasattr(class_names, "__len__"):
        raise LabelNamesError(
            f"class_names is {type(class_names).__name__}; give {{label: words}}, or a list of words in the order of "
            "the sorted labels"
        )
    if len(class_names) != len(labels):
        raise LabelNamesError(f"{len(class_names)} class_names are given for {len(labels)} labels: {labels[:10]}")
    return tuple(class_names)


def _label_array(labels: Any) -> "np.ndarray[Any, Any]":
    """Labels as an array that holds what was given: NumPy makes words of whatever stands in a list with words.

    Raises:
        InputError: words stand beside something else.
    """
    values = np.asarray(labels)
    if values.dtype.kind == "T":
        return values.astype(object)
    if values.dtype.kind != "U" or values.ndim != 1 or isinstance(labels, np.ndarray):
        return values
    given = list(labels)
    _check_kinds(given, (str,))
    return np.asarray([str.__str__(label) for label in given])


def _check_kinds(labels: Sequence[Any], kinds: tuple[type, ...]) -> None:
    odd = next((number for number, label in enumerate(labels) if not isinstance(label, kinds)), None)
    if odd is not None:
        raise InputError(
            f"label {odd} is {labels[odd]!r:.80}, {type(labels[odd]).__name__}; give labels of one kind: words, whole "
            "numbers or booleans"
        )


def _read_one(image: Any, name: str) -> Image.Image:
    if isinstance(image, str) and is_address(image):
        raise ImageError(f"{image}: is an address, which only `maple predict` fetches; give the image itself")
    if isinstance(image, str | Path):
        return read_image(image)
    if isinstance(image, Image.Image):
        with _DECODING[id(image) // 16 % len(_DECODING)]:
            return to_rgb(image, name)
    if isinstance(image, torch.Tensor):
        if image.ndim != 3 or image.shape[0] not in (1, 3):
            raise ImageError(f"{name}: a tensor of shape {list(image.shape)}; it must be [3, H, W] or [1, H, W]")
        return to_rgb(Image.fromarray(_pixels(_values(image, name), name)), name)
    if isinstance(image, np.ndarray):
        if image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] not in (1, 3, 4)):
            hint = "; it looks like channels first: give a torch tensor, or move the axis" if _first(image) else ""
            raise ImageError(f"{name}: an array of shape {list(image.shape)}; it must be [H, W, 3]{hint}")
        return to_rgb(Image.fromarray(_pixels(image, name)), name)
    raise ImageError(f"{name}: is {type(image).__name__}, not an image; give {_FORMS}")


def _values(image: torch.Tensor, name: str) -> "np.ndarray[Any, Any]":
    """The values of a tensor [c, H, W] as an array [H, W, c]; those of a type that NumPy lacks become float32."""
    if image.is_meta or image.is_quantized:
        what = "has no values, it is on the device meta" if image.is_meta else "is quantised"
        raise ImageError(f"{name}: the tensor {what}; give {_FORMS}")
    values = image.detach().to_dense().cpu().permute(1, 2, 0)
    if values.is_floating_point() and values.dtype not in (torch.float16, torch.float32, torch.float64):
        values = values.float()
    return values.numpy()


def _first(image: "np.ndarray[Any, Any]") -> bool:
    return image.ndim == 3 and image.shape[0] in (1, 3)


def _pixels(values: "np.ndarray[Any, Any]", name: str) -> "np.ndarray[Any, np.dtype[np.uint8]]":
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
    # False for NaN too.
    if not (low >= 0 and high <= 1):
        raise ImageError(
            f"{name}: holds floats from {low:g} to {high:g}; they must be within 0 and 1, before any normalisation"
        )
    shades: np.ndarray[Any, np.dtype[np.uint8]] = np.rint(values * 255).astype(np.uint8)
    return shades
