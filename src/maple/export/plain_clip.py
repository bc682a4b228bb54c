"""A method as a plain CLIP checkpoint and a zero-shot head: exact where the image tower is that of CLIP.

Learned tokens in the text tower only decide the class embeddings, which are the head. Learned tokens in the image
tower, or a network after it, are no weights of a plain CLIP.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from open_clip.transformer import QuickGELU
from torch import Tensor

from maple import __version__
from maple.checkpoint import save_safetensors
from maple.clip import load_clip
from maple.errors import ExportError, MapleError
from maple.export.check import largest_difference, require_equal
from maple.export.graphs import head_of, leaves_images_alone
from maple.export.source import Source
from maple.export.transformers_layout import to_transformers, transformers_config, write_tokenizer
from maple.inference.manifest import MERGES
from maple.inference.predictor import Floats
from maple.prompts import l2_normalize, to_float32

HEAD = "zero_shot_head.safetensors"
HEAD_NAMES = "zero_shot_head.json"


def write_plain_clip(source: Source, folder: Path, kind: str) -> float:
    """Write the CLIP in the format `kind` (openclip or transformers) and its head; return the difference of logits.

    Raises:
        ExportError: no plain CLIP can hold the method, or the format not this backbone, or the result differs.
    """
    _refuse_what_is_no_plain_clip(source, kind)
    model = source.method.backbone.model
    config = _config(source, kind)
    state = {name: value.detach().contiguous().clone() for name, value in model.state_dict().items()}
    state.pop("attn_mask", None)
    if kind == "openclip":
        _write_json(folder / "open_clip_config.json", {"model_cfg": config, "preprocess_cfg": _preprocess(source)})
        save_safetensors(state, folder / "open_clip_model.safetensors")
    else:
        _write_json(folder / "config.json", transformers_config(config, float(model.logit_scale)))
        _write_json(folder / "preprocessor_config.json", _processor(source))
        save_safetensors(to_transformers(state), folder / "model.safetensors", {"format": "pt"})
        write_tokenizer(Path(open_clip.__file__).parent / MERGES, folder, config["text_cfg"]["context_length"])
    embeddings = source.method.class_embeddings().contiguous()
    scale = torch.tensor(source.method.backbone.logit_scale)
    save_safetensors({"class_embeddings": embeddings, "logit_scale": scale}, folder / HEAD)
    difference = _checked(source, folder, kind, embeddings)
    description = {
        "maple": __version__,
        "about": {**source.about, "precision": "fp32"},
        "class_names": list(source.method.class_names),
        "maximal_difference": difference,
    }
    _write_json(folder / HEAD_NAMES, description)
    return difference


def _refuse_what_is_no_plain_clip(source: Source, kind: str) -> None:
    method = source.method
    instead = "use --format onnx, or torchscript"
    if method.vision_prompts():
        raise ExportError(
            f"{method.title} has learned tokens in the image tower, which are no weights of a plain CLIP, so "
            f"{kind} cannot hold it; {instead}"
        )
    if method.classes_depend_on_image:
        raise ExportError(
            f"{method.title}: its classes depend on the image, so {kind} cannot hold it; use --format onnx"
        )
    if not leaves_images_alone(method) or head_of(method) != "cosine":
        raise ExportError(
            f"{method.title} computes more than the cosines of a plain CLIP, so {kind} cannot hold it; {instead}"
        )
    backbone = method.backbone
    refusal = backbone.text.obstacle or backbone.image.obstacle
    if refusal is not None or not backbone.uses_clip_tokenizer:
        raise ExportError(
            f"{kind}: this backbone is no CLIP with two plain transformers and CLIP's tokenizer"
            f"{'' if refusal is None else f' ({refusal})'}; {instead}"
        )


def _config(source: Source, kind: str) -> dict[str, Any]:
    """open_clip's configuration of a CLIP, from its weights and blocks."""
    backbone = source.method.backbone
    model = backbone.model
    try:
        image, text = model.visual, model.transformer
        blocks = (image.transformer.resblocks[0], text.resblocks[0])
        heads = [block.attn.num_heads for block in blocks]
        hidden = [block.mlp.c_fc.weight.shape[0] for block in blocks]
        quick = {isinstance(block.mlp.gelu, QuickGELU) for block in blocks}
    except AttributeError as error:
        raise ExportError(
            f"{kind}: this backbone is built otherwise than CLIP ({error}); use --format onnx, or torchscript"
        ) from error
    image_width, text_width = backbone.image.width, backbone.text.width
    return {
        "embed_dim": backbone.embed_dim,
        "quick_gelu": quick == {True},
        "vision_cfg": {
            "image_size": backbone.preprocessing.size,
            "layers": backbone.image.depth,
            "width": image_width,
            "patch_size": int(image.conv1.weight.shape[-1]),
            "head_width": image_width // heads[0],
            "mlp_ratio": hidden[0] / image_width,
        },
        "text_cfg": {
            "context_length": backbone.text.context_length,
            "vocab_size": int(model.token_embedding.weight.shape[0]),
            "width": text_width,
            "heads": heads[1],
            "layers": backbone.text.depth,
            "mlp_ratio": hidden[1] / text_width,
        },
    }


def _preprocess(source: Source) -> dict[str, Any]:
    seen = source.method.backbone.preprocessing
    return {"mean": seen.mean, "std": seen.std, "interpolation": seen.interpolation, "resize_mode": "shortest"}


def _processor(source: Source) -> dict[str, Any]:
    seen = source.method.backbone.preprocessing
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": seen.size},
        "resample": {"bilinear": 2, "bicubic": 3}[seen.interpolation],
        "do_center_crop": True,
        "crop_size": {"height": seen.size, "width": seen.size},
        "do_rescale": True,
        "do_normalize": True,
        "image_mean": seen.mean,
        "image_std": seen.std,
        "do_convert_rgb": True,
    }


def _checked(source: Source, folder: Path, kind: str, embeddings: Tensor) -> float:
    """Load the folder as anybody would, and compare."""
    try:
        loaded = load_clip(str(folder))
    except MapleError as error:
        raise ExportError(f"{kind}: what was written cannot be loaded again ({error})") from error
    if loaded.fingerprint != source.method.backbone.fingerprint:
        raise ExportError(f"{kind}: this backbone has weights that the format does not hold; use --format onnx")

    @torch.no_grad()
    def logits(views: Floats) -> Floats:
        features = l2_normalize(to_float32(loaded.image.plain(torch.from_numpy(views))))
        return np.asarray((loaded.logit_scale * features @ embeddings.T).numpy())

    difference = largest_difference(source, logits, source.method, source.method.class_names)
    require_equal(difference, f"the {kind} folder")
    return difference


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
