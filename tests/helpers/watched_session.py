"""A process that does everything a user does, and writes down every address that it asks for beyond this machine.

python watched_session.py FOLDER MODEL    FOLDER/asked.txt: one line for each name looked up or address connected to
"""

import os
import sys
from pathlib import Path

ASKED: list[str] = []
LOCAL = ("127.", "::1", "localhost", "0.0.0.0", "/")


def note(event: str, arguments: tuple) -> None:
    """An audit hook: whatever Python connects to or looks up passes here, in every thread and library."""
    if event == "socket.connect":
        address = arguments[1]
        host = address[0] if isinstance(address, tuple) else address
    elif event in ("socket.getaddrinfo", "socket.gethostbyname"):
        host = arguments[0]
    else:
        return
    host = host.decode() if isinstance(host, bytes) else str(host or "")
    if host and not host.startswith(LOCAL):
        ASKED.append(f"{event} {host}")
        raise OSError(f"{host}: no network in this test")


for name in (
    "HF_HUB_OFFLINE",
    "CI",
    "HF_HUB_DISABLE_TELEMETRY",
    "HF_UPDATE_DOWNLOAD_COUNTS",
    "GRADIO_ANALYTICS_ENABLED",
):
    os.environ.pop(name, None)  # as on a user's machine; TRL tells nothing where CI is set
sys.addaudithook(note)

import httpx  # noqa: E402
import yaml  # noqa: E402

from lora_dpo.cli.commands import main  # noqa: E402


def command(*words: str) -> None:
    print(">", *words, flush=True)
    if main(list(words)) != 0:
        sys.exit(f"{words} failed")


def commands(folder: Path, model: str) -> None:
    recipe = {
        "model": {"name": model, "quantize": "none", "dtype": "float32"},
        "lora": {"rank": 2},
        "data": {"train": str(folder / "pairs.jsonl"), "eval": str(folder / "eval.jsonl")},
        "evaluation": {"answers": 2, "max_new_tokens": 8},
        "health": {"max_new_tokens": 8},
        "trainer": {"max_steps": 2, "per_device_train_batch_size": 2},
        "output": str(folder / "adapters/first"),
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    for file, numbers in (("prompts.txt", range(30, 42)), ("held-out.txt", range(50, 58))):
        (folder / file).write_text("".join(f"Tell me of moon {n}.\n" for n in numbers))
    rounds = {name: recipe[name] for name in ("model", "lora", "trainer")} | {
        "improve": {"prompts": str(folder / "prompts.txt"), "held_out": str(folder / "held-out.txt"), "rounds": 1,
                    "judge": "rules:chars<=12", "answers": 6, "max_new_tokens": 48},
        "output": str(folder / "adapters/improved"),
    }  # fmt: skip
    (folder / "improve.yaml").write_text(yaml.safe_dump(rounds))
    for method in ("dpo", "sft", "kto"):
        more = [] if method == "dpo" else [f"method={method}", f"output={folder}/adapters/{method}"]
        command("train", str(folder / "recipe.yaml"), *more)
    command("plan", str(folder / "recipe.yaml"), "--measure", "output=elsewhere")
    command("eval", str(folder / "adapters/first"), "--data", str(folder / "eval.jsonl"), "--answers", "2",
            "--max-new-tokens", "8")  # fmt: skip
    command("improve", str(folder / "improve.yaml"))


def served(folder: Path, model: str) -> None:
    import socket
    import threading
    import time

    from lora_dpo.demo import app
    from lora_dpo.demo.session import AppState
    from lora_dpo.serving.host import open_host
    from lora_dpo.serving.http import build_app, run

    print("> serve", flush=True)
    with open_host(model, folder / "adapters", quantize="none") as host, socket.create_server(("127.0.0.1", 0)) as sock:
        url = f"http://127.0.0.1:{sock.getsockname()[1]}/v1/chat/completions"
        threading.Thread(target=run, args=(build_app(host), sock, host), daemon=True).start()
        asked = {"model": "first", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}
        time.sleep(0.2)  # the connection waits in the socket until the server takes it
        assert httpx.post(url, json=asked, timeout=60).status_code == 200
        print("> demo", flush=True)
        app_state = AppState(host, folder / "collected")
        address = app.launch(app_state, host="127.0.0.1", port=None, auth=None, block=False)
        assert httpx.get(address, timeout=60).status_code == 200
        app.close(app_state)


if __name__ == "__main__":
    where, name = Path(sys.argv[1]), sys.argv[2]
    os.chdir(where)
    commands(where, name)
    served(where, name)
    (where / "asked.txt").write_text("".join(f"{line}\n" for line in ASKED))
