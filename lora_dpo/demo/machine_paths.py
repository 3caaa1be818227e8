"""Folders of this machine, out of what the page says: who is let in has no business with them."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path

_UPLOAD = re.compile(r"^[0-9a-f]{32,64}[/\\]")
"""Gradio keeps an upload in a folder that is called by its hash."""
_ABSOLUTE = re.compile(
    r"(?<![\w.:/\\~…-])"  # neither an address nor the middle of a relative path
    r"(?:~|[A-Za-z]:)?(?:[/\\][^\s/\\:*?\"'<>|,;()]+)+[/\\](?P<name>[^\s/\\:*?\"'<>|,;()]+)"
)


def without_paths(text: str) -> str:
    """A message without folders of this machine.

    What lies under the current folder has its path from there, as one would type it; of any other file or folder its
    own name is left.
    """
    for folder, ours in _known():
        parts = text.split(folder)
        text = parts[0] + "".join(_shortened(part, ours=ours) for part in parts[1:])
    return _ABSOLUTE.sub(lambda found: f"…/{found['name']}", text)


def _shortened(rest: str, *, ours: bool) -> str:
    """What follows a known folder in a text, in its place."""
    if not rest.startswith(("/", "\\")):
        return ("the current folder" if ours else "…") + rest
    return _UPLOAD.sub("", rest[1:]) if ours else f"/_{rest}"  # the pattern leaves its last name


def _known() -> list[tuple[str, bool]]:
    """Folders as they stand in messages, inner ones first, and whether what lies in them is called by its path there.

    The pattern sees them too, but for those with a space in their names.
    """
    uploads = os.environ.get("GRADIO_TEMP_DIR")
    places = {Path(tempfile.gettempdir()): False, Path.home(): False, Path.cwd(): True}
    places |= {Path(uploads): True} if uploads else {}
    whole = {place: ours for place, ours in places.items() if len(place.parts) > 1}  # not the root of everything
    texts = {text: ours for place, ours in whole.items() for text in (str(place), str(place.resolve()))}
    return sorted(texts.items(), key=lambda text: -len(text[0]))
