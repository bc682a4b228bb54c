"""What the packaged CLIP is pretrained on: names, and several drawings of each, from emoji and from icon sets."""

import json
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from maple.data.emoji.archive import EmojiArchive
from small_clip.icons import SIDE, TEST_FAMILIES, TRAIN_FAMILIES, fetch, icons, licensed_sets, rasterise

SEEN_STYLES = ("openmoji", "noto", "fluent")  # of the emoji
Bytes = npt.NDArray[np.uint8]


class Corpus:
    """Drawings by name, read from a folder that `prepare` has written.

    Attributes:
        names: the N names, in alphabetical order.
        keywords: for each name, other words for it (only emoji have any).
        families: the families of icon sets, and the styles of emoji.
        sets: name, author and licence of each icon set.
        masks: opacity of the drawings of one colour, uint8 [M, 64, 64].
        colours: the other drawings, uint8 [K, 64, 64, 4], colours not multiplied by opacity.
        drawings: the rows (name, family, whether in colours, place in `masks` or `colours`), int [M + K, 4].
    """

    def __init__(self, folder: Path) -> None:
        index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        self.names: list[str] = index["names"]
        self.keywords: list[list[str]] = index["keywords"]
        self.families: list[str] = index["families"]
        self.sets: dict[str, dict[str, str]] = index["sets"]
        self.masks: Bytes = np.load(folder / "masks.npy", mmap_mode="r")
        self.colours: Bytes = np.load(folder / "colours.npy", mmap_mode="r")
        self.drawings: npt.NDArray[np.int64] = np.load(folder / "drawings.npy")


def prepare(work: Path, folder: Path, workers: int) -> None:
    """Draw everything that pretraining sees into `folder`: a few minutes, 500 MB."""
    package = fetch(work)
    held_out = TRAIN_FAMILIES | TEST_FAMILIES
    drawn = [icon for icon in icons(package, held_out) if icon.family not in held_out]
    with ProcessPoolExecutor(workers) as pool:
        pixels = list(pool.map(rasterise, drawn, chunksize=64))
    rows: list[tuple[str, str, Bytes]] = [
        (icon.name, icon.family, np.frombuffer(content, np.uint8).reshape(SIDE, SIDE, 4))
        for icon, content in zip(drawn, pixels, strict=True)
        if content is not None
    ]
    archive = EmojiArchive()
    keywords: dict[str, list[str]] = {}
    for concept in archive.concepts():
        keywords[concept.name] = list(concept.keywords)
        rows += [
            (concept.name, f"emoji-{style}", np.asarray(archive.glyph(style, concept.code))) for style in SEEN_STYLES
        ]
    names = sorted({name for name, _, _ in rows})
    families = sorted({family for _, family, _ in rows})
    name_rows, family_rows = ({text: row for row, text in enumerate(texts)} for texts in (names, families))
    places, masks, colours = [], [], []
    for name, family, glyph in rows:
        shown = glyph[..., 3] > 0
        in_colours = bool(glyph[..., :3][shown].max(initial=0) > 40)
        places.append((name_rows[name], family_rows[family], int(in_colours), len(colours if in_colours else masks)))
        (colours if in_colours else masks).append(glyph if in_colours else glyph[..., 3])
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "masks.npy", np.stack(masks))
    np.save(folder / "colours.npy", np.stack(colours))
    np.save(folder / "drawings.npy", np.array(places, np.int64))
    drawn_sets = {icon.icon_set for icon in drawn}
    index: dict[str, Any] = {
        "names": names,
        "keywords": [keywords.get(name, []) for name in names],
        "families": families,
        "sets": {
            key: {"name": record["name"], "author": record["author"]["name"], "licence": record["license"]["spdx"]}
            for key, record in licensed_sets(package).items()
            if key in drawn_sets
        },
    }
    (folder / "index.json").write_text(json.dumps(index), encoding="utf-8")
    print(f"{len(names)} names, {len(masks)} drawings in one colour, {len(colours)} in several")
