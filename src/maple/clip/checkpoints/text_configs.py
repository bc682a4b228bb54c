"""Configurations of text towers that are transformers' own: BERT, RoBERTa, XLM-R, mT5 and M2M-100.

open_clip builds such a tower from whatever config.json says: keys of it choose classes, kernels and code of other
repositories. Here sizes, token ids and names of activations are read, and nothing else reaches transformers.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from open_clip.hf_configs import arch_dict

from maple.clip.hub import TEXT_FOLDER, fetch_text_config
from maple.errors import BackboneError, one_of
from maple.files import read_json

_WIDTHS = ("hidden_size", "d_model")  # of BERT's kind; of mT5 and M2M-100
_LAYERS = ("num_hidden_layers", "num_layers", "encoder_layers", "num_decoder_layers", "decoder_layers")
_HIDDEN = ("intermediate_size", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim")
_ROWS = ("vocab_size", "type_vocab_size", "max_position_embeddings", "relative_attention_num_buckets")
_KEYS = {
    *("model_type", "vocab_size", "type_vocab_size", "max_position_embeddings", "pad_token_id", "bos_token_id"),
    *("eos_token_id", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act"),
    *("hidden_dropout_prob", "attention_probs_dropout_prob", "initializer_range", "layer_norm_eps", "d_model", "d_kv"),
    *("d_ff", "num_layers", "num_decoder_layers", "num_heads", "relative_attention_num_buckets", "dropout_rate"),
    *("relative_attention_max_distance", "layer_norm_epsilon", "feed_forward_proj", "is_encoder_decoder"),
    *("encoder_layers", "encoder_ffn_dim", "encoder_attention_heads", "decoder_layers", "decoder_ffn_dim"),
    *("decoder_attention_heads", "activation_function", "scale_embedding", "tie_word_embeddings"),
}
_LARGEST = 10**7  # of any size; the largest published vocabulary has a million words


def text_config(name: str, folder: Path | None) -> dict[str, Any]:
    """The configuration of the text tower `name`, of the keys that are read.

    Args:
        name: a model of the hub, of which config.json alone is fetched, or was fetched before.
        folder: where the description that names it is; `TEXT_FOLDER`/config.json in it is taken first.

    Raises:
        BackboneError: it cannot be read, or is not of a kind that open_clip builds.
        BackboneDownloadError: it is neither in the folder nor in the hub's cache, and cannot be fetched.
    """
    given = None if folder is None else folder / TEXT_FOLDER / "config.json"
    path = given if given is not None and given.is_file() else fetch_text_config(name)
    content: dict[str, Any] = read_json(path, error=BackboneError, foreign=True)
    kind = content.get("model_type")
    if not isinstance(kind, str) or kind not in arch_dict:
        raise BackboneError(f"the text tower {name} ({path}): {one_of('model_type', kind, arch_dict)}")
    for key in {*_WIDTHS, *_LAYERS, *_HIDDEN, *_ROWS} & content.keys():
        size = content[key]
        if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size <= _LARGEST:
            raise BackboneError(
                f"the text tower {name} ({path}): {key} is {size!r:.40}; a whole number is required, of at most "
                f"{_LARGEST:,}"
            )
    return {key: content[key] for key in _KEYS & content.keys() if isinstance(content[key], int | float | str | None)}


def size_of_text_tower(config: Mapping[str, Any]) -> tuple[int, float]:
    """The layers of a text tower, and how many numbers its weights have, roughly and from above.

    mT5 and M2M-100 are built with their decoders, which are then left out.
    """
    width, hidden = (max([config[key] for key in keys if key in config], default=1024) for keys in (_WIDTHS, _HIDDEN))
    layers, rows = (sum(config[key] for key in keys if key in config) for keys in (_LAYERS, _ROWS))
    return layers, float(width) * (rows + layers * (8.0 * width + 3 * hidden))


@contextmanager
def written(config: Mapping[str, Any]) -> Iterator[str]:
    """A folder with this config.json alone, for libraries that read a configuration from a folder."""
    with TemporaryDirectory(prefix="maple-text-") as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        yield folder
