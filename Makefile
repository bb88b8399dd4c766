# Two commands do all the set-up: `make run` and `make test`.
PYTHON ?= python3.11
VENV := .venv

.PHONY: run test install check proto

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

proto: install
	scripts/proto
