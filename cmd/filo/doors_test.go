package main

import (
	"go/ast"
	"go/build/constraint"
	"go/parser"
	"go/token"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// floors is the house: one number a room. A room imports rooms on lower floors only.
var floors = map[string]int{
	"cmd/filo":                 5,
	"cmd/filo/progress":        4,
	"builder":                  3,
	"builder/export":           3,
	"cache/remote":             3,
	"builder/image":            2,
	"cache":                    2,
	"builder/attest":           1,
	"cache/mounts":             2,
	"builder/sbom":             1,
	"builder/source":           1,
	"layer":                    1,
	"builder/sandbox":          0,
	"builder/sandbox/nofile":   -1,
	"builder/sandbox/seccomp":  0,
	"layer/registry":           0,
	"layer/registry/reference": -1,
	"layer/rootfs":             0,
	"dockerfile":               0,
}

// powers are what can hurt, and the rooms that may use it: an import path, or a package's name and a selector.
var powers = map[string][]string{
	"syscall":               {"layer", "layer/rootfs", "builder/sandbox"},
	"golang.org/x/sys/unix": {"layer", "layer/rootfs", "builder/sandbox", "builder/sandbox/seccomp"},
	"os/exec":               {"builder/sandbox", "builder/source"},
	"os/signal":             {"cmd/filo"},
	"net/http":              {"layer/registry", "builder/source"},
	"unsafe":                {"builder/sandbox", "layer"}, // layer: a mapped index as a string
	"os.Getenv":             {"cmd/filo"},
	"os.LookupEnv":          {"cmd/filo"},
	"os.Environ":            {"cmd/filo"},
	"os.ExpandEnv":          {"cmd/filo"},
	"os.Args":               {"cmd/filo"},
	"os.Stdin":              {"cmd/filo"},
	"os.Stdout":             {"cmd/filo"},
	"os.Stderr":             {"cmd/filo"},
	"os.Exit":               {"cmd/filo"},
	"time.Now":              {"cmd/filo"},
	"time.Since":            {"cmd/filo"},
	"time.Until":            {"cmd/filo"},
	"fmt.Print":             {},
	"fmt.Println":           {},
	"fmt.Printf":            {},
	"os.Chdir":              {},
	"os.Setenv":             {},
}

// again are the powers of a program that starts itself again.
var again = []string{"os/signal", "os.Args", "os.Environ", "os.Stdin", "os.Stdout", "os.Stderr", "os.Exit"}

// exceptions are files that use powers of other rooms.
var exceptions = map[string][]string{
	"builder/sandbox/enter.go": again,         // enters a user namespace and ends as the program in there does
	"builder/sandbox/init.go":  again,         // is the program that was started
	"builder/sandbox/idmap.go": {"os.Getenv"}, // finds newuidmap on the PATH
	"layer/prune.go":           {"time.Now"},  // asks how old things are
}

// goFiles are the files that start goroutines; each one has an owner there that waits for it.
var goFiles = map[string]bool{
	"cmd/filo/main.go":          true, // waits for a signal, until run returns
	"cmd/filo/stdin.go":         true, // reads standard input, until it ends, nobody wants more, or the process ends
	"cmd/filo/terminal.go":      true, // redraws, until the display is closed
	"cmd/filo/ssh.go":           true, // answers an ssh client, until it hangs up
	"builder/sandbox/enter.go":  true, // passes signals on, until the process ends
	"builder/sandbox/output.go": true, // reads a process's output, until Run has seen its end
	"layer/compress.go":         true, // reads ahead, until Close
	"layer/estargz.go":          true, // compresses, until Close
}

// room is a package directory with its non-test files.
type room struct {
	dir   string
	files map[string]*ast.File
	fset  *token.FileSet
}

// rooms parses the whole repository.
func rooms(t *testing.T) []*room {
	t.Helper()
	top := filepath.Join("..", "..")
	found := map[string]*room{}
	err := filepath.WalkDir(top, func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, _ := filepath.Rel(top, name)
		if d.IsDir() && rel != "." && (strings.HasPrefix(d.Name(), ".") || d.Name() == "testdata") {
			return filepath.SkipDir
		}
		if d.IsDir() || !strings.HasSuffix(rel, ".go") || strings.HasSuffix(rel, "_test.go") {
			return nil
		}
		dir := path.Dir(filepath.ToSlash(rel))
		r := found[dir]
		if r == nil {
			r = &room{dir: dir, files: map[string]*ast.File{}, fset: token.NewFileSet()}
			found[dir] = r
		}
		r.files[rel], err = parser.ParseFile(r.fset, name, nil, parser.ParseComments|parser.SkipObjectResolution)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	var out []*room
	for _, dir := range slices.Sorted(maps.Keys(found)) {
		out = append(out, found[dir])
	}
	return out
}

func TestTopLevel(t *testing.T) {
	want := []string{"builder", "cache", "cmd", "dockerfile", "layer", "testdata"}
	entries, err := os.ReadDir(filepath.Join("..", ".."))
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, e := range entries {
		if e.IsDir() && !strings.HasPrefix(e.Name(), ".") && e.Name() != "bin" {
			got = append(got, e.Name())
		}
	}
	if !slices.Equal(got, want) {
		t.Errorf("directories at the top: %v, want %v", got, want)
	}
}

func TestFloors(t *testing.T) {
	for _, r := range rooms(t) {
		if r.dir == "." {
			continue
		}
		floor, ok := floors[r.dir]
		if !ok {
			t.Errorf("%s has no floor", r.dir)
			continue
		}
		for name, f := range r.files {
			for _, imp := range f.Imports {
				p, _ := strconv.Unquote(imp.Path.Value)
				other, ours := strings.CutPrefix(p, "filo/")
				if ours && floors[other] >= floor {
					t.Errorf("%s: a room on floor %d imports %s on floor %d", name, floor, other, floors[other])
				}
				if imp.Name != nil && imp.Name.Name != "_" && ours {
					t.Errorf("%s: renames %s", name, p)
				}
			}
		}
	}
}

func TestPowers(t *testing.T) {
	for _, r := range rooms(t) {
		for name, f := range r.files {
			if r.dir == "." { // keeps libraries in go.mod, does nothing
				continue
			}
			for _, power := range powersUsed(f) {
				holders, dangerous := powers[power]
				if dangerous && !slices.Contains(holders, r.dir) && !slices.Contains(exceptions[name], power) {
					t.Errorf("%s: uses %s, which is for %v", name, power, holders)
				}
			}
		}
	}
}

// harmless are the names of errors and signals, which are no power.
var harmless = regexp.MustCompile(`^syscall\.(E[A-Z0-9]+|SIG[A-Z0-9]+|Errno|Signal)$`)

// powersUsed returns the imports of f and the selectors on them, like os.Exit. Package syscall counts as soon as more
// than names is used.
func powersUsed(f *ast.File) []string {
	var used []string
	names := map[string]string{} // local name to path
	for _, imp := range f.Imports {
		p, _ := strconv.Unquote(imp.Path.Value)
		if p != "syscall" {
			used = append(used, p)
		}
		name := path.Base(p)
		if imp.Name != nil {
			name = imp.Name.Name
		}
		names[name] = p
	}
	ast.Inspect(f, func(n ast.Node) bool {
		if s, ok := n.(*ast.SelectorExpr); ok {
			if x, ok := s.X.(*ast.Ident); ok && names[x.Name] != "" {
				power := names[x.Name] + "." + s.Sel.Name
				used = append(used, power)
				if names[x.Name] == "syscall" && !harmless.MatchString(power) {
					used = append(used, "syscall")
				}
			}
		}
		return true
	})
	return used
}

func TestGoroutines(t *testing.T) {
	seen := map[string]bool{}
	for _, r := range rooms(t) {
		for name, f := range r.files {
			ast.Inspect(f, func(n ast.Node) bool {
				if g, ok := n.(*ast.GoStmt); ok {
					seen[name] = true
					if !goFiles[name] {
						t.Errorf("%v: go statement in a file that is not named in goFiles", r.fset.Position(g.Pos()))
					}
				}
				return true
			})
		}
	}
	for name := range goFiles {
		if !seen[name] {
			t.Errorf("goFiles names %s, which has no go statement", name)
		}
	}
}

var startAt = regexp.MustCompile(`Start at \[([\w.]+)\]`)

func TestPackageDocs(t *testing.T) {
	for _, r := range rooms(t) {
		if r.dir == "." {
			continue
		}
		var docs []string
		for name, f := range r.files {
			if f.Doc != nil && !onlyDirectives(f.Doc) {
				docs = append(docs, name)
				checkDoc(t, r, name, f.Doc.Text())
			}
		}
		if len(docs) != 1 {
			t.Errorf("%s: package comments in %v, want one", r.dir, docs)
		}
	}
}

func onlyDirectives(g *ast.CommentGroup) bool {
	return !slices.ContainsFunc(g.List, func(c *ast.Comment) bool { return !constraint.IsGoBuild(c.Text) })
}

// checkDoc sees that a package comment is short and that where it says to start is declared.
func checkDoc(t *testing.T, r *room, file, doc string) {
	want := path.Base(r.dir) + ".go"
	if r.dir == "cmd/filo" {
		want = "main.go"
	}
	if path.Base(file) != want {
		t.Errorf("%s: package comment in %s, want it in %s", r.dir, path.Base(file), want)
	}
	if n := strings.Count(doc, "\n"); n > 25 {
		t.Errorf("%s: package comment has %d lines, at most 25", r.dir, n)
	}
	m := startAt.FindStringSubmatch(doc)
	if m == nil {
		t.Errorf("%s: package comment does not say where to start", r.dir)
		return
	}
	if !declares(r, m[1]) {
		t.Errorf("%s: package comment says to start at %s, which is not declared", r.dir, m[1])
	}
}

// declares reports whether a room has a function, type, or method (Type.Method) of that name.
func declares(r *room, name string) bool {
	typ, method, isMethod := strings.Cut(name, ".")
	for _, f := range r.files {
		for _, d := range f.Decls {
			switch d := d.(type) {
			case *ast.FuncDecl:
				if isMethod && d.Recv != nil && d.Name.Name == method && receiver(d) == typ {
					return true
				}
				if !isMethod && d.Recv == nil && d.Name.Name == name {
					return true
				}
			case *ast.GenDecl:
				for _, s := range d.Specs {
					if ts, ok := s.(*ast.TypeSpec); ok && !isMethod && ts.Name.Name == name {
						return true
					}
				}
			}
		}
	}
	return false
}

func receiver(d *ast.FuncDecl) string {
	t := d.Recv.List[0].Type
	if p, ok := t.(*ast.StarExpr); ok {
		t = p.X
	}
	if g, ok := t.(*ast.IndexExpr); ok {
		t = g.X
	}
	if id, ok := t.(*ast.Ident); ok {
		return id.Name
	}
	return ""
}

// TestExportedDocs sees that every exported name has a comment that begins with it.
func TestExportedDocs(t *testing.T) {
	for _, r := range rooms(t) {
		for _, f := range r.files {
			for _, d := range f.Decls {
				fn, ok := d.(*ast.FuncDecl)
				if !ok || !fn.Name.IsExported() || fn.Recv != nil && !ast.IsExported(receiver(fn)) || wellKnown[fn.Name.Name] {
					continue
				}
				if !strings.HasPrefix(fn.Doc.Text(), fn.Name.Name+" ") {
					t.Errorf("%v: %s has no comment that begins with its name", r.fset.Position(fn.Pos()), fn.Name.Name)
				}
			}
		}
	}
}

// wellKnown are methods whose contract the standard library has.
var wellKnown = map[string]bool{"Error": true, "String": true, "Unwrap": true, "Is": true, "Len": true, "Less": true, "Swap": true}

// TestDoorsNotice feeds the checks what they must find.
func TestDoorsNotice(t *testing.T) {
	src := "// Package x. Start at [Y].\npackage x\nimport (\n\"os\"\n\"os/exec\"\n\"syscall\"\n)\ntype Y struct{}\nfunc (y *Y) Z() { os.Exit(syscall.SIGHUP); exec.Command(\"x\"); _ = syscall.ENOENT; syscall.Mount() }\n"
	fset := token.NewFileSet()
	f, err := parser.ParseFile(fset, "x.go", src, parser.ParseComments)
	if err != nil {
		t.Fatal(err)
	}
	used := powersUsed(f)
	for _, want := range []string{"os/exec", "os.Exit", "syscall"} {
		if !slices.Contains(used, want) {
			t.Errorf("powersUsed = %v, lacks %s", used, want)
		}
	}
	r := &room{dir: "x", files: map[string]*ast.File{"x.go": f}, fset: fset}
	if !declares(r, "Y") || !declares(r, "Y.Z") || declares(r, "Z") {
		t.Error("declares does not find what is declared")
	}
}
