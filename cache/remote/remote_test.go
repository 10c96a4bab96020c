package remote

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	ggcr "github.com/google/go-containerregistry/pkg/registry"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"

	"filo/cache"
	"filo/layer"
	"filo/layer/registry"
)

// runner is a machine with an empty store.
type runner struct {
	t     *testing.T
	store *layer.Store
	now   time.Time

	mu       sync.Mutex
	warnings []string
}

func newRunner(t *testing.T) *runner {
	t.Helper()
	s, err := layer.Open(t.TempDir(), layer.Options{SingleID: os.Geteuid() != 0})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return &runner{t: t, store: s, now: time.Unix(1_800_000_000, 0)}
}

// open opens the shared caches of one build.
func (r *runner) open(from, to []string) *Cache {
	r.t.Helper()
	c, err := Open(r.t.Context(), Options{
		Store: r.store, Registry: registry.Open(registry.Options{}), Now: func() time.Time { return r.now },
		Warn: func(text string) {
			r.mu.Lock()
			defer r.mu.Unlock()
			r.warnings = append(r.warnings, text)
		},
		Getenv: func(name string) string {
			return map[string]string{"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret-secret"}[name]
		},
	}, parsed(r.t, ParseFrom, from), parsed(r.t, ParseTo, to))
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() { c.Close() })
	return c
}

func parsed(t *testing.T, parse func(string) ([]Spec, error), values []string) []Spec {
	t.Helper()
	var all []Spec
	for _, v := range values {
		s, err := parse(v)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, s...)
	}
	return all
}

// make makes a layer with one file and says that a step of that name made it.
func (r *runner) make(step, content string, shipped bool) Made {
	r.t.Helper()
	w, err := r.store.Create(r.t.Context(), layer.Sinks{Tree: true})
	if err != nil {
		r.t.Fatal(err)
	}
	err = w.Add(layer.Entry{Path: "f", Type: layer.Regular, Mode: 0o644, Size: int64(len(content))}, strings.NewReader(content))
	if err != nil {
		r.t.Fatal(err)
	}
	l, err := w.Close()
	if err != nil {
		r.t.Fatal(err)
	}
	return Made{Key: keyOf(r.t, step), Layer: l, Created: r.now.Unix(), Shipped: shipped}
}

func keyOf(t *testing.T, step string) cache.Key {
	t.Helper()
	k, err := cache.Key("").Next(step)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// content returns what the layer that c has for a step holds, "" if it has none.
func (r *runner) content(c *Cache, step string) (string, error) {
	rec, ok := c.Recall(r.t.Context(), keyOf(r.t, step))
	if !ok {
		return "", nil
	}
	v, err := r.store.View(r.t.Context(), []layer.Layer{{DiffID: rec.Layer}})
	if err != nil {
		return "", err
	}
	b, err := fs.ReadFile(v, "f")
	return string(b), err
}

func (r *runner) want(c *Cache, step, want string) {
	r.t.Helper()
	got, err := r.content(c, step)
	if err != nil || got != want {
		r.t.Errorf("step %s: cache has %q, %v, want %q", step, got, err, want)
	}
}

func (r *runner) export(c *Cache, made ...Made) {
	r.t.Helper()
	if err := c.Export(r.t.Context(), made, nil); err != nil {
		r.t.Fatal(err)
	}
}

// place is a kind of place for the tests: what to write to --cache-from and --cache-to.
type testPlace struct{ from, to string }

// places returns one of each kind, fresh.
func places(t *testing.T) map[string]func(t *testing.T) testPlace {
	host := serveRegistry(t)
	n := 0
	return map[string]func(t *testing.T) testPlace{
		"registry": func(*testing.T) testPlace {
			n++
			ref := fmt.Sprintf("type=registry,ref=%s/cache/r%d:main", host, n)
			return testPlace{ref, ref}
		},
		"registry index": func(*testing.T) testPlace {
			n++
			ref := fmt.Sprintf("type=registry,ref=%s/cache/r%d:main", host, n)
			return testPlace{ref, ref + ",image-manifest=false,oci-mediatypes=false"}
		},
		"local": func(t *testing.T) testPlace {
			dir := t.TempDir()
			return testPlace{"type=local,src=" + dir, "type=local,dest=" + dir}
		},
		"s3": func(t *testing.T) testPlace {
			spec := "type=s3,bucket=bucket,prefix=p/,endpoint_url=" + serveBucket(t)
			return testPlace{spec, spec}
		},
	}
}

func serveRegistry(t *testing.T) string {
	t.Helper()
	t.Setenv("DOCKER_CONFIG", t.TempDir())
	srv := httptest.NewServer(ggcr.New(ggcr.Logger(log.New(io.Discard, "", 0))))
	t.Cleanup(srv.Close)
	return strings.TrimPrefix(srv.URL, "http://")
}

// serveBucket starts an S3 server with a bucket called bucket.
func serveBucket(t *testing.T) string {
	t.Helper()
	path, err := exec.LookPath("versitygw")
	if err != nil {
		t.Skip("no S3 server: go install github.com/versity/versitygw/cmd/versitygw@latest")
	}
	dir := t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, "bucket"), 0o755); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := l.Addr().String()
	l.Close()
	cmd := exec.Command(path, "--port", addr, "posix", "--sidecar", t.TempDir(), dir)
	cmd.Env = append(os.Environ(), "ROOT_ACCESS_KEY=key", "ROOT_SECRET_KEY=secret-secret")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	for range 500 {
		if c, err := net.Dial("tcp", addr); err == nil {
			c.Close()
			return "http://" + addr
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatal("the S3 server does not start")
	return ""
}

func TestShare(t *testing.T) {
	for name, place := range places(t) {
		t.Run(name, func(t *testing.T) {
			p := place(t)
			a := newRunner(t)
			c := a.open([]string{p.from}, []string{p.to + ",mode=max"})
			a.want(c, "one", "")
			a.export(c, a.make("one", "1", true), a.make("two", "2", false))

			b := newRunner(t)
			c = b.open([]string{p.from}, []string{p.to})
			b.want(c, "one", "1")
			b.want(c, "two", "2")
			b.want(c, "three", "")
			b.export(c, b.make("three", "3", true), b.make("four", "4", false))

			d := newRunner(t)
			c = d.open([]string{p.from}, nil)
			for step, want := range map[string]string{"one": "1", "two": "2", "three": "3", "four": ""} {
				d.want(c, step, want)
			}
			if rec, _ := c.Recall(t.Context(), keyOf(t, "one")); rec.Created != a.now.Unix() {
				t.Errorf("created = %d, want %d", rec.Created, a.now.Unix())
			}
			if len(b.warnings)+len(d.warnings) > 0 {
				t.Errorf("warnings: %q %q", b.warnings, d.warnings)
			}
		})
	}
}

// A step that was done again replaces what was there.
func TestNewestWins(t *testing.T) {
	for name, place := range places(t) {
		t.Run(name, func(t *testing.T) {
			p := place(t)
			r := newRunner(t)
			r.export(r.open(nil, []string{p.to}), r.make("one", "old", true))
			r.export(r.open(nil, []string{p.to}), r.make("one", "new", true))
			fresh := newRunner(t)
			fresh.want(fresh.open([]string{p.from}, nil), "one", "new")
		})
	}
}

// Several runners that export to one place at the same time lose nothing.
func TestWriters(t *testing.T) {
	for name, place := range places(t) {
		for _, n := range []int{2, 6} {
			if n > 2 && strings.HasPrefix(name, "registry") {
				continue // a registry cannot refuse a stale write: more than a few writers at once may lose records
			}
			t.Run(fmt.Sprint(name, " ", n), func(t *testing.T) {
				p := place(t)
				var g errgroup.Group
				var writers []*runner
				for i := range n {
					r := newRunner(t)
					writers = append(writers, r)
					c := r.open(nil, []string{p.to})
					m := r.make(fmt.Sprint(i), fmt.Sprint("content ", i), true)
					g.Go(func() error { return c.Export(t.Context(), []Made{m}, nil) })
				}
				if err := g.Wait(); err != nil {
					t.Fatal(err)
				}
				r := newRunner(t)
				c := r.open([]string{p.from}, nil)
				for i := range n {
					r.want(c, fmt.Sprint(i), fmt.Sprint("content ", i))
				}
				for i, w := range writers {
					if len(w.warnings) > 0 {
						t.Errorf("writer %d: warnings %q", i, w.warnings)
					}
				}
			})
		}
	}
}

// What others wrote between the first layer that a long build sent and its end stays.
func TestLongBuild(t *testing.T) {
	for name, place := range places(t) {
		t.Run(name, func(t *testing.T) {
			p := place(t)
			long, short := newRunner(t), newRunner(t)
			c := long.open(nil, []string{p.to + ",mode=max"})
			first := long.make("first", "1", false)
			c.Offer(t.Context(), first)
			c.Wait()
			short.export(short.open(nil, []string{p.to}), short.make("short", "2", true))
			long.export(c, first, long.make("last", "3", true))
			fresh := newRunner(t)
			c = fresh.open([]string{p.from}, nil)
			for step, want := range map[string]string{"first": "1", "short": "2", "last": "3"} {
				fresh.want(c, step, want)
			}
		})
	}
}

// A server that sends old data under a new ETag makes nobody write over what the new data has.
func TestTornRead(t *testing.T) {
	server := serveBucket(t)
	to := "type=s3,bucket=bucket,endpoint_url="
	r := newRunner(t)
	r.export(r.open(nil, []string{to + server}), r.make("one", "1", true))
	torn, reads := tornProxy(t, server)
	c := r.open([]string{to + torn}, []string{to + torn})
	r.want(c, "one", "1") // the proxy has seen the old data
	r.export(r.open(nil, []string{to + server}), r.make("two", "2", true))
	r.export(c, r.make("three", "3", true))
	if reads() < 3 {
		t.Errorf("the index was read %d times, want once torn and once more", reads())
	}
	fresh := newRunner(t)
	c = fresh.open([]string{to + server}, nil)
	for step, want := range map[string]string{"one": "1", "two": "2", "three": "3"} {
		fresh.want(c, step, want)
	}
}

// tornProxy stands before an S3 server. The first read of an index after it changed has the data of the one before.
// It returns where it is and what tells how often an index was read.
func tornProxy(t *testing.T, server string) (string, func() int) {
	t.Helper()
	to, err := url.Parse(server)
	if err != nil {
		t.Fatal(err)
	}
	var mu sync.Mutex
	var tag string
	var data []byte
	reads := 0
	proxy := &httputil.ReverseProxy{Rewrite: func(r *httputil.ProxyRequest) {
		r.SetURL(to)
		r.Out.Host = r.In.Host // it is signed
	}}
	proxy.ModifyResponse = func(resp *http.Response) error {
		if resp.Request.Method != http.MethodGet || !strings.Contains(resp.Request.URL.Path, "/manifests/") {
			return nil
		}
		now, err := io.ReadAll(resp.Body)
		if err != nil {
			return err
		}
		mu.Lock()
		defer mu.Unlock()
		reads++
		sent := now
		if tag != "" && tag != resp.Header.Get("ETag") {
			sent = data
		}
		tag, data = resp.Header.Get("ETag"), now
		resp.Body, resp.ContentLength = io.NopCloser(bytes.NewReader(sent)), int64(len(sent))
		resp.Header.Set("Content-Length", fmt.Sprint(len(sent)))
		return nil
	}
	srv := httptest.NewServer(proxy)
	t.Cleanup(srv.Close)
	return srv.URL, func() int {
		mu.Lock()
		defer mu.Unlock()
		return reads
	}
}

// A build that changes nothing writes nothing; the records count as used, though, once a day.
func TestNothingNew(t *testing.T) {
	dir := t.TempDir()
	r := newRunner(t)
	m := r.make("one", "1", true)
	index := func() string {
		b, err := os.ReadFile(filepath.Join(dir, "index.json"))
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	r.export(r.open(nil, []string{"type=local,dest=" + dir}), m)
	first := index()
	r.now = r.now.Add(time.Hour)
	r.export(r.open(nil, []string{"type=local,dest=" + dir}), m)
	if index() != first {
		t.Error("the same records were written again")
	}
	r.now = r.now.Add(48 * time.Hour)
	r.export(r.open(nil, []string{"type=local,dest=" + dir}), m)
	if index() == first {
		t.Error("the use of records two days later was not noted")
	}
}

func TestTrim(t *testing.T) {
	dir := t.TempDir()
	r := newRunner(t)
	r.export(r.open(nil, []string{"type=local,dest=" + dir}), r.make("old", "1", true))
	r.now = r.now.Add(10 * 24 * time.Hour)
	r.export(r.open(nil, []string{"type=local,max-age=5d,dest=" + dir}), r.make("new", "2", true))
	c := r.open([]string{"type=local,src=" + dir}, nil)
	r.want(c, "old", "")
	r.want(c, "new", "2")
	r.now = r.now.Add(24 * time.Hour)
	r.export(r.open(nil, []string{"type=local,max-records=2,dest=" + dir}), r.make("newer", "3", true), r.make("newest", "4", true))
	c = r.open([]string{"type=local,src=" + dir}, nil)
	r.want(c, "new", "")
	r.want(c, "newer", "3")
	r.now = r.now.Add(100 * time.Hour)
	r.want(r.open([]string{"type=local,max-age=72h,src=" + dir}, nil), "newer", "")
}

func TestLocalTags(t *testing.T) {
	dir := t.TempDir()
	r := newRunner(t)
	r.export(r.open(nil, []string{"type=local,dest=" + dir + ",tag=a"}), r.make("one", "1", true))
	r.export(r.open(nil, []string{"type=local,dest=" + dir + ",tag=b"}), r.make("two", "2", true))
	a := r.open([]string{"type=local,src=" + dir + ",tag=a"}, nil)
	r.want(a, "one", "1")
	r.want(a, "two", "")
	r.export(r.open(nil, []string{"type=local,dest=" + dir + ",tag=c,reset=true"}), r.make("three", "3", true))
	r.want(r.open([]string{"type=local,src=" + dir + ",tag=b"}, nil), "two", "")
	r.want(r.open([]string{"type=local,src=" + dir + ",tag=c"}, nil), "three", "3")
	blobs, err := os.ReadDir(filepath.Join(dir, "blobs", "sha256"))
	if err != nil || len(blobs) != 3 {
		t.Errorf("after reset=true there are %d blobs, %v, want manifest, config and layer", len(blobs), err)
	}
}

// What an export that was killed left is removed a day later; until then it may be of one that goes on.
func TestLocalSweeps(t *testing.T) {
	dir := t.TempDir()
	r := newRunner(t)
	r.export(r.open(nil, []string{"type=local,dest=" + dir}), r.make("one", "1", true))
	for name, age := range map[string]time.Duration{"old": 25 * time.Hour, "young": 23 * time.Hour} {
		file := filepath.Join(dir, "blobs", "sha256", unfinished+name)
		then := time.Now().Add(-age)
		if err := errors.Join(os.WriteFile(file, nil, 0o600), os.Chtimes(file, then, then)); err != nil {
			t.Fatal(err)
		}
	}
	r.export(r.open(nil, []string{"type=local,dest=" + dir}), r.make("two", "2", true))
	left, err := filepath.Glob(filepath.Join(dir, "blobs", "sha256", unfinished+"*"))
	if err != nil || len(left) != 1 || filepath.Base(left[0]) != unfinished+"young" {
		t.Errorf("left is %q, %v", left, err)
	}
}

// A layer that a record promises and the place does not have, or has with other bytes, is forgotten.
func TestForget(t *testing.T) {
	for name, spoil := range map[string]func(path string) error{
		"gone":    os.Remove,
		"damaged": func(path string) error { return os.WriteFile(path, []byte("something else"), 0o644) },
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			a := newRunner(t)
			a.export(a.open(nil, []string{"type=local,dest=" + dir}), a.make("one", "1", true), a.make("two", "2", true))
			b := newRunner(t)
			c := b.open([]string{"type=local,src=" + dir}, []string{"type=local,dest=" + dir})
			if c.Forget() {
				t.Error("Forget before anything was asked for: true")
			}
			rec, ok := c.Recall(t.Context(), keyOf(t, "one"))
			if !ok {
				t.Fatal("no record")
			}
			l := layer.Layer{DiffID: rec.Layer}
			blob, err := b.store.Blob(t.Context(), l, layer.Compression{}, false)
			if err != nil {
				t.Fatal(err)
			}
			if err := spoil(filepath.Join(dir, "blobs", "sha256", blob.Digest.Encoded())); err != nil {
				t.Fatal(err)
			}
			if _, err := b.content(c, "one"); err == nil {
				t.Error("the layer can be read although its blob is spoilt")
			}
			b.want(c, "two", "2")
			if !c.Forget() {
				t.Error("Forget after a layer could not be had: false")
			}
			b.want(c, "one", "")
			b.want(c, "two", "2")
			if c.Forget() {
				t.Error("Forget once more: true")
			}
			if b.store.Has(l) {
				t.Error("the store still promises the layer")
			}
			b.export(c, b.make("one", "1", true))
			d := newRunner(t)
			d.want(d.open([]string{"type=local,src=" + dir}, nil), "one", "1")
			if len(b.warnings) != 1 || !strings.Contains(b.warnings[0], blob.Digest.String()) {
				t.Errorf("warnings: %q, want one with %s", b.warnings, blob.Digest)
			}
		})
	}
}

// Who stops asking has not found anything out.
func TestForgetCanceled(t *testing.T) {
	dir := t.TempDir()
	a := newRunner(t)
	a.export(a.open(nil, []string{"type=local,dest=" + dir}), a.make("one", "1", true))
	b := newRunner(t)
	c := b.open([]string{"type=local,src=" + dir}, nil)
	rec, _ := c.Recall(t.Context(), keyOf(t, "one"))
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := b.store.View(ctx, []layer.Layer{{DiffID: rec.Layer}}); err == nil {
		t.Fatal("View with a context that ended: no error")
	}
	if c.Forget() {
		t.Error("Forget after a build that was stopped: true")
	}
	b.want(c, "one", "1")
}

// Layers that are offered while the build runs are there when it ends.
func TestOffer(t *testing.T) {
	var mu sync.Mutex
	uploads := 0
	inner := ggcr.New(ggcr.Logger(log.New(io.Discard, "", 0)))
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodPut && strings.Contains(r.URL.Path, "/uploads/") {
			mu.Lock()
			uploads++
			mu.Unlock()
		}
		inner.ServeHTTP(w, r)
	}))
	t.Cleanup(srv.Close)
	t.Setenv("DOCKER_CONFIG", t.TempDir())
	ref := strings.TrimPrefix(srv.URL, "http://") + "/c:1"
	r := newRunner(t)
	c := r.open(nil, []string{"type=registry,mode=max,ref=" + ref})
	made := []Made{r.make("one", "1", false), r.make("two", "2", true)}
	for _, m := range made {
		c.Offer(t.Context(), m)
	}
	c.Wait()
	if uploads != 1 {
		t.Errorf("%d layers were sent early, want that of the other stage", uploads)
	}
	r.export(c, made...)
	if uploads != 3 {
		t.Errorf("%d blobs were sent, want two layers and the index", uploads)
	}
	fresh := newRunner(t)
	c = fresh.open([]string{ref}, nil)
	fresh.want(c, "one", "1")
	fresh.want(c, "two", "2")
}

func TestInline(t *testing.T) {
	r := newRunner(t)
	one, two, other := r.make("one", "1", true), r.make("two", "2", true), r.make("three", "3", false)
	records, err := Inline([]Made{one, two, other}, []layer.Layer{{DiffID: digest.FromString("base")}, one.Layer, two.Layer})
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.HasPrefix(records, []byte("[")) || bytes.Contains(records, []byte(other.Key)) {
		t.Errorf("Inline = %s", records)
	}
}

// What is wrong with a source never fails a build.
func TestSourcesThatFail(t *testing.T) {
	host := serveRegistry(t)
	garbage := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/v2/" {
			return
		}
		io.WriteString(w, `{"schemaVersion":2,"config":{"mediaType":"application/vnd.buildkit.cacheconfig.v0","digest":"sha256:../../x","size":5}}`)
	}))
	t.Cleanup(garbage.Close)
	empty := t.TempDir()
	for from, want := range map[string]string{
		host + "/no/cache:1": "not found",
		"127.0.0.1:1/x:1":    "refused",
		strings.TrimPrefix(garbage.URL, "http://") + "/x":     "malformed digest",
		"type=local,src=" + empty:                             "not found",
		"type=local,src=/nonexistent/dir":                     "not found",
		"type=s3,bucket=some,endpoint_url=http://127.0.0.1:1": "refused",
	} {
		r := newRunner(t)
		c := r.open([]string{from}, nil)
		r.want(c, "one", "")
		if len(r.warnings) != 1 || !strings.Contains(r.warnings[0], want) || strings.Contains(r.warnings[0], "\n") {
			t.Errorf("--cache-from %s: warnings %q, want one line with %q", from, r.warnings, want)
		}
	}
}

func TestTargetsThatFail(t *testing.T) {
	r := newRunner(t)
	m := r.make("one", "1", true)
	err := r.open(nil, []string{"127.0.0.1:1/x:1"}).Export(t.Context(), []Made{m}, nil)
	if err == nil || !strings.Contains(err.Error(), "127.0.0.1:1/x:1") {
		t.Errorf("Export to nowhere = %v, want an error with the reference", err)
	}
	dir := t.TempDir()
	c := r.open(nil, []string{"type=registry,ref=127.0.0.1:1/x:1,ignore-error=true", "type=local,dest=" + dir})
	if err := c.Export(t.Context(), []Made{m}, nil); err != nil {
		t.Errorf("Export with ignore-error=true = %v", err)
	}
	if len(r.warnings) != 1 {
		t.Errorf("warnings: %q, want one", r.warnings)
	}
	if _, err := os.Stat(filepath.Join(dir, "index.json")); errors.Is(err, fs.ErrNotExist) {
		t.Error("the target after the one that failed was not written")
	}
}

// A registry that accepts connections and never answers is asked once, however many layers there are.
func TestSilentTarget(t *testing.T) {
	done := make(chan struct{})
	var asked atomic.Int32
	srv := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		asked.Add(1)
		select {
		case <-done:
		case <-r.Context().Done():
		}
	}))
	t.Cleanup(srv.Close)
	t.Cleanup(func() { close(done) })
	t.Setenv("DOCKER_CONFIG", t.TempDir())
	r := newRunner(t)
	c := r.open(nil, []string{"type=registry,mode=max,ignore-error=true,ref=" + strings.TrimPrefix(srv.URL, "http://") + "/c:1"})
	c.answer = time.Second
	var made []Made
	for i := range 6 {
		made = append(made, r.make(fmt.Sprint(i), fmt.Sprint(i), false))
		c.Offer(t.Context(), made[i])
	}
	if err := c.Export(t.Context(), made, nil); err != nil {
		t.Errorf("Export with ignore-error=true = %v", err)
	}
	if n := asked.Load(); n != 1 {
		t.Errorf("the registry was asked %d times, want once", n)
	}
	if len(r.warnings) != 1 || !strings.Contains(r.warnings[0], "no answer within 1s") {
		t.Errorf("warnings: %q, want one", r.warnings)
	}
}

func TestCompression(t *testing.T) {
	dir := t.TempDir()
	r := newRunner(t)
	m := r.make("one", "1", true)
	if _, err := r.store.Blob(t.Context(), m.Layer, layer.Compression{Algorithm: layer.Gzip}, false); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct{ attrs, want string }{
		{"", "+gzip"},
		{",compression=zstd", "+gzip"},
		{",compression=zstd,force-compression=true", "+zstd"},
	} {
		r.export(r.open(nil, []string{"type=local,dest=" + dir + test.attrs}), m)
		c := r.open([]string{"type=local,src=" + dir}, nil)
		e, ok := c.sources[0].find(t.Context(), m.Key)
		if !ok || !strings.HasSuffix(e.blob.MediaType, test.want) {
			t.Errorf("%s: blob is %s, want %s", test.attrs, e.blob.MediaType, test.want)
		}
	}
}

// TestStillBucket has the transfer of a blob to a bucket stand still, which is an error, and one from it, which goes on over
// another connection.
func TestStillBucket(t *testing.T) {
	data := bytes.Repeat([]byte("0123456789abcdef"), 1<<20) // more than the buffers of a connection take
	var mu sync.Mutex
	still := map[string]bool{http.MethodPut: true, http.MethodGet: true} // the first of each
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		stop, first := still[r.Method], len(still) == 2
		delete(still, r.Method)
		mu.Unlock()
		w.Header().Set("ETag", `"x"`)
		w.Header().Set("Last-Modified", time.Unix(1e9, 0).UTC().Format(http.TimeFormat))
		switch {
		case r.Method == http.MethodPut:
			io.CopyN(io.Discard, r.Body, 100)
			<-r.Context().Done()
		case r.Method == http.MethodHead && first:
			w.WriteHeader(http.StatusNotFound)
		case stop:
			w.Header().Set("Content-Length", fmt.Sprint(len(data)))
			w.Write(data[:1000])
			w.(http.Flusher).Flush()
			<-r.Context().Done()
		default:
			http.ServeContent(w, r, "", time.Unix(1e9, 0), bytes.NewReader(data))
		}
	}))
	t.Cleanup(srv.CloseClientConnections)
	specs, err := ParseFrom("type=s3,bucket=bucket,region=r,access_key_id=i,secret_access_key=s,endpoint_url=" + srv.URL)
	if err != nil {
		t.Fatal(err)
	}
	b, err := newBucket(Options{Now: time.Now, Getenv: func(string) string { return "" }}, specs[0], 200*time.Millisecond)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	d := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayer, Digest: digest.FromBytes(data), Size: int64(len(data))}
	open := func(context.Context) (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(data)), nil }
	if err := b.put(ctx, d, open); err == nil || ctx.Err() != nil {
		t.Error("put:", err)
	}
	r, err := b.open(ctx, d)
	if err != nil {
		t.Fatal("open:", err)
	}
	defer r.Close()
	if got, err := io.ReadAll(r); err != nil || !bytes.Equal(got, data) {
		t.Errorf("%d of %d bytes came back: %v", len(got), len(data), err)
	}
	if len(still) > 0 {
		t.Errorf("%v did not stand still", still)
	}
}
