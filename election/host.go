package election

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"net/url"
	"slices"
	"sync"
	"sync/atomic"

	"google.golang.org/grpc"
)

// host is an endpoint whose host is a name. Each address of the name counts as a member. gRPC would
// make one connection for all addresses, and if that member hangs, there would be no other to ask.
// The name is looked up at each attempt to connect, and when no member has answered a request. We
// never connect again to an address that the name has lost: it may belong to another etcd by then.
type host struct {
	name, port string
	lookup     func(ctx context.Context, name string) ([]string, error)
	dial       func(ctx context.Context, address string) (net.Conn, error)
	add        func(number int) // makes one more member
	again      atomic.Bool      // lookAgain is under way

	mu sync.Mutex
	// addresses are those of the members, by number. A blank one waits for a new address.
	addresses []string
}

// newHost returns nil for an endpoint whose host is an address.
func newHost(endpoint string, cfg Config) *host {
	u, err := url.Parse(endpoint)
	if err != nil || u.Port() == "" || net.ParseIP(u.Hostname()) != nil {
		return nil
	}
	h := &host{
		name: u.Hostname(), port: u.Port(), lookup: cfg.lookup, dial: cfg.Dial,
		addresses: []string{""},
	}
	if h.lookup == nil {
		h.lookup = net.DefaultResolver.LookupHost
	}
	if h.dial == nil {
		h.dial = func(ctx context.Context, address string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "tcp", address)
		}
	}
	return h
}

// resolve looks the name up and makes a member for each new address.
func (h *host) resolve(ctx context.Context) error {
	found, err := h.lookup(ctx, h.name)
	if err != nil {
		return err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	added := slices.DeleteFunc(slices.Clone(found),
		func(a string) bool { return slices.Contains(h.addresses, a) })
	slices.Sort(added)
	added = slices.Compact(added) // /etc/hosts may name an address twice
	// Many candidates have the same name: they should not all begin with the same member.
	rand.Shuffle(len(added), func(i, j int) { added[i], added[j] = added[j], added[i] })
	for i, address := range h.addresses {
		switch {
		case slices.Contains(found, address):
		case len(added) == 0:
			h.addresses[i] = ""
		default:
			h.addresses[i], added = added[0], added[1:]
		}
	}
	for _, address := range added {
		h.addresses = append(h.addresses, address)
		h.add(len(h.addresses) - 1)
	}
	return nil
}

func (h *host) address(number int) string {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.addresses[number]
}

// dialer makes the member of that number connect to its address. Everything else, such as the name
// that TLS checks, is as if gRPC had looked the name up.
func (h *host) dialer(number int) grpc.DialOption {
	return grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
		if err := h.resolve(ctx); err != nil {
			return nil, err
		}
		address := h.address(number)
		if address == "" {
			return nil, fmt.Errorf("%s has fewer addresses now", h.name)
		}
		return h.dial(ctx, net.JoinHostPort(address, h.port))
	})
}

// lookAgain looks the names up, in the background.
func (ms *members) lookAgain() {
	for _, h := range ms.hosts {
		if h.again.CompareAndSwap(false, true) {
			ms.closing.Go(func() {
				defer h.again.Store(false)
				ctx, cancel := context.WithTimeout(context.Background(), HeartbeatInterval)
				defer cancel()
				_ = h.resolve(ctx) // an error shows when the next connection is made
			})
		}
	}
}
