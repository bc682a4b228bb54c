"""Small folders in the exact layout of each published data set."""

import json
from pathlib import Path

from data_helpers import save_image

SYNSETS = {"n01440764": "tench", "n01443537": "goldfish", "n02012849": "crane", "n03126707": "crane"}
"""In the order of the published file; two synsets of ImageNet share the name "crane"."""

VARIANTS = ["707-320", "727-200", "F/A-18", "Yak-42"]

SPLIT_LAYOUTS = {
    "caltech101": (
        "caltech-101/101_ObjectCategories/{}/image_000{}.jpg",
        ["face", "leopard", "motorbike", "airplane"],
        "caltech-101/split_zhou_Caltech101.json",
    ),
    "oxford_pets": (
        "oxford_pets/images/{}_{}.jpg",
        ["abyssinian", "american_bulldog", "beagle"],
        "oxford_pets/split_zhou_OxfordPets.json",
    ),
    "stanford_cars": (
        "stanford_cars/cars_train/{}{}.jpg",
        ["2000 AM General Hummer SUV", "2012 Acura RL Sedan"],
        "stanford_cars/split_zhou_StanfordCars.json",
    ),
    "oxford_flowers": (
        "oxford_flowers/jpg/image_{}{}.jpg",
        ["pink primrose", "hard-leaved pocket orchid"],
        "oxford_flowers/split_zhou_OxfordFlowers.json",
    ),
    "food101": (
        "food-101/images/{}/100{}.jpg",
        ["apple_pie", "baby_back_ribs"],
        "food-101/split_zhou_Food101.json",
    ),
    "sun397": ("sun397/SUN397/{}/sun_{}.jpg", ["abbey", "airplane_cabin"], "sun397/split_zhou_SUN397.json"),
    "dtd": ("dtd/images/{}/{}.jpg", ["banded", "blotchy"], "dtd/split_zhou_DescribableTextures.json"),
    "eurosat": (
        "eurosat/2750/{}/{}.jpg",
        ["Annual Crop Land", "Forest", "Herbaceous Vegetation Land"],
        "eurosat/split_zhou_EuroSAT.json",
    ),
    "ucf101": (
        "ucf101/UCF-101-midframes/{}/v_{}.jpg",
        ["Apply_Eye_Makeup", "Apply_Lipstick"],
        "ucf101/split_zhou_UCF101.json",
    ),
}
"""Per data set: the pattern of its image files (class, number), some of its class names, its split file."""

IMAGE_FOLDERS = {"stanford_cars": "stanford_cars"}

SYNSET_LAYOUTS = {
    "imagenet_sketch": ("imagenet-sketch", "imagenet-sketch/images"),
    "imagenet_a": ("imagenet-adversarial", "imagenet-adversarial/imagenet-a"),
    "imagenet_r": ("imagenet-rendition", "imagenet-rendition/imagenet-r"),
}

V2 = "imagenetv2/imagenetv2-matched-frequency-format-val"

ALL = ["imagenet", "imagenetv2", *SYNSET_LAYOUTS, "fgvc_aircraft", *SPLIT_LAYOUTS]


def make(name: str, root: Path) -> Path:
    """Write the data set `name` under `root`: 3 training, 1 validation, 2 test images per class where it has them."""
    if name in SPLIT_LAYOUTS:
        _split_layout(name, root)
    elif name in SYNSET_LAYOUTS:
        folder, images = SYNSET_LAYOUTS[name]
        write_class_names(root / folder)
        _fill(root / images, list(SYNSETS)[1:], 2)
        (root / images / "README.txt").write_text("ImageNet-A or -R comes with one\n")
    elif name == "imagenet":
        write_class_names(root / "imagenet")
        _fill(root / "imagenet/images/train", list(SYNSETS), 12)
        _fill(root / "imagenet/images/val", list(SYNSETS), 2)
    elif name == "imagenetv2":
        write_class_names(root / "imagenetv2")
        _fill(root / V2, [str(number) for number in range(len(SYNSETS))], 2)
    else:
        _aircraft(root / "fgvc_aircraft")
    return root


def write_class_names(folder: Path, names: dict[str, str] = SYNSETS) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "classnames.txt"
    path.write_text("".join(f"{synset} {name}\n" for synset, name in names.items()))
    return path


def _fill(folder: Path, classes: list[str], count: int) -> None:
    # Backwards, so that the order on the disk is not that of the names.
    for name in reversed(classes):
        for number in reversed(range(count)):
            save_image(folder / name / f"{name}_{number}.JPEG")


def _split_layout(name: str, root: Path) -> None:
    pattern, classes, split = SPLIT_LAYOUTS[name]
    images = IMAGE_FOLDERS.get(name, "/".join(pattern.split("/")[:2]))
    parts: dict[str, list[list[object]]] = {"train": [], "val": [], "test": []}
    for label, class_name in enumerate(classes):
        folder = str(label) if "image_{}{}" in pattern else class_name.replace(" ", "")
        for number, part in enumerate(["train"] * 3 + ["val"] + ["test"] * 2):
            path = pattern.format(folder, number)
            if part == "test":
                path = path.replace("cars_train", "cars_test")
            save_image(root / path)
            parts[part].append([path.removeprefix(f"{images}/"), label, class_name])
    (root / split).write_text(json.dumps(parts))


def _aircraft(folder: Path) -> None:
    parts: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for label, variant in enumerate(VARIANTS):
        for index, part in enumerate(["train"] * 3 + ["val"] + ["test"] * 2):
            number = f"{1000000 + 10 * index + label}"
            save_image(folder / "images" / f"{number}.jpg")
            parts[part].append(f"{number} {variant}")
    (folder / "variants.txt").write_text("\n".join(VARIANTS) + "\n")
    for part, lines in parts.items():
        (folder / f"images_variant_{part}.txt").write_text("\n".join(lines) + "\n")
        (folder / f"images_{part}.txt").write_text("\n".join(line.split(" ")[0] for line in lines) + "\n")
