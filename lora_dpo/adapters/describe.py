"""What an adapter was made from, what was measured, and how large it is; and in what two differ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lora_dpo.adapters.adapter import open_adapter
from lora_dpo.adapters.lora_config import WEIGHTS
from lora_dpo.adapters.passport import Passport
from lora_dpo.config.template_kwargs import as_words
from lora_dpo.model.stored_form import held_text
from lora_dpo.text import plain


def describe(folder: Path) -> list[tuple[str, str]]:
    """Rows `(field, value)` for `lora-dpo adapters show`."""
    adapter = open_adapter(folder)
    config, tensors, passport = adapter.config, adapter.tensors, adapter.passport
    kind = "DoRA" if config.dora else "rsLoRA" if config.rslora else "LoRA"
    targets = config.targets if isinstance(config.targets, str) else ", ".join(sorted(map(str, config.targets or [])))
    targets = ", ".join(filter(None, [targets, *config.parameters]))
    rows = [
        ("folder", str(folder)),
        ("base", adapter.base[0] or "not named"),
        ("kind", f"{kind}, rank {config.rank}, alpha {config.alpha:g}, {len(tensors.lora)} layers"),
        ("targets", targets),
        ("size", f"{folder_size(folder) / 1e6:.1f} MB, weights as {', '.join(_dtypes(folder))}"),
    ]
    if passport is None:
        return [*rows, ("passport", "none: made by another tool, unverified")]
    held = held_text(passport.quantize, passport.kept_share)
    rows += [
        ("base revision", passport.base_revision or "not recorded"),
        ("base licence", passport.base_licence or "not stated"),
        ("base weights", f"{held}, computed in {passport.dtype}, fingerprint {passport.base_fingerprint}"),
        *((("chat template", f"with {as_words(given)}"),) if (given := passport.chat_template_kwargs) else ()),
        ("reference", passport.reference),
        ("made", f"{passport.created} with lora-dpo {passport.versions.get('lora-dpo', '?')}"),
        *((f"data, {which}", _data_line(data)) for which, data in passport.data.items() if isinstance(data, dict)),
        *measured(passport),
    ]
    return [(name, plain(value, 300)) for name, value in rows]


def diff(first: Path, second: Path) -> list[tuple[str, str, str]]:
    """Rows `(setting or metric, first, second)` in which two adapters differ."""
    one, other = (_flat(folder) for folder in (first, second))
    keys = [*one, *(key for key in other if key not in one)]
    return [(key, one.get(key, "-"), other.get(key, "-")) for key in keys if one.get(key) != other.get(key)]


def _dtypes(folder: Path) -> list[str]:
    from lora_dpo.adapters.peft_files import read_header

    return sorted({stored.dtype for stored in read_header(folder / WEIGHTS).values()})


def metrics_after(passport: Passport) -> dict[str, dict[str, Any]]:
    """What was measured after training, by part; empty where a passport does not say."""
    after = passport.metrics.get("after", {})
    return {part: found for part, found in after.items() if isinstance(found, dict)} if isinstance(after, dict) else {}


MEASURED = {
    "pairs.pairs": ("held-out pairs", "{:,}"),
    "pairs.accuracy": ("held-out accuracy", "{:.2f}"),
    "pairs.margin": ("held-out reward margin", "{:z.2f}"),
    "pairs.chosen_logratio": ("log-ratio of the chosen answers", "{:+z.1f} nats"),
    "pairs.rejected_logratio": ("log-ratio of the rejected answers", "{:+z.1f} nats"),
    "answers.answers": ("held-out prompts answered", "{:,}"),
    "answers.mean_tokens": ("length of these answers", "{:.0f} tokens"),
    "answers.finished": ("answers that end by themselves", "{:.0%}"),
    "answers.chosen_mean_tokens": ("length of the chosen answers there", "{:.0f} tokens"),
    "answers.questions": ("questions with a known answer", "{:,}"),
    "answers.correct": ("known answers right", "{:.0%}"),
}
"""Measured numbers by their keys in a passport: in words, and how they are written."""
FIXED = {"pairs.pairs", "answers.answers", "answers.chosen_mean_tokens", "answers.questions"}
"""Those of the data, which training does not change."""


def measured(passport: Passport) -> list[tuple[str, str]]:
    """What was measured after training, and before it, in words; a number that is not known here has its key."""
    before = passport.metrics.get("before", {})
    rows = []
    for part, found in metrics_after(passport).items():
        earlier = before.get(part) if isinstance(before, dict) else None
        for name, value in found.items():
            key = f"{part}.{name}"
            if value is None or (key == "answers.questions" and value == 0):
                continue
            label, form = MEASURED.get(key, (f"{key}, after training", ""))
            then = earlier.get(name) if isinstance(earlier, dict) and key not in FIXED else None
            was = f" (before: {_written(then, form)})" if _is_number(then) and _is_number(value) else ""
            rows.append((label, _written(value, form) + was))
    return rows


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _written(value: Any, form: str) -> str:
    try:
        return form.format(value) if form else f"{value:.4g}" if isinstance(value, float) else str(value)
    except (ValueError, TypeError, OverflowError):  # a passport from elsewhere may say anything
        return str(value)


def _metrics(passport: Passport) -> dict[str, str]:
    flat = {f"{part}.{key}": value for part, found in metrics_after(passport).items() for key, value in found.items()}
    return {key: f"{value:.4g}" if isinstance(value, float) else str(value) for key, value in flat.items()}


def _data_line(data: Mapping[str, Any]) -> str:
    hashes = data.get("sha256")
    names = ", ".join(f"{file} ({str(sha)[:12]})" for file, sha in hashes.items()) if isinstance(hashes, dict) else "?"
    unit = "answers" if "answers" in data else "pairs"
    return f"{data.get(unit)} {unit} of {data.get('rows')} rows: {names}"


def _flat(folder: Path) -> dict[str, str]:
    """Settings and metrics of an adapter by dotted names, as text."""
    adapter = open_adapter(folder)
    config, passport = adapter.config, adapter.passport
    if passport is None:
        return {f"config.{key}": plain(value) for key, value in sorted(config.raw.items())}
    flat = {"base": passport.base, "quantize": passport.quantize, "dtype": passport.dtype}
    flat |= {"base_fingerprint": str(passport.base_fingerprint), "reference": passport.reference}
    flat |= (
        dict(_dotted(passport.recipe)) if passport.recipe else {"rank": str(config.rank), "alpha": f"{config.alpha:g}"}
    )
    flat |= {f"metrics.after.{key}": value for key, value in _metrics(passport).items()}
    return {key: plain(value) for key, value in flat.items()}


def _dotted(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _dotted(value, f"{prefix}{key}.")
        elif value is not None:
            yield f"{prefix}{key}", str(value)


def folder_size(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
