package main

import (
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"filo/layer"
)

// filter is what all --filter of `filo prune` and `filo du` say together.
type filter struct {
	until *time.Duration
	conds []func(layer.Item) bool
}

func (f *filter) match(it layer.Item) bool {
	return !slices.ContainsFunc(f.conds, func(c func(layer.Item) bool) bool { return !c(it) })
}

// filterTypes are the values of type, with those of docker buildx.
var filterTypes = map[string][]layer.Kind{
	"layer": {layer.KindLayer}, "blob": {layer.KindBlob}, "cachemount": {layer.KindMount}, "source": {layer.KindSource}, "record": {layer.KindRecord},
	"regular": {layer.KindLayer, layer.KindBlob}, "exec.cachemount": {layer.KindMount}, "internal": {layer.KindRecord},
	"source.local": {layer.KindSource}, "source.git.checkout": {layer.KindSource}, "frontend": {},
}

var filterForm = sync.OnceValue(func() *regexp.Regexp {
	return regexp.MustCompile(`^([a-z.-]+)(=|!=|~=)(.*)$`)
})

// parseFilters reads KEY=VALUE, KEY!=VALUE and KEY~=REGEXP, also several of them with commas between.
func parseFilters(all []string) (*filter, error) {
	f := &filter{}
	for _, list := range all {
		for text := range strings.SplitSeq(list, ",") {
			if err := f.add(strings.TrimSpace(text)); err != nil {
				return nil, fmt.Errorf("--filter %q: %w", text, err)
			}
		}
	}
	return f, nil
}

func (f *filter) add(text string) error {
	if text == "inuse" {
		text = "inuse=true"
	}
	m := filterForm().FindStringSubmatch(text)
	if m == nil {
		return errors.New("want KEY=VALUE, KEY!=VALUE or KEY~=REGEXP")
	}
	key, op, value := m[1], m[2], m[3]
	switch key {
	case "until", "unused-for":
		d, err := time.ParseDuration(value)
		if err != nil || op != "=" {
			return fmt.Errorf("want %s= and a time like 24h", key)
		}
		f.until = &d
		return nil
	case "inuse":
		yes, err := strconv.ParseBool(value)
		if err != nil || op == "~=" {
			return errors.New("want true or false")
		}
		f.conds = append(f.conds, func(it layer.Item) bool { return it.InUse == (yes == (op == "=")) })
		return nil
	case "id":
		return f.text(op, value, func(it layer.Item) []string { return []string{it.ID, strings.TrimPrefix(it.ID, "sha256:")} })
	case "type":
		if _, known := filterTypes[value]; !known && op != "~=" {
			return errors.New("no such type: layer, blob, cachemount, source, record, or one of docker buildx")
		}
		return f.text(op, value, typesOf)
	}
	return errors.New("no such key: type, until, id, inuse")
}

// typesOf are all names for the kind of it.
func typesOf(it layer.Item) (names []string) {
	for name, kinds := range filterTypes {
		if slices.Contains(kinds, it.Kind) {
			names = append(names, name)
		}
	}
	return names
}

// text adds a condition on a text that may be said in several ways.
func (f *filter) text(op, value string, of func(layer.Item) []string) error {
	holds := func(it layer.Item) bool { return slices.Contains(of(it), value) }
	if op == "~=" {
		re, err := regexp.Compile(value)
		if err != nil {
			return err
		}
		holds = func(it layer.Item) bool { return slices.ContainsFunc(of(it), re.MatchString) }
	}
	f.conds = append(f.conds, func(it layer.Item) bool { return holds(it) == (op != "!=") })
	return nil
}
