package layer

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
)

func TestChainID(t *testing.T) {
	a, b, c := Layer{digest.FromString("a")}, Layer{digest.FromString("b")}, Layer{digest.FromString("c")}
	ab := digest.FromString(a.DiffID.String() + " " + b.DiffID.String())
	for _, test := range []struct {
		layers []Layer
		want   digest.Digest
	}{
		{nil, ""},
		{[]Layer{a}, a.DiffID},
		{[]Layer{a, b}, ab},
		{[]Layer{a, b, c}, digest.FromString(ab.String() + " " + c.DiffID.String())},
	} {
		if got := ChainID(test.layers); got != test.want {
			t.Errorf("ChainID(%v) = %s, want %s", test.layers, got, test.want)
		}
	}
}

func TestOpenMakesAnImageLayout(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "new", "state")
	s := reopen(t, dir)
	var layout ocispec.ImageLayout
	var index ocispec.Index
	for name, v := range map[string]any{"oci-layout": &layout, "index.json": &index} {
		data, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil || json.Unmarshal(data, v) != nil {
			t.Errorf("%s: %q, %v", name, data, err)
		}
	}
	if layout.Version != ocispec.ImageLayoutVersion || index.SchemaVersion != 2 || index.Manifests == nil {
		t.Errorf("layout %+v, index %+v", layout, index)
	}
	// What is there stays.
	if err := os.WriteFile(filepath.Join(dir, "index.json"), []byte("mine"), 0o644); err != nil {
		t.Fatal(err)
	}
	reopen(t, dir)
	if data, _ := os.ReadFile(filepath.Join(dir, "index.json")); string(data) != "mine" {
		t.Errorf("index.json was changed to %q", data)
	}
	if s.Dir() != dir {
		t.Errorf("Dir() = %s", s.Dir())
	}
}

func TestOpenSweepsTheDead(t *testing.T) {
	dir := t.TempDir()
	s := reopen(t, dir)
	mine, err := s.Temp("x-")
	if err != nil {
		t.Fatal(err)
	}
	dead := filepath.Join(dir, "tmp", "process-dead", "work", "closed")
	err = errors.Join(os.MkdirAll(dead, 0o755), os.WriteFile(filepath.Join(dead, "f"), nil, 0o644),
		os.Chmod(dead, 0), unix.Mkfifo(filepath.Join(dir, "tmp", "fifo"), 0o600))
	if err != nil {
		t.Fatal(err)
	}
	reopen(t, dir)
	for _, gone := range []string{"process-dead", "fifo"} {
		if _, err := os.Lstat(filepath.Join(dir, "tmp", gone)); err == nil {
			t.Errorf("%s is still there", gone)
		}
	}
	if _, err := os.Stat(mine); err != nil {
		t.Errorf("a living process lost its directory: %v", err)
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(mine); err == nil {
		t.Error("Close left a temporary directory")
	}
}

func TestOpenAtOnce(t *testing.T) {
	dir := t.TempDir()
	var group sync.WaitGroup
	for range 20 {
		group.Go(func() {
			s, err := Open(dir, Options{})
			if err != nil {
				t.Error(err)
				return
			}
			if _, err := s.Temp("x-"); err != nil {
				t.Error(err)
			}
			if err := s.Close(); err != nil {
				t.Error(err)
			}
		})
	}
	group.Wait()
	if left, _ := os.ReadDir(filepath.Join(dir, "tmp")); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}

func TestLock(t *testing.T) {
	s := newStore(t)
	other := reopen(t, s.Dir())
	var inside, highest atomic.Int32
	var group sync.WaitGroup
	for i := range 20 {
		group.Go(func() {
			unlock, err := []*Store{s, other}[i%2].Lock(t.Context(), "a key/with a slash")
			if err != nil {
				t.Error(err)
				return
			}
			if inside.Add(1) > 1 {
				highest.Add(1)
			}
			runtime.Gosched()
			inside.Add(-1)
			unlock()
			unlock()
		})
	}
	group.Wait()
	if n := highest.Load(); n > 0 {
		t.Errorf("%d times there was another holder", n)
	}

	unlock, err := s.Lock(t.Context(), "a")
	if err != nil {
		t.Fatal(err)
	}
	defer unlock()
	free, err := s.Lock(t.Context(), "b")
	if err != nil {
		t.Fatal(err)
	}
	free()
	for _, store := range []*Store{s, other} {
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Millisecond)
		if _, err := store.Lock(ctx, "a"); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("lock that is held: %v", err)
		}
		cancel()
	}
}

func TestHas(t *testing.T) {
	s := newStore(t)
	built := buildLayer(t, s, Sinks{Tree: true}, odd())
	foreign, _, _ := promised(t, s, foreignTar(t, "f a 1"))
	again := reopen(t, s.Dir())
	if !s.Has(built) || !again.Has(built) || !s.Has(foreign) || again.Has(foreign) {
		t.Errorf("Has: %v %v %v %v", s.Has(built), again.Has(built), s.Has(foreign), again.Has(foreign))
	}
}

func TestPrune(t *testing.T) {
	s := newStore(t)
	blob := Compression{}
	tagged := buildLayer(t, s, Sinks{Blob: &blob, Tree: true}, []item{regular("tagged", "1")})
	kept := buildLayer(t, s, Sinks{Blob: &blob}, []item{regular("kept", "2")})
	unused := buildLayer(t, s, Sinks{Blob: &blob, Tree: true}, []item{regular("unused", "3")})
	tagImage(t, s, tagged)
	if _, err := s.PutBlob(t.Context(), "text/plain", []byte("nobody's")); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(filepath.Join(s.Dir(), "tmp", "dead"), 0o755); err != nil {
		t.Fatal(err)
	}

	other := reopen(t, s.Dir())
	everything := PruneOptions{Now: time.Now().Add(time.Hour), Choose: func(all []Item) []Item {
		return slices.DeleteFunc(all, func(it Item) bool { return it.ID == kept.DiffID.String() }) // its blob is chosen, and stays with it
	}}
	if p, err := s.Prune(t.Context(), everything); err != nil || !p.Busy || len(p.Removed) > 0 {
		t.Errorf("while another has it open: %+v, %v", p, err)
	}
	other.Close()
	nothing := everything
	nothing.Choose = func([]Item) []Item { return nil }
	if p, err := s.Prune(t.Context(), nothing); err != nil || len(p.Removed) > 0 {
		t.Errorf("nothing chosen: %+v, %v", p, err)
	}
	p, err := s.Prune(t.Context(), everything)
	if err != nil || p.Count(KindLayer) != 1 || p.Count(KindBlob) != 2 || p.Bytes == 0 || p.Busy {
		t.Errorf("%+v, %v", p, err)
	}
	for l, want := range map[Layer]bool{tagged: true, kept: true, unused: false} {
		if s.Has(l) != want {
			t.Errorf("Has(%s) = %v", l.DiffID, !want)
		}
		_, err := s.Blob(t.Context(), l, blob, false)
		if (err == nil) != want {
			t.Errorf("Blob(%s): %v", l.DiffID, err)
		}
	}
	// The shared lock is back, and a second run finds nothing.
	reopen(t, s.Dir()).Close()
	p, err = s.Prune(t.Context(), everything)
	if err != nil || p.Bytes > 0 || p.Busy || len(p.Removed) > 0 {
		t.Errorf("again: %+v, %v", p, err)
	}
}

// What was used when the clock was wrong counts as used now, and ages from now on.
func TestItemsOfTheFuture(t *testing.T) {
	s := newStore(t)
	l := buildLayer(t, s, Sinks{Tree: true}, []item{regular("a", "1")})
	now := time.Now()
	if err := os.Chtimes(s.layerDir(l), now, now.AddDate(10, 0, 0)); err != nil {
		t.Fatal(err)
	}
	seen := func(at time.Time) (used time.Time) {
		_, err := s.Prune(t.Context(), PruneOptions{Now: at, Choose: func(all []Item) []Item {
			for _, it := range all {
				if it.ID == l.DiffID.String() {
					used = it.Used
				}
			}
			return nil
		}})
		if err != nil {
			t.Fatal(err)
		}
		return used
	}
	if got := seen(now); !got.Equal(now) {
		t.Errorf("used %v, want %v", got, now)
	}
	if got := seen(now.Add(time.Hour)); got.Sub(now).Abs() > time.Second {
		t.Errorf("an hour later: used %v, want %v", got, now)
	}
	// Cache records know of uses as well.
	items, err := s.Items(t.Context(), now.Add(2*time.Hour), map[digest.Digest]time.Time{l.DiffID: now.Add(time.Hour)})
	if i := slices.IndexFunc(items, func(it Item) bool { return it.Kind == KindLayer }); err != nil || i < 0 || !items[i].Used.Equal(now.Add(time.Hour)) {
		t.Errorf("%+v, %v", items, err)
	}
}

// tagImage writes an image of l into index.json, as an index in an index.
func tagImage(t testing.TB, s *Store, l Layer) {
	t.Helper()
	put := func(mediaType string, v any) ocispec.Descriptor {
		data, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		d, err := s.PutBlob(t.Context(), mediaType, data)
		if err != nil {
			t.Fatal(err)
		}
		return d
	}
	blob, err := s.Blob(t.Context(), l, Compression{}, false)
	if err != nil {
		t.Fatal(err)
	}
	config := put(ocispec.MediaTypeImageConfig, ocispec.Image{RootFS: ocispec.RootFS{Type: "layers", DiffIDs: []digest.Digest{l.DiffID}}})
	manifest := put(ocispec.MediaTypeImageManifest, ocispec.Manifest{Config: config, Layers: []ocispec.Descriptor{blob}})
	list := put(ocispec.MediaTypeImageIndex, ocispec.Index{Manifests: []ocispec.Descriptor{manifest}})
	data, err := json.Marshal(ocispec.Index{Manifests: []ocispec.Descriptor{list}})
	if err == nil {
		err = os.WriteFile(filepath.Join(s.Dir(), "index.json"), data, 0o644)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// Two processes that make the same layer at the same time agree.
func TestSameLayerAtOnce(t *testing.T) {
	s := newStore(t)
	stores := []*Store{s, reopen(t, s.Dir())}
	c := Compression{Algorithm: Zstd}
	var mu sync.Mutex
	var ids []Layer
	var group sync.WaitGroup
	for i := range 8 {
		group.Go(func() {
			l := buildLayer(t, stores[i%2], Sinks{Blob: &c, Tree: true}, odd())
			mu.Lock()
			ids = append(ids, l)
			mu.Unlock()
		})
	}
	group.Wait()
	if len(slices.Compact(ids)) != 1 {
		t.Errorf("layers %v", ids)
	}
	if blobs := s.readBlobs(ids[0]); len(blobs) != 1 {
		t.Errorf("blobs %v", blobs)
	}
	for _, store := range stores {
		if left, _ := os.ReadDir(store.tmp); len(left) > 0 {
			t.Errorf("left: %v", left)
		}
	}
	readme, err := os.ReadFile(filepath.Join(s.Dir(), "README"))
	if err != nil || !strings.Contains(string(readme), "filo") {
		t.Errorf("README: %v", err)
	}
}
