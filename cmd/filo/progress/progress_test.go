package progress

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"filo/builder"
)

// clock is a time that moves only when told.
type clock struct{ t time.Time }

func newClock() *clock { return &clock{time.Unix(1700000000, 0)} }

func (c *clock) now() time.Time { return c.t }

func (c *clock) add(d time.Duration) { c.t = c.t.Add(d) }

func display(t *testing.T, o Options) (*Display, *bytes.Buffer, *clock) {
	t.Helper()
	var out bytes.Buffer
	c := newClock()
	o.Now = c.now
	d, err := New(&out, o)
	if err != nil {
		t.Fatal(err)
	}
	return d, &out, c
}

func started(n int, name string) builder.Event {
	return builder.Event{Vertex: n, Name: name, State: builder.Started}
}

func log(n, stream int, text string) builder.Event {
	return builder.Event{Vertex: n, State: builder.Log, Stream: stream, Data: []byte(text)}
}

func moving(n int, s builder.State, what string, bytes, of int64) builder.Event {
	return builder.Event{Vertex: n, State: s, Data: []byte(what), Bytes: bytes, Of: of}
}

func ended(n int, s builder.State) builder.Event { return builder.Event{Vertex: n, State: s} }

func TestPlain(t *testing.T) {
	const ms = time.Millisecond
	type at struct {
		after time.Duration
		e     builder.Event
	}
	tests := []struct {
		name   string
		events []at
		want   string
	}{
		{"one step", []at{
			{0, started(1, "[1/2] FROM busybox")},
			{100 * ms, ended(1, builder.Done)},
			{0, started(2, "[2/2] RUN echo a")},
			{1234 * ms, log(2, 1, "a\n")},
			{0, ended(2, builder.Done)},
			{0, started(3, "[3/3] RUN echo b")},
			{0, ended(3, builder.Cached)},
		}, "#1 [1/2] FROM busybox\n#1 DONE 0.1s\n\n#2 [2/2] RUN echo a\n#2 1.234 a\n#2 DONE 1.2s\n\n#3 [3/3] RUN echo b\n#3 CACHED\n"},
		{"failure and cancel", []at{
			{0, started(1, "a")},
			{0, started(2, "b")},
			{0, builder.Event{Vertex: 1, State: builder.Failed, Err: errors.New("exit code: 9")}},
			{0, ended(2, builder.Canceled)},
		}, "#1 a\n#1 ERROR: exit code: 9\n\n#2 b\n#2 CANCELED\n"},
		{"partial lines of two streams", []at{
			{0, started(1, "a")},
			{12345 * ms, log(1, 1, "out")},
			{0, log(1, 2, "err")},
			{0, log(1, 1, "put\nmo")},
			{0, log(1, 2, "or\r\n")},
			{0, ended(1, builder.Done)},
		}, "#1 a\n#1 12.35 output\n#1 12.35 error\n#1 12.35 mo\n#1 DONE 12.3s\n"},
		{"carriage returns inside a line are passed on", []at{
			{0, started(1, "a")},
			{0, log(1, 1, "10%\r20%\tx\n")},
			{0, ended(1, builder.Done)},
		}, "#1 a\n#1 0.000 10%\r20%\tx\n#1 DONE 0.0s\n"},
		{"the builder's own words", []at{
			{0, started(1, "[internal] load build context")},
			{0, log(1, 0, "transferring context: 30B done\n")},
			{0, builder.Event{Vertex: 1, State: builder.Warned, Data: []byte("Rule: text")}},
			{0, ended(1, builder.Done)},
		}, "#1 [internal] load build context\n#1 transferring context: 30B done\n#1 WARN: Rule: text\n#1 DONE 0.0s\n"},
		{"what moves is told at the end, and now and then if that takes long", []at{
			{0, started(1, "[internal] pull layers")},
			{0, moving(1, builder.Moving, "a", 0, 2_500_000)},
			{0, moving(1, builder.Moving, "b", 0, 7000)},
			{500 * ms, moving(1, builder.Moving, "a", 1000, 2_500_000)},
			{0, moving(1, builder.Moved, "b", 7000, 7000)},
			{patience, moving(1, builder.Moving, "a", 1_250_000, 2_500_000)},
			{200 * ms, moving(1, builder.Moved, "a", 2_500_000, 2_500_000)},
			{0, ended(1, builder.Done)},
		}, "#1 [internal] pull layers\n#1 b 7kB / 7kB 0.5s done\n#1 a 1.25MB / 2.5MB 5.5s\n#1 a 2.5MB / 2.5MB 5.7s done\n#1 DONE 5.7s\n"},
		{"others wait for the floor", []at{
			{0, started(1, "a")},
			{0, started(2, "b")},
			{0, log(2, 1, "b1\n")},
			{0, log(1, 1, "a1\n")},
			{0, ended(1, builder.Done)},
			{0, log(2, 1, "b2\n")},
			{0, ended(2, builder.Done)},
		}, "#1 a\n#1 0.000 a1\n#1 DONE 0.0s\n\n#2 b\n#2 0.000 b1\n#2 0.000 b2\n#2 DONE 0.0s\n"},
		{"but not for ever", []at{
			{0, started(1, "a")},
			{0, started(2, "b")},
			{patience, log(2, 1, "b1\n")},
			{0, log(1, 1, "a1\n")},
			{patience, log(1, 1, "a2\n")},
			{0, ended(1, builder.Done)},
			{0, ended(2, builder.Done)},
		}, "#1 a\n#1 ...\n\n#2 b\n#2 5.000 b1\n#2 ...\n\n#1 a\n#1 5.000 a1\n#1 10.00 a2\n#1 DONE 10.0s\n\n#2 b\n#2 DONE 10.0s\n"},
		{"what has ended does not wait", []at{
			{0, started(1, "a")},
			{0, started(2, "b")},
			{0, ended(2, builder.Cached)},
			{0, log(1, 1, "a1\n")},
		}, "#1 a\n#1 ...\n\n#2 b\n#2 CACHED\n\n#1 a\n#1 0.000 a1\n"},
		{"a display closed in the middle", []at{
			{0, started(1, "a")},
			{0, started(2, "b")},
			{0, log(1, 1, "half")},
			{0, log(2, 1, "other")},
		}, "#1 a\n#1 0.000 half\n#1 ...\n\n#2 b\n#2 0.000 other\n"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			d, out, c := display(t, Options{Mode: Plain})
			for _, a := range tt.events {
				c.add(a.after)
				d.Emit(a.e)
			}
			d.Close()
			if diff := cmp.Diff(tt.want, out.String()); diff != "" {
				t.Errorf("plain (-want +got):\n%s", diff)
			}
		})
	}
}

func TestPlainTickGivesUpTheFloor(t *testing.T) {
	d, out, c := display(t, Options{Mode: Plain})
	d.Emit(started(1, "a"))
	d.Emit(started(2, "b"))
	d.Emit(log(2, 1, "waiting\n"))
	d.Tick()
	if strings.Contains(out.String(), "waiting") {
		t.Errorf("Tick drew another vertex at once:\n%s", out)
	}
	c.add(patience)
	d.Tick()
	if !strings.Contains(out.String(), "waiting") {
		t.Errorf("Tick after %v drew nothing new:\n%s", patience, out)
	}
}

// TestPlainKeepsEveryLine lets two steps print a lot at the same time.
func TestPlainKeepsEveryLine(t *testing.T) {
	d, out, c := display(t, Options{Mode: Plain})
	const lines = 50000
	d.Emit(started(1, "a"))
	d.Emit(started(2, "b"))
	for i := range lines {
		c.add(time.Millisecond)
		d.Emit(log(1, 1, fmt.Sprintf("a%d\n", i)))
		d.Emit(log(2, 2, fmt.Sprintf("b%d\n", i)))
	}
	d.Emit(ended(1, builder.Done))
	d.Emit(ended(2, builder.Done))
	d.Close()
	next := map[string]int{}
	for _, l := range strings.Split(out.String(), "\n") {
		f := strings.Fields(l)
		if len(f) != 3 || f[1] == "DONE" {
			continue
		}
		who := f[2][:1]
		if want := fmt.Sprintf("%s%d", who, next[who]); f[2] != want {
			t.Fatalf("line %q follows %d lines of its step", l, next[who])
		}
		next[who]++
	}
	if next["a"] != lines || next["b"] != lines {
		t.Errorf("drew %d and %d lines, want %d each", next["a"], next["b"], lines)
	}
}

// TestLineWithoutEnd sees that binary output is neither lost nor kept in memory as one line.
func TestLineWithoutEnd(t *testing.T) {
	d, out, _ := display(t, Options{Mode: Plain})
	d.Emit(started(1, "a"))
	for range 100 {
		d.Emit(log(1, 1, strings.Repeat("x", 10000)))
		if n := len(d.order[0].streams[1].text); n > lineLimit {
			t.Fatalf("%d bytes of a line are kept, limit is %d", n, lineLimit)
		}
	}
	d.Emit(ended(1, builder.Done))
	if n := strings.Count(out.String(), "x"); n != 1000000 {
		t.Errorf("drew %d bytes, want 1000000", n)
	}
}

// Each line has the time at which it was due, whenever it is drawn.
func TestPlainTimed(t *testing.T) {
	d, out, c := display(t, Options{Mode: Plain, Timed: true})
	d.Emit(started(1, "a"))
	c.add(time.Second)
	d.Emit(log(1, 1, "par"))
	d.Emit(started(2, "b"))
	d.Emit(log(2, 1, "waits\n"))
	c.add(1500 * time.Millisecond)
	d.Emit(log(1, 1, "tial\n"))
	d.Emit(moving(1, builder.Moved, "sha256:1", 5, 5))
	d.Emit(ended(1, builder.Done))
	d.Emit(ended(2, builder.Done))
	want := `2023-11-14T22:13:20.000Z #1 a
2023-11-14T22:13:21.000Z #1 1.000 partial
2023-11-14T22:13:22.500Z #1 sha256:1 5B / 5B 0.0s done
2023-11-14T22:13:22.500Z #1 DONE 2.5s

2023-11-14T22:13:21.000Z #2 b
2023-11-14T22:13:21.000Z #2 0.000 waits
2023-11-14T22:13:22.500Z #2 DONE 1.5s
`
	if out.String() != want {
		t.Errorf("drew\n%s\nwant\n%s", out, want)
	}
}

// How a step ended stands below what may be folded, and all that is begun ends.
func TestFold(t *testing.T) {
	for fold, want := range map[Fold]string{
		NoFold: "#1 100%\n#1 0.000 a\n#1 ...\n\n#2 b\n#2 DONE 6.0s\n\n#1 100%\n#1 6.000 c\n#1 ERROR: no\n\n#3 d\n#3 0.000 e\n",
		GitHub: "::group::#1 100%25\n#1 0.000 a\n#1 ...\n::endgroup::\n\n::group::#2 b\n::endgroup::\n#2 DONE 6.0s\n\n" +
			"::group::#1 100%25\n#1 6.000 c\n::endgroup::\n#1 ERROR: no\n\n::group::#3 d\n#3 0.000 e\n::endgroup::\n",
		GitLab: "\x1b[0Ksection_start:1700000000:filo_1_1700000000000000000[collapsed=true]\r\x1b[0K#1 100%\n#1 0.000 a\n#1 ...\n" +
			"\x1b[0Ksection_end:1700000006:filo_1_1700000000000000000\r\x1b[0K\n\n" +
			"\x1b[0Ksection_start:1700000006:filo_2_1700000000000000000[collapsed=true]\r\x1b[0K#2 b\n" +
			"\x1b[0Ksection_end:1700000006:filo_2_1700000000000000000\r\x1b[0K\n#2 DONE 6.0s\n\n" +
			"\x1b[0Ksection_start:1700000006:filo_1_1700000000000000000[collapsed=true]\r\x1b[0K#1 100%\n#1 6.000 c\n" +
			"\x1b[0Ksection_end:1700000006:filo_1_1700000000000000000\r\x1b[0K\n#1 ERROR: no\n\n" +
			"\x1b[0Ksection_start:1700000006:filo_3_1700000006000000000[collapsed=true]\r\x1b[0K#3 d\n#3 0.000 e\n" +
			"\x1b[0Ksection_end:1700000006:filo_3_1700000006000000000\r\x1b[0K\n",
	} {
		d, out, c := display(t, Options{Mode: CI, Fold: fold})
		d.Emit(started(1, "100%"))
		d.Emit(log(1, 1, "a\n"))
		d.Emit(started(2, "b"))
		c.add(6 * time.Second)
		d.Tick()
		d.Emit(ended(2, builder.Done))
		d.Emit(log(1, 1, "c\n"))
		d.Emit(builder.Event{Vertex: 1, State: builder.Failed, Err: errors.New("no")})
		d.Emit(started(3, "d"))
		d.Emit(log(3, 1, "e"))
		d.Close()
		if out.String() != want {
			t.Errorf("%q: drew\n%q\nwant\n%q", fold, out, want)
		}
	}
}

func TestFailure(t *testing.T) {
	d, _, _ := display(t, Options{Mode: Plain})
	d.Emit(started(1, "a"))
	d.Emit(started(2, "b"))
	if _, _, ok := d.Failure(); ok {
		t.Error("Failure before anything failed")
	}
	for i := range 30 {
		d.Emit(log(2, 1, fmt.Sprintf("%d\n", i)))
	}
	d.Emit(builder.Event{Vertex: 2, State: builder.Failed, Err: errors.New("no")})
	d.Emit(builder.Event{Vertex: 1, State: builder.Failed, Err: errors.New("later")})
	name, tail, ok := d.Failure()
	if !ok || name != "b" || len(tail) != 10 || tail[0] != "0.000 20" || tail[9] != "0.000 29" {
		t.Errorf("Failure() = %q, %q, %v, want the last ten lines of b", name, tail, ok)
	}
}

func TestAgain(t *testing.T) {
	d, out, _ := display(t, Options{Mode: Plain})
	d.Emit(started(-1, "task"))
	d.Emit(started(1, "a"))
	d.Emit(ended(1, builder.Cached))
	d.Emit(started(2, "b"))
	d.Emit(log(2, 1, "look\n"))
	d.Emit(builder.Event{Vertex: 2, State: builder.Failed, Err: errors.New("lost")})
	d.Emit(builder.Event{Data: []byte("note")})
	d.Again()
	if name, _, ok := d.Failure(); ok {
		t.Errorf("Failure() = %q of the try before", name)
	}
	d.Emit(started(1, "a"))
	d.Emit(ended(1, builder.Cached))
	d.Emit(started(2, "b"))
	d.Emit(ended(2, builder.Done))
	d.Emit(builder.Event{Data: []byte("note")})
	d.Emit(ended(-1, builder.Done))
	all := func(name string) bool { return name != "task" }
	if n, cached := d.Counts(all); n != 2 || cached != 1 {
		t.Errorf("Counts() = %d, %d, want the last try: 2, 1", n, cached)
	}
	if notes := d.Notes(); len(notes) != 1 {
		t.Errorf("Notes() = %q, want one", notes)
	}
	for _, want := range []string{"#2 CACHED", "#3 ERROR: lost", "#4 CACHED", "#5 DONE 0.0s", "#1 DONE 0.0s"} {
		if !strings.Contains(out.String(), want+"\n") {
			t.Errorf("drew %q, want %q", out, want)
		}
	}
}

func TestQuiet(t *testing.T) {
	d, out, _ := display(t, Options{Mode: Quiet})
	d.Emit(started(1, "a"))
	d.Emit(log(1, 1, "look\n"))
	d.Emit(builder.Event{Vertex: 1, State: builder.Failed, Err: errors.New("no")})
	if _, _, ok := d.Failure(); ok || out.Len() > 0 {
		t.Errorf("quiet drew %q, failure %v", out, ok)
	}
}

func TestRawJSON(t *testing.T) {
	d, out, c := display(t, Options{Mode: RawJSON})
	d.Emit(started(1, "a"))
	d.Emit(log(1, 2, "par"))
	d.Emit(log(1, 0, "extracting\n"))
	d.Emit(builder.Event{Vertex: 1, State: builder.Warned, Data: []byte("careful")})
	c.add(time.Second)
	d.Emit(moving(1, builder.Moving, "sha256:a", 5, 9))
	d.Emit(moving(1, builder.Moved, "sha256:a", 9, 9))
	d.Emit(builder.Event{Vertex: 1, State: builder.Failed, Err: errors.New("no")})
	d.Close()
	if !strings.HasPrefix(out.String(), `{"vertexes"`) {
		t.Errorf("rawjson begins with %.20q", out)
	}
	var all solveStatus
	dec := json.NewDecoder(out)
	for dec.More() {
		var s solveStatus
		if err := dec.Decode(&s); err != nil {
			t.Fatal(err)
		}
		all.Vertexes = append(all.Vertexes, s.Vertexes...)
		all.Logs = append(all.Logs, s.Logs...)
		all.Statuses = append(all.Statuses, s.Statuses...)
		all.Warnings = append(all.Warnings, s.Warnings...)
	}
	if len(all.Vertexes) != 2 || len(all.Logs) != 1 || len(all.Statuses) != 3 || len(all.Warnings) != 1 {
		t.Fatalf("rawjson gave %+v", all)
	}
	if half, whole := all.Statuses[1], all.Statuses[2]; half.ID != "sha256:a" || half.Current != 5 || half.Total != 9 || half.Completed != nil ||
		whole.Current != 9 || whole.Completed == nil {
		t.Errorf("what moves: %+v, %+v", half, whole)
	}
	last := all.Vertexes[1]
	if last.Error != "no" || last.Completed.Sub(*last.Started) != time.Second || last.Digest != all.Logs[0].Vertex {
		t.Errorf("last vertex %+v, log %+v", last, all.Logs[0])
	}
	if string(all.Logs[0].Data) != "par" || all.Logs[0].Stream != 2 || string(all.Warnings[0].Short) != "careful" {
		t.Errorf("log %+v, warning %+v", all.Logs[0], all.Warnings[0])
	}
}

func TestParseMode(t *testing.T) {
	for s, want := range map[string]Mode{"": Auto, "auto": Auto, "plain": Plain, "ci": CI, "tty": TTY, "quiet": Quiet, "none": Quiet, "rawjson": RawJSON} {
		if got, err := ParseMode(s); got != want || err != nil {
			t.Errorf("ParseMode(%q) = %q, %v, want %q", s, got, err, want)
		}
	}
	if _, err := ParseMode("fancy"); err == nil {
		t.Error("ParseMode(fancy): no error")
	}
	if _, err := New(&bytes.Buffer{}, Options{Mode: TTY, Now: time.Now}); err != ErrNoTerminal {
		t.Errorf("New of tty without a terminal: %v", err)
	}
}
