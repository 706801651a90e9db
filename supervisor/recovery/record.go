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

	Election string  `json:"election"`
	Identity string  `json:"identity"`
	Lease    leaseID `json:"lease"`

	// The file itself. A copy has another inode, or the same one with another time of birth.
	File fileID `json:"file"`
}

// fileID is a file: a copy of it has another one.
type fileID struct {
	Device uint64 `json:"device"`
	Inode  uint64 `json:"inode"`
	Born   int64  `json:"born"` // nanoseconds since 1970
}

// leaseID has always the same length, so that a new lease is written over the old one.
type leaseID int64

// MarshalText implements encoding.TextMarshaler.
func (l leaseID) MarshalText() ([]byte, error) {
	return fmt.Appendf(nil, "%016x", uint64(l)), nil
}

// UnmarshalText implements encoding.TextUnmarshaler.
func (l *leaseID) UnmarshalText(text []byte) error {
	n, err := strconv.ParseUint(string(text), 16, 64)
	*l = leaseID(n)
	return err
}

// The file is a line with the version and the checksum of the second line, which is JSON.
const (
	head      = "leasehold state 1 "
	headLen   = len(head) + 2*sha256.Size + 1
	maxRecord = 64 << 10
)

// encode returns the content of the file.
func (r *Record) encode() ([]byte, error) {
	for _, text := range []string{r.Cgroup, r.Election, r.Identity} {
		if !utf8.ValidString(text) {
			return nil, fmt.Errorf("%q is not UTF-8", text)
		}
	}
	body, err := json.Marshal(r)
	if err != nil {
		return nil, err
	}
	body = append(body, '\n')
	if headLen+len(body) > maxRecord {
		return nil, errors.New("too long")
	}
	return seal(body), nil
}

// seal puts the first line before the second.
func seal(body []byte) []byte {
	return append(fmt.Appendf(nil, "%s%x\n", head, sha256.Sum256(body)), body...)
}

// decode reads the content of the file. It takes only what encode writes.
func decode(content []byte) (*Record, error) {
	if len(content) < headLen || !bytes.HasPrefix(content, []byte(head)) {
		return nil, errors.New("it is not a state file of this version")
	}
	body := content[headLen:]
	if !bytes.Equal(content, seal(body)) {
		return nil, errors.New("its checksum is wrong")
	}
	r := &Record{}
	if err := json.Unmarshal(body, r); err != nil {
		return nil, fmt.Errorf("it can't be parsed: %w", err)
	}
	if again, err := r.encode(); err != nil || !bytes.Equal(again, content) {
		return nil, errors.New("it was not written by leasehold")
	}
	return r, nil
}
