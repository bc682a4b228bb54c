"""From the body of a request to pictures and what is asked about them."""

import base64
import binascii
import json
import re
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel, ValidationError
from python_multipart.multipart import parse_options_header
from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from maple.errors import ClassNamesError, visible
from maple.names import names_in
from maple.serve.limits import Limits
from maple.serve.problems import Detail, Problem

JSON = "application/json"
MULTIPART = "multipart/form-data"
_SHOWN = 5
_NAME_CHARS = 255
# Of values in messages.
_SHORT = 40
_MOST = 10**12


@dataclass(frozen=True)
class Upload:
    """An encoded picture, and what its sender calls it."""

    source: str
    content: bytes = field(repr=False)


@dataclass(frozen=True)
class Question:
    """What a request asks. `class_names` is None for the trained ones."""

    uploads: tuple[Upload, ...]
    class_names: tuple[str, ...] | None
    top: int
    zero_shot: bool


async def read_question(headers: Headers, body: bytes, model: type[BaseModel], limits: Limits) -> Question:
    """Read a question in JSON or as a form; `model` says what it may hold (see `schemas.request_model`).

    Raises:
        Problem: another kind of body, a malformed one, or one that does not fit the model.
    """
    if headers.get("content-encoding", "identity").lower() != "identity":
        raise Problem("unsupported_media_type", "a compressed body is not read; send it without Content-Encoding")
    kind = parse_options_header(headers.get("content-type", ""))[0].decode("latin-1").strip().lower()
    if kind == JSON:
        return _of_json(body, model)
    if kind == MULTIPART:
        return await _of_form(headers, body, model, limits)
    raise Problem(
        "unsupported_media_type",
        f"the body is {kind[:80]!r}; send {MULTIPART} with files named 'images', or {JSON} with pictures in base64",
    )


def _of_json(body: bytes, model: type[BaseModel]) -> Question:
    try:
        asked: Any = model.model_validate_json(body)
    except ValidationError as error:
        raise _invalid(error) from None
    wrong: list[Detail] = []
    uploads = []
    for index, text in enumerate(asked.images):
        where = f"images[{index}]"
        try:
            uploads.append(Upload(where, _decoded(text)))
        except (binascii.Error, ValueError):
            wrong.append(Detail(where, "is not base64; send an encoded picture in base64, or as a data: URL"))
    if wrong:
        raise _several("invalid_request", wrong)
    return _question(asked, uploads)


def _decoded(text: str) -> bytes:
    if text[:5].lower() == "data:":
        head, comma, text = text.partition(",")
        if not comma or not head.lower().endswith(";base64"):
            raise ValueError("no base64 in the address")
    if "\n" in text:
        text = re.sub(r"[\r\n]", "", text)
    return base64.b64decode(text, validate=True)


class _Parts(MultiPartParser):
    """Parts of a form, held in memory: pictures are never written to a disk."""

    spool_max_size = 0  # without a limit

    whole = False

    def on_end(self) -> None:
        self.whole = True

    def on_part_end(self) -> None:
        part = self._current_part
        if part.file is None and self._charset.lower() == "utf-8":
            try:
                bytes(part.data).decode()
            except UnicodeDecodeError:  # which the library would read as Latin-1
                raise MultiPartException(f"the text of {_clean(part.field_name[:80])} is not UTF-8") from None
        super().on_part_end()


async def _of_form(headers: Headers, body: bytes, model: type[BaseModel], limits: Limits) -> Question:
    most_names = limits.classes + 1000
    size = limits.name_chars * 4 * most_names

    async def stream() -> AsyncGenerator[bytes, None]:
        yield body

    parser = _Parts(headers, stream(), max_files=limits.images, max_fields=most_names, max_part_size=size)
    try:
        form = await parser.parse()
    except MultiPartException as error:
        if error.message.startswith("Too many files"):
            raise Problem("invalid_request", f"more than the allowed {limits.images} pictures; send fewer") from None
        raise Problem("malformed", f"the form cannot be read: {error.message}") from None
    except Exception as error:  # noqa: BLE001 - the parser lets pass what a hostile boundary or header does to it
        raise Problem("malformed", f"the form cannot be read ({type(error).__name__})") from None
    try:
        if not parser.whole:
            raise Problem("malformed", "the form is cut short: its last boundary is missing")
        return await _of_fields(form.multi_items(), model)
    finally:
        await form.close()


async def _of_fields(items: Sequence[tuple[str, str | UploadFile]], model: type[BaseModel]) -> Question:
    values: dict[str, Any] = {}
    uploads: list[Upload] = []
    wrong: list[Detail] = []
    for key, value in items:
        if isinstance(value, UploadFile) != (key == "images") and key in model.model_fields:
            kind = "a file, with a file name" if key == "images" else "text, without a file name"
            wrong.append(Detail(key, f"must be {kind}"))
        elif isinstance(value, UploadFile):
            source = (value.filename or "")[:_NAME_CHARS] or f"images[{len(uploads)}]"
            uploads.append(Upload(_clean(source), await value.read()))
            if key != "images":
                wrong.append(Detail(_clean(key[:80]), "is not known; pictures are called images"))
        elif key == "class_names":
            values.setdefault(key, []).append(value)
        elif key in values:
            wrong.append(Detail(_clean(key[:80]), "is given more than once"))
        else:
            values[key] = _plain(key, value)
    if wrong:
        raise _several("invalid_request", wrong)
    if (texts := values.pop("class_names", None)) is not None:
        values["class_names"] = _names(texts)
    try:
        asked = model.model_validate({**values, "images": ["-"] * len(uploads)})
    except ValidationError as error:
        raise _invalid(error) from None
    return _question(asked, uploads)


def _names(texts: Sequence[str]) -> list[str]:
    """Class names, one in each text, as they are; or all in the only text (see `names_in`).

    Raises:
        Problem: the names of the only text cannot be told apart.
    """
    if len(texts) > 1:
        return [text.strip() for text in texts]
    try:
        return names_in(texts[0])
    except ClassNamesError as error:
        raise Problem("class_names", _clean(str(error))) from None


def _plain(key: str, text: str) -> Any:
    """The value that a form's text means; the text itself where it means none."""
    text = text.strip()
    if key == "top" and text.isascii() and text.lstrip("-").isdecimal() and len(text) < 20:
        return int(text)
    if key == "zero_shot" and text.lower() in ("true", "false"):
        return text.lower() == "true"
    return text


def _question(asked: Any, uploads: Sequence[Upload]) -> Question:
    names = None if asked.class_names is None else tuple(asked.class_names)
    for index, name in enumerate(names or ()):
        if any(ord(char) < 32 or ord(char) == 127 for char in name):
            raise _several("invalid_request", [Detail(f"class_names[{index}]", "holds a control character")])
    return Question(tuple(uploads), names, asked.top, asked.zero_shot)


def _invalid(error: ValidationError) -> Problem:
    found = error.errors(include_url=False, include_context=False)
    if found[0]["type"] == "json_invalid":
        return Problem("malformed", f"the body is not JSON: {found[0]['msg'].removeprefix('Invalid JSON: ')}")
    return _several("invalid_request", [Detail(_place(one["loc"]), one["msg"] + _given(one["input"])) for one in found])


def _given(value: Any) -> str:
    """A value to name in a message, if it is a short one; a text is never a picture's."""
    if isinstance(value, str):
        return f", not {_clean(value)!r}" if len(value) <= _SHORT else ""
    return f", not {json.dumps(value)}" if isinstance(value, bool | int | float) and abs(value) < _MOST else ""


def _place(parts: Sequence[str | int]) -> str:
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{_clean(part[:80])}" for part in parts)
    return place.lstrip(".") or "body"


def _several(code: str, details: Sequence[Detail]) -> Problem:
    first, more = details[0], len(details) - 1
    message = f"{first.where}: {first.message}" + (f" (and {more} more)" if more else "")
    return Problem(code, message, details[:_SHOWN])


def _clean(text: str) -> str:
    """Text that can be written as UTF-8 and shown."""
    return visible(text, "\N{REPLACEMENT CHARACTER}")


def unreadable(reasons: Mapping[int, str], uploads: Sequence[Upload]) -> Problem:
    """The problem of pictures that cannot be read, by their places in the request."""
    details = [Detail(f"images[{index}]", f"{uploads[index].source}: {reason}") for index, reason in reasons.items()]
    more = f" (and {len(details) - 1} more)" if len(details) > 1 else ""
    return Problem("unreadable_image", details[0].message + more, details)
