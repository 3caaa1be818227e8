"""The demo without a browser: its command line, its endpoints for scripts, who may come in, and kills."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from dataclasses import replace

import psutil
import pytest

from lora_dpo.adapters.passport import read_passport, write_passport
from lora_dpo.cli.commands import main
from lora_dpo.cli.demo import check_reach, read_auth
from lora_dpo.data import read_pairs
from lora_dpo.errors import ConfigError
from lora_dpo.model.decoding import Sampling

gradio_client = pytest.importorskip("gradio_client")


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# --- the command line -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--host", "0.0.0.0"], "--host 0.0.0.0 lets other machines in: set --auth"),
        (["--host", "::"], "--host :: lets other machines in"),
        (["--host", "192.0.2.1"], "--host 192.0.2.1 lets other machines in"),
        (["--host", "::1"], "Gradio listens on IPv4 addresses and names alone"),
        (["--share"], "--share makes the page public: set --auth"),
        (["--auth", "me"], "--auth must be USER:PASSWORD"),
        (["--auth", "me:"], "--auth must be USER:PASSWORD"),
        (["--quantize", "nf5"], "Did you mean nf4?"),
        (["--model", "no/such/model"], "no/such/model is no model folder"),
    ],
)
def test_what_is_refused_before_a_model_is_loaded(arguments, message, capsys, monkeypatch):
    monkeypatch.delenv("LORA_DPO_AUTH", raising=False)
    port = [] if "--port" in arguments else ["--port", str(free_port())]
    assert main(["demo", *arguments, *port]) == 1
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_port_that_is_taken_is_said_before_the_model_is_loaded(capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert main(["demo", "--model", "no/such", "--port", str(taken.getsockname()[1])]) == 1
    assert "the port is taken" in capsys.readouterr().err


@pytest.mark.parametrize("strict", [False, True])
def test_strict_leaves_out_adapters_of_another_base(strict, tiny_model_folder, tiny_adapter, tmp_path, monkeypatch):
    from lora_dpo.demo import app

    shutil.copytree(tiny_adapter, tmp_path / "adapters/one")
    passport = read_passport(tmp_path / "adapters/one")
    write_passport(tmp_path / "adapters/one", replace(passport, quantize="nf4"))
    seen = []
    monkeypatch.setattr(app, "launch", lambda app_state, **_: seen.extend(app_state.names()))
    place = ["--adapters-dir", str(tmp_path / "adapters"), "--data-dir", str(tmp_path / "data"), "--port", "0"]
    command = ["demo", "--model", str(tiny_model_folder), "--quantize", "none", *place]
    assert main([*command, "--strict"] if strict else command) == 0
    assert seen == (["base"] if strict else ["base", "one"])


def test_who_may_come_in():
    for host in ("127.0.0.1", "127.8.8.8", "::1", "localhost"):
        check_reach(host, share=False, auth=False)
    check_reach("0.0.0.0", share=True, auth=True)
    assert read_auth("me:a:b") == ("me", "a:b")
    assert read_auth(None) is None
    with pytest.raises(ConfigError):
        check_reach("192.168.1.5", share=False, auth=False)


def test_importing_the_package_and_its_command_line_loads_no_gradio():
    script = "import sys, lora_dpo.cli.demo; print([name for name in sys.modules if 'gradio' in name])"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout.strip() == "[]"


def until(true, seconds=60):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def ask(text):
    return [{"role": "user", "content": text}]


# --- a demo in this process -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def app_state(tiny_model_folder, tiny_adapter, tmp_path_factory):
    from lora_dpo.demo.session import AppState
    from lora_dpo.serving.host import open_host

    place = tmp_path_factory.mktemp("demo")
    shutil.copytree(tiny_adapter, place / "adapters/first")
    with open_host(str(tiny_model_folder), place / "adapters", quantize="none") as host:
        yield AppState(host, place / "collected", scratch=place / "scratch")


@pytest.fixture(scope="module")
def address(app_state):
    import gradio

    from lora_dpo.demo import app

    yield app.launch(app_state, host="127.0.0.1", port=free_port(), auth=None, block=False)
    gradio.close_all()


@pytest.fixture
def client(address):
    return gradio_client.Client(address, verbose=False)


def test_every_verb_has_a_named_endpoint(client):
    endpoints = client.view_api(return_format="dict")["named_endpoints"]
    assert set(endpoints) == {
        "/models", "/chat", "/compare", "/match", "/vote", "/standings", "/pairs", "/upload_pairs", "/check_pairs",
        "/change_pair", "/delete_pair", "/export_pairs", "/plan_training", "/train", "/training", "/pause_training",
        "/find_settings",
        "/stop_training", "/interrupted", "/continue_training", "/discard_training", "/adapters", "/passport", "/pack",
        "/install", "/export_adapter",
    }  # fmt: skip
    parameters = [parameter["parameter_name"] for parameter in endpoints["/chat"]["parameters"]]
    assert parameters == ["message", "model", "system", "temperature", "top_p", "max_new_tokens", "seed", "history"]


def test_a_script_chats_with_any_model(client, app_state):
    assert client.predict(api_name="/models") == ["base", "first"]
    pieces = list(client.submit("Say it.", "first", temperature=0, max_new_tokens=30, api_name="/chat"))
    whole = client.predict("Say it.", "first", temperature=0, max_new_tokens=30, api_name="/chat")
    assert pieces[-1] == whole
    asked = [{"role": "user", "content": "Say it."}]
    expected = app_state.host.answer("first", asked, Sampling(max_new_tokens=30), client="x").text
    assert whole == expected
    both = client.predict("Say it.", "first", "base", temperature=0, max_new_tokens=30, api_name="/compare")
    assert both["left"]["text"] == whole
    assert both["right"]["text"] != whole
    assert both["left"]["tokens"] <= 30


def test_a_script_goes_on_with_a_conversation(client, app_state):
    history = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Yes?"}]
    said = client.predict("Say it.", "first", temperature=0, max_new_tokens=20, history=history, api_name="/chat")
    turns = [*history, {"role": "user", "content": "Say it."}]
    assert said == app_state.host.answer("first", turns, Sampling(max_new_tokens=20), client="x").text
    for odd in (history[:1], history[1:], [{"role": "user"}]):
        with pytest.raises(Exception, match="The history must"):
            client.predict("Say it.", "first", history=odd, api_name="/chat")


def test_a_script_uploads_pairs(client, app_state, tmp_path):
    row = {"prompt": "Say it.", "chosen": "Yes.", "rejected": "No."}
    (tmp_path / "mine.jsonl").write_text(json.dumps(row) + "\n")
    name = client.predict(gradio_client.handle_file(tmp_path / "mine.jsonl"), api_name="/upload_pairs")
    assert name == "mine"
    assert len(client.predict(name, api_name="/pairs")) == 1
    app_state.pairs.path_of(name).unlink()


def test_a_script_names_the_columns_of_a_table(client, app_state, tmp_path):
    (tmp_path / "mine.tsv").write_text("Q\tA\tB\nSay it.\tYes.\tNo.\n")
    with pytest.raises(Exception, match=r"mine\.tsv: no column says that it is prompt or chosen or rejected"):
        client.predict(gradio_client.handle_file(tmp_path / "mine.tsv"), api_name="/upload_pairs")
    named = "prompt=Q,chosen=B,rejected=A"
    name = client.predict(gradio_client.handle_file(tmp_path / "mine.tsv"), named, api_name="/upload_pairs")
    assert client.predict(name, api_name="/pairs")[0]["chosen"] == "No."
    app_state.pairs.path_of(name).unlink()


def test_errors_reach_a_script_in_their_own_words(client):
    with pytest.raises(Exception, match="no model nobody here"):
        client.predict("Hi", "nobody", api_name="/chat")
    with pytest.raises(Exception, match="no such match"):
        client.predict("none", "a", api_name="/vote")
    with pytest.raises(Exception, match="no pairs called"):
        client.predict("../../etc/passwd", "", api_name="/pairs")


def called(address, verb, *values):
    """What the demo tells a script that sends any JSON, as no client of Gradio's would."""
    body = json.dumps({"data": values}).encode()
    request = urllib.request.Request(f"{address}gradio_api/call{verb}", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        event = json.loads(answer.read())["event_id"]
    with urllib.request.urlopen(f"{address}gradio_api/call{verb}/{event}") as answer:
        kind, data = answer.read().decode().strip().splitlines()[-2:]
    return kind.removeprefix("event: "), json.loads(data.removeprefix("data: "))


CHAT = ("Hi", "base", "", 0, 0.95, 4, 0, None)


@pytest.mark.parametrize(
    ("verb", "values", "said"),
    [
        ("/chat", (*CHAT[:3], "hot", *CHAT[4:]), "temperature is .*hot.*: input should be a valid number"),
        ("/chat", (*CHAT[:5], "9" * 5000, *CHAT[6:]), "max_new_tokens is .*: unable to parse input string"),
        ("/chat", (3, *CHAT[1:]), "message is 3, which this call does not take: input should be a valid string"),
        ("/chat", ("Hi", None, *CHAT[2:]), None),  # nothing is what it is by default
        ("/chat", (*CHAT[:7], ["Hi"]), r"history\.0 is .*Hi.*: input should be a valid dictionary"),
        ("/compare", ("Hi", ["base"], "base", *CHAT[2:]), "left is .*: input should be a valid string"),
        ("/match", ("Hi", 3, 0.8, 4, ""), "players is 3, .*: input should be a valid list"),
        ("/match", ("Hi", [None, {}], 0.8, 4, ""), "players.0 is None, .*: input should be a valid string"),
        ("/vote", ([], "a"), r"match_id is \[\], .*: input should be a valid string"),
        ("/train", ({}, "mine", "quick", "", []), r"pairs is \{\}, .*: input should be a valid list"),
        ("/pause_training", ("perhaps",), "paused is .*: input should be a valid boolean"),
        ("/chat", ("Hi",), r"What was sent cannot be read: .*needed: 8, got: 1\)"),
        ("/upload_pairs", ("pairs.jsonl", ""), "What was sent cannot be read: "),
        ("/upload_pairs", (None, ""), "path is None, .*: input should be a valid string"),
        ("/install", ({"path": "/etc/passwd"},), "What was sent cannot be read: "),
    ],
)
def test_values_of_another_type_are_one_sentence_for_who_sent_them(address, verb, values, said, capfd):
    capfd.readouterr()
    kind, told = called(address, verb, *values)
    if said is None:
        assert kind == "complete"
    else:
        assert kind == "error"
        assert re.match(said, told["error"])
        assert "\n" not in told["error"]
    assert "Traceback" not in capfd.readouterr().err


def test_a_script_votes_blind_trains_and_swaps(client, app_state, tmp_path):
    # blind: the answers come without names; after the vote they are told
    for number in range(3):
        match = client.predict(f"Tell tale{number}.", ["base", "first"], max_new_tokens=8, api_name="/match")
        assert set(match) == {"id", "a", "b"}
        done = client.predict(match["id"], "a", api_name="/vote")
        assert {done["a"], done["b"]} == {"base", "first"}
    assert (done["pairs"], done["others"]) == (3, 0)
    (standing,) = client.predict(api_name="/standings")
    assert standing["wins"] + standing["losses"] == 3
    assert standing["interval"][0] <= standing["rate"] <= standing["interval"][1]
    # the pairs can be looked through and mended
    pairs = client.predict("votes", "TELL tale1", api_name="/pairs")
    assert [pair["prompt"] for pair in pairs] == ["Tell tale1."]
    line, mark = pairs[0]["line"], pairs[0]["mark"]
    assert client.predict("votes", line, mark, "Say one.", "One.", "1", api_name="/change_pair") == "changed"
    with pytest.raises(Exception, match="meanwhile"):
        client.predict("votes", line, mark, api_name="/delete_pair")
    assert client.predict("votes", api_name="/check_pairs")["pairs"] == 3
    exported = client.predict("votes", api_name="/export_pairs")
    assert len(read_pairs(exported)[0]) == 3
    # a plan, then a run; chat goes on meanwhile
    options = {"pairs": ["votes"], "name": "second", "preset": "quick", "settings": "trainer: {learning_rate: 0.01}"}
    planned = client.predict(**options, api_name="/plan_training")
    assert planned["plan"]["steps"]["steps"] == 2
    assert "learning_rate: 0.01" in planned["settings"]
    assert client.predict(**options, prompts=["Say it."], api_name="/train") == "started"
    assert client.predict("Hi", "base", max_new_tokens=5, api_name="/chat") is not None
    deadline = time.monotonic() + 60
    while (told := client.predict(api_name="/training"))["state"] not in (
        "done",
        "failed",
    ) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert (told["state"], told["error"], told["step"]) == ("done", None, 2)
    assert [sample["step"] for sample in told["samples"]] == [0, 1, 2]
    assert client.predict(api_name="/models") == ["base", "first", "second"]
    answers = [client.predict("Say it.", who, temperature=0, api_name="/chat") for who in ("base", "second")]
    assert answers[0] != answers[1]
    # out as a package, and in again under another name
    packed = client.predict("second", api_name="/pack")
    assert client.predict("second", api_name="/passport")["folder"].endswith("second")
    with pytest.raises(Exception, match="adapter called second already"):
        assert client.predict(gradio_client.handle_file(packed), api_name="/install") == "second"
    shutil.rmtree(app_state.adapters_dir / "second")
    assert client.predict(gradio_client.handle_file(packed), api_name="/install") == "second"
    assert [row["name"] for row in client.predict(api_name="/adapters")] == ["first", "second"]


def test_a_script_goes_on_with_an_interrupted_run_or_discards_it(client, app_state, tmp_path):
    (tmp_path / "few.jsonl").write_text(
        "".join(json.dumps({"prompt": f"Say {n}.", "chosen": f"{n}.", "rejected": "No."}) + "\n" for n in range(8))
    )
    pairs = [client.predict(gradio_client.handle_file(tmp_path / "few.jsonl"), api_name="/upload_pairs")]
    gentle = "trainer: {max_steps: 2000, learning_rate: 1.0e-8}"
    for name in ("one", "two"):
        client.predict(pairs=pairs, name=name, settings=gentle, api_name="/train")
        until(lambda: client.predict(api_name="/training").get("step", 0) > 1)
        assert client.predict(api_name="/interrupted") == (["one"] if name == "two" else [])
        app_state.training.job.interrupt()  # as the end of the demo does
        assert app_state.training.job.wait(60)
    assert client.predict(api_name="/interrupted") == ["two", "one"]
    assert client.predict("two", api_name="/discard_training") == "discarded"
    with pytest.raises(Exception, match="no interrupted run two here"):
        client.predict("two", api_name="/continue_training")
    assert client.predict("one", api_name="/continue_training") == "started"
    until(lambda: client.predict(api_name="/training")["state"] == "running")
    client.predict(False, api_name="/stop_training")
    assert app_state.training.job.wait(60)
    assert client.predict(api_name="/interrupted") == []
    assert not [path for path in app_state.adapters_dir.iterdir() if path.name.startswith(("one", "two"))]


def test_a_script_exports_an_adapter(client, app_state):
    place, file = client.predict("first", "gguf-adapter", api_name="/export_adapter")
    assert place.endswith("first-lora.gguf")
    with open(file, "rb") as written:
        assert written.read(4) == b"GGUF"
    # It lies there once, and what was fetched long ago is not kept.
    (written,) = app_state.scratch.rglob("first-lora.gguf")
    out = written.parent
    os.utime(out, (time.time() - 4000,) * 2)
    client.predict("first", api_name="/pack")
    assert not out.exists()
    assert list(app_state.scratch.rglob("first-lora.gguf")) == []
    folders = [client.predict("first", "merge", api_name="/export_adapter")[0] for _ in range(2)]
    assert [name.rpartition("/")[2] for name in folders] == ["first-merged", "first-2-merged"]
    assert (app_state.pairs.folder / "exports/first-merged/model.safetensors").is_file()
    with pytest.raises(Exception, match="no export of the kind zip"):
        client.predict("first", "zip", api_name="/export_adapter")


def test_two_scripts_at_once_keep_their_own_answers(address, app_state):
    found = {}

    def conversation(number):
        mine = gradio_client.Client(address, verbose=False)
        found[number] = mine.predict(f"Say {number}.", "base", temperature=0, max_new_tokens=20, api_name="/chat")

    threads = [threading.Thread(target=conversation, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(4):
        asked = [{"role": "user", "content": f"Say {number}."}]
        assert found[number] == app_state.host.answer("base", asked, Sampling(max_new_tokens=20), client="x").text


def test_every_response_has_the_policy_and_the_page_names_no_other_host(address):
    with urllib.request.urlopen(address) as response:
        policy = response.headers["content-security-policy"]
        page = response.read().decode()
    assert "default-src 'self'" in policy
    assert "fonts.googleapis" not in page
    assert '"analytics_enabled":false' in page.replace(" ", "")


@pytest.mark.parametrize(("name", "status"), [("evil.example:7860", 403), ("localhost:7860", 200), ("[::1]", 200)])
def test_a_name_of_another_site_that_leads_here_is_refused(address, name, status):
    request = urllib.request.Request(f"{address}config", headers={"Host": name})
    try:
        with urllib.request.urlopen(request) as response:
            found = response.status
    except urllib.error.HTTPError as refused:
        found = refused.code
    assert found == status


def test_only_the_demos_own_adapters_are_handed_out(client, tiny_adapter):
    for name in (str(tiny_adapter), "../adapters/first", "first/..", "."):
        for verb, more in (("/passport", ()), ("/pack", ()), ("/export_adapter", ("gguf-adapter",))):
            with pytest.raises(Exception, match="There is no adapter"):
                client.predict(name, *more, api_name=verb)
    with pytest.raises(Exception, match="No adapter is chosen"):
        client.predict("", api_name="/passport")


@pytest.mark.parametrize("path", ["/etc/passwd", "README.md", "collected/votes.jsonl"])
def test_files_of_this_machine_are_not_served(address, path, app_state):
    given = str(app_state.pairs.book.path) if path.startswith("collected") else path
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"{address.rstrip('/')}/gradio_api/file={given}")
    assert refused.value.code in (403, 404)


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example", "Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
    ],
)
@pytest.mark.parametrize("path", ["gradio_api/upload", "gradio_api/queue/join", "gradio_api/call/vote"])
def test_the_page_of_another_site_leaves_no_file_and_calls_nothing(address, app_state, path, headers):
    before = sorted(app_state.scratch.rglob("*"))
    body = b'--x\r\nContent-Disposition: form-data; name="files"; filename="theirs.jsonl"\r\n\r\nhello\r\n--x--\r\n'
    kind = {"Content-Type": "multipart/form-data; boundary=x"}
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(urllib.request.Request(address + path, body, {**kind, **headers}))
    assert refused.value.code == 403
    assert sorted(app_state.scratch.rglob("*")) == before
    own = {"Origin": address.rstrip("/"), "Sec-Fetch-Site": "same-origin"}
    if path.endswith("upload"):  # the page itself may
        with urllib.request.urlopen(urllib.request.Request(address + path, body, {**kind, **own})) as answer:
            (kept,) = json.loads(answer.read())
        assert kept.endswith("theirs.jsonl")


def test_a_port_that_is_taken_meanwhile_is_one_sentence(app_state):
    from lora_dpo.demo import app

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ConfigError, match="the port is taken"):
            app.launch(app_state, host="127.0.0.1", port=taken.getsockname()[1], auth=None, block=False)


def test_a_machine_too_busy_to_show_its_own_page_in_time_shows_it_all_the_same(app_state, monkeypatch):
    from gradio import networking

    from lora_dpo.demo import app

    monkeypatch.setattr(networking, "url_ok", lambda url: False)  # Gradio gives itself three seconds
    shown = app.launch(app_state, host="127.0.0.1", port=None, auth=None, block=False)
    with urllib.request.urlopen(f"{shown}config") as answer:
        assert answer.status == 200


def test_looks_at_data_and_answers_have_a_tokenizer_each(app_state):
    assert app_state.tokenizer is not app_state.host.base.tokenizer
    assert app_state.tokenizer.get_vocab() == app_state.host.base.tokenizer.get_vocab()


def test_trl_is_there_before_two_threads_can_import_it_at_once(app_state, tmp_path, monkeypatch):
    from lora_dpo.demo.session import AppState

    monkeypatch.delitem(sys.modules, "trl", raising=False)
    AppState(app_state.host, tmp_path / "collected", scratch=tmp_path / "scratch")
    assert "trl" in sys.modules


def test_an_export_ends_with_its_page_and_one_is_written_at_a_time(app_state):
    from lora_dpo.demo.downloads import exported

    first, second = exported(app_state, "first", "merge"), exported(app_state, "first", "gguf-adapter")
    done, total, target = next(first)
    assert done < total
    first.close()  # the page is gone
    until(lambda: not app_state.exporting.locked())
    assert not target.exists()
    assert [path.name for path in target.parent.glob(f".{target.name}*")] == []
    with app_state.exporting:  # another one is being written
        assert next(second)[0] == 0
        assert next(second)[0] == 0
    *_, (done, total, target) = second
    assert done == total
    assert target.is_file()


def test_with_a_password_nobody_comes_in_without_it(app_state):
    from lora_dpo.demo import app

    guarded = app.launch(app_state, host="127.0.0.1", port=free_port(), auth=("me", "secret"), block=False)
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"{guarded}config")
    assert refused.value.code == 401
    for login in (None, ("me", "wrong")):
        with pytest.raises(Exception, match=r"login|[Aa]uth|credentials|401"):
            gradio_client.Client(guarded, auth=login, verbose=False).predict(api_name="/models")
    inside = gradio_client.Client(guarded, auth=("me", "secret"), verbose=False)
    assert "base" in inside.predict(api_name="/models")


# --- many at once -------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.long
def test_twenty_clients_for_a_minute_each_get_their_own_answers(tiny_model_folder, tiny_adapter, tmp_path):
    from lora_dpo.serving.host import open_host

    shutil.copytree(tiny_adapter, tmp_path / "adapters/first")
    port = free_port()
    process, _ = start(tiny_model_folder, tmp_path, port)
    found, refused, failed, sizes = [], [], [], []
    began = time.monotonic()

    def conversation(number):
        mine = gradio_client.Client(f"http://127.0.0.1:{port}", verbose=False)
        turn = 0
        while time.monotonic() - began < 60:
            who, text = ("base", "first")[turn % 2], f"Client {number} says {turn % 5}."
            text = "x" * 9000 if turn % 7 == 6 else text
            try:
                answer = mine.predict(text, who, temperature=0, max_new_tokens=12, api_name="/chat")
                found.append((number, who, text, answer))
            except Exception as error:
                (refused if "The prompt has" in str(error) or "are waiting" in str(error) else failed).append(error)
            turn += 1

    try:
        threads = [threading.Thread(target=conversation, args=(number,)) for number in range(20)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            sizes.append((time.monotonic() - began, psutil.Process(process.pid).memory_info().rss))
            time.sleep(1)
        for thread in threads:
            thread.join()
    finally:
        process.kill()
        process.wait()
    assert failed == []
    assert {number for number, *_ in found} == set(range(20)), "a client was never answered"
    assert refused
    with open_host(str(tiny_model_folder), tmp_path / "adapters", quantize="none") as host:
        own = {
            (who, text): host.answer(who, ask(text), Sampling(max_new_tokens=12), client="x").text
            for who, text in sorted({(who, text) for _, who, text, _ in found})
        }
    assert len(set(own.values())) > 20
    assert [row for row in found if row[3] != own[row[1], row[2]]] == []
    settled = max(size for when, size in sizes if when < 25)
    grown = [round(size / 1e6) for _, size in sizes[::5]]
    print(f"{len(found)} answers, {len(refused)} refused; memory every five seconds, in MB: {grown}")
    assert sizes[-1][1] - settled < 30e6


# --- kills ----------------------------------------------------------------------------------------


def start(tiny_model_folder, folder, port):
    arguments = ["--model", str(tiny_model_folder), "--quantize", "none", "--port", str(port)]
    arguments += ["--adapters-dir", str(folder / "adapters"), "--data-dir", str(folder / "collected")]
    process = subprocess.Popen(
        [sys.executable, "-m", "lora_dpo", "demo", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        # Tests that run in the background of a shell hand down that Ctrl-C is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        try:
            return process, gradio_client.Client(f"http://127.0.0.1:{port}", verbose=False)
        except Exception:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.3)
    raise AssertionError("the demo did not start")


@pytest.mark.slow
@pytest.mark.posix
def test_a_kill_while_people_vote_and_train_loses_no_vote_and_leaves_no_adapter(
    tiny_model_folder, tiny_adapter, tmp_path
):
    shutil.copytree(tiny_adapter, tmp_path / "adapters/first")
    process, client = start(tiny_model_folder, tmp_path, free_port())
    acknowledged, ended = [], []

    def people():
        for number in range(1000):
            match = client.predict(f"Say {number}.", ["base", "first"], max_new_tokens=4, api_name="/match")
            try:
                client.predict(match["id"], "b", api_name="/vote")
            except gradio_client.exceptions.AppError as error:
                if "makes no pair" in str(error):  # four tokens of a tiny model can be the same twice
                    continue
                raise
            acknowledged.append(match["id"])

    def quietly():
        try:
            people()
        except Exception as error:  # the server was killed: that is the point
            ended.append(error)

    voters = threading.Thread(target=quietly)
    voters.start()
    while len(acknowledged) < 4:
        assert not ended, ended  # too early: it would be waited for without end
        time.sleep(0.05)
    settings = "trainer: {max_steps: 500}"
    client.predict(["votes"], "second", "quick", settings, ["Say it."], api_name="/train")
    while client.predict(api_name="/training")["step"] < 2:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    voters.join(30)
    pairs, _ = read_pairs(str(tmp_path / "collected/votes.jsonl"))
    on_disk = {pair.provenance["id"] for pair in pairs}
    assert set(acknowledged) <= on_disk
    assert len(on_disk) <= len(acknowledged) + 1
    from lora_dpo.adapters.store import list_adapters

    assert [row.name for row in list_adapters(tmp_path / "adapters")] == ["first"]


@pytest.mark.slow
def test_it_starts_beside_what_a_kill_left_and_ctrl_c_ends_it_without_a_traceback(
    tiny_model_folder, tiny_adapter, tmp_path
):
    shutil.copytree(tiny_adapter, tmp_path / "adapters/first")
    (tmp_path / "adapters/second.partial").mkdir()
    votes = tmp_path / "collected/votes.jsonl"
    votes.parent.mkdir()
    row = {"prompt": "Q", "chosen": "Yes.", "rejected": "No."}
    votes.write_text(json.dumps(row) + "\n" + json.dumps(row)[:-9])
    process, client = start(tiny_model_folder, tmp_path, free_port())
    assert client.predict(api_name="/models") == ["base", "first"]
    match = client.predict("Say it.", ["base", "first"], max_new_tokens=12, api_name="/match")
    client.predict(match["id"], "b", api_name="/vote")
    assert len(client.predict("votes", api_name="/pairs")) == 2
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert "Traceback" not in said, said
    assert process.returncode in (0, 130)


# --- what a page sees of a run --------------------------------------------------------------------


def test_a_run_that_ends_while_it_is_drawn_is_drawn_again(app_state, monkeypatch):
    from types import SimpleNamespace

    import gradio

    from lora_dpo.demo import tab_train
    from lora_dpo.demo.run_state import RunSnapshot

    job = SimpleNamespace(state="stopping", name="new", error="", running=True, ended=None)
    watch = SimpleNamespace(seen=RunSnapshot("new"))
    with gradio.Blocks(), gradio.Tab() as item:
        parts = tab_train.build(app_state, item)
    tab = tab_train.Tab(app_state, parts)
    monkeypatch.setattr(app_state, "training", SimpleNamespace(began=0.0, job=job, beta=0.1, watch=watch, planned=None))

    def ends_meanwhile(view):
        job.state, job.running = "done", False
        return ""

    with monkeypatch.context() as once:
        once.setattr(tab_train, "outcome_view", ends_meanwhile)
        seen = tab.follow(None)
    assert "stopping" in seen[parts.state]
    seen = tab.follow(seen[parts.seen])
    assert "Done" in seen[parts.state]
    assert "__type__" in tab.follow(seen[parts.seen])[parts.state]  # nothing new: gradio leaves the page as it is


def test_while_a_run_goes_on_its_time_is_told_at_every_look(app_state, monkeypatch):
    from types import SimpleNamespace

    import gradio

    from lora_dpo.demo import tab_train
    from lora_dpo.demo.run_state import RunSnapshot

    job = SimpleNamespace(state="running", name="new", error="", running=True, ended=None)
    now = SimpleNamespace(began=0.0, job=job, beta=0.1, watch=SimpleNamespace(seen=RunSnapshot("new")), planned=None)
    with gradio.Blocks(), gradio.Tab() as item:
        parts = tab_train.build(app_state, item)
    monkeypatch.setattr(app_state, "training", now)
    tab = tab_train.Tab(app_state, parts)
    first = tab.follow(None)
    monkeypatch.setattr(time, "monotonic", lambda: 125.0)
    assert "2:05 so far" in tab.follow(first[parts.seen])[parts.state]
    assert set(tab.follow(first[parts.seen])) == {parts.state}  # and nothing else is sent
