package sandbox

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// newStall makes a root in one directory, as the chroot ground needs it, with all mount points of p.
func newStall(t testing.TB, mounts ...Mount) *box {
	t.Helper()
	if err := chrootWorks(); err != nil {
		t.Skip("chroot: ", err)
	}
	dir := t.TempDir()
	b := &box{t, dir, Root{Dir: filepath.Join(dir, "volume", "root")}}
	for _, d := range []string{"bin", "tmp", "etc", "outer"} {
		b.mkdir("volume/root/" + d)
	}
	os.Chmod(b.in("/tmp"), 0o777|fs.ModeSticky)
	b.install("volume/root/bin/" + insideName)
	for _, m := range MountPoints(Process{Mounts: mounts}) {
		if m.Dir {
			b.mkdir("volume/root" + m.Path)
		} else {
			b.mkdir("volume/root" + filepath.Dir(m.Path))
			b.write("volume/root"+m.Path, "")
		}
	}
	return b
}

func (b *box) in(name string) string { return filepath.Join(b.dir, "volume", "root", name) }

// act is the program on the chroot ground.
func (b *box) act(mounts []Mount, args ...string) Process {
	p := b.process(args...)
	p.Ground, p.Mounts = Ground{Name: groundChroot}, mounts
	return p
}

// state describes all files of the root, with their times.
func (b *box) state() map[string]string {
	b.Helper()
	out := map[string]string{}
	err := filepath.WalkDir(b.root.Dir, func(p string, d fs.DirEntry, err error) error {
		var st unix.Stat_t
		if err := errors.Join(err, unix.Lstat(p, &st)); err != nil {
			return err
		}
		out[strings.TrimPrefix(p, b.root.Dir)] = fmt.Sprintf("%o %d:%d %d %d.%09d", st.Mode, st.Uid, st.Gid, st.Size, st.Mtim.Sec, st.Mtim.Nsec)
		return nil
	})
	if err != nil {
		b.Fatal(err)
	}
	return out
}

// same fails the test if the root is not as it was, or something lies around it.
func (b *box) same(before map[string]string) {
	b.Helper()
	after := b.state()
	for p, was := range before {
		if after[p] != was {
			b.Errorf("%s: %q after the run, %q before it", p, after[p], was)
		}
		delete(after, p)
	}
	for p, is := range after {
		b.Errorf("%s: %q after the run, nothing before it", p, is)
	}
	around, err := os.ReadDir(filepath.Dir(b.root.Dir))
	if err != nil || len(around) != 1 {
		b.Errorf("beside the root: %v, %v", around, err)
	}
}

func TestChrootLeavesNothing(t *testing.T) {
	cache, socket := filepath.Join(t.TempDir(), "cache"), filepath.Join(t.TempDir(), "socket")
	part := t.TempDir()
	for _, d := range []string{cache, part + "/dir/sub"} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(socket, []byte("file"), 0o600); err != nil {
		t.Fatal(err)
	}
	mounts := []Mount{
		{Type: Data, Data: []byte("s3cret"), Target: "/run/secrets/k"},
		{Type: Tmpfs, Target: "/scratch"},
		{Type: Bind, Source: cache, Target: "/var/cache/x"},
		{Type: Bind, Source: cache, Target: "/again"},
		{Type: Bind, Source: socket, Target: "/run/socket"},
		{Type: Overlay, Root: Root{Dir: part}, Subpath: "/dir", Target: "/part"},
		{Type: Data, Data: []byte("x"), Target: "/part/deep/in/it"},
		{Type: Data, Data: []byte("x"), Target: "/bin/replaced"},
	}
	b := newStall(t, mounts...)
	b.write("volume/root/bin/replaced", "original")
	before := b.state()
	for _, c := range []struct{ args, want string }{
		{"cat /run/secrets/k /run/socket /bin/replaced /etc/hosts", "s3cretfilex127.0.0.1"},
		{"write /var/cache/x/f kept", ""},
		{"cat /again/f", "kept"},
		{"write /scratch/f gone", ""},
		{"write /part/sub/f gone", ""},
		{"write /dev/shm/f gone", ""},
		{"write /dev/null gone", ""},
		{"cat /proc/sys/kernel/ostype", "Linux"},
		{"cat /proc/net/dev", "Inter-|"},
		{"cat /proc/self/uid_map", "         0"},
		{"cat /sys/devices/system/cpu/online", "0"},
		{"stat /dev/null /dev/tty /scratch /run/secrets/k", "/dev/null 20666 0:0\n/dev/tty 20666 0:0\n/scratch 41777 0:0\n/run/secrets/k 100400 0:0"},
		{"exit 3", "leaving"},
	} {
		out, err := b.run(b.act(mounts, strings.Fields(c.args)...))
		if !strings.HasPrefix(out, c.want) || err != nil && !strings.HasPrefix(c.args, "exit") {
			t.Errorf("%s: %q, %v, want %q", c.args, out, err, c.want)
		}
		b.same(before)
		if _, err := os.Lstat(part + "/dir"); err == nil {
			t.Error("what is the process's own was not moved")
		}
		if err := os.MkdirAll(part+"/dir/sub", 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if got, err := os.ReadFile(cache + "/f"); string(got) != "kept" {
		t.Errorf("the cache has %q, %v", got, err)
	}
}

func TestChrootUser(t *testing.T) {
	b := newStall(t)
	p := b.act(nil, "id")
	p.UID, p.GID, p.Groups = 1000, 1001, []int{5}
	if out := b.must(p); !strings.HasPrefix(out, "1000 1001 [5]") {
		t.Errorf("id: %s", out)
	}
	p.Args[1] = "limit"
	p.Ulimits = []Ulimit{{"nofile", 77, 78}}
	if out := b.must(p); !strings.Contains(out, "7 77 78\n") {
		t.Errorf("limits: %s", out)
	}
	p = b.act(nil, "hostname")
	p.Network = NetworkNone
	var setup *SetupError
	if _, err := b.run(p); !errors.As(err, &setup) || !strings.Contains(err.Error(), "network none") {
		t.Errorf("network none: %v", err)
	}
	p = b.act(nil)
	p.Args = []string{"/bin/nothing"}
	var exit *ExitError
	if _, err := b.run(p); !errors.As(err, &exit) || exit.Code != 127 {
		t.Errorf("no such program: %v", err)
	}
}

// In filo Go's scheduler waits for files before an actor is one, as packages that initialize earlier read some.
var _ = func() (err error) {
	if os.Args[0] == actorName {
		_, err = os.ReadFile(os.DevNull)
	}
	return err
}()

// TestChrootSlowStart has a process that takes long to start, as on a busy machine: meanwhile Go's scheduler looks at its
// files in the one that becomes it.
func TestChrootSlowStart(t *testing.T) {
	b := newStall(t)
	b.mkdir("volume/root/p")
	b.install("volume/root/p/" + insideName)
	os.Chmod(b.in("/p"), 0o700)
	p := b.act(nil, "id")
	p.UID, p.GID, p.Args[0] = 1000, 1000, insideName
	p.Env = []string{"PATH=" + strings.Repeat("/p:", 40_000) + "/bin"}
	if out := b.must(p); !strings.HasPrefix(out, "1000 1000") {
		t.Errorf("id: %s", out)
	}
}

// TestChrootTargets has targets that lead out of the root.
func TestChrootTargets(t *testing.T) {
	outside := t.TempDir()
	mounts := []Mount{
		{Type: Data, Data: []byte("x"), Target: "/abs/f"},
		{Type: Data, Data: []byte("x"), Target: "/up/f"},
		{Type: Tmpfs, Target: "/abs/dir"},
		{Type: Data, Data: []byte("x"), Target: "/link"},
	}
	b := newStall(t)
	b.symlink(outside, "volume/root/abs")
	b.symlink("../../../../../../../.."+outside, "volume/root/up")
	b.symlink(outside+"/made", "volume/root/link")
	b.mkdir("volume/root" + outside)
	before := b.state()
	b.must(b.act(mounts, "ls", "/"))
	b.same(before)
	if left, err := os.ReadDir(outside); err != nil || len(left) > 0 {
		t.Errorf("outside: %v, %v", left, err)
	}
}

// TestChrootSurvives has processes that take away what was put there.
func TestChrootSurvives(t *testing.T) {
	cache := filepath.Join(t.TempDir(), "cache")
	mounts := []Mount{
		{Type: Data, Data: []byte("x"), Target: "/run/secrets/k"},
		{Type: Bind, Source: cache, Target: "/var/cache/x"},
		{Type: Tmpfs, Target: "/scratch"},
	}
	for _, args := range [][]string{
		{"rmall", "/dev", "/proc", "/sys", "/run", "/scratch", "/etc", "/var"},
		{"mv", "/var", "/outer/var"},
		{"mv", "/etc", "/outer/etc"},
		{"mv", "/run/secrets", "/outer/s"},
	} {
		if err := os.MkdirAll(cache, 0o755); err != nil {
			t.Fatal(err)
		}
		b := newStall(t, mounts...)
		b.must(b.act(mounts, args...))
		if info, err := os.Lstat(cache); err != nil || !info.IsDir() {
			t.Errorf("%v: cache: %v", args, err)
		}
		for p := range b.state() {
			for _, bad := range []string{"null", "cpuinfo", "resolv", "/secrets/k"} {
				if strings.Contains(p, bad) && !strings.HasPrefix(p, "/etc/") && args[0] == "rmall" {
					t.Errorf("%v: %s is left", args, p)
				}
			}
		}
		if data, err := os.ReadFile(b.in("/outer/s/k")); err == nil && len(data) > 0 {
			t.Errorf("%v: the secret is left", args)
		}
	}
}

// TestChrootShares lets many processes use one cache.
func TestChrootShares(t *testing.T) {
	cache := filepath.Join(t.TempDir(), "cache")
	if err := os.Mkdir(cache, 0o755); err != nil {
		t.Fatal(err)
	}
	mounts := []Mount{{Type: Bind, Source: cache, Target: "/c"}}
	var inode unix.Stat_t
	if err := unix.Stat(cache, &inode); err != nil {
		t.Fatal(err)
	}
	done := make(chan error)
	for i := range 8 {
		b := newStall(t, mounts...)
		go func() {
			done <- run(b.Context(), b.act(mounts, "write", fmt.Sprintf("/c/%d", i), "x"))
		}()
	}
	for range 8 {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
	list, err := os.ReadDir(cache)
	if err != nil || len(list) != 8 {
		t.Errorf("in the cache: %v, %v", list, err)
	}
	var now unix.Stat_t
	if err := unix.Stat(cache, &now); err != nil || now.Ino != inode.Ino {
		t.Errorf("the cache is another directory: %v", err)
	}
}

func TestChrootEndsDescendants(t *testing.T) {
	b := newStall(t)
	nap := fmt.Sprintf("nap-%d", os.Getpid())
	out := b.must(b.act(nil, "orphans", nap))
	if strings.Count(out, "detached") != 3 {
		t.Errorf("output: %q", out)
	}
	if n := running0(nap); n > 0 {
		t.Errorf("%d descendants are left", n)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	p := b.act(nil, "orphans", nap, "wait")
	if err := run(ctx, p); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Run: %v", err)
	}
	if n := running0(nap); n > 0 {
		t.Errorf("%d descendants are left of a canceled run", n)
	}
}

// TestChrootEndsWithFilo kills the one who called Run.
func TestChrootEndsWithFilo(t *testing.T) {
	b := newStall(t)
	nap := fmt.Sprintf("fnap-%d", os.Getpid())
	cmd := enterCommand(t, "chroot", "orphans", false)
	cmd.Env = append(cmd.Env, boxEnv+"="+b.root.Dir, napEnv+"="+nap)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	text := ""
	for buf := make([]byte, 4096); strings.Count(text, "detached") < 3; {
		n, err := out.Read(buf)
		text += string(buf[:n])
		if err != nil {
			t.Fatalf("%v: %s", err, text)
		}
	}
	cmd.Process.Signal(syscall.SIGKILL)
	cmd.Wait()
	for i := 0; running0(nap) > 0; i++ {
		if i > 200 {
			t.Fatal("descendants live on")
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// running0 counts the processes with a word among their arguments.
func running0(word string) (n int) {
	all, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, p := range all {
		b, _ := os.ReadFile(p)
		if slices.Contains(strings.Split(string(b), "\x00"), word) {
			n++
		}
	}
	return n
}
