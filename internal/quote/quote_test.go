package quote

import (
	"encoding/json"
	"os/exec"
	"strings"
	"testing"
)

func TestPrintable(t *testing.T) {
	for text, want := range map[string]string{
		"": "", "jobs/ü b": "jobs/ü b", "a\nREADY=1": "a�READY=1", "\x1b[2J": "�[2J",
		"\xff\xfe": "��", "�": "�",
	} {
		if got := Printable(text); got != want {
			t.Errorf("Printable(%q) = %q, want %q", text, got, want)
		}
	}
}

func TestJSON(t *testing.T) {
	text := "<ü>\n\x1b[2J\u007f\u009b2J\u202e\U000e0001"
	got, err := JSON(text, "")
	want := `"<ü>\n\u001b[2J\u007f\u009b2J\u202e\udb40\udc01"` + "\n"
	if err != nil || got != want {
		t.Errorf("JSON(%q) = %q, %v, want %q", text, got, err, want)
	}
	var back string
	if err := json.Unmarshal([]byte(got), &back); err != nil || back != text {
		t.Errorf("%s reads as %q (%v), want %q", got, back, err, text)
	}
}

func TestValue(t *testing.T) {
	for text, want := range map[string]string{
		"15": `"15"`, "a\n": `"a\n"`,
		strings.Repeat("x", 64): `"` + strings.Repeat("x", 64) + `"`,
		strings.Repeat("x", 65): `"` + strings.Repeat("x", 64) + `"…`,
	} {
		if got := Value(text); got != want {
			t.Errorf("Value(%q) = %s, want %s", text, got, want)
		}
	}
}

func TestLine(t *testing.T) {
	for text, want := range map[string]string{
		"": "", "a\nb\x9b": "a\ufffdb\ufffd", strings.Repeat("x", 2048): strings.Repeat("x", 2048),
		strings.Repeat("x", 2049):       strings.Repeat("x", 2048) + "…",
		"x" + strings.Repeat("ü", 2048): "x" + strings.Repeat("ü", 1023) + "…",
	} {
		if got := Line(text); got != want {
			t.Errorf("Line(%q) = %q, want %q", text, got, want)
		}
	}
	if got, want := Name(strings.Repeat("\n", 99)), strings.Repeat("\ufffd", 21)+"…"; got != want {
		t.Errorf("Name of 99 newlines is %q, want %q", got, want)
	}
}

func TestWord(t *testing.T) {
	for text, want := range map[string]string{
		"backup.sh": "backup.sh", "": `''`, "a b": `'a b'`, "$x": `'$x'`, "\x1b[2J": `$'\x1b[2J'`,
	} {
		if got := Word(text); got != want {
			t.Errorf("Word(%q) = %s, want %s", text, got, want)
		}
	}
}

func TestShell(t *testing.T) {
	for _, text := range []string{"", "plain", "it's", `a "b" $c \d`, "bin\x01\xff\xfe/ü\n'"} {
		out, err := exec.Command("bash", "-c", "printf %s "+Shell(text)).Output()
		if err != nil || string(out) != text {
			t.Errorf("%q is quoted as %s, which is %q (%v)", text, Shell(text), out, err)
		}
	}
}
