package main

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/validate"
	"golang.org/x/sys/unix"
)

// rounds is how often something is tried that has to go well whenever it happens; FILO_ROUNDS makes it thorough.
func rounds(t *testing.T, few int) int {
	t.Helper()
	n, err := strconv.Atoi(os.Getenv("FILO_ROUNDS"))
	if err != nil {
		return few
	}
	return n
}

// disk is a file system of its own, in a file, whose power can be cut.
type disk struct {
	t         *testing.T
	image, at string
	mount     []string
	asCut     string // the image as it was at the cut, where the kernel cannot forget
}

// newDisk makes a disk with a file system of this kind. What it has not been told to sync it writes late, and in an
// order that is bad for us.
func newDisk(t *testing.T, kind string) *disk {
	t.Helper()
	if os.Geteuid() != 0 || os.Getenv("FILO_TEST_NAMESPACE") != "" {
		t.Skip("only root can mount disks")
	}
	mkfs := map[string][]string{
		"ext4":  {"mkfs.ext4", "-q"},
		"xfs":   {"mkfs.xfs", "-q"},
		"btrfs": {"mkfs.btrfs", "-q"},
	}[kind]
	if _, err := exec.LookPath(mkfs[0]); err != nil {
		t.Skip(err)
	}
	dir := t.TempDir()
	d := &disk{t: t, image: filepath.Join(dir, "image"), at: filepath.Join(dir, "disk")}
	d.mount = []string{"mount", "-t", kind, "-o", map[string]string{"ext4": "loop,noauto_da_alloc", "xfs": "loop", "btrfs": "loop,noflushoncommit"}[kind]}
	if err := errors.Join(os.Mkdir(d.at, 0o755), os.WriteFile(d.image, nil, 0o600), os.Truncate(d.image, 600<<20)); err != nil {
		t.Fatal(err)
	}
	d.must(append(mkfs, d.image)...)
	if out, err := exec.Command(d.mount[0], append(d.mount[1:], d.image, d.at)...).CombinedOutput(); err != nil {
		t.Skipf("mount %s: %v: %s", kind, err, out)
	}
	t.Cleanup(func() { unix.Unmount(d.at, unix.MNT_DETACH) })
	return d
}

func (d *disk) must(args ...string) {
	d.t.Helper()
	if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
		d.t.Fatalf("%v: %v\n%s", args, err, out)
	}
}

// fsGoingDown is the ioctl by which ext4 and xfs stop as at a power cut; see xfs_io(8), shutdown.
const fsGoingDown = 0x8004587d

// cut cuts the power: nothing more reaches the disk. With flush the journal still does, and none of the data that it
// speaks of. It reports whether the kernel can do that.
func (d *disk) cut(flush bool) bool {
	d.t.Helper()
	f, err := os.Open(d.at)
	if err != nil {
		d.t.Fatal(err)
	}
	defer f.Close()
	how := 2
	if flush {
		how = 1
	}
	err = unix.IoctlSetPointerInt(int(f.Fd()), fsGoingDown, how)
	if err != nil && !errors.Is(err, unix.ENOTTY) && !errors.Is(err, unix.EOPNOTSUPP) {
		d.t.Fatal(err)
	}
	if err == nil {
		return true
	}
	// What the disk has is what its file has.
	d.asCut = d.image + ".cut"
	d.must("cp", "--sparse=always", d.image, d.asCut)
	return false
}

// restart gives the disk its power back.
func (d *disk) restart() {
	d.t.Helper()
	err := unix.Unmount(d.at, 0)
	for i := 0; err != nil || d.attached(); i++ {
		if i > 1000 {
			d.t.Fatal("unmount: ", err)
		}
		time.Sleep(10 * time.Millisecond) // the last process of the build goes in its own time, and its mounts with it
		if err != nil {
			err = unix.Unmount(d.at, 0)
		}
	}
	if d.asCut != "" {
		if err := os.Rename(d.asCut, d.image); err != nil {
			d.t.Fatal(err)
		}
		d.asCut = ""
	}
	d.must(append(d.mount, d.image, d.at)...)
}

// attached says whether something still has the disk.
func (d *disk) attached() bool {
	loops, _ := filepath.Glob("/sys/block/loop*/loop/backing_file")
	for _, l := range loops {
		if file, err := os.ReadFile(l); err == nil && strings.TrimSpace(string(file)) == d.image {
			return true
		}
	}
	return false
}

// TestPowerCut cuts the power of the disk that holds the state directory and the outputs, at random instants of builds
// and right after them. What was reported as built is there afterwards and whole, and the next build is right.
func TestPowerCut(t *testing.T) {
	for _, kind := range []string{"ext4", "xfs", "btrfs"} {
		t.Run(kind, func(t *testing.T) {
			p := &powerCuts{t: t, disk: newDisk(t, kind), host: startRegistry(t), dir: t.TempDir(), built: map[string]string{}}
			needGround(t)
			t.Cleanup(func() { sweepState(filepath.Join(p.dir, "reference")) })
			n := rounds(t, 3)
			for i := range n {
				p.round(i)
			}
			t.Logf("%d power cuts, %d of them in builds; %d images reported as built, none lost or wrong", p.cuts, p.inside, len(p.built))
		})
	}
}

// powerCuts is a series of builds and power cuts.
type powerCuts struct {
	t            *testing.T
	disk         *disk
	host, dir    string
	boots        int
	cuts, inside int
	took         time.Duration
	built        map[string]string // IDs of the images reported as built, by name
}

const powerDockerfile = `FROM %s
RUN fill /data%[2]d 700000 text%[2]d && ln /data%[2]d /link%[2]d && seq 3000 > /seq%[2]d
COPY f /f%[2]d
RUN sha256sum /data%[2]d /f%[2]d > /sum%[2]d && mkdir /d%[2]d && mv /seq%[2]d /d%[2]d/seq
`

// round builds an image while the power is cut, again, and cuts it when that is reported.
func (p *powerCuts) round(i int) {
	p.t.Helper()
	base := "toybox"
	if i%2 == 1 {
		base = fmt.Sprintf("kept/%d", i-1)
	}
	write := func(name, text string) {
		if err := os.WriteFile(filepath.Join(p.dir, name), []byte(text), 0o644); err != nil {
			p.t.Fatal(err)
		}
	}
	write("f", fmt.Sprint("file ", i))
	write("Dockerfile", fmt.Sprintf(powerDockerfile, base, i))
	name := fmt.Sprintf("kept/%d", i)
	want, log := p.finish(p.build(filepath.Join(p.dir, "reference"), filepath.Join(p.dir, "reference-out"), name))
	if want == "" {
		p.t.Fatalf("reference: %s", log)
	}
	state, out := filepath.Join(p.disk.at, "state"), filepath.Join(p.disk.at, "out")
	cmd := p.build(state, out, name)
	if err := cmd.Start(); err != nil {
		p.t.Fatal(err)
	}
	time.Sleep(rand.N(p.took + time.Millisecond))
	ended := make(chan error, 1)
	if p.disk.cut(i%3 == 0) {
		go func() { ended <- cmd.Wait() }()
		select {
		case <-ended:
		case <-time.After(time.Minute):
			p.t.Fatalf("the build goes on without a disk:\n%s", cmd.Stderr)
		}
	} else {
		cmd.Wait()
	}
	if got := strings.TrimSpace(cmd.Stdout.(*bytes.Buffer).String()); got != "" && p.disk.asCut == "" {
		p.report(name, got, want)
	}
	p.inside++
	p.wake()
	begin := time.Now()
	got, log := p.finish(p.build(state, out, name))
	p.took = time.Since(begin)
	if got != want {
		p.t.Fatalf("%s: built %q after a power cut, want %s\n%s", name, got, want, log)
	}
	p.report(name, got, want)
	p.disk.cut(i%2 == 0)
	p.wake()
}

// build is the command that builds, names and writes an image and then says which it is.
func (p *powerCuts) build(state, out, name string) *exec.Cmd {
	boot := filepath.Join(p.dir, "boot")
	if err := os.WriteFile(boot, fmt.Appendf(nil, "%08d-0000-4000-8000-000000000000\n", p.boots), 0o644); err != nil {
		p.t.Fatal(err)
	}
	cmd := exec.Command("unshare", "-m", "sh", "-c", `mount --bind "$BOOT" /proc/sys/kernel/random/boot_id && exec filo "$@"`, "sh",
		"build", "-q", "--build-arg", "SOURCE_DATE_EPOCH=1700000000", "-t", name, "--load",
		"-o", "type=oci,dest="+filepath.Join(out, filepath.Base(name)+".tar"), "-o", "type=oci,tar=false,dest="+filepath.Join(out, "layout"), p.dir)
	cmd.Env = append(os.Environ(), isFilo+"=1", "FILO_ROOT="+state, "BOOT="+boot, "FILO_REGISTRY_MIRRORS=docker.io="+p.host)
	cmd.Stdout, cmd.Stderr = &bytes.Buffer{}, &bytes.Buffer{}
	return cmd
}

// finish runs a build and returns the ID it prints.
func (p *powerCuts) finish(cmd *exec.Cmd) (id, log string) {
	err := cmd.Run()
	return strings.TrimSpace(cmd.Stdout.(*bytes.Buffer).String()), fmt.Sprint(cmd.Stderr, err)
}

// report notes that an image was reported as built.
func (p *powerCuts) report(name, got, want string) {
	p.t.Helper()
	if got != want {
		p.t.Fatalf("%s: reported %s, want %s", name, got, want)
	}
	p.built[name] = got
}

// wake restarts after a power cut and looks for all that was reported.
func (p *powerCuts) wake() {
	p.t.Helper()
	p.disk.restart()
	p.cuts++
	p.boots++
	if len(p.built) == 0 {
		return
	}
	state := filepath.Join(p.disk.at, "state")
	list, err := filo(state, "images", "--format", "json").CombinedOutput()
	if err != nil {
		p.t.Fatalf("after power cut %d: images: %v %s", p.cuts, err, list)
	}
	for _, dir := range []string{state, filepath.Join(p.disk.at, "out", "layout")} {
		found := p.images(dir)
		for name, id := range p.built {
			if found[name] != id {
				p.t.Fatalf("after power cut %d: %s has %q for %s, reported as built was %s", p.cuts, dir, found[name], name, id)
			}
		}
	}
	for name := range p.built {
		data, err := os.ReadFile(filepath.Join(p.disk.at, "out", filepath.Base(name)+".tar"))
		want, wantErr := os.ReadFile(filepath.Join(p.dir, "reference-out", filepath.Base(name)+".tar"))
		if err != nil || wantErr != nil || !bytes.Equal(data, want) {
			p.t.Fatalf("after power cut %d: archive of %s: %v, %v, or it is another", p.cuts, name, err, wantErr)
		}
	}
}

// images returns the IDs of the images of a layout, all of whose bytes are right, by name.
func (p *powerCuts) images(dir string) map[string]string {
	p.t.Helper()
	idx, err := layout.ImageIndexFromPath(dir)
	if err != nil {
		p.t.Fatalf("after power cut %d: %v", p.cuts, err)
	}
	m, err := idx.IndexManifest()
	if err != nil {
		p.t.Fatal(err)
	}
	found := map[string]string{}
	for _, d := range m.Manifests {
		var img v1.Image
		if img, err = idx.Image(d.Digest); err == nil {
			err = validate.Image(img)
		}
		if err != nil {
			p.t.Fatalf("after power cut %d: %s: %v: %v", p.cuts, dir, d.Annotations, err)
		}
		name := strings.TrimSuffix(strings.TrimPrefix(d.Annotations["io.containerd.image.name"], "docker.io/"), ":latest")
		id, err := img.ConfigName()
		if err != nil {
			p.t.Fatal(err)
		}
		found[name] = id.String()
	}
	return found
}

// TestTorn has a power cut take all that nobody waited for: every file of the state directory but those that hold the
// images. The image is still there, can be built on, and is built again alike. It needs no disk of its own.
func TestTorn(t *testing.T) {
	needGround(t)
	host, dir := startRegistry(t), t.TempDir()
	build := func(state, text string, args ...string) string {
		t.Helper()
		cmd := filo(state, append([]string{"build", "-q", "--build-arg", "SOURCE_DATE_EPOCH=1700000000", "-f", "-"}, append(args, dir)...)...)
		cmd.Env = append(cmd.Env, "FILO_REGISTRY_MIRRORS=docker.io="+host)
		cmd.Stdin = strings.NewReader(text)
		var log bytes.Buffer
		cmd.Stderr = &log
		id, err := cmd.Output()
		if err != nil {
			t.Fatalf("%v\n%s", err, &log)
		}
		return string(id)
	}
	if err := os.WriteFile(filepath.Join(dir, "f"), []byte("file"), 0o644); err != nil {
		t.Fatal(err)
	}
	first, second := fmt.Sprintf(powerDockerfile, "toybox", 1), "FROM kept/a\nRUN sha256sum /data1 > /again && cat /sum1 >> /again\n"
	for how, tear := range map[string]func(name string, size int64) error{
		"empty": func(name string, _ int64) error { return os.Truncate(name, 0) },
		"zeros": func(name string, size int64) error { return errors.Join(os.Truncate(name, 0), os.Truncate(name, size)) },
		"gone":  func(name string, _ int64) error { return os.Remove(name) },
	} {
		state := filepath.Join(t.TempDir(), "state")
		t.Cleanup(func() { sweepState(state) })
		want := build(state, first, "-t", "kept/a")
		torn := 0
		err := filepath.WalkDir(state, func(p string, e os.DirEntry, err error) error {
			if err != nil || !e.Type().IsRegular() {
				return nil // what belongs to another user cannot be looked into
			}
			info, err := e.Info()
			name, _ := filepath.Rel(state, p)
			if err != nil || strings.HasPrefix(name, "index.") || strings.HasPrefix(name, "blobs/") && info.Mode().Perm() == 0o444 {
				return err
			}
			if err := tear(p, info.Size()); err == nil {
				torn++
			} else if !errors.Is(err, os.ErrPermission) {
				return err
			}
			return nil
		})
		if err != nil || torn < 10 {
			t.Fatalf("%s: %d files torn, %v", how, torn, err)
		}
		if out, err := filo(state, "images").CombinedOutput(); err != nil || !strings.Contains(string(out), "kept/a") {
			t.Errorf("%s: images: %v\n%s", how, err, out)
		}
		if (&powerCuts{t: t}).images(state)["kept/a"] != strings.TrimSpace(want) {
			t.Errorf("%s: the image is lost", how)
		}
		next := build(state, second, "-t", "kept/b")
		if again := build(state, first, "-t", "kept/a"); again != want {
			t.Errorf("%s: built %s, want %s", how, again, want)
		}
		if again := build(state, second, "--no-cache", "-t", "kept/b"); again != next {
			t.Errorf("%s: on it built %s, before it %s", how, next, again)
		}
	}
}
