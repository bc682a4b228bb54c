"""Import published checkpoints of prompt learning methods; nothing in a file is executed.

`keys` recognises the tensors in a state dict, and `convert` turns them into the settings and parameters of a method.
Methods are named here because every published trainer has a file format of its own: the names are data of the formats.
"""

from maple.importers.convert import SAME_KEYS, ImportedPrompts, import_checkpoint

__all__ = ["SAME_KEYS", "ImportedPrompts", "import_checkpoint"]
