# One command each, on a machine with Python >= 3.11 and make. `make help` lists them.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help setup export regress test triton check audit fuzz test-transformers4 test-zoo bench-prune bench-parallel clean

PYTHON ?= python3
# The CPU and the CUDA runtimes overwrite each other, so each flavour has an environment of its own.
ifeq ($(GPU),1)
VENV := .venv-gpu
EXTRAS := gpu,tensorrt,openvino,dev
else
VENV := .venv
EXTRAS := cpu,openvino,rtx,dev
endif
BIN := $(VENV)/bin
READY := $(VENV)/.installed
OVERLAY := .overlay-transformers4
OVERLAY_ZOO := .overlay-zoo
TRITON := .venv-triton

# $(call flag,VARIABLE,--option) is `--option 'value'` where the variable is set, whatever the value holds.
quoted = '$(subst ','\'',$(value $(1)))'
flag = $(if $(value $(1)),$(2) $(call quoted,$(1)))

help: ## Show this list
	@sed -n 's/^\([a-z0-9-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 28
	@echo "Variables of export: MODEL TASK DATA KEEP SEQ SAMPLES SEED DEVICE FORMATS PRECISION OUT"
	@echo "Variables of regress: BASE NEW FLAGS"
	@echo "Variables of test:   JOBS (2: more need more memory, and disturb the tests that measure)"
	@echo "Variables of all:    GPU=1, PYTHON=python3.12, TORCH_INDEX=URL (where to find another torch wheel)"

setup: $(READY) ## Make the environment and install everything, pinned

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is older than 3.11: install a newer one, or name it: make PYTHON=python3.12"; exit 4; }
	@echo "Installing the pinned packages into $(VENV): once, a few minutes"
	@$(PYTHON) -m venv $(VENV)
	@PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt PIP_DISABLE_PIP_VERSION_CHECK=1 \
	  $(BIN)/python -m pip install --quiet $(call flag,TORCH_INDEX,--extra-index-url) -e '.[$(EXTRAS)]'
	@touch $@

export: MODEL ?= demo
export: $(READY) ## Prune, slice, export and measure MODEL (built in: demo, the default, and digits-vit)
	@$(BIN)/deploy-prune run $(call quoted,MODEL) $(call flag,TASK,--task) $(call flag,DATA,--data) \
	  $(call flag,KEEP,--keep-flops) $(call flag,SEQ,--seq-len) $(call flag,SAMPLES,--samples) \
	  $(call flag,SEED,--seed) $(call flag,DEVICE,--device) $(call flag,FORMATS,--formats) \
	  $(call flag,PRECISION,--precision) $(call flag,OUT,--out)

regress: NEW ?= bundles/demo
regress: $(READY) ## Check NEW against BASE in this job: latency, and what FLAGS add (docs/gate.md)
	@$(if $(value BASE),,echo "Name the bundle to compare with: make regress BASE=bundles/old"; exit 2;) \
	  $(BIN)/deploy-prune gate $(call quoted,NEW) $(call flag,BASE,--base) --junit gate/junit.xml \
	  --out gate/verdict.json --history gate/history.jsonl --trend gate/trend.svg $(FLAGS)

triton: $(TRITON)/.installed ## Make an environment with a real Triton server, for tests/test_triton.py (Linux)

$(TRITON)/.installed: constraints.txt
	@$(PYTHON) -m venv $(TRITON)
	@$(TRITON)/bin/python -m pip install --quiet --disable-pip-version-check numpy==1.26.4 \
	  $$(grep -E '^(tokenizers|onnxruntime)==' constraints.txt)
	@$(TRITON)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps nvidia-pytriton==0.7.0
	@touch $@

test: JOBS ?= 2
test: $(READY) ## Run all tests, JOBS files at a time (those on real data only where DEPLOY_PRUNE_DATA is set)
	OMP_NUM_THREADS=1 $(if $(wildcard $(TRITON)/.installed),DEPLOY_PRUNE_TRITON=$(TRITON)) \
	  $(BIN)/python -m pytest -rs -n $(call quoted,JOBS) --dist loadfile

check: $(READY) ## Run ruff, bandit, mypy on an installed copy, and the test of the import direction
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/bandit -q -ll -c pyproject.toml -r deploy_prune export runtime_bench
	PYTHONPATH=tests $(BIN)/python -m tools.typecheck
	$(BIN)/python -m pytest tests/test_imports.py

audit: $(READY) ## Look up known weaknesses of the pinned packages; says "not run" where that cannot be done
	@PYTHONPATH=tests $(BIN)/python -m tools.audit

fuzz: RUNS ?= 100000
fuzz: $(READY) ## Fuzz the reader TARGET (manifest plan recipe lut npz separated json image http grpc served message), RUNS times
	@$(if $(value TARGET),,echo "Name what to fuzz: make fuzz TARGET=manifest"; exit 2;) \
	  PYTHONPATH=tests $(BIN)/python -m fuzz.campaign $(call quoted,TARGET) -runs=$(call quoted,RUNS)

test-transformers4: $(READY) $(OVERLAY)/.installed ## Run the core tests under transformers 4.57
	PYTHONPATH=$(CURDIR)/$(OVERLAY) $(BIN)/python -c 'import transformers as t; assert t.__version__[0] == "4"'
	PYTHONPATH=$(CURDIR)/$(OVERLAY) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile tests/test_core_*.py

$(OVERLAY)/.installed: constraints-transformers4.txt $(READY)
	rm -rf $(OVERLAY)
	$(BIN)/python -m pip install --quiet --no-deps --target $(OVERLAY) -r constraints-transformers4.txt
	@touch $@

test-zoo: $(READY) $(OVERLAY_ZOO)/.installed ## Run tests/test_zoo.py on real networks of torchvision and timm
	PYTHONPATH=$(CURDIR)/$(OVERLAY_ZOO) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -rs tests/test_zoo.py

$(OVERLAY_ZOO)/.installed: constraints-zoo.txt $(READY)
	rm -rf $(OVERLAY_ZOO)
	$(BIN)/python -m pip install --quiet --no-deps $(call flag,TORCH_INDEX,--extra-index-url) --target $(OVERLAY_ZOO) \
	  -r constraints-zoo.txt
	@touch $@

bench-prune: $(READY) ## Time pruning, stage by stage, beside the paper's algorithm (minutes)
	$(BIN)/python benchmarks/prune.py --shape minilm --samples 256 --length 128

bench-parallel: $(READY) ## Time pruning in one process and in two (minutes)
	$(BIN)/python benchmarks/parallel.py time --shape minilm --samples 512 --length 64

clean: ## Remove caches and build outputs (environments and bundles stay)
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis $(OVERLAY) $(OVERLAY_ZOO)
	find . -path './.venv*' -prune -o -type d -name __pycache__ -print0 | xargs -0 rm -rf
