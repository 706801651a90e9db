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

// isComplete reports whether the watch is known to show all deletions.
func (w *watchConn) isComplete() bool {
	complete := w.complete.Load()
	return complete != nil && *complete
}

// askVersion asks the member for its version, unless that is known. The answer counts only if it
// came by the connection that carries the stream: after a restart, or behind a balancer, another
// one may lead to another version.
func (w *watchConn) askVersion(ctx context.Context) {
	if w.complete.Load() != nil {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, w.interval)
	defer cancel()
	resp, err := pb.NewMaintenanceClient(w.conn).Status(ctx, &pb.StatusRequest{})
	if err == nil && w.member.connections.Load() == w.connection { // else it is asked again
		complete := showsAllDeletions(resp.Version)
		w.complete.Store(&complete)
	}
}
