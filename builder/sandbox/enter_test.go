package sandbox

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"filo/builder/sandbox/seccomp"
)

// With these in its environment, the test program enters a ground, says which,
// and does something.
const (
	enterEnv = "SANDBOX_TEST_ENTER"
	doEnv    = "SANDBOX_TEST_DO"
	boxEnv   = "SANDBOX_TEST_BOX"
	napEnv   = "SANDBOX_TEST_NAP"
	// prisonEnv is a directory to take into a chroot before all this.
	prisonEnv = "SANDBOX_TEST_PRISON"
	// programEnv is where the static program is, for a run as another user.
	programEnv = "SANDBOX_TEST_PROGRAM"
)

func entersMain(how string) {
	if dir := os.Getenv(prisonEnv); dir != "" {
		fmt.Println(imprison(dir))
		os.Exit(1)
	}
	g, err := Enter(how)
	if err != nil {
		fmt.Println(err)
		os.Exit(3)
	}
	fmt.Println(g.Name, g.SingleID, os.Getuid(), os.Getpid())
	switch os.Getenv(doEnv) {
	case "why":
		fmt.Println(g.Reason)
	case "exit":
		os.Exit(7)
	case "read":
		b, err := io.ReadAll(os.NewFile(3, "inherited"))
		fmt.Println(string(b), err)
	case "sleep":
		time.Sleep(time.Hour)
	case "orphans":
		b := &box{root: Root{Dir: os.Getenv(boxEnv)}}
		p := b.act(nil, "orphans", os.Getenv(napEnv), "wait")
		p.Stdout = os.Stdout
		fmt.Println(run(context.Background(), p))
	case "again":
		b := theirBox()
		r := Runner{Filter: seccomp.Docker}
		for _, n := range []Network{NetworkNone, NetworkDefault, NetworkDefault} {
			p := b.process("pwd")
			p.Network, p.Stdout = n, os.Stdout
			if err := r.Run(context.Background(), p, false); err != nil {
				fmt.Println(err)
			}
			os.RemoveAll(b.root.Work + "/work")
		}
		r.Close()
	case "proc":
		p := theirBox().process("cat", "/proc/self/stat", "/proc/self/mountinfo")
		p.Stdout = os.Stdout
		fmt.Println(run(context.Background(), p))
	case "run":
		p := theirBox().process("sleep")
		p.Stdout = os.Stdout
		fmt.Println(run(context.Background(), p))
	}
	os.Exit(0)
}

// theirBox is the box of the test that started this program.
func theirBox() *box {
	dir := os.Getenv(boxEnv)
	return &box{dir: dir, root: Root{Lower: []string{dir + "/top", dir + "/base"}, Upper: dir + "/upper", Work: dir + "/work"}}
}

// entering is the command that enters; as an ordinary user where root may
// become one.
func enterCommand(t *testing.T, how, do string, user bool) *exec.Cmd {
	t.Helper()
	dir := t.TempDir()
	for d := dir; d != os.TempDir() && d != "/"; d = filepath.Dir(d) {
		os.Chmod(d, 0o755)
	}
	b, err := os.ReadFile(program(t))
	if err != nil {
		t.Fatal(err)
	}
	exe := filepath.Join(dir, "sandbox.test")
	if err := os.WriteFile(exe, b, 0o755); err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), exe)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), enterEnv+"="+how, doEnv+"="+do)
	if user {
		if singleID() || os.Getuid() != 0 {
			t.Skip("only root can become another user")
		}
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 1000, Gid: 1000}}
	}
	return cmd
}

// began starts a command and returns its first line.
func began(t *testing.T, cmd *exec.Cmd) (string, *bufio.Reader) {
	t.Helper()
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	r := bufio.NewReader(out)
	line, err := r.ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	return line, r
}

func TestEnterForced(t *testing.T) {
	for _, tt := range []struct {
		how, want string
		user      bool
	}{
		{"root", "root", false},
		{"rootless", "rootless", false},
		{"rootless", "rootless", true},
		{"auto", "rootless", true},
		{"root", "isolation root: not running as root", true},
		{"chroot", "chroot", false},
		{"chroot", "isolation chroot: not running as root", true},
		{"docker", `isolation "docker": not one of`, false},
	} {
		t.Run(fmt.Sprint(tt.how, tt.user), func(t *testing.T) {
			out, err := enterCommand(t, tt.how, "", tt.user).CombinedOutput()
			if tt.want == "chroot" && inUserNamespace() && strings.Contains(string(out), "devices cannot be made") {
				return
			}
			if !strings.HasPrefix(string(out), tt.want) {
				t.Errorf("got %q, %v, want %q…", out, err, tt.want)
			}
			if tt.want == "rootless" && !strings.Contains(string(out), " 0 ") {
				t.Errorf("not user 0 inside: %q", out)
			}
		})
	}
}

// TestAgain runs processes one after the other where the way home is not as usual: in a user namespace, in a directory
// that the user may not be in, and in a chroot whose paths are not those of its mount namespace.
func TestAgain(t *testing.T) {
	if singleID() || os.Getuid() != 0 {
		t.Skip("only root can chroot, and become another user")
	}
	const want = "/\n/\n/\n"
	for _, how := range []string{"root", "rootless"} {
		t.Run(how, func(t *testing.T) {
			cmd := enterCommand(t, how, "again", how == "rootless")
			b := newBox(t)
			if how == "rootless" {
				for _, name := range []string{b.root.Upper, b.root.Work} {
					if err := os.Chown(name, 1000, 1000); err != nil {
						t.Fatal(err)
					}
				}
				forbidden := t.TempDir()
				os.Chmod(filepath.Dir(forbidden), 0o755)
				if err := os.Chmod(forbidden, 0o700); err != nil {
					t.Fatal(err)
				}
				t.Chdir(forbidden)
				cmd.Dir = ""
			}
			cmd.Env = append(cmd.Env, boxEnv+"="+b.dir)
			if out, err := cmd.CombinedOutput(); err != nil || !strings.HasSuffix(string(out), want) {
				t.Errorf("%v: %s", err, out)
			}
		})
	}
	t.Run("chroot", func(t *testing.T) {
		cmd := enterCommand(t, "root", "again", false)
		b := newBox(t)
		cmd.Env = append(cmd.Env, boxEnv+"=/box", prisonEnv+"="+b.dir)
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNS}
		if out, err := cmd.CombinedOutput(); err != nil || !strings.HasSuffix(string(out), want) {
			t.Errorf("%v: %s", err, out)
		}
	})
}

// TestOwnProc sees to it that a process sees itself and its descendants, and nobody else's /proc below its own.
func TestOwnProc(t *testing.T) {
	for _, how := range []string{"root", "rootless"} {
		cmd := enterCommand(t, how, "proc", how == "rootless")
		b := newBox(t)
		for _, name := range []string{b.root.Upper, b.root.Work} {
			if err := os.Chown(name, 1000, 1000); how == "rootless" && err != nil {
				t.Fatal(err)
			}
		}
		cmd.Env = append(cmd.Env, boxEnv+"="+b.dir)
		out, err := cmd.CombinedOutput()
		if err != nil || !strings.Contains(string(out), "\n1 (") || strings.Count(string(out), " /proc ") != 1 {
			t.Errorf("%s: %v: %s", how, err, out)
		}
	}
}

// imprison starts this program again in a chroot in which a directory is /box. It is a mount, as it is for all who mean to
// use mounts there: nobody can pivot in another one.
func imprison(dir string) error {
	root := filepath.Join(dir, "prison")
	if err := os.Mkdir(root, 0o755); err != nil {
		return err
	}
	private := unix.MountAttr{Propagation: unix.MS_PRIVATE}
	err := unix.MountSetattr(unix.AT_FDCWD, "/", unix.AT_RECURSIVE, &private)
	if err == nil {
		err = unix.Mount("tmpfs", root, "tmpfs", 0, "")
	}
	for _, m := range []struct{ from, to string }{{"/proc", "/proc"}, {"/dev", "/dev"}, {"/sys", "/sys"}, {dir, "/box"}} {
		if err == nil {
			err = os.Mkdir(root+m.to, 0o755)
		}
		if err == nil {
			err = unix.Mount(m.from, root+m.to, "", unix.MS_BIND|unix.MS_REC, "")
		}
	}
	if err == nil {
		err = unix.Chroot(root)
	}
	if err == nil {
		err = unix.Chdir("/")
	}
	if err != nil {
		return err
	}
	os.Unsetenv(prisonEnv)
	os.Setenv("TMPDIR", "/")
	return syscall.Exec("/box/base/bin/"+insideName, os.Args[:1], os.Environ())
}

func TestEnterPassesOn(t *testing.T) {
	cmd := enterCommand(t, "rootless", "exit", false)
	var exit *exec.ExitError
	if out, err := cmd.CombinedOutput(); !errors.As(err, &exit) || exit.ExitCode() != 7 {
		t.Errorf("exit status: %v, %s", err, out)
	}

	cmd = enterCommand(t, "rootless", "read", false)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	w.WriteString("inherited")
	w.Close()
	cmd.ExtraFiles = []*os.File{r}
	if out, err := cmd.CombinedOutput(); err != nil || !strings.Contains(string(out), "\ninherited <nil>\n") {
		t.Errorf("inherited file: %q, %v", out, err)
	}
	r.Close()

	cmd = enterCommand(t, "rootless", "sleep", false)
	began(t, cmd)
	cmd.Process.Signal(syscall.SIGTERM)
	if err := cmd.Wait(); !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGTERM {
		t.Errorf("signal: %v", err)
	}
}

// gone waits until processes have ended.
func gone(t *testing.T, pids ...int) {
	t.Helper()
	for _, pid := range pids {
		for i := 0; ; i++ {
			stat, err := os.ReadFile(filepath.Join("/proc", itoa(pid), "stat"))
			if err != nil || strings.Contains(string(stat), ") Z ") {
				break
			}
			if i == 500 {
				t.Fatalf("process %d lives on", pid)
			}
			time.Sleep(10 * time.Millisecond)
		}
	}
}

// Whatever dies by force takes everything below along.
func TestKilledParents(t *testing.T) {
	for _, how := range []string{"root", "rootless"} {
		t.Run(how, func(t *testing.T) {
			b := newBox(t)
			cmd := enterCommand(t, how, "run", false)
			cmd.Env = append(cmd.Env, boxEnv+"="+b.dir)
			line, r := began(t, cmd)
			var name, single string
			var uid, pid int
			fmt.Sscan(line, &name, &single, &uid, &pid)
			if said, err := r.ReadString('\n'); said != "sleeping\n" {
				t.Fatalf("%q, %v", said, err)
			}
			below := children(t, pid)
			if len(below) != 1 {
				t.Fatalf("children of %d: %v", pid, below)
			}
			if err := cmd.Process.Kill(); err != nil {
				t.Fatal(err)
			}
			gone(t, append(below, pid)...)
		})
	}
}

// TestAsUser runs the tests again as an ordinary user.
func TestAsUser(t *testing.T) {
	if ranges, err := readMap("/proc/self/uid_map"); err != nil || len(ranges) != 1 || ranges[0].count < 1<<31 {
		t.Skip("in a user namespace already")
	}
	cmd := enterCommand(t, "", "", true)
	tmp := filepath.Join(cmd.Dir, "tmp")
	if err := errors.Join(os.Mkdir(tmp, 0o755), os.Chown(tmp, 1000, 1000)); err != nil {
		t.Fatal(err)
	}
	cmd.Args = append(cmd.Args, "-test.skip=TestAsUser", "-test.timeout=1m")
	docker := filepath.Join(tmp, "docker.json")
	if err := os.WriteFile(docker, dockerSource(t), 0o644); err != nil {
		t.Fatal(err)
	}
	cmd.Env = append(os.Environ(), "TMPDIR="+tmp, "HOME="+tmp, programEnv+"="+cmd.Path, dockerEnv+"="+docker)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, out)
	} else {
		t.Logf("%s", out)
	}
}

func TestGranted(t *testing.T) {
	id := itoa(os.Getuid())
	file := filepath.Join(t.TempDir(), "subuid")
	text := "somebody:1:2\n" + id + ":100000:65536\n\nbad line\n" + id + ":x:1\n" + id + ":0:5\n" + id + ":300000:1000\n"
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	got, err := granted(file)
	want := []idRange{{1, 100000, 65536}, {65537, 300000, 1000}}
	if err != nil || fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("got %v, %v, want %v", got, err, want)
	}
	if _, err := granted(file + ".none"); err == nil {
		t.Error("a missing file grants IDs")
	}
}
