# make help lists what there is. Nothing here asks a question or needs a terminal.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.ONESHELL:

TARGET := $(or $(CARGO_TARGET_DIR),target)
CONF := conf/proxy.toml

# What is needed, as package=probe: a command, or a file if it begins with a slash. A machine that has
# the thing from somewhere else is left alone, and so is one without a network.
BUILD_NEEDS := build-essential=cc clang=clang libelf-dev=/usr/include/libelf.h zlib1g-dev=/usr/include/zlib.h \
	pkg-config=pkg-config linux-libc-dev=/usr/include/linux/bpf.h
TEST_NEEDS := iperf3=iperf3 curl=curl redis-server=redis-server redis-tools=redis-benchmark \
	postgresql=/usr/lib/postgresql openssh-server=/usr/sbin/sshd openssh-client=ssh python3=python3 \
	iproute2=ip netcat-openbsd=nc util-linux=setpriv nginx-light=nginx \
	libnginx-mod-stream=/usr/lib/nginx/modules/ngx_stream_module.so haproxy=haproxy openssl=openssl mandoc=mandoc dnsmasq-base=dnsmasq \
	bpftool=bpftool python3-prometheus-client=/usr/lib/python3/dist-packages/prometheus_client
# Servers among them that Debian would start: the tests start their own.
SERVICES := redis-server postgresql ssh nginx haproxy

# $(call install,NEEDS): says what is missing and installs it.
define install
export PATH="$$PATH:/usr/sbin:/sbin"
missing=()
for need in $(1); do
	probe=$${need#*=}
	if [[ $$probe == /* ]]; then [[ -e $$probe ]] && continue; else command -v "$$probe" >/dev/null && continue; fi
	missing+=("$${need%%=*}")
done
if (( $${#missing[@]} > 0 )); then
	echo "missing on this machine: $${missing[*]}"
	if ! command -v apt-get >/dev/null; then
		echo "this is no Debian: install what corresponds to these Debian packages, then try again" >&2
		exit 1
	fi
	as_root=()
	if (( $$(id -u) != 0 )); then
		command -v sudo >/dev/null || { echo "installing them needs root or sudo" >&2; exit 1; }
		as_root=(sudo)
	fi
	systemd() { [[ -d /run/systemd/system ]] && "$${as_root[@]}" systemctl --runtime --quiet "$$@" $(SERVICES); }
	systemd mask || true
	"$${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -q update </dev/null
	# Without systemd, run level 1 is what keeps packages from starting their servers (invoke-rc.d).
	result=0
	"$${as_root[@]}" env DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 \
		apt-get -q install -y --no-install-recommends "$${missing[@]}" </dev/null || result=$$?
	systemd unmask || true
	(( result == 0 )) || exit $$result
fi
command -v cargo >/dev/null || { echo "cargo is missing: install a Rust toolchain (https://rustup.rs)" >&2; exit 1; }
endef

.PHONY: help setup setup-tests build run test format-check lint clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(firstword $(MAKEFILE_LIST)) | expand -t 14

setup: ## install what building needs, where it is missing (Debian)
	@$(call install,$(BUILD_NEEDS))

setup-tests: ## the same for building and testing
	@$(call install,$(BUILD_NEEDS) $(TEST_NEEDS))

build: setup ## build the release binary
	cargo build --release --locked

run: build ## build, then start the proxy in the foreground: make run [CONF=FILE]
	@as_root=()
	if (( $$(id -u) != 0 )); then
		if command -v sudo >/dev/null; then
			echo "starting with sudo: in-kernel forwarding and pinned, unprivileged workers need it"
			as_root=(sudo)
		else
			echo "neither root nor sudo: the proxy may lack rights, it says which"
		fi
	fi
	echo "$(TARGET)/release/master -c $(CONF)"
	exec "$${as_root[@]}" "$(TARGET)/release/master" -c "$(CONF)"

format-check: ## check the formatting
	cargo fmt --all --check

# In release: what runs while building (build scripts, macros) is then compiled once for this and for the tests.
lint: setup ## clippy, warnings are errors
	cargo clippy --release --workspace --all-targets --locked -- -D warnings

# In release: the tests drive what users run. Most of a black-box test is waiting: two for each processor.
test: setup-tests format-check lint ## everything: formatting, lints, unit and black-box tests (as root)
	cargo test --workspace --locked --release --no-fail-fast -- --test-threads=$$((2 * $$(nproc)))

clean: ## remove what was built
	cargo clean

# What `bench` compares with, and needs beside the compiler.
BENCH_NEEDS := iperf3=iperf3 util-linux=setpriv nginx-light=nginx \
	libnginx-mod-stream=/usr/lib/nginx/modules/ngx_stream_module.so haproxy=haproxy
# Its arguments, as in: make bench BENCH=--quick
BENCH :=

.PHONY: setup-bench bench

setup-bench: SERVICES := nginx haproxy
setup-bench: ## the same for building and measuring
	@$(call install,$(BUILD_NEEDS) $(BENCH_NEEDS))

bench: setup-bench ## measure against a direct connection, nginx and HAProxy, about 10 minutes: make bench [BENCH=--help]
	cargo bench --locked --package master --bench bench -- $(BENCH)

# What `test-kernels` boots with. The kernels themselves are downloaded and unpacked below the target directory.
KERNEL_NEEDS := qemu-system-x86=qemu-system-x86_64 cpio=cpio dpkg=dpkg-deb binutils=strip
# Which kernels, as in: make test-kernels KERNELS=6.12
KERNELS := 6.1 6.12

.PHONY: test-kernels

test-kernels: SERVICES :=
test-kernels: ## the data-path tests on Debian's kernels in an emulator, half an hour: make test-kernels [KERNELS=6.12]
	@$(call install,$(BUILD_NEEDS) $(KERNEL_NEEDS))
	TARGET="$(TARGET)" tests/kernels/run $(KERNELS)
