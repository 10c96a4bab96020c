package cache

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"io"
	"maps"
	"os"
	"path"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"filo/layer/rootfs"
)

// content gives b to open and counts how often it is read.
type content struct {
	b     []byte
	reads int
}

func (c *content) open() (io.ReadCloser, error) {
	c.reads++
	return io.NopCloser(bytes.NewReader(c.b)), nil
}

func TestFilesDigest(t *testing.T) {
	now := time.Unix(1000, 0)
	s, err := Open(t.TempDir(), t.TempDir(), func() time.Time { return now })
	if err != nil {
		t.Fatal(err)
	}
	old := rootfs.Stat{Size: 3, Dev: 1, Ino: 2, Sec: 900, CSec: 900}
	c := &content{b: []byte("abc")}
	ask := func(f *Files, st rootfs.Stat, wantReads int, what string) {
		t.Helper()
		d, err := f.Digest("a", st, c.open)
		if err != nil {
			t.Fatal(err)
		}
		if sum := sha256.Sum256(c.b); d.Encoded() != string(hexOf(sum[:])) {
			t.Errorf("%s: digest %s is not that of %q", what, d, c.b)
		}
		if c.reads != wantReads {
			t.Errorf("%s: read %d times so far, want %d", what, c.reads, wantReads)
		}
	}
	f := s.Files("/context")
	ask(f, old, 1, "first time")
	ask(f, old, 1, "second time")
	if err := f.Save(); err != nil {
		t.Fatal(err)
	}
	f = s.Files("/context")
	ask(f, old, 1, "other process")
	for i, st := range []rootfs.Stat{
		{Size: 4, Dev: 1, Ino: 2, Sec: 900, CSec: 900},
		{Size: 3, Dev: 2, Ino: 2, Sec: 900, CSec: 900},
		{Size: 3, Dev: 1, Ino: 3, Sec: 900, CSec: 900},
		{Size: 3, Dev: 1, Ino: 2, Sec: 900, Nsec: 1, CSec: 900},
		{Size: 3, Dev: 1, Ino: 2, Sec: 900, CSec: 900, CNsec: 1},
	} {
		c.b = []byte{'n', 'e', byte('0' + i)}
		ask(f, st, i+2, "changed stat")
	}
	c.b = []byte("new")
	racy := rootfs.Stat{Size: 3, Dev: 1, Ino: 2, Sec: 900, CSec: 999}
	ask(f, racy, 7, "changed just now")
	c.b = []byte("xyz") // within the same tick of the clock
	ask(f, racy, 8, "changed again at once")
	now = now.Add(time.Minute)
	ask(f, racy, 9, "first time after the margin")
	ask(f, racy, 9, "second time after the margin")
}

func hexOf(b []byte) []byte {
	const digits = "0123456789abcdef"
	var out []byte
	for _, c := range b {
		out = append(out, digits[c>>4], digits[c&15])
	}
	return out
}

// What is read of any bytes, with a sum that fits, can be looked at and written again.
func FuzzFiles(f *testing.F) {
	d := digest.FromString("")
	whole := encodeFiles(nil, 0, map[string]remembered{"a": {Size: 1, Noted: 7, Digest: d}, "d/b\xff": {Ino: 2, Digest: d}, "d/c": {Digest: d}})
	f.Add(whole[len(filesMagic)+sha256.Size:])
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, body []byte) {
		sum := sha256.Sum256(body)
		b := slices.Concat([]byte(filesMagic), sum[:], body)
		old, _, err := readFiles(bytes.NewReader(b), int64(len(b)))
		if err != nil {
			return
		}
		all, ordered := map[string]remembered{}, true
		for dir, in := range old {
			for i := range in.len() {
				all[path.Join(dir, in.name(i))] = in.row(i)
				ordered = ordered && (i == 0 || in.name(i-1) < in.name(i)) && in.name(i) != "" && !strings.Contains(in.name(i), "/")
			}
			ordered = ordered && dir == strings.TrimPrefix(path.Clean("/"+dir), "/")
		}
		if !ordered { // not what encodeFiles makes
			return
		}
		again, _, err := readFiles(bytes.NewReader(encodeFiles(nil, 0, all)), 0)
		if err != nil {
			t.Fatalf("readFiles(encodeFiles(%v)): %v", all, err)
		}
		if got, want := encodeInTwo(t, all), encodeFiles(nil, 0, all); !bytes.Equal(got, want) {
			t.Errorf("learned in two parts, %v is %q, else %q", all, got, want)
		}
		for name, want := range all {
			dir, base := split(name)
			if got, ok := again[dir].find(base); !ok || got != want {
				t.Errorf("%q: got %v %t, want %v", name, got, ok, want)
			}
		}
	})
}

// encodeInTwo is encodeFiles for who learned of half of the files, and something else of another, before.
func encodeInTwo(t *testing.T, all map[string]remembered) []byte {
	t.Helper()
	early, late := map[string]remembered{}, map[string]remembered{}
	for i, name := range slices.Sorted(maps.Keys(all)) {
		switch i % 3 {
		case 0:
			early[name] = all[name]
		case 1:
			early[name] = remembered{Digest: digest.FromString("old")}
			late[name] = all[name]
		case 2:
			late[name] = all[name]
		}
	}
	b := encodeFiles(nil, 0, early)
	old, noted, err := readFiles(bytes.NewReader(b), int64(len(b)))
	if err != nil {
		t.Fatal(err)
	}
	return encodeFiles(old, noted, late)
}

func TestFilesLearnedInTwo(t *testing.T) {
	all := map[string]remembered{}
	for i := range 100 {
		name := fmt.Sprintf("d%d/f%d", i%7, i)
		all[strings.TrimPrefix(name, "d0/")] = remembered{Size: int64(i), Noted: int64(i), Digest: digest.FromString(name)}
	}
	if got, want := encodeInTwo(t, all), encodeFiles(nil, 0, all); !bytes.Equal(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
}

// A file that another filo wrote is nothing, and no damage; one that is torn is told of.
func TestFilesForms(t *testing.T) {
	dir, now := t.TempDir(), time.Unix(1000, 0)
	s, err := Open(dir, t.TempDir(), func() time.Time { return now })
	if err != nil {
		t.Fatal(err)
	}
	told := 0
	s.Repaired = func(string) { told++ }
	st, c := rootfs.Stat{Size: 3, Sec: 500, CSec: 500}, &content{b: []byte("abc")}
	f := s.Files("/context")
	if _, err := f.Digest("d/a", st, c.open); err != nil {
		t.Fatal(err)
	}
	if err := f.Save(); err != nil {
		t.Fatal(err)
	}
	whole, err := os.ReadFile(f.path)
	if err != nil {
		t.Fatal(err)
	}
	for _, x := range []struct {
		name  string
		b     []byte
		known bool
		told  int
	}{
		{"whole", whole, true, 0},
		{"short", whole[:len(whole)-1], false, 1},
		{"empty", nil, false, 1},
		{"another form", append([]byte("filo files 1\n"), whole[len(filesMagic):]...), false, 0},
	} {
		if err := os.WriteFile(f.path, x.b, 0o600); err != nil {
			t.Fatal(err)
		}
		told = 0
		if _, known := s.Files("/context").Known("d/a", st); known != x.known || told != x.told {
			t.Errorf("%s: known %t and told %d times, want %t and %d", x.name, known, told, x.known, x.told)
		}
	}
}

// What is learned is added to what was remembered.
func TestFilesSave(t *testing.T) {
	now := time.Unix(1000, 0)
	s, err := Open(t.TempDir(), t.TempDir(), func() time.Time { return now })
	if err != nil {
		t.Fatal(err)
	}
	names := []string{"a", "d/a", "d/b", "d/e/a", "d.e/a", "b"}
	for i, name := range names {
		f := s.Files("/context")
		st, c := rootfs.Stat{Size: 3, Ino: uint64(i), Sec: 500, CSec: 500}, &content{b: []byte(name)}
		if _, err := f.Digest(name, st, c.open); err != nil {
			t.Fatal(err)
		}
		if err := f.Save(); err != nil {
			t.Fatal(err)
		}
	}
	f := s.Files("/context")
	for i, name := range names {
		st := rootfs.Stat{Size: 3, Ino: uint64(i), Sec: 500, CSec: 500}
		if d, ok := f.Known(name, st); !ok || d != digest.FromString(name) {
			t.Errorf("Known(%s) = %s, %t", name, d, ok)
		}
	}
	if _, ok := f.Known("d", rootfs.Stat{}); ok {
		t.Error("a directory has a digest")
	}
}

// A clock that was set back says nothing of what came first.
func TestFilesClockSetBack(t *testing.T) {
	now := time.Unix(1000, 0)
	s, err := Open(t.TempDir(), t.TempDir(), func() time.Time { return now })
	if err != nil {
		t.Fatal(err)
	}
	st, c := rootfs.Stat{Size: 3, Dev: 1, Ino: 2, Sec: 500, CSec: 500}, &content{b: []byte("abc")}
	f := s.Files("/context")
	if _, err := f.Digest("a", st, c.open); err != nil {
		t.Fatal(err)
	}
	if err := f.Save(); err != nil {
		t.Fatal(err)
	}
	for back, want := range map[time.Duration]bool{0: true, time.Second: true, 3 * time.Second: false, 400 * time.Second: false, -time.Hour: true} {
		now = time.Unix(1000, 0).Add(-back)
		if _, known := s.Files("/context").Known("a", st); known != want {
			t.Errorf("clock set back by %v: known %t, want %t", back, known, want)
		}
	}
}
