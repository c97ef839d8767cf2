# `make demo` and `make test` do all their own set-up, in $(VENV). See CONTRIBUTING.md.
#   PYTHON  the interpreter that creates the environment (3.10 or newer)
#   VENV    where it goes
#   ARGS    extra arguments for `sparseattn demo` or pytest
PYTHON ?= python3
VENV ?= .venv
ARGS ?=

BIN := $(VENV)/bin
# Twice quiet: errors still print, notices about mirrors and scripts do not.
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input -qq
OLDEST_TRITON := triton==3.6.0

.PHONY: demo test lint wheel clean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed
	$(BIN)/sparseattn demo $(ARGS)

test: lint
	CI=true HF_HUB_OFFLINE=1 MPLBACKEND=Agg OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/python -m ruff check .
	$(BIN)/python -m mypy

wheel: $(VENV)/.installed-dev
	$(BIN)/python -m build --wheel --no-isolation

clean:
	rm -rf $(VENV) dist build demo .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch comes first and pinned, so that nothing else chooses its build.
$(VENV)/.torch: constraints.txt
	@echo "Creating $(VENV) and installing torch ..."
	@$(PYTHON) -c 'import sys; sys.exit("sparseattn needs Python 3.10 or newer, not " + sys.version) if sys.version_info < (3, 10) else None'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) install -c constraints.txt torch
	@touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml
	@echo "Installing sparseattn ..."
	@$(PIP) install -c constraints.txt -e '.[hf,viz,cli]'
	@touch $@

# The second Triton is for tests/compile alone, which puts it on the path of a process of its own.
$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "Installing the tools that tests need ..."
	@$(PIP) install -c constraints.txt -e '.[dev]'
	@if [ "$$(uname -s)" = Linux ] && [ ! -d $(VENV)/triton-3.6 ]; then \
		$(PIP) install --no-deps --target $(VENV)/triton-3.6 $(OLDEST_TRITON); \
	fi
	@touch $@
