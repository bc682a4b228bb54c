"""Predictions of an exported method on onnxruntime, without torch and open_clip."""

import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from maple import files
from maple.clip_tokenizer import ClipTokenizer
from maple.data.images.eval_transform import EvalView
from maple.errors import BackboneError, CheckpointError, ClassNamesError, ConfigError, UnlearnedClassesError, first_line
from maple.inference import manifest as export_files
from maple.inference.manifest import Manifest, Slots, Templates, read_manifest
from maple.inference.predictor import EncodedClasses, Floats, Predictor
from maple.metrics import softmax
from maple.names import NameRows, clean_class_names

Integers = NDArray[np.int64]

_NAME_TEMPLATE = Templates(templates=("a photo of a {}.",))
_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_TEXT_BATCH = 256
_PLACEHOLDER = "X"
_LARGEST_SIDE = 1_000_000  # of a tensor that goes into a graph or comes out of it
_AGAIN = "export the run again"


class OnnxPredictor(Predictor):
    """A method that `maple export --format onnx` wrote; use `load`."""

    def __init__(self, folder: Path, manifest: Manifest, *, zero_shot: bool, device: str | None) -> None:
        self.manifest = manifest
        self._folder = folder
        self._image = _session(folder / export_files.IMAGE, device)
        size, count = manifest.preprocess.size, len(manifest.class_names)
        _check_graph(folder / export_files.IMAGE, self._image.get_inputs(), {"images": [None, 3, size, size]})
        # The graph has frozen features of its own only where the method changes those of the image tower.
        shapes: dict[str, list[int | None]] = {"features": [None, None]}
        if manifest.head == "logits":
            shapes["logits"] = [None, count]
        elif manifest.head == "shifted":
            shapes["shift"] = [None, None]
        self._outputs = outputs = _check_graph(folder / export_files.IMAGE, self._image.get_outputs(), shapes)
        if not all(isinstance(side, int) for shape in outputs.values() for side in shape[1:]):
            raise CheckpointError(f"{folder / export_files.IMAGE} has outputs of variable width; {_AGAIN}")
        width, frozen_width = outputs["features"][1], outputs.get("frozen", outputs["features"])[-1]
        self._class_table = self._zero_shot_table = None
        if manifest.head == "cosine" or manifest.text_weight is not None:
            self._class_table = _table(folder / export_files.CLASSES, [count, width])
        if zero_shot:
            self._zero_shot_table = _table(folder / export_files.ZERO_SHOT, [count, frozen_width])
        self._device, self._width = device, width
        self._trained_names = NameRows(manifest.class_names)
        self._opening = threading.Lock()
        self._opened: _TextSide | None = None
        import onnxruntime

        providers = self._image.get_providers()
        self.device_type = "cpu" if providers == [_PROVIDERS["cpu"]] else "cuda"
        computed_by = f"onnxruntime {onnxruntime.__version__} ({', '.join(providers)})"
        super().__init__(
            manifest.class_names,
            preprocess=EvalView.from_preprocessing(manifest.preprocess),
            has_zero_shot=zero_shot,
            about={**manifest.about, "computed_by": computed_by, "int8": manifest.int8},
            name_features=None
            if manifest.sentences is None
            else lambda names: self._template_features(names, _NAME_TEMPLATE),
        )

    @property
    def _text(self) -> "_TextSide":
        """The text graphs and the tokenizer, which take most of the time to open: trained names do not need them."""
        with self._opening:
            if self._opened is None:
                self._opened = _TextSide(self._folder, self.manifest, self._outputs, self._width, self._device)
            return self._opened

    def prepare(self) -> None:
        super().prepare()
        if self.manifest.sentences is not None:
            _ = self._text

    @classmethod
    def load(cls, path: str | Path, *, zero_shot: bool = False, device: str | None = None) -> Self:
        """Load the folder of an export, on cpu (default) or cuda.

        Raises:
            CheckpointError: not an export, a damaged one, or one of a newer format.
            ConfigError: no such device, the export has no frozen CLIP, or onnxruntime is not installed.
        """
        folder = export_files.export_folder(path)
        manifest = read_manifest(folder)
        if zero_shot and manifest.zero_shot is None:
            raise ConfigError(
                f"{folder} was exported without the frozen CLIP; leave zero_shot=True out, or export the run again "
                "with zero_shot=True"
            )
        return cls(folder, manifest, zero_shot=zero_shot, device=device)

    def encode_images(self, images: Floats) -> list[dict[str, Floats]]:
        """Run the image graph on preprocessed images [B, 3, R, R]: B dictionaries of its outputs."""
        if not len(images):
            return []
        outputs = self._run(self._image, self._outputs, {"images": np.ascontiguousarray(images, dtype=np.float32)})
        return [dict(zip(self._outputs, row, strict=True)) for row in zip(*outputs, strict=True)]

    def probabilities(
        self, encoded: Sequence[Mapping[str, Floats]], classes: EncodedClasses
    ) -> tuple[Floats, Floats | None]:
        if not encoded:
            empty = np.empty((0, len(classes.names)), np.float32)
            return empty, None if classes.zero_shot is None else empty
        trained, frozen = self.logits(encoded, classes)
        return softmax(trained).astype(np.float32), None if frozen is None else softmax(frozen).astype(np.float32)

    def logits(self, encoded: Sequence[Mapping[str, Floats]], classes: EncodedClasses) -> tuple[Floats, Floats | None]:
        """Return logits [n, C] of n > 0 encoded images, and those of the frozen CLIP; a BackboneError if not finite.

        The former are divided by the temperature of the method, which is a part of the export's scale or graph.
        """
        scale = np.float32(self.manifest.logit_scale)
        if self.manifest.head == "logits":
            trained = np.stack([image["logits"] for image in encoded])[:, classes.trained]
        elif self.manifest.head == "shifted":
            # Every image shifts the learned tokens, so that the classes are encoded once for each.
            sentences, rows = classes.trained
            pairs = ((image, self._encode_text(*sentences, shift=image["shift"])) for image in encoded)
            trained = np.stack([scale * image["features"] @ self._embedded(text, rows).T for image, text in pairs])
        else:
            trained = scale * np.stack([image["features"] for image in encoded]) @ classes.trained.T
        if classes.zero_shot is None:
            return _finite(trained), None
        # The graph has frozen features of its own only where the method changes those of the image tower.
        frozen = np.stack([image.get("frozen", image["features"]) for image in encoded])
        manifest = self.manifest
        frozen_scale = np.float32(manifest.frozen_logit_scale or manifest.logit_scale * manifest.temperature)
        return _finite(trained), _finite(frozen_scale * frozen @ classes.zero_shot.T)

    def _encode_class_names(self, names: tuple[str, ...], note: str | None) -> EncodedClasses:
        sentences, head = self.manifest.sentences, self.manifest.head
        rows = self._trained_names.find(names)
        if sentences is None and None in rows:
            new = names[rows.index(None)]
            kind = ClassNamesError if self.manifest.about.get("speaks_of_new_classes") else UnlearnedClassesError
            raise kind(f"class name {new!r} was not trained, and {self.manifest.new_names}")
        trained: Any
        if head == "logits":
            trained = rows
        elif head == "shifted" and isinstance(sentences, Slots):
            trained = self._padded(self._slotted(names, sentences)), rows
        else:
            trained = self._class_features(names, rows, self._class_table, sentences)
        zero_shot = None
        if self.has_zero_shot:
            zero_shot = self._class_features(names, rows, self._zero_shot_table, self.manifest.zero_shot)
        return EncodedClasses(names, note, trained, zero_shot)

    def _class_features(
        self, names: Sequence[str], rows: list[int | None], table: Floats | None, sentences: Slots | Templates | None
    ) -> Floats:
        """Class embeddings [C, E]: those of the table, and for new names their text features, followed by zeros."""
        known = [row for row in rows if row is not None]
        new = [name for name, row in zip(names, rows, strict=True) if row is None or table is None]
        if not new and table is not None:
            return table[known]
        if isinstance(sentences, Slots):
            features = self._encode_text(*self._padded(self._slotted(new, sentences)))
        elif sentences is not None:
            features = self._template_features(new, sentences, frozen=table is self._zero_shot_table)
        else:
            raise CheckpointError(f"{self._folder} has neither embeddings nor sentences for {new[:3]}")
        if table is None:
            return features
        embedded = np.zeros((len(names), table.shape[1]), features.dtype)
        is_new = np.array([row is None for row in rows])
        embedded[is_new, : features.shape[1]] = features
        embedded[~is_new] = table[known]
        return embedded

    def _embedded(self, text_features: Floats, rows: list[int | None]) -> Floats:
        """Class embeddings [C, E] of text features [C, D] of one image, where they depend on it."""
        if self._class_table is None:
            return text_features
        embedded = np.pad(text_features, ((0, 0), (0, self._class_table.shape[1] - text_features.shape[1])))
        for place, row in enumerate(rows):
            if row is not None:
                embedded[place] = np.float32(self.manifest.text_weight) * embedded[place] + self._class_table[row]
        return embedded

    def _template_features(self, names: Sequence[str], sentences: Templates, *, frozen: bool = True) -> Floats:
        cleaned = clean_class_names(names)
        total = np.zeros((), np.float32)
        for template in sentences.templates:
            rows = [self._text.tokenizer.sentence(template.replace("{}", name)) for name in cleaned]
            ids, slots = self._padded([(row, [0] * len(row)) for row in rows])
            total = total + self._encode_text(ids, slots, frozen=frozen)
        mean = (total / len(sentences.templates)).astype(np.float32)
        lengths = np.linalg.norm(mean, axis=-1, keepdims=True)
        features: Floats = (mean / np.maximum(lengths, 1e-12)).astype(np.float32)
        return features

    def _slotted(self, names: Sequence[str], sentences: Slots) -> list[tuple[list[int], list[int]]]:
        """Ids of each sentence and, as `maple.prompts.write_sentences`, the learned token (from 1; 0 none) at each."""
        length = sentences.length
        words = sentences.words or " ".join([_PLACEHOLDER] * length)
        rows = []
        for name in clean_class_names(names):
            ids = self._text.tokenizer.sentence(f"{words} {name}.")
            slots = [0, *range(1, 1 + length), *[0] * (len(ids) - 1 - length)]
            if sentences.position != "end":
                # The prompt was written before the name; move the name between its halves, or in front of it.
                before = length // 2 if sentences.position == "middle" else 0
                count = len(self._text.tokenizer.words(name))
                for row in (ids, slots):
                    prompt, class_name = row[1 : 1 + length], row[1 + length : 1 + length + count]
                    row[1 : 1 + length + count] = [*prompt[:before], *class_name, *prompt[before:]]
            rows.append((ids, slots))
        return rows

    def _padded(self, rows: Sequence[tuple[list[int], list[int]]]) -> tuple[Integers, Integers]:
        """Ids and slots [C, T] of sentences, T the longest, or the length of all where the text graph has one."""
        longest = self._text.length or max(len(ids) for ids, _ in rows)
        both = np.zeros((2, len(rows), longest), np.int64)
        for number, row in enumerate(rows):
            for part in (0, 1):
                both[part, number, : len(row[part])] = row[part]
        return both[0], both[1]

    def _encode_text(self, ids: Integers, slots: Integers, *, frozen: bool = False, **shift: Floats) -> Floats:
        """Unit features [C, D] of sentences [C, T], of the method's text tower or of the frozen one."""
        features = []
        text = self._text
        graph = text.frozen_graph if frozen else text.graph
        for start in range(0, len(ids), _TEXT_BATCH):
            part = slice(start, start + _TEXT_BATCH)
            inputs = {"ids": ids[part], "slots": slots[part], **text.no_shift, **shift}
            features.append(self._run(graph, text.outputs, inputs)[0])
        return np.concatenate(features)

    def _run(self, session: Any, shapes: Mapping[str, list[int]], inputs: Mapping[str, Any]) -> list[Floats]:
        rows = len(next(iter(inputs.values())))
        try:
            outputs: list[Floats] = session.run(list(shapes), dict(inputs))
        except Exception as error:  # its classes have no base of their own
            raise BackboneError(f"{self._folder} cannot be computed: {first_line(error)[:300]}") from error
        for (name, shape), values in zip(shapes.items(), outputs, strict=True):
            if list(values.shape) != [rows, *shape[1:]]:  # onnxruntime only warns
                problem = f"{name!r} has shape {list(values.shape)} instead of {[rows, *shape[1:]]}"
                raise BackboneError(f"{self._folder} cannot be computed: {problem}; {_AGAIN}")
        return [_finite(values) for values in outputs]


class _TextSide:
    """What encodes new class names: the text graph, that of the frozen CLIP if it is another, and the tokenizer.

    Args:
        outputs: of the image graph, by name.
        width: of the class embeddings.

    Raises:
        CheckpointError: a file is damaged, or does not fit the manifest.
    """

    def __init__(
        self, folder: Path, manifest: Manifest, outputs: Mapping[str, list[int]], width: int, device: str | None
    ) -> None:
        path = folder / export_files.TEXT
        self.graph = _session(path, device)
        shapes: dict[str, list[int | None]] = {"ids": [None, None], "slots": [None, None]}
        shapes |= {"shift": [outputs["shift"][1]]} if manifest.head == "shifted" else {}
        inputs = _check_graph(path, self.graph.get_inputs(), shapes)
        self.length = 0  # of all sentences; 0 if the graph takes any length
        if isinstance(inputs["ids"][1], int):  # of a text tower that reads padding, too
            self.length = inputs["ids"][1]
            if self.length != manifest.context_length:
                problem = f"'ids' has {self.length} tokens, not context_length={manifest.context_length}"
                raise CheckpointError(f"{path} does not fit its manifest: {problem}; {_AGAIN}")
        self.outputs = _check_graph(path, self.graph.get_outputs(), {"features": [None, None]})
        text_width = self.outputs["features"][1]
        # Class embeddings may have more entries than text features, never fewer.
        if not isinstance(text_width, int) or not 0 < text_width <= width:
            problem = f"'features' is of width {text_width!s:.80}, and the class embeddings are of width {width}"
            raise CheckpointError(f"{path} does not fit its manifest: {problem}; {_AGAIN}")
        self.frozen_graph = self.graph
        if export_files.FROZEN_TEXT in manifest.files:
            path = folder / export_files.FROZEN_TEXT
            self.frozen_graph = _session(path, device)
            _check_graph(path, self.frozen_graph.get_inputs(), {"ids": [None, None], "slots": [None, None]})
            _check_graph(path, self.frozen_graph.get_outputs(), {"features": [None, text_width]})
        self.tokenizer = ClipTokenizer(folder / export_files.MERGES, manifest.context_length or 0)
        # Where the text graph takes a shift, sentences that belong to no image are encoded with zeros.
        self.no_shift: dict[str, Floats] = {}
        if manifest.head == "shifted":
            self.no_shift = {"shift": np.zeros(inputs["shift"], np.float32)}
        if isinstance(manifest.sentences, Slots) and manifest.sentences.words:
            tokens = len(self.tokenizer.words(manifest.sentences.words))
            if tokens < manifest.sentences.length:
                problem = f"sentences.words has {tokens} tokens, fewer than its length {manifest.sentences.length}"
                raise CheckpointError(f"{folder / export_files.MANIFEST} is damaged: {problem}; {_AGAIN}")


def _session(path: Path, device: str | None) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        problem = "an exported method runs on onnxruntime, which is not installed"
        raise ConfigError(f"{problem}: pip install 'maple-clip[onnx]'") from error
    kind, _, number = (device or "cpu").partition(":")
    if number and not (kind == "cuda" and number.isdecimal()):
        raise ConfigError(f"device {device!r}: give cpu, cuda, or cuda:NUMBER")
    available = [name for name, provider in _PROVIDERS.items() if provider in onnxruntime.get_available_providers()]
    if kind not in available:
        able = ", ".join(available)
        raise ConfigError(f"device {device!r}: this onnxruntime computes an exported method on {able} only")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # With a number of threads it does not try to bind them to processors that this process may not use.
    options.intra_op_num_threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
    provider = (_PROVIDERS[kind], {"device_id": number}) if number else _PROVIDERS[kind]
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=[provider])
    except Exception as error:
        raise CheckpointError(f"{path} cannot be opened ({first_line(error)[:200]}); {_AGAIN}") from error
    if _PROVIDERS[kind] not in session.get_providers():
        # onnxruntime lists what it was built for, and computes on the CPU where it cannot load that.
        problem = "onnxruntime cannot use it, and would compute on the CPU"
        advice = "install the versions of CUDA and cuDNN that it was built for, or choose cpu"
        raise ConfigError(f"device {device!r}: {problem}; {advice}")
    return session


def _check_graph(path: Path, values: Sequence[Any], expected: Mapping[str, list[int | None]]) -> dict[str, list[int]]:
    """The shapes of the inputs or outputs of a graph, by name; CheckpointError unless the expected ones are there.

    A size is None where any will do; a variable dimension of the graph fits only that.
    """
    kinds = ("tensor(float)", "tensor(int64)")
    shapes = {value.name: list(value.shape or []) for value in values if value.type in kinds}
    for name, sizes in expected.items():
        shape = shapes.get(name)
        fits = shape is not None and len(shape) == len(sizes)
        for size, wanted in zip(shape or [], sizes, strict=False):
            fits = fits and wanted in (None, size) and not (isinstance(size, int) and size > _LARGEST_SIDE)
        if not fits:
            text = "absent" if shape is None else f"of shape {shape!s:.80}"
            raise CheckpointError(f"{path} does not fit its manifest: {name!r} is {text}, not {sizes}; {_AGAIN}")
    return shapes


def _table(path: Path, shape: list[int]) -> Floats:
    """The class embeddings [C, D] in a file, which has the size that was written."""
    try:
        table = files.read_arrays(path, "f").get("")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is unreadable or damaged ({error}); {_AGAIN}") from error
    if table is None or list(table.shape) != shape:
        problem = "is not an .npy file" if table is None else f"has shape {list(table.shape)} instead of {shape}"
        raise CheckpointError(f"{path} {problem}; {_AGAIN}")
    if not np.isfinite(table).all():
        raise CheckpointError(f"{path} holds values that are not finite; {_AGAIN}")
    return table.astype(np.float32)


def _finite(values: Floats) -> Floats:
    if not np.isfinite(values).all():
        raise BackboneError("a result is not finite; export the run again, without int8=True")
    return values
