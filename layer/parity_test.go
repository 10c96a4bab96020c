package layer

import (
	"bytes"
	"errors"
	"io/fs"
	"math/rand/v2"
	"os"
	"slices"
	"testing"
)

// noise is bytes that cannot be compressed.
func noise(n int) []byte {
	b := make([]byte, n)
	r := rand.New(rand.NewPCG(1, uint64(n)))
	for i := range b {
		b[i] = byte(r.Uint32())
	}
	return b
}

// parityOf writes data in pieces of changing length.
func parityOf(data []byte) *parity {
	p := &parity{}
	for n := 1; len(data) > 0; n = n*3%9973 + 1 {
		n = min(n, len(data))
		p.Write(data[:n])
		data = data[n:]
	}
	return p
}

func TestParity(t *testing.T) {
	const burst = (parityRows-1)*parityBlock + 1 // touches no more blocks than there are rows, wherever it is
	for _, size := range []int{1, 100, parityBlock - 1, parityBlock, parityBlock + 1, parityRows * parityBlock, parityRows*parityBlock + 1, 300_001} {
		good := noise(size)
		file := parityOf(good).encode()
		p := decodeParity(file)
		if p == nil {
			t.Fatalf("%d bytes: its parity is not read", size)
		}
		try := func(what string, bad []byte, want bool) {
			t.Helper()
			var out bytes.Buffer
			err := p.mend(bytes.NewReader(bad), &out)
			if want != (err == nil) || want && !bytes.Equal(out.Bytes(), good) {
				t.Errorf("%d bytes, %s: %v", size, what, err)
			}
		}
		try("whole", good, true)
		for at := 0; at < size; at += 1 + size/50 {
			try("flipped", flip(good, at), true)
			bad := slices.Clone(good)
			clear(bad[at:min(size, at+burst)])
			try("zeros", bad, true)
			try("cut", good[:max(at, size-burst)], true)
			file := flip(file, at%len(file))
			if decodeParity(file) != nil {
				t.Errorf("%d bytes: a damaged parity is taken", size)
			}
		}
		try("nothing", nil, size <= parityRows*parityBlock)
		try("longer", append(slices.Clone(good), 1), true)
		if size > parityRows*parityBlock {
			bad := flip(flip(good, 0), parityRows*parityBlock)
			try("two of a row", bad, false)
		}
	}
}

func FuzzParity(f *testing.F) {
	f.Add(parityOf(noise(5000)).encode(), []byte("x"))
	f.Add([]byte(parityMagic), []byte{})
	f.Fuzz(func(t *testing.T, file, bad []byte) {
		if p := decodeParity(file); p != nil {
			_ = p.mend(bytes.NewReader(bad), &bytes.Buffer{})
		}
	})
}

// TestParityOfBlob damages the blobs of layers that have no tree: a small one comes back whatever happens to it, of a large
// one what a disk loses at one place.
func TestParityOfBlob(t *testing.T) {
	for what, wrong := range wrongs {
		for _, size := range []int{1000, 700_000} {
			s := newStore(t)
			c := Compression{}
			l := buildLayer(t, s, Sinks{Blob: &c}, []item{regular("f", string(noise(size)))})
			d, err := s.Blob(t.Context(), l, c, true)
			if err != nil {
				t.Fatal(err)
			}
			good, err := os.ReadFile(s.blobPath(d.Digest))
			if err != nil {
				t.Fatal(err)
			}
			if err := errors.Join(s.Keep(t.Context(), nil, digestsOf(d)), wrong(s.blobPath(d.Digest))); err != nil {
				t.Fatal(err)
			}
			again, told := repairing(t, s.Dir())
			err = again.Ensure(t.Context(), d.Digest)
			if what == "flipped, and no time tells" { // nobody looks for that
				again.damaged(t.Context(), d.Digest)
			}
			now, readErr := os.ReadFile(s.blobPath(d.Digest))
			info, _ := os.Stat(s.blobPath(d.Digest))
			if size > 100_000 && (what == "cut" || what == "empty" || what == "gone") {
				if !errors.Is(err, fs.ErrNotExist) || !errors.Is(readErr, fs.ErrNotExist) {
					t.Errorf("%s, %d bytes: %v, want fs.ErrNotExist", what, size, err)
				}
				continue
			}
			if err != nil || !bytes.Equal(now, good) || info.Mode().Perm() != onDisk || !again.stamped(info) {
				t.Errorf("%s, %d bytes: %v, %v, it has %d of %d bytes", what, size, err, readErr, len(now), len(good))
			}
			if !slices.Equal(*told, []string{"blob " + d.Digest.String()}) {
				t.Errorf("%s, %d bytes: told %q", what, size, *told)
			}
		}
	}
}

// A layer that has a tree needs no parity.
func TestNoParity(t *testing.T) {
	s := newStore(t)
	l := buildLayer(t, s, Sinks{Tree: true}, odd())
	d, err := s.Blob(t.Context(), l, Compression{}, false)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(s.parityPath(d.Digest)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("it has one: %v", err)
	}
}

func BenchmarkParity(b *testing.B) {
	data := noise(1 << 20)
	b.SetBytes(int64(len(data)))
	p := &parity{}
	for b.Loop() {
		p.Write(data)
		p.sums = p.sums[:0]
	}
}
