"""How the page looks: its theme, `style.css`, and `keys.js`, its one script. Nothing comes from a network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

TITLE = "lora-dpo"
HERE = Path(__file__).parent


def css() -> str:
    """All styles."""
    return (HERE / "style.css").read_text(encoding="utf-8")


def head() -> str:
    """What goes into the page's head."""
    return f"<script>\n{(HERE / 'keys.js').read_text(encoding='utf-8')}</script>"


def theme() -> Any:
    """Gradio's default with system fonts and a calmer colour: no font is fetched."""
    import gradio as gr

    return gr.themes.Default(
        primary_hue=gr.themes.colors.blue,
        neutral_hue=gr.themes.colors.slate,
        spacing_size=gr.themes.sizes.spacing_sm,
        font=["system-ui", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif"],
        font_mono=["ui-monospace", "Consolas", "Menlo", "monospace"],
    )
