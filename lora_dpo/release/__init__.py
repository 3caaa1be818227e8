"""An adapter for elsewhere: merged into its base, mixed with others, exported.

merge_base       which base that is, and its files
merged_experts   weights that are stored otherwise than the model has them
merged_weights   base and adapter as one stream of merged tensors
merged_folder    that stream as an ordinary model folder
merge_fidelity   how far a merge is from the live adapter
mixture_score    adapters put together, and what that keeps of each parent
mixture          several adapters of one base become one
exports/         llama.cpp, Ollama, and servers that read PEFT folders
"""

from __future__ import annotations

from lora_dpo.release.exports import export
from lora_dpo.release.merge_fidelity import fidelity, recommend
from lora_dpo.release.merged_folder import merge
from lora_dpo.release.mixture import mix

__all__ = ["export", "fidelity", "merge", "mix", "recommend"]
