package source

import (
	"context"
	"fmt"
	"io/fs"
	"net/http"
	"net/http/httptest"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
)

// serve starts a web server on loopback.
func serve(t testing.TB, h http.HandlerFunc) string {
	t.Helper()
	s := httptest.NewServer(h)
	t.Cleanup(s.Close)
	return s.URL
}

// fast tries again without waiting.
func fast(t testing.TB) Options {
	return Options{Temp: t.TempDir(), retry: backoff{tries: 3, first: time.Nanosecond}}
}

func fetch(t testing.TB, url, checksum string, o Options) (Fetched, error) {
	t.Helper()
	f, err := Fetch(context.Background(), url, checksum, nil, o)
	if err == nil {
		t.Cleanup(func() { f.Close() })
	}
	if left, _ := os.ReadDir(o.Temp); len(left) > 0 && f.Name != "" {
		t.Errorf("left in the temporary directory: %v", left)
	}
	return f, err
}

func TestFetchHTTP(t *testing.T) {
	url := serve(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Disposition", `attachment; filename="other"`)
		if r.URL.Path == "/some/file.txt" {
			w.Header().Set("Last-Modified", "Thu, 02 Jan 2020 03:04:05 GMT")
		}
		fmt.Fprint(w, "body")
	})
	for _, c := range []struct {
		path, name string
		sec        int64
	}{
		{"/some/file.txt", "file.txt", 1577934245}, {"/dir/", "dir", 0}, {"/", unnamed, 0}, {"", unnamed, 0}, {"?x=/y", unnamed, 0},
		{"/a%20b?q#f", "a b", 0}, {"/x/..", unnamed, 0}, {"/a%0ab", unnamed, 0}, {"/caf%E9", "caf\xe9", 0},
	} {
		f, err := fetch(t, url+c.path, "", fast(t))
		must(t, err)
		if f.Name != c.name || f.Identity != digest.FromString("body").String() {
			t.Errorf("Fetch(%s) = %+v, want name %q", c.path, f, c.name)
		}
		if st := statOf(t, f.FS, c.name); st.Mode != modeRegular|0o600 || st.Sec != c.sec || st.UID != 0 || st.Size != 4 {
			t.Errorf("Fetch(%s) is %+v, want time %d", c.path, st, c.sec)
		}
		if (f.Modified != nil) != (c.sec != 0) {
			t.Errorf("Fetch(%s) is of %v", c.path, f.Modified)
		}
		if got := read(t, f.FS, c.name); got != "body" || names(t, f.FS) != c.name {
			t.Errorf("Fetch(%s) holds %q", c.path, got)
		}
	}
}

func TestFetchChecksum(t *testing.T) {
	url := serve(t, func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, "body") })
	for _, a := range []digest.Algorithm{digest.SHA256, digest.SHA384, digest.SHA512} {
		right, wrong := a.FromString("body"), a.FromString("other")
		f, err := fetch(t, url+"/f", right.String(), fast(t))
		must(t, err)
		if want := digest.FromString("body").String(); f.Identity != want {
			t.Errorf("identity %s, want %s", f.Identity, want)
		}
		_, err = fetch(t, url+"/f", wrong.String(), fast(t))
		wantError(t, err, "digest mismatch", right.String(), wrong.String(), url+"/f")
	}
	for _, sum := range []string{"md5:d41d8cd98f00b204e9800998ecf8427e", "sha256:abc", "0123456"} {
		_, err := fetch(t, url+"/f", sum, fast(t))
		wantError(t, err, sum)
	}
}

func TestFetchRetries(t *testing.T) {
	var asked atomic.Int32
	url := serve(t, func(w http.ResponseWriter, r *http.Request) {
		switch n := asked.Add(1); {
		case r.URL.Path == "/never", n == 1:
			http.Error(w, "busy", http.StatusServiceUnavailable)
		case n == 2:
			w.Header().Set("Content-Length", "100")
			fmt.Fprint(w, "torn")
			panic(http.ErrAbortHandler)
		default:
			fmt.Fprint(w, "whole")
		}
	})
	f, err := fetch(t, url+"/f", "", fast(t))
	must(t, err)
	if got := read(t, f.FS, "f"); got != "whole" || asked.Load() != 3 {
		t.Errorf("holds %q after %d requests", got, asked.Load())
	}
	asked.Store(0)
	_, err = fetch(t, url+"/never", "", fast(t))
	wantError(t, err, "503", url+"/never")
	if asked.Load() != 3 {
		t.Errorf("%d requests, want 3", asked.Load())
	}
}

func TestFetchErrors(t *testing.T) {
	var asked atomic.Int32
	url := serve(t, func(w http.ResponseWriter, r *http.Request) { asked.Add(1); http.NotFound(w, r) })
	_, err := fetch(t, url+"/none", "", fast(t))
	wantError(t, err, "404", url+"/none")
	if asked.Load() != 1 {
		t.Errorf("%d requests, want 1", asked.Load())
	}
	secret := strings.Replace(url, "http://", "http://user:hunter2@", 1)
	for _, ref := range []string{secret + "/none", "http://user:hunter2@127.0.0.1:1/f"} {
		_, err = fetch(t, ref, "", fast(t))
		if wantError(t, err, "user:xxxxx@"); strings.Contains(err.Error(), "hunter2") {
			t.Errorf("the password is in the error: %v", err)
		}
	}
	_, err = fetch(t, "f", "", fast(t))
	wantError(t, err, "neither")
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := Fetch(ctx, url, "", nil, fast(t)); err == nil {
		t.Error("Fetch with a canceled context = nil")
	}
}

func TestFetchAuth(t *testing.T) {
	url := serve(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/away" {
			http.Redirect(w, r, strings.Replace("http://"+r.Host, "127.0.0.1", "localhost", 1)+"/f", http.StatusFound)
			return
		}
		fmt.Fprint(w, r.Header.Get("Authorization"))
	})
	for _, c := range []struct{ id, path, want string }{
		{"HTTP_AUTH_TOKEN_127.0.0.1", "/f", "Bearer s3cret"},
		{"HTTP_AUTH_HEADER_127.0.0.1", "/f", "s3cret"},
		{"HTTP_AUTH_TOKEN_example.com", "/f", ""},
		{"HTTP_AUTH_TOKEN_127.0.0.1", "/away", ""},
	} {
		o := fast(t)
		o.Secret = func(id string) ([]byte, bool) { return []byte("s3cret\n"), id == c.id }
		f, err := fetch(t, url+c.path, "", o)
		must(t, err)
		if got := read(t, f.FS, f.Name); got != c.want {
			t.Errorf("%s at %s: Authorization %q, want %q", c.id, c.path, got, c.want)
		}
	}
}

func TestOpenHTTP(t *testing.T) {
	archive := makeTar(t, member{Header: file("f", "").Header, content: "hello"})
	url := serve(t, func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/c.tar":
			w.Write(archive)
		case "/Dockerfile":
			w.Header().Set("Last-Modified", "Thu, 02 Jan 2020 03:04:05 GMT")
			fmt.Fprint(w, "FROM scratch\n")
		default:
			http.NotFound(w, r)
		}
	})
	s, err := Open(context.Background(), url+"/c.tar", fast(t))
	must(t, err)
	defer s.Close()
	if read(t, s.FS, "f") != "hello" || s.Local || s.Identity != digest.FromBytes(archive).String() {
		t.Errorf("Open(c.tar) = %+v", s)
	}
	d, err := Open(context.Background(), url+"/Dockerfile", fast(t))
	must(t, err)
	defer d.Close()
	if string(d.Dockerfile) != "FROM scratch\n" || d.FS != nil || d.Modified == nil || *d.Modified != 1577934245 {
		t.Errorf("Open(Dockerfile) = %+v", d)
	}
	_, err = Open(context.Background(), url+"/none.tgz", fast(t))
	wantError(t, err, "404", url+"/none.tgz")
}

func TestKeep(t *testing.T) {
	body, tag := "one", `"1"`
	var log []string
	var mu sync.Mutex // for all of these
	url := serve(t, func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		defer mu.Unlock()
		w.Header().Set("ETag", tag)
		if r.Header.Get("If-None-Match") == tag {
			log = append(log, "same")
			w.WriteHeader(http.StatusNotModified)
			return
		}
		log = append(log, "sent")
		fmt.Fprint(w, body)
	}) + "/f"
	o := fast(t)
	o.Keep = t.TempDir()
	step := func(what, checksum, want, wantLog string) {
		t.Helper()
		mu.Lock()
		log = nil
		mu.Unlock()
		f, err := fetch(t, url, checksum, o)
		must(t, err)
		mu.Lock()
		defer mu.Unlock()
		if got := read(t, f.FS, "f"); got != want || strings.Join(log, " ") != wantLog || f.Identity != digest.FromString(want).String() {
			t.Errorf("%s: %q, requests %v, want %q, %q", what, got, log, want, wantLog)
		}
	}
	step("at first", "", "one", "sent")
	step("again", "", "one", "same")
	step("with its checksum", digest.FromString("one").String(), "one", "")
	step("with another checksum", digest.SHA512.FromString("one").String(), "one", "same")
	mu.Lock()
	body, tag = "two", `"2"`
	mu.Unlock()
	step("changed", "", "two", "sent")
	step("again", "", "two", "same")
	must(t, os.WriteFile(o.keptName(url), []byte("damaged"), 0o600))
	step("damaged", "", "two", "sent")
	must(t, os.WriteFile(o.keptName(url)+".json", []byte("{"), 0o600))
	step("damaged", "", "two", "sent")
	_, err := fetch(t, url, digest.FromString("one").String(), o)
	wantError(t, err, "digest mismatch")
	if left, _ := os.ReadDir(o.Keep); len(left) != 2 {
		t.Errorf("kept: %v, want two files", left)
	}
}

func TestFetchedIsReadOnly(t *testing.T) {
	url := serve(t, func(w http.ResponseWriter, r *http.Request) {})
	f, err := fetch(t, url+"/empty", "", fast(t))
	must(t, err)
	if fi, err := fs.Stat(f.FS, "empty"); err != nil || fi.Size() != 0 {
		t.Errorf("Stat(empty) = %v, %v", fi, err)
	}
}

// TestHTTPRedirect sees to it that a host gets what secrets hold for a file only if that is on it.
func TestHTTPRedirect(t *testing.T) {
	var said []string
	other := serve(t, func(_ http.ResponseWriter, r *http.Request) { said = append(said, r.Header.Get("Authorization")) })
	here := serve(t, func(w http.ResponseWriter, r *http.Request) {
		said = append(said, r.Header.Get("Authorization"))
		if r.URL.Path == "/old" {
			http.Redirect(w, r, "/new", http.StatusFound)
			return
		}
		http.Redirect(w, r, other, http.StatusFound)
	})
	o := fast(t)
	o.Secret = func(id string) ([]byte, bool) { return []byte("t0ken"), id == "HTTP_AUTH_TOKEN_127.0.0.1" }
	_, err := fetch(t, here+"/old", "", o)
	must(t, err)
	if want := []string{"Bearer t0ken", "Bearer t0ken", ""}; !slices.Equal(said, want) {
		t.Errorf("the hosts were told %q, want %q", said, want)
	}
}
