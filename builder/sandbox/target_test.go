package sandbox

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

func TestMountPoints(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "f")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	got := MountPoints(Process{Mounts: []Mount{
		{Type: Bind, Source: dir, Target: "/d"},
		{Type: Bind, Source: dir, Subpath: "f", Target: "/one"},
		{Type: Tmpfs, Target: "/d/below"},
		{Type: Data, Target: "/run/secrets/s"},
		{Type: Overlay, Target: "/o/"},
		{Type: Overlay, Target: "/of", Subpath: "x", File: true},
		{Type: Data, Target: "/dev/s"},
	}})
	want := []MountPoint{
		{"/proc", true}, {"/sys", true}, {"/dev", true}, {"/etc/resolv.conf", false}, {"/etc/hosts", false},
		{"/d", true}, {"/one", false}, {"/run/secrets/s", false}, {"/o", true}, {"/of", false},
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got  %v\nwant %v", got, want)
	}
}

// shown runs the program with these mounts and a verb.
func shown(t *testing.T, b *box, mounts []Mount, args ...string) (string, error) {
	t.Helper()
	p := b.process(args...)
	p.Mounts = mounts
	return b.run(p)
}

func TestMountBind(t *testing.T) {
	src := t.TempDir()
	os.Mkdir(src+"/sub", 0o755)
	os.WriteFile(src+"/sub/f", []byte("A"), 0o644)
	os.Symlink("sub", src+"/link")
	os.Symlink("/etc/passwd", src+"/out")
	os.Symlink("../../../../../../etc", src+"/up")

	mounts := []Mount{
		{Type: Bind, Source: src, Target: "/ro", ReadOnly: true},
		{Type: Bind, Source: src, Target: "/rw"},
		{Type: Bind, Source: src, Subpath: "link/f", Target: "/file"},
		{Type: Tmpfs, Target: "/rw/tmp/inner"},
		{Type: Data, Data: []byte("S"), Target: "/rw/tmp/inner/secret"},
	}
	b := newBox(t, mounts...)
	for _, tt := range []struct {
		want string
		args []string
	}{
		{"AA", []string{"cat", "/ro/sub/f", "/file"}},
		{"read-only", []string{"write", "/ro/x", "y"}},
		{"", []string{"write", "/rw/x", "y"}},
		{"S", []string{"cat", "/rw/tmp/inner/secret"}},
		{"", []string{"write", "/rw/tmp/inner/x", "y"}},
	} {
		if out, _ := shown(t, b, mounts, tt.args...); !strings.Contains(out, tt.want) || tt.want == "" && out != "" {
			t.Errorf("%q: got %q, want %q", tt.args, out, tt.want)
		}
	}
	if x, err := os.ReadFile(src + "/x"); string(x) != "y" {
		t.Errorf("what was written to the bind mount: %q, %v", x, err)
	}
	if _, err := os.Lstat(src + "/tmp/inner/secret"); err == nil {
		t.Error("the secret's mount point is in the source")
	}
	if got := b.upper(); got != nil {
		t.Errorf("left in the upper directory: %q", got)
	}
	for _, sub := range []string{"out", "up/passwd", "nope"} {
		m := []Mount{{Type: Bind, Source: src, Subpath: sub, Target: "/file"}}
		out, err := shown(t, b, m, "cat", "/file")
		if !errors.Is(err, syscall.ENOENT) {
			t.Errorf("subpath %s: %v: %s", sub, err, out)
		}
	}
}

func TestMountOverlay(t *testing.T) {
	b := newBox(t, Mount{Type: Tmpfs, Target: "/m"}, Mount{Type: Data, Target: "/one"})
	for _, d := range []string{"a/d", "b/d", "mu", "mw"} {
		b.mkdir(d)
	}
	b.write("a/d/f", "A")
	b.write("b/d/f", "B")
	b.write("b/d/g", "G")
	b.symlink("/etc/shadow", "b/evil")
	root := Root{Lower: []string{b.dir + "/a", b.dir + "/b"}}
	out, err := shown(t, b, []Mount{{Type: Overlay, Root: root, Target: "/m"}}, "cat", "/m/d/f", "/m/d/g")
	if err != nil || out != "AG" {
		t.Errorf("view: %q, %v", out, err)
	}
	out, _ = shown(t, b, []Mount{{Type: Overlay, Root: root, Target: "/m"}}, "write", "/m/x", "y")
	if !strings.Contains(out, "read-only") {
		t.Errorf("write to a view: %q", out)
	}
	parts := []Mount{
		{Type: Overlay, Root: root, Subpath: "/d", Target: "/m"},
		{Type: Overlay, Root: root, Subpath: "d/g", File: true, Target: "/one"},
	}
	if out, err = shown(t, b, parts, "cat", "/m/f", "/m/g", "/one"); err != nil || out != "AGG" {
		t.Errorf("parts of a view: %q, %v", out, err)
	}
	evil := []Mount{{Type: Overlay, Root: root, Subpath: "evil", File: true, Target: "/one"}}
	if out, err = shown(t, b, evil, "cat", "/one"); !errors.Is(err, syscall.ENOENT) {
		t.Errorf("link out of the view: %q, %v", out, err)
	}
	same := Root{Lower: b.root.Lower} // the layers of the root itself
	if out, err = shown(t, b, []Mount{{Type: Overlay, Root: same, Target: "/m"}}, "ls", "/m/bin"); err != nil || !strings.Contains(out, insideName) {
		t.Errorf("layers of the root: %q, %v", out, err)
	}
	root.Upper, root.Work = b.dir+"/mu", b.dir+"/mw"
	if out, err = shown(t, b, []Mount{{Type: Overlay, Root: root, Target: "/m"}}, "write", "/m/x", "y"); err != nil {
		t.Errorf("write to a view with an upper: %q, %v", out, err)
	}
	if got := b.upper(); got != nil {
		t.Errorf("left in the upper directory: %q", got)
	}
}

// The targets are in an image that somebody else made.
func TestMountHostileTargets(t *testing.T) {
	outside := t.TempDir()
	b := newBox(t, Mount{Type: Tmpfs, Target: "/real"})
	b.symlink(outside, "top/abs")
	b.symlink("../../../../../../../.."+outside, "top/up")
	b.symlink("/proc/self/fd", "top/fds")
	b.symlink("/proc/1/root", "top/root")
	b.symlink("/proc/1/cwd", "top/cwd")
	b.symlink("loop", "top/loop")
	b.symlink("/real", "top/fine")

	for _, target := range []string{"/abs", "/up", "/fds/3", "/fds/4", "/fds/5", "/fds/9", "/root", "/cwd/x", "/loop", "/proc/1/fd/7"} {
		m := []Mount{{Type: Data, Data: []byte("S"), Target: target}}
		out, err := shown(t, b, m, "ls", "/")
		var setup *SetupError
		if !errors.As(err, &setup) {
			t.Errorf("target %s: %v\n%s", target, err, out)
		}
		p := b.process("pwd")
		p.Dir = target
		if target == "/abs" || target == "/up" {
			continue // a working directory may not be made through a link that leads nowhere
		}
		if out, err := b.run(p); !errors.As(err, &setup) {
			t.Errorf("working directory %s: %v\n%s", target, err, out)
		}
	}
	m := []Mount{{Type: Tmpfs, Target: "/fine"}}
	if out, err := shown(t, b, m, "write", "/real/x", "y"); err != nil {
		t.Errorf("target by a link inside: %v\n%s", err, out)
	}
	if got := b.upper(); got != nil {
		t.Errorf("left in the upper directory: %q", got)
	}
	if list, err := os.ReadDir(outside); err != nil || len(list) != 0 {
		t.Errorf("outside the root: %v, %v", list, err)
	}
}

func TestMountData(t *testing.T) {
	const secret = "s3cr3t-0c1b"
	mounts := []Mount{
		{Type: Data, Data: []byte(secret), Target: "/run/secrets/q", ReadOnly: true},
		{Type: Data, Data: []byte("#!"), Target: "/k/q", Mode: 0o444},
	}
	if !singleID() {
		mounts[1].UID, mounts[1].GID = 5, 6
	}
	b := newBox(t, mounts...)
	out, err := shown(t, b, mounts, "cat", "/run/secrets/q")
	if err != nil || out != secret {
		t.Errorf("secret: %q, %v", out, err)
	}
	want := "/run/secrets/q 100400 0:0\n/k/q 100444 5:6\n"
	if singleID() {
		want = strings.Replace(want, "5:6", "0:0", 1)
	}
	if out, err = shown(t, b, mounts, "stat", "/run/secrets/q", "/k/q"); err != nil || out != want {
		t.Errorf("got %q, want %q; %v", out, want, err)
	}
	if out, _ = shown(t, b, mounts, "write", "/run/secrets/q", "x"); !strings.Contains(out, "read-only") {
		t.Errorf("write to a secret: %q", out)
	}

	// While it runs, the secret is in nobody's arguments, environment or files.
	p := b.process("sleep")
	p.Mounts = mounts
	started := make(chan bool, 1)
	p.Stdout = writerFunc(func(b []byte) (int, error) { started <- true; return len(b), nil })
	done := make(chan error)
	go func() { done <- run(t.Context(), p) }()
	<-started
	for _, pid := range children(t, os.Getpid()) {
		dir := filepath.Join("/proc", itoa(pid))
		for _, name := range []string{"cmdline", "environ", "mountinfo"} {
			if text, _ := os.ReadFile(filepath.Join(dir, name)); strings.Contains(string(text), secret) {
				t.Errorf("the secret is in %s of the child", name)
			}
		}
		syscall.Kill(pid, syscall.SIGKILL)
	}
	<-done
	filepath.Walk(b.dir, func(name string, fi os.FileInfo, err error) error {
		if err == nil && fi.Mode().IsRegular() && fi.Size() < 1<<16 {
			if text, _ := os.ReadFile(name); strings.Contains(string(text), secret) {
				t.Errorf("the secret is in %s", name)
			}
		}
		return nil
	})
}

func TestMountSocket(t *testing.T) {
	sock := filepath.Join(t.TempDir(), "s")
	fd, err := syscall.Socket(syscall.AF_UNIX, syscall.SOCK_STREAM, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer syscall.Close(fd)
	if err := syscall.Bind(fd, &syscall.SockaddrUnix{Name: sock}); err != nil {
		t.Fatal(err)
	}
	mounts := []Mount{{Type: Bind, Source: sock, Target: "/run/buildkit/ssh_agent.0"}}
	b := newBox(t, mounts...)
	out, err := shown(t, b, mounts, "stat", "/run/buildkit/ssh_agent.0")
	if err != nil || !strings.Contains(out, " 140") {
		t.Errorf("%q, %v", out, err)
	}
}

func TestOverlayMany(t *testing.T) {
	b := newBox(t)
	p := b.process("exit", "0")
	p.Root.Upper, p.Root.Work = "", ""
	for i := range 300 {
		d := "many/" + strings.Repeat("x", 80) + itoa(i)
		b.mkdir(d)
		p.Root.Lower = append(p.Root.Lower, filepath.Join(b.dir, d))
	}
	if _, err := b.run(p); err != nil {
		t.Errorf("302 layers: %v", err)
	}
	odd := `od,d:\ "x"` + "\n\xff"
	b.mkdir(odd)
	b.write(odd+"/found", "F")
	p = b.process("cat", "/found")
	p.Root.Lower = append([]string{filepath.Join(b.dir, odd)}, p.Root.Lower...)
	p.Env = append(p.Env, "LATIN=\xff")
	if got := b.must(p); got != "F" {
		t.Errorf("odd name of a layer: got %q", got)
	}
}

// classicName is the argv[0] of a child that mounts as on older kernels.
const classicName = "classic"

func classicMain() {
	err := func() error {
		private := unix.MountAttr{Propagation: unix.MS_PRIVATE}
		if err := unix.MountSetattr(unix.AT_FDCWD, "/", unix.AT_RECURSIVE, &private); err != nil {
			return err
		}
		anchor, err := unix.Open("/", unix.O_PATH, 0)
		if err != nil {
			return err
		}
		s, err := newStage(anchor)
		if err != nil {
			return err
		}
		s.old = true
		dir := os.Getenv(boxEnv)
		r := Root{Upper: dir + "/upper", Work: dir + "/work"}
		for i := range 300 {
			r.Lower = append(r.Lower, filepath.Join(dir, "many", itoa(i)))
		}
		fd, err := s.root(r)
		if err != nil {
			return err
		}
		if err := attach(fd, anchor); err != nil {
			return err
		}
		if err := create(fd, "made", false); err != nil {
			return err
		}
		return unix.Faccessat(fd, "deep", unix.F_OK, 0)
	}()
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	os.Exit(0)
}

func TestOverlayClassic(t *testing.T) {
	b := newBox(t)
	for i := range 300 {
		b.mkdir("many/" + itoa(i))
	}
	b.write("many/299/deep", "")
	cmd := exec.Command(self)
	cmd.Args = []string{classicName}
	cmd.Env = []string{boxEnv + "=" + b.dir}
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNS | syscall.CLONE_NEWPID | syscall.CLONE_NEWIPC | syscall.CLONE_NEWUTS}
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if got := b.upper(); len(got) != 1 || got[0] != "made" {
		t.Errorf("upper: %q", got)
	}
}

func itoa(i int) string { return strconv.Itoa(i) }
