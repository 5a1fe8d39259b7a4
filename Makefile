# make demo    move a running guest between two hosts on this machine (ARGS="--scenario commit-lost" for others)
# make test    everything that CI checks, but lint
# make lint    ruff and mypy --strict
# make bench   figures, each beside the raw limit of the same run
# make chaos   random histories of one machine and two hosts, for an hour (ARGS="--minutes 600", "--seed N")
# make fuzz    hostile blobs, schemas and streams, for an hour (ARGS="--minutes 600", "--seed N")
# make guest   build the demo's guest again (needs gcc and binutils)
# Each does its own set-up: a .venv with the versions of constraints.txt.

PYTHON ?= python3
BIN := .venv/bin
ARGS ?=

.PHONY: demo test lint bench chaos fuzz guest clean

demo: .venv/.run
	$(BIN)/ferry demo $(ARGS)

test: .venv/.dev
	$(BIN)/python -m pytest $(ARGS)

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/.dev
	$(BIN)/python -m tests.bench $(ARGS)

chaos: .venv/.dev
	$(BIN)/python -m tests.histories $(ARGS)

fuzz: .venv/.dev
	$(BIN)/python -m tests.fuzz $(ARGS)

guest:
	$(MAKE) -C devices/vcpu/guest

.venv/.run: pyproject.toml constraints.txt .ci/setup
	PYTHON=$(PYTHON) .ci/setup run

.venv/.dev: pyproject.toml constraints.txt .ci/setup
	PYTHON=$(PYTHON) .ci/setup dev

clean:
	rm -rf .venv dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis
