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

.PHONY: help build test lint demo run bench readme clean

help:
	@echo 'make build   the daemon: ./leasehold, static'
	@echo 'make test    every test, with the race detector where there is a C compiler'
	@echo 'make lint    golangci-lint, built once into bin/'
	@echo 'make demo    three candidates, three faults, within a minute; nothing is left but bin/'
	@echo "make run     one candidate with a job of yours: make run JOB='sleep 100'"
	@echo 'make bench   hand-over, failure and size, beside a stock loop and etcdctl lock; N=5 for a short run'
	@echo 'make readme  put the figures of make bench and make demo into the README'
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

# The table of faults and the demo's output in the README, as this machine has them.
readme: bench
	$(BUILD_SHOW) . ./e2e/demo
	bin/demo >bin/demo.txt
	bin/bench -readme README.md -table bin/bench.json -demo bin/demo.txt

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
