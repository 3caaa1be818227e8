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
STYLES = {
    "plain": (None, 0.8, 3),
    "short": ("You are a helpful AI assistant. Answer in one or two short sentences.", 0.7, 4),
}
MAX_NEW_TOKENS = 112


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

    from lora_dpo.generate import Sampling, generate

    done = {(s.prompt, s.style) for s in read_samples()} if SAMPLES.exists() else set()
    folder = "models/smollm2-135m"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    # fp32, not the faster bf16: the draws then hardly depend on the machine.
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for style, (system, temperature, count) in STYLES.items():
        asked = [question.prompt for question in questions if question.part != "questions"]
        step = batch_size // count
        for start in range(0, len(asked), step):  # fixed batches: a resumed run draws the same answers
            if (asked[start], style) in done:
                continue
            prompts = [prompt for prompt in asked[start : start + step] for _ in range(count)]
            turns = [{"role": "system", "content": system}] if system else []
            chats = [[*turns, {"role": "user", "content": prompt}] for prompt in prompts]
            how = Sampling(max_new_tokens=MAX_NEW_TOKENS, temperature=temperature, top_p=0.95, seed=start)
            answers = generate(model, tokenizer, chats, sampling=how, batch_size=batch_size)
            with SAMPLES.open("a", encoding="utf-8") as file:
                for prompt, answer in zip(prompts, answers, strict=True):
                    row = Sample(prompt, style, answer.text, answer.tokens, answer.finished)
                    file.write(json.dumps(asdict(row), ensure_ascii=False) + "\n")
            print(f"{style}: {min(start + step, len(asked))} of {len(asked)} prompts", flush=True)


def read_samples() -> list[Sample]:
    return [Sample(**json.loads(line)) for line in SAMPLES.read_text(encoding="utf-8").splitlines()]


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter).parse_args()
    sample(read_questions())
