# make demo | demo-flow | demo-janus | app | test | test-slow | test-all | check | miniature | size | lock | platforms
# All of it in .venv, which is made from requirements.lock with the first Python of 3.11, 3.12, 3.13 that is there.
PYTHON ?= $(firstword $(foreach version,3.11 3.12 3.13,$(shell command -v python$(version))))
VENV := .venv
RUN := $(VENV)/bin/python
PYTEST := OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist worksteal

.PHONY: demo demo-flow demo-janus app test test-slow test-all check miniature size lock platforms environment

demo: environment
	$(RUN) scripts/demo.py

demo-flow: environment
	$(RUN) scripts/demo_flow.py

demo-janus: environment
	$(RUN) scripts/demo_janus.py

app: environment
	@$(VENV)/bin/uv pip install --quiet --python $(RUN) --no-build-isolation --constraint requirements.lock -e '.[app]'
	$(RUN) scripts/app.py --config configs/miniature_app.yaml

test: environment check   # the quick lane: at most four minutes on two idle cores
	$(PYTEST) -m "not slow"

test-slow: environment platforms   # the rest, with more extras; `quantize` apart, because its packages slow every start down
	@$(VENV)/bin/uv pip install --quiet --python $(RUN) --no-build-isolation --constraint requirements.lock -e '.[app,browser,ocr]'
	$(PYTEST) -m slow --ignore tests/test_quantization.py
	$(VENV)/bin/uv pip install --quiet --python $(RUN) --no-deps --target $(VENV)/quantize $$($(RUN) -c "import tomllib; \
	  print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['quantize'])")
	PYTHONPATH=$(VENV)/quantize OMP_NUM_THREADS=1 $(RUN) -m pytest tests/test_quantization.py

test-all: test test-slow   # everything: at most twenty minutes

check: environment
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

miniature: environment
	$(RUN) -m miniature.build

size: $(VENV)/ready
	@git ls-files '*.py' | xargs wc -l | sort -n

lock: $(VENV)/ready
	$(VENV)/bin/uv pip compile --quiet --universal --python-version 3.11 pyproject.toml --extra dev --extra serve \
	  --generate-hashes --no-header --no-annotate -o requirements.lock

platforms: $(VENV)/ready   # what cannot be run here is at least resolved
	@for platform in x86_64-unknown-linux-gnu aarch64-unknown-linux-gnu aarch64-apple-darwin; do \
	  for version in 3.11 3.12 3.13; do \
	    MACOSX_DEPLOYMENT_TARGET=14.0 $(VENV)/bin/uv pip install --quiet --dry-run --target $(VENV)/nowhere --require-hashes \
	      --python-platform $$platform --python-version $$version -r requirements.lock || exit 1; \
	    echo "resolves: Python $$version, $$platform"; \
	  done; \
	done

# The project itself, editable: its files are imported from this checkout, wherever the environment lies.
environment: $(VENV)/ready
	@$(VENV)/bin/uv pip install --quiet --python $(RUN) --no-deps --no-build-isolation -e .

$(VENV)/ready: requirements.lock
	@test -n "$(PYTHON)" || { echo "make: install Python 3.11, 3.12 or 3.13, or name one: make PYTHON=..."; exit 2; }
	@echo "$(VENV): $$($(PYTHON) --version), $(PYTHON)"
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet uv==0.13.8
	$(VENV)/bin/uv pip install --quiet --python $(RUN) --require-hashes --compile-bytecode -r requirements.lock
	touch $@
