"""The Dockerfile, as far as it can be held without a daemon: no image is built here."""

import fnmatch
import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from lora_dpo.cli.commands import app
from lora_dpo.cli.demo import check_reach, read_auth
from lora_dpo.errors import ConfigError

ROOT = Path(__file__).parent.parent
DOCKERFILE = ROOT / "Dockerfile"
ENTRYPOINT = ROOT / "docker-entrypoint.sh"
KNOWN = (
    *("FROM", "ARG", "ENV", "RUN", "COPY", "WORKDIR", "USER", "VOLUME", "EXPOSE", "HEALTHCHECK", "ENTRYPOINT", "CMD"),
)


def instructions():
    """`(name, the rest)` of each instruction, continued lines joined and comments left out."""
    text = re.sub(r"^\s*#.*\n", "", DOCKERFILE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    lines = text.replace("\\\n", " ").splitlines()
    return [(line.partition(" ")[0], line.partition(" ")[2].strip()) for line in lines if line.strip()]


def all_of(name):
    return [rest for found, rest in instructions() if found == name]


def words(name):
    """The words of an instruction in its JSON form."""
    [rest] = all_of(name)
    return re.findall(r'"([^"]*)"', rest)


def is_sent(path):
    """Whether .dockerignore lets a path of this folder into an image: the last rule that fits decides."""
    sent = True
    for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines():
        rule = line.strip()
        if not rule or rule.startswith("#"):
            continue
        pattern = rule.removeprefix("!").removeprefix("**/")
        parts = path.split("/")
        above = ["/".join(parts[: count + 1]) for count in range(len(parts))]
        names = parts if "**/" in rule else above
        if any(fnmatch.fnmatchcase(name, pattern) and name.count("/") == pattern.count("/") for name in names):
            sent = rule.startswith("!")
    return sent


def test_the_reader_of_instructions_sees_what_there_is():
    assert all_of("FROM") == ["python:3.11-slim"]
    assert words("CMD") == ["demo", "--host", "0.0.0.0"]
    assert len(all_of("RUN")) == 4


def test_instructions_are_known_and_lint_finds_nothing():
    assert {name for name, _ in instructions()} <= set(KNOWN)
    linter = shutil.which("hadolint", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if linter is None:
        pytest.skip("hadolint is not installed: it is among the dev extras on Linux")
    done = subprocess.run([linter, str(DOCKERFILE)], capture_output=True, text=True)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_nothing_runs_as_root_and_what_lasts_is_on_volumes():
    assert all_of("USER") == ["1000"]  # by number: Kubernetes cannot tell a name from root
    names = [name for name, _ in instructions()]
    assert names.index("USER") > max(place for place, name in enumerate(names) if name in ("RUN", "COPY"))
    assert words("VOLUME") == ["/work/adapters", "/work/collected", "/work/models"]
    assert all_of("WORKDIR")[-1] == "/work"
    assert "chown -R me:me /work" in all_of("RUN")[-1]


def test_a_change_of_the_code_installs_no_library_again():
    steps = [(name, rest) for name, rest in instructions() if name in ("COPY", "RUN")]
    copied = [rest.split()[:-1] for name, rest in steps if name == "COPY"]
    assert copied == [["constraints.txt"], ["pyproject.toml"], ["."]]
    last = [name for name, _ in steps].index("COPY", [rest for _, rest in steps].index(". ."))
    installs = [place for place, (_, rest) in enumerate(steps) if "pip install" in rest]
    assert [place > last for place in installs] == [False, False, True]
    assert "pip install --no-deps ." in steps[installs[-1]][1]


def test_everything_that_is_copied_is_sent_and_nothing_of_a_users():
    [run] = [rest for rest in all_of("RUN") if "install docker-entrypoint.sh" in rest]
    wanted = ["configs", "data", "demo", "adapters/quickstart", "docker-entrypoint.sh"]
    assert all(name in run for name in wanted)
    for name in (*wanted, "constraints.txt", "pyproject.toml", "lora_dpo/cli/demo.py", "README.md", "LICENSE"):
        assert (ROOT / name).exists(), name
        assert is_sent(name), name
    for name in (
        *("models/smollm2-135m/model.safetensors", "collected/votes.jsonl", ".git/config", ".venv/bin/python", ".env"),
        *("adapters/mine/adapter_model.safetensors", "adapters/mine.partial/recipe.yaml", "runs/a", "my-recipe.yaml"),
        *("lora_dpo/__pycache__/text.cpython-311.pyc", "data/.quickstart-samples.jsonl", "tests/conftest.py"),
    ):
        assert not is_sent(name), name


def run_with(command, tmp_path, **environment):
    """Run a shell command where `pip` and `lora-dpo` write down their words; returns the process and those words."""
    for name in ("pip", "lora-dpo"):
        script = tmp_path / name
        script.write_text('#!/bin/sh\necho "$LORA_DPO_AUTH" "$@" >> "$OUT"\n')
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
    shutil.copyfile(ROOT / "constraints.txt", tmp_path / "constraints.txt")
    out = tmp_path / "words"
    given = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "OUT": str(out), **environment}
    done = subprocess.run(command, cwd=tmp_path, env=given, capture_output=True, text=True)
    return done, out.read_text().strip() if out.exists() else ""


@pytest.mark.posix
def test_the_one_argument_says_which_torch_is_installed(tmp_path):
    [command] = [rest for rest in all_of("RUN") if "$DEVICE" in rest]
    torch = re.search(r"^torch==\S+", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[0]
    found = {}
    for device in ("cpu", "cuda", "gpu"):
        folder = tmp_path / device
        folder.mkdir()
        done, found[device] = run_with(["sh", "-c", command], folder, DEVICE=device)
        assert done.returncode == (device == "gpu")
    assert found["cpu"] == f"install --index-url=https://download.pytorch.org/whl/cpu {torch}"
    assert found["cuda"] == f"install {torch}"
    assert found["gpu"] == ""
    assert all_of("ARG") == ["DEVICE=cpu"]


def replay(tmp_path, out):
    """Do in a folder what COPY, WORKDIR and RUN say, but for users, torch and libraries; the package goes to `out`."""
    tools = tmp_path / "tools"
    tools.mkdir()
    pip = f"{shlex.quote(sys.executable)} -m pip install --quiet --no-deps --no-index --no-build-isolation --upgrade"
    scripts = {
        "pip": f'case "$1" in install) {pip} --target {shlex.quote(str(out))} . ;; *) rm -r {out}/lora_dpo* ;; esac',
        "chown": ":",
    }
    for name, script in scripts.items():
        (tools / name).write_text(f"#!/bin/sh\n{script}\n")
        (tools / name).chmod(0o755)
    listed = subprocess.run(
        [shutil.which("git"), "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    sent = [name for name in listed.splitlines() if is_sent(name) and (ROOT / name).is_file()]
    here = tmp_path
    for name, rest in instructions():
        if name == "WORKDIR":
            here = tmp_path / rest.removeprefix("/")
            here.mkdir(exist_ok=True)
        elif name == "COPY":
            for file in sent if rest == ". ." else [rest.split()[0]]:
                (here / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / file, here / file)
        elif name == "RUN" and "DEVICE" not in rest:
            command = rest.removeprefix("useradd --create-home --uid 1000 me &&")
            command = re.sub(r"(?<= )/(work|usr)\b", rf"{tmp_path}/\1", command)
            given = {"PATH": f"{tools}:{os.environ['PATH']}", "HOME": str(tmp_path)}
            subprocess.run(["/bin/sh", "-ec", command], cwd=here, env=given, check=True, capture_output=True)
    return sent


@pytest.mark.slow
@pytest.mark.posix
def test_what_its_steps_install_is_the_package_that_is_here(tmp_path):
    """Without users, libraries and torch. An empty package was installed first: nothing of it may be left."""
    (tmp_path / "usr/local/bin").mkdir(parents=True)
    sent = replay(tmp_path, tmp_path / "site")
    ours = [name for name in sent if name.startswith("lora_dpo/")]
    assert len(ours) > 150
    for name in ours:
        assert (tmp_path / "site" / name).read_bytes() == (ROOT / name).read_bytes(), name
    for name in ("configs/quickstart.yaml", "data/quickstart.jsonl", "demo/app.py", "adapters/quickstart/README.md"):
        assert (tmp_path / "work" / name).is_file(), name
    assert os.access(tmp_path / "usr/local/bin/docker-entrypoint", os.X_OK)


def test_what_it_starts_is_a_command_that_asks_for_a_password():
    command = typer.main.get_command(app).commands[words("CMD")[0]]
    options = {flag: option for option in command.params for flag in option.opts}
    assert words("CMD")[1] in options
    assert all_of("EXPOSE") == [str(options["--port"].default)]
    assert f":{options['--port'].default}/" in all_of("HEALTHCHECK")[0]
    with pytest.raises(ConfigError, match="lets other machines in"):
        check_reach(words("CMD")[2], share=False, auth=False)
    assert options["--auth"].envvar == "LORA_DPO_AUTH"
    assert words("ENTRYPOINT") == [ENTRYPOINT.stem]


@pytest.mark.posix
def test_a_container_without_a_password_makes_one_and_says_it(tmp_path):
    done, words = run_with(["sh", ENTRYPOINT, "demo", "--host", "0.0.0.0"], tmp_path)
    auth, *rest = words.split()
    user, password = read_auth(auth)
    assert rest == ["demo", "--host", "0.0.0.0"]
    assert len(password) >= 16
    assert f"user {user}, password {password} " in done.stderr
    again = run_with(["sh", ENTRYPOINT, "demo"], tmp_path)[1].split()[-2]
    assert again != auth


@pytest.mark.posix
@pytest.mark.parametrize(
    ("words", "given"),
    [
        (["demo", "--host", "0.0.0.0"], "me:secret"),
        (["demo", "--auth", "me:secret"], ""),
        (["demo", "--help"], ""),
        (["train", "configs/quick start.yaml"], ""),
        ([], ""),
    ],
)
def test_otherwise_it_adds_nothing(tmp_path, words, given):
    done, seen = run_with(["sh", ENTRYPOINT, *words], tmp_path, LORA_DPO_AUTH=given)
    assert done.stderr == ""
    assert seen == shlex.join([given] if given else []) + (" " if given and words else "") + " ".join(words)


def test_scripts_keep_their_line_feeds_on_every_system():
    assert "* text=auto eol=lf" in (ROOT / ".gitattributes").read_text(encoding="utf-8").splitlines()
    assert b"\r" not in ENTRYPOINT.read_bytes()
