package dockerfile

import (
	"fmt"
	"strconv"
	"strings"

	"github.com/containerd/platforms"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"filo/layer/registry/reference"
)

const scratch = "scratch"

// normalContext returns the form in which names of contexts are compared: alpine, alpine:latest and
// docker.io/library/alpine are one name. A platform after "::" is a part of it.
func normalContext(name string) string {
	name, platform, ok := strings.Cut(name, "::")
	if named, err := reference.Parse(name); err == nil {
		name = strings.TrimSuffix(named.Familiar(), ":latest")
	}
	if !ok {
		return name
	}
	if p, err := platforms.Parse(platform); err == nil {
		platform = platforms.FormatAll(platforms.Normalize(p))
	}
	return name + "::" + platform
}

// context returns the caller's name of the build context that replaces an image or stage of that name; one that is
// for the platform alone goes first.
func (f *File) context(name string, p *ocispec.Platform) (string, bool) {
	if strings.EqualFold(name, scratch) || strings.EqualFold(name, "context") {
		return "", false
	}
	if p == nil {
		p = &f.args.TargetPlatform
	}
	name = normalContext(name)
	if c, ok := f.contexts[name+"::"+platforms.FormatAll(platforms.Normalize(*p))]; ok {
		return c, true
	}
	c, ok := f.contexts[name]
	return c, ok
}

// image returns the Ref of what is neither a stage nor a number.
func (f *File) image(name string, p *ocispec.Platform) (Ref, error) {
	if name == scratch {
		return Ref{Name: scratch}, nil
	}
	if _, err := reference.Parse(name); err != nil {
		return Ref{}, fmt.Errorf("invalid stage or image name %q: %w", name, err)
	}
	if c, ok := f.context(name, p); ok {
		return Ref{Name: c}, nil
	}
	return Ref{Name: name}, nil
}

// origin returns what the from= of a mount means. Stage numbers are not accepted there.
func (f *File) origin(from string) (Ref, error) {
	if s := f.stage(from); s != nil {
		return s.ref(), nil
	}
	return f.image(from, nil)
}

// copyOrigin returns what the --from of a COPY means.
func (f *File) copyOrigin(from string) (Ref, error) {
	word, err := f.lex().ProcessWordWithMatches(from, newEnv())
	if err != nil {
		return Ref{}, err
	}
	if word.Result != from {
		return Ref{}, &Error{
			Err:  fmt.Errorf("variable expansion is not supported for --from, define a new stage with FROM using ARG from global scope as a workaround"),
			Hint: fmt.Sprintf("add the stage \"FROM %s AS name\" above and copy --from=name", from),
		}
	}
	n, err := strconv.Atoi(from)
	if err != nil {
		return f.origin(from)
	}
	if n < 0 || n >= len(f.Stages) {
		return Ref{}, fmt.Errorf("invalid stage index %d", n)
	}
	return f.Stages[n].ref(), nil
}

// ref returns the Ref of the stage, or of what replaces it.
func (s *Stage) ref() Ref {
	if s.replaced {
		return s.Base
	}
	return Ref{Stage: s}
}
