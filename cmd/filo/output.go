package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/docker/go-units"

	"filo/builder"
	"filo/builder/export"
	"filo/builder/image"
	"filo/dockerfile"
)

// parse turns -o, --push, --load, -t and --annotation into the outputs of a build for so many platforms; index says that
// there is an index even for one, id that the image ID is asked for, so that there has to be an image. stdout is where an
// output without a file goes; nil refuses one.
func (f *resultFlags) parse(platforms int, index, id bool, stdout io.Writer) ([]export.Output, error) {
	names, err := f.names()
	if err != nil {
		return nil, err
	}
	specs := slices.DeleteFunc(slices.Clone(f.outputs), func(s string) bool { return s == cacheOnly })
	if f.load {
		specs = append(specs, "type=image,store=true")
	}
	if len(specs) == 0 && !f.push && !f.cacheOnly() && (id || len(names) > 0 || f.iidfile != "" || f.metadata != "") {
		specs = append(specs, "type=image")
	}
	outputs, err := parseOutputs(specs)
	if err != nil {
		return nil, err
	}
	if f.push {
		outputs = pushed(outputs)
	}
	for i := range outputs {
		o := &outputs[i]
		if err := f.annotate(o); err != nil {
			return nil, err
		}
		o.Stdout, o.Index = stdout, index
		if err := o.Check(names, max(platforms, 1)); err != nil {
			return nil, err
		}
		if o.ToStdout() && slices.ContainsFunc(outputs[:i], export.Output.ToStdout) {
			return nil, errors.New("only one output can go to standard output")
		}
	}
	return outputs, nil
}

// suit lets a build make layers as its outputs want them.
func suit(req *builder.Request, outputs []export.Output) error {
	said := false
	for _, o := range outputs {
		if c := o.Compression(); c != nil && req.Ships == nil {
			req.Ships = c
		}
		keep, ok := o.KeepsTimes()
		if ok && said && keep != req.KeepTimes {
			return errors.New("rewrite-timestamp: outputs of one build have the same layers, so all must say the same")
		}
		if ok {
			req.KeepTimes, said = keep, true
		}
	}
	return nil
}

func parseOutputs(specs []string) ([]export.Output, error) {
	var out []export.Output
	for _, s := range specs {
		o, err := export.Parse(s)
		if err != nil {
			return nil, err
		}
		out = append(out, o)
	}
	return out, nil
}

// pushed makes outputs push: the images among them, else one more.
func pushed(outputs []export.Output) []export.Output {
	pushes := false
	for _, o := range outputs {
		if o.Type == "image" && o.Attrs["push"] == "" {
			o.Attrs["push"] = "true"
		}
		pushes = pushes || o.Pushes()
	}
	if pushes {
		return outputs
	}
	return append(outputs, export.Output{Type: "registry", Attrs: map[string]string{}})
}

// annotate adds what --annotation says to an output that holds an image.
func (f *resultFlags) annotate(o *export.Output) error {
	if o.Type == "local" || o.Type == "tar" {
		return nil
	}
	for _, a := range f.annotations {
		attrs, err := export.ParseAnnotation(a)
		if err != nil {
			return err
		}
		maps.Copy(o.Attrs, attrs)
	}
	return nil
}

// cacheOnly is the -o that asks for no result.
const cacheOnly = "type=cacheonly"

func (f *resultFlags) cacheOnly() bool { return slices.Contains(f.outputs, cacheOnly) }

// titles are what exports are called in the display.
var titles = map[string]string{
	"oci": "exporting to oci image format", "docker": "exporting to docker image format", "image": "exporting to image",
	"registry": "exporting to image", "local": "exporting to client directory", "tar": "exporting to client tarball",
}

// export writes the result to every output.
func (j *job) export(ctx context.Context, r builder.Result) ([]export.Exported, error) {
	if len(j.outputs) == 0 && !j.flags.results.cacheOnly() {
		j.warn("No output specified: the result stays in the cache only. Use -t NAME to keep the image, --push to push it, or -o")
	}
	names, err := j.flags.results.names()
	if err != nil {
		return nil, err
	}
	res := export.Result{Images: r.Images, Names: names, Index: j.req.MultiPlatform, Epoch: r.Epoch, Attest: j.statements(r)}
	var all []export.Exported
	for _, o := range j.outputs {
		err := j.task(titles[o.Type], func(say func(string)) error {
			x, err := export.Write(ctx, j.exporter(say), o, res)
			all = append(all, x)
			return err
		})
		if err != nil {
			return nil, err
		}
	}
	return all, nil
}

// newExporter returns what exports; say shows what it does.
func (a *app) newExporter(s *state, say func(string)) export.Exporter {
	return export.Exporter{
		Store: s.store, Client: s.registry,
		Report: func(text string) func(error) {
			begin := a.now()
			return func(err error) {
				if err == nil {
					say(text + took(a.now().Sub(begin)) + " done")
				}
			}
		},
	}
}

// exporter exports the result of a build.
func (j *job) exporter(say func(string)) export.Exporter {
	e := j.newExporter(j.state, say)
	e.Warn = j.warn
	e.Devices = j.root && j.ground.Name != rootless
	e.AllowDelete = slices.Contains(j.flags.steps.allow, allowDelete)
	return e
}

// allowDelete is the entitlement that lets type=local,mode=delete empty any directory.
const allowDelete = "buildx.local.delete"

// took says how long something took, if it is worth saying.
func took(d time.Duration) string {
	if d < 10*time.Millisecond {
		return ""
	}
	return fmt.Sprintf(" %.1fs", d.Seconds())
}

// writeFiles writes --iidfile and --metadata-file and prints the image ID if that is all that was asked for.
func (j *job) writeFiles(all []export.Exported, r builder.Result) error {
	id, metadata := "", map[string]any{}
	for _, x := range all {
		if id == "" && x.Descriptor.Digest != "" {
			id = x.ID()
		}
		maps.Copy(metadata, x.Metadata())
	}
	if v, _ := j.env("BUILDX_METADATA_WARNINGS"); truthy(v) {
		metadata["buildx.build.warnings"] = j.buildWarnings(r.Warnings)
	}
	if err := j.metadataProvenance(metadata, r); err != nil {
		return err
	}
	if f := j.flags.results.iidfile; f != "" && id == "" {
		j.warn("--iidfile: no output holds an image, so there is no ID to write")
	} else if f != "" {
		if err := writeFile(f, []byte(id)); err != nil {
			return err
		}
	}
	if f := j.flags.results.metadata; f != "" {
		b, err := json.MarshalIndent(metadata, "", "  ")
		if err != nil {
			return err
		}
		if err := writeFile(f, append(b, '\n')); err != nil {
			return err
		}
	}
	if j.flags.show.quiet && id != "" && !slices.ContainsFunc(j.outputs, export.Output.ToStdout) {
		_, err := fmt.Fprintln(j.stdout, id)
		return err
	}
	return nil
}

// forget removes the file that an earlier build wrote, so that nobody takes its ID for that of one that failed.
func forget(iidfile string) error {
	if fi, err := os.Lstat(iidfile); err != nil || !fi.Mode().IsRegular() {
		return nil
	}
	return os.Remove(iidfile)
}

// buildWarning is a warning in JSON, with its place in the Dockerfile if it has one: BuildKit's VertexWarning.
type buildWarning struct {
	Level  int         `json:"level"`
	Short  []byte      `json:"short"`
	Detail [][]byte    `json:"detail,omitempty"`
	URL    string      `json:"url,omitempty"`
	Source *sourceInfo `json:"sourceInfo,omitempty"`
	Range  []lineRange `json:"range,omitempty"`
}

// buildWarnings are the findings of build checks.
func (j *job) buildWarnings(found []dockerfile.Warning) []buildWarning {
	out := []buildWarning{}
	for _, w := range found {
		short := []byte(w.Rule + ": " + w.Message + atLine(w))
		out = append(out, buildWarning{1, short, [][]byte{[]byte(w.Detail)}, w.URL, &j.sources()[0], at(w.Ranges).Ranges})
	}
	return out
}

// summary is one line about the whole build.
func (j *job) summary(r builder.Result, all []export.Exported) string {
	var parts []string
	for _, x := range all {
		if x.Graph != nil {
			parts = append(parts, x.Descriptor.Digest.String(), layersOf(x.Graph))
			break
		}
	}
	steps, cached := j.display.Counts(isStep)
	parts = append(parts, fmt.Sprintf("%d of %s cached", cached, count(steps, "step")), fmt.Sprintf("%.1fs", j.now().Sub(j.begin).Seconds()))
	return "\n" + strings.Join(parts, ", ") + "\n"
}

// isStep reports whether a vertex of that name is a step of a stage: not its base, not work of the builder's own, not a
// look at the result.
func isStep(name string) bool {
	stage, text, ok := strings.Cut(name, "] ")
	scan := stage == "[sbom" || strings.HasSuffix(stage, " sbom") // a stage of that name would have a number
	return ok && !scan && strings.HasPrefix(stage, "[") && stage != "[internal" && !strings.HasPrefix(stage, "[context ") && !strings.HasPrefix(text, "FROM ")
}

// layersOf counts the layers of an image, or of the first of several.
func layersOf(g *image.Graph) string {
	if len(g.Images) == 0 {
		return "no image"
	}
	var size int64
	for _, l := range g.Images[0].Layers {
		size += l.Size
	}
	text := fmt.Sprintf("%s of %s", count(len(g.Images[0].Layers), "layer"), units.HumanSize(float64(size)))
	n := len(slices.DeleteFunc(slices.Clone(g.Images), func(m image.Member) bool { return m.Attestation }))
	if n > 1 {
		text = fmt.Sprintf("%d platforms, the first with %s", n, text)
	}
	return text
}

// atLine is the place of a warning.
func atLine(w dockerfile.Warning) string {
	if len(w.Ranges) == 0 {
		return ""
	}
	return fmt.Sprintf(" (line %d)", w.Ranges[0].Start)
}
