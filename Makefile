# The front door. `make demo` on a fresh clone is all a newcomer needs.
#
#   PYTHON=python3.12         another interpreter (3.11 or later) for the virtual environment
#   TORCH_INDEX_URL=...       where pip looks for torch, e.g. the CPU wheels of PyTorch on a machine without a GPU
#   ARGS="--seed 1"           overrides of any key of the stage's YAML, for demo and serve

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TORCH_INDEX_URL ?=
ARGS ?=
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# A virtual environment that happens to be active must not leak into ours.
unexport PYTHONHOME PYTHONPATH

.PHONY: help demo serve test test-fast fuzz openapi lint bench bench-anchors embedded-models venv clean

help:
	@echo 'make demo             set up, then the whole job on the embedded models: train, compare, serve one answer'
	@echo 'make serve            keep the service up on loopback with the last trained policy'
	@echo 'make test             all tests (make test-fast: without the slow ones)'
	@echo 'make fuzz             requests of every shape against the HTTP interface, 10,000 and more'
	@echo 'make openapi          write docs/openapi.json anew, after a change of the interface'
	@echo 'make lint             ruff and mypy'
	@echo 'make bench            the benchmarks that need no more than make demo, one after the other (hours); a JSON line each'
	@echo 'make bench-anchors    set up what benchmarks compare us with (TRL 1.12, in .venv-anchors)'
	@echo 'make embedded-models  train the shipped models again (hours; never needed by a user)'
	@echo 'make clean            remove caches and build outputs (runs/ and .venv stay)'

# `pip` with one moving line instead of a page a package: $(call pip,arguments). pipefail: a failing pip fails make.
define pip
	$(BIN)/python -m pip install --progress-bar off $(1) | { n=0; while read -r word name _; do \
	  case "$$word" in \
	    Collecting|Obtaining) n=$$((n + 1)); if [ -t 1 ]; then printf '\r\033[K      %d packages: %s' "$$n" "$$name"; fi;; \
	    Installing) if [ -t 1 ]; then printf '\r\033[K'; fi; echo '      unpacking ...';; \
	  esac; done; }
endef

$(STAMP): pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo 'error: $(PYTHON) not found; install Python 3.11 or later,' \
	  'or name one: make PYTHON=/path/to/python3.11' >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "error: $(PYTHON) is Python " \
	  + sys.version.split()[0] + "; Python 3.11 or later is needed: make PYTHON=/path/to/python3.11")'
	@echo '[1/3] virtual environment $(VENV)'
	@$(PYTHON) -m venv $(VENV)
	@# torch first, so that the machine decides: CUDA wheels where a GPU answers, the pinned CPU build elsewhere.
	@if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; \
	  then torch='torch>=2.8,<2.14'; else torch='torch==2.13.0'; fi; \
	  echo "[2/3] $$torch"; \
	  $(call pip,"$$torch" $(if $(TORCH_INDEX_URL),--index-url '$(TORCH_INDEX_URL)'))
	@echo '[3/3] consensus-machine and what it needs (a few minutes the first time)'
	@$(call pip,-e '.[dev]')
	@touch $@
	@echo "ready: $$($(BIN)/python -c 'import torch, platform; \
	  print("Python", platform.python_version() + ", torch", torch.__version__)')"

venv: $(STAMP)

demo: $(STAMP)
	@$(BIN)/consensus demo --config configs/embedded/demo.yaml $(ARGS)

# The newest trained policy with the preference model beside it, or else the shipped models.
serve: $(STAMP)
	@models=(); for weights in $$(ls -t runs/*/ppo/*.safetensors 2>/dev/null || true); do \
	  run=$${weights%/ppo/*}; if [ -f $$run/preference/calibration.json ]; then \
	    models=(--model_name_or_path $$run/ppo --preference_model $$run/preference); break; fi; done; \
	  echo "models: $${models[*]:-as shipped}"; \
	  $(BIN)/consensus serve --config configs/embedded/serve.yaml $${models[@]+"$${models[@]}"} $(ARGS)

# Two files at a time, each in one process with the services and Rays its tests share; one file alone, whose tests all
# have one name, of which pytest-xdist would run one.
FUZZ := tests/serving/test_fuzz.py

test: $(STAMP)
	@$(BIN)/python -m pytest -q -n 2 --dist loadfile --ignore $(FUZZ)
	@$(BIN)/python -m pytest -q $(FUZZ)

test-fast: $(STAMP)
	@$(BIN)/python -m pytest -q -n 2 --dist loadfile --ignore $(FUZZ) -m 'not slow'
	@$(BIN)/python -m pytest -q $(FUZZ)

fuzz: $(STAMP)
	@FUZZ_CASES=600 $(BIN)/python -m pytest -q $(FUZZ)

openapi: $(STAMP)
	@$(BIN)/python -c 'import json; from serving.api import document; \
	  open("docs/openapi.json", "w").write(json.dumps(document(), indent=1) + "\n")'

lint: $(STAMP)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

# Those that need no more than what `make demo` leaves in runs/demo; what they write goes to a temporary folder. Others
# need people's votes and a model fitted to them (human_data, human_preferences), TRL (ppo_curves, see bench-anchors) or
# PostgreSQL (rating_kills, store).
BENCHMARKS := scoring sequential ppo_update pool service service_kills uncertainty injection experiment cycle \
  overoptimization ppo_learning

bench: $(STAMP)
	@test -d runs/demo/ppo || { echo 'error: runs/demo/ppo is missing; run make demo first' >&2; exit 1; }
	@folder=$$(mktemp -d); trap 'rm -rf "$$folder"' EXIT; for name in $(BENCHMARKS); do \
	  case $$name in \
	    experiment) output=(--plot "$$folder/experiment.png");; \
	    cycle|ppo_learning) output=(--output "$$folder/$$name");; \
	    *) output=();; esac; \
	  echo "== $$name"; $(BIN)/python -m benchmarks.$$name --json $${output[@]+"$${output[@]}"}; done

# What benchmarks compare us with, in a virtual environment of its own: the last TRL with a PPOTrainer.
bench-anchors:
	@$(PYTHON) -m venv .venv-anchors
	@.venv-anchors/bin/python -m pip install --quiet torch==2.13.0 $(if $(TORCH_INDEX_URL),--index-url '$(TORCH_INDEX_URL)')
	@.venv-anchors/bin/python -m pip install --quiet trl==1.12.0
	@echo 'ready: python -m benchmarks.ppo_update --anchor'

# One thread each; two to three hours for the writer and two for the judge.
embedded-models: $(STAMP)
	@mkdir -p runs/embedded-models
	@$(BIN)/python -m embedded.train_writer --output_dir runs/embedded-models/writer \
	  --log runs/embedded-models/writer.jsonl
	@cp runs/embedded-models/writer/* embedded/writer/
	@$(BIN)/python -m embedded.sample_pool --policy embedded/writer --output runs/embedded-models/samples.pt
	@$(BIN)/python -m embedded.train_judge --samples runs/embedded-models/samples.pt \
	  --output_dir runs/embedded-models/judge --log runs/embedded-models/judge.jsonl
	@cp runs/embedded-models/judge/* embedded/judge/
	@$(BIN)/python -m embedded.calibrate

clean:
	@rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
