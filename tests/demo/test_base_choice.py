"""Another base in place of the one in memory: never two at once, nobody cut off, and back again if it fails."""

from __future__ import annotations

import shutil
import threading
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file, save_file

from lora_dpo.demo import base_choice, session
from lora_dpo.demo.base_choice import Fit, bases, fit
from lora_dpo.demo.session import AppState
from lora_dpo.errors import Busy, ModelError
from lora_dpo.model.decoding import Sampling
from lora_dpo.serving.host import Host, open_host

SHORT = Sampling(max_new_tokens=8)
HI = [{"role": "user", "content": "Hi."}]
ONE, TWO = "models/one", "models/two"


@pytest.fixture
def app_state(tiny_model_folder, make_adapter, tmp_path, monkeypatch):
    """A demo on `models/one` with an adapter of it, beside `models/two`, a wider model."""
    monkeypatch.chdir(tmp_path)
    for name in (ONE, TWO):
        shutil.copytree(tiny_model_folder, name)
    weights = Path(TWO) / "model.safetensors"
    save_file({name: tensor * 1.5 for name, tensor in load_file(weights).items()}, weights, metadata={"format": "pt"})
    make_adapter(Path("adapters/first"), model=Path(ONE))
    found = AppState(open_host(ONE, "adapters", quantize="none"), tmp_path / "collected", scratch=tmp_path / "scratch")
    yield found
    found.close()


def answer(app_state, who="base"):
    return app_state.host.answer(who, HI, SHORT, client="x").text


def test_the_bases_are_the_present_one_packaged_ones_and_folders_of_models(app_state):
    assert bases(ONE) == [ONE, "smollm2-135m", TWO]
    Path("models/two").rename("models/smollm2-135m")  # a packaged one that is here is there once, by its name
    (Path("models") / ".hidden").mkdir()
    assert bases(str(Path(ONE).resolve())) == [str(Path(ONE).resolve()), "smollm2-135m"]


def test_the_old_base_has_left_memory_before_the_new_one_is_loaded(app_state, monkeypatch, loads):
    before, old = answer(app_state), weakref.ref(app_state.host.base.model)
    assert answer(app_state, "first") != before
    real, gone = session.open_host, []

    def opened(*args, **settings):
        gone.append(old() is None)
        return real(*args, **settings)

    monkeypatch.setattr(session, "open_host", opened)
    app_state.change_base(TWO)
    assert gone == [True]
    assert loads == [TWO]
    assert app_state.host.base.name == TWO
    assert answer(app_state) != before
    assert app_state.arena.host is app_state.host
    assert app_state.coming is None
    # The adapter of the other base is told of as ever, and comes back with it.
    assert app_state.names() == ["base"]
    assert "first" in (app_state.host.incompatibility("first") or "")
    app_state.change_base(ONE)
    assert answer(app_state) == before
    assert app_state.names() == ["base", "first"]


def test_answers_that_are_being_written_end_first_and_newcomers_are_told(app_state, monkeypatch):
    expected = answer(app_state)
    reached, gate, drained = threading.Event(), threading.Event(), threading.Event()
    stream, drain = Host.stream_from, Host.drain

    def waits(host, *asked, **settings):
        reached.set()
        assert gate.wait(20)
        return stream(host, *asked, **settings)

    def tells(host, reason):
        threading.Timer(0.1, drained.set).start()
        drain(host, reason)

    monkeypatch.setattr(Host, "stream_from", waits)
    monkeypatch.setattr(Host, "drain", tells)
    streams = [app_state.host.stream("base", HI, SHORT, client=name) for name in ("a", "b")]
    assert reached.wait(20)
    changed = threading.Thread(target=app_state.change_base, args=(TWO,))
    changed.start()
    assert drained.wait(20)
    with pytest.raises(Busy, match="The base is being changed to models/two"):
        answer(app_state)
    with pytest.raises(Busy, match="A base is being loaded already"):
        app_state.change_base(TWO)
    gate.set()
    assert ["".join(pieces) for pieces in streams] == [expected, expected]
    streams.clear()
    changed.join(60)
    assert app_state.host.base.name == TWO


def test_a_training_refuses_it(app_state, monkeypatch):
    monkeypatch.setattr(app_state.host, "job", SimpleNamespace(running=True, name="mine"))
    with pytest.raises(Busy, match="The training of mine goes on"):
        app_state.change_base(TWO)
    monkeypatch.undo()
    assert answer(app_state)  # and nothing has changed


def test_a_base_that_cannot_be_loaded_leaves_the_one_before(app_state):
    before = answer(app_state)
    (Path(TWO) / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(ModelError, match="models/two could not be loaded"):
        app_state.change_base(TWO)
    assert answer(app_state) == before
    assert answer(app_state, "first") != before


def test_a_half_loaded_base_has_left_memory_before_the_one_before_is_loaded_again(app_state, monkeypatch):
    real, half, gone = session.open_host, [], []

    def opened(model, *args, **settings):
        host = real(model, *args, **settings)
        if model != TWO:
            return host
        half.append(weakref.ref(host.base.model))
        host.close()
        raise MemoryError("no room is left")

    def again(model, *args, **settings):
        gone.extend(one() is None for one in half)
        return opened(model, *args, **settings)

    monkeypatch.setattr(session, "open_host", again)
    with pytest.raises(ModelError, match="models/two could not be loaded: no room is left"):
        app_state.change_base(TWO)
    assert gone == [True]
    assert answer(app_state)


def test_what_is_no_base_of_the_list_is_refused(app_state, tiny_model_folder):
    for name in ("/etc", str(tiny_model_folder), "someone/model", ""):
        with pytest.raises(ModelError, match="There is no base"):
            app_state.change_base(name)
    with pytest.raises(ModelError, match="in memory already"):
        app_state.change_base(ONE)


def test_a_base_that_does_not_fit_is_refused_before_the_present_one_leaves(app_state, monkeypatch):
    model = app_state.host.base.model
    held = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    found = fit(TWO, app_state.host.base)
    assert found.needed == held  # the same architecture, held the same way
    monkeypatch.setattr(base_choice, "free_bytes", lambda device: -1)
    with pytest.raises(ModelError, match=r"models/two is not loaded\. It does not fit: 0 MB of weights"):
        app_state.change_base(TWO)
    assert app_state.host.base.model is model


def test_a_base_that_is_still_in_use_stays_the_only_one(app_state, monkeypatch, loads):
    before, model = answer(app_state), app_state.host.base.model
    monkeypatch.setattr(base_choice, "PATIENCE", 0.2)
    with pytest.raises(Busy, match="still in use, so no other one was loaded"):
        app_state.change_base(TWO)
    assert app_state.host.base.model is model
    assert answer(app_state) == before
    assert loads == []


def test_while_a_base_is_loaded_whoever_asks_is_told_to_come_again(app_state, monkeypatch):
    real, said = session.open_host, []

    def opened(*args, **settings):
        with pytest.raises(Busy) as error:
            app_state.names()
        said.append(str(error.value))
        return real(*args, **settings)

    monkeypatch.setattr(session, "open_host", opened)
    app_state.change_base(TWO)
    assert said == ["The base models/two is being loaded. Try again in a moment."]


@pytest.mark.parametrize(("needed", "kind"), [(80, "It fits"), (90, "Tight"), (101, "It does not fit")])
def test_how_well_it_fits(needed, kind):
    found = Fit(needed << 30, 100 << 30)
    assert found.text == f"{kind}: {needed}.0 GB of weights, 100.0 GB free without the present base."
    assert found.fits == (kind != "It does not fit")
