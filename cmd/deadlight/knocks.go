package main

import (
	"cmp"
	"fmt"
	"io"
	"slices"
	"time"

	"deadlight/firewall"
	"deadlight/rules"
)

// Who knocked at what no rule opens, as status shows it.

// knocksJSON is what no rule admitted, by port: dropped or rejected, or with
// enforce = false what would have been.
type knocksJSON struct {
	Memory  int         `json:"memory"` // seconds after which a port or source that was silent since is forgotten
	Full    bool        `json:"full"`   // there was no room left: more may have come than is listed
	Ports   []knockJSON `json:"ports"`  // 64 at most, most packets first
	More    int         `json:"more"`   // ports beyond those
	Sources int         `json:"sources"`
}

// knockJSON is a port that was knocked at.
type knockJSON struct {
	Port     uint16         `json:"port"`
	Protocol string         `json:"protocol"`
	Packets  uint64         `json:"packets"` // since it was last forgotten
	Bytes    uint64         `json:"bytes"`
	Last     time.Time      `json:"last"`
	Sources  []knockerJSON  `json:"sources"` // 8 at most, the last to come first
	More     int            `json:"more"`    // sources beyond those
	protocol rules.Protocol // as a number
}

// knockerJSON is a source that knocked at a port. It may be forged.
type knockerJSON struct {
	Source  string    `json:"source"`
	Packets uint64    `json:"packets"`
	Bytes   uint64    `json:"bytes"`
	Last    time.Time `json:"last"`
}

const (
	mostKnocks   = 64 // in JSON
	mostKnockers = 8
	shownKnocks  = 5 // in text
)

// knocks makes the JSON of what was counted; nil where nothing is.
func knocks(k *firewall.Knocks) *knocksJSON {
	if !k.Counted {
		return nil
	}
	type port struct {
		p rules.Protocol
		n uint16
	}
	from := map[port][]firewall.Knock{}
	sources := map[string]bool{}
	for _, s := range k.Sources {
		from[port{s.Protocol, s.Port}] = append(from[port{s.Protocol, s.Port}], s)
		sources[s.Source.String()] = true
	}
	out := &knocksJSON{
		Memory: int(k.Memory / time.Second), Full: k.PortsFull || k.SourcesFull, Ports: []knockJSON{},
		More: max(len(k.Ports)-mostKnocks, 0), Sources: len(sources),
	}
	for _, p := range k.Ports[:min(len(k.Ports), mostKnocks)] {
		list := from[port{p.Protocol, p.Port}]
		slices.SortStableFunc(list, func(a, b firewall.Knock) int {
			return cmp.Or(b.Last.Compare(a.Last), cmp.Compare(b.Packets, a.Packets))
		})
		j := knockJSON{
			Port: p.Port, Protocol: p.Protocol.String(), Packets: p.Packets, Bytes: p.Bytes, Last: p.Last.UTC().Truncate(time.Second),
			Sources: []knockerJSON{}, More: max(len(list)-mostKnockers, 0), protocol: p.Protocol,
		}
		for _, s := range list[:min(len(list), mostKnockers)] {
			j.Sources = append(j.Sources, knockerJSON{s.Source.String(), s.Packets, s.Bytes, s.Last.UTC().Truncate(time.Second)})
		}
		out.Ports = append(out.Ports, j)
	}
	return out
}

// print writes the ports that were knocked at most.
func (k *knocksJSON) print(w io.Writer) {
	title := "knocked"
	for _, p := range k.Ports[:min(len(k.Ports), shownKnocks)] {
		printf(w, "%-8s  %s\n", title, p.text())
		title = ""
	}
	var rest []string
	if n := len(k.Ports) - shownKnocks + k.More; n > 0 {
		rest = append(rest, "and at "+plural(n, "more port"))
	}
	if k.Full {
		rest = append(rest, "the list is full: more may have come")
	}
	for _, r := range rest {
		printf(w, "%-8s  %s\n", "", r)
	}
}

func (k *knockJSON) text() string {
	out := fmt.Sprintf("%s: %s, the last %s", rules.PortName(k.protocol, k.Port), plural(int(k.Packets), "packet"), k.Last.Local().Format(time.DateTime))
	if len(k.Sources) > 0 {
		out += " from " + k.Sources[0].Source
		if n := len(k.Sources) - 1 + k.More; n > 0 {
			out += fmt.Sprintf(", in all from %s", plural(n+1, "source"))
		}
	}
	return out
}
