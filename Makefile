# Two commands do all the set-up: `make run` and `make test`.
PYTHON ?= python3.11
VENV := .venv

.PHONY: run test sanitize install check proto images image-cuda lock soak

run: install
	@exec $(VENV)/bin/twinlens serve --read examples/receipt.png

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	PYTHON=$(PYTHON) scripts/install
	@touch $@

check: install
	scripts/check

test: check
	$(VENV)/bin/python -m pytest

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
