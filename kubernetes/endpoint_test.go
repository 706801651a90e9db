package kubernetes

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"math/big"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// start runs a pod until the test, or stop, ends it.
func start(t *testing.T, p *pod) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() { p.Run(ctx) })
	stop = func() {
		cancel()
		running.Wait()
	}
	t.Cleanup(stop)
	return stop
}

// A leader is the endpoint while it leads, with the ports of the Service; then nobody is.
func TestEndpoint_OneTerm(t *testing.T) {
	s := newServer(t)
	p := s.newPod("10.1.2.3")
	start(t, p)
	p.lead(7, time.Hour)
	s.waitFor("token 7: 10.1.2.3")
	want := slice{
		APIVersion: "discovery.k8s.io/v1", Kind: "EndpointSlice", AddressType: "IPv4",
		Metadata: metadata{
			Name: "leader", ResourceVersion: "1",
			Labels: map[string]string{
				"kubernetes.io/service-name":             "leader",
				"endpointslice.kubernetes.io/managed-by": "leasehold",
			},
			Annotations: map[string]string{
				"leasehold/fencing-token": "7", "leasehold/election": "jobs/a",
			},
			OwnerReferences: []owner{{"v1", "Service", "leader", "u1"}},
		},
		Endpoints: []endpoint{{[]string{"10.1.2.3"}, conditions{true}}},
		Ports:     []port{{"web", "TCP", 8080, "http"}, {"dns", "UDP", 53, ""}},
	}
	s.change(func() {
		if !reflect.DeepEqual(*s.slice, want) {
			t.Errorf("the EndpointSlice is\n%+v, want\n%+v", *s.slice, want)
		}
	})
	p.log.wait(t, "the Service routes to this pod", 1)
	p.end()
	s.waitFor("token 7:")
	p.log.wait(t, "does not route to this pod any more", 1)
	p.lead(8, time.Hour)
	s.waitFor("token 8: 10.1.2.3")
	p.log.wait(t, "the Service routes to this pod", 2)
}

// An address of the other kind is written as such.
func TestEndpoint_IPv6(t *testing.T) {
	s := newServer(t)
	p := s.newPod("fd00::7")
	start(t, p)
	p.lead(7, time.Hour)
	s.waitFor("token 7: fd00::7")
	s.change(func() {
		if s.slice.AddressType != "IPv6" {
			t.Errorf("the type of the address is %s", s.slice.AddressType)
		}
	})
}

// The next leader replaces the one before, which then leaves it alone, also if it learns late that
// it does not lead.
func TestEndpoint_NextLeader(t *testing.T) {
	s := newServer(t)
	older, newer := s.newPod("10.0.0.1"), s.newPod("10.0.0.2")
	start(t, older)
	start(t, newer)
	older.lead(5, time.Hour)
	s.waitFor("token 5: 10.0.0.1")
	newer.lead(7, time.Hour)
	s.waitFor("token 7: 10.0.0.2")
	older.end()
	older.log.wait(t, "does not route to this pod any more", 1)
	older.lead(6, time.Hour) // as a candidate that knows of nobody
	older.log.wait(t, "higher fencing token 7", 1)
	s.change(func() {
		if s.shown() != "token 7: 10.0.0.2" || s.count("update") != 1 {
			t.Errorf("the EndpointSlice is %s after %v", s.shown(), s.asked)
		}
	})
	newer.end()
	s.waitFor("token 7:")
}

// A write that the old leader has sent, and that arrives after that of the next one, changes
// nothing: the first one of all, which creates the object, and one that changes it.
func TestEndpoint_DelayedWrite(t *testing.T) {
	for _, verb := range []string{"create", "update"} {
		t.Run(verb, func(t *testing.T) {
			s := newServer(t)
			older, newer := s.newPod("10.0.0.1"), s.newPod("10.0.0.2")
			stop := start(t, older)
			start(t, newer)
			if verb == "update" {
				s.change(func() { s.put(slice{}) })
			}
			arrived, carryOut := s.holdNext(verb)
			older.lead(5, time.Hour)
			<-arrived
			stop() // the old leader is gone, and its request is on its way
			newer.lead(7, time.Hour)
			s.waitFor("token 7: 10.0.0.2")
			carryOut()
			s.waitFor("token 7: 10.0.0.2")
		})
	}
}

// A write that went unanswered arrives after the pod's own next one: it changes nothing, also if
// what the pod has read before was as it wanted it.
func TestEndpoint_OwnDelayedWrite(t *testing.T) {
	old := withToken("3", "10.0.0.9")
	for name, test := range map[string]struct {
		before *slice
		verb   string // of the write that is delayed
		again  bool   // it is that which takes the address out, and the pod leads again
	}{
		"create":                {verb: "create"},
		"replace":               {&old, "update", false},
		"put in a second time":  {&slice{}, "update", false},
		"take out, though well": {&slice{}, "update", true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newServer(t)
			p := s.newPod("10.0.0.1")
			if test.before != nil {
				s.put(*test.before)
			}
			start(t, p)
			if test.before != nil && test.before != &old {
				p.lead(5, time.Hour)
				s.waitFor("token 5: 10.0.0.1")
				if !test.again {
					p.end()
					s.waitFor("token 5:")
				}
			}
			arrived, carryOut := s.holdNext(test.verb)
			want := "token 5:"
			if test.again {
				p.end()
			} else {
				p.lead(5, time.Hour)
			}
			<-arrived
			var before int
			s.change(func() { before = s.version })
			if test.again {
				p.lead(5, time.Hour)
				want += " 10.0.0.1"
			} else {
				p.end()
			}
			s.wait("there is another version", func() bool { return s.version > before })
			s.waitFor(want)
			carryOut()
			s.waitFor(want)
		})
	}
}

// An answer may leave open whether the write will still be carried out: then the next one differs.
func TestEndpoint_UnclearAnswer(t *testing.T) {
	for code, want := range map[int]string{
		http.StatusGatewayTimeout: "1", http.StatusForbidden: "",
	} {
		s := newServer(t)
		s.refused["create"] = code
		p := s.newPod("10.0.0.1")
		start(t, p)
		p.lead(5, time.Hour)
		s.wait("it writes", func() bool { return s.count("create") >= 1 })
		s.change(func() { delete(s.refused, "create") })
		s.waitFor("token 5: 10.0.0.1")
		s.change(func() {
			if got := s.slice.Metadata.Annotations[countAnnotation]; got != want {
				t.Errorf("after the answer %d the count is %q, want %q", code, got, want)
			}
		})
	}
}

// Somebody else writes between the leader's read and its write: that is kept, and the leader
// writes.
func TestEndpoint_Conflict(t *testing.T) {
	s := newServer(t)
	p := s.newPod("10.0.0.1")
	s.put(slice{Metadata: metadata{Name: "leader"}})
	s.handle = func(verb string) {
		s.mu.Lock()
		defer s.mu.Unlock()
		if verb == "update" && s.version == 1 {
			other := *s.slice
			other.Metadata.Annotations = map[string]string{"theirs": "kept"}
			other.Metadata.Finalizers = []string{"theirs/too"}
			s.put(other)
		}
	}
	start(t, p)
	p.lead(5, time.Hour)
	s.waitFor("token 5: 10.0.0.1")
	s.change(func() {
		m := s.slice.Metadata
		if m.Annotations["theirs"] != "kept" || len(m.Finalizers) != 1 || s.count("update") != 2 {
			t.Errorf("after %v: %+v", s.asked, m)
		}
	})
	if p.log.count("level=WARN") != 0 {
		t.Errorf("a conflict is nothing to warn of:\n%s", p.log)
	}
}

// A right is missing: the log names it, once. When it is granted, the leader writes.
func TestEndpoint_Forbidden(t *testing.T) {
	for verb, right := range map[string]string{
		"get service": "get services leader",
		"get slice":   "get endpointslices.discovery.k8s.io leader",
		"create":      "create endpointslices.discovery.k8s.io",
		"update":      "update endpointslices.discovery.k8s.io leader",
	} {
		t.Run(verb, func(t *testing.T) {
			t.Parallel()
			s := newServer(t)
			if verb == "update" {
				s.put(slice{})
			}
			s.refused[verb] = http.StatusForbidden
			p := s.newPod("10.0.0.1")
			start(t, p)
			p.lead(5, time.Hour)
			s.wait("it tries again", func() bool { return s.count(verb) >= 3 })
			s.change(func() { delete(s.refused, verb) })
			s.waitFor("token 5: 10.0.0.1")
			p.log.wait(t, "written again", 1)
			p.end()
			s.waitFor("token 5:")
			if p.log.count("level=WARN") != 1 || p.log.count(`right="`+right+`"`) != 1 ||
				p.log.count("the server says no") != 1 || p.log.count("written again") != 1 {
				t.Errorf("want one warning that names the right %q, and its end:\n%s", right, p.log)
			}
		})
	}
}

// Kubernetes replaces the files of the service account while the pod runs.
func TestEndpoint_FilesAreReplaced(t *testing.T) {
	s := newServer(t)
	p := s.newPod("10.0.0.1")
	start(t, p)
	p.lead(5, time.Hour)
	s.waitFor("token 5: 10.0.0.1")
	s.change(func() { s.token = "other" })
	p.end()
	s.wait("the old token is refused", func() bool { return s.count("get slice") > 2 })
	s.write("token", "other")
	s.waitFor("token 5:")

	theirs := newServer(t)
	authority, err := os.ReadFile(filepath.Join(theirs.dir, "ca.crt"))
	if err != nil {
		t.Fatal(err)
	}
	theirs.write("ca.crt", otherAuthority(t))
	p = theirs.newPod("10.0.0.1")
	start(t, p)
	p.lead(5, time.Hour)
	p.log.wait(t, "level=WARN", 1)
	theirs.change(func() {
		if len(theirs.asked) != 0 {
			t.Errorf("a server that another authority has signed was asked: %v", theirs.asked)
		}
	})
	theirs.write("ca.crt", string(authority))
	theirs.waitFor("token 5: 10.0.0.1")
}

// otherAuthority makes a certificate.
func otherAuthority(t *testing.T) string {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
}

// The API server hangs. The pod gives up what it is asked no longer, and its exit is not held up.
func TestEndpoint_Hangs(t *testing.T) {
	s := newServer(t)
	p := s.newPod("10.0.0.1")
	stop := start(t, p)
	p.lead(5, time.Hour)
	s.waitFor("token 5: 10.0.0.1")
	arrived, carryOn := make(chan struct{}, 100), make(chan struct{})
	s.change(func() {
		s.handle = func(string) {
			arrived <- struct{}{}
			<-carryOn
		}
	})
	defer close(carryOn)
	p.end()
	<-arrived
	began := time.Now()
	p.lead(6, time.Hour)
	// By another connection, without waiting for the first answer.
	<-arrived
	if took := time.Since(began); took > attemptTime/2 {
		t.Errorf("the next attempt came after %v", took)
	}
	began = time.Now()
	stop()
	if took := time.Since(began); took > 10*(exitDelay+exitTime) {
		t.Errorf("Run returned after %v", took)
	}
}

// stop-at takes the pod out, though nobody says that anything has changed; unless the lease was
// renewed.
func TestEndpoint_StopAt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newHandler(t)
		p := s.newPod("10.0.0.1")
		p.inBubble(s)
		start(t, p)
		p.lead(5, time.Second)
		synctest.Wait()
		p.mu.Lock()
		p.term.StopAt += time.Second // a renewal
		p.mu.Unlock()
		for _, step := range []struct {
			after time.Duration
			want  string
		}{
			{2*time.Second + leaveDelay - 1, "token 5: 10.0.0.1"},
			{1, "token 5:"},
		} {
			time.Sleep(step.after)
			synctest.Wait()
			s.change(func() {
				if s.shown() != step.want {
					t.Errorf("after %v: %s", p.cfg.Now(), s.shown())
				}
			})
		}
	})
}

// A term that ends while the leader reads is no reason to write, or to warn, whoever learns of it
// when.
func TestEndpoint_EndsMeanwhile(t *testing.T) {
	s := newServer(t)
	p := s.newPod("10.0.0.1")
	s.handle = func(verb string) {
		if verb == "get slice" {
			p.mu.Lock()
			p.term = Term{}
			p.mu.Unlock()
		}
	}
	start(t, p)
	p.lead(5, time.Hour)
	s.wait("it takes itself out", func() bool { return s.count("get slice") >= 2 })
	s.change(func() {
		if s.slice != nil || p.log.count("level=WARN") != 0 {
			t.Errorf("it has written %s:\n%s", s.shown(), p.log)
		}
	})
}

// A daemon that exits takes its address out before.
func TestEndpoint_Exit(t *testing.T) {
	s := newServer(t)
	p := s.newPod("10.0.0.1")
	stop := start(t, p)
	p.lead(5, time.Hour)
	s.waitFor("token 5: 10.0.0.1")
	p.mu.Lock()
	p.term = Term{}
	p.mu.Unlock()
	stop()
	s.change(func() {
		if s.shown() != "token 5:" {
			t.Errorf("the EndpointSlice after the exit: %s", s.shown())
		}
	})
}

// A leader was killed, so its address is in the Service. The next process in its pod takes it out,
// unless it goes on with the term. It leaves alone what others have written.
func TestEndpoint_Left(t *testing.T) {
	for name, test := range map[string]struct {
		adopted int64
		before  *slice // nil: none
		want    string // "": as before
	}{
		"anew":                        {0, new(withToken("5", "10.0.0.1")), "token 5:"},
		"anew, another's":             {0, new(withToken("5", "10.0.0.2")), ""},
		"anew, another election's":    {0, new(ofAnother("5", "10.0.0.1")), ""},
		"adopted, another election's": {5, new(ofAnother("4", "10.0.0.1")), ""},
		"anew, one of two":            {0, new(withToken("5", "10.0.0.1", "10.0.0.2")), ""},
		"anew, nobody's":              {0, new(withToken("5")), ""},
		"anew, none":                  {0, nil, ""},
		"adopted":                     {5, new(withToken("5", "10.0.0.1")), "token 5:"},
		"adopted, the next one's":     {5, new(withToken("7", "10.0.0.2")), ""},
		// The one that was killed may have sent its first write just before.
		"adopted, none": {5, nil, "token 5:"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newServer(t)
			if test.before != nil {
				s.put(*test.before)
			}
			before := s.shown()
			stop := start(t, s.adoptingPod("10.0.0.1", test.adopted))
			if test.want != "" {
				s.waitFor(test.want)
			}
			s.wait("it looks", func() bool { return s.count("get slice") > 0 })
			stop()
			if now := s.shown(); test.want == "" && (now != before || s.version > 1) {
				t.Errorf("%s became %s, in version %d", before, now, s.version)
			}
		})
	}
}

// An elector that goes on with a term learns only after a moment that it leads. It does not take
// its own address out before.
func TestEndpoint_AdoptedTermGoesOn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newHandler(t)
		s.put(withToken("5", "10.0.0.1"))
		p := s.adoptingPod("10.0.0.1", 5)
		p.inBubble(s)
		start(t, p)
		time.Sleep(leaveDelay - 1)
		p.leadForever(5)
		synctest.Wait()
		s.change(func() {
			if s.shown() != "token 5: 10.0.0.1" || s.count("update") != 1 {
				t.Errorf("it is %s after %v", s.shown(), s.asked)
			}
		})
		p.end()
		time.Sleep(leaveDelay)
		synctest.Wait()
		s.change(func() {
			if s.shown() != "token 5:" {
				t.Errorf("after the term: %s", s.shown())
			}
		})
	})
}

// The address was left there, and its pod leads again, but can't say so. After that it takes it
// out all the same.
func TestEndpoint_LeftOfAnOlderTerm(t *testing.T) {
	s := newServer(t)
	s.put(withToken("5", "10.0.0.1"))
	s.refused["get service"] = http.StatusForbidden
	p := s.newPod("10.0.0.1")
	p.lead(9, time.Hour)
	start(t, p)
	p.log.wait(t, "level=WARN", 1)
	p.end()
	s.waitFor("token 5:")
}

// A standby that can't look says so once, and looks when it can.
func TestEndpoint_CannotLook(t *testing.T) {
	s := newServer(t)
	s.put(withToken("5", "10.0.0.1"))
	s.refused["get slice"] = http.StatusForbidden
	p := s.newPod("10.0.0.1")
	start(t, p)
	s.wait("it tries again", func() bool { return s.count("get slice") >= 3 })
	s.change(func() { delete(s.refused, "get slice") })
	s.waitFor("token 5:")
	p.log.wait(t, "does not route to this pod any more", 1)
	if p.log.count("level=WARN") != 1 || p.log.count("can't look whether") != 1 {
		t.Errorf("want one warning:\n%s", p.log)
	}
}

// The API server that is asked at the exit hangs: another one is asked.
func TestEndpoint_ExitTriesAgain(t *testing.T) {
	s := newServer(t)
	p := s.newPod("10.0.0.1")
	stop := start(t, p)
	p.lead(5, time.Hour)
	s.waitFor("token 5: 10.0.0.1")
	s.holdNext("get slice")
	stop()
	s.change(func() {
		if s.shown() != "token 5:" {
			t.Errorf("the EndpointSlice after the exit: %s", s.shown())
		}
	})
}

// hanging never answers.
type hanging struct{ asked chan struct{} }

func (h hanging) RoundTrip(r *http.Request) (*http.Response, error) {
	h.asked <- struct{}{}
	<-r.Context().Done()
	return nil, r.Context().Err()
}

// While the API server hangs, an exit is held up for exitDelay and exitTime, and no longer.
func TestEndpoint_ExitTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newHandler(t)
		p := s.newPod("10.0.0.1")
		p.inBubble(s)
		stop := start(t, p)
		p.leadForever(5)
		synctest.Wait()
		h := hanging{make(chan struct{}, 100)}
		p.api.client.Transport = h
		began := time.Now()
		stop()
		if took := time.Since(began); took != exitDelay+exitTime || len(h.asked) < 3 {
			t.Errorf("the exit took %v, with %d requests", took, len(h.asked))
		}
		if p.log.count("the Service may still route to this pod") != 1 {
			t.Errorf("nothing is said of it:\n%s", p.log)
		}
	})
}

// What would not route to the leader is refused, with the reason.
func TestEndpoint_Refuses(t *testing.T) {
	for want, arrange := range map[string]func(s *server){
		"the Service has a selector": func(s *server) {
			s.service = `{"metadata": {"name": "leader"}, "spec": {"selector": {"app": "x"}}}`
		},
		`targetPort \"web\"`: func(s *server) {
			s.service = `{"metadata": {"name": "leader"},
				"spec": {"ports": [{"port": 80, "targetPort": "web"}]}}`
		},
		"get services leader: 404": func(s *server) { s.service = "" },
		"higher fencing token 9":   func(s *server) { s.put(withToken("9")) },
		"which is no token":        func(s *server) { s.put(withToken("x")) },
		"managed by": func(s *server) {
			s.put(slice{Metadata: metadata{Labels: map[string]string{managedByLabel: "them"}}})
		},
		`\"jobs/b\", and this is \"jobs/a\"`: func(s *server) { s.put(ofAnother("4")) },
		"for addresses of the type":          func(s *server) { s.put(slice{AddressType: "IPv6"}) },
		"is not what Kubernetes answers":     func(s *server) { s.service = "<html>" },
	} {
		t.Run(want, func(t *testing.T) {
			t.Parallel()
			s := newServer(t)
			arrange(s)
			p := s.newPod("10.0.0.1")
			start(t, p)
			p.lead(5, time.Hour)
			s.wait("it tries again", func() bool { return s.count("get service") >= 3 })
			p.log.wait(t, want, 1)
			if p.log.count("level=WARN") != 1 {
				t.Errorf("want one warning:\n%s", p.log)
			}
			s.change(func() {
				if s.count("create")+s.count("update") != 0 {
					t.Errorf("it has written: %v", s.asked)
				}
			})
		})
	}
}

// ofAnother is what a leader of the election jobs/b has written.
func ofAnother(token string, addresses ...string) slice {
	s := withToken(token, addresses...)
	s.Metadata.Annotations[electionAnnotation] = "jobs/b"
	return s
}

func withToken(token string, addresses ...string) slice {
	s := slice{Metadata: metadata{
		Name: "leader", Annotations: map[string]string{tokenAnnotation: token},
	}}
	for _, address := range addresses {
		s.Endpoints = append(s.Endpoints, endpoint{[]string{address}, conditions{true}})
	}
	return s
}

// transport asks a server without any connection, so that its time is that of a synctest bubble.
type transport struct{ s *server }

func (t transport) RoundTrip(r *http.Request) (*http.Response, error) {
	answer := httptest.NewRecorder()
	t.s.ServeHTTP(answer, r)
	return answer.Result(), nil
}

// inBubble has the pod ask that way, and live by the bubble's time.
func (p *pod) inBubble(s *server) {
	began := time.Now()
	p.cfg.Now = func() time.Duration { return time.Since(began) }
	p.api.client.Transport = transport{s}
}

func (p *pod) leadForever(token int64) {
	p.mu.Lock()
	p.term = Term{token, never}
	p.mu.Unlock()
	p.Changed()
}

// The leader looks every half minute: what others change comes back, and the Service's new ports
// are taken over. A standby asks once, at its start. What fails is tried again after at most
// lastRetry.
func TestEndpoint_LooksAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newHandler(t)
		p := s.newPod("10.0.0.1")
		p.inBubble(s)
		start(t, p)
		asked := func() (n int) {
			s.change(func() { n = len(s.asked) })
			return n
		}
		time.Sleep(time.Hour)
		if n := asked(); n != 1 {
			t.Errorf("a standby has asked %d times, want once", n)
		}
		p.leadForever(5)
		synctest.Wait()
		if n := asked(); n != 4 {
			t.Errorf("%d requests, want 3 more", n)
		}
		s.change(func() { s.slice = nil })
		time.Sleep(recheck)
		synctest.Wait()
		s.change(func() {
			if s.shown() != "token 5: 10.0.0.1" {
				t.Errorf("after it was deleted: %s", s.shown())
			}
			s.service = strings.Replace(s.service, "8080", "9090", 1)
			s.asked = nil
		})
		time.Sleep(10 * recheck)
		synctest.Wait()
		s.change(func() {
			if s.slice.Ports[0].Port != 9090 || s.count("update") != 1 || len(s.asked) != 21 {
				t.Errorf("after ten looks: ports %+v, requests %v", s.slice.Ports, s.asked)
			}
			s.refused["get service"] = http.StatusInternalServerError
			s.asked = nil
		})
		time.Sleep(time.Hour)
		if n, few, many := asked(), 300, 500; n < few || n > many {
			t.Errorf("%d attempts in an hour, want %d to %d", n, few, many)
		}
		if n := p.log.count("level=WARN"); n != 1 {
			t.Errorf("%d warnings in an hour, want 1", n)
		}
	})
}
