"""The adapter folder, the only thing that training hands on: written, read, checked, shared.

module_names     which modules a PEFT config means, found in linear time
lora_config      `adapter_config.json`, read and checked without a model
peft_files       its weights, read and checked alike
peft_config      what PEFT is told about an adapter: checked fields alone
passport         its provenance: base, data, settings, what was measured
parameter_lora   which tensors change a mixture's stacked experts
adapter          one folder, opened once, and whether it fits a base by names and shapes
base_search      where an adapter's base is, if its folder has moved
folder           an adapter is checked against the base in memory, then attached to it
stored_pairs     held-out pairs with their scores, which travel with an adapter
stored_margins   what a run made of each of its pairs, which stays at home
loading          the model that answers: a base, with an adapter or without
run_folder       where a run writes, finished and unfinished
checkpoints      checkpoints: sealed with a manifest of hashes, judged whole or torn
stored_schema    what a reader of runs and evaluations may find in their files
stored_run       a run's or an evaluation's folder, read for a report
package          the `.lora.zip` format: its limits, and what is refused
describe         what an adapter was made from, and in what two differ
store            the adapters on this machine: list, find, remove
exchange         pack and install: an adapter from elsewhere is checked here
hub              adapters on the Hugging Face hub
"""

from __future__ import annotations

from lora_dpo.adapters.exchange import install, pack
from lora_dpo.adapters.folder import attach_adapter
from lora_dpo.adapters.hub import pull, push
from lora_dpo.adapters.loading import load_policy
from lora_dpo.adapters.store import list_adapters

__all__ = ["attach_adapter", "install", "list_adapters", "load_policy", "pack", "pull", "push"]
