package main

import (
	"bytes"
	"cmp"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// usage is what a build cost, its daemon's share included.
type usage struct {
	wall     time.Duration
	cpu      time.Duration
	memory   int64 // greatest resident size of one process, and that of the daemon
	written  int64 // bytes made dirty on disk
	requests int   // to the registry
}

func (u usage) plus(o usage) usage {
	return usage{u.wall + o.wall, u.cpu + o.cpu, max(u.memory, o.memory), u.written + o.written, u.requests + o.requests}
}

// median is the median of each figure.
func median(us []usage) usage {
	return usage{
		wall: middle(us, func(u usage) time.Duration { return u.wall }), cpu: middle(us, func(u usage) time.Duration { return u.cpu }),
		memory: middle(us, func(u usage) int64 { return u.memory }), written: middle(us, func(u usage) int64 { return u.written }),
		requests: middle(us, func(u usage) int { return u.requests }),
	}
}

func middle[T cmp.Ordered](us []usage, of func(usage) T) T {
	var all []T
	for _, u := range us {
		all = append(all, of(u))
	}
	slices.Sort(all)
	return all[len(all)/2]
}

// timed runs a command and says what it cost. What earlier work left in the page cache is written out first, so that
// nobody pays for it.
func timed(env []string, args ...string) (usage, error) {
	syscall.Sync()
	self, err := os.Executable()
	if err != nil {
		return usage{}, err
	}
	var out, figures bytes.Buffer
	cmd := exec.Command(self, args...)
	cmd.Args[0] = measurer
	cmd.Env = append(os.Environ(), env...)
	cmd.Stdout, cmd.Stderr = &figures, &out
	err = cmd.Run()
	var u usage
	if err == nil {
		_, err = fmt.Sscan(figures.String(), &u.wall, &u.cpu, &u.memory, &u.written)
	}
	if err != nil {
		lines := strings.Split(strings.TrimSpace(out.String()), "\n")
		return u, fmt.Errorf("%s: %w: %s", strings.Join(args, " "), err, strings.Join(lines[max(0, len(lines)-3):], "; "))
	}
	return u, nil
}

// measurer is the name under which this program runs a command and prints its figures. A process starts with the peak
// memory of the one it was started by, so that one must be small.
const measurer = "bench-measure"

func measure(args []string) error {
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Stdout, cmd.Stderr = os.Stderr, os.Stderr
	begin := time.Now()
	if err := cmd.Run(); err != nil {
		return err
	}
	wall := time.Since(begin)
	ru := cmd.ProcessState.SysUsage().(*syscall.Rusage)
	fmt.Println(int64(wall), int64(cmd.ProcessState.UserTime()+cmd.ProcessState.SystemTime()), ru.Maxrss<<10, ru.Oublock*512)
	return nil
}

// ofDaemon runs do and adds what the process pid and the children it waited for used meanwhile.
func ofDaemon(pid int, do func() (usage, error)) (usage, error) {
	// 5 sets the peak back, see proc(5).
	_ = os.WriteFile(fmt.Sprintf("/proc/%d/clear_refs", pid), []byte("5"), 0)
	before := daemon(pid)
	u, err := do()
	after := daemon(pid)
	u.cpu += after.cpu - before.cpu
	u.written += after.written - before.written
	u.memory += after.memory
	return u, err
}

// daemon reads what a process used so far; what /proc does not show is 0.
func daemon(pid int) (u usage) {
	stat, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	_, rest, _ := bytes.Cut(stat, []byte(") "))
	if f := strings.Fields(string(rest)); len(f) > 15 {
		for _, ticks := range f[11:15] { // utime, stime, cutime, cstime: hundredths of a second
			n, _ := strconv.ParseInt(ticks, 10, 64)
			u.cpu += time.Duration(n) * 10 * time.Millisecond
		}
	}
	u.memory = field(fmt.Sprintf("/proc/%d/status", pid), "VmHWM:") << 10
	u.written = field(fmt.Sprintf("/proc/%d/io", pid), "write_bytes:")
	return u
}

// field is the number after name in a file of /proc.
func field(file, name string) int64 {
	b, _ := os.ReadFile(file)
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) > 1 && f[0] == name {
			n, _ := strconv.ParseInt(f[1], 10, 64)
			return n
		}
	}
	return 0
}
