package progress

import (
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"filo/builder"
)

// span is a phase of a vertex.
type span struct {
	phase      string
	begin, end time.Time
}

// phase notes that a phase began or ended. A phase before the vertex is known is kept for when it is.
func (d *Display) phase(e builder.Event) {
	spans := d.early[e.Vertex]
	v := d.vertices[e.Vertex]
	if v != nil {
		spans = v.spans
	}
	name, now := string(e.Data), d.now()
	ended := -1
	if e.State == builder.Entered {
		spans = append(spans, span{phase: name, begin: now})
	} else if ended = lastOpen(spans, name); ended >= 0 {
		spans[ended].end = now
	}
	if v == nil {
		d.early[e.Vertex] = spans
		return
	}
	v.spans = spans
	if p, ok := d.style.(phaser); ok && ended >= 0 {
		p.phase(v, spans[ended])
	}
}

// phaser is a style that draws phases, each when it ended.
type phaser interface {
	phase(v *vertex, s span)
}

func lastOpen(spans []span, phase string) int {
	for i, s := range slices.Backward(spans) {
		if s.phase == phase && s.end.IsZero() {
			return i
		}
	}
	return -1
}

// phases are the columns of the timings.
var phases = []string{
	builder.Keying, builder.Waiting, builder.Unpacking, builder.Running, builder.Snapshoting, builder.Copying, builder.Compressing,
}

// WriteTimings writes where the time of each vertex went: a line each, a column a phase, and the whole.
func (d *Display) WriteTimings(w io.Writer) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintf(t, "#\t%s\ttotal\t step\n", strings.Join(phases, "\t"))
	for _, v := range d.order {
		fmt.Fprintf(t, "%d\t", v.n)
		for _, p := range phases {
			fmt.Fprintf(t, "%s\t", milliseconds(v.spent(p)))
		}
		name := v.name
		if v.state == builder.Cached {
			name += " (cached)"
		}
		fmt.Fprintf(t, "%s\t %s\n", milliseconds(v.ended.Sub(v.started)), strings.ReplaceAll(name, "\t", " "))
	}
	return t.Flush()
}

// spent is how long the vertex was in a phase.
func (v *vertex) spent(phase string) (sum time.Duration) {
	for _, s := range v.spans {
		if s.phase == phase && !s.end.IsZero() {
			sum += s.end.Sub(s.begin)
		}
	}
	return sum
}

func milliseconds(d time.Duration) string {
	if d <= 0 {
		return ""
	}
	return fmt.Sprintf("%.1fms", d.Seconds()*1000)
}

// traceEvent is one event of Chrome's trace format, which chrome://tracing and Perfetto read.
type traceEvent struct {
	Name  string         `json:"name"`
	Cat   string         `json:"cat,omitempty"`
	Phase string         `json:"ph"`
	At    int64          `json:"ts"` // microseconds
	Took  int64          `json:"dur,omitempty"`
	PID   int            `json:"pid"`
	TID   int            `json:"tid"` // a row for each vertex
	Args  map[string]any `json:"args,omitempty"`
}

// WriteTrace writes all vertices and their phases in Chrome's trace format.
func (d *Display) WriteTrace(w io.Writer) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	events := []traceEvent{}
	var zero time.Time // what all times count from
	for _, v := range d.order {
		first := v.started
		for _, s := range v.spans {
			first = earlier(first, s.begin)
		}
		if zero.IsZero() || first.Before(zero) {
			zero = first
		}
	}
	for _, v := range d.order {
		events = append(events, v.trace(zero, d.now())...)
	}
	return json.NewEncoder(w).Encode(struct {
		Events []traceEvent `json:"traceEvents"`
		Unit   string       `json:"displayTimeUnit"`
	}{events, "ms"})
}

func earlier(a, b time.Time) time.Time {
	if b.Before(a) {
		return b
	}
	return a
}

// trace is a row of the trace: its title, the vertex, and its phases inside.
func (v *vertex) trace(zero, now time.Time) []traceEvent {
	piece := func(name, cat string, begin, end time.Time) traceEvent {
		end = cmp.Or(end, now)
		return traceEvent{Name: name, Cat: cat, Phase: "X", At: begin.Sub(zero).Microseconds(), Took: max(1, end.Sub(begin).Microseconds()), PID: 1, TID: v.n}
	}
	whole := piece(v.name, "step", v.started, v.ended)
	whole.Args = map[string]any{"cached": v.state == builder.Cached}
	if v.err != nil {
		whole.Args["error"] = v.err.Error()
	}
	events := []traceEvent{
		{Name: "thread_name", Phase: "M", PID: 1, TID: v.n, Args: map[string]any{"name": fmt.Sprintf("#%d %s", v.n, v.name)}},
		whole,
	}
	for _, s := range v.spans {
		events = append(events, piece(s.phase, "phase", s.begin, s.end))
	}
	return events
}
