package sandbox

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestParseHierarchies(t *testing.T) {
	for _, c := range []struct {
		name, mounts, own string
		memory, v2        string
	}{
		{"hybrid", "30 20 0:25 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n31 20 0:26 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n",
			"4:memory:/a/b\n0::/\n", "/sys/fs/cgroup/memory/a/b", "/sys/fs/cgroup/unified"},
		{"unified", "30 20 0:25 / /sys/fs/cgroup rw shared:9 - cgroup2 cgroup rw,nsdelegate\n", "0::/user.slice/x.scope\n", "", "/sys/fs/cgroup/user.slice/x.scope"},
		{"container", "30 20 0:25 /docker/1 /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory\n", "4:memory:/docker/1\n", "/sys/fs/cgroup/memory", ""},
		{"none", "1 0 0:1 / / rw - ext4 /dev/x rw\n", "", "", ""},
		{"rubbish", "- - -\n\nx", ":::\nx", "", ""},
	} {
		h := parseHierarchies(c.mounts, c.own)
		if h.v1["memory"] != c.memory || h.v2 != c.v2 {
			t.Errorf("%s: memory %q, version 2 %q, want %q, %q", c.name, h.v1["memory"], h.v2, c.memory, c.v2)
		}
	}
}

func TestControllers(t *testing.T) {
	l := Limits{Memory: 64 << 20, MemorySwap: 96 << 20, CPUQuota: 50_000, CPUShares: 1024, CPUs: "0", PIDs: 7}
	got := map[string]string{}
	for _, all := range l.controllers(true) {
		for _, s := range all {
			got[s.file] = s.value
		}
	}
	for file, want := range map[string]string{"memory.max": "67108864", "memory.swap.max": "33554432", "cpu.max": "50000 100000", "cpu.weight": "39", "cpuset.cpus": "0", "pids.max": "7"} {
		if got[file] != want {
			t.Errorf("%s: %q, want %q", file, got[file], want)
		}
	}
}

func needLimits(t *testing.T, l Limits) {
	t.Helper()
	if err := l.Try(); err != nil {
		t.Skip("limits: ", err)
	}
}

func TestOutOfMemory(t *testing.T) {
	l := Limits{Memory: 48 << 20, MemorySwap: 48 << 20}
	needLimits(t, l)
	for _, b := range []*box{newBox(t), newStall(t)} {
		p := b.process("eat")
		if b.root.Dir != "" {
			p = b.act(nil, "eat")
		}
		p.Limits = l
		_, err := b.run(p)
		var exit *ExitError
		if !errors.As(err, &exit) || !exit.OutOfMemory || !strings.Contains(err.Error(), "out of memory: the limit is 48MiB") {
			t.Errorf("%v: %v", b.root.Dir != "", err)
		}
	}
	noCgroups(t)
}

func TestTooManyProcesses(t *testing.T) {
	l := Limits{PIDs: 40} // the threads of the runtime count
	needLimits(t, l)
	b := newBox(t)
	p := b.process("crowd", "100")
	p.Limits = l
	out, err := b.run(p)
	var exit *ExitError
	if !errors.As(err, &exit) || !exit.Crowded || !strings.Contains(err.Error(), "the limit is 40 (--pids-limit)") || !strings.Contains(out, "resource temporarily unavailable") {
		t.Errorf("%s, %v", out, err)
	}
	p = b.process("exit", "3")
	p.Limits = l
	if _, err := b.run(p); !errors.As(err, &exit) || exit.Crowded || strings.Contains(err.Error(), "limit") {
		t.Errorf("a process that is alone: %v", err)
	}
	p = b.process("pwd")
	p.Env = append(p.Env, "GOMAXPROCS=1")
	p.Limits.PIDs = 7 // its own threads; with the launcher's there would be more
	if out, err := b.run(p); err != nil {
		t.Errorf("a process with just enough: %s, %v", out, err)
	}
	p.Limits.PIDs = 1 << 22
	if out, err := b.run(p); err != nil {
		t.Errorf("the highest limit: %s, %v", out, err)
	}
	noCgroups(t)
}

// noCgroups sees that nothing is left of them.
func noCgroups(t *testing.T) {
	t.Helper()
	h, err := readHierarchies()
	if err != nil {
		t.Fatal(err)
	}
	for _, dir := range h.v1 {
		if left, _ := filepath.Glob(filepath.Join(dir, fmt.Sprintf("filo-%d-*", os.Getpid()))); len(left) > 0 {
			t.Errorf("left: %v", left)
		}
	}
}
