# From a clone to measured tables. Each target does the set-up it needs, and nothing twice.
# The README shows the same commands without make (Windows).

PROFILE ?= quick
PROFILES := $(sort $(patsubst workflow/profiles/%.yaml,%,$(wildcard workflow/profiles/*.yaml)))
CORES   ?= all
PYTHON  ?= python3
RERUN   ?=
ONLY    ?=
CLUSTER ?=
SLOW    ?=
# of your own images: DATA and what is in brackets in the README, on the command line, not from the environment
given    = $(if $(filter command,$(origin $(1))),$($(1)))
quoted   = '$(subst ','\'',$(call given,$(1)))'
OWN      = $(foreach name,WEIGHTS MODEL SIZE GOAL EPOCHS OUT,$(if $(call given,$(name)),--$(shell echo $(name) | tr A-Z a-z) $(call quoted,$(name))))

VENV_PYTHON := .venv/bin/python
SETUP       := $(PYTHON) workflow/setup_env.py
PLUGIN      := $(VENV_PYTHON) -c 'import snakemake_executor_plugin_slurm' 2>/dev/null \
	|| $(VENV_PYTHON) -m pip install -q --root-user-action ignore -c constraints.txt -e '.[cluster]'
MADE        := results/runs results/smoke .snakemake .pytest_cache .ruff_cache build

# The set-up leaves modules to be compiled at their first import; unkept, each process would do it again.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: benchmark test lab notebooks course book report clean constraints help python profile

benchmark: python profile ## measure everything and print the table, or with DATA=/FOLDER that of your own images
	@$(SETUP) --peers
ifneq ($(call given,DATA),)
	@$(VENV_PYTHON) -m bench own --data $(call quoted,DATA) $(OWN)
else
ifneq ($(PROFILE),smoke)
	@$(SETUP) $(if $(filter federated,$(PROFILE)),--flower,--nncodec)
	@$(VENV_PYTHON) -m nnc_utils.data $(if $(filter cifar transfer,$(PROFILE)),cifar10,fashion_mnist)
endif
ifneq ($(CLUSTER),)
	@$(PLUGIN)
endif
	@set -f; $(VENV_PYTHON) -m bench benchmark --profile $(PROFILE) $(if $(CLUSTER),--cluster $(CLUSTER),--cores $(CORES)) \
		$(if $(RERUN),--rerun $(RERUN)) $(if $(ONLY),--only $(ONLY))
endif

test: python ## linter, unit tests, every notebook, the workflow, the audit of the committed tables; SLOW=1 adds browsers, long compiles and Slurm
	@$(SETUP)
	@$(if $(SLOW),$(PLUGIN))
	@$(VENV_PYTHON) -m nnc_utils.data fashion_mnist || echo "going on without: what needs it is skipped"
	@$(VENV_PYTHON) -m ruff check .
	@$(VENV_PYTHON) -m ruff format --check .
	@OMP_NUM_THREADS=1 NNC_SLOW=$(SLOW) $(VENV_PYTHON) -m pytest notebooks tests -n 2 \
		--no-loadscope-reorder --nbval-lax --nbval-current-env \
		--nbval-cell-timeout=300 --nbval-sanitize-with=tests/nbval_sanitize.cfg

lab: python ## JupyterLab with the notebooks
	@$(SETUP)
	@$(VENV_PYTHON) -m jupytext --quiet --sync notebooks/*.ipynb  # JupyterLab refuses one newer than its pair
	@$(VENV_PYTHON) -m jupyterlab --LabApp.default_url=/lab/tree/notebooks $(if $(filter 0,$(shell id -u)),--allow-root)

notebooks: python ## every notebook executed where it stands, in one pass
	@$(SETUP)
	@$(VENV_PYTHON) -m bench notebooks

course: python ## the student edition of the notebooks, without solutions, in build/course
	@$(SETUP)
	@$(VENV_PYTHON) -m bench course

book: python ## the HTML book in build/book, from the stored outputs; needs no network
	@$(SETUP)
	@$(VENV_PYTHON) -m sphinx -q -W --keep-going -c docs -b html . build/book
	@echo "build/book/docs/index.html"

report: python ## tables, figures, report and README from the committed results
	@$(SETUP)
	@$(VENV_PYTHON) -m bench report

clean: ## remove caches, run folders and smoke results; .venv, data and the committed tables stay
	@for path in $(MADE); do \
		if [ -e "$$path" ]; then echo "removing $$path ($$(du -sh "$$path" | cut -f1))"; rm -rf "$$path"; fi; \
	done
	@find . -path './.venv*' -prune -o \( -name __pycache__ -o -name .ipynb_checkpoints \) -type d -print0 \
		| xargs -0 rm -rf
	@echo "removed Python's and Jupyter's caches; kept .venv, data and the tables in results/"

constraints: python ## renew constraints.txt: the newest versions that go together
	@$(SETUP) --peers
	@$(VENV_PYTHON) -m pip install --upgrade --upgrade-strategy eager --root-user-action ignore -e '.[dev,peers,cluster]'
	@$(VENV_PYTHON) -m pip check
	@$(VENV_PYTHON) workflow/freeze.py

help: ## this list
	@echo "make TARGET [PROFILE=smoke|quick|…] [CORES=all|N] [PYTHON=python3.12] [RERUN=stale] [ONLY='*/seed=1'] [CLUSTER=slurm]"
	@echo "PROFILE is one of $(PROFILES)"
	@sed -n 's/^\([a-z]*\):[^#]*## /\1\t/p' Makefile | awk -F '\t' '{ printf "  %-12s %s\n", $$1, $$2 }'

python:
	@command -v $(PYTHON) >/dev/null 2>&1 || { \
		echo "no '$(PYTHON)' here: install Python 3.11, 3.12 or 3.13, or name it: make PYTHON=python3.12" >&2; \
		exit 1; }

profile:
	@case ' $(PROFILES) ' in *' $(PROFILE) '*) ;; *) \
		echo "unknown PROFILE '$(PROFILE)': one of $(PROFILES)" >&2; exit 1 ;; esac
