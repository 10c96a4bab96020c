package layer

import (
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"

	"filo/layer/rootfs"
)

// walked goes through a directory that has nothing below it, with so many bytes of content less to keep.
func walked(t testing.TB, dir string, less int64) (nodes []*node) {
	t.Helper()
	root, err := rootfs.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	w := walker{ctx: t.Context(), root: root, lower: func(string) (*Entry, bool) { return nil, false }}
	w.kept.Store(less)
	top, err := w.walk()
	if err != nil {
		t.Fatal(err)
	}
	top.each(func(n *node) { nodes = append(nodes, n) })
	return nodes
}

// TestWalkParts goes through a directory that several goroutines share, with others in it.
func TestWalkParts(t *testing.T) {
	dir := t.TempDir()
	want := []string{"."}
	for i := range 3*part + 1 {
		name := fmt.Sprintf("%04d", i)
		want = append(want, name)
		if i%100 != 7 {
			write(t, filepath.Join(dir, name), name)
			continue
		}
		if err := os.Mkdir(filepath.Join(dir, name), 0o755); err != nil {
			t.Fatal(err)
		}
		write(t, filepath.Join(dir, name, "in"), name)
		want = append(want, name+"/in")
	}
	for _, procs := range []int{1, 2, 8} {
		old := runtime.GOMAXPROCS(procs)
		var got []string
		for _, n := range walked(t, dir, 0) {
			got = append(got, n.Path)
		}
		if !slices.Equal(got, want) {
			t.Errorf("%d processors: got %q", procs, got)
		}
		runtime.GOMAXPROCS(old)
	}
}

// TestWalkKeeps looks at what is kept of files: all of a tiny one with one name, while there is room.
func TestWalkKeeps(t *testing.T) {
	dir := t.TempDir()
	for name, size := range map[string]int{"empty": 0, "large": tinyFile + 1, "line": 20, "tiny": tinyFile, "twice": 20} {
		write(t, filepath.Join(dir, name), strings.Repeat("x", size))
	}
	if err := os.Link(filepath.Join(dir, "twice"), filepath.Join(dir, "zwice")); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		less int64
		kept []string
	}{
		{0, []string{"line", "tiny"}},
		{keptMost - 20, []string{"line"}},
		{keptMost, nil},
	} {
		var kept []string
		for _, n := range walked(t, dir, c.less) {
			if n.content == nil && n.Digest == "" {
				continue
			}
			kept = append(kept, n.Path)
			if want := strings.Repeat("x", int(n.Size)); string(n.content) != want || n.Digest != digest.FromString(want) {
				t.Errorf("%s of %d bytes: %q with digest %s", n.Path, n.Size, n.content, n.Digest)
			}
		}
		if !slices.Equal(kept, c.kept) {
			t.Errorf("with %d bytes kept before, %q are kept, want %q", c.less, kept, c.kept)
		}
	}
}

// TestWalkUnreadable finds a file that may not be read, as for a layer in which it did not change.
func TestWalkUnreadable(t *testing.T) {
	dir := t.TempDir()
	secret := filepath.Join(dir, "secret")
	write(t, secret, "x")
	if err := os.Chmod(secret, 0); err != nil {
		t.Fatal(err)
	}
	if nodes := walked(t, dir, 0); len(nodes) != 2 || nodes[1].Path != "secret" || nodes[1].Size != 1 || nodes[1].Mode != 0 {
		t.Errorf("found %d files", len(nodes))
	}
}

func write(t *testing.T, name, text string) {
	t.Helper()
	if err := os.WriteFile(name, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}
