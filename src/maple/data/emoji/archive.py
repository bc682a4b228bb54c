"""The bundled emoji, by group and style."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from PIL import Image

from maple.data.bundled_archive import BundledArchive
from maple.errors import DataError, one_of


@dataclass(frozen=True, slots=True)
class Concept:
    """One emoji: `code` is its code points in lower-case hexadecimal joined by "-", without variation selectors."""

    code: str
    name: str
    keywords: tuple[str, ...]
    group: str
    subgroup: str


class EmojiArchive(BundledArchive):
    """The bundled emoji, in five styles; opened on first use. Thread-safe."""

    contents, zip_name, mode = "emoji", "glyphs.zip", "RGBA"

    @cached_property
    def _concepts(self) -> dict[str, tuple[Concept, ...]]:
        groups: dict[str, list[Concept]] = {}
        for row in self._index["concepts"]:
            concept = Concept(row["code"], row["name"], tuple(row["keywords"]), row["group"], row["subgroup"])
            groups.setdefault(concept.group, []).append(concept)
        return {group: tuple(concepts) for group, concepts in groups.items()}

    @cached_property
    def _places(self) -> dict[str, tuple[str, int]]:
        return {c.code: (group, i) for group, concepts in self._concepts.items() for i, c in enumerate(concepts)}

    @property
    def styles(self) -> tuple[str, ...]:
        """The names of the styles."""
        return tuple(self._index["styles"])

    @property
    def groups(self) -> tuple[str, ...]:
        """The names of the groups."""
        return tuple(self._concepts)

    @property
    def licences(self) -> Mapping[str, Mapping[str, str]]:
        """Per style: title, author, source, licence, and the original package and version."""
        return dict(self._index["styles"])

    def concepts(self, group: str | None = None) -> tuple[Concept, ...]:
        """Return the concepts of one group, or all, in the order of the archive; DataError if unknown."""
        if group is None:
            return tuple(concept for concepts in self._concepts.values() for concept in concepts)
        if group not in self._concepts:
            raise DataError(one_of("emoji group", group, self._concepts))
        return self._concepts[group]

    def glyph(self, style: str, code: str) -> Image.Image:
        """Return an emoji in a style: mode RGBA, 64 x 64 pixels, transparent around the drawing.

        Raises:
            DataError: there is no such style or code, or the archive is damaged.
        """
        if style not in self.styles:
            raise DataError(one_of("emoji style", style, self.styles))
        if code not in self._places:
            raise DataError(
                f"unknown emoji {code!r}; give code points as in EmojiArchive().concepts(), such as '1f436'"
            )
        group, place = self._places[code]
        size, columns = self._index["glyph_size"], self._index["columns"]
        left, top = place % columns * size, place // columns * size
        return self._sheet(f"{style}/{group}").crop((left, top, left + size, top + size))


def scene_seed(style: str, code: str, index: int) -> int:
    """Return the 64-bit seed of scene number `index` of an emoji in a style."""
    return int.from_bytes(hashlib.sha256(f"{style}/{code}/{index}".encode()).digest()[:8], "big")
