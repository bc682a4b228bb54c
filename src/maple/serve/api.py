"""The application: its addresses, and how a request becomes an answer."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from maple import __version__
from maple.data import short_name
from maple.data.images.reading import read_image
from maple.errors import ImageError
from maple.inference.predictor import Floats, Predictor, answer
from maple.serve import description, schemas
from maple.serve.batching import Answered, Batcher, Job
from maple.serve.capacity import Capacity, Lease
from maple.serve.examples import NO_EXAMPLES, ExampleSet
from maple.serve.guard import LEASE, Guard
from maple.serve.limits import Limits
from maple.serve.pages import add_page
from maple.serve.problems import Problem, busy
from maple.serve.question import Question, read_question, unreadable

logger = logging.getLogger(__name__)

_CLOSE_SECONDS = 10.0
_EXAMPLES_SECONDS = 10.0


@dataclass
class Service:
    """What the addresses share: the model's thread, the decoders, and how much they have taken on."""

    answerer: Predictor
    limits: Limits
    find_examples: Callable[[], ExampleSet]
    batcher: Batcher = field(init=False)
    decoders: ThreadPoolExecutor = field(init=False)
    pictures: Capacity = field(init=False)
    examples: "asyncio.Task[ExampleSet] | None" = None
    working: "set[asyncio.Task[Any]]" = field(default_factory=set)

    def __post_init__(self) -> None:
        self.batcher = Batcher(self.answerer, self.limits)
        self.decoders = ThreadPoolExecutor(self.limits.decoders, thread_name_prefix="maple-decode")
        self.pictures = Capacity(self.limits.queue)

    @asynccontextmanager
    async def life(self, _app: FastAPI) -> AsyncIterator[None]:
        """Work from the first request to the last."""
        self.batcher.start()
        self.examples = asyncio.create_task(asyncio.to_thread(self.find_examples))
        try:
            yield
        finally:
            ended = await asyncio.to_thread(self.batcher.close, _CLOSE_SECONDS)
            self.decoders.shutdown(wait=ended, cancel_futures=True)

    async def found_examples(self) -> ExampleSet:
        """The pictures to try; none where they cannot be found, or not soon."""
        if self.examples is None:
            return NO_EXAMPLES
        with suppress(TimeoutError):
            try:
                return await asyncio.wait_for(asyncio.shield(self.examples), _EXAMPLES_SECONDS)
            except Exception as error:
                if isinstance(error, TimeoutError):
                    raise
                logger.warning("no examples: %s", error)
        return NO_EXAMPLES

    async def answer(self, question: Question, upload: Lease, gone: "asyncio.Future[Any]") -> Answered:
        """Answer a question in time, unless its sender goes away.

        The work itself is not interrupted, only not gone on with; what it holds counts until it has ended.

        Raises:
            Problem: too many pictures are at work, one cannot be read, the class names will not do, it takes too long.
        """
        job = Job(question.class_names)
        pictures = self.pictures.lease()
        full = busy(f"{self.pictures.used} pictures wait, and {self.pictures.total} may")
        pictures.take(len(question.uploads), full)
        upload.handed_on = True
        work = asyncio.create_task(self._work(question, job, (pictures, upload)))
        self.working.add(work)
        work.add_done_callback(self._done)
        await asyncio.wait([work, gone], timeout=self.limits.timeout, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            job.abandoned = True
            job.answer.cancel()
            raise Problem("timeout", f"no answer within {self.limits.timeout:g} seconds; send fewer pictures, or later")
        return await work

    def _done(self, work: "asyncio.Task[Any]") -> None:
        self.working.discard(work)
        if not work.cancelled():
            work.exception()  # whoever waited was told, or has gone

    async def _work(self, question: Question, job: Job, leases: Iterable[Lease]) -> Answered:
        try:
            loop = asyncio.get_running_loop()
            decoded = [
                loop.run_in_executor(self.decoders, self._view, job, upload.content) for upload in question.uploads
            ]
            results = await asyncio.gather(*decoded)
            if reasons := {index: result for index, result in enumerate(results) if isinstance(result, str)}:
                raise unreadable(reasons, question.uploads)
            job.views = [result for result in results if not isinstance(result, str)]
            self.batcher.put(job)
            return await asyncio.wrap_future(job.answer)
        finally:
            for lease in leases:
                lease.release()

    def _view(self, job: Job, content: bytes) -> Floats | str:
        """What the model sees of a picture, or why it cannot."""
        if job.abandoned:
            return "was not read"
        try:
            return self.answerer.view(read_image(content, max_pixels=self.limits.pixels))
        except ImageError as error:
            return str(error).removeprefix("<bytes>: ")


def create_app(
    answerer: Predictor,
    limits: Limits | None = None,
    *,
    token: str | None = None,
    hosts: Iterable[str] | None = None,
    find_examples: Callable[[], ExampleSet] = lambda: NO_EXAMPLES,
) -> Guard:
    """The whole server as an ASGI application.

    Args:
        token: what the API may only be asked with.
        hosts: the names that requests may address it by; None for any.
        find_examples: finds pictures to try; called in a thread once the server runs.
    """
    limits = limits or Limits()
    service = Service(answerer, limits, find_examples)
    app = FastAPI(
        title="maple-clip",
        version=__version__,
        description=description.TEXT,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        lifespan=service.life,
    )
    app.state.service = service
    _add_health(app, service)
    _add_model(app, service)
    _add_examples(app, service)
    _add_predict(app, service)
    add_page(app)
    app.add_exception_handler(Problem, _told)
    app.add_exception_handler(HTTPException, _told_http)
    description.describe(app, protected=token is not None)
    return Guard(app, limits, token=token, hosts=hosts)


def _add_health(app: FastAPI, service: Service) -> None:
    @app.get("/healthz", tags=["health"], summary="Whether the process answers", operation_id="healthz")
    async def healthz() -> schemas.Alive:
        return schemas.Alive()

    @app.get(
        "/readyz",
        tags=["health"],
        summary="Whether the model answers",
        operation_id="readyz",
        responses=description.errors("not_ready"),
    )
    async def readyz() -> schemas.Ready:
        if not service.batcher.ready:
            raise Problem("not_ready", "the model does not answer: the server stops, or has failed")
        return schemas.Ready()


def _add_model(app: FastAPI, service: Service) -> None:
    about, limits = dict(service.answerer.about), service.limits
    if about.get("dataset"):
        about["dataset"] = short_name(about["dataset"])
    most = max(limits.classes, len(service.answerer.trained_names))
    model = schemas.Model(
        title=description.title_of(about),
        about=about,
        class_names=list(service.answerer.trained_names),
        zero_shot=service.answerer.has_zero_shot,
        limits=schemas.LimitsInForce(
            upload_bytes=limits.upload_bytes,
            pixels=limits.pixels,
            images=limits.images,
            classes=most,
            name_chars=limits.name_chars,
            top=limits.top,
        ),
        version=__version__,
    )

    @app.get("/v1/model", tags=["model"], summary="What answers, and what it was trained on", operation_id="model")
    async def get_model() -> schemas.Model:
        return model


def _add_examples(app: FastAPI, service: Service) -> None:
    @app.get("/v1/examples", tags=["examples"], summary="Pictures to try", operation_id="examples")
    async def examples() -> schemas.Examples:
        found = await service.found_examples()
        listed = [
            schemas.Example(id=index, class_name=one.class_name, trained=one.trained)
            for index, one in enumerate(found.examples)
        ]
        return schemas.Examples(source=found.source if listed else None, examples=listed)

    @app.get(
        "/v1/examples/{number}",
        tags=["examples"],
        summary="One of them, as PNG",
        operation_id="example",
        response_class=Response,
        responses=description.PNG | description.errors("not_found"),
        openapi_extra={"parameters": [description.NUMBER]},
    )
    async def example(request: Request) -> Response:
        number = request.path_params["number"]
        found = (await service.found_examples()).examples
        if not (number.isascii() and number.isdecimal() and len(number) < 9 and int(number) < len(found)):
            raise Problem("not_found", f"there is no example {number[:20]!r}; /v1/examples lists them")
        return Response(found[int(number)].png, media_type="image/png")


def _add_predict(app: FastAPI, service: Service) -> None:
    limits, answerer = service.limits, service.answerer
    model = schemas.request_model(limits, len(answerer.trained_names))

    @app.post(
        "/v1/predict",
        tags=["predict"],
        summary="Say what pictures show",
        operation_id="predict",
        response_model=schemas.Predictions,
        responses=description.errors(*description.PREDICT_CODES),
        openapi_extra={"requestBody": description.request_body(model)},
    )
    async def predict(request: Request) -> dict[str, Any]:
        question = await read_question(request.headers, await request.body(), model, limits)
        if question.zero_shot and not answerer.has_zero_shot:
            raise Problem("invalid_request", "zero_shot: this server does not hold the frozen CLIP; leave it out")
        gone = asyncio.ensure_future(request.receive())
        try:
            answered = await service.answer(question, request.scope[LEASE], gone)
        finally:
            gone.cancel()
        return _predictions(question, answered)


def _predictions(question: Question, answered: Answered) -> dict[str, Any]:
    rows = []
    for index, upload in enumerate(question.uploads):
        frozen = answered.frozen[index] if question.zero_shot and answered.frozen is not None else None
        one = answer(upload.source, answered.names, answered.tuned[index], frozen, question.top)
        rows.append(
            {
                "source": one.source,
                "best": [{"class": rank.name, "probability": rank.probability} for rank in one.best],
                "zero_shot": one.zero_shot
                and [{"class": rank.name, "probability": rank.probability} for rank in one.zero_shot],
            }
        )
    note = answered.note and answered.note.replace("--zero-shot", "the zero-shot answers")
    return {"predictions": rows, "class_count": len(answered.names), "note": note}


async def _told(_request: Request, error: Exception) -> Response:
    if not isinstance(error, Problem):
        raise error
    return JSONResponse(error.answer(), error.status, error.all_headers())


async def _told_http(request: Request, error: Exception) -> Response:
    """What the framework refuses by itself: unknown addresses, and methods that an address does not know."""
    if not isinstance(error, HTTPException):
        raise error
    headers = dict(error.headers or {})
    path = request.url.path[:100]
    if error.status_code == 405:
        allowed = headers.get("Allow", "another method")
        problem = Problem("method_not_allowed", f"{path!r} is asked with {allowed}", headers=headers)
    elif error.status_code == 404:
        problem = Problem("not_found", f"there is nothing at {path!r}; /openapi.json describes what there is")
    else:
        problem = Problem("malformed", str(error.detail), headers=headers)
    return await _told(request, problem)
