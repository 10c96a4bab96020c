package sandbox

import (
	"bytes"
	"debug/elf"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// The program in the sandbox is this test program itself, by another name.
const insideName = "inside"

func TestMain(m *testing.M) {
	Init()
	if len(os.Args) > 1 && filepath.Base(os.Args[0]) == insideName {
		if err := insideMain(os.Args[1], os.Args[2:]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	g, err := Enter("")
	if err != nil || g.Name == "none" {
		fmt.Fprintln(os.Stderr, "sandbox tests: no ground:", g.Reason, err)
		os.Exit(1)
	}
	fmt.Fprintf(os.Stderr, "sandbox tests: ground %s: %s\n", g.Name, g.Reason)
	os.Exit(m.Run())
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
	case "umask":
		fmt.Printf("%o\n", syscall.Umask(0))
	default:
		return fmt.Errorf("no verb %s", verb)
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
		_, _, errno := syscall.RawSyscall(250, 0, 0, 0)
		return report0(errno)
	case "clone3":
		_, _, errno := syscall.RawSyscall(435, 0, 0, 0)
		return report0(errno)
	case "future":
		_, _, errno := syscall.RawSyscall(4000, 0, 0, 0)
		return report0(errno)
	case "vsock":
		_, _, errno := syscall.RawSyscall(syscall.SYS_SOCKET, 40, 1, 0)
		return report0(errno)
	case "inet":
		_, _, errno := syscall.RawSyscall(syscall.SYS_SOCKET, 2, 1, 0)
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

// program returns this test program, static.
var program = func() func(testing.TB) string {
	var path string
	return func(t testing.TB) string {
		t.Helper()
		if path != "" {
			return path
		}
		f, err := elf.Open("/proc/self/exe")
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if !slices.ContainsFunc(f.Progs, func(p *elf.Prog) bool { return p.Type == elf.PT_INTERP }) {
			path, err = os.Executable()
		} else {
			path = filepath.Join(os.TempDir(), "filo-sandbox-inside")
			cmd := exec.Command("go", "test", "-c", "-o", path, ".")
			cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
			var out []byte
			if out, err = cmd.CombinedOutput(); err != nil {
				err = fmt.Errorf("%w: %s", err, out)
			}
		}
		if err != nil {
			t.Fatal(err)
		}
		return path
	}
}()

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
	err := Run(b.Context(), p)
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

func TestRunSmoke(t *testing.T) {
	b := newBox(t)
	for _, args := range [][]string{{"cat", "/proc/self/status"}, {"ls", "/dev", "/"}, {"cat", "/proc/self/mountinfo"}, {"env"}, {"id"}, {"hostname"}, {"fds"}, {"cat", "/etc/hosts", "/etc/resolv.conf"}} {
		t.Logf("%q\n%s", args, b.must(b.process(args...)))
	}
	t.Log(b.upper())
}
