# One command per chore, the same here and in CI. `make` alone lists them.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
# Chores share services and processors: they go one after the other, whatever -j says.
.NOTPARALLEL:

#: The Python that the virtual environment is made with, 3.11 or later.
PYTHON ?= python3
VENV ?= .venv
#: Handed to pytest by unit, integration and acceptance: `make unit PYTEST_ARGS="-x -k survey"`.
PYTEST_ARGS ?=
BENCH_ARGS ?=
SOAK_ARGS ?=
LONG ?=

BIN := $(VENV)/bin
# A stamp is as new as the last install of its extras; pyproject.toml decides whether that is still right.
DEMO := $(VENV)/.installed-demo
DEV := $(VENV)/.installed-dev

.PHONY: help
help: ## list these commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | awk -F'\t' '{ printf "make %-12s %s\n", $$1, $$2 }'

.PHONY: demo
demo: $(DEMO) ## install what is needed, start services and workers, survey the standard library
	@$(BIN)/pipeline-app demo

.PHONY: test
test: packages $(DEV) ## get what is missing, then lint and all tests: the command for CI
	@$(MAKE) --no-print-directory lint unit integration faults acceptance

.PHONY: lint
lint: $(DEV) ## ruff, mypy, import-linter
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

.PHONY: unit
unit: $(DEV) ## pure tests, in seconds
	@$(BIN)/pytest tests/unit $(PYTEST_ARGS)

.PHONY: integration
integration: $(DEV) ## tests against a real RabbitMQ and a real MongoDB
	@$(BIN)/pytest tests/integration -n 2 $(PYTEST_ARGS)

.PHONY: acceptance
acceptance: $(DEV) ## the command line as people use it
	@$(BIN)/pytest tests/acceptance -n 2 $(PYTEST_ARGS)

# What takes minutes; the functions themselves are tested with the rest.
LONG_FAULTS := clusters.py broken_variants.py rate_limits.py paced_replay.py

.PHONY: faults
faults: $(DEV) ## kill workers and services under load, a short while
	@$(BIN)/pytest tests/chaos $(addprefix --ignore=tests/chaos/test_,$(LONG_FAULTS)) $(PYTEST_ARGS)

.PHONY: faults-full
faults-full: $(DEV) ## all of it at full size, clusters, and that broken promises would be noticed (CLUSTER_JOBS ...)
	@CHAOS_RATE_JOBS=$${CHAOS_RATE_JOBS:-5000} CHAOS_REPLAY_JOBS=$${CHAOS_REPLAY_JOBS:-10000} \
	CLUSTER_JOBS=$${CLUSTER_JOBS:-10000} CLUSTER_KILLS=$${CLUSTER_KILLS:-10} \
	CLUSTER_STEP_DOWNS=$${CLUSTER_STEP_DOWNS:-20} $(BIN)/pytest $(PYTEST_ARGS) \
	$(addprefix tests/chaos/test_,holds_in_force.py $(LONG_FAULTS))

# Numbers of faults, for runs that have only these: `make chaos KILLS=1000 JOBS=100000`.
CHAOS_KINDS := KILLS CHILD_KILLS FREEZES CUTS RESTARTS STEPDOWNS PRIMARY_KILLS OUTAGES REFUSALS PURGES DOUBLES
MINUTES ?=
JOBS ?=
SEED ?=
CHAOS_ARGS ?=

.PHONY: chaos
chaos: $(DEV) ## every kind of fault for MINUTES=60, or KILLS=1000 JOBS=100000, RESTARTS=50, STEPDOWNS=50, CUTS=50 ...
	@$(BIN)/python -m tests.chaos.driver $(CHAOS_CHOSEN) $(CHAOS_ARGS)

CHAOS_NUMBERS = $(foreach kind,$(CHAOS_KINDS),$(if $($(kind)),--$(shell echo $(subst STEPDOWNS,STEP-DOWNS,$(kind)) | tr '[:upper:]_' '[:lower:]-') $($(kind))))
# Without numbers everything is mixed.
CHAOS_CHOSEN = $(or $(strip $(CHAOS_NUMBERS)),--minutes $(or $(MINUTES),60)) --jobs $(or $(JOBS),20000) --seed $(or $(SEED),1)

.PHONY: soak
soak: $(DEV) ## a steady load for MINUTES=60: jobs a second, lag, memory of every process, and whether it grows
	@$(BIN)/python -m benchmarks.soak --minutes $(or $(MINUTES),60) $(SOAK_ARGS)

.PHONY: model
model: packages $(DEV) ## the protocol checked by spin, and that broken ones would be noticed (LONG=1: with more faults)
	@$(BIN)/python docs/model/check.py $(if $(LONG),--long)

.PHONY: bench
bench: $(DEV) ## stage executions a second, beside plain Celery (BENCH_ARGS="--rounds 1")
	@$(BIN)/python -m benchmarks.throughput $(BENCH_ARGS)

.PHONY: bench-gates
bench-gates: $(DEV) ## what asking about 1,000 holds costs a job (BENCH_ARGS="--holds 10000")
	@$(BIN)/python -m benchmarks.hold_gate $(BENCH_ARGS)

.PHONY: install
install: $(DEV) ## the virtual environment with everything for development

.PHONY: packages
packages: ## what the tests need of the system's packages (apt)
	@PYTHON="$(PYTHON)" VENV="$(VENV)" scripts/system-packages

.PHONY: clean
clean: ## stop local services; remove them, the virtual environment and every cache
	@if [ -e .pipeline/services.json ] && [ -x $(BIN)/pipeline-app ]; then $(BIN)/pipeline-app down; fi
	@rm -rf $(VENV) .pipeline build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(DEMO): pyproject.toml
	@scripts/install "$(PYTHON)" "$(VENV)" local
	@touch $@

# Development includes all that the demo needs.
$(DEV): pyproject.toml
	@scripts/install "$(PYTHON)" "$(VENV)" dev
	@touch $(DEMO) $@
