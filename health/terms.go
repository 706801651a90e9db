package health

import (
	"sync"
	"time"
)

// maxTerms is how many terms are remembered.
const maxTerms = 20

// seenTerm is a term as this process has seen it: it may have begun before, and may go on while
// nothing is known.
type seenTerm struct {
	Identity string  `json:"identity"` // of the leader
	Token    int64   `json:"token"`
	Since    string  `json:"since"` // when it was first seen
	Until    *string `json:"until"` // when it was seen no more; null: it goes on
}

// terms are the last terms that this process has seen, the latest first. They are in its memory
// alone.
type terms struct {
	mu   sync.Mutex
	seen []seenTerm
}

// note looks who leads now, and takes that in; nil: nobody is known. Nobody else looks meanwhile:
// what was seen earlier must not be taken in later, as if that term had come back.
func (t *terms) note(look func() *Leader) {
	t.mu.Lock()
	defer t.mu.Unlock()
	leader := look()
	last := &seenTerm{}
	if len(t.seen) > 0 {
		last = &t.seen[0]
	}
	if leader != nil && leader.Token == last.Token {
		last.Until = nil
		return
	}
	at := timestamp(time.Now())
	if last.Token != 0 && last.Until == nil {
		last.Until = at
	}
	if leader == nil {
		return
	}
	this := seenTerm{Identity: leader.Identity, Token: leader.Token, Since: *at}
	t.seen = append([]seenTerm{this}, t.seen[:min(len(t.seen), maxTerms-1)]...)
}

// json returns them on one line, with a newline at its end.
func (t *terms) json() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return encode(append([]seenTerm{}, t.seen...), "")
}
