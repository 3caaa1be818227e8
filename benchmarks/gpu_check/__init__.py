"""Is the engine right on a GPU, what does it need there, and how fast is it (docs/gpu.md).

    make gpu-check                                  everything, in order: 15 minutes on a card of 24 GB, by estimate
    make gpu-check DEVICE=cpu                       the same on tiny models: a rehearsal, whose figures mean nothing
    python -m benchmarks.gpu_check equal            one part
    python -m benchmarks.gpu_check cards --cards 8 12

common   random bases in NF4, trainers on them, what is noted and said
equal    losses and gradients against stock TRL and plain passes
memory   the peak of one pair of the longest length, against `lora-dpo plan`
cards    whole optimiser steps within 8, 12, 16 and 24 GB of the card
speed    pairs a second beside stock TRL, and the kernels of a step
decode   tokens a second of answers, with and without an adapter

No part needs a network or a download: weights are random, and so are the tokens.
"""
