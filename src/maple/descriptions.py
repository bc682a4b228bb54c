"""How reports present a method. Written by the method's class, read by `maple.report`, which imports no method."""

from dataclasses import dataclass
from typing import Literal

DEFAULT_METHOD = "maple"
"""The method that is used where none is named."""
ALL_SHOTS = "all"
"""In files and options, for `data.shots`: every training image."""

ProtocolName = Literal["base-to-novel", "few-shot", "cross-dataset", "domain-generalization"]

ReportRole = Literal["zero-shot", "baseline", "class baseline", "headline"]
"""What a method is to a report:

zero-shot: nothing is learned, so its numbers belong in the tables of any number of shots, as the first baseline.
baseline: paired tests compare every other method with it.
class baseline: the changes of each class are also shown against it; against the last one, if there are several.
headline: the result is summarised for this method, where it was evaluated.
"""


@dataclass(frozen=True)
class PlotStyle:
    """How a method is drawn: its colour as #rrggbb; matplotlib's marker and line, which identify it without colour."""

    color: str
    marker: str
    line: str | tuple[int, tuple[float, ...]]


@dataclass(frozen=True)
class MethodDescription:
    """What a report needs to know of a method; the defaults are those of a method that is not installed.

    Tables are in ascending `order`; methods with an equal one are sorted by name.
    """

    title: str
    order: int = 1_000_000
    plot_style: PlotStyle | None = None
    roles: frozenset[ReportRole] = frozenset()

    @property
    def is_zero_shot(self) -> bool:
        """Whether nothing is learned."""
        return "zero-shot" in self.roles
