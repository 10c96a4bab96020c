package main

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
)

// counted stands before a registry and notes what it is asked.
type counted struct {
	host string

	mu    sync.Mutex
	log   []string
	moved int64 // bytes of blobs that were fetched, configs of images and caches aside
	sent  int   // blobs
	bytes int64 // of them
}

func countRequests(t *testing.T, upstream string) *counted {
	t.Helper()
	c := &counted{}
	proxy := httputil.NewSingleHostReverseProxy(&url.URL{Scheme: "http", Host: upstream})
	proxy.ModifyResponse = func(r *http.Response) error {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.log = append(c.log, r.Request.Method+" "+r.Request.URL.Path)
		switch {
		case r.Request.Method == http.MethodGet && strings.Contains(r.Request.URL.Path, "/blobs/") && r.ContentLength > 16<<10:
			c.moved += r.ContentLength
		case r.Request.Method == http.MethodPut && strings.Contains(r.Request.URL.Path, "/uploads/"):
			c.sent++
			c.bytes += r.Request.ContentLength
		}
		return nil
	}
	srv := httptest.NewServer(proxy)
	t.Cleanup(srv.Close)
	c.host = strings.TrimPrefix(srv.URL, "http://")
	return c
}

func (c *counted) reset() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.log, c.moved, c.sent, c.bytes = nil, 0, 0, 0
}

// A runner with an empty disk and everything in the shared cache: 30 steps in three stages, built and pushed again.
func TestColdRunner(t *testing.T) {
	needGround(t)
	reg := countRequests(t, startRegistry(t))
	dir := t.TempDir()
	var d strings.Builder
	for _, stage := range []string{"a", "b"} {
		fmt.Fprintf(&d, "FROM %s/library/toybox AS %s\n", reg.host, stage)
		for i := range 10 {
			fmt.Fprintf(&d, "RUN echo %s%d >/%s%d\n", stage, i, stage, i)
		}
	}
	fmt.Fprintf(&d, "FROM %s/library/toybox\nCOPY f /f\nCOPY --from=a /a9 /\nCOPY --from=b /b9 /\nRUN --mount=from=a,target=/m cat /m/a1 >/m1\n", reg.host)
	for i := range 6 {
		fmt.Fprintf(&d, "RUN echo c%d; cat /proc/sys/kernel/random/uuid >/c%d\n", i, i) // never the same layer twice
	}
	for name, text := range map[string]string{"Dockerfile": d.String(), "f": "f"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	build := func(tag string, args ...string) (digest, log string) {
		t.Helper()
		state, meta := filepath.Join(t.TempDir(), "state"), filepath.Join(t.TempDir(), "meta")
		defer sweepState(state)
		args = append([]string{"build", "--progress", "plain", "--push", "-t", reg.host + "/cold/app:" + tag, "--metadata-file", meta}, append(args, dir)...)
		cmd := filo(state, args...)
		cmd.Env = append(cmd.Env, "DOCKER_CONFIG="+dir)
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		b, err := os.ReadFile(meta)
		if err != nil {
			t.Fatal(err)
		}
		var m map[string]any
		if err := json.Unmarshal(b, &m); err != nil {
			t.Fatal(err)
		}
		return fmt.Sprint(m["containerimage.digest"]), string(out)
	}
	cache := reg.host + "/cold/app:cache"
	first, _ := build("1", "--cache-to", "type=registry,mode=max,ref="+cache)
	for _, tag := range []string{"1", "2"} {
		reg.reset()
		again, log := build(tag, "--cache-from", cache)
		if again != first {
			t.Errorf("the cold runner made %s, the first %s\n%s", again, first, log)
		}
		t.Logf("tag %s: %d requests", tag, len(reg.log))
		if len(reg.log) > 15 || reg.moved > 0 || reg.sent > 0 {
			t.Errorf("tag %s: %d requests, %d bytes of layers fetched, %d blobs sent; want at most 15, 0, 0:\n%s", tag, len(reg.log), reg.moved, reg.sent, strings.Join(reg.log, "\n"))
		}
	}

	// One step changed: only it and what stands on it is done, only what is new is sent.
	text := strings.Replace(d.String(), "RUN echo c3;", "RUN echo changed;", 1)
	if err := os.WriteFile(filepath.Join(dir, "Dockerfile"), []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	reg.reset()
	_, log := build("3", "--cache-from", cache, "--cache-to", "type=registry,mode=max,ref="+cache)
	if n := strings.Count(log, " CACHED\n"); n != 30-3+3 { // and three bases
		t.Errorf("%d vertices were cached, want 30\n%s", n, log)
	}
	log = strings.Join(reg.log, "\n")
	sent, bytes := reg.sent, reg.bytes
	was, now, index := pulled(t, reg.host+"/cold/app:2"), pulled(t, reg.host+"/cold/app:3"), pulled(t, cache)
	want := now.Config.Size + index.Config.Size
	for i, l := range now.Layers {
		if l.Digest != was.Layers[i].Digest {
			want += l.Size
		}
	}
	if sent != 3+2 || bytes != want {
		t.Errorf("%d blobs with %d bytes were sent, want three layers, the config and the index of the cache with %d:\n%s", sent, bytes, want, log)
	}
}

// pulled returns the manifest at a reference.
func pulled(t *testing.T, at string) *v1.Manifest {
	t.Helper()
	ref, err := name.ParseReference(at, name.Insecure)
	if err != nil {
		t.Fatal(err)
	}
	img, err := remote.Image(ref)
	if err != nil {
		t.Fatal(err)
	}
	m, err := img.Manifest()
	if err != nil {
		t.Fatal(err)
	}
	return m
}
