"""Classes that a method has learned something of its own for, and can say nothing beyond."""

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from maple.errors import UnlearnedClassesError
from maple.methods.base import Method, MethodSettings
from maple.names import clean_class_names


class KnownClasses:
    """Where each learned class lies; equal names are told apart by their order.

    Args:
        what: what was learned for each class, as messages call it.
        advice: what else there is to do than to ask about known classes.
    """

    def __init__(self, what: str, names: Sequence[str], *, advice: str) -> None:
        self._what = what
        self._advice = advice
        self._count = len(names)
        self._places = {named: row for row, named in enumerate(_numbered(names))}

    def rows(self, names: Sequence[str], device: torch.device) -> Tensor:
        """Which learned class each name is: [C] int64.

        Raises:
            ClassNamesError: an empty list or name.
            UnlearnedClassesError: a name was not learned.
        """
        asked = _numbered(names)
        unknown = [name for name, number in asked if (name, number) not in self._places]
        if unknown:
            raise UnlearnedClassesError(
                f"{self._what} were learned for {self._count} classes and {unknown[0]!r} is not one; ask about those "
                f"classes, or {self._advice}"
            )
        with torch.inference_mode(False):  # as in `Method.set_class_names`
            return torch.tensor([self._places[named] for named in asked], device=device)


class PerClassMethod(Method):
    """A method with weights of its own for each class.

    A subclass calls `learn_classes` before `set_class_names`; `rows` are then the places of the current classes.
    """

    def learn_classes(self, what: str, names: Sequence[str]) -> None:
        """Know these classes, and no others."""
        advice = "choose a method that can name new classes, such as maple, coop or clip_adapter"
        self._known = KnownClasses(what, names, advice=advice)

    def set_class_names(self, names: Sequence[str]) -> None:
        """As the contract says.

        Raises:
            UnlearnedClassesError: a class has no weights.
        """
        rows = self._known.rows(names, self.backbone.device)
        super().set_class_names(names)
        self.rows = rows


class PerClassSettings(MethodSettings):
    """Base of the settings of such a method."""

    @property
    def supports_new_classes(self) -> bool:
        """Never."""
        return False


def _numbered(names: Sequence[str]) -> list[tuple[str, int]]:
    seen: Counter[str] = Counter()
    numbered = []
    for name in clean_class_names(names):
        numbered.append((name, seen[name]))
        seen[name] += 1
    return numbered
