package sandbox

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// prey is what a hostile process is told of the machine, to make it easy.
type prey struct {
	Pid          int    // a process outside
	Major, Minor uint32 // a disk
	File         string // a file outside, by its path there
	Chroot       bool   // the ground
}

// attack tries something that nobody may do, and returns why it could not be done.
type attack struct {
	name string
	do   func(p prey) error
	ok   func(p prey) bool // where it is allowed nevertheless; nil is nowhere
}

// onChroot: there are no mounts to hide things; the container around is what protects the machine.
func onChroot(p prey) bool { return p.Chroot }

// call0 is a system call that must be refused before the kernel looks at its arguments.
func call0(nr uintptr, args ...uintptr) func(prey) error {
	return func(prey) error {
		var a [6]uintptr
		copy(a[:], args)
		_, _, errno := syscall.RawSyscall6(nr, a[0], a[1], a[2], a[3], a[4], a[5])
		if errno == unix.EPERM || errno == unix.ENOSYS || errno == unix.EACCES {
			return errno
		}
		fmt.Printf("(%v) ", errno)
		return nil
	}
}

// writing tries to write to a file that belongs to the kernel.
func writing(name, text string) func(prey) error {
	return func(prey) error {
		f, err := os.OpenFile(name, os.O_WRONLY|os.O_TRUNC, 0)
		if err != nil {
			return err
		}
		defer f.Close()
		_, err = f.WriteString(text)
		return err
	}
}

// reading tries to read something from a file that must be empty or missing.
func reading(name string) func(prey) error {
	return func(prey) error {
		f, err := os.Open(name)
		if err != nil {
			return err
		}
		defer f.Close()
		_, err = f.Read(make([]byte, 1))
		return err
	}
}

// attacks is the table. Those on processes are left to grounds that have a pid namespace.
func attacks() []attack {
	return []attack{
		{name: "mount", do: func(prey) error { return unix.Mount("tmpfs", "/tmp", "tmpfs", 0, "") }},
		{name: "umount", do: func(prey) error { return unix.Unmount("/proc", unix.MNT_DETACH) }},
		{name: "fsopen", do: func(prey) error { _, err := unix.Fsopen("tmpfs", 0); return err }},
		{name: "open_tree", do: func(prey) error { _, err := unix.OpenTree(-100, "/", unix.OPEN_TREE_CLONE); return err }},
		{name: "move_mount", do: call0(unix.SYS_MOVE_MOUNT)},
		{name: "mount_setattr", do: call0(unix.SYS_MOUNT_SETATTR)},
		{name: "pivot_root", do: func(prey) error { return unix.PivotRoot("/", "/tmp") }},
		{name: "unshare user", do: call0(unix.SYS_UNSHARE, unix.CLONE_NEWUSER)},
		{name: "unshare mount", do: call0(unix.SYS_UNSHARE, unix.CLONE_NEWNS)},
		{name: "clone user", do: call0(unix.SYS_CLONE, unix.CLONE_NEWUSER|uintptr(unix.SIGCHLD))},
		{name: "setns", do: call0(unix.SYS_SETNS, ^uintptr(0))},
		{name: "keyctl", do: call0(unix.SYS_KEYCTL)},
		{name: "add_key", do: call0(unix.SYS_ADD_KEY)},
		{name: "request_key", do: call0(unix.SYS_REQUEST_KEY)},
		{name: "bpf", do: call0(unix.SYS_BPF)},
		{name: "perf_event_open", do: call0(unix.SYS_PERF_EVENT_OPEN)},
		{name: "userfaultfd", do: call0(unix.SYS_USERFAULTFD)},
		{name: "io_uring", do: call0(unix.SYS_IO_URING_SETUP)},
		{name: "init_module", do: call0(unix.SYS_INIT_MODULE)},
		{name: "finit_module", do: call0(unix.SYS_FINIT_MODULE)},
		{name: "delete_module", do: call0(unix.SYS_DELETE_MODULE)},
		{name: "kexec_load", do: call0(unix.SYS_KEXEC_LOAD)},
		{name: "reboot", do: call0(unix.SYS_REBOOT)},
		{name: "swapon", do: call0(unix.SYS_SWAPON)},
		{name: "settimeofday", do: call0(unix.SYS_SETTIMEOFDAY)},
		{name: "acct", do: call0(unix.SYS_ACCT)},
		{name: "quotactl", do: call0(unix.SYS_QUOTACTL)},
		{name: "syslog", do: call0(unix.SYS_SYSLOG, 3)},
		{name: "open_by_handle_at", do: call0(unix.SYS_OPEN_BY_HANDLE_AT, ^uintptr(99))},
		{name: "fanotify_init", do: call0(unix.SYS_FANOTIFY_INIT)},
		{name: "sethostname", do: call0(unix.SYS_SETHOSTNAME)},
		{name: "ptrace", do: func(p prey) error { return unix.PtraceAttach(p.Pid) }, ok: onChroot},
		{name: "read memory", do: reads("/proc/%d/mem")},
		{name: "root of another", do: reads("/proc/%d/root/etc/hostname")},
		{name: "signal", do: func(p prey) error { return unix.Kill(p.Pid, 0) }, ok: onChroot},
		{name: "signal all", do: func(p prey) error {
			if p.Chroot {
				return errors.New("not tried")
			}
			return unix.Kill(-1, 0)
		}},
		{name: "read disk", do: disk(unix.O_RDONLY)},
		{name: "write disk", do: disk(unix.O_WRONLY)},
		{name: "disk in /dev", do: func(p prey) error { return device0("/dev/disk", unix.S_IFBLK, p.Major, p.Minor, unix.O_RDONLY) }},
		{name: "disk in /dev/shm", do: func(p prey) error { return device0("/dev/shm/disk", unix.S_IFBLK, p.Major, p.Minor, unix.O_RDONLY) }},
		{name: "disk on a tmpfs", do: func(p prey) error { return device0("/scratch/disk", unix.S_IFBLK, p.Major, p.Minor, unix.O_RDONLY) }},
		{name: "disk in a cache", do: func(p prey) error { return device0("/cache/disk", unix.S_IFBLK, p.Major, p.Minor, unix.O_RDONLY) }},
		{name: "disk of the base image", do: func(prey) error { return reading("/disk")(prey{}) }},
		{name: "mem", do: func(prey) error { return device0("/tmp/mem", unix.S_IFCHR, 1, 1, unix.O_RDONLY) }},
		{name: "kmsg", do: func(prey) error { return device0("/tmp/kmsg", unix.S_IFCHR, 1, 11, unix.O_RDONLY) }},
		{name: "fuse", do: func(prey) error { return device0("/tmp/fuse", unix.S_IFCHR, 10, 229, unix.O_RDWR) }},
		{name: "tun", do: func(prey) error { return device0("/tmp/tun", unix.S_IFCHR, 10, 200, unix.O_RDWR) }},
		{name: "loop-control", do: func(prey) error { return device0("/tmp/loop", unix.S_IFCHR, 10, 237, unix.O_RDWR) }},
		{name: "/dev/mem", do: reading("/dev/mem")},
		{name: "core_pattern", do: writing("/proc/sys/kernel/core_pattern", "|/tmp/x")},
		{name: "sysctl", do: writing("/proc/sys/kernel/panic", "0")},
		{name: "sysrq", do: writing("/proc/sysrq-trigger", "h")},
		{name: "uevent_helper", do: writing("/sys/kernel/uevent_helper", "/tmp/x")},
		{name: "sys", do: func(prey) error { return os.Mkdir("/sys/kernel/x", 0o755) }, ok: onChroot},
		{name: "cgroup", do: func(prey) error { return os.Mkdir("/sys/fs/cgroup/x", 0o755) }},
		{name: "release_agent", do: writing("/sys/fs/cgroup/release_agent", "/tmp/x")},
		{name: "kcore", do: reading("/proc/kcore")},
		{name: "keys", do: reading("/proc/keys")},
		{name: "timer_list", do: reading("/proc/timer_list")},
		{name: "interrupts", do: reading("/proc/interrupts")},
		{name: "file outside", do: func(p prey) error { return reading(p.File)(p) }},
		{name: "above the root", do: func(p prey) error { return reading("/" + strings.Repeat("../", 40) + p.File)(p) }},
		{name: "inherited files", do: inherited},
		{name: "environment", do: func(prey) error {
			for _, e := range os.Environ() {
				if strings.HasPrefix(e, "FILO_") || strings.HasPrefix(e, "SANDBOX_") || strings.HasPrefix(e, "HOSTILE_") {
					return nil
				}
			}
			return errors.New("only what it was given")
		}},
		{name: "terminal", do: func(prey) error { // type into whatever terminal filo was started from
			tty, err := unix.Open("/dev/tty", unix.O_RDWR, 0)
			if err != nil {
				return err
			}
			return unix.IoctlSetPointerInt(tty, unix.TIOCSTI, 'x')
		}},
		{name: "packets", do: socket(unix.AF_PACKET, unix.SOCK_RAW), ok: onChroot},
		{name: "raw socket", do: socket(unix.AF_INET, unix.SOCK_RAW), ok: onChroot},
		{name: "raw socket, quiet", do: socket(unix.AF_INET6, unix.SOCK_RAW|unix.SOCK_CLOEXEC), ok: onChroot},
		{name: "vsock", do: socket(unix.AF_VSOCK, unix.SOCK_STREAM)},
		{name: "chroot out", do: chrootOut, ok: onChroot},
	}
}

func reads(pattern string) func(prey) error {
	return func(p prey) error {
		if p.Chroot {
			return errors.New("no such process in /proc")
		}
		return reading(fmt.Sprintf(pattern, p.Pid))(p)
	}
}

func socket(family, kind int) func(prey) error {
	return func(prey) error {
		fd, err := unix.Socket(family, kind, unix.IPPROTO_ICMP)
		if err == nil {
			unix.Close(fd)
		}
		return err
	}
}

func disk(flags int) func(prey) error {
	return func(p prey) error { return device0("/tmp/disk", unix.S_IFBLK, p.Major, p.Minor, flags) }
}

// device0 makes a node and opens it.
func device0(name string, kind, major, minor uint32, flags int) error {
	os.Remove(name)
	defer os.Remove(name)
	if err := unix.Mknod(name, kind|0o600, int(unix.Mkdev(major, minor))); err != nil {
		return err
	}
	fd, err := unix.Open(name, flags, 0)
	if err == nil {
		unix.Close(fd)
	}
	return err
}

// inherited looks for files that filo has open.
func inherited(prey) error {
	for fd := 3; fd < 1024; fd++ {
		var st unix.Stat_t
		if unix.Fstat(fd, &st) != nil {
			continue
		}
		if kind := st.Mode & unix.S_IFMT; kind == unix.S_IFREG || kind == unix.S_IFDIR || kind == unix.S_IFBLK {
			return nil
		}
	}
	return errors.New("none")
}

// chrootOut is the old way out of a chroot: keep a directory open outside of the next one, and climb.
func chrootOut(p prey) error {
	if err := os.MkdirAll("/tmp/jail", 0o755); err != nil {
		return err
	}
	defer os.Remove("/tmp/jail")
	top, err := unix.Open("/", unix.O_DIRECTORY, 0)
	if err != nil {
		return err
	}
	defer func() {
		unix.Fchdir(top)
		unix.Chroot(".")
		unix.Close(top)
	}()
	if err := unix.Chroot("/tmp/jail"); err != nil {
		return err
	}
	if err := unix.Fchdir(top); err != nil {
		return err
	}
	for range 60 {
		unix.Chdir("..")
	}
	return reading("." + p.File)(p)
}

// insideHostile runs all attacks in the sandbox.
func insideHostile(arg string) error {
	var p prey
	if err := json.Unmarshal([]byte(arg), &p); err != nil {
		return err
	}
	broken := 0
	for _, a := range attacks() {
		err := a.do(p)
		if err == nil && !(a.ok != nil && a.ok(p)) {
			fmt.Printf("BROKEN: %s\n", a.name)
			broken++
		}
	}
	fmt.Printf("%d attacks, %d succeeded\n", len(attacks()), broken)
	return nil
}

// someDisk returns the number of a disk of the machine, or one that could be.
func someDisk() (major, minor uint32) {
	list, _ := os.ReadFile("/proc/partitions")
	for line := range strings.Lines(string(list)) {
		if n, _ := fmt.Sscan(line, &major, &minor); n == 2 {
			return major, minor
		}
	}
	return 8, 0
}

// hostile runs the attacks in a box.
func hostile(t *testing.T, b *box, ground Ground) string {
	t.Helper()
	secret := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(secret, []byte("of the machine"), 0o644); err != nil {
		t.Fatal(err)
	}
	p := prey{Pid: os.Getppid(), File: secret, Chroot: ground.Name == groundChroot}
	p.Major, p.Minor = someDisk()
	arg, err := json.Marshal(p)
	if err != nil {
		t.Fatal(err)
	}
	t.Setenv("HOSTILE_SECRET", "in filo's environment")
	proc := b.process("hostile", string(arg))
	proc.Ground, proc.Mounts = ground, hostileMounts(t)
	return b.must(proc)
}

func hostileMounts(t *testing.T) []Mount {
	cache := filepath.Join(t.TempDir(), "cache")
	if err := os.MkdirAll(cache, 0o777); err != nil {
		t.Fatal(err)
	}
	return []Mount{{Type: Tmpfs, Target: "/scratch"}, {Type: Bind, Source: cache, Target: "/cache"}}
}

// TestHostile has a process try whatever reaches the machine, as root and with all that Docker leaves it.
func TestHostile(t *testing.T) {
	for name, make := range map[string]func(testing.TB, ...Mount) *box{"best": newBox, "chroot": newStall} {
		t.Run(name, func(t *testing.T) {
			b := make(t, hostileMounts(t)...)
			in := filepath.Join(b.dir, "base")
			if b.root.Dir != "" {
				in = b.root.Dir
			}
			major, minor := someDisk()
			if err := unix.Mknod(filepath.Join(in, "disk"), unix.S_IFBLK|0o666, int(unix.Mkdev(major, minor))); err != nil {
				t.Log("no device node in the base image: ", err)
			}
			ground := b.process("x").Ground
			if name == "chroot" {
				ground = Ground{Name: groundChroot}
			}
			out := hostile(t, b, ground)
			t.Log(ground.Name, strings.TrimSpace(out))
			if !strings.Contains(out, " 0 succeeded") {
				t.Errorf("on the ground %s:\n%s", ground.Name, out)
			}
		})
	}
}

// cgroupsEnv says that this is a test run by TestHostileCgroups, and with which cgroups.
const cgroupsEnv = "SANDBOX_TEST_CGROUPS"

// TestHostileCgroups is TestHostile where devices are kept away by cgroups of version 2, and where there are none.
func TestHostileCgroups(t *testing.T) {
	if os.Geteuid() != 0 || inUserNamespace() {
		t.Skip("only root can use devices at all")
	}
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for with, mount := range map[string]string{"none": "true", "unified": "mount -t cgroup2 none /sys/fs/cgroup"} {
		cmd := exec.Command("unshare", "-m", "sh", "-c", `umount -R -l /sys/fs/cgroup 2>/dev/null; `+mount+` && exec "$@"`, "sh",
			exe, "-test.run", "^TestHostile$/^best$|^TestDevices$", "-test.v")
		cmd.Env = append(os.Environ(), cgroupsEnv+"="+with)
		out, err := cmd.CombinedOutput()
		if err != nil || !bytes.Contains(out, []byte("--- PASS: TestHostile/best")) || bytes.Contains(out, []byte("--- FAIL")) {
			t.Errorf("cgroups: %s: %v\n%s", with, err, out)
		}
	}
}

// TestDevices uses the devices that a process may use, makes others, and finds them in the layer.
func TestDevices(t *testing.T) {
	b := newBox(t)
	if err := unix.Mknod(filepath.Join(b.dir, "node"), unix.S_IFCHR|0o600, int(unix.Mkdev(1, 3))); err != nil {
		t.Skip("no device can be made: ", err)
	}
	p := b.process("devices")
	if with := os.Getenv(cgroupsEnv); with == "unified" || with == "" && (Limits{PIDs: 100}).Try() == nil {
		p.Env = append(p.Env, "NODES=1")
	}
	b.must(p)
	var st unix.Stat_t
	if err := unix.Stat(filepath.Join(b.dir, "upper", "tmp", "disk"), &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFBLK {
		t.Errorf("a disk that the process made: %v, mode %o", err, st.Mode)
	}
}

func insideDevices() error {
	for _, name := range []string{"null", "zero", "full", "random", "urandom"} {
		f, err := os.OpenFile("/dev/"+name, os.O_RDWR, 0)
		if err != nil {
			return err
		}
		f.Close()
	}
	if f, err := os.OpenFile("/dev/ptmx", os.O_RDWR, 0); err != nil {
		return err
	} else if err := f.Close(); err != nil {
		return err
	}
	err := device0("/tmp/null", unix.S_IFCHR, 1, 3, unix.O_RDWR)
	if err != nil && os.Getenv("NODES") != "" {
		return fmt.Errorf("use a node of null: %w", err)
	}
	return unix.Mknod("/tmp/disk", unix.S_IFBLK|0o600, int(unix.Mkdev(8, 0)))
}
