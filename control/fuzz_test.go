package control

import (
	"encoding/json"
	"reflect"
	"strings"
	"testing"
	"unicode/utf8"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
)

// FuzzKey: every election has keys of its own, each key has one spelling, and none lies under the
// prefix of an election that may be used.
func FuzzKey(f *testing.F) {
	for _, name := range []string{"", ".", "..", "jobs/backup", "%", "a%2Fb", "\xff", "leasehold"} {
		f.Add(name, int64(0x1f), HoldOf(name))
	}
	f.Add("jobs", int64(-1), "leasehold/v1/jobs/history/07")
	f.Fuzz(func(t *testing.T, election string, number int64, foreign string) {
		for key, want := range map[string]Key{
			HoldOf(election):       {Election: election, Kind: HoldKey},
			SwitchoverOf(election): {Election: election, Kind: SwitchoverKey},
			CandidateOf(election, number): {
				Election: election, Kind: CandidateKey, Lease: number,
			},
			TermOf(election, number): {Election: election, Kind: HistoryKey, Token: number},
		} {
			if got, err := ParseKey(key); err != nil || got != want {
				t.Errorf("%q is read as %+v, %v, want %+v", key, got, err, want)
			}
			if !Reserved(election) && strings.HasPrefix(key, election+"/") {
				t.Errorf("%q lies under the prefix of %q", key, election)
			}
			segment, _, _ := strings.Cut(strings.TrimPrefix(key, Root), "/")
			if segment == "" || segment == "." || segment == ".." {
				t.Errorf("%q has a segment that a path drops", key)
			}
		}
		k, err := ParseKey(foreign)
		if err != nil {
			return
		}
		again := map[Kind]string{
			HoldKey: HoldOf(k.Election), SwitchoverKey: SwitchoverOf(k.Election),
			CandidateKey: CandidateOf(k.Election, k.Lease), HistoryKey: TermOf(k.Election, k.Token),
			EndedHoldKey: EndedHoldOf(k.Election), JobExitedKey: JobExitedOf(k.Election),
		}[k.Kind]
		if again != foreign {
			t.Errorf("%q is read as %+v, whose key is %q", foreign, k, again)
		}
	})
}

// FuzzValue: anybody may write a value in etcd. What is read of it is bounded, valid UTF-8, and can
// be written again.
func FuzzValue(f *testing.F) {
	for _, v := range []Value{
		&Candidate{Identity: "a"}, &Hold{Reason: "r\x1b[2J"}, &Switchover{ID: "1"},
		&Term{Token: 3, LastExit: &Exit{Signal: "SIGKILL"}},
	} {
		f.Add(Encode(v))
	}
	f.Add([]byte(`{"version":1,"reason":"` + strings.Repeat("ü", 200) + `"}`))
	f.Add([]byte(`{"version":9,"identity":{},"priority":1e99,"since":"x","last_exit":[]}`))
	for _, at := range []string{
		"2026-01-01T00:00:00+24:00", "2026-01-01T00:00:00-24:60", "0000-01-01T00:00:00+24:00",
		"9999-12-31T23:59:59-24:00", "2026-01-01T00:00:00+01:00",
	} {
		f.Add([]byte(`{"version":1,"since":"` + at + `"}`))
		f.Add([]byte(`{"version":1,"started":"` + at + `","last_exit":{"at":"` + at + `"}}`))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		for _, v := range []Value{&Candidate{}, &Hold{}, &Switchover{}, &Term{}} {
			err := Decode(text, v)
			for _, field := range v.texts() {
				if len(*field) > maxText || !utf8.ValidString(*field) {
					t.Errorf("%T has the text %q", v, *field)
				}
			}
			if _, e := json.Marshal(v); e != nil {
				t.Errorf("%q is read as %+v, which can't be written: %v", text, v, e)
			}
			again := reflect.New(reflect.TypeOf(v).Elem()).Interface().(Value)
			if e := Decode(Encode(v), again); e != nil {
				t.Errorf("%q is read as %+v (%v) and can't be written again: %v", text, v, err, e)
			}
		}
	})
}

// FuzzHistory: anybody may write into the history. A new leader changes no other key, and writes
// only what can be read again.
func FuzzHistory(f *testing.F) {
	f.Add("jobs", int64(7), []byte(`{"version":1,"started":"2026-01-01T00:00:00+24:00"}`))
	f.Add("jobs", int64(8), Encode(&Term{Token: 7}))
	f.Add("jobs", int64(9), []byte(`{"version":2}`))
	f.Fuzz(func(t *testing.T, election string, token int64, value []byte) {
		for _, of := range []int64{token, token - 1} {
			key := TermOf(election, of)
			kv := &mvccpb.KeyValue{Key: []byte(key), Value: value, ModRevision: 3}
			for _, adopted := range []bool{false, true} {
				own, txn := &Term{Token: token, Started: now()}, &pb.TxnRequest{}
				amend(txn, kv, own, adopted)
				if len(txn.Success) != len(txn.Compare) || of == token && len(txn.Success) > 0 {
					t.Errorf("%q: %v", value, txn)
				}
				for _, op := range txn.Success {
					got := op.GetRequestPut()
					if string(got.Key) != key || Decode(got.Value, &Term{}) != nil {
						t.Errorf("%q: %v", value, txn)
					}
				}
				if Decode(Encode(own), &Term{}) != nil {
					t.Errorf("%q: %+v", value, own)
				}
			}
		}
	})
}
