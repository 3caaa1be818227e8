"""Nothing leaves this machine that its user did not send: telemetry is off, and local names are never asked for."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lora_dpo import quiet

SESSION = Path(__file__).parent / "helpers" / "watched_session.py"


def python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={name: value for name, value in os.environ.items() if name not in quiet.OFF} | environment,
    ).stdout.strip()


HUB_FIRST = "import huggingface_hub.constants as hub; import lora_dpo"
HUB_LAST = "import lora_dpo; import huggingface_hub.constants as hub"


@pytest.mark.parametrize("imports", [HUB_FIRST, HUB_LAST])
def test_telemetry_is_off_whichever_library_was_imported_first(imports):
    assert python(f"{imports}; print(hub.HF_HUB_DISABLE_TELEMETRY)") == "True"


@pytest.mark.parametrize("imports", [HUB_FIRST, HUB_LAST])
def test_who_asks_for_telemetry_has_it(imports):
    assert python(f"{imports}; print(hub.HF_HUB_DISABLE_TELEMETRY)", HF_HUB_DISABLE_TELEMETRY="0") == "False"


def test_datasets_counts_no_downloads():
    assert python("import datasets, lora_dpo; print(datasets.config.HF_UPDATE_DOWNLOAD_COUNTS)") == "False"


@pytest.mark.slow
def test_a_whole_session_asks_for_no_address_beyond_this_machine(taught, write_pairs, tmp_path):
    """Training by each method, plan, eval, improve, serve and the demo, with TRL's and Gradio's usual settings."""
    write_pairs("pairs.jsonl", 8)
    write_pairs("eval.jsonl", 4, first=20)
    log = tmp_path / "session.log"
    with log.open("w") as file:
        command = [sys.executable, SESSION, tmp_path, taught]
        done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False)
    assert done.returncode == 0, log.read_text()[-3000:]
    assert (tmp_path / "asked.txt").read_text() == ""
