"""Exports from elsewhere: whatever their manifest, tables, merges and graphs hold, one message and no hang."""

import gzip
import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper
from PIL import Image

from maple.errors import BackboneError, CheckpointError, MapleError
from maple.inference import ImageSource, load_predictor
from maple.inference.manifest import CLASSES, IMAGE, MANIFEST, MERGES, TEXT, ZERO_SHOT

Change = Callable[[Path], object]


def predict(folder: Path) -> None:
    predictor = load_predictor(folder, zero_shot=True, device="cpu")
    predictor.set_class_names(["red car", "boat"])
    image = ImageSource("1", lambda: Image.new("RGB", (50, 40), "red"))
    assert len(list(predictor.stream([image, image, image]))) == 3
    predictor.set_class_names(predictor.trained_names)
    assert len(list(predictor.stream([image]))) == 1


def manifest(**changes: Any) -> Change:
    """Change entries of the manifest, as in preprocess__size=0."""

    def change(folder: Path) -> None:
        content = json.loads((folder / MANIFEST).read_text())
        for keys, value in changes.items():
            part, *inner = keys.split("__")
            if inner:
                content[part][inner[0]] = value
            else:
                content[part] = value
        (folder / MANIFEST).write_text(json.dumps(content))

    return change


def instead(name: str, make: Change) -> Change:
    """Put something else in the place of a file."""

    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        make(folder / name)

    return change


def unlisted(name: str, make: Change = lambda _path: None) -> Change:
    """Put something else in the place of a file, and leave the file out of the manifest's list."""

    def change(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)
        files = json.loads((folder / MANIFEST).read_text())["files"]
        del files[name]
        manifest(files=files)(folder)

    return change


def put(name: str, content: bytes | Callable[[], bytes]) -> Change:
    """Replace a file, and its size in the manifest."""

    def change(folder: Path) -> None:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content())
        files = json.loads((folder / MANIFEST).read_text())["files"]
        manifest(files={**files, name: (folder / name).stat().st_size})(folder)

    return change


def npy(shape: str = "(3, 128)", dtype: str = "'<f4'", size: int = 3 * 128 * 4) -> bytes:
    header = f"{{'descr': {dtype}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    header += b" " * (-(len(header) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(size)


def saved(write: Callable[[io.BytesIO], object]) -> bytes:
    buffer = io.BytesIO()
    write(buffer)
    return buffer.getvalue()


def merges(*lines: str) -> Callable[[], bytes]:
    return lambda: gzip.compress("\n".join(["#", *lines]).encode(), 1)


COUNT = 49152 - 256 - 2


def graph(
    operator: str, output: Any = ("b", 128), images: Any = ("b", 3, 64, 64), kind: int = TensorProto.FLOAT, **more: Any
) -> Callable[[], bytes]:
    """An image graph of one operator, DOMAIN:NAME."""

    def make() -> bytes:
        domain, _, name = operator.rpartition(":")
        node = helper.make_node(name, ["images"], ["features"], domain=domain, **more)
        inputs = [helper.make_tensor_value_info("images", TensorProto.FLOAT, images)]
        made = helper.make_graph([node], "graph", inputs, [helper.make_tensor_value_info("features", kind, output)])
        opsets = [helper.make_opsetid("", 17), helper.make_opsetid("evil", 1)]
        content: bytes = helper.make_model(made, opset_imports=opsets, ir_version=8).SerializeToString()
        return content

    return make


def outside(location: str) -> Callable[[], bytes]:
    """An image graph whose weights are in another file."""

    def make() -> bytes:
        weights = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[64, 128], data_location=TensorProto.EXTERNAL)
        for key, value in {"location": location, "offset": "0", "length": "32768"}.items():
            weights.external_data.add(key=key, value=value)
        nodes = [
            helper.make_node("MatMul", ["images", "w"], ["y"]),
            helper.make_node("ReduceMean", ["y"], ["features"], axes=[1, 2], keepdims=0),
        ]
        inputs = [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["b", 3, 64, 64])]
        outputs = [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["b", 128])]
        made = helper.make_graph(nodes, "graph", inputs, outputs, [weights])
        content: bytes = helper.make_model(
            made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8
        ).SerializeToString()
        return content

    return make


HOSTILE: dict[str, tuple[Change, str]] = {
    "size 0": (manifest(preprocess__size=0), "preprocess.size: .* greater than or equal to 1"),
    "size 1e9": (manifest(preprocess__size=10**9), "preprocess.size: .* less than or equal to 4096"),
    "size of words": (manifest(preprocess__size="many"), "preprocess.size"),
    "size of another graph": (manifest(preprocess__size=32), r"image.onnx does not fit its manifest: 'images'"),
    "std 0": (manifest(preprocess__std=[0, 1, 1]), "preprocess.std.0: .* greater than 0"),
    "two means": (manifest(preprocess__mean=[0, 1]), "preprocess.mean"),
    "scale -1": (manifest(logit_scale=-1), "logit_scale: .* greater than 0"),
    "no word in a name": (manifest(class_names=["a", " ", "c"]), "class name 1 is ' '"),
    "numbers as names": (manifest(class_names=[1, 2, 3]), "class_names.0: Input should be a valid string"),
    "fewer names": (manifest(class_names=["a"]), r"classes.npy has shape \[3, 128\].* \[1, 128\]"),
    "too many names": (manifest(class_names=["a"] * 100_001), "there are 100,001 class names"),
    "1e9 learned tokens": (manifest(sentences__length=10**9), "1000000000 tokens exceeds the context_length"),
    "more slots than tokens": (manifest(sentences__length=5), "could not|cannot be computed|fewer than its length 5"),
    "no place for the name": (manifest(zero_shot__templates=["a photo"]), "zero_shot.templates.0"),
    "1e6 templates": (manifest(zero_shot__templates=["{}"] * 10**6), "zero_shot.templates: .* at most 10000"),
    "no context": (manifest(context_length=None), "need a context_length"),
    "another head": (manifest(head="logits"), "image.onnx does not fit its manifest: 'logits' is absent"),
    "a shifted head": (manifest(head="shifted"), "image.onnx does not fit its manifest: 'shift' is absent"),
    "a file outside": (manifest(files={"../x": 1}), "damaged: files does not list image.onnx"),
    "no files": (manifest(files={}), "files does not list image.onnx, text.onnx"),
    "deep JSON": (lambda folder: (folder / MANIFEST).write_text("[" * 10**6), "nested more than 100 levels"),
    "a manifest that is a pipe": (
        instead(MANIFEST, os.mkfifo),
        "a pipe",
    ),
    "a manifest that is a device": (
        instead(MANIFEST, lambda path: path.symlink_to("/dev/zero")),
        "it is a device",
    ),
    **{
        f"{name} is a pipe": (unlisted(name, os.mkfifo), f"does not list {name}")
        for name in (IMAGE, TEXT, CLASSES, MERGES)
    },
    "a pipe that is listed": (
        instead(IMAGE, os.mkfifo),
        "image.onnx is missing",
    ),
    "zero_shot.npy is absent": (unlisted(ZERO_SHOT), "does not list zero_shot.npy"),
    "shape of 1e12": (put(CLASSES, npy("(3, 1000000000000)")), "does not have its shape"),
    "shape beyond 64 bits": (put(CLASSES, npy(f"({10**30},)")), "does not have its shape"),
    "shape below 0": (put(CLASSES, npy("(-3, -128)")), "does not have its shape"),
    "shape without values": (put(CLASSES, npy("(3, 0)", size=0)), r"has shape \[3, 0\]"),
    "objects": (put(CLASSES, npy(dtype="'|O'")), "an array holds object"),
    "giant records": (put(CLASSES, npy(dtype="'|V999999999'")), "an array holds"),
    "complex numbers": (put(CLASSES, npy(dtype="'<c8'", size=3 * 128 * 8)), "an array holds complex64"),
    "no array": (put(CLASSES, b""), "unreadable or damaged"),
    "another width": (put(CLASSES, saved(lambda file: np.save(file, np.ones((3, 99), "f4")))), r"has shape \[3, 99\]"),
    "NaN": (put(CLASSES, saved(lambda file: np.save(file, np.full((3, 128), np.nan, "f4")))), "not finite"),
    "an npz": (put(CLASSES, saved(lambda file: np.savez(file, a=np.ones((3, 128), "f4")))), "is not an .npy file"),
    "merges that grow": (
        put(MERGES, lambda: gzip.compress(bytes(10**8), 1)),
        "not a readable file|does not hold CLIP's",
    ),
    "merges of other tokens": (
        put(MERGES, merges(*(f"zz{n} b{n}" for n in range(COUNT)))),
        "does not hold CLIP's merges",
    ),
    "one merge": (put(MERGES, merges(*["a b"] * COUNT)), "does not hold CLIP's 48894 merges"),
    "half the merges": (put(MERGES, lambda: b"\x1f\x8b\x08\0\0\0\0\0"), "not a readable file of CLIP's merges"),
    "half a graph": (put(IMAGE, lambda: graph("Identity")()[:-9]), "image.onnx cannot be opened"),
    "an operator of others": (put(IMAGE, graph("evil:Op")), "image.onnx cannot be opened"),
    "another rank": (put(IMAGE, graph("Identity", ("b", 3, 64, 64))), "'features' is of shape"),
    "no shape": (put(IMAGE, graph("Shape", None)), "does not fit its manifest|cannot be opened"),
    "strings": (
        put(IMAGE, graph("Cast", None, kind=TensorProto.STRING, to=TensorProto.STRING)),
        "'features' is absent",
    ),
    "any image size": (put(IMAGE, graph("Flatten", ("b", 128), ("b", "c", "h", "w"))), "'images' is of shape"),
    "a false width": (put(IMAGE, graph("Flatten", ("b", 128))), "instead of|cannot be|of variable width"),
    "weights outside": (put(IMAGE, outside("../outside.bin")), "image.onnx cannot be opened"),
    "weights of a device": (put(IMAGE, outside("/dev/zero")), "image.onnx cannot be opened"),
    "weights in a link": (put(IMAGE, outside("link")), "image.onnx cannot be opened"),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_hostile_exports_are_refused(name: str, exported: Path, tmp_path: Path) -> None:
    change, message = HOSTILE[name]
    folder = Path(shutil.copytree(exported, tmp_path / "export"))
    (tmp_path / "outside.bin").write_bytes(bytes(32768))
    (folder / "link").symlink_to("../outside.bin")
    change(folder)
    with pytest.raises((CheckpointError, BackboneError), match=message):
        predict(folder)


def test_a_file_in_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "export").write_text("{}")
    with pytest.raises(MapleError, match="not a readable prompts file"):
        load_predictor(tmp_path / "export")


def behind_links(folder: Path) -> None:
    """As in the cache of a hub."""
    for name in (CLASSES, IMAGE, MERGES):
        (folder / name).rename(folder.parent / name)
        (folder / name).symlink_to(folder.parent / name)


HARMLESS: dict[str, Change] = {
    "two equal names": manifest(class_names=["a", "a", "b"]),
    "other characters": manifest(class_names=["\x1b[31m red", "b\n", "c\ud800"]),
    "about other things": manifest(about={"title": "a"}),
    "files behind links": behind_links,
}


@pytest.mark.parametrize("name", HARMLESS)
def test_unusual_exports_are_read(name: str, exported: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(exported, tmp_path / "export"))
    HARMLESS[name](folder)
    predict(folder)
