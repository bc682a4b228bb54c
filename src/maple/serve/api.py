"""The FastAPI application: its routes, and the service that computes predictions."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.routing import Route
from starlette.staticfiles import StaticFiles

from maple import __version__
from maple.data.images.reading import read_image
from maple.errors import ImageError
from maple.inference.predictor import Floats, Predictor, Ranked, answer
from maple.serve import responses
from maple.serve.batching import Batcher, ClassProbabilities, Job
from maple.serve.examples import ExampleSet
from maple.serve.limits import Capacity, Limits, Reservation
from maple.serve.middleware import API_PREFIX, BEARER, GuardMiddleware
from maple.serve.request import PredictRequest, RequestParser, UploadedImage
from maple.serve.responses import ApiError, error_responses

logger = logging.getLogger(__name__)

_CLOSE_SECONDS = 10.0
_EXAMPLES_SECONDS = 10.0
_PAGE_PATHS = ("/", "/page.css", "/page.js", "/icon.svg")
_DESCRIPTION = """\
Classifies images with prompts trained by maple-clip. Class names that were not trained may be given at any time.

Every error is a JSON object with `error.code`, `error.message` and `error.details`. After status 503, retry as
`Retry-After` says.
"""


class PredictionService:
    """What the routes share: the model's thread, the threads that decode images, and the bound on images in progress.

    Args:
        find_examples: returns example images; called in a thread when the server starts.
    """

    def __init__(self, predictor: Predictor, limits: Limits, find_examples: Callable[[], ExampleSet]) -> None:
        self.predictor = predictor
        self.limits = limits
        self.batcher = Batcher(predictor, limits)
        self.queue = Capacity(limits.queue, "the queue is full ({used} of {total} images)")
        self._decoders = ThreadPoolExecutor(limits.decoders, thread_name_prefix="maple-decode")
        self._find_examples = find_examples
        self._examples: asyncio.Task[ExampleSet] | None = None
        self._tasks: set[asyncio.Task[ClassProbabilities]] = set()

    @asynccontextmanager
    async def lifespan(self, _app: FastAPI) -> AsyncIterator[None]:
        """Run the threads while the application runs; accepted requests are finished first."""
        self.batcher.start()
        self._examples = asyncio.create_task(asyncio.to_thread(self._find_examples))
        try:
            yield
        finally:
            ended = await asyncio.to_thread(self.batcher.close, _CLOSE_SECONDS)
            self._decoders.shutdown(wait=ended, cancel_futures=True)

    async def examples(self) -> ExampleSet:
        """The example images; none if they cannot be found, or not in time."""
        if self._examples is None:
            return ExampleSet()
        try:
            return await asyncio.wait_for(asyncio.shield(self._examples), _EXAMPLES_SECONDS)
        except TimeoutError:
            return ExampleSet()
        except Exception as error:  # noqa: BLE001 - a data set that cannot be read must not cost the page
            logger.warning("no examples: %s", error)
            return ExampleSet()

    async def predict(
        self, request: PredictRequest, upload: Reservation, disconnected: "asyncio.Future[Any]"
    ) -> ClassProbabilities:
        """Compute the predictions for a request, unless the client disconnects.

        Args:
            upload: the bytes that the request holds; taken over until the work has ended.

        Raises:
            ApiError: the queue is full, an image cannot be read, the class names are invalid, or it takes too long.
        """
        job = Job(request.class_names)
        images = Reservation(self.queue)
        images.take(len(request.images))
        held = upload.transfer()

        def finish(task: "asyncio.Task[ClassProbabilities]") -> None:
            self._tasks.discard(task)
            images.release()
            held.release()
            if not task.cancelled():
                task.exception()  # marks it as retrieved: the request may have ended before

        # A separate task: threads cannot be interrupted, so what it holds is given back when it ends, not when the
        # request does. asyncio itself keeps only a weak reference to it.
        task = asyncio.create_task(self._run(job, request.images))
        self._tasks.add(task)
        task.add_done_callback(finish)
        await asyncio.wait([task, disconnected], timeout=self.limits.timeout, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            job.abandoned = True
            job.result.cancel()
            seconds = self.limits.timeout
            raise ApiError(
                "timeout", f"the request timed out after {seconds:g} seconds; send fewer images, or retry later"
            )
        return task.result()

    async def _run(self, job: Job, images: Sequence[UploadedImage]) -> ClassProbabilities:
        loop = asyncio.get_running_loop()
        decoding = [loop.run_in_executor(self._decoders, self._decode, job, image.content) for image in images]
        views = await asyncio.gather(*decoding)
        details = [
            responses.ErrorDetail(where=f"images[{index}]", message=f"{images[index].source}: {view}")
            for index, view in enumerate(views)
            if isinstance(view, str)
        ]
        if details:
            raise ApiError("unreadable_image", details[0].message, details)
        job.views = [view for view in views if not isinstance(view, str)]
        self.batcher.put(job)
        return await asyncio.wrap_future(job.result)

    def _decode(self, job: Job, content: bytes) -> Floats | str:
        """The preprocessed image, or the reason why it cannot be read."""
        if job.abandoned:
            return "was not read"
        try:
            return self.predictor.view(read_image(content, max_pixels=self.limits.pixels))
        except ImageError as error:
            return str(error).removeprefix("<bytes>: ")


def create_app(
    predictor: Predictor,
    limits: Limits | None = None,
    *,
    token: str | None = None,
    hosts: Iterable[str] | None = None,
    find_examples: Callable[[], ExampleSet] = ExampleSet,
) -> FastAPI:
    """Create the server as an ASGI application.

    Args:
        token: required from clients of the API; None for no token.
        hosts: names by which requests may address the server; None for any.
        find_examples: returns example images; called in a thread when the server starts.
    """
    limits = limits or Limits()
    service = PredictionService(predictor, limits, find_examples)
    app = FastAPI(
        title="maple-clip",
        version=__version__,
        description=_DESCRIPTION,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        lifespan=service.lifespan,
        responses=error_responses("malformed", "cross_origin", "wrong_host", "internal"),
    )
    app.state.service = service
    # GuardMiddleware checks the token; the dependency describes it in OpenAPI.
    secured: dict[str, Any] = (
        {} if token is None else {"dependencies": [Depends(BEARER)], "responses": error_responses("unauthorized")}
    )
    router = APIRouter(prefix=API_PREFIX, **secured)
    _add_health(app, service)
    _add_model(router, service)
    _add_examples(router, service)
    _add_predict(router, service)
    app.include_router(router)
    # Single routes, not a mount at /, which would also answer for wrong methods of the routes above.
    page = StaticFiles(packages=[("maple.serve", "page")], html=True)
    app.router.routes += [Route(path, page, include_in_schema=False) for path in _PAGE_PATHS]
    app.add_exception_handler(HTTPException, _answer_http_error)
    app.add_middleware(GuardMiddleware, limits=limits, token=token, hosts=hosts)
    return app


def _add_health(app: FastAPI, service: PredictionService) -> None:
    @app.get("/healthz", tags=["health"], summary="Whether the process is running", operation_id="healthz")
    async def healthz() -> responses.ServerStatus:
        return responses.ServerStatus(status="ok")

    @app.get(
        "/readyz",
        tags=["health"],
        summary="Whether the model accepts requests",
        operation_id="readyz",
        responses=error_responses("not_ready"),
    )
    async def readyz() -> responses.ServerStatus:
        if not service.batcher.ready:
            raise ApiError("not_ready", "the model accepts no requests: the server is stopping, or has failed")
        return responses.ServerStatus(status="ready")


def _add_model(router: APIRouter, service: PredictionService) -> None:
    predictor, limits = service.predictor, service.limits
    bounds = {name: getattr(limits, name) for name in responses.RequestLimits.model_fields}
    bounds["classes"] = max(limits.classes, len(predictor.trained_names))
    about = responses.public_properties(predictor.about)
    model = responses.ModelInfo(
        title=responses.model_title(about),
        about=about,
        class_names=list(predictor.trained_names),
        zero_shot=predictor.has_zero_shot,
        limits=responses.RequestLimits(**bounds),
        version=__version__,
    )

    @router.get("/model", tags=["model"], summary="The model, and its trained classes", operation_id="model")
    async def get_model() -> responses.ModelInfo:
        return model


def _add_examples(router: APIRouter, service: PredictionService) -> None:
    @router.get("/examples", tags=["examples"], summary="Example images to try", operation_id="examples")
    async def examples() -> responses.ExampleList:
        example_set = await service.examples()
        listed = [
            responses.ExampleInfo(id=index, class_name=example.class_name, trained=example.trained)
            for index, example in enumerate(example_set.examples)
        ]
        return responses.ExampleList(source=example_set.source if listed else None, examples=listed)

    number = {"name": "number", "in": "path", "required": True, "description": "Its `id`."}

    # The path convertor answers 404 for anything but a number; a parameter of the function would answer 422.
    @router.get(
        "/examples/{number:int}",
        tags=["examples"],
        summary="An example image, as PNG",
        operation_id="example",
        response_class=Response,
        responses={
            200: {"content": {"image/png": {"schema": {"type": "string", "format": "binary"}}}},
            **error_responses("not_found"),
        },
        openapi_extra={"parameters": [{**number, "schema": {"type": "integer", "minimum": 0}}]},
    )
    async def example(request: Request) -> Response:
        index = request.path_params["number"]
        examples = (await service.examples()).examples
        if index >= len(examples):
            raise ApiError("not_found", f"there is no example {str(index)[:20]}; /v1/examples lists them")
        return Response(examples[index].png, media_type="image/png")


def _add_predict(router: APIRouter, service: PredictionService) -> None:
    predictor = service.predictor
    parser = RequestParser(service.limits, len(predictor.trained_names))

    # FastAPI parses one media type per route, so the two of this one are parsed in the route.
    @router.post(
        "/predict",
        tags=["predict"],
        summary="Classify images",
        operation_id="predict",
        responses=error_responses(
            *("malformed", "upload_timeout", "too_large", "unsupported_media_type", "invalid_request", "class_names"),
            *("unreadable_image", "internal", "model_failed", "busy", "not_ready", "timeout"),
        ),
        openapi_extra={"requestBody": parser.openapi()},
    )
    async def predict(request: Request) -> responses.PredictResponse:
        parsed = await parser.parse(request)
        if parsed.zero_shot and not predictor.has_zero_shot:
            raise ApiError("invalid_request", "zero_shot: this server does not have the frozen CLIP; leave it out")
        # The body has been read: the next message says that the client has disconnected.
        disconnected = asyncio.ensure_future(request.receive())
        try:
            result = await service.predict(parsed, request.state.upload, disconnected)
        finally:
            disconnected.cancel()
        return _predict_response(parsed, result)


def _predict_response(request: PredictRequest, result: ClassProbabilities) -> responses.PredictResponse:
    def ranking(ranked: Sequence[Ranked]) -> list[responses.RankedClass]:
        return [responses.RankedClass(name=item.name, probability=item.probability) for item in ranked]

    predictions = []
    for index, image in enumerate(request.images):
        frozen = result.frozen[index] if request.zero_shot and result.frozen is not None else None
        prediction = answer(image.source, result.names, result.tuned[index], frozen, request.top)
        zero_shot = None if prediction.zero_shot is None else ranking(prediction.zero_shot)
        predictions.append(
            responses.ImagePrediction(source=image.source, best=ranking(prediction.best), zero_shot=zero_shot)
        )
    note = result.note and result.note.replace("--zero-shot", "the zero-shot predictions")
    return responses.PredictResponse(predictions=predictions, class_count=len(result.names), note=note)


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
            error = ApiError("not_found", f"there is nothing at {path!r}; /openapi.json describes the API")
        else:
            error = ApiError("malformed", str(error.detail), headers=error.headers)
    return error.response()
