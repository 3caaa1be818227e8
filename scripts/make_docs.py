"""Make `docs/recipe.md` from the code that it describes.

    python scripts/make_docs.py            # write the page
    python scripts/make_docs.py --check    # exit 1 if the committed page is stale

`make test` fails on a stale page, too.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from lora_dpo.config.reading import describe_fields
from lora_dpo.config.recipe import Recipe
from lora_dpo.config.trl_dpo import DEFAULTS, ELSEWHERE, NEEDS_LOSS
from lora_dpo.config.trl_sft_kto import METHODS

Field = tuple[str, str, str]
"""Dotted key, default, description: what `describe_fields` yields."""

PAGE = Path(__file__).resolve().parent.parent / "docs" / "recipe.md"

INTRO = """\
# The recipe

<!-- Made by scripts/make_docs.py from lora_dpo/config/. Change those, not this page. -->

A recipe is one YAML file that says everything about a run. `lora-dpo recipe` prints the tables of settings below.

```yaml
model:
  name: smollm2-135m
data:
  train: data/quickstart.jsonl
  eval: data/quickstart-eval.jsonl
trainer:
  learning_rate: 5e-5
  max_steps: 24
```

Only `model.name` and `data.train` are required. An unknown key is an error that names the nearest valid one. Relative
paths start at the current folder. On the command line, any setting is `key=value` with dots: `trainer.beta=0.2`.
The value is taken as it is typed (`output=out/try #2`); quotes make a text of a number or of `null`.
"""

DEFAULTS_INTRO = """\
## Defaults of `trainer:`

Any field of TRL's `DPOConfig` can stand under `trainer:`. A recipe starts from these; all other fields have TRL's
defaults. The default weights go with the default losses: with a `loss_type` of your own, `loss_weights` is 1 for each
unless you set it.

`gradient_checkpointing` is allowed, and used only in steps that would not fit without it. A `warmup_steps` below 1 is
a share of all steps.
"""

ELSEWHERE_INTRO = """\
## Fields of `trainer:` that are refused

They have another place in the recipe, or would do nothing in a run.
"""

NEEDS_LOSS_INTRO = """\
These are refused unless one of the losses that read them is in `loss_type`:
"""

METHODS_INTRO = """\
## `trainer:` with `method: sft` and `method: kto`

The fields are those of TRL's `SFTConfig` and `KTOConfig`. What [the methods](methods.md) start from:
"""

METHODS_ELSEWHERE_INTRO = """\
Refused with `method: {}`, beside those above that it has:
"""


def page() -> str:
    """The whole text of `docs/recipe.md`."""
    return "\n".join(_lines())


def is_fresh() -> bool:
    """True if the committed page is what the code says now."""
    return PAGE.is_file() and PAGE.read_text(encoding="utf-8") == page()


def _lines() -> Iterator[str]:
    yield INTRO
    for section, fields in _by_section():
        about = Recipe.model_fields[section].description if section else "Settings that stand on their own."
        yield f"## `{section}:`\n\n{about}\n" if section else f"## Top level\n\n{about}\n"
        rows = [(f"`{key}`", _default(default), text) for key, default, text in fields]
        yield from _table(("Setting", "Default", "What it does"), rows)
    yield DEFAULTS_INTRO
    rows = [(f"`{name}`", f"`{_yaml_value(value)}`") for name, value in DEFAULTS.items()]
    yield from _table(("Field", "Default"), rows)
    yield ELSEWHERE_INTRO
    yield from _table(("Field", "Why"), _by_reason(ELSEWHERE))
    yield NEEDS_LOSS_INTRO
    rows = [(f"`{name}`", ", ".join(users)) for name, users in NEEDS_LOSS.items()]
    yield from _table(("Field", "Losses"), rows)
    yield METHODS_INTRO
    fields = dict.fromkeys(name for method in METHODS.values() for name in method.defaults)
    cells = [(name, [method.defaults.get(name) for method in METHODS.values()]) for name in fields]
    rows = [(f"`{name}`", *(f"`{_yaml_value(value)}`" for value in values)) for name, values in cells]
    yield from _table(("Field", *METHODS), rows)
    for name, method in METHODS.items():
        yield METHODS_ELSEWHERE_INTRO.format(name)
        own = {field: why for field, why in method.elsewhere.items() if ELSEWHERE.get(field) != why}
        yield from _table(("Field", "Why"), _by_reason(own))


def _by_section() -> list[tuple[str, list[Field]]]:
    """Settings grouped by section, in the recipe's order; those without a section come last, under ``""``."""
    groups: dict[str, list[Field]] = {}
    for field in describe_fields():
        groups.setdefault(_section_of(field[0]), []).append(field)
    return sorted(groups.items(), key=lambda group: group[0] == "")


def _by_reason(refused: dict[str, str]) -> list[tuple[str, str]]:
    """Refused fields; those with the same reason share a row."""
    groups: dict[str, list[str]] = {}
    for name, reason in refused.items():
        groups.setdefault(reason, []).append(f"`{name}`")
    return [(", ".join(names), reason) for reason, names in groups.items()]


def _section_of(key: str) -> str:
    """`lora` for `lora.rank`; empty for a setting that stands on its own, such as `output`."""
    return key.rpartition(".")[0]


def _default(text: str) -> str:
    return "required" if text == "required" else f"`{text}`"


def _yaml_value(value: object) -> str:
    """A value as a reader would type it."""
    if isinstance(value, list):
        return "[" + ", ".join(map(_yaml_value, value)) + "]"
    return value if isinstance(value, str) else json.dumps(value).replace("e-0", "e-")


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield "|" + "---|" * len(head)
    for row in rows:
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |"
    yield ""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the page is stale")
    if not parser.parse_args(arguments).check:
        PAGE.write_text(page(), encoding="utf-8", newline="\n")
    elif not is_fresh():
        print(f"{PAGE.name} is stale. Make it again with: python scripts/make_docs.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
