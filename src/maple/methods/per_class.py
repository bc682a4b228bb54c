"""Methods with weights or prompts of each class, which can only predict the classes they were trained on."""

from collections.abc import Sequence

import torch
from torch import Tensor

from maple.errors import UnlearnedClassesError
from maple.methods.base import Method, MethodSettings
from maple.names import NameRows


class TrainedClasses:
    """Maps class names to the rows of what was learned for them, as `NameRows`.

    Args:
        learned: what was learned for each class, for error messages.
        advice: what to do if another class is needed, for error messages.
    """

    def __init__(self, learned: str, names: Sequence[str], *, advice: str) -> None:
        self._learned = learned
        self._advice = advice
        self._count = len(names)
        self._names = NameRows(names)

    def rows(self, names: Sequence[str], device: torch.device) -> Tensor:
        """The row of each class name: [C] int64.

        Raises:
            ClassNamesError: the list or a name is empty.
            UnlearnedClassesError: a class was not trained.
        """
        rows = self._names.find(names)
        unknown = [name for name, row in zip(names, rows, strict=True) if row is None]
        if unknown:
            raise UnlearnedClassesError(
                f"{self._learned} were learned for {self._count} classes, and {unknown[0]!r} is not one of them; use "
                f"those classes, or {self._advice}"
            )
        with torch.inference_mode(False):  # as in `Method.set_class_names`
            return torch.tensor(rows, device=device)


class PerClassMethod(Method):
    """Base class of methods with weights for each class.

    A subclass calls `set_trained_classes` before `set_class_names`; `rows` are then the rows of the current classes.
    """

    def set_trained_classes(self, learned: str, names: Sequence[str]) -> None:
        """Set the classes that have weights; `learned` names the weights in error messages."""
        advice = "choose a method that can predict new classes, such as maple, coop or clip_adapter"
        self._trained = TrainedClasses(learned, names, advice=advice)

    def set_class_names(self, names: Sequence[str]) -> None:
        rows = self._trained.rows(names, self.backbone.device)
        super().set_class_names(names)
        self.rows = rows


class PerClassSettings(MethodSettings):
    """Base class of the settings of a `PerClassMethod`."""

    @property
    def supports_new_classes(self) -> bool:
        return False
