package sandbox

import (
	"encoding/binary"
	"runtime"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// sequence is a list of system calls that is made before it is needed: between clone(2) and execve(2) a process of many
// threads is but a copy of one of them, in which Go's allocator, stacks and locks must not be touched. Starting a program
// instead takes longer than all else about a short step.
type sequence struct {
	calls  []call
	pinned []any // what the calls point to
	end    error // what it means that all were made
}

// call is one system call.
type call struct {
	number uintptr
	args   [6]uintptr
	refs   uint8            // bit i: args[i] is the number of an earlier call, whose result is meant
	mild   [3]syscall.Errno // results that are no failure
	anyway bool             // no result is a failure
	onMild int              // how many calls are left out after one of these
	onDone int              // how many are left out after success
	step   string           // what is being done, for errors
	cause  func(syscall.Errno) error
}

// result is an argument: what the call with this number returned.
type result int

// add appends a call and returns its number. Arguments are numbers, results, pointers, and strings, of which the call
// gets a copy that ends with a zero byte.
func (q *sequence) add(step string, number uintptr, args ...any) result {
	c := call{number: number, step: step}
	for i, arg := range args {
		switch a := arg.(type) {
		case int:
			c.args[i] = uintptr(a)
		case uint64:
			c.args[i] = uintptr(a)
		case uintptr:
			c.args[i] = a
		case result:
			c.args[i] = uintptr(a)
			c.refs |= 1 << i
		case unsafe.Pointer:
			c.args[i] = uintptr(a)
			q.pinned = append(q.pinned, a)
		case string:
			c.args[i] = q.text(a)
		default:
			panic("add: an argument of a kind that no call takes")
		}
	}
	q.calls = append(q.calls, c)
	return result(len(q.calls) - 1)
}

// text pins a string that ends with a zero byte.
func (q *sequence) text(s string) uintptr {
	b := append([]byte(s), 0)
	q.pinned = append(q.pinned, b)
	return uintptr(unsafe.Pointer(&b[0]))
}

// texts pins a list of strings that ends with a zero, as execve takes it.
func (q *sequence) texts(list []string) unsafe.Pointer {
	all := make([]uintptr, len(list)+1)
	for i, s := range list {
		all[i] = q.text(s)
	}
	q.pinned = append(q.pinned, all)
	return unsafe.Pointer(&all[0])
}

// tolerate lets results of the last call be no failure; after one of them, skip calls are left out.
func (q *sequence) tolerate(skip int, mild ...syscall.Errno) {
	c := &q.calls[len(q.calls)-1]
	copy(c.mild[:], mild)
	c.onMild = skip
}

// skip leaves out n calls after the last one, if that succeeds.
func (q *sequence) skip(n int) { q.calls[len(q.calls)-1].onDone = n }

// ignore lets no result of the last call be a failure.
func (q *sequence) ignore() { q.calls[len(q.calls)-1].anyway = true }

// blame lets errors of the last call be told otherwise.
func (q *sequence) blame(cause func(syscall.Errno) error) {
	q.calls[len(q.calls)-1].cause = cause
}

// failure is the error of the call with this number.
func (q *sequence) failure(i int, errno syscall.Errno) error {
	if i >= len(q.calls) {
		return q.end
	}
	c := &q.calls[i]
	if c.cause != nil {
		return c.cause(errno)
	}
	return at(c.step, errno)
}

// play makes the calls. It returns the number of the one that failed, or of all.
func (q *sequence) play() (int, syscall.Errno) {
	i, errno := play(q.calls, make([]uintptr, len(q.calls)))
	runtime.KeepAlive(q)
	return i, errno
}

// fork lets a new process make the calls and, if they come to an end, die. Its failure is written to the pipe report: the
// number of the call and that of the error, 8 bytes each. flags are those of clone(2).
func (q *sequence) fork(flags uintptr, report [2]int) (pid, pidfd int, err error) {
	results := make([]uintptr, len(q.calls))
	var fd int32
	// A signal that the new process got would run Go's handler there.
	all, old := ^uint64(0), uint64(0)
	setMask(&all, &old)
	n, errno := fork(flags|unix.CLONE_PIDFD|uintptr(unix.SIGCHLD), &fd, q.calls, results, uintptr(report[0]), uintptr(report[1]))
	setMask(&old, nil)
	runtime.KeepAlive(q)
	if errno != 0 {
		return 0, -1, errno
	}
	return int(n), int(fd), nil
}

// setMask sets the signals that this thread blocks.
func setMask(set, old *uint64) {
	unix.RawSyscall6(unix.SYS_RT_SIGPROCMASK, unix.SIG_SETMASK, uintptr(unsafe.Pointer(set)), uintptr(unsafe.Pointer(old)), unsafe.Sizeof(*set), 0, 0)
}

// failureSize is that of a failure on the report.
const failureSize = 16

func parseFailure(b []byte) (int, syscall.Errno) {
	return int(binary.NativeEndian.Uint64(b)), syscall.Errno(binary.NativeEndian.Uint64(b[8:]))
}

// fork is the part of it that two processes run. Nothing in here and in play may grow the stack, allocate, lock, or write
// a pointer: in the new process there is no runtime that would see to it.
//
//go:nosplit
//go:norace
func fork(flags uintptr, pidfd *int32, calls []call, results []uintptr, theirs, report uintptr) (uintptr, syscall.Errno) {
	var pid uintptr
	var errno syscall.Errno
	if runtime.GOARCH == "s390x" {
		pid, _, errno = syscall.RawSyscall6(syscall.SYS_CLONE, 0, flags, uintptr(unsafe.Pointer(pidfd)), 0, 0, 0)
	} else {
		pid, _, errno = syscall.RawSyscall6(syscall.SYS_CLONE, flags, 0, uintptr(unsafe.Pointer(pidfd)), 0, 0, 0)
	}
	if errno != 0 || pid != 0 {
		return pid, errno
	}
	// So that only the parent can read it, and writing fails once that is gone.
	syscall.RawSyscall6(syscall.SYS_CLOSE, theirs, 0, 0, 0, 0, 0)
	syscall.RawSyscall6(unix.SYS_DUP3, report, reportFD, unix.O_CLOEXEC, 0, 0, 0)
	i, errno := play(calls, results)
	failure := [failureSize / 8]uint64{uint64(i), uint64(errno)}
	syscall.RawSyscall6(syscall.SYS_WRITE, reportFD, uintptr(unsafe.Pointer(&failure)), failureSize, 0, 0, 0)
	for {
		syscall.RawSyscall6(syscall.SYS_EXIT_GROUP, 1, 0, 0, 0, 0, 0)
	}
}

//go:nosplit
//go:norace
func play(calls []call, results []uintptr) (int, syscall.Errno) {
	for i := 0; i < len(calls); i++ {
		c := &calls[i]
		a := c.args
		for j := range a {
			if c.refs&(1<<j) != 0 {
				a[j] = results[a[j]]
			}
		}
		r, _, errno := syscall.RawSyscall6(c.number, a[0], a[1], a[2], a[3], a[4], a[5])
		switch {
		case errno == 0:
			results[i] = r
			i += c.onDone
		case c.anyway || errno == c.mild[0] || errno == c.mild[1] || errno == c.mild[2]:
			i += c.onMild
		default:
			return i, errno
		}
	}
	return len(calls), 0
}
