"""Build the emoji archive of the package from four npm packages: same input versions, same bytes.

    python scripts/build_emoji.py --work DIR [--output src/maple/assets/emoji]

Needs npm and `cairosvg`, in addition to the package's own dependencies. It writes:

- `glyphs.zip`: stored lossless WebP sprite sheets `STYLE/GROUP.webp`, 16 glyphs of 64 x 64 RGBA in a row, in the
  order of the index;
- `index.json`: per concept the code points, name, keywords, group and subgroup; per style the author, the npm
  package and version, and the licence;
- `CREDITS.md`: the attributions.

A concept is one emoji of OpenMoji's table without its skin-tone and gender variants that all five styles draw.
Noto and Twemoji come at 64 pixels and keep them; OpenMoji, its line art and Fluent have wide margins, are cropped
to the square around their ink and scaled. Colours are rounded to six bits and opacity to four: a quarter
of the size, and not visible at 64 pixels.
"""

import argparse
import io
import json
import re
import subprocess
import tarfile
import unicodedata
import zipfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import cairosvg
import numpy as np
from PIL import Image

GLYPH = 64
COLUMNS = 16
SVG_SIZE = 288  # SVG files are drawn this large and reduced by area

PACKAGES = {
    "openmoji": ("openmoji", "17.0.0"),
    "google": ("emoji-datasource-google", "16.0.0"),
    "twitter": ("emoji-datasource-twitter", "16.0.0"),
    "fluent": ("@lobehub/fluent-emoji-3d", "1.1.0"),
}
STYLES: dict[str, dict[str, str]] = {
    "noto": {
        "title": "Noto Color Emoji",
        "author": "Google LLC",
        "source": "https://github.com/googlefonts/noto-emoji",
        "licence": "Apache-2.0",
        "package": "google",
    },
    "twemoji": {
        "title": "Twemoji",
        "author": "Twitter, Inc. and other contributors",
        "source": "https://github.com/jdecked/twemoji",
        "licence": "CC-BY-4.0",
        "package": "twitter",
    },
    "openmoji": {
        "title": "OpenMoji, colour",
        "author": "OpenMoji, the open-source emoji and icon project (HfG Schwäbisch Gmünd and contributors)",
        "source": "https://openmoji.org",
        "licence": "CC-BY-SA-4.0",
        "package": "openmoji",
    },
    "lineart": {
        "title": "OpenMoji, black line art",
        "author": "OpenMoji, the open-source emoji and icon project (HfG Schwäbisch Gmünd and contributors)",
        "source": "https://openmoji.org",
        "licence": "CC-BY-SA-4.0",
        "package": "openmoji",
    },
    "fluent": {
        "title": "Fluent Emoji, 3D",
        "author": "Microsoft Corporation; packaged by LobeHub",
        "source": "https://github.com/microsoft/fluentui-emoji",
        "licence": "MIT",
        "package": "fluent",
    },
}
LICENCE_URLS = {
    "Apache-2.0": "https://www.apache.org/licenses/LICENSE-2.0",
    "CC-BY-4.0": "https://creativecommons.org/licenses/by/4.0/",
    "CC-BY-SA-4.0": "https://creativecommons.org/licenses/by-sa/4.0/",
    "MIT": "https://opensource.org/license/mit",
}
GROUPS = {
    "animals-nature": "animals",
    "food-drink": "food",
    "objects": "objects",
    "travel-places": "places",
    "smileys-emotion": "people",
    "people-body": "people",
    "symbols": "symbols",
    "activities": "activities",
    "flags": "flags",
}
_GENDERS = {"1f468", "1f469"}  # man, woman
_GENDER_SIGNS = {"2640", "2642"}
# man, woman, older man, older woman, and couples holding hands: forms of person, older person and people
_GENDERED = {"1f468", "1f469", "1f474", "1f475", "1f46b", "1f46c", "1f46d"}
_EMPTY = {"1f195"}  # OpenMoji's line art of the NEW button has nothing to draw


def fetch(work: Path) -> dict[str, Path]:
    """Download and unpack the npm packages into `work`, unless they are there; return their folders by key."""
    folders = {}
    for key, (name, version) in PACKAGES.items():
        stem = f"{name.removeprefix('@').replace('/', '-')}-{version}"
        folder, archive = work / stem, work / f"{stem}.tgz"
        if not archive.exists():
            subprocess.run(["npm", "pack", "--silent", f"{name}@{version}"], cwd=work, check=True)
        if not folder.exists():
            with tarfile.open(archive) as tar:
                tar.extractall(folder, filter="data")
        folders[key] = folder / "package"
    return folders


def canonical(code: str) -> str:
    """Lower-case code points joined by "-", without the variation selector fe0f."""
    return "-".join(part for part in code.lower().split("-") if part != "fe0f")


def files_by_code(folder: Path, suffix: str) -> dict[str, Path]:
    """The files of `folder` by canonical code; of two spellings the one that sorts first."""
    files: dict[str, Path] = {}
    for path in sorted(folder.glob(f"*{suffix}")):
        files.setdefault(canonical(path.stem), path)
    return files


def clean_name(text: str) -> str:
    """`text` as a plain lower-case English class name: "flag: Åland Islands" -> "flag of aland islands"."""
    text = _to_ascii(text).lower().replace("&", " and ").replace("_", " ")
    text = re.sub(r"^flag: (.*)$", r"flag of \1", text)
    text = re.sub(r"^keycap: #$", "keycap hash", text)
    text = re.sub(r"^keycap: \*$", "keycap asterisk", text)
    text = re.sub(r"[^a-z0-9' -]+", " ", text)
    return re.sub(r"\s+", " ", text).strip()


def _to_ascii(text: str) -> str:
    text = text.replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")
    return unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()


def is_gender_variant(code: str, codes: set[str]) -> bool:
    """Whether the emoji is the male or female form of another, or a family that is described by its members."""
    parts = code.split("-")
    if _GENDER_SIGNS & set(parts[1:]):
        return True
    if _GENDERS & set(parts) and "200d" in parts:
        neutral = "-".join("1f9d1" if part in _GENDERS else part for part in parts)
        return neutral in codes or len(_GENDERS & set(parts)) + parts.count("200d") > 1
    return code in _GENDERED


def concepts(folders: dict[str, Path], drawn: dict[str, dict[str, Path]]) -> list[dict[str, Any]]:
    """The rows of the index in OpenMoji's order, sorted by group."""
    table = json.loads((folders["openmoji"] / "data/openmoji.json").read_text(encoding="utf-8"))
    table = [row for row in table if not row["skintone"] and row["group"] in GROUPS]
    codes = {canonical(row["hexcode"]) for row in table}
    rows, names = [], set()
    for row in sorted(table, key=lambda row: row["order"]):
        code = canonical(row["hexcode"])
        if code in _EMPTY or is_gender_variant(code, codes) or not all(code in files for files in drawn.values()):
            continue
        name = clean_name(row["annotation"])
        if name in names:
            raise SystemExit(f"two emoji are called {name!r}")
        names.add(name)
        tags = [clean_name(tag) for tag in f"{row['tags']},{row['openmoji_tags']}".split(",")]
        keywords = list(dict.fromkeys(tag for tag in tags if tag and tag != name))
        group = GROUPS[row["group"]]
        rows.append({"code": code, "name": name, "keywords": keywords, "group": group, "subgroup": row["subgroups"]})
    return sorted(rows, key=lambda row: list(dict.fromkeys(GROUPS.values())).index(row["group"]))


def inked_square(alpha: Image.Image) -> tuple[int, int, int, int]:
    """The smallest square around everything opaque, with a sixty-fourth of its side as margin."""
    box = alpha.point([0] * 16 + [255] * 240).getbbox()
    if box is None:
        raise SystemExit("an emoji is empty")
    left, top, right, bottom = box
    side = max(right - left, bottom - top)
    side += -(-side // 32)
    x, y = (left + right - side) // 2, (top + bottom - side) // 2
    return x, y, x + side, y + side


def rasterise(job: tuple[str, Path]) -> bytes:
    """One glyph as 64 x 64 x 4 bytes, colours of invisible pixels zero."""
    style, path = job
    if path.suffix == ".svg":
        png = cairosvg.svg2png(url=str(path), output_width=SVG_SIZE, output_height=SVG_SIZE)
        image = Image.open(io.BytesIO(png)).convert("RGBA")
    else:
        image = Image.open(path).convert("RGBA")
    if style not in ("noto", "twemoji"):
        image = image.crop(inked_square(image.getchannel("A")))
    if image.size != (GLYPH, GLYPH):
        large = image.width >= 2 * GLYPH
        image = image.resize((GLYPH, GLYPH), Image.Resampling.BOX if large else Image.Resampling.BICUBIC)
    pixels = np.asarray(image).astype(np.int32)
    colour, alpha = pixels[..., :3], pixels[..., 3:]
    alpha = (alpha + 8) // 17 * 17
    colour = np.minimum((colour + 2) // 4, 63)
    colour = colour * 4 + colour // 16
    return np.concatenate([np.where(alpha > 0, colour, 0), alpha], axis=2).astype(np.uint8).tobytes()


def sheet(glyphs: list[bytes]) -> bytes:
    """The glyphs side by side, 16 in a row, as lossless WebP."""
    rows = -(-len(glyphs) // COLUMNS)
    canvas = Image.new("RGBA", (COLUMNS * GLYPH, rows * GLYPH))
    for place, glyph in enumerate(glyphs):
        image = Image.frombytes("RGBA", (GLYPH, GLYPH), glyph)
        canvas.paste(image, (place % COLUMNS * GLYPH, place // COLUMNS * GLYPH))
    buffer = io.BytesIO()
    canvas.save(buffer, "WEBP", lossless=True, quality=100, method=6, exact=False)
    return buffer.getvalue()


def sheets(rows: list[dict[str, Any]], drawn: dict[str, dict[str, Path]]) -> dict[str, bytes]:
    """Every sprite sheet by its name in the archive."""
    wanted = {}
    with ProcessPoolExecutor() as pool:
        for style, files in drawn.items():
            for group in dict.fromkeys(row["group"] for row in rows):
                jobs = [(style, files[row["code"]]) for row in rows if row["group"] == group]
                wanted[f"{style}/{group}.webp"] = list(pool.map(rasterise, jobs, chunksize=8))
        return dict(zip(wanted, pool.map(sheet, wanted.values()), strict=True))


def write_archive(path: Path, members: dict[str, bytes]) -> None:
    """A zip of stored members in their order, without dates: the same members give the same bytes."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in members.items():
            info = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
            info.create_system = 3
            info.external_attr = 0o644 << 16
            archive.writestr(info, content)


def style_records() -> dict[str, dict[str, str]]:
    """STYLES with the npm package and version spelt out."""
    records = {}
    for style, record in STYLES.items():
        name, version = PACKAGES[record["package"]]
        records[style] = {**record, "package": name, "version": version}
    return records


def write_index(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write one concept per line, so that a changed concept is one changed line."""

    def dump(value: Any) -> str:
        return json.dumps(value, ensure_ascii=False)

    styles = ",\n  ".join(f"{dump(name)}: {dump(record)}" for name, record in style_records().items())
    lines = ",\n  ".join(dump(row) for row in rows)
    head = f'{{\n "format": 1,\n "glyph_size": {GLYPH},\n "columns": {COLUMNS},\n'
    path.write_text(f'{head} "styles": {{\n  {styles}\n }},\n "concepts": [\n  {lines}\n ]\n}}\n', encoding="utf-8")


def credits(count: int) -> str:
    """The attributions that the licences require."""
    parts = [
        "# Credits of the emoji archive\n",
        f"`glyphs.zip` holds {count} emoji in five styles. They were reduced in size (64 x 64 pixels), cropped to their"
        " ink where they had wide margins, reduced in colour depth, and arranged in sheets by"
        " `scripts/build_emoji.py`; nothing else was changed. Names, keywords and groups in `index.json` are"
        " OpenMoji's, in lower case.\n",
    ]
    for style, record in style_records().items():
        url = LICENCE_URLS[record["licence"]]
        parts.append(
            f"## {style}: {record['title']}\n\n"
            f"- By {record['author']}, <{record['source']}>\n"
            f"- Taken from the npm package `{record['package']}` {record['version']}\n"
            f"- Licence: {record['licence']}, <{url}>\n"
        )
    parts.append(
        "The sheets `openmoji/*` and `lineart/*` and the file `index.json` are adaptations of OpenMoji and, as its"
        " licence requires, are themselves under CC BY-SA 4.0. The packages `emoji-datasource-google` and"
        " `emoji-datasource-twitter` are by Cal Henderson (MIT); the images in them are by the authors above.\n"
    )
    return "\n".join(parts)


def main() -> None:
    """Build the archive."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for the downloads")
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "src/maple/assets/emoji")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    options.output.mkdir(parents=True, exist_ok=True)
    folders = fetch(options.work)
    drawn = {
        "noto": files_by_code(folders["google"] / "img/google/64", ".png"),
        "twemoji": files_by_code(folders["twitter"] / "img/twitter/64", ".png"),
        "openmoji": files_by_code(folders["openmoji"] / "color/svg", ".svg"),
        "lineart": files_by_code(folders["openmoji"] / "black/svg", ".svg"),
        "fluent": files_by_code(folders["fluent"] / "assets", ".webp"),
    }
    rows = concepts(folders, drawn)
    members = sheets(rows, drawn)
    write_archive(options.output / "glyphs.zip", members)
    write_index(options.output / "index.json", rows)
    (options.output / "CREDITS.md").write_text(credits(len(rows)), encoding="utf-8")
    for style in drawn:
        size = sum(len(content) for name, content in members.items() if name.startswith(f"{style}/"))
        print(f"{style}: {size / 1e6:.2f} MB")
    print(f"{len(rows)} concepts")


if __name__ == "__main__":
    main()
