"""Preparing data sets from a local server that holds archives as the published ones are laid out."""

import hashlib
import io
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path, PurePosixPath
from urllib.parse import urlparse

import layouts
import pytest
import torch
from filelock import FileLock
from servers import Site, serving
from torchvision.datasets import imagenet

from maple.data import CATALOGUE, load_dataset
from maple.data.published.prepare import PrepareProgress, PublishedFile, Recipe, prepare, published_address, recipes
from maple.errors import DataError, DownloadError


def packed(folder: Path, name: str, top: str) -> bytes:
    """An archive of the kind of `name`, its members below `top`."""
    data = io.BytesIO()
    paths = [(path, str(PurePosixPath(top, path.relative_to(folder)))) for path in sorted(folder.rglob("*"))]
    if name.endswith(".zip"):
        with zipfile.ZipFile(data, "w") as archive:
            for path, inside in paths:
                archive.write(path, inside)
    else:
        with tarfile.open(fileobj=data, mode="w" if name.endswith(".tar") else "w:gz") as archive:
            for path, inside in paths:
                archive.add(path, inside, recursive=False)
    return data.getvalue()


TOPS = {
    "101_ObjectCategories.tar.gz": "101_ObjectCategories",
    "fgvc-aircraft-2013b.tar.gz": "fgvc-aircraft-2013b/data",
    "food-101.tar.gz": "food-101/images",
    "dtd-r1.0.1.tar.gz": "dtd/images",
    "ImageNet-Sketch.zip": "sketch",
}


@pytest.fixture
def site() -> Iterator[Site]:
    with serving(Site()) as site:
        yield site


Publish = Callable[[str], tuple[Path, Recipe]]


@pytest.fixture
def publish(site: Site, tmp_path: Path) -> Publish:
    """Put a data set on the server, file by file as published, mirrors aside.

    Returns a folder with the data set as it should become, and its recipe with the checksums of these files.
    """

    def put(name: str) -> tuple[Path, Recipe]:
        made = layouts.make(name, tmp_path / "made")
        recipe = recipes()[name]
        sources = []
        for source in recipe.sources:
            if not source.file.startswith("mirror-"):
                content = _content(source, made)
                site.files[f"/{source.file}"] = content
                known = None if source.checksum is None else f"sha256:{hashlib.sha256(content).hexdigest()}"
                size = None if source.size is None else len(content)
                source = replace(source, checksum=known, size=size)
            sources.append(source)
        return made, replace(recipe, sources=tuple(sources))

    return put


def _content(source: PublishedFile, made: Path) -> bytes:
    if not source.file.endswith((".zip", ".tar", ".tgz", ".tar.gz")):
        return (made / source.gives[0]).read_bytes()
    target = made / source.gives[0]
    if source.inside is not None:
        inner = packed(target, source.inside, TOPS[source.inside])
        data = io.BytesIO()
        with zipfile.ZipFile(data, "w") as archive:
            archive.writestr(f"caltech-101/{source.inside}", inner)
            archive.writestr("__MACOSX/caltech-101/._" + source.inside, b"junk")
        return data.getvalue()
    whole = target.parent if len(source.gives) > 1 else target
    return packed(whole, source.file, TOPS.get(source.file, target.name))


def locate(site: Site) -> Callable[[PublishedFile], str]:
    return lambda source: f"{site.url}/{source.file}"


def tree(folder: Path) -> dict[str, bytes]:
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: content for name, content in files.items() if not name.startswith("downloads/")}


PREPARED = [name for name in layouts.ALL if name != "imagenet"]


@pytest.mark.parametrize("name", PREPARED)
def test_the_layout_is_built_of_what_is_published(name: str, site: Site, publish: Publish, tmp_path: Path) -> None:
    (made, recipe), root = publish(name), tmp_path / "root"
    added = prepare(name, root, recipe=recipe, locate=locate(site))
    assert added == list(recipes()[name].needs)
    prepared, expected = load_dataset(name, root), load_dataset(name, made)
    assert (prepared.train, prepared.val, prepared.test) == (expected.train, expected.val, expected.test)
    read = {path: content for path, content in tree(root).items() if not path.endswith("README.txt")}
    assert read.items() <= tree(made).items()
    assert all(prepared.file(item).is_file() for item in prepared.train + prepared.val + prepared.test)
    assert not list((root / "downloads").glob("*/*")), "archives are removed"
    assert not list(root.rglob(".unpacking-*"))
    asked = len(site.requests)
    assert prepare(name, root, recipe=recipe, locate=locate(site)) == []
    assert len(site.requests) == asked, "a second time does nothing"


def test_the_table_of_sources_is_complete() -> None:
    assert recipes().keys() == CATALOGUE.keys()
    for name, recipe in recipes().items():
        spec = CATALOGUE[name]
        assert f"{spec.folder}/{spec.labels}" in recipe.needs
        given = {need for source in recipe.sources for need in source.gives}
        by_hand = {"imagenet/images/train", "imagenet/images/val"} if name == "imagenet" else set()
        assert given == set(recipe.needs) - by_hand
        assert all(need.startswith(f"{spec.folder}/") for need in recipe.needs)
        for source in recipe.sources:
            assert urlparse(published_address(source)).scheme in ("http", "https")
            assert urlparse(source.page).scheme in ("http", "https")
            assert (source.checksum is None) == (source.checked_by is None)
            if source.checksum is not None:
                algorithm, _, digest = source.checksum.partition(":")
                assert len(bytes.fromhex(digest)) == hashlib.new(algorithm).digest_size


def test_addresses_of_google_drive() -> None:
    source = recipes()["eurosat"].sources[0]
    assert source.page == "https://drive.google.com/file/d/1Ip7yaCWFi0eaOFUGga0lUdVi_DDQth1o/view"
    assert published_address(source).startswith("https://drive.usercontent.google.com/download?id=1Ip7ya")


def test_an_interrupted_preparation_goes_on(site: Site, publish: Publish, tmp_path: Path) -> None:
    _, recipe = publish("eurosat")

    class KilledError(BaseException):
        pass

    class Killer(PrepareProgress):
        def advance(self, what: str, done: int, total: int | None) -> None:
            del done, total
            if what.startswith("unpacking"):
                raise KilledError

    root = tmp_path / "root"
    with pytest.raises(KilledError):
        prepare("eurosat", root, recipe=recipe, locate=locate(site), progress=Killer())
    assert not (root / "eurosat/2750").exists(), "a folder gets its name when it is complete"
    (root / "eurosat/.unpacking-old").mkdir()
    site.requests.clear()
    prepare("eurosat", root, recipe=recipe, locate=locate(site))
    assert site.requests == [], "the archive was fetched already"
    assert sorted(path.name for path in (root / "eurosat").iterdir()) == ["2750", "split_zhou_EuroSAT.json"]


def test_the_next_source_is_tried_where_one_fails(site: Site, publish: Publish, tmp_path: Path) -> None:
    (made, recipe), root = publish("stanford_cars"), tmp_path / "root"
    for file in ("cars_train.tgz", "cars_test.tgz", "split_zhou_StanfordCars.json"):
        site.files.pop(f"/{file}")
    site.files["/mirror-stanford_cars.zip"] = packed(made / "stanford_cars", "x.zip", "stanford_cars")
    prepare("stanford_cars", root, recipe=recipe, locate=locate(site))
    assert tree(root) == tree(made)


def test_only_what_is_missing_is_fetched_and_nothing_is_replaced(site: Site, publish: Publish, tmp_path: Path) -> None:
    _, recipe = publish("eurosat")
    root = tmp_path / "root"
    (root / "eurosat").mkdir(parents=True)
    (root / "eurosat/2750").mkdir()
    own = root / "eurosat/split_zhou_EuroSAT.json"
    own.write_text("mine")
    added = prepare("eurosat", root, recipe=recipe, locate=locate(site))
    assert added == ["eurosat/2750"], "an empty folder is none"
    assert own.read_text() == "mine"
    assert {path for path, _ in site.requests} == {"/EuroSAT.zip"}


def test_archives_put_there_by_hand_are_used(site: Site, publish: Publish, tmp_path: Path) -> None:
    _, recipe = publish("dtd")
    downloads = tmp_path / "root/downloads/dtd"
    downloads.mkdir(parents=True)
    for path, content in site.files.items():
        (downloads / path[1:]).write_bytes(content)
    prepare("dtd", tmp_path / "root", recipe=recipe, locate=locate(site), keep=True)
    assert site.requests == []
    assert len(list(downloads.iterdir())) == 2, "kept"
    (tmp_path / "root/dtd/split_zhou_DescribableTextures.json").unlink()
    (downloads / "dtd-r1.0.1.tar.gz").write_bytes(b"cut short")
    prepare("dtd", tmp_path / "root", recipe=recipe, locate=locate(site), keep=True)
    (tmp_path / "other/downloads/dtd").mkdir(parents=True)
    (tmp_path / "other/downloads/dtd/dtd-r1.0.1.tar.gz").write_bytes(b"cut short")
    with pytest.raises(DownloadError, match=r"dtd-r1.0.1.tar.gz: has the sha256 .*remove it and fetch it again"):
        prepare("dtd", tmp_path / "other", recipe=recipe, locate=locate(site))
    assert (tmp_path / "other/downloads/dtd/dtd-r1.0.1.tar.gz").exists(), "a user's file stays"


def test_what_is_missing_is_said_with_where_to_get_it_and_where_to_put_it(site: Site, tmp_path: Path) -> None:
    with pytest.raises(DownloadError) as caught:
        prepare("ucf101", tmp_path, locate=locate(site))
    text = str(caught.value)
    assert "ucf101 is not complete" in text
    assert "failed: http://127.0.0.1" in text
    assert "404" in text
    assert "https://drive.google.com/file/d/10Jqome3vtUA2keJkNanAiFpgbyC9Hc2O/view" in text
    assert f"as {tmp_path}/downloads/ucf101/UCF-101-midframes.zip" in text


def test_imagenet_asks_for_registration(site: Site, tmp_path: Path) -> None:
    site.files["/classnames.txt"] = layouts.write_class_names(tmp_path / "names").read_bytes()
    with pytest.raises(DownloadError) as caught:
        prepare("imagenet", tmp_path, locate=locate(site))
    text = str(caught.value)
    assert "Register at https://image-net.org/download-images.php" in text
    assert f"put them into {tmp_path}/imagenet/images" in text
    assert "classnames.txt still missing" not in text
    assert (tmp_path / "imagenet/classnames.txt").read_text().startswith("n01440764 tench")


def test_imagenet_is_sorted_from_the_archives_of_its_registered_users(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = layouts.make("imagenet", tmp_path / "made") / "imagenet/images"
    images = tmp_path / "root/imagenet/images"
    images.mkdir(parents=True)
    layouts.write_class_names(tmp_path / "root/imagenet")
    inner = tmp_path / "inner"
    inner.mkdir()
    for folder in (made / "train").iterdir():
        (inner / f"{folder.name}.tar").write_bytes(packed(folder, "x.tar", "."))
    flat = tmp_path / "flat"
    flat.mkdir()
    order = sorted(path for path in (made / "val").rglob("*.JPEG"))
    for number, path in enumerate(order):
        path.rename(flat / f"ILSVRC2012_val_{number:08d}.JPEG")
    archives = {"train": packed(inner, "x.tar", "."), "val": packed(flat, "x.tar", "."), "devkit": b"devkit"}
    for part, content in archives.items():
        file = imagenet.ARCHIVE_META[part][0]
        (images / file).write_bytes(content)
        monkeypatch.setitem(imagenet.ARCHIVE_META, part, (file, hashlib.md5(content).hexdigest()))
    torch.save(({}, [path.parent.name for path in order]), images / imagenet.META_FILE)
    prepare("imagenet", tmp_path / "root", locate=locate(site))
    dataset = load_dataset("imagenet", tmp_path / "root")
    assert dataset.counts() == {"train": 48, "val": 0, "test": 8, "classes": 4}
    assert [item.path for item in dataset.test[:3]] == [
        "val/n01440764/ILSVRC2012_val_00000000.JPEG",
        "val/n01440764/ILSVRC2012_val_00000001.JPEG",
        "val/n01443537/ILSVRC2012_val_00000002.JPEG",
    ]
    assert not list(images.glob(".making-*"))


def test_a_damaged_imagenet_archive_makes_nothing(site: Site, tmp_path: Path) -> None:
    images = tmp_path / "imagenet/images"
    images.mkdir(parents=True)
    (images / "ILSVRC2012_img_train.tar").write_bytes(b"cut short")
    (images / "ILSVRC2012_img_val.tar").write_bytes(b"cut short")
    with pytest.raises(DownloadError, match=r"img_train.tar cannot be sorted into folders: .*corrupted"):
        prepare("imagenet", tmp_path, locate=locate(site))
    (images / "ILSVRC2012_img_train.tar").unlink()
    with pytest.raises(DownloadError, match=r"devkit_t12.tar.gz is missing: it gives the class"):
        prepare("imagenet", tmp_path, locate=locate(site))
    assert not (images / "train").exists()
    assert not (images / "val").exists()


def test_class_names_are_copied_from_a_neighbour(site: Site, publish: Publish, tmp_path: Path) -> None:
    _, recipe = publish("imagenet_a")
    layouts.write_class_names(tmp_path / "root/imagenet")
    prepare("imagenet_a", tmp_path / "root", recipe=recipe, locate=locate(site))
    assert {path for path, _ in site.requests} == {"/imagenet-a.tar"}


def test_a_hostile_archive_changes_nothing(site: Site, publish: Publish, tmp_path: Path) -> None:
    publish("ucf101")
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr("UCF-101-midframes/x.jpg", b"x")
        archive.writestr("../../evil.txt", b"x")
    site.files["/UCF-101-midframes.zip"] = data.getvalue()
    root = tmp_path / "root"
    with pytest.raises(DownloadError, match=r"member '../../evil.txt' leaves its folder"):
        prepare("ucf101", root, locate=locate(site))
    assert not list(tmp_path.rglob("evil.txt"))
    assert not (root / "ucf101/UCF-101-midframes").exists()
    assert not list(root.rglob("*.zip")), "it is not found again"


def test_a_file_is_not_taken_for_the_folder_of_images(site: Site, publish: Publish, tmp_path: Path) -> None:
    publish("ucf101")
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr("UCF-101-midframes", b"x")
    site.files["/UCF-101-midframes.zip"] = data.getvalue()
    with pytest.raises(DownloadError, match=r"UCF-101-midframes.zip: holds no UCF-101-midframes"):
        prepare("ucf101", tmp_path / "root", locate=locate(site))
    assert not (tmp_path / "root/ucf101/UCF-101-midframes").exists()


def test_another_archive_than_the_published_one(site: Site, publish: Publish, tmp_path: Path) -> None:
    publish("ucf101")
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr("videos/x.avi", b"x")
    site.files["/UCF-101-midframes.zip"] = data.getvalue()
    with pytest.raises(DownloadError, match=r"holds no UCF-101-midframes \(but videos\); it is not what was publ"):
        prepare("ucf101", tmp_path, locate=locate(site))


@pytest.mark.parametrize(("name", "file"), [("ucf101", "split_zhou_UCF101.json"), ("imagenetv2", "classnames.txt")])
def test_labels_that_cannot_be_read_are_not_put_in_place(
    name: str, file: str, site: Site, publish: Publish, tmp_path: Path
) -> None:
    _, recipe = publish(name)
    whole, root = site.files[f"/{file}"], tmp_path / "root"
    site.files[f"/{file}"] = b"Sorry, too many users have viewed this file recently"
    with pytest.raises(DownloadError, match=f"{file}(: line 1 is 'Sorry| is unreadable or damaged)"):
        prepare(name, root, recipe=recipe, locate=locate(site))
    assert not list(root.rglob(file))
    site.files[f"/{file}"] = whole
    assert len(prepare(name, root, recipe=recipe, locate=locate(site))) == 1


def test_unknown_names_and_two_at_once(site: Site, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="unknown published data set 'emoji-food'; choose one of: imagenet, "):
        prepare("emoji-food", tmp_path, locate=locate(site))
    (tmp_path / "downloads").mkdir()
    with (
        FileLock(tmp_path / "downloads/dtd.lock"),
        pytest.raises(DataError, match=r"dtd is being prepared in .* by another process"),
    ):
        prepare("dtd", tmp_path, locate=locate(site))
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be made"):
        prepare("dtd", tmp_path / "file", locate=locate(site))
