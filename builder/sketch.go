package builder

import (
	"context"
	"slices"

	"github.com/opencontainers/go-digest"

	"filo/dockerfile"
	"filo/layer"
)

// sketchKey is what goes into the key of a step that reads files of stages or images if those are named by their
// layers instead of by the content of what is read. It hits more seldom than the step's own key, but it can be made
// without a look at any layer: what a shared cache has need not be fetched to find out what comes next.
type sketchKey struct {
	Sketch  string              // names the op among others
	Copy    *copyKey            `json:",omitempty"`
	Sources []dockerfile.Source `json:",omitempty"`
	Exclude []string            `json:",omitempty"`
	Add     bool                `json:",omitempty"`
	Unpack  *bool               `json:",omitempty"`
	Run     *runKey             `json:",omitempty"`
}

// sketch returns the question for a step by the layers that it reads from; the zero question for one that reads other
// files too.
func (w *walk) sketch(ctx context.Context, r *stageRun, st dockerfile.Step) (question, error) {
	if r.fresh || w.req.Verify {
		return question{}, nil
	}
	var k sketchKey
	var inputs []digest.Digest
	var err error
	switch op := st.Op.(type) {
	case *dockerfile.Copy:
		k, inputs, err = w.sketchCopy(ctx, r, op)
	case *dockerfile.Run:
		k, inputs, err = w.sketchRun(ctx, r, op)
	case *dockerfile.Mkdir:
	}
	if len(inputs) == 0 || err != nil {
		return question{}, err
	}
	return ask(k, inputs...)
}

// sketchCopy returns the key and inputs of a COPY; no inputs if there is no sketch of it.
func (w *walk) sketchCopy(ctx context.Context, r *stageRun, op *dockerfile.Copy) (sketchKey, []digest.Digest, error) {
	from, ok, err := w.chain(ctx, op.From)
	foreign := slices.ContainsFunc(op.Sources, func(s dockerfile.Source) bool { return s.URL != "" || s.Inline != nil })
	if foreign || !ok || err != nil {
		return sketchKey{}, nil, err
	}
	key, _ := copyStep{op: op}.key(w.clamp())
	inputs := []digest.Digest{from}
	if !key.Link {
		inputs = append(inputs, r.chain)
	}
	return sketchKey{Sketch: "copy", Copy: &key, Sources: op.Sources, Exclude: op.Exclude, Add: op.Add, Unpack: op.Unpack}, inputs, nil
}

// sketchRun returns the key and inputs of a RUN with mounts of other stages and images; no inputs if there is no sketch
// of it.
func (w *walk) sketchRun(ctx context.Context, r *stageRun, op *dockerfile.Run) (sketchKey, []digest.Digest, error) {
	run := runStep{op: op}
	inputs := []digest.Digest{r.chain}
	for _, m := range op.Mounts {
		if m.Type != dockerfile.MountBind && (m.Type != dockerfile.MountCache || !m.HasFrom) {
			pm, err := w.prepareMount(ctx, m)
			if err != nil {
				return sketchKey{}, nil, err
			}
			run.mounts = append(run.mounts, pm)
			continue
		}
		from, ok, err := w.chain(ctx, m.From)
		if !ok || err != nil {
			return sketchKey{}, nil, err
		}
		inputs = append(inputs, from, digest.FromString(m.Source))
		key := mountKey{Type: m.Type, Target: m.Target, ReadOnly: m.ReadOnly}
		if m.Type == dockerfile.MountCache {
			key.Mode, key.UID, key.GID = m.Mode, m.UID, m.GID
		}
		run.mounts = append(run.mounts, mount{Mount: m, key: key})
	}
	if len(inputs) == 1 { // the step's own key needs no files either
		return sketchKey{}, nil, nil
	}
	if err := w.allowed(op); err != nil {
		return sketchKey{}, nil, err
	}
	key := w.runKey(run, r.platformName())
	return sketchKey{Sketch: "run", Run: &key}, inputs, nil
}

// chain returns the chain ID of a stage or image; false for what is neither.
func (w *walk) chain(ctx context.Context, ref dockerfile.Ref) (digest.Digest, bool, error) {
	if ref.Stage != nil {
		r, err := w.stage(ctx, ref.Stage)
		if err != nil {
			return "", false, err
		}
		return r.chain, len(r.layers) > 0, nil
	}
	if n, ok := w.req.Named[ref.Name]; ref.Name == "" || ref.Name == "scratch" || ok && n.Image == nil {
		return "", false, nil
	}
	img, err := w.image(ctx, ref.Name, w.platform)
	if err != nil {
		return "", false, err
	}
	return layer.ChainID(img.Layers), len(img.Layers) > 0, nil
}
