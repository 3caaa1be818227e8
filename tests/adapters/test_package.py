"""Packages: what is packed comes back byte for byte, and hostile ones change nothing here and take no time."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from bounded import within
from safetensors.torch import load_file, save_file

from lora_dpo.adapters.exchange import install, pack
from lora_dpo.adapters.package import KNOWN
from lora_dpo.adapters.store import list_adapters, remove
from lora_dpo.cli.commands import main
from lora_dpo.errors import AdapterError, BaseDiffers, LoraDPOError, OutputError, PackageError

WEIGHTS, CONFIG, PASSPORT = "adapter_model.safetensors", "adapter_config.json", "passport.json"


@pytest.fixture
def place(tiny_adapter, tmp_path, monkeypatch):
    """A user's folder with one adapter in it."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_adapter, tmp_path / "adapters" / "mine")
    return tmp_path


def state(folder):
    """Every path under a folder with its bytes and mode."""
    return {
        str(path.relative_to(folder)): (path.lstat().st_mode, hashlib.sha256(path.read_bytes()).hexdigest())
        if path.is_file()
        else path.lstat().st_mode
        for path in sorted(folder.rglob("*"))
    }


def parts(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name in KNOWN}


def zipped(place, files, name="evil.lora.zip", root="evil"):
    path = place / name
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file, content in files.items():
            archive.writestr(file if "/" in file or file.startswith("\\") else f"{root}/{file}", content)
    return path


def changed(place, tiny_adapter, name, change):
    """A package of the tiny adapter with one file changed."""
    files = parts(tiny_adapter)
    files[name] = change(files[name])
    if name == WEIGHTS:  # its passport goes along: the hash is not what should catch it
        passport = json.loads(files[PASSPORT])
        files[PASSPORT] = json.dumps(
            {**passport, "adapter_sha256": hashlib.sha256(files[WEIGHTS]).hexdigest()}
        ).encode()
    return zipped(place, files)


def config(**changes):
    return lambda content: json.dumps({**json.loads(content), **changes}).encode()


def tensors(change):
    def apply(content, tmp=Path("rewritten.safetensors")):
        tmp.write_bytes(content)
        found = load_file(tmp)
        change(found)
        save_file(found, tmp)
        return tmp.read_bytes()

    return apply


def header(change):
    """Change a safetensors header, keeping the data."""

    def apply(content):
        size = struct.unpack("<Q", content[:8])[0]
        head = json.loads(content[8 : 8 + size])
        text = json.dumps(change(head)).encode()
        return struct.pack("<Q", len(text)) + text + content[8 + size :]

    return apply


def first(found):
    return next(name for name in sorted(found) if "lora_A" in name)


def lie_about_shape(head):
    head[first(head)]["shape"] = [4, 1 << 20]
    return head


def overlap(head):
    names = [name for name in head if name != "__metadata__"]
    head[names[1]]["data_offsets"] = head[names[0]]["data_offsets"]
    return head


def huge_rank(found):
    name = first(found)
    found[name] = torch.zeros(5000, found[name].shape[1])


def set_nan(value):
    def change(found):
        found[first(found)][0, 0] = value

    return change


def another_shape(found):
    name = first(found)
    found[name] = torch.zeros(found[name].shape[0], found[name].shape[1] + 1)


def drop_b(found):
    del found[first(found).replace("lora_A", "lora_B")]


def rename(old, new):
    def change(found):
        name = first(found)
        found[name.replace(old, new)] = found.pop(name)
        partner = name.replace("lora_A", "lora_B")
        found[partner.replace(old, new)] = found.pop(partner)

    return change


def to_integers(found):
    found[first(found)] = found[first(found)].to(torch.int32)


def link_entry(place, tiny_adapter):
    path = zipped(place, {name: content for name, content in parts(tiny_adapter).items() if name != WEIGHTS})
    entry = zipfile.ZipInfo(f"evil/{WEIGHTS}")
    entry.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(entry, "/etc/passwd")
    return path


def bomb(place, tiny_adapter):
    return zipped(place, {**parts(tiny_adapter), "metrics.jsonl": b"\0" * (30 << 20)})


def claims_less(place, tiny_adapter):
    """The directory says 100 bytes, the stream holds a thousand times as many."""
    path = zipped(place, {**parts(tiny_adapter), "metrics.jsonl": os.urandom(50_000) * 2})
    content = bytearray(path.read_bytes())
    at = content.rindex(b"PK\x01\x02", 0, content.rindex(b"metrics.jsonl"))
    content[at + 24 : at + 28] = struct.pack("<I", 100)
    path.write_bytes(bytes(content))
    return path


def overlapping_files(place, tiny_adapter):
    """Two entries of the directory that share one stream."""
    path = zipped(place, parts(tiny_adapter))
    with zipfile.ZipFile(path) as archive:
        infos = archive.infolist()
    content = path.read_bytes()
    start = content.rindex(b"PK\x05\x06")
    directory = content.index(b"PK\x01\x02")
    weights = next(info for info in infos if info.filename.endswith(WEIGHTS))
    extra = content[directory:start].replace(b"recipe.yaml", b"recipe.yaml")
    entry = bytearray(extra[: 46 + len(infos[0].filename)])
    entry[24:28] = struct.pack("<I", weights.file_size)
    entry[20:24] = struct.pack("<I", len(content))
    new = content[:directory] + bytes(entry) + content[directory:start]
    end = bytearray(content[start:])
    end[8:12] = struct.pack("<HH", len(infos) + 1, len(infos) + 1)
    end[12:16] = struct.pack("<I", start - directory + len(entry))
    path.write_bytes(new + bytes(end))
    return path


def encrypted(place, tiny_adapter):
    path = zipped(place, parts(tiny_adapter))
    content = bytearray(path.read_bytes())
    for mark, offset in ((b"PK\x01\x02", 8), (b"PK\x03\x04", 6)):
        content[content.index(mark) + offset] |= 1
    path.write_bytes(bytes(content))
    return path


def with_entry(name, content=b"x"):
    return lambda place, tiny_adapter: zipped(place, {**parts(tiny_adapter), name: content})


def twice(place, tiny_adapter):
    path = zipped(place, parts(tiny_adapter))
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr(f"evil/{CONFIG}", b"{}")
    return path


def cut(place, tiny_adapter):
    path = zipped(place, parts(tiny_adapter))
    path.write_bytes(path.read_bytes()[:-3000])
    return path


def corrupt(place, tiny_adapter):
    """A byte in the packed weights is flipped: the archive's own checksum knows."""
    path = zipped(place, parts(tiny_adapter))
    content = bytearray(path.read_bytes())
    content[content.index(WEIGHTS.encode()) + 5000] ^= 0xFF
    path.write_bytes(bytes(content))
    return path


def folder_with(name, content=b"x", link=None):
    def make(place, tiny_adapter):
        shutil.copytree(tiny_adapter, place / "evil")
        path = place / "evil" / name
        if link:
            path.unlink(missing_ok=True)
            path.symlink_to(link)
        else:
            path.write_bytes(content)
        return place / "evil"

    return make


def one(name, change):
    return lambda place, tiny_adapter: changed(place, tiny_adapter, name, change)


def named(root):
    return lambda place, tiny_adapter: zipped(place, parts(tiny_adapter), root=root)


def without(name):
    return lambda place, tiny_adapter: zipped(place, {n: c for n, c in parts(tiny_adapter).items() if n != name})


def swapped_weights(place, tiny_adapter):
    files = parts(tiny_adapter)
    return zipped(place, {**files, WEIGHTS: tensors(lambda found: found[first(found)].mul_(2))(files[WEIGHTS])})


def packed_by(method):
    """The weights are packed by another method of zip than the two that are usual."""

    def make(place, tiny_adapter):
        path = place / "evil.lora.zip"
        with zipfile.ZipFile(path, "w") as archive:
            for file, content in parts(tiny_adapter).items():
                archive.writestr(f"evil/{file}", content, method if file == WEIGHTS else zipfile.ZIP_STORED)
        return path

    return make


def claimed(mark, offset, value):
    """A number of the first entry's header (PK 3 4) or of its line in the directory (PK 1 2) is another one."""

    def make(place, tiny_adapter):
        path = zipped(place, parts(tiny_adapter))
        content = bytearray(path.read_bytes())
        at = content.index(mark) + offset
        content[at : at + len(value)] = value
        path.write_bytes(bytes(content))
        return path

    return make


def long_names(found):
    for name in list(found):
        found[name.replace("q_proj", "q_proj." + "a." * 10_000 + "Z")] = found.pop(name)


def many_tensors(content):
    """A file of 100,001 tensors of one number each."""
    name = "base_model.model.model.layers.{}.q_proj.lora_A.weight"
    places = range(100_001)
    head = {name.format(n): {"dtype": "F32", "shape": [1, 1], "data_offsets": [4 * n, 4 * n + 4]} for n in places}
    text = json.dumps(head).encode()
    return struct.pack("<Q", len(text)) + text + bytes(4 * len(places))


def probe_of(value):
    def change(content):
        found = json.loads(content)
        found["pairs"][0]["policy"] = value
        return json.dumps(found).encode()

    return change


HOSTILE = {
    "zip slip": (with_entry("../../outside.json"), "leaves its folder"),
    "absolute path": (with_entry("/tmp/outside.json"), "leaves its folder"),
    "backslash path": (with_entry("evil/..\\..\\outside.json"), "leaves its folder"),
    "drive letter": (with_entry("C:/outside.json"), "leaves its folder"),
    "symlink in a zip": (link_entry, "symlink"),
    "symlink in a folder": (folder_with(WEIGHTS, link="/etc/passwd"), "symlink"),
    "symlinked config": (folder_with(CONFIG, link="/etc/passwd"), "symlink"),
    "pickle in a zip": (with_entry("adapter_model.bin"), "pickle"),
    "pickle in a folder": (folder_with("training_args.bin"), "pickle"),
    "pickle in capitals": (with_entry("evil/OPTIMIZER.PT"), "pickle"),
    "program": (with_entry("evil/modeling_evil.py"), "no file of an adapter"),
    "inner folder": (with_entry("evil/deeper/passport.json"), "no inner folders"),
    "two folders": (with_entry("other/recipe.yaml"), "more than one folder"),
    "bomb": (bomb, "times its packed size"),
    "claims less than it unpacks to": (claims_less, "not what it claims"),
    "overlapping files": (overlapping_files, "overlap"),
    "encrypted": (encrypted, "encrypted"),
    "a file twice": (twice, "twice"),
    "cut archive": (cut, "no whole zip"),
    "flipped byte": (corrupt, "not what it claims"),
    "lookalike letter": (with_entry("evil/\u0430dapter_config.json"), "lookalike"),
    "right-to-left name": (with_entry("evil/README\u202edm.md"), "lookalike"),
    "name with a dot": (named(".hidden"), "no name for an adapter"),
    "name with a lookalike": (named("qu\u0456ckstart"), "no name for an adapter"),
    "name of a run": (named("evil.partial"), "no name for an adapter"),
    "no weights": (without(WEIGHTS), "no adapter_model.safetensors"),
    "no config": (without(CONFIG), "no adapter_config.json"),
    "truncated safetensors": (one(WEIGHTS, lambda content: content[:-100]), "no whole safetensors"),
    "empty safetensors": (one(WEIGHTS, lambda content: b""), "no whole safetensors"),
    "header that lies about a shape": (one(WEIGHTS, header(lie_about_shape)), "no whole safetensors"),
    "header with overlapping tensors": (one(WEIGHTS, header(overlap)), "no whole safetensors"),
    "header longer than the file": (
        one(WEIGHTS, lambda content: b"\xff" * 7 + b"\0" + content),
        "no whole safetensors",
    ),
    "oversized tensor": (one(WEIGHTS, tensors(huge_rank)), "rank 5000"),
    "oversized rank": (one(CONFIG, config(r=1 << 30)), "allowed is 1 to"),
    "NaN": (one(WEIGHTS, tensors(set_nan(float("nan")))), "NaN"),
    "infinity": (one(WEIGHTS, tensors(set_nan(float("inf")))), "NaN or infinite"),
    "wrong shape": (one(WEIGHTS, tensors(another_shape)), "size mismatch"),
    "half a layer": (one(WEIGHTS, tensors(drop_b)), "no lora_B"),
    "unknown layer": (one(WEIGHTS, tensors(rename("layers.0", "layers.7"))), "there is no"),
    "foreign tensor": (one(WEIGHTS, tensors(rename("base_model.model.", "evil."))), "no tensor of a LoRA"),
    "integers": (one(WEIGHTS, tensors(to_integers)), "float weights"),
    "weights exchanged": (swapped_weights, "not those of its passport"),
    "another method": (one(CONFIG, config(peft_type="PROMPT_TUNING")), "not LORA"),
    "config that imports": (one(CONFIG, config(auto_mapping={"parent_library": "os"})), "would import os"),
    "endless pattern": (one(CONFIG, config(target_modules="(a+)+$")), "no pattern"),
    "endless pattern of ranks": (one(CONFIG, config(rank_pattern={"(.*a)*b": 4})), "no pattern"),
    "endless pattern to save": (one(CONFIG, config(modules_to_save=[".*.*.*.*"])), "no pattern"),
    "a pattern of layers": (one(CONFIG, config(layers_pattern=".*.*")), "no pattern"),
    "a lookahead of ranks": (one(CONFIG, config(alpha_pattern={"(?!a)b": 4})), "no pattern"),
    "a backreference": (one(CONFIG, config(target_modules=r"(.)\1.*")), "no pattern"),
    "many patterns": (one(CONFIG, config(rank_pattern={f"a.*b{n}": 4 for n in range(100)})), "at most 64"),
    "many names": (one(CONFIG, config(target_modules=[f"m{n}" for n in range(50_000)])), "at most 20,000"),
    "many names to save": (one(CONFIG, config(modules_to_save=[f"m{n}" for n in range(50_000)])), "at most 20,000"),
    "many ranks": (one(CONFIG, config(rank_pattern={f"m{n}": 4 for n in range(50_000)})), "at most 20,000"),
    "many layers": (one(CONFIG, config(layers_to_transform=[0] * 90_000)), "layers_to_transform"),
    "a layer number without end": (one(CONFIG, config(layers_to_transform=10**400)), "layers_to_transform"),
    "layers repeated": (one(CONFIG, config(layer_replication=[[0, 2]] * 10_000)), "uses layer_replication"),
    "modules that are nothing": (one(CONFIG, config(target_modules=[None])), "no pattern"),
    "modules that are a table": (one(CONFIG, config(target_modules={"q_proj": 1})), "no pattern"),
    "ranks that are a list": (one(CONFIG, config(rank_pattern=[["q_proj", 4]])), "no table"),
    "a rank that is text": (one(CONFIG, config(rank_pattern={"q_proj": "4"})), "has rank 4: allowed"),
    "a bias that is a table": (one(CONFIG, config(bias={})), "bias is {}"),
    "a bias of another name": (one(CONFIG, config(bias="some")), "bias is some"),
    "a dropout that is text": (one(CONFIG, config(lora_dropout="much")), "lora_dropout"),
    "a switch that is text": (one(CONFIG, config(use_dora="yes")), "use_dora"),
    "a base that is a list": (one(CONFIG, config(base_model_name_or_path=["x"])), "base_model_name_or_path"),
    "config of another library": (one(CONFIG, config(megatron_config={"a": 1})), "uses megatron_config"),
    "a method within the method": (one(CONFIG, config(arrow_config={"top_k": 3})), "uses arrow_config"),
    "long names of tensors": (one(WEIGHTS, tensors(long_names)), "no name of a tensor"),
    "more tensors than any model": (one(WEIGHTS, many_tensors), "at most 100,000"),
    "packed with bzip2": (packed_by(zipfile.ZIP_BZIP2), "packed by method 12"),
    "packed with lzma": (packed_by(zipfile.ZIP_LZMA), "packed by method 14"),
    "an unknown method": (claimed(b"PK\x01\x02", 10, b"\x63\x00"), "packed by method 99"),
    "bytes that claim to be bzip2": (claimed(b"PK\x01\x02", 10, b"\x0c\x00"), "packed by method 12"),
    "a place beyond the file": (claimed(b"PK\x01\x02", 42, b"\xf0\xff\xff\x7f"), "cannot be unpacked"),
    "a place inside another file": (claimed(b"PK\x01\x02", 42, b"\x07\x00\x00\x00"), "cannot be unpacked"),
    "a header of another name": (claimed(b"PK\x03\x04", 30, b"other"), "cannot be unpacked"),
    "packed bytes that are none": (claimed(b"PK\x03\x04", 80, b"\xff" * 40), "cannot be unpacked"),
    "the base's own name": (named("base"), "cannot be called base"),
    "the base's own name in capitals": (named("BASE"), "cannot be called BASE"),
    "config that changes the base": (one(CONFIG, config(init_lora_weights="pissa")), "changed base"),
    "deep JSON": (one(CONFIG, lambda content: b"[" * 200_000), "cannot be read"),
    "passport of another type": (one(PASSPORT, config(base=["x"])), "cannot be read"),
    "metrics that are no table": (one(PASSPORT, config(metrics={"after": {"pairs": []}})), "no table of numbers"),
    "metrics that are text": (one(PASSPORT, config(metrics={"before": "good"})), "no table of numbers"),
    "endless layers pattern": (one(CONFIG, config(layers_pattern=["layers", "(a+)+$"])), "no pattern"),
    "endless verbose pattern": (one(CONFIG, config(target_modules="(?x)(a+) +$")), "no pattern"),
    "hidden letters in the base": (one(PASSPORT, config(base="smol\u202elm")), "hidden letters"),
    "wrong base": (one(PASSPORT, config(base_fingerprint="0" * 32)), "was made for"),
    "scores that are no numbers": (one("verify.json", probe_of(["x", 1.0])), "cannot be read"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_package_is_refused_in_one_sentence_and_changes_nothing(case, place, tiny_adapter, capsys):
    make, reason = HOSTILE[case]
    package = make(place, tiny_adapter)
    before = state(place / "adapters")
    outside = sorted(path.name for path in place.parent.iterdir())
    with within(2):
        assert main(["adapters", "install", str(package)]) == 1
    said = capsys.readouterr().err.strip()
    assert reason in said
    assert said.count("\n") == 0
    assert said.isascii()
    assert "lora-dpo-install-" not in said
    assert state(place / "adapters") == before
    assert sorted(path.name for path in place.parent.iterdir()) == outside


def test_what_is_packed_comes_back_byte_for_byte(place, tiny_adapter):
    file = pack(place / "adapters" / "mine")
    assert file == Path("mine.lora.zip")
    done = install(file, name="again")
    assert parts(done.folder) == parts(tiny_adapter)
    assert not done.notes  # its base is here, and it fits


def test_packing_twice_gives_the_same_bytes(place):
    files = [pack(place / "adapters" / "mine", place / f"{number}.lora.zip") for number in (1, 2)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_name_taken_is_an_error(place):
    file = pack(place / "adapters" / "mine")
    before = state(place / "adapters")
    with pytest.raises(OutputError, match="called mine already"):
        install(file)
    assert state(place / "adapters") == before
    with pytest.raises(OutputError, match="already exists"):
        pack(place / "adapters" / "mine")


@pytest.mark.parametrize(
    ("name", "said"), [("base", "cannot be called base"), ("../up", "is no name"), (".hidden", "is no name")]
)
def test_a_name_that_no_adapter_may_have_is_refused_at_installing_too(name, said, place, capsys):
    file = pack(place / "adapters" / "mine")
    before = state(place)
    with pytest.raises(PackageError, match=said):
        install(file, name=name)
    assert main(["adapters", "install", str(file), "--name", name]) == 1
    assert said in " ".join(capsys.readouterr().err.split())
    assert state(place) == before


def test_the_card_of_a_package_shows_no_picture_that_is_not_in_it(place):
    card = place / "adapters" / "mine" / "README.md"
    card.write_text("# mine\n\n![training curves](curves.png)\n\n## How\n")
    done = install(pack(place / "adapters" / "mine"), name="packed")
    assert (done.folder / "README.md").read_text() == "# mine\n\n## How\n"
    shutil.copytree(place / "adapters" / "mine", place / "folder")
    assert (install(place / "folder").folder / "README.md").read_text() == "# mine\n\n## How\n"
    assert "curves.png" in card.read_text()  # at home it is there


def test_a_broken_adapter_is_not_packed(place):
    (place / "adapters" / "mine" / WEIGHTS).write_bytes(b"nothing")
    with pytest.raises(AdapterError, match="no whole safetensors"):
        pack(place / "adapters" / "mine")
    assert not list(place.glob("*.lora.zip*"))


def test_a_plain_peft_folder_installs_as_unverified(place, tiny_adapter):
    plain = place / "from-peft"
    plain.mkdir()
    for name in (CONFIG, WEIGHTS):
        shutil.copyfile(tiny_adapter / name, plain / name)
    (plain / "tokenizer.json").write_text("{}")
    done = install(plain, name="theirs")
    assert sorted(path.name for path in done.folder.iterdir()) == [CONFIG, WEIGHTS]
    assert any("unverified" in note for note in done.notes)
    assert any("tokenizer.json" in note for note in done.notes)
    states = {row.name: row.state for row in list_adapters(place / "adapters")}
    assert states == {"mine": "not yet verified", "theirs": "unverified"}


def test_a_base_that_is_not_here_is_said(place, tiny_adapter):
    package = changed(place, tiny_adapter, PASSPORT, config(base="someone/away"))
    [note] = install(package).notes
    assert "someone/away is not here" in note


def test_installing_nothing_is_refused(place):
    with pytest.raises(AdapterError, match="There is no"):
        install(place / "nothing.zip")


def test_removing_takes_the_folder_and_nothing_else(place, tiny_adapter, capsys):
    shutil.copytree(tiny_adapter, place / "adapters" / "other")
    assert main(["adapters", "remove", "other", "--yes"]) == 0
    assert [path.name for path in (place / "adapters").iterdir()] == ["mine"]
    shutil.copytree(tiny_adapter, place / "elsewhere")
    with pytest.raises(AdapterError, match="not in"):
        remove(str(place / "elsewhere"))
    assert (place / "elsewhere").is_dir()


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
def test_a_broken_adapter_is_removed_too(name, place, capsys):
    (place / "adapters" / "mine" / name).unlink()
    assert main(["adapters", "remove", "mine", "--yes"]) == 0
    assert not (place / "adapters" / "mine").exists()


def test_removing_never_leaves_the_adapters_folder(place, tiny_adapter):
    shutil.copytree(tiny_adapter, place / "elsewhere")
    (place / "adapters" / "link").symlink_to(place / "elsewhere")
    (place / "adapters" / "run.partial").mkdir()
    for name in ("link", "run.partial", "..", ".", "adapters/../elsewhere", "adapters/mine/.."):
        with pytest.raises(AdapterError, match="not in"):
            remove(name)
    with pytest.raises(AdapterError, match="Did you mean mine"):
        remove("mime")
    assert {path.name for path in (place / "adapters").iterdir()} == {"mine", "link", "run.partial"}
    assert (place / "elsewhere" / WEIGHTS).is_file()


def test_a_base_of_which_the_hubs_cache_has_parts_alone_is_not_here(
    place, tiny_adapter, tiny_model_folder, monkeypatch
):
    cached = place / "cached"
    cached.mkdir()
    shutil.copyfile(tiny_model_folder / "config.json", cached / "config.json")
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *where, **more: str(cached / "config.json"))
    [note] = install(changed(place, tiny_adapter, PASSPORT, config(base="someone/away")), name="one").notes
    assert "someone/away is not here" in note
    index = {"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
    (cached / "model.safetensors.index.json").write_text(json.dumps(index))
    [note] = install(place / "evil.lora.zip", name="two").notes
    assert "someone/away is not here" in note


def test_what_a_cut_off_write_left_is_no_adapter(place, tiny_adapter):
    shutil.copytree(tiny_adapter, place / "adapters" / ".mine.x1y2")
    assert [row.name for row in list_adapters(place / "adapters")] == ["mine"]
    with pytest.raises(AdapterError, match="cut-off write"):
        pack(place / "adapters" / ".mine.x1y2")


def test_errors_of_packages_are_adapter_errors_and_warnings_are_both():
    assert issubclass(PackageError, AdapterError)
    assert issubclass(BaseDiffers, LoraDPOError)
    assert issubclass(BaseDiffers, UserWarning)
