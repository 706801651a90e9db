package control

import (
	"fmt"
	"net/url"
	"strconv"
	"strings"
)

// Root is the prefix of all keys of this package. The number is that of the keys' layout.
const Root = "leasehold/v1/"

// Kind is what a key of this package is for.
type Kind string

// The kinds of keys.
const (
	// CandidateKey holds a Candidate, and is bound to that candidate's lease.
	CandidateKey Kind = "candidates"
	// HoldKey holds a Hold. That the key exists is the hold, whatever its value is.
	HoldKey Kind = "hold"
	// SwitchoverKey holds a Switchover, and is bound to a lease of its own, so that a request that
	// nobody serves goes away.
	SwitchoverKey Kind = "switchover"
	// HistoryKey holds a Term.
	HistoryKey Kind = "history"
	// EndedHoldKey holds nothing. Each hold and each release changes it, so that a request for a
	// hold that is delayed finds it changed.
	EndedHoldKey Kind = "ended-hold"
	// JobExitedKey holds nothing. A leader puts it in the transaction that deletes its own key,
	// when its job has exited. It is bound to the leader's lease. So a deletion at another revision
	// was not the leader's.
	JobExitedKey Kind = "job-exited"
)

// Prefix is the prefix of the keys beside the election.
func Prefix(election string) string { return Root + escape(election) + "/" }

// Candidates is the prefix of the keys of the election's candidates.
func Candidates(election string) string { return Prefix(election) + string(CandidateKey) + "/" }

// CandidateOf is the key of the candidate that has the lease.
func CandidateOf(election string, lease int64) string {
	return Candidates(election) + strconv.FormatInt(lease, 16)
}

// HoldOf is the key of the election's hold.
func HoldOf(election string) string { return Prefix(election) + string(HoldKey) }

// EndedHoldOf is the key that each hold and each release changes.
func EndedHoldOf(election string) string { return Prefix(election) + string(EndedHoldKey) }

// JobExitedOf is the key by which a leader says that its job has exited.
func JobExitedOf(election string) string { return Prefix(election) + string(JobExitedKey) }

// SwitchoverOf is the key of the request for a switchover.
func SwitchoverOf(election string) string { return Prefix(election) + string(SwitchoverKey) }

// History is the prefix of the keys of the election's terms.
func History(election string) string { return Prefix(election) + string(HistoryKey) + "/" }

// TermOf is the key of the term with the fencing token.
func TermOf(election string, token int64) string {
	return History(election) + strconv.FormatInt(token, 10)
}

// Key is what a key of this package says.
type Key struct {
	Election string
	Kind     Kind
	Lease    int64 // of a CandidateKey
	Token    int64 // of a HistoryKey
}

// ParseKey reads a key that a function of this package makes. Any other key is an error.
func ParseKey(key string) (Key, error) {
	none := fmt.Errorf("%q is no key of leasehold's", key)
	rest, ok := strings.CutPrefix(key, Root)
	segment, rest, ok2 := strings.Cut(rest, "/")
	election, err := unescape(segment)
	if !ok || !ok2 || err != nil {
		return Key{}, none
	}
	k := Key{Election: election}
	kind, id, _ := strings.Cut(rest, "/")
	var again string
	switch k.Kind = Kind(kind); k.Kind {
	case CandidateKey:
		k.Lease, err = strconv.ParseInt(id, 16, 64)
		again = CandidateOf(election, k.Lease)
	case HistoryKey:
		k.Token, err = strconv.ParseInt(id, 10, 64)
		again = TermOf(election, k.Token)
	case HoldKey:
		again = HoldOf(election)
	case SwitchoverKey:
		again = SwitchoverOf(election)
	case EndedHoldKey:
		again = EndedHoldOf(election)
	case JobExitedKey:
		again = JobExitedOf(election)
	}
	if err != nil || again != key { // each key has one spelling
		return Key{}, none
	}
	return k, nil
}

// Reserved reports whether the prefix of the election would hold keys of this package, or lie among
// them.
func Reserved(election string) bool {
	prefix := election + "/"
	return strings.HasPrefix(Root, prefix) || strings.HasPrefix(prefix, Root)
}

// empty stands for the empty name. No other name is escaped to it.
const empty = "%"

// escape makes a name one segment of a path. Unlike url.PathEscape, it never returns "", "." or
// "..", which programs that handle paths may drop.
func escape(name string) string {
	switch name {
	case "":
		return empty
	case ".", "..":
		return strings.ReplaceAll(name, ".", "%2E")
	}
	return url.PathEscape(name)
}

// unescape is the inverse of escape.
func unescape(segment string) (string, error) {
	if segment == empty {
		return "", nil
	}
	return url.PathUnescape(segment)
}
