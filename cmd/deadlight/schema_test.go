package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"maps"
	"net/netip"
	"os"
	"path"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/rogpeppe/go-internal/testscript"
	"github.com/santhosh-tekuri/jsonschema/v6"

	"deadlight/firewall"
	"deadlight/rules"
	"deadlight/verify"
)

// The schemas of what --json prints are made from the Go types and their
// comments: after a change of these, go test ./cmd/deadlight -run TestSchemas -update
// writes them anew. What the commands print is held against them.

// jsonObjects gives what each command with --json prints. A new one belongs here.
func jsonObjects() map[string]any {
	return map[string]any{
		"check":   checked{},
		"explain": explanation{},
		"show":    shown{},
		"try":     verify.Report{},
		"plan":    planJSON{},
		"status":  statusJSON{},
		"drift":   driftJSON{},
		"verify":  verify.Report{},
		// verify of several hosts.
		"verify-targets": verify.Many{},
		"audit":          auditJSON{},
	}
}

// Words that a field may hold, by type and name of the field in JSON.
func jsonWords() map[string][]string {
	var states []string
	for s := range slices.Values([]verify.State{verify.Open, verify.Closed, verify.Rejected, verify.Filtered, verify.Unknown}) {
		states = append(states, s.String())
	}
	verdicts := []string{verify.Pass.String(), verify.Inconclusive.String(), verify.Fail.String()}
	families := []string{rules.IPv4.String(), rules.IPv6.String(), rules.Both.String()}
	return map[string][]string{
		"findingJSON.kind":          {"unlisted", "stopped", "probed"},
		"socketJSON.verdict":        {auditExposed, auditWide, auditFiltered, auditLoopback, auditUnreachable, auditUnlisted, auditStopped, auditUnheard, auditUnknown},
		"changeJSON.action":         {"add", "remove", "change"},
		"changeJSON.kind":           {"table", "chain", "rule", "set", "element", "object", "flowtable"},
		"explanation.verdict":       {rules.OutcomeOpen.String(), rules.OutcomeFiltered.String(), rules.OutcomeRejected.String()},
		"fileJSON.why":              {"changed", "new", "missing", "unreadable"},
		"interferenceJSON.severity": {string(firewall.Breaks), string(firewall.May), string(firewall.Note)},
		"kernelStatusJSON.table":    {tableEqual, tableDifferent, tableAbsent, tablePresent},
		"listenerJSON.effect":       {"gains", "loses", "changes"},
		"liveJSON.verdict":          {string(firewall.WalkAccept), string(firewall.WalkDrop), string(firewall.WalkReject), string(firewall.WalkUnknown)},
		"openJSON.family":           families,
		"planJSON.baseline":         {baseApplied, baseKernel, baseNone},
		"policyStatusJSON.state":    {policyApplied, policyNone, policyUnknown},
		"portJSON.family":           families,
		"problemFields.severity":    {rules.Error.String(), rules.Warning.String()},
		"ruleChangeJSON.action":     {"add", "remove", "change"},
		"Brief.verdict":             verdicts,
		"BriefFinding.observed":     states,
		"Expected.expected":         {rules.OutcomeOpen.String(), rules.OutcomeFiltered.String(), rules.OutcomeRejected.String()},
		"Expected.observed":         states,
		"Expected.result":           verify.ExpectResults(),
		"Finding.observed":          states,
		"Many.verdict":              verdicts,
		"Opening.state":             states,
		"Report.proof":              {"host", "packets"},
		"Report.verdict":            verdicts,
		"Restriction.place":         {"inside", "edge", "beside"},
		"chainJSON.policy":          {"accept", "drop"},
	}
}

// problemFields is what [rules.Problem] is as JSON.
type problemFields struct {
	Severity string `json:"severity"`
	File     string `json:"file"`
	Line     int    `json:"line"`
	Column   int    `json:"column"`
	Summary  string `json:"summary"` // the fact
	Hint     string `json:"hint"`    // what to write instead; may be empty
}

// object keeps the keys of a schema in the order in which people read them.
type object []member

type member struct {
	key   string
	value any
}

// MarshalJSON implements [json.Marshaler].
func (o object) MarshalJSON() ([]byte, error) {
	var b bytes.Buffer
	b.WriteByte('{')
	for i, m := range o {
		if i > 0 {
			b.WriteByte(',')
		}
		if err := writeJSON(&b, m.key); err != nil {
			return nil, err
		}
		b.WriteByte(':')
		if err := writeJSON(&b, m.value); err != nil {
			return nil, err
		}
	}
	b.WriteByte('}')
	return b.Bytes(), nil
}

// schemaMaker makes the schema of one command.
type schemaMaker struct {
	t        *testing.T
	comments map[string]string // of types and of their fields, as docName has them
	words    map[string][]string
	used     map[string]bool // of words
	defs     map[string]object
	types    map[string]reflect.Type // of defs
}

// docName names a type, or one of its fields, in its package.
func docName(pkg string, names ...string) string { return pkg + " " + strings.Join(names, ".") }

// goComments reads the comments of the packages whose types are printed.
func goComments(t *testing.T) map[string]string {
	t.Helper()
	out := map[string]string{}
	text := func(groups ...*ast.CommentGroup) string {
		for _, g := range groups {
			if s := strings.Join(strings.Fields(g.Text()), " "); s != "" {
				return strings.NewReplacer("[", "", "]", "").Replace(strings.ReplaceAll(s, "[[expect]]", "expect"))
			}
		}
		return ""
	}
	for dir, pkg := range map[string]string{".": "deadlight/cmd/deadlight", "../../firewall": "deadlight/firewall", "../../verify": "deadlight/verify"} {
		names, err := fs.Glob(os.DirFS(dir), "*.go")
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range names {
			f, err := parser.ParseFile(token.NewFileSet(), path.Join(dir, name), nil, parser.ParseComments)
			if err != nil {
				t.Fatal(err)
			}
			for _, d := range f.Decls {
				g, ok := d.(*ast.GenDecl)
				if !ok {
					continue
				}
				for _, s := range g.Specs {
					spec, ok := s.(*ast.TypeSpec)
					if !ok {
						continue
					}
					body, ok := spec.Type.(*ast.StructType)
					if !ok {
						continue
					}
					out[docName(pkg, spec.Name.Name)] = text(spec.Doc, g.Doc)
					for _, field := range body.Fields.List {
						for _, n := range field.Names {
							out[docName(pkg, spec.Name.Name, n.Name)] = text(field.Doc, field.Comment)
						}
					}
				}
			}
		}
	}
	return out
}

// of gives the schema of a value of a type.
func (m *schemaMaker) of(typ reflect.Type) object {
	switch typ {
	case reflect.TypeFor[time.Time]():
		return object{{"type", "string"}, {"format", "date-time"}}
	case reflect.TypeFor[netip.Addr](), reflect.TypeFor[netip.AddrPort](), reflect.TypeFor[verify.State](), reflect.TypeFor[verify.Verdict]():
		return object{{"type", "string"}}
	case reflect.TypeFor[rules.Problem]():
		typ = reflect.TypeFor[problemFields]()
	}
	switch typ.Kind() {
	case reflect.Bool:
		return object{{"type", "boolean"}}
	case reflect.String:
		return object{{"type", "string"}}
	case reflect.Float64:
		return object{{"type", "number"}}
	case reflect.Int, reflect.Int64:
		return object{{"type", "integer"}}
	case reflect.Uint16:
		return object{{"type", "integer"}, {"minimum", 0}, {"maximum", 65535}}
	case reflect.Uint32, reflect.Uint64:
		return object{{"type", "integer"}, {"minimum", 0}}
	case reflect.Slice:
		return object{{"type", "array"}, {"items", m.of(typ.Elem())}}
	case reflect.Map:
		return object{{"type", "object"}, {"additionalProperties", m.of(typ.Elem())}}
	case reflect.Pointer:
		return m.of(typ.Elem())
	case reflect.Struct:
		name := typ.Name()
		if was := m.types[name]; was == nil {
			m.types[name] = typ // first, for types that hold themselves
			m.defs[name] = m.fields(typ)
		} else if was != typ {
			m.t.Fatalf("%s and %s would be one", was, typ)
		}
		return object{{"$ref", "#/$defs/" + name}}
	}
	m.t.Fatalf("no schema for %s", typ)
	return nil
}

// fields gives the schema of an object.
func (m *schemaMaker) fields(typ reflect.Type) object {
	var properties object
	required := []string{}
	for i := range typ.NumField() {
		f := typ.Field(i)
		tag, ok := f.Tag.Lookup("json")
		if !ok && !f.IsExported() {
			continue
		}
		name, options, _ := strings.Cut(tag, ",")
		if name == "" || f.Anonymous {
			m.t.Fatalf("%s.%s has no name in JSON", typ.Name(), f.Name)
		}
		schema := m.of(f.Type)
		optional := strings.Contains(options, "omit")
		if f.Type.Kind() == reflect.Pointer && !optional {
			m.t.Fatalf("%s.%s may be null: leave it out instead", typ.Name(), f.Name)
		}
		if words := m.words[typ.Name()+"."+name]; words != nil {
			schema = append(schema, member{"enum", words})
			m.used[typ.Name()+"."+name] = true
		}
		if name == "schema" {
			schema = object{{"const", 1}}
		} else if text := m.comments[docName(typ.PkgPath(), typ.Name(), f.Name)]; text != "" {
			schema = append(object{{"description", text}}, schema...)
		}
		properties = append(properties, member{name, schema})
		if !optional {
			required = append(required, name)
		}
	}
	out := object{}
	if text := m.comments[docName(typ.PkgPath(), typ.Name())]; text != "" {
		out = append(out, member{"description", text})
	}
	return append(out, object{{"type", "object"}, {"properties", properties}, {"required", required}, {"additionalProperties", false}}...)
}

// schemaOf writes the schema of what a command prints.
func (m *schemaMaker) schemaOf(command string, printed any) []byte {
	m.defs, m.types = map[string]object{}, map[string]reflect.Type{}
	out := object{
		{"$schema", "https://json-schema.org/draft/2020-12/schema"},
		{"title", "deadlight " + strings.ReplaceAll(command, "-targets", " --targets") + " --json"},
	}
	out = append(out, m.fields(reflect.TypeOf(printed))...)
	if len(m.defs) > 0 {
		var defs object
		for _, name := range slices.Sorted(maps.Keys(m.defs)) {
			defs = append(defs, member{name, m.defs[name]})
		}
		out = append(out, member{"$defs", defs})
	}
	var raw, b bytes.Buffer
	if err := writeJSON(&raw, out); err != nil {
		m.t.Fatal(err)
	}
	if err := json.Indent(&b, bytes.TrimSpace(raw.Bytes()), "", "  "); err != nil {
		m.t.Fatal(err)
	}
	return append(b.Bytes(), '\n')
}

// Every command with --json has a schema, which is that of its Go type, and there
// are no others.
func TestSchemas(t *testing.T) {
	m := &schemaMaker{t: t, comments: goComments(t), words: jsonWords(), used: map[string]bool{}}
	objects := jsonObjects()
	want := map[string]bool{"policy.json": true}
	_, commands := commandsForPeople()
	names := []string{"verify-targets"}
	for name, c := range commands {
		if c.Flags().Lookup("json") == nil {
			continue
		}
		if objects[name] == nil {
			t.Errorf("deadlight %s --json prints what jsonObjects does not name", name)
			continue
		}
		names = append(names, name)
	}
	for _, name := range names {
		file := "schema/" + name + ".json"
		want[name+".json"] = true
		now := m.schemaOf(name, objects[name])
		if *update {
			if err := os.WriteFile(file, now, 0o644); err != nil {
				t.Fatal(err)
			}
		}
		was, err := os.ReadFile(file)
		if err != nil {
			t.Errorf("deadlight %s --json has no schema: %v", name, err)
			continue
		}
		if diff := cmp.Diff(string(was), string(now)); diff != "" {
			t.Errorf("%s is not what the Go types say; go test ./cmd/deadlight -run TestSchemas -update writes it (-is +should):\n%s", file, diff)
		}
		compileSchema(t, name)
	}
	for field := range m.words {
		if !m.used[field] {
			t.Errorf("jsonWords: no field %s is printed", field)
		}
	}
	files, err := os.ReadDir("schema")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		if !want[f.Name()] {
			t.Errorf("schema/%s is the schema of nothing", f.Name())
		}
	}
}

// What is printed with every field set has just the properties of its schema.
func TestSchemasFilled(t *testing.T) {
	for name, printed := range jsonObjects() {
		v := reflect.New(reflect.TypeOf(printed)).Elem()
		fill(v)
		b, err := json.Marshal(v.Interface())
		if err != nil {
			t.Fatal(err)
		}
		var got any
		if err := json.Unmarshal(b, &got); err != nil {
			t.Fatal(err)
		}
		samekeys(t, "deadlight "+name+" --json", got, compileSchema(t, name))
	}
}

// fill sets every field, lists and maps to one element.
func fill(v reflect.Value) {
	switch at := v.Addr().Interface().(type) {
	case *time.Time:
		*at = time.Unix(1, 0).UTC()
		return
	case *netip.AddrPort:
		*at = netip.MustParseAddrPort("192.0.2.1:1")
		return
	case *netip.Addr:
		*at = netip.MustParseAddr("192.0.2.1")
		return
	}
	switch v.Kind() {
	case reflect.Bool:
		v.SetBool(true)
	case reflect.String:
		v.SetString("x")
	case reflect.Int:
		v.SetInt(1)
	case reflect.Uint8, reflect.Uint16, reflect.Uint32, reflect.Uint64:
		v.SetUint(1)
	case reflect.Float64:
		v.SetFloat(1)
	case reflect.Pointer:
		v.Set(reflect.New(v.Type().Elem()))
		fill(v.Elem())
	case reflect.Slice:
		v.Set(reflect.MakeSlice(v.Type(), 1, 1))
		fill(v.Index(0))
	case reflect.Map:
		key, value := reflect.New(v.Type().Key()).Elem(), reflect.New(v.Type().Elem()).Elem()
		fill(key)
		fill(value)
		v.Set(reflect.MakeMap(v.Type()))
		v.SetMapIndex(key, value)
	case reflect.Struct:
		for i := range v.NumField() {
			if v.Type().Field(i).IsExported() {
				fill(v.Field(i))
			}
		}
	default:
		panic(fmt.Sprintf("cannot fill %s", v.Type()))
	}
}

// samekeys compares the keys of objects with the properties of their schema.
func samekeys(t *testing.T, where string, got any, s *jsonschema.Schema) {
	t.Helper()
	if s.Ref != nil {
		s = s.Ref
	}
	switch v := got.(type) {
	case []any:
		items, ok := s.Items2020, s.Items2020 != nil
		if !ok || len(v) == 0 {
			t.Errorf("%s: %d elements, and a schema for them: %v", where, len(v), ok)
			return
		}
		samekeys(t, where+"[]", v[0], items)
	case map[string]any:
		if s.Properties == nil {
			of, ok := s.AdditionalProperties.(*jsonschema.Schema)
			if !ok {
				t.Errorf("%s: no schema for what stands in it", where)
				return
			}
			for _, value := range v {
				samekeys(t, where+".*", value, of)
			}
			return
		}
		if s.AdditionalProperties != false {
			t.Errorf("%s: its schema lets any other property in", where)
		}
		has, may := slices.Sorted(maps.Keys(v)), slices.Sorted(maps.Keys(s.Properties))
		if diff := cmp.Diff(may, has); diff != "" {
			t.Errorf("%s (-schema +Go):\n%s", where, diff)
			return
		}
		for key, value := range v {
			samekeys(t, where+"."+key, value, s.Properties[key])
		}
	}
}

// compileSchema reads schema/NAME.json.
func compileSchema(t *testing.T, name string) *jsonschema.Schema {
	t.Helper()
	b, err := os.ReadFile("schema/" + name + ".json")
	if err != nil {
		t.Fatalf("%v", err)
	}
	c := jsonschema.NewCompiler()
	c.DefaultDraft(jsonschema.Draft2020)
	c.AssertFormat()
	doc, err := jsonschema.UnmarshalJSON(bytes.NewReader(b))
	if err == nil {
		err = c.AddResource("schema.json", doc)
	}
	if err != nil {
		t.Fatalf("schema/%s.json: %v", name, err)
	}
	s, err := c.Compile("schema.json")
	if err != nil {
		t.Fatalf("schema/%s.json: %v", name, err)
	}
	return s
}

// conforms holds what a command printed against its schema.
func conforms(s *jsonschema.Schema, name string, printed []byte) error {
	v, err := jsonschema.UnmarshalJSON(bytes.NewReader(printed))
	if err == nil {
		err = s.Validate(v)
	}
	if err != nil {
		return fmt.Errorf("deadlight %s --json prints what its schema does not allow: %w\n%s", name, err, printed)
	}
	return nil
}

// conformsCmd is for scripts, conforms COMMAND FILE...: each file, or stdout, is
// one object that deadlight COMMAND --json may print.
func conformsCmd(t *testing.T) func(ts *testscript.TestScript, neg bool, args []string) {
	schemas := map[string]*jsonschema.Schema{}
	for name := range jsonObjects() {
		schemas[name] = compileSchema(t, name)
	}
	return func(ts *testscript.TestScript, neg bool, args []string) {
		if neg || len(args) < 2 || schemas[args[0]] == nil {
			ts.Fatalf("usage: conforms COMMAND FILE...")
		}
		for _, file := range args[1:] {
			if err := conforms(schemas[args[0]], args[0], []byte(ts.ReadFile(file))); err != nil {
				ts.Fatalf("%s: %v", file, err)
			}
		}
	}
}
