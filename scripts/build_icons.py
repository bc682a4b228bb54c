"""Build the icons of the package from the npm package `@iconify/json`: same input version, same bytes.

    python scripts/build_icons.py --work DIR [--output src/maple/assets/icons]

Needs npm and `resvg-py`, in addition to the package's own dependencies. It writes:

- `drawings.zip`: stored lossless WebP sheets `TOPIC.webp` of opacity, in each row those of a class, 64 x 64 pixels:
  16 for training, then 6 for the test;
- `index.json`: the names of each topic's classes, and the set and key of each drawing;
- `CREDITS.md`: the attributions.

A class is a name that at least 25 icon sets draw, and that stays with 16 and 6 different drawings after near-duplicates
are left out. Training and test drawings come from different families of sets, none of which the packaged CLIP has seen.
"""

import argparse
import io
import json
import sys
import zipfile
from collections import Counter, defaultdict
from concurrent.futures import ProcessPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))

from small_clip.icons import (
    PACKAGE,
    SIDE,
    TEST_FAMILIES,
    TRAIN_FAMILIES,
    VERSION,
    Icon,
    fetch,
    icons,
    licensed_sets,
    rasterise,
)

TRAIN, TEST = 16, 6
SETS = 25
SIMILAR = 0.985  # correlation of two drawings at 16 x 16 pixels above which they count as the same
TOPICS = {
    "objects": "basket, bed, beer, bell, bomb, book, brain, briefcase, broom, brush, cake, cart, chair, coffee, "
    "cookie, crown, cube, diamond, dice, dna, eraser, flask, ghost, gift, glasses, graduation cap, "
    "hammer, hourglass, ice cream, key, palette, paperclip, pen, pencil, person, piggy bank, pizza, "
    "puzzle piece, ruler, scale, scissors, shopping bag, shopping cart, skull, stamp, test tube, thumbs "
    "down, thumbs up, ticket, wallet",
    "outdoors": "airplane, ambulance, anchor, apple, backpack, bank, basketball, binoculars, bug, building, bus, car, "
    "cat, church, cloud, cloud off, cloud rain, compass, dog, earth, egg, fire, fire extinguisher, fish, "
    "flag, flower, football, globe, home, hospital, hotel, leaf, library, lightning, map, medal, moon, "
    "pill, planet, rocket, satellite, school, snowflake, sparkles, star, stethoscope, store, subway, "
    "suitcase, sun, syringe, taxi, tent, tornado, train, tree, trophy, truck, umbrella, warehouse, "
    "wheelchair, wind",
    "office": "archive, at, attachment, barcode, book open, bookmark, calendar, calendar check, calendar minus, "
    "calendar plus, certificate, chart bar, chart pie, chat, clipboard, clipboard check, clock, comment, "
    "copy, copyright, credit card, document, dollar, euro, file code, file image, file text, filter, "
    "folder, folder check, folder minus, folder open, folder plus, group, hashtag, history, id card, "
    "image, inbox, language, link, list, mail, megaphone, message, money, newspaper, note, notebook, "
    "package, people, presentation, qr code, question, receipt, save, search, send, share, shield, shield "
    "check, table, tag, target, text, trash, trending down, trending up, user, user check, user circle, "
    "user minus, user plus, users",
    "controls": "accessibility, align center, align left, align right, arrow down, arrow down left, arrow down right, "
    "arrow left, arrow left circle, arrow right, arrow right circle, arrow up, arrow up circle, arrow up "
    "left, arrow up right, asterisk, backspace, bold, check, check circle, check square, chevron left, "
    "chevron right, close, cloud download, cloud upload, code, cog, columns, command, crop, cursor, "
    "dashboard, download, edit, eject, expand, eye, eye off, fast forward, forward, git branch, grid, "
    "heart, help, info circle, italic, layers, layout, lock, lock open, login, logout, maximize, menu, "
    "move, navigation, paragraph, pause, pause circle, pin, play, play circle, plus circle, power, "
    "record, recycle, redo, refresh, repeat, reply, rewind, scan, settings, shapes, shuffle, sort, "
    "strikethrough, sync, timer, underline, undo, upload, volume down, volume mute, volume off, volume "
    "up, warning, window, zoom in, zoom out",
    "devices": "battery, battery charging, battery empty, battery full, battery low, bluetooth, calculator, camera, "
    "database, film, fingerprint, floppy disk, gamepad, hard drive, headphones, joystick, keyboard, "
    "laptop, lightbulb, magnet, microphone, microscope, mobile, monitor, mouse, music, phone, plug, "
    "printer, radio, robot, rss, sd card, server, signal, sim card, speaker, stopwatch, tablet, "
    "telescope, terminal, thermometer, tv, usb, video, watch, webcam, wifi, wrench",
}


def main() -> None:
    """Build the assets."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for the downloads")
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "src/maple/assets/icons")
    options = parser.parse_args()
    package = fetch(options.work)
    wanted = {name.strip() for names in TOPICS.values() for name in names.split(",")}
    by_name: dict[str, list[Icon]] = defaultdict(list)
    sets: dict[str, set[str]] = defaultdict(set)
    for icon in icons(package):
        if icon.name in wanted:
            sets[icon.name].add(icon.icon_set)
            if icon.family in TRAIN_FAMILIES | TEST_FAMILIES and not icon.has_colours:
                by_name[icon.name].append(icon)
    common = sorted(name for name in wanted if len(sets[name]) >= SETS)
    with ProcessPoolExecutor() as pool:
        chosen = dict(zip(common, pool.map(choose, [by_name[name] for name in common], chunksize=4), strict=True))
    options.output.mkdir(parents=True, exist_ok=True)
    topics: dict[str, list[dict[str, Any]]] = {}
    taken: set[str] = set()
    with zipfile.ZipFile(options.output / "drawings.zip", "w", zipfile.ZIP_STORED) as archive:
        for topic, names in TOPICS.items():
            listed = {name.strip() for name in names.split(",")} - taken
            # In an order without meaning: base classes are the first half, and arrows should not all be among them.
            rows = sorted(
                (name for name in listed if chosen.get(name)), key=lambda name: sha256(name.encode()).digest()
            )
            taken |= listed
            topics[topic] = [{"name": name, "drawings": [key for key, _ in chosen[name]]} for name in rows]
            info = zipfile.ZipInfo(f"{topic}.webp", date_time=(1980, 1, 1, 0, 0, 0))
            info.create_system, info.external_attr = 3, 0o644 << 16
            archive.writestr(info, sheet([[pixels for _, pixels in chosen[name]] for name in rows]))
            lacking = ", ".join(sorted(listed - set(rows)))
            print(f"{topic}: {len(rows)} classes; without enough drawings: {lacking}")
    records = licensed_sets(package)
    keys = [key for rows in topics.values() for row in rows for key in row["drawings"]]
    (options.output / "CREDITS.md").write_text(credits(Counter(key.split(":")[0] for key in keys), records), "utf-8")
    index = {"format": 1, "size": SIDE, "train": TRAIN, "test": TEST, "topics": topics}
    (options.output / "index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def credits(counts: Counter[str], records: dict[str, Any]) -> str:
    """The attributions that the licences require."""
    lines = [
        "# Credits of the icons\n",
        f"`drawings.zip` holds {counts.total()} drawings of {len(counts)} icon sets, taken from the npm package"
        f" `{PACKAGE}` {VERSION}. `scripts/build_icons.py` drew them from SVG at 64 x 64 pixels, cropped them to the"
        " square around their ink, and reduced them to opacity in 16 steps; the data set shows them in other styles."
        " Each set has its own licence:\n",
        "| set | author | licence | drawings |",
        "|---|---|---|---|",
    ]
    for key, count in sorted(counts.items()):
        record = records[key]
        author, licence = record["author"], record["license"]
        by = f"[{author['name']}]({author['url']})" if author.get("url") else author["name"]
        under = f"[{licence['spdx']}]({licence['url']})" if licence.get("url") else licence["spdx"]
        lines.append(f"| {record['name']} (`{key}`) | {by} | {under} | {count} |")
    return "\n".join(lines) + "\n"


def choose(drawn: list[Icon]) -> list[tuple[str, npt.NDArray[np.uint8]]] | None:
    """TRAIN and TEST different drawings, families in turn; None where there are not enough."""
    kept: list[tuple[str, npt.NDArray[np.uint8]]] = []
    looks: list[npt.NDArray[np.float64]] = []
    for families, count in ((TRAIN_FAMILIES, TRAIN), (TEST_FAMILIES, TEST)):
        queues: dict[str, list[Icon]] = defaultdict(list)
        for icon in drawn:
            if icon.family in families:
                queues[icon.family].append(icon)
        before = len(kept)
        while any(queues.values()) and len(kept) - before < count:
            for family in sorted(queues):
                if not queues[family] or len(kept) - before == count:
                    continue
                icon = queues[family].pop(0)
                content = rasterise(icon)
                if content is None:
                    continue
                opacity = np.frombuffer(content, np.uint8).reshape(SIDE, SIDE, 4)[..., 3].astype(np.int64)
                mask = (opacity + 8) // 17 * 17
                look = mask.reshape(16, 4, 16, 4).mean((1, 3)).ravel()
                look = (look - look.mean()) / max(float(np.linalg.norm(look - look.mean())), 1e-9)
                if all(float(look @ other) < SIMILAR for other in looks):
                    looks.append(look)
                    kept.append((f"{icon.icon_set}:{icon.key}", mask.astype(np.uint8)))
        if len(kept) - before < count:
            return None
    return kept


def sheet(rows: list[list[npt.NDArray[np.uint8]]]) -> bytes:
    """The drawings, one class a row, as lossless WebP."""
    pixels = np.concatenate([np.concatenate(row, axis=1) for row in rows])
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "WEBP", lossless=True, quality=100, method=4)
    return buffer.getvalue()


if __name__ == "__main__":
    main()
