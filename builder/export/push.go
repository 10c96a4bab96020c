package export

import (
	"context"
	"io"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"

	"filo/builder/image"
	"filo/layer/registry"
)

// push sends the image under each of its names: blobs first, several at a time, then manifests, the one that
// gets the tag last. A blob goes to a registry once; the second repository mounts it from the first.
func (e Exporter) push(ctx context.Context, p plan, root ocispec.Descriptor, g *image.Graph) error {
	client := e.Client
	if p.insecure {
		var err error
		if client, err = client.Trusting(p.names...); err != nil {
			return err
		}
	}
	for _, name := range p.names {
		done := e.begin("pushing layers")
		var err error
		// A registry that has the manifest has what it names: to ask for each blob would be a request for each.
		if !client.HasManifest(ctx, name, root.Digest) {
			err = e.pushBlobs(ctx, client, name, g)
		}
		done(err)
		if err != nil {
			return err
		}
		if p.byDigest {
			if name, err = registry.Repository(name); err != nil {
				return err
			}
			name += "@" + root.Digest.String()
		}
		done = e.begin("pushing manifest for " + shown(name, root))
		err = e.pushDocuments(ctx, client, name, g)
		done(err)
		if err != nil {
			return err
		}
	}
	return nil
}

// shown is a name with the digest that it stands for now.
func shown(name string, root ocispec.Descriptor) string {
	if digested(name) {
		return name
	}
	return name + "@" + root.Digest.String()
}

func (e Exporter) pushBlobs(ctx context.Context, c *registry.Client, name string, g *image.Graph) error {
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(16) // the client lets fewer through to one host
	for _, b := range g.Blobs {
		group.Go(func() error {
			err := c.PushBlob(ctx, name, b, image.Origins(e.Store, b.Digest), func(ctx context.Context) (io.ReadCloser, error) {
				r, err := e.Store.Stream(ctx, b.Digest)
				return r, image.Damaged(g.Root(), err)
			})
			if err != nil {
				return err
			}
			return image.AddOrigin(ctx, e.Store, b.Digest, name)
		})
	}
	return group.Wait()
}

func (e Exporter) pushDocuments(ctx context.Context, c *registry.Client, name string, g *image.Graph) error {
	repo, err := registry.Repository(name)
	if err != nil {
		return err
	}
	for i, d := range g.Documents {
		data, err := e.Store.ReadBlob(ctx, d.Digest)
		if err != nil {
			return err
		}
		to := repo + "@" + d.Digest.String()
		if i == len(g.Documents)-1 {
			to = name
		}
		if err := c.PushManifest(ctx, to, d, data); err != nil {
			return err
		}
	}
	return nil
}
