package progress

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/tonistiigi/vt100"

	"filo/builder"
)

// screen shows what a terminal would after out.
func screen(t *testing.T, width, height int, out string) []string {
	t.Helper()
	term := vt100.NewVT100(height, width)
	term.Write(newlines([]byte(out)))
	var lines []string
	for _, l := range term.Content {
		lines = append(lines, strings.TrimRight(string(l), " "))
	}
	for len(lines) > 0 && lines[len(lines)-1] == "" {
		lines = lines[:len(lines)-1]
	}
	return lines
}

func TestTTY(t *testing.T) {
	size := func() (int, int) { return 50, 20 }
	d, out, c := display(t, Options{Mode: Auto, Size: size, Color: true})
	d.Emit(started(1, "[internal] load build definition"))
	d.Emit(log(1, 0, "transferring dockerfile: 30B\n"))
	d.Emit(ended(1, builder.Done))
	d.Emit(started(2, "[1/3] FROM busybox"))
	d.Emit(ended(2, builder.Cached))
	c.add(time.Second)
	d.Emit(started(3, "[2/3] RUN seq 10"))
	for i := range 10 {
		d.Emit(log(3, 1, fmt.Sprintf("%d\n", i)))
	}
	d.Emit(log(3, 1, "half"))
	c.add(time.Second)
	d.Tick()
	want := []string{
		"[+] Building 2.0s (2/3)",
		" => [internal] load build definition         0.0s",
		" => => transferring dockerfile: 30B",
		" => CACHED [1/3] FROM busybox                0.0s",
		" => [2/3] RUN seq 10                         1.0s",
		" => => # 5", " => => # 6", " => => # 7", " => => # 8", " => => # 9", " => => # half",
	}
	if diff := cmp.Diff(want, screen(t, 50, 20, out.String())); diff != "" {
		t.Errorf("running (-want +got):\n%s", diff)
	}
	d.Emit(builder.Event{Vertex: 3, State: builder.Failed, Err: errors.New("no")})
	d.Close()
	want = append(want[:4:4], " => ERROR [2/3] RUN seq 10                   1.0s")
	want[0] = "[+] Building 2.0s (3/3) FINISHED"
	if diff := cmp.Diff(want, screen(t, 50, 20, out.String())); diff != "" {
		t.Errorf("at the end (-want +got):\n%s", diff)
	}
	if !strings.Contains(out.String(), red) {
		t.Error("no red for a failure")
	}
}

func TestTTYMoves(t *testing.T) {
	d, out, c := display(t, Options{Mode: Auto, Size: func() (int, int) { return 50, 20 }})
	d.Emit(started(1, "[internal] pull layers"))
	d.Emit(moving(1, builder.Moving, "sha256:a", 0, 9_000_000))
	c.add(time.Second)
	d.Emit(moving(1, builder.Moving, "sha256:bcdef0123456789abcdef", 0, 7000))
	d.Emit(moving(1, builder.Moving, "sha256:a", 1000, 9_000_000))
	c.add(time.Second)
	d.Emit(moving(1, builder.Moved, "sha256:a", 9_000_000, 9_000_000))
	c.add(time.Second)
	d.Tick()
	want := []string{
		"[+] Building 3.0s (0/1)",
		" => [internal] pull layers                   3.0s",
		" => => sha256:a 9MB / 9MB                    2.0s",
		" => => sha256:bcdef0123456 0B / 7kB          2.0s",
	}
	if diff := cmp.Diff(want, screen(t, 50, 20, out.String())); diff != "" {
		t.Errorf("moving (-want +got):\n%s", diff)
	}
	d.Close()
}

func TestTTYSmallTerminal(t *testing.T) {
	size := func() (int, int) { return 30, 6 }
	d, out, c := display(t, Options{Mode: TTY, Size: size})
	for i := 1; i <= 10; i++ {
		d.Emit(started(i, fmt.Sprintf("step %d with a name far too long for this terminal", i)))
		if i < 9 {
			d.Emit(ended(i, builder.Done))
		}
	}
	c.add(time.Second)
	d.Tick()
	got := screen(t, 30, 6, out.String())
	if len(got) != 5 || !strings.HasPrefix(got[4], " => step 10") || !strings.HasPrefix(got[0], "[+] Building") {
		t.Errorf("screen of 6 lines shows\n%s", strings.Join(got, "\n"))
	}
	if strings.Contains(out.String(), "\x1b[3") {
		t.Error("colours though none were asked for")
	}
	d.Close()
	if n := strings.Count(out.String()[strings.LastIndex(out.String(), "[+]"):], " => step"); n != 10 {
		t.Errorf("the last drawing has %d steps, want all 10", n)
	}
}

// TestTTYSurvivesForeignOutput feeds what programs print: it must neither panic nor leave the window.
func TestTTYSurvivesForeignOutput(t *testing.T) {
	size := func() (int, int) { return 20, 10 }
	d, out, c := display(t, Options{Mode: TTY, Size: size, LogLines: 1 << 30}) // more than fit in memory
	d.Emit(started(1, "a\x1b[2Jb"))
	for _, s := range []string{"\x1b[999;999H", "\x1b[2J", "\x1b[A\x1b[A\x1b[A", "\xff\xfe", "\x1b", "[", "\x1b]0;title\a", strings.Repeat("é", 100), "\b\b\b", "\t\t\t\t", "\x1b[38;5;1mx\x1b[0m\n"} {
		d.Emit(log(1, 1, s))
		c.add(time.Second)
		d.Tick()
	}
	d.Close()
	if strings.Contains(out.String(), "\x1b[2J") || strings.Contains(out.String(), "title\a") {
		t.Errorf("escape sequences of a step reach the terminal: %q", out)
	}
}
