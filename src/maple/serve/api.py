"""The FastAPI application: its routes, and the service that computes predictions."""

import asyncio
import dataclasses
import logging
import re
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse, PlainTextResponse
from starlette.routing import Route
from starlette.staticfiles import StaticFiles

from maple import __version__
from maple.data.images.prefetch import in_background
from maple.errors import ConfigError, ImageError
from maple.inference.predictor import ClassProbability, Floats, Prediction, Predictor
from maple.names import FEATURES
from maple.serve.batching import Batcher, ClassProbabilities, Job
from maple.serve.decoding import Decoder
from maple.serve.limits import Limits
from maple.serve.middleware import BEARER, Capacity, Exchange, GuardMiddleware
from maple.serve.monitoring import METRICS_PATH, Metrics
from maple.serve.request import PredictRequest, RequestParser
from maple.serve.responses import (
    ApiError,
    ErrorDetail,
    ExampleList,
    ImagePrediction,
    ModelInfo,
    PredictResponse,
    RankedClass,
    ServerStatus,
    describe_model,
    error_responses,
)

logger = logging.getLogger(__name__)

_CLOSE_SECONDS = 10.0
_EXAMPLES_SECONDS = 10.0
_PNG = {"type": "string", "format": "binary"}
_NUMBER = {"name": "number", "in": "path", "required": True, "schema": {"type": "integer", "minimum": 0}}
_ANY_ERRORS = ("malformed", "cross_origin", "url_too_long", "wrong_host", "head_too_large", "internal")
_PREDICT_ERRORS = (
    *("malformed", "upload_timeout", "too_large", "unsupported_media_type", "invalid_request", "class_names"),
    *("unreadable_image", "internal", "model_failed", "busy", "not_ready", "timeout"),
)
_PAGE_PATHS = ("/", "/page.css", "/page.js", "/docs.css", "/docs.js", "/icon.svg")
_DOCS_PATH = "/docs"
_PUBLIC_PATHS = (*_PAGE_PATHS, _DOCS_PATH, "/openapi.json", "/healthz", "/readyz")
_API_PREFIX = "/v1"
_DESCRIPTION = """\
Classifies images with prompts trained by maple-clip. Class names that were not trained may be given at any time.

Every error is a JSON object with `error.code`, `error.message` and `error.details`. After status 503, retry as
`Retry-After` says.
"""


class PredictionService:
    """What the routes share: the model's thread, the decoders of images, the bound on images in progress."""

    def __init__(
        self, predictor: Predictor, limits: Limits, find_examples: Callable[[], ExampleList] | None, *, draft: bool
    ) -> None:
        self.predictor = predictor
        self.limits = limits
        self.parser = RequestParser(limits)
        self.model_info = describe_model(predictor, limits)
        self.metrics = Metrics()
        self.batcher = Batcher(predictor, limits, self.metrics.batch_images.observe)
        self.queue = Capacity(limits.queue, "the queue is full ({used} of {total} images)")
        self.metrics.watch_queue(lambda: self.queue.used, limits.queue)
        self._threads = ThreadPoolExecutor(limits.decoders, thread_name_prefix="maple-decode")
        self._decoders = [
            Decoder(predictor.preprocess, limits.pixels, limits.decode_timeout, draft=draft)
            for _ in range(limits.decoders)
        ]
        self._idle = list(self._decoders)  # the last one is taken first, so that few clients start few processes
        self._find_examples = find_examples
        self._examples: asyncio.Future[ExampleList] | None = None
        self._tasks: set[asyncio.Task[ClassProbabilities]] = set()

    @asynccontextmanager
    async def lifespan(self, _app: FastAPI) -> AsyncIterator[None]:
        """Run the threads while the application runs; accepted requests are finished first."""
        self.batcher.start()
        if self._find_examples is not None:
            # Not in an executor, which the end of the server would wait for.
            self._examples = asyncio.wrap_future(in_background(self._find_examples, "maple-examples"))
        try:
            yield
        finally:
            if self._examples is not None:
                self._examples.cancel()
            await asyncio.to_thread(self.batcher.close, _CLOSE_SECONDS)
            for decoder in self._decoders:
                decoder.kill()  # what is still being decoded is of requests that have timed out
            self._threads.shutdown(cancel_futures=True)
            for decoder in self._decoders:
                decoder.close()

    async def examples(self) -> ExampleList:
        """The example images; none if they cannot be found, or not in time."""
        if self._examples is not None:
            await asyncio.wait([self._examples], timeout=_EXAMPLES_SECONDS)
            if self._examples.done():
                if (error := self._examples.exception()) is None:
                    return self._examples.result()
                logger.warning("no examples: %s", error)
        return ExampleList(source=None, examples=[])

    async def predict(
        self, request: PredictRequest, exchange: Exchange, disconnected: "asyncio.Future[Any]"
    ) -> ClassProbabilities:
        """Compute the predictions for a request, unless the client disconnects."""
        count = len(request.images)
        self.queue.take(count)
        release_upload = exchange.take_over()

        def finish(task: "asyncio.Task[ClassProbabilities]") -> None:
            self._tasks.discard(task)
            self.queue.release(count)
            release_upload()
            if not task.cancelled():
                task.exception()  # marks it as retrieved: the request may have ended before

        # A separate task: threads cannot be interrupted, so what it holds is given back when it ends, not when the
        # request does. asyncio itself keeps only a weak reference to it.
        job = Job(request.class_names)
        task = asyncio.create_task(self._run(job, request.images))
        self._tasks.add(task)
        task.add_done_callback(finish)
        await asyncio.wait([task, disconnected], timeout=self.limits.timeout, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            job.abandoned = True
            job.result.cancel()
            limit = f"{self.limits.timeout:g} seconds"
            raise ApiError("timeout", f"the request timed out after {limit}; send fewer images, or retry later")
        return task.result()

    async def _run(self, job: Job, images: Sequence[tuple[str, bytes]]) -> ClassProbabilities:
        loop = asyncio.get_running_loop()
        views = await asyncio.gather(
            *(loop.run_in_executor(self._threads, self._decode, job, content) for _, content in images)
        )
        details = [
            ErrorDetail(where=f"images[{index}]", message=f"{images[index][0]}: {view}")
            for index, view in enumerate(views)
            if isinstance(view, str)
        ]
        if details:
            raise ApiError("unreadable_image", details[0].message, details)
        job.views = [view for view in views if view is not None and not isinstance(view, str)]
        self.batcher.put(job)
        return await asyncio.wrap_future(job.result)

    def _decode(self, job: Job, content: bytes) -> Floats | str | None:
        """The preprocessed image, or the reason why it cannot be read; None if the result is no longer needed."""
        if job.abandoned:
            return None
        decoder = self._idle.pop()
        try:
            return decoder.decode(content)
        except ImageError as error:
            return str(error)
        except TimeoutError as error:
            job.abandoned = True  # the request fails, and its other images must not hold a decoder as long
            return str(error)
        finally:
            self._idle.append(decoder)


def create_app(
    predictor: Predictor,
    limits: Limits | None = None,
    *,
    token: str | None = None,
    hosts: Iterable[str] | None = None,
    find_examples: Callable[[], ExampleList] | None = None,
    url_prefix: str = "",
    draft: bool = False,
) -> FastAPI:
    """Create the server as an ASGI application.

    Args:
        token: required for all but the page, `/docs`, `/openapi.json` and the health checks; None for no token.
        hosts: names by which requests may address the server; None for any.
        find_examples: called in a thread when the server starts; None for no examples.
        url_prefix: path under which a proxy offers the server, such as "/maple"; empty for none. Whether the proxy
            removes it or passes it on does not matter.
        draft: whether large JPEGs are decoded at a part of their size: faster, and nearly the same answers.

    Raises:
        ConfigError: `url_prefix` is malformed, or begins like a path of the server; or the
            run was trained on features, and so cannot read images.
    """
    if str(predictor.about.get("backbone")).startswith(FEATURES):
        raise ConfigError(
            "the run was trained on features, without a CLIP, and the server reads images; serve a run trained "
            "on images, or predict features with `maple predict RUN --features FILE`"
        )
    prefix = _check_url_prefix(url_prefix)
    limits = limits or Limits()
    # A request may always list as many classes as were trained.
    limits = dataclasses.replace(limits, classes=max(limits.classes, len(predictor.trained_names)))
    service = PredictionService(predictor, limits, find_examples, draft=draft)
    app = FastAPI(
        title="maple-clip",
        version=__version__,
        description=_DESCRIPTION,
        docs_url=None,
        redoc_url=None,
        servers=[{"url": prefix or "/"}],
        redirect_slashes=False,
        lifespan=service.lifespan,
        generate_unique_id_function=lambda route: route.name,
        responses=error_responses(*_ANY_ERRORS),
    )
    app.state.service = service
    app.include_router(_health)
    # GuardMiddleware checks the token; the dependency describes it in OpenAPI.
    token_responses = {} if token is None else error_responses("unauthorized")
    dependencies = [] if token is None else [Depends(BEARER)]
    app.add_api_route(
        METRICS_PATH,
        metrics,
        tags=["health"],
        summary="Metrics in the text format of Prometheus",
        response_class=PlainTextResponse,
        dependencies=dependencies,
        responses=token_responses,
    )
    app.include_router(_api, prefix=_API_PREFIX, dependencies=dependencies, responses=token_responses)
    app.add_api_route(
        f"{_API_PREFIX}/predict",
        predict,
        methods=["POST"],
        tags=["predict"],
        summary="Classify images",
        response_model_exclude_unset=True,  # `rejected`, without a threshold
        dependencies=dependencies,
        responses=error_responses(*_PREDICT_ERRORS) | token_responses,
        openapi_extra={"requestBody": service.parser.openapi()},
    )
    # Single routes, not a mount at /, which would also answer for wrong methods of the routes above.
    page = StaticFiles(packages=[("maple.serve", "page")], html=True)
    app.router.routes += [Route(path, page, include_in_schema=False) for path in _PAGE_PATHS]
    app.router.routes.append(Route(_DOCS_PATH, api_page, include_in_schema=False))
    service.metrics.name_routes([*app.openapi()["paths"], *_PUBLIC_PATHS])
    app.add_exception_handler(HTTPException, _answer_http_error)
    app.add_middleware(
        GuardMiddleware,
        limits=limits,
        metrics=service.metrics,
        public=_PUBLIC_PATHS,
        token=token,
        hosts=hosts,
        url_prefix=prefix,
    )
    return app


def _check_url_prefix(prefix: str) -> str:
    """The prefix without a slash at its end; ConfigError if it is not a path, or begins like one of the server."""
    prefix = prefix.rstrip("/")
    if prefix and not re.fullmatch(r"(/[A-Za-z0-9_~-][A-Za-z0-9._~-]*)+", prefix):
        raise ConfigError(
            f"the URL prefix {prefix!r} is not a path of letters, digits and . _ ~ -; give one such as /maple"
        )
    taken = [path[1:] for path in (*_PUBLIC_PATHS, METRICS_PATH, _API_PREFIX)]
    if prefix and (first := prefix.split("/")[1]) in taken:
        raise ConfigError(
            f"the URL prefix {prefix!r} begins with {first!r}, a path of the server itself; choose another"
        )
    return prefix


def _service_of(request: Request) -> PredictionService:
    service: PredictionService = request.app.state.service
    return service


Service = Annotated[PredictionService, Depends(_service_of)]
_health = APIRouter(tags=["health"])
_api = APIRouter()


@_health.get("/healthz", summary="Whether the process is running")
async def healthz() -> ServerStatus:
    return ServerStatus(status="ok")


@_health.get("/readyz", summary="Whether the model accepts requests", responses=error_responses("not_ready"))
async def readyz(service: Service) -> ServerStatus:
    if not service.batcher.ready:
        raise ApiError("not_ready", "the model accepts no requests: the server is stopping, or has failed")
    return ServerStatus(status="ready")


async def metrics(service: Service) -> Response:
    return service.metrics.response()


async def api_page(_request: Request) -> Response:
    return FileResponse(Path(__file__).parent / "page" / "docs.html")


@_api.get("/model", tags=["model"], summary="The model, and its trained classes")
async def model(service: Service) -> ModelInfo:
    return service.model_info


@_api.get("/examples", tags=["examples"], summary="Example images to try")
async def examples(service: Service) -> ExampleList:
    return await service.examples()


# A parameter of the function would answer 422; Starlette's convertor fails for numbers of more than 4300 digits.
@_api.get(
    "/examples/{number}",
    tags=["examples"],
    summary="An example image, as PNG",
    response_class=Response,
    responses={200: {"content": {"image/png": {"schema": _PNG}}}, **error_responses("not_found")},
    openapi_extra={"parameters": [_NUMBER]},
)
async def example(request: Request, service: Service) -> Response:
    number = request.path_params["number"]
    images = (await service.examples()).examples
    index = int(number) if re.fullmatch("[0-9]{1,9}", number) else len(images)
    if index >= len(images):
        raise ApiError("not_found", f"there is no example {number[:20]!r}; /v1/examples lists them")
    return Response(images[index].png, media_type="image/png")


async def predict(request: Request, service: Service) -> PredictResponse:
    # FastAPI parses one media type per route, so the two of this one are parsed here.
    parsed = await service.parser.parse(request)
    if parsed.zero_shot and not service.predictor.has_zero_shot:
        raise ApiError("invalid_request", "zero_shot: this server does not have the frozen CLIP; leave it out")
    # The body has been read: the next message says that the client has disconnected.
    disconnected = asyncio.ensure_future(request.receive())
    try:
        result = await service.predict(parsed, request.state.exchange, disconnected)
    finally:
        disconnected.cancel()
    predictions = []
    for index, (source, _) in enumerate(parsed.images):
        frozen = result.frozen[index] if parsed.zero_shot and result.frozen is not None else None
        row, options = result.tuned[index], (parsed.top, parsed.reject)
        prediction = Prediction.from_probabilities(source, result.names, row, frozen, *options)
        zero_shot = None if prediction.zero_shot is None else _ranking(prediction.zero_shot)
        rejected = {} if prediction.rejected is None else {"rejected": prediction.rejected}
        best = _ranking(prediction.best)
        service.metrics.rejected.inc(prediction.rejected is True)
        predictions.append(ImagePrediction(source=source, best=best, zero_shot=zero_shot, **rejected))
    service.metrics.images.inc(len(predictions))
    note = result.note and result.note.replace("with zero-shot CLIP", "with the zero-shot predictions")
    return PredictResponse(predictions=predictions, class_count=len(result.names), note=note)


def _ranking(ranked: Sequence[ClassProbability]) -> list[RankedClass]:
    return [RankedClass(name=item.name, probability=item.probability) for item in ranked]


async def _answer_http_error(request: Request, error: Exception) -> Response:
    """Answer with the body that every error has, for the framework's own errors too: unknown paths and methods."""
    if not isinstance(error, HTTPException):
        raise error
    if not isinstance(error, ApiError):
        path = request.url.path[:100]
        if error.status_code == 405:
            allowed = (error.headers or {}).get("Allow", "another method")
            error = ApiError("method_not_allowed", f"{path!r} supports {allowed}", headers=error.headers)
        elif error.status_code == 404:
            error = ApiError("not_found", f"there is nothing at {path!r}; /docs describes the API")
        else:
            error = ApiError("malformed", str(error.detail), headers=error.headers)
    return error.response()
