package sandbox

import (
	"bytes"
	"context"
	"debug/elf"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"filo/builder/sandbox/seccomp"
)

// The program in the sandbox is this test program itself, by another name.
const insideName = "inside"

func TestMain(m *testing.M) {
	if len(os.Args) > 1 && filepath.Base(os.Args[0]) == insideName {
		if err := insideMain(os.Args[1], os.Args[2:]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	if os.Args[0] == classicName {
		classicMain()
	}
	if how, ok := os.LookupEnv(enterEnv); ok {
		entersMain(how)
	}
	g, err := Enter("")
	if err != nil || g.Name == "none" {
		fmt.Fprintln(os.Stderr, "sandbox tests: no ground:", g.Reason, err)
		os.Exit(1)
	}
	fmt.Fprintf(os.Stderr, "sandbox tests: ground %s: %s\n", g.Name, g.Reason)
	code := m.Run()
	if static != "" {
		os.RemoveAll(static)
	}
	os.Exit(code)
}

// insideMain is what runs in the sandbox.
func insideMain(verb string, args []string) error {
	switch verb {
	case "cat":
		for _, name := range args {
			b, err := os.ReadFile(name)
			if err != nil {
				return err
			}
			os.Stdout.Write(b)
		}
	case "ls":
		for _, name := range args {
			list, err := os.ReadDir(name)
			if err != nil {
				return err
			}
			for _, e := range list {
				fi, err := e.Info()
				if err != nil {
					return err
				}
				fmt.Println(fi.Mode(), e.Name())
			}
		}
	case "stat":
		for _, name := range args {
			fi, err := os.Stat(name)
			if err != nil {
				return err
			}
			st := fi.Sys().(*syscall.Stat_t)
			fmt.Printf("%s %o %d:%d\n", name, st.Mode, st.Uid, st.Gid)
		}
	case "write":
		return os.WriteFile(args[0], []byte(args[1]), 0o644)
	case "mkdir":
		return os.Mkdir(args[0], 0o777)
	case "env":
		fmt.Println(strings.Join(os.Environ(), "\n"))
	case "pwd":
		dir, err := os.Getwd()
		fmt.Println(dir)
		return err
	case "id":
		groups, _ := os.Getgroups()
		fmt.Println(os.Getuid(), os.Getgid(), groups, os.Getpid())
	case "hostname":
		name, err := os.Hostname()
		fmt.Println(name)
		return err
	case "fds":
		list, err := os.ReadDir("/proc/self/fd")
		for _, e := range list {
			to, _ := os.Readlink("/proc/self/fd/" + e.Name())
			fmt.Println(e.Name(), to)
		}
		return err
	case "exit":
		code := 0
		fmt.Sscan(args[0], &code)
		fmt.Fprintln(os.Stderr, "leaving")
		os.Exit(code)
	case "sleep":
		fmt.Println("sleeping")
		time.Sleep(time.Hour)
	case "orphan":
		cmd := exec.Command("/proc/self/exe")
		cmd.Args = []string{insideName, "sleep"}
		cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
		return cmd.Start()
	case "suicide":
		// The first process of a namespace cannot kill itself; only the
		// kernel can, by a fault.
		*(*int)(nil) = 1
	case "sys":
		return insideSys(args[0])
	case "limit":
		for which := range 16 {
			var l syscall.Rlimit
			if syscall.Getrlimit(which, &l) == nil {
				fmt.Println(which, int64(l.Cur), int64(l.Max))
			}
		}
	case "eat":
		var all [][]byte
		for range 200 {
			all = append(all, bytes.Repeat([]byte("x"), 1<<20))
		}
		fmt.Println(len(all))
	case "crowd":
		n := 0
		fmt.Sscan(args[0], &n)
		for range n {
			cmd := exec.Command("/bin/" + insideName)
			cmd.Args = []string{insideName, "nap"}
			if err := cmd.Start(); err != nil {
				return err
			}
		}
	case "rmall":
		for _, name := range args {
			if err := os.RemoveAll(name); err != nil {
				return err
			}
		}
	case "mv":
		return os.Rename(args[0], args[1])
	case "orphans":
		return detach(args[0], len(args) > 1)
	case "nap":
		time.Sleep(time.Hour)
	case "hostile":
		return insideHostile(args[0])
	case "devices":
		return insideDevices()
	case "facts":
		return json.NewEncoder(os.Stdout).Encode(seeFacts())
	case "umask":
		fmt.Printf("%o\n", syscall.Umask(0))
	default:
		return fmt.Errorf("no verb %s", verb)
	}
	return nil
}

// detach leaves processes behind as daemons do it: in sessions of their own, with a parent that is gone.
func detach(word string, wait bool) error {
	for range 3 {
		cmd := exec.Command("/bin/" + insideName)
		cmd.Args = []string{insideName, "nap", word}
		cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
		if err := cmd.Start(); err != nil {
			return err
		}
		fmt.Println("detached")
	}
	if wait {
		time.Sleep(time.Hour)
	}
	return nil
}

func insideSys(name string) error {
	switch name {
	case "mount":
		return syscall.Mount("tmpfs", "/tmp", "tmpfs", 0, "")
	case "unshare":
		_, _, errno := syscall.RawSyscall(syscall.SYS_UNSHARE, syscall.CLONE_NEWUTS, 0, 0)
		return report0(errno)
	case "keyctl":
		_, _, errno := syscall.RawSyscall(unix.SYS_KEYCTL, 0, 0, 0)
		return report0(errno)
	case "clone3":
		_, _, errno := syscall.RawSyscall(unix.SYS_CLONE3, 0, 0, 0)
		return report0(errno)
	case "future":
		_, _, errno := syscall.RawSyscall(4000, 0, 0, 0)
		return report0(errno)
	case "vsock":
		_, _, errno := syscall.RawSyscall(unix.SYS_SOCKET, 40, 1, 0)
		return report0(errno)
	case "inet":
		_, _, errno := syscall.RawSyscall(unix.SYS_SOCKET, 2, 1, 0)
		return report0(errno)
	case "mknod":
		return syscall.Mknod("/tmp/node", syscall.S_IFCHR|0o600, 1<<8|3)
	}
	return errors.New("no system call " + name)
}

func report0(errno syscall.Errno) error {
	if errno == 0 {
		fmt.Println("ok")
		return nil
	}
	return errno
}

// static is a directory with this test program linked statically, if it is not.
var static string

// program returns this test program, static.
func program(t testing.TB) string {
	t.Helper()
	if path := os.Getenv(programEnv); path != "" {
		return path
	}
	f, err := elf.Open("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if !slices.ContainsFunc(f.Progs, func(p *elf.Prog) bool { return p.Type == elf.PT_INTERP }) {
		path, err := os.Executable()
		if err != nil {
			t.Fatal(err)
		}
		return path
	}
	if static == "" {
		if static, err = os.MkdirTemp("", "sandbox-static-"); err != nil {
			t.Fatal(err)
		}
		cmd := exec.Command("go", "test", "-c", "-o", static+"/"+insideName, ".")
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
	}
	return static + "/" + insideName
}

// box is a root to run in, and where its parts are.
type box struct {
	testing.TB
	dir  string
	root Root
}

// newBox makes a root of two layers, with all mount points of p.
func newBox(t testing.TB, mounts ...Mount) *box {
	t.Helper()
	dir := t.TempDir()
	os.Chmod(filepath.Dir(dir), 0o755)
	os.Chmod(dir, 0o755)
	b := &box{t, dir, Root{
		Lower: []string{filepath.Join(dir, "top"), filepath.Join(dir, "base")},
		Upper: filepath.Join(dir, "upper"),
		Work:  filepath.Join(dir, "work"),
	}}
	for _, d := range []string{"top", "base/bin", "base/tmp", "base/etc", "upper", "work"} {
		b.mkdir(d)
	}
	os.Chmod(filepath.Join(dir, "base/tmp"), 0o777|fs.ModeSticky)
	b.install("base/bin/" + insideName)
	for _, m := range MountPoints(Process{Mounts: mounts}) {
		if m.Dir {
			b.mkdir("top" + m.Path)
		} else {
			b.mkdir("top" + filepath.Dir(m.Path))
			b.write("top"+m.Path, "")
		}
	}
	return b
}

func (b *box) install(name string) {
	b.Helper()
	from := program(b)
	to := filepath.Join(b.dir, name)
	if os.Link(from, to) == nil {
		return
	}
	data, err := os.ReadFile(from)
	if err == nil {
		err = os.WriteFile(to, data, 0o755)
	}
	if err != nil {
		b.Fatal(err)
	}
}

func (b *box) mkdir(name string) {
	b.Helper()
	if err := os.MkdirAll(filepath.Join(b.dir, name), 0o755); err != nil {
		b.Fatal(err)
	}
}

func (b *box) write(name, data string) {
	b.Helper()
	if err := os.WriteFile(filepath.Join(b.dir, name), []byte(data), 0o644); err != nil {
		b.Fatal(err)
	}
}

func (b *box) symlink(to, name string) {
	b.Helper()
	if err := os.Symlink(to, filepath.Join(b.dir, name)); err != nil {
		b.Fatal(err)
	}
}

// process is the program in this root with these arguments.
func (b *box) process(args ...string) Process {
	return Process{
		Root: b.root,
		Args: append([]string{"/bin/" + insideName}, args...),
		Env:  []string{"PATH=/usr/bin:/bin", "A=b"},
	}
}

// run runs p and returns all it printed.
func (b *box) run(p Process) (string, error) {
	b.Helper()
	var out bytes.Buffer
	p.Stdout, p.Stderr = &out, &out
	err := run(b.Context(), p)
	// The overlay is volatile: an upper can be used a second time only when
	// this is taken away.
	os.RemoveAll(filepath.Join(b.root.Work, "work"))
	return out.String(), err
}

// must runs p and fails the test if it fails.
func (b *box) must(p Process) string {
	b.Helper()
	out, err := b.run(p)
	if err != nil {
		b.Fatalf("Run(%q): %v\n%s", p.Args, err, out)
	}
	return out
}

// upper lists what is in the upper directory.
func (b *box) upper() (names []string) {
	b.Helper()
	err := filepath.WalkDir(b.root.Upper, func(p string, d fs.DirEntry, err error) error {
		if err == nil && p != b.root.Upper {
			names = append(names, strings.TrimPrefix(p, b.root.Upper+"/"))
		}
		return err
	})
	if err != nil {
		b.Fatal(err)
	}
	return names
}

func TestRunShows(t *testing.T) {
	b := newBox(t)
	p := b.process("exit", "0")
	with := func(change func(p *Process)) Process {
		q := p
		change(&q)
		return q
	}
	verb := func(args ...string) Process {
		return with(func(p *Process) { p.Args = append([]string{"/bin/inside"}, args...) })
	}
	tests := []struct {
		name string
		p    Process
		want string
	}{
		{"environment", verb("env"), "PATH=/usr/bin:/bin\nA=b\n"},
		{"user", verb("id"), "0 0 [] 1\n"},
		{"hostname", verb("hostname"), "buildkitsandbox\n"},
		{"directory", verb("pwd"), "/\n"},
		{"umask", verb("umask"), "22\n"},
		{"files", verb("cat", "/etc/hosts"), "127.0.0.1\tlocalhost buildkitsandbox\n::1\tlocalhost ip6-localhost ip6-loopback\n"},
		{"own hostname", with(func(p *Process) {
			p.Args = []string{"/bin/inside", "hostname"}
			p.Hostname = "h7"
		}), "h7\n"},
		{"own directory", with(func(p *Process) {
			p.Args = []string{"inside", "pwd"}
			p.Dir = "/tmp"
		}), "/tmp\n"},
		{"extra hosts", with(func(p *Process) {
			p.Args = []string{"inside", "cat", "/etc/hosts"}
			p.ExtraHosts = []string{"q.r:1.2.3.4", "a=::1", "b:[fe80::2]"}
		}), "127.0.0.1\tlocalhost buildkitsandbox\n::1\tlocalhost ip6-localhost ip6-loopback\n1.2.3.4\tq.r\n::1\ta\nfe80::2\tb\n"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			b.TB = t
			if got := b.must(tt.p); got != tt.want {
				t.Errorf("got %q, want %q", got, tt.want)
			}
		})
	}
	if got := b.upper(); got != nil {
		t.Errorf("left in the upper directory: %q", got)
	}
}

func TestRunDev(t *testing.T) {
	b := newBox(t)
	want := `Lrwxrwxrwx fd
Dcrw-rw-rw- full
dtrwxrwxrwx mqueue
Dcrw-rw-rw- null
Lrwxrwxrwx ptmx
drwxr-xr-x pts
Dcrw-rw-rw- random
dtrwxrwxrwx shm
Lrwxrwxrwx stderr
Lrwxrwxrwx stdin
Lrwxrwxrwx stdout
Dcrw-rw-rw- tty
Dcrw-rw-rw- urandom
Dcrw-rw-rw- zero
`
	got := strings.Replace(b.must(b.process("ls", "/dev")), "Lrwxrwxrwx core\n", "", 1)
	if got != want {
		t.Errorf("/dev:\n%swant:\n%s", got, want)
	}
	b.must(b.process("write", "/dev/null", "x"))
	b.must(b.process("write", "/dev/zz", "x"))
	b.must(b.process("write", "/dev/shm/q", "x"))
	if got := b.upper(); got != nil {
		t.Errorf("left in the upper directory: %q", got)
	}
}

// mountLines returns the mounts a process sees: target to options.
func mountLines(t testing.TB, b *box, p Process) map[string]string {
	t.Helper()
	p.Args = []string{"inside", "cat", "/proc/self/mounts"}
	lines := map[string]string{}
	for line := range strings.Lines(b.must(p)) {
		f := strings.Fields(line)
		lines[f[1]] = f[2] + " " + f[3]
	}
	return lines
}

func TestRunMounts(t *testing.T) {
	mounts := []Mount{{Type: Tmpfs, Target: "/t", Size: 1 << 20}}
	b := newBox(t, mounts...)
	p := b.process()
	p.Mounts = mounts
	p.ShmSize = 1 << 20
	got := mountLines(t, b, p)
	for target, prefix := range map[string]string{
		"/":                "overlay rw,",
		"/proc":            "proc rw,nosuid,nodev,noexec,",
		"/proc/sys":        "proc ro,nosuid,nodev,noexec,",
		"/sys":             "sysfs ro,nosuid,nodev,noexec,",
		"/dev":             "tmpfs rw,nosuid,",
		"/dev/pts":         "devpts rw,nosuid,noexec,",
		"/dev/shm":         "tmpfs rw,nosuid,nodev,noexec,relatime,size=1024k",
		"/dev/mqueue":      "mqueue rw,",
		"/etc/hosts":       "tmpfs ro,nosuid,nodev,noexec,",
		"/etc/resolv.conf": "tmpfs ro,nosuid,nodev,noexec,",
		"/t":               "tmpfs rw,nosuid,relatime,size=1024k",
	} {
		if !strings.HasPrefix(got[target], prefix) {
			t.Errorf("%s: got %q, want %q…", target, got[target], prefix)
		}
	}
	for target, line := range got {
		if strings.Contains(line, b.dir) {
			t.Errorf("%s: %q shows a path of the host", target, line)
		}
		if target != "/" && !slices.ContainsFunc([]string{"/proc", "/sys", "/dev", "/etc/hosts", "/etc/resolv.conf", "/t"}, func(top string) bool {
			return target == top || strings.HasPrefix(target, top+"/")
		}) {
			t.Errorf("mount of the host: %s %s", target, line)
		}
	}
}

// TestRunMountsOnProc mounts where only the process has something to mount on, and the root has another.
func TestRunMountsOnProc(t *testing.T) {
	if newBox(t).process().Ground.Name == groundChroot {
		t.Skip("no mounts on the chroot ground")
	}
	for _, tt := range []struct{ target, ls, err string }{
		{"/proc/fs", "/proc/fs", ""},
		{"/proc/sys/../fs", "/proc/fs", ""},
		{"/proc", "/proc", ""},
		{"/proc/below", "/proc/below", "mount /proc/below: no such file or directory"},
	} {
		b := newBox(t)
		b.mkdir("base/proc/below")
		b.mkdir("base/proc/fs")
		p := b.process("ls", tt.ls)
		p.Mounts = []Mount{{Type: Tmpfs, Target: tt.target}}
		out, err := b.run(p)
		if tt.err == "" && (err != nil || out != "") || tt.err != "" && (err == nil || !strings.Contains(err.Error(), tt.err)) {
			t.Errorf("%s: %q, %v", tt.target, out, err)
		}
	}
}

// TestRunStaysInside names files that the launcher has open as working directory and as program.
func TestRunStaysInside(t *testing.T) {
	b := newBox(t)
	for fd := 3; fd < 40; fd++ {
		p := b.process("ls", ".")
		p.Dir = fmt.Sprintf("/proc/self/fd/%d", fd)
		if out, err := b.run(p); err == nil {
			t.Errorf("works in %s: %s", p.Dir, out)
		}
		p = b.process("pwd")
		p.Args[0] = fmt.Sprintf("/proc/self/fd/%d%s/base/bin/%s", fd, b.dir, insideName)
		if out, err := b.run(p); err == nil {
			t.Errorf("executes %s: %s", p.Args[0], out)
		}
	}
}

func TestRunReadOnly(t *testing.T) {
	b := newBox(t)
	for _, args := range [][]string{
		{"write", "/etc/hosts", "x"},
		{"write", "/etc/resolv.conf", "x"},
		{"write", "/proc/sys/kernel/hostname", "x"},
		{"write", "/sys/kernel/mm/ksm/run", "0"},
		{"mkdir", "/sys/fs/cgroup/x"},
		{"ls", "/.."}, // lists, but only the root: checked below
	} {
		out, err := b.run(b.process(args...))
		if args[0] == "ls" {
			if err != nil || !strings.Contains(out, " tmp\n") || strings.Contains(out, " boot\n") {
				t.Errorf("%q: %v\n%s", args, err, out)
			}
			continue
		}
		if err == nil {
			t.Errorf("%q worked", args)
		}
	}
	if got := b.upper(); got != nil {
		t.Errorf("left in the upper directory: %q", got)
	}
}

func TestRunHidden(t *testing.T) {
	b := newBox(t)
	for _, name := range hidden {
		fi, err := os.Stat(name)
		if err != nil {
			continue
		}
		verb := "cat"
		if fi.IsDir() {
			verb = "ls"
		}
		if out := b.must(b.process(verb, name)); out != "" {
			t.Errorf("%s shows %q", name, out)
		}
	}
}

func TestRunFiles(t *testing.T) {
	// A file that filo was started with, and that is not closed on execution.
	f, err := os.Open("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	fd, err := syscall.Dup(int(f.Fd()))
	if err != nil {
		t.Fatal(err)
	}
	defer syscall.Close(fd)
	b := newBox(t)
	lines := strings.Split(strings.TrimSpace(b.must(b.process("fds"))), "\n")
	// The fourth is the listing's own.
	if len(lines) != 4 || lines[0] != "0 /dev/null" || !strings.HasPrefix(lines[1], "1 pipe:") || !strings.HasPrefix(lines[2], "2 pipe:") {
		t.Errorf("open files: %q", lines)
	}
}

func TestRunWrites(t *testing.T) {
	b := newBox(t)
	b.must(b.process("write", "/tmp/x", "y"))
	if got, want := b.upper(), []string{"tmp", "tmp/x"}; !slices.Equal(got, want) {
		t.Errorf("upper: got %q, want %q", got, want)
	}
	p := b.process("pwd")
	p.Dir = "/made/here"
	if got := b.must(p); got != "/made/here\n" {
		t.Errorf("made working directory: got %q", got)
	}
	p.Dir = "/by/way/../../of/../here"
	if got := b.must(p); got != "/here\n" {
		t.Errorf("working directory with ..: got %q", got)
	}
	if got, want := b.upper(), []string{"by", "by/way", "here", "made", "made/here", "of", "tmp", "tmp/x"}; !slices.Equal(got, want) {
		t.Errorf("upper: got %q, want %q", got, want)
	}
}

func TestRunReadOnlyRoot(t *testing.T) {
	b := newBox(t)
	p := b.process("write", "/tmp/x", "y")
	p.Root = Root{Lower: b.root.Lower}
	if out, err := b.run(p); err == nil || !strings.Contains(out, "read-only") {
		t.Errorf("two layers: %v: %s", err, out)
	}
	one := newBox(t)
	one.install("top/" + insideName)
	p.Root = Root{Lower: one.root.Lower[:1]}
	p.Args = []string{"/" + insideName, "mkdir", "/x"}
	if out, err := one.run(p); err == nil || !strings.Contains(out, "read-only") {
		t.Errorf("one layer: %v: %s", err, out)
	}
}

func TestRunUsers(t *testing.T) {
	if singleID() {
		t.Skip("only one ID here")
	}
	b := newBox(t)
	p := b.process("cat", "/proc/self/status")
	p.UID, p.GID, p.Groups = 44, 45, []int{45, 55}
	out := b.must(p)
	for _, want := range []string{
		"Uid:\t44\t44\t44\t44\n", "Gid:\t45\t45\t45\t45\n", "Groups:\t45 55 \n",
		"CapInh:\t0000000000000000\n", "CapPrm:\t0000000000000000\n", "CapEff:\t0000000000000000\n",
		"CapBnd:\t00000000a80425fb\n", "CapAmb:\t0000000000000000\n",
	} {
		if !strings.Contains(out, want) {
			t.Errorf("no %q in\n%s", want, out)
		}
	}
	p.Args = []string{"inside", "write", "/etc/x", "y"}
	if _, err := b.run(p); err == nil {
		t.Error("an ordinary user wrote to /etc")
	}
	for _, name := range []string{"/dev/stdout", "/dev/stderr", "/dev/null", "/tmp/x", "/dev/shm/x"} {
		p.Args = []string{"inside", "write", name, "y"}
		if out, err := b.run(p); err != nil {
			t.Errorf("write %s: %v: %s", name, err, out)
		}
	}
	b.mkdir("top/private")
	os.Chmod(b.dir+"/top/private", 0o700)
	p.Dir = "/private"
	p.Args = []string{"inside", "id"}
	if out, err := b.run(p); err != nil {
		t.Errorf("working directory of root's: %v: %s", err, out)
	}
	p.Dir = ""
	p.UID = 1 << 30
	if _, err := b.run(p); singleIDOrRange() && err == nil {
		t.Error("a user that is not mapped ran")
	}
}

// singleIDOrRange reports whether not all IDs exist.
func singleIDOrRange() bool {
	ranges, err := readMap("/proc/self/uid_map")
	return err == nil && (len(ranges) != 1 || ranges[0].count < 1<<31)
}

func TestRunPowers(t *testing.T) {
	b := newBox(t)
	out := b.must(b.process("cat", "/proc/self/status"))
	for _, want := range []string{
		"CapInh:\t0000000000000000\n", "CapPrm:\t00000000a80425fb\n", "CapEff:\t00000000a80425fb\n",
		"CapBnd:\t00000000a80425fb\n", "CapAmb:\t0000000000000000\n",
		"NoNewPrivs:\t0\n", "Seccomp:\t2\n", "Groups:\t \n",
	} {
		if !strings.Contains(out, want) {
			t.Errorf("no %q in\n%s", want, out)
		}
	}
}

func TestRunSystemCalls(t *testing.T) {
	b := newBox(t)
	for name, want := range map[string]string{
		"mount":   "operation not permitted",
		"unshare": "operation not permitted",
		"keyctl":  "operation not permitted",
		"clone3":  "function not implemented",
		"future":  "function not implemented",
		"vsock":   "operation not permitted",
		"inet":    "ok",
	} {
		if out, _ := b.run(b.process("sys", name)); strings.TrimSpace(out) != want {
			t.Errorf("%s: got %q, want %q", name, out, want)
		}
	}
}

func TestRunInsecure(t *testing.T) {
	b := newBox(t)
	p := b.process("cat", "/proc/self/status")
	p.Insecure = true
	out := b.must(p)
	if !strings.Contains(out, "Seccomp:\t0\n") && !filtered() {
		t.Errorf("seccomp is on:\n%s", out)
	}
	keep, err := permitted()
	if err != nil {
		t.Fatal(err)
	}
	if want := fmt.Sprintf("CapEff:\t%016x\n", uint64(keep)); !strings.Contains(out, want) {
		t.Errorf("no %q in\n%s", want, out)
	}
	p.Args = []string{"inside", "sys", "mount"}
	b.must(p)
	if line := mountLines(t, b, p)["/sys"]; !strings.HasPrefix(line, "sysfs rw,") {
		t.Errorf("/sys: %q", line)
	}
}

func TestRunLimits(t *testing.T) {
	b := newBox(t)
	p := b.process("limit")
	var host syscall.Rlimit
	syscall.Getrlimit(syscall.RLIMIT_CORE, &host)
	p.Ulimits = []Ulimit{{"nofile", 77, 78}, {"core", 0, 0}}
	out := b.must(p)
	for _, want := range []string{"7 77 78\n", "4 0 0\n"} {
		if !strings.Contains("\n"+out, "\n"+want) {
			t.Errorf("no %q in\n%s", want, out)
		}
	}
	p.Ulimits = []Ulimit{{"nosuch", 1, 1}}
	var setup *SetupError
	if _, err := b.run(p); !errors.As(err, &setup) {
		t.Errorf("unknown limit: %v", err)
	}
}

func TestRunNetworkNone(t *testing.T) {
	b := newBox(t)
	p := b.process("cat", "/proc/net/dev")
	p.Network = NetworkNone
	var names []string
	for line := range strings.Lines(b.must(p)) {
		if name, _, ok := strings.Cut(line, ":"); ok {
			names = append(names, strings.TrimSpace(name))
		}
	}
	for _, n := range names {
		// The kernel may add its own tunnels, which are down.
		if strings.HasPrefix(n, "e") || strings.HasPrefix(n, "w") {
			t.Errorf("interface %s", n)
		}
	}
	p.Args = []string{"inside", "cat", "/proc/net/if_inet6", "/proc/net/route"}
	if out, err := b.run(p); err == nil && strings.Count(out, "\n") > 2 {
		t.Errorf("routes or addresses:\n%s", out)
	}
	p.Args = []string{"inside", "cat", "/sys/class/net/lo/flags"}
	if out := b.must(p); out != "0x9\n" {
		t.Errorf("flags of lo: %q", out)
	}
}

func TestRunFails(t *testing.T) {
	b := newBox(t)
	b.write("top/plain", "text")
	for name, text := range map[string]string{"script": "#! /no/such/shell -e\n", "dos": "#!/bin/inside\r\n"} {
		b.write("top/"+name, text)
		os.Chmod(filepath.Join(b.dir, "top", name), 0o755)
	}
	tests := []struct {
		args   []string
		code   int
		signal syscall.Signal
		reason string
	}{
		{[]string{"inside", "exit", "17"}, 17, 0, ""},
		{[]string{"inside", "suicide"}, 2, 0, ""},
		{[]string{"nosuch"}, 127, 0, `exec: "nosuch": executable file not found in $PATH`},
		{[]string{"/nosuch"}, 127, 0, `exec: "/nosuch": stat /nosuch: no such file or directory`},
		{[]string{"/plain"}, 126, 0, `exec: "/plain": permission denied`},
		{[]string{"/tmp"}, 126, 0, `exec: "/tmp": is a directory`},
		{[]string{"/script"}, 127, 0, `exec /script: interpreter "/no/such/shell": no such file or directory`},
		{[]string{"/dos"}, 127, 0, `exec /dos: interpreter "/bin/inside\r": no such file or directory`},
	}
	for _, tt := range tests {
		p := b.process()
		p.Args = tt.args
		_, err := b.run(p)
		var exit *ExitError
		if !errors.As(err, &exit) || exit.Code != tt.code || exit.Signal != tt.signal || exit.Reason != tt.reason {
			t.Errorf("Run(%q): got %#v, want code %d, signal %v, reason %q", tt.args, err, tt.code, tt.signal, tt.reason)
		}
	}
	p := b.process("exit", "17")
	want := `process "/bin/inside exit 17" did not complete successfully: exit code: 17`
	if _, err := b.run(p); err == nil || err.Error() != want {
		t.Errorf("got %v, want %s", err, want)
	}
}

func TestRunCannotStart(t *testing.T) {
	b := newBox(t)
	tests := []struct {
		name   string
		change func(p *Process)
		want   error
	}{
		{"no lower", func(p *Process) { p.Root.Lower = nil }, nil},
		{"missing lower", func(p *Process) { p.Root.Lower = []string{b.dir + "/nope", b.dir + "/base"} }, fs.ErrNotExist},
		{"no command", func(p *Process) { p.Args = nil }, nil},
		{"target /", func(p *Process) { p.Mounts = []Mount{{Type: Tmpfs, Target: "/"}} }, nil},
		{"missing target", func(p *Process) { p.Mounts = []Mount{{Type: Tmpfs, Target: "/nope"}} }, fs.ErrNotExist},
		{"directory on a file", func(p *Process) { p.Mounts = []Mount{{Type: Tmpfs, Target: "/bin/inside"}} }, syscall.ENOTDIR},
		{"file on a directory", func(p *Process) { p.Mounts = []Mount{{Type: Data, Target: "/tmp"}} }, syscall.EISDIR},
		{"missing source", func(p *Process) { p.Mounts = []Mount{{Type: Bind, Source: b.dir + "/nope", Target: "/tmp"}} }, fs.ErrNotExist},
		{"network", func(p *Process) { p.Network = "mynet" }, nil},
		{"directory is a file", func(p *Process) { p.Dir = "/bin/inside/x" }, syscall.ENOTDIR},
		{"hostname", func(p *Process) { p.Hostname = "a\nb" }, nil},
		{"bad host", func(p *Process) { p.ExtraHosts = []string{"x"} }, nil},
	}
	for _, tt := range tests {
		p := b.process("exit", "0")
		tt.change(&p)
		_, err := b.run(p)
		var setup *SetupError
		if !errors.As(err, &setup) || tt.want != nil && !errors.Is(err, tt.want) {
			t.Errorf("%s: got %v, want *SetupError of %v", tt.name, err, tt.want)
		}
	}
	if got := b.upper(); got != nil {
		t.Errorf("left in the upper directory: %q", got)
	}
}

func TestRunOrphans(t *testing.T) {
	b := newBox(t)
	b.must(b.process("orphan"))
}

func TestRunCancel(t *testing.T) {
	b := newBox(t)
	cause := errors.New("enough")
	ctx, cancel := context.WithCancelCause(t.Context())
	p := b.process("sleep")
	p.Stdout = writerFunc(func(b []byte) (int, error) {
		cancel(cause)
		return len(b), nil
	})
	if err := run(ctx, p); !errors.Is(err, cause) {
		t.Errorf("got %v, want %v", err, cause)
	}
	if err := run(ctx, p); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled before: %v", err)
	}
}

type writerFunc func(b []byte) (int, error)

func (f writerFunc) Write(b []byte) (int, error) { return f(b) }

// TestRunKilled kills a process, as the kernel does when memory runs out, and one's launcher.
func TestRunKilled(t *testing.T) {
	b := newBox(t)
	sleeping := func() (done chan error, launcher, process int) {
		p := b.process("sleep")
		started := make(chan bool, 1)
		p.Stdout = writerFunc(func(b []byte) (int, error) {
			started <- true
			return len(b), nil
		})
		done = make(chan error)
		go func() { done <- run(t.Context(), p) }()
		<-started
		launcher = children(t, os.Getpid())[0]
		return done, launcher, children(t, launcher)[0]
	}
	done, _, process := sleeping()
	syscall.Kill(process, syscall.SIGKILL)
	var exit *ExitError
	if err := <-done; !errors.As(err, &exit) || exit.Code != 137 || exit.Signal != syscall.SIGKILL {
		t.Errorf("got %#v", err)
	}
	os.RemoveAll(b.root.Work + "/work")
	done, launcher, process := sleeping()
	pidfd, err := unix.PidfdOpen(process, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(pidfd)
	syscall.Kill(launcher, syscall.SIGKILL)
	var setup *SetupError
	if err := <-done; !errors.As(err, &setup) {
		t.Errorf("got %#v", err)
	}
	if n, err := unix.Poll([]unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}, 60_000); n != 1 {
		t.Errorf("the process lives on without its launcher: %v", err)
	}
}

// children lists the children of a process.
func children(t testing.TB, parent int) (pids []int) {
	t.Helper()
	stats, _ := filepath.Glob("/proc/[0-9]*/stat")
	for _, name := range stats {
		b, err := os.ReadFile(name)
		if err != nil {
			continue
		}
		var pid, ppid int
		var state string
		fmt.Sscan(string(b), &pid)
		fmt.Sscan(string(b[bytes.LastIndexByte(b, ')')+1:]), &state, &ppid)
		if ppid == parent && state != "Z" {
			pids = append(pids, pid)
		}
	}
	return pids
}

func TestRunOutputs(t *testing.T) {
	b := newBox(t)
	var out, errs bytes.Buffer
	p := b.process("exit", "3")
	p.Stdout, p.Stderr = &out, &errs
	if err := run(t.Context(), p); err == nil || out.String() != "" || errs.String() != "leaving\n" {
		t.Errorf("Run: %v, output %q, errors %q", err, &out, &errs)
	}
	full := errors.New("disk full")
	p = newBox(t).process("hostname")
	p.Stdout = writerFunc(func([]byte) (int, error) { return 0, full })
	if err := run(t.Context(), p); !errors.Is(err, full) {
		t.Errorf("broken writer: %v", err)
	}
}

// A process may hand its output to one outside its namespaces.
func TestOutputLeftOpen(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	var got bytes.Buffer
	o := &output{from: r, to: &got, done: make(chan struct{})}
	want := strings.Repeat("x", 60000)
	w.WriteString(want)
	go o.pump()
	o.finish()
	if got.String() != want || o.err != nil {
		t.Errorf("got %d bytes, %v; want %d", got.Len(), o.err, len(want))
	}
}

// Many at once, some of them cancelled, leave no file open and no child.
func TestRunParallel(t *testing.T) {
	open := func() int {
		list, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(list)
	}
	before := open()
	var wg sync.WaitGroup
	for i := range 16 {
		b := newBox(t)
		wg.Go(func() {
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			verb := "hostname"
			if i%2 == 0 {
				verb = "sleep"
			}
			p := b.process(verb)
			p.Stdout = writerFunc(func(b []byte) (int, error) {
				if i%2 == 0 {
					cancel()
				}
				return len(b), nil
			})
			if err := run(ctx, p); (err != nil) != (i%2 == 0) {
				t.Errorf("%s: %v", verb, err)
			}
		})
	}
	wg.Wait()
	if after := open(); after > before+1 { // the poller may have opened its own
		t.Errorf("open files: %d before, %d after", before, after)
	}
	if left := children(t, os.Getpid()); len(left) > 0 {
		t.Errorf("children left: %v", left)
	}
}

// run runs one process under Docker's filter.
func run(ctx context.Context, p Process) error {
	r := Runner{Filter: seccomp.Docker}
	defer r.Close()
	return r.Run(ctx, p, false)
}
