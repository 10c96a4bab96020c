package main

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/moby/profiles/seccomp"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// groundsDockerfile needs no network: what it runs is in its context.
const groundsDockerfile = `FROM scratch AS base
COPY busybox /bin/busybox
RUN ["/bin/busybox", "--install", "-s", "/bin"]
RUN mkdir -p /etc /tmp /data && chmod 1777 /tmp && echo root:x:0:0:root:/root:/bin/sh > /etc/passwd
RUN --mount=type=secret,id=k --mount=type=cache,target=/cache --mount=type=tmpfs,target=/scratch --mount=type=bind,target=/ctx \
    test "$(cat /run/secrets/k)" = s3cret && test -f /ctx/Dockerfile && echo x > /cache/f && echo y > /scratch/f && \
    echo z > /dev/null && echo done > /data/out && ln /data/out /data/link && mkfifo /data/fifo && \
    ln /data/fifo /data/fifo2 && ln -s out /data/sym && ln /data/sym /data/sym2 && ln /data/sym /data/sym3 && grep -q localhost /etc/hosts
RUN touch -h -d @5 /data/sym /data/sym2 /data/sym3 && ln /data/fifo2 /data/fifo3 && rm /data/fifo && test "$(readlink /data/sym2)" = out
RUN rm -r /tmp && mkdir /tmp && mv /data/out /data/moved && chmod 4755 /bin/busybox && test ! -e /scratch && test ! -e /run/secrets/k
FROM base AS last
WORKDIR /work
COPY --from=base /data/moved copied
COPY --from=base /data/ all/
RUN cat copied > again && rm copied
`

// dockerCaps are those of Docker's containers.
var dockerCaps = strings.Fields("CAP_CHOWN CAP_DAC_OVERRIDE CAP_FSETID CAP_FOWNER CAP_MKNOD CAP_NET_RAW CAP_SETGID CAP_SETUID " +
	"CAP_SETFCAP CAP_SETPCAP CAP_NET_BIND_SERVICE CAP_SYS_CHROOT CAP_KILL CAP_AUDIT_WRITE")

// profile is a kind of container that jobs get.
type profile struct {
	name       string
	uid        uint32
	caps       []string
	unconfined bool // no seccomp
	unmasked   bool // all of /proc and /sys
	volume     bool // the state is not on the container's own overlay
	online     bool // the machine's network
	isolation  string
	storage    string
	message    string // where no step can run: what has to be said
}

var profiles = []profile{
	{name: "docker", caps: dockerCaps, isolation: "chroot", storage: "vfs"},
	{name: "docker with volume", caps: dockerCaps, volume: true, isolation: "chroot", storage: "vfs"},
	{name: "docker unmasked", caps: dockerCaps, unmasked: true, isolation: "chroot", storage: "vfs"},
	{name: "docker user", uid: 1000, volume: true, isolation: "none", message: "seccomp=unconfined"},
	{name: "cap-drop all", volume: true, isolation: "none", message: "capability SYS_CHROOT is missing"},
	{name: "unconfined", caps: dockerCaps, unconfined: true, isolation: "rootless", storage: "vfs"},
	{name: "unconfined with volume", caps: dockerCaps, unconfined: true, volume: true, isolation: "rootless", storage: "overlay"},
	{name: "unconfined unmasked", caps: dockerCaps, unconfined: true, unmasked: true, volume: true, isolation: "rootless", storage: "overlay"},
	{name: "unconfined user", uid: 1000, unconfined: true, volume: true, isolation: "rootless", storage: "overlay"},
	{name: "unconfined cap-drop all", unconfined: true, volume: true, isolation: "none", message: "capability SETUID is missing"}, // who maps user 0 needs SETFCAP
	{name: "sys_admin", caps: append([]string{"CAP_SYS_ADMIN"}, dockerCaps...), volume: true, isolation: "root", storage: "overlay"},
}

// TestGrounds builds inside real containers as CI jobs get them. Wherever steps can run, the image is the same.
func TestGrounds(t *testing.T) {
	g := newGrounds(t)
	want := g.digest(t, g.onHost(t, "root"))
	for _, isolation := range []string{"rootless", "chroot"} {
		if got := g.digest(t, g.onHost(t, isolation)); got != want {
			t.Errorf("%s on the host: image %s, want %s", isolation, got, want)
		}
	}
	for _, runtime := range []string{"runc", "crun"} {
		if _, err := exec.LookPath(runtime); err != nil {
			t.Log(err)
			continue
		}
		for _, p := range profiles {
			t.Run(runtime+" "+p.name, func(t *testing.T) { g.try(t, runtime, p, want) })
		}
	}
	t.Run("filo in filo", func(t *testing.T) { g.nested(t, want) })
}

// grounds is what the containers are made of.
type grounds struct {
	dir, filo, context string
}

func newGrounds(t *testing.T) *grounds {
	t.Helper()
	if os.Geteuid() != 0 || os.Getenv("FILO_TEST_NAMESPACE") != "" {
		t.Skip("only root can make containers")
	}
	busybox, err := os.ReadFile("/bin/busybox")
	if err != nil {
		t.Skip("busybox-static is not installed: ", err)
	}
	g := &grounds{dir: t.TempDir()}
	for d := g.dir; d != os.TempDir() && d != "/"; d = filepath.Dir(d) {
		os.Chmod(d, 0o755)
	}
	g.filo, g.context = filepath.Join(g.dir, "filo"), filepath.Join(g.dir, "context")
	cmd := exec.Command("go", "build", "-o", g.filo, ".")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build filo: %v\n%s", err, out)
	}
	g.write(t, "context/Dockerfile", groundsDockerfile, 0o644)
	g.write(t, "context/busybox", string(busybox), 0o755)
	g.write(t, "context/k", "s3cret", 0o644)
	g.write(t, "context/.dockerignore", "k\n", 0o644)
	return g
}

func (g *grounds) write(t *testing.T, name, text string, mode os.FileMode) {
	t.Helper()
	p := filepath.Join(g.dir, name)
	if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(p, []byte(text), mode); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(p, mode); err != nil {
		t.Fatal(err)
	}
}

func buildArgs0(context, out string) []string {
	return []string{"build", "--progress", "plain", "--build-arg", "SOURCE_DATE_EPOCH=1700000000",
		"--secret", "id=k,src=" + context + "/k", "-o", "type=oci,tar=false,dest=" + out, context}
}

// onHost builds on a ground of this machine and returns where the image is.
func (g *grounds) onHost(t *testing.T, isolation string) string {
	t.Helper()
	out := filepath.Join(g.dir, "out-"+isolation)
	cmd := exec.Command(g.filo, append([]string{"--isolation", isolation, "--root", filepath.Join(g.dir, "state-"+isolation)}, buildArgs0(g.context, out)...)...)
	if text, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%s: %v\n%s", isolation, err, text)
	}
	return out
}

func (g *grounds) digest(t *testing.T, layout string) string {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(layout, "index.json"))
	if err != nil {
		t.Fatal(err)
	}
	var index struct{ Manifests []struct{ Digest string } }
	if err := json.Unmarshal(data, &index); err != nil || len(index.Manifests) != 1 {
		t.Fatalf("%s: %v", data, err)
	}
	return index.Manifests[0].Digest
}

// try builds in a container of a profile, twice: the second time all is cached, or the same is said.
func (g *grounds) try(t *testing.T, runtime string, p profile, want string) {
	c := g.container(t, runtime, p)
	info, err := c.run("--root", "/state", "info")
	if err != nil || !strings.Contains(info, "isolation  "+p.isolation+"\n") || !strings.Contains(info, "storage    "+p.storage) {
		t.Errorf("info: %v, want isolation %s, storage %s\n%s", err, p.isolation, p.storage, info)
	}
	for i := range 2 {
		log, err := c.run(append([]string{"--root", "/state"}, buildArgs0("/context", "/out/image")...)...)
		if p.message != "" {
			if err == nil || !strings.Contains(log, p.message) {
				t.Errorf("build %d: %v, want an error that says %q\n%s", i, err, p.message, log)
			}
			continue
		}
		if err != nil {
			t.Fatalf("build %d: %v\n%s", i, err, log)
		}
		if got := g.digest(t, filepath.Join(c.out, "image")); got != want {
			t.Errorf("build %d: image %s, want %s\n%s", i, got, want, log)
		}
		if i == 1 && strings.Contains(log, " 0 of ") {
			t.Errorf("nothing was cached:\n%s", log)
		}
	}
}

// container is a bundle to run filo in.
type container struct {
	runtime, dir, out string
	spec              *specs.Spec
	runs              int
}

// container makes a bundle whose root is an overlay, as those of Docker are.
func (g *grounds) container(t *testing.T, runtime string, p profile) *container {
	t.Helper()
	dir := t.TempDir()
	for d := dir; d != os.TempDir() && d != "/"; d = filepath.Dir(d) {
		os.Chmod(d, 0o755)
	}
	c := &container{runtime: runtime, dir: dir, out: filepath.Join(dir, "out")}
	for _, d := range []string{"low/proc", "low/sys", "low/dev", "low/tmp", "low/state", "low/context", "low/out", "up", "work", "rootfs", "out", "volume"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for _, d := range []string{"low/tmp", "low/state", "out", "volume"} {
		os.Chmod(filepath.Join(dir, d), 0o777)
	}
	data, err := os.ReadFile(g.filo)
	if err == nil {
		err = os.WriteFile(filepath.Join(dir, "low/filo"), data, 0o755)
	}
	if err == nil {
		options := fmt.Sprintf("lowerdir=%[1]s/low,upperdir=%[1]s/up,workdir=%[1]s/work", dir)
		err = unix.Mount("overlay", filepath.Join(dir, "rootfs"), "overlay", 0, options)
	}
	if err != nil {
		t.Skip("make a container's root: ", err)
	}
	t.Cleanup(func() { unix.Unmount(filepath.Join(dir, "rootfs"), unix.MNT_DETACH) })
	c.spec = g.spec(t, dir, p)
	return c
}

func (g *grounds) spec(t *testing.T, dir string, p profile) *specs.Spec {
	t.Helper()
	caps := &specs.LinuxCapabilities{Bounding: p.caps}
	if p.uid == 0 {
		caps.Effective, caps.Permitted = p.caps, p.caps
	}
	s := &specs.Spec{
		Version: "1.0.2", Root: &specs.Root{Path: "rootfs"}, Hostname: "job",
		Process: &specs.Process{
			User: specs.User{UID: p.uid, GID: p.uid}, Cwd: "/", Capabilities: caps,
			Env: []string{"PATH=/bin", "HOME=/tmp"},
		},
		Mounts: []specs.Mount{
			{Destination: "/proc", Type: "proc", Source: "proc", Options: []string{"nosuid", "noexec", "nodev"}},
			{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "strictatime", "mode=755", "size=65536k"}},
			{Destination: "/dev/pts", Type: "devpts", Source: "devpts", Options: []string{"nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"}},
			{Destination: "/sys", Type: "sysfs", Source: "sysfs", Options: []string{"nosuid", "noexec", "nodev", "ro"}},
			{Destination: "/context", Type: "bind", Source: g.context, Options: []string{"rbind", "ro"}},
			{Destination: "/out", Type: "bind", Source: filepath.Join(dir, "out"), Options: []string{"rbind"}},
		},
		Linux: &specs.Linux{
			Namespaces: []specs.LinuxNamespace{{Type: "pid"}, {Type: "ipc"}, {Type: "uts"}, {Type: "mount"}, {Type: "network"}},
			Resources:  &specs.LinuxResources{Devices: dockerDevices()},
		},
	}
	if p.volume {
		s.Mounts = append(s.Mounts, specs.Mount{Destination: "/state", Type: "bind", Source: filepath.Join(dir, "volume"), Options: []string{"rbind"}})
	}
	if p.online {
		s.Linux.Namespaces = s.Linux.Namespaces[:4]
		s.Mounts = append(s.Mounts, specs.Mount{Destination: "/etc/resolv.conf", Type: "bind", Source: "/etc/resolv.conf", Options: []string{"rbind", "ro"}})
	}
	if !p.unmasked {
		s.Linux.MaskedPaths = []string{"/proc/acpi", "/proc/kcore", "/proc/keys", "/proc/timer_list", "/proc/scsi", "/sys/firmware"}
		s.Linux.ReadonlyPaths = []string{"/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"}
	}
	if !p.unconfined {
		filter, err := seccomp.GetDefaultProfile(s)
		if err != nil {
			t.Fatal(err)
		}
		s.Linux.Seccomp = filter
	}
	return s
}

// dockerDevices lets any node be made, and few be used.
func dockerDevices() []specs.LinuxDeviceCgroup {
	rules := []specs.LinuxDeviceCgroup{{Access: "rwm"}, {Allow: true, Type: "c", Access: "m"}, {Allow: true, Type: "b", Access: "m"}}
	for _, n := range [][2]int64{{1, 3}, {1, 5}, {1, 7}, {1, 8}, {1, 9}, {5, 0}, {5, 2}} {
		rules = append(rules, specs.LinuxDeviceCgroup{Allow: true, Type: "c", Major: &n[0], Minor: &n[1], Access: "rwm"})
	}
	for _, major := range []int64{136} {
		rules = append(rules, specs.LinuxDeviceCgroup{Allow: true, Type: "c", Major: &major, Access: "rwm"})
	}
	return rules
}

// run runs filo in the container.
func (c *container) run(args ...string) (string, error) {
	c.spec.Process.Args = append([]string{"/filo"}, args...)
	data, err := json.Marshal(c.spec)
	if err != nil {
		return "", err
	}
	if err := os.WriteFile(filepath.Join(c.dir, "config.json"), data, 0o644); err != nil {
		return "", err
	}
	c.runs++
	id := fmt.Sprintf("filo-%d-%s-%d", os.Getpid(), filepath.Base(filepath.Dir(c.dir)), c.runs)
	cmd := exec.Command(c.runtime, "run", "--bundle", c.dir, id)
	if c.runtime == "crun" {
		// It refuses machines with both versions of cgroups, so it sees only one.
		cmd = exec.Command("unshare", "-m", "sh", "-c", `mount -t cgroup2 none /sys/fs/cgroup && exec crun --cgroup-manager=disabled "$@"`, "sh", "run", "--bundle", c.dir, id)
	}
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// nested builds in a RUN of filo's own.
func (g *grounds) nested(t *testing.T, want string) {
	outer := t.TempDir()
	text := "FROM scratch\nCOPY filo /filo\nRUN --mount=type=bind,from=context,target=/context --mount=type=secret,id=k,target=/k " +
		`["/filo", "--root", "/state", "build", "--progress", "plain", "--build-arg", "SOURCE_DATE_EPOCH=1700000000", "--secret", "id=k,src=/k", "-o", "type=oci,tar=false,dest=/image", "/context"]` + "\n"
	for _, f := range []struct {
		name, text string
		mode       os.FileMode
	}{{"Dockerfile", text, 0o644}} {
		if err := os.WriteFile(filepath.Join(outer, f.name), []byte(f.text), f.mode); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Link(g.filo, filepath.Join(outer, "filo")); err != nil {
		t.Fatal(err)
	}
	for _, isolation := range []string{"root", "rootless"} {
		out := filepath.Join(outer, "out-"+isolation)
		cmd := exec.Command(g.filo, "--isolation", isolation, "--root", filepath.Join(g.dir, "outer-"+isolation), "build", "--progress", "plain",
			"--build-context", "context="+g.context, "--secret", "id=k,src="+g.context+"/k", "-o", out, outer)
		log, err := cmd.CombinedOutput()
		if isolation == "rootless" {
			// Devices cannot be made in a user namespace, and the filter of a RUN lets nobody make another.
			if err == nil || !strings.Contains(string(log), "steps cannot run here") {
				t.Errorf("in a rootless RUN: %v\n%s", err, log)
			}
			continue
		}
		if err != nil {
			t.Errorf("in a RUN: %v\n%s", err, log)
			continue
		}
		if got := g.digest(t, filepath.Join(out, "image")); got != want {
			t.Errorf("in a RUN: image %s, want %s", got, want)
		}
	}
}

const debianDockerfile = `FROM scratch AS debian
ADD debian.tar /
FROM debian
RUN apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends nginx-light \
 && rm -rf /var/lib/apt/lists/* /var/log/* /var/cache/apt/* /var/cache/ldconfig/aux-cache /var/cache/debconf/*-old /var/lib/dpkg/*-old
RUN useradd -m app && su app -c id && ldconfig && rm -f /var/cache/ldconfig/aux-cache
RUN dpkg -l | wc -l && perl -e 'print "perl\n"'
`

// TestGroundsDebian builds on a Debian base in containers. It needs a Debian mirror and a tar of a Debian root, and some
// minutes, so it runs only where FILO_DEBIAN names that tar.
func TestGroundsDebian(t *testing.T) {
	tar := os.Getenv("FILO_DEBIAN")
	if tar == "" {
		t.Skip("FILO_DEBIAN is not set")
	}
	g := newGrounds(t)
	g.write(t, "context/Dockerfile", debianDockerfile, 0o644)
	if err := os.Link(tar, filepath.Join(g.context, "debian.tar")); err != nil {
		t.Fatal(err)
	}
	want := g.digest(t, g.onHost(t, "root"))
	for _, p := range profiles {
		p.online = true
		if p.name == "unconfined user" {
			p.message = "give this user a range in /etc/subuid" // apt becomes another user
		}
		t.Run(p.name, func(t *testing.T) { g.try(t, "runc", p, want) })
	}
}
