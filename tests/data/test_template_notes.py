"""What chat templates do to data is said: templates inside templates, parts left out, another start of the answers."""

import copy
import json

import pytest

from lora_dpo.cli.commands import main
from lora_dpo.config.reading import check_recipe
from lora_dpo.data import Message, Origin
from lora_dpo.data.doctor.examination import examine
from lora_dpo.data.pairs import PreferencePair
from lora_dpo.data.tokenize import tokenize_pair
from lora_dpo.events import Note, StopSignal
from lora_dpo.training.prepare import prepare

CHATML = (
    "{{% for m in messages %}}<|im_start|>{{{{ m.role }}}}\n{assistant}<|im_end|>\n{{% endfor %}}"
    "{{% if add_generation_prompt %}}<|im_start|>assistant\n{start}{{% endif %}}"
)
WHOLE = "{{ m.content }}"
CUT = "{{ m.content.split('</think>')[-1] | trim }}"
REASONING = "<think>\nTwo and two.\n</think>\n\n4"
SPACED = "{{ m.content | replace('\\n\\n', '\\n') | trim }}"
CALLS = (
    WHOLE + "{% for c in m.tool_calls or [] %}{{ c.function.name }}({{ c.function.arguments | tojson }}){% endfor %}"
)
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}


def bot(content, **more):
    return Message(role="assistant", content=content, **more)


def with_template(tokenizer, assistant, start=""):
    other = copy.deepcopy(tokenizer)
    other.chat_template = CHATML.format(assistant=assistant, start=start)
    return other


def pair(chosen, rejected=None, row=1):
    rejected = rejected or (bot("5"),)
    return PreferencePair((Message(role="user", content="2+2?"),), chosen, rejected, Origin("a.jsonl", row))


@pytest.mark.parametrize(
    ("template", "start", "chosen", "left_out", "other_start"),
    [
        (WHOLE, "", (bot("4"),), False, False),
        (WHOLE, "", (bot(REASONING),), False, False),
        (CUT, "", (bot("4"),), False, False),
        (CUT, "", (bot(REASONING),), True, False),
        (CUT, "<think>\n", (bot(REASONING),), True, True),
        (WHOLE, "<think>\n", (bot("4"),), False, True),
        (SPACED, "", (bot(REASONING + " \n"),), False, False),
        (WHOLE, "", (bot("", tool_calls=[CALL]),), True, False),
        (CALLS, "", (bot("", tool_calls=[CALL]),), False, False),
        (CALLS, "", (bot("One moment.", tool_calls=[CALL]), bot("4")), False, False),
        (CUT, "", (bot(REASONING), Message(role="user", content="Sure?"), bot("Yes.")), True, False),
        ("{{ m.content if loop.last or m.role == 'user' }}", "", (bot("2"), bot("4")), True, False),
    ],
)
def test_what_a_template_leaves_out_and_how_it_asks_is_seen(tokenizer, template, start, chosen, left_out, other_start):
    for one in (pair(chosen), pair((bot("5"),), chosen)):
        tokens = tokenize_pair(with_template(tokenizer, template, start), one, max_length=None)
        assert tokens.left_out == left_out
        assert tokens.other_start == (other_start or bool(start))


def test_a_template_that_begins_the_answer_where_it_asks_leaves_nothing_out(tokenizer):
    both = (bot(REASONING),), (bot("<think>\nThree.\n</think>\n\n5"),)
    tokens = tokenize_pair(with_template(tokenizer, WHOLE, "<think>\n"), pair(*both), max_length=None)
    assert (tokens.left_out, tokens.other_start) == (False, False)


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_the_doctor_names_the_rows(tokenizer, tmp_path):
    rows = [{"prompt": f"{n}?", "chosen": chosen, "rejected": "5"} for n, chosen in enumerate(["4", REASONING, "4"])]
    data = written(tmp_path / "a.jsonl", rows)
    found = examine([data], tokenizer=with_template(tokenizer, CUT)).findings
    assert [origin.row for origin in found["left-out"].rows] == [2]
    assert "other-start" not in found
    found = examine([data], tokenizer=with_template(tokenizer, WHOLE, "<think>\n")).findings
    assert [origin.row for origin in found["other-start"].rows] == [1, 2, 3]  # its rejected answer
    assert found["other-start"].examples[0][1].endswith("<think>\n")
    assert "left-out" not in found


# --- what a run says ------------------------------------------------------------------------------

PROMPT = "<|im_start|>user\nHow much are {} pens?<|im_end|>\n<|im_start|>assistant\n"
TEMPLATED = {
    "prompt": lambda n: {"prompt": PROMPT.format(n), "chosen": "Six.", "rejected": "Five, I say."},
    "answers": lambda n: {"prompt": f"{n} pens?", "chosen": "Six.<|im_end|>", "rejected": "Five."},
    "llama": lambda n: {"prompt": f"[INST] {n} pens? [/INST]", "chosen": "Six.", "rejected": "Five."},
    "bos": lambda n: {"prompt": f"<s>{n} pens?", "chosen": "Six.", "rejected": "Five."},
    "own special token": lambda n: {"prompt": f"{n} pens<|own|>", "chosen": "Six.", "rejected": "Five."},
}


def votes(row):
    return [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"} for side in ("chosen", "rejected")
    ]


def shown(row):
    return [{"prompt": row["prompt"], "completion": row["chosen"]}]


def notes_of(tmp_path, recipe_dict, rows, **settings):
    heard = []
    data = {"train": written(tmp_path / "t.jsonl", rows), "eval": written(tmp_path / "e.jsonl", rows[-2:])}
    recipe = check_recipe(recipe_dict(**{"data": data, **settings}))
    prepare(recipe, tmp_path / "out", heard.append, StopSignal())
    return [
        event.text
        for event in heard
        if isinstance(event, Note) and event.warning and "prompt that is" not in event.text
    ]


@pytest.fixture
def own_token_model(tiny_model_folder, tmp_path):
    """The tiny model with a special token that is no known template's."""
    import shutil

    folder = tmp_path / "own"
    shutil.copytree(tiny_model_folder, folder)
    text = (folder / "tokenizer.json").read_text(encoding="utf-8").replace("<|endoftext|>", "<|own|>")
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    return str(folder)


@pytest.mark.parametrize("kind", TEMPLATED)
@pytest.mark.parametrize("method", ["dpo", "kto", "sft"])
def test_a_run_counts_templates_inside_templates(tmp_path, recipe_dict, own_token_model, kind, method):
    plain = [{"prompt": f"{n}?", "chosen": "A.", "rejected": "B."} for n in range(3)]
    pairs = [*plain, *map(TEMPLATED[kind], range(2))]
    rows = {
        "dpo": pairs,
        "kto": [vote for row in pairs for vote in votes(row)],
        "sft": [x for r in pairs for x in shown(r)],
    }
    model = {"name": own_token_model, "quantize": "none"}
    notes = notes_of(tmp_path, recipe_dict, rows[method], method=method, model=model, trainer={})
    expected = {"dpo": "2 of 5 training pairs", "kto": "4 of 10 training answers", "sft": "2 of 5 training answers"}[
        method
    ]
    if (method, kind) == ("kto", "answers"):
        expected = "2 of 10 training answers"
    assert len(notes) == 2
    assert notes[0].startswith(f"{expected} have text of a chat template inside their messages, such as ")
    assert notes[1].startswith("2 of 2 held-out" if (method, kind) != ("kto", "answers") else "1 of 2 held-out")


def test_a_run_on_clean_data_says_nothing(tmp_path, recipe_dict):
    rows = [{"prompt": f"What is <b>{n}</b> | [1]?", "chosen": REASONING, "rejected": "5"} for n in range(4)]
    assert notes_of(tmp_path, recipe_dict, rows) == []


@pytest.mark.parametrize("method", ["dpo", "kto", "sft"])
def test_a_run_counts_what_the_template_leaves_out(tmp_path, recipe_dict, tiny_model_folder, method):
    import shutil

    folder = tmp_path / "cuts"
    shutil.copytree(tiny_model_folder, folder)
    (folder / "chat_template.jinja").write_text(CHATML.format(assistant=CUT, start="<think>\n"))
    rows = [{"prompt": f"{n}?", "chosen": REASONING if n else "4", "rejected": "5"} for n in range(4)]
    model = {"name": str(folder), "quantize": "none"}
    notes = notes_of(tmp_path, recipe_dict, rows, method=method, model=model, trainer={})
    what = {"dpo": "4 training pairs", "kto": "8 training answers", "sft": "4 training answers"}[method]
    assert notes[0].startswith(f"3 of {what}: the chat template leaves out a part of an answer")
    assert notes[1].startswith(f"{what.split()[0]} of {what}: the chat template asks for an answer with a text")


@pytest.mark.parametrize("verb", ["convert", "split", "mix"])
@pytest.mark.parametrize("kind", [kind for kind in TEMPLATED if kind != "own special token"])
def test_a_file_that_is_written_says_so_too(tmp_path, capsys, verb, kind):
    data = written(
        tmp_path / "a.jsonl", [*map(TEMPLATED[kind], range(2)), {"prompt": "?", "chosen": "A.", "rejected": "B."}]
    )
    out = [str(tmp_path / name) for name in ("b.jsonl", "c.jsonl")]
    words = {"convert": [data, out[0]], "split": [data, *out, "--share", "0.4"], "mix": [f"{data}:1", "-o", out[0]]}[
        verb
    ]
    assert main(["data", verb, *words]) == 0
    assert "2 of 3 pairs have text of a chat template inside their messages" in capsys.readouterr().err
