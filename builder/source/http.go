package source

import (
	"bufio"
	"context"
	"crypto/sha256"
	_ "crypto/sha512" // for --checksum=sha512: and sha384:
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"path"
	"strings"
	"time"
	"unicode"

	"github.com/opencontainers/go-digest"

	"filo/layer/rootfs"
)

// unnamed is what a file is called whose URL has no last name.
const unnamed = "__unnamed__"

// download is the answer to a GET.
type download struct {
	body   *os.File // at its beginning; closing it gives the space free
	size   int64
	digest digest.Digest // SHA-256
	header http.Header
}

// openHTTP opens a build context by http: an archive, or text that is a Dockerfile.
func openHTTP(ctx context.Context, ref string, o Options) (*Source, error) {
	d, err := get(ctx, ref, "", o)
	if err != nil {
		return nil, fmt.Errorf("open context: %w", err)
	}
	defer d.body.Close()
	s, err := openStream(ctx, bufio.NewReader(d.body), o)
	if err != nil {
		return nil, fmt.Errorf("open context %s: %w", redact(ref), err)
	}
	s.Identity = d.digest.String()
	if t := d.modified(); t != nil {
		s.Modified = t
	}
	return s, nil
}

// fetchHTTP fetches one file.
func fetchHTTP(ctx context.Context, ref, checksum string, o Options) (Fetched, error) {
	want := digest.Digest(checksum)
	if checksum != "" {
		if err := want.Validate(); err != nil {
			return Fetched{}, fmt.Errorf("fetch %s: checksum %q: %w", redact(ref), checksum, err)
		}
	}
	d, err := get(ctx, ref, want, o)
	if err != nil {
		return Fetched{}, fmt.Errorf("fetch: %w", err)
	}
	st := rootfs.Stat{Mode: 0o600, Size: d.size}
	modified := d.modified()
	if modified != nil {
		st.Sec = *modified
	}
	name := baseName(ref)
	t := oneFile(d.body, name, st)
	return Fetched{FS: t, Name: name, Identity: d.digest.String(), Modified: modified, Close: t.Close}, nil
}

// baseName is the name that a file gets from its URL. What the server would call it does not count.
func baseName(ref string) string {
	u, err := url.Parse(ref)
	if err != nil {
		return unnamed
	}
	base := path.Base(u.Path)
	if base == "/" || !valid(base) || base == "." || strings.ContainsFunc(base, unicode.IsControl) {
		return unnamed
	}
	return base
}

// backoff is how often and at what pace a request is tried again.
type backoff struct {
	tries int
	first time.Duration // doubled from try to try
}

func (b backoff) orUsual() backoff {
	if b.tries == 0 {
		return backoff{tries: 4, first: 250 * time.Millisecond}
	}
	return b
}

// get returns what ref gives, after verifying the checksum want if there is one.
func get(ctx context.Context, ref string, want digest.Digest, o Options) (*download, error) {
	old := o.kept(ref)
	if old != nil && old.digest == want {
		return old, nil
	}
	d, err := ask(ctx, ref, old, o)
	if old != nil && d != old {
		err = errors.Join(err, old.body.Close())
	}
	if err == nil && want != "" {
		err = d.verify(want)
	}
	if err != nil {
		if d != nil {
			err = errors.Join(err, d.body.Close())
		}
		return nil, fmt.Errorf("GET %s: %w", redact(ref), err)
	}
	if d != old {
		o.keep(ref, d)
	}
	return d, nil
}

// ask downloads ref, again if the server or the way there is at fault. It returns old if that is still current.
func ask(ctx context.Context, ref string, old *download, o Options) (*download, error) {
	req, err := newRequest(ctx, ref, o)
	if err != nil {
		return nil, err
	}
	if old != nil {
		for condition, of := range map[string]string{"If-None-Match": "ETag", "If-Modified-Since": "Last-Modified"} {
			if v := old.header.Get(of); v != "" {
				req.Header.Set(condition, v)
			}
		}
	}
	c := newClient(o)
	pace := o.retry.orUsual()
	for try, wait := 1, pace.first; ; try, wait = try+1, wait*2 {
		d, again, err := askOnce(c, req, old, o.Temp)
		if err == nil || !again || try == pace.tries || ctx.Err() != nil {
			return d, err
		}
		select {
		case <-ctx.Done():
			return nil, err
		case <-time.After(wait):
		}
	}
}

// newClient returns a client that takes credentials to no other host than that of the first request. net/http's own would
// take them to another port, a subdomain, and from https to http.
func newClient(o Options) *http.Client {
	return &http.Client{Transport: o.Transport, CheckRedirect: func(next *http.Request, via []*http.Request) error {
		if len(via) >= maxRedirects {
			return fmt.Errorf("more than %d redirects", maxRedirects)
		}
		if !isHome(via[0].URL, next.URL) {
			next.Header.Del("Authorization")
		}
		return nil
	}}
}

const maxRedirects = 10

// isHome reports whether a URL is on the host of another one and as safe on the way.
func isHome(of, u *url.URL) bool {
	return u.Host == of.Host && (u.Scheme == of.Scheme || u.Scheme == "https")
}

// askOnce is one try of ask; again reports whether another one could do better.
func askOnce(c *http.Client, req *http.Request, old *download, temp string) (_ *download, again bool, err error) {
	resp, err := c.Do(req)
	if err != nil {
		return nil, !isFinal(err), plain(err)
	}
	defer resp.Body.Close()
	switch code := resp.StatusCode; {
	case code == http.StatusOK:
		d, err := save(resp, temp)
		return d, true, err
	case code == http.StatusNotModified && old != nil:
		return old, false, nil
	case code >= 500 || code == http.StatusTooManyRequests:
		return nil, true, errors.New(resp.Status)
	}
	return nil, false, errors.New(resp.Status)
}

// isFinal reports whether a connection will fail the same way again: no such host, or not the one it should be.
func isFinal(err error) bool {
	var name *net.DNSError
	var cert *tls.CertificateVerificationError
	return errors.As(err, &name) && name.IsNotFound || errors.As(err, &cert)
}

// save writes the body of resp to a file in the directory temp.
func save(resp *http.Response, temp string) (*download, error) {
	body, err := newSpool(temp)
	if err != nil {
		return nil, err
	}
	h := sha256.New()
	size, err := io.Copy(io.MultiWriter(body, h), resp.Body)
	if err == nil {
		_, err = body.Seek(0, io.SeekStart)
	}
	if err != nil {
		return nil, errors.Join(err, body.Close())
	}
	return &download{body: body, size: size, digest: digest.NewDigest(digest.SHA256, h), header: resp.Header}, nil
}

// modified returns the time of Last-Modified, nil if there is none.
func (d *download) modified() *int64 {
	t, err := http.ParseTime(d.header.Get("Last-Modified"))
	if err != nil {
		return nil
	}
	sec := t.Unix()
	return &sec
}

// verify checks that d has the digest want, of whatever algorithm.
func (d *download) verify(want digest.Digest) error {
	got := d.digest
	if want.Algorithm() != got.Algorithm() {
		var err error
		if got, err = want.Algorithm().FromReader(io.NewSectionReader(d.body, 0, d.size)); err != nil {
			return err
		}
	}
	if got != want {
		return fmt.Errorf("digest mismatch: got %s, want %s", got, want)
	}
	return nil
}

// newRequest makes the GET for ref, with the credentials that secrets hold for its host.
func newRequest(ctx context.Context, ref string, o Options) (*http.Request, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, ref, nil)
	if err != nil {
		return nil, plain(err)
	}
	if o.UserAgent != "" {
		req.Header.Set("User-Agent", o.UserAgent)
	}
	host := req.URL.Hostname()
	// As in BuildKit a token wins over a header.
	if token, ok := o.secret("HTTP_AUTH_TOKEN_" + host); ok {
		req.Header.Set("Authorization", "Bearer "+token)
	} else if header, ok := o.secret("HTTP_AUTH_HEADER_" + host); ok {
		req.Header.Set("Authorization", header)
	}
	return req, nil
}

// secret returns the secret id without the line end that files and commands leave behind it.
func (o Options) secret(id string) (string, bool) {
	if o.Secret == nil {
		return "", false
	}
	b, ok := o.Secret(id)
	return strings.TrimSpace(string(b)), ok
}

// plain takes the URL out of an error of net/http: it can hold a password.
func plain(err error) error {
	var u *url.Error
	if errors.As(err, &u) {
		return u.Err
	}
	return err
}
