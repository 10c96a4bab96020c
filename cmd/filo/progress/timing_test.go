package progress

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"filo/builder"
)

func phase(n int, s builder.State, name string) builder.Event {
	return builder.Event{Vertex: n, State: s, Data: []byte(name)}
}

// timed draws a step that is keyed before it starts and compressed after its end, and one that nobody hears of again.
func timed(t *testing.T, o Options) (*Display, *bytes.Buffer) {
	t.Helper()
	d, out, c := display(t, o)
	events := []builder.Event{
		phase(2, builder.Entered, builder.Keying),
		phase(1, builder.Entered, builder.Keying),
		phase(1, builder.Left, builder.Keying),
		started(1, "[1/1] RUN x"),
		phase(1, builder.Entered, builder.Running),
		phase(1, builder.Left, builder.Running),
		ended(1, builder.Done),
		phase(1, builder.Entered, builder.Compressing),
		phase(1, builder.Left, builder.Compressing),
		phase(1, builder.Left, "unknown"),
	}
	for i, e := range events {
		c.add(time.Duration(i) * time.Millisecond)
		d.Emit(e)
	}
	d.Close()
	return d, out
}

func TestTimings(t *testing.T) {
	d, out := timed(t, Options{Mode: Plain})
	if strings.Contains(out.String(), builder.Running) {
		t.Errorf("plain drew phases: %s", out)
	}
	var b bytes.Buffer
	if err := d.WriteTimings(&b); err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(b.String(), "\n")
	got := [][]string{strings.Fields(lines[0]), strings.Fields(lines[1])}
	want := [][]string{
		{"#", "key", "wait", "unpack", "run", "snapshot", "copy", "compress", "total", "step"},
		{"1", "2.0ms", "5.0ms", "8.0ms", "15.0ms", "[1/1]", "RUN", "x"},
	}
	if diff := cmp.Diff(want, got); diff != "" || len(lines) != 3 {
		t.Errorf("%s in %q", diff, lines)
	}
}

func TestTrace(t *testing.T) {
	d, _ := timed(t, Options{Mode: Quiet})
	var b bytes.Buffer
	if err := d.WriteTrace(&b); err != nil {
		t.Fatal(err)
	}
	var got struct{ TraceEvents []traceEvent }
	if err := json.Unmarshal(b.Bytes(), &got); err != nil {
		t.Fatal(err)
	}
	var lines []string
	for _, e := range got.TraceEvents {
		lines = append(lines, strings.Join([]string{e.Phase, e.Cat, e.Name, time.Duration(e.At * 1000).String(), time.Duration(e.Took * 1000).String()}, " "))
	}
	want := []string{
		"M  thread_name 0s 0s",
		"X step [1/1] RUN x 5ms 15ms",
		"X phase key 0s 2ms",
		"X phase run 9ms 5ms",
		"X phase compress 27ms 8ms",
	}
	if diff := cmp.Diff(want, lines); diff != "" {
		t.Error(diff)
	}
}

func TestRawPhases(t *testing.T) {
	_, out := timed(t, Options{Mode: RawJSON})
	var ids []string
	for line := range strings.Lines(out.String()) {
		var s solveStatus
		if err := json.Unmarshal([]byte(line), &s); err != nil {
			t.Fatal(err)
		}
		for _, p := range s.Statuses {
			ids = append(ids, p.ID+" "+p.Completed.Sub(*p.Started).String())
		}
	}
	if diff := cmp.Diff([]string{"key 2ms", "run 5ms", "compress 8ms"}, ids); diff != "" {
		t.Error(diff)
	}
}
