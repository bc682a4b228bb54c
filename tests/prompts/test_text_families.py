"""Text towers of transformers, CoCa's and bidirectional ones: prompts and edits against the libraries' own blocks."""

from collections.abc import Sequence
from functools import cache
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from maple.clip.edits import LayerEdit, prompt_edits
from maple.clip.towers import TextTower, text_tower
from maple.errors import UnsupportedTowerError
from maple.prompts import encode_text
from maple.prompts.splice import Sentences

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
    with pytest.raises(UnsupportedTowerError, match=r"LoRA changes layers inside .* those of transformers"):
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


def test_an_unknown_encoder_says_which_are_known() -> None:
    class HFTextEncoder:
        config = SimpleNamespace(model_type="gpt2")

    tower = tower_of(HFTextEncoder())
    assert tower.obstacle == (
        "its text tower is a 'gpt2' of transformers; blocks of bert, roberta, xlm-roberta, mt5, m2m_100 are known"
    )
