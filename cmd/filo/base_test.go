package main

import (
	"archive/tar"
	"bytes"
	"io"
	"log"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// apart stands before a registry in which all repositories share blobs, and makes each have its own: a blob is in a
// repository once it was pushed or mounted there.
type apart struct {
	host string
	next http.Handler

	mu      sync.Mutex
	holds   map[string]bool // REPOSITORY@DIGEST
	mounted []string
}

// startApart serves such a registry on loopback.
func startApart(t *testing.T) *apart {
	t.Helper()
	a := &apart{holds: map[string]bool{}, next: registry.New(
		registry.Logger(log.New(io.Discard, "", 0)), registry.WithBlobHandler(registry.NewDiskBlobHandler(t.TempDir())))}
	s := httptest.NewServer(a)
	t.Cleanup(s.Close)
	a.host = strings.TrimPrefix(s.URL, "http://")
	return a
}

var blobPath = regexp.MustCompile(`^/v2/(.+)/blobs/(uploads/.*|sha256:[0-9a-f]{64})$`)

func (a *apart) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	m := blobPath.FindStringSubmatch(r.URL.Path)
	if m == nil {
		a.next.ServeHTTP(w, r)
		return
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	q := r.URL.Query()
	switch {
	case r.Method == http.MethodPost && q.Get("mount") != "" && a.holds[q.Get("from")+"@"+q.Get("mount")]:
		a.holds[m[1]+"@"+q.Get("mount")] = true
		a.mounted = append(a.mounted, q.Get("mount"))
		w.WriteHeader(http.StatusCreated)
	case strings.HasPrefix(m[2], "sha256:") && !a.holds[m[1]+"@"+m[2]]:
		w.WriteHeader(http.StatusNotFound)
	default:
		if r.Method == http.MethodPut {
			a.holds[m[1]+"@"+q.Get("digest")] = true
		}
		r.URL.RawQuery = "digest=" + q.Get("digest") // a mount that was refused begins an upload
		a.next.ServeHTTP(w, r)
	}
}

// A base that no step needs on disk stays where it is: its layer is not fetched, to be pushed to its own registry it is
// mounted, and to another one it passes through without being stored.
func TestBaseStays(t *testing.T) {
	needGround(t)
	home, other := startApart(t), startApart(t)
	a, b := countRequests(t, home.host), countRequests(t, other.host)
	layer := bigLayer(t)
	size, _ := layer.Size()
	digest, _ := layer.Digest()
	diffID, _ := layer.DiffID()
	img, err := mutate.AppendLayers(toybox(t), layer)
	if err != nil {
		t.Fatal(err)
	}
	ref, err := name.ParseReference(a.host+"/base/big:1", name.Insecure)
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.Write(ref, img); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		name, steps string
		to          *counted
		moved       int64 // bytes of blobs from the base's registry
	}{
		{"COPY --link to the same registry", "COPY --link f /f", a, 0},
		{"nothing but config to the same registry", "ENV A=b", a, 0},
		{"COPY --link to another registry", "COPY --link f /f", b, size},
		{"stage of which nothing is used", "FROM scratch\nCOPY f /f", a, 0},
	} {
		t.Run(test.name, func(t *testing.T) {
			dir, state := t.TempDir(), filepath.Join(t.TempDir(), "state")
			defer sweepState(state)
			for name, text := range map[string]string{"Dockerfile": "FROM " + a.host + "/base/big:1\n" + test.steps + "\n", "f": "f"} {
				if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			a.reset()
			home.mounted, other.mounted = nil, nil
			target := test.to.host + "/app/" + strings.ToLower(strings.NewReplacer(" ", "-", "--", "").Replace(test.name)) + ":1"
			cmd := filo(state, "build", "--progress", "plain", "--push", "-t", target, dir)
			cmd.Env = append(cmd.Env, "DOCKER_CONFIG="+dir)
			out, err := cmd.CombinedOutput()
			if err != nil {
				t.Fatalf("%v\n%s", err, out)
			}
			log := strings.Join(a.log, "\n")
			if fetches := strings.Count(log, "GET /v2/base/big/blobs/"+digest.String()); int64(fetches)*size != test.moved {
				t.Errorf("the layer was fetched %d times:\n%s", fetches, log)
			}
			checkPushed(t, target, layer, strings.HasPrefix(test.steps, "FROM"))
			if test.to == a && !strings.HasPrefix(test.steps, "FROM") && !strings.Contains(strings.Join(home.mounted, " "), digest.String()) {
				t.Errorf("the layer was not mounted, only %v", home.mounted)
			}
			for _, kept := range []string{"blobs/sha256/" + digest.Hex, "layers/" + diffID.Hex + "/tree*", "layers/" + diffID.Hex + "/index"} {
				if found, err := filepath.Glob(filepath.Join(state, kept)); len(found) > 0 || err != nil {
					t.Errorf("the state directory holds %s, %v", found, err)
				}
			}
		})
	}
}

// checkPushed wants the image at ref to be whole and, unless it is without, to have the layer.
func checkPushed(t *testing.T, target string, layer v1.Layer, without bool) {
	t.Helper()
	ref, err := name.ParseReference(target, name.Insecure)
	if err != nil {
		t.Fatal(err)
	}
	img, err := remote.Image(ref)
	if err != nil {
		t.Fatal(err)
	}
	d, _ := layer.Digest()
	l, err := img.LayerByDigest(d)
	if without {
		return
	}
	if err != nil {
		t.Fatal(err)
	}
	at, err := remote.Layer(ref.Context().Digest(d.String()))
	if err != nil {
		t.Fatal(err)
	}
	got, err := at.Size()
	want, _ := l.Size()
	if err != nil || got != want {
		t.Errorf("the pushed layer has %d bytes, %v, want %d", got, err, want)
	}
}

// bigLayer is one of 200 MB.
func bigLayer(t *testing.T) v1.Layer {
	t.Helper()
	const size = 200 << 20
	var b bytes.Buffer
	b.Grow(size + 4096)
	if err := tar.NewWriter(&b).WriteHeader(&tar.Header{Name: "big", Mode: 0o644, Size: size}); err != nil {
		t.Fatal(err)
	}
	content := make([]byte, 1<<20)
	random := rand.NewChaCha8([32]byte{1})
	for range size / len(content) {
		random.Read(content)
		b.Write(content)
	}
	b.Write(make([]byte, 1024))
	return static.NewLayer(b.Bytes(), types.OCIUncompressedLayer)
}
