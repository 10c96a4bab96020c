package builder

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"

	"filo/builder/attest"
	"filo/builder/image"
	"filo/cache"
	"filo/dockerfile"
	"filo/layer"
	"filo/layer/registry"
)

// walk builds the stages of one Dockerfile for one platform.
type walk struct {
	*build
	platform ocispec.Platform
	file     *dockerfile.File
	plan     []*dockerfile.Stage // what the target needs, and that last
	target   *dockerfile.Stage
	stages   *once[*dockerfile.Stage, *stageRun]
	ship     func(*vertex, ...layer.Layer) // finds or makes blobs for layers of the result while later steps run
	inputs   inputs
}

// stageRun is a stage on its way, or done.
type stageRun struct {
	stage    *dockerfile.Stage
	platform ocispec.Platform
	config   dockerfile.Config
	layers   []layer.Layer
	chain    digest.Digest // the chain ID of layers
	based    int           // how many of layers are those of the image that the stage, or the one it starts from, is based on
	history  []ocispec.History
	created  *time.Time // of the newest layer; nil for none
	osFields ocispec.Platform
	epoch    *int64
	fresh    bool // steps are done whatever the cache has
	ships    bool // its layers are the result's
	steps    []dockerfile.Step
	warnings []dockerfile.Warning // about the base
	next     int                  // index of the step being done
	prefix   string               // platform before the stage's name, in vertices
	label    string               // name of the stage in vertices; "" for the only one
	base     string               // title of the vertex of the base; "" where there is none
	index    int                  // number of the last vertex
	total    int                  // how many vertices the stage has
}

// run builds every platform and waits for all.
func (b *build) run(ctx context.Context) (Result, error) {
	wanted := b.req.Platforms
	if len(wanted) == 0 {
		wanted = []ocispec.Platform{platforms.Normalize(platforms.DefaultSpec())}
	}
	images, records := make([]*image.Image, len(wanted)), make([]attest.Record, len(wanted))
	scans := make([][]attest.Statement, len(wanted))
	walks := make([]*walk, len(wanted))
	g, gctx := errgroup.WithContext(ctx)
	for i, p := range wanted {
		var err error
		if walks[i], err = b.parse(ctx, p); err != nil {
			return Result{}, err
		}
	}
	for _, note := range walks[0].file.Notes {
		b.warn("%s", note)
	}
	for i, w := range walks {
		g.Go(func() (err error) {
			if images[i], err = w.result(gctx); err != nil {
				return err
			}
			if scans[i], err = w.scan(gctx); err != nil {
				return err
			}
			records[i], err = w.record(gctx)
			return err
		})
	}
	err := g.Wait()
	if verdict := b.trial.end(); verdict != nil {
		err = verdict
	}
	for _, f := range b.files.all() {
		err = errors.Join(err, f.Save())
	}
	return Result{Images: images, Warnings: walks[0].warnings(), Made: b.made.all, Epoch: b.req.Epoch, Records: records, Scans: scans}, err
}

// parse reads the Dockerfile for platform p. If it or the caller says that SOURCE_DATE_EPOCH is the time of something,
// it is read again once that is known.
func (b *build) parse(ctx context.Context, p ocispec.Platform) (*walk, error) {
	read := func() (*dockerfile.File, error) {
		return dockerfile.Parse(bytes.NewReader(b.req.File), dockerfile.Args{
			Name: b.req.FileName, Build: b.req.Args, Labels: b.req.Labels, Target: b.req.Target, Epoch: b.req.Epoch,
			BuildPlatform: platforms.Normalize(platforms.DefaultSpec()), TargetPlatform: p, Contexts: sortedKeys(b.req.Named),
			Ignore: b.req.Ignore,
		})
	}
	f, err := read()
	if err == nil && f.EpochFrom != nil {
		if b.req.Epoch, err = b.epoch(ctx, f, p); err == nil {
			f, err = read()
		}
	}
	if err != nil {
		return nil, err
	}
	if b.req.Epoch == nil {
		b.req.Epoch = f.Epoch
	}
	return &walk{build: b, platform: p, file: f, stages: newOnce[*dockerfile.Stage, *stageRun]()}, nil
}

// clamp is what no file time in a new layer is above; nil for no limit. It is part of the keys of steps, so that what
// is cached and what is not give the same image.
func (b *build) clamp() *int64 {
	if b.req.KeepTimes {
		return nil
	}
	return b.req.Epoch
}

// epoch finds the time that SOURCE_DATE_EPOCH names.
func (b *build) epoch(ctx context.Context, f *dockerfile.File, p ocispec.Platform) (*int64, error) {
	from := *f.EpochFrom
	t := b.req.Modified
	switch {
	case from.Stage != nil:
		steps, err := from.Stage.Steps(dockerfile.Config{}, p)
		if err != nil {
			return nil, err
		}
		if t, err = b.modified(ctx, steps); err != nil {
			return nil, from.Stage.Locate(err)
		}
	case from.Name != "":
		t = b.req.Named[from.Name].Modified
	}
	if t == nil {
		return nil, errors.New("SOURCE_DATE_EPOCH: what it names has no time of its own; name a git repository or a URL, or give seconds")
	}
	return t, nil
}

// modified returns the time of what the one ADD of steps fetches.
func (b *build) modified(ctx context.Context, steps []dockerfile.Step) (*int64, error) {
	for _, st := range steps {
		op, ok := st.Op.(*dockerfile.Copy)
		if !ok || b.req.Open == nil {
			continue
		}
		got, err := b.req.Open(ctx, op.Sources[0].URL, op.Checksum, op.KeepGitDir)
		if err != nil {
			return nil, err
		}
		if got.Close != nil {
			err = got.Close()
		}
		return got.Modified, err
	}
	return nil, nil
}

// result builds the target with all it needs, each stage as soon as what it needs is there.
func (w *walk) result(ctx context.Context) (*image.Image, error) {
	stages, err := w.file.Plan(w.req.Target)
	if err != nil {
		return nil, err
	}
	w.plan, w.target = stages, stages[len(stages)-1]
	if w.file.FailOnWarnings() {
		if err := w.check(ctx, stages); err != nil {
			return nil, err
		}
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	blobs, bctx := errgroup.WithContext(ctx)
	blobs.SetLimit(runtime.GOMAXPROCS(0))
	w.ship = func(v *vertex, layers ...layer.Layer) {
		blobs.Go(func() (err error) {
			defer v.phase(Compressing)()
			for _, l := range layers {
				if _, err = w.Store.Blob(bctx, l, *w.req.Ships, false); err != nil {
					break
				}
			}
			return err
		})
	}
	g, gctx := errgroup.WithContext(bctx)
	for _, s := range stages {
		g.Go(func() error {
			_, err := w.stage(gctx, s)
			return err
		})
	}
	if err = g.Wait(); err != nil {
		cancel()
	}
	if berr := blobs.Wait(); err == nil || errors.Is(err, context.Canceled) && berr != nil {
		err = berr
	}
	if err != nil {
		return nil, err
	}
	r, err := w.stage(ctx, w.target)
	if err != nil {
		return nil, err
	}
	img := r.image()
	if len(w.req.Platforms) > 0 {
		img.Config.Platform = declare(w.platform, img.Config.Platform)
	}
	return img, nil
}

// check refuses the build for what the build checks find, where the Dockerfile asks for that.
func (w *walk) check(ctx context.Context, stages []*dockerfile.Stage) error {
	found, err := w.file.Check(stages, w.platform, func(s *dockerfile.Stage) (dockerfile.Config, error) {
		r := &stageRun{platform: w.platform}
		if s.Platform != nil {
			r.platform = *s.Platform
		}
		if s.Base.Name == "scratch" {
			return r.config, nil
		}
		err := w.fromImage(ctx, s, r)
		return r.config, err
	})
	if err != nil {
		return err
	}
	return w.file.Violation(found)
}

// warnings are those of the build checks that the stages built gave, in the order of the file.
func (w *walk) warnings() []dockerfile.Warning {
	out := slices.Clone(w.file.Warnings)
	for _, r := range w.stages.all() {
		out = append(out, r.warnings...)
		for _, st := range r.steps {
			out = append(out, st.Warnings...)
		}
	}
	slices.SortStableFunc(out, func(a, b dockerfile.Warning) int { return firstLine(a) - firstLine(b) })
	return out
}

func firstLine(w dockerfile.Warning) int {
	if len(w.Ranges) == 0 {
		return 0
	}
	return w.Ranges[0].Start
}

// stage returns s built. Everybody who needs it waits for the one who builds it.
func (w *walk) stage(ctx context.Context, s *dockerfile.Stage) (*stageRun, error) {
	return w.stages.do(ctx, s, func() (*stageRun, error) {
		r, err := w.from(ctx, s)
		if err != nil {
			return nil, err
		}
		if r.steps, err = s.Steps(r.config, r.platform); err != nil {
			return nil, err
		}
		end := s.End(r.config, r.steps)
		r.config = s.Start(r.config)
		w.announce(r)
		for i, st := range r.steps {
			r.next = i
			if err := w.step(ctx, r, st); err != nil {
				return nil, err
			}
		}
		r.config = end
		return r, nil
	})
}

// from returns the stage s with its base and nothing else.
func (w *walk) from(ctx context.Context, s *dockerfile.Stage) (*stageRun, error) {
	r := &stageRun{stage: s, label: s.Name, platform: w.platform, epoch: w.req.Epoch, fresh: w.isFresh(s), ships: w.isShipped(s)}
	if r.label == "" && len(w.file.Stages) > 1 {
		r.label = fmt.Sprintf("stage-%d", s.Index)
	}
	if s.Platform != nil {
		r.platform = *s.Platform
	}
	r.osFields = r.platform
	if len(w.req.Platforms) > 1 || w.req.MultiPlatform {
		r.prefix = platforms.FormatAll(w.platform)
	}
	switch {
	case s.Base.Stage != nil:
		base, err := w.stage(ctx, s.Base.Stage)
		if err != nil {
			return nil, err
		}
		r.config, r.layers, r.chain, r.history, r.created, r.osFields = base.config, base.layers, base.chain, base.history, base.created, base.osFields
		r.based = base.based
		if s.Platform == nil {
			r.platform = base.platform
		}
		return r, nil
	case s.Base.Name == "scratch":
		return r, nil
	}
	if err := w.fromImage(ctx, s, r); err != nil {
		return nil, err
	}
	if r.ships {
		w.ship(nil, r.layers...)
	}
	return r, nil
}

// fromImage puts an image, or the files of a named context, under r.
func (w *walk) fromImage(ctx context.Context, s *dockerfile.Stage, r *stageRun) error {
	if n, ok := w.req.Named[s.Base.Name]; ok && n.Image == nil {
		of, err := w.origin(ctx, s.Base)
		if err != nil {
			return s.Locate(err)
		}
		return w.fromFiles(ctx, of, r)
	}
	img, err := w.image(ctx, s.Base.Name, r.platform)
	if err != nil {
		return s.Locate(err)
	}
	r.config = dockerfile.Config{DockerOCIImageConfig: img.Config.Config, Author: img.Config.Author}
	r.layers, r.chain, r.history, r.created = img.Layers, layer.ChainID(img.Layers), img.Config.History, img.Config.Created
	r.based = len(r.layers)
	r.osFields.OSVersion, r.osFields.OSFeatures = img.Config.OSVersion, img.Config.OSFeatures
	r.osFields.OS, r.osFields.Architecture, r.osFields.Variant = img.Config.OS, img.Config.Architecture, img.Config.Variant
	if img.WrongPlatform {
		r.warnings = s.CheckPlatform(r.platform, image.Platform(img.Config))
	}
	if img.Stale != nil {
		w.warn("%s: what was found last is used: %v", familiar(s.Base.Name), img.Stale)
	}
	r.base = s.Title()
	if img.Digest != "" {
		r.base += "@" + img.Digest.String()
	}
	return nil
}

// image resolves an image once per build and platform.
func (w *walk) image(ctx context.Context, name string, p ocispec.Platform) (img *image.Image, err error) {
	defer func() {
		if err == nil {
			w.inputs.image(w.req, name, p, img)
		}
	}()
	return w.bases.do(ctx, baseKey{name, platforms.FormatAll(p)}, func() (*image.Image, error) {
		if n, ok := w.req.Named[name]; ok && n.Image != nil {
			v := w.start("[context %s] load metadata for %s", name, n.Text)
			img, err := n.Image(ctx, p)
			return img, v.end(ctx, err)
		}
		v := w.start("[internal] load metadata for %s", familiar(name))
		mode := image.PullCurrent
		if w.req.Pull {
			mode = image.PullAlways
		}
		img, err := image.Pull(ctx, w.Store, w.Registry, name, p, mode)
		return img, v.end(ctx, err)
	})
}

// familiar is an image reference in full, as progress shows it.
func familiar(name string) string {
	if full, err := registry.Normalize(name); err == nil {
		return full
	}
	return name
}

// baseKey names a base image of a build.
type baseKey struct{ name, platform string }

// layered is an origin and the layers it is made of; they are nil where files are in no layer.
type layered struct {
	origin
	layers []layer.Layer
}

// origin returns what ref names.
func (w *walk) origin(ctx context.Context, ref dockerfile.Ref) (*layered, error) {
	if ref.Stage != nil {
		r, err := w.stage(ctx, ref.Stage)
		if err != nil {
			return nil, err
		}
		return w.viewed(ctx, r.layers)
	}
	if ref.Name == "" {
		w.inputs.context("")
		return w.directory(ctx, w.req.Context, w.req.Root)
	}
	if n, ok := w.req.Named[ref.Name]; ok && n.Image == nil {
		w.inputs.context(ref.Name)
		return w.directory(ctx, n.FS, n.Root)
	}
	if ref.Name == "scratch" {
		return w.viewed(ctx, nil)
	}
	img, err := w.image(ctx, ref.Name, w.platform)
	if err != nil {
		return nil, err
	}
	return w.viewed(ctx, img.Layers)
}

func (w *walk) viewed(ctx context.Context, layers []layer.Layer) (*layered, error) {
	v, err := w.Store.View(ctx, layers)
	if err != nil {
		return nil, err
	}
	return &layered{origin{fs: v, view: v}, slices.Concat([]layer.Layer{}, layers)}, nil
}

func (w *walk) directory(ctx context.Context, fsys fs.FS, root string) (*layered, error) {
	if fsys == nil {
		return w.viewed(ctx, nil)
	}
	if root == "" {
		return &layered{origin: origin{fs: fsys}}, nil
	}
	files, err := w.files.do(ctx, root, func() (*cache.Files, error) { return w.Cache.Files(root), nil })
	return &layered{origin: origin{fs: fsys, files: files}}, err
}

// fromFiles makes a layer of all files of a named context and puts it under r.
func (w *walk) fromFiles(ctx context.Context, of *layered, r *stageRun) error {
	source, err := of.pick(ctx, selection{path: "/", contents: true})
	if err != nil {
		return err
	}
	q, err := ask(struct {
		From  string
		Epoch *int64 `json:",omitempty"`
	}{"files", w.clamp()}, source[0].digest())
	if err != nil {
		return err
	}
	m, err := w.remembered(ctx, nil, q, func(ctx context.Context, created int64) (layer.Layer, error) {
		p := newPlan(nil, created)
		if err := p.copy(&source[0], "/", attributes{}); err != nil {
			return layer.Layer{}, err
		}
		return w.create(ctx, nil, p, layer.Sinks{Tree: true, Epoch: w.clamp()})
	})
	if err != nil {
		return err
	}
	r.add(dockerfile.Step{Config: r.config}, &m.layer, m.created)
	return nil
}

// isFresh reports whether the steps of s are done whatever the cache has.
func (w *walk) isFresh(s *dockerfile.Stage) bool {
	return w.req.NoCache || s.Name != "" && slices.ContainsFunc(w.req.NoCacheFilter, func(name string) bool { return strings.EqualFold(name, s.Name) })
}

// isShipped reports whether the layers of s leave the store.
func (w *walk) isShipped(s *dockerfile.Stage) bool { return w.req.Ships != nil && w.inResult(s) }

// inResult reports whether the layers of s are in the result.
func (w *walk) inResult(s *dockerfile.Stage) bool {
	for t := w.target; t != nil; t = t.Base.Stage {
		if t == s {
			return true
		}
	}
	return false
}

// sinks says where the layer of a COPY or WORKDIR goes: to a tree if a RUN follows in its stage or nobody ships it,
// else straight to the blob that leaves.
func (w *walk) sinks(r *stageRun, st dockerfile.Step) layer.Sinks {
	if r.runs(r.next) || !r.ships {
		return layer.Sinks{Tree: true, Epoch: w.clamp()}
	}
	return layer.Sinks{Blob: w.req.Ships, Epoch: w.clamp()}
}

// runSinks says where the layer of a RUN goes: it is a tree already, and compressed while later steps run; if none
// follows, in the same pass over its files.
func (w *walk) runSinks(r *stageRun) layer.Sinks {
	sinks := layer.Sinks{Tree: true, Epoch: w.clamp()}
	last := !slices.ContainsFunc(r.steps[r.next+1:], func(st dockerfile.Step) bool { return st.Op != nil })
	if last && r.ships && r.stage == w.target {
		sinks.Blob = w.req.Ships
	}
	return sinks
}

// runs says whether there is a RUN among the steps from one on.
func (r *stageRun) runs(from int) bool {
	return slices.ContainsFunc(r.steps[from:], func(st dockerfile.Step) bool {
		_, ok := st.Op.(*dockerfile.Run)
		return ok
	})
}

// announce counts the vertices of the stage, of which a base image is one, and shows that one.
func (w *walk) announce(r *stageRun) {
	for _, st := range r.steps {
		if st.Op != nil {
			r.total++
		}
	}
	if r.base == "" {
		return
	}
	r.total++
	w.start("%s", r.vertexName(r.base)).emit(Event{State: Cached})
}

// vertexName is the name of the next vertex of the stage.
func (r *stageRun) vertexName(text string) string {
	r.index++
	out := "["
	if r.prefix != "" {
		out += r.prefix + " "
	}
	if r.label != "" {
		out += r.label + " "
	}
	return out + fmt.Sprintf("%*d/%d] ", 1+int(math.Log10(float64(r.total))), r.index, r.total) + text
}

func (r *stageRun) platformName() string { return platforms.FormatAll(r.platform) }

// declare returns the platform that an image is said to be for where --platform asks for want and the base is for is. As in
// BuildKit what is asked for counts: files of another platform may be none of its programs.
func declare(want, is ocispec.Platform) ocispec.Platform {
	same := want.OS == is.OS && want.Architecture == is.Architecture
	is.OS, is.Architecture = want.OS, want.Architecture
	if want.Variant != "" || !same {
		is.Variant = want.Variant
	}
	if want.OSVersion != "" || !same {
		is.OSVersion = want.OSVersion
	}
	if want.OSFeatures != nil {
		is.OSFeatures = want.OSFeatures
	}
	return is
}

// image is the stage as an image.
func (r *stageRun) image() *image.Image {
	img := &image.Image{Layers: r.layers}
	img.Config.Platform = r.osFields
	img.Config.Author, img.Config.Config = r.config.Author, r.config.DockerOCIImageConfig
	img.Config.History, img.Config.Created = r.history, r.created
	if r.epoch != nil {
		t := time.Unix(*r.epoch, 0).UTC()
		img.Config.Created = &t
	}
	return img
}
