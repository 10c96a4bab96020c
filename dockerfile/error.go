package dockerfile

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/moby/buildkit/frontend/dockerfile/parser"
)

// Range is lines of a Dockerfile, counted from 1, both ends included.
type Range struct{ Start, End int }

// Error is what is wrong with a Dockerfile or with a step of it, and where.
type Error struct {
	File   string
	Ranges []Range  // sorted, apart from each other; none if the error has no place
	Source []string // the lines of the file
	Err    error    // the cause
	Hint   string   // what might help; "" for nothing

	Warnings []Warning // of [Parse] and [Stage.Steps]: what the checks found before the error
}

// Error returns the cause; see [Error.Position] and [Error.Excerpt] for the place.
func (e *Error) Error() string { return e.Err.Error() }

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.Err }

// Position returns "Dockerfile:3", or the file name alone if there is no line.
func (e *Error) Position() string {
	if len(e.Ranges) == 0 {
		return e.File
	}
	return fmt.Sprintf("%s:%d", e.File, e.Ranges[0].Start)
}

// Excerpt returns the lines around the place, those that matter marked with ">>>"; "" if there is no place.
func (e *Error) Excerpt() string { return Excerpt(e.File, e.Source, e.Ranges) }

// Excerpt returns the lines of a file around some ranges of it, in the form that BuildKit gives them.
// Ranges far from each other make an excerpt each.
func Excerpt(file string, source []string, where []Range) string {
	var b strings.Builder
	for _, group := range groups(where) {
		writeExcerpt(&b, file, source, group)
	}
	return b.String()
}

const rule = "--------------------\n"

func writeExcerpt(b *strings.Builder, file string, source []string, where []Range) {
	start, end := where[0].Start, min(where[len(where)-1].End, len(source))
	if start < 1 || start > len(source) {
		return
	}
	around := 1
	if start == end {
		around = 2
	}
	fmt.Fprintf(b, "%s:%d\n"+rule, file, start)
	for n := max(1, start-around); n <= min(len(source), end+around); n++ {
		mark := "   "
		if slices.ContainsFunc(where, func(r Range) bool { return r.Start <= n && n <= r.End }) {
			mark = ">>>"
		}
		fmt.Fprintf(b, " %3d | %s %s\n", n, mark, strings.TrimSuffix(source[n-1], "\r"))
	}
	b.WriteString(rule)
}

// groups puts ranges that are at most a few lines apart together.
func groups(where []Range) [][]Range {
	const near = 5
	var out [][]Range
	for _, r := range mergeRanges(where) {
		if n := len(out); n > 0 && r.Start-out[n-1][len(out[n-1])-1].End <= near {
			out[n-1] = append(out[n-1], r)
			continue
		}
		out = append(out, []Range{r})
	}
	return out
}

// Locate gives an error the place of a step, unless it has one.
func (f *File) Locate(st Step, err error) error {
	return f.place(err, []Range{{st.Start, st.End}})
}

// Locate gives an error the place of the stage's FROM, unless it has one.
func (s *Stage) Locate(err error) error { return s.file.at(err, s.from) }

// at gives an error the place that the parser knows, or else this one.
func (f *File) at(err error, where []parser.Range) error {
	if err == nil {
		return nil
	}
	var known *parser.LocationError
	if errors.As(err, &known) {
		where = nil
		for _, r := range known.Locations {
			where = append(where, r...)
		}
	}
	return f.place(err, ranges(where))
}

func (f *File) place(err error, where []Range) error {
	if err == nil {
		return nil
	}
	var e *Error
	if !errors.As(err, &e) {
		return &Error{File: f.Name, Ranges: where, Source: f.lines, Err: settle(err)}
	}
	if len(e.Ranges) > 0 || e.File != "" {
		return err
	}
	return &Error{File: f.Name, Ranges: where, Source: f.lines, Err: e.Err, Hint: e.Hint}
}

// ranges turns the parser's places, one a line, into ranges.
func ranges(where []parser.Range) []Range {
	out := make([]Range, 0, len(where))
	for _, r := range where {
		out = append(out, Range{max(r.Start.Line, 1), max(r.Start.Line, r.End.Line, 1)})
	}
	return mergeRanges(out)
}

// mergeRanges sorts ranges and joins those that touch.
func mergeRanges(in []Range) []Range {
	in = slices.Clone(in)
	slices.SortFunc(in, func(a, b Range) int { return a.Start - b.Start })
	var out []Range
	for _, r := range in {
		if n := len(out); n > 0 && r.Start <= out[n-1].End+1 {
			out[n-1].End = max(out[n-1].End, r.End)
			continue
		}
		out = append(out, r)
	}
	return out
}

// lines returns the first and the last line of a place.
func lines(where []parser.Range) (start, end int) {
	rs := ranges(where)
	if len(rs) == 0 {
		return 0, 0
	}
	return rs[0].Start, rs[len(rs)-1].End
}
