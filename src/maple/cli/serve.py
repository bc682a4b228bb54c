"""`maple serve`."""

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from maple.cli.options import DataRoot, Device

if TYPE_CHECKING:
    from maple.inference import Predictor


def serve_command(
    run: Annotated[
        str,
        typer.Argument(metavar="RUN", help="A run folder, a prompts file, hf-hub:OWNER/NAME, or an export to ONNX."),
    ],
    host: Annotated[str, typer.Option(help="The address to listen on. Any but this machine's own needs a token.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(help="The port to listen on; 0 for any free one.")] = 8000,
    token: Annotated[
        str | None,
        typer.Option(
            envvar="MAPLE_TOKEN",
            show_envvar=True,
            help="The token that clients of the API must send; safer in the environment than in the list of processes.",
        ),
    ] = None,
    no_token: Annotated[
        bool, typer.Option("--no-token", help="Let other machines use the API without a token, if --host admits them.")
    ] = False,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(help="Another name of this server, such as that of a proxy. May be repeated."),
    ] = None,
    zero_shot: Annotated[
        bool | None,
        typer.Option(
            "--zero-shot/--no-zero-shot",
            help="Load the frozen CLIP too, for comparison. Default: if available; an export may lack it.",
        ),
    ] = None,
    examples: Annotated[
        bool, typer.Option("--examples/--no-examples", help="Offer images of the model's own data set to try.")
    ] = True,
    open_page: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
    max_upload: Annotated[float, typer.Option(help="Size of the largest request, in MiB.")] = 32,
    max_pixels: Annotated[int, typer.Option(help="Size of the largest image, in pixels.")] = 25_000_000,
    max_images: Annotated[int, typer.Option(help="Maximum number of images in a request.")] = 16,
    max_classes: Annotated[int, typer.Option(help="Maximum number of class names in a request.")] = 500,
    max_batch: Annotated[int, typer.Option(help="Number of images that the model processes at once.")] = 32,
    queue: Annotated[
        int, typer.Option(help="Number of images that may wait; beyond it, requests are refused as busy.")
    ] = 128,
    timeout: Annotated[float, typer.Option(help="Seconds after which a request fails.")] = 30,
    data_root: DataRoot = None,
    device: Device = None,
) -> None:
    """Serve a web page and an HTTP API that classify images, until Ctrl-C.

    The page is at the printed address; /openapi.json describes the API.
    """
    from maple.errors import ConfigError

    if missing := [name for name in ("fastapi", "uvicorn", "python_multipart") if find_spec(name) is None]:
        raise ConfigError(f"maple serve needs {', '.join(missing)}: pip install 'maple-clip[serve]'")
    from maple.serve import listen
    from maple.serve.api import create_app
    from maple.serve.examples import ExampleSet, find_examples, trained_dataset
    from maple.serve.limits import MIB, Limits
    from maple.serve.responses import model_title

    listen.check_token(token)
    if not 0 < max_upload <= 2048:
        raise ConfigError(f"--max-upload {max_upload:g} must be above 0 and at most 2048 MiB")
    limits = Limits(
        upload_bytes=int(max_upload * MIB) or 1,
        uploads_bytes=4 * int(max_upload * MIB) or 4,
        pixels=max_pixels,
        images=max_images,
        classes=max_classes,
        batch=max_batch,
        queue=queue,
        timeout=timeout,
        upload_timeout=max(timeout, 30.0),
    )
    # Before the model is loaded, so that an address that cannot be used is reported at once.
    listening = listen.bind(host, port)
    with listening:
        listen.require_token(listening, host, token, anyone=no_token)
        hosts = listen.allowed_hosts(listening, host, allow_host or [])
        predictor = _load(run, zero_shot, device)
        predictor.encode_class_names()
        trained_on = trained_dataset(Path(run).expanduser(), predictor.about, data_root)
        app = create_app(
            predictor,
            limits,
            token=token,
            hosts=hosts,
            find_examples=lambda: find_examples(trained_on, predictor.trained_names) if examples else ExampleSet(),
        )
        address = listen.address_of(listening, host)

        def started() -> None:
            typer.echo(f"maple: {model_title(predictor.about)}")
            typer.echo(f"maple: serving at {address} (Ctrl-C stops)")
            if open_page:
                typer.launch(address)

        listen.run(app, listening, limits, started=started)
    typer.echo("maple: stopped")


def _load(run: str, zero_shot: bool | None, device: str | None) -> "Predictor":
    from maple.inference import load_predictor
    from maple.inference.manifest import export_folder, is_export, read_manifest

    if zero_shot is None:
        zero_shot = not is_export(run) or read_manifest(export_folder(run)).zero_shot is not None
    return load_predictor(run, zero_shot=zero_shot, device=device)
