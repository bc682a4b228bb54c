"""An exported method, answering on onnxruntime: no torch, no open_clip."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from maple.data.images.eval_transform import EvalView
from maple.errors import BackboneError, CheckpointError, ClassNamesError, ConfigError, UnlearnedClassesError, first_line
from maple.inference import manifest as on_disk
from maple.inference.manifest import Manifest, Slots, Templates, read_manifest
from maple.inference.predictor import EncodedClasses, Floats, Predictor
from maple.inference.tokenizer import ClipTokenizer
from maple.metrics import softmax
from maple.names import clean_class_names

Integers = NDArray[np.int64]

NAME_TEMPLATE = Templates(templates=("a photo of a {}.",))
_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_SENTENCES_AT_ONCE = 256
_PLACEHOLDER = "X"


class OnnxPredictor(Predictor):
    """A method that `maple export --format onnx` wrote.

    Attributes:
        manifest: what it says of itself.
    """

    manifest: Manifest

    def __init__(self, folder: Path, manifest: Manifest, *, zero_shot: bool, device: str | None) -> None:
        """Open the graphs of a folder; use `load`."""
        self.manifest = manifest
        self._folder = folder
        self._image = _session(folder / on_disk.IMAGE, device)
        self._outputs = [output.name for output in self._image.get_outputs()]
        self._classes = _table(folder, on_disk.CLASSES, manifest) if manifest.head == "cosine" else None
        self._zero_shot = _table(folder, on_disk.ZERO_SHOT, manifest) if zero_shot else None
        self._text: Any = None
        if on_disk.TEXT in manifest.files:
            self._text = _session(folder / on_disk.TEXT, device)
            self._tokenizer = ClipTokenizer(folder / on_disk.MERGES, manifest.context_length or 0)
        super().__init__(
            manifest.class_names,
            view=EvalView.from_preprocessing(manifest.preprocess),
            has_zero_shot=zero_shot,
            about={**manifest.about, "computed_by": _computed_by(self._image), "int8": manifest.int8},
            name_features=None if self._text is None else self._name_features,
        )

    @classmethod
    def load(cls, path: str | Path, *, zero_shot: bool = False, device: str | None = None) -> Self:
        """Open the folder of an export.

        Args:
            zero_shot: answer with the frozen CLIP beside, which must have been exported too.
            device: cpu (default) or cuda.

        Raises:
            CheckpointError: no export, a damaged one, or one of a newer format.
            ConfigError: no such device, no frozen CLIP inside, or onnxruntime is not installed.
        """
        folder = on_disk.export_folder(path)
        manifest = read_manifest(folder)
        if zero_shot and manifest.zero_shot is None:
            raise ConfigError(
                f"{folder} was exported without the frozen CLIP; leave --zero-shot out, or export the run again with "
                "--zero-shot"
            )
        return cls(folder, manifest, zero_shot=zero_shot, device=device)

    def encode(self, views: Floats) -> list[dict[str, Floats]]:
        """What the image graph gives for each of the views [B, 3, R, R]."""
        if not len(views):
            return []
        found = self._run(self._image, {"images": np.ascontiguousarray(views, dtype=np.float32)})
        return [dict(zip(self._outputs, row, strict=True)) for row in zip(*found, strict=True)]

    def probabilities(
        self, seen: Sequence[Mapping[str, Floats]], spoken: EncodedClasses
    ) -> tuple[Floats, Floats | None]:
        """Probabilities [n, C] of n things that `encode` gave, and those of the frozen CLIP; float32."""
        tuned, frozen = self.logits(seen, spoken)
        return _probabilities(tuned), None if frozen is None else _probabilities(frozen)

    def logits(self, seen: Sequence[Mapping[str, Floats]], spoken: EncodedClasses) -> tuple[Floats, Floats | None]:
        """Logits [n, C] of n things that `encode` gave, and those of the frozen CLIP.

        Raises:
            BackboneError: one is not finite.
        """
        if not seen:
            empty = np.empty((0, len(spoken.names)), np.float32)
            return empty, None if spoken.frozen is None else empty
        features = np.stack([one["features"] for one in seen])
        scale = np.float32(self.manifest.logit_scale)
        if self.manifest.head == "logits":
            tuned = np.stack([one["logits"] for one in seen])[:, spoken.tuned]
        elif self.manifest.head == "shifted":
            tuned = np.stack([scale * one["features"] @ self._shifted(spoken.tuned, one["shift"]).T for one in seen])
        else:
            tuned = scale * features @ spoken.tuned.T
        frozen = None
        if spoken.frozen is not None:
            frozen = np.stack([one.get("frozen", one["features"]) for one in seen])
            frozen = _finite(scale * frozen @ spoken.frozen.T)
        return _finite(tuned), frozen

    def _speak(self, names: tuple[str, ...], note: str | None) -> EncodedClasses:
        known = self._rows(names)
        if self.manifest.sentences is None and known is None:
            unknown = next(name for name in names if self._rows((name,)) is None)
            kind = ClassNamesError if self.manifest.about.get("speaks_of_new_classes") else UnlearnedClassesError
            raise kind(f"class name {unknown!r} was not trained, and {self.manifest.new_names}")
        tuned: Any
        if self.manifest.head == "logits":
            tuned = known
        elif self.manifest.head == "shifted":
            tuned = self._written(names)
        else:
            tuned = self._embedded(names, known, self._classes, self.manifest.sentences)
        frozen = None
        if self.has_zero_shot:
            frozen = self._embedded(names, known, self._zero_shot, self.manifest.zero_shot)
        return EncodedClasses(names, note, tuned, frozen)

    def _rows(self, names: Sequence[str]) -> list[int] | None:
        """The places of the names among the trained ones, equal ones in their order; None if one is not among them."""
        places: dict[str, list[int]] = {}
        for place, name in enumerate(clean_class_names(self.manifest.class_names)):
            places.setdefault(name, []).append(place)
        found = []
        for name in clean_class_names(names):
            if not places.get(name):
                return None
            found.append(places[name].pop(0))
        return found

    def _embedded(
        self, names: Sequence[str], known: list[int] | None, table: Floats | None, sentences: Slots | Templates | None
    ) -> Floats:
        if known is not None and table is not None:
            return table[known]
        if isinstance(sentences, Slots):
            return self._encode_text(*self._padded(self._slotted(names, sentences)))
        if sentences is None:
            raise CheckpointError(f"{self._folder} has neither embeddings nor sentences for {list(names)[:3]}")
        return self._templated(names, sentences)

    def _templated(self, names: Sequence[str], sentences: Templates) -> Floats:
        cleaned = clean_class_names(names)
        total = np.zeros((), np.float32)
        for template in sentences.templates:
            rows = [self._tokenizer.sentence(template.replace("{}", name)) for name in cleaned]
            total = total + self._encode_text(*self._padded([(row, [0] * len(row)) for row in rows]))
        return _unit((total / len(sentences.templates)).astype(np.float32))

    def _name_features(self, names: Sequence[str]) -> Floats:
        return self._templated(names, NAME_TEMPLATE)

    def _written(self, names: Sequence[str]) -> tuple[Integers, Integers]:
        if not isinstance(self.manifest.sentences, Slots):
            raise CheckpointError(
                f"{self._folder}: classes that depend on the image need sentences with learned tokens"
            )
        return self._padded(self._slotted(names, self.manifest.sentences))

    def _slotted(self, names: Sequence[str], sentences: Slots) -> list[tuple[list[int], list[int]]]:
        """Ids of each sentence, and which learned token (from 1; 0 none) stands at each of its places.

        As `maple.prompts.write_sentences` does.
        """
        length = sentences.length
        words = sentences.words or " ".join([_PLACEHOLDER] * length)
        rows = []
        for name in clean_class_names(names):
            ids = self._tokenizer.sentence(f"{words} {name}.")
            order = list(range(1, 1 + length))
            slots = [0, *order, *[0] * (len(ids) - 1 - length)]
            if sentences.position != "end":
                before = length // 2 if sentences.position == "middle" else 0
                count = len(self._tokenizer.words(name))
                for row in (ids, slots):
                    prompt, own = row[1 : 1 + length], row[1 + length : 1 + length + count]
                    row[1 : 1 + length + count] = [*prompt[:before], *own, *prompt[before:]]
            rows.append((ids, slots))
        return rows

    @staticmethod
    def _padded(rows: Sequence[tuple[list[int], list[int]]]) -> tuple[Integers, Integers]:
        """Ids and slots [C, T] of sentences, T the longest."""
        longest = max(len(ids) for ids, _ in rows)
        both = np.zeros((2, len(rows), longest), np.int64)
        for number, row in enumerate(rows):
            for which in (0, 1):
                both[which, number, : len(row[which])] = row[which]
        return both[0], both[1]

    def _encode_text(self, ids: Integers, slots: Integers, **more: Floats) -> Floats:
        """Unit features [C, D] of sentences [C, T]."""
        found = []
        for start in range(0, len(ids), _SENTENCES_AT_ONCE):
            part = slice(start, start + _SENTENCES_AT_ONCE)
            found.append(self._run(self._text, {"ids": ids[part], "slots": slots[part], **self._shifts(), **more})[0])
        return np.concatenate(found)

    def _shifts(self) -> dict[str, Floats]:
        """The shift of sentences that no image belongs to, where the text graph takes one."""
        taken = next((one for one in self._text.get_inputs() if one.name == "shift"), None)
        return {} if taken is None else {"shift": np.zeros(taken.shape, np.float32)}

    def _shifted(self, written: tuple[Integers, Integers], shift: Floats) -> Floats:
        return self._encode_text(*written, shift=shift)

    def _run(self, session: Any, inputs: Mapping[str, Any]) -> list[Floats]:
        from onnxruntime.capi.onnxruntime_pybind11_state import Fail, RuntimeException

        try:
            found: list[Floats] = session.run(None, dict(inputs))
        except (Fail, RuntimeException) as error:
            raise BackboneError(f"{self._folder} cannot be computed: {first_line(error)}") from error
        return [_finite(values) for values in found]


def _session(path: Path, device: str | None) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise ConfigError(
            "an exported method runs on onnxruntime, which is not installed: pip install 'maple-clip[onnx]'"
        ) from error
    kind = (device or "cpu").partition(":")[0]
    if kind not in _PROVIDERS or _PROVIDERS[kind] not in onnxruntime.get_available_providers():
        there = [name for name, one in _PROVIDERS.items() if one in onnxruntime.get_available_providers()]
        raise ConfigError(f"device {device!r}: this onnxruntime computes an exported method on {', '.join(there)} only")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # Told how many, it does not try to bind threads to processors that this process may not use.
    options.intra_op_num_threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=[_PROVIDERS[kind]])
    except Exception as error:
        raise CheckpointError(f"{path} cannot be opened ({first_line(error)[:200]}); export the run again") from error


def _computed_by(session: Any) -> str:
    import onnxruntime

    return f"onnxruntime {onnxruntime.__version__} ({', '.join(session.get_providers())})"


def _table(folder: Path, name: str, manifest: Manifest) -> Floats:
    """The class embeddings [C, D] in a file."""
    try:
        found = np.load(folder / name, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / name} is unreadable or damaged ({error}); export the run again") from error
    if found.ndim != 2 or len(found) != len(manifest.class_names):
        raise CheckpointError(
            f"{folder / name} has shape {list(found.shape)}, but there are {len(manifest.class_names)} classes; export "
            "the run again"
        )
    table: Floats = found.astype(np.float32)
    return table


def _unit(features: Floats) -> Floats:
    lengths = np.linalg.norm(features, axis=-1, keepdims=True)
    found: Floats = (features / np.maximum(lengths, 1e-12)).astype(np.float32)
    return found


def _finite(values: Floats) -> Floats:
    if not np.isfinite(values).all():
        raise BackboneError("a result is not finite; export the run again, without --int8")
    return values


def _probabilities(logits: Floats) -> Floats:
    found = np.empty(logits.shape, np.float32)
    if len(logits):
        found[:] = softmax(logits)
    return found
