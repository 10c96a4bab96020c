package export

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"path"
	"slices"
	"strings"

	"github.com/containerd/platforms"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"filo/builder/attest"
	"filo/builder/image"
	"filo/layer"
)

// attestations writes what is stated about each image and returns the manifests that hold it, for the index.
func (e Exporter) attestations(ctx context.Context, p plan, r Result, manifests []ocispec.Descriptor) ([]ocispec.Descriptor, error) {
	if r.Attest == nil {
		return nil, nil
	}
	var out []ocispec.Descriptor
	for i, m := range manifests {
		layers, err := e.layersOf(ctx, m)
		if err != nil {
			return nil, err
		}
		said, err := r.said(i, layers, p, m)
		if err != nil || len(said) == 0 {
			return nil, err
		}
		if p.noAttestations {
			e.warn("type=docker holds no attestations: they are left out")
			return nil, nil
		}
		if p.write.DockerTypes {
			return nil, errors.New("attestations need OCI media types: leave out oci-mediatypes=false")
		}
		d, err := image.WriteAttestation(ctx, e.Store, m, said, !p.imageShaped)
		if err != nil {
			return nil, err
		}
		e.say("exporting attestation manifest " + d.Digest.String())
		out = append(out, d)
	}
	return out, nil
}

// layersOf returns the layers of a manifest that was written.
func (e Exporter) layersOf(ctx context.Context, d ocispec.Descriptor) ([]ocispec.Descriptor, error) {
	data, err := e.Store.ReadBlob(ctx, d.Digest)
	if err != nil {
		return nil, err
	}
	var m ocispec.Manifest
	return m.Layers, json.Unmarshal(data, &m)
}

// said returns the statements about the manifest of an image.
func (r Result) said(n int, layers []ocispec.Descriptor, p plan, m ocispec.Descriptor) ([]image.Said, error) {
	statements, err := r.Attest(n, layers)
	if err != nil {
		return nil, err
	}
	subjects, err := attest.Names(p.names, *m.Platform, m.Digest)
	if err != nil {
		return nil, err
	}
	var out []image.Said
	for _, s := range statements {
		if s.Images && !p.inline {
			continue
		}
		data, err := s.Marshal(subjects)
		if err != nil {
			return nil, err
		}
		out = append(out, image.Said{Predicate: s.Predicate, Data: data})
	}
	return out, nil
}

// document is a statement as a file of an output.
type document struct {
	name string
	data []byte
}

// documents are the files that state where the files of each part are from.
func (e Exporter) documents(ctx context.Context, p plan, r Result, parts []part) ([][]document, error) {
	out := make([][]document, len(parts))
	if r.Attest == nil {
		return out, nil
	}
	for i, part := range parts {
		statements, err := r.Attest(i, nil)
		if err != nil {
			return nil, err
		}
		statements = slices.DeleteFunc(statements, func(s attest.Statement) bool { return s.Images })
		if len(statements) == 0 {
			continue
		}
		var subjects []attest.Subject
		if err := part.subjects(ctx, part.from, ".", &subjects); err != nil {
			return nil, err
		}
		for _, s := range statements {
			name := p.prefix + s.File
			if len(parts) > 1 && part.dir == "." {
				ext := path.Ext(name)
				platform := platforms.Format(platforms.Normalize(image.Platform(r.Images[i].Config)))
				name = strings.TrimSuffix(name, ext) + "." + strings.ReplaceAll(platform, "/", "_") + ext
			}
			data, err := s.Marshal(subjects)
			if err != nil {
				return nil, err
			}
			out[i] = append(out[i], document{name, data})
		}
	}
	return out, nil
}

// subjects lists the regular files below a directory of the view, with their digests.
func (p part) subjects(ctx context.Context, from, to string, all *[]attest.Subject) error {
	list, err := p.view.ReadDir(from)
	if err != nil {
		return err
	}
	for _, item := range list {
		if err := ctx.Err(); err != nil {
			return context.Cause(ctx)
		}
		at, out := path.Join(from, item.Name()), path.Join(to, item.Name())
		entry, ok := p.view.Entry(at)
		switch {
		case ok && entry.Type == layer.Dir:
			err = p.subjects(ctx, at, out, all)
		case ok && entry.Type == layer.Regular:
			*all = append(*all, attest.NewSubject(out, entry.Digest))
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// documentEntry is what a document is as a file: readable by its owner alone, as BuildKit writes it.
func (r Result) documentEntry(d document) *layer.Entry {
	e := &layer.Entry{Type: layer.Regular, Mode: 0o600, Size: int64(len(d.data))}
	if t := newest(r.Images); t != nil {
		e.ModTime = t.Unix()
	}
	return e
}

// taken is the error of a document whose name a file of the image has.
func taken(name string) error {
	return fmt.Errorf("the image has a file %s where the attestation goes; choose another name with attestation-prefix=", name)
}
