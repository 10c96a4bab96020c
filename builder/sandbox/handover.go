package sandbox

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"path"
	"reflect"
	"slices"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

const (
	self     = "/proc/self/exe"
	orderFD  = 3
	reportFD = 4
)

// handover is all that a child has to know. It goes through a socket or a pipe: secrets are
// in nobody's arguments, environment or files.
type handover struct {
	Process               Process
	Hosts, Resolv, Filter []byte
	Version1              []string // controllers of cgroups of version 1 that limit it
	NoDevices             bool     // device nodes are dead but in /dev
	Limited               bool     // the launcher says when it is not needed in its cgroups any more
}

// prepare fills in the defaults of p and packs it for the child.
func (r *Runner) prepare(p Process) (*handover, error) {
	fail := func(step string, err error) (*handover, error) {
		return nil, &SetupError{Step: step, Err: err}
	}
	if p.Hostname == "" {
		p.Hostname = "buildkitsandbox"
	}
	if p.Dir == "" {
		p.Dir = "/"
	}
	if p.ShmSize == 0 {
		p.ShmSize = 64 << 20
	}
	if p.Ground.SingleID { // whatever owner a mount is to have, the process is the only one there is
		p.Mounts = slices.Clone(p.Mounts)
		for i := range p.Mounts {
			p.Mounts[i].UID, p.Mounts[i].GID = 0, 0
		}
	}
	hosts, err := hostsFile(p.Hostname, p.ExtraHosts)
	if err != nil {
		return fail("make /etc/hosts", err)
	}
	resolv, err := os.ReadFile("/etc/resolv.conf")
	if err != nil && !os.IsNotExist(err) {
		return fail("read resolv.conf", err)
	}
	var filter []byte
	// Without the capability, a filter would keep set-user-ID programs from
	// working; then the one that filo itself runs under has to do.
	if !p.Insecure && (p.Ground.Name != groundChroot || has(unix.CAP_SYS_ADMIN)) {
		shared := (p.Network == "" || p.Network == NetworkDefault) && p.Ground.Name != groundChroot && !inUserNamespace()
		if filter, err = r.filter(shared); err != nil {
			return fail("compile seccomp filter", err)
		}
	}
	p.Stdout, p.Stderr = nil, nil
	return &handover{Process: p, Hosts: hosts, Resolv: p.DNS.edit(resolv), Filter: filter}, nil
}

// edit returns a resolv.conf in which d's lines stand for those of their kind.
func (d DNS) edit(conf []byte) []byte {
	for _, kind := range []struct {
		words []string // that begin a line of the kind, the one to write first
		lines []string
	}{
		{[]string{"nameserver"}, d.Servers},
		{[]string{"search", "domain"}, line(d.Search)},
		{[]string{"options"}, line(d.Options)},
	} {
		if len(kind.lines) == 0 {
			continue
		}
		var kept strings.Builder
		for line := range strings.Lines(string(conf)) {
			if f := strings.Fields(line); len(f) > 0 && slices.Contains(kind.words, f[0]) {
				continue
			}
			kept.WriteString(strings.TrimSuffix(line, "\n") + "\n")
		}
		for _, l := range kind.lines {
			kept.WriteString(kind.words[0] + " " + l + "\n")
		}
		conf = []byte(kept.String())
	}
	return conf
}

// line makes one line of words, and none of none.
func line(words []string) []string {
	if len(words) == 0 {
		return nil
	}
	return []string{strings.Join(words, " ")}
}

// check finds what can be known to be wrong before a process is made.
func check(p Process) error {
	fail := func(format string, args ...any) error {
		return &SetupError{Step: "check", Err: fmt.Errorf(format, args...)}
	}
	if len(p.Args) == 0 {
		return fail("no command")
	}
	if err := p.Root.check(); err != nil {
		return fail("root: %w", err)
	}
	if p.Ground.Name == groundChroot && p.Root.Dir == "" {
		return fail("root: layers cannot be mounted on the chroot ground")
	}
	if p.Ground.Name == groundChroot && p.Network == NetworkNone {
		return fail("network none: this needs a network namespace, which cannot be made here (isolation chroot: %s)", p.Ground.Reason)
	}
	if strings.ContainsFunc(p.Hostname, func(r rune) bool { return r <= ' ' || r == 0x7f }) {
		return fail("hostname %q: not a name", p.Hostname)
	}
	switch p.Network {
	case "", NetworkDefault, NetworkHost, NetworkNone:
	default:
		return fail("network %q: not one of default, host, none", p.Network)
	}
	for _, m := range p.Mounts {
		if !path.IsAbs(m.Target) || path.Clean(m.Target) == "/" {
			return fail("mount target %q: not an absolute path below /", m.Target)
		}
		if m.Type == Overlay {
			if err := m.Root.check(); err != nil {
				return fail("mount %s: %w", m.Target, err)
			}
		}
	}
	for _, u := range p.Ulimits {
		if _, ok := limits(u.Name); !ok {
			return fail("ulimit %q: no such limit", u.Name)
		}
	}
	return nil
}

func (r Root) check() error {
	if r.Dir != "" {
		if len(r.Lower) > 0 || r.Upper != "" || r.Work != "" {
			return fmt.Errorf("a directory and an overlay")
		}
		return nil
	}
	if len(r.Lower) == 0 {
		return fmt.Errorf("no lower directory")
	}
	if (r.Upper == "") != (r.Work == "") {
		return fmt.Errorf("upper without work directory, or the reverse")
	}
	return nil
}

// hostsFile writes the lines that BuildKit writes.
func hostsFile(hostname string, extra []string) ([]byte, error) {
	var b bytes.Buffer
	fmt.Fprintf(&b, "127.0.0.1\tlocalhost %s\n::1\tlocalhost ip6-localhost ip6-loopback\n", hostname)
	for _, h := range extra {
		name, ip, ok := strings.Cut(h, "=")
		if !ok {
			name, ip, ok = strings.Cut(h, ":")
		}
		if !ok || name == "" || strings.ContainsAny(name, " \t\r\n#") {
			return nil, fmt.Errorf("host %q: not name:ip", h)
		}
		addr := strings.TrimSuffix(strings.TrimPrefix(ip, "["), "]")
		if strings.Trim(addr, "0123456789abcdefABCDEF.:") != "" || !strings.ContainsAny(addr, ".:") {
			return nil, fmt.Errorf("host %q: no IP address", h)
		}
		fmt.Fprintf(&b, "%s\t%s\n", addr, name)
	}
	return b.Bytes(), nil
}

// report is what a child says when it cannot become the process.
type report struct {
	Step  string
	Text  string
	Errno syscall.Errno
	Code  int // not 0: the command itself cannot be executed
}

// starting goes before the execution, so that a child that died in its set-up
// is not taken for a process that failed.
const starting = 'x'

func readReport(r io.Reader) (started bool, failure *report) {
	all, err := io.ReadAll(io.LimitReader(r, 1<<20))
	if err != nil {
		return false, nil
	}
	if len(all) > 0 && all[0] == starting {
		started, all = true, all[1:]
	}
	if len(all) == 0 {
		return started, nil
	}
	failure = &report{}
	if _, err := decode(all, reflect.ValueOf(failure)); err != nil {
		return false, nil
	}
	return started, failure
}

func (f *report) error(args []string) error {
	if f.Code != 0 {
		return &ExitError{Args: args, Code: f.Code, Reason: f.Text}
	}
	return &SetupError{Step: f.Step, Err: &cause{text: f.Text, errno: f.Errno}}
}

// cause is an error of another process that still compares to its errno.
type cause struct {
	text  string
	errno syscall.Errno
}

func (c *cause) Error() string { return c.text }

func (c *cause) Unwrap() error {
	if c.errno == 0 {
		return nil
	}
	return c.errno
}
