package sandbox

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// Limits bound what a process and its descendants use. 0 and "" are no limit.
type Limits struct {
	Memory     int64  // bytes
	MemorySwap int64  // bytes of memory and swap together, -1 for any amount of swap
	CPUPeriod  int64  // microseconds; 0 is 100,000
	CPUQuota   int64  // microseconds of processor time in a period
	CPUShares  int64  // relative to other processes' 1024
	CPUs, Mems string // processors and memory nodes, like "0-2,7"
	PIDs       int64
}

const defaultPeriod = 100_000

// setting is a file of a cgroup and what to write there.
type setting struct{ file, value string }

// controllers returns the settings by controller, for one version of cgroups.
func (l Limits) controllers(v2 bool) map[string][]setting {
	c := map[string][]setting{}
	put := func(controller, old, new, value string) {
		file := old
		if v2 {
			file = new
		}
		c[controller] = append(c[controller], setting{file, value})
	}
	number := func(n int64) string { return strconv.FormatInt(n, 10) }
	if l.Memory > 0 {
		put("memory", "memory.limit_in_bytes", "memory.max", number(l.Memory))
	}
	switch {
	case l.MemorySwap == 0:
	case v2 && l.MemorySwap > 0:
		put("memory", "", "memory.swap.max", number(max(0, l.MemorySwap-l.Memory)))
	case v2:
		put("memory", "", "memory.swap.max", "max")
	default:
		put("memory", "memory.memsw.limit_in_bytes", "", number(l.MemorySwap))
	}
	period := number(l.CPUPeriod)
	if l.CPUPeriod == 0 {
		period = number(defaultPeriod)
	}
	switch {
	case l.CPUQuota > 0 && v2:
		put("cpu", "", "cpu.max", number(l.CPUQuota)+" "+period)
	case l.CPUQuota > 0:
		put("cpu", "cpu.cfs_period_us", "", period)
		put("cpu", "cpu.cfs_quota_us", "", number(l.CPUQuota))
	}
	if l.CPUShares > 0 {
		// Docker's shares go from 2 to 262144, a cgroup's weight from 1 to 10000.
		value := number(l.CPUShares)
		if v2 {
			value = number(1 + (min(max(l.CPUShares, 2), 262144)-2)*9999/262142)
		}
		put("cpu", "cpu.shares", "cpu.weight", value)
	}
	if l.CPUs != "" {
		put("cpuset", "cpuset.cpus", "cpuset.cpus", l.CPUs)
	}
	if l.Mems != "" {
		put("cpuset", "cpuset.mems", "cpuset.mems", l.Mems)
	}
	if l.PIDs > 0 {
		put("pids", "pids.max", "pids.max", number(l.PIDs))
	}
	return c
}

// Try reports why limits cannot be set here; nil if they can.
func (l Limits) Try() error {
	b, err := l.bound()
	if err != nil {
		return err
	}
	return b.close()
}

// bounds are the cgroups made for one process: one, or with version 1 one for each controller.
type bounds struct {
	dirs    []string
	homes   []string // where what starts there comes from
	old     []string // controllers of version 1
	unified string   // the one of version 2, "" for none
	memory  string   // the one that counts memory, "" for none
	v2      bool     // of memory
	pids    string   // the one that counts processes, "" for none
}

// serial tells the cgroups of this process apart.
var serial atomic.Int64

func cgroupName() string { return fmt.Sprintf("filo-%d-%d", os.Getpid(), serial.Add(1)) }

// bound makes cgroups with these limits; nil if there are no limits.
func (l Limits) bound() (*bounds, error) {
	if l == (Limits{}) {
		return nil, nil
	}
	h, err := readHierarchies()
	if err != nil {
		return nil, err
	}
	b := &bounds{}
	name := cgroupName()
	for _, controller := range []string{"memory", "cpu", "cpuset", "pids"} {
		if len(l.controllers(true)[controller]) == 0 {
			continue
		}
		if err := b.add(h, l, controller, name); err != nil {
			return nil, errors.Join(fmt.Errorf("limit %s: %w", controller, err), b.close())
		}
	}
	return b, nil
}

func (b *bounds) add(h hierarchies, l Limits, controller, name string) error {
	dir, v2 := h.v1[controller], false
	if dir == "" {
		dir, v2 = h.v2, true
	}
	if dir == "" {
		return errors.New("no cgroups are mounted here")
	}
	made, err := makeCgroup(dir, controller, name, v2)
	if err != nil {
		return err
	}
	if !slices.Contains(b.dirs, made) {
		b.dirs, b.homes = append(b.dirs, made), append(b.homes, dir)
	}
	if controller == "memory" {
		b.memory, b.v2 = made, v2
	}
	if controller == "pids" {
		b.pids = made
	}
	if v2 {
		b.unified = made
	} else {
		b.old = append(b.old, controller)
	}
	for _, s := range l.controllers(v2)[controller] {
		if err := os.WriteFile(path.Join(made, s.file), []byte(s.value), 0); err != nil {
			return err
		}
	}
	return nil
}

// makeCgroup makes a cgroup in which a controller works: below dir, or with version 2, where
// what has processes of its own cannot have children with controllers, beside or above it.
func makeCgroup(dir, controller, name string, v2 bool) (string, error) {
	var first error
	for {
		made := path.Join(dir, name)
		err := enable(dir, controller, v2)
		if err == nil {
			sweepCgroups(dir)
			if err = os.Mkdir(made, 0o755); errors.Is(err, fs.ErrExist) {
				err = nil
			}
		}
		if err == nil && !v2 && controller == "cpuset" {
			err = inherit(dir, made)
		}
		if err == nil {
			return made, nil
		}
		if first == nil {
			first = err
		}
		parent := path.Dir(dir)
		if _, serr := os.Stat(path.Join(parent, "cgroup.procs")); !v2 || serr != nil {
			return "", first
		}
		dir = parent
	}
}

// enable lets the children of a cgroup of version 2 have a controller.
func enable(dir, controller string, v2 bool) error {
	if !v2 {
		return nil
	}
	file := path.Join(dir, "cgroup.subtree_control")
	b, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	if slices.Contains(strings.Fields(string(b)), controller) {
		return nil
	}
	return os.WriteFile(file, []byte("+"+controller), 0)
}

// inherit gives a new cpuset what its parent has: empty ones hold no process.
func inherit(from, to string) error {
	for _, name := range []string{"cpuset.cpus", "cpuset.mems"} {
		b, err := os.ReadFile(path.Join(from, name))
		if err == nil {
			err = os.WriteFile(path.Join(to, name), b, 0)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// sweepCgroups removes what dead filos left; with processes in it, a cgroup stays.
func sweepCgroups(dir string) {
	all, _ := os.ReadDir(dir)
	for _, d := range all {
		rest, ours := strings.CutPrefix(d.Name(), "filo-")
		pid, _, ok := strings.Cut(rest, "-")
		if !ours || !ok {
			continue
		}
		if _, err := os.Stat("/proc/" + pid); err != nil {
			_ = unix.Rmdir(path.Join(dir, d.Name()))
		}
	}
}

// version1 lists the controllers of version 1.
func (b *bounds) version1() []string {
	if b == nil {
		return nil
	}
	return b.old
}

// put moves a process into the cgroups.
func (b *bounds) put(pid int) error {
	if b == nil {
		return nil
	}
	return move(pid, b.dirs)
}

func move(pid int, to []string) error {
	for _, dir := range to {
		if err := os.WriteFile(path.Join(dir, "cgroup.procs"), strconv.AppendInt(nil, int64(pid), 10), 0); err != nil {
			return err
		}
	}
	return nil
}

// threads is more than a launcher has of them.
const threads = 16

// allow changes the limit of processes, where there is one.
func (b *bounds) allow(limit int64) error {
	const most = 1 << 22 // that the kernel takes
	if b == nil || b.pids == "" {
		return nil
	}
	return os.WriteFile(path.Join(b.pids, "pids.max"), strconv.AppendInt(nil, min(limit, most), 10), 0)
}

// dismiss moves a launcher out of the cgroups, in which its child stays: its threads would count as the process's, and the
// kernel would kill it, the biggest, when memory ran out for many small ones. Where that is refused it stays.
func (b *bounds) dismiss(launcher int, limit int64) {
	if b != nil && move(launcher, b.homes) == nil {
		_ = b.allow(limit) // what is smaller is never refused
	}
}

// killed says whether memory ran out for a process in the cgroups, and how much was used at most.
func (b *bounds) killed() (peak int64, yes bool) {
	if b == nil || b.memory == "" {
		return 0, false
	}
	events, most := "memory.oom_control", "memory.max_usage_in_bytes"
	if b.v2 {
		events, most = "memory.events", "memory.peak"
	}
	data, _ := os.ReadFile(path.Join(b.memory, events))
	for line := range strings.Lines(string(data)) {
		if n, ok := strings.CutPrefix(strings.TrimSpace(line), "oom_kill "); ok && n != "0" {
			yes = true
		}
	}
	data, _ = os.ReadFile(path.Join(b.memory, most))
	peak, _ = strconv.ParseInt(string(bytes.TrimSpace(data)), 10, 64)
	return peak, yes
}

// crowded says whether a process in the cgroups was refused another one.
func (b *bounds) crowded() bool {
	if b == nil || b.pids == "" {
		return false
	}
	data, _ := os.ReadFile(path.Join(b.pids, "pids.events"))
	n, ok := strings.CutPrefix(strings.TrimSpace(string(data)), "max ")
	return ok && n != "0"
}

// explain adds to an error what might have been too little for the process.
func (b *bounds) explain(p Process, err error) error {
	var exit *ExitError
	if !errors.As(err, &exit) {
		return err
	}
	exit.Peak, exit.OutOfMemory = b.killed()
	exit.Crowded, exit.PIDs = b.crowded(), p.Limits.PIDs
	exit.Memory, exit.SingleID, exit.Ground = p.Limits.Memory, p.Ground.SingleID, p.Ground.Name
	return err
}

// close removes the cgroups, and once more what dead filos left: when these here were made, their launchers may not have
// been dead yet. The kernel takes its time to see that the last process has gone.
func (b *bounds) close() error {
	if b == nil {
		return nil
	}
	var errs []error
	for _, dir := range b.dirs {
		err := unix.Rmdir(dir)
		for i := 0; errors.Is(err, unix.EBUSY) && i < 100; i++ {
			time.Sleep(10 * time.Millisecond)
			err = unix.Rmdir(dir)
		}
		if err != nil && !errors.Is(err, unix.ENOENT) {
			errs = append(errs, wrap("remove", dir, err))
		}
		sweepCgroups(path.Dir(dir))
	}
	b.dirs = nil
	return errors.Join(errs...)
}

// hierarchies are the cgroups that this process is in, as directories.
type hierarchies struct {
	v1 map[string]string // by controller
	v2 string
}

func readHierarchies() (hierarchies, error) {
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return hierarchies{}, err
	}
	own, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return hierarchies{}, err
	}
	return parseHierarchies(string(mounts), string(own)), nil
}

// parseHierarchies finds the directories from proc(5)'s mountinfo and cgroup.
func parseHierarchies(mounts, own string) hierarchies {
	h := hierarchies{v1: map[string]string{}}
	paths := map[string]string{} // by controller, "" for version 2
	for line := range strings.Lines(own) {
		_, rest, _ := strings.Cut(strings.TrimSpace(line), ":")
		list, p, _ := strings.Cut(rest, ":")
		for c := range strings.SplitSeq(list, ",") {
			paths[c] = p
		}
	}
	for line := range strings.Lines(mounts) {
		head, tail, ok := strings.Cut(line, " - ")
		a, b := strings.Fields(head), strings.Fields(tail)
		if !ok || len(a) < 5 || len(b) < 3 {
			continue
		}
		root, at := a[3], a[4]
		dir := func(controller string) string {
			p := paths[controller]
			if in, ok := strings.CutPrefix(p, root); ok {
				p = in // else the mount shows another part, of which we are the top
			} else {
				p = "/"
			}
			return path.Join(at, p)
		}
		switch b[0] {
		case "cgroup2":
			h.v2 = dir("")
		case "cgroup":
			for c := range strings.SplitSeq(b[2], ",") {
				if _, ok := paths[c]; ok {
					h.v1[c] = dir(c)
				}
			}
		}
	}
	return h
}
