package rootfs

import (
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"
)

// trap makes a root with an outside directory beside it that must stay untouched.
func trap(t *testing.T) (r *Root, dir, outside string) {
	t.Helper()
	top := t.TempDir()
	dir, outside = filepath.Join(top, "root"), filepath.Join(top, "outside")
	for _, d := range []string{dir, outside} {
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(outside, "secret"), []byte("secret"), 0o644); err != nil {
		t.Fatal(err)
	}
	r, err := Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		r.Close()
		names, _ := os.ReadDir(outside)
		if len(names) != 1 {
			t.Errorf("outside the root: %v, want the secret alone", names)
		}
	})
	return r, dir, outside
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestLinksStayInside(t *testing.T) {
	r, dir, outside := trap(t)
	must(t, r.Mkdir("etc", 0o755))
	must(t, os.WriteFile(filepath.Join(dir, "etc/secret"), []byte("mine"), 0o644))
	for name, target := range map[string]string{
		"abs": "/etc", "up": "../../../../../../etc", "out": outside, "rel": "../outside", "loop": "loop",
	} {
		must(t, r.Symlink(target, name))
	}
	for _, c := range []struct {
		path, want string
		err        error
	}{
		{"abs/secret", "mine", nil},
		{"/abs/secret", "mine", nil},
		{"up/secret", "mine", nil},
		{"../../etc/secret", "mine", nil},
		{"etc/../../etc/secret", "mine", nil},
		{"out/secret", "", fs.ErrNotExist},
		{"rel/secret", "", fs.ErrNotExist},
		{"loop/x", "", unix.ELOOP},
	} {
		f, err := r.OpenFile(c.path, os.O_RDONLY, 0)
		if c.err != nil {
			if !errors.Is(err, c.err) {
				t.Errorf("OpenFile(%q): %v, want %v", c.path, err, c.err)
			}
			continue
		}
		must(t, err)
		b, _ := io.ReadAll(f)
		f.Close()
		if string(b) != c.want {
			t.Errorf("OpenFile(%q) reads %q, want %q", c.path, b, c.want)
		}
	}
}

func TestMagicLinksAreRefused(t *testing.T) {
	r, err := Open("/proc")
	must(t, err)
	defer r.Close()
	if _, err := r.Dir("self/root"); !errors.Is(err, unix.ELOOP) {
		t.Errorf("Dir(self/root): %v, want ELOOP", err)
	}
}

func TestMkdirAll(t *testing.T) {
	r, dir, _ := trap(t)
	must(t, r.Mkdir("var", 0o755))
	must(t, r.Symlink("/run/deep", "var/run"))
	must(t, r.Symlink("var", "v"))
	must(t, r.Symlink("../../../outside/new", "escape"))
	must(t, r.Mknod("file", unix.S_IFREG|0o644, 0, 0))
	for _, c := range []struct{ path, made string }{
		{"a/b/c", "a/b/c"},
		{"v/run/x", "run/deep/x"},
		{"v/../w/./y", "w/y"},
		{"a/b/../../../../top", "top"},
		{"escape", "outside/new"},
		{"", "."},
	} {
		d, err := r.MkdirAll(c.path, 0o755)
		if err != nil {
			t.Errorf("MkdirAll(%q): %v", c.path, err)
			continue
		}
		d.Close()
		if st, err := os.Lstat(filepath.Join(dir, c.made)); err != nil || !st.IsDir() {
			t.Errorf("MkdirAll(%q): %s was not made: %v", c.path, c.made, err)
		}
	}
	if _, err := r.MkdirAll("file/x", 0o755); !errors.Is(err, unix.ENOTDIR) {
		t.Errorf("MkdirAll(file/x): %v, want ENOTDIR", err)
	}
}

func TestDirRefusesPaths(t *testing.T) {
	r, _, _ := trap(t)
	d, err := r.Dir("/")
	must(t, err)
	defer d.Close()
	for _, name := range []string{"", "..", "a/b", "/etc", "a\x00b", "../outside/x"} {
		_, openErr := d.OpenFile(name, os.O_RDONLY, 0)
		_, statErr := d.Lstat(name)
		for call, err := range map[string]error{
			"OpenFile": openErr, "Lstat": statErr, "Mkdir": d.Mkdir(name, 0o755),
			"Symlink": d.Symlink("x", name), "RemoveAll": d.RemoveAll(name),
			"Chmod": d.Chmod(name, 0), "SetXattr": d.SetXattr(name, "user.a", "b"),
			"Link": d.Link(d, "x", name), "Rename": d.Rename("x", d, name),
		} {
			if !errors.Is(err, unix.EINVAL) {
				t.Errorf("%s(%q): %v, want EINVAL", call, name, err)
			}
		}
	}
}

func TestList(t *testing.T) {
	r, _, outside := trap(t)
	must(t, r.Mkdir("d", 0o755))
	must(t, r.Symlink(outside, "out"))
	must(t, r.Mknod("fifo", unix.S_IFIFO|0o600, 0, 0))
	must(t, r.Mknod("a\n\xff", unix.S_IFREG|0o600, 0, 0))
	d, err := r.Dir(".")
	must(t, err)
	defer d.Close()
	want := []Listed{{"a\n\xff", unix.S_IFREG}, {"d", unix.S_IFDIR}, {"fifo", unix.S_IFIFO}, {"out", unix.S_IFLNK}}
	for range 2 { // each call starts from the beginning
		if got, err := d.List(); err != nil || !slices.Equal(got, want) {
			t.Errorf("List = %+v, %v, want %+v", got, err, want)
		}
	}
}

func TestReader(t *testing.T) {
	r, dir, outside := trap(t)
	must(t, os.WriteFile(filepath.Join(dir, "f"), []byte("0123456789"), 0o644))
	must(t, r.Set("f", Attr{Time: &Time{Sec: 1000}}))
	must(t, r.Symlink("f", "link"))
	must(t, r.Symlink("/", "here"))
	must(t, r.Symlink(outside, "out"))
	must(t, r.Mknod("fifo", unix.S_IFIFO|0o600, 0, 0))
	for name, want := range map[string]string{"f": "0123456789", "here/f": "0123456789", "fifo": ""} {
		f, err := r.Read(name)
		must(t, err)
		if n, err := f.Read(nil); n != 0 || err != nil {
			t.Errorf("%s: Read of nothing = %d, %v", name, n, err)
		}
		if b, err := io.ReadAll(f); string(b) != want || err != nil {
			t.Errorf("%s: read %q, %v, want %q", name, b, err, want)
		}
		must(t, f.Close())
	}
	var st unix.Stat_t
	must(t, unix.Stat(filepath.Join(dir, "f"), &st))
	if st.Atim.Sec != 1000 {
		t.Errorf("to read a file changed its access time to %d", st.Atim.Sec)
	}
	for name, want := range map[string]error{"link": unix.ELOOP, "out/secret": fs.ErrNotExist, "a\x00": unix.EINVAL} {
		if _, err := r.Read(name); !errors.Is(err, want) {
			t.Errorf("Read(%q) = %v, want %v", name, err, want)
		}
	}
	etc, err := Open("/etc") // of somebody else, for an ordinary user
	must(t, err)
	defer etc.Close()
	f, err := etc.Read("passwd")
	must(t, err)
	defer f.Close()
	if _, err := io.ReadAll(f); err != nil {
		t.Error(err)
	}
	d, err := r.Read(".") // opens, and says what it is when it is read
	must(t, err)
	defer d.Close()
	if _, err := d.Read(make([]byte, 1)); !errors.Is(err, unix.EISDIR) {
		t.Errorf("Read of a directory: %v", err)
	}
}

func TestAttributesOfLinksNotTargets(t *testing.T) {
	r, dir, outside := trap(t)
	must(t, r.Symlink(filepath.Join(outside, "secret"), "link"))
	before, err := os.Stat(filepath.Join(outside, "secret"))
	must(t, err)
	must(t, r.Set("link", Attr{Mode: Mode(0o7777), Time: &Time{Sec: 7}}))
	after, _ := os.Stat(filepath.Join(outside, "secret"))
	if before.Mode() != after.Mode() || !before.ModTime().Equal(after.ModTime()) {
		t.Errorf("Set(link) changed its target: %v %v", after.Mode(), after.ModTime())
	}
	if st, _ := r.Lstat("link"); st.Sec != 7 {
		t.Errorf("time of link: %d, want 7", st.Sec)
	}
	f, err := r.OpenFile("link", os.O_RDONLY|unix.O_NOFOLLOW, 0)
	if err == nil {
		f.Close()
		t.Error("OpenFile(link, O_NOFOLLOW) opened it")
	}
	must(t, r.Mknod("f", unix.S_IFREG|0o600, 0, 0))
	d, err := r.Dir("")
	must(t, err)
	defer d.Close()
	if err := d.SetXattr("f", "user.a", "v"); errors.Is(err, unix.EOPNOTSUPP) {
		t.Skip("no user xattrs in " + dir)
	}
	must(t, d.Set("f", Attr{Mode: Mode(0o4751), Xattrs: map[string]string{"user.b": ""}}))
	got, err := d.Xattrs("f", func(k string) bool { return k != "security.selinux" })
	if err != nil || len(got) != 2 || got["user.a"] != "v" {
		t.Errorf("Xattrs(f): %v %v", got, err)
	}
	if st, _ := d.Lstat("f"); st.Mode != unix.S_IFREG|0o4751 {
		t.Errorf("mode of f: %o", st.Mode)
	}
	must(t, d.RemoveXattr("f", "user.a"))
	must(t, d.RemoveXattr("f", "user.a"))
	must(t, d.chmodOld("f", 0o640))
	must(t, d.chmodOld("link", 0o640))
	if st, _ := d.Lstat("f"); st.FileMode() != 0o640 {
		t.Errorf("mode of f: %v", st.FileMode())
	}
}

func TestRemoveAll(t *testing.T) {
	r, dir, outside := trap(t)
	d, err := r.MkdirAll("a/b/c", 0o755)
	must(t, err)
	must(t, d.Symlink(outside, "out"))
	must(t, d.Mkdir("locked", 0o755))
	must(t, os.WriteFile(filepath.Join(dir, "a/b/c/locked/f"), nil, 0o444))
	must(t, d.Chmod("locked", 0))
	d.Close()
	must(t, r.Symlink(outside, "out"))
	must(t, r.RemoveAll("a"))
	must(t, r.RemoveAll("out"))
	must(t, r.RemoveAll("never/there"))
	if names, _ := os.ReadDir(dir); len(names) != 0 {
		t.Errorf("left: %v", names)
	}
}

// TestSwappedLink lets an attacker flip a directory and a link to the outside as fast as it
// can while paths through it are written: nothing may ever appear outside.
func TestSwappedLink(t *testing.T) {
	r, dir, outside := trap(t)
	must(t, os.MkdirAll(filepath.Join(dir, "real/sub"), 0o755))
	must(t, os.Symlink(outside, filepath.Join(dir, "link")))
	var stop atomic.Bool
	done := make(chan struct{})
	go func() {
		defer close(done)
		a, b := filepath.Join(dir, "real"), filepath.Join(dir, "link")
		for !stop.Load() {
			unix.Renameat2(unix.AT_FDCWD, a, unix.AT_FDCWD, b, unix.RENAME_EXCHANGE)
		}
	}()
	for range 3000 {
		if f, err := r.OpenFile("real/x", os.O_CREATE|os.O_WRONLY, 0o600); err == nil {
			f.Close()
		}
		if f, err := r.OpenFile("real/sub/../secret", os.O_RDONLY, 0); err == nil {
			f.Close()
			t.Fatal("the secret was opened")
		}
		if d, err := r.MkdirAll("real/sub/new", 0o755); err == nil {
			d.Close()
		}
		r.Symlink("y", "real/y")
		r.Set("real/secret", Attr{Mode: Mode(0o777)})
		r.RemoveAll("real/secret")
		r.RemoveAll("real/sub/new")
	}
	stop.Store(true)
	<-done
	if b, err := os.ReadFile(filepath.Join(outside, "secret")); err != nil || string(b) != "secret" {
		t.Errorf("the secret: %q %v", b, err)
	}
}

func BenchmarkOpen(b *testing.B) {
	dir := b.TempDir()
	os.MkdirAll(filepath.Join(dir, "a/b/c"), 0o755)
	os.WriteFile(filepath.Join(dir, "a/b/c/f"), nil, 0o644)
	os.Symlink("/a/b", filepath.Join(dir, "l"))
	r, err := Open(dir)
	if err != nil {
		b.Fatal(err)
	}
	defer r.Close()
	for b.Loop() {
		f, err := r.OpenFile("l/c/f", os.O_RDONLY, 0)
		if err != nil {
			b.Fatal(err)
		}
		f.Close()
	}
}
