// Package progress draws what a builder reports: plain lines in BuildKit's form (plain.go), which a CI system may fold
// (fold.go), a redrawn list on a terminal (tty.go), BuildKit's status objects as JSON (raw.go), or nothing. Where the time
// went is in timing.go. Lines are cut from the stream of a step in line.go; every line of every step is drawn, however long the log.
//
// It decides nothing and keeps nothing but what it needs to draw, and the last lines of each step for whoever shows
// the error. Steps are numbered here, in the order in which they are first heard of, so that others than the builder
// (an exporter, a pull) may report too.
//
// Start at [Display].
package progress

import (
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/docker/go-units"

	"filo/builder"
)

// Mode is a way of drawing.
type Mode string

// The ways of drawing.
const (
	Auto    Mode = "auto"    // TTY on a terminal, else Plain
	Plain   Mode = "plain"   // lines
	CI      Mode = "ci"      // the lines of Plain, with marks for a CI system that folds those of a step
	TTY     Mode = "tty"     // a list that is redrawn
	Quiet   Mode = "quiet"   // nothing
	RawJSON Mode = "rawjson" // an object a line
)

// ParseMode reads a mode as the user writes it; "" is [Auto] and "none" is [Quiet].
func ParseMode(s string) (Mode, error) {
	switch m := Mode(s); m {
	case "":
		return Auto, nil
	case "none":
		return Quiet, nil
	case Auto, Plain, CI, TTY, Quiet, RawJSON:
		return m, nil
	}
	return "", fmt.Errorf("parse progress mode %q: must be one of auto, plain, ci, tty, quiet, rawjson", s)
}

// ErrNoTerminal is returned for [TTY] where there is no terminal to draw on.
var ErrNoTerminal = errors.New("tty progress needs a terminal")

// Options are the choices of a [Display].
type Options struct {
	Mode     Mode
	Now      func() time.Time                   // the clock
	Size     func() (width, height int)         // of the terminal; nil if the output is none
	Color    bool                               // TTY only
	Timed    bool                               // Plain and CI: each line begins with its time
	Fold     Fold                               // CI only
	LogLines int                                // TTY: lines of a running step's log that are shown; 0 is 6
	Ticker   func(time.Duration, func()) func() // calls a function regularly until the returned stop; nil draws on events only
}

// Display draws events. Its methods may be called from several goroutines.
type Display struct {
	mu       sync.Mutex
	now      func() time.Time
	vertices map[int]*vertex
	early    map[int][]span // phases of vertices that are not known yet
	order    []*vertex
	first    int // in order, of those that count
	style    style
	failed   *vertex // the first that failed
	notes    []string
	mode     Mode
	stop     func()
	closed   bool
}

// style is one way of drawing. Its methods are called one at a time.
type style interface {
	event(v *vertex, e builder.Event, lines []line) // the lines are those that e completed
	tick()                                          // some time has passed
	close()
}

// vertex is what is known of one step.
type vertex struct {
	n       int
	name    string
	state   builder.State
	err     error
	started time.Time
	ended   time.Time
	streams [3]partial // by stream: 0 the builder's own words, 1 standard output, 2 standard error
	spans   []span     // its phases
	moves   []*move    // what it waits for
	tail    []string   // the last lines of its output, as plain mode shows them
}

// move is something that comes byte by byte.
type move struct {
	what      string
	bytes, of int64
	begin     time.Time
	end       time.Time // zero as long as it comes
	drawn     time.Time // when plain mode last did
}

// took is how long m took, or takes so far.
func (m *move) took(now time.Time) time.Duration {
	if !m.end.IsZero() {
		now = m.end
	}
	return now.Sub(m.begin)
}

// count is how much of m came, and of how much.
func (m *move) count() string {
	return units.HumanSize(float64(m.bytes)) + " / " + units.HumanSize(float64(m.of))
}

// move brings what e says about something that moves up to date.
func (v *vertex) move(e builder.Event, now time.Time) {
	m := v.moving(string(e.Data))
	if m == nil {
		m = &move{what: string(e.Data), begin: now, drawn: now}
		v.moves = append(v.moves, m)
	}
	m.bytes, m.of = e.Bytes, e.Of
	if e.State == builder.Moved {
		m.end = now
	}
}

// moving finds what moves by its name; nil if it does not.
func (v *vertex) moving(what string) *move {
	i := slices.IndexFunc(v.moves, func(m *move) bool { return m.what == what })
	if i < 0 {
		return nil
	}
	return v.moves[i]
}

func (v *vertex) running() bool { return v.ended.IsZero() }

const tailLines = 10 // BuildKit shows as many of a failed step

// New returns a display that draws on w. It must be closed.
func New(w io.Writer, o Options) (*Display, error) {
	d := &Display{now: o.Now, vertices: map[int]*vertex{}, early: map[int][]span{}}
	mode := o.Mode
	switch {
	case mode == TTY && o.Size == nil:
		return nil, ErrNoTerminal
	case mode == Auto && o.Size != nil:
		mode = TTY
	case mode == Auto:
		mode = Plain
	}
	d.mode = mode
	switch mode {
	case TTY:
		d.style = newTTY(w, d, o)
	case Plain:
		d.style = &plain{w: w, now: o.Now, timed: o.Timed}
	case CI:
		d.style = &plain{w: w, now: o.Now, timed: o.Timed, fold: o.Fold}
	case RawJSON:
		d.style = &raw{w: w, now: o.Now}
	case Quiet:
		d.style = silent{}
	default:
		return nil, fmt.Errorf("draw progress: no such mode %q", mode)
	}
	if o.Ticker != nil && mode != Quiet {
		d.stop = o.Ticker(tickEvery, d.Tick)
	}
	return d, nil
}

const tickEvery = 150 * time.Millisecond

// Emit draws one event. It is what [builder.Builder] calls.
func (d *Display) Emit(e builder.Event) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return
	}
	if e.Vertex == 0 { // of the whole build
		d.notes = append(d.notes, string(e.Data))
		return
	}
	if e.State == builder.Entered || e.State == builder.Left {
		d.phase(e)
		return
	}
	v := d.vertex(e)
	var lines []line
	switch e.State {
	case builder.Log:
		lines = v.take(e.Stream, e.Data, d.now())
	case builder.Moving, builder.Moved:
		v.move(e, d.now())
	case builder.Cached, builder.Done, builder.Failed, builder.Canceled:
		lines = v.flush()
		v.state, v.err, v.ended = e.State, e.Err, d.now()
		if e.State == builder.Failed && d.failed == nil {
			d.failed = v
		}
	}
	d.style.event(v, e, lines)
}

// Tick draws what waits for time to pass.
func (d *Display) Tick() {
	d.mu.Lock()
	defer d.mu.Unlock()
	if !d.closed {
		d.style.tick()
	}
}

// Close draws what is left and ends the display. Later events are dropped.
func (d *Display) Close() {
	if d.stop != nil {
		d.stop()
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return
	}
	for _, v := range d.order {
		if lines := v.flush(); len(lines) > 0 {
			d.style.event(v, builder.Event{State: builder.Log}, lines)
		}
	}
	d.style.close()
	d.closed = true
}

// Again says that the builder begins again: what it emits from now on is of other steps. Those so far stay drawn; how they
// ended, and what was said of the build, counts for nothing any more.
func (d *Display) Again() {
	d.mu.Lock()
	defer d.mu.Unlock()
	maps.DeleteFunc(d.vertices, func(id int, _ *vertex) bool { return id > 0 }) // others than the builder go on
	clear(d.early)
	d.first, d.failed, d.notes = len(d.order), nil, nil
}

// Failure returns the name and the last log lines of the step that failed first, if one did and printed something.
// A quiet display has none.
func (d *Display) Failure() (name string, tail []string, ok bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.mode == Quiet || d.failed == nil || len(d.failed.tail) == 0 {
		return "", nil, false
	}
	return d.failed.name, d.failed.tail, true
}

// Counts returns how many steps ended since the builder last began and how many of these came from the cache, among those
// whose name counts.
func (d *Display) Counts(counts func(name string) bool) (ended, cached int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, v := range d.order[d.first:] {
		if v.running() || !counts(v.name) {
			continue
		}
		ended++
		if v.state == builder.Cached {
			cached++
		}
	}
	return ended, cached
}

// Step is what became of a vertex.
type Step struct {
	Name  string
	State builder.State // of its end; Started as long as it runs
	Took  time.Duration
	Err   error
}

// Steps returns all vertices in the order in which they were first heard of.
func (d *Display) Steps() []Step {
	d.mu.Lock()
	defer d.mu.Unlock()
	var out []Step
	for _, v := range d.order {
		end := v.ended
		if v.running() {
			end = d.now()
		}
		out = append(out, Step{v.name, v.state, end.Sub(v.started), v.err})
	}
	return out
}

// Mode returns how the display draws; it is never [Auto].
func (d *Display) Mode() Mode { return d.mode }

// Notes returns the warnings that belong to no step.
func (d *Display) Notes() []string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.Clone(d.notes)
}

// vertex returns the vertex of e, a new one if it is first heard of.
func (d *Display) vertex(e builder.Event) *vertex {
	v := d.vertices[e.Vertex]
	if v == nil {
		v = &vertex{n: len(d.order) + 1, name: e.Name, started: d.now(), spans: d.early[e.Vertex]}
		delete(d.early, e.Vertex)
		d.vertices[e.Vertex] = v
		d.order = append(d.order, v)
	}
	if e.Name != "" {
		v.name = e.Name
	}
	return v
}

type silent struct{}

func (silent) event(*vertex, builder.Event, []line) {}
func (silent) tick()                                {}
func (silent) close()                               {}
