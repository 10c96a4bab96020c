package builder

import (
	"context"
	"sync"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"filo/builder/attest"
	"filo/builder/image"
)

// inputs collects what a walk takes from elsewhere.
type inputs struct {
	mu  sync.Mutex
	all attest.Record
}

func (in *inputs) image(req Request, name string, p ocispec.Platform, img *image.Image) {
	ref := familiar(name)
	if n, ok := req.Named[name]; ok {
		ref = n.Text
	}
	in.mu.Lock()
	defer in.mu.Unlock()
	in.all.Images = append(in.all.Images, attest.Image{Name: name, Ref: ref, Platform: p, Digest: img.Digest})
}

func (in *inputs) context(name string) {
	in.mu.Lock()
	defer in.mu.Unlock()
	in.all.Contexts = append(in.all.Contexts, name)
}

func (in *inputs) fetched(url string, f Fetched) {
	got := attest.Fetched{URL: url, Commit: f.Commit}
	if f.Commit == "" {
		got.Digest = digest.Digest(f.Identity)
	}
	in.mu.Lock()
	defer in.mu.Unlock()
	in.all.Fetched = append(in.all.Fetched, got)
}

// record returns what went into the result, once its stages are built.
func (w *walk) record(ctx context.Context) (attest.Record, error) {
	w.inputs.mu.Lock()
	r := w.inputs.all.With(attest.Record{}) // a copy, in order
	w.inputs.mu.Unlock()
	for _, s := range w.plan {
		run, err := w.stage(ctx, s)
		if err != nil {
			return r, err
		}
		below := len(run.layers)
		for _, st := range run.steps {
			if st.Op != nil {
				below--
			}
		}
		r.Stages = append(r.Stages, attest.Stage{Stage: s, Platform: run.platform, Steps: run.steps, Below: below, Result: w.inResult(s)})
	}
	return r, nil
}
