"""maple-clip: adapt CLIP to your images from a handful of examples, by multi-modal prompt learning."""

import lazy_loader

__version__ = "0.1.0"

# The public names are listed, with their types, in __init__.pyi. Each is imported when it is first used, so that
# `import maple` loads neither PyTorch nor a model, and the command line starts at once.
__getattr__, __dir__, _lazy_names = lazy_loader.attach_stub(__name__, __file__)
__all__ = ["__version__", *_lazy_names]
