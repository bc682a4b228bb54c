"""Classify images with a trained method: on PyTorch, or an export on onnxruntime without torch."""

import lazy_loader

# Names and types are in __init__.pyi; each is imported on first use, since an export is used without torch.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
