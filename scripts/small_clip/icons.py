"""Drawings of the open icon sets in the npm package `@iconify/json`, by name.

Only sets under the licences of `LICENCES` are read; sets of logos, flags, programming languages and currencies are not,
since their names are brands. The names of icons are reduced to what they show: `home-outline`, `home-24-filled` and
`bxs-home` are all "home". Sets of one maker that share drawings form a family; families, not sets, are kept apart.
"""

import io
import json
import re
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import resvg_py
from PIL import Image

PACKAGE, VERSION = "@iconify/json", "2.2.535"
LICENCES = frozenset(
    {"MIT", "Apache-2.0", "ISC", "CC0-1.0", "CC-BY-3.0", "CC-BY-4.0", "OFL-1.1", "BSD-3-Clause", "Unlicense"}
)
SIDE = 64
VARIANTS = 4  # of one name in one set: a set with nine weights of a line would outweigh all others
FAMILIES = 2  # that must draw a name
# Training and test images of the bundled classes show drawings of these families. Of 600 random choices of 43 and 21
# families, the one with most names of at least 25 sets that have 16 and 6 drawings in them.
TRAIN_FAMILIES = frozenset(
    {
        "akar-icons", "at-icons", "bi", "bitcoin-icons", "codex", "eos-icons", "fe", "fluent", "fontisto", "foundation",
        "griddy-icons", "heroicons", "icon-park", "iconamoon", "iconoir", "icons8", "il", "ionicons", "lets-icons",
        "material", "memory", "meteocons", "meteor-icons", "mi", "mynaui", "oi", "ph", "pixel", "qlementine-icons",
        "raphael", "rivet-icons", "sidekickicons", "solar", "streamline-cyber", "streamline-flex",
        "streamline-freehand", "streamline-kameleon", "streamline-plump", "tabler", "teenyicons", "unicons", "weui",
        "whh"
    }
)  # fmt: skip
TEST_FAMILIES = frozenset(
    {
        "awesome", "basil", "boxicons", "duo-icons", "ei", "ep", "eva", "gg", "iconmind", "ix", "jam", "lineicons",
        "ls", "mage", "mingcute", "octicon", "pajamas", "pepicons", "topcoat", "vaadin", "zmdi"
    }
)  # fmt: skip

_BOX = {"left": 0, "top": 0, "width": 16, "height": 16}  # where neither an icon nor its set says so
_SKIPPED_CATEGORIES = {"Logos", "Programming"}
# Logos, flags and currencies outside those categories; spinners; and Twemoji, a style that stays unseen.
_SKIPPED = frozenset(
    {
        "bpmn", "cib", "cif", "circle-flags", "cryptocurrency", "cryptocurrency-color", "flag", "flagpack", "geo",
        "ginetex", "k8s", "selfhst", "svg-spinners", "thesvg", "thesvg-color", "token", "token-branded", "twemoji"
    }
)  # fmt: skip
_FAMILIES = {
    "awesome": r"fa(-.*|\d.*)?|la",
    "boxicons": r"bxs?|boxicons",
    "feather": r"feather|lucide(-lab)?",
    "fluent": r"fluent(-color|-mdl2)?",
    "ionicons": r"ion|famicons",
    "material": r"ic|material-symbols(-light)?|mdi(-light)?|line-md",
    "unicons": r"ui[lmst]",
}
_MANNERS = r"-(color|outline|solid|twotone|pop|print|pencil|monotone|poly|high-contrast|flat|v1|light)$"
# Words at the end of an icon's name that say how it is drawn, or which of several drawings it is.
_STYLE_WORDS = frozenset(
    {
        "alt", "alternate", "alternative", "big", "bold", "bolder", "broken", "bulk", "color", "colored", "colour",
        "curved", "duotone", "fill", "filled", "flat", "l", "large", "light", "line", "linear", "loop", "medium",
        "micro", "mini", "mono", "new", "o", "old", "outline", "outlined", "r", "regular", "remix", "round", "rounded",
        "s", "sharp", "small", "solid", "stroke", "thin", "tone", "two", "twotone", "variant"
    }
)  # fmt: skip
_SET_WORDS = frozenset(["baseline", "bx", "bxs", "duotone", "ios", "md", "outline", "round", "sharp", "twotone"])


@dataclass(frozen=True, slots=True)
class Icon:
    """One drawing: the name it is reduced to, its set, the family of the set, and the SVG."""

    name: str
    icon_set: str
    family: str
    key: str
    svg: str
    has_colours: bool


def fetch(work: Path) -> Path:
    """Download and unpack the npm package into `work`, unless it is there; return its folder."""
    folder = work / f"iconify-json-{VERSION}"
    if not folder.exists():
        subprocess.run(["npm", "pack", "--silent", f"{PACKAGE}@{VERSION}"], cwd=work, check=True)
        with tarfile.open(work / f"iconify-json-{VERSION}.tgz") as archive:
            archive.extractall(folder, filter="data")
    return folder / "package"


def family_of(icon_set: str) -> str:
    """The family of a set: its maker's other sets, or forks of it, draw the same things in the same way."""
    for family, pattern in _FAMILIES.items():
        if re.fullmatch(pattern, icon_set):
            return family
    return re.sub(_MANNERS, "", icon_set)


def name_of(key: str) -> str | None:
    """What an icon shows, from its key in a set; None where the key is not made of a few English words."""
    words = [word for word in re.split("[-_]", key.lower()) if word]
    while len(words) > 1 and (words[-1] in _STYLE_WORDS or words[-1].isdigit()):
        words.pop()
    while len(words) > 1 and words[0] in _SET_WORDS:
        words.pop(0)
    name = " ".join(words)
    return name if len(words) <= 3 and re.fullmatch(r"[a-z]{2,}( [a-z]+){0,2}|x", name) else None


def licensed_sets(package: Path) -> dict[str, Any]:
    """The records of the sets that are read: name, author, licence."""
    records = json.loads((package / "collections.json").read_text(encoding="utf-8"))
    return {
        key: record
        for key, record in records.items()
        if record["license"].get("spdx") in LICENCES
        and record.get("category") not in _SKIPPED_CATEGORIES
        and key not in _SKIPPED
    }


def icons(package: Path, not_counted: frozenset[str] = frozenset()) -> list[Icon]:
    """All drawings of names that `FAMILIES` families draw, at most `VARIANTS` of a name in a set, in a fixed order.

    Variants of a name are taken at equal steps through the keys of a set, so that its manners of drawing all occur.
    Families in `not_counted` do not help a name to its `FAMILIES`.
    """
    drawn: dict[str, dict[str, list[Icon]]] = {}
    for key, record in sorted(licensed_sets(package).items()):
        content = json.loads((package / "json" / f"{key}.json").read_text(encoding="utf-8"))
        for icon_key, icon in sorted(content["icons"].items()):
            name = None if icon.get("hidden") else name_of(icon_key)
            if name is None:
                continue
            box = [icon.get(side, content.get(side, default)) for side, default in _BOX.items()]
            svg = (
                '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" color="#000" '
                f'width="{box[2]}" height="{box[3]}" viewBox="{" ".join(map(str, box))}">{icon["body"]}</svg>'
            )
            made = Icon(name, key, family_of(key), icon_key, svg, bool(record.get("palette")))
            drawn.setdefault(name, {}).setdefault(key, []).append(made)
    rows = []
    for name in sorted(drawn):
        sets = drawn[name]
        if len({family_of(key) for key in sets} - not_counted) >= FAMILIES:
            for variants in sets.values():
                step = max(1, len(variants) / VARIANTS)
                rows += [variants[int(place * step)] for place in range(min(VARIANTS, len(variants)))]
    return rows


def rasterise(icon: Icon) -> bytes | None:
    """The drawing as SIDE x SIDE x 4 bytes, cropped to the square around its ink; None where nothing is drawn."""
    try:
        content = resvg_py.svg_to_bytes(svg_string=icon.svg, width=2 * SIDE)
        image = Image.open(io.BytesIO(bytes(content))).convert("RGBA")
    except (ValueError, OSError):
        return None
    box = image.getchannel("A").point([0] * 32 + [255] * 224).getbbox()
    if box is None:
        return None
    left, top, right, bottom = box
    side = max(right - left, bottom - top)
    if side < SIDE // 4:
        return None
    side += side // 16
    x, y = (left + right - side) // 2, (top + bottom - side) // 2
    return (
        image.crop((x, y, x + side, y + side)).resize((SIDE, SIDE), Image.Resampling.BOX, reducing_gap=None).tobytes()
    )
