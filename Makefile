# What a developer does with proxyd. Every target may be repeated; none needs more than a Debian 12 and, for `test`, root
# when packages are missing.
#   make run      the demo: http://127.0.0.1 with a chat page, no key and no server needed
#   make test     lint, types, every test; what .ci/run runs
#   make build    the compiled modules, beside the sources
#   make dist     sdist and wheel in dist/, which it empties first; installs only what building needs
#   make install  as root: unit, kernel settings, configuration and the rest in place (README, "Installing"); DESTDIR, PREFIX
#   make lint     ruff and mypy alone
#   make bench    the benchmarks
#   make lock     requirements-test.lock from what is installed in .venv
#   make clean    everything built (make distclean: .venv, too)

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
BUILDERS := $(VENV)/.builders
# -qq: errors, but no warnings.
PIP := $(PY) -m pip install -qq --disable-pip-version-check
ARGS ?=

WHOSE := import sys; print(sys.version, sys.base_prefix)

# Where `make install` puts things: vendor files below PREFIX, what an operator edits below SYSCONFDIR. systemd reads units
# and the .d folders of /usr/lib and /usr/local/lib alike. The unit runs PREFIX/bin/proxyd.
DESTDIR ?=
PREFIX ?= /usr
SYSCONFDIR ?= /etc
LIB := $(DESTDIR)$(PREFIX)/lib
SHARE := $(DESTDIR)$(PREFIX)/share/proxyd
ETC := $(DESTDIR)$(SYSCONFDIR)

.PHONY: run test build dist install lint types pytest bench lock clean distclean deps help
.DEFAULT_GOAL := help

help:
	@sed -n 's/^#   //p' Makefile

# What building needs, and no more: `make dist` runs on production machines.
$(BUILDERS): requirements-test.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "proxyd: Python 3.11 or later is needed, this is $$($(PYTHON) -V); set PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
	  || { echo "proxyd: the venv module is missing; install it: apt install python3-venv" >&2; exit 1; }
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@$(PIP) -c requirements-test.lock build Cython setuptools wheel
	@touch $@

$(INSTALLED): requirements-test.lock
	@test -e $@ || echo "building, about a minute, once"
	@$(MAKE) --no-print-directory $(BUILDERS)
	@$(PIP) -r requirements-test.lock
	@touch $@

build: $(INSTALLED)
	@$(PY) setup.py --quiet build_ext --inplace

run: build
	@exec $(PY) -m proxyd --demo $(ARGS)

deps:
	@tests/install-deps

test: deps
	@$(MAKE) --no-print-directory build
	@$(MAKE) --no-print-directory lint
	@$(MAKE) --no-print-directory pytest

lint: build
	@$(PY) -m ruff check .
	@$(PY) -m mypy

pytest: build
	@$(PY) -m pytest $(ARGS)

bench: build
	@$(PY) -m tests.bench $(ARGS)

# An interpreter that was asked for must be the one of .venv, or the wheel would fit another.
dist: $(BUILDERS)
ifneq ($(origin PYTHON),file)
	@test "$$($(PYTHON) -c '$(WHOSE)')" = "$$($(PY) -c '$(WHOSE)')" \
	  || { echo "proxyd: .venv was made with another Python than $(PYTHON); make distclean first" >&2; exit 1; }
endif
	@rm -rf dist
	@mkdir -p build
	@echo "building, about half a minute"
	@$(PY) -m build --no-isolation >build/dist.log 2>&1 \
	  || { grep '^proxyd: ' build/dist.log || tail -n 40 build/dist.log; exit 1; } >&2
	@ls dist/*

# Files that operators edit are never overwritten; share/proxyd has each as it came, beside what is to be copied by hand: a
# server block that went live here would take nginx down, a database's settings are its administrator's.
install:
	@install -d "$(LIB)/systemd/system" "$(ETC)/proxyd" "$(ETC)/logrotate.d"
	@for unit in proxyd.service proxyd.socket; do \
	  sed -e 's|/usr/bin/proxyd|$(PREFIX)/bin/proxyd|' -e 's|/etc/proxyd|$(SYSCONFDIR)/proxyd|g' systemd/$$unit \
	    > "$(LIB)/systemd/system/$$unit" && chmod 0644 "$(LIB)/systemd/system/$$unit" || exit 1; done
	@install -D -m 0644 systemd/proxyd.sysusers "$(LIB)/sysusers.d/proxyd.conf"
	@install -D -m 0644 conf/tmpfiles.d/proxyd.conf "$(LIB)/tmpfiles.d/proxyd.conf"
	@install -D -m 0644 conf/sysctl.d/60-proxyd.conf "$(LIB)/sysctl.d/60-proxyd.conf"
	@install -D -m 0644 conf/modules-load.d/proxyd.conf "$(LIB)/modules-load.d/proxyd.conf"
	@cd conf && find . -type f ! -path './sysctl.d/*' ! -path './modules-load.d/*' ! -path './tmpfiles.d/*' \
	  -exec install -D -m 0644 {} "$(abspath $(SHARE))/{}" \;
	@for pair in proxyd.toml:proxyd/proxyd.toml logrotate.d/proxyd:logrotate.d/proxyd; do \
	  file="$(ETC)/$${pair#*:}"; \
	  if [ -e "$$file" ] || [ -L "$$file" ]; then \
	    cmp -s "conf/$${pair%%:*}" "$$file" || echo "kept $$file; as it came: $(SHARE)/$${pair%%:*}"; \
	  else install -m 0644 "conf/$${pair%%:*}" "$$file" || exit 1; fi; done
# On the machine itself, and not into a package's folder: the user, its directories, and systemd knows the unit.
ifeq ($(DESTDIR),)
	@! command -v systemd-sysusers >/dev/null || systemd-sysusers "$(LIB)/sysusers.d/proxyd.conf"
	@! command -v systemd-tmpfiles >/dev/null || systemd-tmpfiles --create "$(LIB)/tmpfiles.d/proxyd.conf"
	@! test -d /run/systemd/system || systemctl daemon-reload
endif
	@echo "installed below $(DESTDIR)$(PREFIX) and $(ETC); next: README, \"Installing\""

lock:
	@{ echo "# What the tests ran with: \`make lock\` writes this from the tested .venv. Names and versions only."; \
	  $(PY) -m pip freeze --all --exclude-editable | grep -E '^[A-Za-z0-9_.-]+==' \
	  | grep -viE '^(pip|proxyd)==' | LC_ALL=C sort -f; } > requirements-test.lock.new
	@mv requirements-test.lock.new requirements-test.lock

clean:
	@rm -rf build dist ./*.egg-info proxyd/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find proxyd tests ext -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	@rm -rf $(VENV)
