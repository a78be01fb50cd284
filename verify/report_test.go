package verify

import (
	"bytes"
	"encoding/json"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"deadlight/rules"
)

// look makes a view of some ports and the result the engine would give.
func look(answers map[Target]Answer) (View, PathResult) {
	v := View{In: "eth0", Sweep: true, Path: Path{Src: netip.MustParseAddr("203.0.113.78"), Dst: netip.MustParseAddr("203.0.113.77"), SrcPort: 20001}}
	res := PathResult{Alive: true}
	for port := uint16(1); port <= 100; port++ {
		v.Path.TCP, v.Path.UDP = append(v.Path.TCP, port), append(v.Path.UDP, port)
		for _, proto := range []rules.Protocol{rules.TCP, rules.UDP} {
			a, ok := answers[Target{proto, port}]
			if !ok {
				a = Answer{Filtered, NoResponse}
			}
			if proto == rules.TCP {
				res.TCP = append(res.TCP, a)
			} else {
				res.UDP = append(res.UDP, a)
			}
		}
	}
	res.SentTCP, res.SentUDP = 100, 100
	return v, res
}

func judged(t *testing.T, policy string, answers map[Target]Answer, proof *HostProof) *Report {
	t.Helper()
	v, res := look(answers)
	return Judge(JudgeConfig{Target: "t", Vantage: "v", Rules: compileText(t, policy), Views: []View{v}, HostProof: proof},
		&Result{Paths: []PathResult{res}, Bound: 1e-7, Elapsed: time.Second})
}

func arrivedAll() *HostProof {
	return &HostProof{Arrived: map[rules.Protocol]map[uint16]uint64{rules.TCP: {20001: 100}, rules.UDP: {20001: 100}},
		Passed: map[Passage]bool{}, Gate: map[Passage]bool{}}
}

func TestJudge(t *testing.T) {
	const web = "[open.web]\nports = 80\nprotocol = [\"tcp\", \"udp\"]\n"
	const reject = "[default]\ninput = \"reject\"\n" + web
	tcp := func(p uint16) Target { return Target{rules.TCP, p} }
	udp := func(p uint16) Target { return Target{rules.UDP, p} }
	good := func() map[Target]Answer {
		return map[Target]Answer{tcp(80): {Open, SynAck}, udp(80): {Open, UDPAnswer}}
	}
	passed := func(proto rules.Protocol, port uint16) *HostProof {
		p := arrivedAll()
		p.Passed[Passage{SrcPort: 20001, DstPort: port, Protocol: proto}] = true
		return p
	}
	gate := arrivedAll()
	gate.Gate[Passage{SrcPort: 20001, DstPort: 7, Protocol: rules.TCP}] = true
	short := arrivedAll()
	short.Arrived[rules.UDP][20001] = 99
	for _, c := range []struct {
		name   string
		policy string
		change map[Target]Answer
		proof  *HostProof
		want   Verdict
		find   string // in the first finding
	}{
		{"as it should be", web, nil, arrivedAll(), Pass, ""},
		{"listed, nobody listens", web, map[Target]Answer{tcp(80): {Closed, TCPReset}}, arrivedAll(), Pass, ""},
		{"listed, silent", web, map[Target]Answer{tcp(80): {Filtered, NoResponse}}, arrivedAll(), Fail, "80/tcp filtered expected open"},
		{"listed, rejected", web, map[Target]Answer{tcp(80): {Rejected, AdminProhibited}}, arrivedAll(), Fail, "80/tcp rejected expected open"},
		{"unlisted, open", web, map[Target]Answer{tcp(22): {Open, SynAck}}, arrivedAll(), Fail, "22/tcp open expected filtered"},
		{"unlisted, closed", web, map[Target]Answer{tcp(22): {Closed, TCPReset}}, nil, Fail, "22/tcp closed expected filtered"},
		{"unlisted, rejected", web, map[Target]Answer{tcp(22): {Rejected, AdminProhibited}}, nil, Fail, "22/tcp rejected expected filtered"},
		{"unlisted over UDP, closed", web, map[Target]Answer{udp(53): {Closed, PortUnreachable}}, nil, Fail, "53/udp closed expected filtered"},
		{"path not proven", web, map[Target]Answer{tcp(22): {Unknown, PathNotProven}}, nil, Inconclusive, "22/tcp unknown expected filtered"},
		{"router error", web, map[Target]Answer{tcp(22): {Unknown, RouterError}}, nil, Inconclusive, "22/tcp unknown"},
		{"a failure outranks a doubt", web, map[Target]Answer{tcp(22): {Unknown, RouterError}, tcp(23): {Open, SynAck}}, nil, Fail, "23/tcp open"},
		{"the tripwire settles a doubt", web, map[Target]Answer{tcp(22): {Unknown, PathNotProven}}, arrivedAll(), Pass, ""},
		{"the tripwire names what passed", web, nil, passed(rules.UDP, 53), Fail, "53/udp closed expected filtered: passed the firewall, no answer"},
		{"the tripwire names what passed over TCP", web, nil, passed(rules.TCP, 9), Fail, "9/tcp closed expected filtered: passed the firewall"},
		{"a hole in the gate alone", web, nil, gate, Fail, "7/tcp filtered expected filtered: passed the gate"},
		{"a listed UDP port that stays silent passed", web, map[Target]Answer{udp(80): {Filtered, NoResponse}}, passed(rules.UDP, 80), Pass, ""},
		{"a listed UDP port that stays silent did not pass", web, map[Target]Answer{udp(80): {Filtered, NoResponse}}, arrivedAll(), Fail, "80/udp filtered expected open"},
		{"without proof a listed UDP port may be silent", web, map[Target]Answer{udp(80): {Filtered, NoResponse}}, nil, Pass, ""},
		{"a probe that did not arrive proves nothing", web, map[Target]Answer{udp(9): {Unknown, PathNotProven}}, short, Inconclusive, "9/udp unknown"},
		{"reject: RST and ICMP", reject, map[Target]Answer{tcp(1): {Closed, TCPReset}, tcp(2): {Rejected, AdminProhibited}, udp(1): {Rejected, AdminProhibited}}, nil, Fail, "3/tcp filtered expected rejected"},
		{"reject: over UDP most answers are withheld", reject, rejectAll(), nil, Pass, ""},
		{"reject: what passed is no reject", reject, rejectAll(), passed(rules.UDP, 53), Fail, "53/udp closed expected rejected"},
	} {
		answers := good()
		for k, a := range c.change {
			answers[k] = a
		}
		r := judged(t, c.policy, answers, c.proof)
		if r.Verdict != c.want {
			t.Errorf("%s: %s, want %s: %+v", c.name, r.Verdict, c.want, r.Findings)
			continue
		}
		got := ""
		if len(r.Findings) > 0 {
			f := r.Findings[0]
			got = itoa(int(f.Port)) + "/" + f.Protocol + " " + f.Observed.String() + " expected " + f.Expected + ": " + f.Reason
		}
		if !strings.HasPrefix(got, c.find) || (c.find == "") != (got == "") {
			t.Errorf("%s: finding %q, want %q", c.name, got, c.find)
		}
		var text bytes.Buffer
		if err := r.WriteText(&text); err != nil {
			t.Fatal(err)
		}
		word := map[Verdict]string{Pass: "PASS: ", Fail: "FAIL: ", Inconclusive: "INCONCLUSIVE: "}[c.want]
		lines := strings.Split(strings.TrimSpace(text.String()), "\n")
		if !strings.HasPrefix(lines[len(lines)-1], word) {
			t.Errorf("%s: last line %q", c.name, lines[len(lines)-1])
		}
	}
}

// rejectAll is a host that resets every TCP port.
func rejectAll() map[Target]Answer {
	out := map[Target]Answer{}
	for p := uint16(1); p <= 100; p++ {
		if p != 80 {
			out[Target{rules.TCP, p}] = Answer{Closed, TCPReset}
		}
	}
	return out
}

func TestInterfaceNotKnown(t *testing.T) {
	v, res := look(nil)
	v.In = ""
	rs := compileText(t, "[open.dns]\nports = 53\nprotocol = \"udp\"\ninterfaces = \"docker0\"\n")
	r := Judge(JudgeConfig{Rules: rs, Views: []View{v}}, &Result{Paths: []PathResult{res}})
	if r.Verdict != Pass { // as by an interface that no rule names
		t.Errorf("%s %v %v", r.Verdict, r.Findings, r.Notes)
	}
	open := func(ports ...uint16) *Report {
		for i, p := range v.Path.UDP {
			if slices.Contains(ports, p) {
				res.UDP[i] = Answer{Open, UDPAnswer}
			}
		}
		return Judge(JudgeConfig{Rules: rs, Views: []View{v}}, &Result{Paths: []PathResult{res}})
	}
	// Reachable, which the policy allows by docker0 only: nothing can be said.
	if r = open(53); r.Verdict != Inconclusive || len(r.Findings) != 0 || !strings.Contains(strings.Join(r.Notes, "\n"), "not judged: 53/udp") {
		t.Errorf("%s %v %v", r.Verdict, r.Findings, r.Notes)
	}
	if r = open(53, 54); r.Verdict != Fail || len(r.Findings) != 1 || r.Findings[0].Port != 54 {
		t.Errorf("%s %+v", r.Verdict, r.Findings)
	}
}

// A witness that did not see every probe arrive proves nothing, and a limited
// opening that admits nobody is shut.
func TestJudgeDoubts(t *testing.T) {
	lost := arrivedAll()
	lost.Arrived[rules.UDP][20001] = 99
	const dns = "[open.dns]\nports = 53\nprotocol = \"udp\"\n"
	if r := judged(t, dns, nil, lost); r.Verdict != Inconclusive || len(r.Findings) != 1 || strings.Contains(conclusion(t, r), "tripwire") {
		t.Errorf("a listed port whose probe did not arrive: %s %v", r.Verdict, r.Findings)
	}
	const limited = "[open.api]\nports = [80, 81]\nrate = { limit = \"10/second\" }\n"
	if r := judged(t, limited, nil, arrivedAll()); r.Verdict != Fail || len(r.Findings) != 1 || r.Findings[0].Rule != "api" {
		t.Errorf("a limited opening that admits nobody: %s %v", r.Verdict, r.Findings)
	}
	r := judged(t, limited, map[Target]Answer{{rules.TCP, 81}: {Open, SynAck}}, arrivedAll())
	if r.Verdict != Pass || r.ports != 198 {
		t.Errorf("a limited opening: %s, %d ports judged, %v", r.Verdict, r.ports, r.Findings)
	}
}

func conclusion(t *testing.T, r *Report) string {
	t.Helper()
	var b bytes.Buffer
	if err := r.WriteText(&b); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// The fields of the contract, by name.
func TestReportJSON(t *testing.T) {
	r := judged(t, "", map[Target]Answer{{rules.TCP, 22}: {Open, SynAck}}, nil)
	b, err := json.Marshal(r)
	if err != nil {
		t.Fatal(err)
	}
	var m map[string]any
	if err := json.Unmarshal(b, &m); err != nil {
		t.Fatal(err)
	}
	for _, k := range []string{"schema", "verdict", "target", "vantage", "proof", "bound", "seconds", "probes", "counts", "states", "findings"} {
		if _, ok := m[k]; !ok {
			t.Errorf("no field %q", k)
		}
	}
	if m["verdict"] != "fail" || m["schema"] != 1.0 {
		t.Errorf("verdict %v, schema %v", m["verdict"], m["schema"])
	}
	states := m["states"].(map[string]any)["tcp4"].(map[string]any)
	if states["open"] != "22" || states["filtered"] != "1-21,23-100" {
		t.Errorf("states %v", states)
	}
	f := m["findings"].([]any)[0].(map[string]any)
	for _, k := range []string{"family", "address", "protocol", "port", "probe", "expected", "observed", "reason", "rule"} {
		if _, ok := f[k]; !ok {
			t.Errorf("no field %q in a finding", k)
		}
	}
}

func TestParsePorts(t *testing.T) {
	for spec, want := range map[string]string{
		"all": "1-65535 1-65535", "tcp": "1-65535 ", "udp": " 1-65535", "443/tcp": "443 ", "1-3/udp,443/tcp,2-4/udp": "443 1-4",
		"65535/tcp": "65535 ", "tcp,53/udp": "1-65535 53",
	} {
		p, err := ParsePorts(spec)
		if got := Ranges(p.TCP) + " " + Ranges(p.UDP); err != nil || got != want {
			t.Errorf("%q = %q, %v, want %q", spec, got, err, want)
		}
	}
	for _, spec := range []string{"", "443", "443/sctp", "0/tcp", "65536/tcp", "5-4/tcp", "/tcp", "-/tcp", "1-/tcp", "a/tcp", "tcp/443", ",", "443/tcp,", "-1/tcp"} {
		if p, err := ParsePorts(spec); err == nil {
			t.Errorf("%q = %v, want an error", spec, p)
		}
	}
}
