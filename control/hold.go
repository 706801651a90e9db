package control

import (
	"context"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// SetHold holds the election. A hold that is there already is replaced, but who goes on leading
// stays as it was. lease binds the hold; 0: it stays until it is released. It returns the hold as
// it was written, and the identity of who goes on leading; "": nobody, or it is not known.
//
// The request may be carried out again, or long after: a member of etcd may hang. It does nothing
// then if there has been another hold, or a release, meanwhile: each leaves a trace.
func SetHold(
	ctx context.Context, etcd Etcd, election string, h Hold, lease int64,
) (Hold, string, error) {
	for {
		head, old, ended, err := readHold(ctx, etcd, election)
		if err != nil {
			return h, "", err
		}
		var before Hold
		if old != nil {
			_ = Decode(old.Value, &before)
		}
		if old != nil && before.By == h.By && before.Since.Equal(h.Since) {
			return before, identityOf(head, before.Token), nil // the last request has come through
		}
		mod := int64(0)
		var compare []*pb.Compare
		switch {
		case old != nil:
			h.Token, mod = before.Token, old.ModRevision
		case head != nil:
			h.Token = head.CreateRevision
			compare = append(compare, created(string(head.Key), head.CreateRevision))
		default:
			h.Token = 0
			empty := created(election+"/", 0)
			empty.RangeEnd = []byte(clientv3.GetPrefixRangeEnd(election + "/"))
			compare = append(compare, empty)
		}
		resp, err := etcd.Txn(ctx, &pb.TxnRequest{
			Compare: append(compare, modified(HoldOf(election), mod),
				modified(EndedHoldOf(election), ended)),
			Success: []*pb.RequestOp{
				put(HoldOf(election), &h, lease), put(EndedHoldOf(election), &Hold{}, 0),
			},
		})
		if err != nil {
			return h, "", err
		}
		if resp.Succeeded {
			return h, identityOf(head, h.Token), nil
		}
	}
}

// identityOf is the identity in the key if that has the token.
func identityOf(kv *mvccpb.KeyValue, token int64) string {
	if kv == nil || kv.CreateRevision != token || kv.Lease == 0 {
		return ""
	}
	return sound(string(kv.Value))
}

// readHold reads the oldest key of the election, and the hold; nil: there is none. ended is the mod
// revision of what the last release has left; 0: there was none.
func readHold(
	ctx context.Context, etcd Etcd, election string,
) (head, hold *mvccpb.KeyValue, ended int64, err error) {
	kvs, err := readAll(ctx, etcd, oldest(election),
		&pb.RangeRequest{Key: []byte(HoldOf(election))},
		&pb.RangeRequest{Key: []byte(EndedHoldOf(election)), KeysOnly: true})
	if err != nil {
		return nil, nil, 0, err
	}
	if len(kvs[0]) > 0 {
		head = kvs[0][0]
	}
	if len(kvs[1]) > 0 {
		hold = kvs[1][0]
	}
	if len(kvs[2]) > 0 {
		ended = kvs[2][0].ModRevision
	}
	return head, hold, ended, nil
}

// Release ends the hold. It returns the last one that it has read; nil: there was none. Also then
// it leaves its trace, for a request that has not come through yet.
func Release(ctx context.Context, etcd Etcd, election string) (last *Hold, err error) {
	for {
		_, kv, _, err := readHold(ctx, etcd, election)
		if err != nil {
			return last, err
		}
		var ops []*pb.RequestOp
		mod := int64(0)
		if kv != nil {
			last, mod = &Hold{}, kv.ModRevision
			_ = Decode(kv.Value, last)
			ops = append(ops, deletion(HoldOf(election)))
		}
		// No other one: a request that is delayed must not end a hold that was made since.
		resp, err := etcd.Txn(ctx, &pb.TxnRequest{
			Compare: []*pb.Compare{modified(HoldOf(election), mod)},
			Success: append(ops, put(EndedHoldOf(election), &Hold{}, 0)),
		})
		if err != nil || resp.Succeeded {
			return last, err
		}
	}
}

// remove deletes the key if it has that mod revision. It reports whether it did.
func remove(ctx context.Context, etcd Etcd, key string, mod int64) (bool, error) {
	resp, err := etcd.Txn(ctx, &pb.TxnRequest{
		Compare: []*pb.Compare{modified(key, mod)},
		Success: []*pb.RequestOp{deletion(key)},
	})
	return err == nil && resp.Succeeded, err
}

// created compares the create revision of a key; 0: it is not there.
func created(key string, revision int64) *pb.Compare {
	return &pb.Compare{
		Key: []byte(key), Target: pb.Compare_CREATE, Result: pb.Compare_EQUAL,
		TargetUnion: &pb.Compare_CreateRevision{CreateRevision: revision},
	}
}

// modified compares the mod revision of a key; 0: it is not there.
func modified(key string, revision int64) *pb.Compare {
	return &pb.Compare{
		Key: []byte(key), Target: pb.Compare_MOD, Result: pb.Compare_EQUAL,
		TargetUnion: &pb.Compare_ModRevision{ModRevision: revision},
	}
}

// Names reports whether the hold says that the candidate whose key has that create revision led
// when it was made. made is the create revision of the hold's key: if a stranger has made it,
// nobody knows, and any older key will do.
func (h *Hold) Names(made, candidate int64) bool {
	if h.Token == 0 {
		return candidate < made
	}
	return h.Token == candidate
}
