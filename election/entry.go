package election

import (
	"fmt"
	"log/slog"
	"strconv"
	"strings"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"

	"leasehold/internal/quote"
)

// maxIdentity is how many bytes of a key's value we keep: anybody can write a megabyte there.
const maxIdentity = 256

// maxKey is how many bytes of a blocker's key we show: anybody can write one of a megabyte.
const maxKey = 4 << 10

// queueEntry is one key under the election's prefix.
type queueEntry struct {
	key      string
	created  int64 // create revision: the order of the queue
	lease    int64
	identity string
	// candidate: a campaign in this election makes such a key: the prefix and the key's own lease
	// in hex.
	candidate bool
}

func newQueueEntry(prefix string, kv *mvccpb.KeyValue) queueEntry {
	value := kv.Value
	if len(value) > maxIdentity {
		value = value[:maxIdentity]
	}
	return queueEntry{
		key: string(kv.Key), created: kv.CreateRevision, lease: kv.Lease,
		identity:  strings.ToValidUTF8(string(value), "�"),
		candidate: kv.Lease != 0 && string(kv.Key) == fmt.Sprintf("%s%x", prefix, kv.Lease),
	}
}

func (e queueEntry) entry() *Entry {
	return &Entry{Identity: e.identity, Key: e.key, Token: e.created}
}

// election returns the name of the election that the key is a candidate's of: all of the key before
// its lease in hex, which is its last segment. It returns "" for a key of another form.
func (e queueEntry) election() string {
	slash := strings.LastIndexByte(e.key, '/')
	if e.lease == 0 || slash < 0 || e.key[slash+1:] != fmt.Sprintf("%x", e.lease) {
		return ""
	}
	return e.key[:slash]
}

// blocker returns why no candidate of this election will remove the key. It advises to delete only
// a key that will never expire: whoever keeps a lease alive needs its keys.
func (e queueEntry) blocker() *Blocker {
	if len(e.key) > maxKey {
		return &Blocker{
			Key: quote.Printable(e.key[:maxKey]) + "…",
			Why: fmt.Sprintf("it has %d bytes, which is not a candidate's; "+
				"etcdctl get --prefix --keys-only shows it whole", len(e.key)),
		}
	}
	b := &Blocker{Key: quote.Printable(e.key)}
	nested := e.election()
	switch {
	case e.lease == 0:
		b.Why = "it has no lease, so it will never expire"
		b.Remedy = remedy(e.key)
	case nested != "":
		b.Why = fmt.Sprintf("it belongs to the nested election %s and is kept by its candidates",
			quote.Shell(nested))
	default:
		b.Why = fmt.Sprintf("it is not a candidate's key, and somebody keeps its lease %x", e.lease)
	}
	return b
}

// remedy is a command for bash that deletes the key, and no other.
func remedy(key string) string {
	switch {
	case strings.Contains(key, "\x00"):
		// No argument of a command holds a NUL. bash would cut the key there, and that key may be a
		// leader's.
		return "etcdctl txn <<< " + quote.Shell("\ndel -- "+strconv.Quote(key)+"\n\n")
	case strings.HasPrefix(key, "-"):
		return "etcdctl del -- " + quote.Shell(key)
	}
	return "etcdctl del " + quote.Shell(key)
}

func (b *Blocker) warn(log *slog.Logger) {
	if b.Remedy == "" {
		log.Warn("a key ahead of ours is not a candidate's, waiting for its lease to end",
			"key", b.Key, "reason", b.Why)
		return
	}
	log.Warn("a key ahead of ours will not go by itself, waiting until somebody deletes it",
		"key", b.Key, "reason", b.Why, "remedy", b.Remedy)
}

// prefix is the prefix of the election's keys: its name and a slash.
func (cfg *Config) prefix() string { return cfg.Election + "/" }

// keyOf is the key of the candidate that has the lease.
func (cfg *Config) keyOf(lease int64) string { return fmt.Sprintf("%s%x", cfg.prefix(), lease) }

// wholePrefix is a request for all keys with the prefix.
func wholePrefix(prefix string) *pb.RangeRequest {
	return &pb.RangeRequest{
		Key: []byte(prefix), RangeEnd: []byte(clientv3.GetPrefixRangeEnd(prefix)),
	}
}
