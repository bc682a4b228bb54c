"""The OpenAPI description: what the code does not say by itself."""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

from maple.data import short_name
from maple.serve import schemas
from maple.serve.guard import API
from maple.serve.problems import CODES
from maple.serve.question import JSON, MULTIPART

TEXT = """\
Classifies pictures with prompts trained by maple-clip. Class names that were never trained work at once.

Every error is a JSON object with `error.code`, `error.message` and `error.details`. After 503, send the request again
as `Retry-After` says.
"""
PREDICT_CODES = (
    *("malformed", "upload_timeout", "too_large", "unsupported_media_type"),
    *("invalid_request", "class_names", "unreadable_image", "model_failed", "busy", "not_ready", "timeout"),
)
NUMBER = {
    "name": "number",
    "in": "path",
    "required": True,
    "description": "Its `id`.",
    "schema": {"type": "integer", "minimum": 0},
}
PNG: dict[int | str, dict[str, Any]] = {
    200: {"content": {"image/png": {"schema": {"type": "string", "format": "binary"}}}}
}
# What any address may answer.
_GENERAL = ("malformed", "cross_origin", "wrong_host", "internal")
_ERROR = {"$ref": "#/components/schemas/ErrorAnswer"}


def title_of(about: dict[str, Any]) -> str:
    """Method, backbone and data set in one line."""
    title = f"{about.get('title') or about.get('method') or 'a model'} on {about.get('backbone') or 'a CLIP'}"
    dataset = about.get("dataset")
    return f"{title}, trained on {short_name(dataset)}" if dataset else title


def errors(*codes: str) -> dict[int | str, dict[str, Any]]:
    """Responses with these error codes, by status."""
    by_status: dict[int | str, list[str]] = {}
    for code in codes:
        by_status.setdefault(int(CODES[code]), []).append(code)
    found: dict[int | str, dict[str, Any]] = {}
    for status, names in by_status.items():
        found[status] = {
            "description": " or ".join(f"`{name}`" for name in names),
            "content": {"application/json": {"schema": _ERROR}},
        }
        if status == CODES["busy"]:
            found[status]["headers"] = {"Retry-After": {"description": "Seconds.", "schema": {"type": "integer"}}}
    return found


def request_body(model: type[BaseModel]) -> dict[str, Any]:
    """The body of a question, in JSON or as a form."""
    as_json = model.model_json_schema()
    form = {
        **as_json,
        "properties": {
            **as_json["properties"],
            "images": {
                **{key: as_json["properties"]["images"][key] for key in ("minItems", "maxItems", "type")},
                "description": "Encoded pictures, each a file with a file name.",
                "items": {"type": "string", "format": "binary"},
            },
            "class_names": {
                "type": "array",
                "items": {"type": "string", "minLength": 1},
                "minItems": 1,
                "description": "Class names: one in each of several fields, or all in one field with commas or new "
                "lines between them; there a name that holds a comma is in double quotes.",
            },
        },
    }
    encoding = {"images": {"contentType": "application/octet-stream"}}
    return {
        "required": True,
        "content": {JSON: {"schema": as_json}, MULTIPART: {"schema": form, "encoding": encoding}},
    }


def describe(app: FastAPI, *, protected: bool) -> None:
    """Let `app` give a description that also holds the errors that any address may answer, and the token."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _described(app, protected)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _described(app: FastAPI, protected: bool) -> dict[str, Any]:
    found = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    parts = found.setdefault("components", {}).setdefault("schemas", {})
    answer = schemas.ErrorAnswer.model_json_schema(ref_template="#/components/schemas/{model}")
    parts.update(answer.pop("$defs"))
    parts["ErrorAnswer"] = answer
    if protected:
        found["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
    for path, methods in found["paths"].items():
        token = protected and path.startswith(API)
        for operation in methods.values():
            general = errors(*_GENERAL, *(["unauthorized"] if token else []))
            for status, response in general.items():
                operation["responses"].setdefault(str(status), response)
            if token:
                operation["security"] = [{"token": []}]
    return found
