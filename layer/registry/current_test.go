package registry

import (
	"testing"

	"github.com/opencontainers/go-digest"
)

func TestCurrent(t *testing.T) {
	s := serve(t)
	c := open(Options{})
	one, _ := push(t, c, s.host+"/a:1", []byte("one"))
	if d, err := c.Resolve(t.Context(), s.host+"/a:1"); err != nil || d.Digest != one.Digest {
		t.Fatalf("Resolve = %v, %v", d.Digest, err)
	}
	two, data := push(t, open(Options{}), s.host+"/a:1", []byte("two"))
	if d, err := c.Current(t.Context(), s.host+"/a:1"); err != nil || d.Digest != two.Digest {
		t.Errorf("Current = %v, %v, want %s", d.Digest, err, two.Digest)
	}
	if d, got, err := c.Latest(t.Context(), s.host+"/a:1"); err != nil || d.Digest != two.Digest || string(got) != string(data) {
		t.Errorf("Latest = %v, %v, want %s", d.Digest, err, two.Digest)
	}
	if _, err := c.Current(t.Context(), s.host+"/a:none"); !Is(err, NotFound) {
		t.Errorf("Current of nothing = %v, want NotFound", err)
	}
}

// What is known of a repository is not asked for; if it was not true, the second push puts it right.
func TestKnow(t *testing.T) {
	host := distribution(t)
	credentialsFor(t, "nobody.example")
	blobs := imageOf(1)
	m := manifestOf(blobs)
	d := blobOf(m)
	d.MediaType = "application/vnd.oci.image.manifest.v1+json"
	c := open(Options{})
	pushAll := func(ref string) error {
		for _, b := range blobs {
			err := c.PushBlob(t.Context(), ref, blobOf(b), nil, opener(b))
			if err != nil {
				return err
			}
		}
		return c.PushManifest(t.Context(), ref, d, m)
	}
	for _, b := range blobs {
		c.Know(host+"/know/a:1", digest.FromBytes(b))
	}
	err := pushAll(host + "/know/a:1")
	if !Is(err, Incomplete) {
		t.Fatalf("push of a manifest without its blobs = %v, want Incomplete", err)
	}
	if err := pushAll(host + "/know/a:1"); err != nil {
		t.Fatalf("push after that = %v", err)
	}
	c.Know(host+"/know/a:1", digest.FromBytes(blobs[0]))
	c.Doubt(host+"/know/a:1", digest.FromBytes(blobs[0]))
	if n, _ := parse(host + "/know/a:1"); len(c.known(c.origin(n), digest.FromBytes(blobs[0]))) != 0 {
		t.Error("what was doubted is still known")
	}
}
