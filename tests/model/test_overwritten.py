"""Files of adapters that change while they are served, and checks of several at once."""

import shutil
import subprocess
import sys
import textwrap
import threading

import pytest

from lora_dpo.adapters.folder import check_adapter
from lora_dpo.adapters.lora_config import WEIGHTS
from lora_dpo.adapters.passport import read_passport, write_passport
from lora_dpo.adapters.peft_files import check_finite, read_header, weights
from lora_dpo.errors import AdapterError
from lora_dpo.model.base import load_base
from lora_dpo.model.decoding import Sampling
from lora_dpo.serving.host import Host

OVERWRITTEN = """
    import pathlib, shutil, sys, threading
    from lora_dpo.errors import LoraDPOError
    from lora_dpo.model.decoding import Sampling
    from lora_dpo.serving.host import open_host

    model, folder, source = sys.argv[1:]
    target = pathlib.Path(folder) / "mine" / "adapter_model.safetensors"
    over = threading.Event()

    def overwrite():
        while not over.is_set():
            shutil.copyfile(source, target)  # in its place: what is mapped is cut off

    answered = refused = 0
    with open_host(model, folder, quantize="none") as host:
        thread = threading.Thread(target=overwrite)
        thread.start()
        for turn in range(150):
            assert host.names()[0] == "base"
            if turn % 5 == 0:
                try:
                    ask = [{"role": "user", "content": "hi"}]
                    host.answer("mine", ask, Sampling(max_new_tokens=2), client="a")
                    answered += 1
                except LoraDPOError:
                    refused += 1
        over.set()
        thread.join()
        assert host.names() == ["base", "mine"]
        assert host.answer("mine", ask, Sampling(max_new_tokens=2), client="a").prompt_tokens
    print(answered, refused)
"""


@pytest.fixture(scope="module")
def base(tiny_model_folder):
    return load_base(str(tiny_model_folder), quantize="none")


def test_an_adapter_that_is_overwritten_in_its_place_ends_nothing(tiny_model_folder, make_adapter, tmp_path):
    mine = make_adapter(tmp_path / "adapters/mine", rank=64)  # large enough to be read while it is written
    (mine / "passport.json").unlink()
    shutil.copyfile(mine / WEIGHTS, tmp_path / "source")
    command = [sys.executable, "-c", textwrap.dedent(OVERWRITTEN), str(tiny_model_folder)]
    done = subprocess.run(
        [*command, str(tmp_path / "adapters"), str(tmp_path / "source")], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert sum(map(int, done.stdout.split())) == 30


@pytest.mark.parametrize("size", [0, 4, 200, 20_000])
def test_a_file_that_is_cut_short_while_it_is_read_is_one_error(tiny_adapter, tmp_path, size):
    shutil.copytree(tiny_adapter, tmp_path / "mine")
    reading = weights(tmp_path / "mine")
    next(reading)
    with (tmp_path / "mine" / WEIGHTS).open("r+b") as file:
        file.truncate(size)
    with pytest.raises(AdapterError, match="Take the adapter from its source again"):
        list(reading)


def test_a_file_that_was_written_to_while_it_was_read_is_no_whole_one(tiny_adapter, tmp_path):
    shutil.copytree(tiny_adapter, tmp_path / "mine")
    reading = weights(tmp_path / "mine")
    next(reading)
    with (tmp_path / "mine" / WEIGHTS).open("r+b") as file:
        file.write((tiny_adapter / WEIGHTS).read_bytes())
    with pytest.raises(AdapterError, match="was written to while it was read"):
        list(reading)
    check_finite(tmp_path / "mine")  # by now it is whole
    assert read_header(tmp_path / "mine" / WEIGHTS)


def test_each_of_many_threads_is_told_of_its_own_adapter(base, make_adapter, tmp_path):
    wanted = {"one": "quantised as nf4", "two": "another vocabulary", "three": "no passport", "four": None}
    for name in wanted:
        make_adapter(tmp_path / name)
    write_passport(tmp_path / "one", replaced(tmp_path / "one", quantize="nf4"))
    write_passport(tmp_path / "two", replaced(tmp_path / "two", tokenizer_sha256="0" * 64))
    (tmp_path / "three/passport.json").unlink()
    found = {name: [] for name in wanted}
    together = threading.Barrier(len(wanted))

    def check(name):
        together.wait(30)
        for _ in range(20):
            found[name].append(check_adapter(base, tmp_path / name))

    threads = [threading.Thread(target=check, args=(name,)) for name in wanted]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name, text in wanted.items():
        assert len(found[name]) == 20
        if text is None:
            assert found[name] == [[]] * 20
        else:
            assert all(len(said) == 1 and text in said[0] and name in said[0] for said in found[name])


def replaced(folder, **changes):
    from dataclasses import replace

    return replace(read_passport(folder), **changes)


def test_an_adapter_that_takes_long_to_check_holds_up_nobody_else(base, make_adapter, tmp_path, monkeypatch):
    from lora_dpo.serving import adapter_pool

    adapters = tmp_path / "adapters"
    make_adapter(adapters / "small")
    reached, go_on, check = threading.Event(), threading.Event(), adapter_pool.check_adapter

    def slow(base, folder):
        if folder.name == "large":
            reached.set()
            assert go_on.wait(60)
        return check(base, folder)

    monkeypatch.setattr(adapter_pool, "check_adapter", slow)
    with Host(base, adapters) as host:
        assert host.answer("small", [{"role": "user", "content": "hi"}], Sampling(max_new_tokens=1), client="a")
        shutil.copytree(adapters / "small", adapters / "large")
        asked = []
        looker = threading.Thread(target=lambda: asked.extend(host.names()))
        looker.start()
        assert reached.wait(60)
        for who in ("base", "small"):
            assert host.answer(who, [{"role": "user", "content": "hi"}], Sampling(max_new_tokens=1), client="b")
        assert host.incompatibility("small") is None
        go_on.set()
        looker.join(60)
        assert {"base", "small"} <= set(asked)
        assert host.names() == ["base", "large", "small"]


def test_adapters_in_memory_are_bounded_by_their_bytes(base, make_adapter, tmp_path, monkeypatch):
    from lora_dpo.serving import adapter_pool

    for number in range(4):
        make_adapter(tmp_path / f"a{number}", seed=number)
    size = (tmp_path / "a0" / WEIGHTS).stat().st_size
    monkeypatch.setattr(adapter_pool, "KEPT_BYTES", 2 * size)
    held = adapter_pool.AdapterPool(base, tmp_path)
    for number in range(4):
        held.resident(f"a{number}")
    assert held.held() == ["a2", "a3"]
    monkeypatch.setattr(adapter_pool, "KEPT_BYTES", size // 2)
    held.resident("a0")
    assert held.held() == ["a0"]  # the newest stays, however large
