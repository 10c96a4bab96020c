package main

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/validate"
	"github.com/rogpeppe/go-internal/testscript"
)

func TestMain(m *testing.M) {
	if os.Getenv(isFilo) != "" { // started by a script, or by itself in a user namespace: then under another name
		filoMain()
	}
	testscript.Main(m, map[string]func(){"filo": filoMain})
}

// clockEnv is how far the clock of what is started as filo is off.
const clockEnv = "FILO_TEST_CLOCK"

// filoMain is main, with another clock if the test wants one.
func filoMain() {
	off, err := time.ParseDuration(os.Getenv(clockEnv))
	if err != nil {
		main()
	}
	w := machine()
	w.now = func() time.Time { return time.Now().Add(off) }
	os.Exit(run(os.Args[1:], w))
}

// isFilo is set in the environment of what is started as filo.
const isFilo = "FILO_TEST_MAIN"

// filo returns the command that a shell would start, on a state directory.
func filo(state string, args ...string) *exec.Cmd {
	cmd := exec.Command("filo", args...)
	cmd.Env = append(os.Environ(), isFilo+"=1", "FILO_ROOT="+state)
	return cmd
}

// TestScripts runs testdata/scripts against the real main, with a registry in this process that has one image: toybox.
func TestScripts(t *testing.T) {
	needGround(t)
	host := startRegistry(t)
	testscript.Run(t, testscript.Params{
		Dir:                 filepath.Join("..", "..", "testdata", "scripts"),
		RequireExplicitExec: true,
		RequireUniqueNames:  true,
		Setup: func(e *testscript.Env) error {
			e.Setenv("FILO_ROOT", filepath.Join(e.WorkDir, "state"))
			e.Setenv("FILO_REGISTRY_MIRRORS", "docker.io="+host)
			e.Setenv("REGISTRY", host)
			e.Setenv(isFilo, "1")
			e.Setenv("DOCKER_CONFIG", filepath.Join(e.WorkDir, "docker"))
			e.Defer(func() { sweepState(filepath.Join(e.WorkDir, "state")) })
			return nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"status": cmdStatus, "ls": cmdLs, "config": cmdConfig, "manifest": cmdManifest, "valid": cmdValid, "same": cmdSame,
			"attested": cmdAttested,
		},
	})
}

// needGround skips where the kernel lets nothing be isolated.
func needGround(t *testing.T) {
	t.Helper()
	if out, err := filo(t.TempDir(), "info").CombinedOutput(); err != nil {
		t.Skipf("no ground to run steps on: %v\n%s", err, out)
	}
}

// sweepState removes what a rootless build leaves with owners that only its user namespace may touch.
func sweepState(dir string) {
	filo(dir, "prune", "--all").Run()
}

// startRegistry serves a registry on loopback and puts toybox into it; /lone is a Dockerfile.
func startRegistry(t *testing.T) string {
	t.Helper()
	mux := http.NewServeMux()
	mux.Handle("/v2/", registry.New(registry.Logger(log.New(io.Discard, "", 0))))
	mux.HandleFunc("/lone", func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "FROM scratch\nLABEL lone=yes\n") })
	s := httptest.NewServer(mux)
	t.Cleanup(s.Close)
	host := strings.TrimPrefix(s.URL, "http://")
	ref, err := name.ParseReference(host+"/library/toybox:latest", name.Insecure)
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.Write(ref, toybox(t)); err != nil {
		t.Fatal(err)
	}
	return host
}

// toybox is the base image of the scripts: testdata/toybox under all its names, and a few files.
func toybox(t *testing.T) v1.Image {
	t.Helper()
	bin := filepath.Join(t.TempDir(), "toybox")
	build := exec.Command("go", "build", "-trimpath", "-ldflags=-s -w", "-o", bin, "../../testdata/toybox")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build toybox: %v\n%s", err, out)
	}
	program, err := os.ReadFile(bin)
	if err != nil {
		t.Fatal(err)
	}
	list, _ := exec.Command(bin).CombinedOutput() // prints its commands
	_, list, _ = bytes.Cut(list, []byte("["))
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	add := func(h tar.Header, data []byte) {
		h.Size = int64(len(data))
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		w.Write(data)
	}
	add(tar.Header{Typeflag: tar.TypeDir, Name: "bin/", Mode: 0o755}, nil)
	add(tar.Header{Typeflag: tar.TypeReg, Name: "bin/toybox", Mode: 0o755}, program)
	for _, n := range strings.Fields(strings.Trim(string(list), "]\n")) {
		add(tar.Header{Typeflag: tar.TypeSymlink, Name: "bin/" + n, Linkname: "toybox"}, nil)
	}
	add(tar.Header{Typeflag: tar.TypeDir, Name: "etc/", Mode: 0o755}, nil)
	add(tar.Header{Typeflag: tar.TypeReg, Name: "etc/passwd", Mode: 0o644}, []byte("root:x:0:0::/root:/bin/sh\nann:x:7:8::/home/ann:/bin/sh\n"))
	add(tar.Header{Typeflag: tar.TypeReg, Name: "etc/group", Mode: 0o644}, []byte("root:x:0:\nstaff:x:8:\n"))
	add(tar.Header{Typeflag: tar.TypeDir, Name: "tmp/", Mode: 0o1777}, nil)
	w.Close()
	l, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(b.Bytes())), nil })
	if err != nil {
		t.Fatal(err)
	}
	img, err := mutate.AppendLayers(empty.Image, l)
	if err != nil {
		t.Fatal(err)
	}
	img, err = mutate.ConfigFile(img, &v1.ConfigFile{
		OS: "linux", Architecture: "amd64", Config: v1.Config{Env: []string{"PATH=/bin"}, Cmd: []string{"sh"}},
		RootFS: v1.RootFS{Type: "layers", DiffIDs: diffIDs(t, img)},
	})
	if err != nil {
		t.Fatal(err)
	}
	return img
}

func diffIDs(t *testing.T, img v1.Image) []v1.Hash {
	c, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	return c.RootFS.DiffIDs
}

// cmdStatus runs a command and wants an exit status: status 2 filo build.
func cmdStatus(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: status N command…")
	}
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	err = ts.Exec(args[1], args[2:]...)
	got := 0
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		got = exit.ExitCode()
	} else {
		ts.Check(err)
	}
	if got != want {
		ts.Fatalf("exit status %d, want %d", got, want)
	}
}

// images returns the images of an OCI layout directory, those of indexes too.
func images(ts *testscript.TestScript, dir string) []v1.Image {
	idx, err := layout.ImageIndexFromPath(ts.MkAbs(dir))
	ts.Check(err)
	var out []v1.Image
	var walk func(v1.ImageIndex)
	walk = func(idx v1.ImageIndex) {
		m, err := idx.IndexManifest()
		ts.Check(err)
		for _, d := range m.Manifests {
			if d.MediaType.IsIndex() {
				inner, err := idx.ImageIndex(d.Digest)
				ts.Check(err)
				walk(inner)
				continue
			}
			img, err := idx.Image(d.Digest)
			ts.Check(err)
			out = append(out, img)
		}
	}
	walk(idx)
	if len(out) == 0 {
		ts.Fatalf("%s: no image", dir)
	}
	return out
}

// cmdLs prints what the layers of a layout's first image hold: ls LAYOUT [N], N counted from the top if negative.
func cmdLs(ts *testscript.TestScript, _ bool, args []string) {
	layers, err := images(ts, args[0])[0].Layers()
	ts.Check(err)
	first, last := 0, len(layers)-1
	if len(args) > 1 {
		n, err := strconv.Atoi(args[1])
		ts.Check(err)
		if n < 0 {
			n += len(layers)
		}
		first, last = n, n
	}
	for i := first; i <= last; i++ {
		r, err := layers[i].Uncompressed()
		ts.Check(err)
		tr := tar.NewReader(r)
		for h, err := tr.Next(); err != io.EOF; h, err = tr.Next() {
			ts.Check(err)
			link := ""
			if h.Linkname != "" {
				link = " -> " + h.Linkname
			}
			fmt.Fprintf(ts.Stdout(), "%d: %c %04o %d:%d %d %s%s\n", i, kinds[h.Typeflag], h.Mode, h.Uid, h.Gid, h.Size, h.Name, link)
		}
		r.Close()
	}
}

var kinds = map[byte]byte{tar.TypeReg: '-', tar.TypeDir: 'd', tar.TypeSymlink: 'l', tar.TypeLink: 'h', tar.TypeChar: 'c', tar.TypeBlock: 'b', tar.TypeFifo: 'p'}

// cmdConfig prints the configs of a layout's images.
func cmdConfig(ts *testscript.TestScript, _ bool, args []string) {
	for _, img := range images(ts, args[0]) {
		b, err := img.RawConfigFile()
		ts.Check(err)
		fmt.Fprintf(ts.Stdout(), "%s\n", b)
	}
}

// cmdManifest prints the manifests of a layout's images.
func cmdManifest(ts *testscript.TestScript, _ bool, args []string) {
	for _, img := range images(ts, args[0]) {
		b, err := img.RawManifest()
		ts.Check(err)
		fmt.Fprintf(ts.Stdout(), "%s\n", b)
	}
}

// cmdValid has go-containerregistry check every digest, size and diff ID of layouts.
func cmdValid(ts *testscript.TestScript, _ bool, args []string) {
	for _, dir := range args {
		for _, img := range images(ts, dir) {
			ts.Check(validate.Image(img))
		}
	}
}

// cmdAttested prints the platforms of the index in a layout, and the attestation manifests and statements beside its
// images, having checked that each speaks about an image that is there.
func cmdAttested(ts *testscript.TestScript, _ bool, args []string) {
	outer, err := layout.ImageIndexFromPath(ts.MkAbs(args[0]))
	ts.Check(err)
	m, err := outer.IndexManifest()
	ts.Check(err)
	idx, err := outer.ImageIndex(m.Manifests[0].Digest)
	ts.Check(err)
	m, err = idx.IndexManifest()
	ts.Check(err)
	there := map[string]bool{}
	fmt.Fprint(ts.Stdout(), "platforms")
	for _, d := range m.Manifests {
		fmt.Fprint(ts.Stdout(), " ", d.Platform)
		about := d.Annotations["vnd.docker.reference.digest"]
		if about == "" {
			there[d.Digest.String()] = true
		} else if !there[about] || d.Annotations["vnd.docker.reference.type"] != "attestation-manifest" {
			ts.Fatalf("%s speaks about %q, which is not before it", d.Digest, about)
		}
	}
	fmt.Fprintln(ts.Stdout())
	for _, d := range m.Manifests {
		if there[d.Digest.String()] {
			continue
		}
		img, err := idx.Image(d.Digest)
		ts.Check(err)
		raw, err := img.RawManifest()
		ts.Check(err)
		fmt.Fprintf(ts.Stdout(), "%s\n", raw)
		layers, err := img.Layers()
		ts.Check(err)
		for _, l := range layers {
			r, err := l.Compressed() // which is what it is
			ts.Check(err)
			_, err = io.Copy(ts.Stdout(), r)
			ts.Check(err)
			fmt.Fprintln(ts.Stdout())
		}
	}
}

// cmdSame wants two layouts to hold the same images; with ! different ones.
func cmdSame(ts *testscript.TestScript, neg bool, args []string) {
	digests := func(dir string) []string {
		var out []string
		for _, img := range images(ts, dir) {
			d, err := img.Digest()
			ts.Check(err)
			out = append(out, d.String())
		}
		return out
	}
	a, b := digests(args[0]), digests(args[1])
	if slices.Equal(a, b) == neg {
		ts.Fatalf("%s holds %v, %s holds %v", args[0], a, args[1], b)
	}
}
