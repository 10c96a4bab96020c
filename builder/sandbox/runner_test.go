package sandbox

import (
	"bytes"
	"fmt"
	"os"
	"strconv"
	"testing"

	"golang.org/x/sys/unix"

	"filo/builder/sandbox/seccomp"
)

// TestRunnerAgain runs processes of one launcher one after the other, with a network and without, that fail and that
// cannot start; one that died is replaced, a limited one has another after it, and none is left in the end.
func TestRunnerAgain(t *testing.T) {
	box := newBox(t)
	if box.process().Ground.Name == groundChroot {
		t.Skip("no launchers on the chroot ground")
	}
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
		t.Fatalf("%d launchers wait, not 1", len(r.idle))
	}
	first := r.idle[0].process.Pid
	gone, err := r.Execute(t.Context(), say, true)
	if err != nil || len(r.idle) != 0 {
		t.Fatalf("%v, %d launchers wait before their mounts are gone", err, len(r.idle))
	}
	gone()
	gone()
	if len(r.idle) != 1 {
		t.Fatalf("%d launchers wait, not 1", len(r.idle))
	}
	os.RemoveAll(box.root.Work + "/work")
	offline, broken, bad := say, say, say
	offline.Network = NetworkNone
	broken.Args = []string{"/nosuch"}
	bad.Dir = "/bin/inside/x"
	for range 3 {
		run(offline, false)
		if inUserNamespace() { // there, no way leads home from a network that is one's own
			run(say, false)
			first = r.idle[0].process.Pid
		}
		for _, p := range []Process{broken, bad} {
			if err := r.Run(t.Context(), p, false); err == nil {
				t.Fatalf("%q ran", p.Args)
			}
			os.RemoveAll(box.root.Work + "/work")
		}
		run(say, false)
	}
	if len(r.idle) != 1 || r.idle[0].process.Pid != first {
		t.Fatal("another launcher than the first one ran some of these")
	}
	fds, err := os.ReadDir("/proc/" + strconv.Itoa(first) + "/fd")
	if err != nil || len(fds) > 10 {
		t.Errorf("the launcher has %d files open, %v", len(fds), err)
	}
	r.idle[0].process.Kill()
	unix.Waitid(unix.P_PID, first, nil, unix.WEXITED|unix.WNOWAIT, nil)
	run(say, true)
	last := r.idle[0].process.Pid
	r.Close()
	for _, pid := range []int{first, last} {
		if err := unix.Kill(pid, 0); err != unix.ESRCH || len(r.idle) != 0 {
			t.Errorf("after Close %d launchers wait; %d: %v", len(r.idle), pid, err)
		}
	}
}

// TestRunnerTidy hands much data to one launcher many times: it must not keep what it was given.
func TestRunnerTidy(t *testing.T) {
	secret := Mount{Type: Data, Data: make([]byte, 20<<20), Target: "/dev/secret"}
	box := newBox(t)
	p := box.process("stat", "/dev/secret")
	if p.Ground.Name == groundChroot {
		t.Skip("no launchers on the chroot ground")
	}
	p.Mounts = []Mount{secret}
	r := Runner{Filter: seccomp.Docker}
	defer r.Close()
	for range 8 {
		if err := r.Run(t.Context(), p, false); err != nil {
			t.Fatal(err)
		}
		os.RemoveAll(box.root.Work + "/work")
	}
	if len(r.idle) != 1 {
		t.Fatalf("%d launchers wait, not 1", len(r.idle))
	}
	b, err := os.ReadFile("/proc/" + strconv.Itoa(r.idle[0].process.Pid) + "/statm")
	var size, resident int
	fmt.Sscan(string(b), &size, &resident)
	if used := resident * os.Getpagesize(); err != nil || used > 100<<20 {
		t.Errorf("the launcher uses %d MiB, %v", used>>20, err)
	}
}
