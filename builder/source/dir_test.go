package source

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/fstest"

	"golang.org/x/sync/errgroup"

	"filo/layer/rootfs"
)

func openDirTest(t testing.TB, dir string) *dirFS {
	t.Helper()
	d, err := openDirFS(dir, rootOwned)
	must(t, err)
	t.Cleanup(func() { d.Close() })
	return d
}

func TestDirFS(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, map[string]string{"a": "1", "d/b": "2", "d/e/c": "3", "empty/": "", "l": "-> d/b", "dl": "-> /d/e"})
	d := openDirTest(t, dir)
	must(t, fstest.TestFS(d, "a", "d/b", "d/e/c", "empty", "l", "dl"))
}

func TestDirLinks(t *testing.T) {
	top := t.TempDir()
	dir := filepath.Join(top, "root")
	write(t, top, map[string]string{"outside/f": "secret", "root/in/f": "mine", "root/outside/f": "inner"})
	write(t, dir, map[string]string{
		"abs": "-> /in/f", "up": "-> ../../../in/f", "rel": "-> ../outside/f", "absdir": "-> /in",
		"host": "-> " + filepath.Join(top, "outside/f"), "loop": "-> loop", "in/two": "-> ../abs", "dot": "-> in/.",
		"climb": "-> absdir/../in/f",
	})
	d := openDirTest(t, dir)
	for name, want := range map[string]string{
		"abs": "mine", "up": "mine", "rel": "inner", "absdir/f": "mine", "in/two": "mine", "absdir/two": "mine",
		"dot/f": "mine", "climb": "mine",
	} {
		if got := read(t, d, name); got != want {
			t.Errorf("%s holds %q, want %q", name, got, want)
		}
	}
	if _, err := d.Open("host"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("Open(host) = %v, want not exist", err)
	}
	if _, err := d.Open("loop"); !errors.Is(err, errLoop) {
		t.Errorf("Open(loop) = %v, want %v", err, errLoop)
	}
	for _, name := range []string{"../outside/f", "/in/f", "in/../in/f", "", "in//f", "in/", "a\x00"} {
		if _, err := d.Open(name); !errors.Is(err, fs.ErrInvalid) {
			t.Errorf("Open(%q) = %v, want invalid", name, err)
		}
		if _, err := d.Lstat(name); !errors.Is(err, fs.ErrInvalid) {
			t.Errorf("Lstat(%q) = %v, want invalid", name, err)
		}
		if _, err := d.ReadDir(name); !errors.Is(err, fs.ErrInvalid) {
			t.Errorf("ReadDir(%q) = %v, want invalid", name, err)
		}
	}
	if link, err := d.ReadLink("absdir/two"); link != "../abs" || err != nil {
		t.Errorf("ReadLink(absdir/two) = %q, %v", link, err)
	}
	if st := statOf(t, d, "abs"); st.Mode&modeType != modeSymlink {
		t.Errorf("Lstat(abs) has mode %o, want a link", st.Mode)
	}
}

func TestDirOddFiles(t *testing.T) {
	dir := t.TempDir()
	r, err := rootfs.Open(dir)
	must(t, err)
	defer r.Close()
	must(t, r.Mknod("fifo", modeFifo|0o600, 0, 0))
	latin := "caf\xe9 \n*"
	write(t, dir, map[string]string{latin: "odd", "locked": "x"})
	must(t, os.Chmod(filepath.Join(dir, "locked"), 0o000))
	t.Chdir(dir) // the path of a socket must be short
	l, err := net.Listen("unix", "sock")
	must(t, err)
	defer l.Close()
	d := openDirTest(t, dir)
	if _, err := d.Open("fifo"); err == nil || !strings.Contains(err.Error(), "fifo") {
		t.Errorf("Open(fifo) = %v, want an error that names it", err)
	}
	fi, err := d.Lstat("sock")
	must(t, err)
	if fi.Mode().Type() != fs.ModeSocket {
		t.Errorf("sock is %v", fi.Mode())
	}
	if got := read(t, d, latin); got != "odd" {
		t.Errorf("%q holds %q", latin, got)
	}
	if st := statOf(t, d, latin); st.UID != 0 || st.GID != 0 || st.Ino == 0 || st.CSec == 0 || st.Size != 3 {
		t.Errorf("Lstat(%q) = %+v", latin, st)
	}
	if os.Geteuid() == 0 {
		t.Log("root reads everything: unreadable files are not tried")
		return
	}
	_, err = d.Open("locked")
	if !errors.Is(err, fs.ErrPermission) || !strings.Contains(err.Error(), "locked") {
		t.Errorf("Open(locked) = %v, want permission denied on it", err)
	}
}

func TestDirSeesChanges(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, map[string]string{"d/a": "1"})
	d := openDirTest(t, dir)
	read(t, d, "d/a")
	write(t, dir, map[string]string{"d/a": "22", "d/b": "3"})
	if got := read(t, d, "d/a") + read(t, d, "d/b"); got != "223" {
		t.Errorf("after a change: %q, want 223", got)
	}
}

func TestList(t *testing.T) {
	dir := t.TempDir()
	files := map[string]string{"b": "1", "a/x": "22", "a.b": "", "a/y/z": "", "l": "-> a", "dl": "-> /nowhere", "caf\xe9 \n*": "odd", "empty/": ""}
	for i := range 3000 { // more than one call of the kernel gives
		files[fmt.Sprintf("many/a file with a longer name, number %d", i)] = ""
	}
	write(t, dir, files)
	d := openDirTest(t, dir)
	if got := names(t, d); !strings.HasPrefix(got, "a/ a/x a/y/ a/y/z a.b b caf\xe9 \n* dl empty/ l many/") || strings.Count(got, " number ") != 3000 {
		t.Errorf("names: %q", got)
	}
	if got := listAll(t, d, "l"); !slices.Equal(got, []string{"l/x", "l/y/", "l/y/z"}) {
		t.Errorf("List of a link shows %q", got)
	}
	if got := listAll(t, ignored(t, d, "a/x"), "l"); !slices.Equal(got, []string{"l/y/", "l/y/z"}) {
		t.Errorf("List of a link, ignored, shows %q", got)
	}
	stop := errors.New("stop")
	if err := List(d, ".", func(string, fs.DirEntry) error { return stop }); err != stop {
		t.Errorf("List = %v, want the error of visit", err)
	}
	err := List(d, ".", func(p string, e fs.DirEntry) error {
		if p == "a" {
			must(t, os.Remove(filepath.Join(dir, "b")))
		}
		_, err := e.Info()
		return err
	})
	if !errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), "lstat b:") {
		t.Errorf("Info of a file that is gone = %v", err)
	}
	for _, name := range []string{"b", "caf\xe9 \n*", "nothing", "dl", "../x", ""} {
		if err := List(d, name, func(string, fs.DirEntry) error { return nil }); err == nil {
			t.Errorf("List(%q) is no error", name)
		}
	}
}

// TestDirManyAtOnce reads more directories at once than are kept open.
func TestDirManyAtOnce(t *testing.T) {
	dir := t.TempDir()
	const dirs, files = 3 * maxOpen, 4
	for i := range dirs {
		for j := range files {
			write(t, dir, map[string]string{fmt.Sprintf("d%d/f%d", i, j): fmt.Sprint(i, j)})
		}
	}
	d := openDirTest(t, dir)
	var g errgroup.Group
	for j := range files {
		for i := range dirs {
			g.Go(func() error {
				b, err := fs.ReadFile(d, fmt.Sprintf("d%d/f%d", i, j))
				if err == nil && string(b) != fmt.Sprint(i, j) {
					err = fmt.Errorf("d%d/f%d holds %q", i, j, b)
				}
				return err
			})
		}
	}
	must(t, g.Wait())
	if len(d.open) > maxOpen {
		t.Errorf("%d directories stay open, want at most %d", len(d.open), maxOpen)
	}
}

func TestOpenFile(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, map[string]string{"f": "0123456789"})
	f, err := openDirTest(t, dir).Open("f")
	must(t, err)
	defer f.Close()
	b := make([]byte, 3)
	if _, err := f.(io.ReaderAt).ReadAt(b, 7); err != nil || string(b) != "789" {
		t.Errorf("ReadAt = %q, %v", b, err)
	}
	if _, err := f.(io.Seeker).Seek(4, io.SeekStart); err != nil {
		t.Error(err)
	}
	var s strings.Builder
	if _, err := io.Copy(&s, f); err != nil || s.String() != "456789" {
		t.Errorf("Copy = %q, %v", s.String(), err)
	}
}

// benchTree makes n files, a hundred to a directory.
func benchTree(b *testing.B, n int) string {
	dir := b.TempDir()
	for i := range n {
		d := filepath.Join(dir, fmt.Sprintf("p%d/src", i/100))
		if i%100 == 0 {
			must(b, os.MkdirAll(d, 0o755))
		}
		must(b, os.WriteFile(filepath.Join(d, fmt.Sprintf("file%d.go", i)), nil, 0o644))
	}
	return dir
}

// walkAll looks at each file below dir as builds do.
func walkAll(b *testing.B, fsys fs.FS, dir string) (n int) {
	var dirs []string
	must(b, List(fsys, dir, func(p string, e fs.DirEntry) error {
		if _, err := e.Info(); err != nil {
			return err
		}
		if e.IsDir() {
			dirs = append(dirs, p)
		} else {
			n++
		}
		return nil
	}))
	for _, p := range dirs {
		n += walkAll(b, fsys, p)
	}
	return n
}

func BenchmarkWalk(b *testing.B) {
	dir := benchTree(b, 30000)
	for b.Loop() {
		d, err := openDirFS(dir, rootOwned)
		must(b, err)
		if n := walkAll(b, d, "."); n != 30000 {
			b.Fatal(n)
		}
		d.Close()
	}
}

func BenchmarkWalkIgnored(b *testing.B) {
	dir := benchTree(b, 30000)
	patterns := strings.Fields("**/*.log **/node_modules .git **/.DS_Store dist build/** *.md !README.md **/__pycache__ **/*.pyc tmp/*")
	for b.Loop() {
		d, err := openDirFS(dir, rootOwned)
		must(b, err)
		fsys, err := Ignore(d, patterns)
		must(b, err)
		if n := walkAll(b, fsys, "."); n != 30000 {
			b.Fatal(n)
		}
		d.Close()
	}
}
