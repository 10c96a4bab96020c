// Package seccomp compiles Docker's default seccomp profile into a program of the kernel's.
//
// It loads nothing and knows no process. It is a room of its own because its tables take longer to initialize than all
// that a child of package sandbox does, which has it only as a function.
//
// Start at [Docker].
package seccomp

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"maps"
	"runtime"
	"slices"

	"github.com/elastic/go-seccomp-bpf/arch"
	"github.com/moby/profiles/seccomp"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// Offsets in struct seccomp_data.
const (
	dataNr   = 0
	dataArch = 4
	dataArgs = 16
)

// gap is more than any hole in a table: beyond it are the private calls of arm.
const gap = 4096

// x32Bit marks the x32 calls of an x86-64 process.
const x32Bit = 0x40000000

// Known says whether the system calls of the architecture goarch are known: without that, [Docker] has no filter.
func Known(goarch string) bool { return abis(goarch) != nil }

// Docker compiles Docker's default profile for a process with these capabilities, named like CAP_CHOWN, into an array of
// struct sock_filter for seccomp(2). It is nil on architectures that are not known. With shared, the process is in the
// network of the machine, and has not the raw sockets by which it would see and forge what others send: under Docker it
// has them in a network of its own. The capability stays, as it does in a set-capability ping. (As in Docker's profile,
// the arguments of i386's socketcall are out of sight.)
func Docker(capabilities []string, shared bool) ([]byte, error) {
	spec := &specs.Spec{Process: &specs.Process{Capabilities: &specs.LinuxCapabilities{Bounding: capabilities}}}
	profile, err := seccomp.GetDefaultProfile(spec)
	if err != nil {
		return nil, err
	}
	if shared {
		profile.Syscalls = append(rawSockets(), profile.Syscalls...)
	}
	program, err := compile(profile, runtime.GOARCH)
	if err != nil || program == nil {
		return nil, err
	}
	raw, err := bpf.Assemble(program)
	if err != nil {
		return nil, err
	}
	if len(raw) > unix.BPF_MAXINSNS {
		return nil, fmt.Errorf("%d instructions, the kernel takes %d", len(raw), unix.BPF_MAXINSNS)
	}
	var b []byte
	for _, i := range raw {
		b = binary.NativeEndian.AppendUint16(b, i.Op)
		b = append(b, i.Jt, i.Jf)
		b = binary.NativeEndian.AppendUint32(b, i.K)
	}
	return b, nil
}

// rawSockets refuses packet sockets and raw sockets of the internet families.
func rawSockets() (rules []specs.LinuxSyscall) {
	const kind = 0xf // of a socket, without flags
	add := func(args ...specs.LinuxSeccompArg) {
		rules = append(rules, specs.LinuxSyscall{Names: []string{"socket"}, Action: specs.ActErrno, Args: args})
	}
	add(specs.LinuxSeccompArg{Index: 0, Value: unix.AF_PACKET, Op: specs.OpEqualTo})
	for _, family := range []uint64{unix.AF_INET, unix.AF_INET6} {
		for _, raw := range []uint64{unix.SOCK_RAW, unix.SOCK_PACKET} {
			add(specs.LinuxSeccompArg{Index: 0, Value: family, Op: specs.OpEqualTo},
				specs.LinuxSeccompArg{Index: 1, Value: kind, ValueTwo: raw, Op: specs.OpMaskedEqual})
		}
	}
	return rules
}

// abi is one calling convention that programs on a machine may use.
type abi struct {
	info *arch.Info
	bit  uint32 // added to each number
}

// abis lists, by audit architecture, what a machine runs.
func abis(goarch string) [][]abi {
	switch goarch {
	case "amd64":
		return [][]abi{{{arch.X86_64, 0}, {arch.X32, x32Bit}}, {{arch.I386, 0}}}
	case "386":
		return [][]abi{{{arch.I386, 0}}}
	case "arm64":
		return [][]abi{{{arch.AARCH64, 0}}, {{arch.ARM, 0}}}
	case "arm":
		return [][]abi{{{arch.ARM, 0}}}
	}
	return nil
}

// compile turns a profile into a program: the architecture first, then a
// binary search over runs of neighbouring numbers that have one verdict.
func compile(p *specs.LinuxSeccomp, goarch string) ([]bpf.Instruction, error) {
	groups := abis(goarch)
	if groups == nil {
		return nil, nil
	}
	rules := map[string][]specs.LinuxSyscall{}
	for _, s := range p.Syscalls {
		for _, name := range s.Names {
			rules[name] = append(rules[name], s)
		}
	}
	otherwise, err := action(p.DefaultAction, p.DefaultErrnoRet)
	if err != nil {
		return nil, err
	}
	program := []bpf.Instruction{bpf.LoadAbsolute{Off: dataArch, Size: 4}}
	for _, group := range groups {
		var runs []run
		for _, a := range group {
			r, err := a.runs(rules, otherwise)
			if err != nil {
				return nil, err
			}
			runs = append(runs, r...)
		}
		body := append([]bpf.Instruction{bpf.LoadAbsolute{Off: dataNr, Size: 4}}, search(merge(runs))...)
		program = append(program,
			bpf.JumpIf{Cond: bpf.JumpEqual, Val: uint32(group[0].info.ID), SkipTrue: 1},
			bpf.Jump{Skip: uint32(len(body))})
		program = append(program, body...)
	}
	// A calling convention that no table covers could mean any call.
	return append(program, bpf.RetConstant{Val: unix.SECCOMP_RET_KILL_PROCESS}), nil
}

// run is a row of system call numbers, up to the next one's start, that are
// all treated alike.
type run struct {
	start   uint32
	verdict []bpf.Instruction // ends in a return
}

// runs lists what becomes of each number of one calling convention. Numbers
// above all that the profile knows are newer than it: they do not exist, so
// that programs fall back to older calls.
func (a abi) runs(rules map[string][]specs.LinuxSyscall, otherwise uint32) ([]run, error) {
	refuse := []bpf.Instruction{bpf.RetConstant{Val: otherwise}}
	absent := []bpf.Instruction{bpf.RetConstant{Val: unix.SECCOMP_RET_ERRNO | uint32(unix.ENOSYS)}}
	runs := []run{{a.bit, refuse}}
	next := a.bit
	for _, nr := range slices.Sorted(maps.Keys(a.info.SyscallNumbers)) {
		rs := rules[a.info.SyscallNumbers[nr]]
		if rs == nil {
			continue
		}
		v, err := verdict(rs, otherwise)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", a.info.SyscallNumbers[nr], err)
		}
		at := uint32(nr) | a.bit
		switch {
		case at > next+gap:
			runs = append(runs, run{next, absent})
		case at > next:
			runs = append(runs, run{next, refuse})
		}
		runs = append(runs, run{at, v})
		next = at + 1
	}
	return append(runs, run{next, absent}), nil
}

func merge(runs []run) []run {
	slices.SortStableFunc(runs, func(a, b run) int { return cmp.Compare(a.start, b.start) })
	var out []run
	for _, r := range runs {
		if n := len(out); n > 0 && out[n-1].start == r.start {
			out = out[:n-1]
		}
		if n := len(out); n > 0 && slices.Equal(out[n-1].verdict, r.verdict) {
			continue
		}
		out = append(out, r)
	}
	return out
}

// search finds the run of the number in the accumulator and returns its
// verdict.
func search(runs []run) []bpf.Instruction {
	if len(runs) == 1 {
		return runs[0].verdict
	}
	mid := len(runs) / 2
	low, high := search(runs[:mid]), search(runs[mid:])
	var out []bpf.Instruction
	if len(low) <= 255 {
		out = append(out, bpf.JumpIf{Cond: bpf.JumpGreaterOrEqual, Val: runs[mid].start, SkipTrue: uint8(len(low))})
	} else {
		out = append(out,
			bpf.JumpIf{Cond: bpf.JumpLessThan, Val: runs[mid].start, SkipTrue: 1},
			bpf.Jump{Skip: uint32(len(low))})
	}
	return append(append(out, low...), high...)
}

// verdict is the program for one system call: its rules in turn, where one
// without conditions ends the matter.
func verdict(rules []specs.LinuxSyscall, otherwise uint32) ([]bpf.Instruction, error) {
	for _, r := range rules {
		if len(r.Args) > 0 {
			continue
		}
		ret, err := action(r.Action, r.ErrnoRet)
		if err != nil {
			return nil, err
		}
		return []bpf.Instruction{bpf.RetConstant{Val: ret}}, nil
	}
	var out []bpf.Instruction
	for _, r := range rules {
		ret, err := action(r.Action, r.ErrnoRet)
		if err != nil {
			return nil, err
		}
		matched := []bpf.Instruction{bpf.RetConstant{Val: ret}}
		for _, arg := range slices.Backward(r.Args) {
			if matched, err = condition(arg, matched); err != nil {
				return nil, err
			}
		}
		out = append(out, matched...)
	}
	return append(out, bpf.RetConstant{Val: otherwise}), nil
}

// condition runs then if the argument matches, and skips it otherwise. The
// machine has 32 bits, the argument 64.
func condition(arg specs.LinuxSeccompArg, then []bpf.Instruction) ([]bpf.Instruction, error) {
	n := uint8(len(then))
	if len(then) > 240 || arg.Index > 5 {
		return nil, fmt.Errorf("argument rule too large")
	}
	// Little-endian, as is every architecture that has a table here.
	low := bpf.LoadAbsolute{Off: dataArgs + 8*uint32(arg.Index), Size: 4}
	high := bpf.LoadAbsolute{Off: low.Off + 4, Size: 4}
	vh, vl := uint32(arg.Value>>32), uint32(arg.Value)
	var out []bpf.Instruction
	switch arg.Op {
	case specs.OpEqualTo:
		out = []bpf.Instruction{
			high, bpf.JumpIf{Cond: bpf.JumpEqual, Val: vh, SkipFalse: n + 2},
			low, bpf.JumpIf{Cond: bpf.JumpEqual, Val: vl, SkipFalse: n},
		}
	case specs.OpNotEqual:
		out = []bpf.Instruction{
			high, bpf.JumpIf{Cond: bpf.JumpEqual, Val: vh, SkipFalse: 2},
			low, bpf.JumpIf{Cond: bpf.JumpEqual, Val: vl, SkipTrue: n},
		}
	case specs.OpMaskedEqual:
		out = []bpf.Instruction{
			high, bpf.ALUOpConstant{Op: bpf.ALUOpAnd, Val: vh},
			bpf.JumpIf{Cond: bpf.JumpEqual, Val: uint32(arg.ValueTwo >> 32), SkipFalse: n + 3},
			low, bpf.ALUOpConstant{Op: bpf.ALUOpAnd, Val: vl},
			bpf.JumpIf{Cond: bpf.JumpEqual, Val: uint32(arg.ValueTwo), SkipFalse: n},
		}
	case specs.OpLessThan:
		out = []bpf.Instruction{
			high, bpf.JumpIf{Cond: bpf.JumpGreaterThan, Val: vh, SkipTrue: n + 3},
			bpf.JumpIf{Cond: bpf.JumpEqual, Val: vh, SkipFalse: 2},
			low, bpf.JumpIf{Cond: bpf.JumpGreaterOrEqual, Val: vl, SkipTrue: n},
		}
	case specs.OpLessEqual:
		out = []bpf.Instruction{
			high, bpf.JumpIf{Cond: bpf.JumpGreaterThan, Val: vh, SkipTrue: n + 3},
			bpf.JumpIf{Cond: bpf.JumpEqual, Val: vh, SkipFalse: 2},
			low, bpf.JumpIf{Cond: bpf.JumpGreaterThan, Val: vl, SkipTrue: n},
		}
	case specs.OpGreaterThan:
		out = []bpf.Instruction{
			high, bpf.JumpIf{Cond: bpf.JumpGreaterThan, Val: vh, SkipTrue: 3},
			bpf.JumpIf{Cond: bpf.JumpEqual, Val: vh, SkipFalse: n + 2},
			low, bpf.JumpIf{Cond: bpf.JumpGreaterThan, Val: vl, SkipFalse: n},
		}
	case specs.OpGreaterEqual:
		out = []bpf.Instruction{
			high, bpf.JumpIf{Cond: bpf.JumpGreaterThan, Val: vh, SkipTrue: 3},
			bpf.JumpIf{Cond: bpf.JumpEqual, Val: vh, SkipFalse: n + 2},
			low, bpf.JumpIf{Cond: bpf.JumpGreaterOrEqual, Val: vl, SkipFalse: n},
		}
	default:
		return nil, fmt.Errorf("operator %q not known", arg.Op)
	}
	return append(out, then...), nil
}

func action(a specs.LinuxSeccompAction, errno *uint) (uint32, error) {
	switch a {
	case specs.ActAllow:
		return unix.SECCOMP_RET_ALLOW, nil
	case specs.ActErrno:
		if errno == nil {
			return unix.SECCOMP_RET_ERRNO | uint32(unix.EPERM), nil
		}
		return unix.SECCOMP_RET_ERRNO | uint32(*errno)&unix.SECCOMP_RET_DATA, nil
	case specs.ActKillProcess:
		return unix.SECCOMP_RET_KILL_PROCESS, nil
	case specs.ActKill, specs.ActKillThread:
		return unix.SECCOMP_RET_KILL_THREAD, nil
	}
	return 0, fmt.Errorf("action %q not known", a)
}
