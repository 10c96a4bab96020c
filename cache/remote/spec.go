package remote

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/docker/go-units"
	"github.com/moby/buildkit/util/suggest"
	"github.com/tonistiigi/go-csvvalue"

	"filo/layer"
)

// The types of a place.
const (
	kindRegistry = "registry"
	kindLocal    = "local"
	kindS3       = "s3"
	inline       = "inline"
)

// The roles of a place.
const (
	importer = "importer"
	exporter = "exporter"
)

// Spec is a value of --cache-from or --cache-to, understood.
type Spec struct {
	Type string
	Text string // what progress and errors call it: a reference, a directory, a bucket; holds no secret

	attrs map[string]string

	all           bool // mode=max
	ignoreError   bool
	compression   layer.Compression
	force         bool // recompress layers that have another compression
	imageManifest bool
	ociTypes      bool
	insecure      bool
	reset         bool
	maxAge        time.Duration // 0 is no limit
	maxRecords    int
	mounts        bool          // cache mounts travel as well
	mountsMax     int64         // bytes of files in all of them
	names         []string      // type=s3: of the index
	pathStyle     *bool         // type=s3: the bucket is in the path, not the host; nil is what the endpoint is known for
	touch         time.Duration // type=s3: the age from which a blob in use is made young again
	uploads       int           // type=s3: at once
}

// Defaults of a target.
const (
	defaultMaxAge     = 30 * 24 * time.Hour
	defaultMaxRecords = 2000
	defaultMountsMax  = "2GB"
)

var (
	fromAttrs = map[string][]string{
		kindRegistry: append([]string{"ref", "registry.insecure", "max-age"}, mountAttrs...),
		kindLocal:    append([]string{"src", "tag", "digest", "max-age"}, mountAttrs...),
		kindS3:       append(append([]string{"max-age"}, bucketAttrs...), mountAttrs...),
	}
	mountAttrs = []string{"cache-mounts", "cache-mounts-max"}
	writeAttrs = []string{"mode", "compression", "compression-level", "force-compression", "ignore-error", "max-age", "max-records", "cache-mounts", "cache-mounts-max"}
	toAttrs    = map[string][]string{
		kindRegistry: append([]string{"ref", "registry.insecure", "image-manifest", "oci-mediatypes"}, writeAttrs...),
		kindLocal:    append([]string{"dest", "tag", "reset", "image-manifest", "oci-mediatypes"}, writeAttrs...),
		kindS3:       append(append([]string{"upload_parallelism"}, writeAttrs...), bucketAttrs...),
		inline:       {},
	}
	bucketAttrs = []string{
		"bucket", "region", "endpoint_url", "use_path_style", "prefix", "blobs_prefix", "manifests_prefix", "name",
		"access_key_id", "secret_access_key", "session_token", "touch_refresh",
	}
)

// ParseFrom reads a value of --cache-from: type=TYPE,KEY=VALUE,… or image references.
func ParseFrom(value string) ([]Spec, error) {
	return parse(value, importer, fromAttrs)
}

// ParseTo reads a value of --cache-to, in the same form.
func ParseTo(value string) ([]Spec, error) {
	return parse(value, exporter, toAttrs)
}

func parse(value, role string, known map[string][]string) ([]Spec, error) {
	fields, err := csvvalue.Fields(value, nil)
	if err != nil {
		return nil, fmt.Errorf("%q: %w", value, err)
	}
	if !slices.ContainsFunc(fields, func(f string) bool { return strings.Contains(f, "=") }) {
		var specs []Spec
		for _, ref := range fields {
			s := Spec{Type: kindRegistry, attrs: map[string]string{"ref": ref}}
			if err := s.read(); err != nil {
				return nil, err
			}
			specs = append(specs, s)
		}
		return specs, nil
	}
	s := Spec{attrs: map[string]string{}}
	for _, f := range fields {
		k, v, ok := strings.Cut(f, "=")
		if k = strings.ToLower(strings.TrimSpace(k)); !ok || k == "" {
			return nil, fmt.Errorf("%q is not KEY=VALUE", f)
		}
		if k == "type" {
			s.Type = v
			continue
		}
		s.attrs[k] = v
	}
	if err := s.check(role, known); err != nil {
		return nil, err
	}
	if err := s.read(); err != nil {
		return nil, err
	}
	return s.split(role), nil
}

// split makes of an export under several names one each. An import takes the first that there is.
func (s Spec) split(role string) []Spec {
	if role == importer || len(s.names) < 2 {
		return []Spec{s}
	}
	var all []Spec
	for _, name := range s.names {
		one := s
		one.names = []string{name}
		all = append(all, one)
	}
	return all
}

// check refuses types and attributes that do not exist.
func (s *Spec) check(role string, known map[string][]string) error {
	if s.Type == "" {
		return fmt.Errorf("type is required: one of %s", strings.Join(slices.Sorted(maps.Keys(known)), ", "))
	}
	attrs, ok := known[s.Type]
	if !ok {
		return suggested(fmt.Errorf("unknown cache %s: %q", role, s.Type), s.Type, slices.Sorted(maps.Keys(known)))
	}
	for _, k := range slices.Sorted(maps.Keys(s.attrs)) {
		if !slices.Contains(attrs, k) {
			return suggested(fmt.Errorf("unknown attribute %q of type=%s", k, s.Type), k, attrs)
		}
	}
	return nil
}

// suggested adds to an error the word that was probably meant. The distance to a long one takes long.
func suggested(err error, word string, options []string) error {
	if len(word) > 100 {
		return err
	}
	return suggest.WrapError(err, word, options, true)
}

// read understands the attributes.
func (s *Spec) read() error {
	if err := s.name(); err != nil {
		return err
	}
	switch v := s.attrs["mode"]; v {
	case "", "min":
	case "max":
		s.all = true
	default:
		return fmt.Errorf("mode=%s: must be min or max", v)
	}
	s.compression.Algorithm = s.attrs["compression"]
	var errs []error
	boolean := func(k string, to *bool, otherwise bool) {
		*to = otherwise
		if v, ok := s.attrs[k]; ok {
			var err error
			if *to, err = strconv.ParseBool(v); err != nil {
				errs = append(errs, fmt.Errorf("%s=%s: must be true or false", k, v))
			}
		}
	}
	number := func(k string, to *int, otherwise int) {
		*to = otherwise
		if v, ok := s.attrs[k]; ok {
			var err error
			if *to, err = strconv.Atoi(v); err != nil || *to < 0 {
				errs = append(errs, fmt.Errorf("%s=%s: must be a number", k, v))
			}
		}
	}
	boolean("force-compression", &s.force, false)
	boolean("ignore-error", &s.ignoreError, false)
	boolean("oci-mediatypes", &s.ociTypes, true)
	boolean("image-manifest", &s.imageManifest, s.ociTypes)
	boolean("registry.insecure", &s.insecure, false)
	boolean("reset", &s.reset, false)
	boolean("cache-mounts", &s.mounts, false)
	number("compression-level", &s.compression.Level, 0)
	number("max-records", &s.maxRecords, defaultMaxRecords)
	var err error
	if s.maxAge, err = duration(s.attrs["max-age"]); err != nil {
		errs = append(errs, fmt.Errorf("max-age=%s: %w", s.attrs["max-age"], err))
	}
	most := cmp.Or(s.attrs["cache-mounts-max"], defaultMountsMax)
	if s.mountsMax, err = units.FromHumanSize(most); err != nil || s.mountsMax <= 0 {
		errs = append(errs, fmt.Errorf("cache-mounts-max=%s: must be a size like 2GB", most))
	}
	if s.Type == kindS3 {
		errs = append(errs, s.readBucket())
	}
	if s.imageManifest && !s.ociTypes {
		errs = append(errs, errors.New("oci-mediatypes=false needs image-manifest=false: an image manifest has OCI media types"))
	}
	return errors.Join(append(errs, s.compression.Check())...)
}

// readBucket understands the attributes of type=s3 that are not plain text.
func (s *Spec) readBucket() (err error) {
	s.names = strings.Split(cmp.Or(s.attrs["name"], defaultName), ";")
	if v, ok := s.attrs["use_path_style"]; ok {
		path, err := strconv.ParseBool(v)
		if err != nil {
			return fmt.Errorf("use_path_style=%s: must be true or false", v)
		}
		s.pathStyle = &path
	}
	if s.touch, err = duration(cmp.Or(s.attrs["touch_refresh"], "24h")); err != nil {
		return fmt.Errorf("touch_refresh=%s: %w", s.attrs["touch_refresh"], err)
	}
	if s.uploads, err = strconv.Atoi(cmp.Or(s.attrs["upload_parallelism"], strconv.Itoa(atOnce))); err != nil || s.uploads < 1 {
		return fmt.Errorf("upload_parallelism=%s: must be a number from 1", s.attrs["upload_parallelism"])
	}
	return nil
}

// defaultName is BuildKit's.
const defaultName = "buildkit"

// name finds what the place is called.
func (s *Spec) name() error {
	need := func(k string) error {
		if s.Text = s.attrs[k]; s.Text == "" {
			return fmt.Errorf("type=%s: %s is required", s.Type, k)
		}
		return nil
	}
	switch s.Type {
	case kindRegistry:
		return need("ref")
	case kindS3:
		err := need("bucket")
		if p := s.attrs["prefix"]; p != "" {
			s.Text += "/" + p
		}
		return err
	case inline:
		s.Text = inline
		return nil
	}
	if _, ok := s.attrs["src"]; ok {
		return need("src")
	}
	return need("dest")
}

// duration reads a time span; besides Go's units there are d for days and w for weeks. "" is 0.
func duration(v string) (time.Duration, error) {
	for unit, length := range map[string]time.Duration{"d": 24 * time.Hour, "w": 7 * 24 * time.Hour} {
		n, ok := strings.CutSuffix(v, unit)
		if !ok {
			continue
		}
		f, err := strconv.ParseFloat(n, 64)
		if err != nil || f <= 0 || f > 1e5 {
			return 0, errors.New("not a time span like 72h or 30d")
		}
		return time.Duration(f * float64(length)), nil
	}
	if v == "" {
		return 0, nil
	}
	d, err := time.ParseDuration(v)
	if err != nil || d <= 0 {
		return 0, errors.New("not a time span like 72h or 30d")
	}
	return d, nil
}
