package source

import (
	"bufio"
	"context"
	"crypto/sha256"
	_ "crypto/sha512" // for --checksum=sha512: and sha384:
	"errors"
	"fmt"
	"hash"
	"io"
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

// download is the answer to a GET. Its bytes lie in a file that vanishes when it is closed.
type download struct {
	body     *os.File
	size     int64
	digest   digest.Digest // SHA-256
	modified *int64        // Last-Modified
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
	if d.modified != nil {
		s.Modified = d.modified
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
	if d.modified != nil {
		st.Sec = *d.modified
	}
	name := baseName(ref)
	t := oneFile(d.body, name, st)
	return Fetched{FS: t, Name: name, Identity: d.digest.String(), Modified: d.modified, Close: t.Close}, nil
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
		return backoff{tries: 5, first: 250 * time.Millisecond}
	}
	return b
}

// get downloads ref, again if the server or the way there is at fault, and verifies its checksum if there is one.
func get(ctx context.Context, ref string, want digest.Digest, o Options) (_ *download, err error) {
	body, err := newSpool(o.Temp)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, body.Close())
		}
	}()
	c := &http.Client{Transport: o.Transport}
	pace := o.retry.orUsual()
	for try, wait := 1, pace.first; ; try, wait = try+1, wait*2 {
		d, again, err := getOnce(ctx, c, ref, body, want, o)
		if err == nil {
			return d, nil
		}
		if !again || try == pace.tries || ctx.Err() != nil {
			return nil, err
		}
		select {
		case <-ctx.Done():
			return nil, err
		case <-time.After(wait):
		}
	}
}

// getOnce is one try of get; again reports whether another one could do better.
func getOnce(ctx context.Context, c *http.Client, ref string, body *os.File, want digest.Digest, o Options) (_ *download, again bool, err error) {
	req, err := newRequest(ctx, ref, o)
	if err != nil {
		return nil, false, err
	}
	resp, err := c.Do(req)
	if err != nil {
		return nil, true, hidden(err, ref)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		again := resp.StatusCode >= 500 || resp.StatusCode == http.StatusTooManyRequests
		return nil, again, fmt.Errorf("GET %s: %s", redact(ref), resp.Status)
	}
	d, err := save(resp, body, want)
	if err != nil {
		return nil, true, fmt.Errorf("GET %s: %w", redact(ref), err)
	}
	if got := d.sum(want); want != "" && got != want {
		return nil, false, fmt.Errorf("GET %s: digest mismatch: got %s, want %s", redact(ref), got, want)
	}
	return d.download, false, nil
}

// summed is a download with the checksum that was asked for.
type summed struct {
	*download
	asked hash.Hash
}

func (s summed) sum(want digest.Digest) digest.Digest {
	if s.asked == nil {
		return s.digest
	}
	return digest.NewDigest(want.Algorithm(), s.asked)
}

// save writes the body of resp to the file body, from its beginning.
func save(resp *http.Response, body *os.File, want digest.Digest) (summed, error) {
	if err := body.Truncate(0); err != nil {
		return summed{}, err
	}
	if _, err := body.Seek(0, io.SeekStart); err != nil {
		return summed{}, err
	}
	h := sha256.New()
	w := io.MultiWriter(body, h)
	s := summed{download: &download{body: body}}
	if want != "" && want.Algorithm() != digest.SHA256 {
		s.asked = want.Algorithm().Hash()
		w = io.MultiWriter(body, h, s.asked)
	}
	var err error
	if s.size, err = io.Copy(w, resp.Body); err != nil {
		return summed{}, err
	}
	if _, err := body.Seek(0, io.SeekStart); err != nil {
		return summed{}, err
	}
	s.digest = digest.NewDigest(digest.SHA256, h)
	if t, err := http.ParseTime(resp.Header.Get("Last-Modified")); err == nil {
		sec := t.Unix()
		s.modified = &sec
	}
	return s, nil
}

// newRequest makes the GET for ref, with the credentials that secrets hold for its host.
func newRequest(ctx context.Context, ref string, o Options) (*http.Request, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, ref, nil)
	if err != nil {
		return nil, hidden(err, ref)
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

// hidden keeps the password of ref out of an error of net/http.
func hidden(err error, ref string) error {
	var u *url.Error
	if errors.As(err, &u) {
		return fmt.Errorf("GET %s: %w", redact(ref), u.Err)
	}
	return fmt.Errorf("GET %s: %w", redact(ref), err)
}
