"""`lora-dpo serve`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from lora_dpo.cli.options import BaseModel, HeldAs, Port, StrictAboutAll

out = Console()
err = Console(stderr=True)


def serve(
    model: BaseModel = "smollm2-135m",
    adapters_dir: Annotated[
        Path | None,
        typer.Option(help="Adapters in it that fit the base can be asked for by their names. Default: adapters/."),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on. Others than this machine need --api-key.")] = (
        "127.0.0.1"
    ),
    port: Port = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="LORA_DPO_API_KEY", help="Key that every request must carry. The variable is not seen by others."
        ),
    ] = None,
    quantize: HeldAs = "auto",
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Longest answer, and the length where a request names none.")
    ] = 1024,
    max_prompt_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest prompt. Default: three quarters of the context, at most 4,096.")
    ] = None,
    max_waiting: Annotated[int, typer.Option(min=1, help="Requests that may wait; one more is refused.")] = 32,
    strict: StrictAboutAll = False,
) -> None:
    """Serve a base and its adapters behind an OpenAI-compatible API.

    Any chat client can then talk to an adapter: its model name is the adapter's, `base` is the model without one.
    The base is loaded once; adapters that appear in the folder can be asked for at once. Ctrl-C ends the server.

    Examples:

        lora-dpo serve

        lora-dpo serve --model Qwen/Qwen3-0.6B --port 8080

        LORA_DPO_API_KEY=… lora-dpo serve --host 0.0.0.0

        curl http://127.0.0.1:8000/v1/models
    """
    from lora_dpo.adapters.folder import strictness
    from lora_dpo.cli.ready import have_model, need
    from lora_dpo.config.reading import one_of
    from lora_dpo.errors import ConfigError
    from lora_dpo.serving.address import is_loopback, listen

    need("serve", "serve", "starlette", "uvicorn")
    one_of("--quantize", quantize, ("auto", "nf4", "none"))
    if api_key is not None and not (api_key.strip() and api_key.isascii() and api_key == api_key.strip()):
        raise ConfigError("The API key is empty, or has spaces around it or letters beyond ASCII. Choose another.")
    if api_key is None and not is_loopback(host):
        raise ConfigError(
            f"--host {host} lets other machines in, and there is no --api-key. Set one, for example in "
            "LORA_DPO_API_KEY, or listen on 127.0.0.1."
        )
    with listen(host, port) as sock, strictness(strict):
        have_model(model)  # before what serves it is loaded
        from lora_dpo.serving.host import open_host
        from lora_dpo.serving.http import build_app, run

        with err.status("loading the model"):
            opened = open_host(
                model,
                adapters_dir,
                quantize=quantize,  # type: ignore[arg-type]
                max_waiting=max_waiting,
                max_prompt_tokens=max_prompt_tokens,
            )
        with opened:
            _say(host, sock.getsockname()[1], opened.names())
            try:
                run(build_app(opened, api_key=api_key, max_new_tokens=max_new_tokens), sock, opened)
            except KeyboardInterrupt:
                out.print("Stopped.")


def _say(host: str, port: int, names: list[str]) -> None:
    where = f"[{host}]" if ":" in host else host
    out.print(f"base URL  http://{where}:{port}/v1", highlight=False, markup=False, soft_wrap=True)
    out.print(f"models    {', '.join(names)}", highlight=False, markup=False, soft_wrap=True)
    sys.stdout.flush()
