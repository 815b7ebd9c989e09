# Every target sets up what it needs on a machine that has Python 3.11 or newer, pip and make.
#
# Two environments, so that the demo runs on what a fleet installs and nothing else:
#   .venv      midge and what it runs on, without TensorFlow     demo
#   .venv-dev  the same, TensorFlow and the tools of the trade   test, check, bench, campaign, soak
# Each is installed once, and again when pyproject.toml or constraints.txt changes.

SHELL := /bin/sh
.DEFAULT_GOAL := help
.PHONY: help demo test check bench campaign fuzz soak pi-test pi-boot lock sbom clean mosquitto mosquitto-or-fail qemu-or-fail board-or-fail python

# TensorFlow Lite's lean runtime exists for Python 3.11 and no newer, so that one comes first;
# then those that the demo was tried on; then whatever there is, if it is new enough.
ifndef PYTHON
PYTHON := $(shell for each in python3.11 python3.12 python3.13 python3; do \
	"$$each" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& echo "$$each" && break; done)
endif

# Debian and Homebrew put mosquitto where a user's PATH does not always look.
export PATH := $(PATH):/usr/sbin:/usr/local/sbin:/opt/homebrew/sbin:/opt/homebrew/bin

# What to hand on to pytest or the demo: make test ARGS='-k chunks'
ARGS ?=

# Tests that run side by side: most of them wait for processes and networks most of the time.
# One after another: make test AT_ONCE=0
AT_ONCE ?= 3

# How long `make fuzz` runs, over all targets; starting them takes a little more.
MINUTES ?= 16

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

demo: .venv/.ready mosquitto  ## train on ten people's wearables, on this machine, behind TLS
	@.venv/bin/midge demo $(ARGS)

test: .venv-dev/.ready mosquitto-or-fail  ## run every test, with a real broker and real TensorFlow
	@.venv-dev/bin/python -m pytest -n $(AT_ONCE) --dist worksteal $(ARGS)

check: .venv-dev/.ready  ## lint, formatting and types
	@echo "ruff check";          .venv-dev/bin/ruff check .
	@echo "ruff format --check"; .venv-dev/bin/ruff format --check .
	@echo "mypy --strict";       .venv-dev/bin/mypy --strict

bench: .venv-dev/.ready mosquitto-or-fail  ## print every benchmark's table
	@for each in benchmarks/bench_*.py; do \
		.venv-dev/bin/python -m "benchmarks.$$(basename "$$each" .py)" $(ARGS) || exit 1; \
	done

campaign: .venv-dev/.ready mosquitto-or-fail  ## run the long random tests that `test` leaves out
	@.venv-dev/bin/python -m pytest -m campaign $(ARGS)

fuzz: .venv-dev/.fuzz  ## feed every parser damaged bytes: make fuzz MINUTES=16
	@.venv-dev/bin/python -m tests.fuzz.run --minutes $(MINUTES) $(ARGS)

pi-test: .venv-dev/.ready mosquitto-or-fail qemu-or-fail  ## run the Pythons of Raspberry Pi OS on an emulated Pi's processor
	@.venv-dev/bin/python -m pytest -m pi $(ARGS)

pi-boot: .venv-dev/.ready mosquitto-or-fail board-or-fail  ## boot a flashed card on an emulated board; cut its power in a round
	@.venv-dev/bin/python -m tests.pi.boot $(ARGS)

# How many seeds `make soak` tries; each is a federation of its own. After them, for how many
# minutes real processes are killed.
SEEDS ?= 10000
KILL_MINUTES ?= 60

soak: .venv-dev/.ready mosquitto-or-fail  ## simulate SEEDS federations under faults; kill real processes for KILL_MINUTES
	@.venv-dev/bin/python -m tests.simulation --seeds $(SEEDS) $(ARGS)
	@.venv-dev/bin/python -m tests.chaos --minutes $(KILL_MINUTES)

lock: .venv-dev/.ready  ## write the hash-locked requirements again, for devices and servers
	@.venv-dev/bin/python -m tests.locks

sbom: python  ## list what a device and a server consist of, as CycloneDX JSON, in dist/
	@$(call fresh_venv,.venv-sbom/tool)
	@.venv-sbom/tool/bin/python -m pip install --quiet --disable-pip-version-check $(CYCLONEDX)
	@$(call list_parts,device,server/fleet/flash/locks/py$(PY).txt)
	@$(call list_parts,server,server/requirements-py$(PY).txt)

clean:  ## remove the environments and caches; fleets and their keys stay
	rm -rf .venv .venv-dev .venv-sbom build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# ── What they need ───────────────────────────────────────────────────────────────────────

.venv/.ready: pyproject.toml constraints.txt | python
	$(call install,.venv,demo,about 80 MB)

.venv-dev/.ready: pyproject.toml constraints.txt | python
	$(call install,.venv-dev,dev,about 450 MB: TensorFlow is among it)

.venv-dev/.fuzz: .venv-dev/.ready
	@.venv-dev/bin/python -m pip install --quiet --disable-pip-version-check \
		-c constraints.txt -e '.[fuzz]'
	@touch $@

define install
	@echo "Installing midge[$(2)] into $(1) ($(3)) …"
	@"$(PYTHON)" -m venv $(1) || { \
		echo "make: $(PYTHON) cannot make a virtual environment." \
			"On Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@$(1)/bin/python -m pip install --quiet --disable-pip-version-check \
		-c constraints.txt -e '.[$(2)]' || { \
		echo "make: pip could not install midge[$(2)]; its reason is above." >&2; exit 1; }
	@touch $@
endef

# What `sbom` lists: an environment with the locked wheels and midge in it, and nothing else.
CYCLONEDX := 'cyclonedx-bom==7.5.0' 'cyclonedx-python-lib[json-validation]'
PY = $(shell "$(PYTHON)" -c 'import sys; print("%d%d" % sys.version_info[:2])')

define list_parts
	echo "Listing what a $(1) consists of, with Python of version $(PY) …"; \
	test -f $(2) || { echo "make: there is no $(2); take Python 3.11 or 3.13" >&2; exit 1; }; \
	$(call fresh_venv,.venv-sbom/$(1)); mkdir -p dist; \
	.venv-sbom/$(1)/bin/python -m pip install --quiet --disable-pip-version-check \
		--require-hashes --only-binary :all: -r $(2) && \
	.venv-sbom/tool/bin/python -m pip --python .venv-sbom/$(1)/bin/python install --quiet \
		--disable-pip-version-check --no-deps -e . && \
	.venv-sbom/$(1)/bin/python -m pip uninstall --quiet --yes setuptools pip && \
	.venv-sbom/tool/bin/cyclonedx-py environment --pyproject pyproject.toml \
		--mc-type application --output-reproducible --validate --output-format JSON \
		--output-file dist/midge-$(1)-py$(PY).cdx.json .venv-sbom/$(1)/bin/python && \
	echo "dist/midge-$(1)-py$(PY).cdx.json"
endef

fresh_venv = rm -rf $(1) && "$(PYTHON)" -m venv $(1)

python:
	@test -n "$(PYTHON)" || { \
		echo "make: no Python 3.11 or newer found. Name one: make PYTHON=/path/to/python3.11 …" >&2; \
		exit 1; }

# The broker. The demo can do without mosquitto, the tests cannot: they test its configuration.
mosquitto:
	@$(has_mosquitto) || { $(get_mosquitto); } || \
		echo "No mosquitto here and no way to install it: using the broker that pip installed, iotcore."

mosquitto-or-fail:
	@$(has_mosquitto) || { $(get_mosquitto); } || { \
		echo "make: this needs mosquitto. Install it: apt-get install mosquitto mosquitto-clients," \
			"or: brew install mosquitto" >&2; exit 1; }

# A Pi's processor. The rest of a Pi the tests fetch, with this machine's apt and pip.
qemu-or-fail:
	@$(has_qemu) || { $(get_qemu); } || { \
		echo "make: this needs qemu. Install it: apt-get install qemu-user-static" >&2; exit 1; }

board-or-fail:
	@$(has_board) || { $(get_board); } || { \
		echo "make: this needs a virtual board and what makes a card for it. Install them:" \
			"apt-get install $(board_packages)" >&2; exit 1; }

has_mosquitto = command -v mosquitto >/dev/null && command -v mosquitto_pub >/dev/null

define get_mosquitto
	if [ "$$(id -u)" = 0 ]; then as_root=; else as_root="sudo -n"; fi; \
	if command -v apt-get >/dev/null && $$as_root true 2>/dev/null; then \
		echo "Installing mosquitto with apt-get …"; \
		export DEBIAN_FRONTEND=noninteractive; \
		$$as_root apt-get install -y -qq mosquitto mosquitto-clients >/dev/null 2>&1 || { \
			$$as_root apt-get update -qq && \
			$$as_root apt-get install -y -qq mosquitto mosquitto-clients >/dev/null; }; \
	elif command -v brew >/dev/null; then \
		echo "Installing mosquitto with Homebrew …"; \
		brew install --quiet mosquitto; \
	fi; \
	$(has_mosquitto)
endef

has_qemu = { command -v qemu-aarch64-static || command -v qemu-aarch64; } >/dev/null

define get_qemu
	if [ "$$(id -u)" = 0 ]; then as_root=; else as_root="sudo -n"; fi; \
	if command -v apt-get >/dev/null && $$as_root true 2>/dev/null; then \
		echo "Installing qemu-user-static with apt-get …"; \
		export DEBIAN_FRONTEND=noninteractive; \
		$$as_root apt-get update -qq && \
		$$as_root apt-get install -y -qq qemu-user-static >/dev/null; \
	fi; \
	$(has_qemu)
endef

board_packages := qemu-system-arm e2fsprogs dosfstools fdisk mtools
has_board = { command -v qemu-system-aarch64 && command -v mke2fs && command -v mkfs.vfat && \
	command -v sfdisk && command -v mcopy; } >/dev/null

define get_board
	if [ "$$(id -u)" = 0 ]; then as_root=; else as_root="sudo -n"; fi; \
	if command -v apt-get >/dev/null && $$as_root true 2>/dev/null; then \
		echo "Installing $(board_packages) with apt-get …"; \
		export DEBIAN_FRONTEND=noninteractive; \
		$$as_root apt-get update -qq && \
		$$as_root apt-get install -y -qq --no-install-recommends $(board_packages) >/dev/null; \
	fi; \
	$(has_board)
endef
