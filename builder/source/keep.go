package source

import (
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"strings"

	"github.com/opencontainers/go-digest"
)

// Downloads are kept in two files each, named by the SHA-256 of the URL in hexadecimal digits: HEX.json is a [note],
// HEX the bytes. Both appear by rename, the bytes first. The digest ties them together: bytes that have another are
// those of a write between, or damaged, and count as none. Any of these files may be removed at any time.

// note is what is remembered of a download.
type note struct {
	URL          string        `json:"url"` // without password, for people
	Digest       digest.Digest `json:"digest"`
	ETag         string        `json:"etag,omitempty"`
	LastModified string        `json:"lastModified,omitempty"`
}

// keptName is where the bytes of ref are kept.
func (o Options) keptName(ref string) string {
	return filepath.Join(o.Keep, digest.FromString(ref).Encoded())
}

// kept returns what is kept of ref, nil if that is nothing of use.
func (o Options) kept(ref string) *download {
	if o.Keep == "" {
		return nil
	}
	d, err := o.readKept(o.keptName(ref))
	if err != nil && !errors.Is(err, fs.ErrNotExist) && o.Repaired != nil {
		o.Repaired("download of " + redact(ref))
	}
	return d
}

func (o Options) readKept(name string) (*download, error) {
	b, err := os.ReadFile(name + ".json")
	if err != nil {
		return nil, err
	}
	var n note
	if err := json.Unmarshal(b, &n); err != nil {
		return nil, err
	}
	body, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	d := &download{body: body, digest: n.Digest, header: http.Header{}}
	d.header.Set("ETag", n.ETag)
	d.header.Set("Last-Modified", n.LastModified)
	h := digest.SHA256.Hash()
	if d.size, err = io.Copy(h, body); err == nil {
		_, err = body.Seek(0, io.SeekStart)
	}
	if err == nil && digest.NewDigest(digest.SHA256, h) != n.Digest {
		err = errors.New("the bytes have another digest than the note")
	}
	if err != nil {
		return nil, errors.Join(err, body.Close())
	}
	return d, nil
}

// keep remembers d, if the server can later say whether it is still current. That it cannot be kept is no error: it
// is downloaded again then.
func (o Options) keep(ref string, d *download) {
	n := note{URL: redact(ref), Digest: d.digest, ETag: d.header.Get("ETag"), LastModified: d.header.Get("Last-Modified")}
	if o.Keep == "" || n.ETag == "" && n.LastModified == "" || strings.Contains(d.header.Get("Cache-Control"), "no-store") {
		return
	}
	name := o.keptName(ref)
	if o.replace(name, io.NewSectionReader(d.body, 0, d.size)) != nil {
		return
	}
	b, err := json.Marshal(n)
	if err == nil {
		_ = o.replace(name+".json", strings.NewReader(string(b)))
	}
}

// replace writes what r gives to the file name, at once.
func (o Options) replace(name string, r io.Reader) (err error) {
	f, err := os.CreateTemp(o.Keep, "tmp-")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.Remove(f.Name()))
		}
	}()
	_, err = io.Copy(f, r)
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	return os.Rename(f.Name(), name)
}
