// Command bench measures filo and every peer found installed on the same work, in turn, and prints medians: wall time,
// CPU seconds, peak memory, bytes written and the ratio to filo. It makes its own inputs, base images and registry, so
// that nothing but the builders is needed and nothing leaves the machine.
//
// Results are compared file by file before times are: a line whose results differ gets no ratio. Inputs are made once
// and kept in -dir. Peers that are not installed are left out, and named.
//
// Start at [main]. works.go has the work, builders.go the builders, measure.go what is counted, floor.go what the kernel
// needs at least, registry.go and base.go where bases come from, listing.go how results are compared.
package main

import (
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"text/tabwriter"
	"time"
)

// options are the flags.
type options struct {
	scale  float64
	rounds int
	only   *regexp.Regexp
	peers  string
	filo   string
	dir    string
	keep   bool
}

func main() {
	if os.Args[0] == measurer {
		if err := measure(os.Args[1:]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	o := options{}
	flag.Float64Var(&o.scale, "scale", 0.1, "size of all work; 1 is 30,000 files, 1 GiB, a base of 300,000 files")
	flag.IntVar(&o.rounds, "rounds", 3, "how often filo and peers without a number of their own do each work")
	only := flag.String("work", "", "do only works whose name matches this `regexp`")
	flag.StringVar(&o.peers, "peers", "all", "comma-separated builders besides filo: "+strings.Join(peerNames(), ", ")+"; all, none; buildah:2 does 2 rounds at most")
	flag.StringVar(&o.filo, "filo", "", "filo `binary` (default built from this tree)")
	flag.StringVar(&o.dir, "dir", filepath.Join(os.TempDir(), "filo-bench"), "where inputs and state are kept")
	flag.BoolVar(&o.keep, "keep", false, "keep the builders' state")
	flag.Parse()
	o.only = regexp.MustCompile(*only)
	if err := run(o); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run(o options) (err error) {
	dir, err := filepath.Abs(o.dir)
	if err != nil {
		return err
	}
	inputs := filepath.Join(dir, fmt.Sprintf("inputs-%g", o.scale))
	scratch := filepath.Join(dir, "run")
	if err := errors.Join(discard(scratch), os.MkdirAll(inputs, 0o755), os.MkdirAll(scratch, 0o755)); err != nil {
		return err
	}
	if !o.keep {
		defer func() { err = errors.Join(err, discard(scratch)) }()
	}
	if o.filo, err = filo(o.filo, dir); err == nil {
		o.filo, err = installed(o.filo, scratch)
	}
	if err != nil {
		return err
	}
	reg, err := serve(filepath.Join(inputs, "registry"))
	if err != nil {
		return err
	}
	defer reg.Close()
	in := &inputsOf{dir: inputs, scale: o.scale, registry: reg}
	spread(scratch)
	all := contenders(o, scratch, reg.Host)
	defer func() {
		for _, b := range all {
			err = errors.Join(err, b.stop())
		}
	}()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	var t table
	for _, w := range works() {
		if !o.only.MatchString(w.name) || ctx.Err() != nil {
			continue
		}
		fmt.Fprintf(os.Stderr, "%s: making inputs\n", w.name)
		job, err := w.make(in)
		if err != nil {
			return fmt.Errorf("%s: make inputs: %w", w.name, err)
		}
		t.measure(ctx, w, job, all, scratch)
	}
	t.print(o, all)
	return nil
}

// filo returns the binary to measure.
func filo(path, dir string) (string, error) {
	if path != "" {
		return filepath.Abs(path)
	}
	path = filepath.Join(dir, "filo")
	cmd := exec.Command("go", "build", "-trimpath", "-ldflags=-s -w", "-o", path, "./cmd/filo")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	cmd.Stderr = os.Stderr
	return path, cmd.Run()
}

// installed returns a copy of a binary. The linker writes to its file here and there, so that the kernel has it in memory
// in small pieces and a start takes 1.3 ms longer: nobody gets to see that of a program that was downloaded or copied.
func installed(path, dir string) (string, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return "", err
	}
	to := filepath.Join(dir, "filo-installed")
	return to, os.WriteFile(to, data, 0o755)
}

// table collects what was measured.
type table struct {
	lines []*line
	notes []string
}

// line is one work in one case: cold, cached, changed.
type line struct {
	name    string
	wanted  float64 // ratio to BuildKit; 0 for none
	floor   time.Duration
	by      map[string][]usage // by builder
	listing map[string]string  // digest of the result, by builder
}

func (t *table) line(name string) *line {
	i := slices.IndexFunc(t.lines, func(l *line) bool { return l.name == name })
	if i >= 0 {
		return t.lines[i]
	}
	l := &line{name: name, by: map[string][]usage{}, listing: map[string]string{}}
	t.lines = append(t.lines, l)
	return l
}

// measure lets all builders do the work in turn, each as often as it is to. An interrupt ends it, and what was measured
// until then counts.
func (t *table) measure(ctx context.Context, w work, j *job, all []contender, scratch string) {
	for _, c := range w.cases {
		l := t.line(w.name + " " + c)
		l.wanted = w.wanted[c]
		if f := j.floor[c]; f != nil {
			l.floor = f()
		}
	}
	broken := map[string]bool{}
	for round := range all[0].rounds {
		for i, b := range all {
			if broken[b.name()] || round >= b.rounds || w.alone && (i > 0 || round > 0) || ctx.Err() != nil {
				continue
			}
			fmt.Fprintf(os.Stderr, "%s: round %d: %s\n", w.name, round+1, b.name())
			if err := t.round(w, j, b, round, scratch); err != nil {
				broken[b.name()] = true
				t.notes = append(t.notes, fmt.Sprintf("%s: %s: %v", w.name, b.name(), err))
			}
		}
	}
}

// round is one builder doing every case of a work, from a state that has the work's base and nothing else.
func (t *table) round(w work, j *job, b builder, round int, scratch string) error {
	if err := b.reset(); err != nil {
		return fmt.Errorf("reset: %w", err)
	}
	out := filepath.Join(scratch, "out-"+b.name())
	if j.warm != "" {
		if _, err := b.build(task{context: j.context, file: j.warm, out: out}); err != nil {
			return fmt.Errorf("pull the base: %w", err)
		}
	}
	for _, c := range w.cases {
		if prepare := j.prepare[c]; prepare != nil {
			if err := prepare(round); err != nil {
				return err
			}
		}
		k := task{context: j.context, file: j.file, out: out, push: j.push}
		if j.push != "" {
			k.push += "-" + b.name()
		}
		before := j.requests()
		u, err := b.build(k)
		if err != nil {
			return fmt.Errorf("%s: %w", c, err)
		}
		u.requests = j.requests() - before
		l := t.line(w.name + " " + c)
		l.by[b.name()] = append(l.by[b.name()], u)
		if round == 0 {
			if l.listing[b.name()], err = j.list(k, filepath.Join(scratch, strings.ReplaceAll(w.name+"-"+c+"-"+b.name(), " ", "-"))); err != nil {
				return fmt.Errorf("%s: read the result: %w", c, err)
			}
		}
	}
	return nil
}

// print writes the medians, one row a builder.
func (t *table) print(o options, all []contender) {
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Printf("medians at scale %g; ratio is that builder's time over filo's, wanted what filo is to reach; floor is filo's over the least the kernel needs\n", o.scale)
	fmt.Fprintln(w, "work\tbuilder\trounds\twall\tspread\tratio\twanted\tfloor\tCPU\tmemory\twritten\trequests\t")
	for _, l := range t.lines {
		for _, b := range all {
			if us := l.by[b.name()]; len(us) > 0 {
				t.row(w, l, b.name(), us)
			}
		}
	}
	w.Flush()
	fmt.Println(t.peak())
	for _, p := range missing(o) {
		fmt.Println("not installed:", p)
	}
	for _, n := range t.notes {
		fmt.Println("note:", n)
	}
}

func (t *table) row(w io.Writer, l *line, name string, us []usage) {
	m, mine := median(us), l.by["filo"]
	ratio, wanted, floor := "", "", ""
	switch {
	case name == "filo" && l.floor > 0:
		floor = fmt.Sprintf("%.1f", float64(m.wall)/float64(l.floor))
	case name == "filo" || len(mine) == 0:
	case l.listing[name] != l.listing["filo"]:
		ratio = "unequal"
		t.notes = append(t.notes, fmt.Sprintf("%s: the results of filo and %s differ: run with -keep and compare the listings", l.name, name))
	default:
		ratio = fmt.Sprintf("%.1f", float64(m.wall)/float64(median(mine).wall))
	}
	if name == "buildkit" && l.wanted > 0 {
		wanted = fmt.Sprintf("%g", l.wanted)
	}
	fmt.Fprintf(w, "%s\t%s\t%d\t%s\t%s\t%s\t%s\t%s\t%.2fs\t%dM\t%dM\t%s\t\n", l.name, name, len(us), m.wall.Round(100*time.Microsecond), spreadOf(us), ratio, wanted, floor,
		m.cpu.Seconds(), m.memory>>20, m.written>>20, counted(m.requests))
}

// peak says in which work filo needed the most memory.
func (t *table) peak() string {
	var most int64
	var in string
	for _, l := range t.lines {
		for _, u := range l.by["filo"] {
			if u.memory > most {
				most, in = u.memory, l.name
			}
		}
	}
	return fmt.Sprintf("the most memory that filo needed: %d MiB, in %s", most>>20, in)
}

func counted(n int) string {
	if n == 0 {
		return ""
	}
	return fmt.Sprint(n)
}

// spreadOf is the least and the greatest wall time.
func spreadOf(us []usage) string {
	by := func(a, b usage) int { return cmp.Compare(a.wall, b.wall) }
	return fmt.Sprintf("%.3g–%.3gs", slices.MinFunc(us, by).wall.Seconds(), slices.MaxFunc(us, by).wall.Seconds())
}
