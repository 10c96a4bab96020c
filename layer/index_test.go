package layer

import (
	"bytes"
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
	"pgregory.net/rapid"
)

func TestComparePaths(t *testing.T) {
	sorted := []string{".", "-", ".a", "a", "a/\x01", "a/-", "a/b", "a/b/c", "a/b.c", "a\x01", "a b", "a-b", "a.b", "ab", "b", "é", "\xff"}
	for i, a := range sorted {
		for j, b := range sorted {
			if got := comparePaths(a, b); got < 0 != (i < j) || got == 0 != (i == j) {
				t.Errorf("comparePaths(%q, %q) = %d", a, b, got)
			}
		}
	}
}

func TestComparePathsIsByComponent(t *testing.T) {
	path := rapid.StringMatching(`[ab./-]{1,2}(/[ab.\-]{1,2}){0,3}`)
	rapid.Check(t, func(t *rapid.T) {
		a, b := path.Draw(t, "a"), path.Draw(t, "b")
		if !validName(a) || !validName(b) || a == "." || b == "." {
			return
		}
		want := slices.Compare(strings.Split(a, "/"), strings.Split(b, "/"))
		if got := comparePaths(a, b); got < 0 != (want < 0) || got > 0 != (want > 0) {
			t.Errorf("comparePaths(%q, %q) = %d, want %d", a, b, got, want)
		}
	})
}

func indexed(t testing.TB, entries ...Entry) *index {
	t.Helper()
	var b indexBuilder
	for _, e := range entries {
		if err := b.add(e); err != nil {
			t.Fatalf("add %s: %v", e.Path, err)
		}
	}
	x, err := parseIndex(string(b.finish().encode()))
	if err != nil {
		t.Fatal(err)
	}
	return x
}

func someEntries() []Entry {
	return []Entry{
		{Path: "a", Type: Dir, Mode: 0o1777, UID: 1<<31 - 1, GID: 5, ModTime: -1},
		{Path: "a", Type: Opaque},
		{Path: "a/f", Type: Regular, Mode: 0o644, Size: 1 << 40, Digest: digest.FromString("f"), ModTime: 1 << 40, Xattrs: map[string]string{"user.x": "", "user.y": "\x00"}},
		{Path: "a/gone", Type: Whiteout},
		{Path: "b/c/d", Type: Symlink, Link: "../x", Mode: 0o777},
		{Path: "b/c/e", Type: Hardlink, Link: "a/f"},
		{Path: "b.d", Type: Char, Major: 4095, Minor: 1<<20 - 1},
		{Path: "c/d", Type: Opaque},
		{Path: "e", Type: Fifo},
	}
}

func TestIndexKeepsEntries(t *testing.T) {
	x := indexed(t, someEntries()...)
	if d := cmp.Diff(someEntries(), slices.Collect(x.all())); d != "" {
		t.Error(d)
	}
	for _, e := range someEntries() {
		got, ok := x.find(e.Path)
		if e.Type == Opaque {
			if ok && got.Type == Opaque || !x.opaque(e.Path) {
				t.Errorf("opaque marker of %s: found %v, opaque %v", e.Path, got, x.opaque(e.Path))
			}
			continue
		}
		if d := cmp.Diff(e, got); d != "" {
			t.Error(d)
		}
	}
	for _, path := range []string{"", ".", "0", "a/", "a/fa", "b", "b/c", "c", "c/d", "z"} {
		if e, ok := x.find(path); ok {
			t.Errorf("find(%q) = %v", path, e)
		}
	}
	for _, path := range []string{".", "b", "a/f", "e", "c"} {
		if x.opaque(path) {
			t.Errorf("%q is opaque", path)
		}
	}
}

func TestIndexChildren(t *testing.T) {
	x := indexed(t, append([]Entry{{Path: ".", Type: Dir}}, someEntries()...)...)
	for dir, want := range map[string]string{
		".":   "a b! b.d c! e",
		"a":   "a/f a/gone",
		"b":   "b/c!",
		"b/c": "b/c/d b/c/e",
		"c":   "c/d!",
		"c/d": "", "e": "", "nowhere": "", "a/f": "",
	} {
		var got []string
		for e := range x.children(dir) {
			name := e.Path
			if e.Implied {
				name += "!"
			}
			got = append(got, name)
		}
		if strings.Join(got, " ") != want {
			t.Errorf("children(%s): %q, want %q", dir, got, want)
		}
	}
	for range x.children(".") {
		break
	}
}

// Skipping over subdirectories of all sizes must neither lose nor repeat a child.
func TestIndexChildrenOfMany(t *testing.T) {
	var b indexBuilder
	const dirs = 70
	for i := range dirs {
		name := fmt.Sprintf("d%03d", i)
		_ = b.add(Entry{Path: name, Type: Dir})
		for j := range i {
			_ = b.add(Entry{Path: fmt.Sprintf("%s/%03d", name, j), Type: Fifo})
		}
	}
	x := b.finish()
	count := 0
	for e := range x.children(".") {
		if want := fmt.Sprintf("d%03d", count); e.Path != want {
			t.Fatalf("child %d is %s", count, e.Path)
		}
		inside := 0
		for range x.children(e.Path) {
			inside++
		}
		if inside != count {
			t.Errorf("%s has %d children", e.Path, inside)
		}
		count++
	}
	if count != dirs {
		t.Errorf("%d children, want %d", count, dirs)
	}
}

func TestIndexBuilderRefuses(t *testing.T) {
	for _, pair := range [][2]Entry{
		{{Path: "b", Type: Dir}, {Path: "a", Type: Dir}},
		{{Path: "a", Type: Dir}, {Path: "a", Type: Dir}},
		{{Path: "a", Type: Fifo}, {Path: "a", Type: Opaque}},
		{{Path: "a.b", Type: Dir}, {Path: "a/b", Type: Dir}},
	} {
		var b indexBuilder
		if err := b.add(pair[0]); err != nil {
			t.Fatal(err)
		}
		if err := b.add(pair[1]); !errors.Is(err, errOrder) {
			t.Errorf("add %v after %v: %v", pair[1], pair[0], err)
		}
	}
}

func TestDamagedIndex(t *testing.T) {
	s := newStore(t)
	c := Compression{}
	l := buildLayer(t, s, Sinks{Blob: &c}, odd())
	onlyTree := buildLayer(t, s, Sinks{Tree: true}, []item{folder("a"), regular("a/b", "text"),
		{Entry: Entry{Path: "a/c", Type: Hardlink, Link: "a/b", Mode: 0o644, ModTime: 1e9}}, {Entry: Entry{Path: "d", Type: Whiteout}}})
	for _, l := range []Layer{l, onlyTree} {
		path := filepath.Join(s.layerDir(l), "index")
		good, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		for _, bad := range [][]byte{nil, good[:10], good[:len(good)-1], flip(good, 9), flip(good, 13), flip(good, len(good)/2)} {
			if err := os.WriteFile(path, bad, 0o644); err != nil {
				t.Fatal(err)
			}
			again := reopen(t, s.Dir())
			if _, err := again.loadIndex(l); err == nil {
				t.Fatalf("damage in %d bytes not seen", len(bad))
			}
			if _, err := again.index(t.Context(), l); err != nil {
				if l == onlyTree && !realRoot() {
					continue // owners are not on disk
				}
				t.Fatal(err)
			}
			if now, err := os.ReadFile(path); err != nil || string(now) != string(good) {
				t.Errorf("index was not repaired: %v", err)
			}
			again.Close()
		}
	}
}

func flip(b []byte, i int) []byte {
	b = slices.Clone(b)
	b[i] ^= 1
	return b
}

func FuzzIndex(f *testing.F) {
	var b indexBuilder
	for _, e := range someEntries() {
		if err := b.add(e); err != nil {
			f.Fatal(err)
		}
	}
	good := b.finish().encode()
	f.Add(good)
	f.Add(good[:len(good)-1])
	f.Fuzz(func(t *testing.T, data []byte) {
		if len(data) > len(indexMagic)+4 {
			copy(data, indexMagic)
			sum := crc32.Checksum(data[len(indexMagic)+4:], castagnoli)
			for i := range 4 {
				data[len(indexMagic)+i] = byte(sum >> (8 * i))
			}
		}
		x, err := parseIndex(string(data))
		if err != nil {
			return
		}
		for e := range x.all() {
			x.find(e.Path)
			x.opaque(e.Path)
		}
		count := 0
		for e := range x.children(".") {
			for range x.children(e.Path) {
			}
			if count++; count > x.len() {
				t.Fatal("more children than records")
			}
		}
	})
}

func bigIndex(b testing.TB, n int) (*index, []string) {
	var build indexBuilder
	var paths []string
	for i := range n {
		if i%30 == 0 {
			_ = build.add(Entry{Path: fmt.Sprintf("usr/lib/package%06d", i/30), Type: Dir, Mode: 0o755})
		}
		paths = append(paths, fmt.Sprintf("usr/lib/package%06d/share/file%06d.txt", i/30, i))
		if err := build.add(Entry{Path: paths[i], Type: Regular, Digest: digest.FromString("")}); err != nil {
			b.Fatal(err)
		}
	}
	return build.finish(), paths
}

func BenchmarkIndexFind(b *testing.B) {
	x, paths := bigIndex(b, 300_000)
	i := 0
	b.ReportAllocs()
	for b.Loop() {
		i = (i + 7919) % len(paths)
		if _, ok := x.find(paths[i]); !ok {
			b.Fatal(paths[i])
		}
	}
}

func BenchmarkIndexLoad(b *testing.B) {
	x, _ := bigIndex(b, 300_000)
	path := filepath.Join(b.TempDir(), "index")
	if err := os.WriteFile(path, x.encode(), 0o644); err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		if _, err := readIndex(path); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkIndexAll(b *testing.B) {
	x, _ := bigIndex(b, 300_000)
	for b.Loop() {
		n := 0
		for range x.all() {
			n++
		}
		if n != x.len() {
			b.Fatal(n)
		}
	}
}

func TestBigIndexIsMappedOnlyIfWhole(t *testing.T) {
	s := newStore(t)
	var b indexBuilder
	for i := range mappedIndex / 32 {
		if err := b.add(Entry{Path: fmt.Sprintf("dir%07d/file", i), Type: Symlink, Link: "x"}); err != nil {
			t.Fatal(err)
		}
	}
	l := Layer{DiffID: digest.FromString("big")}
	if err := s.putIndex(l, b.finish()); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(s.layerDir(l), "index")
	if _, err := os.Stat(path + ".whole"); err != nil {
		t.Error(err)
	}
	x, err := s.openIndex(path)
	if err != nil {
		t.Fatal(err)
	}
	if got, want := slices.Collect(x.all()), slices.Collect(b.finish().all()); !cmp.Equal(got, want) {
		t.Errorf("%d mapped entries differ from %d", len(got), len(want))
	}
	if got := len(x.impliedDirs()); got != x.len() {
		t.Errorf("%d implied directories, want %d", got, x.len())
	}
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt([]byte("damage"), mappedIndex); err != nil {
		t.Fatal(err)
	}
	f.Close()
	if _, err := s.openIndex(path); !errors.Is(err, errDamagedIndex) {
		t.Errorf("damaged after it was found whole: got %v, want %v", err, errDamagedIndex)
	}
}

func TestReadFile(t *testing.T) {
	name := filepath.Join(t.TempDir(), "f")
	for _, size := range []int{0, 1, 1023, 1024, 1025, 100_000} {
		want := noise(size)
		if err := os.WriteFile(name, want, 0o644); err != nil {
			t.Fatal(err)
		}
		if got, err := ReadFile(name); err != nil || !bytes.Equal(got, want) {
			t.Errorf("ReadFile of %d bytes: %d bytes, %v", size, len(got), err)
		}
	}
	for path, want := range map[string]error{name + "x": fs.ErrNotExist, filepath.Dir(name): unix.EISDIR} {
		if _, err := ReadFile(path); !errors.Is(err, want) {
			t.Errorf("ReadFile(%s): %v, want %v", path, err, want)
		}
	}
}

// opaque says whether the layer hides what the layers below have in dir.
func (x *index) opaque(dir string) bool {
	for i := x.search(dir); i < x.len(); i++ {
		p, t := x.head(i)
		if p != dir {
			return false
		}
		if t == Opaque {
			return true
		}
	}
	return false
}
