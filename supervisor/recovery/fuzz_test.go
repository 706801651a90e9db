//go:build linux

package recovery

import (
	"bytes"
	"testing"
)

// FuzzDecode: whatever the file holds, it is either refused, or it is just what its Record, or
// that of elect, is written as. It proves something only where this process runs.
func FuzzDecode(f *testing.F) {
	content := encoded(f, testRecord())
	f.Add(content)
	f.Add(content[:len(content)-1])
	f.Add(content[bytes.IndexByte(content, '\n')+1:])
	f.Add([]byte(head))
	f.Add([]byte{})
	ofElect, err := (&held{BootID: "b", NetNS: 1, Election: "e", Lease: 7, Token: 2}).encode()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(ofElect)
	f.Add(ofElect[bytes.IndexByte(ofElect, '\n')+1:])
	f.Fuzz(func(t *testing.T, content []byte) {
		for _, content := range [][]byte{content, seal(electHead, content)} {
			var h held
			if decode(electHead, content, &h) != nil {
				continue
			}
			if again, err := h.encode(); err != nil || !bytes.Equal(again, content) {
				t.Fatalf("%q is read as %+v, which is %q, %v", content, h, again, err)
			}
		}
		r, err := decodeRecord(content)
		if err != nil {
			content = seal(head, content) // the checksum keeps the rest from being tried otherwise
			r, err = decodeRecord(content)
		}
		if err != nil {
			return
		}
		if again, err := r.encode(); err != nil || !bytes.Equal(again, content) {
			t.Fatalf("%q is read as %+v, which is %q, %v", content, r, again, err)
		}
		now := Place{BootID: "b", PID: 1, PidNS: 1}
		if r.Place.BootID == now.BootID {
			return // it may look at cgroups
		}
		if proof, err := r.prove(now); err == nil {
			t.Fatalf("%+v proves on another machine: %s", r, proof)
		}
	})
}
