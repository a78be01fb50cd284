package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"slices"
	"strings"
	"testing"

	"deadlight/verify"
)

// A verifier that is wrong is a bug of ours; one that cannot tell says so.
func TestSelfTestExit(t *testing.T) {
	pick := func(name string, want verify.Verdict) breakage {
		all := breakages()
		i := slices.IndexFunc(all, func(b breakage) bool { return b.name == name })
		if i < 0 {
			t.Fatalf("no breakage %q", name)
		}
		all[i].want = want
		return all[i]
	}
	const sound, dead = "the ruleset as it is compiled", "a dead path: the cable is pulled"
	for name, c := range map[string]struct {
		list []breakage
		code int
		says string
	}{
		"as it must be":     {[]breakage{pick(sound, verify.Pass)}, exitOK, "PASS: 0 broken rulesets found out, 1 sound one passed, "},
		"a hole not seen":   {[]breakage{pick(sound, verify.Fail)}, exitBug, "FAIL: 1 of 1 verdicts"},
		"could not tell":    {[]breakage{pick(dead, verify.Fail)}, exitRefused, "FAIL: 1 of 1 verdicts"},
		"both, and the bug": {[]breakage{pick(dead, verify.Fail), pick(sound, verify.Fail)}, exitBug, "FAIL: 2 of 2 verdicts"},
	} {
		t.Run(name, func(t *testing.T) {
			var out bytes.Buffer
			err := selfTestOf(t.Context(), env{stdout: &out, stderr: &out}, c.list, false)
			if got := report(env{stderr: &out}, err); got != c.code || !strings.Contains(out.String(), c.says) {
				t.Errorf("exit %d, want %d with %q:\n%s", got, c.code, c.says, out.String())
			}
			var x *exitError
			if c.code != exitOK && (!errors.As(err, &x) || x.hint == "") {
				t.Errorf("no way on: %v", err)
			}
		})
	}
}

func TestSelfTestJSON(t *testing.T) {
	var out bytes.Buffer
	if err := selfTestOf(t.Context(), env{stdout: &out, stderr: &out}, breakages()[:2], true); err != nil {
		t.Fatal(err)
	}
	var r struct {
		Schema int  `json:"schema"`
		OK     bool `json:"ok"`
		Cases  []struct {
			Name, Expected, Verdict, Packets, Why string
			OK                                    bool
		} `json:"cases"`
	}
	if err := json.Unmarshal(out.Bytes(), &r); err != nil {
		t.Fatalf("%v\n%s", err, out.String())
	}
	if r.Schema != 1 || !r.OK || len(r.Cases) != 2 || r.Cases[0].Verdict != "pass" || r.Cases[1].Expected != "fail" || r.Cases[1].Packets != "fail" {
		t.Errorf("%+v", r)
	}
}
