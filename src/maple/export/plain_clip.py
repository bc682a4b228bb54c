"""A method as a plain CLIP checkpoint and a zero-shot head: exact where the image tower is one of a plain CLIP.

Learned tokens in the text tower only change the class embeddings, which are the head. What changes weights alone is
merged into them. Learned tokens in the image tower, or a network after it, are not weights of a plain CLIP.
"""

import io
import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from tokenizers.models import BPE
from torch import Tensor, nn

from maple import __version__
from maple.checkpoint import save_safetensors
from maple.clip.backbone import Preprocessing, fingerprint
from maple.clip.checkpoints.formats import HEAD_WIDTH, OPENAI_EXTRAS
from maple.clip.checkpoints.transformers_format import transformers_name
from maple.clip.load import load_backbone
from maple.clip.plain_model import is_quick_gelu
from maple.clip_tokenizer import read_vocabulary
from maple.data.images.eval_transform import RESAMPLING
from maple.errors import ExportError, MapleError
from maple.export.export_source import ExportSource
from maple.export.graphs import head_of, innermost
from maple.export.merged import merge, merges, new_names_on, notes_on, unmergeable
from maple.export.parity_check import NEW_NAMES, largest_difference, require_parity
from maple.inference.manifest import MERGES
from maple.inference.predictor import Floats
from maple.methods import Method
from maple.prompts import l2_normalize, to_float32

_ENDS = ("<|startoftext|>", "<|endoftext|>")


def to_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights under transformers' names; those of packed attention in three parts."""
    renamed: dict[str, Tensor] = {}
    for key, value in state.items():
        name = transformers_name(key)
        packed = re.fullmatch(r"(.*)\.attn\.in_proj_(weight|bias)", name)
        if packed:
            for letter, part in zip("qkv", value.chunk(3), strict=True):
                renamed[f"{packed[1]}.self_attn.{letter}_proj.{packed[2]}"] = part.contiguous()
        elif key == "text_projection":
            renamed["text_projection.weight"] = value.T.contiguous()
        elif key == "visual.proj":
            renamed["visual_projection.weight"] = value.T.contiguous()
        else:
            renamed[name] = value
    return renamed


def transformers_config(config: Mapping[str, Any], logit_scale: float) -> dict[str, Any]:
    """The content of config.json, from open_clip's configuration and the logarithm of the logit scale."""
    vision, text = config["vision_cfg"], config["text_cfg"]
    activation = "quick_gelu" if config["quick_gelu"] else "gelu"
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": config["embed_dim"],
        "logit_scale_init_value": logit_scale,
        "text_config": {
            "model_type": "clip_text_model",
            "hidden_size": text["width"],
            "intermediate_size": round(text["width"] * text["mlp_ratio"]),
            "num_hidden_layers": text["layers"],
            "num_attention_heads": text["heads"],
            "max_position_embeddings": text["context_length"],
            "vocab_size": text["vocab_size"],
            "projection_dim": config["embed_dim"],
            "hidden_act": activation,
            "layer_norm_eps": 1e-5,
            "bos_token_id": text["vocab_size"] - 2,
            "eos_token_id": text["vocab_size"] - 1,
            "pad_token_id": text["vocab_size"] - 1,
        },
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": vision["width"],
            "intermediate_size": round(vision["width"] * vision["mlp_ratio"]),
            "num_hidden_layers": vision["layers"],
            "num_attention_heads": vision["width"] // vision["head_width"],
            "image_size": vision["image_size"],
            "patch_size": vision["patch_size"],
            "projection_dim": config["embed_dim"],
            "hidden_act": activation,
            "layer_norm_eps": 1e-5,
        },
    }


def image_processor_config(preprocessing: Preprocessing) -> dict[str, Any]:
    """The content of preprocessor_config.json; ExportError if transformers cannot prepare images in this way."""
    size, resized = preprocessing.size, preprocessing.resize_size or preprocessing.size
    if preprocessing.resize == "longest" or preprocessing.fill:
        raise ExportError(
            f"transformers: this backbone's images are resized by their longer side and filled with "
            f"{preprocessing.fill}, which transformers' processor does not do; use format=onnx or openclip"
        )
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": preprocessing.resize != "none",
        "size": {"shortest_edge": resized}
        if preprocessing.resize != "squash"
        else {"height": resized, "width": resized},
        "resample": int(RESAMPLING[preprocessing.interpolation]),
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "do_normalize": True,
        "image_mean": preprocessing.mean,
        "image_std": preprocessing.std,
        "do_convert_rgb": True,
    }


def write_tokenizer(merges: Path, folder: Path, context_length: int) -> None:
    """Write vocab.json, merges.txt and tokenizer_config.json of CLIP's tokenizer, from its published merges."""
    vocabulary, pairs = read_vocabulary(merges, _ENDS)
    BPE(vocabulary, pairs, end_of_word_suffix="</w>").save(str(folder))
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": context_length,
        "bos_token": _ENDS[0],
        "eos_token": _ENDS[1],
        "unk_token": _ENDS[1],
        "pad_token": _ENDS[1],
        "do_lower_case": True,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")


HEAD = "zero_shot_head.safetensors"
HEAD_NAMES = "zero_shot_head.json"


OPENAI_FILE = "clip.pt"


def write_plain_clip(source: ExportSource, folder: Path, kind: str) -> tuple[float, str | None, list[str]]:
    """Write the CLIP in the format `kind` (openclip, transformers or openai) and its head.

    Returns:
        The largest difference of logits; why new names cannot be used, or None; and what the user should know.

    Raises:
        ExportError: a plain CLIP cannot hold the method, or the format not this backbone, or the result differs.
    """
    method = source.method
    _require_plain_clip(method, kind)
    config = _open_clip_config(source, kind)
    state = {name: value.detach().contiguous().clone() for name, value in method.backbone.model.state_dict().items()}
    is_merged = merges(method)
    if is_merged:
        merge(method, state)
    expected = fingerprint(state)
    state.pop("attn_mask", None)
    _write_weights(source, state, config, folder, kind)
    embeddings = method.class_embeddings().contiguous()
    scale = torch.tensor(method.logit_scale / method.temperature)
    save_safetensors({"class_embeddings": embeddings, "logit_scale": scale}, folder / HEAD)
    # Load the folder as a user would, and compare.
    try:
        written = folder / OPENAI_FILE if kind == "openai" else folder
        loaded = load_backbone(str(written), None, precision="fp32", device="cpu")
    except MapleError as error:
        raise ExportError(f"{kind}: the written folder cannot be loaded ({error})") from error
    if loaded.fingerprint != expected:
        raise ExportError(f"{kind}: this backbone has weights that the format does not hold; use format=onnx")

    @torch.no_grad()
    def logits(images: Floats) -> Floats:
        features = l2_normalize(to_float32(loaded.image.plain(torch.from_numpy(images))))
        return np.asarray((scale * features @ embeddings.T).numpy())

    difference = largest_difference(source, logits, method, method.class_names)
    refusal: str | None = "its head holds their embeddings; other names would be plain CLIP's"
    notes: list[str] = []
    if is_merged and method.supports_new_classes:
        others = new_names_on(loaded, method, NEW_NAMES)

        def new_logits(images: Floats) -> Floats:
            return np.asarray(others.predict_logits(torch.from_numpy(images)).numpy())

        difference = max(difference, largest_difference(source, new_logits, method, NEW_NAMES))
        refusal, notes = None, notes_on(method, source.precision)
    require_parity(difference, f"the {kind} folder")
    description = {
        "maple": __version__,
        "about": {**source.about, "precision": "fp32"},
        "class_names": list(method.class_names),
        "maximal_difference": difference,
        "merged": is_merged,
        "notes": notes,
    }
    _write_json(folder / HEAD_NAMES, description)
    return difference, refusal, notes


def _write_weights(
    source: ExportSource, state: dict[str, Tensor], config: Mapping[str, Any], folder: Path, kind: str
) -> None:
    """Write a state dict in open_clip's layout, and the files that the format has next to it."""
    seen = source.method.backbone.preprocessing
    context_length = config["text_cfg"]["context_length"]
    if kind == "openclip":
        if seen.resize == "none" or seen.resize_size or seen.interpolation not in ("bicubic", "bilinear"):
            raise ExportError(
                f"openclip: this backbone's images are resized to {seen.resize_size or seen.size} pixels "
                f"({seen.resize}, {seen.interpolation}) and cut to {seen.size}, which open_clip does not do; use "
                "format=onnx or transformers"
            )
        preprocess: dict[str, Any] = {"mean": seen.mean, "std": seen.std, "interpolation": seen.interpolation}
        preprocess |= {"resize_mode": seen.resize, "fill_color": seen.fill}
        content = {"model_cfg": config, "preprocess_cfg": preprocess}
        _write_json(folder / "open_clip_config.json", content)
        save_safetensors(state, folder / "open_clip_model.safetensors")
    elif kind == "openai":
        sizes = (config["vision_cfg"]["image_size"], context_length, config["text_cfg"]["vocab_size"])
        extras = dict(zip(OPENAI_EXTRAS, map(torch.tensor, sizes), strict=True))
        buffer = io.BytesIO()  # an error of the disk is then Python's
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch announces the end of torch.jit
            # As OpenAI publishes its models: `clip.load` cannot read a state dict (openai/CLIP#396).
            torch.jit.save(torch.jit.script(TensorTree({**state, **extras}).eval()), buffer)
        (folder / OPENAI_FILE).write_bytes(buffer.getbuffer())
    else:
        _write_json(folder / "config.json", transformers_config(config, float(state["logit_scale"])))
        _write_json(folder / "preprocessor_config.json", image_processor_config(seen))
        save_safetensors(to_transformers(state), folder / "model.safetensors", {"format": "pt"})
        write_tokenizer(Path(open_clip.__file__).parent / MERGES, folder, context_length)


class TensorTree(nn.Module):
    """Modules that do nothing but own tensors under given names.

    Example:
        >>> list(TensorTree({"visual.proj": torch.zeros(768, 512)}).state_dict())
        ['visual.proj']
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        below: dict[str, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            first, _, rest = key.partition(".")
            if rest:
                below.setdefault(first, {})[rest] = value
            elif value.is_floating_point():
                self.register_parameter(first, nn.Parameter(value, requires_grad=False))
            else:
                self.register_buffer(first, value)
        for name, inner in below.items():
            self.add_module(name, TensorTree(inner))


def _require_plain_clip(method: Method, kind: str) -> None:
    """Refuse methods and backbones that a plain CLIP with a zero-shot head cannot represent."""
    instead = "use format=onnx, or torchscript"
    if learned := unmergeable(method.vision_edits()):
        problem = f"has learned something in the image tower that is not weights of a plain CLIP ({learned})"
        raise ExportError(f"{method.title} {problem}, so {kind} cannot hold it; {instead}")
    if method.classes_depend_on_image:
        problem = "its classes depend on the image"
        raise ExportError(f"{method.title}: {problem}, so {kind} cannot hold it; use format=onnx")
    is_plain = type(innermost(method)).encode_images is Method.encode_images and head_of(method) == "cosine"
    if not is_plain or method.class_embeddings().shape[1] != method.backbone.embed_dim:
        problem = "computes more than the cosines of a plain CLIP"
        raise ExportError(f"{method.title} {problem}, so {kind} cannot hold it; {instead}")
    if method.vision_edits() and (learned := unmergeable(method.text_edits())):
        problem = f"has merged the image tower, but learned something else in the text tower ({learned})"
        raise ExportError(f"{method.title} {problem}, so {kind} cannot hold it; {instead}")
    backbone = method.backbone
    obstacle = backbone.text.obstacle or backbone.image.obstacle
    if obstacle is not None or not backbone.uses_clip_tokenizer:
        problem = "this backbone is not a CLIP with two plain transformers and CLIP's tokenizer"
        raise ExportError(f"{kind}: {problem}{'' if obstacle is None else f' ({obstacle})'}; {instead}")


def _open_clip_config(source: ExportSource, kind: str) -> dict[str, Any]:
    """open_clip's configuration of a CLIP, from its weights and blocks."""
    backbone = source.method.backbone
    model = backbone.model
    try:
        image, text = model.visual, model.transformer
        blocks = (image.transformer.resblocks[0], text.resblocks[0])
        heads = [block.attn.num_heads for block in blocks]
        hidden = [block.mlp.c_fc.weight.shape[0] for block in blocks]
        quick = {is_quick_gelu(block.mlp.gelu) for block in blocks}
    except AttributeError as error:
        problem = f"this backbone is not built like CLIP ({error})"
        raise ExportError(f"{kind}: {problem}; use format=onnx, or torchscript") from error
    image_width, text_width = backbone.image.width, backbone.text.width
    if kind == "openai":
        _require_openai(source, heads, hidden, is_quick=quick == {True})
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


def _require_openai(source: ExportSource, heads: list[int], hidden: list[int], *, is_quick: bool) -> None:
    """Refuse a CLIP whose description OpenAI's loader would guess wrongly: the format has nothing but weights."""
    backbone = source.method.backbone
    widths, seen = [backbone.image.width, backbone.text.width], backbone.preprocessing
    problem = ""
    if [HEAD_WIDTH * count for count in heads] != widths or [4 * width for width in widths] != hidden:
        problem = f"heads that are not {HEAD_WIDTH} wide, or MLPs that are not four times as wide as the towers"
    elif not is_quick:
        problem = "another activation than QuickGELU"
    elif replace(seen, crop_offset="rounded", resize_size=seen.resize_size or seen.size) != Preprocessing(
        seen.size, OPENAI_DATASET_MEAN, OPENAI_DATASET_STD, resize_size=seen.size
    ):
        problem = "another preprocessing than OpenAI's"
    if problem:
        raise ExportError(
            f"openai: this backbone has {problem}, and the format stores weights alone; use format=openclip, or "
            "transformers"
        )


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
