# berth: build, check, test, try. `make help` lists the targets.
TRIPLE := $(shell rustc -vV 2> /dev/null | sed -n 's/^host: //p')
ifeq ($(TRIPLE),) # an installation of what was built before, by somebody without Rust
TRIPLE := $(word 2,$(subst /, ,$(firstword $(wildcard target/*/release/berth))))
endif
export BERTH_BIN ?= $(CURDIR)/target/$(TRIPLE)/release/berth
PREFIX ?= /usr/local
BIN = $(DESTDIR)$(PREFIX)/bin
LIB = $(DESTDIR)$(PREFIX)/lib
SHARE = $(DESTDIR)$(PREFIX)/share
UNITS := berth.service berth-cri.service
# What a kubeadm cluster may need beside them; an administrator puts it into place (docs/guide/join.md).
KUBEADM := berth-joined.conf kubelet.service kubelet-kubeadm.conf
COMPLETIONS = $(SHARE)/bash-completion/completions/berth $(SHARE)/zsh/site-functions/_berth $(SHARE)/fish/vendor_completions.d/berth.fish
SUITES := -p berth-testkit -p berth-e2e

.PHONY: help build check test test-kernel critest e2e e2e-kubernetes e2e-node e2e-addons test-vm bench bench-node bench-api demo run cluster soak install uninstall clean suites

help: ## List the targets
	@sed -n 's/^\([a-z0-9-]*\):.*## \(.*\)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 16
build: ## Build the berth binary (release, static)
	cargo build --release -p berth
check: ## Formatting, lints, shell syntax
	cargo fmt --all --check && cargo clippy --workspace --all-targets -- -D warnings && for f in e2e/*.sh e2e/node/*.sh e2e/soak/*.sh .ci/run; do bash -n $$f || exit 1; done
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
e2e-node: build suites ## berth node with a real control plane (ARGS=pattern; builds Kubernetes once: ten minutes)
	e2e/tools.sh packages images kubernetes cri-tools && e2e/node.sh $(ARGS)
e2e-addons: build suites ## kube-proxy, CoreDNS, flannel, metrics-server on berth node (ARGS=pattern; builds them once)
	e2e/tools.sh packages images kubernetes cri-tools addons && e2e/addons.sh $(ARGS)
test-vm: build suites ## What this machine lacks (cgroup v2 controllers, systemd), in a small VM
	e2e/vm.sh && e2e/vm-systemd.sh
bench: build suites ## berth next to containerd and runc: docs/bench (ARGS="--only life1,burst --rounds 2", "--quick")
	cargo build --release -p berth-e2e --bin berth-bench && e2e/tools.sh && e2e/bench.sh $(ARGS)

bench-node: build suites ## berth's node next to the upstream kubelet and containerd: docs/bench/node (ARGS as above)
	cargo build --release -p berth-e2e --bin berth-bench && e2e/tools.sh all && e2e/bench-node.sh $(ARGS)
bench-api: build suites ## The same under a control plane each: docs/bench/api
	cargo build --release -p berth-e2e --bin berth-bench && e2e/tools.sh all && e2e/bench-api.sh $(ARGS)
demo: build suites ## From a manifest to a running pod and back, in throw-away namespaces
	e2e/demo.sh
run: build suites ## A throw-away node in the foreground; Ctrl-C ends it
	e2e/demo.sh run
cluster: build suites ## A whole Kubernetes by kubeadm init, in throw-away namespaces; Ctrl-C ends it (builds Kubernetes once)
	e2e/tools.sh packages images kubernetes cri-tools addons && e2e/cluster.sh
soak: build suites ## A node's long checks (half an hour: API server away, churn, tokens), then critest and the scenarios ROUNDS=10 times
	e2e/tools.sh all && e2e/soak.sh
install: $(if $(wildcard $(BERTH_BIN)),,build) ## Install binary, units, completions and docs below $(DESTDIR)$(PREFIX)
	install -D -m 755 $(BERTH_BIN) $(BIN)/berth
	for unit in $(UNITS); do install -D -m 644 manifests/$$unit $(LIB)/systemd/system/$$unit; done
	for file in $(KUBEADM); do install -D -m 644 manifests/$$file $(SHARE)/berth/$$file; done
	for file in $(UNITS:%=$(LIB)/systemd/system/%) $(KUBEADM:%=$(SHARE)/berth/%); do sed -i 's#/usr/local/#$(PREFIX)/#g' $$file; done
	install -d $(dir $(COMPLETIONS))
	$(BERTH_BIN) completion bash > $(word 1,$(COMPLETIONS))
	$(BERTH_BIN) completion zsh > $(word 2,$(COMPLETIONS))
	$(BERTH_BIN) completion fish > $(word 3,$(COMPLETIONS))
	install -D -m 644 -t $(SHARE)/doc/berth README.md ARCHITECTURE.md LICENSE
	for file in $$(find docs manifests -name '*.md' -o -name '*.svg' -o -name '*.yaml'); do install -D -m 644 $$file $(SHARE)/doc/berth/$$file; done
uninstall: ## Remove what install has put there; pods, images and configuration stay
	rm -rf $(BIN)/berth $(UNITS:%=$(LIB)/systemd/system/%) $(SHARE)/berth $(SHARE)/doc/berth $(COMPLETIONS)
clean: ## Remove what was built (the tools' cache stays)
	cargo clean
suites:
	@cargo build -q $(SUITES)
