package seccomp

import (
	"encoding/binary"
	"runtime"
	"testing"

	"github.com/elastic/go-seccomp-bpf/arch"
	"github.com/moby/profiles/seccomp"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

var capabilities = []string{"CAP_CHOWN", "CAP_MKNOD", "CAP_SYS_CHROOT"}

// call is what the kernel shows a filter, with words in network order, as the
// machine of x/net/bpf reads them.
func call(a *arch.Info, nr uint32, args ...uint64) []byte {
	b := make([]byte, 64)
	binary.BigEndian.PutUint32(b[dataNr:], nr)
	binary.BigEndian.PutUint32(b[dataArch:], uint32(a.ID))
	for i, v := range args {
		binary.BigEndian.PutUint32(b[dataArgs+8*i:], uint32(v))
		binary.BigEndian.PutUint32(b[dataArgs+8*i+4:], uint32(v>>32))
	}
	return b
}

func defaultProfile(t *testing.T) *specs.LinuxSeccomp {
	t.Helper()
	p, err := seccomp.GetDefaultProfile(&specs.Spec{Process: &specs.Process{Capabilities: &specs.LinuxCapabilities{Bounding: capabilities}}})
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func TestCompile(t *testing.T) {
	const (
		allow  = unix.SECCOMP_RET_ALLOW
		refuse = unix.SECCOMP_RET_ERRNO | uint32(unix.EPERM)
		absent = unix.SECCOMP_RET_ERRNO | uint32(unix.ENOSYS)
		kill   = unix.SECCOMP_RET_KILL_PROCESS
	)
	nr := func(a *arch.Info, name string) uint32 {
		n, ok := a.SyscallNames[name]
		if !ok {
			t.Fatalf("%s has no %s", a.Name, name)
		}
		return uint32(n)
	}
	newuser := uint64(unix.CLONE_NEWUSER)
	for goarch, infos := range map[string][]*arch.Info{"amd64": {arch.X86_64, arch.X32, arch.I386}, "arm64": {arch.AARCH64, arch.ARM}} {
		program, err := compile(defaultProfile(t), goarch)
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("%s: %d instructions", goarch, len(program))
		if len(program) > unix.BPF_MAXINSNS {
			t.Errorf("%s: too many instructions", goarch)
		}
		vm, err := bpf.NewVM(program)
		if err != nil {
			t.Fatal(err)
		}
		check := func(what string, data []byte, want uint32) {
			t.Helper()
			got, err := vm.Run(data)
			if err != nil || uint32(got) != want {
				t.Errorf("%s: got %#x, %v, want %#x", what, uint32(got), err, want)
			}
		}
		for _, a := range infos {
			bit := uint32(0)
			if a == arch.X32 {
				bit = x32Bit
			}
			do := func(name string, want uint32, args ...uint64) {
				t.Helper()
				check(a.Name+" "+name, call(a, nr(a, name)|bit, args...), want)
			}
			do("read", allow)
			do("openat2", allow)
			do("mount", refuse)
			do("keyctl", refuse)
			do("bpf", refuse)
			do("chroot", allow)
			do("clone3", absent)
			do("clone", allow, 0x1200011)
			do("clone", refuse, newuser|17)
			do("clone", allow, 1<<40|17)
			do("personality", allow, 0)
			do("personality", allow, 0xffffffff)
			do("personality", refuse, 0x40000)
			do("personality", refuse, 1<<32)
			do("socket", allow, unix.AF_INET)
			do("socket", refuse, unix.AF_VSOCK)
			do("socket", refuse, unix.AF_ALG)
			do("socket", refuse, 1<<32|unix.AF_INET)
			check(a.Name+" future call", call(a, 3000|bit), absent)
		}
		check("foreign architecture", call(&arch.Info{ID: 0x16}, 0), kill)
		check("no call", call(infos[0], 0xffffffff), absent)
	}
}

// Every rule of the profile is compared with a slow and plain reading of it.
func TestCompileAgainstProfile(t *testing.T) {
	if runtime.GOARCH != "amd64" && runtime.GOARCH != "arm64" {
		t.Skip("no table for", runtime.GOARCH)
	}
	p := defaultProfile(t)
	program, err := compile(p, runtime.GOARCH)
	if err != nil {
		t.Fatal(err)
	}
	vm, err := bpf.NewVM(program)
	if err != nil {
		t.Fatal(err)
	}
	for _, group := range abis(runtime.GOARCH) {
		for _, a := range group {
			highest := 0
			for n, name := range a.info.SyscallNumbers {
				if named(p, name) {
					highest = max(highest, n)
				}
			}
			for n, name := range a.info.SyscallNumbers {
				for _, arg := range []uint64{0, 1, 2, 40, 0x20000, 0x10000000, 0xffffffff, 1 << 33} {
					got, err := vm.Run(call(a.info, uint32(n)|a.bit, arg, arg))
					want := plainly(p, name, arg)
					if n > highest {
						want = unix.SECCOMP_RET_ERRNO | uint32(unix.ENOSYS)
					}
					if err != nil || uint32(got) != want {
						t.Fatalf("%s %s(%#x): got %#x, %v, want %#x", a.info.Name, name, arg, uint32(got), err, want)
					}
				}
			}
		}
	}
}

func named(p *specs.LinuxSeccomp, name string) bool {
	for _, s := range p.Syscalls {
		for _, n := range s.Names {
			if n == name {
				return true
			}
		}
	}
	return false
}

// plainly says what becomes of a call of which all arguments are arg.
func plainly(p *specs.LinuxSeccomp, name string, arg uint64) uint32 {
	verdict := uint32(unix.SECCOMP_RET_ERRNO) | uint32(unix.EPERM)
	for _, s := range p.Syscalls {
		for _, n := range s.Names {
			if n != name {
				continue
			}
			matches := true
			for _, a := range s.Args {
				switch a.Op {
				case specs.OpEqualTo:
					matches = matches && arg == a.Value
				case specs.OpMaskedEqual:
					matches = matches && arg&a.Value == a.ValueTwo
				case specs.OpLessThan:
					matches = matches && arg < a.Value
				default:
					panic(a.Op)
				}
			}
			if ret, _ := action(s.Action, s.ErrnoRet); matches && verdict != unix.SECCOMP_RET_ALLOW {
				verdict = ret
			}
		}
	}
	return verdict
}

func TestConditions(t *testing.T) {
	values := []uint64{0, 1, 5, 0xffffffff, 1 << 32, 1<<32 + 5, 7<<32 + 5, 1<<63 + 1}
	for op, holds := range map[specs.LinuxSeccompOperator]func(a, v uint64) bool{
		specs.OpEqualTo:      func(a, v uint64) bool { return a == v },
		specs.OpNotEqual:     func(a, v uint64) bool { return a != v },
		specs.OpLessThan:     func(a, v uint64) bool { return a < v },
		specs.OpLessEqual:    func(a, v uint64) bool { return a <= v },
		specs.OpGreaterThan:  func(a, v uint64) bool { return a > v },
		specs.OpGreaterEqual: func(a, v uint64) bool { return a >= v },
		specs.OpMaskedEqual:  func(a, v uint64) bool { return a&v == 1 },
	} {
		for _, v := range values {
			body, err := condition(specs.LinuxSeccompArg{Index: 1, Value: v, ValueTwo: 1, Op: op}, []bpf.Instruction{bpf.RetConstant{Val: 1}})
			if err != nil {
				t.Fatal(err)
			}
			vm, err := bpf.NewVM(append(body, bpf.RetConstant{Val: 2}))
			if err != nil {
				t.Fatal(err)
			}
			for _, a := range values {
				want := 2
				if holds(a, v) {
					want = 1
				}
				if got, err := vm.Run(call(arch.X86_64, 0, 0, a)); err != nil || got != want {
					t.Errorf("%#x %s %#x: got %d, %v, want %d", a, op, v, got, err, want)
				}
			}
		}
	}
	if _, err := condition(specs.LinuxSeccompArg{Op: "nope"}, nil); err == nil {
		t.Error("unknown operator taken")
	}
}

func TestCompileUnknown(t *testing.T) {
	if p, err := compile(defaultProfile(t), "riscv64"); p != nil || err != nil {
		t.Errorf("riscv64: %v, %v", p, err)
	}
	bad := &specs.LinuxSeccomp{DefaultAction: "SCMP_ACT_NOTIFY"}
	if _, err := compile(bad, "amd64"); err == nil {
		t.Error("unknown action taken")
	}
}

func BenchmarkFilter(b *testing.B) {
	for b.Loop() {
		if _, err := Docker(capabilities, false); err != nil {
			b.Fatal(err)
		}
	}
}
