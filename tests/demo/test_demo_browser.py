"""The demo in a real headless Chromium: the whole loop, and scripts that must never run.

Needs the system's `chromium` (Debian: `apt-get install chromium`) and the Python package playwright; no browser is
downloaded.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import socket
import time
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("gradio", reason="the demo's tests need Gradio: pip install 'lora-dpo[demo]'")
pytest.importorskip("playwright", reason="the browser tests need the package playwright")
from browsing import CHROMIUM, TABS, Visitor, chromium, playwright_timeout
from taught import write_pairs

from lora_dpo.demo.starters import STARTERS
from lora_dpo.model.decoding import Sampling

if CHROMIUM is None:
    pytest.skip("the browser tests need chromium: apt-get install chromium", allow_module_level=True)

pytestmark = pytest.mark.slow

UPLOAD_PROMPTS = "[data-testid='Import prompts-upload-button']"
UPLOAD_PAIRS = "[data-testid='Upload pairs-upload-button']"
PROMPTS = [f"Say {number} words." for number in range(1, 11)]


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


def serve(model, place, quantize="none"):
    """A demo in this process: its desk and its address."""
    from lora_dpo.demo import app
    from lora_dpo.demo.session import AppState
    from lora_dpo.serving.host import open_host

    host = open_host(str(model), place / "adapters", quantize=quantize)
    app_state = AppState(host, place / "collected", scratch=place / "scratch")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return app_state, app.launch(app_state, host="127.0.0.1", port=port, auth=None, block=False)


@pytest.fixture
def roomy(tiny_model_folder, tmp_path):
    """The tiny model with a context in which talks of bytes have room."""
    folder = shutil.copytree(tiny_model_folder, tmp_path / "roomy")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 8192}))
    return folder


@pytest.fixture
def served(roomy, tiny_adapter, tmp_path, loads):
    import gradio

    shutil.copytree(tiny_adapter, tmp_path / "adapters/first")
    app_state, address = serve(roomy, tmp_path)
    app_state.arena.draws = random.Random(7)  # a random model's answer may be empty: not so with these seeds
    yield app_state, address
    gradio.close_all()
    app_state.host.close()


def test_the_whole_loop(browser, served, loads, tmp_path):
    app_state, address = served
    me = Visitor(browser, address)
    page = me.page

    # the first screen: base and adapter side by side, and an example is one click
    assert [page.input_value(f"#chat-{side} input") for side in ("left", "right")] == ["base", "first"]
    assert "the base and an adapter" in page.get_attribute("#way [data-tab=Chat]", "title")
    assert "with no adapter on it" in page.get_attribute("#chat-who-0 .who", "title")
    page.click("#chat-example-1")
    me.answered()
    assert not page.locator("#chat-examples").is_visible()
    me.say("And more.")
    assert len(me.answers(0)) == len(me.answers(1)) == 2
    assert me.answers(0)[1] != me.answers(1)[1]
    me.wait_for("chat-line-1", "tokens")
    me.open("The same in a terminal")
    page.wait_for_function("document.querySelector('#chat-command textarea').value.includes('--compare')")

    # a reload keeps the conversation, and it goes on
    said = me.answers(0), me.answers(1)
    page.reload()
    page.wait_for_function("document.querySelectorAll('#chat-1 .bot').length === 2")
    assert (me.answers(0), me.answers(1)) == said
    me.say("Once more.")
    assert len(me.answers(1)) == 3
    page.click("#chat-new")
    page.wait_for_function("() => !document.querySelector('#chat-0 .bot')")
    page.reload()
    page.wait_for_selector("#chat-to-vote:visible")

    # the first vote is two clicks from here, and ten more are ten keys
    page.click("#chat-to-vote")
    page.wait_for_selector("#vote-a:not([disabled])")
    page.click("#vote-a")
    me.wait_for("vote-status", "Saved: 1 pair")
    for number in range(2, 12):
        page.wait_for_selector("#vote-a:not([disabled])")
        assert STARTERS[number - 1] in me.text("vote-asked")
        page.keyboard.press("1" if number % 2 else "ArrowRight")
        me.wait_for("vote-status", f"Saved: {number} pairs")

    # a prompt that is written meanwhile waits for the vote, and the keys are the verdict's again
    page.wait_for_selector("#vote-a:not([disabled])")
    page.fill("#vote-box textarea", "Say it.")
    page.press("#vote-box textarea", "Enter")
    me.wait_for("vote-status", "Your prompt is next. Vote on these two first")
    assert STARTERS[11] in me.text("vote-asked")
    page.wait_for_function("document.activeElement.tagName !== 'TEXTAREA'")
    page.keyboard.press("2")
    me.wait_for("vote-asked", "Say it.")
    page.wait_for_selector("#vote-a:not([disabled])")
    page.keyboard.press("2")
    me.wait_for("vote-status", "Saved: 13 pairs")
    assert app_state.pairs.book.count() == (13, 0)
    assert "first against base" in me.text("vote-wins")

    # the pairs, one of them mended; a refused upload is one line, and they stay
    me.tab("Data")
    me.wait_for("data-doctor", "13 pairs read")
    page.set_input_files(UPLOAD_PAIRS, {"name": "pairs.exe", "mimeType": "text/plain", "buffer": b"no pairs"})
    me.wait_for("data-refused", "pairs.exe is no file of a known kind")
    assert page.locator("#data-refused .bad").count() == 1
    assert str(tmp_path) not in me.text("data-refused")
    page.locator("#data-table [role=gridcell]", has_text=STARTERS[2]).first.click()
    page.wait_for_selector("#data-editor:visible")
    page.fill("#data-chosen textarea", "Three words here.")
    page.click("#data-save")
    page.wait_for_selector("#data-editor", state="hidden")
    assert app_state.pairs.entries("votes", "Three words here")[0].texts[0] == STARTERS[2]

    # from the votes to an adapter in two clicks; what to expect is said before
    me.tab("Train")
    me.wait_for("train-expected", "It fits")
    assert "10 pairs to learn from. Below 20 the difference is small." in me.text("train-expected")
    assert "3 held-out pairs" in me.text("train-expected")
    page.click("#train-start")
    me.wait_for("train-state", "so far")
    assert page.locator("#train-state .phases .now").count() == 1
    me.wait_for("train-state", "mine can be chosen in every tab", 300)
    assert "The plan" in me.text("train-planned")
    assert page.locator("#train-curves svg").count() == 4
    me.open("The same in a terminal")
    page.wait_for_function("document.querySelector('#train-commands textarea').value.includes('loss_type')")

    # beside the base
    page.click("#train-compare")
    page.wait_for_function("document.querySelector('#chat-right input').value === 'mine'")
    me.say("Say it.")
    assert len(me.answers(0)) == len(me.answers(1)) == 1

    # its report; verified; under another name; packed and downloaded
    me.tab("Adapters")
    me.choose("adapters-name", "mine")
    me.wait_for("adapters-passport", "rank 4")
    assert "held-out accuracy" in me.text("adapters-passport")
    page.click("#adapters-report")
    report = page.frame_locator("#adapters-page iframe")
    report.get_by_text("Run mine").first.wait_for()
    page.click("#adapters-verify")
    me.wait_for("adapters-status", "Verified. It scores its")
    me.open("Rename or remove")
    page.fill("#adapters-new-name textarea, #adapters-new-name input", "brief")
    page.click("#adapters-rename")
    me.wait_for("adapters-status", "mine is called brief now")
    me.wait_for("adapters-table", "verified")
    page.click("#adapters-pack")
    page.wait_for_selector("#adapters-file a[download], #adapters-file a")
    with page.expect_download() as coming:
        page.locator("#adapters-file a").first.click()
    coming.value.save_as(tmp_path / "brief.lora.zip")
    assert "brief/adapter_model.safetensors" in zipfile.ZipFile(tmp_path / "brief.lora.zip").namelist()
    page.click("#adapters-remove")
    page.click("#adapters-yes")
    me.wait_for("adapters-status", "Removed brief")
    assert app_state.adapters() == ["first"]

    assert me.errors == []
    assert me.elsewhere == []
    assert len(loads) == 1


def test_stop_retry_edit_and_a_second_visitor(browser, served):
    app_state, address = served
    me, other = Visitor(browser, address), Visitor(browser, address)
    me.say("Say it.")
    before = me.answers(0)[0]
    me.page.locator("#chat-0").hover()
    me.page.locator("#chat-0 button[aria-label*=etry], #chat-0 button[title*=etry]").first.click()
    me.page.wait_for_timeout(300)
    me.page.get_by_role("button", name="Send", exact=True).wait_for()
    me.page.wait_for_timeout(200)
    assert len(me.answers(0)) == 1
    assert me.answers(0)[0] != before
    assert other.answers(0) == []  # conversations are each one's own
    other.say("Hello.")
    assert len(me.answers(0)) == 1
    me.tab("Vote")
    me.page.keyboard.press("1")  # nothing to vote on: nothing happens
    me.page.wait_for_timeout(300)
    assert app_state.pairs.book.count() == (0, 0)
    assert me.errors == other.errors == []


def slowly(*args, **kwargs):
    """An answer that takes a minute."""
    from lora_dpo.model.decoding import Answer

    for _ in range(1200):
        time.sleep(0.05)
        yield "word "
    return Answer("word " * 1200, 1200, True)


def test_a_new_chat_stays_new_while_an_answer_is_being_written(browser, served, monkeypatch):
    from lora_dpo.serving import host

    _, address = served
    real = host.stream_from
    me = Visitor(browser, address)
    monkeypatch.setattr(host, "stream_from", slowly)
    me.page.fill("#chat-box textarea", "Say it.")
    me.page.press("#chat-box textarea", "Enter")
    me.wait_for("chat-0", "word")
    me.page.click("#chat-new")
    me.page.get_by_role("button", name="Send", exact=True).wait_for()
    me.page.wait_for_timeout(1000)
    assert me.answers(0) == []
    monkeypatch.setattr(host, "stream_from", real)
    me.say("Hello.")
    assert len(me.answers(0)) == 1
    assert me.errors == []


def test_the_stop_button_keeps_what_was_said_so_far(browser, served, monkeypatch):
    from lora_dpo.serving import host

    _, address = served
    me = Visitor(browser, address)
    monkeypatch.setattr(host, "stream_from", slowly)
    me.page.fill("#chat-box textarea", "Say it.")
    me.page.press("#chat-box textarea", "Enter")
    me.wait_for("chat-0", "word")
    me.page.get_by_role("button", name="Stop", exact=True).click()
    me.page.get_by_role("button", name="Send", exact=True).wait_for(timeout=20_000)  # it would go on for a minute
    assert me.answers(0)[0].startswith("word")
    assert me.errors == []


def test_a_refused_retry_keeps_the_talk(browser, served, monkeypatch):
    from lora_dpo.errors import Busy

    app_state, address = served
    me = Visitor(browser, address)
    me.say("Say it.")
    before = me.answers(0)

    def busy(*args, **kwargs):
        raise Busy("32 requests are waiting already.")

    monkeypatch.setattr(app_state.host, "submit", busy)
    me.page.locator("#chat-0").hover()
    me.page.locator("#chat-0 button[aria-label*=etry], #chat-0 button[title*=etry]").first.click()
    me.page.get_by_text("32 requests are waiting already").wait_for()
    me.page.wait_for_timeout(300)
    assert me.answers(0) == before


def test_a_prompt_that_is_refused_does_not_block_voting(browser, served, tmp_path):
    app_state, address = served
    me, other = Visitor(browser, address), Visitor(browser, address)
    other.tab("Vote")
    me.tab("Vote")
    (tmp_path / "prompts.txt").write_text("\n".join([PROMPTS[0], "x" * 9000, PROMPTS[1]]))
    me.page.set_input_files(UPLOAD_PROMPTS, tmp_path / "prompts.txt")
    me.page.wait_for_selector("#vote-a:not([disabled])")
    me.page.keyboard.press("1")
    me.wait_for("vote-status", "is left out: The prompt has")
    me.page.wait_for_selector("#vote-a:not([disabled])")
    assert PROMPTS[1] in me.text("vote-asked")
    me.page.keyboard.press("1")
    me.wait_for("vote-status", "Saved: 2 pairs")
    assert app_state.pairs.book.count() == (2, 0)
    other.wait_for("vote-wins", "first against base")  # who only looks on sees the table move, too


def test_closing_the_page_frees_the_turn(browser, served, monkeypatch):
    from lora_dpo.serving import host

    app_state, address = served
    real = host.stream_from
    me = Visitor(browser, address)
    monkeypatch.setattr(host, "stream_from", slowly)
    me.page.fill("#chat-box textarea", "Say it.")
    me.page.keyboard.press("Enter")
    me.wait_for("chat-0", "word")
    monkeypatch.setattr(host, "stream_from", real)
    me.context.close()
    began = time.monotonic()
    app_state.host.answer("base", [{"role": "user", "content": "Hi"}], Sampling(max_new_tokens=4), client="next")
    assert time.monotonic() - began < 20  # the abandoned answer would go on for a minute


def test_the_columns_of_an_upload_are_picked_where_nobody_can_tell_them(browser, served, tmp_path):
    app_state, address = served
    me = Visitor(browser, address)
    page = me.page
    me.tab("Data")
    (tmp_path / "mine.csv").write_text("Topic;Text one;Text two\nSay it.;Yes.;No.\nAgain.;Yes!;No!\n")
    page.set_input_files(UPLOAD_PAIRS, tmp_path / "mine.csv")
    me.wait_for("data-columns-said", "mine.csv: no column says that it is prompt or chosen or rejected.")
    assert "--columns" not in me.text("data-columns-said")
    assert str(tmp_path) not in me.text("data-columns-said")
    for role, column in (("prompt", "Topic"), ("chosen", "Text two"), ("rejected", "Text one")):
        me.choose(f"data-column-{role}", column)
        assert page.input_value(f"#data-column-{role} input") == column
    page.click("#data-columns-read")
    me.wait_for("data-doctor", "2 pairs read")
    assert "read 'Topic' as prompt, 'Text two' as chosen, 'Text one' as rejected" in me.text("data-doctor")
    assert not page.locator("#data-columns").is_visible()
    assert app_state.pairs.entries("mine")[0].texts == ("Say it.", "No.", "Yes.")


def test_suspicious_pairs_are_looked_through_on_a_phone_and_written_to_a_new_file(
    browser, served, write_pairs, tmp_path
):
    app_state, address = served
    app_state.pairs.take_in(write_pairs("six.jsonl", count=6), "six.jsonl")
    before = app_state.pairs.path_of("six").read_text()
    me = Visitor(browser, address, width=390)
    page = me.page
    me.tab("Data")
    me.wait_for("data-doctor", "6 pairs read")
    me.open("Pairs that disagree with the rest")
    page.click("#look-find")  # the adapter does not know them: they are scored
    me.wait_for("look-said", "each scored now. Pair 1 of")
    first = page.inner_text("#look-chosen")
    page.click("#look-swap")
    me.wait_for("look-said", "1 swapped")
    page.click("#look-undo")
    me.wait_for("look-said", "Pair 1 of")
    assert page.inner_text("#look-chosen") == first
    page.click("#look-drop")
    page.click("#look-write")
    me.wait_for("look-said", "Written to six-looked-through")
    page.wait_for_function("document.querySelector('#data-name input').value == 'six-looked-through'")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert len(app_state.pairs.entries("six-looked-through")) == 5
    assert app_state.pairs.path_of("six").read_text() == before
    assert me.errors == []


def test_pause_continue_and_both_ways_to_stop(browser, served, tmp_path):
    app_state, address = served
    me = Visitor(browser, address)
    page = me.page
    me.tab("Data")
    pairs = [{"prompt": prompt, "chosen": "One word.", "rejected": "Many more words."} for prompt in PROMPTS]
    (tmp_path / "few.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    page.set_input_files(UPLOAD_PAIRS, tmp_path / "few.jsonl")
    me.wait_for("data-doctor", "10 pairs read")
    me.tab("Train")
    me.open("Settings")
    page.locator("#train-pairs input").first.check()

    def start(name):
        page.fill("#train-name textarea, #train-name input", name)
        page.wait_for_function("document.querySelector('#train-recipe textarea').value.includes('max_steps')")
        text = page.input_value("#train-recipe textarea")
        # Long enough to be paused, and too gentle for the guard to end it first.
        for was, now in (("max_steps: 10", "max_steps: 6000"), ("learning_rate: 0.0001", "learning_rate: 1.0e-08")):
            assert text.count(f"{was}\n") + text.count(f"{now}\n") == 1  # what was written by hand stays
            text = text.replace(f"{was}\n", f"{now}\n")
        page.fill("#train-recipe textarea", text)
        page.wait_for_selector("#train-start:not([disabled])")
        page.click("#train-start")
        me.wait_for("train-state", "step ")

    def press(button, *then, reads=""):
        """Click until the page shows one of these words: on a busy machine a click can come while it is redrawn.

        Of a button that does two things in turn, only while it still reads as the one that is wanted.
        """
        for _ in range(9):
            with contextlib.suppress(playwright_timeout()):
                if page.locator(button).is_visible() and reads in page.inner_text(button, timeout=1000):
                    page.click(button, timeout=1000)
                page.wait_for_function(
                    "then => then.some(part => document.getElementById('train-state').innerText.includes(part))",
                    arg=list(then),
                    timeout=10_000,
                )
                return
        raise AssertionError(f"{button} was pressed, and the page shows {me.text('train-state')!r}")

    start("kept")
    press("#train-pause", "paused at", reads="Pause")
    page.wait_for_timeout(2000)  # the page looks every second and a half
    step = re.compile(r"paused at step \d+")
    paused = step.search(me.text("train-state"))[0]
    assert page.inner_text("#train-pause") == "Continue"
    page.wait_for_timeout(3000)
    assert step.search(me.text("train-state"))[0] == paused
    press("#train-pause", " so far · ", "stopping", reads="Continue")
    press("#train-keep", "stopping", "measuring", "saving", "kept can be chosen")
    me.wait_for("train-state", "kept can be chosen")
    assert "kept" in app_state.names()

    start("gone")
    press("#train-discard", "stopping", "Nothing was kept")
    me.wait_for("train-state", "Nothing was kept")
    assert "gone" not in app_state.names()
    assert not [path.name for path in (tmp_path / "adapters").iterdir() if "gone" in path.name]

    # a run that was cut off, as the end of the demo does, goes on from its last checkpoint
    assert not page.locator("#train-go-on").is_visible()
    start("cut")
    app_state.training.job.interrupt()
    page.wait_for_selector("#train-go-on:visible")
    page.click("#train-go-on")
    me.wait_for("train-state", "step ")
    page.wait_for_selector("#train-go-on", state="hidden")
    press("#train-keep", "stopping", "cut can be chosen")
    me.wait_for("train-state", "cut can be chosen")
    assert "cut" in app_state.names()
    assert me.errors == []


def test_the_best_settings_are_searched_at_one_click_and_proven(browser, served, tmp_path):
    app_state, address = served
    me = Visitor(browser, address)
    page = me.page
    me.tab("Data")
    page.set_input_files(UPLOAD_PAIRS, write_pairs(tmp_path / "brief.jsonl", range(10, 16)))
    me.wait_for("data-doctor", "60 pairs read")
    me.tab("Train")
    page.locator("#train-pairs input").first.check()
    me.open("Settings")
    page.wait_for_function("document.querySelector('#train-recipe textarea').value.includes('max_steps')")
    page.fill(
        "#train-recipe textarea",
        "evaluation: {max_new_tokens: 8}\n"
        "trainer: {max_steps: 16, warmup_steps: 0, learning_rate: 4.0e-4, loss_type: sigmoid, loss_weights: [1.0]}\n",
    )
    assert page.input_value("#train-minutes input") == "20"
    page.click("#train-find")
    me.wait_for("train-state", "of at most 20:00")
    assert page.locator("#train-start").is_disabled()
    assert page.locator("#train-find").is_disabled()
    me.wait_for("train-samples", "Candidates")
    page.click("#train-keep")
    me.wait_for("train-state", "Done after")
    phone = Visitor(browser, address, width=390)
    phone.tab("Train")
    for visitor in (me, phone):
        visitor.wait_for("train-state", "mine can be chosen in every tab")
        visitor.wait_for("train-state", "(95% interval")
        visitor.wait_for("train-samples", "On the reporting part")
        visitor.page.click("#train-samples summary")
        inside = visitor.page.frame_locator("#train-samples iframe.report")
        assert inside.locator("h2", has_text="Every candidate").is_visible()
        assert visitor.too_wide() == []
        assert visitor.errors == []
    assert page.locator("#train-find").is_enabled()
    page.click("#train-compare")
    page.wait_for_function("document.querySelector('#chat-right input').value === 'mine'")
    assert "mine" in app_state.names()


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)])
def test_nothing_is_cut_off(browser, served, width, dark):
    _, address = served
    me = Visitor(browser, address, width=width, dark=dark)
    me.say("Say it.")
    for name in TABS:
        me.tab(name)
        assert me.too_wide() == [], name
    assert "first" in me.text("adapters-table")
    hidden = "at => at.parentElement.scrollWidth - at.parentElement.clientWidth"
    assert me.page.locator("#adapters-table table").evaluate(hidden) <= 1  # else it scrolls
    assert me.errors == []


# --- pictures -------------------------------------------------------------------------------------

ROOT = Path(__file__).resolve().parents[2]
PICTURES = os.environ.get("LORA_DPO_PICTURES")
"""A folder: the pictures of the docs are made there. Otherwise they are looked at and let go."""


class Album:
    """Pictures of the page, each in few colours: a third of the bytes, and nobody sees it."""

    def __init__(self, me, folder):
        self.me, self.folder = me, folder
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, name):
        from PIL import Image

        path = self.folder / f"{name}.png"
        assert self.me.too_wide() == [], name
        self.me.picture(path)
        few = Image.open(path).convert("RGB").quantize(160, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
        few.save(path, optimize=True)

    def of_every_tab(self, kind):
        for name in TABS:
            self.me.tab(name)
            self.me.page.evaluate("window.scrollTo(0, 0)")
            self.me.page.wait_for_timeout(700)
            self.add(f"{kind}-{name.lower()}")


@pytest.mark.long
@pytest.mark.skipif(not (ROOT / "models/smollm2-135m/config.json").is_file(), reason="the real model is not here")
def test_pictures_of_every_tab_with_the_real_model(browser, tmp_path, monkeypatch, loads):
    """Everything fits at 1280x800 and on a phone, light and dark; the pictures of docs/demo.md are made by this."""
    import gradio

    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").symlink_to(ROOT / "models")
    shutil.copytree(ROOT / "adapters/quickstart", "adapters/quickstart")
    app_state, address = serve("smollm2-135m", Path(), "nf4")
    me = Visitor(browser, address)
    page = me.page
    album = Album(me, ROOT / PICTURES if PICTURES else tmp_path / "pictures")
    try:
        page.wait_for_timeout(500)
        album.add("first-screen")
        use_it(me, tmp_path, album, *((6, 4, 267) if PICTURES else (1, 1, 24)))
        for kind, width, height, scheme in (
            ("demo", 1280, 800, "light"), ("dark", 1280, 800, "dark"),
            ("phone-dark", 390, 844, "dark"), ("phone-light", 390, 844, "light"),
        ):  # fmt: skip
            page.set_viewport_size({"width": width, "height": height})
            page.emulate_media(color_scheme=scheme)
            album.of_every_tab(kind)
        assert me.errors == []
        assert len(loads) == 1
    finally:
        gradio.close_all()
        app_state.close()


def use_it(me, tmp_path, album, steps, votes, pairs):
    """An example side by side, some votes, an upload, a short run: so that every tab shows something."""
    page = me.page
    page.click("#chat-example-1")
    me.answered()
    page.wait_for_timeout(500)
    me.tab("Vote")
    me.open("Settings")
    page.locator("#vote-longest input[type=number]").fill("64")
    me.open("Settings")
    page.click("#vote-ours")
    for number in range(votes):
        page.wait_for_selector("#vote-a:not([disabled])", timeout=90_000)
        # Whoever votes here prefers the shorter answer.
        a, b = (len(me.text(f"answer-{side}")) for side in "ab")
        page.keyboard.press("1" if a < b else "2")
        me.wait_for("vote-status", f"Saved: {number + 1} pair")
    page.wait_for_selector("#vote-a:not([disabled])", timeout=90_000)
    me.tab("Data")
    lines = (ROOT / "data/quickstart.jsonl").read_text("utf-8").splitlines(keepends=True)
    (tmp_path / "quickstart.jsonl").write_text("".join(lines[:pairs]), "utf-8")
    page.set_input_files(UPLOAD_PAIRS, tmp_path / "quickstart.jsonl")
    me.wait_for("data-doctor", f"{pairs} pairs read")
    page.wait_for_timeout(2500)
    me.tab("Train")
    for box, on in (("votes", False), ("quickstart", True)):
        page.locator("#train-pairs label", has_text=box).locator("input").set_checked(on)
    page.fill("#train-prompts textarea", STARTERS[0])
    me.wait_for("train-expected", "held-out pair" if pairs == 24 else "39 held-out pairs")
    me.wait_for("train-expected", "It fits", 90)
    me.open("Settings")
    small = "trainer:\n  max_steps: %d\n  per_device_train_batch_size: 2\nevaluation:\n  answers: 2\n  show: 2\n"
    page.fill("#train-recipe textarea", small % steps + "  max_new_tokens: 32\n")
    page.click("#train-plan")
    me.wait_for("train-planned", f"{steps} of 2 pairs", 90)
    me.open("Settings")
    page.click("#train-start")
    if steps > 1:  # else it may be over between two looks
        me.wait_for("train-state", f"step {steps // 2} of {steps}", 240)
        album.add("demo-training")
    me.wait_for("train-state", "mine can be chosen in every tab", 240)


def test_settings_that_are_typed_while_others_come_stay(browser, served, tmp_path, monkeypatch):
    from lora_dpo.demo import tab_train

    app_state, address = served
    rows = [{"prompt": f"Say {n}.", "chosen": f"{n}.", "rejected": "No, never."} for n in range(30)]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    app_state.pairs.take_in(tmp_path / "mine.jsonl", "mine.jsonl")
    real = tab_train.draft

    def slow(*asked, **how):
        time.sleep(0.8)
        return real(*asked, **how)

    monkeypatch.setattr(tab_train, "draft", slow)
    me = Visitor(browser, address)
    page, box = me.page, "#train-recipe textarea"
    me.tab("Train")
    me.open("Settings")

    read = "document.querySelector('#train-recipe textarea').value"

    def choose(preset):
        page.locator(f"#train-preset input[value={preset}]").check()

    def wait_for_steps(text):
        page.wait_for_function(f"{read}.includes('max_steps: {text}\\n')")

    page.locator("#train-pairs label", has_text="mine").locator("input").set_checked(True)
    choose("quick")
    choose("balanced")  # the second of two quick choices is the one that is put in
    me.wait_for("train-expected", "It fits")
    page.wait_for_function(f"{read}.includes('max_steps: ') && !{read}.includes('max_steps: 12\\n')")
    balanced = page.input_value(box)
    choose("quick")
    wait_for_steps("12")
    assert page.input_value(box) != balanced
    choose("balanced")
    page.wait_for_timeout(200)
    page.fill(box, "trainer:\n  max_steps: 4\n")
    page.wait_for_timeout(4000)
    assert page.input_value(box) == "trainer:\n  max_steps: 4\n"
    choose("quick")  # and nothing is typed after it
    wait_for_steps("12")
    assert me.errors == []


# --- scripts --------------------------------------------------------------------------------------

PWN = "window.pwned=(window.pwned||0)+1"
EVIL = (
    f"<script>{PWN}</script><img src=x onerror='{PWN}'><svg onload='{PWN}'></svg>"
    f'[link](javascript:{PWN}) <a href="javascript:{PWN}">a</a> '
    f'<iframe srcdoc="<script>parent.{PWN}</script>"></iframe>'
    "${" + PWN + "} {{" + PWN + "}} <details open ontoggle='" + PWN + "'>d</details> <math><mtext></form><form>"
    f"<mglyph><style></math><img src onerror='{PWN}'>"
)
EVIL_NAME = f"<img src=x onerror='{PWN}'>"


@pytest.fixture
def hostile(roomy, tiny_adapter, tmp_path, monkeypatch):
    """A demo where every text that can come from outside holds scripts, the model's answers among them."""
    import gradio

    from lora_dpo.model.decoding import Answer
    from lora_dpo.serving import host

    def answers(*args, **kwargs):
        yield EVIL
        return Answer(EVIL, 5, True)

    monkeypatch.setattr(host, "stream_from", answers)
    folder = tmp_path / "adapters" / EVIL_NAME
    shutil.copytree(tiny_adapter, folder)
    (folder / "README.md").write_text(f"# {EVIL}\n\n{EVIL}\n\n![p](http://192.0.2.1/p.png)\n")
    passport = json.loads((folder / "passport.json").read_text())
    passport |= {"reference": EVIL, "created": EVIL, "versions": {"lora-dpo": EVIL}}
    passport["metrics"] = {"after": {"pairs": {EVIL: EVIL}}}
    (folder / "passport.json").write_text(json.dumps(passport))
    app_state, address = serve(roomy, tmp_path)
    yield app_state, address
    gradio.close_all()
    app_state.host.close()


def test_no_script_in_any_text_runs(browser, hostile, tmp_path):
    app_state, address = hostile
    me = Visitor(browser, address)
    page = me.page
    assert EVIL_NAME in app_state.names()

    me.open("Settings")
    page.fill("#chat-system textarea", EVIL)
    me.choose("chat-left", EVIL_NAME)
    me.choose("chat-right", "base")
    me.say(EVIL)
    assert "<script>" in me.answers(0)[0]  # it is shown, as text

    me.tab("Vote")
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": EVIL}) + "\n" + json.dumps({"prompt": "x"}) + "\n")
    page.set_input_files(UPLOAD_PROMPTS, tmp_path / "prompts.jsonl")
    page.wait_for_selector("#vote-a:not([disabled])")
    page.keyboard.press("3")  # both answers are the same: no pair
    me.wait_for("vote-status", "Saved")

    me.tab("Data")
    named = tmp_path / f"{EVIL_NAME.replace('/', '')}.jsonl"
    rows = [
        {"prompt": EVIL, "chosen": EVIL, "rejected": "no", "origin": {EVIL: EVIL}},
        {"prompt": EVIL, "chosen": EVIL, "rejected": EVIL},
        {"prompt": EVIL, "chosen": "yes <|im_end|>" + EVIL, "rejected": "no"},
    ]
    # one that is short enough to train on
    rows.append({"prompt": EVIL_NAME, "chosen": f"yes {EVIL_NAME}", "rejected": "no"})
    named.write_text("".join(json.dumps(row) + "\n" for row in rows) + EVIL)
    page.set_input_files(UPLOAD_PAIRS, named)
    me.wait_for("data-doctor", "chosen equals rejected")
    for summary in page.locator("#data-doctor summary").all():
        summary.click()
    page.locator("#data-table [role=gridcell]", has_text="<script>").first.click()
    page.wait_for_selector("#data-editor:visible")
    page.fill("#data-search textarea, #data-search input", EVIL)
    page.keyboard.press("Enter")

    me.tab("Train")
    page.fill("#train-name textarea, #train-name input", EVIL)
    page.click("#train-plan")
    page.wait_for_timeout(1500)  # the refusal, which quotes the name
    page.fill("#train-name textarea, #train-name input", "fine")
    page.fill("#train-prompts textarea", EVIL)
    page.locator("#train-pairs input").first.check()
    page.click("#train-start")
    me.wait_for("train-state", "Done", 120)

    me.tab("Adapters")
    me.choose("adapters-name", EVIL_NAME)
    me.wait_for("adapters-passport", "reference")
    me.open("Model card")
    me.open("Curves")
    page.click("#adapters-pack")  # refused: that is no name for a package
    me.choose("adapters-name", "fine")
    page.click("#adapters-report")
    page.frame_locator("#adapters-page iframe").get_by_text("Run fine").first.wait_for()
    assert page.get_attribute("#adapters-page iframe", "sandbox") == ""
    me.tab("Chat")
    page.reload()  # what the browser kept comes back
    page.wait_for_function("document.querySelector('#chat-1 .bot')")
    for name in TABS:
        me.tab(name)
        page.wait_for_timeout(400)
    assert page.evaluate("window.pwned") is None
    assert [error for error in me.errors if "dialog" in error] == []
    assert me.elsewhere == []
    assert page.locator("iframe").count() == 0  # but for the report, before the reload
