package main

import (
	"encoding/pem"
	"fmt"
	"io"
	"log"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sync/errgroup"
)

// reaching is a directory with a Dockerfile and files about registries.
type reaching struct {
	*testing.T
	dir string
}

func newReaching(t *testing.T, files map[string]string) reaching {
	t.Helper()
	needGround(t)
	dir := t.TempDir()
	for name, text := range files {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return reaching{t, dir}
}

// build runs filo build on a fresh state directory with more arguments and environment.
func (r reaching) build(env []string, args ...string) (string, error) {
	r.Helper()
	state := filepath.Join(r.TempDir(), "state")
	defer sweepState(state)
	cmd := filo(state, append([]string{"build", "--progress", "plain", r.dir}, args...)...)
	cmd.Env = append(append(cmd.Env, "DOCKER_CONFIG="+r.dir), env...)
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// Registries are reached through the proxy that the environment names, unless NO_PROXY has them; its password is not shown.
func TestProxy(t *testing.T) {
	host := startRegistry(t)
	var mu sync.Mutex
	asked, signed := 0, ""
	proxy := httptest.NewServer(&httputil.ReverseProxy{Rewrite: func(r *httputil.ProxyRequest) {
		mu.Lock()
		defer mu.Unlock()
		asked++
		signed = r.In.Header.Get("Proxy-Authorization")
		r.SetURL(&url.URL{Scheme: "http", Host: host})
		r.Out.Host = r.In.Host
	}})
	t.Cleanup(proxy.Close)
	r := newReaching(t, map[string]string{
		"Dockerfile":      "FROM registry.invalid/library/toybox\nRUN true\n",
		"registries.conf": "[[registry]]\nlocation = \"registry.invalid\"\ninsecure = true\n",
	})
	at := strings.Replace(proxy.URL, "http://", "http://user:hunter2@", 1)
	config := "--registry-config=" + filepath.Join(r.dir, "registries.conf")
	out, err := r.build([]string{"HTTP_PROXY=" + at, "HTTPS_PROXY=http://127.0.0.1:1", "NO_PROXY="}, config, "--push", "-t", "registry.invalid/me/app:1")
	if err != nil {
		t.Errorf("through a proxy: %v\n%s", err, out)
	}
	if asked == 0 || !strings.HasPrefix(signed, "Basic ") {
		t.Errorf("the proxy was asked %d times, with %q", asked, signed)
	}
	asked = 0
	out, err = r.build([]string{"HTTP_PROXY=" + at, "HTTPS_PROXY=" + at, "NO_PROXY=.invalid"}, config)
	if err == nil || asked > 0 {
		t.Errorf("with NO_PROXY: %v, the proxy was asked %d times\n%s", err, asked, out)
	}
	down := "http://user:hunter2@127.0.0.1:1"
	out, err = r.build([]string{"HTTP_PROXY=" + down, "HTTPS_PROXY=" + down, "NO_PROXY="}, config)
	if err == nil || !strings.Contains(out, "registry.invalid/library/toybox:latest: unreachable: ") || strings.Contains(out, "hunter2") {
		t.Errorf("with a proxy that is down: %v\n%s", err, out)
	}
}

// A registry with a certificate of its own authority is trusted if a hosts.toml says so, and is somebody's mirror then.
func TestOwnAuthority(t *testing.T) {
	upstream := startRegistry(t)
	srv := httptest.NewTLSServer(httputil.NewSingleHostReverseProxy(&url.URL{Scheme: "http", Host: upstream}))
	srv.Config.ErrorLog = log.New(io.Discard, "", 0)
	t.Cleanup(srv.Close)
	host := strings.TrimPrefix(srv.URL, "https://")
	r := newReaching(t, map[string]string{
		"Dockerfile": "FROM docker.io/library/toybox\nRUN true\n",
		"ca.pem":     string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: srv.Certificate().Raw})),
	})
	if err := os.MkdirAll(filepath.Join(r.dir, "hosts", "docker.io"), 0o755); err != nil {
		t.Fatal(err)
	}
	config := "server = \"https://docker.io\"\n[host.\"" + srv.URL + "\"]\ncapabilities = [\"pull\", \"resolve\"]\n"
	for _, test := range []struct{ text, want string }{
		{config + "ca = \"" + filepath.Join(r.dir, "ca.pem") + "\"\n", ""},
		{config + "skip_verify = true\n", ""},
		{config, "certificate"},
	} {
		if err := os.WriteFile(filepath.Join(r.dir, "hosts", "docker.io", "hosts.toml"), []byte(test.text), 0o644); err != nil {
			t.Fatal(err)
		}
		// What the mirror does not give is not looked for on the internet.
		out, err := r.build([]string{"HTTPS_PROXY=http://127.0.0.1:1", "NO_PROXY="}, "--registry-config", filepath.Join(r.dir, "hosts"))
		if (err == nil) != (test.want == "") {
			t.Errorf("with\n%s%v, %s\n%s", test.text, err, host, out)
		}
	}
	// The same for a registry itself, by --registry-config and by what Docker has.
	if err := os.WriteFile(filepath.Join(r.dir, "Dockerfile"), []byte("FROM "+host+"/library/toybox\nRUN true\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	one := filepath.Join(r.dir, "one.toml")
	if err := os.WriteFile(one, []byte("server = \""+srv.URL+"\"\nca = \""+filepath.Join(r.dir, "ca.pem")+"\"\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if out, err := r.build(nil, "--push", "-t", host+"/me/app:1", "--registry-config", one); err != nil {
		t.Errorf("push to a registry with its own authority: %v\n%s", err, out)
	}
	if out, err := r.build(nil); err == nil || !strings.Contains(out, host+"/library/toybox:latest: no secure connection: ") {
		t.Errorf("without: %v\n%s", err, out)
	}
}

// However many builds and stages want a base, its reference is resolved once a build and its layer is fetched once.
func TestFetchedOnce(t *testing.T) {
	reg := countRequests(t, startRegistry(t))
	r := newReaching(t, map[string]string{"Dockerfile": fmt.Sprintf(
		"FROM %[1]s/library/toybox AS a\nRUN echo a >/a\nFROM %[1]s/library/toybox AS b\nRUN echo b >/b\nFROM %[1]s/library/toybox\nCOPY --from=a /a /\nCOPY --from=b /b /\nCOPY --from=%[1]s/library/toybox /bin/toybox /x\n", reg.host)})
	state := filepath.Join(t.TempDir(), "state")
	defer sweepState(state)
	const builds = 4
	var g errgroup.Group
	for range builds {
		g.Go(func() error {
			cmd := filo(state, "build", "--progress", "plain", r.dir)
			cmd.Env = append(cmd.Env, "DOCKER_CONFIG="+r.dir)
			if out, err := cmd.CombinedOutput(); err != nil {
				return fmt.Errorf("%w\n%s", err, out)
			}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		t.Fatal(err)
	}
	layers, err := toybox(t).Layers()
	if err != nil {
		t.Fatal(err)
	}
	layer, err := layers[0].Digest()
	if err != nil {
		t.Fatal(err)
	}
	log := strings.Join(reg.log, "\n")
	if n := strings.Count(log, "GET /v2/library/toybox/blobs/"+layer.String()); n != 1 {
		t.Errorf("the layer was fetched %d times, want once", n)
	}
	if n := strings.Count(log, "/manifests/latest"); n > builds {
		t.Errorf("%d builds asked %d times what the reference means:\n%s", builds, n, log)
	}
}
