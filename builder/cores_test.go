package builder

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"testing"

	"filo/builder/image"
	"filo/layer"
)

// TestCores makes the same image with different numbers of cores and steps at once: its bytes may not depend on them,
// for each compression.
func TestCores(t *testing.T) {
	b := newBench(t)
	if err := os.Remove(filepath.Join(b.context, "tool")); err != nil { // big, and nothing runs
		t.Fatal(err)
	}
	r := rand.New(rand.NewPCG(1, 2))
	for i := range 300 {
		b.file(fmt.Sprintf("many/%d/%d", i%7, i), fmt.Sprint(r.Uint64(), i))
	}
	big := make([]byte, 5<<20) // of several blocks, which are compressed side by side
	for i := range big {
		big[i] = "the bytes of a file"[r.IntN(19)]
		if i/(1<<18)%2 == 0 {
			big[i] = byte(r.Uint32())
		}
	}
	if err := os.WriteFile(filepath.Join(b.context, "big"), big, 0o644); err != nil {
		t.Fatal(err)
	}
	const text = "FROM scratch AS a\nCOPY big /a\nFROM scratch AS b\nCOPY many /b\nFROM scratch\nCOPY --from=b /b /b\nCOPY --from=a /a /a\nWORKDIR /w\nCOPY . /all/\n"
	epoch := int64(1_000_000_000)
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(0))
	for _, c := range []layer.Compression{{Algorithm: layer.Gzip}, {Algorithm: layer.Gzip, Level: 1}, {Algorithm: layer.EStargz}, {Algorithm: layer.Zstd}, {Algorithm: layer.Uncompressed}} {
		want := ""
		for _, cores := range []int{1, 2, 8} {
			runtime.GOMAXPROCS(cores)
			b.state = t.TempDir()
			got := ""
			err := b.try(text, func(r *Request) { r.Epoch, r.Ships = &epoch, &c }, func(s *layer.Store, img *image.Image) {
				d, err := image.Write(t.Context(), s, img, image.WriteOptions{Compression: c, Force: true})
				if err != nil {
					t.Fatal(err)
				}
				got = d.Digest.String()
			})
			if err != nil {
				t.Fatal(err)
			}
			if want == "" {
				want = got
			}
			if got != want {
				t.Errorf("%+v: %s with %d cores, %s with one", c, got, cores, want)
			}
		}
	}
}
