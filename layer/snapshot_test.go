package layer

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	"pgregory.net/rapid"
)

// past is the mtime of all files that tests make, unless they say otherwise.
const past = 1_000_000_000

// box is a directory in which a test plays the program of a RUN.
type box struct {
	t   interface{ Fatal(...any) }
	dir string
}

func (b box) at(p string) string { return filepath.Join(b.dir, p) }

func (b box) do(err error) {
	if err != nil {
		b.t.Fatal(err)
	}
}

func (b box) write(p, text string) {
	b.do(os.WriteFile(b.at(p), []byte(text), 0o644))
	b.stamp(p, past)
}
func (b box) mkdir(p string)             { b.do(os.Mkdir(b.at(p), 0o755)) }
func (b box) rm(p string)                { b.do(os.RemoveAll(b.at(p))) }
func (b box) chmod(p string, m uint32)   { b.do(unix.Chmod(b.at(p), m)) }
func (b box) ln(old, p string)           { b.do(os.Link(b.at(old), b.at(p))) }
func (b box) symlink(target, p string)   { b.do(os.Symlink(target, b.at(p))); b.stamp(p, past) }
func (b box) mknod(p string, m, dev int) { b.do(unix.Mknod(b.at(p), uint32(m), dev)); b.stamp(p, past) }
func (b box) xattr(p, k, v string)       { b.do(unix.Lsetxattr(b.at(p), k, []byte(v), 0)) }
func (b box) stamp(p string, sec int64) {
	ts := unix.NsecToTimespec(sec * 1e9)
	b.do(unix.UtimesNanoAt(unix.AT_FDCWD, b.at(p), []unix.Timespec{ts, ts}, unix.AT_SYMLINK_NOFOLLOW))
}

// run does what a RUN does and checks what must hold after any of them: the view shows what
// the overlay showed, and so does a mount of all layers.
func run(t testing.TB, s *Store, layers []Layer, points []MountPoint, sinks Sinks, do func(box)) Layer {
	t.Helper()
	o := overlayOf(t, s, points, layers...)
	dir, unmount := mountOverlay(t, o)
	do(box{t, dir})
	want := scan(t, dir)
	waited := false
	o.Gone = func() {
		waited = true
		if _, err := os.Lstat(o.Upper); err != nil {
			t.Errorf("the upper was taken while it was mounted: %v", err)
		}
		unmount()
	}
	l, err := s.Snapshot(t.Context(), o, sinks)
	if err != nil {
		t.Fatal(err)
	}
	if !waited {
		t.Error("Snapshot did not wait until the overlay was not mounted any more")
	}
	if err := o.Close(); err != nil {
		t.Error(err)
	}
	if sinks.Epoch != nil || points != nil {
		return l
	}
	all := append(slices.Clone(layers), l)
	if s.single { // then only the index knows owners
		want = nil
	}
	check(t, s, want, all)
	return l
}

// check compares view and mount of layers with what should be there.
func check(t testing.TB, s *Store, want []string, layers []Layer) {
	t.Helper()
	shown := scanView(t, viewOf(t, s, layers...))
	if d := diff(shown, want); want != nil && d != "" {
		t.Errorf("view:\n%s", d)
	}
	o := overlayOf(t, s, nil, layers...)
	dir, unmount := mountOverlay(t, o)
	mounted := scan(t, dir)
	unmount()
	if d := diff(mounted, shown); !s.single && d != "" {
		t.Errorf("mount of the layers, compared with their view:\n%s", d)
	}
	o.Close()
}

// entries lists a layer: type, mode and path, and the target of links.
func entries(t testing.TB, s *Store, l Layer) []string {
	t.Helper()
	x, err := s.index(t.Context(), l)
	if err != nil {
		t.Fatal(err)
	}
	lines := []string{}
	for e := range x.all() {
		line := fmt.Sprintf("%c %s", e.Type, e.Path)
		if e.Mode != 0o644 && e.Type == Regular || e.Mode != 0o755 && e.Type == Dir {
			line += fmt.Sprintf(" %o", e.Mode)
		}
		if e.Link != "" {
			line += " -> " + e.Link
		}
		lines = append(lines, line)
	}
	return lines
}

func base(b box) {
	b.mkdir("a")
	b.mkdir("a/sub")
	for _, f := range []string{"a/x", "a/y", "a/sub/f", "top"} {
		b.write(f, "content of "+f)
	}
	b.symlink("x", "a/l")
	b.write("a/empty", "")
	b.mkdir("tmp")
	b.chmod("tmp", 0o1777)
	b.write("h1", "linked")
	b.ln("h1", "h2")
	b.write("long", long("a"))
}

// long is the text of a file that is not tiny.
func long(text string) string { return strings.Repeat(text, tinyFile+1) }

func TestSnapshot(t *testing.T) {
	if !mayMount(t) {
		return
	}
	s := newStore(t)
	lower := run(t, s, nil, nil, Sinks{Tree: true}, base)
	for _, c := range []struct {
		name string
		do   func(box)
		want []string
	}{
		{"nothing", func(b box) {}, nil},
		{"file made and deleted", func(b box) { b.write("tmp/q", "x"); b.rm("tmp/q") }, nil},
		{"chmod to the same", func(b box) { b.chmod("a/x", 0o644); b.chmod("tmp", 0o1777) }, nil},
		{"same content written again", func(b box) { b.write("a/x", "content of a/x") }, nil},
		{"same content written again within the second", func(b box) {
			for _, p := range []string{"a/x", "a/empty"} {
				ts := unix.NsecToTimespec(past*1e9 + 5)
				b.do(unix.UtimesNanoAt(unix.AT_FDCWD, b.at(p), []unix.Timespec{ts, ts}, 0))
			}
		}, []string{"d a", "- a/empty", "- a/x"}},
		{"names of any bytes", func(b box) { b.write("\xff\n", ""); b.write("\\", "") }, []string{"- \\", "- \xff\n"}},
		{"other content, same size and time", func(b box) { b.write("a/x", "content of a/z") },
			[]string{"d a", "- a/x"}},
		{"same long content written again", func(b box) { b.write("long", long("a")) }, nil},
		{"other long content", func(b box) { b.write("long", long("b")) }, []string{"- long"}},
		{"touch", func(b box) { b.stamp("a/x", past+1) }, []string{"d a", "- a/x"}},
		{"touch of a directory", func(b box) { b.stamp("a/sub", past+1) }, nil},
		{"touch of a link", func(b box) { b.stamp("a/l", past+1) }, []string{"d a", "l a/l -> x"}},
		{"chmod of directories", func(b box) { b.chmod("a/sub", 0o2700) }, []string{"d a", "d a/sub 2700"}},
		{"chmod of the root", func(b box) { b.chmod(".", 0o711) }, []string{"d . 711"}},
		{"delete", func(b box) { b.rm("a/x"); b.rm("a/y"); b.rm("a/sub") },
			[]string{"d a", "w a/sub", "w a/x", "w a/y"}},
		{"delete a directory", func(b box) { b.rm("a") }, []string{"w a"}},
		{"make it again", func(b box) { b.rm("a"); b.mkdir("a"); b.write("a/new", "") },
			[]string{"d a", "w a/empty", "w a/l", "- a/new", "w a/sub", "w a/x", "w a/y"}},
		{"make it again, deep", func(b box) {
			b.rm("a")
			b.mkdir("a")
			b.mkdir("a/sub")
			b.write("a/sub/g", "")
			b.write("a/x", "content of a/x")
		}, []string{"d a", "w a/empty", "w a/l", "d a/sub", "w a/sub/f", "- a/sub/g", "w a/y"}},
		{"make it again as it was", func(b box) { b.rm("a"); b.mkdir("a"); b.mkdir("a/sub"); rest(b) }, nil},
		{"directory becomes link", func(b box) { b.rm("a"); b.symlink("/tmp", "a") }, []string{"l a -> /tmp"}},
		{"directory becomes file", func(b box) { b.rm("a"); b.write("a", "f") }, []string{"- a"}},
		{"file becomes directory", func(b box) { b.rm("top"); b.mkdir("top"); b.write("top/f", "") },
			[]string{"d top", "- top/f"}},
		{"rename", func(b box) { b.do(os.Rename(b.at("top"), b.at("a/top"))) },
			[]string{"d a", "- a/top", "w top"}},
		{"rename of a made directory", func(b box) {
			b.mkdir("n")
			b.write("n/f", "1")
			b.do(os.Rename(b.at("n"), b.at("m")))
		}, []string{"d m", "- m/f"}},
		{"hard links", func(b box) { b.write("z", "z"); b.ln("z", "a/z"); b.mkdir("zz"); b.ln("z", "zz/z") },
			[]string{"d a", "- a/z", "h z -> a/z", "d zz", "h zz/z -> a/z"}},
		{"hard links of what is no file", func(b box) {
			b.symlink("x", "s1")
			b.ln("s1", "s2")
			b.mknod("fifo", unix.S_IFIFO|0o600, 0)
			b.ln("fifo", "a/fifo")
		}, []string{"d a", "p a/fifo", "h fifo -> a/fifo", "l s1 -> x", "h s2 -> s1"}},
		{"deletions, which share an inode in an overlay", func(b box) {
			b.do(os.Remove(b.at("h1")))
			b.do(os.Remove(b.at("h2")))
			b.do(os.Remove(b.at("top")))
		}, []string{"w h1", "w h2", "w top"}},
		{"new name of an old file", func(b box) { b.ln("top", "pot") }, []string{"- pot"}},
		{"chmod of one name", func(b box) { b.chmod("h1", 0o600) }, []string{"- h1 600"}},
		{"special files", func(b box) {
			b.mknod("fifo", unix.S_IFIFO|0o600, 0)
			b.mknod("sock", unix.S_IFSOCK|0o600, 0)
			b.mkdir("only")
			b.mknod("only/sock", unix.S_IFSOCK|0o600, 0)
			b.write("su", "")
			b.chmod("su", 0o4755)
		}, []string{"p fifo", "d only", "- su 4755"}},
		{"order of names", func(b box) { b.mkdir("o"); b.write("o/f", ""); b.write("o.f", ""); b.write("o-", "") },
			[]string{"d o", "- o/f", "- o-", "- o.f"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			l := run(t, s, []Layer{lower}, nil, Sinks{Tree: true}, c.do)
			if got := entries(t, s, l); strings.Join(got, ", ") != strings.Join(c.want, ", ") {
				t.Errorf("layer:\n%s\nwant:\n%s", strings.Join(got, "\n"), strings.Join(c.want, "\n"))
			}
			// The tree must do without what was dropped.
			tree, err := s.Tree(t.Context(), l)
			if err != nil {
				t.Fatal(err)
			}
			n := 0
			filepath.WalkDir(tree, func(p string, _ os.DirEntry, err error) error { n++; return err })
			if len(c.want) == 0 && n != 1 {
				t.Errorf("tree of an empty layer holds %d files", n-1)
			}
		})
	}
}

// rest makes what base has in a, but for the directories.
func rest(b box) {
	for _, f := range []string{"a/x", "a/y", "a/sub/f"} {
		b.write(f, "content of "+f)
	}
	b.write("a/empty", "")
	b.symlink("x", "a/l")
}

func TestSnapshotOfDevicesAndOwners(t *testing.T) {
	if !realRoot() {
		t.Skip("only root can make devices and give files away")
	}
	s := newStore(t)
	lower := run(t, s, nil, nil, Sinks{Tree: true}, base)
	l := run(t, s, []Layer{lower}, nil, Sinks{Tree: true}, func(b box) {
		b.mknod("null", unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3)))
		b.mknod("loop", unix.S_IFBLK|0o660, int(unix.Mkdev(7, 300)))
		b.do(os.Lchown(b.at("a/l"), 5, 6))
		b.do(os.Lchown(b.at("top"), 0, 0))
		b.do(os.Lchown(b.at("tmp"), 3_000_000, 7))
		b.xattr("a/x", "user.note", "hi")
		b.xattr("a/x", "trusted.secret", "no")
		b.xattr("a/sub", "trusted.overlay.opaque", "y")
		b.xattr("a/sub", "user.sub", "")
		b.xattr("top", "security.capability", "\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00")
	})
	want := "d a, l a/l -> x, d a/sub, - a/x, b loop, c null, d tmp 1777, - top"
	if got := strings.Join(entries(t, s, l), ", "); got != want {
		t.Errorf("layer: %s, want %s", got, want)
	}
	v := viewOf(t, s, lower, l)
	if e, _ := v.Entry("a/x"); len(e.Xattrs) != 1 || e.Xattrs["user.note"] != "hi" {
		t.Errorf("xattrs of a/x: %q", e.Xattrs)
	}
	if e, _ := v.Entry("top"); len(e.Xattrs["security.capability"]) != 20 {
		t.Errorf("xattrs of top: %q", e.Xattrs)
	}
	if e, _ := v.Entry("tmp"); e.UID != 3_000_000 || e.GID != 7 {
		t.Errorf("owner of tmp: %d:%d", e.UID, e.GID)
	}
	if e, _ := v.Entry("loop"); e.Major != 7 || e.Minor != 300 {
		t.Errorf("loop: %d,%d", e.Major, e.Minor)
	}
}

func TestSnapshotKeepsOwnersItCannotSee(t *testing.T) {
	dir := t.TempDir()
	s, err := Open(dir, Options{SingleID: true})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	owned := reg("f", "text")
	owned.UID, owned.GID = 1000, 1001
	l := putLayer(t, s, owned)
	o := overlayOf(t, s, nil, l)
	for name, text := range map[string]string{"f": "other", "new": "new"} {
		if err := os.WriteFile(filepath.Join(o.Upper, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	l2, err := s.Snapshot(t.Context(), o, Sinks{Tree: true})
	if err != nil {
		t.Fatal(err)
	}
	v := viewOf(t, s, l, l2)
	for name, want := range map[string]string{"f": "1000:1001", "new": "0:0"} {
		if e, _ := v.Entry(name); fmt.Sprintf("%d:%d", e.UID, e.GID) != want {
			t.Errorf("owner of %s: %d:%d, want %s", name, e.UID, e.GID, want)
		}
	}
}

func TestSnapshotLeavesMountPointsOut(t *testing.T) {
	if !mayMount(t) {
		return
	}
	s := newStore(t)
	lower := run(t, s, nil, nil, Sinks{Tree: true}, base)
	points := []MountPoint{{"/etc/hosts", false}, {"/a/sub/m/n", true}, {"/opt/k", true}}
	for _, c := range []struct {
		name string
		do   func(box)
		want string
	}{
		{"unused", func(b box) { b.stamp("etc", past) }, ""},
		{"removed", func(b box) { b.rm("etc"); b.rm("a/sub/m") }, ""},
		{"chmod to the same", func(b box) { b.chmod("opt", 0o755); b.chmod("etc/hosts", 0o644) }, ""},
		{"used", func(b box) { b.write("etc/x", ""); b.chmod("opt", 0o700); b.write("opt/y", ""); b.rm("opt/y") },
			"d etc, - etc/x, d opt 700"},
	} {
		l := run(t, s, []Layer{lower}, points, Sinks{Tree: true}, c.do)
		if got := strings.Join(entries(t, s, l), ", "); got != c.want {
			t.Errorf("%s: layer: %s, want %s", c.name, got, c.want)
		}
		check(t, s, nil, []Layer{lower, l})
	}
}

func TestSnapshotRefusesWhiteoutNames(t *testing.T) {
	s := newStore(t)
	o := overlayOf(t, s, nil)
	if err := os.WriteFile(filepath.Join(o.Upper, ".wh.q"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Snapshot(t.Context(), o, Sinks{Tree: true}); err == nil || !strings.Contains(err.Error(), ".wh.q") {
		t.Errorf("file .wh.q: %v", err)
	}
}

func TestSnapshotOfDeepTree(t *testing.T) {
	s := newStore(t)
	o := overlayOf(t, s, nil)
	deep := strings.TrimSuffix(strings.Repeat("d/", 400), "/")
	if err := os.MkdirAll(filepath.Join(o.Upper, deep), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(o.Upper, deep, "f"), []byte("deep"), 0o644); err != nil {
		t.Fatal(err)
	}
	l, err := s.Snapshot(t.Context(), o, Sinks{Tree: true})
	if err != nil {
		t.Fatal(err)
	}
	if b, err := fs.ReadFile(viewOf(t, s, l), deep+"/f"); err != nil || string(b) != "deep" {
		t.Errorf("read 400 directories deep: %q %v", b, err)
	}
}

func TestSnapshotClampsTimes(t *testing.T) {
	if !mayMount(t) {
		return
	}
	s := newStore(t)
	epoch := int64(past + 10)
	l := run(t, s, nil, nil, Sinks{Tree: true, Epoch: &epoch}, func(b box) {
		b.write("old", "")
		b.write("new", "x")
		b.stamp("new", past+100)
		b.symlink("x", "l")
		b.stamp("l", past+100)
		b.mkdir("d")
	})
	x, err := s.index(t.Context(), l)
	if err != nil {
		t.Fatal(err)
	}
	tree, err := s.Tree(t.Context(), l)
	if err != nil {
		t.Fatal(err)
	}
	for e := range x.all() {
		want := epoch
		if e.Path == "old" {
			want = past
		}
		info, err := os.Lstat(filepath.Join(tree, e.Path))
		if err != nil || e.ModTime != want || info.ModTime().Unix() != want {
			t.Errorf("%s: index %d, tree %v %v, want %d", e.Path, e.ModTime, info.ModTime().Unix(), err, want)
		}
	}
}

// TestSnapshotOfAnything does random things to an overlay and to a plain directory, three
// layers long, and wants views and mounts to look like the plain directory.
func TestSnapshotOfAnything(t *testing.T) {
	if !mayMount(t) {
		return
	}
	if !realRoot() {
		t.Skip("needs real ids: a plain directory is compared")
	}
	rapid.Check(t, func(r *rapid.T) {
		s := newStore(t)
		plain := box{t, t.TempDir()}
		var layers []Layer
		for range 3 {
			o := overlayOf(t, s, nil, layers...)
			dir, unmount := mountOverlay(t, o)
			g := gremlin{r: r, boxes: [2]box{{t, dir}, plain}}
			for range rapid.IntRange(0, 25).Draw(r, "operations") {
				g.act()
			}
			g.even()
			unmount()
			l, err := s.Snapshot(t.Context(), o, Sinks{Tree: true})
			if err != nil {
				r.Fatal(err)
			}
			o.Close()
			layers = append(layers, l)
			want := scan(t, plain.dir)
			if d := diff(scanView(t, viewOf(t, s, layers...)), want); d != "" {
				r.Fatalf("view of %d layers:\n%s", len(layers), d)
			}
			check(t, s, want, layers)
		}
	})
}

// gremlin does the same to two directories. Files with several names are not changed in
// place: overlayfs parts them then, unlike other file systems.
type gremlin struct {
	r     *rapid.T
	boxes [2]box
	time  int64
}

func (g *gremlin) path() string {
	parts := rapid.SliceOfN(rapid.SampledFrom([]string{"a", "b", "c", "a.b"}), 1, 3).Draw(g.r, "path")
	return strings.Join(parts, "/")
}

func (g *gremlin) act() {
	p, q := g.path(), g.path()
	text := rapid.SampledFrom([]string{"", "one", "two", long("1"), long("2")}).Draw(g.r, "text")
	mode := rapid.SampledFrom([]uint32{0o644, 0o755, 0o4700, 0o1777}).Draw(g.r, "mode")
	op := rapid.SampledFrom([]string{"mkdir", "mkdir", "mkdir", "write", "write", "write", "rm", "mv", "ln",
		"symlink", "chmod", "chown", "touch", "xattr", "fifo", "recreate"}).Draw(g.r, "op")
	g.time++
	var results [2]bool
	for i, b := range g.boxes {
		results[i] = g.one(b, op, p, q, text, mode) == nil
	}
	if results[0] != results[1] {
		g.r.Fatalf("%s %s %s: overlay %v, plain %v", op, p, q, results[0], results[1])
	}
}

func (g *gremlin) one(b box, op, p, q, text string, mode uint32) error {
	at, to := b.at(p), b.at(q)
	var st unix.Stat_t
	if unix.Lstat(g.boxes[1].at(p), &st) == nil && st.Mode&unix.S_IFMT != unix.S_IFDIR && st.Nlink > 1 &&
		slices.Contains([]string{"write", "chmod", "chown", "touch", "xattr"}, op) {
		return nil
	}
	isLink := st.Mode&unix.S_IFMT == unix.S_IFLNK
	switch op {
	case "mkdir":
		return os.Mkdir(at, 0o755)
	case "write":
		f, err := os.OpenFile(at, os.O_WRONLY|os.O_CREATE|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0o644)
		if err != nil {
			return err
		}
		f.Truncate(0)
		f.WriteString(text)
		f.Close()
	case "rm":
		if _, err := os.Lstat(at); err != nil {
			return err
		}
		return os.RemoveAll(at)
	case "mv":
		if st.Mode&unix.S_IFMT != unix.S_IFDIR {
			var other unix.Stat_t
			if unix.Lstat(g.boxes[1].at(q), &other) == nil && other.Ino == st.Ino {
				return nil // rename(2) leaves both names of one file; overlayfs may have parted them
			}
			return os.Rename(at, to)
		}
		// A directory of a lower layer can't be renamed; mv(1) copies then, here the top will do.
		if err := os.Mkdir(to, 0o700); err != nil {
			return err
		}
		return os.RemoveAll(at)
	case "recreate":
		// os.RemoveAll opens the parent if it can't unlink, and waits for ever if that is a fifo.
		if info, err := os.Lstat(filepath.Dir(at)); err != nil || !info.IsDir() {
			return unix.ENOTDIR
		}
		if err := os.RemoveAll(at); err != nil {
			return err
		}
		return errors.Join(os.Mkdir(at, 0o755), os.Mkdir(filepath.Join(at, "b"), 0o755))
	case "ln":
		return os.Link(at, to)
	case "symlink":
		if err := os.Symlink(text+"x", at); err != nil {
			return err
		}
	case "chmod":
		if isLink {
			return nil
		}
		return unix.Chmod(at, mode)
	case "chown":
		return os.Lchown(at, int(mode), 1)
	case "xattr":
		if st.Mode&unix.S_IFMT != unix.S_IFREG && st.Mode&unix.S_IFMT != unix.S_IFDIR {
			return nil
		}
		return unix.Lsetxattr(at, "user."+text, []byte(text), 0)
	case "fifo":
		if err := unix.Mknod(at, unix.S_IFIFO|0o600, 0); err != nil {
			return err
		}
	}
	ts := unix.NsecToTimespec((past + g.time%3) * 1e9)
	return unix.UtimesNanoAt(unix.AT_FDCWD, at, []unix.Timespec{ts, ts}, unix.AT_SYMLINK_NOFOLLOW)
}

// even gives files the same times in both directories: a rename in an overlay may copy.
func (g *gremlin) even() {
	want, got := scan(g.boxes[1].t.(testing.TB), g.boxes[1].dir), scan(g.boxes[1].t.(testing.TB), g.boxes[0].dir)
	if d := diff(got, want); d != "" {
		g.r.Fatalf("overlay and plain directory differ before the snapshot:\n%s", d)
	}
}

// BenchmarkSnapshot makes a layer of 15,000 files in 150 directories, as large as those of a package or just a line each.
func BenchmarkSnapshot(b *testing.B) {
	b.Run("5000", func(b *testing.B) { snapshotFiles(b, 5000) })
	b.Run("20", func(b *testing.B) { snapshotFiles(b, 20) })
}

// snapshotFiles makes a layer of files that are smaller than most.
func snapshotFiles(b *testing.B, most int) {
	s, cpu := newStore(b), int64(0)
	defer func() { b.ReportMetric(float64(cpu)/float64(b.N), "cpu-ns/op") }()
	for b.Loop() {
		b.StopTimer()
		o := overlayOf(b, s, nil)
		for i := range 15_000 {
			d := filepath.Join(o.Upper, fmt.Sprintf("d%03d", i/100))
			if i%100 == 0 {
				os.Mkdir(d, 0o755)
			}
			os.WriteFile(filepath.Join(d, fmt.Sprintf("f%02d", i%100)), []byte(strings.Repeat("x", i%most)), 0o644)
		}
		before := processorTime()
		b.StartTimer()
		l, err := s.Snapshot(b.Context(), o, Sinks{Blob: &Compression{}})
		if err != nil {
			b.Fatal(err)
		}
		b.StopTimer()
		cpu += processorTime() - before
		o.Close()
		os.RemoveAll(s.layerDir(l))
		b.StartTimer()
	}
}

// processorTime is what this process had of all processors, in nanoseconds: other than the time of the clock, it says
// something on a busy machine.
func processorTime() int64 {
	var u unix.Rusage
	_ = unix.Getrusage(unix.RUSAGE_SELF, &u)
	return u.Utime.Nano() + u.Stime.Nano()
}
