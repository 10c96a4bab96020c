package main

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/validate"
)

const damageDockerfile = `FROM toybox
RUN echo data > /data && echo more > /more
COPY f /f
RUN cat /data /f /more > /out && echo %s >> /out
`

// TestDamage damages each file of the state directory, one at a time: it changes a bit, also so that no time tells, cuts
// the file short, or removes it.
// The next build, cached or with another last step, makes the same image as without, and all images that were reported
// as built are there, can be looked at, pushed and built on, also those that no build touches again.
func TestDamage(t *testing.T) {
	needGround(t)
	d := &damage{t: t, host: startRegistry(t), dir: t.TempDir(), want: map[string]string{}, kept: map[string]string{}}
	d.gold, d.state = filepath.Join(d.dir, "gold"), filepath.Join(d.dir, "state")
	t.Cleanup(func() {
		for _, state := range []string{d.gold, d.state} {
			for _, name := range []string{"kept/a", "kept/b", "kept/c"} {
				filo(state, "rmi", name).Run()
			}
			sweepState(state)
		}
	})
	for name, text := range map[string]string{
		"a/f": "file\n", "b/f": "file\n", "c/f": "another file\n",
		"a/Dockerfile": fmt.Sprintf(damageDockerfile, "a"), "b/Dockerfile": fmt.Sprintf(damageDockerfile, "b"),
		"c/Dockerfile": fmt.Sprintf(damageDockerfile, "c") + "COPY f /g\nRUN sha256sum /g > /sum\n" +
			"RUN mkdir /p && echo p > /p/f && chmod 700 /p && chown 33:33 /p /p/f || true\nCOPY f /last\n",
	} {
		p := filepath.Join(d.dir, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(p), 0o777), os.WriteFile(p, []byte(text), 0o666)); err != nil {
			t.Fatal(err)
		}
	}
	other := filepath.Join(d.dir, "other")
	for _, b := range []struct{ state, context string }{{other, "b"}, {d.gold, "a"}, {d.gold, "c"}} {
		got, err := d.build(b.state, b.context)
		if err != nil {
			t.Fatal(err)
		}
		d.want[b.context] = got
	}
	sweepState(other)
	d.note()
	if os.Geteuid() != 0 { // only root can copy a state with its owners
		d.state = d.gold
		d.checkBlobs()
		return
	}
	n, kinds := 0, map[string]int{}
	err := filepath.WalkDir(d.gold, func(p string, e fs.DirEntry, err error) error {
		info, infoErr := os.Lstat(p)
		if err := errors.Join(err, infoErr); err != nil || !info.Mode().IsRegular() || info.Size() == 0 {
			return err
		}
		rel, _ := filepath.Rel(d.gold, p)
		try := func(how, context string) {
			d.restore()
			hurt(t, filepath.Join(d.state, rel), how, n)
			d.told = false
			d.check(rel+" "+how, context)
			kept := filepath.Join(d.gold, "copies", filepath.Base(rel))
			_, err := os.Stat(kept)
			if read := rel == "index.json" || kindOf(rel) == "blobs" && err == nil; read && how != "gone" && !d.told {
				t.Errorf("%s %s, then built %q: nobody was told", rel, how, context)
			}
			kinds[kindOf(rel)]++
		}
		if rounds(t, 0) == 0 {
			try([]string{"flipped", "cut", "gone"}[n%3], []string{"a", "b"}[n/3%2])
			try([]string{"gone", "rotten", "flipped", "cut"}[n%4], "")
		} else {
			for _, how := range []string{"flipped", "cut", "gone", "rotten"} {
				for _, context := range []string{"a", "b", ""} {
					if how != "rotten" || context == "" { // layouts are links to blobs, which are not read for that
						try(how, context)
					}
				}
			}
		}
		n++
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%d files damaged; states by kind of file: %v", n, kinds)
}

// TestUnsound damages a file of a big layer: a step has read it before that is noticed.
func TestUnsound(t *testing.T) {
	needGround(t)
	const files = 8000
	d := &damage{t: t, host: startRegistry(t), dir: t.TempDir(), state: filepath.Join(t.TempDir(), "state")}
	t.Cleanup(func() { sweepState(d.state) })
	context := filepath.Join(d.dir, "many")
	for i := range files {
		p := filepath.Join(context, "files", fmt.Sprint(i/100), fmt.Sprint(i))
		if i%100 == 0 {
			if err := os.MkdirAll(filepath.Dir(p), 0o777); err != nil {
				t.Fatal(err)
			}
		}
		if err := os.WriteFile(p, nil, 0o666); err != nil {
			t.Fatal(err)
		}
	}
	const last = "files/zz"
	if err := os.WriteFile(filepath.Join(context, last), []byte("as it was"), 0o666); err != nil {
		t.Fatal(err)
	}
	build := func(last string) (digest string) {
		t.Helper()
		text := "FROM toybox AS all\nCOPY files /files\n" + last + "\nFROM scratch\nCOPY --from=all /copy /\n"
		if err := os.WriteFile(filepath.Join(context, "Dockerfile"), []byte(text), 0o666); err != nil {
			t.Fatal(err)
		}
		out := filepath.Join(d.dir, "out")
		os.RemoveAll(out)
		_, err := d.run(d.state, "build", "-o", "type=oci,tar=false,dest="+out, "-o", "type=local,dest="+filepath.Join(d.dir, "files"), context)
		if err != nil {
			t.Fatal(err)
		}
		if digest, err = wholeLayout(out); err != nil {
			t.Fatal(err)
		}
		return digest
	}
	build("RUN echo first > /copy")
	const read = "RUN cat /" + last + " > /copy"
	trees, err := filepath.Glob(filepath.Join(d.state, "layers/*/tree*", last))
	if err != nil || len(trees) != 1 {
		t.Fatal(trees, err)
	}
	hurt(t, trees[0], "cut", 3)
	d.told = false
	digest := build(read)
	if !d.told || !strings.Contains(d.log, "0 of 3 steps cached") {
		t.Errorf("nobody was told, or of other steps than those that made the image:\n%s", d.log)
	}
	for range 2 {
		got, err := os.ReadFile(filepath.Join(d.dir, "files", "copy"))
		if err != nil || string(got) != "as it was" {
			t.Fatalf("%q, %v", got, err)
		}
		if again := build(read); again != digest {
			t.Fatalf("cached image is %s, was %s", again, digest)
		}
	}
}

// checkBlobs damages the blobs of one state after another: each comes back.
func (d *damage) checkBlobs() {
	d.t.Helper()
	blobs, err := os.ReadDir(filepath.Join(d.state, "blobs", "sha256"))
	if err != nil {
		d.t.Fatal(err)
	}
	for i, b := range blobs {
		name := filepath.Join(d.state, "blobs", "sha256", b.Name())
		if err := os.Chmod(name, 0o644); err != nil {
			d.t.Fatal(err)
		}
		hurt(d.t, name, "flipped", i)
		d.check(b.Name()+" flipped", []string{"", "a"}[i%2])
	}
}

// kindOf is what a file of the state directory belongs to.
func kindOf(rel string) string {
	parts := strings.Split(rel, string(filepath.Separator))
	if parts[0] == "layers" && len(parts) > 2 {
		return "layers/" + parts[2]
	}
	return parts[0]
}

// damage is a state directory that is damaged again and again.
type damage struct {
	t                      *testing.T
	host, dir, gold, state string
	want                   map[string]string // digest of the image of a context
	kept                   map[string]string // digest that a name stands for
	told                   bool              // of damage
	log                    string            // of the last run
}

func (d *damage) run(state string, args ...string) (string, error) {
	cmd := filo(state, args...)
	cmd.Env = append(cmd.Env, "FILO_REGISTRY_MIRRORS=docker.io="+d.host)
	var log bytes.Buffer
	cmd.Stderr = &log
	out, err := cmd.Output()
	if err != nil {
		err = fmt.Errorf("%v: %w\n%s%s", args, err, out, &log)
	}
	d.log = log.String()
	d.told = d.told || strings.Contains(d.log, "WARNING: repaired the state directory: ")
	return string(out), err
}

// build makes and names the image of a context; that of c has statements, and so an index.
func (d *damage) build(state, context string) (string, error) {
	out := filepath.Join(d.dir, "out")
	os.RemoveAll(out)
	_, err := d.run(state, "build", "--progress", "plain", "--build-arg", "SOURCE_DATE_EPOCH=1700000000", "-t", "kept/"+context,
		"--provenance="+fmt.Sprint(context == "c"), "--load", "-o", "type=oci,tar=false,dest="+out, filepath.Join(d.dir, context))
	if err != nil {
		return "", err
	}
	return wholeLayout(out)
}

// restore makes the state what it was.
func (d *damage) restore() {
	d.t.Helper()
	os.RemoveAll(d.state)
	if out, err := exec.Command("cp", "-a", d.gold, d.state).CombinedOutput(); err != nil {
		d.t.Fatalf("%v\n%s", err, out)
	}
}

// note notes what the images are now.
func (d *damage) note() {
	d.t.Helper()
	for _, r := range d.images() {
		d.kept[r.Name] = r.Digest
	}
	if len(d.kept) != 2 {
		d.t.Fatalf("images: %v", d.kept)
	}
}

type listed struct{ Name, Digest string }

func (d *damage) images() (all []listed) {
	d.t.Helper()
	state := d.state
	if len(d.kept) == 0 {
		state = d.gold
	}
	out, err := d.run(state, "images", "--format", "json")
	if err == nil {
		err = json.Unmarshal([]byte(out), &all)
	}
	if err != nil {
		d.t.Error(err)
	}
	return all
}

// check builds the image of a context, or looks twice if that is "": what was repaired stays so. Then it looks at all images.
func (d *damage) check(what, context string) {
	d.t.Helper()
	looks := 2
	if context != "" {
		looks = 1
		if got, err := d.build(d.state, context); err != nil || got != d.want[context] {
			d.t.Errorf("%s, then built %s: %s, %v, want %s", what, context, got, err, d.want[context])
		}
	}
	for range looks {
		found := map[string]string{}
		for _, r := range d.images() {
			found[r.Name] = r.Digest
		}
		for name, want := range d.kept {
			if found[name] != want {
				d.t.Errorf("%s, then built %q: %s is %q, was %s", what, context, name, found[name], want)
			}
			if err := d.export(name, want); err != nil {
				d.t.Errorf("%s, then built %q: %v", what, context, err)
			}
		}
	}
}

// export inspects an image, and pushes it to a registry that has nothing, where all its bytes are looked at.
func (d *damage) export(image, want string) error {
	s := httptest.NewServer(registry.New(registry.Logger(log.New(io.Discard, "", 0))))
	defer s.Close()
	to := strings.TrimPrefix(s.URL, "http://") + "/copy:1"
	if out, err := d.run(d.state, "inspect", "--attestations", image); err != nil || !strings.Contains(out, want) {
		return fmt.Errorf("inspect: %w\n%s", err, out)
	}
	if _, err := d.run(d.state, "push", image, to); err != nil {
		return err
	}
	ref, err := name.ParseReference(to)
	if err != nil {
		return err
	}
	pushed, err := remote.Get(ref)
	if err != nil || pushed.Digest.String() != want {
		return fmt.Errorf("pushed %s as %v: %w", image, pushed, err)
	}
	return wholeImages(pushed)
}

// wholeImages reads all bytes of an image or of those of an index.
func wholeImages(it *remote.Descriptor) error {
	if !it.MediaType.IsIndex() {
		img, err := it.Image()
		if err != nil {
			return err
		}
		return validate.Image(img)
	}
	idx, err := it.ImageIndex()
	if err != nil {
		return err
	}
	m, err := idx.IndexManifest()
	if err != nil {
		return err
	}
	for _, d := range m.Manifests {
		img, err := idx.Image(d.Digest)
		if err != nil {
			return err
		}
		layers, err := img.Layers()
		if err != nil {
			return err
		}
		for _, l := range layers { // of statements as well, which are no layers
			r, err := l.Compressed()
			if err != nil {
				return err
			}
			if _, err := io.Copy(io.Discard, r); err != nil {
				return err
			}
		}
	}
	return nil
}

// hurt damages a file in place.
func hurt(t *testing.T, name, how string, n int) {
	t.Helper()
	data, err := os.ReadFile(name)
	info, statErr := os.Lstat(name)
	if err := errors.Join(err, statErr); err != nil {
		t.Fatal(err)
	}
	at := n * 7919 % len(data)
	switch how {
	case "gone":
		err = os.Remove(name)
	case "cut":
		err = os.Truncate(name, int64(at))
	default:
		var f *os.File
		if f, err = os.OpenFile(name, os.O_WRONLY, 0); err == nil {
			_, err = f.WriteAt([]byte{data[at] ^ 1<<(n%8)}, int64(at))
			err = errors.Join(err, f.Close())
		}
		if how == "rotten" {
			err = errors.Join(err, os.Chtimes(name, info.ModTime(), info.ModTime()))
		}
	}
	if err != nil {
		t.Fatal(err)
	}
}

// wholeLayout returns the digest of the one image of a layout, all blobs of which are right.
func wholeLayout(dir string) (string, error) {
	index, err := os.ReadFile(filepath.Join(dir, "index.json"))
	if err != nil {
		return "", err
	}
	var i struct{ Manifests []struct{ Digest string } }
	if err := json.Unmarshal(index, &i); err != nil || len(i.Manifests) != 1 {
		return "", fmt.Errorf("%s: %w", index, err)
	}
	blobs, err := filepath.Glob(filepath.Join(dir, "blobs/sha256/*"))
	if err != nil {
		return "", err
	}
	for _, b := range blobs {
		data, err := os.ReadFile(b)
		if err != nil {
			return "", err
		}
		if sum := fmt.Sprintf("%x", sha256.Sum256(data)); !strings.HasSuffix(b, sum) {
			return "", fmt.Errorf("%s holds %s", b, sum)
		}
	}
	return i.Manifests[0].Digest, nil
}
