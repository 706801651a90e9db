//go:build linux

package health

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"image/png"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"leasehold/e2e/harness"
)

// TestPage_Headers: a browser gets the page, and nobody else does. Its policy allows what is in it
// and nothing more.
func TestPage_Headers(t *testing.T) {
	ts := newTestServer(t, leading())
	for accept, want := range map[string]bool{
		"text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8": true,
		"text/html;charset=utf-8":      true,
		"":                             false,
		"*/*":                          false,
		"text/*":                       false,
		"application/json, text/html":  false, // no preference
		"text/htmlx, application/json": false,
		"nonsense;;;,\x01":             false,
		"text/html;q=0.1, application/json;q=0.2": false,
		"application/json;q=0.5, text/html":       true,
		"text/html;q=0":                           false,
		"text/html;q=x":                           false,
	} {
		req, err := http.NewRequest("GET", "http://"+ts.addr+"/", nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Header["Accept"] = []string{strings.Trim(accept, "\x01")}
		resp, err := http.DefaultTransport.(*http.Transport).RoundTrip(req)
		if err != nil {
			t.Fatal(err)
		}
		_ = resp.Body.Close()
		isPage := resp.Header.Get("Content-Type") == "text/html; charset=utf-8"
		if resp.StatusCode != http.StatusOK || isPage != want ||
			resp.Header.Get("Vary") != "Accept" {
			t.Errorf("Accept: %q: %s %v", accept, resp.Status, resp.Header)
		}
		if policy := resp.Header.Get("Content-Security-Policy"); isPage && (policy == "" ||
			!strings.HasPrefix(policy, "default-src 'none';") ||
			strings.Contains(policy, "unsafe") || strings.Count(policy, "'sha256-") != 2) {
			t.Errorf("Content-Security-Policy: %q", policy)
		}
	}
	http.DefaultTransport.(*http.Transport).CloseIdleConnections()
	if text := string(pageHTML); strings.Contains(text, "innerHTML") ||
		regexp.MustCompile(`(?i)https?://|\son\w+="|style="|<form|src=|href=`).MatchString(text) {
		t.Error("the page has what its policy forbids")
	}
}

// browser is a page in a headless Chromium, which is driven by its DevTools protocol
// (https://chromedevtools.github.io/devtools-protocol).
type browser struct {
	t       *testing.T
	in      *os.File
	out     *bufio.Reader
	session string
	calls   int
	urls    []string // that were asked for
	faults  []string // what the browser complains of
}

func newBrowser(t *testing.T) *browser {
	t.Helper()
	path, err := exec.LookPath("chromium")
	if err != nil {
		if os.Getenv("E2E_NO_SKIP") == "1" {
			t.Fatal("needs chromium, and E2E_NO_SKIP=1 forbids to skip")
		}
		t.Skip("skipped: needs chromium")
	}
	theirIn, in, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	out, theirOut, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(path, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
		"--disable-background-networking", "--disable-dev-shm-usage", "--hide-scrollbars",
		"--user-data-dir="+t.TempDir(), "--remote-debugging-pipe")
	cmd.ExtraFiles = []*os.File{theirIn, theirOut}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	_ = theirIn.Close()
	_ = theirOut.Close()
	b := &browser{t: t, in: in, out: bufio.NewReader(out)}
	t.Cleanup(func() {
		_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
		_ = cmd.Wait()
		_ = in.Close()
		_ = out.Close()
	})
	_ = out.SetReadDeadline(time.Now().Add(2 * time.Minute))
	var target struct{ TargetID, SessionID string }
	b.call("Target.createTarget", map[string]any{"url": "about:blank"}, &target)
	b.call("Target.attachToTarget",
		map[string]any{"targetId": target.TargetID, "flatten": true}, &target)
	b.session = target.SessionID
	for _, domain := range []string{"Page", "Runtime", "Log", "Network"} {
		b.call(domain+".enable", nil, nil)
	}
	return b
}

// call has the browser do something, and reads what it sends until it has answered.
func (b *browser) call(method string, params map[string]any, result any) {
	b.t.Helper()
	b.calls++
	message := map[string]any{"id": b.calls, "method": method, "params": params}
	if b.session != "" {
		message["sessionId"] = b.session
	}
	text, err := json.Marshal(message)
	if err == nil {
		_, err = b.in.Write(append(text, 0))
	}
	if err != nil {
		b.t.Fatal(err)
	}
	for {
		text, err := b.out.ReadBytes(0)
		if err != nil {
			b.t.Fatalf("%s: %v", method, err)
		}
		var m struct {
			ID     int
			Method string
			Result json.RawMessage
			Error  json.RawMessage
			Params struct {
				Request struct{ URL string }
				Entry   struct{ Text string }
			}
		}
		if err := json.Unmarshal(text[:len(text)-1], &m); err != nil {
			b.t.Fatal(err)
		}
		switch {
		case m.ID == b.calls && m.Error != nil:
			b.t.Fatalf("%s: %s", method, m.Error)
		case m.ID == b.calls:
			if result != nil && json.Unmarshal(m.Result, result) != nil {
				b.t.Fatalf("%s: %s", method, m.Result)
			}
			return
		case m.Method == "Network.requestWillBeSent":
			b.urls = append(b.urls, m.Params.Request.URL)
		case m.Method == "Log.entryAdded":
			b.faults = append(b.faults, m.Params.Entry.Text)
		case m.Method == "Runtime.exceptionThrown", m.Method == "Runtime.consoleAPICalled":
			b.faults = append(b.faults, string(text))
		}
	}
}

// evaluate returns the text that the expression has in the page.
func (b *browser) evaluate(expression string) string {
	b.t.Helper()
	var got struct{ Result struct{ Value string } }
	b.call("Runtime.evaluate", map[string]any{"expression": expression}, &got)
	return got.Result.Value
}

// waitFor waits until the page shows the text, and its note that there is no connection, or not.
func (b *browser) waitFor(text string, connected bool) {
	b.t.Helper()
	const note = "No connection to the daemon since"
	shown := ""
	for began := time.Now(); time.Since(began) < time.Minute; time.Sleep(10 * time.Millisecond) {
		shown = b.evaluate("document.body.innerText")
		if strings.Contains(shown, text) && strings.Contains(shown, note) != connected {
			return
		}
	}
	b.t.Fatalf("the page does not show %q, connected %v:\n%s", text, connected, shown)
}

// picture writes what the page looks like to a file. It checks that the page is as wide as the
// window, so that nobody has to scroll sideways, and as bright as the browser prefers.
func (b *browser) picture(file string, width, height int, dark bool) {
	b.t.Helper()
	b.call("Emulation.setDeviceMetricsOverride", map[string]any{
		"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500,
	}, nil)
	scheme := map[bool]string{false: "light", true: "dark"}[dark]
	b.call("Emulation.setEmulatedMedia", map[string]any{"features": []map[string]any{
		{"name": "prefers-color-scheme", "value": scheme},
	}}, nil)
	if got := b.evaluate("String(document.documentElement.scrollWidth)"); got !=
		strconv.Itoa(width) {
		b.t.Errorf("%s: the page is %s pixels wide, in a window of %d", file, got, width)
	}
	var shot struct{ Data []byte }
	b.call("Page.captureScreenshot", nil, &shot)
	image, err := png.Decode(bytes.NewReader(shot.Data))
	if err != nil {
		b.t.Fatal(err)
	}
	red, green, blue, _ := image.At(2, 2).RGBA()
	if isDark := red+green+blue < 3*0x4000; isDark != dark {
		b.t.Errorf("%s: is it dark? %v", file, isDark)
	}
	if err := os.WriteFile(file, shot.Data, 0o600); err != nil {
		b.t.Fatal(err)
	}
}

// foreign is what somebody may write into etcd.
const foreign = `<img src=x onerror="document.title='owned'">` + "</script>\u202e<b>x\x1b[2J"

// pageStates are what the page is shown with. Pictures of them are named after them.
func pageStates() map[string]Snapshot {
	began := time.Now().Add(-3 * time.Hour)
	now := func(change ...func(*Snapshot)) Snapshot {
		return leading(append([]func(*Snapshot){func(s *Snapshot) {
			s.Since, s.Job.StartedAt = began, began.Add(20*time.Millisecond)
			s.Election, s.Identity = "jobs/backup", "node-1"
			s.Leader = &Leader{Identity: "node-1", Key: "jobs/backup/1f", Token: 1742}
		}}, change...)...)
	}
	return map[string]Snapshot{
		"leading": now(),
		"standby": now(func(s *Snapshot) {
			standby(s)
			s.Leader = &Leader{Identity: "node-3", Key: "jobs/backup/1e", Token: 1742}
			s.Queue = &Queue{Ahead: 4, First: []string{"node-3", "node-2"}}
			s.Job.LastExit = &Exit{Signal: "SIGTERM", At: began}
		}),
		"unreachable": now(func(s *Snapshot) {
			s.Queue = nil
			s.State, s.Leader, s.LeaseID, s.TTL, s.Job = Connecting, nil, 0, 0, Job{State: "none"}
			s.Reason = "no answer from http://etcd-1:2379: connection refused"
			s.Leading, s.StopAt, s.KillBy, s.End = false, 0, 0, 0
		}),
		"failing": now(func(s *Snapshot) {
			s.Job = Job{
				State: "backoff", StartedAt: time.Now().Add(-time.Minute), Restarts: 3,
				LastExit: &Exit{Code: 7, At: time.Now()},
			}
		}),
		"held": now(func(s *Snapshot) {
			standby(s)
			s.Leader = nil
			s.Hold = &Hold{
				By: "alice@laptop", Reason: "a new disk", Since: time.Now().Add(-5 * time.Minute),
			}
		}),
		"foreign": now(func(s *Snapshot) {
			standby(s)
			s.Leader.Identity = foreign
			s.Blocker = &Blocker{Key: foreign, Why: foreign, Remedy: foreign}
			s.Hold = &Hold{By: foreign, Reason: foreign}
		}),
	}
}

// pageTerms are the terms that were seen before, and the one of the leader.
func pageTerms(leader *Leader) (seen []SeenTerm) {
	began := time.Now().Add(-3 * time.Hour)
	if leader != nil {
		seen = append(seen, SeenTerm{leader.Identity, leader.Token, *timestamp(began), nil})
	}
	for i, node := range []string{"node-2", "node-1", "node-3"} {
		until := timestamp(began)
		began = began.Add(time.Duration(-37*i-19) * time.Hour)
		seen = append(seen, SeenTerm{node, 1741 - int64(i), *timestamp(began), until})
	}
	return seen
}

// TestPage: Chromium shows the page in each state, wide and as on a phone, light and dark, and each
// change. It asks for nothing but the page and its events, finds nothing to complain of, and runs
// nothing that somebody wrote into etcd. With PICTURES=DIR the pictures stay there.
func TestPage(t *testing.T) {
	b := newBrowser(t)
	dir := os.Getenv("PICTURES")
	if dir == "" {
		dir = t.TempDir()
	}
	want := map[string][]string{
		"leading": {"leading\nnode-1\nsince", "node-1, token 1742", "Sure to last", "running"},
		"standby": {"standby", "node-3, token 1742", "node-3, node-2, and 2", "SIGTERM"},
		"unreachable": {
			"connecting", "no answer from http://etcd-1:2379", "nobody, as far as is known",
			"There is no lease.",
		},
		"failing": {"leading, job not ready", "backoff", "code 7"},
		"held": {
			"held\nnode-1\nsince", "Held by alice@laptop since ", ": a new disk. Nobody new",
		},
		"foreign": {
			`<img src=x onerror="document.title='owned'"></script>` + "\ufffd<b>x\ufffd[2J, token",
		},
	}
	for name, s := range pageStates() {
		ts := newTestServer(t, s)
		ts.server.events.terms.seen = pageTerms(s.Leader)
		address := "http://" + ts.addr + "/"
		// The page before looks for its server.
		b.call("Page.navigate", map[string]any{"url": "about:blank"}, nil)
		b.urls, b.faults = nil, nil
		b.call("Page.navigate", map[string]any{"url": address}, nil)
		for _, text := range want[name] {
			b.waitFor(text, true)
		}
		b.waitFor("node-3, token 1739, until ", true)
		if title := b.evaluate("document.title"); title != s.State+" · "+s.Election {
			t.Errorf("%s: the title is %q", name, title)
		}
		b.picture(filepath.Join(dir, name+".png"), 1000, 720, false)
		b.picture(filepath.Join(dir, name+"-dark.png"), 1000, 720, true)
		b.picture(filepath.Join(dir, name+"-phone.png"), 390, 1100, false)
		b.picture(filepath.Join(dir, name+"-phone-dark.png"), 390, 1100, true)

		s = pageStates()["leading"]
		s.Leader.Token = 1743
		ts.snapshot.Store(&s)
		ts.server.Changed()
		b.waitFor("node-1, token 1743", true)
		if s := pageStates()[name]; s.Leader != nil { // the one before
			b.waitFor(fmt.Sprintf(", token %d, until ", s.Leader.Token), true)
		}
		ts.stop()
		b.waitFor("unknown, was leading", false)
		b.picture(filepath.Join(dir, name+"-offline.png"), 390, 1100, false)

		for _, fault := range b.faults {
			if !strings.Contains(fault, "ERR_CONNECTION_REFUSED") &&
				!strings.Contains(fault, "ERR_INCOMPLETE") {
				t.Errorf("%s: the browser complains: %s", name, fault)
			}
		}
		slices.Sort(b.urls)
		if got := slices.Compact(b.urls); !slices.Equal(got,
			[]string{address, address + "events"}) {
			t.Errorf("%s: the browser asked for %q", name, got)
		}
	}
}

// TestPage_Connection: the page says that it has lost the daemon, also where no packet says so, and
// no longer when it has found it again, although nothing has changed.
func TestPage_Connection(t *testing.T) {
	b := newBrowser(t)
	s := pageStates()["leading"]
	s.StopAt = 101 * time.Second
	ts := newTestServer(t, s)
	proxy, err := harness.StartProxy("127.0.0.1:0", ts.addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(proxy.Close)
	s.State, s.Leading = Connecting, false
	s.LeaseID, s.StopAt, s.KillBy, s.End, s.Queue = 0, 0, 0, 0, nil
	still := newTestServer(t, s)
	cut, err := harness.StartProxy("127.0.0.1:0", still.addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(cut.Close)

	b.call("Page.navigate", map[string]any{"url": "http://" + proxy.Addr() + "/"}, nil)
	b.waitFor("leading\nnode-1", true)
	proxy.Cut(harness.BothWays)
	b.waitFor("unknown, was leading", false) // by the deadline of the lease
	proxy.Recover()
	b.waitFor("leading\nnode-1", true)

	b.call("Page.navigate", map[string]any{"url": "http://" + cut.Addr() + "/"}, nil)
	b.waitFor("connecting\nnode-1", true)
	cut.Drop()
	b.waitFor("unknown, was connecting", false)
	b.waitFor("connecting\nnode-1", true) // it has the id of this status, so no event comes
	began := time.Now()
	cut.Cut(harness.BothWays)
	b.waitFor("unknown, was connecting", false) // by the lack of signs of life
	if took := time.Since(began); took < quietTime {
		t.Errorf("the page gave the daemon up after %v", took)
	}
}
