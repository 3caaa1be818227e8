"""Rotary frequencies that depend on the longest row of a call: how long rows may be to share one."""

from __future__ import annotations

from typing import Any


def shared_rope_limit(config: Any) -> tuple[str, int] | None:
    """The kind of a model's rotary embedding and the longest row whose frequencies are all rows' own, or None.

    Frequencies of the kinds `dynamic` and `longrope` are others in a call with a row beyond this limit, for all its
    rows. Those of the other kinds are always the same.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    found: list[tuple[str, int]] = []
    for each in [rope, *(value for value in rope.values() if isinstance(value, dict))]:  # some have one a layer type
        kind = each.get("rope_type", "default")
        if kind not in ("dynamic", "longrope"):
            continue
        limit = each.get("original_max_position_embeddings") if kind == "longrope" else None
        limit = limit or getattr(config, "original_max_position_embeddings", None) or config.max_position_embeddings
        found.append((kind, limit))
    return min(found, key=lambda one: one[1], default=None)
