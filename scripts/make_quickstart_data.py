"""Make `data/quickstart.jsonl` and `data/quickstart-eval.jsonl` from SmolLM2's own answers.

    lora-dpo models fetch smollm2-135m
    python scripts/make_quickstart_data.py          # about 40 minutes on 2 cores

Each prompt of `data/quickstart-prompts.txt` is answered several times by the same model: with the
chat template's own system turn, and with a system turn that asks for a short answer. The system turn
is only a way to get varied answers; it is not part of the pair. `prefer` is the rule that picks the
two answers: correct and complete in few words beats rambling. The samples are kept in
`data/.quickstart-samples.jsonl`, so a change of the rule needs no new sampling, and a run that was
stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

DATA = Path(__file__).resolve().parent.parent / "data"
SAMPLES = DATA / ".quickstart-samples.jsonl"
STYLES = {  # system turn, temperature, answers a prompt, longest answer in tokens
    "plain": (None, 0.8, 3, 112),
    "short": ("You are a helpful AI assistant. Answer in one or two short sentences.", 0.7, 4, 64),
}


@dataclass(frozen=True)
class Question:
    part: str
    prompt: str
    accepted: tuple[str, ...]


@dataclass(frozen=True)
class Sample:
    prompt: str
    style: str
    text: str
    tokens: int
    finished: bool


def read_questions() -> list[Question]:
    part, found = "", []
    for line in (DATA / "quickstart-prompts.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            part = line.strip("[]")
        elif line and not line.startswith("#"):
            prompt, _, accepted = line.partition(" => ")
            found.append(Question(part, prompt, tuple(filter(None, accepted.split(" | ")))))
    return found


def sample(questions: list[Question], batch_size: int = 64) -> None:
    """Append the answers of all prompts that `SAMPLES` does not hold yet."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lora_dpo.model.decoding import Sampling, generate

    done = {(s.prompt, s.style) for s in read_samples()} if SAMPLES.exists() else set()
    if all((q.prompt, style) in done for q in questions if q.part != "questions" for style in STYLES):
        return
    folder = "models/smollm2-135m"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    # fp32, not the faster bf16: the draws then hardly depend on the machine.
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for style, (system, temperature, count, longest) in STYLES.items():
        asked = [question.prompt for question in questions if question.part != "questions"]
        step = batch_size // count
        for start in range(0, len(asked), step):  # fixed batches: a resumed run draws the same answers
            if (asked[start], style) in done:
                continue
            prompts = [prompt for prompt in asked[start : start + step] for _ in range(count)]
            turns = [{"role": "system", "content": system}] if system else []
            chats = [[*turns, {"role": "user", "content": prompt}] for prompt in prompts]
            how = Sampling(max_new_tokens=longest, temperature=temperature, top_p=0.95, seed=start)
            answers = generate(model, tokenizer, chats, sampling=how, batch_size=batch_size)
            with SAMPLES.open("a", encoding="utf-8", newline="\n") as file:
                for prompt, answer in zip(prompts, answers, strict=True):
                    row = Sample(prompt, style, answer.text, answer.tokens, answer.finished)
                    file.write(json.dumps(asdict(row), ensure_ascii=False) + "\n")
            print(f"{style}: {min(start + step, len(asked))} of {len(asked)} prompts", flush=True)


def read_samples() -> list[Sample]:
    return [Sample(**json.loads(line)) for line in SAMPLES.read_text(encoding="utf-8").splitlines()]


# --- the rule -------------------------------------------------------------------------------------


def words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9']+", text.lower())


def complete(sample: Sample) -> bool:
    """Ended by itself, on a whole sentence, in plain English letters, without going in circles."""
    found = words(sample.text)
    threes = Counter(zip(found, found[1:], found[2:], strict=False))
    return (
        sample.finished
        and sample.text.endswith((".", "!", "?", '"', "*"))
        and sample.text.isprintable()
        and sum(ord(letter) > 127 for letter in sample.text) <= 2
        and len(set(found)) >= 0.6 * len(found)
        and max(threes.values(), default=0) <= 1
    )


def on_topic(sample: Sample, prompt: str) -> bool:
    """Takes up at least one of the prompt's longer words (by its first five letters)."""
    asked = {word[:5] for word in words(prompt) if len(word) > 3} - COMMON
    return not asked or bool(asked & {word[:5] for word in words(sample.text)})


COMMON = {
    word[:5]
    for word in [
        "what",
        "which",
        "does",
        "should",
        "give",
        "name",
        "write",
        "explain",
        "describe",
        "suggest",
        "short",
        "tell",
    ]
}


def correct(sample: Sample, accepted: tuple[str, ...]) -> bool:
    from lora_dpo.data.questions import is_correct

    return is_correct(sample.text, accepted)


def prefer(question: Question, samples: list[Sample]) -> list[tuple[Sample, Sample, str]]:
    """Pick `(chosen, rejected, why)`: correct and complete in few words beats wrong or rambling.

    A question with a known answer gives up to two pairs: its shortest correct answer against a wrong one,
    and against one that rambles. Any other prompt gives one: the complete, on-topic answer nearest to
    `IDEAL` tokens against the longest answer, if that one is at least 1.7 times as long.
    """
    good = [s for s in samples if complete(s) and s.tokens <= LONGEST]
    if question.accepted:
        right = [s for s in good if 4 <= s.tokens <= FACT and correct(s, question.accepted)]
        if not right:
            return []
        chosen = min(right, key=lambda s: s.tokens)
        wrong = [s for s in samples if not correct(s, question.accepted)]
        rambling = [s for s in samples if correct(s, question.accepted) and s.tokens >= 2 * chosen.tokens + 8]
        pairs = [(chosen, min(wrong, key=lambda s: abs(s.tokens - 30)), "wrong")] if wrong else []
        return pairs + ([(chosen, max(rambling, key=lambda s: s.tokens), "rambles")] if rambling else [])
    fitting = [s for s in good if s.tokens >= SHORTEST and on_topic(s, question.prompt)]
    if not fitting:
        return []
    chosen = min(fitting, key=lambda s: abs(s.tokens - IDEAL))
    rejected = max((s for s in samples if s is not chosen), key=lambda s: s.tokens)
    return [(chosen, rejected, "rambles")] if rejected.tokens >= 1.7 * chosen.tokens else []


SHORTEST, IDEAL, LONGEST, FACT = 12, 32, 64, 24


def write(questions: list[Question]) -> None:
    samples: dict[str, list[Sample]] = {}
    for found in read_samples():
        # An answer that the request for few words did not shorten is neither a good nor a typical one.
        if found.style == "plain" or (found.finished and found.tokens < LONGEST):
            samples.setdefault(found.prompt, []).append(found)
    for part, name in (("train", "quickstart.jsonl"), ("eval", "quickstart-eval.jsonl")):
        rows = []
        for question in (q for q in questions if q.part == part):
            for chosen, rejected, why in prefer(question, samples[question.prompt]):
                turns = {"prompt": ("user", question.prompt)}
                turns |= {"chosen": ("assistant", chosen.text), "rejected": ("assistant", rejected.text)}
                row = {key: [{"role": role, "content": text}] for key, (role, text) in turns.items()}
                rows.append({**row, "why_rejected": why, "tokens": [chosen.tokens, rejected.tokens]})
        write_jsonl(name, rows)
        mean = [sum(row["tokens"][side] for row in rows) / len(rows) for side in (0, 1)]
        reasons = dict(Counter(row["why_rejected"] for row in rows))
        print(f"{name}: {len(rows)} pairs {reasons}, mean tokens chosen {mean[0]:.1f}, rejected {mean[1]:.1f}")
    asked = [{"prompt": q.prompt, "accepted": list(q.accepted)} for q in questions if q.part == "questions"]
    write_jsonl("quickstart-questions.jsonl", asked)


def write_jsonl(name: str, rows: list[dict]) -> None:
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (DATA / name).write_text("".join(lines), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter).parse_args()
    asked = read_questions()
    sample(asked)
    write(asked)
