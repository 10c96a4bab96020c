package source

import (
	"archive/tar"
	"bufio"
	"bytes"
	"context"
	"errors"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"strings"
	"testing"
	"testing/fstest"
	"time"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/ulikunitz/xz"
)

// member is one entry of a tar; the zero Typeflag is a regular file.
type member struct {
	tar.Header
	content string
}

func file(name, content string) member {
	return member{tar.Header{Name: name, Mode: 0o644}, content}
}

func link(name, target string) member {
	return member{tar.Header{Name: name, Typeflag: tar.TypeSymlink, Linkname: target, Mode: 0o777}, ""}
}

func hard(name, target string) member {
	return member{tar.Header{Name: name, Typeflag: tar.TypeLink, Linkname: target, Mode: 0o644}, ""}
}

func dir(name string) member {
	return member{tar.Header{Name: name, Typeflag: tar.TypeDir, Mode: 0o755}, ""}
}

func makeTar(t testing.TB, members ...member) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, m := range members {
		if m.Typeflag == 0 {
			m.Typeflag = tar.TypeReg
		}
		m.Size = int64(len(m.content))
		must(t, w.WriteHeader(&m.Header))
		_, err := io.WriteString(w, m.content)
		must(t, err)
	}
	must(t, w.Close())
	return b.Bytes()
}

// openTar opens a tar as the context on standard input.
func openTar(t testing.TB, b []byte) (*Source, error) {
	t.Helper()
	temp := t.TempDir()
	s, err := Open(context.Background(), "-", Options{Stdin: bytes.NewReader(b), Temp: temp})
	if left, _ := os.ReadDir(temp); len(left) > 0 {
		t.Errorf("left in the temporary directory: %v", left)
	}
	if err == nil {
		t.Cleanup(func() { s.Close() })
	}
	return s, err
}

func mustTar(t testing.TB, members ...member) fs.FS {
	t.Helper()
	s, err := openTar(t, makeTar(t, members...))
	must(t, err)
	return s.FS
}

func TestTarCompressions(t *testing.T) {
	plain := makeTar(t, file("f", "hello"), file("d/g", strings.Repeat("x", 1<<20)))
	packed := map[string][]byte{"none": plain}
	for name, open := range map[string]func(io.Writer) io.WriteCloser{
		"gzip": func(w io.Writer) io.WriteCloser { return gzip.NewWriter(w) },
		"zstd": func(w io.Writer) io.WriteCloser { z, err := zstd.NewWriter(w); must(t, err); return z },
		"xz":   func(w io.Writer) io.WriteCloser { x, err := xz.NewWriter(w); must(t, err); return x },
	} {
		var b bytes.Buffer
		w := open(&b)
		_, err := w.Write(plain)
		must(t, errors.Join(err, w.Close()))
		packed[name] = b.Bytes()
	}
	packed["zstd with a skippable frame"] = append([]byte("\x50\x2a\x4d\x18\x04\x00\x00\x00junk"), packed["zstd"]...)
	if _, err := exec.LookPath("bzip2"); err != nil {
		t.Log("bzip2 is not tried:", err)
	} else {
		cmd := exec.Command("bzip2", "-c")
		cmd.Stdin = bytes.NewReader(plain)
		packed["bzip2"], err = cmd.Output()
		must(t, err)
	}
	for name, b := range packed {
		t.Run(name, func(t *testing.T) {
			s, err := openTar(t, append(b[:len(b):len(b)], []byte(nil)...))
			must(t, err)
			if got := names(t, s.FS); got != "d/ d/g f" {
				t.Errorf("holds %s", got)
			}
			if got := read(t, s.FS, "d/g"); len(got) != 1<<20 {
				t.Errorf("d/g has %d bytes", len(got))
			}
			if s.Dockerfile != nil || s.Local || s.Root != "" || s.Identity == "" {
				t.Errorf("Open(-) = %+v", s)
			}
			_, err = openTar(t, b[:len(b)/2])
			wantError(t, err, "standard input")
		})
	}
}

func TestTarKeepsWhatItSays(t *testing.T) {
	when := time.Unix(1234567890, 0)
	fsys := mustTar(t,
		member{tar.Header{Name: "./", Typeflag: tar.TypeDir, Mode: 0o750, Uid: 7, Gid: 8}, ""},
		member{tar.Header{Name: "./d/", Typeflag: tar.TypeDir, Mode: 0o1770, Uid: 5, Gid: 6, ModTime: when}, ""},
		member{tar.Header{Name: "./d/f", Mode: 0o4755, Uid: 3000000, Gid: 6, ModTime: when}, "suid"},
		hard("./d/h", "./d/f"),
		link("l", "d/f"),
		member{tar.Header{Name: "p", Typeflag: tar.TypeFifo, Mode: 0o600}, ""},
		member{tar.Header{Name: "c", Typeflag: tar.TypeChar, Mode: 0o666, Devmajor: 1, Devminor: 3}, ""},
		member{tar.Header{Name: "b", Typeflag: tar.TypeBlock, Mode: 0o660, Devmajor: 8, Devminor: 1}, ""},
		file("caf\xe9", "latin"),
	)
	if st := statOf(t, fsys, "."); st.Mode != modeDir|0o750 || st.UID != 7 || st.GID != 8 {
		t.Errorf(". = %+v", st)
	}
	if st := statOf(t, fsys, "d"); st.Mode != modeDir|0o1770 || st.UID != 5 || st.Sec != when.Unix() {
		t.Errorf("d = %+v", st)
	}
	f, h := statOf(t, fsys, "d/f"), statOf(t, fsys, "d/h")
	if f != h || f.Mode != modeRegular|0o4755 || f.UID != 3000000 || f.Nlink != 2 || f.Size != 4 {
		t.Errorf("d/f = %+v, d/h = %+v", f, h)
	}
	if st := statOf(t, fsys, "c"); st.Mode != modeChar|0o666 || st.Major != 1 || st.Minor != 3 {
		t.Errorf("c = %+v", st)
	}
	if st := statOf(t, fsys, "b"); st.Mode != modeBlock|0o660 || st.Major != 8 || st.Minor != 1 {
		t.Errorf("b = %+v", st)
	}
	if st := statOf(t, fsys, "p"); st.Mode != modeFifo|0o600 {
		t.Errorf("p = %+v", st)
	}
	if _, err := fsys.Open("p"); !errors.Is(err, errNoFile) {
		t.Errorf("Open(p) = %v", err)
	}
	if got := read(t, fsys, "l") + read(t, fsys, "caf\xe9"); got != "suidlatin" {
		t.Errorf("l and café hold %q", got)
	}
}

func TestTreeFS(t *testing.T) {
	fsys := mustTar(t, file("a", "1"), file("d/b", "2"), link("l", "d/b"), link("dl", "/d/."), dir("e"), link("d/up", "../a"))
	must(t, fstest.TestFS(fsys, "a", "d/b", "l", "dl", "e", "d/up"))
}

func TestTarReplaces(t *testing.T) {
	for _, c := range []struct {
		name    string
		members []member
		want    string
	}{
		{"file by file", []member{file("a", "1"), file("a", "2")}, "a=2"},
		{"directory by file", []member{file("a/b", "1"), file("a", "2")}, "a=2"},
		{"file by directory", []member{file("a", "1"), dir("a"), file("a/b", "2")}, "a/ a/b=2"},
		{"link by directory", []member{dir("d"), link("a", "d"), dir("a"), file("a/b", "2")}, "a/ a/b=2 d/"},
		{"through a link", []member{dir("d"), link("a", "d"), file("a/b", "2")}, "a=>d d/ d/b=2"},
		{"through a dangling link", []member{link("a", "x/y"), file("a/b", "2")}, "a=>x/y x/ x/y/ x/y/b=2"},
		{"directory keeps its files", []member{file("a/b", "1"), dir("a")}, "a/ a/b=1"},
		{"hard link to itself", []member{file("a", "1"), hard("a", "a")}, "a=1"},
		{"hard link to what is replaced", []member{file("a", "1"), hard("b", "a"), file("a", "2")}, "a=2 b=1"},
	} {
		fsys := mustTar(t, c.members...)
		var got []string
		for _, name := range strings.Fields(names(t, fsys)) {
			st := statOf(t, fsys, strings.TrimSuffix(name, "/"))
			switch st.Mode & modeType {
			case modeSymlink:
				target, err := fs.ReadLink(fsys, name)
				must(t, err)
				name += "=>" + target
			case modeRegular:
				name += "=" + read(t, fsys, name)
				if st.Nlink != 1 {
					t.Errorf("%s: %s has %d links", c.name, name, st.Nlink)
				}
			}
			got = append(got, name)
		}
		if got := strings.Join(got, " "); got != c.want {
			t.Errorf("%s: %s, want %s", c.name, got, c.want)
		}
	}
}

func TestTarHostile(t *testing.T) {
	for _, c := range []struct {
		name    string
		members []member
		want    string // what the archive holds then
		err     string // or how it is refused
	}{
		{"dots", []member{file("../../../etc/x", "1"), file("a/../../y", "2")}, "etc/ etc/x y", ""},
		{"absolute", []member{file("/etc/x", "1")}, "etc/ etc/x", ""},
		{"link to the machine", []member{link("e", "/etc"), file("e/x", "1")}, "e etc/ etc/x", ""},
		{"link above", []member{link("e", "../../.."), file("e/x", "1")}, "e x", ""},
		{"hard link to the machine", []member{hard("x", "/etc/passwd")}, "", `hard link to "etc/passwd": file does not exist`},
		{"hard link to a directory", []member{dir("d"), hard("x", "d")}, "", "is a directory"},
		{"hard link to the root", []member{hard("x", "/")}, "", "is a directory"},
		{"loop", []member{link("a", "b"), link("b", "a"), file("a/x", "1")}, "", "too many levels"},
		{"below a file", []member{file("a", "1"), file("a/b", "1")}, "", "not a directory"},
		{"root is a file", []member{file("..", "1")}, "", "is a directory"},
		{"root is a link", []member{link("/", "/etc")}, "", "is a directory"},
	} {
		s, err := openTar(t, makeTar(t, c.members...))
		if c.err != "" {
			if err == nil || !strings.Contains(err.Error(), c.err) {
				t.Errorf("%s: error %v, want %q", c.name, err, c.err)
			}
			continue
		}
		must(t, err)
		if got := names(t, s.FS); got != c.want {
			t.Errorf("%s: %s, want %s", c.name, got, c.want)
		}
	}
}

func TestTarHoles(t *testing.T) {
	const size = 3 << 20
	content := strings.Repeat("\x00", size) + "end"
	fsys := mustTar(t, file("a", content), file("hole", strings.Repeat("\x00", size)))
	if read(t, fsys, "a") != content || len(read(t, fsys, "hole")) != size {
		t.Error("zeros came back as something else")
	}
}

func TestTarEmpty(t *testing.T) {
	s, err := openTar(t, makeTar(t))
	must(t, err)
	if got := names(t, s.FS); got != "" || s.Dockerfile != nil {
		t.Errorf("an empty tar holds %q, Dockerfile %q", got, s.Dockerfile)
	}
}

func TestTarLongHeader(t *testing.T) {
	name := strings.Repeat("long/", 1000) + "f"
	if got := read(t, mustTar(t, file(name, "1")), name); got != "1" {
		t.Errorf("holds %q", got)
	}
}

func TestTarCanceled(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	_, err := Open(ctx, "-", Options{Stdin: bytes.NewReader(makeTar(t, file("a", "1"))), Temp: t.TempDir()})
	if !errors.Is(err, context.Canceled) {
		t.Errorf("Open = %v, want canceled", err)
	}
}

// zeroes is /dev/zero.
type zeroes struct{ read int64 }

func (z *zeroes) Read(p []byte) (int, error) {
	clear(p)
	z.read += int64(len(p))
	return len(p), nil
}

func TestTarWithoutEnd(t *testing.T) {
	packed := bytes.NewBuffer(nil)
	w := gzip.NewWriter(packed)
	w.Write(makeTar(t, file("a", "1")))
	w.Close()
	for name, head := range map[string]io.Reader{
		"empty archive": bytes.NewReader(nil), "archive": bytes.NewReader(makeTar(t, file("a", "1"))), "compressed archive": packed,
	} {
		z := &zeroes{}
		_, err := Open(context.Background(), "-", Options{Stdin: io.MultiReader(head, z), Temp: t.TempDir()})
		wantError(t, err, "read context from standard input: more than 256 MiB behind the end of the archive")
		if z.read > maxTail+1<<20 {
			t.Errorf("%s: %d bytes behind the end were read", name, z.read)
		}
	}
}

func TestTarTooMany(t *testing.T) {
	spool, err := newSpool(t.TempDir())
	must(t, err)
	defer spool.Close()
	u := untar{ctx: context.Background(), tree: newTree(spool), most: 3, buf: make([]byte, 512)}
	for _, name := range []string{"a", "b", "c"} {
		must(t, u.add(&tar.Header{Name: name, Typeflag: tar.TypeReg}, strings.NewReader("")))
	}
	wantError(t, u.add(&tar.Header{Name: "d", Typeflag: tar.TypeReg}, strings.NewReader("")), "more than 3 files")
}

func TestTarHoleCanceled(t *testing.T) {
	spool, err := newSpool(t.TempDir())
	must(t, err)
	defer spool.Close()
	ctx, cancel := context.WithCancel(context.Background())
	defer time.AfterFunc(10*time.Millisecond, cancel).Stop()
	u := untar{ctx: ctx, tree: newTree(spool), most: 1, buf: make([]byte, 512)}
	if err := u.add(&tar.Header{Name: "hole", Typeflag: tar.TypeReg}, &zeroes{}); !errors.Is(err, context.Canceled) {
		t.Errorf("a file without end: %v, want canceled", err)
	}
}

func TestTarDamaged(t *testing.T) {
	var b bytes.Buffer
	w := gzip.NewWriter(&b)
	w.Write(makeTar(t, file("a", "1")))
	w.Close()
	good := b.Bytes()
	if _, err := openTar(t, append(good[:len(good):len(good)], "trailing garbage"...)); err != nil {
		t.Errorf("with garbage behind: %v", err)
	}
	good[len(good)-8] ^= 1 // the checksum
	_, err := openTar(t, good)
	wantError(t, err, "checksum")
}

func TestNotATar(t *testing.T) {
	var b bytes.Buffer
	w := gzip.NewWriter(&b)
	w.Write([]byte("just text"))
	w.Close()
	_, err := openTar(t, b.Bytes())
	wantError(t, err, "read tar")
}

func FuzzTar(f *testing.F) {
	f.Add(makeTar(f, file("a/../b", "1"), link("l", "../.."), file("l/x", "2"), hard("h", "l/x"), dir("a")))
	f.Add(makeTar(f, link("a", "a/a"), dir("a"), file("a", "1"), hard("b", "a"), file("b", "2")))
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) < 512 {
			return
		}
		tr, err := readTar(context.Background(), bufio.NewReader(bytes.NewReader(b)), t.TempDir())
		if err != nil {
			return
		}
		defer tr.Close()
		err = fs.WalkDir(tr, ".", func(p string, e fs.DirEntry, err error) error {
			if err != nil || !e.Type().IsRegular() {
				return err
			}
			st := statOf(t, tr, p)
			if st.Size < 1<<20 && int64(len(read(t, tr, p))) != st.Size {
				t.Errorf("%q has not its %d bytes", p, st.Size)
			}
			if st.Nlink == 0 {
				t.Errorf("%q has no links", p)
			}
			return nil
		})
		must(t, err)
	})
}
