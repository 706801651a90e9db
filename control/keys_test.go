package control

import "testing"

func TestKeys(t *testing.T) {
	const root = "leasehold/v1/jobs%2Fbackup/"
	for got, want := range map[string]string{
		CandidateOf("jobs/backup", 0x1f): root + "candidates/1f",
		HoldOf("jobs/backup"):            root + "hold",
		SwitchoverOf("jobs/backup"):      root + "switchover",
		TermOf("jobs/backup", 17):        root + "history/17",
		HoldOf(""):                       "leasehold/v1/%/hold",
		HoldOf("."):                      "leasehold/v1/%2E/hold",
		HoldOf(".."):                     "leasehold/v1/%2E%2E/hold",
		HoldOf("%2E"):                    "leasehold/v1/%252E/hold",
		HoldOf("%"):                      "leasehold/v1/%25/hold",
		HoldOf("a b\xffü"):               "leasehold/v1/a%20b%FF%C3%BC/hold",
	} {
		if got != want {
			t.Errorf("got %s, want %s", got, want)
		}
		k, err := ParseKey(got)
		if err != nil {
			t.Errorf("%s: %v", got, err)
		}
		if want := (Key{Election: "jobs/backup", Kind: CandidateKey, Lease: 0x1f}); k.Lease != 0 &&
			k != want {
			t.Errorf("%s is read as %+v, want %+v", got, k, want)
		}
	}
}

func TestForeignKeys(t *testing.T) {
	for _, key := range []string{
		"", Root, "leasehold/v1/jobs", "leasehold/v1/jobs/", "leasehold/v1//hold",
		"leasehold/v1/./hold", "leasehold/v1/jobs%2fbackup/hold", // the second spelling of a name
		"leasehold/v1/jobs/hold/", "leasehold/v1/jobs/hold/x", "leasehold/v1/jobs/other",
		"leasehold/v1/jobs/candidates/", "leasehold/v1/jobs/candidates/1F",
		"leasehold/v1/jobs/candidates/01f", "leasehold/v1/jobs/history/-0",
		"leasehold/v1/jobs/history/07", "leasehold/v2/jobs/hold", "jobs/1f",
		"leasehold/v1/%zz/hold",
	} {
		if k, err := ParseKey(key); err == nil {
			t.Errorf("%q is read as %+v", key, k)
		}
	}
}

func TestReserved(t *testing.T) {
	for election, want := range map[string]bool{
		"leasehold": true, "leasehold/v1": true, "leasehold/v1/jobs": true,
		"leasehold/v1/jobs/candidates": true, "leasehold/v2": false, "leasehold/v10": false,
		"leasehold/jobs": false, "jobs": false, "leaseholds": false, "lease": false,
	} {
		if Reserved(election) != want {
			t.Errorf("Reserved(%q) is %v", election, !want)
		}
	}
}
