package sandbox

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"sync/atomic"
	"syscall"

	"golang.org/x/sys/unix"
)

// The chroot ground is for containers that may neither mount nor make namespaces: all that is
// left is chroot(2). Where other grounds have mounts, the parent puts files into the root
// before the process runs and takes them away after it (scene.go). Between the two is a
// keeper: to it go all the process's descendants, however they detach themselves, and it
// ends them with the process, or when filo is gone.

const (
	keeperName = "filo-keeper"
	actorName  = "filo-actor"
	statusFD   = 5
)

// ChrootLimits says what a step lacks on the ground "chroot".
const ChrootLimits = "steps see the processes, network and host name of this container and are kept in their root by chroot alone; " +
	"/proc and /sys are a picture without processes, so /proc/self/exe, /dev/stdout, /dev/fd, >(…) and /proc/sys/kernel/random/uuid are missing; " +
	"RUN --network=none is refused; read-only mounts can be written, which is thrown away, but not in a cache; a cache is mounted in one step at a time; " +
	"tmpfs mounts, /dev/shm and secrets are files in the state directory while their step runs, of whatever size"

// chrootWorks says what is missing for the chroot ground.
func chrootWorks() error {
	if os.Geteuid() != 0 {
		return errors.New("not running as root")
	}
	if name := lacking(unix.CAP_SYS_CHROOT, unix.CAP_MKNOD); name != "" {
		return fmt.Errorf("capability %s is missing (docker run --cap-add %[1]s, or without --cap-drop)", name)
	}
	if inUserNamespace() {
		return errors.New("devices cannot be made in a user namespace, and a step needs /dev/null")
	}
	// Changes nothing: this is the root already.
	if err := unix.Chroot("/"); err != nil {
		return fmt.Errorf("chroot is refused: %w", err)
	}
	return nil
}

// firstUserNamespace is the number of the machine's own, PROC_USER_INIT_INO. Its map does not
// tell: others may map all IDs to themselves.
const firstUserNamespace = "user:[4026531837]"

// inUserNamespace reports whether this is not the machine's own user namespace.
func inUserNamespace() bool {
	ns, err := os.Readlink("/proc/self/ns/user")
	return err == nil && ns != firstUserNamespace
}

// runChroot is Run on the ground "chroot".
func (r *Runner) runChroot(ctx context.Context, p Process) (err error) {
	h, err := r.prepare(p)
	if err != nil {
		return err
	}
	s, err := newScene(ctx, h)
	if err != nil {
		return &SetupError{Step: "set the scene", Err: err}
	}
	defer func() {
		// What is left in the root would be part of the step's result.
		if serr := s.strike(); serr != nil && err == nil {
			err = fmt.Errorf("clear up after the process: %w", serr)
		}
	}()
	b, _, err := p.bound() // in a container it is that which keeps the devices
	if err != nil {
		return err
	}
	defer b.close()
	out, err := newOutputs(p)
	if err != nil {
		return &SetupError{Step: "start", Err: err}
	}
	defer out.close()
	defer out.finish()
	k, err := startKeeper(out)
	out.leave()
	if err != nil {
		return &SetupError{Step: "start", Err: err}
	}
	defer k.close()
	if err := b.put(k.process.Pid); err != nil && p.Limits != (Limits{}) {
		k.process.Kill()
		k.process.Wait()
		return &SetupError{Step: "limit", Err: err}
	}
	stop := context.AfterFunc(ctx, func() { k.order.Close() })
	defer stop()
	// A keeper that dies before it has read all says why on its report.
	_ = send(k.order, h)
	started, failure := readReport(k.report)
	status, statusErr := io.ReadAll(io.LimitReader(k.status, 5))
	state, err := k.process.Wait()
	out.finish()
	switch {
	case err != nil:
		return &SetupError{Step: "wait", Err: err}
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case failure != nil:
		return failure.error(p.Args)
	case !started || statusErr != nil || len(status) != 4:
		return &SetupError{Step: "start", Err: fmt.Errorf("child ended early: %s", state)}
	}
	return out.written(b.explain(p, exitError(p.Args, syscall.WaitStatus(binary.NativeEndian.Uint32(status)))))
}

// keeper is a started one and this side of its pipes.
type keeper struct {
	process *os.Process
	order   *os.File // the handover goes in here; its end is the process's
	report  *os.File // set-up errors come out here, then end of file at exec
	status  *os.File // how the process ended
}

// startKeeper starts one. It outlives filo, to end what it keeps.
func startKeeper(out *outputs) (*keeper, error) {
	k := &keeper{}
	var theirs []*os.File
	defer func() {
		for _, f := range theirs {
			f.Close()
		}
	}()
	pipe := func(ours **os.File, read bool) error {
		r, w, err := os.Pipe()
		if err != nil {
			return err
		}
		if !read {
			r, w = w, r
		}
		*ours, theirs = r, append(theirs, w)
		return nil
	}
	err := pipe(&k.order, false)
	if err == nil {
		err = pipe(&k.report, true)
	}
	if err == nil {
		err = pipe(&k.status, true)
	}
	if err == nil {
		k.process, err = os.StartProcess(self, []string{keeperName}, &os.ProcAttr{
			Env:   []string{"GOGC=off", "GOMAXPROCS=1", "GODEBUG=containermaxprocs=0,asyncpreemptoff=1"},
			Files: append([]*os.File{out.null, out.stdout, out.stderr}, theirs...),
			Sys:   &syscall.SysProcAttr{Setsid: true},
		})
	}
	if err != nil {
		k.close()
		return nil, err
	}
	return k, nil
}

func (k *keeper) close() {
	for _, f := range []*os.File{k.order, k.report, k.status} {
		f.Close()
	}
}

// keep is the keeper's life. An error says that there was no process.
func keep() error {
	unix.CloseOnExec(reportFD)
	unix.CloseOnExec(statusFD)
	order := os.NewFile(orderFD, "order")
	h := &handover{}
	if err := receive(order, h); err != nil {
		return at("read the order", err)
	}
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return at("adopt processes", err)
	}
	r, w, err := os.Pipe()
	if err != nil {
		return at("start", err)
	}
	actor, err := os.StartProcess(self, []string{actorName}, &os.ProcAttr{
		Env:   []string{"GOGC=off"},
		Files: []*os.File{os.NewFile(0, "in"), os.NewFile(1, "out"), os.NewFile(2, "err"), r, os.NewFile(reportFD, "report")},
		Sys:   &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setsid: true},
	})
	if err != nil {
		return at("start", err)
	}
	// An actor that dies before it has read all says why on its report.
	_ = send(w, h)
	w.Close()
	for _, fd := range []int{0, 1, 2, reportFD, int(r.Fd())} {
		unix.Close(fd)
	}
	var over atomic.Bool
	var watch sync.WaitGroup
	watch.Go(func() {
		io.Copy(io.Discard, order) // filo closes its end, or dies
		if !over.Load() {
			unix.Kill(actor.Pid, unix.SIGKILL)
		}
	})
	status := reap(actor.Pid)
	over.Store(true)
	endDescendants()
	unix.Write(statusFD, binary.NativeEndian.AppendUint32(nil, uint32(status)))
	return nil
}

// reap waits for a child and buries all that end meanwhile.
func reap(pid int) unix.WaitStatus {
	var status unix.WaitStatus
	for {
		got, err := unix.Wait4(-1, &status, 0, nil)
		if err == unix.EINTR {
			continue
		}
		if err != nil || got == pid {
			return status
		}
	}
}

// endDescendants ends all that descend from this process, which adopts them one by one as their
// parents end. They are stopped first: what forks faster than it can be killed would go on for ever.
func endDescendants() {
	for {
		known := map[int]bool{}
		for range 100 {
			found := false
			for _, pid := range descendants(os.Getpid()) {
				if !known[pid] {
					known[pid], found = true, true
					unix.Kill(pid, unix.SIGSTOP)
				}
			}
			if !found {
				break
			}
		}
		for pid := range known {
			unix.Kill(pid, unix.SIGKILL)
		}
		var status unix.WaitStatus
		for {
			_, err := unix.Wait4(-1, &status, 0, nil)
			if err == unix.ECHILD {
				return
			}
			if err == nil {
				break // it may have left children to us
			}
		}
	}
}

// descendants lists the processes below pid that are not dead already.
func descendants(pid int) []int {
	dir, err := os.Open("/proc")
	if err != nil {
		return nil
	}
	defer dir.Close()
	names, _ := dir.Readdirnames(-1)
	children := map[int][]int{}
	for _, name := range names {
		if child, parent, ok := parentOf(name); ok {
			children[parent] = append(children[parent], child)
		}
	}
	all := children[pid]
	for i := 0; i < len(all); i++ {
		all = append(all, children[all[i]]...)
	}
	return all
}

// parentOf reads who the parent of a process is.
func parentOf(name string) (pid, parent int, ok bool) {
	if name[0] < '0' || name[0] > '9' {
		return 0, 0, false
	}
	b, err := os.ReadFile("/proc/" + name + "/stat")
	if err != nil {
		return 0, 0, false
	}
	// The command's name stands in brackets and may hold anything.
	i := len(b) - 1
	for i >= 0 && b[i] != ')' {
		i--
	}
	var state string
	if _, err := fmt.Sscan(string(b[i+1:]), &state, &parent); err != nil || state == "Z" {
		return 0, 0, false
	}
	_, err = fmt.Sscan(name, &pid)
	return pid, parent, err == nil
}

// act turns the keeper's child into the process. It returns only if that cannot be done.
func act() error {
	h, err := begin()
	if err != nil {
		return err
	}
	if err := unix.Chdir(h.Process.Root.Dir); err != nil {
		return at("enter root", err)
	}
	if err := unix.Chroot("."); err != nil {
		return at("change root", err)
	}
	giveOutput([]int{1, 2}, h.Process.UID)
	q := &sequence{}
	if err := h.enterDirectory(q); err != nil {
		return err
	}
	if err := h.become(q, false); err != nil {
		return err
	}
	return q.failure(q.play())
}
