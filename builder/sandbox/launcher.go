package sandbox

import (
	"errors"
	"io"
	"math"
	"os"
	"reflect"
	"runtime"
	"strconv"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A launcher is this program started again to start processes for filo, one after the other. It makes the namespaces and
// mounts of a process around itself, forks (sequence.go), waits, and goes home. So a step pays neither for the start of a
// program nor for the cgroup of its process, which is the launcher's: to move a process into one can take the kernel longer
// than all else about a short step.

const (
	// launcherName is the argv[0] of a launcher.
	launcherName = "filo-sandbox"
	socketFD     = 3
)

// launcher is what a launcher comes home to.
type launcher struct {
	mounts, network int  // its own namespaces
	root            int  // its root, which need not be that of its namespace
	null            int  // /dev/null
	sameGroups      bool // nobody may change groups here
}

// serve is the life of a launcher. It ends when filo closes its end of the socket.
func serve() error {
	closeOnExec(socketFD)
	unix.Umask(0)
	l := &launcher{sameGroups: setgroupsDenied()}
	// The number that a child's report will have may be one of theirs, or of a file of Go's own: no child has a use for these.
	for _, f := range []struct {
		fd    *int
		name  string
		flags int
	}{{&l.mounts, "/proc/self/ns/mnt", unix.O_RDONLY}, {&l.network, "/proc/self/ns/net", unix.O_RDONLY}, {&l.root, "/", unix.O_PATH | unix.O_DIRECTORY}, {&l.null, os.DevNull, unix.O_RDWR}} {
		var err error
		if *f.fd, err = unix.Open(f.name, f.flags|unix.O_CLOEXEC, 0); err != nil {
			return &os.PathError{Op: "open", Path: f.name, Err: err}
		}
	}
	for {
		h, outputs, err := receiveOrder(socketFD)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return at("read the order", err)
		}
		if err := send(fd(socketFD), l.launch(h, outputs)); err != nil {
			return err
		}
		// Meanwhile filo looks at what the process wrote.
		if err := l.goHome(h); err != nil {
			return err
		}
		if _, err := fd(socketFD).Write([]byte{isHome}); err != nil {
			return err
		}
		h = nil
		tidy()
	}
}

// plenty is how much memory a launcher may have in use before it looks for garbage.
const plenty = 16 << 20

// tidy looks for garbage while there is no process. Go by itself would begin at any time and could not come to an end: it
// would try and try to stop a thread that waits where it does not look (poll).
func tidy() {
	var m runtime.MemStats
	if runtime.ReadMemStats(&m); m.HeapAlloc > plenty {
		runtime.GC()
	}
}

// answer is how a process ended.
type answer struct {
	Started bool
	Status  int // as wait4 gives it
	Failed  bool
	Failure report // why it could not become one
}

// isHome is what a launcher says when it can start another process.
const isHome = 'h'

func (l *launcher) launch(h *handover, outputs [2]int) (a answer) {
	q, err := l.prepare(h, outputs)
	var c *child
	if err == nil {
		c, err = q.start()
	}
	if h.Limited { // see [bounds.dismiss]
		_, _ = fd(socketFD).Write([]byte{starting}) // filo is dead, or reads
	}
	if err == nil {
		a, err = c.end(q)
	}
	if err != nil {
		a.Failed, a.Failure = true, newReport(err)
	}
	return a
}

// prepare makes the namespaces and mounts of a process and the calls by which a child becomes it.
func (l *launcher) prepare(h *handover, outputs [2]int) (*sequence, error) {
	flags := unix.CLONE_NEWNS | unix.CLONE_NEWIPC | unix.CLONE_NEWUTS | unix.CLONE_NEWCGROUP
	if h.Process.Network == NetworkNone {
		flags |= unix.CLONE_NEWNET
	}
	if err := unix.Unshare(flags); err != nil {
		return nil, at("make namespaces", refused(err))
	}
	proc, err := enterRoot(h)
	if err != nil {
		return nil, err
	}
	if err := unix.Sethostname([]byte(h.Process.Hostname)); err != nil {
		return nil, at("set hostname", err)
	}
	if h.Process.Network == NetworkNone {
		if err := loopbackUp(); err != nil {
			return nil, at("bring up lo", err)
		}
	}
	q := &sequence{}
	q.add("start", unix.SYS_SETSID)
	for i, fd := range []int{l.null, outputs[0], outputs[1]} {
		q.add("start", unix.SYS_DUP3, fd, i, 0)
	}
	proc.mount(q)
	giveOutput(outputs[:], h.Process.UID)
	if err := h.enterDirectory(q); err != nil {
		return nil, err
	}
	q.closeFiles()
	return q, h.become(q, l.sameGroups)
}

// closeFiles closes all that the launcher has open but the report: there is nothing left then to which /proc/self/fd could
// lead, where the program may be looked for as well. Only a child may do so that is not Go's any more: the files of Go's
// scheduler are among them.
func (q *sequence) closeFiles() {
	q.add("close files", unix.SYS_CLOSE, socketFD)
	q.ignore()
	q.add("close files", unix.SYS_CLOSE_RANGE, reportFD+1, uintptr(math.MaxUint32), 0)
	q.tolerate(0, unix.ENOSYS, unix.EPERM) // they are closed by the execution at the latest
}

// child is one that makes the calls of a sequence.
type child struct{ pid, pidfd, report int }

// start lets a child make the calls.
func (q *sequence) start() (*child, error) {
	var report [2]int
	if err := unix.Pipe2(report[:], unix.O_CLOEXEC); err != nil {
		return nil, at("start", err)
	}
	pid, pidfd, err := q.fork(unix.CLONE_NEWPID, report)
	unix.Close(report[1])
	if err != nil {
		unix.Close(report[0])
		return nil, at("start", refused(err))
	}
	return &child{pid, pidfd, report[0]}, nil
}

// end waits for the end of a child, or makes an end when filo has no more to say.
func (c *child) end(q *sequence) (a answer, err error) {
	defer unix.Close(c.report)
	defer unix.Close(c.pidfd)
	await(c.pidfd)
	var status unix.WaitStatus
	for {
		if _, err = unix.Wait4(c.pid, &status, unix.WALL, nil); err != unix.EINTR {
			break
		}
	}
	if err != nil {
		return a, at("wait", err)
	}
	a.Status = int(status)
	said := make([]byte, 1+failureSize)
	n, err := unix.Read(c.report, said)
	if err != nil {
		return a, at("start", err)
	}
	said = said[:max(n, 0)]
	if len(said) > 0 && said[0] == starting {
		a.Started, said = true, said[1:]
	}
	if len(said) == failureSize {
		return a, q.failure(parseFailure(said))
	}
	return a, nil
}

// await waits for the end of a process, which comes at the latest when filo closes its end of the socket.
func await(pidfd int) {
	fds := []unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}, {Fd: socketFD, Events: unix.POLLRDHUP}}
	for {
		if err := poll(fds); err != nil {
			return // wait4 waits as well
		}
		if fds[0].Revents != 0 {
			return
		}
		if len(fds) == 2 && fds[1].Revents != 0 {
			_ = unix.PidfdSendSignal(pidfd, unix.SIGKILL, nil, 0) // there is only one reason: it is dead
			fds = fds[:1]
		}
	}
}

// poll is ppoll(2) without a limit of time. All that takes long is waited for here, so that Go's scheduler does not notice:
// it would look every 20 microseconds whether there is something else to do, and there never is.
func poll(fds []unix.PollFd) error {
	for {
		_, _, errno := unix.RawSyscall6(unix.SYS_PPOLL, uintptr(unsafe.Pointer(&fds[0])), uintptr(len(fds)), 0, 0, 0, 0)
		if errno == 0 {
			return nil
		}
		if errno != unix.EINTR {
			return errno
		}
	}
}

// goHome leaves the namespaces of a process, of which the mounts go with that, and closes what was opened for it. From a
// network of its own no way leads home in a user namespace: the machine's belongs to another one.
func (l *launcher) goHome(h *handover) error {
	if err := unix.Setns(l.mounts, unix.CLONE_NEWNS); err != nil {
		return at("go home", err)
	}
	if h.Process.Network == NetworkNone {
		if err := unix.Setns(l.network, unix.CLONE_NEWNET); err != nil {
			return at("go home", err)
		}
	}
	// The way home ends at the root of the namespace. Where filo lives in a chroot, that is not its own.
	err := unix.Fchdir(l.root)
	if err == nil {
		err = unix.Chroot(".")
	}
	if err != nil {
		return at("go home", err)
	}
	first := max(l.mounts, l.network, l.root, l.null) + 1
	if unix.CloseRange(uint(first), math.MaxUint32, 0) == nil {
		return nil
	}
	for _, fd := range openFiles(first) {
		unix.Close(fd)
	}
	return nil
}

// closeOnExec keeps files from first on from being a process's: those that filo was started with, and those opened from
// here on.
func closeOnExec(first int) {
	if unix.CloseRange(uint(first), math.MaxUint32, unix.CLOSE_RANGE_CLOEXEC) == nil {
		return
	}
	for _, fd := range openFiles(first) { // an old kernel, or a filter that is older than the call
		unix.CloseOnExec(fd)
	}
}

// openFiles lists the numbers of open files from first on.
func openFiles(first int) (fds []int) {
	names, _ := os.ReadDir("/proc/self/fd")
	for _, n := range names {
		if fd, err := strconv.Atoi(n.Name()); err == nil && fd >= first {
			fds = append(fds, fd)
		}
	}
	return fds
}

// receiveOrder reads what filo sends: the files for standard output and standard error, and a handover.
func receiveOrder(socket fd) (*handover, [2]int, error) {
	var files [2]int
	if err := poll([]unix.PollFd{{Fd: int32(socket), Events: unix.POLLIN}}); err != nil {
		return nil, files, err
	}
	b, rights := make([]byte, 1), make([]byte, unix.CmsgSpace(4*len(files)))
	var n, rn int
	for {
		var err error
		if n, rn, _, _, err = unix.Recvmsg(int(socket), b, rights, unix.MSG_CMSG_CLOEXEC); err == nil {
			break
		} else if err != unix.EINTR {
			return nil, files, err
		}
	}
	if n == 0 {
		return nil, files, io.EOF
	}
	messages, err := unix.ParseSocketControlMessage(rights[:rn])
	if err != nil {
		return nil, files, err
	}
	for _, m := range messages {
		fds, err := unix.ParseUnixRights(&m)
		if err != nil {
			return nil, files, err
		}
		copy(files[:], fds)
	}
	h := &handover{}
	return h, files, receive(socket, h)
}

// newReport packs an error for the way to filo.
func newReport(err error) report {
	r := report{Step: "start", Text: err.Error()}
	var f *failed
	if errors.As(err, &f) {
		r.Step, r.Text = f.step, f.err.Error()
	}
	var x *notExecutable
	if errors.As(err, &x) {
		r.Code = x.code
	}
	errors.As(err, &r.Errno)
	return r
}

// tell sends an error to the parent of a child on the chroot ground.
func tell(err error) {
	syscall.Write(reportFD, encode(nil, reflect.ValueOf(newReport(err))))
}
