package cache

import (
	"bytes"
	"crypto/sha256"
	"io"
	"maps"
	"testing"
	"time"

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

func FuzzFiles(f *testing.F) {
	whole := &Files{known: map[string]remembered{"a": {Size: 1}, "b\xff": {Ino: 2}}}
	f.Add(whole.encode())
	f.Add([]byte(filesMagic))
	f.Fuzz(func(t *testing.T, b []byte) {
		got := &Files{known: map[string]remembered{}}
		if !got.decode(b) {
			return
		}
		again := &Files{known: map[string]remembered{}}
		if !again.decode(got.encode()) || !maps.Equal(got.known, again.known) {
			t.Errorf("decode(encode(x)) is not x for %q", b)
		}
	})
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
