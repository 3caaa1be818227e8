"""An adapter for elsewhere: merged into its base, mixed with others, exported.

merged_weights   base and adapter as one stream of merged tensors
merged_folder    that stream as an ordinary model folder
merge_fidelity   how far a merge is from the live adapter
mixture_score    what a mixture keeps of each parent
mixture          several adapters of one base become one
exports/         llama.cpp, Ollama, and servers that read PEFT folders
"""
