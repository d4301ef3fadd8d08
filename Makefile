# imagesim: `make demo` shows it, `make test` checks it. Both set up what they need.
.PHONY: demo test bench outputs readme docs page lock clean help
PY := .venv/bin/python

help: ## show this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

.venv/.ready: requirements.lock setup.py settings.ini pyproject.toml
	@tools/env.sh

demo: .venv/.ready page ## run the main job on a synthetic delivery in demo/; SERVE=1 opens the map on it
	@.venv/bin/imagesim demo --root demo
	@if [ -n "$(SERVE)" ]; then IMAGESIM_DATA_ROOT=demo .venv/bin/imagesim serve --open; fi

test: .venv/.ready page ## everything that must hold: sync, notebooks, tests, docs
	@tools/browser.sh
	@$(PY) tools/check.py

page: .venv/.ready ## build the map's page from web/ into imagesim/static/
	@tools/web.sh

bench: .venv/.ready ## measure against peers, in the quick form
	@for b in benchmarks/bench_*.py; do $(PY) $$b --quick; done

outputs: .venv/.ready ## run every notebook and save what it shows
	@$(PY) tools/execute.py

readme: .venv/.ready ## make README.md from nbs/index.ipynb
	@$(PY) tools/readme.py

docs: .venv/.ready ## build the site into _docs (needs Quarto)
	@PATH="$(CURDIR)/.venv/bin:$$PATH" nbdev_docs
	@$(PY) tools/readme.py

lock: ## look for newer versions and write requirements.lock
	@tools/lock.sh

clean: ## remove what was built; the environment stays
	rm -rf demo _proc _docs build dist imagesim/static web/node_modules
