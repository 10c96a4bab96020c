package builder

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"path"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/platforms"
	dockerspec "github.com/moby/docker-image-spec/specs-go/v1"

	"filo/builder/attest"
	"filo/builder/sbom"
	"filo/dockerfile"
	"filo/layer"
)

// Where a scanner finds what it scans, and where it puts what it found: BuildKit's scanner protocol.
const (
	scanName   = "sbom"
	scanSource = "/run/src/core/" + scanName
	scanExtras = "/run/src/extras/"
	scanResult = "/run/out"
)

// maxStatement bounds what a scanner may say: it is held in memory.
const maxStatement = 512 << 20

// scan runs the scanner that the request names over the target, as a RUN in the scanner's image that has the target's
// files mounted, and returns what it wrote. It runs on this machine's platform whatever the target's is, and is
// remembered like any other step.
func (w *walk) scan(ctx context.Context) ([]attest.Statement, error) {
	s := w.req.Scan
	if s == nil {
		return nil, nil
	}
	extras, err := w.extras(ctx)
	if err != nil {
		return nil, err
	}
	if s.Generator == "" {
		return w.list(ctx, extras)
	}
	found, err := w.scanWith(ctx, *s, extras)
	if err != nil {
		err = w.target.Locate(fmt.Errorf("scanner %s: %w", s.Generator, err))
	}
	return found, err
}

// extra is what is scanned besides the target.
type extra struct {
	name string // of its SBOM
	from dockerfile.Ref
}

// extras are what the Dockerfile asks to be scanned besides: stages with BUILDKIT_SBOM_SCAN_STAGE, the build context with
// BUILDKIT_SBOM_SCAN_CONTEXT. Both are true, or list stages.
func (w *walk) extras(ctx context.Context) ([]extra, error) {
	stages, err := w.file.Plan(w.req.Target)
	if err != nil {
		return nil, err
	}
	var out []extra
	for _, s := range stages {
		r, err := w.stage(ctx, s)
		if err != nil {
			return nil, err
		}
		name := cmp.Or(s.Name, fmt.Sprintf("stage-%d", s.Index))
		switch {
		case s == w.target && asked(s, r.steps, "BUILDKIT_SBOM_SCAN_CONTEXT", name):
			out = append(out, extra{scanName + "-context", dockerfile.Ref{}})
		case s != w.target && asked(s, r.steps, "BUILDKIT_SBOM_SCAN_STAGE", name):
			out = append(out, extra{scanName + "-" + name, dockerfile.Ref{Stage: s}})
		}
	}
	return out, nil
}

// asked reports whether a build argument is true or lists the stage.
func asked(s *dockerfile.Stage, steps []dockerfile.Step, arg, name string) bool {
	v, ok := s.Arg(arg, steps)
	if b, err := strconv.ParseBool(v); !ok || err == nil {
		return b
	}
	return slices.ContainsFunc(strings.Split(v, ","), func(one string) bool { return strings.EqualFold(strings.TrimSpace(one), name) })
}

// list lists the packages in the target itself, and in extras.
func (w *walk) list(ctx context.Context, extras []extra) ([]attest.Statement, error) {
	v := w.start("[%s] listing packages", w.scanLabel())
	all, err := w.listed(ctx, append([]extra{{scanName, dockerfile.Ref{Stage: w.target}}}, extras...))
	return all, v.end(ctx, err)
}

func (w *walk) listed(ctx context.Context, what []extra) ([]attest.Statement, error) {
	r, err := w.stage(ctx, w.target)
	if err != nil {
		return nil, err
	}
	about := w.req.Title
	if t := r.image().Config.Created; t != nil {
		about.Created = *t
	}
	var all []attest.Statement
	for _, x := range what {
		of, err := w.origin(ctx, x.from)
		if err != nil {
			return nil, err
		}
		if x.name != scanName {
			about.Name = x.name
		}
		document, unlisted, err := sbom.Scan(ctx, of.fs, about)
		if err != nil {
			return nil, err
		}
		if unlisted != "" {
			w.warn("the SBOM does not list %s, which filo cannot read: use --sbom=generator=IMAGE for them", unlisted)
		}
		all = append(all, attest.SBOM(x.name, document))
	}
	return all, nil
}

// scanLabel is what vertices of a scan begin with.
func (w *walk) scanLabel() string {
	if len(w.req.Platforms) > 1 {
		return platforms.FormatAll(w.platform) + " sbom"
	}
	return "sbom"
}

func (w *walk) scanWith(ctx context.Context, s attest.Scanner, extras []extra) ([]attest.Statement, error) {
	r := &stageRun{platform: platforms.Normalize(platforms.DefaultSpec()), epoch: w.req.Epoch, fresh: w.req.NoCache}
	img, err := w.image(ctx, s.Generator, r.platform)
	if err != nil {
		return nil, err
	}
	run := w.scanner(s, img.Config.Config, extras)
	if len(run.Args) == 0 {
		return nil, errors.New("its image has neither ENTRYPOINT nor CMD")
	}
	r.layers, r.chain = img.Layers, layer.ChainID(img.Layers)
	step := func(op dockerfile.Op) dockerfile.Step {
		return dockerfile.Step{Start: w.target.Line, End: w.target.Line, Op: op}
	}
	r.steps = []dockerfile.Step{step(&dockerfile.Mkdir{Path: scanResult}), step(run)}
	for i, verb := range []string{"preparing", "generating sbom using"} {
		r.next = i
		name := fmt.Sprintf("[%s] %s %s", w.scanLabel(), verb, familiar(s.Generator))
		if err := w.try(ctx, r, r.steps[i], name); err != nil {
			return nil, err
		}
	}
	view, err := w.Store.View(ctx, r.layers)
	if err != nil {
		return nil, err
	}
	return statements(view)
}

// scanner is the process that scans the target and extras.
func (w *walk) scanner(s attest.Scanner, c dockerspec.DockerOCIImageConfig, extras []extra) *dockerfile.Run {
	env := c.Env
	if !slices.ContainsFunc(env, func(kv string) bool { return strings.HasPrefix(kv, "PATH=") }) {
		env = append(slices.Clone(env), "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
	}
	run := &dockerfile.Run{
		Args: slices.Concat(c.Entrypoint, c.Cmd), Dir: path.Join("/", c.WorkingDir),
		Env:    slices.Concat(env, []string{"BUILDKIT_SCAN_DESTINATION=" + scanResult, "BUILDKIT_SCAN_SOURCE=" + scanSource}, s.Env),
		Mounts: []dockerfile.Mount{seen(dockerfile.Ref{Stage: w.target}, scanSource), {Type: dockerfile.MountTmpfs, Target: "/tmp"}},
	}
	for _, x := range extras {
		run.Mounts = append(run.Mounts, seen(x.from, path.Join(scanExtras, x.name)))
	}
	if len(extras) > 0 {
		run.Env = append(run.Env, "BUILDKIT_SCAN_SOURCE_EXTRAS="+scanExtras)
	}
	return run
}

// seen shows the files of a stage or the context.
func seen(from dockerfile.Ref, at string) dockerfile.Mount {
	return dockerfile.Mount{Type: dockerfile.MountBind, From: from, HasFrom: from != dockerfile.Ref{}, Source: "/", Target: at, ReadOnly: true}
}

// statements reads what a scanner left, that about the target first.
func statements(view *layer.View) ([]attest.Statement, error) {
	dir := strings.TrimPrefix(scanResult, "/")
	list, err := view.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	var all []attest.Statement
	for _, item := range list {
		if !strings.HasSuffix(item.Name(), ".json") {
			continue
		}
		s, err := statement(view, path.Join(dir, item.Name()))
		if err != nil {
			return nil, fmt.Errorf("%s: %w", path.Join(scanResult, item.Name()), err)
		}
		all = append(all, s)
	}
	if len(all) == 0 {
		return nil, fmt.Errorf("it wrote no statement to %s", scanResult)
	}
	slices.SortStableFunc(all, func(a, b attest.Statement) int { return rank(a) - rank(b) })
	return all, nil
}

// rank is less for what is about the target itself.
func rank(s attest.Statement) int {
	if strings.HasPrefix(s.File, scanName+".") {
		return 0
	}
	return 1
}

func statement(view *layer.View, name string) (attest.Statement, error) {
	e, ok := view.Entry(name)
	if !ok || e.Type != layer.Regular {
		return attest.Statement{}, errors.New("is not a regular file")
	}
	f, err := view.Open(name)
	if err != nil {
		return attest.Statement{}, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxStatement+1))
	if err != nil {
		return attest.Statement{}, err
	}
	if len(data) > maxStatement {
		return attest.Statement{}, fmt.Errorf("has more than %d MiB", maxStatement>>20)
	}
	return attest.Scanned(path.Base(name), data)
}
