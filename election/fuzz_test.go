package election

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"unicode"
	"unicode/utf8"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// printable reports whether a terminal shows the text as one line.
func printable(text string) bool {
	return utf8.ValidString(text) &&
		!strings.ContainsFunc(text, func(r rune) bool { return !unicode.IsPrint(r) })
}

// FuzzEntry: anybody may write keys and values in etcd. Only a key that a campaign makes counts as
// a candidate's. What we show of a key does nothing to a terminal. The command that we advise
// deletes this key and no other.
func FuzzEntry(f *testing.F) {
	f.Add("jobs/a", "1f", []byte("a"), int64(0x1f), int64(7))
	f.Add("jobs/a", "1f", []byte("\xff\x1b[2J\n"), int64(0), int64(7))
	f.Add("jobs", "a/1f", []byte(strings.Repeat("ü", 200)), int64(0x1f), int64(7))
	f.Add("-r", "it's\x01\xff/$HOME `id`", []byte{}, int64(0), int64(8))
	f.Add("e", "1f\x00", []byte{}, int64(0), int64(8))
	f.Fuzz(func(t *testing.T, election, suffix string, value []byte, lease, created int64) {
		if election == "" {
			return
		}
		kv := &mvccpb.KeyValue{
			Key: []byte(election + "/" + suffix), Value: value, Lease: lease,
			CreateRevision: created,
		}
		for _, key := range []string{suffix, strconv.FormatInt(lease, 16)} {
			kv.Key = []byte(election + "/" + key)
			e := newQueueEntry(election+"/", kv)
			made := lease != 0 && key == strconv.FormatInt(lease, 16)
			if e.candidate != made || made && e.election() != election {
				t.Errorf("%q with lease %x: candidate %v, election %q",
					e.key, lease, e.candidate, e.election())
			}
			if !utf8.ValidString(e.identity) || len(e.identity) > 2*maxIdentity ||
				utf8.Valid(value) && len(value) <= maxIdentity && e.identity != string(value) {
				t.Errorf("%q identifies %q", value, e.identity)
			}
			checkBlocker(t, e)
			checkRanges(t, election, e.key)
			report := newReport(election+"/", []*mvccpb.KeyValue{kv})
			if made != (report.Leader != nil) || made == (len(report.Blockers) > 0) ||
				len(report.Queue)+len(report.Blockers) != 1 {
				t.Errorf("%q: %+v", kv.Key, report)
			}
			nested := &NestedError{Election: election, Other: e.election(), Key: e.key}
			if text := nested.Error(); !printable(text) || len(text) > 1000 {
				t.Errorf("%q", text)
			}
		}
	})
}

func checkBlocker(t *testing.T, e queueEntry) {
	t.Helper()
	b := e.blocker()
	if !printable(b.Key) || !printable(b.Why) || !printable(b.Remedy) || b.Why == "" {
		t.Errorf("%q: %+q", e.key, b)
	}
	if (b.Remedy != "") != (e.lease == 0) {
		t.Errorf("%q with lease %x: the remedy is %q", e.key, e.lease, b.Remedy)
	}
	if b.Remedy == "" {
		return
	}
	if key, err := deletes(b.Remedy); key != e.key || err != nil {
		t.Errorf("%q: %s deletes %q, %v", e.key, b.Remedy, key, err)
	}
}

// deletes returns the key that the remedy deletes, as bash and etcdctl understand it.
func deletes(remedy string) (string, error) {
	if word, ok := strings.CutPrefix(remedy, "etcdctl del "); ok {
		argument, err := unquoteShell(strings.TrimPrefix(word, "-- "))
		if err == nil && strings.HasPrefix(argument, "-") != strings.HasPrefix(word, "-- ") {
			err = errors.New("taken for an option, or not")
		}
		return argument, err
	}
	word, ok := strings.CutPrefix(remedy, "etcdctl txn <<< ")
	if !ok {
		return "", errors.New("it is another command")
	}
	text, err := unquoteShell(word)
	if err != nil {
		return "", err
	}
	// No comparison, one request for success, none for failure.
	request, ok := strings.CutPrefix(text, "\n")
	request, end := strings.CutSuffix(request, "\n\n")
	request, del := strings.CutPrefix(request, "del -- ")
	if !ok || !end || !del || strings.Contains(request, "\n") {
		return "", errors.New("it is another transaction")
	}
	return strconv.Unquote(request)
}

// bashQuoted is a word in $'…' whose only escapes are \xHH, which Go knows too.
var bashQuoted = regexp.MustCompile(`^\$'((?:[ -&(-[\]-~]|\\x[0-9a-f]{2})*)'$`)

// unquoteShell reads one word in '…' (with \' between two of these) or in $'…' (with \xHH) as bash
// does.
func unquoteShell(word string) (string, error) {
	if m := bashQuoted.FindStringSubmatch(word); m != nil {
		text, err := strconv.Unquote(`"` + strings.ReplaceAll(m[1], `"`, `\"`) + `"`)
		if err == nil && strings.Contains(text, "\x00") {
			err = errors.New("no argument holds a NUL")
		}
		return text, err
	}
	text := strings.ReplaceAll(word, `'\''`, "\x00")
	inner, ok := strings.CutPrefix(text, "'")
	inner, end := strings.CutSuffix(inner, "'")
	if !ok || !end || strings.Contains(inner, "'") {
		return "", errors.New("it is not one word")
	}
	return strings.ReplaceAll(inner, "\x00", "'"), nil
}

// checkRanges: the search for nested elections reads a key of ours in exactly one range, and a key
// of a candidate around ours in at least one.
func checkRanges(t *testing.T, election, key string) {
	t.Helper()
	holds := func(r *pb.RangeRequest) bool {
		return key >= string(r.Key) && key < string(r.RangeEnd)
	}
	count := 0
	for _, r := range withinRanges(election) {
		if holds(r) {
			count++
		}
	}
	if count != 1 {
		t.Errorf("%q is in %d ranges of %q", key, count, election)
	}
	for i, name := range parents(election) {
		if !isNested(name, election) || !isNested(election, name) || i >= nestedParents {
			t.Errorf("%q is not around %q", name, election)
		}
		key = fmt.Sprintf("%s/%x", name, max(1, len(key)))
		if !slices.ContainsFunc(aroundRanges([]string{name}), holds) {
			t.Errorf("%q is not found", key)
		}
	}
}

// FuzzExplain: whatever listens at an endpoint may answer anything. It reaches logs, /readyz and
// standard error as one line, not too long, that does nothing to a terminal.
func FuzzExplain(f *testing.F) {
	f.Add(uint32(14), `connection error: desc = "transport: Error while dialing: refused"`, "")
	f.Add(uint32(7), "etcdserver: permission denied", "u\u009b")
	f.Add(uint32(2), "\x1b[2J\nerror: \u202e\xff", "root")
	f.Add(uint32(4), strings.Repeat("x", 3000), "root")
	f.Fuzz(func(t *testing.T, code uint32, message, user string) {
		cfg := &Config{Election: "e", Username: user}
		err := rpctypes.Error(status.Error(codes.Code(code), message))
		if code == 0 {
			err = errors.New(message)
		}
		for _, err := range []error{
			err, &memberError{"http://a:1", err},
			errors.Join(&memberError{"http://a:1", err}, &memberError{"http://b:1", err}),
			authError{err},
		} {
			text := cfg.explain(err)
			if !printable(text) || len(text) > 2500 {
				t.Errorf("%q", text)
			}
			_ = unavailable(err)
		}
	})
}

// FuzzHost: whatever a name resolves to, again and again, each of its addresses is that of exactly
// one member, which keeps it as long as the name has it. No other address is connected to.
func FuzzHost(f *testing.F) {
	f.Add("a b c|b c|d|a a b")
	f.Add("||a")
	f.Fuzz(func(t *testing.T, answers string) {
		var found []string
		lookup := func(context.Context, string) ([]string, error) {
			if len(found) == 0 {
				return nil, errors.New("no such host")
			}
			return slices.Clone(found), nil
		}
		h := newHost("http://name:1", Config{lookup: lookup})
		members := 1
		h.add = func(number int) {
			if number != members {
				t.Errorf("member %d is made after %d", number, members)
			}
			members++
		}
		for answer := range strings.SplitSeq(answers, "|") {
			before := slices.Clone(h.addresses)
			found = strings.Fields(answer)
			if err := h.resolve(t.Context()); err != nil {
				if !slices.Equal(h.addresses, before) {
					t.Errorf("%q without an answer, before %q", h.addresses, before)
				}
				continue
			}
			var now []string
			for i := range members {
				address := h.address(i)
				if address != "" {
					now = append(now, address)
				}
				if i < len(before) && slices.Contains(found, before[i]) && address != before[i] {
					t.Errorf("member %d moves from %q to %q", i, before[i], address)
				}
			}
			slices.Sort(now)
			slices.Sort(found)
			if want := slices.Compact(found); !slices.Equal(now, want) {
				t.Errorf("%q are %q, want %q", answers, now, want)
			}
		}
	})
}
