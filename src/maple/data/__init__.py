"""Data sets, images, transforms and batches. Nothing here depends on a model."""

import lazy_loader

# Names and types are in __init__.pyi; each is imported on first use, since images are read without torch.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
