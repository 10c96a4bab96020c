package remote

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// mountOf makes a cache mount with files.
func newMount(t *testing.T, id string, files map[string]string) Mount {
	t.Helper()
	dir := t.TempDir()
	for name, content := range files {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return Mount{ID: id, Identity: "identity of " + id, Dir: dir, Hold: func(context.Context) (func(), error) { return func() {}, nil }}
}

func (r *runner) exportMounts(to string, all ...Mount) {
	r.t.Helper()
	if err := r.open(nil, []string{to + ",cache-mounts=true"}).Export(r.t.Context(), nil, all); err != nil {
		r.t.Fatal(err)
	}
}

// restored returns the file f of a cache mount as the source has it; "" for none.
func (r *runner) restored(from, id string) string {
	r.t.Helper()
	m := newMount(r.t, id, nil)
	if !r.open([]string{from}, nil).Restore(r.t.Context(), m, m.Dir) {
		return ""
	}
	b, err := os.ReadFile(filepath.Join(m.Dir, "f"))
	if err != nil {
		r.t.Fatal(err)
	}
	return string(b)
}

func TestMounts(t *testing.T) {
	for name, place := range places(t) {
		t.Run(name, func(t *testing.T) {
			p := place(t)
			a := newRunner(t)
			a.exportMounts(p.to, newMount(t, "go", map[string]string{"f": "1"}), newMount(t, "npm", map[string]string{"f": "2"}))
			a.export(a.open(nil, []string{p.to}), a.make("one", "1", true)) // a target without mounts keeps them
			b := newRunner(t)
			b.exportMounts(p.to, newMount(t, "go", map[string]string{"f": "3", "g": "new"}))
			d := newRunner(t)
			from := p.from + ",cache-mounts=true"
			for id, want := range map[string]string{"go": "3", "npm": "2", "other": ""} {
				if got := d.restored(from, id); got != want {
					t.Errorf("cache mount %s has %q, want %q", id, got, want)
				}
			}
			if got := d.restored(p.from, "go"); got != "" {
				t.Errorf("without cache-mounts=true cache mount go has %q", got)
			}
			d.want(d.open([]string{from}, nil), "one", "1")
			if len(a.warnings)+len(b.warnings)+len(d.warnings) > 0 {
				t.Errorf("warnings: %q %q %q", a.warnings, b.warnings, d.warnings)
			}
		})
	}
}

// The same files are not written again, and a mount that no build has had for long goes.
func TestMountsAge(t *testing.T) {
	dir := t.TempDir()
	to, from := "type=local,dest="+dir, "type=local,cache-mounts=true,src="+dir
	r := newRunner(t)
	m := newMount(t, "go", map[string]string{"f": "1"})
	index := func() string {
		b, err := os.ReadFile(filepath.Join(dir, "index.json"))
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	r.exportMounts(to, m)
	first := index()
	r.now = r.now.Add(time.Hour)
	r.exportMounts(to, m)
	if index() != first {
		t.Error("the same files were written again")
	}
	r.now = r.now.Add(20 * 24 * time.Hour)
	r.exportMounts(to, newMount(t, "npm", map[string]string{"f": "2"}))
	if got := r.restored(from, "go"); got != "1" {
		t.Errorf("after 20 days cache mount go has %q", got)
	}
	r.now = r.now.Add(20 * 24 * time.Hour)
	r.exportMounts(to, newMount(t, "pip", map[string]string{"f": "3"}))
	if got := r.restored(from, "go"); got != "" {
		t.Errorf("40 days after its last use cache mount go has %q", got)
	}
	// Of those that hold too much together the ones used last stay.
	r.exportMounts(to+",cache-mounts-max=1B", newMount(t, "cargo", map[string]string{"f": "4"}))
	for id, want := range map[string]string{"npm": "", "cargo": "4"} {
		if got := r.restored(from, id); got != want {
			t.Errorf("with room for one byte cache mount %s has %q, want %q", id, got, want)
		}
	}
	r.exportMounts(to+",cache-mounts-max=1B", newMount(t, "big", map[string]string{"f": "55"}))
	if len(r.warnings) != 1 || !strings.Contains(r.warnings[0], "more than cache-mounts-max=1B") {
		t.Errorf("warnings: %q, want one about a mount that is too large", r.warnings)
	}
}

// A mount whose blobs are gone or damaged begins empty, and its next export is whole again.
func TestMountsLost(t *testing.T) {
	for name, spoil := range map[string]func(path string) error{
		"gone":    os.Remove,
		"damaged": func(path string) error { return os.WriteFile(path, []byte("something else"), 0o644) },
	} {
		for part := range 2 {
			dir := t.TempDir()
			to, from := "type=local,dest="+dir, "type=local,cache-mounts=true,src="+dir
			m := newMount(t, "go", map[string]string{"f": "1"})
			a := newRunner(t)
			a.exportMounts(to, m)
			b := newRunner(t)
			c := b.open([]string{from}, []string{to + ",cache-mounts=true"})
			k, _ := m.key()
			e, ok := c.sources[0].findMount(t.Context(), k)
			if !ok {
				t.Fatal("no cache mount")
			}
			if err := spoil(filepath.Join(dir, "blobs", "sha256", e.parts[part].Blob.Digest.Encoded())); err != nil {
				t.Fatal(err)
			}
			got := newMount(t, "go", nil)
			if c.Restore(t.Context(), got, got.Dir) {
				t.Errorf("%s, part %d: Restore = true", name, part)
			}
			if len(b.warnings) != 1 || !strings.Contains(b.warnings[0], "cache mount go") || strings.Contains(b.warnings[0], "\n") {
				t.Errorf("%s, part %d: warnings %q, want one about the mount", name, part, b.warnings)
			}
			if err := c.Export(t.Context(), nil, []Mount{m}); err != nil {
				t.Fatal(err)
			}
			if got := newRunner(t).restored(from, "go"); got != "1" {
				t.Errorf("%s, part %d: after it was exported again the mount has %q", name, part, got)
			}
		}
	}
}
