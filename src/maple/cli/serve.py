"""`maple serve`."""

from importlib.util import find_spec
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated

import typer
from typer import Option

from maple.cli import options
from maple.cli.options import (
    AnyModel,
    DataRoot,
    Device,
    Draft,
    Pretrained,
    TrainedBackbone,
    TrustBackbone,
    TrustCode,
    load_arguments,
)
from maple.errors import ConfigError

MIN_TOKEN = 16
_PACKAGES = ("fastapi", "uvicorn", "python_multipart", "prometheus_client")


def serve_command(
    run: AnyModel,
    host: Annotated[str, Option(help="Address to listen on. Any but this machine's own needs a token.")] = "127.0.0.1",
    port: Annotated[int, Option(help="The port to listen on; 0 for any free one.")] = 8000,
    token: Annotated[
        str | None,
        Option(
            envvar="MAPLE_TOKEN",
            show_envvar=True,
            help="The token that clients of the API must send; safer in the environment than in the list of processes.",
        ),
    ] = None,
    no_token: Annotated[
        bool, Option("--no-token", help="Let other machines that --host admits omit the token.")
    ] = False,
    allow_host: Annotated[
        list[str] | None,
        Option(
            help="Another name of this server, as of a proxy; repeatable. Given one, --host 0.0.0.0 no longer accepts "
            "every name."
        ),
    ] = None,
    url_prefix: Annotated[
        str, Option(help="Path under which a proxy offers this server: /maple. It may be passed on or removed.")
    ] = "",
    zero_shot: Annotated[
        bool | None,
        Option(help="Load the frozen CLIP too, for comparison. Default: if available; an export may lack it."),
    ] = None,
    examples: Annotated[bool, Option(help="Offer images of the model's own data set to try.")] = True,
    open_page: Annotated[bool, Option("--open", help="Open the page in a browser.")] = False,
    max_upload: Annotated[float, Option(help="Size of the largest request, in MiB.")] = 32,
    max_pixels: Annotated[int, Option(help="Size of the largest image, in pixels.")] = 25_000_000,
    max_images: Annotated[int, Option(help="Maximum number of images in a request.")] = 16,
    max_classes: Annotated[int, Option(help="Maximum number of class names in a request.")] = 500,
    max_batch: Annotated[int, Option(help="Number of images that the model processes at once.")] = 32,
    queue: Annotated[int, Option(help="Number of images that may wait; more requests are refused as busy.")] = 128,
    timeout: Annotated[float, Option(help="Seconds after which a request fails.")] = 30,
    draft: Draft = False,
    decode_timeout: Annotated[float, Option(help="Seconds that decoding one image may take.")] = 10,
    data_root: DataRoot = None,
    device: Device = None,
    backbone: TrainedBackbone = None,
    pretrained: Pretrained = None,
    trust_backbone: TrustBackbone = False,
    trust_code: TrustCode = False,
) -> None:
    """Serve a web page and an HTTP API that classify images, until Ctrl-C.

    The page is at the printed address; /docs describes the API, and /metrics is for Prometheus.
    """
    if missing := [name for name in _PACKAGES if find_spec(name) is None]:
        raise ConfigError(f"maple serve needs {', '.join(missing)}: pip install 'maple-clip[serve]'")
    from maple.inference import load_predictor
    from maple.inference.manifest import export_folder, is_export, read_manifest
    from maple.serve import listen
    from maple.serve.api import create_app
    from maple.serve.examples import find_examples, trained_dataset
    from maple.serve.limits import MIB, Limits
    from maple.serve.responses import ExampleList, model_title

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
        decode_timeout=decode_timeout,
        upload_timeout=max(timeout, 30.0),
    )
    check_token(token)
    clip = load_arguments(backbone, pretrained, trust_backbone, trust_code)
    # Before the model is loaded, so that an address that cannot be used is reported at once.
    with listen.bind(host, port) as listening:
        bound_to = listening.getsockname()[0]
        require_token(bound_to, host, token, anyone=no_token)
        hosts = allowed_hosts(bound_to, host, allow_host or [])
        if zero_shot is None:
            zero_shot = not is_export(run) or read_manifest(export_folder(run)).zero_shot is not None
        predictor = load_predictor(run, zero_shot=zero_shot, device=device, **clip)
        predictor.prepare()

        def examples_of_run() -> ExampleList:
            folder = Path(run).expanduser()
            return find_examples(trained_dataset(folder, predictor.about, data_root), predictor.trained_names)

        app = create_app(
            predictor,
            limits,
            token=token,
            hosts=hosts,
            url_prefix=url_prefix,
            draft=draft,
            find_examples=examples_of_run if examples else None,
        )
        address = f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}"
        listening.listen()  # from here on, clients wait for the server to start instead of being refused
        options.echo(f"maple: {model_title(predictor.about)}")
        options.echo(f"maple: serving at {address} (Ctrl-C stops)")
        if open_page:
            typer.launch(address)
        listen.run(app, listening, limits)
    options.echo("maple: stopped")


def is_loopback(address: str) -> bool:
    """Whether only this machine reaches the address."""
    try:
        return ip_address(address.partition("%")[0]).is_loopback
    except ValueError:
        return False


def check_token(token: str | None) -> None:
    """Raise ConfigError for a token that is short, or contains anything but printable ASCII without spaces."""
    if token is None:
        return
    command = 'create one with: python -c "import secrets; print(secrets.token_urlsafe())"'
    if len(token) < MIN_TOKEN:
        raise ConfigError(f"the token has {len(token)} characters; it must have at least {MIN_TOKEN}: {command}")
    if not all("!" <= char <= "~" for char in token):
        raise ConfigError(f"the token contains a space or a character that HTTP cannot carry; {command}")


def require_token(bound_to: str, host: str, token: str | None, *, anyone: bool) -> None:
    """Raise ConfigError if other machines reach `bound_to`, which `host` resolved to, and `anyone` may not use it."""
    if token is None and not anyone and not is_loopback(bound_to):
        raise ConfigError(
            f"--host {host} lets other machines use this server; set a token in the environment variable MAPLE_TOKEN "
            "(or with --token), or allow anyone with --no-token"
        )


def allowed_hosts(bound_to: str, host: str, more: list[str]) -> list[str] | None:
    """The names by which requests may address the server; None for any, if other machines reach it."""
    from maple.serve.middleware import LOOPBACK

    for name in more:
        if not name or (any(char in name for char in "/:@*, ") and not is_loopback(name)):
            raise ConfigError(f"--allow-host {name!r} is not a host name; give one such as example.org, without port")
    if not is_loopback(bound_to) and not more:
        return None
    return [*LOOPBACK, host, *more]
