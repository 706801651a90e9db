package control

import (
	"reflect"
	"strings"
	"testing"
	"time"
)

func TestValues(t *testing.T) {
	at := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	for _, test := range []struct {
		value, empty Value
		text         string
	}{
		{
			&Candidate{
				Identity: "a", Priority: 50, Leasehold: "1.2", URL: "http://a:4040", Since: at,
				Ready: true,
			}, &Candidate{},
			`{"version":1,"identity":"a","priority":50,"leasehold":"1.2","url":"http://a:4040",` +
				`"since":"2026-01-02T03:04:05Z","ready":true}`,
		},
		{
			&Hold{Reason: "new disk", By: "eve@a", Since: at, Stop: true}, &Hold{},
			`{"version":1,"reason":"new disk","by":"eve@a","since":"2026-01-02T03:04:05Z",` +
				`"stop":true}`,
		},
		{
			&Switchover{ID: "7f", To: "b", By: "eve@a"}, &Switchover{},
			`{"version":1,"id":"7f","to":"b","by":"eve@a"}`,
		},
		{
			&Term{Token: 17, Identity: "a", Started: at}, &Term{},
			`{"version":1,"token":17,"identity":"a","started":"2026-01-02T03:04:05Z","why":"",` +
				`"starts":0,"last_exit":null}`,
		},
		{
			&Term{
				Token: 17, Identity: "a", Started: at, Ended: at, Why: "lost", Starts: 2,
				LastExit: &Exit{Code: 3, At: at},
			}, &Term{},
			`{"version":1,"token":17,"identity":"a","started":"2026-01-02T03:04:05Z",` +
				`"ended":"2026-01-02T03:04:05Z","why":"lost","starts":2,` +
				`"last_exit":{"code":3,"at":"2026-01-02T03:04:05Z"}}`,
		},
	} {
		if got := string(Encode(test.value)); got != test.text {
			t.Errorf("got  %s\nwant %s", got, test.text)
		}
		if err := Decode([]byte(test.text), test.empty); err != nil ||
			!reflect.DeepEqual(test.empty, test.value) {
			t.Errorf("%s\nis read as %+v, %v", test.text, test.empty, err)
		}
	}
}

func TestDecodeLeniently(t *testing.T) {
	var h Hold
	text := `{"version":2,"new":[1],"reason":7,"by":"` + strings.Repeat("ü", 200) + `","stop":true}`
	err := Decode([]byte(text), &h)
	if err == nil || !h.Stop || h.By != strings.Repeat("ü", 128) || h.Reason != "" {
		t.Errorf("read as %+v, %v", h, err)
	}
	if err := Decode([]byte(`{"version":2,"new":[1],"reason":"r"}`), &h); err != nil ||
		h.Reason != "r" {
		t.Errorf("a later format is read as %+v, %v", h, err)
	}
	for _, text := range []string{"", "null", "[]", "{}", "\xff", strings.Repeat(" ", 1<<20)} {
		if err := Decode([]byte(text), &Hold{}); err == nil {
			t.Errorf("%.10q is accepted", text)
		}
	}
}
