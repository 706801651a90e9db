//go:build linux

package recovery

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"unicode/utf8"
)

// Record is what the state file holds.
type Record struct {
	Place Place `json:"place"` // of the guard
	// Cgroup holds every start of the job, and no job can leave it. "": there is none like that,
	// because CanLeave.
	Cgroup    string `json:"cgroup"` // from the root of the cgroup namespace
	CgroupIno uint64 `json:"cgroup_inode"`
	CanLeave  string `json:"can_leave"` // why; "": it can't

	Election string `json:"election"`
	Identity string `json:"identity"`
	Lease    fixed  `json:"lease"`

	// The file itself. A copy has another inode, or the same one with another time of birth.
	File fileID `json:"file"`
}

// fileID is a file: a copy of it has another one.
type fileID struct {
	Device uint64 `json:"device"`
	Inode  uint64 `json:"inode"`
	Born   int64  `json:"born"` // nanoseconds since 1970
}

// fixed is a number that has always the same length, so that a new one is written over the old one.
type fixed int64

// MarshalText implements encoding.TextMarshaler.
func (l fixed) MarshalText() ([]byte, error) {
	return fmt.Appendf(nil, "%016x", uint64(l)), nil
}

// UnmarshalText implements encoding.TextUnmarshaler.
func (l *fixed) UnmarshalText(text []byte) error {
	n, err := strconv.ParseUint(string(text), 16, 64)
	*l = fixed(n)
	return err
}

// The file is a line with the version and the checksum of the second line, which is JSON.
const (
	head      = "leasehold state 1 "
	electHead = "leasehold elect state 1 "
	maxRecord = 64 << 10
)

// content is what the file may hold.
type content interface {
	// encode returns the bytes of the file.
	encode() ([]byte, error)
}

func (r *Record) encode() ([]byte, error) {
	return encode(head, r, r.Cgroup, r.Election, r.Identity)
}

// encode returns the bytes of the file. texts are those in v that may be no UTF-8.
func encode(head string, v any, texts ...string) ([]byte, error) {
	for _, text := range texts {
		if !utf8.ValidString(text) {
			return nil, fmt.Errorf("%q is not UTF-8", text)
		}
	}
	body, err := json.Marshal(v)
	if err != nil {
		return nil, err
	}
	sealed := seal(head, append(body, '\n'))
	if len(sealed) > maxRecord {
		return nil, errors.New("too long")
	}
	return sealed, nil
}

// seal puts the first line before the second.
func seal(head string, body []byte) []byte {
	return append(fmt.Appendf(nil, "%s%x\n", head, sha256.Sum256(body)), body...)
}

// decode reads the bytes of the file. It takes only what encode writes.
func decode(head string, bytesOf []byte, c content) error {
	bodyAt := len(head) + 2*sha256.Size + 1
	if len(bytesOf) < bodyAt || !bytes.HasPrefix(bytesOf, []byte(head)) {
		return errors.New("it is not a state file of this version, or of the other command:" +
			" leasehold elect and leasehold -- COMMAND have one each")
	}
	body := bytesOf[bodyAt:]
	if !bytes.Equal(bytesOf, seal(head, body)) {
		return errors.New("its checksum is wrong")
	}
	if err := json.Unmarshal(body, c); err != nil {
		return fmt.Errorf("it can't be parsed: %w", err)
	}
	if again, err := c.encode(); err != nil || !bytes.Equal(again, bytesOf) {
		return errors.New("it was not written by leasehold")
	}
	return nil
}
