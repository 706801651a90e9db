package sim

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"time"

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
	crashed map[string]bool       // clients whose process is gone
}

func newNetwork(seed uint64) *network {
	return &network{
		seed: seed, links: map[string]*link{}, random: map[string]*rand.Rand{},
		crashed: map[string]bool{},
	}
}

// verdict implements simetcd.Config.Network.
func (n *network) verdict(client, member, _ string) (v simetcd.Verdict) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.crashed[client] {
		return simetcd.Verdict{DropRequest: true, DropAnswer: true}
	}
	daemon, _, _ := strings.Cut(client, ".")
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

func (n *network) recover() {
	n.mu.Lock()
	defer n.mu.Unlock()
	clear(n.links)
}

// crash cuts off the client for ever: its process is gone.
func (n *network) crash(client string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.crashed[client] = true
}
