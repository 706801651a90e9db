//go:build linux

package app

import (
	"fmt"
	"strconv"
	"strings"
	"text/tabwriter"

	"leasehold/election"
)

// statusReport is what `leasehold status --json` prints. Like the endpoint's JSON it may gain fields and renames none.
type statusReport struct {
	Name     string            `json:"name"` // the leader's identity, "" without one
	Election string            `json:"election"`
	Leader   *statusCandidate  `json:"leader"`
	Lease    *statusLease      `json:"lease"`
	Queue    []statusCandidate `json:"queue"` // in its order, the leader first
	Blockers []statusBlocker   `json:"blockers"`
}

type statusCandidate struct {
	Identity string `json:"identity"`
	Key      string `json:"key"`
	Token    int64  `json:"token"`
}

type statusLease struct {
	ID              string  `json:"id"`
	ValidForSeconds float64 `json:"valid_for_seconds"`
}

type statusBlocker struct {
	Key    string `json:"key"`
	Why    string `json:"why"`
	Remedy string `json:"remedy"`
}

func reportJSON(name string, r election.Report) statusReport {
	out := statusReport{Election: name, Queue: []statusCandidate{}, Blockers: []statusBlocker{}}
	if r.Leader != nil {
		leader := statusCandidate(*r.Leader)
		out.Name, out.Leader = leader.Identity, &leader
		out.Lease = &statusLease{strconv.FormatInt(r.LeaseID, 16), r.LeaseLeft.Seconds()}
	}
	for _, c := range r.Queue {
		out.Queue = append(out.Queue, statusCandidate(c))
	}
	for _, b := range r.Blockers {
		out.Blockers = append(out.Blockers, statusBlocker(b))
	}
	return out
}

func reportText(name string, r election.Report) string {
	var b strings.Builder
	if r.Leader == nil {
		fmt.Fprintf(&b, "%s: no leader\n", name)
	} else {
		fmt.Fprintf(&b, "%s: leader is %s, token %d, lease %x valid for %s\n", name, strconv.QuoteToGraphic(r.Leader.Identity), r.Leader.Token, r.LeaseID, r.LeaseLeft)
	}
	w := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	for i, c := range r.Queue {
		_, _ = fmt.Fprintf(w, "%d\t%s\ttoken %d\t%s\n", i+1, strconv.QuoteToGraphic(c.Identity), c.Token, c.Key)
	}
	_ = w.Flush() // a strings.Builder takes everything
	for _, x := range r.Blockers {
		fmt.Fprintf(&b, "blocked by %s: %s; to end the wait: %s\n", x.Key, x.Why, x.Remedy)
	}
	return b.String()
}
