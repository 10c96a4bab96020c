package export

import (
	"fmt"
	"regexp"
	"strings"
	"sync"

	"github.com/containerd/platforms"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// annotationKey is an attribute such as annotation.k, annotation-index.k, annotation-manifest[linux/arm64].k.
var annotationKey = sync.OnceValue(func() *regexp.Regexp {
	return regexp.MustCompile(`^annotation(?:-([a-z-]+))?(?:\[([A-Za-z0-9_/.-]+)\])?\.(\S+)$`)
})

// annotationSpec is a value of --annotation before its "=": TYPE[PLATFORM],…:KEY.
var annotationSpec = sync.OnceValue(func() *regexp.Regexp {
	return regexp.MustCompile(`^((?:[a-z-]+(?:\[[A-Za-z0-9_/.-]+\])?,?)+):(\S+)$`)
})

// annotationTypes are what an annotation can stand on.
var annotationTypes = []string{"index", "index-descriptor", "manifest", "manifest-descriptor"}

func isAnnotation(k string) bool {
	return strings.HasPrefix(k, "annotation") && annotationKey().MatchString(k)
}

// annotations of a result by what they stand on.
type annotations struct {
	index, indexDescriptor map[string]string
	byPlatform             map[string]*levels // "" for all platforms
}

// levels are annotations of one image.
type levels struct{ manifest, manifestDescriptor map[string]string }

// add understands one attribute.
func (a *annotations) add(attr, v string) error {
	m := annotationKey().FindStringSubmatch(attr)
	kind, platform, k := m[1], m[2], m[3]
	if strings.HasPrefix(kind, "index") && platform != "" {
		return fmt.Errorf("%s: an index has no platform", attr)
	}
	switch kind {
	case "index":
		set(&a.index, k, v)
		return nil
	case "index-descriptor":
		set(&a.indexDescriptor, k, v)
		return nil
	case "", "manifest", "manifest-descriptor":
	default:
		return fmt.Errorf("%s: unknown annotation type %q, want one of %s", attr, kind, strings.Join(annotationTypes, ", "))
	}
	if platform != "" {
		p, err := platforms.Parse(platform)
		if err != nil {
			return fmt.Errorf("%s: %w", attr, err)
		}
		platform = platforms.FormatAll(platforms.Normalize(p))
	}
	if a.byPlatform == nil {
		a.byPlatform = map[string]*levels{}
	}
	l := a.byPlatform[platform]
	if l == nil {
		l = &levels{}
		a.byPlatform[platform] = l
	}
	if kind == "manifest-descriptor" {
		set(&l.manifestDescriptor, k, v)
	} else {
		set(&l.manifest, k, v)
	}
	return nil
}

func (a annotations) none() bool {
	return len(a.index)+len(a.indexDescriptor)+len(a.byPlatform) == 0
}

func set(m *map[string]string, k, v string) {
	if *m == nil {
		*m = map[string]string{}
	}
	(*m)[k] = v
}

// of returns the annotations of one platform's image: those of all platforms and its own.
func (a annotations) of(p ocispec.Platform) levels {
	var out levels
	for _, key := range []string{"", platforms.FormatAll(platforms.Normalize(p))} {
		if l := a.byPlatform[key]; l != nil {
			out.manifest = with(out.manifest, l.manifest)
			out.manifestDescriptor = with(out.manifestDescriptor, l.manifestDescriptor)
		}
	}
	return out
}

// ParseAnnotation reads a value of --annotation, [TYPE[[PLATFORM]][,…]:]KEY=VALUE, and returns it as attributes
// of an output. Without a type it stands on the manifest.
func ParseAnnotation(spec string) (map[string]string, error) {
	key, value, ok := strings.Cut(spec, "=")
	if !ok || key == "" {
		return nil, fmt.Errorf("annotation %q: want KEY=VALUE", spec)
	}
	kinds := "manifest"
	if m := annotationSpec().FindStringSubmatch(key); m != nil {
		kinds, key = m[1], m[2]
	}
	attrs := map[string]string{}
	var probe annotations
	for kind := range strings.SplitSeq(kinds, ",") {
		attr := "annotation-" + kind + "." + key
		if !isAnnotation(attr) {
			return nil, fmt.Errorf("annotation %q: want [TYPE:]KEY=VALUE", spec)
		}
		if err := probe.add(attr, value); err != nil {
			return nil, fmt.Errorf("annotation %q: %w", spec, err)
		}
		attrs[attr] = value
	}
	return attrs, nil
}
