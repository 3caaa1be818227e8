# make train   set everything up, then preference-tune the quickstart model
# make test    set everything up, then run the tests on tiny models
# make test-slow   those on the real model, in a browser, on how trainings end, and on 100,000 rows
# make test-rounding   those on how trainings end, with the CPU held to older instructions, which round otherwise
# make fuzz    broken and hostile files of every kind, by the thousand (about 20 minutes on 2 cores, by estimate)
# make demo    set everything up, then chat, vote, train and swap in a browser
# make check   lint, types and all tests; CI leaves out those that take minutes each
# make bench   a step of ours and of stock TRL, side by side on three shapes of data (an hour on 2 cores, by estimate)
# make gpu-check   on a machine with an NVIDIA GPU: is it right, what does it need, how fast is it (about 15 minutes, by
#              estimate); DEVICE=cpu rehearses it without one
# make study   DPO against PPO, SFT and best-of-n on one known reward (hours; goes on where it was stopped)
# make study-quick   the same, small: the frontier's shape
# make clean   remove what these made, but for trained adapters

PYTHON ?= python3
BIN := .venv/bin
MODEL := models/smollm2-135m
SLOW ?= slow
DEVICE ?= cuda

.PHONY: train test test-rounding test-slow fuzz demo check lint types bench gpu-check study study-quick setup clean

train: $(BIN)/lora-dpo $(MODEL)/config.json
	$(BIN)/lora-dpo train configs/quickstart.yaml

demo: $(BIN)/.demo $(MODEL)/config.json
	$(BIN)/lora-dpo demo

# Two processes of one thread each: most tests are many small steps, which more threads do not speed up. Files in
# alphabetical order, since the longest few, which xdist would take last, would keep one process waiting.
test: $(BIN)/.dev $(MODEL)/config.json
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow"

# CI's: make test-slow SLOW="slow and not long"
test-slow: $(BIN)/.dev $(MODEL)/config.json
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder -m "$(SLOW)"

# The second with two threads in one process: two such processes on two cores take five times as long.
test-rounding: $(BIN)/.dev $(MODEL)/config.json
	ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 OMP_NUM_THREADS=1 \
		$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder -m outcome
	ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_ENABLE_INSTRUCTIONS=SSE4_2 OMP_NUM_THREADS=2 \
		$(BIN)/pytest -m outcome

fuzz: $(BIN)/.dev $(MODEL)/config.json
	OMP_NUM_THREADS=1 LORA_DPO_FUZZ=1000 $(BIN)/pytest -n 2 tests/test_fuzz_foreign.py

check: lint types test test-rounding test-slow

lint: $(BIN)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# As this system reads the code, and as Windows and macOS do.
types: $(BIN)/.dev
	$(BIN)/mypy
	$(BIN)/mypy --platform win32 --cache-dir .mypy_cache/win32
	$(BIN)/mypy --platform darwin --cache-dir .mypy_cache/darwin

bench: $(BIN)/.dev $(MODEL)/config.json
	$(BIN)/python benchmarks/bench.py --pairs 16 --top 8 --tuned-batch 2 --output benchmarks/results/mine.json

gpu-check: $(BIN)/.dev
	$(BIN)/python -m benchmarks.gpu_check all --device $(DEVICE)

study: $(BIN)/.dev $(MODEL)/config.json
	$(BIN)/python -m benchmarks.dpo_vs_ppo.study full
	$(BIN)/python -m benchmarks.dpo_vs_ppo.report full

study-quick: $(BIN)/.dev $(MODEL)/config.json
	$(BIN)/python -m benchmarks.dpo_vs_ppo.study quick
	$(BIN)/python -m benchmarks.dpo_vs_ppo.report quick

setup: $(BIN)/lora-dpo $(MODEL)/config.json

# Set-up is redone only when what it depends on changes.
$(BIN)/lora-dpo: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[serve]"
	@touch $@

$(BIN)/.demo: $(BIN)/lora-dpo
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[demo]"
	@touch $@

$(BIN)/.dev: $(BIN)/lora-dpo
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	@touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "lora-dpo needs Python 3.11 or newer; set PYTHON=python3.12 or the like."; exit 1; }
	$(PYTHON) -m venv .venv

$(MODEL)/config.json: | $(BIN)/lora-dpo
	$(BIN)/lora-dpo models fetch smollm2-135m --to $(MODEL)

clean:
	rm -rf .venv models build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
