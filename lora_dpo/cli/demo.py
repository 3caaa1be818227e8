"""`lora-dpo demo`: parse, check what is reachable from where, open the page."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from lora_dpo.cli.options import BaseModel, HeldAs, Port, StrictAboutAll
from lora_dpo.errors import ConfigError

err = Console(stderr=True)


def demo(
    model: BaseModel = "smollm2-135m",
    adapters_dir: Annotated[
        Path | None,
        typer.Option(
            "--adapters-dir", help="Adapters are the folders in it; new ones are written there. Default: adapters/."
        ),
    ] = None,
    data_dir: Annotated[
        Path | None,
        typer.Option("--data-dir", help="Where votes and uploaded pairs are kept. Default: collected/."),
    ] = None,
    quantize: HeldAs = "auto",
    host: Annotated[str, typer.Option(help="Address to listen on; only this machine by default.")] = "127.0.0.1",
    port: Port = 7860,
    auth: Annotated[
        str | None,
        typer.Option(
            envvar="LORA_DPO_AUTH", help="USER:PASSWORD that a visitor must give; also read from LORA_DPO_AUTH."
        ),
    ] = None,
    share: Annotated[
        bool, typer.Option("--share", help="A public address through Gradio's servers. Needs --auth.")
    ] = False,
    strict: StrictAboutAll = False,
) -> None:
    """Chat, vote blind, train and swap adapters in a browser.

    All of it on one loaded base. Votes are kept as preference pairs; training uses the base that answers, while it
    answers. Listens on this machine alone: any other --host, and --share, need --auth. Ctrl-C ends it; a training that
    goes on saves a checkpoint.

    Examples:

        lora-dpo demo

        lora-dpo demo --model ~/models/my-3b --port 8080

        LORA_DPO_AUTH=me:secret lora-dpo demo --host 0.0.0.0
    """
    from lora_dpo.cli.ready import have_model, need
    from lora_dpo.config.reading import one_of

    one_of("--quantize", quantize, ("auto", "nf4", "none"))
    login = read_auth(auth)
    check_reach(host, share=share, auth=login is not None)
    if ":" in host:
        raise ConfigError(f"--host is {host}: Gradio listens on IPv4 addresses and names alone. Give 127.0.0.1.")
    need("demo", "demo", "gradio", "starlette", "uvicorn")
    from lora_dpo import places
    from lora_dpo.adapters.folder import strictness
    from lora_dpo.serving.address import listen

    # Before a model is loaded for nothing; and strict around the first look at the adapters, too.
    with listen(host, port) as listening, strictness(strict):
        have_model(model)
        from lora_dpo.demo import app
        from lora_dpo.demo.session import AppState
        from lora_dpo.serving.host import open_host

        port = listening.getsockname()[1]
        with err.status("loading the model"):  # the state alone holds it: its base can be changed
            opened = open_host(model, adapters_dir, quantize=quantize)  # type: ignore[arg-type]
            votes = data_dir or places.collected()
            app_state = AppState(opened, votes)
            del opened
        try:
            signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does
            kept = f"adapters in {app_state.adapters_dir}, votes and uploads in {votes}"
            err.print(kept, highlight=False, markup=False)
            err.print(f"http://{host}:{port}   Ctrl-C ends it", highlight=False)
            app.launch(app_state, host=host, listening=listening, auth=login, share=share)
        finally:
            app.close(app_state)


def read_auth(text: str | None) -> tuple[str, str] | None:
    """User and password. Raises `ConfigError` for a text without both."""
    if text is None:
        return None
    user, colon, password = text.partition(":")
    if not (user and colon and password):
        raise ConfigError("--auth must be USER:PASSWORD, such as me:a-long-secret.")
    return user, password


def check_reach(host: str, *, share: bool, auth: bool) -> None:
    """Raise `ConfigError` if others could come in without a password."""
    if auth:
        return
    from lora_dpo.serving.address import is_loopback

    if share:
        raise ConfigError("--share makes the page public: set --auth USER:PASSWORD as well.")
    if not is_loopback(host):
        raise ConfigError(f"--host {host} lets other machines in: set --auth USER:PASSWORD as well, or use 127.0.0.1.")
