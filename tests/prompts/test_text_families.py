"""Text towers of transformers, CoCa's and bidirectional ones: prompts and edits against the libraries' own blocks."""

from collections.abc import Sequence
from functools import cache
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from tower_families import double_family

from maple.clip.edits import LayerEdit, LowRank, prompt_edits
from maple.clip.towers import TextTower, text_tower
from maple.errors import UnsupportedTowerError
from maple.prompts import encode_text
from maple.prompts.splice import Sentences, write_sentences

WIDTH, DEPTH, WORDS, LENGTH = 32, 3, 60, 11
ENDS = (10, 6, 8)
"""The last word of each sentence."""
SMALL = {"hidden_size": WIDTH, "num_hidden_layers": DEPTH, "num_attention_heads": 2, "intermediate_size": 48}
ENCODER = {"encoder_layers": DEPTH, "encoder_attention_heads": 2, "encoder_ffn_dim": 48}
M2M100 = {"d_model": WIDTH, **ENCODER, "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 48}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertConfig", SMALL),
    "roberta": ("RobertaConfig", SMALL),
    "xlm-roberta": ("XLMRobertaConfig", SMALL),
    "mt5": ("MT5Config", {"d_model": WIDTH, "d_kv": 16, "d_ff": 48, "num_layers": DEPTH, "num_heads": 2}),
    "m2m_100": ("M2M100Config", M2M100),
}
CASES = [
    *((name, "mean_pooler") for name in CONFIGS),
    *((name, "cls_pooler") for name in ("bert", "roberta", "xlm-roberta")),
    ("bert", "cls_last_hidden_state_pooler"),
]
every = pytest.mark.parametrize(("name", "pooler"), CASES)


@cache
def encoder(name: str, pooler: str) -> Any:
    """open_clip's text encoder with random weights and a projection in two layers."""
    import transformers
    from open_clip.hf_model import HFTextEncoder

    kind, sizes = CONFIGS[name]
    with TemporaryDirectory() as folder, torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        getattr(transformers, kind)(vocab_size=WORDS, **sizes).save_pretrained(folder)
        module = HFTextEncoder(folder, output_dim=16, pooler_type=pooler, proj_type="mlp", pretrained=False)
        for parameter in module.parameters():
            parameter.data.normal_(std=0.2)
    return module.eval().requires_grad_(False)


def tower_of(text: Any, dtype: torch.dtype = torch.float32) -> TextTower:
    return text_tower(SimpleNamespace(text=text, context_length=LENGTH, encode_text=text), dtype)


def sentences(padding: int) -> Sentences:
    """Three sentences, with two places for prompts after the first token, or on both sides of a word."""
    ids = torch.randint(5, WORDS, (3, LENGTH), generator=torch.Generator().manual_seed(2))
    for row, end in zip(ids, ENDS, strict=True):
        row[end + 1 :] = padding
    return Sentences(ids, torch.tensor([[1, 2], [1, 2], [1, 4]]), torch.tensor(ENDS), 1)


def random(*shape: int, seed: int = 3) -> Tensor:
    return 0.5 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def insert(states: Tensor, prompt: Tensor, slots: Tensor) -> Tensor:
    """One sentence's states [T, H] with the prompt in its places."""
    states = states.clone()
    for place, token in zip(slots.tolist(), prompt, strict=True):
        states[place] = token
    return states


def plainly(text: Any, ids: Tensor, slots: Tensor, prompts: Sequence[Tensor]) -> Tensor:
    """The feature of one sentence without padding, by the library's own modules, one after another."""
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    inner, count = text.transformer, ids.shape[0]
    whole = torch.zeros(1, 1, 1, count)
    bias = None
    words = inner.get_input_embeddings()(ids)
    states = insert(words, prompts[0], slots)[None]
    kind = text.config.model_type
    if kind == "m2m_100":
        states = states + inner.embed_positions(ids[None], states)
        layers = inner.layers
    elif kind == "mt5":
        bias, layers = inner.block[0].layer[0].SelfAttention.compute_bias(count, count), inner.block
    else:
        positions = torch.arange(count)[None] + (0 if kind == "bert" else inner.embeddings.padding_idx + 1)
        states = inner.embeddings(inputs_embeds=states, position_ids=positions)
        layers = inner.encoder.layer
    for number, layer in enumerate(layers):
        if 0 < number < len(prompts):
            states = insert(states[0], prompts[number], slots)[None]
        output = layer(states, whole, bias) if kind == "mt5" else layer(states, whole)
        states = output[0] if isinstance(output, tuple) else output
    if kind in ("mt5", "m2m_100"):
        states = (inner.final_layer_norm if kind == "mt5" else inner.layer_norm)(states)
    pooled = inner.pooler(states) if getattr(inner, "pooler", None) is not None else None
    output = BaseModelOutputWithPooling(last_hidden_state=states, pooler_output=pooled)
    feature: Tensor = text.proj(text.pooler(output, torch.ones(1, count)))[0]
    return feature


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_edits_as_open_clip(name: str, pooler: str, dtype: torch.dtype) -> None:
    text = encoder(name, pooler)
    tower, given = tower_of(text, dtype), sentences(text.config.pad_token_id)
    assert (tower.width, tower.depth, tower.obstacle) == (WIDTH, DEPTH, None)
    assert (tower.is_causal, tower.reads_padding, tower.vocabulary_size) == (False, False, WORDS)
    with torch.no_grad():
        expected = text(given.ids)
        features = encode_text(tower, given, [])
        shorter = encode_text(tower, given.select(torch.tensor([1])), [])
    tolerance = 1e-5 if dtype == torch.float32 else 0.04
    assert features.std() > 0.05
    for one, other in ((features, expected), (tower.plain(given.ids), expected), (shorter, expected[1:2])):
        assert (one - other).abs().max() <= tolerance * expected.abs().max()


@every
@pytest.mark.parametrize("depth", [1, 2, DEPTH])
def test_prompts_as_the_modules_one_by_one(name: str, pooler: str, depth: int) -> None:
    text = encoder(name, pooler)
    given = sentences(text.config.pad_token_id)
    prompts = [random(2, WIDTH, seed=layer).requires_grad_() for layer in range(depth)]
    features = encode_text(tower_of(text), given, prompt_edits(prompts))
    rows = zip(given.ids, given.slots, ENDS, strict=True)
    expected = torch.stack([plainly(text, ids[: end + 1], slots, prompts) for ids, slots, end in rows])
    assert (features - expected).abs().max() <= 1e-5 * expected.abs().max()
    direction = random(3, 16)
    actual = torch.autograd.grad((features * direction).sum(), prompts)
    for gradient, wanted in zip(actual, torch.autograd.grad((expected * direction).sum(), prompts), strict=True):
        assert wanted.abs().max() > 0
        torch.testing.assert_close(gradient, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))


@every
def test_groups_and_pieces(name: str, pooler: str) -> None:
    """Several prompts at once, one for each sentence, and little memory give what each alone gives."""
    text = encoder(name, pooler)
    tower, given = tower_of(text), sentences(text.config.pad_token_id)
    alone = [random(2, WIDTH, seed=seed) for seed in (5, 6)]
    expected = torch.stack([encode_text(tower, given, prompt_edits([prompt])) for prompt in alone])
    grouped = torch.stack(alone)[:, None].requires_grad_()
    together = encode_text(tower, given, prompt_edits([grouped]), memory_limit=1)
    torch.testing.assert_close(together, expected, rtol=1e-4, atol=1e-4)
    together.sum().backward()
    of_each = torch.stack([alone[0], alone[1], alone[0]])
    mixed = torch.stack([expected[0, 0], expected[1, 1], expected[0, 2]])
    torch.testing.assert_close(encode_text(tower, given, prompt_edits([of_each])), mixed, rtol=1e-4, atol=1e-4)


@every
def test_rows_of_their_own_change_the_feature_and_keep_the_pooling(name: str, pooler: str) -> None:
    text = encoder(name, pooler)
    tower, given = tower_of(text), sentences(text.config.pad_token_id)
    tokens = random(4, WIDTH).requires_grad_()
    edits = [LayerEdit(), LayerEdit(tokens=tokens), LayerEdit(tokens=tokens, keep=0.5)]
    features = encode_text(tower, given, edits)
    assert features.shape == (3, 16)
    assert not torch.allclose(features, encode_text(tower, given, []))
    one = encode_text(tower, given.select(torch.tensor([1])), edits)
    torch.testing.assert_close(one, features[1:2], rtol=1e-4, atol=1e-4)
    (gradient,) = torch.autograd.grad(features.sum(), [tokens])
    assert gradient.abs().max() > 0


@every
def test_adapters_where_blocks_begin_with_a_norm(name: str, pooler: str) -> None:
    text = encoder(name, pooler)
    tower, given = tower_of(text), sentences(text.config.pad_token_id)
    with pytest.raises(UnsupportedTowerError, match=r"LoRA changes layers inside .* transformers' own"):
        tower.require_standard_blocks("LoRA")
    if name not in ("mt5", "m2m_100"):
        with pytest.raises(UnsupportedTowerError, match="MMA adds adapters to the normed input"):
            tower.require_residuals("MMA")
        return
    tower.require_residuals("MMA")
    adapter = nn.Linear(WIDTH, WIDTH)
    seen: list[Tensor] = []

    def residual(normed: Tensor) -> Tensor:
        seen.append(normed)
        return adapter(normed)

    features = encode_text(tower, given, [LayerEdit(), LayerEdit(residual=residual)])
    assert not torch.allclose(features, encode_text(tower, given, []))
    assert seen[0].shape == (3, LENGTH, WIDTH)
    if name == "m2m_100":
        torch.testing.assert_close(seen[0].mean(dim=-1), torch.zeros(3, LENGTH), atol=0.2, rtol=0)


@pytest.mark.parametrize("name", ["SigLIP", "CoCa"])
def test_every_edit_as_open_clip_with_hooks(name: str) -> None:
    """Towers that read padding: prompts, tokens, adapters, low-rank updates and norms, written into open_clip's own."""
    backbone = double_family(name)
    given = write_sentences(backbone, ["cat", "annual crop land"], prompt_length=2, position="middle")
    width, leaves = backbone.text.width, []

    def leaf(*shape: int) -> Tensor:
        leaves.append(random(*shape, seed=len(leaves)).double().requires_grad_())
        return leaves[-1]

    first, deeper, tokens = leaf(2, width), leaf(2, width), leaf(3, width)
    adapter, low_rank = leaf(width, width), LowRank(leaf(2, width), leaf(width, 2), scale=0.1)
    weight, bias = leaf(width), leaf(width)
    edits = [
        LayerEdit(prompt=first, low_rank={"v": low_rank}),
        LayerEdit(prompt=deeper, tokens=tokens, residual=lambda rows: rows @ adapter),
        LayerEdit(norms=(None, (weight, bias))),
    ]
    features = encode_text(backbone.text, given, edits)
    text = backbone.model.text
    blocks, rows = text.transformer.resblocks, torch.arange(2)[:, None]

    def enter_first(_module: Any, _inputs: Any, states: Tensor) -> Tensor:
        return states.index_put((rows, given.slots), first)

    def enter_second(_module: Any, inputs: Any, given_mask: dict[str, Any]) -> Any:
        states = inputs[0].index_put((rows, given.slots), deeper)
        states = torch.cat([states[:, :1], tokens.expand(2, -1, -1), states[:, 1:]], dim=1)
        return (states,), longer(given_mask)

    def longer(given_mask: dict[str, Any]) -> dict[str, Any]:
        mask = given_mask["attn_mask"]
        if mask is None:
            return given_mask
        hidden = torch.cat([mask[:, -1, :1], mask.new_zeros(len(mask), 3), mask[:, -1, 1:]], dim=1)[:, None]
        count = hidden.shape[2]
        return {**given_mask, "attn_mask": hidden + mask.new_full((count, count), -torch.inf).triu(1)}

    def adapt(module: Any, inputs: Any, states: Tensor) -> Tensor:
        added: Tensor = states + module.ln_1(inputs[0]) @ adapter
        return added

    def leave(_module: Any, _inputs: Any, states: Tensor) -> Tensor:
        return torch.cat([states[:, :1], states[:, 4:]], dim=1)

    hooks = [
        text.token_embedding.register_forward_hook(enter_first),
        blocks[1].register_forward_pre_hook(enter_second, with_kwargs=True),
        blocks[1].register_forward_hook(adapt),
        blocks[2].register_forward_pre_hook(lambda _, inputs, mask: (inputs, longer(mask)), with_kwargs=True),
        blocks[2].register_forward_hook(leave),
    ]
    update = torch.cat([torch.zeros(2 * width, width), 0.1 * low_rank.up @ low_rank.down])
    changed = {
        "transformer.resblocks.0.attn.in_proj_weight": blocks[0].attn.in_proj_weight + update,
        "transformer.resblocks.2.ln_2.weight": weight,
        "transformer.resblocks.2.ln_2.bias": bias,
    }
    try:
        output = torch.func.functional_call(text, changed, (given.ids,))
    finally:
        for hook in hooks:
            hook.remove()
    expected = output[0] if isinstance(output, tuple) else output
    torch.testing.assert_close(features, expected, rtol=1e-9, atol=1e-11)
    direction = random(*features.shape).double()
    wanted = torch.autograd.grad((expected * direction).sum(), leaves)
    for gradient, correct in zip(torch.autograd.grad((features * direction).sum(), leaves), wanted, strict=True):
        assert correct.abs().max() > 0
        torch.testing.assert_close(gradient, correct, rtol=1e-8, atol=1e-10)


def test_an_unknown_encoder_says_which_are_known() -> None:
    from open_clip.hf_model import HFTextEncoder

    unknown = HFTextEncoder.__new__(HFTextEncoder)
    object.__setattr__(unknown, "config", SimpleNamespace(model_type="gpt2"))
    tower = tower_of(unknown)
    assert tower.obstacle == (
        "its text tower is a 'gpt2' of transformers; blocks of bert, roberta, xlm-roberta, mt5, m2m_100 are known"
    )
