package builder

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"sync"

	"filo/builder/sandbox"
)

// ssh shows the socket of an ssh agent.
func (w *walk) ssh(ctx context.Context, m mount) (sandbox.Mount, func(), error) {
	agent, ok := w.req.SSH[m.ID]
	if !ok && m.Required {
		return sandbox.Mount{}, nil, fmt.Errorf("ssh %s: %w: give it with --ssh %s", m.ID, errNotFound, m.ID)
	}
	if !ok {
		return sandbox.Mount{}, nil, nil
	}
	dir, err := w.Store.Temp("ssh-")
	if err != nil {
		return sandbox.Mount{}, nil, err
	}
	l, err := listen(dir)
	if err != nil {
		os.RemoveAll(dir)
		return sandbox.Mount{}, nil, fmt.Errorf("ssh %s: %w", m.ID, err)
	}
	socket := filepath.Join(dir, socketName)
	stop := forward(ctx, l, agent)
	free := func() {
		stop()
		os.RemoveAll(dir)
	}
	err = errors.Join(os.Chmod(socket, fileMode(deref(m.Mode, 0o600))), w.chown(socket, deref(m.UID, 0), deref(m.GID, 0)))
	return sandbox.Mount{Type: sandbox.Bind, Source: socket, Target: m.Target}, free, err
}

const socketName = "s"

// listen makes a socket in dir. The way to it goes through an open file: a socket's path must be shorter than dir's may be.
func listen(dir string) (net.Listener, error) {
	d, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	l, err := net.ListenUnix("unix", &net.UnixAddr{Net: "unix", Name: fmt.Sprintf("/proc/self/fd/%d/%s", d.Fd(), socketName)})
	if err != nil {
		return nil, err
	}
	l.SetUnlinkOnClose(false) // by then the number may stand for another directory
	return l, nil
}

// chown sets the owner of what a step is shown. With one user ID there is nobody else to give it to.
func (w *walk) chown(name string, uid, gid int) error {
	if w.req.SingleID || uid == 0 && gid == 0 {
		return nil
	}
	return os.Chown(name, uid, gid)
}

// forward joins every connection to l with one to the agent, until the function it returns is called; that waits for
// the last of them.
func forward(ctx context.Context, l net.Listener, agent Agent) (stop func()) {
	ctx, cancel := context.WithCancel(ctx)
	var all sync.WaitGroup
	all.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			all.Go(func() { join(ctx, c, agent) })
		}
	})
	return func() {
		cancel()
		l.Close()
		all.Wait()
	}
}

// join copies between c and the agent until either side ends or ctx is done.
func join(ctx context.Context, c net.Conn, agent Agent) {
	defer c.Close()
	a, err := agent(ctx)
	if err != nil {
		return // the client sees a closed connection, as with an agent that died
	}
	defer a.Close()
	end := context.AfterFunc(ctx, func() { c.Close(); a.Close() })
	defer end()
	var both sync.WaitGroup
	both.Go(func() { io.Copy(a, c); a.Close() })
	io.Copy(c, a)
	c.Close()
	both.Wait()
}
