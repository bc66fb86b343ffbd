# Two commands do it all: `make train` and `make test`. Both set up .venv first; they need Python 3.11 and make.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
UV_VERSION := 0.13.9
VENV := .venv
BIN := $(VENV)/bin
BUILD := $(if $(shell nvidia-smi -L 2>/dev/null),gpu,cpu)
LOCK := requirements/$(BUILD).lock
STACKS := requirements/stacks.txt

.PHONY: train test test-long docs setup browser lock clean

train: setup
	$(BIN)/videoseg train

# Two files at a time (for two cores and 24 GiB), in their order: long ones come early.
test: setup browser
	$(BIN)/python -m pytest -m "not long" -n 2 --dist loadfile --no-loadscope-reorder

test-long: setup
	$(BIN)/python -m pytest -m long --timeout 14400 -s

# A site that needs no network: open site/index.html.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

setup: $(VENV)/.ready-$(BUILD)

$(VENV)/.ready-$(BUILD): $(LOCK) $(STACKS) setup.cfg
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet uv==$(UV_VERSION)
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --compile-bytecode -r $(LOCK)
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --compile-bytecode --target $(VENV)/stacks -r $(STACKS)
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation -e .
	touch $@

# The report's page is tested in a real browser; where none can be installed, those tests are left out, and say so.
browser:
	@command -v chromium chromium-browser google-chrome > /dev/null || ( test "$$(id -u)" = 0 && command -v apt-get > /dev/null && \
		( apt-get install -qq -y --no-install-recommends chromium || ( apt-get update -qq && apt-get install -qq -y --no-install-recommends chromium ) ) > /dev/null ) || \
		echo "no Chromium: the report's page is not tested (install chromium)"

# The lock files: exact versions, no host names. Run after a change of requirements/*.in.
lock: setup
	$(BIN)/uv pip compile --quiet --python-version 3.11 --no-header --no-annotate --no-emit-index-url --no-emit-find-links \
		--override requirements/cpu-overrides.txt requirements/cpu.in -o requirements/cpu.lock
	$(BIN)/uv pip compile --quiet --python-version 3.11 --no-header --no-annotate --no-emit-index-url --no-emit-find-links \
		requirements/gpu.in -o requirements/gpu.lock

clean:
	rm -rf $(VENV) build site *.egg-info
