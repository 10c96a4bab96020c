package export

import (
	"archive/tar"
	"cmp"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/gofrs/flock"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"filo/builder/image"
	"filo/layer"
	"filo/layer/registry/reference"
)

// lockPoll is how often a layout that another process writes is tried again.
const lockPoll = 20 * time.Millisecond

const layoutText = `{"imageLayoutVersion":"1.0.0"}`

// layout writes an OCI layout, as a tar or into a directory.
func (e Exporter) layout(ctx context.Context, o Output, p plan, root ocispec.Descriptor, g *image.Graph) error {
	if err := e.fetch(ctx, g); err != nil {
		return err
	}
	if !p.asTar {
		if o.Dest == "" || o.Dest == "-" {
			return fmt.Errorf("output type=%s: tar=false needs a dest", o.Type)
		}
		done := e.begin("writing layout to " + o.Dest)
		err := e.layoutDir(ctx, o.Dest, p, root, g)
		done(err)
		return err
	}
	index, err := json.Marshal(ocispec.Index{
		Versioned: specs.Versioned{SchemaVersion: 2},
		MediaType: ocispec.MediaTypeImageIndex,
		Manifests: entries(root, p.names),
	})
	if err != nil {
		return err
	}
	small := map[string][]byte{ocispec.ImageLayoutFile: []byte(layoutText), ocispec.ImageIndexFile: index}
	if o.Type == "docker" {
		if small["manifest.json"], err = dockerManifest(p.names, g); err != nil {
			return err
		}
	}
	done := e.begin("sending tarball")
	err = o.stream(func(w io.Writer) error { return e.layoutTar(ctx, w, small, g) })
	done(err)
	return err
}

// entries are what index.json says of the image: one entry a name. A nameless one has only its time.
func entries(root ocispec.Descriptor, names []string) []ocispec.Descriptor {
	if len(names) == 0 {
		return []ocispec.Descriptor{root}
	}
	var all []ocispec.Descriptor
	for _, name := range names {
		d := root
		d.Annotations = with(root.Annotations, map[string]string{image.AnnotationName: name, ocispec.AnnotationRefName: tagOf(name)})
		all = append(all, d)
	}
	return all
}

func tagOf(full string) string {
	n, err := reference.ParseFull(full)
	if err != nil {
		return ""
	}
	return n.Tag
}

// dockerManifest is the manifest.json by which docker load finds its way in the layout.
func dockerManifest(names []string, g *image.Graph) ([]byte, error) {
	m := struct {
		Config   string
		RepoTags []string
		Layers   []string
	}{Config: blobPath(g.Images[0].Config), Layers: []string{}}
	for _, name := range names {
		n, err := reference.ParseFull(name)
		if err != nil {
			return nil, err
		}
		m.RepoTags = append(m.RepoTags, n.Familiar())
	}
	for _, l := range g.Images[0].Layers {
		m.Layers = append(m.Layers, blobPath(l))
	}
	return json.Marshal([]any{m})
}

// blobPath is where a layout has a blob. Digests were validated when the documents were read.
func blobPath(d ocispec.Descriptor) string {
	return path.Join(ocispec.ImageBlobsDir, d.Digest.Algorithm().String(), d.Digest.Encoded())
}

// layoutTar writes the tar of a layout, sorted and without times.
func (e Exporter) layoutTar(ctx context.Context, w io.Writer, small map[string][]byte, g *image.Graph) error {
	type file struct {
		name string
		blob *ocispec.Descriptor
		data []byte
	}
	var files []file
	for _, list := range [][]ocispec.Descriptor{g.Documents, g.Blobs} {
		for _, d := range list {
			files = append(files, file{name: blobPath(d), blob: &d})
		}
	}
	for name, data := range small {
		files = append(files, file{name: name, data: data})
	}
	slices.SortFunc(files, func(a, b file) int { return cmp.Compare(a.name, b.name) })

	t := tar.NewWriter(w)
	for _, dir := range []string{"blobs/", "blobs/sha256/"} {
		if err := t.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: dir, Mode: 0o755, Format: tar.FormatUSTAR}); err != nil {
			return err
		}
	}
	for _, f := range files {
		h := &tar.Header{Typeflag: tar.TypeReg, Name: f.name, Mode: 0o444, Size: int64(len(f.data))}
		if f.blob != nil {
			h.Size = f.blob.Size
		}
		if err := t.WriteHeader(h); err != nil {
			return err
		}
		var err error
		if f.blob != nil {
			err = e.into(ctx, t, *f.blob)
		} else {
			_, err = t.Write(f.data)
		}
		if err != nil {
			return err
		}
	}
	return t.Close()
}

// layoutDir adds the image to the layout in a directory, which is made if it is missing. Blobs come first;
// index.json, replaced last, makes the image visible. No power cut takes it then.
func (e Exporter) layoutDir(ctx context.Context, dir string, p plan, root ocispec.Descriptor, g *image.Graph) error {
	_, missing := os.Lstat(dir)
	if err := os.MkdirAll(filepath.Join(dir, "blobs", "sha256"), 0o755); err != nil {
		return err
	}
	lock := flock.New(dir, flock.SetFlag(os.O_RDONLY)) // the directory itself, so that no lock file stays in it
	if _, err := lock.TryLockContext(ctx, lockPoll); err != nil {
		return fmt.Errorf("lock %s: %w", dir, err)
	}
	defer lock.Close()
	blobs := slices.Concat(g.Blobs, g.Documents)
	if err := e.Store.Durable(ctx, digests(blobs)...); err != nil { // links share what they link to
		return err
	}
	tidy := sync.OnceFunc(func() { sweep(filepath.Join(dir, "blobs", "sha256")) })
	for _, d := range blobs {
		if err := e.blobFile(ctx, dir, d, tidy); err != nil {
			return err
		}
	}
	name := filepath.Join(dir, ocispec.ImageIndexFile)
	idx, err := addEntries(name, root, p.names)
	if err != nil {
		return err
	}
	// The disk is waited for twice: for all that the new index.json needs, and for that.
	mark, err := layoutFile(dir)
	if err != nil {
		return err
	}
	defer mark.drop()
	index, err := newFile(name, idx)
	if err != nil {
		return err
	}
	defer index.drop()
	before := []string{filepath.Join(dir, "blobs", "sha256"), filepath.Join(dir, "blobs"), index.tmp}
	if mark != nil {
		before = append(before, mark.tmp)
	}
	if missing != nil {
		before = append(before, filepath.Dir(dir))
	}
	err = syncAll(before...)
	if err == nil {
		err = mark.put()
	}
	if err == nil {
		err = index.put()
	}
	if err == nil {
		err = syncAll(dir)
	}
	return err
}

// sweep removes what exports that were killed left half-written in a directory. Nobody else writes to it meanwhile. Where
// blobs are linked nothing is left, and to list them all would take longer than the export.
func sweep(dir string) {
	list, _ := os.ReadDir(dir) // what can't be listed stays
	for _, f := range list {
		if strings.HasPrefix(f.Name(), unfinished) {
			_ = os.Remove(filepath.Join(dir, f.Name()))
		}
	}
}

func digests(list []ocispec.Descriptor) []digest.Digest {
	out := make([]digest.Digest, len(list))
	for i, d := range list {
		out[i] = d.Digest
	}
	return out
}

// layoutFile makes oci-layout, or sees that the one that is there is of a version we know and returns nil.
func layoutFile(dir string) (*fresh, error) {
	name := filepath.Join(dir, ocispec.ImageLayoutFile)
	data, err := os.ReadFile(name)
	if errors.Is(err, fs.ErrNotExist) {
		return newFile(name, []byte(layoutText))
	}
	var l ocispec.ImageLayout
	if err == nil {
		err = json.Unmarshal(data, &l)
	}
	if err == nil && l.Version != ocispec.ImageLayoutVersion {
		err = fmt.Errorf("unknown version %q", l.Version)
	}
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", name, err)
	}
	return nil, nil
}

// addEntries returns an index.json with the image added; entries of the same names give way. A nameless
// image is called latest, as BuildKit does, since tools find images in a directory by that.
func addEntries(name string, root ocispec.Descriptor, names []string) ([]byte, error) {
	idx := ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex}
	data, err := os.ReadFile(name)
	if err == nil {
		err = json.Unmarshal(data, &idx)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("read %s: %w", name, err)
	}
	add := entries(root, names)
	if len(names) == 0 {
		add[0].Annotations = with(root.Annotations, map[string]string{ocispec.AnnotationRefName: "latest"})
	}
	idx.Manifests = slices.DeleteFunc(idx.Manifests, func(was ocispec.Descriptor) bool {
		return slices.ContainsFunc(add, func(d ocispec.Descriptor) bool { return sameName(was, d) })
	})
	idx.Manifests = append(idx.Manifests, add...)
	return json.MarshalIndent(idx, "", "  ")
}

func sameName(a, b ocispec.Descriptor) bool {
	return a.Annotations[image.AnnotationName] == b.Annotations[image.AnnotationName] &&
		a.Annotations[ocispec.AnnotationRefName] == b.Annotations[ocispec.AnnotationRefName]
}

// blobFile puts a blob into a layout: by a hard link where both are on one file system, else as a copy, after tidy.
func (e Exporter) blobFile(ctx context.Context, dir string, d ocispec.Descriptor, tidy func()) error {
	to := filepath.Join(dir, filepath.FromSlash(blobPath(d)))
	from := filepath.Join(e.Store.Dir(), filepath.FromSlash(blobPath(d)))
	err := os.Link(from, to)
	if err == nil {
		return nil
	}
	if info, err := os.Lstat(to); err == nil && info.Mode().IsRegular() && info.Size() == d.Size {
		return nil
	}
	if errors.Is(err, fs.ErrExist) { // what is there is not the blob
		tmp := beside(to)
		if err = os.Link(from, tmp); err == nil {
			return renamed(tmp, to)
		}
	}
	tidy()
	return replaceFile(to, func(w io.Writer) error { return e.into(ctx, w, d) })
}

// stream calls write with the file that the output names or with Stdout.
func (o Output) stream(write func(io.Writer) error) error {
	if o.ToStdout() {
		return write(o.Stdout)
	}
	if info, err := os.Stat(o.Dest); err == nil && info.IsDir() {
		return fmt.Errorf("output %s: is a directory", o.Dest)
	} else if err == nil && !info.Mode().IsRegular() {
		f, err := os.OpenFile(o.Dest, os.O_WRONLY, 0) // a pipe or a device cannot be replaced
		if err != nil {
			return err
		}
		defer f.Close()
		return write(f)
	}
	if err := os.MkdirAll(filepath.Dir(o.Dest), 0o755); err != nil {
		return err
	}
	dest := o.Dest
	if real, err := filepath.EvalSymlinks(dest); err == nil {
		dest = real
	}
	if err := replaceFile(dest, write); err != nil {
		return err
	}
	return syncAll(filepath.Dir(dest))
}

// syncAll waits until files, and the names in directories, are on the disk.
func syncAll(paths ...string) error {
	return layer.Sync(slices.DeleteFunc(paths, func(p string) bool {
		info, err := os.Lstat(p)
		if err != nil || !info.IsDir() {
			return false
		}
		d, err := os.Open(p)
		if err == nil {
			d.Close()
		}
		return errors.Is(err, fs.ErrPermission) // one may write where one may not look
	})...)
}

// fresh is a file that appears whole or not at all, even to those who look after a power cut. A nil one does nothing.
type fresh struct{ tmp, name string }

// newFile writes a file that will be name.
func newFile(name string, data []byte) (*fresh, error) {
	return writeFile(name, func(w io.Writer) error {
		_, err := w.Write(data)
		return err
	})
}

func writeFile(name string, write func(io.Writer) error) (*fresh, error) {
	n := &fresh{tmp: beside(name), name: name}
	f, err := os.OpenFile(n.tmp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o666)
	if err != nil {
		return nil, err
	}
	err = write(f)
	if closeErr := f.Close(); err == nil {
		err = closeErr
	}
	if err != nil {
		n.drop()
		return nil, err
	}
	return n, nil
}

// put lets it appear. It must be on the disk by then.
func (n *fresh) put() error {
	if n == nil {
		return nil
	}
	err := os.Rename(n.tmp, n.name)
	if err == nil {
		n.tmp = ""
	}
	return err
}

// drop removes what was not put.
func (n *fresh) drop() {
	if n != nil && n.tmp != "" {
		os.Remove(n.tmp)
	}
}

// replaceFile makes a file appear.
func replaceFile(name string, write func(io.Writer) error) error {
	n, err := writeFile(name, write)
	if err != nil {
		return err
	}
	defer n.drop()
	if err := syncAll(n.tmp); err != nil {
		return err
	}
	return n.put()
}

func renamed(tmp, name string) error {
	err := os.Rename(tmp, name)
	// A link to the very file that is there already is left alone by rename, and so is its other name.
	os.Remove(tmp)
	return err
}

// unfinished is what names of files begin with that are not complete.
const unfinished = ".filo-"

// beside returns a name in the directory of name that nothing has.
func beside(name string) string {
	return filepath.Join(filepath.Dir(name), unfinished+rand.Text())
}
