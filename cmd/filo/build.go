package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/spf13/cobra"

	"filo/builder"
	"filo/builder/attest"
	"filo/builder/export"
	"filo/builder/sbom"
	"filo/cache/remote"
	"filo/cmd/filo/progress"
	"filo/dockerfile"
)

const buildExamples = `  # build ./Dockerfile and keep the image as "hello" in the local store
  filo build -t hello .

  # an OCI archive, an OCI layout directory, the files of the last stage
  filo build -o type=oci,dest=image.tar .
  filo build -o type=oci,tar=false,dest=layout .
  filo build --target artifacts -o out .

  # build for two platforms and push
  filo build --platform linux/amd64,linux/arm64 -t registry.example/me/app:1 --push .

  # secrets that never reach the image
  filo build --secret id=token,env=API_TOKEN --ssh default .

  # beside the image, how it was made and what is in it
  filo build -t registry.example/me/app:1 --push --provenance=mode=max --sbom=true .

  # a Dockerfile from standard input, and a context from git
  filo build -f - . < Dockerfile
  filo build https://git.example/me/app.git#main:cmd

  # look for mistakes without building
  filo build --check .`

// build is `filo build`.
func (a *app) build() *cobra.Command {
	f := &buildFlags{}
	cmd := &cobra.Command{
		Use:     "build [flags] PATH | URL | -",
		Short:   "Build an image from a Dockerfile",
		Long:    "Build an image from a Dockerfile and a build context: a directory, a git repository, the URL of a tar, or a\ntar on standard input.",
		Example: buildExamples,
		Args:    exactly(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return canceled(cmd.Context(), a.runBuild(cmd, f, args[0]))
		},
	}
	f.register(cmd.Flags())
	return cmd
}

// runBuild does what the flags ask for with the context of that name.
func (a *app) runBuild(cmd *cobra.Command, f *buildFlags, ref string) error {
	wrong := func(err error) error { return &usageError{cmd.CommandPath(), err} }
	req, err := f.request(a.env)
	if err != nil {
		return wrong(err)
	}
	wanted, err := attest.Parse(f.results.attest, f.results.provenance, f.results.sbom)
	if err != nil {
		return wrong(err)
	}
	outputs, err := f.results.parse(len(req.Platforms), req.MultiPlatform || wanted != (attest.Wanted{}), f.show.quiet, a.data())
	if err == nil {
		err = suit(&req, outputs)
	}
	if err != nil {
		return wrong(err)
	}
	mode, err := f.show.mode(a.env)
	if err != nil {
		return wrong(err)
	}
	call, err := f.what.parseCall()
	if err != nil {
		return wrong(err)
	}
	if f.what.file == "-" && ref == "-" {
		return wrong(errors.New("can't use stdin for both build context and dockerfile"))
	}
	caches, err := f.results.caches(req.Args)
	if err == nil {
		err = caches.fit(outputs)
	}
	if err != nil {
		return wrong(err)
	}
	s, err := a.open(true)
	if err != nil {
		return err
	}
	defer s.store.Close()
	d, err := a.newDisplay(mode, f.show.logTime)
	if err != nil {
		return wrong(err)
	}
	defer d.Close()
	if call.method == "build" {
		if err := forget(f.results.iidfile); err != nil {
			return err
		}
	}
	j := &job{app: a, state: s, flags: f, req: req, outputs: outputs, wanted: wanted, display: d, caches: caches, begin: a.now(), id: strings.ToLower(rand.Text())}
	a.pulls.show(d.Emit, j.nextTask, a.now)
	defer j.close()
	if err := j.read(cmd.Context(), ref); err != nil {
		return err
	}
	if call.method != "build" {
		return j.call(cmd.Context(), call)
	}
	err = j.build(cmd.Context())
	j.journal(cmd.Context(), ref, err)
	return errors.Join(err, j.timings())
}

// timings shows and writes where the time went, if that is asked for, also of a build that failed.
func (j *job) timings() error {
	show := j.flags.show
	if show.trace != "" {
		var b bytes.Buffer
		if err := j.display.WriteTrace(&b); err != nil {
			return err
		}
		if err := writeFile(show.trace, b.Bytes()); err != nil {
			return fmt.Errorf("write trace: %w", err)
		}
	}
	if !show.timings {
		return nil
	}
	j.display.Close() // it draws no more
	return j.display.WriteTimings(j.stderr)
}

// mode is how progress is shown.
func (f *showFlags) mode(env lookup) (progress.Mode, error) {
	if f.quiet && f.logTime {
		return "", errors.New("--quiet and --log-time cannot be used together")
	}
	if f.quiet && f.progress != "" && f.progress != string(progress.Quiet) && f.progress != "none" {
		return "", fmt.Errorf("--quiet and --progress=%s cannot be used together", f.progress)
	}
	if f.quiet {
		return progress.Quiet, nil
	}
	wanted := f.progress
	if wanted == "" {
		wanted, _ = env("BUILDKIT_PROGRESS")
	}
	mode, err := progress.ParseMode(wanted)
	if err != nil || !f.logTime {
		return mode, err
	}
	switch mode {
	case progress.Auto:
		return progress.Plain, nil
	case progress.Plain, progress.CI:
		return mode, nil
	}
	return "", fmt.Errorf("--log-time and --progress=%s cannot be used together", mode)
}

// job is one build, from its inputs to its outputs.
type job struct {
	*app
	*state
	flags    *buildFlags
	req      builder.Request
	outputs  []export.Output
	caches   cacheSpecs
	wanted   attest.Wanted
	origin   origin
	mounts   []remote.Mount // cache mounts that steps were given, if they are to be exported
	display  *progress.Display
	begin    time.Time
	id       string       // names the build and no other
	made     []madeImage  // for its record
	tasks    atomic.Int32 // of ours in the display
	nested   int          // builds of stages that are contexts of this one
	closers  []func() error
	warnings []string
}

// newBuilder wires a builder to the job.
func (j *job) newBuilder() *builder.Builder {
	return &builder.Builder{
		Store: j.store, Cache: j.cache, Registry: j.registry, Now: j.now, Emit: j.display.Emit, Jobs: j.flags.steps.jobs,
	}
}

// build builds, exports, and writes the files about the result.
func (j *job) build(ctx context.Context) error {
	b := j.newBuilder()
	j.req.Ground, j.req.SingleID, j.req.Scan = j.ground, j.ground.SingleID, j.wanted.SBOM
	j.req.Title = sbom.Subject{Name: j.title(), Tool: "filo-" + version(), Created: j.begin}
	j.checkLimits()
	if j.flags.steps.explain {
		j.req.Explain = func(vertex, text string) { fmt.Fprintf(j.stderr, "explain: %s: %s\n", vertex, text) }
	}
	shared, err := j.openCaches(ctx, b)
	if err != nil {
		return err
	}
	defer shared.Close()
	result, exported, err := j.produce(ctx, b, shared)
	if err != nil {
		return err
	}
	j.made = madeImages(exported)
	if err := j.writeFiles(exported, result); err != nil {
		return err
	}
	err = shared.Export(ctx, madeOf(result), j.mounts)
	j.display.Close()
	j.conclude(result, exported)
	return errors.Join(err, j.trim(ctx))
}

// trim removes what was used longest ago if --keep-storage or $FILO_KEEP_STORAGE bounds the state directory. What other
// builds use stays: they keep it from being pruned, and the last one of them prunes.
func (j *job) trim(ctx context.Context) error {
	if j.flags.steps.keep == "" {
		return nil
	}
	bound, err := storage(j.flags.steps.keep)
	if err != nil {
		return err
	}
	_, err = j.removeSelected(ctx, j.state, selection{match: (&filter{}).match, max: &bound})
	return err
}

// nextTask numbers a vertex that is not the builder's: those are positive.
func (j *job) nextTask() int { return -int(j.tasks.Add(1)) }

// task draws a piece of work that is not the builder's. What do says appears below its name.
func (j *job) task(name string, do func(say func(string)) error) error {
	id := j.nextTask()
	emit := func(e builder.Event) {
		e.Vertex, e.Name = id, name
		j.display.Emit(e)
	}
	emit(builder.Event{State: builder.Started})
	err := do(func(text string) { emit(builder.Event{State: builder.Log, Data: []byte(text + "\n")}) })
	if err != nil {
		emit(builder.Event{State: builder.Failed, Err: err})
		return err
	}
	emit(builder.Event{State: builder.Done})
	return nil
}

// close closes what the job opened.
func (j *job) close() {
	for _, c := range j.closers {
		c()
	}
}

// warn keeps a line that is shown when the build is over.
func (j *job) warn(text string) { j.warnings = append(j.warnings, text) }

// conclude shows the warnings and sums the build up.
func (j *job) conclude(r builder.Result, all []export.Exported) {
	notes := slices.Concat(j.flags.ignored.warnings(), j.display.Notes(), j.warnings)
	switch j.display.Mode() {
	case progress.Quiet:
		return
	case progress.RawJSON:
		j.concludeJSON(notes, r.Warnings)
		return
	}
	var b strings.Builder
	for _, w := range notes {
		fmt.Fprintf(&b, "WARNING: %s\n", w)
	}
	if n := len(r.Warnings); n > 0 {
		fmt.Fprintf(&b, "\n %s found (use --check to see more):\n", count(n, "warning"))
		for _, w := range r.Warnings {
			fmt.Fprintf(&b, " - %s: %s%s\n", w.Rule, w.Message, atLine(w))
		}
	}
	fmt.Fprint(j.stderr, b.String()+j.summary(r, all))
}

// concludeJSON shows the warnings to programs, as the status object that it is one more of.
func (j *job) concludeJSON(notes []string, found []dockerfile.Warning) {
	var all []buildWarning
	for _, text := range notes {
		all = append(all, buildWarning{Level: 1, Short: []byte(text)})
	}
	if all = append(all, j.buildWarnings(found)...); len(all) > 0 {
		json.NewEncoder(j.stderr).Encode(map[string]any{"warnings": all})
	}
}

// count says how many there are of a thing.
func count(n int, thing string) string {
	if n == 1 {
		return "1 " + thing
	}
	return fmt.Sprintf("%d %ss", n, thing)
}
