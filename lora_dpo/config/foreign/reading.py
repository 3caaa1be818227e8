"""A file of another tool's settings: whose they are, and what they are in a recipe."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lora_dpo.config.foreign import axolotl, llama_factory, trl, unsloth
from lora_dpo.config.foreign.command_line import commands, flags
from lora_dpo.config.foreign.script import Script
from lora_dpo.config.foreign.translation import Translation
from lora_dpo.config.reading import check_recipe, parse_settings
from lora_dpo.config.yaml import MAX_TEXT, typed_value
from lora_dpo.errors import ConfigError
from lora_dpo.quiet import quiet_libraries

Given = dict[str, Any]
NO_MODEL = "WRITE-THE-BASE-HERE"
NO_DATA = "WRITE-THE-PAIRS-HERE.jsonl"
"""What a recipe has where their settings name nothing: a run stops at it, and says so."""
TRL_METHODS = ("dpo", "kto", "sft")
KTO_ONLY, SFT_ONLY = (
    ("desirable_weight", "undesirable_weight"),
    ("assistant_only_loss", "packing", "completion_only_loss"),
)
"""Fields by which TRL's YAML, which does not say what it is for, is known."""
_SHELL = re.compile(r"(\s*)[!%].*")
QUIETLY_COMPUTED = ("bf16", "fp16", "dtype", "torch_dtype", "bnb_4bit_compute_dtype", "output_dir")


def read_foreign(path: Path) -> Translation:
    """Read the settings of LLaMA-Factory, Axolotl, Unsloth or TRL out of a file, and translate them.

    Args:
        path: YAML or JSON, a Python script (`.py`) or notebook (`.ipynb`), or any other text with the command that
            trains in it.

    Raises:
        ConfigError: the file cannot be read, is nobody's that is known, or asks for what cannot be translated.
    """
    text = _text_of(path)
    suffix = path.suffix.lower()
    if suffix in (".yaml", ".yml", ".json"):
        made = _of_settings(_parsed(text, path), path)
    elif suffix in (".py", ".ipynb"):
        made = _of_script(text, path)
    else:
        made = _of_commands(text, path)
    return _finished(made, path)


def _text_of(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(
            f"There is no file {path}. Name the settings of LLaMA-Factory, Axolotl, Unsloth or TRL."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if path.suffix.lower() == ".ipynb":
        text = _code_of(text, path)
    if len(text) > MAX_TEXT:
        raise ConfigError(f"{path} has {len(text):,} characters; at most {MAX_TEXT:,} are read as settings.")
    return text


def _code_of(text: str, path: Path) -> str:
    """The code of a notebook, without its commands to the shell."""
    try:
        cells = json.loads(text)["cells"]
        code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ConfigError(
            f"{path} is not read as a notebook. Save it once more, or give its code as a .py file."
        ) from None
    return "\n".join(_SHELL.sub(r"\1pass", line) for line in "\n".join(code).splitlines())


def _parsed(text: str, path: Path) -> Given:
    if path.suffix.lower() == ".json":
        try:
            found = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{path}: not valid JSON ({error}).") from None
        if isinstance(found, dict):
            return found
        raise ConfigError(f"{path} holds no settings: expected one JSON object.")
    return parse_settings(text, where=str(path))


def _finished(t: Translation, path: Path) -> Translation:
    """Fill in what a recipe must have, and hold it against the recipe's own checks."""
    from lora_dpo.config.trl_dpo import trainer_settings

    if not t.settings.get("model", {}).get("name"):
        t.put("model.name", NO_MODEL, "not in their settings")
        t.miss("the base", "their settings name none: write it into model.name", loud=True)
    if not t.has("data.train"):
        t.put("data.train", NO_DATA, "not in their settings")
        t.miss("the data", "their settings name none: write it into data.train", loud=True)
    t.settings = t.ordered()
    with quiet_libraries():
        trainer_settings(check_recipe(t.settings, where=f"the recipe made of {path}"))
    return t


# --- YAML and JSON ---------------------------------------------------------------------------------


def _of_settings(given: Given, path: Path, method: str | None = None) -> Translation:
    """Whose settings these are is told by names that only one tool has."""
    if isinstance(given.get("model"), dict):
        raise ConfigError(f"{path} is a recipe of lora-dpo already: lora-dpo train {path}.")
    if "base_model" in given:
        return axolotl.translate(given)
    if {"stage", "finetuning_type", "pref_beta", "pref_loss", "cutoff_len"} & given.keys():
        return llama_factory.translate(given, folder=path.parent)
    if isinstance(given.get("training"), dict) or isinstance(given.get("lora"), dict):
        return unsloth.translate(_flattened(given), method="sft", own=True)
    if {"model_name_or_path", "dataset_name", "datasets"} & given.keys():
        return trl.translate(given, method=method or _trl_method(given))
    if "peft_config" in given or "train_dataset" in given:
        raise ConfigError(
            f"{path} has the form of LLaMA-Factory's v1, which is not read. Give the one for llamafactory-cli train."
        )
    raise ConfigError(
        f"{path} is not known as settings of LLaMA-Factory (stage, finetuning_type), Axolotl (base_model), Unsloth "
        "(training, lora) or TRL (model_name_or_path, dataset_name). Write a recipe by hand: lora-dpo docs recipe."
    )


def _flattened(given: Given) -> Given:
    """Unsloth's sections as one: it takes the same names on its command line, without them."""
    flat: Given = {}
    for name, value in given.items():
        flat.update(
            value if isinstance(value, dict) and name in ("data", "training", "lora", "logging") else {name: value}
        )
    return flat


def _trl_method(given: Given) -> str:
    if set(KTO_ONLY) & given.keys() or given.get("loss_type") in ("kto", "apo_zero_unpaired"):
        return "kto"
    return "sft" if set(SFT_ONLY) & given.keys() and "beta" not in given else "dpo"


# --- command lines ---------------------------------------------------------------------------------


def _of_commands(text: str, path: Path) -> Translation:
    for words in commands(text, where=str(path)):
        for index, word in enumerate(words):
            reader = _COMMANDS.get(Path(word).name)
            found = reader(words[index + 1 :], path) if reader else None
            if found is not None:
                return found
    raise ConfigError(
        f"{path} holds no command that is known: trl dpo, llamafactory-cli train, axolotl train, unsloth train, or "
        "python with one of their scripts. Give the YAML or the script that is trained by."
    )


def _trl_command(words: list[str], path: Path) -> Translation | None:
    return _trl(words[1:], words[0], path) if words and words[0] in TRL_METHODS else None


def _trl_script(method: str) -> Callable[[list[str], Path], Translation | None]:
    return lambda words, path: _trl(words, method, path)


def _trl(words: list[str], method: str, path: Path) -> Translation:
    given, _ = flags(words, where=str(path))
    named = given.pop("config", None)
    beside = _beside(str(named), path) if named is not None else {}
    return trl.translate({**beside, **given}, method=method)


def _llama_factory(words: list[str], path: Path) -> Translation | None:
    if words and words[0] == "train":
        words = words[1:]
    elif not any(word.startswith("--stage") for word in words):
        return None
    if words and words[0].endswith((".yaml", ".yml", ".json")):
        changed = (word.partition("=") for word in words[1:])
        given = {name: typed_value(value, Any, where=str(path)) for name, equals, value in changed if equals}
        return llama_factory.translate({**_beside(words[0], path), **given}, folder=path.parent)
    return llama_factory.translate(flags(words, where=str(path))[0], folder=path.parent)


def _axolotl(words: list[str], path: Path) -> Translation | None:
    words = words[1:] if words[:1] == ["train"] else words
    named = next((word for word in words if word.endswith((".yaml", ".yml"))), None)
    if named is None:
        return None
    given, _ = flags([word for word in words if word != named], where=str(path))
    return axolotl.translate({**_beside(named, path), **given})


def _unsloth(words: list[str], path: Path) -> Translation | None:
    if words[:1] != ["train"]:
        return None
    given, _ = flags(words[1:], where=str(path))
    named = given.pop("config", given.pop("c", None))
    beside = _flattened(_beside(str(named), path)) if named is not None else {}
    return unsloth.translate({**beside, **given}, method="sft", own=True)


def _unsloth_script(words: list[str], path: Path) -> Translation:
    given, _ = flags(words, where=str(path))
    given.setdefault("load_in_4bit", False)  # a switch there, off without it
    return unsloth.translate({"r": 16, "max_steps": 400, "optim": "adamw_8bit", **given}, method="sft", own=True)


def _beside(name: str, path: Path) -> Given:
    """The settings of a file that a command names, from the current folder or from that of the command."""
    for place in (Path(name), path.parent / name):
        if place.is_file():
            return _parsed(_text_of(place), place)
    raise ConfigError(f"{path} names the settings {name}, which are not here. Put that file beside it.")


_COMMANDS: dict[str, Callable[[list[str], Path], Translation | None]] = {
    "trl": _trl_command,
    **{f"{method}.py": _trl_script(method) for method in TRL_METHODS},
    "llamafactory-cli": _llama_factory,
    "lmf": _llama_factory,
    "train.py": _llama_factory,
    "train_bash.py": _llama_factory,
    "axolotl": _axolotl,
    "axolotl.cli.train": _axolotl,
    "unsloth": _unsloth,
    "unsloth-cli.py": _unsloth_script,
}
"""What reads the words after a program's name."""


# --- scripts ---------------------------------------------------------------------------------------


def _of_script(text: str, path: Path) -> Translation:
    script = Script(text, where=str(path))
    given = dict(_of_data_files(script.given))
    if script.method is None:
        raise ConfigError(f"{path} makes no DPOTrainer, KTOTrainer or SFTTrainer, so it is not known how it trains.")
    if script.unsloth:
        made = unsloth.translate(given, method=script.method, own=False)
    else:
        names = {"model_name": "model_name_or_path", "dataset": "dataset_name", "split": "dataset_train_split"}
        given = {names.get(name, name): value for name, value in given.items()}
        made = trl.translate({"use_peft": script.peft, **given}, method=script.method)
    for name, code in script.computed.items():
        if name not in QUIETLY_COMPUTED:
            made.miss(name, f"the script computes it ({code}): set it by hand", loud=True)
    return made


def _of_data_files(given: Given) -> Iterator[tuple[str, Any]]:
    """`load_dataset("json", data_files="pairs.jsonl")` names the file."""
    files = given.get("data_files")
    for name, value in given.items():
        if name == "dataset" and isinstance(files, str) and value in ("json", "csv", "parquet"):
            yield name, files
        elif name != "data_files" and not (name == "split" and isinstance(files, str)):
            yield name, value
