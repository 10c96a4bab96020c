package export

import (
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/moby/buildkit/util/suggest"
	csvvalue "github.com/tonistiigi/go-csvvalue"

	"filo/builder/image"
	"filo/layer"
	"filo/layer/registry"
)

// Output is one -o: where a result goes and how.
type Output struct {
	Type   string            // oci, docker, local, tar, image, registry
	Dest   string            // file or directory; "" or "-": Stdout, as far as the type allows it
	Attrs  map[string]string // all others
	Stdout io.Writer         // of the caller's choice; nil refuses output to stdout, as is right for a terminal
	Index  bool              // there is an index even for one platform
}

// The attributes of each type. A type has those of "image content" as well if it holds an image.
var (
	contentAttrs = []string{
		"name", "compression", "compression-level", "force-compression", "oci-mediatypes", "rewrite-timestamp",
		"prefer-nondist-layers", "oci-artifact", "attestation-inline", "source-date-epoch", "compatibility-version",
	}
	typeAttrs = map[string][]string{
		"oci":    append([]string{"tar"}, contentAttrs...),
		"docker": append([]string{"tar", "context"}, contentAttrs...),
		"local":  {"platform-split", "mode", "src", "attestation-prefix", "source-date-epoch"},
		"tar":    {"platform-split", "src", "attestation-prefix", "source-date-epoch"},
		"image": append([]string{"push", "push-by-digest", "registry.insecure", "unpack", "store", "name-canonical",
			"dangling-name-prefix", "danging-name-empty-only"}, contentAttrs...),
		"registry": append([]string{"push", "push-by-digest", "registry.insecure", "unpack", "store", "name-canonical",
			"dangling-name-prefix", "danging-name-empty-only"}, contentAttrs...),
	}
)

// Parse reads the value of -o: "type=oci,dest=out.tar", a path for type=local, or "-" for a tar on stdout.
// A value with a comma is quoted as in CSV. Types and attributes that are unknown, and values that can mean
// nothing, are errors.
func Parse(spec string) (Output, error) {
	if strings.TrimSpace(spec) == "" {
		return Output{}, errors.New("output is empty")
	}
	fields, err := csvvalue.Fields(spec, nil)
	if err != nil {
		return Output{}, fmt.Errorf("output %q: %w", spec, err)
	}
	if len(fields) == 1 && !strings.Contains(fields[0], "=") {
		if fields[0] == "-" {
			return Output{Type: "tar", Dest: "-", Attrs: map[string]string{}}, nil
		}
		return Output{Type: "local", Dest: fields[0], Attrs: map[string]string{}}, nil
	}
	o := Output{Attrs: map[string]string{}}
	for _, f := range fields {
		k, v, ok := strings.Cut(f, "=")
		k = strings.TrimSpace(k)
		switch {
		case !ok:
			return Output{}, fmt.Errorf("output %q: %q is not KEY=VALUE", spec, f)
		case k == "type":
			o.Type = v
		case k == "dest":
			o.Dest = v
		default:
			o.Attrs[k] = v
		}
	}
	if err := o.known(); err != nil {
		return Output{}, fmt.Errorf("output %q: %w", spec, err)
	}
	if _, err := o.plan(nil); err != nil {
		return Output{}, fmt.Errorf("output %q: %w", spec, err)
	}
	return o, nil
}

// known refuses types and attributes that do not exist.
func (o Output) known() error {
	types := slices.Sorted(maps.Keys(typeAttrs))
	if o.Type == "" {
		return fmt.Errorf("type is required: one of %s", strings.Join(types, ", "))
	}
	allowed, ok := typeAttrs[o.Type]
	if !ok {
		return suggested(fmt.Errorf("unknown type %q", o.Type), o.Type, types)
	}
	if o.Dest != "" && (o.Type == "image" || o.Type == "registry") {
		return fmt.Errorf("type=%s has no dest", o.Type)
	}
	for _, k := range slices.Sorted(maps.Keys(o.Attrs)) {
		if slices.Contains(allowed, k) || o.holdsImage() && strings.HasPrefix(k, "annotation") && isAnnotation(k) {
			continue
		}
		return suggested(fmt.Errorf("unknown attribute %q of type=%s", k, o.Type), k, append([]string{"type", "dest"}, allowed...))
	}
	return nil
}

// suggested adds to an error the option that was probably meant. The distance to a long word takes long.
func suggested(err error, word string, options []string) error {
	if len(word) > 100 {
		return err
	}
	return suggest.WrapError(err, word, options, true)
}

func (o Output) holdsImage() bool { return o.Type != "local" && o.Type != "tar" }

// Check says what is wrong with an output for a build of so many platforms and with these names, so that it
// can be said before anything is built.
func (o Output) Check(names []string, platforms int) error {
	p, err := o.plan(names)
	if err != nil {
		return fmt.Errorf("output type=%s: %w", o.Type, err)
	}
	switch {
	case o.Type == "local" && (o.Dest == "" || o.Dest == "-"):
		return errors.New("output type=local: dest is required")
	case o.Type == "docker" && platforms > 1:
		return errors.New("docker exporter does not support exporting manifest lists")
	case (o.Type == "image" || o.Type == "registry") && !p.push && !p.store:
		return fmt.Errorf("output type=%s: neither push nor store, nothing would come of it", o.Type)
	case p.push && len(p.names) == 0:
		return errors.New("tag is needed when pushing to registry")
	case platforms == 1 && !o.Index && (len(p.annotations.index) > 0 || len(p.annotations.indexDescriptor) > 0):
		return errors.New("index annotations not supported for single platform export")
	case o.ToStdout() && o.Stdout == nil:
		return fmt.Errorf("output type=%s: dest is required, refusing to write to the terminal", o.Type)
	}
	return nil
}

// repeatable reports whether what was half written can be written again, as to no stream.
func (o Output) repeatable() bool {
	if o.ToStdout() {
		return false
	}
	info, err := os.Stat(o.Dest)
	return err != nil || info.IsDir() || info.Mode().IsRegular()
}

// ToStdout reports whether the output is a stream without a file.
func (o Output) ToStdout() bool {
	switch o.Type {
	case "tar", "oci":
		return o.Dest == "" || o.Dest == "-"
	case "docker":
		return o.Dest == "-"
	}
	return false
}

// KeepsTimes reports whether files in new layers shall keep their times whatever SOURCE_DATE_EPOCH says:
// rewrite-timestamp=false. ok is false if the output does not say. It counts when layers are made.
func (o Output) KeepsTimes() (keep, ok bool) {
	v, ok := o.Attrs["rewrite-timestamp"]
	b, _ := strconv.ParseBool(v) // checked by Parse
	return ok && !b, ok
}

// Compression is how new layers leave the store, or nil if no layer does.
func (o Output) Compression() *layer.Compression {
	if !o.holdsImage() {
		return nil
	}
	p, err := o.plan(nil)
	if err != nil {
		return nil
	}
	return &p.write.Compression
}

// Pushes reports whether the output sends the image to a registry.
func (o Output) Pushes() bool {
	p, err := o.plan(nil)
	return err == nil && p.push
}

// plan is an output with its attributes understood.
type plan struct {
	names       []string // full
	write       image.WriteOptions
	annotations annotations
	changes     string // an attribute that asks for another image than a finished one

	asTar                    bool // oci, docker
	push, byDigest, insecure bool
	store, canonical         bool
	dangling                 string
	danglingEmptyOnly        bool
	split                    *bool // local, tar
	remove                   bool
	src                      string
	old                      bool // compatibility-version before 30

	inline         bool   // attestations that are only for images are for this output
	imageShaped    bool   // oci-artifact=false: attestations are shaped like images
	noAttestations bool   // the format has no place for them
	prefix         string // local, tar: of the names of attestations
}

// plan reads the attributes. Names are only used if there is no attribute name.
func (o Output) plan(names []string) (plan, error) {
	p := plan{
		asTar: true,
		push:  o.Type == "registry",
		store: o.Type == "image" || o.Type == "docker" && o.Dest == "",

		inline:         o.Type == "image" || o.Type == "registry",
		noAttestations: o.Type == "docker",
	}
	for _, k := range slices.Sorted(maps.Keys(o.Attrs)) {
		if err := p.attr(k, o.Attrs[k]); err != nil {
			return p, err
		}
	}
	if v, ok := o.Attrs["name"]; ok {
		names = strings.Split(v, ",")
	}
	if _, told := o.Attrs["oci-mediatypes"]; p.old && !told && o.Type != "oci" && !onlyOCI(o.Attrs["compression"]) && p.annotations.none() {
		p.write.DockerTypes = true
	}
	if err := checkCompression(o.Attrs, &p.write); err != nil {
		return p, err
	}
	if o.holdsImage() {
		return p, p.setNames(names)
	}
	return p, nil
}

// setNames normalises names and sees that they can be given.
func (p *plan) setNames(names []string) error {
	for _, n := range names {
		if n = strings.TrimSpace(n); n == "" {
			continue
		}
		full, err := registry.Normalize(n)
		if err != nil {
			return err
		}
		switch {
		case digested(full):
			return fmt.Errorf("invalid name %q: a digest cannot be chosen", n)
		case p.byDigest && strings.HasSuffix(n, full[strings.LastIndexByte(full, ':'):]):
			return fmt.Errorf("name %q has a tag and cannot be pushed by digest", n)
		case slices.Contains(p.names, full):
			continue
		}
		p.names = append(p.names, full)
	}
	return nil
}

// attr understands one attribute.
func (p *plan) attr(k, v string) error {
	switch k {
	case "name", "compression", "compression-level":
		return nil // read elsewhere, together
	case "dangling-name-prefix":
		_, err := registry.Repository(v)
		p.dangling = v
		return err
	case "src":
		if v == "" {
			return errors.New("src is empty")
		}
		p.src = v
		return nil
	case "mode":
		if v != "copy" && v != "delete" {
			return fmt.Errorf("mode=%s: want copy or delete", v)
		}
		p.remove = v == "delete"
		return nil
	case "compatibility-version":
		return p.setVersion(v)
	case "attestation-prefix":
		if strings.ContainsAny(v, "/\x00") {
			return fmt.Errorf("attestation-prefix=%s: want the beginning of a file name", v)
		}
		p.prefix = v
		return nil
	case "source-date-epoch", "context":
		return fmt.Errorf("%s is not supported%s", k, instead[k])
	}
	if isAnnotation(k) {
		p.changes = k
		return p.annotations.add(k, v)
	}
	return p.flag(k, v)
}

// setVersion takes one of BuildKit's versions of the format. What older ones change here is the default of
// the media types: Docker's, but for type=oci.
func (p *plan) setVersion(v string) error {
	if !slices.Contains([]string{"10", "20", "30"}, v) {
		return fmt.Errorf("compatibility-version=%s: want 10, 20 or 30", v)
	}
	p.old = v != "30"
	return nil
}

// instead says what to do about attributes of BuildKit's that make no sense here.
var instead = map[string]string{
	"source-date-epoch": ": set SOURCE_DATE_EPOCH",
	"context":           ": images are loaded into filo's own store",
}

// flag understands an attribute that is true or false.
func (p *plan) flag(k, v string) error {
	b, err := strconv.ParseBool(v)
	if err != nil {
		if v != "" {
			return fmt.Errorf("%s=%s: want true or false", k, v)
		}
		b = true
	}
	switch k {
	case "tar":
		p.asTar = b
	case "push":
		p.push = b
	case "push-by-digest":
		p.byDigest = b
	case "registry.insecure":
		p.insecure = b
	case "store":
		p.store = b
	case "name-canonical":
		p.canonical = b
	case "danging-name-empty-only":
		p.danglingEmptyOnly = b
	case "platform-split":
		p.split = &b
	case "rewrite-timestamp": // see KeepsTimes
	case "force-compression":
		p.write.Force, p.changes = b, k
	case "oci-mediatypes":
		p.write.DockerTypes, p.changes = !b, k
	case "oci-artifact":
		p.imageShaped = !b
	case "attestation-inline":
		p.inline = b
	case "unpack", "prefer-nondist-layers":
		if b {
			return fmt.Errorf("%s is not supported", k)
		}
	default:
		return fmt.Errorf("unknown attribute %q", k)
	}
	return nil
}

// maxLevel is the highest compression level of each algorithm; 0 if it has none.
var maxLevel = map[string]int{"gzip": 9, "estargz": 9, "zstd": 22, "uncompressed": 0}

// onlyOCI reports whether layers of a compression have no media type of Docker's, or none that tells what they are.
func onlyOCI(compression string) bool { return compression == "zstd" || compression == "estargz" }

func checkCompression(attrs map[string]string, w *image.WriteOptions) error {
	alg, ok := attrs["compression"]
	if !ok || alg == "" {
		alg = "gzip"
	}
	top, ok := maxLevel[alg]
	if !ok {
		return suggested(fmt.Errorf("unknown compression %q", alg), alg, slices.Sorted(maps.Keys(maxLevel)))
	}
	if onlyOCI(alg) && w.DockerTypes {
		return fmt.Errorf("compression=%s conflicts with oci-mediatypes=false", alg)
	}
	w.Compression.Algorithm = alg
	text, ok := attrs["compression-level"]
	if !ok {
		return nil
	}
	level, err := strconv.Atoi(text)
	if err != nil {
		return fmt.Errorf("compression-level=%s: not a number", text)
	}
	if level < 1 || level > top {
		if top == 0 {
			return fmt.Errorf("compression-level=%s: compression=%s has no levels", text, alg)
		}
		return fmt.Errorf("compression-level=%s: %s takes 1 to %d", text, alg, top)
	}
	w.Compression.Level = level
	return nil
}
