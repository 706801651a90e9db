package kubernetes

import (
	"bytes"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"leasehold/internal/boottime"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const waitTimeout = 20 * time.Second

// server plays the API server: Services and EndpointSlices of one namespace.
type server struct {
	t       *testing.T
	dir     string // the service account
	address string

	mu      sync.Mutex
	changed chan struct{} // closed and replaced at each answer
	token   string        // the one that it takes
	service string        // JSON; "": there is none
	slice   *slice
	version int
	refused map[string]int    // by the verb: with this code
	handle  func(verb string) // before a request is carried out; may be nil
	asked   []string          // verbs, in the order of the answers
}

const plainService = `{"metadata": {"name": "leader", "uid": "u1"}, "spec": {"ports": [
	{"name": "web", "protocol": "TCP", "port": 80, "targetPort": 8080, "appProtocol": "http"},
	{"name": "dns", "protocol": "UDP", "port": 53}]}}`

// newServer starts one, which is asked by HTTPS.
func newServer(t *testing.T) *server {
	t.Helper()
	s := newHandler(t)
	listening := httptest.NewTLSServer(s)
	t.Cleanup(listening.Close)
	s.address = listening.Listener.Addr().String()
	s.write("ca.crt", string(pem.EncodeToMemory(&pem.Block{
		Type: "CERTIFICATE", Bytes: listening.Certificate().Raw,
	})))
	return s
}

// newHandler makes one that nobody can connect to.
func newHandler(t *testing.T) *server {
	t.Helper()
	s := &server{
		t: t, dir: t.TempDir(), changed: make(chan struct{}), token: "secret",
		service: plainService, refused: map[string]int{}, address: "api:443",
	}
	s.write("token", "secret\n")
	s.write("namespace", "jobs")
	return s
}

// write replaces a file of the service account.
func (s *server) write(name, text string) {
	s.t.Helper()
	path := filepath.Join(s.dir, name)
	if err := os.WriteFile(path+".new", []byte(text), 0o600); err != nil {
		s.t.Fatal(err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		s.t.Fatal(err)
	}
}

func (s *server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	verb := map[string]string{"POST": "create", "PUT": "update", "GET": "get slice"}[r.Method]
	const slices = "/apis/discovery.k8s.io/v1/namespaces/jobs/endpointslices"
	switch path := r.URL.Path; {
	case r.Method == http.MethodGet && path == "/api/v1/namespaces/jobs/services/leader":
		verb = "get service"
	case r.Method == http.MethodPost && path == slices,
		r.Method != http.MethodPost && path == slices+"/leader":
	default:
		s.t.Errorf("unexpected request: %s %s", r.Method, path)
	}
	s.mu.Lock()
	handle := s.handle
	s.mu.Unlock()
	var body []byte
	var err error
	if r.Body != nil {
		body, err = io.ReadAll(r.Body)
	}
	if handle != nil {
		handle(verb)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	code, answer := s.answer(verb, r.Header.Get("Authorization"), body)
	if err != nil {
		s.t.Error(err)
	}
	s.asked = append(s.asked, verb)
	close(s.changed)
	s.changed = make(chan struct{})
	w.WriteHeader(code)
	_, _ = w.Write(answer)
}

// answer carries a request out. The caller holds s.mu.
func (s *server) answer(verb, authorization string, body []byte) (code int, answer []byte) {
	status := func(code int) (int, []byte) {
		return code, fmt.Appendf(nil, `{"kind": "Status", "message": "the server says no"}`)
	}
	if authorization != "Bearer "+s.token {
		return status(http.StatusUnauthorized)
	}
	if code := s.refused[verb]; code != 0 {
		return status(code)
	}
	var sent slice
	if len(body) > 0 {
		if err := json.Unmarshal(body, &sent); err != nil {
			s.t.Error(err)
			return status(http.StatusBadRequest)
		}
	}
	switch {
	case verb == "get service" && s.service != "":
		return http.StatusOK, []byte(s.service)
	case verb == "get slice" && s.slice != nil:
	case verb == "create" && s.slice != nil:
		return status(http.StatusConflict)
	case verb == "update" && s.slice != nil &&
		sent.Metadata.ResourceVersion != s.slice.Metadata.ResourceVersion:
		return status(http.StatusConflict)
	case verb == "create", verb == "update" && s.slice != nil:
		s.put(sent)
	default:
		return status(http.StatusNotFound)
	}
	text, err := json.Marshal(s.slice)
	if err != nil {
		s.t.Error(err)
	}
	return http.StatusOK, text
}

// put stores a slice. The caller holds s.mu.
func (s *server) put(sent slice) {
	s.version++
	sent.Metadata.ResourceVersion = strconv.Itoa(s.version)
	s.slice = &sent
}

// change changes the server between two requests.
func (s *server) change(f func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f()
}

// holdNext holds the next request of that verb, which then has arrived. carryOut has it carried
// out, and returns when it is answered.
func (s *server) holdNext(verb string) (arrived <-chan struct{}, carryOut func()) {
	arrives, carriesOn, held := make(chan struct{}), make(chan struct{}), false
	s.change(func() {
		s.handle = func(v string) {
			s.mu.Lock()
			hold := v == verb && !held
			held = held || hold
			s.mu.Unlock()
			if hold {
				close(arrives)
				<-carriesOn
			}
		}
	})
	carryOn := sync.OnceFunc(func() { close(carriesOn) })
	s.t.Cleanup(carryOn)
	return arrives, func() {
		s.t.Helper()
		var before int
		s.change(func() { before = s.count(verb) })
		carryOn()
		s.wait("the old request is answered", func() bool { return s.count(verb) > before })
	}
}

// wait waits until it is true of the server.
func (s *server) wait(what string, is func() bool) {
	s.t.Helper()
	timeout := time.After(waitTimeout)
	for {
		s.mu.Lock()
		done, changed, now := is(), s.changed, s.shown()
		s.mu.Unlock()
		if done {
			return
		}
		select {
		case <-changed:
		case <-timeout:
			s.t.Fatalf("not so: %s; the EndpointSlice: %s", what, now)
		}
	}
}

// waitFor waits until the slice shows this.
func (s *server) waitFor(shown string) {
	s.t.Helper()
	s.wait(shown, func() bool { return s.shown() == shown })
}

// shown is the slice in short. The caller holds s.mu.
func (s *server) shown() string {
	if s.slice == nil {
		return "none"
	}
	text := "token " + s.slice.Metadata.Annotations[tokenAnnotation] + ":"
	for _, e := range s.slice.Endpoints {
		text += " " + strings.Join(e.Addresses, " ")
	}
	return text
}

func (s *server) count(verb string) (n int) {
	for _, asked := range s.asked {
		if asked == verb {
			n++
		}
	}
	return n
}

// pod is a candidate's pod.
type pod struct {
	*Endpoint
	log *logs

	mu   sync.Mutex
	term Term
}

// newPod makes a pod that does not lead yet. Its Run ends with the test.
func (s *server) newPod(address string) *pod { return s.adoptingPod(address, 0) }

// adoptingPod makes one whose process goes on with the term of that token.
func (s *server) adoptingPod(address string, token int64) *pod {
	p := &pod{log: &logs{changed: make(chan struct{})}}
	p.Endpoint = New(Config{
		Adopted: token, Election: "jobs/a",
		Server: s.address, Account: s.dir, Service: "leader",
		Address: netip.MustParseAddr(address), Now: boottime.Now,
		Logger: slog.New(slog.NewTextHandler(p.log, nil)),
		Term: func() Term {
			p.mu.Lock()
			defer p.mu.Unlock()
			if p.cfg.Now() >= p.term.StopAt {
				return Term{}
			}
			return p.term
		},
	})
	return p
}

// lead has a term that lasts until it is ended, or for this time.
func (p *pod) lead(token int64, lasts time.Duration) {
	p.mu.Lock()
	p.term = Term{Token: token, StopAt: p.cfg.Now() + lasts}
	p.mu.Unlock()
	p.Changed()
}

func (p *pod) end() { p.lead(0, 0) }

// logs are the lines that were logged.
type logs struct {
	mu      sync.Mutex
	text    bytes.Buffer
	changed chan struct{} // closed and replaced at each line
}

func (l *logs) Write(line []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	close(l.changed)
	l.changed = make(chan struct{})
	return l.text.Write(line)
}

func (l *logs) count(part string) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Count(l.text.String(), part)
}

// wait waits until this was logged n times.
func (l *logs) wait(t *testing.T, part string, n int) {
	t.Helper()
	timeout := time.After(waitTimeout)
	for {
		l.mu.Lock()
		count, changed := strings.Count(l.text.String(), part), l.changed
		l.mu.Unlock()
		if count >= n {
			return
		}
		select {
		case <-changed:
		case <-timeout:
			t.Fatalf("%q is logged %d times, want %d:\n%s", part, count, n, l)
		}
	}
}

func (l *logs) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}
