"""One small random CLIP, and every way in which people save one."""

import json
import warnings
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from maple.clip.initialisation import uninitialised
from maple.export.plain_clip import TensorTree

State = dict[str, Tensor]

CONFIG: dict[str, Any] = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 32, "layers": 3, "width": 128, "patch_size": 8, "head_width": 64},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 2},
}
SENTENCES = ["a photo of a cat.", "two dogs", "A very, very long-haired guinea pig!"]
PREPROCESS = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.25], "interpolation": "bilinear"}


@cache
def tokenizer(context_length: int = 77) -> open_clip.SimpleTokenizer:
    return open_clip.SimpleTokenizer(context_length=context_length)


def images(size: int = 32) -> Tensor:
    return torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(5))


def changed(**changes: Any) -> dict[str, Any]:
    """CONFIG with other entries; `vision` and `text` update those parts."""
    vision, text = changes.pop("vision", {}), changes.pop("text", {})
    parts = {"vision_cfg": {**CONFIG["vision_cfg"], **vision}, "text_cfg": {**CONFIG["text_cfg"], **text}}
    return {**CONFIG, **parts, **changes}


def shaken(model: nn.Module, seed: int = 3) -> nn.Module:
    """Fill every tensor with noise: norms and biases too, or a swapped one would go unnoticed."""
    numbers = torch.randn(99_991, generator=torch.Generator().manual_seed(seed))  # a prime: no two rows are alike
    for name, value in model.state_dict().items():
        if not value.is_floating_point():
            continue
        numbers = numbers.roll(1009)
        noise = numbers.repeat(value.numel() // len(numbers) + 1)[: value.numel()].reshape(value.shape)
        if "running_var" in name or (name.rpartition(".")[2] == "weight" and value.ndim == 1):
            value.copy_(1 + 0.1 * noise.abs())
        elif "logit" in name:
            value.fill_(2.5)
        else:
            value.copy_(noise * (0.05 if value.ndim > 1 else 0.1))
    return model.eval()


def random_state(config: Mapping[str, Any] = CONFIG) -> State:
    with torch.random.fork_rng(devices=[]), uninitialised():
        model = open_clip.CLIP(**config)
    return {key: value.detach().clone() for key, value in shaken(model).state_dict().items()}


def logits(backbone: Any) -> Tensor:
    """Scaled cosines of `images` and SENTENCES, through the plain towers."""
    with torch.no_grad():
        seen = backbone.image.plain(images(backbone.preprocessing.size)).float()
        read = backbone.text.plain(backbone.tokenize(SENTENCES)).float()
    unit = nn.functional.normalize
    result: Tensor = backbone.logit_scale * unit(seen, dim=-1) @ unit(read, dim=-1).T
    return result


def expected_logits(state: State, *, quick_gelu: bool, config: Mapping[str, Any] = CONFIG) -> Tensor:
    """What open_clip computes with these weights, our loader left aside."""
    with torch.random.fork_rng(devices=[]), uninitialised():
        model = open_clip.CLIP(**{**config, "quick_gelu": quick_gelu})
    model.load_state_dict(state)
    with torch.no_grad():
        result: Tensor = model.eval().get_logits(images(), tokenizer()(SENTENCES))[0]
    return result


class _Tree(TensorTree):
    def forward(self, numbers: Tensor) -> Tensor:
        return numbers * self.logit_scale


OPENAI_SIZES = {
    "input_resolution": torch.tensor(32),
    "context_length": torch.tensor(77),
    "vocab_size": torch.tensor(49408),
}


def save_torchscript(state: State, path: Path) -> Path:
    """OpenAI's own form: an archive whose state dict holds three sizes beside the weights."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is on its way out
        torch.jit.trace(_Tree({**state, **OPENAI_SIZES}).eval(), torch.zeros(1)).save(str(path))
    return path


def save_pickle(content: Any, path: Path) -> Path:
    torch.save(content, path)
    return path


def save_safetensors(state: Mapping[str, Tensor], path: Path) -> Path:
    save_file({key: value.contiguous() for key, value in state.items()}, path)
    return path


def save_open_clip(
    state: State, folder: Path, *, weights: str = "open_clip_model.safetensors", config: Mapping[str, Any] = CONFIG
) -> Path:
    folder.mkdir(parents=True)
    described = {"model_cfg": config, "preprocess_cfg": PREPROCESS}
    (folder / "open_clip_config.json").write_text(json.dumps(described))
    (save_safetensors if weights.endswith(".safetensors") else save_pickle)(state, folder / weights)
    return folder


def transformers_config(
    activation: str, *, vision: Mapping[str, Any] | None = None, text: Mapping[str, Any] | None = None
) -> Any:
    from transformers import CLIPConfig

    vision_config = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 2}
    text_config = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 1}
    both = {"hidden_act": activation, "projection_dim": 64}
    return CLIPConfig(
        vision_config={**vision_config, "image_size": 32, "patch_size": 8, **both, **(vision or {})},
        text_config={**text_config, **both, "eos_token_id": 49407, "bos_token_id": 49406, **(text or {})},
        projection_dim=64,
    )


def save_transformers(state: State, folder: Path, activation: str, *, shard: str = "5GB") -> Path:
    """Write with transformers itself, so that its own layout is what is tested."""
    from transformers import CLIPModel

    model = CLIPModel(transformers_config(activation))
    model.load_state_dict(_to_transformers(state))
    model.save_pretrained(folder, max_shard_size=shard)
    settings = {"image_mean": PREPROCESS["mean"], "image_std": PREPROCESS["std"], "resample": 2}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


def _to_transformers(state: State) -> State:
    names = {
        "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
        "positional_embedding": "text_model.embeddings.position_embedding.weight",
        "visual.class_embedding": "vision_model.embeddings.class_embedding",
        "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
        "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
        "logit_scale": "logit_scale",
    }
    prefixes = {
        "ln_final.": "text_model.final_layer_norm.",
        "visual.ln_pre.": "vision_model.pre_layrnorm.",
        "visual.ln_post.": "vision_model.post_layernorm.",
        "transformer.resblocks.": "text_model.encoder.layers.",
        "visual.transformer.resblocks.": "vision_model.encoder.layers.",
    }
    inside = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "c_fc": "fc1", "c_proj": "fc2", "attn": "self_attn"}
    result: State = {"text_projection.weight": state["text_projection"].T.contiguous()}
    result["visual_projection.weight"] = state["visual.proj"].T.contiguous()
    for key, value in state.items():
        if key in ("text_projection", "visual.proj"):
            continue
        name = names.get(key, key)
        for prefix, replacement in prefixes.items():
            if key.startswith(prefix):
                name = replacement + ".".join(inside.get(part, part) for part in key.removeprefix(prefix).split("."))
        if "in_proj_" in name:
            for letter, part in zip("qkv", value.chunk(3), strict=True):
                result[name.replace("in_proj_", f"{letter}_proj.")] = part.contiguous()
        else:
            result[name] = value
    return result
