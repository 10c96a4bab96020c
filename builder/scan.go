package builder

import (
	"context"
	"errors"
	"fmt"
	"io"
	"path"
	"slices"
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
	scanSource = "/run/src/core/sbom"
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
	if s.Generator == "" {
		return w.list(ctx)
	}
	found, err := w.scanWith(ctx, *s)
	if err != nil {
		err = w.target.Locate(fmt.Errorf("scanner %s: %w", s.Generator, err))
	}
	return found, err
}

// list lists the packages in the target itself.
func (w *walk) list(ctx context.Context) ([]attest.Statement, error) {
	v := w.start("[%s] listing packages", w.scanLabel())
	r, err := w.stage(ctx, w.target)
	if err != nil {
		return nil, v.end(ctx, err)
	}
	view, err := w.Store.View(ctx, r.layers)
	if err != nil {
		return nil, v.end(ctx, err)
	}
	about := w.req.Title
	if t := r.image().Config.Created; t != nil {
		about.Created = *t
	}
	document, unlisted, err := sbom.Scan(ctx, view, about)
	if unlisted != "" {
		w.warn("the SBOM does not list %s, which filo cannot read: use --sbom=generator=IMAGE for them", unlisted)
	}
	return []attest.Statement{attest.SBOM(document)}, v.end(ctx, err)
}

// scanLabel is what vertices of a scan begin with.
func (w *walk) scanLabel() string {
	if len(w.req.Platforms) > 1 {
		return platforms.FormatAll(w.platform) + " sbom"
	}
	return "sbom"
}

func (w *walk) scanWith(ctx context.Context, s attest.Scanner) ([]attest.Statement, error) {
	r := &stageRun{platform: platforms.Normalize(platforms.DefaultSpec()), epoch: w.req.Epoch, fresh: w.req.NoCache}
	img, err := w.image(ctx, s.Generator, r.platform)
	if err != nil {
		return nil, err
	}
	run := w.scanner(s, img.Config.Config)
	if len(run.Args) == 0 {
		return nil, errors.New("its image has neither ENTRYPOINT nor CMD")
	}
	r.layers = img.Layers
	for _, st := range []struct {
		verb string
		op   dockerfile.Op
	}{{"preparing", &dockerfile.Mkdir{Path: scanResult}}, {"generating sbom using", run}} {
		name := fmt.Sprintf("[%s] %s %s", w.scanLabel(), st.verb, familiar(s.Generator))
		if err := w.try(ctx, r, dockerfile.Step{Start: w.target.Line, End: w.target.Line, Op: st.op}, name); err != nil {
			return nil, err
		}
	}
	view, err := w.Store.View(ctx, r.layers)
	if err != nil {
		return nil, err
	}
	return statements(view)
}

// scanner is the process that scans the target.
func (w *walk) scanner(s attest.Scanner, c dockerspec.DockerOCIImageConfig) *dockerfile.Run {
	env := c.Env
	if !slices.ContainsFunc(env, func(kv string) bool { return strings.HasPrefix(kv, "PATH=") }) {
		env = append(slices.Clone(env), "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
	}
	return &dockerfile.Run{
		Args: slices.Concat(c.Entrypoint, c.Cmd), Dir: path.Join("/", c.WorkingDir),
		Env: slices.Concat(env, []string{"BUILDKIT_SCAN_DESTINATION=" + scanResult, "BUILDKIT_SCAN_SOURCE=" + scanSource}, s.Env),
		Mounts: []dockerfile.Mount{
			{Type: dockerfile.MountBind, From: dockerfile.Ref{Stage: w.target}, HasFrom: true, Source: "/", Target: scanSource, ReadOnly: true},
			{Type: dockerfile.MountTmpfs, Target: "/tmp"},
		},
	}
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
	if strings.HasPrefix(s.File, path.Base(scanSource)+".") {
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
