package sandbox

import (
	"os"
	"slices"
	"strings"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"

	"filo/builder/sandbox/nofile"
)

// defaultCapabilities are Docker's: mask a80425fb.
var defaultCapabilities = [...]struct {
	number uintptr
	name   string // as Docker's flags say it
}{
	{unix.CAP_CHOWN, "CHOWN"},
	{unix.CAP_DAC_OVERRIDE, "DAC_OVERRIDE"},
	{unix.CAP_FOWNER, "FOWNER"},
	{unix.CAP_FSETID, "FSETID"},
	{unix.CAP_KILL, "KILL"},
	{unix.CAP_SETGID, "SETGID"},
	{unix.CAP_SETUID, "SETUID"},
	{unix.CAP_SETPCAP, "SETPCAP"},
	{unix.CAP_NET_BIND_SERVICE, "NET_BIND_SERVICE"},
	{unix.CAP_NET_RAW, "NET_RAW"},
	{unix.CAP_SYS_CHROOT, "SYS_CHROOT"},
	{unix.CAP_MKNOD, "MKNOD"},
	{unix.CAP_AUDIT_WRITE, "AUDIT_WRITE"},
	{unix.CAP_SETFCAP, "SETFCAP"},
}

// defaultCapabilityNames are those of the kernel.
func defaultCapabilityNames() []string {
	var names []string
	for _, c := range defaultCapabilities {
		names = append(names, "CAP_"+c.name)
	}
	return names
}

// capabilities is a set as the kernel passes it.
type capabilities uint64

func defaultSet() (s capabilities) {
	for _, c := range defaultCapabilities {
		s |= 1 << c.number
	}
	return s
}

// dropPowers adds the calls that leave p's process with what it may do. The filter is loaded first: that needs a
// capability. What follows is allowed by it. sameGroups says that nobody may change groups here.
func (q *sequence) dropPowers(p Process, filter []byte, sameGroups bool) error {
	q.setLimits(p.Ulimits)
	// Leaves the session keyring of whoever started filo. Where that is refused, seccomp keeps the process from every one.
	q.add("join keyring", unix.SYS_KEYCTL, unix.KEYCTL_JOIN_SESSION_KEYRING, 0)
	q.ignore()
	if len(filter) > 0 {
		q.loadFilter(filter)
	}
	keep, err := permitted()
	if err != nil {
		return at("read capabilities", err)
	}
	if !p.Insecure {
		keep &= defaultSet()
		for c := range uintptr(64) {
			if keep&(1<<c) != 0 {
				continue
			}
			q.add("drop capabilities", unix.SYS_PRCTL, unix.PR_CAPBSET_DROP, c, 0, 0, 0)
			q.tolerate(0, unix.EINVAL) // above the last one the kernel knows
			if p.Ground.Name == groundChroot {
				q.tolerate(0, unix.EINVAL, unix.EPERM)
			}
		}
	}
	q.setUser(p, sameGroups)
	inherit := capabilities(0)
	switch {
	case p.Insecure:
		inherit = keep
	case p.UID != 0:
		keep = 0
	}
	q.setCapabilities(keep, inherit)
	// The kernel forgets it when credentials change. A parent that died meanwhile is found out when the report is written.
	q.add("set death signal", unix.SYS_PRCTL, unix.PR_SET_PDEATHSIG, uintptr(unix.SIGKILL), 0, 0, 0)
	return nil
}

// setUser adds the calls that switch to the user, keeping the permitted set for the moment.
func (q *sequence) setUser(p Process, sameGroups bool) {
	groups := make([]uint32, 0, len(p.Groups)+1)
	for _, g := range p.Groups {
		groups = append(groups, uint32(g))
	}
	unknown := func(step string) {
		q.blame(func(errno syscall.Errno) error { return at(step, noSuchID(errno)) })
	}
	q.add("set groups", sysSetgroups, len(groups), unsafe.Pointer(unsafe.SliceData(groups)))
	unknown("set groups")
	if sameGroups || p.UID == os.Getuid() && p.GID == os.Getgid() {
		q.tolerate(0, unix.EPERM)
	}
	q.add("set group", sysSetresgid, p.GID, p.GID, p.GID)
	unknown("set group")
	q.add("keep capabilities", unix.SYS_PRCTL, unix.PR_SET_KEEPCAPS, 1, 0, 0, 0)
	q.add("set user", sysSetresuid, p.UID, p.UID, p.UID)
	unknown("set user")
	q.add("keep capabilities", unix.SYS_PRCTL, unix.PR_SET_KEEPCAPS, 0, 0, 0, 0)
}

// setgroupsDenied reports whether this user namespace has a single ID that an
// ordinary user mapped; there nobody may ever change groups.
func setgroupsDenied() bool {
	b, _ := os.ReadFile("/proc/self/setgroups")
	return strings.TrimSpace(string(b)) == "deny"
}

// lacking returns the name of the first of these capabilities that this process has not, "" if it has them. They are all
// among the default ones.
func lacking(numbers ...uintptr) string {
	for _, n := range numbers {
		if has(n) {
			continue
		}
		for _, c := range defaultCapabilities {
			if c.number == n {
				return c.name
			}
		}
	}
	return ""
}

func noSuchID(err syscall.Errno) error {
	if err != unix.EINVAL {
		return err
	}
	return &cause{text: "not mapped in this user namespace: rootless builds need a range in /etc/subuid and /etc/subgid, and newuidmap", errno: err}
}

func permitted() (capabilities, error) {
	var data [2]unix.CapUserData
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	err := unix.Capget(&hdr, &data[0])
	return capabilities(data[0].Permitted) | capabilities(data[1].Permitted)<<32, err
}

// setCapabilities adds the calls that set permitted and effective to one set, inheritable and ambient to the other.
func (q *sequence) setCapabilities(keep, inherit capabilities) {
	const step = "set capabilities"
	hdr := &unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	data := new([2]unix.CapUserData)
	for i := range data {
		shift := 32 * i
		data[i] = unix.CapUserData{Effective: uint32(keep >> shift), Permitted: uint32(keep >> shift), Inheritable: uint32(inherit >> shift)}
	}
	q.add(step, unix.SYS_CAPSET, unsafe.Pointer(hdr), unsafe.Pointer(data))
	q.add(step, unix.SYS_PRCTL, unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
	for c := range uintptr(64) {
		if inherit&(1<<c) != 0 {
			q.add(step, unix.SYS_PRCTL, unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_RAISE, c, 0, 0)
		}
	}
}

func (q *sequence) loadFilter(filter []byte) {
	aligned := slices.Clone(filter)
	q.pinned = append(q.pinned, aligned)
	prog := &unix.SockFprog{
		Len:    uint16(len(aligned) / unix.SizeofSockFilter),
		Filter: (*unix.SockFilter)(unsafe.Pointer(unsafe.SliceData(aligned))),
	}
	// As runc does: the mitigation that seccomp brings on older kernels costs
	// more than it is worth here.
	q.add("load seccomp filter", unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, unix.SECCOMP_FILTER_FLAG_SPEC_ALLOW, unsafe.Pointer(prog))
}

// limits returns the kernel's number of a limit.
func limits(name string) (int, bool) {
	switch strings.ToLower(name) {
	case "as":
		return unix.RLIMIT_AS, true
	case "core":
		return unix.RLIMIT_CORE, true
	case "cpu":
		return unix.RLIMIT_CPU, true
	case "data":
		return unix.RLIMIT_DATA, true
	case "fsize":
		return unix.RLIMIT_FSIZE, true
	case "locks":
		return unix.RLIMIT_LOCKS, true
	case "memlock":
		return unix.RLIMIT_MEMLOCK, true
	case "msgqueue":
		return unix.RLIMIT_MSGQUEUE, true
	case "nice":
		return unix.RLIMIT_NICE, true
	case "nofile":
		return unix.RLIMIT_NOFILE, true
	case "nproc":
		return unix.RLIMIT_NPROC, true
	case "rss":
		return unix.RLIMIT_RSS, true
	case "rtprio":
		return unix.RLIMIT_RTPRIO, true
	case "rttime":
		return unix.RLIMIT_RTTIME, true
	case "sigpending":
		return unix.RLIMIT_SIGPENDING, true
	case "stack":
		return unix.RLIMIT_STACK, true
	}
	return 0, false
}

// setLimits adds the calls that set the limits asked for, and that on files to what filo was started with: Go raises it.
func (q *sequence) setLimits(ulimits []Ulimit) {
	set := func(step string, which int, soft, hard uint64) {
		q.add(step, unix.SYS_PRLIMIT64, 0, which, unsafe.Pointer(&unix.Rlimit{Cur: soft, Max: hard}), 0)
	}
	if soft, hard, known := nofile.Limit(); known {
		set("set ulimit nofile", unix.RLIMIT_NOFILE, soft, hard)
	}
	for _, u := range ulimits {
		which, _ := limits(u.Name)
		// -1 as an unsigned number is RLIM_INFINITY.
		set("set ulimit "+u.Name, which, uint64(u.Soft), uint64(u.Hard))
	}
}
