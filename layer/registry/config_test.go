package registry

import (
	"encoding/pem"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func configFile(t *testing.T, name, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// places lists where a reference is asked for, the registry itself last.
func places(t *testing.T, c *Client, ref string) string {
	t.Helper()
	n, err := c.parse(ref)
	if err != nil {
		return err.Error()
	}
	var all []string
	for _, e := range c.endpoints(n) {
		all = append(all, e.host+"/"+e.repo)
	}
	return strings.Join(all, " ")
}

func TestReadConfig(t *testing.T) {
	registries := `
unqualified-search-registries = ["docker.io"]
[[registry]]
location = "docker.io"
[[registry.mirror]]
location = "m1.example:5000/hub"
insecure = true
[[registry.mirror]]
location = "m2.example"
pull-from-mirror = "digest-only"
[[registry]]
prefix = "docker.io/team"
location = "inner.example/docker"
[[registry]]
prefix = "bad.example"
location = "bad.example"
blocked = true
`
	buildkit := `
debug = true
[registry."docker.io"]
mirrors = ["m1.example:5000/hub", "http://m2.example"]
[registry."m1.example:5000"]
http = true
`
	hosts := `
server = "https://registry-1.docker.io"
[host."http://m1.example:5000/v2/hub"]
capabilities = ["pull", "resolve"]
[host."https://m2.example"]
capabilities = ["pull"]
skip_verify = true
[host."https://m3.example"]
capabilities = ["push"]
`
	digest := "@sha256:" + strings.Repeat("a", 64)
	for _, test := range []struct{ form, text, ref, want string }{
		{"registries.conf", registries, "busybox", "m1.example:5000/hub/library/busybox docker.io/library/busybox"},
		{"registries.conf", registries, "busybox" + digest, "m1.example:5000/hub/library/busybox m2.example/library/busybox docker.io/library/busybox"},
		{"registries.conf", registries, "team/app", "inner.example/docker/app"},
		{"registries.conf", registries, "other.example/x", "other.example/x"},
		{"registries.conf", registries, "bad.example/x", "bad.example/x:latest: denied: the registry configuration blocks bad.example"},
		{"buildkitd.toml", buildkit, "busybox", "m1.example:5000/hub/library/busybox m2.example/library/busybox docker.io/library/busybox"},
		{"hosts.toml", hosts, "busybox", "m1.example:5000/hub/library/busybox docker.io/library/busybox"},
		{"hosts.toml", hosts, "busybox" + digest, "m1.example:5000/hub/library/busybox m2.example/library/busybox docker.io/library/busybox"},
		{"docker.io/hosts.toml", hosts, "busybox", "m1.example:5000/hub/library/busybox docker.io/library/busybox"},
		{"docker.io/hosts.toml", hosts, "m1.example:5000/x", "m1.example:5000/x"},
		{"_default/hosts.toml", `[host."https://all.example"]`, "some.example/x", "all.example/x some.example/x"},
	} {
		t.Run(test.form+" "+test.ref, func(t *testing.T) {
			path := configFile(t, test.form, test.text)
			if strings.Contains(test.form, "/") {
				path = filepath.Dir(filepath.Dir(path))
			}
			config, err := ReadConfig(path)
			if err != nil {
				t.Fatal(err)
			}
			c := Open(Options{Config: config})
			if got := places(t, c, test.ref); got != test.want {
				t.Errorf("%s is asked for at %s, want %s", test.ref, got, test.want)
			}
			if test.form != "_default/hosts.toml" && !c.retry.clear("m1.example:5000") {
				t.Error("m1.example:5000 may not be spoken to in the clear")
			}
			if c.retry.clear("m2.example") && test.form != "buildkitd.toml" {
				t.Error("m2.example may be spoken to in the clear")
			}
		})
	}
}

func TestReadConfigRefuses(t *testing.T) {
	for text, want := range map[string]string{
		"":                                 "neither registries.conf nor hosts.toml",
		"x = [":                            "toml",
		"[[registry]]\nlocation = \"a b\"": "a b",
		"[[registry]]\nprefix = \"*.example.com\"\nlocation=\"x.example\"":   "want HOST",
		"[[registry]]\nlocation=\"a.example\"\n[[registry.mirror]]":          "mirror",
		"[host.\"https://a.example\"]":                                       "server is needed",
		"server=\"https://a.example\"\n[host.\"ftp://b.example\"]":           "want a URL",
		"server=\"https://a.example\"\n[host.\"https://b.example\"]\nca = 5": "ca: want a path",
		"server=\"https://a.example\"\n[host.\"b.example\".header]\nx=\"y\"": "header is not supported",
	} {
		_, err := ReadConfig(configFile(t, "c.toml", text))
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("ReadConfig(%q) = %v, want an error with %q", text, err, want)
		}
	}
	if _, err := ReadConfig(filepath.Join(t.TempDir(), "none")); err == nil {
		t.Error("a configuration that is not there is none")
	}
}

// A mirror with a certificate of its own authority, by every form.
func TestConfigTrusts(t *testing.T) {
	plain := serve(t)
	d, _ := push(t, open(Options{}), plain.host+"/library/busybox:latest", []byte("layer"))
	srv := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		req, _ := http.NewRequest(r.Method, "http://"+plain.host+r.URL.RequestURI(), nil)
		req.Header = r.Header
		resp, err := http.DefaultTransport.RoundTrip(req)
		if err != nil {
			w.WriteHeader(http.StatusBadGateway)
			return
		}
		defer resp.Body.Close()
		for k, v := range resp.Header {
			w.Header()[k] = v
		}
		w.WriteHeader(resp.StatusCode)
		io.Copy(w, resp.Body)
	}))
	t.Cleanup(srv.Close)
	host := strings.TrimPrefix(srv.URL, "https://")
	ca := configFile(t, "ca.crt", string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: srv.Certificate().Raw})))
	for name, text := range map[string]string{
		"hosts.toml ca":          fmt.Sprintf("server = \"https://origin.example\"\n[host.\"https://%s\"]\nca = %q\n", host, ca),
		"hosts.toml skip_verify": fmt.Sprintf("server = \"https://origin.example\"\n[host.\"https://%s\"]\nskip_verify = true\n", host),
		"buildkitd.toml ca":      fmt.Sprintf("[registry.\"origin.example\"]\nmirrors=[%q]\n[registry.%q]\nca=[%q]\n", host, host, ca),
		"registries.conf":        fmt.Sprintf("[[registry]]\nlocation=\"origin.example\"\n[[registry.mirror]]\nlocation=%q\ninsecure=true\n", host),
	} {
		config, err := ReadConfig(configFile(t, "c.toml", text))
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		got, err := open(Options{Config: config}).Resolve(t.Context(), "origin.example/library/busybox")
		if err != nil || got.Digest != d.Digest {
			t.Errorf("%s: Resolve = %v, %v, want %s", name, got.Digest, err, d.Digest)
		}
	}
	_, err := open(Options{}).Resolve(t.Context(), host+"/library/busybox")
	if !Is(err, TLS) {
		t.Errorf("without a configuration: %v, want an error about the certificate", err)
	}
}
