package rules

import "slices"

// LockDown is the policy of a host whose own cannot be used: what the host began
// goes on, neighbour discovery, ICMP errors and the DHCP client work, and nothing
// gets in but what [failsafe] of p admits. Nothing is routed. p may be nil.
func LockDown(p *Policy) *Policy {
	d := DefaultPolicy()
	d.ICMP.Echo = false
	d.Default.DropForward = true
	if p == nil || p.Failsafe == nil {
		return &d
	}
	f := p.Failsafe
	d.File = p.File
	d.Open = []Open{{Traffic: Traffic{
		Name: "failsafe", Pos: f.Pos, On: f.On, From: f.From, To: Source{Any: true}, Interfaces: f.Interfaces,
	}}}
	for _, s := range p.Sets {
		if slices.Contains(f.From.Sets, s.Name) {
			d.Sets = append(d.Sets, s)
		}
	}
	return &d
}

// WithoutExpiring is the policy as it stands when every opening that expires has
// done so, inbound and outbound, with the names of those. Blocks stay: it is the
// policy for a host that does not know what time it is.
func (p *Policy) WithoutExpiring() (*Policy, []string) {
	var names []string
	expires := func(t *Traffic) bool {
		if t.Expires.IsZero() {
			return false
		}
		names = append(names, t.Name)
		return true
	}
	out := *p
	out.Open = slices.DeleteFunc(slices.Clone(p.Open), func(o Open) bool { return expires(&o.Traffic) })
	out.Egress = slices.DeleteFunc(slices.Clone(p.Egress), func(o Egress) bool { return expires(&o.Traffic) })
	return &out, names
}
