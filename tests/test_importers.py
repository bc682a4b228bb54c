"""Published checkpoints: read without running them, and converted without loss."""

import os
import pickle
import sys
import types
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from maple.archives import Placeholder, read_checkpoint
from maple.checkpoint import put_parameters
from maple.errors import CheckpointError, ConfigError, MapleError, UnsafeCheckpointError
from maple.importers import import_checkpoint
from maple.importers.convert import convert
from maple.importers.frozen_parts import frozen_parts
from maple.methods import METHODS, build_method

HT, HV, D, LAYERS, CLASSES = 512, 768, 512, 12, 5
HALF = torch.float16
FOREIGN = "dassl_that_is_not_installed"


def draw(*shape: int, dtype: torch.dtype = HALF) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) * 0.02).to(dtype)


def frozen() -> dict[str, torch.Tensor]:
    keys = [
        f"{side}.transformer.resblocks.{k}.ln_1.weight" for side in ("image_encoder", "text_encoder") for k in (0, 11)
    ]
    keys += ["image_encoder.conv1.weight", "image_encoder.class_embedding", "image_encoder.positional_embedding"]
    keys += ["image_encoder.ln_pre.bias", "image_encoder.ln_post.weight", "image_encoder.proj", "logit_scale"]
    keys += ["text_encoder.positional_embedding", "text_encoder.ln_final.weight", "text_encoder.text_projection"]
    keys += [f"text_encoder.transformer.resblocks.0.{name}" for name in ("attn.in_proj_weight", "mlp.c_fc.bias")]
    keys += ["image_encoder.transformer.resblocks.3.attn.out_proj.weight"]
    return {key: draw(3) for key in keys}


def tokens(length: int, prefix: str = "prompt_learner.") -> dict[str, torch.Tensor]:
    """Views of one storage, as the reference's buffers are."""
    embedding = draw(CLASSES, 77, HT)
    return {f"{prefix}token_prefix": embedding[:, :1], f"{prefix}token_suffix": embedding[:, 1 + length :]}


def maple(length: int = 2, depth: int = 9) -> dict[str, torch.Tensor]:
    learned = {"ctx": draw(length, HT), "proj.weight": draw(HV, HT), "proj.bias": draw(HV)}
    for k in range(depth - 1):
        learned[f"compound_prompts_text.{k}"] = draw(length, HT, dtype=torch.float32) + k
        learned[f"compound_prompt_projections.{k}.weight"] = draw(HV, HT, dtype=torch.float32) - k
        learned[f"compound_prompt_projections.{k}.bias"] = draw(HV, dtype=torch.float32)
    return {f"prompt_learner.{key}": value for key, value in learned.items()} | tokens(length) | frozen()


def ivlp(text: int = 2, vision: int = 2, text_depth: int = 12, vision_depth: int = 12) -> dict[str, torch.Tensor]:
    state = {"prompt_learner.ctx": draw(text, HT), **tokens(text)} if text else {}
    if vision_depth:
        state["image_encoder.VPT"] = draw(vision, HV, dtype=torch.float32)
    for side, width, length, depth in (("text", HT, text, text_depth), ("image", HV, vision, vision_depth)):
        for k in range(1, depth):
            state[f"{side}_encoder.transformer.resblocks.{k}.VPT_shallow"] = draw(length, width) + k
    return state | frozen()


def coop(length: int = 16, classes: int = 0) -> dict[str, torch.Tensor]:
    context = draw(classes, length, HT) if classes else draw(length, HT)
    return {"ctx": context, **tokens(length, "")}


def cocoop(hidden: int = D // 16) -> dict[str, torch.Tensor]:
    meta = {"linear1.weight": draw(hidden, D), "linear1.bias": draw(hidden)}
    meta |= {"linear2.weight": draw(HT, hidden), "linear2.bias": draw(HT)}
    return {"ctx": draw(4, HT), **tokens(4, ""), **{f"meta_net.{key}": value for key, value in meta.items()}}


def kgcoop() -> dict[str, torch.Tensor]:
    """Its prompt learner, with the two parts that nothing uses."""
    unused = {"bias_vectors": draw(1, D), "meta_net.linear1.weight": draw(D, D), "meta_net.linear1.bias": draw(D)}
    return {"ctx": draw(4, HT), **unused, **tokens(4, "")}


def promptsrc(depth: int = 9) -> dict[str, torch.Tensor]:
    """Its whole model: IVLP's, and the frozen image tower that its prompt learner keeps."""
    teacher = {f"prompt_learner.ZS_{key}": value for key, value in frozen().items() if key.startswith("image")}
    return ivlp(4, 4, depth, depth) | teacher


def tcp() -> dict[str, torch.Tensor]:
    """Its prompt learner: a meta-network that gives four tokens."""
    meta = {"linear1.weight": draw(D // 4, D), "linear1.bias": draw(D // 4)}
    meta |= {"linear2.weight": draw(4 * HT, D // 4), "linear2.bias": draw(4 * HT)}
    return {"ctx": draw(4, HT), **tokens(4, ""), **{f"meta_net.{key}": value for key, value in meta.items()}}


def dept(base: dict[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    """Its whole model, with CoOp's prompt learner by default."""
    base = coop() if base is None else base
    bare = {"ctx", "token_prefix", "token_suffix", "bias_vectors"}
    prompts = {f"prompt_learner.{k}" if k in bare or k.startswith("meta_net") else k: v for k, v in base.items()}
    head = {"linear_probe_proj.weight": draw(CLASSES, D), "linear_probe_proj.bias": draw(CLASSES)}
    films = {f"film_lp_{side}.{part}": draw(D) + 1 for side in ("img", "text") for part in ("scale", "bias")}
    return {**prompts, **head, **films, **frozen()}


def mma(start: int = 5, end: int = 12, width: int = 32) -> dict[str, torch.Tensor]:
    """Its adapter learner, which counts blocks from 1."""
    state = {"tokenized_prompts": torch.zeros(CLASSES, 77, dtype=torch.int64), "token_embedding.weight": draw(3, HT)}
    for k in range(start, end + 1):
        for side, channels in (("text", HT), ("visual", HV)):
            for part, shape in (("down.0", (width, channels)), ("up", (channels, width))):
                state[f"{side}_adapter.{k}.{part}.weight"] = draw(*shape) + k
                state[f"{side}_adapter.{k}.{part}.bias"] = draw(shape[0])
        state |= {f"shared_adapter.{k}.0.weight": draw(width, width), f"shared_adapter.{k}.0.bias": draw(width)}
    return state


def mmrl(layers: int = 7, plus: bool = False) -> dict[str, torch.Tensor]:
    """Its whole model; MMRL++ shares the maps of layers."""
    learner, width = "representation_learner", 256
    state = {f"{learner}.compound_rep_tokens": draw(5, width), f"{learner}.prompt_embeddings": draw(CLASSES, 77, HT)}
    for side, channels in (("r2v", HV), ("r2t", HT)):
        for k in range(layers):
            if plus:
                prefix = f"{learner}.srra_{side}proj.srra.{k}"
                state |= {f"{prefix}.A": draw(channels, 4) + k, f"{prefix}.B": draw(4, width)}
                state[f"{prefix}.bias"] = draw(channels)
            else:
                prefix = f"{learner}.compound_rep_tokens_{side}proj.{k}"
                state |= {f"{prefix}.weight": draw(channels, width) + k, f"{prefix}.bias": draw(channels)}
        if plus:
            state[f"{learner}.srra_{side}proj.weight"] = draw(channels, width)
    projection = {"A": draw(HV, 64), "B": draw(64, D)} if plus else {"proj_rep": draw(HV, D)}
    return state | {f"image_encoder.{key}": value for key, value in projection.items()} | frozen()


def clap() -> dict[str, torch.Tensor]:
    """Its adapter: the prototypes, the text features that they started from, and CLIP's scale."""
    return {"prototypes": draw(CLASSES, D), "base_text_features": draw(CLASSES, D), "logit_scale": draw()}


LORA_NAMES = ("q_proj", "k_proj", "v_proj", "proj")


def clip_lora(position: str = "all", encoder: str = "both", matrices: str = "qkv", layers: int = 12) -> dict[str, Any]:
    """The content of its file: the text tower's layers, then the image tower's."""
    widths = {"text": [HT], "vision": [HV], "both": [HT, HV]}[encoder]
    weights = {}
    for width in (width for width in widths for _ in range(layers)):
        number = len(weights)
        factors = {"w_lora_A": draw(2, width) + number, "w_lora_B": draw(width, 2) - number}
        weights[f"layer_{number}"] = {LORA_NAMES["qkvo".index(matrix)]: factors for matrix in matrices}
    metadata = {"r": 2, "alpha": 1, "encoder": encoder, "params": list(matrices), "position": position}
    return {"weights": weights, "metadata": metadata}


ALL = {"maple": maple, "independent_vl": ivlp, "deep_language": lambda: ivlp(4, vision_depth=0)}
ALL |= {"vpt": lambda: ivlp(0, 8, 0), "coop": coop, "cocoop": cocoop}
ALL |= {"kgcoop": kgcoop, "prograd": coop, "promptsrc": promptsrc, "tcp": tcp}
ALL |= {"dept": dept, "mma": mma, "mmapp": mma, "mmrl": mmrl, "mmrlpp": lambda: mmrl(plus=True), "clap": clap}
ALL = {name: make for name, make in ALL.items() if name in METHODS}


def save_as_dassl(path: Path, state: dict[str, torch.Tensor], *, zipped: bool = True, val_result: Any = None) -> Path:
    """Write what Dassl's `save_model` writes: its warm-up scheduler carries a live scheduler and optimizer."""
    parameters = [torch.nn.Parameter(value.clone()) for value in state.values() if value.is_floating_point()]
    optimizer = torch.optim.SGD(parameters, lr=0.0035, momentum=0.9)
    for parameter in parameters[:2]:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    successor = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5.0)
    module = types.ModuleType(FOREIGN)
    cls = type("LiveThing", (), {"__module__": FOREIGN, "__setstate__": lambda *_: pytest.fail("ran foreign code")})
    live = cls()
    live.successor, live.optimizer, live.tags = successor, optimizer, {"a", "b"}
    module.LiveThing = cls
    content = OrderedDict(state)
    content._metadata = OrderedDict({"": {"version": 1}})
    scheduler = {"successor": successor, "warmup_epoch": 1, "live": live, "base_lrs": [0.0035], "array": np.ones(3)}
    checkpoint = {"state_dict": content, "epoch": 5, "optimizer": optimizer.state_dict(), "scheduler": scheduler}
    sys.modules[FOREIGN] = module
    try:
        torch.save({**checkpoint, "val_result": val_result}, path, _use_new_zipfile_serialization=zipped)
    finally:
        del sys.modules[FOREIGN]
    return path


# ---- reading -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("method", ALL)
def test_a_checkpoint_with_live_objects_is_read_and_converted(tmp_path, method, zipped):
    state = ALL[method]()
    path = save_as_dassl(tmp_path / "model.pth.tar-5", state, zipped=zipped, val_result=81.25)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)
    modules = set(sys.modules)
    read = read_checkpoint(path)
    assert list(read) == ["state_dict", "epoch", "optimizer", "scheduler", "val_result"]
    for key, value in state.items():
        assert read["state_dict"][key].dtype == value.dtype
        assert torch.equal(read["state_dict"][key], value)
    assert read["optimizer"]["param_groups"][0]["lr"] == 0.0035
    assert isinstance(read["optimizer"]["state"][0]["momentum_buffer"], torch.Tensor)
    assert read["scheduler"]["live"].origin == f"{FOREIGN}.LiveThing"
    assert isinstance(read["scheduler"]["successor"], Placeholder)
    assert read["scheduler"]["base_lrs"] == [0.0035]
    imported = import_checkpoint(path, method=method)
    assert set(sys.modules) == modules
    assert imported.method == method
    assert (imported.info["epoch"], imported.info["val_result"]) == (5, 81.25)
    assert f"{FOREIGN}.LiveThing" in imported.info["ignored_objects"]
    for value in imported.parameters.values():
        assert value.dtype == torch.float32
        assert value.is_contiguous()
        assert value.untyped_storage().nbytes() == 4 * value.numel()
    for name, value in convert(state, method=method).parameters.items():
        assert torch.equal(imported.parameters[name], value)


@pytest.mark.parametrize("method", ALL)
def test_a_converted_checkpoint_is_a_method_with_its_parameters(method, vit_b16):
    got = convert(ALL[method](), method=method)
    names = [f"class {number}" for number in range(got.info.get("class_count") or 2)]
    built = build_method({"name": got.method, **got.config}, vit_b16, names)
    put_parameters(built, got.parameters, source="test")
    assert built.prompt_parameters().keys() == got.parameters.keys()


def test_prototypes_of_classes():
    got = convert(clap())
    assert (got.method, got.config, got.info["class_count"]) == ("clap", {}, CLASSES)
    assert torch.equal(got.parameters["prototypes"], clap()["prototypes"])
    with pytest.raises(CheckpointError, match=r"prototypes has shape \[4\]; one vector of each class"):
        convert(clap() | {"prototypes": draw(4)})


def sentence(backbone, length):
    states = backbone.text.embed(backbone.tokenize(["a photo of a cat.", "a photo of a big red dog."])).half()
    prefix = {"token_prefix": states[:, :1], "token_suffix": states[:, 1 + length :]}
    return states, {f"module.prompt_learner.{key}": value for key, value in prefix.items()}


@pytest.mark.parametrize("kind", ["buffers", "embeddings", "table", "whole"])
def test_frozen_parts_tell_backbones_apart(kind, backbone, other_backbone):
    states, buffers = sentence(backbone, 4)
    model = backbone.model
    state = {
        "buffers": buffers,
        "embeddings": {"representation_learner.prompt_embeddings": states},
        "table": {"adapter_learner.token_embedding.weight": model.token_embedding.weight.half()},
        "whole": {
            "text_encoder.text_projection": model.text_projection.bfloat16(),
            "module.image_encoder.conv1.weight": model.visual.conv1.weight,
        },
    }[kind]
    parts = frozen_parts({**state, "tokenized_prompts": torch.zeros(2, 77, dtype=torch.int64), "other": "text"})
    assert parts.not_of(backbone) == []
    assert len(parts.not_of(other_backbone)) == (2 if kind == "whole" else 1)


@pytest.mark.parametrize("template", ["X X X X {}, a type of pet.", "X X X X {} texture.", "X X X X {}, a type of car"])
def test_names_of_published_sentences_are_found(template, backbone):
    names = ["cat", "red_dog"]
    states = backbone.text.embed(backbone.tokenize([template.format(name.replace("_", " ")) for name in names])).half()
    parts = frozen_parts({"token_prefix": states[:, :1], "token_suffix": states[:, 5:]})
    assert parts.unlike(backbone, names) == []
    assert parts.unlike(backbone, names[::-1]) == names[::-1]


@pytest.mark.parametrize("length", [2, 4])
def test_the_names_of_a_file_are_compared(length, backbone):
    """Behind a prompt that is shorter than its sentence, fixed words precede the name."""
    parts = frozen_parts(sentence(backbone, length)[1])
    assert parts.unlike(backbone, ["cat", "big_red_dog"]) == []
    assert parts.unlike(backbone, ["Cat", "big dog"]) == ["big dog"]
    assert parts.unlike(backbone, ["big red dog", "cat"]) == ["big red dog", "cat"]
    assert parts.unlike(backbone, ["dog"]) == []


@pytest.mark.parametrize("state", [mma, mmrl, lambda: mmrl(plus=True)])
def test_classes_are_counted_by_their_sentences(state):
    assert convert(state()).info["class_count"] == CLASSES


def test_a_numpy_result_is_left_out(tmp_path):
    path = save_as_dassl(tmp_path / "model.pth.tar-5", coop(), val_result=np.float64(0.5))
    assert isinstance(read_checkpoint(path)["val_result"], Placeholder)
    assert "val_result" not in import_checkpoint(path).info


# ---- converting ----------------------------------------------------------------------------------------------------


def test_maple():
    state = maple(2, 9)
    got = convert(state)
    assert got.method == "maple"
    words = "a photo of a"
    assert got.config == {"prompt_length": 2, "prompt_depth": 9, "init_text": words, "coupling_sharing": "per_layer"}
    assert sum(value.numel() for value in got.parameters.values()) == 3_555_072
    assert torch.equal(got.parameters["text_prompt.0"], state["prompt_learner.ctx"].float())
    assert torch.equal(got.parameters["text_prompt.8"], state["prompt_learner.compound_prompts_text.7"])
    assert torch.equal(got.parameters["coupling.0.bias"], state["prompt_learner.proj.bias"].float())
    deep = state["prompt_learner.compound_prompt_projections.7.weight"]
    assert torch.equal(got.parameters["coupling.8.weight"], deep)
    assert got.info == {
        "text_width": HT, "vision_width": HV, "dropped_keys": len(frozen()) + 2, "dtypes": ["float16", "float32"],
        "class_count": CLASSES,
    }  # fmt: skip
    assert convert(maple(2, 1)).config["prompt_depth"] == 1
    assert convert(maple(8, 3)).config["init_text"] == ""


def test_independent_prompts_and_their_halves():
    got = convert(ivlp(2, 3, 12, 5))
    assert got.config == {
        "text_prompt_length": 2, "vision_prompt_length": 3, "text_prompt_depth": 12, "vision_prompt_depth": 5,
        "init_text": "a photo of a",
    }  # fmt: skip
    assert sum(value.numel() for value in convert(ivlp()).parameters.values()) == 30_720
    assert torch.equal(got.parameters["vision_prompt.0"], ivlp(2, 3)["image_encoder.VPT"])
    assert got.parameters["text_prompt.11"].mean() > 10
    language = convert(ivlp(4, vision_depth=0), init_text="a_photo_of_a")
    assert language.config == {"prompt_length": 4, "prompt_depth": 12, "init_text": "a photo of a"}
    assert sum(value.numel() for value in language.parameters.values()) == 24_576
    assert language.info["vision_width"] is None
    vision = convert(ivlp(0, 8, 0))
    words = "a photo of a {}."
    assert vision.config == {"vision_prompt_length": 8, "vision_prompt_depth": 12, "template": words}
    assert sum(value.numel() for value in vision.parameters.values()) == 73_728
    assert set(vision.parameters) == {f"vision_prompt.{k}" for k in range(LAYERS)}


def test_coop_and_cocoop():
    plain = {"class_specific": False, "class_token_position": "end"}
    assert convert(coop(16)).config == {"prompt_length": 16, "init_text": "", **plain}
    assert convert(coop(4)).config == {"prompt_length": 4, "init_text": "a photo of a", **plain}
    specific = convert(coop(4, CLASSES))
    assert specific.config["class_specific"]
    assert specific.config["init_text"] == ""
    assert specific.parameters["text_prompt.0"].shape == (CLASSES, 4, HT)
    got = convert(cocoop())
    assert got.config == {"prompt_length": 4, "init_text": "a photo of a", "meta_net_reduction": 16}
    assert sum(value.numel() for value in got.parameters.values()) == 35_360
    assert got.parameters["meta_net.0.weight"].shape == (32, D)
    assert got.parameters["meta_net.1.weight"].shape == (HT, 32)
    assert got.info["embedding_width"] == D


def test_prompts_trained_in_another_way():
    got = convert(kgcoop())
    assert got.method == "kgcoop"
    assert got.config == {"prompt_length": 4, "init_text": "a photo of a"}
    assert got.parameters.keys() == {"text_prompt.0"}
    assert got.info["dropped_keys"] == 3
    assert convert(coop(16)).method == "coop", "ProGrad's files are CoOp's"
    prograd = convert(coop(16), method="prograd", init_text="a type of pet, a photo of a")
    assert prograd.config == {"prompt_length": 16, "teacher_template": "a type of pet, a photo of a {}."}
    assert torch.equal(prograd.parameters["text_prompt.0"], coop(16)["ctx"].float())
    assert convert(promptsrc()).method == "independent_vl"
    assert convert(promptsrc(), method="promptsrc").config == convert(promptsrc()).config
    assert sum(value.numel() for value in convert(promptsrc()).parameters.values()) == 46_080


@pytest.mark.parametrize(
    ("base", "name", "count"),
    [(coop, "coop", 8_192), (cocoop, "cocoop", 35_360), (kgcoop, "kgcoop", 2_048), (maple, "maple", 3_555_072)],
)
def test_a_head_and_its_base_method(base, name, count, vit_b16):
    state = dept(base())
    converted = convert(state)
    assert (converted.method, converted.config["base_method"], converted.config["film"]) == ("dept", name, True)
    assert (converted.info["class_count"], converted.info["embedding_width"]) == (CLASSES, D)
    method = build_method({"name": "dept", **converted.config}, vit_b16, list("abcde"))
    shapes = {key: value.shape for key, value in method.prompt_parameters().items()}
    assert shapes == {key: value.shape for key, value in converted.parameters.items()}
    assert method.parameter_count() == count + 4 * D + CLASSES * (D + 1)
    assert torch.equal(converted.parameters["film_text.bias"], state["film_lp_text.bias"].float())
    assert torch.equal(converted.parameters["head.weight"], state["linear_probe_proj.weight"].float())
    without = {key: value for key, value in state.items() if not key.startswith("film")}
    assert convert(without).config["film"] is False
    with pytest.raises(CheckpointError, match=r"film_lp_img and film_lp_text, each with scale and bias"):
        convert({key: value for key, value in state.items() if key != "film_lp_img.bias"})
    with pytest.raises(CheckpointError, match="the keys are those of dept, not of 'coop'"):
        convert(state, method="coop")
    with pytest.raises(CheckpointError, match="its head, linear_probe_proj, is missing"):
        convert(base(), method="dept")


def test_a_head_on_kgcoop_comes_with_parts_under_two_names_that_nothing_uses():
    """Its whole model is saved: the layer that KgCoOp does not use a second time, and an adapter."""
    state, converted = dept(kgcoop()), convert(dept(kgcoop()))
    aliases = {
        f"meta_net.linear1.{part}": state[f"prompt_learner.meta_net.linear1.{part}"] for part in ("weight", "bias")
    }
    adapter = {"adapter.fc.0.weight": draw(D // 4, D), "adapter.fc.2.weight": draw(D, D // 4)}
    whole = convert({f"module.{key}": value for key, value in (aliases | state | adapter).items()})
    assert (whole.config, whole.parameters.keys()) == (converted.config, converted.parameters.keys())
    with pytest.raises(CheckpointError, match=r"unknown key 'adapter\.fc\.0\.weight'"):
        convert(dept() | adapter)


def test_tcp_is_told_from_cocoop_by_its_tokens():
    got = convert(tcp())
    assert (got.method, got.config) == ("tcp", {"prompt_length": 4, "init_text": "", "meta_net_reduction": 4})
    assert sum(value.numel() for value in got.parameters.values()) == 331_904
    assert torch.equal(got.parameters["meta_net.1.weight"], tcp()["meta_net.linear2.weight"].float())
    with pytest.raises(CheckpointError, match=r"those of tcp, not of 'cocoop'"):
        convert(tcp(), method="cocoop")


def test_adapters_of_blocks_are_counted_from_one_in_the_file():
    got = convert(mma())
    assert got.config == {"adapter_start": 5, "adapter_end": 12, "adapter_width": 32}
    assert sum(value.numel() for value in got.parameters.values()) == 674_560
    assert torch.equal(got.parameters["vision_adapter.4.up.weight"], mma()["visual_adapter.5.up.weight"].float())
    assert convert(mma(0, 3)).config["adapter_start"] == 0
    assert "shared_adapter.input.weight" in convert(mma(0, 3)).parameters
    assert convert({f"module.adapter_learner.{key}": value for key, value in mma().items()}).config == got.config
    assert convert(mma(), method="mmapp").method == "mmapp"
    state = mma()
    for side in ("text", "visual"):
        for part in ("down.0", "up"):
            del state[f"{side}_adapter.7.{part}.weight"], state[f"{side}_adapter.7.{part}.bias"]
    del state["shared_adapter.7.0.weight"], state["shared_adapter.7.0.bias"]
    with pytest.raises(CheckpointError, match="the file is incomplete"):
        convert(state)


def test_representation_tokens():
    got = convert(mmrl())
    assert got.config == {"layers": [6, 7, 8, 9, 10, 11, 12], "tokens": 5, "token_width": 256}
    deep = mmrl()["representation_learner.compound_rep_tokens_r2tproj.6.weight"]
    assert torch.equal(got.parameters["to_text.6.weight"], deep.float())
    shared = convert(mmrl(3, plus=True))
    assert shared.config == {"layers": [10, 11, 12], "tokens": 5, "token_width": 256, "rank": 4, "projection_rank": 64}
    state = mmrl(plus=True)
    factor = state["representation_learner.srra_r2vproj.srra.6.A"]
    assert torch.equal(convert(state).parameters["to_vision.6.up"], factor.float())
    with pytest.raises(CheckpointError, match=r"keys are those of mmrl, not of 'maple'"):
        convert(mmrl(), method="maple")
    with pytest.raises(CheckpointError, match=r"unknown key 'image_encoder\.adapter'"):
        convert(mmrl() | {"image_encoder.adapter": draw(2)})
    del state["representation_learner.compound_rep_tokens"]
    with pytest.raises(CheckpointError, match="compound_rep_tokens"):
        convert(state)


@pytest.mark.parametrize(
    ("position", "encoder", "matrices", "layers", "expected"),
    [
        ("all", "both", "qkv", 12, range(12)),
        ("top3", "both", "qvo", 3, [9, 10, 11]),
        ("half-up", "vision", "q", 6, range(6, 12)),
        ("mid", "text", "qk", 4, [4, 5, 6, 7]),
    ],
)
def test_low_rank_updates(tmp_path, vit_b16, position, encoder, matrices, layers, expected):
    content = clip_lora(position, encoder, matrices, layers)
    torch.save(content, tmp_path / "lora_weights.pt")
    got = import_checkpoint(tmp_path / "lora_weights.pt")
    assert got.method == "clip_lora"
    for name in ("text", "vision"):
        assert got.config.get(f"{name}_layers") == (list(expected) if encoder in (name, "both") else None)
    block, last = expected[-1], content["weights"][f"layer_{len(content['weights']) - 1}"]
    name, factors = "text" if encoder == "text" else "vision", next(iter(last.values()))
    assert torch.equal(got.parameters[f"lora.{name}.{block}.{matrices[0]}.up"], factors["w_lora_B"].float())
    method = build_method({"name": "clip_lora", **got.config}, vit_b16, ["cat", "dog"])
    put_parameters(method, got.parameters, source="test")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metadata": {}}, "has r, alpha, encoder"),
        ({"metadata": {**clip_lora()["metadata"], "position": "left"}}, "position 'left'; choose one of all"),
        ({"metadata": {**clip_lora()["metadata"], "params": ["q", "o"]}}, "layer_0.proj.w_lora_A is missing"),
        ({"weights": {"layer_1": {}}}, "layer_0, layer_1 and so on"),
        ({"weights": {}}, "updates no matrix"),
        ({"weights": {3: {}, "layer_1": {}}}, "the weights 3, layer_1; encoder is"),
        ({"weights": {"layer_0": draw(2, HT)}}, "layer_0.q_proj.w_lora_A is missing"),
        ({"metadata": {**clip_lora()["metadata"], "params": ["x", "q"]}}, "'x' is not one of q, k, v and o"),
        ({"metadata": {**clip_lora()["metadata"], "r": float("inf")}}, "reading them failed"),
        (
            {"weights": {"layer_0": {key: {"w_lora_A": draw(), "w_lora_B": draw()} for key in LORA_NAMES}}},
            r"layer_0.q_proj.w_lora_A has shape \[\]; a matrix",
        ),
    ],
)
def test_a_wrong_file_of_low_rank_updates_is_named(change, message):
    with pytest.raises(CheckpointError, match=message):
        convert(clip_lora() | change)


def test_a_text_prompt_alone_is_recognised_by_the_frozen_model():
    whole = {"prompt_learner.ctx": draw(4, HT), **frozen()}
    assert convert(whole).method == "deep_language"
    assert convert(whole).config == {"prompt_length": 4, "prompt_depth": 1, "init_text": "a photo of a"}
    assert convert(whole, method="coop").method == "coop"
    assert convert({"prompt_learner.ctx": draw(4, HT)}).method == "coop"


def test_prefixes_and_a_second_image_encoder_are_accepted():
    parallel = convert({f"module.{key}": value for key, value in maple().items()})
    assert parallel.parameters.keys() == convert(maple()).parameters.keys()
    prefixed = convert({f"prompt_learner.{key}": value for key, value in cocoop().items()})
    assert prefixed.method == "cocoop"
    teacher = {f"prompt_learner.ZS_{key}": value for key, value in frozen().items() if key.startswith("image")}
    assert convert(ivlp() | teacher).method == "independent_vl"


DEEP = "prompt_learner.compound_prompts_text."
PROJECTION = "prompt_learner.compound_prompt_projections."
SRRA = "representation_learner.srra_r2tproj.srra.0"


@pytest.mark.parametrize(
    ("state", "change", "message"),
    [
        (maple, {f"{DEEP}3": None}, r"text_prompt lacks layer 4 of 9"),
        (maple, {"prompt_learner.ctx": None}, r"text_prompt lacks layer 0 of 9"),
        (maple, {f"{PROJECTION}2.bias": None}, r"coupling function of layer 3 has no bias"),
        (maple, {f"{PROJECTION}7.bias": None, f"{PROJECTION}7.weight": None}, r"layers \[8\] have only one"),
        (maple, {f"{DEEP}1": draw(3, HT)}, r"text_prompt\.2 has shape \[3, 512\], but text_prompt\.0 has \[2, 512\]"),
        (maple, {f"{PROJECTION}1.weight": draw(HV, HV)}, r"layer 2 has weight \[768, 768\]"),
        (maple, {"prompt_learner.proj.bias": draw(HT)}, r"\[512, 512\] and \[512\] are needed"),
        (maple, {"image_encoder.VPT": draw(2, HV)}, r"'image_encoder\.VPT' does not belong to maple"),
        (maple, {f"{DEEP}x": draw(2, HT)}, r"unknown key 'prompt_learner\.compound_prompts_text\.x'"),
        (maple, {"image_encoder.adapter.weight": draw(2)}, r"unknown key 'image_encoder\.adapter\.weight'"),
        (maple, {"module.prompt_learner.ctx": draw(2, HT)}, r"has both 'prompt_learner\.ctx' and 'module\."),
        (maple, {"prompt_learner.ctx": torch.full((2, HT), torch.nan)}, r"ctx' has NaN"),
        (maple, {"prompt_learner.ctx": torch.full((2, HT), 1e300, dtype=torch.float64)}, r"NaN or infinite"),
        (maple, {"prompt_learner.ctx": torch.ones(2, HT).long()}, r"dtype torch\.int64"),
        (maple, {"prompt_learner.ctx": [1.0]}, r"is a list; a tensor is needed"),
        (maple, {"prompt_learner.ctx": torch.empty(0, HT)}, r"contains no numbers"),
        (maple, {7: draw(1)}, r"the key 7"),
        (ivlp, {"image_encoder.VPT": None}, r"vision_prompt lacks layer 0 of 12"),
        (ivlp, {"prompt_learner.ctx": None}, r"text_prompt lacks layer 0 of 12"),
        (ivlp, {"text_encoder.transformer.resblocks.4.VPT_shallow": None}, r"text_prompt lacks layer 4"),
        (ivlp, {"text_encoder.transformer.resblocks.0.VPT_shallow": draw(2, HT)}, r"has both .* for layer 0"),
        (ivlp, {"prompt_learner.ctx": draw(HT)}, r"text_prompt\.0 has shape \[512\]"),
        (coop, {"ctx": draw(HT)}, r"allowed are \[P, Ht\] and \[C, P, Ht\]"),
        (coop, {"ctx": draw(CLASSES + 1, 4, HT)}, r"has 6 classes, but the stored token vectors 5"),
        (cocoop, {"meta_net.linear2.weight": None, "meta_net.linear2.bias": None}, r"lacks linear2"),
        (kgcoop, {"ctx": None}, r"text_prompt lacks layer 0"),
        (kgcoop, {"bias_vectors": None}, r"lacks linear2"),
        (kgcoop, {"image_encoder.VPT": draw(2, HV)}, r"'image_encoder\.VPT' does not belong to kgcoop"),
        (cocoop, {"ctx": None}, r"text_prompt lacks layer 0"),
        (cocoop, {"ctx": draw(4, HV)}, r"linear2 has weight \[512, 32\]"),
        (lambda: cocoop(200), {}, r"200 outputs for 512 inputs"),
        (cocoop, {"ctx": draw()}, r"text_prompt\.0 has shape \[\]"),
        (tcp, {"meta_net.linear2.bias": draw()}, r"linear2 has weight"),
        (maple, {f"{DEEP}{10**12}": draw(2, HT)}, r"unknown key 'prompt_learner\.compound_prompts_text\.10000"),
        (mma, {"shared_adapter.5.0.weight": None}, r"shared_adapter\.5\.0\.weight is missing"),
        (mma, {"shared_adapter.5.0.weight": draw()}, r"shared_adapter\.5\.0\.weight has shape \[\]; a matrix"),
        (mma, {f"shared_adapter.{10**12}.0.weight": draw(32, 32)}, r"unknown key 'shared_adapter\.10000"),
        (lambda: mmrl(plus=True), {"image_encoder.A": draw()}, r"image_encoder\.A \[\]; matrices are needed"),
        (lambda: mmrl(plus=True), {f"{SRRA}.A": draw()}, r"r2tproj\.srra\.0\.A has shape \[\]"),
        (frozen, {}, r"no learned prompt"),
    ],
)
def test_a_wrong_state_dict_is_named(state, change, message):
    merged = {key: value for key, value in (state() | change).items() if value is not None}
    with pytest.raises(CheckpointError, match=message):
        convert(merged)


def test_the_method_is_checked():
    with pytest.raises(ConfigError, match="unknown method 'MaPLe'; choose one of: maple"):
        convert(maple(), method="MaPLe")
    with pytest.raises(CheckpointError, match=r"keys are those of maple, not of 'coop'"):
        convert(maple(), method="coop")
    with pytest.raises(CheckpointError, match=r"keys are those of kgcoop, not of 'coop'"):
        convert(kgcoop(), method="coop")
    with pytest.raises(CheckpointError, match=r"of 4 tokens cannot have started from init_text 'a type of pet, a"):
        convert(coop(4), method="prograd", init_text="a type of pet, a photo of a")
    with pytest.raises(ConfigError, match="init_text is None"):
        convert(maple(), init_text=None)
    assert issubclass(UnsafeCheckpointError, CheckpointError)
    assert issubclass(CheckpointError, MapleError)
    assert os.sep not in repr(Placeholder("x" * 999))
