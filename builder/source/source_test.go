package source

import (
	"bytes"
	"context"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"filo/layer/rootfs"
)

// fileSystem is what every file system here has to be.
type fileSystem interface {
	fs.ReadDirFS
	fs.ReadLinkFS
}

var _ = []fileSystem{(*dirFS)(nil), (*tree)(nil), (*ignoreFS)(nil)}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// write makes the files of a directory: "path" to content; a path with "/" at its end is a directory, content that
// begins with "-> " a link.
func write(t testing.TB, dir string, files map[string]string) {
	t.Helper()
	for name, content := range files {
		p := filepath.Join(dir, name)
		must(t, os.MkdirAll(filepath.Dir(p), 0o755))
		target, isLink := strings.CutPrefix(content, "-> ")
		switch {
		case strings.HasSuffix(name, "/"):
			must(t, os.MkdirAll(p, 0o755))
		case isLink:
			must(t, os.Symlink(target, p))
		default:
			must(t, os.WriteFile(p, []byte(content), 0o644))
		}
	}
}

func read(t testing.TB, fsys fs.FS, name string) string {
	t.Helper()
	b, err := fs.ReadFile(fsys, name)
	if err != nil {
		t.Fatalf("ReadFile(%q) = %v", name, err)
	}
	return string(b)
}

// names lists all of fsys as a walk meets it, directories with "/" at their end.
func names(t testing.TB, fsys fs.FS) string {
	t.Helper()
	var out []string
	err := fs.WalkDir(fsys, ".", func(p string, e fs.DirEntry, err error) error {
		if e != nil && e.IsDir() {
			p += "/"
		}
		if p != "./" {
			out = append(out, p)
		}
		return err
	})
	must(t, err)
	if got := listAll(t, fsys, "."); !slices.Equal(got, out) {
		t.Errorf("List shows %q, a walk %q", got, out)
	}
	return strings.Join(out, " ")
}

// listAll lists all below dir by List, in the form of names, and checks each Info.
func listAll(t testing.TB, fsys fs.FS, dir string) (out []string) {
	t.Helper()
	var names []string
	must(t, List(fsys, dir, func(p string, e fs.DirEntry) error {
		fi, err := e.Info()
		if err != nil {
			return err
		}
		want, err := fs.Lstat(fsys, p)
		if err == nil && (fs.FormatFileInfo(fi) != fs.FormatFileInfo(want) || !reflect.DeepEqual(fi.Sys(), want.Sys()) || path.Base(p) != e.Name()) {
			t.Errorf("List(%q): %s is %v %+v, want %v %+v", dir, p, fi, fi.Sys(), want, want.Sys())
		}
		if e.IsDir() {
			p += "/"
		}
		names = append(names, p)
		return err
	}))
	for _, p := range names {
		out = append(out, p)
		if sub, ok := strings.CutSuffix(p, "/"); ok {
			out = append(out, listAll(t, fsys, sub)...)
		}
	}
	return out
}

func statOf(t testing.TB, fsys fs.FS, name string) rootfs.Stat {
	t.Helper()
	fi, err := fs.Lstat(fsys, name)
	if err != nil {
		t.Fatalf("Lstat(%q) = %v", name, err)
	}
	return *fi.Sys().(*rootfs.Stat)
}

// wantError fails unless err holds all the texts.
func wantError(t testing.TB, err error, texts ...string) {
	t.Helper()
	if err == nil {
		t.Fatalf("no error, want one with %q", texts)
	}
	for _, s := range texts {
		if !strings.Contains(err.Error(), s) {
			t.Errorf("error %q, want %q in it", err, s)
		}
	}
}

func TestOpenLocal(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, map[string]string{"ctx/f": "hello", "ctx/d/e": "x", "file": "", "link": "-> ctx"})
	for _, ref := range []string{"ctx", "link", "ctx/../ctx/"} {
		s, err := Open(context.Background(), filepath.Join(dir, ref), Options{})
		must(t, err)
		real, err := filepath.EvalSymlinks(filepath.Join(dir, "ctx"))
		must(t, err)
		if s.Root != real || !s.Local || s.Dockerfile != nil || s.Identity != "" {
			t.Errorf("Open(%s) = %+v, want root %s", ref, s, real)
		}
		if got := names(t, s.FS); got != "d/ d/e f" {
			t.Errorf("Open(%s) holds %s", ref, got)
		}
		must(t, s.Close())
	}
	_, err := Open(context.Background(), filepath.Join(dir, "nowhere"), Options{})
	wantError(t, err, filepath.Join(dir, "nowhere"), "no such directory")
	_, err = Open(context.Background(), filepath.Join(dir, "file"), Options{})
	wantError(t, err, filepath.Join(dir, "file"), "not a directory")
}

func TestOpenStdinDockerfile(t *testing.T) {
	const text = "FROM scratch\nLABEL a=b\n"
	s, err := Open(context.Background(), "-", Options{Stdin: strings.NewReader(text), Temp: t.TempDir()})
	must(t, err)
	defer s.Close()
	if s.FS != nil || string(s.Dockerfile) != text || s.Local {
		t.Errorf("Open(-) = %+v", s)
	}
	const sum = "sha256:"
	if !strings.HasPrefix(s.Identity, sum) {
		t.Errorf("identity %q", s.Identity)
	}
	_, err = Open(context.Background(), "-", Options{Stdin: strings.NewReader("")})
	wantError(t, err, "standard input", "empty")
	_, err = Open(context.Background(), "-", Options{})
	wantError(t, err, "no standard input")
	big := io.LimitReader(repeat('x'), maxDockerfile+1)
	_, err = Open(context.Background(), "-", Options{Stdin: big})
	wantError(t, err, "neither an archive nor a Dockerfile")
}

// repeat is an endless reader of one byte.
type repeat byte

func (r repeat) Read(b []byte) (int, error) {
	copy(b, bytes.Repeat([]byte{byte(r)}, len(b)))
	return len(b), nil
}

func TestIsURL(t *testing.T) {
	for ref, want := range map[string]bool{
		"http://h/f": true, "https://h/r.git#v1": true, "git@h:o/r.git": true, "ssh://git@h/r.git": true,
		"git://h/r": true, "https://h/r.git?nonsense=1": true,
		"f": false, "./f": false, "d/f.git": false, "github.com/o/r": false, "-": false, "ftp://h/f": false, "": false,
	} {
		if got := IsURL(ref); got != want {
			t.Errorf("IsURL(%q) = %v, want %v", ref, got, want)
		}
	}
}

func TestRedact(t *testing.T) {
	for in, want := range map[string]string{
		"https://u:secret@h/p": "https://u:xxxxx@h/p", "https://h/p": "https://h/p", "https://u:se cret@h/p": "https://xxxxx@h/p", "git@h:o/r": "git@h:o/r",
		"a dir": "a dir",
	} {
		if got := redact(in); got != want {
			t.Errorf("redact(%q) = %q, want %q", in, got, want)
		}
	}
}
