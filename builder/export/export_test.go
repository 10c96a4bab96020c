package export

import (
	"archive/tar"
	"bytes"
	"encoding/json"
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
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	ggcr "github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/random"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/validate"
	dockerspec "github.com/moby/docker-image-spec/specs-go/v1"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"filo/builder/image"
	"filo/layer"
	"filo/layer/registry"
)

var (
	amd64 = ocispec.Platform{OS: "linux", Architecture: "amd64"}
	arm64 = ocispec.Platform{OS: "linux", Architecture: "arm64"}
)

func newExporter(t *testing.T) Exporter {
	t.Helper()
	s, err := layer.Open(t.TempDir(), layer.Options{SingleID: os.Geteuid() != 0})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close(); unlock(s.Dir()) })
	return Exporter{Store: s, Client: registry.Open(registry.Options{}), Devices: os.Geteuid() == 0}
}

// unlock opens directories to their owner, so that they can be cleaned up by somebody who is not root.
func unlock(root string) {
	_ = filepath.WalkDir(root, func(p string, d os.DirEntry, err error) error {
		if d != nil && d.IsDir() {
			_ = os.Chmod(p, 0o755)
		}
		return nil
	})
}

// file is an entry of a test layer; text is the content of a regular file.
type file struct {
	layer.Entry
	text string
}

func reg(path, text string) file {
	return file{layer.Entry{Path: path, Type: layer.Regular, Mode: 0o644, Size: int64(len(text)), ModTime: 1_000}, text}
}

func dir(path string) file {
	return file{layer.Entry{Path: path, Type: layer.Dir, Mode: 0o755, ModTime: 2_000}, ""}
}

func link(path, target string) file {
	return file{layer.Entry{Path: path, Type: layer.Symlink, Mode: 0o777, Link: target, ModTime: 3_000}, ""}
}

func (e Exporter) layer(t *testing.T, files ...file) layer.Layer {
	t.Helper()
	w, err := e.Store.Create(t.Context(), layer.Sinks{Blob: &layer.Compression{}})
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		var content io.Reader
		if f.Type == layer.Regular {
			content = strings.NewReader(f.text)
		}
		if err := w.Add(f.Entry, content); err != nil {
			t.Fatalf("Add(%s): %v", f.Path, err)
		}
	}
	l, err := w.Close()
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func built(p ocispec.Platform, layers ...layer.Layer) *image.Image {
	at := time.Unix(1_000_000_000, 0).UTC()
	img := &image.Image{Layers: layers}
	img.Config = dockerspec.DockerOCIImage{Image: ocispec.Image{Created: &at, Platform: p}}
	for range layers {
		img.Config.History = append(img.Config.History, ocispec.History{Created: &at, CreatedBy: "COPY"})
	}
	return img
}

func (e Exporter) write(t *testing.T, spec string, r Result) Exported {
	t.Helper()
	x, err := e.try(t, spec, r)
	if err != nil {
		t.Fatalf("Write(%s): %v", spec, err)
	}
	return x
}

func (e Exporter) try(t *testing.T, spec string, r Result) (Exported, error) {
	t.Helper()
	o, err := Parse(spec)
	if err != nil {
		return Exported{}, err
	}
	return Write(t.Context(), e, o, r)
}

// untar unpacks a tar of plain files.
func untar(t *testing.T, name string) (string, []*tar.Header) {
	t.Helper()
	f, err := os.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	to := t.TempDir()
	var headers []*tar.Header
	for r := tar.NewReader(f); ; {
		h, err := r.Next()
		if err == io.EOF {
			return to, headers
		}
		if err != nil {
			t.Fatal(err)
		}
		headers = append(headers, h)
		if h.Typeflag != tar.TypeReg {
			continue
		}
		path := filepath.Join(to, h.Name)
		data, err := io.ReadAll(r)
		if err == nil {
			err = os.MkdirAll(filepath.Dir(path), 0o755)
		}
		if err == nil {
			err = os.WriteFile(path, data, 0o644)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

// checkLayoutOf sees that a directory is a layout which others accept, and returns its index.json.
func checkLayoutOf(t *testing.T, dir string) ocispec.Index {
	t.Helper()
	idx, err := layout.ImageIndexFromPath(dir)
	if err != nil {
		t.Fatal(err)
	}
	if err := validate.Index(idx); err != nil {
		t.Errorf("validate %s: %v", dir, err)
	}
	var parsed ocispec.Index
	data, err := os.ReadFile(filepath.Join(dir, "index.json"))
	if err == nil {
		err = json.Unmarshal(data, &parsed)
	}
	if err != nil {
		t.Fatal(err)
	}
	return parsed
}

func TestParse(t *testing.T) {
	for spec, want := range map[string]string{
		"out":                              "local out map[]",
		"-":                                "tar - map[]",
		"type=oci,dest=a.tar":              "oci a.tar map[]",
		`type=oci,dest=t,"name=x/a:1,x/b"`: "oci t map[name:x/a:1,x/b]",
		"type=registry,name=h/a":           "registry  map[name:h/a]",
		"type=image,push=true,annotation.A.b=c,annotation-manifest[linux/arm64].k=v": "image  map[annotation-manifest[linux/arm64].k:v annotation.A.b:c push:true]",
		"type=local,dest=d,platform-split=false,mode=delete,src=/a":                  "local d map[mode:delete platform-split:false src:/a]",
		"type=docker":                            "docker  map[]",
		"type=oci,dest=x,compression=zstd":       "oci x map[compression:zstd]",
		"type=oci,dest=x,compression-level=9":    "oci x map[compression-level:9]",
		"type=oci,dest=x,rewrite-timestamp=true": "oci x map[rewrite-timestamp:true]",
	} {
		o, err := Parse(spec)
		if got := fmt.Sprintf("%s %s %v", o.Type, o.Dest, o.Attrs); err != nil || got != want {
			t.Errorf("Parse(%q) = %s, %v, want %s", spec, got, err, want)
		}
	}
	for spec, want := range map[string]string{
		"":                                 "empty",
		"type=zip,dest=x":                  "unknown type",
		"type=ocl,dest=x":                  "did you mean oci",
		"dest=x":                           "type is required",
		"type=oci,x":                       "KEY=VALUE",
		"type=oci,dest=t,compresion=zstd":  "did you mean compression",
		"type=local,dest=t,push=true":      "unknown attribute",
		"type=local,dest=t,annotation.a=b": "unknown attribute",
		"type=registry,dest=t":             "no dest",
		"type=oci,dest=t,compression=lz9":  "unknown compression",
		"type=oci,dest=t,compression=estargz,oci-mediatypes=false":     "conflicts",
		"type=oci,dest=t,compression-level=high":                       "not a number",
		"type=oci,dest=t,compression-level=77":                         "1 to 9",
		"type=oci,dest=t,compression=uncompressed,compression-level=1": "no levels",
		"type=oci,dest=t,compression=zstd,oci-mediatypes=false":        "conflicts",
		"type=oci,dest=t,tar=maybe":                                    "true or false",
		"type=image,unpack=true":                                       "not supported",
		"type=image,name=x/UPPER":                                      "lowercase",
		"type=image,name=x@sha256:" + strings.Repeat("0", 64):          "digest",
		"type=image,name=x:1,push-by-digest=true":                      "tag",
		"type=oci,dest=t,annotation-foo.a=b":                           "annotation type",
		"type=local,dest=t,mode=move":                                  "copy or delete",
		"type=oci,dest=t,source-date-epoch=1":                          "SOURCE_DATE_EPOCH",
	} {
		if o, err := Parse(spec); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("Parse(%q) = %+v, %v, want %q", spec, o, err, want)
		}
	}
}

func TestCheck(t *testing.T) {
	for _, tt := range []struct {
		spec, names string
		platforms   int
		want        string
	}{
		{"type=registry", "", 1, "tag is needed"},
		{"type=registry", "a", 1, ""},
		{"type=local,dest=", "", 1, "dest is required"},
		{"type=oci", "", 1, "refusing to write to the terminal"},
		{"type=docker,dest=x", "", 2, "manifest list"},
		{"type=oci,dest=x,annotation-index.a=b", "", 1, "index annotations not supported"},
		{"type=oci,dest=x,annotation-index.a=b", "", 2, ""},
		{"type=image,store=false", "a", 1, "neither push nor store"},
		{"type=oci,dest=x", "x/UPPER", 1, "lowercase"},
	} {
		o, err := Parse(tt.spec)
		if err != nil {
			t.Fatal(err)
		}
		err = o.Check(strings.Fields(tt.names), tt.platforms)
		if (err == nil) != (tt.want == "") || err != nil && !strings.Contains(err.Error(), tt.want) {
			t.Errorf("Check(%s) = %v, want %q", tt.spec, err, tt.want)
		}
	}
}

func TestCompatibilityVersion(t *testing.T) {
	for spec, docker := range map[string]bool{
		"type=image,compatibility-version=10":                      true,
		"type=image,compatibility-version=30":                      false,
		"type=oci,dest=x,compatibility-version=10":                 false,
		"type=image,compatibility-version=20,compression=zstd":     false,
		"type=image,compatibility-version=20,annotation.a=b":       false,
		"type=image,compatibility-version=20,oci-mediatypes=true":  false,
		"type=image,compatibility-version=30,oci-mediatypes=false": true,
	} {
		o, err := Parse(spec)
		if err != nil {
			t.Fatal(err)
		}
		if p, err := o.plan(nil); err != nil || p.write.DockerTypes != docker {
			t.Errorf("%s: docker types %v, %v, want %v", spec, p.write.DockerTypes, err, docker)
		}
	}
}

func TestParseAnnotation(t *testing.T) {
	for spec, want := range map[string]string{
		"a.b=c=d":                      "map[annotation-manifest.a.b:c=d]",
		"index,manifest:a=b":           "map[annotation-index.a:b annotation-manifest.a:b]",
		"manifest[linux/arm64/v8]:a=b": "map[annotation-manifest[linux/arm64/v8].a:b]",
		"manifest-descriptor:a=":       "map[annotation-manifest-descriptor.a:]",
	} {
		if got, err := ParseAnnotation(spec); err != nil || fmt.Sprint(got) != want {
			t.Errorf("ParseAnnotation(%q) = %v, %v, want %s", spec, got, err, want)
		}
	}
	for _, spec := range []string{"a", "=b", "foo:a=b", "index[linux/arm64]:a=b", "a b=c"} {
		if got, err := ParseAnnotation(spec); err == nil {
			t.Errorf("ParseAnnotation(%q) = %v", spec, got)
		}
	}
}

func TestOCITar(t *testing.T) {
	e := newExporter(t)
	r := Result{Images: []*image.Image{built(amd64, e.layer(t, reg("a", "x")))}, Names: []string{"q/r:7", "s"}}
	out := t.TempDir()
	one, two := filepath.Join(out, "new", "one.tar"), filepath.Join(out, "two.tar")
	x := e.write(t, "type=oci,annotation.a=m,annotation-manifest-descriptor.a=d,dest="+one, r)
	e.write(t, "type=oci,annotation.a=m,annotation-manifest-descriptor.a=d,dest="+two, r)
	a, _ := os.ReadFile(one)
	b, _ := os.ReadFile(two)
	if len(a) == 0 || !bytes.Equal(a, b) {
		t.Errorf("two exports differ")
	}
	dir, headers := untar(t, one)
	idx := checkLayoutOf(t, dir)
	if len(idx.Manifests) != 2 {
		t.Fatalf("index.json = %+v", idx)
	}
	d := idx.Manifests[0]
	want := map[string]string{
		"a": "d", image.AnnotationName: "docker.io/q/r:7", ocispec.AnnotationRefName: "7", ocispec.AnnotationCreated: "2001-09-09T01:46:40Z",
	}
	if fmt.Sprint(d.Annotations) != fmt.Sprint(want) || d.Platform == nil || d.Platform.Architecture != "amd64" || d.Digest != x.Descriptor.Digest {
		t.Errorf("entry = %+v, want annotations %v", d, want)
	}
	if n := headers[len(headers)-1].Name; n != "oci-layout" || headers[0].Name != "blobs/" || headers[2].Mode != 0o444 {
		t.Errorf("tar begins with %s and ends with %s", headers[0].Name, n)
	}
	var m ocispec.Manifest
	data, _ := os.ReadFile(filepath.Join(dir, blobPath(d)))
	if err := json.Unmarshal(data, &m); err != nil || m.Annotations["a"] != "m" || x.ConfigDigest != m.Config.Digest.String() || x.ID() != x.ConfigDigest {
		t.Errorf("manifest %s, exported %+v", data, x)
	}
	if fmt.Sprint(x.Names) != "[docker.io/q/r:7 docker.io/library/s:latest]" || x.Metadata()["image.name"] != "docker.io/q/r:7,docker.io/library/s:latest" {
		t.Errorf("exported %+v", x)
	}
	if left, _ := os.ReadDir(out); len(left) != 2 {
		t.Errorf("left behind: %v", left)
	}

	r.Names = nil
	e.write(t, "type=oci,dest="+one, r)
	dir, _ = untar(t, one)
	if idx := checkLayoutOf(t, dir); len(idx.Manifests) != 1 || len(idx.Manifests[0].Annotations) != 1 {
		t.Errorf("nameless entry = %+v", idx.Manifests)
	}
}

// TestOCIDirElsewhere exports to another file system, where blobs are copied, after an export that was killed.
func TestOCIDirElsewhere(t *testing.T) {
	e := newExporter(t)
	const memory = "/dev/shm"
	out, err := os.MkdirTemp(memory, "filo-test-")
	if err != nil {
		t.Skip(err)
	}
	defer os.RemoveAll(out)
	probe := filepath.Join(out, "probe")
	if err := os.Link(filepath.Join(e.Store.Dir(), "oci-layout"), probe); !errors.Is(err, syscall.EXDEV) {
		t.Skipf("%s is not a file system of its own: %v", memory, err)
	}
	killed := filepath.Join(out, "blobs", "sha256", unfinished+"XYZ")
	if err := errors.Join(os.MkdirAll(filepath.Dir(killed), 0o755), os.WriteFile(killed, []byte("half"), 0o644)); err != nil {
		t.Fatal(err)
	}
	x := e.write(t, "type=oci,tar=false,dest="+out, Result{Images: []*image.Image{built(amd64, e.layer(t, reg("a", "x")))}})
	if idx := checkLayoutOf(t, out); len(idx.Manifests) != 1 || idx.Manifests[0].Digest != x.Descriptor.Digest {
		t.Errorf("index.json = %+v", idx.Manifests)
	}
	if _, err := os.Lstat(killed); err == nil {
		t.Error("what a killed export left is still there")
	}
}

func TestOCIDir(t *testing.T) {
	e := newExporter(t)
	out := filepath.Join(t.TempDir(), "a", "layout")
	spec := "type=oci,tar=false,dest=" + out
	image1 := Result{Images: []*image.Image{built(amd64, e.layer(t, reg("a", "x")))}, Names: []string{"a:1"}}
	image2 := Result{Images: []*image.Image{built(amd64, e.layer(t, reg("b", "y")))}, Names: []string{"a:2"}}
	e.write(t, spec, image1)
	e.write(t, spec, image2)
	e.write(t, spec, image2)
	if idx := checkLayoutOf(t, out); len(idx.Manifests) != 2 {
		t.Errorf("index.json = %+v", idx.Manifests)
	}
	image2.Names = []string{"a:1"}
	last := e.write(t, spec, image2)
	if idx := checkLayoutOf(t, out); len(idx.Manifests) != 2 || idx.Manifests[1].Digest != last.Descriptor.Digest {
		t.Errorf("moved tag: %+v", idx.Manifests)
	}
	image1.Names = nil
	e.write(t, spec, image1)
	idx := checkLayoutOf(t, out)
	if n := idx.Manifests[len(idx.Manifests)-1].Annotations[ocispec.AnnotationRefName]; n != "latest" {
		t.Errorf("nameless image in a directory is called %q", n)
	}
	store, _ := os.Stat(filepath.Join(e.Store.Dir(), blobPath(last.Descriptor)))
	there, err := os.Stat(filepath.Join(out, blobPath(last.Descriptor)))
	if err != nil || !os.SameFile(store, there) {
		t.Errorf("blob is no hard link: %v", err)
	}
	names, _ := filepath.Glob(filepath.Join(out, "*"))
	hidden, _ := filepath.Glob(filepath.Join(out, ".*"))
	if len(names)+len(hidden) != 3 {
		t.Errorf("layout holds %q %q", names, hidden)
	}
	run(t, "skopeo", "inspect", "--raw", "oci:"+out+":latest")
	run(t, "umoci", "stat", "--image", out+":latest")

	if err := os.WriteFile(filepath.Join(out, "oci-layout"), []byte(`{"imageLayoutVersion":"9"}`), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := e.try(t, spec, image1); err == nil || !strings.Contains(err.Error(), "version") {
		t.Errorf("layout of an unknown version: %v", err)
	}
}

// run runs another tool on what we wrote, if it is installed.
func run(t *testing.T, name string, args ...string) {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		t.Logf("%s is not installed: not tried", name)
		return
	}
	if out, err := exec.Command(path, args...).CombinedOutput(); err != nil {
		t.Errorf("%s %q: %v\n%s", name, args, err, out)
	}
}

func TestDockerTar(t *testing.T) {
	e := newExporter(t)
	out := filepath.Join(t.TempDir(), "t.tar")
	r := Result{Images: []*image.Image{built(amd64, e.layer(t, reg("a", "x")), e.layer(t, reg("b", "y")))}, Names: []string{"q/r:7"}}
	for _, spec := range []string{"type=docker,dest=" + out, "type=docker,oci-mediatypes=false,dest=" + out} {
		x := e.write(t, spec, r)
		tag, err := name.NewTag("q/r:7")
		if err != nil {
			t.Fatal(err)
		}
		img, err := tarball.ImageFromPath(out, &tag)
		if err != nil {
			t.Fatal(err)
		}
		if err := validate.Image(img); err != nil {
			t.Error(err)
		}
		if h, err := img.ConfigName(); err != nil || h.String() != x.ConfigDigest {
			t.Errorf("config %v, %v, want %s", h, err, x.ConfigDigest)
		}
		dir, _ := untar(t, out)
		checkLayoutOf(t, dir)
		run(t, "skopeo", "inspect", "--raw", "docker-archive:"+out)
	}
	r.Images = append(r.Images, built(arm64))
	if _, err := e.try(t, "type=docker,dest="+out, r); err == nil {
		t.Error("docker archive of two platforms")
	}
}

func TestIndex(t *testing.T) {
	e := newExporter(t)
	out := filepath.Join(t.TempDir(), "l")
	l := e.layer(t, reg("a", "x"))
	r := Result{Images: []*image.Image{built(arm64, l), built(amd64, l)}}
	x := e.write(t, "type=oci,tar=false,annotation-index.i=1,annotation-index-descriptor.d=1,annotation-manifest[linux/arm64].a=1,annotation.all=1,dest="+out, r)
	if x.ID() != x.Descriptor.Digest.String() || len(x.Manifests) != 2 {
		t.Errorf("exported %+v", x)
	}
	idx := checkLayoutOf(t, out)
	if a := idx.Manifests[0].Annotations; a["d"] != "1" || a["i"] != "" {
		t.Errorf("annotations of the descriptor: %v", a)
	}
	var inner ocispec.Index
	read := func(d digest.Digest, v any) {
		t.Helper()
		data, err := e.Store.ReadBlob(t.Context(), d)
		if err == nil {
			err = json.Unmarshal(data, v)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	read(x.Descriptor.Digest, &inner)
	if inner.Annotations["i"] != "1" || inner.Manifests[0].Platform.Architecture != "arm64" {
		t.Errorf("index = %+v", inner)
	}
	for i, want := range []string{"1", ""} {
		var m ocispec.Manifest
		read(inner.Manifests[i].Digest, &m)
		if m.Annotations["a"] != want || m.Annotations["all"] != "1" {
			t.Errorf("manifest %d has %v", i, m.Annotations)
		}
	}
	one := e.write(t, "type=oci,tar=false,dest="+out, Result{Images: r.Images[:1], Index: true})
	if one.Descriptor.MediaType != ocispec.MediaTypeImageIndex {
		t.Errorf("forced index is %+v", one.Descriptor)
	}
}

// tree lists a directory: name, type, mode, owner if asked for, times, content.
func tree(t *testing.T, root string) string {
	t.Helper()
	var b strings.Builder
	err := filepath.WalkDir(root, func(p string, d os.DirEntry, err error) error {
		if err != nil || p == root {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		rel, _ := filepath.Rel(root, p)
		fmt.Fprintf(&b, "%s %v", rel, info.Mode())
		switch {
		case info.Mode().IsRegular():
			data, err := os.ReadFile(p)
			if err != nil {
				return err
			}
			fmt.Fprintf(&b, " %d %q", info.ModTime().Unix(), data)
		case info.Mode()&os.ModeSymlink != 0:
			to, _ := os.Readlink(p)
			fmt.Fprintf(&b, " -> %s", to)
		case info.IsDir():
			fmt.Fprintf(&b, " %d", info.ModTime().Unix())
		}
		b.WriteByte('\n')
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return b.String()
}

func (e Exporter) sample(t *testing.T) layer.Layer {
	shut := dir("shut")
	shut.Mode = 0o555
	suid := reg("shut/suid", "s")
	suid.Mode = 0o4755
	hard := file{layer.Entry{Path: "z", Type: layer.Hardlink, Link: "a", Mode: 0o644, ModTime: 1_000}, ""}
	second := file{layer.Entry{Path: "out2", Type: layer.Hardlink, Link: "out", Mode: 0o777, ModTime: 1_000}, ""}
	return e.layer(t, reg("a", "one"), dir("d"), reg("d/f", "two"), link("out", "/etc"), second, shut, suid, hard)
}

const sampleTree = `a -rw-r--r-- 1000 "one"
d drwxr-xr-x 2000
d/f -rw-r--r-- 1000 "two"
out Lrwxrwxrwx -> /etc
out2 Lrwxrwxrwx -> /etc
shut dr-xr-xr-x 2000
shut/suid urwxr-xr-x 1000 "s"
z -rw-r--r-- 1000 "one"
`

func TestLocal(t *testing.T) {
	e := newExporter(t)
	out := filepath.Join(t.TempDir(), "new", "out")
	r := Result{Images: []*image.Image{built(amd64, e.sample(t))}}
	for range 2 { // the second time over what is there
		e.write(t, out, r)
		if got := tree(t, out); got != sampleTree {
			t.Fatalf("local:\n%s\nwant:\n%s", got, sampleTree)
		}
		for _, names := range [][2]string{{"a", "z"}, {"out", "out2"}} {
			a, _ := os.Lstat(filepath.Join(out, names[0]))
			b, _ := os.Lstat(filepath.Join(out, names[1]))
			if !os.SameFile(a, b) {
				t.Errorf("%s: hard link became a copy", names[1])
			}
		}
	}
	epoch := int64(1_500)
	r.Epoch = &epoch
	e.write(t, out, r)
	if got, want := tree(t, out), strings.ReplaceAll(sampleTree, "2000", "1500"); got != want {
		t.Errorf("with epoch:\n%s\nwant:\n%s", got, want)
	}
	unlock(out)
}

// TestLocalStaysInside: neither links of the image nor links that lie in the destination lead out of it.
func TestLocalStaysInside(t *testing.T) {
	e := newExporter(t)
	outside, out := t.TempDir(), t.TempDir()
	for name, to := range map[string]string{"d": outside, "f": filepath.Join(outside, "victim"), "h": filepath.Join(outside, "victim")} {
		if err := os.Symlink(to, filepath.Join(out, name)); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(outside, "victim"), []byte("safe"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(out, "keep"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	hard := file{layer.Entry{Path: "h", Type: layer.Hardlink, Link: "f", Mode: 0o644}, ""}
	l1 := e.layer(t, dir("d"), reg("d/x", "new"), reg("f", "new"), hard)
	l2 := e.layer(t, link("l", outside))
	e.write(t, "type=local,dest="+out, Result{Images: []*image.Image{built(amd64, l1, l2)}})
	if got := tree(t, outside); !strings.HasPrefix(got, "victim -rw------- ") || strings.Count(got, "\n") != 1 || !strings.HasSuffix(got, "\"safe\"\n") {
		t.Errorf("outside is now:\n%s", got)
	}
	got := tree(t, out)
	for _, want := range []string{"d/x -rw-r--r-- 1000 \"new\"", "f -rw-r--r-- 1000 \"new\"", "h -rw-r--r-- 1000 \"new\"", "keep "} {
		if !strings.Contains(got, want) {
			t.Errorf("no %q in:\n%s", want, got)
		}
	}
	if err := os.MkdirAll(filepath.Join(out, "way", "full"), 0o755); err != nil {
		t.Fatal(err)
	}
	_, err := e.try(t, out, Result{Images: []*image.Image{built(amd64, e.layer(t, reg("way", "x")))}})
	if err == nil || !strings.Contains(err.Error(), "in the way") {
		t.Errorf("file over a directory that has files: %v", err)
	}
	if strings.Contains(tree(t, out), ".filo-") {
		t.Error("temporary files are left")
	}
}

func TestLocalDelete(t *testing.T) {
	e := newExporter(t)
	wd := t.TempDir()
	t.Chdir(wd)
	r := Result{Images: []*image.Image{built(amd64, e.layer(t, dir("d"), reg("d/f", "x"), reg("way", "y")))}}
	for _, p := range []string{"out/old", "out/d/old", "out/way/full/x"} {
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(p, nil, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink("/", "root"); err != nil {
		t.Fatal(err)
	}
	for _, dest := range []string{".", "..", "/", "root", "root/tmp", t.TempDir()} {
		if _, err := e.try(t, "type=local,mode=delete,dest="+dest, r); err == nil || !strings.Contains(err.Error(), "working directory") {
			t.Fatalf("mode=delete of %s: %v", dest, err)
		}
	}
	e.write(t, "type=local,mode=delete,dest=out", r)
	want := "d drwxr-xr-x 2000\nd/f -rw-r--r-- 1000 \"x\"\nway -rw-r--r-- 1000 \"y\"\n"
	if got := tree(t, "out"); got != want {
		t.Errorf("mode=delete:\n%s\nwant:\n%s", got, want)
	}
}

func TestPlatformSplit(t *testing.T) {
	e := newExporter(t)
	both := e.layer(t, dir("d"), reg("d/f", "x"))
	one := e.layer(t, dir("d"), reg("d/only", "y"))
	v7 := ocispec.Platform{OS: "linux", Architecture: "arm", Variant: "v7"}
	for _, tt := range []struct {
		attrs  string
		images []*image.Image
		want   string // names, or an error
		index  bool
	}{
		{"", []*image.Image{built(amd64, both), built(v7, both)}, "linux_amd64 linux_amd64/d linux_amd64/d/f linux_arm_v7 linux_arm_v7/d linux_arm_v7/d/f", false},
		{"", []*image.Image{built(amd64, both)}, "linux_amd64 linux_amd64/d linux_amd64/d/f", true},
		{",platform-split=true", []*image.Image{built(amd64, both)}, "linux_amd64 linux_amd64/d linux_amd64/d/f", false},
		{"", []*image.Image{built(amd64, both)}, "d d/f", false},
		{",platform-split=false", []*image.Image{built(amd64, both), built(arm64, one)}, "d d/f d/only", false},
		{",platform-split=false", []*image.Image{built(amd64, both), built(arm64, both)}, "several platforms", false},
		{",src=/d", []*image.Image{built(amd64, both)}, "f", false},
		{",src=/d/f", []*image.Image{built(amd64, both)}, "not a directory", false},
		{",src=/../nosuch", []*image.Image{built(amd64, both)}, "not exist", false},
	} {
		out := t.TempDir()
		for _, kind := range []string{"local", "tar"} {
			dest := filepath.Join(out, kind)
			_, err := e.try(t, "type="+kind+",dest="+dest+tt.attrs, Result{Images: tt.images, Index: tt.index})
			got := ""
			switch {
			case err != nil:
				if !strings.Contains(err.Error(), tt.want) {
					t.Errorf("%s%s: %v, want %s", kind, tt.attrs, err, tt.want)
				}
				continue
			case kind == "local":
				for line := range strings.Lines(tree(t, dest)) {
					name, _, _ := strings.Cut(line, " ")
					got += " " + name
				}
			default:
				_, headers := untar(t, dest)
				for _, h := range headers {
					got += " " + strings.TrimSuffix(h.Name, "/")
				}
			}
			if got = strings.TrimSpace(got); got != tt.want {
				t.Errorf("%s%s: %s, want %s", kind, tt.attrs, got, tt.want)
			}
		}
	}
}

func TestTar(t *testing.T) {
	e := newExporter(t)
	owned := reg("own", "x")
	owned.UID, owned.GID, owned.Xattrs = 7, 3_000_000, map[string]string{"user.k": "v"}
	dev := file{layer.Entry{Path: "null", Type: layer.Char, Mode: 0o666, Major: 1, Minor: 3}, ""}
	r := Result{Images: []*image.Image{built(amd64, e.sample(t), e.layer(t, dev, owned))}}
	var out bytes.Buffer
	o, err := Parse("-")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Write(t.Context(), e, o, r); err == nil || !strings.Contains(err.Error(), "terminal") {
		t.Errorf("tar without a stdout: %v", err)
	}
	o.Stdout = &out
	if _, err := Write(t.Context(), e, o, r); err != nil {
		t.Fatal(err)
	}
	var got []string
	for tr := tar.NewReader(&out); ; {
		h, err := tr.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, fmt.Sprintf("%s %c %o %d:%d %s %d,%d %v", h.Name, h.Typeflag, h.Mode, h.Uid, h.Gid, h.Linkname, h.Devmajor, h.Devminor, h.PAXRecords["SCHILY.xattr.user.k"]))
		if !h.ModTime.Equal(h.ModTime.Truncate(time.Second)) || h.Uname != "" {
			t.Errorf("%s has time %v, uname %q", h.Name, h.ModTime, h.Uname)
		}
	}
	want := []string{
		"a 0 644 0:0  0,0 ", "d/ 5 755 0:0  0,0 ", "d/f 0 644 0:0  0,0 ", "null 3 666 0:0  1,3 ", "out 2 777 0:0 /etc 0,0 ", "out2 1 777 0:0 out 0,0 ",
		"own 0 644 7:3000000  0,0 v", "shut/ 5 555 0:0  0,0 ", "shut/suid 0 4755 0:0  0,0 ", "z 1 644 0:0 a 0,0 ",
	}
	if !slices.Equal(got, want) {
		t.Errorf("tar:\n%s\nwant:\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

type server struct {
	host  string
	mu    sync.Mutex
	log   []string
	spoil func(w http.ResponseWriter, r *http.Request) bool
}

func serve(t *testing.T) *server {
	t.Helper()
	t.Setenv("HOME", t.TempDir())
	t.Setenv("DOCKER_CONFIG", "")
	s := &server{}
	inner := ggcr.New(ggcr.Logger(log.New(io.Discard, "", 0)))
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s.mu.Lock()
		s.log = append(s.log, r.Method+" "+r.URL.RequestURI())
		spoil := s.spoil
		s.mu.Unlock()
		if spoil == nil || !spoil(w, r) {
			inner.ServeHTTP(w, r)
		}
	}))
	t.Cleanup(srv.Close)
	s.host = strings.TrimPrefix(srv.URL, "http://")
	return s
}

func (s *server) asked(part string) (n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, l := range s.log {
		if strings.Contains(l, part) {
			n++
		}
	}
	return n
}

func (s *server) image(t *testing.T, ref string) v1.Image {
	t.Helper()
	r, err := name.ParseReference(s.host + "/" + ref)
	if err != nil {
		t.Fatal(err)
	}
	img, err := remote.Image(r)
	if err != nil {
		t.Fatal(err)
	}
	if err := validate.Image(img); err != nil {
		t.Errorf("validate %s: %v", ref, err)
	}
	return img
}

func TestPush(t *testing.T) {
	srv := serve(t)
	e := newExporter(t)
	var said []string
	e.Report = func(text string) func(error) { said = append(said, text); return func(error) {} }
	l := e.layer(t, reg("a", "x"))
	r := Result{Images: []*image.Image{built(amd64, l)}, Names: []string{srv.host + "/p:1", srv.host + "/p:2", srv.host + "/q:1"}}
	x := e.write(t, "type=registry", r)
	for _, ref := range []string{"p:1", "p:2", "q:1"} {
		if h, err := srv.image(t, ref).Digest(); err != nil || h.String() != x.Descriptor.Digest.String() {
			t.Errorf("%s is %v, %v, want %v", ref, h, err, x.Descriptor)
		}
	}
	if n := srv.asked("PUT /v2/p/blobs"); n != 2 {
		t.Errorf("%d uploads for two tags: %q", n, srv.log)
	}
	if !slices.Contains(said, "pushing manifest for "+srv.host+"/p:1@"+x.Descriptor.Digest.String()) {
		t.Errorf("reported %q", said)
	}
	if all, err := image.List(e.Store); err != nil || len(all) != 0 {
		t.Errorf("type=registry stored %v, %v", all, err)
	}
	d := e.write(t, "type=image,push=true,push-by-digest=true,store=false,name="+srv.host+"/d", r)
	srv.image(t, "d@"+d.Descriptor.Digest.String())
	if srv.asked("PUT /v2/d/manifests/latest") != 0 {
		t.Error("push-by-digest wrote a tag")
	}
	idx := e.write(t, "type=image,push=true,name="+srv.host+"/idx:1", Result{Images: []*image.Image{built(amd64, l), built(arm64, l)}})
	ref, _ := name.ParseReference(srv.host + "/idx:1")
	got, err := remote.Index(ref)
	if err != nil {
		t.Fatal(err)
	}
	if err := validate.Index(got); err != nil {
		t.Error(err)
	}
	if h, _ := got.Digest(); h.String() != idx.ID() {
		t.Errorf("index is %v, want %s", h, idx.ID())
	}
	named, err := image.Lookup(e.Store, srv.host+"/idx:1")
	if err != nil || named.Digest != idx.Descriptor.Digest {
		t.Errorf("type=image stored %v, %v", named, err)
	}
	again := e.write(t, "type=registry,name="+srv.host+"/copy:1", Result{Descriptor: &named})
	if again.ID() != idx.ID() {
		t.Errorf("a stored image pushed as %s, want %s", again.ID(), idx.ID())
	}
	if _, err := e.try(t, "type=registry,force-compression=true,name="+srv.host+"/copy:1", Result{Descriptor: &named}); err == nil {
		t.Error("a stored image was to be compressed anew")
	}
}

// TestPushUnchanged: by whoever pushes, not one request a layer.
func TestPushUnchanged(t *testing.T) {
	srv := serve(t)
	var layers []layer.Layer
	e := newExporter(t)
	for i := range 20 {
		layers = append(layers, e.layer(t, reg(fmt.Sprint("f", i), "x")))
	}
	r := Result{Images: []*image.Image{built(amd64, layers...)}, Names: []string{srv.host + "/p:1"}}
	e.write(t, "type=registry", r)
	srv.mu.Lock()
	srv.log = nil
	srv.mu.Unlock()
	e.Client = newExporter(t).Client // knows nothing of the first push
	e.write(t, "type=registry", r)
	if n := srv.asked(" "); n > 5 {
		t.Errorf("%d requests: %q", n, srv.log)
	}
	srv.image(t, "p:1")
}

// TestPushLazily: a base on the same registry is neither downloaded nor uploaded.
func TestPushLazily(t *testing.T) {
	srv := serve(t)
	base, err := random.Image(2000, 2)
	if err != nil {
		t.Fatal(err)
	}
	ref, _ := name.ParseReference(srv.host + "/base:1")
	if err := remote.Write(ref, base); err != nil {
		t.Fatal(err)
	}
	e := newExporter(t)
	img, err := image.Pull(t.Context(), e.Store, e.Client, srv.host+"/base:1", amd64, image.PullCurrent)
	if err != nil {
		t.Fatal(err)
	}
	var mounted []string
	layers, _ := base.Layers()
	srv.mu.Lock()
	srv.log = nil
	srv.spoil = func(w http.ResponseWriter, r *http.Request) bool {
		if r.Method == http.MethodHead && strings.HasPrefix(r.URL.Path, "/v2/app/blobs/") {
			w.WriteHeader(http.StatusNotFound)
			return true
		}
		if from := r.URL.Query().Get("from"); from != "" {
			mounted = append(mounted, from)
			w.WriteHeader(http.StatusCreated)
			return true
		}
		return false
	}
	srv.mu.Unlock()
	img.Config.OS, img.Config.Architecture = "linux", "amd64"
	e.write(t, "type=registry,name="+srv.host+"/app:1", Result{Images: []*image.Image{img}})
	if len(mounted) != len(layers) || mounted[0] != "base" || srv.asked("GET /v2/base/blobs") != 0 || srv.asked("PUT /v2/app/blobs") != 1 {
		t.Errorf("mounted from %q, asked %q", mounted, srv.log)
	}
}

func TestStore(t *testing.T) {
	e := newExporter(t)
	r := Result{Images: []*image.Image{built(amd64, e.layer(t, reg("a", "x")))}}
	x := e.write(t, "type=image", r)
	all, err := image.List(e.Store)
	if err != nil || len(all) != 1 || all[0].Name != "" {
		t.Errorf("nameless image: %v, %v", all, err)
	}
	e.write(t, "type=docker,name=app", r) // loads: the same store
	e.write(t, "type=image,name=canon,name-canonical=true,dangling-name-prefix=dang", r)
	for _, n := range []string{"app", "canon:latest", "canon@" + x.Descriptor.Digest.String(), "dang@" + x.Descriptor.Digest.String()} {
		if d, err := image.Lookup(e.Store, n); err != nil || d.Digest != x.Descriptor.Digest {
			t.Errorf("Lookup(%s) = %v, %v", n, d, err)
		}
	}
	checkLayoutOf(t, e.Store.Dir())
}

func TestFailureLeavesNothing(t *testing.T) {
	e := newExporter(t)
	out := filepath.Join(t.TempDir(), "t.tar")
	img := built(amd64, e.layer(t, reg("a", "x")))
	x := e.write(t, "type=image,name=a", Result{Images: []*image.Image{img}})
	g, err := image.Walk(t.Context(), e.Store, x.Descriptor)
	if err != nil {
		t.Fatal(err)
	}
	l := filepath.Join(e.Store.Dir(), blobPath(g.Images[0].Layers[0]))
	data, err := os.ReadFile(l)
	if err != nil {
		t.Fatal(err)
	}
	data[len(data)/2] ^= 1
	damage := func() {
		t.Helper()
		if err := errors.Join(os.Chmod(l, 0o644), os.WriteFile(l, data, 0o644), os.Chmod(l, 0o444)); err != nil {
			t.Fatal(err)
		}
	}
	damage()
	e.write(t, "type=oci,tar=false,dest="+filepath.Join(t.TempDir(), "mended"), Result{Descriptor: &x.Descriptor})
	damage()
	if err := os.RemoveAll(filepath.Join(e.Store.Dir(), "copies")); err != nil { // by which it is mended
		t.Fatal(err)
	}
	named, err := image.Lookup(e.Store, "a")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := e.try(t, "type=oci,dest="+out, Result{Descriptor: &named}); !errors.Is(err, image.ErrDamaged) {
		t.Errorf("a damaged blob was exported: %v", err)
	}
	if left, _ := os.ReadDir(filepath.Dir(out)); len(left) != 0 {
		t.Errorf("left behind: %v", left)
	}
}

func FuzzParse(f *testing.F) {
	for _, s := range []string{"out", "-", "type=oci,dest=x", `type=oci,"name=a,b"`, "type=image,annotation-manifest[linux/arm64].a=b", `"`} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, spec string) {
		if len(spec) > 4096 {
			return
		}
		o, err := Parse(spec)
		if err == nil && typeAttrs[o.Type] == nil {
			t.Errorf("Parse(%q) = %+v", spec, o)
		}
	})
}
