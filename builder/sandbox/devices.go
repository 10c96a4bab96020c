package sandbox

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Root may make device nodes, and a base image may bring some: of the machine's disks as well. Under Docker a cgroup lets
// a process make any node and use few, and so it is here. Where no cgroup can be made, and nobody else made one for us,
// nodes are dead on all that a process sees but for /dev.

// usable are the devices that a process may use, all of them characters: those of /dev and the terminals. A minor number
// below 0 is any.
var usable = [...]struct{ major, minor int32 }{
	{1, 3}, {1, 5}, {1, 7}, {1, 8}, {1, 9}, {5, 0}, {5, 2}, {136, -1},
}

// bound makes the cgroups of p. nodes says whether nodes of devices are harmless; if not, what p sees must have none.
func (p Process) bound() (b *bounds, nodes bool, err error) {
	if b, err = p.Limits.bound(); err != nil {
		return nil, false, &SetupError{Step: "limit", Err: err}
	}
	if p.Insecure || inUserNamespace() { // there, nodes are dead by themselves
		return b, true, nil
	}
	kept, err := keepDevices(b)
	return kept, err == nil, nil
}

// keepDevices lets what is in the cgroups of b use no other devices than usable. b may be nil.
func keepDevices(b *bounds) (*bounds, error) {
	h, err := readHierarchies()
	if err != nil {
		return b, err
	}
	if b == nil {
		b = &bounds{}
	}
	if dir := h.v1["devices"]; dir != "" {
		return b, b.oldDevices(dir)
	}
	if h.v2 == "" {
		return b, errors.New("no cgroups are mounted here")
	}
	return b, b.devices(h.v2)
}

// oldDevices makes a cgroup of version 1.
func (b *bounds) oldDevices(dir string) error {
	made, err := makeCgroup(dir, "devices", cgroupName(), false)
	if err != nil {
		return err
	}
	b.dirs = append(b.dirs, made)
	write := func(file, rule string) {
		if err == nil {
			err = os.WriteFile(path.Join(made, file), []byte(rule), 0)
		}
	}
	write("devices.deny", "a")
	write("devices.allow", "c *:* m")
	write("devices.allow", "b *:* m")
	for _, d := range usable {
		minor := "*"
		if d.minor >= 0 {
			minor = fmt.Sprint(d.minor)
		}
		write("devices.allow", fmt.Sprintf("c %d:%s rwm", d.major, minor))
	}
	return err
}

// devices puts a program on the cgroup of version 2 that b has, or on a new one.
func (b *bounds) devices(dir string) error {
	made := b.unified
	if made == "" {
		made = path.Join(dir, cgroupName())
		sweepCgroups(dir)
		if err := os.Mkdir(made, 0o755); err != nil {
			return err
		}
		b.dirs, b.unified = append(b.dirs, made), made
	}
	fd, err := unix.Open(made, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	prog, err := loadDeviceProgram()
	if err != nil {
		return err
	}
	defer unix.Close(prog) // the cgroup keeps it
	return callBPF(unix.BPF_PROG_ATTACH, new(struct{ target, prog, kind, flags uint32 }{uint32(fd), uint32(prog), unix.BPF_CGROUP_DEVICE, unix.BPF_F_ALLOW_MULTI}), nil)
}

// loadDeviceProgram gives the kernel the program that is asked for each use of a device; see BPF_PROG_TYPE_CGROUP_DEVICE.
func loadDeviceProgram() (int, error) {
	program, license := deviceProgram(), []byte("MIT\x00")
	attr := struct {
		kind, count    uint32
		insns, license uint64
		more           [88]byte // logs, names and other things that are zero
	}{
		kind: unix.BPF_PROG_TYPE_CGROUP_DEVICE, count: uint32(len(program) / 8),
		insns: uint64(uintptr(unsafe.Pointer(&program[0]))), license: uint64(uintptr(unsafe.Pointer(&license[0]))),
	}
	fd := 0
	err := callBPF(unix.BPF_PROG_LOAD, &attr, &fd)
	runtime.KeepAlive(program)
	runtime.KeepAlive(license)
	return fd, err
}

// callBPF is bpf(2) with a struct of attributes.
func callBPF[T any](command uintptr, attr *T, result *int) error {
	for {
		n, _, errno := unix.Syscall(unix.SYS_BPF, command, uintptr(unsafe.Pointer(attr)), unsafe.Sizeof(*attr))
		if errno == unix.EAGAIN || errno == unix.EINTR {
			continue
		}
		if errno != 0 {
			return os.NewSyscallError("bpf", errno)
		}
		if result != nil {
			*result = int(n)
		}
		return nil
	}
}

// deviceProgram returns the instructions: 1 for what is allowed, else 0. It gets the kind of access in the upper and the
// kind of device in the lower half of a word, then major and minor number (struct bpf_cgroup_dev_ctx).
func deviceProgram() []byte {
	const (
		load, move, shift, and, set = 0x61, 0xbf, 0x77, 0x57, 0xb7
		ifEqual, ifNot, end         = 0x15, 0x55, 0x95
		access, kind, major, minor  = 3, 2, 4, 5 // registers; 1 has the context
	)
	var code []byte
	add := func(op, dst, src byte, off int16, imm int32) {
		code = append(code, op, dst|src<<4)
		code = binary.NativeEndian.AppendUint16(code, uint16(off))
		code = binary.NativeEndian.AppendUint32(code, uint32(imm))
	}
	answer := func(yes int32) {
		add(set, 0, 0, 0, yes)
		add(end, 0, 0, 0, 0)
	}
	add(load, kind, 1, 0, 0)
	add(move, access, kind, 0, 0)
	add(shift, access, 0, 0, 16)
	add(and, kind, 0, 0, 0xffff)
	add(load, major, 1, 4, 0)
	add(load, minor, 1, 8, 0)
	add(and, access, 0, 0, unix.BPF_DEVCG_ACC_READ|unix.BPF_DEVCG_ACC_WRITE)
	add(ifNot, access, 0, 2, 0)
	answer(1) // only to make a node
	add(ifEqual, kind, 0, 2, unix.BPF_DEVCG_DEV_CHAR)
	answer(0)
	for _, d := range usable {
		if d.minor < 0 {
			add(ifNot, major, 0, 2, d.major)
		} else {
			add(ifNot, major, 0, 3, d.major)
			add(ifNot, minor, 0, 2, d.minor)
		}
		answer(1)
	}
	answer(0)
	return code
}
