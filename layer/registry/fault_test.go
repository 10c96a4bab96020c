package registry

import (
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"
)

// distribution starts the distribution registry and returns its address.
func distribution(t *testing.T) string {
	t.Helper()
	path, err := exec.LookPath("docker-registry")
	if err != nil {
		t.Skip("the distribution registry is not installed (Debian: docker-registry)")
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := l.Addr().String()
	l.Close()
	dir := t.TempDir()
	config := filepath.Join(dir, "config.yml")
	text := fmt.Sprintf("version: 0.1\nlog: {level: error, accesslog: {disabled: true}}\nstorage: {filesystem: {rootdirectory: %s}}\nhttp: {addr: %s}\n", dir, addr)
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(path, "serve", config)
	cmd.Env = append(os.Environ(), "OTEL_TRACES_EXPORTER=none")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	for range 500 {
		if resp, err := http.Get("http://" + addr + "/v2/"); err == nil {
			resp.Body.Close()
			return addr
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatal("the registry does not start")
	return ""
}

// faults stands before a registry and spoils, by chance but never more often in a row than a client must bear, what
// goes through it.
type faults struct {
	upstream string
	auth     string // "", "basic" or "token"
	host     string

	mu   sync.Mutex
	rand *rand.Rand
	row  map[string]int // faults in a row by method and path
	left map[string]int // requests that a token still does
	seen map[string]int
}

func spoiling(t *testing.T, upstream, auth string, seed uint64) *faults {
	f := &faults{upstream: upstream, auth: auth, rand: rand.New(rand.NewPCG(seed, seed)), row: map[string]int{}, left: map[string]int{}, seen: map[string]int{}}
	srv := httptest.NewUnstartedServer(f)
	srv.Config.ErrorLog = nil
	srv.Start()
	t.Cleanup(srv.Close)
	f.host = strings.TrimPrefix(srv.URL, "http://")
	return f
}

// fault picks what happens to a request.
func (f *faults) fault(r *http.Request) string {
	f.mu.Lock()
	defer f.mu.Unlock()
	key, inRow := r.Method+" "+r.URL.Path, 3
	switch r.Method { // a body that breaks takes more than its own request to send again
	case http.MethodPut:
		key, inRow = r.Method+" "+r.URL.Query().Get("digest")+r.URL.Path[:len("/v2/fault/r0")], 2
	case http.MethodPatch, http.MethodPost, http.MethodDelete:
		inRow = 1
	}
	kinds := []string{"reset", "500", "503", "429", "slow"}
	switch {
	case r.Method == http.MethodGet:
		kinds = append(kinds, "cut", "cut", "cut")
	case r.Method == http.MethodPut || r.Method == http.MethodPatch:
		kinds = append(kinds, "half", "half", "half", "unheard")
	}
	if f.row[key] >= inRow || f.rand.IntN(100) >= 35 {
		f.row[key] = 0
		return ""
	}
	f.row[key]++
	kind := kinds[f.rand.IntN(len(kinds))]
	f.seen[kind]++
	return kind
}

// allowed checks the authorization; tokens run out after a few requests.
func (f *faults) allowed(w http.ResponseWriter, r *http.Request) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	got := r.Header.Get("Authorization")
	basic := "Basic " + base64.StdEncoding.EncodeToString([]byte("u:p"))
	switch {
	case f.auth == "":
		return true
	case f.auth == "basic" && got == basic:
		return true
	case f.auth == "basic":
		w.Header().Set("WWW-Authenticate", `Basic realm="x"`)
	case r.URL.Path == "/token":
		if got != basic {
			break
		}
		token := fmt.Sprint("t", len(f.left))
		f.left[token] = 25
		fmt.Fprintf(w, `{"token":%q}`, token)
		return false
	case f.left[strings.TrimPrefix(got, "Bearer ")] > 0:
		f.left[strings.TrimPrefix(got, "Bearer ")]--
		return true
	default:
		f.seen["expired"]++
		w.Header().Set("WWW-Authenticate", fmt.Sprintf(`Bearer realm="http://%s/token",service="x"`, f.host))
	}
	w.WriteHeader(http.StatusUnauthorized)
	return false
}

func (f *faults) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if !f.allowed(w, r) {
		return
	}
	kind := f.fault(r)
	switch kind {
	case "reset":
		drop(w)
		return
	case "500":
		w.WriteHeader(http.StatusInternalServerError)
		return
	case "503":
		w.WriteHeader(http.StatusServiceUnavailable)
		return
	case "429":
		w.Header().Set("Retry-After", "0")
		w.WriteHeader(http.StatusTooManyRequests)
		return
	case "slow":
		time.Sleep(2 * time.Millisecond)
	}
	f.forward(w, r, kind)
}

// drop closes the connection.
func drop(w http.ResponseWriter) {
	if c, _, err := w.(http.Hijacker).Hijack(); err == nil {
		c.(*net.TCPConn).SetLinger(0)
		c.Close()
	}
}

func (f *faults) forward(w http.ResponseWriter, r *http.Request, kind string) {
	var body io.Reader = r.Body
	if kind == "half" {
		body = io.MultiReader(io.LimitReader(r.Body, r.ContentLength/2), breaking{})
	}
	req, err := http.NewRequest(r.Method, "http://"+f.upstream+r.URL.RequestURI(), body)
	if err != nil {
		drop(w)
		return
	}
	req.Header, req.ContentLength = r.Header.Clone(), r.ContentLength
	req.Header.Del("Authorization")
	resp, err := http.DefaultTransport.RoundTrip(req)
	if err != nil || kind == "unheard" {
		if err == nil {
			resp.Body.Close()
		}
		drop(w)
		return
	}
	defer resp.Body.Close()
	for k, v := range resp.Header {
		w.Header()[k] = v
	}
	if at, err := url.Parse(resp.Header.Get("Location")); err == nil && at.Host != "" {
		at.Host = f.host
		w.Header().Set("Location", at.String())
	}
	w.WriteHeader(resp.StatusCode)
	if kind == "cut" && resp.ContentLength > 1 {
		io.CopyN(w, resp.Body, resp.ContentLength/2)
		w.(http.Flusher).Flush()
		drop(w)
		return
	}
	io.Copy(w, resp.Body)
}

// breaking is a connection that breaks.
type breaking struct{}

func (breaking) Read([]byte) (int, error) { return 0, errors.New("broken") }

// credentialsFor makes Docker's configuration hold u:p for a host.
func credentialsFor(t *testing.T, host string) {
	t.Helper()
	dir := t.TempDir()
	t.Setenv("DOCKER_CONFIG", dir)
	text := fmt.Sprintf(`{"auths":{%q:{"auth":%q}}}`, host, base64.StdEncoding.EncodeToString([]byte("u:p")))
	if err := os.WriteFile(filepath.Join(dir, "config.json"), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// An image of some blobs, made from a number.
func imageOf(n int) (blobs [][]byte) {
	r := rand.New(rand.NewPCG(7, uint64(n)))
	for range 3 {
		b := make([]byte, 1+r.IntN(60_000))
		for i := 0; i+8 <= len(b); i += 8 {
			v := r.Uint64()
			for j := range 8 {
				b[i+j] = byte(v >> (8 * j))
			}
		}
		blobs = append(blobs, b)
	}
	return append(blobs, []byte(fmt.Sprintf(`{"n":%d}`, n)))
}

func manifestOf(blobs [][]byte) []byte {
	config := blobs[len(blobs)-1]
	var layers []string
	for _, b := range blobs[:len(blobs)-1] {
		d := blobOf(b)
		layers = append(layers, fmt.Sprintf(`{"mediaType":%q,"digest":%q,"size":%d}`, d.MediaType, d.Digest, d.Size))
	}
	d := blobOf(config)
	return []byte(fmt.Sprintf(`{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":{"mediaType":"application/vnd.oci.image.config.v1+json","digest":%q,"size":%d},"layers":[%s]}`,
		d.Digest, d.Size, strings.Join(layers, ",")))
}

// 200 pushes and 200 pulls through a network that breaks all the time: none is wrong, none fails.
func TestThroughFaults(t *testing.T) {
	upstream := distribution(t)
	for i, auth := range []string{"", "basic", "token"} {
		t.Run("auth "+auth, func(t *testing.T) {
			f := spoiling(t, upstream, auth, uint64(i+1))
			credentialsFor(t, f.host)
			begin, n := i*70, 70
			if i == 2 {
				n = 60
			}
			each(t, begin, n, func(ctx context.Context, i int) error { return pushImage(ctx, f.host, i) })
			credentialsFor(t, "nobody.example") // the registry itself wants none
			clean := open(Options{})
			each(t, begin, n, func(ctx context.Context, i int) error { return pullImage(ctx, clean, upstream, i) })
			credentialsFor(t, f.host)
			each(t, begin, n, func(ctx context.Context, i int) error { return pullImage(ctx, open(Options{}), f.host, i) })
			t.Logf("faults: %v", f.seen)
		})
	}
}

func each(t *testing.T, begin, n int, do func(context.Context, int) error) {
	t.Helper()
	g, ctx := errgroup.WithContext(t.Context())
	g.SetLimit(12)
	for i := begin; i < begin+n; i++ {
		g.Go(func() error {
			if err := do(ctx, i); err != nil {
				return fmt.Errorf("image %d: %w", i, err)
			}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		t.Fatal(err)
	}
}

func refOf(host string, i int) string { return fmt.Sprintf("%s/fault/r%d:t%d", host, i%5, i) }

func pushImage(ctx context.Context, host string, i int) error {
	c := open(Options{})
	blobs := imageOf(i)
	g, gctx := errgroup.WithContext(ctx)
	for _, b := range blobs {
		g.Go(func() error { return c.PushBlob(gctx, refOf(host, i), blobOf(b), nil, opener(b)) })
	}
	if err := g.Wait(); err != nil {
		return err
	}
	m := manifestOf(blobs)
	d := blobOf(m)
	d.MediaType = "application/vnd.oci.image.manifest.v1+json"
	return c.PushManifest(ctx, refOf(host, i), d, m)
}

func pullImage(ctx context.Context, c *Client, host string, i int) error {
	blobs := imageOf(i)
	d, data, err := c.Manifest(ctx, refOf(host, i), "")
	if err != nil {
		return err
	}
	if !bytes.Equal(data, manifestOf(blobs)) {
		return fmt.Errorf("another manifest, %s", d.Digest)
	}
	for j, b := range blobs {
		r, err := c.Blob(ctx, refOf(host, i), blobOf(b))
		if err != nil {
			return err
		}
		got, err := io.ReadAll(r)
		r.Close()
		if err != nil {
			return err
		}
		if !bytes.Equal(got, b) {
			return fmt.Errorf("blob %d is wrong", j)
		}
	}
	return nil
}

// An upload that breaks goes on where the registry says that it stopped. The distribution registry never says, so the
// server here is one that does what the specification has.
func TestUploadGoesOn(t *testing.T) {
	var mu sync.Mutex
	var have []byte
	var log []string
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		defer mu.Unlock()
		log = append(log, strings.TrimSpace(r.Method+" "+r.Header.Get("Content-Range")))
		w.Header().Set("Location", "/v2/a/blobs/uploads/1")
		w.Header().Set("Range", fmt.Sprintf("0-%d", max(len(have), 1)-1))
		switch r.Method {
		case http.MethodHead:
			w.WriteHeader(http.StatusNotFound)
		case http.MethodPost:
			w.WriteHeader(http.StatusAccepted)
		case http.MethodGet:
			if r.URL.Path != "/v2/" {
				w.WriteHeader(http.StatusNoContent)
			}
		case http.MethodPatch, http.MethodPut:
			if len(have) < 3<<20 { // two connections break
				part, _ := io.ReadAll(io.LimitReader(r.Body, 3<<19))
				have = append(have, part...)
				drop(w)
				return
			}
			part, _ := io.ReadAll(r.Body)
			have = append(have, part...)
			w.WriteHeader(map[string]int{http.MethodPatch: http.StatusAccepted, http.MethodPut: http.StatusCreated}[r.Method])
		}
	}))
	t.Cleanup(srv.Close)
	credentialsFor(t, "nobody.example")
	data := bytes.Repeat([]byte("0123456789abcdef"), 1<<18)
	ref := strings.TrimPrefix(srv.URL, "http://") + "/a:1"
	if err := open(Options{}).PushBlob(t.Context(), ref, blobOf(data), nil, opener(data)); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(have, data) {
		t.Errorf("%d bytes arrived, want the %d that were sent", len(have), len(data))
	}
	want := "GET, HEAD, POST, PUT, HEAD, GET, PATCH 1572864-4194303, HEAD, GET, PATCH 3145728-4194303, PUT"
	if got := strings.Join(log, ", "); got != want {
		t.Errorf("asked %s, want %s", got, want)
	}
}

// keeping is a registry for one blob that keeps what arrived of a request that broke, and says so: the specification
// has it so, the distribution registry forgets such an upload.
type keeping struct {
	mu   sync.Mutex
	have []byte
	done bool
}

func (k *keeping) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	k.mu.Lock()
	defer k.mu.Unlock()
	var from int
	fmt.Sscanf(r.Header.Get("Content-Range"), "%d-", &from)
	if r.Method == http.MethodPatch && from != len(k.have) {
		w.WriteHeader(http.StatusRequestedRangeNotSatisfiable)
		return
	}
	if r.Method == http.MethodPatch || r.Method == http.MethodPut {
		part, err := io.ReadAll(r.Body)
		k.have = append(k.have, part...)
		if err != nil {
			return
		}
	}
	w.Header().Set("Location", "/v2/a/blobs/uploads/1")
	w.Header().Set("Range", fmt.Sprintf("0-%d", max(len(k.have), 1)-1))
	switch {
	case r.URL.Path == "/v2/":
	case r.Method == http.MethodHead && !k.done:
		w.WriteHeader(http.StatusNotFound)
	case r.Method == http.MethodPost || r.Method == http.MethodPatch:
		w.WriteHeader(http.StatusAccepted)
	case r.Method == http.MethodPut:
		k.done = true
		w.WriteHeader(http.StatusCreated)
	case strings.Contains(r.URL.Path, "/uploads/"):
		w.WriteHeader(http.StatusNoContent)
	default:
		w.Write(k.have)
	}
}

// narrow stands before a registry and lets no body larger than most through: it says so (413), or if there are kinds
// of faults breaks the connection, and spoils every third chunk as well.
type narrow struct {
	*faults
	most  int64
	kinds []string

	mu     sync.Mutex
	sent   int64 // bytes of bodies
	chunks int
}

// spoil picks what happens to a request.
func (n *narrow) spoil(r *http.Request) string {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.sent += min(r.ContentLength, n.most)
	if r.ContentLength > n.most {
		if len(n.kinds) == 0 {
			return "413"
		}
		return "reset"
	}
	if r.Method != http.MethodPatch {
		return ""
	}
	n.chunks++
	if len(n.kinds) == 0 || n.chunks%3 > 0 {
		return ""
	}
	return n.kinds[n.chunks/3%len(n.kinds)]
}

func (n *narrow) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	switch kind := n.spoil(r); kind {
	case "reset":
		io.CopyN(io.Discard, r.Body, n.most)
		drop(w)
	case "413":
		w.WriteHeader(http.StatusRequestEntityTooLarge)
	case "429":
		w.Header().Set("Retry-After", time.Now().Add(-time.Hour).UTC().Format(http.TimeFormat))
		w.WriteHeader(http.StatusTooManyRequests)
	default:
		n.forward(w, r, kind)
	}
}

// A large blob goes through a proxy that takes no large body, in chunks; those that arrived are not sent again.
func TestChunks(t *testing.T) {
	kept := httptest.NewServer(&keeping{})
	t.Cleanup(kept.Close)
	for _, test := range []struct {
		name, upstream string
		chunk          int64
		kinds          []string
	}{
		{"413", distribution(t), 4 << 20, nil},
		{"breaks", distribution(t), 1 << 20, []string{"429", "reset"}},
		{"keeps", strings.TrimPrefix(kept.URL, "http://"), 1 << 20, []string{"429", "reset", "half", "unheard"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			n := &narrow{faults: &faults{upstream: test.upstream}, most: 1 << 20, kinds: test.kinds}
			srv := httptest.NewServer(n)
			t.Cleanup(srv.Close)
			n.host = strings.TrimPrefix(srv.URL, "http://")
			credentialsFor(t, "nobody.example")
			data := make([]byte, 13<<20+12345)
			rand.NewChaCha8([32]byte{}).Read(data)
			c := open(Options{})
			c.chunk = test.chunk
			if err := c.PushBlob(t.Context(), n.host+"/a:1", blobOf(data), nil, opener(data)); err != nil {
				t.Fatal(err)
			}
			r, err := open(Options{}).Blob(t.Context(), test.upstream+"/a:1", blobOf(data))
			if err != nil {
				t.Fatal(err)
			}
			defer r.Close()
			got, err := io.ReadAll(r)
			if err != nil || !bytes.Equal(got, data) {
				t.Errorf("%d bytes arrived, %v, want the %d that were sent", len(got), err, len(data))
			}
			if t.Logf("%d chunks, %d bytes sent for %d", n.chunks, n.sent, len(data)); n.chunks < 14 || n.sent > 2*int64(len(data)) {
				t.Error("want at least 14 chunks, and not twice as many bytes")
			}
		})
	}
}

// What the header says, and what an error of a request that is sent again elsewhere keeps of it.
func TestRetryAfterForms(t *testing.T) {
	for _, test := range []struct {
		after, date string
		want        time.Duration
		says        bool
	}{
		{"", "", 0, false},
		{"7", "", 7 * time.Second, true},
		{" 0 ", "", 0, true},
		{"-1", "", 0, false},
		{"99999999999", "", 0, false},
		{"soon", "", 0, false},
		{"Fri, 31 Dec 1999 23:59:59 GMT", "Fri, 31 Dec 1999 23:59:49 GMT", 10 * time.Second, true},
		{"Fri, 31 Dec 1999 23:59:59 GMT", "Sat, 01 Jan 2000 00:00:00 GMT", 0, true}, // it is over
		{"Fri, 31 Dec 1999 23:59:59 GMT", "", 0, false},                             // whose clock?
		{"Friday, 31-Dec-99 23:59:59 GMT", "Fri, 31 Dec 1999 23:59:00 GMT", 59 * time.Second, true},
	} {
		resp := &http.Response{StatusCode: 429, Body: http.NoBody, Header: http.Header{"Retry-After": {test.after}, "Date": {test.date}}}
		got, says := retryAfter(resp)
		if got != test.want || says != test.says {
			t.Errorf("Retry-After %q at %q = %s, %v, want %s, %v", test.after, test.date, got, says, test.want, test.says)
		}
		if wait, ok := told(answered(resp)); wait != test.want || !ok {
			t.Errorf("the error of Retry-After %q at %q says %s, %v, want %s", test.after, test.date, wait, ok, test.want)
		}
	}
	if _, ok := told(&Error{after: 2 * patience}); ok {
		t.Error("a wait of two minutes is accepted")
	}
}

// A server that takes a request and says nothing is asked again; the end of the caller's patience is the end.
func TestLateHeaders(t *testing.T) {
	var mu sync.Mutex
	asked := 0
	release := make(chan struct{})
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		asked++
		first := asked == 1
		mu.Unlock()
		if first {
			<-release
		}
	}))
	t.Cleanup(srv.Close)
	t.Cleanup(func() { close(release) })
	transport := http.DefaultTransport.(*http.Transport).Clone()
	transport.ResponseHeaderTimeout = 100 * time.Millisecond
	_, err := (&http.Client{Transport: transport}).Get(srv.URL)
	if err == nil || !broken(err) {
		t.Errorf("%v is not tried again", err)
	}
	ctx, cancel := context.WithDeadline(t.Context(), time.Now())
	defer cancel()
	<-ctx.Done()
	if broken(ctx.Err()) {
		t.Errorf("%v is tried again", ctx.Err())
	}
}

// A transfer that stands still is taken up again on another connection.
func TestStandstill(t *testing.T) {
	data := bytes.Repeat([]byte("0123456789abcdef"), 1<<21) // more than the buffers of a connection take
	k := &keeping{}
	var mu sync.Mutex
	still := map[string]bool{http.MethodPut: true, http.MethodGet: true} // the first of each
	release := make(chan struct{})
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		stop := still[r.Method] && (r.Method == http.MethodPut || strings.Contains(r.URL.Path, "/blobs/sha256:"))
		if stop {
			still[r.Method] = false
		}
		mu.Unlock()
		switch {
		case stop && r.Method == http.MethodPut:
			io.CopyN(io.Discard, r.Body, 100)
			<-release
			return
		case stop:
			w.Header().Set("Content-Length", fmt.Sprint(len(data)))
			w.Write(data[:1000])
			w.(http.Flusher).Flush()
			<-release
			return
		}
		k.ServeHTTP(w, r)
	}))
	t.Cleanup(srv.Close)
	t.Cleanup(func() { close(release) })
	credentialsFor(t, "nobody.example")
	ref := strings.TrimPrefix(srv.URL, "http://") + "/a:1"
	c := open(Options{})
	c.retry.still = 200 * time.Millisecond
	if err := c.PushBlob(t.Context(), ref, blobOf(data), nil, opener(data)); err != nil {
		t.Fatal(err)
	}
	got, err := read(t, c, ref, blobOf(data))
	if err != nil || !bytes.Equal(got, data) {
		t.Errorf("%d bytes came back, %v, want %d", len(got), err, len(data))
	}
	if still[http.MethodPut] || still[http.MethodGet] {
		t.Error("nothing stood still")
	}
}

// Answers that stand still before their end are not waited for: neither the one that says how a host wants to be spoken to,
// nor a token, nor one that is thrown away because there will be another try.
func TestStandingAnswers(t *testing.T) {
	for _, at := range []string{"/v2/", "/token", "/v2/a/manifests/1"} {
		for _, status := range []int{http.StatusOK, http.StatusBadRequest, http.StatusServiceUnavailable} {
			s := serve(t)
			stop := func(w http.ResponseWriter, r *http.Request) bool {
				if r.URL.Path != at || r.Method == http.MethodHead {
					return false
				}
				w.Header().Set("Content-Length", "100")
				w.WriteHeader(status)
				fmt.Fprint(w, " ")
				w.(http.Flusher).Flush()
				<-r.Context().Done()
				return true
			}
			if at == "/token" {
				tokens(t, s, stop)
			} else {
				s.set(stop)
			}
			c := open(Options{})
			c.retry.still = 50 * time.Millisecond
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
			_, _, err := c.Manifest(ctx, s.host+"/a:1", "")
			if err == nil || ctx.Err() != nil {
				t.Errorf("%s answers %d: %v", at, status, err)
			}
			cancel()
		}
	}
}
