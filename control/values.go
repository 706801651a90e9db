package control

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"
)

const (
	// Format is the version of the values' format. A program reads a value of a later one as far as
	// it knows the fields.
	Format = 1
	// maxValue is how many bytes of a value are read. etcd takes a megabyte.
	maxValue = 16 << 10
	// maxText is how many bytes are kept of each text in a value.
	maxText = 256
)

// A Value is what a key holds, in JSON: a *Candidate, *Hold, *Switchover or *Term. Fields may be
// added, never renamed.
type Value interface {
	header() *Header
	// texts and times are the fields of these types.
	texts() []*string
	times() []*time.Time
}

// Header begins every value.
type Header struct {
	Version int `json:"version"` // Format
}

func (h *Header) header() *Header { return h }

// Candidate is what a candidate says of itself.
type Candidate struct {
	Header
	Identity  string    `json:"identity"`  // as in its key in the queue
	Priority  int       `json:"priority"`  // 0 to 100
	Leasehold string    `json:"leasehold"` // its version
	URL       string    `json:"url"`       // of its health endpoint; "": others can't reach it
	Since     time.Time `json:"since"`     // when it joined the queue
	Ready     bool      `json:"ready"`     // it may lead
}

func (c *Candidate) texts() []*string    { return []*string{&c.Identity, &c.Leasehold, &c.URL} }
func (c *Candidate) times() []*time.Time { return []*time.Time{&c.Since} }

// Hold keeps every candidate from becoming leader.
type Hold struct {
	Header
	Reason string    `json:"reason"`
	By     string    `json:"by"` // who asked: user@host
	Since  time.Time `json:"since"`
	Until  time.Time `json:"until,omitzero"` // zero: until it is released
	Stop   bool      `json:"stop"`           // the leader resigns, too
	// Token is the fencing token of who led when the hold was made, and goes on leading. 0: nobody
	// did, or it is not known.
	Token int64 `json:"token,omitempty"`
}

func (h *Hold) texts() []*string    { return []*string{&h.Reason, &h.By} }
func (h *Hold) times() []*time.Time { return []*time.Time{&h.Since, &h.Until} }

// Switchover asks the leader to hand over.
type Switchover struct {
	Header
	ID    string `json:"id"`              // of the request
	To    string `json:"to"`              // the identity of a candidate; "": the next one
	By    string `json:"by"`              // who asked: user@host
	Token int64  `json:"token,omitempty"` // the fencing token of the leader that is asked

	Answer Answer `json:"answer,omitempty"` // of the leader; "": none yet
	Why    string `json:"why,omitempty"`    // it has refused
	Key    string `json:"key,omitempty"`    // of the candidate to which it hands over
}

// Answer is what the leader says to a request for a switchover.
type Answer string

// The answers.
const (
	Accepted Answer = "accepted" // the job is being stopped
	Refused  Answer = "refused"  // the job goes on
)

func (s *Switchover) texts() []*string {
	return []*string{&s.ID, &s.To, &s.By, &s.Why, (*string)(&s.Answer)}
}

func (s *Switchover) times() []*time.Time { return nil }

// Term is one leadership, in the history.
type Term struct {
	Header
	Token    int64     `json:"token"` // the fencing token
	Identity string    `json:"identity"`
	Started  time.Time `json:"started"`
	Ended    time.Time `json:"ended,omitzero"` // zero: it goes on, or nobody knows
	Why      string    `json:"why"`            // it ended; "": it has not
	Starts   int       `json:"starts"`         // of the job
	LastExit *Exit     `json:"last_exit"`      // of the job; nil: none is known
}

func (t *Term) texts() []*string {
	all := []*string{&t.Identity, &t.Why}
	if t.LastExit != nil {
		all = append(all, &t.LastExit.Signal)
	}
	return all
}

func (t *Term) times() []*time.Time {
	all := []*time.Time{&t.Started, &t.Ended}
	if t.LastExit != nil {
		all = append(all, &t.LastExit.At)
	}
	return all
}

// Exit is how a job ended.
type Exit struct {
	Code   int       `json:"code"`             // 0 if a signal ended it
	Signal string    `json:"signal,omitempty"` // that signal, for example SIGKILL
	At     time.Time `json:"at,omitzero"`
}

// Encode returns the text of a value.
func Encode(v Value) []byte {
	v.header().Version = Format
	bound(v)
	text, err := json.Marshal(v)
	if err != nil { // no bounded value fails
		text = []byte(`{"version":1}`)
	}
	return text
}

// Decode reads a value that anybody may have written. It keeps what it can read of it, so v is
// sound even if there is an error: see bound.
func Decode(text []byte, v Value) error {
	if len(text) > maxValue {
		return fmt.Errorf("the value has %d bytes, more than %d", len(text), maxValue)
	}
	err := json.Unmarshal(text, v)
	bound(v)
	switch {
	case err != nil:
		return fmt.Errorf("read the value: %w", err)
	case v.header().Version < 1:
		return errors.New("the value has no version")
	}
	return nil
}

// bound makes texts UTF-8, and cuts those that are too long. It makes times UTC, and those that
// JSON can't have zero: Go reads an offset of 24 hours, but does not write it.
func bound(v Value) {
	for _, text := range v.texts() {
		*text = sound(*text)
	}
	for _, at := range v.times() {
		*at = at.UTC()
		if year := at.Year(); year < 1 || year > 9999 {
			*at = time.Time{}
		}
	}
}

// sound makes a text valid UTF-8, and bounds it.
func sound(text string) string {
	text = strings.ToValidUTF8(text, "�")
	if len(text) > maxText {
		text = strings.ToValidUTF8(text[:maxText], "")
	}
	return text
}
