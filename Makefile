# leasehold: build, test and show. `make` alone lists the targets.

VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
GO      ?= go

# Without gRPC's trace pages, which nobody serves here, the binary is 3 MB smaller, and so is what a standby keeps in memory.
BUILD_FLAGS = -trimpath -tags grpcnotrace -ldflags '-s -w -X main.version=$(VERSION)'

# The race detector needs a C compiler; RACE=1 insists on it (as CI does).
CC_FOUND := $(shell command -v $$($(GO) env CC) 2>/dev/null)
RACE     ?= $(if $(CC_FOUND),1,0)

# $ETCD and $ETCDCTL name others that are to be used.
ETCD_TOOLS := $(if $(ETCD),,bin/etcd) $(if $(ETCDCTL),,bin/etcdctl)

.PHONY: help build test lint demo run bench faults faults-docs soak readme k8s-certs test-k8s e2e-k8s clean

help:
	@echo 'make build   the daemon: ./leasehold, static'
	@echo 'make test    every test, with the race detector where there is a C compiler'
	@echo 'make lint    golangci-lint, built once into bin/'
	@echo 'make demo    three candidates, three faults, within a minute; nothing is left but bin/'
	@echo "make run     one candidate with a job of yours: make run JOB='sleep 100'"
	@echo 'make bench   hand-over and size, beside a stock loop and etcdctl lock; N=5 for a short run'
	@echo 'make faults  every fault of a table, beside a stock loop and etcdctl lock: N=3 PEERS_N=1 ROWS=; needs root, nft, 20 minutes'
	@echo 'make faults-docs  picture, table and README from docs/faults.json, which make faults JSON=docs/faults.json writes'
	@echo 'make soak    random faults on five candidates and their etcd, every promise checked: SEED=1 FAULTS=60; needs root, nft'
	@echo 'make bench-scale  what 1,000 candidates, and 1,000 elections, cost one etcd; within five minutes'
	@echo 'make readme  make faults-docs, and what make demo says now into the README'
	@echo 'make k8s-certs  an authority and certificates for the etcd of k8s/etcd, into k8s/certs: NAMESPACE=default; again: renews them'
	@echo 'make test-k8s   every manifest of k8s/, checked without a cluster, and run as processes; root, Debian (installs busybox)'
	@echo 'make e2e-k8s    the same in the cluster of the current kubectl context: IMAGE=localhost/leasehold LOAD=; see e2e/k8s'
	@echo 'make clean   remove what was built'

build:
	CGO_ENABLED=0 $(GO) build $(BUILD_FLAGS) -o leasehold .

# Packages run one after the other: they start processes whose times count,
# and each would disturb the others'.
test: $(ETCD_TOOLS)
ifeq ($(RACE),1)
	CGO_ENABLED=1 $(GO) test -race -p 1 ./...
else
	@echo 'no C compiler found: testing without the race detector'
	$(GO) test -p 1 ./...
endif

lint: bin/golangci-lint
	bin/golangci-lint run ./...

# What these run is built into bin/ first: `go run` would not pass signals on.
BUILD_SHOW = @test -x bin/leasehold || echo 'building leasehold into bin/; it takes about a minute the first time'; \
	CGO_ENABLED=0 $(GO) build $(BUILD_FLAGS) -o bin/

demo:
	$(BUILD_SHOW) . ./e2e/demo
	@bin/demo

# The job as it was given, with every $$ in it.
run: export override JOB := $(value JOB)
run:
	$(BUILD_SHOW) . ./e2e/run
	@bin/run

bench: $(ETCD_TOOLS)
	$(BUILD_SHOW) . ./e2e/bench ./e2e/stockloop ./e2e/testjob
	@bin/bench $(if $(N),-n $(N)) $(BENCH)

soak: $(ETCD_TOOLS)
	$(BUILD_SHOW) . ./e2e/soak ./e2e/stockloop ./e2e/testjob
	@bin/soak $(if $(SEED),-seed $(SEED)) $(if $(FAULTS),-faults $(FAULTS)) $(SOAK)

# Smaller: SCALE='-candidates 100 -elections 100'. bin/scale -doc docs/scale.md puts what was measured into the document.
bench-scale: $(ETCD_TOOLS)
	$(BUILD_SHOW) ./e2e/scale
	@bin/scale $(SCALE)

# ROWS='?' lists the rows, ROWS=ci are those that CI runs.
faults: $(ETCD_TOOLS)
	$(BUILD_SHOW) . ./e2e/faults ./e2e/stockloop ./e2e/testjob
	@bin/faults $(if $(N),-n $(N)) $(if $(PEERS_N),-peers-n $(PEERS_N)) $(if $(filter ci,$(ROWS)),-ci,$(if $(ROWS),-rows '$(ROWS)')) $(if $(PARALLEL),-parallel $(PARALLEL)) $(if $(JSON),-json '$(JSON)')

faults-docs:
	CGO_ENABLED=0 $(GO) build $(BUILD_FLAGS) -o bin/ ./e2e/faults
	bin/faults -picture docs/faults.json -svg docs/faults.svg
	bin/faults -table docs/faults.json >docs/faults.md
	bin/faults -table docs/faults.json -readme README.md

# The demo's output in the README, as this machine has it.
readme: faults-docs
	$(BUILD_SHOW) . ./e2e/demo ./e2e/bench
	bin/demo >bin/demo.txt
	bin/bench -readme README.md -demo bin/demo.txt

NAMESPACE ?= default
k8s-certs:
	cd tools/k8s && $(GO) run ./certs -dir ../../k8s/certs -namespace $(NAMESPACE)

test-k8s: $(ETCD_TOOLS)
	tools/k8s/prepare.sh
	cd tools/k8s && $(GO) test -vet=off -count=1 -timeout 30m ./...

# LOAD is a command that brings an image to the cluster's nodes, such as `kind load docker-image` or `docker push`.
e2e-k8s:
	LEASEHOLD_SHIP=1 IMAGE='$(or $(IMAGE),localhost/leasehold)' LOAD='$(LOAD)' $(GO) test -count=1 -v -timeout 60m ./e2e/k8s

clean:
	rm -rf bin leasehold

bin/etcd: tools/etcd/go.mod
	@echo 'building bin/etcd, once; it takes about two minutes'
	cd tools/etcd && CGO_ENABLED=0 $(GO) build -trimpath -o ../../bin/etcd go.etcd.io/etcd/server/v3
	@touch $@

bin/etcdctl: tools/etcd/go.mod
	cd tools/etcd && CGO_ENABLED=0 $(GO) build -trimpath -o ../../bin/etcdctl go.etcd.io/etcd/etcdctl/v3
	@touch $@

bin/golangci-lint: tools/lint/go.mod
	@echo 'building bin/golangci-lint, once; it takes about four minutes'
	cd tools/lint && CGO_ENABLED=0 $(GO) build -trimpath -o ../../bin/golangci-lint github.com/golangci/golangci-lint/v2/cmd/golangci-lint
	@touch $@
