"""A small model that was taught two ways to answer, and pairs that prefer one of them.

Prompts are "Tell me of SUBJECT N." The model answers "It is N." or "Well, well, well, it is N." with a
probability of its own for each subject, so that its greedy answers are mixed and no small drift turns them all.
"""

import json
import random
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaForCausalLM

SUBJECTS = ("moon", "kite", "bread", "river", "piano", "wolf", "lemon", "tower", "snow", "ship")
SHORT_SHARE = (0.1, 0.2, 0.25, 0.35, 0.45, 0.55, 0.65, 0.75, 0.8, 0.9)
STEPS, ROWS = 400, 24


def prompt(subject, number):
    return f"Tell me of {subject} {number}."


def short(number):
    return f"It is {number}."


def long(number):
    return f"Well, well, well, it is {number}."


def teach(folder: Path, target: Path) -> Path:
    """Teach the tiny random model of the tests both ways to answer; returns `target`."""
    from lora_dpo.data.chat_template import encode, prompt_ids

    model = LlamaForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    draws = random.Random(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (STEPS - step) / (STEPS / 2)))
    for _ in range(STEPS):
        rows = []
        for _ in range(ROWS):
            index, number = draws.randrange(len(SUBJECTS)), draws.randrange(10, 100)
            say = short if draws.random() < SHORT_SHARE[index] else long
            asked = prompt_ids(tokenizer, [{"role": "user", "content": prompt(SUBJECTS[index], number)}])
            rows.append((asked, [*encode(tokenizer, say(number)), tokenizer.eos_token_id]))
        width = max(len(asked) + len(answer) for asked, answer in rows)
        ids = torch.full((ROWS, width), tokenizer.pad_token_id)
        labels = torch.full((ROWS, width), -100)
        for row, (asked, answer) in enumerate(rows):
            ids[row, : len(asked) + len(answer)] = torch.tensor(asked + answer)
            labels[row, len(asked) : len(asked) + len(answer)] = torch.tensor(answer)
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    return target


def write_pairs(path: Path, numbers, *, shuffled: int | None = None) -> Path:
    """Pairs that prefer the short answer; with `shuffled`, a seed, half of them have their labels swapped."""
    places = [(number, subject) for number in numbers for subject in SUBJECTS]
    swapped = set() if shuffled is None else set(random.Random(shuffled).sample(places, len(places) // 2))
    rows = []
    for number in numbers:
        for subject in SUBJECTS:
            sides = [short(number), long(number)]
            if (number, subject) in swapped:
                sides.reverse()
            rows.append({"prompt": prompt(subject, number), "chosen": sides[0], "rejected": sides[1]})
    random.Random(7).shuffle(rows)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
