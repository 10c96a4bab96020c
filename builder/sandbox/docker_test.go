package sandbox

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/moby/moby/v2/daemon/pkg/oci/caps"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// dockerEnv is where a file with what dockerSource returns is, for a run as another user.
const dockerEnv = "SANDBOX_TEST_DOCKER"

// dockerSpec returns what Docker gives a container by default.
func dockerSpec(t *testing.T) (spec specs.Spec) {
	t.Helper()
	data, err := []byte(nil), error(nil)
	if name := os.Getenv(dockerEnv); name != "" {
		data, err = os.ReadFile(name)
	} else {
		data = dockerSource(t)
	}
	if err == nil {
		err = json.Unmarshal(data, &spec)
	}
	if err != nil {
		t.Fatal(err)
	}
	return spec
}

// dockerSource has Docker's own source say it: the package that does is copied without the file that would bring all of
// containerd into go.mod, and run.
func dockerSource(t *testing.T) []byte {
	t.Helper()
	const moby = "github.com/moby/moby/v2"
	source, err := exec.Command("go", "list", "-m", "-f", "{{.Dir}}", moby).Output()
	if err != nil {
		t.Fatalf("find the source of Docker: %v", err)
	}
	dir := t.TempDir()
	for _, part := range []string{"daemon/pkg/oci", "daemon/pkg/oci/caps", "daemon/internal/platform", "daemon/internal/lazyregexp", "errdefs"} {
		from, err := filepath.Glob(filepath.Join(strings.TrimSpace(string(source)), part, "*.go"))
		if err != nil || len(from) == 0 {
			t.Fatalf("%s: nothing is there: %v", part, err)
		}
		for _, name := range from {
			if !strings.HasSuffix(name, "_test.go") && filepath.Base(name) != "devices_linux.go" {
				copyFile(t, name, filepath.Join(dir, part, filepath.Base(name)))
			}
		}
	}
	mod, err := os.ReadFile("../../go.mod")
	if err != nil {
		t.Fatal(err)
	}
	write := func(name, text string) {
		t.Helper()
		if err := errors.Join(os.MkdirAll(filepath.Dir(name), 0o755), os.WriteFile(name, []byte(text), 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	write(filepath.Join(dir, "go.mod"), strings.Replace(string(mod), "module filo\n", "module "+moby+"\n", 1))
	copyFile(t, "../../go.sum", filepath.Join(dir, "go.sum"))
	write(filepath.Join(dir, "show", "main.go"), `package main

import (
	"encoding/json"
	"os"

	"`+moby+`/daemon/pkg/oci"
)

func main() {
	if json.NewEncoder(os.Stdout).Encode(oci.DefaultLinuxSpec()) != nil {
		os.Exit(1)
	}
}
`)
	cmd := exec.Command("go", "run", "-mod=mod", "./show")
	cmd.Dir = dir
	var log bytes.Buffer
	cmd.Stderr = &log
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("run the source of Docker: %v\n%s", err, &log)
	}
	return out
}

func copyFile(t *testing.T, from, to string) {
	t.Helper()
	data, err := os.ReadFile(from)
	if err := errors.Join(err, os.MkdirAll(filepath.Dir(to), 0o755), os.WriteFile(to, data, 0o644)); err != nil {
		t.Fatal(err)
	}
}

// facts is what a process sees of itself.
type facts struct {
	Mounts map[string]string // by target: type and options
	Status map[string]string // /proc/self/status
	Spaces map[string]string // namespaces
	Dev    map[string]string // mode and number of what is in /dev
	Limits string
}

func seeFacts() (f facts) {
	f = facts{Mounts: map[string]string{}, Status: map[string]string{}, Spaces: map[string]string{}, Dev: map[string]string{}}
	for line := range eachLine("/proc/self/mountinfo") {
		w := strings.Fields(line)
		if dash := slices.Index(w, "-"); dash > 0 && len(w) > dash+3 {
			f.Mounts[w[4]] = w[dash+1] + " " + w[5] + "," + w[dash+3]
		}
	}
	for line := range eachLine("/proc/self/status") {
		name, value, _ := strings.Cut(line, ":")
		f.Status[name] = strings.TrimSpace(value)
	}
	spaces, _ := os.ReadDir("/proc/self/ns")
	for _, e := range spaces {
		f.Spaces[e.Name()], _ = os.Readlink("/proc/self/ns/" + e.Name())
	}
	dev, _ := os.ReadDir("/dev")
	for _, e := range dev {
		var st unix.Stat_t
		if unix.Stat("/dev/"+e.Name(), &st) == nil && st.Mode&unix.S_IFMT == unix.S_IFCHR && e.Type()&fs.ModeSymlink == 0 {
			f.Dev[e.Name()] = fmt.Sprintf("%o %d:%d", st.Mode&0o7777, unix.Major(st.Rdev), unix.Minor(st.Rdev))
		}
	}
	for which := range 16 {
		var l syscall.Rlimit
		f.Limits += fmt.Sprint(which, syscall.Getrlimit(which, &l), l.Cur, l.Max, "\n")
	}
	return f
}

func eachLine(name string) func(yield func(string) bool) {
	data, _ := os.ReadFile(name)
	return func(yield func(string) bool) {
		for line := range strings.Lines(string(data)) {
			if !yield(strings.TrimSpace(line)) {
				return
			}
		}
	}
}

// different are the deliberate differences to Docker's default, and why.
var different = map[string]string{
	"namespace network": "a step uses the machine's network unless --network=none says otherwise, as with BuildKit's host network: a bridge needs a daemon that sets it up",
	"namespace time":    "it would have the machine's clocks: Docker sets no offsets, so that it changes nothing and costs a clone",
	"namespace cgroup":  "Docker adds it where cgroups are of version 2; a step has it always, so that it sees no more of the machine's cgroups than its own",
	"device 5:1":        "the console: a step has no terminal",
	"device 10:229":     "Docker refuses fuse by a rule of its own; here whatever is not allowed is refused",
	"device 1:7":        "/dev/full, which the runtime allows beside Docker's own rules (runtime-spec, default devices)",
	"device 5:2":        "/dev/ptmx, likewise",
	"device 136:*":      "/dev/pts, likewise",
	"/sys/fs/cgroup":    "cgroup2, or with version 1 a tmpfs with a mount for each controller, as runc makes of the type cgroup",
	"/dev/shm size":     "from --shm-size, which Docker adds to its default as well: 64 MB",
	"/dev/pts gid":      "where one ID is mapped there is no group 5",
}

// excuse reports whether a difference is a deliberate one, and takes it off those that were not seen yet.
func excuse(unseen map[string]string, what string) bool {
	delete(unseen, what)
	_, ok := different[what]
	return ok
}

// TestDockersDefault compares what a process gets with what Docker gives it, field by field. Each difference is one of
// those above; and all of those are there.
func TestDockersDefault(t *testing.T) {
	spec, unseen := dockerSpec(t), maps.Clone(different)
	compareTables(t, spec, unseen)
	b := newBox(t)
	p := b.process("facts")
	if p.Ground.Name == groundChroot {
		t.Skip("nothing is mounted on the ground ", p.Ground.Name)
	}
	p.ShmSize = 64 << 20
	var in facts
	out := b.must(p)
	if err := json.Unmarshal([]byte(out), &in); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	compareProcess(t, spec, in, unseen)
	compareMounts(t, spec, in, unseen)
	delete(unseen, "/dev/pts gid") // seen only where one ID is mapped
	for what := range unseen {
		t.Errorf("there is no such difference: %s", what)
	}
}

// compareTables compares what is known before a process runs.
func compareTables(t *testing.T, spec specs.Spec, unseen map[string]string) {
	t.Helper()
	masked := slices.DeleteFunc(slices.Clone(spec.Linux.MaskedPaths), func(p string) bool {
		return strings.HasSuffix(p, "/thermal_throttle") // of each processor; mask finds them as it goes
	})
	if got := slices.Sorted(slices.Values(hidden[:])); !slices.Equal(got, slices.Sorted(slices.Values(masked))) {
		t.Errorf("hidden: %q, Docker's %q", got, masked)
	}
	if got := slices.Sorted(slices.Values(frozen[:])); !slices.Equal(got, slices.Sorted(slices.Values(spec.Linux.ReadonlyPaths))) {
		t.Errorf("frozen: %q, Docker's %q", got, spec.Linux.ReadonlyPaths)
	}
	c := spec.Process.Capabilities
	for set, theirs := range map[string][]string{"effective": c.Effective, "permitted": c.Permitted, "bounding": c.Bounding, "package caps": caps.DefaultCapabilities()} {
		if got := slices.Sorted(slices.Values(defaultNames())); !slices.Equal(got, slices.Sorted(slices.Values(theirs))) {
			t.Errorf("%s capabilities: %q, Docker's %q", set, got, theirs)
		}
	}
	theirs, ours := map[string]bool{}, map[string]bool{}
	if all := spec.Linux.Resources.Devices[0]; all.Allow || all.Type != "" || all.Major != nil || all.Access != "rwm" {
		t.Errorf("Docker does not refuse all devices first: %+v", all)
	}
	for _, d := range spec.Linux.Resources.Devices[1:] {
		theirs[fmt.Sprintf("device %d:%d", *d.Major, *d.Minor)] = d.Allow
		if d.Type != "c" || d.Access != "rwm" {
			t.Errorf("device rule: %+v", d)
		}
	}
	for _, d := range usable {
		name := fmt.Sprintf("device %d:%d", d.major, d.minor)
		if d.minor < 0 {
			name = fmt.Sprintf("device %d:*", d.major)
		}
		ours[name] = true
		if !theirs[name] && !excuse(unseen, name) {
			t.Errorf("%s may be used, and not with Docker", name)
		}
	}
	for name, allow := range theirs {
		if (!allow || !ours[name]) && !excuse(unseen, name) {
			t.Errorf("%s: Docker says %t", name, allow)
		}
	}
}

func defaultNames() (names []string) {
	for _, c := range defaultCapabilities {
		names = append(names, "CAP_"+strings.TrimPrefix(strings.ToUpper(c.name), "CAP_"))
	}
	return names
}

// compareProcess compares what a process says of itself.
func compareProcess(t *testing.T, spec specs.Spec, in facts, unseen map[string]string) {
	t.Helper()
	keep := defaultSet()
	if have, err := permitted(); err == nil {
		keep &= have
	}
	if c := spec.Process.Capabilities; len(c.Inheritable)+len(c.Ambient) > 0 {
		t.Errorf("Docker's inheritable and ambient capabilities: %q, %q", c.Inheritable, c.Ambient)
	}
	for name, want := range map[string]string{
		"CapEff": fmt.Sprintf("%016x", uint64(keep)), "CapPrm": fmt.Sprintf("%016x", uint64(keep)), "CapBnd": fmt.Sprintf("%016x", uint64(keep)),
		"CapInh": strings.Repeat("0", 16), "CapAmb": strings.Repeat("0", 16),
		"NoNewPrivs": map[bool]string{true: "1", false: "0"}[spec.Process.NoNewPrivileges],
		"Seccomp":    "2", // a filter, which room seccomp compiles from Docker's own profile
		"Umask":      "0022",
	} {
		if got := in.Status[name]; got != want {
			t.Errorf("%s: %q, want %q", name, got, want)
		}
	}
	if spec.Process.User.Umask != nil {
		t.Errorf("Docker's umask: %o", *spec.Process.User.Umask) // 0022 is the runtime's
	}
	here := seeFacts()
	if len(spec.Process.Rlimits) > 0 || in.Limits != here.Limits {
		t.Errorf("limits: Docker's %v, in\n%soutside\n%s", spec.Process.Rlimits, in.Limits, here.Limits)
	}
	if len(spec.Linux.Sysctl) > 0 {
		t.Errorf("Docker's sysctls: %v", spec.Linux.Sysctl) // those that it adds are of a network namespace
	}
	if spec.Process.ApparmorProfile != "" || spec.Process.SelinuxLabel != "" || spec.Process.OOMScoreAdj != nil || spec.Linux.RootfsPropagation != "" {
		t.Errorf("Docker sets more: %+v", spec)
	}
	theirs := map[string]bool{}
	for _, n := range spec.Linux.Namespaces {
		theirs[string(n.Type)] = true
	}
	for space, file := range map[string]string{"mount": "mnt", "network": "net", "time": "time", "uts": "uts", "pid": "pid", "ipc": "ipc", "cgroup": "cgroup"} {
		if own := in.Spaces[file] != here.Spaces[file]; own != theirs[space] && !excuse(unseen, "namespace "+space) {
			t.Errorf("namespace %s of its own: %t, with Docker %t", space, own, theirs[space])
		}
	}
	want := map[string]string{}
	for _, d := range devices {
		want[d.name] = fmt.Sprintf("666 %d:%d", d.major, d.minor)
	}
	if len(spec.Linux.Devices) > 0 || !maps.Equal(in.Dev, want) { // Docker's are those of the runtime
		t.Errorf("devices: Docker's %v, in %v, want %v", spec.Linux.Devices, in.Dev, want)
	}
}

// compareMounts compares what is mounted beside the root, with all options.
func compareMounts(t *testing.T, spec specs.Spec, in facts, unseen map[string]string) {
	t.Helper()
	for _, m := range spec.Mounts {
		got, ok := in.Mounts[m.Destination]
		if !ok {
			t.Errorf("%s is not mounted", m.Destination)
			continue
		}
		kind, text, _ := strings.Cut(got, " ")
		have := strings.Split(text, ",")
		if kind != m.Type && !excuse(unseen, m.Destination) {
			t.Errorf("%s is %s, with Docker %s", m.Destination, kind, m.Type)
		}
		want := append([]string{"rw"}, m.Options...)
		if slices.Contains(m.Options, "ro") {
			want = want[1:]
		}
		for _, o := range want {
			if !hasOption(have, o) && !excuse(unseen, m.Destination+" "+strings.Split(o, "=")[0]) {
				t.Errorf("%s has not %s: %s", m.Destination, o, text)
			}
		}
		for _, o := range []string{"nosuid", "noexec", "nodev", "ro", "noatime"} {
			if slices.Contains(strings.Split(strings.SplitN(text, ",rw", 2)[0], ","), o) && !slices.Contains(m.Options, o) {
				t.Errorf("%s has %s, and not with Docker: %s", m.Destination, o, text)
			}
		}
		for _, o := range have { // a tmpfs of a user namespace shows as whose its root is
			if name, _, ok := strings.Cut(o, "="); ok && !slices.ContainsFunc(m.Options, func(o string) bool { return strings.HasPrefix(o, name+"=") }) &&
				!(kind == "tmpfs" && (name == "uid" || name == "gid")) && kind == m.Type && !excuse(unseen, m.Destination+" "+name) {
				t.Errorf("%s has %s, and not with Docker: %s", m.Destination, o, text)
			}
		}
	}
}

// hasOption reports whether the kernel, which has its own way to write some, lists an option of a mount.
func hasOption(have []string, o string) bool {
	switch o {
	case "newinstance": // every devpts is, since Linux 4.7
		return true
	case "mode=1777": // that of a tmpfs of which nothing else was said
		return !slices.ContainsFunc(have, func(h string) bool { return strings.HasPrefix(h, "mode=") })
	case "strictatime":
		return !slices.Contains(have, "relatime") && !slices.Contains(have, "noatime")
	}
	name, value, _ := strings.Cut(o, "=")
	return slices.ContainsFunc(have, func(h string) bool {
		n, v, _ := strings.Cut(h, "=")
		return n == name && strings.TrimLeft(v, "0") == strings.TrimLeft(value, "0")
	})
}
