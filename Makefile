# `make serve` and `make test` are all a new machine needs: they install what is missing, once.
PYTHON ?= python3
PORT ?= 8000
REPLICAS ?=
MODEL ?=
ARGS ?=
K ?=
JOBS ?= 2
UPGRADE ?= --upgrade

VENV := .venv
BIN := $(VENV)/bin
# A driver that answers decides; override with ENGINE=cpu or ENGINE=cuda.
ENGINE ?= $(shell nvidia-smi -L 2>/dev/null | grep -q GPU && echo cuda || echo cpu)
INSTALLED := $(VENV)/.installed-$(ENGINE)
INSTALLED_DEV := $(VENV)/.installed-dev

.PHONY: help install serve cluster test e2e lint format bench chaos lock clean

help: ## Show this
	@grep -hE '^[a-z0-9]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

install: $(INSTALLED) ## Install the server into .venv (CUDA if an NVIDIA driver answers, else CPU)

serve: $(INSTALLED) ## Serve the model: PORT=8000 MODEL=folder-or-id ARGS="more options"
	@exec $(BIN)/synthia-vllm serve --port $(PORT) $(if $(MODEL),--model $(MODEL)) $(ARGS)

cluster: $(INSTALLED) ## Serve with several replicas on Ray: REPLICAS=2 PORT=8000 MODEL=folder-or-id ARGS="more options"
	@exec $(BIN)/synthia-vllm cluster up $(if $(REPLICAS),--replicas $(REPLICAS)) --port $(PORT) $(if $(MODEL),--model $(MODEL)) $(ARGS)

# Those that start the real engine or Ray have the machine for themselves; 5 is pytest's code for none that matches.
test: $(INSTALLED_DEV) ## Run all tests, the end-to-end ones included; K=name for some, JOBS=2 at once where they may
	@$(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile -m "not e2e" $(if $(K),-k "$(K)"); many=$$?; \
	$(BIN)/python -m pytest -m e2e $(if $(K),-k "$(K)"); alone=$$?; \
	case "$$many $$alone" in "0 0"|"0 5"|"5 0") ;; *) exit 1 ;; esac

e2e: $(INSTALLED_DEV) ## Run only the tests that start a real engine
	$(BIN)/python -m pytest -m e2e

lint: $(INSTALLED_DEV) ## Check format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(INSTALLED_DEV) ## Format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(INSTALLED_DEV) ## Measure against the card's script, plain vLLM, llama.cpp and Ray, in one run (20 minutes on 2 cores)
	$(BIN)/synthia-vllm bench run --profile quick $(ARGS)

chaos: $(INSTALLED_DEV) ## Kill replicas (null engines) under 2,000 streams and check every byte (about 4 minutes)
	$(BIN)/python -m benchmarks.chaos $(ARGS)

lock: $(BIN)/python ## Make the lock files from pyproject.toml; UPGRADE= keeps the pins that are there
	$(BIN)/pip install --quiet uv
	for engine in cpu cuda; do \
	  $(BIN)/uv pip compile pyproject.toml --extra $$engine --extra cluster --extra demo --quiet --no-annotate $(UPGRADE) \
	    --override requirements/overrides.txt --override requirements/overrides-$$engine.txt \
	    $$(test $$engine = cpu && echo $(if $(PIP_FIND_LINKS),--find-links $(PIP_FIND_LINKS))) \
	    --custom-compile-command "make lock" --no-emit-index-url --no-emit-find-links \
	    -o requirements/$$engine.txt && sed -i 's/+cpu$$//' requirements/$$engine.txt || exit 1; \
	done
	$(BIN)/uv pip compile pyproject.toml --extra dev --extra bench --quiet --no-annotate $(UPGRADE) \
	  --constraint requirements/cpu.txt --custom-compile-command "make lock" --no-emit-index-url \
	  -o requirements/dev.txt
	$(BIN)/uv pip compile pyproject.toml --extra eval --quiet --no-annotate $(UPGRADE) \
	  --constraint requirements/cpu.txt --constraint requirements/dev.txt \
	  --custom-compile-command "make lock" --no-emit-index-url -o requirements/eval.txt

clean: ## Remove the environment and what tools left behind
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed: make PYTHON=python3.12 …"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { echo "python3 -m venv failed; on Debian: apt-get install python3-venv"; exit 1; }

# torch first and with its dependencies: a CUDA build needs NVIDIA's packages, a CPU build does not have them.
$(INSTALLED): requirements/$(ENGINE).txt pyproject.toml | $(BIN)/python
	@echo "Installing for $(ENGINE)$(if $(filter cpu,$(ENGINE)), (no NVIDIA driver answers)) into $(VENV): about two minutes"
	@$(BIN)/pip install --quiet --constraint requirements/$(ENGINE).txt torch
	@$(BIN)/pip install --quiet --no-deps --requirement requirements/$(ENGINE).txt
	@$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

$(INSTALLED_DEV): requirements/dev.txt requirements/eval.txt requirements/tools.txt $(INSTALLED)
	@echo "Installing the test tools"
	@$(BIN)/pip install --quiet --no-deps --requirement requirements/dev.txt --requirement requirements/eval.txt \
	  --requirement requirements/tools.txt
	@touch $@
