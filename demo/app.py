"""The demo as an app of its own: `python demo/app.py`, `gradio demo/app.py` while you change a tab, or a Space.

Settings are environment variables:

    LORA_DPO_MODEL     the base: a packaged model's name, a folder or a hub id
    LORA_DPO_ADAPTERS  the folder of adapters
    LORA_DPO_DATA      where votes are kept; on a Space its storage, if it has one
    LORA_DPO_PUBLIC    1: visitors chat and vote, and nothing else is there. On a Space always
"""

import os
from pathlib import Path

import gradio as gr

from lora_dpo.demo.app import launch_options, queued
from lora_dpo.demo.session import open_state

SPACE = os.environ.get("SPACE_HOST", "")
PUBLIC = bool(SPACE) or os.environ.get("LORA_DPO_PUBLIC") == "1"
STORAGE = Path("/data") if SPACE and os.access("/data", os.W_OK) else Path()

if gr.NO_RELOAD:  # the base stays in memory while `gradio demo/app.py` draws the page anew
    state = open_state(
        os.environ.get("LORA_DPO_MODEL", "smollm2-135m"),
        adapters_dir=Path(os.environ.get("LORA_DPO_ADAPTERS", "adapters")),
        data_dir=Path(os.environ.get("LORA_DPO_DATA", STORAGE / "collected")),
    )

demo = queued(state, public=PUBLIC)

if __name__ == "__main__":
    # All five tabs are for this machine alone, whatever GRADIO_SERVER_NAME says: others need `lora-dpo demo --auth`.
    server = {} if PUBLIC else {"server_name": "127.0.0.1"}
    demo.launch(**launch_options(names=[SPACE] if SPACE else []), **server)
