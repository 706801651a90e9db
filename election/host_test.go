package election

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"leasehold/e2e/harness"
)

// testName is a host name whose addresses are proxies to the members of etcd, all at one port.
type testName struct {
	t       *testing.T
	cluster *harness.Cluster
	port    string

	mu        sync.Mutex
	addresses []string // none: there is no such name
}

func newTestName(t *testing.T, cluster *harness.Cluster) *testName {
	t.Helper()
	addr, err := harness.FreeAddr()
	if err != nil {
		t.Fatal(err)
	}
	_, port, err := net.SplitHostPort(addr)
	if err != nil {
		t.Fatal(err)
	}
	return &testName{t: t, cluster: cluster, port: port}
}

func (n *testName) lookup(context.Context, string) ([]string, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if len(n.addresses) == 0 {
		return nil, errors.New("no such host")
	}
	return slices.Clone(n.addresses), nil
}

// move gives the name one address for each member of etcd, from 127.0.0.first on, and no others.
// The proxies there are closed by the second result, or when the test ends.
func (n *testName) move(first int) (proxies []*harness.Proxy, closeAll func()) {
	n.t.Helper()
	var addresses []string
	for i, m := range n.cluster.Members {
		_, target, _ := strings.Cut(m.ClientURL, "://")
		address := fmt.Sprintf("127.0.0.%d", first+i)
		proxy, err := harness.StartProxy(net.JoinHostPort(address, n.port), target)
		if err != nil {
			n.t.Fatal(err)
		}
		proxies, addresses = append(proxies, proxy), append(addresses, address)
	}
	n.mu.Lock()
	n.addresses = addresses
	n.mu.Unlock()
	closeAll = sync.OnceFunc(func() {
		for _, proxy := range proxies {
			proxy.Close()
		}
	})
	n.t.Cleanup(closeAll)
	return proxies, closeAll
}

// Whichever member of a name hangs, there is another to ask, and a leader moves with the name.
func TestCandidate_NameOfSeveralMembers(t *testing.T) {
	t.Parallel()
	cluster := newTestCluster3(t)
	name := newTestName(t, cluster)
	a := newTestCandidate(
		t, []string{"http://etcd.test:" + name.port}, "a",
		func(cfg *Config, _ *testCallbacks) { cfg.lookup = name.lookup },
	)
	a.waitFor("refused", func(s Snapshot) bool {
		return strings.Contains(s.Reason, "http://etcd.test:"+name.port+": no such host")
	})
	proxies, leave := name.move(2)
	term := a.waitForTerm()
	for i := range proxies {
		proxies[i].Cut(harness.BothWays)
		a.waitForExtensions(4)
		a.expectLeading(term)
		proxies[i].Recover()
		a.waitForExtensions(2)
	}
	news, _ := name.move(5)
	leave()
	a.waitForExtensions(4)
	a.expectLeading(term)
	for i := range news {
		news[i].Cut(harness.BothWays)
		a.waitForExtensions(4)
		a.expectLeading(term)
		news[i].Recover()
		a.waitForExtensions(2)
	}
	a.stop(nil)
	a.waitForReturn()
}

// The name is what the certificate must be for.
func TestMembers_NameAndTLS(t *testing.T) {
	if testing.Short() {
		t.Skip("needs etcd")
	}
	certs, err := harness.NewCerts(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	name := newTestName(t, harness.NewTestCluster(t, harness.ClusterConfig{TLS: certs}))
	name.move(2)
	query := func(host string) error {
		cfg := testConfig(t, []string{"https://" + host + ":" + name.port}, "")
		cfg.lookup = name.lookup
		cfg.TLS = TLS{
			CAFile:   certs.CAFile,
			CertFile: certs.ClientCertFile,
			KeyFile:  certs.ClientKeyFile,
		}
		_, err := query(t.Context(), cfg)
		return err
	}
	if err := query("localhost"); err != nil {
		t.Error(err)
	}
	if err := query("etcd.test"); err == nil || !strings.Contains(err.Error(), "not etcd.test") {
		t.Errorf("a query of a name that the certificate is not for: %v", err)
	}
}

func TestHost_Resolve(t *testing.T) {
	var found []string
	var failure error
	lookup := func(_ context.Context, name string) ([]string, error) {
		if name != "etcd" {
			t.Errorf("%q is looked up", name)
		}
		return found, failure
	}
	h := newHost("http://etcd:2379", Config{lookup: lookup})
	added := 0
	h.add = func(number int) {
		if added++; number != added {
			t.Errorf("member %d is added, want %d", number, added)
		}
	}
	for _, test := range []struct {
		step    string
		found   []string
		failure error
		want    []string // in any order
	}{
		{"no such name", nil, errors.New("no such host"), []string{""}},
		{"one address", []string{"1"}, nil, []string{"1"}},
		{"three", []string{"3", "2", "1"}, nil, []string{"1", "2", "3"}},
		{"no answer", nil, errors.New("no answer"), []string{"1", "2", "3"}},
		{"one has moved", []string{"3", "4", "1"}, nil, []string{"1", "3", "4"}},
		{"one is gone", []string{"3", "4"}, nil, []string{"", "3", "4"}},
		{"and comes elsewhere", []string{"3", "4", "5"}, nil, []string{"3", "4", "5"}},
	} {
		before := slices.Clone(h.addresses)
		found, failure = test.found, test.failure
		if err := h.resolve(t.Context()); !errors.Is(err, test.failure) {
			t.Errorf("%s: %v", test.step, err)
		}
		for i, address := range before {
			if slices.Contains(test.want, address) && address != "" && h.addresses[i] != address {
				t.Errorf(
					"%s: member %d has changed its address from %s to %s", test.step, i, address,
					h.addresses[i],
				)
			}
		}
		if got := slices.Sorted(
			slices.Values(h.addresses),
		); !slices.Equal(got, test.want) ||
			added != len(test.want)-1 {
			t.Errorf(
				"%s: addresses %q, want %q; %d members added", test.step, got, test.want, added,
			)
		}
	}
	for _, literal := range []string{"http://127.0.0.1:2379", "https://[::1]:2379"} {
		if h := newHost(literal, Config{}); h != nil {
			t.Errorf("%s is taken for the name %s", literal, h.name)
		}
	}
}

// A name may have had one address at first, whose member hangs.
func TestHedge_LooksAgain(t *testing.T) {
	cluster := newTestCluster3(t)
	name := newTestName(t, cluster)
	proxies, _ := name.move(2)
	name.mu.Lock()
	every := name.addresses
	name.addresses = every[:1]
	name.mu.Unlock()
	cfg := testConfig(t, []string{"http://etcd.test:" + name.port}, "")
	cfg.lookup = name.lookup
	ms, err := newMembers(cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer ms.close()
	ask := func() error {
		ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
		defer cancel()
		_, err := hedge(
			ctx, ms, 100*time.Millisecond,
			func(ctx context.Context, m *member) (reading, error) { return m.read(ctx, "any") },
		)
		return err
	}
	until(t, ask)
	proxies[0].Cut(harness.BothWays)
	name.mu.Lock()
	name.addresses = every
	name.mu.Unlock()
	if err := ask(); err == nil || !strings.Contains(err.Error(), "(127.0.0.2): no answer") {
		t.Errorf("asked the only member, which hangs: %v", err)
	}
	until(t, ask)
	if n := len(ms.all()); n != 3 {
		t.Errorf("%d members, want 3", n)
	}
}
