"""Text towers of transformers: BERT, RoBERTa, XLM-R, mT5 and M2M100 (NLLB), as open_clip wraps them.

Prompts replace word embeddings before positions are added, and states at the entry of deeper blocks. Padding is masked
everywhere, so sentences may stop after the longest.

Source: open_clip 3.3.0 src/open_clip/hf_model.py `HFTextEncoder`; transformers 5.24 models/bert/modeling_bert.py,
models/roberta/modeling_roberta.py, models/mt5/modeling_mt5.py, models/m2m_100/modeling_m2m_100.py.
"""

from abc import abstractmethod
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from maple.clip.edits import NO_EDIT, LayerEdit
from maple.clip.towers.base import TextTower
from maple.errors import UnsupportedTowerError


class HuggingFaceTextTower(TextTower):
    """A text encoder of transformers in open_clip's `HFTextEncoder`; a subclass knows its embeddings and layers."""

    def __init__(self, model: Any, dtype: torch.dtype) -> None:
        super().__init__(model, dtype)
        self._tower = model.text
        self._encoder: Any = model.text.transformer
        self._pad_id = int(self._tower.config.pad_token_id)
        self._layers = list(self._layer_list())
        self.depth = len(self._layers)
        self.width = int(self.embeddings.shape[1])
        self.reads_padding = False

    @abstractmethod
    def _layer_list(self) -> Any:
        """The modules of the blocks."""

    def _first_norm(self, layer: Any) -> Any:
        """The norm of a block's input; None where norms come after the sums."""
        del layer

    def require_standard_blocks(self, method: str) -> None:
        """Raise UnsupportedTowerError: layers inside the blocks of transformers cannot be changed."""
        raise UnsupportedTowerError(
            f"{method} changes layers inside the blocks, but the blocks of this text tower are transformers' own "
            f"({type(self._encoder).__name__}), which cannot be changed; use a backbone with CLIP's, such as ViT-B-16, "
            "or a method that learns prompts alone"
        )

    def require_residuals(self, method: str) -> None:
        """Raise UnsupportedTowerError if adapters cannot be added to the blocks, for which the input needs a norm."""
        if any(self._first_norm(layer) is None for layer in self._layers):
            raise UnsupportedTowerError(
                f"{method} adds adapters to the normed input of the blocks, but those of this text tower "
                f"({type(self._encoder).__name__}) do not begin with a norm of their input; use a backbone such as "
                "ViT-B-16"
            )

    def multiply_adds(self, layer: int, rows: int) -> int:
        """Multiply-adds of block `layer` on `rows` states: products of weights and of attention."""
        weights = [module.weight for module in self._layers[layer].modules() if isinstance(module, nn.Linear)]
        # The first one projects to queries, whose width may be another than that of the states (mT5).
        return rows * sum(weight.numel() for weight in weights) + 2 * rows**2 * len(weights[0])

    def embed(self, ids: Tensor) -> Tensor:
        """Word embeddings of ids [C, T], without positions: [C, T, Ht]."""
        with self.autocast(ids.device.type):
            return cast(Tensor, self._encoder.get_input_embeddings()(ids)).to(self.dtype)

    def mask(self, ids: Tensor, inserted: int = 0) -> Tensor:
        """What is added to attention scores: nothing, or a great negative number at padding; [C, 1, 1, n]."""
        kept = self._with_inserted(ids != self._pad_id, inserted)
        return (~kept)[:, None, None].to(torch.float32) * torch.finfo(self.dtype).min

    def block(self, layer: int, states: Tensor, edit: LayerEdit = NO_EDIT, mask: Tensor | None = None) -> Tensor:
        """Block `layer` on whole sentences, with what `mask` returned: [C, n, Ht] -> [C, n, Ht]."""
        module = self._layers[layer]
        with self.autocast(states.device.type):
            output = self._run(module, states, mask).to(self.dtype)
            return output if edit.residual is None else output + edit.residual(self._first_norm(module)(states))

    def _run(self, layer: Any, states: Tensor, mask: Tensor | None) -> Tensor:
        return _first(layer(states, None if mask is None else mask.to(states.dtype)))

    def pool(self, states: Tensor, ids: Tensor) -> Tensor:
        """What stands for each sentence, of its final states [C, T, Ht]: [C, Ht]."""
        with self.autocast(states.device.type):
            states = self._final_norm(states)
            pooler = getattr(self._encoder, "pooler", None)  # which open_clip's pooler takes, if it is of that kind
            pooled = None if pooler is None else pooler(states)
            output = BaseModelOutputWithPooling(last_hidden_state=states, pooler_output=pooled)
            return cast(Tensor, self._tower.pooler(output, (ids != self._pad_id).long()))

    def _final_norm(self, states: Tensor) -> Tensor:
        return states

    def finish(self, rows: Tensor) -> Tensor:
        """Projection of pooled rows [C, Ht]: raw features [C, D]."""
        with self.autocast(rows.device.type):
            return cast(Tensor, self._tower.proj(rows))

    def end_positions(self, ids: Tensor) -> Tensor:
        """The last token that is not padding, in each row of ids [C, T]: [C] int64."""
        positions = torch.arange(ids.shape[1], device=ids.device)
        return torch.where(ids != self._pad_id, positions, 0).amax(dim=1)

    @property
    def embeddings(self) -> Tensor:
        """The table of word embeddings [V, Ht]."""
        return cast(Tensor, self._encoder.get_input_embeddings().weight)


class BertTextTower(HuggingFaceTextTower):
    """BERT, RoBERTa and XLM-R: a norm after each sum, also after words, types and positions."""

    def _layer_list(self) -> Any:
        return self._encoder.encoder.layer

    def enter(self, states: Tensor, positions: Tensor | None = None) -> Tensor:
        """Add types and positions, and normalise: [C, T, Ht] -> [C, T, Ht]."""
        with self.autocast(states.device.type):
            embedded = self._encoder.embeddings(inputs_embeds=states, position_ids=positions)
            return cast(Tensor, embedded).to(self.dtype)

    def positions(self, ids: Tensor) -> Tensor | None:
        """The positions of ids [C, T]: RoBERTa counts those that are not padding."""
        embeddings = self._encoder.embeddings
        if not hasattr(embeddings, "create_position_ids_from_input_ids"):
            return None
        return cast(Tensor, embeddings.create_position_ids_from_input_ids(ids, embeddings.padding_idx))


class T5TextTower(HuggingFaceTextTower):
    """The encoder of mT5: relative positions, which are added to attention scores in every block.

    Rows that are inserted after the first one are at no distance from others: their scores get nothing added.
    """

    def _layer_list(self) -> Any:
        return self._encoder.block

    def _first_norm(self, layer: Any) -> Any:
        return layer.layer[0].layer_norm

    def enter(self, states: Tensor, positions: Tensor | None = None) -> Tensor:
        """Nothing: positions are those of the attention."""
        del positions
        return states

    def mask(self, ids: Tensor, inserted: int = 0) -> Tensor:
        """What is added to attention scores, relative positions and padding: [C, heads, n, n]."""
        length = ids.shape[1]
        bias: Tensor = self._layers[0].layer[0].SelfAttention.compute_bias(length, length, device=ids.device)
        if inserted:
            rows = torch.cat([bias[:, :, :1], bias.new_zeros(*bias.shape[:2], inserted, length), bias[:, :, 1:]], dim=2)
            columns = bias.new_zeros(*bias.shape[:2], length + inserted, inserted)
            bias = torch.cat([rows[..., :1], columns, rows[..., 1:]], dim=3)
        return bias + super().mask(ids, inserted)

    def _run(self, layer: Any, states: Tensor, mask: Tensor | None) -> Tensor:
        assert mask is not None
        return _first(layer(states, position_bias=mask.to(states.dtype)))

    def _final_norm(self, states: Tensor) -> Tensor:
        return cast(Tensor, self._encoder.final_layer_norm(states))


class M2M100TextTower(HuggingFaceTextTower):
    """The encoder of M2M100 and NLLB: scaled words, fixed positions, a norm before each sum and at the end."""

    def _layer_list(self) -> Any:
        return self._encoder.layers

    def _first_norm(self, layer: Any) -> Any:
        return layer.self_attn_layer_norm

    def enter(self, states: Tensor, positions: Tensor | None = None) -> Tensor:
        """Add positional embeddings: [C, T, Ht] -> [C, T, Ht]."""
        table = self._encoder.embed_positions
        assert positions is not None
        return states + cast(Tensor, table.weights)[positions].to(states.dtype)

    def positions(self, ids: Tensor) -> Tensor | None:
        """The positions of ids [C, T], counted without padding."""
        table = self._encoder.embed_positions
        return cast(Tensor, table.create_position_ids_from_input_ids(ids, table.padding_idx))

    def _final_norm(self, states: Tensor) -> Tensor:
        return cast(Tensor, self._encoder.layer_norm(states))

    @property
    def embeddings(self) -> Tensor:
        """The table of word embeddings [V, Ht], as they enter the tower."""
        return super().embeddings * float(self._encoder.embed_tokens.embed_scale)


def _first(output: Any) -> Tensor:
    """The states of a layer that may also return others."""
    return cast(Tensor, output[0] if isinstance(output, tuple) else output)


_FAMILIES: dict[str, type[HuggingFaceTextTower]] = {
    "bert": BertTextTower,
    "roberta": BertTextTower,
    "xlm-roberta": BertTextTower,
    "mt5": T5TextTower,
    "m2m_100": M2M100TextTower,
}


def hugging_face_text_tower(model: Any, dtype: torch.dtype) -> TextTower:
    """The text tower of a model whose text encoder is open_clip's `HFTextEncoder`."""
    kind = str(model.text.config.model_type)
    if kind in _FAMILIES:
        return _FAMILIES[kind](model, dtype)
    known = ", ".join(_FAMILIES)
    return TextTower(model, dtype, f"its text tower is a {kind!r} of transformers; blocks of {known} are known")
