"""/v1/detect: objects in one picture, as boxes or as the picture with boxes drawn."""

from __future__ import annotations

import base64
import binascii
import json
from dataclasses import dataclass
from functools import partial

import anyio
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.datastructures import UploadFile
from starlette.responses import Response

from agent.http.collaborators import ServiceFailure
from agent.http.context import Context, add_post, new_id, now_s
from agent.http.errors import ApiError, fault_of, invalid
from agent.http.requests import DetectRequest
from agent.http.streams import unless_left

TRUTHS = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}


@dataclass(frozen=True)
class Question:
    image: bytes
    model: str | None
    threshold: float | None
    annotate: bool


def router(context: Context) -> APIRouter:
    routes = APIRouter()
    pictures = anyio.CapacityLimiter(context.limits.pictures)

    async def detect(request: Request) -> Response:
        """Picture as multipart field `file`, as raw body with an image type, or as JSON {"image": base64 or data URL}."""
        async with pictures:  # the body of the next one stays with its client until there is room for it
            question = await _question(request)
            model = _detector(context, question.model)
            call = partial(context.vision().detect, model, question.image, question.threshold, question.annotate)
            picture = await unless_left(request, call, context.limits.answer_s)
        if question.annotate and picture.jpeg is not None:
            return Response(picture.jpeg, media_type="image/jpeg", headers={"X-Detections": str(len(picture.detections))})
        return JSONResponse({
            "id": new_id("detect"),
            "object": "detection",
            "created": now_s(),
            "model": model,
            "width": picture.width,
            "height": picture.height,
            "latency_ms": picture.latency_ms,
            "detections": [dict(found) for found in picture.detections],
        })  # fmt: skip

    add_post(routes, "/detect", detect)
    return routes


def _detector(context: Context, name: str | None) -> str:
    """The name by which the worker knows it. Raises ApiError or ServiceFailure, in the words that text models are refused with."""
    if name is None:
        return context.model_or_default(None, "detection")
    for model in context.services.node.models():
        if name in (model.name, *model.aliases):
            if model.task != "detection":
                raise invalid("model", f"{model.name} is a model for {model.task} and finds no objects in pictures")
            if model.status != "serving":
                raise ServiceFailure("not_ready", f"{model.name} does not serve yet ({model.status}); ask again in a moment")
            return model.name
    raise ApiError(404, f"there is no model {name[:200]!r} on this node; see /v1/models", param="model", code="model_not_found")


async def _question(request: Request) -> Question:
    """Raises ApiError where the body is none of the three forms."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    words = dict(request.query_params)
    if kind == "multipart/form-data":
        async with request.form(max_files=1, max_fields=8) as form:
            words.update({name: value for name, value in form.items() if isinstance(value, str)})
            upload = next((value for value in form.values() if isinstance(value, UploadFile)), None)
            image = await upload.read() if upload else b""
    elif kind == "application/json":
        body = await _json(request)
        image = _decoded(body.image)
        given = {"model": body.model, "threshold": body.threshold, "annotate": body.annotate}
        words.update({name: str(value) for name, value in given.items() if value is not None})
    elif kind.startswith("image/") or kind == "application/octet-stream":
        image = await request.body()
    else:
        raise ApiError(
            415, f"content type {kind[:60]!r} is not taken here; send multipart/form-data, image/jpeg, image/png or application/json",
            code="unsupported_media_type",
        )  # fmt: skip
    if not image:
        raise invalid("file", "the request holds no picture; send it as the multipart field 'file' or as the body")
    return Question(image, words.get("model") or None, _threshold(words.get("threshold")), _truth(words.get("annotate")))


async def _json(request: Request) -> DetectRequest:
    try:
        values = await request.json()
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ApiError(400, "the body is not valid JSON", code="invalid_json") from error
    try:
        return DetectRequest.model_validate(values)
    except ValidationError as error:
        faults = [{**fault, "loc": ("body", *fault["loc"])} for fault in error.errors(include_url=False)]
        raise fault_of(faults, values) from error


def _decoded(image: str) -> bytes:
    if image.startswith("data:"):
        head, _, image = image.partition(",")
        if not head.endswith(";base64"):
            raise invalid("image", "image: a data URL must be base64")
    elif image.startswith(("http://", "https://")):
        raise invalid("image", "image: this node fetches nothing; send the picture itself as base64")
    try:
        return base64.b64decode(image, validate=True)
    except (binascii.Error, ValueError) as error:
        raise invalid("image", f"image: not base64: {error}") from error


def _threshold(word: str | None) -> float | None:
    if word is None or word == "":
        return None
    try:
        value = float(word)
    except ValueError:
        value = -1.0
    if not 0.0 <= value <= 1.0:
        raise invalid("threshold", f"threshold: {word[:40]!r} is not a number from 0 to 1")
    return value


def _truth(word: str | None) -> bool:
    if word is None or word == "":
        return False
    if word.lower() not in TRUTHS:
        raise invalid("annotate", f"annotate: {word[:40]!r} is neither true nor false")
    return TRUTHS[word.lower()]
