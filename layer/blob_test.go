package layer

import (
	"bytes"
	"context"
	"errors"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

func TestCompressionCheck(t *testing.T) {
	for c, ok := range map[Compression]bool{
		{}: true, {Level: 9}: true, {Level: 10}: false, {Level: -1}: false,
		{Algorithm: Zstd, Level: 22}: true, {Algorithm: Zstd, Level: 23}: false,
		{Algorithm: Uncompressed}: true, {Algorithm: Uncompressed, Level: 1}: false,
		{Algorithm: EStargz, Level: 9}: true, {Algorithm: EStargz, Level: 10}: false,
		{Algorithm: "xz"}: false,
	} {
		if err := c.Check(); (err == nil) != ok {
			t.Errorf("%v: %v", c, err)
		}
	}
}

func TestAlgorithmOf(t *testing.T) {
	for mediaType, want := range map[string]string{
		"application/vnd.oci.image.layer.v1.tar":                       Uncompressed,
		"application/vnd.oci.image.layer.v1.tar+gzip":                  Gzip,
		"application/vnd.oci.image.layer.v1.tar+zstd":                  Zstd,
		"application/vnd.oci.image.layer.nondistributable.v1.tar":      Uncompressed,
		"application/vnd.oci.image.layer.nondistributable.v1.tar+gzip": Gzip,
		"application/vnd.oci.image.layer.nondistributable.v1.tar+zstd": Zstd,
		"application/vnd.docker.image.rootfs.diff.tar":                 Uncompressed,
		"application/vnd.docker.image.rootfs.diff.tar.gzip":            Gzip,
		"application/vnd.docker.image.rootfs.diff.tar.zstd":            Zstd,
		"application/vnd.docker.image.rootfs.foreign.diff.tar.gzip":    Gzip,
		"application/vnd.docker.image.rootfs.foreign.diff.tar":         Uncompressed,
		"application/vnd.oci.image.layer.v1.tar+gzip+encrypted":        "",
		"application/vnd.oci.image.config.v1+json":                     "",
		"application/vnd.cncf.helm.chart.content.v1.tar+gzip":          "",
		"application/vnd.oci.image.layer.v1.erofs":                     "",
		"": "",
	} {
		if got, err := algorithmOf(ocispec.Descriptor{MediaType: mediaType}); got != want || (err == nil) != (want != "") {
			t.Errorf("algorithmOf(%q) = %q, %v", mediaType, got, err)
		}
	}
}

// Media types lie; the first bytes do not.
func TestDecompressor(t *testing.T) {
	text := []byte(strings.Repeat("some text ", 200_000))
	encoder, _ := zstd.NewWriter(nil)
	var zipped, twice bytes.Buffer
	for _, w := range []*bytes.Buffer{&zipped, &twice, &twice} {
		z := gzip.NewWriter(w)
		z.Write(text)
		z.Close()
	}
	skip := append([]byte{0x5e, 0x2a, 0x4d, 0x18, 3, 0, 0, 0}, "abc"...)
	for name, test := range map[string]struct {
		in   []byte
		want []byte
	}{
		"tar":     {text, text},
		"nothing": {nil, nil},
		"gzip":    {zipped.Bytes(), text},
		"members": {twice.Bytes(), append(bytes.Clone(text), text...)},
		"zstd":    {encoder.EncodeAll(text, nil), text},
		"skipped": {append(skip, encoder.EncodeAll(text, nil)...), text},
	} {
		r, _, err := decompressor(bytes.NewReader(test.in))
		if err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(r)
		if err != nil || !bytes.Equal(got, test.want) {
			t.Errorf("%s: %d bytes, %v", name, len(got), err)
		}
		r.Close()
		if len(test.in) < 100 || name == "tar" {
			continue
		}
		r, _, err = decompressor(bytes.NewReader(test.in[:len(test.in)-5]))
		if err == nil {
			_, err = io.ReadAll(r)
			r.Close()
		}
		if err == nil {
			t.Errorf("%s: end is missing, and no error", name)
		}
	}
}

// Closing early ends the goroutine, wherever it is.
func TestDecompressorClosedEarly(t *testing.T) {
	var zipped bytes.Buffer
	z := gzip.NewWriter(&zipped)
	io.CopyN(z, zeroReader{}, 10<<20)
	z.Close()
	for _, n := range []int{0, 1, 1 << 20} {
		r, _, err := decompressor(bytes.NewReader(zipped.Bytes()))
		if err != nil {
			t.Fatal(err)
		}
		io.CopyN(io.Discard, r, int64(n))
		r.Close()
		r.Close()
	}
}

// From every form of a layer every other can be made, with the same diff ID.
func TestBlobFromAnything(t *testing.T) {
	all := []Compression{{Level: 6}, {Algorithm: Zstd}, {Algorithm: Uncompressed}, {Level: 1}, {Algorithm: EStargz}}
	for _, from := range append([]Compression{{Algorithm: "tree"}}, all...) {
		for _, to := range all {
			s := newStore(t)
			k := Sinks{Blob: &from}
			if from.Algorithm == "tree" {
				k = Sinks{Tree: true}
			}
			l := buildLayer(t, s, k, odd())
			d, err := s.Blob(t.Context(), l, to, true)
			if err != nil {
				t.Errorf("%v from %v: %v", to, from, err)
				continue
			}
			want := newStore(t)
			wantLayer := buildLayer(t, want, Sinks{Blob: &to}, odd())
			wantBlob, err := want.Blob(t.Context(), wantLayer, to, true)
			if err != nil || d.Digest != wantBlob.Digest || d.MediaType != wantBlob.MediaType || d.Size != wantBlob.Size {
				t.Errorf("%v from %v: %v, want %v, %v", to, from, d, wantBlob, err)
			}
		}
	}
}

func TestBlobPrefersWhatExists(t *testing.T) {
	s := newStore(t)
	l := buildLayer(t, s, Sinks{Blob: &Compression{Level: 1}}, odd())
	blob := func(c Compression, force bool) ocispec.Descriptor {
		t.Helper()
		d, err := s.Blob(t.Context(), l, c, force)
		if err != nil {
			t.Fatal(err)
		}
		return d
	}
	first := blob(Compression{}, false)
	if d := blob(Compression{Algorithm: Zstd}, false); d.Digest != first.Digest {
		t.Errorf("zstd not forced: %v, want the gzip %v", d, first)
	}
	if d := blob(Compression{}, true); d.Digest != first.Digest {
		t.Errorf("gzip of any level forced: %v, want %v", d, first)
	}
	best := blob(Compression{Level: 9}, true)
	if best.Digest == first.Digest {
		t.Error("level 9 is level 1")
	}
	z := blob(Compression{Algorithm: Zstd}, true)
	if z.MediaType != ocispec.MediaTypeImageLayerZstd {
		t.Errorf("forced zstd is %v", z)
	}
	if d := blob(Compression{Algorithm: Zstd}, false); d.Digest != z.Digest {
		t.Errorf("of two the other was taken: %v", d)
	}
}

func TestPromisedBlob(t *testing.T) {
	s := newStore(t)
	l, d, fetches := promised(t, s, foreignTar(t, "f b 1", "f a 2"))
	got, err := s.Blob(t.Context(), l, Compression{Algorithm: Zstd}, false)
	if err != nil || got.Digest != d.Digest || fetches.Load() != 0 {
		t.Errorf("Blob: %v, %v, %d fetches", got, err, fetches.Load())
	}
	r, size, err := s.OpenBlob(t.Context(), d.Digest)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	data, err := io.ReadAll(r)
	if err != nil || size != d.Size || digest.FromBytes(data) != d.Digest {
		t.Errorf("OpenBlob: %d bytes of %d, %v", len(data), size, err)
	}
	got, err = s.Blob(t.Context(), l, Compression{Algorithm: Zstd}, true)
	if err != nil || got.MediaType != ocispec.MediaTypeImageLayerZstd || fetches.Load() != 1 {
		t.Errorf("forced: %v, %v, %d fetches", got, err, fetches.Load())
	}
	fresh := newStore(t)
	promised(t, fresh, foreignTar(t, "f b 1", "f a 2"))
	if again, err := fresh.Blob(t.Context(), l, Compression{Algorithm: Zstd}, true); err != nil || again.Digest != got.Digest {
		t.Errorf("forced at once: %v, %v", again, err)
	}
}

// A foreign layer whose blob is gone has a tree that makes another tar: that
// must never be given out as the layer.
func TestBlobFromForeignTree(t *testing.T) {
	s := newStore(t)
	l, d, _ := promised(t, s, foreignTar(t, "f b 1", "f a 2"))
	if _, err := s.Tree(t.Context(), l); err != nil {
		t.Fatal(err)
	}
	again := reopen(t, s.Dir())
	if err := os.Remove(s.blobPath(d.Digest)); err != nil {
		t.Fatal(err)
	}
	if _, err := again.Blob(t.Context(), l, Compression{}, false); err == nil || !strings.Contains(err.Error(), "unpacked files make") {
		t.Errorf("Blob: %v", err)
	}
}

// A damaged blob is mended, or else fetched again.
func TestDamagedBlob(t *testing.T) {
	for _, c := range []struct {
		size    int
		parity  bool
		fetches int32
	}{{-1, true, 1}, {0, true, 1}, {-1, false, 2}, {0, false, 2}} {
		s := newStore(t)
		l, d, fetches := promised(t, s, foreignTar(t, "f a 1"))
		if _, err := s.index(t.Context(), l); err != nil {
			t.Fatal(err)
		}
		path := s.blobPath(d.Digest)
		data, _ := os.ReadFile(path)
		data[len(data)-6] ^= 1
		if err := os.WriteFile(path, data[:len(data)+c.size], 0o644); err != nil {
			t.Fatal(err)
		}
		if !c.parity {
			if err := os.Remove(s.parityPath(d.Digest)); err != nil {
				t.Fatal(err)
			}
		}
		r, _, err := s.OpenBlob(t.Context(), d.Digest)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadAll(r); !errors.Is(err, errMismatch) {
			t.Errorf("read of a damaged blob: %v", err)
		}
		r.Close()
		r, _, err = s.OpenBlob(t.Context(), d.Digest)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadAll(r); err != nil || fetches.Load() != c.fetches {
			t.Errorf("second read: %v, %d fetches", err, fetches.Load())
		}
		r.Close()
	}
}

// A tree is made although the stored blob is damaged, if the promise holds.
func TestTreeDespiteDamagedBlob(t *testing.T) {
	s := newStore(t)
	l, d, _ := promised(t, s, foreignTar(t, "f a 1"))
	if _, err := s.index(t.Context(), l); err != nil {
		t.Fatal(err)
	}
	data, _ := os.ReadFile(s.blobPath(d.Digest))
	data[20] ^= 1
	if err := os.WriteFile(s.blobPath(d.Digest), data, 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Tree(t.Context(), l); err != nil {
		t.Error(err)
	}
}

func TestSmallBlobs(t *testing.T) {
	s := newStore(t)
	d, err := s.PutBlob(t.Context(), "application/json", []byte("{}"))
	if err != nil || d.Digest != digest.FromString("{}") || d.Size != 2 || d.MediaType != "application/json" {
		t.Errorf("PutBlob: %v, %v", d, err)
	}
	if data, err := s.ReadBlob(t.Context(), d.Digest); string(data) != "{}" || err != nil {
		t.Errorf("ReadBlob: %q, %v", data, err)
	}
	if err := os.WriteFile(s.blobPath(d.Digest), []byte("[]"), 0o644); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if _, err := s.ReadBlob(t.Context(), d.Digest); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("damaged: %v", err)
		}
	}
	if _, err := s.PutBlob(t.Context(), "application/json", []byte("{}")); err != nil {
		t.Error(err)
	}
	if _, err := s.ReadBlob(t.Context(), d.Digest); err != nil {
		t.Error(err)
	}
	for _, bad := range []digest.Digest{"", "sha256:../x", "md5:00", digest.Digest("sha512:" + strings.Repeat("0", 128))} {
		if _, err := s.ReadBlob(t.Context(), bad); err == nil {
			t.Errorf("ReadBlob(%q) succeeds", bad)
		}
		if _, _, err := s.OpenBlob(t.Context(), bad); err == nil {
			t.Errorf("OpenBlob(%q) succeeds", bad)
		}
	}
	if _, _, err := s.OpenBlob(t.Context(), digest.FromString("none")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("unknown blob: %v", err)
	}
}

func TestBlobIsCalledOff(t *testing.T) {
	s := newStore(t)
	l := buildLayer(t, s, Sinks{Tree: true}, odd())
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := s.Blob(ctx, l, Compression{}, false); !errors.Is(err, context.Canceled) {
		t.Errorf("Blob: %v", err)
	}
	if w, err := s.Create(ctx, Sinks{Tree: true}); err == nil {
		if err := w.Add(folder("a").Entry, nil); !errors.Is(err, context.Canceled) {
			t.Errorf("Add: %v", err)
		}
		w.Abort()
	}
}

// Other tools can read what is written.
func TestBlobsOutside(t *testing.T) {
	s := newStore(t)
	for algorithm, unpack := range map[string][]string{
		Gzip: {"gzip", "-dc"}, Zstd: {"zstd", "-dcq"}, Uncompressed: {"cat"},
	} {
		if _, err := exec.LookPath(unpack[0]); err != nil {
			t.Logf("%s: %v", algorithm, err)
			continue
		}
		c := Compression{Algorithm: algorithm}
		l := buildLayer(t, s, Sinks{Blob: &c}, odd())
		d, err := s.Blob(t.Context(), l, c, true)
		if err != nil {
			t.Fatal(err)
		}
		cmd := exec.Command("sh", "-c", strings.Join(unpack, " ")+" | tar -tvf -")
		if cmd.Stdin, err = os.Open(filepath.Join(s.Dir(), "blobs", "sha256", d.Digest.Encoded())); err != nil {
			t.Fatal(err)
		}
		out, err := cmd.CombinedOutput()
		if lines := bytes.Count(out, []byte("\n")); err != nil || lines != len(odd()) {
			t.Errorf("%s: %d lines, %v\n%s", algorithm, lines, err, out)
		}
	}
}

func BenchmarkSmallLayer(b *testing.B) {
	s := newStore(b)
	files := []item{folder("etc"), regular("etc/hostname", "x")}
	for b.Loop() {
		buildLayer(b, s, Sinks{Blob: &Compression{}}, files)
	}
}

// TestGzipAgain compresses with a compressor that was used before: what it made then changes nothing.
func TestGzipAgain(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	used := newStore(t)
	for _, level := range []int{1, 6} {
		for i := range 5 {
			data := make([]byte, r.IntN(2<<20))
			for i := range data {
				data[i] = "some bytes of a file"[r.IntN(20)]
			}
			made := func(s *Store) []byte {
				var b bytes.Buffer
				z, err := s.compressor(Compression{Gzip, level}, &b)
				if err == nil {
					_, err = z.Write(data)
				}
				if err != nil {
					t.Fatal(err)
				}
				if err := z.Close(); err != nil {
					t.Fatal(err)
				}
				return b.Bytes()
			}
			if !bytes.Equal(made(used), made(newStore(t))) {
				t.Errorf("level %d, time %d: other bytes than of a new compressor", level, i+1)
			}
		}
	}
}

// damagedBlob is a stored blob of ten bytes of which one was changed.
func damagedBlob(t *testing.T, s *Store) ocispec.Descriptor {
	t.Helper()
	d, err := s.PutBlob(t.Context(), "text/plain", []byte("some bytes"))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(s.blobPath(d.Digest), []byte("same bytes"), 0o644); err != nil {
		t.Fatal(err)
	}
	return d
}

// TestDamagedBlobOfTheEpoch wants a blob to be read that has the time that tools which pin times give to files.
func TestDamagedBlobOfTheEpoch(t *testing.T) {
	s := newStore(t)
	d := damagedBlob(t, s)
	if err := os.Chtimes(s.blobPath(d.Digest), time.Unix(0, 0), time.Unix(0, 0)); err != nil {
		t.Fatal(err)
	}
	if s.hasBlob(d) {
		t.Error("a damaged blob is right")
	}
}

// Who knows how long a blob is and stops there learns as well that it is damaged, before having all of it.
func TestDamagedBlobBySize(t *testing.T) {
	s := newStore(t)
	d := damagedBlob(t, s)
	r, size, err := s.OpenBlob(t.Context(), d.Digest)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	n, err := io.ReadFull(r, make([]byte, size))
	if !errors.Is(err, ErrDamaged) || n == int(size) {
		t.Errorf("read %d of %d bytes: %v, want ErrDamaged", n, size, err)
	}
}
