# leasehold: build, test and show. `make` alone lists the targets.

VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
COMMIT  ?= $(shell git rev-parse HEAD 2>/dev/null || echo unknown)
DATE    ?= $(or $(shell TZ=UTC0 git log -1 --format=%cd --date=format-local:%Y-%m-%dT%H:%M:%SZ 2>/dev/null),unknown)
GO      ?= go

# Without gRPC's trace pages, which nobody serves here, binary and memory are 3 MB smaller.
BUILD_FLAGS = -trimpath -tags grpcnotrace -ldflags '-s -w -X main.version=$(VERSION) -X main.commit=$(COMMIT) -X main.date=$(DATE)'

# The race detector needs a C compiler; RACE=1 insists on it (as CI does).
CC_FOUND := $(shell command -v $$($(GO) env CC) 2>/dev/null)
RACE     ?= $(if $(CC_FOUND),1,0)

# $ETCD and $ETCDCTL name others that are to be used.
ETCD_TOOLS := $(if $(ETCD),,bin/etcd) $(if $(ETCDCTL),,bin/etcdctl)

.PHONY: help build test lint fmt hooks generate release-check demo run bench bench-scale faults faults-docs soak test-histories readme clean
.PHONY: fuzz sim sim-mutations test-simetcd
.PHONY: test-systemd image test-image
.PHONY: dist test-dist k8s-certs test-k8s e2e-k8s cluster cluster-down test-cluster test-etcd-versions

help:
	@echo "make run       one candidate with a job of yours: make run JOB='sleep 100'"
	@echo 'make demo      three candidates, three faults, within a minute; leaves nothing but bin/'
	@echo 'make build     the daemon: ./leasehold, static'
	@echo 'make test      every test, with the race detector if there is a C compiler'
	@echo 'make fuzz      every fuzz target, as many at a time as there are processors: FUZZTIME=20s RUN=pattern'
	@echo 'make lint      golangci-lint, built once into bin/'
	@echo 'make fmt       format every Go file, as make lint wants it'
	@echo 'make hooks     run make fmt lint before each commit'
	@echo 'make generate  reference, man page, completion, and the pages from docs/faults.json'
	@echo 'make clean     remove what was built'
	@echo
	@echo 'Measure (all beside a naive client and etcdctl lock, where those can do it):'
	@echo 'make faults       every fault of a table: N=3 PEERS_N=1 ROWS= HOOKS=; 20 minutes; root, nft, ip, strace'
	@echo 'make faults-docs  picture, table and README from docs/faults.json (make faults JSON=docs/faults.json)'
	@echo 'make readme       make faults-docs, and the output of make demo into the README'
	@echo 'make soak         random faults, every promise checked: SEED=1 FAULTS=60; root, nft, ip'
	@echo 'make test-histories  the judge of the storage that the soak'"'"'s jobs write: finds guilty who is'
	@echo 'make sim          the election against a simulated etcd: SEED=1 FAULTS=20000; docs/simulation.md'
	@echo 'make sim-mutations  the same, with bugs put back: each has to be found'
	@echo 'make test-simetcd  the simulated etcd gives the answers of a real one: SCRIPTS=10000 FIRST=1'
	@echo 'make bench        how soon the next leader starts, and size; N=5 for a short run'
	@echo 'make bench-scale  what 1,000 candidates, and 1,000 elections, cost one etcd; five minutes'
	@echo
	@echo 'Prove (needs spin and gcc):'
	@echo 'make model        every order of steps of the protocol; each step turned off; MODEL=-ci for a short run'
	@echo
	@echo 'Ship:'
	@echo 'make image          the container image, by docker, podman or buildah: IMAGE=$(IMAGE) PLATFORM= ENGINE='
	@echo 'make dist           a release for amd64 and arm64, in dist/; the same commit gives the same bytes'
	@echo 'make k8s-certs      authority and certificates for k8s/etcd, into k8s/certs: NAMESPACE=default; again: renew'
	@echo 'make release-check  may this commit be released? tag, CHANGELOG.md, clean tree, generated files'
	@echo
	@echo 'Test what is shipped (root, Debian; they install what they need):'
	@echo 'make test-image    the image, run for real with podman'
	@echo 'make test-systemd  the unit on machines that boot systemd: TRIALS=15 for figures, LEASEHOLD_DEB=FILE'
	@echo 'make test-k8s      every manifest of k8s/ and the Helm chart, without a cluster, and run as processes: RUN='
	@echo 'make test-dist     packages in a clean Debian, docs/process.md, and dist built again elsewhere'
	@echo 'make test-etcd-versions  etcd 3.4 to 3.7: VERSIONS="3.4 3.5" SHORT=1; 75 minutes; root, nft, ip, strace'
	@echo 'make e2e-k8s       the manifests in the cluster of the current kubectl context: IMAGE= LOAD= RUN='
	@echo 'make cluster       Kubernetes with three nodes on this machine, for make e2e-k8s: KUBE=1.24; make cluster-down'

build:
	CGO_ENABLED=0 $(GO) build $(BUILD_FLAGS) -o leasehold .

# Packages run one after the other: they measure processes, and would disturb each other.
# One package alone may take longer than the ten minutes that go gives by default.
# Go's cache of results does not know the programs that tests build and run: count=1 passes it by.
test: $(ETCD_TOOLS)
ifeq ($(RACE),1)
	CGO_ENABLED=1 $(GO) test -race -count=1 -timeout 30m -p 1 ./...
else
	@echo 'no C compiler found: testing without the race detector'
	$(GO) test -count=1 -timeout 30m -p 1 ./...
endif

# The inputs in testdata/fuzz run with every `make test` too.
fuzz:
	@GO='$(GO)' FUZZTIME='$(FUZZTIME)' RUN='$(RUN)' tools/fuzz.sh

# The modules in tools/ that have code of ours.
LINTED = $(addprefix tools/,dist histories k8s k8s-1.20 kubernetes kubernetes/certmanager kubernetes/dns)
lint: bin/golangci-lint
	bin/golangci-lint run ./...
	for m in $(LINTED); do (cd $$m && $(CURDIR)/bin/golangci-lint run -c $(CURDIR)/.golangci.yml ./...) || exit; done

fmt: bin/golangci-lint
	bin/golangci-lint fmt ./...
	for m in $(LINTED); do (cd $$m && $(CURDIR)/bin/golangci-lint fmt -c $(CURDIR)/.golangci.yml ./...) || exit; done

hooks:
	git config core.hooksPath .githooks

# The tests write what they otherwise compare.
generate: faults-docs
	$(GO) test -count=1 -run 'TestReference|TestManual|TestCompletion$$' ./app -args -update
	$(GO) test -count=1 -run TestFaults_Page ./e2e/k8s -args -update

release-check:
	tools/release-check.sh

# These run programs that are built into bin/ first: `go run` would not pass signals on.
BUILD_SHOW = @test -x bin/leasehold || echo 'building leasehold into bin/; it takes about a minute the first time'; \
	CGO_ENABLED=0 $(GO) build $(BUILD_FLAGS) -o bin/

demo:
	$(BUILD_SHOW) . ./e2e/cmd/demo ./e2e/cmd/testjob
	@bin/demo

# The job as it was given: make must not expand a $$ in it.
run: export override JOB := $(value JOB)
run:
	$(BUILD_SHOW) . ./e2e/cmd/run
	@bin/run

bench: $(ETCD_TOOLS)
	$(BUILD_SHOW) . ./e2e/cmd/bench ./e2e/cmd/naiveclient ./e2e/cmd/testjob
	@bin/bench $(if $(N),-n $(N)) $(BENCH)

sim:
	$(GO) build -o bin/sim ./e2e/cmd/sim
	@bin/sim $(if $(SEED),-seed $(SEED)) $(if $(FAULTS),-faults $(FAULTS)) $(SIM)

test-simetcd: $(ETCD_TOOLS)
	$(GO) test -count=1 -v -timeout 30m -run TestSameAsEtcd ./e2e/sim/simetcd \
		-args -scripts $(or $(SCRIPTS),10000) -first $(or $(FIRST),1)

sim-mutations:
	$(GO) build -o bin/sim ./e2e/cmd/sim
	@bin/sim -mutations

# At the end the history of the jobs' storage and of the lock is judged, whatever became of the run.
soak: $(ETCD_TOOLS) bin/histories
	$(BUILD_SHOW) . ./e2e/cmd/soak ./e2e/cmd/naiveclient ./e2e/cmd/testjob ./e2e/cmd/writer
	@rm -f bin/soak.history; bin/soak $(if $(SEED),-seed $(SEED)) $(if $(FAULTS),-faults $(FAULTS)) $(SOAK); \
		code=$$?; test -e bin/soak.history || exit $$code; bin/histories bin/soak.history && exit $$code

# Smaller: SCALE='-candidates 100 -elections 100'. `bin/scale -doc docs/scale.md` writes the figures into
# the page.
bench-scale: $(ETCD_TOOLS)
	$(BUILD_SHOW) ./e2e/cmd/scale
	@bin/scale $(SCALE)

# MODEL=-update keeps what is found, MODEL='-only NAME' runs one.
.PHONY: model
model:
	$(BUILD_SHOW) ./e2e/cmd/model
	@bin/model $(MODEL)

# ROWS='?' lists the rows, ROWS=ci are those that CI runs. HOOKS=1 has hooks move an address.
faults: $(ETCD_TOOLS)
	$(BUILD_SHOW) . ./e2e/cmd/faults ./e2e/cmd/naiveclient ./e2e/cmd/testjob
	@bin/faults $(if $(N),-n $(N)) $(if $(PEERS_N),-peers-n $(PEERS_N)) $(if $(filter ci,$(ROWS)),-ci,$(if $(ROWS),-rows '$(ROWS)')) $(if $(PARALLEL),-parallel $(PARALLEL)) $(if $(JSON),-json '$(JSON)') $(if $(HOOKS),-hooks)

faults-docs:
	CGO_ENABLED=0 $(GO) build $(BUILD_FLAGS) -o bin/ ./e2e/cmd/faults
	bin/faults -docs docs/faults.json

# The demo's output in the README, as this machine has it.
readme: faults-docs
	$(BUILD_SHOW) . ./e2e/cmd/demo ./e2e/cmd/testjob
	bin/demo -readme README.md

# Everything is set that could make other bytes of the same commit: git's abbreviation, dates, and what
# an environment changes in Go.
DIST_ARCHES = amd64 arm64
dist: VERSION := $(shell git describe --tags --always --dirty --abbrev=12)
dist: MAINTAINER ?= leasehold maintainers <maintainers@leasehold.example>
dist: export CGO_ENABLED = 0
dist: export GOFLAGS = -buildvcs=false
dist: export GOWORK = off
dist: export GOEXPERIMENT =
dist: export GOAMD64 = v1
dist: export GOARM64 = v8.0
dist: export GOFIPS140 = off
dist: COMMIT := $(shell git rev-parse HEAD)
dist: DATE := $(shell TZ=UTC0 git log -1 --format=%cd --date=format-local:%Y-%m-%dT%H:%M:%SZ)
dist:
	cd tools/dist && $(GO) build -trimpath -o ../../bin/dist .
	rm -rf dist
	set -e; for arch in $(DIST_ARCHES); do \
		GOOS=linux GOARCH=$$arch $(GO) build $(BUILD_FLAGS) -o dist/leasehold-linux-$$arch .; \
	done
	bin/dist -version $(VERSION) -commit $$(git rev-parse HEAD) -date $$(git show -s --format=%ct HEAD) -maintainer '$(MAINTAINER)' $(DIST_ARCHES)

# At the end the package's unit passes the test of the tree's unit.
test-dist: dist $(ETCD_TOOLS)
	cd tools/dist && $(GO) test -count=1 ./...
	e2e/dist/prepare.sh
	e2e/systemd/install.sh
	LEASEHOLD_SHIP=1 E2E_NO_SKIP=1 $(GO) test -count=1 -v -timeout 15m $(if $(RUN),-run '$(RUN)') ./e2e/dist
	$(MAKE) test-systemd RUN=TestUnit_StartAndStop LEASEHOLD_DEB="$$(ls dist/leasehold_*_amd64.deb)"

# RUN is a pattern of tests. A test that can't run has not passed.
test-systemd: $(ETCD_TOOLS)
	e2e/systemd/install.sh
	LEASEHOLD_SHIP=1 E2E_NO_SKIP=1 TRIALS='$(TRIALS)' LEASEHOLD_DEB='$(abspath $(LEASEHOLD_DEB))' \
		$(GO) test -count=1 -v -parallel 4 -timeout 15m $(if $(RUN),-run '$(RUN)') ./e2e/systemd

IMAGE    ?= localhost/leasehold
PLATFORM ?=
# The first of these that works: docker may be a client without an engine. Its old builder knows no
# platforms.
ENGINE   ?= $(shell for e in docker podman buildah; do $$e info >/dev/null 2>&1 && $$e version >/dev/null 2>&1 && echo $$e && break; done)
comma    := ,
# Podman and buildah make one image of several platforms (linux/amd64,linux/arm64) only with --manifest,
# and older ones do not set BUILDPLATFORM.
PLATFORM_FLAGS = $(if $(PLATFORM),--platform $(PLATFORM) \
	$(if $(filter-out docker,$(ENGINE)),--build-arg BUILDPLATFORM=linux/$(shell uname -m | sed 's/x86_64/amd64/; s/aarch64/arm64/')))
image:
	@test -n '$(ENGINE)' || { echo 'none of docker, podman and buildah is here and works' >&2; exit 1; }
	DOCKER_BUILDKIT=1 $(ENGINE) build $(if $(and $(findstring $(comma),$(PLATFORM)),$(filter-out docker,$(ENGINE))),--manifest,-t) $(IMAGE) $(PLATFORM_FLAGS) \
		--build-arg VERSION='$(VERSION)' --build-arg COMMIT='$(COMMIT)' --build-arg DATE='$(DATE)' $(IMAGE_FLAGS) .

test-image: $(ETCD_TOOLS)
	e2e/image/prepare.sh
	LEASEHOLD_SHIP=1 E2E_NO_SKIP=1 $(GO) test -count=1 -v -timeout 20m $(if $(RUN),-run '$(RUN)') ./e2e/image

NAMESPACE ?= default
k8s-certs:
	cd tools/k8s && $(GO) run ./certs -dir ../../k8s/certs -namespace $(NAMESPACE)

test-k8s: $(ETCD_TOOLS) bin/helm
	tools/k8s/prepare.sh
	cd tools/k8s && E2E_NO_SKIP=1 $(GO) test -vet=off -count=1 -timeout 30m $(if $(RUN),-run '$(RUN)') ./...

# LOAD is a command that brings an image to the cluster's nodes, such as `kind load docker-image` or `docker push`.
e2e-k8s: bin/helm
	LEASEHOLD_SHIP=1 IMAGE='$(or $(IMAGE),localhost/leasehold)' LOAD='$(LOAD)' JSON='$(abspath $(JSON))' \
		$(GO) test -count=1 -v -parallel 3 -timeout 240m \
		$(if $(RUN),-run '$(RUN)') ./e2e/k8s

# KUBE=1.24 is an older Kubernetes, without the clouds. It has programs and images of its own.
KUBE_MODULE = tools/kubernetes$(KUBE:%=-%)
KUBE_DIR = bin/kubernetes$(KUBE:%=-%)
# The programs know their version from the linker: the API server tells it to clients, and compares it.
KUBERNETES = $(shell cd $(KUBE_MODULE) && $(GO) list -m -f '{{.Version}}' k8s.io/kubernetes)
KUBERNETES_FLAGS = $(foreach p,component-base/version client-go/pkg/version,-X k8s.io/$(p).gitVersion=$(KUBERNETES) \
	-X k8s.io/$(p).gitMajor=$(word 1,$(subst ., ,$(KUBERNETES:v%=%))) -X k8s.io/$(p).gitMinor=$(word 2,$(subst ., ,$(KUBERNETES))))
$(KUBE_DIR)/kubelet: $(KUBE_MODULE)/go.mod
	@echo 'building Kubernetes into $(KUBE_DIR), once; it takes about ten minutes'
	@mkdir -p $(KUBE_DIR)
	cd $(KUBE_MODULE) && CGO_ENABLED=0 $(GO) build -trimpath $(if $(KUBE),-tags providerless) \
		-ldflags '-s -w $(KUBERNETES_FLAGS)' -o ../../$(KUBE_DIR)/ tool
	@touch $@

$(KUBE_DIR)/policies: $(wildcard tools/kubernetes/policies/*.go) tools/kubernetes/go.mod
	cd tools/kubernetes && CGO_ENABLED=0 $(GO) build -trimpath -o ../../$@ ./policies
	@touch $@

$(KUBE_DIR)/coredns: $(wildcard tools/kubernetes/dns/*)
	cd tools/kubernetes/dns && CGO_ENABLED=0 $(GO) build -trimpath -ldflags '-s -w' -o ../../../$@ .
	@touch $@

# It is not for a Kubernetes as old as those of KUBE.
bin/kubernetes/certmanager: $(wildcard tools/kubernetes/certmanager/*)
	cd tools/kubernetes/certmanager && CGO_ENABLED=0 $(GO) build -trimpath -ldflags '-s -w' -o ../../../$@ .
	@touch $@

# With KUBE on make's command line, these scripts have it in their environment.
.PHONY: cluster-prepared
cluster-prepared: bin/etcd bin/etcdctl $(addprefix $(KUBE_DIR)/,kubelet policies coredns $(if $(KUBE),,certmanager))
	tools/kubernetes/prepare.sh

cluster: cluster-prepared
	tools/kubernetes/cluster up

test-cluster: cluster-prepared
	cd tools/kubernetes && $(GO) test -vet=off -count=1 ./...
	tools/kubernetes/test.sh

cluster-down:
	tools/kubernetes/cluster down

VERSIONS ?= 3.4 3.5 3.6 3.7
# `bin/versions -doc docs/etcd-versions.md` writes the results into the page.
test-etcd-versions: $(VERSIONS:%=bin/etcd-%) $(if $(ETCDCTL),,bin/etcdctl)
	$(BUILD_SHOW) . ./e2e/cmd/faults ./e2e/cmd/naiveclient ./e2e/cmd/testjob ./e2e/cmd/versions
	CGO_ENABLED=0 $(GO) test -c -o bin/ ./election ./e2e/scenario
	@bin/versions $(if $(SHORT),-short) $(if $(PARTS),-parts '$(PARTS)') $(if $(RUN),-run '$(RUN)') $(VERSIONS)

clean:
	rm -rf bin dist leasehold

test-histories:
	cd tools/histories && $(GO) test -count=1 ./...

bin/histories: $(wildcard tools/histories/*)
	cd tools/histories && CGO_ENABLED=0 $(GO) build -trimpath -o ../../bin/histories .

bin/etcd: tools/etcd/go.mod
	@echo 'building bin/etcd, once; it takes about two minutes'
	cd tools/etcd && CGO_ENABLED=0 $(GO) build -trimpath -o ../../bin/etcd go.etcd.io/etcd/server/v3
	@touch $@

bin/etcdctl: tools/etcd/go.mod
	cd tools/etcd && CGO_ENABLED=0 $(GO) build -trimpath -o ../../bin/etcdctl go.etcd.io/etcd/etcdctl/v3
	@touch $@

# Debian 12 has etcd 3.4, which is no module that Go could build.
bin/etcd-3.4:
	@mkdir -p bin
	set -e; dir=$$(mktemp -d); trap 'rm -rf "$$dir"' EXIT; chmod 755 "$$dir"; cd "$$dir"; \
		apt-get download -q etcd-server || { apt-get update -q; apt-get download -q etcd-server; }; \
		dpkg -x etcd-server_3.4.*.deb .; cp usr/bin/etcd '$(abspath $@)'

bin/etcd-3.5 bin/etcd-3.6: bin/etcd-%: tools/etcd-%/go.mod
	@echo 'building $@, once; it takes about a minute'
	cd tools/etcd-$* && CGO_ENABLED=0 $(GO) build -trimpath -o ../../$@ go.etcd.io/etcd/server/v3
	@touch $@

bin/etcd-3.7: bin/etcd
	ln -sf etcd $@

bin/helm: tools/helm/go.mod
	@echo 'building bin/helm, once; it takes about two minutes'
	cd tools/helm && CGO_ENABLED=0 $(GO) build -trimpath -ldflags '-s -w' -o ../../bin/helm helm.sh/helm/v3/cmd/helm
	@touch $@

bin/golangci-lint: tools/lint/go.mod
	@echo 'building bin/golangci-lint, once; it takes about four minutes'
	cd tools/lint && CGO_ENABLED=0 $(GO) build -trimpath -o ../../bin/golangci-lint github.com/golangci/golangci-lint/v2/cmd/golangci-lint
	@touch $@
