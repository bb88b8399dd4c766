# Two commands do all the set-up: `make run` and `make test`.
PYTHON ?= python3.11
VENV := .venv
PYTEST := $(VENV)/bin/python -m pytest
TWO_WORKERS := --numprocesses 2 --dist loadfile
# The folders of tests/ that `make unit` leaves out.
WITH_PROCESSES := contract system
WITH_EQUIPMENT := deploy gpu

.PHONY: run test unit kernels test-kernels browser screenshots plots sanitize install check proto images image-cuda lock soak fuzz schemathesis open-responses

run: install
	@exec $(VENV)/bin/twinlens serve --read examples/receipt.png

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	PYTHON=$(PYTHON) scripts/install
	@touch $@

check: install
	scripts/check

# The tests of the page run in Chromium, and are skipped without one.
browser:
	scripts/browser

# The screenshots of the page in docs/images.
screenshots: install browser
	$(VENV)/bin/python -m tests.page.screenshots

# Triton, for the tests of the kernels of CUDA cards.
kernels: install
	scripts/kernels

# The tests of these kernels on the CPU, in Triton's interpreter.
test-kernels: kernels
	$(PYTEST) $(TWO_WORKERS) tests/kernels

unit: install
	@echo "Unit tests, with two workers"
	$(PYTEST) $(TWO_WORKERS) $(WITH_PROCESSES:%=--ignore=tests/%) $(WITH_EQUIPMENT:%=--ignore=tests/%)

test: check browser kernels unit
	@echo "Tests with real processes and real clients, with two workers"
	$(PYTEST) $(TWO_WORKERS) $(WITH_PROCESSES:%=tests/%)
	@echo "Tests that need containers or a GPU, and are skipped without them"
	$(PYTEST) $(WITH_EQUIPMENT:%=tests/%)

# The tests of the C kernels under AddressSanitizer and UndefinedBehaviorSanitizer: about two minutes.
sanitize: install
	scripts/sanitize

soak: install
	$(VENV)/bin/python -m tests.soak --poison-every 100

# Random messages to every service and random bodies to both APIs: about five minutes.
SEED ?= 1
COUNT ?= 1000000
BODIES ?= 100000
fuzz: install
	$(VENV)/bin/python -m tests.fuzz --seed $(SEED) --messages $(COUNT) --bodies $(BODIES) \
		--processes 20000

# Generated requests to a running server, by its own OpenAPI document.
URL ?= http://127.0.0.1:8000
schemathesis:
	scripts/schemathesis $(URL)

# The test suite of Open Responses: `git clone https://github.com/openresponses/openresponses` first.
SUITE ?= openresponses
open-responses: install
	scripts/open-responses $(SUITE)

# docs/images/bench.png, from a run of the embedded model: about a minute.
plots: install
	$(VENV)/bin/python -m benchmarks.plots

proto: install
	scripts/proto

images:
	scripts/images slim cpu

image-cuda:
	scripts/images cuda

lock:
	scripts/lock
