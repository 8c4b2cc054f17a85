# Targets are verbs; `make` alone lists them. Two variables are for you:
#   make test PYTEST_ARGS='-k packaging'      make test PYTHON=python3.9
PYTHON ?= python3
PYTEST_ARGS ?= -n 4 --dist worksteal
SECONDS ?= 600

BIN = .venv/bin
MODULES = ssh_scheduler.py combine_folders.py results_table.py
SCRIPTS = .ci/measure .ci/manual
# A new value of PYTHON rebuilds .venv: first with the packages of the program, then with the rest.
RUNS = .venv/runs-by-$(subst /,-,$(PYTHON))
MADE = .venv/made-by-$(subst /,-,$(PYTHON))

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' Makefile

build:  ## nothing to build: the program is one file
	@echo 'Nothing to build: ssh_scheduler.py runs as it is.'

venv: $(MADE)  ## make .venv with what developing needs

golden: packages  ## write the golden files anew, screens, help and messages: then look at what changed
	GOLDEN=write $(BIN)/python -m pytest -q tests/test_golden.py tests/test_usage.py tests/test_messages.py
	git --no-pager diff --stat tests/golden

pages: packages  ## type what README and docs/ show, and write what is printed into them
	DOCS=write $(BIN)/python -m pytest -q -n0 tests/test_docs.py
	git --no-pager diff --stat README.md docs

pictures: packages  ## draw the pictures of README anew, from a real batch
	$(BIN)/python docs/pictures/make.py

demo: $(RUNS)  ## run the example's batch on this machine, in a temporary folder
	@PATH="$(CURDIR)/$(BIN):$$PATH" bash example/demo.sh

test: packages  ## run the tests; as root on Debian, install what they need first
	$(BIN)/python -m pytest $(PYTEST_ARGS)

check: $(MADE)  ## lint, check the types, compile on the oldest and the newest Python here, and measure
	$(BIN)/ruff check . $(SCRIPTS)
	$(BIN)/shellcheck --shell=bash .ci/compile .ci/install .ci/run example/*.sh example/*/*.sh tests/slurm_rig
	MYPYPATH=stubs $(BIN)/mypy --strict stubs
	MYPYPATH=stubs $(BIN)/stubtest --ignore-missing-stub --concise $(MODULES:.py=)
	$(BIN)/vermin -q -t=3.9- --no-tips --violations $(MODULES) $(SCRIPTS)
	bash .ci/compile $(MODULES) $(SCRIPTS)
	$(BIN)/python .ci/measure $(MODULES)

soak: packages  ## random faults on three hosts, as root: make soak SECONDS=600 SEED=
	$(BIN)/python tests/soak.py $(SECONDS) $(SEED)

planted: packages  ## plant faults in the protocol, and tell which test finds each (5 minutes)
	$(BIN)/python tests/planted.py

bench: $(MADE)  ## measure, and write bench/RESULTS.md
	$(BIN)/python bench/bench.py --results bench/RESULTS.md

clean:  ## delete what make made; results of batches stay
	rm -rf .venv build dist ./*.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

# A .venv that is a link belongs to another checkout: --clear would empty the folder behind it.
$(RUNS): setup.py
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || bash .ci/install python3 python3-venv
	@echo 'Making .venv with the program, which takes some seconds.'
	@[ ! -L .venv ] || rm .venv
	@$(PYTHON) -m venv --clear .venv
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -e .
	@touch $@

$(MADE): requirements-dev.txt $(RUNS)
	@echo 'Installing in .venv what requirements-dev.txt lists, which takes a minute or two.'
	@$(BIN)/python -m pip install -qq --upgrade pip
	@$(BIN)/python -m pip install -qq -r requirements-dev.txt
	@touch $@

packages: $(MADE)
	@missing=$$($(PYTHON) tests/rig.py --missing) || bash .ci/install $$missing

.PHONY: help build venv golden pages pictures demo test soak planted check bench clean packages
