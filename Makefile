# berth: build, check, test, try. `make help` lists the targets.
TRIPLE := $(shell rustc -vV | sed -n 's/^host: //p')
export BERTH_BIN ?= $(CURDIR)/target/$(TRIPLE)/release/berth
PREFIX ?= /usr/local
SUITES := -p berth-testkit -p berth-e2e

.PHONY: help build check test test-kernel critest e2e e2e-kubernetes test-vm bench bench-node demo run soak install clean suites

help: ## List the targets
	@sed -n 's/^\([a-z0-9-]*\):.*## \(.*\)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 16
build: ## Build the berth binary (release, static)
	cargo build --release -p berth
check: ## Formatting, lints, shell syntax
	cargo fmt --all --check && cargo clippy --workspace --all-targets -- -D warnings && for f in e2e/*.sh .ci/run; do bash -n $$f || exit 1; done
test: build ## Every test: unit, kernel, contract, critest, e2e; the last line is the sum
	e2e/test.sh
test-kernel: ## The crates' tests against the kernel and over real sockets
	cargo test --workspace --exclude berth-e2e --test 'kernel_*' --test 'contract_*'
critest: build suites ## The CRI conformance suite (ARGS="-ginkgo.focus=…")
	e2e/tools.sh packages images cri-tools && e2e/critest.sh berth $(ARGS)
e2e: build suites ## Scenarios against the built binary (ARGS=name of a test)
	e2e/tools.sh && cargo test -p berth-e2e --tests -- --test-threads=1 $(ARGS)
e2e-kubernetes: build suites ## The upstream kubelet on berth cri, with a real control plane (builds Kubernetes once: ten minutes)
	e2e/tools.sh packages images kubernetes cri-tools && e2e/kubernetes.sh
test-vm: build suites ## What this machine lacks (cgroup v2 controllers, systemd), in a small VM
	e2e/vm.sh && e2e/vm-systemd.sh
bench: build suites ## berth next to containerd and runc: docs/bench (ARGS="--only life1,burst --rounds 2", "--quick")
	cargo build --release -p berth-e2e --bin berth-bench && e2e/tools.sh && e2e/bench.sh $(ARGS)

bench-node: build suites ## berth's node next to the upstream kubelet and containerd: docs/bench/node (ARGS as above)
	cargo build --release -p berth-e2e --bin berth-bench && e2e/tools.sh all && e2e/bench-node.sh $(ARGS)
demo: build suites ## From a manifest to a running pod and back, in throw-away namespaces
	e2e/demo.sh
run: build suites ## A throw-away node in the foreground; Ctrl-C ends it
	e2e/demo.sh run
soak: build suites ## critest and the scenarios again and again (ROUNDS=10)
	e2e/tools.sh && e2e/soak.sh
install: build ## Install the binary to $(PREFIX)/bin
	install -D -m 755 $(BERTH_BIN) $(DESTDIR)$(PREFIX)/bin/berth
clean: ## Remove what was built (the tools' cache stays)
	cargo clean
suites:
	@cargo build -q $(SUITES)
