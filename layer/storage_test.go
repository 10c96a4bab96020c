package layer

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"pgregory.net/rapid"

	"filo/layer/rootfs"
)

// storages lists those that work on the file system of dir, but overlay.
func storages(dir string) []Storage {
	if BestStorage(dir) == StorageBtrfs {
		return []Storage{StorageVFS, StorageBtrfs}
	}
	return []Storage{StorageVFS}
}

func openWith(t testing.TB, dir string, k Storage) *Store {
	t.Helper()
	s, err := Open(dir, Options{SingleID: !realRoot(), Storage: k})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

// step does what a RUN does where layers are merged.
func step(t testing.TB, s *Store, layers []Layer, points []MountPoint, sinks Sinks, do func(box)) Layer {
	t.Helper()
	o := overlayOf(t, s, points, layers...)
	do(box{t, o.Root})
	l, err := s.Snapshot(t.Context(), o, sinks)
	if err := errors.Join(err, o.Close()); err != nil {
		t.Fatal(err)
	}
	return l
}

// TestStoragesAgree does random things to an overlay and to a merged directory and wants the
// same layers from both.
func TestStoragesAgree(t *testing.T) {
	if !mayMount(t) {
		return
	}
	if !realRoot() {
		t.Skip("needs real ids: a plain directory is compared")
	}
	for _, k := range storages(t.TempDir()) {
		t.Run(string(k), func(t *testing.T) {
			rapid.Check(t, func(r *rapid.T) { agree(t, r, k) })
		})
	}
}

func agree(t *testing.T, r *rapid.T, k Storage) {
	epoch := int64(past - 1)
	a, b := newStore(t), openWith(t, t.TempDir(), k)
	defer a.Close()
	defer b.Close()
	var layers []Layer
	for range 3 {
		o, m := overlayOf(t, a, nil, layers...), overlayOf(t, b, nil, layers...)
		dir, unmount := mountOverlay(t, o)
		g := gremlin{r: r, boxes: [2]box{{t, dir}, {t, m.Root}}}
		for range rapid.IntRange(0, 25).Draw(r, "operations") {
			g.act()
		}
		g.even()
		unmount()
		x, err := a.Snapshot(t.Context(), o, Sinks{Tree: true, Epoch: &epoch})
		if err != nil {
			r.Fatal(err)
		}
		y, err := b.Snapshot(t.Context(), m, Sinks{Tree: true, Epoch: &epoch})
		if err != nil {
			r.Fatal(err)
		}
		o.Close()
		m.Close()
		if x != y {
			r.Fatalf("layer %d: overlay, then %s:\n%s", len(layers), k, diff(entries(t, b, y), entries(t, a, x)))
		}
		layers = append(layers, x)
		if rapid.Bool().Draw(r, "afresh") { // the next directory is made of trees
			for _, old := range b.pool.idle {
				old.remove()
			}
			b.pool.idle = nil
		}
	}
}

// TestMergedIsReused sees that a step goes on in the directory of the last one, and another
// chain in one of its own.
func TestMergedIsReused(t *testing.T) {
	s := openWith(t, t.TempDir(), StorageVFS)
	first := step(t, s, nil, nil, Sinks{Tree: true}, base)
	o := overlayOf(t, s, nil, first)
	root := o.Root
	if len(s.pool.idle) > 0 {
		t.Errorf("the directory of the last step is still in the pool")
	}
	box{t, root}.write("new", "text")
	second, err := s.Snapshot(t.Context(), o, Sinks{Tree: true})
	if err != nil {
		t.Fatal(err)
	}
	if got := entries(t, s, second); !slices.Equal(got, []string{"- new"}) {
		t.Errorf("second layer: %q", got)
	}
	other := overlayOf(t, s, nil, first)
	if other.Root == root {
		t.Error("the directory with the second layer is used for a chain without it")
	}
	if _, err := os.Lstat(filepath.Join(other.Root, "new")); err == nil {
		t.Error("a file of another chain is there")
	}
	third := overlayOf(t, s, nil, first, second)
	if third.Root != root {
		t.Error("the directory of the chain is not used again")
	}
	box{t, third.Root}.rm("a")
	if err := third.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Lstat(third.Root); err == nil {
		t.Error("a directory with changes that are no layer is still there")
	}
	fourth := overlayOf(t, s, nil, first, second)
	if _, err := os.Lstat(filepath.Join(fourth.Root, "a/x")); err != nil {
		t.Error(err)
	}
}

// TestMergedAddsLayers puts layers with deletions on top of a merged directory.
func TestMergedAddsLayers(t *testing.T) {
	s := openWith(t, t.TempDir(), StorageVFS)
	low := unpackLayer(t, s, dir("a", 0o750), dir("a/b", 0o755), reg("a/b/f", "one"), reg("a/x", "x"), reg("a/y", "y"),
		dir("gone", 0o755), reg("gone/f", ""), reg("kind", "file"), dir("kind2", 0o755), reg("kind2/f", ""))
	o := overlayOf(t, s, nil, low)
	o.merged = nil
	s.giveBack(&merged{dir: o.dir, layers: []Layer{low}, files: mustSurvey(t, o.Root)})
	high := unpackLayer(t, s, dir("a", 0o700), reg("a/.wh.x", ""), dir("a/b", 0o711), reg("a/b/.wh..wh..opq", ""), reg("a/b/g", "two"),
		reg(".wh.gone", ""), dir("kind", 0o755), reg("kind/f", "now a directory"), reg("kind2", "now a file"), reg("implied/f", "no directory entry"))
	o = overlayOf(t, s, nil, low, high)
	defer o.Close()
	want := scanView(t, viewOf(t, s, low, high))
	if d := diff(scan(t, o.Root), want); !s.single && d != "" {
		t.Errorf("merged directory and view:\n%s", d)
	}
	l, err := s.Snapshot(t.Context(), o, Sinks{Tree: true})
	if err != nil {
		t.Fatal(err)
	}
	if got := entries(t, s, l); len(got) != 0 {
		t.Errorf("nothing was done, and the layer has %q", got)
	}
}

func mustSurvey(t testing.TB, dir string) *known {
	t.Helper()
	root := openRoot(t, dir)
	k, err := survey(t.Context(), root)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// TestMergedMountPoints wants mount points that the layers lack to leave no trace.
func TestMergedMountPoints(t *testing.T) {
	s := openWith(t, t.TempDir(), StorageVFS)
	low := step(t, s, nil, nil, Sinks{Tree: true}, base)
	points := []MountPoint{{"/proc", true}, {"/a/made/deep", true}, {"/a/file", false}, {"/a/x", false}, {"/used/one", true}}
	l := step(t, s, []Layer{low}, points, Sinks{Tree: true}, func(b box) {
		for _, p := range points {
			if _, err := os.Lstat(b.at(p.Path)); err != nil {
				t.Error(err)
			}
		}
		b.write("used/new", "")
	})
	if got := entries(t, s, l); !slices.Equal(got, []string{"d used", "- used/new"}) {
		t.Errorf("layer with %q", got)
	}
	empty := step(t, s, []Layer{low, l}, points, Sinks{Tree: true}, func(box) {})
	if got := entries(t, s, empty); len(got) != 0 {
		t.Errorf("nothing was done, and the layer has %q", got)
	}
}

// TestMergedSeesQuickChanges changes files in place, same size, same mtime, at once after the last step.
func TestMergedSeesQuickChanges(t *testing.T) {
	s := openWith(t, t.TempDir(), StorageVFS)
	layers := []Layer{step(t, s, nil, nil, Sinks{Tree: true}, func(b box) { b.write("f", "0000") })}
	for i := range 20 {
		text := fmt.Sprintf("%04d", i+1)
		l := step(t, s, layers, nil, Sinks{Tree: true}, func(b box) { b.write("f", text) })
		layers = append(layers, l)
		f, err := viewOf(t, s, layers...).Open("f")
		if err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(f)
		if err := errors.Join(err, f.Close()); err != nil || string(got) != text {
			t.Fatalf("step %d: the view has %q, want %q (%v)", i, got, text, err)
		}
	}
}

// TestMergedTimes wants directories of which only the time changed to have their old one again.
func TestMergedTimes(t *testing.T) {
	s := openWith(t, t.TempDir(), StorageVFS)
	low := step(t, s, nil, nil, Sinks{Tree: true}, func(b box) { base(b); b.stamp("a", past) })
	none := step(t, s, []Layer{low}, nil, Sinks{Tree: true}, func(b box) { b.write("a/t", ""); b.rm("a/t") })
	if got := entries(t, s, none); len(got) != 0 {
		t.Errorf("layer with %q", got)
	}
	step(t, s, []Layer{low, none}, nil, Sinks{Tree: true}, func(b box) {
		if info, err := os.Lstat(b.at("a")); err != nil || info.ModTime().Unix() != past {
			t.Errorf("a is of %v, %v", info.ModTime(), err)
		}
	})
}

// TestPart copies parts of layers.
func TestPart(t *testing.T) {
	s := openWith(t, t.TempDir(), StorageVFS)
	low := step(t, s, nil, nil, Sinks{Tree: true}, base)
	for _, c := range []struct{ path, want string }{{"/a", "a/sub/f"}, {"/a/l", "a/l"}, {"/", "a/sub/f"}, {"a/sub", "a/sub/f"}} {
		o, err := s.Part(t.Context(), []Layer{low}, c.path)
		if err != nil {
			t.Fatalf("Part(%s): %v", c.path, err)
		}
		if info, err := os.Lstat(filepath.Join(o.Root, c.want)); err != nil || !info.Mode().IsRegular() {
			t.Errorf("Part(%s): %v %v", c.path, info, err)
		}
		if err := o.Close(); err != nil {
			t.Error(err)
		}
	}
	if _, err := s.Part(t.Context(), []Layer{low}, "/nowhere"); err == nil {
		t.Error("Part of what is not there: no error")
	}
}

// TestBtrfs does the tests of this file again on a btrfs of their own.
func TestBtrfs(t *testing.T) {
	if os.Getuid() != 0 || !realRoot() {
		t.Skip("only root can mount btrfs")
	}
	mkfs, err := exec.LookPath("mkfs.btrfs")
	if err != nil {
		t.Skip(err)
	}
	disk, dir := filepath.Join(t.TempDir(), "disk"), t.TempDir()
	if err := os.WriteFile(disk, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(disk, 512<<20); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command(mkfs, "-q", disk).CombinedOutput(); err != nil {
		t.Skipf("mkfs.btrfs: %v\n%s", err, out)
	}
	if out, err := exec.Command("mount", "-o", "loop", disk, dir).CombinedOutput(); err != nil {
		t.Skipf("mount: %v\n%s", err, out)
	}
	t.Cleanup(func() { unix.Unmount(dir, 0) })
	s := openWith(t, filepath.Join(dir, "state"), StorageBtrfs)
	low := step(t, s, nil, nil, Sinks{Tree: true}, base)
	one := step(t, s, []Layer{low}, nil, Sinks{Tree: true}, func(b box) { b.write("one", "1"); b.rm("a/x") })
	two := step(t, s, []Layer{low}, nil, Sinks{Tree: true}, func(b box) { b.write("two", "2"); b.chmod("a", 0o700) })
	for l, want := range map[Layer][]string{one: {"d a", "w a/x", "- one"}, two: {"d a 700", "- two"}} {
		if got := entries(t, s, l); !slices.Equal(got, want) {
			t.Errorf("layer with %q, want %q", got, want)
		}
	}
	t.Setenv("TMPDIR", dir)
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	t.Run("agree", TestStoragesAgree)
}

// BenchmarkStatWalk is what a step costs that does nothing, in 300,000 files.
func BenchmarkStatWalk(b *testing.B) {
	top := b.TempDir()
	fill(b, top, 300_000)
	root := openRoot(b, top)
	k, err := survey(context.Background(), root)
	if err != nil {
		b.Fatal(err)
	}
	o := &Overlay{Root: top}
	for b.Loop() {
		w := &statWalk{ctx: b.Context(), root: root, walker: &walker{ctx: b.Context(), root: root, below: o, lower: func(string) (*Entry, bool) { return nil, false }}}
		start := time.Now()
		if _, err := w.walk(k); err != nil {
			b.Fatal(err)
		}
		b.ReportMetric(time.Since(start).Seconds(), "s/walk")
	}
}

// fill makes n files, ten in a directory.
func fill(t testing.TB, top string, n int) {
	for i := range n {
		d := filepath.Join(top, fmt.Sprintf("d%03d/e%03d", i/1000, i/10%100))
		if i%10 == 0 {
			if err := os.MkdirAll(d, 0o755); err != nil {
				t.Fatal(err)
			}
		}
		if err := os.WriteFile(filepath.Join(d, fmt.Sprintf("file-%d", i)), []byte(strings.Repeat("x", i%100)), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

func openRoot(t testing.TB, dir string) *rootfs.Root {
	t.Helper()
	root, err := rootfs.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { root.Close() })
	return root
}
