package main

import (
	"context"
	"fmt"
	"maps"
	"os"
	"path"
	"slices"
	"strings"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"filo/builder"
	"filo/builder/image"
)

// targetContext is the result of building a stage: target:STAGE is one of the Dockerfile that is built, target:FILE#STAGE
// one of another. It sees the same context, arguments and other named contexts, and is built when something needs it.
func (j *job) targetContext(name, value string) (builder.Named, error) {
	file, stage, other := strings.Cut(strings.TrimPrefix(value, "target:"), "#")
	if !other {
		file, stage = "", file
	}
	text, fileName := []byte(nil), ""
	if file != "" {
		var err error
		if text, err = os.ReadFile(file); err != nil {
			return builder.Named{}, err
		}
		fileName = path.Base(file)
	}
	j.nested++
	first := j.nested * vertexesEach
	return builder.Named{Text: value, Image: func(ctx context.Context, p ocispec.Platform) (*image.Image, error) {
		above, _ := ctx.Value(nestedIn{}).([]string)
		if slices.Contains(above, name) {
			return nil, fmt.Errorf("build contexts need each other in a circle: %s", strings.Join(append(above, name), ", "))
		}
		ctx = context.WithValue(ctx, nestedIn{}, append(above[:len(above):len(above)], name))
		req := j.req
		if file != "" {
			req.File, req.FileName = text, fileName
		}
		req.Target, req.Platforms, req.Labels, req.Ships = stage, []ocispec.Platform{p}, nil, nil
		req.Scan = nil
		req.Named = maps.Clone(j.req.Named)
		delete(req.Named, name) // a stage that needs itself through its own name
		b := j.newBuilder()
		b.Emit = func(e builder.Event) {
			if e.Vertex != 0 {
				e.Vertex += first
			}
			j.display.Emit(e)
		}
		r, err := b.Build(ctx, req)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", value, err)
		}
		j.origin.nest(r.Records[0])
		return r.Images[0], nil
	}}, nil
}

// nestedIn is the key of the names of the contexts for which a nested build is done, the outermost first.
type nestedIn struct{}

// vertexesEach is how far apart the numbers are that nested builds give their vertices.
const vertexesEach = 1 << 20
