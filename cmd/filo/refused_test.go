package main

import (
	"encoding/base64"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
)

// hostile is a registry with the images a (toybox) and arm (toybox said to be for arm64), of which single things are
// refused or falsified.
type hostile struct {
	host string
	next http.Handler
	fail func(w http.ResponseWriter, r *http.Request) bool // answers instead
}

func (h *hostile) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if h.fail == nil || !h.fail(w, r) {
		h.next.ServeHTTP(w, r)
	}
}

func startHostile(t *testing.T) *hostile {
	t.Helper()
	h := &hostile{next: registry.New(registry.Logger(log.New(io.Discard, "", 0)))}
	s := httptest.NewServer(h)
	t.Cleanup(s.Close)
	h.host = strings.TrimPrefix(s.URL, "http://")
	img := toybox(t)
	put := func(repo string, write func(name.Reference) error) {
		ref, err := name.ParseReference(h.host+"/"+repo+":1", name.Insecure)
		if err == nil {
			err = write(ref)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	put("a", func(ref name.Reference) error { return remote.Write(ref, img) })
	put("arm", func(ref name.Reference) error {
		return remote.WriteIndex(ref, mutate.AppendManifests(empty.Index, mutate.IndexAddendum{
			Add: img, Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: "arm64"}},
		}))
	})
	return h
}

// refuse answers requests of a method for a path with a status.
func refuse(method, path string, status int) func(http.ResponseWriter, *http.Request) bool {
	return func(w http.ResponseWriter, r *http.Request) bool {
		if (method != "" && r.Method != method) || !strings.Contains(r.URL.Path, path) {
			return false
		}
		if status == http.StatusUnauthorized {
			w.Header().Set("WWW-Authenticate", `Basic realm="x"`)
		}
		w.Header().Set("Retry-After", "0")
		w.WriteHeader(status)
		return true
	}
}

// falsify sends other bytes of the same length for a path.
func falsify(h *hostile, path string) func(http.ResponseWriter, *http.Request) bool {
	return func(w http.ResponseWriter, r *http.Request) bool {
		if r.Method != http.MethodGet || !strings.Contains(r.URL.Path, path) {
			return false
		}
		rec := httptest.NewRecorder()
		h.next.ServeHTTP(rec, r)
		data := rec.Body.Bytes()
		if len(data) > 10 {
			data[len(data)/2] ^= 1
		}
		for k, v := range rec.Header() {
			w.Header()[k] = v
		}
		w.WriteHeader(rec.Code)
		w.Write(data)
		return true
	}
}

// What a registry refuses is one clear error, with the reference and, where it is a step's, with that.
func TestRefused(t *testing.T) {
	needGround(t)
	h := startHostile(t)
	secure := httptest.NewTLSServer(h)
	secure.Config.ErrorLog = log.New(io.Discard, "", 0)
	t.Cleanup(secure.Close)
	layers, err := toybox(t).Layers()
	if err != nil {
		t.Fatal(err)
	}
	layer, err := layers[0].Digest()
	if err != nil {
		t.Fatal(err)
	}
	ref, err := name.ParseReference(h.host+"/a:1", name.Insecure)
	if err != nil {
		t.Fatal(err)
	}
	at, err := remote.Head(ref)
	if err != nil {
		t.Fatal(err)
	}
	everything := func(http.ResponseWriter, *http.Request) bool { return false }
	for _, test := range []struct {
		name, file string
		fail       func(http.ResponseWriter, *http.Request) bool
		push       string // a reference
		line       string // of the excerpt
		want       string // the error, a regular expression; HOST is the registry's
	}{
		{"wrong password", "FROM HOST/a:1\nRUN true", refuse("", "/v2/", 401), "", "FROM HOST/a:1", `HOST/a:1: unauthorized`},
		{"denied", "FROM HOST/a:1\nRUN true", refuse("", "/manifests/", 403), "", "FROM HOST/a:1", `HOST/a:1: denied`},
		{"unknown repository", "FROM HOST/nosuch:1", everything, "", "FROM HOST/nosuch:1", `HOST/nosuch:1: not found`},
		{"unknown repository of a step", "FROM HOST/a:1\nCOPY --from=HOST/nosuch:1 /x /y", everything, "", "COPY --from=HOST/nosuch:1 /x /y", `HOST/nosuch:1: not found`},
		{"unreachable host", "FROM 127.0.0.1:1/a:1", everything, "", "FROM 127.0.0.1:1/a:1", `127.0.0.1:1/a:1: unreachable: .*refused`},
		{"bad certificate", "FROM SECURE/a:1", everything, "", "FROM SECURE/a:1", `SECURE/a:1: no secure connection: .*certificate`},
		{"foreign platform", "FROM HOST/arm:1\nRUN true", everything, "", "FROM HOST/arm:1", `HOST/arm:1: .*platform.*linux/arm64`},
		{"manifest with another digest", "FROM HOST/a:1@" + at.Digest.String(), falsify(h, "/manifests/"), "", "FROM HOST/a:1@" + at.Digest.String(), `HOST/a:1@` + at.Digest.String() + `: .*digest`},
		{"layer with another digest", "FROM HOST/a:1\nRUN true", falsify(h, layer.String()), "", "RUN true", `HOST/a.*` + layer.String() + `.*digest`},
		{"layer that is gone", "FROM HOST/a:1\nRUN true", refuse("GET", layer.String(), 404), "", "RUN true", `HOST/a@` + layer.String() + `: not found`},
		{"registry that fails", "FROM HOST/a:1", refuse("", "/manifests/", 500), "", "FROM HOST/a:1", `HOST/a:1: unreachable: 500`},
		{"too many requests", "FROM HOST/a:1", refuse("", "/manifests/", 429), "", "FROM HOST/a:1", `HOST/a:1: too many requests`},
		{"push with a wrong password", "FROM scratch\nENV A=b", refuse("", "/v2/", 401), "HOST/to:1", "", `HOST/to.*: unauthorized`},
		{"push denied", "FROM scratch\nENV A=b", refuse("POST", "/uploads/", 403), "HOST/to:1", "", `HOST/to.*: denied`},
		{"push of the manifest denied", "FROM scratch\nENV A=b", refuse("PUT", "/manifests/", 403), "HOST/to:1", "", `HOST/to.*: denied`},
		{"push to nowhere", "FROM scratch\nENV A=b", everything, "127.0.0.1:1/to:1", "", `127.0.0.1:1/to.*: unreachable: .*refused`},
	} {
		t.Run(test.name, func(t *testing.T) {
			h.fail = test.fail
			fill := strings.NewReplacer("HOST", h.host, "SECURE", strings.TrimPrefix(secure.URL, "https://"))
			dir, state := t.TempDir(), filepath.Join(t.TempDir(), "state")
			defer sweepState(state)
			auth := base64.StdEncoding.EncodeToString([]byte("user:hunter2"))
			for name, text := range map[string]string{
				"Dockerfile":  fill.Replace(test.file) + "\n",
				"config.json": fmt.Sprintf(`{"auths":{%q:{"auth":%q}}}`, h.host, auth),
			} {
				if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			args := []string{"build", "--progress", "plain", dir}
			if test.push != "" {
				args = append(args, "--push", "-t", fill.Replace(test.push))
			}
			cmd := filo(state, args...)
			cmd.Env = append(cmd.Env, "DOCKER_CONFIG="+dir)
			b, err := cmd.CombinedOutput()
			out := string(b)
			if cmd.ProcessState.ExitCode() != 1 {
				t.Fatalf("%v, want exit status 1\n%s", err, out)
			}
			if !regexp.MustCompile(`\nERROR: .*` + fill.Replace(test.want)).MatchString(out) {
				t.Errorf("no error %s:\n%s", fill.Replace(test.want), out)
			}
			if test.line != "" && !strings.Contains(out, ">>> "+fill.Replace(test.line)+"\n") {
				t.Errorf("no excerpt with %q:\n%s", fill.Replace(test.line), out)
			}
			if n := strings.Count(out, "\nERROR: "); n != 1 {
				t.Errorf("%d errors are shown:\n%s", n, out)
			}
			if strings.Contains(out, "hunter2") || strings.Contains(out, auth) {
				t.Errorf("the password is shown:\n%s", out)
			}
		})
	}
}
