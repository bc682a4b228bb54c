"""A trained method on PyTorch that answers for pictures, beside the frozen CLIP if wanted."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from maple.checkpoint import load_prompts, read_prompts
from maple.clip import Backbone
from maple.data import EvalView, template_of
from maple.data.emoji import TEMPLATE
from maple.distributed import this_process
from maple.errors import BackboneError, CheckpointError
from maple.inference.hub import PREFIX, fetch_prompts, is_hub_id
from maple.inference.predictor import EncodedClasses, Floats, Predictor
from maple.methods import METHODS, Method, build_method
from maple.prompts import TemplateClasses, l2_normalize
from maple.runs import eval_transform, finished_prompts

_Seen = tuple[Tensor, Tensor | None]


class TorchPredictor(Predictor):
    """A trained method that answers for pictures under any class names, beside the frozen CLIP if wanted.

    Attributes:
        method: the trained method; its class names stay those of the training.
        transform: from an RGB image to the tensor [3, R, R] that its backbone reads.
    """

    def __init__(
        self,
        method: Method,
        *,
        zero_shot: bool = False,
        template: str = TEMPLATE,
        info: Mapping[str, Any] | None = None,
    ) -> None:
        """Answer with `method`, and with the frozen CLIP in `template` beside it if `zero_shot`.

        Args:
            info: what a prompts file says of the training, for `about`.

        Raises:
            ConfigError: the template has not exactly one {}.
        """
        self.method = method.eval()
        backbone = method.backbone
        self.transform = eval_transform(backbone)
        super().__init__(
            method.class_names,
            view=EvalView.from_preprocessing(backbone.preprocessing),
            has_zero_shot=zero_shot,
            about={**about(method, info or {}), "computed_by": f"PyTorch on {backbone.device}"},
            name_features=self._name_features,
        )
        self._names_alone = TemplateClasses(backbone, [TEMPLATE])
        self._frozen: Method | None = None
        if zero_shot:
            description = {"name": "zero_shot", "templates": [template]}
            self._frozen = build_method(description, backbone, method.class_names)

    @classmethod
    def load(cls, run: str | Path, *, zero_shot: bool = False, device: str | None = None) -> Self:
        """Load a finished run's folder, or a prompts file.

        The frozen CLIP speaks the template of the run's data set, or "a photo of a {}.".

        Raises:
            MapleError: no finished run, an unreadable file, no such device, or a backbone that cannot be loaded.
        """
        path = prompts_file(run)
        info = read_prompts(path).info
        method = load_prompts(path, device=this_process(device).device)
        return cls(method, zero_shot=zero_shot, template=template_of_info(info), info=info)

    @torch.no_grad()
    def encode(self, views: Floats) -> list[_Seen]:
        """Unit features of views [B, 3, R, R]: by the method, and by the frozen CLIP if it is there."""
        images = torch.from_numpy(views).to(self.method.backbone.device)
        if self.method.accepts_features:
            # The image tower is the frozen one, so it runs once.
            images = self.method.image_features_raw(images)
        tuned = finite(self.method.encode_images(images), self.method.backbone)
        if self._frozen is None:
            return [(one, None) for one in tuned]
        beside = finite(
            l2_normalize(images) if images.ndim == 2 else self._frozen.encode_images(images), self.method.backbone
        )
        return list(zip(tuned, beside, strict=True))

    @torch.no_grad()
    def probabilities(self, seen: Sequence[_Seen], spoken: EncodedClasses) -> tuple[Floats, Floats | None]:
        """Probabilities [n, C] of n things that `encode` gave, and those of the frozen CLIP; float32."""
        if not seen:
            empty: Floats = torch.empty(0, len(spoken.names)).numpy()
            return empty, None if spoken.frozen is None else empty
        tuned = self._softmax(spoken.tuned, [one for one, _ in seen])
        if spoken.frozen is None:
            return tuned, None
        return tuned, self._softmax(spoken.frozen, [one for _, one in seen if one is not None])

    def _softmax(self, method: Method, features: Sequence[Tensor]) -> Floats:
        logits = method.logits_of(torch.stack(list(features))).float()
        found: Floats = finite(logits, self.method.backbone).softmax(dim=-1).cpu().numpy()
        return found

    @torch.no_grad()
    def _speak(self, names: tuple[str, ...], note: str | None) -> EncodedClasses:
        tuned = self.method.with_class_names(names)
        if not tuned.classes_depend_on_image:
            tuned.class_embeddings()
        return EncodedClasses(
            names, note, tuned, None if self._frozen is None else self._frozen.with_class_names(names)
        )

    @torch.no_grad()
    def _name_features(self, names: Sequence[str]) -> Floats:
        return self._names_alone.of(names).cpu().numpy()


def about(method: Method, info: Mapping[str, Any]) -> dict[str, Any]:
    """What a method is, for people and programs.

    Args:
        info: what its prompts file says of the training.
    """
    data = info.get("data")
    backbone = method.backbone
    return {
        "method": next((name for name, kind in METHODS.items() if kind is type(method)), type(method).__name__),
        "title": method.title,
        "backbone": backbone.name,
        "pretrained": backbone.pretrained,
        "fingerprint": backbone.fingerprint,
        "precision": backbone.precision,
        "dataset": data.get("dataset") if isinstance(data, dict) else info.get("dataset"),
        "image_size": backbone.preprocessing.size,
        "speaks_of_new_classes": method.supports_new_classes,
    }


def prompts_file(run: str | Path) -> Path:
    """The prompts file of a run: the file itself, that of a finished run's folder, or of `hf-hub:OWNER/NAME`.

    Raises:
        CheckpointError: there is none.
    """
    if str(run).startswith(PREFIX):
        return fetch_prompts(str(run).removeprefix(PREFIX))
    path = Path(run).expanduser()
    if not path.exists():
        other = f"; a repository of the hub is written {PREFIX}{run}" if is_hub_id(str(run)) else ""
        raise CheckpointError(f"there is no run folder and no prompts file {path}{other}")
    return path if path.is_file() else finished_prompts(path)


def template_of_info(info: dict[str, Any]) -> str:
    """The zero-shot template of the data set that a prompts file says it was trained on, or CLIP's usual one."""
    data = info.get("data")
    name = data.get("dataset") if isinstance(data, dict) else info.get("dataset")
    return (template_of(name) if isinstance(name, str) else None) or TEMPLATE


def finite(values: Tensor, backbone: Backbone) -> Tensor:
    """The values, all of which must be numbers.

    Raises:
        BackboneError: one is infinite or NaN.
    """
    if not bool(values.isfinite().all()):
        raise BackboneError(
            f"a result is not finite, in {backbone.precision} on {backbone.device}; load the backbone in fp32"
        )
    return values
