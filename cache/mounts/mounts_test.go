package mounts

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

var single = os.Geteuid() != 0

// place is where blobs went.
type place map[digest.Digest][]byte

// take puts what a has into p and returns how many bytes were new.
func (p place) take(t *testing.T, a *Archive) (sent int64) {
	t.Helper()
	for _, part := range a.Parts {
		if p[part.Blob.Digest] != nil {
			continue
		}
		r, err := a.Open(part.Blob.Digest)
		if err != nil {
			t.Fatal(err)
		}
		data, err := io.ReadAll(r)
		r.Close()
		if err != nil || digest.FromBytes(data) != part.Blob.Digest || int64(len(data)) != part.Blob.Size {
			t.Fatalf("blob %v: %d bytes with digest %s, %v", part.Blob, len(data), digest.FromBytes(data), err)
		}
		p[part.Blob.Digest] = data
		sent += part.Blob.Size
	}
	return sent
}

func (p place) open(_ context.Context, d ocispec.Descriptor) (io.ReadCloser, error) {
	data, ok := p[d.Digest]
	if !ok {
		return nil, fs.ErrNotExist
	}
	return io.NopCloser(bytes.NewReader(data)), nil
}

func (p place) list(t *testing.T, a *Archive) *List {
	t.Helper()
	l, err := ReadList(bytes.NewReader(p[a.Parts[0].Blob.Digest]), a.Parts[0])
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func packed(t *testing.T, dir string, old *List) *Archive {
	t.Helper()
	a, err := Pack(t.Context(), dir, t.TempDir(), 1<<40, old)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func write(t *testing.T, name string, data []byte) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(name, data, 0o644); err != nil {
		t.Fatal(err)
	}
}

// noise is n bytes that do not compress.
func noise(seed uint64, n int) []byte {
	b := make([]byte, n)
	rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8), byte(seed >> 16)}).Read(b)
	return b
}

// describe is all that travels of a directory, one line a path.
func describe(t *testing.T, dir string) string {
	t.Helper()
	var b strings.Builder
	err := filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if err != nil || p == dir {
			return err
		}
		fi, err := d.Info()
		if err != nil {
			return err
		}
		rel, _ := filepath.Rel(dir, p)
		fmt.Fprintf(&b, "%q %v", rel, fi.Mode())
		switch {
		case fi.Mode()&fs.ModeSymlink != 0:
			link, _ := os.Readlink(p)
			fmt.Fprintf(&b, " -> %s %s", link, fi.ModTime())
		case fi.Mode().IsRegular():
			data, err := os.ReadFile(p)
			if err != nil {
				return err
			}
			fmt.Fprintf(&b, " %s %s", digest.FromBytes(data), fi.ModTime())
		default:
			fmt.Fprintf(&b, " %s", fi.ModTime())
		}
		fmt.Fprintln(&b)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return b.String()
}

func TestThereAndBack(t *testing.T) {
	dir := t.TempDir()
	write(t, dir+"/a/one", []byte("1"))
	write(t, dir+"/a/again", []byte("1"))
	write(t, dir+"/a/empty", nil)
	write(t, dir+"/\xff\xfe", noise(1, 100))
	write(t, dir+"/shut/in", noise(2, packBytes))
	write(t, dir+"/z", noise(3, 10))
	for _, do := range []func() error{
		func() error { return os.Symlink("/etc/passwd", dir+"/a/link") },
		func() error { return os.Symlink("\xff", dir+"/a/raw") },
		func() error { return os.Link(dir+"/a/one", dir+"/b") },
		func() error { return os.Chmod(dir+"/z", 0o4711) },
		func() error { return os.Chtimes(dir+"/z", time.Unix(5, 123456789), time.Unix(5, 123456789)) },
		func() error { return os.Chmod(dir+"/shut", 0o500) },
		func() error { return os.Chtimes(dir+"/a", time.Unix(7, 8), time.Unix(7, 8)) },
	} {
		if err := do(); err != nil {
			t.Fatal(err)
		}
	}
	l, err := net.Listen("unix", dir+"/socket") // does not travel
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	defer os.Chmod(dir+"/shut", 0o700)

	p := place{}
	a := packed(t, dir, nil)
	p.take(t, a)
	if a.Bytes != 1+1+100+packBytes+10 {
		t.Errorf("Bytes = %d", a.Bytes)
	}
	out := t.TempDir()
	if err := p.list(t, a).Unpack(t.Context(), Target{out, single}, p.open); err != nil {
		t.Fatal(err)
	}
	defer os.Chmod(out+"/shut", 0o700)
	l.Close()
	if got, want := describe(t, out), describe(t, dir); got != want {
		t.Errorf("unpacked\n%swant\n%s", got, want)
	}
	one, err1 := os.Stat(out + "/a/one")
	b, err2 := os.Stat(out + "/b")
	if err1 != nil || err2 != nil || !os.SameFile(one, b) {
		t.Error("two names of one file became two files")
	}
	again := packed(t, out, p.list(t, a))
	if sent := p.take(t, again); sent != 0 {
		t.Errorf("what was unpacked and is packed again sends %d bytes", sent)
	}
}

// A change of two percent sends no more than that, wherever the changed files are.
func TestSmallChange(t *testing.T) {
	dir := t.TempDir()
	const files, each = 500, 64 << 10
	for i := range files {
		write(t, fmt.Sprintf("%s/d%d/f%d", dir, i%50, i), noise(uint64(i), each))
	}
	p := place{}
	a := packed(t, dir, nil)
	whole := p.take(t, a)
	for round := range 20 {
		for i := range files / 50 {
			n := i*50 + round // never the same file twice
			write(t, fmt.Sprintf("%s/d%d/f%d", dir, n%50, n), noise(uint64(files*(round+1)+n), each))
		}
		next := packed(t, dir, p.list(t, a))
		sent := p.take(t, next)
		if round == 0 && sent > whole/20 {
			t.Errorf("two percent of %d bytes changed, %d were sent", whole, sent)
		}
		a = next
	}
	total := int64(0)
	for _, part := range a.Parts {
		total += part.Blob.Size
	}
	if total > 2*whole+packBytes {
		t.Errorf("after twenty changes the archive has %d bytes for %d", total, whole)
	}
	if n := len(a.Parts); n > files*each/packBytes+2*smallPacks+8 {
		t.Errorf("after twenty changes the archive has %d parts", n)
	}
	out := t.TempDir()
	if err := p.list(t, a).Unpack(t.Context(), Target{out, single}, p.open); err != nil {
		t.Fatal(err)
	}
	if describe(t, out) != describe(t, dir) {
		t.Error("after twenty changes other files come back")
	}
}

func TestTooLarge(t *testing.T) {
	dir := t.TempDir()
	write(t, dir+"/f", noise(1, 1000))
	_, err := Pack(t.Context(), dir, t.TempDir(), 999, nil)
	var large *TooLargeError
	if !errors.As(err, &large) || large.Bytes != 1000 {
		t.Errorf("Pack with too low a bound = %v", err)
	}
	a, err := Pack(t.Context(), t.TempDir(), t.TempDir(), 999, nil)
	if err != nil || len(a.Parts) != 0 {
		t.Errorf("Pack of an empty directory = %d parts, %v", len(a.Parts), err)
	}
}

// Blobs that are gone, cut or changed are errors, whichever it is.
func TestDamage(t *testing.T) {
	dir := t.TempDir()
	write(t, dir+"/f", noise(1, 100_000))
	p := place{}
	a := packed(t, dir, nil)
	p.take(t, a)
	list := p.list(t, a)
	for i, part := range a.Parts {
		good := p[part.Blob.Digest]
		bad := bytes.Clone(good)
		bad[len(bad)/2] ^= 1
		for name, data := range map[string][]byte{"cut": good[:len(good)/2], "changed": bad, "longer": append(bytes.Clone(good), 'x'), "empty": {}} {
			var err error
			if i == 0 {
				_, err = ReadList(bytes.NewReader(data), part)
			} else {
				err = list.Unpack(t.Context(), Target{t.TempDir(), single}, place{part.Blob.Digest: data}.open)
			}
			if err == nil {
				t.Errorf("part %d, %s: no error", i, name)
			}
		}
	}
	if err := list.Unpack(t.Context(), Target{t.TempDir(), single}, place{}.open); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("Unpack without blobs = %v", err)
	}
}

// A list that would lead out of the directory, or is no list, is refused before anything is written.
func TestHostileLists(t *testing.T) {
	pack := `{"blob":"sha256:` + strings.Repeat("a", 64) + `","size":1,"diffID":"sha256:` + strings.Repeat("b", 64) + `","bytes":1}`
	for name, files := range map[string]string{
		"absolute":          `{"path":"/etc/x","type":"file"}`,
		"dots":              `{"path":"../x","type":"file"}`,
		"dots inside":       `{"path":"a","type":"dir"},{"path":"a/../../x","type":"file"}`,
		"root":              `{"path":".","type":"dir"}`,
		"no directory":      `{"path":"a/b","type":"file"}`,
		"through a symlink": `{"path":"a","type":"symlink","link":"/"},{"path":"a/b","type":"file"}`,
		"symlink over dir":  `{"path":"a","type":"dir"},{"path":"a","type":"symlink","link":"/"},{"path":"a/b","type":"file"}`,
		"link out":          `{"path":"a","type":"hardlink","link":"/etc/passwd"}`,
		"link to symlink":   `{"path":"a","type":"symlink","link":"/etc/passwd"},{"path":"b","type":"hardlink","link":"a"}`,
		"device":            `{"path":"a","type":"char"}`,
		"mode":              `{"path":"a","type":"file","mode":65535}`,
		"nowhere":           `{"path":"a","type":"file","size":1,"digest":"sha256:` + strings.Repeat("a", 64) + `","pack":1}`,
		"negative":          `{"path":"a","type":"file","size":-1}`,
		"NUL":               `{"path":"a\u0000","type":"file"}`,
		"NUL in link":       `{"path":"a","type":"symlink","link":"a\u0000"}`,
		"raw":               `{"path":["Li4veA=="],"type":"file"}`,
	} {
		if _, err := parseList([]byte(`{"format":1,"packs":[` + pack + `],"files":[` + files + `]}`)); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	if _, err := parseList([]byte(`{"format":2}`)); err == nil {
		t.Error("another format: no error")
	}
}

// A pack that unpacks to much more than it says is not read to its end.
func TestBomb(t *testing.T) {
	w, err := newPart(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	w.WriteHeader(&tar.Header{Name: "x", Mode: 0o644, Size: 64 << 20})
	w.Write(make([]byte, 64<<20))
	data, part := finished(t, w)
	err = readPart(bytes.NewReader(data), part, 1<<20, func(*tar.Header, io.Reader) error { return nil })
	if err == nil || !strings.Contains(err.Error(), "more than it should") {
		t.Errorf("readPart of a bomb = %v", err)
	}
}

// Of a list that says little many times, or that has holes, only so much gets into memory as one of ours may take.
func TestBombedList(t *testing.T) {
	many := strings.Repeat("{},", 2<<20) + "{}"
	for what, read := range map[string]func() error{
		"packs": func() error {
			_, err := parseList([]byte(`{"format":1,"packs":[` + many + `]}`))
			return err
		},
		"files": func() error {
			_, err := few[file]([]byte("["+many+"]"), 1000)
			return err
		},
		"holes": func() error {
			_, err := ReadList(sparseList(t))
			return err
		},
	} {
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		err := read()
		runtime.ReadMemStats(&after)
		if !errors.Is(err, errTooLong) && !errors.Is(err, errTooLarge) {
			t.Errorf("%s: %v", what, err)
		}
		if n := after.TotalAlloc - before.TotalAlloc; n > 64<<20 {
			t.Errorf("%s: %d MiB were allocated", what, n>>20)
		}
	}
}

// sparseList is the blob of a list that is nothing but a hole, in the form that tar had for that first (GNU tar, "Old GNU
// Format").
func sparseList(t *testing.T) (io.Reader, Part) {
	t.Helper()
	const size = maxList + 1
	h := make([]byte, 512)
	copy(h, listName)
	copy(h[100:], "0000644\x000000000\x000000000\x0000000000000\x0000000000000\x00        S")
	copy(h[257:], "ustar  \x00")
	copy(h[386:], fmt.Sprintf("%011o\x00%011o\x00", size, 0))
	copy(h[483:], fmt.Sprintf("%011o\x00", size))
	sum := 0
	for _, b := range h {
		sum += int(b)
	}
	copy(h[148:], fmt.Sprintf("%06o\x00 ", sum))
	w, err := newPart(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.MultiWriter(w.zstd, w.diff).Write(append(h, make([]byte, 1024)...)); err != nil {
		t.Fatal(err)
	}
	data, part := finished(t, w)
	return bytes.NewReader(data), part
}

// finished is what a part holds, as it is stored.
func finished(t *testing.T, w *partWriter) ([]byte, Part) {
	t.Helper()
	part, at, err := w.finish()
	if err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(at)
	if err != nil {
		t.Fatal(err)
	}
	return data, part
}

func FuzzList(f *testing.F) {
	f.Add([]byte(`{"format":1,"packs":[],"files":[{"path":"a","type":"dir","mode":493},{"path":"a/b","type":"symlink","link":"/"},{"path":"a/c","type":"file"},{"path":"d","type":"hardlink","link":"a/c"}]}`))
	f.Add([]byte(`{"format":1,"files":[{"path":["/w=="],"type":"file"}]}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		l, err := parseList(data)
		if err != nil {
			return
		}
		top := t.TempDir()
		if err := os.Mkdir(top+"/in", 0o700); err != nil {
			t.Fatal(err)
		}
		_ = l.Unpack(t.Context(), Target{top + "/in", true}, place{}.open)
		names, err := os.ReadDir(top)
		if err != nil || len(names) != 1 {
			t.Errorf("%s wrote outside its directory: %v", data, names)
		}
		filepath.WalkDir(top, func(p string, d fs.DirEntry, err error) error { // let it be removed
			if d != nil && d.IsDir() {
				os.Chmod(p, 0o700)
			}
			return nil
		})
		if again, err := json.Marshal(listWire{format, l.Packs, l.Files}); err != nil {
			t.Error(err)
		} else if m, err := parseList(again); err != nil || !m.same(l) {
			t.Errorf("%s: written and read it is another list: %v", data, err)
		}
	})
}
