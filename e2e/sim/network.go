package sim

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"

	"leasehold/e2e/sim/simetcd"
)

// link is what happens to the messages between a daemon and a member of etcd.
type link struct {
	requestsLost, answersLost, twice float64       // shares
	requestDelay, answerDelay        time.Duration // at most
	leastDelay                       float64       // at least this share of both
}

// network decides about each message. A client is named after its daemon and its process: a.3.
type network struct {
	seed uint64

	mu      sync.Mutex
	links   map[string]*link      // by daemon and member
	random  map[string]*rand.Rand // the same
	crashed map[string]time.Time  // when the client's process has exited
	armed   map[string]func()     // by daemon: see arm
}

func newNetwork(seed uint64) *network {
	return &network{
		seed: seed, links: map[string]*link{}, random: map[string]*rand.Rand{},
		crashed: map[string]time.Time{}, armed: map[string]func(){},
	}
}

// verdict implements simetcd.Config.Network.
func (n *network) verdict(client, member, method string) (v simetcd.Verdict) {
	n.mu.Lock()
	defer n.mu.Unlock()
	// What the process has sent arrives: it is asked for here when it has travelled.
	if at, crashed := n.crashed[client]; crashed &&
		(method == simetcd.Connect || time.Since(at) > simetcd.Latency) {
		return simetcd.Verdict{DropRequest: true, DropAnswer: true}
	}
	daemon, _, _ := strings.Cut(client, ".")
	if do := n.armed[daemon]; do != nil &&
		(method == pb.KV_Txn_FullMethodName || method == pb.Lease_LeaseRevoke_FullMethodName) {
		delete(n.armed, daemon)
		do()
	}
	name := daemon + member
	l := n.links[name]
	if l == nil {
		return v
	}
	r := n.random[name]
	if r == nil {
		r = generator(n.seed, name)
		n.random[name] = r
	}
	v.DropRequest = r.Float64() < l.requestsLost
	v.DropAnswer = r.Float64() < l.answersLost
	v.Duplicate = r.Float64() < l.twice
	share := func() float64 { return l.leastDelay + (1-l.leastDelay)*r.Float64() }
	v.Delay = time.Duration(share() * float64(l.requestDelay))
	v.AnswerDelay = time.Duration(share() * float64(l.answerDelay))
	return v
}

// set changes the daemon's links to the members.
func (n *network) set(daemon string, members []int, l *link) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, m := range members {
		n.links[fmt.Sprintf("%sm%d", daemon, m)] = l
	}
}

// arm calls do when the daemon has sent the next request that changes something, or may do so. nil:
// no more. The network is locked then, and the request has no delay yet: do must leave its work for
// later.
func (n *network) arm(daemon string, do func()) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.armed[daemon] = do
}

func (n *network) recover() {
	n.mu.Lock()
	defer n.mu.Unlock()
	clear(n.links)
	clear(n.armed)
}

// crash cuts off the client for ever: its process is gone.
func (n *network) crash(client string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.crashed[client] = time.Now()
}
