package election

import (
	"context"
	"fmt"
	"net"
	"strings"
	"sync/atomic"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc/credentials"
)

// showsAllDeletions reports whether the watches of etcd's version show all deletions. Before, a
// watch that was opened or resumed at the revision of a compaction missed the deletion made there
// (https://github.com/etcd-io/etcd/pull/19249).
func showsAllDeletions(version string) bool {
	var major, minor, patch int
	if n, _ := fmt.Sscanf(version, "%d.%d.%d", &major, &minor, &patch); n < 3 {
		return false
	}
	switch {
	case major != 3:
		return major > 3
	case minor == 4:
		return patch >= 36
	case minor == 5:
		return patch >= 18
	case minor == 6 && patch == 0:
		return !strings.Contains(version, "-") // release candidates
	}
	return minor >= 6
}

// counted are transport credentials that count the connections that are made with them.
type counted struct {
	credentials.TransportCredentials
	connections *atomic.Int64
}

// ClientHandshake implements credentials.TransportCredentials.
func (c counted) ClientHandshake(
	ctx context.Context, authority string, conn net.Conn,
) (net.Conn, credentials.AuthInfo, error) {
	c.connections.Add(1)
	return c.TransportCredentials.ClientHandshake(ctx, authority, conn)
}

// Clone implements credentials.TransportCredentials.
func (c counted) Clone() credentials.TransportCredentials {
	return counted{c.TransportCredentials.Clone(), c.connections}
}

// incomplete is the value of watchConn.complete if a deletion may have been missed.
const incomplete = -1

// isComplete reports whether the watch is known to have shown all deletions.
func (w *watchConn) isComplete() bool {
	return w.complete.Load() == w.member.connections.Load() && w.isOrdered()
}

// isOrdered reports whether the watch shows a hold before all that has happened in the queue since,
// or need not show it. After another stream was opened, etcd sends what was missed in any order.
func (w *watchConn) isOrdered() bool {
	s := w.queue.cfg.steering
	return s == nil || s.whyDenied() != nil ||
		w.steered != nil && w.opened == w.member.streams.Load()
}

// askVersion asks the member for its version, unless that of this connection is known. After a
// restart, or behind a balancer, the next connection may lead to another version.
func (w *watchConn) askVersion(ctx context.Context) {
	connection := w.member.connections.Load()
	if known := w.complete.Load(); known == connection || known == incomplete {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, w.interval)
	defer cancel()
	resp, err := pb.NewMaintenanceClient(w.client.ActiveConnection()).
		Status(ctx, &pb.StatusRequest{})
	switch {
	case err != nil: // it is asked again
	case showsAllDeletions(resp.Version):
		w.complete.Store(connection)
	default:
		w.complete.Store(incomplete)
	}
}
