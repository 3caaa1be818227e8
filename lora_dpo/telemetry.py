"""Nothing is counted or reported anywhere unless its user asks for it: importing this module switches it off.

TRL's trainers tell the hub of the model's architecture, the GPU's name and the data's source whenever one is made;
Gradio and datasets count, too. Each of them can be switched on again with its own variable, set before Python starts.
"""

from __future__ import annotations

import os
import sys

OFF = {
    "HF_HUB_DISABLE_TELEMETRY": "1",  # TRL, transformers, and whatever else asks huggingface_hub to tell
    "HF_UPDATE_DOWNLOAD_COUNTS": "0",  # datasets
    "GRADIO_ANALYTICS_ENABLED": "False",
}


def switch_off() -> None:
    """Set each variable that its user did not set, also for libraries that read theirs when they were imported."""
    ours = {name for name, value in OFF.items() if os.environ.setdefault(name, value) == value}
    hub, datasets = sys.modules.get("huggingface_hub.constants"), sys.modules.get("datasets.config")
    if hub is not None and "HF_HUB_DISABLE_TELEMETRY" in ours:
        setattr(hub, "HF_HUB_DISABLE_TELEMETRY", True)  # noqa: B010 - a script imported trl first
    if datasets is not None and "HF_UPDATE_DOWNLOAD_COUNTS" in ours:
        setattr(datasets, "HF_UPDATE_DOWNLOAD_COUNTS", False)  # noqa: B010


switch_off()
