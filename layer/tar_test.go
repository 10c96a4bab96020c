package layer

import (
	"archive/tar"
	"bufio"
	"bytes"
	"io"
	"strings"
	"testing"

	"pgregory.net/rapid"
)

// TestTarWriter compares tars with those of archive/tar, to the byte: they are what layers are named by.
func TestTarWriter(t *testing.T) {
	rapid.Check(t, func(r *rapid.T) {
		var got, want bytes.Buffer
		ours, theirs := tarWriter{out: bufio.NewWriter(&got)}, tar.NewWriter(&want)
		for range rapid.IntRange(0, 4).Draw(r, "entries") {
			e := tarEntry(r)
			h, err := header(e)
			if err == nil {
				err = theirs.WriteHeader(h)
			}
			if ourErr := ours.add(e); err != nil || ourErr != nil {
				r.Fatalf("%+v: %v, archive/tar: %v", e, ourErr, err)
			}
			if e.Type != Regular {
				continue
			}
			if e.Size > 2000 { // nobody writes as much; what is compared is the header
				ours.left, ours.pad = 0, 0
				theirs = tar.NewWriter(&want)
				continue
			}
			for _, w := range []io.Writer{&ours, theirs} {
				if _, err := w.Write(bytes.Repeat([]byte("x"), int(e.Size))); err != nil {
					r.Fatal(err)
				}
			}
		}
		if err := ours.Close(); err != nil {
			r.Fatal(err)
		}
		if err := theirs.Close(); err != nil {
			r.Fatal(err)
		}
		if !bytes.Equal(got.Bytes(), want.Bytes()) {
			r.Fatalf("got %d bytes %.600q\nwant %d bytes %.600q", got.Len(), got.Bytes(), want.Len(), want.Bytes())
		}
	})
}

// tarEntry is an entry of which something may be just too much for a simple header.
func tarEntry(r *rapid.T) Entry {
	e := Entry{
		Type:    rapid.SampledFrom([]Type{Regular, Regular, Dir, Dir, Symlink, Hardlink, Char, Fifo, Whiteout}).Draw(r, "type"),
		Path:    rapid.SampledFrom([]string{"a", ".", "a/b", "ä", "a/\xff", strings.Repeat("n", 99), strings.Repeat("n", 100), strings.Repeat("n", 101), strings.Repeat("d/", 60) + "f", strings.Repeat("d", 98) + "/f", strings.Repeat("d", 97) + "/f"}).Draw(r, "path"),
		Mode:    rapid.SampledFrom([]uint32{0, 0o644, 0o4755, 0o7777}).Draw(r, "mode"),
		UID:     rapid.SampledFrom([]int{0, 1000, 0o7777777, 0o10000000}).Draw(r, "uid"),
		GID:     rapid.SampledFrom([]int{0, 5, 0o7777777, 0o10000000}).Draw(r, "gid"),
		ModTime: rapid.SampledFrom([]int64{0, 1, -1, 1e9, 1<<33 - 1, 1 << 33}).Draw(r, "mtime"),
	}
	switch e.Type {
	case Regular:
		e.Size = rapid.SampledFrom([]int64{0, 1, 511, 512, 513, 1500, 1<<33 - 1, 1 << 33}).Draw(r, "size")
		if rapid.IntRange(0, 9).Draw(r, "xattr") == 0 {
			e.Xattrs = map[string]string{"user.x": "y"}
		}
	case Symlink, Hardlink:
		e.Link = rapid.SampledFrom([]string{"a", strings.Repeat("l", 101)}).Draw(r, "link")
	case Char:
		e.Major, e.Minor = 1, rapid.SampledFrom([]uint32{3, 1 << 20}).Draw(r, "minor")
	}
	return e
}

// An entry takes as many bytes as it says, or the tar would say something else.
func TestTarWriterRefuses(t *testing.T) {
	w := tarWriter{out: bufio.NewWriter(io.Discard)}
	if err := w.add(Entry{Path: "a", Type: Regular, Size: 3}); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write([]byte("1234")); err != tar.ErrWriteTooLong {
		t.Errorf("4 bytes of 3: %v", err)
	}
	if err := w.add(Entry{Path: "b", Type: Dir}); err == nil {
		t.Error("an entry came after 0 bytes of 3")
	}
	if err := w.Close(); err == nil {
		t.Error("a tar ended after 0 bytes of 3")
	}
}
