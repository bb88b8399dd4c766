# Two commands do all the set-up: `make run` and `make test`.
PYTHON ?= python3.11
VENV := .venv
# The folders of tests/ that need real processes, real clients, containers or a GPU.
REAL := contract deploy gpu system

.PHONY: run test unit sanitize install check proto images image-cuda lock soak

run: install
	@exec $(VENV)/bin/twinlens serve --read examples/receipt.png

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	PYTHON=$(PYTHON) scripts/install
	@touch $@

check: install
	scripts/check

unit: install
	@echo "Unit tests, with two workers"
	$(VENV)/bin/python -m pytest --numprocesses 2 --dist loadfile $(REAL:%=--ignore=tests/%)

# What starts many processes runs alone, so that they are not short of CPU time.
test: check unit
	@echo "Tests that need real processes, real clients, containers or a GPU"
	$(VENV)/bin/python -m pytest $(REAL:%=tests/%)

# The tests of the C kernels under AddressSanitizer and UndefinedBehaviorSanitizer: about two minutes.
sanitize: install
	scripts/sanitize

soak: install
	$(VENV)/bin/python -m tests.soak

proto: install
	scripts/proto

images:
	scripts/images slim cpu

image-cuda:
	scripts/images cuda

lock:
	scripts/lock
