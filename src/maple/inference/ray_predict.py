"""Classify any number of images on a Ray cluster: Ray Data streams them through a pool of actors, each with the model.

The result is a folder of Parquet parts. Only the process that was started by the user writes them, one after the other
and each completely or not at all, so that no image has two rows: whatever a worker had not delivered is computed again
by another, and a repeated command reads which images the parts already answer.
"""

import hashlib
import io
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from PIL import Image

from maple import files
from maple.data.images.reading import read_image
from maple.errors import BackboneError, BusyError, ConfigError, ImageError, MapleError, first_line, output_error
from maple.inference.manifest import export_folder, is_export, read_manifest
from maple.inference.prediction_tables import arrow_schema, arrow_table, to_row
from maple.inference.predictor import check_reject, load_predictor
from maple.inference.sources.bulk_sources import EncodedImage, Unit, list_units, read_unit
from maple.inference.sources.image_sources import ImageSource
from maple.names import clean_class_names, repository_of
from maple.plugins import accept_code, accepted_code
from maple.ray_cluster import connection, require_ray, reserved_gpus

_STATE = "_maple.json"  # readers of Parquet folders skip names that begin with _ or a dot
_LOCK = ".lock"
_PART = "part-{:06d}.parquet"
_FORMAT = 1
_PART_ROWS = 10_000
_PART_SECONDS = 30.0
"""A part is written when it has this many rows, or when the first of them is this old."""
_BLOCK_BYTES = 8 * 1024**2
"""The size of the blocks of encoded images that reading tasks pass to the actors."""
_READING_TASKS = 2
_BATCHES_PER_CALL = 4
"""How many batches an actor gets at once: it may read ahead in them while it computes."""
_DIGEST = 16


@dataclass(frozen=True)
class BulkResult:
    """What an output folder holds: the number of images with a row, and how many of these could not be read.

    `new` is the number of images that this call added; 0 if the output was finished before.
    """

    images: int
    unreadable: int
    new: int


def predict_on_ray(
    run: str | Path,
    sources: Sequence[str],
    output: str | Path,
    *,
    classes: Sequence[str] | None = None,
    top: int = 5,
    zero_shot: bool = False,
    reject: float | None = None,
    recursive: bool = False,
    draft: bool = False,
    batch_size: int = 32,
    actors: int | None = None,
    gpus_per_actor: float | None = None,
    cpus_per_actor: float = 1,
    address: str | None = None,
    device: str | None = None,
    on_images: Callable[[int], None] | None = None,
    on_note: Callable[[str | None], None] | None = None,
    **clip: Any,
) -> BulkResult:
    """Classify the images of folders, Parquet files and WebDataset shards at any fsspec place into a Parquet folder.

    The folder `output` has one row for each image: source, path, classes and probabilities (best first), `rejected` if
    `reject` is given, those of zero-shot CLIP if requested, and `error` where the image could not be read. A call that
    ended early, however it ended, is continued by the same call. Every machine of the cluster needs `run` and local
    sources at the same paths; `output` is only needed here.

    Args:
        run: as for `load_predictor`: a run, a prompts file, hub:OWNER/NAME, or an export to ONNX.
        sources: paths, patterns and URLs, as for `list_units`.
        classes: class names; by default the trained ones.
        top, reject, batch_size: as for `Predictor.stream`.
        draft: whether large JPEGs are decoded at a part of their size (`EvalView.least_side`).
        actors: the largest number of processes with the model; by default as many as the cluster has room for.
        gpus_per_actor: number or fraction of GPUs of each; by default 1, or 0 where there are none.
        cpus_per_actor: cores of each, which are also the threads that decode its images.
        address: of the cluster, as for `ray.init`; by default RAY_ADDRESS, one that runs on this machine, or a new one.
        device: where to compute; by default the GPU that Ray assigns, or the CPU.
        on_images: called with the number of images that this call has classified so far.
        on_note: called with a note about class names that were not trained, or None.
        clip: `precision`, `backbone`, `pretrained` and `trust_backbone`, as for `load_predictor`.

    Raises:
        ConfigError: Ray is not installed, a number is out of range, a source cannot be read, the cluster has no room,
            or `output` belongs to another model or to other settings.
        BusyError: another process writes to `output`.
        MapleError: the model cannot be loaded, here or on a worker, or computes values that are not finite.

    Example:
        >>> predict_on_ray("runs/pets", ["s3://bucket/photos"], "answers.parquet", top=3, gpus_per_actor=0.5)
        BulkResult(images=20000, unreadable=2, new=20000)
    """
    require_ray("pyarrow")
    output = Path(output)
    check_reject(reject)
    for name, number in (("top", top), ("batch_size", batch_size), ("actors", 1 if actors is None else actors)):
        if number < 1:
            raise ConfigError(f"{name} is {number}; it must be at least 1")
    run = str(run) if repository_of(str(run)) else str(Path(run).expanduser().resolve())
    clip = {key: value for key, value in clip.items() if value}
    # Loaded here once, and dropped again: what is wrong with it is reported before a cluster is started.
    predictor = load_predictor(run, zero_shot=zero_shot, device="cpu", **clip)
    if classes is not None:
        note = predictor.set_class_names(classes)
        if on_note is not None:
            on_note(note)
    names = predictor.class_names
    del predictor
    settings: dict[str, Any] = {
        "model": _model_digest(run),
        "classes": list(clean_class_names(names)),
        "top": top,
        "zero_shot": zero_shot,
        "reject": reject,
        # As they are written: rows are named by them, and are not repeated if the names are the same.
        "sources": [os.path.expanduser(source) for source in sources],
        **({"working_folder": os.getcwd()} if any(map(_is_relative, sources)) else {}),
        "recursive": recursive,
        **({"draft": True} if draft else {}),
    }
    with _OutputFolder(output, settings).opened() as folder:
        if folder.finished:
            return BulkResult(folder.images, folder.unreadable, 0)
        units = list_units(sources, recursive=recursive)
        before = folder.images
        actor: dict[str, Any] = {"run": run, "names": None if classes is None else list(names), "clip": clip}
        actor["code"] = _accepted_code(run)
        actor |= {"top": top, "zero_shot": zero_shot, "reject": reject, "batch_size": batch_size, "draft": draft}
        with connection(address):
            gpus = reserved_gpus(gpus_per_actor, cpus_per_actor, default=1, user="actor")
            actor |= {"device": device or (None if gpus else "cpu"), "threads": max(1, int(cpus_per_actor))}
            pool = {"most": actors, "num_gpus": gpus, "num_cpus": cpus_per_actor}
            for table in _stream(units, folder.answered(), actor, pool):
                folder.add(table)
                if on_images is not None:
                    on_images(folder.images - before)
        folder.finish()
        return BulkResult(folder.images, folder.unreadable, folder.images - before)


def _stream(units: Sequence[Unit], answered: "SourceSet", actor: dict[str, Any], pool: dict[str, Any]) -> Iterator[Any]:
    """Yield the tables of rows that the actors compute, in the order in which they come."""
    import ray
    import ray.data

    for name in ("ray.data", "ray.data._internal"):
        logging.getLogger(name).setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    context.target_max_block_size = _BLOCK_BYTES
    most = pool["most"] or max(1, _room(pool["num_cpus"], pool["num_gpus"]))
    # Filesystems are pickled with their options, so that a reading task opens the same places on another machine.
    rows = [{"unit": index} for index in range(len(units))]
    dataset = ray.data.from_items(rows, override_num_blocks=max(1, len(rows)))
    dataset = dataset.map_batches(
        _read_units,
        batch_size=1,
        batch_format="pyarrow",
        # Reading waits for disks and networks; it takes no core from the actors.
        num_cpus=0,
        compute=ray.data.TaskPoolStrategy(size=max(1, min(_READING_TASKS * most, len(units)))),
        fn_kwargs={"units": ray.put(list(units)), "answered": ray.put(answered)},
    ).map_batches(
        _Classifier,
        batch_size=_BATCHES_PER_CALL * actor["batch_size"],
        batch_format="pyarrow",
        num_cpus=pool["num_cpus"],
        num_gpus=pool["num_gpus"],
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=most),
        fn_constructor_kwargs=actor,
    )
    try:
        yield from dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1)
    except ray.exceptions.RayError as error:
        cause = _cause(error)
        if isinstance(cause, MapleError):
            raise type(cause)(f"on a worker: {cause}") from error
        last = str(error).strip().splitlines()[-1:] or [type(error).__name__]
        raise BackboneError(
            f"the cluster cannot continue ({last[0]}): every machine needs the same versions of Python, Ray and "
            "maple-clip, and enough memory for --actors; repeat the command to continue"
        ) from error


def _room(cpus: float, gpus: float) -> int:
    """How many actors the connected cluster has room for."""
    import ray

    total = ray.cluster_resources()
    return int(min(total.get("CPU", 0) // cpus, total.get("GPU", 0) // gpus if gpus else np.inf))


def _cause(error: BaseException) -> BaseException | None:
    """The first MapleError among the causes of an error of Ray."""
    seen = 0
    current: BaseException | None = error
    while current is not None and seen < 10 and not isinstance(current, MapleError):
        current, seen = getattr(current, "cause", None) or current.__cause__, seen + 1
    return current


def _read_units(batch: Any, units: Any, answered: Any) -> Iterator[Any]:
    """A reading task: yield tables of encoded images, which Ray Data joins and splits to blocks."""
    import pyarrow as pa
    import ray

    units, answered = ray.get([units, answered])
    schema = pa.schema(
        [("source", pa.string()), ("path", pa.string()), ("content", pa.large_binary()), ("error", pa.string())]
    )
    waiting: list[dict[str, Any]] = []
    size = 0
    for index in batch["unit"].to_pylist():
        for image in read_unit(units[index], answered):
            waiting.append(asdict(image))
            size += len(image.content)
            if size > _BLOCK_BYTES // 2:
                yield pa.Table.from_pylist(waiting, schema=schema)
                waiting, size = [], 0
    yield pa.Table.from_pylist(waiting, schema=schema)


class _Classifier:
    """An actor: loads the model once, and classifies tables of encoded images as the single process does."""

    def __init__(
        self,
        run: str,
        names: list[str] | None,
        device: str | None,
        threads: int,
        batch_size: int,
        top: int,
        reject: float | None,
        draft: bool,
        zero_shot: bool,
        clip: dict[str, Any],
        code: tuple[bytes, ...],
    ) -> None:
        os.environ.pop("WORLD_SIZE", None)  # of the machine; an actor works alone
        for content in code:
            accept_code(content)
        if not is_export(run):
            import torch

            torch.set_num_threads(threads)
        self._predictor = load_predictor(run, zero_shot=zero_shot, device=device, **clip)
        if names is not None:
            self._predictor.set_class_names(names)
        self._least_side = self._predictor.preprocess.least_side if draft else None
        self._numbers: dict[str, Any] = {"top": top, "reject": reject, "batch_size": batch_size, "workers": threads}
        self._schema = arrow_schema(zero_shot=zero_shot, reject=reject is not None)

    def __call__(self, batch: Any) -> Any:
        images = [EncodedImage(**row) for row in batch.to_pylist()]
        sources = (ImageSource(i.path, partial(_decode, i, self._least_side)) for i in images)
        results = self._predictor.stream(sources, **self._numbers)
        rows = [{**to_row(result), "source": image.source} for image, result in zip(images, results, strict=True)]
        return arrow_table(rows, self._schema)


def _decode(image: EncodedImage, least_side: int | None) -> Image.Image:
    """Decode an image; an error names its path."""
    if image.error is not None:
        raise ImageError(image.error)
    try:
        return read_image(io.BytesIO(image.content), least_side=least_side)
    except ImageError as error:
        raise ImageError(str(error).replace("<stream>", image.path, 1)) from error


def _model_digest(run: str) -> str:
    """The SHA-256 of the files of a model that decide its answers."""
    if is_export(run):
        folder = export_folder(run)
        paths = [folder / name for name in sorted(read_manifest(folder).files)]
    else:
        from maple.inference.torch_predictor import prompts_file

        paths = [prompts_file(run)]
    return hashlib.sha256("".join(map(files.sha256_of, paths)).encode()).hexdigest()


def _accepted_code(run: str) -> tuple[bytes, ...]:
    """The files that define the method of a run, which were accepted when the run was loaded here."""
    if is_export(run):
        return ()
    from maple.checkpoint import read_prompts
    from maple.inference.torch_predictor import prompts_file

    return accepted_code([read_prompts(prompts_file(run)).method])


class SourceSet:
    """A set of names of images, kept as sorted digests of 16 bytes each, which processes of a machine share.

    Example:
        >>> "b" in SourceSet(["a", "b"])
        True
    """

    def __init__(self, sources: Iterable[str]) -> None:
        digests = b"".join(map(_digest, sources))
        self._digests = np.sort(np.frombuffer(digests, dtype=f"S{_DIGEST}"))

    def __len__(self) -> int:
        return len(self._digests)

    def __contains__(self, source: object) -> bool:
        digest = np.array(_digest(str(source)), dtype=self._digests.dtype)
        place = int(np.searchsorted(self._digests, digest))
        return place < len(self._digests) and bool(self._digests[place] == digest)


def _digest(source: str) -> bytes:
    return hashlib.blake2b(source.encode(errors="surrogateescape"), digest_size=_DIGEST).digest()


class _OutputFolder:
    """The folder of the parts: its settings, what they answer, and the rows that are not written yet."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        self.images = self.unreadable = 0
        self.finished = False
        self._settings = settings
        self._waiting: list[Any] = []
        self._since = 0.0

    @contextmanager
    def opened(self) -> Iterator["_OutputFolder"]:
        """Make or continue the folder, which no other process may write to; what it holds is counted."""
        state = self._read_state()
        with files.output_errors(self.path, "cannot be made"):
            self.path.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(self.path / _LOCK, blocking=False):
                if state is None:
                    with files.output_errors(self.path):
                        files.write_json(self.path / _STATE, self._state())
                self.finished = bool((state or {}).get("finished"))
                for table in self._tables(["error"]):
                    self.images += len(table)
                    self.unreadable += len(table) - table["error"].null_count
                try:
                    yield self
                finally:
                    self._write()
        except Timeout as error:
            raise BusyError(f"another process writes to {self.path}; wait for it, or choose another output") from error

    def _read_state(self) -> dict[str, Any] | None:
        if not (self.path / _STATE).exists():
            with suppress(NotADirectoryError):
                if not self.path.exists() or not any(self.path.iterdir()):
                    return None
            raise output_error(f"{self.path} exists, and is not a folder that this command has begun")
        state: dict[str, Any] = files.read_json(self.path / _STATE, advice="choose another output")
        begun = state.get("settings", {})
        for name, value in self._settings.items():
            if begun.get(name) != value:
                raise output_error(f"{self.path} was begun with {_difference(name, begun.get(name), value)}")
        return state

    def _state(self) -> dict[str, Any]:
        counts = {"images": self.images, "unreadable": self.unreadable} if self.finished else None
        return {"format": _FORMAT, "settings": self._settings, "finished": counts}

    def _parts(self) -> list[Path]:
        return sorted(self.path.glob(_PART.format(0).replace("000000", "*")))

    def _tables(self, columns: list[str]) -> Iterator[Any]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        for part in self._parts():
            try:
                yield pq.read_table(part, columns=columns, partitioning=None)
            except (OSError, pa.ArrowException) as error:
                problem = f"{part} is damaged ({first_line(error)})"
                raise ConfigError(f"{problem}; remove it and repeat the command: its images are read again") from error

    def answered(self) -> SourceSet:
        """The sources of all rows that were written."""
        return SourceSet(source for table in self._tables(["source"]) for source in table["source"].to_pylist())

    def add(self, table: Any) -> None:
        """Take rows, and write a part if there are enough of them."""
        if not len(table):
            return
        if not self._waiting:
            self._since = time.monotonic()
        self._waiting.append(table)
        self.images += len(table)
        self.unreadable += len(table) - table["error"].null_count
        full = sum(map(len, self._waiting)) >= _PART_ROWS
        if full or time.monotonic() - self._since > _PART_SECONDS:
            self._write()

    def _write(self) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        if self._waiting:
            number = max((int(part.stem.partition("-")[2]) for part in self._parts()), default=-1) + 1
            table = pa.concat_tables(self._waiting).combine_chunks()
            with files.output_errors(self.path), files.replacing(self.path / _PART.format(number)) as temporary:
                pq.write_table(table, temporary)
            self._waiting = []

    def finish(self) -> None:
        """Write what waits, and that nothing is left."""
        self._write()
        self.finished = True
        with files.output_errors(self.path):
            files.write_json(self.path / _STATE, self._state())


def _is_relative(source: str) -> bool:
    return "://" not in source and not os.path.isabs(os.path.expanduser(source))


def _difference(name: str, before: Any, now: Any) -> str:
    if name in ("model", "classes"):
        return {"model": "another model", "classes": "other class names"}[name]
    return f"{name}={before}, and this command has {name}={now}"
