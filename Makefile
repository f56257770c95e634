# One place for the commands of this repository. Versions are pinned in constraints/, one file for each tested set of them,
# and those of the engines' own environments in clipo_megatron/serving/requirements.

# The first that runs and is new enough; another: make install PYTHON=/path/to/python
NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for python in python3.11 python3; do \
	$$python -c '$(NEW_ENOUGH)' 2>/dev/null && command -v $$python && break; done)
VENV := .venv
# The tested set: a file of constraints/. Another, beside the first: make install SET=megatron-0.19 VENV=.venv-0.19
SET ?= megatron-0.16
CONSTRAINTS := constraints/$(SET).txt
# Named after what was installed, so that a change of pyproject.toml or of the versions installs again and nothing else does.
STAMP := $(VENV)/.installed-$(shell cat pyproject.toml $(CONSTRAINTS) constraints/shared.txt | cksum | tr ' ' '-')
TORCH := $(shell sed -n '/^torch==/p' constraints/shared.txt)
# Which build of torch this is depends on where pip looks. Where that offers the GPU build only and this machine has no
# GPU, hand pip the options that name a source of CPU builds: make install TORCH_OPTIONS="..."
TORCH_OPTIONS ?=
# Tests run in so many processes, each of which starts ranks and servers of its own; another number: make test JOBS=1.
# Three keep two cores busy while some tests wait for a deadline; where many servers run, memory is for two.
PYTEST = $(VENV)/bin/python -m pytest -n $(or $(JOBS),$(1)) --dist loadfile --no-loadscope-reorder --durations=40

.DEFAULT_GOAL := help
.PHONY: help install engines test test-rest test-all quickstart quickstart-sglang lint clean

help: ## Show this list.
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | column -t -s '|' 2>/dev/null \
		|| sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1   \2/p' $(MAKEFILE_LIST)

install: $(STAMP) ## Set up .venv with everything pinned in constraints/; does nothing when that is done.

engines: install ## Set up SGLang and vLLM for servers without a GPU, each in an environment of its own; once.
	CLIPO_PIP_OPTIONS="$(TORCH_OPTIONS)" $(VENV)/bin/python -m clipo_megatron.serving.environment

# CONTRIBUTING.md says what each of them proves.
test: ready ## Set up and run the tests that every change must pass, real servers too.
	$(call PYTEST,3) -m "not full"

test-rest: ready ## Set up and run the tests that `make test` leaves out.
	$(call PYTEST,2) -m full

test-all: ready ## Set up and run all tests.
	$(call PYTEST,2)

.PHONY: ready
ready: install $(if $(CLIPO_TESTS_WITHOUT_ENGINES),,engines)
	$(VENV)/bin/python examples/quickstart/smollm2.py models/SmolLM2-135M-Instruct  # once; tests use it too

quickstart: install ## Set up and watch CLIPO teach a small model arithmetic, on two ranks; 8 minutes on two cores.
	$(VENV)/bin/python examples/quickstart/quickstart.py

quickstart-sglang: install ## The same, with the generation on an SGLang server.
	CLIPO_PIP_OPTIONS="$(TORCH_OPTIONS)" $(VENV)/bin/python examples/served/served.py

lint: install ## Set up and check style and formatting.
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

clean: ## Remove .venv and caches; models, runs, checkpoints and engines stay.
	rm -rf $(VENV) build .pytest_cache .ruff_cache *.egg-info

$(STAMP):
	@test -n "$(PYTHON)" && $(PYTHON) -c '$(NEW_ENOUGH)' || { \
		echo "Python 3.11 or newer is needed, and $(or $(PYTHON),python3) is $$($(or $(PYTHON),python3) --version 2>&1)." >&2; \
		echo "Install it, or name another: make install PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "Setting up $(VENV); the first time this takes a few minutes."
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check $(TORCH_OPTIONS) "$(TORCH)"
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS) --editable ".[train,dev]"
	@rm -f $(VENV)/.installed-*
	@touch $@
