package rules

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/BurntSushi/toml"
	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"
)

// paths lists what stands in a tree, with the text that the index has for it.
func paths(src []byte, path string, n *node) []string {
	out := []string{path}
	for name, f := range n.fields {
		out = append(out, paths(src, fmt.Sprintf("%s.%q", path, name), f)...)
	}
	for i, f := range n.items {
		out = append(out, paths(src, fmt.Sprintf("%s[%d]", path, i), f)...)
	}
	slices.Sort(out)
	return out
}

func treePaths(path string, v any) []string {
	out := []string{path}
	switch v := v.(type) {
	case map[string]any:
		for name, f := range v {
			out = append(out, treePaths(fmt.Sprintf("%s.%q", path, name), f)...)
		}
	case []any:
		for i, f := range v {
			out = append(out, treePaths(fmt.Sprintf("%s[%d]", path, i), f)...)
		}
	case []map[string]any:
		for i, f := range v {
			out = append(out, treePaths(fmt.Sprintf("%s[%d]", path, i), f)...)
		}
	}
	slices.Sort(out)
	return out
}

// checkIndex holds the index against the TOML library. It gives false if the
// library does not accept the document.
func checkIndex(t interface{ Fatalf(string, ...any) }, src []byte) bool {
	src = withoutBOM(src)
	if _, _, bad := findUnreadable(src); bad {
		return false
	}
	if _, _, bad := findExcess(src); bad {
		return false
	}
	tree, err := decodeTOML(src)
	if err != nil {
		return false
	}
	s := scan(src, 0)
	if s.again != (span{}) || s.empty != (span{}) {
		return false
	}
	if diff := cmp.Diff(treePaths("", tree), paths(src, "", s.root)); diff != "" {
		t.Fatalf("paths of %q differ (-library +index):\n%s", src, diff)
	}
	if s.broken {
		t.Fatalf("scan gave up on %q", src)
	}
	lines := newLines(src)
	var walk func(v any, n *node)
	walk = func(v any, n *node) {
		for _, at := range []span{n.key, n.value} {
			if at.start < 0 || at.end < at.start || int(at.end) > len(src) {
				t.Fatalf("span %v is not in %q", at, src)
			}
			p := lines.at(at)
			whole := strings.Split(string(src), "\n")
			if p.line < 1 || p.line > len(whole) || p.text != strings.TrimSuffix(whole[p.line-1], "\r") {
				t.Fatalf("span %v has line %d %q in %q", at, p.line, p.text, src)
			}
			runes := []rune(p.text)
			if p.column < 1 || p.column+p.width > len(runes)+2 {
				t.Fatalf("span %v has column %d, width %d in %q", at, p.column, p.width, p.text)
			}
			text := at.text(src)
			if first, _, more := strings.Cut(text, "\n"); text != "" && !more && string(runes[p.column-1:p.column-1+p.width]) != first {
				t.Fatalf("column %d, width %d of %q is not %q", p.column, p.width, p.text, text)
			}
		}
		switch v := v.(type) {
		case map[string]any:
			for name, f := range v {
				walk(f, n.fields[name])
				if got := decodeKey(n.fields[name].key.text(src)); got != name {
					t.Fatalf("key at %q is %q, want %q", n.fields[name].key.text(src), got, name)
				}
			}
		case []any:
			for i, f := range v {
				walk(f, n.items[i])
			}
		case []map[string]any:
			for i, f := range v {
				walk(f, n.items[i])
			}
		default:
			var again map[string]any
			if _, err := toml.Decode("x = "+n.value.text(src), &again); err != nil {
				t.Fatalf("value at %q: %v", n.value.text(src), err)
			}
			if fmt.Sprint(again["x"]) != fmt.Sprint(v) {
				t.Fatalf("value at %q is %v, want %v", n.value.text(src), again["x"], v)
			}
		}
	}
	walk(tree, s.root)
	return true
}

// decodeKey gives the name that one part of a key stands for.
func decodeKey(text string) string {
	var m map[string]any
	if _, err := toml.Decode(text+" = 1", &m); err != nil {
		return "not a key: " + err.Error()
	}
	for name := range m {
		return name
	}
	return "not a key"
}

func oddDocuments() []string {
	return []string{
		"",
		"a = 1",
		"# only a comment",
		"a.b.c = 1\na.b.d = 2\n",
		`"a.b"."c d".'e"f' = 1`,
		`"\u00e9\t\"\\\e\x41\U0001F600" = 1`,
		"a = { b = 1, c = { d = [1, 2] } }",
		"a = { b.c = 1, b.d = 2 }",
		"a = {\n  b = 1, # why\n  c = 2,\n}\n",
		"a = [[1, 2], [], [[3]]]",
		"a = [ # [b]\n  1, # ]\n  2,\n]\nb = 3",
		"a = [{ b = 1 }, { b = 2, c = [{ d = 1 }] }]",
		"[[x]]\na = 1\n[[x]]\n[x.y]\nb = 1\n[[x.z]]\nc = 1\n[[x.z]]\n",
		"a = \"\"\"\n[x]\nb = 1\n\"\"\"\nc = 1",
		"a = '''\n[x]''b = 1\n'''\nc = 1",
		"a = \"\"\"x\"\"\"\"\"\nb = ''''''\nc = \"\"\"\\\n   y\\\"\"\"\"\n",
		`a = "[x]\"#" # "` + "\nb = 1",
		`a = 'C:\' # '` + "\nb = 1",
		"[a.b.c]\nx = 1\n[a]\ny = 2\n[a.b]\nz = 3\n",
		"[a]\nx.y = 1\n[a.z]\nw = 1\n",
		"[ a . \"b\" ] # c\nx = 1",
		"a = 1\r\n[b] # c\r\nc = [\r\n 1,\r\n]\r\n",
		"a = 1979-05-27 07:32:00Z # d\nb = [1979-05-27 07:32:00 , 07:32]\n",
		"a = inf\nb = -nan\nc = 0xDEAD_beef\nd = 1e3\ne = +1_000",
		"\"é\" = \"名前\" # ü\n",
		"\ufeffa = 1",
		"[a]\n[b]\n[a.c]",
		"a = true",
		strings.Repeat("# é\n", 700) + "a = \"é\"\n",
	}
}

func TestIndex(t *testing.T) {
	for _, doc := range oddDocuments() {
		if !checkIndex(t, []byte(doc)) {
			t.Errorf("%q is refused", doc)
		}
	}
}

// The index must not pass because the library refuses everything.
func TestIndexPlaces(t *testing.T) {
	src := []byte("# é\n[open.web]\r\nports = [\r\n\t\"é\", 80] # x\r\n[[x]]\nfrom.y = { z = 'q' }\n[open]\n")
	if !checkIndex(t, src) {
		t.Fatal("the library refuses the document")
	}
	root, lines := scan(src, 0).root, newLines(src)
	got := func(at span) string {
		p := lines.at(at)
		return fmt.Sprintf("%d:%d+%d", p.line, p.column, p.width)
	}
	open, x := root.fields["open"], root.fields["x"]
	ports := open.fields["web"].fields["ports"]
	for _, test := range []struct{ what, got, want string }{
		{"open, named last by its own header", got(open.key), "7:2+4"},
		{"web", got(open.fields["web"].key), "2:7+3"},
		{"header", got(open.fields["web"].value), "2:1+10"},
		{"ports", got(ports.key), "3:1+5"},
		{"list", got(ports.value), "3:9+1"},
		{"first", got(ports.items[0].value), "4:2+3"},
		{"second", got(ports.items[1].value), "4:7+2"},
		{"x", got(x.key), "5:3+1"},
		{"dotted", got(x.items[0].fields["from"].fields["y"].key), "6:6+1"},
		{"inline", got(x.items[0].fields["from"].fields["y"].value), "6:10+11"},
		{"inner", got(x.items[0].fields["from"].fields["y"].fields["z"].value), "6:16+3"},
		{"end", got(span{int32(len(src)), int32(len(src))}), "8:1+1"},
	} {
		if test.got != test.want {
			t.Errorf("%s: got %s, want %s", test.what, test.got, test.want)
		}
	}
}

func TestTwice(t *testing.T) {
	s := scan([]byte("a = 1\n[b]\nc = 1\nc = 2\n[b]\n"), 0)
	if s.first.start != 10 || s.again.start != 16 {
		t.Errorf("got %v and %v", s.first, s.again)
	}
	for _, doc := range []string{"a = [1]\na.b = 2\n", "a = { b = 1 }\n[a.c]\n", "a = [{}]\n[[a]]\n", "a = 1\n[a]\n", "[[a.b]]\n[a]\nb.c = 1\n",
		"x = [{ a.b = 1, a = 2 }]\n", "[a.b]\n[[a]]\n", "[[a]]\n[a]\n", "[[a]]\n[b]\n[[a.c]]\n[a.c]\n"} {
		if scan([]byte(doc), 0).again == (span{}) {
			t.Errorf("%q: nothing is found", doc)
		}
	}
	if s := scan([]byte("a.b = 1\na.c = 1\n[[d]]\n[[d]]\n[e.f]\n[e]\n"), 0); s.again != (span{}) {
		t.Errorf("found a second definition at %v", s.again)
	}
}

// anyDocument draws documents out of pieces that are hard to tell apart.
func anyDocument(t *rapid.T) string {
	bare := rapid.StringMatching(`[a-c]`)
	key := rapid.OneOf(bare, bare, rapid.SampledFrom([]string{`"a.b"`, `'a b'`, `"\t"`, `"]"`, `'='`, `"#"`, `"é"`, `""`}))
	dotted := rapid.Custom(func(t *rapid.T) string {
		return strings.Join(rapid.SliceOfN(key, 1, 3).Draw(t, "key"), rapid.SampledFrom([]string{".", " . "}).Draw(t, "dot"))
	})
	blank := rapid.SampledFrom([]string{"", " ", "\n", "\r\n", " # ]}\n", "\t"})
	var value func(depth int) *rapid.Generator[string]
	value = func(depth int) *rapid.Generator[string] {
		scalar := rapid.SampledFrom([]string{
			"1", "-0.5", "true", `"x"`, `"\"]"`, `'\'`, `"""` + "\n[a]\n" + `"""`, `"""a""""`, "'''\n#'''", "2020-01-02", "2020-01-02 03:04:05", "07:08", "[]", "{}", `"é名"`,
		})
		if depth == 0 {
			return scalar
		}
		list := rapid.Custom(func(t *rapid.T) string {
			b := "["
			for range rapid.IntRange(1, 3).Draw(t, "elements") {
				b += blank.Draw(t, "blank") + value(depth-1).Draw(t, "element") + blank.Draw(t, "blank") + ","
			}
			return b + blank.Draw(t, "blank") + "]"
		})
		inline := rapid.Custom(func(t *rapid.T) string {
			b := "{"
			for range rapid.IntRange(1, 3).Draw(t, "pairs") {
				b += blank.Draw(t, "blank") + dotted.Draw(t, "key") + " =" + value(depth-1).Draw(t, "value") + blank.Draw(t, "blank") + ","
			}
			return b + blank.Draw(t, "blank") + "}"
		})
		return rapid.OneOf(scalar, list, inline)
	}
	line := rapid.Custom(func(t *rapid.T) string {
		end := rapid.SampledFrom([]string{"\n", "\r\n", " # [a]\n"}).Draw(t, "end")
		switch rapid.IntRange(0, 5).Draw(t, "line") {
		case 0:
			return "[" + dotted.Draw(t, "table") + "]" + end
		case 1:
			return "[[" + dotted.Draw(t, "tables") + "]]" + end
		default:
			return dotted.Draw(t, "key") + " = " + value(2).Draw(t, "value") + end
		}
	})
	return strings.Join(rapid.SliceOfN(line, 1, 5).Draw(t, "lines"), "")
}

func TestIndexProperty(t *testing.T) {
	accepted := 0
	rapid.Check(t, func(t *rapid.T) {
		if checkIndex(t, []byte(anyDocument(t))) {
			accepted++
		}
	})
	if accepted < 20 {
		t.Errorf("the library accepted only %d documents", accepted)
	}
}

func FuzzIndex(f *testing.F) {
	for _, doc := range oddDocuments() {
		f.Add([]byte(doc))
	}
	f.Fuzz(func(t *testing.T, src []byte) { checkIndex(t, src) })
}
