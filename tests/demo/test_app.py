"""The page as an app to deploy: public mode, names that lead there, and `demo/app.py` run as people run it."""

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
import time
import tomllib
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import yaml

pytest.importorskip("gradio")

from lora_dpo.demo.app import Guard, build, launch_options
from lora_dpo.demo.session import open_state

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def app_state(tiny_model_folder, tmp_path):
    found = open_state(str(tiny_model_folder), adapters_dir=tmp_path / "adapters", data_dir=tmp_path / "collected")
    yield found
    found.host.close()


def names_of(page):
    return {each["api_name"] for each in page.get_config_file()["dependencies"] if each["api_name"]}


def tabs_of(page):
    return {each["props"].get("label") for each in page.get_config_file()["components"] if each["type"] == "tabitem"}


def test_in_public_there_are_a_chat_and_votes_and_nothing_else(app_state):
    ours, theirs = build(app_state), build(app_state, public=True)
    assert tabs_of(ours) == {"Chat", "Vote", "Data", "Train", "Adapters"}
    assert tabs_of(theirs) == {"Chat", "Vote"}
    kept = {"models", "chat", "compare"}
    assert kept <= names_of(theirs) < names_of(ours)
    gone = {"train", "start_training", "install", "upload_pairs", "export_adapter", "pack", "adapters", "pairs"}
    assert not gone & names_of(theirs)

    def parts(page):
        components = page.get_config_file()["components"]
        return [each["props"] for each in components if each["props"].get("visible") is not False]

    def said(page):
        return " ".join(f"{part.get('value')} {part.get('label')}" for part in parts(page))

    assert [part for part in parts(ours) if part.get("elem_id") == "base-open"]
    assert not [part for part in parts(theirs) if str(part.get("elem_id")).startswith("base-")]
    assert "3</b> train" in said(ours)
    assert "train</a>" not in said(theirs)
    assert "The same in a terminal" in said(ours)
    assert "The same in a terminal" not in said(theirs)
    calls = [each for each in theirs.get_config_file()["dependencies"] if each["api_visibility"] != "private"]
    assert {call["api_name"] for call in calls} == {"models", "chat", "compare", "match", "vote", "standings"}
    uploads = [each for each in theirs.get_config_file()["components"] if each["type"] in ("uploadbutton", "file")]
    assert not [each for each in uploads if each["props"].get("visible") is not False]


def status(local, names, host, method="GET"):
    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    sent = []

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": method, "path": "/", "headers": [(b"host", host.encode())]}
    asyncio.run(Guard(app, local=local, names=names)(scope, None, send))
    return sent[0]["status"]


def test_a_page_without_a_password_answers_to_its_own_names_alone():
    assert status(True, (), "localhost:7860") == 200
    assert status(True, (), "me-demo.hf.space") == 403
    assert status(True, {"me-demo.hf.space"}, "Me-Demo.hf.space") == 200
    assert status(True, {"me-demo.hf.space"}, "other.hf.space") == 403
    assert status(False, (), "other.hf.space") == 200


def test_what_launch_is_given_depends_on_its_arguments_alone():
    first, second = launch_options(names=["A.example"]), launch_options(names=["A.example"])
    assert first.keys() == second.keys()
    assert first["app_kwargs"]["middleware"][0].kwargs == {"local": True, "names": frozenset({"a.example"})}
    assert launch_options(auth=("me", "secret"))["app_kwargs"]["middleware"][0].kwargs["local"] is False


def test_a_space_is_given_the_python_the_gradio_and_the_extra_that_there_are():
    front = yaml.safe_load((ROOT / "demo" / "README.md").read_text(encoding="utf-8").split("---")[1])
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert f"gradio=={front['sdk_version']}" in pinned
    assert project["requires-python"] == f">={front['python_version']}"  # a Space has 3.10 by itself
    [needed] = (ROOT / "demo" / "requirements.txt").read_text(encoding="utf-8").split()
    name, extra = needed.removesuffix("]").split("[")
    assert name == project["name"]
    assert extra in project["optional-dependencies"]
    assert (ROOT / "demo" / front["app_file"]).is_file()


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as place:
        return place.getsockname()[1]


def got(port, host):
    request = urllib.request.Request(f"http://127.0.0.1:{port}/config", headers={"Host": host})
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, ""
    except OSError:
        return 0, ""


@pytest.mark.slow
@pytest.mark.parametrize("command", [[sys.executable, "demo/app.py"], [sys.executable, "-m", "gradio", "demo/app.py"]])
@pytest.mark.posix
def test_the_app_runs_as_a_script_as_a_space_and_under_gradios_reload(command, tiny_model_folder, tmp_path):
    port = free_port()
    environment = {
        **os.environ,
        "LORA_DPO_MODEL": str(tiny_model_folder), "LORA_DPO_ADAPTERS": str(tmp_path / "adapters"),
        "LORA_DPO_DATA": str(tmp_path / "collected"), "GRADIO_SERVER_PORT": str(port), "SPACE_HOST": "me-demo.hf.space",
    }  # fmt: skip
    with (tmp_path / "log").open("w") as log:
        # a session of its own: `gradio` starts the app as another process, which would outlive it
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            until = time.monotonic() + 120
            while got(port, "localhost")[0] != 200:
                assert process.poll() is None, (tmp_path / "log").read_text()
                assert time.monotonic() < until, (tmp_path / "log").read_text()
                time.sleep(0.5)
            seen, text = got(port, "me-demo.hf.space")
            assert seen == 200
            assert re.findall(r'"label":"(Train|Vote)"', text) == ["Vote"]
            assert got(port, "elsewhere.example")[0] == 403
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(30)


@pytest.mark.slow
def test_all_tabs_are_for_this_machine_alone_whatever_the_environment_says(tiny_model_folder, tmp_path):
    environment = {key: value for key, value in os.environ.items() if key not in ("SPACE_HOST", "LORA_DPO_PUBLIC")}
    environment |= {
        "LORA_DPO_MODEL": str(tiny_model_folder), "LORA_DPO_ADAPTERS": str(tmp_path / "adapters"),
        "LORA_DPO_DATA": str(tmp_path / "collected"), "GRADIO_SERVER_NAME": "0.0.0.0", "GRADIO_SERVER_PORT": "0",
    }  # fmt: skip
    # what `launch` is given, without a server: a page that others could reach would be one call away
    script = "import gradio, runpy; gradio.Blocks.launch = lambda page, **given: print(given.get('server_name'));"
    script += "runpy.run_path('demo/app.py', run_name='__main__')"
    for public, wanted in (("0", "127.0.0.1"), ("1", "None")):
        done = subprocess.run(
            [sys.executable, "-c", script], cwd=ROOT, env={**environment, "LORA_DPO_PUBLIC": public},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert done.stdout.split()[-1] == wanted
