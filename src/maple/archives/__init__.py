"""Read PyTorch checkpoint files from any source without running or importing anything they name.

`torch_file` reads the two formats of `torch.save`, `unpickle` follows a pickle without calling anything, and `refs`
holds what stands for tensors and objects until their numbers are read.
"""

from maple.archives.refs import Placeholder
from maple.archives.torch_file import read_checkpoint

__all__ = ["Placeholder", "read_checkpoint"]
