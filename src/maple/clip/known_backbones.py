"""Backbones that are known to work, and what each is for: the list of `maple backbones`.

What is computed from a configuration (parameters, sizes, the methods that run) is not in this file.
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class KnownBackbone:
    """A published CLIP.

    Attributes:
        name, pretrained: as `load_clip` takes them; a file in capitals is to be downloaded by the user.
        subject: photographs, many languages, medicine, satellites, nature, drawings.
        use: what it is for, in one line.
        config: open_clip's description of a repository, so that it can be described without a network.
    """

    name: str
    pretrained: str | None
    subject: str
    use: str
    config: dict[str, Any] | None = None


_BIOMEDCLIP = {
    # Source: microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224@a9709a5 open_clip_config.json.
    "embed_dim": 512,
    "vision_cfg": {
        "timm_model_name": "vit_base_patch16_224",
        "timm_model_pretrained": False,
        "timm_pool": "",
        "timm_proj": "linear",
        "image_size": 224,
    },
    "text_cfg": {
        "hf_model_name": "microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract",
        "hf_tokenizer_name": "microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract",
        "hf_proj_type": "mlp",
        "hf_pooler_type": "cls_last_hidden_state_pooler",
        "context_length": 256,
    },
}
_BIOCLIP = {
    # The towers of ViT-B-16. Source: imageomics/bioclip open_clip_config.json.
    "embed_dim": 512,
    "vision_cfg": {"image_size": 224, "layers": 12, "width": 768, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12},
}

KNOWN_BACKBONES = (
    KnownBackbone("maple-small", None, "drawings", "emoji and icons; included, for trials without a download"),
    KnownBackbone("ViT-B-16", "openai", "photographs", "OpenAI's; the default, and that of most papers"),
    KnownBackbone("ViT-B-32", "openai", "photographs", "OpenAI's, with larger patches: faster"),
    KnownBackbone("ViT-L-14", "openai", "photographs", "OpenAI's largest at 224 pixels"),
    KnownBackbone("RN50", "openai", "photographs", "OpenAI's ResNet, of older few-shot papers"),
    KnownBackbone("ViT-B-16", "datacomp_xl_s13b_b90k", "photographs", "DataComp"),
    KnownBackbone("ViT-L-14", "datacomp_xl_s13b_b90k", "photographs", "DataComp, large"),
    KnownBackbone("ViT-B-16-quickgelu", "dfn2b", "photographs", "DFN, trained on filtered pairs"),
    KnownBackbone("ViT-H-14-quickgelu", "dfn5b", "photographs", "DFN, very large"),
    KnownBackbone("EVA02-B-16", "merged2b_s8b_b131k", "photographs", "EVA-02, rotary positions"),
    KnownBackbone("PE-Core-B-16", "meta", "photographs", "Perception Encoder; sentences of 32 tokens"),
    KnownBackbone("PE-Core-L-14-336", "meta", "photographs", "Perception Encoder, large, for details"),
    KnownBackbone("MobileCLIP2-S0", "dfndr2b", "photographs", "small and fast; a hybrid image tower"),
    KnownBackbone("ViTamin-L", "datacomp1b", "photographs", "a hybrid image tower, large"),
    KnownBackbone("convnext_base_w", "laion2b_s13b_b82k", "photographs", "a convolutional image tower"),
    KnownBackbone("coca_ViT-B-32", "laion2b_s13b_b90k", "photographs", "CoCa, also trained to write captions"),
    KnownBackbone("ViT-B-16-SigLIP", "webli", "photographs", "SigLIP, English"),
    KnownBackbone("ViT-B-16-SigLIP2", "webli", "many languages", "SigLIP 2, also for photographs in English"),
    KnownBackbone("ViT-SO400M-14-SigLIP2", "webli", "many languages", "SigLIP 2, large"),
    KnownBackbone("ViT-H-14-worldwide-quickgelu", "metaclip2_worldwide", "many languages", "MetaCLIP 2, very large"),
    KnownBackbone("xlm-roberta-base-ViT-B-32", "laion5b_s13b_b90k", "many languages", "XLM-R as text tower"),
    KnownBackbone("nllb-clip-base-siglip", "mrl", "many languages", "NLLB as text tower"),
    KnownBackbone(
        "hf-hub:microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224",
        None,
        "medicine",
        "BiomedCLIP: radiology, microscopy, pathology and other figures of articles; a BERT as text tower",
        _BIOMEDCLIP,
    ),
    KnownBackbone("ViT-B-32-quickgelu", "RemoteCLIP-ViT-B-32.pt", "satellites", "RemoteCLIP, from OpenAI's"),
    KnownBackbone("ViT-L-14-quickgelu", "RemoteCLIP-ViT-L-14.pt", "satellites", "RemoteCLIP, large"),
    KnownBackbone("ViT-B-32-quickgelu", "RS5M_ViT-B-32.pt", "satellites", "GeoRSCLIP, from OpenAI's"),
    KnownBackbone("hf-hub:imageomics/bioclip", None, "nature", "BioCLIP: animals, plants and fungi", _BIOCLIP),
)

_XLM_R = {"model_type": "xlm-roberta", "vocab_size": 250002, "max_position_embeddings": 514, "type_vocab_size": 1}
_NLLB = {
    "model_type": "m2m_100",
    "vocab_size": 256206,
    "max_position_embeddings": 1024,
    "d_model": 1024,
    "encoder_attention_heads": 16,
    "decoder_attention_heads": 16,
    "pad_token_id": 1,
    "scale_embedding": True,
}
_BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
_LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
TEXT_CONFIGS: dict[str, dict[str, Any]] = {
    "roberta-base": {**_XLM_R, **_BASE, "model_type": "roberta", "vocab_size": 50265, "pad_token_id": 1},
    "xlm-roberta-base": {**_XLM_R, **_BASE, "pad_token_id": 1},
    "xlm-roberta-large": {**_XLM_R, **_LARGE, "pad_token_id": 1},
    "facebook/nllb-200-distilled-600M": {
        **_NLLB,
        "encoder_layers": 12,
        "decoder_layers": 12,
        "encoder_ffn_dim": 4096,
        "decoder_ffn_dim": 4096,
    },
    "facebook/nllb-200-distilled-1.3B": {
        **_NLLB,
        "encoder_layers": 24,
        "decoder_layers": 24,
        "encoder_ffn_dim": 8192,
        "decoder_ffn_dim": 8192,
    },
    "microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract": {
        **_BASE,
        "model_type": "bert",
        "vocab_size": 30522,
        "max_position_embeddings": 512,
        "type_vocab_size": 2,
    },
}
"""Published sizes of text towers, by which they are described without a network; they are never loaded with these."""
