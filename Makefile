# verbfs: `make demo` shows it, `make test` tests it, `make help` lists the rest.

PREFIX  ?= /usr/local
DESTDIR ?=
# Where the configuration and the systemd unit go; the defaults are where systemd looks.
SYSCONFDIR ?= /etc
UNITDIR    ?= /etc/systemd/system

SHELL := /bin/bash
export PATH := $(PATH):$(HOME)/.cargo/bin
TARGET := $(or $(CARGO_TARGET_DIR),target)
VERBFS := $(TARGET)/release/verbfs

BINDIR  := $(DESTDIR)$(PREFIX)/bin
MANDIR  := $(DESTDIR)$(PREFIX)/share/man/man1
DOCDIR  := $(DESTDIR)$(PREFIX)/share/doc/verbfs
BASHDIR := $(DESTDIR)$(PREFIX)/share/bash-completion/completions
ZSHDIR  := $(DESTDIR)$(PREFIX)/share/zsh/site-functions
FISHDIR := $(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d

.DEFAULT_GOAL := help
.PHONY: help demo test check bench build install uninstall clean fmt lint packages vm-shell

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

demo: build ## three nodes and three mounts on this machine, a source tree through them
	@scripts/packages.sh run demo
	$(VERBFS) demo

test: ## everything: build, lints, all tests, and the tests on real mounts
	@scripts/test.sh

check: ## the fast subset of `make test`
	@scripts/test.sh --check

bench: build ## measure all sides in one run and write docs/BENCHMARKS.md
	@scripts/packages.sh run test
	@scripts/bench.sh

build: ## install the packages that are missing, then build the `verbfs` program
	@scripts/packages.sh build
	@scripts/cargo.sh build --release --workspace

vm-shell: ## a prompt in a virtual machine with a software RDMA device
	@scripts/packages.sh test
	@tests/vm/run.sh --shell

packages: ## only check for the Debian packages, and install what is missing
	@scripts/packages.sh

# Installing does not build: `make build` as yourself, `make install` as root.
install: ## install program, completions, manual, unit and example configuration (PREFIX, DESTDIR)
	@test -x $(VERBFS) || { echo "install: $(VERBFS) is not there: run 'make build' first" >&2; exit 1; }
	install -D -m 755 $(VERBFS) $(BINDIR)/verbfs
	install -d $(MANDIR) $(BASHDIR) $(ZSHDIR) $(FISHDIR)
	$(VERBFS) manual $(MANDIR)
	$(VERBFS) completions bash > $(BASHDIR)/verbfs
	$(VERBFS) completions zsh > $(ZSHDIR)/_verbfs
	$(VERBFS) completions fish > $(FISHDIR)/verbfs.fish
	install -D -m 644 docs/example.toml $(DOCDIR)/example.toml
	install -d $(DESTDIR)$(UNITDIR)
	sed 's|@BINDIR@|$(PREFIX)/bin|; s|@SYSCONFDIR@|$(SYSCONFDIR)|' scripts/systemd/verbfs@.service.in > $(DESTDIR)$(UNITDIR)/verbfs@.service
	chmod 644 $(DESTDIR)$(UNITDIR)/verbfs@.service

uninstall: ## remove what `make install` installed; configurations and data stay
	rm -f $(BINDIR)/verbfs $(MANDIR)/verbfs.1 $(MANDIR)/verbfs-*.1
	rm -f $(BASHDIR)/verbfs $(ZSHDIR)/_verbfs $(FISHDIR)/verbfs.fish
	rm -f $(DOCDIR)/example.toml $(DESTDIR)$(UNITDIR)/verbfs@.service
	-rmdir $(DOCDIR) 2>/dev/null

fmt: ## format the Rust sources
	cargo fmt --all

lint: ## formatting, clippy and shell scripts, as `make test` checks them
	@scripts/test.sh --only '@(build|format|clippy|shell|semantics)'

clean: ## remove what building and testing made
	cargo clean
