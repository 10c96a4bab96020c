package main

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
	"syscall"
	"testing"
	"time"

	"filo/builder"
	"filo/builder/sandbox"
	"filo/cmd/filo/progress"
	"filo/dockerfile"
)

func TestReport(t *testing.T) {
	var out bytes.Buffer
	a := &app{world: world{stderr: &out}}
	d, err := progress.New(&bytes.Buffer{}, progress.Options{Mode: progress.Plain, Now: func() time.Time { return time.Unix(0, 0) }})
	if err != nil {
		t.Fatal(err)
	}
	a.display = d
	cause := &sandbox.ExitError{Args: []string{"/bin/sh", "-c", "run"}, Code: 127}
	d.Emit(builder.Event{Vertex: 1, Name: "[2/2] RUN run", State: builder.Started})
	d.Emit(builder.Event{Vertex: 1, State: builder.Log, Stream: 1, Data: []byte("/bin/sh: run: not found\r\n")})
	d.Emit(builder.Event{Vertex: 1, State: builder.Failed, Err: cause})
	d.Close()
	a.report(&dockerfile.Error{File: "Dockerfile", Ranges: []dockerfile.Range{{Start: 2, End: 2}}, Source: []string{"FROM x", "RUN run"}, Err: cause, Hint: "try this"})
	want := `------
 > [2/2] RUN run:
0.000 /bin/sh: run: not found
------
Dockerfile:2
--------------------
   1 |     FROM x
   2 | >>> RUN run
--------------------
ERROR: process "/bin/sh -c run" did not complete successfully: exit code: 127
hint: try this
`
	if out.String() != want {
		t.Errorf("report:\n%s\nwant:\n%s", &out, want)
	}
}

func TestReportUsage(t *testing.T) {
	var out bytes.Buffer
	(&app{world: world{stderr: &out}}).report(&usageError{"filo build", errors.New("no")})
	if want := "filo build: no\nSee 'filo build --help'.\n"; out.String() != want {
		t.Errorf("report of wrong usage: %q, want %q", &out, want)
	}
	out.Reset()
	(&app{world: world{stderr: &out}}).report(errFound)
	if out.Len() > 0 {
		t.Errorf("report of findings that were shown: %q", &out)
	}
}

func TestHint(t *testing.T) {
	exit := func(code int, reason string) error { return &sandbox.ExitError{Code: code, Reason: reason} }
	tests := []struct {
		err  error
		tail string
		want string
	}{
		{exit(1, ""), "E: Unable to locate package nginx", "apt-get update"},
		{exit(127, "exec /bin/sh: no such file or directory"), "", "no shell"},
		{exit(127, `exec /x: interpreter "/bin/sh\r": no such file or directory`), "", "Windows line ends"},
		{exit(127, ""), "0.102 /bin/sh: /x.sh: not found", "first line"},
		{exit(127, ""), "0.102 /bin/bash: line 1: ./x: No such file or directory", "first line"},
		{exit(127, ""), "0.102 /bin/sh: 1: curl: not found", ""},
		{exit(126, ""), "sh: ./x: Permission denied", "--chmod=755"},
		{exit(1, ""), "curl: (6) Could not resolve host: x", "names"},
		{fmt.Errorf("write: %w", syscall.EDQUOT), "", "quota is used up"},
		{&sandbox.ExitError{Code: 1, Ground: "chroot"}, "sh: can't create /dev/stderr: nonexistent directory", "steps run in a chroot here"},
		{&sandbox.ExitError{Code: 1, Ground: "root"}, "sh: can't create /dev/stderr: nonexistent directory", ""},
		{fmt.Errorf("write: %w", syscall.ENOSPC), "", "disk is full"},
		{exit(1, ""), "anything", ""},
		{errors.New("anything"), "", ""},
	}
	for _, tt := range tests {
		got := hint(tt.err, []string{tt.tail})
		if (got == "") != (tt.want == "") || !strings.Contains(got, tt.want) {
			t.Errorf("hint(%v, %q) = %q, want one about %q", tt.err, tt.tail, got, tt.want)
		}
	}
}
