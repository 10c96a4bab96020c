package image

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	ggcr "github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/random"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/google/go-containerregistry/pkg/v1/validate"
	dockerspec "github.com/moby/docker-image-spec/specs-go/v1"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"filo/layer"
	"filo/layer/registry"
)

var (
	amd64 = ocispec.Platform{OS: "linux", Architecture: "amd64"}
	arm64 = ocispec.Platform{OS: "linux", Architecture: "arm64"}
	armv7 = ocispec.Platform{OS: "linux", Architecture: "arm", Variant: "v7"}
)

func newStore(t *testing.T) *layer.Store {
	t.Helper()
	s, err := layer.Open(t.TempDir(), layer.Options{SingleID: os.Geteuid() != 0})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

// addLayer makes a layer of one file.
func addLayer(t *testing.T, s *layer.Store, file, text string) layer.Layer {
	t.Helper()
	w, err := s.Create(t.Context(), layer.Sinks{Blob: &layer.Compression{}})
	if err != nil {
		t.Fatal(err)
	}
	e := layer.Entry{Path: file, Type: layer.Regular, Mode: 0o644, Size: int64(len(text)), ModTime: 7}
	if err := w.Add(e, strings.NewReader(text)); err != nil {
		t.Fatal(err)
	}
	l, err := w.Close()
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// built is an image as a builder would have it.
func built(p ocispec.Platform, layers ...layer.Layer) *Image {
	at := time.Unix(1_000_000_000, 0).UTC()
	img := &Image{Layers: layers}
	img.Config = dockerspec.DockerOCIImage{Image: ocispec.Image{Created: &at, Platform: p}}
	img.Config.Config.Env = []string{"A=1"}
	for range layers {
		img.Config.History = append(img.Config.History, ocispec.History{Created: &at, CreatedBy: "COPY"})
	}
	img.Config.History = append(img.Config.History, ocispec.History{Created: &at, CreatedBy: "ENV A=1", EmptyLayer: true})
	return img
}

type server struct {
	host string
	http *httptest.Server

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
	s.http = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s.mu.Lock()
		s.log = append(s.log, r.Method+" "+r.URL.RequestURI())
		spoil := s.spoil
		s.mu.Unlock()
		if spoil == nil || !spoil(w, r) {
			inner.ServeHTTP(w, r)
		}
	}))
	t.Cleanup(s.http.Close)
	s.host = strings.TrimPrefix(s.http.URL, "http://")
	return s
}

func (s *server) forget() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.log = nil
}

func (s *server) asked(part string) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(slices.DeleteFunc(slices.Clone(s.log), func(l string) bool { return !strings.Contains(l, part) }))
}

// foreign is somebody's image for a platform.
func foreign(t *testing.T, p ocispec.Platform, layers int) v1.Image {
	t.Helper()
	img, err := random.Image(512, int64(layers))
	if err != nil {
		t.Fatal(err)
	}
	c, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	c = c.DeepCopy()
	c.OS, c.Architecture, c.Variant = p.OS, p.Architecture, p.Variant
	if img, err = mutate.ConfigFile(img, c); err != nil {
		t.Fatal(err)
	}
	return img
}

func (s *server) push(t *testing.T, ref string, it any) digest.Digest {
	t.Helper()
	r, err := name.ParseReference(s.host + "/" + ref)
	if err != nil {
		t.Fatal(err)
	}
	var h v1.Hash
	switch it := it.(type) {
	case v1.Image:
		err = remote.Write(r, it)
		h, _ = it.Digest()
	case v1.ImageIndex:
		err = remote.WriteIndex(r, it)
		h, _ = it.Digest()
	}
	if err != nil {
		t.Fatal(err)
	}
	return digest.Digest(h.String())
}

func manyPlatforms(t *testing.T) v1.ImageIndex {
	idx := mutate.IndexMediaType(empty.Index, types.OCIImageIndex)
	for _, p := range []ocispec.Platform{arm64, amd64, armv7, {OS: "unknown", Architecture: "unknown"}} {
		idx = mutate.AppendManifests(idx, mutate.IndexAddendum{
			Add:        foreign(t, p, 2),
			Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: p.OS, Architecture: p.Architecture, Variant: p.Variant}},
		})
	}
	return idx
}

func TestPull(t *testing.T) {
	srv := serve(t)
	idx := srv.push(t, "many:1", manyPlatforms(t))
	for _, tt := range []struct {
		want ocispec.Platform
		arch string
	}{{amd64, "amd64"}, {arm64, "arm64"}, {armv7, "arm"}, {ocispec.Platform{OS: "linux", Architecture: "arm64", Variant: "v8"}, "arm64"}} {
		s, c := newStore(t), registry.Open(registry.Options{})
		srv.forget()
		img, err := Pull(t.Context(), s, c, srv.host+"/many:1", tt.want, PullCurrent)
		if err != nil {
			t.Fatalf("Pull for %v: %v", tt.want, err)
		}
		if img.Config.Architecture != tt.arch || len(img.Layers) != 2 || img.Digest != idx || img.WrongPlatform || img.Stale != nil {
			t.Errorf("Pull for %v = %+v", tt.want, img)
		}
		if n := srv.asked("GET /v2/many/blobs/"); n != 1 {
			t.Errorf("Pull fetched %d blobs, want the config only", n)
		}
		if _, err := s.View(t.Context(), img.Layers); err != nil {
			t.Errorf("View: %v", err)
		}
	}
	s := newStore(t)
	_, err := Pull(t.Context(), s, registry.Open(registry.Options{}), srv.host+"/many:1", ocispec.Platform{OS: "linux", Architecture: "riscv64"}, PullCurrent)
	if err == nil || !strings.Contains(err.Error(), "no match for platform in manifest") || strings.Contains(err.Error(), "unknown") {
		t.Errorf("Pull for riscv64 = %v", err)
	}
}

func TestPullSingle(t *testing.T) {
	srv := serve(t)
	docker := foreign(t, arm64, 1)
	srv.push(t, "docker:1", docker)
	srv.push(t, "oci:1", mutate.ConfigMediaType(mutate.MediaType(foreign(t, amd64, 1), types.OCIManifestSchema1), types.OCIConfigJSON))
	s, c := newStore(t), registry.Open(registry.Options{})
	for ref, wrong := range map[string]bool{"docker:1": true, "oci:1": false} {
		img, err := Pull(t.Context(), s, c, srv.host+"/"+ref, amd64, PullAlways)
		if err != nil || img.WrongPlatform != wrong {
			t.Errorf("Pull(%s) = %+v, %v, want wrong platform %v", ref, img, err, wrong)
		}
	}
}

// TestPullAgain: what is known is not asked for, and a registry that is gone does not stop a build.
func TestPullAgain(t *testing.T) {
	srv := serve(t)
	dg := srv.push(t, "a:1", foreign(t, amd64, 2))
	s := newStore(t)
	ref := srv.host + "/a:1"
	pull := func(ref string, mode PullMode) (*Image, error) {
		return Pull(t.Context(), s, registry.Open(registry.Options{}), ref, amd64, mode)
	}
	if _, err := pull(ref, PullCurrent); err != nil {
		t.Fatal(err)
	}
	srv.forget()
	if _, err := pull(ref, PullCurrent); err != nil || srv.asked("HEAD /v2/a/manifests/1") != 1 || srv.asked("GET /v2/a/") != 0 {
		t.Errorf("second Pull: %v, asked %q", err, srv.log)
	}
	srv.forget()
	for _, pinned := range []string{srv.host + "/a@" + dg.String(), srv.host + "/a:nonsense@" + dg.String()} {
		img, err := pull(pinned, PullAlways)
		if err != nil || img.Digest != dg || len(srv.log) != 0 {
			t.Errorf("Pull(%s) = %v, %v, asked %q", pinned, img, err, srv.log)
		}
	}
	srv.http.Close()
	img, err := pull(ref, PullCurrent)
	if err != nil || img.Digest != dg || !registry.Is(img.Stale, registry.Unreachable) {
		t.Errorf("registry gone: %+v, %v", img, err)
	}
	if _, err := pull(srv.host+"/a:2", PullCurrent); !registry.Is(err, registry.Unreachable) {
		t.Errorf("registry gone, never pulled: %v", err)
	}
}

func TestPullRefuses(t *testing.T) {
	srv := serve(t)
	img := foreign(t, amd64, 1)
	srv.push(t, "a:1", img)
	raw, _ := img.RawManifest()
	config, _ := img.ConfigName()
	for _, tt := range []struct{ name, part, body, want string }{
		{"schema 1", "/manifests/", `{"schemaVersion":1,"fsLayers":[]}`, "schema 1"},
		{"both", "/manifests/", strings.Replace(string(raw), `"config"`, `"manifests":[],"config"`, 1), "neither"},
		{"nothing", "/manifests/", `{"schemaVersion":2}`, "neither"},
		{"json", "/manifests/", `<html>`, "manifest"},
		{"artifact", "/manifests/", strings.Replace(string(raw), "application/vnd.docker.container.image.v1+json", "application/vnd.cncf.helm.config.v1+json", 1), "not an image"},
		{"layer type", "/manifests/", strings.Replace(string(raw), "application/vnd.docker.image.rootfs.diff.tar.gzip", "application/x", 1), "layer media type"},
		{"too few layers", "/manifests/", string(raw[:bytes.Index(raw, []byte(`"layers":`))]) + `"layers":[]}`, "layers"},
		{"digest", "/manifests/", strings.Replace(string(raw), config.String(), "sha256:../../x", 1), "digest"},
		{"config", "/blobs/" + config.String(), `{"os":"evil"}`, "digest"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			srv.mu.Lock()
			srv.spoil = func(w http.ResponseWriter, r *http.Request) bool {
				if !strings.Contains(r.URL.Path, tt.part) {
					return false
				}
				if r.Method == http.MethodHead {
					w.WriteHeader(http.StatusMethodNotAllowed)
					return true
				}
				w.Header().Set("Content-Type", string(types.DockerManifestSchema2))
				_, _ = io.WriteString(w, tt.body)
				return true
			}
			srv.mu.Unlock()
			img, err := Pull(t.Context(), newStore(t), registry.Open(registry.Options{}), srv.host+"/a:1", amd64, PullAlways)
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("Pull = %+v, %v, want %q", img, err, tt.want)
			}
		})
	}
}

// validLayout sees that a descriptor of the store is an image that others accept.
func validLayout(t *testing.T, s *layer.Store, d ocispec.Descriptor) v1.Image {
	t.Helper()
	if err := Tag(t.Context(), s, "validate", d); err != nil {
		t.Fatal(err)
	}
	p, err := layout.FromPath(s.Dir())
	if err != nil {
		t.Fatal(err)
	}
	h, err := v1.NewHash(d.Digest.String())
	if err != nil {
		t.Fatal(err)
	}
	img, err := p.Image(h)
	if err != nil {
		t.Fatal(err)
	}
	m, err := img.Manifest()
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range m.Layers {
		if !strings.HasSuffix(string(l.MediaType), "gzip") {
			return img // the validator unpacks nothing else
		}
	}
	if err := validate.Image(img); err != nil {
		t.Errorf("validate: %v", err)
	}
	return img
}

func TestWrite(t *testing.T) {
	s := newStore(t)
	img := built(amd64, addLayer(t, s, "a", "one"), addLayer(t, s, "b", "two"))
	for _, tt := range []struct {
		o                       WriteOptions
		manifest, config, layer string
	}{
		{WriteOptions{}, ocispec.MediaTypeImageManifest, ocispec.MediaTypeImageConfig, ocispec.MediaTypeImageLayerGzip},
		{WriteOptions{DockerTypes: true}, dockerManifest, dockerConfig, dockerLayerGzip},
		{WriteOptions{Compression: layer.Compression{Algorithm: "zstd"}, Force: true}, ocispec.MediaTypeImageManifest, ocispec.MediaTypeImageConfig, ocispec.MediaTypeImageLayerZstd},
		{WriteOptions{Compression: layer.Compression{Algorithm: "uncompressed"}, Force: true, DockerTypes: true}, dockerManifest, dockerConfig, dockerLayer},
	} {
		d, err := Write(t.Context(), s, img, tt.o)
		if err != nil {
			t.Fatalf("Write(%+v): %v", tt.o, err)
		}
		if again, err := Write(t.Context(), s, img, tt.o); err != nil || again.Digest != d.Digest {
			t.Errorf("Write again = %v, %v, want %v", again, err, d)
		}
		m, err := validLayout(t, s, d).Manifest()
		if err != nil {
			t.Fatal(err)
		}
		if string(m.MediaType) != tt.manifest || string(m.Config.MediaType) != tt.config || string(m.Layers[1].MediaType) != tt.layer || d.MediaType != tt.manifest {
			t.Errorf("Write(%+v) has types %s, %s, %s", tt.o, m.MediaType, m.Config.MediaType, m.Layers[1].MediaType)
		}
		if d.Platform == nil || d.Platform.Architecture != "amd64" {
			t.Errorf("descriptor without platform: %+v", d)
		}
	}
}

func TestWriteEmpty(t *testing.T) {
	s := newStore(t)
	d, err := Write(t.Context(), s, built(amd64), WriteOptions{Annotations: map[string]string{"k": "v"}})
	if err != nil {
		t.Fatal(err)
	}
	data, err := s.ReadBlob(t.Context(), d.Digest)
	if err != nil {
		t.Fatal(err)
	}
	var m ocispec.Manifest
	if err := json.Unmarshal(data, &m); err != nil || !bytes.Contains(data, []byte(`"layers": []`)) || m.Annotations["k"] != "v" {
		t.Errorf("manifest %s, %v", data, err)
	}
	config, err := s.ReadBlob(t.Context(), m.Config.Digest)
	if err != nil || !bytes.Contains(config, []byte(`"diff_ids":[]`)) {
		t.Errorf("config %s, %v", config, err)
	}
	validLayout(t, s, d)
	if _, err := Write(t.Context(), s, &Image{}, WriteOptions{}); err == nil {
		t.Error("an image without platform was written")
	}
}

// TestBaseLayersStay: an image on a base has the base's layers byte for byte, and writing it fetches none.
func TestBaseLayersStay(t *testing.T) {
	srv := serve(t)
	base := foreign(t, amd64, 2)
	srv.push(t, "base:1", base)
	s := newStore(t)
	img, err := Pull(t.Context(), s, registry.Open(registry.Options{}), srv.host+"/base:1", amd64, PullCurrent)
	if err != nil {
		t.Fatal(err)
	}
	srv.forget()
	top := built(amd64, append(img.Layers, addLayer(t, s, "a", "x"))...)
	d, err := Write(t.Context(), s, top, WriteOptions{Compression: layer.Compression{Algorithm: "zstd"}})
	if err != nil {
		t.Fatal(err)
	}
	g, err := Walk(t.Context(), s, d)
	if err != nil {
		t.Fatal(err)
	}
	want, _ := base.Manifest()
	for i, l := range want.Layers {
		got := g.Images[0].Layers[i]
		if got.Digest.String() != l.Digest.String() || got.Size != l.Size || got.MediaType != ocispec.MediaTypeImageLayerGzip {
			t.Errorf("layer %d is %v, want %v", i, got, l)
		}
	}
	if len(srv.log) != 0 {
		t.Errorf("writing asked for %q", srv.log)
	}
	if err := Tag(t.Context(), s, "mine", d); err != nil {
		t.Fatal(err)
	}
	// Another process knows the name and where the missing layers are.
	dir := s.Dir()
	s.Close()
	if s, err = layer.Open(dir, layer.Options{SingleID: os.Geteuid() != 0}); err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	loaded, err := Load(t.Context(), s, registry.Open(registry.Options{}), "mine", amd64)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.View(t.Context(), loaded.Layers); err != nil {
		t.Errorf("View of a loaded image: %v", err)
	}
	if got := Origins(s, g.Images[0].Layers[0].Digest); !slices.Equal(got, []string{srv.host + "/base"}) {
		t.Errorf("Origins = %q", got)
	}
}

func TestLocalNameFirst(t *testing.T) {
	s := newStore(t)
	d, err := Write(t.Context(), s, built(amd64, addLayer(t, s, "a", "x")), WriteOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if err := Tag(t.Context(), s, "127.0.0.1:1/local:1", d); err != nil {
		t.Fatal(err)
	}
	c := registry.Open(registry.Options{})
	img, err := Pull(t.Context(), s, c, "127.0.0.1:1/local:1", amd64, PullCurrent)
	if err != nil || img.Digest != d.Digest || len(img.Layers) != 1 {
		t.Errorf("Pull = %+v, %v", img, err)
	}
	if img, err := Pull(t.Context(), s, c, "127.0.0.1:1/local:1", arm64, PullCurrent); err != nil || !img.WrongPlatform {
		t.Errorf("Pull for another platform = %+v, %v", img, err)
	}
	if _, err := Pull(t.Context(), s, c, "127.0.0.1:1/local:1", amd64, PullAlways); !registry.Is(err, registry.Unreachable) {
		t.Errorf("PullAlways = %v", err)
	}
}

func TestWriteIndex(t *testing.T) {
	s := newStore(t)
	l := addLayer(t, s, "a", "x")
	var all []ocispec.Descriptor
	for _, p := range []ocispec.Platform{arm64, amd64, amd64} {
		d, err := Write(t.Context(), s, built(p, l), WriteOptions{})
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, d)
	}
	d, err := WriteIndex(t.Context(), s, all, map[string]string{"a": "b"})
	if err != nil || d.MediaType != ocispec.MediaTypeImageIndex {
		t.Fatalf("WriteIndex = %v, %v", d, err)
	}
	g, err := Walk(t.Context(), s, d)
	if err != nil {
		t.Fatal(err)
	}
	if len(g.Images) != 2 || len(g.Blobs) != 3 || g.Documents[2].Digest != d.Digest || g.Images[0].Descriptor.Platform.Architecture != "arm64" {
		t.Errorf("Walk = %+v", g)
	}
	img, err := Read(t.Context(), s, d, amd64)
	if err != nil || img.Config.Architecture != "amd64" {
		t.Errorf("Read = %+v, %v", img, err)
	}
}

func TestFit(t *testing.T) {
	h := func(empty ...bool) []ocispec.History {
		var all []ocispec.History
		for i, e := range empty {
			all = append(all, ocispec.History{CreatedBy: fmt.Sprint(i), EmptyLayer: e})
		}
		return all
	}
	for _, tt := range []struct {
		in     []ocispec.History
		layers int
		want   string
	}{
		{h(false, true, false), 2, "0:false 1:true 2:false"},
		{h(false, true, false), 1, "0:true 1:true 2:false"},
		{h(false), 3, ":false :false 0:false"},
		{nil, 0, ""},
	} {
		var got []string
		for _, e := range fit(tt.in, tt.layers) {
			got = append(got, fmt.Sprintf("%s:%v", e.CreatedBy, e.EmptyLayer))
		}
		if s := strings.Join(got, " "); s != tt.want {
			t.Errorf("fit(%d layers) = %q, want %q", tt.layers, s, tt.want)
		}
	}
}

func TestNames(t *testing.T) {
	s := newStore(t)
	var ds []ocispec.Descriptor
	for i := range 3 {
		d, err := Write(t.Context(), s, built(amd64, addLayer(t, s, "a", fmt.Sprint(i))), WriteOptions{})
		if err != nil {
			t.Fatal(err)
		}
		ds = append(ds, d)
	}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	ctx := t.Context()
	must(Tag(ctx, s, "", ds[0]))
	must(Tag(ctx, s, "", ds[0]))
	must(Tag(ctx, s, "app", ds[0])) // takes the place of the nameless entry
	must(Tag(ctx, s, "app:2", ds[1]))
	must(Tag(ctx, s, "app", ds[1])) // moves
	must(Tag(ctx, s, "", ds[2]))
	must(Pin(ctx, s, "pinned", ds[2]))
	list := func() string {
		all, err := List(s)
		must(err)
		var out []string
		for _, n := range all {
			out = append(out, fmt.Sprintf("%s=%d", n.Name, slices.IndexFunc(ds, func(d ocispec.Descriptor) bool { return d.Digest == n.Descriptor.Digest })))
		}
		return strings.Join(out, " ")
	}
	want := "docker.io/library/app:2=1 docker.io/library/app:latest=1 docker.io/library/pinned@" + ds[2].Digest.String() + "=2"
	if got := list(); got != want {
		t.Errorf("List = %s, want %s", got, want)
	}
	if d, err := Lookup(s, "app"); err != nil || d.Digest != ds[1].Digest || d.Annotations[ocispec.AnnotationRefName] != "latest" {
		t.Errorf("Lookup(app) = %v, %v", d, err)
	}
	if d, err := Lookup(s, "pinned@"+ds[2].Digest.String()); err != nil || d.Digest != ds[2].Digest {
		t.Errorf("Lookup by digest = %v, %v", d, err)
	}
	if _, err := Lookup(s, "app@"+ds[2].Digest.String()); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("Lookup by another's digest = %v", err)
	}
	if err := Tag(ctx, s, "app@"+ds[0].Digest.String(), ds[0]); err == nil {
		t.Error("Tag took a digest")
	}
	if d, err := Untag(ctx, s, "app:2"); err != nil || d.Digest != ds[1].Digest {
		t.Errorf("Untag = %v, %v", d, err)
	}
	if _, err := Untag(ctx, s, "app:2"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("Untag again = %v", err)
	}
	if gone, err := Remove(ctx, s, ds[1].Digest); err != nil || len(gone) != 1 {
		t.Errorf("Remove = %v, %v", gone, err)
	}
	if _, err := Remove(ctx, s, ds[1].Digest); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("Remove again = %v", err)
	}
}

func TestNamesAtOnce(t *testing.T) {
	s := newStore(t)
	d, err := Write(t.Context(), s, built(amd64), WriteOptions{})
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for i := range 16 {
		wg.Add(1)
		go func() {
			defer wg.Done()
			if err := Tag(t.Context(), s, fmt.Sprintf("app:%d", i), d); err != nil {
				t.Error(err)
			}
		}()
	}
	wg.Wait()
	if all, err := List(s); err != nil || len(all) != 16 {
		t.Errorf("%d names after 16 at once, %v", len(all), err)
	}
}

func TestDamagedRecords(t *testing.T) {
	s := newStore(t)
	ref := "docker.io/library/x:latest"
	if err := remember(t.Context(), s, ref, ocispec.Descriptor{Digest: digest.FromString("x")}); err != nil {
		t.Fatal(err)
	}
	if d, err := last(s, ref); err != nil || d.Digest != digest.FromString("x") {
		t.Errorf("last = %v, %v", d, err)
	}
	for _, text := range []string{"", "{", `{"reference":"other","descriptor":{}}`, `{"reference":"` + ref + `","descriptor":{"digest":"x"}}`} {
		if err := os.WriteFile(resolvedFile(s, ref), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		if d, err := last(s, ref); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("last of %q = %v, %v", text, d, err)
		}
	}
	b := digest.FromString("b")
	for i := range 6 {
		if err := AddOrigin(context.Background(), s, b, fmt.Sprintf("h.example/r%d:tag", i)); err != nil {
			t.Fatal(err)
		}
	}
	if got := Origins(s, b); !slices.Equal(got, []string{"h.example/r5", "h.example/r4", "h.example/r3", "h.example/r2"}) {
		t.Errorf("Origins = %q", got)
	}
	if err := os.WriteFile(originFile(s, b), []byte("../../etc\nh.example/ok\n\x00"), 0o644); err != nil {
		t.Fatal(err)
	}
	if got := Origins(s, b); !slices.Equal(got, []string{"h.example/ok"}) {
		t.Errorf("Origins of a damaged record = %q", got)
	}
	if _, err := os.Stat(filepath.Join(s.Dir(), "sources")); err != nil {
		t.Error(err)
	}
}

func FuzzDocument(f *testing.F) {
	f.Add([]byte(`{"schemaVersion":2,"config":{},"layers":[]}`))
	f.Add([]byte(`{"schemaVersion":2,"manifests":[{"platform":{"os":"linux"}}]}`))
	f.Add([]byte(`{"schemaVersion":1}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		var d document
		if json.Unmarshal(data, &d) != nil || d.check("x") != nil {
			return
		}
		if d.index() != (d.Config == nil) {
			t.Errorf("%s is both or neither", data)
		}
	})
}

// TestDamaged damages what an image is described by: one of two copies does, without both the image is damaged, which is
// not to say that there is none; the registry that its name says may have it.
func TestDamaged(t *testing.T) {
	srv := serve(t)
	for _, where := range []string{"127.0.0.1:1/local", srv.host + "/kept"} {
		s := newStore(t)
		c := registry.Open(registry.Options{})
		d := digest.Digest("")
		if strings.HasPrefix(where, srv.host) {
			d = srv.push(t, "kept:1", foreign(t, amd64, 1))
			if _, err := Pull(t.Context(), s, c, where+":1", amd64, PullAlways); err != nil {
				t.Fatal(err)
			}
		} else {
			m, err := Write(t.Context(), s, built(amd64, addLayer(t, s, "a", "x")), WriteOptions{})
			if err != nil {
				t.Fatal(err)
			}
			d = m.Digest
		}
		if err := Tag(t.Context(), s, where+":1", ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: d}); err != nil {
			t.Fatal(err)
		}
		root, err := Lookup(s, where+":1")
		if err != nil {
			t.Fatal(err)
		}
		g, err := Walk(t.Context(), s, root)
		if err != nil {
			t.Fatal(err)
		}
		for _, bad := range []digest.Digest{d, g.Images[0].Config.Digest} {
			spoil := func(dir string) {
				t.Helper()
				name := filepath.Join(s.Dir(), dir, bad.Encoded())
				if err := errors.Join(os.Remove(name), os.WriteFile(name, []byte("{}"), 0o644)); err != nil {
					t.Fatal(err)
				}
			}
			spoil("blobs/sha256")
			if img, err := Load(t.Context(), s, c, where+":1", amd64); err != nil || len(img.Layers) != 1 {
				t.Errorf("one copy of %s: Load = %v, %v", bad, img, err)
			}
			spoil("blobs/sha256")
			spoil("copies")
			for range 2 {
				_, err := Walk(t.Context(), s, root)
				if !errors.Is(err, ErrDamaged) || errors.Is(err, fs.ErrNotExist) || !strings.HasPrefix(err.Error(), where+":1: ") {
					t.Errorf("no copy of %s: Walk: %v", bad, err)
				}
			}
			img, err := Pull(t.Context(), s, c, where+":1", amd64, PullCurrent)
			if strings.HasPrefix(where, srv.host) {
				if err != nil || img.Digest != d {
					t.Errorf("no copy of %s: Pull = %v, %v", bad, img, err)
				}
				continue
			}
			if !errors.Is(err, ErrDamaged) {
				t.Errorf("no copy of %s: Pull = %v, %v", bad, img, err)
			}
			if _, err := Write(t.Context(), s, built(amd64, addLayer(t, s, "a", "x")), WriteOptions{}); err != nil {
				t.Fatal(err)
			}
			if err := Tag(t.Context(), s, where+":1", root); err != nil { // as the next build does
				t.Error(err)
			}
		}
	}
}
