package control

import (
	"cmp"
	"context"
	"errors"
	"log/slog"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"

	"leasehold/internal/quote"
)

const (
	// KeepTerms is how many terms stay in the history.
	KeepTerms = 100
	// Lost is why a term ended whose leader could not say so.
	Lost = "lost"

	// joinedDelay and begunDelay keep the records off the path to a start: a candidate that leads
	// soon does that first. leftDelay lets the next leader start first.
	// Many candidates may join at once, so each waits for up to joinedSpread more.
	joinedDelay  = 250 * time.Millisecond
	joinedSpread = 1500 * time.Millisecond
	begunDelay   = 200 * time.Millisecond
	leftDelay    = 10 * time.Millisecond
	// forbiddenRetry is for what etcd's roles forbid.
	forbiddenRetry = 5 * time.Minute
	// lastTime bounds what is written while the daemon exits.
	lastTime = time.Second
	// mostChanges bounds the changes in one transaction. etcd takes 128 by default.
	mostChanges = 100
	// mostPending bounds the terms that wait to be written while etcd can't be used.
	mostPending = 16
)

// Recorder writes what is known of one candidate: its record, and the history of its terms. Its
// other methods than Run never block.
type Recorder struct {
	cfg     RecorderConfig
	changed chan struct{} // room for one
	asleep  atomic.Bool   // Run does not know of the term that began

	mu      sync.Mutex
	lease   int64             // 0: there is none
	self    *pendingCandidate // nil: there is no lease, or it is written
	terms   []*pendingTerm    // those that are not wholly written; only the last one may go on
	retryAt time.Time
	retry   time.Duration // the last pause before an attempt
	problem string
}

// RecorderConfig configures a Recorder.
type RecorderConfig struct {
	Election string
	// Candidate is what it says of itself.
	Candidate Candidate
	Logger    *slog.Logger
	// Changed is called when Problem has changed. It must not block.
	Changed func()
}

// pendingCandidate is a candidate's record that is to be written.
type pendingCandidate struct {
	Candidate
	lease   int64
	adopted bool // it may be there, and knows since when
	due     time.Time
}

// pendingTerm is a term that is to be written.
type pendingTerm struct {
	Term
	adopted bool // its beginning may be there
	begun   bool // its beginning is written
	// ended: Term.Ended is set. dirty: it is to be written at due, or when the lease is released if
	// that is zero.
	ended, dirty bool
	due          time.Time
}

// NewRecorder makes a recorder.
func NewRecorder(cfg RecorderConfig) *Recorder {
	return &Recorder{cfg: cfg, changed: make(chan struct{}, 1)}
}

// Problem is why the records can't be written, or "".
func (r *Recorder) Problem() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.problem
}

// Joined notes that the candidate's key is in the queue, bound to the lease. adopted: the process
// before this one has put it.
func (r *Recorder) Joined(lease int64, adopted bool) {
	r.update(func() {
		self := &pendingCandidate{
			Candidate: r.cfg.Candidate, lease: lease, adopted: adopted,
			due: time.Now().Add(joinedDelay + rand.N(joinedSpread)),
		}
		self.Since = now()
		r.lease, r.self = lease, self
		r.release()
	})
}

// SetReady notes whether the candidate may lead.
func (r *Recorder) SetReady(ready bool) {
	r.update(func() {
		if r.cfg.Candidate.Ready == ready {
			return
		}
		r.cfg.Candidate.Ready = ready
		if r.lease == 0 {
			return
		}
		self := &pendingCandidate{
			Candidate: r.cfg.Candidate, lease: r.lease, adopted: true, due: time.Now(),
		}
		if self.Since = now(); r.self != nil {
			self.Since, self.adopted, self.due = r.self.Since, r.self.adopted, r.self.due
		}
		r.self = self
	})
}

// Left notes that the lease is revoked, or gone.
func (r *Recorder) Left() {
	r.update(func() {
		r.lease, r.self = 0, nil
		r.release()
	})
}

// release makes the ends of terms due.
func (r *Recorder) release() {
	for _, t := range r.terms {
		if t.ended && t.due.IsZero() {
			t.due = time.Now().Add(leftDelay)
		}
	}
}

// Began notes that a term has begun. adopted: it began in the process before this one.
func (r *Recorder) Began(token int64, adopted bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.terms = append(r.terms, &pendingTerm{
		Term: Term{
			Token: token, Identity: r.cfg.Candidate.Identity, Started: now(),
		},
		adopted: adopted, dirty: true, due: time.Now().Add(begunDelay),
	})
	if len(r.terms) > mostPending {
		r.terms = r.terms[1:]
	}
	r.asleep.Store(true)
}

// Renewed has a term written that Began noted. It is called when the lease is renewed: Began would
// wake Run while the job is being started.
func (r *Recorder) Renewed() {
	if r.asleep.CompareAndSwap(true, false) {
		r.poke()
	}
}

// Ended notes that the term that began last has ended, and that its job has exited. starts and exit
// are of the job. It does not wake Run: the lease is about to be released, and the next leader
// waits for that. Left has the end written.
func (r *Recorder) Ended(why string, starts int, exit *Exit) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.terms) == 0 {
		return
	}
	t := r.terms[len(r.terms)-1]
	t.Ended, t.Why, t.Starts, t.LastExit = now(), why, starts, exit
	t.ended, t.dirty, t.due = true, true, time.Time{}
}

func (r *Recorder) update(event func()) {
	r.mu.Lock()
	event()
	r.mu.Unlock()
	r.poke()
}

func (r *Recorder) poke() {
	select {
	case r.changed <- struct{}{}:
	default:
	}
}

// now is the time of day as the records have it.
func now() time.Time { return time.Now().UTC().Truncate(time.Millisecond) }

// Run writes the records until ctx ends. Then it writes the ends of terms whose lease is released,
// for at most a second.
func (r *Recorder) Run(ctx context.Context, etcd Etcd) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for ctx.Err() == nil {
		timer.Reset(r.write(ctx, etcd))
		select {
		case <-ctx.Done():
		case <-r.changed:
		case <-timer.C:
		}
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), lastTime)
	defer cancel()
	for _, t := range r.released() {
		select {
		case <-time.After(time.Until(t.due)):
		case <-ctx.Done():
		}
		_ = r.writeTerm(ctx, etcd, t)
	}
}

// released returns the terms that have ended and whose lease is released.
func (r *Recorder) released() (terms []*pendingTerm) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, t := range r.terms {
		if t.dirty && t.ended && !t.due.IsZero() && r.problem == "" {
			terms = append(terms, t)
		}
	}
	return terms
}

const never = time.Duration(1<<63 - 1)

// write writes what is due. It returns in what time to try again.
func (r *Recorder) write(ctx context.Context, etcd Etcd) time.Duration {
	for {
		self, term, wait := r.next()
		var err error
		switch {
		case self != nil:
			err = r.writeSelf(ctx, etcd, self)
		case term != nil:
			err = r.writeTerm(ctx, etcd, term)
		default:
			return wait
		}
		if ctx.Err() != nil {
			return never
		}
		r.attempted(etcd, err)
	}
}

// next returns what is to be written now, or in what time.
func (r *Recorder) next() (*pendingCandidate, *pendingTerm, time.Duration) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if wait := time.Until(r.retryAt); wait > 0 {
		return nil, nil, wait
	}
	wait := never
	if r.self != nil {
		until := time.Until(r.self.due)
		if until <= 0 {
			return r.self, nil, 0
		}
		wait = min(wait, until)
	}
	for _, t := range r.terms {
		if !t.dirty || t.due.IsZero() {
			continue
		}
		until := time.Until(t.due)
		if until <= 0 {
			return nil, t, 0
		}
		wait = min(wait, until)
	}
	return nil, nil, wait
}

// attempted notes whether the records can be written.
func (r *Recorder) attempted(etcd Etcd, err error) {
	r.mu.Lock()
	before := r.problem
	switch {
	case err == nil:
		r.retry, r.problem = 0, ""
	case errors.Is(err, rpctypes.ErrPermissionDenied):
		// The members may say it in another order next time.
		r.problem = cmp.Or(before, etcd.Explain(err, "readwrite",
			"the prefix "+quote.Value(Prefix(r.cfg.Election))).Error())
		r.retry = forbiddenRetry
	default:
		// What is wrong with etcd, the candidate reports.
		r.retry = min(max(2*r.retry, time.Second), time.Minute)
	}
	if r.retry > 0 {
		r.retryAt = time.Now().Add(r.retry*4/5 + rand.N(r.retry*2/5))
	}
	problem := r.problem
	r.mu.Unlock()
	if problem == before {
		return
	}
	if problem != "" {
		r.cfg.Logger.Warn("the records beside the election can't be written,"+
			" the election goes on without them", "reason", problem)
	} else {
		r.cfg.Logger.Info("the records beside the election can be written again")
	}
	r.cfg.Changed()
}

// writeSelf puts the candidate's record.
func (r *Recorder) writeSelf(ctx context.Context, etcd Etcd, self *pendingCandidate) error {
	key := CandidateOf(r.cfg.Election, self.lease)
	value := self.Candidate
	if self.adopted {
		kvs, err := read(ctx, etcd, &pb.RangeRequest{Key: []byte(key)})
		if err != nil {
			return err
		}
		var old Candidate
		if len(kvs) > 0 && Decode(kvs[0].Value, &old) == nil {
			value.Since = old.Since
		}
	}
	_, err := etcd.Txn(ctx, &pb.TxnRequest{Success: []*pb.RequestOp{
		put(key, &value, self.lease),
	}})
	if errors.Is(err, rpctypes.ErrLeaseNotFound) {
		err = nil // the candidate learns of that, and joins with another lease
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if err == nil && r.self == self {
		r.self = nil
	}
	return err
}

// writeTerm puts a term into the history. A request may be carried out again, long after: so only
// the end of a term is put whatever is there.
func (r *Recorder) writeTerm(ctx context.Context, etcd Etcd, t *pendingTerm) error {
	r.mu.Lock()
	term, begun, ended := t.Term, t.begun, t.ended
	r.mu.Unlock()
	key := TermOf(r.cfg.Election, term.Token)
	if !begun {
		txn, err := r.beginning(ctx, etcd, &term, t.adopted)
		if err == nil && len(txn.Success) > 0 {
			var resp *pb.TxnResponse
			if resp, err = etcd.Txn(ctx, txn); err == nil && !resp.Succeeded {
				err = errChanged
			}
		}
		if err != nil {
			return err
		}
	}
	if ended {
		if _, err := etcd.Txn(ctx, &pb.TxnRequest{
			Success: []*pb.RequestOp{put(key, &term, 0)},
		}); err != nil {
			return err
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	t.begun, t.Started = true, term.Started
	if t.ended == ended {
		t.dirty = false
	}
	r.terms = slices.DeleteFunc(r.terms, func(t *pendingTerm) bool { return t.ended && !t.dirty })
	return nil
}

// errChanged: somebody has written to the history meanwhile.
var errChanged = errors.New("the history has changed")

// latest is how many terms before its own a new leader looks at.
const latest = 3

// beginning returns what a new leader changes in the history: it puts its own term, if that is not
// there, completes the last terms that have no end, and deletes those beyond KeepTerms. A term that
// was adopted began when the history says so.
func (r *Recorder) beginning(
	ctx context.Context, etcd Etcd, own *Term, adopted bool,
) (*pb.TxnRequest, error) {
	keys, err := read(ctx, etcd, lastTerms(r.cfg.Election, 2*KeepTerms, true))
	if err != nil {
		return nil, err
	}
	ownKey := TermOf(r.cfg.Election, own.Token)
	var look []*pb.RangeRequest // at the values of a few: anybody may have written megabytes
	txn, others, present := &pb.TxnRequest{}, 0, false
	for _, kv := range keys {
		k, err := ParseKey(string(kv.Key))
		switch {
		case err != nil || k.Kind != HistoryKey: // none of ours
			continue
		case string(kv.Key) == ownKey:
			present = true
			look = append(look, &pb.RangeRequest{Key: kv.Key})
			continue
		case others < latest:
			look = append(look, &pb.RangeRequest{Key: kv.Key})
		case others >= KeepTerms-1 && len(txn.Success) < mostChanges:
			txn.Success = append(txn.Success, deletion(string(kv.Key)))
		}
		others++
	}
	if !present {
		txn.Compare = append(txn.Compare, created(ownKey, 0))
		txn.Success = append(txn.Success, put(ownKey, own, 0))
	}
	for _, one := range look {
		kvs, err := read(ctx, etcd, one)
		if err != nil {
			return nil, err
		}
		if len(kvs) > 0 {
			amend(txn, kvs[0], own, adopted)
		}
	}
	return txn, nil
}

// amend adds to a transaction what a new leader does with one term.
func amend(txn *pb.TxnRequest, kv *mvccpb.KeyValue, own *Term, adopted bool) {
	var t Term
	k, err := ParseKey(string(kv.Key))
	// Of a later format we would lose fields.
	if err != nil || Decode(kv.Value, &t) != nil || t.Version != Format {
		return
	}
	switch t.Token = k.Token; {
	case t.Token == own.Token && adopted:
		own.Started = t.Started
	case t.Token < own.Token && t.Ended.IsZero():
		t.Ended, t.Why = own.Started, Lost
		txn.Compare = append(txn.Compare, modified(string(kv.Key), kv.ModRevision))
		txn.Success = append(txn.Success, put(string(kv.Key), &t, 0))
	}
}

// deletion is a request to delete a key.
func deletion(key string) *pb.RequestOp {
	return &pb.RequestOp{Request: &pb.RequestOp_RequestDeleteRange{
		RequestDeleteRange: &pb.DeleteRangeRequest{Key: []byte(key)},
	}}
}

// lastTerms is a request for the last terms, the latest first. Their tokens don't order them:
// anybody may have written one.
func lastTerms(election string, n int64, keysOnly bool) *pb.RangeRequest {
	all := prefix(History(election))
	all.Limit, all.KeysOnly = n, keysOnly
	all.SortTarget, all.SortOrder = pb.RangeRequest_CREATE, pb.RangeRequest_DESCEND
	return all
}
