"""Predictions of a trained method on PyTorch, with those of the frozen CLIP if requested."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from maple.checkpoint import load_prompts, read_prompts
from maple.clip import Backbone
from maple.data import EvalView, template_of
from maple.data.bundled import TEMPLATE
from maple.distributed import choose_device
from maple.errors import BackboneError, CheckpointError
from maple.feature_files import FeatureRows
from maple.inference.predictor import EncodedClasses, Floats, Predictor
from maple.methods import METHODS, ZERO_SHOT, Method, build_method
from maple.names import is_hub_id, repository_of
from maple.prompts import TemplateClasses, l2_normalize

_Encoded = tuple[Tensor, Tensor | None]


class TorchPredictor(Predictor):
    """A trained method on PyTorch, with the frozen CLIP if requested.

    Args:
        method: the trained method; its class names stay those of the training.
        template: the sentence of the frozen CLIP, with one {} for the class name.
        info: the training information of a prompts file, for `about`.

    Raises:
        ConfigError: the template does not have exactly one {}.

    Example:
        >>> predictor = TorchPredictor.load("runs/pets", zero_shot=True, device="cpu")
        >>> predictor.set_class_names(["red car", "blue car"])
        '2 of 2 class names were not trained (red car, blue car)'
        >>> predictions = list(predictor.stream(find_images(["photos"])))
    """

    def __init__(
        self,
        method: Method,
        *,
        zero_shot: bool = False,
        template: str = TEMPLATE,
        info: Mapping[str, Any] | None = None,
    ) -> None:
        self.method = method.eval()
        backbone = method.backbone
        name_classes = TemplateClasses(backbone, [TEMPLATE])

        @torch.no_grad()
        def name_features(names: Sequence[str]) -> Floats:
            return name_classes.features_of(names).cpu().numpy()

        super().__init__(
            method.class_names,
            preprocess=EvalView.from_preprocessing(backbone.preprocessing),
            has_zero_shot=zero_shot,
            about={**describe(method, info or {}), "computed_by": f"PyTorch on {backbone.device}"},
            name_features=name_features,
        )
        # Of small images more at once, so that the time of a call does not matter: 100 of 64 pixels, 32 of 224.
        self.batch_size = min(100, max(32, 2**19 // backbone.preprocessing.size**2))
        self.device_type = backbone.device.type
        settings = {"name": ZERO_SHOT, "templates": [template]}
        self._frozen = build_method(settings, backbone, method.class_names) if zero_shot else None

    @classmethod
    def load(
        cls,
        run: str | Path,
        *,
        zero_shot: bool = False,
        device: str | None = None,
        precision: str | None = None,
        **clip: Any,
    ) -> Self:
        """Load a finished run's folder, a prompts file, or `hub:OWNER/NAME`.

        The frozen CLIP uses the template of the run's data set, or "a photo of a {}.".

        Args:
            precision: `fp32`, `bf16` or `fp16`; by default that of training.
            clip: `backbone`, `pretrained` and `trust_backbone`, as in `maple.load_prompts`.

        Raises:
            MapleError: not a finished run, an unreadable file, no such device, or a backbone that cannot be loaded.
        """
        path = prompts_file(run)
        info = read_prompts(path).info
        method = load_prompts(path, device=choose_device(device), precision=precision, **clip)
        return cls(method, zero_shot=zero_shot, template=zero_shot_template(info), info=info)

    @torch.no_grad()
    def encode_images(self, images: Floats) -> list[_Encoded]:
        """Encode preprocessed images [B, 3, R, R]: unit features [D] of the method, and of the frozen CLIP or None."""
        inputs = torch.from_numpy(images).to(self.method.backbone.device)
        if self.method.accepts_features:
            # The method leaves the image tower as it is, so one pass through it serves both.
            inputs = self.method.image_features_raw(inputs)
        return self._encode(inputs)

    @torch.no_grad()
    def encode_features(self, features: Tensor) -> list[_Encoded]:
        return self._encode(features.to(self.method.backbone.device))

    def require_rows(self, rows: FeatureRows) -> None:
        from maple.runs.frozen_features import require_features

        require_features(self.method, rows.features.shape[1], rows.backbone, rows.source)

    def _encode(self, inputs: Tensor) -> list[_Encoded]:
        backbone = self.method.backbone
        trained = finite(self.method.encode_images(inputs), backbone)
        if self._frozen is None:
            return [(features, None) for features in trained]
        frozen = l2_normalize(inputs) if inputs.ndim == 2 else self._frozen.encode_images(inputs)
        return list(zip(trained, finite(frozen, backbone), strict=True))

    @torch.no_grad()
    def probabilities(self, encoded: Sequence[_Encoded], classes: EncodedClasses) -> tuple[Floats, Floats | None]:
        def softmax(method: Method, features: list[Tensor]) -> Floats:
            if not features:
                return torch.empty(0, len(classes.names)).numpy()
            logits = finite(method.logits_of(torch.stack(features)).float(), method.backbone)
            return (logits / method.temperature).softmax(dim=-1).cpu().numpy()

        trained = softmax(classes.trained, [features for features, _ in encoded])
        if classes.zero_shot is None:
            return trained, None
        return trained, softmax(classes.zero_shot, [features for _, features in encoded if features is not None])

    @torch.no_grad()
    def _encode_class_names(self, names: tuple[str, ...], note: str | None) -> EncodedClasses:
        trained = self.method.with_class_names(names)
        if not trained.classes_depend_on_image:
            trained.class_embeddings()
        return EncodedClasses(names, note, trained, self._frozen and self._frozen.with_class_names(names))


def describe(method: Method, info: Mapping[str, Any]) -> dict[str, Any]:
    """Describe a method for people and programs, with `info`, the training information of its prompts file."""
    backbone = method.backbone
    calibrated = {} if method.temperature == 1 else {"temperature": method.temperature}
    return {
        "method": METHODS.name_of(type(method)) or type(method).__name__,
        "title": method.title,
        "backbone": backbone.name,
        "pretrained": backbone.pretrained,
        "fingerprint": backbone.fingerprint,
        "precision": backbone.precision,
        "dataset": _dataset_of(info),
        "image_size": backbone.preprocessing.size,
        # A key of manifests and of the server's answers: it keeps the name it was published with.
        "speaks_of_new_classes": method.supports_new_classes,
        **calibrated,
    }


def prompts_file(run: str | Path) -> Path:
    """The prompts file of a run: the file itself, that of a finished run's folder, or of `hub:OWNER/NAME`.

    Raises:
        CheckpointError: there is none.
    """
    if (repository := repository_of(str(run))) is not None:
        from maple.inference.hub import fetch_prompts

        return fetch_prompts(repository)
    path = Path(run).expanduser()
    if not path.exists():
        hint = f"; a repository of the hub is written hub:{run}" if is_hub_id(str(run)) else ""
        raise CheckpointError(f"there is no run folder or prompts file {path}{hint}")
    if path.is_file():
        return path
    if (prompts := path / "prompts.safetensors").is_file():
        return prompts
    # Only to say what is missing: the packages of training take seconds to import.
    from maple.runs import finished_prompts

    return finished_prompts(path)


def zero_shot_template(info: Mapping[str, Any]) -> str:
    """The zero-shot template of the data set in a prompts file's training information, or "a photo of a {}."."""
    dataset = _dataset_of(info)
    return (template_of(dataset) if isinstance(dataset, str) else None) or TEMPLATE


def finite(values: Tensor, backbone: Backbone) -> Tensor:
    """Return the values; a BackboneError is raised if one is infinite or NaN."""
    if not bool(values.isfinite().all()):
        raise BackboneError(
            f"a result is not finite, in {backbone.precision} on {backbone.device}; load the backbone in fp32"
        )
    return values


def _dataset_of(info: Mapping[str, Any]) -> Any:
    data = info.get("data")
    return data.get("dataset") if isinstance(data, dict) else info.get("dataset")
