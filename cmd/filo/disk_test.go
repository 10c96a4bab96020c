package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

const diskDockerfile = `FROM toybox
RUN fill /data 1500000 text && seq 2000 > /seq
COPY f /f
RUN sha256sum /data /f > /sum && fill /more 500000 more
`

// bounded builds on a disk that may be full, and goes on when it is not.
type bounded struct {
	t         *testing.T
	host, at  string // where the disk is
	context   string
	want, log string
}

func newBounded(t *testing.T, at string) *bounded {
	t.Helper()
	needGround(t)
	b := &bounded{t: t, host: startRegistry(t), at: at, context: t.TempDir()}
	for name, text := range map[string]string{"Dockerfile": diskDockerfile, "f": "file"} {
		if err := os.WriteFile(filepath.Join(b.context, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	state := filepath.Join(t.TempDir(), "state")
	defer sweepState(state)
	if b.want = b.build(state, filepath.Join(t.TempDir(), "out")); b.want == "" {
		t.Fatal(b.log)
	}
	return b
}

// build returns the ID of the image, "" after an error.
func (b *bounded) build(state, out string) string {
	id := filepath.Join(b.t.TempDir(), "id")
	cmd := filo(state, "build", "--progress", "plain", "--iidfile", id, "--build-arg", "SOURCE_DATE_EPOCH=1700000000", "-t", "kept/a", "--load",
		"-o", "type=oci,dest="+out+".tar", "-o", "type=oci,tar=false,dest="+out, b.context)
	cmd.Env = append(cmd.Env, "FILO_REGISTRY_MIRRORS=docker.io="+b.host)
	log, err := cmd.CombinedOutput()
	if b.log = string(log); err != nil {
		return ""
	}
	data, err := os.ReadFile(id)
	if err != nil {
		b.t.Error(err)
	}
	return string(data)
}

// try builds where there may be no room, makes room, and builds again. It reports whether there was room.
func (b *bounded) try(what, hint string, enlarge func()) bool {
	b.t.Helper()
	state, out := filepath.Join(b.at, "state"), filepath.Join(b.at, "out")
	got := b.build(state, out)
	switch {
	case got == "" && (strings.Count("\n"+b.log, "\nERROR:") != 1 || !strings.Contains(b.log, "hint: "+hint)):
		b.t.Errorf("%s: want one error, and the hint that %s\n%s", what, hint, b.log)
	case got != "" && got != b.want:
		b.t.Errorf("%s: built %s, want %s", what, got, b.want)
	}
	enlarge()
	if again := b.build(state, out); again != b.want {
		b.t.Errorf("%s: with room built %q, want %s\n%s", what, again, b.want, b.log)
	}
	if found := (&powerCuts{t: b.t}).images(state)["kept/a"]; found != b.want {
		b.t.Errorf("%s: the store has %q, want %s", what, found, b.want)
	}
	if _, err := wholeLayout(out); err != nil {
		b.t.Errorf("%s: %v", what, err)
	}
	for _, dir := range []string{"tmp", "."} {
		list, err := os.ReadDir(filepath.Join(state, dir))
		for _, e := range list {
			if dir == "tmp" || strings.HasPrefix(e.Name(), ".") {
				b.t.Errorf("%s: %s is left", what, e.Name())
			}
		}
		if err != nil {
			b.t.Error(err)
		}
	}
	return got != ""
}

// TestFullDisk builds where the disk becomes full, ever later: each build fails with one clear error or makes the right
// image, and once there is room the next one is right.
func TestFullDisk(t *testing.T) {
	if os.Geteuid() != 0 || os.Getenv("FILO_TEST_NAMESPACE") != "" {
		t.Skip("only root can mount a small disk")
	}
	b := newBounded(t, t.TempDir())
	tried := 0
	for size := 128; ; size += 128 + rounds(t, 0) + size/3 { // KiB
		if err := unix.Mount("tmpfs", b.at, "tmpfs", 0, fmt.Sprintf("size=%dk,mode=0755", size)); err != nil {
			t.Skip("mount: ", err)
		}
		enough := b.try(fmt.Sprintf("%d KiB", size), "the disk is full", func() {
			if err := unix.Mount("tmpfs", b.at, "tmpfs", unix.MS_REMOUNT, "size=100m"); err != nil {
				t.Fatal(err)
			}
		})
		if err := unix.Unmount(b.at, unix.MNT_DETACH); err != nil {
			t.Fatal(err)
		}
		tried++
		if enough {
			break
		}
	}
	t.Logf("%d sizes, up to one that was enough", tried)
}

// TestQuota is TestFullDisk with a quota that runs out.
func TestQuota(t *testing.T) {
	d := newDisk(t, "btrfs")
	home := filepath.Join(d.at, "home")
	d.must("btrfs", "quota", "enable", d.at)
	b := newBounded(t, home)
	for size := 256; size < 16<<10; size = size*2 + 100 { // KiB
		d.must("btrfs", "subvolume", "create", home)
		limit := func(to string) { d.must("btrfs", "qgroup", "limit", to, home) }
		limit(fmt.Sprintf("%dK", size))
		enough := b.try(fmt.Sprintf("%d KiB", size), "the disk quota is used up", func() { limit("none") })
		d.must("btrfs", "subvolume", "delete", home)
		if enough {
			return
		}
	}
	t.Error("no quota was enough")
}

// TestReadOnlyDisk finds the state directory, or where the output goes, read-only.
func TestReadOnlyDisk(t *testing.T) {
	if os.Geteuid() != 0 || os.Getenv("FILO_TEST_NAMESPACE") != "" {
		t.Skip("only root can mount a disk")
	}
	b := newBounded(t, t.TempDir())
	if err := unix.Mount("tmpfs", b.at, "tmpfs", 0, "size=100m,mode=0755"); err != nil {
		t.Skip("mount: ", err)
	}
	t.Cleanup(func() { unix.Unmount(b.at, unix.MNT_DETACH) })
	state, out, elsewhere := filepath.Join(b.at, "state"), filepath.Join(b.at, "out"), filepath.Join(t.TempDir(), "state")
	t.Cleanup(func() { sweepState(elsewhere) })
	if got := b.build(state, out); got != b.want {
		t.Fatal(b.log)
	}
	flags := func(f uintptr) {
		t.Helper()
		if err := unix.Mount("tmpfs", b.at, "tmpfs", unix.MS_REMOUNT|f, "size=100m"); err != nil {
			t.Fatal(err)
		}
	}
	flags(unix.MS_RDONLY)
	for _, c := range []struct{ state, out, want string }{
		{state, filepath.Join(t.TempDir(), "out"), "hint: choose a place that you may write to: --root"},
		{filepath.Join(b.at, "new"), filepath.Join(t.TempDir(), "out"), "hint: choose a place that you may write to: --root"},
		{elsewhere, out, "read-only file system"},
	} {
		if got := b.build(c.state, c.out); got != "" || strings.Count("\n"+b.log, "\nERROR:") != 1 || !strings.Contains(b.log, c.want) {
			t.Errorf("%s to %s: built %q, want one error, and %q\n%s", c.state, c.out, got, c.want, b.log)
		}
	}
	flags(0)
	if got := b.build(state, out); got != b.want {
		t.Errorf("after it: %q\n%s", got, b.log)
	}
}
