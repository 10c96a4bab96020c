package remote

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/gofrs/flock"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// localPlace keeps caches in a directory that is an OCI layout, each under a tag.
type localPlace struct {
	dir    string
	tag    string
	digest digest.Digest // read this manifest, whatever the tag
	reset  bool
	wrapping
}

func newLocalPlace(s Spec) (*localPlace, error) {
	p := &localPlace{
		dir: s.Text, tag: cmp.Or(s.attrs["tag"], "latest"), digest: digest.Digest(s.attrs["digest"]), reset: s.reset,
		wrapping: wrapping{s.imageManifest, s.ociTypes},
	}
	if p.digest != "" && !valid(p.digest) {
		return nil, fmt.Errorf("type=local: digest=%s: not a sha256 digest", p.digest)
	}
	return p, nil
}

// read implements place.
func (p *localPlace) read(context.Context) (*index, string, error) {
	if p.reset {
		return newIndex(), "", nil
	}
	d, err := p.find()
	if err != nil {
		return nil, "", err
	}
	if d == "" {
		x := newIndex()
		x.missing = true
		return x, "", nil
	}
	data, err := p.small(d)
	if err != nil {
		return nil, "", err
	}
	m, err := parseDocument(data)
	if err != nil {
		return nil, "", err
	}
	config, _ := m.cacheConfig()
	if config.Digest == "" {
		return nil, "", fmt.Errorf("%s: %s is not a cache", p.dir, d)
	}
	if data, err = p.small(config.Digest); err != nil {
		return nil, "", err
	}
	x, err := parseIndex(data)
	return x, d.String(), err
}

// find returns the manifest that the tag names, "" if there is none.
func (p *localPlace) find() (digest.Digest, error) {
	if p.digest != "" {
		return p.digest, nil
	}
	idx, err := p.layout()
	if err != nil {
		return "", err
	}
	for _, d := range idx.Manifests {
		if d.Annotations[ocispec.AnnotationRefName] == p.tag {
			return d.Digest, nil
		}
	}
	return "", nil
}

// layout reads index.json; of a directory without one it is empty.
func (p *localPlace) layout() (ocispec.Index, error) {
	idx := ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex}
	data, err := readSmall(filepath.Join(p.dir, "index.json"))
	if errors.Is(err, fs.ErrNotExist) {
		return idx, nil
	}
	if err == nil {
		err = json.Unmarshal(data, &idx)
	}
	if err != nil {
		return idx, fmt.Errorf("read %s: %w", filepath.Join(p.dir, "index.json"), err)
	}
	return idx, nil
}

func (p *localPlace) blob(d digest.Digest) (string, error) {
	if !valid(d) {
		return "", fmt.Errorf("%s: malformed digest %q", p.dir, string(d))
	}
	return filepath.Join(p.dir, "blobs", "sha256", d.Encoded()), nil
}

// small reads a blob that is held in memory, and verifies it.
func (p *localPlace) small(d digest.Digest) ([]byte, error) {
	path, err := p.blob(d)
	if err != nil {
		return nil, err
	}
	data, err := readSmall(path)
	if err == nil && digest.FromBytes(data) != d {
		err = fmt.Errorf("%s: its content has another digest", path)
	}
	return data, err
}

func readSmall(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxIndex+1))
	if len(data) > maxIndex {
		return nil, fmt.Errorf("%s: too large for an index", path)
	}
	return data, err
}

func (p *localPlace) open(_ context.Context, d ocispec.Descriptor) (io.ReadCloser, error) {
	path, err := p.blob(d.Digest)
	if err != nil {
		return nil, err
	}
	return os.Open(path)
}

func (p *localPlace) put(ctx context.Context, d ocispec.Descriptor, open func(context.Context) (io.ReadCloser, error)) error {
	path, err := p.blob(d.Digest)
	if err != nil {
		return err
	}
	if fi, err := os.Stat(path); err == nil && fi.Size() == d.Size {
		return nil
	}
	r, err := open(ctx)
	if err != nil {
		return err
	}
	defer r.Close()
	return replace(path, r)
}

// replace makes path hold what r gives, by rename.
func replace(path string, r io.Reader) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	f, err := os.CreateTemp(filepath.Dir(path), unfinished)
	if err != nil {
		return err
	}
	defer os.Remove(f.Name()) // after the rename there is nothing to remove
	_, err = io.Copy(f, r)
	if err = errors.Join(err, f.Chmod(0o644), f.Close()); err != nil {
		return err
	}
	return os.Rename(f.Name(), path)
}

// unfinished is what names of files begin with that are not complete. One that nobody wrote to for longer than abandoned is
// of a process that was killed.
const (
	unfinished = ".new-"
	abandoned  = 24 * time.Hour
)

// sweep removes what is abandoned, by the clock of the file system, which has just written index.json: every machine that
// exports to it may have another time.
func (p *localPlace) sweep() {
	now, err := os.Stat(filepath.Join(p.dir, "index.json"))
	if err != nil {
		return
	}
	dir := filepath.Join(p.dir, "blobs", "sha256")
	list, _ := os.ReadDir(dir) // what can't be listed stays
	for _, f := range list {
		if !strings.HasPrefix(f.Name(), unfinished) {
			continue
		}
		if info, err := f.Info(); err == nil && now.ModTime().Sub(info.ModTime()) > abandoned {
			_ = os.Remove(filepath.Join(dir, f.Name()))
		}
	}
}

// lockPause is how often a lock that another process holds is tried.
const lockPause = 20 * time.Millisecond

// write implements place.
func (p *localPlace) write(ctx context.Context, x *index, version string) error {
	config, manifest, err := p.wrap(x)
	if err != nil {
		return err
	}
	for _, d := range []document{config, manifest} {
		err := p.put(ctx, d.Descriptor, func(context.Context) (io.ReadCloser, error) { return io.NopCloser(bytesOf(d)), nil })
		if err != nil {
			return err
		}
	}
	lock := flock.New(filepath.Join(p.dir, "index.json.lock"))
	if _, err := lock.TryLockContext(ctx, lockPause); err != nil {
		return fmt.Errorf("lock %s: %w", p.dir, err)
	}
	defer lock.Unlock()
	if now, err := p.find(); err != nil || now.String() != version && !p.reset {
		return errors.Join(err, errStale)
	}
	idx, err := p.layout()
	if err != nil {
		return err
	}
	idx.Manifests = slices.DeleteFunc(idx.Manifests, func(d ocispec.Descriptor) bool {
		return p.reset || d.Annotations[ocispec.AnnotationRefName] == p.tag
	})
	d := manifest.Descriptor
	d.Annotations = map[string]string{ocispec.AnnotationRefName: p.tag}
	idx.Manifests = append(idx.Manifests, d)
	if err := p.putLayout(idx); err != nil {
		return err
	}
	p.sweep()
	if !p.reset {
		return nil
	}
	p.reset = false
	return p.clean(x, config, manifest)
}

func (p *localPlace) putLayout(idx ocispec.Index) error {
	data, err := json.MarshalIndent(idx, "", "  ")
	if err != nil {
		return err
	}
	for _, file := range []struct {
		name string
		data []byte
	}{{ocispec.ImageLayoutFile, []byte(`{"imageLayoutVersion":"1.0.0"}`)}, {"index.json", data}} {
		if err := replace(filepath.Join(p.dir, file.name), bytesOf(document{data: file.data})); err != nil {
			return err
		}
	}
	return nil
}

// clean removes the blobs that nothing refers to after reset=true.
func (p *localPlace) clean(x *index, documents ...document) error {
	keep := map[string]bool{}
	for _, e := range x.blobs() {
		keep[e.blob.Digest.Encoded()] = true
	}
	for _, d := range documents {
		keep[d.Digest.Encoded()] = true
	}
	dir := filepath.Join(p.dir, "blobs", "sha256")
	list, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, f := range list {
		if keep[f.Name()] || !valid(digest.NewDigestFromEncoded(digest.SHA256, f.Name())) {
			continue
		}
		if err := os.Remove(filepath.Join(dir, f.Name())); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

// kept implements place: write holds a lock, nothing is lost.
func (p *localPlace) kept(context.Context) (bool, error) { return true, nil }

// doubt implements place: whether a file is there is looked up each time. One that is damaged has to go.
func (p *localPlace) doubt(d digest.Digest) {
	if path, err := p.blob(d); err == nil {
		if data, err := digestOf(path); err == nil && data != d {
			_ = os.Remove(path) // best effort: it is of no use to anybody
		}
	}
}

func digestOf(path string) (digest.Digest, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	return digest.FromReader(f)
}
