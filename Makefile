# make demo    the whole of CAPE on real images, in a few minutes
# make test    build, then run every test
# make s3      an S3 server (moto) in an environment of its own, for the tests of object stores; `make test` makes it too
# make endurance   the minutes-long tests of kills, clusters and job servers
# make lint    ruff, mypy, hadolint and clang-format's check
# make clean   remove what was built (make distclean removes the environment too)
#
# PYTHON picks the interpreter that .venv is made from; CAPE_DATA a folder of Parquet datasets;
# CAPE_CUDA=auto|0|1 and CAPE_CUDA_ARCHS what is compiled.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

.PHONY: all demo test s3 endurance lint clean distclean build
all: build

# One stamp per slow step: a second `make` does none of them again.
$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "cape: error: no python3 found; install Python 3.10 or newer."; exit 2; }
	@echo "Creating $(VENV) with $(PYTHON)"
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.requirements: requirements.lock | $(BIN)/python
	@echo "Installing the pinned requirements into $(VENV) (once; about 2 GB with torch's CUDA libraries)"
	@$(PIP) install -r requirements.lock
	@touch $@

$(VENV)/.package: pyproject.toml setup.py $(VENV)/.requirements
	@echo "Installing cape into $(VENV) and building the native extension (once; about a minute)"
	@$(PIP) install --no-build-isolation --no-deps -e .
	@touch $@

# Always asked, seldom does anything: CMake knows what has changed.
build: $(VENV)/.package
	@mkdir -p build
	@$(BIN)/python setup.py --quiet build_ext --inplace > build/build.log 2>&1 || { cat build/build.log; exit 1; }
	@grep -h "CAPE:" build/build.log || true

demo: build
	@$(BIN)/python -m cape.demo

# moto's AWS client library needs an older python-dateutil than requirements.lock holds.
$(VENV)/s3/.installed: tests/store/moto.lock | $(BIN)/python
	@echo "Installing an S3 server for the tests into $(VENV)/s3 (once)"
	@$(BIN)/python -m venv $(VENV)/s3
	@$(VENV)/s3/bin/python -m pip --disable-pip-version-check --quiet install -r tests/store/moto.lock
	@touch $@

s3: $(VENV)/s3/.installed

# Threads that wait sleep: beside another busy process, threads that spin made float64 convolutions thirty times slower.
# A file's tests stay in one process, which share what is made once; each process has a Ray of its own.
TEST_PROCESSES ?= 2
test endurance: export OMP_WAIT_POLICY ?= passive

test: build s3
	@$(BIN)/ctest --test-dir $$($(BIN)/python setup.py --quiet build_dir) --output-on-failure --no-tests=error
	@$(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile

endurance: build
	@$(BIN)/python -m pytest -m endurance

lint: $(VENV)/.requirements
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/hadolint ray_jobs/Dockerfile
	@$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' 'csrc/*.cuh')

clean:
	rm -rf build dist demo *.egg-info cape/_C*.so .pytest_cache .ruff_cache .mypy_cache .hypothesis
	rm -f $(VENV)/.package

distclean: clean
	rm -rf $(VENV)
