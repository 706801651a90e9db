package suggest

import (
	"cmp"
	"strings"
	"testing"
)

func TestNearest(t *testing.T) {
	names := []string{
		"ENDPOINTS", "TTL", "TLS_CA_FILE", "TLS_CERT_FILE", "PASSWORD", "PASSWORD_FILE",
		"DIAL_TIMEOUT",
	}
	for word, want := range map[string]string{
		"ENDPOINT": "ENDPOINTS", "TTLS": "TTL", "CA_FILE": "TLS_CA_FILE",
		"TLS_CRET_FILE": "TLS_CERT_FILE", "PASSWORDFILE": "PASSWORD_FILE",
		"PASSWROD": "PASSWORD", "TIMEOUT": "DIAL_TIMEOUT", "QWERTYUIOP": "",
		"TO": "", "TT": "TTL", "": "", strings.Repeat("X", 10000): "",
	} {
		if got := Nearest(word, names); got != want {
			t.Errorf("Nearest(%.20q) = %q, want %q", word, got, cmp.Or(want, "none"))
		}
	}
}
