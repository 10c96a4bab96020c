package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// task is one build.
type task struct {
	context string
	file    string // Dockerfile
	out     string // OCI layout directory to write, replaced
	push    string // name to push to instead of out; "" for none
}

// builder is one program that builds images.
type builder interface {
	name() string
	reset() error // forgets everything, bases included
	build(task) (usage, error)
	stop() error
}

// place is where a builder keeps its state: another directory after each reset. The old ones stay until nothing is measured
// any more, or the disk has little room: ext4 looks at each inode that was deleted nearby in the last minutes before it takes
// one, and nobody should pay for what the bench deletes between rounds.
type place struct {
	top     string // holds all of them
	n       int
	discard func(dir string) error // removes one
}

func (p *place) dir() string { return p.numbered(p.n) }

func (p *place) numbered(n int) string { return fmt.Sprintf("%s/%d", p.top, n) }

// renew leaves the state behind and makes an empty directory for the next.
func (p *place) renew() error {
	p.n++
	if err := os.MkdirAll(p.dir(), 0o755); err != nil {
		return err
	}
	spread(p.top)
	var st unix.Statfs_t
	if err := unix.Statfs(p.top, &st); err != nil || st.Bavail > st.Blocks/5 {
		return err
	}
	return p.discardUntil(p.n)
}

// discardUntil removes all directories below a number.
func (p *place) discardUntil(n int) (err error) {
	for i := range n {
		if _, gone := os.Stat(p.numbered(i)); gone == nil {
			err = errors.Join(err, p.discard(p.numbered(i)))
		}
	}
	return err
}

// peer is a builder besides filo and what must be installed for it.
type peer struct {
	name  string
	needs []string
	make  func(at *place, registry string) builder
}

func peers() []peer {
	return []peer{
		{"buildkit", []string{"buildkitd", "buildctl", "runc"}, func(at *place, reg string) builder { return &buildkit{place: at, registry: reg} }},
		{"docker", []string{"docker", "dockerd"}, func(at *place, reg string) builder { return &docker{at} }},
		{"buildah", []string{"buildah"}, func(at *place, reg string) builder { return &podman{"buildah", at} }},
		{"podman", []string{"podman"}, func(at *place, reg string) builder { return &podman{"podman", at} }},
		{"kaniko", []string{"executor", "unshare"}, func(at *place, reg string) builder { return &kaniko{at} }},
	}
}

func peerNames() []string {
	var names []string
	for _, p := range peers() {
		names = append(names, p.name)
	}
	return names
}

func (p peer) installed() bool {
	return !slices.ContainsFunc(p.needs, func(program string) bool {
		_, err := exec.LookPath(program)
		return err != nil
	})
}

// rounds is how often a peer is to do each work; 0 for one that is not wanted.
func (p peer) rounds(o options) int {
	for _, want := range strings.Split(o.peers, ",") {
		name, n, limited := strings.Cut(want, ":")
		if name != p.name && name != "all" {
			continue
		}
		if rounds, err := strconv.Atoi(n); limited && err == nil {
			return min(rounds, o.rounds)
		}
		return o.rounds
	}
	return 0
}

// contender is a builder and how often it does each work.
type contender struct {
	builder
	rounds int
}

// contenders returns filo and the peers that are wanted and installed.
func contenders(o options, dir, registry string) []contender {
	at := func(name string) *place { return &place{top: filepath.Join(dir, name), discard: discard} }
	mine := &filoBuilder{binary: o.filo, place: at("filo"), keep: o.keep}
	mine.discard = mine.forget
	all := []contender{{mine, o.rounds}}
	for _, p := range peers() {
		if n := p.rounds(o); n > 0 && p.installed() {
			all = append(all, contender{p.make(at(p.name), registry), n})
		}
	}
	return all
}

// missing names the peers that are wanted and not installed.
func missing(o options) []string {
	var names []string
	for _, p := range peers() {
		if p.rounds(o) > 0 && !p.installed() {
			names = append(names, fmt.Sprintf("%s (needs %s)", p.name, strings.Join(p.needs, ", ")))
		}
	}
	return names
}

// discard removes a directory in which something may still be mounted.
func discard(dir string) error {
	mounts, _ := os.ReadFile("/proc/self/mounts")
	lines := strings.Split(string(mounts), "\n")
	for _, l := range slices.Backward(lines) {
		if f := strings.Fields(l); len(f) > 1 && strings.HasPrefix(f[1], dir+"/") {
			_ = syscall.Unmount(f[1], syscall.MNT_DETACH)
		}
	}
	return os.RemoveAll(dir)
}

// spread makes the file system put what is made in the directories of dir far from each other, where it can.
func spread(dir string) {
	f, err := os.Open(dir)
	if err != nil {
		return
	}
	defer f.Close()
	if flags, err := unix.IoctlGetUint32(int(f.Fd()), unix.FS_IOC_GETFLAGS); err == nil {
		const topdir = 0x20000 // FS_TOPDIR_FL
		_ = unix.IoctlSetPointerInt(int(f.Fd()), unix.FS_IOC_SETFLAGS, int(flags|topdir))
	}
}

// emptied makes dir an empty directory.
func emptied(dir string) error {
	return errors.Join(discard(dir), os.MkdirAll(dir, 0o755))
}

type filoBuilder struct {
	*place
	binary string
	keep   bool
}

func (b *filoBuilder) name() string { return "filo" }
func (b *filoBuilder) reset() error { return b.renew() }

func (b *filoBuilder) stop() error {
	if b.keep || os.Getuid() == 0 { // who is root removes all in the end
		return nil
	}
	return b.discardUntil(b.n + 1)
}

// forget removes a state. An ordinary user can't remove what belongs to other ids of a rootless build.
func (b *filoBuilder) forget(dir string) error {
	if os.Getuid() != 0 {
		if err := exec.Command(b.binary, "prune", "--all", "--root", dir).Run(); err != nil {
			return err
		}
	}
	return discard(dir)
}

func (b *filoBuilder) build(k task) (usage, error) {
	args := []string{b.binary, "build", "--root", b.dir(), "--progress", "plain", "-f", k.file}
	if k.push != "" {
		args = append(args, "--push", "-t", k.push)
	} else {
		args = append(args, "-o", "type=oci,tar=false,dest="+k.out)
		os.RemoveAll(k.out)
	}
	return timed(nil, append(args, k.context)...)
}

// buildkit is a buildkitd of its own.
type buildkit struct {
	*place
	registry string
	daemon   *exec.Cmd
}

func (b *buildkit) name() string    { return "buildkit" }
func (b *buildkit) address() string { return "unix://" + filepath.Join(b.dir(), "sock") }

func (b *buildkit) stop() error {
	if b.daemon == nil {
		return nil
	}
	err := b.daemon.Process.Signal(syscall.SIGTERM)
	_ = b.daemon.Wait() // its status is the signal's
	b.daemon = nil
	return err
}

func (b *buildkit) reset() error {
	if err := errors.Join(b.stop(), b.renew()); err != nil {
		return err
	}
	log, err := os.Create(filepath.Join(b.dir(), "log"))
	if err != nil {
		return err
	}
	defer log.Close()
	b.daemon = exec.Command("buildkitd", "--root", filepath.Join(b.dir(), "state"), "--addr", b.address(),
		"--containerd-worker=false", "--oci-worker-gc=false", "--oci-worker-snapshotter=overlayfs", "--oci-worker-net=host")
	b.daemon.Stdout, b.daemon.Stderr = log, log
	if err := b.daemon.Start(); err != nil {
		return err
	}
	for range 200 {
		if exec.Command("buildctl", "--addr", b.address(), "debug", "workers").Run() == nil {
			return nil
		}
		time.Sleep(50 * time.Millisecond)
	}
	return fmt.Errorf("buildkitd does not answer, see %s", log.Name())
}

func (b *buildkit) build(k task) (usage, error) {
	output := "type=oci,tar=false,dest=" + k.out
	if k.push != "" {
		output = "type=image,push=true,registry.insecure=true,name=" + k.push
	} else if err := emptied(k.out); err != nil {
		return usage{}, err
	}
	return ofDaemon(b.daemon.Process.Pid, func() (usage, error) {
		return timed(nil, "buildctl", "--addr", b.address(), "build", "--progress", "plain", "--frontend", "dockerfile.v0",
			"--local", "context="+k.context, "--local", "dockerfile="+filepath.Dir(k.file), "--opt", "filename="+filepath.Base(k.file), "--output", output)
	})
}

// docker is the BuildKit in a running dockerd, which is not ours to stop: its cache is pruned, its own cost not seen.
type docker struct{ *place }

func (b *docker) name() string { return "docker" }
func (b *docker) stop() error  { return nil }

func (b *docker) reset() error {
	out, err := exec.Command("docker", "builder", "prune", "--all", "--force").CombinedOutput()
	if err != nil {
		return fmt.Errorf("%w: %s", err, out)
	}
	return b.renew()
}

func (b *docker) build(k task) (usage, error) {
	if k.push != "" {
		u, err := timed(nil, "docker", "build", "-t", k.push, "-f", k.file, k.context)
		if err != nil {
			return u, err
		}
		more, err := timed(nil, "docker", "push", k.push)
		return u.plus(more), err
	}
	if err := emptied(k.out); err != nil {
		return usage{}, err
	}
	return timed(nil, "docker", "buildx", "build", "-o", "type=oci,tar=false,dest="+k.out, "-f", k.file, k.context)
}

// podman is buildah or podman, which share their storage code and flags.
type podman struct {
	program string
	*place
}

func (b *podman) name() string { return b.program }
func (b *podman) stop() error  { return nil }
func (b *podman) reset() error { return b.renew() }

func (b *podman) build(k task) (usage, error) {
	base := []string{
		b.program, "--root", filepath.Join(b.dir(), "root"), "--runroot", filepath.Join(b.dir(), "run"), "--storage-driver", "overlay",
	}
	var env []string
	if _, err := exec.LookPath("runc"); err == nil { // crun refuses hybrid cgroups
		env = []string{"BUILDAH_RUNTIME=runc"}
		if b.program == "podman" {
			base = append(base, "--runtime", "runc")
		}
	}
	build := append(slices.Clone(base), "build", "--layers", "--isolation", "oci", "--network", "host", "--tls-verify=false", "-t", "bench", "-f", k.file, k.context)
	u, err := timed(env, build...)
	if err != nil {
		return u, err
	}
	to := "oci:" + k.out
	if k.push != "" {
		to = "docker://" + k.push
	} else if err := os.RemoveAll(k.out); err != nil {
		return u, err
	}
	more, err := timed(env, append(base, "push", "--tls-verify=false", "bench", to)...)
	return u.plus(more), err
}

// kaniko is its executor in a root file system of its own, which it empties with each build.
type kaniko struct{ *place }

func (b *kaniko) name() string { return "kaniko" }
func (b *kaniko) stop() error  { return nil }
func (b *kaniko) reset() error { return b.renew() }

func (b *kaniko) build(k task) (usage, error) {
	root := filepath.Join(b.dir(), "root")
	for _, dir := range []string{"kaniko", "context", "out", "proc", "dev", "etc", "cache"} {
		if err := os.MkdirAll(filepath.Join(root, dir), 0o755); err != nil {
			return usage{}, err
		}
	}
	executor, err := exec.LookPath("executor")
	if err != nil {
		return usage{}, err
	}
	binary, err := os.ReadFile(executor)
	if err == nil {
		err = os.WriteFile(filepath.Join(root, "kaniko", "executor"), binary, 0o755)
	}
	if err == nil {
		err = emptied(k.out)
	}
	if err != nil {
		return usage{}, err
	}
	to := "--no-push --oci-layout-path=/out"
	if k.push != "" {
		to = "--insecure --destination=" + k.push
	}
	const script = `mount --bind "$1" "$0/context" && mount --bind "$2" "$0/out" && mount -t proc proc "$0/proc" && mount --rbind /dev "$0/dev" &&
cp "$3" "$0/kaniko/Dockerfile" && exec chroot "$0" /kaniko/executor --force --single-snapshot=false --context=/context --dockerfile=/kaniko/Dockerfile --insecure-pull `
	return timed(nil, "unshare", "--mount", "--pid", "--fork", "sh", "-c", script+to, root, k.context, k.out, k.file)
}
