# Targets are verbs; `make` alone lists them. Two variables are for you:
#   make test PYTEST_ARGS='-k packaging'      make test PYTHON=python3.9
PYTHON ?= python3
PYTEST_ARGS ?= -n 3 --dist worksteal
SECONDS ?= 600

BIN = .venv/bin
# Another PYTHON than that of .venv makes it anew.
MADE = .venv/made-by-$(subst /,-,$(PYTHON))

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' Makefile

build:  ## nothing to build: the program is one file
	@echo 'Nothing to build: ssh_scheduler.py runs as it is.'

venv: $(MADE)  ## make .venv with what developing needs

golden: packages  ## write the golden files anew, screens, help and messages: then look at what changed
	GOLDEN=write $(BIN)/python -m pytest -q tests/test_golden.py tests/test_usage.py tests/test_messages.py
	git --no-pager diff --stat tests/golden

demo: $(MADE)  ## run the example's batch on this machine, in a temporary folder
	@PATH="$(CURDIR)/$(BIN):$$PATH" bash example/demo.sh

test: packages  ## run the tests; as root on Debian, install what they need first
	$(BIN)/python -m pytest $(PYTEST_ARGS)

check: $(MADE)  ## lint, compile on the oldest and the newest Python here, and measure
	$(BIN)/ruff check . .ci/measure
	$(BIN)/vermin -q -t=3.9- --no-tips --violations ssh_scheduler.py combine_folders.py results_table.py .ci/measure
	bash .ci/compile ssh_scheduler.py combine_folders.py results_table.py .ci/measure
	$(BIN)/python .ci/measure ssh_scheduler.py combine_folders.py results_table.py

soak: packages  ## random faults on three hosts, as root: make soak SECONDS=600 SEED=
	$(BIN)/python tests/soak.py $(SECONDS) $(SEED)

planted: packages  ## plant faults in the protocol, and tell which test finds each (5 minutes)
	$(BIN)/python tests/planted.py

bench: $(MADE)  ## measure
	$(BIN)/python bench/bench.py

clean:  ## delete what make made; results of batches stay
	rm -rf .venv build dist ./*.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

$(MADE): requirements-dev.txt setup.py
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || bash .ci/install python3 python3-venv
	$(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install -qq --upgrade pip
	$(BIN)/python -m pip install -qq -r requirements-dev.txt
	@touch $@

packages: $(MADE)
	@missing=$$($(PYTHON) tests/rig.py --missing) || bash .ci/install $$missing

.PHONY: help build venv golden demo test soak planted check bench clean packages
