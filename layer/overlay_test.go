package layer

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"filo/layer/rootfs"
)

// realRoot says whether ids and devices are the machine's.
func realRoot() bool { return os.Getuid() == 0 && os.Getenv("FILO_TEST_NAMESPACE") == "" }

// mayMount makes sure that the test can mount: as root it just goes on; anybody else's test
// is run again, in a user namespace, and mayMount returns false once that has passed.
func mayMount(t *testing.T) bool {
	t.Helper()
	if os.Getuid() == 0 {
		return true
	}
	cmd := exec.Command("/proc/self/exe", "-test.run=^"+t.Name()+"$", "-test.v")
	cmd.Env = append(os.Environ(), "FILO_TEST_NAMESPACE=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWUSER | syscall.CLONE_NEWNS,
		UidMappings: []syscall.SysProcIDMap{{HostID: os.Getuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{HostID: os.Getgid(), Size: 1}},
	}
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	switch {
	case err != nil && !errors.As(err, &exit):
		t.Skipf("no user namespace: %v", err)
	case err != nil:
		t.Fatalf("in a user namespace: %v\n%s", err, out)
	case strings.Contains(string(out), "--- SKIP"):
		t.Skipf("in a user namespace: %s", out)
	}
	return false
}

// mountOverlay mounts o as filo's sandbox does. The caller unmounts it.
func mountOverlay(t testing.TB, o *Overlay) (dir string, unmount func()) {
	t.Helper()
	dir = t.TempDir()
	options := fmt.Sprintf("lowerdir=%s,upperdir=%s,workdir=%s,userxattr",
		strings.Join(o.Lower, ":"), o.Upper, o.Work)
	err := unix.Mount("overlay", dir, "overlay", 0, options)
	if errors.Is(err, unix.EPERM) || errors.Is(err, unix.ENODEV) || errors.Is(err, unix.EINVAL) && !realRoot() {
		t.Skipf("mount overlay: %v", err)
	}
	if err != nil {
		t.Fatalf("mount overlay %s: %v", options, err)
	}
	unmounted := false
	unmount = func() {
		if unmounted {
			return
		}
		unmounted = true
		if err := unix.Unmount(dir, 0); err != nil {
			t.Errorf("unmount: %v", err)
		}
	}
	t.Cleanup(unmount)
	return dir, unmount
}

// facts describes a file as scan and scanView compare it. Times of directories are not
// compared: a layer does not carry a change of them alone.
func facts(e *Entry) string {
	s := fmt.Sprintf("%s %c %o %d:%d", e.Path, e.Type, e.Mode, e.UID, e.GID)
	switch e.Type {
	case Regular:
		s += fmt.Sprintf(" %d %s %d", e.Size, e.Digest.Encoded()[:12], e.ModTime)
	case Symlink:
		s += fmt.Sprintf(" -> %s %d", e.Link, e.ModTime)
	case Char, Block:
		s += fmt.Sprintf(" %d,%d %d", e.Major, e.Minor, e.ModTime)
	}
	for _, k := range slices.Sorted(maps.Keys(e.Xattrs)) {
		s += fmt.Sprintf(" %s=%q", k, e.Xattrs[k])
	}
	return s
}

// scan lists what a directory on disk holds.
func scan(t testing.TB, top string) []string {
	t.Helper()
	root, err := rootfs.Open(top)
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	w := walker{ctx: t.Context(), root: root, lower: func(string) (*Entry, bool) { return nil, false }}
	n, err := w.walk()
	if err != nil {
		t.Fatal(err)
	}
	var lines []string
	n.each(func(n *node) {
		if n.Type == Regular {
			b, err := os.ReadFile(filepath.Join(top, n.Path))
			if err != nil {
				t.Fatal(err)
			}
			sum := sha256.Sum256(b)
			n.Digest = digest.NewDigestFromBytes(digest.SHA256, sum[:])
		}
		if n.Path != "." && n.verdict != void {
			lines = append(lines, facts(&n.Entry))
		}
	})
	return lines
}

func scanView(t testing.TB, v *View) []string {
	t.Helper()
	var lines []string
	err := fs.WalkDir(v, ".", func(p string, d fs.DirEntry, err error) error {
		if err != nil || p == "." {
			return err
		}
		info, err := d.Info()
		if err == nil {
			e := *info.Sys().(*Entry)
			e.Xattrs = visibleXattrs(e.Xattrs)
			lines = append(lines, facts(&e))
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	// WalkDir goes name by name, which is the canonical order of paths.
	return lines
}

func diff(got, want []string) string {
	var lines []string
	for _, l := range got {
		if !slices.Contains(want, l) {
			lines = append(lines, "+ "+l)
		}
	}
	for _, l := range want {
		if !slices.Contains(got, l) {
			lines = append(lines, "- "+l)
		}
	}
	if len(lines) == 0 && !slices.Equal(got, want) {
		return "order differs: " + strings.Join(got, ", ")
	}
	return strings.Join(lines, "\n")
}

func overlayOf(t testing.TB, s *Store, points []MountPoint, layers ...Layer) *Overlay {
	t.Helper()
	o, err := s.Overlay(t.Context(), layers, points)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { o.Close() })
	return o
}

// unpackLayer stores a layer as it comes from a registry: directories need no entries.
func unpackLayer(t testing.TB, s *Store, files ...file) Layer {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, f := range files {
		if f.Type == Opaque {
			f = reg(path.Join(f.Path, opaqueMarker), "")
		}
		h, err := header(f.Entry)
		if err != nil {
			t.Fatal(err)
		}
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		io.WriteString(w, f.content)
	}
	w.Close()
	l := Layer{DiffID: digest.FromBytes(b.Bytes())}
	d := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayer, Digest: l.DiffID, Size: int64(b.Len())}
	s.Promise(l, d, func(context.Context) (io.ReadCloser, error) {
		return io.NopCloser(bytes.NewReader(b.Bytes())), nil
	})
	if _, err := s.Tree(t.Context(), l); err != nil {
		t.Fatal(err)
	}
	return l
}

// fakeTree makes an empty directory pass as the tree of l.
func fakeTree(t testing.TB, s *Store, l Layer) {
	t.Helper()
	if err := errors.Join(os.MkdirAll(s.treePath(l), 0o755), s.markTree(l)); err != nil {
		t.Fatal(err)
	}
}

func TestOverlayOfNothing(t *testing.T) {
	s := newStore(t)
	o := overlayOf(t, s, nil)
	if len(o.Lower) != 1 {
		t.Errorf("lowers: %v, want the stub alone", o.Lower)
	}
	if info, err := os.Stat(o.Upper); err != nil || info.Mode().Perm() != 0o755 {
		t.Errorf("upper: %v %v", info, err)
	}
	l, err := s.Snapshot(t.Context(), o, Sinks{Tree: true})
	if err != nil || l.DiffID != "sha256:5f70bf18a086007016e948b04aed3b82103a36bea41755b6cddfaf10ace3c6ef" {
		t.Errorf("empty layer: %v %v", l, err)
	}
	if err := o.Close(); err != nil {
		t.Error(err)
	}
	if _, err := os.Lstat(o.Upper); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("after Close the upper is %v", err)
	}
	failed := overlayOf(t, s, nil)
	if err := failed.Close(); err != nil {
		t.Error(err)
	}
	s.behind.Wait()
	if _, err := os.Lstat(failed.dir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("after Close without Snapshot: %v", err)
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	if _, err := os.Lstat(o.dir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("after the store was closed: %v", err)
	}
}

// A tree that somebody removed is made again before it is mounted, without a word.
func TestOverlayTreeGone(t *testing.T) {
	s := newStore(t)
	data := foreignTar(t, "f a text")
	l, _, _ := promised(t, s, data)
	tree, err := s.Tree(t.Context(), l)
	if err := errors.Join(err, s.Close(), os.RemoveAll(tree)); err != nil {
		t.Fatal(err)
	}
	s, told := repairing(t, s.Dir())
	promised(t, s, data)
	o := overlayOf(t, s, nil, l)
	text, err := os.ReadFile(filepath.Join(tree, "a"))
	if err := errors.Join(err, o.Trees.Wait(t.Context())); err != nil || string(text) != "text" || o.Lower[0] != tree {
		t.Errorf("%q in the tree, %v, mounted are %v", text, err, o.Lower)
	}
	if len(*told) > 0 {
		t.Errorf("told %q", *told)
	}
}

func TestOverlayStub(t *testing.T) {
	s := newStore(t)
	l := putLayer(t, s, dir(".", 0o711), dir("etc", 0o750), dir("proc", 0o755), dir("real", 0o700), dir("real/in", 0o711),
		reg("resolv", ""), link("run", "/var/run"), dir("var", 0o755), dir("var/run", 0o1777))
	o := overlayOf(t, s, []MountPoint{{"/proc", true}, {"proc/", true}, {"resolv", false}}, l)
	if len(o.Lower) != 1 {
		t.Errorf("lowers: %v, want no stub", o.Lower)
	}
	o = overlayOf(t, s, []MountPoint{
		{"/etc/hosts", false}, {"/run/secrets/x", false}, {"/run/secrets/y", false}, {"real/in/new/deep", true},
	}, l)
	want := []string{
		"etc d 750 0:0", "etc/hosts - 644 0:0 0 e3b0c44298fc 0",
		"real d 700 0:0", "real/in d 711 0:0", "real/in/new d 755 0:0", "real/in/new/deep d 755 0:0",
		"var d 755 0:0", "var/run d 1777 0:0", "var/run/secrets d 755 0:0",
		"var/run/secrets/x - 644 0:0 0 e3b0c44298fc 0", "var/run/secrets/y - 644 0:0 0 e3b0c44298fc 0",
	}
	if realRoot() && len(o.Lower) == 2 {
		if got := scan(t, o.Lower[0]); diff(got, want) != "" {
			t.Errorf("stub:\n%s", diff(got, want))
		}
	}
	if info, _ := os.Stat(o.Upper); info.Mode().Perm() != 0o711 {
		t.Errorf("mode of upper: %v, want 711", info.Mode())
	}
	for _, p := range []string{"/resolv/x", "/etc/passwd/../../resolv/y/z"} {
		if _, err := s.Overlay(t.Context(), []Layer{l}, []MountPoint{{p, true}}); err == nil {
			t.Errorf("mount point %s inside a file: no error", p)
		}
	}
}

func TestOverlayImpliedDirectories(t *testing.T) {
	s := newStore(t)
	base := putLayer(t, s, dir("a", 0o700), dir("a/b", 0o711), dir("c", 0o1777), dir("g", 0o755))
	over := unpackLayer(t, s, reg("a/b/f", "f"), dir("c", 0o750), reg("c/f", "f"), gone("g"))
	top := unpackLayer(t, s, reg("c/g", "g"), reg("g/h", "h"))
	o := overlayOf(t, s, nil, base, over, top)
	if len(o.Lower) != 4 {
		t.Fatalf("lowers: %v, want a stub", o.Lower)
	}
	var got []string
	err := filepath.WalkDir(o.Lower[0], func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(o.Lower[0], p)
		got = append(got, fmt.Sprintf("%s %o", rel, info.Mode().Perm()))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	if want := ". 755,a 700,a/b 711,c 750"; strings.Join(got, ",") != want {
		t.Errorf("stub: %v, want %s", got, want)
	}
}

func BenchmarkOverlay(b *testing.B) {
	for _, n := range []int{1000, 300_000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			s := newStore(b)
			small := putLayer(b, s, dir("etc", 0o755), reg("etc/f", ""))
			base := bigLayer(b, s, "base", n)
			fakeTree(b, s, base)
			layers := []Layer{small, base, small}
			for b.Loop() {
				o, err := s.Overlay(b.Context(), layers, []MountPoint{{"/etc/hosts", false}, {"/proc", true}})
				if err != nil {
					b.Fatal(err)
				}
				o.Close()
			}
		})
	}
}

func TestFindImpliedOpaque(t *testing.T) {
	for _, c := range []struct {
		entries []Entry
		want    []string
	}{
		{[]Entry{{Path: "d", Type: Dir}, {Path: "d", Type: Opaque}, {Path: "d/f", Type: Fifo}}, nil},
		{[]Entry{{Path: "d", Type: Opaque}, {Path: "d/f", Type: Fifo}}, []string{"d"}},
		{[]Entry{{Path: "a/d", Type: Opaque}, {Path: "a/d/f", Type: Fifo}}, []string{"a", "a/d"}},
	} {
		x := indexed(t, c.entries...)
		if got := x.findImplied(); !slices.Equal(got, c.want) {
			t.Errorf("implied directories of %v: got %q, want %q", c.entries, got, c.want)
		}
	}
}

func BenchmarkFindImplied(b *testing.B) {
	s := newStore(b)
	x, err := s.index(b.Context(), bigLayer(b, s, "base", 300_000))
	if err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		x.findImplied()
	}
}
