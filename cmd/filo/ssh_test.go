package main

import (
	"crypto/ed25519"
	"crypto/rand"
	"encoding/pem"
	"net"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/crypto/ssh"
	"golang.org/x/crypto/ssh/agent"
)

// writeKey writes a private key and returns its path.
func writeKey(t *testing.T) string {
	t.Helper()
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	block, err := ssh.MarshalPrivateKey(key, "")
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "key")
	if err := os.WriteFile(path, pem.EncodeToMemory(block), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// TestAgent asks an agent made of a key, and one behind a socket, to sign; nothing else is allowed.
func TestAgent(t *testing.T) {
	path := writeKey(t)
	all, err := agents([]string{"k=" + path}, variables())
	if err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	served := make(chan struct{})
	go func() {
		defer close(served)
		c, err := l.Accept()
		if err != nil {
			return
		}
		keys := agent.NewKeyring()
		_, key, _ := ed25519.GenerateKey(rand.Reader)
		keys.Add(agent.AddedKey{PrivateKey: key})
		agent.ServeAgent(keys, c)
	}()
	behind, err := agents([]string{"default"}, variables("SSH_AUTH_SOCK", socket))
	if err != nil {
		t.Fatal(err)
	}
	for name, open := range map[string]func() (net.Conn, error){
		"key":    func() (net.Conn, error) { return all["k"](t.Context()) },
		"socket": func() (net.Conn, error) { return behind["default"](t.Context()) },
	} {
		conn, err := open()
		if err != nil {
			t.Fatal(err)
		}
		c := agent.NewClient(conn)
		keys, err := c.List()
		if err != nil || len(keys) != 1 {
			t.Fatalf("%s: List() = %v, %v, want one key", name, keys, err)
		}
		sig, err := c.Sign(keys[0], []byte("data"))
		if err != nil {
			t.Fatalf("%s: Sign: %v", name, err)
		}
		if err := keys[0].Verify([]byte("data"), sig); err != nil {
			t.Errorf("%s: signature: %v", name, err)
		}
		if err := c.RemoveAll(); err == nil {
			t.Errorf("%s: RemoveAll is allowed", name)
		}
		if err := c.Lock([]byte("x")); err == nil {
			t.Errorf("%s: Lock is allowed", name)
		}
		conn.Close()
	}
	<-served
}
