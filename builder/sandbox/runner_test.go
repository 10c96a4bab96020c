package sandbox

import (
	"bytes"
	"os"
	"testing"

	"filo/builder/sandbox/seccomp"

	"golang.org/x/sys/unix"
)

// TestRunnerAhead runs processes that each have a child started for the next: that one becomes it, a dead one does not,
// and neither does one with other namespaces; none is left in the end.
func TestRunnerAhead(t *testing.T) {
	box := newBox(t)
	r := Runner{Filter: seccomp.Docker}
	defer r.Close()
	run := func(p Process, more bool) {
		t.Helper()
		var out, problems bytes.Buffer
		p.Stdout, p.Stderr = &out, &problems
		if err := r.Run(t.Context(), p, more); err != nil || out.String() != "/\n" {
			t.Fatalf("%q, %q, %v", out.String(), problems.String(), err)
		}
		os.RemoveAll(box.root.Work + "/work")
	}
	say := box.process("pwd")
	run(say, true)
	if len(r.idle) != 1 {
		t.Fatalf("%d children wait, not 1", len(r.idle))
	}
	first := r.idle[0].process.Pid
	offline := say
	offline.Network = NetworkNone
	run(offline, false)
	if len(r.idle) != 1 || r.idle[0].process.Pid != first {
		t.Fatal("the child of a process with a network became one without")
	}
	run(say, false)
	if len(r.idle) != 0 {
		t.Fatal("the child that waited was not taken")
	}
	if err := unix.Kill(first, 0); err != unix.ESRCH {
		t.Errorf("the first child: %v", err)
	}
	run(say, true)
	r.idle[0].process.Kill()
	unix.Waitid(unix.P_PID, r.idle[0].process.Pid, nil, unix.WEXITED|unix.WNOWAIT, nil)
	run(say, true)
	last := r.idle[0].process.Pid
	r.Close()
	if err := unix.Kill(last, 0); err != unix.ESRCH || len(r.idle) != 0 {
		t.Errorf("after Close %d children wait; the last one: %v", len(r.idle), err)
	}
}
