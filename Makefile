# `make` alone prints what it can do. PYTHON names another Python than python3.

PYTHON ?= python3
VENV := .venv
ARGS ?=
MINUTES ?= 10
export PYTHON

.DEFAULT_GOAL := help
.PHONY: help run test check jepsen demo bench screenshots image-test dashboard-picture clean

help: ## print this
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-17s  %s\n", $$1, $$2 }' Makefile

run: $(VENV)/run.stamp ## start the server on local disk, with lines to paste (KCI_STORAGE_PORT=… for another port)
	@$(VENV)/bin/python tools/run.py

test: $(VENV)/test.stamp ## run all tests (ARGS="-k upload" for some of them)
	@tools/azurite.sh .tools $(VENV)
	@PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(VENV)/bin/python -m pytest -n 2 --dist loadfile $(ARGS)

check: $(VENV)/test.stamp ## look for mistakes without running anything: lint, format, layers, types
	@$(VENV)/bin/ruff check
	@$(VENV)/bin/ruff format --check
	@$(VENV)/bin/lint-imports --no-logo
	@$(VENV)/bin/mypy

jepsen: $(VENV)/test.stamp ## look for answers that no single store gives, under faults (MINUTES=30, SEED=…, ARGS="--mode local")
	@tools/azurite.sh .tools $(VENV)
	@$(VENV)/bin/python -m tests.linearizability --minutes $(MINUTES) $(if $(SEED),--seed $(SEED)) $(ARGS)

demo: $(VENV)/test.stamp ## upload and download an arm64 kernel package, or DEMO_DIR=…, over Azurite, and compare
	@tools/azurite.sh .tools $(VENV)
	@PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(VENV)/bin/python tools/demo.py $(if $(DEMO_DIR),"$(DEMO_DIR)")

bench: $(VENV)/test.stamp ## measure the server beside nginx, Varnish and bare gunicorn (BENCH_QUICK=1, ARGS="hits cold")
	@tools/azurite.sh .tools $(VENV)
	@PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(VENV)/bin/python -m benchmarks $(ARGS)

screenshots: $(VENV)/test.stamp ## take the pictures in docs/ again, with Debian's Chromium
	@$(VENV)/bin/python tools/screenshots.py

image-test: ## build the container image and try it, as root, with podman (ARGS=BASE for another base)
	@$(PYTHON) tools/image.py $(ARGS)

dashboard-picture: $(VENV)/test.stamp ## draw the picture of the dashboard again, after half an hour of traffic
	@tools/azurite.sh .tools $(VENV)
	@PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(VENV)/bin/python tools/dashboard_picture/take.py $(ARGS)

clean: ## remove what make has made, but for config.toml and the stored files
	rm -rf $(VENV) .tools build dist *.egg-info .pytest_cache .hypothesis .import_linter_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/run.stamp: setup.cfg setup.py tools/environment.sh
	@tools/environment.sh $(VENV)
	@touch $@

$(VENV)/test.stamp: setup.cfg setup.py tools/environment.sh
	@tools/environment.sh $(VENV) test
	@touch $@ $(VENV)/run.stamp
