package layer

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

const emptyLayer = "sha256:5f70bf18a086007016e948b04aed3b82103a36bea41755b6cddfaf10ace3c6ef"

// newStore opens a store that keeps owners on disk if that is possible.
func newStore(t testing.TB) *Store {
	t.Helper()
	return reopen(t, t.TempDir())
}

func reopen(t testing.TB, dir string) *Store {
	t.Helper()
	s, err := Open(dir, Options{SingleID: !realRoot()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

// item is an entry and its content.
type item struct {
	Entry
	text string
}

func regular(path, text string) item {
	return item{Entry{Path: path, Type: Regular, Mode: 0o644, Size: int64(len(text)), ModTime: 1e9}, text}
}

func folder(path string) item {
	return item{Entry: Entry{Path: path, Type: Dir, Mode: 0o755, ModTime: 1e9}}
}

// odd has one of everything.
func odd() []item {
	long := strings.Repeat("n", 200)
	setuid := regular("bin/su", "suid")
	setuid.Mode, setuid.UID, setuid.GID = 0o4755, 0, 42
	tagged := regular("tagged", "x")
	tagged.Xattrs = map[string]string{"user.b": "\x00\xff", "user.a": "", "user.overlay.opaque": "y"}
	root := folder(".")
	root.Mode = 0o700
	return []item{
		root,
		folder("bin"),
		setuid,
		{Entry: Entry{Path: "bin/su2", Type: Hardlink, Link: "bin/su", Mode: 0o4755, GID: 42, ModTime: 1e9}},
		{Entry: Entry{Path: "bin/wh", Type: Whiteout}},
		regular("bin.d", "after bin/…"),
		{Entry: Entry{Path: "fifo", Type: Fifo, Mode: 0o600, ModTime: -5}},
		{Entry: Entry{Path: "lnk", Type: Symlink, Link: "/" + long + long, Mode: 0o777, UID: 3000000, GID: 1, ModTime: 1}},
		folder(long),
		folder(long + "/" + long),
		regular(long+"/"+long+"/\xff\xfeé", strings.Repeat("0123456789", 100_000)),
		{Entry: Entry{Path: "null", Type: Char, Mode: 0o666, Major: 1, Minor: 3, ModTime: 1e9}},
		tagged,
	}
}

func buildLayer(t testing.TB, s *Store, k Sinks, files []item) Layer {
	t.Helper()
	w, err := s.Create(t.Context(), k)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		if err := w.Add(f.Entry, strings.NewReader(f.text)); err != nil {
			t.Fatal(err)
		}
	}
	l, err := w.Close()
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func TestEmptyLayer(t *testing.T) {
	s := newStore(t)
	if l := buildLayer(t, s, Sinks{Tree: true}, nil); l.DiffID != emptyLayer {
		t.Errorf("diff ID %s, want %s", l.DiffID, emptyLayer)
	}
}

// The digests must only change with a version of a compressor: blobs that
// registries have already are then not found again.
func TestGoldenDigests(t *testing.T) {
	const diffID = "sha256:bd7f61c732da6807dc681bde40980197b80ef2577cd2898404bbb73f8479b22e"
	golden := map[Compression]string{
		{Algorithm: Gzip}:           "sha256:2d88818313d9bed8741e3954aefff2723786d1c0bc7131838f5de2b1dd31715b",
		{Algorithm: Gzip, Level: 9}: "sha256:ba94e2644574f49c4b057e490d1af011049c5df8f9bdc4c4c708abbe58e9c53e",
		{Algorithm: Zstd}:           "sha256:37c47f89217573f826bcd0c9bed6f3c9c92530c692e9785dbd3f8fd2df2174f4",
		{Algorithm: Uncompressed}:   diffID,
		{Algorithm: EStargz}:        "sha256:ae0f82f49c4e1adede159e80a65d4d04c48bb36c101b53c89010be02c0ae83fb",
	}
	for c, want := range golden {
		for _, procs := range []int{1, 4} {
			old := runtime.GOMAXPROCS(procs)
			s := newStore(t)
			l := buildLayer(t, s, Sinks{Blob: &c}, odd())
			d, err := s.Blob(t.Context(), l, c, true)
			runtime.GOMAXPROCS(old)
			if l.DiffID != diffID || err != nil || d.Digest.String() != want {
				t.Errorf("%v, %d processors: diff ID %s, blob %s, %v, want %s", c, procs, l.DiffID, d.Digest, err, want)
			}
		}
	}
}

func TestGzipHeader(t *testing.T) {
	s := newStore(t)
	l := buildLayer(t, s, Sinks{Blob: &Compression{}}, odd())
	d, err := s.Blob(t.Context(), l, Compression{}, false)
	if err != nil {
		t.Fatal(err)
	}
	data, err := s.ReadBlob(t.Context(), d.Digest)
	if err != nil || !bytes.HasPrefix(data, []byte{0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 0xff}) {
		t.Errorf("blob begins % x, %v", data[:min(len(data), 10)], err)
	}
}

func TestTarIsCanonical(t *testing.T) {
	s := newStore(t)
	c := Compression{Algorithm: Uncompressed}
	l := buildLayer(t, s, Sinks{Blob: &c}, odd())
	data, err := s.ReadBlob(t.Context(), l.DiffID)
	if err != nil {
		t.Fatal(err)
	}
	r := tar.NewReader(bytes.NewReader(data))
	var names []string
	for {
		h, err := r.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		names = append(names, fmt.Sprintf("%c %.8s", h.Typeflag, h.Name))
		if h.Uname != "" || h.Gname != "" || !h.AccessTime.IsZero() || !h.ChangeTime.IsZero() {
			t.Errorf("%s: has names or times %+v", h.Name, h)
		}
		if h.Name == "bin/.wh.wh" && (h.Mode != 0 || h.Uid != 0 || h.Size != 0 || h.ModTime.Unix() != 0) {
			t.Errorf("whiteout %+v", h)
		}
		if h.Name == "tagged" && (len(h.PAXRecords) != 2 || h.PAXRecords["SCHILY.xattr.user.b"] != "\x00\xff") {
			t.Errorf("records %q", h.PAXRecords)
		}
	}
	want := []string{"5 ./", "5 bin/", "0 bin/su", "1 bin/su2", "0 bin/.wh.", "0 bin.d", "6 fifo", "2 lnk",
		"5 nnnnnnnn", "5 nnnnnnnn", "0 nnnnnnnn", "3 null", "0 tagged"}
	if !slices.Equal(names, want) {
		t.Errorf("tar has %q, want %q", names, want)
	}
}

func TestAddRefuses(t *testing.T) {
	s := newStore(t)
	tests := []struct {
		name  string
		files []item
		want  string
		is    error
	}{
		{"order", []item{regular("b", ""), regular("a", "")}, "canonical order", errOrder},
		{"twice", []item{regular("a", ""), regular("a", "")}, "canonical order", errOrder},
		{"order of components", []item{folder("a"), regular("a.b", ""), regular("a/b", "")}, "canonical order", errOrder},
		{"no parent", []item{regular("a/b", "")}, "directory is not in the layer", nil},
		{"parent is a file", []item{regular("a", ""), regular("a/b", "")}, "directory is not in the layer", nil},
		{"whiteout name", []item{regular(".wh.a", "")}, ".wh.", nil},
		{"long name", []item{regular(strings.Repeat("n", 256), "")}, "file name too long", nil},
		{"unclean", []item{regular("../a", "")}, "clean", nil},
		{"absolute", []item{regular("/a", "")}, "clean", nil},
		{"NUL", []item{regular("a\x00", "")}, "clean", nil},
		{"root a file", []item{regular(".", "")}, "root", nil},
		{"opaque", []item{folder("a"), {Entry: Entry{Path: "a/o", Type: Opaque}}}, "opaque", nil},
		{"no link target", []item{{Entry: Entry{Path: "l", Type: Hardlink, Link: "a"}}}, "no such file", nil},
		{"owner", []item{{Entry: Entry{Path: "l", Type: Dir, UID: -1}}}, "out of range", nil},
		{"type", []item{{Entry: Entry{Path: "l"}}}, "unknown type", nil},
		{"short", []item{{Entry{Path: "a", Type: Regular, Size: 5}, "1234"}}, "1 bytes shorter", ErrChanged},
		{"long", []item{{Entry{Path: "a", Type: Regular, Size: 3}, "1234"}}, "longer", ErrChanged},
		{"digest", []item{{Entry{Path: "a", Type: Regular, Size: 1, Digest: digest.FromString("b")}, "a"}}, "digest", ErrChanged},
	}
	for _, test := range tests {
		for _, k := range []Sinks{{Tree: true}, {Blob: &Compression{}}} {
			w, err := s.Create(t.Context(), k)
			if err != nil {
				t.Fatal(err)
			}
			for _, f := range test.files {
				if err = w.Add(f.Entry, strings.NewReader(f.text)); err != nil {
					break
				}
			}
			if err == nil || !strings.Contains(err.Error(), test.want) || test.is != nil && !errors.Is(err, test.is) {
				t.Errorf("%s: error %v, want %q", test.name, err, test.want)
			}
			if _, err := w.Close(); err == nil {
				t.Errorf("%s: closed after an error", test.name)
			}
		}
	}
	if left, _ := os.ReadDir(s.tmp); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
	if _, err := s.Create(t.Context(), Sinks{}); err == nil {
		t.Error("Create without sinks succeeds")
	}
}

func TestEpochClamps(t *testing.T) {
	s := newStore(t)
	epoch := int64(500)
	files := []item{regular("a", "x"), regular("b", "x")}
	files[1].ModTime = 7
	l := buildLayer(t, s, Sinks{Tree: true, Epoch: &epoch}, files)
	x, err := s.index(t.Context(), l)
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]int64{"a": 500, "b": 7} {
		e, _ := x.find(name)
		info, err := os.Lstat(filepath.Join(s.treePath(l), name))
		if e.ModTime != want || err != nil || info.ModTime().Unix() != want {
			t.Errorf("%s: index %d, tree %v %v, want %d", name, e.ModTime, info.ModTime().Unix(), err, want)
		}
	}
}

func TestTreeIsAsTheIndexSays(t *testing.T) {
	s := newStore(t)
	l := buildLayer(t, s, Sinks{Tree: true}, odd())
	x, err := s.index(t.Context(), l)
	if err != nil {
		t.Fatal(err)
	}
	var want []string
	for e := range x.all() {
		switch {
		case e.Path == ".":
			continue
		case e.Type == Hardlink:
			file, _ := x.find(e.Link)
			file.Path = e.Path
			e = file
		case !realRoot() && e.Type == Char:
			e.Type, e.Digest, e.Major, e.Minor = Regular, digest.FromString(""), 0, 0
		}
		if !realRoot() {
			e.UID, e.GID = os.Getuid(), os.Getgid()
		}
		want = append(want, entryFacts(e))
	}
	got := treeFacts(t, s.treePath(l))
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("tree differs:\n%s", d)
	}
	if info, err := os.Stat(s.treePath(l)); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("root of tree: %v %v", info.Mode(), err)
	}
}

// entryFacts is what of an entry can be seen on disk.
func entryFacts(e Entry) string {
	if e.Type == Whiteout {
		return e.Path + " whiteout"
	}
	if e.Type == Symlink {
		e.Mode = 0o777
	}
	return fmt.Sprintf("%q %c %o %d:%d %d %s %s %d,%d %q %d", e.Path, e.Type, e.Mode, e.UID, e.GID,
		e.Size, e.Digest, e.Link, e.Major, e.Minor, e.Xattrs, e.ModTime)
}

func treeFacts(t testing.TB, top string) []string {
	t.Helper()
	var lines []string
	for _, n := range walked(t, top, 0) {
		if n.Path == "." {
			continue
		}
		if n.Type == Regular {
			data, err := os.ReadFile(filepath.Join(top, n.Path))
			if err != nil {
				t.Fatal(err)
			}
			n.Digest = digest.FromBytes(data)
		}
		line := entryFacts(n.Entry)
		if n.opaque {
			line += " opaque"
		}
		lines = append(lines, line)
	}
	return lines
}

func TestHoles(t *testing.T) {
	s := newStore(t)
	const size = 16 << 20
	w, err := s.Create(t.Context(), Sinks{Tree: true})
	if err != nil {
		t.Fatal(err)
	}
	e := Entry{Path: "sparse", Type: Regular, Mode: 0o600, Size: size}
	text := io.MultiReader(strings.NewReader("start"), io.LimitReader(zeroReader{}, size-8), strings.NewReader("end"))
	if err := w.Add(e, text); err != nil {
		t.Fatal(err)
	}
	l, err := w.Close()
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(s.treePath(l), "sparse")
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil || st.Size != size || st.Blocks*512 > size/8 {
		t.Errorf("size %d, on disk %d, %v", st.Size, st.Blocks*512, err)
	}
	data, _ := os.ReadFile(path)
	x, _ := s.index(t.Context(), l)
	if got, _ := x.find("sparse"); digest.FromBytes(data) != got.Digest {
		t.Errorf("content is not what was written")
	}
}

type zeroReader struct{}

func (zeroReader) Read(p []byte) (int, error) { clear(p); return len(p), nil }

func TestCreateAdopting(t *testing.T) {
	s := newStore(t)
	var trees []string
	for range 2 {
		upper, err := s.Temp("upper-")
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(upper, "a"), []byte("x"), 0o644); err != nil {
			t.Fatal(err)
		}
		w, err := s.createAdopting(t.Context(), Sinks{}, upper)
		if err != nil {
			t.Fatal(err)
		}
		f := regular("a", "x")
		if err := w.Add(f.Entry, strings.NewReader(f.text)); err != nil {
			t.Fatal(err)
		}
		l, err := w.Close()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := os.Stat(upper); err == nil {
			t.Errorf("upper is still there")
		}
		tree, err := s.Tree(t.Context(), l)
		if err != nil {
			t.Fatal(err)
		}
		trees = append(trees, tree)
	}
	if data, err := os.ReadFile(filepath.Join(trees[1], "a")); string(data) != "x" || trees[0] != trees[1] {
		t.Errorf("tree has %q, %v", data, err)
	}
}

func BenchmarkWriter(b *testing.B) {
	for _, sinks := range []struct {
		name string
		k    Sinks
	}{
		{"tree", Sinks{Tree: true}},
		{"gzip", Sinks{Blob: &Compression{}}},
		{"zstd", Sinks{Blob: &Compression{Algorithm: Zstd}}},
	} {
		b.Run(sinks.name, func(b *testing.B) {
			s := newStore(b)
			text := strings.Repeat("some text of a file ", 100)
			for b.Loop() {
				w, err := s.Create(b.Context(), sinks.k)
				if err != nil {
					b.Fatal(err)
				}
				for i := range 30_000 {
					if i%100 == 0 {
						if err := w.Add(folder(fmt.Sprintf("d%05d", i/100)).Entry, nil); err != nil {
							b.Fatal(err)
						}
					}
					e := regular(fmt.Sprintf("d%05d/f%05d", i/100, i), text).Entry
					if err := w.Add(e, strings.NewReader(text)); err != nil {
						b.Fatal(err)
					}
				}
				b.SetBytes(int64(30_000 * len(text)))
				w.Abort()
			}
		})
	}
}
