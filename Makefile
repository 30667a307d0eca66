# All that a bare checkout needs is python3 (3.10 or later, with venv), a C++20 compiler, make and git.
PYTHON ?= python3
# More for pytest or the demo: make test ARGS="-k lrn"
ARGS ?=

PY := .venv/bin/python
SOURCES := setup.py pyproject.toml $(wildcard _build/*.py) $(shell find csrc -type f)
CPP := $(shell find csrc emulator -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

# What `make sanitize` builds with. Python leaks by design, and torch's allocations outlive the process.
SANITIZERS := -fsanitize=address,undefined
SANITIZE := -O1 -g1 -fno-omit-frame-pointer -fno-sanitize-recover=undefined $(SANITIZERS)
RUNTIMES = $(foreach name,libasan.so libubsan.so libstdc++.so,$(shell $(or $(CXX),c++) -print-file-name=$(name)))

.PHONY: help demo test check style bench sass gpu-check gpu-results sanitize clean
help:
	@echo "make demo    networks on real photographs and digits, reference against fastconv"
	@echo "make test    the test suite"
	@echo "make bench   times single layers of every op; whole networks: python -m fastconv bench"
	@echo "make sass    what the CUDA kernels can reach, from their machine code and the planner; needs no GPU"
	@echo "make gpu-check OUT=folder   builds, proves and times the GPU kernels, in 9.5 minutes; RESUME=folder goes on from there"
	@echo "make gpu-results FROM=folder   puts what gpu-check found where the repository keeps it"
	@echo "make sanitize   the CPU kernels under address and undefined-behaviour sanitizers"
	@echo "make check   formatting, lint and types: only looks"
	@echo "make style   formatting and lint: fixes"
	@echo "make clean   removes everything that was built or installed here"

demo: .venv/built
	$(PY) -m fastconv demo $(ARGS)

test: .venv/built
	$(PY) -m pytest -n auto --maxprocesses 8 --dist worksteal $(ARGS)

bench: .venv/built
	$(PY) -m pytest benchmarks $(ARGS)

sass: .venv/built
	$(PY) tools/sass.py $(ARGS)

# Without .venv: it runs in the python3 whose torch knows the GPU.
gpu-check:
	$(if $(wildcard .venv/built),$(PY),$(PYTHON)) tools/gpu_check.py $(or $(OUT),gpu-check) \
		$(if $(RESUME),--resume $(RESUME)) $(ARGS)

gpu-results:
	$(if $(wildcard .venv/built),$(PY),$(PYTHON)) tools/gpu_results.py $(or $(FROM),gpu-check)

# In a copy of the tree, so that neither its objects nor its library get in the way of the others. Objects are kept.
sanitize: .venv/built
	mkdir -p build/sanitize
	find build/sanitize -mindepth 1 -maxdepth 1 ! -name build -exec rm -r {} +
	git ls-files -z --cached --others --exclude-standard | tar c --null -T - | tar x -C build/sanitize
	cd build/sanitize && FASTCONV_CUDA=0 CXXFLAGS="$(SANITIZE)" LDFLAGS="$(SANITIZERS)" \
		$(abspath $(PY)) setup.py build_ext --inplace
	cd build/sanitize && export LD_PRELOAD="$(RUNTIMES)" ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=. && \
		$(abspath $(PY)) -m pytest -q -n 2 -p no:cacheprovider tests/kernels/cpu tests/ops/test_op_numerics.py \
			-k "auto and forward or kernels" $(ARGS) && \
		$(abspath $(PY)) tests/support/random_calls.py --backend cpu --calls 500 --seed 11

check: .venv/built
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	.venv/bin/clang-format --dry-run --Werror $(CPP)
	$(PY) -m mypy

style: .venv/built
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .
	.venv/bin/clang-format -i $(CPP)

clean:
	rm -rf .venv .venv-cpu build dist *.egg-info fastconv/_C.*.so compile_commands.json
	rm -rf .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks

.venv/torch:
	@$(PYTHON) -c 'import ensurepip, sys; assert sys.version_info >= (3, 10)' 2>/dev/null || \
		{ echo "fastconv: $(PYTHON) is not Python 3.10 or later with venv; install it (Debian, Ubuntu:" \
		  "apt install python3-venv python3-dev), or name another: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv .venv
	$(PY) -m pip install torch torchvision "setuptools>=77" pybind11 ninja
	@touch $@

# The first line builds, with its progress visible, what the second installs.
.venv/built: .venv/torch $(SOURCES)
	$(PY) setup.py build_ext --inplace
	$(PY) -m pip install --no-build-isolation -e ".[demo,dev,test]"
	@touch $@
