package health

import (
	"sync"
	"time"
)

// maxTerms is how many terms are remembered.
const maxTerms = 20

// SeenTerm is a term as this process has seen it: it may have begun before, and may go on while
// nothing is known. The event terms has the last ones.
type SeenTerm struct {
	Identity string  `json:"identity" desc:"of the leader"`
	Token    int64   `json:"token" desc:"its fencing token"`
	Since    string  `json:"since" desc:"when it was first seen"`
	Until    *string `json:"until" desc:"when it was seen no more; null: it goes on"`
}

// terms are the last terms that this process has seen, the latest first. They are in its memory
// alone.
type terms struct {
	mu   sync.Mutex
	seen []SeenTerm
}

// note looks who leads now, and takes that in; nil: nobody is known. Nobody else looks meanwhile:
// what was seen earlier must not be taken in later, as if that term had come back.
func (t *terms) note(look func() *Leader) {
	t.mu.Lock()
	defer t.mu.Unlock()
	leader := look()
	last := &SeenTerm{}
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
	this := SeenTerm{Identity: leader.Identity, Token: leader.Token, Since: *at}
	t.seen = append([]SeenTerm{this}, t.seen[:min(len(t.seen), maxTerms-1)]...)
}

// json returns them on one line, with a newline at its end.
func (t *terms) json() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return encode(append([]SeenTerm{}, t.seen...), "")
}
