package main

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// at makes an operation that lasts from one moment to another; 0: it is never answered.
func at(call, end int64, o operation) operation {
	o.Call, o.Return = call, end
	return o
}

func writes(value string, token int64, answer string) operation {
	return operation{Kind: write, Register: "r", Value: value, Token: token, Answer: answer}
}

func reads(value string) operation { return operation{Kind: read, Register: "r", Value: value} }

func of(kind string, token int64) operation { return operation{Kind: kind, Token: token} }

// term is a term with a write of its own that is accepted.
func term(token, from, to int64) []operation {
	return []operation{
		at(from, from+1, of(acquire, token)),
		at(from+2, from+3, writes(fmt.Sprint("of ", token), token, accepted)),
		at(to, to, of(release, token)),
	}
}

// record writes operations as the soak does, and returns the path.
func record(t *testing.T, all ...[]operation) string {
	t.Helper()
	var text strings.Builder
	n := 0
	for _, operations := range all {
		for _, o := range operations {
			n++
			o.N = n
			line, err := json.Marshal(o)
			if err != nil {
				t.Fatal(err)
			}
			text.WriteString("\n" + string(line))
		}
	}
	path := filepath.Join(t.TempDir(), "history")
	if err := os.WriteFile(path, []byte(text.String()), 0o644); err != nil {
		t.Fatal(err)
	}
	return path
}

func judge(t *testing.T, path string) (code int, said string) {
	t.Helper()
	var out strings.Builder
	code = run([]string{path}, &out)
	return code, out.String()
}

func TestHistories(t *testing.T) {
	t.Parallel()
	more := func(o ...operation) []operation { return o }
	for _, c := range []struct {
		name   string
		lock   []operation
		more   []operation
		guilty string // what is said; "": innocent
	}{
		{
			"two terms, the first one's late write refused",
			append(term(5, 10, 20), term(9, 30, 40)...),
			more(at(33, 36, writes("late", 5, refused)), at(37, 38, reads("of 9"))), "",
		},
		{
			"a storage that does not compare tokens", append(term(5, 10, 20), term(9, 30, 40)...),
			more(at(34, 36, writes("late", 5, accepted)), at(37, 38, reads("late"))),
			`writes "late"`,
		},
		{
			"accepted after a refusal", term(5, 10, 20),
			more(at(21, 22, writes("x", 5, refused)), at(23, 24, writes("y", 5, accepted))),
			`writes "y"`,
		},
		{
			"the same in another register", term(5, 10, 20), more(
				at(21, 22, writes("x", 5, refused)),
				at(23, 24, operation{
					Kind: write, Register: "s", Value: "y", Token: 5, Answer: accepted,
				}),
			), `writes "y" to s`,
		},
		{
			"a term that begins when its key is gone", term(5, 10, 20), more(
				at(23, 24, writes("x", 9, refused)),
				at(30, 31, of(acquire, 9)), at(40, 40, of(release, 9)),
			), "acquires with token 9",
		},
		{"a lost write", term(5, 10, 20), more(at(15, 16, reads(""))), `reads ""`},
		{"a read back in time", term(5, 10, 20), more(
			at(14, 15, writes("x", 5, accepted)), at(16, 17, reads("x")), at(18, 19, reads("of 5")),
		), `reads "of 5"`},
		{"what nobody wrote", term(5, 10, 20), more(at(15, 16, reads("?"))), `reads "?"`},
		{"reads beside a write", term(5, 10, 30), more(
			at(14, 20, writes("x", 5, accepted)), at(15, 16, reads("of 5")), at(17, 18, reads("x")),
		), ""},
		{"a write without an answer, done late", append(term(5, 10, 20), term(9, 30, 40)...), more(
			at(14, 0, writes("x", 5, "")), at(16, 17, reads("of 5")), at(24, 25, reads("x")),
			at(35, 36, reads("of 9")),
		), ""},
		{"done after the next term's", append(term(5, 10, 20), term(9, 30, 40)...), more(
			at(14, 0, writes("x", 5, "")), at(34, 35, reads("of 9")), at(36, 37, reads("x")),
		), `reads "x"`},
		{"read before it was asked for", term(5, 10, 20), more(
			at(13, 14, reads("x")), at(15, 0, writes("x", 5, "")),
		), `reads "x"`},
		{"two holders", append(term(5, 10, 35), term(9, 30, 40)...), nil, "acquires with token 9"},
		{
			"two holders, the first one taken", append(term(5, 10, 35), term(9, 30, 40)...),
			more(at(25, 32, of(take, 5))), "",
		},
		{
			"taken too late", append(term(5, 10, 38), term(9, 30, 40)...),
			more(at(33, 36, of(take, 5))), "acquires with token 9",
		},
		{
			"another one taken", append(term(5, 10, 35), term(9, 30, 40)...),
			more(at(25, 32, of(take, 3))), "acquires with token 9",
		},
		{
			"two terms taken at once", append(term(5, 10, 35), term(9, 30, 60)...),
			append(term(12, 50, 70), at(25, 55, of(take, 5)), at(25, 55, of(take, 9))), "",
		},
		{
			"one of two taken", append(term(5, 10, 35), term(9, 30, 60)...),
			append(term(12, 50, 70), at(25, 55, of(take, 5))), "acquires with token 12",
		},
		{"tokens that fall", append(term(9, 10, 20), term(5, 30, 40)...), nil, "token 5"},
		{
			"the holder refused", term(5, 10, 20), more(at(15, 16, writes("x", 5, refused))),
			`writes "x"`,
		},
		{
			"refused once taken", term(5, 10, 20),
			more(at(14, 15, of(take, 5)), at(15, 16, writes("x", 5, refused))), "",
		},
		{
			"accepted after the next has acquired",
			append(term(5, 10, 20), at(30, 31, of(acquire, 9)), at(60, 60, of(release, 9))),
			more(at(40, 41, writes("x", 5, accepted))), `writes "x"`,
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			path := record(t, c.lock, c.more)
			code, said := judge(t, path)
			if (code != 0) != (c.guilty != "") {
				t.Fatalf("the code is %d: %s", code, said)
			}
			if c.guilty == "" {
				return
			}
			_, rest, _ := strings.Cut(said, "fits nowhere:\n")
			line, _, _ := strings.Cut(rest, "\n")
			if !strings.Contains(line, c.guilty) {
				t.Errorf("it is said that this fits nowhere: %s; want %s", line, c.guilty)
			}
			if picture, err := os.Stat(path + ".html"); err != nil || picture.Size() == 0 {
				t.Errorf("there is no picture: %v", err)
			}
		})
	}
}

// What a killed client has not written to its end spoils no other line, and answers nothing.
func TestRecord_Torn(t *testing.T) {
	t.Parallel()
	path := record(t, term(5, 10, 20))
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	torn := strings.Replace(string(text), "\n", "\n"+`{"client":"a/1","n":7,"kind":"wri`+"\n", 1)
	torn += "\n" + `{"client":"a/1","n":8,"ki`
	if err := os.WriteFile(path, []byte(torn), 0o644); err != nil {
		t.Fatal(err)
	}
	if code, said := judge(t, path); code != 0 || !strings.Contains(said, "1 operations") {
		t.Errorf("code %d: %s", code, said)
	}
}

// Whoever says that a term was taken has to say which: otherwise it would explain whatever the lock
// did at that time.
func TestRecord_TakenFromAnybody(t *testing.T) {
	t.Parallel()
	lock := append(term(5, 10, 35), term(9, 30, 40)...)
	code, said := judge(t, record(t, lock, []operation{at(25, 32, of(take, 0))}))
	if code != 1 || !strings.Contains(said, "which term was taken") {
		t.Errorf("code %d: %s", code, said)
	}
}

// A record without anything in it proves nothing.
func TestRecord_Empty(t *testing.T) {
	t.Parallel()
	if code, said := judge(t, record(t)); code != 1 || !strings.Contains(said, "shows nothing") {
		t.Errorf("code %d: %s", code, said)
	}
}

// TestRecord_Long is as long as that of a soak of a thousand faults.
func TestRecord_Long(t *testing.T) {
	if testing.Short() {
		t.Skip("takes half a minute")
	}
	const terms, perTerm = 300, 270
	rng := rand.New(rand.NewPCG(1, 1))
	values := [4]string{}
	var all []operation
	now := int64(0)
	for i := range int64(terms) {
		token := 10 + 10*i
		all = append(all, at(now+1, now+2, of(acquire, token)))
		now += 10
		for n := range perTerm {
			// Each overlaps the next three.
			o, r := reads(""), rng.IntN(4)
			o.Value = values[r]
			switch n % 3 {
			case 0:
				o = writes(fmt.Sprint(token, " ", n), token-10, refused)
			case 1:
				o = writes(fmt.Sprint(token, " ", n), token, accepted)
				values[r] = o.Value
			}
			o.Register = fmt.Sprint("store/", r)
			end := now + 35
			if o.Kind == write && rng.IntN(40) == 0 {
				end, o.Answer = 0, ""
				if n%3 == 0 {
					o.Value += " refused"
				}
			}
			all = append(all, at(now, end, o))
			now += 10
		}
		now += 30
		all = append(all, at(now, now, of(release, token)))
	}
	code, said := judge(t, record(t, all))
	t.Logf("%s", said)
	if code != 0 {
		t.Errorf("code %d", code)
	}
}
