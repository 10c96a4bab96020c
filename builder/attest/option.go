package attest

import (
	"errors"
	"fmt"
	"path"
	"strconv"
	"strings"

	"github.com/moby/buildkit/util/suggest"
	csvvalue "github.com/tonistiigi/go-csvvalue"
)

// Options are what --provenance says.
type Options struct {
	Max          bool   // mode=max
	Old          bool   // version=v0.2
	BuilderID    string // "" is the builder's own
	Reproducible bool   // the user's word that the build is
	Complete     bool   // complete-materials: an error if there is an input without a digest
	Images       bool   // inline-only
	File         string // base name where the statement is a file
}

// Wanted are the attestations that a build is asked for; nil for none.
type Wanted struct {
	Provenance *Options
	SBOM       *Scanner
}

// Scanner is what --sbom says.
type Scanner struct {
	Generator string   // image that scans; "" for filo's own way
	Env       []string // "BUILDKIT_SCAN_KEY=VALUE" for it
}

// Parse reads the values of --attest, and those of --provenance and --sbom, which stand for one each. No value asks for
// nothing: images have no attestations unless somebody wants them. Whatever is not known is an error.
func Parse(attests []string, provenance, sbom string) (Wanted, error) {
	var w Wanted
	seen := map[string]bool{}
	for _, a := range attests {
		attrs, err := fields(a)
		if err == nil {
			err = w.add(attrs, seen)
		}
		if err != nil {
			return Wanted{}, fmt.Errorf("--attest %s: %w", a, err)
		}
	}
	for _, f := range []struct{ kind, value string }{{"provenance", provenance}, {"sbom", sbom}} {
		if f.value == "" {
			continue
		}
		attrs := [][2]string{}
		if on, err := strconv.ParseBool(f.value); err == nil {
			attrs = append(attrs, [2]string{"disabled", strconv.FormatBool(!on)})
		} else if attrs, err = fields(f.value); err != nil {
			return Wanted{}, fmt.Errorf("--%s %s: %w", f.kind, f.value, err)
		}
		if err := w.add(append(attrs, [2]string{"type", f.kind}), seen); err != nil {
			return Wanted{}, fmt.Errorf("--%s=%s: %w", f.kind, f.value, err)
		}
	}
	return w, nil
}

func fields(s string) ([][2]string, error) {
	list, err := csvvalue.Fields(s, nil)
	if err != nil {
		return nil, err
	}
	var out [][2]string
	for _, f := range list {
		k, v, ok := strings.Cut(f, "=")
		if !ok {
			return nil, fmt.Errorf("%q is not KEY=VALUE", f)
		}
		out = append(out, [2]string{strings.ToLower(strings.TrimSpace(k)), v})
	}
	return out, nil
}

// add understands one attestation. One that is disabled is not looked at any further.
func (w *Wanted) add(attrs [][2]string, seen map[string]bool) error {
	kind := ""
	var rest [][2]string
	disabled := false
	for _, a := range attrs {
		switch a[0] {
		case "type":
			kind = a[1]
		case "disabled":
			var err error
			if disabled, err = strconv.ParseBool(a[1]); err != nil {
				return fmt.Errorf("disabled=%s: want true or false", a[1])
			}
		default:
			rest = append(rest, a)
		}
	}
	known := []string{"provenance", "sbom"}
	switch {
	case kind == "":
		return errors.New("type is required: provenance or sbom")
	case kind != "provenance" && kind != "sbom":
		return suggest.WrapError(fmt.Errorf("unknown type %q", kind), kind, known, true)
	case seen[kind]:
		return fmt.Errorf("type=%s is asked for twice", kind)
	}
	seen[kind] = true
	if disabled {
		return nil
	}
	if kind == "sbom" {
		return w.addScanner(rest)
	}
	o := &Options{File: "provenance.json"}
	for _, a := range rest {
		if err := o.set(a[0], a[1]); err != nil {
			return err
		}
	}
	w.Provenance = o
	return nil
}

func (o *Options) set(k, v string) error {
	switch k {
	case "mode":
		if v != "min" && v != "max" {
			return fmt.Errorf("mode=%s: want min or max", v)
		}
		o.Max = v == "max"
	case "version":
		if v != "v1" && v != "v0.2" {
			return fmt.Errorf("version=%s: want v1 or v0.2", v)
		}
		o.Old = v == "v0.2"
	case "builder-id":
		o.BuilderID = v
	case "filename":
		if v == "" || path.Base(v) != v || v == "." || v == ".." {
			return fmt.Errorf("filename=%s: want a file name", v)
		}
		o.File = v
	case "reproducible":
		return boolean(k, v, &o.Reproducible)
	case "inline-only":
		return boolean(k, v, &o.Images)
	case "complete-materials":
		return boolean(k, v, &o.Complete)
	case "capture-usage":
		var on bool
		if err := boolean(k, v, &on); err != nil || !on {
			return err
		}
		return errors.New("capture-usage is not supported; --timings shows where the time went")
	default:
		known := []string{"mode", "version", "builder-id", "filename", "reproducible", "inline-only", "complete-materials", "disabled"}
		return suggest.WrapError(fmt.Errorf("unknown attribute %q of type=provenance", k), k, known, true)
	}
	return nil
}

func boolean(k, v string, to *bool) error {
	b, err := strconv.ParseBool(v)
	if err != nil {
		return fmt.Errorf("%s=%s: want true or false", k, v)
	}
	*to = b
	return nil
}

// addScanner reads the attributes of type=sbom. Those that are not ours are the scanner's.
func (w *Wanted) addScanner(attrs [][2]string) error {
	s := &Scanner{}
	for _, a := range attrs {
		if a[0] == "generator" {
			s.Generator = a[1]
			continue
		}
		s.Env = append(s.Env, "BUILDKIT_SCAN_"+strings.ToUpper(a[0])+"="+a[1])
	}
	if s.Generator == "" && len(s.Env) > 0 {
		return fmt.Errorf("unknown attribute %q of type=sbom: others than generator are for generator=IMAGE", attrs[0][0])
	}
	w.SBOM = s
	return nil
}
