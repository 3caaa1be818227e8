"""An adapter, or a whole model, in the form that another program reads.

gguf_arch        names and numbers of llama.cpp's architectures
gguf_vocab       a tokenizer as llama.cpp keeps it
gguf_write       GGUF files of adapters and of merged models
llama_cpp_tools  its own converter and quantiser, where they are installed
ollama           a Modelfile with the chat template in Go's language
export_adapter   the choice between them
"""

from __future__ import annotations

from lora_dpo.release.exports.export_adapter import export

__all__ = ["export"]
