# make demo | demo-flow | demo-janus | test | test-slow | test-all | check | miniature | size | lock   (all of it in .venv, made from requirements.lock)
PYTHON ?= python3.11
VENV := .venv
RUN := $(VENV)/bin/python
PYTEST := OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist worksteal

.PHONY: demo demo-flow demo-janus test test-slow test-all check miniature size lock environment

demo: environment
	$(RUN) scripts/demo.py

demo-flow: environment
	$(RUN) scripts/demo_flow.py

demo-janus: environment
	$(RUN) scripts/demo_janus.py

test: environment check   # the quick lane: at most four minutes on two idle cores
	$(PYTEST) -m "not slow"

test-slow: environment   # the rest, with the extra `ocr`; `quantize` apart, because its packages slow every start down
	@$(VENV)/bin/uv pip install --quiet --python $(RUN) --no-build-isolation --constraint requirements.lock -e '.[ocr]'
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
	$(VENV)/bin/uv pip compile --quiet pyproject.toml --extra dev --extra serve --generate-hashes --no-header \
	  --no-annotate -o requirements.lock

# The project itself, editable: its files are imported from this checkout, wherever the environment lies.
environment: $(VENV)/ready
	@$(VENV)/bin/uv pip install --quiet --python $(RUN) --no-deps --no-build-isolation -e .

$(VENV)/ready: requirements.lock
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet uv==0.13.8
	$(VENV)/bin/uv pip install --quiet --python $(RUN) --require-hashes --compile-bytecode -r requirements.lock
	touch $@
