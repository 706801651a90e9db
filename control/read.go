package control

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// Summary is one election among others.
type Summary struct {
	Election   string
	Leader     string // the identity of the first candidate; "": there is none
	Token      int64  // its fencing token; 0: there is no candidate
	Since      time.Time
	Candidates int
	Hold       *Hold // nil: there is none
}

// List returns the elections with a candidate that has written its record, and those that are held,
// in the order of their names. The error is a *KeysError.
func List(ctx context.Context, etcd Etcd) ([]Summary, error) {
	var all []Summary
	for from := Root; ; {
		kvs, err := read(ctx, etcd, &pb.RangeRequest{
			Key: []byte(from), RangeEnd: []byte(clientv3.GetPrefixRangeEnd(Root)),
			Limit: 1, KeysOnly: true,
		})
		if err != nil {
			return nil, &KeysError{Permission: "read", Prefix: Root, Err: err}
		}
		if len(kvs) == 0 {
			return all, nil
		}
		segment, _, _ := strings.Cut(strings.TrimPrefix(string(kvs[0].Key), Root), "/")
		from = clientv3.GetPrefixRangeEnd(Root + segment + "/")
		name, err := unescape(segment)
		if err != nil || escape(name) != segment {
			continue // it is none of ours
		}
		s, shown, err := summarize(ctx, etcd, name)
		if err != nil {
			return nil, err
		}
		if shown {
			all = append(all, s)
		}
	}
}

// A KeysError is a request that failed, perhaps because etcd's roles forbid it.
type KeysError struct {
	Permission string // read, write or readwrite
	Prefix     string
	Err        error
}

func (e *KeysError) Error() string { return e.Err.Error() }

// Unwrap returns the cause.
func (e *KeysError) Unwrap() error { return e.Err }

// SteeringError returns the error of a request that steers the election: it reads the queue, and
// reads or writes the keys beside it. etcd does not say which of both its roles forbid, so this
// asks for the queue alone.
func SteeringError(ctx context.Context, etcd Etcd, election string, err error) *KeysError {
	e := &KeysError{Permission: "readwrite", Prefix: Prefix(election), Err: err}
	if errors.Is(err, rpctypes.ErrPermissionDenied) {
		_, err := read(ctx, etcd, oldest(election))
		if errors.Is(err, rpctypes.ErrPermissionDenied) {
			e.Permission, e.Prefix = "read", election+"/"
		}
	}
	return e
}

// summarize reads one election in one request. It reports whether there is more of it than a
// history.
func summarize(
	ctx context.Context, etcd Etcd, election string,
) (s Summary, shown bool, err error) {
	s.Election = election
	records := prefix(Candidates(election))
	records.CountOnly = true
	queue := prefix(election + "/")
	queue.CountOnly = true
	hold := &pb.RangeRequest{Key: []byte(HoldOf(election))}
	txn := &pb.TxnRequest{}
	for _, r := range []*pb.RangeRequest{
		records, queue, oldest(election), hold, lastTerms(election, latestTerms, false),
	} {
		txn.Success = append(txn.Success,
			&pb.RequestOp{Request: &pb.RequestOp_RequestRange{RequestRange: r}})
	}
	resp, err := etcd.Txn(ctx, txn)
	if err != nil {
		return s, false, &KeysError{Permission: "read", Prefix: election + "/", Err: err}
	}
	got := func(i int) *pb.RangeResponse { return resp.Responses[i].GetResponseRange() }
	s.Candidates = int(got(1).Count)
	held := got(3).Kvs
	if len(held) > 0 {
		s.Hold = &Hold{}
		_ = Decode(held[0].Value, s.Hold)
	}
	if got(0).Count == 0 && s.Hold == nil {
		return s, false, nil
	}
	kvs := got(2).Kvs
	if len(kvs) == 0 || kvs[0].Lease == 0 ||
		string(kvs[0].Key) != fmt.Sprintf("%s/%x", election, kvs[0].Lease) {
		return s, true, nil
	}
	if s.Hold != nil && !s.Hold.Names(held[0].CreateRevision, kvs[0].CreateRevision) {
		return s, true, nil
	}
	s.Leader, s.Token = identityOf(kvs[0], kvs[0].CreateRevision), kvs[0].CreateRevision
	for _, t := range readTerms(got(4).Kvs) {
		if t.Token == s.Token {
			s.Since = t.Started
		}
	}
	return s, true, nil
}

// latestTerms is among how many records of terms that of the present one is looked for. The record
// of a term may come after that of the next one.
const latestTerms = 3

// Terms returns the last n terms of the election, the latest first.
func Terms(ctx context.Context, etcd Etcd, election string, n int) ([]Term, error) {
	kvs, err := read(ctx, etcd, lastTerms(election, KeepTerms, false))
	if err != nil {
		return nil, &KeysError{Permission: "read", Prefix: Prefix(election), Err: err}
	}
	terms := readTerms(kvs)
	// The record of a term may come after that of the next one.
	slices.SortFunc(terms, func(a, b Term) int { return cmp.Compare(b.Token, a.Token) })
	return terms[:min(n, len(terms))], nil
}

// readTerms reads terms that anybody may have written.
func readTerms(kvs []*mvccpb.KeyValue) (terms []Term) {
	for _, kv := range kvs {
		var t Term
		k, err := ParseKey(string(kv.Key))
		if err != nil || k.Kind != HistoryKey || Decode(kv.Value, &t) != nil {
			continue
		}
		t.Token = k.Token
		terms = append(terms, t)
	}
	return terms
}

// Records reads the records of candidates, by their leases.
func Records(kvs []*mvccpb.KeyValue) map[int64]Candidate {
	all := map[int64]Candidate{}
	for _, kv := range kvs {
		var c Candidate
		k, err := ParseKey(string(kv.Key))
		// A record that is bound to another lease is none of that candidate's: it would stay when
		// the candidate has gone.
		if err == nil && k.Kind == CandidateKey && k.Lease == kv.Lease &&
			Decode(kv.Value, &c) == nil {
			all[k.Lease] = c
		}
	}
	return all
}
