package rules

import (
	"fmt"
)

// Limits that keep a hostile file from costing more than its size.
const (
	maxSize    = 8 << 20   // of the policy and of each of its includes
	maxTotal   = 64 << 20  // of all of them together
	maxList    = 256 << 20 // of a list of addresses
	maxNesting = 16        // brackets within brackets, and parts of a dotted key
	maxWord    = 4096      // bytes of a string, a key or a number
	maxFound   = 1000      // problems reported in full
)

// Parse reads a policy whole, with what it includes. file is its name in
// messages, and what it names stands in the directory of that name; files may be
// nil when there are none to read. The Policy is nil if any of the problems is an
// error. Problems stand in the order of the file, then of its includes, then of
// the lists of its sets.
func Parse(file string, src []byte, files Files) (*Policy, []Problem) {
	if len(src) > maxSize {
		return nil, []Problem{{
			Pos:     Pos{file, 1, 1},
			Width:   1,
			Summary: fmt.Sprintf("file is larger than %d MiB", maxSize>>20),
			Hint:    "a policy of 10,000 rules takes about 1 MiB: is this the right file?",
		}}
	}
	r := newReader(files)
	root, ok := r.decode(r.add(file, src))
	if !ok {
		return nil, r.problems()
	}
	p := r.policy(file, root)
	problems := r.problems()
	if r.errors > 0 {
		return nil, problems
	}
	return p, problems
}

// draft is a policy being read.
type draft struct {
	Policy
	version  bool
	includes []placedName
	partial  bool               // an include could not be read: what it defines is not known
	tables   map[string][]named // [open], [set] and their like, of every file, read once all are known
	failsafe named
	noted    map[string]bool // of Files

	opens, blocks, egress []*rule
	sets                  map[string]*setDraft
	setNames              []string // in file order
	services              map[string]*serviceDraft
	serviceNames          []string
}

// placedName is a name and where it was written.
type placedName struct {
	name string
	at   span
}

// policy reads the whole policy, the main file of which is decoded.
func (r *reader) policy(file string, root value) *Policy {
	d := &draft{
		Policy:   DefaultPolicy(),
		tables:   make(map[string][]named),
		sets:     make(map[string]*setDraft),
		services: make(map[string]*serviceDraft),
	}
	d.File, d.Files = file, []string{file}
	r.readFile(root, d)
	if !d.version {
		r.errorf(span{}, "begin the file with version = 1", "version is missing")
	}
	for _, part := range d.include(r) {
		r.readPart(part, d)
	}
	d.readServices(r)
	d.readSets(r)
	d.opens = d.readRules(r, "open", openSchema)
	d.blocks = d.readRules(r, "block", blockSchema)
	d.egress = d.readRules(r, "egress", egressSchema)
	d.readFailsafe(r)
	d.readExpects(r)
	for _, o := range d.opens {
		d.Open = append(d.Open, o.Open)
	}
	for _, o := range d.blocks {
		d.Block = append(d.Block, Block{o.Traffic})
	}
	for _, o := range d.egress {
		d.Egress = append(d.Egress, Egress{o.Traffic, o.user, o.group})
	}
	d.compare(r)
	d.noteExpiries(r)
	return &d.Policy
}
