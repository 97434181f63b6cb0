# Set-up and checks, each complete on a fresh machine: `make demo`, `make test`. Both use a .venv of their own.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Every install is held to the tested releases; torch above all, of which a loose one may pull gigabytes.
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
SOURCES := $(wildcard *.py) py.typed $(shell find convert formats kernels -name '*.py') README.md LICENSE
WHEEL = $(wildcard dist/adapt_convert-*.whl)

.PHONY: demo test bench clean
.DELETE_ON_ERROR:

demo: $(VENV)/.run
	$(BIN)/adapt-convert demo ./demo

# The models of the tests are tiny: more threads gain nothing, and on a busy machine they wait for each other.
test: export OMP_NUM_THREADS ?= 1
test: $(VENV)/.dev .dev/adapt_convert
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest --numprocesses auto --maxprocesses 8 --dist worksteal

# The small sizes of everything under bench/; docs/benchmarks.md has the commands of the large ones.
bench: $(VENV)/.bench
	$(BIN)/python bench/extract.py --sizes 576 --json bench-extract.json
	$(BIN)/python bench/scale.py bench-pair --shapes qwen2.5-0.5b --json bench-scale.json
	$(BIN)/python bench/lorta.py --small --json bench-lorta.json
	$(BIN)/python bench/latte_decode.py --hidden 256 --intermediate 704 --layers 4 --heads 4 --vocab 1024 --json bench-latte_decode.json

clean:
	rm -rf $(VENV) dist demo bench-pair bench-*.json .hypothesis .mypy_cache .pytest_cache .ruff_cache

$(VENV)/.made: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) build hatchling
	touch $@

$(VENV)/.wheel: $(VENV)/.made $(SOURCES)
	rm -rf dist
	$(BIN)/python -m build --wheel --no-isolation --outdir dist > $(VENV)/build.log 2>&1 || { cat $(VENV)/build.log; exit 1; }
	touch $@

# The second line puts a rebuilt wheel of the same version in place; the first then finds everything else as it was.
$(VENV)/.run $(VENV)/.dev $(VENV)/.bench: $(VENV)/.%: $(VENV)/.wheel
	$(INSTALL) "$(WHEEL)[$*]"
	$(INSTALL) --no-deps --force-reinstall "$(WHEEL)"
	touch $@

# Where mypy finds the package under its import name.
.dev/adapt_convert:
	mkdir -p .dev
	ln -s .. $@
