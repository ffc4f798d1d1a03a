# Two commands for users: `make quickstart` and `make test`. Each sets up what it needs.
VENV ?= .venv
BIN := $(VENV)/bin
STORAGE ?= runs
# Ray's workers are as important as the tests beside them; each process has one thread's share.
PYTEST := OMP_NUM_THREADS=1 RAY_worker_niceness=0 $(BIN)/python -m pytest
export RAY_TRAIN_V2_ENABLED := 1
export HF_HUB_DISABLE_TELEMETRY := 1
.DEFAULT_GOAL := help
.PHONY: help setup quickstart test slow walk nightly test-fast lint type bench soak faults lock audit clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

setup: $(VENV)/.ready ## make the environment from the lock

$(VENV)/.ready: requirements.lock pyproject.toml
	@bash tools/check_system.sh
	@echo "==> making $(VENV) from requirements.lock (several GB the first time)"
	@python3.11 -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check "uv==$(shell cat tools/uv-version)"
	@$(BIN)/uv pip sync --quiet --python $(BIN)/python requirements.lock
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --editable .
	@touch $@
	@echo "==> environment ready: $(BIN)/kdscale --help"

quickstart: setup ## a miniature distillation study, from drawn shards to a report
	@$(BIN)/python sweeps/quickstart.py --storage $(STORAGE)

test: setup ## the whole test suite but the slow part; tests that start Ray run beside the others
	@log=$$(mktemp); trap 'kill $$ray 2>/dev/null; rm -f $$log' EXIT INT TERM; \
	$(PYTEST) -m "ray and not slow and not gpu" > $$log 2>&1 & ray=$$!; \
	$(PYTEST) -m "not ray and not slow and not gpu"; status=$$?; \
	echo "==> waiting for the tests that start Ray"; \
	wait $$ray || status=$$?; cat $$log; exit $$status

slow: setup ## the tests that take longer: clusters, kills, the walk of every cell at true size
	@$(PYTEST) -m "slow and not gpu"

walk: setup ## one step of every cell of every table at true size; goes on where it was
	@$(BIN)/kdscale walk sweeps/table*.py sweeps/figure*.py sweeps/control*.py --storage $(STORAGE)/walk

nightly: test slow ## what is to run once a day: all tests, and an hour of sweeps back to back
	@$(BIN)/python benchmarks/soak_sweeps.py --minutes 60

test-fast: setup ## unmarked tests only
	@$(PYTEST) -m "not slow and not gpu and not ray and not parity"

lint: setup ## ruff: rules and format
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

type: setup ## basedpyright
	@$(BIN)/basedpyright

bench: setup ## CPU benchmarks, each beside its baseline
	@for script in benchmarks/[a-z]*.py; do echo "== $$script"; $(BIN)/python $$script || exit 1; done

soak: setup ## half an hour of sweeps back to back: memory and open files stay flat
	@$(BIN)/python benchmarks/soak_sweeps.py --minutes 30

# What was done is kept there: the same command goes on. Options, e.g. FAULTS="--only worker".
FAULT_ROWS ?= /tmp/kdscale-faults
faults: setup ## the fault matrix, into docs/reliability.md; as root, in two hours or so
	@PYTHONPATH=tests $(BIN)/python -m faults --work $(FAULT_ROWS) --at-once 2 \
	  --page docs/reliability.md $(FAULTS)

lock: setup ## resolve pyproject.toml again into requirements.lock
	@$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --no-emit-index-url \
	  --no-annotate --extra dev --extra cluster --extra team pyproject.toml --output-file requirements.lock \
	  --custom-compile-command "make lock"
	@$(BIN)/uv pip compile --quiet --python-platform linux --python-version 3.11 \
	  --no-emit-index-url --no-annotate --constraint requirements.lock --extra cluster --extra gpu \
	  pyproject.toml --output-file requirements-gpu.lock --custom-compile-command "make lock"

audit: setup ## known vulnerabilities of both locks; asks pypi.org, so it needs a network
	@$(BIN)/uv tool run pip-audit@2.10.1 --no-deps --disable-pip --progress-spinner off \
	  --requirement requirements.lock --requirement requirements-gpu.lock $(AUDIT)

clean: ## remove the environment and caches, not the results
	@rm -rf $(VENV) .pytest_cache .ruff_cache
