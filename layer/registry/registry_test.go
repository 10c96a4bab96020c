package registry

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	ggcr "github.com/google/go-containerregistry/pkg/registry"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// server is a registry on loopback whose answers can be spoilt, and which notes what it is asked.
type server struct {
	host  string
	spoil func(w http.ResponseWriter, r *http.Request) bool // true: answered

	mu  sync.Mutex
	log []string
}

func serve(t *testing.T) *server {
	t.Helper()
	t.Setenv("HOME", t.TempDir())
	t.Setenv("DOCKER_CONFIG", "")
	t.Setenv("XDG_RUNTIME_DIR", "")
	s := &server{}
	inner := ggcr.New(ggcr.Logger(log.New(io.Discard, "", 0)))
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s.mu.Lock()
		s.log = append(s.log, r.Method+" "+r.URL.RequestURI()+" "+r.Header.Get("Range"))
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

// set changes how answers are spoilt and forgets what was asked.
func (s *server) set(f func(w http.ResponseWriter, r *http.Request) bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.spoil, s.log = f, nil
}

// asked counts the requests that contain all of parts.
func (s *server) asked(parts ...string) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := 0
	for _, line := range s.log {
		if !slices.ContainsFunc(parts, func(p string) bool { return !strings.Contains(line, p) }) {
			n++
		}
	}
	return n
}

func open(o Options) *Client {
	c := Open(o)
	c.retry.base = time.Millisecond
	return c
}

func blobOf(data []byte) ocispec.Descriptor {
	return ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayer, Digest: digest.FromBytes(data), Size: int64(len(data))}
}

func opener(data []byte) func(context.Context) (io.ReadCloser, error) {
	return func(context.Context) (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(data)), nil }
}

// push puts an image of one layer at ref and returns its manifest.
func push(t *testing.T, c *Client, ref string, layer []byte) (ocispec.Descriptor, []byte) {
	t.Helper()
	config := []byte("{}")
	for _, b := range [][]byte{layer, config} {
		if err := c.PushBlob(t.Context(), ref, blobOf(b), nil, opener(b)); err != nil {
			t.Fatalf("PushBlob(%s) = %v", ref, err)
		}
	}
	m := []byte(fmt.Sprintf(`{"schemaVersion":2,"mediaType":%q,"config":{"mediaType":%q,"digest":%q,"size":2},"layers":[{"mediaType":%q,"digest":%q,"size":%d}]}`,
		ocispec.MediaTypeImageManifest, ocispec.MediaTypeImageConfig, digest.FromBytes(config), ocispec.MediaTypeImageLayer, digest.FromBytes(layer), len(layer)))
	d := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: digest.FromBytes(m), Size: int64(len(m))}
	if err := c.PushManifest(t.Context(), ref, d, m); err != nil {
		t.Fatalf("PushManifest(%s) = %v", ref, err)
	}
	return d, m
}

func read(t *testing.T, c *Client, ref string, d ocispec.Descriptor) ([]byte, error) {
	t.Helper()
	r, err := c.Blob(t.Context(), ref, d)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	return io.ReadAll(r)
}

func TestPushAndPull(t *testing.T) {
	s := serve(t)
	layer := bytes.Repeat([]byte("layer"), 1000)
	ref := s.host + "/a/b:1"
	d, m := push(t, open(Options{}), ref, layer)

	c := open(Options{})
	s.set(nil)
	for range 3 {
		got, err := c.Resolve(t.Context(), ref)
		if err != nil || got.Digest != d.Digest || got.Size != d.Size || got.MediaType != d.MediaType {
			t.Fatalf("Resolve = %v, %v, want %v", got, err, d)
		}
	}
	if n := s.asked("/manifests/1"); n != 1 {
		t.Errorf("resolving three times asked %d times: %q", n, s.log)
	}
	got, data, err := c.Manifest(t.Context(), ref, d.Digest)
	if err != nil || !bytes.Equal(data, m) || got.MediaType != d.MediaType {
		t.Errorf("Manifest = %v, %q, %v", got, data, err)
	}
	if b, err := read(t, c, ref, blobOf(layer)); err != nil || !bytes.Equal(b, layer) {
		t.Errorf("Blob = %d bytes, %v", len(b), err)
	}
	if ok, err := c.HasBlob(t.Context(), ref, blobOf(layer).Digest); !ok || err != nil {
		t.Errorf("HasBlob = %v, %v", ok, err)
	}
	if ok, err := c.HasBlob(t.Context(), ref, blobOf([]byte("x")).Digest); ok || err != nil {
		t.Errorf("HasBlob of nothing = %v, %v", ok, err)
	}
}

func TestPushSendsNothingTwice(t *testing.T) {
	s := serve(t)
	layer := []byte("layer")
	push(t, open(Options{}), s.host+"/a:1", layer)
	s.set(nil)
	c := open(Options{})
	push(t, c, s.host+"/a:1", layer)
	if n := s.asked("POST ") + s.asked("PUT ") + s.asked("PATCH "); n != 0 {
		t.Errorf("pushing again sent %d requests: %q", n, s.log)
	}
	s.set(nil)
	push(t, c, s.host+"/a:2", layer)
	if n := s.asked("POST ") + s.asked("blobs"); n != 0 || s.asked("PUT /v2/a/manifests/2") != 1 {
		t.Errorf("second tag: %q", s.log)
	}
}

// TestMount plays a registry that mounts, which the one in process does not.
func TestMount(t *testing.T) {
	s := serve(t)
	layer := []byte("layer")
	c := open(Options{Mirrors: map[string][]string{"docker.io": {s.host + "/cache"}}})
	push(t, c, s.host+"/a:1", layer)
	var from []string
	s.set(func(w http.ResponseWriter, r *http.Request) bool {
		if r.Method == http.MethodHead { // the registry in process has one set of blobs for all repositories
			w.WriteHeader(http.StatusNotFound)
			return true
		}
		if r.Method != http.MethodPost || !r.URL.Query().Has("mount") {
			return false
		}
		from = append(from, r.URL.Query().Get("from"))
		if len(from) == 1 {
			return false // ignored: 202, an upload begins
		}
		w.WriteHeader(http.StatusCreated)
		return true
	})
	never := func(context.Context) (io.ReadCloser, error) { t.Error("opened"); return nil, errors.New("opened") }
	err := c.PushBlob(t.Context(), s.host+"/b:1", blobOf(layer), []string{"elsewhere.example/x", "docker.io/library/busybox"}, never)
	if err != nil || !slices.Equal(from, []string{"a", "cache/library/busybox"}) {
		t.Errorf("PushBlob = %v, mounted from %q", err, from)
	}
}

func TestFaults(t *testing.T) {
	layer := bytes.Repeat([]byte("0123456789"), 20_000)
	once := func(method, part string, answer func(w http.ResponseWriter)) func(w http.ResponseWriter, r *http.Request) bool {
		var mu sync.Mutex
		done := false
		return func(w http.ResponseWriter, r *http.Request) bool {
			mu.Lock()
			defer mu.Unlock()
			if done || r.Method != method || !strings.Contains(r.URL.Path, part) {
				return false
			}
			done = true
			_, _ = io.Copy(io.Discard, r.Body)
			answer(w)
			return true
		}
	}
	status := func(code int) func(w http.ResponseWriter) {
		return func(w http.ResponseWriter) { w.Header().Set("Retry-After", "0"); w.WriteHeader(code) }
	}
	cut := func(w http.ResponseWriter) {
		conn, _, err := w.(http.Hijacker).Hijack()
		if err == nil {
			conn.Close()
		}
	}
	for _, tt := range []struct {
		name         string
		method, part string
		answer       func(w http.ResponseWriter)
	}{
		{"503 at the ping", "GET", "/v2/", status(503)},
		{"500 at HEAD", "HEAD", "/manifests/", status(500)},
		{"429 at HEAD", "HEAD", "/manifests/", status(429)},
		{"408 at GET", "GET", "/manifests/", status(408)},
		{"405 at HEAD", "HEAD", "/manifests/", status(405)},
		{"cut manifest", "GET", "/manifests/", cut},
		{"502 at a blob", "GET", "/blobs/", status(502)},
		{"cut blob", "GET", "/blobs/", cut},
		{"503 at POST", "POST", "/blobs/uploads", status(503)},
		{"503 at PUT", "PUT", "/blobs/uploads", status(503)},
		{"429 at PUT", "PUT", "/blobs/uploads", status(429)},
		{"cut upload", "PUT", "/blobs/uploads", cut},
		{"500 at PUT of a manifest", "PUT", "/manifests/", status(500)},
		{"cut PUT of a manifest", "PUT", "/manifests/", cut},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := serve(t)
			s.set(once(tt.method, tt.part, tt.answer))
			ref := s.host + "/a/b:1"
			d, _ := push(t, open(Options{}), ref, layer)
			s.set(once(tt.method, tt.part, tt.answer))
			c := open(Options{})
			if got, err := c.Resolve(t.Context(), ref); err != nil || got.Digest != d.Digest {
				t.Errorf("Resolve = %v, %v", got, err)
			}
			if _, _, err := c.Manifest(t.Context(), ref, d.Digest); err != nil {
				t.Errorf("Manifest: %v", err)
			}
			if b, err := read(t, c, ref, blobOf(layer)); err != nil || !bytes.Equal(b, layer) {
				t.Errorf("Blob = %d bytes, %v", len(b), err)
			}
		})
	}
}

func TestResume(t *testing.T) {
	layer := bytes.Repeat([]byte("0123456789"), 20_000)
	for _, ranges := range []bool{true, false} {
		s := serve(t)
		ref := s.host + "/a:1"
		push(t, open(Options{}), ref, layer)
		cuts := 0
		s.set(func(w http.ResponseWriter, r *http.Request) bool {
			if r.Method != http.MethodGet || !strings.Contains(r.URL.Path, "/blobs/") {
				return false
			}
			off := 0
			if rng := r.Header.Get("Range"); rng != "" && ranges {
				_, _ = fmt.Sscanf(rng, "bytes=%d-", &off)
				w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", off, len(layer)-1, len(layer)))
				w.Header().Set("Content-Length", fmt.Sprint(len(layer)-off))
				w.WriteHeader(http.StatusPartialContent)
			} else {
				w.Header().Set("Content-Length", fmt.Sprint(len(layer)))
			}
			if cuts++; cuts < 3 {
				_, _ = w.Write(layer[off : off+50_000*cuts])
				panic(http.ErrAbortHandler)
			}
			_, _ = w.Write(layer[off:])
			return true
		})
		b, err := read(t, open(Options{}), ref, blobOf(layer))
		if err != nil || !bytes.Equal(b, layer) {
			t.Errorf("ranges %v: Blob = %d bytes, %v", ranges, len(b), err)
		}
		if n := s.asked("GET", "/blobs/", "bytes="); n != 2 {
			t.Errorf("ranges %v: %d requests with a range: %q", ranges, n, s.log)
		}
	}
}

// A name server that is busy for a moment, or a connection that is lost on its way, costs no build.
func TestFaintConnection(t *testing.T) {
	s := serve(t)
	push(t, open(Options{}), s.host+"/a:1", []byte("layer"))
	for name, test := range map[string]struct {
		err   error
		dials int // that fail
		saved bool
	}{
		"busy name server":  {&net.DNSError{Err: "server misbehaving", IsTemporary: true}, 2, true},
		"lost packets":      {&net.OpError{Op: "dial", Err: os.ErrDeadlineExceeded}, 2, true},
		"for too long":      {&net.OpError{Op: "dial", Err: os.ErrDeadlineExceeded}, 1000, false},
		"no such name":      {&net.DNSError{Err: "no such host", IsNotFound: true}, 2, false},
		"nobody is there":   {&net.OpError{Op: "dial", Err: errors.New("connect: connection refused")}, 2, false},
		"another operation": {&net.OpError{Op: "read", Err: errors.New("whatever")}, 2, false},
	} {
		c := open(Options{Insecure: []string{"faint.example"}})
		dials := 0
		dial := c.retry.lax.DialContext
		c.retry.lax.DialContext = func(ctx context.Context, network, addr string) (net.Conn, error) {
			if dials++; dials <= test.dials {
				return nil, test.err
			}
			return dial(ctx, network, s.host)
		}
		_, err := c.Resolve(t.Context(), "faint.example/a:1")
		if (err == nil) != test.saved {
			t.Errorf("%s: Resolve = %v after %d connections", name, err, dials)
		}
		if dials > 2*fainter {
			t.Errorf("%s: %d connections were tried", name, dials)
		}
	}
}

func TestTransferThatNeverEnds(t *testing.T) {
	s := serve(t)
	layer := []byte("layer")
	push(t, open(Options{}), s.host+"/a:1", layer)
	s.set(func(w http.ResponseWriter, r *http.Request) bool {
		if r.Method == http.MethodGet && strings.Contains(r.URL.Path, "/blobs/") {
			w.Header().Set("Content-Length", "5")
			panic(http.ErrAbortHandler)
		}
		return false
	})
	if _, err := read(t, open(Options{}), s.host+"/a:1", blobOf(layer)); !Is(err, Unreachable) {
		t.Errorf("Blob = %v, want unreachable", err)
	}
	s.set(nil)
	d := blobOf(layer)
	d.Size = 3
	if b, err := read(t, open(Options{}), s.host+"/a:1", d); err == nil {
		t.Errorf("blob longer than promised: %q", b)
	}
}

func TestRetryAfter(t *testing.T) {
	c := open(Options{})
	for _, tt := range []struct {
		header string
		wait   time.Duration
		ok     bool
	}{{"7", 7 * time.Second, true}, {"3600", time.Hour, false}, {"-1", 0, true}, {"soon", 0, true}} {
		got, ok := c.retry.wait(1, &http.Response{Header: http.Header{"Retry-After": {tt.header}}})
		if ok != tt.ok || tt.wait > 0 && got != tt.wait || tt.wait == 0 && got > time.Second {
			t.Errorf("wait(Retry-After: %s) = %v, %v, want %v, %v", tt.header, got, ok, tt.wait, tt.ok)
		}
	}
}

func TestErrors(t *testing.T) {
	s := serve(t)
	c := open(Options{})
	ref := s.host + "/nosuch:latest"
	_, err := c.Resolve(t.Context(), ref)
	if want := ref + ": not found"; !Is(err, NotFound) || err.Error() != want {
		t.Errorf("Resolve = %v, want %s", err, want)
	}
	for _, tt := range []struct {
		status int
		body   string
		class  Class
		text   string
	}{
		{401, `{"errors":[{"code":"UNAUTHORIZED","message":"authentication required"}]}`, Unauthorized, "unauthorized: authentication required"},
		{403, `{"errors":[{"code":"DENIED","message":"no\n\u001b[31mpush"}]}`, Denied, "denied: no [31mpush"},
		{429, `<html>`, TooMany, "too many requests"},
		{503, ``, Unreachable, "503"},
		{400, `{"errors":[{"code":"TAG_INVALID","message":"m"}]}`, Other, "tag invalid: m (400)"},
	} {
		s.set(func(w http.ResponseWriter, r *http.Request) bool {
			if !strings.Contains(r.URL.Path, "/manifests/") || r.Method != http.MethodGet {
				return false
			}
			w.Header().Set("Retry-After", "0")
			w.WriteHeader(tt.status)
			_, _ = io.WriteString(w, tt.body)
			return true
		})
		_, _, err := c.Manifest(t.Context(), ref, "")
		if !Is(err, tt.class) || !strings.Contains(err.Error(), tt.text) || !strings.HasPrefix(err.Error(), ref+": ") {
			t.Errorf("%d: Manifest = %v, want class %v and %q", tt.status, err, tt.class, tt.text)
		}
	}
	if _, err := c.Resolve(t.Context(), "127.0.0.1:1/x"); !Is(err, Unreachable) {
		t.Errorf("nobody there: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := c.Resolve(ctx, s.host+"/other"); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	cause := errors.New("disk on fire")
	err = c.PushBlob(t.Context(), ref, blobOf([]byte("x")), nil, func(context.Context) (io.ReadCloser, error) { return nil, cause })
	if !errors.Is(err, cause) {
		t.Errorf("PushBlob with a source that fails = %v", err)
	}
}

func TestManifestIsVerified(t *testing.T) {
	s := serve(t)
	d, m := push(t, open(Options{}), s.host+"/a:1", []byte("layer"))
	s.set(func(w http.ResponseWriter, r *http.Request) bool {
		if r.Method != http.MethodGet || !strings.Contains(r.URL.Path, "/manifests/") {
			return false
		}
		_, _ = w.Write(append(m, ' '))
		return true
	})
	if _, _, err := open(Options{}).Manifest(t.Context(), s.host+"/a:1", d.Digest); err == nil || !strings.Contains(err.Error(), "digest") {
		t.Errorf("Manifest = %v", err)
	}
	s.set(func(w http.ResponseWriter, r *http.Request) bool {
		if r.Method != http.MethodGet || !strings.Contains(r.URL.Path, "/manifests/") {
			return false
		}
		_, _ = w.Write(make([]byte, maxManifest+1))
		return true
	})
	if _, _, err := open(Options{}).Manifest(t.Context(), s.host+"/a:1", ""); err == nil || !strings.Contains(err.Error(), "larger") {
		t.Errorf("huge Manifest = %v", err)
	}
}

func TestMirrors(t *testing.T) {
	mirror := serve(t)
	layer := []byte("layer")
	d, _ := push(t, open(Options{}), mirror.host+"/library/busybox:latest", layer)
	push(t, open(Options{}), mirror.host+"/proxy/x/library/busybox:deep", layer)

	origin := serve(t)
	push(t, open(Options{}), origin.host+"/only:here", layer)
	mirrors, err := ParseMirrors("docker.io=127.0.0.1:1, docker.io=" + mirror.host + ",docker.io=" + mirror.host + "/proxy/x/," + origin.host + "=" + mirror.host)
	if err != nil {
		t.Fatal(err)
	}
	c := open(Options{Mirrors: mirrors})
	for _, ref := range []string{"busybox", "docker.io/library/busybox:latest", "busybox:deep"} {
		if got, err := c.Resolve(t.Context(), ref); err != nil || got.Digest != d.Digest {
			t.Errorf("Resolve(%s) = %v, %v", ref, got, err)
		}
		if b, err := read(t, c, ref, blobOf(layer)); err != nil || !bytes.Equal(b, layer) {
			t.Errorf("Blob(%s) = %q, %v", ref, b, err)
		}
	}
	if got, err := c.Resolve(t.Context(), origin.host+"/only:here"); err != nil || got.Digest != d.Digest {
		t.Errorf("fallback to the origin: %v, %v", got, err)
	}
	mirror.set(nil)
	push(t, c, origin.host+"/pushed:1", []byte("pushed"))
	if n := mirror.asked("/pushed/"); n != 0 {
		t.Errorf("a push asked the mirror: %q", mirror.log)
	}
}

func TestParseMirrors(t *testing.T) {
	for _, s := range []string{"docker.io", "=h", "docker.io=", "docker.io=ftp://h", "docker.io=h:1/UP", "docker.io=h:1/..", "docker.io=h/a b"} {
		if m, err := ParseMirrors(s); err == nil {
			t.Errorf("ParseMirrors(%q) = %v", s, m)
		}
	}
	if m, err := ParseMirrors(""); err != nil || len(m) != 0 {
		t.Errorf("ParseMirrors of nothing = %v, %v", m, err)
	}
}

func TestNormalize(t *testing.T) {
	dg := digest.FromString("x").String()
	for in, want := range map[string]string{
		"busybox":             "docker.io/library/busybox:latest",
		"a/b:1":               "docker.io/a/b:1",
		"h:5000/a":            "h:5000/a:latest",
		"busybox@" + dg:       "docker.io/library/busybox@" + dg,
		"busybox:1@" + dg:     "docker.io/library/busybox:1@" + dg,
		"localhost/x":         "localhost/x:latest",
		"index.docker.io/a/b": "docker.io/a/b:latest",
	} {
		if got, err := Normalize(in); err != nil || got != want {
			t.Errorf("Normalize(%q) = %q, %v, want %q", in, got, err, want)
		}
	}
	if _, err := Normalize("x/UPPER"); err == nil || !strings.Contains(err.Error(), "lowercase") {
		t.Errorf("Normalize(x/UPPER) = %v", err)
	}
}

func TestPlainHTTP(t *testing.T) {
	rt := newRetrying(map[string]bool{"insecure.example": true}, nil, time.Millisecond)
	for host, want := range map[string]bool{
		"127.0.0.1:5000": true, "127.8.9.1": true, "localhost": true, "localhost:1": true, "[::1]:5000": true, "insecure.example": true,
		"10.0.0.1:5000": false, "192.168.1.1": false, "172.16.0.1": false, "host.local": false, "localhost.example": false, "127.0.0.1.example": false,
		"[::2]:1": false, "insecure.example:80": false,
	} {
		if got := rt.clear(host); got != want {
			t.Errorf("clear(%s) = %v", host, got)
		}
		if want {
			continue
		}
		req := httptest.NewRequest(http.MethodGet, "http://"+host+"/v2/", nil)
		if _, err := rt.RoundTrip(req); !errors.Is(err, errClear) {
			t.Errorf("http to %s: %v", host, err)
		}
	}
}

// TestLoopback counts the connections that it takes to find out how a registry on this machine wants to be spoken to.
func TestLoopback(t *testing.T) {
	s := serve(t)
	push(t, open(Options{}), s.host+"/a:1", []byte("layer"))
	count := func(c *Client, ref string) (dials int, err error) {
		dial := c.retry.strict.DialContext
		c.retry.strict.DialContext = func(ctx context.Context, network, addr string) (net.Conn, error) {
			dials++
			return dial(ctx, network, addr)
		}
		_, err = c.Resolve(t.Context(), ref)
		return dials, err
	}
	if n, err := count(open(Options{}), s.host+"/a:1"); n != 1 || err != nil {
		t.Errorf("one that knows http alone: %d connections, %v", n, err)
	}
	encrypted := httptest.NewTLSServer(http.RedirectHandler("https://elsewhere.example/", http.StatusFound))
	encrypted.Config.ErrorLog = log.New(io.Discard, "", 0)
	defer encrypted.Close()
	if n, err := count(open(Options{}), strings.TrimPrefix(encrypted.URL, "https://")+"/a:1"); n != 3 || !Is(err, TLS) {
		t.Errorf("one that knows https alone: %d connections, %v", n, err)
	}
	// An answer in the clear that leads to https is no answer.
	leading := httptest.NewServer(http.RedirectHandler(encrypted.URL, http.StatusMovedPermanently))
	defer leading.Close()
	if _, err := count(open(Options{}), strings.TrimPrefix(leading.URL, "http://")+"/a:1"); !Is(err, TLS) {
		t.Errorf("one that leads to https: %v", err)
	}
	// Nor is one that is closed asked again and again, with waits, before https is.
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	first := make(chan byte, 100)
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			b := make([]byte, 1)
			c.Read(b)
			first <- b[0]
			c.Close()
		}
	}()
	count(open(Options{}), l.Addr().String()+"/a:1")
	if a, b := <-first, <-first; a != 'G' || b != 0x16 {
		t.Errorf("one that closes was sent requests that begin with %q and %q", a, b)
	}
}

func TestTLS(t *testing.T) {
	serve(t) // for its environment
	srv := httptest.NewTLSServer(ggcr.New(ggcr.Logger(log.New(io.Discard, "", 0))))
	srv.Config.ErrorLog = log.New(io.Discard, "", 0)
	defer srv.Close()
	ref := strings.TrimPrefix(srv.URL, "https://") + "/a:1"
	c := open(Options{})
	if _, err := c.Resolve(t.Context(), ref); !Is(err, TLS) {
		t.Errorf("unknown certificate: %v", err)
	}
	trusting, err := c.Trusting(ref)
	if err != nil {
		t.Fatal(err)
	}
	push(t, trusting, ref, []byte("layer"))

	certs := t.TempDir()
	dir := filepath.Join(certs, strings.TrimPrefix(srv.URL, "https://"))
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	ca := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: srv.Certificate().Raw})
	if err := os.WriteFile(filepath.Join(dir, "ca.crt"), ca, 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := open(Options{Certs: []string{certs}}).Resolve(t.Context(), ref); err != nil {
		t.Errorf("with its authority in %s: %v", dir, err)
	}
	if err := os.WriteFile(filepath.Join(dir, "other.crt"), []byte("x"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := open(Options{Certs: []string{certs}}).Resolve(t.Context(), ref); err == nil || !strings.Contains(err.Error(), "other.crt") {
		t.Errorf("with a damaged authority: %v", err)
	}
}

func TestMayPush(t *testing.T) {
	s := serve(t)
	if err := open(Options{}).MayPush(t.Context(), s.host+"/a"); err != nil {
		t.Errorf("MayPush = %v", err)
	}
	s.set(func(w http.ResponseWriter, r *http.Request) bool {
		if r.Method == http.MethodPost {
			w.WriteHeader(http.StatusForbidden)
		}
		return r.Method == http.MethodPost
	})
	if err := open(Options{}).MayPush(t.Context(), s.host+"/a"); !Is(err, Denied) {
		t.Errorf("MayPush where one may not = %v", err)
	}
}

// TestCredentials signs in with Docker's configuration, by host and by path, and with a helper, and sees that
// a blob store elsewhere is not shown the password.
func TestCredentials(t *testing.T) {
	var leaked []string
	store := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		leaked = append(leaked, r.Header.Get("Authorization"))
		_, _ = io.WriteString(w, "layer")
	}))
	defer store.Close()
	s := serve(t)
	var users []string
	s.set(func(w http.ResponseWriter, r *http.Request) bool {
		user, pass, _ := r.BasicAuth()
		if pass != "p" {
			w.Header().Set("WWW-Authenticate", `Basic realm="x"`)
			w.WriteHeader(http.StatusUnauthorized)
			return true
		}
		users = append(users, user)
		if r.Method == http.MethodGet && strings.Contains(r.URL.Path, "/blobs/") {
			http.Redirect(w, r, store.URL+"/elsewhere?token=secret", http.StatusTemporaryRedirect)
			return true
		}
		return false
	})
	auth := func(u string) string { return base64.StdEncoding.EncodeToString([]byte(u + ":p")) }
	config := func(text string) {
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, "config.json"), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		t.Setenv("DOCKER_CONFIG", dir)
	}
	layer := []byte("layer")

	config(fmt.Sprintf(`{"auths":{%q:{"auth":%q},%q:{"auth":%q}}}`, s.host, auth("host"), s.host+"/team", auth("team")))
	c := open(Options{})
	for ref, want := range map[string]string{"/a:1": "host", "/team/deep/a:1": "team"} {
		users = nil
		push(t, c, s.host+ref, layer)
		if slices.ContainsFunc(users, func(u string) bool { return u != want }) {
			t.Errorf("push to %s as %q", ref, users)
		}
	}
	if b, err := read(t, c, s.host+"/a:1", blobOf(layer)); err != nil || !bytes.Equal(b, layer) {
		t.Errorf("redirected blob: %q, %v", b, err)
	}
	if len(leaked) == 0 || leaked[0] != "" {
		t.Errorf("the blob store saw %q", leaked)
	}

	config(fmt.Sprintf(`{"credHelpers":{%q:"filotest"}}`, s.host))
	_, err := open(Options{}).Resolve(t.Context(), s.host+"/a:1")
	if !Is(err, Unauthorized) || !strings.Contains(err.Error(), "docker-credential-filotest") {
		t.Errorf("missing helper: %v", err)
	}
	bin := t.TempDir()
	helper := "#!/bin/sh\ncat >/dev/null\necho '{\"ServerURL\":\"x\",\"Username\":\"helped\",\"Secret\":\"p\"}'\n"
	if err := os.WriteFile(filepath.Join(bin, "docker-credential-filotest"), []byte(helper), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", bin+":"+os.Getenv("PATH"))
	if _, err := open(Options{}).Resolve(t.Context(), s.host+"/a:1"); err != nil || users[len(users)-1] != "helped" {
		t.Errorf("helper: %v as %q", err, users)
	}

	config(`{"credsStore":"filotest"}`)
	users = nil
	if _, err := open(Options{}).Resolve(t.Context(), s.host+"/a:1"); err != nil || users[len(users)-1] != "helped" {
		t.Errorf("store: %v as %q", err, users)
	}

	config(`{}`)
	_, err = open(Options{}).Resolve(t.Context(), s.host+"/a:1")
	if !Is(err, Unauthorized) {
		t.Errorf("no credentials: %v", err)
	}
	config(fmt.Sprintf(`{"auths":{%q:{"auth":%q}}}`, s.host, base64.StdEncoding.EncodeToString([]byte("u:hunter2"))))
	if _, err = open(Options{}).Resolve(t.Context(), s.host+"/a:1"); !Is(err, Unauthorized) || strings.Contains(err.Error(), "hunter2") {
		t.Errorf("wrong password: %v", err)
	}
}

// tokens makes s want bearer tokens that name the repository and the right; realm serves them.
func tokens(t *testing.T, s *server, answer func(w http.ResponseWriter, r *http.Request) bool) (scopes *[]string) {
	t.Helper()
	scopes = &[]string{}
	var mu sync.Mutex
	realm := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if answer != nil && answer(w, r) {
			return
		}
		mu.Lock()
		*scopes = append(*scopes, r.URL.Query()["scope"]...)
		mu.Unlock()
		fmt.Fprintf(w, `{"token":%q}`, strings.Join(r.URL.Query()["scope"], " "))
	}))
	t.Cleanup(realm.Close)
	s.set(func(w http.ResponseWriter, r *http.Request) bool {
		held := strings.TrimPrefix(r.Header.Get("Authorization"), "Bearer ")
		right := "pull"
		if r.Method != http.MethodGet && r.Method != http.MethodHead {
			right = "push"
		}
		repo, _, _ := strings.Cut(strings.TrimPrefix(r.URL.Path, "/v2/"), "/")
		ok := repo == "" && held != "" || repo != "" && strings.Contains(held, "repository:"+repo+":") && strings.Contains(held, right)
		if !ok {
			w.Header().Set("WWW-Authenticate", fmt.Sprintf(`Bearer realm="%s/token",service="x"`, realm.URL))
			w.WriteHeader(http.StatusUnauthorized)
		}
		return !ok
	})
	return scopes
}

func TestToken(t *testing.T) {
	s := serve(t)
	scopes := tokens(t, s, nil)
	push(t, open(Options{}), s.host+"/a:1", []byte("layer"))
	c := open(Options{})
	*scopes = nil
	for range 2 {
		if _, _, err := c.Manifest(t.Context(), s.host+"/a:1", ""); err != nil {
			t.Fatal(err)
		}
	}
	if !slices.Equal(*scopes, []string{"repository:a:pull"}) {
		t.Errorf("two reads ask for %q", *scopes)
	}
	// Tokens run out.
	c.mu.Lock()
	for _, session := range c.sessions {
		session.client.Transport.(*signing).token = "stale"
	}
	c.mu.Unlock()
	if _, _, err := c.Manifest(t.Context(), s.host+"/a:1", ""); err != nil {
		t.Errorf("with a token that ran out: %v", err)
	}
}

func TestIdentityToken(t *testing.T) {
	s := serve(t)
	var grants []string
	oauth := true
	tokens(t, s, func(w http.ResponseWriter, r *http.Request) bool {
		if r.Method != http.MethodPost {
			return false
		}
		if !oauth {
			w.WriteHeader(http.StatusMethodNotAllowed)
			return true
		}
		grants = append(grants, r.FormValue("grant_type")+" "+r.FormValue("refresh_token"))
		fmt.Fprintf(w, `{"access_token":%q}`, r.FormValue("scope"))
		return true
	})
	dir := t.TempDir()
	config := fmt.Sprintf(`{"auths":{%q:{"identitytoken":"secret"}}}`, s.host)
	if err := os.WriteFile(filepath.Join(dir, "config.json"), []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("DOCKER_CONFIG", dir)
	push(t, open(Options{}), s.host+"/a:1", []byte("layer"))
	if len(grants) == 0 || grants[0] != "refresh_token secret" {
		t.Errorf("grants %q", grants)
	}
	oauth = false
	if _, err := open(Options{}).Resolve(t.Context(), s.host+"/a:1"); err != nil {
		t.Errorf("token server without OAuth2: %v", err)
	}
}

func TestTokenServer(t *testing.T) {
	insecure := map[string]bool{"listed.example": true}
	s := &signing{clear: func(h string) bool { return insecure[h] || loopback(h) }}
	for _, tt := range []struct {
		registry, realm string
		ok              bool
	}{
		{"r.example", "https://auth.example/token", true},
		{"r.example", "http://auth.example/token", false},
		{"r.example", "http://listed.example/token", true},
		{"r.example", "ftp://auth.example/token", false},
		{"r.example", "http://127.0.0.1:80/", false},
		{"r.example", "https://169.254.169.254/", false},
		{"r.example", "https://10.0.0.1/", false},
		{"127.0.0.1:5000", "http://127.0.0.1:5001/token", true},
		{"10.0.0.1", "https://10.0.0.2/token", true},
		{"10.0.0.1", "http://10.0.0.1/token", false},
	} {
		s.host = tt.registry
		u, err := url.Parse(tt.realm)
		if err != nil {
			t.Fatal(err)
		}
		if err := s.trusted(u); (err == nil) != tt.ok {
			t.Errorf("%s sends us to %s: %v", tt.registry, tt.realm, err)
		}
	}
	srv := serve(t)
	for body, want := range map[string]string{`{}`: "no token", `<html>`: "no token"} {
		tokens(t, srv, func(w http.ResponseWriter, r *http.Request) bool { _, _ = io.WriteString(w, body); return true })
		if _, err := open(Options{}).Resolve(t.Context(), srv.host+"/a:1"); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("token server says %s: %v", body, err)
		}
	}
	tokens(t, srv, func(w http.ResponseWriter, r *http.Request) bool { w.WriteHeader(http.StatusUnauthorized); return true })
	if _, err := open(Options{}).Resolve(t.Context(), srv.host+"/a:1"); !Is(err, Unauthorized) {
		t.Errorf("token server refuses: %v", err)
	}
}

func TestParallelPushes(t *testing.T) {
	s := serve(t)
	var mu sync.Mutex
	now, most := 0, 0
	full := make(chan struct{})
	first := sync.OnceFunc(func() { close(full) })
	s.set(func(w http.ResponseWriter, r *http.Request) bool {
		if r.Method != http.MethodHead {
			return false
		}
		mu.Lock()
		now++
		most = max(most, now)
		if now == parallel {
			first()
		}
		mu.Unlock()
		<-full
		mu.Lock()
		now--
		mu.Unlock()
		return false
	})
	c := open(Options{})
	var wg sync.WaitGroup
	for i := range 12 {
		wg.Add(1)
		go func() {
			defer wg.Done()
			b := fmt.Appendf(nil, "blob %d", i)
			if err := c.PushBlob(t.Context(), s.host+"/a", blobOf(b), nil, opener(b)); err != nil {
				t.Error(err)
			}
		}()
	}
	wg.Wait()
	if most != parallel {
		t.Errorf("%d transfers at once, want %d", most, parallel)
	}
}
