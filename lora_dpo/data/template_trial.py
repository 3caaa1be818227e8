"""A chat template is a program that came with a model: it is run once in a process with limits before it runs here.

This file is that process's program, too: it reads the template from standard input and imports nothing but Jinja.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import signal
import subprocess
import sys
from typing import Any

CPU_SECONDS = 2
WALL_SECONDS = 10 if sys.platform == "win32" else 60  # there it is the only limit, of memory as well
MEMORY = 1 << 30
MAX_TEMPLATE = 256 << 10
"""Characters; the longest of a known model has about 20,000."""
MAX_TEXT = 1 << 20
"""Characters that it may write of the few words of the trial."""

_TOO_LARGE = f"it takes more than {MEMORY >> 20:,} MB"
_GIVEN = ("messages", "tools", "add_generation_prompt", "bos_token", "eos_token")
_WORDS = [{"role": "user", "content": "Hi"}]
_TURNS = [*_WORDS, {"role": "assistant", "content": "Yes?"}, {"role": "user", "content": "Say it."}]
_CALL = {"type": "function", "function": {"name": "f", "arguments": {"a": "b"}}}
_TOOLS = [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}]
_CONVERSATIONS = (
    _WORDS,
    _TURNS,
    [{"role": "system", "content": "Be brief."}, *_TURNS],
    [
        *_WORDS,
        {"role": "assistant", "content": "", "tool_calls": [_CALL]},
        {"role": "tool", "content": "c", "name": "f"},
    ],
)


@functools.lru_cache(maxsize=64)
def fault_of(template: str) -> str | None:
    """What a template does that no chat template may: run on, or write or hold without end. None if it does not.

    A template that is broken, or refuses the conversations of the trial, is none of these: it says so when it is used.
    """
    if len(template) > MAX_TEMPLATE:
        return f"it has {len(template):,} characters, at most {MAX_TEMPLATE:,} are run"
    try:
        done = subprocess.run(
            [sys.executable, "-I", __file__],
            input=json.dumps([template, sys.path]).encode(),
            capture_output=True,
            timeout=WALL_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return "it does not end"
    if sys.platform != "win32" and -done.returncode in (signal.SIGKILL, signal.SIGXCPU):
        return f"it does not end within {CPU_SECONDS} seconds"
    if done.returncode != 0:
        return f"it cannot be tried (status {done.returncode})"
    return done.stdout.decode("utf-8", "replace").strip() or None


def _limit() -> None:
    if sys.platform == "win32":
        return  # no such limits there: the wall clock alone
    import resource

    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    with contextlib.suppress(ValueError, OSError):  # macOS takes none
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))


def _try_out(template: str) -> str:
    """What `fault_of` says; in the process with limits."""
    import jinja2.meta

    environment = template_environment()
    try:
        compiled = environment.from_string(template)  # once: a long one takes longer than to run
        names = jinja2.meta.find_undeclared_variables(environment.parse(template))
    except MemoryError:
        return _TOO_LARGE
    except Exception:
        return ""  # a broken one, which says so when it is used
    # All that keywords may switch on in it, and off.
    switches = [name for name in names if name not in _GIVEN and name not in environment.globals]
    for conversation, tools, switched in itertools.product(_CONVERSATIONS, (None, _TOOLS), (None, True, False)):
        keywords = {} if switched is None else dict.fromkeys(switches, switched)
        given = {"messages": conversation, "tools": tools, "add_generation_prompt": True, **keywords}
        try:
            text = compiled.render(**given, bos_token="<s>", eos_token="</s>")  # noqa: S106
        except MemoryError:
            return _TOO_LARGE
        except Exception:  # noqa: S112 - a program of someone else: whatever it raises is said when it is used
            continue
        if len(text) > MAX_TEXT:
            return f"it writes {len(text):,} characters of a few words"
    return ""


def template_environment() -> Any:
    """Jinja as transformers gives it to chat templates: in a sandbox, with its tag, filter and functions."""
    import jinja2
    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(jinja2.ext.Extension):
        """The tag around what the assistant writes, as transformers has it."""

        tags = {"generation"}  # noqa: RUF012 - Jinja's own form

        def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
            """The body alone."""
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def refuse(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = lambda value, **how: json.dumps(value, ensure_ascii=False)
    environment.globals |= {"raise_exception": refuse, "strftime_now": lambda form: "1 January 2026"}
    return environment


if __name__ == "__main__":
    _limit()
    given, sys.path[:] = json.loads(sys.stdin.buffer.read())
    sys.stdout.buffer.write(_try_out(given).encode("utf-8", "replace"))
