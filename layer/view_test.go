package layer

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"slices"
	"strings"
	"testing"
	"testing/fstest"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

// file is a Regular entry with its content.
type file struct {
	Entry
	content string
}

func reg(p, content string) file {
	return file{Entry{Path: p, Type: Regular, Mode: 0o644, Size: int64(len(content))}, content}
}

func dir(p string, mode uint32) file { return file{Entry: Entry{Path: p, Type: Dir, Mode: mode}} }

func link(p, target string) file {
	return file{Entry: Entry{Path: p, Type: Symlink, Mode: 0o777, Link: target}}
}

func hard(p, old string) file {
	return file{Entry: Entry{Path: p, Type: Hardlink, Mode: 0o644, Link: old}}
}

func gone(p string) file { return file{Entry: Entry{Path: p, Type: Whiteout}} }

func opaque(p string) file { return file{Entry: Entry{Path: p, Type: Opaque}} }

// putLayer stores a layer with a tree by way of the Writer.
func putLayer(t testing.TB, s *Store, files ...file) Layer {
	t.Helper()
	w, err := s.Create(t.Context(), Sinks{Tree: true})
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		var content io.Reader
		if f.Type == Regular {
			content = strings.NewReader(f.content)
		}
		if err := w.Add(f.Entry, content); err != nil {
			t.Fatalf("Add(%s): %v", f.Path, err)
		}
	}
	l, err := w.Close()
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// putIndexOnly stores entries that Writer refuses (implied directories, opaque markers) and
// the big ones of benchmarks, as unpacking a foreign blob would.
func putIndexOnly(t testing.TB, s *Store, name string, entries ...Entry) Layer {
	t.Helper()
	l := Layer{DiffID: digest.FromString(name)}
	var b indexBuilder
	for _, e := range entries {
		if err := b.add(e); err != nil {
			t.Fatalf("add %s: %v", e.Path, err)
		}
	}
	if err := s.putIndex(l, b.finish()); err != nil {
		t.Fatal(err)
	}
	return l
}

func indexOf(t testing.TB, s *Store, files ...file) Layer {
	t.Helper()
	var list []Entry
	for _, f := range files {
		if f.Type == Regular {
			f.Digest = digest.FromString(f.content)
		}
		list = append(list, f.Entry)
	}
	return putIndexOnly(t, s, fmt.Sprint(files), list...)
}

func viewOf(t testing.TB, s *Store, layers ...Layer) *View {
	t.Helper()
	v, err := s.View(t.Context(), layers)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

// list renders all that shows in a view, one line a file.
func list(t testing.TB, v *View) []string {
	t.Helper()
	var lines []string
	err := fs.WalkDir(v, ".", func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		e, ok := v.Entry(p)
		if !ok || e.Path != p {
			return fmt.Errorf("Entry(%s): %v %v", p, e, ok)
		}
		if in := info.Sys().(*Entry); fmt.Sprint(*in) != fmt.Sprint(*e) && p != "." {
			return fmt.Errorf("%s is %v in its directory, %v alone", p, *in, *e)
		}
		lines = append(lines, fmt.Sprintf("%c %o %s", e.Type, e.Mode, p))
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return lines
}

func TestViewMerges(t *testing.T) {
	s := newStore(t)
	base := indexOf(t, s,
		dir("a", 0o700), reg("a/x", "x"), reg("a/y", "y"),
		dir("b", 0o711), dir("b/sub", 0o755), reg("b/sub/f", "f"),
		dir("c", 0o755), reg("c/1", "1"), reg("c/2", "2"),
		reg("d", "file"), dir("e", 0o755), reg("e/in", "e"),
		dir("f", 0o1777), dir("f/g", 0o750), reg("f/g/h", "h"), dir("f.d", 0o755))
	for _, c := range []struct {
		name   string
		layers []Layer
		want   string
	}{
		{"base", []Layer{base}, `d 755 .
d 700 a
- 644 a/x
- 644 a/y
d 711 b
d 755 b/sub
- 644 b/sub/f
d 755 c
- 644 c/1
- 644 c/2
- 644 d
d 755 e
- 644 e/in
d 1777 f
d 750 f/g
- 644 f/g/h
d 755 f.d`},
		{"changes", []Layer{base, indexOf(t, s,
			gone("a/x"), dir("b", 0o755), link("b/sub", "/a"), dir("c", 0o755), opaque("c"),
			reg("c/3", "3"), dir("d", 0o755), gone("e"), reg("f/g/new", "n"))}, `d 755 .
d 700 a
- 644 a/y
d 755 b
l 777 b/sub
d 755 c
- 644 c/3
d 755 d
d 1777 f
d 750 f/g
- 644 f/g/h
- 644 f/g/new
d 755 f.d`},
		{"deleted and made again", []Layer{base, indexOf(t, s, gone("a"), gone("f")),
			indexOf(t, s, reg("a/z", "z"), dir("f", 0o700))}, `d 755 .
d 755 a
- 644 a/z
d 711 b
d 755 b/sub
- 644 b/sub/f
d 755 c
- 644 c/1
- 644 c/2
- 644 d
d 755 e
- 644 e/in
d 700 f
d 755 f.d`},
		{"opaque root, implied over a file", []Layer{base, indexOf(t, s, opaque("."), reg("k", "k")),
			indexOf(t, s, reg("k/l/m", "m"))}, `d 755 .
d 755 k
d 755 k/l
- 644 k/l/m`},
	} {
		if got := strings.Join(list(t, viewOf(t, s, c.layers...)), "\n"); got != c.want {
			t.Errorf("%s:\n%s\nwant:\n%s", c.name, got, c.want)
		}
	}
}

func TestViewRoot(t *testing.T) {
	s := newStore(t)
	e, ok := viewOf(t, s).Entry(".")
	if !ok || e.Type != Dir || e.Mode != 0o755 {
		t.Errorf("root of no layers: %v %v", e, ok)
	}
	l := indexOf(t, s, dir(".", 0o700), dir("a", 0o755))
	if e, _ := viewOf(t, s, l, indexOf(t, s, reg("a/b", ""))).Entry("."); e.Mode != 0o700 {
		t.Errorf("mode of root: %o, want 700", e.Mode)
	}
}

func TestViewHardLinks(t *testing.T) {
	s := newStore(t)
	base := indexOf(t, s, reg("a", "one"), hard("b", "a"), reg("c", "one"))
	v := viewOf(t, s, base)
	e, ok := v.Entry("b")
	if !ok || e.Type != Regular || e.Link != "" || e.Path != "b" || e.Size != 3 || e.Digest != digest.FromString("one") {
		t.Errorf("Entry(b): %+v", e)
	}
	if v.Inode("a") != v.Inode("b") || v.Inode("a") == v.Inode("c") || v.Inode("none") != "" {
		t.Errorf("Inode: a %q b %q c %q", v.Inode("a"), v.Inode("b"), v.Inode("c"))
	}
	// The name it was first known by is gone; the file is not.
	v = viewOf(t, s, base, indexOf(t, s, gone("a")))
	if e, ok := v.Entry("b"); !ok || e.Size != 3 {
		t.Errorf("Entry(b) without a: %+v %v", e, ok)
	}
}

func TestViewResolve(t *testing.T) {
	s := newStore(t)
	v := viewOf(t, s, indexOf(t, s,
		dir("a", 0o755), link("a/up", "../b"), link("abs", "/a/up/"), dir("b", 0o755), link("b/end", "file"),
		link("dangling", "b/none"), link("loop", "loop2"), link("loop2", "loop"),
		link("out", "../../../b"), reg("reg", ""), file{Entry: Entry{Path: "second", Type: Hardlink, Mode: 0o777, Link: "out"}}))
	for _, c := range []struct {
		path   string
		follow bool
		want   string
	}{
		{"", true, "."}, {"/", true, "."}, {".", false, "."}, {"../..", true, "."},
		{"/abs/end", false, "b/end"}, {"abs/end", true, "b/file"}, {"abs", false, "abs"}, {"abs/", false, "abs"},
		{"abs/.", true, "b"}, {"abs/..", true, "."}, {"out/x", true, "b/x"}, {"second/x", true, "b/x"},
		{"dangling", true, "b/none"}, {"dangling/x/../y", true, "b/none/y"}, {"none/../abs", true, "b"},
		{"reg/x", true, "reg/x"}, {"loop", false, "loop"},
	} {
		if got, err := v.Resolve(c.path, c.follow); err != nil || got != c.want {
			t.Errorf("Resolve(%q, %v) = %q, %v; want %q", c.path, c.follow, got, err, c.want)
		}
	}
	if _, err := v.Resolve("loop/x", true); !errors.Is(err, unix.ELOOP) {
		t.Errorf("Resolve(loop): %v, want ELOOP", err)
	}
}

func TestViewModes(t *testing.T) {
	for _, c := range []struct {
		e    Entry
		want fs.FileMode
	}{
		{Entry{Type: Regular, Mode: 0o4755}, 0o755 | fs.ModeSetuid},
		{Entry{Type: Hardlink, Mode: 0o2640}, 0o640 | fs.ModeSetgid},
		{Entry{Type: Dir, Mode: 0o1777}, 0o777 | fs.ModeSticky | fs.ModeDir},
		{Entry{Type: Symlink, Mode: 0o777}, 0o777 | fs.ModeSymlink},
		{Entry{Type: Char, Mode: 0o600}, 0o600 | fs.ModeDevice | fs.ModeCharDevice},
		{Entry{Type: Block}, fs.ModeDevice},
		{Entry{Type: Fifo}, fs.ModeNamedPipe},
	} {
		if got := c.e.FileMode(); got != c.want {
			t.Errorf("FileMode of %c %o: %v, want %v", c.e.Type, c.e.Mode, got, c.want)
		}
	}
}

func TestViewIsAFileSystem(t *testing.T) {
	s := newStore(t)
	big := strings.Repeat("0123456789", 5000)
	l := putLayer(t, s, dir("bin", 0o755), reg("bin/a", "aaa"), hard("bin/b", "bin/a"),
		dir("etc", 0o755), reg("etc/big", big), reg("etc/empty", ""))
	v := viewOf(t, s, l, putLayer(t, s, dir("etc", 0o700), reg("etc/empty", "no more")))
	if err := fstest.TestFS(v, "bin/a", "bin/b", "etc/big", "etc/empty"); err != nil {
		t.Error(err)
	}
	if b, err := fs.ReadFile(v, "etc/empty"); err != nil || string(b) != "no more" {
		t.Errorf("ReadFile(etc/empty): %q %v", b, err)
	}
	f, err := v.Open("etc/big")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var b bytes.Buffer
	if n, err := io.Copy(&b, f); err != nil || n != int64(len(big)) || b.String() != big {
		t.Errorf("Copy(etc/big): %d %v", n, err)
	}
}

func TestViewOddFiles(t *testing.T) {
	s := newStore(t)
	v := viewOf(t, s, indexOf(t, s, link("l", "/etc/shadow"), reg("\xff\n", "")))
	if _, err := v.Lstat("\xff\n"); err != nil {
		t.Errorf("Lstat of a name that is not UTF-8: %v", err)
	}
	f, err := v.Open("l")
	if err != nil {
		t.Fatal(err)
	}
	if info, err := f.Stat(); err != nil || info.Mode().Type() != fs.ModeSymlink || info.Size() != 11 {
		t.Errorf("Stat of a link: %v %v", info, err)
	}
	if _, err := f.Read(make([]byte, 1)); !errors.Is(err, fs.ErrInvalid) {
		t.Errorf("Read of a link: %v", err)
	}
	for _, name := range []string{"", "/", "/l", "a//b", "../l", "./l", "l/", "a\x00"} {
		if _, err := v.Open(name); !errors.Is(err, fs.ErrInvalid) {
			t.Errorf("Open(%q): %v, want invalid", name, err)
		}
	}
	if target, err := fs.ReadLink(v, "l"); err != nil || target != "/etc/shadow" {
		t.Errorf("ReadLink(l): %q %v", target, err)
	}
}

// bigLayer indexes n files, a hundred in each directory.
func bigLayer(b testing.TB, s *Store, name string, n int) Layer {
	b.Helper()
	var list []Entry
	for i := range n {
		d := fmt.Sprintf("usr/%s/d%05d", name, i/100)
		if i == 0 {
			list = append(list, dir("usr", 0o755).Entry, dir("usr/"+name, 0o755).Entry)
		}
		if i%100 == 0 {
			list = append(list, dir(d, 0o755).Entry)
		}
		list = append(list, Entry{Path: fmt.Sprintf("%s/f%02d", d, i%100), Type: Regular, Mode: 0o644,
			Digest: emptyDigest})
	}
	return putIndexOnly(b, s, name, list...)
}

func BenchmarkViewLookup(b *testing.B) {
	s := newStore(b)
	layers := []Layer{bigLayer(b, s, "base", 300_000)}
	for i := range 119 {
		layers = append(layers, bigLayer(b, s, fmt.Sprintf("l%03d", i), 100))
	}
	b.Run("cold", func(b *testing.B) {
		for b.Loop() {
			v, _ := s.View(context.Background(), layers)
			if _, ok := v.Entry("usr/base/d01234/f50"); !ok {
				b.Fatal("not found")
			}
		}
	})
	v := viewOf(b, s, layers...)
	b.Run("warm", func(b *testing.B) {
		for i := 0; b.Loop(); i++ {
			if _, ok := v.Entry(fmt.Sprintf("usr/base/d%05d/f50", i%3000)); !ok {
				b.Fatal("not found")
			}
		}
	})
	b.Run("ReadDir", func(b *testing.B) {
		for i := 0; b.Loop(); i++ {
			if l := v.children(fmt.Sprintf("usr/base/d%05d", i%3000)); len(l) != 100 {
				b.Fatal("not found")
			}
		}
	})
}

func TestViewOfManyLayers(t *testing.T) {
	s := newStore(t)
	var layers []Layer
	for i := range 120 {
		layers = append(layers, indexOf(t, s, dir("d", 0o755), reg(fmt.Sprintf("d/%03d", i), fmt.Sprint(i))))
	}
	got := list(t, viewOf(t, s, layers...))
	if len(got) != 122 || !slices.Contains(got, "- 644 d/077") {
		t.Errorf("view of 120 layers has %d files", len(got))
	}
}
