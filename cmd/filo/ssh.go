package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"strings"

	"golang.org/x/crypto/ssh"
	"golang.org/x/crypto/ssh/agent"

	"filo/builder"
)

// agents reads --ssh: ID, ID=SOCKET or ID=KEY[,KEY]. Without a value the agent is that of SSH_AUTH_SOCK. Steps may
// list keys and sign with them, and nothing else.
func agents(specs []string, env lookup) (map[string]builder.Agent, error) {
	out := map[string]builder.Agent{}
	for _, spec := range specs {
		id, paths, _ := strings.Cut(spec, "=")
		if id == "" {
			return nil, fmt.Errorf("--ssh %q: no id", spec)
		}
		if _, ok := out[id]; ok {
			return nil, fmt.Errorf("--ssh %q: %s is there twice", spec, id)
		}
		if paths == "" {
			paths, _ = env("SSH_AUTH_SOCK")
		}
		if paths == "" {
			return nil, fmt.Errorf("--ssh %q: SSH_AUTH_SOCK is not set; start an ssh agent or name a key: %s=PATH", spec, id)
		}
		a, err := openAgent(strings.Split(paths, ","))
		if err != nil {
			return nil, fmt.Errorf("--ssh %q: %w", spec, err)
		}
		out[id] = a
	}
	return out, nil
}

// openAgent makes an agent of one socket or of key files.
func openAgent(paths []string) (builder.Agent, error) {
	keys, ok := agent.NewKeyring().(agent.ExtendedAgent)
	if !ok {
		return nil, errors.New("keyring cannot sign with flags") // which x/crypto's can
	}
	for _, p := range paths {
		fi, err := os.Stat(p)
		if err != nil {
			return nil, err
		}
		if fi.Mode().Type() == fs.ModeSocket {
			if len(paths) > 1 {
				return nil, errors.New("an agent's socket must be the only value")
			}
			return socketAgent(p), nil
		}
		key, err := readKey(p)
		if err != nil {
			return nil, err
		}
		if err := keys.Add(agent.AddedKey{PrivateKey: key, Comment: p}); err != nil {
			return nil, fmt.Errorf("%s: %w", p, err)
		}
	}
	return func(context.Context) (net.Conn, error) { return serve(keys, nil), nil }, nil
}

func readKey(path string) (any, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	key, err := ssh.ParseRawPrivateKey(b)
	var locked *ssh.PassphraseMissingError
	if errors.As(err, &locked) {
		return nil, fmt.Errorf("%s: the key has a passphrase; add it to an agent and use --ssh default", path)
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return key, nil
}

func socketAgent(path string) builder.Agent {
	return func(ctx context.Context) (net.Conn, error) {
		var d net.Dialer
		c, err := d.DialContext(ctx, "unix", path)
		if err != nil {
			return nil, err
		}
		return serve(agent.NewClient(c), c), nil
	}
}

// serve answers the requests that arrive on the connection it returns, until that is closed.
func serve(a agent.ExtendedAgent, upstream net.Conn) net.Conn {
	here, there := net.Pipe()
	c := &served{Conn: here, done: make(chan struct{})}
	go func() {
		defer close(c.done)
		agent.ServeAgent(signer{a}, there) // ends with an error when the other end is closed
		there.Close()
		if upstream != nil {
			upstream.Close()
		}
	}()
	return c
}

// served is a connection that somebody in this process answers.
type served struct {
	net.Conn
	done chan struct{} // closed when nobody answers any more
}

// Close closes the connection and waits for who answered it.
func (c *served) Close() error {
	err := c.Conn.Close()
	<-c.done
	return err
}

// signer is an agent that only lists and signs.
type signer struct{ agent.ExtendedAgent }

var errSignOnly = errors.New("a build may only use keys, not change them")

func (signer) Add(agent.AddedKey) error   { return errSignOnly }
func (signer) Remove(ssh.PublicKey) error { return errSignOnly }
func (signer) RemoveAll() error           { return errSignOnly }
func (signer) Lock([]byte) error          { return errSignOnly }
func (signer) Unlock([]byte) error        { return errSignOnly }

// Extension offers none.
func (signer) Extension(string, []byte) ([]byte, error) { return nil, agent.ErrExtensionUnsupported }
