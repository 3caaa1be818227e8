"""Models of which only the published sizes are needed: a folder with a config and the byte tokenizer, no weights."""

import json

import transformers

SHAPES = {
    # ibm-granite/granite-4.1-3b and -8b, as IBM describes them
    "granite-4.1-3b": transformers.GraniteConfig(
        vocab_size=100352, hidden_size=2560, intermediate_size=8192, num_hidden_layers=40, num_attention_heads=40,
        num_key_value_heads=8, tie_word_embeddings=True,
    ),
    "granite-4.1-8b": transformers.GraniteConfig(
        vocab_size=100352, hidden_size=4096, intermediate_size=12800, num_hidden_layers=40, num_attention_heads=32,
        num_key_value_heads=8, tie_word_embeddings=True,
    ),
    "llama-3.1-8b": transformers.LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, tie_word_embeddings=False,
    ),
}  # fmt: skip


def published_model(folder, shape, tokenizer):
    """A model folder with the sizes of `SHAPES[shape]`, stored in bfloat16: to plan with, not to load."""
    folder.mkdir(parents=True)
    config = SHAPES[shape].to_dict() | {"architectures": [f"{type(SHAPES[shape]).__name__[:-6]}ForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}), encoding="utf-8")
    tokenizer.save_pretrained(folder)
    return folder


def long_pairs(path, count, *, prompt=400, answer=4000):
    """Pairs that fill any `max_length` in use: of the byte tokenizer, a letter is a token."""
    rows = [
        {"prompt": f"{number} " + "why " * (prompt // 4), "chosen": "a" * answer, "rejected": "b" * answer}
        for number in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
