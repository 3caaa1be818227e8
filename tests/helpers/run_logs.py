"""What a run wrote into its log."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def log_rows(folder: Path) -> list[dict[str, Any]]:
    """Every row of `metrics.jsonl`."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def logged(folder: Path, name: str = "loss") -> dict[int, Any]:
    """One number by step, of the rows that have it."""
    return {row["step"]: row[name] for row in log_rows(folder) if name in row}
