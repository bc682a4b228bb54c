"""Read checkpoint files of PyTorch from any source; nothing that they name is run or imported.

`torch_file` reads the formats of `torch.save` and TorchScript, `unpickle` follows a pickle without calling anything.
"""

from maple.archives.torch_file import read_checkpoint, read_torchscript
from maple.archives.unpickle import Placeholder

__all__ = ["Placeholder", "read_checkpoint", "read_torchscript"]
