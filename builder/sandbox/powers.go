package sandbox

import (
	"errors"
	"os"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
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

// dropPowers leaves the calling thread with what p's process may do. The
// filter is loaded first: that needs a capability. What follows is allowed
// by it.
func dropPowers(p Process, filter []byte) error {
	if err := setLimits(p.Ulimits); err != nil {
		return err
	}
	joinKeyring()
	if len(filter) > 0 {
		if err := loadFilter(filter); err != nil {
			return at("load seccomp filter", err)
		}
	}
	keep, err := permitted()
	if err != nil {
		return at("read capabilities", err)
	}
	if !p.Insecure {
		keep &= defaultSet()
		if err := dropBounding(keep); err != nil && !(p.Ground.Name == groundChroot && errors.Is(err, unix.EPERM)) {
			return at("drop capabilities", err)
		}
	}
	if err := setUser(p); err != nil {
		return err
	}
	inherit := capabilities(0)
	switch {
	case p.Insecure:
		inherit = keep
	case p.UID != 0:
		keep = 0
	}
	if err := setCapabilities(keep, inherit); err != nil {
		return at("set capabilities", err)
	}
	return surviveNothing()
}

// setUser switches to the user, keeping the permitted set for the moment.
func setUser(p Process) error {
	groups := make([]uint32, 0, len(p.Groups)+1)
	for _, g := range p.Groups {
		groups = append(groups, uint32(g))
	}
	_, _, errno := unix.RawSyscall(unix.SYS_SETGROUPS, uintptr(len(groups)), uintptr(unsafe.Pointer(unsafe.SliceData(groups))), 0)
	if errno != 0 && !(errno == unix.EPERM && (setgroupsDenied() || p.UID == os.Getuid() && p.GID == os.Getgid())) {
		return at("set groups", noSuchID(errno))
	}
	if _, _, errno := unix.RawSyscall(unix.SYS_SETRESGID, uintptr(p.GID), uintptr(p.GID), uintptr(p.GID)); errno != 0 {
		return at("set group", noSuchID(errno))
	}
	if err := unix.Prctl(unix.PR_SET_KEEPCAPS, 1, 0, 0, 0); err != nil {
		return at("keep capabilities", err)
	}
	if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, uintptr(p.UID), uintptr(p.UID), uintptr(p.UID)); errno != 0 {
		return at("set user", noSuchID(errno))
	}
	return at("keep capabilities", unix.Prctl(unix.PR_SET_KEEPCAPS, 0, 0, 0, 0))
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
	for _, c := range defaultCapabilities {
		if slices.Contains(numbers, c.number) && !has(c.number) {
			return c.name
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

func dropBounding(keep capabilities) error {
	for c := range uintptr(64) {
		if keep&(1<<c) != 0 {
			continue
		}
		err := unix.Prctl(unix.PR_CAPBSET_DROP, c, 0, 0, 0)
		if errors.Is(err, unix.EINVAL) {
			return nil // above the last one the kernel knows
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// setCapabilities sets permitted and effective to one set, inheritable and
// ambient to the other.
func setCapabilities(keep, inherit capabilities) error {
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	for i := range data {
		shift := 32 * i
		data[i] = unix.CapUserData{Effective: uint32(keep >> shift), Permitted: uint32(keep >> shift), Inheritable: uint32(inherit >> shift)}
	}
	if err := unix.Capset(&hdr, &data[0]); err != nil {
		return err
	}
	if err := unix.Prctl(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0); err != nil {
		return err
	}
	for c := range uintptr(64) {
		if inherit&(1<<c) == 0 {
			continue
		}
		if err := unix.Prctl(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_RAISE, c, 0, 0); err != nil {
			return err
		}
	}
	return nil
}

// surviveNothing asks again for death with the parent, for the kernel forgets
// it when credentials change, and sees that the parent has not died meanwhile.
func surviveNothing() error {
	if err := unix.Prctl(unix.PR_SET_PDEATHSIG, uintptr(unix.SIGKILL), 0, 0, 0); err != nil {
		return at("set death signal", err)
	}
	poll := []unix.PollFd{{Fd: reportFD}}
	if _, err := unix.Poll(poll, 0); err == nil && poll[0].Revents&unix.POLLERR != 0 {
		return at("start", errors.New("parent is gone"))
	}
	return nil
}

// joinKeyring leaves the session keyring of whoever started filo. Where that
// is refused, seccomp keeps the process from every keyring.
func joinKeyring() {
	unix.RawSyscall(unix.SYS_KEYCTL, unix.KEYCTL_JOIN_SESSION_KEYRING, 0, 0)
}

func loadFilter(filter []byte) error {
	prog := unix.SockFprog{
		Len:    uint16(len(filter) / unix.SizeofSockFilter),
		Filter: (*unix.SockFilter)(unsafe.Pointer(unsafe.SliceData(slices.Clone(filter)))),
	}
	// As runc does: the mitigation that seccomp brings on older kernels costs
	// more than it is worth here.
	_, _, errno := unix.RawSyscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, unix.SECCOMP_FILTER_FLAG_SPEC_ALLOW, uintptr(unsafe.Pointer(&prog)))
	runtime.KeepAlive(filter)
	if errno != 0 {
		return errno
	}
	return nil
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

func setLimits(ulimits []Ulimit) error {
	for _, u := range ulimits {
		which, _ := limits(u.Name)
		// -1 as an unsigned number is RLIM_INFINITY.
		lim := syscall.Rlimit{Cur: uint64(u.Soft), Max: uint64(u.Hard)}
		// Not prlimit: the syscall package must know, or it would put back
		// the number of files that the process was started with.
		if err := syscall.Setrlimit(which, &lim); err != nil {
			return at("set ulimit "+u.Name, err)
		}
	}
	return nil
}
