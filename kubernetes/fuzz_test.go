package kubernetes

import (
	"encoding/json"
	"net/netip"
	"reflect"
	"testing"

	"leasehold/internal/quote"
)

// FuzzSlice: whatever the API server answers, a leader writes only what routes to it alone, with
// its own token, in the place of none that is higher. What it writes need not be written again. No
// message does anything to a terminal.
func FuzzSlice(f *testing.F) {
	f.Add(plainService, `{}`, int64(7))
	f.Add(plainService, `{"metadata": {"annotations": {"leasehold/fencing-token": "9"}}}`, int64(7))
	f.Add(plainService, `{"metadata": {"annotations": {"leasehold/election": "jobs/b"}}}`, int64(7))
	f.Add(`{"spec": {"ports": [{"targetPort": "\u001b[2J"}]}}`, `{"addressType": "IPv4"}`, int64(1))
	f.Add(`{"metadata": {"name": "a b", "uid": "u"}, "spec": {"ports": [{"port": -1}]}}`,
		`{"metadata": {"resourceVersion": "5", "labels": {"a": "b"}, "ownerReferences":
		[{"kind": "Service", "uid": "x"}]}, "endpoints": [{"addresses": ["10.0.0.9"]}]}`, int64(7))
	address := netip.MustParseAddr("10.0.0.1")
	f.Fuzz(func(t *testing.T, serviceJSON, sliceJSON string, token int64) {
		var of service
		var before slice
		if json.Unmarshal([]byte(serviceJSON), &of) != nil ||
			json.Unmarshal([]byte(sliceJSON), &before) != nil || token <= 0 {
			return
		}
		c := claim{"jobs/a", token, address}
		after, err := before.with(of, c)
		if err != nil {
			if text := err.Error(); text != quote.Printable(text) {
				t.Errorf("not printable: %q", text)
			}
			return
		}
		if written, err := before.token(); err != nil || written > token {
			t.Errorf("the token %d (%v) is replaced by %d", written, err, token)
		}
		if !before.of("jobs/a") || after.of("jobs/b") {
			t.Errorf("%+v is replaced by %+v", before, after)
		}
		written, err := after.token()
		if err != nil || written != token || len(after.Endpoints) != 1 ||
			!reflect.DeepEqual(after.Endpoints[0].Addresses, []string{"10.0.0.1"}) ||
			after.Metadata.ResourceVersion != before.Metadata.ResourceVersion {
			t.Errorf("written: %+v (%v)", after, err)
		}
		text, err := json.Marshal(after)
		var answered slice
		if err == nil {
			err = json.Unmarshal(text, &answered)
		}
		again, err2 := answered.with(of, c)
		if err != nil || err2 != nil || !again.same(answered) {
			t.Errorf("%s would be written again as %+v (%v, %v)", text, again, err, err2)
		}
	})
}
