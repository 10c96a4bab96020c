// Package export puts images where --output says: an OCI layout or docker archive as a tar or a directory,
// the root file system as a directory or a tar, a registry, the local image store.
//
// It builds nothing and adds nothing that depends on time: what is written follows from the images and the
// output's attributes. Files and directories appear by rename, a layout's index.json and a registry's tag
// come last. Paths of an image never leave the directory they are written to.
//
// Start at [Write]. output.go reads -o, annotation.go --annotation, layout.go writes oci and docker,
// local.go and tar.go write file systems, push.go sends to registries, attestation.go adds what is stated about them.
package export

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"

	"filo/builder/attest"
	"filo/builder/image"
	"filo/layer"
	"filo/layer/registry"
	"filo/layer/registry/reference"
)

// Exporter is what writing needs. Only Store is needed by all types, Client by those that push or that send
// layers of a base which nobody needed so far.
type Exporter struct {
	Store       *layer.Store
	Client      *registry.Client
	Devices     bool                          // type=local: device files are made; only true root can
	AllowDelete bool                          // type=local,mode=delete: the destination may be outside of the working directory
	Report      func(text string) func(error) // progress: called when something begins, the result when it ends; nil for none
	Warn        func(text string)             // nil for none
}

// Result is what is exported: images of one build, one a platform, or a manifest or index of the store.
type Result struct {
	Images     []*image.Image
	Descriptor *ocispec.Descriptor // instead of Images; attributes that change an image are refused
	Names      []string            // from -t; the attribute name= comes before
	Index      bool                // write an index even for one platform
	Epoch      *int64              // times of files in local and tar output are clamped to it

	// Attest says what is stated about an image, given the layers of its manifest; outputs of files have none. nil states
	// nothing.
	Attest func(n int, layers []ocispec.Descriptor) ([]attest.Statement, error)
}

// Exported says what was written.
type Exported struct {
	Type         string
	Descriptor   ocispec.Descriptor   // manifest or index; empty for local and tar
	ConfigDigest string               // of a single manifest, else empty
	Manifests    []ocispec.Descriptor // of an index, with platforms
	Names        []string             // full names given to it
	Graph        *image.Graph         // all that Descriptor refers to; nil for local and tar
}

// ID is what --iidfile gets: the config's digest of a single image, the digest of an index.
func (x Exported) ID() string {
	if x.ConfigDigest != "" {
		return x.ConfigDigest
	}
	return x.Descriptor.Digest.String()
}

// Metadata is what --metadata-file gets of this export; empty for local and tar.
func (x Exported) Metadata() map[string]any {
	m := map[string]any{}
	if x.Descriptor.Digest == "" {
		return m
	}
	m["containerimage.digest"] = x.Descriptor.Digest.String()
	m["containerimage.descriptor"] = x.Descriptor
	if x.ConfigDigest != "" {
		m["containerimage.config.digest"] = x.ConfigDigest
	}
	if len(x.Manifests) > 0 {
		m["containerimage.manifests"] = x.Manifests
	}
	if len(x.Names) > 0 {
		m["image.name"] = strings.Join(x.Names, ",")
	}
	return m
}

// Write exports r as o says. It may be called for several outputs at once.
func Write(ctx context.Context, e Exporter, o Output, r Result) (Exported, error) {
	if err := o.Check(r.Names, r.platforms()); err != nil {
		return Exported{}, err
	}
	p, err := o.plan(r.Names)
	if err != nil {
		return Exported{}, err
	}
	switch o.Type {
	case "local":
		return Exported{Type: o.Type}, e.local(ctx, o, p, r)
	case "tar":
		return Exported{Type: o.Type}, e.tar(ctx, o, p, r)
	}
	return e.image(ctx, o, p, r)
}

func (r Result) platforms() int {
	if r.Descriptor != nil {
		return 1
	}
	return len(r.Images)
}

// image is writeImage. If a blob turns out to be damaged while it is sent, all is sent once more: the store gets it from
// elsewhere then, if it can be had.
func (e Exporter) image(ctx context.Context, o Output, p plan, r Result) (Exported, error) {
	x, err := e.writeImage(ctx, o, p, r)
	if errors.Is(err, layer.ErrDamaged) && o.repeatable() {
		return e.writeImage(ctx, o, p, r)
	}
	return x, err
}

// writeImage writes config, manifests and index and sends them where they belong.
func (e Exporter) writeImage(ctx context.Context, o Output, p plan, r Result) (Exported, error) {
	root, g, err := e.assemble(ctx, p, r)
	if err != nil {
		return Exported{}, err
	}
	if o.Type == "docker" && len(g.Images) != 1 {
		return Exported{}, fmt.Errorf("docker exporter does not support exporting manifest lists")
	}
	switch {
	case o.Type == "oci" || o.Type == "docker" && o.Dest != "":
		err = e.layout(ctx, o, p, root, g)
	default:
		err = e.deliver(ctx, p, root, g)
	}
	if err != nil {
		return Exported{}, err
	}
	return exported(o.Type, p, root, g), nil
}

func exported(kind string, p plan, root ocispec.Descriptor, g *image.Graph) Exported {
	x := Exported{Type: kind, Descriptor: root, Names: p.names, Graph: g}
	if len(g.Documents) == 1 {
		x.ConfigDigest = g.Images[0].Config.Digest.String()
		return x
	}
	for _, m := range g.Images {
		if !m.Attestation {
			x.Manifests = append(x.Manifests, m.Descriptor)
		}
	}
	return x
}

// assemble returns the descriptor that stands for the result, annotated, and all that it refers to. It writes
// what the store does not have yet.
func (e Exporter) assemble(ctx context.Context, p plan, r Result) (ocispec.Descriptor, *image.Graph, error) {
	root, err := e.root(ctx, p, r)
	if err != nil {
		return root, nil, err
	}
	g, err := image.Walk(ctx, e.Store, root)
	return root, g, err
}

func (e Exporter) root(ctx context.Context, p plan, r Result) (ocispec.Descriptor, error) {
	if r.Descriptor != nil {
		if p.changes != "" {
			return ocispec.Descriptor{}, fmt.Errorf("%s: the image exists already and is exported as it is", p.changes)
		}
		return *r.Descriptor, image.Restore(ctx, e.Store, e.Client, *r.Descriptor)
	}
	if len(r.Images) == 0 {
		return ocispec.Descriptor{}, fmt.Errorf("nothing to export")
	}
	manifests, err := e.manifests(ctx, p, r.Images)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	stated, err := e.attestations(ctx, p, r, manifests)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	root := manifests[0]
	if len(r.Images) > 1 || r.Index || len(stated) > 0 {
		root, err = image.WriteIndex(ctx, e.Store, append(manifests, stated...), p.annotations.index)
		if err != nil {
			return root, err
		}
		e.say("exporting manifest list " + root.Digest.String())
		root.Annotations = with(root.Annotations, p.annotations.indexDescriptor)
	}
	if t := newest(r.Images); t != nil && root.Annotations[ocispec.AnnotationCreated] == "" {
		root.Annotations = with(root.Annotations, map[string]string{ocispec.AnnotationCreated: t.UTC().Format(time.RFC3339)})
	}
	return root, nil
}

// manifests writes each image; its descriptor carries platform and annotations.
func (e Exporter) manifests(ctx context.Context, p plan, images []*image.Image) ([]ocispec.Descriptor, error) {
	done := e.begin("exporting layers")
	out := make([]ocispec.Descriptor, len(images))
	g, ctx := errgroup.WithContext(ctx)
	for i, img := range images {
		g.Go(func() (err error) {
			w := p.write
			platform := image.Platform(img.Config)
			w.Annotations = p.annotations.of(platform).manifest
			if out[i], err = image.Write(ctx, e.Store, img, w); err != nil {
				return err
			}
			out[i].Annotations = with(out[i].Annotations, p.annotations.of(platform).manifestDescriptor)
			return nil
		})
	}
	err := g.Wait()
	done(err)
	if err != nil {
		return nil, err
	}
	for _, d := range out {
		e.say("exporting manifest " + d.Digest.String())
	}
	return out, nil
}

// newest is the latest creation time of the images.
func newest(images []*image.Image) *time.Time {
	var t *time.Time
	for _, img := range images {
		if c := img.Config.Created; c != nil && (t == nil || c.After(*t)) {
			t = c
		}
	}
	return t
}

// deliver stores and pushes.
func (e Exporter) deliver(ctx context.Context, p plan, root ocispec.Descriptor, g *image.Graph) error {
	if p.store {
		if err := e.keep(ctx, p, root, g); err != nil {
			return err
		}
	}
	if p.push {
		return e.push(ctx, p, root, g)
	}
	return nil
}

// keep gives the image its names in the local store. All blobs are brought there first: what has a name in
// the store is complete.
func (e Exporter) keep(ctx context.Context, p plan, root ocispec.Descriptor, g *image.Graph) error {
	if err := e.fetch(ctx, g); err != nil {
		return err
	}
	names := slices.DeleteFunc(slices.Clone(p.names), digested)
	for _, name := range names {
		done := e.begin("naming to " + name)
		err := image.Tag(ctx, e.Store, name, root)
		done(err)
		if err != nil {
			return err
		}
		if !p.canonical {
			continue
		}
		if err := image.Pin(ctx, e.Store, name, root); err != nil {
			return err
		}
	}
	if p.dangling != "" && (len(names) == 0 || !p.danglingEmptyOnly) {
		return image.Pin(ctx, e.Store, p.dangling, root)
	}
	if len(names) == 0 {
		return image.Tag(ctx, e.Store, "", root)
	}
	return nil
}

func digested(name string) bool {
	n, err := reference.ParseFull(name)
	return err == nil && n.Digest != ""
}

// fetch brings all blobs into the store: layers of a base may so far only be promised.
func (e Exporter) fetch(ctx context.Context, g *image.Graph) error {
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(4)
	for _, b := range g.Blobs {
		if e.Store.Ready(b.Digest) { // nearly all are, and are looked at before a goroutine begins to
			continue
		}
		group.Go(func() error {
			if err := e.Store.Ensure(ctx, b.Digest); err != nil {
				return image.Damaged(g.Root(), fmt.Errorf("blob %s: %w", b.Digest, err))
			}
			return nil
		})
	}
	return group.Wait()
}

// begin reports that something starts and returns what reports its end.
func (e Exporter) begin(text string) func(error) {
	if e.Report == nil {
		return func(error) {}
	}
	return e.Report(text)
}

// say reports something that is done.
func (e Exporter) say(text string) { e.begin(text)(nil) }

func (e Exporter) warn(format string, args ...any) {
	if e.Warn != nil {
		e.Warn(fmt.Sprintf(format, args...))
	}
}

// with returns a with b added; neither is changed.
func with(a, b map[string]string) map[string]string {
	if len(a)+len(b) == 0 {
		return nil
	}
	m := make(map[string]string, len(a)+len(b))
	for k, v := range a {
		m[k] = v
	}
	for k, v := range b {
		m[k] = v
	}
	return m
}

// into copies a blob of the store.
func (e Exporter) into(ctx context.Context, w io.Writer, d ocispec.Descriptor) error {
	r, size, err := e.Store.OpenBlob(ctx, d.Digest)
	if err != nil {
		return fmt.Errorf("blob %s: %w", d.Digest, err)
	}
	defer r.Close()
	n, err := io.Copy(w, r)
	if err == nil && n != size {
		err = io.ErrUnexpectedEOF
	}
	if err != nil {
		return fmt.Errorf("blob %s: %w", d.Digest, err)
	}
	return nil
}
