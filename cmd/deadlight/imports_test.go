package main

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"
	"testing"
	"testing/fstest"
)

// The shape of the tree is a promise: who may import what, where the kernel is
// written, where programs are started. It is held here, against the source of
// every file whatever its build tags.

// packageImports lists every directory that may hold Go files, with the packages
// of ours that it may import, and those that only its tests may.
func packageImports() map[string]struct{ code, tests []string } {
	return map[string]struct{ code, tests []string }{
		"cmd/deadlight": {code: []string{"cmd/deadlight/importer", "configs", "firewall", "rules", "systemd", "verify"}},
		// It reads files; its tests ask the kernel what the original admits.
		"cmd/deadlight/importer": {code: []string{"rules"}, tests: []string{"firewall", "verify"}},
		"cmd/deadlight/man":      {},
		"cmd/deadlight/schema":   {},
		// The tests build their hosts with verify.Isolate.
		"firewall": {code: []string{"rules"}, tests: []string{"verify"}},
		// Never firewall, not even in tests: the witness shares no code with the
		// accused.
		"verify": {code: []string{"rules"}},
		// Pure, and below everything: what it says must not depend on who asks.
		"rules":   {tests: []string{"rules"}},
		"configs": {tests: []string{"rules", "configs"}},
		"systemd": {tests: []string{"systemd"}},
	}
}

// importBan forbids an import, and what lies below it, to the code (not the
// tests) in some places.
type importBan struct {
	imports []string
	except  []string // files or directories that may have it
	in      []string // directories it is banned from; empty means everywhere
	reason  string
}

func importBans() []importBan {
	return []importBan{{
		imports: []string{"github.com/google/nftables"},
		except:  []string{"firewall", "verify/tripwire.go", "verify/oddwitness.go", "verify/divert.go"},
		reason:  "one package writes the host's rules; the tripwire and the diversion of answers have tables of their own",
	}, {
		imports: []string{"os/exec"},
		except:  []string{"verify/isolate.go", "verify/world.go", "verify/ssh.go", "cmd/deadlight/cleaner.go", "cmd/deadlight/edit.go"},
		reason:  "no program is started but ourselves in a throw-away world, the command of a try there, the ssh that takes us to a vantage, and what clears up behind a trial: ourselves, by systemd-run if need be; and the caller's own editor, without a shell",
	}, {
		imports: []string{"net", "net/http", "net/rpc", "net/textproto", "net/mail", "net/smtp", "os", "syscall", "math/rand",
			"crypto/rand", "golang.org/x/sys", "golang.org/x/net", "github.com/vishvananda", "github.com/mdlayher"},
		in:     []string{"rules"},
		reason: "rules is pure: the same bytes give the same ruleset on every machine at every time",
	}, {
		imports: []string{"os", "os/exec", "time", "net"},
		in:      []string{"configs", "systemd"},
		reason:  "they hold files, and do nothing",
	}, {
		imports: []string{"github.com/spf13/cobra", "github.com/spf13/pflag", "golang.org/x/term"},
		except:  []string{"cmd"},
		reason:  "words, flags and the terminal are the command's",
	}, {
		imports: []string{"net/http", "net/rpc"},
		reason:  "nothing of ours listens",
	}, {
		imports: []string{"C", "plugin"},
		reason:  "a static binary, CGO_ENABLED=0, runs on every distribution",
	}, {
		imports: []string{"testing"},
		reason:  "it adds its flags to the program",
	}}
}

// useBan forbids names of a package that may be imported.
type useBan struct {
	names  []string
	except string // the file that may use them
	in     string // the directory they are banned from; empty means everywhere
	reason string
}

func useBans() []useBan {
	return []useBan{{
		names:  []string{"os.Exit", "syscall.Exit", "log.Fatal", "log.Fatalf", "log.Fatalln"},
		except: "cmd/deadlight/main.go",
		reason: "run in main.go is the only way out, so that what was opened is closed",
	}, {
		// time itself is the type of a date in a policy.
		names: []string{"time.Now", "time.Since", "time.Until", "time.Sleep", "time.After", "time.AfterFunc", "time.Tick",
			"time.NewTimer", "time.NewTicker", "time.Local", "time.LoadLocation"},
		in:     "rules",
		reason: "rules is pure: it has no clock",
	}}
}

// topLevel is all that may stand at the top of the tree: something new finds its
// place in one of these.
func topLevel() []string {
	return []string{"cmd", "firewall", "rules", "verify", "configs", "systemd", ".ci",
		"go.mod", "go.sum", "README.md", "LICENSE", "CHANGELOG.md", ".gitignore"}
}

// TestTree holds the whole tree against the rules above.
func TestTree(t *testing.T) {
	root := os.DirFS("../..")
	if _, err := fs.Stat(root, "go.mod"); err != nil {
		t.Fatal(err)
	}
	for _, p := range treeProblems(root) {
		t.Error(p)
	}
}

// TestTreeProblems shows that every rule can be broken.
func TestTreeProblems(t *testing.T) {
	tests := map[string]struct {
		file, source string
		want         string // in the one problem; "" for none
	}{
		"command may":             {"cmd/deadlight/a.go", `import ("deadlight/rules"; "deadlight/firewall"; "deadlight/verify"; "deadlight/configs"; "github.com/spf13/cobra")`, ""},
		"firewall may":            {"firewall/a.go", `import ("deadlight/rules"; "github.com/google/nftables/expr")`, ""},
		"firewall verify":         {"firewall/a.go", `import "deadlight/verify"`, "firewall may not import deadlight/verify"},
		"firewall test verify":    {"firewall/a_test.go", `import "deadlight/verify"`, ""},
		"verify firewall":         {"verify/a.go", `import "deadlight/firewall"`, "verify may not import deadlight/firewall"},
		"verify test firewall":    {"verify/a_test.go", `import "deadlight/firewall"`, "verify may not import deadlight/firewall"},
		"rules ours":              {"rules/a.go", `import "deadlight/verify"`, "rules may not import deadlight/verify"},
		"rules by another name":   {"rules/a.go", `import . "deadlight/configs"`, "rules may not import deadlight/configs"},
		"rules for side effects":  {"rules/a_other.go", `import _ "deadlight/configs"`, "rules may not import deadlight/configs"},
		"configs ours":            {"configs/a.go", `import "deadlight/rules"`, "configs may not import deadlight/rules"},
		"configs test":            {"configs/a_test.go", `import "deadlight/rules"`, ""},
		"nftables":                {"verify/probe.go", `import "github.com/google/nftables"`, "one package writes the host's rules"},
		"nftables below":          {"cmd/deadlight/a.go", `import "github.com/google/nftables/binaryutil"`, "one package writes the host's rules"},
		"nftables in tripwire":    {"verify/tripwire.go", `import "github.com/google/nftables"`, ""},
		"nftables, its neighbour": {"verify/a.go", `import "github.com/google/nftablesque"`, ""},
		"exec":                    {"firewall/a.go", `import "os/exec"`, "no program is started"},
		"exec in a test":          {"firewall/a_test.go", `import "os/exec"`, ""},
		"rules os":                {"rules/a.go", `import "os"`, "rules is pure"},
		"rules net":               {"rules/a.go", `import "net"`, "rules is pure"},
		"rules netip":             {"rules/a.go", `import "net/netip"`, ""},
		"rules date":              {"rules/a.go", `import "time"; type t = time.Time`, ""},
		"rules clock":             {"rules/a.go", `import "time"; func f() time.Time { return time.Now() }`, "it has no clock"},
		"clock elsewhere":         {"verify/a.go", `import "time"; func f() time.Time { return time.Now() }`, ""},
		"rules behind a tag":      {"rules/a_windows.go", "import \"golang.org/x/sys/windows\"", "rules is pure"},
		"cobra":                   {"firewall/a.go", `import "github.com/spf13/cobra"`, "words, flags and the terminal"},
		"http":                    {"cmd/deadlight/a.go", `import "net/http"`, "nothing of ours listens"},
		"cgo":                     {"verify/a.go", `import "C"`, "a static binary"},
		"init":                    {"rules/a.go", `func init() {}`, "no init"},
		"method init":             {"rules/a.go", `type t int; func (t) init() {}`, ""},
		"exit":                    {"verify/a.go", `import "os"; func f() { os.Exit(1) }`, "os.Exit"},
		"exit in main.go":         {"cmd/deadlight/main.go", `import "os"; func main() { os.Exit(1) }`, ""},
		"mutable counter":         {"verify/a.go", `var n int`, "package variable n"},
		"mutable map":             {"verify/a.go", `var m = map[string]int{}`, "package variable m"},
		"mutable slice":           {"verify/a.go", `var s = []int{1}`, "package variable s"},
		"pointer":                 {"verify/a.go", `var p = &x{}; type x struct{}`, "package variable p"},
		"table":                   {"verify/a.go", `var a = [...]string{"x"}`, ""},
		"table written":           {"verify/a.go", `var a = [...]string{"x"}; func f() { a[0] = "y" }`, "package variable a"},
		"table lent":              {"verify/a.go", `var a = [...]string{"x"}; func f() *string { return &a[0] }`, "package variable a"},
		"table sliced":            {"verify/a.go", `var a = [...]string{"x"}; func f() []string { return a[:] }`, "package variable a"},
		"sentinel":                {"firewall/a.go", `import "errors"; var ErrX = errors.New("x")`, ""},
		"sentinel replaced":       {"firewall/a.go", `import "errors"; var ErrX = errors.New("x"); func f() { ErrX = nil }`, "package variable ErrX"},
		"prefix":                  {"rules/a.go", `import "net/netip"; var (p = netip.MustParsePrefix("::/0"); a = netip.MustParseAddr("::"))`, ""},
		"pattern":                 {"rules/a.go", `import "regexp"; var p = regexp.MustCompile("a")`, ""},
		"embedded":                {"configs/a.go", `import "embed"; var f embed.FS`, ""},
		"schema":                  {"rules/a.go", `type schema[T any] struct{}; var s = schema[int]{}`, ""},
		"key":                     {"rules/a.go", `type key[T any] struct{}; var k = key[int]{}`, ""},
		"schemas joined":          {"rules/a.go", `import "slices"; type schema[T any] []T; var aSchema = schema[int]{}; var b = slices.Concat(aSchema, schema[int]{})`, ""},
		"something joined":        {"rules/a.go", `import "slices"; var b = slices.Concat([]int{1})`, "package variable b"},
		"from the linker":         {"cmd/deadlight/a.go", "//deadlight:linker\nvar s string", ""},
		"from nobody":             {"cmd/deadlight/a.go", "var s string", "package variable s"},
		"embedded text":           {"rules/a.go", "import _ \"embed\"\n//go:embed a.txt\nvar s string", ""},
		"text":                    {"rules/a.go", `var s string`, "package variable s"},
		"struct":                  {"rules/a.go", `type x struct{}; var s = x{}`, "package variable s"},
		"assertion":               {"verify/a.go", `var _ error = (*x)(nil); type x struct{}; func (*x) Error() string { return "" }`, ""},
		"variable of a test":      {"verify/a_test.go", `var n int`, ""},
		"new package":             {"rules/deep/a.go", ``, "rules/deep may not hold Go files"},
		"new top":                 {"internal/a.go", ``, "internal may not stand at the top"},
		"new top file":            {"NOTES.md", ``, "NOTES.md may not stand at the top"},
		"product at the top":      {"deadlight", ``, ""},
		"editor's own":            {".idea/a.xml", ``, ""},
		"test data":               {"rules/testdata/a.go", `import "os/exec"`, ""},
		"no Go at all":            {"rules/a.go", `import 1`, "rules/a.go"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			source := tt.source
			if strings.HasSuffix(tt.file, ".go") {
				source = "package p\n" + source
			}
			got := treeProblems(fstest.MapFS{
				".gitignore": {Data: []byte("/deadlight\n*.test\n")},
				tt.file:      {Data: []byte(source)},
			})
			switch {
			case tt.want == "" && len(got) > 0:
				t.Errorf("problems: %q", got)
			case tt.want != "" && (len(got) == 0 || !strings.Contains(strings.Join(got, "\n"), tt.want)):
				t.Errorf("problems: %q, want one with %q", got, tt.want)
			}
		})
	}
}

// treeProblems says what in a source tree breaks the rules of this file.
func treeProblems(root fs.FS) []string {
	var out []string
	complain := func(format string, args ...any) { out = append(out, fmt.Sprintf(format, args...)) }
	for _, name := range strangers(root) {
		complain("%s may not stand at the top of the tree: it has a place in %s", name, strings.Join(topLevel(), ", "))
	}
	dirs := map[string][]string{}
	err := fs.WalkDir(root, ".", func(p string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir() && (d.Name() == "testdata" || p != "." && strings.HasPrefix(d.Name(), ".")):
			return fs.SkipDir
		case !d.IsDir() && path.Ext(p) == ".go":
			dirs[path.Dir(p)] = append(dirs[path.Dir(p)], p)
		}
		return nil
	})
	if err != nil {
		complain("%v", err)
	}
	for dir, names := range dirs {
		fset := token.NewFileSet()
		files := map[string]*ast.File{}
		for _, name := range names {
			src, err := fs.ReadFile(root, name)
			if err != nil {
				complain("%v", err)
				continue
			}
			f, err := parser.ParseFile(fset, name, src, parser.ParseComments|parser.SkipObjectResolution)
			if err != nil {
				complain("%v", err)
				continue
			}
			files[name] = f
			out = append(out, importProblems(dir, name, f)...)
		}
		out = append(out, stateProblems(fset, files)...)
	}
	slices.Sort(out)
	return out
}

// strangers are the entries at the top that do not belong. What git ignores, and
// hidden entries of editors and the like, are the user's own.
func strangers(root fs.FS) []string {
	entries, err := fs.ReadDir(root, ".")
	if err != nil {
		return []string{err.Error()}
	}
	ignore, _ := fs.ReadFile(root, ".gitignore")
	var out []string
	for _, e := range entries {
		name := e.Name()
		ignored := slices.ContainsFunc(strings.Fields(string(ignore)), func(pattern string) bool {
			ok, _ := path.Match(strings.Trim(pattern, "/"), name)
			return ok
		})
		if !ignored && !strings.HasPrefix(name, ".") && !slices.Contains(topLevel(), name) {
			out = append(out, name)
		}
	}
	return out
}

func importProblems(dir, name string, f *ast.File) []string {
	var out []string
	isTest := strings.HasSuffix(name, "_test.go")
	allowed, known := packageImports()[dir]
	if !known {
		out = append(out, dir+" may not hold Go files: the packages of the tree are few and fixed")
	}
	if isTest {
		allowed.code = append(allowed.code, allowed.tests...)
	}
	for _, spec := range f.Imports {
		imported, _ := strconv.Unquote(spec.Path.Value) // the parser has checked it
		if ours, ok := strings.CutPrefix(imported, "deadlight/"); ok && !slices.Contains(allowed.code, ours) {
			out = append(out, fmt.Sprintf("%s: %s may not import %s: imports run cmd → {rules, firewall, verify, configs, systemd}, firewall → rules, verify → rules",
				name, dir, imported))
		}
		if isTest {
			continue
		}
		for _, b := range importBans() {
			if b.forbids(name, imported) {
				out = append(out, fmt.Sprintf("%s: import of %s: %s", name, imported, b.reason))
			}
		}
	}
	return out
}

func (b importBan) forbids(file, imported string) bool {
	below := func(what string, of []string) bool {
		return slices.ContainsFunc(of, func(top string) bool { return what == top || strings.HasPrefix(what, top+"/") })
	}
	// Of the standard library only the very package is meant: net, not net/netip.
	banned := slices.Contains(b.imports, imported) || strings.Contains(imported, ".") && below(imported, b.imports)
	return banned && (len(b.in) == 0 || below(file, b.in)) && !below(file, b.except)
}

// stateProblems finds state that outlives a call, in the files of one package:
// init functions and package variables that are not as good as constants; and
// uses of what is banned.
func stateProblems(fset *token.FileSet, files map[string]*ast.File) []string {
	var out []string
	complain := func(n ast.Node, format string, args ...any) {
		out = append(out, fmt.Sprintf("%s: ", fset.Position(n.Pos()))+fmt.Sprintf(format, args...))
	}
	constants := map[string]bool{} // package variables that hold if nobody writes them
	for name, f := range files {
		if strings.HasSuffix(name, "_test.go") {
			continue
		}
		for _, d := range f.Decls {
			switch d := d.(type) {
			case *ast.FuncDecl:
				if d.Recv == nil && d.Name.Name == "init" {
					complain(d, "no init functions: what runs is called by somebody")
				}
			case *ast.GenDecl:
				if d.Tok != token.VAR {
					continue
				}
				for _, s := range d.Specs {
					s := s.(*ast.ValueSpec)
					for i, n := range s.Names {
						switch {
						case n.Name == "_":
						case isConstant(d, s, i):
							constants[n.Name] = true
						default:
							complain(n, "package variable %s: no globals; a function may return a fresh value, an array may hold a table", n.Name)
						}
					}
				}
			}
		}
	}
	for name, f := range files {
		if strings.HasSuffix(name, "_test.go") {
			continue
		}
		written := func(e ast.Expr, how string) {
			if n := root(e); n != nil && constants[n.Name] {
				complain(n, "package variable %s is %s: it must stay as good as a constant", n.Name, how)
			}
		}
		ast.Inspect(f, func(n ast.Node) bool {
			switch n := n.(type) {
			case *ast.AssignStmt:
				if n.Tok != token.DEFINE {
					for _, e := range n.Lhs {
						written(e, "written")
					}
				}
			case *ast.IncDecStmt:
				written(n.X, "written")
			case *ast.UnaryExpr:
				if n.Op == token.AND {
					written(n.X, "lent by address")
				}
			case *ast.SliceExpr:
				written(n.X, "lent as a slice")
			case *ast.SelectorExpr:
				for _, b := range useBans() {
					if i := slices.IndexFunc(b.names, func(banned string) bool { return isSelector(n, banned) }); i >= 0 &&
						name != b.except && (b.in == "" || path.Dir(name) == b.in) {
						complain(n, "%s: %s", b.names[i], b.reason)
					}
				}
			}
			return true
		})
	}
	return out
}

// isConstant reports whether variable i of a declaration is as good as a
// constant, as long as nobody writes it.
func isConstant(d *ast.GenDecl, s *ast.ValueSpec, i int) bool {
	if len(s.Values) == 0 {
		return isSelector(s.Type, "embed.FS") || isDirected(d, "go:embed ") || isDirected(d, "deadlight:linker") // only the compiler or the linker fills it
	}
	if len(s.Values) != len(s.Names) {
		return false
	}
	switch v := s.Values[i].(type) {
	case *ast.CallExpr:
		if isSelector(v.Fun, "slices.Concat") { // of tables of keys
			return !slices.ContainsFunc(v.Args, func(e ast.Expr) bool { return !isKeys(e) })
		}
		return slices.ContainsFunc([]string{"errors.New", "netip.MustParsePrefix", "netip.MustParseAddr", "regexp.MustCompile"},
			func(name string) bool { return isSelector(v.Fun, name) })
	case *ast.CompositeLit:
		switch t := v.Type.(type) {
		case *ast.ArrayType:
			return t.Len != nil // an array; a slice would be shared
		case *ast.IndexExpr:
			return isKeys(v)
		}
	}
	return false
}

// isKeys reports whether an expression is a key of the policy language or a
// table of them, in rules: names with functions.
func isKeys(e ast.Expr) bool {
	switch x := e.(type) {
	case *ast.Ident:
		return strings.HasSuffix(x.Name, "Schema")
	case *ast.CompositeLit:
		if t, ok := x.Type.(*ast.IndexExpr); ok {
			n, ok := t.X.(*ast.Ident)
			return ok && (n.Name == "schema" || n.Name == "key")
		}
	}
	return false
}

// isDirected reports whether a comment for a tool stands above a declaration.
func isDirected(d *ast.GenDecl, directive string) bool {
	return d.Doc != nil && slices.ContainsFunc(d.Doc.List, func(c *ast.Comment) bool { return strings.HasPrefix(c.Text, "//"+directive) })
}

func isSelector(e ast.Expr, want string) bool {
	s, ok := e.(*ast.SelectorExpr)
	if !ok {
		return false
	}
	x, ok := s.X.(*ast.Ident)
	return ok && x.Name+"."+s.Sel.Name == want
}

// root is the variable that an expression like a.b[c] begins with.
func root(e ast.Expr) *ast.Ident {
	for {
		switch x := e.(type) {
		case *ast.Ident:
			return x
		case *ast.SelectorExpr:
			e = x.X
		case *ast.IndexExpr:
			e = x.X
		case *ast.ParenExpr:
			e = x.X
		case *ast.StarExpr:
			e = x.X
		default:
			return nil
		}
	}
}
